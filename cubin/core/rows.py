"""Rows: how the elements of an array fall into rows that share their scales."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from cubin.core import libraries
from cubin.core.arrays import as_integer
from cubin.core.libraries import Array


@dataclass(frozen=True)
class Rows:
    """How the elements of an array of shape `shape` fall into rows that share their scales.

    Attributes
    ----------
    shape : tuple of int
        The array's shape.
    split : tuple of int
        The shape with the last axis split into groups, if there are groups, else `shape`. A last
        group that is shorter counts as a whole one there: only the `sections` have views then.
    order : tuple of int
        The axes of `split`: first those that number the rows, then those within a row.
    scale_shape : tuple of int
        The lengths of the axes that number the rows: one scale per level for each.
    channel_axis : int, tuple of int or None
    group_size : int or None
        The arguments that the layout was made from, as plain integers.
    whole : int
        Where the array is a chunk of a larger one, the number of elements of that, else 0. Forms
        that give different bits are chosen by it, so that chunks have the bits of the whole.
    """

    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    scale_shape: tuple[int, ...]
    channel_axis: int | tuple[int, ...] | None = field(default=None, compare=False)
    group_size: int | None = field(default=None, compare=False)
    whole: int = field(default=0, compare=False)

    @cached_property
    def size(self) -> int:
        """The number of elements by which forms are chosen."""
        return self.whole or self.count * self.length

    @cached_property
    def count(self) -> int:
        """The number of rows."""
        return math.prod(self.scale_shape)

    @cached_property
    def length(self) -> int:
        """The number of elements of a row; of all but the shorter ones at the end."""
        return math.prod(self.inner_shape)

    @cached_property
    def inner_shape(self) -> tuple[int, ...]:
        """The lengths of the axes within a row."""
        return tuple(self.split[axis] for axis in self.order[len(self.scale_shape) :])

    def view(self, array: Array) -> Array:
        """A view of `array` with the axes that number the rows first."""
        if self.split != self.shape:
            array = array.reshape(self.split)
        return array if self.in_order else array.transpose(self.order)

    @cached_property
    def in_order(self) -> bool:
        """Whether the axes that number the rows come first: rows of a C array lie one by one."""
        return self.order == tuple(range(len(self.order)))

    def as_stored(self, array: Array) -> Rows:
        """The same rows, with their elements in the order in which `array` holds them.

        A row whose elements lie in order is then one run, whichever axes it has.
        """
        count = len(self.scale_shape)
        if array.flags.c_contiguous or self.split != self.shape:
            return self
        inner = sorted(self.order[count:], key=lambda axis: -abs(array.strides[axis]))
        order = (*self.order[:count], *inner)
        return self if order == self.order else dataclasses.replace(self, order=order)

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """The rows in parts whose rows have one length: groups, and the shorter ones at the end.

        Where all rows have one length, they are a single section.
        """
        size, length = self.group_size, self.shape[-1] if self.shape else 0
        if size is None or size > length or length % size == 0:
            return (Section(self, None),)
        *leading, groups = self.scale_shape
        whole = (groups - 1) * size
        cuts = (slice(0, whole), size), (slice(whole, length), length - whole)
        return tuple(
            Section(_rows_of((*leading, cut.stop - cut.start), None, own), cut) for cut, own in cuts
        )

    def joined(self, parts: Sequence[Array]) -> Array:
        """What the sections have for each row, (..., \\*scale shape), for all rows."""
        if len(parts) == 1:
            return parts[0]
        return libraries.library(parts[0]).concatenate(parts, axis=-1)

    def reduced(self, reduce: Callable[..., Array], array: Array) -> Array:
        """``reduce(values, axis=...)`` over the elements of each row, of shape `scale_shape`."""
        found = []
        for section in self.sections:
            rows = section.rows
            inner = tuple(range(len(rows.scale_shape), len(rows.order)))
            found.append(reduce(rows.view(section.of(array)), axis=inner))
        return self.joined(found)

    def flat_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The shape (rows, elements) of a part of the view that has shape `shape`."""
        leading = len(self.scale_shape)
        return math.prod(shape[:leading]), math.prod(shape[leading:])

    def flat(self, array: Array) -> Array:
        """`array` as (rows, length): a view where its strides allow one, else a copy."""
        return flattened(self.view(array), (self.count, self.length))

    def aligned(self, scale: Array) -> Array:
        """Scales of shape `scale_shape` so that they broadcast to an array of shape `split`."""
        spread = scale.reshape(self.scale_shape + (1,) * len(self.inner_shape))
        return spread.transpose(self.places)

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Where `order` has each axis of `split`."""
        return tuple(sorted(range(len(self.order)), key=self.order.__getitem__))


class Section(NamedTuple):
    """Some elements of the last axis of an array, as an array whose rows have one length.

    Attributes
    ----------
    rows : Rows
        The layout of these elements.
    elements : slice or None
        Which they are; None for all, of an array of any rank.
    """

    rows: Rows
    elements: slice | None

    def of(self, array: Any) -> Any:
        """The section of an array, or of one that broadcasts to it; scalars and None stay."""
        if self.elements is None or np.ndim(array) == 0 or array.shape[-1] == 1:
            return array
        return array[..., self.elements]


def flattened(array: Array, shape: tuple[int, ...]) -> Array:
    """``array.reshape(shape)``, where the last axes become one: faster if they lie in runs."""
    runs = runs_of(array, shape)
    if runs is None:
        return array.reshape(shape)
    return np.ascontiguousarray(runs.reshape(*shape[:-1], -1)).view(array.dtype)


def runs_of(array: Array, shape: tuple[int, ...]) -> np.ndarray | None:
    """A view whose items are runs of memory, several in each line of ``array.reshape(shape)``.

    NumPy copies an item as a whole, but the elements of short axes one by one. None where there are
    no such runs, as in an array that can be reshaped without a copy.
    """
    if libraries.on_device(array) or array.flags.c_contiguous or not array.size:
        return None
    axis, nbytes = array.ndim, array.itemsize
    while axis and array.strides[axis - 1] == nbytes:
        axis -= 1
        nbytes *= array.shape[axis]
    if not array.itemsize < nbytes < shape[-1] * array.itemsize:
        return None
    run = array.reshape(*array.shape[:axis], -1)
    return run.view(np.dtype((np.void, nbytes)))[..., 0]


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
        If both are given, an axis is out of range or repeated, or `group_size` is less than 1 or
        given for a 0-d array.
    """
    size = None if group_size is None else as_integer("group_size", group_size)
    return _rows_of(tuple(shape), plain_axes(channel_axis), size)


@lru_cache(maxsize=1 << 10)
def _rows_of(
    shape: tuple[int, ...], channel_axis: int | tuple[int, ...] | None, group_size: int | None
) -> Rows:
    ndim = len(shape)
    if group_size is not None:
        if channel_axis is not None:
            raise ValueError(
                f"channel_axis={channel_axis} and group_size={group_size} exclude each other: "
                "with groups every run of group_size elements of the last axis has its own scales"
            )
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {group_size}")
        if ndim == 0:
            raise ValueError("group_size needs an array with at least one axis, got a 0-d array")
        length = shape[-1]
        scale_shape = (*shape[:-1], -(-length // group_size))
        # A group that is larger than the axis is one shorter group: rows of one length.
        own = min(group_size, length) if length else group_size
        split, order = (*scale_shape, own), tuple(range(ndim + 1))
        return Rows(shape, split, order, scale_shape, group_size=group_size)
    axes = () if channel_axis is None else axes_of("channel_axis", channel_axis, shape)
    rest = tuple(axis for axis in range(ndim) if axis not in axes)
    scale_shape = tuple(shape[axis] for axis in axes)
    return Rows(shape, shape, axes + rest, scale_shape, channel_axis=channel_axis)


def plain_axes(channel_axis: Any) -> int | tuple[int, ...] | None:
    """`channel_axis` as plain integers: it may hold NumPy's.

    Raises
    ------
    TypeError
        If it is no integer, or tuple of integers.
    """
    if isinstance(channel_axis, (tuple, list)):
        return tuple(as_integer("channel_axis", axis) for axis in channel_axis)
    return None if channel_axis is None else as_integer("channel_axis", channel_axis)


def axes_of(name: str, axis: int | tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """`axis` as a tuple of different axes of an array of shape `shape`, counted from the front."""
    listed = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
    axes = []
    for entry in listed:
        number = as_integer(name, entry)
        if not -len(shape) <= number < len(shape):
            raise ValueError(
                f"{name} {number} is out of range for x of shape {shape} with {len(shape)} axes"
            )
        axes.append(number % len(shape))
    if len(set(axes)) < len(axes):
        raise ValueError(f"{name} {axis} names an axis of x twice")
    return tuple(axes)
