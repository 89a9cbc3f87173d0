"""The primitives of `levels.py` as compiled loops: see there for what each does."""

from __future__ import annotations

import numpy as np

from cubin.core.host.loops import (
    beside,
    in_rows,
    lines,
    loop,
    map_lines,
    map_of,
    part,
    place,
    read_only,
    store,
    store_lines,
    target,
    uncounted,
)
from cubin.core.libraries import Array
from cubin.core.sums import CHUNK


@part
def _add_signs(scale: float, sign: Array, y: Array) -> None:
    zero, none = y.dtype.type(0), np.int8(0)
    for j in range(y.size):
        step = scale if sign[j] > none else -scale
        y[j] += step if sign[j] != none else zero


@loop
def _sum_signs(scales: Array, signs: Array, y: Array) -> None:
    """Write the sums of scales, (rows, levels), times signs, (levels, rows, n)."""
    signs, y = uncounted(signs, y)
    for row in range(len(y)):
        for start in range(0, y.shape[1], CHUNK):
            total = y[row, start : start + CHUNK]
            total[:] = 0
            for level in range(len(signs)):
                _add_signs(scales[row, level], signs[level, row, start : start + CHUNK], total)


@loop
def _sum_signs_of_lines(scales: Array, signs: Array, y: Array) -> None:
    """The same for lines: of scales, (levels, rows), times signs, (levels, n, pitch)."""
    scales, signs, y = uncounted(scales, signs, y)
    zero, none = y.dtype.type(0), np.int8(0)
    for e in range(len(y)):
        for start in range(0, scales.shape[1], CHUNK):
            stop = min(start + CHUNK, scales.shape[1])
            total = y[e, start:stop]
            total[:] = 0
            for level in range(len(signs)):
                scale, sign = scales[level, start:stop], signs[level, e, start:stop]
                for j in range(total.size):
                    step = scale[j] if sign[j] > none else -scale[j]
                    total[j] += step if sign[j] != none else zero


@loop
def _level_signs(code: Array, bits: Array, level: int, width: int, sign: Array) -> None:
    """Write the signs of lines: of the first `width` elements of each."""
    code, bits, sign = uncounted(code, bits, sign)
    bit, none = np.uint16(1 << level), np.uint16(0)
    for e in range(len(code)):
        source, of_line = code[e, :width], sign[e, :width]
        for j in range(width):
            of_line[j] = np.int8(1) if np.uint16(source[j] & bit) != none else np.int8(-1)
        if bits.shape[1]:
            depths = bits[e, :width]
            for j in range(width):
                of_line[j] = of_line[j] if depths[j] > np.uint8(level) else np.int8(0)


def _in_rows(signs: Array) -> Array:
    if signs.flags.c_contiguous:
        return read_only(signs)
    return read_only(np.stack([in_rows(of_level) for of_level in signs]))


def sum_signs(signs: Array, scales: Array, *, y: Array) -> None:
    """`levels.sum_signs`."""
    if beside(signs, y):
        direct = y.dtype == scales.dtype
        found = lines(y) if direct else np.empty(y.shape[::-1], scales.dtype)
        by_level = np.ascontiguousarray(scales[:, :, 0])
        _sum_signs_of_lines(by_level, read_only(lines(signs)), found)
        if not direct:
            store_lines(found, y)
        return
    values = target(y) if y.dtype == scales.dtype else np.empty(y.shape, scales.dtype)
    _sum_signs(np.ascontiguousarray(scales[:, :, 0].T), _in_rows(signs), values)
    store(values, y)


def level_signs(code: Array, bits: Array, level: Array, *, sign: Array) -> None:
    """`levels.level_signs`. A scalar `bits` must have this level."""
    if code.ndim == 2 and beside(code, sign):
        depths = map_lines(bits, code.shape[1])
        _level_signs(read_only(lines(code)), depths, int(level), len(code), lines(sign))
        return
    plain = sign if sign.flags.c_contiguous else np.empty(sign.shape, np.int8)
    depths = map_of(bits, 1).reshape(1, -1)
    line = read_only(np.ascontiguousarray(code)).reshape(1, -1)
    _level_signs(line, depths, int(level), code.size, plain.reshape(1, -1))
    if plain is not sign:
        place(plain, sign)
