"""The loops over rows as Numba compiles them: what the CUDA kernels do, a row at a time.

They mirror the primitives of `cubin.greedy`: the same signs, and scales that differ in how a sum
is rounded alone. They release the GIL and take contiguous arrays of shape (rows, n) in the
work dtype; `bits` is a uint8 array of that shape, or None where all elements have all levels.
What they need to work with is handed in, so that they hold no memory of their own.

Four levels at a time are held in registers. A level that is missing has the scale 0, which
changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic, overload

from cubin import arrays, blocks, memory
from cubin.arrays import Array

GROUP = 4

SHORT = 1 << 7
"""Elements of a row from which on it pays to cut it in four columns."""

LONG = 1 << 8
"""Elements of a row with a map from which on it pays to cut it in two columns."""

CHUNK = 1 << 12
"""Elements of the rows, one at least, that are gone through level by level in the first cache."""

PIECE = 1 << 10
"""Elements that are written past the caches at a time: in between, memory has time to take them."""

LINE = 64
"""Bytes that memory is read and written by."""

LARGE = 1 << 25
"""Bytes of a result from which on it is written past the caches, which could not hold it.

An ordinary store first reads what it overwrites, so that a copy moves three bytes for two.
"""


def loop(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # no folder to keep the cache in can be written
            return numba.njit(nogil=True, **options)(function)

    return decorate


def instruction(function: Callable[..., Any]) -> Any:
    """What Numba asks for the code, given the types of the arguments after the first."""
    return intrinsic(function)


@instruction
def uncounted(context: Any, array: Any) -> Any:
    """The same array, or None, whose slices count no references: it must be held elsewhere.

    Counting them takes longer than the work on a short row.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _is_none(array):
            return context.get_dummy_value()
        view = context.make_array(array)(context, builder, arguments[0])
        view.meminfo, view.parent = view.meminfo.type(None), view.parent.type(None)
        return view._getvalue()

    return array(array), generate


# ---------------------------------------------------------------- stores past the caches


@instruction
def _store_line(context: Any, source: Any, target: Any) -> Any:
    """Copy a line between addresses past the caches."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, half = ir.VectorType(ir.IntType(8), LINE // 2), ir.Constant(ir.IntType(64), LINE // 2)
        hint = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        source, target = arguments
        for _ in range(2):
            value = builder.load(builder.inttoptr(source, kind.as_pointer()), align=1)
            pointer = builder.inttoptr(target, kind.as_pointer())
            builder.store(value, pointer, align=LINE // 2).set_metadata("nontemporal", hint)
            source, target = builder.add(source, half), builder.add(target, half)
        return context.get_dummy_value()

    return numba.types.void(numba.types.intp, numba.types.intp), generate


@instruction
def _prefetch(context: Any, address: Any) -> Any:
    """Begin to read the line at an address, which may be any."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        to_read, into_first_cache, data = (ir.Constant(number, value) for value in (0, 3, 1))
        address = builder.inttoptr(arguments[0], pointer)
        builder.call(prefetch, [address, to_read, into_first_cache, data])
        return context.get_dummy_value()

    return numba.types.void(numba.types.intp), generate


@instruction
def _finish_stores(context: Any) -> Any:
    """Have other threads see what was stored before what is stored from now on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return numba.types.void(), generate


@loop()
def _stream(buffer: Array, size: int, target: Array, end: int, source: Array) -> int:
    """Copy whole lines past the caches once there are enough, while what is read next enters them.

    The first `size` elements of the buffer belong before the index `end` of the target. Those that
    stay are at its front then, and their number is given. `source` is read as far as the target is
    written.
    """
    if size < PIECE:
        return size
    itemsize, first = buffer.itemsize, end - size
    given, address = buffer.ctypes.data, target.ctypes.data + first * itemsize
    ahead = source.ctypes.data + (first + CHUNK) * itemsize
    start = -address % LINE // itemsize  # not 0 at the beginning alone
    lines = (size - start) * itemsize // LINE
    for j in range(start):
        target[first + j] = buffer[j]
    for line in range(lines):
        at = start * itemsize + line * LINE
        _store_line(given + at, address + at)
        _prefetch(ahead + at)
    done = start + lines * LINE // itemsize
    for j in range(size - done):
        buffer[j] = buffer[done + j]
    return size - done


@loop()
def _finish_stream(buffer: Array, held: int, target: Array) -> None:
    """Write what is still held, the last elements of the target."""
    for j in range(held):
        target[target.size - held + j] = buffer[j]
    _finish_stores()


def _streams(x: Array, bits: Array, y: Array) -> bool:
    """Whether rows are written past the caches.

    Where they are short or elements have different levels, memory is not what takes the time.
    """
    return np.ndim(bits) == 0 and x.shape[1] >= SHORT and _is_slow(y)


def _is_slow(y: Array) -> bool:
    """Whether `y` is better written past the caches, since what it is a part of outgrows them.

    Memory that is new to the process is not: the system clears it first, in the caches.
    """
    whole = y
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    return whole.nbytes >= LARGE and y.flags.aligned and memory.is_resident(y)


# ---------------------------------------------------------------- forms by type

# What depends on types, such as whether there is a map, has one form for each. The functions
# themselves are names for Numba alone, which compiles what `overload` gives it: they never run.


def _cut(bits: Array | None, start: int, stop: int) -> Array | None:
    """Some rows of a map, or some elements of one, or None where there is none."""
    raise NotImplementedError


@overload(_cut)
def _cut_by_type(bits: Any, start: Any, stop: Any) -> Callable[..., Any]:
    def none(bits: Any, start: Any, stop: Any) -> Any:
        return None

    def some(bits: Any, start: Any, stop: Any) -> Any:
        return bits[start:stop]

    return none if _is_none(bits) else some


def _row_of(bits: Array | None, row: int) -> Array | None:
    """A row of a map, or None where there is none."""
    raise NotImplementedError


@overload(_row_of)
def _row_of_by_type(bits: Any, row: Any) -> Callable[..., Any]:
    def none(bits: Any, row: Any) -> Any:
        return None

    def one(bits: Any, row: Any) -> Any:
        return bits[row]

    return none if _is_none(bits) else one


def _hot(bits: Array | None, column: int, level: int) -> bool:
    """Whether an element has a code at a level."""
    raise NotImplementedError


@overload(_hot, inline="always")
def _hot_by_type(bits: Any, column: Any, level: Any) -> Callable[..., bool]:
    def always(bits: Any, column: Any, level: Any) -> bool:
        return True

    def mapped(bits: Any, column: Any, level: Any) -> bool:
        # In 32 bits, or the lanes are halved.
        return bool(np.int32(bits[column]) > np.int32(level))

    return always if _is_none(bits) else mapped


def _is_none(kind: Any) -> bool:
    return isinstance(kind, numba.types.NoneType)


@loop()
def _folded(m: float, a: float, b: float, c: float) -> float:
    return abs(abs(abs(abs(m) - a) - b) - c)


def _reached(bits: Array | None, column: int, first: int, values: Any) -> float:
    """The value after as many levels from `first` on as the element has: four at most."""
    raise NotImplementedError


@overload(_reached)
def _reached_by_type(bits: Any, column: Any, first: Any, values: Any) -> Any:
    def always(bits: Any, column: Any, first: Any, values: Any) -> float:
        return values[4]

    def mapped(bits: Any, column: Any, first: Any, values: Any) -> float:
        own = np.int32(bits[column])
        value = values[1] if own > np.int32(first) else values[0]
        value = values[2] if own > np.int32(first + 1) else value
        value = values[3] if own > np.int32(first + 2) else value
        return values[4] if own > np.int32(first + 3) else value

    return always if _is_none(bits) else mapped


def _step(opposite: float, scale: float) -> float:
    """scale * sign(r) for opposite = 0 - r."""
    raise NotImplementedError


# The opposite is never -0.0, so that its sign bit is set exactly where r > 0. Processors select by
# a sign bit in one instruction; comparing first takes two, and holds up all levels that follow.
@overload(_step)
def _step_by_type(opposite: Any, scale: Any) -> Callable[..., float]:
    def single(opposite: Any, scale: Any) -> float:
        return scale if np.float32(opposite).view(np.int32) < 0 else -scale

    def double(opposite: Any, scale: Any) -> float:
        return scale if np.float64(opposite).view(np.int64) < 0 else -scale

    return single if opposite == numba.types.float32 else double


def _keep(value: float, target: Array | None, column: int) -> None:
    """Write an element of a row, or nothing where there is none."""
    raise NotImplementedError


@overload(_keep)
def _keep_by_type(value: Any, target: Any, column: Any) -> Callable[..., None]:
    def nowhere(value: Any, target: Any, column: Any) -> None:
        pass

    def write(value: Any, target: Any, column: Any) -> None:
        target[column] = value

    return nowhere if _is_none(target) else write


@loop()
def _padded(scales: Array, row: int, first: int) -> tuple[float, float, float, float]:
    """The scales of four levels, 0 for those that a row does not have."""
    levels = scales.shape[1]
    zero = scales.dtype.type(0)
    return (
        scales[row, first] if first < levels else zero,
        scales[row, first + 1] if first + 1 < levels else zero,
        scales[row, first + 2] if first + 2 < levels else zero,
        scales[row, first + 3] if first + 3 < levels else zero,
    )


def _stored(scales: Array, stored: Array | None, row: int, first: int) -> Any:
    """The same of `stored`, or of `scales` where there is none."""
    raise NotImplementedError


# A name for either array would count references, which takes longer than a short row.
@overload(_stored)
def _stored_by_type(scales: Any, stored: Any, row: Any, first: Any) -> Callable[..., Any]:
    def same(scales: Any, stored: Any, row: Any, first: Any) -> Any:
        return _padded(scales, row, first)

    def rounded(scales: Any, stored: Any, row: Any, first: Any) -> Any:
        return _padded(stored, row, first)

    return same if _is_none(stored) else rounded


# ---------------------------------------------------------------- scales


# Sums alone may be reordered; what makes up the summands keeps its order and its NaN.
@loop(fastmath={"reassoc"})
def _sum(
    r: Array, bits: Array | None, level: int, a: float, b: float, c: float
) -> tuple[float, int]:
    """The sum of a row's |residual| at a level, and how many elements have it."""
    total, count = 0.0, 0
    for j in range(r.size):
        hot = _hot(bits, j, level)
        total += np.float64(_folded(r[j], a, b, c)) if hot else 0.0
        count += int(hot)
    return total, count


# The first two levels, which all rows have, have less to subtract.
@loop(fastmath={"reassoc"})
def _early_sum(r: Array, bits: Array | None, level: int, a: float) -> tuple[float, int]:
    total, count = 0.0, 0
    for j in range(r.size):
        hot = _hot(bits, j, level)
        total += np.float64(abs(abs(r[j]) - a)) if hot else 0.0
        count += int(hot)
    return total, count


@loop()
def _four(p: float, q: float, r: float, s: float) -> float:
    return (p + q) + (r + s)


# Where all elements count, four are added in the work dtype, float32 as a rule, which has twice the
# lanes of float64: numbers that are equal do not round.
@loop(fastmath={"reassoc"})
def _whole_sum(x: Array) -> float:
    """The sum of a row's |x|, in columns of four."""
    n, total = x.size // 4, 0.0
    for j in range(n):
        p, q, r, s = abs(x[j]), abs(x[n + j]), abs(x[2 * n + j]), abs(x[3 * n + j])
        total += np.float64(_four(p, q, r, s))
    for j in range(4 * n, x.size):
        total += np.float64(abs(x[j]))
    return total


# What is read and what is written is told apart, since a loop on arrays that might overlap is not
# vectorized.
@loop(fastmath={"reassoc"})
def _folded_sum(x: Array, a: float, m: Array) -> float:
    """Take a scale off the magnitudes of `x`, keep what is left in `m`, and add it up."""
    n, total = x.size // 4, 0.0
    for j in range(n):
        p, q = abs(abs(x[j]) - a), abs(abs(x[n + j]) - a)
        r, s = abs(abs(x[2 * n + j]) - a), abs(abs(x[3 * n + j]) - a)
        m[j], m[n + j], m[2 * n + j], m[3 * n + j] = p, q, r, s
        total += np.float64(_four(p, q, r, s))
    for j in range(4 * n, x.size):
        m[j] = abs(abs(x[j]) - a)
        total += np.float64(m[j])
    return total


@loop(fastmath={"reassoc"})
def _refolded_sum(m: Array, a: float) -> float:
    """The same in place, of magnitudes."""
    n, total = m.size // 4, 0.0
    for j in range(n):
        p, q = abs(m[j] - a), abs(m[n + j] - a)
        r, s = abs(m[2 * n + j] - a), abs(m[3 * n + j] - a)
        m[j], m[n + j], m[2 * n + j], m[3 * n + j] = p, q, r, s
        total += np.float64(_four(p, q, r, s))
    for j in range(4 * n, m.size):
        m[j] = abs(m[j] - a)
        total += np.float64(m[j])
    return total


@loop(fastmath={"reassoc"})
def _last_sum(m: Array, a: float) -> float:
    """The same, without keeping what is left."""
    n, total = m.size // 4, 0.0
    for j in range(n):
        p, q = abs(abs(m[j]) - a), abs(abs(m[n + j]) - a)
        r, s = abs(abs(m[2 * n + j]) - a), abs(abs(m[3 * n + j]) - a)
        total += np.float64(_four(p, q, r, s))
    for j in range(4 * n, m.size):
        total += np.float64(abs(abs(m[j]) - a))
    return total


@loop()
def _whole_scale(x: Array, level: int, scales: Array, m: Array) -> None:
    """Find the scales of a level of rows whose elements have all levels."""
    length, finite, last = x.shape[1], True, level == scales.shape[1] - 1
    if level == 0:
        for row in range(len(x)):
            scales[row, 0] = _whole_sum(x[row]) / length
            finite &= scales[row, 0] < np.inf
    elif last:
        left = x if level == 1 else m
        for row in range(len(x)):
            scales[row, level] = _last_sum(left[row], scales[row, level - 1]) / length
            finite &= scales[row, level] < np.inf
    elif level == 1:
        for row in range(len(x)):
            scales[row, 1] = _folded_sum(x[row], scales[row, 0], m[row]) / length
            finite &= scales[row, 1] < np.inf
    else:
        for row in range(len(x)):
            scales[row, level] = _refolded_sum(m[row], scales[row, level - 1]) / length
            finite &= scales[row, level] < np.inf
    if not finite:
        _mean(x if level == 0 or (last and level == 1) else m, level, last, scales)


@loop()
def _mean(m: Array, level: int, last: bool, scales: Array) -> None:
    """The mean magnitudes again, where four overflow that do not in float64."""
    for row in range(len(scales)):
        if not scales[row, level] < np.inf:
            taken = scales[row, level - 1] if last and level else scales.dtype.type(0)
            total, _ = _early_sum(m[row], None, 0, taken)
            scales[row, level] = total / m.shape[1]


@loop(fastmath={"reassoc"})
def float64_sum(values: Array) -> float:
    total = 0.0
    for j in range(values.size):
        total += np.float64(values[j])
    return total


@loop()
def _copy(x: Array, target: Array) -> None:
    for j in range(x.size):
        target[j] = x[j]


@loop()
def _mapped_sums(pairs: Array, bits: Array, level: int, a: float, sums: Array) -> Any:
    """Fold columns of two, and add up what has a code at a level; give its number."""
    # In 32 bits, or the lanes are halved.
    zero, count, bound = sums.dtype.type(0), np.int32(0), np.int32(level)
    for j in range(sums.size):
        p, q = abs(abs(pairs[0, j]) - a), abs(abs(pairs[1, j]) - a)
        hot, also = np.int32(bits[0, j]) > bound, np.int32(bits[1, j]) > bound
        pairs[0, j], pairs[1, j] = p, q
        count = np.int32(count + hot + also)
        sums[j] = (p if hot else zero) + (q if also else zero)
    return count


@loop()
def _mapped_scales(x: Array, bits: Array, scales: Array, folded: Array, sums: Array) -> None:
    """Find the scales of a row whose elements have different levels, in float32."""
    size = 2 * sums.size
    own = bits[:size].reshape(2, sums.size)
    pairs = folded[:size].reshape(2, sums.size)
    _copy(x, folded)
    a = zero = scales.dtype.type(0)
    for level in range(scales.size):
        count = _mapped_sums(pairs, own, level, a, sums)
        total = float64_sum(sums)
        for j in range(size, folded.size):
            folded[j] = abs(abs(folded[j]) - a)
            if bits[j] > level:
                total += folded[j]
                count += 1
        if not total < np.inf:  # two may overflow that do not in float64
            total = _early_sum(folded, bits, level, zero)[0]
        a = scales.dtype.type(total / count) if count else zero
        scales[level] = a


@loop()
def _fold(r: Array, scales: Array, row: int, first: int) -> None:
    """Take the levels `first` to first + 3 off the magnitudes of a row."""
    a, b, c, d = _padded(scales, row, first)
    for j in range(r.size):
        r[j] = abs(_folded(r[j], a, b, c) - d)


@loop()
def _short_scale(r: Array, bits: Array | None, level: int, scales: Array) -> None:
    """Find the scales of a level, of magnitudes off which whole groups of four are."""
    first, zero = level // GROUP * GROUP, scales.dtype.type(0)
    # The scale that is being found is still 0.
    if level < first + 2:
        for row in range(len(scales)):
            total, count = _early_sum(r[row], _row_of(bits, row), level, scales[row, first])
            scales[row, level] = scales.dtype.type(total / count) if count else zero
    else:
        for row in range(len(scales)):
            a, b, c, _ = _padded(scales, row, first)
            total, count = _sum(r[row], _row_of(bits, row), level, a, b, c)
            scales[row, level] = scales.dtype.type(total / count) if count else zero


@loop()
def _short_scales(x: Array, bits: Array | None, scales: Array, spare: Array) -> None:
    """Find the scales of rows in the work dtype."""
    levels = scales.shape[1]
    scales[:] = 0
    for level in range(min(levels, GROUP)):
        _short_scale(x, bits, level, scales)
    if levels > GROUP:
        for row in range(len(x)):
            _copy(x[row], spare[row])
        for level in range(GROUP, levels):
            if level % GROUP == 0:
                for row in range(len(x)):
                    _fold(spare[row], scales, row, level - GROUP)
            _short_scale(spare, bits, level, scales)


@loop()
def _find_scales(x: Array, bits: Array | None, scales: Array, spare: Array, sums: Array) -> None:
    """Find the scales of some rows: the mean |residual| at each level, 0 without a code."""
    if x.shape[1] < SHORT or (bits is not None and (x.itemsize == 8 or x.shape[1] < LONG)):
        _short_scales(x, bits, scales, spare)
    elif bits is None:
        for level in range(scales.shape[1]):
            _whole_scale(x, level, scales, spare)
    else:
        for row in range(len(x)):
            _mapped_scales(x[row], bits[row], scales[row], spare[row], sums)


@loop()
def _level_scales(x: Array, bits: Array | None, scales: Array, spare: Array, sums: Array) -> None:
    """Find the scales, (rows, levels)."""
    x, bits, scales = uncounted(x), uncounted(bits), uncounted(scales)
    spare, sums = uncounted(spare), uncounted(sums)
    for start in range(0, len(x), len(spare)):
        stop = min(start + len(spare), len(x))
        _find_scales(x[start:stop], _cut(bits, start, stop), scales[start:stop], spare, sums)


@loop()
def _level_sum(x: Array, bits: Array | None, scales: Array, spare: Array) -> tuple[float, int]:
    """The sum of |residual| after `scales`, (1, levels), over a piece of a row; and its count."""
    x, bits, scales, spare = uncounted(x), uncounted(bits), uncounted(scales), uncounted(spare)
    levels, piece, own = scales.shape[1], x[0], _row_of(bits, 0)
    done = levels // GROUP * GROUP
    a, b, c, _ = _padded(scales, 0, done)
    total, count = 0.0, 0
    for start in range(0, piece.size, CHUNK):
        r = piece[start : start + CHUNK]
        if done:
            folded = spare[: r.size]
            _copy(r, folded)
            for first in range(0, done, GROUP):
                _fold(folded, scales, 0, first)
            r = folded
        more, hot = _sum(r, _cut(own, start, start + CHUNK), levels, a, b, c)
        total += more
        count += hot
    return total, count


# ---------------------------------------------------------------- what they give


@loop()
def _first_level(
    x: Array, bits: Array | None, row: int, scales: Array, stored: Array | None, y: Array
) -> None:
    """Write the only level."""
    e, _, _, _ = _stored(scales, stored, row, 0)
    zero = y.dtype.type(0)
    for j in range(y.size):
        one = _step(zero - x[j], e)
        y[j] = _reached(bits, j, 0, (zero, one, one, one, one))


@loop()
def _first_two_levels(
    x: Array, bits: Array | None, row: int, scales: Array, stored: Array | None, y: Array
) -> None:
    """Write the sum of two levels."""
    a, _, _, _ = _padded(scales, row, 0)
    e, f, _, _ = _stored(scales, stored, row, 0)
    zero = y.dtype.type(0)
    for j in range(y.size):
        n = zero - x[j]
        one = _step(n, e)
        two = one + _step(n + _step(n, a), f)
        y[j] = _reached(bits, j, 0, (zero, one, two, two, two))


@loop()
def _first_levels(
    x: Array, bits: Array | None, row: int, scales: Array, stored: Array | None, y: Array,
    opposite: Array | None,
) -> None:  # fmt: skip
    """Write the sum of the first four levels, and 0 less what is left then."""
    a, b, c, d = _padded(scales, row, 0)
    e, f, g, h = _stored(scales, stored, row, 0)
    zero = y.dtype.type(0)
    for j in range(y.size):
        n = zero - x[j]
        one = _step(n, e)
        n += _step(n, a)
        two = one + _step(n, f)
        n += _step(n, b)
        three = two + _step(n, g)
        n += _step(n, c)
        four = three + _step(n, h)
        y[j] = _reached(bits, j, 0, (zero, one, two, three, four))
        _keep(n + _step(n, d), opposite, j)


@loop()
def _add_levels(
    opposite: Array, bits: Array | None, row: int, first: int, scales: Array,
    stored: Array | None, y: Array,
) -> None:  # fmt: skip
    """Add four levels, and take them off what is left."""
    a, b, c, d = _padded(scales, row, first)
    e, f, g, h = _stored(scales, stored, row, first)
    for j in range(y.size):
        n, none = opposite[j], y[j]
        one = none + _step(n, e)
        n += _step(n, a)
        two = one + _step(n, f)
        n += _step(n, b)
        three = two + _step(n, g)
        n += _step(n, c)
        four = three + _step(n, h)
        y[j] = _reached(bits, j, first, (none, one, two, three, four))
        opposite[j] = n + _step(n, d)


@loop()
def _write_levels(
    x: Array, bits: Array | None, row: int, scales: Array, stored: Array | None, y: Array,
    opposite: Array,
) -> None:  # fmt: skip
    """Write the sum of all levels of a row, or of a piece of it."""
    levels = scales.shape[1]
    if levels == 1:
        _first_level(x, bits, row, scales, stored, y)
    elif levels == 2:
        _first_two_levels(x, bits, row, scales, stored, y)
    elif levels <= GROUP:
        _first_levels(x, bits, row, scales, stored, y, None)
    else:
        _first_levels(x, bits, row, scales, stored, y, opposite)
        for first in range(GROUP, levels, GROUP):
            _add_levels(opposite, bits, row, first, scales, stored, y)


@loop()
def _write_rows(
    x: Array, bits: Array | None, scales: Array, stored: Array | None, y: Array, opposite: Array
) -> None:
    """Write the sum of all levels of some rows."""
    levels = scales.shape[1]
    if levels == 1:
        for row in range(len(x)):
            _first_level(x[row], _row_of(bits, row), row, scales, stored, y[row])
    elif levels == 2:
        for row in range(len(x)):
            _first_two_levels(x[row], _row_of(bits, row), row, scales, stored, y[row])
    elif levels <= GROUP:
        for row in range(len(x)):
            _first_levels(x[row], _row_of(bits, row), row, scales, stored, y[row], None)
    else:
        for row in range(len(x)):
            _write_levels(x[row], _row_of(bits, row), row, scales, stored, y[row], opposite)


@loop()
def _stream_rows(
    x: Array, bits: Array | None, first: int, last: int, scales: Array, stored: Array | None,
    y: Array, opposite: Array, buffer: Array, held: int,
) -> int:  # fmt: skip
    """The same past the caches; the number of elements that are held in the buffer is given."""
    source, target, length = x.reshape(-1), y.reshape(-1), x.shape[1]
    rows = PIECE // max(1, length)
    if rows > 1:
        for top in range(first, last, rows):
            end = min(top + rows, last)
            size = held + (end - top) * length
            _write_rows(x[top:end], _cut(bits, top, end), scales[top:end], _cut(stored, top, end),
                        buffer[held:size].reshape(end - top, length), opposite)  # fmt: skip
            held = _stream(buffer, size, target, end * length, source)
        return held
    for row in range(first, last):
        some, own = x[row], _row_of(bits, row)
        for start in range(0, length, PIECE):
            stop = min(start + PIECE, length)
            size = held + stop - start
            _write_levels(some[start:stop], _cut(own, start, stop), row, scales, stored,
                          buffer[held:size], opposite)  # fmt: skip
            held = _stream(buffer, size, target, row * length + stop, source)
    return held


@loop()
def _approximation(
    x: Array, bits: Array | None, scales: Array, stored: Array | None, y: Array, past: bool,
    opposite: Array, buffer: Array,
) -> None:  # fmt: skip
    """Write the sums of levels; `stored` are the scales as rounded, None if they are not."""
    x, bits, y = uncounted(x), uncounted(bits), uncounted(y)
    scales, stored = uncounted(scales), uncounted(stored)
    opposite, buffer = uncounted(opposite), uncounted(buffer)
    if past:
        held = _stream_rows(x, bits, 0, len(x), scales, stored, y, opposite, buffer, 0)
        _finish_stream(buffer, held, y.reshape(-1))
    else:
        _write_rows(x, bits, scales, stored, y, opposite)


@loop()
def _approximate(
    x: Array, bits: Array | None, scales: Array, y: Array, past: bool, spare: Array, sums: Array,
    opposite: Array, buffer: Array,
) -> None:  # fmt: skip
    """Find the scales of rows and write the sums of levels while they are in the first cache."""
    x, bits, scales, y = uncounted(x), uncounted(bits), uncounted(scales), uncounted(y)
    spare, sums = uncounted(spare), uncounted(sums)
    opposite, buffer = uncounted(opposite), uncounted(buffer)
    held = 0
    for start in range(0, len(x), len(spare)):
        stop = min(start + len(spare), len(x))
        some, own, found = x[start:stop], _cut(bits, start, stop), scales[start:stop]
        _find_scales(some, own, found, spare, sums)
        if past:
            held = _stream_rows(
                x, bits, start, stop, scales, None, y, opposite, buffer, held
            )  # fmt: skip
        else:
            _write_rows(some, own, found, None, y[start:stop], opposite)
    if past:
        _finish_stream(buffer, held, y.reshape(-1))


@loop()
def _negate(x: Array, opposite: Array) -> None:
    for j in range(x.size):
        opposite[j] = x.dtype.type(0) - x[j]


@loop()
def _set(opposite: Array, bits: Array | None, level: int, scale: float, code: Array) -> None:
    """Set the bit of a level, and take the level off what is left."""
    bit, zero = code.dtype.type(1 << level), code.dtype.type(0)
    for j in range(code.size):
        n = opposite[j]
        code[j] |= bit if (n < 0) & _hot(bits, j, level) else zero
        opposite[j] = n + _step(n, scale)


@loop()
def _codes(x: Array, bits: Array | None, scales: Array, code: Array, opposite: Array) -> None:
    """Write the codes, which are 0 before."""
    x, bits, scales, code = uncounted(x), uncounted(bits), uncounted(scales), uncounted(code)
    opposite = uncounted(opposite)
    for row in range(len(x)):
        source, own, target = x[row], _row_of(bits, row), code[row]
        for start in range(0, source.size, CHUNK):
            stop = min(start + CHUNK, source.size)
            _negate(source[start:stop], opposite)
            for level in range(scales.shape[1]):
                _set(opposite, _cut(own, start, stop), level, scales[row, level],
                     target[start:stop])  # fmt: skip


@loop()
def _set_signs(opposite: Array, bits: Array | None, level: int, scale: float, signs: Array) -> None:
    """Write the signs of a level, and take the level off what is left."""
    plus, minus, none = np.int8(1), np.int8(-1), np.int8(0)
    for j in range(signs.size):
        n = opposite[j]
        sign = plus if n < 0 else minus
        signs[j] = sign if _hot(bits, j, level) else none
        opposite[j] = n + _step(n, scale)


@loop()
def _encode(
    x: Array, bits: Array | None, scales: Array, signs: Array, spare: Array, sums: Array
) -> None:
    """Find the scales, (rows, levels), and write the signs, (levels, rows, n)."""
    x, bits, scales, signs = uncounted(x), uncounted(bits), uncounted(scales), uncounted(signs)
    spare, sums = uncounted(spare), uncounted(sums)
    opposite = spare[0]
    for start in range(0, len(x), len(spare)):
        stop = min(start + len(spare), len(x))
        found = scales[start:stop]
        _find_scales(x[start:stop], _cut(bits, start, stop), found, spare, sums)
        for row in range(start, stop):
            own = _row_of(bits, row)
            _negate(x[row], opposite)
            for level in range(len(signs)):
                _set_signs(opposite, own, level, scales[row, level], signs[level, row])


@loop()
def _first_codes(code: Array, bits: Array | None, row: int, stored: Array, y: Array) -> None:
    """Write the sum of the first four levels."""
    a, b, c, d = _padded(stored, row, 0)
    zero = y.dtype.type(0)
    for j in range(code.size):
        own = code[j]
        one = a if own & 1 else -a
        two = one + (b if own & 2 else -b)
        three = two + (c if own & 4 else -c)
        four = three + (d if own & 8 else -d)
        y[j] = _reached(bits, j, 0, (zero, one, two, three, four))


@loop()
def _add_code(code: Array, bits: Array | None, level: int, stored: float, y: Array) -> None:
    for j in range(code.size):
        step = stored if code[j] >> level & 1 else -stored
        y[j] += step if _hot(bits, j, level) else y.dtype.type(0)


@loop()
def _decode(code: Array, bits: Array | None, stored: Array, y: Array) -> None:
    code, bits, stored, y = uncounted(code), uncounted(bits), uncounted(stored), uncounted(y)
    for row in range(len(code)):
        own = _row_of(bits, row)
        _first_codes(code[row], own, row, stored, y[row])
        for level in range(GROUP, stored.shape[1]):
            _add_code(code[row], own, level, stored[row, level], y[row])


@loop()
def _add_signs(scales: Array, sign: Array, y: Array) -> None:
    for row in range(len(y)):
        scale = scales[row]
        for j in range(y.shape[1]):
            step = scale if sign[row, j] > 0 else -scale
            y[row, j] += step if sign[row, j] != 0 else y.dtype.type(0)


@loop()
def _set_level_signs(code: Array, bits: Array | None, level: int, sign: Array) -> None:
    for j in range(code.size):
        value = np.int8(2 * (code[j] >> level & 1) - 1)
        sign[j] = value if _hot(bits, j, level) else np.int8(0)


@loop()
def _level_signs(code: Array, bits: Array | None, level: int, sign: Array) -> None:
    code, bits, sign = uncounted(code), uncounted(bits), uncounted(sign)
    for row in range(len(code)):
        _set_level_signs(code[row], _row_of(bits, row), level, sign[row])


# ---------------------------------------------------------------- element by element


@loop()
def _sign(value: float, one: float) -> float:
    return one if value > 0 else (-one if value == value else value)


@loop()
def _signs_of(x: Array, y: Array) -> None:
    for j in range(x.size):
        y[j] = _sign(x[j], y.dtype.type(1))


@loop()
def _signs(x: Array, y: Array, past: bool, buffer: Array) -> None:
    x, y, buffer = uncounted(x), uncounted(y), uncounted(buffer)
    if not past:
        _signs_of(x, y)
        return
    held = 0
    for start in range(0, x.size, PIECE):
        some = x[start : start + PIECE]
        size = held + some.size
        _signs_of(some, buffer[held:size])
        held = _stream(buffer, size, y, start + some.size, x)
    _finish_stream(buffer, held, y)


@loop()
def _signs_in_place(y: Array) -> None:
    for j in range(y.size):
        y[j] = _sign(y[j], y.dtype.type(1))


@loop()
def _gradient_inside(x: Array, bits: Array, gy: Array, gx: Array) -> None:
    for j in range(x.size):
        gx[j] = gy[j] if abs(x[j]) <= x.dtype.type(bits[j]) else gx.dtype.type(0)


# ---------------------------------------------------------------- as the primitives are called


def level_scales(x: Array, bits: Array, levels: int) -> list[Array]:
    """The scales of whole rows, (rows, 1) for each level: the mean |residual|, 0 without a code."""
    scales, own = np.empty((len(x), levels), arrays.work_dtype(x.dtype)), in_work_dtype(x)
    _level_scales(own, _map(bits), scales, *_spares(own))
    return list(scales.T[:, :, None])


def level_sums(x: Array, bits: Array, *scales: Array, total: Array, count: Array) -> None:
    """`greedy.level_sums` over a piece of one row."""
    found = _stack(scales, x)
    total[...], count[...] = _level_sum(in_work_dtype(x), _map(bits), found, _chunk(x))


def approximation(x: Array, bits: Array, *scales: Array, y: Array) -> None:
    """`greedy.approximation`."""
    found = _stack(scales, x)
    stored = None if x.dtype == found.dtype else found.astype(x.dtype).astype(found.dtype)
    direct = y.dtype == found.dtype and y.flags.c_contiguous and not np.may_share_memory(x, y)
    target = y if direct else np.empty(x.shape, found.dtype)
    past = direct and _streams(x, bits, y)
    own, bits = in_work_dtype(x), _map(bits)
    _approximation(own, bits, found, stored, target, past, _row(own), _buffer(own))
    if not direct:
        y[...] = target


def approximate_rows(x: Array, bits: Array, levels: int, *, y: Array) -> None:
    """`greedy.approximate_rows`."""
    if x.dtype != arrays.work_dtype(x.dtype):
        approximation(x, bits, *level_scales(x, bits, levels), y=y)
        return
    direct = y.flags.c_contiguous and not np.may_share_memory(x, y)
    target = y if direct else np.empty(x.shape, x.dtype)
    scales = np.empty((len(x), levels), x.dtype)
    past = direct and _streams(x, bits, y)
    own, bits = np.ascontiguousarray(x), _map(bits)
    _approximate(own, bits, scales, target, past, *_spares(x), _row(x), _buffer(x))
    if not direct:
        y[...] = target


def encode_rows(x: Array, bits: Array, levels: int, *, scales: Array, signs: Array) -> None:
    """`greedy.encode_rows`."""
    found, own = np.empty((len(x), levels), arrays.work_dtype(x.dtype)), in_work_dtype(x)
    _encode(own, _map(bits), found, signs, *_spares(own))
    scales[...] = found.T[:, :, None]


def codes(x: Array, bits: Array, *scales: Array, code: Array) -> None:
    """`greedy.codes`."""
    code[...] = 0
    _codes(in_work_dtype(x), _map(bits), _stack(scales, x), code, _chunk(x))


def decode(code: Array, bits: Array, *scales: Array, y: Array) -> None:
    """`code.decode`."""
    work = arrays.work_dtype(y.dtype)
    stored = np.concatenate(scales, axis=1, dtype=y.dtype, casting="same_kind")
    direct = y.dtype == work and y.flags.c_contiguous
    target = y if direct else np.empty(y.shape, work)
    _decode(np.ascontiguousarray(code), _map(bits), stored.astype(work, copy=False), target)
    if not direct:
        y[...] = target


def add_level(y: Array, scale: Array, sign: Array, *, total: Array) -> None:
    """`code.add_level`, in place."""
    _add_signs(np.ascontiguousarray(scale[:, 0]), np.ascontiguousarray(sign), total)


def level_signs(code: Array, bits: Array, level: Array, *, sign: Array) -> None:
    """`code.level_signs`, at a level that `bits` has if it is a scalar."""
    target = sign if sign.flags.c_contiguous else np.empty(sign.shape, np.int8)
    _level_signs(np.ascontiguousarray(code), _map(bits), np.uint16(level), target)
    if target is not sign:
        sign[...] = target


def signs(x: Array, *, y: Array) -> None:
    """`signs.signs`."""
    # A loop on two arrays that might overlap is not vectorized.
    if np.may_share_memory(x, y):
        _signs_in_place(y.reshape(-1))
    else:
        _signs(x.reshape(-1), y.reshape(-1), _is_slow(y), _buffer(y))


def gradient_inside(x: Array, bits: Array, gy: Array, *, gx: Array) -> None:
    """`signs.gradient_inside`."""
    _gradient_inside(x.reshape(-1), bits.reshape(-1), gy.reshape(-1), gx.reshape(-1))


_ELEMENTWISE: dict[str, Callable[..., None]] = {"signs": signs, "gradient_inside": gradient_inside}


def elementwise(primitive: str, *operands: Any) -> Callable[..., None] | None:
    """The loop that does an elementwise primitive in one pass, if it takes such operands.

    They are contiguous and none is a scalar, with which NumPy is as fast, or of float16.
    """
    for array in operands:
        if np.ndim(array) == 0 or array.dtype == np.float16 or not array.flags.c_contiguous:
            return None
    return _ELEMENTWISE.get(primitive)


def in_work_dtype(x: Array) -> Array:
    """The same numbers, contiguous: `x` itself where it is."""
    return np.ascontiguousarray(x, arrays.work_dtype(x.dtype))


def _spares(x: Array) -> tuple[Array, Array]:
    """What `_find_scales` overwrites, for `x` in the work dtype: rows, and half as many columns."""
    rows = max(1, CHUNK // max(1, x.shape[1]))
    return (
        blocks.spare("rows", (rows, x.shape[1]), x.dtype),
        blocks.spare("sums", (x.shape[1] // 2,), x.dtype),
    )


def _chunk(x: Array) -> Array:
    return blocks.spare("chunk", (CHUNK,), arrays.work_dtype(x.dtype))


def _row(x: Array) -> Array:
    return blocks.spare("row", x.shape[1:], x.dtype)


def _buffer(y: Array) -> Array:
    """What `_stream` writes from."""
    return blocks.spare("buffer", (2 * PIECE,), y.dtype)


def _map(bits: Array) -> Array | None:
    return np.ascontiguousarray(bits) if np.ndim(bits) else None


def _stack(scales: tuple[Array, ...], x: Array) -> Array:
    stacked = np.empty((len(x), len(scales)), arrays.work_dtype(x.dtype))
    for level, scale in enumerate(scales):
        stacked[:, level] = scale[:, 0]
    return stacked
