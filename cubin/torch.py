"""The sign and the multibit approximation in PyTorch, with any surrogate gradient, and modules.

`cubin.sign` and `cubin.multibit` take tensors, too, and differentiate by their straight-through
rules. The functions here take a surrogate, and ``torch.compile`` and ``torch.export`` can trace
them. A module makes the weights of a layer quantization-aware::

    from torch.nn.utils.parametrize import register_parametrization

    register_parametrization(layer, "weight", cubin.torch.Multibit(2, channel_axis=0))
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from cubin import binarize, gradients, operators, surrogates
from cubin.core import libraries

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError(
        f"cubin.torch needs PyTorch, which cannot be imported ({error}): "
        "install it, or cubin with the extra torch"
    ) from error

__all__ = ["Multibit", "Sign", "multibit", "sign"]

# The functions on arrays alone: their borders would record the default gradients.
_SIGN, _MULTIBIT = inspect.unwrap(binarize.sign), inspect.unwrap(binarize.multibit)


def sign(x: Tensor, *, surrogate: str = "ste", **parameters: float) -> Tensor:
    """The sign of each element, as `cubin.sign`, with a surrogate as its gradient.

    .. math:: y = +1 \\text{ if } x > 0 \\text{ else } -1, \\qquad
        g_x = \\text{slope}(x) \\, g_y

    Parameters
    ----------
    x : tensor of float16, bfloat16, float32 or float64, any shape
    surrogate : str
        A name in `cubin.surrogates.SIGN`: ``ste``, ``identity``, ``approx_sign``, ``swish_sign``,
        ``tanh``, ``triangle``, or one of your own. As in `cubin.sign_grad`.
    **parameters : float
        Those of the surrogate.

    Returns
    -------
    tensor
        In the shape and dtype of `x`, on its device.

    Raises
    ------
    TypeError
        If `x` is no tensor of floats, or the surrogate has no such parameter.
    ValueError
        If there is no such surrogate, or a parameter is not positive and finite.
    RuntimeError
        If `x` was changed in place before the gradient is taken, or the gradient is to be
        differentiated itself.

    References
    ----------
    .. [1] M. Courbariaux et al., "Binarized Neural Networks", arXiv:1602.02830, 2016.

    Examples
    --------
    >>> import torch, cubin.torch
    >>> x = torch.tensor([-1.5, 0.0, 0.5], requires_grad=True)
    >>> y = cubin.torch.sign(x, surrogate="approx_sign")
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([-1.0, -1.0, 1.0], [0.0, 2.0, 1.0])
    """
    if torch.compiler.is_compiling():
        names, values = list(parameters), [float(value) for value in parameters.values()]
        return torch.ops.cubin.sign(x, surrogate, names, values)
    _check_tensor(x)
    if surrogate != "ste" or parameters:
        surrogates.sign_rule(surrogate, parameters)

    def pull_back(gy: Tensor, x: Tensor) -> Tensor:
        return gradients.sign_grad(x, gy, surrogate=surrogate, **parameters)

    return libraries.across(_SIGN, True, pull_back, {"x": x})


def multibit(
    x: Tensor,
    bits: Any,
    *,
    channel_axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
    solver: str = "greedy",
    iterations: int | None = 2,
    importance: Tensor | None = None,
    surrogate: str = "bits_clip",
) -> Tensor:
    """The multibit approximation, as `cubin.multibit`, with a surrogate as its gradient.

    .. math:: y = \\sum_i a_i b_i, \\qquad
        g_x = g_y \\text{ where } |x| \\le \\text{bits} \\text{ else } 0

    by default. The gradient does not depend on the solver.

    Parameters
    ----------
    x : tensor of float16, bfloat16, float32 or float64, any shape
    bits : int or integer tensor that broadcasts to x's shape
        The number of levels of every element, 0 to 16.
    channel_axis : int or tuple of int, optional
        One scale per level for each index of this axis (these axes). Default: one for the tensor.
    group_size : int, optional
        One scale per level for every run of this many elements of the last axis; the last of them
        may be shorter.
    solver : {"greedy", "refined", "alternating", "optimal"}
    iterations : int or None
    importance : tensor that broadcasts to x's shape, optional
        As in `cubin.quantize`.
    surrogate : {"bits_clip", "scaled_clip", "scale_aware"}
        The gradient's rule, as in `cubin.multibit_grad`.

    Returns
    -------
    tensor
        In the shape and dtype of `x`, on its device.

    Raises
    ------
    TypeError, ValueError
        As `cubin.multibit`, and ValueError if there is no such surrogate.
    RuntimeError
        If `x` or a map was changed in place before the gradient is taken, or the gradient is to be
        differentiated itself.

    References
    ----------
    .. [1] J. Fromm, S. Patel, M. Philipose, "Heterogeneous bitwidth binarization in convolutional
       neural networks", NeurIPS 2018, arXiv:1805.10368.

    Examples
    --------
    >>> import torch, cubin.torch
    >>> w = torch.tensor([[0.5, -0.25], [2.0, -1.0]], requires_grad=True)
    >>> y = cubin.torch.multibit(w, 1, channel_axis=0)
    >>> y.sum().backward()
    >>> y.tolist(), w.grad.tolist()
    ([[0.375, -0.375], [1.5, -1.5]], [[1.0, 1.0], [0.0, 1.0]])
    """
    if torch.compiler.is_compiling():
        number, levels = (bits, None) if isinstance(bits, int) else (0, torch.as_tensor(bits))
        axes = [channel_axis] if isinstance(channel_axis, int) else channel_axis
        return torch.ops.cubin.multibit(
            x, number, levels, axes, group_size, solver, iterations, importance, surrogate
        )
    _check_tensor(x)
    surrogates.multibit_rule(surrogate)

    def pull_back(gy: Tensor, x: Tensor, bits: Any, **_: Any) -> Tensor:
        return gradients.multibit_grad(
            x, bits, gy, channel_axis=channel_axis, group_size=group_size, surrogate=surrogate
        )

    arguments = {
        "x": x, "bits": bits, "channel_axis": channel_axis, "group_size": group_size,
        "solver": solver, "iterations": iterations, "importance": importance,
    }  # fmt: skip
    return libraries.across(_MULTIBIT, True, pull_back, arguments)


def _check_tensor(x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a PyTorch tensor, got {type(x).__qualname__}")


class Sign(torch.nn.Module):
    """`sign` as a module, for activations or for `torch.nn.utils.parametrize`.

    Parameters
    ----------
    surrogate : str
    **parameters : float
        As for `sign`.

    Raises
    ------
    TypeError, ValueError
        As `sign`.

    Examples
    --------
    >>> import torch, cubin.torch
    >>> layer = torch.nn.Sequential(torch.nn.Linear(4, 2), cubin.torch.Sign(surrogate="tanh", t=2))
    >>> layer(torch.zeros(3, 4)).shape
    torch.Size([3, 2])
    """

    def __init__(self, surrogate: str = "ste", **parameters: float) -> None:
        super().__init__()
        surrogates.sign_rule(surrogate, parameters)
        self.surrogate = surrogate
        self.parameters_of_surrogate = parameters

    def forward(self, x: Tensor) -> Tensor:
        """The sign of `x`."""
        return sign(x, surrogate=self.surrogate, **self.parameters_of_surrogate)

    def extra_repr(self) -> str:
        """The arguments."""
        rest = "".join(f", {n}={v}" for n, v in self.parameters_of_surrogate.items())
        return f"{self.surrogate!r}{rest}"


class Multibit(torch.nn.Module):
    """`multibit` as a module: with `torch.nn.utils.parametrize` it quantizes a layer's weights.

    A map is a buffer: it is in the ``state_dict``, and moves with the module.

    Parameters
    ----------
    bits : int or integer tensor that broadcasts to x's shape
    channel_axis : int or tuple of int, optional
    group_size : int, optional
    solver : {"greedy", "refined", "alternating", "optimal"}
    iterations : int or None
    surrogate : {"bits_clip", "scaled_clip", "scale_aware"}
        As for `multibit`.

    Raises
    ------
    TypeError, ValueError
        As `cubin.operators.Multibit`.

    Examples
    --------
    >>> import torch, cubin.torch
    >>> from torch.nn.utils.parametrize import register_parametrization
    >>> layer = torch.nn.Linear(8, 2)
    >>> layer = register_parametrization(layer, "weight", cubin.torch.Multibit(1, channel_axis=0))
    >>> [len(row.abs().unique()) for row in layer.weight]
    [1, 1]
    """

    bits: Any

    def __init__(
        self,
        bits: Any,
        channel_axis: int | tuple[int, ...] | None = None,
        group_size: int | None = None,
        solver: str = "greedy",
        iterations: int | None = 2,
        surrogate: str = "bits_clip",
    ) -> None:
        super().__init__()
        checked = operators.Multibit(bits, channel_axis, group_size, solver, surrogate)
        binarize.multibit(np.zeros(1), 1, solver=solver, iterations=iterations)  # checks the rest
        if isinstance(checked.bits, int):
            self.bits = checked.bits
        else:
            self.register_buffer("bits", libraries.TORCH.give(checked.bits))
        self.channel_axis = checked.channel_axis
        self.group_size = checked.group_size
        self.solver = solver
        self.iterations = iterations
        self.surrogate = surrogate

    def forward(self, x: Tensor) -> Tensor:
        """The approximation of `x`."""
        return multibit(
            x,
            self.bits,
            channel_axis=self.channel_axis,
            group_size=self.group_size,
            solver=self.solver,
            iterations=self.iterations,
            surrogate=self.surrogate,
        )

    def extra_repr(self) -> str:
        """The arguments."""
        map_or_number = self.bits if isinstance(self.bits, int) else tuple(self.bits.shape)
        rest = f", group_size={self.group_size}" if self.group_size is not None else ""
        return (
            f"{map_or_number}, channel_axis={self.channel_axis}{rest}, "
            f"solver={self.solver!r}, surrogate={self.surrogate!r}"
        )


# ---------------------------------------------------------------- while PyTorch traces
# An operator costs several microseconds at every call. So it is used only where PyTorch has to see
# one: under torch.compile and torch.export.

_LAYOUT = "int bits, Tensor? map, int[]? channel_axis, int? group_size"


def _bits(bits: int, levels: Tensor | None) -> Any:
    return bits if levels is None else levels


def _tuple(axes: Any) -> tuple[int, ...] | None:
    return None if axes is None else tuple(axes)


@torch.library.custom_op(
    "cubin::sign",
    mutates_args=(),
    schema="(Tensor x, str surrogate, str[] names, float[] values) -> Tensor",
)
def _sign(x: Tensor, surrogate: str, names: list[str], values: list[float]) -> Tensor:
    surrogates.sign_rule(surrogate, dict(zip(names, values, strict=True)))
    return binarize.sign(x.detach())


@torch.library.custom_op(
    "cubin::sign_grad",
    mutates_args=(),
    schema="(Tensor x, Tensor gy, str surrogate, str[] names, float[] values) -> Tensor",
)
def _sign_grad(
    x: Tensor, gy: Tensor, surrogate: str, names: list[str], values: list[float]
) -> Tensor:
    parameters = dict(zip(names, values, strict=True))
    return gradients.sign_grad(x, gy, surrogate=surrogate, **parameters)


@torch.library.custom_op(
    "cubin::multibit",
    mutates_args=(),
    schema=f"(Tensor x, {_LAYOUT}, str solver, int? iterations, Tensor? importance, "
    "str surrogate) -> Tensor",
)
def _multibit(
    x: Tensor, bits: int, map: Tensor | None, channel_axis: Any, group_size: int | None,
    solver: str, iterations: int | None, importance: Tensor | None, surrogate: str,
) -> Tensor:  # fmt: skip
    surrogates.multibit_rule(surrogate)
    return binarize.multibit(
        x.detach(), _bits(bits, map), channel_axis=_tuple(channel_axis), group_size=group_size,
        solver=solver, iterations=iterations, importance=importance,
    )  # fmt: skip


@torch.library.custom_op(
    "cubin::multibit_grad",
    mutates_args=(),
    schema=f"(Tensor x, Tensor gy, {_LAYOUT}, str surrogate) -> Tensor",
)
def _multibit_grad(
    x: Tensor, gy: Tensor, bits: int, map: Tensor | None, channel_axis: Any,
    group_size: int | None, surrogate: str,
) -> Tensor:  # fmt: skip
    return gradients.multibit_grad(
        x, _bits(bits, map), gy, channel_axis=_tuple(channel_axis), group_size=group_size,
        surrogate=surrogate,
    )  # fmt: skip


for _operator in (_sign, _sign_grad, _multibit, _multibit_grad):
    _operator.register_fake(lambda x, *_: torch.empty_like(x))


def _save_sign(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, *ctx.rule = inputs
    ctx.save_for_backward(x)


def _sign_backward(ctx: Any, gy: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return torch.ops.cubin.sign_grad(x, gy, *ctx.rule), None, None, None


def _save_multibit(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, ctx.bits, levels, ctx.channel_axis, ctx.group_size, *_, ctx.surrogate = inputs
    ctx.save_for_backward(x, levels)


def _multibit_backward(ctx: Any, gy: Tensor) -> Any:
    x, levels = ctx.saved_tensors
    gx = torch.ops.cubin.multibit_grad(
        x, gy, ctx.bits, levels, ctx.channel_axis, ctx.group_size, ctx.surrogate
    )
    return gx, *[None] * 8


_sign.register_autograd(_sign_backward, setup_context=_save_sign)
_multibit.register_autograd(_multibit_backward, setup_context=_save_multibit)


def __dir__() -> list[str]:
    return sorted(__all__)
