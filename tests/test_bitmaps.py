from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

import cubin
from cubin import bitmaps
from cubin.bitmaps import allocation, budgets, parts, patterns, selection, threshold
from cubin.core.host import blocks
from cubin.core.rows import rows_of
from tests import reference

FLOATS = ["float16", "bfloat16", "float32", "float64"]
RANKED = [bitmaps.top_down, bitmaps.bottom_up, bitmaps.middle_out]
GRANULARITIES = [
    {},
    {"channel_axis": 0},
    {"channel_axis": 1},
    {"group_size": 3},
    {"group_size": 4},
]


def quantiles(distribution, size):
    """A sample without randomness."""
    return distribution.ppf((np.arange(size) + 0.5) / size)


def squared_error(x, bits, **granularity):
    approx = cubin.multibit(x, bits, **granularity)
    return float(np.square(x.astype(float) - approx.astype(float)).sum())


def relative_mse(x, bits, **granularity):
    return squared_error(x, bits, **granularity) / float(np.square(x.astype(float)).sum())


# ---------------------------------------------------------------- uniform, random


def test_uniform_fills_the_shape():
    bits = bitmaps.uniform((2, 3), np.int64(5))
    assert bits.dtype == np.int8
    np.testing.assert_array_equal(bits, np.full((2, 3), 5))
    assert bitmaps.uniform(4, 0).shape == (4,)


@pytest.mark.parametrize("bits", [-1, 17])
def test_uniform_names_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=rf"bits must lie in 0 \.\. 16, got {bits}"):
        bitmaps.uniform(3, bits)


@pytest.mark.parametrize("bits", [True, 1.5, "2"])
def test_uniform_takes_integers_only(bits):
    with pytest.raises(TypeError, match="bits must be an integer"):
        bitmaps.uniform(3, bits)


def test_random_has_the_shares_of_a_rounded_and_cut_normal_law():
    bits = bitmaps.random((500, 400), 1.4, rng=0)
    assert bits.dtype == np.int8
    edges = stats.norm(1.4).cdf([1.5, 2.5, 3.5, 4.5])
    shares = np.diff(edges, prepend=0)
    found = [np.mean(bits == width) for width in (1, 2, 3, 4)]
    np.testing.assert_allclose(found, shares, atol=5e-3)
    assert bits.mean() == pytest.approx(1.615, abs=0.01)
    assert bits.min() == 1


def test_random_is_cut_to_what_codes_can_have():
    assert bitmaps.random(1000, 16, rng=0).max() == 16


def test_random_repeats_with_its_seed():
    first = bitmaps.random(100, 2.0, rng=7)
    np.testing.assert_array_equal(first, bitmaps.random(100, 2.0, np.random.default_rng(7)))
    assert (first != bitmaps.random(100, 2.0, rng=8)).any()


@pytest.mark.parametrize("mean", [-0.1, 16.5, math.nan])
def test_random_names_a_mean_out_of_range(mean):
    with pytest.raises(ValueError, match="mean_bits must lie in"):
        bitmaps.random(3, mean, rng=0)


@pytest.mark.parametrize("mean", [True, "1", None, 1j])
def test_random_takes_real_means_only(mean):
    with pytest.raises(TypeError, match="mean_bits must be a real number"):
        bitmaps.random(3, mean, rng=0)


# ---------------------------------------------------------------- by rank


def ranked_by_hand(x, counts, key):
    """Python's sort is stable: equal keys keep their order."""
    x = np.asarray(x, float).ravel()
    order = sorted(range(x.size), key=lambda index: key(abs(x[index]), np.abs(x).mean()))
    widths = [width for width in sorted(counts, reverse=True) for _ in range(counts[width])]
    bits = np.zeros(x.size, int)
    for index, width in zip(order, widths, strict=True):
        bits[index] = width
    return bits


KEYS = {
    bitmaps.top_down: lambda m, mean: -m,
    bitmaps.bottom_up: lambda m, mean: m,
    bitmaps.middle_out: lambda m, mean: -abs(m - mean),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("ranked", RANKED)
def test_ranked_maps_follow_their_order(xp, host, rng, ranked, dtype):
    # Sums of eighths are exact, so that ties are ties in the reference, too.
    x = (rng.integers(-16, 17, (8, 5)) / 8).astype(dtype)
    bits = ranked(xp.asarray(x), {2: 0.3, 1: 0.6, 7: 0.1})
    assert type(bits) is type(xp.asarray(x))
    assert bits.dtype == np.int8
    expected = ranked_by_hand(x, {1: 24, 2: 12, 7: 4}, KEYS[ranked])
    np.testing.assert_array_equal(host(bits).ravel(), expected)


@pytest.mark.parametrize("ranked", RANKED)
def test_ranked_maps_of_views_are_those_of_copies(rng, ranked):
    x = rng.standard_normal((6, 8))[::-1, ::2]
    mix = {1: 0.5, 3: 0.5}
    np.testing.assert_array_equal(ranked(x, mix), ranked(x.copy(), mix))
    np.testing.assert_array_equal(ranked(x.tolist(), mix), ranked(x, mix))


@pytest.mark.parametrize("ranked", RANKED)
@pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
def test_ranked_maps_of_hardly_anything(ranked, shape):
    bits = ranked(np.zeros(shape, np.float32), {1: 0.25, 2: 0.75})
    np.testing.assert_array_equal(bits, np.full(shape, 2))
    assert bits.dtype == np.int8


@given(
    shares=st.dictionaries(st.integers(0, 16), st.integers(0, 100), min_size=1).filter(
        lambda shares: sum(shares.values())
    ),
    size=st.integers(0, 300),
)
def test_a_mix_is_met_to_one_element(shares, size):
    total = sum(shares.values())
    mix = {width: share / total for width, share in shares.items()}
    bits = bitmaps.middle_out(np.linspace(-1, 2, size), mix)
    assert set(np.unique(bits)) <= set(mix)
    for width, share in mix.items():
        assert abs(np.count_nonzero(bits == width) - share * size) < 1 + 1e-9


def test_whole_counts_are_met_exactly():
    bits = bitmaps.top_down(np.arange(1.0, 101.0), {1: 0.7, 2: 0.2, 3: 0.1})
    np.testing.assert_array_equal(np.bincount(bits), [0, 70, 20, 10])


def test_middle_out_at_70_20_10_percent_on_a_gaussian():
    x = quantiles(stats.norm(), 200_000)
    bits = bitmaps.middle_out(x, {1: 0.7, 2: 0.2, 3: 0.1})
    assert relative_mse(x, bits) == pytest.approx(0.1085, abs=5e-4)


@pytest.mark.parametrize("ranked", RANKED)
@pytest.mark.parametrize(
    ("mix", "error", "message"),
    [
        ([0.5, 0.5], TypeError, "mix must map bits to shares"),
        ({1.5: 1.0}, TypeError, "bits in mix must be an integer, got float"),
        ({True: 1.0}, TypeError, "bits in mix must be an integer, got a boolean"),
        ({1: "1"}, TypeError, "share in mix must be a real number, got str"),
        ({1: True}, TypeError, "share in mix must be a real number, got bool"),
        ({}, ValueError, "must sum to 1, got 0"),
        ({17: 1.0}, ValueError, r"bits in mix must lie in 0 \.\. 16, got 17"),
        ({1: 1.5, 2: -0.5}, ValueError, r"share in mix must lie in 0 \.\. 1, got 1.5"),
        ({1: math.nan, 2: 1.0}, ValueError, r"share in mix must lie in 0 \.\. 1, got nan"),
        ({1: 0.5, 2: 0.4}, ValueError, "must sum to 1, got 0.9"),
    ],
)
def test_a_bad_mix_is_named(ranked, mix, error, message):
    with pytest.raises(error, match=message):
        ranked(np.ones(3), mix)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_no_rank(bad):
    x = np.array([1.0, bad, 2.0])
    for ranked in RANKED:
        with pytest.raises(ValueError, match="x must be finite"):
            ranked(x, {1: 1.0})
    with pytest.raises(ValueError, match="x must be finite"):
        bitmaps.budget(x, 1.5)
    with pytest.raises(ValueError, match=r"array 'w': it has NaN or infinity"):
        bitmaps.allocate({"w": x}, 1.5, channel_axis=None)


def test_integers_have_to_be_cast():
    for ranked in RANKED:
        with pytest.raises(TypeError, match=r"x must be float16, .* or float64, got int64"):
            ranked(np.arange(3), {1: 1.0})
    with pytest.raises(TypeError, match=r"x must be float16, .* or float64, got int64"):
        bitmaps.budget(np.arange(3), 1.0)


# ---------------------------------------------------------------- budget


@pytest.mark.parametrize(
    "distribution", [stats.norm(), stats.laplace(), stats.uniform(-1, 2), stats.t(3)]
)
def test_budget_beats_the_mix_of_70_20_10_percent(distribution):
    x = quantiles(distribution, 20_000)
    error = relative_mse(x, bitmaps.budget(x, 1.4))
    for ranked in RANKED:
        assert error < relative_mse(x, ranked(x, {1: 0.7, 2: 0.2, 3: 0.1}))


@pytest.mark.parametrize(
    ("mean", "most", "known"), [(1.4, 3, 0.0799), (2.0, 4, 0.0209), (2.5, 4, 0.0172)]
)
def test_budget_on_a_gaussian(mean, most, known):
    x = quantiles(stats.norm(), 100_000)
    bits = bitmaps.budget(x, mean, max_bits=most)
    assert bits.mean() == mean
    assert relative_mse(x, bits) < known


def test_only_the_map_beats_shannon():
    x = quantiles(stats.norm(), 50_000)
    code = cubin.quantize(x, bitmaps.budget(x, 1.4))
    error = cubin.errors.relative_mse(x, code.dequantize())
    assert 4**-code.effective_bits < error < 4**-code.payload_bits


def some_array(seed, shape, dtype, kind):
    rng = np.random.default_rng(seed)
    x = {
        "normal": rng.standard_normal(shape),
        "heavy": rng.standard_t(1.5, shape),
        "tied": rng.integers(-2, 3, shape),
        "rows": rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3, (shape[0], 1)),
        "sparse": rng.standard_normal(shape) * (rng.random(shape) < 0.1),
    }[kind]
    return np.clip(x, -1e4, 1e4).astype(dtype)


KINDS = st.sampled_from(["normal", "heavy", "tied", "rows", "sparse"])


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4).map(lambda n: 3 * n)),
    dtype=st.sampled_from(FLOATS),
    kind=KINDS,
    granularity=st.sampled_from(GRANULARITIES),
    least=st.integers(0, 2),
    more=st.integers(0, 4),
    share=st.floats(0, 1),
)
def test_budget_meets_its_mean_and_is_never_worse(
    seed, shape, dtype, kind, granularity, least, more, share
):
    x = some_array(seed, shape, dtype, kind)
    most = least + more
    mean = min(least + share * more, most)
    bits = bitmaps.budget(x, mean, min_bits=least, max_bits=most, **granularity)
    assert bits.dtype == np.int8
    assert bits.shape == x.shape
    assert least <= bits.min()
    assert bits.max() <= most
    assert abs(int(bits.sum()) - mean * x.size) <= 0.5 + 1e-9

    whole, more = divmod(int(bits.sum()), x.size)
    mix = {whole: 1 - more / x.size, whole + 1: more / x.size}
    mix = {width: part for width, part in mix.items() if part}
    error = squared_error(x, bits, **granularity)
    for ranked in RANKED:
        other = ranked(x, mix)
        assert other.sum() == bits.sum()
        assert error <= squared_error(x, other, **granularity) * (1 + 1e-12)
    assert error <= squared_error(x, bitmaps.uniform(x.shape, whole), **granularity) or more


@pytest.mark.parametrize(
    ("dtype", "granularity"),
    [
        ("float16", {"group_size": 3}),
        ("float32", {"group_size": 4}),
        ("float64", {"channel_axis": 1}),
    ],
)
def test_budget_on_either_library(xp, host, rng, monkeypatch, dtype, granularity):
    monkeypatch.setattr(budgets, "_SWEEPS", 1)
    x = rng.standard_normal((4, 9)).astype(dtype)
    bits = bitmaps.budget(xp.asarray(x), 1.7, **granularity)
    assert type(bits) is type(xp.asarray(x))
    assert bits.shape == x.shape
    assert int(bits.sum()) == round(1.7 * x.size)
    known = relative_mse(x, bitmaps.budget(x, 1.7, **granularity), **granularity)
    # Sums are taken in another order there, which may tip the search between near equals.
    assert relative_mse(x, host(bits), **granularity) == pytest.approx(known, rel=0.2)


def test_budget_does_not_depend_on_the_axes_order(rng):
    x = rng.standard_normal((40, 30)) * np.exp(rng.standard_normal((40, 1)))
    expected = bitmaps.budget(x, 1.6, channel_axis=0)
    np.testing.assert_array_equal(bitmaps.budget(x.T, 1.6, channel_axis=1).T, expected)
    np.testing.assert_array_equal(bitmaps.budget(x[::-1], 1.6, channel_axis=0)[::-1], expected)
    grouped = bitmaps.budget(x.reshape(20, 60), 1.6, group_size=30)
    np.testing.assert_array_equal(grouped.reshape(40, 30), expected)


@pytest.mark.parametrize(
    ("dtype", "powers"), [("float16", [-6, 4]), ("float32", [-120, 100]), ("float64", [-900, 900])]
)
def test_budget_does_not_depend_on_the_unit(rng, dtype, powers):
    x = np.round(rng.standard_normal((4, 60)), 2).astype(dtype)
    expected = bitmaps.budget(x, 1.5, channel_axis=0)
    for power in powers:
        np.testing.assert_array_equal(
            bitmaps.budget(np.ldexp(x, power), 1.5, channel_axis=0), expected
        )


def test_budget_measures_shorter_groups_with_their_own_scales(xp, rng):
    x = rng.standard_normal((4, 3, 10)) * np.exp(rng.standard_normal((4, 3, 10)))
    bits = rng.integers(0, 3, x.shape).astype(np.int8)
    held, rows = xp.asarray(x), rows_of(x.shape, None, 4)
    whole = budgets._Whole(held, rows, 0, 2, 0, patterns.exponent(held))
    found = whole.squared_error(xp.asarray(bits), whole.fit(xp.asarray(bits)))
    known = squared_error(x, bits, group_size=4)
    assert math.ldexp(found, 2 * whole.exponent) == pytest.approx(known, rel=1e-12)


def test_budget_puts_its_bits_where_they_count(rng):
    x = np.where(rng.random(2000) < 0.1, 5.0, 1.0) * rng.choice([-1.0, 1.0], 2000)
    bits = bitmaps.budget(x, 1.1 * 2 - 1.0, max_bits=2)
    assert relative_mse(x, bits) < relative_mse(x, bitmaps.random(2000, 1.2, rng))
    # Levels 1.4 and about 3.6 suit the rare large elements: these have the second one.
    assert bits[np.abs(x) == 5].min() == 2


def test_budget_with_nothing_to_choose():
    x = np.array([3.0, -1.0, 0.5])
    np.testing.assert_array_equal(bitmaps.budget(x, 1), [1, 1, 1])
    np.testing.assert_array_equal(bitmaps.budget(x, 3.0), [3, 3, 3])
    np.testing.assert_array_equal(bitmaps.budget(x, 2, min_bits=2, max_bits=2), [2, 2, 2])
    assert bitmaps.budget(np.zeros((0, 4)), 1.5).shape == (0, 4)
    assert int(bitmaps.budget(np.float32(2.0), 2)) == 2
    assert bitmaps.budget(np.zeros(4), 1.5).sum() == 6


def test_budget_does_not_depend_on_threads(monkeypatch, rng):
    x = rng.standard_normal((50, 200)).astype(np.float32)
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    for granularity in ({}, {"channel_axis": 0}):
        alone = bitmaps.budget(x, 1.4, **granularity)
        monkeypatch.setattr(blocks, "SHARE", 1)
        monkeypatch.setattr(blocks, "_workers", lambda: 3)
        np.testing.assert_array_equal(bitmaps.budget(x, 1.4, **granularity), alone)
        monkeypatch.undo()
        monkeypatch.setattr(blocks, "BLOCK", 1000)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mean_bits": 0.9}, ValueError, r"mean_bits must lie in 1 \.\. 3, got 0.9"),
        (
            {"mean_bits": 3.1},
            ValueError,
            r"mean_bits must lie in 1 \.\. 3, got 3.1: min_bits and max_bits",
        ),
        ({"mean_bits": math.nan}, ValueError, "mean_bits must lie in"),
        ({"mean_bits": "2"}, TypeError, "mean_bits must be a real number, got str"),
        ({"min_bits": 3, "max_bits": 2}, ValueError, "min_bits must not exceed max_bits"),
        ({"max_bits": 17}, ValueError, r"max_bits must lie in 0 \.\. 16, got 17"),
        ({"min_bits": 1.0}, TypeError, "min_bits must be an integer, got float"),
        ({"channel_axis": 2}, ValueError, "channel_axis 2 is out of range"),
        ({"group_size": 0}, ValueError, "group_size must be at least 1"),
        ({"channel_axis": 0, "group_size": 3}, ValueError, "exclude each other"),
    ],
)
def test_budget_names_what_is_wrong(options, error, message):
    with pytest.raises(error, match=message):
        bitmaps.budget(np.ones((2, 3)), **{"mean_bits": 2, **options})


# ---------------------------------------------------------------- hull and spending

CURVES = st.integers(1, 6).flatmap(
    lambda steps: st.lists(
        st.lists(st.integers(0, 50), min_size=steps + 1, max_size=steps + 1),
        min_size=1,
        max_size=6,
    )
)


def hull_falls(curve):
    """The falls of the lower convex hull, edge by edge: the steepest from each corner."""
    falls, corner = [], 0
    while corner < len(curve) - 1:
        slopes = [(curve[corner] - curve[t]) / (t - corner) for t in range(corner + 1, len(curve))]
        steepest = max(slopes)
        length = len(slopes) - slopes[::-1].index(steepest)
        falls += [steepest] * length
        corner += length
    return falls


@given(CURVES)
def test_hull_is_the_lower_convex_hull(curves):
    found = budgets.hull(list(np.array(curves, float).T)).T
    np.testing.assert_allclose(found, [hull_falls(curve) for curve in curves], rtol=1e-12)
    assert (np.diff(found, axis=1) <= 0).all()


def bits_spent(gains, bits):
    """How many of the largest gains, (steps, *shape), each element has."""
    positions = np.arange(float(gains[0].size)).reshape(gains.shape[1:])
    flat = gains.reshape(len(gains), -1)
    rows = rows_of(positions.shape)
    return budgets.spend(lambda own, at: flat[:, at.astype(int)], positions, rows, bits)


@given(CURVES, st.floats(0, 1))
def test_bits_are_spent_at_one_price(curves, share):
    curves = np.array(curves, float)
    gains = budgets.hull(list(curves.T))
    assume(gains.size)
    bits = max(1, round(share * gains.size))
    counts = bits_spent(gains, bits)
    assert counts.sum() == bits
    price = np.sort(gains.ravel())[-bits]
    cost = curves + price * np.arange(curves.shape[1])
    spent = np.take_along_axis(cost, counts[:, None].astype(int), axis=1)[:, 0]
    # No element could do better at this price, but the one where the bits ran out.
    assert np.count_nonzero(spent > cost.min(axis=1) + 1e-9) <= 1


def test_equal_gains_go_by_position():
    np.testing.assert_array_equal(bits_spent(np.ones((2, 2, 2)), 5), [[2, 2], [1, 0]])


# ---------------------------------------------------------------- allocate


def total_error(arrays, bits, channel_axis=0, weights=None):
    return sum(
        squared_error(x, bits[name], channel_axis=channel_axis) * (weights or {}).get(name, 1)
        for name, x in arrays.items()
    )


def model(seed, kinds, dtype="float64"):
    rng = np.random.default_rng(seed)
    return {
        str(number): some_array(
            seed + number, (int(rng.integers(1, 6)), int(rng.integers(1, 40))), dtype, kind
        )
        for number, kind in enumerate(kinds)
    }


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    kinds=st.lists(KINDS, min_size=1, max_size=4),
    axis=st.sampled_from([0, 1, None]),
    least=st.integers(0, 2),
    more=st.integers(0, 4),
)
def test_allocation_is_monotone_meets_its_budget_and_beats_uniform(seed, kinds, axis, least, more):
    arrays = model(seed, kinds)
    most = least + more
    size = sum(x.size for x in arrays.values())
    longest = max(x.size if axis is None else x.size // x.shape[axis] for x in arrays.values())
    uniform = {
        width: total_error(arrays, dict.fromkeys(arrays, width), axis)
        for width in range(least, most + 1)
    }
    before = None
    for mean in np.linspace(least, most, 4 * more + 1):
        bits = bitmaps.allocate(arrays, mean, channel_axis=axis, min_bits=least, max_bits=most)
        for name, x in arrays.items():
            assert bits[name].dtype == np.int8
            expected = (
                [1, 1] if axis is None else [n if a == axis else 1 for a, n in enumerate(x.shape)]
            )
            assert list(bits[name].shape) == expected
            assert bits[name].min() >= least
            assert bits[name].max() <= most
            if before is not None:
                assert (bits[name] >= before[name]).all()
        spent = sum(np.broadcast_to(bits[name], x.shape).sum() for name, x in arrays.items())
        budget = round(mean * size)
        assert budget - longest < spent <= budget
        assert total_error(arrays, bits, axis) <= uniform[math.floor(mean)] * (1 + 1e-9)
        before = bits


def test_allocation_is_the_best_for_its_bits(rng):
    # Rows of equal length, and Gaussian, so that the error falls ever more slowly with the bits.
    x = rng.standard_normal((5, 400)) * np.array([[0.2], [1.0], [3.0], [0.7], [1.1]])
    curves = [[squared_error(row, width) for width in range(1, 5)] for row in x]
    every = list(itertools.product(range(4), repeat=5))
    errors = dict.fromkeys(range(16), math.inf)
    for widths in every:
        more = sum(widths)
        errors[more] = min(
            errors[more], sum(curve[width] for curve, width in zip(curves, widths, strict=True))
        )
    for more in range(16):
        bits = bitmaps.allocate({"x": x}, 1 + more / 5, max_bits=4)
        assert bits["x"].sum() == 5 + more
        assert total_error({"x": x}, bits) == pytest.approx(errors[more], rel=1e-9)


def test_a_row_that_hardly_fits_is_not_starved(rng):
    arrays = {"small": rng.standard_normal(10), "large": rng.standard_normal(1000)}
    uniform = total_error(arrays, {"small": 2, "large": 2}, None)
    bits = bitmaps.allocate(arrays, 2, channel_axis=None)
    assert total_error(arrays, bits, None) <= uniform
    assert bits["large"].item() == 2


def test_rows_of_more_power_get_more_bits(rng):
    x = rng.standard_normal((6, 500)) * 4.0 ** np.arange(6)[:, None]
    bits = bitmaps.allocate({"x": x}, 3)["x"].ravel()
    assert (np.diff(bits) >= 0).all()
    assert bits[0] < bits[-1]


def test_importance_weighs_squared_errors(rng):
    arrays = {"a": rng.standard_normal((4, 50)), "b": rng.standard_normal((3, 2, 30))}
    plain = bitmaps.allocate(arrays, 2.3)
    for importance in ({"a": 4.0}, {"a": 4}, {"a": np.full(4, 4.0)}, {"a": np.full((4, 1), 4.0)}):
        weighted = bitmaps.allocate(arrays, 2.3, importance=importance)
        scaled = bitmaps.allocate({**arrays, "a": 2 * arrays["a"]}, 2.3)
        for name in arrays:
            np.testing.assert_array_equal(weighted[name], scaled[name])
    assert any((weighted[name] != plain[name]).any() for name in arrays)

    ignored = bitmaps.allocate(arrays, 2.3, importance={"a": np.array([1.0, 0.0, 1.0, 1.0])})
    assert ignored["a"].ravel()[1] == 1
    everywhere = bitmaps.allocate(arrays, 2.3, importance={"a": 7.0, "b": 7.0})
    for name in arrays:
        np.testing.assert_array_equal(everywhere[name], plain[name])


def test_importance_of_several_axes_is_in_the_order_of_the_scales(rng):
    x = rng.standard_normal((3, 20, 4))
    importance = rng.random((4, 3))
    found = bitmaps.allocate({"x": x}, 2.5, channel_axis=(2, 0), importance={"x": importance})
    assert found["x"].shape == (3, 1, 4)
    moved = x.transpose(2, 0, 1)
    expected = bitmaps.allocate(
        {"x": moved}, 2.5, channel_axis=(0, 1), importance={"x": importance}
    )
    # Ties aside, which random numbers have none of, the order of rows does not matter.
    np.testing.assert_array_equal(found["x"].transpose(2, 0, 1), expected["x"])


@pytest.mark.parametrize("dtype", FLOATS)
def test_allocation_in_every_dtype_and_library(xp, host, rng, dtype):
    x = (rng.standard_normal((4, 60)) * np.array([[0.1], [1], [2], [5]])).astype(dtype)
    bits = bitmaps.allocate({"x": xp.asarray(x)}, 2.5, max_bits=4)["x"]
    assert type(bits) is type(xp.asarray(x))
    np.testing.assert_array_equal(host(bits), bitmaps.allocate({"x": x}, 2.5, max_bits=4)["x"])
    code = cubin.quantize(xp.asarray(x), bits, channel_axis=0)
    assert code.payload_bits == 2.5


def test_a_map_per_row_costs_next_to_nothing(rng):
    x = rng.standard_normal((64, 4096)) * np.exp(rng.standard_normal((64, 1)))
    bits = bitmaps.allocate({"x": x}, 2.0)["x"]
    code = cubin.quantize(x, bits, channel_axis=0)
    assert len(np.unique(bits)) > 2
    scales = 64 * bits.sum() / x.size
    assert 0 < code.effective_bits - code.payload_bits - scales < 0.001


def test_allocation_of_hardly_anything():
    assert bitmaps.allocate({}, 2) == {}
    empty = bitmaps.allocate({"a": np.zeros((0, 3)), "b": np.ones((2, 3))}, 2)
    assert empty["a"].shape == (0, 1)
    assert empty["b"].sum() == 4
    assert bitmaps.allocate({"a": np.zeros((3, 0))}, 2)["a"].shape == (3, 1)
    zeros = bitmaps.allocate({"a": np.zeros((4, 3))}, 1.5, max_bits=3)["a"]
    assert zeros.sum() == 6


@pytest.mark.parametrize(
    ("arrays", "options", "error", "message"),
    [
        ([np.ones((2, 2))], {}, TypeError, "arrays must map names to arrays, got list"),
        ({"w": np.arange(4)}, {}, TypeError, "array 'w': x must be float16"),
        ({"w": np.float32(1)}, {}, ValueError, "array 'w': channel_axis 0 is out of range"),
        ({"w": np.ones(2)}, {"mean_bits": 9}, ValueError, r"mean_bits must lie in 1 \.\. 8"),
        ({"w": np.ones(2)}, {"importance": 2.0}, TypeError, "importance must map names"),
        ({"w": np.ones(2)}, {"importance": {"v": 1.0}}, ValueError, "a weight for 'v'"),
        ({"w": np.ones(2)}, {"importance": {"w": -1.0}}, ValueError, "array 'w': .*non-negative"),
        ({"w": np.ones(2)}, {"importance": {"w": np.nan}}, ValueError, "array 'w': .*finite"),
        ({"w": np.ones(2)}, {"importance": {"w": "x"}}, TypeError, "array 'w': .*real numbers"),
        (
            {"w": np.ones((2, 3))},
            {"importance": {"w": np.ones(3)}},
            ValueError,
            r"array 'w': its importance has shape \(3,\), but its rows have shape \(2,\)",
        ),
    ],
)
def test_allocation_names_what_is_wrong(arrays, options, error, message):
    with pytest.raises(error, match=message):
        bitmaps.allocate(arrays, **{"mean_bits": 2, **options})


# ---------------------------------------------------------------- ternary


def ternary_error(x, bits, weights):
    """With the best scale for the elements that have a bit; `bits` may be many maps."""
    x, weights = np.abs(x.astype(float)), weights.astype(float)
    weight, total = bits @ weights, bits @ (weights * x)
    return (weights * x**2).sum() - total**2 / np.where(weight > 0, weight, 1)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 2).map(lambda n: 3 * n)),
    dtype=st.sampled_from(FLOATS),
    kind=KINDS,
    granularity=st.sampled_from(GRANULARITIES),
    weigh=st.sampled_from([None, "random", "sparse"]),
)
def test_no_map_of_0_and_1_is_better_than_ternary(seed, shape, dtype, kind, granularity, weigh):
    x = some_array(seed, shape, dtype, kind)
    rng = np.random.default_rng(seed)
    weights = {
        None: np.ones(shape),
        "random": rng.random(shape),
        "sparse": rng.random(shape) * (rng.random(shape) < 0.5),
    }[weigh].astype(dtype)
    bits = bitmaps.ternary(x, importance=None if weigh is None else weights, **granularity)
    assert bits.dtype == np.int8
    assert bits.shape == shape
    for members in reference.rows(shape, **granularity).values():
        where = tuple(np.array(members).T)
        own, found, weight = x[where], bits[where], weights[where]
        kept = np.abs(own[found == 1])
        assert kept.size == 0 or np.abs(own[found == 0]).max(initial=-1) < kept.min()
        every = np.array(list(itertools.product((0, 1), repeat=len(own))))
        least = ternary_error(own, every, weight).min()
        power = (weight.astype(float) * own.astype(float) ** 2).sum()
        assert ternary_error(own, found, weight) <= least + 1e-12 * power
        if not power:
            assert not found.any()


def test_quantize_has_the_scales_of_a_ternary_map(rng):
    x = rng.standard_normal((20, 64)) * np.exp(rng.standard_normal((20, 1)))
    code = cubin.quantize(x, bitmaps.ternary(x, channel_axis=0), channel_axis=0)
    known = [ternary_error(row, bits, np.ones(64)) for row, bits in zip(x, code.bits, strict=True)]
    np.testing.assert_allclose(np.square(x - code.dequantize()).sum(axis=1), known, rtol=1e-12)
    assert code.payload_bits < code.effective_bits <= math.log2(3) + 64 / 64


def test_ternary_of_a_gaussian():
    x = quantiles(stats.norm(), 200_000)
    bits = bitmaps.ternary(x)
    # The best threshold of a Gaussian is 0.612, and leaves 0.1902 of the power.
    assert np.abs(x[bits == 1]).min() == pytest.approx(0.612, abs=1e-3)
    assert relative_mse(x, bits) == pytest.approx(0.1902, abs=1e-4)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_ternary_on_either_library(xp, host, rng, dtype, granularity):
    x = rng.standard_normal((4, 9)).astype(dtype)
    weights = rng.random(9).astype(dtype)
    for importance in (None, weights):
        given_ = None if importance is None else xp.asarray(importance)
        bits = bitmaps.ternary(xp.asarray(x), importance=given_, **granularity)
        assert type(bits) is type(xp.asarray(x))
        expected = bitmaps.ternary(x, importance=importance, **granularity)
        np.testing.assert_array_equal(host(bits), expected)


@pytest.mark.parametrize(("dtype", "power"), [("float16", 5), ("float32", 120), ("float64", 1000)])
def test_ternary_does_not_depend_on_the_unit(rng, dtype, power):
    x = np.round(rng.standard_normal((3, 50)), 2).astype(dtype)
    weights = rng.random((3, 50)).astype(dtype)
    for importance in (None, weights):
        expected = bitmaps.ternary(x, channel_axis=0, importance=importance)
        large = bitmaps.ternary(np.ldexp(x, power), channel_axis=0, importance=importance)
        np.testing.assert_array_equal(large, expected)


def test_ternary_in_blocks_is_that_of_the_whole(monkeypatch, rng):
    x = rng.standard_normal((7, 100)).astype(np.float32)
    weights = rng.random((7, 100)).astype(np.float32)
    for options in ({}, {"channel_axis": 0}, {"channel_axis": 0, "importance": weights}):
        whole = bitmaps.ternary(x, **options)
        with monkeypatch.context() as patch:
            patch.setattr(threshold, "_BLOCK", 16)
            np.testing.assert_array_equal(bitmaps.ternary(x, **options), whole)


@pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
def test_ternary_of_hardly_anything(shape):
    bits = bitmaps.ternary(np.ones(shape, np.float32))
    np.testing.assert_array_equal(bits, np.ones(shape))
    assert bits.dtype == np.int8


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x": np.arange(3)}, TypeError, "x must be float16"),
        ({"x": np.array([1.0, np.nan])}, ValueError, "x must be finite"),
        ({"importance": np.ones(3, int)}, TypeError, "importance must be float16"),
        ({"importance": np.ones(2)}, ValueError, r"importance of shape \(2,\) does not broadcast"),
        ({"importance": -np.ones(3)}, ValueError, "importance must be finite and not negative"),
        ({"importance": np.full(3, np.inf)}, ValueError, "importance must be finite and not"),
        ({"channel_axis": 2}, ValueError, "channel_axis 2 is out of range"),
        ({"channel_axis": 0, "group_size": 3}, ValueError, "exclude each other"),
    ],
)
def test_ternary_names_what_is_wrong(options, error, message):
    with pytest.raises(error, match=message):
        bitmaps.ternary(**{"x": np.ones((2, 3)), **options})


# ---------------------------------------------------------------- large arrays


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bounds_are_those_of_a_sort(xp, rng, dtype, sign):
    numbers = sign * np.round(rng.standard_normal(500), 1).astype(dtype)
    numbers[:40] = -0.0
    chunks = [xp.asarray(chunk) for chunk in np.split(numbers, 10)]

    def go_over(look):
        for chunk in chunks:
            look(chunk)

    ranks = [0, 1, 7, 250, 260, 499, 500]
    for k, bound in zip(ranks, selection.bounds(go_over, ranks), strict=True):
        above = np.count_nonzero(numbers > bound.value)
        assert above + bound.left == k
        assert bound.left < max(np.count_nonzero(numbers == bound.value), 1)


def test_bounds_of_numbers_beyond_float32():
    numbers = np.array([1e300, -1e300, 2e300, 1e-300, 0.0, -1e-300, 5.0])
    ranks = range(8)
    for k, bound in zip(ranks, selection.bounds(lambda look: look(numbers), ranks), strict=True):
        assert np.count_nonzero(numbers > bound.value) == k
        assert bound.left == 0


@pytest.mark.parametrize(
    "granularity", [{}, {"channel_axis": 0}, {"group_size": 20}, {"group_size": 60}]
)
@pytest.mark.parametrize("distribution", [stats.norm(), stats.t(3)])
def test_budget_of_an_array_that_few_magnitudes_stand_for(monkeypatch, distribution, granularity):
    x = distribution.rvs((40, 500), random_state=0) * np.exp(np.linspace(-2, 2, 40))[:, None]
    whole = bitmaps.budget(x, 1.6, **granularity)
    monkeypatch.setattr(budgets, "_POINTS", 1 << 11)
    few = bitmaps.budget(x, 1.6, **granularity)
    assert few.sum() == whole.sum() == round(1.6 * x.size)
    assert squared_error(x, few, **granularity) <= 1.05 * squared_error(x, whole, **granularity)


def test_tied_bits_of_a_budget_go_by_position(monkeypatch):
    x = np.ones((4, 50), np.float32)
    monkeypatch.setattr(parts, "TILE", 16)
    bits = bitmaps.budget(x, 1.3, max_bits=2)
    np.testing.assert_array_equal(bits.ravel(), [2] * 60 + [1] * 140)


@pytest.mark.parametrize("ranked", RANKED)
def test_ranked_maps_do_not_depend_on_the_tiles(monkeypatch, rng, ranked):
    x = np.asfortranarray(rng.integers(-9, 10, (50, 70)).astype(np.float32))
    mix = {1: 0.5, 2: 0.3, 4: 0.2}
    expected = ranked(x, mix)
    monkeypatch.setattr(parts, "TILE", 100)
    np.testing.assert_array_equal(ranked(x, mix), expected)


def test_allocation_does_not_depend_on_the_tiles(monkeypatch, rng):
    x = rng.standard_normal((6, 5000)) * np.exp(rng.standard_normal((6, 1)))
    expected = bitmaps.allocate({"x": x}, 2.5)["x"]
    monkeypatch.setattr(parts, "TILE", 300)
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    np.testing.assert_array_equal(bitmaps.allocate({"x": x}, 2.5)["x"], expected)
    curves = allocation._curves(x.astype(np.float16), 0, 0, 3)
    own = [[squared_error(row, width) for row in x.astype(np.float16)] for width in range(4)]
    np.testing.assert_allclose(curves, own, rtol=1e-9)
