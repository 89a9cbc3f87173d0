"""quantize with a Gram matrix: against all codes, and on a layer whose inputs go together."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cubin
from cubin.solvers import gram as gram_steps
from cubin.solvers import outputs
from tests.exhaustive import few

SOLVERS = ["refined", "alternating", "optimal"]


def spread_inputs(rng, n, count=64):
    """Inputs that go together."""
    return rng.standard_normal((count, n)) @ rng.standard_normal((n, n))


def errors_of_lines(w, approx, matrix):
    """The output error of each line, by plain loops over pairs of inputs."""
    found = []
    for line, other in zip(
        w.reshape(len(w), len(matrix)), approx.reshape(len(w), len(matrix)), strict=True
    ):
        e = line.astype(np.float64) - other.astype(np.float64)
        found.append(sum(e[i] * matrix[i, j] * e[j] for i in range(len(e)) for j in range(len(e))))
    return np.array(found)


def least_error(w, matrix, bits):
    """The least error of a line over all codes, with least-squares scales in the metric."""
    values, vectors = np.linalg.eigh(matrix)
    root = vectors * np.sqrt(values.clip(0))  # matrix = root root^T
    levels = int(np.max(bits))
    choices = [
        [(*signs, *[0.0] * (levels - m)) for signs in itertools.product((-1.0, 1.0), repeat=m)]
        for m in bits
    ]
    least = np.inf
    for columns in itertools.product(*choices):
        seen = np.array(columns).T @ root
        scales = np.linalg.lstsq(seen.T, w @ root, rcond=None)[0]
        least = min(least, float(((w @ root - scales @ seen) ** 2).sum()))
    return least


def granularities(n):
    return [{"channel_axis": 0}, {"group_size": n // 2}, {"group_size": n // 2 + 1}]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("granularity", few(range(3), 2))
def test_no_line_is_worse_than_without(xp, host, rng, solver, mapped, granularity):
    w = rng.standard_normal((5, 8)).astype(np.float32)
    inputs = spread_inputs(rng, 8)
    where = granularities(8)[granularity]
    bits = rng.integers(0, 4, w.shape).astype(np.uint8) if mapped else 2
    matrix = inputs.T @ inputs / len(inputs)
    gram = cubin.Gram(8).add(xp.asarray(inputs))
    device_bits = xp.asarray(bits) if mapped else bits
    code = cubin.quantize(xp.asarray(w), device_bits, solver=solver, gram=gram, **where)
    plain = cubin.quantize(w, bits, solver=solver, **where)
    assert code.signs.dtype == np.int8
    assert type(code.signs) is type(xp.zeros(1))
    approx = host(code.dequantize())
    ours, others = (errors_of_lines(w, a, matrix) for a in (approx, plain.dequantize()))
    # float32 scales lie beside the ones that were found.
    assert (ours <= others * (1 + 1e-4) + 1e-9).all()
    assert ours.sum() < 0.95 * others.sum()
    scales, signs = host(code.scales), host(code.signs)
    assert (scales >= 0).all()
    if mapped:
        np.testing.assert_array_equal(signs != 0, bits > np.arange(len(signs))[:, None, None])
    else:
        assert (np.diff(scales, axis=0) <= 0).all()
        assert (np.abs(signs) == 1).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_both_libraries_find_the_same(device, host, rng, solver):
    w, inputs = rng.standard_normal((3, 6)), spread_inputs(rng, 6)
    ours = cubin.quantize(w, 2, channel_axis=0, solver=solver, gram=cubin.Gram(6).add(inputs))
    theirs = cubin.quantize(
        device.asarray(w), 2, channel_axis=0, solver=solver,
        gram=cubin.Gram(6).add(device.asarray(inputs)),
    )  # fmt: skip
    np.testing.assert_array_equal(host(theirs.signs), ours.signs)
    np.testing.assert_allclose(host(theirs.scales), ours.scales, rtol=1e-9)


def test_the_scales_are_of_least_squares(rng):
    """Per line, no other scales of the same codes have a lower output error."""
    w, inputs = rng.standard_normal((4, 9)), spread_inputs(rng, 9)
    gram = cubin.Gram(9).add(inputs)
    for solver in SOLVERS:
        code = cubin.quantize(w, 3, channel_axis=0, solver=solver, gram=gram)
        matrix = gram.matrix
        for line in range(4):
            signs = code.signs[:, line].astype(np.float64)
            slope = signs @ matrix @ (w[line] - code.scales[:, line] @ signs)
            assert np.abs(slope).max() < 1e-9 * np.abs(signs @ matrix @ w[line]).max()


def test_alternating_until_it_converges_is_a_minimum_of_every_single_code(rng):
    w, inputs = rng.standard_normal((4, 10)), spread_inputs(rng, 10)
    gram = cubin.Gram(10).add(inputs)
    code = cubin.quantize(w, 2, channel_axis=0, solver="alternating", iterations=None, gram=gram)
    least = errors_of_lines(w, code.dequantize(), gram.matrix)
    for line, column in np.ndindex(4, 10):
        for signs in itertools.product((-1, 1), repeat=2):
            other = code.signs.copy()
            other[:, line, column] = signs
            approx = (code.scales[:, :, None] * other).sum(axis=0)
            changed = errors_of_lines(w[line : line + 1], approx[line : line + 1], gram.matrix)
            assert changed[0] >= least[line] * (1 - 1e-6)


@pytest.mark.parametrize("seed", few(range(60), *range(10)))
def test_optimal_against_all_codes(seed):
    """The optimum is found in most cases. `test_share_of_optima` counts them."""
    rng = np.random.default_rng(seed)
    levels = int(rng.integers(1, 4))
    n = int(rng.integers(2, 12 // levels + 1)) if seed % 2 else 12 // levels
    w, inputs = rng.standard_normal((1, n)), spread_inputs(rng, n, 2 * n)
    gram = cubin.Gram(n).add(inputs)
    code = cubin.quantize(w, levels, channel_axis=0, solver="optimal", gram=gram)
    alternating = cubin.quantize(w, levels, channel_axis=0, solver="alternating", gram=gram)
    error, other = (errors_of_lines(w, c.dequantize(), gram.matrix)[0] for c in (code, alternating))
    power = errors_of_lines(w, 0 * w, gram.matrix)[0]
    assert error <= other + 1e-9 * power


@pytest.mark.exhaustive
def test_share_of_optima():
    """At least nine in ten of the optima are found, and 2 % are lost in the mean."""
    found, ratios = 0, []
    for seed in range(60):
        rng = np.random.default_rng(1000 + seed)
        levels = int(rng.integers(1, 3))
        n = int(rng.integers(2, 10 // levels + 1))
        w, inputs = rng.standard_normal(n), spread_inputs(rng, n, 2 * n)
        gram = cubin.Gram(n).add(inputs)
        code = cubin.quantize(w[None], levels, channel_axis=0, solver="optimal", gram=gram)
        error = errors_of_lines(w[None], code.dequantize(), gram.matrix)[0]
        slack = 1e-9 * errors_of_lines(w[None], 0 * w[None], gram.matrix)[0]
        least = least_error(w, gram.matrix, [levels] * n)
        assert error >= least - slack
        found += error <= least * (1 + 1e-6) + slack
        ratios.append((error + slack) / (least + slack))
    assert found >= 54
    assert np.mean(ratios) <= 1.02


def test_optimum_under_a_map(rng):
    w, inputs = rng.standard_normal((1, 5)), spread_inputs(rng, 5)
    gram = cubin.Gram(5).add(inputs)
    bits = np.array([[2, 0, 1, 2, 1]])
    code = cubin.quantize(w, bits, channel_axis=0, solver="optimal", gram=gram)
    error = errors_of_lines(w, code.dequantize(), gram.matrix)[0]
    assert error == pytest.approx(least_error(w[0], gram.matrix, bits[0]), rel=1e-6)


FIGURES = {
    (1.0, 1): (0.191, 0.163),
    (1.0, 2): (0.055, 0.050),
    (1.0, 3): (0.0164, 0.0153),
    (0.5, 1): (0.318, 0.294),
    (0.5, 2): (0.100, 0.093),
    (0.5, 3): (0.031, 0.028),
}
"""GPTQ with refitted scales, and coordinate descent in alternation, by power and levels."""


@pytest.mark.parametrize("case", few(FIGURES, (1.0, 1), (1.0, 2), (1.0, 3)))
def test_the_figures_of_a_layer_with_correlated_inputs(case):
    """W Gaussian (128, 256), and inputs whose covariance has the eigenvalues i^-power."""
    power, levels = case
    rng = np.random.default_rng(0)
    w = rng.standard_normal((128, 256))
    basis = np.linalg.qr(rng.standard_normal((256, 256)))[0]
    inputs = rng.standard_normal((4096, 256)) * np.arange(1, 257) ** (-power / 2) @ basis.T
    gram = cubin.Gram(256).add(inputs)
    found = []
    for solver in ("refined", "alternating"):
        code = cubin.quantize(w, levels, channel_axis=0, solver=solver, gram=gram)
        found.append(float(cubin.errors.output_mse(w, code.dequantize(), gram)))
    wanted = FIGURES[case]
    np.testing.assert_allclose(found, wanted, rtol=0.04)
    if power == 1:
        assert found[1] <= (0.88, 0.94, 0.95)[levels - 1] * wanted[0] * 1.02


def test_without_correlation_it_is_the_error_of_the_weights(rng):
    """With H = I every input stands for itself: the optimum of one bit is the mean of |w|."""
    w = rng.standard_normal((3, 12))
    gram = cubin.Gram(12).add(np.eye(12))
    code = cubin.quantize(w, 1, channel_axis=0, solver="refined", gram=gram)
    np.testing.assert_allclose(code.scales[0], np.abs(w).mean(axis=1), rtol=1e-12)
    np.testing.assert_array_equal(code.signs[0], np.sign(w))


@pytest.mark.parametrize("solver", SOLVERS)
def test_singular_matrices(rng, solver):
    """Dead inputs, fewer samples than inputs, and no inputs at all."""
    w = rng.standard_normal((3, 8))
    inputs = spread_inputs(rng, 8, 3)
    inputs[:, 2] = 0
    for given_inputs in (inputs, np.zeros((1, 8))):
        gram = cubin.Gram(8).add(given_inputs)
        code = cubin.quantize(w, 2, channel_axis=0, solver=solver, gram=gram)
        assert np.isfinite(code.scales).all()
        plain = cubin.quantize(w, 2, channel_axis=0, solver=solver)
        ours, others = (errors_of_lines(w, c.dequantize(), gram.matrix) for c in (code, plain))
        assert (ours <= others + 1e-12).all()


@pytest.mark.parametrize("scale", [1e-300, 1e-40, 1e30, 1e150])
def test_the_scale_of_weights_does_not_matter(rng, scale):
    w, inputs = rng.standard_normal((2, 6)), spread_inputs(rng, 6)
    gram = cubin.Gram(6).add(inputs)
    one = cubin.quantize(w, 2, channel_axis=0, solver="alternating", gram=gram)
    other = cubin.quantize(w * scale, 2, channel_axis=0, solver="alternating", gram=gram)
    np.testing.assert_array_equal(one.signs, other.signs)
    np.testing.assert_allclose(other.scales / scale, one.scales, rtol=1e-9)


def test_lines_do_not_depend_on_each_other(rng, monkeypatch):
    w, inputs = rng.standard_normal((7, 6)), spread_inputs(rng, 6)
    w[3] = 0
    gram = cubin.Gram(6).add(inputs)
    for solver in SOLVERS:
        whole = cubin.quantize(w, 2, channel_axis=0, solver=solver, gram=gram)
        assert not whole.scales[:, 3].any()
        with monkeypatch.context() as patch:
            patch.setattr(outputs, "ELEMENTS", 12)
            patch.setattr(gram_steps, "COLUMNS", 4)
            cut = cubin.quantize(w, 2, channel_axis=0, solver=solver, gram=gram)
        np.testing.assert_array_equal(whole.signs, cut.signs)
        np.testing.assert_allclose(whole.scales, cut.scales, rtol=1e-9)


def test_lines_that_are_not_finite(rng):
    w, inputs = rng.standard_normal((3, 6)), spread_inputs(rng, 6)
    gram = cubin.Gram(6).add(inputs)
    clean = cubin.quantize(w, 2, channel_axis=0, solver="alternating", gram=gram)
    w[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"x must be finite, but row \(1,\)"):
        cubin.quantize(w, 2, channel_axis=0, solver="alternating", gram=gram)
    code = cubin.quantize(w, 2, channel_axis=0, solver="alternating", gram=gram, check_finite=False)
    assert np.isnan(code.scales[:, 1]).all()
    np.testing.assert_array_equal(code.signs[:, ::2], clean.signs[:, ::2])
    np.testing.assert_allclose(code.scales[:, ::2], clean.scales[:, ::2], rtol=1e-9)


def test_weights_of_convolutions(rng):
    w = rng.standard_normal((4, 2, 3, 5)).astype(np.float32)
    images = rng.standard_normal((5, 2, 6, 6))
    gram = cubin.Gram.of_conv(images, (3, 5), padding=1)
    for where in ({"channel_axis": 0}, {"channel_axis": -4}, {"group_size": 5}, {"group_size": 4}):
        code = cubin.quantize(w, 2, solver="alternating", gram=gram, **where)
        plain = cubin.quantize(w, 2, solver="alternating", **where)
        assert code.shape == w.shape
        assert code.scales.shape == plain.scales.shape
        ours, others = (
            float(cubin.errors.output_mse(w, c.dequantize(), gram)) for c in (code, plain)
        )
        assert ours < others
        flat = cubin.quantize(np.asfortranarray(w), 2, solver="alternating", gram=gram, **where)
        assert flat == code


@given(
    lines=st.integers(0, 3),
    n=st.integers(1, 7),
    bits=st.integers(0, 4),
    solver=st.sampled_from(SOLVERS),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    seed=st.integers(0, 999),
)
@settings(max_examples=40)
def test_any_shape(lines, n, bits, solver, dtype, seed):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((lines, n)).astype(dtype)
    gram = cubin.Gram(n).add(spread_inputs(rng, n, 4))
    code = cubin.quantize(w, bits, channel_axis=0, solver=solver, gram=gram)
    assert (code.shape, code.dtype, code.scales.shape) == (w.shape, w.dtype, (bits, lines))
    again = cubin.quantize(w, bits, channel_axis=0, solver=solver, gram=gram)
    assert again == code
    plain = cubin.quantize(w, bits, channel_axis=0, solver=solver)
    ours, others = (errors_of_lines(w, c.dequantize(), gram.matrix) for c in (code, plain))
    # Scales are rounded to the dtype.
    slack = 8 * np.finfo(dtype).eps * errors_of_lines(w, 0 * w, gram.matrix)
    assert (ours <= others * (1 + 1e-3) + slack).all()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"gram": np.eye(4)}, TypeError, r"gram must be a cubin\.Gram, got ndarray"),
        (
            {"gram": cubin.Gram(5)},
            ValueError,
            r"gram is of 5 inputs, so x needs .* got shape \(3, 4\)",
        ),
        ({"solver": "greedy"}, ValueError, "greedy solver takes no gram"),
        ({"importance": np.ones((3, 4))}, ValueError, "importance and gram exclude"),
        ({"channel_axis": None}, ValueError, "channel_axis=0 or a group_size"),
        ({"channel_axis": 1}, ValueError, "channel_axis=0 or a group_size"),
        ({"channel_axis": (0, 1)}, ValueError, "channel_axis=0 or a group_size"),
        ({"x": np.ones(4), "channel_axis": 0}, ValueError, "two axes"),
        ({"bits": 9}, ValueError, "bits"),
    ],
)
def test_bad_arguments(changed, error, message):
    arguments = {"x": np.ones((3, 4)), "bits": 2, "channel_axis": 0, "solver": "refined"}
    arguments["gram"] = cubin.Gram(4).add(np.ones((1, 4)))
    with pytest.raises(error, match=message):
        cubin.quantize(**(arguments | changed))


def test_libraries_do_not_mix(device):
    gram = cubin.Gram(4).add(np.ones((1, 4)))
    with pytest.raises(TypeError, match="gram is a NumPy array, but x is a CuPy array"):
        cubin.quantize(device.ones((2, 4)), 2, channel_axis=0, solver="refined", gram=gram)


def test_columns_meet_the_budget_and_serve_the_largest_errors(xp, host, rng):
    w = rng.standard_normal((16, 2, 3)).astype(np.float32)
    inputs = rng.standard_normal((40, 6)) * np.array([1, 1, 8, 1, 0, 1])
    gram = cubin.Gram(6).add(xp.asarray(inputs))
    bits = cubin.bitmaps.columns(xp.asarray(w), gram, 2.0, min_bits=0)
    assert (bits.shape, bits.dtype) == ((1, 2, 3), np.int8)
    found = host(bits).ravel()
    assert found.mean() == 2.0
    assert found.argmax() == 2
    assert found[4] == found.min()
    assert not (
        host(cubin.bitmaps.columns(xp.asarray(w), gram, 3, min_bits=3, max_bits=3)) - 3
    ).any()


def test_columns_lower_the_output_error_at_equal_effective_bits(rng):
    w = rng.standard_normal((64, 48))
    inputs = rng.standard_normal((500, 48)) @ np.linalg.qr(rng.standard_normal((48, 48)))[0]
    inputs[:, :4] *= 10
    gram = cubin.Gram(48).add(inputs)
    uniform = cubin.quantize(w, 2, channel_axis=0, solver="alternating", gram=gram)
    bits = cubin.bitmaps.columns(w, gram, 1.5)
    code = cubin.quantize(w, bits, channel_axis=0, solver="alternating", gram=gram)
    assert code.payload_bits <= 1.5
    error, other = (
        float(cubin.errors.output_mse(w, c.dequantize(), gram)) for c in (code, uniform)
    )
    assert error < other


def test_columns_of_bad_arguments():
    w, gram = np.ones((2, 3)), cubin.Gram(3).add(np.ones((1, 3)))
    with pytest.raises(TypeError, match=r"gram must be a cubin\.Gram"):
        cubin.bitmaps.columns(w, np.eye(3), 1)
    with pytest.raises(ValueError, match="3 elements in a line"):
        cubin.bitmaps.columns(np.ones((2, 4)), gram, 1)
    with pytest.raises(ValueError, match="w must be finite"):
        cubin.bitmaps.columns(w * np.nan, gram, 1)
    with pytest.raises(ValueError, match="mean_bits"):
        cubin.bitmaps.columns(w, gram, 9)
    with pytest.raises(TypeError, match="w must be"):
        cubin.bitmaps.columns(w.astype(int), gram, 1)
