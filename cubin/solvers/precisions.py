"""Any precision: levels added to a code, whose lower levels stay a code of their own.

The first levels are those that a solver finds. Each further level takes the signs of what the
levels before it leave, and every precision has its own scales of least squares [1]_.

.. [1] G. Park et al., "AnyBCQ: Hardware Efficient Flexible Binary-Coded Quantization for
   Multi-Precision LLMs", arXiv:2510.10467, 2025.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np

from cubin.codes.decoding import codes_of
from cubin.codes.encoding import Encoding
from cubin.core import conversions, floats, libraries, passes
from cubin.core.bits import Bits
from cubin.core.libraries import Array
from cubin.core.passes import Part
from cubin.core.rows import Rows
from cubin.solvers import encode as encode_first
from cubin.solvers import shifted
from cubin.solvers.codebook import gained, solved
from cubin.solvers.search import LEAST_GAIN, limit
from cubin.solvers.solver import Solver
from cubin.solvers.sorted_rows import power_of_two, relative_weights
from cubin.solvers.tables import Tables


def encode(
    x: Array,
    precisions: Sequence[int],
    rows: Rows,
    solver: Solver,
    importance: Array | None = None,
    shift: bool = False,
) -> tuple[Array, Array]:
    """The scales of all precisions of `x`, in its dtype, and its planes.

    Parameters
    ----------
    x : array
    precisions : sequence of int
        Numbers of levels, ascending. The last one is that of the planes.
    rows : Rows
    solver : Solver
    importance : array of x's shape, optional
    shift : bool
        Whether there is one, for each precision.

    Returns
    -------
    scales : array, shape (scales, rows)
        Those of one precision after the other, each followed by its shift, if there is one.
    planes : array of uint8, shape (levels, width, lines)
    """
    first, levels = precisions[0], precisions[-1]
    bits = Bits(np.uint8(first), np.uint8(first), first)
    xp, solve = libraries.library(x), shifted.encode if shift else encode_first
    found, planes = solve(x, bits, rows.as_stored(x), solver, importance)
    encoding = Encoding(x, levels, rows, sum(precisions) + shift * len(precisions))
    weights = () if importance is None else (importance,)

    def extend(part: Part, x: Array, code: Array, weight: Array | None = None) -> None:
        mirrored = solver.name != "greedy"
        residuals = Residuals(x, code, first, weight, mirrored=mirrored, shifted=shift)
        tables = [residuals.table()]
        for wanted in precisions[1:]:
            extended(residuals, wanted, limit(solver))
            tables.append(residuals.table())
        every = xp.concatenate(tables)[:, :, None]
        narrow = conversions.narrowed(every, floats.work_dtype(x.dtype))
        encoding.store(part, residuals.code, np.uint8(levels), list(narrow))

    if x.size:
        codes = codes_of(planes, x.shape)
        states = 1 << (levels - first) if limit(solver) else 2
        passes.for_each_searched(
            extend, rows, states, x, codes, *weights, name=f"{solver.name}, precisions"
        )
    scales = conversions.rounded(encoding.scales, x.dtype)
    if solver.name != "greedy":  # the others end on scales of least squares
        scales[: len(found)] = found
    return scales, encoding.planes


def extended(residuals: Residuals, levels: int, iterations: int) -> None:
    """Add levels up to `levels`, and renew their codes and all scales in turn.

    A row stops at the first iteration that does not lower its error.
    """
    xp, fixed = residuals.xp, residuals.levels
    while residuals.levels < levels:
        residuals.add_level()
    rows, active = xp.arange(len(residuals.code)), residuals
    for _ in range(iterations):
        if not len(rows):
            break
        renewed = active.renewed(fixed)
        better = renewed.errors < active.errors * (1 - LEAST_GAIN)
        if not bool(better.all()):
            rows, renewed = rows[better], renewed.of(better)
        residuals.put(rows, renewed)
        active = renewed


class Residuals:
    """Codes and least-squares scales of some rows, to which levels are added.

    It keeps the sums of levels that stay, and adds up in the same order on any device. A `Block` of
    `shifted` has bit maps, keeps nothing, and sums signs as bytes: faster where all change.

    Parameters
    ----------
    x : array, shape (rows, n)
        With at least one element in a row.
    code : array of uint16, shape (rows, n)
        Packed: bit i is the sign of level i.
    levels : int
    importance : array of shape (rows, n), optional
    mirrored : bool
        Whether the codes of -x are those of x, negated: a residual of 0 then has the sign -1 where
        x > 0, else +1. If not, it has -1.
    shifted : bool
        Whether there is a constant beside the levels.

    Attributes
    ----------
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
        *,
        mirrored: bool,
        shifted: bool,
    ) -> None:
        xp = self.xp = libraries.library(x)
        self.code, self.levels = xp.ascontiguousarray(code), levels
        self._x = conversions.widened(xp.ascontiguousarray(x))
        self._unit, self._valid = power_of_two(xp, abs(self._x))
        self._x /= self._unit
        self._x[~self._valid] = 0
        self._weight = None
        if importance is not None:
            self._weight = relative_weights(xp, importance, np.uint8(levels))
        self._mirrored, self._shifted = mirrored, shifted
        self._square, self._middle = xp.zeros(len(x)), xp.zeros(len(x))
        if shifted:
            # Squares are summed of what lies about the mean, which may be far from 0.
            for rows, cut in self._tiles():
                self._middle[rows] += _row_sums(self._x[rows, cut].copy())
            self._middle /= x.shape[1]
            self._x -= self._middle[:, None]
        for rows, cut in self._tiles():
            here = self._x[rows, cut]
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
            table = self.xp.concatenate([table, (self.shift + self._middle)[None]])
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
        other._take_nearest(fixed)
        other._fit(fixed)
        return other

    def of(self, rows: Array) -> Residuals:
        """Some of the rows, chosen by a mask."""
        part = copy.copy(self)
        part._x, part._unit, part._valid = self._x[rows], self._unit[rows], self._valid[rows]
        part._weight = None if self._weight is None else self._weight[rows]
        part._square, part._middle = self._square[rows], self._middle[rows]
        part.code, part.errors, part.shift = self.code[rows], self.errors[rows], self.shift[rows]
        part.scales = self.scales[:, rows]
        part._gram, part._target = self._gram[..., rows], self._target[:, rows]
        return part

    def put(self, rows: Array, part: Residuals) -> None:
        """Take over the codes and scales of some rows, given by their numbers."""
        self.code[rows], self.errors[rows], self.shift[rows] = part.code, part.errors, part.shift
        self.scales[:, rows] = part.scales
        self._gram[..., rows], self._target[:, rows] = part._gram, part._target

    def _take_nearest(self, first: int) -> None:
        """Give the levels from `first` on the signs whose sum is nearest to the residual."""
        added = self.levels - first
        tables = Tables(self.scales[first:], self.xp.zeros(len(self.code)), [added])
        kept, every = np.uint16((1 << first) - 1), np.uint16((1 << added) - 1)
        code = self.xp.empty_like(self.code)
        for rows, cut in self._tiles():
            old, x = self.code[rows, cut], self._x[rows, cut]
            wanted = x - self.shift[rows, None]
            for level in range(first):
                wanted -= self.scales[level, rows, None] * _signs(old, level)
            numbers = self.xp.arange(rows.start, rows.stop)[:, None]
            if self._mirrored:
                flipped = x <= 0
                _, near = tables.nearest(wanted * (1 - 2.0 * flipped), added, numbers)
                near ^= flipped * every
            else:
                _, near = tables.nearest(wanted, added, numbers)
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
            code, x = self.code[rows, cut], self._x[rows, cut]
            columns = [_signs(code, level) for level in range(self.levels)]
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
        self.scales = xp.stack(found[self._shifted :])

    def _weighted(self, values: Array, rows: slice, cut: slice) -> Array:
        return values if self._weight is None else values * self._weight[rows, cut]

    def _tiles(self) -> Iterator[tuple[slice, slice]]:
        return passes.tiles(self.code)


def _signs(code: Array, level: int) -> Array:
    return (code >> np.uint16(level) & 1) * 2.0 - 1.0


def _row_sums(values: Array) -> Array:
    """The sums of rows, (rows, n), which are overwritten: by halves, in the same order anywhere."""
    length = values.shape[1]
    while length > 1:
        half = length // 2
        values[:, :half] += values[:, length - half : length]
        length -= half
    return values[:, 0]
