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

WORD = 16
"""Elements of a word: they stay in registers for all levels. So many numbers of float32 are one
register of 512 bits, or two of 256."""

_SIZE, _BYTE, _INDEX = ir.IntType(64), ir.IntType(8), ir.IntType(32)


class _Vectors:
    """Instructions on vectors of `WORD` numbers; of fewer, where there is a `mask`."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def spread(self, value: Any, lanes: int = WORD) -> Any:
        """A vector of one number."""
        none = ir.Constant(ir.VectorType(_INDEX, lanes), None)
        empty = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
        first = self._builder.insert_element(empty, value, _INDEX(0))
        return self._builder.shuffle_vector(first, empty, none)

    def below(self, count: Any, lanes: int = WORD, step: int = 1) -> Any:
        """A mask of the lanes whose number times `step` is less than `count`."""
        numbers = ir.Constant(ir.VectorType(_INDEX, lanes), [*range(0, lanes * step, step)])
        count = self._builder.trunc(count, _INDEX)
        return self._builder.icmp_signed("<", numbers, self.spread(count, lanes))

    def load(self, data: Any, start: Any, mask: Any) -> Any:
        """Numbers of an array, from `start` on; 0 beyond the mask."""
        kind = ir.VectorType(data.type.pointee, WORD)
        where = self._builder.bitcast(self._builder.gep(data, [start]), kind.as_pointer())
        if mask is None:
            return self._builder.load(where, align=_width(kind) // WORD)
        given = (where, _INDEX(_width(kind) // WORD), mask, ir.Constant(kind, None))
        return self._call("masked.load", kind, given, kind)

    def store(self, vector: Any, data: Any, start: Any, mask: Any) -> None:
        """Write numbers to an array, from `start` on; none beyond the mask."""
        kind = vector.type
        where = self._builder.bitcast(self._builder.gep(data, [start]), kind.as_pointer())
        if mask is None:
            self._builder.store(vector, where, align=_width(kind) // kind.count)
            return
        given = (vector, where, _INDEX(_width(kind) // kind.count), mask)
        self._call("masked.store", ir.VoidType(), given, kind)

    def _call(self, name: str, result: Any, given: tuple[Any, ...], kind: Any) -> Any:
        letters = {"float": "f32", "double": "f64", "i8": "i8"}[str(kind.element)]
        declared = ir.FunctionType(result, [value.type for value in given])
        name = f"llvm.{name}.v{kind.count}{letters}.p0"
        found = cgutils.get_or_insert_function(self._builder.module, declared, name)
        return self._builder.call(found, given)


def _width(kind: Any) -> int:
    """The bytes of a vector."""
    return kind.count * {"float": 4, "double": 8, "i8": 1}[str(kind.element)]


def _for_each_word(builder: Any, size: Any, work: Callable[[Any, Any, Any], None]) -> None:
    """Instructions that do ``work(start, mask, count)`` for words that tile `size` elements.

    In the last one, which may be shorter, there is a mask of `count` elements, else None.
    """
    whole = builder.and_(size, _SIZE(-WORD))
    with cgutils.for_range_slice(builder, _SIZE(0), whole, _SIZE(WORD)) as (start, _):
        work(start, None, None)
    count = builder.sub(size, whole)
    with builder.if_then(builder.icmp_signed(">", count, _SIZE(0))):
        work(whole, _Vectors(builder).below(count), count)


def _either(builder: Any, condition: Any, work: Callable[[bool], None]) -> None:
    """Instructions for both values of a condition, which is looked at once."""
    with builder.if_else(condition) as (holds, fails):
        with holds:
            work(True)
        with fails:
            work(False)


@intrinsic
def write_bits(
    context: Any, x: Any, bits: Any, scales: Any, levels: Any, signs: Any, at: Any, apart: Any
) -> Any:
    """Write the greedy signs of neighbouring elements as bits, 1 for +1, eight to a byte.

    Those of a level begin at the byte ``at + level * apart`` of `signs`. Bits beyond the last
    element are 0. `scales` has a number for each level, or one for each level and element. `bits`
    is a map of the elements, or empty.
    """
    of_each = scales.ndim == 2

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        elements, depths, factors, target = (
            context.make_array(signature.args[at])(context, builder, arguments[at])
            for at in (0, 1, 2, 4)
        )
        levels, (at, apart) = arguments[3], arguments[5:]
        vectors = _Vectors(builder)
        zeros = ir.Constant(ir.VectorType(elements.data.type.pointee, WORD), None)

        def write(signs: Any, place: Any, count: Any) -> None:
            kind = ir.VectorType(_BYTE, WORD // 8)
            mask = None if count is None else vectors.below(count, WORD // 8, 8)
            vectors.store(builder.bitcast(signs, kind), target.data, place, mask)

        def work(mapped: bool, start: Any, mask: Any, count: Any) -> None:
            # Less than 0 exactly where the residual is greater: it is never -0.0.
            negated = builder.fsub(zeros, vectors.load(elements.data, start, mask))
            left = cgutils.alloca_once_value(builder, negated)
            place = builder.add(at, builder.lshr(start, _SIZE(3)))
            own = vectors.load(depths.data, start, mask) if mapped else None
            with cgutils.for_range(builder, levels) as turn:
                n = builder.load(left)
                positive = signs = builder.fcmp_ordered("<", n, zeros)
                if mapped:
                    level = vectors.spread(builder.trunc(turn.index, _BYTE))
                    signs = builder.and_(signs, builder.icmp_unsigned(">", own, level))
                if mask is not None:
                    signs = builder.and_(signs, mask)
                write(signs, builder.add(place, builder.mul(turn.index, apart)), count)
                if of_each:
                    step, _ = cgutils.unpack_tuple(builder, factors.strides, 2)
                    step = builder.mul(turn.index, step)
                    of_level = cgutils.pointer_add(builder, factors.data, step)
                    scale = vectors.load(of_level, start, mask)
                else:
                    scale = vectors.spread(builder.load(builder.gep(factors.data, [turn.index])))
                taken = builder.select(positive, scale, builder.fneg(scale))
                builder.store(builder.fadd(n, taken), left)

        (size,) = cgutils.unpack_tuple(builder, elements.shape, 1)
        (coded,) = cgutils.unpack_tuple(builder, depths.shape, 1)
        _either(
            builder,
            builder.icmp_signed(">", coded, _SIZE(0)),
            lambda mapped: _for_each_word(builder, size, lambda *word: work(mapped, *word)),
        )
        return context.get_dummy_value()

    size = types.intp
    return types.none(x, bits, scales, size, signs, size, size), generate


@intrinsic
def write_sums(
    context: Any, held: Any, at: Any, apart: Any, levels: Any, scales: Any, place: Any,
    of_level: Any, each: Any, shifted: Any, bits: Any, y: Any,
) -> Any:  # fmt: skip
    """Write the sums of scale * sign over some levels of neighbouring elements to `y`.

    The first element's sign is bit `at` of `held`, that of the next level `apart` bytes further.
    Its scale has the number `place`, that of the next level `of_level` further: all elements have
    the same, or `each` its own, side by side. `bits` is a map of the elements, or empty.

    If they are `shifted`, sums begin with a shift, which follows the scales of the last level. What
    additions round away is added at the end: Knuth's sum of two. Four bytes of `held` are read
    from each that has a sign.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, factors, depths, target = (
            context.make_array(signature.args[at])(context, builder, arguments[at])
            for at in (0, 4, 9, 10)
        )
        at, apart, levels = arguments[1:4]
        place, of_level, each, shifted = arguments[5:9]
        vectors = _Vectors(builder)
        zeros = ir.Constant(ir.VectorType(target.data.type.pointee, WORD), None)

        def word_of(first: Any) -> Any:
            byte = builder.gep(source.data, [builder.lshr(first, _SIZE(3))])
            found = builder.load(builder.bitcast(byte, _INDEX.as_pointer()), align=1)
            found = builder.lshr(found, builder.trunc(builder.and_(first, _SIZE(7)), _INDEX))
            found = builder.trunc(found, ir.IntType(WORD))
            return builder.bitcast(found, ir.VectorType(ir.IntType(1), WORD))

        def work(
            mapped: bool, shifted: bool, each: bool, start: Any, mask: Any, count: Any
        ) -> None:
            first = builder.add(at, start)
            own = vectors.load(depths.data, start, mask) if mapped else None

            def scale_of(level: Any) -> Any:
                number = builder.add(place, builder.mul(level, of_level))
                if each:
                    return vectors.load(factors.data, builder.add(number, start), mask)
                return vectors.spread(builder.load(builder.gep(factors.data, [number])))

            begin = scale_of(levels) if shifted else zeros
            total = cgutils.alloca_once_value(builder, begin)
            lost = cgutils.alloca_once_value(builder, zeros)
            with cgutils.for_range(builder, levels) as turn:
                scale = scale_of(turn.index)
                bit = builder.add(first, builder.shl(builder.mul(turn.index, apart), _SIZE(3)))
                step = builder.select(word_of(bit), scale, builder.fneg(scale))
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
            vectors.store(found, target.data, start, mask)

        (size,) = cgutils.unpack_tuple(builder, target.shape, 1)
        (coded,) = cgutils.unpack_tuple(builder, depths.shape, 1)

        def words(*kind: bool) -> None:
            _for_each_word(builder, size, lambda *word: work(*kind, *word))

        _either(builder, builder.icmp_signed(">", coded, _SIZE(0)), lambda mapped: _either(
            builder, shifted, lambda shifted: _either(
                builder, each, lambda each: words(mapped, shifted, each))))  # fmt: skip
        return context.get_dummy_value()

    size, flag = types.intp, types.boolean
    arguments = (held, size, size, size, scales, size, size, flag, flag, bits, y)
    return types.none(*arguments), generate
