"""Greedy's compiled loops on rows that lie side by side, as the columns of a matrix do.

They go down a band of rows at a time, with vectors of scales and of sums that have a number for
each row of the band. The arrays of elements are lines, (n, pitch): see `loops.lines`. Sums are in
the order of `cubin.core.sums`, so that the results have the same bits as those of `greedy_loops`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cubin.codes.sign_bits_loops import write_bits
from cubin.core import floats, memory
from cubin.core.host.loops import (
    beside,
    lines,
    lines_in_work_dtype,
    loop,
    map_lines,
    part,
    read_only,
    store_lines,
    sum_in_sixteenths,
    uncounted,
)
from cubin.core.libraries import Array
from cubin.core.sums import CHUNK, COLUMNS, LANES, SHORT

BAND = (64, CHUNK)
"""The fewest and the most rows of a band: 64 of float32 are four lines of the cache, which follow
each other."""

COPIED = 1 << 17
"""Elements of a band of rows that are short: 512 KB of float32, which the second-level cache holds.
With a map there are four times as many, since a line of it has a quarter of the bytes."""

KEPT = 1 << 19
"""Elements of the largest band that is copied, and gone through in the copy at every level. What
is larger than that is read from its place at every level."""

# ---------------------------------------------------------------- sums


@loop
def _load(x: Array, first: int, width: int, band: Array) -> None:
    """Copy `width` rows from `first` on, which become the lines of `band` in turn."""
    for e in range(len(x)):
        source, into = x[e, first : first + width], band[e * width : (e + 1) * width]
        for j in range(width):
            into[j] = source[j]


@loop
def _keep(x: Array, taken: Array, m: Array) -> None:
    """Write ``||x| - taken|``, the residuals' magnitudes after a level of the scales `taken`."""
    width = taken.size
    for start in range(0, m.size, width):
        source, left = x[start : start + width], m[start : start + width]
        for j in range(width):
            left[j] = abs(abs(source[j]) - taken[j])


@loop
def _keep_in_place(m: Array, taken: Array) -> None:
    width = taken.size
    for start in range(0, m.size, width):
        left = m[start : start + width]
        for j in range(width):
            left[j] = abs(abs(left[j]) - taken[j])


@loop
def _keep_coded_in_place(
    m: Array, taken: Array, bits: Array, first: int, level: int, counts: Array
) -> None:
    """The same for elements with a code at a level, else 0. Adds how many have one to `counts`."""
    width, number, zero = taken.size, np.int32(level), m.dtype.type(0)
    for e in range(len(bits)):
        depths, left = bits[e, first : first + width], m[e * width : (e + 1) * width]
        for j in range(width):
            magnitude = abs(abs(left[j]) - taken[j])
            coded = np.int32(depths[j]) > number
            left[j] = magnitude if coded else zero
            counts[j] = np.int32(counts[j] + coded)


@part
def _add_columns(m: Array, taken: Array, turns: int, sums: Array) -> None:
    """`loops._add_columns` for each row of a band: sixteen lines of it are added to one."""
    width, n = taken.size, turns * taken.size
    for start in range(0, n, width):
        i = m[start:]
        for j in range(width):
            a = taken[j]
            r = abs(abs(i[j]) - a) + abs(abs(i[j + 8 * n]) - a)
            s = abs(abs(i[j + 4 * n]) - a) + abs(abs(i[j + 12 * n]) - a)
            t = abs(abs(i[j + 2 * n]) - a) + abs(abs(i[j + 10 * n]) - a)
            u = abs(abs(i[j + 6 * n]) - a) + abs(abs(i[j + 14 * n]) - a)
            even = (r + s) + (t + u)
            r = abs(abs(i[j + n]) - a) + abs(abs(i[j + 9 * n]) - a)
            s = abs(abs(i[j + 5 * n]) - a) + abs(abs(i[j + 13 * n]) - a)
            t = abs(abs(i[j + 3 * n]) - a) + abs(abs(i[j + 11 * n]) - a)
            u = abs(abs(i[j + 7 * n]) - a) + abs(abs(i[j + 15 * n]) - a)
            sums[start + j] = even + ((r + s) + (t + u))


@part
def _add_lanes(sums: Array, width: int, lanes: Array) -> None:
    """`loops.sum_in_lanes` for each row of a band: the first `width` lanes become the sums."""
    lanes[:] = 0
    for start in range(0, sums.size, LANES * width):
        numbers = sums[start : min(start + LANES * width, sums.size)]
        for j in range(numbers.size):
            lanes[j] += np.float64(numbers[j])
    for apart in (1, 2, 4):
        for start in range(0, LANES * width, 2 * apart * width):
            one, other = lanes[start:], lanes[start + apart * width :]
            for j in range(width):
                one[j] += other[j]


@loop
def _add_chunk(
    m: Array, taken: Array, chunk: Array, sums: Array, lanes: Array, totals: Array
) -> None:
    """Add the sum of ``||m| - taken|`` over a chunk of each row to `totals`."""
    m, taken, sums, lanes = uncounted(m, taken, sums, lanes)
    width = taken.size
    size = m.size // width
    turns = size // COLUMNS if size >= SHORT else 0
    _add_columns(m, taken, turns, sums)
    added = turns * COLUMNS
    rest = sums[turns * width : (turns + size - added) * width]
    _keep(m[added * width :], taken, rest)
    _add_lanes(sums[: (turns + size - added) * width], width, lanes)
    for j in range(width):
        if lanes[j] == np.inf:  # the loop for one row deals with overflow
            row = chunk[:size]
            for e in range(size):
                row[e] = m[e * width + j]
            lanes[j] = sum_in_sixteenths(row, taken[j], sums)
    for j in range(width):
        totals[j] += lanes[j]


# ---------------------------------------------------------------- scales


@loop
def _find_scales(
    x: Array, bits: Array, first: int, levels: int, scales: Array, none: Array, kept: bool,
    band: Array, m: Array, chunk: Array, sums: Array, lanes: Array, totals: Array, counts: Array,
) -> None:  # fmt: skip
    """Write the scales, (levels, rows), of the rows of a band, which begins with row `first`.

    If they are `kept`, all their elements are in `band` afterwards.
    """
    width, mapped, last = none.size, bits.shape[1] > 0, levels - 1
    for level in range(levels):
        totals[:] = 0
        counts[:] = 0
        for start in range(0, len(x), CHUNK):
            stop = min(start + CHUNK, len(x))
            at, size = start * width if kept else 0, (stop - start) * width
            source, left = band[at : at + size], m[at : at + size]
            taken = scales[level - 1, first : first + width] if level else none
            if level == 0 or not kept:
                _load(x[start:stop], first, width, source)
            if not kept:
                for before in range(level - 1):
                    _keep_in_place(source, scales[before, first : first + width])
                left = source
            if mapped:
                if kept and level == 0:
                    _keep(source, none, left)
                _keep_coded_in_place(left, taken, bits[start:stop], first, level, counts)
                taken = none
            elif kept and 0 < level < last:  # the magnitudes are needed again
                if level == 1:
                    _keep(source, taken, left)
                else:
                    _keep_in_place(left, taken)
                taken = none
            elif level < 2:
                left = source
            _add_chunk(left, taken, chunk, sums, lanes, totals)
        for j in range(width):
            count = counts[j] if mapped else len(x)
            mean = x.dtype.type(totals[j] / count) if count else x.dtype.type(0)
            scales[level, first + j] = mean


@loop
def _level_sums(
    x: Array, bits: Array, scales: Array, band: Array, none: Array, chunk: Array, sums: Array,
    lanes: Array, totals: Array, counts: Array,
) -> None:  # fmt: skip
    """Write the sums of the residuals' magnitudes in a piece of each row, (rows,), and how many
    elements count: with a map only those with a code at the next level."""
    x, bits, scales, none = uncounted(x, bits, scales, none)
    band, chunk, sums, lanes = uncounted(band, chunk, sums, lanes)
    totals[:] = 0
    counts[:] = 0
    for first in range(0, scales.shape[1], none.size):
        width = min(none.size, scales.shape[1] - first)
        total, count = totals[first : first + width], counts[first : first + width]
        for start in range(0, len(x), CHUNK):
            stop = min(start + CHUNK, len(x))
            left = band[: (stop - start) * width]
            _load(x[start:stop], first, width, left)
            for level in range(len(scales)):
                _keep_in_place(left, scales[level, first : first + width])
            if bits.shape[1]:
                _keep_coded_in_place(
                    left, none[:width], bits[start:stop], first, len(scales), count
                )
            _add_chunk(left, none[:width], chunk, sums, lanes, total)
    if not bits.shape[1]:
        counts[:] = len(x)


# ---------------------------------------------------------------- approximations and codes

# As in `greedy_loops`, these work on the negated residual, n = 0 - r.


@loop
def step(n: float, scale: float) -> float:
    """scale * sign(r) for n = 0 - r."""
    return scale if n < 0 else -scale


@part
def _write_two(x: Array, a: Array, b: Array, y: Array) -> None:
    zero = x.dtype.type(0)
    for j in range(y.size):
        n = zero - x[j]
        first = step(n, a[j])
        y[j] = zero + first + step(n + first, b[j])


@part
def _write_four(x: Array, a: Array, b: Array, c: Array, d: Array, y: Array) -> None:
    zero = x.dtype.type(0)
    for j in range(y.size):
        n = zero - x[j]
        first = step(n, a[j])
        n += first
        second = step(n, b[j])
        n += second
        third = step(n, c[j])
        y[j] = zero + first + second + third + step(n + third, d[j])


@part
def _write_coded_four(
    x: Array, bits: Array, a: Array, b: Array, c: Array, d: Array, y: Array
) -> None:
    """The same where each element has its number of bits."""
    zero = x.dtype.type(0)
    for j in range(y.size):
        n, more = zero - x[j], np.int32(bits[j])
        first = step(n, a[j])
        n += first
        second = step(n, b[j])
        n += second
        third = step(n, c[j])
        total = zero + (first if more > np.int32(0) else zero)
        total += second if more > np.int32(1) else zero
        total += third if more > np.int32(2) else zero
        y[j] = total + (step(n + third, d[j]) if more > np.int32(3) else zero)


@part
def negate(x: Array, n: Array) -> None:
    for j in range(n.size):
        n[j] = x.dtype.type(0) - x[j]


@part
def _add_two(n: Array, a: Array, b: Array, p: Array, q: Array, y: Array) -> None:
    """Add two levels to `y`: of the scales `p` and `q` as stored, `a` and `b` before."""
    for j in range(y.size):
        left, total = n[j], y[j]
        total += step(left, p[j])
        left += step(left, a[j])
        y[j] = total + step(left, q[j])
        n[j] = left + step(left, b[j])


@part
def _add_coded_two(
    n: Array, bits: Array, level: int, a: Array, b: Array, p: Array, q: Array, y: Array
) -> None:
    """The same where each element has its number of bits."""
    zero, start = y.dtype.type(0), np.int32(level)
    for j in range(y.size):
        left, total, more = n[j], y[j], np.int32(np.int32(bits[j]) - start)
        total += step(left, p[j]) if more > np.int32(0) else zero
        left += step(left, a[j])
        y[j] = total + (step(left, q[j]) if more > np.int32(1) else zero)
        n[j] = left + step(left, b[j])


@loop
def _write(
    x: Array, at: int, pitch: int, bits: Array, first: int, scales: Array, stored: Array,
    rounded: bool, n: Array, y: Array,
) -> None:  # fmt: skip
    """Write the sums of scale * sign for the rows of a band. A line of it is at every multiple of
    `pitch` in `x`, the first at `at`.

    The number of levels is even: the last may have scales of 0, which change nothing. Storing may
    have `rounded` the scales. There is room for a line of the band in `n`.
    """
    x, bits, scales, stored, n, y = uncounted(x, bits, scales, stored, n, y)
    stop, width = first + n.size, n.size
    mapped = bits.shape[1] > 0
    if len(scales) == 2 and not (mapped or rounded):
        a, b = scales[0, first:stop], scales[1, first:stop]
        for e in range(len(y)):
            _write_two(x[at + e * pitch : at + e * pitch + width], a, b, y[e, first:stop])
    elif len(scales) == 4 and not rounded:
        a, b = scales[0, first:stop], scales[1, first:stop]
        c, d = scales[2, first:stop], scales[3, first:stop]
        for e in range(len(y)):
            source, values = x[at + e * pitch : at + e * pitch + width], y[e, first:stop]
            if mapped:
                _write_coded_four(source, bits[e, first:stop], a, b, c, d, values)
            else:
                _write_four(source, a, b, c, d, values)
    else:
        for e in range(len(y)):
            values = y[e, first:stop]
            negate(x[at + e * pitch : at + e * pitch + width], n)
            values[:] = 0
            for level in range(0, len(scales), 2):
                a, b = scales[level, first:stop], scales[level + 1, first:stop]
                p, q = stored[level, first:stop], stored[level + 1, first:stop]
                if mapped:
                    _add_coded_two(n, bits[e, first:stop], level, a, b, p, q, values)
                else:
                    _add_two(n, a, b, p, q, values)


@loop
def _pack(
    x: Array, at: int, pitch: int, bits: Array, first: int, width: int, scales: Array, signs: Array
) -> None:
    """Write the signs for the rows of a band as bits."""
    x, bits, scales, signs = uncounted(x, bits, scales, signs)
    levels, lines, bytes_of_line = signs.shape
    depths, factors, packed = bits.reshape(-1), scales.reshape(-1), signs.reshape(-1)
    for e in range(lines):
        write_bits(
            x, at + e * pitch, width, depths, e * bits.shape[1] + first, factors, first,
            scales.shape[1], True, levels, packed, e * bytes_of_line + first // 8,
            lines * bytes_of_line,
        )  # fmt: skip


@loop
def _write_rows(
    x: Array, bits: Array, scales: Array, stored: Array, rounded: bool, chunk: Array, y: Array
) -> None:
    for first in range(0, scales.shape[1], chunk.size):
        n = chunk[: min(chunk.size, scales.shape[1] - first)]
        _write(x.reshape(-1), first, x.shape[1], bits, first, scales, stored, rounded, n, y)


@loop
def _solve_rows(
    x: Array, bits: Array, levels: int, scales: Array, kept: bool, band: Array,
    copied: Array, m: Array,
    none: Array, chunk: Array, sums: Array, lanes: Array, totals: Array, counts: Array, y: Array,
    signs: Array,
) -> None:  # fmt: skip
    """Write the scales of whole rows, and their approximations or signs: what is not empty.

    Signs are bits, (levels, n, bytes): a band begins at a byte. `copied` is `band`, read-only.
    """
    for first in range(0, scales.shape[1], none.size):
        width = min(none.size, scales.shape[1] - first)
        _find_scales(x, bits, first, levels, scales, none[:width], kept, band, m, chunk, sums,
                     lanes, totals[:width], counts[:width])  # fmt: skip
        source, at, pitch = x.reshape(-1), first, x.shape[1]
        if kept:
            source, at, pitch = copied, 0, width
        n = chunk[:width]
        if len(y):
            _write(source, at, pitch, bits, first, scales, scales, False, n, y)
        else:
            _pack(source, at, pitch, bits, first, width, scales, signs)


@loop
def _codes(x: Array, bits: Array, scales: Array, chunk: Array, code: Array) -> None:
    """Write the signs of all levels as bits of a code."""
    x, bits, scales, chunk, code = uncounted(x, bits, scales, chunk, code)
    none = np.uint16(0)
    for first in range(0, scales.shape[1], CHUNK):
        stop = min(first + CHUNK, scales.shape[1])
        n = chunk[: stop - first]
        for e in range(len(x)):
            packed = code[e, first:stop]
            negate(x[e, first:stop], n)
            packed[:] = 0
            for level in range(len(scales)):
                a, bit = scales[level, first:stop], np.uint16(1 << level)
                for j in range(packed.size):
                    positive = n[j] < 0
                    packed[j] |= bit if positive else none
                    n[j] += a[j] if positive else -a[j]
                if bits.shape[1]:
                    depths = bits[e, first:stop]
                    for j in range(packed.size):
                        coded = depths[j] > np.uint8(level)
                        packed[j] &= np.uint16(~none) if coded else np.uint16(~bit)


# ---------------------------------------------------------------- as `greedy_loops` calls them


def _even(levels: int) -> int:
    return levels + levels % 2


def level_sums(x: Array, bits: Array, *scales: Array, total: Array, count: Array) -> None:
    """`greedy.level_sums`."""
    wide, stacked = lines_in_work_dtype(x), _stack(scales, x)
    totals, counts = np.empty(len(x)), np.empty(len(x), np.int32)
    width = _width(len(x), min(len(wide), CHUNK), np.ndim(bits) > 0)
    band = memory.scratch("band", (min(len(wide), CHUNK) * width,), wide.dtype)
    _level_sums(wide, map_lines(bits, len(wide)), stacked[: len(scales)], band,
                *_scratch(width, wide.dtype), totals, counts)  # fmt: skip
    total[...], count[...] = totals[:, None], counts[:, None]


def approximation(x: Array, bits: Array, *scales: Array, y: Array) -> None:
    """`greedy.approximation`."""
    wide = lines_in_work_dtype(x)
    _write_levels(wide, map_lines(bits, len(wide)), _stack(scales, x), y)


def approximate_rows(x: Array, bits: Array, levels: int, *, y: Array) -> None:
    """`greedy.approximate_rows`."""
    wide = lines_in_work_dtype(x)
    depths, no_signs = map_lines(bits, len(wide)), np.empty((0, 0, 0), np.uint8)
    if y.dtype == wide.dtype:
        _solve(wide, len(x), depths, levels, lines(y), no_signs)
        return
    scales = _solve(wide, len(x), depths, levels, np.empty((0, 0), wide.dtype), no_signs)
    _write_levels(wide, depths, scales, y)


def encode_rows(x: Array, bits: Array, levels: int, *, scales: Array, signs: Array) -> None:
    """`greedy.encode_rows`."""
    wide = lines_in_work_dtype(x if beside(x) else np.require(x, requirements=("F", "A")))
    none = np.empty((0, 0), wide.dtype)
    of_lines = signs.swapaxes(1, 2)
    by_level = _solve(wide, len(x), map_lines(bits, len(wide)), levels, none, of_lines)
    scales[...] = by_level[:levels, :, None]


def codes(x: Array, bits: Array, *scales: Array, code: Array) -> None:
    """`greedy.codes`."""
    wide = lines_in_work_dtype(x)
    chunk = memory.scratch("chunk", (CHUNK,), wide.dtype)
    stacked = _stack(scales, x)[: len(scales)]
    _codes(wide, map_lines(bits, len(wide)), stacked, chunk, lines(code))


def _solve(x: Array, rows: int, bits: Array, levels: int, y: Array, signs: Array) -> Array:
    """The scales of whole rows, (levels, rows), of which the last may be added and 0.

    Their approximation or their signs are written, if there is room for them.
    """
    scales = np.zeros((_even(levels), rows), x.dtype)
    n, mapped = len(x), bits.shape[1] > 0
    width = _width(rows, n, mapped)
    kept = n * width <= KEPT
    band = memory.scratch("band", ((n if kept else min(n, CHUNK)) * width,), x.dtype)
    marked = kept and (levels > 2 or mapped)
    m = memory.scratch("magnitudes", (n * width if marked else 0,), x.dtype)
    _solve_rows(
        x, bits, levels, scales, kept, band, read_only(band), m, *_scratch(width, x.dtype),
        np.empty(width), np.empty(width, np.int32), y, signs,
    )  # fmt: skip
    return scales


def _write_levels(x: Array, bits: Array, scales: Array, y: Array) -> None:
    chunk = memory.scratch("chunk", (CHUNK,), x.dtype)
    if y.dtype == x.dtype:
        _write_rows(x, bits, scales, scales, False, chunk, lines(y))
        return
    values, stored = np.empty((len(x), len(y)), x.dtype), scales.astype(y.dtype).astype(x.dtype)
    _write_rows(x, bits, scales, stored, True, chunk, values)
    store_lines(values, y)


def _width(rows: int, n: int, mapped: bool) -> int:
    """Rows of a band."""
    (least, most), copied = BAND, 4 * COPIED if mapped else COPIED
    return min(rows, max(least, min(copied // n // least * least, most)))


def _scratch(width: int, dtype: Any) -> tuple[Array, ...]:
    """Zeros for each row of a band; and scratch for a chunk of one row, for the sums of a chunk of
    each, and for their lanes."""
    return (
        np.zeros(width, dtype),
        memory.scratch("chunk", (CHUNK,), dtype),
        memory.scratch("sums of rows", ((CHUNK // COLUMNS + SHORT) * width,), dtype),
        memory.scratch("lanes of rows", (LANES * width,), np.float64),
    )


def _stack(scales: tuple[Array, ...], x: Array) -> Array:
    """Scales, (rows, 1) for each level, as (levels, rows), with one of 0 to make them even."""
    stacked = np.zeros((_even(len(scales)), len(x)), floats.work_dtype(x.dtype))
    for level, scale in enumerate(scales):
        stacked[level] = scale[:, 0]
    return stacked
