"""The primitives of `levels.py` as compiled loops: see there for what each does."""

from __future__ import annotations

import numpy as np

from cubin.core.host.loops import (
    in_rows,
    loop,
    map_of,
    part,
    place,
    read_only,
    store,
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
def _level_signs(code: Array, bits: Array, level: int, sign: Array) -> None:
    bit, none = np.uint16(1 << level), np.uint16(0)
    for j in range(sign.size):
        sign[j] = np.int8(1) if np.uint16(code[j] & bit) != none else np.int8(-1)
    if bits.size:
        for j in range(sign.size):
            sign[j] = sign[j] if bits[j] > np.uint8(level) else np.int8(0)


def _in_rows(signs: Array) -> Array:
    if signs.flags.c_contiguous:
        return read_only(signs)
    return read_only(np.stack([in_rows(of_level) for of_level in signs]))


def sum_signs(signs: Array, scales: Array, *, y: Array) -> None:
    """`levels.sum_signs`."""
    values = target(y) if y.dtype == scales.dtype else np.empty(y.shape, scales.dtype)
    _sum_signs(np.ascontiguousarray(scales[:, :, 0].T), _in_rows(signs), values)
    store(values, y)


def level_signs(code: Array, bits: Array, level: Array, *, sign: Array) -> None:
    """`levels.level_signs`. A scalar `bits` must have this level."""
    plain = sign if sign.flags.c_contiguous else np.empty(sign.shape, np.int8)
    bits = map_of(bits, 0).reshape(-1)
    _level_signs(
        read_only(np.ascontiguousarray(code)).reshape(-1), bits, int(level), plain.reshape(-1)
    )
    if plain is not sign:
        place(plain, sign)
