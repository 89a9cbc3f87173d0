"""The solvers on sorted rows as compiled loops, which go row by row.

They do what `search.py`, `codebook.py` and `lookup.py` do with many rows at once, by the same
operations in the same order, for any number of levels, with bit maps and importance.

Each row is solved on its own. So neither the number of threads nor the other rows change a result.
LLVM may not reassociate or contract operations. So the processor does not change a result either.

The cells are those of `codebook_loops.py`, with a single lane.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cubin.core.floats import as_integers
from cubin.core.host.loops import in_work_dtype, inner_loop, loop, part, read_only, store, target
from cubin.core.host.loops import (
    uncounted as _uncounted,
)
from cubin.core.libraries import Array
from cubin.solvers import codebook_loops, search
from cubin.solvers.codebook import DEPENDENT
from cubin.solvers.codebook_loops import Book, hand_out, set_nearest, split
from cubin.solvers.codebook_loops import solve as solve_equations
from cubin.solvers.lookup_loops import MOST, NUMBERS, find_in_registers
from cubin.solvers.search import ADDED, NORMAL, NORMAL_MEAN, SCREENED, SETTLED
from cubin.solvers.solver import Solver
from cubin.solvers.sorted_rows import power_of_two, relative_weights

uncounted: Any = _uncounted
"""As a function of any arrays: Numba's decorator hides its types."""

CHUNK = 1 << 10
"""Elements that stay in the first-level cache while they are compared with all edges in turn."""

LONGEST = 1 << 32
"""A row must have fewer elements: half of a 64-bit sort key holds the position."""

SELECTED = 8
"""With up to so many cells, edges and entries stay in registers."""

COUNTED = 64
"""With up to so many cells, comparing with every edge is faster than bisection."""

_TABLED = 8
"""The most levels for which the signs of every code are kept in a table."""

_NORMAL = np.array([[0.0] * 8] * 4 + [[*NORMAL[count], *[0.0] * (8 - count)] for count in NORMAL])
"""The best scales for normal samples, one line for each number of levels; 0 where unknown."""


# ---------------------------------------------------------------- rows in order


class SortedBlock(NamedTuple):
    """The magnitudes of rows, sorted by the number of bits and then by size: see `SortedRows`.

    Attributes
    ----------
    values : array, shape (rows, n)
    first : array of float64, shape (rows, n + 1)
        The running sums of the weighted magnitudes.
    mass : array of float64, shape (rows, n + 1)
        The running sums of the weights; (1, 0) where there are none.
    starts : array of int64, shape (rows, depths + 1)
        Where the elements with each number of bits start, and where the last ones stop. With a map
        the numbers are 1, 2, ...; without one there is a single number.
    """

    values: Array
    first: Array
    mass: Array
    starts: Array


class Row(NamedTuple):
    """A row of a `SortedBlock`."""

    values: Array
    first: Array
    mass: Array
    starts: Array


@loop
def _add_up(values: Array, first: Array) -> None:
    """Write the running sums of rows."""
    for row in range(len(values)):
        total = 0.0
        first[row, 0] = total
        for j in range(values.shape[1]):
            total += np.float64(values[row, j])
            first[row, j + 1] = total


@loop
def _add_up_weighted(values: Array, first: Array, mass: Array) -> None:
    """Write the running sums of weighted magnitudes and of weights.

    At first `mass` holds the weights, from its column 1 on; they are overwritten.
    """
    for row in range(len(values)):
        total = weight = 0.0
        first[row, 0] = mass[row, 0] = total
        for j in range(values.shape[1]):
            share = mass[row, j + 1]
            total += np.float64(values[row, j]) * share
            weight += share
            first[row, j + 1] = total
            mass[row, j + 1] = weight


@loop
def _set_keys(words: Array, keys: Array) -> None:
    """Write sort keys: the bit pattern of a magnitude, followed by its position in the row."""
    for row in range(len(words)):
        for j in range(words.shape[1]):
            keys[row, j] = np.uint64(words[row, j]) << np.uint64(32) | np.uint64(j)


@loop
def _place(
    order: Array, magnitude: Array, bits: Array, weight: Array, starts: Array, values: Array,
    mass: Array,
) -> None:  # fmt: skip
    """Write magnitudes and weights in order: by the number of bits, then as in `order`.

    This is a counting sort. `bits` and `weight` have the shape (0, 0) where there are none.
    """
    depths = starts.shape[1] - 1
    following = np.zeros(depths + 2, np.int64)
    mapped, weighted = len(bits) > 0, len(weight) > 0
    for row in range(len(magnitude)):
        following[:] = 0
        if mapped:
            for j in range(magnitude.shape[1]):
                following[bits[row, j] + 1] += 1
            for depth in range(1, depths + 2):
                following[depth] += following[depth - 1]
            for depth in range(1, depths + 2):
                starts[row, depth - 1] = following[depth]
        else:
            starts[row, 0], starts[row, 1] = 0, magnitude.shape[1]
        for j in range(magnitude.shape[1]):
            source = order[row, j]
            number: Any = bits[row, source] if mapped else np.uint8(0)
            at = following[number]
            following[number] = at + 1
            values[row, at] = magnitude[row, source]
            if weighted:
                mass[row, at + 1] = weight[row, source]


def arrange(magnitude: Array, bits: Array, levels: int, weight: Array) -> SortedBlock:
    """Sort rows.

    Parameters
    ----------
    magnitude : array of float32 or float64, shape (rows, n)
        Overwritten.
    bits : array of uint8, shape (rows, n) or (0, 0)
    levels : int
    weight : array of float64, shape (rows, n) or (0, 0)

    Returns
    -------
    SortedBlock
    """
    count, length = magnitude.shape
    first = np.empty((count, length + 1))
    if not (len(bits) or len(weight)):
        magnitude.sort(axis=1)
        _add_up(magnitude, first)
        starts = np.empty((count, 2), np.int64)
        starts[:] = 0, length
        return SortedBlock(magnitude, first, np.empty((1, 0)), starts)
    values = np.empty_like(magnitude)
    starts = np.empty((count, levels + 1 if len(bits) else 2), np.int64)
    mass = np.empty((count, length + 1) if len(weight) else (1, 0))
    order = _order(magnitude, len(weight) > 0)
    _place(order, magnitude, bits, weight, starts, values, mass)
    if len(weight):
        _add_up_weighted(values, first, mass)
    else:
        _add_up(values, first)
    return SortedBlock(values, first, mass, starts)


def _order(magnitude: Array, weighted: bool) -> Array:
    """The positions of ascending magnitudes, as uint64.

    The sums of weights depend on the order of equal magnitudes. Only a stable sort has the same one
    on every processor. For float32 there is a faster way to it: keys that end on the position.
    """
    if magnitude.dtype == np.float32:
        keys = np.empty(magnitude.shape, np.uint64)
        _set_keys(as_integers(magnitude), keys)
        keys.sort(axis=1)
        keys &= np.uint64(LONGEST - 1)
        return keys
    return magnitude.argsort(axis=1, kind="stable" if weighted else None).view(np.uint64)


# ---------------------------------------------------------------- least squares


class Space(NamedTuple):
    """Scratch for the search of a row. No content is passed on from one row to the next.

    Attributes
    ----------
    book : Book
        Of one lane.
    lower, codes : array
        Those of the book, without the axis of lanes.
    positions : array of uint64, shape (cells + 1,)
    signs : array of float64, shape (codes, levels)
        +-1 for every code; with more than `_TABLED` levels, for the code at hand alone.
    products : array of float64, shape (codes, pairs)
        The products of the signs of level i and a level j before it, at i (i - 1) / 2 + j.
    gram, target : array of float64
        The share in the normal equations of the elements with one number of bits, with pairs as in
        `products`.
    """

    book: Book
    lower: Array
    codes: Array
    positions: Array
    signs: Array
    products: Array
    gram: Array
    target: Array


@inner_loop
def _set_signs(code: int, signs: Array, products: Array, at: int, levels: int) -> None:
    """Write the signs of a code and their products."""
    for i in range(levels):
        signs[at, i] = 1.0 if code >> i & 1 else -1.0
        for j in range(i):
            products[at, i * (i - 1) // 2 + j] = signs[at, i] * signs[at, j]


@loop
def _space(levels: int, book: Book) -> Space:
    """A `Space` for rows of up to `levels` levels."""
    cells, pairs = 1 << (levels - 1), levels * (levels - 1) // 2
    tabled = 2 * cells if levels <= _TABLED else 1
    signs, products = np.empty((tabled, levels)), np.empty((tabled, pairs))
    if levels <= _TABLED:
        for code in range(tabled):
            _set_signs(code, signs, products, code, levels)
    return Space(
        book,
        book.lower.ravel(),
        book.codes.ravel(),
        np.empty(cells + 1, np.uint64),
        signs,
        products,
        np.empty(pairs),
        np.empty(levels),
    )


@inner_loop
def _find_positions(values: Array, start: int, stop: int, lower: Array, positions: Array) -> None:
    """Write where in the row the elements of each cell start, and where the last ones stop.

    This is a bisection for every edge, of elements as many as a power of two: the first comparison
    chooses between those at the start and those at the end. Then what a comparison gives is a bit
    of the position, which needs no branch. Processors work on several edges at once. Were they in
    the inner loop, LLVM would read with vectors of addresses, which takes five times as long.
    """
    cells, one, steps = len(lower), np.uint64(1), np.uint64(0)
    positions[0], positions[cells] = start, stop
    while np.uint64(stop - start) >> steps > one:
        steps += one
    last = np.uint64(stop) - (one << steps)
    for cell in range(1, cells):
        # The element before the position: one before the first, modulo 2^64, is none.
        edge, step = lower[cell], steps
        before = last if values[last] <= edge else np.uint64(start) - one
        while step:
            step -= one
            before += np.uint64(values[before + (one << step)] <= edge) << step
        positions[cell] = before + one


@inner_loop
def _add_cells(row: Row, space: Space, codes: Array, levels: int) -> float:
    """Write the share of some cells in the normal equations; return their elements' weight."""
    positions, first, mass = space.positions, row.first, row.mass
    signs, products = space.signs, space.products
    gram, target = space.gram, space.target
    pairs, weighted, tabled = levels * (levels - 1) // 2, len(mass) > 0, len(signs) > 1
    for pair in range(pairs):
        gram[pair] = 0
    for level in range(levels):
        target[level] = 0
    total = 0.0
    for cell in range(len(codes)):
        start, stop = positions[cell], positions[cell + 1]
        cell_first = first[stop] - first[start]
        cell_mass = mass[stop] - mass[start] if weighted else np.float64(stop - start)
        total += cell_mass
        at = codes[cell]
        if not tabled:
            _set_signs(at, signs, products, 0, levels)
            at = np.uint16(0)
        for level in range(levels):
            target[level] += signs[at, level] * cell_first
        for pair in range(pairs):
            gram[pair] += products[at, pair] * cell_mass
    return total


@inner_loop
def _fit(row: Row, space: Space, levels: int, highest: int) -> float:
    """Write the least-squares scales of the cells with up to `levels` levels; return their gain.

    `highest` is the largest number of bits of an element.
    """
    book, positions = space.book, space.positions
    equations, last = book.equations, len(book.fitted)
    for i in range(levels):
        equations[last, i, 0] = 0
        for j in range(i + 1):
            equations[i, j, 0] = 0
    depths = len(row.starts) - 1
    for number in range(depths):
        start, stop = row.starts[number], row.starts[number + 1]
        if start == stop:
            continue
        reached = min(highest - depths + 1 + number, levels)
        begin, end = 1 << (reached - 1), 1 << reached
        _find_positions(row.values, start, stop, space.lower[begin:end], positions)
        total = _add_cells(row, space, space.codes[begin:end], reached)
        for i in range(reached):
            equations[i, i, 0] += total
            equations[last, i, 0] += space.target[i]
            for j in range(i):
                equations[i, j, 0] += space.gram[i * (i - 1) // 2 + j]
    solve_equations(book, levels)
    return book.gain[0]


# ---------------------------------------------------------------- cells


@inner_loop
def _signed(value: float, code: int, level: int) -> float:
    return value if code >> level & 1 else -value


@inner_loop
def _set_all_nearest(scales: Array, levels: int, row: Row, space: Space) -> None:
    """Write the nearest cells for every number of levels that the elements of a row may have."""
    mapped = len(row.starts) > 2
    for reached in range(1 if mapped else levels, levels + 1):
        set_nearest(scales, reached, space.book)


@inner_loop
def _mean_residual(row: Row, space: Space, level: int, highest: int) -> float:
    """The mean magnitude of the residual before `level`, over the elements that have this level.

    The sums of the levels before are those that `split` left.
    """
    depths, weighted = len(row.starts) - 1, len(row.mass) > 0
    begin, end = 1 << level, 2 << level
    codes, positions, every = space.codes[begin:end], space.positions, (1 << level) - 1
    total = count = 0.0
    for number in range(depths):
        start, stop = row.starts[number], row.starts[number + 1]
        if start == stop or highest - depths + 1 + number <= level:
            continue
        _find_positions(row.values, start, stop, space.lower[begin:end], positions)
        depth_total = depth_count = 0.0
        for cell in range(len(codes)):
            a, b = positions[cell], positions[cell + 1]
            first = row.first[b] - row.first[a]
            mass = row.mass[b] - row.mass[a] if weighted else np.float64(b - a)
            value = space.book.sums[(codes[cell] & every) >> 1, 0] if level else 0.0
            left = first - mass * value
            depth_total += _signed(left, codes[cell], level)
            depth_count += mass
        total += depth_total
        count += depth_count
    return total / (count if count > 0 else 1.0)


# ---------------------------------------------------------------- solvers


@inner_loop
def _successive(row: Row, space: Space, levels: int, highest: int, refit: bool) -> float:
    """Write the cells and scales of levels that are added one by one, as `search` does.

    Each level has the signs of the residual. With `refit`, all scales so far are refitted by least
    squares before the next level. Without, a scale is the mean of the residual's magnitude. At the
    end all scales are fitted, and their gain is returned.
    """
    gain = 0.0
    for level in range(1, levels + 1):
        if level > 1:
            split(level - 1, space.book)
        if refit or level == levels:
            gain = _fit(row, space, level, highest)
        else:
            space.book.fitted[level - 1, 0] = _mean_residual(row, space, level - 1, highest)
    return gain


@inner_loop
def _copy(scales: Array, levels: int, target: Array) -> None:
    for level in range(levels):
        target[level, 0] = scales[level, 0]


@inner_loop
def _take_sizes(space: Space, levels: int, scales: Array) -> None:
    """Write the sizes of the scales that were fitted last."""
    for level in range(levels):
        scales[level, 0] = abs(space.book.fitted[level, 0])


@inner_loop
def _alternate(
    row: Row, space: Space, levels: int, highest: int, iterations: int, scales: Array, gain: float
) -> float:
    """Improve scales by nearest codes and least squares while that raises the gain.

    Returns the gain. At the end `space` holds the cells and least-squares scales of the last
    iteration, also of one that did not raise the gain.
    """
    for _ in range(iterations):
        _set_all_nearest(scales, levels, row, space)
        raised = _fit(row, space, levels, highest)
        if not raised > gain:
            break
        gain = raised
        _take_sizes(space, levels, scales)
    return gain


@inner_loop
def _set_best_pair(row: Row, pair: Array) -> None:
    """The two scales of the least error for elements of 1 or 2 bits.

    With the best scales, one level has the sign of the element. The other has the sign of the
    residual, which changes at a single magnitude. So all magnitudes are tried as that threshold,
    for either level.
    """
    mapped, weighted = len(row.starts) > 2, len(row.mass) > 0
    sums, weights = row.first, row.mass
    start, stop = row.starts[1 if mapped else 0], row.starts[2 if mapped else 1]
    single_mass = single_first = 0.0
    if mapped:
        begin = row.starts[0]
        single_first = sums[start] - sums[begin]
        single_mass = weights[start] - weights[begin] if weighted else np.float64(start - begin)
    first = sums[stop] - sums[start]
    mass = weights[stop] - weights[start] if weighted else np.float64(stop - start)
    # The Gram matrix of the levels is ((whole, across), (across, mass)).
    whole = single_mass + mass
    pair[0, 0] = pair[1, 0] = 0.0
    best = -np.inf
    for swapped in range(2):
        for at in range(start, stop + 1):
            below = weights[at] - weights[start] if weighted else np.float64(at - start)
            across = mass - 2 * below
            change = first - 2 * (sums[at] - sums[start])
            target = single_first + (change if swapped else first)
            other = first if swapped else change
            determinant = whole * mass - across * across
            second = 0.0
            if determinant > DEPENDENT * whole * mass:
                second = (whole * other - across * target) / determinant
            initial = (target - across * second) / (whole if whole > 0 else 1.0)
            gain = initial * target + second * other
            if gain > best:
                best = gain
                pair[0, 0], pair[1, 0] = abs(initial), abs(second)


@inner_loop
def _set_start(row: Row, number: int, levels: int, mean: float, best: Array, start: Array) -> bool:
    """Write the start of the search with this number to `start`; return whether there is one.

    `mean` is that of the magnitudes, and `best` are the best scales of one level less.
    """
    if number < len(ADDED):
        largest = 0.0
        for level in range(levels - 1):
            start[level, 0] = best[level, 0]
            largest = max(largest, best[level, 0])
        start[levels - 1, 0] = ADDED[number] * largest
        return True
    if levels == 2:
        _set_best_pair(row, start)
        return True
    for level in range(levels):
        start[level, 0] = _NORMAL[levels, level] * (mean / NORMAL_MEAN)
    return bool(_NORMAL[levels, 0] > 0)


@inner_loop
def _search(
    row: Row, space: Space, levels: int, iterations: int, best: Array, trial: Array, leader: Array
) -> None:
    """Write the best scales that are found to `best`; `trial` and `leader` are scratch.

    `leader` holds the best trial with the current number of levels.
    """
    mean, starts = 0.0, len(ADDED) + 1
    for count in range(1, levels + 1):
        top, settled = -np.inf, iterations if count == levels else SETTLED
        # First come the starts, then the best of them once more, with more iterations. Last come
        # the results of the other solvers, so that none of them ends up better.
        for number in range(starts + 3 if count > 1 else 1):
            gain, rounds = -np.inf, settled if count > 1 else 0
            if number > starts or count == 1:
                gain = _successive(row, space, count, levels, number > starts + 1)
                _take_sizes(space, count, trial)
            elif number == starts:
                gain, top = top, -np.inf
                _copy(leader, count, trial)
            elif _set_start(row, number, count, mean, best, trial):
                rounds = SCREENED
            else:
                continue
            gain = _alternate(row, space, count, levels, rounds, trial, gain)
            if gain > top:
                top = gain
                _copy(trial, count, leader)
        _copy(leader, count, best)
        if count == 1:
            mean = best[0, 0]


REFINED, ALTERNATING, OPTIMAL = 0, 1, 2
METHODS = {"refined": REFINED, "alternating": ALTERNATING, "optimal": OPTIMAL}


@loop
def solve(
    block: SortedBlock, levels: int, method: int, iterations: int, scales: Array, lower: Array,
    codes: Array, book: Book,
) -> None:  # fmt: skip
    """Solve rows.

    Parameters
    ----------
    block : SortedBlock
    levels : int
        At least 1.
    method : int
        `REFINED`, `ALTERNATING` or `OPTIMAL`.
    iterations : int
        Those of `ALTERNATING`; 0 for `REFINED`; for `OPTIMAL` the most at the end of the search.
    scales : array of float64, shape (rows, levels)
        Written. They are not negative, and without a map they descend.
    lower : array in the dtype of the rows, shape (rows, cells)
    codes : array of uint16, shape (rows, cells)
        Written: the cells of all levels, or with a map those of every number of levels.
    book : Book
    """
    space = _space(levels, book)
    mapped = lower.shape[1] > 1 << (levels - 1)
    best, trial, leader = np.empty((levels, 1)), np.empty((levels, 1)), np.empty((levels, 1))
    for number in range(len(block.values)):
        mass = block.mass[min(number, len(block.mass) - 1)]
        row = Row(block.values[number], block.first[number], mass, block.starts[number])
        rounds, gain = iterations, -np.inf
        if method == OPTIMAL:
            _search(row, space, levels, iterations, best, trial, leader)
            rounds = 1
        else:
            gain = _successive(row, space, levels, levels, method == REFINED)
            _take_sizes(space, levels, best)
        _alternate(row, space, levels, levels, rounds, best, gain)
        own = slice(number, number + 1)
        hand_out(book, mapped, scales[own], lower[own], codes[own])


# ---------------------------------------------------------------- codes and values of elements


@loop
def _tabulate(codes: Array, scales: Array, mapped: bool, values: Array) -> None:
    """Write the values of codes, with scales of shape (levels, rows)."""
    codes, values = uncounted(codes, values)
    for row in range(len(codes)):
        values[row] = 0
        for level in range(len(scales)):
            # With a map, cells from here on have this level.
            first = 1 << level if mapped else 0
            scale, code, into = scales[level, row], codes[row, first:], values[row, first:]
            for cell in range(into.size):
                into[cell] += _signed(scale, code[cell], level)


@part
def _of_four(x: Array, factor: float, lower: Array, table: Array, mirror: Any, y: Array) -> None:
    """`_look_up` for a row with up to four cells: edges and entries stay in registers."""
    never = lower.dtype.type(np.inf)
    a = lower[1] if lower.size > 1 else never
    b, c = (lower[2], lower[3]) if lower.size > 2 else (never, never)
    p = table[0]
    q = table[1] if table.size > 1 else p
    r, s = (table[2], table[3]) if table.size > 2 else (q, q)
    for j in range(x.size):
        m = abs(x[j]) * factor
        entry = q if m > a else p
        entry = r if m > b else entry
        entry = s if m > c else entry
        y[j] = mirror - entry if x[j] <= 0 else entry


@part
def _of_eight(x: Array, factor: float, lower: Array, table: Array, mirror: Any, y: Array) -> None:
    """The same with eight cells."""
    a, b, c, d, e, f, g = lower[1], lower[2], lower[3], lower[4], lower[5], lower[6], lower[7]
    p, q, r, s = table[0], table[1], table[2], table[3]
    t, u, v, w = table[4], table[5], table[6], table[7]
    for j in range(x.size):
        m = abs(x[j]) * factor
        entry = q if m > a else p
        entry = r if m > b else entry
        entry = s if m > c else entry
        entry = t if m > d else entry
        entry = u if m > e else entry
        entry = v if m > f else entry
        entry = w if m > g else entry
        y[j] = mirror - entry if x[j] <= 0 else entry


@inner_loop
def _count_edges(m: Array, size: int, lower: Array, cells: Array) -> None:
    """Write the cells of magnitudes by counting the edges below each, four at a time."""
    for j in range(size):
        cells[j] = 0
    for first in range(0, len(lower), 4):
        # The first cell has no edge.
        a = lower[first] if first > 0 else lower.dtype.type(np.inf)
        b, c, d = lower[first + 1], lower[first + 2], lower[first + 3]
        for j in range(size):
            # Counters of 32 bits: wider ones than the elements would halve the lanes.
            above = np.int32(np.int32(m[j] > a) + np.int32(m[j] > b))
            above = np.int32(above + np.int32(m[j] > c) + np.int32(m[j] > d))
            cells[j] = np.int32(np.int32(cells[j]) + above)


@inner_loop
def _set_tree(lower: Array, begin: int, cells: int, trees: Array) -> None:
    """Write the edges of the cells from `begin` on in the order in which bisection meets them.

    It begins at entry 1, and goes on from entry i to 2 i, or to 2 i + 1 if the magnitude is larger.
    """
    step, at = cells, begin + 1
    while step > 1:
        for cell in range(begin + (step >> 1), begin + cells, step):
            trees[at] = lower[cell]
            at += 1
        step >>= 1


@inner_loop
def _set_trees(lower: Array, mapped: bool, levels: int, cells: int, trees: Array) -> None:
    """Write the tree of all cells of a row, or with a map one for each number of bits."""
    if mapped:
        trees[0] = lower[0]
        for depth in range(levels):
            _set_tree(lower, 1 << depth, 1 << depth, trees)
    else:
        _set_tree(lower, 0, cells, trees)


@inner_loop
def _bisect(
    x: Array, factor: float, bits: Array, trees: Array, table: Array, mirrors: Array, y: Array
) -> None:
    """`_look_up` for a row of many cells, or with a map: `trees` are those of the row.

    With a map, the tree of d bits begins at entry 2^(d-1), as its cells do. So every bisection ends
    on the number of a cell. All elements take as many steps, and those after the last edge are
    undone: processors would predict their number badly. So they would a choice between two halves.
    """
    levels, mapped = len(mirrors) - 1, bits.size > 0
    steps, one = levels - 1, np.uint64(1)
    for j in range(x.size):
        m, depth = abs(x[j]) * factor, np.uint64(bits[j] if mapped else levels)
        begin, at = one << depth >> one if mapped else np.uint64(0), one
        for _ in range(steps):
            at += at + np.uint64(m > trees[begin + at])
        at = at >> np.uint64(levels) - depth if mapped else at - np.uint64(table.size)
        # Both are read before the choice: a choice between reads would be a branch, too.
        value, mirror = table[at], mirrors[depth]
        y[j] = mirror - value if x[j] <= 0 else value


@loop
def _look_up(
    x: Array, bits: Array, inverse: Array, lower: Array, table: Array, mirrors: Array, y: Array
) -> None:
    """Write, for each element of (rows, n), the entry of its cell in the table of its row.

    Elements that are not positive get ``mirrors[number of bits]`` minus that entry. Magnitudes are
    multiplied by the `inverse` of their row. `bits` has the shape (0, 0) where there is no map. `y`
    does not overlap `x`.
    """
    x, bits, lower, table, y = uncounted(x, bits, lower, table, y)
    levels, mapped, cells = len(mirrors) - 1, len(bits) > 0, table.shape[1]
    m, at, trees = np.empty(CHUNK, x.dtype), np.empty(CHUNK, np.uint32), np.empty(cells, x.dtype)
    mirror_of_all = mirrors[levels]
    for row in range(len(x)):
        row_lower, row_table, factor = lower[row], table[row], inverse[row]
        if mapped or cells > COUNTED:
            own = bits[row] if mapped else bits[:0, 0]
            _set_trees(row_lower, mapped, levels, cells, trees)
            _bisect(x[row], factor, own, trees, row_table, mirrors, y[row])
        elif cells > SELECTED:
            for start in range(0, x.shape[1], CHUNK):
                elements, entries = x[row, start : start + CHUNK], y[row, start : start + CHUNK]
                for j in range(elements.size):
                    m[j] = abs(elements[j]) * factor
                _count_edges(m, elements.size, row_lower, at)
                for j in range(elements.size):
                    value = row_table[at[j]]
                    entries[j] = mirror_of_all - value if elements[j] <= 0 else value
        elif cells > 4:
            _of_eight(x[row], factor, row_lower, row_table, mirror_of_all, y[row])
        else:
            _of_four(x[row], factor, row_lower, row_table, mirror_of_all, y[row])


@loop
def _look_up_in_registers(
    x: Array, bits: Array, inverse: Array, lower: Array, table: Array, words: Array,
    mirrors: Array, mirror_words: Array, y: Array,
) -> None:  # fmt: skip
    """`_look_up`, mostly in registers: there the entries and mirrors are words of 32 bits."""
    x, bits, lower, table, y = uncounted(x, bits, lower, table, y)
    levels, cells, whole = len(mirrors) - 1, table.shape[1], x.shape[1] // NUMBERS * NUMBERS
    trees, entries = np.zeros(max(cells, NUMBERS), x.dtype), np.zeros(words.shape[1], words.dtype)
    mapped, none = len(bits) > 0, np.empty(0, bits.dtype)
    for row in range(len(x)):
        own = bits[row] if mapped else none
        _set_trees(lower[row], mapped, levels, cells, trees)
        entries[:] = words[row]
        find_in_registers(x[row], inverse[row], own, trees, entries, mirror_words, levels, y[row])
        if whole < x.shape[1]:
            _bisect(x[row, whole:], inverse[row], own[whole:], trees, table[row], mirrors,
                    y[row, whole:])  # fmt: skip


# ---------------------------------------------------------------- as the solvers are called


def _words(table: Array) -> Array:
    """The entries of a table as words of 32 bits: float32 as it is, integers widened."""
    return table.view(np.uint32) if table.dtype == np.float32 else table


class Lookup:
    """Solve rows, and keep what `cubin.solvers.lookup.Lookup` keeps: it has the same methods.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, shape (rows, n)
        A row has at least one element, and fewer than `LONGEST`.
    bits : uint8 scalar or array of shape (rows, n)
    levels : int
        At least 1.
    importance : array of shape (rows, n), or None
    solver : Solver
    """

    def __init__(
        self, x: Array, bits: Any, levels: int, importance: Array | None,
        solver: Solver,
    ) -> None:  # fmt: skip
        work = in_work_dtype(x)
        scales = self._allocate(work, bits, levels)
        magnitude = np.abs(work)
        if self._mapped:
            magnitude[bits == 0] = 0
        unit, valid = power_of_two(np, magnitude)
        magnitude /= unit
        magnitude[~valid] = 0
        weight = np.empty((0, 0)) if importance is None else relative_weights(np, importance, bits)
        block = arrange(magnitude, self._map(bits), levels, weight)
        method = METHODS[solver.name]
        book = codebook_loops.book(levels, work.dtype, None)
        solve(block, levels, method, search.limit(solver), scales, self._lower, self._codes, book)
        scales *= unit
        scales[~valid] = np.nan
        self._inverse[:] = 1 / unit[:, 0]
        self._keep(scales)

    def _allocate(self, work: Array, bits: Any, levels: int) -> Array:
        """Allocate what the rows of `work` are solved into; return the scales, (rows, levels)."""
        self._mapped = np.ndim(bits) > 0
        cells = 1 << (levels if self._mapped else levels - 1)
        self._lower = np.empty((len(work), cells), work.dtype)
        self._codes = np.empty((len(work), cells), np.uint16)
        self._inverse = np.empty(len(work), work.dtype)
        return np.empty((len(work), levels))

    def _keep(self, scales: Array) -> None:
        self._scales = np.ascontiguousarray(scales.T.astype(self._lower.dtype))
        self.scales = list(self._scales[:, :, None])

    def codes(self, x: Array, bits: Any) -> Array:
        """The packed codes of elements: bit i is set where level i has the sign +1."""
        codes = np.empty(x.shape, np.uint16)
        mirrors = ((1 << np.arange(len(self.scales) + 1)) - 1).astype(np.uint16)
        self._look_up(in_work_dtype(x), bits, self._codes, mirrors, codes)
        return codes

    def approximate(self, x: Array, bits: Any, y: Array) -> None:
        """Write the approximation of elements to `y`."""
        wide = in_work_dtype(x)
        rounded = y.dtype != wide.dtype
        scales = self._scales.astype(y.dtype).astype(wide.dtype) if rounded else self._scales
        values = np.empty(self._codes.shape, wide.dtype)
        _tabulate(self._codes, scales, self._mapped, values)
        if rounded:
            values = values.astype(y.dtype).astype(wide.dtype)
        result = target(y, wide)
        # The value of -x is that of x, negated: 0 minus it, which is +0 where levels cancel.
        self._look_up(wide, bits, values, np.zeros(len(self.scales) + 1, wide.dtype), result)
        store(result, y)

    def _look_up(self, x: Array, bits: Any, table: Array, mirrors: Array, y: Array) -> None:
        cells, depths = table.shape[1], self._map(bits)
        arguments = (read_only(x), depths, self._inverse, self._lower, table)
        several = cells > SELECTED or self._mapped
        if not (x.dtype == np.float32 and several and cells <= MOST and x.shape[1] >= NUMBERS):
            _look_up(*arguments, mirrors, y)
            return
        words = np.zeros((len(table), max(cells, NUMBERS)), np.uint32)
        words[:, :cells] = _words(table)
        mirror_words = np.zeros(NUMBERS, np.uint32)
        mirror_words[: mirrors.size] = _words(mirrors)
        _look_up_in_registers(*arguments, words, mirrors, mirror_words, y)

    def _map(self, bits: Any) -> Array:
        return np.array(bits, np.uint8, order="C") if self._mapped else np.empty((0, 0), np.uint8)
