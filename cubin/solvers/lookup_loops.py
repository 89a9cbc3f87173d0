"""Instructions that find the cells of magnitudes, and the entries of these, in registers.

A processor that permutes the numbers of a register looks up as many at a time. LLVM makes no such
instructions itself.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from cubin.core.host.loops import PERMUTE, REGISTER, intrinsic, spread

NUMBERS = REGISTER // 4
"""Numbers of 32 bits in a register; 0 where the processor permutes none."""

MOST = REGISTER**2 // 32
"""The most entries of a table: with it, edges and entries fill half of all registers."""


@intrinsic
def find_in_registers(
    context: Any, x: Any, factor: Any, bits: Any, trees: Any, entries: Any, mirrors: Any,
    levels: Any, y: Any,
) -> Any:  # fmt: skip
    """`sorted_rows_loops._bisect` for the first elements of a row, as many as fill registers.

    `entries` and `mirrors` are those of `y`, as words of 32 bits. Trees and entries fill one, two,
    four or eight registers, and mirrors one.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if not NUMBERS:  # then it is never called
            return context.get_dummy_value()
        views = {
            position: context.make_array(signature.args[position])(
                context, builder, arguments[position]
            )
            for position in (0, 2, 3, 4, 5, 7)
        }
        word, number = ir.IntType(64), ir.IntType(32)
        words, floats = ir.VectorType(number, NUMBERS), ir.VectorType(ir.FloatType(), NUMBERS)
        target = views[7].data.type.pointee
        narrow = isinstance(target, ir.IntType)
        one, none = (ir.Constant(words, [value] * NUMBERS) for value in (1, 0))
        (size,) = cgutils.unpack_tuple(builder, views[0].shape, 1)
        (coded,) = cgutils.unpack_tuple(builder, views[2].shape, 1)
        (held,) = cgutils.unpack_tuple(builder, views[3].shape, 1)
        levels = builder.trunc(arguments[6], number)
        scale = spread(builder, arguments[1], NUMBERS)

        def load(position: int, at: Any, kind: Any) -> Any:
            where = builder.gep(views[position].data, [at])
            where = builder.bitcast(where, ir.VectorType(kind, NUMBERS).as_pointer())
            return builder.load(where, align=1)

        def permuted(table: Any, at: Any) -> Any:
            # The processor looks at the lowest bits of the index alone.
            declared = ir.FunctionType(words, [words] * 2)
            name = PERMUTE[NUMBERS, 32]
            function = cgutils.get_or_insert_function(builder.module, declared, name)
            return builder.call(function, [table, at])

        def pick(tables: list[Any], at: Any) -> Any:
            """The numbers ``tables[at]``; further bits of the index choose a register."""
            if len(tables) == 1:
                return permuted(tables[0], at)
            half = len(tables) // 2
            bit = ir.Constant(words, [half * NUMBERS] * NUMBERS)
            upper = builder.icmp_unsigned("!=", builder.and_(at, bit), none)
            return builder.select(upper, pick(tables[half:], at), pick(tables[:half], at))

        def find(registers: int, mapped: bool) -> None:
            edges, values = (
                [load(position, word(turn * NUMBERS), number) for turn in range(registers)]
                for position in (3, 4)
            )
            of_depths = load(5, word(0), number)
            whole = builder.and_(size, word(-NUMBERS))
            with cgutils.for_range_slice(builder, word(0), whole, word(NUMBERS)) as (start, _):
                element = load(0, start, ir.FloatType())
                magnitude = builder.and_(
                    builder.bitcast(element, words), ir.Constant(words, [0x7FFFFFFF] * NUMBERS)
                )
                m = builder.fmul(builder.bitcast(magnitude, floats), scale)

                def next_of(at: Any, edge: Any) -> Any:
                    above = builder.fcmp_ordered(">", m, builder.bitcast(edge, floats))
                    return builder.sub(builder.add(at, at), builder.sext(above, words))

                if mapped:
                    depth = builder.zext(load(2, start, ir.IntType(8)), words)
                    begin = builder.lshr(builder.shl(one, depth), one)
                    held_at = cgutils.alloca_once_value(builder, one)
                    builder.store(one, held_at)
                    with cgutils.for_range(builder, builder.sub(arguments[6], word(1))):
                        at = builder.load(held_at)
                        builder.store(next_of(at, pick(edges, builder.add(begin, at))), held_at)
                    undone = builder.sub(spread(builder, levels, NUMBERS), depth)
                    at = builder.lshr(builder.load(held_at), undone)
                    mirror = permuted(of_depths, depth)
                else:
                    at, first = one, 1
                    while first < registers * NUMBERS:
                        begin = first // NUMBERS
                        some = edges[begin : max(1, 2 * begin)]
                        at, first = next_of(at, pick(some, at)), 2 * first
                    mirror = builder.load(builder.gep(views[5].data, [arguments[6]]))
                    mirror = spread(builder, mirror, NUMBERS)
                value = pick(values, at)
                negative = builder.fcmp_ordered("<=", element, floats(None))
                if narrow:
                    found = builder.select(negative, builder.sub(mirror, value), value)
                    found = builder.trunc(found, ir.VectorType(target, NUMBERS))
                else:
                    value, mirror = (builder.bitcast(each, floats) for each in (value, mirror))
                    found = builder.select(negative, builder.fsub(mirror, value), value)
                where = builder.bitcast(
                    builder.gep(views[7].data, [start]), found.type.as_pointer()
                )
                builder.store(found, where, align=1)

        mapped = builder.icmp_signed(">", coded, word(0))
        for registers in (1, 2, 4, 8)[: (MOST // NUMBERS).bit_length()]:
            fills = builder.icmp_signed("==", held, word(registers * NUMBERS))
            with builder.if_then(fills), builder.if_else(mapped) as (holds, fails):
                with holds:
                    find(registers, True)
                with fails:
                    find(registers, False)
        return context.get_dummy_value()

    return types.none(x, types.float32, bits, trees, entries, mirrors, types.intp, y), generate
