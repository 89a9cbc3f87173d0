"""Lookup: the result of a solver for some rows, which gives the code or value of each element."""

from __future__ import annotations

from typing import Any

import numpy as np

from cubin.codes.levels import decode
from cubin.core import conversions, passes
from cubin.core.libraries import Array
from cubin.solvers.codebook import Codebook, fitted
from cubin.solvers.sorted_rows import SortedRows


class Lookup:
    """The least-squares scales of the codes of some rows, and tables to look up elements by.

    An element's code follows from its magnitude: bisection finds its cell in the codebook.

    Parameters
    ----------
    magnitudes : SortedRows
    codebooks : dict of int to Codebook
        By the number of bits of the elements. Each has all the rows, in their order.
    levels : int

    Attributes
    ----------
    scales : list of array in the work dtype, shape (rows, 1)
        For each level. They are not negative, and NaN in rows that are not finite. Without a map
        they descend. With a map they keep their order, since elements of few bits use the first
        levels alone.
    """

    def __init__(self, magnitudes: SortedRows, codebooks: dict[int, Codebook], levels: int) -> None:
        xp = self._xp = magnitudes.xp
        scales, _ = fitted(magnitudes, xp.arange(magnitudes.count), codebooks, levels)
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
        self._tabulate(codebooks, negative, order)

    def _tabulate(self, codebooks: dict[int, Codebook], negative: Array, order: Array) -> None:
        """Lay out the tables: one for each row, or with a map for each row and number of bits.

        Levels are put in the order of the scales, and the signs of negative scales are flipped.
        """
        xp, count = self._xp, len(self._unit)
        tables = self._levels + 1 if self._mapped else 1
        self._cells = 1 << max(self._levels - 1, 0)
        # A table with fewer thresholds than there is room for ends on infinities.
        edges = xp.full((count, tables, self._cells - 1), np.inf, self._unit.dtype)
        # First the codes of positive elements, then the complements, which the others have.
        codes = xp.zeros((count, tables, 2, self._cells), np.uint16)
        for depth, codebook in codebooks.items():
            every = np.uint16((1 << depth) - 1)
            code = xp.zeros_like(codebook.codes)
            for level in range(depth):
                source = order[level].astype(np.uint16)
                flip = xp.take_along_axis(negative, order[level : level + 1], 0)
                code |= ((codebook.codes >> source & 1) ^ flip).astype(np.uint16) << np.uint16(
                    level
                )
            table = depth if self._mapped else 0
            edges[:, table, : len(codebook.thresholds)] = codebook.thresholds.T
            codes[:, table, 0, : len(code)] = code.T
            codes[:, table, 1, : len(code)] = (code ^ every).T
        self._edges, self._codes = edges.ravel(), codes.ravel()

    def codes(self, x: Array, bits: Any) -> Array:
        """The packed codes of elements: bit i is set where level i has the sign +1.

        `x`, (rows, n), and `bits` may be some columns of the rows that were solved.
        """
        codes = self._xp.empty(x.shape, np.uint16)
        for rows in passes.row_slices(x):
            codes[rows] = self._xp.take(self._codes, self._entries(x, bits, rows))
        return codes

    def approximate(self, x: Array, bits: Any, y: Array) -> None:
        """Write the approximation of elements to `y`, to the bit as `decode` gives it."""
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
        """The indices into the flat table of codes for the elements of some rows."""
        xp = self._xp
        elements = conversions.computable(x[rows])
        magnitude = abs(elements) / self._unit[rows]
        table = xp.arange(len(x))[rows, None]
        if self._mapped:
            table = table * (self._levels + 1) + bits[rows]
        position = self._bisected(magnitude, table)
        position += (elements <= 0) * position.dtype.type(self._cells)
        return position + table * (2 * self._cells)

    def _bisected(self, magnitude: Array, table: Array) -> Array:
        """The number of the cell of each magnitude in its table."""
        xp = self._xp
        first = table * (self._cells - 1) - 1
        position = xp.zeros(magnitude.shape, np.int64)
        step = self._cells >> 1
        while step:
            edge = xp.take(self._edges, first + (position + step))
            position += (magnitude > edge) * step
            step >>= 1
        return position
