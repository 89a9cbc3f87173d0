"""Every bfloat16 against definitions in float64, rounded here by a search among all of them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import cubin
from cubin.core import conversions, floats, signs
from cubin.core.host import blocks
from cubin.solvers import greedy, search_rows
from tests.exhaustive import few
from tests.reference import room_for_signs, signs_of
from tests.test_surrogates import PARAMETERS, SLOPES

PATTERNS = np.arange(1 << 16, dtype=np.uint16)
EVERY = PATTERNS.view(ml_dtypes.bfloat16)
DTYPE = EVERY.dtype
OUTPUTS = {"signs": "y", "gradient_inside": "gx"}


def value(patterns):
    """The numbers, in float64, that patterns stand for: the upper half of a float32's."""
    with np.errstate(invalid="ignore"):  # NumPy warns of signalling NaN
        return (patterns.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


NUMBERS = value(PATTERNS)
# All magnitudes in ascending order. What is rounded beyond the largest comes to a next one, 2^128.
MAGNITUDES = np.append(NUMBERS[:0x7F80], 2.0**128)


def nearest(x):
    """Numbers in float64 rounded to the nearest bfloat16, ties to the even pattern; in float64."""
    x = np.asarray(x, np.float64)
    above = np.searchsorted(MAGNITUDES, np.abs(x)).clip(1, len(MAGNITUDES) - 1)
    to_above, to_below = MAGNITUDES[above] - np.abs(x), np.abs(x) - MAGNITUDES[above - 1]
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    rounded = np.append(MAGNITUDES[:-1], np.inf)[np.where(up, above, above - 1)]
    return np.where(np.isnan(x), np.nan, np.copysign(rounded, x))


def assert_same(found, expected):
    """Numbers are the same, and what is NaN is."""
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(found.astype(np.float64), expected)


# ---------------------------------------------------------------- conversions


def test_the_definition_gives_every_number_itself():
    np.testing.assert_array_equal(nearest(NUMBERS), NUMBERS)
    assert len(np.unique(NUMBERS[np.isfinite(NUMBERS)])) == 2 * 0x7F80 - 1


@given(st.floats(), st.integers(-8, 8))
@example(1 + 2.0**-8 + 2.0**-40, 0)  # float32 takes it for half-way
@example(2.0**-134, 1)
@example(2.0**128 - 2.0**119, -1)
def test_float64_is_rounded_once(number, steps):
    near = float(nearest(number))
    middle = (number + near) / 2 if np.isfinite(near) else number
    for start in (number, middle):
        one = np.float64(start)
        for _ in range(abs(steps)):
            with np.errstate(over="ignore"):
                one = np.nextafter(one, np.copysign(np.inf, steps))
        assert_same(floats.rounded(one, DTYPE), nearest(one))


def test_half_way_and_beside(xp, host):
    middles = (MAGNITUDES[:-1] + MAGNITUDES[1:]) / 2
    beside = [np.nextafter(middles, limit) for limit in (0, np.inf)]
    x = np.concatenate([middles, *beside])
    x = np.concatenate([x, -x, [0.0, -0.0, np.nan, np.inf, -np.inf, 1e300, 1e-300]])
    assert_same(host(conversions.rounded(xp.asarray(x), DTYPE)), nearest(x))


def test_every_number_is_widened(xp, host):
    np.testing.assert_array_equal(host(conversions.widened(xp.asarray(EVERY))), NUMBERS)


def test_loops_convert_as_the_definition():
    loops = pytest.importorskip("cubin.core.host.loops")
    words = np.empty(1 << 16, np.uint32)
    loops.widen_bfloat16(PATTERNS, words)
    np.testing.assert_array_equal(words, PATTERNS.astype(np.uint32) << 16)
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        tried, found = words | np.uint32(low), np.empty(1 << 16, np.uint16)
        loops.narrow_to_bfloat16(tried, found)
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(
                value(found), nearest(tried.view(np.float32).astype(np.float64))
            )


# ---------------------------------------------------------------- element by element


@pytest.mark.parametrize("twice", [False, True])
def test_signs(xp, host, twice):
    """To the bit, and a NaN keeps its own; as one block and as several."""
    patterns = np.tile(PATTERNS, 2) if twice else PATTERNS
    y = host(cubin.sign(xp.asarray(patterns.view(DTYPE))))
    x = value(patterns)
    expected = np.where(x > 0, 0x3F80, 0xBF80)
    expected[np.isnan(x)] = patterns[np.isnan(x)]
    np.testing.assert_array_equal(y.view(np.uint16), expected)
    for index in (0, 1, 0x8000, 0x7F80, 0x7F81):
        one = host(cubin.sign(xp.asarray(EVERY[index])))
        assert one.shape == ()
        assert one.view(np.uint16) == expected[index]


@pytest.mark.parametrize(
    "bound", [1, 0, 3, 0.1, -1.0, 2.0**-140, np.nan, np.inf, np.float64(0.1), EVERY[0x3E00]]
)
def test_masks(xp, host, bound):
    limit = nearest(bound) if type(bound) is float else np.float64(bound)
    mask = host(cubin.ste_mask(xp.asarray(EVERY), bound))
    np.testing.assert_array_equal(mask, np.abs(NUMBERS) <= limit)


def test_masks_with_bounds_of_bfloat16(xp, host, rng):
    bound = rng.permutation(PATTERNS)
    mask = host(cubin.ste_mask(xp.asarray(EVERY), xp.asarray(bound.view(DTYPE))))
    np.testing.assert_array_equal(mask, np.abs(NUMBERS) <= value(bound))


@pytest.mark.parametrize("bits", [1, 3, "map"])
def test_gradients(xp, host, rng, bits):
    gy = rng.permutation(PATTERNS)
    bits = rng.integers(0, 4, gy.size) if bits == "map" else bits
    gx = host(cubin.multibit_grad(xp.asarray(EVERY), bits, xp.asarray(gy.view(DTYPE))))
    expected = np.where(np.abs(NUMBERS) <= bits, gy, 0)
    np.testing.assert_array_equal(gx.view(np.uint16), expected)
    gx = host(cubin.sign_grad(xp.asarray(EVERY), xp.asarray(gy.view(DTYPE))))
    np.testing.assert_array_equal(gx.view(np.uint16), np.where(np.abs(NUMBERS) <= 1, gy, 0))


def test_a_gradient_of_float64_is_rounded_once(xp, host):
    gy = np.array([1 + 2.0**-8 + 2.0**-40, 1.0])
    gx = cubin.sign_grad(xp.asarray(np.ones(2, DTYPE)), xp.asarray(gy))
    assert_same(host(gx), [1 + 2.0**-7, 1])


@pytest.mark.parametrize(("name", "parameters"), [p for p in PARAMETERS if p[1] != {"clip": 0.5}])
def test_slopes(xp, host, name, parameters):
    """At every number, to the next bfloat16 of the definition in float64."""
    with np.errstate(all="ignore"):
        gx = host(
            cubin.sign_grad(
                xp.asarray(EVERY), xp.asarray(np.ones_like(EVERY)), surrogate=name, **parameters
            )
        ).astype(np.float64)
    finite = np.isfinite(NUMBERS)
    used = np.abs(NUMBERS[finite]) < 100  # the oracle's hyperbolic functions overflow
    x, found = NUMBERS[finite][used], gx[finite][used]
    expected = np.array([SLOPES[name](v, **parameters) for v in x.tolist()])
    np.testing.assert_allclose(found, expected, rtol=2.0**-8, atol=1e-6)
    far = np.abs(NUMBERS[finite]) > 1e4
    assert (gx[finite][far] == (1 if name == "identity" else 0)).all()
    assert (gx[np.isnan(NUMBERS)] == (1 if name == "identity" else 0)).all()


# ---------------------------------------------------------------- rows


def two_levels(x, stored_in):
    """Greedy rows of pairs as float32 computes them: the scales, and their sum as stored."""
    r = x.astype(np.float32)
    y = np.zeros_like(r)
    scales = []
    for _ in range(2):
        scale = (np.abs(r.astype(np.float64)).sum(axis=1, keepdims=True) / 2).astype(np.float32)
        sign = np.where(r > 0, np.float32(1), np.float32(-1))
        stored = stored_in(scale).astype(np.float32)
        y, r = y + sign * stored, r - sign * scale
        scales.append(stored)
    return scales, stored_in(y)


@pytest.fixture
def pairs(rng):
    """Every number beside another one, of like size or not, all finite."""
    finite = PATTERNS[np.isfinite(NUMBERS)]
    close = np.bitwise_xor(finite, rng.integers(0, 256, finite.size).astype(np.uint16))
    far = rng.permutation(finite)
    both = np.concatenate([np.stack([finite, close], 1), np.stack([finite, far], 1)])
    return both[np.isfinite(value(both)).all(axis=1)]


def test_greedy_rows_of_two(xp, host, pairs):
    x = xp.asarray(pairs.view(DTYPE))
    with np.errstate(all="ignore"):
        scales, expected = two_levels(value(pairs), lambda a: nearest(a.astype(np.float64)))
    code = cubin.quantize(x, 2, channel_axis=0, check_finite=False)
    for level in range(2):
        assert_same(host(code.scales[level]), scales[level][:, 0])
    y = cubin.multibit(x, 2, channel_axis=0)
    assert y.dtype == code.dtype == DTYPE
    assert_same(host(y), expected)
    assert_same(host(code.dequantize()), expected)


@pytest.mark.parametrize("solver", ["greedy", "refined", "alternating", "optimal"])
def test_a_row_of_one_element_is_met(xp, host, solver):
    finite = PATTERNS[np.isfinite(NUMBERS)][:: 1 if solver == "greedy" else 61]
    x = xp.asarray(finite.view(DTYPE)[:, None])
    for bits in (1, 3):
        y = host(cubin.multibit(x, bits, channel_axis=0, solver=solver))
        assert_same(y[:, 0], value(finite))


@pytest.mark.parametrize("solver", ["greedy", "refined", "alternating", "optimal"])
@pytest.mark.parametrize("mapped", [False, True])
def test_rows_that_are_not_finite_leave_others_alone(xp, host, rng, solver, mapped):
    x = rng.normal(size=(4, 50)).astype(DTYPE)
    bits = rng.integers(0, 4, x.shape) if mapped else 3
    expected = host(cubin.multibit(xp.asarray(x), bits, channel_axis=0, solver=solver))
    x[1, 3], x[2, 5] = np.nan, np.inf
    bits = np.maximum(bits, 1) if mapped else bits
    expected = host(cubin.multibit(xp.asarray(x[::3]), bits[::3] if mapped else 3,
                                   channel_axis=0, solver=solver))  # fmt: skip
    y = host(cubin.multibit(xp.asarray(x), bits, channel_axis=0, solver=solver))
    np.testing.assert_array_equal(y[::3].view(np.uint16), expected.view(np.uint16))
    assert not np.isfinite(y[1:3].astype(float)).any()
    with pytest.raises(ValueError, match=r"row \(1,\)"):
        cubin.quantize(xp.asarray(x), bits, channel_axis=0, solver=solver)


# ---------------------------------------------------------------- forms


@pytest.mark.parametrize("dtype", [np.float16, DTYPE])
@pytest.mark.parametrize("in_place", [False, True])
def test_loops_of_elements_give_the_bits_of_the_body(rng, dtype, in_place):
    loops = pytest.importorskip("cubin.core.signs_loops")
    x, gy = PATTERNS.view(dtype), rng.permutation(PATTERNS).view(dtype)
    bits = rng.integers(0, 5, x.size).astype(np.uint8)
    with np.errstate(all="ignore"):
        for name, inputs in (
            ("signs", (x,)),
            ("gradient_inside", (x, np.uint8(2), gy)),
            ("gradient_inside", (x, bits, gy)),
        ):
            expected = np.empty_like(x)
            getattr(signs, name).function(*inputs, **{OUTPUTS[name]: expected})
            for place in (0, len(inputs) - 1):
                given = [value.copy() for value in inputs]
                out = given[place] if in_place else np.empty_like(x)
                getattr(loops, name)(*given, **{OUTPUTS[name]: out})
                np.testing.assert_array_equal(out.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("levels", few([1, 2, 3, 4, 5, 9, 16], 1, 3, 9))
@pytest.mark.parametrize("shape", [(7, 33), (3, 2500)])
def test_greedy_loops_give_the_bits_of_the_body(rng, shape, levels, mapped):
    loops = pytest.importorskip("cubin.solvers.greedy_loops")
    x = (rng.normal(size=shape) * 2.0 ** rng.integers(-130, 120, shape[:1])[:, None]).astype(DTYPE)
    x[0] = rng.integers(0, 1 << 16, shape[1:]).astype(np.uint16).view(DTYPE)
    bits = rng.integers(0, levels + 1, shape).astype(np.uint8) if mapped else np.uint8(levels)
    body, loop = (np.empty(shape, DTYPE) for _ in range(2))
    with np.errstate(all="ignore"):
        greedy.approximate_rows.function(x, bits, levels, y=body)
        loops.approximate_rows(x, bits, levels, y=loop)
    lost = np.isnan(body)
    assert np.array_equal(np.isnan(loop), lost)
    np.testing.assert_array_equal(loop.view(np.uint16)[~lost], body.view(np.uint16)[~lost])


@pytest.mark.parametrize("solver", ["refined", "alternating", "optimal"])
@pytest.mark.parametrize("mapped", [False, True])
def test_solvers_on_sorted_rows_give_the_same_bits(rng, monkeypatch, solver, mapped):
    pytest.importorskip("numba")
    x = rng.normal(size=(9, 301)).astype(DTYPE)
    bits = rng.integers(0, 4, x.shape) if mapped else 5 if solver == "alternating" else 3
    importance = rng.exponential(size=x.shape).astype(DTYPE)
    found = {}
    for compiled in (False, True):
        monkeypatch.setattr(blocks, "pays", lambda size, compiled=compiled: compiled)
        code = cubin.quantize(
            x, bits, channel_axis=0, solver=solver, importance=importance, check_finite=False
        )
        found[compiled] = code.scales.view(np.uint16), code.signs, code.dequantize()
    for one, other in zip(found[False], found[True], strict=True):
        np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))


@pytest.mark.parametrize("solver", ["refined", "alternating"])
def test_searching_loops_round_what_they_find_for_float32(rng, solver):
    """The same scales as for the same numbers in float32, rounded, and their sums, rounded."""
    loops = pytest.importorskip("cubin.solvers.search_rows_loops")
    x = rng.normal(size=(20, 500)).astype(DTYPE)
    rule = (solver == "refined", 2)
    y, scales = np.empty_like(x), np.empty((3, 20, 1), np.float32)
    packed = room_for_signs(3, x.shape)
    loops.reconstruct_rows(x, np.uint8(3), 3, *rule, y=y)
    loops.solve_rows(x.astype(np.float32), np.uint8(3), 3, *rule, scales=scales, signs=packed)
    signs = signs_of(packed, np.uint8(3), x.shape)
    total = np.zeros(x.shape, np.float32)
    for scale, sign in zip(scales, signs, strict=True):
        total += sign * nearest(scale.astype(np.float64)).astype(np.float32)
    assert_same(y, nearest(total.astype(np.float64)))
    assert search_rows.LOOPS_FROM > 0


def test_large_results_are_bfloat16():
    """Those that lie in the memory of dropped ones."""
    x = np.ones((1 << 12, 1 << 13), DTYPE)
    for _ in range(2):
        y = cubin.sign(x)
        assert y.dtype == DTYPE
        assert y.flags.writeable
        assert (y.view(np.uint16) == 0x3F80).all()
        del y


# ---------------------------------------------------------------- other functions


def test_errors_are_those_of_the_same_numbers_in_float64(xp, rng):
    x, y = rng.normal(size=(2, 5, 300)).astype(DTYPE)
    for name in ("relative_mse", "sqnr_db", "cosine_similarity", "max_abs_error"):
        function = getattr(cubin.errors, name)
        found = float(function(xp.asarray(x), xp.asarray(y)))
        assert found == pytest.approx(float(function(x.astype(float), y.astype(float))), rel=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: cubin.bitmaps.top_down(x, {1: 0.5, 3: 0.5}),
        lambda x: cubin.bitmaps.bottom_up(x, {0: 0.25, 2: 0.75}),
        lambda x: cubin.bitmaps.middle_out(x, {1: 0.5, 2: 0.5}),
        lambda x: cubin.bitmaps.ternary(x, channel_axis=0),
        lambda x: cubin.bitmaps.budget(x, 1.5, channel_axis=0),
        lambda x: cubin.bitmaps.allocate({"w": x}, 1.5)["w"],
    ],
    ids=["top_down", "bottom_up", "middle_out", "ternary", "budget", "allocate"],
)
def test_maps(xp, host, rng, make):
    x = rng.normal(size=(8, 40)).astype(DTYPE)
    found = host(make(xp.asarray(x)))
    assert found.dtype == np.int8
    # Distances and errors are taken after rounding to bfloat16; ranks and thresholds are not.
    same = found == host(make(xp.asarray(x.astype(np.float32))))
    assert same.mean() > 0.9
    assert np.array_equal(found, make(x))
