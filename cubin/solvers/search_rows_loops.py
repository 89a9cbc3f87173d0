"""The solvers `refined` and `alternating` as compiled loops, which go row by row without sorting.

They find what `cubin.solvers.search` finds. The magnitudes above the lower edge of a cell are added
up in one pass over the row, which is in the cache. Elements with the same number of bits lie side
by side, so that each is compared with the edges of its own cells alone.

The arrays of cells hold those of all numbers of levels, as in `sorted_rows_loops.py`. `number` and
`total` have an entry for each of the 2^(d-1) cells of the elements of d bits, from 2^(d-1) on: how
many magnitudes, or how much of their importance, lies above the lower edge of the cell, and their
sum. `equations` are the normal equations of least squares: the lower triangle, below it the right
side as one more row, and the diagonal as the last row.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from cubin.codes.levels import pack_codes
from cubin.core import floats, memory
from cubin.core.floats import as_integers
from cubin.core.host.loops import (
    in_work_dtype,
    loop,
    map_of,
    part,
    read_only,
    sum_in_lanes,
)
from cubin.core.host.loops import (
    uncounted as _uncounted,
)
from cubin.core.libraries import Array
from cubin.solvers import search, search_rows, sorted_rows_loops
from cubin.solvers.codebook import DEPENDENT
from cubin.solvers.solver import Solver
from cubin.solvers.sorted_rows import relative_weights
from cubin.solvers.sorted_rows_loops import rounded_down

uncounted: Any = _uncounted
"""As a function of any arrays: Numba's decorator hides its types."""

CHUNK = 1 << 12
"""Elements that stay in the first-level cache while they are compared with all edges in turn."""

LONGEST_KEPT = 1 << 19
"""Elements of the longest row without a map and importance whose magnitudes are stored. Those of
longer rows are computed again in every pass, chunk by chunk."""

BELOW = -2
"""What fills up the columns: it lies below all edges."""

COLUMNS = 32
"""The sizes of what is added up are multiples of this: four columns that fill vector registers."""

LONGEST = sorted_rows_loops.LONGEST
"""A row must have fewer elements."""


@part
def _padded(size: int) -> int:
    return -(-size // COLUMNS) * COLUMNS


class Space(NamedTuple):
    """Scratch for a row.

    Attributes
    ----------
    m : array in the work dtype
        Magnitudes, those with few bits first. What fills up the columns lies below all edges.
    weight, weighted : array in the work dtype
        The importance of these elements, and that times their magnitudes.
    starts : array of int64, shape (levels + 1,)
        Where in `m` the elements of each number of bits start, and where the last ones stop. All
        have the highest number where there is no map.
    lower : array in the work dtype, shape (2^levels,)
    codes, moved : array of uint16, shape (2^levels,)
    number, total : array of float64, shape (2^levels,)
    sums : array of float64, shape (2^(levels - 1),)
    of_four : array in the work dtype, shape (CHUNK / 4,)
    equations : array of float64, shape (levels + 2, levels)
    fitted : array of float64, shape (levels,)
    """

    m: Array
    weight: Array
    weighted: Array
    starts: Array
    lower: Array
    codes: Array
    moved: Array
    number: Array
    total: Array
    sums: Array
    of_four: Array
    equations: Array
    fitted: Array


def _space(n: int, levels: int, kind: Any, mapped: bool, weighted: bool) -> Space:
    """A `Space` for rows of n elements in the work dtype `kind`."""
    room, states = _padded.py_func(n), 1 << levels
    if mapped:
        # Each number of bits fills its columns, and one element is written behind the last.
        room += COLUMNS * levels + 1
    elif not weighted and n > LONGEST_KEPT:
        room = CHUNK
    weights = room if weighted else 0
    arrays: dict[str, tuple[tuple[int, ...], Any]] = {
        "m": ((room,), kind),
        "weight": ((weights,), kind),
        "weighted": ((weights,), kind),
        "starts": ((levels + 1,), np.int64),
        "lower": ((states,), kind),
        "codes": ((states,), np.uint16),
        "moved": ((states,), np.uint16),
        "number": ((states,), np.float64),
        "total": ((states,), np.float64),
        "sums": ((states // 2,), np.float64),
        "of_four": ((CHUNK // 4,), kind),
        "equations": ((levels + 2, levels), np.float64),
        "fitted": ((levels,), np.float64),
    }
    return Space(**{name: memory.scratch(f"search {name}", *of) for name, of in arrays.items()})


# ---------------------------------------------------------------- sums


@part
def _sums_of_four(m: Array, edge: float, sums: Array) -> int:
    """Write the sums, four magnitudes each, of those above an edge; return their number.

    Four are added in the work dtype, in pairs, so that equal numbers do not round.
    """
    zero, below, n = m.dtype.type(0), np.int32(0), sums.size
    for j in range(n):
        a, b, c, d = m[j], m[j + n], m[j + 2 * n], m[j + 3 * n]
        below = np.int32(below + (a <= edge) + (b <= edge) + (c <= edge) + (d <= edge))
        first = (zero if a <= edge else a) + (zero if b <= edge else b)
        second = (zero if c <= edge else c) + (zero if d <= edge else d)
        sums[j] = first + second
    return m.size - below


@loop
def _chosen_sum(m: Array, edge: float, values: Array, sums: Array) -> float:
    """The sum of the values of elements whose magnitudes lie above an edge; `sums` is scratch."""
    zero, n = m.dtype.type(0), m.size // 4
    for j in range(n):
        a, b, c, d = values[j], values[j + n], values[j + 2 * n], values[j + 3 * n]
        first = (zero if m[j] <= edge else a) + (zero if m[j + n] <= edge else b)
        second = (zero if m[j + 2 * n] <= edge else c) + (zero if m[j + 3 * n] <= edge else d)
        sums[j] = first + second
    return sum_in_lanes(sums, n)


@part
def _add_up(x: Array, factor: float, bits: Array, space: Space, levels: int, step: int) -> None:
    """Write the numbers and totals of magnitudes above the lower edges of cells.

    These are the cells of up to `levels` levels. The edges of the first ones do not move, so that
    they are counted with one level alone. With `added`, only the edges that came with the last
    level count.
    """
    m, weight, weighted, all_lower = space.m, space.weight, space.weighted, space.lower
    starts, number, total = space.starts, space.number, space.total
    first_cell = 1 if levels > 1 else 0
    for depth in range(levels if step > 1 else 1, starts.size):
        base, cells = 1 << (depth - 1), 1 << (min(depth, levels) - 1)
        lower, stop = all_lower[cells : 2 * cells], starts[depth]
        for cell in range(first_cell, cells, step):
            number[base + cell], total[base + cell] = 0, 0
        for start in range(starts[depth - 1], stop, CHUNK):
            end = min(start + CHUNK, stop)
            sums = space.of_four[: (end - start) // 4]
            if m.size < stop:
                chunk = m[: end - start]
                chunk[_take(x[start : start + CHUNK], factor, bits, depth, chunk) :] = BELOW
            else:
                chunk = m[start:end]
            for cell in range(first_cell, cells, step):
                edge = lower[cell] if cell else m.dtype.type(-1)
                if weight.size:
                    number[base + cell] += _chosen_sum(chunk, edge, weight[start:end], sums)
                    total[base + cell] += _chosen_sum(chunk, edge, weighted[start:end], sums)
                else:
                    number[base + cell] += _sums_of_four(chunk, edge, sums)
                    total[base + cell] += sum_in_lanes(sums, sums.size)


# ---------------------------------------------------------------- least squares


@part
def _set_equations(space: Space, levels: int) -> None:
    """Write the normal equations of the first `levels` levels."""
    equations, codes, starts = space.equations, space.codes, space.starts
    number, total = space.number, space.total
    for j in range(levels):
        equations[levels, j] = equations[levels + 1, j] = 0
        for i in range(j):
            equations[j, i] = 0
    for depth in range(1, len(starts)):
        if starts[depth - 1] == starts[depth]:
            continue
        base, reached = 1 << (depth - 1), min(depth, levels)
        cells = 1 << (reached - 1)
        for j in range(reached):
            equations[levels + 1, j] += number[base]
        above, above_total = 0.0, 0.0
        for cell in range(cells - 1, -1, -1):
            mass, first = number[base + cell] - above, total[base + cell] - above_total
            above, above_total = number[base + cell], total[base + cell]
            code = codes[cells + cell]
            for j in range(reached):
                equations[levels, j] += first if code >> j & 1 else -first
                for i in range(j):
                    alike = code >> j & 1 == code >> i & 1
                    equations[j, i] += mass if alike else -mass
    for j in range(levels):
        equations[j, j] = equations[levels + 1, j]


@part
def _mean(equations: Array, level: int, scales: Array) -> float:
    """The greedy scale of a level: the mean of its signs times the residuals of those before."""
    total, count = equations[level + 1, level], equations[level, level]
    for i in range(level):
        total -= equations[level, i] * scales[i]
    return total / (count if count > 0 else 1.0)


@loop
def _solve(equations: Array, levels: int, scales: Array) -> float:
    """Write the least-squares scales and return their gain; the equations are overwritten."""
    for p in range(levels):
        pivot, right = equations[p, p], equations[levels, p]
        # The scale is 0 where a level's signs depend linearly on those of the levels before it.
        inverse = 1 / pivot if pivot > DEPENDENT * equations[levels + 1, p] else 0.0
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


@part
def _set_nearest(space: Space, levels: int) -> None:
    """Write the cells in which the nearest sum of the first `levels` levels is the same."""
    scales, sums, all_lower, all_codes = space.fitted, space.sums, space.lower, space.codes
    cells = 1 << (levels - 1)
    lower, codes = all_lower[cells : 2 * cells], all_codes[cells : 2 * cells]
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
    for cell in range(1, cells):
        lower[cell] = rounded_down(sums[cell - 1] / 2 + sums[cell] / 2, lower)


@part
def _split(space: Space, level: int) -> None:
    """Cut every cell of `level` levels where the residual after them changes its sign.

    The number and total above an old edge are known, and move with it.
    """
    lower, codes, scales, starts = space.lower, space.codes, space.fitted, space.starts
    number, total = space.number, space.total
    cells = 1 << (level - 1)
    old, new = lower[cells : 2 * cells], lower[2 * cells : 4 * cells]
    for cell in range(cells):
        code, value = codes[cells + cell], 0.0
        for i in range(level):
            value += scales[i] if code >> i & 1 else -scales[i]
        cut = new.dtype.type(rounded_down(value, new))
        if cell > 0:
            new[2 * cell] = old[cell]
            cut = max(cut, old[cell])
        if cell + 1 < cells:
            cut = min(cut, old[cell + 1])
        new[2 * cell + 1] = cut
        codes[2 * (cells + cell)] = code
        codes[2 * (cells + cell) + 1] = code | 1 << level
    for depth in range(level + 1, len(starts)):
        base = 1 << (depth - 1)
        for cell in range(cells - 1, 0, -1):
            number[base + 2 * cell] = number[base + cell]
            total[base + 2 * cell] = total[base + cell]


@part
def _hand_out(
    space: Space, unit: float, mapped: bool, scales: Array, lower: Array, codes: Array
) -> None:
    """Write the scales made positive, and the cells with codes changed accordingly.

    Without a map the scales are sorted to descend, and only the cells of all levels are written.
    """
    fitted, all_lower, all_codes, moved = space.fitted, space.lower, space.codes, space.moved
    levels = len(fitted)
    begin = 0 if mapped else 1 << (levels - 1)
    moved[:] = 0
    for level in range(levels):
        size, place = abs(fitted[level]), 0
        for other in range(levels):
            other_size = abs(fitted[other])
            place += other_size > size or (other_size == size and other < level)
        place = level if mapped else place
        scales[place] = size * unit
        # With a map, the cells of fewer levels come first, and do not have this one.
        for cell in range(1 << level if mapped else 0, len(codes)):
            bit = all_codes[begin + cell] >> level & 1 ^ int(fitted[level] < 0)
            moved[cell] |= bit << place
    for cell in range(len(codes)):
        codes[cell] = moved[cell]
        lower[cell] = all_lower[begin + cell]


# ---------------------------------------------------------------- rows


@loop
def _unit(words: Array, bits: Array) -> float:
    """A power of two near the largest magnitude of a row: 0 for zeros, NaN if it is not finite.

    `words` are the bit patterns of the elements. Those without bits do not count.
    """
    digits = 23 if words.itemsize == 4 else 52
    kind = words.dtype.type
    magnitude, top = kind((1 << (8 * words.itemsize - 1)) - 1), kind(0)
    if bits.size:
        for j in range(words.size):
            top = max(top, kind(words[j] & magnitude) if bits[j] > 0 else kind(0))
    else:
        for j in range(words.size):
            top = max(top, kind(words[j] & magnitude))
    largest = (1 << (8 * words.itemsize - 1 - digits)) - 1
    exponent = np.int64(top >> kind(digits))
    unit = math.ldexp(1.0, max(exponent, 1) - largest // 2) if top > 0 else 0.0
    return np.nan if exponent == largest else unit


@loop
def _take(x: Array, factor: float, bits: Array, depth: int, m: Array) -> int:
    """Write |x| * factor of the elements of `depth` bits, or of all where there is no map.

    Where the factor is 0, which marks a row that counts as zeros, write 0. Return their number.
    """
    zero, size = m.dtype.type(0), 0
    if bits.size:
        for j in range(x.size):
            # It is overwritten by the next one, unless it is of this number of bits.
            m[size] = abs(x[j]) * factor if factor > 0 else zero
            size += bits[j] == depth
        return size
    for j in range(x.size):
        m[j] = abs(x[j]) * factor if factor > 0 else zero
    return x.size


@part
def _arrange(
    x: Array, factor: float, bits: Array, weight: Array, weight_factor: float, space: Space
) -> None:
    """Write the magnitudes and importance of a row, by numbers of bits.

    Elements without bits are left out. `factor` is 0 where the row counts as zeros, and
    `weight_factor` where it counts as unweighted.
    """
    m, own, weighted, starts = space.m, space.weight, space.weighted, space.starts
    levels = starts.size - 1
    for depth in range(1 if bits.size else levels, levels + 1):
        begin = starts[depth - 1]
        at = begin + _take(x, factor, bits, depth, m[begin:])
        end = begin + _padded(at - begin)
        m[at:end] = BELOW
        if weight.size:
            if weight_factor > 0:
                _take(weight, weight_factor, bits, depth, own[begin:])
            else:
                own[begin:at] = 1
            own[at:end] = 0
            for j in range(begin, end):
                weighted[j] = own[j] * m[j]
        starts[depth] = end


@part
def _solve_row(
    x: Array, factor: float, bits: Array, space: Space, refit: bool, iterations: int
) -> None:
    """Write the cells and scales of a row."""
    equations, fitted = space.equations, space.fitted
    levels, gain = fitted.size, -np.inf
    # Without levels there is one code, too, which a map hands out.
    space.codes[0], space.codes[1] = 0, 1
    # The levels are added one by one, then come the iterations of `alternating`.
    for step in range(levels + (0 if refit else iterations)):
        adding, count = step < levels, min(step + 1, levels)
        if adding and step > 0:
            _split(space, step)
        elif not adding:
            for reached in range(1 if bits.size else levels, levels + 1):
                _set_nearest(space, reached)
        _add_up(x, factor, bits, space, count, 2 if adding else 1)
        _set_equations(space, count)
        if count < levels and not refit:
            fitted[step] = _mean(equations, step, fitted)
            continue
        raised = _solve(equations, count, fitted)
        if not (adding or raised > gain):
            break
        gain = raised


@loop
def _solve_rows(
    x: Array, words: Array, bits: Array, weight: Array, weight_words: Array, refit: bool,
    iterations: int, scales: Array, inverse: Array, lower: Array, codes: Array, space: Space,
) -> None:  # fmt: skip
    """Solve rows.

    Parameters
    ----------
    x : array of float32 or float64, shape (rows, n)
    words : array of uint32 or uint64, shape (rows, n)
        The bit patterns of `x`.
    bits : array of uint8, shape (rows, n), or (rows, 0) where there is no map
    weight, weight_words : array, shape (rows, n) or (rows, 0)
        The importance, in the dtype of x, and its bit patterns. A row of zeros counts as
        unweighted.
    refit : bool
        Whether the solver is `refined`; else `alternating`.
    iterations : int
        The most iterations of `alternating`.
    scales : array of float64, shape (rows, levels)
        Without a map they descend; NaN in rows that are not finite.
    inverse : array in the dtype of x, shape (rows,)
        By what magnitudes are multiplied before they are compared with `lower`.
    lower : array in the dtype of x, shape (rows, cells)
    codes : array of uint16, shape (rows, cells)
        The cells of all levels, or with a map those of every number of levels.
    space : Space
    """
    x, words, bits, weight, weight_words = uncounted(x, words, bits, weight, weight_words)
    scales, inverse, lower, codes = uncounted(scales, inverse, lower, codes)
    space = Space(*uncounted(*space))
    n, levels, kind = x.shape[1], scales.shape[1], inverse.dtype.type
    mapped, weighted = bits.shape[1] > 0, weight.shape[1] > 0
    stored = space.m.size >= _padded(n)
    space.starts[:levels], space.starts[levels] = 0, _padded(n)
    for row in range(len(x)):
        unit, weight_unit = _unit(words[row], bits[row]), 0.0
        if weighted:
            weight_unit = _unit(weight_words[row], bits[row])
        # A row that is not finite counts as zeros.
        factor = kind(1 / unit if unit > 0 else 0)
        if stored:
            weight_factor = kind(1 / weight_unit if weight_unit > 0 else 0)
            _arrange(x[row], factor, bits[row], weight[row], weight_factor, space)
        _solve_row(x[row], factor, bits[row], space, refit, iterations)
        inverse[row] = factor if unit > 0 else 1
        _hand_out(space, unit, mapped, scales[row], lower[row], codes[row])


# ---------------------------------------------------------------- as the solvers are called


def _weight(importance: Array | None, bits: Any, x: Array) -> Array:
    """The importance in the dtype of x. Where that might overflow, it is divided by its size."""
    if importance is None:
        return read_only(np.empty((len(x), 0), x.dtype))
    if floats.work_dtype(importance.dtype) == x.dtype:
        return in_work_dtype(importance)
    return read_only(relative_weights(np, importance, bits).astype(x.dtype))


class Lookup(sorted_rows_loops.Lookup):
    """Solve rows as `sorted_rows_loops.Lookup` does, without sorting them; not for `optimal`."""

    def __init__(
        self, x: Array, bits: Any, levels: int, importance: Array | None, solver: Solver
    ) -> None:
        work = in_work_dtype(x)
        weight = _weight(importance, bits, work)
        of_elements = map_of(bits, len(x))
        scales = self._allocate(work, bits, levels)
        space = _space(x.shape[1], levels, work.dtype, self._mapped, importance is not None)
        _solve_rows(
            work, as_integers(work), of_elements, weight, as_integers(weight), solver.refit,
            search.limit(solver), scales, self._inverse, self._lower, self._codes, space,
        )  # fmt: skip
        self._keep(scales)


def _lookup(x: Array, bits: Any, levels: int, refit: bool, iterations: int) -> Any:
    """What solves rows in the faster way: comparing them with all edges, or sorting them."""
    solver = Solver("refined" if refit else "alternating", levels, refit, iterations)
    compares = search_rows.compares(levels, iterations, np.ndim(bits) > 0)
    kind = Lookup if compares else sorted_rows_loops.Lookup
    return kind(x, bits, levels, None, solver)


def reconstruct_rows(
    x: Array, bits: Any, levels: int, refit: bool, iterations: int, *, y: Array
) -> None:
    """`search_rows.reconstruct_rows`."""
    _lookup(x, bits, levels, refit, iterations).approximate(x, bits, y)


def solve_rows(
    x: Array, bits: Any, levels: int, refit: bool, iterations: int, *, scales: Array, signs: Array
) -> None:
    """`search_rows.solve_rows`."""
    lookup = _lookup(x, bits, levels, refit, iterations)
    scales[...] = lookup.scales
    pack_codes(lookup.codes(x, bits), bits, signs)
