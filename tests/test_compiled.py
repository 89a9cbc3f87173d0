"""The compiled loops against the primitives they mirror, and all tests of multibit on them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import numpy as np
import pytest
from llvmlite.binding import llvm_version_info

import cubin
from cubin import solvers
from cubin.codes import planes as code_planes
from cubin.codes import planes_loops, products_loops
from cubin.codes.levels import decode, level_signs
from cubin.codes.planes import pack_signs, sum_planes
from cubin.core import bits_loops, floats, signs_loops
from cubin.core.bits import as_bits, at_most
from cubin.core.floats import as_integers
from cubin.core.host import blocks
from cubin.core.rows import rows_of
from cubin.solvers import greedy, greedy_loops, search, search_rows, search_rows_loops
from cubin.solvers.lookup import Lookup
from cubin.solvers.sorted_rows import SortedRows
from tests import test_multibit, test_signs
from tests.exhaustive import few
from tests.reference import plain, room_for_signs, signs_of

pytest.importorskip("numba")

import numba

# The same test bodies, on the loops whatever the size.
globals().update(
    {name: body for name, body in vars(test_multibit).items() if name.startswith("test_")}
)

WORK = ["float32", "float64"]
GREEDY = solvers.SOLVERS["greedy"]
SEARCHES = (search_rows.reconstruct_rows, search_rows.solve_rows)


@pytest.fixture
def xp():
    return np


@pytest.fixture(autouse=True)
def loops_for_any_size(monkeypatch):
    monkeypatch.setattr(blocks, "COMPILED", 0)
    for primitive in SEARCHES:
        monkeypatch.setattr(primitive, "loops_from", 0)


@pytest.fixture
def without_loops(monkeypatch):
    """A context in which there are none."""

    @contextlib.contextmanager
    def without():
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "COMPILED", sys.maxsize)
            for primitive in SEARCHES:
                patch.setattr(primitive, "loops_from", sys.maxsize)
            yield

    return without


def samples(rng, shape, dtype, levels, mapped):
    x = rng.normal(size=shape).astype(dtype)
    x.ravel()[:: max(1, x.size // 3)] = [0, -0.0, 1, 0][: len(x.ravel()[:: max(1, x.size // 3)])]
    return x, rng.integers(0, levels + 1, shape).astype(np.uint8) if mapped else np.uint8(levels)


def scales_of_loops(x, bits, levels):
    """The scales of whole rows, (levels, rows, 1)."""
    scales = np.empty((levels, len(x), 1), floats.work_dtype(x.dtype))
    signs = room_for_signs(levels, x.shape)
    greedy_loops.encode_rows(x, bits, levels, scales=scales, signs=signs)
    return scales


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", *WORK])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("levels", few([1, 2, 3, 4, 5, 8, 11, 16], 1, 3, 5, 16))
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (40, 27), (3, 128), (2, 1001)])
def test_loops_equal_the_primitives(rng, dtype, mapped, levels, shape):
    x, bits = samples(rng, shape, dtype, levels, mapped)
    work = floats.work_dtype(np.dtype(dtype))
    scales = greedy._level_scales(x, bits, levels)
    found = scales_of_loops(x, bits, levels)
    for one, other in zip(found, scales, strict=True):
        assert one.dtype == other.dtype == work
        assert one.shape == other.shape
        np.testing.assert_array_equal(one, other)
    expected, y = np.empty(shape, dtype), np.empty(shape, dtype)
    greedy.approximation(x, bits, *scales, y=expected)
    greedy_loops.approximation(x, bits, *scales, y=y)
    np.testing.assert_array_equal(y, expected)
    expected, code = np.empty(shape, np.uint16), np.empty(shape, np.uint16)
    greedy.codes(x, bits, *scales, code=expected)
    greedy_loops.codes(x, bits, *scales, code=code)
    np.testing.assert_array_equal(code, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", *WORK])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("levels", few([1, 2, 3, 4, 5, 8, 11, 16], 1, 3, 5, 16))
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (40, 27), (3, 128), (2, 1025)])
def test_whole_rows_at_once_equal_the_steps(rng, dtype, mapped, levels, shape):
    x, bits = samples(rng, shape, dtype, levels, mapped)
    x[-1, 0] = np.nan
    found = scales_of_loops(x, bits, levels)
    expected, y = np.empty(shape, dtype), np.empty(shape, dtype)
    greedy.approximation(x, bits, *found, y=expected)
    greedy_loops.approximate_rows(x, bits, levels, y=y)
    np.testing.assert_array_equal(plain(y), plain(expected))
    code, sign = np.empty(shape, np.uint16), np.empty(shape, np.int8)
    greedy.codes(x, bits, *found, code=code)
    scales = np.empty((levels, len(x), 1), floats.work_dtype(np.dtype(dtype)))
    for encode in (greedy_loops.encode_rows, greedy.encode_rows):
        packed = room_for_signs(levels, shape)
        encode(x, bits, levels, scales=scales, signs=packed)
        signs = signs_of(packed, bits, shape)
        np.testing.assert_array_equal(scales, found)
        for level in range(levels):
            level_signs(code, bits, np.uint8(level), sign=sign)
            np.testing.assert_array_equal(signs[level], sign)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("levels", range(10))
def test_sums_of_a_piece(rng, mapped, levels):
    x, _ = samples(rng, (3, 9876), np.float32, 0, False)
    bits = rng.integers(0, 11, x.shape).astype(np.uint8) if mapped else np.uint8(10)
    scales = [rng.uniform(0.5, 1, (3, 1)).astype(np.float32) ** level for level in range(levels)]
    total, count = np.empty((2, 3, 1)), np.empty((2, 3, 1), np.int64)
    for module, at in ((greedy, 0), (greedy_loops, 1)):
        module.level_sums(x, bits, *scales, total=total[at], count=count[at])
    np.testing.assert_array_equal(total[0], total[1])
    np.testing.assert_array_equal(count[0], count[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("levels", [1, 3, 7])
def test_what_is_not_finite(rng, bad, levels):
    x = rng.normal(size=(3, 100)).astype(np.float32)
    x[1, 5] = bad
    bits = np.full(x.shape, levels, np.uint8)
    for given in (np.uint8(levels), bits):
        with np.errstate(all="ignore"):
            scales = np.stack(greedy._level_scales(x, given, levels))
        found = scales_of_loops(x, given, levels)
        np.testing.assert_array_equal(found, scales)
        y, expected = np.empty_like(x), np.empty_like(x)
        greedy.approximation(x, given, *scales, y=expected)
        greedy_loops.approximation(x, given, *scales, y=y)
        np.testing.assert_array_equal(y, expected)
    bits[1, 5] = 0
    assert np.isfinite(scales_of_loops(x, bits, levels)).all()


def test_constant_rows_are_exact():
    x = np.full((3, 1001), 0.3, np.float32) * np.array([[1], [3], [0]], np.float32)
    first, second = scales_of_loops(x, np.uint8(2), 2)
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
    found = scales_of_loops(x, given, levels)
    np.testing.assert_array_equal(found[:, 0], [[x[0, 0]], *[[0]] * (levels - 1)])
    assert np.isfinite(found[:, [1, 4]]).all()
    assert np.isfinite(found[:, 5]).all() == mapped
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("lay_out", [np.asfortranarray, lambda x: x[::-1, ::-1], np.asarray])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_whole_arrays(rng, without_loops, lay_out, axis):
    x = lay_out(rng.normal(size=(300, 1000)).astype(np.float32))
    bits = rng.integers(0, 6, x.shape).astype(np.uint8)
    rows = rows_of(x.shape, axis)

    def run(bits):
        y = np.empty_like(x)
        solvers.approximate(x, bits, rows, y, GREEDY)
        _, planes = solvers.encode(x, bits, rows, GREEDY)
        return y, planes

    for given in (as_bits(5, x), as_bits(bits, x)):
        y, planes = run(given)
        with without_loops():
            expected, expected_planes = run(given)
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_array_equal(planes, expected_planes)


def test_in_place(rng):
    x = rng.normal(size=(20, 500)).astype(np.float32)
    rows = rows_of(x.shape, 0)
    y = np.empty_like(x)
    solvers.approximate(x, as_bits(3, x), rows, y, GREEDY)
    solvers.approximate(x, as_bits(3, x), rows, x, GREEDY)
    np.testing.assert_array_equal(x, y)


# ---------------------------------------------------------------- solvers


def solved(solver, x, levels):
    """Scales and codes by the definition and by the compiled form."""
    magnitudes = SortedRows(x, np.uint8(levels), levels, None)
    expected = Lookup(magnitudes, search.codebooks(magnitudes, levels, solver), levels)
    y = np.empty(x.shape, x.dtype)
    search_rows_loops.reconstruct_rows(x, np.uint8(levels), levels, *rule(solver), y=y)
    scales = np.empty((levels, len(x), 1), np.float32)
    packed = room_for_signs(levels, x.shape)
    search_rows_loops.solve_rows(
        x, np.uint8(levels), levels, *rule(solver), scales=scales, signs=packed
    )
    signs = signs_of(packed, np.uint8(levels), x.shape)
    codes = ((signs > 0) << np.arange(levels, dtype=np.uint16)[:, None, None]).sum(axis=0)
    decoded = np.empty_like(x)
    decode(codes.astype(np.uint16), np.uint8(levels), *scales, y=decoded)
    np.testing.assert_array_equal(y, decoded)
    return (np.stack(expected.scales), expected.codes(x, np.uint8(levels))), (scales, codes)


def rule(solver):
    """What the primitives on whole rows take of a solver."""
    return solver.refit, search.limit(solver)


REFINED = solvers.SOLVERS["refined"]
SOLVERS = [REFINED, *(solvers.solver_of("alternating", t) for t in (0, 1, 2, None))]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("levels", few([1, 2, 3, 4], 1, 3))
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
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
    x = rng.normal(size=(3, 2 * search_rows_loops.CHUNK + 7)).astype(np.float32)
    x[0] *= np.finfo(np.float32).max / np.abs(x[0]).max()
    x[1] = np.finfo(np.float32).max
    (expected, expected_codes), (scales, codes) = solved(solver, x, 3)
    top = np.abs(x).max(axis=1, keepdims=True)
    np.testing.assert_allclose(np.stack(scales) / top, expected / top, atol=1e-6)
    assert (codes != expected_codes).mean() < 1e-4


@pytest.mark.parametrize("solver", ["refined", "alternating"])
@pytest.mark.parametrize("spoiled", [None, np.nan, np.finfo(np.float32).max])
def test_solvers_on_rows_that_are_read_chunk_by_chunk(rng, solver, spoiled):
    x = rng.normal(size=(2, search_rows_loops.LONGEST_KEPT + 1021)).astype(np.float32)
    if spoiled is not None:
        x[1, ::9] = spoiled
    found = cubin.quantize(x, 3, channel_axis=0, solver=solver, check_finite=False)
    approx = cubin.multibit(x, 3, channel_axis=0, solver=solver)
    np.testing.assert_array_equal(found.dequantize(), approx)
    alone = cubin.multibit(x[0], 3, solver=solver)
    np.testing.assert_array_equal(approx[0], alone)
    row = x[1:].copy()
    (expected, expected_codes), (scales, codes) = solved(
        REFINED if solver == "refined" else solvers.solver_of("alternating", None),
        row,
        3,
    )
    top = 1 if spoiled is None else np.abs(row).max()
    np.testing.assert_allclose(np.stack(scales) / top, expected / top, atol=1e-6)
    assert (codes != expected_codes).mean() < 1e-4


@pytest.mark.parametrize("solver", ["refined", "alternating"])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_solvers_by_their_names(rng, without_loops, solver, axis):
    x = rng.normal(size=(40, 90)).astype(np.float32)
    found = cubin.quantize(x, 3, channel_axis=axis, solver=solver)
    approx = cubin.multibit(x, 3, channel_axis=axis, solver=solver)
    np.testing.assert_array_equal(found.dequantize(), approx)
    with without_loops():
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
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", *WORK])
def test_elementwise_loops_on_special_values(rng, monkeypatch, dtype, view):
    used = set()

    def watched(name, loop):
        return lambda *operands, **outputs: used.add(name) or loop(*operands, **outputs)

    names = ("signs", "gradient_inside", "inside", "inside_bits")
    for name in names:
        monkeypatch.setattr(signs_loops, name, watched(name, getattr(signs_loops, name)))
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
    bounds = bits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        for bound in (2, np.float64(0.1), bits, bounds):
            inside = np.abs(x.astype(np.float64)) <= bound
            np.testing.assert_array_equal(cubin.ste_mask(x, bound), inside)
    assert used == {*names}


HOST = "cubin.core.host.loops"


LAYOUTS = {
    "C": lambda x: x,
    "Fortran": np.asfortranarray,
    "turned": lambda x: np.ascontiguousarray(x.transpose(1, 2, 0)).transpose(2, 0, 1),
    "mirrored": lambda x: x[:, ::-1],
    "every other": lambda x: np.repeat(x, 2, axis=2)[..., ::2],
    "repeated": lambda x: np.broadcast_to(x[:, :1], x.shape),
}


@pytest.mark.parametrize("dtype", ["u2", "u4", "u8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_integers_at_most(rng, dtype, order):
    top = np.iinfo(dtype).max
    integers = rng.choice(np.array([0, 1, 16, 17, 18, 255, 256, 257, top - 1, top], dtype), (9, 30))
    integers = np.asarray(integers, order=order)
    expected = [[min(int(number), 17) for number in row] for row in integers]
    for form in (at_most.function, bits_loops.at_most):
        found = np.full(integers.shape, 99, np.uint8)
        form(integers, np.uint8(17), bits=found)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", [(6, 5, 80), (300, 5, 80)])
@pytest.mark.parametrize("of_map", [(1, 5, 80), (5, 1), (80,), (1, 1, 1)])
def test_masks_by_maps_that_broadcast(rng, shape, of_map):
    x = rng.standard_normal(shape).astype(np.float32)
    bits = rng.integers(0, 4, of_map)
    np.testing.assert_array_equal(cubin.ste_mask(x, bits), abs(x) <= bits)
    turned = x.T, bits.reshape((1,) * (3 - bits.ndim) + of_map).T
    np.testing.assert_array_equal(cubin.ste_mask(*turned), abs(turned[0]) <= turned[1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("of_x", LAYOUTS)
@pytest.mark.parametrize("of_gy", LAYOUTS)
@pytest.mark.parametrize("block", [500, 5000], ids=["blocks", "one block"])
def test_elementwise_loops_on_every_layout(rng, monkeypatch, dtype, of_x, of_gy, block):
    monkeypatch.setattr(blocks, "BLOCK", block)
    x, gy = (rng.normal(size=(6, 35, 20)).astype(dtype) for _ in range(2))
    x, gy = LAYOUTS[of_x](x), LAYOUTS[of_gy](gy)
    order = np.empty_like(x).strides
    for bits in (2, rng.integers(0, 3, x.shape), rng.integers(0, 3, (35, 1))):
        expected = np.where(np.abs(plain(x)) <= bits, plain(gy), 0)
        gx = cubin.multibit_grad(x, bits, gy)
        np.testing.assert_array_equal(plain(gx), expected)
        assert gx.strides == order
        itself = gy.copy(order="K")
        cubin.multibit_grad(x, bits, itself, out=itself)
        np.testing.assert_array_equal(plain(itself), expected)
    signs = cubin.sign(x)
    np.testing.assert_array_equal(plain(signs), np.where(plain(x) > 0, 1, -1))
    assert signs.strides == order


def test_loops_are_loaded_for_large_arrays_alone(monkeypatch):
    monkeypatch.setattr(blocks, "COMPILED", 10)
    monkeypatch.setattr(blocks, "LOADING", 1000)
    body, compiled = greedy.codes.function, greedy_loops.codes
    assert greedy.codes.on_host(9) is body
    assert greedy.codes.on_host(10) is compiled
    monkeypatch.delitem(sys.modules, HOST)
    assert greedy.codes.on_host(999) is body
    assert greedy.codes.on_host(1000) is compiled
    assert greedy.level_scale.on_host(1000) is greedy.level_scale.function


def test_loops_are_loaded_once_much_was_done_without_them(monkeypatch):
    monkeypatch.setattr(blocks, "COMPILED", 10)
    monkeypatch.setattr(blocks, "LOADING", 1000)
    monkeypatch.setattr(blocks, "LOADING_IN_ALL", 5000)
    monkeypatch.setattr(blocks, "_so_far", blocks._SoFar())
    body, compiled = greedy.codes.function, greedy_loops.codes
    monkeypatch.delitem(sys.modules, HOST)
    assert [greedy.codes.on_host(9) for _ in range(1000)] == [body] * 1000
    assert [greedy.codes.on_host(900) for _ in range(6)] == [body] * 5 + [compiled]


@pytest.mark.parametrize("length", [blocks.BLOCK + 1, blocks.PIECE, blocks.PIECE + 1])
def test_rows_of_a_piece_are_whole_in_loops_and_cut_in_bodies(monkeypatch, rng, length):
    x = (rng.normal(size=(2, length)) * np.exp(rng.normal(size=(2, length)))).astype(np.float32)
    for bits in (3, rng.integers(0, 4, x.shape)):
        code = cubin.quantize(x, bits, channel_axis=0)
        y = cubin.multibit(x, bits, channel_axis=0)
        with monkeypatch.context() as patched:
            patched.setattr(blocks, "pays", lambda size: False)
            plain = cubin.quantize(x, bits, channel_axis=0)
            assert code == plain
            np.testing.assert_array_equal(y, cubin.multibit(x, bits, channel_axis=0))
            np.testing.assert_array_equal(y, plain.dequantize())


def test_loops_that_round_in_another_way_follow_the_size_alone(monkeypatch):
    primitive = search_rows.solve_rows
    monkeypatch.setattr(primitive, "loops_from", 1000)
    assert primitive.on_host(999) is primitive.function
    monkeypatch.delitem(sys.modules, HOST)
    assert primitive.on_host(1000) is search_rows_loops.solve_rows


def test_without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, HOST)
    blocks._numba_works.cache_clear()
    try:
        for primitive in (greedy.codes, search_rows.solve_rows):
            assert primitive.on_host(1 << 30) is primitive.function
    finally:
        blocks._numba_works.cache_clear()


def test_small_arrays_do_not_import_numba():
    program = (
        "import sys, numpy as np, cubin; x = np.ones((512, 512), np.float32);"
        "cubin.multibit(x, 4, channel_axis=0); cubin.quantize(x, 4); cubin.sign_grad(x, x);"
        "from cubin.solvers.greedy import level_scale as without_a_loop;"
        "without_a_loop.on_host(1 << 21); assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_results_do_not_depend_on_what_is_loaded():
    program = (
        "import hashlib, sys, numpy as np, cubin; r = np.random.default_rng(3);"
        "x = r.normal(size=(30, 700)).astype(np.float32); b = r.integers(0, 5, x.shape);"
        "digest = lambda: hashlib.sha256(b''.join(cubin.multibit(x, k, channel_axis=a).tobytes()"
        " for k in (4, b) for a in (0, 1, None))).hexdigest();"
        "first = digest(); assert 'numba' not in sys.modules;"
        "cubin.sign(np.ones(1 << 20, np.float32)); assert 'numba' in sys.modules;"
        "assert digest() == first; assert 'cubin.solvers.greedy_loops' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


PROCESSORS = {"generic": "", "haswell": "+avx2"}
"""With what their names say of them, which Numba does not ask."""


FOR_ANY_SIZE = """
from cubin.codes import products_loops
from cubin.core.host import blocks
from cubin.solvers import search_rows
products_loops.by_lines = lambda *_: products_loops.multiply_lines
blocks.COMPILED = blocks.LOADING = 0
search_rows.reconstruct_rows.loops_from = search_rows.solve_rows.loops_from = 0
"""
RESULTS = """
import hashlib, numpy as np, cubin
r = np.random.default_rng(5)
for shape in ((1, 1 << 18), (2003, 131), (64, 5003)):
    x = r.normal(size=shape) * np.exp(r.normal(size=shape))
    bits = r.integers(0, 6, shape)
    for dtype in ("float32", "float64"):
        y = x.astype(dtype)
        for bits_of in (3, 6, bits):
            code = cubin.quantize(y, bits_of, channel_axis=0)
            for a in (code.scales, code.signs, code.dequantize(),
                      cubin.multibit(y, bits_of, channel_axis=0)):
                print(hashlib.sha256(a.tobytes()).hexdigest())
    y = np.tile(x.astype("float32"), (2, 1))
    for solver in ("refined", "alternating"):
        for levels in (2, 4):
            code = cubin.quantize(y, levels, channel_axis=0, solver=solver)
            print(hashlib.sha256(code.scales.tobytes() + code.signs.tobytes()).hexdigest())
    for dtype in ("float32", "float64"):
        code = cubin.quantize(x.astype(dtype), bits.clip(0, 3), channel_axis=0)
        z = r.normal(size=(2, shape[1])).astype(dtype)
        print(hashlib.sha256(cubin.products.linear(z, code).tobytes()).hexdigest())
"""


def results_of_loops(**environment):
    """The digests of results in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", FOR_ANY_SIZE + RESULTS],
        env={**os.environ, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.split()


@pytest.fixture(scope="module")
def results_here():
    return results_of_loops()


@pytest.mark.exhaustive
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names of processors")
@pytest.mark.parametrize("processor", PROCESSORS)
def test_results_do_not_depend_on_the_processor(processor, results_here, tmp_path):
    """Whatever vectors it has, and whether it multiplies and adds in one step."""
    found = results_of_loops(
        NUMBA_CPU_NAME=processor,
        NUMBA_CPU_FEATURES=PROCESSORS[processor],
        NUMBA_CACHE_DIR=str(tmp_path),
    )
    assert list(tmp_path.rglob("*greedy_loops*"))
    assert len(found) == 3 * (2 * 3 * 4 + 4 + 2)
    assert found == results_here


def test_results_do_not_depend_on_threads(monkeypatch, rng):
    x = rng.normal(size=(7, 200_000)).astype(np.float32)
    bits = rng.integers(0, 4, x.shape).astype(np.uint8)

    def run():
        return [
            cubin.multibit(a, k, channel_axis=axis, solver=solver)
            for a in (x, x.reshape(1400, 1000))
            for k, solver in ((3, "greedy"), (bits.reshape(a.shape), "greedy"), (3, "refined"))
            for axis in (None, 0)
        ]

    found = []
    for workers in (1, 2, 5):
        monkeypatch.setattr(blocks, "_workers", lambda workers=workers: workers)
        found.append(run())
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            np.testing.assert_array_equal(one, other)


# Of these even an instruction set of 2013 has vectors, of eight numbers.
VECTORS = {
    greedy_loops._approximate_rows: {"vaddps", "vsubps", "vorps"},
    planes_loops._sum_levels: {"vaddps", "vblendvps"},
    products_loops._look_up: {"vpermd"},
    products_loops._multiply: {"vfmadd213ps"},
    signs_loops._signs: {"vmovups"},
    signs_loops._clip: {"vmovups"},
}
if llvm_version_info >= (20,):  # LLVM 15 makes none of these
    VECTORS |= {signs_loops._clip_patterns: {"vpand"}, signs_loops._clip_to_bits: {"vandps"}}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names of instructions")
@pytest.mark.skipif(numba.config.CPU_NAME not in (None, "haswell"), reason="another processor")
def test_loops_are_in_vectors(tmp_path):
    program = """
import numpy as np
from cubin.codes import planes_loops, products_loops
from cubin.core import signs_loops
from cubin.core.host.loops import read_only, scratch
from cubin.solvers import greedy_loops
f = np.float32
x, bits = read_only(np.ones((2, 9), f)), read_only(np.ones((2, 9), np.uint8))
m, half = np.ones((2, 9), f), read_only(np.ones(9, np.uint16))
loops = {
    greedy_loops._approximate_rows: (
        x, bits, np.ones((2, 2), f), m, read_only(m), scratch(f)[1], np.ones((2, 9), f)),
    planes_loops._sum_levels: (
        np.ones(32, np.uint8), 16, 2, 8, read_only(np.ones(2, f)), 1, 0, 64, 64, False, False, 1,
        64, bits[0, :0], np.ones(64, f), 64, m[0, :0], x[0, :0]),
    products_loops._look_up: (
        read_only(np.ones(256, np.uint8)), 0, 32, 64, read_only(np.ones((1, 1, 32), f)),
        read_only(np.ones((1, 64), f)), False, np.ones(64, f), np.ones((16, 16), f),
        np.ones((8, 256), f), np.ones((1, 32), f), np.ones((1, 32))),
    products_loops._multiply: (
        read_only(np.ones(256, np.uint8)), 0, 32, 64, read_only(np.ones((1, 1, 32), f)),
        read_only(np.ones((8, 64), f)), np.ones((512, 264), f), 8, np.ones((8, 264), f)),
    signs_loops._signs: (x[0], np.ones(9, f)),
    signs_loops._clip: (x[0], f(1), x[0], np.ones(9, f)),
    signs_loops._clip_patterns: (half, np.uint16(5), half, np.ones(9, np.uint16)),
    signs_loops._clip_to_bits: (x[0], bits[0], half, np.ones(9, np.uint16)),
}
for loop, arguments in loops.items():
    loop(*arguments)
    (code,) = loop.inspect_asm().values()
    print(loop.py_func.__name__, *{line.split()[0] for line in code.splitlines() if "ymm" in line})
"""
    own = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": PROCESSORS["haswell"]}
    own["NUMBA_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **own}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = {line.split()[0]: set(line.split()[1:]) for line in done.stdout.splitlines()}
    for one, wanted in VECTORS.items():
        assert wanted <= found[one.py_func.__name__]


@pytest.mark.parametrize("n", [1, 7, 15, 16, 17, 27, 33, 64, 100])
@pytest.mark.parametrize("mapped", [False, True])
def test_what_lies_around_a_result_stays(rng, n, mapped):
    """Whole words are written, also at the ends of rows, but not beyond the last row."""
    x = rng.normal(size=(70, n)).astype(np.float32)
    bits = rng.integers(0, 4, x.shape) if mapped else 3
    around = np.full((x.shape[0] + 40, n), 9, np.float32)
    out = around[20:-20]
    assert cubin.multibit(x, bits, channel_axis=0, out=out) is out
    assert (around[:20] == 9).all()
    assert (around[-20:] == 9).all()
    code = cubin.quantize(x, bits, channel_axis=0)
    np.testing.assert_array_equal(out, code.dequantize())
    values = np.full_like(around, 9)
    planes_loops.sum_planes(
        code.planes, np.broadcast_to(code.bits, x.shape) if mapped else np.uint8(3),
        code.scales[:, :, None], 0, n, n, y=values[20:-20],
    )  # fmt: skip
    np.testing.assert_array_equal(values[20:-20], out)
    assert (values[:20] == 9).all()
    assert (values[-20:] == 9).all()


@pytest.mark.parametrize("n", [*range(1, 34), 63, 100])
@pytest.mark.parametrize("mapped", [False, True])
def test_what_lies_around_signs_stays(rng, n, mapped):
    """The same for the bytes of signs: those of each level, and after the last row of the last."""
    x, levels = rng.normal(size=(37, n)).astype(np.float32), 3
    bits = rng.integers(0, levels + 1, x.shape).astype(np.uint8) if mapped else np.uint8(levels)
    size = levels * len(x) * -(-n // 8)
    found = []
    for encode in (greedy.encode_rows.function, greedy_loops.encode_rows):
        around = np.full(size + 16, 0xA5, np.uint8)
        signs = around[8:-8].reshape(levels, len(x), -1)
        encode(x, bits, levels, scales=np.empty((levels, len(x), 1), np.float32), signs=signs)
        found.append(around)
    np.testing.assert_array_equal(*found)
    assert (found[0][[*range(8), *range(-8, 0)]] == 0xA5).all()


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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", *WORK])
@pytest.mark.parametrize("levels", [0, 1, 2, 5])
@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (50, 27), (9, 300), (2, 2502), (3, 6144)])
def test_sums_of_planes(rng, dtype, levels, runs, shape):
    """Both forms give the sums by the definition, to the bit, with and without a map."""
    work = floats.work_dtype(np.dtype(dtype))
    scales = rng.normal(size=(levels, shape[0], runs)).astype(dtype).astype(work)
    scales[-1:, 1:2] = np.nan  # which does not count where no element has a code
    bits = rng.integers(0, levels + 1, shape).astype(np.uint8)
    bits[1:2] = max(levels - 1, 0)
    shift = rng.normal(size=(shape[0], runs)).astype(dtype).astype(work)
    for depth in (bits, np.uint8(levels)):
        signs = rng.choice(np.array([-1, 1], np.int8), (levels, *shape))
        signs *= np.greater(depth, np.arange(levels)[:, None, None])
        held = {}
        for pack in (pack_signs, planes_loops.pack_signs):
            planes = np.full((levels, -(-shape[1] // 8), shape[0]), 7, np.uint8)
            pack(signs, planes=planes)
            held[pack] = planes
        np.testing.assert_array_equal(*held.values())
        for base in (0, shift):
            # With a shift, sums are rounded once.
            total = np.zeros(shape, np.longdouble if np.ndim(base) else work)
            total += np.repeat(base, shape[1] // runs, axis=1) if np.ndim(base) else base
            for level in range(levels):
                step = np.repeat(scales[level], shape[1] // runs, axis=1)
                signed = np.where(signs[level] > 0, step, -step)
                total = np.where(signs[level] != 0, total + signed, total)
            room = 3e-16 if np.ndim(base) and work == np.float64 else 0
            found = []
            for add_up in (sum_planes, planes_loops.sum_planes):
                for y in (np.full(shape, 7, dtype), np.full(shape[::-1], 7, dtype).T):
                    add_up(planes, depth, scales, base, shape[1] // runs, shape[1], y=y)
                    expected = plain(total.astype(work).astype(dtype))
                    np.testing.assert_allclose(plain(y), expected, rtol=room, atol=0)
                    found.append(plain(y))
            for other in found[1:]:
                np.testing.assert_array_equal(other, found[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", *WORK])
@pytest.mark.parametrize("run", [1, 3, 8, 16, 24, 32, 40, 100, 2400])
@pytest.mark.parametrize("lines", [1, 3, 17])
def test_sums_of_planes_with_runs(rng, dtype, run, lines):
    """Runs that fill bytes or do not; scales of each line, or for all; in a part of an array."""
    work, n, levels = floats.work_dtype(np.dtype(dtype)), 2400, 3
    planes = rng.integers(0, 256, (levels, n // 8, lines)).astype(np.uint8)
    signs = np.unpackbits(planes, axis=1, bitorder="little").transpose(0, 2, 1)
    bits = rng.integers(0, levels + 1, (lines, n)).astype(np.uint8)
    around = np.full((lines, n + 5), 7, dtype)
    for scaled in (1, lines):
        scales = rng.normal(size=(levels, scaled, n // run)).astype(dtype).astype(work)
        step = np.where(signs, 1, -1) * scales.repeat(run, axis=2)
        for depth in (np.uint8(levels), np.uint8(1), bits):
            total = np.zeros((lines, n), work)
            for level in range(levels):
                total += np.where(depth > level, step[level], 0).astype(work)
            planes_loops.sum_planes(planes, depth, scales, 0, run, n, y=around[:, 2:-3])
            np.testing.assert_array_equal(around[:, 2:-3], total.astype(dtype))
            assert (around[:, :2] == 7).all()
            assert (around[:, -3:] == 7).all()


@pytest.mark.parametrize("dtype", ["float16", *WORK])
@pytest.mark.parametrize("run", [1, 3, 8, 9, 27, 32, 48, 129])
@pytest.mark.parametrize(("n", "period"), [(7, 7), (39, 39), (333, 333), (222, 37), (800, 100)])
@pytest.mark.parametrize("wide", [planes_loops.WIDE, (64, 96)], ids=["lines", "pieces"])
def test_sums_of_planes_whose_last_runs_are_shorter(rng, monkeypatch, dtype, run, n, period, wide):
    """Runs that begin anew with every period, in rows, in columns, and in a part of an array."""
    monkeypatch.setattr(planes_loops, "WIDE", wide)
    work, lines, levels = floats.work_dtype(np.dtype(dtype)), 19, 3
    run = min(run, period)
    place = np.arange(n) // period * -(-period // run) + np.arange(n) % period // run
    planes = rng.integers(0, 256, (levels, -(-n // 8), lines)).astype(np.uint8)
    signs = np.unpackbits(planes, axis=1, count=n, bitorder="little").transpose(0, 2, 1)
    bits = rng.integers(0, levels + 1, (lines, n)).astype(np.uint8)
    for scaled in (1, lines):
        scales = rng.normal(size=(levels, scaled, place[-1] + 1)).astype(dtype).astype(work)
        step = np.where(signs, 1, -1) * scales[..., place]
        for depth in (np.uint8(levels), bits):
            total = np.zeros((lines, n), work)
            for level in range(levels):
                total += np.where(depth > level, step[level], 0).astype(work)
            for add_up in (sum_planes.function, planes_loops.sum_planes):
                rows, around = np.full((lines + 2, n), 7, dtype), np.full((lines, n + 5), 7, dtype)
                for y in (rows[1:-1], np.empty((n, lines), dtype).T, around[:, 2:-3]):
                    add_up(planes, depth, scales, 0, run, period, y=y)
                    np.testing.assert_array_equal(y, total.astype(dtype))
                assert (rows[[0, -1]] == 7).all()
                assert (around[:, :2] == 7).all()
                assert (around[:, -3:] == 7).all()


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 27, 64])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_rows_are_joined_to_lines(rng, length, rows):
    bits = rng.integers(0, 2, (2, 5 * rows, length)).astype(np.uint8)
    signs = np.packbits(bits, axis=2, bitorder="little")
    expected = np.packbits(bits.reshape(2, 5, -1), axis=2, bitorder="little")
    for form in (code_planes, planes_loops):
        np.testing.assert_array_equal(form.join_rows(signs, length, 5), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("solver", ["greedy", "alternating"])
def test_narrow_floats_are_rounded_once(rng, solver, dtype):
    x = rng.normal(size=(30, 200)).astype(dtype)
    for view in (x, x.T, x[::-1, ::2]):
        y = cubin.multibit(view, 3, channel_axis=0, solver=solver)
        found = cubin.quantize(view, 3, channel_axis=0, solver=solver)
        assert y.dtype == dtype
        np.testing.assert_array_equal(y, found.dequantize())
