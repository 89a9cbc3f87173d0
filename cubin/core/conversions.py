"""Conversions between float types that keep every number, on devices too.

CuPy compiles its own functions with ``-ftz=true``: they take a float32 below 2^-126 for 0, and a
conversion from or to float32 is no exception. These keep it. In float64 there is no such number
that came from a float32, so that what is widened can be left to CuPy's functions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cubin.core import libraries
from cubin.core.libraries import Array
from cubin.core.primitives import FLOATS, elementwise


@elementwise("T x", "float64 y", "y = to_double(Work<T>::type(x))", types=FLOATS)
def widen(x: np.ndarray, *, y: np.ndarray) -> None:
    """x in float64."""
    y[...] = x


@elementwise("float64 x", "W y", "y = from_double<W>(x)", types=FLOATS[1:])
def narrow(x: np.ndarray, *, y: np.ndarray) -> None:
    """x rounded to float32 or float64."""
    y[...] = x


def widened(x: Array) -> Array:
    """A new array: `x` in float64."""
    if not libraries.on_device(x):
        return x.astype(np.float64)
    y = libraries.library(x).empty(x.shape, np.float64)
    widen(x, y=y)
    return y


def narrowed(x: Array, dtype: Any) -> Array:
    """`x`, of float64, rounded to float32 or float64; itself where that changes nothing."""
    if not libraries.on_device(x) or x.dtype == dtype:
        return x.astype(dtype, copy=False)
    y = libraries.library(x).empty(x.shape, dtype)
    narrow(x, y=y)
    return y


def computable(x: Array) -> Array:
    """`x` as the functions of its library compute with it exactly: in float64 on a device."""
    return widened(x) if libraries.on_device(x) and x.dtype != np.float64 else x
