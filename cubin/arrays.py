"""Which library owns an array, the checks of arguments, and the layout of rows.

This is the only module that knows ``cupy.ndarray``. CuPy is never imported here: an array can only
be CuPy's where somebody has imported CuPy already.
"""

from __future__ import annotations

import contextlib
import math
import operator
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from cubin import memory

Array = Any
"""A NumPy or CuPy array: the two share no base class."""

MAX_BITS = 16


def cupy() -> Any:
    """The CuPy module if the process has imported it, else None."""
    return sys.modules.get("cupy")


def on_device(value: object) -> bool:
    """Whether `value` is a CuPy array."""
    module = cupy()
    # While CuPy is being imported, or where importing it failed half-way, it has no ndarray yet.
    return hasattr(module, "ndarray") and isinstance(value, module.ndarray)


def library(*arrays: object) -> ModuleType | Any:
    """NumPy, or CuPy if the arrays are CuPy's; TypeError for a mixture."""
    owners = {on_device(array) for array in arrays}
    if owners == {True, False}:
        raise TypeError(
            "got NumPy and CuPy arrays in one call: move them to one side first, "
            "with cupy.asarray(a) or cupy.asnumpy(a)"
        )
    return cupy() if True in owners else np


def current_device(x: Array) -> contextlib.AbstractContextManager[Any]:
    """A context in which x's device is the current one."""
    return x.device if on_device(x) else contextlib.nullcontext()


def work_dtype(dtype: Any) -> np.dtype[Any]:
    """The dtype that residuals and scales are computed in: float32 for float16, else `dtype`."""
    return np.dtype(np.float32) if dtype == np.float16 else np.dtype(dtype)


# ---------------------------------------------------------------- checks


def as_floats(name: str, value: object) -> Array:
    """`value` as a float16, float32 or float64 array where it is, else a TypeError."""
    array: Array = value if on_device(value) else _host_array(name, value)
    if array.dtype.char not in "efd":
        raise TypeError(
            f"{name} must be float16, float32 or float64, got {array.dtype}: "
            f"cast it first, e.g. {name}.astype('float32')"
        )
    return array


def _host_array(name: str, value: Any) -> np.ndarray:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be lost: use {name}.filled()")
    if kind.startswith("dask."):
        raise TypeError(f"{name} is a lazy {kind}: call {name}.compute() first")
    if hasattr(value, "__cuda_array_interface__"):
        raise TypeError(f"{name} is a {kind} on a GPU: pass cupy.asarray({name})")
    if getattr(value, "requires_grad", False) is True:
        raise TypeError(f"{name} is a {kind} that requires grad: pass {name}.detach()")
    try:
        array = np.asarray(value)
    except (TypeError, RuntimeError) as error:
        raise TypeError(
            f"{name} of type {kind} is nothing that NumPy can read: {error}; "
            "convert it first, to float32 or an integer type"
        ) from error
    except ValueError as error:
        raise ValueError(f"{name} is no array of numbers: {error}") from error
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def like(name: str, value: object, x: Array, x_name: str = "x") -> Array:
    """`value` as floats of x's library, shape and dtype."""
    array = as_floats(name, value)
    _same_library(name, array, x, x_name)
    if array.shape != x.shape:
        raise ValueError(f"{name} has shape {array.shape}, but {x_name} has shape {x.shape}")
    return array.astype(x.dtype, copy=False)


def output(out: Array | None, x: Array, dtype: Any = None) -> Array:
    """`out` if it can take a result of x's shape, or a new array where `out` is None.

    Of a subclass of NumPy's arrays it is a plain view: its own indexing is none of the work's, and
    compiled loops would take it for what it is not.
    """
    dtype = x.dtype if dtype is None else np.dtype(dtype)
    if out is None:
        return result(x.shape, dtype, x)
    if not (on_device(out) or isinstance(out, np.ndarray)):
        raise TypeError(f"out must be an array, got {type(out).__qualname__}")
    if isinstance(out, np.ma.MaskedArray):
        raise TypeError("out is a masked array, whose mask would not change: use out.data")
    _same_library("out", out, x)
    if out.dtype != dtype:
        raise TypeError(f"out has dtype {out.dtype}, but the result has dtype {dtype}")
    if out.shape != x.shape:
        raise ValueError(f"out has shape {out.shape}, but the result has shape {x.shape}")
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError("out is read-only")
    if _overlaps_itself(out):
        raise ValueError(
            f"out of shape {out.shape} and strides {out.strides} has elements that share memory: "
            "pass an array of its own"
        )
    return out if on_device(out) else np.asarray(out)


def _overlaps_itself(array: Array) -> bool:
    """Whether elements share memory, as in broadcast arrays and sliding windows.

    Each axis must step over all that the axes of smaller strides span.
    """
    span = array.itemsize
    for stride, length in sorted(zip(map(abs, array.strides), array.shape, strict=True)):
        if length > 1 and stride < span:
            return bool(array.size)
        span += stride * (length - 1)
    return False


def result(shape: tuple[int, ...], dtype: Any, x: Array) -> Array:
    """A new array of arbitrary content in x's library."""
    return library(x).empty(shape, dtype) if on_device(x) else memory.empty(shape, dtype)


def apart(given: Array, out: Array) -> Array:
    """`given`, or a copy of it where writing `out` would overwrite elements not read yet.

    What is `out` itself is not copied: every element is read before it is written. Scalars are no
    part of any array.
    """
    if isinstance(given, np.generic):
        return given
    same = (
        given.shape == out.shape
        and given.strides == out.strides
        and _address(given) == _address(out)
        and given.dtype == out.dtype
    )
    return given.copy() if not same and library(given).may_share_memory(given, out) else given


def _address(array: Array) -> int:
    return array.data.ptr if on_device(array) else array.__array_interface__["data"][0]


def _same_library(name: str, array: Array, x: Array, x_name: str = "x") -> None:
    if on_device(array) != on_device(x):
        owner = "CuPy" if on_device(array) else "NumPy"
        other = "CuPy" if on_device(x) else "NumPy"
        raise TypeError(
            f"{name} is a {owner} array, but {x_name} is a {other} array: move one of them "
            "with cupy.asarray or cupy.asnumpy"
        )


def as_bits(
    value: object, x: Array, *, limit: int = MAX_BITS, look: bool = False
) -> tuple[Array, int]:
    """The number of bits of each element of `x`, and the number of levels that this needs.

    The bits come back as a uint8 scalar, or as a uint8 array in x's library that broadcasts to
    x's shape, perhaps a view of the map. A map that is on the device already is not looked at
    unless `look` is true, since this would synchronise: it is clipped to 0 .. `limit`, and all
    `limit` levels are needed.
    """
    if on_device(value):
        bits: Any = value
        _same_library("bits", bits, x)
    else:
        bits = _host_array("bits", value)
    if isinstance(value, int) and bits.dtype == object:  # beyond 64 bits
        raise ValueError(f"bits must lie in 0 .. {limit}, got {value}")
    if bits.dtype.kind not in "iu":
        raise TypeError(f"bits must be an integer or an integer array, got {bits.dtype}")
    _broadcasts("bits", bits, x.shape)
    if on_device(bits) and not look:
        clipped = bits if bits.dtype == np.uint8 else bits.clip(0, limit).astype(np.uint8)
        return clipped, limit
    if bits.ndim == 0 and not on_device(bits):
        low = high = int(bits)
    else:
        low, high = (int(bits.min()), int(bits.max())) if bits.size else (0, 0)
    if low < 0 or high > limit:
        raise ValueError(f"bits must lie in 0 .. {limit}, got {low if low < 0 else high}")
    if on_device(bits):
        return bits.astype(np.uint8, copy=False), high
    if bits.ndim == 0:
        return np.uint8(high), high
    return library(x).asarray(_low_bytes(bits)), high


def _low_bytes(integers: np.ndarray) -> np.ndarray:
    """The lowest byte of each integer: a view, since a copy of a large map would take memory."""
    size = integers.itemsize
    offset = 0 if sys.byteorder == "little" else size - 1
    low = {"names": ["low"], "formats": [np.uint8], "offsets": [offset], "itemsize": size}
    return integers.view(np.dtype(low))["low"]  # type: ignore[call-overload]


def _broadcasts(name: str, array: Array, shape: tuple[int, ...]) -> None:
    try:
        fits = array.ndim == 0 or np.broadcast_shapes(array.shape, shape) == tuple(shape)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{name} of shape {array.shape} does not broadcast to x's shape {shape}")


def as_bound(value: object, x: Array) -> Array:
    """A bound on |x|: uint8 where it is an integer map or scalar that fits, else float64.

    Python's numbers are rounded to x's dtype, as in NumPy's own comparisons.
    """
    if on_device(value):
        bound: Any = value
        _same_library("bound", bound, x)
    else:
        bound = _host_array("bound", value)
    if bound.dtype.kind not in "iuf" or bound.dtype.itemsize > 8:
        raise TypeError(f"bound must be a real number or an array of them, got {bound.dtype}")
    _broadcasts("bound", bound, x.shape)
    if bound.dtype == np.uint8:
        return library(x).asarray(bound) if bound.ndim or on_device(bound) else np.uint8(bound)
    if isinstance(value, int) and 0 <= value <= 255:
        return np.uint8(value)
    if isinstance(value, (int, float)) and not isinstance(value, np.generic):
        with np.errstate(over="ignore"):
            return np.float64(x.dtype.type(value))
    if bound.ndim == 0 and not on_device(bound):
        return np.float64(bound)
    return library(x).asarray(bound).astype(np.float64, copy=False)


def as_integer(name: str, value: object) -> int:
    """`value` as an int; TypeError for booleans and for what is no integer."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer, got a boolean")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__qualname__}") from None


def as_real(name: str, value: object) -> float:
    """`value` as a float; TypeError for booleans and for what is no real number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a real number, got {type(value).__qualname__}")
    return float(value)


def as_real_below(name: str, value: object, bound: float) -> float:
    """`value` as a float with 0 <= value < bound; ValueError for others."""
    number = as_real(name, value)
    if not 0 <= number < bound:
        raise ValueError(f"{name} must lie in 0 <= {name} < {bound}, got {value}")
    return number


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class Rows:
    """How the elements of an array of shape `shape` fall into rows that share their scales.

    Attributes
    ----------
    shape : tuple of int
        The array's shape.
    split : tuple of int
        The shape with the last axis split into groups, if there are groups, else `shape`.
    order : tuple of int
        The axes of `split`, those that number the rows first.
    scale_shape : tuple of int
        The lengths of the axes that number the rows: one scale per level for each.
    """

    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    scale_shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of rows."""
        return math.prod(self.scale_shape)

    @property
    def length(self) -> int:
        """The number of elements of a row."""
        return math.prod(self.inner_shape)

    @property
    def inner_shape(self) -> tuple[int, ...]:
        """The lengths of the axes within a row."""
        return tuple(self.split[axis] for axis in self.order[len(self.scale_shape) :])

    def view(self, array: Array, lead: int = 0) -> Array:
        """A view of `array` with the axes that number the rows first.

        The first `lead` axes of `array` are not part of the layout and stay in front.
        """
        array = array.reshape(array.shape[:lead] + self.split)
        return array.transpose((*range(lead), *(lead + axis for axis in self.order)))

    def flat_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The shape (rows, elements) of a part of the view that has shape `shape`."""
        leading = len(self.scale_shape)
        return math.prod(shape[:leading]), math.prod(shape[leading:])

    def flat(self, array: Array) -> Array:
        """`array` as (rows, length): a view where its strides allow one, else a copy."""
        return self.view(array).reshape(self.count, self.length)

    def aligned(self, scale: Array) -> Array:
        """Scales of shape `scale_shape` so that they broadcast to an array of shape `split`."""
        spread = scale.reshape(self.scale_shape + (1,) * len(self.inner_shape))
        return spread.transpose(np.argsort(self.order).tolist())


def rows_of(
    shape: tuple[int, ...],
    channel_axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
) -> Rows:
    """The row layout of an array of shape `shape`.

    Raises
    ------
    TypeError
        If `channel_axis` or `group_size` is no integer (or tuple of integers).
    ValueError
        If both are given, an axis is out of range or repeated, or `group_size` does not divide
        the length of the last axis.
    """
    shape = tuple(shape)
    ndim = len(shape)
    if group_size is not None:
        if channel_axis is not None:
            raise ValueError(
                f"channel_axis={channel_axis} and group_size={group_size} exclude each other: "
                "with groups every run of group_size elements of the last axis has its own scales"
            )
        size = as_integer("group_size", group_size)
        if size < 1:
            raise ValueError(f"group_size must be at least 1, got {size}")
        if ndim == 0:
            raise ValueError("group_size needs an array with at least one axis, got a 0-d array")
        if shape[-1] % size:
            raise ValueError(
                f"group_size {size} does not divide the length {shape[-1]} of the last axis "
                f"of x, whose shape is {shape}"
            )
        scale_shape = (*shape[:-1], shape[-1] // size)
        return Rows(shape, (*scale_shape, size), tuple(range(ndim + 1)), scale_shape)
    axes = () if channel_axis is None else axes_of("channel_axis", channel_axis, shape)
    rest = tuple(axis for axis in range(ndim) if axis not in axes)
    return Rows(shape, shape, axes + rest, tuple(shape[axis] for axis in axes))


def axes_of(name: str, axis: int | tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """`axis` as a tuple of different axes of an array of shape `shape`, counted from the front."""
    given = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
    axes = []
    for entry in given:
        number = as_integer(name, entry)
        if not -len(shape) <= number < len(shape):
            raise ValueError(
                f"{name} {number} is out of range for x of shape {shape} with {len(shape)} axes"
            )
        axes.append(number % len(shape))
    if len(set(axes)) < len(axes):
        raise ValueError(f"{name} {axis} names an axis of x twice")
    return tuple(axes)
