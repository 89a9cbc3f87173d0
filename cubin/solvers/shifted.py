"""The solvers with a shift: a constant c of each row beside its levels, ``x ~ c + sum_i a_i b_i``.

For a given shift the problem on x - c is that of the other solvers. For given codes the shift and
the scales are solved for together, as the scale of one more level whose signs are all +1. Elements
of 0 bits are approximated by the shift, and count in it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from cubin.codes.decoding import codes_of
from cubin.codes.encoding import Encoding
from cubin.core import conversions, libraries, passes
from cubin.core.bits import Bits
from cubin.core.libraries import Array
from cubin.core.passes import Part
from cubin.core.rows import Rows, rows_of
from cubin.solvers import encode as encode_unshifted
from cubin.solvers.codebook import solved
from cubin.solvers.search import LEAST_GAIN, limit
from cubin.solvers.solver import SOLVERS, Solver, solver_of
from cubin.solvers.sorted_rows import power_of_two, relative_weights
from cubin.solvers.tables import Tables, in_order

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Of a row: shifts that the search for the optimum starts from, beside 0, mean and midrange."""

ROUNDS = 8
"""The most times that this search starts again from the best shift so far."""

LISTED = 8
"""The most levels whose sums are listed for a row."""


def encode(
    x: Array, bits: Bits, rows: Rows, solver: Solver, importance: Array | None = None
) -> tuple[Array, Array]:
    """The scales of `x` and then its shift, (levels + 1, rows), and its planes.

    The greedy solver takes the mean of a row, and solves for what is left. The others solve for the
    shift together with the scales: no row has a larger error than without a shift.
    """
    encoding = Encoding(x, bits.levels, rows, bits.levels + 1)
    work = encoding.scales.dtype

    def solve(part: Part, x: Array, bits: Any, weight: Array | None = None) -> None:
        xp = libraries.library(x)
        # In C order, whatever that of x is: it is the order of the sums.
        wide = xp.ascontiguousarray(conversions.widened(x))
        bits = xp.ascontiguousarray(bits) if np.ndim(bits) else bits
        # In units of a power of two no square overflows, and nothing is rounded.
        unit, valid = power_of_two(xp, abs(wide))
        wide = xp.where(valid[:, None], wide / unit, 0)
        unit = xp.where(valid, unit[:, 0], np.nan)
        some = Bits(bits, bits, len(encoding.planes))
        if solver.name == "greedy":
            scales, codes, constant = _greedy(wide, some, unit, work)
        else:
            scales, codes, constant = _fitted(wide, some, weight, solver)
        every = xp.concatenate([scales, constant[None]]) * unit
        encoding.store(part, codes, bits, list(conversions.narrowed(every[:, :, None], work)))

    if x.size:
        inputs = (x, bits.values) if importance is None else (x, bits.values, importance)
        states = 1 << min(bits.levels, LISTED)
        passes.for_each_searched(solve, rows, states, *inputs, name=solver.name)
    return conversions.rounded(encoding.scales, x.dtype), encoding.planes


def _greedy(x: Array, bits: Bits, unit: Array, work: Any) -> tuple[Array, Array, Array]:
    """Scales, (levels, rows), codes and shifts, (rows,): the mean, and greedy levels of the rest.

    The mean and the rest are rounded to the work dtype.
    """
    xp = libraries.library(x)
    unit = xp.where(unit > 0, unit, 1)[:, None]
    mean = _mean(x)
    stored = conversions.widened(conversions.narrowed(mean * unit, work))
    rest = conversions.narrowed(x * unit - stored, work)
    scales, planes = encode_unshifted(rest, bits, rows_of(x.shape, 0), SOLVERS["greedy"])
    scales = conversions.widened(scales) / unit[:, 0]
    return scales, codes_of(planes, x.shape), (stored / unit)[:, 0]


def _mean(x: Array) -> Array:
    return x.sum(axis=1, keepdims=True) / x.shape[1]


# ---------------------------------------------------------------- least squares


class Fit(NamedTuple):
    """Codes of some rows, and the scales and shifts of least squares for them.

    Attributes
    ----------
    codes : array of uint16, shape (rows, n)
        Bit i is the sign of level i.
    scales : array of float64, shape (levels, rows)
        They may be negative.
    shift, errors : array of float64, shape (rows,)
    """

    codes: Array
    scales: Array
    shift: Array
    errors: Array

    def take(self, rows: Array, other: Fit, chosen: Array) -> None:
        """Take over the `chosen` rows of another fit as these rows."""
        self.codes[rows], self.scales[:, rows] = other.codes[chosen], other.scales[:, chosen]
        self.shift[rows], self.errors[rows] = other.shift[chosen], other.errors[chosen]


class Block:
    """Some rows, and what their codes are fitted by.

    Parameters
    ----------
    x : array of float64, shape (rows, n)
    weight : array of float64, shape (rows, n), or None
        Of the squared errors.
    bits : Bits
    """

    def __init__(self, x: Array, weight: Array | None, bits: Bits) -> None:
        self.x, self.bits, self._weight = x, bits, weight
        xp = self._xp = libraries.library(x)
        every = xp.unique(bits.values) if bits.mapped else [bits.levels]
        self._every = [int(depth) for depth in every]

    def some(self, rows: Array) -> Block:
        """The block of some of the rows."""
        block = copy.copy(self)
        block.x = self.x[rows]
        block._weight = None if self._weight is None else self._weight[rows]
        if self.bits.mapped:
            values = self.bits.values[rows]
            block.bits = Bits(values, values, self.bits.levels)
        return block

    def codes(self, shift: Array, solver: Solver) -> Array:
        """The codes that a solver finds for x less the shift, (rows,), where that is kept."""
        rows = rows_of(self.x.shape, 0)
        weight = None if solver.name == "greedy" else self._weight
        _, planes = encode_unshifted(self.x - shift[:, None], self.bits, rows, solver, weight)
        return codes_of(planes, self.x.shape)

    def fit(self, codes: Array, levels: int) -> Fit:
        """The scales of the first levels and the shifts of least error."""
        xp = self._xp
        signs = [xp.ones(codes.shape, np.int8), *self._signs(codes, levels)]
        squares = [[self._total(sign * other) for other in signs[: at + 1]]
                   for at, sign in enumerate(signs)]  # fmt: skip
        shift, *scales = solved(squares, [self._total(sign * self.x) for sign in signs], xp)
        fitted = xp.stack(scales) if levels else xp.zeros((0, len(codes)))
        errors = self._total(self._residual(signs[1:], fitted, shift) ** 2)
        return Fit(codes, fitted, shift, errors)

    def residual(self, fit: Fit) -> Array:
        """What a fit leaves."""
        return self._residual(self._signs(fit.codes, len(fit.scales)), fit.scales, fit.shift)

    def nearest(self, scales: Array, shift: Array) -> Array:
        """The code of the nearest sum of shift and levels to each element."""
        lines = self._xp.arange(len(self.x))[:, None]
        tables = Tables(scales, shift, self._every)
        return tables.nearest(self.x, self.bits.values, lines)[1]

    def _signs(self, codes: Array, levels: int) -> list[Array]:
        """The signs at each level, int8; 0 where an element has no code."""
        signs = []
        for level in range(levels):
            sign = (codes >> np.uint16(level) & 1).astype(np.int8) * 2 - 1
            signs.append(sign * (self.bits.values > level) if self.bits.mapped else sign)
        return signs

    def _residual(self, signs: list[Array], scales: Array, shift: Array) -> Array:
        rest = self.x - shift[:, None]
        for sign, scale in zip(signs, scales, strict=True):
            rest -= scale[:, None] * sign
        return rest

    def _total(self, values: Array) -> Array:
        """The weighted sums over the elements of each row."""
        weighted = values if self._weight is None else self._weight * values
        return weighted.sum(axis=1, dtype=np.float64)


def _fitted(
    x: Array, bits: Bits, importance: Array | None, solver: Solver
) -> tuple[Array, Array, Array]:
    """Scales, (levels, rows), codes and shifts, (rows,), of a solver that refits."""
    xp = libraries.library(x)
    weight = None
    if importance is not None:
        # Elements of 0 bits have weights, too: they are approximated by the shift.
        every = np.uint8(bits.levels)
        weight = xp.ascontiguousarray(relative_weights(xp, importance, every))
    mean = _mean(x)
    fit = _search(Block(x - mean, weight, bits), -mean[:, 0], solver)
    scales, codes = in_order(fit.scales, fit.codes.T, bits.mapped)
    return scales, xp.ascontiguousarray(codes.T), fit.shift + mean[:, 0]


def _search(block: Block, zero: Array, solver: Solver) -> Fit:
    """The best fit that a solver finds; where `zero` is kept, there is no shift."""
    xp, levels = libraries.library(block.x), block.bits.levels
    alone = block.fit(xp.zeros(block.x.shape, np.uint16), 0)
    if not levels:
        return alone
    without = block.fit(block.codes(zero, solver), levels)
    if solver.refit:
        return _best([without, _successive(block, alone, levels)])
    greedy = block.fit(block.codes(alone.shift, SOLVERS["greedy"]), levels)
    if solver.name == "alternating":
        return _best(_alternated(block, fit, limit(solver)) for fit in (without, greedy))
    starts = [without, greedy, _successive(block, alone, levels)]
    # No other solver ends up better.
    others = SOLVERS["refined"], SOLVERS["alternating"], solver_of("alternating", None)
    starts += [block.fit(block.codes(zero, other), levels) for other in others]
    in_turn = xp.sort(block.x, axis=1)
    shifts = [alone.shift, (in_turn[:, 0] + in_turn[:, -1]) / 2]
    shifts += [in_turn[:, int(share * (in_turn.shape[1] - 1))] for share in QUANTILES]
    starts += [block.fit(block.codes(shift, solver), levels) for shift in shifts]
    best = _best(_alternated(block, fit, limit(solver)) for fit in starts)
    for _ in range(ROUNDS):
        again = block.fit(block.codes(best.shift, solver), levels)
        found = _alternated(block, again, limit(solver))
        better = found.errors < best.errors * (1 - LEAST_GAIN)
        if not bool(better.any()):
            break
        best.take(better, found, better)
    return best


def _successive(block: Block, alone: Fit, levels: int) -> Fit:
    """Levels that are added one by one, each with the signs of the residual, and refitted."""
    fit = alone
    for level in range(levels):
        bit = (block.residual(fit) > 0).astype(np.uint16) << np.uint16(level)
        fit = block.fit(fit.codes | bit, level + 1)
    return fit


def _alternated(block: Block, start: Fit, iterations: int) -> Fit:
    """A fit after iterations of nearest codes and least squares.

    A row stops at the first iteration that does not make it better, and keeps its codes.
    """
    xp = libraries.library(block.x)
    best = Fit(*(part.copy() for part in start))
    active = xp.arange(len(block.x))
    for _ in range(iterations):
        if not len(active):
            break
        some = block.some(active)
        nearest = some.nearest(best.scales[:, active], best.shift[active])
        found = some.fit(nearest, len(best.scales))
        better = found.errors < best.errors[active] * (1 - LEAST_GAIN)
        active = active[better]
        best.take(active, found, better)
    return best


def _best(fits: Iterable[Fit]) -> Fit:
    """For each row the fit of least error; of equal ones the first."""
    first, *others = fits
    for fit in others:
        better = fit.errors < first.errors
        first.take(better, fit, better)
    return first
