"""What the instructions compute: NumPy expressions on one array item per thread.

Every function takes and returns arrays of the instruction's own type. Single precision follows
PTX: one rounding per instruction (``fma`` included), subnormals flushed under ``.ftz``, results
that are NaN are the one canonical NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tests.ptx.program import UnsupportedInstruction

Array = NDArray[np.generic]
Operation = Callable[..., Array]

TYPES: dict[str, type[np.generic]] = {
    **{f"u{bits}": getattr(np, f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"b{bits}": getattr(np, f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"s{bits}": getattr(np, f"int{bits}") for bits in (8, 16, 32, 64)},
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "f32": np.float32,
    "f64": np.float64,
    "pred": np.bool_,
}

_NAN_32 = np.array([0x7FFFFFFF], np.uint32).view(np.float32)
_NAN_16 = np.array([0x7FFF], np.uint16)


def flush(x: Array) -> Array:
    """Subnormal float32 values become zeros of the same sign."""
    bits = x.view(np.uint32)
    small = (bits & np.uint32(0x7F800000)) == 0
    if not small.any():
        return x
    return np.where(small, bits & np.uint32(0x80000000), bits).view(np.float32)


def canonical(x: Array) -> Array:
    """The NaN that the hardware writes."""
    if x.dtype == np.float64:
        return x
    nan = np.isnan(x)
    value = _NAN_32 if x.dtype == np.float32 else _NAN_16.view(x.dtype)
    return np.where(nan, value, x) if nan.any() else x


def _to_odd(high: NDArray[np.float64], low: NDArray[np.float64]) -> NDArray[np.float64]:
    """`high` + `low`, rounded to odd: rounding it again to fewer bits rounds the exact sum."""
    bits = high.view(np.int64)
    step = np.where((low > 0) == (high > 0), 1, -1)
    move = (low != 0) & (bits & 1 == 0) & np.isfinite(high)
    return np.where(move, bits + step, bits).view(np.float64)


def _two_sum(
    a: NDArray[np.float64], b: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    total = a + b
    part = total - a
    rest = (a - (total - part)) + (b - part)
    return total, np.where(np.isfinite(total), rest, 0.0)


def _two_product(
    a: NDArray[np.float64], b: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Product and its rounding error, by splitting each factor in two halves (Dekker 1971)."""
    product = a * b

    def halves(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        scaled = x * 134217729.0
        high = scaled - (scaled - x)
        return high, x - high

    (a1, a2), (b1, b2) = halves(a), halves(b)
    rest = ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2
    return product, np.where(np.isfinite(rest), rest, 0.0)


def fma(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c`` with one rounding.

    For float64 the sum of three parts is rounded to odd before the last addition (Boldo and
    Melquiond 2008), where no part can overflow or be subnormal.
    """
    if a.dtype == np.float64:
        x, y, z = np.broadcast_arrays(a, b, c)
        product, error = _two_product(x, y)
        high, low = _two_sum(z, error)
        total, rest = _two_sum(product, high)
        plain = (x == 0) | (y == 0) | ~np.isfinite((x, y, z)).all(axis=0)
        result = np.where(plain, product + z, total + _to_odd(*_two_sum(rest, low)))
        sizes = np.abs((x, y, z, product))
        usual = plain | ((sizes < 2.0**900).all(axis=0) & (sizes[3] > 2.0**-900))
        if not usual.all():
            rare = np.flatnonzero(~usual)
            result[rare] = _exactly("fma", "rn", x[rare], y[rare], z[rare])
        return result
    product = a.astype(np.float64) * b.astype(np.float64)
    return _to_odd(*_two_sum(product, c.astype(np.float64))).astype(a.dtype)


_EXACT: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "fma": lambda a, b, c: a * b + c,
}


def _exactly(name: str, mode: str, *arguments: Array) -> NDArray[np.float64]:
    """Double precision by way of fractions, one thread after the other, in any rounding mode."""
    rows = zip(*np.broadcast_arrays(*arguments), strict=True)
    return np.array([_rounded(name, mode, row) for row in rows], np.float64)


def _rounded(name: str, mode: str, row: tuple[np.float64, ...]) -> np.float64:
    function = _EXACT[name]
    if not np.isfinite(row).all() or (name == "div" and row[1] == 0):
        return function(*row)
    exact = function(*(Fraction(float(value)) for value in row))
    if not exact:
        return _downward_zero(name, function, row) if mode == "rm" else function(*row)
    try:
        value = exact.numerator / exact.denominator
    except OverflowError:
        value = np.inf if exact > 0 else -np.inf
    limit, wrong = {
        "rn": (value, False),
        "rz": (0, abs(value) > abs(exact)),
        "rm": (-np.inf, value > exact),
        "rp": (np.inf, value < exact),
    }[mode]
    return np.nextafter(value, limit) if wrong else np.float64(value)


def _downward_zero(name: str, function: Operation, arguments: Sequence[Array]) -> Array:
    """A result that is exactly 0, rounded down: sums that cancel are -0."""
    if name not in ("add", "sub", "fma"):
        return function(*arguments)
    first, *middle, last = arguments
    return -function(-first, *middle, -last)


def _minimum(a: Array, b: Array) -> Array:
    result = np.fmin(a, b)
    return _order_zeros(a, b, result, np.bitwise_or)


def _maximum(a: Array, b: Array) -> Array:
    result = np.fmax(a, b)
    return _order_zeros(a, b, result, np.bitwise_and)


def _order_zeros(a: Array, b: Array, result: Array, join: np.ufunc) -> Array:
    zeros = (result == 0) & (a == b)
    if not zeros.any():
        return result
    kind = np.dtype(f"u{a.dtype.itemsize}")
    both = join(a.view(kind), b.view(kind)).view(a.dtype)
    return np.where(zeros, both, result)


def _shift_left(a: Array, count: Array) -> Array:
    width = a.dtype.itemsize * 8
    shifted = a << (count & (width - 1)).astype(a.dtype)
    return np.where(count < width, shifted, a.dtype.type(0))


def _shift_right(a: Array, count: Array) -> Array:
    width = a.dtype.itemsize * 8
    fill = (a >> a.dtype.type(width - 1)) if a.dtype.kind == "i" else a.dtype.type(0)
    return np.where(count < width, a >> (count & (width - 1)).astype(a.dtype), fill)


def _divide(a: Array, b: Array) -> Array:
    """Integers truncate towards zero; division by zero gives all ones."""
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        result = a // safe
    else:
        result = _magnitude(a) // _magnitude(safe)
        result = np.where((a < 0) != (safe < 0), 0 - result, result).astype(a.dtype)
    return np.where(zero, np.array(-1).astype(a.dtype), result)


def _magnitude(a: Array) -> Array:
    return np.where(a < 0, 0 - a, a).view(np.dtype(f"u{a.dtype.itemsize}"))


def _remainder(a: Array, b: Array) -> Array:
    return np.where(b == 0, a, a - _divide(a, b) * b)


def wide(a: Array, b: Array) -> Array:
    """The double-width product of two integers of at most 32 bits."""
    double = np.dtype(f"{a.dtype.kind}{a.dtype.itemsize * 2}")
    return a.astype(double) * b.astype(double)


def _high_product(a: Array, b: Array) -> Array:
    if a.dtype.itemsize < 8:
        return (wide(a, b) >> (8 * a.dtype.itemsize)).astype(a.dtype)
    x, y = a.astype(np.uint64), b.astype(np.uint64)
    half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    x1, x0, y1, y0 = x >> half, x & mask, y >> half, y & mask
    middle = x1 * y0 + (x0 * y0 >> half)
    carry = (middle & mask) + x0 * y1
    high = x1 * y1 + (middle >> half) + (carry >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.astype(a.dtype)


def bit_length(a: Array) -> NDArray[np.uint32]:
    """Bits needed for an unsigned integer."""
    if a.dtype.itemsize < 8:
        return np.frexp(a.astype(np.float64))[1].astype(np.uint32)
    high = (a >> np.uint64(32)).astype(np.float64)
    low = (a & np.uint64(0xFFFFFFFF)).astype(np.float64)
    return np.where(high > 0, np.frexp(high)[1] + 32, np.frexp(low)[1]).astype(np.uint32)


def leading_zeros(a: Array) -> Array:
    """``clz``."""
    return (a.dtype.itemsize * 8 - bit_length(a)).astype(np.uint32)


def highest_bit(a: Array, shift_amount: bool) -> Array:
    """``bfind``: the place of the most significant bit that is not a sign bit."""
    kind = np.dtype(f"u{a.dtype.itemsize}")
    value = np.where(a < 0, ~a, a).view(kind) if a.dtype.kind == "i" else a.view(kind)
    place = bit_length(value).astype(np.int64) - 1
    if shift_amount:
        place = np.where(place >= 0, a.dtype.itemsize * 8 - 1 - place, place)
    return place.astype(np.uint32)


def reverse_bits(a: Array) -> Array:
    """``brev``."""
    octets = a.view(np.uint8).reshape(len(a), -1)
    return np.packbits(np.unpackbits(octets, axis=1)[:, ::-1], axis=1).view(a.dtype).ravel()


def extract_field(a: Array, position: Array, length: Array) -> Array:
    """``bfe``."""
    width = a.dtype.itemsize * 8
    start = (position & 0xFF).astype(np.int64)
    count = (length & 0xFF).astype(np.int64)
    value = a.astype(np.int64 if a.dtype.kind == "i" else np.uint64).view(np.uint64)
    if a.dtype.kind == "u":
        moved = _shift_right(value, start)
        result = np.where(count < 64, moved & (_shift_left(np.ones_like(value), count) - 1), moved)
        return np.where(count == 0, 0, result).astype(a.dtype)
    sign = np.minimum(start + count - 1, width - 1)
    moved = _shift_right(value.view(np.int64), np.minimum(start, width - 1))
    keep = np.maximum(sign - np.minimum(start, width - 1) + 1, 0)
    shift = np.maximum(64 - keep, 0)
    result = _shift_right(_shift_left(moved.view(np.uint64), shift).view(np.int64), shift)
    return np.where(count == 0, 0, result).astype(a.dtype)


def insert_field(a: Array, b: Array, position: Array, length: Array) -> Array:
    """``bfi``: `a` into `b`."""
    start = (position & 0xFF).astype(np.int64)
    count = (length & 0xFF).astype(np.int64)
    mask = np.where(count < 64, _shift_left(np.ones(1, np.uint64), count) - 1, np.uint64(2**64 - 1))
    mask = _shift_left(mask, start)
    return (b & ~mask | _shift_left(a.astype(np.uint64), start) & mask).astype(b.dtype)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """``prmt`` in its default mode."""
    pool = np.broadcast_arrays(a, b, selector)
    octets = np.concatenate(
        [np.ascontiguousarray(p).view(np.uint8).reshape(-1, 4) for p in pool[:2]], axis=1
    )
    pick = (pool[2][:, None] >> (4 * np.arange(4, dtype=np.uint32))).astype(np.int64)
    chosen = np.take_along_axis(octets, pick & 7, axis=1)
    signs = np.where(chosen & 0x80, 0xFF, 0)
    result = np.where(pick & 8, signs, chosen).astype(np.uint8)
    return np.ascontiguousarray(result).view(np.uint32).ravel()


def funnel_shift(low: Array, high: Array, count: Array, left: bool, clamp: bool) -> Array:
    """``shf``."""
    amount = np.minimum(count, 32) if clamp else count & 31
    both = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
    if left:
        return (_shift_left(both, amount) >> np.uint64(32)).astype(np.uint32)
    return _shift_right(both, amount).astype(np.uint32)


def logic3(a: Array, b: Array, c: Array, table: int) -> Array:
    """``lop3``: the function of three bits whose truth table is `table`."""
    result = np.zeros(1, a.dtype)
    for row in range(8):
        if table >> row & 1:
            terms = (v if row >> bit & 1 else ~v for v, bit in ((a, 2), (b, 1), (c, 0)))
            x, y, z = terms
            result = result | (x & y & z)
    return result


COMPARE: dict[str, Callable[[Array, Array], NDArray[np.bool_]]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a != b) & (a == a) & (b == b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lo": lambda a, b: a < b,
    "ls": lambda a, b: a <= b,
    "hi": lambda a, b: a > b,
    "hs": lambda a, b: a >= b,
    "equ": lambda a, b: (a == b) | (a != a) | (b != b),
    "neu": lambda a, b: a != b,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}
"""``setp``'s comparisons. The ordered ones are false where an operand is NaN."""

LOGIC: dict[str, np.ufunc] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
}


def _approximate(function: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Operation:
    """An approximate unit: here the float64 function, rounded once."""
    return lambda a: function(a.astype(np.float64)).astype(a.dtype)


def _parts(a: Array, many: int) -> NDArray[np.int64]:
    """`many` equal parts of each integer, lowest first."""
    kind = np.dtype(f"{a.dtype.kind}{a.dtype.itemsize // many}")
    return np.ascontiguousarray(a).view(kind).reshape(-1, many).astype(np.int64)


def dot_bytes(a: Array, b: Array, c: Array) -> Array:
    """``dp4a``: the four products of the bytes of `a` and `b`, added to `c`."""
    return ((_parts(a, 4) * _parts(b, 4)).sum(axis=1) + c).astype(c.dtype)


def dot_halves(a: Array, b: Array, c: Array, high: bool) -> Array:
    """``dp2a``: the products of the halves of `a` and two bytes of `b`, added to `c`."""
    pair = _parts(b, 4)[:, 2:] if high else _parts(b, 4)[:, :2]
    return ((_parts(a, 2) * pair).sum(axis=1) + c).astype(c.dtype)


def _bit_mask(position: Array, length: Array, clamp: bool) -> Array:
    """``bmsk``: `length` ones from `position` on."""
    start, count = (np.minimum(v, 32) if clamp else v & 31 for v in (position, length))
    return _shift_left(_shift_left(np.ones(1, np.uint64), count) - 1, start).astype(np.uint32)


def _saturated(function: Operation) -> Operation:
    def compute(a: Array, b: Array) -> Array:
        limits = np.iinfo(a.dtype)
        exact = function(a.astype(np.int64), b.astype(np.int64))
        return np.clip(exact, limits.min, limits.max).astype(a.dtype)

    return compute


_BINARY: dict[str, Operation] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
}
_INTEGER: dict[str, Operation] = {
    **_BINARY,
    "min": lambda a, b: np.minimum(a, b),
    "max": lambda a, b: np.maximum(a, b),
    "div": _divide,
    "rem": _remainder,
    "shl": _shift_left,
    "shr": _shift_right,
    "abs": lambda a: np.where(a < 0, 0 - a, a),
    "neg": lambda a: 0 - a,
    "not": lambda a: ~a,
    "cnot": lambda a: (a == 0).astype(a.dtype),
    "popc": lambda a: np.bitwise_count(a).astype(np.uint32),
    "clz": leading_zeros,
    "brev": reverse_bits,
    "bfe": extract_field,
    "bfi": insert_field,
    "sad": lambda a, b, c: c + np.where(a < b, b - a, a - b),
}
_FLOAT: dict[str, Operation] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "fma": fma,
    "mad": fma,
    "min": _minimum,
    "max": _maximum,
    "sqrt": lambda a: np.sqrt(a),
    "rcp": lambda a: 1 / a,
    "rsqrt": _approximate(lambda a: 1 / np.sqrt(a)),
    "ex2": _approximate(np.exp2),
    "lg2": _approximate(np.log2),
    "sin": _approximate(np.sin),
    "cos": _approximate(np.cos),
    "tanh": _approximate(np.tanh),
}
_SIGN: dict[str, Operation] = {
    "abs": lambda a: np.abs(a),
    "neg": lambda a: -a,
}
_MODIFIERS = {"rn", "ftz", "approx", "full", "sat", "NaN", "lo", "hi", "wide", "relu"}


def operation(opcode: tuple[str, ...], kind: str) -> Operation | None:
    """The function of a plain instruction, ``None`` where there is none of that name."""
    name, flags = opcode[0], set(opcode[1:])
    if kind in ("f16x2", "f16", "f32", "f64"):
        return _float_operation(name, flags - {kind}, kind)
    if kind == "pred":
        if name == "not":
            return lambda a: ~a
        return _BINARY.get(name)
    if name == "mul" and "wide" in flags:
        return wide
    if name == "mul":
        return _high_product if "hi" in flags else lambda a, b: a * b
    if name == "mad" and "wide" in flags:
        return lambda a, b, c: wide(a, b) + c
    if name == "mad":
        if "hi" in flags:
            return lambda a, b, c: _high_product(a, b) + c
        return lambda a, b, c: a * b + c
    if name == "bfind":
        return lambda a: highest_bit(a, "shiftamt" in flags)
    if name == "bmsk":
        return lambda a, b: _bit_mask(a, b, "clamp" in flags)
    if "sat" in flags and kind == "s32" and name in ("add", "sub"):
        return _saturated(_BINARY[name])
    if flags & {"sat", "cc"}:
        return None
    return _INTEGER.get(name)


def _float_operation(name: str, flags: set[str], kind: str) -> Operation | None:
    directed = flags & {"rz", "rm", "rp"}
    if directed and kind == "f32" and name in _DIRECTED:
        return _directed_operation(name, flags, directed)
    if directed and kind == "f64" and name in _EXACT:
        (mode,) = directed
        return lambda *arguments: _exactly(name, mode, *arguments)
    if flags - _MODIFIERS or (kind == "f64" and "approx" in flags and name != "rcp"):
        return None
    if name in _SIGN:
        plain = _SIGN[name]
        return (lambda a: plain(flush(a))) if "ftz" in flags and kind == "f32" else plain
    function = _FLOAT.get(name)
    if function is None:
        return None
    ftz = "ftz" in flags and kind == "f32"

    def compute(*arguments: Array) -> Array:
        values = [flush(a) for a in arguments] if ftz else arguments
        result = function(*values)
        if "NaN" in flags:
            nan = np.isnan(values[0]) | np.isnan(values[1])
            result = np.where(nan, np.nan, result).astype(result.dtype)
        if "sat" in flags:
            result = np.where(result > 0, np.minimum(result, 1), 0).astype(result.dtype)
        if "relu" in flags:
            result = np.where(result < 0, 0, result).astype(result.dtype)
        result = canonical(result)
        return flush(result) if ftz else result

    return compute


_DIRECTED: dict[str, Callable[..., NDArray[np.float64]]] = {
    "add": lambda a, b: _to_odd(*_two_sum(a, b)),
    "sub": lambda a, b: _to_odd(*_two_sum(a, -b)),
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: _to_odd(*_two_sum(a * b, c)),
    "div": lambda a, b: a / b,
    "rcp": lambda a: 1 / a,
    "sqrt": lambda a: np.sqrt(a),
}
"""Single precision in float64: exact, rounded to odd, or never near a boundary (quotients, roots),
so that any rounding can follow."""


def _directed_operation(name: str, flags: set[str], directed: set[str]) -> Operation:
    ftz, function = "ftz" in flags, _DIRECTED[name]

    def compute(*arguments: Array) -> Array:
        values = [flush(a) for a in arguments] if ftz else arguments
        wide = [v.astype(np.float64) for v in values]
        exact = function(*wide)
        if "rm" in directed:
            exact = np.where(exact == 0, _downward_zero(name, function, wide), exact)
        result = canonical(_towards(exact.astype(np.float32), exact, directed))
        return flush(result) if ftz else result

    return compute


def _towards(value: Array, exact: Array, flags: set[str]) -> Array:
    """`value` is `exact` rounded to nearest: move it where the mode asks for a neighbour."""
    wanted = {"rz": 0.0, "rm": -np.inf, "rp": np.inf}
    for mode, limit in wanted.items():
        if mode in flags:
            error = value.astype(exact.dtype)
            if mode == "rz":
                wrong = np.abs(error) > np.abs(exact)
            else:
                wrong = error < exact if mode == "rp" else error > exact
            return np.where(wrong, np.nextafter(value, value.dtype.type(limit)), value)
    return value


_INTEGRAL: dict[str, Callable[[Array], Array]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}


def convert(a: Array, target: str, source: str, flags: set[str]) -> Array:
    """``cvt``: a value of type `source` as one of type `target`."""
    to, floating = np.dtype(TYPES[target]), {"f16", "bf16", "f32", "f64"}
    if flags - {"ftz", "sat", "rn", "rz", "rm", "rp", *_INTEGRAL}:
        raise UnsupportedInstruction(f"cvt.{'.'.join(sorted(flags))}.{target}.{source}")
    if source == "f32" and "ftz" in flags:
        a = flush(a)
    integral = next((mode for mode in _INTEGRAL if mode in flags), None)
    if source in floating and target in floating:
        if integral:
            a = _INTEGRAL[integral](a)
        result = a.astype(to)
        if to.itemsize < a.dtype.itemsize:
            result = _towards(result, a, flags)
        result = canonical(result)
        if "sat" in flags:
            result = np.where(result > 0, np.minimum(result, 1), 0).astype(to)
        return flush(result) if target == "f32" and "ftz" in flags else result
    if source in floating:
        value = _INTEGRAL[integral or "rzi"](a.astype(np.float64))
        limits = np.iinfo(to)
        inside = np.clip(value, float(limits.min), float(limits.max))
        top = value >= float(limits.max)
        result = np.where(top, limits.max, np.where(top, 0, inside).astype(to)).astype(to)
        if source == "f64" or to.itemsize == 8:
            nan = np.array(1 << (8 * to.itemsize - 1), f"u{to.itemsize}").astype(to)
        else:
            nan = np.zeros((), to)
        return np.where(np.isnan(value), nan, result)
    if target in floating:
        if flags & {"rz", "rm", "rp"}:
            exact = a.astype(np.longdouble)
            return _towards(a.astype(to), exact, flags)
        return a.astype(to)
    if "sat" in flags:
        limits, own = np.iinfo(to), np.iinfo(a.dtype)
        low, high = max(limits.min, own.min), min(limits.max, own.max)
        return np.clip(a, low, high).astype(to)
    return a.astype(to)
