"""The primitives of `products.py` as compiled loops: see there for what each does.

Products look up signed sums: four elements of x have 16 of them, and half a byte of a plane says
which one a line needs. Neighbouring lines lie side by side in a plane. So the sums stay in
registers, and one instruction looks up as many of them as a register has numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cubin.codes import planes_loops
from cubin.codes.products import multiply_tiles
from cubin.core import memory
from cubin.core.host.loops import in_rows, loop, read_only, uncounted
from cubin.core.libraries import Array

_STRIP = 64
"""Bytes of a line whose sums are added up in the work dtype. Their totals are added in float64."""

_LANES = 16
"""The most lines that are looked up at a time, and the fewest that there have to be."""

_SHORT = 8
"""The fewest elements of runs that have scales of each line's own."""


def _adder(count: int) -> Any:
    """An intrinsic that adds up `count` bytes of lines that lie side by side.

    ``add(flat, at, step, x, total)`` adds to ``total[i]`` the sum of the 8 * count elements of x
    with the signs in the bytes ``flat[at + j * step + i]``: first those of half a byte, then the
    halves, then bytes by pairs. There are at least `_LANES` totals.
    """

    @intrinsic
    def add(context: Any, flat: Any, at: Any, step: Any, x: Any, total: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            planes, values, totals = (
                context.make_array(signature.args[k])(context, builder, arguments[k])
                for k in (0, 3, 4)
            )
            _, start, pitch, _, _ = arguments
            size = total.dtype.bitwidth // 8
            lanes = (64 if "+avx512f" in context.codegen().magic_tuple()[2] else 32) // size
            number, integer, byte = (
                context.get_value_type(total.dtype), ir.IntType(8 * size), ir.IntType(8),
            )  # fmt: skip
            numbers, integers, bytes_ = (
                ir.VectorType(kind, lanes) for kind in (number, integer, byte)
            )
            place = ir.IntType(32)

            def spread(value: Any) -> Any:
                kind = ir.VectorType(value.type, lanes)
                first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, place(0))
                order = ir.Constant(ir.VectorType(place, lanes), [0] * lanes)
                return builder.shuffle_vector(first, first, order)

            def sums(first: int) -> list[Any]:
                """The 16 sums of four elements. Bit t of a number is the sign of element t."""
                found: list[Any] = []
                four = [
                    spread(builder.load(builder.gep(values.data, [at_type(first + t)])))
                    for t in range(4)
                ]
                for begin in range(0, 16, lanes):
                    result = None
                    for t, value in enumerate(four):
                        signs = [2.0 * (v >> t & 1) - 1 for v in range(begin, begin + lanes)]
                        term = builder.fmul(value, ir.Constant(numbers, signs))
                        result = term if result is None else builder.fadd(result, term)
                    found.append(result)
                return found

            def looked_up(table: list[Any], index: Any) -> Any:
                """``table[index]``, written so that LLVM makes one instruction of each part."""
                within = builder.and_(index, ir.Constant(integers, lanes - 1))
                found = []
                for of_part in table:
                    result = ir.Constant(numbers, ir.Undefined)
                    for lane in map(place, range(lanes)):
                        entry = builder.extract_element(within, lane)
                        chosen = builder.extract_element(of_part, entry)
                        result = builder.insert_element(result, chosen, lane)
                    found.append(result)
                bit = lanes
                while len(found) > 1:
                    masked = builder.and_(index, ir.Constant(integers, bit))
                    upper = builder.icmp_unsigned("!=", masked, ir.Constant(integers, 0))
                    pairs = zip(found[::2], found[1::2], strict=True)
                    found = [builder.select(upper, high, low) for low, high in pairs]
                    bit *= 2
                return found[0]

            at_type = start.type
            tables = [(sums(8 * j), sums(8 * j + 4)) for j in range(count)]
            (length,) = cgutils.unpack_tuple(builder, totals.shape, 1)
            width = at_type(lanes)
            steps = builder.sdiv(builder.add(length, at_type(lanes - 1)), width)
            final = builder.sub(length, width)
            with cgutils.for_range(builder, steps) as turn:
                # The last vector may begin at lines that have been added already.
                wanted = builder.mul(turn.index, width)
                line = builder.select(builder.icmp_signed("<", wanted, final), wanted, final)
                found = []
                for j, (low, high) in enumerate(tables):
                    column = builder.add(start, builder.mul(pitch, at_type(j)))
                    source = builder.gep(planes.data, [builder.add(column, line)])
                    held = builder.load(builder.bitcast(source, bytes_.as_pointer()), align=1)
                    index = builder.zext(held, integers)
                    upper = builder.lshr(index, ir.Constant(integers, 4))
                    lower = builder.and_(index, ir.Constant(integers, 15))
                    found.append(builder.fadd(looked_up(high, upper), looked_up(low, lower)))
                while len(found) > 1:
                    found = [
                        builder.fadd(p, q) for p, q in zip(found[::2], found[1::2], strict=True)
                    ]
                target = builder.gep(totals.data, [line])
                target = builder.bitcast(target, numbers.as_pointer())
                before = builder.load(target, align=size)
                done = (
                    builder.trunc(builder.sub(wanted, line), integer)
                    if size < 8
                    else (builder.sub(wanted, line))
                )
                new = builder.icmp_unsigned(
                    ">=", ir.Constant(integers, list(range(lanes))), spread(done)
                )
                added = builder.fadd(before, found[0])
                builder.store(builder.select(new, added, before), target, align=size)
            return context.get_dummy_value()

        return types.void(flat, types.intp, types.intp, x, total), generate

    return add


_add_eight, _add_one = _adder(8), _adder(1)


@loop
def _look_up(
    flat: Array, level_step: int, byte_step: int, run: int, scales: Array, x: Array,
    centred: bool, segment: Array, totals: Array, y: Array,
) -> None:  # fmt: skip
    """Add the products of x with some lines to `y`, in float64.

    Byte j of line i at a level is ``flat[level * level_step + j * byte_step + i]``. Scales have the
    shape (levels, runs, lines or 1). If the signs are `centred`, they count as 0 and -2, and not as
    +1 and -1. `segment` and `totals`, (levels, lines), are scratch.
    """
    flat, scales, x = uncounted(flat, scales, x)
    segment, totals, y = uncounted(segment, totals, y)
    levels, lines = totals.shape
    none = x.dtype.type(0)
    for number in range(scales.shape[1]):
        first, last = number * run, min(number * run + run, x.size)
        end = (last + 7) >> 3
        for start in range(first >> 3, end, _STRIP):
            stop = min(start + _STRIP, end)
            totals[:] = 0
            middle = 0.0
            for at in range(start, stop, 8):
                count = min(8, stop - at)
                for t in range(8 * count):
                    # A byte may have elements of several runs.
                    e = 8 * at + t
                    segment[t] = x[e] if first <= e and e < last else none
                if centred:
                    for t in range(8 * count):
                        middle += np.float64(segment[t])
                for level in range(levels):
                    of_level = level * level_step + at * byte_step
                    if count == 8:
                        _add_eight(flat, of_level, byte_step, segment, totals[level])
                        continue
                    for c in range(count):
                        column = of_level + c * byte_step
                        _add_one(flat, column, byte_step, segment[8 * c :], totals[level])
            for level in range(levels):
                total, scale = totals[level], scales[level, number]
                if scale.size == lines:
                    for i in range(lines):
                        y[i] += np.float64(scale[i]) * (np.float64(total[i]) - middle)
                else:
                    factor = np.float64(scale[0])
                    for i in range(lines):
                        y[i] += factor * (np.float64(total[i]) - middle)


def multiply_lines(planes: Array, bits: Any, scales: Array, x: Array, *, y: Array) -> None:
    """`products.multiply_lines`."""
    levels, width, lines = planes.shape
    mapped, shared, runs = np.ndim(bits) > 0, scales.shape[1] == 1, scales.shape[2]
    run = max(1, x.shape[1] // max(1, runs))
    fits = lines >= _LANES and planes.strides[2] == 1 and (shared or run >= _SHORT or runs == 1)
    # The scale of a level that no element has may be NaN.
    if not fits or (mapped and not np.isfinite(scales).all()):
        multiply_tiles(planes_loops.sum_planes, planes, bits, scales, x, y)
        return
    levels = levels if mapped else min(levels, int(bits))
    total = np.zeros(y.shape, np.float64)
    turned = np.empty((levels, runs, scales.shape[1]), scales.dtype)
    for of_level, scale in zip(turned, scales, strict=False):
        of_level[...] = in_rows(scale.T)
    _add_products(planes[:levels], run, turned, x, False, total)
    if mapped:
        # Elements without a code have counted as -1: what they lack to 0 is added.
        hot = np.empty((levels, width, lines), np.uint8)
        for level in range(levels):
            some = np.greater(bits, level).view(np.int8)
            planes_loops.pack_signs(some[None], planes=hot[level : level + 1])
        _add_products(hot, run, turned * turned.dtype.type(-0.5), x, True, total)
    y[...] = total


def _add_products(
    planes: Array, run: int, scales: Array, x: Array, centred: bool, y: Array
) -> None:
    """Add the products of rows of x with lines to `y`; arguments as for `_look_up`."""
    levels, width, lines = planes.shape
    level_step, byte_step, _ = planes.strides
    extent = (levels - 1) * level_step + (width - 1) * byte_step + lines
    flat = read_only(np.lib.stride_tricks.as_strided(planes, (extent,), (1,)))
    segment = memory.scratch("segment", (64,), x.dtype)
    fold = scales.shape[2] == 1 < scales.shape[1]
    totals = memory.scratch("totals", (1 if fold else levels, lines), x.dtype)
    one = read_only(np.ones((1, 1, 1), x.dtype))
    for values, result in zip(x, y, strict=True):
        if not fold:
            held = read_only(np.ascontiguousarray(values))
            _look_up(flat, level_step, byte_step, run, read_only(scales), held, centred,
                     segment, totals, result)  # fmt: skip
            continue
        # All lines share the scales: x takes them.
        for level, scale in enumerate(scales[..., 0]):
            held = read_only(values * scale.repeat(run)[: values.size])
            _look_up(flat[level * level_step :], level_step, byte_step, held.size, one, held,
                     centred, segment, totals, result)  # fmt: skip


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
