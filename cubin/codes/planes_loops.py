"""The primitives of `planes.py` as compiled loops: see there for what each does.

Planes have a byte of each line side by side. The loops work along lines. So the bytes are turned on
the way, sixteen lines by sixteen bytes at a time, or eight by eight where there are few.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from cubin.codes.sign_bits_loops import WITHIN_WORDS, WORD, write_sums
from cubin.core import floats, memory
from cubin.core.host.loops import (
    beside,
    in_rows,
    intrinsic,
    lines,
    loop,
    map_of,
    part,
    read_only,
    store,
    uncounted,
)
from cubin.core.libraries import Array

SLACK = 8
"""Bytes beyond the last that may be read with it, as one number."""

FILLED = 8
"""Numbers of a vector in which scales are written out. A shorter line leaves most of it unused."""

LONG = 1 << 7
"""Elements of runs from which on a scale is not written out for each of them."""

WIDE = (1 << 11, 1 << 16)
"""The most elements of a line whose scales are written out at a time, so that those of all levels
stay in the cache; and the most where all lines share their scales. Those of a whole line are then
written out once for all lines."""

NARROWED = 1 << 16
"""Sums that are narrowed to float16 or bfloat16 at a time. They stay in the cache."""


# ---------------------------------------------------------------- bytes


@intrinsic
def _word(context: Any, bytes_of: Any, at: Any) -> Any:
    """Eight bytes of an array as one number, wherever they begin; the first is the lowest."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, at = arguments
        where = _place(context, builder, bytes_of, array, at, ir.IntType(64))
        return builder.load(where, align=1)

    return types.uint64(bytes_of, types.intp), generate


def _turn_block_of(size: int) -> Any:
    """The instructions that turn blocks of so many rows of as many bytes, a power of two."""

    @intrinsic
    def turn_block(
        context: Any, source: Any, first: Any, pitch: Any, target: Any, at: Any, step: Any
    ) -> Any:
        """Write ``target[at + j * step + i] = source[first + i * pitch + j]``."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, first, pitch, target, at, step = arguments
            kind, half = ir.VectorType(ir.IntType(8), size), size // 2
            rows = []
            for _ in range(size):
                where = _place(context, builder, signature.args[0], source, first, kind)
                rows.append(builder.load(where, align=1))
                first = builder.add(first, pitch)
            # Bytes of two rows by turns: the first half of the bytes of both, or the second.
            number = ir.VectorType(ir.IntType(32), size)
            halves = [ir.Constant(number, [at + size * row for at in part for row in (0, 1)])
                      for part in (range(half), range(half, size))]  # fmt: skip
            for _ in range(size.bit_length() - 1):
                rows = [
                    builder.shuffle_vector(rows[i], rows[i + half], part)
                    for i in range(half)
                    for part in halves
                ]
            for row in rows:
                where = _place(context, builder, signature.args[3], target, at, kind)
                builder.store(row, where, align=1)
                at = builder.add(at, step)
            return context.get_dummy_value()

        index = types.intp
        return types.none(source, index, index, target, index, index), generate

    return turn_block


_turn_eight, _turn_sixteen = _turn_block_of(8), _turn_block_of(16)


def _place(context: Any, builder: Any, kind: Any, array: Any, at: Any, wanted: Any) -> Any:
    """The address of some bytes of an array, as that of a number or vector."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), wanted.as_pointer())


@loop
def _copy(
    source: Array, first: int, pitch: int, target: Array, at: int, step: int, count: int
) -> None:
    """Copy bytes that lie `pitch` apart, from `first` on, to where they lie `step` apart."""
    source, target = uncounted(source[first:], target[at:])
    if pitch == 1 and step == 1:
        for i in range(count):
            target[i] = source[i]
    else:
        # Without a sign, an index cannot count from the end, which takes time to check.
        near, far = np.uintp(step), np.uintp(pitch)
        for i in range(count):
            target[np.uintp(i) * near] = source[np.uintp(i) * far]


@loop
def _turn_few(
    source: Array, first: int, pitch: int, rows: int, columns: int, target: Array, at: int,
    step: int,
) -> None:  # fmt: skip
    """`_turn` for one level, where there are few rows or columns."""
    whole_rows, whole_columns = rows // 8 * 8, columns // 8 * 8
    byte = source.itemsize
    for i in range(0, whole_rows, 8):
        for j in range(0, whole_columns, 8):
            _turn_eight(source, first + i * pitch + j, pitch, target, at + j * step + i, step)
    for j in range(whole_columns, columns):
        _copy(source, first + j, pitch, target, at + j * step, byte, rows)
    for i in range(whole_rows, rows):
        _copy(source, first + i * pitch, byte, target, at + i, step, whole_columns)


@loop
def _turn(
    source: Array, source_step: int, pitch: int, rows: int, columns: int, target: Array,
    target_step: int, step: int, levels: int,
) -> None:  # fmt: skip
    """Write ``target[level * target_step + j * step + i]``, byte after byte, from
    ``source[level * source_step + i * pitch + j]``.

    Of source and target, the one whose bytes lie further apart is gone through in order.
    """
    source, target = uncounted(source, target)
    whole_rows, whole_columns = rows // 16 * 16, columns // 16 * 16
    down = step > pitch
    outer, inner = (whole_columns, whole_rows) if down else (whole_rows, whole_columns)
    for level in range(levels):
        first, at = level * source_step, level * target_step
        for one in range(0, outer, 16):
            for other in range(0, inner, 16):
                i, j = (other, one) if down else (one, other)
                _turn_sixteen(source, first + i * pitch + j, pitch, target, at + j * step + i, step)
        _turn_few(source, first + whole_columns, pitch, rows, columns - whole_columns,
                  target, at + whole_columns * step, step)  # fmt: skip
        _turn_few(source, first + whole_rows * pitch, pitch, rows - whole_rows, whole_columns,
                  target, at + whole_rows, step)  # fmt: skip


# ---------------------------------------------------------------- signs to planes


@loop
def _pack_lines(signs: Array, n: int, packed: Array) -> None:
    """Write the bytes of lines of n signs, line after line."""
    signs, packed = uncounted(signs, packed)
    width, whole = (n + 7) // 8, n // 8
    one, ones = np.uint64(1), np.uint64(0x0101010101010101)
    # Lines of whole bytes follow each other as one line does.
    turns, size = (signs.size // n, whole) if n % 8 else (1, signs.size // 8)
    for i in range(turns):
        line, at = packed[i * width :], i * n
        for j in range(size):
            # The lowest bits of a byte are 01 for +1, 11 for -1, and 00 for 0.
            word = _word(signs, at + 8 * j)
            bits = word & ~(word >> one) & ones
            bits |= bits >> np.uint64(7)
            bits |= bits >> np.uint64(14)
            line[j] = np.uint8(bits | bits >> np.uint64(28))
        if n % 8:
            last = 0
            for j in range(n - 8 * whole):
                last |= int(signs[at + 8 * whole + j] > 0) << j
            line[whole] = np.uint8(last)


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
    if not signs.size:
        return
    if beside(signs):
        _pack_columns(read_only(lines(signs)), planes)
        return
    levels, width, count = planes.shape
    level_step, byte_step, _ = planes.strides
    packed = memory.scratch("packed", (levels * count * width,), np.uint8)
    _pack_lines(read_only(in_rows(signs).reshape(-1)), signs.shape[2], packed)
    _turn(read_only(packed), count * width, width, count, width, flat(planes), level_step,
          byte_step, levels)  # fmt: skip


def turn_lines(lines: Array, *, planes: Array) -> None:
    """`planes.turn_lines`."""
    levels, width, count = planes.shape
    level_step, byte_step, _ = planes.strides
    packed = np.ascontiguousarray(lines.swapaxes(1, 2))
    _turn(read_only(packed.reshape(-1)), count * width, width, count, width, flat(planes),
          level_step, byte_step, levels)  # fmt: skip


@loop
def _join_rows(signs: Array, length: int, rows: int, joined: Array) -> None:
    """Write the bytes of lines of so many `rows`."""
    signs, joined = uncounted(signs, joined)
    at = 0
    for line in range(len(joined)):
        into, byte = joined[line], 0
        held, count = np.uint64(0), 0
        for _ in range(rows):
            for first in range(0, length, 8):
                held |= np.uint64(signs[at]) << np.uint64(count)
                count += min(8, length - first)
                at += 1
                if count >= 8:
                    into[byte] = np.uint8(held)
                    held, count, byte = held >> np.uint64(8), count - 8, byte + 1
        if count:
            into[byte] = np.uint8(held)


def join_rows(signs: Array, length: int, count: int) -> Array:
    """`planes.join_rows`."""
    levels, rows, _ = signs.shape
    of_line = rows // count
    joined = np.empty((levels * count, -(-of_line * length // 8)), np.uint8)
    _join_rows(read_only(np.ascontiguousarray(signs).reshape(-1)), length, of_line, joined)
    return joined.reshape(levels, count, -1)


# ---------------------------------------------------------------- planes to sums


@intrinsic
def _fill(context: Any, numbers: Any, at: Any, value: Any) -> Any:
    """Write `FILLED` copies of a value to an array, from the number `at` on, as one vector."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, at, value = arguments
        kind, number = ir.VectorType(value.type, FILLED), ir.IntType(32)
        one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, number(0))
        order = ir.Constant(ir.VectorType(number, FILLED), None)
        where = _place(context, builder, numbers, array, at, kind)
        builder.store(builder.shuffle_vector(one, one, order), where, align=1)
        return context.get_dummy_value()

    return types.none(numbers, types.intp, numbers.dtype), generate


@part
def _widen(
    scales: Array, place: int, of_level: int, levels: int, run: int, period: int, first: int,
    stop: int, wide: Array,
) -> None:  # fmt: skip
    """Write the scales at some levels of the elements of a line from `first` to `stop`.

    The first scale of the line has the number `place`. A shift counts as a level. The rest is as
    for `_sum_levels`. What is written beyond a run is overwritten by the next one. A range with a
    step would divide to find its length: hence `while`.
    """
    room, begun, within = wide.size // levels, 0, 0
    if first:  # a division takes longer than the scales of a short run
        begun = first // period
        within = first - begun * period
        place += begun * -(-period // run) + within // run
        begun, within = begun * period, within % run
    for level in range(levels):
        number, into = place + level * of_level, level * room - first
        start, end = first, min(begun + period, stop)
        run_end = min(first + run - within, end)
        while start < stop:
            scale = scales[number]
            while start < run_end:
                _fill(wide, into + start, scale)
                start += FILLED
            number += 1
            start = run_end
            if start == end:
                end = min(end + period, stop)
            run_end = min(start + run, end)


@loop
def _sum_levels(
    held: Array, step: int, levels: int, pitch: int, scales: Array, of_level: int, apart: int,
    run: int, period: int, within: bool, shifted: bool, lines: int, length: int, bits: Array,
    y: Array, y_pitch: int, wide: Array, widened: Array,
) -> None:  # fmt: skip
    """Write the sums of scale * sign over some levels of lines of `length` elements.

    The bytes of a line begin at multiples of `pitch` in `held`, those of the next level `step`
    further. Its scales, one for each `run`, begin at multiples of `apart`, those of the next level
    `of_level` further. Runs begin anew after each `period`; or they lie `within` words, one after
    the other. If they are `shifted`, shifts follow like a level. Sums of a line begin at multiples
    of `y_pitch`. There may be a map of `bits`. `wide`, which also comes read-only, has room for the
    scales of some elements of a line, and a word beyond, or is empty.
    """
    held, scales, bits, y = uncounted(held, scales, bits, y)
    wide, widened = uncounted(wide, widened)
    several = run if within else 0
    numbers, stretch, size = scales, period, run
    if several:
        stretch = size = length
    from_level = of_level
    if wide.size:
        numbers, several, from_level = widened, 1, wide.size // (levels + shifted)
        stretch = size = min(length, from_level - WORD)
    # Where a line has one run, those of all lines are written at once, else those of a stretch.
    at_once = lines if size == length and not wide.size else 1
    steps = (8 * pitch, apart, length, y_pitch) if at_once > 1 else (size, 1, size, size)
    for line in range(0, lines, at_once):
        place = line * apart
        room = y.size if y_pitch == length else line * y_pitch + length
        start = 0
        while start < length:
            end = min(start + stretch, length)
            if wide.size:
                if apart or line == 0 or stretch < length:
                    _widen(scales, line * apart, of_level, levels + shifted, run, period, start,
                           end, wide)  # fmt: skip
                place = 0
            while start < end:
                count = min(size, end - start)
                times = max(at_once, (end - start) // count)
                write_sums(
                    held, (8 * line * pitch + start, steps[0]), step, levels, numbers,
                    (place, steps[1]), from_level, several, shifted, bits,
                    (line * length + start, steps[2]), y, (line * y_pitch + start, steps[3]),
                    count, times, room,
                )  # fmt: skip
                place += times
                start = end - (end - start) % count


@loop
def _sum_columns(
    flat: Array, level_step: int, byte_step: int, scales: Array, run: int, period: int, count: int,
    y: Array,
) -> None:  # fmt: skip
    """Write the same, without a map or a shift, where lines lie side by side: y is (n, pitch).

    Scales have the shape (levels, runs, lines or 1); there are `count` lines.
    """
    flat, scales, y = uncounted(flat, scales, y)
    levels, of_period = len(scales), -(-period // run)
    for e in range(len(y)):
        number = e // period * of_period + e % period // run
        into, bit = y[e, :count], np.uint8(1 << (e & 7))
        into[:] = 0
        for level in range(levels):
            at = level * level_step + (e >> 3) * byte_step
            held, scale = flat[at : at + count], scales[level, number]
            if scale.size == count:
                for i in range(count):
                    into[i] += scale[i] if held[i] & bit else -scale[i]
            else:
                step = scale[0]
                for i in range(count):
                    into[i] += step if held[i] & bit else -step


def flat(array: Array) -> Array:
    """Memory from the first element of an array to its last: others may lie between.

    The steps of its axes are positive, and the elements of the last axis lie side by side.
    """
    if array.flags.c_contiguous:
        return array.reshape(-1)
    steps = [step // array.itemsize for step in array.strides]
    extent = 1 + sum((n - 1) * step for n, step in zip(array.shape, steps, strict=True))
    return np.lib.stride_tricks.as_strided(array, (extent,), (array.itemsize,))


def turned(scales: Array, levels: int) -> Array:
    """The scales of so many levels, as (levels, runs, lines or 1)."""
    found = np.empty((levels, *scales.shape[:0:-1]), scales.dtype)
    for of_level, scale in zip(found, scales, strict=False):
        of_level[...] = in_rows(scale.T)
    return found


@functools.cache
def _no_scales(dtype: Any) -> tuple[Array, Array]:
    """Room for no scales, also read-only."""
    return np.empty(0, dtype), read_only(np.empty(0, dtype))


def _in_order(scales: Array, shift: Any, levels: int, words: bool) -> Array:
    """The scales of some levels, and the shift, one after the other, read-only.

    Where `words` of them are read, a word follows.
    """
    shifted = isinstance(shift, np.ndarray)
    if not (shifted or words) and scales.flags.c_contiguous and scales.flags.aligned:
        return read_only(scales[:levels].reshape(-1))
    size = math.prod(scales.shape[1:])
    padded = memory.scratch("scales", ((levels + shifted) * size + WORD,), scales.dtype)
    of_levels = padded[:-WORD].reshape(levels + shifted, *scales.shape[1:])
    of_levels[:levels] = scales[:levels]
    if shifted:
        of_levels[levels] = shift
    padded[-WORD:] = 0
    return read_only(padded)


def sum_planes(
    planes: Array, bits: Any, scales: Array, shift: Any, run: int, period: int, *, y: Array
) -> None:
    """`planes.sum_planes`."""
    (levels, width, count), n = planes.shape, y.shape[1]
    mapped, shifted = isinstance(bits, np.ndarray), isinstance(shift, np.ndarray)
    levels = levels if mapped else min(levels, int(bits))
    if not y.size or not (levels or shifted):
        y[...] = 0
        return
    if planes.strides[2] != 1:
        planes = np.ascontiguousarray(planes)
    level_step, byte_step, _ = planes.strides
    if beside(y) and y.dtype == scales.dtype and not (mapped or shifted):
        held = read_only(turned(scales, levels))
        _sum_columns(read_only(flat(planes)), level_step, byte_step, held, run, period, count,
                     lines(y))  # fmt: skip
        return
    if n < FILLED and not (mapped or shifted):
        # Lines that are shorter than a vector are added up side by side.
        values = memory.scratch("columns of values", (n, count), scales.dtype)
        held = read_only(turned(scales, levels))
        _sum_columns(
            read_only(flat(planes)), level_step, byte_step, held, run, period, count, values
        )
        store(in_rows(values.T), y)
        return
    pitch = y.strides[0] // y.itemsize if count > 1 else n
    in_place = y.strides[1] == y.itemsize and pitch >= n and y.flags.aligned
    narrows = floats.is_narrow(y.dtype) and scales.dtype == np.float32
    if not (in_place and (narrows or y.dtype == scales.dtype)):
        values = memory.scratch("values", y.shape, scales.dtype)
        sum_planes(planes, bits, scales, shift, run, period, y=values)
        store(values, y)
        return
    _, scaled, runs = scales.shape
    of_level, even = scaled * runs, runs * run == n
    step = count * width + SLACK
    held = memory.scratch("planes", (levels * step,), np.uint8)
    _turn(read_only(flat(planes)), level_step, byte_step, width, count, held, step, width, levels)
    within = run in WITHIN_WORDS and (even or period >= n)
    short = runs > 1 and not within and run % WORD and run < LONG
    found, length = count, n
    whole = n % 8 == 0 and pitch == n and even and not short
    if whole and (scaled == count or runs == 1) and not narrows:
        # Lines of whole bytes follow each other as one line does.
        found, length, period, pitch = 1, count * n, count * n, count * n
    if scaled == 1 == runs:
        run, within = length, False
    wide = _no_scales(scales.dtype)
    if short:
        room = min(length, WIDE[scaled == 1]) + WORD
        scratch = memory.scratch("wide", (levels + shifted, room), scales.dtype)
        scratch[:, -WORD:] = 0
        wide = scratch.reshape(-1), read_only(scratch.reshape(-1))
    apart, depths = runs if scaled > 1 else 0, map_of(bits, 0).reshape(-1)
    layout, numbers = (held, step, levels, width), _in_order(scales, shift, levels, within)
    if not narrows:
        _sum_levels(*layout, numbers, of_level, apart, run, period, within, shifted, found, length,
                    depths, flat(y), pitch, *wide)  # fmt: skip
        return
    at_once = max(1, NARROWED // n)
    for line in range(0, count, at_once):
        half = y[line : line + at_once]
        values = memory.scratch("values", half.shape, np.float32)
        _sum_levels(held[line * width :], *layout[1:], numbers[line * apart :], of_level, apart,
                    run, period, within, shifted, len(half), n, depths[line * n :], flat(values), n,
                    *wide)  # fmt: skip
        store(values, half)
