"""Sums of magnitudes in an order that depends on their number alone.

A row is added up in chunks. A chunk is cut into 16 columns, which are added in the work dtype, by
halves: numbers that are equal do not round, so that constant rows are exact. These sums, and what
does not fill the columns, are added in float64, by halves again; and so are the chunks, one after
the other. The compiled loops do the same, so that both forms give the same bits.
"""

from __future__ import annotations

import numpy as np

from cubin.core import memory
from cubin.core.libraries import Array

CHUNK = 1 << 12
"""Numbers that are added up while they are in the first cache."""

COLUMNS = 16

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
    parts = [m[:, full:].reshape(rows, 1, length - full)] if full < length else []
    if full:
        parts.insert(0, m[:, :full].reshape(rows, full // CHUNK, CHUNK))
    totals = [np.zeros((rows, 1)), *map(_chunk_sums, parts)]
    return np.add.accumulate(np.concatenate(totals, axis=1), axis=1)[:, -1]


def _chunk_sums(m: Array) -> Array:
    """The sums over the last of three axes."""
    width = m.shape[-1] // COLUMNS
    whole = COLUMNS * width
    columns = m[..., :whole].reshape(*m.shape[:-1], COLUMNS, width)
    half = COLUMNS // 2
    sums = memory.scratch("columns", (*m.shape[:-1], half, width), m.dtype)
    np.add(columns[..., :half, :], columns[..., half:, :], out=sums)
    while half > 1:
        half //= 2
        np.add(sums[..., :half, :], sums[..., half : 2 * half, :], out=sums[..., :half, :])
    wide = np.concatenate([sums[..., 0, :], m[..., whole:]], axis=-1, dtype=np.float64)
    count = wide.shape[-1]
    while count > 1:
        half = (count + 1) // 2
        wide[..., : count - half] += wide[..., half:count]
        count = half
    return wide[..., 0]
