"""What a solver hands out: the scales of some rows, and the codes of their elements."""

from __future__ import annotations

from typing import Any

import numpy as np

from cubin.codes.levels import decode
from cubin.core import conversions, passes
from cubin.core.libraries import Array
from cubin.solvers.codebook import Cells, fitted
from cubin.solvers.sorted_rows import Magnitudes


class Fit:
    """The best scales for the codes of some rows, and where those codes change.

    Parameters
    ----------
    magnitudes : Magnitudes
    cells : dict of int to Cells
        By the number of bits of the elements, for all the rows in their order.
    levels : int

    Attributes
    ----------
    scales : list of array in the work dtype, shape (rows, 1)
        For each level; not negative, NaN in rows that are not finite. They descend unless there
        is a map, under which levels are nested.
    """

    def __init__(self, magnitudes: Magnitudes, cells: dict[int, Cells], levels: int) -> None:
        xp = self._xp = magnitudes.xp
        scales, _ = fitted(magnitudes, xp.arange(magnitudes.count), cells, levels)
        negative = scales < 0
        scales = abs(scales)
        order = xp.arange(levels)[:, None] + xp.zeros_like(negative, np.int64)
        if not magnitudes.mapped:
            order = xp.argsort(-scales, axis=0, kind="stable")
            scales = xp.take_along_axis(scales, order, 0)
        self._levels = levels
        self._mapped = magnitudes.mapped
        self._unit = magnitudes.unit
        in_units_of_x = scales[:, :, None] * self._unit
        in_units_of_x[:, ~magnitudes.valid] = np.nan
        self.scales = list(conversions.narrowed(in_units_of_x, magnitudes.work))
        self._tabulate(cells, negative, order)

    def _tabulate(self, cells: dict[int, Cells], negative: Array, order: Array) -> None:
        """Lay out thresholds and codes by row and, under a map, number of bits, which may be 0."""
        xp, count = self._xp, len(self._unit)
        tables = self._levels + 1 if self._mapped else 1
        self._cells = 1 << max(self._levels - 1, 0)
        # Nothing lies above the thresholds that a table does not use.
        edges = xp.full((count, tables, self._cells - 1), np.inf, self._unit.dtype)
        # The codes of positive elements, then those of the others, their complements.
        codes = xp.zeros((count, tables, 2, self._cells), np.uint16)
        for depth, own in cells.items():
            every = np.uint16((1 << depth) - 1)
            code = xp.zeros_like(own.codes)
            for level in range(depth):
                source = order[level].astype(np.uint16)
                flip = xp.take_along_axis(negative, order[level : level + 1], 0)
                code |= ((own.codes >> source & 1) ^ flip).astype(np.uint16) << np.uint16(level)
            table = depth if self._mapped else 0
            edges[:, table, : len(own.thresholds)] = own.thresholds.T
            codes[:, table, 0, : len(code)] = code.T
            codes[:, table, 1, : len(code)] = (code ^ every).T
        self._edges, self._codes = edges.ravel(), codes.ravel()

    def codes(self, x: Array, bits: Any) -> Array:
        """The packed codes of elements: bit i is set where level i has the sign +1.

        `x`, (rows, n), and `bits` may be some columns of what was fitted.
        """
        codes = self._xp.empty(x.shape, np.uint16)
        for rows in passes.row_slices(x):
            codes[rows] = self._xp.take(self._codes, self._entries(x, bits, rows))
        return codes

    def approximate(self, x: Array, bits: Any, y: Array) -> None:
        """Write what the codes and scales of elements stand for, as `decode` gives it."""
        xp, count = self._xp, len(self._unit)
        codes = self._codes.reshape(count, -1)
        depths: Any = np.uint8(self._levels)
        if self._mapped:
            depths = xp.repeat(xp.arange(self._levels + 1, dtype=np.uint8), 2 * self._cells)
            depths = xp.broadcast_to(depths, codes.shape)
        values = xp.empty(codes.shape, y.dtype)
        decode(codes, depths, *self.scales, y=values)
        for rows in passes.row_slices(x):
            y[rows] = xp.take(values.ravel(), self._entries(x, bits, rows))

    def _entries(self, x: Array, bits: Any, rows: slice) -> Array:
        """Where the codes of elements of some rows stand among those of all rows."""
        xp = self._xp
        own = conversions.computable(x[rows])
        magnitude = abs(own) / self._unit[rows]
        table = xp.arange(len(x))[rows, None]
        if self._mapped:
            table = table * (self._levels + 1) + bits[rows]
        position = self._bisected(magnitude, table)
        position += (own <= 0) * position.dtype.type(self._cells)
        return position + table * (2 * self._cells)

    def _bisected(self, magnitude: Array, table: Array) -> Array:
        xp = self._xp
        first = table * (self._cells - 1) - 1
        position = xp.zeros(magnitude.shape, np.int64)
        step = self._cells >> 1
        while step:
            edge = xp.take(self._edges, first + (position + step))
            position += (magnitude > edge) * step
            step >>= 1
        return position
