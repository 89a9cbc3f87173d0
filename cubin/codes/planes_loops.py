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

from cubin.core import memory
from cubin.core.bits import MAX_BITS
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

WORD = 32
"""Elements whose values are computed at a time: the bits of a number hold their signs. Loops of
exactly so many steps need no remainder."""

PIECE = 1 << 11
"""Elements whose sums stay in the first-level cache until they are written."""

SHORT_RUN = 32
"""The scales of shorter runs are repeated for each element, unless they fill bytes."""

SLACK = 8
"""Bytes beyond the last that may be read with it, as one number."""


# ---------------------------------------------------------------- bytes


@intrinsic
def _word(context: Any, bytes_of: Any, at: Any) -> Any:
    """Eight bytes of an array as one number, wherever they begin; the first is the lowest."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found = builder.load(_place(context, builder, bytes_of, *arguments))
        found.align = 1
        return found

    return types.uint64(bytes_of, types.intp), generate


@intrinsic
def _turn_block(
    context: Any, source: Any, first: Any, pitch: Any, target: Any, at: Any, step: Any
) -> Any:
    """Write ``target[at + j * step + i] = source[first + i * pitch + j]`` for i and j up to 7.

    Parts of the eight words are swapped in three steps: halves, quarters, bytes. As statements they
    would take Numba a second.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (source, first, pitch, target, at, step), word = arguments, ir.IntType(64)
        words = []
        for _ in range(8):
            words.append(builder.load(_place(context, builder, signature.args[0], source, first)))
            words[-1].align = 1
            first = builder.add(first, pitch)
        for apart, low in ((4, (1 << 32) - 1), (2, 0x0000FFFF0000FFFF), (1, 0x00FF00FF00FF00FF)):
            shift = word(8 * apart)
            for i in range(8):
                if not i & apart:
                    one, other = words[i], words[i + apart]
                    both = builder.and_(builder.xor(builder.lshr(one, shift), other), word(low))
                    words[i] = builder.xor(one, builder.shl(both, shift))
                    words[i + apart] = builder.xor(other, both)
        for value in words:
            where = _place(context, builder, signature.args[3], target, at)
            builder.store(value, where).align = 1
            at = builder.add(at, step)
        return context.get_dummy_value()

    size = types.intp
    return types.none(source, size, size, target, size, size), generate


def _place(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> Any:
    """The address of eight bytes of an array."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), ir.IntType(64).as_pointer())


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
def _turn(
    source: Array, source_step: int, pitch: int, rows: int, columns: int, target: Array,
    target_step: int, step: int, levels: int,
) -> None:  # fmt: skip
    """Write ``target[level * target_step + j * step + i]``, byte after byte, from
    ``source[level * source_step + i * pitch + j]``."""
    source, target = uncounted(source, target)
    whole_rows, whole_columns = rows // 8 * 8, columns // 8 * 8
    byte = source.itemsize
    for level in range(levels):
        first, at = level * source_step, level * target_step
        for i in range(0, whole_rows, 8):
            for j in range(0, whole_columns, 8):
                _turn_block(source, first + i * pitch + j, pitch, target, at + j * step + i, step)
        for j in range(whole_columns, columns):
            _copy(source, first + j, pitch, target, at + j * step, byte, rows)
        for i in range(whole_rows, rows):
            _copy(source, first + i * pitch, byte, target, at + i, step, whole_columns)


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
def _write(sums: Array, turns: int, size: int, wide: int, y: Array, first: int, pitch: int) -> None:
    """Write the sums of a piece to where its lines lie, `pitch` apart."""
    sums, y = uncounted(sums, y)
    for turn in range(turns):
        values, line = y[first + turn * pitch :], sums[turn * wide :]
        for j in range(size):
            values[j] = line[j]


@part
def _piece(
    line: int, start: int, turns: int, length: int, wide: int, pitch: int, apart: int, run: int,
    y_pitch: int,
) -> tuple[int, int, int, int, int, bool]:  # fmt: skip
    """How many elements of a line a piece has; and where it begins.

    That is its first byte, its first scale, what is left of that run, and its first sum. The last
    result is whether its sums are whole words of lines that follow each other.
    """
    size = min(PIECE, length - start)
    whole = size % WORD == 0 and (turns == 1 or y_pitch == wide)
    byte, place = line * pitch + (start >> 3), line * apart + start // run
    return size, byte, place, run - start % run, line * y_pitch + start, whole


@loop
def _sum_levels(
    held: Array, step: int, levels: int, pitch: int, scales: Array, of_level: int, apart: int,
    run: int, total: Array, lines: int, length: int, y: Array, y_pitch: int,
) -> None:  # fmt: skip
    """Write the sums of scale * sign over some levels of lines, where runs fill bytes.

    The bytes of a line begin at multiples of `pitch` in `held`, those of the next level `step`
    further; its scales at multiples of `apart`, those of the next level `of_level` further, with a
    level of 0 to make them even; and its sums at multiples of `y_pitch`. There is room in `total`
    for a piece.
    """
    wide = min(PIECE, (length + WORD - 1) // WORD * WORD)
    at_once, even = PIECE // wide, (levels + 1) // 2 * 2
    for line in range(0, lines, at_once):
        turns = min(at_once, lines - line)
        for start in range(0, length, PIECE):
            size, byte, place, left, at, whole = _piece(
                line, start, turns, length, wide, pitch, apart, run, y_pitch
            )
            sums = y[at:] if whole else total
            for level in range(0, even, 2):
                first, other = level * step + byte, min(level + 1, levels - 1) * step + byte
                one = level * of_level + place
                _add_two_levels(
                    held, first, other, turns, size, pitch, wide, scales, one, one + of_level,
                    apart, left, run, level == 0, sums,
                )  # fmt: skip
            if not whole:
                _write(sums, turns, size, wide, y, at, y_pitch)


@loop
def _sum_coded_levels(
    held: Array, step: int, levels: int, pitch: int, scales: Array, of_level: int, apart: int,
    run: int, room: Array, lines: int, length: int, y: Array, y_pitch: int, bits: Array,
    depths: Array, shifted: bool,
) -> None:  # fmt: skip
    """The same with a map of `bits`, if there is one; and where they are `shifted`, with the shift
    after the levels in `scales`. Runs may be of any length. `room` and `depths` are scratch."""
    bits, depths, room = uncounted(bits, depths, room)
    total, lost = room[:PIECE], room[PIECE : 2 * PIECE]
    a, b = room[2 * PIECE : 3 * PIECE], room[3 * PIECE :]
    wide = min(PIECE, (length + WORD - 1) // WORD * WORD)
    at_once, even = PIECE // wide, (levels + 1) // 2 * 2
    for line in range(0, lines, at_once):
        turns = min(at_once, lines - line)
        for start in range(0, length, PIECE):
            size, byte, place, left, at, whole = _piece(
                line, start, turns, length, wide, pitch, apart, run, y_pitch
            )
            sums = y[at:] if whole else total
            for turn in range(turns if bits.size else 0):
                source, of_line = bits[(line + turn) * length + start :], depths[turn * wide :]
                for j in range(size):
                    of_line[j] = source[j]
            for level in range(0, 0 if shifted else even, 2):
                first, other = level * step + byte, min(level + 1, levels - 1) * step + byte
                one = level * of_level + place
                _spread(scales, one, turns, size, wide, apart, left, run, a)
                _spread(scales, one + of_level, turns, size, wide, apart, left, run, b)
                _add_two_coded_levels(
                    held, first, other, turns, size, pitch, wide, a, b, depths, level, sums
                )
            if shifted:
                _spread(scales, even * of_level + place, turns, size, wide, apart, left, run, sums)
                lost[: turns * wide] = 0
                for level in range(levels):
                    first, one = level * step + byte, level * of_level + place
                    _spread(scales, one, turns, size, wide, apart, left, run, a)
                    _add_level_exactly(
                        held, first, turns, size, pitch, wide, a, depths, level, sums, lost
                    )
                for j in range(turns * wide):
                    # It is NaN where a sum is not finite.
                    sums[j] += lost[j] if lost[j] == lost[j] else lost.dtype.type(0)
            if not whole:
                _write(sums, turns, size, wide, y, at, y_pitch)


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
    in_place = y.strides[1] == y.itemsize and pitch >= n and y.flags.aligned
    if y.dtype != scales.dtype or not in_place:
        values = memory.scratch("values", y.shape, scales.dtype)
        sum_planes(planes, bits, scales, shift, y=values)
        store(values, y)
        return
    padded, scaled, run = _padded(scales[:levels], shift, n)
    step, runs = count * width + SLACK, n // run
    held = memory.scratch("planes", (levels * step,), np.uint8)
    _turn(read_only(flat(planes)), level_step, byte_step, width, count, held, step, width, levels)
    room = memory.scratch("sums", (4 * PIECE,), scales.dtype)
    found, length = count, n
    if n % 8 == 0 and pitch == n and (scaled == count or runs == 1):
        # Lines of whole bytes follow each other as one line does.
        found, length = 1, count * n
    if scaled == 1 and runs == 1:
        run = length
    layout = (held, step, levels, width, read_only(padded), scaled * runs,
              runs if scaled > 1 else 0, run, room, found, length, flat(y), pitch)  # fmt: skip
    if not (mapped or shifted) and (run % 8 == 0 or runs == 1):
        _sum_levels(*layout)
        return
    depths = memory.scratch("depths", (PIECE,), np.uint8)
    depths[:] = MAX_BITS
    _sum_coded_levels(*layout, map_of(bits, 0).reshape(-1), depths, shifted)


def _padded(scales: Array, shift: Any, n: int) -> tuple[Array, int, int]:
    """Scales and shift as `_sum_planes` takes them, their lines, and the elements of a run."""
    levels, scaled, runs = scales.shape
    even, shifted, run = levels + levels % 2, int(np.ndim(shift) > 0), n // runs
    repeats = run if run < SHORT_RUN and run % 8 and runs > 1 else 1
    shape = (even + shifted, scaled, runs, repeats)
    size = math.prod(shape)
    padded = memory.scratch("scales", (size + WORD,), scales.dtype)
    of_level = padded[:size].reshape(shape)
    of_level[:levels], of_level[levels:even] = scales[..., None], 0
    if shifted:
        of_level[even] = shift[..., None]
    return padded, scaled, run // repeats
