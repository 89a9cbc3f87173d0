"""Sums on the tape: how many addends meet in which dtype.

The rounding error of a sum taken one addend after the other grows with their number, until the
addends no longer move it: at 2^8 equal ones in bfloat16, 2^11 in float16 and 2^24 in float32. NumPy
takes sums in this way along every axis but the innermost in memory. Here float16 and bfloat16 are
added in float32, and at most `BLOCK` addends meet in float32, in pairs, so that equal ones do not
round: what comes of each such block is added in float64, and so is what has no partner. No float64
copy of an array is made. CuPy adds in float64 right away.
"""

from __future__ import annotations

import math

import numpy as np

from cubin.core import conversions
from cubin.core.floats import work_dtype
from cubin.core.libraries import Array, on_device

BLOCK = 32
"""The largest number of addends that are added in float32, to within 3e-7 of their sum."""


def sum_dtype(dtype: np.dtype, count: int) -> np.dtype:
    """What to add `count` addends of `dtype` in where each is added to the sum so far."""
    if count <= 1:
        return np.dtype(dtype)
    return work_dtype(dtype) if count <= BLOCK else np.dtype(np.float64)


def rounded(x: Array, dtype: np.dtype) -> Array:
    """What comes of sums, in `dtype`: rounded once, bfloat16 too."""
    once = x.dtype != np.float64 or dtype in (np.float16, np.float32)
    return x.astype(dtype, copy=False) if once else conversions.rounded(x, dtype)


def total(x: Array, axes: tuple[int, ...]) -> Array:
    """The sum of `x` over `axes`, different and from 0, in float64; they stay, with length 1."""
    dtype = sum_dtype(x.dtype, math.prod(x.shape[axis] for axis in axes))
    if dtype != np.float64 or x.dtype == np.float64:
        return x.sum(axis=axes, keepdims=True, dtype=dtype).astype(np.float64, copy=False)
    if on_device(x):  # a reduction of CuPy's widens what it reads
        return x.sum(axis=axes, keepdims=True, dtype=np.float64)
    # Halves of the array are added to each other, which goes through long runs of memory.
    result = 0.0
    for _ in range(BLOCK.bit_length() - 1):
        axis = max(axes, key=lambda axis: x.shape[axis])
        half, odd = divmod(x.shape[axis], 2)
        lead = (slice(None),) * axis
        if odd:
            rest = x[(*lead, slice(2 * half, None))]
            result = result + rest.sum(axis=axes, keepdims=True, dtype=np.float64)
        first, second = x[(*lead, slice(half))], x[(*lead, slice(half, 2 * half))]
        x = np.add(first, second, dtype=work_dtype(x.dtype))
    return result + x.sum(axis=axes, keepdims=True, dtype=np.float64)
