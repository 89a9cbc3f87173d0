from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cubin
from cubin.core import floats, passes
from cubin.core.host import blocks
from cubin.solvers import SOLVERS
from tests import reference
from tests.exhaustive import few

FLOATS = ["float16", "bfloat16", "float32", "float64"]
TOLERANCE = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-6, "float64": 1e-12}
"""Relative tolerance of scales and approximations, the latter in units of the largest |x|."""


def check(xp, host, x, bits, **granularity):
    """quantize and multibit against the loops of the reference."""
    scales, signs, residuals, approx = reference.greedy(x, bits, **granularity)
    device = xp.asarray(x)
    code = cubin.quantize(device, bits, **granularity)
    tolerance = TOLERANCE[str(x.dtype)]
    largest = np.abs(x).max(initial=0).astype(np.float64)
    assert code.dtype == code.scales.dtype == x.dtype
    assert code.signs.dtype == np.int8
    found = host(code.signs)
    tied = ties(residuals, signs, TOLERANCE[str(floats.work_dtype(x.dtype))] * largest)
    np.testing.assert_array_equal(found[~tied], signs[~tied])
    np.testing.assert_array_equal(found == 0, signs == 0)
    np.testing.assert_allclose(host(code.scales), scales, rtol=tolerance, atol=tolerance * largest)
    y = cubin.multibit(device, bits, **granularity)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert_approximates(host(y), approx, x, tied, tolerance * largest)
    np.testing.assert_array_equal(host(code.dequantize()), host(y))


def ties(residuals, signs, tolerance):
    """Where a sign, or one before it, is that of a residual that is 0 but for rounding errors.

    Either sign leaves a residual of the same magnitude, from which all that follows is mirrored.
    """
    return np.logical_or.accumulate((np.abs(residuals) <= tolerance) & (signs != 0), axis=0)


def assert_approximates(y, approx, x, tied, tolerance):
    """`y` is the approximation, and as far from x as that where residuals tie."""
    mirrored = tied.any(axis=0)
    np.testing.assert_allclose(y[~mirrored], approx[~mirrored], rtol=0, atol=tolerance)
    errors = (np.abs(np.subtract(z, x, dtype=np.float64))[mirrored] for z in (y, approx))
    np.testing.assert_allclose(*errors, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", few(FLOATS, "bfloat16", "float32"))
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    ("shape", "granularity"),
    [
        ((), {}),
        ((1,), {}),
        ((7,), {}),
        ((7,), {"channel_axis": 0}),
        ((5, 6), {"channel_axis": 1}),
        ((5, 6), {"group_size": 3}),
        ((5, 7), {"group_size": 3}),
        ((7,), {"group_size": 2}),
        ((7,), {"group_size": 9}),
        ((4, 3, 5), {"channel_axis": (2, 0)}),
        ((4, 3, 5), {"channel_axis": (-1, 1, 0)}),
        ((4, 3, 2, 2), {"channel_axis": 0}),
        ((2, 3, 2, 2, 4), {"group_size": 2}),
        ((2, 3, 2, 5), {"group_size": 2}),
        ((2, 3, 20), {"group_size": 8}),
        ((2, 3, 1, 2, 2, 3), {"channel_axis": (1, 4)}),
        ((3, 1000), {"channel_axis": 0}),
        ((0,), {}),
        ((0, 3), {"channel_axis": 0}),
        ((3, 0), {"channel_axis": 0}),
        ((2, 0, 4), {"group_size": 2}),
        ((2, 0, 4), {"group_size": 3}),
        ((2, 0), {"group_size": 3}),
    ],
)
def test_against_the_reference(xp, host, rng, dtype, mapped, shape, granularity):
    x = rng.normal(size=shape).astype(dtype)
    check(xp, host, x, rng.integers(0, 5, shape) if mapped else 3, **granularity)


@pytest.mark.parametrize("bits", [0, 1, 2, 8, 16])
def test_every_number_of_levels(xp, host, rng, bits):
    check(xp, host, rng.normal(size=(4, 33)), bits, channel_axis=0)


@pytest.mark.parametrize("shape", [(4, 1, 1), (3, 1), (1, 2), (4, 3, 2), (2,), ()])
def test_maps_that_broadcast(xp, host, rng, shape):
    x = rng.normal(size=(4, 3, 2))
    bits = rng.integers(0, 4, shape).astype(np.uint8)
    check(xp, host, x, bits, channel_axis=0)
    on_device = cubin.multibit(xp.asarray(x), xp.asarray(bits), channel_axis=0)
    np.testing.assert_array_equal(
        host(on_device), host(cubin.multibit(xp.asarray(x), bits, channel_axis=0))
    )


def test_views(xp, host, rng):
    base = rng.normal(size=(6, 8, 10)).astype(np.float32)
    bits = rng.integers(0, 4, base.shape)
    for view in (
        lambda a: a[::-1, ::2],
        lambda a: a.transpose(2, 0, 1),
        lambda a: a[:, 3],
        lambda a: a[1:, 1:, ::-3],
    ):
        x, levels = view(xp.asarray(base)), view(bits)
        scales, signs, *_ = reference.greedy(view(base), levels, channel_axis=1)
        code = cubin.quantize(x, levels, channel_axis=1)
        np.testing.assert_array_equal(host(code.signs), signs)
        np.testing.assert_allclose(host(code.scales), scales, rtol=1e-6, atol=1e-7)


def test_rows_longer_than_a_block(xp, host, rng):
    """Per tensor and per row: several pieces, the last one of odd length."""
    size = (2 * blocks.BLOCK if xp is np else 4 * passes.DEVICE_PIECE) + 777
    x = rng.normal(size=(2, size)).astype(np.float32)
    bits = rng.integers(0, 3, x.shape).astype(np.uint8)
    for granularity in ({}, {"channel_axis": 0}):
        for levels in (2, bits):
            code = cubin.quantize(xp.asarray(x), levels, **granularity)
            r = x.astype(np.float64)
            axis = 1 if granularity else None
            for level in range(2):
                hot = np.broadcast_to(levels, x.shape) > level
                total = np.where(hot, np.abs(r), 0).sum(axis=axis, keepdims=True)
                scale = total / hot.sum(axis=axis, keepdims=True)
                found = host(code.scales)[level].reshape(scale.shape)
                np.testing.assert_allclose(found, scale, rtol=1e-6)
                expected = np.where(hot, np.where(r > 0, 1, -1), 0)
                assert (host(code.signs)[level] != expected).mean() < 1e-5
                r -= scale * expected
            np.testing.assert_array_equal(
                host(cubin.multibit(xp.asarray(x), levels, **granularity)), host(code.dequantize())
            )


@pytest.mark.parametrize("seed", [3, 8, 106])
def test_residuals_that_tie_under_a_map(seed):
    rng = np.random.default_rng(seed)
    check_any((5, 5, 2, 4), {"group_size": 4}, rng, lambda shape: rng.integers(0, 4, shape))


@settings(max_examples=60)
@given(st.data())
def test_any_shape_map_and_granularity(data):
    ndim = data.draw(st.integers(0, 4))
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=ndim, max_size=ndim)))
    granularity = {}
    kind = data.draw(st.sampled_from(["tensor", "channel", "group"])) if ndim else "tensor"
    if kind == "channel":
        axes = data.draw(st.lists(st.integers(0, ndim - 1), min_size=1, unique=True))
        granularity = {"channel_axis": tuple(axes)}
    elif kind == "group":
        granularity = {"group_size": data.draw(st.integers(1, shape[-1] + 1))}
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    mapped, levels = data.draw(st.booleans()), data.draw(st.integers(0, 5))
    check_any(shape, granularity, rng, lambda n: rng.integers(0, 4, n) if mapped else levels)


def check_any(shape, granularity, rng, bits_of):
    """quantize against the reference, and the identity of its errors."""
    x = rng.normal(size=shape) * rng.choice([0, 1, 1e-3, 1e3], size=shape)
    bits = bits_of(shape)
    code = cubin.quantize(x, bits, **granularity)
    _, signs, residuals, approx = reference.greedy(x, bits, **granularity)
    tolerance = 1e-11 * np.abs(x).max(initial=0)
    tied = ties(residuals, signs, tolerance)
    assert_approximates(code.dequantize(), approx, x, tied, tolerance)
    residual = float(((x - code.dequantize()) ** 2).sum())
    rows = np.prod(code.scales.shape[1:])
    counts = np.zeros((len(code.scales), int(rows)))
    for row, members in enumerate(reference.rows(shape, **granularity).values()):
        for index in members:
            counts[:, row] += code.signs[(slice(None), *index)] != 0
    explained = (counts * code.scales.reshape(counts.shape) ** 2).sum()
    power = float((x**2).sum())
    # ||r_k||^2 = ||x||^2 - sum_i n_i a_i^2
    assert residual == pytest.approx(power - explained, abs=1e-9 * max(power, 1e-300))


# ---------------------------------------------------------------- exact and known cases


def test_constants_are_exact_after_one_level(xp, host):
    for dtype, value in (("float16", 0.1), ("float32", 0.3), ("float64", -1.7)):
        x = np.full((3, 1001), value, dtype)
        code = cubin.quantize(xp.asarray(x), 4, channel_axis=0)
        tolerance = 1e-14 if dtype == "float64" else 0
        np.testing.assert_allclose(host(code.dequantize()), x, rtol=tolerance)
        np.testing.assert_allclose(host(code.scales)[1:], 0, atol=tolerance)


def test_zeros_give_zero_scales_and_the_code_minus_one(xp, host):
    code = cubin.quantize(xp.asarray(np.array([[0.0, -0.0], [1.0, 0.0]])), 2, channel_axis=0)
    np.testing.assert_array_equal(host(code.scales)[:, 0], 0)
    np.testing.assert_array_equal(host(code.signs)[:, 0], -1)
    assert np.isfinite(host(code.scales)).all()


def test_rows_without_codes_at_a_level(xp, host):
    x = np.array([[1.0, 2.0], [3.0, 4.0]])
    code = cubin.quantize(xp.asarray(x), np.array([[1], [2]]), channel_axis=0)
    np.testing.assert_array_equal(host(code.scales), [[1.5, 3.5], [0, 0.5]])
    np.testing.assert_array_equal(host(code.signs)[1, 0], 0)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
def test_uniform_samples_halve_the_scale_with_every_level(bits):
    n = 1 << 16
    x = (2 * np.arange(n) + 1 - n) / n
    code = cubin.quantize(x, bits)
    np.testing.assert_allclose(code.scales, 0.5 ** np.arange(1, bits + 1), rtol=1e-4)
    assert float(cubin.errors.relative_mse(x, code.dequantize())) == pytest.approx(
        4.0**-bits, rel=1e-4
    )


GAUSSIAN = [0.36338, 0.13045, 0.05839, 0.03290, 0.02263]
GAUSSIAN_SCALES = [0.797885, 0.482624, 0.268441, 0.159674, 0.101344]
LAPLACE = [0.5, 0.22933, 0.14256, 0.09512, 0.07646]


def test_gaussian_and_laplace_samples(rng):
    n = 1_000_000
    gaussian, laplace = rng.normal(size=n), rng.laplace(size=n)
    np.testing.assert_allclose(cubin.quantize(gaussian, 5).scales, GAUSSIAN_SCALES, rtol=5e-3)
    for bits in range(1, 6):
        error = float(cubin.errors.relative_mse(gaussian, cubin.multibit(gaussian, bits)))
        assert error == pytest.approx(GAUSSIAN[bits - 1], rel=1e-2)
        error = float(cubin.errors.relative_mse(laplace, cubin.multibit(laplace, bits)))
        assert error == pytest.approx(LAPLACE[bits - 1], rel=3e-2)


# ---------------------------------------------------------------- numbers


def test_rows_have_at_most_two_to_the_bits_values(rng):
    x = rng.normal(size=(5, 5000)).astype(np.float32)
    for bits in (1, 2, 3):
        y = cubin.multibit(x, bits, channel_axis=0)
        assert max(len(np.unique(row)) for row in y) <= 2**bits


def test_scaling_by_a_power_of_two_is_exact(xp, host, rng):
    x = rng.normal(size=(3, 500)).astype(np.float32)
    plain = cubin.quantize(xp.asarray(x), 4, channel_axis=0)
    scaled = cubin.quantize(xp.asarray(x * np.float32(2**30)), 4, channel_axis=0)
    np.testing.assert_array_equal(host(scaled.scales), host(plain.scales) * np.float32(2**30))
    np.testing.assert_array_equal(host(scaled.signs), host(plain.signs))


def test_a_long_sum_keeps_its_digits():
    x = np.full(3_000_000, 0.1, np.float32)
    x[::2] = 0.3
    expected = (float(np.float32(0.1)) + float(np.float32(0.3))) / 2
    assert float(cubin.quantize(x, 1).scales[0]) == pytest.approx(expected, rel=1e-7)


def test_large_and_subnormal_values(xp, host):
    big = np.full(8, np.finfo(np.float32).max)
    np.testing.assert_array_equal(host(cubin.multibit(xp.asarray(big), 2)), big)
    half = np.full(100, np.finfo(np.float16).max)
    np.testing.assert_array_equal(host(cubin.multibit(xp.asarray(half), 2)), half)
    tiny = np.array([1, -3], np.float32) * np.finfo(np.float32).smallest_subnormal
    np.testing.assert_array_equal(host(cubin.multibit(xp.asarray(tiny), 2)), tiny)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(xp, host, rng, bad):
    x = rng.normal(size=(4, 50))
    x[2, 7] = bad
    y = host(cubin.multibit(xp.asarray(x), 2, channel_axis=0))
    assert not np.isfinite(y[2]).any()
    clean = [0, 1, 3]
    np.testing.assert_array_equal(
        y[clean], host(cubin.multibit(xp.asarray(x[clean]), 2, channel_axis=0))
    )
    with pytest.raises(ValueError, match=r"row \(2,\)"):
        cubin.quantize(xp.asarray(x), 2, channel_axis=0)
    code = cubin.quantize(xp.asarray(x), 2, channel_axis=0, check_finite=False)
    np.testing.assert_array_equal(host(code.dequantize()), y)


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("bad", few([np.nan, np.inf, -np.inf], np.nan, -np.inf))
@pytest.mark.parametrize("dtype", few(FLOATS, "bfloat16", "float32"))
@pytest.mark.parametrize(
    "bits",
    [
        pytest.param(1, marks=pytest.mark.exhaustive),
        3,
        np.array([0, 1, 2, 3, 2] * 4, np.uint8),
    ],
)
def test_what_is_not_finite_is_named(xp, rng, solver, bad, dtype, bits):
    x = rng.standard_normal((3, 2, 20)).astype(dtype)
    x[1, 0, 5] = bad  # which a map gives no bits
    x[2, 1, 19] = bad
    device = xp.asarray(x)
    where = [
        ({"channel_axis": 0}, r"row \(1,\) of its 3 rows"),
        ({"channel_axis": (1, 0)}, r"row \(0, 1\) of its 6 rows"),
        ({"group_size": 5}, r"row \(1, 0, 1\) of its 24 rows"),
        ({"group_size": 6}, r"row \(1, 0, 0\) of its 24 rows"),
        ({}, "it"),
    ]
    bits = bits if isinstance(bits, int) else xp.asarray(bits)
    for granularity, row in where:
        with pytest.raises(ValueError, match=rf"x must be finite, but {row} has NaN or infinity"):
            cubin.quantize(device, bits, solver=solver, **granularity)


def test_an_element_without_bits_does_not_spread_its_nan(xp, host):
    x = np.array([np.nan, 1.0, 3.0])
    y = host(cubin.multibit(xp.asarray(x), np.array([0, 2, 2])))
    np.testing.assert_array_equal(y, [0, 1, 3])


def test_scales_that_overflow():
    x = np.full(4, 1.5e308)
    with pytest.raises(ValueError, match="overflows"):
        cubin.quantize(x, 1)


def test_the_same_input_gives_the_same_bits(rng):
    x = rng.normal(size=5_000_000).astype(np.float32)
    first = cubin.multibit(x, 3)
    np.testing.assert_array_equal(first, cubin.multibit(x, 3))
    np.testing.assert_array_equal(first, cubin.multibit(x.reshape(1000, 5000), 3).ravel())


def test_threads_do_not_change_the_result(rng, monkeypatch):
    x = rng.normal(size=(40, blocks.BLOCK + 5)).astype(np.float32)
    results = []
    for workers in (1, 5):
        monkeypatch.setattr(blocks, "SHARE", 1)
        monkeypatch.setattr(blocks, "_workers", lambda workers=workers: workers)
        results.append((cubin.multibit(x, 3), cubin.multibit(x, 3, channel_axis=0)))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


# ---------------------------------------------------------------- arguments


def test_out(xp, host, rng):
    x = rng.normal(size=(4, 5, 6)).astype(np.float32)
    expected = host(cubin.multibit(xp.asarray(x), 2, channel_axis=1))
    for out in (xp.empty((4, 5, 6), np.float32), xp.empty((6, 5, 4), np.float32).transpose()):
        assert cubin.multibit(xp.asarray(x), 2, channel_axis=1, out=out) is out
        np.testing.assert_array_equal(host(out), expected)
    itself = xp.asarray(x.copy())
    cubin.multibit(itself, 2, channel_axis=1, out=itself)
    np.testing.assert_array_equal(host(itself), expected)


def test_out_that_overlaps(rng):
    base = rng.normal(size=300_001)
    expected = cubin.multibit(base[:-1], 2)
    cubin.multibit(base[:-1], 2, out=base[1:])
    np.testing.assert_array_equal(base[1:], expected)


def test_out_in_the_memory_of_the_map(rng):
    x = rng.normal(size=5)
    bits = rng.integers(0, 4, 5)
    expected = cubin.multibit(x, bits)
    np.testing.assert_array_equal(cubin.multibit(x, bits, out=bits.view(x.dtype)), expected)


def test_lists_and_other_byte_orders():
    np.testing.assert_array_equal(cubin.multibit([-1.0, 3.0], 2), [-1, 3])
    swapped = np.array([-1.0, 3.0], ">f4")
    assert cubin.multibit(swapped, 1).dtype == np.float32


@pytest.mark.parametrize("bits", [2, np.int64(2), np.uint8(2), np.array(2), [2], [[2, 2]]])
def test_integer_types_of_bits(bits):
    np.testing.assert_array_equal(cubin.multibit(np.array([[-1.0, 3.0]]), bits), [[-1, 3]])


@pytest.mark.parametrize("bits", [True, 1.0, np.float32(1), np.array([True, False]), "2", None])
def test_bits_that_are_not_integers(bits):
    with pytest.raises(TypeError, match="bits"):
        cubin.multibit(np.ones(2), bits)


@pytest.mark.parametrize(
    ("bits", "got"),
    [
        (1.5, "1.5: a map"),
        (2.0, "2.0: pass 2"),
        (np.array(2.5), "float64"),
        (float("inf"), "float64"),
        ("2", "str"),
        (None, "NoneType"),
        ([None], "list"),
    ],
)
def test_bits_are_named_as_they_were_given(bits, got):
    with pytest.raises(TypeError, match=f"integer array, got {got}"):
        cubin.multibit(np.ones(2), bits)


@pytest.mark.parametrize("bits", [-1, 17, [1, -2], [17, 1], 2**70, -(2**70)])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=r"bits must lie in 0 \.\. 16, got"):
        cubin.multibit(np.ones(2), bits)


def test_maps_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"\(3,\).*\(2, 2\)"):
        cubin.multibit(np.ones((2, 2)), [1, 1, 1])
    with pytest.raises(ValueError, match=r"\(2, 2, 2\).*\(2, 2\)"):
        cubin.multibit(np.ones((2, 2)), np.ones((2, 2, 2), int))


def test_wrong_granularity():
    x = np.ones((4, 6))
    with pytest.raises(ValueError, match="exclude each other"):
        cubin.multibit(x, 1, group_size=3, channel_axis=0)
    with pytest.raises(ValueError, match="at least 1"):
        cubin.multibit(x, 1, group_size=0)
    with pytest.raises(ValueError, match="0-d"):
        cubin.multibit(1.0, 1, group_size=1)
    with pytest.raises(ValueError, match=r"channel_axis 2 .*\(4, 6\)"):
        cubin.multibit(x, 1, channel_axis=2)
    with pytest.raises(ValueError, match="twice"):
        cubin.multibit(x, 1, channel_axis=(0, -2))
    with pytest.raises(TypeError, match="channel_axis"):
        cubin.multibit(x, 1, channel_axis=1.0)
    with pytest.raises(TypeError, match="group_size"):
        cubin.multibit(x, 1, group_size=True)


def test_an_unknown_solver():
    with pytest.raises(ValueError, match=r"solver must be one of .*greedy.* got 'magic'"):
        cubin.quantize(np.ones(3), 1, solver="magic")


@pytest.mark.parametrize("granularity", [{}, {"channel_axis": 0}, {"channel_axis": 1}])
@pytest.mark.parametrize("mapped", [False, True])
def test_peak_memory_is_the_output_and_little_more(granularity, mapped):
    x = np.ones((4000, 4000), np.float32)
    bits = np.full(x.shape, 3, np.uint8) if mapped else 3
    cubin.multibit(x, bits, **granularity)  # which may compile loops
    cubin.memory.release()
    tracemalloc.start()
    try:
        cubin.multibit(x, bits, **granularity)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < x.nbytes + 64e6


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_peak_memory_in_place_is_that_of_blocks(dtype):
    x = np.random.default_rng(0).standard_normal((12_000, 1000), np.float32).astype(dtype)
    cubin.multibit(x, 2, channel_axis=0, out=x)  # which may compile loops
    tracemalloc.start()
    try:
        cubin.multibit(x, 2, channel_axis=0, out=x)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < x.nbytes


@pytest.mark.parametrize("axis", [None, 0, 1, 2, (0, 2)])
@pytest.mark.parametrize("mapped", [False, True])
def test_results_keep_the_memory_order(xp, host, rng, axis, mapped):
    x = rng.normal(size=(5, 4, 6)).astype(np.float32)
    bits = rng.integers(0, 4, x.shape) if mapped else 2
    expected = host(cubin.multibit(xp.asarray(x), bits, channel_axis=axis))
    for order in itertools.permutations(range(3)):
        stored = xp.asarray(np.ascontiguousarray(x.transpose(order)))
        view = stored.transpose(np.argsort(order).tolist())
        y = cubin.multibit(view, bits, channel_axis=axis)
        assert y.transpose(order).flags.c_contiguous
        # Where levels cancel, an element is off by the rounding of a scale.
        np.testing.assert_allclose(host(y), expected, rtol=2e-6, atol=1e-7)
        code = cubin.quantize(view, bits, channel_axis=axis)
        np.testing.assert_array_equal(host(code.dequantize()), host(y))
        assert cubin.sign(view).transpose(order).flags.c_contiguous
