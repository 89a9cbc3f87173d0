"""Encoding: scales and planes of an array while a solver fills them in."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np

from cubin.codes import planes
from cubin.codes.levels import level_signs
from cubin.codes.planes import pack_signs, turn_lines
from cubin.core import floats, libraries, passes
from cubin.core.libraries import Array
from cubin.core.lines import box_of, lines_of
from cubin.core.passes import Part
from cubin.core.primitives import Raw
from cubin.core.rows import Rows


class Encoding:
    """Scales and planes of an array, filled in by one primitive or part by part.

    Parameters
    ----------
    x : array
    levels : int
    rows : Rows
        The layout of `x`.
    scales : int, optional
        The scales of a row, where it has several for a level.

    Attributes
    ----------
    scales : array in the work dtype, shape (scales, rows)
    planes : array of uint8, shape (levels, width, lines)
    """

    def __init__(self, x: Array, levels: int, rows: Rows, scales: int | None = None) -> None:
        self.rows = rows
        self._lines = lines = lines_of(x.shape)
        self._xp = xp = libraries.library(x)
        count = levels if scales is None else scales
        self.scales = xp.zeros((count, rows.count), floats.work_dtype(x.dtype))
        self.planes = xp.zeros((levels, lines.width, lines.count), np.uint8)
        self._unpack = passes.form(level_signs, x)
        self._pack = passes.form(pack_signs, x)
        self._turn = passes.form(turn_lines, x)
        self._lock = threading.Lock()

    def fill(self, primitive: Raw, inputs: Any, *static: Any) -> None:
        """Run a primitive on whole rows, which finds all scales and signs."""

        def place(part: Part, signs: Array) -> None:
            if signs.dtype == np.int8:
                self._place(part, slice(None), signs)
            else:
                self._place_bits(part, signs)

        passes.for_each_whole_rows(place, primitive, self.rows, inputs, *static, scales=self.scales)

    def store(self, part: Part, code: Array, bits: Any, scales: list[Array]) -> None:
        """Write the signs and scales of a part.

        Parameters
        ----------
        part : Part
        code : array of uint16, shape (rows, n)
            Packed: bit i is the sign of level i.
        bits : uint8 scalar or array of shape (rows, n)
        scales : list of array, shape (rows, 1)
            All scales of a row: one for each level, if it has no more.
        """
        self._set_scales(part, scales)
        self.pack(part, code, bits)

    def store_bits(self, part: Part, signs: Array, scales: list[Array]) -> None:
        """The same on the host for signs as bits, (levels, rows, bytes), 1 for +1."""
        self._set_scales(part, scales)
        self._place_bits(part, signs)

    def _set_scales(self, part: Part, scales: list[Array]) -> None:
        for number, scale in enumerate(scales):
            self.scales[number, part.rows] = scale[:, 0]

    def pack(self, part: Part, code: Array, bits: Any) -> None:
        """Write the signs of a part alone."""
        for level in range(len(self.planes)):
            sign = passes.scratch("signs", (1, *code.shape), np.int8, code)
            self._unpack(code, bits, np.uint8(level), sign=sign[0])
            self._place(part, slice(level, level + 1), sign)

    def _place_bits(self, part: Part, signs: Array) -> None:
        """Place the signs of a part, which are bits: see `passes.for_each_whole_rows`."""
        box, leading = box_of(part.block, self.rows), len(self.rows.scale_shape)
        rows, size = self.rows.flat_shape(box.sizes)
        axes, columns = tuple(range(len(box.sizes))), signs.shape[1] != rows
        if columns:
            signs, size, axes = signs.swapaxes(1, 2), rows, axes[leading:] + axes[:leading]
        count = box.lines.stop - box.lines.start
        length = math.prod(box.sizes) // count
        first, last = self._bytes(box.run())
        whole = size == length or not (size % 8 or length % 8)
        joins = whole or not (columns or length % size)
        if last and joins and box.order == axes:
            if whole:
                lines = signs.reshape(len(signs), count, -1)
            else:
                forms = passes.search_loops(planes, signs, self.planes.size) or planes
                lines = forms.join_rows(signs, size, count)
            self._turn(lines.swapaxes(1, 2), planes=self.planes[:, first:last, box.lines])
            return
        spread = np.unpackbits(signs, axis=2, count=size, bitorder="little").view(np.int8)
        self._place(part, slice(None), spread.swapaxes(1, 2) if columns else spread)

    def _bytes(self, run: slice | None) -> tuple[int, int]:
        """The first byte of a run of elements of a line, and the one after its last.

        They are 0 where other parts may have elements of the same bytes.
        """
        if run is None or run.start % 8 or (run.stop % 8 and run.stop < self._lines.length):
            return 0, 0
        return run.start // 8, -(-run.stop // 8)

    def _place(self, part: Part, levels: slice, signs: Array) -> None:
        """Pack the signs, (levels, rows, n), of a part."""
        if not signs.size:
            return
        box = box_of(part.block, self.rows)
        lines, run = box.in_lines(signs), box.run()
        first, last = self._bytes(run)
        if last:
            self._pack(lines, planes=self.planes[levels, first:last, box.lines])
            return
        if run is not None:
            first, last = run.start // 8, -(-run.stop // 8)
            at: Any = slice(run.start - 8 * first, run.stop - 8 * first)
        else:
            positions = box.positions()
            first, last = int(positions[0]) // 8, int(positions[-1]) // 8 + 1
            at = self._xp.asarray(positions - 8 * first)
        # Other parts may have elements of the same bytes.
        count = lines.shape[1]
        for level, of_level in zip(range(*levels.indices(len(self.planes))), lines, strict=True):
            spread = self._xp.zeros((1, count, 8 * (last - first)), np.int8)
            spread[0][:, at] = of_level
            packed = self._xp.empty((1, last - first, count), np.uint8)
            self._pack(spread, planes=packed)
            with self._lock:
                self.planes[level, first:last, box.lines] |= packed[0]
