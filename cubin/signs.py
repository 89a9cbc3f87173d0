"""Signs, and the masks and gradients of the straight-through estimator."""

from __future__ import annotations

from typing import Any

import numpy as np

from cubin import arrays
from cubin.arrays import Array
from cubin.kernels import FLOATS, elementwise

_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def as_integers(x: np.ndarray) -> np.ndarray:
    """The bit patterns of floats, as a view."""
    return x.view(_UNSIGNED[x.dtype.itemsize])


def with_sign_of(r: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """`magnitude` where ``r > 0``, else ``-magnitude``; both of one float dtype.

    ``0 - r`` is never -0.0, so its sign bit is set exactly where ``r > 0``: on random signs this
    is ten times as fast as ``np.where``.
    """
    flipped = np.empty(r.shape, r.dtype)
    np.subtract(0, r, out=flipped)
    word = as_integers(flipped)
    top = word.dtype.type(1 << (8 * word.itemsize - 1))
    np.bitwise_and(word, top, out=word)
    np.bitwise_xor(word, as_integers(magnitude) | top, out=word)
    return flipped


def where(mask: np.ndarray, x: np.ndarray, out: np.ndarray) -> None:
    """`x` where `mask` is true, else +0, without touching what is not selected (0 * inf is NaN)."""
    np.multiply(as_integers(x), mask, out=as_integers(out))


# ---------------------------------------------------------------- primitives


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
    np.copyto(result, x, where=np.isnan(x))
    y[...] = result


@elementwise(
    "T x, uint8 bits",
    "bool mask",
    "mask = inside(Work<T>::type(x), bits)",
    types=FLOATS,
)
def inside_bits(x: np.ndarray, bits: np.ndarray, *, mask: np.ndarray) -> None:
    """|x| <= bits, compared exactly."""
    np.less_equal(np.abs(x), bits, out=mask)


@elementwise(
    "T x, float64 bound",
    "bool mask",
    "mask = fabs(to_double(Work<T>::type(x))) <= bound",
    types=FLOATS,
)
def inside(x: np.ndarray, bound: np.ndarray, *, mask: np.ndarray) -> None:
    """|x| <= bound, compared in float64."""
    np.less_equal(np.abs(x), bound, out=mask)


@elementwise(
    "T x, uint8 bits, T gy",
    "T gx",
    "gx = inside(Work<T>::type(x), bits) ? gy : T(0)",
    types=FLOATS,
    looped=True,
)
def gradient_inside(x: np.ndarray, bits: np.ndarray, gy: np.ndarray, *, gx: np.ndarray) -> None:
    """The gradient gy where |x| <= bits, else +0."""
    where(np.abs(x) <= bits, gy, out=gx)


# ---------------------------------------------------------------- public


def sign(x: Array, *, out: Array | None = None) -> Array:
    """The sign of each element, with sign(0) = -1.

    .. math:: \\operatorname{sign}(x) = +1 \\text{ if } x > 0, \\text{ else } -1

    Zero, positive or negative, has the sign -1, as in CNTK's binary convolutions: a binary code
    has no third value. NumPy's ``sign`` gives 0 there.

    Parameters
    ----------
    x : array of float16, float32 or float64, any shape
        NumPy or CuPy array, or anything that ``numpy.asarray`` takes.
    out : array, optional
        Where to put the result: x's shape and dtype. It may be `x` itself, or overlap it.

    Returns
    -------
    array
        -1, +1 or (where `x` is NaN) NaN, in the shape and dtype of `x`.

    Raises
    ------
    TypeError
        If `x` is not floating point, or `out` is of another library or dtype.
    ValueError
        If `out` has another shape or is read-only.

    See Also
    --------
    sign_grad : The straight-through gradient.

    References
    ----------
    .. [1] M. Courbariaux et al., "Binarized Neural Networks", arXiv:1602.02830, 2016.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> cubin.sign(np.array([-1.5, 0.0, 2.0]))
    array([-1., -1.,  1.])
    """
    x = arrays.as_floats("x", x)
    with arrays.current_device(x):
        y = arrays.output(out, x)
        signs(arrays.apart(x, y), y=y)
    return y if out is None else out


def ste_mask(x: Array, bound: Array = 1) -> Array:
    """Where the straight-through estimator lets the gradient pass: ``|x| <= bound``.

    Parameters
    ----------
    x : array of float16, float32 or float64, any shape
    bound : real number or array that broadcasts to x's shape
        1 for the sign, a bit map for the multibit approximation.

    Returns
    -------
    array of bool
        In the shape of `x`; False where `x` or `bound` is NaN.

    Raises
    ------
    TypeError
        If `x` is not floating point, `bound` is not real, or NumPy and CuPy are mixed.
    ValueError
        If `bound` does not broadcast to x's shape.

    References
    ----------
    .. [1] Y. Bengio, N. Léonard, A. Courville, "Estimating or propagating gradients through
       stochastic neurons for conditional computation", arXiv:1308.3432, 2013.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> cubin.ste_mask(np.array([-1.5, 0.0, 1.0]))
    array([False,  True,  True])
    """
    x = arrays.as_floats("x", x)
    with arrays.current_device(x):
        limit = arrays.as_bound(bound, x)
        mask = arrays.output(None, x, np.bool_)
        (inside_bits if limit.dtype == np.uint8 else inside)(x, limit, mask=mask)
    return mask


def sign_grad(x: Array, gy: Array, surrogate: str = "ste", **parameters: Any) -> Array:
    """The straight-through gradient of `sign`, or another surrogate gradient.

    .. math:: g_x = g_y \\text{ where } |x| \\le 1, \\text{ else } 0

    Parameters
    ----------
    x : array of float16, float32 or float64, any shape
        What `sign` was applied to.
    gy : array of x's shape
        The gradient with respect to ``sign(x)``.
    surrogate : {"ste", "identity", "approx_sign", "swish_sign", "tanh", "triangle"}
        What stands in for the derivative of the sign: one of the functions of `cubin.surrogates`,
        where each has its equation. Others can be added.
    **parameters : float
        Those of the surrogate, positive: ``clip`` of ``ste``, ``beta`` of ``swish_sign``, ``t`` of
        ``tanh`` and ``triangle``.

    Returns
    -------
    array
        The gradient with respect to `x`, in its shape and dtype; 0 where `x` is NaN. An infinite
        or NaN `gy` outside the mask gives 0.

    Raises
    ------
    TypeError
        If `x` or `gy` is not floating point, NumPy and CuPy are mixed, or the surrogate has no such
        parameter.
    ValueError
        If `gy` has another shape than `x`, there is no such surrogate, or a parameter is not
        positive and finite.

    References
    ----------
    .. [1] Y. Bengio, N. Léonard, A. Courville, "Estimating or propagating gradients through
       stochastic neurons for conditional computation", arXiv:1308.3432, 2013.
    .. [2] M. Courbariaux et al., "Binarized Neural Networks", arXiv:1602.02830, 2016.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> cubin.sign_grad(np.array([-1.5, 0.0, 1.0]), np.array([1.0, 2.0, 3.0]))
    array([0., 2., 3.])
    """
    if surrogate == "ste" and not parameters:
        return multibit_grad(x, 1, gy)
    from cubin import surrogates

    rule = surrogates.sign_rule(surrogate, parameters)
    x = arrays.as_floats("x", x)
    gy = arrays.like("gy", gy, x)
    with arrays.current_device(x):
        return rule(x, gy)


def multibit_grad(
    x: Array,
    bits: Array,
    gy: Array,
    *,
    channel_axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
    surrogate: str = "bits_clip",
) -> Array:
    """The straight-through gradient of `multibit`, or another surrogate gradient.

    .. math:: g_x = g_y \\text{ where } |x| \\le \\text{bits}, \\text{ else } 0

    The bound is in units of `x`, not of its scales: an element with more bits lets the gradient
    pass further out.

    Parameters
    ----------
    x : array of float16, float32 or float64, any shape
        What `multibit` was applied to.
    bits : int or integer array that broadcasts to x's shape
        The bits of each element, 0 to 16.
    gy : array of x's shape
        The gradient with respect to ``multibit(x, bits)``.
    channel_axis, group_size : optional
        As `multibit` was given. Without effect on ``bits_clip``, which does not look at scales.
    surrogate : {"bits_clip", "scaled_clip", "scale_aware"}
        The rule: one of the functions of `cubin.surrogates`, where each has its equation.

    Returns
    -------
    array
        The gradient with respect to `x`, in its shape and dtype; 0 where `x` is NaN.

    Raises
    ------
    TypeError
        If `x` or `gy` is not floating point, `bits` is not integer, or libraries are mixed.
    ValueError
        If `gy` has another shape than `x`, `bits` is out of range or does not broadcast, there is
        no such surrogate, or `channel_axis` or `group_size` does not fit the shape of `x`.

    References
    ----------
    .. [1] J. Fromm, S. Patel, M. Philipose, "Heterogeneous bitwidth binarization in convolutional
       neural networks", NeurIPS 2018, arXiv:1805.10368.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> cubin.multibit_grad(np.array([-1.5, 0.5, 2.5]), 2, np.array([1.0, 2.0, 3.0]))
    array([1., 2., 0.])
    """
    x = arrays.as_floats("x", x)
    gy = arrays.like("gy", gy, x)
    if surrogate != "bits_clip":
        from cubin import surrogates

        rule = surrogates.multibit_rule(surrogate)
        rows = arrays.rows_of(x.shape, channel_axis, group_size)
        with arrays.current_device(x):
            limits, levels = arrays.as_bits(bits, x)
            return rule(x, limits, levels, gy, rows)
    with arrays.current_device(x):
        bound, _ = arrays.as_bits(bits, x)
        gx = arrays.output(None, x)
        gradient_inside(x, bound, gy, gx=gx)
    return gx
