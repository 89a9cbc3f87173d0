"""The solvers for the error of a layer's outputs: from an array and a Gram matrix to its code."""

from __future__ import annotations

from typing import Any

import numpy as np

from cubin.codes.decoding import unpacked
from cubin.codes.encoding import Encoding
from cubin.core import conversions, libraries, progress
from cubin.core.bits import Bits
from cubin.core.libraries import Array
from cubin.core.passes import Part
from cubin.core.rows import Rows, rows_of
from cubin.solvers import encode as encode_weights
from cubin.solvers.gram import Lines, Metric
from cubin.solvers.search import MAX_ITERATIONS
from cubin.solvers.solver import Solver, solver_of

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


def encode(x: Array, bits: Bits, rows: Rows, solver: Solver, gram: Array) -> tuple[Array, Array]:
    """The scales of `x` in its dtype, (levels, rows), and its planes, as `solvers.encode`.

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
    """
    lines = x.reshape(len(x), len(gram))
    depths = bits.values.reshape(lines.shape) if bits.mapped else bits.values
    groups = rows.count // max(1, len(lines))
    encoding = Encoding(lines, bits.levels, rows_of(lines.shape, 0))
    work = encoding.scales.dtype
    scales = libraries.library(x).zeros((bits.levels, len(lines), groups), work)
    if x.size and bits.levels:
        metric = Metric(gram)
        step = max(1, ELEMENTS // max(lines.shape[1], groups << bits.levels))
        for start in progress.over(range(0, len(lines), step), "lines", "block"):
            block = slice(start, min(start + step, len(lines)))
            part = depths[block] if bits.mapped else depths
            some = Bits(part, part, bits.levels)
            found, codes = _of_lines(lines[block], some, rows, solver, metric)
            scales[:, block] = conversions.narrowed(found, work)
            encoding.pack(Part(block, slice(0, 1), (block, ...)), codes, part)
    scales = scales.reshape(bits.levels, rows.count)
    return conversions.rounded(scales, x.dtype), encoding.planes


def _of_lines(
    x: Array, bits: Bits, rows: Rows, solver: Solver, metric: Metric
) -> tuple[Array, Array]:
    """Scales, (levels, lines, groups), and packed codes, (lines, n), of some lines.

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

    def start(on_weights: Solver, importance: Array | None) -> tuple[Array, Array]:
        scales, codes = [], []
        for section in own.sections:
            some = bits_of_flat.of(section)
            w, weight = section.of(flat), section.of(importance)
            found, planes = encode_weights(w, some, section.rows, on_weights, weight)
            scales.append(found.reshape(bits.levels, *section.rows.scale_shape))
            signs = unpacked(planes, some.entries, w.shape)
            code = xp.zeros(w.shape, np.uint16)
            for level in range(bits.levels):
                code |= (signs[level] > 0).astype(np.uint16) << np.uint16(level)
            codes.append(code)
        of_lines = own.joined(scales).reshape(bits.levels, count, len(groups)).transpose(2, 0, 1)
        code = own.joined(codes).reshape(x.shape)
        return xp.ascontiguousarray(of_lines), xp.ascontiguousarray(code.T[metric.order])

    # The importance of an input is its mean square. The best scales with it are a better start than
    # those of the solver itself.
    searching = solver if solver.name == "optimal" else solver_of("alternating", None)
    importance = xp.broadcast_to(metric.squares, x.shape).reshape(own.shape)
    starts = [start(solver, None), start(searching, importance)]
    depths = bits.values.T[metric.order] if bits.mapped else bits.values
    weights = xp.ascontiguousarray(weights.T[metric.order])
    best = solve(metric, weights, depths, groups, starts, solver)
    return _in_order(best, bits, groups, xp.where(finite, unit, np.nan), position)


def _in_order(
    best: Best, bits: Bits, groups: list[Array], unit: Array, position: Array
) -> tuple[Array, Array]:
    """Scales that are not negative and, without a map, descend, and the codes that go with them."""
    xp = libraries.library(unit)
    codes, scales = xp.zeros_like(best.codes), xp.zeros_like(best.scales)
    for number, group in enumerate(groups):
        values = best.scales[number]
        order = xp.arange(bits.levels)[:, None] + xp.zeros(values.shape, np.int64)
        if not bits.mapped:
            order = xp.argsort(-abs(values), axis=0, kind="stable")
        values = xp.take_along_axis(values, order, 0)
        scales[number] = abs(values) * unit
        old, new = best.codes[group], xp.zeros(codes[group].shape, np.uint16)
        for level in range(bits.levels):
            bit = (old >> order[level].astype(np.uint16) & 1) ^ (values[level] < 0)
            new |= bit.astype(np.uint16) << np.uint16(level)
        codes[group] = new
    return scales.transpose(1, 2, 0), codes[position].T


class Best:
    """For each line the codes and scales of least error that were ever seen.

    Attributes
    ----------
    codes, scales, errors
        As those of `Lines`.
    """

    def __init__(self, lines: Lines) -> None:
        self.codes, self.scales = lines.codes.copy(), lines.scales.copy()
        self.errors = lines.errors()

    def take(self, lines: Lines) -> None:
        """Take over the lines that are better."""
        errors = lines.errors()
        better = errors < self.errors
        self.codes[:, better] = lines.codes[:, better]
        self.scales[:, :, better] = lines.scales[:, :, better]
        self.errors[better] = errors[better]


def solve(
    metric: Metric,
    weights: Array,
    depths: Any,
    groups: list[Array],
    starts: list[tuple[Array, Array]],
    solver: Solver,
) -> Best:
    """The codes and scales of least output error that a solver finds for some lines.

    Parameters
    ----------
    metric, weights, depths, groups
        As those of `Lines`.
    starts : list of tuple
        Scales, (groups, levels, lines), and codes, (n, lines). The first are what the solver finds
        for the weights alone: no line ends up worse than with them. The last are where the search
        begins.
    solver : Solver
    """
    plain = Lines(metric, weights, depths, groups, starts[0][0])
    plain.give(starts[0][1])
    best = Best(plain)
    plain.refit()
    best.take(plain)
    if solver.name != "optimal":
        _search(best, Lines(metric, weights, depths, groups, starts[-1][0]), solver.iterations)
        return best
    _alternate(best, plain, None)
    for scales, _ in starts:
        _search(best, Lines(metric, weights, depths, groups, scales), None)
    # Everyone gets the same numbers: a line's result does not depend on the lines beside it.
    random, xp = np.random.default_rng(0), libraries.library(weights)
    levels = best.scales.shape[1]
    for _ in range(RESTARTS):
        drawn = np.exp(SPREAD * random.standard_normal((*best.scales.shape[:2], 1)))
        scales = best.scales * xp.asarray(drawn)
        _search(best, Lines(metric, weights, depths, groups, scales), None)
        flips = random.random((levels, len(weights), 1)) < FLIPPED
        lines = Lines(metric, weights, depths, groups, best.scales)
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
