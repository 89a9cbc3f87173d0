"""The primitive of `errors.py` as a compiled loop, chunk by chunk and with the same bits.

Products are added up as `cubin.core.sums` does it. None is stored beyond its chunk.
"""

from __future__ import annotations

import numpy as np

from cubin.core import floats, memory
from cubin.core.host.loops import (
    in_rows,
    loop,
    part,
    read_only,
    sum_in_lanes,
    widen,
)
from cubin.core.libraries import Array
from cubin.core.sums import CHUNK, COLUMNS, SHORT

# The bits of a magnitude are an integer: in the order of the magnitudes, with NaN above them all.
# LLVM fills vector registers with the largest of integers, but not with that of floats.


@part
def _add_halves(x: Array, y: Array, sums: Array) -> np.int64:
    """Write the sums of products at j, and at j in the second half of the chunk, for each j.

    Returns the bits of the largest error.
    """
    half, worst = x.size // 2, np.int64(0)
    for j in range(half):
        a, b = np.float64(x[j]), np.float64(y[j])
        c, d = np.float64(x[j + half]), np.float64(y[j + half])
        e, f = abs(a - b), abs(c - d)
        sums[0, j] = e * e + f * f
        sums[1, j] = a * a + c * c
        sums[2, j] = b * b + d * d
        sums[3, j] = a * b + c * d
        worst = max(worst, np.float64(e).view(np.int64))
        worst = max(worst, np.float64(f).view(np.int64))
    return worst


@part
def _add_columns(m: Array, n: int) -> None:
    """Add up eight columns of n numbers by halves, into the first of them."""
    for j in range(n):
        even = (m[j] + m[j + 4 * n]) + (m[j + 2 * n] + m[j + 6 * n])
        odd = (m[j + n] + m[j + 5 * n]) + (m[j + 3 * n] + m[j + 7 * n])
        m[j] = even + odd


@part
def _append(x: Array, y: Array, size: int, sums: Array) -> np.int64:
    """Write the products behind the first `size` sums; return the bits of the largest error."""
    worst = np.int64(0)
    for j in range(x.size):
        a, b = np.float64(x[j]), np.float64(y[j])
        e = abs(a - b)
        sums[0, size + j], sums[1, size + j] = e * e, a * a
        sums[2, size + j], sums[3, size + j] = b * b, a * b
        worst = max(worst, np.float64(e).view(np.int64))
    return worst


@part
def _add_chunk(x: Array, y: Array, sums: Array, totals: Array) -> np.int64:
    """Add the products of a chunk to four totals; return the bits of the largest error."""
    width = x.size // COLUMNS if x.size >= SHORT else 0
    whole = COLUMNS * width
    worst = _add_halves(x[:whole], y[:whole], sums)
    for k in range(4):
        _add_columns(sums[k], width)
    worst = max(worst, _append(x[whole:], y[whole:], width, sums))
    for k in range(4):
        totals[k] += sum_in_lanes(sums[k], width + x.size - whole)
    return worst


@loop
def _moments(x: Array, y: Array, sums: Array, totals: Array, worst: Array) -> None:
    for row in range(len(x)):
        totals[row], largest = 0, np.int64(0)
        for start in range(0, x.shape[1], CHUNK):
            elements, approx = x[row, start : start + CHUNK], y[row, start : start + CHUNK]
            largest = max(largest, _add_chunk(elements, approx, sums, totals[row]))
        worst[row] = np.int64(largest).view(np.float64)


@loop
def _moments_of_narrow(
    x: Array, y: Array, ieee: bool, words: Array, wide: Array, sums: Array, totals: Array,
    worst: Array,
) -> None:  # fmt: skip
    """The same for float16 and bfloat16 as bit patterns; `wide` are the words, as floats."""
    for row in range(len(x)):
        totals[row], largest = 0, np.int64(0)
        for start in range(0, x.shape[1], CHUNK):
            elements, approx = x[row, start : start + CHUNK], y[row, start : start + CHUNK]
            n = elements.size
            widen(elements, words[0], ieee)
            widen(approx, words[1], ieee)
            largest = max(largest, _add_chunk(wide[0, :n], wide[1, :n], sums, totals[row]))
        worst[row] = np.int64(largest).view(np.float64)


def moments(
    x: Array,
    approx: Array,
    *,
    error: Array,
    power: Array,
    power_of_approx: Array,
    product: Array,
    worst: Array,
) -> None:
    """`errors.moments`."""
    plain, near = read_only(in_rows(x)), read_only(in_rows(approx))
    sums = memory.scratch("moments", (4, CHUNK // 2), np.float64)
    totals, largest = np.empty((len(x), 4)), np.empty(len(x))
    if floats.is_narrow(x.dtype):
        words = memory.scratch("words of moments", (2, CHUNK), np.uint32)
        half = (a.view(np.uint16) for a in (plain, near))
        ieee = x.dtype == np.float16
        _moments_of_narrow(*half, ieee, words, words.view(np.float32), sums, totals, largest)
    else:
        _moments(plain, near, sums, totals, largest)
    for number, total in enumerate((error, power, power_of_approx, product)):
        total[:, 0] = totals[:, number]
    worst[:, 0] = largest
