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
    inner_loop,
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

WIDTH = 1 << 8
"""Rows of a band: their elements in a line are a run of 1 KB of float32. Shorter runs are read, and
above all written, more slowly."""

# ---------------------------------------------------------------- sums


@part
def _left(number: float, a: float, b: float, c: float) -> float:
    return abs(abs(abs(abs(number) - a) - b) - c)


@part
def _three(scales: Array, level: int, end: int, first: int, none: Array) -> tuple[Array, ...]:
    """The scales of three levels from `level` on; `none`, which are 0, for those from `end` on."""
    stop = first + none.size
    return (
        scales[level, first:stop] if level < end else none,
        scales[level + 1, first:stop] if level + 1 < end else none,
        scales[level + 2, first:stop] if level + 2 < end else none,
    )


@inner_loop
def _leave(x: Array, scales: Array, first: int, level: int, none: Array, left: Array) -> None:
    """Write the magnitudes of what the first levels leave of some neighbours in a line."""
    a, b, c = _three(scales, 0, level, first, none)
    for j in range(left.size):
        left[j] = _left(x[j], a[j], b[j], c[j])
    for before in range(3, level, 3):
        a, b, c = _three(scales, before, level, first, none)
        for j in range(left.size):
            left[j] = _left(left[j], a[j], b[j], c[j])


@inner_loop
def _leave_coded(x: Array, bits: Array, level: int, taken: tuple[Array, ...], left: Array) -> None:
    """Write what three levels leave of elements with a code at a level, else 0."""
    one, two, three = taken
    number, zero = np.int32(level), left.dtype.type(0)
    for j in range(left.size):
        magnitude = _left(x[j], one[j], two[j], three[j])
        left[j] = magnitude if np.int32(bits[j]) > number else zero


@inner_loop
def _keep_coded(bits: Array, level: int, left: Array) -> None:
    """Leave 0 of elements without a code at a level."""
    number, zero = np.int32(level), left.dtype.type(0)
    for j in range(left.size):
        left[j] = left[j] if np.int32(bits[j]) > number else zero


@inner_loop
def _count_coded(bits: Array, first: int, level: int, counts: Array) -> None:
    """Add how many elements of each row of a band have a code at a level to `counts`."""
    for e in range(len(bits)):
        depths = bits[e, first : first + counts.size]
        for j in range(counts.size):
            counts[j] = np.int32(counts[j] + np.int32(np.int32(depths[j]) > np.int32(level)))


@inner_loop
def _add_columns(m: Array, at: int, n: int, taken: tuple[Array, ...], sums: Array) -> None:
    """`loops._add_columns`, of what three levels leave, for each row of a band: the columns are
    lines, n numbers apart.

    Each line is cut out: LLVM makes no vectors of reads whose index may be negative.
    """
    one, two, three = taken
    d, e, f, g = m[at:], m[at + n :], m[at + 2 * n :], m[at + 3 * n :]
    h, i, k, o = m[at + 4 * n :], m[at + 5 * n :], m[at + 6 * n :], m[at + 7 * n :]
    at += 8 * n
    dd, ee, ff, gg = m[at:], m[at + n :], m[at + 2 * n :], m[at + 3 * n :]
    hh, ii, kk, oo = m[at + 4 * n :], m[at + 5 * n :], m[at + 6 * n :], m[at + 7 * n :]
    for j in range(sums.size):
        a, b, c = one[j], two[j], three[j]
        r = _left(d[j], a, b, c) + _left(dd[j], a, b, c)
        s = _left(h[j], a, b, c) + _left(hh[j], a, b, c)
        t = _left(f[j], a, b, c) + _left(ff[j], a, b, c)
        u = _left(k[j], a, b, c) + _left(kk[j], a, b, c)
        even = (r + s) + (t + u)
        r = _left(e[j], a, b, c) + _left(ee[j], a, b, c)
        s = _left(i[j], a, b, c) + _left(ii[j], a, b, c)
        t = _left(g[j], a, b, c) + _left(gg[j], a, b, c)
        u = _left(o[j], a, b, c) + _left(oo[j], a, b, c)
        sums[j] = even + ((r + s) + (t + u))


@inner_loop
def _add_lanes(sums: Array, lanes: Array) -> None:
    for j in range(sums.size):
        lanes[j] += np.float64(sums[j])


@inner_loop
def _add_pairs(lanes: Array, width: int) -> None:
    """Add the lanes of each row in pairs: the first `width` numbers become the sums."""
    for apart in (1, 2, 4):
        for start in range(0, LANES * width, 2 * apart * width):
            one, other = lanes[start:], lanes[start + apart * width :]
            for j in range(width):
                one[j] += other[j]


@loop
def _add_chunk(
    x: Array, bits: Array, start: int, size: int, first: int, scales: Array, level: int,
    none: Array, left: Array, magnitudes: Array, chunk: Array, sums: Array, lanes: Array,
    totals: Array, counts: Array,
) -> None:  # fmt: skip
    """Add the sums of what the first levels leave of a chunk of each row of a band to `totals`.

    With a map only elements with a code at `level` count, whose number is added to `counts`.
    `magnitudes` is `left`, read-only.
    """
    x, bits, scales, none, left = uncounted(x, bits, scales, none, left)
    magnitudes, sums, lanes = uncounted(magnitudes, sums, lanes)
    flat, pitch, width, stop = x.reshape(-1), x.shape[1], none.size, first + none.size
    mapped = bits.shape[1] > 0
    turns = size // COLUMNS if size >= SHORT else 0
    # The last scales, up to three, are taken off in the sums.
    before = max(0, level - 1) // 3 * 3
    taken = _three(scales, before, level, first, none)
    zeros = (none, none, none)
    lanes[:] = 0
    count = size - (COLUMNS - 1) * turns
    for number in range(count):
        lane = number % LANES
        into = sums[lane * width : (lane + 1) * width]
        if number < turns and before == 0 and not mapped:
            _add_columns(flat, (start + number) * pitch + first, turns * pitch, taken, into)
        else:
            # The numbers after the columns are single ones.
            several = number < turns
            line = start + number + (0 if several else (COLUMNS - 1) * turns)
            for column in range(COLUMNS if several else 1):
                at = line + column * turns
                of_line = left[column * width : (column + 1) * width] if several else into
                source, depths = x[at, first:stop], bits[at, first:stop]
                if mapped and before == 0:
                    _leave_coded(source, depths, level, taken, of_line)
                elif mapped:
                    _leave(source, scales, first, level, none, of_line)
                    _keep_coded(depths, level, of_line)
                else:
                    _leave(source, scales, first, before if several else level, none, of_line)
            if several:
                _add_columns(magnitudes, 0, width, zeros if mapped else taken, into)
        if lane == LANES - 1 or number == count - 1:
            _add_lanes(sums[: (lane + 1) * width], lanes)
    if mapped:
        _count_coded(bits[start : start + size], first, level, counts)
    _add_pairs(lanes, width)
    for j in range(width):
        if lanes[j] == np.inf:  # the loop for one row deals with overflow
            row = chunk[:size]
            for e in range(size):
                of_one = row[e : e + 1]
                _leave(x[start + e, first + j :], scales, first + j, level, none, of_one)
                if mapped and bits[start + e, first + j] <= level:
                    row[e] = x.dtype.type(0)
            lanes[j] = sum_in_sixteenths(row, x.dtype.type(0), sums)
        totals[j] += lanes[j]


# ---------------------------------------------------------------- scales


@part
def _find_scales(
    x: Array, bits: Array, first: int, levels: int, scales: Array, none: Array, left: Array,
    magnitudes: Array, chunk: Array, sums: Array, lanes: Array, totals: Array, counts: Array,
) -> None:  # fmt: skip
    """Write the scales, (levels, rows), of the rows of a band, which begins with row `first`."""
    for level in range(levels):
        totals[:] = 0
        counts[:] = 0
        for start in range(0, len(x), CHUNK):
            size = min(CHUNK, len(x) - start)
            _add_chunk(x, bits, start, size, first, scales, level, none, left, magnitudes, chunk,
                       sums, lanes, totals, counts)  # fmt: skip
        for j in range(none.size):
            count = counts[j] if bits.shape[1] else len(x)
            mean = x.dtype.type(totals[j] / count) if count else x.dtype.type(0)
            scales[level, first + j] = mean


@loop
def _level_sums(
    x: Array, bits: Array, scales: Array, levels: int, none: Array, left: Array, magnitudes: Array,
    chunk: Array, sums: Array, lanes: Array, totals: Array, counts: Array,
) -> None:  # fmt: skip
    """Write the sums of the residuals' magnitudes in a piece of each row, (rows,), and how many
    elements count: with a map only those with a code at the next level."""
    totals[:] = 0
    counts[:] = 0
    for first in range(0, totals.size, none.size):
        width = min(none.size, totals.size - first)
        total, count = totals[first : first + width], counts[first : first + width]
        for start in range(0, len(x), CHUNK):
            size = min(CHUNK, len(x) - start)
            _add_chunk(x, bits, start, size, first, scales, levels, none[:width], left, magnitudes,
                       chunk, sums, lanes[: LANES * width], total, count)  # fmt: skip
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


@inner_loop
def _write(
    x: Array, bits: Array, first: int, scales: Array, stored: Array, rounded: bool, n: Array,
    y: Array,
) -> None:  # fmt: skip
    """Write the sums of scale * sign for the rows of a band, which begins with row `first`.

    The number of levels is even: the last may have scales of 0, which change nothing. Storing may
    have `rounded` the scales. There is room for a line of the band in `n`.
    """
    x, bits, scales, stored, n, y = uncounted(x, bits, scales, stored, n, y)
    stop, mapped = first + n.size, bits.shape[1] > 0
    if len(scales) == 2 and not (mapped or rounded):
        a, b = scales[0, first:stop], scales[1, first:stop]
        for e in range(len(y)):
            _write_two(x[e, first:stop], a, b, y[e, first:stop])
    elif len(scales) == 4 and not rounded:
        a, b = scales[0, first:stop], scales[1, first:stop]
        c, d = scales[2, first:stop], scales[3, first:stop]
        for e in range(len(y)):
            source, values = x[e, first:stop], y[e, first:stop]
            if mapped:
                _write_coded_four(source, bits[e, first:stop], a, b, c, d, values)
            else:
                _write_four(source, a, b, c, d, values)
    else:
        for e in range(len(y)):
            values = y[e, first:stop]
            negate(x[e, first:stop], n)
            values[:] = 0
            for level in range(0, len(scales), 2):
                a, b = scales[level, first:stop], scales[level + 1, first:stop]
                p, q = stored[level, first:stop], stored[level + 1, first:stop]
                if mapped:
                    _add_coded_two(n, bits[e, first:stop], level, a, b, p, q, values)
                else:
                    _add_two(n, a, b, p, q, values)


@inner_loop
def _pack_rows(x: Array, bits: Array, scales: Array, signs: Array) -> None:
    """Write the signs as bits, (levels, n, bytes)."""
    x, bits, scales, signs = uncounted(x, bits, scales, signs)
    levels, lines, bytes_of_line = signs.shape
    elements, depths = x.reshape(-1), bits.reshape(-1)
    factors, packed = scales.reshape(-1), signs.reshape(-1)
    for first in range(0, scales.shape[1], CHUNK):
        width = min(CHUNK, scales.shape[1] - first)
        for e in range(lines):
            write_bits(
                elements, e * x.shape[1] + first, width, depths, e * bits.shape[1] + first, factors,
                first, scales.shape[1], True, levels, packed, e * bytes_of_line + first // 8,
                lines * bytes_of_line, 0,
            )  # fmt: skip


@loop
def _write_rows(
    x: Array, bits: Array, scales: Array, stored: Array, rounded: bool, chunk: Array, y: Array
) -> None:
    for first in range(0, scales.shape[1], chunk.size):
        n = chunk[: min(chunk.size, scales.shape[1] - first)]
        _write(x, bits, first, scales, stored, rounded, n, y)


@loop
def _solve_rows(
    x: Array, bits: Array, levels: int, scales: Array, none: Array, left: Array,
    magnitudes: Array, chunk: Array, sums: Array, lanes: Array, totals: Array, counts: Array,
    y: Array, signs: Array,
) -> None:  # fmt: skip
    """Write the scales of whole rows, and their approximations or signs: what is not empty.

    `magnitudes` is `left`, read-only.
    """
    for first in range(0, scales.shape[1], none.size):
        width = min(none.size, scales.shape[1] - first)
        _find_scales(x, bits, first, levels, scales, none[:width], left, magnitudes, chunk, sums,
                     lanes[: LANES * width], totals[:width], counts[:width])  # fmt: skip
    if len(y):
        _write_rows(x, bits, scales, scales, False, chunk, y)
    else:
        _pack_rows(x, bits, scales, signs)


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
    wide, totals, counts = lines_in_work_dtype(x), np.empty(len(x)), np.empty(len(x), np.int32)
    _level_sums(wide, map_lines(bits, len(wide)), _stack(scales, x), len(scales),
                *_scratch(len(x), wide.dtype), totals, counts)  # fmt: skip
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
    scales, width = np.zeros((_even(levels), rows), x.dtype), min(rows, WIDTH)
    _solve_rows(
        x, bits, levels, scales, *_scratch(rows, x.dtype), np.empty(width),
        np.empty(width, np.int32), y, signs,
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


def _scratch(rows: int, dtype: Any) -> tuple[Array, ...]:
    """What loops on bands of some rows need: zeros for each row; room for a number of each column,
    the same read-only, for a chunk of one row, for a number of each lane, and for the lanes."""
    width = min(rows, WIDTH)
    left = memory.scratch("columns of rows", (COLUMNS * width,), dtype)
    return (
        np.zeros(width, dtype),
        left,
        read_only(left),
        memory.scratch("chunk", (CHUNK,), dtype),
        memory.scratch("sums of rows", (LANES * width + SHORT + CHUNK // COLUMNS,), dtype),
        memory.scratch("lanes of rows", (LANES * width,), np.float64),
    )


def _stack(scales: tuple[Array, ...], x: Array) -> Array:
    """Scales, (rows, 1) for each level, as (levels, rows), with one of 0 to make them even."""
    stacked = np.zeros((_even(len(scales)), len(x)), floats.work_dtype(x.dtype))
    for level, scale in enumerate(scales):
        stacked[level] = scale[:, 0]
    return stacked
