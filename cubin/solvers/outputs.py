"""The solvers for the error of a layer's outputs: from an array and a Gram matrix to its code."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cubin.codes.decoding import codes_of
from cubin.codes.encoding import Encoding
from cubin.core import conversions, libraries, progress
from cubin.core.bits import Bits
from cubin.core.libraries import Array
from cubin.core.passes import Part
from cubin.core.rows import Rows, rows_of
from cubin.solvers import encode as encode_weights
from cubin.solvers import shifted
from cubin.solvers.gram import Lines, Metric
from cubin.solvers.search import MAX_ITERATIONS
from cubin.solvers.solver import Solver, solver_of
from cubin.solvers.tables import in_order

MAX_LEVELS = 8
"""The most levels: the sums of all of an element's levels are listed."""

ELEMENTS = 1 << 22
"""Weights that are worked on at a time, which bounds the memory."""

RESTARTS = 16
"""Starts from scales drawn at random, in the search for the optimum."""

SPREAD = 0.5
"""Their standard deviation, of the logarithm of scales."""

FLIPPED = 0.1
"""The share of the best codes that are flipped for another start."""

LEAST_GAIN = 1e-9
"""By how much of its error a line must get better for the search to go on: more than rounding."""


def encode(
    x: Array, bits: Bits, rows: Rows, solver: Solver, gram: Array, shift: bool = False
) -> tuple[Array, Array, Array | None]:
    """The scales of `x` in its dtype, (levels, rows), its planes, and its shift if it gets one.

    Parameters
    ----------
    x : array of shape (lines, ...)
    bits : Bits
        At most `MAX_LEVELS`.
    rows : Rows
        The lines of `x`, or groups within them.
    solver : Solver
        One of those that refit.
    gram : array of float64, shape (n, n)
        Of the n inputs that are the elements of a line.
    shift : bool
        Whether there is one, of shape (rows,).
    """
    lines = x.reshape(len(x), len(gram))
    depths = bits.values.reshape(lines.shape) if bits.mapped else bits.values
    flat = _rows_of_lines(lines.shape, rows.group_size)
    groups = flat.count // max(1, len(lines))
    encoding = Encoding(lines, bits.levels, flat)
    constant = libraries.library(x).zeros(flat.count, encoding.scales.dtype) if shift else None
    if x.size and (bits.levels or shift):
        metric = Metric(gram)
        step = max(1, ELEMENTS // max(lines.shape[1], groups << bits.levels))
        for start in progress.over(range(0, len(lines), step), "lines", "block"):
            block = slice(start, min(start + step, len(lines)))
            part = depths[block] if bits.mapped else depths
            some = Bits(part, part, bits.levels)
            here = Part(slice(start * groups, block.stop * groups), slice(0, 1), (block, ...))
            found = _of_lines(lines[block], some, rows.group_size, solver, metric, shift)
            scales, codes, of_lines = found
            narrow = conversions.narrowed(scales, encoding.scales.dtype)
            narrow = narrow.reshape(bits.levels, (block.stop - start) * groups, 1)
            if constant is not None:
                constant[here.rows] = conversions.narrowed(of_lines.ravel(), constant.dtype)
            shape = (-1, flat.length)
            of_rows = part.reshape(shape) if bits.mapped else part
            encoding.store(here, codes.reshape(shape), of_rows, list(narrow))
    if constant is not None:
        constant = conversions.rounded(constant, x.dtype)
    return conversions.rounded(encoding.scales, x.dtype), encoding.planes, constant


def _rows_of_lines(shape: tuple[int, ...], group_size: int | None) -> Rows:
    return rows_of(shape, 0 if group_size is None else None, group_size)


class Start(NamedTuple):
    """Where a search begins.

    Attributes
    ----------
    scales : array of float64, shape (groups, levels, lines)
    shift : array of float64, shape (groups, lines), or None
    codes : array of uint16, shape (n, lines)
    """

    scales: Array
    shift: Array | None
    codes: Array


def _of_lines(
    x: Array, bits: Bits, group_size: int | None, solver: Solver, metric: Metric, shift: bool
) -> tuple[Array, Array, Array]:
    """Scales, (levels, lines, groups), packed codes, (lines, n), and shifts, (lines, groups)."""
    xp = libraries.library(x)
    count, n = x.shape
    rows = _rows_of_lines(x.shape, group_size)
    position = xp.argsort(metric.order)
    groups = [xp.sort(group) for group in position.reshape(-1, group_size or n)]
    # Lines are solved in units of their largest weight, so that squares do not overflow.
    weights = conversions.widened(x)
    unit = abs(weights).max(axis=1)
    finite = xp.isfinite(unit)
    unit = xp.where(finite & (unit > 0), unit, 1.0)
    weights = xp.where(finite[:, None], weights / unit[:, None], 0.0)

    def start(on_weights: Solver, importance: Array | None, shift: bool) -> Start:
        constant = None
        if shift:
            found = shifted.encode(weights, bits, rows, on_weights, importance)
            scales, planes, constant = found
            constant = xp.ascontiguousarray(constant.reshape(count, len(groups)).T)
        else:
            scales, planes = encode_weights(weights, bits, rows, on_weights, importance)
        code = codes_of(planes, x.shape)
        scales = scales.reshape(bits.levels, count, len(groups)).transpose(2, 0, 1)
        codes = xp.ascontiguousarray(code.T[metric.order])
        return Start(xp.ascontiguousarray(scales), constant, codes)

    # The importance of an input is its mean square. The best scales with it are a better start than
    # those of the solver itself.
    searching = solver if solver.name == "optimal" else solver_of("alternating", None)
    importance = xp.broadcast_to(metric.squares, x.shape)
    depths = bits.values.T[metric.order] if bits.mapped else bits.values
    of_inputs = xp.ascontiguousarray(weights.T[metric.order])

    def solved(shift: bool, *given: Start) -> Best:
        starts = [start(solver, None, shift), start(searching, importance, shift)]
        return solve(metric, of_inputs, depths, groups, [starts[0], *given], starts, solver)

    best = solved(False)
    if shift:
        none = xp.zeros_like(best.shift)
        best = solved(True, Start(best.scales, none, best.codes))
    return _in_order(best, bits, groups, xp.where(finite, unit, np.nan), position)


def _in_order(
    best: Best, bits: Bits, groups: list[Array], unit: Array, position: Array
) -> tuple[Array, Array, Array]:
    """Scales, codes and shifts of the lines in units of x, the inputs as they were given."""
    xp = libraries.library(unit)
    codes, scales = xp.zeros_like(best.codes), xp.zeros_like(best.scales)
    for number, group in enumerate(groups):
        values, codes[group] = in_order(best.scales[number], best.codes[group], bits.mapped)
        scales[number] = values * unit
    shift = best.shift * unit + 0.0  # never -0.0
    return scales.transpose(1, 2, 0), codes[position].T, shift.T


class Best:
    """For each line the codes, scales and shifts of least error that were ever seen.

    Attributes
    ----------
    codes, scales, shift, errors
        As those of `Lines`.
    """

    def __init__(self, lines: Lines) -> None:
        self.codes, self.scales = lines.codes.copy(), lines.scales.copy()
        self.shift = lines.shift.copy()
        self.errors = lines.errors()

    def take(self, lines: Lines) -> None:
        """Take over the lines that are better."""
        errors = lines.errors()
        better = errors < self.errors
        self.codes[:, better] = lines.codes[:, better]
        self.scales[:, :, better] = lines.scales[:, :, better]
        self.shift[:, better] = lines.shift[:, better]
        self.errors[better] = errors[better]


def solve(
    metric: Metric,
    weights: Array,
    depths: Any,
    groups: list[Array],
    given: list[Start],
    starts: list[Start],
    solver: Solver,
) -> Best:
    """The codes and scales of least output error that a solver finds for some lines.

    Parameters
    ----------
    metric, weights, depths, groups
        As those of `Lines`.
    given : list of Start
        What there is already: no line ends up worse than with any of them. The first is what the
        solver finds for the weights alone.
    starts : list of Start
        Where the search begins: `optimal` with the scales of each, the others with those of the
        last. All of `given` and `starts` have a shift, or none has.
    solver : Solver
    """

    def lines_of(scales: Array, shift: Array | None) -> Lines:
        return Lines(metric, weights, depths, groups, scales, shift)

    best: Any = None
    for one in given:
        lines = lines_of(one.scales, one.shift)
        lines.give(one.codes)
        best = best or Best(lines)
        best.take(lines)
        lines.refit()
        best.take(lines)
        if solver.name == "optimal":
            _alternate(best, lines, None)
    if solver.name != "optimal":
        _search(best, lines_of(starts[-1].scales, starts[-1].shift), solver.iterations)
        return best
    for one in starts:
        _search(best, lines_of(one.scales, one.shift), None)
    # Everyone gets the same numbers: a line's result does not depend on the lines beside it.
    random, xp = np.random.default_rng(0), libraries.library(weights)
    levels = best.scales.shape[1]
    shifted = starts[0].shift is not None
    for _ in range(RESTARTS):
        drawn = np.exp(SPREAD * random.standard_normal((*best.scales.shape[:2], 1)))
        shift = best.shift if shifted else None
        _search(best, lines_of(best.scales * xp.asarray(drawn), shift), None)
        flips = random.random((levels, len(weights), 1)) < FLIPPED
        lines = lines_of(best.scales, best.shift if shifted else None)
        bits = (flips << np.arange(levels)[:, None, None]).sum(axis=0).astype(np.uint16)
        lines.give(best.codes ^ xp.asarray(bits))
        lines.refit()
        _alternate(best, lines, None)
    return best


def _search(best: Best, lines: Lines, iterations: int | None) -> None:
    lines.carry_on()
    lines.refit()
    best.take(lines)
    _alternate(best, lines, iterations)


def _alternate(best: Best, lines: Lines, iterations: int | None) -> None:
    """Renew codes and scales in turn; None goes on until no line gets better."""
    errors = lines.errors()
    for _ in range(MAX_ITERATIONS if iterations is None else iterations):
        lines.descend()
        lines.refit()
        best.take(lines)
        before, errors = errors, lines.errors()
        if not bool((errors < before * (1 - LEAST_GAIN)).any()):
            break
