"""Instructions that make bits of signs, and sums of bits: a word of elements at a time, in vectors.

LLVM makes no such loops itself. A word of bits is what a comparison of vectors gives, or what
selects the numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from cubin.core.host.loops import intrinsic

WORD = 32
"""Elements of a word: they stay in registers for all levels. So many numbers of float32 are two
registers of 512 bits, or four of 256."""

WITHIN_WORDS = (1, 8, 16, 32)
"""Runs of elements with the same scale of which a word has one or more."""

_SIZE, _INDEX, _BYTE, _WORD = (ir.IntType(bits) for bits in (64, 32, 8, WORD))
_NUMBERS = ir.VectorType(_INDEX, WORD)


class _Vectors:
    """Instructions on vectors of `WORD` numbers; of fewer, where there is a `mask`."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def spread(self, value: Any) -> Any:
        """A vector of one number."""
        empty = ir.Constant(ir.VectorType(value.type, WORD), ir.Undefined)
        first = self._builder.insert_element(empty, value, _INDEX(0))
        return self._builder.shuffle_vector(first, empty, ir.Constant(_NUMBERS, None))

    def repeat(self, data: Any, start: Any, run: int) -> Any:
        """Numbers of an array, from `start` on, `run` times each."""
        kind = ir.VectorType(data.type.pointee, WORD // run)
        where = self._builder.bitcast(self._builder.gep(data, [start]), kind.as_pointer())
        found = self._builder.load(where, align=_bytes(kind.element))
        numbers = ir.Constant(_NUMBERS, [lane // run for lane in range(WORD)])
        return self._builder.shuffle_vector(found, ir.Constant(kind, ir.Undefined), numbers)

    def below(self, count: Any) -> Any:
        """A mask of the first `count` lanes."""
        numbers = ir.Constant(_NUMBERS, [*range(WORD)])
        return self._builder.icmp_signed("<", numbers, self.spread(count))

    def load(self, data: Any, start: Any, mask: Any) -> Any:
        """Numbers of an array, from `start` on; 0 beyond the mask."""
        kind = ir.VectorType(data.type.pointee, WORD)
        where = self._builder.bitcast(self._builder.gep(data, [start]), kind.as_pointer())
        if mask is None:
            return self._builder.load(where, align=_bytes(kind.element))
        given = (where, _INDEX(_bytes(kind.element)), mask, ir.Constant(kind, None))
        return self._call("masked.load", kind, given, kind)

    def store(self, vector: Any, data: Any, start: Any, mask: Any) -> None:
        """Write numbers to an array, from `start` on; none beyond the mask."""
        kind = vector.type
        where = self._builder.bitcast(self._builder.gep(data, [start]), kind.as_pointer())
        if mask is None:
            self._builder.store(vector, where, align=_bytes(kind.element))
            return
        given = (vector, where, _INDEX(_bytes(kind.element)), mask)
        self._call("masked.store", ir.VoidType(), given, kind)

    def _call(self, name: str, result: Any, given: tuple[Any, ...], kind: Any) -> Any:
        letters = {"float": "f32", "double": "f64", "i8": "i8"}[str(kind.element)]
        declared = ir.FunctionType(result, [value.type for value in given])
        name = f"llvm.{name}.v{WORD}{letters}.p0"
        found = cgutils.get_or_insert_function(self._builder.module, declared, name)
        return self._builder.call(found, given)


def _bytes(number: Any) -> int:
    """The bytes of a number of this type."""
    return {"float": 4, "double": 8, "i8": 1}[str(number)]


def _for_each_word(builder: Any, size: Any, work: Callable[[Any, Any, Any], None]) -> None:
    """Instructions that do ``work(start, mask, count)`` for words that tile `size` elements.

    In the last one, which may be shorter, there is a mask of `count` elements, else None.
    """
    whole = builder.and_(size, _SIZE(-WORD))
    with cgutils.for_range_slice(builder, _SIZE(0), whole, _SIZE(WORD)) as (start, _):
        work(start, None, None)
    count = builder.sub(size, whole)
    with builder.if_then(builder.icmp_signed(">", count, _SIZE(0))):
        work(whole, _Vectors(builder).below(builder.trunc(count, _INDEX)), count)


def _either(builder: Any, condition: Any, work: Callable[[bool], None]) -> None:
    """Instructions for both values of a condition, which is looked at once."""
    with builder.if_else(condition) as (holds, fails):
        with holds:
            work(True)
        with fails:
            work(False)


@intrinsic
def write_bits(
    context: Any, x: Any, begin: Any, size: Any, bits: Any, first: Any, scales: Any, place: Any,
    of_level: Any, each: Any, levels: Any, signs: Any, at: Any, apart: Any,
) -> Any:  # fmt: skip
    """Write the greedy signs of `size` elements of `x` from `begin` on as bits, 1 for +1.

    Those of a level begin at the byte ``at + level * apart`` of `signs`, the first in its lowest
    bit. Bits beyond the last element are 0. The first element's scale has the number `place`, that
    of the next level `of_level` further: all elements have the same, or `each` its own, side by
    side. `bits` is a map, in which the first element has the number `first`, or empty.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        elements, depths, factors, target = (
            context.make_array(signature.args[number])(context, builder, arguments[number])
            for number in (0, 3, 5, 10)
        )
        (begin, size), first, (at, apart) = arguments[1:3], arguments[4], arguments[11:]
        place, of_level, each, levels = arguments[6:10]
        vectors = _Vectors(builder)
        zeros = ir.Constant(ir.VectorType(elements.data.type.pointee, WORD), None)

        def write(signs: Any, byte: Any, count: Any) -> None:
            found, where = builder.bitcast(signs, _WORD), builder.gep(target.data, [byte])
            if count is None:
                builder.store(found, builder.bitcast(where, _WORD.as_pointer()), align=1)
                return
            builder.store(builder.trunc(found, _BYTE), where)
            for first in range(8, WORD, 8):  # byte by byte, which is faster than a mask
                with builder.if_then(builder.icmp_signed(">", count, _SIZE(first))):
                    value = builder.trunc(builder.lshr(found, _WORD(first)), _BYTE)
                    builder.store(value, builder.gep(where, [_SIZE(first // 8)]))

        def work(mapped: bool, each: bool, start: Any, mask: Any, count: Any) -> None:
            # Less than 0 exactly where the residual is greater: it is never -0.0.
            values = vectors.load(elements.data, builder.add(begin, start), mask)
            left = cgutils.alloca_once_value(builder, builder.fsub(zeros, values))
            byte = builder.add(at, builder.lshr(start, _SIZE(3)))
            own = vectors.load(depths.data, builder.add(first, start), mask) if mapped else None
            with cgutils.for_range(builder, levels) as turn:
                n = builder.load(left)
                positive = signs = builder.fcmp_ordered("<", n, zeros)
                if mapped:
                    level = vectors.spread(builder.trunc(turn.index, _BYTE))
                    signs = builder.and_(signs, builder.icmp_unsigned(">", own, level))
                if mask is not None:
                    signs = builder.and_(signs, mask)
                write(signs, builder.add(byte, builder.mul(turn.index, apart)), count)
                number = builder.add(place, builder.mul(turn.index, of_level))
                if each:
                    scale = vectors.load(factors.data, builder.add(number, start), mask)
                else:
                    scale = vectors.spread(builder.load(builder.gep(factors.data, [number])))
                taken = builder.select(positive, scale, builder.fneg(scale))
                builder.store(builder.fadd(n, taken), left)

        def words(mapped: bool, each: bool) -> None:
            _for_each_word(builder, size, lambda *word: work(mapped, each, *word))

        (coded,) = cgutils.unpack_tuple(builder, depths.shape, 1)
        mapped = builder.icmp_signed(">", coded, _SIZE(0))
        _either(builder, mapped, lambda mapped: _either(
            builder, each, lambda each: words(mapped, each)
        ))  # fmt: skip
        return context.get_dummy_value()

    number, flag = types.intp, types.boolean
    elements = (x, number, number, bits, number, scales, number, number, flag)
    return types.none(*elements, number, signs, number, number), generate


@intrinsic
def write_sums(
    context: Any, held: Any, at: Any, apart: Any, levels: Any, scales: Any, place: Any,
    of_level: Any, run: Any, shifted: Any, bits: Any, first: Any, y: Any, begin: Any, size: Any,
) -> Any:  # fmt: skip
    """Write the sums of scale * sign over some levels to `size` elements of `y` from `begin` on.

    The first element's sign is bit `at` of `held`, that of the next level `apart` bytes further.
    Its scale has the number `place`, that of the next level `of_level` further. With a `run` that
    is among `WITHIN_WORDS` so many elements have the same scale, and the next ones the one beside
    it; numbers of a whole word are read. Else all have the same. `bits` is a map, in which the
    first element has the number `first`, or empty.

    If they are `shifted`, sums begin with a shift, which follows the scales of the last level. What
    additions round away is added at the end: Knuth's sum of two. Eight bytes of `held` are read
    from each that has a sign.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, factors, depths, target = (
            context.make_array(signature.args[number])(context, builder, arguments[number])
            for number in (0, 4, 9, 11)
        )
        at, apart, levels = arguments[1:4]
        place, of_level, run, shifted = arguments[5:9]
        first, (begin, size) = arguments[10], arguments[12:]
        vectors = _Vectors(builder)
        zeros = ir.Constant(ir.VectorType(target.data.type.pointee, WORD), None)

        def signs_of(bit: Any) -> Any:
            byte = builder.gep(source.data, [builder.lshr(bit, _SIZE(3))])
            found = builder.load(builder.bitcast(byte, _SIZE.as_pointer()), align=1)
            found = builder.lshr(found, builder.and_(bit, _SIZE(7)))
            found = builder.trunc(found, ir.IntType(WORD))
            return builder.bitcast(found, ir.VectorType(ir.IntType(1), WORD))

        def work(mapped: bool, shifted: bool, run: int, start: Any, mask: Any, _: Any) -> None:
            own = vectors.load(depths.data, builder.add(first, start), mask) if mapped else None

            def scale_of(level: Any) -> Any:
                number = builder.add(place, builder.mul(level, of_level))
                if run == 1:
                    return vectors.load(factors.data, builder.add(number, start), mask)
                if run:
                    number = builder.add(number, builder.udiv(start, _SIZE(run)))
                    return vectors.repeat(factors.data, number, run)
                return vectors.spread(builder.load(builder.gep(factors.data, [number])))

            total = cgutils.alloca_once_value(builder, scale_of(levels) if shifted else zeros)
            lost = cgutils.alloca_once_value(builder, zeros)
            with cgutils.for_range(builder, levels) as turn:
                scale = scale_of(turn.index)
                bit = builder.add(at, builder.shl(builder.mul(turn.index, apart), _SIZE(3)))
                signs = signs_of(builder.add(bit, start))
                step = builder.select(signs, scale, builder.fneg(scale))
                if mapped:
                    level = vectors.spread(builder.trunc(turn.index, _BYTE))
                    step = builder.select(builder.icmp_unsigned(">", own, level), step, zeros)
                before = builder.load(total)
                rounded = builder.fadd(before, step)
                builder.store(rounded, total)
                if shifted:
                    added = builder.fsub(rounded, before)
                    one = builder.fsub(before, builder.fsub(rounded, added))
                    both = builder.fadd(one, builder.fsub(step, added))
                    builder.store(builder.fadd(builder.load(lost), both), lost)
            found = builder.load(total)
            if shifted:
                # It is NaN where a sum is not finite.
                rest = builder.load(lost)
                rest = builder.select(builder.fcmp_ordered("==", rest, rest), rest, zeros)
                found = builder.fadd(found, rest)
            vectors.store(found, target.data, builder.add(begin, start), mask)

        def words(mapped: bool, shifted: bool, *runs: int) -> None:
            if len(runs) == 1:
                _for_each_word(builder, size, lambda *word: work(mapped, shifted, *runs, *word))
                return
            one, *others = runs
            _either(
                builder,
                builder.icmp_signed("==", run, _SIZE(one)),
                lambda same: words(mapped, shifted, *([one] if same else others)),
            )

        (coded,) = cgutils.unpack_tuple(builder, depths.shape, 1)
        mapped = builder.icmp_signed(">", coded, _SIZE(0))
        _either(builder, mapped, lambda mapped: _either(
            builder, shifted, lambda shifted: words(mapped, shifted, *WITHIN_WORDS, 0)
        ))  # fmt: skip
        return context.get_dummy_value()

    number, flag = types.intp, types.boolean
    levels_of = (held, number, number, number, scales, number, number, number, flag)
    return types.none(*levels_of, bits, number, y, number, number), generate
