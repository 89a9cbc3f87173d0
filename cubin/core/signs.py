"""Signs, and the masks and gradients of the straight-through estimator."""

from __future__ import annotations

import numpy as np

from cubin.core import memory
from cubin.core.floats import (
    as_integers,
    in_work_dtype,
    is_nan,
    magnitudes_up_to,
    where,
    with_sign_of,
)
from cubin.core.primitives import FLOATS, elementwise


@elementwise(
    "T x",
    "T y",
    "y = positive(Work<T>::type(x)) ? T(1) : x == x ? T(-1) : x",
    types=FLOATS,
    looped=True,
)
def signs(x: np.ndarray, *, y: np.ndarray) -> None:
    """+1 where x > 0, NaN where x is NaN, else -1."""
    result = with_sign_of(x, np.ones((), x.dtype))
    np.copyto(as_integers(result), as_integers(x), where=is_nan(x))
    y[...] = result


@elementwise(
    "T x, uint8 bits",
    "bool mask",
    "mask = inside(Work<T>::type(x), bits)",
    types=FLOATS,
    looped=True,
)
def inside_bits(x: np.ndarray, bits: np.ndarray, *, mask: np.ndarray) -> None:
    """|x| <= bits, compared exactly."""
    _inside(x, bits, mask)


@elementwise(
    "T x, float64 bound",
    "bool mask",
    "mask = fabs(to_double(Work<T>::type(x))) <= bound",
    types=FLOATS,
    looped=True,
)
def inside(x: np.ndarray, bound: np.ndarray, *, mask: np.ndarray) -> None:
    """|x| <= bound, compared in float64."""
    _inside(x, bound, mask)


def _inside(x: np.ndarray, bound: np.ndarray, mask: np.ndarray) -> None:
    """|x| <= bound, compared exactly.

    Bit patterns of magnitudes are in the order of the magnitudes, with NaN above all. So one number
    is compared as a pattern, which NumPy does fast in all dtypes.
    """
    if np.ndim(bound):
        np.less_equal(np.abs(in_work_dtype(x)), bound, out=mask)
        return
    word = as_integers(x)
    top = word.dtype.type(1 << (8 * word.itemsize - 1))
    magnitude = memory.scratch("magnitude", x.shape, word.dtype)
    np.bitwise_and(word, top - word.dtype.type(1), out=magnitude)
    np.less(magnitude, magnitudes_up_to(float(bound), x.dtype), out=mask)


@elementwise(
    "T x, uint8 bits, T gy",
    "T gx",
    "gx = inside(Work<T>::type(x), bits) ? gy : T(0)",
    types=FLOATS,
    looped=True,
)
def gradient_inside(x: np.ndarray, bits: np.ndarray, gy: np.ndarray, *, gx: np.ndarray) -> None:
    """The gradient gy where |x| <= bits, else +0."""
    where(np.abs(in_work_dtype(x)) <= bits, gy, out=gx)
