"""Rows in one launch against the definition of the greedy levels, kernel by kernel."""

from __future__ import annotations

import numpy as np
import pytest
from ml_dtypes import bfloat16, finfo

import cubin
from cubin import solvers
from cubin.codes.levels import level_signs
from cubin.core import floats, primitives, teams
from cubin.core.bits import Bits
from cubin.core.primitives import FLOATS, raw
from cubin.core.rows import rows_of
from cubin.solvers import greedy, search_rows
from tests.exhaustive import few
from tests.registers import assert_registers_suffice

SHORT = [1, 7, 27, 31, 32, 33, 127, 128, 129]
LONG = [1000, 1023, 1024, 1025, 4096, 8191, 8192, 8193, 16383, 16384]
DTYPES = [np.float16, bfloat16, np.float32, np.float64]
ARCHITECTURES = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]


def sample(rng, shape, dtype, levels, mapped):
    x = rng.normal(0, 2, shape).astype(dtype)
    bits = rng.integers(0, levels + 1, shape).astype(np.uint8) if mapped else np.uint8(levels)
    return x, bits


def on(device, *values):
    return [a if isinstance(a, np.generic) else device.asarray(a) for a in values]


def encode(device, x, bits, levels):
    """What the kernel gives: scales (levels, rows, 1) and signs (levels, rows, n)."""
    scales = device.empty((levels, len(x), 1), floats.work_dtype(x.dtype))
    signs = device.empty((levels, *x.shape), np.int8)
    greedy.encode_rows(x, bits, levels, scales=scales, signs=signs)
    return scales.get(), signs.get()


def approximate(device, x, bits, levels):
    y = device.empty(x.shape, x.dtype)
    greedy.approximate_rows(x, bits, levels, y=y)
    return y.get()


def greedily(x, bits, levels, rows, y):
    """Have the greedy solver write the approximation of `x` to `y`."""
    solvers.approximate(x, Bits(bits, bits, levels), rows, y, solvers.SOLVERS["greedy"])


def signs_of(x, bits, scales):
    """The signs that the definition gives for these scales."""
    code = np.empty(x.shape, np.uint16)
    greedy.codes(x, bits, *scales, code=code)
    signs = np.empty((len(scales), *x.shape), np.int8)
    for level, sign in enumerate(signs):
        level_signs(code, bits, np.uint8(level), sign=sign)
    return signs


def check_scales(x, bits, scales):
    """Every scale is the mean of what the scales before it leave, exact to rounding."""
    m = np.abs(x.astype(scales.dtype))
    for level, scale in enumerate(scales):
        hot = np.broadcast_to(np.greater(bits, level), x.shape)
        count = hot.sum(axis=1, keepdims=True)
        total = np.where(hot, m, 0).sum(axis=1, keepdims=True, dtype=np.float64)
        mean = total / np.maximum(count, 1)
        precise = 4 * np.finfo(scales.dtype).eps
        tiny = np.finfo(scales.dtype).smallest_subnormal
        np.testing.assert_allclose(scale, mean, rtol=precise, atol=tiny)
        m = np.abs(m - scale)


def check(device, x, bits, levels):
    """Scales are right, and signs and approximation are exactly what they make of x."""
    inputs = on(device, x, bits)
    scales, signs = encode(device, *inputs, levels)
    check_scales(x, bits, scales)
    np.testing.assert_array_equal(signs, signs_of(x, bits, scales))
    y, wanted = approximate(device, *inputs, levels), np.empty_like(x)
    greedy.approximation(x, bits, *scales, y=wanted)
    np.testing.assert_array_equal(y, wanted)
    return scales, y


# ---------------------------------------------------------------- results


@pytest.mark.kernels
@pytest.mark.parametrize("mapped", [False, True], ids=["bits", "map"])
@pytest.mark.parametrize("length", few(SHORT + LONG, 1, 27, 33, 128, 1000, 4096, 16384))
def test_rows_of_every_length(length, mapped, device, rng):
    levels = 2 if length in LONG else 3
    x, bits = sample(rng, (2 if length in LONG else 37, length), np.float32, levels, mapped)
    check(device, x, bits, levels)


@pytest.mark.kernels
@pytest.mark.parametrize("mapped", [False, True], ids=["bits", "map"])
@pytest.mark.parametrize("length", few([27, 32, 250, 1024, 4099, 8192], 27, 1024, 4099))
@pytest.mark.parametrize("dtype", [np.float16, bfloat16, np.float64])
def test_rows_of_other_types(dtype, length, mapped, device, rng):
    x, bits = sample(rng, (3, length), dtype, 2, mapped)
    check(device, x, bits, 2)


@pytest.mark.kernels
@pytest.mark.parametrize("mapped", [False, True], ids=["bits", "map"])
@pytest.mark.parametrize("levels", few([1, 4, 5, 6, 7, 8, 9, 13, 16], 1, 4, 8, 16))
def test_any_number_of_levels(levels, mapped, device, rng):
    x, bits = sample(rng, (9, 64), np.float32, levels, mapped)
    check(device, x, bits, levels)


@pytest.mark.kernels
@pytest.mark.parametrize("levels", [1, 2, 5, 9])
def test_bits_beyond_the_levels_count_as_these(levels, device, rng):
    """Also where one kernel serves more levels than are wanted."""
    x, bits = sample(rng, (7, 40), np.float32, levels + 3, True)
    few = np.minimum(bits, levels).astype(np.uint8)
    clipped, beyond = (on(device, x, one) for one in (few, bits))
    for found, wanted in zip(
        encode(device, *beyond, levels), encode(device, *clipped, levels), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(
        approximate(device, *beyond, levels), approximate(device, *clipped, levels)
    )


@pytest.mark.kernels
def test_more_than_sixteen_bits_count_as_sixteen(device, rng):
    x, _ = sample(rng, (5, 40), np.float32, 1, False)
    bits = rng.choice(np.array([0, 3, 16, 17, 128, 144, 255], np.uint8), x.shape)
    check(device, x, bits, 16)


@pytest.mark.kernels
def test_a_row_ends_at_its_last_level(device, rng, host):
    """Levels that no element has cost nothing: a map of 2 bits among 16 levels."""
    ptx = pytest.importorskip("tests.ptx")
    x, bits = sample(rng, (4, 2048), np.float32, 2, True)
    y, few = on(device, x, bits)
    with ptx.launches() as launches:
        approximate(device, y, few, 16)
        approximate(device, y, device.asarray(bits * 8), 16)
    assert launches[0].instructions < launches[1].instructions / 4
    scales, _ = encode(device, y, few, 16)
    assert (scales[2:] == 0).all()


# ---------------------------------------------------------------- edge cases


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", few([3, 23, 27, 100, 1023, 3000], 27, 1023))
def test_equal_numbers_are_exact(length, dtype, device, rng):
    """Rows of one magnitude have it as their first scale to the last bit, also under maps."""
    values = rng.uniform(0.1, 10, (6, 1)).astype(np.float32).astype(dtype)
    values[0] = 1.5 + 2**-22  # of float32 numbers, three times this is the hardest to round
    x = values * rng.choice(np.array([-1, 1], dtype), (6, length))
    scales, _ = encode(device, *on(device, x, np.uint8(2)), 2)
    np.testing.assert_array_equal(scales[0], values)
    assert (scales[1] == 0).all()
    bits = rng.integers(0, 3, x.shape).astype(np.uint8)
    bits[:, 0] = 1
    scales, _ = encode(device, *on(device, x, bits), 2)
    np.testing.assert_array_equal(scales[0], values)


@pytest.mark.kernels
@pytest.mark.parametrize("mapped", [False, True], ids=["bits", "map"])
@pytest.mark.parametrize("length", [27, 128, 1025])
def test_nan_and_infinity_stay_in_their_row(length, mapped, device, rng):
    x, bits = sample(rng, (12, length), np.float32, 2, mapped)
    clean, _ = encode(device, *on(device, x, bits), 2)
    before = approximate(device, *on(device, x, bits), 2)
    if mapped:
        bits[[3, 5, 8], 2] = 2
    broken = x.copy()
    broken[3, 2], broken[5, 2], broken[8, 2] = np.nan, np.inf, -np.inf
    scales, signs = encode(device, *on(device, broken, bits), 2)
    y = approximate(device, *on(device, broken, bits), 2)
    rest = np.delete(np.arange(12), [3, 5, 8])
    np.testing.assert_array_equal(y[rest], before[rest])
    np.testing.assert_array_equal(scales[:, rest], clean[:, rest])
    wanted = np.empty_like(y)
    greedy.approximate_rows(broken, bits, 2, y=wanted)
    np.testing.assert_array_equal(y[[3, 5, 8]], wanted[[3, 5, 8]])
    np.testing.assert_array_equal(signs, signs_of(broken, bits, scales))


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_subnormals_and_the_largest(dtype, device):
    limits = finfo(dtype)
    tiny, large = limits.smallest_subnormal, limits.max
    rows = [
        [0.0, -0.0] * 4,
        [tiny, -tiny] * 4,
        [tiny, 0.0, -0.0, -3 * tiny, 0.0, 0.0, tiny, tiny],
        [large, -large, large / 2, large, large, large, large, -large],
    ]
    x = np.array(rows[: 3 if dtype == np.float64 else 4], dtype)
    for bits in (np.uint8(2), np.full(x.shape, 2, np.uint8)):
        scales, y = check(device, x, bits, 2)
        assert not scales[:, 0].any()
        assert not y[0].any()
        assert np.isfinite(scales).all()


@pytest.mark.kernels
def test_elements_without_bits_do_not_count(device):
    x = np.array([[1, np.nan, -3, np.inf], [np.nan] * 4], np.float32)
    bits = np.array([[1, 0, 2, 0], [0] * 4], np.uint8)
    scales, _ = encode(device, *on(device, x, bits), 2)
    y = approximate(device, *on(device, x, bits), 2)
    np.testing.assert_array_equal(scales[..., 0], [[2, 0], [1, 0]])
    np.testing.assert_array_equal(y, [[2, 0, -3, 0], [0] * 4])


@pytest.mark.kernels
@pytest.mark.parametrize("length", [5, 100, 1500])
def test_rows_without_bits_have_scales_of_zero(length, device, rng):
    x, _ = sample(rng, (3, length), np.float32, 2, False)
    scales, y = check(device, x, np.zeros(x.shape, np.uint8), 2)
    assert not scales.any()
    assert not y.any()


@pytest.mark.kernels
def test_the_same_row_gives_the_same_bits_wherever_it_stands(device, rng):
    for length in (27, 300, 2000):
        x, bits = sample(rng, (70, length), np.float32, 3, False)
        order = rng.permutation(len(x))
        first = approximate(device, *on(device, x, bits), 3)
        np.testing.assert_array_equal(
            approximate(device, *on(device, x[order], bits), 3), first[order]
        )


# ---------------------------------------------------------------- memory


def layouts(x):
    """The rows `x` in memory of other alignments and strides."""
    rows, length = x.shape
    wide = np.zeros((rows, length + 4), x.dtype)
    for start in range(4):
        view = wide[:, start : start + length]
        view[...] = x
        yield f"shifted by {start}", wide.copy(), np.s_[:, start : start + length]
    yield "from the end", x[::-1].copy(), np.s_[::-1]
    yield "every other row", np.repeat(x, 2, axis=0), np.s_[::2]
    yield "columns first", np.asfortranarray(x), np.s_[:]
    yield "elements from the end", x[:, ::-1].copy(), np.s_[:, ::-1]


@pytest.mark.kernels
@pytest.mark.parametrize("mapped", [False, True], ids=["bits", "map"])
def test_rows_wherever_they_lie(mapped, device, rng):
    x, bits = sample(rng, (5, 32), np.float32, 2, mapped)
    plain = approximate(device, *on(device, x, bits), 2)
    rows = rows_of(x.shape, 0)
    for name, memory, at in layouts(x):
        held, target = device.asarray(memory)[at], device.asarray(memory)[at]
        greedily(held, on(device, bits)[0], 2, rows, target)
        np.testing.assert_array_equal(target.get(), plain, err_msg=name)
        np.testing.assert_array_equal(held.get(), x, err_msg=name)
        greedily(held, on(device, bits)[0], 2, rows, held)
        np.testing.assert_array_equal(held.get(), plain, err_msg=name)


@pytest.mark.kernels
@pytest.mark.parametrize("axis", [0, 1, (0, 2), None])
def test_rows_of_any_axes(axis, device, rng):
    x, bits = sample(rng, (3, 4, 5), np.float32, 2, True)
    rows = rows_of(x.shape, axis)
    y, wanted = device.empty(x.shape, x.dtype), np.empty_like(x)
    greedily(*on(device, x, bits), 2, rows, y)
    greedily(x, bits, 2, rows, wanted)
    np.testing.assert_allclose(y.get(), wanted, rtol=0, atol=1e-6)


@pytest.mark.kernels
@pytest.mark.parametrize("solver", ["greedy", "alternating"])
@pytest.mark.parametrize(
    ("shape", "axis"), [((8, 1), 1), ((1, 8), 0), ((2, 3, 4), 1), ((4, 6), None)]
)
def test_signs_of_any_axes(shape, axis, solver, device, rng):
    """Among them axes of length 1, whose strides may be anything."""
    x, bits = sample(rng, shape, np.float32, 2, True)
    found = cubin.quantize(device.asarray(x), bits, channel_axis=axis, solver=solver)
    expected = cubin.quantize(x, bits, channel_axis=axis, solver=solver)
    np.testing.assert_array_equal(found.signs.get(), expected.signs)
    np.testing.assert_allclose(found.scales.get(), expected.scales, rtol=0, atol=1e-6)


@pytest.mark.kernels
def test_a_map_of_rows_and_a_single_row(device, rng):
    x, _ = sample(rng, (1, 48), np.float32, 2, False)
    check(device, x, np.uint8(2), 2)
    x, _ = sample(rng, (3, 48), np.float32, 2, False)
    per_row = np.array([[0], [1], [2]], np.uint8)
    y, wanted = device.empty(x.shape, x.dtype), np.empty_like(x)
    rows = rows_of(x.shape, 0)
    spread = device.broadcast_to(device.asarray(per_row), x.shape)
    greedily(device.asarray(x), spread, 2, rows, y)
    greedily(x, np.broadcast_to(per_row, x.shape), 2, rows, wanted)
    np.testing.assert_allclose(y.get(), wanted, rtol=0, atol=1e-6)


@pytest.mark.kernels
@pytest.mark.parametrize(("shape", "levels"), [((0, 5), 2), ((3, 0), 2), ((3, 5), 0)])
def test_nothing_to_do(shape, levels, device):
    x = device.ones(shape, np.float32)
    y = device.empty(shape, np.float32)
    rows = rows_of(shape, 0)
    greedily(x, np.uint8(levels), levels, rows, y)
    assert not y.get().any()
    bits = Bits(np.uint8(levels), np.uint8(levels), levels)
    scales, planes = solvers.encode(x, bits, rows, solvers.SOLVERS["greedy"])
    assert planes.size == 0
    assert scales.shape == (levels, shape[0])
    assert not scales.get().any()


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("shape", "dtype", "mapped"),
    [
        ((50, 27), np.float32, False),
        ((40, 128), np.float32, True),
        ((6, 1000), np.float16, False),
        ((3, 4096), np.float32, True),
        ((2, 16384), np.float32, False),
        ((2, 8192), np.float64, False),
    ],
)
def test_one_launch_reads_x_once_and_writes_the_result_once(shape, dtype, mapped, device, rng):
    ptx = pytest.importorskip("tests.ptx")
    x, bits = sample(rng, shape, dtype, 2, mapped)
    held, map_ = on(device, x, bits)
    y = device.empty(shape, dtype)
    rows = rows_of(shape, 0)
    with ptx.launches() as launches:
        greedily(held, map_, 2, rows, y)
    (launch,) = launches
    assert launch.kernel.startswith("cubin_approximate_rows<")
    assert launch.read == launch.read_unique == x.nbytes + (x.size if mapped else 0)
    assert launch.written == launch.written_unique == x.nbytes

    with ptx.launches() as launches:
        scales, planes = solvers.encode(held, Bits(map_, map_, 2), rows, solvers.SOLVERS["greedy"])
    launch, packing, *rounding = launches
    # Scales of narrow floats are widened and rounded once, by kernels of their own.
    assert len(rounding) == 2 * (dtype == np.float16)
    assert launch.read == launch.read_unique == x.nbytes + (x.size if mapped else 0)
    written = 4 * scales.size if dtype == np.float16 else scales.nbytes
    assert launch.written == launch.written_unique == 2 * x.size + written
    assert packing.kernel.startswith("cubin_pack_signs<")
    assert packing.read == packing.read_unique == 2 * x.size
    assert packing.written == packing.written_unique == planes.nbytes


@pytest.mark.kernels
def test_rows_too_long_for_a_block_take_passes(device, rng):
    ptx = pytest.importorskip("tests.ptx")
    x, _ = sample(rng, (1, 32769), np.float32, 1, False)
    y, wanted = device.empty(x.shape, x.dtype), np.empty_like(x)
    rows = rows_of(x.shape, 0)
    with ptx.launches() as launches:
        greedily(device.asarray(x), np.uint8(1), 1, rows, y)
    assert len(launches) > 1
    greedily(x, np.uint8(1), 1, rows, wanted)
    np.testing.assert_allclose(y.get(), wanted, rtol=1e-6)
    with pytest.raises(ValueError, match="no team holds 1 levels"):
        teams.RowLaunch(teams.GREEDY, 16)(device.asarray(x), np.uint8(1), 1, y)


@pytest.mark.kernels
def test_a_long_row_without_codes_at_a_level(device, rng):
    x, _ = sample(rng, (2, 32769), np.float32, 1, False)
    bits = np.repeat(np.array([[1], [2]], np.uint8), x.shape[1], axis=1)
    code = cubin.quantize(device.asarray(x), bits, channel_axis=0)
    check_scales(x, bits, code.scales.get()[..., None])
    assert code.scales.get()[1, 0] == 0


# ---------------------------------------------------------------- geometry


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_team_holds_its_row_and_wastes_little(dtype):
    dtype = np.dtype(dtype)
    longest = {2: 8192, 4: 16384, 8: 8192}
    for levels, mapped in ((1, False), (4, False), (5, False), (1, True)):
        for length in range(1, 33000):
            team = teams.team_of(length, dtype, levels, mapped)
            if team is None:
                assert length > longest[dtype.itemsize]
                continue
            assert length % team.pack == 0
            assert team.pack * dtype.itemsize <= 16
            slots = team.threads * team.capacity
            assert slots >= length
            assert team.capacity % max(team.pack, 4) == 0
            assert team.threads <= 1024
            assert length < 16 or length >= slots / 2
    assert teams.team_of(0, dtype, 1, False) is None
    assert teams.team_of(1, dtype, 0, False) is None


def templates(length, dtype, levels, mapped, room):
    """Those that rows of one length take, wherever they lie."""
    for aligned in (1, 2, 4, 8, 16):
        yield teams._plan.__wrapped__(
            (2, length), dtype, levels, mapped, room, aligned, *[length] * (2 + mapped)
        )[0]


@pytest.mark.parametrize("room", [teams.GREEDY, search_rows.ROOM], ids=["greedy", "teams"])
@pytest.mark.parametrize("mapped", [False, True], ids=["bits", "map"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_templates_serve_all_lengths_and_alignments(dtype, mapped, room):
    dtype = np.dtype(dtype)
    for levels in (1, 16) if room is teams.GREEDY else (1,):
        found = {
            template
            for length in range(1, 32769)
            if teams.team_of(length, dtype, levels, mapped, room)
            for template in templates(length, dtype, levels, mapped, room)
        }
        assert 0 < len(found) <= teams.MOST_TEMPLATES
        aligned = {
            list(templates(length, dtype, levels, mapped, room))[-1]
            for length in range(16 // dtype.itemsize, 32769, 16 // dtype.itemsize)
            if teams.team_of(length, dtype, levels, mapped, room)
        }
        assert 0 < len(aligned) <= teams.MOST_ALIGNED
        by_levels = {next(templates(64, dtype, n, mapped, room))[5] for n in range(1, 17)}
        assert by_levels == set(teams.LEVELS)


HEAVIEST = [
    (greedy.approximate_rows, ("Tile<8>", "float", 4, 4, 16, 4, "false")),
    (greedy.approximate_rows, ("Tile<32>", "float", 4, 4, 32, 4, "false")),
    (greedy.approximate_rows, ("Block", "float", 4, 4, 32, 4, "false")),
    (greedy.approximate_rows, ("Block", "float16", 8, 8, 32, 4, "false")),
    (greedy.approximate_rows, ("Block", "bfloat16", 8, 8, 32, 4, "false")),
    (greedy.approximate_rows, ("Block", "float", 1, 1, 16, 8, "true")),
    (greedy.approximate_rows, ("Block", "double", 2, 2, 12, 4, "false")),
    (greedy.approximate_rows, ("Tile<32>", "double", 1, 1, 8, 8, "false")),
    (greedy.encode_rows, ("Block", "float", 4, 4, 32, 4, "false")),
    (greedy.encode_rows, ("Block", "float", 1, 1, 16, 8, "true")),
]
"""The kernels that take the most registers, of every kind of team."""


@pytest.mark.kernels
@pytest.mark.parametrize("arch", few(ARCHITECTURES, "sm_90"))
def test_registers_hold_the_row(arch, device, monkeypatch):
    """No spills, and 1024 threads on a multiprocessor of 65536 registers."""
    names = [kernel.name_of(template) for kernel, template in HEAVIEST]
    assert_registers_suffice(arch, device, monkeypatch, HEAVIEST[0][0].source, names)


# ---------------------------------------------------------------- the decorator


def declare(inputs, outputs, code):
    def halves(x, n, *, y):
        """Nothing: only its parameters matter."""

    try:
        launch = teams.RowLaunch(teams.GREEDY, 16)
        return raw(inputs, outputs, code=code, launch=launch, types=FLOATS)(halves)
    finally:
        primitives.REGISTRY.pop("halves", None)


def test_a_raw_kernel_has_the_declared_parameters():
    code = "__global__ void cubin_halves(\n    const T*  x, unsigned char* y, int length) {}"
    primitive = declare("T x, static int n", "uint8 y", code)
    assert primitive.name_of(("float", 3)) == "cubin_halves<float, 3>"
    for inputs, outputs in (
        ("T x, static int n", "int8 y"),
        ("W x, static int n", "uint8 y"),
        ("T x, int n", "uint8 y"),
    ):
        with pytest.raises(TypeError, match="parameters of cubin_halves must start with"):
            declare(inputs, outputs, code)
    with pytest.raises(TypeError, match="must start with"):
        declare("T x, static int n", "uint8 y", "__global__ void cubin_other() {}")
    with pytest.raises(TypeError, match="the kernel takes"):
        declare("T y, static int n", "uint8 x", code)
