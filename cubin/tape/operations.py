"""Differentiable operations on nodes, with NumPy's broadcasting, for NumPy and CuPy arrays.

Each operation computes its value with the arrays' own library and pairs every operand that is a
node with its pull-back. In the formulas g is the gradient at the result; where an operand was
broadcast, its gradient is summed over the axes along which it was repeated.

An operand may also be a plain array or a number. It is a constant: it has no gradient, and takes
on the dtype of the nodes that it meets, so that float32 stays float32. A number may lie outside the
range of float16: x / 70000 is not 0. Nodes of different dtypes promote as in NumPy, where float16
and bfloat16 have no common dtype, and each gradient has the dtype of its own node. Sums of float16
or bfloat16, and products that are summed, are taken in float32, longer sums in float64 as
`cubin.tape.sums` says: along every axis, in every memory order and in both libraries. The sum is
rounded to its dtype at the end.

References
----------
A. Griewank and A. Walther, "Evaluating Derivatives", 2nd edition, SIAM 2008.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

from cubin import products
from cubin.codes.binary_code import BinaryCode
from cubin.core.arrays import as_floats, as_integer, as_pair, as_real, as_real_below
from cubin.core.floats import is_float, work_dtype
from cubin.core.libraries import Array, library, on_device
from cubin.core.rows import axes_of
from cubin.tape.node import Node, PullBack
from cubin.tape.sums import rounded, sum_dtype, total

Operand: TypeAlias = Node | Array
"""A node, or a constant: an array or a number."""

Axes: TypeAlias = int | tuple[int, ...] | None

_CACHED = 2**20
"""Bytes of a matrix of windows that stay in a core's second-level cache."""


def _values(**operands: Operand) -> tuple[Any, ...]:
    """The operands' library, then the value of each, constants in the nodes' dtype."""
    dtypes = [operand.value.dtype for operand in operands.values() if isinstance(operand, Node)]
    dtype = np.result_type(*dtypes) if dtypes else None
    values = [_value(name, operand, dtype) for name, operand in operands.items()]
    return library(*(value for value in values if hasattr(value, "dtype"))), *values


def _value(name: str, operand: Operand, dtype: np.dtype | None) -> Any:
    if isinstance(operand, Node):
        return operand.value
    if isinstance(operand, np.generic):
        return operand.item()
    if isinstance(operand, (int, float)):
        return operand
    if isinstance(operand, np.ndarray) or on_device(operand):
        if operand.dtype.kind not in "biuf" and not is_float(operand.dtype):
            raise TypeError(f"{name} must hold real numbers, got {operand.dtype}")
        return operand if dtype is None else operand.astype(dtype, copy=False)
    raise TypeError(
        f"{name} must be a Node, an array or a number, got {type(operand).__qualname__}"
    )


def _node(value: Array, *operands: tuple[Operand, PullBack]) -> Node:
    """The node of an operation's value; constants drop out of its parents."""
    return Node(value, tuple(pair for pair in operands if isinstance(pair[0], Node)))


def _summed(g: Array, operand: Array) -> Array:
    """`g` summed to the shape that `operand` had before it was broadcast, in its dtype."""
    lead = g.ndim - operand.ndim
    stretched = (
        lead + axis
        for axis, length in enumerate(operand.shape)
        if length == 1 and g.shape[lead + axis] != 1
    )
    axes = (*range(lead), *stretched)
    if axes:
        g = total(g, axes).reshape(operand.shape)
    return rounded(g, operand.dtype)


def _wide(g: Array) -> Array:
    """`g` in float32 where it is narrower, so that products with it neither overflow nor vanish."""
    return g.astype(work_dtype(g.dtype), copy=False)


# ---------------------------------------------------------------- arithmetic


def _arithmetic(function: Callable[[Any, Any], Any], x: Any, y: Any) -> Any:
    """`function` of two arrays, or of one and a number, which narrow floats meet in float32."""
    if not hasattr(y, "dtype") and hasattr(x, "dtype"):
        return function(_wide(x), y).astype(x.dtype, copy=False)
    if not hasattr(x, "dtype") and hasattr(y, "dtype"):
        return function(x, _wide(y)).astype(y.dtype, copy=False)
    return function(x, y)


def add(a: Operand, b: Operand) -> Node:
    """a + b; the gradients are g and g."""
    _, x, y = _values(a=a, b=b)
    value = _arithmetic(operator.add, x, y)
    return _node(value, (a, lambda g: _summed(g, x)), (b, lambda g: _summed(g, y)))


def subtract(a: Operand, b: Operand) -> Node:
    """a - b; the gradients are g and -g."""
    _, x, y = _values(a=a, b=b)
    value = _arithmetic(operator.sub, x, y)
    return _node(value, (a, lambda g: _summed(g, x)), (b, lambda g: _summed(-g, y)))


def multiply(a: Operand, b: Operand) -> Node:
    """a * b; the gradients are g * b and g * a."""
    _, x, y = _values(a=a, b=b)
    value = _arithmetic(operator.mul, x, y)
    return _node(
        value, (a, lambda g: _summed(_wide(g) * y, x)), (b, lambda g: _summed(_wide(g) * x, y))
    )


def divide(a: Operand, b: Operand) -> Node:
    """a / b; the gradients are g / b and -g * (a / b) / b."""
    _, x, y = _values(a=a, b=b)
    ratio = _arithmetic(operator.truediv, x, y)
    return _node(
        ratio,
        (a, lambda g: _summed(_wide(g) / y, x)),
        (b, lambda g: _summed(-_wide(g) * ratio / y, y)),
    )


def negative(x: Operand) -> Node:
    """-x; the gradient is -g."""
    _, v = _values(x=x)
    return _node(-v, (x, lambda g: -g))


def matmul(a: Operand, b: Operand) -> Node:
    """The matrix product a @ b over the last two axes; the gradients are g @ b^T and a^T @ g.

    Parameters
    ----------
    a : Node or array, shape (..., n, k) or (k,)
    b : Node or array, shape (..., k, m) or (k,)
        The axes in front broadcast. An operand of one axis is a row on the left, a column on the
        right, and its second axis does not appear in the result.

    Returns
    -------
    Node, shape (..., n, m)

    Raises
    ------
    ValueError
        If an operand has no axis, or the shapes do not match.
    """
    xp, x, y = _values(a=a, b=b)
    value = _product(xp, x, y)
    rows = x if x.ndim > 1 else x[None, :]
    columns = y if y.ndim > 1 else y[:, None]

    repeats = np.broadcast_shapes(rows.shape[:-2], columns.shape[:-2])

    def restored(g: Array) -> Array:
        g = g if y.ndim > 1 else g[..., None]
        return g if x.ndim > 1 else g[..., None, :]

    def share(left: Array, right: Array, operand: Array) -> Array:
        if operand.shape[:-2] != repeats:  # summed over the repeats
            left, right = _wide(left), _wide(right)
        return _summed(_product(xp, left, right), operand)

    return _node(
        value,
        (a, lambda g: share(restored(g), columns.swapaxes(-1, -2), rows).reshape(x.shape)),
        (b, lambda g: share(rows.swapaxes(-1, -2), restored(g), columns).reshape(y.shape)),
    )


def _product(xp: Any, a: Array, b: Array, out: Array | None = None) -> Array:
    """a @ b. Both libraries add narrow floats in float32, but NumPy without BLAS, one by one."""
    dtype = np.result_type(a.dtype, b.dtype)
    if xp is not np:
        return xp.matmul(a, b, out=out).astype(dtype, copy=False)
    return np.matmul(a, b, out=out, dtype=work_dtype(dtype)).astype(dtype, copy=False)


# ---------------------------------------------------------------- shape


def sum(x: Operand, axis: Axes = None, *, keepdims: bool = False) -> Node:
    """The sum over `axis` (an int, a tuple, or None for all); the gradient repeats g along it."""
    _, v = _values(x=x)
    axes = _axes("axis", axis, v.shape)
    value = rounded(_reduced(total(v, axes), axes, keepdims), v.dtype)
    return _node(value, (x, lambda g: _repeated(g, axes, v)))


def mean(x: Operand, axis: Axes = None, *, keepdims: bool = False) -> Node:
    """The mean of the n elements along `axis`; the gradient repeats g / n along it."""
    _, v = _values(x=x)
    axes = _axes("axis", axis, v.shape)
    count = math.prod(v.shape[number] for number in axes)
    value = rounded(_reduced(total(v, axes) / count, axes, keepdims), v.dtype)
    return _node(value, (x, lambda g: _repeated(_wide(g) / count, axes, v)))


def _reduced(sums: Array, axes: tuple[int, ...], keepdims: bool) -> Array:
    """`sums`, whose `axes` have length 1, without them unless they are to be kept."""
    if keepdims:
        return sums
    return sums.reshape(
        tuple(length for number, length in enumerate(sums.shape) if number not in axes)
    )


def _repeated(g: Array, axes: tuple[int, ...], v: Array) -> Array:
    """`g`, which has lost these axes of `v`, in v's shape and dtype."""
    kept = tuple(1 if number in axes else length for number, length in enumerate(v.shape))
    return library(v).broadcast_to(g.reshape(kept).astype(v.dtype, copy=False), v.shape)


def _axes(name: str, axis: Axes, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(len(shape))) if axis is None else axes_of(name, axis, shape)


def reshape(x: Operand, shape: int | tuple[int, ...]) -> Node:
    """x in another shape, where one length may be -1; the gradient is g in x's shape."""
    _, v = _values(x=x)
    return _node(v.reshape(shape), (x, lambda g: g.reshape(v.shape)))


def transpose(x: Operand, axes: tuple[int, ...] | None = None) -> Node:
    """x with its axes permuted, reversed by default; the gradient is g permuted back."""
    _, v = _values(x=x)
    order = tuple(reversed(range(v.ndim))) if axes is None else _axes("axes", axes, v.shape)
    if len(order) != v.ndim:
        raise ValueError(f"axes must name each of the {v.ndim} axes of x once, got {axes}")
    back = tuple(order.index(axis) for axis in range(len(order)))
    return _node(v.transpose(order), (x, lambda g: g.transpose(back)))


def index(x: Operand, key: Any) -> Node:
    """x[key], with slices, integers, integer arrays and boolean arrays.

    The gradient is 0 but at `key`, where it is g; elements that an integer array picks several
    times get the sum of their gradients. On CuPy this sum is taken by atomic additions, whose
    order is not fixed; in float64, as longer sums are, it hardly shows.
    """
    xp, v = _values(x=x)

    def pull_back(g: Array) -> Array:
        if _is_basic(key):
            whole = xp.zeros(v.shape, v.dtype)
            whole[key] = g
            return whole
        whole = xp.zeros(v.shape, sum_dtype(v.dtype, g.size))
        xp.add.at(whole, key, g.astype(whole.dtype, copy=False))
        return rounded(whole, v.dtype)

    return _node(v[key], (x, pull_back))


def _is_basic(key: Any) -> bool:
    """Whether `key` picks no element twice: it holds integers, slices, None and ... only."""
    parts = key if isinstance(key, tuple) else (key,)
    return all(
        part is None or part is Ellipsis or isinstance(part, (int, np.integer, slice))
        for part in parts
    )


# ---------------------------------------------------------------- elementwise


def exp(x: Operand) -> Node:
    """e to the power of x; the gradient is g * exp(x)."""
    xp, v = _values(x=x)
    value = xp.exp(v)
    return _node(value, (x, lambda g: g * value))


def log(x: Operand) -> Node:
    """The natural logarithm; the gradient is g / x."""
    xp, v = _values(x=x)
    return _node(xp.log(v), (x, lambda g: g / v))


def maximum(a: Operand, b: Operand) -> Node:
    """The larger of a and b, or NaN where one is; each gets g where it is larger, g / 2 in a tie.

    The mean of the two one-sided derivatives, as the subgradient of a tie.
    """
    xp, x, y = _values(a=a, b=b)

    def share(g: Array, mine: Array, other: Array) -> Array:
        g = _wide(g)
        return _summed(g * (mine > other) + 0.5 * g * (mine == other), mine)

    value = _arithmetic(xp.maximum, x, y)
    return _node(value, (a, lambda g: share(g, x, y)), (b, lambda g: share(g, y, x)))


def relu(x: Operand) -> Node:
    """max(x, 0); the gradient is g where x > 0, else 0."""
    xp, v = _values(x=x)
    return _node(_arithmetic(xp.maximum, v, 0), (x, lambda g: g * (v > 0)))


def clip(x: Operand, low: float, high: float) -> Node:
    """min(max(x, low), high); the gradient is g where low <= x <= high, else 0.

    Raises
    ------
    ValueError
        If `low` exceeds `high`, or one is NaN.
    """
    low, high = as_real("low", low), as_real("high", high)
    if not low <= high:
        raise ValueError(f"low must not exceed high, got low={low} and high={high}")
    _, v = _values(x=x)
    wide = _wide(v)
    value = wide.clip(low, high).astype(v.dtype, copy=False)
    return _node(value, (x, lambda g: g * ((wide >= low) & (wide <= high))))


def prelu(x: Operand, slope: Operand) -> Node:
    """max(x, 0) + slope * min(x, 0), with a slope that is learnt.

    The gradient is g where x > 0, else slope * g; that of the slope is g * min(x, 0), summed.

    Parameters
    ----------
    x : Node or array, shape (n, channels, ...)
    slope : Node or array, shape () or (channels,)

    Raises
    ------
    ValueError
        If `slope` has another shape.

    References
    ----------
    K. He et al., "Delving Deep into Rectifiers", ICCV 2015, arXiv:1502.01852.
    """
    xp, v, s = _values(x=x, slope=slope)
    a = _per_channel("slope", s, v) if getattr(s, "ndim", 0) else s
    below = _arithmetic(xp.minimum, v, 0)
    value = a * below
    value += _arithmetic(xp.maximum, v, 0)

    def to_x(g: Array) -> Array:
        factor = a * (v <= 0)
        factor += v > 0
        return _summed(factor * _wide(g), v)

    return _node(value, (x, to_x), (slope, lambda g: _summed(_wide(g) * below, a).reshape(s.shape)))


def _per_channel(name: str, parameter: Array, x: Array) -> Array:
    """`parameter`, one value for each index of x's axis 1, in a shape that broadcasts to x."""
    shape = np.shape(parameter)
    if x.ndim < 2 or shape != x.shape[1:2]:
        raise ValueError(
            f"{name} must have one value per channel, axis 1 of x of shape {x.shape}, "
            f"got shape {shape}"
        )
    return parameter.reshape((-1,) + (1,) * (x.ndim - 2))


# ---------------------------------------------------------------- windows


def conv2d(
    x: Operand,
    w: Operand | BinaryCode,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    groups: int = 1,
) -> Node:
    """The cross-correlation of images with kernels, without a bias.

    ::

        y[n, o, p, q] = sum over c, i, j of
                        w[o, c, i, j] * x[n, first(o) + c, p * stride + i, q * stride + j]

    with x padded by zeros, and first(o) the first channel of o's group. The gradient of w sums
    g[n, o, p, q] * x[...] over n, p and q; that of x sums g[n, o, p, q] * w[o, c, i, j] over all
    the windows in which the element lies.

    Parameters
    ----------
    x : Node or array, shape (n, channels, height, width)
    w : Node, array or BinaryCode, shape (kernels, channels / groups, kernel height, kernel width)
        A code is a constant, which neither direction decodes as a whole: `cubin.products.conv2d`.
    stride : int or (int, int)
        The steps of the window along height and width, at least 1.
    padding : int or (int, int)
        The number of zeros on either side along height and width.
    groups : int
        Channels and kernels fall into so many groups, each convolved on its own; `channels`
        convolves every channel on its own.

    Returns
    -------
    Node, shape (n, kernels, 1 + (height + 2 * padding - kernel height) // stride, ...)

    Raises
    ------
    ValueError
        If the shapes do not fit each other, or a window does not fit into the padded image.

    Notes
    -----
    A matrix product of the kernels with the matrix whose columns are the windows. That matrix, as
    many times larger than x as a kernel has elements, is made in blocks of rows of the images,
    which fit the cache, and made again on the way back rather than kept. The result and the
    gradient of x have the channels outermost in memory and the images innermost: the windows then
    differ by whole runs of memory, and what is taken per channel is taken over one long run.

    References
    ----------
    K. Chellapilla, S. Puri and P. Simard, "High Performance Convolutional Neural Networks for
    Document Processing", IWFHR 2006.
    """
    if isinstance(w, BinaryCode):
        _, images = _values(x=x)
        options: Any = {"stride": stride, "padding": padding, "groups": groups}
        value = products.conv2d(images, w, **options)
        shape = images.shape
        return _node(value, (x, lambda g: products.conv2d_grad(g, w, shape, **options)))
    xp, images, kernels = _values(x=x, w=w)
    stride, padding = as_pair("stride", stride, 1), as_pair("padding", padding, 0)
    groups = as_integer("groups", groups)
    _check_convolution(images, kernels, groups)
    n, channels, height, width = images.shape
    size = kernels.shape[2:]
    padded_shape = (height + 2 * padding[0], width + 2 * padding[1])
    rows, per_row = _window_counts(padded_shape, size, stride)
    inside = tuple(slice(p, p + length) for p, length in zip(padding, (height, width), strict=True))
    dtype = np.result_type(images.dtype, kernels.dtype)
    # CuPy multiplies narrow floats as they are and adds in float32.
    work = work_dtype(dtype) if xp is np else dtype
    matrix = kernels.reshape(groups, len(kernels) // groups, math.prod(kernels.shape[1:]))
    matrix = matrix.astype(work, copy=False)
    blocks = _row_blocks(rows, channels * math.prod(size) * per_row * n * work.itemsize, xp)

    def columns() -> Iterator[Array]:
        """For each block of rows of the result, the windows as the columns of a matrix."""
        if padding == (0, 0):
            padded = _images_last(xp, images)
        else:
            padded = xp.zeros((channels, *padded_shape, n), images.dtype)
            padded[:, *inside] = images.transpose(1, 2, 3, 0)
        channel, row, column, image = padded.strides
        # CuPy's sliding_window_view moves the window's size to the device and back.
        windows = xp.lib.stride_tricks.as_strided(
            padded,
            shape=(channels, *size, rows, per_row, n),
            strides=(channel, row, column, row * stride[0], column * stride[1], image),
        )
        for block in blocks:
            part = windows[:, :, :, block]
            shape = (groups, matrix.shape[2], part.shape[3] * per_row * n)
            yield part.reshape(shape).astype(work, copy=False)

    def split(y: Array) -> list[Array]:
        """The blocks of rows of an array of the result's shape, images last, as matrices."""
        by_row = y.reshape(groups, matrix.shape[1], rows, per_row * n)
        parts = [by_row[:, :, block] for block in blocks]
        return [part.reshape(*part.shape[:2], part.shape[2] * part.shape[3]) for part in parts]

    def to_images(g: Array) -> Array:
        whole = xp.zeros(
            (channels, *padded_shape, n), sum_dtype(images.dtype, _overlaps(size, stride))
        )
        for block, part in zip(blocks, split(_images_last(xp, _wide(g))), strict=True):
            counts = (block.stop - block.start, per_row)
            taps = _product(xp, matrix.swapaxes(1, 2), part).reshape(channels, *size, *counts, n)
            below = whole[:, block.start * stride[0] :]
            for (i, j), window in _taps(size, counts, stride):
                below[:, *window] += taps[:, i, j]
        return rounded(whole[:, *inside].transpose(3, 0, 1, 2), images.dtype)

    def to_kernels(g: Array) -> Array:
        whole = xp.zeros(matrix.shape, sum_dtype(work, len(blocks)))
        parts = split(_images_last(xp, g.astype(work, copy=False)))
        for part, windows in zip(parts, columns(), strict=True):
            whole += _product(xp, part, windows.swapaxes(1, 2))
        return rounded(whole.reshape(kernels.shape), kernels.dtype)

    value = xp.empty((len(kernels), rows, per_row, n), work)
    for part, windows in zip(split(value), columns(), strict=True):
        _product(xp, matrix, windows, out=part)
    return _node(
        value.transpose(3, 0, 1, 2).astype(dtype, copy=False), (x, to_images), (w, to_kernels)
    )


def _images_last(xp: Any, x: Array) -> Array:
    """Images (n, channels, height, width) as (channels, height, width, n), contiguous."""
    return xp.ascontiguousarray(x.transpose(1, 2, 3, 0))


def _row_blocks(rows: int, nbytes: int, xp: Any) -> list[slice]:
    """Blocks of rows, each of `nbytes`, that fit the cache; a single block on a device."""
    step = rows if xp is not np else min(rows, max(1, _CACHED // max(1, nbytes)))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _check_convolution(x: Array, w: Array, groups: int) -> None:
    for name, array, axes in (
        ("x", x, "(n, channels, height, width)"),
        ("w", w, "(kernels, channels / groups, height, width)"),
    ):
        if array.ndim != 4:
            raise ValueError(f"{name} must have the axes {axes}, got shape {array.shape}")
    if groups < 1 or x.shape[1] % groups or len(w) % groups:
        raise ValueError(
            f"groups must be at least 1 and divide the {x.shape[1]} channels of x and the "
            f"{len(w)} kernels of w, got {groups}"
        )
    if w.shape[1] * groups != x.shape[1]:
        raise ValueError(
            f"w of shape {w.shape} convolves {w.shape[1]} channels in each of {groups} groups, "
            f"but x of shape {x.shape} has {x.shape[1]} channels"
        )


def max_pool(
    x: Operand,
    size: int | tuple[int, int],
    *,
    stride: int | tuple[int, int] | None = None,
) -> Node:
    """The maximum of each window; the gradient goes to the first element that attains it.

    A window that holds NaN gives NaN and passes no gradient.

    Parameters
    ----------
    x : Node or array, shape (n, channels, height, width)
    size : int or (int, int)
        Height and width of the window.
    stride : int or (int, int), optional
        The steps of the window; `size` by default. Rows and columns behind the last whole window
        are left out.

    Returns
    -------
    Node, shape (n, channels, 1 + (height - size) // stride, ...)

    Raises
    ------
    ValueError
        If x has not four axes, or the window does not fit into it.
    """
    xp, v = _values(x=x)
    windows, overlaps = _pooling(v, size, stride)
    value = v[:, :, *windows[0]]
    for window in windows[1:]:
        value = xp.maximum(value, v[:, :, *window])

    def pull_back(g: Array) -> Array:
        whole = xp.zeros_like(v, dtype=sum_dtype(v.dtype, overlaps))
        free = xp.ones_like(value, dtype=bool)
        for window in windows:
            first = v[:, :, *window] == value
            first &= free
            if overlaps == 1:
                xp.multiply(g, first, out=whole[:, :, *window])
            else:
                whole[:, :, *window] += g * first
            free ^= first
        return rounded(whole, v.dtype)

    return _node(value, (x, pull_back))


def mean_pool(
    x: Operand,
    size: int | tuple[int, int],
    *,
    stride: int | tuple[int, int] | None = None,
) -> Node:
    """The mean of each window of n elements; the gradient g / n goes to each of them.

    Parameters, result and exceptions are those of `max_pool`.
    """
    xp, v = _values(x=x)
    windows, overlaps = _pooling(v, size, stride)
    value = v[:, :, *windows[0]].astype(sum_dtype(v.dtype, len(windows)))
    for window in windows[1:]:
        value += v[:, :, *window]
    value /= len(windows)

    def pull_back(g: Array) -> Array:
        whole = xp.zeros_like(v, dtype=sum_dtype(v.dtype, overlaps))
        share = (_wide(g) / len(windows)).astype(whole.dtype, copy=False)
        for window in windows:
            whole[:, :, *window] += share
        return rounded(whole, v.dtype)

    return _node(rounded(value, v.dtype), (x, pull_back))


def _pooling(
    x: Array, size: int | tuple[int, int], stride: int | tuple[int, int] | None
) -> tuple[list[tuple[slice, ...]], int]:
    """For each position in a window, the elements of `x` at this position of all windows.

    And in how many windows an element lies, at most.
    """
    if x.ndim != 4:
        raise ValueError(f"x must have the axes (n, channels, height, width), got shape {x.shape}")
    size = as_pair("size", size, 1)
    stride = size if stride is None else as_pair("stride", stride, 1)
    counts = _window_counts(x.shape[2:], size, stride)
    return [window for _, window in _taps(size, counts, stride)], _overlaps(size, stride)


def _overlaps(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """In how many windows an element lies, at most."""
    return math.prod(-(-length // step) for length, step in zip(size, stride, strict=True))


def _window_counts(
    shape: tuple[int, int], size: tuple[int, int], stride: tuple[int, int]
) -> tuple[int, ...]:
    """How many windows fit along height and width."""
    if size[0] > shape[0] or size[1] > shape[1]:
        raise ValueError(
            f"a window of {size} does not fit into an image of {tuple(shape)}, padding included"
        )
    return tuple(
        1 + (length - window) // step
        for length, window, step in zip(shape, size, stride, strict=True)
    )


def _taps(
    size: tuple[int, int], counts: tuple[int, ...], stride: tuple[int, int]
) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Each position in a window, with the elements at this position of all windows."""
    for position in itertools.product(*map(range, size)):
        yield (
            position,
            tuple(
                slice(start, start + step * (count - 1) + 1, step)
                for start, step, count in zip(position, stride, counts, strict=True)
            ),
        )


# ---------------------------------------------------------------- layers


def batch_norm(
    x: Operand,
    gamma: Operand,
    beta: Operand,
    running: tuple[Array, Array],
    *,
    train: bool,
    momentum: float = 0.1,
    epsilon: float = 1e-5,
) -> tuple[Node, tuple[Array, Array]]:
    """gamma * z + beta with z = (x - mean) / sqrt(variance + epsilon), per channel.

    In training, mean and variance are those of the batch, the variance with divisor n, and x gets
    ``(h - mean(h) - z * mean(h * z)) / sqrt(variance + epsilon)`` with h = g * gamma. In
    inference they are `running`, constants.

    Parameters
    ----------
    x : Node or array, shape (batch, channels, ...)
    gamma, beta : Node or array, shape (channels,)
    running : (mean, variance), two arrays of floats, shape (channels,)
        The running statistics so far. They are not changed. Let them be float32 beside x of
        float16 or bfloat16: in float16 a variance overflows, in both a small momentum moves
        nothing.
    train : bool
        Whether to normalise by the batch.
    momentum : float
        The weight of the batch in the new running statistics, from 0 to 1.
    epsilon : float
        Added to the variance, at least 0.

    Returns
    -------
    y : Node, shape of x
    running : (mean, variance)
        In training ``(1 - momentum) * running + momentum * batch``, the variance with divisor
        n - 1, in the dtypes of `running`; in inference `running` itself.

    Raises
    ------
    TypeError
        If `running` is no pair of arrays of floats in the library of x.
    ValueError
        If a shape does not fit, a channel has a single element in training, or `momentum` or
        `epsilon` is out of range.

    References
    ----------
    S. Ioffe and C. Szegedy, "Batch Normalization", ICML 2015, arXiv:1502.03167.
    """
    if not isinstance(running, (tuple, list)) or len(running) != 2:
        raise TypeError(
            f"running must be a pair (mean, variance), got {type(running).__qualname__}"
        )
    xp, v, scale, offset = _values(x=x, gamma=gamma, beta=beta)
    mean, variance = (
        as_floats(f"running {name}", array)
        for name, array in zip(("mean", "variance"), running, strict=True)
    )
    library(v, mean, variance)
    momentum, epsilon = as_real("momentum", momentum), as_real_below("epsilon", epsilon, math.inf)
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must lie in 0 .. 1, got {momentum}")
    scale, offset, level, spread = (
        _per_channel(name, parameter, v)
        for name, parameter in (("gamma", scale), ("beta", offset),
                                ("running mean", mean), ("running variance", variance))
    )  # fmt: skip
    dtype = np.result_type(v.dtype, scale.dtype, offset.dtype)
    work = work_dtype(dtype)
    axes = (0, *range(2, v.ndim))
    if train:
        if v.size <= v.shape[1]:
            raise ValueError(
                f"x of shape {v.shape} has no two elements per channel: its variance in training "
                "means nothing"
            )
        count = v.size // v.shape[1]
        level = total(v, axes) / count
    z = v - level.astype(work, copy=False)
    if train:
        spread = total(z * z, axes) / count
        running = (
            _moved(mean, level.reshape(-1), momentum),
            _moved(variance, spread.reshape(-1) * (count / (count - 1)), momentum),
        )
    factor = ((spread.astype(np.float64, copy=False) + epsilon) ** -0.5).astype(work, copy=False)
    z *= factor
    y = z * scale
    y += offset

    def to_x(g: Array) -> Array:
        g = _wide(g)
        if not train:
            return (g * (scale * factor)).astype(v.dtype, copy=False)
        gx = z * (total(g * z, axes) / count).astype(work, copy=False)
        gx += (total(g, axes) / count).astype(work, copy=False)
        xp.subtract(g, gx, out=gx)
        gx *= scale * factor
        return gx.astype(v.dtype, copy=False)

    node = _node(
        y.astype(dtype, copy=False),
        (x, to_x),
        (gamma, lambda g: _summed(_wide(g) * z, scale).reshape(-1)),
        (beta, lambda g: _summed(g, offset).reshape(-1)),
    )
    return node, running


def _moved(old: Array, new: Array, weight: float) -> Array:
    """``(1 - weight) * old + weight * new``, for `new` in float64, in old's dtype."""
    return rounded((1 - weight) * old.astype(new.dtype, copy=False) + weight * new, old.dtype)


def softmax_cross_entropy(logits: Operand, labels: Array) -> Node:
    """The mean over the batch of -log(softmax(logits)[label]).

    The gradient is g * (softmax(logits) - one_hot(labels)) / n. The largest logit of a row is
    subtracted first, so that no exponential overflows.

    Parameters
    ----------
    logits : Node or array, shape (n, classes)
    labels : integer array, shape (n,), in the library of the logits
        The class of each row, from 0.

    Returns
    -------
    Node, shape ()

    Raises
    ------
    TypeError
        If `labels` is no integer array of the logits' library.
    ValueError
        If a shape does not fit, there is no row, or a NumPy label is out of range. Labels on a
        GPU are not looked at, since this would synchronise: one out of range gives NaN.
    """
    xp, v = _values(logits=logits)
    _check_labels(v, labels)
    shifted = _wide(v) - v.max(axis=1, keepdims=True)
    level = xp.log(total(xp.exp(shifted), (1,)))
    log_softmax = shifted - level.astype(shifted.dtype, copy=False)
    one_hot = labels[:, None] == xp.arange(v.shape[1])
    picked = xp.where(one_hot, log_softmax, 0).sum(axis=1)
    losses = -xp.where(one_hot.any(axis=1), picked, np.nan)

    def pull_back(g: Array) -> Array:
        return ((xp.exp(log_softmax) - one_hot) * (_wide(g) / len(v))).astype(v.dtype, copy=False)

    value = rounded((total(losses, (0,)) / len(v)).reshape(()), v.dtype)
    return _node(value, (logits, pull_back))


def _check_labels(logits: Array, labels: Array) -> None:
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(
            f"logits must have the axes (n, classes), neither empty, got shape {logits.shape}"
        )
    dtype = getattr(labels, "dtype", None)
    if dtype is None or dtype.kind not in "iu":
        got = type(labels).__qualname__ if dtype is None else dtype
        raise TypeError(f"labels must be an integer array, got {got}")
    library(logits, labels)
    if labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels must have one label per row of logits of shape {logits.shape}, "
            f"got shape {labels.shape}"
        )
    if not on_device(labels) and not (labels.min() >= 0 and labels.max() < logits.shape[1]):
        raise ValueError(
            f"labels must lie in 0 .. {logits.shape[1] - 1}, got {labels.min()} .. {labels.max()}"
        )


def dropout(x: Operand, rate: float, rng: Any) -> Node:
    """x * m / (1 - rate) with m = 0 at a share of `rate` of the elements, else 1.

    The gradient is g * m / (1 - rate).

    Parameters
    ----------
    x : Node or array
    rate : float
        The probability with which an element is dropped, 0 <= rate < 1.
    rng : numpy.random.Generator, cupy.random.Generator or int
        A generator of x's library, from which each call draws one float32 per element, or the
        seed of one: the same seed drops the same elements in every call.

    Raises
    ------
    TypeError
        If `rng` is neither a generator nor an integer, or draws arrays of another library than
        x's.
    ValueError
        If `rate` is out of range, or a seed is negative.

    References
    ----------
    N. Srivastava et al., "Dropout", JMLR 15, 2014.
    """
    rate = as_real_below("rate", rate, 1)
    xp, v = _values(x=x)
    kept = _generator(rng, xp).random(v.shape, dtype=np.float32) >= rate
    library(v, kept)
    factor = kept.astype(work_dtype(v.dtype)) / (1 - rate)
    return _node(
        (v * factor).astype(v.dtype, copy=False),
        (x, lambda g: (g * factor).astype(v.dtype, copy=False)),
    )


def _generator(rng: Any, xp: Any) -> Any:
    """`rng` where it is a random generator, or that of xp's with this seed."""
    if hasattr(rng, "random"):
        return rng
    if isinstance(rng, (bool, np.bool_)) or not isinstance(rng, (int, np.integer)):
        raise TypeError(
            f"rng must be a random generator or an integer seed, got {type(rng).__qualname__}"
        )
    if rng < 0:
        raise ValueError(f"rng must be a seed of at least 0, got {rng}")
    return xp.random.default_rng(int(rng))


# ---------------------------------------------------------------- operators

Node.__add__ = add
Node.__radd__ = lambda x, other: add(other, x)
Node.__sub__ = subtract
Node.__rsub__ = lambda x, other: subtract(other, x)
Node.__mul__ = multiply
Node.__rmul__ = lambda x, other: multiply(other, x)
Node.__truediv__ = divide
Node.__rtruediv__ = lambda x, other: divide(other, x)
Node.__matmul__ = matmul
Node.__rmatmul__ = lambda x, other: matmul(other, x)
Node.__neg__ = negative
Node.__getitem__ = index
