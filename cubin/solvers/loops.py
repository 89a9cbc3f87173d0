"""The solvers `refined` and `alternating` as Numba compiles them, a row at a time.

They do what `cubin.solvers.search` does, without sorting: each least-squares step is one pass over
the row per threshold, while it is in the cache. They take float32, for which no square in float64
overflows or vanishes, and elements that all have the same number of bits, 2 to `MAX_LEVELS`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cubin import blocks, compiled
from cubin.arrays import Array
from cubin.compiled import loop
from cubin.solvers.cells import DEPENDENT

MAX_LEVELS = 4
"""From here on sorting pays: the thresholds double with every level."""


@loop()
def _rounded_down(value: float) -> Any:
    rounded = np.float32(value)
    return np.nextafter(rounded, np.float32(-np.inf)) if rounded > value else rounded


# Sums alone may be reordered. Four of them share what a pass loads; counts are exact in float32.
@loop(fastmath={"reassoc"})
def _sums_above(
    m: Array, a: float, b: float, c: float, d: float, count: Array, total: Array
) -> None:
    zero, one = np.float32(0), np.float32(1)
    count_a, count_b, count_c, count_d = zero, zero, zero, zero
    total_a, total_b, total_c, total_d = 0.0, 0.0, 0.0, 0.0
    for j in range(m.size):
        value = np.float64(m[j])
        total_a += value if m[j] > a else 0.0
        total_b += value if m[j] > b else 0.0
        total_c += value if m[j] > c else 0.0
        total_d += value if m[j] > d else 0.0
        count_a += one if m[j] > a else zero
        count_b += one if m[j] > b else zero
        count_c += one if m[j] > c else zero
        count_d += one if m[j] > d else zero
    count[0], count[1], count[2], count[3] = count_a, count_b, count_c, count_d
    total[0], total[1], total[2], total[3] = total_a, total_b, total_c, total_d


@loop(fastmath={"reassoc"})
def _sums_of_two(m: Array, a: float, count: Array, total: Array) -> None:
    zero, one = np.float32(0), np.float32(1)
    count_a, total_a, total_all = zero, 0.0, 0.0
    for j in range(m.size):
        value = np.float64(m[j])
        total_all += value
        total_a += value if m[j] > a else 0.0
        count_a += one if m[j] > a else zero
    count[0], count[1] = m.size, count_a
    total[0], total[1] = total_all, total_a


@loop()
def _sums(m: Array, edges: Array, cells: int, mass: Array, first: Array) -> None:
    """The number and the sum of the magnitudes in each cell."""
    never = np.float32(np.inf)
    if cells <= 2:
        _sums_of_two(m, edges[0] if cells > 1 else never, mass, first)
    else:
        for cell in range(0, cells, 4):
            a = edges[cell - 1] if cell else np.float32(-1)
            b, c, d = edges[cell], edges[cell + 1], edges[cell + 2]
            _sums_above(m, a, b, c, d, mass[cell : cell + 4], first[cell : cell + 4])
    for cell in range(cells - 1):
        mass[cell] -= mass[cell + 1]
        first[cell] -= first[cell + 1]


@loop()
def _sign(code: int, level: int) -> float:
    return 2.0 * (code >> level & 1) - 1.0


@loop()
def _fitted(
    m: Array, edges: Array, codes: Array, levels: int, cells: int, scales: Array, spare: Array
) -> float:
    """Write the least-squares scales of the codes of cells; give what they explain."""
    mass, first = spare[0], spare[1]
    _sums(m, edges, cells, mass, first)
    gram, target = np.zeros((levels, levels)), np.zeros(levels)
    for cell in range(cells):
        for i in range(levels):
            sign = _sign(codes[cell], i)
            target[i] += sign * first[cell]
            for j in range(i + 1):
                gram[i, j] += sign * _sign(codes[cell], j) * mass[cell]
    factor, inverse = np.zeros((levels, levels)), np.zeros(levels)
    for j in range(levels):
        pivot, right = gram[j, j], target[j]
        for p in range(j):
            pivot -= factor[j, p] * factor[j, p] * inverse[p]
            right -= factor[j, p] * scales[p]
        inverse[j] = 1 / pivot if pivot > DEPENDENT * gram[j, j] else 0.0
        scales[j] = right * inverse[j]
        for i in range(j + 1, levels):
            entry = gram[i, j]
            for p in range(j):
                entry -= factor[i, p] * factor[j, p] * inverse[p]
            factor[i, j] = entry
    gain = 0.0
    for j in range(levels - 1, -1, -1):
        for i in range(j + 1, levels):
            scales[j] -= factor[i, j] * inverse[j] * scales[i]
    for i in range(levels):
        row = gram[i, i] * scales[i]
        for j in range(i):
            row += 2 * gram[i, j] * scales[j]
        gain += scales[i] * (2 * target[i] - row)
    return gain


@loop()
def _nearest(scales: Array, levels: int, edges: Array, codes: Array, sums: Array) -> None:
    """The cells in which each magnitude takes the nearest sum of levels."""
    cells = 1 << (levels - 1)
    for cell in range(cells):
        # In the order in which levels are added one by one: the last decides first.
        code, value = 1, scales[0]
        for level in range(1, levels):
            plus = cell >> (level - 1) & 1
            value += scales[level] if plus else -scales[level]
            code |= plus << level
        if value < 0:
            code, value = code ^ ((1 << levels) - 1), -value
        at = cell
        while at > 0 and sums[at - 1] > value:
            sums[at], codes[at] = sums[at - 1], codes[at - 1]
            at -= 1
        sums[at], codes[at] = value, code
    for cell in range(cells - 1):
        edges[cell] = _rounded_down(sums[cell] / 2 + sums[cell + 1] / 2)


@loop()
def _split(scales: Array, level: int, edges: Array, codes: Array) -> None:
    """Every cell cut where the residual after the first levels changes its sign."""
    cells = 1 << (level - 1)
    old = edges[: cells - 1].copy()
    before = codes[:cells].copy()
    for cell in range(cells):
        value = 0.0
        for i in range(level):
            value += scales[i] * _sign(before[cell], i)
        cut = _rounded_down(value)
        if cell > 0:
            cut = max(cut, old[cell - 1])
        if cell + 1 < cells:
            cut = min(cut, old[cell])
        edges[2 * cell] = cut
        if cell + 1 < cells:
            edges[2 * cell + 1] = old[cell]
        codes[2 * cell] = before[cell]
        codes[2 * cell + 1] = before[cell] | 1 << level


@loop()
def _successive(
    m: Array, levels: int, refit: bool, edges: Array, codes: Array, scales: Array, spare: Array
) -> None:
    codes[0] = 1
    for level in range(levels):
        if level:
            _split(scales, level, edges, codes)
        cells = 1 << level
        if refit:
            _fitted(m, edges, codes, level + 1, cells, scales, spare)
            continue
        # A scale is the mean of what the cells' values leave.
        mass, first = spare[0], spare[1]
        _sums(m, edges, cells, mass, first)
        total = 0.0
        for cell in range(cells):
            value = 0.0
            for i in range(level):
                value += scales[i] * _sign(codes[cell], i)
            total += _sign(codes[cell], level) * (first[cell] - mass[cell] * value)
        scales[level] = total / max(m.size, 1)


@loop()
def fit(
    x: Array, levels: int, refit: bool, iterations: int, scales: Array, edges: Array, codes: Array
) -> None:
    """Solve rows.

    Parameters
    ----------
    x : array of float32, shape (rows, n)
    levels : int
    refit : bool
        Whether to stop at the refined cells; else alternate from the greedy ones on.
    iterations : int
        Of alternating.
    scales : array of float32, shape (levels, rows)
        Descending; NaN in rows that are not finite.
    edges : array of float32, shape (rows, cells - 1)
    codes : array of uint16, shape (rows, cells)
        Those of positive elements.
    """
    cells = 1 << (levels - 1)
    m = np.empty(x.shape[1], np.float32)
    spare = np.empty((2, cells))
    found, renewed = np.empty(levels), np.empty(levels)
    for row in range(len(x)):
        finite = True
        for j in range(m.size):
            m[j] = abs(x[row, j])
            finite &= m[j] < np.float32(np.inf)
        if not finite:
            m[:] = 0
        edge, code = edges[row], codes[row]
        _successive(m, levels, refit, edge, code, found, spare)
        if not refit and iterations > 0:
            gain = _fitted(m, edge, code, levels, cells, found, spare)
            found[:] = np.abs(found)
            for _ in range(iterations - 1):
                _nearest(found, levels, edge, code, spare[0])
                raised = _fitted(m, edge, code, levels, cells, renewed, spare)
                if not raised > gain:
                    break
                found[:], gain = np.abs(renewed), raised
            _nearest(found, levels, edge, code, spare[0])
        _fitted(m, edge, code, levels, cells, found, spare)
        _in_order(found, code, finite, scales[:, row])


@loop()
def _in_order(found: Array, codes: Array, finite: bool, scales: Array) -> None:
    """Write scales that are not negative and descend, and change the codes to go with them."""
    levels = len(found)
    order = np.argsort(-np.abs(found), kind="mergesort")
    for cell in range(len(codes)):
        old, code = codes[cell], 0
        for level in range(levels):
            source = order[level]
            code |= ((old >> source & 1) ^ int(found[source] < 0)) << level
        codes[cell] = code
    for level in range(levels):
        scales[level] = np.float32(abs(found[order[level]])) if finite else np.float32(np.nan)


# ---------------------------------------------------------------- what they give


@loop()
def _above(x: Array, edge: float, value: int, code: Array) -> None:
    for j in range(x.size):
        code[j] = value if abs(x[j]) > edge else code[j]


@loop()
def _turn(x: Array, every: int, code: Array) -> None:
    for j in range(x.size):
        code[j] ^= every if x[j] <= 0 else code.dtype.type(0)


@loop()
def encode(x: Array, edges: Array, table: Array, codes: Array) -> None:
    """The packed codes of elements, (rows, n), from those of the cells of their rows."""
    rows, cells = table.shape
    for row in range(rows):
        codes[row] = table[row, 0]
        for cell in range(1, cells):
            _above(x[row], edges[row, cell - 1], table[row, cell], codes[row])
        _turn(x[row], codes.dtype.type(2 * cells - 1), codes[row])


# ---------------------------------------------------------------- as the solvers are called


def solve(x: Array, levels: int, refit: bool, iterations: int) -> tuple[Array, list[Array]]:
    """Packed codes, which last until this thread solves more rows, and scales, each (rows, 1)."""
    x, scales, edges, table = _solved(x, levels, refit, iterations)
    codes = blocks.spare("codes", x.shape, np.uint16)
    encode(x, edges, table, codes)
    return codes, list(scales[:, :, None])


def reconstruct(x: Array, levels: int, refit: bool, iterations: int, *, y: Array) -> None:
    """What the codes and scales of rows stand for."""
    codes, scales = solve(x, levels, refit, iterations)
    compiled.decode(codes, np.uint8(levels), *scales, y=y)


def _solved(
    x: Array, levels: int, refit: bool, iterations: int
) -> tuple[Array, Array, Array, Array]:
    x = np.ascontiguousarray(x, np.float32)
    cells = 1 << (levels - 1)
    scales = np.empty((levels, len(x)), np.float32)
    edges = np.empty((len(x), cells - 1), np.float32)
    table = np.empty((len(x), cells), np.uint16)
    fit(x, levels, refit, iterations, scales, edges, table)
    return x, scales, edges, table
