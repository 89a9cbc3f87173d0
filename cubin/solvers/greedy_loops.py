"""The greedy primitives as compiled loops, a row at a time: see `greedy.py` for what each does.

They give the same bits. Arrays come as (rows, n).
"""

from __future__ import annotations

import numpy as np

from cubin.core import floats, memory
from cubin.core.host.loops import (
    in_work_dtype,
    keep,
    keep_hot_in_place,
    keep_in_place,
    loop,
    magnitude_sum,
    map_of,
    part,
    place,
    scratch,
    store,
    target,
    uncounted,
)
from cubin.core.libraries import Array
from cubin.core.sums import CHUNK

TOGETHER = 1 << 15
"""Elements of the rows that take turns at each level: memory is read without a pause meanwhile."""

# ---------------------------------------------------------------- scales


@loop
def _find_scales(x: Array, bits: Array, scales: Array, m: Array, chunk: Array, sums: Array) -> None:
    """Write the scales of some rows, for which there is room in `m`.

    The rows take turns at each level, since a level of a row waits for the one before it.
    """
    x, bits, scales, m = uncounted(x, bits, scales, m)
    chunk, sums = uncounted(chunk, sums)
    zero, mapped, last = x.dtype.type(0), bits.shape[1] > 0, scales.shape[1] - 1
    for level in range(last + 1):
        for row in range(len(x)):
            taken = scales[row, level - 1] if level else zero
            total, count = 0.0, 0 if mapped else x.shape[1]
            for start in range(0, x.shape[1], CHUNK):
                stop = min(start + CHUNK, x.shape[1])
                left = m[row, start:stop]
                if mapped:
                    if level == 0:
                        keep(x[row, start:stop], zero, left)
                    count += keep_hot_in_place(left, taken, bits[row, start:stop], level)
                elif level == 0 or level == last:  # what they leave is not needed
                    left = chunk[: stop - start]
                    if level < 2:
                        keep(x[row, start:stop], taken, left)
                    else:
                        keep(m[row, start:stop], taken, left)
                elif level == 1:
                    keep(x[row, start:stop], taken, left)
                else:
                    keep_in_place(left, taken)
                total += magnitude_sum(left, sums)
            scales[row, level] = x.dtype.type(total / count) if count else zero


@loop
def _level_scales(
    x: Array, bits: Array, scales: Array, m: Array, chunk: Array, sums: Array
) -> None:
    for start in range(0, len(x), len(m)):
        stop = start + len(m)
        _find_scales(x[start:stop], bits[start:stop], scales[start:stop], m, chunk, sums)


@loop
def _level_sum(
    x: Array, bits: Array, scales: Array, chunk: Array, sums: Array
) -> tuple[float, int]:
    """The sum of what the scales leave of a piece of a row, and the number of its elements."""
    zero, total, count = x.dtype.type(0), 0.0, 0
    for start in range(0, x.size, CHUNK):
        some = x[start : start + CHUNK]
        left = chunk[: some.size]
        keep(some, zero, left)
        for level in range(scales.size):
            keep_in_place(left, scales[level])
        if bits.size:
            hot = bits[start : start + CHUNK]
            count += keep_hot_in_place(left, zero, hot, scales.size)
        total += magnitude_sum(left, sums)
    return total, count if bits.size else x.size


@loop
def _level_sums(
    x: Array, bits: Array, scales: Array, chunk: Array, sums: Array, totals: Array, counts: Array
) -> None:
    for row in range(len(x)):
        totals[row], counts[row] = _level_sum(x[row], bits[row], scales[row], chunk, sums)


# ---------------------------------------------------------------- what they approximate

# 0 less the residual, n, is never -0.0: its sign bit is set exactly where the residual is > 0.


@loop
def _step(n: float, scale: float) -> float:
    """scale * sign(r) for n = 0 - r."""
    return scale if n < 0 else -scale


@part
def _write_one(x: Array, a: float, y: Array) -> None:
    zero = x.dtype.type(0)
    for j in range(y.size):
        y[j] = zero + _step(zero - x[j], a)


@part
def _write_two(x: Array, a: float, b: float, y: Array) -> None:
    zero = x.dtype.type(0)
    for j in range(y.size):
        n = zero - x[j]
        first = _step(n, a)
        y[j] = zero + first + _step(n + first, b)


@part
def _write_three(x: Array, a: float, b: float, c: float, y: Array) -> None:
    zero = x.dtype.type(0)
    for j in range(y.size):
        n = zero - x[j]
        first = _step(n, a)
        n += first
        second = _step(n, b)
        y[j] = zero + first + second + _step(n + second, c)


@part
def _write_four(x: Array, a: float, b: float, c: float, d: float, y: Array) -> None:
    zero = x.dtype.type(0)
    for j in range(y.size):
        n = zero - x[j]
        first = _step(n, a)
        n += first
        second = _step(n, b)
        n += second
        third = _step(n, c)
        y[j] = zero + first + second + third + _step(n + third, d)


@part
def _negate(x: Array, n: Array) -> None:
    for j in range(n.size):
        n[j] = x.dtype.type(0) - x[j]


@part
def _add_four(n: Array, scales: Array, stored: Array, first: int, y: Array) -> None:
    """Add four levels, of which those that are missing have the scale 0 and change nothing."""
    a, b, c, d = _four(scales, first)
    p, q, r, s = _four(stored, first)
    for j in range(y.size):
        left, total = n[j], y[j]
        total += _step(left, p)
        left += _step(left, a)
        total += _step(left, q)
        left += _step(left, b)
        total += _step(left, r)
        left += _step(left, c)
        total += _step(left, s)
        n[j], y[j] = left + _step(left, d), total


@part
def _add_hot_four(
    n: Array, bits: Array, scales: Array, stored: Array, first: int, y: Array
) -> None:
    a, b, c, d = _four(scales, first)
    p, q, r, s = _four(stored, first)
    zero, start = y.dtype.type(0), np.int32(first)
    for j in range(y.size):
        left, total, more = n[j], y[j], np.int32(np.int32(bits[j]) - start)
        total += _step(left, p) if more > np.int32(0) else zero
        left += _step(left, a)
        total += _step(left, q) if more > np.int32(1) else zero
        left += _step(left, b)
        total += _step(left, r) if more > np.int32(2) else zero
        left += _step(left, c)
        total += _step(left, s) if more > np.int32(3) else zero
        n[j], y[j] = left + _step(left, d), total


@part
def _four(scales: Array, first: int) -> tuple[float, float, float, float]:
    zero, levels = scales.dtype.type(0), scales.size
    return (
        scales[first],
        scales[first + 1] if first + 1 < levels else zero,
        scales[first + 2] if first + 2 < levels else zero,
        scales[first + 3] if first + 3 < levels else zero,
    )


@part
def _write(
    x: Array, bits: Array, scales: Array, stored: Array, plain: bool, chunk: Array, y: Array
) -> None:
    """Write the sum of the levels of a row, with the scales as stored.

    It is `plain` without a map, and where they are stored as they are found: up to four levels take
    one pass then.
    """
    s, levels = scales, scales.size
    if plain and levels == 1:
        _write_one(x, s[0], y)
    elif plain and levels == 2:
        _write_two(x, s[0], s[1], y)
    elif plain and levels == 3:
        _write_three(x, s[0], s[1], s[2], y)
    elif plain and levels == 4:
        _write_four(x, s[0], s[1], s[2], s[3], y)
    else:
        for start in range(0, x.size, CHUNK):
            some, hot = y[start : start + CHUNK], bits[start : start + CHUNK]
            n = chunk[: some.size]
            _negate(x[start : start + CHUNK], n)
            some[:] = 0
            for first in range(0, levels, 4):
                if bits.size:
                    _add_hot_four(n, hot, scales, stored, first, some)
                else:
                    _add_four(n, scales, stored, first, some)


@loop
def _write_rows(
    x: Array, bits: Array, scales: Array, stored: Array, rounded: bool, chunk: Array, y: Array
) -> None:
    x, bits, scales, stored = uncounted(x, bits, scales, stored)
    chunk, y = uncounted(chunk, y)
    plain = not (bits.size or rounded)
    for row in range(len(x)):
        _write(x[row], bits[row], scales[row], stored[row], plain, chunk, y[row])


@loop
def _approximate_rows(
    x: Array, bits: Array, scales: Array, m: Array, chunk: Array, sums: Array, y: Array
) -> None:
    for start in range(0, len(x), len(m)):
        stop = start + len(m)
        some, own, found = x[start:stop], bits[start:stop], scales[start:stop]
        _find_scales(some, own, found, m, chunk, sums)
        _write_rows(some, own, found, found, False, chunk, y[start:stop])


# ---------------------------------------------------------------- codes


@part
def _set_signs(n: Array, bits: Array, level: int, scale: float, signs: Array) -> None:
    """Write the signs of a level, and take it off what is left."""
    for j in range(signs.size):
        positive = n[j] < 0
        signs[j] = np.int8(1) if positive else np.int8(-1)
        n[j] += scale if positive else -scale
    if bits.size:
        for j in range(signs.size):
            signs[j] = signs[j] if bits[j] > np.uint8(level) else np.int8(0)


@loop
def _encode_rows(
    x: Array, bits: Array, scales: Array, m: Array, chunk: Array, sums: Array,
    signs: Array,
) -> None:  # fmt: skip
    x, bits, scales, m = uncounted(x, bits, scales, m)
    chunk, signs = uncounted(chunk, signs)
    for start in range(0, len(x), len(m)):
        stop = min(start + len(m), len(x))
        _find_scales(x[start:stop], bits[start:stop], scales[start:stop], m, chunk, sums)
        for row in range(start, stop):
            for first in range(0, x.shape[1], CHUNK):
                some = x[row, first : first + CHUNK]
                n = chunk[: some.size]
                _negate(some, n)
                for level in range(len(signs)):
                    _set_signs(n, bits[row, first : first + CHUNK], level, scales[row, level],
                               signs[level, row, first : first + CHUNK])  # fmt: skip


@part
def _set_bits(n: Array, bits: Array, level: int, scale: float, code: Array) -> None:
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
            some = code[row, start : start + CHUNK]
            n = chunk[: some.size]
            _negate(x[row, start : start + CHUNK], n)
            some[:] = 0
            for level in range(scales.shape[1]):
                _set_bits(n, bits[row, start : start + CHUNK], level, scales[row, level], some)


# ---------------------------------------------------------------- as the primitives are called


def level_scales(x: Array, bits: Array, levels: int) -> list[Array]:
    """The scales of whole rows, (rows, 1) for each level."""
    wide = in_work_dtype(x)
    scales = np.empty((len(x), levels), wide.dtype)
    _level_scales(wide, map_of(bits, len(x)), scales, _rows(wide), *scratch(wide.dtype))
    return list(scales.T[:, :, None])


def level_sums(x: Array, bits: Array, *scales: Array, total: Array, count: Array) -> None:
    """`greedy.level_sums`."""
    wide = in_work_dtype(x)
    totals, counts = np.empty(len(x)), np.empty(len(x), np.int64)
    levels = _stack(scales, wide)
    _level_sums(wide, map_of(bits, len(x)), levels, *scratch(wide.dtype), totals, counts)
    total[...], count[...] = totals[:, None], counts[:, None]


def approximation(x: Array, bits: Array, *scales: Array, y: Array) -> None:
    """`greedy.approximation`."""
    wide = in_work_dtype(x)
    _write_levels(wide, bits, _stack(scales, wide), y)


def approximate_rows(x: Array, bits: Array, levels: int, *, y: Array) -> None:
    """`greedy.approximate_rows`."""
    wide = in_work_dtype(x)
    scales, known = np.empty((len(x), levels), wide.dtype), map_of(bits, len(x))
    if y.dtype != wide.dtype:
        _level_scales(wide, known, scales, _rows(wide), *scratch(wide.dtype))
        _write_levels(wide, bits, scales, y)
        return
    values = target(y, wide)
    _approximate_rows(wide, known, scales, _rows(wide), *scratch(wide.dtype), values)
    store(values, y)


def _write_levels(x: Array, bits: Array, scales: Array, y: Array) -> None:
    values, stored = target(y, x), scales.astype(y.dtype).astype(x.dtype)
    chunk, _ = scratch(x.dtype)
    _write_rows(x, map_of(bits, len(x)), scales, stored, y.dtype != x.dtype, chunk, values)
    store(values, y)


def encode_rows(x: Array, bits: Array, levels: int, *, scales: Array, signs: Array) -> None:
    """`greedy.encode_rows`."""
    wide = in_work_dtype(x)
    found = np.empty((len(x), levels), wide.dtype)
    given = signs if signs.flags.c_contiguous else np.empty(signs.shape, np.int8)
    _encode_rows(wide, map_of(bits, len(x)), found, _rows(wide), *scratch(wide.dtype), given)
    if given is not signs:
        place(given, signs)
    scales[...] = found.T[:, :, None]


def codes(x: Array, bits: Array, *scales: Array, code: Array) -> None:
    """`greedy.codes`."""
    wide = in_work_dtype(x)
    chunk, _ = scratch(wide.dtype)
    _codes(wide, map_of(bits, len(x)), _stack(scales, wide), chunk, code)


def _rows(x: Array) -> Array:
    """What magnitudes of rows are kept in, of so many rows as take turns at each level."""
    rows = max(1, min(len(x), TOGETHER // max(1, x.shape[1])))
    return memory.scratch("rows", (rows, x.shape[1]), x.dtype)


def _stack(scales: tuple[Array, ...], x: Array) -> Array:
    """Scales, (rows, 1) for each level, as (rows, levels)."""
    stacked = np.empty((len(x), len(scales)), floats.work_dtype(x.dtype))
    for level, scale in enumerate(scales):
        stacked[:, level] = scale[:, 0]
    return stacked
