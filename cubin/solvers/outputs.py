"""The solvers for the error of a layer's outputs: from an array and a Gram matrix to its code."""

from __future__ import annotations

from collections.abc import Sequence
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
from cubin.solvers.search import LEAST_GAIN, MAX_ITERATIONS
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


def encode(
    x: Array,
    bits: Bits,
    rows: Rows,
    solver: Solver,
    gram: Array,
    shift: bool = False,
    higher: Sequence[int] = (),
) -> tuple[Array, Array]:
    """The scales of `x` in its dtype, and its planes.

    They are as those of `precisions.encode`, of which there is one for the bits and one for each
    of `higher`.

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
        Whether there is one.
    higher : sequence of int
        Numbers of levels, ascending, beyond those of `bits`, which is no map then.
    """
    lines = x.reshape(len(x), len(gram))
    depths = bits.values.reshape(lines.shape) if bits.mapped else bits.values
    groups = rows.count // max(1, len(lines))
    precisions = (bits.levels, *higher)
    count = sum(precisions) + shift * len(precisions)
    encoding = Encoding(lines, precisions[-1], rows_of(lines.shape, 0))
    work = encoding.scales.dtype
    scales = libraries.library(x).zeros((count, len(lines), groups), work)
    if x.size and (bits.levels or shift):
        metric = Metric(gram)
        step = max(1, ELEMENTS // max(lines.shape[1], groups << precisions[-1]))
        for start in progress.over(range(0, len(lines), step), "lines", "block"):
            block = slice(start, min(start + step, len(lines)))
            part = depths[block] if bits.mapped else depths
            some = Bits(part, part, bits.levels)
            found, codes = _of_lines(lines[block], some, higher, rows, solver, metric, shift)
            scales[:, block] = conversions.narrowed(found, work)
            of_rows = part if bits.mapped else np.uint8(precisions[-1])
            encoding.pack(Part(block, slice(0, 1), (block, ...)), codes, of_rows)
    return conversions.rounded(scales.reshape(count, rows.count), x.dtype), encoding.planes


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
    x: Array,
    bits: Bits,
    higher: Sequence[int],
    rows: Rows,
    solver: Solver,
    metric: Metric,
    shift: bool,
) -> tuple[Array, Array]:
    """Scales, (scales, lines, groups), and packed codes, (lines, n), of some lines.

    `rows` are those of the whole array, whose lines may have several axes.
    """
    xp = libraries.library(x)
    count, n = x.shape
    # Groups lie within the last axis.
    grouped = rows.group_size is not None
    length = rows.shape[-1] if grouped else n
    own = rows_of((x.size // length, length), None if grouped else 0, rows.group_size)
    position = xp.argsort(metric.order)
    step = rows.group_size or n
    cuts = [slice(at, min(at + step, length)) for at in range(0, length, step)]
    groups = [xp.sort(group[cut]) for group in position.reshape(-1, length) for cut in cuts]
    # Lines are solved in units of their largest weight, so that squares do not overflow.
    weights = conversions.widened(x)
    unit = abs(weights).max(axis=1)
    finite = xp.isfinite(unit)
    unit = xp.where(finite & (unit > 0), unit, 1.0)
    weights = xp.where(finite[:, None], weights / unit[:, None], 0.0)
    flat = weights.reshape(own.shape)
    depths = bits.values.reshape(own.shape) if bits.mapped else bits.values
    bits_of_flat = Bits(depths, depths, bits.levels)

    def start(on_weights: Solver, importance: Array | None, shift: bool) -> Start:
        scales, codes = [], []
        on_section = shifted.encode if shift else encode_weights
        for section in own.sections:
            some = bits_of_flat.of(section)
            w, weight = section.of(flat), section.of(importance)
            found, planes = on_section(w, some, section.rows, on_weights, weight)
            scales.append(found.reshape(len(found), *section.rows.scale_shape))
            codes.append(codes_of(planes, w.shape))
        joined = own.joined(scales)
        of_lines = joined.reshape(len(joined), count, len(groups)).transpose(2, 0, 1)
        constant = xp.ascontiguousarray(of_lines[:, bits.levels]) if shift else None
        code = own.joined(codes).reshape(x.shape)
        codes_of_inputs = xp.ascontiguousarray(code.T[metric.order])
        return Start(xp.ascontiguousarray(of_lines[:, : bits.levels]), constant, codes_of_inputs)

    # The importance of an input is its mean square. The best scales with it are a better start than
    # those of the solver itself.
    searching = solver if solver.name == "optimal" else solver_of("alternating", None)
    importance = xp.broadcast_to(metric.squares, x.shape).reshape(own.shape)
    depths = bits.values.T[metric.order] if bits.mapped else bits.values
    of_inputs = xp.ascontiguousarray(weights.T[metric.order])

    def solved(shift: bool, *given: Start) -> Best:
        starts = [start(solver, None, shift), start(searching, importance, shift)]
        return solve(metric, of_inputs, depths, groups, [starts[0], *given], starts, solver)

    best = solved(False)
    if shift:
        none = xp.zeros_like(best.shift)
        best = solved(True, Start(best.scales, none, best.codes))
    for number, group in enumerate(groups):
        found = in_order(best.scales[number], best.codes[group], bits.mapped)
        best.scales[number], best.codes[group] = found
    tables = [best.table(shift)]
    for levels in higher:
        best = extended(metric, of_inputs, groups, best, levels, solver, shift)
        tables.append(best.table(shift))
    unit = xp.where(finite, unit, np.nan)
    scales = xp.concatenate(tables, axis=1) * unit + 0.0  # never -0.0
    return scales.transpose(1, 2, 0), best.codes[position].T


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

    def table(self, shifted: bool) -> Array:
        """The scales, and then the shift, if there is one: (groups, scales, lines)."""
        if not shifted:
            return self.scales
        xp = libraries.library(self.scales)
        return xp.concatenate([self.scales, self.shift[:, None]], axis=1)

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
    for _ in progress.over(range(RESTARTS), "starts", "start"):
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


def extended(
    metric: Metric,
    weights: Array,
    groups: list[Array],
    lower: Best,
    levels: int,
    solver: Solver,
    shift: bool,
) -> Best:
    """The codes and scales of least output error that are found with `levels` levels.

    The codes of `lower` stay. Its levels and the added ones have scales of their own. No line has a
    larger error than if each added level took the signs of the residual.
    """
    xp = libraries.library(weights)
    codes, scales, constant = lower.codes, lower.scales, lower.shift if shift else None
    fixed = scales.shape[1]
    for level in range(fixed, levels):
        scales = xp.concatenate([scales, xp.zeros_like(scales[:, :1])], axis=1)
        lines = Lines(metric, weights, np.uint8(level + 1), groups, scales, constant, fixed)
        lines.give(codes)
        # The scale of the level is still 0, so that its signs change no value.
        lines.codes |= (weights > lines.values).astype(np.uint16) << np.uint16(level)
        lines.refit()
        codes, scales, constant = lines.codes, lines.scales, lines.shift if shift else None
    best = Best(lines)
    carried = Lines(metric, weights, np.uint8(levels), groups, scales, constant, fixed)
    carried.give(codes)
    _search(best, carried, solver.iterations)
    if solver.name == "optimal":
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
