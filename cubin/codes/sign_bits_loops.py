"""Instructions that make bits of signs, sums of bits, and greedy's values: a word of elements at a
time, in vectors.

LLVM makes no such loops itself. A word of bits is what a comparison of vectors gives, or what
selects the numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from cubin.core.host.loops import intrinsic, spread

WORD = 32
"""Elements of a word: they stay in registers for all levels. So many numbers of float32 are two
registers of 512 bits, or four of 256."""

FEWER = WORD // 2
"""Elements at a time where no bits are written: in short rows fewer lanes are idle."""

WITHIN_WORDS = (1, 8, 16, 32)
"""Runs of elements with the same scale of which a word has one or more."""

_SIZE, _INDEX, _BYTE, _WORD = (ir.IntType(bits) for bits in (64, 32, 8, WORD))


class _Vectors:
    """Instructions on vectors of `width` numbers; of fewer, where there is a `mask`."""

    def __init__(self, builder: Any, width: int = WORD) -> None:
        self._builder, self.width = builder, width
        self._numbers = ir.VectorType(_INDEX, width)

    def spread(self, value: Any) -> Any:
        """A vector of one number."""
        return spread(self._builder, value, self.width)

    def repeat(self, data: Any, start: Any, run: int) -> Any:
        """Numbers of an array, from `start` on, `run` times each."""
        kind = ir.VectorType(data.type.pointee, self.width // run)
        where = self._builder.bitcast(self._builder.gep(data, [start]), kind.as_pointer())
        found = self._builder.load(where, align=_bytes(kind.element))
        numbers = ir.Constant(self._numbers, [lane // run for lane in range(self.width)])
        return self._builder.shuffle_vector(found, ir.Constant(kind, ir.Undefined), numbers)

    def below(self, count: Any) -> Any:
        """A mask of the first `count` lanes."""
        numbers = ir.Constant(self._numbers, [*range(self.width)])
        return self._builder.icmp_signed("<", numbers, self.spread(count))

    def load(self, data: Any, start: Any, mask: Any) -> Any:
        """Numbers of an array, from `start` on; 0 beyond the mask."""
        kind = ir.VectorType(data.type.pointee, self.width)
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
        name = f"llvm.{name}.v{self.width}{letters}.p0"
        found = cgutils.get_or_insert_function(self._builder.module, declared, name)
        return self._builder.call(found, given)


def _bytes(number: Any) -> int:
    """The bytes of a number of this type."""
    return {"float": 4, "double": 8, "i8": 1}[str(number)]


def _for_each_word(
    builder: Any, size: Any, work: Callable[[Any, Any, Any], None], width: int = WORD
) -> None:
    """Instructions that do ``work(start, mask, count)`` for words that tile `size` elements.

    In the last one, which may be shorter, there is a mask of `count` elements, else None.
    """
    whole = builder.and_(size, _SIZE(-width))
    with cgutils.for_range_slice(builder, _SIZE(0), whole, _SIZE(width)) as (start, _):
        work(start, None, None)
    count = builder.sub(size, whole)
    with builder.if_then(builder.icmp_signed(">", count, _SIZE(0))):
        work(whole, _Vectors(builder, width).below(builder.trunc(count, _INDEX)), count)


def _for_each_run(
    builder: Any,
    runs: Any,
    size: Any,
    room: Any,
    begin: Any,
    step: Any,
    work: Callable[..., None],
    width: int = WORD,
) -> None:
    """Instructions that do ``work(run, start, mask, count)`` for the words of so many runs.

    A run has `size` elements, and begins at a multiple of `step` after `begin`. Its last word is a
    whole one where that ends within `room`: the elements beyond the run are written later, and a
    part of a word takes longer.
    """
    up = builder.and_(builder.add(size, _SIZE(width - 1)), _SIZE(-width))
    last = builder.sub(room, builder.add(begin, up))
    with cgutils.for_range(builder, runs) as turn:
        fits = builder.icmp_signed("<=", builder.mul(turn.index, step), last)
        count = builder.select(fits, up, size)
        _for_each_word(builder, count, lambda *word: work(turn.index, *word), width)


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
    of_level: Any, each: Any, levels: Any, signs: Any, at: Any, apart: Any, room: Any,
) -> Any:  # fmt: skip
    """Write the greedy signs of `size` elements of `x` from `begin` on as bits, 1 for +1.

    Those of a level begin at the byte ``at + level * apart`` of `signs`, the first in its lowest
    bit. Bits beyond the last element are 0. The first element's scale has the number `place`, that
    of the next level `of_level` further: all elements have the same, or `each` its own, side by
    side. `bits` is a map, in which the first element has the number `first`, or empty.

    The last word is written whole if there are four bytes of `room` for it, which counts from `at`:
    beyond the elements it has zeros, and what belongs there is written later. Else its bytes are
    written one by one.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        elements, depths, factors, target = (
            context.make_array(signature.args[number])(context, builder, arguments[number])
            for number in (0, 3, 5, 10)
        )
        (begin, size), first, (at, apart, room) = arguments[1:3], arguments[4], arguments[11:]
        place, of_level, each, levels = arguments[6:10]
        vectors = _Vectors(builder)
        zeros = ir.Constant(ir.VectorType(elements.data.type.pointee, WORD), None)

        def write(signs: Any, byte: Any, fits: Any, count: Any) -> None:
            found, where = builder.bitcast(signs, _WORD), builder.gep(target.data, [byte])
            if count is None:
                builder.store(found, builder.bitcast(where, _WORD.as_pointer()), align=1)
                return
            with builder.if_else(fits) as (holds, fails):
                with holds:
                    builder.store(found, builder.bitcast(where, _WORD.as_pointer()), align=1)
                with fails:
                    builder.store(builder.trunc(found, _BYTE), where)
                    for first in range(8, WORD, 8):  # byte by byte, which is faster than a mask
                        with builder.if_then(builder.icmp_signed(">", count, _SIZE(first))):
                            value = builder.trunc(builder.lshr(found, _WORD(first)), _BYTE)
                            builder.store(value, builder.gep(where, [_SIZE(first // 8)]))

        def work(mapped: bool, each: bool, start: Any, mask: Any, count: Any) -> None:
            # Less than 0 exactly where the residual is greater: it is never -0.0.
            values = vectors.load(elements.data, builder.add(begin, start), mask)
            left = cgutils.alloca_once_value(builder, builder.fsub(zeros, values))
            done = builder.lshr(start, _SIZE(3))
            byte = builder.add(at, done)
            fits = builder.icmp_signed(">=", builder.sub(room, done), _SIZE(WORD // 8))
            own = vectors.load(depths.data, builder.add(first, start), mask) if mapped else None
            with cgutils.for_range(builder, levels) as turn:
                n = builder.load(left)
                positive = signs = builder.fcmp_ordered("<", n, zeros)
                if mapped:
                    level = vectors.spread(builder.trunc(turn.index, _BYTE))
                    signs = builder.and_(signs, builder.icmp_unsigned(">", own, level))
                if mask is not None:
                    signs = builder.and_(signs, mask)
                write(signs, builder.add(byte, builder.mul(turn.index, apart)), fits, count)
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
    return types.none(*elements, number, signs, number, number, number), generate


@intrinsic
def write_sums(
    context: Any, held: Any, at: Any, apart: Any, levels: Any, scales: Any, place: Any,
    of_level: Any, run: Any, shifted: Any, bits: Any, first: Any, y: Any, begin: Any, size: Any,
    times: Any, room: Any,
) -> Any:  # fmt: skip
    """Write the sums of scale * sign over some levels to `size` elements of `y` from `begin` on.

    The first element's sign is bit `at` of `held`, that of the next level `apart` bytes further.
    Its scale has the number `place`, that of the next level `of_level` further. With a `run` that
    is among `WITHIN_WORDS` so many elements have the same scale, and the next ones the one beside
    it; numbers of a whole word are read. Else all have the same. `bits` is a map, in which the
    first element has the number `first`, or empty.

    All this is done some `times`. So `at`, `place`, `first` and `begin` are pairs: the number, and
    what is added to it each time. Whole words are written as far as there is `room` in `y`: what
    lies beyond the elements is written the next time.

    If they are `shifted`, sums begin with a shift, which follows the scales of the last level. What
    additions round away is added at the end: Knuth's sum of two. Eight bytes of `held` are read
    from each that has a sign.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, factors, depths, target = (
            context.make_array(signature.args[number])(context, builder, arguments[number])
            for number in (0, 4, 9, 11)
        )
        apart, levels = arguments[2:4]
        of_level, run, shifted = arguments[6:9]
        size, times, room = arguments[13:]
        pairs = [cgutils.unpack_tuple(builder, arguments[number], 2) for number in (1, 5, 10, 12)]
        vectors = _Vectors(builder)
        zeros = ir.Constant(ir.VectorType(target.data.type.pointee, WORD), None)

        def signs_of(bit: Any) -> Any:
            byte = builder.gep(source.data, [builder.lshr(bit, _SIZE(3))])
            found = builder.load(builder.bitcast(byte, _SIZE.as_pointer()), align=1)
            found = builder.lshr(found, builder.and_(bit, _SIZE(7)))
            found = builder.trunc(found, ir.IntType(WORD))
            return builder.bitcast(found, ir.VectorType(ir.IntType(1), WORD))

        def work(
            mapped: bool, shifted: bool, run: int, turn: Any, start: Any, mask: Any, _: Any
        ) -> None:
            at, place, first, begin = (
                builder.add(one, builder.mul(turn, step)) for one, step in pairs
            )
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
                first, step = pairs[-1]
                _for_each_run(
                    builder, times, size, room, first, step,
                    lambda *word: work(mapped, shifted, *runs, *word),
                )  # fmt: skip
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

    number, flag, pair = types.intp, types.boolean, types.UniTuple(types.intp, 2)
    levels_of = (held, pair, number, number, scales, pair, number, number, flag)
    return types.none(*levels_of, bits, pair, y, pair, number, number, number), generate


@intrinsic
def write_values(context: Any, x: Any, bits: Any, scales: Any, stored: Any, y: Any) -> Any:
    """Write the greedy sums of scale * sign over the levels of rows, with the scales as `stored`.

    The signs follow from `scales`. `x` and `y` are (rows, n), scales (rows, levels). `bits` is a
    map, or has no columns.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        elements, depths, factors, rounded, target = (
            context.make_array(kind)(context, builder, array)
            for kind, array in zip(signature.args, arguments, strict=True)
        )
        (rows, size), (_, coded), (_, levels) = (
            cgutils.unpack_tuple(builder, array.shape, 2) for array in (elements, depths, factors)
        )
        vectors, number = _Vectors(builder, FEWER), elements.data.type.pointee
        zeros = ir.Constant(ir.VectorType(number, FEWER), None)
        size_of = 8 * _bytes(number)
        words, numbers = (ir.VectorType(ir.IntType(width), FEWER) for width in (size_of, 32))
        top = ir.Constant(words, [1 << (size_of - 1)] * FEWER)

        def work(mapped: bool, row: Any, start: Any, mask: Any, _: Any) -> None:
            at, place = builder.add(builder.mul(row, size), start), builder.mul(row, levels)
            # Its sign bit is set exactly where the residual is greater than 0: it is never -0.0.
            values = vectors.load(elements.data, at, mask)
            left = cgutils.alloca_once_value(builder, builder.fsub(zeros, values))
            total = cgutils.alloca_once_value(builder, zeros)
            own = vectors.load(depths.data, at, mask) if mapped else None
            own = builder.zext(own, numbers) if mapped else None
            with cgutils.for_range(builder, levels) as turn:
                n, number = builder.load(left), builder.add(place, turn.index)
                sign = builder.and_(builder.bitcast(n, words), top)

                def signed(array: Any) -> Any:
                    scale = vectors.spread(builder.load(builder.gep(array.data, [number])))
                    scale = builder.or_(builder.bitcast(scale, words), sign)
                    return builder.bitcast(scale, zeros.type)

                step = signed(rounded)
                if mapped:
                    level = vectors.spread(builder.trunc(turn.index, _INDEX))
                    step = builder.select(builder.icmp_signed(">", own, level), step, zeros)
                builder.store(builder.fsub(builder.load(total), step), total)
                builder.store(builder.fsub(n, signed(factors)), left)
            vectors.store(builder.load(total), target.data, at, mask)

        mapped, none = builder.icmp_signed(">", coded, _SIZE(0)), _SIZE(0)
        _either(builder, mapped, lambda mapped: _for_each_run(
            builder, rows, size, builder.mul(rows, size), none, size,
            lambda *word: work(mapped, *word), FEWER
        ))  # fmt: skip
        return context.get_dummy_value()

    return types.none(x, bits, scales, stored, y), generate
