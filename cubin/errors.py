"""Errors of an approximation, per tensor or along axes. All sums are taken in float64.

The squares of float64 numbers below 1e-162 vanish, and those above 1e154 overflow. A ratio of such
sums is NaN, rather than a wrong 0 or infinity. Squares of other floats do neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cubin.calibration import Gram, matrix_for
from cubin.core import arrays, conversions, libraries, memory, passes
from cubin.core.libraries import Array
from cubin.core.primitives import FLOATS, reduction
from cubin.core.rows import axes_of, rows_of
from cubin.core.sums import CHUNK, row_sums

__all__ = [
    "Errors",
    "cosine_similarity",
    "max_abs_error",
    "measure",
    "output_mse",
    "relative_mse",
    "sqnr_db",
]

_CUDA = """
struct Moments {
  double error, power, power_of_approx, product, worst;
  __device__ Moments() : error(0), power(0), power_of_approx(0), product(0), worst(0) {}
  __device__ Moments(double x, double y)
      : error((x - y) * (x - y)), power(x * x), power_of_approx(y * y), product(x * y),
        worst(fabs(x - y)) {}
};
__device__ Moments operator+(const Moments& a, const Moments& b) {
  Moments sum;
  sum.error = a.error + b.error;
  sum.power = a.power + b.power;
  sum.power_of_approx = a.power_of_approx + b.power_of_approx;
  sum.product = a.product + b.product;
  // fmax would drop a NaN.
  sum.worst = a.worst > b.worst || a.worst != a.worst ? a.worst : b.worst;
  return sum;
}
"""


@reduction(
    "T x, T approx",
    "float64 error, float64 power, float64 power_of_approx, float64 product, float64 worst",
    map="Moments(to_double(Work<T>::type(x)), to_double(Work<T>::type(approx)))",
    reduce="a + b",
    post_map="error = a.error, power = a.power, power_of_approx = a.power_of_approx, "
    "product = a.product, worst = a.worst",
    identity="Moments()",
    reduce_type="Moments",
    types=FLOATS,
    looped=True,
    preamble=_CUDA,
)
def moments(
    x: np.ndarray,
    approx: np.ndarray,
    *,
    error: np.ndarray,
    power: np.ndarray,
    power_of_approx: np.ndarray,
    product: np.ndarray,
    worst: np.ndarray,
) -> None:
    """Sums of (x - y)^2, x^2, y^2 and x y over the last axis, and the largest |x - y|."""
    a, b = x.astype(np.float64), approx.astype(np.float64)
    products = memory.scratch("products", x.shape, np.float64)
    power[:, 0] = row_sums(np.multiply(a, a, out=products))
    power_of_approx[:, 0] = row_sums(np.multiply(b, b, out=products))
    # The loop begins with 0: a sum of -0.0 alone is +0 there.
    product[:, 0] = row_sums(np.multiply(a, b, out=products)) + 0.0
    np.subtract(a, b, out=a)
    error[:, 0] = row_sums(np.multiply(a, a, out=products))
    np.max(np.abs(a, out=a), axis=-1, keepdims=True, initial=0, out=worst)


@dataclass(frozen=True)
class Errors:
    """Sums from which all errors follow, per tensor (0-d) or for every index of the kept axes."""

    error: Array
    power: Array
    power_of_approx: Array
    product: Array
    worst: Array

    def relative_mse(self) -> Array:
        """The squared error over the power; 0 where both are 0."""
        return _relative_mse(self.error, self.power, self.worst)

    def sqnr_db(self) -> Array:
        """-10 log10 of the relative MSE, in dB."""
        return _decibels(self.relative_mse())

    def cosine_similarity(self) -> Array:
        """The cosine; 1 where both are 0, 0 where one is."""
        return _cosine(self.error, self.power, self.power_of_approx, self.product, self.worst)

    def given_to(self, library: libraries.Library) -> Errors:
        """The same sums as arrays of another library."""
        sums = (self.error, self.power, self.power_of_approx, self.product, self.worst)
        return Errors(*(library.give(a) for a in sums))


@libraries.border()
def _relative_mse(error: Array, power: Array, worst: Array) -> Array:
    with libraries.current_device(error):
        return _ratio(error, power, _lost(error, power, worst))[()]


@libraries.border()
def _decibels(relative_mse: Array) -> Array:
    xp = libraries.library(relative_mse)
    with libraries.current_device(relative_mse), np.errstate(divide="ignore"):
        return 0 - 10 * xp.log10(relative_mse)


@libraries.border()
def _cosine(
    error: Array, power: Array, power_of_approx: Array, product: Array, worst: Array
) -> Array:
    xp = libraries.library(error)
    with libraries.current_device(error), np.errstate(invalid="ignore"):
        both = xp.sqrt(power) * xp.sqrt(power_of_approx)
        same = (power == 0) & (power_of_approx == 0)
        cosine = product / xp.where(both == 0, 1.0, both)
        cosine = xp.where(same, 1.0, xp.clip(cosine, -1.0, 1.0))
        lost = _lost(error, power, worst) | xp.isinf(power_of_approx)
        return xp.where(lost, np.nan, cosine)[()]


def _lost(error: Array, power: Array, worst: Array) -> Array:
    """Whether squares of errors vanished, or squares of x overflowed, in float64."""
    xp = libraries.library(error)
    return ((error == 0) & (worst > 0)) | xp.isinf(power)


def _ratio(part: Array, whole: Array, lost: Array) -> Array:
    """part / whole, 0 where both are 0, and NaN where `lost`."""
    xp = libraries.library(part)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = xp.where(part == 0, xp.where(whole == whole, 0.0, whole), part / whole)
    return xp.where(lost, np.nan, ratio)


@libraries.border()
def measure(
    x: Array,
    approx: Array,
    *,
    axis: int | tuple[int, ...] | None = None,
    keepdims: bool = False,
) -> Errors:
    """The moments of `x` and `approx` over `axis` (default: all axes), in one pass."""
    x = arrays.as_floats("x", x)
    every = tuple(range(x.ndim))
    reduced = every if axis is None else axes_of("axis", axis, x.shape)
    kept = tuple(a for a in every if a not in reduced)
    # A long row is added up in parts: shorter rows, of which many come in one block.
    numbering, inner = kept, [a for a in every if a in reduced]
    rows = rows_of(x.shape, numbering)
    while passes.is_long(rows, x) and rows.length // x.shape[inner[0]] >= CHUNK:
        numbering = (*numbering, inner.pop(0))
        rows = rows_of(x.shape, numbering)
    with libraries.current_device(x):
        approx = arrays.like("approx", approx, x)
        sums = passes.partial_results(moments, rows, (x, approx), [])
        # The kept axes number the rows, in their order.
        shape = tuple(x.shape[a] for a in kept)
        count, parts = math.prod(shape), math.prod(x.shape[a] for a in numbering[len(kept) :])
        if keepdims:
            shape = tuple(1 if a in reduced else x.shape[a] for a in every)
        *pieces, largest = (a.reshape(count, parts * a.shape[1]) for a in sums)
        totals = [piece.sum(axis=-1) for piece in pieces]
        return Errors(*(a.reshape(shape)[()] for a in (*totals, largest.max(axis=-1))))


@libraries.border()
def relative_mse(
    x: Array,
    approx: Array,
    *,
    axis: int | tuple[int, ...] | None = None,
    keepdims: bool = False,
) -> Array:
    """The relative mean squared error of an approximation.

    .. math:: \\frac{\\sum (x - y)^2}{\\sum x^2}

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, any shape
    approx : array of x's shape
        The approximation y; cast to x's dtype.
    axis : int or tuple of int, optional
        The axes to sum over. Default: all of them.
    keepdims : bool
        Whether the axes summed over stay, with length 1, so that the result broadcasts to x.

    Returns
    -------
    array of float64
        0-d, or with the axes summed over removed. No unit; 0 where `x` and `approx` are both 0.

    Raises
    ------
    TypeError
        If an argument is not floating point, or libraries are mixed.
    ValueError
        If the shapes differ, or an axis is out of range.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> float(cubin.errors.relative_mse(np.array([3.0, 4.0]), np.array([3.0, 3.0])))
    0.04
    """
    return measure(x, approx, axis=axis, keepdims=keepdims).relative_mse()


@libraries.border()
def sqnr_db(
    x: Array,
    approx: Array,
    *,
    axis: int | tuple[int, ...] | None = None,
    keepdims: bool = False,
) -> Array:
    """The signal to quantization noise ratio of an approximation.

    .. math:: 10 \\log_{10} \\frac{\\sum x^2}{\\sum (x - y)^2}

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, any shape
    approx : array of x's shape
        The approximation y; cast to x's dtype.
    axis : int or tuple of int, optional
        The axes to sum over. Default: all of them.
    keepdims : bool
        Whether the axes summed over stay, with length 1, so that the result broadcasts to x.

    Returns
    -------
    array of float64
        In dB; infinite where the approximation is exact.

    Raises
    ------
    TypeError, ValueError
        As `relative_mse`.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> float(cubin.errors.sqnr_db(np.array([6.0, 8.0]), np.array([6.0, 7.0])))
    20.0
    """
    return measure(x, approx, axis=axis, keepdims=keepdims).sqnr_db()


@libraries.border()
def cosine_similarity(
    x: Array,
    approx: Array,
    *,
    axis: int | tuple[int, ...] | None = None,
    keepdims: bool = False,
) -> Array:
    """The cosine of the angle between an array and its approximation.

    .. math:: \\frac{\\sum x y}{\\sqrt{\\sum x^2 \\sum y^2}}

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, any shape
    approx : array of x's shape
        The approximation y; cast to x's dtype.
    axis : int or tuple of int, optional
        The axes to sum over. Default: all of them.
    keepdims : bool
        Whether the axes summed over stay, with length 1, so that the result broadcasts to x.

    Returns
    -------
    array of float64
        From -1 to 1; 1 where both are 0, and 0 where only one is.

    Raises
    ------
    TypeError, ValueError
        As `relative_mse`.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> float(cubin.errors.cosine_similarity(np.array([3.0, 4.0]), np.array([4.0, 3.0])))
    0.96
    """
    return measure(x, approx, axis=axis, keepdims=keepdims).cosine_similarity()


@libraries.border()
def max_abs_error(
    x: Array,
    approx: Array,
    *,
    axis: int | tuple[int, ...] | None = None,
    keepdims: bool = False,
) -> Array:
    """The largest absolute error, ``max |x - y|``.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, any shape
    approx : array of x's shape
        The approximation y; cast to x's dtype.
    axis : int or tuple of int, optional
        The axes to go over. Default: all of them.
    keepdims : bool
        Whether the axes gone over stay, with length 1, so that the result broadcasts to x.

    Returns
    -------
    array of float64
        In the unit of `x`; 0 for an empty array, NaN if an error is NaN.

    Raises
    ------
    TypeError, ValueError
        As `relative_mse`.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> float(cubin.errors.max_abs_error(np.array([3.0, 4.0]), np.array([3.0, 2.5])))
    1.5
    """
    return measure(x, approx, axis=axis, keepdims=keepdims).worst


@libraries.border()
def output_mse(w: Array, approx: Array, gram: Gram) -> Array:
    """The relative mean squared error of a layer's outputs, of an approximation of its weights.

    .. math:: \\frac{\\operatorname{tr}(E H E^T)}{\\operatorname{tr}(W H W^T)}, \\quad E = W - Y

    H is the Gram matrix of the layer's inputs: the ratio is
    :math:`\\sum_t \\lVert E x_t \\rVert^2 / \\sum_t \\lVert W x_t \\rVert^2` over its inputs.

    Parameters
    ----------
    w : array of float16, bfloat16, float32 or float64, shape (m, ...)
        The weights: m lines of n elements, such as those of a linear layer, or of a convolution as
        (outputs, channels, height, width).
    approx : array of w's shape
        The approximation Y; cast to w's dtype.
    gram : Gram
        Of n inputs.

    Returns
    -------
    array of float64
        0-d, no unit; 0 where both sums are 0. The products repeat to the bit on the same machine,
        with the same number of threads.

    Raises
    ------
    TypeError
        If an argument is not floating point, `gram` is no `Gram`, or NumPy and CuPy are mixed.
    ValueError
        If the shapes differ, or a line has another number of elements than `gram` has inputs.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> gram = cubin.Gram(2).add(np.array([[1.0, 1.0]]))
    >>> w = np.array([[2.0, 1.0]])
    >>> float(cubin.errors.output_mse(w, np.array([[1.0, 2.0]]), gram))
    0.0
    """
    w = arrays.as_floats("w", w)
    with libraries.current_device(w):
        approx = arrays.like("approx", approx, w, "w")
        matrix = matrix_for(gram, w, "w")
        lines = conversions.widened(w).reshape(-1, gram.n)
        error = lines - conversions.widened(approx).reshape(-1, gram.n)
        error, power = (((part @ matrix) * part).sum() for part in (error, lines))
        return _ratio(error, power, libraries.library(w).isinf(power))[()]


def __dir__() -> list[str]:
    return sorted(__all__)
