"""The loops over rows as Numba compiles them: what the CUDA kernels do, a row at a time.

They mirror the primitives of `cubin.greedy`: the same signs, and scales that differ in how a sum
is rounded alone. They release the GIL and take contiguous arrays of shape (rows, n) in the
work dtype; `bits` is a uint8 array of that shape, or None where all elements have all levels.
What they need to work with is handed in, so that they hold no memory of their own.

Four levels at a time are held in registers. A level that is missing has the scale 0, which
changes nothing.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba.core.caching import FunctionCache
from numba.extending import overload

from cubin import arrays, blocks, memory
from cubin.arrays import Array
from cubin.instructions import (
    LINE,
    finish_stores,
    is_none,
    itemsize,
    levels_in_lanes,
    prefetch,
    store_line,
    sum_in_lanes,
    uncounted,
)

GROUP = 4

SHORT = 1 << 5
"""The longest rows whose sums are left to LLVM, which needs less to begin and to end them."""

STREAMED = 1 << 7
"""Elements of a row from which on it pays to write it past the caches."""

CHUNK = 1 << 12
"""Elements of the rows, one at least, that are gone through level by level in the first cache."""

PIECE = 1 << 10
"""Elements that are written past the caches at a time: in between, memory has time to take them."""

LARGE = 1 << 25
"""Bytes of a result from which on it is written past the caches, which could not hold it.

An ordinary store first reads what it overwrites, so that a copy moves three bytes for two.
"""


class _Cache(FunctionCache):
    """Compiled loops on disk, without which they are compiled again.

    A killed process, a full disk and processes that save at once leave entries that cannot be
    read, or that hold a loop for other types. Numba raises for the first, whenever the loop is
    called, and takes the second as it is.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The loop for the types `sig`, or None where there is no sound entry."""
        try:
            found = super().load_overload(sig, target_context)
        except Exception:  # unpickling what is damaged may raise anything
            found = None
        else:
            if found is None or found.signature.args == tuple(sig):
                return found
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


def loop(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    def decorate(function: Callable[..., Any]) -> Any:
        compiled = numba.njit(nogil=True, **options)(function)
        with contextlib.suppress(RuntimeError):  # no folder to keep the cache in can be written
            compiled._cache = _Cache(function)
        return compiled

    return decorate


# ---------------------------------------------------------------- stores past the caches


@loop()
def _lead(target: Array) -> int:
    """How many elements a line would have before the target: as if they were held already."""
    return target.ctypes.data % LINE // itemsize(target)


@loop()
def _stream(buffer: Array, size: int, target: Array, end: int, source: Array | None) -> int:
    """Copy whole lines past the caches once there are enough, while what is read next enters them.

    The first `size` elements of the buffer, which begins with a line, belong before the index
    `end` of the target. Those that stay are at its front then, and their number is given. `source`
    has the elements of the target, and is read as far as that is written.
    """
    if size < PIECE:
        return size
    item, first = itemsize(buffer), end - size
    start = 0
    if first < 0:  # the target begins within a line
        start = LINE // item
        for j in range(-first, start):
            target[first + j] = buffer[j]
    given, address = buffer.ctypes.data, target.ctypes.data + first * item
    ahead = 0 if source is None else source.ctypes.data + (first + CHUNK) * item
    lines = (size - start) * item // LINE
    for line in range(lines):
        at = start * item + line * LINE
        store_line(given + at, address + at)
        if source is not None:
            prefetch(ahead + at)
    done = start + lines * LINE // item
    for j in range(size - done):
        buffer[j] = buffer[done + j]
    return size - done


@loop()
def _finish_stream(buffer: Array, held: int, target: Array) -> None:
    """Write what is still held, the last elements of the target."""
    first = target.size - held
    for j in range(max(0, -first), held):
        target[first + j] = buffer[j]
    finish_stores()


def _streams(x: Array, bits: Array, y: Array) -> bool:
    """Whether rows are written past the caches.

    Where they are short or elements have different levels, memory is not what takes the time.
    """
    return np.ndim(bits) == 0 and x.shape[1] >= STREAMED and _is_slow(y)


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

    return none if is_none(bits) else some


def _row_of(bits: Array | None, row: int) -> Array | None:
    """A row of a map, or None where there is none."""
    raise NotImplementedError


@overload(_row_of)
def _row_of_by_type(bits: Any, row: Any) -> Callable[..., Any]:
    def none(bits: Any, row: Any) -> Any:
        return None

    def one(bits: Any, row: Any) -> Any:
        return bits[row]

    return none if is_none(bits) else one


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

    return always if is_none(bits) else mapped


def _left(value: float, taken: Any) -> float:
    """The magnitude of a number after scales are taken off it."""
    raise NotImplementedError


@overload(_left)
def _left_by_type(value: Any, taken: Any) -> Callable[..., float]:
    def magnitude(value: Any, taken: Any) -> float:
        return abs(value)

    def less_one(value: Any, taken: Any) -> float:
        return abs(abs(value) - taken[0])

    def less_three(value: Any, taken: Any) -> float:
        return abs(abs(abs(abs(value) - taken[0]) - taken[1]) - taken[2])

    def less_four(value: Any, taken: Any) -> float:
        return abs(abs(abs(abs(abs(value) - taken[0]) - taken[1]) - taken[2]) - taken[3])

    return {0: magnitude, 1: less_one, 3: less_three, 4: less_four}[len(taken)]


def _reached(bits: Array | None, column: int, values: Any) -> float:
    """The value after as many levels as the element has: four at most."""
    raise NotImplementedError


@overload(_reached)
def _reached_by_type(bits: Any, column: Any, values: Any) -> Any:
    def always(bits: Any, column: Any, values: Any) -> float:
        return values[4]

    def mapped(bits: Any, column: Any, values: Any) -> float:
        own = np.int32(bits[column])
        value = values[1] if own > np.int32(0) else values[0]
        value = values[2] if own > np.int32(1) else value
        value = values[3] if own > np.int32(2) else value
        return values[4] if own > np.int32(3) else value

    return always if is_none(bits) else mapped


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


def _padded_or_none(stored: Array | None, row: int, first: int) -> Any:
    """What `_padded` gives, or None where there is no array."""
    raise NotImplementedError


@overload(_padded_or_none)
def _padded_or_none_by_type(stored: Any, row: Any, first: Any) -> Callable[..., Any]:
    def none(stored: Any, row: Any, first: Any) -> Any:
        return None

    def some(stored: Any, row: Any, first: Any) -> Any:
        return _padded(stored, row, first)

    return none if is_none(stored) else some


def _first(scales: Array | None, row: int, count: int) -> Any:
    """The first scales of a row, or None where there is no array."""
    raise NotImplementedError


@overload(_first, prefer_literal=True)
def _first_by_count(scales: Any, row: Any, count: Any) -> Callable[..., Any]:
    def none(scales: Any, row: Any, count: Any) -> Any:
        return None

    def one(scales: Any, row: Any, count: Any) -> Any:
        return (scales[row, 0],)

    def two(scales: Any, row: Any, count: Any) -> Any:
        return scales[row, 0], scales[row, 1]

    def three(scales: Any, row: Any, count: Any) -> Any:
        return scales[row, 0], scales[row, 1], scales[row, 2]

    def four(scales: Any, row: Any, count: Any) -> Any:
        return scales[row, 0], scales[row, 1], scales[row, 2], scales[row, 3]

    return none if is_none(scales) else (one, two, three, four)[count.literal_value - 1]


# ---------------------------------------------------------------- scales


# A sum alone may be reordered; what makes up the summands keeps its order and its NaN.
@loop(fastmath={"reassoc"})
def _wide_sum(x: Array, bits: Array | None, level: int, taken: Any) -> tuple[float, int]:
    """What `sum_in_lanes` gives, in float64 throughout.

    It pays in short rows, and where four overflow that do not in float64.
    """
    total, count = 0.0, 0
    for j in range(x.size):
        hot = _hot(bits, j, level)
        total += np.float64(_left(x[j], taken)) if hot else 0.0
        count += int(hot)
    return total, count


@loop()
def _short_scales(x: Array, bits: Array | None, scales: Array, spare: Array) -> None:
    """Find the scales of short rows."""
    levels, zero = scales.shape[1], scales.dtype.type(0)
    scales[:] = zero
    for level in range(levels):
        first = level // GROUP * GROUP
        if level == first and level > 0:
            source = x if level == GROUP else spare
            for row in range(len(x)):
                sum_in_lanes(
                    source[row], None, np.uint8(0), _padded(scales, row, first - GROUP), spare[row]
                )
        source = x if level < GROUP else spare
        if level < first + 2:
            for row in range(len(x)):
                taken = (scales[row, first],)  # 0 where it is what is being found
                total, count = _wide_sum(source[row], _row_of(bits, row), level, taken)
                scales[row, level] = scales.dtype.type(total / count) if count else zero
        else:
            for row in range(len(x)):
                a, b, c, _ = _padded(scales, row, first)
                total, count = _wide_sum(source[row], _row_of(bits, row), level, (a, b, c))
                scales[row, level] = scales.dtype.type(total / count) if count else zero


@loop()
def _find_scales(x: Array, bits: Array | None, scales: Array, spare: Array) -> None:
    """Find the scales of some rows: the mean |residual| at each level, 0 without a code."""
    if x.shape[1] <= SHORT:
        _short_scales(x, bits, scales, spare)
        return
    levels, zero = scales.shape[1], scales.dtype.type(0)
    for level in range(levels):
        source, last = x if level < 2 else spare, level == levels - 1
        for row in range(len(x)):
            r, own, left = source[row], _row_of(bits, row), spare[row]
            if level == 0:
                total, count = sum_in_lanes(r, own, np.uint8(0), (), None)
                if not total < np.inf:
                    total, count = _wide_sum(r, own, 0, ())
            elif last:
                taken = (scales[row, level - 1],)
                total, count = sum_in_lanes(r, own, np.uint8(level), taken, None)
                if not total < np.inf:
                    total, count = _wide_sum(r, own, level, taken)
            else:
                total, count = sum_in_lanes(
                    r, own, np.uint8(level), (scales[row, level - 1],), left
                )
                if not total < np.inf:
                    total, count = _wide_sum(left, own, level, ())
            scales[row, level] = scales.dtype.type(total / count) if count else zero


@loop()
def _level_scales(x: Array, bits: Array | None, scales: Array, spare: Array) -> None:
    """Find the scales, (rows, levels)."""
    x, bits, scales, spare = uncounted(x), uncounted(bits), uncounted(scales), uncounted(spare)
    for start in range(0, len(x), len(spare)):
        stop = min(start + len(spare), len(x))
        _find_scales(x[start:stop], _cut(bits, start, stop), scales[start:stop], spare)


@loop()
def _level_sum(x: Array, bits: Array | None, scales: Array, spare: Array) -> tuple[float, int]:
    """The sum of |residual| after `scales`, (1, levels), over a piece of a row; and its count."""
    x, bits, scales, spare = uncounted(x), uncounted(bits), uncounted(scales), uncounted(spare)
    levels, piece, own = scales.shape[1], x[0], _row_of(bits, 0)
    last = levels // GROUP * GROUP
    total, number = 0.0, 0
    for start in range(0, piece.size, CHUNK):
        r = piece[start : start + CHUNK]
        for first in range(0, last, GROUP):
            left = spare[: r.size]
            sum_in_lanes(r, None, np.uint8(0), _padded(scales, 0, first), left)
            r = left
        hot, taken = _cut(own, start, start + CHUNK), _padded(scales, 0, last)
        part, count = sum_in_lanes(r, hot, np.uint8(levels), taken, None)
        if not part < np.inf:
            part, count = _wide_sum(r, hot, levels, taken)
        total += part
        number += count
    return total, number


# ---------------------------------------------------------------- what they give


@loop()
def _write_levels(
    x: Array, bits: Array | None, row: int, scales: Array, stored: Array | None, y: Array,
    opposite: Array,
) -> None:  # fmt: skip
    """Write the sum of all levels of a row, or of a piece of it."""
    levels, zero = scales.shape[1], np.uint8(0)
    if levels == 1:
        levels_in_lanes(x, bits, zero, _first(scales, row, 1), _first(stored, row, 1), y, None)
    elif levels == 2:
        levels_in_lanes(x, bits, zero, _first(scales, row, 2), _first(stored, row, 2), y, None)
    elif levels == 3:
        levels_in_lanes(x, bits, zero, _first(scales, row, 3), _first(stored, row, 3), y, None)
    elif levels == GROUP:
        levels_in_lanes(x, bits, zero, _first(scales, row, 4), _first(stored, row, 4), y, None)
    else:
        levels_in_lanes(
            x, bits, zero, _padded(scales, row, 0), _padded_or_none(stored, row, 0), y, opposite
        )
        for first in range(GROUP, levels, GROUP):
            levels_in_lanes(None, bits, np.uint8(first), _padded(scales, row, first),
                            _padded_or_none(stored, row, first), y, opposite)  # fmt: skip


@loop()
def _write_rows(
    x: Array, bits: Array | None, scales: Array, stored: Array | None, y: Array, opposite: Array
) -> None:
    """Write the sum of all levels of some rows: a call for each would take longer than the work."""
    levels, zero = scales.shape[1], np.uint8(0)
    if levels == 1:
        for row in range(len(x)):
            one, given = _first(scales, row, 1), _first(stored, row, 1)
            levels_in_lanes(x[row], _row_of(bits, row), zero, one, given, y[row], None)
    elif levels == 2:
        for row in range(len(x)):
            two, given = _first(scales, row, 2), _first(stored, row, 2)
            levels_in_lanes(x[row], _row_of(bits, row), zero, two, given, y[row], None)
    elif levels == 3:
        for row in range(len(x)):
            three, given = _first(scales, row, 3), _first(stored, row, 3)
            levels_in_lanes(x[row], _row_of(bits, row), zero, three, given, y[row], None)
    elif levels == GROUP:
        for row in range(len(x)):
            four, given = _first(scales, row, 4), _first(stored, row, 4)
            levels_in_lanes(x[row], _row_of(bits, row), zero, four, given, y[row], None)
    else:
        for row in range(len(x)):
            _write_levels(x[row], _row_of(bits, row), row, scales, stored, y[row], opposite)


@loop()
def _stream_rows(
    x: Array, bits: Array | None, first: int, last: int, scales: Array, stored: Array | None,
    source: Array, target: Array, opposite: Array, buffer: Array, held: int,
) -> int:  # fmt: skip
    """The same past the caches; the number of elements that are held in the buffer is given.

    `source` and `target` are the elements of all rows, one after the other.
    """
    length = x.shape[1]
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
        source, target = x.reshape(-1), y.reshape(-1)
        held = _stream_rows(
            x, bits, 0, len(x), scales, stored, source, target, opposite, buffer, _lead(target)
        )  # fmt: skip
        _finish_stream(buffer, held, target)
    else:
        _write_rows(x, bits, scales, stored, y, opposite)


@loop()
def _approximate(
    x: Array, bits: Array | None, scales: Array, y: Array, past: bool, spare: Array,
    opposite: Array, buffer: Array,
) -> None:  # fmt: skip
    """Find the scales of rows and write the sums of levels while they are in the first cache."""
    x, bits, scales, y = uncounted(x), uncounted(bits), uncounted(scales), uncounted(y)
    spare, opposite, buffer = uncounted(spare), uncounted(opposite), uncounted(buffer)
    source, target = x.reshape(-1), y.reshape(-1)
    held = _lead(target)
    for start in range(0, len(x), len(spare)):
        stop = min(start + len(spare), len(x))
        some, own, found = x[start:stop], _cut(bits, start, stop), scales[start:stop]
        _find_scales(some, own, found, spare)
        if past:
            held = _stream_rows(
                x, bits, start, stop, scales, None, source, target, opposite, buffer, held
            )  # fmt: skip
        else:
            _write_rows(some, own, found, None, y[start:stop], opposite)
    if past:
        _finish_stream(buffer, held, target)


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
def _encode(x: Array, bits: Array | None, scales: Array, signs: Array, spare: Array) -> None:
    """Find the scales, (rows, levels), and write the signs, (levels, rows, n)."""
    x, bits, scales, signs = uncounted(x), uncounted(bits), uncounted(scales), uncounted(signs)
    spare = uncounted(spare)
    opposite = spare[0]
    for start in range(0, len(x), len(spare)):
        stop = min(start + len(spare), len(x))
        found = scales[start:stop]
        _find_scales(x[start:stop], _cut(bits, start, stop), found, spare)
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
        one = zero + (a if own & 1 else -a)  # never -0.0
        two = one + (b if own & 2 else -b)
        three = two + (c if own & 4 else -c)
        four = three + (d if own & 8 else -d)
        y[j] = _reached(bits, j, (zero, one, two, three, four))


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
def _add_signs(scales: Array, level: int, sign: Array, y: Array) -> None:
    """Add a level to rows."""
    for row in range(len(y)):
        scale, own, total = scales[row, level], sign[row], y[row]
        for j in range(total.size):
            step = scale if own[j] > 0 else -scale
            total[j] += step if own[j] != 0 else total.dtype.type(0)


@loop()
def _sum_signs(scales: Array, signs: Array, y: Array) -> None:
    """Write the sums of scales, (rows, levels), times signs, (levels, rows, n)."""
    scales, signs, y = uncounted(scales), uncounted(signs), uncounted(y)
    rows = max(1, CHUNK // max(1, y.shape[1]))
    for start in range(0, len(y), rows):
        stop = min(start + rows, len(y))
        y[start:stop] = 0
        for level in range(len(signs)):
            _add_signs(scales[start:stop], level, signs[level, start:stop], y[start:stop])


@loop()
def _stream_signs(scales: Array, signs: Array, target: Array, buffer: Array) -> None:
    """The same past the caches, to a target of one axis."""
    scales, signs, target = uncounted(scales), uncounted(signs), uncounted(target)
    buffer, length, held = uncounted(buffer), signs.shape[2], _lead(target)
    for row in range(len(scales)):
        for start in range(0, length, PIECE):
            stop = min(start + PIECE, length)
            size = held + stop - start
            total = buffer[held:size].reshape(1, stop - start)
            total[:] = 0
            for level in range(len(signs)):
                sign = signs[level, row : row + 1, start:stop]
                _add_signs(scales[row : row + 1], level, sign, total)
            held = _stream(buffer, size, target, row * length + stop, None)
    _finish_stream(buffer, held, target)


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


# ---------------------------------------------------------------- float16

# Numba does not know it, and NumPy converts it one by one: here it is its bits.

_INFINITE_HALF, _INFINITE = 0x7C00, 0x7F800000
_EXPONENTS_APART = np.float32(2.0**112)


@loop()
def _widen(half: Array, words: Array) -> None:
    """Write the bits of float32."""
    for j in range(half.size):
        own = np.uint32(half[j])
        moved = np.uint32((own & 0x7FFF) << 13)
        value = np.uint32(moved).view(np.float32) * _EXPONENTS_APART
        finite = moved < np.uint32(_INFINITE_HALF << 13)
        word = np.float32(value).view(np.uint32) if finite else np.uint32(moved | _INFINITE)
        words[j] = np.uint32(word | np.uint32((own & 0x8000) << 16))


@loop()
def _narrow(words: Array, half: Array) -> None:
    """Write the bits of float16, rounded to the nearest, to even if there are two."""
    for j in range(half.size):
        own = words[j]
        m = np.uint32(own & 0x7FFFFFFF)
        odd = np.uint32((m >> 13) & 1)
        normal = np.uint32(np.uint32(m - 0x38000000 + 0xFFF + odd) >> 13)
        # The sum has the steps of the smallest numbers of float16, and is rounded by the processor.
        raised = np.uint32(m).view(np.float32) + np.float32(0.5)
        small = np.uint32(np.float32(raised).view(np.uint32) - 0x3F000000)
        payload = np.uint32((m >> 13) & 0x3FF)
        nan = np.uint32(_INFINITE_HALF | (payload if payload > 0 else np.uint32(1)))
        value = small if m < np.uint32(0x38800000) else normal
        value = np.uint32(_INFINITE_HALF) if m >= np.uint32(0x47800000) else value
        value = nan if m > np.uint32(_INFINITE) else value
        half[j] = np.uint16(value | np.uint32((own >> 16) & 0x8000))


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
    held = _lead(y)
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


def _bound(bits: Any, column: int) -> int:
    """The bits of an element, of which there may be one number for all."""
    raise NotImplementedError


@overload(_bound, inline="always")
def _bound_by_type(bits: Any, column: Any) -> Callable[..., int]:
    def one(bits: Any, column: Any) -> int:
        return bits

    def own(bits: Any, column: Any) -> int:
        return bits[column]

    return own if isinstance(bits, numba.types.Array) else one


@loop()
def _gradient_inside(x: Array, bits: Any, gy: Array, gx: Array) -> None:
    for j in range(x.size):
        bound = x.dtype.type(_bound(bits, j))
        gx[j] = gy[j] if abs(x[j]) <= bound else gx.dtype.type(0)


# ---------------------------------------------------------------- as the primitives are called


def level_scales(x: Array, bits: Array, levels: int) -> list[Array]:
    """The scales of whole rows, (rows, 1) for each level: the mean |residual|, 0 without a code."""
    scales, own = np.empty((len(x), levels), arrays.work_dtype(x.dtype)), in_work_dtype(x)
    _level_scales(own, _map(bits), scales, _rows(own))
    return list(scales.T[:, :, None])


def level_sums(x: Array, bits: Array, *scales: Array, total: Array, count: Array) -> None:
    """`greedy.level_sums` over a piece of one row."""
    found = _stack(scales, x)
    total[...], count[...] = _level_sum(in_work_dtype(x), _map(bits), found, _chunk(x))


def approximation(x: Array, bits: Array, *scales: Array, y: Array) -> None:
    """`greedy.approximation`."""
    direct = y.flags.carray and not np.may_share_memory(x, y)
    _write(in_work_dtype(x), bits, _stack(scales, x), direct, y)


def approximate_rows(x: Array, bits: Array, levels: int, *, y: Array) -> None:
    """`greedy.approximate_rows`."""
    own, map_of_bits = in_work_dtype(x), _map(bits)
    scales = np.empty((len(x), levels), own.dtype)
    direct = y.flags.carray and not np.may_share_memory(x, y)
    if y.dtype != own.dtype:
        _level_scales(own, map_of_bits, scales, _rows(own))
        _write(own, bits, scales, direct, y)
        return
    target = y if direct else np.empty(x.shape, x.dtype)
    past = direct and _streams(x, bits, y)
    _approximate(own, map_of_bits, scales, target, past, _rows(x), _row(x), _buffer(x))
    if not direct:
        y[...] = target


def _write(x: Array, bits: Array, scales: Array, direct: bool, y: Array) -> None:
    """Write the sums of levels, to `y` itself if that is allowed and it is in the work dtype."""
    rounded = y.dtype != x.dtype
    stored = scales.astype(y.dtype).astype(x.dtype) if rounded else None
    direct = direct and not rounded
    target = y if direct else np.empty(x.shape, x.dtype)
    past = direct and _streams(x, bits, y)
    _approximation(x, _map(bits), scales, stored, target, past, _row(x), _buffer(x))
    if not direct:
        store(target, y)


def encode_rows(x: Array, bits: Array, levels: int, *, scales: Array, signs: Array) -> None:
    """`greedy.encode_rows`."""
    found, own = np.empty((len(x), levels), arrays.work_dtype(x.dtype)), in_work_dtype(x)
    _encode(own, _map(bits), found, signs, _rows(own))
    scales[...] = found.T[:, :, None]


def codes(x: Array, bits: Array, *scales: Array, code: Array) -> None:
    """`greedy.codes`."""
    code[...] = 0
    _codes(in_work_dtype(x), _map(bits), _stack(scales, x), code, _chunk(x))


def decode(code: Array, bits: Array, *scales: Array, y: Array) -> None:
    """`code.decode`."""
    work = arrays.work_dtype(y.dtype)
    stored = np.concatenate(scales, axis=1, dtype=y.dtype, casting="same_kind")
    direct = y.dtype == work and y.flags.carray
    target = y if direct else np.empty(y.shape, work)
    _decode(np.ascontiguousarray(code), _map(bits), stored.astype(work, copy=False), target)
    if not direct:
        store(target, y)


def sum_signs(scales: Array, signs: Array, *, y: Array) -> None:
    """`code.sum_signs`."""
    direct = y.dtype == scales.dtype and y.flags.carray
    target = y if direct else np.empty(y.shape, scales.dtype)
    own = np.ascontiguousarray(scales[:, :, 0].T)
    if direct and _streams(y, np.uint8(0), y):
        _stream_signs(own, signs, y.reshape(-1), _buffer(y))
    else:
        _sum_signs(own, signs, target)
    if not direct:
        store(target, y)


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
    own = bits.reshape(-1) if np.ndim(bits) else np.uint8(bits)
    _gradient_inside(x.reshape(-1), own, gy.reshape(-1), gx.reshape(-1))


ELEMENTWISE: dict[str, Callable[..., None]] = {"signs": signs, "gradient_inside": gradient_inside}
"""The loops that do an elementwise primitive in one pass, on contiguous arrays and scalars."""


def in_work_dtype(x: Array) -> Array:
    """The same numbers, contiguous: `x` itself where it is."""
    if x.dtype != np.float16:
        return np.require(x, requirements=("C", "A"))
    own = np.empty(x.shape, np.float32)
    half = np.ascontiguousarray(x).view(np.uint16)
    _widen(half.reshape(-1), own.view(np.uint32).reshape(-1))
    return own


def store(given: Array, y: Array) -> None:
    """Write contiguous numbers in the work dtype to `y`."""
    if y.dtype == np.float16 and y.flags.carray:
        _narrow(given.view(np.uint32).reshape(-1), y.view(np.uint16).reshape(-1))
    else:
        y[...] = given


def _rows(x: Array) -> Array:
    """What `_find_scales` overwrites, for `x` in the work dtype: as many rows as it takes."""
    rows = max(1, CHUNK // max(1, x.shape[1]))
    return blocks.spare("rows", (rows, x.shape[1]), x.dtype)


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
