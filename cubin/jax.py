"""The sign and the multibit approximation in JAX, with any surrogate gradient.

`cubin.sign` and `cubin.multibit` take JAX arrays, too, but neither ``jit`` nor ``grad`` can trace
them. The functions here can be traced: by ``jit``, ``grad`` and ``vmap``. What XLA compiles calls
back into the host for them, so that arrays of a GPU are copied there and back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from cubin import binarize, gradients, surrogates
from cubin.core.arrays import as_integer
from cubin.core.bits import as_entries
from cubin.core.rows import plain_axes, rows_of
from cubin.solvers.solver import solver_of

try:
    import jax
    from jax import numpy as jnp
except ImportError as error:
    raise ImportError(
        f"cubin.jax needs JAX, which cannot be imported ({error}): "
        "install it, or cubin with the extra jax"
    ) from error

__all__ = ["multibit", "sign"]

Array = Any


def sign(x: Array, *, surrogate: str = "ste", **parameters: float) -> Array:
    """The sign of each element, as `cubin.sign`, with a surrogate as its gradient.

    .. math:: y = +1 \\text{ if } x > 0 \\text{ else } -1, \\qquad
        g_x = \\text{slope}(x) \\, g_y

    Parameters
    ----------
    x : JAX array of float16, bfloat16, float32 or float64, any shape
    surrogate : str
        A name in `cubin.surrogates.SIGN`, as in `cubin.sign_grad`.
    **parameters : float
        Those of the surrogate; not traced.

    Returns
    -------
    array
        In the shape and dtype of `x`.

    Raises
    ------
    TypeError
        If `x` is no JAX array of floats, or the surrogate has no such parameter.
    ValueError
        If there is no such surrogate, or a parameter is not positive and finite.

    References
    ----------
    .. [1] M. Courbariaux et al., "Binarized Neural Networks", arXiv:1602.02830, 2016.

    Examples
    --------
    >>> import jax, cubin.jax
    >>> x = jax.numpy.array([-1.5, 0.0, 0.5])
    >>> jax.jit(cubin.jax.sign)(x).tolist()
    [-1.0, -1.0, 1.0]
    >>> jax.grad(lambda x: cubin.jax.sign(x, surrogate="approx_sign").sum())(x).tolist()
    [0.0, 2.0, 1.0]
    """
    _check_floats("x", x)
    surrogates.sign_rule(surrogate, parameters)
    return _sign(x, surrogate, tuple(parameters.items()))


def multibit(
    x: Array,
    bits: Array,
    *,
    channel_axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
    solver: str = "greedy",
    iterations: int | None = 2,
    importance: Array | None = None,
    surrogate: str = "bits_clip",
) -> Array:
    """The multibit approximation, as `cubin.multibit`, with a surrogate as its gradient.

    .. math:: y = \\sum_i a_i b_i, \\qquad
        g_x = g_y \\text{ where } |x| \\le \\text{bits} \\text{ else } 0

    by default. The gradient does not depend on the solver, and the importance has none.

    Parameters
    ----------
    x : JAX array of float16, bfloat16, float32 or float64, any shape
    bits : int or integer array that broadcasts to x's shape
        The number of levels of every element, 0 to 16. An int is not traced.
    channel_axis : int or tuple of int, optional
        One scale per level for each index of this axis (these axes). Default: one for the tensor.
    group_size : int, optional
        One scale per level for every run of this many elements of the last axis; the last of them
        may be shorter.
    solver : {"greedy", "refined", "alternating", "optimal"}
    iterations : int or None
    importance : array that broadcasts to x's shape, optional
        As in `cubin.quantize`.
    surrogate : {"bits_clip", "scaled_clip", "scale_aware"}
        The gradient's rule, as in `cubin.multibit_grad`.

    Returns
    -------
    array
        In the shape and dtype of `x`.

    Raises
    ------
    TypeError, ValueError
        As `cubin.multibit`, and ValueError if there is no such surrogate. What is wrong with the
        values of a traced map or importance shows when they are there: then XLA raises.

    References
    ----------
    .. [1] J. Fromm, S. Patel, M. Philipose, "Heterogeneous bitwidth binarization in convolutional
       neural networks", NeurIPS 2018, arXiv:1805.10368.

    Examples
    --------
    >>> import jax, cubin.jax
    >>> w = jax.numpy.array([[0.5, -0.25], [2.0, -1.0]])
    >>> jax.jit(lambda w: cubin.jax.multibit(w, 1, channel_axis=0))(w).tolist()
    [[0.375, -0.375], [1.5, -1.5]]
    >>> jax.grad(lambda w: cubin.jax.multibit(w, 1).sum())(w).tolist()
    [[1.0, 1.0], [0.0, 1.0]]
    """
    _check_floats("x", x)
    surrogates.multibit_rule(surrogate)
    rule = solver_of(solver, iterations)
    rows_of(x.shape, channel_axis, group_size)
    number: int | None = None
    if np.ndim(bits) == 0 and not isinstance(bits, jax.Array):
        number, bits = as_integer("bits", bits), None
        as_entries(number, x.shape, None, **rule.limit)
    layout = (number, plain_axes(channel_axis), group_size)
    maps = {"bits": bits, "importance": importance}
    spread = {
        name: jnp.broadcast_to(jnp.asarray(value), x.shape)
        for name, value in maps.items()
        if value is not None
    }
    return _multibit(x, spread, layout, (solver, iterations), surrogate)


def _check_floats(name: str, value: Any) -> None:
    if not isinstance(value, jax.Array):
        raise TypeError(f"{name} must be a JAX array, got {type(value).__qualname__}")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be floating point, got {value.dtype}: "
            f"cast it first, e.g. {name}.astype('float32')"
        )


# ---------------------------------------------------------------- through the host


def _called(function: Callable[..., Any], x: Array, *others: Any) -> Array:
    """``function(lead, x, *others)``, of x's shape and dtype: now, or when the values are there.

    Under `vmap` all arrays have `lead` more axes in front, over which the function works at once.
    """
    if not any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves((x, others))):
        return function(0, x, *others)
    ndim = x.ndim

    def call_back(x: Any, *others: Any) -> Any:
        x, *others = jax.tree.map(np.asarray, (x, *others))
        return function(x.ndim - ndim, x, *others)

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(call_back, shape, x, *others, vmap_method="broadcast_all")


def _rows(layout: Any, lead: int, ndim: int) -> dict[str, Any]:
    """The granularity of arrays with `lead` more axes in front, whose indices share no row."""
    _, channel_axis, group_size = layout
    if not lead or group_size is not None:
        return {"channel_axis": channel_axis, "group_size": group_size}
    axes = () if channel_axis is None else channel_axis
    axes = axes if isinstance(axes, tuple) else (axes,)
    return {"channel_axis": (*range(lead), *(lead + axis % ndim for axis in axes))}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _sign(x: Array, surrogate: str, parameters: Any) -> Array:
    return _called(lambda lead, x: binarize.sign(x), x)


def _sign_forward(x: Array, surrogate: str, parameters: Any) -> tuple[Array, Array]:
    return _sign(x, surrogate, parameters), x


def _sign_backward(surrogate: str, parameters: Any, x: Array, gy: Array) -> tuple[Array]:
    def pull_back(lead: int, x: Array, gy: Array) -> Array:
        return gradients.sign_grad(x, gy, surrogate=surrogate, **dict(parameters))

    return (_called(pull_back, x, gy),)


_sign.defvjp(_sign_forward, _sign_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _multibit(x: Array, maps: dict[str, Array], layout: Any, finding: Any, surrogate: str) -> Array:
    solver, iterations = finding

    def approximate(lead: int, x: Array, maps: dict[str, Array]) -> Array:
        return binarize.multibit(
            x, maps.get("bits", layout[0]), **_rows(layout, lead, x.ndim - lead),
            solver=solver, iterations=iterations, importance=maps.get("importance"),
        )  # fmt: skip

    return _called(approximate, x, maps)


def _multibit_forward(
    x: Array, maps: dict[str, Array], layout: Any, finding: Any, surrogate: str
) -> tuple[Array, Any]:
    return _multibit(x, maps, layout, finding, surrogate), (x, maps)


def _multibit_backward(
    layout: Any, finding: Any, surrogate: str, saved: Any, gy: Array
) -> tuple[Array, Any]:
    x, maps = saved

    def pull_back(lead: int, x: Array, gy: Array, maps: dict[str, Array]) -> Array:
        return gradients.multibit_grad(
            x, maps.get("bits", layout[0]), gy, **_rows(layout, lead, x.ndim - lead),
            surrogate=surrogate,
        )  # fmt: skip

    return _called(pull_back, x, gy, maps), None


_multibit.defvjp(_multibit_forward, _multibit_backward)


def __dir__() -> list[str]:
    return sorted(__all__)
