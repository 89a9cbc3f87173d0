"""Sums on the tape: how many addends meet in which dtype.

The rounding error of a sum taken one addend after the other grows with their number, until the
addends no longer move it: at 2^11 equal ones in float16, at 2^24 in float32. NumPy takes sums in
this way along every axis but the innermost in memory. Here float16 is added in float32, and at most
`BLOCK` addends meet in float32: what comes of each such block is added in float64. No float64 copy
of an array is made, only one of a `BLOCK`-th of it.
"""

from __future__ import annotations

import math

import numpy as np

from cubin.core.floats import work_dtype
from cubin.core.libraries import Array

BLOCK = 32
"""The largest number of addends that are added in float32, to within 3e-7 of their sum."""


def sum_dtype(dtype: np.dtype, count: int) -> np.dtype:
    """What to add `count` addends of `dtype` in where each is added to the sum so far."""
    if count <= 1:
        return np.dtype(dtype)
    return work_dtype(dtype) if count <= BLOCK else np.dtype(np.float64)


def total(x: Array, axes: tuple[int, ...]) -> Array:
    """The sum of `x` over `axes`, different and from 0, in float64; they stay, with length 1."""
    dtype = sum_dtype(x.dtype, math.prod(x.shape[axis] for axis in axes))
    if dtype != np.float64 or x.dtype == np.float64:
        return x.sum(axis=axes, keepdims=True, dtype=dtype).astype(np.float64, copy=False)
    # A block takes the axes that are innermost in memory, and a part of the next one.
    whole = []
    room = BLOCK
    for axis in sorted(axes, key=lambda axis: abs(x.strides[axis])):
        if x.shape[axis] > room:
            break
        whole.append(axis)
        room //= x.shape[axis]
    length = x.shape[axis]
    blocks = -(-length // room)
    size = length // blocks
    lead = (slice(None),) * axis
    split = x[(*lead, slice(blocks * size))].reshape(
        *x.shape[:axis], blocks, size, *x.shape[axis + 1 :]
    )
    within = (axis + 1, *(number + (number > axis) for number in whole))
    sums = split.sum(axis=within, keepdims=True, dtype=work_dtype(x.dtype)).squeeze(axis + 1)
    result = sums.sum(axis=axes, keepdims=True, dtype=np.float64)
    if blocks * size < length:
        rest = x[(*lead, slice(blocks * size, None))]
        result = result + rest.sum(axis=axes, keepdims=True, dtype=np.float64)
    return result
