"""Surrogate gradients, used in place of the derivative of the sign, which is 0 almost everywhere.

A surrogate of the sign is a slope: a function of each element. The incoming gradient is multiplied
by it. `surrogate` makes one from a NumPy expression and the same expression in CUDA, and
`cubin.sign_grad` looks it up by its name::

    @surrogate("exp(-2 * sharpness * absolute(v)) * 2 * sharpness")
    def laplace(v, sharpness=1.0):
        return 2 * sharpness * np.exp(-2 * sharpness * np.abs(v))

    cubin.sign_grad(x, gy, surrogate="laplace", sharpness=3.0)

A surrogate of the multibit approximation may need the scales of rows, too. So it is a function on
whole arrays; `MULTIBIT` has these by name.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cubin.codes.levels import level_signs
from cubin.core import arrays, floats, libraries, passes
from cubin.core.bits import Bits
from cubin.core.floats import where
from cubin.core.libraries import Array
from cubin.core.primitives import FLOATS, REGISTRY, Elementwise, elementwise
from cubin.core.rows import Rows
from cubin.core.signs import gradient_inside
from cubin.solvers import greedy

__all__ = [
    "MULTIBIT",
    "SIGN",
    "approx_sign",
    "bits_clip",
    "identity",
    "multibit_rule",
    "scale_aware",
    "scaled_clip",
    "sign_rule",
    "ste",
    "surrogate",
    "swish_sign",
    "tanh",
    "triangle",
]

SIGN: dict[str, Elementwise] = {}
"""The surrogates of the sign by name."""

_CUDA = """
// slope * g; where the slope is 0 or NaN, an infinite g does not count.
template<class W> __device__ W pulled(W slope, W g) {
  return absolute(slope) > 0 ? times(slope, g) : W(0);
}
"""

# ---------------------------------------------------------------- of the sign


def surrogate(slope: str) -> Callable[[Callable[..., Any]], Elementwise]:
    """Make a function that gives a slope a surrogate gradient of the sign, under its name.

    The gradient is ``slope * gy``, or 0 where the slope is 0 or NaN.

    Parameters
    ----------
    slope : str
        The slope as a CUDA expression in ``v`` and the function's other parameters, all of the
        type ``W``: double for float64, else float. `absolute` is |v|.

    Returns
    -------
    decorator
        For a function of ``v``, an array of the same work dtype, and of parameters with default
        values, NumPy scalars of that dtype. It returns the slope.

    Raises
    ------
    ValueError
        If there is a primitive of that name already, other than a surrogate of the same module:
        a cell of a notebook can be run again. If a parameter has no default value.
    """

    def decorate(function: Callable[..., Any]) -> Elementwise:
        v, *parameters = inspect.signature(function).parameters.values()
        names = [parameter.name for parameter in parameters]
        for parameter in parameters:
            if parameter.default is parameter.empty:
                raise ValueError(f"{parameter.name} of {function.__name__!r} needs a default value")

        def pull_back(x: np.ndarray, gy: np.ndarray, *values: Any, gx: np.ndarray) -> None:
            work = floats.work_dtype(x.dtype)
            rounded = (value.astype(work, copy=False) for value in values)
            slopes = function(floats.in_work_dtype(x), *rounded)
            product = np.empty(gx.shape, work)
            np.multiply(slopes, floats.in_work_dtype(gy), out=product)
            where(np.abs(slopes) > 0, product, out=product)
            gx[...] = product

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        pull_back.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter("x", kind),
                inspect.Parameter("gy", kind),
                *parameters,
                inspect.Parameter("gx", inspect.Parameter.KEYWORD_ONLY),
            ]
        )
        pull_back.__name__, pull_back.__doc__ = function.__name__, function.__doc__
        pull_back.__module__ = function.__module__
        earlier = SIGN.get(function.__name__)
        if earlier and earlier.function.__module__ == function.__module__:
            del REGISTRY[earlier.name]
        arguments = "".join(f", W {name}" for name in names)
        passed = "".join(f", Work<T>::type({name})" for name in names)
        primitive = elementwise(
            ", ".join(["T x", "T gy", *(f"float64 {name}" for name in names)]),
            "T gx",
            f"gx = T(pulled(slope(Work<T>::type(x){passed}), Work<T>::type(gy)))",
            # No types for the tests that compare every primitive bit by bit: exponentials of NumPy
            # and CUDA differ in the last place.
            types=(),
            preamble=f"{_CUDA}template<class W> __device__ W slope(W {v.name}{arguments}) "
            f"{{ return {slope}; }}\n",
        )(pull_back)
        SIGN[primitive.name] = primitive
        return primitive

    return decorate


@surrogate("absolute(v) <= clip ? W(1) : W(0)")
def ste(v: np.ndarray, clip: Any = 1.0) -> Any:
    """The straight-through estimator: the sign's derivative is that of the clipped identity.

    .. math:: y = \\operatorname{sign}(x), \\qquad
        g_x = g_y \\text{ where } |x| \\le \\text{clip}, \\text{ else } 0

    Parameters
    ----------
    clip : float

    References
    ----------
    .. [1] Y. Bengio, N. Léonard, A. Courville, "Estimating or propagating gradients through
       stochastic neurons for conditional computation", arXiv:1308.3432, 2013.
    .. [2] M. Courbariaux et al., "Binarized Neural Networks", arXiv:1602.02830, 2016.
    """
    return np.less_equal(np.abs(v), clip).astype(v.dtype)


@surrogate("W(1)")
def identity(v: np.ndarray) -> Any:
    """The straight-through estimator that clips nothing, whatever x is.

    .. math:: y = \\operatorname{sign}(x), \\qquad g_x = g_y

    References
    ----------
    .. [1] Y. Bengio, N. Léonard, A. Courville, "Estimating or propagating gradients through
       stochastic neurons for conditional computation", arXiv:1308.3432, 2013.
    """
    return np.ones(v.shape, v.dtype)


@surrogate("absolute(v) <= 1 ? 2 - 2 * absolute(v) : W(0)")
def approx_sign(v: np.ndarray) -> Any:
    """The derivative of a piecewise quadratic that touches the sign at -1 and 1.

    .. math:: y = \\operatorname{sign}(x), \\qquad
        g_x = (2 - 2 |x|) \\, g_y \\text{ where } |x| \\le 1, \\text{ else } 0

    References
    ----------
    .. [1] Z. Liu et al., "Bi-Real Net: Enhancing the Performance of 1-bit CNNs with Improved
       Representational Capability and Advanced Training Algorithm", ECCV 2018, arXiv:1808.00278.
    """
    # NaN stays NaN, and the maximum is 0 outside.
    return np.maximum(2 - 2 * np.abs(v), 0)


@surrogate(
    "beta * (2 - beta * absolute(v) * tanh(beta * absolute(v) / 2))"
    " / (1 + cosh(beta * absolute(v)))"
)
def swish_sign(v: np.ndarray, beta: Any = 5.0) -> Any:
    """The derivative of the sign-swish function, which overshoots the sign before it meets it.

    .. math:: y = \\operatorname{sign}(x), \\qquad
        g_x = \\beta \\, \\frac{2 - \\beta x \\tanh(\\beta x / 2)}{1 + \\cosh(\\beta x)} \\, g_y,

    the derivative of :math:`2 \\sigma(\\beta x) (1 + \\beta x (1 - \\sigma(\\beta x))) - 1` with
    the logistic function :math:`\\sigma`. It is negative where :math:`\\beta |x| > 2.4`.

    Parameters
    ----------
    beta : float
        The steepness. The slope at 0 is beta.

    References
    ----------
    .. [1] S. Darabi et al., "Regularized Binary Network Training" (BNN+), arXiv:1812.11800, 2018.
    """
    z = beta * np.abs(v)
    return beta * (2 - z * np.tanh(z / 2)) / (1 + np.cosh(z))


@surrogate("(t < 1 ? W(1) : t) / (cosh(t * v) * cosh(t * v))")
def tanh(v: np.ndarray, t: Any = 1.0) -> Any:
    """The error decay estimator: the derivative of a tanh that sharpens while a network trains.

    .. math:: y = \\operatorname{sign}(x), \\qquad
        g_x = k t \\, (1 - \\tanh^2(t x)) \\, g_y, \\quad k = \\max(1 / t, 1)

    In training, t grows from 0.1 to 10: after the share p of it, :math:`t = 10^{2 p - 1}`.

    Parameters
    ----------
    t : float
        The steepness.

    References
    ----------
    .. [1] H. Qin et al., "Forward and Backward Information Retention for Accurate Binary Neural
       Networks" (IR-Net), CVPR 2020, arXiv:1909.10788.
    """
    # k * t is max(1, t), and 1 - tanh^2 is 1 / cosh^2, which does not cancel.
    return np.maximum(t, 1) / np.cosh(t * v) ** 2


@surrogate("(t < 1 ? 1 / t : W(1)) * fmax(W(1.4142135623730951) * t - t * t * absolute(v), W(0))")
def triangle(v: np.ndarray, t: Any = 1.0) -> Any:
    """A triangle that narrows while a network trains.

    .. math:: y = \\operatorname{sign}(x), \\qquad
        g_x = k \\max(\\sqrt 2 \\, t - t^2 |x|, 0) \\, g_y, \\quad k = \\max(1 / t, 1)

    In training, t grows from 0.01 to 10: after the share p of it, :math:`t = 10^{3 p - 2}`.

    Parameters
    ----------
    t : float
        The steepness: the triangle ends at :math:`|x| = \\sqrt 2 / t`.

    References
    ----------
    .. [1] M. Lin et al., "Rotated Binary Neural Network" (RBNN), NeurIPS 2020, arXiv:2009.13055.
    """
    root = v.dtype.type(math.sqrt(2))
    return np.maximum(1 / t, 1) * np.maximum(root * t - t * t * np.abs(v), 0)


SignRule = Callable[[Array, Array, Array], None]
"""Takes x and gy, and writes gx."""


def sign_rule(name: str, parameters: Mapping[str, Any]) -> SignRule:
    """The gradient of the sign by the surrogate `name`.

    The parameters are rounded to x's dtype, as Python's numbers are in NumPy.

    Raises
    ------
    TypeError
        If the surrogate has no such parameter, or its value is no real number.
    ValueError
        If there is no such surrogate, or a value is not positive and finite.
    """
    if name == "ste" and not parameters:
        return _straight_through
    primitive = _entry("surrogate", SIGN, name)
    defaults = list(inspect.signature(primitive.function).parameters.values())[2:-1]
    unknown = parameters.keys() - {parameter.name for parameter in defaults}
    if unknown:
        takes = ", ".join(parameter.name for parameter in defaults) or "none"
        raise TypeError(
            f"surrogate {name!r} has no parameter {min(unknown)!r}: its parameters are {takes}"
        )
    values = [
        _positive(parameter.name, parameters.get(parameter.name, parameter.default))
        for parameter in defaults
    ]

    def pull_back(x: Array, gy: Array, gx: Array) -> None:
        rounded = [floats.nearest(value, x.dtype) for value in values]
        passes.elements(primitive, x, gy, *rounded, gx=gx)

    return pull_back


def _straight_through(x: Array, gy: Array, gx: Array) -> None:
    """`ste` with a clip of 1, which has a compiled loop."""
    passes.elements(gradient_inside, x, np.uint8(1), gy, gx=gx)


def _entry(what: str, registry: Mapping[str, Any], name: str) -> Any:
    """The entry of this name, or a ValueError that lists the names there are."""
    if name not in registry:
        raise ValueError(f"{what} must be one of {', '.join(registry)}, got {name!r}")
    return registry[name]


def _positive(name: str, value: Any) -> float:
    number = arrays.as_real(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return number


# ---------------------------------------------------------------- of the multibit approximation

MultibitRule = Callable[[Array, Bits, Array, Rows, Array], None]
"""Takes x, its bits, gy and the rows, and writes gx, which may be x or gy itself."""


def bits_clip(x: Array, bits: Bits, gy: Array, rows: Rows, gx: Array) -> None:
    """The gradient passes where |x| does not exceed the number of bits.

    .. math:: y = \\sum_i a_i b_i, \\qquad
        g_x = g_y \\text{ where } |x| \\le \\text{bits}, \\text{ else } 0

    The bound is in units of `x`, not of its scales.

    References
    ----------
    .. [1] J. Fromm, S. Patel, M. Philipose, "Heterogeneous bitwidth binarization in convolutional
       neural networks", NeurIPS 2018, arXiv:1805.10368.
    """
    passes.elements(gradient_inside, x, bits.values, gy, gx=gx)


def _by_section(rule: MultibitRule) -> MultibitRule:
    """A rule that looks at scales, run on each section of the rows."""

    @functools.wraps(rule)
    def run(x: Array, bits: Bits, gy: Array, rows: Rows, gx: Array) -> None:
        for section in rows.sections:
            of = section.of
            rule(of(x), bits.of(section), of(gy), section.rows, of(gx))

    return run


_SCALES = """
// |a| <= the sum of an element's scales; false for NaN. The difference is exact where it is 0.
template<class W, class... Scales>
__device__ bool within(W a, int bits, Scales... scales) {
  const W scale[] = {scales..., W(0)};
  W total = 0;
#pragma unroll
  for (int level = 0; level < (int)sizeof...(Scales); ++level)
    if (level < bits) total = plus(total, scale[level]);
  return a == a && total == total && !positive(minus(absolute(a), total));
}
"""


@elementwise(
    "T x, uint8 bits, T gy, *W scales",
    "T gx",
    "gx = within(Work<T>::type(x), bits{scales}) ? gy : T(0)",
    types=FLOATS,
    preamble=_SCALES,
)
def gradient_inside_scales(
    x: np.ndarray, bits: np.ndarray, gy: np.ndarray, *scales: np.ndarray, gx: np.ndarray
) -> None:
    """The gradient gy where |x| is at most the sum of the element's scales, else +0."""
    total = np.zeros(x.shape, floats.work_dtype(x.dtype))
    for level, scale in enumerate(scales):
        np.add(total, scale, out=total, where=np.greater(bits, level))
    where(np.abs(floats.in_work_dtype(x)) <= total, gy, out=gx)


@_by_section
def scaled_clip(x: Array, bits: Bits, gy: Array, rows: Rows, gx: Array) -> None:
    """The gradient passes where |x| does not exceed the largest value that its codes can give.

    .. math:: y = \\sum_i a_i b_i, \\qquad
        g_x = g_y \\text{ where } |x| \\le \\sum_i a_i, \\text{ else } 0

    with the sum over the levels of the element: `bits_clip` in units of the scales, so that x and
    c x have the same gradient. Rows with NaN have the gradient 0.

    References
    ----------
    .. [1] Z. Cai et al., "Deep Learning with Low Precision by Half-wave Gaussian Quantization",
       CVPR 2017, arXiv:1702.00953, for gradients clipped at the largest value of a quantizer.
    """
    scales = greedy.row_scales(x, bits, rows)
    passes.elements_of_rows(gradient_inside_scales, rows, (x, bits.values, gy), scales, out=gx)


@_by_section
def scale_aware(x: Array, bits: Bits, gy: Array, rows: Rows, gx: Array) -> None:
    """The gradient through the scales, which is exact, and through the signs, straight through.

    With :math:`y_j = \\sum_i a_i b_{ij}` and residuals :math:`r_{ij}`, the differential of y has a
    part in which the signs are constant, and one in which the scales are:

    .. math:: g_{x,j} = \\sum_i s_i b_{ij}
        + g_{y,j} \\Bigl(1 - \\prod_i \\bigl(1 - a_i [|r_{ij}| \\le 1]\\bigr)\\Bigr)

    over the levels i of element j. In the second part the derivative of every sign is that of the
    straight-through estimator, and the residuals follow from the signs before them. In the first,
    the scales are means of the residuals and depend on each other; from the last level to the first

    .. math:: s_i = \\operatorname{mean}_j b_{ij} q_{ij}, \\quad q_{i-1,j} = q_{ij} - s_i b_{ij},
        \\quad q_{k-1} = g_y,

    the mean over the elements of the row with more than i bits: the greedy algorithm itself, run
    backwards over the gradient. For one bit it is XNOR-Net's rule,

    .. math:: g_{x,j} = \\frac{b_j}{n} \\sum_l g_{y,l} b_l + g_{y,j} \\, a \\, [|x_j| \\le 1]

    NaN and infinity propagate within their row.

    References
    ----------
    .. [1] M. Rastegari et al., "XNOR-Net: ImageNet Classification Using Binary Convolutional
       Neural Networks", ECCV 2016, arXiv:1603.05279.
    """
    xp = libraries.library(x)
    work = floats.work_dtype(x.dtype)
    scales = greedy.row_scales(x, bits, rows)
    values = rows.flat(bits.values) if bits.mapped else bits.values
    r, g = rows.flat(x).astype(work), rows.flat(gy).astype(work)
    code = xp.empty(r.shape, np.uint16)
    greedy.codes(rows.flat(x), values, *scales, code=code)
    signs = [xp.empty(r.shape, np.int8) for _ in scales]
    for level, sign in enumerate(signs):
        level_signs(code, values, np.uint8(level), sign=sign)

    with np.errstate(all="ignore"):
        result = xp.zeros(r.shape, work)
        remaining = g
        for sign in reversed(signs):
            count = xp.maximum(abs(sign).sum(axis=1, keepdims=True, dtype=np.int64), 1)
            mean = (remaining * sign).sum(axis=1, keepdims=True, dtype=np.float64) / count
            step = mean.astype(work) * sign
            remaining = remaining - step
            result = result + step
        rest = xp.ones(r.shape, work)
        for sign, scale in zip(signs, scales, strict=True):
            step = scale * sign
            rest = rest * (1 - abs(step) * (abs(r) <= 1))
            r = r - step
        result = (result + g * (1 - rest)).astype(x.dtype)
    view = rows.view(gx)
    view[...] = result.reshape(view.shape)


MULTIBIT: dict[str, MultibitRule] = {
    "bits_clip": bits_clip,
    "scaled_clip": scaled_clip,
    "scale_aware": scale_aware,
}
"""The surrogates of the multibit approximation by name."""


def multibit_rule(name: str) -> MultibitRule:
    """The gradient of the multibit approximation by the surrogate `name`.

    Raises
    ------
    ValueError
        If there is no such surrogate.
    """
    return _entry("surrogate", MULTIBIT, name)


def __dir__() -> list[str]:
    return sorted(__all__)
