from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ml_dtypes import finfo
from scipy import stats

import cubin
from cubin import theory
from cubin.codes.levels import decode
from cubin.core import passes
from cubin.core.host import blocks
from cubin.solvers import search, sorted_rows
from tests import reference
from tests.exhaustive import few

SOLVERS = ["refined", "alternating", "optimal"]
FLOATS = ["float16", "bfloat16", "float32", "float64"]
SAMPLE = 100_000
BEST_KNOWN = {
    "norm": (0.36338, 0.11748, 0.03527, 0.00989, 0.00266, 0.00072),
    "laplace": (0.5, 0.17619, 0.05598, 0.01743, 0.00512, 0.00155),
}


def stratified(law, size=SAMPLE):
    """A sample of a law with next to no sampling error."""
    return law.ppf((np.arange(size) + 0.5) / size)


def all_codes(bits):
    """Every (levels, n) array of signs that the numbers of bits allow."""
    levels = int(np.max(bits, initial=0))
    choices = [
        [(*signs, *[0] * (levels - m)) for signs in itertools.product((-1.0, 1.0), repeat=m)]
        for m in bits
    ]
    return (np.array(columns).T for columns in itertools.product(*choices))


def least_squares(x, signs, weights):
    root = np.sqrt(weights)
    return np.linalg.lstsq((signs * root).T, x * root, rcond=None)[0]


def squared_error(x, approx, weights=1.0):
    return float((weights * (x - approx) ** 2).sum())


def least_error(x, bits, weights):
    """The least weighted squared error of all codes and scales."""
    return min(
        squared_error(x, least_squares(x, signs, weights) @ signs, weights)
        for signs in all_codes(bits)
    )


def nearest_signs(x, bits, scales):
    """For each element the signs of the nearest sum of its levels."""
    signs = np.zeros((len(scales), len(x)))
    for number, (value, m) in enumerate(zip(x, bits, strict=True)):
        if m:
            sums = list(itertools.product((-1.0, 1.0), repeat=int(m)))
            chosen = min(sums, key=lambda s: abs(value - np.dot(s, scales[: len(s)])))
            signs[:m, number] = chosen
    return signs


def alternated(x, bits, iterations):
    """The squared error after alternating as it is defined, one element at a time.

    None where levels depend on each other, so that their scales are not determined.
    """
    _, signs, *_ = reference.greedy(x, bits)
    for iteration in range(iterations + 1):
        if np.linalg.matrix_rank(signs) < len(signs):
            return None
        scales = least_squares(x, signs, np.ones(len(x)))
        if iteration < iterations:
            signs = nearest_signs(x, bits, np.abs(scales))
    return squared_error(x, scales @ signs)


def error_of(x, bits, importance=None, **options):
    approx = cubin.quantize(x, bits, importance=importance, **options).dequantize()
    return squared_error(x, approx, 1.0 if importance is None else importance)


def a_map(rng, shape, high):
    return rng.integers(0, high + 1, shape)


# ---------------------------------------------------------------- known errors


@pytest.mark.parametrize("bits", few(range(1, 6), 1, 3, 5))
@pytest.mark.parametrize("law", [stats.norm(), stats.laplace()], ids=["norm", "laplace"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"solver": "refined"}, theory.refined),
        *(
            (
                {"solver": "alternating", "iterations": iterations},
                lambda law, bits, n=iterations: theory.alternating(law, bits, iterations=n),
            )
            for iterations in (0, 1, 2, None)
        ),
    ],
    ids=["refined", "alternating-0", "alternating-1", "alternating-2", "alternating-None"],
)
def test_expected_errors(law, bits, options, expected):
    x = stratified(law)
    found = cubin.errors.relative_mse(x, cubin.multibit(x, bits, **options))
    # Alternating creeps at the end: its last percent is reached after thousands of iterations.
    assert float(found) == pytest.approx(expected(law, bits).relative_mse, rel=0.02)


@pytest.mark.parametrize("bits", few(range(1, 7), 2, 4))
@pytest.mark.parametrize("law", ["norm", "laplace"])
def test_optimal_is_near_the_best_known(law, bits):
    x = stratified(getattr(stats, law)())
    found = cubin.errors.relative_mse(x, cubin.multibit(x, bits, solver="optimal"))
    assert float(found) <= BEST_KNOWN[law][bits - 1] * (1.01 if bits <= 4 else 1.02)


@pytest.mark.parametrize("bits", [3, 4, 5])
@pytest.mark.parametrize("law", [stats.norm(), stats.laplace()], ids=["norm", "laplace"])
def test_optimal_on_samples(law, bits, rng):
    """At most a percent (two at 5 bits) above codes with the best scales for the law."""
    x = law.rvs(SAMPLE, random_state=rng)
    sums = theory.optimal(law, bits).levels
    chosen = sums[np.searchsorted((sums[1:] + sums[:-1]) / 2, x)]
    found = cubin.errors.relative_mse(x, cubin.multibit(x, bits, solver="optimal"))
    limit = cubin.errors.relative_mse(x, chosen)
    assert float(found) <= float(limit) * (1.01 if bits <= 4 else 1.02)


@pytest.mark.parametrize("solver", SOLVERS)
def test_uniform_is_halved_by_every_level(solver):
    x = stratified(stats.uniform(-1, 2), 1 << 12)
    for bits in range(1, 7):
        code = cubin.quantize(x, bits, solver=solver)
        np.testing.assert_allclose(code.scales, 0.5 ** np.arange(1, bits + 1), rtol=1e-12)
        error = float(cubin.errors.relative_mse(x, code.dequantize()))
        assert error == pytest.approx(4.0**-bits, rel=1e-3)


# ---------------------------------------------------------------- brute force


def small_problem(data):
    n = data.draw(st.integers(1, 6))
    levels = data.draw(st.integers(1, min(3, 12 // n)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    kind = data.draw(st.sampled_from(["normal", "integers", "wide"]))
    x = {
        "normal": lambda: rng.normal(size=n),
        "integers": lambda: rng.integers(-3, 4, n).astype(float),
        "wide": lambda: rng.normal(size=n) * 10.0 ** rng.integers(-4, 5, n),
    }[kind]()
    bits = a_map(rng, n, levels) if data.draw(st.booleans()) else np.full(n, levels)
    weighted = data.draw(st.booleans())
    importance = rng.choice([0.1, 0.5, 1.0, 3.0], n) if weighted else None
    return x, bits, importance


@settings(max_examples=150)
@given(st.data())
def test_against_all_codes(data):
    x, bits, importance = small_problem(data)
    weights = np.ones(len(x)) if importance is None else importance
    power = squared_error(x, 0, weights)
    limit = least_error(x, bits, weights)
    found = {solver: error_of(x, bits, importance, solver=solver) for solver in SOLVERS}
    found["converged"] = error_of(x, bits, importance, solver="alternating", iterations=None)
    for solver, error in found.items():
        assert error >= limit - 1e-12 * power, solver
        assert error >= found["optimal"] - 1e-12 * power, solver
    if bits.max() <= 2:
        assert found["optimal"] <= limit + 1e-12 * power


@settings(max_examples=80)
@given(st.data())
def test_alternating_as_defined(data):
    n = data.draw(st.integers(6, 24))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    x = rng.normal(size=n)
    levels = data.draw(st.integers(1, 4))
    bits = a_map(rng, n, levels) if data.draw(st.booleans()) else np.full(n, levels)
    iterations = data.draw(st.integers(0, 4))
    expected = alternated(x, bits, iterations)
    assume(expected is not None)
    found = error_of(x, bits, solver="alternating", iterations=iterations)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


# ---------------------------------------------------------------- properties


@settings(max_examples=80)
@given(st.data())
def test_the_error_never_rises(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    shape = (3, data.draw(st.integers(1, 60)))
    levels = data.draw(st.integers(1, 6))
    x = rng.normal(size=shape) ** data.draw(st.sampled_from([1, 3]))
    bits = a_map(rng, shape, levels) if data.draw(st.booleans()) else levels
    importance = rng.exponential(size=shape) if data.draw(st.booleans()) else None
    options = {"importance": importance, "channel_axis": 0}
    errors = [
        error_of(x, bits, solver="alternating", iterations=iterations, **options)
        for iterations in (0, 1, 2, 3, 5, 9, None)
    ]
    errors.append(error_of(x, bits, solver="optimal", **options))
    slack = 1e-13 * squared_error(x, 0, 1 if importance is None else importance)
    assert all(later <= earlier + slack for earlier, later in itertools.pairwise(errors))
    assert errors[-1] <= error_of(x, bits, solver="refined", **options) + slack


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_scales_are_those_of_least_squares(xp, host, rng, solver, mapped, weighted):
    x = rng.normal(size=(4, 90))
    bits = a_map(rng, x.shape, 3) if mapped else 3
    importance = rng.exponential(size=x.shape) if weighted else None
    code = cubin.quantize(
        xp.asarray(x),
        bits,
        channel_axis=0,
        solver=solver,
        importance=None if importance is None else xp.asarray(importance),
    )
    scales, signs = host(code.scales), host(code.signs)
    assert (scales >= 0).all()
    hot = np.arange(3)[:, None, None] < np.broadcast_to(bits, x.shape)
    np.testing.assert_array_equal(signs != 0, hot)
    for row in range(len(x)):
        weights = importance[row] if weighted else np.ones(x.shape[1])
        expected = least_squares(x[row], signs[:, row], weights)
        np.testing.assert_allclose(scales[:, row], expected, rtol=1e-10)


@pytest.mark.parametrize("options", [{"solver": "alternating", "iterations": None},
                                     {"solver": "optimal"}])  # fmt: skip
@pytest.mark.parametrize("mapped", [False, True])
def test_converged_codes_are_nearest(rng, options, mapped):
    x = rng.normal(size=200)
    bits = a_map(rng, x.shape, 4) if mapped else 4
    code = cubin.quantize(x, bits, **options)
    signs = nearest_signs(x, np.broadcast_to(bits, x.shape), code.scales)
    np.testing.assert_allclose(code.dequantize(), code.scales @ signs, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_scales_descend_without_a_map(rng, solver):
    code = cubin.quantize(rng.laplace(size=(50, 20)), 5, channel_axis=0, solver=solver)
    assert (np.diff(code.scales, axis=0) <= 0).all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mapped", [False, True])
def test_powers_of_two_scale_through(rng, solver, dtype, mapped):
    """Exactly, as far as x itself and the scales are exact in their dtype."""
    x = np.clip(rng.normal(size=(3, 50)), -4, 4).astype(dtype)
    # No bit of x may be lost in the subnormals of its dtype.
    x = np.ldexp(np.rint(np.ldexp(x, 6)), -6).astype(dtype)
    bits = a_map(rng, x.shape, 4) if mapped else 4
    code = cubin.quantize(x, bits, channel_axis=0, solver=solver)
    limits = finfo(dtype)
    for exponent in (-7, 5, limits.minexp + 6, limits.maxexp - 4):
        scaled = cubin.quantize(np.ldexp(x, exponent), bits, channel_axis=0, solver=solver)
        np.testing.assert_array_equal(scaled.signs, code.signs)
        if exponent in (-7, 5):
            np.testing.assert_array_equal(scaled.scales, np.ldexp(code.scales, exponent))
        else:
            smallest = float(limits.smallest_subnormal)
            expected = np.ldexp(code.scales.astype(np.float64), exponent)
            np.testing.assert_allclose(scaled.scales, expected, rtol=0, atol=smallest)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("mapped", few([False, True], True))
@pytest.mark.parametrize(
    ("shape", "granularity"),
    [
        ((), {}),
        ((1,), {}),
        ((7,), {"channel_axis": 0}),
        ((5, 6), {"channel_axis": 1}),
        ((5, 6), {"group_size": 3}),
        ((5, 7), {"group_size": 3}),
        ((2, 3, 5), {"group_size": 4}),
        ((4, 3, 5), {"channel_axis": (2, 0)}),
        ((2, 3, 2, 2, 4), {"group_size": 2}),
        ((2, 3, 1, 2, 2, 3), {"channel_axis": (1, 4)}),
        ((0,), {}),
        ((0, 3), {"channel_axis": 0}),
        ((3, 0), {"channel_axis": 0}),
        ((2, 0, 4), {"group_size": 2}),
    ],
)
def test_rows_are_solved_on_their_own(xp, host, rng, solver, mapped, shape, granularity):
    x = rng.normal(size=shape)
    bits = a_map(rng, shape, 3) if mapped else 3
    importance = rng.uniform(0.5, 2, shape)
    code = cubin.quantize(
        xp.asarray(x), bits, solver=solver, importance=xp.asarray(importance), **granularity
    )
    every = np.broadcast_to(bits, shape)
    for row, members in reference.rows(shape, **granularity).items():
        where = tuple(np.array(members, int).reshape(len(members), len(shape)).T)
        own = every[where]
        levels = int(own.max(initial=0))
        single = cubin.quantize(x[where], own if mapped else 3, solver=solver,
                                importance=importance[where])  # fmt: skip
        # Levels that this row does not have are there for the other rows alone. With another
        # number of levels, sums are taken and equally good codes are met in another order.
        found = host(code.scales)[(slice(None), *row)]
        tolerance = 0 if levels == 3 and solver != "optimal" else 1e-9
        np.testing.assert_allclose(found[:levels], single.scales[:levels], rtol=tolerance)
        assert not found[levels:].any()
        np.testing.assert_array_equal(
            host(code.signs)[(slice(levels), *where)], single.signs[:levels]
        )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", few(FLOATS, "float32"))
@pytest.mark.parametrize("mapped", few([False, True], True))
def test_multibit_is_the_code_dequantized(xp, host, rng, solver, dtype, mapped):
    base = rng.normal(size=(6, 6, 8)).astype(dtype)  # rows of 48 in every view
    for view in (lambda a: a, lambda a: a[::-1, ::2], lambda a: a.transpose(2, 0, 1)):
        x = view(xp.asarray(base.copy()))
        bits = a_map(rng, x.shape, 4) if mapped else 4
        options = {"channel_axis": 1, "solver": solver}
        y = cubin.multibit(x, bits, **options)
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(
            host(y), host(cubin.quantize(x, bits, **options).dequantize())
        )
        assert cubin.multibit(x, bits, out=x, **options) is x
        np.testing.assert_array_equal(host(x), host(y))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("mapped", [False, True])
def test_rows_longer_than_a_block(monkeypatch, rng, solver, mapped):
    """Their codes are written piece by piece, by threads; so are rows that are short."""
    x = rng.normal(size=(3, 4000)).astype(np.float32)
    bits = a_map(rng, x.shape, 3) if mapped else 3
    whole = cubin.quantize(x, bits, channel_axis=0, solver=solver)
    monkeypatch.setattr(blocks, "SHARE", 1)
    threaded = cubin.quantize(x, bits, channel_axis=0, solver=solver)
    monkeypatch.setattr(passes, "SEARCHED", 1 << 10)
    monkeypatch.setattr(blocks, "BLOCK", 1 << 10)
    monkeypatch.setattr(blocks, "PIECE", 1 << 10)
    cut = cubin.quantize(x, bits, channel_axis=0, solver=solver)
    assert whole == threaded
    assert whole == cut


@pytest.mark.parametrize("mapped", [False, True])
def test_a_pair_is_searched_for_in_chunks(monkeypatch, rng, mapped):
    x = rng.normal(size=(3, 100))
    bits = a_map(rng, x.shape, 2) if mapped else 2
    whole = cubin.quantize(x, bits, channel_axis=0, solver="optimal")
    monkeypatch.setattr(sorted_rows, "CHUNK", 21)
    assert cubin.quantize(x, bits, channel_axis=0, solver="optimal") == whole


# ---------------------------------------------------------------- degenerate rows


FEW_VALUES = [
    [0.0, -0.0, 0.0],
    [0.1, 0.1, 0.1],
    [0.1, -0.1, 0.1],
    [3.0],
    [0.0, 0.0, 5.0],
    [1e-7, 1e-7, -1e-7],
]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", few(FLOATS, "bfloat16", "float32"))
@pytest.mark.parametrize("bits", few([1, 2, 4, 8], 1, 4))
@pytest.mark.parametrize("row", few(FEW_VALUES, *FEW_VALUES[::2]))
def test_rows_with_few_values(xp, host, solver, dtype, bits, row):
    x = np.array([row], dtype)
    code = cubin.quantize(xp.asarray(x), bits, channel_axis=0, solver=solver)
    assert np.isfinite(host(code.scales)).all()
    assert set(np.unique(host(code.signs))) <= {-1, 1}
    if len(set(map(abs, row))) <= 2 ** (bits - 1):
        np.testing.assert_allclose(
            host(code.dequantize()), x, rtol=4 * finfo(dtype).eps, atol=np.max(x) * 1e-15
        )


@pytest.mark.parametrize("options", [{"solver": "alternating", "iterations": None},
                                     {"solver": "optimal"}])  # fmt: skip
def test_as_many_levels_as_values(options, rng):
    """With codes to spare the error vanishes."""
    x = rng.choice([-2.5, -1.0, 0.5, 2.0], 40)
    np.testing.assert_allclose(cubin.multibit(x, 4, **options), x, rtol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_maps_with_gaps(solver, rng):
    """Levels that few elements have, or none of a row, get scales that fit or 0."""
    x = rng.normal(size=(4, 12))
    bits = np.zeros(x.shape, int)
    bits[1] = 1
    bits[2] = [0] * 10 + [3, 3]
    bits[3] = [1] * 11 + [4]
    code = cubin.quantize(x, bits, channel_axis=0, solver=solver)
    assert np.isfinite(code.scales).all()
    y = code.dequantize()
    assert not y[0].any()
    np.testing.assert_allclose(np.abs(y[1]), np.abs(x[1]).mean(), rtol=1e-12)
    assert not y[2, :10].any()
    np.testing.assert_allclose(y[2, 10:], x[2, 10:], rtol=1e-12)
    assert not code.scales[1:, 1].any()
    assert abs(y[3, 11] - x[3, 11]) < abs(x[3, 11])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_rows_stay_on_their_own(xp, host, rng, solver, bad):
    x = rng.normal(size=(3, 20)).astype(np.float32)
    spoiled = x.copy()
    spoiled[1, 4] = bad
    options = {"channel_axis": 0, "solver": solver}
    y = host(cubin.multibit(xp.asarray(spoiled), 3, **options))
    clean = host(cubin.multibit(xp.asarray(x), 3, **options))
    np.testing.assert_array_equal(y[[0, 2]], clean[[0, 2]])
    assert np.isnan(y[1]).all()
    with pytest.raises(ValueError, match=r"row \(1,\)"):
        cubin.quantize(xp.asarray(spoiled), 3, **options)
    code = cubin.quantize(xp.asarray(spoiled), 3, check_finite=False, **options)
    assert np.isnan(host(code.scales)[:, 1]).all()
    # What has no bits is not looked at.
    bits = np.full(x.shape, 3)
    bits[1, 4] = 0
    y = host(cubin.multibit(xp.asarray(spoiled), bits, **options))
    assert np.isfinite(y).all()
    assert y[1, 4] == 0


def test_extreme_magnitudes(rng):
    """No square overflows or vanishes."""
    x = rng.normal(size=64)
    small, large = (cubin.quantize(x * 2.0**e, 3, solver="optimal") for e in (-1000, 1000))
    np.testing.assert_array_equal(small.signs, large.signs)
    np.testing.assert_array_equal(small.scales * 2.0**1000, large.scales * 2.0**-1000)


# ---------------------------------------------------------------- importance


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("mapped", [False, True])
def test_importance_counts_elements(rng, solver, mapped):
    """A weight of three is as good as three elements."""
    x = rng.normal(size=60)
    times = rng.integers(0, 4, x.size)
    bits = a_map(rng, x.shape, 3) if mapped else 3
    weighted = error_of(x, bits, times.astype(float), solver=solver)
    repeated = np.repeat(bits, times) if mapped else bits
    assert weighted == pytest.approx(error_of(np.repeat(x, times), repeated, solver=solver))


@pytest.mark.parametrize("solver", SOLVERS)
def test_importance_of_a_row(rng, solver):
    x = rng.normal(size=(3, 40)).astype(np.float32)
    importance = rng.exponential(size=x.shape).astype(np.float16)
    plain = cubin.quantize(x, 3, channel_axis=0, solver=solver)
    options = {"channel_axis": 0, "solver": solver}
    weighted = cubin.quantize(x, 3, importance=importance, **options)
    assert not np.array_equal(weighted.scales, plain.scales)
    # Only the ratios within a row matter.
    factor = np.float64([[2.0**-1060], [1.0], [2.0**900]])
    scaled = importance.astype(np.float64) * factor
    assert cubin.quantize(x, 3, importance=scaled, **options) == weighted
    # Rows without any importance count as unweighted.
    importance[1] = 0
    mixed = cubin.quantize(x, 3, importance=importance, **options)
    np.testing.assert_allclose(mixed.scales[:, 1], plain.scales[:, 1], rtol=1e-6)
    np.testing.assert_array_equal(mixed.signs[:, 1], plain.signs[:, 1])
    np.testing.assert_array_equal(mixed.scales[:, ::2], weighted.scales[:, ::2])
    per_column = np.linspace(0, 1, 40)
    spread = np.broadcast_to(per_column, x.shape)
    assert cubin.quantize(x, 3, importance=per_column, **options) == cubin.quantize(
        x, 3, importance=spread, **options
    )


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize("function", [cubin.quantize, cubin.multibit])
@pytest.mark.parametrize(
    ("options", "exception", "message"),
    [
        ({"solver": "best"}, ValueError, "solver must be one of greedy, refined, alternating, opt"),
        ({"solver": "alternating", "iterations": -1}, ValueError, "iterations must be .*, got -1"),
        ({"solver": "alternating", "iterations": 1.5}, TypeError, "iterations must be an integer"),
        ({"solver": "alternating", "iterations": True}, TypeError, "iterations must be an integer"),
        ({"importance": np.ones(4)}, ValueError, "the greedy solver takes no importance"),
        ({"solver": "optimal", "importance": [1, 2, 3, 4]}, TypeError, "importance must be float"),
        ({"solver": "optimal", "importance": np.ones(3)}, ValueError, r"\(3,\) .* \(4,\)"),
        ({"solver": "optimal", "importance": np.ones((1, 4))}, ValueError, r"\(1, 4\) .* \(4,\)"),
        ({"solver": "optimal", "importance": -np.ones(4)}, ValueError, "importance must be finite"),
        ({"solver": "optimal", "importance": np.array([1, np.nan, 1, 1])}, ValueError, "finite"),
        ({"solver": "optimal", "importance": np.array([1, np.inf, 1, 1])}, ValueError, "finite"),
        ({"solver": "optimal", "bits": 9}, ValueError, r"0 \.\. 8 with solver='optimal', got 9"),
        ({"solver": "alternating", "bits": [1, 9, 0, 0]}, ValueError, r"bits must lie in 0 \.\. 8"),
        ({"solver": "refined", "bits": 17}, ValueError, r"bits must lie in 0 \.\. 16, got 17"),
    ],
)
def test_bad_arguments(function, options, exception, message):
    with pytest.raises(exception, match=message):
        function(np.arange(4.0), **{"bits": 2, **options})


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_bits(solver):
    code = cubin.quantize(np.arange(4.0), 0, solver=solver)
    assert code.scales.shape == (0,)
    assert not cubin.multibit(np.arange(4.0), 0, solver=solver).any()


def test_sixteen_refined_levels(rng):
    x = rng.normal(size=(2, 300))
    errors = [
        float(cubin.errors.relative_mse(x, cubin.multibit(x, bits, solver="refined")))
        for bits in (8, 12, 16)
    ]
    assert errors[2] < errors[1] < errors[0] < 4e-3


@pytest.mark.parametrize("length", [1, 7, 100, 600])
@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_of_cells(rng, dtype, length):
    x = rng.normal(size=(9, length)).astype(dtype)
    x[2], x[3, 0] = 0, np.inf
    magnitudes = sorted_rows.SortedRows(x, np.uint8(3), 3, None)
    unit = magnitudes.unit.astype(np.float64)
    m = np.where(np.isfinite(x).all(axis=1, keepdims=True), np.abs(x) / unit, 0)
    for rows in (np.arange(9), np.array([0, 3, 8])):
        thresholds = np.sort(rng.uniform(-0.1, 2, (3, len(rows))), axis=0)
        thresholds = thresholds.astype(magnitudes.unit.dtype)
        mass, first = magnitudes.sums(rows, 3, thresholds)
        edges = np.concatenate([[[-1] * len(rows)], thresholds, [[np.inf] * len(rows)]])
        for cell, (low, high) in enumerate(itertools.pairwise(edges[:, :, None])):
            # Above the edge before it, and not above its own.
            inside = (m[rows] > low) & (m[rows] <= np.maximum(low, high))
            np.testing.assert_array_equal(mass[cell], inside.sum(axis=1))
            expected = (m[rows] * inside).sum(axis=1)
            np.testing.assert_allclose(first[cell], expected, rtol=0, atol=1e-12 * length)


@pytest.mark.parametrize("solver", SOLVERS)
def test_memory_at_eight_bits(monkeypatch, rng, solver):
    """2 GB for 4096 x 4096: there is no table of all sums for every element."""
    monkeypatch.setattr(search, "MAX_ITERATIONS", 2)
    x = rng.normal(size=(16, 1 << 16)).astype(np.float32)
    tracemalloc.start()
    try:
        cubin.quantize(x, 8, channel_axis=0, solver=solver)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 128 << 20


# ---------------------------------------------------------------- packed codes


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("levels", [0, 1, 3, 16])
def test_decode(xp, host, rng, dtype, mapped, levels):
    code = rng.integers(0, 1 << 16, (5, 9)).astype(np.uint16)
    bits = rng.integers(0, levels + 1, code.shape).astype(np.uint8) if mapped else np.uint8(levels)
    work = np.float64 if dtype == "float64" else np.float32
    scales = [rng.exponential(size=(5, 1)).astype(work) for _ in range(levels)]
    y = xp.empty(code.shape, dtype)
    decode(xp.asarray(code), xp.asarray(bits) if mapped else bits, *map(xp.asarray, scales), y=y)
    expected = np.zeros(code.shape, work)
    for level, scale in enumerate(scales):
        sign = np.where(code >> level & 1, 1, -1)
        step = sign * scale.astype(dtype).astype(work)
        expected = np.where(level < bits, expected + step, expected).astype(work)
    np.testing.assert_array_equal(host(y), expected.astype(dtype))
