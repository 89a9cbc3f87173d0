"""The solvers: from the magnitudes of rows to the cells whose codes approximate them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cubin.core.libraries import Array
from cubin.solvers.codebook import DEPENDENT, Cells, fitted, nearest, split, whole
from cubin.solvers.solver import Solver
from cubin.solvers.sorted_rows import Magnitudes

MAX_ITERATIONS = 1000
"""Where alternating to convergence stops at the latest."""

# How often every start of the search alternates, and the best of them, before a level is added.
SCREENED = 5
SETTLED = 20

# The sizes of an added scale, relative to the largest there is.
ADDED = 2.0 ** np.arange(-4, 1, 0.5)

# The best scales known for normal samples of variance 1, for each number of levels from 4 on. At 5
# and 6 they come from some 1e4 random starts, elsewhere from cubin.theory.optimal. Adding one scale
# at a time misses them by 1 to 5 % of the error.
NORMAL = {
    4: (1.1286, 0.7088, 0.5567, 0.2960),
    5: (0.9904, 0.9205, 0.5989, 0.4734, 0.2455),
    6: (0.9328, 0.8948, 0.8559, 0.4483, 0.3359, 0.2222),
    7: (1.2672, 0.6709, 0.6357, 0.6136, 0.3173, 0.2380, 0.1584),
    8: (1.2978, 0.6888, 0.6493, 0.5887, 0.3239, 0.2941, 0.2438, 0.1626),
}
NORMAL_MEAN = (2 / np.pi) ** 0.5

STARTS = len(ADDED) + 1
"""The most scales for a row that a solver alternates at a time."""


class Scales(NamedTuple):
    """Scales that are not negative, and what they gain.

    Attributes
    ----------
    values : array of float64, shape (levels, starts * rows)
        Those of all rows for the first start come first.
    gain : array of float64, shape (starts * rows,)
        By how much they lower the sum of squares; a lower bound of it.
    """

    values: Array
    gain: Array


def cells(magnitudes: Magnitudes, levels: int, solver: Solver) -> dict[int, Cells]:
    """The cells that a solver finds."""
    if solver.name == "optimal":
        return optimal(magnitudes, levels)
    if solver.refit:
        return refined(magnitudes, levels)
    return alternating(magnitudes, levels, solver.iterations)


def refined(magnitudes: Magnitudes, levels: int) -> dict[int, Cells]:
    """The cells of successive levels, with the scales refitted after each."""
    return _successive(magnitudes, levels, refit=True)


def alternating(magnitudes: Magnitudes, levels: int, iterations: int | None) -> dict[int, Cells]:
    """The cells after iterations of nearest codes and least squares, from the greedy codes on."""
    cells = _successive(magnitudes, levels, refit=False)
    if iterations == 0:
        return cells
    start = _fitted(magnitudes, cells, levels)
    before = MAX_ITERATIONS if iterations is None else iterations - 1
    return _nearest(magnitudes, _alternated(magnitudes, start, before).values)


def optimal(magnitudes: Magnitudes, levels: int) -> dict[int, Cells]:
    """The cells of the best scales found: of all there are, for one or two levels."""
    xp = magnitudes.xp
    best = _fitted(magnitudes, _successive(magnitudes, 1, refit=False), 1).values
    mean = best[0]
    for count in range(2, levels + 1):
        largest = best.max(axis=0, keepdims=True)
        starts = [xp.concatenate([best, size * largest]) for size in ADDED]
        if count == 2:
            starts.append(_best_pair(magnitudes))
        if count in NORMAL:
            starts.append(xp.asarray(NORMAL[count])[:, None] * (mean / NORMAL_MEAN))
        values = xp.concatenate(starts, axis=1)
        unknown = Scales(values, xp.full(values.shape[1], -np.inf))
        found = [_best(magnitudes, _alternated(magnitudes, unknown, SCREENED))]
        # From where the other solvers start, so that none of them ends up better.
        for refit in (False, True):
            cells = _successive(magnitudes, count, refit=refit)
            found.append(_fitted(magnitudes, cells, count))
        together = Scales(*(xp.concatenate(part, axis=-1) for part in zip(*found, strict=True)))
        iterations = MAX_ITERATIONS if count == levels else SETTLED
        best = _best(magnitudes, _alternated(magnitudes, together, iterations)).values
    return _nearest(magnitudes, best)


def _fitted(magnitudes: Magnitudes, cells: dict[int, Cells], levels: int) -> Scales:
    rows = magnitudes.xp.arange(magnitudes.count)
    scales, gain = fitted(magnitudes, rows, cells, levels)
    return Scales(abs(scales), gain)


def _best(magnitudes: Magnitudes, scales: Scales) -> Scales:
    """For each row the scales that gain most."""
    xp = magnitudes.xp
    gain = scales.gain.reshape(-1, magnitudes.count)
    chosen = gain.argmax(axis=0) * magnitudes.count + xp.arange(magnitudes.count)
    return Scales(scales.values[:, chosen], scales.gain[chosen])


def _nearest(magnitudes: Magnitudes, scales: Array) -> dict[int, Cells]:
    dtype = magnitudes.unit.dtype
    depths = {depth: min(depth, len(scales)) for depth in magnitudes.depths}
    by_depth = {depth: nearest(scales, depth, dtype) for depth in set(depths.values())}
    return {depth: by_depth[reached] for depth, reached in depths.items()}


def _alternated(magnitudes: Magnitudes, start: Scales, iterations: int) -> Scales:
    """Scales after iterations of nearest codes and least squares.

    Where an iteration does not raise the gain, the scales stay as they are for good.
    """
    xp = magnitudes.xp
    values, gain = start.values.copy(), start.gain.copy()
    active = xp.arange(len(gain))
    for _ in range(iterations):
        if not len(active):
            break
        cells = _nearest(magnitudes, values[:, active])
        renewed, raised = fitted(magnitudes, active % magnitudes.count, cells, len(values))
        better = raised > gain[active]
        active = active[better]
        values[:, active] = abs(renewed[:, better])
        gain[active] = raised[better]
    return Scales(values, gain)


def _successive(magnitudes: Magnitudes, levels: int, *, refit: bool) -> dict[int, Cells]:
    """One level after the other, each with the signs of the residual.

    With `refit`, the scales so far become those of least squares before the next level; without,
    a scale is the mean of the residual's magnitude, as in the greedy algorithm.
    """
    xp, count = magnitudes.xp, magnitudes.count
    rows = xp.arange(count)
    scales = xp.zeros((levels, count))
    current = whole(count, magnitudes.unit.dtype, xp)
    cells = dict.fromkeys(magnitudes.depths, current)
    for level in range(levels):
        if level:
            current = split(current, scales, level)
        hot = [depth for depth in cells if depth > level]
        cells.update(dict.fromkeys(hot, current))
        if refit:
            scales[: level + 1], _ = fitted(magnitudes, rows, cells, level + 1)
        else:
            scales[level] = _mean_residual(magnitudes, rows, hot, current, scales[:level])
    return cells


def _mean_residual(
    magnitudes: Magnitudes, rows: Array, depths: list[int], cells: Cells, scales: Array
) -> Array:
    """The mean magnitude of what the scales leave of the elements of these numbers of bits."""
    xp = magnitudes.xp
    value, sign = cells.values(scales), cells.signs(len(scales))
    total = count = xp.zeros(len(rows))
    for depth in depths:
        mass, first = magnitudes.sums(rows, depth, cells.thresholds)
        total = total + (sign * (first - mass * value)).sum(axis=0)
        count = count + mass.sum(axis=0)
    return total / xp.where(count > 0, count, 1)


def _best_pair(magnitudes: Magnitudes) -> Array:
    """The two scales, (2, rows), of the least error for elements of 1 or 2 bits.

    With the best scales one level has the sign of the element, and the other that of the
    residual, which changes at one magnitude: all magnitudes are tried, for either level.
    """
    xp = magnitudes.xp
    depth = 2 if magnitudes.mapped else magnitudes.depths[0]
    mass, first = (total[:, None] for total in magnitudes.totals(depth))
    single_mass, single_first = xp.zeros_like(mass), xp.zeros_like(first)
    if magnitudes.mapped:
        single_mass, single_first = (total[:, None] for total in magnitudes.totals(1))
    # The Gram matrix of the levels is ((whole, across), (across, mass)).
    whole_mass = single_mass + mass
    best = Scales(xp.zeros((2, magnitudes.count)), xp.full(magnitudes.count, -np.inf))
    for mass_below, first_below in magnitudes.below_each(depth):
        across = mass - 2 * mass_below
        determinant = whole_mass * mass - across * across
        free = determinant > DEPENDENT * whole_mass * mass
        determinant = xp.where(free, determinant, 1)
        change = first - 2 * first_below
        for target, other in (
            (single_first + first, change),
            (single_first + change, first + xp.zeros_like(change)),
        ):
            target, other = target + xp.zeros_like(across), other
            second = xp.where(free, (whole_mass * other - across * target) / determinant, 0)
            initial = (target - across * second) / xp.where(whole_mass > 0, whole_mass, 1)
            gain = initial * target + second * other
            at = gain.argmax(axis=1)[:, None]
            found = (xp.take_along_axis(a, at, 1)[:, 0] for a in (initial, second, gain))
            initial, second, gain = found
            better = gain > best.gain
            best = Scales(
                xp.where(better, abs(xp.stack([initial, second])), best.values),
                xp.where(better, gain, best.gain),
            )
    return best.values
