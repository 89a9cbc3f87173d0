"""The solvers `refined` and `alternating` as compiled loops, a row at a time.

They do what `cubin.solvers.search` does, without sorting: the elements above an edge of cells are
added up in one pass over the row, while it is in the cache. They take float32, for which no square
in float64 overflows or vanishes, and elements that all have the same number of bits, up to 4.

What the cells of a row hold is kept as `number` and `total`: how many magnitudes lie above the
lower edge of a cell, and their sum. `equations` are the normal equations of least squares: the
lower triangle, and the right side as one more line.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cubin.codes.levels import decode
from cubin.codes.levels_loops import level_signs
from cubin.core import memory
from cubin.core.host.loops import (
    in_work_dtype,
    loop,
    part,
    store,
    sum_in_lanes,
    target,
    uncounted,
)
from cubin.core.libraries import Array
from cubin.solvers import search_rows, sorted_rows_loops
from cubin.solvers.codebook import DEPENDENT
from cubin.solvers.solver import Solver

CHUNK = 1 << 13
"""Elements that stay in the first cache while they are added up above one edge after the other."""

LONGEST_KEPT = 1 << 19
"""Elements of the longest row whose magnitudes are kept; else they are found chunk by chunk."""

# What magnitudes are divided by where four of them overflow.
_UNIT = 4.0


@part
def _rounded_down(value: float) -> Any:
    rounded = np.float32(value)
    return np.nextafter(rounded, np.float32(-np.inf)) if rounded > value else rounded


@part
def _padded(size: int) -> int:
    """Elements that fill four columns of whole registers."""
    return -(-size // 32) * 32


# ---------------------------------------------------------------- sums


# Four are added in float32: numbers that are equal do not round. NaN is not below an edge, so that
# it shows in the sums.
@part
def _sums_of_four(m: Array, edge: float, sums: Array) -> int:
    """Add up what lies above an edge in columns of four, and give its number."""
    zero, below, n = np.float32(0), np.int32(0), sums.size
    for j in range(n):
        a, b, c, d = m[j], m[j + n], m[j + 2 * n], m[j + 3 * n]
        below = np.int32(below + (a <= edge) + (b <= edge) + (c <= edge) + (d <= edge))
        first = (zero if a <= edge else a) + (zero if b <= edge else b)
        second = (zero if c <= edge else c) + (zero if d <= edge else d)
        sums[j] = first + second
    return m.size - below


@loop
def _add_up(
    x: Array, unit: float, m: Array, edges: Array, cells: range, number: Array, total: Array,
    sums_of_four: Array,
) -> None:  # fmt: skip
    """Find what lies above the lower edges of cells.

    `m` are the magnitudes of a row, or what they are written to, chunk by chunk, if it is shorter.
    """
    x, m, edges, sums_of_four = uncounted(x, m, edges, sums_of_four)
    number, total = uncounted(number, total)
    for cell in cells:
        number[cell], total[cell] = 0, 0
    for start in range(0, x.size, CHUNK):
        if m.size < x.size:
            chunk = m[: _padded(min(CHUNK, x.size - start))]
            _magnitudes(x[start : start + CHUNK], unit, chunk)
        else:
            chunk = m[start : start + CHUNK]
        columns = chunk.size // 4
        sums = sums_of_four[:columns]
        for cell in cells:
            edge = edges[cell - 1] if cell else np.float32(-1)
            number[cell] += _sums_of_four(chunk, edge, sums)
            total[cell] += sum_in_lanes(sums, columns)


# ---------------------------------------------------------------- least squares


@part
def _signed(value: float, code: int, level: int) -> float:
    return value if code >> level & 1 else -value


@loop
def _set_equations(
    codes: Array, levels: int, number: Array, total: Array, equations: Array
) -> None:
    for j in range(levels):
        equations[levels, j] = 0
        for i in range(j):
            equations[j, i] = 0
        equations[j, j] = number[0]
    above, above_total = 0.0, 0.0
    for cell in range((1 << (levels - 1)) - 1, -1, -1):
        mass, first = number[cell] - above, total[cell] - above_total
        above, above_total = number[cell], total[cell]
        code = codes[cell]
        for j in range(levels):
            equations[levels, j] += _signed(first, code, j)
            for i in range(j):
                equations[j, i] += _signed(mass, code >> j ^ ~code >> i, 0)


@part
def _mean(equations: Array, level: int, scales: Array) -> float:
    """The mean of what the levels before leave of the magnitudes, with the signs of a level."""
    total = equations[level + 1, level]
    for i in range(level):
        total -= equations[level, i] * scales[i]
    return total / max(equations[0, 0], 1)


@loop
def _solve(equations: Array, levels: int, scales: Array) -> float:
    """Write the least-squares scales, which overwrites the equations; give what they explain."""
    count = equations[0, 0]
    for p in range(levels):
        pivot, right = equations[p, p], equations[levels, p]
        # A level whose signs depend linearly on those before it adds nothing.
        inverse = 1 / pivot if pivot > DEPENDENT * count else 0.0
        scales[p] = right * inverse
        for j in range(p + 1, levels):
            for i in range(j, levels):
                equations[i, j] -= equations[i, p] * equations[j, p] * inverse
            equations[levels, j] -= equations[j, p] * scales[p]
        equations[p, p] = inverse
    gain = 0.0
    for j in range(levels - 1, -1, -1):
        gain += equations[levels, j] * scales[j]
        for i in range(j + 1, levels):
            scales[j] -= equations[i, j] * equations[j, j] * scales[i]
    return gain


# ---------------------------------------------------------------- cells


@loop
def _nearest(scales: Array, levels: int, edges: Array, codes: Array, sums: Array) -> None:
    """The cells in which each magnitude takes the nearest sum of levels."""
    cells = 1 << (levels - 1)
    for cell in range(cells):
        # In the order in which levels are added one by one: the last decides first.
        code, value = 1, abs(scales[0])
        for level in range(1, levels):
            plus = cell >> (level - 1) & 1
            value += abs(scales[level]) if plus else -abs(scales[level])
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


@part
def _split(
    scales: Array, level: int, edges: Array, codes: Array, number: Array, total: Array
) -> None:
    """Every cell cut where the residual after the first levels changes its sign.

    What lies above the edges that there were is known.
    """
    cells = 1 << (level - 1)
    for cell in range(cells - 1, -1, -1):
        value = 0.0
        for i in range(level):
            value += _signed(scales[i], codes[cell], i)
        cut = _rounded_down(value)
        # The edges above this cell have moved up already.
        if cell + 1 < cells:
            edges[2 * cell + 1] = edges[cell]
            cut = min(cut, edges[cell])
        if cell > 0:
            cut = max(cut, edges[cell - 1])
        edges[2 * cell] = cut
        codes[2 * cell + 1] = codes[cell] | 1 << level
        codes[2 * cell] = codes[cell]
        number[2 * cell], total[2 * cell] = number[cell], total[cell]


@part
def _in_order(
    found: Array, unit: float, codes: Array, moved: Array, scales: Array, row: int
) -> None:
    """Write scales that are not negative and descend, and change the codes to go with them."""
    levels = len(found)
    moved[:] = 0
    for level in range(levels):
        own, place = abs(found[level]), 0
        for other in range(levels):
            more = abs(found[other])
            place += more > own or (more == own and other < level)
        scales[place, row] = np.float32(own * unit)
        for cell in range(len(codes)):
            moved[cell] |= (codes[cell] >> level & 1 ^ int(found[level] < 0)) << place
    codes[:] = moved


# ---------------------------------------------------------------- rows


@part
def _magnitudes(x: Array, unit: float, m: Array) -> None:
    """|x| in a unit that is a power of 2, or 0 if that is NaN, as in rows that are not finite.

    What is left of `m` lies below all edges.
    """
    inverse = np.float32(1 / unit)
    if inverse > 0:
        for j in range(x.size):
            m[j] = abs(x[j]) * inverse
    else:
        m[: x.size] = 0
    m[x.size :] = -2


@part
def _is_finite(x: Array) -> bool:
    finite = True
    for j in range(x.size):
        finite &= abs(x[j]) < np.float32(np.inf)
    return finite


@loop
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
    x, scales, edges, codes = uncounted(x, scales, edges, codes)
    cells = 1 << (levels - 1)
    kept = x.shape[1] <= LONGEST_KEPT
    m = np.empty(_padded(x.shape[1]) if kept else CHUNK, np.float32)
    four = np.empty(min(m.size, CHUNK) // 4, np.float32)
    moved = np.empty(cells, codes.dtype)
    number, total, sums = np.empty(cells), np.empty(cells), np.empty(cells)
    equations = np.empty((levels + 1, levels))
    found = np.empty(levels)
    for row in range(len(x)):
        own, edge, code = x[row], edges[row], codes[row]
        unit = 1.0
        if kept:
            _magnitudes(own, unit, m)
        _add_up(own, unit, m, edge, range(1), number, total, four)
        if not total[0] < np.inf:
            unit = _UNIT if _is_finite(own) else np.nan
            if kept:
                _magnitudes(own, unit, m)
            _add_up(own, unit, m, edge, range(1), number, total, four)
        code[0] = 1
        for level in range(levels):
            if level:
                _split(found, level, edge, code, number, total)
                _add_up(own, unit, m, edge, range(1, 1 << level, 2), number, total, four)
            _set_equations(code, level + 1, number, total, equations)
            if refit:
                _solve(equations, level + 1, found)
            else:
                found[level] = _mean(equations, level, found)
        if not refit:
            gain = _solve(equations, levels, found)
            for _ in range(iterations):
                _nearest(found, levels, edge, code, sums)
                _add_up(own, unit, m, edge, range(1, cells), number, total, four)
                _set_equations(code, levels, number, total, equations)
                raised = _solve(equations, levels, found)
                if not raised > gain:
                    break
                gain = raised
        if unit > 1:
            edge *= _UNIT
        _in_order(found, unit, code, moved, scales, row)


# ---------------------------------------------------------------- what they give


@part
def _of_four(x: Array, edges: Array, table: Array, mirror: Any, given: Array) -> None:
    never = np.float32(np.inf)
    a = edges[0] if edges.size > 0 else never
    b, c = (edges[1], edges[2]) if edges.size > 1 else (never, never)
    p = table[0]
    q = table[1] if table.size > 1 else p
    r, s = (table[2], table[3]) if table.size > 2 else (q, q)
    for j in range(x.size):
        m = abs(x[j])
        own = q if m > a else p
        own = r if m > b else own
        own = s if m > c else own
        given[j] = mirror - own if x[j] <= 0 else own


@part
def _of_eight(x: Array, edges: Array, table: Array, mirror: Any, given: Array) -> None:
    a, b, c, d, e, f, g = edges[0], edges[1], edges[2], edges[3], edges[4], edges[5], edges[6]
    p, q, r, s = table[0], table[1], table[2], table[3]
    t, u, v, w = table[4], table[5], table[6], table[7]
    for j in range(x.size):
        m = abs(x[j])
        own = q if m > a else p
        own = r if m > b else own
        own = s if m > c else own
        own = t if m > d else own
        own = u if m > e else own
        own = v if m > f else own
        own = w if m > g else own
        given[j] = mirror - own if x[j] <= 0 else own


@loop
def give(x: Array, edges: Array, table: Array, mirror: Any, given: Array) -> None:
    """Write for each element, (rows, n), what the table of its row has for its cell.

    Elements that are not positive get `mirror` less that.
    """
    x, edges, table, given = uncounted(x, edges, table, given)
    for row in range(len(x)):
        if table.shape[1] > 4:
            _of_eight(x[row], edges[row], table[row], mirror, given[row])
        else:
            _of_four(x[row], edges[row], table[row], mirror, given[row])


# ---------------------------------------------------------------- as the primitives are called


def _takes(x: Array, bits: Any, levels: int) -> bool:
    """Whether there are loops for such rows; others are sorted."""
    return x.dtype != np.float64 and np.ndim(bits) == 0 and levels <= search_rows.MAX_LEVELS


def _sorted(x: Array, bits: Any, levels: int, refit: bool, iterations: int) -> Any:
    solver = Solver("refined" if refit else "alternating", levels, refit, iterations)
    return sorted_rows_loops.Lookup(x, bits, levels, None, solver)


def _fitted(x: Array, levels: int, refit: bool, iterations: int) -> tuple[Array, Array, Array]:
    """The scales, (levels, rows), edges of cells and codes of positive elements of rows."""
    cells = 1 << (levels - 1)
    scales = np.empty((levels, len(x)), np.float32)
    edges = np.empty((len(x), cells - 1), np.float32)
    codes = np.empty((len(x), cells), np.uint16)
    fit(x, levels, refit, iterations, scales, edges, codes)
    return scales, edges, codes


def reconstruct_rows(
    x: Array, bits: Any, levels: int, refit: bool, iterations: int, *, y: Array
) -> None:
    """`search_rows.reconstruct_rows`."""
    if not _takes(x, bits, levels):
        _sorted(x, bits, levels, refit, iterations).approximate(x, bits, y)
        return
    wide = in_work_dtype(x)
    scales, edges, codes = _fitted(wide, levels, refit, iterations)
    values = np.empty(codes.shape, y.dtype)
    decode(codes, np.uint8(levels), *scales[:, :, None], y=values)
    given = target(y, wide)
    # The sums of levels are odd, and +0 where they cancel.
    give(wide, edges, values.astype(wide.dtype, copy=False), wide.dtype.type(0), given)
    store(given, y)


def solve_rows(
    x: Array, bits: Any, levels: int, refit: bool, iterations: int, *, scales: Array, signs: Array
) -> None:
    """`search_rows.solve_rows`."""
    if not _takes(x, bits, levels):
        fit = _sorted(x, bits, levels, refit, iterations)
        scales[...] = fit.scales
        code = fit.codes(x, bits)
        for level in range(levels):
            level_signs(code, bits, np.uint8(level), sign=signs[level])
        return
    wide = in_work_dtype(x)
    found, edges, codes = _fitted(wide, levels, refit, iterations)
    scales[...] = found[:, :, None]
    code = memory.scratch("codes", x.shape, np.uint16)
    give(wide, edges, codes, np.uint16((1 << levels) - 1), code)
    for level in range(levels):
        level_signs(code, bits, np.uint8(level), sign=signs[level])
