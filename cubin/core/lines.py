"""Lines: an array cut along its first axis, as planes of bits hold it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from cubin.core.libraries import Array
from cubin.core.rows import Rows, flattened


@dataclass(frozen=True)
class Lines:
    """How an array falls into lines: one for each index of its first axis.

    A plane holds a bit for every element, (width, count) bytes: byte j of line i is at ``[j, i]``
    and has the elements 8j to 8j + 7 of the line in C order, the first in its lowest bit. The bits
    beyond the end of a line are 0.

    Attributes
    ----------
    count : int
        The number of lines: the length of the first axis, 1 for an array of rank 0 or 1.
    inner : tuple of int
        The lengths of the axes within a line.
    """

    count: int
    inner: tuple[int, ...]

    @cached_property
    def length(self) -> int:
        """The number of elements of a line."""
        return math.prod(self.inner)

    @property
    def width(self) -> int:
        """The number of bytes of a line."""
        return -(-self.length // 8)


@lru_cache(maxsize=1 << 10)
def lines_of(shape: tuple[int, ...]) -> Lines:
    """The lines of an array of shape `shape`."""
    return Lines(shape[0], shape[1:]) if len(shape) > 1 else Lines(1, shape)


class Box(NamedTuple):
    """Where a block of the view that `Rows.view` gives lies in the lines.

    Attributes
    ----------
    sizes : tuple of int
        The lengths of the block's axes.
    order : tuple of int
        The axes of the block in the order in which the lines have them.
    lines : slice
        The numbers of the lines.
    ranges : tuple of slice
        The indices along each axis within a line.
    inner : tuple of int
        The lengths of these axes in the whole array.
    """

    sizes: tuple[int, ...]
    order: tuple[int, ...]
    lines: slice
    ranges: tuple[slice, ...]
    inner: tuple[int, ...]

    def in_lines(self, array: Array) -> Array:
        """`array`, (levels, rows, n), as (levels, lines, elements): a view where strides allow."""
        block = array.reshape(len(array), *self.sizes)
        block = block.transpose((0, *(1 + at for at in self.order)))
        count = self.lines.stop - self.lines.start
        return flattened(block, (len(array), count, math.prod(self.sizes) // count))

    def run(self) -> slice | None:
        """The elements of a line that the box has, if they follow each other, else None."""
        start, step, whole = 0, 1, True
        stop = 1
        for cut, length in zip(reversed(self.ranges), reversed(self.inner), strict=True):
            if not whole and cut.stop - cut.start > 1:
                return None
            whole = whole and cut.stop - cut.start == length
            start += cut.start * step
            stop *= cut.stop - cut.start
            step *= length
        return slice(start, start + stop)

    def positions(self) -> np.ndarray:
        """The elements of a line that the box has: ascending numbers."""
        numbers = np.zeros((), np.int64)
        for cut, length in zip(self.ranges, self.inner, strict=True):
            numbers = numbers[..., None] * length + np.arange(cut.start, cut.stop)
        return numbers.ravel()


def box_of(block: tuple[object, ...], rows: Rows) -> Box:
    """The box of a block, given by slices of the leading axes of the view that `rows` has."""
    lengths = [rows.split[axis] for axis in rows.order]
    cuts = [cut for cut in block if isinstance(cut, slice)]
    cuts += [slice(None)] * (len(lengths) - len(cuts))
    whole = [slice(*cut.indices(n)[:2]) for cut, n in zip(cuts, lengths, strict=True)]
    sizes = tuple(cut.stop - cut.start for cut in whole)
    ranges = tuple(whole[at] for at in rows.places)
    if len(rows.shape) < 2:
        return Box(sizes, rows.places, slice(0, 1), ranges, rows.split)
    return Box(sizes, rows.places, ranges[0], ranges[1:], rows.split[1:])
