"""Sums of rows in an order that depends on the number of elements alone.

A row is cut into chunks of 1024 numbers, the last of which may be shorter.

1. A chunk of n numbers is cut into 16 columns of n // 16. The columns are added in the work dtype,
   the first half to the second, until one is left. Adding equal numbers so does not round, which
   makes the scales of constant rows exact.
2. The numbers of this column, and those that fill no column, are added in float64: to eight lanes
   in turn, and then the lanes in pairs. Chunks of fewer than 128 numbers start here.
3. The sums of the chunks are added in float64, one after the other.

The compiled loops do the same, operation by operation, so that both forms give the same bits.
"""

from __future__ import annotations

import numpy as np

from cubin.core import memory
from cubin.core.libraries import Array

CHUNK = 1 << 10
"""Numbers of a chunk. Sixteen columns of a longer one are read from memory more slowly."""

COLUMNS = 16
"""Columns of a chunk: numbers that are added in the work dtype."""

LANES = 8
"""Lanes of float64, which fill the vector registers of processors with 512 bits, or two of 256."""

SHORT = 1 << 7
"""A chunk of fewer numbers is not cut into columns, which would be shorter than a register."""

UNIT = 1 / COLUMNS
"""What the numbers of a row are multiplied by where a sum of columns overflows."""


def magnitude_sums(m: Array) -> Array:
    """The sums, (rows, 1) in float64, of the numbers of rows, (rows, n), none of them negative."""
    totals = row_sums(m)
    over = totals == np.inf
    if np.count_nonzero(over):
        totals[over] = row_sums(m[over] * m.dtype.type(UNIT)) / UNIT
    return totals[:, None]


def row_sums(m: Array) -> Array:
    """The sums, (rows,) in float64, of the numbers of rows, (rows, n)."""
    rows, length = m.shape
    full = length // CHUNK * CHUNK
    parts = [m[:, :full].reshape(rows, full // CHUNK, CHUNK)] if full else []
    if full < length or not length:
        parts.append(m[:, None, full:])
    sums = _joined([_chunk_sums(part) for part in parts], axis=1)
    # `accumulate` adds one after the other. The order of `reduce` along a row is not specified.
    return np.add.accumulate(sums, axis=1)[:, -1]


def _chunk_sums(m: Array) -> Array:
    """The sums of chunks, (rows, chunks, n)."""
    rows, chunks, length = m.shape
    width = length // COLUMNS if length >= SHORT else 0
    whole, half = COLUMNS * width, COLUMNS // 2
    numbers = []
    if width:
        # The columns come first, so that halves of them lie in one run each.
        columns = m[..., :whole].reshape(rows, chunks, COLUMNS, width).transpose(2, 0, 1, 3)
        sums = memory.scratch("columns", (half, rows, chunks, width), m.dtype)
        np.add(columns[:half], columns[half:], out=sums)
        while half > 1:
            half //= 2
            np.add(sums[:half], sums[half : 2 * half], out=sums[:half])
        numbers.append(sums[0])
    if whole < length:
        numbers.append(m[..., whole:])
    size = width + length - whole
    turns = max(1, -(-size // LANES))
    if size < turns * LANES:
        numbers.append(np.zeros((rows, chunks, turns * LANES - size), m.dtype))
    # Along the first axis, which is not that of neighbours in memory, `reduce` adds one after the
    # other, all lanes of all rows at a time.
    wide = memory.scratch("lanes", (turns, rows, chunks, LANES), np.float64)
    in_turns = _joined(numbers, axis=2).reshape(rows, chunks, turns, LANES)
    np.copyto(wide, in_turns.transpose(2, 0, 1, 3))
    lanes = np.add.reduce(wide, axis=0)
    pairs = lanes[..., ::2] + lanes[..., 1::2]
    pairs = pairs[..., ::2] + pairs[..., 1::2]
    return pairs[..., 0] + pairs[..., 1]


def _joined(parts: list[Array], axis: int) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)
