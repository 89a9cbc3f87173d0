"""The solvers `refined` and `alternating` as compiled loops, on rows that are not sorted.

They find what `cubin.solvers.search` finds. The magnitudes above the lower edge of a cell are added
up in one pass over the row, which is in the cache. Elements with the same number of bits lie side
by side, so that each is compared with the edges of its own cells alone.

Several rows are solved together, in lanes: see `codebook_loops.py`. Sums are those of one row at a
time, or of all lanes where rows are short.

`number` and `total` have an entry for each of the 2^(d-1) cells of the elements of d bits, from
2^(d-1) on: how many magnitudes, or how much of their importance, lies above the lower edge of the
cell, and their sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cubin.codes.levels import pack_codes
from cubin.core import floats, memory
from cubin.core.floats import as_integers
from cubin.core.host.loops import (
    bare_loop,
    in_work_dtype,
    inner_loop,
    map_of,
    part,
    read_only,
    sum_above,
)
from cubin.core.libraries import Array
from cubin.solvers import codebook_loops, search, search_rows, sorted_rows_loops
from cubin.solvers.codebook_loops import Book, count, hand_out, set_nearest, split
from cubin.solvers.codebook_loops import solve as solve_equations
from cubin.solvers.solver import Solver
from cubin.solvers.sorted_rows import relative_weights

CHUNK = 1 << 12
"""Elements that stay in the first-level cache while they are compared with all edges in turn."""

LONGEST_KEPT = 1 << 19
"""Elements of the longest row without a map and importance whose magnitudes are stored. Those of
longer rows are computed again in every pass, chunk by chunk."""

SHORT = 1 << 6
"""Elements of the longest rows whose magnitudes lie side by side."""

TOGETHER = 1 << 7
"""The most rows that are solved together."""

KEPT = 1 << 15
"""Elements of rows that are solved together: they stay in the second-level cache."""

BELOW = -2
"""What fills up the columns: it lies below all edges."""

COLUMNS = 32
"""The sizes of what is added up are multiples of this: four columns that fill vector registers."""

LONGEST = sorted_rows_loops.LONGEST
"""A row must have fewer elements."""


@part
def _padded(size: int, columns: int = COLUMNS) -> int:
    return -(-size // columns) * columns


class Space(NamedTuple):
    """Scratch for rows.

    Attributes
    ----------
    m : array in the work dtype
        Magnitudes, those with few bits first. What fills up the columns lies below all edges. Of
        shape (lanes, room), or (room, lanes) where rows are short.
    weight, weighted : array in the work dtype, or None
        The importance of these elements, and that times their magnitudes. None where there is no
        importance: Numba then compiles nothing that works on it.
    starts : array of int64, shape (lanes, levels + 1)
        Where in `m` the elements of each number of bits start, and where the last ones stop. All
        have the highest number where there is no map.
    number, total : array of float64, shape (2^levels, lanes)
    sizes : array of float64, shape (levels, lanes)
        The best scales so far, of which none is negative.
    best : array of float64, shape (lanes,)
        Their gain.
    rising : array of bool, shape (lanes,)
        Whether it rose in the last iteration.
    factors : array in the work dtype, shape (2, lanes)
        By what magnitudes and importance are multiplied. 0 where a row counts as zeros, or as
        unweighted.
    """

    m: Array
    weight: Any
    weighted: Any
    starts: Array
    number: Array
    total: Array
    sizes: Array
    best: Array
    rising: Array
    factors: Array


def _space(n: int, levels: int, kind: Any, mapped: bool, weighted: bool, lanes: int) -> Space:
    """A `Space` for rows of n elements in the work dtype `kind`."""
    if n <= SHORT:
        elements = (_padded.py_func(n, 4) * (levels if mapped else 1), lanes)
    else:
        room = _padded.py_func(n)
        if mapped:
            # Each number of bits fills its columns, and one element is written behind the last.
            room += COLUMNS * levels + 1
        elif not weighted and n > LONGEST_KEPT:
            room = CHUNK
        elements = (lanes, room)
    arrays: dict[str, tuple[tuple[int, ...], Any]] = {
        "m": (elements, kind),
        "starts": ((lanes, levels + 1), np.int64),
        "number": ((1 << levels, lanes), np.float64),
        "total": ((1 << levels, lanes), np.float64),
        "sizes": ((levels, lanes), np.float64),
        "best": ((lanes,), np.float64),
        "rising": ((lanes,), np.bool_),
        "factors": ((2, lanes), kind),
    }
    if weighted:
        arrays |= {"weight": (elements, kind), "weighted": (elements, kind)}
    found = {name: memory.scratch(f"search {name}", *of) for name, of in arrays.items()}
    return Space(**{"weight": None, "weighted": None} | found)


# ---------------------------------------------------------------- sums


@part
def _add_up(
    x: Array, factor: float, bits: Array, weight: Any, space: Space, book: Book, lane: int,
    levels: int, step: int,
) -> None:  # fmt: skip
    """Write the numbers and totals of a row's magnitudes above the lower edges of cells.

    These are the cells of up to `levels` levels. The edges of the first ones do not move, so that
    they are counted with one level alone. With a `step` of 2, only the edges that came with the
    last level count.
    """
    m, starts = space.m[lane], space.starts[lane]
    number_above, total_above, lower = space.number, space.total, book.lower
    first_cell = 1 if levels > 1 else 0
    for depth in range(levels if step > 1 else 1, starts.size):
        base, cells = 1 << (depth - 1), 1 << (min(depth, levels) - 1)
        stop = starts[depth]
        for cell in range(first_cell, cells, step):
            number_above[base + cell, lane] = total_above[base + cell, lane] = 0
        for start in range(starts[depth - 1], stop, CHUNK):
            end = min(start + CHUNK, stop)
            if m.size < stop:
                chunk = m[: end - start]
                chunk[_take(x[start : start + CHUNK], factor, bits, depth, chunk) :] = BELOW
            else:
                chunk = m[start:end]
            for cell in range(first_cell, cells, step):
                edge = lower[cells + cell, lane]
                if weight is None:
                    total, above = sum_above(chunk, edge, chunk)
                    number = np.float64(above)
                else:
                    number, _ = sum_above(chunk, edge, space.weight[lane, start:end])
                    total, _ = sum_above(chunk, edge, space.weighted[lane, start:end])
                number_above[base + cell, lane] += number
                total_above[base + cell, lane] += total


@inner_loop
def _add_up_beside(
    space: Space, weight: Any, weighted: Any, book: Book, levels: int, step: int
) -> None:
    """The same for all lanes of short rows, four columns at a time.

    `weight` and `weighted` are those of `space`.
    """
    m, starts, lanes = space.m, space.starts[0], count(book.lanes)
    first_cell, zero = 1 if levels > 1 else 0, m.dtype.type(0)
    for depth in range(levels if step > 1 else 1, starts.size):
        base, cells = 1 << (depth - 1), 1 << (min(depth, levels) - 1)
        for cell in range(first_cell, cells, step):
            edge = book.lower[cells + cell]
            number, total = space.number[base + cell], space.total[base + cell]
            for k in range(lanes):
                number[k] = total[k] = 0
            for j in range(starts[depth - 1], starts[depth], 4):
                a, b, c, d = m[j], m[j + 1], m[j + 2], m[j + 3]
                if weight is None:
                    for k in range(lanes):
                        e = edge[k]
                        above = np.int32(np.int32(a[k] > e) + np.int32(b[k] > e))
                        above = np.int32(above + np.int32(c[k] > e) + np.int32(d[k] > e))
                        first = (a[k] if a[k] > e else zero) + (b[k] if b[k] > e else zero)
                        second = (c[k] if c[k] > e else zero) + (d[k] if d[k] > e else zero)
                        number[k] += above
                        total[k] += first + second
                else:
                    _add_chosen(a, b, c, d, edge, weight[j : j + 4], lanes, number)
                    _add_chosen(a, b, c, d, edge, weighted[j : j + 4], lanes, total)


@part
def _add_chosen(
    a: Array, b: Array, c: Array, d: Array, edge: Array, values: Array, lanes: int, total: Array
) -> None:
    """Add the values of elements whose magnitudes lie above an edge, in four columns."""
    zero = a.dtype.type(0)
    p, q, r, s = values[0], values[1], values[2], values[3]
    for k in range(lanes):
        e = edge[k]
        first = (p[k] if a[k] > e else zero) + (q[k] if b[k] > e else zero)
        second = (r[k] if c[k] > e else zero) + (s[k] if d[k] > e else zero)
        total[k] += first + second


# ---------------------------------------------------------------- least squares


@inner_loop
def _set_equations(space: Space, book: Book, lowest: int, levels: int) -> None:
    """Write the normal equations of the first `levels` levels.

    `lowest` is the least number of bits of elements.
    """
    equations, codes, lanes = book.equations, book.codes, count(book.lanes)
    target, mass, first = equations[len(book.fitted)], book.spare, book.gain
    for j in range(levels):
        for k in range(lanes):
            target[j, k] = 0
        for i in range(j + 1):
            for k in range(lanes):
                equations[j, i, k] = 0
    for depth in range(lowest, len(book.fitted) + 1):
        base, reached = 1 << (depth - 1), min(depth, levels)
        cells = 1 << (reached - 1)
        for j in range(reached):
            for k in range(lanes):
                equations[j, j, k] += space.number[base, k]
        for cell in range(cells - 1, -1, -1):
            code, at = codes[cells + cell], base + cell
            for k in range(lanes):
                mass[k], first[k] = space.number[at, k], space.total[at, k]
            if cell + 1 < cells:
                for k in range(lanes):
                    mass[k] -= space.number[at + 1, k]
                    first[k] -= space.total[at + 1, k]
            for j in range(reached):
                for k in range(lanes):
                    target[j, k] += first[k] if code[k] >> j & 1 else -first[k]
                for i in range(j):
                    for k in range(lanes):
                        alike = (code[k] >> j ^ code[k] >> i) & 1 == 0
                        equations[j, i, k] += mass[k] if alike else -mass[k]


@inner_loop
def _set_mean(book: Book, level: int) -> None:
    """Write the greedy scale of a level: the mean of its signs times the residuals before it."""
    equations, scales, lanes = book.equations, book.fitted, count(book.lanes)
    target = equations[len(scales)]
    for k in range(lanes):
        scales[level, k] = target[level, k]
    for i in range(level):
        for k in range(lanes):
            scales[level, k] -= equations[level, i, k] * scales[i, k]
    for k in range(lanes):
        number = equations[level, level, k]
        scales[level, k] = np.divide(scales[level, k], number if number > 0 else 1.0)


@inner_loop
def _move_sums(space: Space, book: Book, level: int) -> None:
    """Move the numbers and totals above the edges of `level` levels to where `split` puts them."""
    cells, lanes = 1 << (level - 1), count(book.lanes)
    for depth in range(level + 1, len(book.fitted) + 1):
        base = 1 << (depth - 1)
        for cell in range(cells - 1, 0, -1):
            for k in range(lanes):
                space.number[base + 2 * cell, k] = space.number[base + cell, k]
                space.total[base + 2 * cell, k] = space.total[base + cell, k]


@inner_loop
def _keep_better(space: Space, book: Book, levels: int) -> bool:
    """Keep the sizes of the scales of rows whose gain rose; return whether any did."""
    any_rose = False
    for k in range(count(book.lanes)):
        space.rising[k] = book.gain[k] > space.best[k]
        space.best[k] = max(space.best[k], book.gain[k])
        any_rose |= space.rising[k]
    for level in range(levels):
        for k in range(count(book.lanes)):
            size = abs(book.fitted[level, k])
            space.sizes[level, k] = size if space.rising[k] else space.sizes[level, k]
    return any_rose


# ---------------------------------------------------------------- rows


@inner_loop
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
    # The bit pattern of a power of two in float64.
    power = np.int64((max(exponent, 1) - largest // 2 + 1023) << 52).view(np.float64)
    unit = power if top > 0 else 0.0
    return np.nan if exponent == largest else unit


@inner_loop
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
    x: Array, factor: float, bits: Array, weight: Any, row: int, weight_factor: float,
    space: Space, lane: int,
) -> None:  # fmt: skip
    """Write the magnitudes and importance of a row, by numbers of bits.

    Elements without bits are left out. `factor` is 0 where the row counts as zeros, and
    `weight_factor` where it counts as unweighted. `weight` is that of all rows.
    """
    m, starts = space.m[lane], space.starts[lane]
    levels = starts.size - 1
    for depth in range(1 if bits.size else levels, levels + 1):
        begin = starts[depth - 1]
        at = begin + _take(x, factor, bits, depth, m[begin:])
        end = begin + _padded(at - begin)
        m[at:end] = BELOW
        if weight is not None:
            own, weighted = space.weight[lane], space.weighted[lane]
            if weight_factor > 0:
                _take(weight[row], weight_factor, bits, depth, own[begin:])
            else:
                own[begin:at] = 1
            own[at:end] = 0
            for j in range(begin, end):
                weighted[j] = own[j] * m[j]
        starts[depth] = end


@inner_loop
def _arrange_beside(
    x: Array, bits: Array, weight: Any, own_weight: Any, weighted: Any, space: Space
) -> None:
    """The same for all lanes of short rows, with room for all elements at each number of bits.

    There, those of other numbers of bits lie below all edges. `own_weight` and `weighted` are those
    of `space`.
    """
    m, (factor, weight_factor) = space.m, (space.factors[0], space.factors[1])
    below, one = m.dtype.type(BELOW), m.dtype.type(1)
    mapped = bits.shape[1] > 0
    (lanes, n), levels, begin = x.shape, space.starts.shape[1] - 1, 0
    for depth in range(1 if mapped else levels, levels + 1):
        for j in range(n):
            to = m[begin + j]
            for k in range(lanes):
                to[k] = abs(x[k, j]) * factor[k] if factor[k] > 0 else factor[k]
            if weight is not None:
                own, product = own_weight[begin + j], weighted[begin + j]
                for k in range(lanes):
                    own[k] = weight[k, j] * weight_factor[k] if weight_factor[k] > 0 else one
                    product[k] = own[k] * to[k]
            if mapped:
                for k in range(lanes):
                    to[k] = to[k] if bits[k, j] == depth else below
        begin += _padded(n, 4)
        m[begin - _padded(n, 4) + n : begin] = BELOW
        space.starts[:, depth] = begin


@part
def _solve_together(
    x: Array, factor: float, bits: Array, weight: Any, space: Space, book: Book, refit: bool,
    iterations: int, beside: Any,
) -> None:  # fmt: skip
    """Write the cells and scales of rows; `x`, `factor` and `bits` are those of a single one."""
    levels = len(book.fitted)
    lowest = 1 if bits.size else levels
    space.best[:], space.rising[:] = -np.inf, True
    # The levels are added one by one, then come the iterations of `alternating`.
    for step in range(levels + (0 if refit else iterations)):
        adding, reached = step < levels, min(step + 1, levels)
        if adding and step > 0:
            split(step, book)
            _move_sums(space, book, step)
        elif not adding:
            for depth in range(lowest, levels + 1):
                set_nearest(space.sizes, depth, book)
        added = 2 if adding else 1
        if beside is None:
            for lane in range(count(book.lanes)):
                # A row that did not get better keeps its cells.
                if space.rising[lane]:
                    _add_up(x, factor, bits, weight, space, book, lane, reached, added)
        else:
            _add_up_beside(space, space.weight, space.weighted, book, reached, added)
        _set_equations(space, book, lowest, reached)
        if reached < levels and not refit:
            _set_mean(book, step)
            continue
        solve_equations(book, reached)
        if reached == levels and not refit and not _keep_better(space, book, levels):
            break


@bare_loop
def _solve_rows(
    x: Array, words: Array, bits: Array, weight: Any, weight_words: Any, refit: bool,
    iterations: int, scales: Array, units: Array, inverse: Array, lower: Array, codes: Array,
    space: Space, book: Book, beside: Any,
) -> None:  # fmt: skip
    """Solve rows.

    Parameters
    ----------
    x : array of float32 or float64, shape (rows, n)
    words : array of uint32 or uint64, shape (rows, n)
        The bit patterns of `x`.
    bits : array of uint8, shape (rows, n), or (rows, 0) where there is no map
    weight, weight_words : array, shape (rows, n), or None
        The importance, in the dtype of x, and its bit patterns. A row of zeros counts as
        unweighted.
    refit : bool
        Whether the solver is `refined`; else `alternating`.
    iterations : int
        The most iterations of `alternating`.
    scales : array of float64, shape (rows, levels)
        Without a map they descend. They are in units of the row.
    units : array of float64, shape (rows,)
        0 for rows of zeros, NaN for those that are not finite.
    inverse : array in the dtype of x, shape (rows,)
        By what magnitudes are multiplied before they are compared with `lower`.
    lower : array in the dtype of x, shape (rows, cells)
    codes : array of uint16, shape (rows, cells)
        The cells of all levels, or with a map those of every number of levels.
    space : Space
    book : Book
    beside : True or None
        Whether rows are short, with magnitudes side by side. None if not: Numba compiles one of the
        two ways alone.
    """
    n, kind, lanes = x.shape[1], inverse.dtype.type, count(book.lanes)
    mapped, stored = bits.shape[1] > 0, space.m.shape[1] >= _padded(n)
    space.starts[:, :-1], space.starts[:, -1] = 0, _padded(n)
    for following in range(0, len(x), lanes):
        # The last ones are as many: some rows are solved twice.
        start, factor = min(following, len(x) - lanes), kind(0)
        for lane in range(lanes):
            row = start + lane
            own, own_bits = x[row], bits[row]
            unit, weight_unit = _unit(words[row], own_bits), 0.0
            if weight is not None:
                weight_unit = _unit(weight_words[row], own_bits)
            # A row that is not finite counts as zeros.
            factor = kind(1 / unit if unit > 0 else 0)
            weight_factor = kind(1 / weight_unit if weight_unit > 0 else 0)
            space.factors[0, lane], space.factors[1, lane] = factor, weight_factor
            if beside is None and stored:
                _arrange(own, factor, own_bits, weight, row, weight_factor, space, lane)
            units[row], inverse[row] = unit, factor if unit > 0 else 1
        rows = slice(start, start + lanes)
        if beside is not None:
            if weight is None:
                _arrange_beside(x[rows], bits[rows], None, None, None, space)
            else:
                of_rows = weight[rows]
                _arrange_beside(x[rows], bits[rows], of_rows, space.weight, space.weighted, space)
        _solve_together(
            x[start], factor, bits[start], weight, space, book, refit, iterations, beside
        )
        hand_out(book, mapped, scales[rows], lower[rows], codes[rows])


# ---------------------------------------------------------------- as the solvers are called


def _weight(importance: Array, bits: Any, x: Array) -> Array:
    """The importance in the dtype of x. Where that might overflow, it is divided by its size."""
    if floats.work_dtype(importance.dtype) == x.dtype:
        return in_work_dtype(importance)
    return read_only(relative_weights(np, importance, bits).astype(x.dtype))


class Lookup(sorted_rows_loops.Lookup):
    """Solve rows as `sorted_rows_loops.Lookup` does, without sorting them; not for `optimal`."""

    def __init__(
        self, x: Array, bits: Any, levels: int, importance: Array | None, solver: Solver
    ) -> None:
        work = in_work_dtype(x)
        weight = None if importance is None else _weight(importance, bits, work)
        of_elements = map_of(bits, len(x))
        scales = self._allocate(work, bits, levels)
        units = np.empty((len(x), 1))
        lanes = max(1, min(TOGETHER, KEPT // x.shape[1], len(x)))
        space = _space(x.shape[1], levels, work.dtype, self._mapped, importance is not None, lanes)
        book = codebook_loops.book(levels, work.dtype, lanes)
        _solve_rows(
            work, as_integers(work), of_elements, weight,
            None if weight is None else as_integers(weight), solver.refit, search.limit(solver),
            scales, units[:, 0], self._inverse, self._lower, self._codes, space, book,
            True if work.shape[1] <= SHORT else None,
        )  # fmt: skip
        scales *= units
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
