"""Sums of magnitudes in an order that depends on their number alone.

A row is added up in chunks. A chunk is cut into 16 columns, which are added in the work dtype, by
halves: numbers that are equal do not round, so that constant rows are exact. These sums, and what
does not fill the columns, go to eight lanes of float64 in turn. Then the chunks are added, one
after the other. The compiled loops do the same, so that both forms give the same bits.
"""

from __future__ import annotations

import numpy as np

from cubin.core import memory
from cubin.core.libraries import Array

CHUNK = 1 << 10
"""Numbers of a chunk. Where it is longer, 16 columns of it are read from memory more slowly."""

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
    parts = [m[:, :full].reshape(rows, full // CHUNK, CHUNK)] if full else []
    if full < length or not length:
        parts.append(m[:, None, full:])
    # `accumulate` adds one after the other, where `reduce` leaves the order open.
    return np.add.accumulate(np.concatenate(list(map(_chunk_sums, parts)), axis=1), axis=1)[:, -1]


def _chunk_sums(m: Array) -> Array:
    """The sums of chunks, (rows, chunks, n)."""
    rows, chunks, length = m.shape
    width = length // COLUMNS if length >= SHORT else 0
    whole, half = COLUMNS * width, COLUMNS // 2
    columns = m[..., :whole].reshape(rows, chunks, COLUMNS, width)
    sums = memory.scratch("columns", (rows, chunks, half, width), m.dtype)
    np.add(columns[..., :half, :], columns[..., half:, :], out=sums)
    while half > 1:
        half //= 2
        np.add(sums[..., :half, :], sums[..., half : 2 * half, :], out=sums[..., :half, :])
    size = width + length - whole
    turns = max(1, -(-size // LANES))
    wide = memory.scratch("lanes", (rows, chunks, turns * LANES), np.float64)
    wide[..., :width], wide[..., width:size] = sums[..., 0, :], m[..., whole:]
    wide[..., size:] = 0
    lanes = np.add.accumulate(wide.reshape(rows, chunks, turns, LANES), axis=2)[..., -1, :]
    pairs = lanes[..., ::2] + lanes[..., 1::2]
    return (pairs[..., 0] + pairs[..., 1]) + (pairs[..., 2] + pairs[..., 3])
