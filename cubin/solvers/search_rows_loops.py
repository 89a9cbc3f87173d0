"""The primitives of `search_rows.py` as compiled loops, which go row by row without sorting.

They find what `cubin.solvers.search` finds. The magnitudes above the lower edge of a cell are added
up in one pass over the row, which is in the cache. The loops take float32, whose squares neither
overflow nor vanish in float64, and rows without a map and of up to 4 levels. All other rows are
sorted, by `sorted_rows_loops.py`.

`number` and `total` have an entry for each cell of a row: how many magnitudes lie above its lower
edge, and their sum. `equations` are the normal equations of least squares: the lower triangle, and
below it the right side as one more row.
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
"""Elements that stay in the first-level cache while they are compared with all edges in turn."""

LONGEST_KEPT = 1 << 19
"""Elements of the longest row whose magnitudes are stored. Those of longer rows are computed again
in every pass, chunk by chunk."""

_UNIT = 4.0
"""What the magnitudes of a row are divided by where the sum of four of them overflows."""


@part
def _rounded_down(value: float) -> Any:
    rounded = np.float32(value)
    return np.nextafter(rounded, np.float32(-np.inf)) if rounded > value else rounded


@part
def _padded(size: int) -> int:
    """`size` rounded up so that four columns fill whole vector registers."""
    return -(-size // 32) * 32


# ---------------------------------------------------------------- sums


@part
def _sums_of_four(m: Array, edge: float, sums: Array) -> int:
    """Write the sums, four magnitudes each, of those above an edge; return their number.

    Four are added in float32, in pairs, so that equal numbers do not round. NaN is not below any
    edge, so that it shows in the sums.
    """
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
    """Write the number and total of magnitudes above the lower edges of some cells.

    `m` holds the magnitudes of the row. If it is shorter than the row, it is scratch that they are
    written to, chunk by chunk.
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
    """Write the normal equations of the first `levels` levels."""
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
    """The greedy scale of a level: the mean of its signs times the residuals of those before."""
    total = equations[level + 1, level]
    for i in range(level):
        total -= equations[level, i] * scales[i]
    return total / max(equations[0, 0], 1)


@loop
def _solve(equations: Array, levels: int, scales: Array) -> float:
    """Write the least-squares scales and return their gain; the equations are overwritten."""
    count = equations[0, 0]
    for p in range(levels):
        pivot, right = equations[p, p], equations[levels, p]
        # The scale is 0 where a level's signs depend linearly on those of the levels before it.
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
    """Write the edges and codes of the cells in which the nearest sum of levels is the same."""
    cells = 1 << (levels - 1)
    for cell in range(cells):
        # Bit i of the cell's number is the sign of level i + 1; level 0 has the sign +.
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
    """Cut every cell where the residual after the first `level` levels changes its sign.

    The number and total above an old edge are known, and move with it.
    """
    cells = 1 << (level - 1)
    for cell in range(cells - 1, -1, -1):
        value = 0.0
        for i in range(level):
            value += _signed(scales[i], codes[cell], i)
        cut = _rounded_down(value)
        # Cells are cut from the last to the first: the edges above this one have moved already.
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
    fitted: Array, unit: float, codes: Array, moved: Array, scales: Array, row: int
) -> None:
    """Write the scales made positive and sorted to descend, and change the codes accordingly."""
    levels = len(fitted)
    moved[:] = 0
    for level in range(levels):
        size, place = abs(fitted[level]), 0
        for other in range(levels):
            other_size = abs(fitted[other])
            place += other_size > size or (other_size == size and other < level)
        scales[place, row] = np.float32(size * unit)
        for cell in range(len(codes)):
            moved[cell] |= (codes[cell] >> level & 1 ^ int(fitted[level] < 0)) << place
    codes[:] = moved


# ---------------------------------------------------------------- rows


@part
def _magnitudes(x: Array, unit: float, m: Array) -> None:
    """Write |x| / unit, or 0 where the unit is NaN, which marks a row that is not finite.

    The unit is a power of two. The rest of `m`, which fills its columns, lies below all edges.
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
def _solve_rows(
    x: Array, levels: int, refit: bool, iterations: int, scales: Array, edges: Array, codes: Array
) -> None:
    """Solve rows.

    Parameters
    ----------
    x : array of float32, shape (rows, n)
    levels : int
    refit : bool
        Whether the solver is `refined`; else `alternating`.
    iterations : int
        The most iterations of `alternating`.
    scales : array of float32, shape (levels, rows)
        Descending; NaN in rows that are not finite.
    edges : array of float32, shape (rows, cells - 1)
    codes : array of uint16, shape (rows, cells)
        The codes of positive elements.
    """
    x, scales, edges, codes = uncounted(x, scales, edges, codes)
    cells = 1 << (levels - 1)
    stored = x.shape[1] <= LONGEST_KEPT
    m = np.empty(_padded(x.shape[1]) if stored else CHUNK, np.float32)
    four = np.empty(min(m.size, CHUNK) // 4, np.float32)
    moved = np.empty(cells, codes.dtype)
    number, total, sums = np.empty(cells), np.empty(cells), np.empty(cells)
    equations = np.empty((levels + 1, levels))
    fitted = np.empty(levels)
    for row in range(len(x)):
        elements, edge, code = x[row], edges[row], codes[row]
        unit = 1.0
        if stored:
            _magnitudes(elements, unit, m)
        _add_up(elements, unit, m, edge, range(1), number, total, four)
        if not total[0] < np.inf:
            unit = _UNIT if _is_finite(elements) else np.nan
            if stored:
                _magnitudes(elements, unit, m)
            _add_up(elements, unit, m, edge, range(1), number, total, four)
        code[0] = 1
        for level in range(levels):
            if level:
                _split(fitted, level, edge, code, number, total)
                _add_up(elements, unit, m, edge, range(1, 1 << level, 2), number, total, four)
            _set_equations(code, level + 1, number, total, equations)
            if refit:
                _solve(equations, level + 1, fitted)
            else:
                fitted[level] = _mean(equations, level, fitted)
        if not refit:
            gain = _solve(equations, levels, fitted)
            for _ in range(iterations):
                _nearest(fitted, levels, edge, code, sums)
                _add_up(elements, unit, m, edge, range(1, cells), number, total, four)
                _set_equations(code, levels, number, total, equations)
                raised = _solve(equations, levels, fitted)
                if not raised > gain:
                    break
                gain = raised
        if unit > 1:
            edge *= _UNIT
        _in_order(fitted, unit, code, moved, scales, row)


# ---------------------------------------------------------------- codes and values of elements


@part
def _of_four(x: Array, edges: Array, table: Array, mirror: Any, y: Array) -> None:
    """`_look_up` for a row with up to four cells: edges and entries stay in registers."""
    never = np.float32(np.inf)
    a = edges[0] if edges.size > 0 else never
    b, c = (edges[1], edges[2]) if edges.size > 1 else (never, never)
    p = table[0]
    q = table[1] if table.size > 1 else p
    r, s = (table[2], table[3]) if table.size > 2 else (q, q)
    for j in range(x.size):
        m = abs(x[j])
        entry = q if m > a else p
        entry = r if m > b else entry
        entry = s if m > c else entry
        y[j] = mirror - entry if x[j] <= 0 else entry


@part
def _of_eight(x: Array, edges: Array, table: Array, mirror: Any, y: Array) -> None:
    """The same with eight cells."""
    a, b, c, d, e, f, g = edges[0], edges[1], edges[2], edges[3], edges[4], edges[5], edges[6]
    p, q, r, s = table[0], table[1], table[2], table[3]
    t, u, v, w = table[4], table[5], table[6], table[7]
    for j in range(x.size):
        m = abs(x[j])
        entry = q if m > a else p
        entry = r if m > b else entry
        entry = s if m > c else entry
        entry = t if m > d else entry
        entry = u if m > e else entry
        entry = v if m > f else entry
        entry = w if m > g else entry
        y[j] = mirror - entry if x[j] <= 0 else entry


@loop
def _look_up(x: Array, edges: Array, table: Array, mirror: Any, y: Array) -> None:
    """Write, for each element of (rows, n), the entry of its cell in the table of its row.

    Elements that are not positive get `mirror` minus that entry.
    """
    x, edges, table, y = uncounted(x, edges, table, y)
    for row in range(len(x)):
        if table.shape[1] > 4:
            _of_eight(x[row], edges[row], table[row], mirror, y[row])
        else:
            _of_four(x[row], edges[row], table[row], mirror, y[row])


# ---------------------------------------------------------------- as the primitives are called


def _takes(x: Array, bits: Any, levels: int) -> bool:
    """Whether the loops here can solve such rows; others are sorted."""
    return x.dtype != np.float64 and np.ndim(bits) == 0 and levels <= search_rows.MAX_LEVELS


def _sorted(x: Array, bits: Any, levels: int, refit: bool, iterations: int) -> Any:
    """The lookup of rows that are solved by sorting them."""
    solver = Solver("refined" if refit else "alternating", levels, refit, iterations)
    return sorted_rows_loops.Lookup(x, bits, levels, None, solver)


def _solved(x: Array, levels: int, refit: bool, iterations: int) -> tuple[Array, Array, Array]:
    """The scales, (levels, rows), and the edges and codes of the cells of each row."""
    cells = 1 << (levels - 1)
    scales = np.empty((levels, len(x)), np.float32)
    edges = np.empty((len(x), cells - 1), np.float32)
    codes = np.empty((len(x), cells), np.uint16)
    _solve_rows(x, levels, refit, iterations, scales, edges, codes)
    return scales, edges, codes


def reconstruct_rows(
    x: Array, bits: Any, levels: int, refit: bool, iterations: int, *, y: Array
) -> None:
    """`search_rows.reconstruct_rows`."""
    if not _takes(x, bits, levels):
        _sorted(x, bits, levels, refit, iterations).approximate(x, bits, y)
        return
    wide = in_work_dtype(x)
    scales, edges, codes = _solved(wide, levels, refit, iterations)
    values = np.empty(codes.shape, y.dtype)
    decode(codes, np.uint8(levels), *scales[:, :, None], y=values)
    result = target(y, wide)
    # The value of -x is that of x, negated: 0 minus it, which is +0 where levels cancel.
    _look_up(wide, edges, values.astype(wide.dtype, copy=False), wide.dtype.type(0), result)
    store(result, y)


def solve_rows(
    x: Array, bits: Any, levels: int, refit: bool, iterations: int, *, scales: Array, signs: Array
) -> None:
    """`search_rows.solve_rows`."""
    if not _takes(x, bits, levels):
        lookup = _sorted(x, bits, levels, refit, iterations)
        scales[...] = lookup.scales
        code = lookup.codes(x, bits)
        for level in range(levels):
            level_signs(code, bits, np.uint8(level), sign=signs[level])
        return
    wide = in_work_dtype(x)
    fitted, edges, codes = _solved(wide, levels, refit, iterations)
    scales[...] = fitted[:, :, None]
    code = memory.scratch("codes", x.shape, np.uint16)
    _look_up(wide, edges, codes, np.uint16((1 << levels) - 1), code)
    for level in range(levels):
        level_signs(code, bits, np.uint8(level), sign=signs[level])
