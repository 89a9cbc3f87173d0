"""Sums of magnitudes in an order that depends on their number alone.

A row is added up in chunks. A chunk is cut into 16 columns, which are added in the work dtype, by
halves: numbers that are equal do not round, so that constant rows are exact. These sums, and what
does not fill the columns, go to eight lanes of float64 in turn, chunk after chunk. The compiled
loops do the same, so that both forms give the same bits.
"""

from __future__ import annotations

import numpy as np

from cubin.core import memory
from cubin.core.libraries import Array

CHUNK = 1 << 12
"""Numbers that are added up while they are in the first cache."""

COLUMNS = 16

LANES = 8

SHORT = 1 << 7
"""Fewer numbers are not cut into columns, which would fill no vectors."""

UNIT = 1 / COLUMNS
"""In units of 1 / UNIT no column overflows."""


def magnitude_sums(m: Array) -> Array:
    """The sums, (rows, 1) in float64, of numbers, (rows, n), none of which is negative."""
    totals = _row_sums(m)
    over = totals == np.inf
    if over.any():
        totals[over] = _row_sums(m[over] * m.dtype.type(UNIT)) / UNIT
    return totals[:, None]


def _row_sums(m: Array) -> Array:
    rows, length = m.shape
    full = length // CHUNK * CHUNK
    parts = [_in_columns(m[:, :full].reshape(rows, full // CHUNK, CHUNK))] if full else []
    if full < length:
        parts.append(_in_columns(m[:, None, full:]))
    size = sum(part.shape[1] for part in parts)
    parts.append(np.zeros((rows, -size % LANES if size else LANES), m.dtype))
    turns = np.concatenate(parts, axis=1, dtype=np.float64).reshape(rows, -1, LANES)
    # Adds one after the other, where `reduce` leaves the order open.
    lanes = np.add.accumulate(turns, axis=1)[:, -1]
    pairs = lanes[:, ::2] + lanes[:, 1::2]
    fours = pairs[:, ::2] + pairs[:, 1::2]
    return fours[:, 0] + fours[:, 1]


def _in_columns(m: Array) -> Array:
    """The sums of the columns of chunks, (rows, chunks, n), and what fills none, row by row."""
    width = m.shape[-1] // COLUMNS if m.shape[-1] >= SHORT else 0
    whole, half = COLUMNS * width, COLUMNS // 2
    columns = m[..., :whole].reshape(*m.shape[:-1], COLUMNS, width)
    sums = memory.scratch("columns", (*m.shape[:-1], half, width), m.dtype)
    np.add(columns[..., :half, :], columns[..., half:, :], out=sums)
    while half > 1:
        half //= 2
        np.add(sums[..., :half, :], sums[..., half : 2 * half, :], out=sums[..., :half, :])
    together = np.concatenate([sums[..., 0, :], m[..., whole:]], axis=-1)
    return together.reshape(len(m), -1)
