"""The primitives of `products.py` as compiled loops: see there for what each does.

Products look up signed sums: four elements of x have 16 of them, and half a byte of a plane says
which one a line needs. Neighbouring lines lie side by side in a plane. So the sums stay in
registers, and one instruction looks up as many of them as a register has numbers. Many rows of x
are multiplied with decoded tiles, whose lines lie side by side as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from cubin.codes import planes_loops, products
from cubin.codes.decoding import Decoding
from cubin.codes.products import FEW, multiply_tiles
from cubin.core import memory
from cubin.core.host.loops import (
    FEATURES,
    PERMUTE,
    REGISTER,
    in_rows,
    intrinsic,
    loop,
    part,
    read_only,
    spread,
    uncounted,
)
from cubin.core.libraries import Array

_STRIP = 64
"""Bytes of a line whose sums are added up in the work dtype. Their totals are added in float64."""

_FUSED = bool(REGISTER) and "+fma" in FEATURES
"""Whether there are instructions that multiply and add."""

STEPS = max(products.STEPS, REGISTER // 2)
"""`products.STEPS`: a longer register looks up more sums at a time."""

_FEW_FOR_BLAS = 4 * FEW
"""What `FEW` is where only BLAS takes more: it decodes maps, and packs what it multiplies."""

_MADE = 256
"""Lines whose look-ups take as long as making the sums of x."""

_TOTALS = 1 << 13
"""Totals that are added up at a time: the C library keeps so little memory, and maps no pages."""

_AT_ONCE = 256
"""Lines of a map that are packed at a time."""

_LANES = 16
"""The most numbers of a register: so many lines there have to be."""

_SHORT = 4
"""The fewest elements of runs that have scales of each line's own."""


@part
def _fill(x: Array, tables: Array) -> None:
    """Write the 16 sums of each four elements of x; bit t of a number is the sign of element t."""
    for number in range(x.size >> 2):
        table = tables[number]
        a, b, c, d = x[4 * number], x[4 * number + 1], x[4 * number + 2], x[4 * number + 3]
        for h in range(4):
            upper = (c if h & 1 else -c) + (d if h & 2 else -d)
            table[4 * h] = upper - (a + b)
            table[4 * h + 1] = upper + (a - b)
            table[4 * h + 2] = upper - (a - b)
            table[4 * h + 3] = upper + (a + b)


@part
def _join(halves: Array, table: Array) -> None:
    """Write the 256 sums of eight elements from the sums of their halves."""
    for h in range(16):
        value = halves[1, h]
        for v in range(16):
            table[16 * h + v] = value + halves[0, v]


@part
def _add_eight_one_by_one(flat: Array, at: int, step: int, tables: Array, total: Array) -> None:
    """Add the sums of eight bytes of each line; byte j of the first line is at + j * step."""
    n = total.size
    p, q = flat[at : at + n], flat[at + step : at + step + n]
    r, s = flat[at + 2 * step : at + 2 * step + n], flat[at + 3 * step : at + 3 * step + n]
    t, u = flat[at + 4 * step : at + 4 * step + n], flat[at + 5 * step : at + 5 * step + n]
    v, w = flat[at + 6 * step : at + 6 * step + n], flat[at + 7 * step : at + 7 * step + n]
    a, b, c, d = tables[0], tables[1], tables[2], tables[3]
    e, f, g, h = tables[4], tables[5], tables[6], tables[7]
    for i in range(n):
        first = (a[p[i]] + b[q[i]]) + (c[r[i]] + d[s[i]])
        total[i] += first + ((e[t[i]] + f[u[i]]) + (g[v[i]] + h[w[i]]))


@part
def _add_one_by_one(flat: Array, at: int, table: Array, total: Array) -> None:
    """The same for one byte of each line."""
    held = flat[at : at + total.size]
    for i in range(total.size):
        total[i] += table[held[i]]


def _adder(count: int) -> Any:
    """The same for `count` bytes, 1 or 8, of at least `_LANES` lines, by the elements of x.

    It is written in LLVM's instructions, so that the sums of four elements stay in registers. Where
    a register has eight numbers, it has the sums in which the fourth element counts negative. The
    others are the negated sums of the opposite signs.
    """

    @intrinsic
    def add(context: Any, flat: Any, at: Any, step: Any, x: Any, total: Any) -> Any:
        bits = total.dtype.bitwidth
        lanes = 8 * REGISTER // bits
        halved = lanes == 8

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            if lanes not in (8, 16):  # then it is never called
                return context.get_dummy_value()
            planes, values, totals = (
                context.make_array(signature.args[k])(context, builder, arguments[k])
                for k in (0, 3, 4)
            )
            _, start, pitch, _, _ = arguments
            place, integer = ir.IntType(64), ir.IntType(bits)
            numbers = ir.VectorType(context.get_value_type(total.dtype), lanes)
            integers, eight = ir.VectorType(integer, lanes), ir.VectorType(ir.IntType(8), lanes)
            permute = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(integers, [integers] * 2), PERMUTE[lanes, bits]
            )

            def constant(of_lanes: Sequence[int]) -> Any:
                return ir.Constant(integers, list(of_lanes))

            def table(element: int) -> Any:
                """The sums of four elements of x, with the bits of a lane as signs."""
                signed = []
                for t in range(4):
                    value = builder.load(builder.gep(values.data, [place(element + t)]))
                    same = builder.bitcast(spread(builder, value, lanes), integers)
                    flips = constant([(~lane >> t & 1) << bits - 1 for lane in range(lanes)])
                    signed.append(builder.bitcast(builder.xor(same, flips), numbers))
                a, b, c, d = signed
                sums = builder.fadd(builder.fadd(c, d), builder.fadd(a, b))
                sums = builder.bitcast(sums, integers)
                # The bits beside the sign with which `looked_up` will join it.
                beside = constant([lane << bits - 4 for lane in range(lanes)])
                return builder.xor(sums, beside) if halved else sums

            def looked_up(table: Any, index: Any) -> Any:
                """Entries of a table, by the low bits of `index`."""
                found = builder.call(permute, [table, index])
                if halved:
                    signs = builder.shl(index, constant([bits - 4] * lanes))
                    found = builder.xor(found, signs)
                return builder.bitcast(found, numbers)

            tables = [table(4 * number) for number in range(2 * count)]
            (length,) = cgutils.unpack_tuple(builder, totals.shape, 1)
            width = place(lanes)
            steps = builder.udiv(builder.add(length, place(lanes - 1)), width)
            final = builder.sub(length, width)
            with cgutils.for_range(builder, steps) as turn:
                # The last lines may have been added in part.
                wanted = builder.mul(turn.index, width)
                line = builder.select(builder.icmp_signed("<", wanted, final), wanted, final)
                found = []
                for column in range(count):
                    byte = builder.add(start, builder.mul(pitch, place(column)))
                    where = builder.gep(planes.data, [builder.add(byte, line)])
                    held = builder.load(builder.bitcast(where, eight.as_pointer()), align=1)
                    if halved:  # where the fourth sign is positive, the other three are turned
                        word = builder.bitcast(held, place)
                        fourth = builder.and_(word, place(0x8888888888888888))
                        others = builder.sub(fourth, builder.lshr(fourth, place(3)))
                        held = builder.bitcast(builder.xor(word, others), eight)
                    index = builder.zext(held, integers)
                    upper = builder.lshr(index, constant([4] * lanes))
                    upper = looked_up(tables[2 * column + 1], upper)
                    found.append(builder.fadd(upper, looked_up(tables[2 * column], index)))
                while len(found) > 1:
                    pairs = zip(found[::2], found[1::2], strict=True)
                    found = [builder.fadd(one, other) for one, other in pairs]
                where = builder.gep(totals.data, [line])
                where = builder.bitcast(where, numbers.as_pointer())
                done = spread(builder, builder.trunc(builder.sub(wanted, line), integer), lanes)
                new = builder.icmp_unsigned(">=", constant(range(lanes)), done)
                # All lanes are stored: AMD's processors take long to store some of them.
                added = builder.select(new, found[0], ir.Constant(numbers, None))
                before = builder.load(where, align=bits // 8)
                builder.store(builder.fadd(before, added), where, align=bits // 8)
            return context.get_dummy_value()

        return types.void(flat, types.intp, types.intp, x, total), generate

    return add


_add_eight, _add_one = _adder(8), _adder(1)


@part
def _add_strip(
    flat: Array, at: int, level_step: int, byte_step: int, segment: Array, halves: Array,
    tables: Array, totals: Array,
) -> None:  # fmt: skip
    """Add the sums of up to eight bytes of each line to the totals of each level."""
    levels, lines = totals.shape
    one_by_one = lines < _LANES or 8 * segment.itemsize > REGISTER
    count = segment.size >> 3
    if one_by_one:
        _fill(segment, halves)
        for c in range(count):
            _join(halves[2 * c : 2 * c + 2], tables[c])
    for level in range(levels):
        byte, total = level * level_step + at * byte_step, totals[level]
        if count == 8 and one_by_one:
            _add_eight_one_by_one(flat, byte, byte_step, tables, total)
        elif count == 8:
            _add_eight(flat, byte, byte_step, segment, total)
        else:
            for c in range(count):
                if one_by_one:
                    _add_one_by_one(flat, byte, tables[c], total)
                else:
                    _add_one(flat, byte, 0, segment[8 * c :], total)
                byte += byte_step


@loop
def _look_up(
    flat: Array, level_step: int, byte_step: int, run: int, scales: Array, x: Array,
    centred: bool, segment: Array, halves: Array, tables: Array, totals: Array, y: Array,
) -> None:  # fmt: skip
    """Add the products of rows of x with some lines to `y`, (rows, lines) of float64.

    Byte j of line i at a level is ``flat[level * level_step + j * byte_step + i]``. Scales have the
    shape (levels, runs, lines or 1). If the signs are `centred`, they count as 0 and -2, and not as
    +1 and -1. What follows up to `totals`, (levels, lines), is scratch.
    """
    flat, scales, x = uncounted(flat, scales, x)
    segment, halves, tables = uncounted(segment, halves, tables)
    totals, y = uncounted(totals, y)
    levels, lines = totals.shape
    rows, length = x.shape
    for number in range(scales.shape[1]):
        first, last = number * run, min(number * run + run, length)
        end = (last + 7) >> 3
        for start in range(first >> 3, end, _STRIP):
            stop = min(start + _STRIP, end)
            for row in range(rows):
                values, into = x[row], y[row]
                totals[:] = 0
                middle = 0.0
                for at in range(start, stop, 8):
                    size = 8 * min(8, stop - at)
                    # A byte may have elements of several runs.
                    segment[:] = 0
                    for e in range(max(first, 8 * at), min(last, 8 * at + size)):
                        segment[e - 8 * at] = values[e]
                    if centred:
                        for t in range(size):
                            middle += np.float64(segment[t])
                    _add_strip(
                        flat, at, level_step, byte_step, segment[:size], halves, tables, totals
                    )
                for level in range(levels):
                    total, scale = totals[level], scales[level, number]
                    if scale.size == lines:
                        for i in range(lines):
                            into[i] += np.float64(scale[i]) * (np.float64(total[i]) - middle)
                    else:
                        factor = np.float64(scale[0])
                        for i in range(lines):
                            into[i] += factor * (np.float64(total[i]) - middle)


def new_tile(count: int, decoding: Decoding, x: Array) -> Array:
    """`products.new_tile`: lines side by side, as planes have them, are decoded faster."""
    if decoding.mapped or decoding.shifted:
        return products.new_tile(count, decoding, x)
    return np.empty((decoding.lines.length, count), x.dtype).T


def by_lines(x: Array, decoding: Decoding) -> Callable[..., None] | None:
    """`products.by_lines`.

    Looking up the sums of eight elements in a register of 16 numbers takes about as long as to
    multiply eight decoded numbers of 16 lines. So a single level is looked up, for any number of
    rows. Each further level takes as long again for each row, and decoding as long as look-ups for
    about `FEW` rows.
    """
    whole = decoding.run % 8 == 0 or decoding.run == decoding.lines.length
    decoded = _FUSED and whole and not decoding.mapped
    short = not decoding.shared and decoding.run < min(_SHORT, decoding.lines.length)
    # The signs that a map leaves out are looked up, too. And sums have to be made.
    levels = decoding.levels * (2 if decoding.mapped else 1) * (1 + _MADE / decoding.lines.count)
    free = 0 if short else REGISTER // x.itemsize // _LANES
    if len(x) * (levels - free) <= (FEW if decoded or short else _FEW_FOR_BLAS):
        return multiply_lines
    return multiply_decoded if decoded else None


def multiply_lines(planes: Array, bits: Any, scales: Array, x: Array, *, y: Array) -> None:
    """`products.multiply_lines`."""
    levels, width, lines = planes.shape
    mapped, shared, runs = np.ndim(bits) > 0, scales.shape[1] == 1, scales.shape[2]
    run = max(1, x.shape[1] // max(1, runs))
    side_by_side = planes.strides[2] == 1 or lines == 1
    # The scale of a level that no element has may be NaN.
    known = not mapped or bool(np.isfinite(scales).all())
    if not (side_by_side and known and (shared or run >= _SHORT or runs == 1)):
        multiply_tiles(planes_loops.sum_planes, planes, bits, scales, x, y)
        return
    levels = levels if mapped else min(levels, int(bits))
    turned = planes_loops.turned(scales, levels)
    parts = [(planes[:levels], turned, False)]
    if mapped:
        # Elements without a code count as -1 in these products: what they lack to 0 is added.
        hot = np.empty((levels, width, lines), np.uint8)
        for start in range(0, lines, _AT_ONCE):
            cut = slice(start, start + _AT_ONCE)
            for level in range(levels):
                some = np.greater(bits[cut], level).view(np.int8)
                planes_loops.pack_signs(some[None], planes=hot[level : level + 1, :, cut])
        parts.append((hot, turned * turned.dtype.type(-0.5), True))
    step = max(4, _TOTALS // lines)
    for start in range(0, len(x), step):
        rows = slice(start, min(start + step, len(x)))
        total = memory.scratch("total", (rows.stop - start, lines), np.float64)
        total[...] = 0
        for held, factors, centred in parts:
            _add_products(held, run, factors, x[rows], centred, total)
        y[rows] = total


def _add_products(
    planes: Array, run: int, scales: Array, x: Array, centred: bool, y: Array
) -> None:
    """Add the products of rows of x with lines to `y`; arguments as for `_look_up`."""
    levels, _, lines = planes.shape
    level_step, byte_step, _ = planes.strides
    flat = read_only(planes_loops.flat(planes))
    # Where all lines share several scales, x takes them.
    fold = scales.shape[2] == 1 < scales.shape[1]
    scratch = (
        memory.scratch("segment", (64,), x.dtype),
        memory.scratch("halves", (16, 16), x.dtype),
        memory.scratch("tables", (8, 256), x.dtype),
        memory.scratch("totals", (1 if fold else levels, lines), x.dtype),
    )
    if not fold:
        held = read_only(np.ascontiguousarray(x))
        _look_up(flat, level_step, byte_step, run, read_only(scales), held, centred, *scratch, y)
        return
    one = read_only(np.ones((1, 1, 1), x.dtype))
    for level, scale in enumerate(scales[..., 0]):
        held = read_only(x * scale.repeat(run))
        of_level = flat[level * level_step :]
        _look_up(of_level, level_step, byte_step, x.shape[1], one, held, centred, *scratch, y)


# ---------------------------------------------------------------- decoded tiles

_CHUNK = 1 << 9
"""Elements of lines that are decoded at a time, whose products are added up before they join their
total."""

_COLUMNS = 3
"""Registers of neighbouring lines that are multiplied at a time."""

_GROUP = 8 if REGISTER == 64 else 4
"""Rows of x that are multiplied at a time: 24 of 32 registers hold sums, or 12 of 16."""

_WIDE = 11 * _COLUMNS * REGISTER
"""The most bytes of an element of all lines of a tile. This is no power of two: elements that lie
so far apart would fall into the same few places of the cache."""

_ROWS = 1 << 9
"""Rows of x for which a tile is decoded. It bounds the memory of their totals."""


def _address(builder: Any, array: Any, kind: Any, *index: Any) -> Any:
    """Where an element of an array lies, as a pointer to `kind`. Numbers of Python are indices."""
    place = ir.IntType(64)
    at = builder.ptrtoint(array.data, place)
    for number, step in zip(
        index, cgutils.unpack_tuple(builder, array.strides, len(index)), strict=True
    ):
        number = place(number) if isinstance(number, int) else number
        at = builder.add(at, builder.mul(number, step))
    return builder.inttoptr(at, kind.as_pointer())


@intrinsic
def _decode_bytes(
    context: Any, flat: Any, at: Any, level_step: Any, scales: Any, run: Any, tile: Any,
    element: Any, line: Any,
) -> Any:  # fmt: skip
    """Write eight elements of as many lines as a register holds, from a byte of each of them.

    ``tile[element + t, line + i]`` is the sum of the scales of line i with the signs of bit t. The
    bytes of a level are loaded once for all eight.
    """
    size = tile.dtype.bitwidth // 8
    lanes, place = REGISTER // size, ir.IntType(64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        planes, factors, values = (
            context.make_array(signature.args[k])(context, builder, arguments[k]) for k in (0, 3, 5)
        )
        _, start, step, _, number, _, element, line = arguments
        vector = ir.VectorType(context.get_value_type(tile.dtype), lanes)
        integers, eight = (ir.VectorType(ir.IntType(bits), lanes) for bits in (8 * size, 8))
        zero, none = ir.Constant(vector, None), ir.Constant(integers, None)
        sums = [cgutils.alloca_once_value(builder, zero) for _ in range(8)]
        levels = cgutils.unpack_tuple(builder, factors.shape, 3)[0]
        with cgutils.for_range(builder, levels) as turn:
            byte = builder.add(start, builder.mul(turn.index, step))
            held = builder.load(_address(builder, planes, eight, byte), align=1)
            signs = builder.zext(held, integers)
            where = _address(builder, factors, vector, turn.index, number, line)
            plus = builder.load(where, align=size)
            minus = builder.fneg(plus)
            for t, total in enumerate(sums):
                bit = builder.and_(signs, ir.Constant(integers, [1 << t] * lanes))
                signed = builder.select(builder.icmp_unsigned("!=", bit, none), plus, minus)
                builder.store(builder.fadd(builder.load(total), signed), total)
        for t, total in enumerate(sums):
            row = builder.add(element, place(t))
            target = _address(builder, values, vector, row, line)
            builder.store(builder.load(total), target, align=size)
        return context.get_dummy_value()

    whole = types.intp
    return types.void(flat, whole, whole, scales, whole, tile, whole, whole), generate


def _adder_of_products(columns: int) -> Any:
    """Add ``x @ tile`` to totals of `_GROUP` rows, and as many lines as `columns` registers hold.

    Sums stay in registers, which compiled loops over arrays cannot say. They take one product after
    the other.
    """

    @intrinsic
    def add(
        context: Any, tile: Any, count: Any, line: Any, x: Any, row: Any, start: Any, totals: Any
    ) -> Any:
        size = tile.dtype.bitwidth // 8
        lanes, place = REGISTER // size, ir.IntType(64)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            values, rows, sums = (
                context.make_array(signature.args[k])(context, builder, arguments[k])
                for k in (0, 3, 6)
            )
            _, count, line, _, first, start, _ = arguments
            number = context.get_value_type(tile.dtype)
            vector = ir.VectorType(number, lanes)
            fused = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(vector, [vector] * 3),
                f"llvm.fma.v{lanes}f{8 * size}",
            )  # fmt: skip
            zero = ir.Constant(vector, None)
            held = [[cgutils.alloca_once_value(builder, zero) for _ in range(columns)]
                    for _ in range(_GROUP)]  # fmt: skip
            lines = [builder.add(line, place(column * lanes)) for column in range(columns)]
            with cgutils.for_range(builder, count) as turn:
                of_lines = [
                    builder.load(_address(builder, values, vector, turn.index, at), align=size)
                    for at in lines
                ]
                element = builder.add(start, turn.index)
                for r, of_row in enumerate(held):
                    at = _address(builder, rows, number, builder.add(first, place(r)), element)
                    same = spread(builder, builder.load(at), lanes)
                    for value, total in zip(of_lines, of_row, strict=True):
                        added = builder.call(fused, [value, same, builder.load(total)])
                        builder.store(added, total)
            for r, of_row in enumerate(held):
                for at, total in zip(lines, of_row, strict=True):
                    target = _address(builder, sums, vector, builder.add(first, place(r)), at)
                    before = builder.load(target, align=size)
                    builder.store(builder.fadd(before, builder.load(total)), target, align=size)
            return context.get_dummy_value()

        whole = types.intp
        return types.void(tile, whole, whole, x, whole, whole, totals), generate

    return add


_add_one_column, _add_two_columns, _add_three_columns = map(_adder_of_products, (1, 2, 3))


@loop
def _multiply(
    flat: Array, level_step: int, byte_step: int, run: int, scales: Array, x: Array, tile: Array,
    lanes: int, totals: Array,
) -> None:  # fmt: skip
    """Add the products of rows of x with some lines to `totals`, (rows, lines or more).

    Planes are as for `_look_up`; scales have the shape (levels, runs, lines). There are whole
    groups of rows, and at least as many lines as a register holds. A run begins at a byte. `tile`
    is scratch; what it has beyond the lines is added to what `totals` has there.
    """
    flat, scales, x = uncounted(flat, scales, x)
    tile, totals = uncounted(tile, totals)
    lines, (rows, length) = scales.shape[2], x.shape
    for start in range(0, length, _CHUNK):
        count = min(_CHUNK, length - start)
        for j in range((count + 7) >> 3):
            at, of_run = ((start >> 3) + j) * byte_step, (start + 8 * j) // run
            for line in range(0, lines, lanes):
                # The last lines may be written twice: no byte beyond them is read.
                line = min(line, lines - lanes)
                _decode_bytes(flat, at + line, level_step, scales, of_run, tile, 8 * j, line)
        for line in range(0, lines, 3 * lanes):
            for row in range(0, rows, _GROUP):
                if lines - line > 2 * lanes:
                    _add_three_columns(tile, count, line, x, row, start, totals)
                elif lines - line > lanes:
                    _add_two_columns(tile, count, line, x, row, start, totals)
                else:
                    _add_one_column(tile, count, line, x, row, start, totals)


def multiply_decoded(planes: Array, bits: Any, scales: Array, x: Array, *, y: Array) -> None:
    """`products.multiply_lines` on decoded tiles, without a map, where runs begin at bytes.

    A tile of lines lies in the cache, and serves all rows of x. It is not packed anew, as BLAS
    would do. Nor do threads wait for those of BLAS, which spin on for a while after each product.
    """
    lanes = REGISTER // x.itemsize
    levels, lines = min(len(planes), int(bits)), planes.shape[2]
    run = x.shape[1] // scales.shape[2]
    planes = planes[:levels] if planes.strides[2] == 1 else np.ascontiguousarray(planes[:levels])
    if lines < lanes:
        planes = np.pad(planes, ((0, 0), (0, 0), (0, lanes - lines)))
    spread = np.zeros((levels, scales.shape[2], max(lines, lanes)), x.dtype)
    spread[..., :lines] = scales[:levels].transpose(0, 2, 1)
    wide = min(_WIDE // x.itemsize, -(-lines // lanes) * lanes)
    tile = memory.scratch("decoded", (_CHUNK, wide), x.dtype)
    tile[...] = 0
    for top in range(0, len(x), _ROWS):
        rows = slice(top, min(top + _ROWS, len(x)))
        short = -(rows.stop - top) % _GROUP
        held = np.pad(x[rows], ((0, short), (0, 0))) if short else in_rows(x[rows])
        totals = memory.scratch("products", (len(held), wide), x.dtype)
        for first in range(0, lines, wide):
            # At least as many lines as a register holds: some of them once more.
            cut = slice(max(0, min(first, lines - lanes)), min(first + wide, max(lines, lanes)))
            of_lines = planes[..., cut]
            totals[...] = 0
            level_step, byte_step, _ = of_lines.strides
            _multiply(
                read_only(planes_loops.flat(of_lines)), level_step, byte_step, run,
                read_only(np.ascontiguousarray(spread[..., cut])), read_only(held), tile, lanes,
                totals,
            )  # fmt: skip
            some = slice(cut.start, min(cut.stop, lines))
            y[rows, some] = totals[: rows.stop - top, : some.stop - some.start]


@intrinsic
def _ones(context: Any, word: Any) -> Any:
    """The number of ones of a 64-bit word."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


@loop
def _count_unequal(a: Array, b: Array, counts: Array) -> None:
    a, b, counts = uncounted(a, b, counts)
    for start in range(0, len(b), 64):  # so many rows of b stay in the cache
        for row in range(len(a)):
            words = a[row]
            for line in range(start, min(start + 64, len(b))):
                others, count = b[line], np.uint64(0)
                for j in range(words.size):
                    count += _ones(words[j] ^ others[j])
                counts[row, line] = count


def count_unequal(a: Array, b: Array, *, counts: Array) -> None:
    """`products.count_unequal`."""
    found = np.empty(counts.shape, np.int32)
    _count_unequal(read_only(a), read_only(b), found)
    counts[...] = found
