"""Decoding: the values of a code, a block of its lines at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cubin.codes.planes import pack_signs, place_of, sum_planes, turn_lines
from cubin.core import conversions, floats, libraries, passes
from cubin.core.bits import MAX_BITS
from cubin.core.libraries import Array
from cubin.core.lines import Lines, lines_of
from cubin.core.rows import Rows

BESIDE = 1 << 6
"""The fewest lines of a block where lines lie side by side in memory."""


class Decoding:
    """The values of a code, which are computed block by block.

    Parameters
    ----------
    scales : array, shape (levels, \\*scale shape)
    planes : array of uint8, shape (levels, width, lines)
    bits : uint8 scalar or array that broadcasts to the shape
    rows : Rows
    shift : array, shape scale shape, optional
        What values begin with.

    Attributes
    ----------
    planes
        As above.
    levels : int
        How many levels some element may have.
    mapped : bool
        Whether there is a bit map.
    lines : Lines
    run, period : int
        So many neighbouring elements of a line share their scales. Runs begin anew after each
        `period`, the last one before which may be shorter. Only a line of several axes has more
        than one.
    dtype : dtype
        That of the scales as they are stored.
    """

    def __init__(
        self, scales: Array, planes: Array, bits: Any, rows: Rows, shift: Array | None = None
    ) -> None:
        self.lines, self.dtype = lines_of(rows.shape), scales.dtype
        self.planes, self._bits, self._shape = planes, bits, rows.shape
        self.mapped = not isinstance(bits, np.generic)
        self.levels = min(len(planes), MAX_BITS if self.mapped else int(bits))
        layout = _layout_of(rows)
        self._runs, self.run, self.period = layout[3:]
        self._scales = _in_lines(scales, layout)
        # Like the scales of one level.
        self._shift = None if shift is None else _in_lines(shift[None], layout)

    @property
    def shifted(self) -> bool:
        """Whether there is a shift."""
        return self._shift is not None

    @property
    def even(self) -> bool:
        """Whether all runs have equally many elements."""
        return self.period % max(1, self.run) == 0

    def sections(self) -> list[tuple[slice, Decoding]]:
        """Elements of the lines, and their decoding: two where a last group is shorter.

        Both have even runs then. They are a single section where the shorter group does not begin
        at a byte, or lines have several axes.
        """
        length = self.lines.length
        whole = length // max(1, self.run) * self.run
        if self.even or self.period < length or whole % 8:
            return [(slice(0, length), self)]
        cuts = [(slice(0, whole), self.run), (slice(whole, length), length - whole)]
        return [(cut, self._section(cut, run)) for cut, run in cuts]

    def _section(self, elements: slice, run: int) -> Decoding:
        part = copy.copy(self)
        groups = self._runs_of(elements)
        part.lines = Lines(self.lines.count, (elements.stop - elements.start,))
        part.planes = self.planes[:, elements.start // 8 : -(-elements.stop // 8)]
        part._scales, part._runs = self._scales[..., groups], (groups.stop - groups.start,)
        part._shift = None if self._shift is None else self._shift[..., groups]
        part._shape = (*self._shape[:-1], part.lines.length)
        if np.ndim(self._bits) and self._bits.shape[-1] > 1:
            part._bits = self._bits[..., elements]
        part.run, part.period = run, part.lines.length
        return part

    def evened(self) -> Decoding:
        """The same with even runs, of fewer elements."""
        size = math.gcd(self.run, self.period)
        xp: Any = libraries.library(self.planes)
        places = self.place(xp.arange(0, self.lines.length, size))
        part = copy.copy(self)
        part._scales = self._of_runs(self._scales, slice(None), None)[..., places]
        if self._shift is not None:
            part._shift = self._of_runs(self._shift, slice(None), None)[..., places]
        part.run, part._runs = size, (len(places),)
        return part

    @property
    def shared(self) -> bool:
        """Whether all lines share their scales."""
        return self._scales.shape[1] == 1

    def scales(self, lines: slice, elements: slice | None = None) -> Array:
        """The scales, (levels, lines or 1, runs), of the runs of some lines.

        They are the same for all lines where there is one line of them. `elements` begin with a
        run.
        """
        return self._of_runs(self._scales, lines, elements)

    def shift(self, lines: slice, elements: slice | None = None) -> Any:
        """The shift of each run, (lines or 1, runs) as of `scales`; 0 where there is none."""
        return 0 if self._shift is None else self._of_runs(self._shift, lines, elements)[0]

    def _of_runs(self, scales: Array, lines: slice, elements: slice | None) -> Array:
        xp: Any = libraries.library(scales)
        cut = scales[:, lines] if scales.shape[1] > 1 else scales
        levels, count = cut.shape[:2]
        if cut.shape[2:] != self._runs:
            cut = xp.broadcast_to(cut, (levels, count, *self._runs))
        spread = cut.reshape(levels, count, math.prod(self._runs))
        return spread if elements is None else spread[..., self._runs_of(elements)]

    def _runs_of(self, elements: slice) -> slice:
        """The numbers of the runs of some elements."""
        if elements.start == elements.stop:
            return slice(0, 0)
        return slice(self.place(elements.start), self.place(elements.stop - 1) + 1)

    def starts(self) -> Sequence[int]:
        """Where in a line a run begins whose scales may differ from those of the run before."""
        run, period = max(1, self.run), max(1, self.period)
        periods = range(0, self.lines.length, period)
        return [first + at for first in periods for at in range(0, period, run)]

    def place(self, elements: Any) -> Any:
        """The numbers, within a line, of the scales of some elements."""
        return place_of(elements, self.run, self.period)

    def bits(self, lines: slice, elements: slice | None = None) -> Any:
        """The bits of some elements: a uint8 scalar, or an array of shape (lines, n)."""
        if not self.mapped:
            return np.uint8(self._bits)
        xp: Any = libraries.library(self._bits)
        spread = xp.broadcast_to(self._bits, self._shape)
        if len(self._shape) < 2:
            spread = spread.reshape(1, -1)
        part = spread[lines].reshape(lines.stop - lines.start, self.lines.length)
        return part if elements is None else part[:, elements]

    def in_dtype(self, dtype: Any) -> Decoding:
        """The same with scales, and so sums of them, in another dtype."""
        same = copy.copy(self)
        same._scales = conversions.rounded(self._scales, dtype)
        same._shift = None if self._shift is None else conversions.rounded(self._shift, dtype)
        return same

    def as_levels(self) -> Decoding:
        """The same values as sums of levels alone: the shift is the first, with signs of +1."""
        if self._shift is None:
            return self
        xp: Any = libraries.library(self.planes)
        ones = xp.full((1, *self.planes.shape[1:]), 255, np.uint8)
        ones[:, -1:] >>= np.uint8(-self.lines.length % 8)
        same = copy.copy(self)
        same.levels, same._bits = self.levels + 1, self._bits + np.uint8(1)
        same.planes = xp.concatenate([ones, self.planes])
        same._scales = xp.concatenate([self._shift, self._scales])
        same._shift = None
        return same

    def part(self, lines: slice) -> Decoding:
        """The decoding of some lines."""
        part = copy.copy(self)
        part.lines = Lines(lines.stop - lines.start, self.lines.inner)
        part.planes = self.planes[..., lines]
        if len(self._shape) > 1:
            part._shape = (part.lines.count, *self._shape[1:])
        if np.ndim(self._bits) == len(self._shape) > 1 and self._bits.shape[0] > 1:
            part._bits = self._bits[lines]
        if self._scales.shape[1] > 1:
            part._scales = self._scales[:, lines]
            part._shift = None if self._shift is None else self._shift[:, lines]
        return part

    def signs(self, level: int) -> Array:
        """The signs at a level, int8 of shape (lines, n); 0 where there is no code."""
        xp: Any = libraries.library(self.planes)
        hot = (xp.asarray(self._bits) > level).astype(np.uint8)
        sign = unpacked(self.planes[level : level + 1], hot, self._shape)
        return sign.reshape(self.lines.count, self.lines.length)

    def write(self, y: Array, lines: slice, elements: slice | None = None) -> None:
        """Write the values of some elements to `y`, (lines, n).

        They begin at a whole byte, with a run, and with a period where a line has several.
        """
        start, stop = 0, self.lines.length
        if elements is not None:
            start, stop = elements.start, elements.stop
            elements = elements if stop - start < self.lines.length else None
        planes = self.planes[:, start // 8 : -(-stop // 8), lines]
        on = passes.form(sum_planes, self.planes)
        scales, shift = self.scales(lines, elements), self.shift(lines, elements)
        bits, run = self.bits(lines, elements), min(self.run, stop - start)
        on(planes, bits, scales, shift, run, self.period, y=y)

    def write_all(self, y: Array) -> None:
        """Write all values to `y`, an array of (lines, n)."""

        def task(lines: slice, elements: slice) -> None:
            self.write(y[lines, elements], lines, elements)

        # Where lines lie side by side, many of them are worked on together.
        least = None if y.flags.c_contiguous else BESIDE
        several = not self.even and self.period < self.lines.length
        unit = self.period if several else self.run if math.prod(self._runs) > 1 else 1
        work = passes.work_on(y.size * (self.levels + 1) // 4)
        passes.for_each_lines(task, self.lines, unit, y, least=least, work=work)


class _Layout(NamedTuple):
    """How the scales of rows lie along the lines.

    Attributes
    ----------
    spread : tuple of int
        The shape of a level's scales, and 1 for each axis within a row.
    axes : tuple of int
        The axis of the levels, and the axes of `spread` in the order of the array.
    shape : tuple of int
        The number of lines and the lengths of the axes of runs; 1 for an axis along which scales
        are shared.
    runs : tuple of int
        The lengths of the axes of runs in a line.
    run : int
        So many neighbouring elements share their scales.
    period : int
        Runs begin anew after so many elements: the last one before may be shorter.
    """

    spread: tuple[int, ...]
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    runs: tuple[int, ...]
    run: int
    period: int


@lru_cache(maxsize=1 << 10)
def _layout_of(rows: Rows) -> _Layout:
    spread = (*rows.scale_shape, *(1 for _ in rows.inner_shape))
    axes = (0, *(1 + axis for axis in rows.places))
    shape, split = tuple(spread[axis] for axis in rows.places), rows.split
    if len(rows.shape) < 2:
        shape, split = (1, *shape), (1, *split)
    last = max((axis for axis in range(1, len(shape)) if shape[axis] > 1), default=0)
    run, period = math.prod(split[last + 1 :]), math.prod(split[1:])
    if len(rows.sections) > 1:
        # Also where a line has several axes.
        period = rows.shape[-1]
    return _Layout(spread, axes, shape[: last + 1], split[1 : last + 1], run, period)


def _in_lines(scales: Array, layout: _Layout) -> Array:
    """Scales, (levels, \\*scale shape), in the work dtype, with the line as their second axis.

    They broadcast to the runs.
    """
    wide = conversions.rounded(scales, floats.work_dtype(scales.dtype))
    spread = wide.reshape(len(wide), *layout.spread).transpose(layout.axes)
    return spread.reshape(len(wide), *layout.shape)


def coded(bits: Any, level: int, shape: tuple[int, ...], like: Array) -> Array:
    """The plane, (width, lines), of the elements with a code at a level, in `like`'s library."""
    xp: Any = libraries.library(like)
    lines = lines_of(shape)
    plane = xp.empty((1, lines.width, lines.count), np.uint8)
    hot = xp.broadcast_to(xp.asarray(bits) > level, shape).reshape(1, lines.count, lines.length)
    passes.form(pack_signs, plane)(hot.astype(np.int8), planes=plane)
    return plane[0]


def packed(signs: Array, bits: Any) -> Array:
    """The planes of signs, (levels, \\*shape).

    Raises
    ------
    ValueError
        If they are not -1 or +1 exactly where `bits` has a code, else 0.
    """
    xp: Any = libraries.library(signs)
    shape = signs.shape[1:]
    lines = lines_of(shape)
    planes = xp.zeros((len(signs), lines.width, lines.count), np.uint8)
    for level, sign in enumerate(signs):
        if not bool((abs(sign) == (xp.asarray(bits) > level)).all()):
            raise ValueError(
                f"signs of level {level} must be -1 or +1 where bits > {level}, else 0"
            )
        if sign.size:
            of_level = sign.reshape(1, lines.count, lines.length)
            passes.form(pack_signs, signs)(of_level, planes=planes[level : level + 1])
    return planes


def codes_of(planes: Array, shape: tuple[int, ...]) -> Array:
    """The codes of all elements, uint16: bit i is set where level i has the sign +1."""
    codes = libraries.library(planes).zeros(shape, np.uint16)
    for level in range(len(planes)):
        (sign,) = unpacked(planes[level : level + 1], np.uint8(1), shape)
        codes |= (sign > 0).astype(np.uint16) << np.uint16(level)
    return codes


def unpacked(planes: Array, bits: Any, shape: tuple[int, ...]) -> Array:
    """The signs, int8 of shape (levels, \\*shape), that planes hold; 0 where there is no code."""
    xp: Any = libraries.library(planes)
    lines = lines_of(shape)
    with libraries.current_device(planes):
        signs = libraries.result((len(planes), *shape), np.int8, planes)
        if not signs.size:
            return signs
        for level, plane in enumerate(planes):
            if libraries.on_device(planes):
                bit = plane.T[:, :, None] >> xp.arange(8, dtype=np.uint8) & 1
                bit = bit.reshape(lines.count, -1)[:, : lines.length]
            else:
                (held,) = bytes_of_lines(plane[None], len(plane))
                bit = np.unpackbits(held, 1, lines.length, bitorder="little")
            sign = (bit.reshape(shape) * 2).view(np.int8) - 1
            signs[level] = sign * (xp.asarray(bits) > level)
    return signs


def bytes_of_lines(planes: Array, width: int) -> Array:
    """The bytes of each line side by side, (levels, lines, width), filled up with zeros."""
    held = planes.swapaxes(1, 2)
    found = libraries.library(planes).zeros((*held.shape[:2], width), np.uint8)
    if held.size:
        turn = passes.form(turn_lines, found)
        turn(held, planes=found[..., : held.shape[2]])  # with lines and bytes in each other's place
    return found


def joined_planes(
    sections: Sequence[tuple[Array, tuple[int, ...]]], shape: tuple[int, ...]
) -> Array:
    """The planes of an array, from the planes and shapes of sections of its last axis.

    The planes of all sections have the same levels.
    """
    xp: Any = libraries.library(sections[0][0])
    levels, lines = len(sections[0][0]), lines_of(shape)
    ends, inner = [own[-1] for _, own in sections], math.prod(lines.inner[:-1])
    if not any(end % 8 for end in (ends[:-1] if inner == 1 else ends)):
        # Every section has bytes of its own.
        parts = [
            planes.reshape(levels, inner, planes.shape[1] // max(1, inner), lines.count)
            for planes, _ in sections
        ]
        joined = xp.concatenate(parts, axis=2)
        return joined.reshape(levels, lines.width, lines.count)
    if inner == 1:
        # The bytes of a section are moved by some bits.
        result = xp.zeros((levels, lines.width, lines.count), np.uint8)
        at = 0
        for (planes, _), end in zip(sections, ends, strict=True):
            first, bits = divmod(at, 8)
            result[:, first : first + planes.shape[1]] |= planes << np.uint8(bits)
            if bits:
                beyond = result[:, first + 1 : first + 1 + planes.shape[1]]
                beyond |= planes[:, : beyond.shape[1]] >> np.uint8(8 - bits)
            at += end
        return result
    result = xp.empty((levels, lines.width, lines.count), np.uint8)
    pack = passes.form(pack_signs, result, lines.count * lines.length)

    def join(cut: slice, _: slice) -> None:
        count = cut.stop - cut.start
        for level in range(levels):
            signs = [
                unpacked(planes[level : level + 1, :, cut], np.uint8(1), (count, inner, own[-1]))
                for planes, own in sections
            ]
            of_lines = xp.concatenate(signs, axis=-1).reshape(1, count, lines.length)
            pack(of_lines, planes=result[level : level + 1, :, cut])

    step = max(1, passes.LINES_AT_ONCE // max(1, lines.length))
    passes.for_each_lines(join, lines, 1, result, step)
    return result
