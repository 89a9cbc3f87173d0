"""What compiled loops do that Numba has no name for, as LLVM's instructions.

Numba leaves the choice of vectors to LLVM, which takes the lanes of the widest type in a loop: a
sum in float64 of numbers in float32 has half the lanes that its numbers could have. Here both are
said, so that sums are also rounded the same way on all processors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

LINE = 64
"""Bytes that memory is read and written by."""

_REGISTER = 32
"""Bytes of a vector; LLVM takes two registers for one where they are shorter."""

_UNROLLED = 4
"""Vectors that are gone through at a time."""

_INDEX, _NUMBER, _BYTE = ir.IntType(64), ir.IntType(32), ir.IntType(8)


def instruction(function: Callable[..., Any]) -> Any:
    """What Numba asks for the code, given the types of the arguments after the first."""
    return intrinsic(function)


def is_none(kind: Any) -> bool:
    """Whether the type of an argument is that of None."""
    return isinstance(kind, numba.types.NoneType)


@instruction
def uncounted(context: Any, array: Any) -> Any:
    """The same array, or None, whose slices count no references: it must be held elsewhere.

    Counting them takes longer than the work on a short row.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if is_none(array):
            return context.get_dummy_value()
        view = context.make_array(array)(context, builder, arguments[0])
        view.meminfo, view.parent = view.meminfo.type(None), view.parent.type(None)
        return view._getvalue()

    return array(array), generate


@instruction
def itemsize(context: Any, array: Any) -> Any:
    """The bytes of an element, which Numba has to load, and can divide by no faster than by any."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(_INDEX, array.dtype.bitwidth // 8)

    return numba.types.intp(array), generate


# ---------------------------------------------------------------- stores past the caches


@instruction
def store_line(context: Any, source: Any, target: Any) -> Any:
    """Copy a line between addresses past the caches."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, half = ir.VectorType(_BYTE, LINE // 2), ir.Constant(_INDEX, LINE // 2)
        hint = builder.module.add_metadata([ir.Constant(_NUMBER, 1)])
        source, target = arguments
        for _ in range(2):
            value = builder.load(builder.inttoptr(source, kind.as_pointer()), align=1)
            pointer = builder.inttoptr(target, kind.as_pointer())
            builder.store(value, pointer, align=LINE // 2).set_metadata("nontemporal", hint)
            source, target = builder.add(source, half), builder.add(target, half)
        return context.get_dummy_value()

    return numba.types.void(numba.types.intp, numba.types.intp), generate


@instruction
def prefetch(context: Any, address: Any) -> Any:
    """Begin to read the line at an address, which may be any."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _BYTE.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, _NUMBER, _NUMBER, _NUMBER])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        to_read, into_first_cache, data = (ir.Constant(_NUMBER, value) for value in (0, 3, 1))
        address = builder.inttoptr(arguments[0], pointer)
        builder.call(function, [address, to_read, into_first_cache, data])
        return context.get_dummy_value()

    return numba.types.void(numba.types.intp), generate


@instruction
def finish_stores(context: Any) -> Any:
    """Have other threads see what was stored before what is stored from now on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return numba.types.void(), generate


# ---------------------------------------------------------------- loops over a row


class _Row:
    """The code of a loop over a row: in vectors, and one by one what does not fill them.

    Parameters
    ----------
    context, builder
        Numba's and LLVM's.
    kind
        The dtype of the row, float32 or float64.
    """

    def __init__(self, context: Any, builder: Any, kind: Any) -> None:
        self.context, self.builder = context, builder
        self.number = context.get_value_type(kind)
        self.itemsize = kind.bitwidth // 8
        self.lanes = _REGISTER // self.itemsize

    def array(self, kind: Any, value: Any) -> Any:
        return (
            None
            if is_none(kind)
            else self.context.make_array(kind)(self.context, self.builder, value)
        )

    def loop(self, size: Any, steps: tuple[int, ...], body: Callable[[Any, int], None]) -> None:
        """Call ``body(start, elements)`` for the code of as many elements as each of `steps`."""
        builder, done = self.builder, ir.Constant(_INDEX, 0)
        for elements in steps:
            step = ir.Constant(_INDEX, elements)
            count = builder.udiv(builder.sub(size, done), step)
            with cgutils.for_range(builder, count) as loop:
                body(builder.add(done, builder.mul(loop.index, step)), elements)
            done = builder.add(done, builder.mul(count, step))

    def vector(self, elements: int, kind: Any = None) -> ir.VectorType:
        return ir.VectorType(self.number if kind is None else kind, elements)

    # Numba does not tell apart arrays that are not aligned.
    def load(self, base: Any, at: Any, kind: ir.VectorType) -> Any:
        return self.builder.load(self._pointer(base, at, kind), align=1)

    def store(self, value: Any, base: Any, at: Any) -> None:
        self.builder.store(value, self._pointer(base, at, value.type), align=1)

    def _pointer(self, base: Any, at: Any, kind: ir.Type) -> Any:
        return self.builder.bitcast(self.builder.gep(base, [at]), kind.as_pointer())

    def splat(self, value: Any, kind: ir.VectorType) -> Any:
        """A value in all lanes."""
        undefined = ir.Constant(kind, ir.Undefined)
        one = self.builder.insert_element(undefined, value, ir.Constant(_NUMBER, 0))
        first = ir.Constant(ir.VectorType(_NUMBER, kind.count), None)
        return self.builder.shuffle_vector(one, undefined, first)

    def cut(self, vector: Any, start: int, count: int) -> Any:
        """Some of its lanes."""
        if count == vector.type.count:
            return vector
        chosen = ir.Constant(ir.VectorType(_NUMBER, count), list(range(start, start + count)))
        undefined = ir.Constant(vector.type, ir.Undefined)
        return self.builder.shuffle_vector(vector, undefined, chosen)


@instruction
def sum_in_lanes(context: Any, x: Any, bits: Any, level: Any, scales: Any, left: Any) -> Any:
    """Take scales off the magnitudes of a row, keep what is left, and add it up.

    Parameters
    ----------
    x : array of float32 or float64, shape (n,), contiguous
    bits : array of uint8, shape (n,), contiguous, or None
        An element counts where its bits exceed the level; None if all do.
    level : uint8
    scales : tuple of numbers of x's dtype
    left : array like `x`, or None
        Where to keep ``m`` after ``m = abs(m - scale)`` for each scale; it may be `x`.

    Returns
    -------
    total : float64
        Four magnitudes at a time are added in x's dtype, or two where some do not count: numbers
        that are equal do not round.
    count : int64
        How many elements count.
    """
    given = numba.types.Tuple((numba.types.float64, numba.types.int64))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        results = _Sum(context, builder, signature.args, arguments).results()
        return context.make_tuple(builder, signature.return_type, results)

    return given(x, bits, numba.types.uint8, scales, left), generate


class _Sum(_Row):
    """The code of `sum_in_lanes`, as much of it as the types of its arguments ask for."""

    def __init__(self, context: Any, builder: Any, types: Any, arguments: Any) -> None:
        super().__init__(context, builder, types[0].dtype)
        self._x, self._bits, self._left = (
            self.array(types[number], arguments[number]) for number in (0, 1, 4)
        )
        self._level = arguments[2]
        self._scales = [builder.extract_value(arguments[3], i) for i in range(types[3].count)]
        self._four = self.vector(4, ir.DoubleType())
        zeros = ir.Constant(self._four, None)
        # In vectors of four, and what is added one by one.
        self._totals = [cgutils.alloca_once_value(builder, zeros) for _ in range(self.lanes // 4)]
        self._rest = cgutils.alloca_once_value(builder, ir.Constant(ir.DoubleType(), 0))
        self._count = cgutils.alloca_once_value(builder, ir.Constant(_INDEX, 0))

    def results(self) -> list[Any]:
        builder = self.builder
        size = builder.extract_value(self._x.shape, 0)
        self.loop(size, (_UNROLLED * self.lanes, self.lanes, 1), self._add)
        total = self._pairwise([builder.load(total) for total in self._totals])
        parts = [builder.extract_element(total, ir.Constant(_NUMBER, i)) for i in range(4)]
        total = builder.fadd(self._pairwise(parts), builder.load(self._rest))
        return [total, size if self._bits is None else builder.load(self._count)]

    def _add(self, start: Any, elements: int) -> None:
        builder, lanes = self.builder, min(elements, self.lanes)
        hot = None if self._bits is None else self._hot(start, elements)
        found = []
        for first in range(0, elements, lanes):
            at = builder.add(start, ir.Constant(_INDEX, first))
            m = self._magnitude(self.load(self._x.data, at, self.vector(lanes)))
            for scale in self._scales:
                m = self._magnitude(builder.fsub(m, self.splat(scale, m.type)))
            if self._left is not None:
                self.store(m, self._left.data, at)
            if hot is not None:
                m = builder.select(self.cut(hot, first, lanes), m, ir.Constant(m.type, None))
            found.append(m)
        together = _UNROLLED if hot is None else 2
        for first in range(0, len(found), together):
            self._add_up(self._pairwise(found[first : first + together]))

    def _add_up(self, vector: Any) -> None:
        if vector.type.count == 1:
            part = self._widened(vector)
            part = self.builder.extract_element(part, ir.Constant(_NUMBER, 0))
            self._increase(self._rest, part)
            return
        for number, total in enumerate(self._totals):
            self._increase(total, self._widened(self.cut(vector, 4 * number, 4)))

    def _increase(self, total: Any, part: Any) -> None:
        self.builder.store(self.builder.fadd(self.builder.load(total), part), total)

    def _widened(self, vector: Any) -> Any:
        kind = self.vector(vector.type.count, ir.DoubleType())
        return vector if self.itemsize == 8 else self.builder.fpext(vector, kind)

    def _magnitude(self, vector: Any) -> Any:
        kind = vector.type
        name = f"llvm.fabs.v{kind.count}f{8 * self.itemsize}"
        signature = ir.FunctionType(kind, [kind])
        function = cgutils.get_or_insert_function(self.builder.module, signature, name)
        return self.builder.call(function, [vector])

    def _hot(self, start: Any, elements: int) -> Any:
        """Which elements count, whose number is added."""
        builder, kind = self.builder, self.vector(elements, _BYTE)
        own = self.load(self._bits.data, start, kind)
        hot = builder.icmp_unsigned(">", own, self.splat(self._level, kind))
        number = builder.ctpop(builder.bitcast(hot, ir.IntType(elements)))
        count = builder.add(builder.load(self._count), builder.zext(number, _INDEX))
        builder.store(count, self._count)
        return hot

    def _pairwise(self, values: list[Any]) -> Any:
        while len(values) > 1:
            pairs = zip(values[::2], values[1::2], strict=True)
            values = [self.builder.fadd(first, second) for first, second in pairs]
        return values[0]


@instruction
def levels_in_lanes(
    context: Any, x: Any, bits: Any, first: Any, scales: Any, stored: Any, y: Any, opposite: Any
) -> Any:
    """Write the sum of some levels of a row, and 0 less what is left then.

    Parameters
    ----------
    x : array of float32 or float64, shape (n,), contiguous, or None
        None to go on: `opposite` and `y` hold what levels before have given.
    bits : array of uint8, shape (n,), contiguous, or None
        How many levels an element has; None if it has all of them.
    first : uint8
        The number of the first level.
    scales : tuple of numbers of x's dtype
        One for each level.
    stored : tuple like `scales`, or None
        What is added up, if it is not the scales.
    y : array of float32 or float64, shape (n,), contiguous
    opposite : array like `y`, or None
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _Levels(context, builder, signature.args, arguments).generate()
        return context.get_dummy_value()

    byte = numba.types.uint8
    return numba.types.void(x, bits, byte, scales, stored, y, opposite), generate


class _Levels(_Row):
    """The code of `levels_in_lanes`, as much of it as the types of its arguments ask for."""

    def __init__(self, context: Any, builder: Any, types: Any, arguments: Any) -> None:
        super().__init__(context, builder, types[5].dtype)
        self._x, self._bits, self._y, self._opposite = (
            self.array(types[number], arguments[number]) for number in (0, 1, 5, 6)
        )
        self._first = arguments[2]
        levels = range(types[3].count)
        self._scales = [builder.extract_value(arguments[3], i) for i in levels]
        self._stored = self._scales
        if not is_none(types[4]):
            self._stored = [builder.extract_value(arguments[4], i) for i in levels]

    def generate(self) -> None:
        self.loop(self.builder.extract_value(self._y.shape, 0), (self.lanes, 1), self._write)

    def _write(self, at: Any, elements: int) -> None:
        builder, kind = self.builder, self.vector(elements)
        zeros = ir.Constant(kind, None)
        # 0 - r is never -0.0, so that its sign bit is set exactly where r > 0. Processors select
        # by a sign bit in one instruction; comparing first takes two.
        if self._x is None:
            opposite, total = (self.load(a.data, at, kind) for a in (self._opposite, self._y))
        else:
            opposite, total = builder.fsub(zeros, self.load(self._x.data, at, kind)), zeros
        reached = [total]
        for scale, stored in zip(self._scales, self._stored, strict=True):
            step = self._step(opposite, scale)
            given = step if stored is scale else self._step(opposite, stored)
            opposite = builder.fadd(opposite, step)
            total = builder.fadd(total, given)  # the first to +0, so that it is never -0.0
            reached.append(total)
        self.store(total if self._bits is None else self._own(at, reached), self._y.data, at)
        if self._opposite is not None:
            self.store(opposite, self._opposite.data, at)

    def _step(self, opposite: Any, scale: Any) -> Any:
        """scale * sign(r)."""
        builder, kind = self.builder, opposite.type
        words = self.vector(kind.count, ir.IntType(8 * self.itemsize))
        word, zero = builder.bitcast(opposite, words), ir.Constant(words, None)
        plus, minus = self.splat(scale, kind), self.splat(builder.fneg(scale), kind)
        return builder.select(builder.icmp_signed("<", word, zero), plus, minus)

    def _own(self, at: Any, reached: list[Any]) -> Any:
        """What each element reaches with as many levels as it has."""
        builder, count = self.builder, reached[0].type.count
        words = self.vector(count, _NUMBER)
        own = builder.zext(self.load(self._bits.data, at, self.vector(count, _BYTE)), words)
        value = reached[0]
        for level, more in enumerate(reached[1:]):
            number = builder.add(builder.zext(self._first, _NUMBER), ir.Constant(_NUMBER, level))
            hot = builder.icmp_signed(">", own, self.splat(number, words))
            value = builder.select(hot, more, value)
        return value
