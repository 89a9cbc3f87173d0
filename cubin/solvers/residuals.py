"""Residuals: codes of some rows with the scales, and the shift, of least squares for them.

Both `shifted` and `precisions` search with it: levels are added one by one, or codes and scales are
renewed in turn. The normal equations of levels that stay are kept. `codebook` fits the codes of
whole cells instead, and `gram` fits in the metric of a layer's inputs: what is summed differs, and
`codebook.solved` solves the equations of all three.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np

from cubin.core import conversions, libraries, passes
from cubin.core.bits import Bits
from cubin.core.libraries import Array
from cubin.solvers.codebook import gained, solved
from cubin.solvers.search import LEAST_GAIN
from cubin.solvers.sorted_rows import power_of_two, relative_weights
from cubin.solvers.tables import Tables


class Residuals:
    """Codes and least-squares scales of some rows, to which levels are added.

    Parameters
    ----------
    x : array, shape (rows, n)
        With at least one element in a row.
    code : array of uint16, shape (rows, n)
        Packed: bit i is the sign of level i.
    levels : int
    importance : array of shape (rows, n), optional
        Elements of 0 bits have weights, too: they are approximated by the shift.
    bits : Bits, optional
        The map, if there is one: elements have the sign 0 at levels beyond their bits.
    mirrored : bool
        Whether the codes of -x are those of x, negated: a residual of 0 then has the sign -1 where
        x > 0, else +1. If not, it has -1.
    shifted : bool
        Whether there is a constant beside the levels.

    Attributes
    ----------
    x : array of float64, shape (rows, n)
        In units of the rows, less their means if there is a shift.
    middle : array of float64, shape (rows,)
        These means; 0 without a shift.
    weight : array of float64, shape (rows, n), or None
    code : array of uint16, shape (rows, n)
    levels : int
    scales : array of float64, shape (levels, rows)
        In units of the rows. They may be negative.
    shift : array of float64, shape (rows,)
    errors : array of float64, shape (rows,)
        The weighted sums of squares that the levels leave, in these units.
    """

    def __init__(
        self,
        x: Array,
        code: Array,
        levels: int,
        importance: Array | None,
        bits: Bits | None = None,
        *,
        mirrored: bool,
        shifted: bool,
    ) -> None:
        xp = self.xp = libraries.library(x)
        self.code, self.levels = xp.ascontiguousarray(code), levels
        self._bits = bits.values if bits is not None and bits.mapped else None
        self.x = conversions.widened(xp.ascontiguousarray(x))
        self._unit, self._valid = power_of_two(xp, abs(self.x))
        self.x /= self._unit
        self.x[~self._valid] = 0
        self.weight = None
        if importance is not None:
            self.weight = relative_weights(xp, importance, np.uint8(levels))
        self._mirrored, self._shifted = mirrored, shifted
        self._square, self.middle = xp.zeros(len(x)), xp.zeros(len(x))
        if shifted:
            # Squares are summed of what lies about the mean, which may be far from 0.
            for rows, cut in self._tiles():
                self.middle[rows] += _row_sums(self.x[rows, cut].copy())
            self.middle /= x.shape[1]
            self.x -= self.middle[:, None]
        for rows, cut in self._tiles():
            here = self.x[rows, cut]
            self._square[rows] += _row_sums(here * self._weighted(here, rows, cut))
        self.scales: Array
        self.shift: Array
        self.errors: Array
        # The system of the least squares: the shift comes first, if there is one.
        self._gram, self._target = xp.zeros((0, 0, len(x))), xp.zeros((0, len(x)))
        self._fit(0)

    def table(self) -> Array:
        """The scales in units of x, and then the shift, if there is one, (scales, rows).

        They are NaN in rows that are not finite.
        """
        table = self.scales
        if self._shifted:
            table = self.xp.concatenate([table, (self.shift + self.middle)[None]])
        table = table * self._unit[:, 0] + 0.0  # never -0.0
        table[:, ~self._valid] = np.nan
        return table

    def add_level(self) -> None:
        """Add a level with the signs of the residual, and refit all scales."""
        xp = self.xp
        # With any positive scale, a level of the residual's sign comes nearest.
        self.scales = xp.concatenate([self.scales, xp.ones((1, len(self.code)))])
        self.levels += 1
        self._take_nearest(self.levels - 1)
        self._fit(self.levels - 1)

    def renewed(self, fixed: int) -> Residuals:
        """The same with the nearest codes, of which the first `fixed` levels stay, and refitted."""
        other = copy.copy(self)
        other._take_nearest(fixed, self._bits)
        other._fit(fixed)
        return other

    def fitted(self, code: Array, levels: int) -> Residuals:
        """The same with other codes, of so many levels."""
        other = copy.copy(self)
        other.code, other.levels = code, levels
        other._fit(0)
        return other

    def improve(self, fixed: int, iterations: int) -> None:
        """Renew codes and scales in turn; the codes of the first `fixed` levels stay.

        A row stops at the first iteration that does not lower its error.
        """
        rows, active = self.xp.arange(len(self.code)), self
        for _ in range(iterations):
            if not len(rows):
                break
            renewed = active.renewed(fixed)
            better = renewed.errors < active.errors * (1 - LEAST_GAIN)
            if not bool(better.all()):
                rows, renewed = rows[better], renewed.of(better)
            self.put(rows, renewed)
            active = renewed

    def of(self, rows: Any) -> Residuals:
        """Some of the rows, chosen by a mask, or by a slice."""
        part = copy.copy(self)
        part.x, part._unit, part._valid = self.x[rows], self._unit[rows], self._valid[rows]
        part.weight = None if self.weight is None else self.weight[rows]
        part._bits = None if self._bits is None else self._bits[rows]
        part._square, part.middle = self._square[rows], self.middle[rows]
        part.code, part.errors, part.shift = self.code[rows], self.errors[rows], self.shift[rows]
        part.scales = self.scales[:, rows]
        part._gram, part._target = self._gram[..., rows], self._target[:, rows]
        return part

    def put(self, rows: Array, part: Residuals) -> None:
        """Take over the codes and scales of some rows, chosen by a mask or by their numbers."""
        self.code[rows], self.errors[rows], self.shift[rows] = part.code, part.errors, part.shift
        self.scales[:, rows] = part.scales
        self._gram[..., rows], self._target[:, rows] = part._gram, part._target

    def _take_nearest(self, first: int, bits: Array | None = None) -> None:
        """Give the levels from `first` on the signs whose sum is nearest to the residual.

        With a map, which is for `first` 0 alone, elements have as many levels as it says.
        """
        added, depths = self.levels - first, [self.levels - first]
        if bits is not None:
            depths = [int(depth) for depth in self.xp.unique(bits)]
        tables = Tables(self.scales[first:], self.xp.zeros(len(self.code)), depths)
        kept, every = np.uint16((1 << first) - 1), np.uint16((1 << added) - 1)
        code = self.xp.empty_like(self.code)
        for rows, cut in self._tiles():
            old, x = self.code[rows, cut], self.x[rows, cut]
            wanted = x - self.shift[rows, None]
            for level in range(first):
                wanted -= self.scales[level, rows, None] * self._signs(old, level, rows, cut)
            numbers = self.xp.arange(rows.start, rows.stop)[:, None]
            of_each = added if bits is None else bits[rows, cut]
            if self._mirrored:
                flipped = x <= 0
                _, near = tables.nearest(wanted * (1 - 2.0 * flipped), of_each, numbers)
                near ^= flipped * every
            else:
                _, near = tables.nearest(wanted, of_each, numbers)
            code[rows, cut] = (old & kept) | (near << np.uint16(first))
        self.code = code

    def _fit(self, first: int) -> None:
        """Refit the shift and all scales, where the codes of the levels from `first` on are new."""
        xp, count = self.xp, len(self.code)
        unknowns = self._shifted + self.levels
        known = min(len(self._target), self._shifted + first)
        gram, target = xp.zeros((unknowns, unknowns, count)), xp.zeros((unknowns, count))
        gram[:known, :known], target[:known] = self._gram[:known, :known], self._target[:known]
        for rows, cut in self._tiles():
            code, x = self.code[rows, cut], self.x[rows, cut]
            columns = [self._signs(code, level, rows, cut) for level in range(self.levels)]
            if self._shifted:
                columns.insert(0, xp.ones(x.shape))
            for i in range(known, unknowns):
                weighted = self._weighted(columns[i], rows, cut)
                target[i, rows] += _row_sums(weighted * x)
                for j in range(i + 1):
                    gram[i, j, rows] += _row_sums(weighted * columns[j])
        triangle = [list(gram[i, : i + 1]) for i in range(unknowns)]
        found = solved(triangle, list(target), xp)
        gain = gained(triangle, list(target), found, xp.zeros(count))
        self._gram, self._target, self.errors = gram, target, self._square - gain
        self.shift = found[0] if self._shifted else xp.zeros(count)
        scales = found[self._shifted :]
        self.scales = xp.stack(scales) if scales else xp.zeros((0, count))

    def _signs(self, code: Array, level: int, rows: slice, cut: slice) -> Array:
        sign = (code >> np.uint16(level) & 1) * 2.0 - 1.0
        return sign if self._bits is None else sign * (self._bits[rows, cut] > level)

    def _weighted(self, values: Array, rows: slice, cut: slice) -> Array:
        return values if self.weight is None else values * self.weight[rows, cut]

    def _tiles(self) -> Iterator[tuple[slice, slice]]:
        return passes.tiles(self.code)


def _row_sums(values: Array) -> Array:
    """The sums of rows, (rows, n), which are overwritten: by halves, in the same order anywhere."""
    length = values.shape[1]
    while length > 1:
        half = length // 2
        values[:, :half] += values[:, length - half : length]
        length -= half
    return values[:, 0]


def least(candidates: list[Residuals]) -> Residuals:
    """For each row the candidate of least error; of equal ones the first, which is overwritten."""
    first, *others = candidates
    for other in others:
        better = other.errors < first.errors
        first.put(better, other.of(better))
    return first
