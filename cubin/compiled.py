"""The loops over rows as Numba compiles them: what the CUDA kernels do, a row at a time.

They mirror the primitives of `cubin.greedy`: the same signs, and scales that differ in how a sum
is rounded alone. They release the GIL and take contiguous arrays of shape (rows, n) in the
work dtype; `bits` is a uint8 array of that shape, or None where all elements have all levels.

Four levels at a time are held in registers. A level that is missing has the scale 0, which
changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba.extending import overload

from cubin import arrays
from cubin.arrays import Array

GROUP = 4

LONG = 1 << 10
"""Elements of a row from which on it pays to cut it in four."""


def loop(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # no folder to keep the cache in can be written
            return numba.njit(nogil=True, **options)(function)

    return decorate


def _hot(bits: Array | None, row: int, column: int, level: int) -> bool:
    """Whether an element has a code at a level: compiled by the type of `bits`, as below."""
    raise NotImplementedError


@overload(_hot, inline="always")
def _hot_by_type(bits: Any, row: Any, column: Any, level: Any) -> Callable[..., bool]:
    def always(bits: Any, row: Any, column: Any, level: Any) -> bool:
        return True

    def mapped(bits: Any, row: Any, column: Any, level: Any) -> bool:
        return bits[row, column] > level

    return always if isinstance(bits, numba.types.NoneType) else mapped


@loop()
def _folded(m: float, a: float, b: float, c: float) -> float:
    return abs(abs(abs(abs(m) - a) - b) - c)


@loop()
def _step(r: float, scale: float) -> float:
    return scale if r > 0 else -scale


@loop()
def _padded(scales: Array, row: int, first: int) -> tuple[float, float, float, float]:
    """The scales of four levels of a row, 0 for those it does not have."""
    levels = len(scales)
    zero = scales.dtype.type(0)
    return (
        scales[first, row] if first < levels else zero,
        scales[first + 1, row] if first + 1 < levels else zero,
        scales[first + 2, row] if first + 2 < levels else zero,
        scales[first + 3, row] if first + 3 < levels else zero,
    )


# ---------------------------------------------------------------- scales


# Sums alone may be reordered; what makes up the summands keeps its order and its NaN.
@loop(fastmath={"reassoc"})
def _sum(
    r: Array, bits: Array | None, row: int, level: int, a: float, b: float, c: float
) -> tuple[float, int]:
    total, count = 0.0, 0
    for j in range(r.size):
        hot = _hot(bits, row, j, level)
        total += np.float64(_folded(r[j], a, b, c)) if hot else 0.0
        count += int(hot)
    return total, count


# The first two levels, which all rows have, have less to subtract.
@loop(fastmath={"reassoc"})
def _early_sum(r: Array, bits: Array | None, row: int, level: int, a: float) -> tuple[float, int]:
    total, count = 0.0, 0
    for j in range(r.size):
        hot = _hot(bits, row, j, level)
        total += np.float64(abs(abs(r[j]) - a)) if hot else 0.0
        count += int(hot)
    return total, count


# Where all elements count, four are added in float32 first, which has twice the lanes of float64:
# numbers that are equal do not round.
@loop()
def _sums_of_four(fours: Array, a: float, b: float, c: float, sums: Array) -> None:
    for j in range(sums.size):
        first = _folded(fours[0, j], a, b, c) + _folded(fours[1, j], a, b, c)
        second = _folded(fours[2, j], a, b, c) + _folded(fours[3, j], a, b, c)
        sums[j] = first + second


@loop()
def _early_sums_of_four(fours: Array, a: float, sums: Array) -> None:
    for j in range(sums.size):
        first = abs(abs(fours[0, j]) - a) + abs(abs(fours[1, j]) - a)
        second = abs(abs(fours[2, j]) - a) + abs(abs(fours[3, j]) - a)
        sums[j] = first + second


@loop(fastmath={"reassoc"})
def float64_sum(values: Array) -> float:
    total = 0.0
    for j in range(values.size):
        total += np.float64(values[j])
    return total


@loop()
def _whole_sum(r: Array, level: int, a: float, b: float, c: float, spare: Array) -> float:
    columns = r.size // 4
    fours, rest, sums = r[: 4 * columns].reshape(4, columns), r[4 * columns :], spare[:columns]
    if level % GROUP < 2:
        _early_sums_of_four(fours, a, sums)
    else:
        _sums_of_four(fours, a, b, c, sums)
    total = float64_sum(sums) + _sum(rest, None, 0, level, a, b, c)[0]
    # Four may overflow that do not in float64.
    return total if total < np.inf else _sum(r, None, 0, level, a, b, c)[0]


@loop()
def _fold(r: Array, scales: Array, row: int, first: int) -> None:
    """Take the levels `first` to first + 3 off the magnitudes `r`."""
    a, b, c, d = _padded(scales, row, first)
    for j in range(r.size):
        r[j] = abs(_folded(r[j], a, b, c) - d)


@loop()
def _level_scales(x: Array, bits: Array | None, scales: Array) -> None:
    """Find the scales, (levels, rows): the mean |residual| at each level, 0 without a code."""
    levels, rows = scales.shape
    zero = scales.dtype.type(0)
    rest = np.empty(x.shape[1] if levels > GROUP else 0, x.dtype)
    spare = np.empty(x.shape[1] // 4, x.dtype)
    quick = x.itemsize == 4 and x.shape[1] >= LONG
    for row in range(rows):
        r = x[row]
        if levels > GROUP:
            rest[:] = r
            r = rest
        a = b = c = zero
        for level in range(levels):
            if bits is None and quick:
                total, count = _whole_sum(r, level, a, b, c, spare), r.size
            elif level < 2:
                total, count = _early_sum(r, bits, row, level, a)
            else:
                total, count = _sum(r, bits, row, level, a, b, c)
            scale = scales.dtype.type(total / count) if count else zero
            scales[level, row] = scale
            at = level % GROUP
            if at == 0:
                a = scale
            elif at == 1:
                b = scale
            elif at == 2:
                c = scale
            elif level + 1 < levels:
                _fold(r, scales, row, level - 3)
                a = b = c = zero


@loop()
def _level_sum(x: Array, bits: Array | None, scales: Array) -> tuple[float, int]:
    """The sum of |residual| after `scales`, (levels, 1), over a piece of a row; and its count."""
    levels = len(scales)
    r = x[0]
    done = levels // GROUP * GROUP
    if done:
        r = r.copy()
        for level in range(0, done, GROUP):
            _fold(r, scales, 0, level)
    a, b, c, _ = _padded(scales, 0, done)
    return _sum(r, bits, 0, levels, a, b, c)


# ---------------------------------------------------------------- what they give


@loop()
def _first_levels(
    r: Array, bits: Array | None, row: int, scales: Array, stored: Array, y: Array
) -> None:
    """Write the sum of the first four levels."""
    a, b, c, _ = _padded(scales, row, 0)
    e, f, g, h = _padded(stored, row, 0)
    for j in range(r.size):
        q = r[j]
        v = _step(q, e) if _hot(bits, row, j, 0) else y.dtype.type(0)
        q -= _step(q, a)
        v += _step(q, f) if _hot(bits, row, j, 1) else y.dtype.type(0)
        q -= _step(q, b)
        v += _step(q, g) if _hot(bits, row, j, 2) else y.dtype.type(0)
        q -= _step(q, c)
        v += _step(q, h) if _hot(bits, row, j, 3) else y.dtype.type(0)
        y[j] = v


@loop()
def _first_two_levels(
    r: Array, bits: Array | None, row: int, scale: float, a: float, b: float, y: Array
) -> None:
    for j in range(r.size):
        q = r[j]
        v = _step(q, a) if _hot(bits, row, j, 0) else y.dtype.type(0)
        q -= _step(q, scale)
        y[j] = v + (_step(q, b) if _hot(bits, row, j, 1) else y.dtype.type(0))


@loop()
def _peel(r: Array, scale: float) -> None:
    for j in range(r.size):
        r[j] -= _step(r[j], scale)


@loop()
def _add(r: Array, bits: Array | None, row: int, level: int, stored: float, y: Array) -> None:
    for j in range(r.size):
        y[j] += _step(r[j], stored) if _hot(bits, row, j, level) else y.dtype.type(0)


@loop()
def _approximation(x: Array, bits: Array | None, scales: Array, stored: Array, y: Array) -> None:
    levels, rows = scales.shape
    rest = np.empty(x.shape[1] if levels > GROUP else 0, x.dtype)
    for row in range(rows):
        if levels <= 2:
            a, b, _, _ = _padded(stored, row, 0)
            scale = _padded(scales, row, 0)[0]
            _first_two_levels(x[row], bits, row, scale, a, b, y[row])
            continue
        _first_levels(x[row], bits, row, scales, stored, y[row])
        if levels > GROUP:
            rest[:] = x[row]
            for level in range(levels):
                if level >= GROUP:
                    _add(rest, bits, row, level, stored[level, row], y[row])
                _peel(rest, scales[level, row])


@loop()
def _set(r: Array, bits: Array | None, row: int, level: int, code: Array) -> None:
    bit = code.dtype.type(1 << level)
    for j in range(r.size):
        up = (r[j] > 0) & _hot(bits, row, j, level)
        code[j] |= bit if up else code.dtype.type(0)


@loop()
def _codes(x: Array, bits: Array | None, scales: Array, code: Array) -> None:
    levels, rows = scales.shape
    rest = np.empty(x.shape[1], x.dtype)
    for row in range(rows):
        rest[:] = x[row]
        code[row] = 0
        for level in range(levels):
            _set(rest, bits, row, level, code[row])
            _peel(rest, scales[level, row])


@loop()
def _decode(code: Array, bits: Array | None, stored: Array, y: Array) -> None:
    levels, rows = stored.shape
    for row in range(rows):
        _first_codes(code[row], bits, row, stored, y[row])
        for level in range(GROUP, levels):
            _add_code(code[row], bits, row, level, stored[level, row], y[row])


@loop()
def _level_signs(code: Array, bits: Array | None, level: int, sign: Array) -> None:
    for row in range(len(code)):
        own, target = code[row], sign[row]
        for j in range(own.size):
            value = np.int8(2 * (own[j] >> level & 1) - 1)
            target[j] = value if _hot(bits, row, j, level) else np.int8(0)


@loop()
def _first_codes(code: Array, bits: Array | None, row: int, stored: Array, y: Array) -> None:
    """Write the sum of the first four levels."""
    a, b, c, d = _padded(stored, row, 0)
    zero = y.dtype.type(0)
    for j in range(code.size):
        own = code[j]
        v = (a if own & 1 else -a) if _hot(bits, row, j, 0) else zero
        v += (b if own & 2 else -b) if _hot(bits, row, j, 1) else zero
        v += (c if own & 4 else -c) if _hot(bits, row, j, 2) else zero
        y[j] = v + ((d if own & 8 else -d) if _hot(bits, row, j, 3) else zero)


@loop()
def _add_code(
    code: Array, bits: Array | None, row: int, level: int, stored: float, y: Array
) -> None:
    for j in range(code.size):
        step = stored if code[j] >> level & 1 else -stored
        y[j] += step if _hot(bits, row, j, level) else y.dtype.type(0)


# ---------------------------------------------------------------- as the primitives are called


def level_scales(x: Array, bits: Array, levels: int) -> list[Array]:
    """The scales of whole rows, (rows, 1) for each level: the mean |residual|, 0 without a code."""
    scales = np.empty((levels, len(x)), arrays.work_dtype(x.dtype))
    _level_scales(_work(x), _map(bits), scales)
    return list(scales[:, :, None])


def level_sums(x: Array, bits: Array, *scales: Array, total: Array, count: Array) -> None:
    """`greedy.level_sums` over a piece of one row."""
    total[...], count[...] = _level_sum(_work(x), _map(bits), _stack(scales, x))


def approximation(x: Array, bits: Array, *scales: Array, y: Array) -> None:
    """`greedy.approximation`."""
    found = _stack(scales, x)
    stored = found.astype(x.dtype, copy=False).astype(found.dtype, copy=False)
    direct = y.dtype == found.dtype and y.flags.c_contiguous and not np.may_share_memory(x, y)
    target = y if direct else np.empty(x.shape, found.dtype)
    _approximation(_work(x), _map(bits), found, stored, target)
    if not direct:
        y[...] = target


def codes(x: Array, bits: Array, *scales: Array, code: Array) -> None:
    """`greedy.codes`."""
    _codes(_work(x), _map(bits), _stack(scales, x), code)


def decode(code: Array, bits: Array, *scales: Array, y: Array) -> None:
    """`code.decode`."""
    work = arrays.work_dtype(y.dtype)
    stored = np.stack([scale[:, 0] for scale in scales]).astype(y.dtype, copy=False)
    direct = y.dtype == work and y.flags.c_contiguous
    target = y if direct else np.empty(y.shape, work)
    _decode(np.ascontiguousarray(code), _map(bits), stored.astype(work, copy=False), target)
    if not direct:
        y[...] = target


def level_signs(code: Array, bits: Array, level: Array, *, sign: Array) -> None:
    """`code.level_signs`, at a level that `bits` has if it is a scalar."""
    target = sign if sign.flags.c_contiguous else np.empty(sign.shape, np.int8)
    _level_signs(np.ascontiguousarray(code), _map(bits), np.uint16(level), target)
    if target is not sign:
        sign[...] = target


def _work(x: Array) -> Array:
    return np.ascontiguousarray(x, arrays.work_dtype(x.dtype))


def _map(bits: Array) -> Array | None:
    return np.ascontiguousarray(bits) if np.ndim(bits) else None


def _stack(scales: tuple[Array, ...], x: Array) -> Array:
    stacked = np.empty((len(scales), len(x)), arrays.work_dtype(x.dtype))
    for level, scale in enumerate(scales):
        stacked[level] = scale[:, 0]
    return stacked
