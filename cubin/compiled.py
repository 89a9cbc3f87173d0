"""The loops over rows as Numba compiles them: what the CUDA kernels do, a row at a time.

They mirror the primitives of `cubin.greedy`: the same signs, and scales that differ in how a sum
is rounded alone. They release the GIL and take contiguous arrays of shape (rows, n) in the
work dtype; `bits` is a uint8 array of that shape, or None where all elements have all levels.
What they need to work with is handed in, so that they hold no memory of their own.

Four levels at a time are held in registers. A level that is missing has the scale 0, which
changes nothing.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic, overload

from cubin import arrays, blocks
from cubin.arrays import Array

GROUP = 4

SHORT = 1 << 7
"""Elements of a row from which on it pays to cut it in four columns."""

LONG = 1 << 8
"""Elements of a row with a map from which on it pays to cut it in two columns."""

CHUNK = 1 << 12
"""Elements of the rows, one at least, that are gone through level by level in the first cache."""

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
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
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
def _stream(source: Array, target: Array, ahead: int) -> None:
    """Copy a contiguous array past the caches, while as much from an address on comes into them."""
    itemsize, size = source.itemsize, source.size
    first, last = source.ctypes.data, target.ctypes.data
    start = min(-last % LINE // itemsize, size)
    lines = (size - start) * itemsize // LINE
    for j in range(start):
        target[j] = source[j]
    for line in range(lines):
        at = start * itemsize + line * LINE
        _store_line(first + at, last + at)
        _prefetch(ahead + at)
    for j in range(start + lines * LINE // itemsize, size):
        target[j] = source[j]


def _streams(x: Array, bits: Array, y: Array) -> bool:
    """Whether rows are written past the caches.

    Where they are short or elements have different levels, memory is not what takes the time.
    """
    return np.ndim(bits) == 0 and x.shape[1] >= SHORT and _is_slow(y)


def _is_slow(y: Array) -> bool:
    """Whether `y` is better written past the caches, since what it is a part of outgrows them."""
    whole = y
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    return whole.nbytes >= LARGE and _is_resident(y)


def _is_resident(y: Array) -> bool:
    """Whether the system has given memory to `y` yet; else it clears it first, in the caches."""
    mincore = _mincore()
    if mincore is None:
        return False
    address, answer = y.ctypes.data + y.nbytes // 2, ctypes.c_ubyte()
    page = ctypes.c_void_p(address - address % mmap.PAGESIZE)
    return mincore(page, ctypes.c_size_t(1), ctypes.byref(answer)) == 0 and answer.value & 1 == 1


@functools.cache
def _mincore() -> Any:
    try:
        return ctypes.CDLL(None).mincore
    except (AttributeError, OSError, TypeError):  # the last on Windows
        return None


# ---------------------------------------------------------------- forms by type

# What depends on types, such as whether there is a map, has one form for each. The functions
# themselves are names for Numba alone, which compiles what `overload` gives it: they never run.


def _cut(bits: Array | None, start: int, stop: int) -> Array | None:
    """Some rows of a map, or None where there is none."""
    raise NotImplementedError


def _piece(bits: Array | None, start: int, stop: int, rows: int) -> Array | None:
    """Some elements of a map, as rows, or None where there is none."""
    raise NotImplementedError


@overload(_piece)
def _piece_by_type(bits: Any, start: Any, stop: Any, rows: Any) -> Callable[..., Any]:
    def none(bits: Any, start: Any, stop: Any, rows: Any) -> Any:
        return None

    def some(bits: Any, start: Any, stop: Any, rows: Any) -> Any:
        return bits.reshape(-1)[start:stop].reshape(rows, -1)

    return none if _is_none(bits) else some


@overload(_cut)
def _cut_by_type(bits: Any, start: Any, stop: Any) -> Callable[..., Any]:
    def none(bits: Any, start: Any, stop: Any) -> Any:
        return None

    def rows(bits: Any, start: Any, stop: Any) -> Any:
        return bits[start:stop]

    return none if _is_none(bits) else rows


def _hot(bits: Array | None, row: int, column: int, level: int) -> bool:
    """Whether an element has a code at a level."""
    raise NotImplementedError


@overload(_hot, inline="always")
def _hot_by_type(bits: Any, row: Any, column: Any, level: Any) -> Callable[..., bool]:
    def always(bits: Any, row: Any, column: Any, level: Any) -> bool:
        return True

    def mapped(bits: Any, row: Any, column: Any, level: Any) -> bool:
        # In 32 bits, or the lanes are halved.
        return bool(np.int32(bits[row, column]) > np.int32(level))

    return always if _is_none(bits) else mapped


def _is_none(kind: Any) -> bool:
    return isinstance(kind, numba.types.NoneType)


@loop()
def _folded(m: float, a: float, b: float, c: float) -> float:
    return abs(abs(abs(abs(m) - a) - b) - c)


def _reached(bits: Array | None, row: int, column: int, first: int, values: Any) -> float:
    """The value after as many levels from `first` on as the element has: four at most."""
    raise NotImplementedError


@overload(_reached)
def _reached_by_type(bits: Any, row: Any, column: Any, first: Any, values: Any) -> Any:
    def always(bits: Any, row: Any, column: Any, first: Any, values: Any) -> float:
        return values[4]

    def mapped(bits: Any, row: Any, column: Any, first: Any, values: Any) -> float:
        own = np.int32(bits[row, column])
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
    r: Array, bits: Array | None, row: int, level: int, a: float, b: float, c: float
) -> tuple[float, int]:
    """The sum of a row's |residual| at a level, and how many elements have it."""
    total, count = 0.0, 0
    for j in range(r.shape[1]):
        hot = _hot(bits, row, j, level)
        total += np.float64(_folded(r[row, j], a, b, c)) if hot else 0.0
        count += int(hot)
    return total, count


# The first two levels, which all rows have, have less to subtract.
@loop(fastmath={"reassoc"})
def _early_sum(r: Array, bits: Array | None, row: int, level: int, a: float) -> tuple[float, int]:
    total, count = 0.0, 0
    for j in range(r.shape[1]):
        hot = _hot(bits, row, j, level)
        total += np.float64(abs(abs(r[row, j]) - a)) if hot else 0.0
        count += int(hot)
    return total, count


@loop()
def _four(p: float, q: float, r: float, s: float) -> float:
    return (p + q) + (r + s)


# Where all elements count, four are added in the work dtype, float32 as a rule, which has twice the
# lanes of float64: numbers that are equal do not round.
@loop(fastmath={"reassoc"})
def _whole_sum(x: Array, row: int) -> float:
    """The sum of a row's |x|, in columns of four."""
    n, total = x.shape[1] // 4, 0.0
    for j in range(n):
        p, q = abs(x[row, j]), abs(x[row, n + j])
        r, s = abs(x[row, 2 * n + j]), abs(x[row, 3 * n + j])
        total += np.float64(_four(p, q, r, s))
    for j in range(4 * n, x.shape[1]):
        total += np.float64(abs(x[row, j]))
    return total


# What is read and what is written is told apart, since a loop on arrays that might overlap is not
# vectorized.
@loop(fastmath={"reassoc"})
def _folded_sum(x: Array, row: int, a: float, m: Array) -> float:
    """Take a scale off the magnitudes of `x`, keep what is left in `m`, and add it up."""
    n, total = x.shape[1] // 4, 0.0
    for j in range(n):
        p, q = abs(abs(x[row, j]) - a), abs(abs(x[row, n + j]) - a)
        r, s = abs(abs(x[row, 2 * n + j]) - a), abs(abs(x[row, 3 * n + j]) - a)
        m[row, j], m[row, n + j], m[row, 2 * n + j], m[row, 3 * n + j] = p, q, r, s
        total += np.float64(_four(p, q, r, s))
    for j in range(4 * n, x.shape[1]):
        m[row, j] = abs(abs(x[row, j]) - a)
        total += np.float64(m[row, j])
    return total


@loop(fastmath={"reassoc"})
def _refolded_sum(m: Array, row: int, a: float) -> float:
    """The same in place, of magnitudes."""
    n, total = m.shape[1] // 4, 0.0
    for j in range(n):
        p, q = abs(m[row, j] - a), abs(m[row, n + j] - a)
        r, s = abs(m[row, 2 * n + j] - a), abs(m[row, 3 * n + j] - a)
        m[row, j], m[row, n + j], m[row, 2 * n + j], m[row, 3 * n + j] = p, q, r, s
        total += np.float64(_four(p, q, r, s))
    for j in range(4 * n, m.shape[1]):
        m[row, j] = abs(m[row, j] - a)
        total += np.float64(m[row, j])
    return total


# What asks for the level, or whether something overflows, asks it for many rows at once: Numba
# counts references in every branch, which takes longer than a short row.
@loop()
def _whole_scale(x: Array, level: int, scales: Array, m: Array) -> None:
    """Find the scales of a level of rows whose elements have all levels."""
    length, finite = x.shape[1], True
    if level == 0:
        for row in range(len(scales)):
            scales[row, 0] = _whole_sum(x, row) / length
            finite &= scales[row, 0] < np.inf
    elif level == 1:
        for row in range(len(scales)):
            scales[row, 1] = _folded_sum(x, row, scales[row, 0], m) / length
            finite &= scales[row, 1] < np.inf
    else:
        for row in range(len(scales)):
            scales[row, level] = _refolded_sum(m, row, scales[row, level - 1]) / length
            finite &= scales[row, level] < np.inf
    if not finite:
        _mean(m if level else x, level, scales)


@loop()
def _mean(m: Array, level: int, scales: Array) -> None:
    """The mean magnitudes again, where four overflow that do not in float64."""
    for row in range(len(scales)):
        if not scales[row, level] < np.inf:
            total, _ = _early_sum(m, None, row, 0, scales.dtype.type(0))
            scales[row, level] = total / m.shape[1]


@loop(fastmath={"reassoc"})
def float64_sum(values: Array) -> float:
    total = 0.0
    for j in range(values.size):
        total += np.float64(values[j])
    return total


@loop()
def _copy(x: Array, row: int, target: Array) -> None:
    for j in range(x.shape[1]):
        target[row, j] = x[row, j]


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
def _mapped_scales(
    x: Array, bits: Array, row: int, scales: Array, spare: Array, sums: Array
) -> None:
    """Find the scales of a row whose elements have different levels, in float32."""
    folded, size = spare[row], 2 * sums.size
    own = bits[row, :size].reshape(2, sums.size)
    pairs = folded[:size].reshape(2, sums.size)
    _copy(x, row, spare)
    a = zero = scales.dtype.type(0)
    for level in range(scales.shape[1]):
        count = _mapped_sums(pairs, own, level, a, sums)
        total = float64_sum(sums)
        for j in range(size, folded.size):
            folded[j] = abs(abs(folded[j]) - a)
            if bits[row, j] > level:
                total += folded[j]
                count += 1
        if not total < np.inf:  # two may overflow that do not in float64
            total = _early_sum(spare, bits, row, level, zero)[0]
        a = scales.dtype.type(total / count) if count else zero
        scales[row, level] = a


@loop()
def _fold(r: Array, row: int, scales: Array, first: int) -> None:
    """Take the levels `first` to first + 3 off the magnitudes of a row."""
    a, b, c, d = _padded(scales, row, first)
    for j in range(r.shape[1]):
        r[row, j] = abs(_folded(r[row, j], a, b, c) - d)


@loop()
def _short_scale(r: Array, bits: Array | None, level: int, scales: Array) -> None:
    """Find the scales of a level, of magnitudes off which whole groups of four are."""
    first, zero = level // GROUP * GROUP, scales.dtype.type(0)
    # The scale that is being found is still 0.
    if level < first + 2:
        for row in range(len(scales)):
            total, count = _early_sum(r, bits, row, level, scales[row, first])
            scales[row, level] = scales.dtype.type(total / count) if count else zero
    else:
        for row in range(len(scales)):
            a, b, c, _ = _padded(scales, row, first)
            total, count = _sum(r, bits, row, level, a, b, c)
            scales[row, level] = scales.dtype.type(total / count) if count else zero


@loop()
def _short_scales(x: Array, bits: Array | None, scales: Array, spare: Array) -> None:
    """Find the scales of rows in the work dtype."""
    levels = scales.shape[1]
    for row in range(len(scales)):
        for level in range(levels):
            scales[row, level] = 0
    for level in range(min(levels, GROUP)):
        _short_scale(x, bits, level, scales)
    if levels > GROUP:
        for row in range(len(scales)):
            _copy(x, row, spare)
        for level in range(GROUP, levels):
            if level % GROUP == 0:
                for row in range(len(scales)):
                    _fold(spare, row, scales, level - GROUP)
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
            _mapped_scales(x, bits, row, scales, spare, sums)


@loop()
def _together(x: Array) -> int:
    """How many rows are gone through level by level in the first cache."""
    return max(1, CHUNK // max(1, x.shape[1]))


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
    levels, source = scales.shape[1], x.reshape(-1)
    done = levels // GROUP * GROUP
    a, b, c, _ = _padded(scales, 0, done)
    total, count = 0.0, 0
    for start in range(0, x.size, CHUNK):
        stop = min(start + CHUNK, x.size)
        r = source[start:stop].reshape(1, -1)
        if done:
            kept = spare[: stop - start].reshape(1, -1)
            _copy(r, 0, kept)
            for first in range(0, done, GROUP):
                _fold(kept, 0, scales, first)
            r = kept
        more, hot = _sum(r, _piece(bits, start, stop, 1), 0, levels, a, b, c)
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
    for j in range(y.shape[1]):
        one = _step(zero - x[row, j], e)
        y[row, j] = _reached(bits, row, j, 0, (zero, one, one, one, one))


@loop()
def _first_two_levels(
    x: Array, bits: Array | None, row: int, scales: Array, stored: Array | None, y: Array
) -> None:
    """Write the sum of all levels, of which there are at most two."""
    a, _, _, _ = _padded(scales, row, 0)
    e, f, _, _ = _stored(scales, stored, row, 0)
    zero = y.dtype.type(0)
    for j in range(y.shape[1]):
        n = zero - x[row, j]
        one = _step(n, e)
        two = one + _step(n + _step(n, a), f)
        y[row, j] = _reached(bits, row, j, 0, (zero, one, two, two, two))


@loop()
def _first_levels(
    x: Array, bits: Array | None, row: int, scales: Array, stored: Array | None, y: Array,
    opposite: Array | None,
) -> None:  # fmt: skip
    """Write the sum of the first four levels, and 0 less what is left then."""
    a, b, c, d = _padded(scales, row, 0)
    e, f, g, h = _stored(scales, stored, row, 0)
    zero = y.dtype.type(0)
    for j in range(y.shape[1]):
        n = zero - x[row, j]
        one = _step(n, e)
        n += _step(n, a)
        two = one + _step(n, f)
        n += _step(n, b)
        three = two + _step(n, g)
        n += _step(n, c)
        four = three + _step(n, h)
        y[row, j] = _reached(bits, row, j, 0, (zero, one, two, three, four))
        _keep(n + _step(n, d), opposite, j)


@loop()
def _add_levels(
    opposite: Array, bits: Array | None, row: int, first: int, scales: Array,
    stored: Array | None, y: Array,
) -> None:  # fmt: skip
    """Add four levels, and take them off what is left."""
    a, b, c, d = _padded(scales, row, first)
    e, f, g, h = _stored(scales, stored, row, first)
    for j in range(y.shape[1]):
        n, none = opposite[j], y[row, j]
        one = none + _step(n, e)
        n += _step(n, a)
        two = one + _step(n, f)
        n += _step(n, b)
        three = two + _step(n, g)
        n += _step(n, c)
        four = three + _step(n, h)
        y[row, j] = _reached(bits, row, j, first, (none, one, two, three, four))
        opposite[j] = n + _step(n, d)


@loop()
def _write_levels(
    x: Array, bits: Array | None, scales: Array, stored: Array | None, y: Array, opposite: Array
) -> None:
    """Write the sum of all levels of some rows."""
    levels = scales.shape[1]
    if levels == 1:
        for row in range(len(x)):
            _first_level(x, bits, row, scales, stored, y)
    elif levels == 2:
        for row in range(len(x)):
            _first_two_levels(x, bits, row, scales, stored, y)
    elif levels <= GROUP:
        for row in range(len(x)):
            _first_levels(x, bits, row, scales, stored, y, None)
    else:
        for row in range(len(x)):
            _first_levels(x, bits, row, scales, stored, y, opposite)
            for first in range(GROUP, levels, GROUP):
                _add_levels(opposite, bits, row, first, scales, stored, y)


@loop()
def _give_levels(
    x: Array, bits: Array | None, scales: Array, stored: Array | None, y: Array, past: bool,
    buffer: Array, opposite: Array,
) -> None:  # fmt: skip
    """The same of rows that the first cache holds together or of a longer one, or past the caches.

    What they overwrite are arrays of `CHUNK`.
    """
    source, target = x.reshape(-1), y.reshape(-1)
    for start in range(0, x.size, CHUNK):
        stop = min(start + CHUNK, x.size)
        some, own = source[start:stop].reshape(len(x), -1), _piece(bits, start, stop, len(x))
        given = buffer[: stop - start] if past else target[start:stop]
        _write_levels(some, own, scales, stored, given.reshape(some.shape), opposite)
        if past:
            _stream(given, target[start:stop], some.ctypes.data + CHUNK * x.itemsize)


@loop()
def _approximation(
    x: Array, bits: Array | None, scales: Array, stored: Array | None, y: Array, past: bool,
    buffer: Array, opposite: Array,
) -> None:  # fmt: skip
    """Write the sums of levels; `stored` are the scales as rounded, None if they are not."""
    x, bits, y = uncounted(x), uncounted(bits), uncounted(y)
    scales, stored = uncounted(scales), uncounted(stored)
    buffer, opposite = uncounted(buffer), uncounted(opposite)
    rows = _together(x)
    for start in range(0, len(x), rows):
        stop = min(start + rows, len(x))
        _give_levels(
            x[start:stop], _cut(bits, start, stop), scales[start:stop], _cut(stored, start, stop),
            y[start:stop], past, buffer, opposite,
        )  # fmt: skip
    _finish_stores()


@loop()
def _approximate(
    x: Array, bits: Array | None, scales: Array, y: Array, past: bool, spare: Array, sums: Array,
    buffer: Array, opposite: Array,
) -> None:  # fmt: skip
    """Find the scales of rows and write the sums of levels while they are in the first cache."""
    x, bits, scales, y = uncounted(x), uncounted(bits), uncounted(scales), uncounted(y)
    spare, sums = uncounted(spare), uncounted(sums)
    buffer, opposite = uncounted(buffer), uncounted(opposite)
    for start in range(0, len(x), len(spare)):
        stop = min(start + len(spare), len(x))
        own, some, found = _cut(bits, start, stop), x[start:stop], scales[start:stop]
        _find_scales(some, own, found, spare, sums)
        _give_levels(some, own, found, None, y[start:stop], past, buffer, opposite)
    _finish_stores()


@loop()
def _negate(x: Array, row: int, opposite: Array) -> None:
    for j in range(opposite.size):
        opposite[j] = x.dtype.type(0) - x[row, j]


@loop()
def _set(
    opposite: Array, bits: Array | None, row: int, level: int, scale: float, code: Array
) -> None:
    """Set the bit of a level, and take the level off what is left."""
    bit, zero = code.dtype.type(1 << level), code.dtype.type(0)
    for j in range(opposite.size):
        n = opposite[j]
        code[row, j] |= bit if (n < 0) & _hot(bits, row, j, level) else zero
        opposite[j] = n + _step(n, scale)


@loop()
def _codes(x: Array, bits: Array | None, scales: Array, code: Array, opposite: Array) -> None:
    """Write the codes, which are 0 before; `opposite` is an array of `CHUNK`."""
    x, bits, scales, code = uncounted(x), uncounted(bits), uncounted(scales), uncounted(code)
    opposite = uncounted(opposite)
    for row in range(len(x)):
        whole = _cut(bits, row, row + 1)
        for start in range(0, x.shape[1], CHUNK):
            stop = min(start + CHUNK, x.shape[1])
            some, given = x[row, start:stop].reshape(1, -1), code[row, start:stop].reshape(1, -1)
            own, left = _piece(whole, start, stop, 1), opposite[: stop - start]
            _negate(some, 0, left)
            for level in range(scales.shape[1]):
                _set(left, own, 0, level, scales[row, level], given)


@loop()
def _set_signs(
    opposite: Array, bits: Array | None, row: int, level: int, scale: float, signs: Array
) -> None:
    """Write the signs of a level, and take the level off what is left."""
    plus, minus, none = np.int8(1), np.int8(-1), np.int8(0)
    for j in range(opposite.size):
        n = opposite[j]
        sign = plus if n < 0 else minus
        signs[level, row, j] = sign if _hot(bits, row, j, level) else none
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
            _negate(x, row, opposite)
            for level in range(len(signs)):
                _set_signs(opposite, bits, row, level, scales[row, level], signs)


@loop()
def _first_codes(code: Array, bits: Array | None, row: int, stored: Array, y: Array) -> None:
    """Write the sum of the first four levels."""
    a, b, c, d = _padded(stored, row, 0)
    zero = y.dtype.type(0)
    for j in range(code.shape[1]):
        own = code[row, j]
        one = a if own & 1 else -a
        two = one + (b if own & 2 else -b)
        three = two + (c if own & 4 else -c)
        four = three + (d if own & 8 else -d)
        y[row, j] = _reached(bits, row, j, 0, (zero, one, two, three, four))


@loop()
def _add_code(
    code: Array, bits: Array | None, row: int, level: int, stored: float, y: Array
) -> None:
    for j in range(code.shape[1]):
        step = stored if code[row, j] >> level & 1 else -stored
        y[row, j] += step if _hot(bits, row, j, level) else y.dtype.type(0)


@loop()
def _decode(code: Array, bits: Array | None, stored: Array, y: Array) -> None:
    for row in range(len(code)):
        _first_codes(code, bits, row, stored, y)
        for level in range(GROUP, stored.shape[1]):
            _add_code(code, bits, row, level, stored[row, level], y)


@loop()
def _add_signs(scales: Array, sign: Array, y: Array) -> None:
    for row in range(len(y)):
        scale = scales[row]
        for j in range(y.shape[1]):
            step = scale if sign[row, j] > 0 else -scale
            y[row, j] += step if sign[row, j] != 0 else y.dtype.type(0)


@loop()
def _level_signs(code: Array, bits: Array | None, level: int, sign: Array) -> None:
    for row in range(len(code)):
        for j in range(code.shape[1]):
            value = np.int8(2 * (code[row, j] >> level & 1) - 1)
            sign[row, j] = value if _hot(bits, row, j, level) else np.int8(0)


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
    for start in range(0, x.size, CHUNK):
        some, target = x[start : start + CHUNK], y[start : start + CHUNK]
        drain = buffer[: some.size]
        _signs_of(some, drain)
        _stream(drain, target, some.ctypes.data + CHUNK * x.itemsize)
    _finish_stores()


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
    total[...], count[...] = _level_sum(in_work_dtype(x), _map(bits), found, *_chunks(x, 1))


def approximation(x: Array, bits: Array, *scales: Array, y: Array) -> None:
    """`greedy.approximation`."""
    found = _stack(scales, x)
    stored = None if x.dtype == found.dtype else found.astype(x.dtype).astype(found.dtype)
    direct = y.dtype == found.dtype and y.flags.c_contiguous and not np.may_share_memory(x, y)
    target = y if direct else np.empty(x.shape, found.dtype)
    past = direct and _streams(x, bits, y)
    own, bits = in_work_dtype(x), _map(bits)
    _approximation(own, bits, found, stored, target, past, *_chunks(x, 2))
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
    _approximate(own, bits, scales, target, past, *_spares(x), *_chunks(x, 2))
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
    _codes(in_work_dtype(x), _map(bits), _stack(scales, x), code, *_chunks(x, 1))


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
        _signs(x.reshape(-1), y.reshape(-1), _is_slow(y), *_chunks(y, 1))


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
    return (
        blocks.spare("rows", (_together(x), x.shape[1]), x.dtype),
        blocks.spare("sums", (x.shape[1] // 2,), x.dtype),
    )


def _chunks(x: Array, number: int) -> Array:
    """Arrays of `CHUNK` in the work dtype that are overwritten."""
    return blocks.spare("chunks", (number, CHUNK), arrays.work_dtype(x.dtype))


def _map(bits: Array) -> Array | None:
    return np.ascontiguousarray(bits) if np.ndim(bits) else None


def _stack(scales: tuple[Array, ...], x: Array) -> Array:
    stacked = np.empty((len(x), len(scales)), arrays.work_dtype(x.dtype))
    for level, scale in enumerate(scales):
        stacked[:, level] = scale[:, 0]
    return stacked
