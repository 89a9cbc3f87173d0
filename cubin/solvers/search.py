"""The solvers that refit scales: from the magnitudes of rows to their codebooks.

Many rows are solved at a time, by array operations on their sorted magnitudes. `refined` is that of
[1]_, `alternating` that of [2]_; `optimal` alternates from several starts.

.. [1] Y. Guo et al., "Network Sketching: Exploiting Binary Structure in Deep CNNs", CVPR 2017,
   arXiv:1706.02021.
.. [2] C. Xu et al., "Alternating Multi-bit Quantization for Recurrent Neural Networks", ICLR 2018,
   arXiv:1802.00150.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cubin.core.libraries import Array
from cubin.solvers.codebook import DEPENDENT, Codebook, fitted, nearest, split, whole
from cubin.solvers.solver import Solver
from cubin.solvers.sorted_rows import SortedRows

LEAST_GAIN = 1e-9
"""By how much of its error a row must get better for a search to go on: more than rounding."""

MAX_ITERATIONS = 1000
"""Upper limit of the iterations where a solver goes on until it converges."""

SCREENED = 5
"""Iterations of every start of the search for the optimum, before the best start is chosen."""

SETTLED = 20
"""Iterations of the best start, before the search adds a level."""

ADDED = 2.0 ** np.arange(-4, 1, 0.5)
"""The sizes that the search tries for an added scale, relative to the largest scale so far."""

# The best scales known for normal samples of variance 1, by the number of levels. Those of 5 and 6
# levels come from some 1e4 random starts, the others from cubin.theory.optimal. The search starts
# from them, too: adding one scale at a time ends on an error that is 1 to 5 % larger.
NORMAL = {
    4: (1.1286, 0.7088, 0.5567, 0.2960),
    5: (0.9904, 0.9205, 0.5989, 0.4734, 0.2455),
    6: (0.9328, 0.8948, 0.8559, 0.4483, 0.3359, 0.2222),
    7: (1.2672, 0.6709, 0.6357, 0.6136, 0.3173, 0.2380, 0.1584),
    8: (1.2978, 0.6888, 0.6493, 0.5887, 0.3239, 0.2941, 0.2438, 0.1626),
}
NORMAL_MEAN = (2 / np.pi) ** 0.5

STARTS = len(ADDED) + 1
"""The most starts for a row that the search alternates at a time."""


class Scales(NamedTuple):
    """Scales that are not negative, and their gain. A row may have several starts of the search.

    Attributes
    ----------
    values : array of float64, shape (levels, starts * rows)
        The first start of all rows comes first, then the second of all rows, and so on.
    gain : array of float64, shape (starts * rows,)
        By how much the scales lower the sum of squares, or a lower bound of that.
    """

    values: Array
    gain: Array


def limit(solver: Solver) -> int:
    """The most iterations of a solver; of `optimal` those at the end of its search."""
    return MAX_ITERATIONS if solver.iterations is None else solver.iterations


def codebooks(magnitudes: SortedRows, levels: int, solver: Solver) -> dict[int, Codebook]:
    """The codebooks that a solver finds, by the number of bits of the elements."""
    if solver.name == "optimal":
        return optimal(magnitudes, levels)
    if solver.refit:
        return refined(magnitudes, levels)
    return alternating(magnitudes, levels, limit(solver))


def refined(magnitudes: SortedRows, levels: int) -> dict[int, Codebook]:
    """The codebooks of successive levels, where all scales are refitted after each level."""
    return _successive(magnitudes, levels, refit=True)


def alternating(magnitudes: SortedRows, levels: int, iterations: int) -> dict[int, Codebook]:
    """The codebooks after the greedy codes and iterations of least squares and nearest codes."""
    greedy = _successive(magnitudes, levels, refit=False)
    if iterations == 0:
        return greedy
    start = _fitted(magnitudes, greedy, levels)
    return _nearest(magnitudes, _alternated(magnitudes, start, iterations - 1).values)


def optimal(magnitudes: SortedRows, levels: int) -> dict[int, Codebook]:
    """The codebooks of the best scales that are found. For one or two levels they are optimal."""
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
        candidates = [_best(magnitudes, _alternated(magnitudes, unknown, SCREENED))]
        # The results of the other solvers are starts, so that none of them ends up better.
        for refit in (False, True):
            successive = _successive(magnitudes, count, refit=refit)
            candidates.append(_fitted(magnitudes, successive, count))
        fields = zip(*candidates, strict=True)
        together = Scales(*(xp.concatenate(field, axis=-1) for field in fields))
        iterations = MAX_ITERATIONS if count == levels else SETTLED
        best = _best(magnitudes, _alternated(magnitudes, together, iterations)).values
    return _nearest(magnitudes, best)


def _fitted(magnitudes: SortedRows, codebooks: dict[int, Codebook], levels: int) -> Scales:
    """The sizes of the least-squares scales of all rows."""
    rows = magnitudes.xp.arange(magnitudes.count)
    scales, gain = fitted(magnitudes, rows, codebooks, levels)
    return Scales(abs(scales), gain)


def _best(magnitudes: SortedRows, scales: Scales) -> Scales:
    """For each row the start with the largest gain."""
    xp = magnitudes.xp
    gain = scales.gain.reshape(-1, magnitudes.count)
    chosen = gain.argmax(axis=0) * magnitudes.count + xp.arange(magnitudes.count)
    return Scales(scales.values[:, chosen], scales.gain[chosen])


def _nearest(magnitudes: SortedRows, scales: Array) -> dict[int, Codebook]:
    """The codebooks that give each magnitude the nearest sum of its levels."""
    dtype = magnitudes.unit.dtype
    depths = {depth: min(depth, len(scales)) for depth in magnitudes.depths}
    by_depth = {depth: nearest(scales, depth, dtype) for depth in set(depths.values())}
    return {depth: by_depth[reached] for depth, reached in depths.items()}


def _alternated(magnitudes: SortedRows, start: Scales, iterations: int) -> Scales:
    """Scales after iterations of nearest codes and least squares.

    A row stops at the first iteration that does not raise its gain, and keeps its scales.
    """
    xp = magnitudes.xp
    values, gain = start.values.copy(), start.gain.copy()
    active = xp.arange(len(gain))
    for _ in range(iterations):
        if not len(active):
            break
        codebooks = _nearest(magnitudes, values[:, active])
        renewed, raised = fitted(magnitudes, active % magnitudes.count, codebooks, len(values))
        better = raised > gain[active]
        active = active[better]
        values[:, active] = abs(renewed[:, better])
        gain[active] = raised[better]
    return Scales(values, gain)


def _successive(magnitudes: SortedRows, levels: int, *, refit: bool) -> dict[int, Codebook]:
    """The codebooks of levels that are added one by one, each with the signs of the residual.

    With `refit`, all scales so far are refitted by least squares before the next level. Without,
    a scale is the mean of the residual's magnitude, as in the greedy algorithm.
    """
    xp, count = magnitudes.xp, magnitudes.count
    rows = xp.arange(count)
    scales = xp.zeros((levels, count))
    current = whole(count, magnitudes.unit.dtype, xp)
    codebooks = dict.fromkeys(magnitudes.depths, current)
    for level in range(levels):
        if level:
            current = split(current, scales, level)
        coded = [depth for depth in codebooks if depth > level]
        codebooks.update(dict.fromkeys(coded, current))
        if refit:
            scales[: level + 1], _ = fitted(magnitudes, rows, codebooks, level + 1)
        else:
            scales[level] = _mean_residual(magnitudes, rows, coded, current, scales[:level])
    return codebooks


def _mean_residual(
    magnitudes: SortedRows, rows: Array, depths: list[int], codebook: Codebook, scales: Array
) -> Array:
    """The mean magnitude of the residuals after `scales`, over elements of some numbers of bits."""
    xp = magnitudes.xp
    value, sign = codebook.values(scales), codebook.signs(len(scales))
    total = count = xp.zeros(len(rows))
    for depth in depths:
        mass, first = magnitudes.sums(rows, depth, codebook.thresholds)
        total = total + (sign * (first - mass * value)).sum(axis=0)
        count = count + mass.sum(axis=0)
    return total / xp.where(count > 0, count, 1)


def _best_pair(magnitudes: SortedRows) -> Array:
    """The two scales, (2, rows), of the least error for elements of 1 or 2 bits.

    With the best scales, one level has the sign of the element. The other has the sign of the
    residual, which changes at a single magnitude. So all magnitudes are tried as that threshold,
    for either level.
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
            initial, second, gain = (
                xp.take_along_axis(a, at, 1)[:, 0] for a in (initial, second, gain)
            )
            better = gain > best.gain
            best = Scales(
                xp.where(better, abs(xp.stack([initial, second])), best.values),
                xp.where(better, gain, best.gain),
            )
    return best.values
