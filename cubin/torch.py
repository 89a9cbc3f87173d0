"""Binarization in PyTorch: functions with any surrogate gradient, modules, and packed layers.

`cubin.sign` and `cubin.multibit` take tensors, too, and differentiate by their straight-through
rules. The functions here take a surrogate, and ``torch.compile`` and ``torch.export`` can trace
them. A module makes the weights of a layer quantization-aware::

    from torch.nn.utils.parametrize import register_parametrization

    register_parametrization(layer, "weight", cubin.torch.Multibit(2, channel_axis=0))

A packed layer computes with the codes themselves, and takes a fraction of the memory::

    layer = cubin.torch.Linear.from_linear(layer, 2)
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from cubin import binarize, gradients, operators, products, surrogates
from cubin.codes.binary_code import BinaryCode, assemble
from cubin.core import libraries
from cubin.core.arrays import as_integer
from cubin.core.rows import rows_of

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError(
        f"cubin.torch needs PyTorch, which cannot be imported ({error}): "
        "install it, or cubin with the extra torch"
    ) from error

__all__ = ["Conv2d", "Linear", "Multibit", "Sign", "multibit", "sign"]

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


def _check_tensor(x: object, name: str = "x") -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a PyTorch tensor, got {type(x).__qualname__}")


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


class _Packed(torch.nn.Module):
    """What packed layers share: the code of the weights, which they do not train, and the bias."""

    planes: Tensor
    scales: Tensor
    shift: Tensor | None
    bits: Any
    bias: Tensor | None

    def __init__(self, code: BinaryCode, bias: Tensor | None, rank: int) -> None:
        super().__init__()
        if not isinstance(code, BinaryCode):
            raise TypeError(f"code must be a BinaryCode, got {type(code).__qualname__}")
        if len(code.shape) != rank:
            raise ValueError(f"code must have {rank} axes, got the shape {code.shape}")
        self.shape = code.shape
        self.channel_axis, self.group_size = code.channel_axis, code.group_size
        held = code.given_to(libraries.TORCH)
        for name in ("planes", "scales", "shift", "bits"):
            part = getattr(held, name)
            if isinstance(part, Tensor):
                part = part.clone(memory_format=torch.contiguous_format)
            if isinstance(part, int):
                self.bits = part
            else:
                self.register_buffer(name, part)
        if bias is None:
            self.register_parameter("bias", None)
            return
        _check_tensor(bias, "bias")
        if not bias.is_floating_point():
            raise TypeError(f"bias must be floating point, got {bias.dtype}")
        if bias.shape != code.shape[:1]:
            raise ValueError(f"bias must have the shape {code.shape[:1]}, got {tuple(bias.shape)}")
        self.bias = torch.nn.Parameter(bias.detach().clone(), bias.requires_grad)

    @property
    def code(self) -> BinaryCode:
        """The code of the weights. It shares the memory of the buffers."""
        planes, scales, shift, number, levels, shape, _, group_size = self._parts()
        return _code(planes, scales, shift, number, levels, shape, self.channel_axis, group_size)

    def _parts(self) -> tuple[Any, ...]:
        """The code as operators take it."""
        number, levels = (self.bits, None) if isinstance(self.bits, int) else (0, self.bits)
        axes = [self.channel_axis] if isinstance(self.channel_axis, int) else self.channel_axis
        held = self.planes, self.scales, self.shift, number, levels
        return *held, self.shape, axes, self.group_size

    def _facts(self) -> str:
        map_or_number = self.bits if isinstance(self.bits, int) else tuple(self.bits.shape)
        rows = f"channel_axis={self.channel_axis}"
        if self.group_size is not None:
            rows = f"group_size={self.group_size}"
        return f"bias={self.bias is not None}, bits={map_or_number}, {rows}"


def _packed_weight(layer: Any, kind: type[Any], bits: Any, axis: Any, options: Any) -> BinaryCode:
    """The code of a layer's weights."""
    if not isinstance(layer, kind):
        raise TypeError(f"layer must be a torch.nn.{kind.__name__}, got {type(layer).__qualname__}")
    if axis == "auto":
        axis = None if options.get("group_size") is not None else 0
    weight = layer.weight.detach()
    code: BinaryCode = binarize.quantize(weight, bits, channel_axis=axis, **options)
    return code


class Linear(_Packed):
    """A linear layer whose weights are a packed code: ``products.linear(x, code) + bias``.

    The weights are frozen and stay packed: the buffers are ``planes``, of uint8, ``scales`` and, if
    the code has them, ``shift`` and ``bits``, a map. They are in the ``state_dict`` and move with
    the module; `to` changes the dtype of the scales. Gradients reach x and the bias.

    Parameters
    ----------
    code : BinaryCode of shape (m, n)
        Of any library. The module has a copy.
    bias : tensor of floats, shape (m,), optional
        A parameter, which is trained if it requires grad. The module has a copy.

    Attributes
    ----------
    planes, scales, shift, bits, bias
        As above; `bits` is an int where there is no map.
    in_features, out_features : int

    Raises
    ------
    TypeError
        If `code` is no code, or `bias` no tensor of floats.
    ValueError
        If the shapes do not fit.

    Examples
    --------
    >>> import torch, cubin.torch
    >>> layer = torch.nn.Linear(64, 8)
    >>> packed = cubin.torch.Linear.from_linear(layer, 2)
    >>> packed
    Linear(in_features=64, out_features=8, bias=True, bits=2, channel_axis=0)
    >>> packed(torch.ones(3, 64)).shape
    torch.Size([3, 8])
    >>> sum(buffer.nbytes for buffer in packed.buffers()), layer.weight.nbytes
    (192, 2048)
    """

    def __init__(self, code: BinaryCode, bias: Tensor | None = None) -> None:
        super().__init__(code, bias, rank=2)
        self.out_features, self.in_features = self.shape

    @classmethod
    def from_linear(
        cls,
        layer: torch.nn.Linear,
        bits: Any,
        *,
        channel_axis: int | tuple[int, ...] | str | None = "auto",
        **options: Any,
    ) -> Linear:
        """The packed layer with the codes of a layer's weights, and its bias.

        Parameters
        ----------
        layer : torch.nn.Linear
        bits : int or integer tensor that broadcasts to the shape of the weights
            The number of levels of every weight.
        channel_axis : int or tuple of int, "auto" or None
            As for `cubin.quantize`. ``auto`` is one scale per level for each output, or those of
            groups where a `group_size` is given.
        **options
            Further ones of `cubin.quantize`: `group_size`, `solver`, `iterations`, `importance`,
            `gram`, `shift` and so on.

        Raises
        ------
        TypeError
            If `layer` is none; and as from `cubin.quantize`.
        ValueError
            As from `cubin.quantize`.
        """
        return cls(_packed_weight(layer, torch.nn.Linear, bits, channel_axis, options), layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs, (..., m) in x's dtype, for x of shape (..., n)."""
        _check_tensor(x)
        if torch.compiler.is_compiling():
            y = torch.ops.cubin.linear(x, *self._parts())
        else:
            y = products.linear(x, self.code)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """The sizes, and how the weights are coded."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._facts()}"


class Conv2d(_Packed):
    """A convolution whose kernels are a packed code: ``products.conv2d(x, code) + bias``.

    It is frozen and packed as `Linear`. Positions beyond the edge of an image count as 0.

    Parameters
    ----------
    code : BinaryCode of shape (m, channels / groups, kernel height, kernel width)
        Of any library. The module has a copy.
    bias : tensor of floats, shape (m,), optional
        A parameter, which is trained if it requires grad. The module has a copy.
    stride : int or pair of int
    padding : int, pair of int, "valid" or "same"
        As for `torch.nn.Conv2d`.
    groups : int

    Attributes
    ----------
    planes, scales, shift, bits, bias, stride, padding, groups
        As above; `bits` is an int where there is no map.
    in_channels, out_channels : int
    kernel_size : pair of int

    Raises
    ------
    TypeError
        If `code` is no code, `bias` no tensor of floats, or another argument no integer.
    ValueError
        If the shapes do not fit, or `padding` is "same" with a stride.

    Examples
    --------
    >>> import torch, cubin.torch
    >>> layer = torch.nn.Conv2d(8, 4, 3, padding=1, bias=False)
    >>> packed = cubin.torch.Conv2d.from_conv(layer, 1)
    >>> packed(torch.ones(2, 8, 5, 5)).shape
    torch.Size([2, 4, 5, 5])
    """

    def __init__(
        self,
        code: BinaryCode,
        bias: Tensor | None = None,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        groups: int = 1,
    ) -> None:
        super().__init__(code, bias, rank=4)
        self.out_channels, per_group, *kernel = self.shape
        self.kernel_size = tuple(kernel)
        self.stride, self.groups = _twice(stride), as_integer("groups", groups)
        self.in_channels = per_group * self.groups
        self.padding = padding if isinstance(padding, str) else _twice(padding)
        self._padding, self._beyond = self.padding, [0, 0, 0, 0]
        if padding == "valid":
            self._padding = (0, 0)
        elif padding == "same":
            if self.stride != (1, 1):
                raise ValueError(f"padding 'same' needs a stride of 1, got {stride}")
            # Where it cannot be the same on either side, there is one more to the right and below.
            self._padding = tuple((side - 1) // 2 for side in kernel)
            self._beyond = [0, 1 - kernel[1] % 2, 0, 1 - kernel[0] % 2]
        empty = torch.empty((0, self.in_channels, *kernel), device=self.scales.device)
        products.conv2d(empty, self.code, *self._steps())  # checks the arguments

    def _steps(self) -> tuple[Any, Any, int]:
        return self.stride, self._padding, self.groups

    @classmethod
    def from_conv(
        cls,
        layer: torch.nn.Conv2d,
        bits: Any,
        *,
        channel_axis: int | tuple[int, ...] | str | None = "auto",
        **options: Any,
    ) -> Conv2d:
        """The packed layer with the codes of a layer's kernels, and its bias.

        Parameters
        ----------
        layer : torch.nn.Conv2d
            Without dilation; its padding is by zeros.
        bits : int or integer tensor that broadcasts to the shape of the weights
            The number of levels of every weight.
        channel_axis : int or tuple of int, "auto" or None
            As for `cubin.quantize`. ``auto`` is one scale per level for each kernel, or those of
            groups where a `group_size` is given.
        **options
            Further ones of `cubin.quantize`: `group_size`, `solver`, `iterations`, `importance`,
            `gram`, `shift` and so on.

        Raises
        ------
        TypeError
            If `layer` is none; and as from `cubin.quantize`.
        ValueError
            If the layer has a dilation, or a padding that is not of zeros; and as from
            `cubin.quantize`.
        """
        if isinstance(layer, torch.nn.Conv2d):
            if any(step != 1 for step in _twice(layer.dilation)):
                raise ValueError(f"layer must have the dilation 1, got {layer.dilation}")
            if layer.padding_mode != "zeros":
                raise ValueError(f"layer must be padded by zeros, got {layer.padding_mode!r}")
        code = _packed_weight(layer, torch.nn.Conv2d, bits, channel_axis, options)
        return cls(code, layer.bias, layer.stride, layer.padding, layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs in x's dtype, for images (b, channels, h, w) or one of rank 3."""
        _check_tensor(x)
        images = x[None] if x.ndim == 3 else x
        if any(self._beyond):
            images = torch.nn.functional.pad(images, self._beyond)
        if torch.compiler.is_compiling():
            y = torch.ops.cubin.conv2d(images, *self._parts(), *self._steps())
        else:
            y = products.conv2d(images, self.code, *self._steps())
        y = y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]
        return y[0] if x.ndim == 3 else y

    def extra_repr(self) -> str:
        """The sizes and steps, and how the weights are coded."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding!r}, groups={self.groups}, {self._facts()}"
        )


def _twice(value: Any) -> tuple[Any, ...]:
    """A number for either axis, where there is one for both."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


# ---------------------------------------------------------------- while PyTorch traces
# An operator costs several microseconds at every call. So it is used only where PyTorch has to see
# one: under torch.compile and torch.export.

_LAYOUT = "int bits, Tensor? map, int[]? channel_axis, int? group_size"


def _bits(bits: int, levels: Tensor | None) -> Any:
    return bits if levels is None else levels


def _axes(axes: Any) -> tuple[int, ...] | None:
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
        x.detach(), _bits(bits, map), channel_axis=_axes(channel_axis), group_size=group_size,
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
        x, _bits(bits, map), gy, channel_axis=_axes(channel_axis), group_size=group_size,
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


# A packed code as operators take it.
_CODE = (
    "Tensor planes, Tensor scales, Tensor? shift, int bits, Tensor? map, int[] shape, "
    "int[]? channel_axis, int? group_size"
)
_STEPS = "int[] stride, int[] padding, int groups"


def _code(
    planes: Tensor, scales: Tensor, shift: Tensor | None, bits: int, map: Tensor | None,
    shape: Any, channel_axis: Any, group_size: int | None,
) -> BinaryCode:  # fmt: skip
    """The code of these parts, which are not checked."""
    parts = {"planes": planes, "scales": scales, "shift": shift, "map": map}
    _, (held, wide, constant, levels) = libraries.all_viewed(parts)
    entries = np.uint8(bits) if map is None else levels
    rows = rows_of(tuple(shape), channel_axis, group_size)
    return assemble(wide, held, entries, rows, constant).given_to(libraries.TORCH)


@torch.library.custom_op("cubin::linear", mutates_args=(), schema=f"(Tensor x, {_CODE}) -> Tensor")
def _linear(x: Tensor, *code: Any) -> Tensor:
    return products.linear(x.detach(), _code(*code))


@torch.library.custom_op(
    "cubin::linear_grad", mutates_args=(), schema=f"(Tensor gy, {_CODE}) -> Tensor"
)
def _linear_grad(gy: Tensor, *code: Any) -> Tensor:
    return gy.detach() @ _code(*code)


@torch.library.custom_op(
    "cubin::conv2d", mutates_args=(), schema=f"(Tensor x, {_CODE}, {_STEPS}) -> Tensor"
)
def _conv2d(x: Tensor, *code_and_steps: Any) -> Tensor:
    *code, stride, padding, groups = code_and_steps
    return products.conv2d(x.detach(), _code(*code), stride, padding, groups)


@torch.library.custom_op(
    "cubin::conv2d_grad",
    mutates_args=(),
    schema=f"(Tensor gy, SymInt[] size, {_CODE}, {_STEPS}) -> Tensor",
)
def _conv2d_grad(gy: Tensor, size: Any, *code_and_steps: Any) -> Tensor:
    *code, stride, padding, groups = code_and_steps
    return products.conv2d_grad(gy.detach(), _code(*code), size, stride, padding, groups)


_SHAPE = 5
"""The number of `shape` among the arguments of a code."""


@_linear.register_fake
def _(x: Tensor, *code: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], code[_SHAPE][0]))


@_linear_grad.register_fake
def _(gy: Tensor, *code: Any) -> Tensor:
    return gy.new_empty((*gy.shape[:-1], code[_SHAPE][1]))


@_conv2d.register_fake
def _(x: Tensor, *code_and_steps: Any) -> Tensor:
    *code, stride, padding, _ = code_and_steps
    kernels, _, *kernel = code[_SHAPE]
    places = [
        (side + 2 * beyond - own) // step + 1
        for side, beyond, own, step in zip(x.shape[2:], padding, kernel, stride, strict=True)
    ]
    return x.new_empty((x.shape[0], kernels, *places))


@_conv2d_grad.register_fake
def _(gy: Tensor, size: Any, *_: Any) -> Tensor:
    return gy.new_empty(size)


def _save_code(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, planes, scales, shift, bits, levels, *ctx.rest = inputs
    ctx.size, ctx.bits = x.shape, bits
    ctx.save_for_backward(planes, scales, shift, levels)


def _linear_backward(ctx: Any, gy: Tensor) -> Any:
    *parts, levels = ctx.saved_tensors
    gx = torch.ops.cubin.linear_grad(gy, *parts, ctx.bits, levels, *ctx.rest)
    return gx, *[None] * 8


def _conv2d_backward(ctx: Any, gy: Tensor) -> Any:
    *parts, levels = ctx.saved_tensors
    gx = torch.ops.cubin.conv2d_grad(gy, ctx.size, *parts, ctx.bits, levels, *ctx.rest)
    return gx, *[None] * 11


_linear.register_autograd(_linear_backward, setup_context=_save_code)
_conv2d.register_autograd(_conv2d_backward, setup_context=_save_code)


def __dir__() -> list[str]:
    return sorted(__all__)
