"""Refined and alternating rows in one launch against the definition on sorted magnitudes."""

from __future__ import annotations

import numpy as np
import pytest
from ml_dtypes import bfloat16, finfo

import cubin
from cubin.core import floats
from cubin.solvers import search_rows
from tests.exhaustive import few
from tests.reference import room_for_signs, signs_of
from tests.registers import assert_registers_suffice

pytestmark = pytest.mark.kernels

RULES = {
    "refined": (True, 0),
    "greedy codes": (False, 0),
    "once": (False, 1),
    "twice": (False, 2),
    "converged": (False, 1001),
}
TYPES = [np.float16, bfloat16, np.float32, np.float64]
ARCHITECTURES = ["sm_70", "sm_80", "sm_90", "sm_100", "sm_120"]


def sample(rng, shape, dtype, levels, mapped):
    x = rng.normal(0, 2, shape).astype(dtype)
    bits = rng.integers(0, levels + 1, shape).astype(np.uint8) if mapped else np.uint8(levels)
    return x, bits


def on(library, *values):
    return [a if isinstance(a, np.generic) else library.asarray(a) for a in values]


def solve(library, x, bits, levels, rule):
    """Scales (levels, rows), signs (levels, rows, n) and approximation."""
    scales = library.empty((levels, len(x), 1), floats.work_dtype(x.dtype))
    signs = library.empty((levels, *x.shape), np.int8)
    if library is np:
        signs = room_for_signs(levels, x.shape)
    y = library.empty(x.shape, x.dtype)
    inputs = on(library, x, bits)
    search_rows.solve_rows(*inputs, levels, *rule, scales=scales, signs=signs)
    search_rows.reconstruct_rows(*inputs, levels, *rule, y=y)
    if library is np:
        return scales[..., 0], signs_of(signs, bits, x.shape), y
    return tuple(a.get() for a in (scales[..., 0], signs, y))


def check(device, x, bits, levels, rule, differing=0):
    """Scales, signs and approximation are those of the definition, but for some rows.

    Where a sum's rounding decides a sign or the last iteration, a row may end up elsewhere.
    """
    scales, signs, y = solve(device, x, bits, levels, rule)
    expected = solve(np, x, bits, levels, rule)
    work = np.finfo(floats.work_dtype(x.dtype)).eps
    top = np.abs(x).max(axis=1).astype(np.float64)
    close = (np.abs(scales - expected[0]) <= 16 * work * top).all(axis=0)
    assert (~close).sum() <= differing
    np.testing.assert_array_equal(signs[:, close], expected[1][:, close])
    error = np.abs(y[close].astype(np.float64) - expected[2][close])
    stored = 64 * finfo(x.dtype).eps
    assert (error <= stored * top[close, None]).all()
    return scales, signs, y


@pytest.mark.parametrize("mapped", [False, True], ids=["bits", "map"])
@pytest.mark.parametrize("levels", few([1, 2, 3, 4], 1, 3))
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rules(rule, levels, mapped, device, rng):
    x, bits = sample(rng, (13, 27), np.float32, levels, mapped)
    check(device, x, bits, levels, rule, differing=1)


@pytest.mark.parametrize("mapped", [False, True], ids=["bits", "map"])
def test_cuts_do_not_pass_edges(mapped, device):
    """Refined rows of which some cuts would lie beyond the edges that there are."""
    x = [
        [99, 0, 0.8, -2.3, -0.3, 0, -0.3, -5.6, 0.4, 0, 0],
        [-0.5, -1.2, 0, 0, 1.4, 1, 0, -0.2, 0, 0.1, 99],
        [0, 0, 0, -50.5, -2.1, -0.3, 3.5, 0.6, 0, 0, -4.2],
        [-2, 0.4, 2.7, 2.8, -22.3, 0, -0.1, 0.1, -0.3, -0.1, 0],
        [16.2, 0.1, 10.7, -0.7, -3.9, 0, 4.5, -3.8, 4.5, 4, 0],
    ]
    x, bits = np.array(x, np.float32), np.uint8(4)
    if mapped:
        x = [
            [1.2, 4.85, 0.06, -1.12, -0.42, -0.29, 0.23, -0.08, -0.25, 0, 0],
            [0.18, 1.26, -0.56, 0.8, 1.39, 0.7, -1.05, 1.49, 0.45, 0, 0],
            [0.1, -5.2, 25.5, -0.2, 0.3, 0, -0.1, 0, 0, 2.5, -4.8],
            [0, 49.4, 0.1, 0, -0.1, -0.2, 0, -1.2, -9.4, -0.2, -1.5],
        ]
        bits = [
            [0, 3, 3, 0, 2, 0, 0, 2, 3, 0, 0],
            [1, 1, 1, 0, 0, 2, 1, 0, 1, 0, 0],
            [4, 4, 1, 3, 2, 1, 1, 0, 0, 0, 0],
            [2, 4, 1, 2, 2, 0, 4, 0, 4, 2, 2],
        ]
        x, bits = np.array(x, np.float32), np.array(bits, np.uint8)
    check(device, x, bits, 4, (True, 0))


def test_a_level_of_one_element(device):
    """Its mean leaves nothing of the element, so that the next sign is -1."""
    x, bits = np.array([[1, 3], [-1, -3]], np.float32), np.array([[1, 3], [1, 3]], np.uint8)
    _, signs, _ = check(device, x, bits, 3, (False, 0))
    np.testing.assert_array_equal(signs[:, :, 1], [[1, -1], [1, -1], [-1, 1]])


def test_scales_that_least_squares_makes_negative(device):
    """Under maps a level may turn round; its codes, both of them, turn with it."""
    x = np.array([
        [0.8, -0.1, 23.5, -2.6, 0, 0.5, -37, -0.3, 0, -0.9, 2.1],
        [0.8, -0.1, -20.9, 2.7, 0, 0.1, 0, 0, 0, 0.3, 0.2],
        [1.3, 0, 0, 0.8, -0.5, 0, -27.5, -4.5, 0.6, 4.5, 0.1],
    ], np.float32)  # fmt: skip
    bits = np.array([
        [3, 1, 1, 1, 3, 3, 4, 0, 0, 2, 3],
        [2, 1, 3, 0, 4, 1, 0, 2, 0, 0, 1],
        [4, 1, 4, 1, 3, 1, 3, 1, 3, 2, 3],
    ], np.uint8)  # fmt: skip
    check(device, x, bits, 4, (True, 0))


@pytest.mark.parametrize("mapped", [False, True], ids=["bits", "map"])
@pytest.mark.parametrize("length", few([1, 33, 128, 512, 2049, 4096], 1, 33, 512, 4096))
def test_rows_of_every_length(length, mapped, device, rng):
    x, bits = sample(rng, (9 if length < 1000 else 2, length), np.float32, 3, mapped)
    check(device, x, bits, 3, (False, 2), differing=1)


def test_every_warp_knows_the_largest(device, rng):
    """A row of 1024 threads, with one far outlier: in the first, some other or the last warp."""
    x, bits = sample(rng, (3, 16384), np.float32, 2, False)
    x[[0, 1, 2], [3, 700, -1]] = 1e6
    check(device, x, bits, 2, (True, 0))
    x[1, -1] = np.nan
    scales, _, _ = solve(device, x, bits, 2, (True, 0))
    np.testing.assert_array_equal(np.isnan(scales), [[False, True, False]] * 2)


@pytest.mark.parametrize("mapped", [False, True], ids=["bits", "map"])
@pytest.mark.parametrize(
    ("dtype", "length"), [(np.float16, 64), (np.float64, 50), (np.float64, 1025)]
)
def test_rows_of_other_types(dtype, length, mapped, device, rng):
    x, bits = sample(rng, (5, length), dtype, 2, mapped)
    check(device, x, bits, 2, (False, 2))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rule", [(True, 0), (False, 2)])
def test_degenerate_rows(rule, dtype, device):
    """Fewer magnitudes than levels: exact where a code can be, never NaN."""
    limits = finfo(dtype)
    tiny, large = limits.smallest_subnormal, limits.max
    pairs = [[0.0, -0.0], [0.3, -0.3], [tiny, -tiny], [large, -large], [1, 3]]
    x = np.tile(np.array(pairs, dtype), 4)
    for bits in (np.uint8(3), np.full(x.shape, 3, np.uint8)):
        scales, _, y = solve(device, x, bits, 3, rule)
        assert np.isfinite(scales).all()
        np.testing.assert_array_equal(y, x)
        np.testing.assert_array_equal(scales[1:, :4], 0)


@pytest.mark.parametrize("length", few([929, 1005, 1019], 929))
def test_pivots_of_rounding_errors_count_as_none(length, device, rng):
    """Two magnitudes: the signs of the third level depend on the others, but for rounding."""
    x = rng.choice(np.array([1.1, -1.1, 3.3], np.float32), (4, length))
    scales, _, y = solve(device, x, np.uint8(3), 3, (True, 0))
    assert not scales[2].any()
    np.testing.assert_allclose(y, x, rtol=1e-6)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_magnitude_on_an_edge_lies_below_it(dtype, device):
    """The residual of 2 after one level is 0, which has the sign -1."""
    x = np.array([[2, 1, 3, 2, -2, -2, 1, 3, 2]], dtype)
    for rule in ((True, 0), (False, 0), (False, 1)):
        _, signs, _ = check(device, x, np.uint8(2), 2, rule)
        np.testing.assert_array_equal(signs[1], [[-1, -1, 1, -1, 1, 1, -1, 1, -1]])


@pytest.mark.parametrize("dtype", TYPES)
def test_results_follow_the_scale(dtype, device, rng):
    """x * 2^j has scales * 2^j, to the last bit, and the same signs."""
    x, bits = sample(rng, (6, 27), dtype, 3, False)
    scales, signs, y = solve(device, x, bits, 3, (False, 2))
    far = 2.0**4 if dtype == np.float16 else 2.0**100
    found = solve(device, (x * dtype(far)).astype(dtype), bits, 3, (False, 2))
    np.testing.assert_array_equal(found[0], scales * scales.dtype.type(far))
    np.testing.assert_array_equal(found[1], signs)
    np.testing.assert_array_equal(found[2], y * dtype(far))


@pytest.mark.parametrize("mapped", [False, True], ids=["bits", "map"])
@pytest.mark.parametrize(
    ("dtype", "length"), [(np.float32, 27), (np.float32, 1025), (np.float64, 27)]
)
def test_nan_and_infinity_stay_in_their_row(dtype, length, mapped, device, rng):
    x, bits = sample(rng, (5, length), dtype, 3, mapped)
    if mapped:
        bits[:, 2] = 2
    clean = solve(device, x, bits, 3, (False, 2))
    payload = np.array(np.inf, dtype).view(f"u{x.itemsize}") + 1
    x[1, 2], x[3, 2] = payload.view(dtype), -np.inf
    scales, signs, y = solve(device, x, bits, 3, (False, 2))
    expected = solve(np, x, bits, 3, (False, 2))
    assert np.isnan(scales[:, [1, 3]]).all()
    np.testing.assert_array_equal(signs[:, [1, 3]], expected[1][:, [1, 3]])
    np.testing.assert_array_equal(y[[1, 3]], expected[2][[1, 3]])
    np.testing.assert_array_equal(y[[0, 2, 4]], clean[2][[0, 2, 4]])
    for found, before in ((scales, clean[0]), (signs, clean[1])):
        np.testing.assert_array_equal(found[:, [0, 2, 4]], before[:, [0, 2, 4]])


def test_elements_without_bits_do_not_count(device):
    x = np.array([[1, np.nan, -3, np.inf, 2, -8, 1, 4, 5]], np.float32)
    bits = np.array([[1, 0, 2, 0, 2, 2, 1, 0, 3]], np.uint8)
    coded = [0, 2, 4, 5, 6, 7, 8]
    _, signs, y = check(device, x[:, coded], bits[:, coded], 3, (False, 2))
    scales, whole, full = solve(device, x, bits, 3, (False, 2))
    assert np.isfinite(scales).all()
    np.testing.assert_array_equal(whole[..., coded], signs)
    np.testing.assert_array_equal(whole[..., [1, 3]], 0)
    np.testing.assert_array_equal(full[:, coded], y)
    np.testing.assert_array_equal(full[:, [1, 3]], 0)


def test_elements_without_bits_do_not_set_the_unit(device, rng):
    """Beside them, squares of the others would vanish."""
    x, bits = sample(rng, (3, 27), np.float64, 3, True)
    expected = solve(device, x, bits, 3, (False, 5))
    far = 2.0**-700
    found = solve(device, np.where(bits, x * far, 1.0), bits, 3, (False, 5))
    for one, other in zip(found, (expected[0] * far, expected[1], expected[2] * far), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("rule", [(True, 0), (False, 2)])
@pytest.mark.parametrize("length", [27, 600])
def test_bits_beyond_the_levels_count_as_these(length, rule, device, rng):
    x, bits = sample(rng, (3, length), np.float32, 2, True)
    wanted = solve(device, x, bits, 2, rule)
    beyond = np.where(bits == 2, rng.choice(np.array([2, 3, 16, 255]), bits.shape), bits)
    for found, one in zip(solve(device, x, beyond.astype(np.uint8), 2, rule), wanted, strict=True):
        np.testing.assert_array_equal(found, one)


@pytest.mark.parametrize("mapped", [False, True], ids=["bits", "map"])
@pytest.mark.parametrize("length", few([1, 27, 33, 63, 129, 1001], 27, 129))
def test_what_stands_beyond_a_row_of_float16_does_not_count(length, mapped, device, rng):
    x, bits = sample(rng, (5, length), np.float16, 2, mapped)
    check(device, x, bits, 2, (True, 0), differing=1)
    check(device, x, bits, 2, (False, 2), differing=1)


# ---------------------------------------------------------------- in use


@pytest.mark.parametrize(
    ("shape", "levels", "mapped"),
    [((40, 27), 3, False), ((12, 32), 2, True), ((2, 4096), 3, False)],
)
@pytest.mark.parametrize("solver", ["refined", "alternating"])
def test_one_launch_reads_x_once_and_writes_the_result_once(
    solver, shape, levels, mapped, device, rng
):
    ptx = pytest.importorskip("tests.ptx")
    x, bits = sample(rng, shape, np.float32, levels, mapped)
    held = device.asarray(x)
    y = device.empty(shape, np.float32)
    with ptx.launches() as launches:
        cubin.multibit(
            held, int(bits) if not mapped else bits, channel_axis=0, solver=solver, out=y
        )
    (launch,) = (one for one in launches if "reconstruct_rows" in one.kernel)
    assert launch.kernel.startswith("cubin_reconstruct_rows<")
    assert mapped or len(launches) == 1
    assert launch.read == launch.read_unique == x.nbytes + (x.size if mapped else 0)
    assert launch.written == launch.written_unique == x.nbytes
    with ptx.launches() as launches:
        code = cubin.quantize(held, bits if mapped else int(bits), channel_axis=0, solver=solver)
    (launch,) = (one for one in launches if "solve_rows" in one.kernel)
    assert launch.read == launch.read_unique == x.nbytes + (x.size if mapped else 0)
    assert launch.written == launch.written_unique == levels * x.size + code.scales.nbytes
    np.testing.assert_array_equal(code.dequantize().get(), y.get())


@pytest.mark.parametrize("axis", [1, (0, 2)])
def test_rows_of_any_axes(axis, device, rng):
    x, bits = sample(rng, (3, 4, 5), np.float64, 3, True)
    found = cubin.multibit(device.asarray(x), bits, channel_axis=axis, solver="alternating")
    expected = cubin.multibit(x, bits, channel_axis=axis, solver="alternating")
    np.testing.assert_allclose(found.get(), expected, rtol=0, atol=1e-12)


def test_what_no_team_holds_is_sorted(device, rng):
    ptx = pytest.importorskip("tests.ptx")
    x = rng.normal(size=(1, 16385)).astype(np.float32)
    for columns, bits in ((16385, 2), (100, 5)):
        part = device.asarray(x[:, :columns])
        with ptx.launches() as launches:
            found = cubin.multibit(part, bits, channel_axis=0, solver="refined")
        assert not any("reconstruct_rows" in launch.kernel for launch in launches)
        expected = cubin.multibit(x[:, :columns], bits, channel_axis=0, solver="refined")
        np.testing.assert_allclose(found.get(), expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- registers

HEAVIEST = [
    ("Tile<8>", "float", 4, 4, 16, 4, "false"),
    ("Block", "float", 4, 4, 16, 4, "false"),
    ("Block", "float", 1, 1, 12, 4, "false"),
    ("Block", "float", 1, 1, 8, 4, "true"),
    ("Block", "float16", 8, 8, 16, 4, "false"),
    ("Block", "bfloat16", 8, 8, 16, 4, "false"),
    ("Block", "double", 2, 2, 8, 4, "false"),
    ("Tile<32>", "double", 1, 1, 4, 4, "true"),
]
"""The kernels that take the most registers, of every kind of team."""


@pytest.mark.parametrize("arch", few(ARCHITECTURES, "sm_90"))
def test_registers_hold_the_row(arch, device, monkeypatch):
    """No spills, and 1024 threads on a multiprocessor of 65536 registers."""
    names = [search_rows.solve_rows.name_of(template) for template in HEAVIEST]
    assert_registers_suffice(arch, device, monkeypatch, search_rows.solve_rows.source, names)
