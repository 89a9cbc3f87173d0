"""Bit patterns of floats on the host, and the work dtype."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

_NAMES = ("float16", "bfloat16", "float32", "float64")
_NATIVE = frozenset(map(np.dtype, (np.float16, np.float32, np.float64)))


def is_float(dtype: Any) -> bool:
    """Whether cubin takes arrays of this dtype.

    bfloat16 is ml_dtypes', and known by its name: NumPy gives it the kind "V", and the letter "E"
    to other dtypes, too.
    """
    return dtype in _NATIVE or dtype.name == "bfloat16"


def bfloat16() -> np.dtype[Any]:
    """The dtype bfloat16. ml_dtypes is imported here alone: an array of it has imported it."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def is_narrow(dtype: Any) -> bool:
    """Whether a float dtype is float16 or bfloat16, which are worked on in float32."""
    return bool(dtype.itemsize == 2)


def work_dtype(dtype: Any) -> np.dtype[Any]:
    """What residuals and scales are computed in: float32 for float16 and bfloat16, else `dtype`."""
    return np.dtype(np.float32) if is_narrow(dtype := np.dtype(dtype)) else dtype


def in_work_dtype(x: np.ndarray) -> np.ndarray:
    """`x` in its work dtype: itself where it has that, else a copy."""
    return x.astype(work_dtype(x.dtype), copy=False)


def rounded(x: Any, dtype: Any) -> Any:
    """Floats in another float dtype, rounded once.

    ml_dtypes makes bfloat16 of float64 by way of float32, which rounds twice. Rounding to an odd
    float32 first does not show in the result.
    """
    dtype = np.dtype(dtype)
    with np.errstate(all="ignore"):
        if x.dtype != np.float64 or not is_narrow(dtype) or dtype == np.float16:
            return x.astype(dtype, copy=False)
        near = np.asarray(x.astype(np.float32))
        word = as_integers(near)
        above = np.abs(near) > np.abs(x)
        # One below where the float32 is too far from 0, and odd where it is not exact.
        np.subtract(word, above, out=word, casting="unsafe")
        np.bitwise_or(word, near.astype(np.float64) != x, out=word, casting="unsafe")
        return near.astype(dtype)


_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def as_integers(x: np.ndarray) -> np.ndarray:
    """The bit patterns of floats, as a view."""
    return x.view(_UNSIGNED[x.dtype.itemsize])


def nearest(number: float, dtype: Any) -> np.float64:
    """The number of a float dtype that is nearest a Python number."""
    with np.errstate(over="ignore"):
        return np.float64(rounded(np.float64(number), dtype))


@functools.lru_cache(maxsize=1 << 8)
def magnitudes_up_to(bound: float, dtype: Any) -> Any:
    """How many magnitudes of a float dtype are at most `bound`: those with smaller bit patterns."""
    near = np.asarray(np.abs(rounded(np.float64(bound), dtype)))
    word = as_integers(near)[()]
    one = word.dtype.type(1)
    if not bound >= 0:
        return word.dtype.type(0)
    return word if near.astype(np.float64) > bound else word + one


def with_sign_of(r: np.ndarray, magnitude: Any) -> np.ndarray:
    """`magnitude` where ``r > 0``, else ``-magnitude``; both of one float dtype.

    ``0 - r`` is never -0.0, so its sign bit is set exactly where ``r > 0``. On random signs,
    copying that bit is ten times as fast as ``np.where``.
    """
    flipped = np.empty(r.shape, r.dtype)
    word = as_integers(flipped)
    top = word.dtype.type(1 << (8 * word.itemsize - 1))
    if is_narrow(r.dtype):
        # NumPy computes with these one by one, and with their bit patterns many at a time.
        positive = np.less(np.subtract(as_integers(r), 1), infinity(r.dtype))
        np.multiply(positive, top, out=word)
    else:
        np.subtract(0, r, out=flipped)
        np.bitwise_and(word, top, out=word)
    np.bitwise_xor(word, as_integers(magnitude) | top, out=word)
    return flipped


def is_nan(x: np.ndarray) -> np.ndarray:
    """Where `x` is NaN."""
    if not is_narrow(x.dtype):
        return np.isnan(x)
    return np.greater(np.bitwise_and(as_integers(x), 0x7FFF), infinity(x.dtype))


def infinity(dtype: Any) -> Any:
    """The bit pattern of infinity."""
    return as_integers(np.array(np.inf, dtype))[()]


def where(mask: np.ndarray, x: np.ndarray, out: np.ndarray) -> None:
    """Write `x` where `mask` is true, else +0.

    The bit patterns are multiplied by the mask, since 0 times a float may be NaN.
    """
    np.multiply(as_integers(x), mask, out=as_integers(out))
