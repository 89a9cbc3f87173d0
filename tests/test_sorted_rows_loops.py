"""The solvers as Numba compiles them, against the array form and all codes: on sorted rows, and on
rows as they lie."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from ml_dtypes import finfo

import cubin
from cubin import solvers
from cubin.core.host import blocks
from cubin.solvers import search
from cubin.solvers.lookup import Lookup
from cubin.solvers.sorted_rows import SortedRows
from tests.exhaustive import few

loops = pytest.importorskip("cubin.solvers.sorted_rows_loops")
search_rows_loops = pytest.importorskip("cubin.solvers.search_rows_loops")
lookup_loops = pytest.importorskip("cubin.solvers.lookup_loops")

ALTERNATING = [solvers.solver_of("alternating", n) for n in (0, 1, 2, None)]
SOLVERS = [solvers.SOLVERS["refined"], *ALTERNATING, solvers.SOLVERS["optimal"]]
NAMES = ["refined", *(f"alternating-{n}" for n in (0, 1, 2, None)), "optimal"]
FLOATS = ["float16", "bfloat16", "float32", "float64"]


def rows_of_all_kinds(rng, length, dtype):
    """Rows of ties, zeros, constants, extremes and subnormals beside common ones, all finite."""
    x = rng.normal(size=(9, length))
    limits = finfo(dtype)
    x[1] = 0
    x[2] = rng.integers(-3, 4, length)
    x[3] = -0.5
    x[4, ::2] = 0
    x[6] *= float(limits.max) / 2 / np.abs(x[6]).max()
    x[7] *= 16 * float(limits.smallest_subnormal)
    x[8] = rng.laplace(size=length) ** 3
    return x.astype(dtype)


def problem(rng, length, dtype, levels, mapped, weighted):
    x = rows_of_all_kinds(rng, length, dtype)
    bits = np.uint8(levels)
    if mapped:
        bits = rng.integers(0, levels + 1, x.shape).astype(np.uint8)
        bits[5, 1:] = 0
        bits[8, :] = levels
    importance = rng.choice([0.0, 0.3, 1.0, 7.0], x.shape) if weighted else None
    if weighted:
        importance[4] = 0
    return x, bits, importance


def both(x, bits, levels, importance, solver):
    """Scales, codes and approximation by the array form, and by the compiled one."""
    with np.errstate(all="ignore"):
        magnitudes = SortedRows(x, bits, levels, importance)
        expected = Lookup(magnitudes, search.codebooks(magnitudes, levels, solver), levels)
        yield given_by(expected, x, bits)
        yield given_by(loops.Lookup(x, bits, levels, importance, solver), x, bits)


def given_by(fit, x, bits):
    y = np.empty_like(x)
    fit.approximate(x, bits, y)
    return np.stack(fit.scales), fit.codes(x, bits), y


def assert_the_same(expected, found):
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


# ---------------------------------------------------------------- against the array form


@pytest.mark.parametrize("solver", SOLVERS, ids=NAMES)
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("levels", few(range(1, 9), 1, 3, 6))
def test_they_equal_the_array_form(rng, solver, mapped, weighted, dtype, levels):
    """To the bit: they add up in the same order."""
    x, bits, importance = problem(rng, 150, dtype, levels, mapped, weighted)
    expected, found = both(x, bits, levels, importance, solver)
    assert_the_same(expected, found)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("levels", few([9, 12, 16], 9))
def test_more_than_eight_refined_levels(rng, mapped, levels):
    x, bits, importance = problem(rng, 300, "float32", levels, mapped, mapped)
    first = bits[:4] if mapped else bits
    weights = importance[:4] if mapped else None
    expected, found = both(x[:4], first, levels, weights, solvers.SOLVERS["refined"])
    assert_the_same(expected, found)


@pytest.mark.parametrize("solver", SOLVERS, ids=NAMES)
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("length", [1, 2, 27, 33, 1000, 1025])
def test_lengths(rng, solver, mapped, length):
    x = rng.normal(size=(4, length)).astype(np.float32)
    bits = rng.integers(0, 6, x.shape).astype(np.uint8) if mapped else np.uint8(5)
    expected, found = both(x, bits, 5, None, solver)
    assert_the_same(expected, found)


@pytest.mark.parametrize("solver", SOLVERS, ids=NAMES)
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite(rng, solver, mapped, bad):
    x = rng.normal(size=(4, 90)).astype(np.float32)
    bits = rng.integers(1, 4, x.shape).astype(np.uint8) if mapped else np.uint8(3)
    x[1, 7] = x[2, 5] = bad
    if mapped:
        bits[2, 5] = bits[1, 8] = 0
    expected, found = both(x, bits, 3, None, solver)
    assert_the_same(expected, found)
    scales, _, y = found
    assert np.isnan(scales[:, 1]).all()
    assert np.isfinite(scales[:, 2]).all() == mapped
    assert np.isnan(y[1]).sum() == ((bits[1] > 0).sum() if mapped else x.shape[1])


@pytest.mark.parametrize("levels", [2, 8])
@pytest.mark.parametrize("solver", SOLVERS, ids=NAMES)
def test_no_negative_zero(solver, levels):
    """Where levels cancel, whatever the sign of the element."""
    x = np.array([[0.0, -0.0, 1.0, -1.0, 0.0, -0.0]])
    y = np.empty_like(x)
    loops.Lookup(x, np.uint8(levels), levels, None, solver).approximate(x, levels, y)
    assert not np.signbit(y[y == 0]).any()


# ---------------------------------------------------------------- against brute force


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", few(range(8), 0, 1))
def test_the_best_of_all_codes(mapped, weighted, seed):
    """For one and two levels: of all codes, each with its scales of least squares."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=6) if seed % 2 else rng.integers(-3, 4, 6).astype(float)
    bits = rng.integers(0, 3, x.size).astype(np.uint8) if mapped else np.full(6, 2, np.uint8)
    weights = rng.choice([0.2, 1.0, 3.0], x.size) if weighted else np.ones(x.size)
    least, root = np.inf, np.sqrt(weights)
    choices = [
        [(*signs, *[0.0] * (2 - m)) for signs in itertools.product((-1.0, 1.0), repeat=int(m))]
        for m in bits
    ]
    for code in itertools.product(*choices):
        levels = np.array(code)
        scales = np.linalg.lstsq(levels * root[:, None], x * root, rcond=None)[0]
        least = min(least, float((weights * (x - levels @ scales) ** 2).sum()))
    y = np.empty((1, 6))
    own_bits = bits[None] if mapped else np.uint8(2)
    fit = loops.Lookup(x[None], own_bits, 2, weights[None] if weighted else None, SOLVERS[-1])
    fit.approximate(x[None], own_bits, y)
    assert (weights * (x - y[0]) ** 2).sum() <= least + 1e-12 * (weights * x**2).sum()


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("levels", [3, 5])
def test_converged_codes_are_nearest(rng, mapped, levels):
    x = rng.normal(size=(1, 300))
    bits = rng.integers(0, levels + 1, x.shape).astype(np.uint8) if mapped else np.uint8(levels)
    fit = loops.Lookup(x, bits, levels, None, solvers.solver_of("alternating", None))
    y = np.empty_like(x)
    fit.approximate(x, bits, y)
    scales = np.stack(fit.scales)[:, 0, 0]
    for value, own, m in zip(x[0], y[0], np.broadcast_to(bits, x.shape)[0], strict=True):
        sums = [np.dot(s, scales[:m]) for s in itertools.product((-1.0, 1.0), repeat=int(m))]
        assert abs(value - own) <= min(abs(value - total) for total in sums) + 1e-12


def test_a_pair_under_a_map_is_of_its_own_elements(rng):
    """Candidates end with the elements of two bits, although others lie behind them in the row."""
    x = rng.normal(size=(3, 200))
    bits = rng.integers(1, 6, x.shape).astype(np.uint8)
    magnitudes = SortedRows(x, bits, 5, None)
    mass, first = magnitudes.totals(2)
    for number, below in magnitudes.below_each(2):
        assert (number <= mass[:, None]).all()
        assert (below <= first[:, None]).all()


# ---------------------------------------------------------------- rows that are compared with edges


@pytest.mark.parametrize("solver", SOLVERS[:-1], ids=NAMES[:-1])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("levels", few(range(1, 9), 1, 4, 7))
def test_rows_as_they_lie_give_what_sorted_rows_give(rng, solver, mapped, weighted, dtype, levels):
    """To the last digits: the sums are added up in another order."""
    x, bits, importance = problem(rng, 150, dtype, levels, mapped, weighted)
    with np.errstate(all="ignore"):
        expected = given_by(loops.Lookup(x, bits, levels, importance, solver), x, bits)
        found = given_by(search_rows_loops.Lookup(x, bits, levels, importance, solver), x, bits)
    top = np.abs(x).max(axis=1).astype(np.float64)
    top[top == 0] = 1
    apart = np.abs(found[2].astype(np.float64) - expected[2]).max(axis=1) / top
    # Where a sum's rounding decides a sign or the last iteration, a row may end up elsewhere.
    limit = 1e-12 if dtype == "float64" else 2e-3 if dtype == "float16" else 1e-6
    assert (apart > limit).sum() <= 1
    assert found[0].dtype == expected[0].dtype


@pytest.mark.parametrize("solver", SOLVERS[:-1], ids=NAMES[:-1])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_as_they_lie_that_are_not_finite(rng, solver, mapped, bad, dtype):
    x = rng.normal(size=(4, 90)).astype(dtype)
    bits = rng.integers(1, 4, x.shape).astype(np.uint8) if mapped else np.uint8(3)
    x[1, 7] = x[2, 5] = bad
    if mapped:
        bits[2, 5] = bits[1, 8] = 0
    with np.errstate(all="ignore"):
        fit = search_rows_loops.Lookup(x, bits, 3, None, solver)
        scales, _, y = given_by(fit, x, bits)
    assert np.isnan(scales[:, 1]).all()
    assert np.isfinite(scales[:, [0, 3]]).all()
    assert np.isfinite(scales[:, 2]).all() == mapped
    assert np.isnan(y[1]).sum() == ((bits[1] > 0).sum() if mapped else x.shape[1])
    assert np.isfinite(y[[0, 3]]).all()


@pytest.mark.parametrize("length", [1, 31, 33, 4097, 8200])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_lengths_of_rows_as_they_lie(rng, length, weighted, mapped):
    """Their error is that of least squares, computed from all elements in float64."""
    x = rng.normal(size=(3, length))
    bits = rng.integers(0, 4, x.shape).astype(np.uint8) if mapped else np.uint8(3)
    weights = rng.exponential(size=x.shape) if weighted else None
    fit = search_rows_loops.Lookup(x, bits, 3, weights, SOLVERS[0])
    scales, codes, y = given_by(fit, x, bits)
    for row in range(3):
        own = np.broadcast_to(bits, x.shape)[row]
        signs = np.where(codes[row, :, None] >> np.arange(3) & 1, 1.0, -1.0)
        signs *= np.arange(3) < own[:, None]
        root = np.sqrt(weights[row]) if weighted else np.ones(length)
        best = np.linalg.lstsq(signs * root[:, None], x[row] * root, rcond=None)[0]
        np.testing.assert_allclose(signs @ scales[:, row, 0], y[row], atol=1e-12)
        least = (root**2 * (x[row] - signs @ best) ** 2).sum()
        assert (root**2 * (x[row] - y[row]) ** 2).sum() <= least + 1e-12 * (root * x[row]) @ (
            root * x[row]
        )


@pytest.mark.parametrize("solver", SOLVERS[:-1], ids=NAMES[:-1])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("length", [1, 8, 27, search_rows_loops.SHORT, 200])
def test_rows_that_are_solved_together_come_out_as_each_does_alone(
    rng, solver, mapped, weighted, length
):
    """To the bit, whether they stop early or late, in any lane, and where some lanes are empty."""
    count = search_rows_loops.TOGETHER + 5
    x = rng.normal(size=(count, length)).astype(np.float32)
    x[::7] = np.rint(3 * x[::7])
    x[3], x[5, 0] = 0, np.nan
    bits = rng.integers(0, 5, x.shape).astype(np.uint8) if mapped else np.uint8(4)
    importance = rng.choice([0.0, 0.5, 3.0], x.shape) if weighted else None

    def found(rows):
        own = bits[rows] if mapped else bits
        weights = importance[rows] if weighted else None
        fit = search_rows_loops.Lookup(x[rows], own, 4, weights, solver)
        return given_by(fit, x[rows], own)

    with np.errstate(all="ignore"):
        scales, codes, y = found(slice(None))
        for row in [*range(9), count - 6, count - 1]:
            alone = found(slice(row, row + 1))
            assert_the_same((scales[:, row : row + 1], codes[row : row + 1]), alone[:2])
            np.testing.assert_array_equal(y[row : row + 1], alone[2])


@pytest.mark.parametrize("solver", SOLVERS[:-1], ids=NAMES[:-1])
@pytest.mark.parametrize("levels", [2, 5])
@pytest.mark.parametrize("mapped", [False, True])
def test_short_rows_give_what_sorted_rows_give(rng, solver, levels, mapped):
    """Rows of all lengths about the longest short ones, and ties."""
    for length in (1, 3, 16, 31, search_rows_loops.SHORT, search_rows_loops.SHORT + 1):
        x = rng.normal(size=(70, length))
        x[::9] = np.rint(x[::9])
        bits = rng.integers(0, levels + 1, x.shape).astype(np.uint8) if mapped else np.uint8(levels)
        expected = given_by(loops.Lookup(x, bits, levels, None, solver), x, bits)
        found = given_by(search_rows_loops.Lookup(x, bits, levels, None, solver), x, bits)
        apart = np.abs(found[2] - expected[2]).max(axis=1)
        # Where a sum's rounding decides a sign or the last iteration, a row may end up elsewhere.
        assert (apart > 1e-12 * np.abs(x).max()).sum() <= 2, length


def test_importance_of_any_size_and_type(rng):
    """Powers of two as factors change nothing, and a row without any counts as unweighted."""
    x = rng.normal(size=(3, 300)).astype(np.float32)
    importance = rng.exponential(size=x.shape).astype(np.float32)
    importance[2] = 0

    def found(weights, rows=slice(None)):
        return given_by(
            search_rows_loops.Lookup(x[rows], np.uint8(4), 4, weights, SOLVERS[0]),
            x[rows], np.uint8(4),
        )  # fmt: skip

    expected = found(importance)
    factor = np.array([[2.0**100], [2.0**-100], [1.0]], np.float32)
    assert_the_same(expected, found(importance * factor))
    assert_the_same(expected, found(importance.astype(np.float64) * factor.astype(float) ** 8))
    plain = found(None, slice(2, 3))
    np.testing.assert_allclose(expected[0][:, 2:], plain[0], rtol=1e-6)
    ones = found(np.full((1, 300), 2.0**9, np.float32), slice(2, 3))
    np.testing.assert_allclose(ones[0], plain[0], rtol=1e-6)


@pytest.mark.parametrize("solver", ["refined", "alternating"])
@pytest.mark.parametrize("bits", [3, 5])
@pytest.mark.parametrize("weighted", [False, True])
def test_long_rows_that_are_not_sorted(rng, solver, bits, weighted):
    """One row of several pieces, and its neighbour, are solved as each is alone."""
    x = rng.normal(size=(2, blocks.BLOCK + 1027)).astype(np.float32)
    importance = rng.exponential(size=x.shape) if weighted else None
    options = {"solver": solver, "channel_axis": 0}
    both_rows = cubin.multibit(x, bits, importance=importance, **options)
    for row in range(2):
        own = None if importance is None else importance[row]
        alone = cubin.multibit(x[row], bits, importance=own, solver=solver)
        np.testing.assert_array_equal(alone, both_rows[row])
    code = cubin.quantize(x, bits, importance=importance, **options)
    np.testing.assert_array_equal(code.dequantize(), both_rows)


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize("solver", SOLVERS, ids=NAMES)
@pytest.mark.parametrize("mapped", [False, True])
def test_rows_do_not_depend_on_each_other(rng, solver, mapped):
    x = rng.normal(size=(6, 200)).astype(np.float32)
    bits = rng.integers(0, 6, x.shape).astype(np.uint8) if mapped else np.uint8(5)
    importance = rng.choice([0.5, 1.0], x.shape)
    whole = given_by(loops.Lookup(x, bits, 5, importance, solver), x, bits)
    for row in range(len(x)):
        own = slice(row, row + 1)
        own_bits = bits[own] if mapped else bits
        single = given_by(
            loops.Lookup(x[own], own_bits, 5, importance[own], solver), x[own], own_bits
        )
        np.testing.assert_array_equal(single[0], whole[0][:, own])
        np.testing.assert_array_equal(single[1], whole[1][own])
        np.testing.assert_array_equal(single[2], whole[2][own])


@pytest.mark.parametrize("options", [{}, {"channel_axis": 0}, {"channel_axis": 1}])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("levels", [5, 8])
def test_blocks_and_threads_change_nothing(monkeypatch, rng, options, weighted, levels):
    """Where rows are compared with all edges, and where they are sorted."""
    x = rng.normal(size=(64, 1100)).astype(np.float32)
    bits = rng.integers(0, levels + 1, x.shape)
    importance = rng.choice([0.5, 1.0, 2.0], x.shape) if weighted else None
    options = {"solver": "alternating", "importance": importance, **options}
    made = []
    kind = search_rows_loops.Lookup if levels < 8 else loops.Lookup
    original = kind.__init__

    def counted(self, x, *rest):
        made.append(x.shape)
        original(self, x, *rest)

    monkeypatch.setattr(kind, "__init__", counted)
    expected = cubin.quantize(x, bits, **options)
    assert made
    before = len(made)
    monkeypatch.setattr(blocks, "SORTED_BLOCK", (1 << 11, 1 << 11))
    monkeypatch.setattr(blocks, "_workers", lambda: 1)
    assert cubin.quantize(x, bits, **options) == expected
    assert len(made) >= 2 * before
    monkeypatch.setattr(blocks, "BLOCK", 1 << 10)
    monkeypatch.setattr(blocks, "_workers", lambda: 3)
    assert cubin.quantize(x, bits, **options) == expected
    y = cubin.multibit(x, bits, **options)
    np.testing.assert_array_equal(y, expected.dequantize())
    assert cubin.multibit(x, bits, out=x, **options) is x
    np.testing.assert_array_equal(x, y)


_CASE = """
import hashlib, numpy as np
from cubin.solvers import search_rows_loops, solver_of, sorted_rows_loops
rng = np.random.default_rng(7)
digest = hashlib.sha256()
x = rng.normal(size=(2, 700)).astype(np.float32)
x[1] = np.rint(3 * x[1])
bits = rng.integers(0, 6, x.shape).astype(np.uint8)
importance = rng.exponential(size=x.shape)
for solver in (solver_of("refined", 0), solver_of("alternating", 9), solver_of("optimal", None)):
    fit = sorted_rows_loops.Lookup(x, bits, 5, importance, solver)
    y = np.empty_like(x)
    fit.approximate(x, bits, y)
    for array in (np.stack(fit.scales), fit.codes(x, bits), y):
        digest.update(array.tobytes())
    short = np.ascontiguousarray(x.reshape(70, 20)), bits.reshape(70, 20)
    for weight in (None, importance.reshape(70, 20)) if solver.name != "optimal" else ():
        fit = search_rows_loops.Lookup(*short, 5, weight, solver)
        for array in (np.stack(fit.scales), fit.codes(*short)):
            digest.update(array.tobytes())
print(digest.hexdigest())
"""


@pytest.mark.exhaustive
def test_processors_give_the_same_bits(tmp_path):
    """Also those that sort otherwise, and have no vectors beyond SSE2."""
    digests = set()
    for number, processor in enumerate(["generic", "host"]):
        environment = {
            **os.environ,
            "NUMBA_CPU_NAME": processor,
            "NUMBA_CACHE_DIR": str(tmp_path / str(number)),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        if processor == "generic":
            environment["NUMBA_CPU_FEATURES"] = ""
            environment["NPY_DISABLE_CPU_FEATURES"] = "AVX2 AVX512F AVX512_SKX"
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _CASE], env=environment, capture_output=True,
            text=True, check=True,
        )  # fmt: skip
        digests.add(run.stdout.strip())
    assert len(digests) == 1
    assert len(digests.pop()) == 2 * hashlib.sha256().digest_size


# ---------------------------------------------------------------- when they run


@pytest.mark.parametrize(
    ("solver", "bits", "dtype", "mapped", "weighted", "sorts"),
    [
        ("refined", 9, "float32", False, False, True),
        ("refined", 8, "float32", False, False, False),
        ("refined", 3, "float32", False, False, False),
        ("refined", 3, "float64", False, False, False),
        ("alternating", 7, "float32", False, False, True),
        ("alternating", 6, "float32", False, False, False),
        ("alternating", 3, "float32", True, False, False),
        ("alternating", 7, "float32", True, False, False),
        ("alternating", 8, "float32", True, False, True),
        ("alternating", 3, "float32", False, True, False),
        ("alternating", 8, "float32", False, True, True),
        ("optimal", 3, "float32", False, False, True),
    ],
)
def test_they_run_where_other_loops_do_not(
    monkeypatch, rng, solver, bits, dtype, mapped, weighted, sorts
):
    x = rng.normal(size=(1 << 11, 1 << 9)).astype(dtype)
    limits = rng.integers(0, bits + 1, x.shape) if mapped else bits
    importance = rng.uniform(1, 2, x.shape) if weighted else None
    used = []
    original = loops.solve
    monkeypatch.setattr(loops, "solve", lambda *rest: (used.append(1), original(*rest)))
    code = cubin.quantize(x, limits, channel_axis=0, solver=solver, importance=importance)
    assert bool(used) == sorts
    assert np.isfinite(code.scales).all()


@pytest.mark.parametrize("solver", ["refined", "alternating", "optimal"])
def test_without_numba_results_are_the_same(monkeypatch, rng, solver):
    x = rng.normal(size=(40, 300)).astype(np.float32)
    options = {"channel_axis": 0, "solver": solver}
    found = cubin.quantize(x, 7, **options)
    monkeypatch.setattr(blocks, "_numba_works", lambda: False)
    assert cubin.quantize(x, 7, **options) == found


@pytest.mark.skipif(not lookup_loops.NUMBERS, reason="the processor permutes no registers")
@pytest.mark.parametrize("n", [16, 17, 47, 300])
@pytest.mark.parametrize("levels", range(1, 9))
@pytest.mark.parametrize("mapped", [False, True])
def test_cells_are_found_in_registers_as_one_by_one(rng, monkeypatch, n, levels, mapped):
    x = rng.normal(size=(9, n)).astype(np.float32)
    x[1:4, 2:5] = 0, -0.0, 1e-42
    x[5], x[6, 3], x[7, 1] = 0, np.nan, -np.inf
    bits = rng.integers(0, levels + 1, x.shape).astype(np.uint8) if mapped else np.uint8(levels)
    lookup = loops.Lookup(x, bits, levels, None, solvers.SOLVERS["refined"])
    found = []
    for most in (lookup_loops.MOST, 0):
        monkeypatch.setattr(loops, "MOST", most)
        for dtype in (np.float32, np.float16):
            y = np.full((11, n), 7, dtype)
            lookup.approximate(x, bits, y[1:-1])
            assert (y[[0, -1]] == 7).all()
            found.append(y.view(np.uint32 if dtype == np.float32 else np.uint16))
        found.append(lookup.codes(x, bits))
    for one, other in zip(found[:3], found[3:], strict=True):
        np.testing.assert_array_equal(one, other)
