"""The solvers with a shift: a constant c of each row beside its levels, ``x ~ c + sum_i a_i b_i``.

For a given shift the problem on x - c is that of the other solvers. For given codes the shift and
the scales are solved for together, as the scale of one more level whose signs are all +1. Elements
of 0 bits are approximated by the shift, and count in it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cubin.codes.decoding import codes_of
from cubin.codes.encoding import Encoding
from cubin.core import conversions, libraries, passes
from cubin.core.bits import Bits
from cubin.core.libraries import Array
from cubin.core.passes import Part
from cubin.core.rows import Rows, rows_of
from cubin.solvers import encode as encode_unshifted
from cubin.solvers.residuals import Residuals, least
from cubin.solvers.search import LEAST_GAIN, limit
from cubin.solvers.solver import SOLVERS, Solver, solver_of
from cubin.solvers.sorted_rows import power_of_two
from cubin.solvers.tables import in_order

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
    mean = x.sum(axis=1, keepdims=True) / x.shape[1]
    stored = conversions.widened(conversions.narrowed(mean * unit, work))
    rest = conversions.narrowed(x * unit - stored, work)
    scales, planes = encode_unshifted(rest, bits, rows_of(x.shape, 0), SOLVERS["greedy"])
    scales = conversions.widened(scales) / unit[:, 0]
    return scales, codes_of(planes, x.shape), (stored / unit)[:, 0]


def _fitted(
    x: Array, bits: Bits, importance: Array | None, solver: Solver
) -> tuple[Array, Array, Array]:
    """Scales, (levels, rows), codes and shifts, (rows,), of a solver that refits."""
    xp = libraries.library(x)
    none = xp.zeros(x.shape, np.uint16)
    alone = Residuals(x, none, 0, importance, bits, mirrored=False, shifted=True)
    fit = _search(alone, bits, solver)
    table = fit.table()
    scales, codes = in_order(table[:-1], fit.code.T, bits.mapped)
    return scales, xp.ascontiguousarray(codes.T), table[-1]


def _search(alone: Residuals, bits: Bits, solver: Solver) -> Residuals:
    """The best codes that a solver finds; `alone` has no levels, and the best shift for that."""
    xp, levels = alone.xp, bits.levels
    if not levels:
        return alone

    def solve(shift: Array, solver: Solver) -> Residuals:
        """The codes that a solver finds where a shift, (rows,), is kept; then all is fitted."""
        weight = None if solver.name == "greedy" else alone.weight
        rows = rows_of(alone.x.shape, 0)
        _, planes = encode_unshifted(alone.x - shift[:, None], bits, rows, solver, weight)
        return alone.fitted(codes_of(planes, alone.x.shape), levels)

    def successive() -> Residuals:
        """Levels that are added one by one, each with the signs of the residual, and refitted."""
        fit = alone.of(slice(None))
        while fit.levels < levels:
            fit.add_level()
        return fit

    def best_of(starts: list[Residuals]) -> Residuals:
        """The best of some codes after the solver's iterations."""
        for start in starts:
            start.improve(0, limit(solver))
        return least(starts)

    none = -alone.middle
    without = solve(none, solver)
    if solver.refit:
        return least([without, successive()])
    greedy = solve(alone.shift, SOLVERS["greedy"])
    if solver.name == "alternating":
        return best_of([without, greedy])
    starts = [without, greedy, successive()]
    # No other solver ends up better.
    others = SOLVERS["refined"], SOLVERS["alternating"], solver_of("alternating", None)
    starts += [solve(none, other) for other in others]
    in_turn = xp.sort(alone.x, axis=1)
    shifts = [alone.shift, (in_turn[:, 0] + in_turn[:, -1]) / 2]
    shifts += [in_turn[:, int(share * (in_turn.shape[1] - 1))] for share in QUANTILES]
    starts += [solve(shift, solver) for shift in shifts]
    best = best_of(starts)
    for _ in range(ROUNDS):
        found = best_of([solve(best.shift, solver)])
        better = found.errors < best.errors * (1 - LEAST_GAIN)
        if not bool(better.any()):
            break
        best.put(better, found.of(better))
    return best
