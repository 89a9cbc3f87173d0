"""The compiled loops against the primitives they mirror, and all tests of multibit on them."""

from __future__ import annotations

import platform
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

import cubin
from cubin import arrays, blocks, code, greedy, memory
from cubin.code import level_signs
from cubin.encoding import Encoding
from cubin.signs import as_integers
from cubin.solvers import search
from cubin.solvers.fits import Fit
from cubin.solvers.magnitudes import Magnitudes
from tests import test_multibit, test_signs

pytest.importorskip("numba")

import numba

from cubin import compiled
from cubin.solvers import loops

# The same test bodies, on the loops whatever the size.
globals().update(
    {name: body for name, body in vars(test_multibit).items() if name.startswith("test_")}
)

WORK = ["float32", "float64"]


@pytest.fixture
def xp():
    return np


@pytest.fixture(autouse=True)
def loops_for_any_size(monkeypatch):
    monkeypatch.setattr(blocks, "COMPILED", 0)


def samples(rng, shape, dtype, levels, mapped):
    x = rng.normal(size=shape).astype(dtype)
    x.ravel()[:: max(1, x.size // 3)] = [0, -0.0, 1, 0][: len(x.ravel()[:: max(1, x.size // 3)])]
    return x, rng.integers(0, levels + 1, shape).astype(np.uint8) if mapped else np.uint8(levels)


@pytest.mark.parametrize("dtype", ["float16", *WORK])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5, 8, 11, 16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (40, 27), (3, 128), (2, 1001)])
def test_loops_equal_the_primitives(rng, dtype, mapped, levels, shape):
    x, bits = samples(rng, shape, dtype, levels, mapped)
    work = arrays.work_dtype(np.dtype(dtype))
    scales = greedy._level_scales(x, bits, levels)
    found = compiled.level_scales(x, bits, levels)
    tolerance = 4 * np.finfo(work).eps
    largest = float(np.abs(x).max())
    for one, other in zip(found, scales, strict=True):
        assert one.dtype == other.dtype == work
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * largest)
    # With the scales given there is nothing to round differently.
    expected, y = np.empty(shape, dtype), np.empty(shape, dtype)
    greedy.approximation(x, bits, *scales, y=expected)
    compiled.approximation(x, bits, *scales, y=y)
    np.testing.assert_array_equal(y, expected)
    expected, code = np.empty(shape, np.uint16), np.empty(shape, np.uint16)
    greedy.codes(x, bits, *scales, code=expected)
    compiled.codes(x, bits, *scales, code=code)
    np.testing.assert_array_equal(code, expected)


@pytest.mark.parametrize("dtype", ["float16", *WORK])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5, 8, 11, 16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (40, 27), (3, 128), (2, 1025)])
def test_whole_rows_at_once_equal_the_steps(rng, dtype, mapped, levels, shape):
    x, bits = samples(rng, shape, dtype, levels, mapped)
    x[-1, 0] = np.nan
    found = compiled.level_scales(x, bits, levels)
    expected, y = np.empty(shape, dtype), np.empty(shape, dtype)
    greedy.approximation(x, bits, *found, y=expected)
    compiled.approximate_rows(x, bits, levels, y=y)
    np.testing.assert_array_equal(y, expected)
    code, sign = np.empty(shape, np.uint16), np.empty(shape, np.int8)
    greedy.codes(x, bits, *found, code=code)
    scales = np.empty((levels, len(x), 1), arrays.work_dtype(np.dtype(dtype)))
    signs = np.empty((levels, *shape), np.int8)
    compiled.encode_rows(x, bits, levels, scales=scales, signs=signs)
    np.testing.assert_array_equal(scales, found)
    for level in range(levels):
        level_signs(code, bits, np.uint8(level), sign=sign)
        np.testing.assert_array_equal(signs[level], sign)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("levels", range(10))
def test_sums_of_a_piece(rng, mapped, levels):
    x, _ = samples(rng, (1, 1234), np.float32, 0, False)
    bits = rng.integers(0, 11, x.shape).astype(np.uint8) if mapped else np.uint8(10)
    scales = [np.full((1, 1), 0.7**level, np.float32) for level in range(levels)]
    total, count = np.empty((2, 1, 1)), np.empty((2, 1, 1), np.int64)
    for module, at in ((greedy, 0), (compiled, 1)):
        module.level_sums(x, bits, *scales, total=total[at], count=count[at])
    # Four are added in float32, which rounds twice.
    np.testing.assert_allclose(total[1], total[0], rtol=2 * 2.0**-24)
    assert count[0] == count[1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("levels", [1, 3, 7])
def test_what_is_not_finite(rng, bad, levels):
    x = rng.normal(size=(3, 100)).astype(np.float32)
    x[1, 5] = bad
    bits = np.full(x.shape, levels, np.uint8)
    for given in (np.uint8(levels), bits):
        with np.errstate(all="ignore"):
            scales = np.stack(greedy._level_scales(x, given, levels))
        found = np.stack(compiled.level_scales(x, given, levels))
        np.testing.assert_allclose(found, scales, rtol=1e-6)
        y, expected = np.empty_like(x), np.empty_like(x)
        greedy.approximation(x, given, *scales, y=expected)
        compiled.approximation(x, given, *scales, y=y)
        np.testing.assert_array_equal(y, expected)
    bits[1, 5] = 0
    assert np.isfinite(np.stack(compiled.level_scales(x, bits, levels))).all()


def test_constant_rows_are_exact():
    x = np.full((3, 1001), 0.3, np.float32) * np.array([[1], [3], [0]], np.float32)
    first, second = compiled.level_scales(x, np.uint8(2), 2)
    np.testing.assert_array_equal(first, x[:, :1])
    np.testing.assert_array_equal(second, 0)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("levels", [1, 2, 3, 4, 9])
def test_long_rows(rng, levels, mapped):
    x = rng.normal(size=(6, 1027)).astype(np.float32)
    x[0] = 0.3
    x[1] *= 3e38 / np.abs(x[1]).max()
    x[2, 5] = np.nan
    x[3, -1] = np.inf
    x[5, 7] = x[5, -1] = np.nan
    bits = np.full(x.shape, levels, np.uint8)
    if mapped:
        bits[:, 10:-10] = rng.integers(0, levels + 1, (6, x.shape[1] - 20))
        bits[5, [7, -1]] = 0
    given = bits if mapped else np.uint8(levels)
    with np.errstate(all="ignore"):
        expected = np.stack(greedy._level_scales(x, given, levels))
    found = np.stack(compiled.level_scales(x, given, levels))
    np.testing.assert_array_equal(found[:, 0], [[x[0, 0]], *[[0]] * (levels - 1)])
    assert np.isfinite(found[:, [1, 4]]).all()
    assert np.isfinite(found[:, 5]).all() == mapped
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("lay_out", [np.asfortranarray, lambda x: x[::-1, ::-1], np.asarray])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_whole_arrays(rng, monkeypatch, lay_out, axis):
    x = lay_out(rng.normal(size=(300, 1000)).astype(np.float32))
    bits = rng.integers(0, 6, x.shape).astype(np.uint8)
    rows = arrays.rows_of(x.shape, axis)

    def run(bits):
        y = np.empty_like(x)
        greedy.approximate(x, bits, 5, rows, y)
        encoding = Encoding(x, 5, rows)
        greedy.encode(x, bits, encoding)
        return y, encoding.signs

    for given in (np.uint8(5), bits):
        y, signs = run(given)
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "COMPILED", x.size + 1)
            expected, expected_signs = run(given)
        close = np.isclose(y, expected, rtol=0, atol=1e-5)
        assert close.mean() > 0.9999  # a residual that is rounding error has any sign
        np.testing.assert_array_equal(signs[:, close], expected_signs[:, close])


def test_in_place(rng):
    x = rng.normal(size=(20, 500)).astype(np.float32)
    rows = arrays.rows_of(x.shape, 0)
    y = np.empty_like(x)
    greedy.approximate(x, np.uint8(3), 3, rows, y)
    greedy.approximate(x, np.uint8(3), 3, rows, x)
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dtype", ["float16", *WORK])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("levels", [1, 4, 7])
def test_decoding(rng, dtype, mapped, levels):
    bits = rng.integers(0, levels + 1, (5, 300)).astype(np.uint8) if mapped else np.uint8(levels)
    packed = rng.integers(0, 1 << levels, (5, 300)).astype(np.uint16)
    work = arrays.work_dtype(np.dtype(dtype))
    scales = [rng.uniform(size=(5, 1)).astype(work) for _ in range(levels)]
    y, expected = np.empty((5, 300), dtype), np.empty((5, 300), dtype)
    code.decode(packed, bits, *scales, y=expected)
    compiled.decode(packed, bits, *scales, y=y)
    np.testing.assert_array_equal(y, expected)


# ---------------------------------------------------------------- solvers


def solved(solver, x, levels):
    """Scales and codes by the definition and by the compiled form."""
    magnitudes = Magnitudes(x, np.uint8(levels), levels, None)
    expected = Fit(magnitudes, solver(magnitudes, levels), levels)
    found = loops.Fit(x, levels, *search.rule(solver))
    codes = (fit.codes(x, np.uint8(levels)) for fit in (expected, found))
    return tuple(zip((np.stack(expected.scales), found.scales), codes, strict=True))


SOLVERS = [search.refined, *(partial(search.alternating, iterations=t) for t in (0, 1, 2, None))]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("levels", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_solvers_equal_their_definition(rng, solver, levels, dtype):
    x = rng.normal(size=(60, 500)).astype(dtype)
    x[0] = 0
    x[1] = -0.3
    x[2] = rng.integers(-3, 4, 500)
    x[3] *= 1e-3 if dtype == "float16" else 1e-38
    x[4] *= 1e3 if dtype == "float16" else 1e37
    (expected, expected_codes), (scales, codes) = solved(solver, x, levels)
    top = np.abs(x).max(axis=1, keepdims=True).astype(np.float32)
    off = np.abs(np.stack(scales) - expected) > 1e-6 * top
    # Where a sum's rounding decides a sign or the last iteration, a row may end up elsewhere.
    agreeing = ~off.any(axis=(0, 2))
    assert agreeing.sum() >= 58
    assert (codes[agreeing] != expected_codes[agreeing]).mean() < 1e-4


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_on_what_is_not_finite(rng, solver):
    x = rng.normal(size=(4, 90)).astype(np.float32)
    x[1, 3], x[2, 4] = np.nan, -np.inf
    (expected, expected_codes), (scales, codes) = solved(solver, x, 3)
    np.testing.assert_allclose(np.stack(scales), expected, rtol=1e-6)
    assert np.isnan(expected[:, 1:3]).all()
    np.testing.assert_array_equal(codes, expected_codes)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_on_large_numbers_and_rows_of_several_chunks(rng, solver):
    x = rng.normal(size=(3, 2 * loops.CHUNK + 7)).astype(np.float32)
    x[0] *= np.finfo(np.float32).max / np.abs(x[0]).max()
    x[1] = np.finfo(np.float32).max
    (expected, expected_codes), (scales, codes) = solved(solver, x, 3)
    top = np.abs(x).max(axis=1, keepdims=True)
    np.testing.assert_allclose(np.stack(scales) / top, expected / top, atol=1e-6)
    assert (codes != expected_codes).mean() < 1e-4
    y = np.empty_like(x)
    loops.Fit(x, 3, *search.rule(solver)).approximate(x, np.uint8(3), y)
    decoded = np.empty_like(x)
    code.decode(codes, np.uint8(3), *scales, y=decoded)
    np.testing.assert_array_equal(y, decoded)


@pytest.mark.parametrize("solver", ["refined", "alternating"])
@pytest.mark.parametrize("spoiled", [None, np.nan, np.finfo(np.float32).max])
def test_solvers_on_rows_that_are_read_chunk_by_chunk(rng, solver, spoiled):
    x = rng.normal(size=(2, loops.LONGEST_KEPT + 1021)).astype(np.float32)
    if spoiled is not None:
        x[1, ::9] = spoiled
    found = cubin.quantize(x, 3, channel_axis=0, solver=solver, check_finite=False)
    approx = cubin.multibit(x, 3, channel_axis=0, solver=solver)
    np.testing.assert_array_equal(found.dequantize(), approx)
    alone = cubin.multibit(x[0], 3, solver=solver)
    np.testing.assert_array_equal(approx[0], alone)
    row = x[1:].copy()
    (expected, expected_codes), (scales, codes) = solved(
        search.refined if solver == "refined" else partial(search.alternating, iterations=None),
        row,
        3,
    )
    top = 1 if spoiled is None else np.abs(row).max()
    np.testing.assert_allclose(np.stack(scales) / top, expected / top, atol=1e-6)
    assert (codes != expected_codes).mean() < 1e-4


def test_solvers_that_follow_no_rule():
    assert search.rule(search.optimal) is None


@pytest.mark.parametrize("solver", ["refined", "alternating"])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_solvers_by_their_names(rng, monkeypatch, solver, axis):
    x = rng.normal(size=(40, 90)).astype(np.float32)
    found = cubin.quantize(x, 3, channel_axis=axis, solver=solver)
    approx = cubin.multibit(x, 3, channel_axis=axis, solver=solver)
    np.testing.assert_array_equal(found.dequantize(), approx)
    monkeypatch.setattr(blocks, "COMPILED", x.size + 1)
    expected = cubin.quantize(x, 3, channel_axis=axis, solver=solver)
    np.testing.assert_allclose(found.scales, expected.scales, rtol=1e-5)
    assert (found.signs != expected.signs).mean() < 1e-3


# ---------------------------------------------------------------- when they run


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a,
        lambda a: a[::-1],
        lambda a: a[:, 1:],
        lambda a: a.T,
        lambda a: np.broadcast_to(a[:1], a.shape),
    ],
    ids=["contiguous", "reversed", "cut", "transposed", "repeated"],
)
@pytest.mark.parametrize("dtype", ["float16", *WORK])
def test_elementwise_loops_on_special_values(rng, monkeypatch, dtype, view):
    used = set()

    def watched(name, loop):
        return lambda *operands, **outputs: used.add(name) or loop(*operands, **outputs)

    for name, loop in compiled.ELEMENTWISE.items():
        monkeypatch.setitem(compiled.ELEMENTWISE, name, watched(name, loop))
    values = test_signs.tricky(dtype)
    x = view(rng.choice(values, (5, 50_000)))
    gy = view(rng.choice(values, (5, 50_000)))
    bits = view(rng.integers(0, 4, (5, 50_000), np.uint8))
    with np.errstate(invalid="ignore"):
        signs = np.where(np.isnan(x), x, np.where(x > 0, 1, -1).astype(dtype))
        gradient = np.where(np.abs(x) <= bits, gy, np.zeros((), dtype))
        same_bound = np.where(np.abs(x) <= 2, gy, np.zeros((), dtype))
    out = np.empty(x.shape, dtype)
    in_place = x.copy()
    for found, expected in (
        (cubin.sign(x), signs),
        (cubin.sign(x, out=out), signs),
        (cubin.sign(in_place, out=in_place), signs),
        (cubin.multibit_grad(x, bits, gy), gradient),
        (cubin.multibit_grad(x, 2, gy), same_bound),
    ):
        np.testing.assert_array_equal(as_integers(found), as_integers(expected))
    plain = {"signs", "gradient_inside"} if x.flags.c_contiguous else {"signs"}  # the copy
    assert used == (set() if dtype == "float16" else plain)


def test_loops_are_for_large_arrays_alone(monkeypatch):
    monkeypatch.setattr(blocks, "COMPILED", 1000)
    assert blocks.compiled(999) is None
    assert blocks.compiled(1000) is compiled


def test_without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "cubin.compiled")
    blocks._compiled.cache_clear()
    try:
        assert blocks.compiled(1 << 30) is None
    finally:
        blocks._compiled.cache_clear()


def test_small_arrays_do_not_import_numba():
    program = (
        "import sys, numpy as np, cubin; x = np.ones((512, 512), np.float32);"
        "cubin.multibit(x, 4, channel_axis=0); cubin.quantize(x, 4); cubin.sign_grad(x, x);"
        "x = np.ones(1 << 21, np.float32); cubin.ste_mask(x);"
        "assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_no_place_for_a_cache(monkeypatch):
    njit = compiled.numba.njit

    def without_cache(*, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(compiled.numba, "njit", without_cache)
    assert compiled.loop()(lambda a: a + 1)(1) == 2


@pytest.mark.parametrize("dtype", WORK)
@pytest.mark.parametrize("levels", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    "shape", [(1, 128), (37, 128), (20, 300), (9, 700), (3, 1025), (2, 10_001)]
)
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_results_past_the_caches(rng, monkeypatch, dtype, levels, shape, shift):
    x, bits = samples(rng, shape, dtype, levels, mapped=False)
    expected = np.empty(shape, dtype)
    compiled.approximate_rows(x, bits, levels, y=expected)
    scales = compiled.level_scales(x, bits, levels)
    monkeypatch.setattr(compiled, "LARGE", 0)
    # Lines of memory begin anywhere in a row, and what lies around the result stays as it is.
    for shifted in (shift, shift + 8):
        for give in (
            partial(compiled.approximate_rows, x, bits, levels),
            partial(compiled.approximation, x, bits, *scales),
        ):
            around = np.full(x.size + 64, 7, dtype)
            y = around[shifted : shifted + x.size].reshape(shape)
            assert compiled._streams(x, bits, y)
            give(y=y)
            np.testing.assert_array_equal(y, expected)
            assert (around[:shifted] == 7).all()
            assert (around[shifted + x.size :] == 7).all()


def test_only_large_results_that_have_memory_go_past_the_caches():
    x, bits = np.empty((4096, 4096), np.float32), np.uint8(2)
    y = np.empty_like(x)
    assert not compiled._streams(x, bits, y)
    y[...] = 0
    can_tell = memory._system("mincore") is not None
    assert compiled._streams(x, bits, y) == can_tell
    assert compiled._streams(x[:1], bits, y[:1]) == can_tell
    assert not compiled._streams(x, np.ones(x.shape, np.uint8), y)
    assert not compiled._streams(x.reshape(-1, 64), bits, y.reshape(-1, 64))
    assert not compiled._streams(x[:1], bits, y[:1].copy())


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of instructions")
def test_stores_past_the_caches_are_compiled_as_such():
    function = numba.njit(compiled._stream.py_func)  # what comes from the cache has no text
    x = np.empty(9, np.float32)
    function(x, 9, x, 9, x)
    code = "".join(function.inspect_asm().values())
    assert "movnt" in code
    assert "prefetch" in code


def test_a_row_that_is_not_aligned(rng):
    x = rng.normal(size=(5, 300)).astype(np.float32)
    around = np.empty(x.nbytes + 1, np.uint8)
    y = around[1:].view(np.float32).reshape(x.shape)
    x_too = around.copy()[1:].view(np.float32).reshape(x.shape)
    x_too[...] = x
    for levels in (1, 3):
        np.testing.assert_array_equal(
            cubin.multibit(x_too, levels, channel_axis=0, out=y),
            cubin.multibit(x, levels, channel_axis=0),
        )


@pytest.mark.parametrize("dtype", WORK)
@pytest.mark.parametrize("size", [1, 130, 1023, 4096, 10_001])
@pytest.mark.parametrize("shift", [0, 3])
def test_signs_past_the_caches(rng, monkeypatch, dtype, size, shift):
    x, _ = samples(rng, (size,), dtype, 1, mapped=False)
    x[size // 2 :: 7] = np.nan
    expected, around = np.empty_like(x), np.full(size + 64, 7, dtype)
    compiled.signs(x, y=expected)
    monkeypatch.setattr(compiled, "LARGE", 0)
    y = around[shift : shift + size]
    compiled.signs(x, y=y)
    np.testing.assert_array_equal(y, expected)
    assert (around[:shift] == 7).all()
    assert (around[shift + size :] == 7).all()


@pytest.mark.parametrize("dtype", ["float16", *WORK])
@pytest.mark.parametrize("levels", [0, 1, 2, 5])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (50, 27), (9, 300), (2, 2500)])
@pytest.mark.parametrize("large", [0, 1 << 30])
def test_sums_of_signs(rng, monkeypatch, dtype, levels, shape, large):
    work = arrays.work_dtype(np.dtype(dtype))
    scales = rng.normal(size=(levels, shape[0], 1)).astype(dtype).astype(work)
    scales[:, 1:2] = np.nan  # which does not count where the sign is 0
    signs = rng.integers(-1, 2, (levels, *shape)).astype(np.int8)
    expected = np.zeros(shape)
    for level in range(levels):
        step = scales[level].astype(float) * signs[level]
        expected += np.where(signs[level] == 0, 0, step)
    monkeypatch.setattr(compiled, "LARGE", large)
    tolerance = levels * np.finfo(dtype).eps * 5
    for add_up in (code.sum_signs, compiled.sum_signs):
        for y in (np.full(shape, 7, dtype), np.full(shape[::-1], 7, dtype).T):
            add_up(scales, signs, y=y)
            np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance)
    aligned = np.empty((levels, shape[0], shape[1] + 3), np.int8)[:, :, 3:]
    aligned[...] = signs
    again = np.empty(shape, dtype)
    compiled.sum_signs(scales, aligned, y=again)
    np.testing.assert_array_equal(again, y)


@pytest.mark.parametrize("solver", ["greedy", "alternating"])
def test_float16_is_rounded_once(rng, solver):
    x = rng.normal(size=(30, 200)).astype(np.float16)
    for view in (x, x.T, x[::-1, ::2]):
        y = cubin.multibit(view, 3, channel_axis=0, solver=solver)
        found = cubin.quantize(view, 3, channel_axis=0, solver=solver)
        assert y.dtype == np.float16
        np.testing.assert_array_equal(y, found.dequantize())
