"""The interpreter's instructions against Python's integers, fractions and NumPy's floats."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("cupy")

from tests.ptx import arithmetic
from tests.ptx.device import ARCHITECTURES, architecture, module

pytestmark = [pytest.mark.kernels, pytest.mark.exhaustive]

INT32 = np.array([0, 1, -1, 2, 7, -8, 31, 255, 65536, 2**31 - 1, -(2**31), 123456789], np.int32)
INT64 = np.array([0, 1, -1, 5, -7, 2**31, -(2**31), 2**63 - 1, -(2**63), 10**18], np.int64)
TINY = np.finfo(np.float32).smallest_subnormal
FLOAT = np.array(
    [
        *(0.0, -0.0, 1.0, -1.5, 2.5, 3.5, -0.5, 1e-30, 3e38, -3e38, np.inf, -np.inf, np.nan),
        *(TINY, -TINY, 2147483520.0, -2147483648.0, 4e9, 1e19, -1e19, 0.1, 16777217.0),
    ],
    np.float32,
)


@pytest.fixture(params=ARCHITECTURES, autouse=True)
def arch(request):
    """Everything here runs as compiled for each architecture."""
    with architecture(request.param):
        yield


def evaluate(expression, dtype, *inputs, preamble=""):
    """`expression` of a, b, c over arrays of inputs, as one raw kernel computes it."""
    types = {"float32": "float", "float64": "double", "int32": "int", "int64": "long long"}
    types |= {"uint32": "unsigned", "uint64": "unsigned long long", "int8": "signed char"}
    types |= {"uint8": "unsigned char", "bool": "bool", "uint16": "unsigned short"}
    names = "abc"[: len(inputs)]
    arrays = [np.ascontiguousarray(a) for a in np.broadcast_arrays(*inputs)]
    parameters = "".join(
        f"const {types[a.dtype.name]}* _{n}, " for a, n in zip(arrays, names, strict=True)
    )
    loads = "".join(
        f"{types[a.dtype.name]} {n} = _{n}[i]; " for a, n in zip(arrays, names, strict=True)
    )
    source = f"""#include <cuda_fp16.h>
    {preamble}
    extern "C" __global__ void evaluate({parameters}{types[np.dtype(dtype).name]}* y, int n) {{
      int i = blockIdx.x * blockDim.x + threadIdx.x;
      if (i >= n) return;
      {loads}
      y[i] = {expression};
    }}"""
    y = module.empty(arrays[0].shape, dtype)
    kernel = module.RawKernel(source, "evaluate")
    device = [module.asarray(a) for a in arrays]
    kernel((-(-arrays[0].size // 64),), (64,), (*device, y, np.int32(arrays[0].size)))
    return y.get()


def pairs(values):
    a, b = np.meshgrid(values, values)
    return a.ravel(), b.ravel()


def wrap(value, bits, signed=True):
    value &= (1 << bits) - 1
    return value - (1 << bits) if signed and value >> (bits - 1) else value


@pytest.mark.parametrize(("dtype", "bits"), [(np.int32, 32), (np.int64, 64)])
def test_integer_arithmetic(dtype, bits):
    a, b = pairs(INT32 if bits == 32 else INT64)
    u = np.dtype(f"u{bits // 8}")
    ops = {
        "a + b": lambda x, y: x + y,
        "a - b": lambda x, y: x - y,
        "a * b": lambda x, y: x * y,
        "b == 0 ? 0 : a / (b == -1 ? 1 : b)": lambda x, y: (
            0
            if y == 0
            else int(math.copysign(1, x) * math.copysign(1, y)) * (abs(x) // abs(y))
            if y != -1
            else x
        ),
        "b == 0 ? 0 : a % (b == -1 ? 1 : b)": lambda x, y: (
            0 if y in (0, -1) else int(math.fmod(x, y)) if bits == 32 else x - y * trunc(x, y)
        ),
        "a & b": lambda x, y: x & y,
        "(a ^ b) | ~a": lambda x, y: (x ^ y) | ~x,
        "min(a, b)": min,
        "max(a, b)": max,
        "a < b ? a : -b": lambda x, y: x if x < y else -y,
    }
    for expression, exact in ops.items():
        expected = [wrap(exact(int(x), int(y)), bits) for x, y in zip(a, b, strict=True)]
        np.testing.assert_array_equal(evaluate(expression, dtype, a, b), expected, expression)
    unsigned = evaluate("b ? a / b : 1", u, a.view(u), b.view(u))
    np.testing.assert_array_equal(
        unsigned, np.where(b == 0, 1, a.view(u) // np.where(b == 0, 1, b).view(u))
    )
    unsigned = evaluate("b ? a % b : 1", u, a.view(u), b.view(u))
    np.testing.assert_array_equal(
        unsigned, np.where(b == 0, 1, a.view(u) % np.where(b == 0, 1, b).view(u))
    )


def trunc(x, y):
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


def test_shifts_beyond_the_width():
    a, count = (v.ravel() for v in np.meshgrid(INT32, np.array([0, 1, 31, 32, 40], np.int32)))
    # The C++ operators leave these counts undefined; the PTX instructions clamp them.
    shl = 'int r; asm("shl.b32 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));'
    shr = 'int r; asm("shr.s32 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));'
    preamble = (
        f"__device__ int left(int a, int b) {{ {shl} return r; }}"
        f"__device__ int right(int a, int b) {{ {shr} return r; }}"
    )
    expected = [wrap(int(x) << int(n), 32) if n < 32 else 0 for x, n in zip(a, count, strict=True)]
    np.testing.assert_array_equal(
        evaluate("left(a, b)", np.int32, a, count, preamble=preamble), expected
    )
    expected = [int(x) >> min(int(n), 31) for x, n in zip(a, count, strict=True)]
    np.testing.assert_array_equal(
        evaluate("right(a, b)", np.int32, a, count, preamble=preamble), expected
    )


def test_bits_and_bytes():
    a, b = pairs(INT32)
    x, y = a.view(np.uint32), b.view(np.uint32)

    def check(expression, exact, inputs=(a, b), dtype=np.int32):
        expected = [exact(*(int(v) for v in row)) for row in zip(*inputs, strict=True)]
        got = evaluate(expression, dtype, *inputs)
        size = np.dtype(dtype).itemsize
        expected = np.array([v & (1 << 8 * size) - 1 for v in expected], f"u{size}")
        np.testing.assert_array_equal(got, expected.view(dtype), expression)

    check("__popc(a)", lambda p, _: (p & 0xFFFFFFFF).bit_count())
    check("__clz(a)", lambda p, _: 32 - (p & 0xFFFFFFFF).bit_length())
    check("__ffs(a)", lambda p, _: (p & -p).bit_length() if p else 0)
    check("__brev(a)", lambda p, _: int(f"{p:032b}"[::-1], 2), (x, y), np.uint32)
    check("__mulhi(a, b)", lambda p, q: p * q >> 32)
    check("__umulhi(a, b)", lambda p, q: p * q >> 32, (x, y), np.uint32)
    check("__sad(a, b, 5u)", lambda p, q: wrap(abs(p - q) + 5, 32))
    check(
        "__byte_perm(a, b, 0x1706)",
        lambda p, q: byte_permute(p, q, 0x1706),
        (x, y),
        np.uint32,
    )
    check(
        "__funnelshift_l(a, b, 5)",
        lambda p, q: (q << 5 | p >> 27) & 0xFFFFFFFF,
        (x, y),
        np.uint32,
    )
    check(
        "__funnelshift_r(a, b, 40)",
        lambda p, q: ((q << 32 | p) >> 8) & 0xFFFFFFFF,
        (x, y),
        np.uint32,
    )
    check(
        "__dp4a(a, b, 5)",
        lambda p, q: sum(wrap(p >> 8 * k, 8) * wrap(q >> 8 * k, 8) for k in range(4)) + 5,
    )
    check(
        "__vminu4(a, b)",
        lambda p, q: sum(min(p >> 8 * k & 255, q >> 8 * k & 255) << 8 * k for k in range(4)),
        (x, y),
        np.uint32,
    )
    check(
        "__vmaxs2(a, b)",
        lambda p, q: sum(
            (max(wrap(p >> 16 * k, 16), wrap(q >> 16 * k, 16)) & 0xFFFF) << 16 * k for k in (0, 1)
        ),
        (x, y),
        np.uint32,
    )
    check("(a >> 3) & 31", lambda p, _: p >> 3 & 31)
    check("(a << 20) >> 25", lambda p, _: wrap(p << 20, 32) >> 25)
    c, d = pairs(INT64)
    check("__mul64hi(a, b)", lambda p, q: p * q >> 64, (c, d), np.int64)
    check("__popcll(a)", lambda p, _: (p & (1 << 64) - 1).bit_count(), (c, d))
    check("__clzll(a)", lambda p, _: 64 - (p & (1 << 64) - 1).bit_length(), (c, d))
    check(
        "__brevll(a)",
        lambda p, _: int(f"{p:064b}"[::-1], 2),
        (c.view(np.uint64), d.view(np.uint64)),
        np.uint64,
    )
    u = (c.view(np.uint64), d.view(np.uint64))
    check("__umul64hi(a, b)", lambda p, q: p * q >> 64, u, np.uint64)


def byte_permute(p, q, selector):
    pool = p.to_bytes(4, "little") + q.to_bytes(4, "little")
    return int.from_bytes(bytes(pool[selector >> 4 * k & 7] for k in range(4)), "little")


@pytest.mark.parametrize("signed", [True, False])
def test_bit_fields(signed):
    kind, letter = (np.int32, "s") if signed else (np.uint32, "u")
    type_name = "int" if signed else "unsigned"
    preamble = f"""
    __device__ {type_name} take({type_name} a, int p, int n) {{
      {type_name} r; asm("bfe.{letter}32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(p), "r"(n));
      return r; }}
    __device__ unsigned put(unsigned a, unsigned b, int p) {{
      unsigned r; asm("bfi.b32 %0, %1, %2, %3, 7;" : "=r"(r) : "r"(a), "r"(b), "r"(p));
      return r; }}
    __device__ unsigned top({type_name} a) {{
      unsigned r; asm("bfind.{letter}32 %0, %1;" : "=r"(r) : "r"(a)); return r; }}"""
    a, position, length = (
        v.ravel() for v in np.meshgrid(INT32.view(kind), np.arange(0, 36, 5), np.arange(0, 36, 5))
    )
    position, length = position.astype(np.int32), length.astype(np.int32)

    def field(x, p, n):
        if n == 0:
            return 0
        sign = x >> min(p + n - 1, 31) & 1 if signed else 0
        bits = [(x >> k & 1 if k <= 31 else sign) for k in range(p, p + n)]
        value = sum(bit << k for k, bit in enumerate(bits[:32]))
        return wrap(value | (-1 << n if sign and n < 32 else 0), 32, signed)

    expected = [field(*(int(v) for v in row)) for row in zip(a, position, length, strict=True)]
    got = evaluate("take(a, b, c)", kind, a, position, length, preamble=preamble)
    np.testing.assert_array_equal(got, np.array(expected).astype(kind))
    got = evaluate("put(a, 0xF0F0F0F0u, b)", np.uint32, a.view(np.uint32), position, length,
                   preamble=preamble)  # fmt: skip
    mask = [(0x7F << int(p)) & 0xFFFFFFFF for p in position]
    expected = [
        (0xF0F0F0F0 & ~m) | ((int(x) << int(p)) & m)
        for x, p, m in zip(a.view(np.uint32), position, mask, strict=True)
    ]
    np.testing.assert_array_equal(got, np.array(expected, np.uint32))
    got = evaluate("top(a)", np.uint32, INT32.view(kind), preamble=preamble)
    expected = [
        ((~int(x) if x < 0 else int(x)).bit_length() - 1) & 0xFFFFFFFF for x in INT32.view(kind)
    ]
    np.testing.assert_array_equal(got, np.array(expected, np.uint32))


def bits(array):
    """Floats compared by their bits, all NaN alike."""
    kind = np.dtype(f"u{array.dtype.itemsize}")
    return np.where(np.isnan(array), kind.type(1), array.view(kind))


def flushed(array):
    """Subnormals as zeros: CuPy compiles everything with ``-ftz=true``."""
    small = np.abs(array) < np.finfo(np.float32).smallest_normal
    return np.where(small, np.copysign(np.float32(0), array), array)


def test_single_precision():
    a, b = pairs(FLOAT)
    p, q = flushed(a), flushed(b)
    with np.errstate(all="ignore"):
        for expression, expected in {
            "a + b": flushed(p + q),
            "a - b": flushed(p - q),
            "a * b": flushed(p * q),
            "a / b": flushed(p / q),
            "sqrtf(a)": np.sqrt(p),
            "fabsf(a) - -b": flushed(np.abs(p) + q),
            "floorf(a)": np.floor(p),
            "ceilf(a)": np.ceil(p),
            "truncf(a)": np.trunc(p),
            "rintf(a)": np.rint(p),
            "copysignf(a, b)": np.copysign(a, b),
        }.items():
            got = evaluate(expression, np.float32, a, b)
            np.testing.assert_array_equal(bits(got), bits(expected), expression)


def test_double_precision():
    a, b = pairs(np.concatenate((FLOAT.astype(np.float64), [5e-324, -1e-310, 1e308])))
    with np.errstate(all="ignore"):
        for expression, expected in {
            "a + b": a + b,
            "a - b": a - b,
            "a * b": a * b,
            "a / b": a / b,
            "sqrt(a)": np.sqrt(a),
            "floor(a)": np.floor(a),
            "rint(a)": np.rint(a),
            "a < b": a < b,
            "(float)a": flushed(a.astype(np.float32)),
        }.items():
            got = evaluate(expression, np.float64, a, b)
            np.testing.assert_array_equal(bits(got), bits(expected.astype(np.float64)), expression)


def test_single_precision_flushes_subnormals_as_cupy_compiles():
    x = np.array([TINY, -TINY, 1e-38, -1.2e-38], np.float32)
    assert evaluate("a > 0", np.bool_, x).tolist() == [False, False, False, False]
    tiny = np.float32(1.2e-38)
    np.testing.assert_array_equal(
        evaluate("a * 0.5f", np.float32, np.array([tiny, -tiny])).view(np.uint32), [0, 1 << 31]
    )
    # double precision has no such mode
    y = np.array([5e-324, -5e-324])
    assert evaluate("a > 0", np.bool_, y).tolist() == [True, False]


def test_minimum_and_maximum_drop_nan_and_order_zeros():
    a, b = pairs(np.array([0.0, -0.0, 1.0, -2.0, np.nan, np.inf, -np.inf], np.float32))

    def least(x, y):
        if math.isnan(x) or math.isnan(y):
            return y if math.isnan(x) else x
        return x if (x, math.copysign(1, x)) < (y, math.copysign(1, y)) else y

    def most(x, y):
        return y if math.isnan(x) else x if math.isnan(y) else -least(-x, -y)

    preamble = """__device__ float with_nan(float a, float b) {
    float r; asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }"""
    got = evaluate("with_nan(a, b)", np.float32, a, b, preamble=preamble)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(a) | np.isnan(b))

    for expression, exact in {"fminf(a, b)": least, "fmaxf(a, b)": most}.items():
        expected = np.array([exact(*p) for p in zip(a.tolist(), b.tolist(), strict=True)])
        got = evaluate(expression, np.float32, a, b)
        np.testing.assert_array_equal(bits(got), bits(expected.astype(np.float32)), expression)


def test_comparisons_with_nan():
    a, b = pairs(np.array([0.0, -0.0, 1.0, np.nan], np.float32))
    for operator, expected in {
        "<": a < b,
        "<=": a <= b,
        "==": a == b,
        "!=": a != b,
        ">": a > b,
        ">=": a >= b,
    }.items():
        np.testing.assert_array_equal(evaluate(f"a {operator} b", np.bool_, a, b), expected)
        np.testing.assert_array_equal(evaluate(f"!(a {operator} b)", np.bool_, a, b), ~expected)
    np.testing.assert_array_equal(evaluate("isnan(a)", np.bool_, a), np.isnan(a))
    np.testing.assert_array_equal(
        evaluate("isfinite(a) && !isinf(b)", np.bool_, FLOAT, FLOAT), np.isfinite(FLOAT)
    )


def test_conversions_to_integers_clamp():
    def clamp(x, low, high, nan):
        return (
            nan if math.isnan(x) else int(min(max(math.trunc(min(max(x, -1e30), 1e30)), low), high))
        )

    x = FLOAT.astype(np.float64)
    for expression, dtype, low, high, nan in (
        ("(int)a", np.int32, -(2**31), 2**31 - 1, 0),
        ("(unsigned)a", np.uint32, 0, 2**32 - 1, 0),
        ("(long long)a", np.int64, -(2**63), 2**63 - 1, -(2**63)),
        ("(unsigned long long)a", np.uint64, 0, 2**64 - 1, 2**63),
    ):
        expected = [clamp(float(v), low, high, nan) for v in FLOAT]
        got = evaluate(expression, dtype, FLOAT)
        assert got.tolist() == expected, expression
        assert evaluate(expression, dtype, x).tolist()[:12] == expected[:12], expression
    np.testing.assert_array_equal(
        evaluate("__float2int_rn(a)", np.int32, np.float32([0.5, 1.5, 2.5, -0.5, -1.5])),
        [0, 2, 2, 0, -2],
    )
    np.testing.assert_array_equal(
        evaluate("__float2int_ru(a) - __float2int_rd(a)", np.int32, np.float32([0.5, -1.5, 2, -3])),
        [1, 1, 0, 0],
    )


def test_conversions_between_widths():
    a = INT32
    for expression, dtype, expected in (
        ("(signed char)a", np.int8, a.astype(np.int8)),
        ("(unsigned char)a", np.uint8, a.astype(np.uint8)),
        ("(int)(signed char)a", np.int32, a.astype(np.int8).astype(np.int32)),
        ("(int)(unsigned short)a", np.int32, a.astype(np.uint16).astype(np.int32)),
        ("(long long)a", np.int64, a.astype(np.int64)),
        ("(unsigned long long)(unsigned)a", np.uint64, a.view(np.uint32).astype(np.uint64)),
        ("(float)a", np.float32, a.astype(np.float32)),
        ("(float)(unsigned)a", np.float32, a.view(np.uint32).astype(np.float32)),
        ("(double)a", np.float64, a.astype(np.float64)),
    ):
        np.testing.assert_array_equal(evaluate(expression, dtype, a), expected, expression)
    small = np.array([-128, -1, 0, 5, 127], np.int8)
    np.testing.assert_array_equal(evaluate("a * 3", np.int32, small), small.astype(np.int32) * 3)
    np.testing.assert_array_equal(evaluate("(float)a", np.float32, INT64), INT64.astype(np.float32))


def test_directed_rounding_of_conversions():
    x = np.array([0.1, -0.1, 1 / 3, 1e300, -1e300, 2.0, 1e-20, 16777217.0])
    exact = [Fraction(float(v)) for v in x]
    for mode in "zdu":
        got = evaluate(f"__double2float_r{mode}(a)", np.float32, x)
        for value, result in zip(exact, got.tolist(), strict=True):
            low, high = neighbours(value)
            wanted = {"d": low, "u": high, "z": low if value > 0 else high}[mode]
            assert result == wanted, (mode, float(value))
    whole = np.array([16777217, -16777217, 2**31 - 1, 5], np.int32)
    np.testing.assert_array_equal(
        evaluate("__int2float_rz(a)", np.float32, whole), [16777216, -16777216, 2147483520, 5]
    )


def neighbours(value, dtype=np.float32):
    """The floats around an exact number."""
    most = Fraction(float(np.finfo(dtype).max))
    if abs(value) > most:
        return (float(most), math.inf) if value > 0 else (-math.inf, -float(most))
    near = dtype(value.numerator / value.denominator)
    low = near if Fraction(float(near)) <= value else np.nextafter(near, dtype(-np.inf))
    high = near if Fraction(float(near)) >= value else np.nextafter(near, dtype(np.inf))
    return float(low), float(high)


EXACT = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "fma": lambda x, y: x * y + x,
}


def rounded(name, mode, x, y, dtype):
    """``x <name> y`` as IEEE 754 rounds it; fma adds x to the product."""
    function = EXACT[name]
    with np.errstate(all="ignore"):
        plain = function(np.float64(x), np.float64(y))
        sums = {"add": (x, y), "sub": (x, -y), "fma": (np.float64(x) * np.float64(y), x)}
    if not (math.isfinite(x) and math.isfinite(y)) or (name == "div" and not y):
        return plain
    exact = function(Fraction(float(x)), Fraction(float(y)))
    if exact:
        low, high = neighbours(exact, dtype)
        result = {"m": low, "p": high, "z": low if exact > 0 else high}[mode]
        return math.copysign(result, 1 if exact > 0 else -1)
    if mode == "m" and any(v or np.signbit(v) for v in sums.get(name, ())):
        return -0.0
    return plain


@pytest.mark.parametrize("mode", ["m", "p", "z"])
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_directed_rounding_of_arithmetic(name, mode, dtype):
    values = [0.0, -0.0, 1.0, -1.5, 3.0, 0.1, 16777217.0, np.inf, np.nan]
    limits = np.finfo(dtype)
    a, b = pairs(np.array([*values, limits.max, -limits.max, limits.smallest_subnormal], dtype))
    size, letter, c_type = (32, "f", "float") if dtype == np.float32 else (64, "d", "double")
    third = ", %1" if name == "fma" else ""
    preamble = f"""__device__ {c_type} f({c_type} a, {c_type} b) {{
    {c_type} r; asm("{name}.r{mode}.f{size} %0, %1, %2{third};"
                    : "={letter}"(r) : "{letter}"(a), "{letter}"(b)); return r; }}"""
    expected = [rounded(name, mode, x, y, dtype) for x, y in zip(a, b, strict=True)]
    got = evaluate("f(a, b)", dtype, a, b, preamble=preamble)
    np.testing.assert_array_equal(bits(got), bits(np.array(expected, dtype)))


@pytest.mark.parametrize("mode", ["m", "p", "z"])
def test_directed_rounding_of_roots_and_inverses(mode):
    x = np.array([0.0, -0.0, 2.0, 3.0, 0.1, 9.0, np.inf, 1e-40, 3e38], np.float32)
    move = {"m": np.inf, "p": -np.inf, "z": np.inf}[mode]
    with np.errstate(all="ignore"):
        wide = {"sqrt": np.sqrt(x.astype(np.longdouble)), "rcp": 1 / x.astype(np.longdouble)}
        for name, exact in wide.items():
            preamble = f"""__device__ float f(float a) {{
            float r; asm("{name}.r{mode}.f32 %0, %1;" : "=f"(r) : "f"(a)); return r; }}"""
            nearest = exact.astype(np.float32)
            wrong = nearest < exact if mode == "p" else nearest > exact
            expected = np.where(wrong, np.nextafter(nearest, np.float32(-move)), nearest)
            got = evaluate("f(a)", np.float32, x, preamble=preamble)
            np.testing.assert_array_equal(bits(got), bits(expected), name)


def test_half_precision(rng):
    x = rng.normal(0, 100, 300).astype(np.float32)
    x[:6] = [65519, 65520, 1e-8, 6e-8, np.inf, np.nan]
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    got = evaluate("__half_as_ushort(__float2half(a))", np.uint16, x)
    np.testing.assert_array_equal(bits(got.view(np.float16)), bits(half))
    raw = np.arange(0, 65536, 7).astype(np.uint16)
    got = evaluate("__half2float(__ushort_as_half(a))", np.float32, raw)
    np.testing.assert_array_equal(bits(got), bits(raw.view(np.float16).astype(np.float32)))
    a, b = raw[rng.integers(0, len(raw), 500)], raw[rng.integers(0, len(raw), 500)]
    p, q = a.view(np.float16), b.view(np.float16)
    with np.errstate(all="ignore"):
        for name, expected in {"add": p + q, "sub": p - q, "mul": p * q}.items():
            expression = f"__half_as_ushort(__h{name}(__ushort_as_half(a), __ushort_as_half(b)))"
            got = evaluate(expression, np.uint16, a, b).view(np.float16)
            np.testing.assert_array_equal(bits(got), bits(expected.astype(np.float16)), name)
        pair = "__half2(__ushort_as_half(a), __ushort_as_half(b))"
        got = evaluate(
            f"__half_as_ushort(__high2half(__hmul2({pair}, {pair})))", np.uint16, a, b
        ).view(np.float16)
        np.testing.assert_array_equal(bits(got), bits(q * q))


@pytest.mark.parametrize("part", range(4))
def test_bfloat16(part):
    """Widened by a shift, and rounded to the nearest of the two neighbours that a shift gives."""
    header = "#include <cuda_bf16.h>"
    raw = np.arange(part << 14, part + 1 << 14).astype(np.uint16)
    wide = (raw.astype(np.uint32) << 16).view(np.float32)
    got = evaluate("__bfloat162float(__ushort_as_bfloat16(a))", np.float32, raw, preamble=header)
    number = ~np.isnan(wide)
    np.testing.assert_array_equal(bits(got)[number], bits(wide)[number])
    assert np.isnan(got[~number]).all()
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (wide.view(np.uint32) | np.uint32(low)).view(np.float32)
        up = (low > 0x8000) | ((low == 0x8000) & (raw & 1 == 1))
        expected = np.where(np.isnan(x), 0x7FFF, raw + up)
        got = evaluate("__bfloat16_as_ushort(__float2bfloat16(a))", np.uint16, x, preamble=header)
        np.testing.assert_array_equal(got, expected)


def test_saturation_masks_and_products_of_parts():
    a, b = pairs(INT32)
    x, y = a.view(np.uint32), b.view(np.uint32)
    preamble = """
    __device__ int plus(int a, int b) {
      int r; asm("add.sat.s32 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
    __device__ int minus(int a, int b) {
      int r; asm("sub.sat.s32 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
    __device__ unsigned clamped(unsigned a, unsigned b) {
      unsigned r; asm("bmsk.clamp.b32 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
    __device__ unsigned wrapped(unsigned a, unsigned b) {
      unsigned r; asm("bmsk.wrap.b32 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }"""

    def check(expression, exact, inputs, dtype):
        expected = [exact(*(int(v) for v in row)) for row in zip(*inputs, strict=True)]
        got = evaluate(expression, dtype, *inputs, preamble=preamble)
        np.testing.assert_array_equal(got, np.array(expected, dtype), expression)

    def products(p, q, width, first):
        halves = (wrap(p >> 16 * k, 16, width < 0) for k in (0, 1))
        octets = (wrap(q >> 8 * (first + k), 8, width < 0) for k in (0, 1))
        total = sum(h * o for h, o in zip(halves, octets, strict=True)) + 5
        return wrap(total, 32, width < 0)

    check("plus(a, b)", lambda p, q: min(max(p + q, -(2**31)), 2**31 - 1), (a, b), np.int32)
    check("minus(a, b)", lambda p, q: min(max(p - q, -(2**31)), 2**31 - 1), (a, b), np.int32)
    mask = lambda p, q: ((1 << q) - 1 << p) & 0xFFFFFFFF  # noqa: E731
    check("clamped(a, b)", lambda p, q: mask(min(p, 32), min(q, 32)), (x, y), np.uint32)
    check("wrapped(a, b)", lambda p, q: mask(p & 31, q & 31), (x, y), np.uint32)
    check("__dp2a_lo(a, b, 5)", lambda p, q: products(p, q, -1, 0), (a, b), np.int32)
    check("__dp2a_hi(a, b, 5)", lambda p, q: products(p, q, -1, 2), (a, b), np.int32)
    check("__dp2a_lo(a, b, 5u)", lambda p, q: products(p, q, 1, 0), (x, y), np.uint32)
    check("__dp2a_hi(a, b, 5u)", lambda p, q: products(p, q, 1, 2), (x, y), np.uint32)


def test_comparisons_that_give_numbers():
    a, b = pairs(FLOAT)
    p, q = flushed(a), flushed(b)
    for test, compare in {"lt": np.less, "neu": np.not_equal, "geu": lambda x, y: ~(x < y)}.items():
        for flag, (x, y) in {".ftz": (p, q), "": (a, b)}.items():
            preamble = f"""__device__ int f(float a, float b) {{ int r;
            asm("set.{test}{flag}.u32.f32 %0, %1, %2;" : "=r"(r) : "f"(a), "f"(b)); return r; }}"""
            got = evaluate("f(a, b)", np.int32, a, b, preamble=preamble)
            np.testing.assert_array_equal(got, -compare(x, y).astype(np.int32), test + flag)


def test_comparisons_of_pairs_of_halves():
    values = np.array([0.0, -0.0, 1.0, -2.5, 6e-8, np.inf, np.nan], np.float16)
    a, b = pairs(values.view(np.uint16))
    x, y = a.view(np.float16), b.view(np.float16)
    one, two = "__ushort_as_half(a)", "__ushort_as_half(b)"
    sides = f"__half2({one}, {two}), __half2({two}, {one})"
    for test, compare in {
        "eq": np.equal,
        "lt": np.less,
        "ge": np.greater_equal,
        "neu": np.not_equal,
        "ltu": lambda u, v: ~(u >= v),
    }.items():
        low, high = compare(x, y), compare(y, x)
        np.testing.assert_array_equal(
            evaluate(f"__h{test}2_mask({sides})", np.uint32, a, b), low * 0xFFFF + high * 0xFFFF0000
        )
        np.testing.assert_array_equal(evaluate(f"__hb{test}2({sides})", np.bool_, a, b), low & high)
        got = evaluate(f"__half_as_ushort(__high2half(__h{test}2({sides})))", np.uint16, a, b)
        np.testing.assert_array_equal(got.view(np.float16), high)


def exact_fma(a, b, c):
    """a * b + c in exact arithmetic, for finite values."""
    return Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))


def nearest(value, dtype):
    """An exact number rounded to nearest, ties to even."""
    if dtype == np.float64:
        return np.float64(value.numerator / value.denominator) if value else np.float64(0)
    low, high = neighbours(value)
    if low == high:
        return np.float32(low)
    below, above = value - Fraction(low), Fraction(high) - value
    if below == above:
        even = np.float32(low).view(np.uint32) % 2 == 0
        return np.float32(low if even else high)
    return np.float32(low if below < above else high)


@settings(max_examples=300)
@given(st.data(), st.sampled_from([32, 64]))
def test_fma_rounds_once(data, width):
    bound = 2.0**50 if width == 32 else 1e100
    values = st.floats(-bound, bound, width=width, allow_subnormal=False)
    a, b, c = (data.draw(values) for _ in range(3))
    if data.draw(st.booleans()):  # nearly cancels: the product's low bits decide
        c = float(np.float32(-a * b)) if width == 32 else -a * b
    dtype = np.float32 if width == 32 else np.float64
    exact = exact_fma(a, b, c)
    if exact and abs(exact) < Fraction(1, 10**30 if width == 32 else 10**200):
        return
    got = arithmetic.fma(*(np.array([v], dtype) for v in (a, b, c)))[0]
    assert got == nearest(exact, dtype)


@pytest.mark.parametrize("scale", [0, -340, -320, -160, 150, 154])
def test_fma_of_tiny_and_huge_numbers(scale, rng):
    """Parts that a product in two halves would lose, or that overflow on the way."""
    a = rng.normal(size=200) * 10.0 ** (scale // 2)
    b = rng.normal(size=200) * 10.0 ** (scale - scale // 2)
    c = -a * b * rng.choice([1, 1 + 2**-52, 0.5, 0], 200)
    a[:4], b[:4], c[:4] = (
        [-0.0, 1e300, 1e-300, 1e308],
        [1, 1e300, 1e-300, 10],
        [-0.0, 0, -0.0, -1e308],
    )
    expected = []
    for x, y, z in zip(a, b, c, strict=True):
        exact = exact_fma(x, y, z)
        with np.errstate(over="ignore"):
            plain = x * y + z
        limit = math.inf if exact > 0 else -math.inf
        expected.append(
            plain if not exact else limit if abs(exact) >= 2**1024 else nearest(exact, np.float64)
        )
    got = evaluate("fma(a, b, c)", np.float64, a, b, c)
    np.testing.assert_array_equal(bits(got), bits(np.array(expected)))


def test_contraction_is_one_rounding():
    a = np.float32([1 + 2**-12, 3.1415927, 1e10])
    expected = [nearest(exact_fma(v, v, -1), np.float32) for v in a]
    np.testing.assert_array_equal(evaluate("a * a + b", np.float32, a, np.float32(-1)), expected)
    apart = evaluate("__fmul_rn(a, a) + b", np.float32, a, np.float32(-1))
    np.testing.assert_array_equal(apart, a * a - 1)


def test_plain_ptx_keeps_subnormals():
    a, b = pairs(FLOAT)
    with np.errstate(all="ignore"):
        expected = {"add": a + b, "sub": a - b, "mul": a * b, "div": a / b}
    for name, exact in expected.items():
        preamble = f"""__device__ float f(float a, float b) {{
        float r; asm("{name}.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }}"""
        got = evaluate("f(a, b)", np.float32, a, b, preamble=preamble)
        np.testing.assert_array_equal(bits(got), bits(exact), name)


@pytest.mark.parametrize("mode", ["m", "p", "z"])
def test_rounding_doubles_to_floats(mode, rng):
    most = float(np.finfo(np.float32).max)
    x = np.concatenate((
        rng.normal(size=100) * 10.0 ** rng.integers(-48, 39, 100),
        [0.1, -0.1, 1e-40, -1e-50, 1e300, -1e300, most, -most * 1.00000001],
        [0.0, -0.0, np.inf, -np.inf, np.nan],
    ))  # fmt: skip
    preamble = f"""__device__ float f(double a) {{
    float r; asm("cvt.r{mode}.f32.f64 %0, %1;" : "=f"(r) : "d"(a)); return r; }}"""
    got = evaluate("f(a)", np.float32, x, preamble=preamble)
    expected = []
    for value in x.tolist():
        if not math.isfinite(value) or not value:
            expected.append(value)
            continue
        low, high = neighbours(Fraction(value))
        result = {"m": low, "p": high, "z": low if value > 0 else high}[mode]
        expected.append(math.copysign(result, value))
    np.testing.assert_array_equal(bits(got), bits(np.array(expected, np.float32)))


def test_predicates_within_a_statement():
    a, b = pairs(FLOAT)
    preamble = """
    __device__ float pick(float a, float b) { float r; asm("{ .reg .pred p;"
      " setp.geu.f32 p, %1, %2; selp.f32 %0, %1, %2, p; }" : "=f"(r) : "f"(a), "f"(b)); return r; }
    __device__ int both(float a, float b) { int r; asm("{ .reg.pred p, q;"
      " setp.lt.and.f32 p|q, %1, %2, 1; @p mov.b32 %0, 1; @!p selp.b32 %0, 2, 3, q; }"
      : "=r"(r) : "f"(a), "f"(b)); return r; }"""
    got = evaluate("pick(a, b)", np.float32, a, b, preamble=preamble)
    np.testing.assert_array_equal(bits(got), bits(np.where(~(a < b), a, b)))
    got = evaluate("both(a, b)", np.int32, a, b, preamble=preamble)
    np.testing.assert_array_equal(got, np.where(a < b, 1, 2))


def test_the_bits_of_floats_as_integers():
    a, b = pairs(FLOAT)
    i, j = a.view(np.int32), b.view(np.int32)
    got = evaluate("__float_as_int(a) < __float_as_int(b) ? a : b", np.float32, a, b)
    np.testing.assert_array_equal(bits(got), bits(np.where(i < j, a, b)))
    got = evaluate("__int_as_float(max(__float_as_int(a) & 0x7fffffff, __float_as_int(b)))",
                   np.float32, a, b)  # fmt: skip
    np.testing.assert_array_equal(bits(got), bits(np.maximum(i & 0x7FFFFFFF, j).view(np.float32)))
    x = np.array([0.0, -0.0, 1.5, -0.1, np.inf, 5e-324])
    got = evaluate("__double_as_longlong(a)", np.int64, x)
    np.testing.assert_array_equal(got, x.view(np.int64))
    got = evaluate("__longlong_as_double(__double_as_longlong(a))", np.float64, x)
    np.testing.assert_array_equal(bits(got), bits(x))


def test_approximate_units_are_close():
    x = np.linspace(0.1, 5, 50).astype(np.float32)
    for expression, expected in {
        "__expf(a)": np.exp(x),
        "__logf(a)": np.log(x),
        "__sinf(a)": np.sin(x),
        "__cosf(a)": np.cos(x),
        "rsqrtf(a)": 1 / np.sqrt(x),
        "__fdividef(1.0f, a)": 1 / x,
        "expf(a)": np.exp(x),
        "logf(a)": np.log(x),
        "powf(a, 1.7f)": x**1.7,
        "tanhf(a)": np.tanh(x),
        "(float)exp((double)a)": np.exp(x),
        "(float)log((double)a)": np.log(x),
    }.items():
        np.testing.assert_allclose(
            evaluate(expression, np.float32, x), expected, rtol=3e-6, atol=1e-6, err_msg=expression
        )
