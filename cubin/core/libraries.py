"""Which library owns an array, and the operations that depend on it.

CuPy is never imported here: an array can only be CuPy's where somebody has imported CuPy already.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
from types import ModuleType
from typing import Any

import numpy as np

from cubin.core import memory

Array = Any
"""A NumPy or CuPy array: the two share no base class."""


def cupy() -> Any:
    """The CuPy module if the process has imported it, else None."""
    return sys.modules.get("cupy")


def on_device(value: object) -> bool:
    """Whether `value` is a CuPy array."""
    module = cupy()
    # CuPy has no ndarray yet while it is being imported, or where its import failed half-way.
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


def is_aligned(array: Array) -> bool:
    """Whether all elements of a CuPy array lie at multiples of their size.

    A GPU cannot access others: a kernel that tried would make every later call fail.
    """
    size = array.itemsize
    steps = (step for length, step in zip(array.shape, array.strides, strict=True) if length > 1)
    return not array.size or math.gcd(array.data.ptr, *steps) % size == 0


def aligned(array: Array) -> Array:
    """A CuPy array, or a copy where its elements do not lie at multiples of their size.

    The copy is made byte by byte, since no kernel can read such elements.
    """
    if is_aligned(array):
        return array
    with current_device(array):
        return array[..., None].view(np.uint8).copy().view(array.dtype)[..., 0]


def result(shape: tuple[int, ...], dtype: Any, x: Array) -> Array:
    """A new array of arbitrary content in x's library."""
    return library(x).empty(shape, dtype) if on_device(x) else memory.empty(shape, dtype)


def result_like(x: Array, dtype: Any) -> Array:
    """A new array of arbitrary content, of x's shape and in its memory order."""
    if x.flags.c_contiguous or x.ndim < 2:
        return result(x.shape, dtype, x)
    if on_device(x):
        return library(x).empty_like(x, dtype)
    # The axes by their strides, the longest first; as NumPy's order K.
    order = sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))
    return memory.empty(tuple(x.shape[axis] for axis in order), dtype).transpose(np.argsort(order))


def apart(source: Array, out: Array) -> Array:
    """`source`, or a copy where writing `out` would overwrite elements before they are read.

    If `source` is `out` itself there is no copy: each element is read before it is written.
    """
    if isinstance(source, np.generic):  # a scalar shares no memory
        return source
    same = (
        source.shape == out.shape
        and source.strides == out.strides
        and _address(source) == _address(out)
        and source.dtype == out.dtype
    )
    return source.copy() if not same and library(source).may_share_memory(source, out) else source


def _address(array: Array) -> int:
    return array.data.ptr if on_device(array) else array.__array_interface__["data"][0]


def check_same(name: str, array: Array, x: Array, x_name: str = "x") -> None:
    """TypeError where one of two arrays is NumPy's and the other CuPy's."""
    if on_device(array) != on_device(x):
        owner = "CuPy" if on_device(array) else "NumPy"
        other = "CuPy" if on_device(x) else "NumPy"
        raise TypeError(
            f"{name} is a {owner} array, but {x_name} is a {other} array: move one of them "
            "with cupy.asarray or cupy.asnumpy"
        )


def to_host(array: Array) -> np.ndarray:
    """`array` as a NumPy array: a copy only where it is on a device."""
    return array.get() if on_device(array) else np.asarray(array)


def to_device(array: np.ndarray) -> Array:
    """`array` as a CuPy array on the current device.

    Raises
    ------
    RuntimeError
        If CuPy is not installed.
    """
    try:
        module = importlib.import_module("cupy")
    except ImportError as error:
        raise RuntimeError(
            f"CuPy cannot be imported ({error}): install cubin with the extra cuda12 or cuda13"
        ) from error
    return module.asarray(array)


def with_gpu() -> Any:
    """CuPy, for work on a GPU that is not asked for by an array.

    Raises
    ------
    RuntimeError
        If CuPy is not installed or finds no GPU.
    """
    try:
        module = importlib.import_module("cupy")
    except ImportError as error:
        raise RuntimeError(
            "CuPy is not installed (pip install '.[cuda12]' or '.[cuda13]')"
        ) from error
    if not module.cuda.is_available():
        raise RuntimeError("CuPy finds no CUDA GPU")
    return module
