"""The primitives of `planes.py` as compiled loops: see there for what each does.

Planes have a byte of each line side by side. The loops work along lines. So the bytes are turned on
the way, eight lines by eight bytes at a time.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cubin.core import floats, memory
from cubin.core.bits import MAX_BITS
from cubin.core.host.loops import (
    beside,
    in_rows,
    lines,
    loop,
    map_of,
    narrow_to_bfloat16,
    narrow_to_float16,
    part,
    read_only,
    store,
    uncounted,
)
from cubin.core.libraries import Array

WORD = 32
"""Elements whose values are computed at a time: the bits of a number hold their signs. Loops of
exactly so many steps need no remainder."""

PIECE = 1 << 11
"""Elements whose sums stay in the first-level cache until they are written."""

PACKED = 1 << 15
"""Bytes of the lines that are packed at a time."""

SHORT_RUN = 8
"""The scales of shorter runs are repeated for each element."""

SLACK = 8
"""Bytes beyond the last that may be read with it, as one number."""


# ---------------------------------------------------------------- bytes


@intrinsic
def _word(context: Any, bytes_of: Any, at: Any) -> Any:
    """Eight bytes of an array as one number, wherever they begin; the first is the lowest."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found = builder.load(_place(context, builder, bytes_of, arguments))
        found.align = 1
        return found

    return types.uint64(bytes_of, types.intp), generate


@intrinsic
def _put_word(context: Any, bytes_of: Any, at: Any, word: Any) -> Any:
    """Write eight bytes of an array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        stored = builder.store(arguments[2], _place(context, builder, bytes_of, arguments))
        stored.align = 1
        return context.get_dummy_value()

    return types.none(bytes_of, types.intp, types.uint64), generate


def _place(context: Any, builder: Any, kind: Any, arguments: Any) -> Any:
    data = context.make_array(kind)(context, builder, arguments[0]).data
    return builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(64).as_pointer())


@part
def _swapped(one: int, other: int, shift: int, low: int) -> tuple[int, int]:
    """Two words, after the higher parts of the one and the lower parts of the other are swapped."""
    both = ((one >> shift) ^ other) & low
    return one ^ (both << shift), other ^ both


@loop
def _copy(source: Array, pitch: int, target: Array, step: int, count: int) -> None:
    """Copy every byte of so many that lie `pitch` apart to where they lie `step` apart."""
    source, target = uncounted(source, target)
    if pitch == 1 and step == 1:
        for i in range(count):
            target[i] = source[i]
    else:
        # Without a sign, an index cannot count from the end, which takes time to check.
        near, far = np.uintp(step), np.uintp(pitch)
        for i in range(count):
            target[np.uintp(i) * near] = source[np.uintp(i) * far]


@loop
def _turn(
    source: Array, first: int, pitch: int, rows: int, columns: int, target: Array, at: int,
    step: int,
) -> None:  # fmt: skip
    """Write ``target[at + j * step + i] = source[first + i * pitch + j]``, both arrays of bytes."""
    source, target = uncounted(source, target)
    low4, low2, low1 = (
        np.uint64(0x00000000FFFFFFFF), np.uint64(0x0000FFFF0000FFFF), np.uint64(0x00FF00FF00FF00FF)
    )  # fmt: skip
    by4, by2, by1 = np.uint64(32), np.uint64(16), np.uint64(8)
    whole_rows, whole_columns = rows // 8 * 8, columns // 8 * 8
    for i in range(0, whole_rows, 8):
        for j in range(0, whole_columns, 8):
            o = first + i * pitch + j
            a, b = _word(source, o), _word(source, o + pitch)
            c, d = _word(source, o + 2 * pitch), _word(source, o + 3 * pitch)
            e, f = _word(source, o + 4 * pitch), _word(source, o + 5 * pitch)
            g, h = _word(source, o + 6 * pitch), _word(source, o + 7 * pitch)
            a, e = _swapped(a, e, by4, low4)
            b, f = _swapped(b, f, by4, low4)
            c, g = _swapped(c, g, by4, low4)
            d, h = _swapped(d, h, by4, low4)
            a, c = _swapped(a, c, by2, low2)
            b, d = _swapped(b, d, by2, low2)
            e, g = _swapped(e, g, by2, low2)
            f, h = _swapped(f, h, by2, low2)
            a, b = _swapped(a, b, by1, low1)
            c, d = _swapped(c, d, by1, low1)
            e, f = _swapped(e, f, by1, low1)
            g, h = _swapped(g, h, by1, low1)
            o = at + j * step + i
            _put_word(target, o, a)
            _put_word(target, o + step, b)
            _put_word(target, o + 2 * step, c)
            _put_word(target, o + 3 * step, d)
            _put_word(target, o + 4 * step, e)
            _put_word(target, o + 5 * step, f)
            _put_word(target, o + 6 * step, g)
            _put_word(target, o + 7 * step, h)
    for j in range(whole_columns, columns):
        _copy(source[first + j :], pitch, target[at + j * step :], 1, rows)
    for i in range(whole_rows, rows):
        _copy(source[first + i * pitch :], 1, target[at + i :], step, whole_columns)


# ---------------------------------------------------------------- signs to planes


@loop
def _pack_lines(
    signs: Array, n: int, packed: Array, planes: Array, level_step: int, byte_step: int, count: int
) -> None:
    """Write planes from the signs of lines of n elements, level after level.

    There is room in `packed` for the bytes of some lines; `byte_step` and `level_step` are those of
    the planes.
    """
    signs, packed, planes = uncounted(signs, packed, planes)
    width, whole = (n + 7) // 8, n // 8
    one, ones = np.uint64(1), np.uint64(0x0101010101010101)
    at_once = packed.size // width
    for level in range(signs.size // (count * n)):
        for first in range(0, count, at_once):
            some = min(at_once, count - first)
            start = (level * count + first) * n
            # Lines of whole bytes follow each other as one line does.
            turns, size = (some, whole) if n % 8 else (1, some * whole)
            for i in range(turns):
                bytes_of, at = packed[i * width :], start + i * n
                for j in range(size):
                    # The lowest bits of a byte are 01 for +1, 11 for -1, and 00 for 0.
                    word = _word(signs, at + 8 * j)
                    bits = word & ~(word >> one) & ones
                    bits |= bits >> np.uint64(7)
                    bits |= bits >> np.uint64(14)
                    bytes_of[j] = np.uint8(bits | bits >> np.uint64(28))
                if n % 8:
                    last = 0
                    for j in range(n - 8 * whole):
                        last |= int(signs[at + 8 * whole + j] > 0) << j
                    bytes_of[whole] = np.uint8(last)
            _turn(packed, 0, width, some, width, planes, level * level_step + first, byte_step)


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
    _, width, count = planes.shape
    level_step, byte_step, _ = planes.strides
    packed = memory.scratch("packed", (max(PACKED, 8 * width),), np.uint8)
    in_order = read_only(in_rows(signs).reshape(-1))
    _pack_lines(in_order, signs.shape[2], packed, flat(planes), level_step, byte_step, count)


# ---------------------------------------------------------------- planes to sums

# A sum is never -0.0, since it begins with 0. So a level of the scale 0 changes nothing, and levels
# come in pairs.


@part
def _add_two(p: int, q: int, a: float, b: float, first: bool, y: Array) -> None:
    zero, none = y.dtype.type(0), np.uint32(0)
    for j in range(WORD):
        bit = np.uint32(np.uint32(1) << np.uint32(j))
        total = zero if first else y[j]
        total += a if p & bit != none else -a
        y[j] = total + (b if q & bit != none else -b)


@part
def _add_two_to_bytes(
    p: int, q: int, a: float, b: float, c: float, d: float, e: float, f: float, g: float, h: float,
    first: bool, y: Array,
) -> None:  # fmt: skip
    """The same where each byte has a scale: `a` to `d`, and `e` to `h` at the second level."""
    zero, none = y.dtype.type(0), np.uint32(0)
    for j in range(WORD):
        bit = np.uint32(np.uint32(1) << np.uint32(j))
        total = zero if first else y[j]
        one = (a if j < 8 else b) if j < 16 else (c if j < 24 else d)
        two = (e if j < 8 else f) if j < 16 else (g if j < 24 else h)
        total += one if p & bit != none else -one
        y[j] = total + (two if q & bit != none else -two)


# What follows works on a piece: some lines of `size` elements, or a part of one. Elements of a line
# that are left of a word are computed, too, and so a line begins at every multiple of `wide`, which
# is `size` in whole words. Its bytes begin at `first`, and those of the next line `pitch` further.


@loop
def _add_two_levels(
    held: Array, first: int, other: int, turns: int, size: int, pitch: int, wide: int,
    scales: Array, one: int, two: int, apart: int, left: int, run: int, begin: bool, y: Array,
) -> None:  # fmt: skip
    """Add two levels to the sums, or to 0 in the `begin`ning. The second has its bytes at `other`.

    The scales begin at `one` and `two`, those of the next line `apart` further. The first run of a
    line has `left` elements, the others have `run`, which fill bytes.
    """
    held, scales, y = uncounted(held, scales, y)
    for turn in range(turns):
        a, rest, line = turn * apart, left, y[turn * wide :]
        for e in range(0, size, WORD):
            byte, sums = turn * pitch + (e >> 3), line[e:]
            p, q = np.uint32(_word(held, first + byte)), np.uint32(_word(held, other + byte))
            if rest >= min(WORD, size - e):
                _add_two(p, q, scales[one + a], scales[two + a], begin, sums)
            else:
                b = a + (rest == 8)
                c = b + (run == 8 or rest == 16)
                d = c + (run == 8 or rest == 24 or (run == 16 and rest == 8))
                _add_two_to_bytes(
                    p, q, scales[one + a], scales[one + b], scales[one + c], scales[one + d],
                    scales[two + a], scales[two + b], scales[two + c], scales[two + d], begin, sums,
                )  # fmt: skip
            rest -= WORD
            while rest <= 0:
                a, rest = a + 1, rest + run


@loop
def _spread(
    scales: Array, place: int, turns: int, size: int, wide: int, apart: int, left: int, run: int,
    of_each: Array,
) -> None:  # fmt: skip
    """Write the scale of each element."""
    scales, of_each = uncounted(scales, of_each)
    for turn in range(turns):
        line, at = of_each[turn * wide :], place + turn * apart
        if run == 1:
            of_line = scales[at:]
            for j in range(size):
                line[j] = of_line[j]
            continue
        start, stop = 0, min(left, size)
        while start < size:
            of_run, scale = line[start:stop], scales[at]
            for j in range(of_run.size):
                of_run[j] = scale
            start, stop, at = stop, min(stop + run, size), at + 1


@loop
def _add_two_coded_levels(
    held: Array, first: int, other: int, turns: int, size: int, pitch: int, wide: int, a: Array,
    b: Array, depths: Array, level: int, y: Array,
) -> None:  # fmt: skip
    """The same where each element has its scales and its number of bits."""
    held, a, b, depths, y = uncounted(held, a, b, depths, y)
    zero, none, start = y.dtype.type(0), np.uint32(0), np.int32(level)
    for turn in range(turns):
        for e in range(0, size, WORD):
            at, byte = turn * wide + e, turn * pitch + (e >> 3)
            p, q = np.uint32(_word(held, first + byte)), np.uint32(_word(held, other + byte))
            of_one, of_other, bits, sums = a[at:], b[at:], depths[at:], y[at:]
            for j in range(WORD):
                bit = np.uint32(np.uint32(1) << np.uint32(j))
                total, more = sums[j] if level else zero, np.int32(np.int32(bits[j]) - start)
                one = of_one[j] if p & bit != none else -of_one[j]
                two = of_other[j] if q & bit != none else -of_other[j]
                total += one if more > np.int32(0) else zero
                sums[j] = total + (two if more > np.int32(1) else zero)


@loop
def _add_level_exactly(
    held: Array, first: int, turns: int, size: int, pitch: int, wide: int, a: Array,
    depths: Array, level: int, y: Array, lost: Array,
) -> None:  # fmt: skip
    """The same for one level. What is rounded away is added to `lost`: Knuth's sum of two."""
    held, a, depths, y, lost = uncounted(held, a, depths, y, lost)
    zero, none, number = y.dtype.type(0), np.uint32(0), np.int32(level)
    for turn in range(turns):
        for e in range(0, size, WORD):
            at, byte = turn * wide + e, turn * pitch + (e >> 3)
            p = np.uint32(_word(held, first + byte))
            of_one, bits, sums, rest = a[at:], depths[at:], y[at:], lost[at:]
            for j in range(WORD):
                bit = np.uint32(np.uint32(1) << np.uint32(j))
                one = of_one[j] if p & bit != none else -of_one[j]
                one = one if np.int32(bits[j]) > number else zero
                rounded = sums[j] + one
                added = rounded - sums[j]
                rest[j] += (sums[j] - (rounded - added)) + (one - added)
                sums[j] = rounded


@loop
def _sum_planes(
    planes: Array, level_step: int, byte_step: int, count: int, n: int, bits: Array, scales: Array,
    levels: int, scaled: int, run: int, shifted: bool, held: Array, depths: Array, room: Array,
    words: Array, y: Array, half: Array, pitch: int, ieee: bool,
) -> None:  # fmt: skip
    """Write the sums of scale * sign over some levels of lines of n elements.

    Byte j of line i at a level is ``planes[level * level_step + j * byte_step + i]``. Scales have
    the shape (levels, scaled, n / run), with a level of 0 to make them even, and the shift after
    them; a word may read on beyond their end. There is a line of them for each line, or one for
    all.

    Line i of the result begins at ``y[i * pitch]``, or at ``half[i * pitch]`` where it is float16
    (`ieee`) or bfloat16. The other arrays are scratch; `words` is `room` as bit patterns.
    """
    planes, bits, scales, held = uncounted(planes, bits, scales, held)
    depths, room, words, y, half = uncounted(depths, room, words, y, half)
    width, runs, mapped = (n + 7) // 8, n // run, bits.size > 0
    even, of_level, step = (levels + 1) // 2 * 2, scaled * runs, count * width + SLACK
    for level in range(levels):
        _turn(planes, level * level_step, byte_step, width, count, held, level * step, width)
    total, lost = room[:PIECE], room[PIECE : 2 * PIECE]
    a, b = room[2 * PIECE : 3 * PIECE], room[3 * PIECE :]
    plain = not (mapped or shifted) and (run % 8 == 0 or runs == 1)
    # Lines of whole bytes follow each other as one line does.
    joined = n % 8 == 0 and pitch == n and (scaled == count or runs == 1)
    lines, length = (1, count * n) if joined else (count, n)
    if scaled == 1 and runs == 1:
        run = length
    apart = runs if scaled > 1 else 0
    wide = min(PIECE, (length + WORD - 1) // WORD * WORD)
    at_once = PIECE // wide
    for line in range(0, lines, at_once):
        turns = min(at_once, lines - line)
        for start in range(0, length, PIECE):
            size, byte = min(PIECE, length - start), line * width + (start >> 3)
            place, left = line * apart + start // run, run - start % run
            if mapped:
                for turn in range(turns):
                    source, of_line = bits[(line + turn) * n + start :], depths[turn * wide :]
                    for j in range(size):
                        of_line[j] = source[j]
            if shifted:
                _spread(scales, even * of_level + place, turns, size, wide, apart, left, run, total)
                lost[: turns * wide] = 0
                for level in range(levels):
                    _spread(
                        scales, level * of_level + place, turns, size, wide, apart, left, run, a
                    )
                    _add_level_exactly(held, level * step + byte, turns, size, width, wide, a,
                                       depths, level, total, lost)  # fmt: skip
                for j in range(turns * wide):
                    # It is NaN where a sum is not finite.
                    total[j] += lost[j] if lost[j] == lost[j] else lost.dtype.type(0)
            for level in range(0, 0 if shifted else even, 2):
                first, other = level * step + byte, min(level + 1, levels - 1) * step + byte
                one = level * of_level + place
                two = one + of_level
                if plain:
                    _add_two_levels(held, first, other, turns, size, width, wide, scales, one, two,
                                    apart, left, run, level == 0, total)  # fmt: skip
                else:
                    _spread(scales, one, turns, size, wide, apart, left, run, a)
                    _spread(scales, two, turns, size, wide, apart, left, run, b)
                    _add_two_coded_levels(held, first, other, turns, size, width, wide, a, b,
                                          depths, level, total)  # fmt: skip
            for turn in range(turns):
                at, begin = (line + turn) * pitch + start, turn * wide
                if half.size == 0:
                    values, sums = y[at : at + size], total[begin:]
                    for j in range(values.size):
                        values[j] = sums[j]
                elif ieee:
                    narrow_to_float16(words[begin : begin + size], half[at : at + size])
                else:
                    narrow_to_bfloat16(words[begin : begin + size], half[at : at + size])


@loop
def _sum_columns(
    flat: Array, level_step: int, byte_step: int, scales: Array, count: int, y: Array
) -> None:
    """Write the same, without a map or a shift, where lines lie side by side: y is (n, pitch).

    Scales have the shape (levels, runs, lines or 1); there are `count` lines.
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


def sum_planes(planes: Array, bits: Any, scales: Array, shift: Any, *, y: Array) -> None:
    """`planes.sum_planes`."""
    (levels, width, count), n = planes.shape, y.shape[1]
    mapped, shifted = np.ndim(bits) > 0, np.ndim(shift) > 0
    levels = levels if mapped else min(levels, int(bits))
    if not y.size or not (levels or shifted):
        y[...] = 0
        return
    if planes.strides[2] != 1:
        planes = np.ascontiguousarray(planes)
    level_step, byte_step, _ = planes.strides
    if beside(y) and y.dtype == scales.dtype and not (mapped or shifted):
        held = read_only(turned(scales, levels))
        _sum_columns(read_only(flat(planes)), level_step, byte_step, held, count, lines(y))
        return
    pitch = y.strides[0] // y.itemsize if count > 1 else n
    narrow = floats.is_narrow(y.dtype) and scales.dtype == np.float32
    direct = y.strides[1] == y.itemsize and pitch >= n and y.flags.aligned
    if not (direct and (narrow or y.dtype == scales.dtype)):
        values = np.empty(y.shape, scales.dtype)
        sum_planes(planes, bits, scales, shift, y=values)
        store(values, y)
        return
    padded, scaled, run = _padded(scales[:levels], shift, n)
    held = memory.scratch("planes", (levels * (count * width + SLACK),), np.uint8)
    room = memory.scratch("sums", (4 * PIECE,), scales.dtype)
    depths = memory.scratch("depths", (PIECE,), np.uint8)
    if not mapped:
        depths[:] = MAX_BITS
    values, none = flat(y), np.empty(0, scales.dtype)
    wide, half = (none, values.view(np.uint16)) if narrow else (values, none.view(np.uint16))
    _sum_planes(
        read_only(flat(planes)), level_step, byte_step, count, n, map_of(bits, 0).reshape(-1),
        read_only(padded), levels, scaled, run, shifted, held, depths, room, room.view(np.uint32),
        wide, half, pitch, y.dtype == np.float16,
    )  # fmt: skip


def _padded(scales: Array, shift: Any, n: int) -> tuple[Array, int, int]:
    """Scales and shift as `_sum_planes` takes them, their lines, and the elements of a run."""
    levels, scaled, runs = scales.shape
    even, shifted, run = levels + levels % 2, int(np.ndim(shift) > 0), n // runs
    repeats = run if run < SHORT_RUN and runs > 1 else 1
    shape = (even + shifted, scaled, runs, repeats)
    size = math.prod(shape)
    padded = memory.scratch("scales", (size + WORD,), scales.dtype)
    of_level = padded[:size].reshape(shape)
    of_level[:levels], of_level[levels:even] = scales[..., None], 0
    if shifted:
        of_level[even] = shift[..., None]
    return padded, scaled, run // repeats
