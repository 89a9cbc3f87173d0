"""Checks of arguments: each returns the argument as the work needs it, or raises and names it."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from cubin.core import conversions, floats, libraries
from cubin.core.libraries import Array


def as_floats(name: str, value: object) -> Array:
    """`value` as an array of floats of its library; TypeError for other dtypes."""
    array: Array = (
        libraries.aligned(value) if libraries.on_device(value) else as_host_array(name, value)
    )
    if floats.is_float(array.dtype):
        return array
    wanted = f"{name} must be float16, bfloat16, float32 or float64"
    if array.dtype.kind in "OSU" and not hasattr(value, "dtype"):  # no numbers at all
        raise TypeError(f"{wanted}, got {type(value).__qualname__}")
    if array.dtype.kind == "c":
        raise TypeError(f"{wanted}, got {array.dtype}: pass its real part, or the imaginary one")
    if array.dtype.names:
        raise TypeError(f"{wanted}, got the fields {array.dtype.names}: pass one of them")
    cast = f"{name}.astype('float32')" if hasattr(value, "astype") else f"numpy.float32({name})"
    raise TypeError(f"{wanted}, got {array.dtype}: cast it first, e.g. {cast}")


def as_host_array(name: str, value: Any) -> np.ndarray:
    """`value` as a NumPy array in the native byte order.

    Raises
    ------
    TypeError
        If that would lose or hide something: masks, laziness, a device, a recorded gradient.
    ValueError
        If it is no array of numbers, such as lists of different lengths.
    """
    if type(value) is np.ndarray and value.dtype.isnative:
        return value
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if hasattr(value, "dequantize"):
        raise TypeError(f"{name} is a {type(value).__qualname__}: pass {name}.dequantize()")
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
    libraries.check_same(name, array, x, x_name)
    if array.shape != x.shape:
        raise ValueError(f"{name} has shape {array.shape}, but {x_name} has shape {x.shape}")
    return conversions.rounded(array, x.dtype)


def as_importance(value: object, x: Array) -> Array:
    """Weights of squared errors, finite and not negative, as floats of x's shape in its library."""
    entries = as_floats("importance", value)
    xp = libraries.library(x, entries)
    try:
        weights = xp.broadcast_to(entries, x.shape)
    except ValueError:
        raise ValueError(
            f"importance of shape {entries.shape} does not broadcast to x's shape {x.shape}"
        ) from None
    entries = conversions.computable(entries)
    if not bool((xp.isfinite(entries) & (entries >= 0)).all()):
        raise ValueError("importance must be finite and not negative")
    return weights


def output(out: Array | None, x: Array, dtype: Any = None) -> Array:
    """`out` if it can take a result of x's shape, or a new array where `out` is None.

    Of a subclass of NumPy's arrays it is a plain view, since a subclass may index in its own way
    and compiled loops have another type for it.
    """
    dtype = x.dtype if dtype is None else np.dtype(dtype)
    if out is None:
        return libraries.result_like(x, dtype)
    if not (libraries.on_device(out) or isinstance(out, np.ndarray)):
        raise TypeError(f"out must be an array, got {type(out).__qualname__}")
    if isinstance(out, np.ma.MaskedArray):
        raise TypeError("out is a masked array, whose mask would not change: use out.data")
    libraries.check_same("out", out, x)
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
    if libraries.on_device(out) and not libraries.is_aligned(out):
        raise ValueError(
            f"out must lie at multiples of its item size, {out.itemsize} bytes, as a GPU writes "
            f"no other addresses, got the address {libraries._address(out):#x} "
            f"and strides {out.strides}"
        )
    return out if libraries.on_device(out) else np.asarray(out)


def _overlaps_itself(array: Array) -> bool:
    """Whether elements share memory, as in broadcast arrays and sliding windows.

    They do not if every axis steps over all that the axes of smaller strides span.
    """
    span = array.itemsize
    for stride, length in sorted(zip(map(abs, array.strides), array.shape, strict=True)):
        if length > 1 and stride < span:
            return bool(array.size)
        span += stride * (length - 1)
    return False


def check_broadcasts(
    name: str, array: Array, shape: tuple[int, ...], of: str = "x's shape"
) -> None:
    """ValueError where `array` does not broadcast to `shape`, which `of` says what it is of."""
    if array.ndim == 0 or array.shape == shape:
        return
    try:
        fits = np.broadcast_shapes(array.shape, shape) == tuple(shape)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{name} of shape {array.shape} does not broadcast to {of} {shape}")


def as_bound(value: object, x: Array) -> Array:
    """A bound on |x|, as uint8 or as floats.

    It is uint8 for uint8 maps and for Python's integers from 0 to 255. Other integers become
    float64, and float maps keep their dtype. Python's numbers are rounded to x's dtype first, as in
    NumPy's comparisons.
    """
    if type(value) is int and 0 <= value <= 255:
        return np.uint8(value)
    if libraries.on_device(value):
        bound: Any = libraries.aligned(value)
        libraries.check_same("bound", bound, x)
    else:
        bound = as_host_array("bound", value)
    real = bound.dtype.kind in "iuf" or floats.is_float(bound.dtype)
    if not real or bound.dtype.itemsize > 8:
        raise TypeError(f"bound must be a real number or an array of them, got {bound.dtype}")
    check_broadcasts("bound", bound, x.shape)
    if bound.dtype == np.uint8:
        return (
            libraries.library(x).asarray(bound)
            if bound.ndim or libraries.on_device(bound)
            else np.uint8(bound)
        )
    if isinstance(value, (int, float)) and not isinstance(value, np.generic):
        return floats.nearest(value, x.dtype)
    if bound.ndim == 0 and not libraries.on_device(bound):
        return np.float64(bound)
    bound = libraries.library(x).asarray(bound)
    if bound.dtype.kind == "f":
        return bound
    return conversions.widened(bound) if floats.is_float(bound.dtype) else bound.astype(np.float64)


def as_integer(name: str, value: object) -> int:
    """`value` as an int; TypeError for booleans and everything else that is no integer."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer, got a boolean")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__qualname__}") from None


def as_pair(name: str, value: Any, least: int) -> tuple[int, int]:
    """An integer, or one for each of two axes, as two; none may be below `least`."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    numbers = tuple(as_integer(name, number) for number in pair)
    if len(numbers) != 2 or min(numbers) < least:
        raise ValueError(f"{name} must be one or two integers of at least {least}, got {value!r}")
    return numbers[0], numbers[1]


def as_real(name: str, value: object) -> float:
    """`value` as a float; TypeError for booleans and everything else that is no real number."""
    if not is_real(value):
        raise TypeError(f"{name} must be a real number, got {type(value).__qualname__}")
    return float(value)  # type: ignore[arg-type]


def is_real(value: object) -> bool:
    """Whether `value` is a real number: Python's or NumPy's, and no boolean."""
    if isinstance(value, np.generic):
        return isinstance(value, np.integer) or floats.is_float(value.dtype)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def as_real_below(name: str, value: object, bound: float) -> float:
    """`value` as a float with 0 <= value < bound; ValueError for others."""
    number = as_real(name, value)
    if not 0 <= number < bound:
        raise ValueError(f"{name} must lie in 0 <= {name} < {bound}, got {value}")
    return number
