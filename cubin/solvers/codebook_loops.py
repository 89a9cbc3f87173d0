"""Codebooks as compiled loops: what `codebook.py` does, by the same operations in the same order.

The last axis of every array is that of lanes: rows that are solved together, each as if it were
alone. The inner loops go over lanes, which fill vector registers. A long row has one lane.

The arrays of cells hold those of all numbers of levels. The 2^(r-1) cells of elements with r levels
start at index 2^(r-1). `lower` has the lower edge of each cell; a magnitude equal to it lies in the
cell below. The edge of the first cell of each number of levels is -1, below all magnitudes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from numba.extending import overload

from cubin.core import memory
from cubin.core.host.loops import inner_loop, part
from cubin.core.libraries import Array
from cubin.solvers.codebook import DEPENDENT


class Book(NamedTuple):
    """The cells and scales of rows, and scratch to find them with.

    Attributes
    ----------
    lower : array in the dtype of the rows, shape (2^levels, lanes)
    codes : array of uint16, shape (2^levels, lanes)
        The codes of positive elements.
    order : array of int64, shape (2^levels, lanes)
        How the sums of levels were sorted last. The next sort starts from this order, which makes
        it faster and does not change its result.
    sums, values : array of float64, shape (2^(levels - 1), lanes)
        The sums of levels by their numbers, and their sizes in order.
    equations : array of float64, shape (levels + 2, levels, lanes)
        The normal equations of least squares: the Gram matrix in the lower triangle, and the right
        side in row `levels`. `solve` writes the factor to the upper triangle, and the inverse
        pivots to the last row.
    fitted : array of float64, shape (levels, lanes)
        The least-squares scales, which may be negative.
    gain : array of float64, shape (lanes,)
        How much these take off the sum of squares.
    spare : array of float64, shape (lanes,)
    lanes : int or None
        How many lanes there are. None stands for a single one: Numba then compiles the functions
        here without loops over lanes, which would take longer than the work on one row.
    """

    lower: Array
    codes: Array
    order: Array
    sums: Array
    values: Array
    equations: Array
    fitted: Array
    gain: Array
    spare: Array
    lanes: int | None


def book(levels: int, kind: Any, lanes: int | None) -> Book:
    """A `Book` for rows in the work dtype `kind`, in this thread's scratch."""
    states = 1 << levels

    def scratch(name: str, dtype: Any, *shape: int) -> Array:
        return memory.scratch(f"book {name}", (*shape, lanes or 1), dtype)

    found = Book(
        scratch("lower", kind, states),
        scratch("codes", np.uint16, states),
        scratch("order", np.int64, states),
        scratch("sums", np.float64, states // 2),
        scratch("values", np.float64, states // 2),
        scratch("equations", np.float64, levels + 2, levels),
        scratch("fitted", np.float64, levels),
        scratch("gain", np.float64),
        scratch("spare", np.float64),
        lanes,
    )
    # Without levels there is one code, too, which a map hands out. The first level's sign is +.
    found.lower[:], found.codes[0], found.codes[1] = -1, 0, 1
    for cells in (1 << level for level in range(levels)):
        found.order[cells : 2 * cells] = np.arange(cells)[:, None]
    return found


def count(lanes: int | None) -> int:
    """The number of lanes."""
    return 1 if lanes is None else lanes


@overload(count)
def count_by_type(lanes: Any) -> Callable[..., Any]:
    def single(lanes: Any) -> Any:
        return 1

    def several(lanes: Any) -> Any:
        return lanes

    return single if lanes == numba.types.none else several


def rounded_down(value: float, like: Array) -> float:
    """The largest number of the dtype of `like` that is not above the value."""
    raise NotImplementedError


@overload(rounded_down)
def rounded_down_by_type(value: Any, like: Any) -> Callable[..., Any]:
    def single(value: Any, like: Any) -> Any:
        rounded = np.float32(value)
        word = np.float32(rounded).view(np.int32)
        below = word - 1 if rounded > 0 else (word & 0x7FFFFFFF) + 1 - 0x80000000
        return np.int32(below).view(np.float32) if rounded > value else rounded

    def double(value: Any, like: Any) -> Any:
        return value

    return single if like.dtype == numba.types.float32 else double


@inner_loop
def solve(book: Book, levels: int) -> None:
    """Write the least-squares scales of the first `levels` levels, and their gain.

    They are found by elimination in the order of the levels. A scale becomes 0 where its pivot is
    rounding error (see `DEPENDENT`).
    """
    equations, fitted, gain, spare = book.equations, book.fitted, book.gain, book.spare
    most, lanes = len(fitted), count(book.lanes)
    target, inverse = equations[most], equations[most + 1]
    for j in range(levels):
        for k in range(lanes):
            spare[k] = equations[j, j, k]
            fitted[j, k] = target[j, k]
        for p in range(j):
            for k in range(lanes):
                factor = equations[p, j, k]
                spare[k] -= factor * factor * inverse[p, k]
                fitted[j, k] -= factor * fitted[p, k]
        for k in range(lanes):
            free = spare[k] > DEPENDENT * equations[j, j, k]
            # Numba's own division has a branch that raises.
            found = np.divide(1.0, spare[k] if free else 1.0)
            inverse[j, k] = found if free else 0.0
            fitted[j, k] *= inverse[j, k]
        for i in range(j + 1, levels):
            for k in range(lanes):
                equations[j, i, k] = equations[i, j, k]
            for p in range(j):
                for k in range(lanes):
                    equations[j, i, k] -= equations[p, i, k] * equations[p, j, k] * inverse[p, k]
    for j in range(levels - 1, -1, -1):
        for i in range(j + 1, levels):
            for k in range(lanes):
                fitted[j, k] -= equations[j, i, k] * inverse[j, k] * fitted[i, k]
    for k in range(lanes):
        gain[k] = 0
    for i in range(levels):
        for k in range(lanes):
            spare[k] = equations[i, i, k] * fitted[i, k]
        for j in range(i):
            for k in range(lanes):
                spare[k] += 2 * equations[i, j, k] * fitted[j, k]
        for k in range(lanes):
            gain[k] += fitted[i, k] * (2 * target[i, k] - spare[k])


@part
def _set_sums(scales: Array, levels: int, sums: Array, lanes: int) -> None:
    """Write the sums of levels that have the sign + at level 0.

    Bit i of the number of a sum is the sign of level i + 1.
    """
    for k in range(lanes):
        sums[0, k] = scales[0, k]
    for level in range(1, levels):
        half = 1 << (level - 1)
        for number in range(half):
            for k in range(lanes):
                total, scale = sums[number, k], scales[level, k]
                sums[number, k] = total - scale
                sums[half + number, k] = total + scale


@inner_loop
def set_nearest(sizes: Array, levels: int, book: Book) -> None:
    """Write the cells in which each magnitude takes the nearest sum of `levels` levels.

    Sums of equal size are sorted by their numbers.
    """
    cells, lanes = 1 << (levels - 1), count(book.lanes)
    sums, values = book.sums, book.values
    order, codes = book.order[cells : 2 * cells], book.codes[cells : 2 * cells]
    lower = book.lower[cells : 2 * cells]
    _set_sums(sizes, levels, sums, lanes)
    # An insertion sort: from one iteration to the next few sums change places.
    for cell in range(cells):
        for k in range(lanes):
            values[cell, k] = abs(sums[order[cell, k], k])
        for at in range(cell, 0, -1):
            moved = 0
            for k in range(lanes):
                a, b, m, n = values[at - 1, k], values[at, k], order[at - 1, k], order[at, k]
                swap = (a > b) | ((a == b) & (m > n))
                values[at - 1, k], values[at, k] = (b if swap else a), (a if swap else b)
                order[at - 1, k], order[at, k] = (n if swap else m), (m if swap else n)
                moved += swap
            if not moved:
                break
    every = (1 << levels) - 1
    for cell in range(cells):
        for k in range(lanes):
            # A negative sum stands for its mirror image, whose code is the complement.
            code = 2 * order[cell, k] + 1
            codes[cell, k] = code ^ every if sums[order[cell, k], k] < 0 else code
    for cell in range(1, cells):
        for k in range(lanes):
            middle = values[cell - 1, k] / 2 + values[cell, k] / 2
            lower[cell, k] = rounded_down(middle, lower)


@inner_loop
def split(level: int, book: Book) -> None:
    """Write the cells of ``level + 1`` levels.

    They are the cells of `level` levels, each cut where the residual changes its sign. The sums of
    these levels are left in `book.sums`.
    """
    cells, lanes = 1 << (level - 1), count(book.lanes)
    codes, sums = book.codes, book.sums
    old, new = book.lower[cells : 2 * cells], book.lower[2 * cells : 4 * cells]
    _set_sums(book.fitted, level, sums, lanes)
    for cell in range(cells):
        at = cells + cell
        for k in range(lanes):
            value = sums[codes[at, k] >> 1, k]
            cut = max(new.dtype.type(rounded_down(value, new)), old[cell, k])
            cut = min(cut, old[cell + 1, k]) if cell + 1 < cells else cut
            new[2 * cell, k] = old[cell, k]
            new[2 * cell + 1, k] = cut
            codes[2 * at, k] = codes[at, k]
            codes[2 * at + 1, k] = codes[at, k] | np.uint16(1 << level)


@inner_loop
def hand_out(book: Book, mapped: bool, scales: Array, lower: Array, codes: Array) -> None:
    """Write the scales of rows made positive, and the cells with codes changed accordingly.

    Without a map the scales are sorted to descend, and only the cells of all levels are written.
    """
    fitted, levels = book.fitted, len(book.fitted)
    begin = 0 if mapped else 1 << (levels - 1)
    codes[:] = 0
    for k in range(count(book.lanes)):
        for level in range(levels):
            size, place = abs(fitted[level, k]), 0
            for other in range(levels):
                other_size = abs(fitted[other, k])
                place += other_size > size or (other_size == size and other < level)
            place = level if mapped else place
            scales[k, place] = size
            # With a map, the cells of fewer levels come first, and do not have this one.
            for cell in range(1 << level if mapped else 0, codes.shape[1]):
                bit = book.codes[begin + cell, k] >> level & 1 ^ int(fitted[level, k] < 0)
                codes[k, cell] |= bit << place
        for cell in range(codes.shape[1]):
            lower[k, cell] = book.lower[begin + cell, k]
