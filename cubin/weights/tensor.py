"""A tensor in a file: what is known before it is read, and how its data becomes an array."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cubin.core import floats, passes
from cubin.core.rows import rows_of
from cubin.weights.float8 import FLOAT8

Axis = int | tuple[int, ...] | None

Cut = tuple[slice, ...]
"""The part of a tensor that is read, as NumPy slices it; () is all of it."""

FLOATS = {"float16", "bfloat16", "float32", "float64", "float80", "float96", "float128"}


class WeightsError(Exception):
    """A path or a tensor that gives no usable weights; the message is one line that says why."""


class NotFiniteError(WeightsError):
    """A tensor with NaN or infinity.

    Attributes
    ----------
    reason : str
        How many values, without the name of the tensor.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}; repair the tensor or leave its file out")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.name, self.reason)


@dataclass(frozen=True)
class Weight:
    """A tensor on disk.

    It can be pickled: a process that gets it opens the file itself.

    Attributes
    ----------
    name : str
        Its name in the file; with several files, preceded by the file's.
    shape : tuple of int
        Its shape.
    dtype : str
        The type that it is stored in.
    channel_axis : int, tuple of int or None
        The axes along which output channels lie, each index of which has scales of its own. In a
        file without a graph it is 0. In one with a graph it is an axis of the tensor as it is
        stored, found back from the operator that uses it as its weight through all that only moves
        elements: transposes, reshapes, slices, concatenations. Matrices that lie side by side, of
        the directions of a recurrent layer or the batch indices of a product, have channels of
        their own: their axis is one of the tuple. None if there is a single channel, and for
        what is no weight. A tensor is given in a reshaped form where the channels are but a part
        of an axis: as (512, 128), say, where the file holds 65536 numbers and the graph reshapes
        them. Of several operators the first one counts.
    read : callable
        Returns the data as stored of a Cut of the tensor.
    reason : str
        Why the tensor is left out; empty if it is not.
    is_weight : bool
        Whether it is used as a weight; one with a reason is skipped.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    channel_axis: Axis
    read: Callable[[Cut], np.ndarray] = field(repr=False, compare=False)
    reason: str = ""
    is_weight: bool = True

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def load(self, cut: Cut = ()) -> np.ndarray:
        """Read the data as float16, bfloat16, float32 or float64.

        Types of fewer bits become float32, with their scales applied.

        Parameters
        ----------
        cut : tuple of slice, optional
            Which part to read: ``load(cut)`` is ``load()[cut]`` without reading the rest, except
            where the file is compressed.

        Returns
        -------
        ndarray
            The tensor; read-only where it is a view of the file.

        Raises
        ------
        WeightsError
            If the data cannot be read.
        NotFiniteError
            If it holds NaN or infinity.
        """
        try:
            array = native_float(self.read(cut))
            expected = cut_shape(self.shape, cut)
            if array.shape != expected:
                raise ValueError(f"it has the shape {array.shape}, not {expected}")
        except Exception as error:
            raise WeightsError(
                f"{self.name}: cannot read the data ({first_line(error)})"
            ) from error
        bad = not_finite(array)
        if bad:
            raise NotFiniteError(self.name, f"{bad} of {array.size} values are NaN or infinite")
        return array


def cut_shape(shape: tuple[int, ...], cut: Cut) -> tuple[int, ...]:
    """The shape of a cut of a tensor."""
    lengths = [len(range(n)[part]) for n, part in zip(shape, cut, strict=False)]
    return (*lengths, *shape[len(cut) :])


def native_float(array: np.ndarray) -> np.ndarray:
    """Return the array in the native float type that holds its values, a copy only if need be."""
    array = np.asarray(array)
    if array.dtype == BFLOAT16_IN_NUMPY:
        return array.view(floats.bfloat16())
    if array.dtype.name == "bfloat16":
        return array
    return array.astype(f"f{min(array.dtype.itemsize, 8)}", copy=False)


def not_finite(array: np.ndarray) -> int:
    """Count the values that are NaN or infinite."""
    infinity, counts = floats.infinity(array.dtype), []
    negative = infinity | infinity.dtype.type(1 << (8 * infinity.itemsize - 1))

    def count(_: Any, values: np.ndarray) -> None:
        # As signed integers, bit patterns have the positive numbers on top, else the negative ones.
        word = floats.as_integers(values)
        signed = word.view(f"i{word.itemsize}")
        if word.size and (word.max() >= negative or signed.max() >= infinity):
            counts.append(int(np.count_nonzero(word & ~(negative ^ infinity) >= infinity)))

    passes.for_each_part(count, rows_of(array.shape), array)
    return sum(counts)


def channel_rows(array: Any, channel_axis: Axis) -> Any:
    """Lay a weight out as (channels, elements of a channel).

    Parameters
    ----------
    array : ndarray
        The weight.
    channel_axis : int, tuple of int or None
        As that of Weight.

    Returns
    -------
    ndarray
        A view where that is possible.
    """
    axes = () if channel_axis is None else np.atleast_1d(channel_axis).tolist()
    moved = np.moveaxis(array, axes, range(len(axes)))
    return moved.reshape(math.prod(moved.shape[: len(axes)]), -1)


def without_graph(
    name: str, shape: tuple[int, ...], dtype: str, read: Callable[[Cut], np.ndarray]
) -> Weight:
    """Judge a tensor by its type and shape alone: a weight has rank 2 or more, channels first."""
    tensor = Weight(name, shape, dtype, 0, read)
    if len(shape) < 2:
        return replace(tensor, channel_axis=None, reason=f"of rank {len(shape)}", is_weight=False)
    if tensor.size == 0:
        return replace(tensor, channel_axis=None, reason="empty", is_weight=False)
    if dtype not in FLOATS and dtype not in FLOAT8:
        small_float = dtype.startswith("float") or dtype == SMALL_IN_NUMPY
        reason = not_read(dtype) if small_float else f"of type {dtype}, which is no float"
        return replace(tensor, channel_axis=None, reason=reason, is_weight=small_float)
    return tensor


def is_listed(tensor: Weight) -> bool:
    """Whether to list a tensor of a file without a graph: one that is a float or might be one."""
    return tensor.dtype in FLOATS or tensor.is_weight or len(tensor.shape) >= 2


def not_read(dtype: str) -> str:
    return f"of type {dtype}, which is not read"


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# NumPy's files have no name for the types of ml_dtypes: they hold void elements of the same size.
# Those of two bytes are bfloat16; of one byte there are several types, and which is not told.
BFLOAT16_IN_NUMPY = np.dtype("V2")
SMALL_IN_NUMPY = "void8 (float8 or int4 of ml_dtypes)"
