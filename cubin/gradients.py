"""Gradients of the sign and of the multibit approximation: straight-through, or a surrogate."""

from __future__ import annotations

from typing import Any

from cubin import surrogates
from cubin.core import arrays, libraries
from cubin.core.bits import as_bits
from cubin.core.libraries import Array
from cubin.core.rows import rows_of


@libraries.border()
def sign_grad(
    x: Array, gy: Array, *, surrogate: str = "ste", out: Array | None = None, **parameters: Any
) -> Array:
    """The straight-through gradient of `sign`, or another surrogate gradient.

    .. math:: g_x = g_y \\text{ where } |x| \\le 1, \\text{ else } 0

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, any shape
        What `sign` was applied to.
    gy : array of x's shape
        The gradient with respect to ``sign(x)``.
    surrogate : {"ste", "identity", "approx_sign", "swish_sign", "tanh", "triangle"}
        What stands in for the derivative of the sign: one of the functions of `cubin.surrogates`,
        where each has its equation. Others can be added.
    out : array, optional
        Where to put the result: x's shape and dtype. It may be `x` or `gy` itself.
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
        If `x` or `gy` is not floating point, libraries are mixed, or the surrogate has no such
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
    rule = surrogates.sign_rule(surrogate, parameters)
    x = arrays.as_floats("x", x)
    with libraries.current_device(x):
        gy = arrays.like("gy", gy, x)
        gx = arrays.output(out, x)
        rule(libraries.apart(x, out), libraries.apart(gy, out), gx)
    return gx if out is None else out


@libraries.border()
def multibit_grad(
    x: Array,
    bits: Array,
    gy: Array,
    *,
    channel_axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
    surrogate: str = "bits_clip",
    out: Array | None = None,
) -> Array:
    """The straight-through gradient of `multibit`, or another surrogate gradient.

    .. math:: g_x = g_y \\text{ where } |x| \\le \\text{bits}, \\text{ else } 0

    The bound is in units of `x`, not of its scales: an element with more bits lets the gradient
    pass further out.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, any shape
        What `multibit` was applied to.
    bits : int or integer array that broadcasts to x's shape
        The bits of each element, 0 to 16.
    gy : array of x's shape
        The gradient with respect to ``multibit(x, bits)``.
    channel_axis, group_size : optional
        The same as for `multibit`. Without effect on ``bits_clip``, which does not look at scales.
    surrogate : {"bits_clip", "scaled_clip", "scale_aware"}
        The rule: one of the functions of `cubin.surrogates`, where each has its equation.
    out : array, optional
        Where to put the result: x's shape and dtype. It may be `x` or `gy` itself.

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
    rule = surrogates.multibit_rule(surrogate)
    rows = rows_of(x.shape, channel_axis, group_size)
    with libraries.current_device(x):
        gy = arrays.like("gy", gy, x)
        gx = arrays.output(out, x)
        checked = as_bits(bits, x).apart(out)
        rule(libraries.apart(x, out), checked, libraries.apart(gy, out), rows, gx)
    return gx if out is None else out
