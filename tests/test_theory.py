from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import integrate, stats

from cubin import theory
from tests.exhaustive import few


def converged(distribution, bits):
    return theory.alternating(distribution, bits, iterations=None)


CODES = (
    theory.greedy,
    theory.refined,
    theory.alternating,
    converged,
    theory.optimal,
    theory.uniform,
)
ALL = (*CODES, theory.lloyd_max, theory.shannon)

# Relative errors at 1 to 5 bits, from independent numerical integration.
GAUSSIAN = {
    theory.greedy: (0.36338, 0.13045, 0.05839, 0.03290, 0.02263),
    theory.refined: (0.36338, 0.12508, 0.05052, 0.02459, 0.01276),
    converged: (0.36338, 0.11748, 0.03694, 0.01144, 0.00349),
    theory.uniform: (0.36338, 0.11885, 0.03744, 0.01154, 0.00350),
    theory.lloyd_max: (0.36338, 0.11748, 0.03455, 0.00950, 0.00250),
}
LAPLACE = {
    theory.greedy: (0.5, 0.22933, 0.14256, 0.09512, 0.07646),
    theory.refined: (0.5, 0.20901, 0.11662, 0.06119, 0.04055),
    theory.lloyd_max: (0.5, 0.17619, 0.05448, 0.01537, 0.00410),
}
BEST_KNOWN = {
    "norm": (0.36338, 0.11748, 0.03527, 0.00989, 0.00272),
    "laplace": (0.5, 0.17620, 0.05598, 0.01743, 0.00512),
}


def integrated_mse(distribution, levels):
    """Error of nearest-level coding by adaptive quadrature, cell by cell."""
    edges = np.concatenate(([-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]))
    cuts = np.unique(np.concatenate((edges, [0.0])))
    power = distribution.var() + distribution.mean() ** 2
    total = 0.0
    for low, high in itertools.pairwise(cuts):
        inside = (max(low, -1e3) + min(high, 1e3)) / 2
        level = levels[np.argmin(np.abs(levels - inside))]
        total += integrate.quad(lambda x, y=level: (x - y) ** 2 * distribution.pdf(x), low, high)[0]
    return total / power


@pytest.mark.parametrize(
    ("distribution", "code", "expected"),
    [
        (distribution, code, expected)
        for distribution, table in ((stats.norm(), GAUSSIAN), (stats.laplace(), LAPLACE))
        for code, expected in table.items()
    ],
)
def test_tabulated_errors(distribution, code, expected):
    errors = [code(distribution, bits).relative_mse for bits in range(1, 6)]
    np.testing.assert_allclose(errors, expected, rtol=0, atol=6e-6)


@pytest.mark.parametrize("distribution", [stats.norm(), stats.laplace()])
def test_optimal_is_close_to_the_best_known(distribution):
    errors = [theory.optimal(distribution, bits).relative_mse for bits in range(1, 6)]
    assert np.all(errors <= np.asarray(BEST_KNOWN[distribution.dist.name]) + 6e-6)


def test_gaussian_greedy_scales():
    expected = [0.797885, 0.482624, 0.268441, 0.159674, 0.101344, 0.070592, 0.053236, 0.043876]
    np.testing.assert_allclose(theory.greedy(stats.norm(), 8).scales, expected, atol=6e-7)


def test_one_bit_in_closed_form():
    for code in (*CODES, theory.lloyd_max):
        assert code(stats.norm(), 1).relative_mse == pytest.approx(1 - 2 / math.pi, rel=1e-12)
        assert code(stats.laplace(), 1).relative_mse == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("code", [theory.greedy, theory.refined, theory.uniform, theory.lloyd_max])
def test_uniform_law_is_exact_at_any_bit_width(code):
    for bits in range(1, 17):
        expected = code(stats.uniform(-1, 2), bits)
        assert expected.relative_mse == pytest.approx(4.0**-bits, rel=1e-13 + 1e-14 * 4**bits)


@pytest.mark.parametrize("code", CODES)
def test_uniform_law_has_scales_in_ratio_two(code):
    expected = code(stats.uniform(-1, 2), 6)
    np.testing.assert_allclose(expected.scales, 0.5 ** np.arange(1, 7), rtol=1e-6)
    np.testing.assert_allclose(expected.levels, (np.arange(-31.5, 32)) / 32, rtol=1e-5)


@pytest.mark.parametrize(
    ("bits", "iterations", "expected"),
    [
        (2, 1, 0.12200),
        (2, 2, 0.11905),
        (3, 1, 0.05049),
        (3, 2, 0.04599),
        (4, 1, 0.02563),
        (4, 2, 0.02194),
        (5, 1, 0.01626),
        (5, 2, 0.01364),
    ],
)
def test_nearest_codes_after_each_refit(bits, iterations, expected):
    levels = theory.alternating(stats.norm(), bits, iterations=iterations - 1).levels
    assert integrated_mse(stats.norm(), levels) == pytest.approx(expected, abs=6e-6)


def test_alternating_renews_the_codes_twice_by_default():
    default, twice = (
        theory.alternating(stats.norm(), 4, **options) for options in ({}, {"iterations": 2})
    )
    assert default.relative_mse == twice.relative_mse
    assert default.relative_mse > 1.5 * converged(stats.norm(), 4).relative_mse


@pytest.mark.parametrize("distribution", [stats.norm(), stats.laplace(), stats.t(4)])
def test_alternating_never_rises_and_converges(distribution):
    steps = [0, 1, 2, 4, 8, 400]
    errors = [theory.alternating(distribution, 4, iterations=n).relative_mse for n in steps]
    assert np.all(np.diff(errors) < 0)
    assert converged(distribution, 4).relative_mse == pytest.approx(errors[-1], rel=1e-8)


@pytest.mark.parametrize(
    "distribution",
    [
        stats.norm(),
        stats.norm(1, 2),
        stats.laplace(0.3, 0.01),
        stats.expon(),
        stats.logistic(),
        stats.gamma(0.5),
        stats.beta(2, 5, -0.3, 1),
        stats.beta(0.5, 0.5),
        stats.lognorm(1),
        stats.t(3),
        stats.t(2.5),
        stats.pareto(2.5),
    ],
    ids=lambda distribution: f"{distribution.dist.name}{distribution.args}",
)
@pytest.mark.parametrize("bits", few([2, 4, 8], 4))
def test_order_of_the_codes(distribution, bits):
    """What is more general cannot be worse, and nothing beats Shannon."""
    greedy, refined, uniform, lloyd_max = (
        code(distribution, bits).relative_mse
        for code in (theory.greedy, theory.refined, theory.uniform, theory.lloyd_max)
    )
    alternating = converged(distribution, bits).relative_mse
    assert 0 < theory.shannon(distribution, bits) < lloyd_max
    assert lloyd_max <= uniform * (1 + 1e-9)
    assert lloyd_max <= alternating * (1 + 1e-9)
    assert alternating <= greedy * (1 + 1e-9)
    assert refined <= greedy * (1 + 1e-9)
    assert greedy < 1


@pytest.mark.parametrize("distribution", [stats.norm(0.4, 1), stats.laplace(), stats.t(5)])
@pytest.mark.parametrize("code", [theory.uniform, converged, theory.lloyd_max])
def test_error_agrees_with_adaptive_quadrature(distribution, code):
    expected = code(distribution, 3)
    assert integrated_mse(distribution, expected.levels) == pytest.approx(
        expected.relative_mse, rel=1e-6
    )


def test_greedy_agrees_with_folding_a_large_quantile_sample():
    distribution = stats.gamma(2, loc=-1.5)
    probabilities = (np.arange(2_000_000) + 0.5) / 2_000_000
    residual = np.abs(distribution.ppf(probabilities))
    power = np.mean(residual**2)
    scales = []
    for _ in range(5):
        scales.append(residual.mean())
        residual = np.abs(residual - scales[-1])
    expected = theory.greedy(distribution, 5)
    np.testing.assert_allclose(expected.scales, scales, rtol=1e-4)
    assert expected.relative_mse == pytest.approx(np.mean(residual**2) / power, rel=1e-4)
    assert expected.relative_mse == pytest.approx(
        1 - np.sum(expected.scales**2) / (distribution.var() + distribution.mean() ** 2), rel=1e-9
    )


@pytest.mark.parametrize("distribution", [stats.norm(0.4, 1), stats.laplace(), stats.t(3)])
@pytest.mark.parametrize("bits", [1, 3, 6, 8])
def test_lloyd_max_levels_are_the_means_of_their_cells(distribution, bits):
    levels = theory.lloyd_max(distribution, bits).levels
    assert levels.shape == (2**bits,)
    np.testing.assert_array_equal(levels, -levels[::-1])
    upper = levels[2 ** (bits - 1) :]
    assert upper[0] > 0
    assert np.all(np.diff(upper) > 0)
    edges = np.concatenate(([0.0], (upper[1:] + upper[:-1]) / 2, [np.inf]))
    for cell in {0, len(upper) // 2, len(upper) - 1}:
        mass, first = (
            sum(
                integrate.quad(
                    lambda m, s=sign, p=power: m**p * distribution.pdf(s * m),
                    *edges[cell : cell + 2],
                    epsabs=0,
                )[0]
                for sign in (-1, 1)
            )
            for power in (0, 1)
        )
        assert upper[cell] == pytest.approx(first / mass, rel=1e-5)


def test_lloyd_max_approaches_the_panter_dite_constant():
    error = theory.lloyd_max(stats.norm(), 12).relative_mse
    assert error * 4**12 == pytest.approx(math.pi * math.sqrt(3) / 2, rel=2e-3)


def test_shannon_in_closed_form():
    for bits in range(1, 17):
        assert theory.shannon(stats.norm(), bits) == pytest.approx(4.0**-bits, rel=1e-12)
        assert theory.shannon(stats.laplace(), bits) == pytest.approx(
            math.e / math.pi * 4.0**-bits, rel=1e-12
        )
        assert theory.shannon(stats.uniform(-1, 2), bits) == pytest.approx(
            6 / (math.pi * math.e) * 4.0**-bits, rel=1e-12
        )


@pytest.mark.parametrize("code", CODES)
def test_an_asymmetric_law_is_its_symmetrised_twin(code):
    one_sided, symmetric = code(stats.expon(), 3), code(stats.laplace(), 3)
    assert one_sided.relative_mse == pytest.approx(symmetric.relative_mse, rel=1e-8)
    np.testing.assert_allclose(one_sided.scales, symmetric.scales, rtol=1e-4)
    mirrored = code(stats.norm(-0.7, 1), 3)
    assert mirrored.relative_mse == pytest.approx(
        code(stats.norm(0.7, 1), 3).relative_mse, rel=1e-8
    )


@pytest.mark.parametrize("code", [*CODES, theory.lloyd_max])
@pytest.mark.parametrize("factor", [2.0**-400, 2.0**300])
def test_scales_follow_the_unit(code, factor):
    one, other = code(stats.norm(), 3), code(stats.norm(scale=factor), 3)
    assert other.relative_mse == pytest.approx(one.relative_mse, rel=1e-9)
    np.testing.assert_allclose(other.levels, one.levels * factor, rtol=1e-5)


def test_sqnr_is_the_error_in_decibels():
    expected = theory.greedy(stats.uniform(-1, 2), 5)
    assert expected.sqnr_db == pytest.approx(50 * math.log10(4))
    with pytest.raises(AttributeError):
        expected.relative_mse = 0.0


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize("bits", [True, np.True_, 2.0, "2", None])
def test_bits_of_a_wrong_type(function, bits):
    with pytest.raises(TypeError, match="bits must be an int"):
        function(stats.norm(), bits)


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize("bits", [0, -1, 17])
def test_bits_out_of_range(function, bits):
    with pytest.raises(ValueError, match=f"bits must be an int from 1 to .*, got {bits}"):
        function(stats.norm(), bits)


@pytest.mark.parametrize("function", [theory.alternating, theory.optimal])
def test_searched_codes_stop_at_eight_bits(function):
    with pytest.raises(ValueError, match="from 1 to 8, got 9"):
        function(stats.norm(), 9)


def test_bits_of_a_numpy_integer_type():
    assert theory.shannon(stats.norm(), np.int8(3)) == theory.shannon(stats.norm(), 3)


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize("distribution", [stats.norm, stats.poisson(3), np.ones(3), None, "norm"])
def test_not_a_frozen_continuous_distribution(function, distribution):
    with pytest.raises(TypeError, match="distribution must be a frozen") as caught:
        function(distribution, 2)
    assert str(caught.value).endswith(f"got {type(distribution).__qualname__}")


@pytest.mark.parametrize("distribution", [stats.cauchy(), stats.t(2), stats.norm(scale=0)])
def test_variance_that_is_not_finite_and_positive(distribution):
    with pytest.raises(ValueError, match="finite positive variance"):
        theory.greedy(distribution, 2)


def test_array_parameters():
    with pytest.raises(ValueError, match=r"scalar parameters, got parameters of shape \(2,\)"):
        theory.greedy(stats.norm([0, 1]), 2)


@pytest.mark.parametrize(
    ("iterations", "exception"), [(-1, ValueError), (True, TypeError), (1.5, TypeError)]
)
def test_iterations(iterations, exception):
    with pytest.raises(exception, match="iterations must be a non-negative int or None"):
        theory.alternating(stats.norm(), 2, iterations=iterations)


def test_a_density_that_cannot_be_integrated():
    class Halved(stats.rv_continuous):
        def _pdf(self, x):
            return 0.5 * np.exp(-x)

        def _ppf(self, q):
            return -np.log1p(-q)

        def _stats(self):
            return 1.0, 1.0, 2.0, 6.0

    with pytest.raises(ValueError, match="'halved' could not be integrated"):
        theory.greedy(Halved(a=0.0, name="halved")(), 2)


def test_a_density_that_goes_on_forever():
    with pytest.raises(ValueError, match=r"'vonmises' could not be integrated: .* fall off"):
        theory.greedy(stats.vonmises(2), 2)
