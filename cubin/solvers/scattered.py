"""Greedy's scales of rows that are scattered over several arrays: the same however they are cut.

Magnitudes become integers, in units of a tiny part of the largest one of the row. Sums of integers
are exact, so that any arrays may be summed up in any order, on any machine. The scale is the exact
mean of these integers, rounded once.

A magnitude m is cut off to two words of ``word_bits(n)`` bits, where n is the length of the row:
the sum of n words fits 62 bits. For rows of 2^27 elements both words have 68 bits, so that a
magnitude is off by less than 2^-68 of the largest one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cubin.core import floats, memory, passes
from cubin.core.bits import Bits
from cubin.core.passes import Part
from cubin.core.rows import Rows

COLUMNS = 5
"""Entries of a row in `integer_sums`."""


def word_bits(length: int) -> int:
    """The bits of a word for rows of so many elements in all arrays together."""
    return 62 - length.bit_length()


def largest(x: np.ndarray, bits: Bits, rows: Rows) -> np.ndarray:
    """The largest finite magnitude of elements with a code, (rows, 1) in float64, or 0."""
    most = np.zeros((rows.count, 1))
    parts: list[tuple[slice, np.ndarray]] = []

    def find(part: Part, x: np.ndarray, bits: Any) -> None:
        m = np.abs(floats.in_work_dtype(x))
        counts = np.isfinite(m) & np.greater(bits, 0)
        parts.append((part.rows, m.max(axis=1, keepdims=True, initial=0, where=counts)))

    passes.for_each_part(find, rows, x, bits.values)
    for at, maxima in parts:
        np.maximum(most[at], maxima, out=most[at])
    return most


def integer_sums(
    x: np.ndarray, bits: Bits, rows: Rows, scales: list[np.ndarray], top: np.ndarray, length: int
) -> np.ndarray:
    """Sums over the elements with a code at the next level, (rows, COLUMNS) in int64.

    These are the high words and the low words of |residual|, how many elements there are, and how
    many of their residuals are infinite or NaN, which have no words.

    Parameters
    ----------
    x, bits, rows
        One of the arrays.
    scales : list of array, shape (rows, 1)
        Those of the levels so far, in the work dtype.
    top : array, shape (rows, 1)
        The largest of all arrays' `largest`.
    length : int
        The length of the rows in all arrays together.
    """
    word = word_bits(length)
    _, exponent = np.frexp(top)
    total = np.zeros((rows.count, COLUMNS), np.int64)
    parts: list[tuple[slice, np.ndarray]] = []

    def add_up(part: Part, x: np.ndarray, bits: Any) -> None:
        m = memory.scratch("magnitude", x.shape, floats.work_dtype(x.dtype))
        np.abs(floats.in_work_dtype(x), out=m)
        for scale in scales:
            np.abs(np.subtract(m, scale[part.rows], out=m), out=m)
        coded = np.broadcast_to(np.greater(bits, len(scales)), m.shape)
        finite = np.isfinite(m)
        # Residuals do not exceed the largest magnitude: a scale is a mean of such.
        wide = np.where(coded & finite, m, 0).astype(np.float64)
        wide = np.ldexp(wide, word - exponent[part.rows])
        high = np.floor(wide)
        low = np.floor(np.ldexp(wide - high, word))
        counted = (high, low, coded, coded & np.isinf(m), coded & np.isnan(m))
        sums = [c.astype(np.int64).sum(axis=1) for c in counted]
        parts.append((part.rows, np.stack(sums, axis=1)))

    passes.for_each_part(add_up, rows, x, bits.values)
    for at, sums in parts:
        total[at] += sums
    return total


def means(sums: np.ndarray, top: np.ndarray, length: int, dtype: Any) -> np.ndarray:
    """The scales, (rows, 1) in the work dtype of `dtype`, from the sums over all arrays.

    As from whole rows, a scale is NaN or infinite where a residual is, and 0 where no element has
    a code.
    """
    word = word_bits(length)
    _, exponent = np.frexp(top)
    mean = np.zeros((len(sums), 1))
    for row, (high, low, count, infinite, undefined) in enumerate(sums.tolist()):
        if undefined or infinite:
            mean[row] = np.nan if undefined else np.inf
        elif count:
            # Python divides integers of any length with a single rounding.
            mean[row] = ((high << word) + low) / (count << 2 * word)
    return np.ldexp(mean, exponent).astype(floats.work_dtype(dtype))
