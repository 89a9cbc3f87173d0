"""The primitives of `planes.py` as compiled loops: see there for what each does."""

from __future__ import annotations

from typing import Any

import numpy as np

from cubin.core import memory
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

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")

_WORDS = read_only((_BITS.view(np.int8) * np.int8(2) - np.int8(1)).view(np.uint64)[:, 0])
"""The eight signs of every byte, an int8 each."""

_SHORT = 1 << 5
"""The scales of shorter runs are repeated for each element."""


def pack_signs(signs: Array, *, planes: Array) -> None:
    """`planes.pack_signs`."""
    for sign, plane in zip(signs, planes, strict=True):
        place(np.packbits(in_rows(sign) > 0, axis=1, bitorder="little"), plane.T)


@part
def _add_signs(scale: float, sign: Array, y: Array) -> None:
    zero, none = y.dtype.type(0), np.int8(0)
    for j in range(y.size):
        step = scale if sign[j] > none else -scale
        y[j] += step if sign[j] != none else zero


@part
def _add_signs_of_each(scale: Array, sign: Array, y: Array) -> None:
    """The same where each element has a scale."""
    zero, none = y.dtype.type(0), np.int8(0)
    for j in range(y.size):
        step = scale[j] if sign[j] > none else -scale[j]
        y[j] += step if sign[j] != none else zero


@loop
def _sum_planes(
    planes: Array, bits: Array, scales: Array, table: Array, words: Array, signs: Array, y: Array
) -> None:
    """Write the sums of scales, (levels, lines or 1, runs), times planes, (levels, lines, bytes).

    `words` and `signs` are the same scratch, for the signs of a chunk.
    """
    planes, bits, scales = uncounted(planes, bits, scales)
    table, words, signs, y = uncounted(table, words, signs, y)
    length, runs = y.shape[1], scales.shape[2]
    for line in range(len(y)):
        scaled = line if scales.shape[1] > 1 else 0
        for start in range(0, length, CHUNK):
            stop = min(start + CHUNK, length)
            total, sign = y[line, start:stop], signs[: stop - start]
            total[:] = 0
            for level in range(len(planes)):
                held = planes[level, line, start >> 3 : (stop + 7) >> 3]
                for j in range(held.size):
                    words[j] = table[held[j]]
                if bits.shape[1]:
                    depth, number = bits[line, start:stop], np.uint8(level)
                    for j in range(depth.size):
                        sign[j] = sign[j] if depth[j] > number else np.int8(0)
                if runs == length:
                    _add_signs_of_each(scales[level, scaled, start:stop], sign, total)
                    continue
                run = length // runs
                for at in range(start // run, -(-stop // run)):
                    first, last = max(at * run, start) - start, min(at * run + run, stop) - start
                    _add_signs(scales[level, scaled, at], sign[first:last], total[first:last])


def sum_planes(planes: Array, bits: Any, scales: Array, *, y: Array) -> None:
    """`planes.sum_planes`."""
    levels, width, lines = planes.shape
    levels = levels if np.ndim(bits) else min(levels, int(bits))
    by_line = memory.scratch("planes", (levels, lines, width), np.uint8)
    for level in range(levels):
        by_line[level] = in_rows(planes[level].T)
    values = target(y) if y.dtype == scales.dtype else np.empty(y.shape, scales.dtype)
    run = y.shape[1] // max(1, scales.shape[2])
    held = scales[:levels].repeat(run, axis=2) if 1 < run < _SHORT else scales[:levels]
    words = memory.scratch("words", (CHUNK // 8,), np.uint64)
    _sum_planes(
        read_only(by_line), map_of(bits, lines), read_only(np.ascontiguousarray(held)), _WORDS,
        words, words.view(np.int8), values,
    )  # fmt: skip
    store(values, y)
