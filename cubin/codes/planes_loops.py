"""The primitives of `planes.py` as compiled loops: see there for what each does."""

from __future__ import annotations

from typing import Any

import numpy as np

from cubin.core import memory
from cubin.core.host.loops import (
    beside,
    in_rows,
    lines,
    loop,
    map_of,
    part,
    read_only,
    store,
    target,
    uncounted,
)
from cubin.core.libraries import Array
from cubin.core.rows import flattened
from cubin.core.sums import CHUNK

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")

_WORDS = read_only((_BITS.view(np.int8) * np.int8(2) - np.int8(1)).view(np.uint64)[:, 0])
"""The eight signs of every byte, an int8 each."""

TILE = 1 << 6
"""Lines, and bytes of them, that are packed at a time."""

FEW_LINES = 1 << 3
"""Lines of a tile from which on a byte of all of them is written at a time."""

SHORT_LINE = 1 << 3
"""The most bytes of a line that goes together with others: it would end before vectors pay."""

_SHORT = 1 << 5
"""The scales of shorter runs are repeated for each element."""


@loop
def _pack_lines(words: Array, tile: Array, planes: Array) -> None:
    """Write planes, (levels, width, lines), from words of eight signs, (levels, lines, width).

    They are turned in a tile of `TILE` lines and bytes, so that neighbours are written together.
    """
    words, tile, planes = uncounted(words, tile, planes)
    levels, width, lines = planes.shape
    ones, one = np.uint64(0x0101010101010101), np.uint64(1)
    for level in range(levels):
        for first in range(0, lines, TILE):
            stop = min(first + TILE, lines)
            for start in range(0, width, TILE):
                size = min(TILE, width - start)
                for i in range(stop - first):
                    held, packed = words[level, first + i, start : start + size], tile[i]
                    for j in range(size):
                        # The lowest bits of a byte are 01 for +1, 11 for -1, and 00 for 0.
                        bits = held[j] & ~(held[j] >> one) & ones
                        bits |= bits >> np.uint64(7)
                        bits |= bits >> np.uint64(14)
                        packed[j] = np.uint8(bits | bits >> np.uint64(28))
                if stop - first < FEW_LINES:
                    for i in range(stop - first):
                        for j in range(size):
                            planes[level, start + j, first + i] = tile[i, j]
                    continue
                for j in range(size):
                    into = planes[level, start + j, first:stop]
                    for i in range(stop - first):
                        into[i] = tile[i, j]


@loop
def _pack_short_lines(words: Array, planes: Array) -> None:
    """The same for lines of few bytes: a byte of many lines at a time."""
    words, planes = uncounted(words, planes)
    levels, width, lines = planes.shape
    ones, one = np.uint64(0x0101010101010101), np.uint64(1)
    # The product has bit 0 of byte k at bit 56 + k.
    gather = np.uint64(0x0102040810204080)
    for level in range(levels):
        held = words[level].reshape(-1)
        for first in range(0, lines, TILE):
            stop = min(first + TILE, lines)
            for j in range(width):
                source, into = held[first * width + j :], planes[level, j, first:stop]
                for i in range(stop - first):
                    word = source[i * width]
                    bits = word & ~(word >> one) & ones
                    into[i] = np.uint8(bits * gather >> np.uint64(56))


@loop
def _pack_columns(signs: Array, planes: Array) -> None:
    """Write planes, (levels, width, lines), from signs, (levels, n, pitch)."""
    signs, planes = uncounted(signs, planes)
    levels, width, lines = planes.shape
    none = np.uint8(0)
    for level in range(levels):
        for j in range(width):
            packed = planes[level, j]
            packed[:] = 0
            for e in range(8 * j, min(8 * j + 8, signs.shape[1])):
                sign, bit = signs[level, e, :lines], np.uint8(1 << (e & 7))
                for i in range(lines):
                    packed[i] |= bit if sign[i] > 0 else none


def pack_signs(signs: Array, *, planes: Array) -> None:
    """`planes.pack_signs`."""
    if beside(signs):
        _pack_columns(read_only(lines(signs)), planes)
        return
    levels, width, count = planes.shape
    whole, n = in_rows(signs), signs.shape[2]
    if n % 8:
        whole = np.zeros((levels, count, 8 * width), np.int8)
        whole[..., :n] = signs
    words = read_only(whole.view(np.uint64))
    if width <= SHORT_LINE:
        _pack_short_lines(words, planes)
        return
    _pack_lines(words, memory.scratch("tile", (TILE, TILE), np.uint8), planes)


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


@part
def _add_signs_exactly(scale: float, sign: Array, y: Array, lost: Array) -> None:
    """The same, and add what is rounded away to `lost`: Knuth's sum of two numbers."""
    zero, none = y.dtype.type(0), np.int8(0)
    for j in range(y.size):
        step = scale if sign[j] > none else -scale
        step = step if sign[j] != none else zero
        rounded = y[j] + step
        added = rounded - y[j]
        lost[j] += (y[j] - (rounded - added)) + (step - added)
        y[j] = rounded


@loop
def _sum_planes(
    planes: Array, bits: Array, scales: Array, shift: Array, table: Array, words: Array,
    signs: Array, lost: Array, y: Array,
) -> None:  # fmt: skip
    """Write the sums of scales, (levels, lines or 1, runs), times planes, (levels, lines, bytes).

    They begin with the shift, (lines or 1, runs), and with 0 where that has no runs. `words` and
    `signs` are the same scratch, for the signs of a chunk; `lost` is scratch, too.
    """
    planes, bits, scales, shift = uncounted(planes, bits, scales, shift)
    table, words, signs, lost, y = uncounted(table, words, signs, lost, y)
    length, runs, shifted = y.shape[1], scales.shape[2], shift.shape[1] > 0
    run = length // max(1, runs)
    for line in range(len(y)):
        scaled = line if scales.shape[1] > 1 else 0
        for start in range(0, length, CHUNK):
            stop = min(start + CHUNK, length)
            total, sign = y[line, start:stop], signs[: stop - start]
            total[:] = 0
            if shifted:
                lost[:] = 0
                for at in range(start // run, -(-stop // run)):
                    first, last = max(at * run, start) - start, min(at * run + run, stop) - start
                    total[first:last] = shift[scaled, at]
            for level in range(len(planes)):
                held = planes[level, line, start >> 3 : (stop + 7) >> 3]
                for j in range(held.size):
                    words[j] = table[held[j]]
                if bits.shape[1]:
                    depth, number = bits[line, start:stop], np.uint8(level)
                    for j in range(depth.size):
                        sign[j] = sign[j] if depth[j] > number else np.int8(0)
                if runs == length and not shifted:
                    _add_signs_of_each(scales[level, scaled, start:stop], sign, total)
                    continue
                for at in range(start // run, -(-stop // run)):
                    first, last = max(at * run, start) - start, min(at * run + run, stop) - start
                    scale, here = scales[level, scaled, at], total[first:last]
                    if shifted:
                        _add_signs_exactly(scale, sign[first:last], here, lost[first:last])
                    else:
                        _add_signs(scale, sign[first:last], here)
            if shifted:
                for j in range(total.size):
                    # It is NaN where a sum is not finite.
                    total[j] += lost[j] if lost[j] == lost[j] else lost.dtype.type(0)


@loop
def _sum_columns(
    flat: Array, level_step: int, byte_step: int, scales: Array, count: int, y: Array
) -> None:
    """Write the same, without a map or a shift, where lines lie side by side: y is (n, pitch).

    Byte j of line i at a level is ``flat[level * level_step + j * byte_step + i]``. Scales have the
    shape (levels, runs, lines or 1); there are `count` lines.
    """
    flat, scales, y = uncounted(flat, scales, y)
    levels, runs, _ = scales.shape
    run = len(y) // max(1, runs)
    for e in range(len(y)):
        into, bit = y[e, :count], np.uint8(1 << (e & 7))
        into[:] = 0
        for level in range(levels):
            at = level * level_step + (e >> 3) * byte_step
            held, scale = flat[at : at + count], scales[level, e // run]
            if scale.size == count:
                for i in range(count):
                    into[i] += scale[i] if held[i] & bit else -scale[i]
            else:
                step = scale[0]
                for i in range(count):
                    into[i] += step if held[i] & bit else -step


def flat(planes: Array) -> Array:
    """The bytes of planes, whose lines lie side by side, as one array: others may lie between."""
    levels, width, lines = planes.shape
    steps = planes.strides
    extent = (levels - 1) * steps[0] + (width - 1) * steps[1] + lines
    return read_only(np.lib.stride_tricks.as_strided(planes, (extent,), (1,)))


def turned(scales: Array, levels: int) -> Array:
    """The scales of so many levels, as (levels, runs, lines or 1)."""
    found = np.empty((levels, *scales.shape[:0:-1]), scales.dtype)
    for of_level, scale in zip(found, scales, strict=False):
        of_level[...] = in_rows(scale.T)
    return found


def sum_planes(planes: Array, bits: Any, scales: Array, shift: Any, *, y: Array) -> None:
    """`planes.sum_planes`."""
    levels, width, count = planes.shape
    levels = levels if np.ndim(bits) else min(levels, int(bits))
    plain = not (np.ndim(bits) or np.ndim(shift)) and y.dtype == scales.dtype
    if plain and levels and planes.strides[2] == 1 and beside(y):
        held, (level_step, byte_step, _) = turned(scales, levels), planes.strides
        _sum_columns(flat(planes), level_step, byte_step, read_only(held), count, lines(y))
        return
    if levels and count > 1 and width <= SHORT_LINE and scales.shape[2] == 1:
        _sum_short_lines(planes[:levels], bits, scales[:levels], shift, y)
        return
    by_line = memory.scratch("planes", (levels, count, width), np.uint8)
    for level in range(levels):
        by_line[level] = in_rows(planes[level].T)
    values = target(y) if y.dtype == scales.dtype else np.empty(y.shape, scales.dtype)
    run = y.shape[1] // max(1, scales.shape[2])
    held = scales[:levels]
    base = shift if np.ndim(shift) else np.empty((1, 0), scales.dtype)
    if 1 < run < _SHORT and not base.size:
        held = held.repeat(run, axis=2)
    words = memory.scratch("words", (CHUNK // 8,), np.uint64)
    lost = memory.scratch("lost", (CHUNK,), scales.dtype)
    _sum_planes(
        read_only(by_line), map_of(bits, count), read_only(np.ascontiguousarray(held)),
        read_only(np.ascontiguousarray(base)), _WORDS, words, words.view(np.int8), lost,
        values,
    )  # fmt: skip
    store(values, y)


def _sum_short_lines(planes: Array, bits: Any, scales: Array, shift: Any, y: Array) -> None:
    """`sum_planes` for lines of few bytes with a scale each, or one for all: as a single line.

    It has the unused bits at the end of each line as elements.
    """
    levels, width, lines = planes.shape
    flat = np.ascontiguousarray(planes.transpose(0, 2, 1)).reshape(levels, -1, 1)
    n, whole = y.shape[1], 8 * width
    if np.ndim(bits):
        depths = np.zeros((lines, whole), np.uint8)
        depths[:, :n] = bits
        bits = depths.reshape(1, -1)
    values = y if n == whole and y.flags.c_contiguous else np.empty((lines, whole), y.dtype)
    of_line = shift.reshape(1, -1) if np.ndim(shift) else shift
    sum_planes(flat, bits, scales.reshape(levels, 1, -1), of_line, y=values.reshape(1, -1))
    if values is not y:
        y[...] = flattened(values[:, :n], (y.size,)).reshape(y.shape)
