"""Conversions between float types that keep subnormal numbers, on devices too.

CuPy compiles its own functions with ``-ftz=true``: they take a float32 below 2^-126 for 0, even
when they only convert it. The conversions here keep it. A float32 that is widened to float64 is
never subnormal there, so that CuPy's functions can work on it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cubin.core import floats, libraries
from cubin.core.libraries import Array
from cubin.core.primitives import FLOATS, elementwise


@elementwise("T x", "float64 y", "y = to_double(Work<T>::type(x))", types=FLOATS)
def widen(x: np.ndarray, *, y: np.ndarray) -> None:
    """x in float64."""
    y[...] = x


@elementwise("float64 x", "T y", "y = from_double<T>(x)", types=FLOATS)
def narrow(x: np.ndarray, *, y: np.ndarray) -> None:
    """x rounded to a float dtype."""
    y[...] = floats.rounded(x, y.dtype)


def widened(x: Array) -> Array:
    """A copy of `x` in float64."""
    if not libraries.on_device(x):
        with np.errstate(invalid="ignore"):  # NumPy warns of signalling NaN
            return x.astype(np.float64)
    y = libraries.library(x).empty(x.shape, np.float64)
    widen(x, y=y)
    return y


def rounded(x: Array, dtype: Any) -> Array:
    """Floats in another float dtype, rounded once; `x` itself where it has that."""
    if x.dtype == dtype:
        return x
    if not libraries.on_device(x):
        return floats.rounded(x, dtype)
    return narrowed(widened(x), dtype)


def narrowed(x: Array, dtype: Any) -> Array:
    """`x`, of float64, rounded to a float dtype; `x` itself where it has that."""
    if not libraries.on_device(x) or x.dtype == dtype:
        return floats.rounded(x, dtype)
    y = libraries.library(x).empty(x.shape, dtype)
    narrow(x, y=y)
    return y


def computable(x: Array) -> Array:
    """`x` in a dtype in which its library's functions keep every number, and NumPy is fast.

    That is float64 on a device, and the work dtype on the host.
    """
    if not libraries.on_device(x):
        return floats.in_work_dtype(x)
    return widened(x) if x.dtype != np.float64 else x
