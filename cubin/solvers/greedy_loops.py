"""The primitives of `greedy.py` as compiled loops, which go row by row and give the same bits.

The arrays of elements are (rows, n).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cubin.codes.sign_bits_loops import write_bits, write_values
from cubin.core import floats, memory
from cubin.core.host.loops import (
    bare_loop,
    beside,
    coded_residual_sum,
    in_rows,
    in_work_dtype,
    keep,
    keep_coded_in_place,
    keep_in_place,
    loop,
    magnitude_sum,
    map_of,
    narrow,
    part,
    place,
    prefetch,
    read_only,
    residual_sum,
    scratch,
    short_sum_in_sixteenths,
    store,
    target,
    uncounted,
    widen,
)
from cubin.core.libraries import Array
from cubin.core.sums import CHUNK, SHORT
from cubin.solvers import greedy_columns_loops as columns
from cubin.solvers.greedy_columns_loops import negate

TOGETHER = 1 << 15
"""Elements of the rows that take turns at each level, so that one row's memory is read while
another row is computed."""

# ---------------------------------------------------------------- scales


@part
def _find_short_scales(x: Array, bits: Array, scales: Array) -> None:
    """Write the scales of rows that are too short for columns of sums.

    What the levels before leave is computed again, since storing it would take longer.
    """
    for level in range(scales.shape[1]):
        for row in range(len(x)):
            taken, count = scales[row, :level], x.shape[1]
            if bits.shape[1]:
                total, count = coded_residual_sum(x[row], count, taken, bits[row], level)
            else:
                total = residual_sum(x[row], count, taken)
            if total == np.inf:
                total = short_sum_in_sixteenths(x[row], taken, bits[row], level)
            scales[row, level] = x.dtype.type(total / count) if count else x.dtype.type(0)


@loop
def _find_scales(
    x: Array, bits: Array, scales: Array, m: Array, magnitudes: Array, sums: Array
) -> None:
    """Write the scales of some rows; `m` has room for their magnitudes.

    The rows take turns at each level. A level of a row has to wait for the level before it, and the
    other rows fill that time. `magnitudes` is `m`, read-only.
    """
    x, bits, scales, m = uncounted(x, bits, scales, m)
    magnitudes, sums = uncounted(magnitudes, sums)
    zero, mapped, last = x.dtype.type(0), bits.shape[1] > 0, scales.shape[1] - 1
    if x.shape[1] < SHORT:
        _find_short_scales(x, bits, scales)
        return
    for level in range(last + 1):
        for row in range(len(x)):
            taken = scales[row, level - 1] if level else zero
            total, count = 0.0, 0 if mapped else x.shape[1]
            for start in range(0, x.shape[1], CHUNK):
                stop = min(start + CHUNK, x.shape[1])
                source, left, less = x[row, start:stop], m[row, start:stop], taken
                if level == 0:
                    # Sixteen columns at a time are no order that processors foresee.
                    prefetch(source, CHUNK, source.size)
                if mapped:
                    if level == 0:
                        keep(source, zero, left)
                    count += keep_coded_in_place(left, taken, bits[row, start:stop], level)
                    less = zero
                elif 0 < level < last:  # the magnitudes are needed again
                    if level == 1:
                        keep(source, taken, left)
                    else:
                        keep_in_place(left, taken)
                    less = zero
                if mapped or level > 1 or 0 < level < last:
                    source = magnitudes[row, start:stop]
                total += magnitude_sum(source, less, sums)
            scales[row, level] = x.dtype.type(total / count) if count else zero


@loop
def _level_sum(
    x: Array, bits: Array, scales: Array, chunk: Array, sums: Array
) -> tuple[float, int]:
    """The sum of the residuals' magnitudes in a piece of a row, and the number of its elements.

    With a map only the elements with a code at the next level count.
    """
    zero, total, count = x.dtype.type(0), 0.0, 0
    for start in range(0, x.size, CHUNK):
        elements = x[start : start + CHUNK]
        left = chunk[: elements.size]
        keep(elements, zero, left)
        for level in range(scales.size):
            keep_in_place(left, scales[level])
        if bits.size:
            depths = bits[start : start + CHUNK]
            count += keep_coded_in_place(left, zero, depths, scales.size)
        total += magnitude_sum(left, zero, sums)
    return total, count if bits.size else x.size


@loop
def _level_sums(
    x: Array, bits: Array, scales: Array, chunk: Array, sums: Array, totals: Array, counts: Array
) -> None:
    for row in range(len(x)):
        totals[row], counts[row] = _level_sum(x[row], bits[row], scales[row], chunk, sums)


# ---------------------------------------------------------------- approximations


@bare_loop
def _write_rows(x: Array, bits: Array, scales: Array, stored: Array, y: Array) -> None:
    write_values(x, bits, scales, stored, y)


@loop
def _approximate_rows(
    x: Array, bits: Array, scales: Array, m: Array, magnitudes: Array, sums: Array, y: Array
) -> None:
    for start in range(0, len(x), len(m)):
        stop = start + len(m)
        group, depths, fitted = x[start:stop], bits[start:stop], scales[start:stop]
        _find_scales(group, depths, fitted, m, magnitudes, sums)
        _write_rows(group, depths, fitted, fitted, y[start:stop])


@loop
def _approximate_narrow_rows(
    x: Array, bits: Array, ieee: bool, wide: Array, words: Array, scales: Array, scale_words: Array,
    halves: Array, stored: Array, stored_words: Array, m: Array, magnitudes: Array, sums: Array,
    values: Array, value_words: Array, y: Array,
) -> None:  # fmt: skip
    """The same for float16 and bfloat16 as bit patterns, a few rows at a time.

    What is widened comes twice, as floats and as words. It stays in the cache.
    """
    for start in range(0, len(x), len(m)):
        count, depths = min(len(m), len(x) - start), bits[start : start + len(m)]
        widen(x[start : start + count].reshape(-1), words[:count].reshape(-1), ieee)
        fitted = scales[:count]
        _find_scales(wide[:count], depths, fitted, m, magnitudes, sums)
        narrow(scale_words.reshape(-1), halves, ieee)
        widen(halves, stored_words.reshape(-1), ieee)
        _write_rows(wide[:count], depths, fitted, stored[:count], values[:count])
        narrow(value_words[:count].reshape(-1), y[start : start + count].reshape(-1), ieee)


# ---------------------------------------------------------------- codes


@part
def _pack_rows(x: Array, bits: Array, scales: Array, start: int, stop: int, signs: Array) -> None:
    """Write the signs of some rows as bits, (levels, rows, bytes)."""
    levels, rows, width = signs.shape
    elements, depths = x.reshape(-1), bits.reshape(-1)
    found, packed = scales.reshape(-1), signs.reshape(-1)
    for row in range(start, stop):
        write_bits(
            elements, row * x.shape[1], x.shape[1], depths, row * bits.shape[1], found,
            row * levels, 1, False, levels, packed, row * width, rows * width,
            (rows - row) * width,
        )  # fmt: skip


@loop
def _encode_rows(
    x: Array, bits: Array, scales: Array, m: Array, magnitudes: Array, sums: Array, signs: Array
) -> None:
    """Write the scales and the signs of rows."""
    x, bits, scales, m, signs = uncounted(x, bits, scales, m, signs)
    for start in range(0, len(x), len(m)):
        stop = min(start + len(m), len(x))
        _find_scales(x[start:stop], bits[start:stop], scales[start:stop], m, magnitudes, sums)
        _pack_rows(x, bits, scales, start, stop, signs)


@loop
def _write_signs(x: Array, bits: Array, scales: Array, signs: Array) -> None:
    _pack_rows(x, bits, scales, 0, len(x), signs)


@part
def _set_bits(n: Array, bits: Array, level: int, scale: float, code: Array) -> None:
    """Set bit `level` of a code to the sign, and take the level off the negated residual."""
    bit, none = np.uint16(1 << level), np.uint16(0)
    for j in range(code.size):
        positive = n[j] < 0
        code[j] |= bit if positive else none
        n[j] += scale if positive else -scale
    if bits.size:
        for j in range(code.size):
            code[j] &= np.uint16(~none) if bits[j] > np.uint8(level) else np.uint16(~bit)


@loop
def _codes(x: Array, bits: Array, scales: Array, chunk: Array, code: Array) -> None:
    x, bits, chunk, code = uncounted(x, bits, chunk, code)
    for row in range(len(x)):
        for start in range(0, x.shape[1], CHUNK):
            packed = code[row, start : start + CHUNK]
            n = chunk[: packed.size]
            negate(x[row, start : start + CHUNK], n)
            packed[:] = 0
            for level in range(scales.shape[1]):
                _set_bits(n, bits[row, start : start + CHUNK], level, scales[row, level], packed)


# ---------------------------------------------------------------- as the primitives are called


def level_sums(x: Array, bits: Array, *scales: Array, total: Array, count: Array) -> None:
    """`greedy.level_sums`."""
    if beside(x):
        columns.level_sums(x, bits, *scales, total=total, count=count)
        return
    wide = in_work_dtype(x)
    totals, counts = np.empty(len(x)), np.empty(len(x), np.int64)
    levels = _stack(scales, wide)
    _level_sums(wide, map_of(bits, len(x)), levels, *scratch(wide.dtype), totals, counts)
    total[...], count[...] = totals[:, None], counts[:, None]


def approximation(x: Array, bits: Array, *scales: Array, y: Array) -> None:
    """`greedy.approximation`."""
    if beside(x, y):
        columns.approximation(x, bits, *scales, y=y)
        return
    wide = in_work_dtype(x)
    _write_levels(wide, map_of(bits, len(x)), _stack(scales, wide), y)


def approximate_rows(x: Array, bits: Array, levels: int, *, y: Array) -> None:
    """`greedy.approximate_rows`."""
    if beside(x, y):
        columns.approximate_rows(x, bits, levels, y=y)
        return
    if floats.is_narrow(x.dtype):
        _approximate_narrow(x, bits, levels, y)
        return
    wide = in_work_dtype(x)
    depths = map_of(bits, len(x))
    values, scales = target(y, wide), np.empty((len(x), levels), wide.dtype)
    _, sums = scratch(wide.dtype)
    _approximate_rows(wide, depths, scales, *_rows(wide), sums, values)
    store(values, y)


def _approximate_narrow(x: Array, bits: Array, levels: int, y: Array) -> None:
    half = read_only(in_rows(x)).view(np.uint16)
    m, magnitudes = _rows(half, np.float32)
    wide = memory.scratch("widened rows", m.shape, np.float32)
    values = memory.scratch("values of rows", m.shape, np.float32)
    scales, stored = np.empty((2, len(m), levels), np.float32)
    _, sums = scratch(np.float32)
    result = y if y.flags.carray else np.empty(y.shape, y.dtype)
    _approximate_narrow_rows(
        half, map_of(bits, len(x)), x.dtype == np.float16, read_only(wide), wide.view(np.uint32),
        scales, read_only(scales.view(np.uint32)), np.empty(scales.size, np.uint16), stored,
        stored.view(np.uint32), m, magnitudes, sums, values,
        read_only(values.view(np.uint32)), result.view(np.uint16),
    )  # fmt: skip
    if result is not y:
        place(result, y)


def _write_levels(x: Array, bits: Array, scales: Array, y: Array) -> None:
    values, stored = target(y, x), scales.astype(y.dtype).astype(x.dtype)
    _write_rows(x, bits, scales, stored, values)
    store(values, y)


def encode_rows(x: Array, bits: Array, levels: int, *, scales: Array, signs: Array) -> None:
    """`greedy.encode_rows`."""
    if signs.shape[1] != len(x):
        columns.encode_rows(x, bits, levels, scales=scales, signs=signs)
        return
    wide = in_work_dtype(x)
    depths = map_of(bits, len(x))
    by_row, (_, sums) = memory.scratch("scales", (len(x), levels), wide.dtype), scratch(wide.dtype)
    _encode_rows(wide, depths, by_row, *_rows(wide), sums, signs)
    scales[...] = by_row.T[:, :, None]


def write_signs(x: Array, bits: Array, *scales: Array, signs: Array) -> None:
    """Write the signs of rows as bits, (levels, rows, bytes), 1 for +1; scales are (rows, 1)."""
    wide = in_work_dtype(x)
    _write_signs(wide, map_of(bits, len(x)), _stack(scales, wide), signs)


def codes(x: Array, bits: Array, *scales: Array, code: Array) -> None:
    """`greedy.codes`."""
    if beside(x, code):
        columns.codes(x, bits, *scales, code=code)
        return
    wide = in_work_dtype(x)
    chunk, _ = scratch(wide.dtype)
    _codes(wide, map_of(bits, len(x)), _stack(scales, wide), chunk, code)


def _rows(x: Array, work: Any = None) -> tuple[Array, Array]:
    """Scratch for the magnitudes of the rows that take turns at each level; and it, read-only."""
    together = max(1, min(len(x), TOGETHER // max(1, x.shape[1])))
    m = memory.scratch("rows", (together, x.shape[1]), work or x.dtype)
    return m, read_only(m)


def _stack(scales: tuple[Array, ...], x: Array) -> Array:
    """Scales, (rows, 1) for each level, as (rows, levels)."""
    stacked = np.empty((len(x), len(scales)), floats.work_dtype(x.dtype))
    for level, scale in enumerate(scales):
        stacked[:, level] = scale[:, 0]
    return stacked
