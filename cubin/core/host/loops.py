"""What compiled loops are made with: decorators, sums in a fixed order, and conversions.

A loop is a plain Python function that Numba compiles. It releases the GIL. Greedy's loops allocate
nothing: their callers pass scratch memory.

Every combination of argument types is compiled anew, which takes seconds. So there are few: arrays
are contiguous, and float32 or float64. Where there is no bit map, a map without columns is passed.

Numba keeps compiled loops in ``__pycache__``. To see whether they are up to date it looks at the
file of the loop alone: after a change to this file, delete ``cubin/**/__pycache__/*.nb?``.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.core.registry import cpu_target

from cubin.core import floats, memory
from cubin.core.host.blocks import BESIDE
from cubin.core.libraries import Array
from cubin.core.sums import CHUNK, COLUMNS, LANES, SHORT, UNIT

intrinsic: Any = numba.extending.intrinsic
"""The same, without Numba's annotations: to them every call has a context."""


class _Cache(FunctionCache):
    """Numba's cache of compiled loops on disk, made safe against damaged entries.

    A killed process, a full disk or two processes that save at once leave entries that cannot be
    read, or that hold a loop for other types. Numba raises for the former at every call of the
    loop, and runs the latter as it is. Here both are dropped, and the loop is compiled again.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The loop for the types `sig`, or None where there is no sound entry."""
        try:
            entry = super().load_overload(sig, target_context)
        except Exception:  # unpickling a damaged entry may raise anything
            entry = None
        else:
            if entry is None or entry.signature.args == tuple(sig):
                return entry
        with contextlib.suppress(OSError):
            self.flush()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep the loop for the types `sig`, or warn that this is not possible."""
        try:
            super().save_overload(sig, data)
        except Exception:
            warnings.warn(
                f"compiled loops cannot be kept in {self.cache_path}, so every process compiles "
                "them again: delete that folder, or let it be written",
                RuntimeWarning,
                stacklevel=2,
            )


def loop(function: Callable[..., Any]) -> Any:
    """Compile a function for the types that it is called with, and keep the result on disk."""
    return _kept(function, nogil=True)


def bare_loop(function: Callable[..., Any]) -> Any:
    """The same for a function that allocates nothing: Numba then counts no references.

    Counting takes longer than the work on a short row.
    """
    return _kept(function, nogil=True, _nrt=False)


def inner_loop(function: Callable[..., Any]) -> Any:
    """A bare loop that other loops alone call: Numba makes no form of it that Python can call."""
    return _kept(function, no_cpython_wrapper=True, _nrt=False)


def _kept(function: Callable[..., Any], **options: bool) -> Any:
    njit: Any = numba.njit  # its annotations lack some options
    compiled = njit(no_cfunc_wrapper=True, **options)(function)
    with contextlib.suppress(RuntimeError):  # no folder to keep the cache in can be written
        compiled._cache = _Cache(function)
    return compiled


def part(function: Callable[..., Any]) -> Any:
    """Make a function one that Numba inlines into every loop that calls it.

    Compiling then takes half as long as with a function of its own.
    """
    return numba.njit(nogil=True, inline="always")(function)


@intrinsic
def uncounted(context: Any, *kinds: Any) -> Any:
    """The same arrays, as a tuple, but without reference counts: the caller must keep them alive.

    Numba counts a reference for every slice of an array, which takes longer than the work on a
    short row. Numba has no public function that turns this off.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        views = []
        for number, kind in enumerate(kinds):
            view = context.make_array(kind)(
                context, builder, builder.extract_value(arguments[0], number)
            )
            view.meminfo = cgutils.get_null_value(view.meminfo.type)
            views.append(view._getvalue())
        return context.make_tuple(builder, signature.return_type, views)

    return numba.types.Tuple(kinds)(numba.types.StarArgTuple(kinds)), generate


@intrinsic
def prefetch(context: Any, array: Any, start: Any, count: Any) -> Any:
    """Have the processor read `count` elements from `start` on into the cache meanwhile.

    They may lie beyond the end of the array: what is not there is not read.
    """
    step = memory.LINE // (array.dtype.bitwidth // 8)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        byte, number, word = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(64)
        declared = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, declared, "llvm.prefetch.p0")
        stop = builder.add(*arguments[1:])
        with cgutils.for_range_slice(builder, arguments[1], stop, word(step)) as (index, _):
            where = builder.bitcast(builder.gep(data, [index]), byte)
            builder.call(function, [where, number(0), number(3), number(1)])  # to read; data
        return context.get_dummy_value()

    return numba.void(array, numba.int64, numba.int64), generate


FEATURES = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
"""What instructions the processor has, as LLVM names it."""

REGISTER = 64 if "+avx512f" in FEATURES else 32 if "+avx2" in FEATURES else 0
"""Bytes of a register in which an instruction looks numbers up, eight or more at a time."""

PERMUTE = {
    (8, 32): "llvm.x86.avx2.permd",
    (16, 32): "llvm.x86.avx512.permvar.si.512",
    (8, 64): "llvm.x86.avx512.permvar.di.512",
}
"""These instructions, by the numbers of a register and their bits."""

# ---------------------------------------------------------------- sums

# These do what `cubin.core.sums` does, operation by operation. Each loop has numbers of one width
# alone, so that LLVM can fill vector registers. LLVM may not reorder additions (there is no
# `fastmath`), so that all processors round the same way.


@intrinsic
def _add_columns(context: Any, m: Any, taken: Any, n: Any, sums: Any) -> Any:
    """Write the sums of `COLUMNS` columns of n residuals ``||m| - taken|``: of the first half and
    the second half, then of the halves of that, and so on.

    LLVM makes vectors of long columns alone. There are at least eight residuals in one: the last
    eight may be added up twice.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data, target = (context.make_array(signature.args[position])(
            context, builder, arguments[position]).data for position in (0, 3))  # fmt: skip
        number = context.get_value_type(m.dtype)
        vector, size, word = ir.VectorType(number, LANES), m.dtype.bitwidth // 8, ir.IntType(64)
        letters = f"v{LANES}f{8 * size}"
        declared = ir.FunctionType(vector, [vector])
        fabs = cgutils.get_or_insert_function(builder.module, declared, f"llvm.fabs.{letters}")
        scale = spread(builder, arguments[1])

        def place(array: Any, at: Any) -> Any:
            return builder.bitcast(builder.gep(array, [at]), vector.as_pointer())

        def total(at: Any, column: int, step: int) -> Any:
            if step < COLUMNS:
                other = column + step
                return builder.fadd(total(at, column, 2 * step), total(at, other, 2 * step))
            at = builder.add(at, builder.mul(arguments[2], word(column)))
            left = builder.call(fabs, [builder.load(place(data, at), align=size)])
            return builder.call(fabs, [builder.fsub(left, scale)])

        last = builder.sub(arguments[2], word(LANES))
        with cgutils.for_range_slice(builder, word(0), arguments[2], word(LANES)) as (at, _):
            at = builder.select(builder.icmp_signed("<", at, last), at, last)
            builder.store(total(at, 0, 1), place(target, at), align=size)
        return context.get_dummy_value()

    return numba.void(m, m.dtype, numba.int64, sums), generate


def spread(builder: Any, value: Any, width: int = LANES) -> Any:
    """A vector of one value."""
    empty = ir.Constant(ir.VectorType(value.type, width), ir.Undefined)
    first = builder.insert_element(empty, value, ir.IntType(32)(0))
    every = ir.Constant(ir.VectorType(ir.IntType(32), width), None)
    return builder.shuffle_vector(first, empty, every)


def _in_pairs(builder: Any, vector: Any, plus: Any) -> Any:
    """The sum of the lanes of a vector, in pairs."""
    width = LANES
    while width > 1:
        width //= 2
        half = ir.VectorType(ir.IntType(32), width)
        even, odd = (half(list(range(first, 2 * width, 2))) for first in (0, 1))
        vector = plus(
            builder.shuffle_vector(vector, vector, even),
            builder.shuffle_vector(vector, vector, odd),
        )
    return builder.extract_element(vector, ir.IntType(32)(0))


def _in_lanes(
    context: Any, builder: Any, kinds: Any, numbers: Any, size: Any, taken: Any = None,
    bits: Any = None, level: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Instructions that add numbers to eight lanes in turn, and the lanes in pairs; and count them.

    With scales `taken` the numbers are the magnitudes of what these leave. With `bits` those of
    elements with a code at `level` count. `kinds` are the types of all arguments from `numbers` on.

    LLVM makes vectors of a loop only where that is long, and rows of few elements are common. The
    last numbers, which do not fill the lanes, are read with a mask.
    """
    word, none = ir.IntType(64), ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
    wide = ir.VectorType(ir.DoubleType(), LANES)

    def view(position: int, array: Any) -> Any:
        return context.make_array(kinds[position])(context, builder, array)

    def function(name: str, result: Any, *arguments: Any) -> Any:
        letters = {"float": "f32", "double": "f64", "i8": "i8"}[str(result.element)]
        declared = ir.FunctionType(result, [argument.type for argument in arguments])
        name = f"llvm.{name}.v{LANES}{letters}" + ".p0" * (name == "masked.load")
        found = cgutils.get_or_insert_function(builder.module, declared, name)
        return builder.call(found, arguments)

    def load(position: int, array: Any, start: Any, mask: Any) -> Any:
        kind = kinds[position].dtype
        vector = ir.VectorType(context.get_value_type(kind), LANES)
        where = builder.gep(view(position, array).data, [start])
        where = builder.bitcast(where, vector.as_pointer())
        if mask is None:
            return builder.load(where, align=kind.bitwidth // 8)
        align = ir.IntType(32)(kind.bitwidth // 8)
        return function("masked.load", vector, where, align, mask, vector(None))

    def add(start: Any, mask: Any = None) -> None:
        found = load(0, numbers, start, mask)
        zeros, coded = found.type(None), mask
        if taken is not None:
            found = function("fabs", found.type, found)
            left = cgutils.alloca_once_value(builder, found)
            scales = view(2, taken)
            (levels,) = cgutils.unpack_tuple(builder, scales.shape, 1)
            with cgutils.for_range(builder, levels) as turn:
                scale = spread(builder, builder.load(builder.gep(scales.data, [turn.index])))
                found = builder.fsub(builder.load(left), scale)
                builder.store(function("fabs", found.type, found), left)
            found = builder.load(left)
        if bits is not None:
            coded = builder.icmp_unsigned(">", load(3, bits, start, mask), spread(builder, level))
            coded = coded if mask is None else builder.and_(coded, mask)
        if coded is not None:
            found = builder.select(coded, found, zeros)
        if found.type != wide:
            found = builder.fpext(found, wide)
        builder.store(builder.fadd(builder.load(lanes), found), lanes)
        if bits is not None:
            more = builder.zext(coded, none.type)
            builder.store(builder.add(builder.load(counts), more), counts)

    lanes, counts = (cgutils.alloca_once_value(builder, kind(None)) for kind in (wide, none.type))
    whole = builder.and_(size, word(-LANES))
    with cgutils.for_range_slice(builder, word(0), whole, word(LANES)) as (start, _):
        add(start)
    rest, lane = builder.sub(size, whole), ir.Constant(ir.VectorType(word, LANES), [*range(LANES)])
    with builder.if_then(builder.icmp_signed(">", rest, word(0))):
        add(whole, builder.icmp_signed("<", lane, spread(builder, rest)))
    count = size if bits is None else _in_pairs(builder, builder.load(counts), builder.add)
    return _in_pairs(builder, builder.load(lanes), builder.fadd), count


@intrinsic
def sum_in_lanes(context: Any, numbers: Any, size: Any) -> Any:
    """The sum of the first `size` numbers, in eight lanes that take one number each in turn."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _in_lanes(context, builder, signature.args, *arguments)[0]

    return numba.float64(numbers, numba.int64), generate


@intrinsic
def residual_sum(context: Any, x: Any, size: Any, taken: Any) -> Any:
    """The same of the magnitudes of x that the scales `taken` leave."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _in_lanes(context, builder, signature.args, *arguments)[0]

    return numba.float64(x, numba.int64, taken), generate


@intrinsic
def coded_residual_sum(context: Any, x: Any, size: Any, taken: Any, bits: Any, level: Any) -> Any:
    """The same of elements with a code at a level, and their number."""
    result = numba.types.Tuple((numba.float64, numba.int32))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found = _in_lanes(context, builder, signature.args, *arguments)
        return context.make_tuple(builder, result, found)

    return result(x, numba.int64, taken, bits, numba.uint8), generate


@intrinsic
def sum_above(context: Any, m: Any, edge: Any, values: Any) -> Any:
    """The sum of the values of elements whose magnitudes `m` lie above an edge, and their number.

    The elements, a multiple of 32, are four columns, which are added in pairs in the work dtype.
    What this gives goes to eight lanes in turn. LLVM would store it first, and make vectors of half
    the size: this takes half to two thirds of the time where there are vectors of 64 bytes.
    """
    size, width = m.dtype.bitwidth // 8, 512 // m.dtype.bitwidth
    number, word = ir.IntType(32), ir.IntType(64)
    numbers, wide = ir.VectorType(number, width), ir.VectorType(ir.DoubleType(), LANES)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = context.get_value_type(m.dtype)
        magnitudes, chosen = (
            context.make_array(array)(context, builder, argument)
            for array, argument in ((m, arguments[0]), (values, arguments[2]))
        )
        (elements,) = cgutils.unpack_tuple(builder, magnitudes.shape, 1)
        column = builder.lshr(elements, word(2))
        lanes, counts = (cgutils.alloca_once_value(builder, of(None)) for of in (wide, numbers))

        def add(start: Any, width: int) -> None:
            vector, found = ir.VectorType(kind, width), []

            def load(array: Any, at: Any) -> Any:
                where = builder.bitcast(builder.gep(array.data, [at]), vector.as_pointer())
                return builder.load(where, align=size)

            for turn in range(4):
                at = builder.add(start, builder.mul(column, word(turn)))
                limit = spread(builder, arguments[1], width)
                above = builder.fcmp_ordered(">", load(magnitudes, at), limit)
                found.append(builder.select(above, load(chosen, at), vector(None)))
                # As many as there are counters.
                every = ir.Constant(numbers, [*range(numbers.count)])
                above = builder.shuffle_vector(above, above.type(None), every)
                less = builder.sub(builder.load(counts), builder.sext(above, numbers))
                builder.store(less, counts)
            a, b, c, d = found
            sums = builder.fadd(builder.fadd(a, b), builder.fadd(c, d))
            for first in range(0, width, LANES):
                eight = ir.Constant(ir.VectorType(number, LANES), [*range(first, first + LANES)])
                some = builder.shuffle_vector(sums, sums, eight)
                some = some if some.type == wide else builder.fpext(some, wide)
                builder.store(builder.fadd(builder.load(lanes), some), lanes)

        whole = builder.and_(column, word(-width))
        with cgutils.for_range_slice(builder, word(0), whole, word(width)) as (start, _):
            add(start, width)
        with builder.if_then(builder.icmp_signed("<", whole, column)):
            add(whole, LANES)
        declared = ir.FunctionType(number, [numbers])
        name = f"llvm.vector.reduce.add.v{width}i32"
        add_up = cgutils.get_or_insert_function(builder.module, declared, name)
        count = builder.call(add_up, [builder.load(counts)])
        total = _in_pairs(builder, builder.load(lanes), builder.fadd)
        return context.make_tuple(builder, signature.return_type, (total, count))

    return numba.types.Tuple((numba.float64, numba.int32))(m, m.dtype, values), generate


@part
def _sum(m: Array, taken: float, sums: Array) -> float:
    width = m.size // COLUMNS if m.size >= SHORT else 0
    _add_columns(m, taken, width, sums)
    rest = sums[width : m.size - (COLUMNS - 1) * width]
    for j in range(rest.size):
        rest[j] = abs(abs(m[COLUMNS * width + j]) - taken)
    return sum_in_lanes(sums, width + rest.size)


@loop
def short_sum_in_sixteenths(x: Array, taken: Array, bits: Array, level: int) -> float:
    """`residual_sum` where it overflows, or with a map `coded_residual_sum`: of the numbers times
    `UNIT`, which cannot. It allocates, since it is rare.
    """
    small = np.empty(x.size, x.dtype)
    for j in range(x.size):
        left = abs(x[j])
        for i in range(taken.size):
            left = abs(left - taken[i])
        coded = bits.size == 0 or bits[j] > np.uint8(level)
        small[j] = left * UNIT if coded else x.dtype.type(0)
    return sum_in_lanes(small, small.size) / UNIT


@loop
def sum_in_sixteenths(m: Array, taken: float, sums: Array) -> float:
    """`magnitude_sum` where a column overflows: of the numbers times `UNIT`, which cannot.

    It allocates, since it is rare.
    """
    small = np.empty(m.size, m.dtype)
    for j in range(m.size):
        small[j] = abs(abs(m[j]) - taken) * m.dtype.type(UNIT)
    return _sum(small, m.dtype.type(0), sums) / UNIT


@part
def magnitude_sum(m: Array, taken: float, sums: Array) -> float:
    """The sum of ``||m| - taken|`` over at most one chunk, in float64; `sums` is overwritten."""
    total = _sum(m, taken, sums)
    if total == np.inf:  # a column may have overflowed
        total = sum_in_sixteenths(m, taken, sums)
    return total


@part
def keep(x: Array, taken: float, m: Array) -> None:
    """Write ``||x| - taken|``, the residuals' magnitudes after a level of the scale `taken`."""
    for j in range(m.size):
        m[j] = abs(abs(x[j]) - taken)


# LLVM does not vectorize a loop on two arrays that are the same, so there are forms on one array.


@part
def keep_in_place(m: Array, taken: float) -> None:
    """The same, written over the magnitudes."""
    for j in range(m.size):
        m[j] = abs(m[j] - taken)


@part
def keep_coded_in_place(m: Array, taken: float, bits: Array, level: int) -> int:
    """The same for elements with a code at a level, else 0. Returns how many have one."""
    # Counters of 32 bits: wider ones than the elements would halve the lanes of a register.
    number, count, zero = np.int32(level), np.int32(0), m.dtype.type(0)
    for j in range(m.size):
        left = abs(m[j] - taken)
        coded = np.int32(bits[j]) > number
        m[j] = left if coded else zero
        count = np.int32(count + coded)
    return int(count)


def scratch(dtype: Any) -> tuple[Array, Array]:
    """Scratch for a chunk of magnitudes, and for the sums that `magnitude_sum` overwrites."""
    return (
        memory.scratch("chunk", (CHUNK,), dtype),
        memory.scratch("sums", (CHUNK // COLUMNS + SHORT,), dtype),
    )


# ---------------------------------------------------------------- float16 and bfloat16

# Numba has neither, and NumPy converts them element by element. These loops work on the bits.

_INFINITE_HALF, _INFINITE = 0x7C00, 0x7F800000
_EXPONENTS_APART = np.float32(2.0**112)


@loop
def widen_float16(half: Array, words: Array) -> None:
    """Convert float16 to float32, both as bit patterns."""
    for j in range(half.size):
        word = np.uint32(half[j])
        moved = np.uint32((word & 0x7FFF) << 13)
        value = np.uint32(moved).view(np.float32) * _EXPONENTS_APART
        finite = moved < np.uint32(_INFINITE_HALF << 13)
        magnitude = np.float32(value).view(np.uint32) if finite else np.uint32(moved | _INFINITE)
        words[j] = np.uint32(magnitude | np.uint32((word & 0x8000) << 16))


_CONVERTS = "+f16c" in FEATURES
"""Whether the processor has an instruction that rounds to float16. On others LLVM would call a
function that is not there."""


@intrinsic
def _nearest_float16(context: Any, x: Any) -> Any:
    """The float16 that is nearest a float32, as a bit pattern: one instruction for many."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return numba.uint16(numba.float32), generate


@loop
def narrow_to_float16(words: Array, half: Array) -> None:
    """Convert float32 to float16, both as bit patterns: to the nearest, ties to even."""
    nan = not _CONVERTS
    if _CONVERTS:
        for j in range(half.size):
            word = words[j]
            half[j] = _nearest_float16(np.uint32(word).view(np.float32))
            nan |= bool(np.uint32(word & 0x7FFFFFFF) > np.uint32(_INFINITE))
    if nan:  # the instruction changes signalling NaN
        _narrow_to_float16_bit_by_bit(words, half)


@loop
def _narrow_to_float16_bit_by_bit(words: Array, half: Array) -> None:
    """The same in integers, on all processors."""
    for j in range(half.size):
        word = words[j]
        m = np.uint32(word & 0x7FFFFFFF)
        odd = np.uint32((m >> 13) & 1)
        normal = np.uint32(np.uint32(m - 0x38000000 + 0xFFF + odd) >> 13)
        # Near 0.5 float32 has the spacing of float16's subnormal numbers: adding 0.5 rounds to it.
        raised = np.uint32(m).view(np.float32) + np.float32(0.5)
        small = np.uint32(np.float32(raised).view(np.uint32) - 0x3F000000)
        payload = np.uint32((m >> 13) & 0x3FF)
        nan = np.uint32(_INFINITE_HALF | (payload if payload > 0 else np.uint32(1)))
        value = small if m < np.uint32(0x38800000) else normal
        value = np.uint32(_INFINITE_HALF) if m >= np.uint32(0x47800000) else value
        value = nan if m > np.uint32(_INFINITE) else value
        half[j] = np.uint16(value | np.uint32((word >> 16) & 0x8000))


@loop
def widen_bfloat16(half: Array, words: Array) -> None:
    """Convert bfloat16 to float32, both as bit patterns: it is the upper half of one."""
    for j in range(half.size):
        words[j] = np.uint32(np.uint32(half[j]) << 16)


@loop
def narrow_to_bfloat16(words: Array, half: Array) -> None:
    """Convert float32 to bfloat16, both as bit patterns: to the nearest, ties to even."""
    for j in range(half.size):
        word = words[j]
        odd = np.uint32((word >> 16) & 1)
        value = np.uint32(word + 0x7FFF + odd)
        nan = np.uint32(word & 0x80000000 | 0x7FC00000)
        value = nan if np.uint32(word & 0x7FFFFFFF) > np.uint32(_INFINITE) else value
        # Shifting last, LLVM takes every other half: that is twice as fast.
        half[j] = np.uint16(value >> 16)


@part
def widen(half: Array, words: Array, ieee: bool) -> None:
    """Convert float16, if it is `ieee`, or bfloat16 to float32, both as bit patterns."""
    if ieee:
        widen_float16(half, words)
    else:
        widen_bfloat16(half, words)


@part
def narrow(words: Array, half: Array, ieee: bool) -> None:
    """Convert float32 to float16, if that is `ieee`, or bfloat16, both as bit patterns."""
    if ieee:
        narrow_to_float16(words, half)
    else:
        narrow_to_bfloat16(words, half)


# ---------------------------------------------------------------- arguments and results of loops


def read_only(array: Array) -> Array:
    """A read-only view. Numba has two types, for arrays that are writable and those that are not:
    this way there is one."""
    view = array.view()
    view.setflags(write=False)
    return view


def in_work_dtype(x: Array) -> Array:
    """`x` in the work dtype, contiguous, aligned and read-only; a view where `x` is so already."""
    x = in_rows(x)
    if not floats.is_narrow(x.dtype):
        return read_only(x)
    wide = np.empty(x.shape, np.float32)
    widen = widen_float16 if x.dtype == np.float16 else widen_bfloat16
    half = read_only(x).view(np.uint16)
    widen(half.reshape(-1), wide.view(np.uint32).reshape(-1))
    return read_only(wide)


_PATTERNS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@loop
def transpose(source: Array, target: Array) -> None:
    """Write ``target[i, j] = source[j, i]``, eight rows of the source at a time.

    So many lines of it are read on, and half a line of the target is written at once.
    """
    rows, columns = source.shape
    full = rows // 8 * 8
    for start in range(0, full, 8):
        for i in range(columns):
            for k in range(8):
                target[i, start + k] = source[start + k, i]
    for j in range(full, rows):
        for i in range(columns):
            target[i, j] = source[j, i]


def _lies_in_columns(x: Array) -> bool:
    """Whether `x`, (rows, n), has rows side by side, as columns of a matrix are."""
    return (
        x.ndim == 2
        and 0 < x.strides[0] <= 8 < x.strides[1]
        and len(x) > 1
        and x.flags.aligned
        and x.itemsize in _PATTERNS
    )


def in_rows(x: Array) -> Array:
    """`x` in C order and aligned: itself where it is. Columns take a tenth of NumPy's time."""
    if x.flags.c_contiguous and x.flags.aligned:
        return x
    if not _lies_in_columns(x):
        return np.require(x, requirements=("C", "A"))
    rows, kind = np.empty(x.shape, x.dtype), _PATTERNS[x.itemsize]
    transpose(read_only(x.T.view(kind)), rows.view(kind))
    return rows


def place(values: Array, y: Array) -> None:
    """Write what lies in rows to `y`, of the same dtype and shape, which may lie in columns."""
    if values.ndim == 3:
        for level, of_level in enumerate(values):
            place(of_level, y[level])
    elif _lies_in_columns(y) and values.dtype == y.dtype:
        kind = _PATTERNS[y.itemsize]
        transpose(read_only(np.ascontiguousarray(values).view(kind)), y.T.view(kind))
    else:
        y[...] = values


def store(values: Array, y: Array) -> None:
    """Write `values`, in the work dtype and contiguous, to `y`; nothing if they are `y` itself."""
    if values is y:
        return
    if floats.is_narrow(y.dtype) and values.dtype == np.float32:
        half = y if y.flags.carray else np.empty(y.shape, y.dtype)
        narrow = narrow_to_float16 if y.dtype == np.float16 else narrow_to_bfloat16
        narrow(read_only(values).view(np.uint32).reshape(-1), half.view(np.uint16).reshape(-1))
        values = half
    if values is not y:
        place(values, y)


def target(y: Array, *inputs: Array) -> Array:
    """Where a loop writes its result: `y` itself where it can, else an array to `store` from."""
    work = floats.work_dtype(y.dtype)
    direct = y.dtype == work and y.flags.carray
    if direct and not any(np.may_share_memory(y, x) for x in inputs):
        return y
    return np.empty(y.shape, work)


# ---------------------------------------------------------------- rows side by side


def beside(*arrays: Array) -> bool:
    """Whether the rows of all arrays, (rows, n), lie side by side, as columns of a matrix do.

    There may be an axis of levels before. `lines` then gives the arrays as loops take them.
    """
    return all(map(_beside, arrays))


def _beside(x: Array) -> bool:
    rows, n = x.shape[-2:]
    step, pitch = x.strides[-2:]
    return (
        rows >= BESIDE
        and n > 1
        and step == x.itemsize
        and pitch >= rows * step
        and pitch % step == 0
        and (x.ndim == 2 or x.strides[0] == n * pitch)
        and x.flags.aligned
    )


def lines(x: Array) -> Array:
    """Rows that lie side by side, (rows, n), as a contiguous array of lines, (n, pitch).

    A line begins with an element of each row. What follows, up to the next line, belongs to other
    rows or to no array: loops must not touch it. Contiguous arrays are of one type for Numba,
    wherever a line ends.
    """
    pitch = x.strides[-1] // x.itemsize
    if pitch == x.shape[-2]:
        return x.swapaxes(-2, -1)
    shape = (*x.shape[:-2], x.shape[-1], pitch)
    steps = (*x.strides[:-2], x.strides[-1], x.itemsize)
    return np.lib.stride_tricks.as_strided(x, shape, steps)


def lines_in_work_dtype(x: Array) -> Array:
    """`lines` in the work dtype, read-only: a copy where `x` is float16 or bfloat16."""
    if not floats.is_narrow(x.dtype):
        return read_only(lines(x))
    wide = np.empty(x.shape[::-1], np.float32)
    half = read_only(lines(x).view(np.uint16))
    _widen_lines(half, wide.view(np.uint32), x.dtype == np.float16)
    return read_only(wide)


@loop
def _widen_lines(half: Array, words: Array, ieee: bool) -> None:
    for e in range(len(words)):
        widen(half[e, : words.shape[1]], words[e], ieee)


@loop
def _narrow_lines(words: Array, half: Array, ieee: bool) -> None:
    for e in range(len(words)):
        narrow(words[e], half[e, : words.shape[1]], ieee)


def store_lines(values: Array, y: Array) -> None:
    """Write lines in the work dtype, (n, rows), to `y`, (rows, n), of float16 or bfloat16."""
    words = read_only(values).view(np.uint32)
    _narrow_lines(words, lines(y).view(np.uint16), y.dtype == np.float16)


def map_lines(bits: Array, n: int) -> Array:
    """A bit map, (rows, n), as lines; of no columns where `bits` is one number."""
    if not isinstance(bits, np.ndarray):
        return _no_map(n)
    return read_only(lines(bits) if beside(bits) else np.ascontiguousarray(bits.T))


def map_of(bits: Array, rows: int) -> Array:
    """A bit map as loops take it, (rows, n); of no columns where `bits` is one number."""
    return read_only(in_rows(bits)) if isinstance(bits, np.ndarray) else _no_map(rows)


@functools.lru_cache(maxsize=1 << 8)
def _no_map(rows: int) -> Array:
    return read_only(np.empty((rows, 0), np.uint8))
