"""The league table: the quantizers of others against what their papers say, and a small run."""

from __future__ import annotations

import csv
import json

import league as experiment
import numpy as np
import pytest
import quantizers
import scipy.stats

import cubin
from cubin import theory


def relative(w, values):
    return float(((w - values) ** 2).sum() / (w * w).sum())


@pytest.fixture
def w():
    return np.random.default_rng(0).standard_normal((8, 256))


# ---------------------------------------------------------------- others


def test_nf4_has_the_levels_of_its_paper():
    levels = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    np.testing.assert_allclose(quantizers.normal_float(), levels, atol=1e-6)


def test_nf4_takes_the_nearest_level(w):
    found = quantizers.nf4(w, 64)
    scale = np.abs(w.reshape(8, 4, 64)).max(axis=2, keepdims=True).astype(np.float16)
    levels = scale.astype(float)[..., None] * quantizers.normal_float()
    off = np.abs(w.reshape(8, 4, 64, 1) - levels).min(axis=3)
    np.testing.assert_allclose(np.abs(w - found.values), off.reshape(8, 256), atol=1e-12)
    assert found.bits == 4 + 16 / 64


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounding_of_uniform_data_leaves_a_twelfth_of_the_squared_step(bits):
    w = np.random.default_rng(1).uniform(-1, 1, (1, 200_000))
    found = quantizers.round_to_nearest(w, bits, None)
    assert ((w - found.values) ** 2).mean() == pytest.approx(
        (2 / (2**bits - 1)) ** 2 / 12, rel=0.02
    )
    assert found.bits == pytest.approx(bits + (16 + bits) / w.size)


def test_the_search_for_a_range_never_loses(w):
    w[:, 0] = 10
    plain, clipped = (quantizers.round_to_nearest(w, 3, 64, c) for c in (False, True))
    assert clipped.bits == plain.bits == 3 + 19 / 64
    errors = [((w - f.values) ** 2).reshape(8, 4, 64).sum(axis=2) for f in (clipped, plain)]
    assert np.all(errors[0] <= errors[1])
    assert np.any(errors[0] < errors[1])


def test_shorter_last_groups_have_grids_of_their_own(w):
    found = quantizers.round_to_nearest(w, 3, 96)
    last = quantizers.round_to_nearest(w[:, 192:], 3, None)
    np.testing.assert_array_equal(found.values[:, 192:], last.values)
    assert found.bits == 3 + 3 * 19 / 256


@pytest.mark.parametrize("group", [None, 64, 96])
def test_gptq_of_inputs_that_do_not_go_together_rounds_to_nearest(w, group):
    found = quantizers.gptq(w, np.diag(np.arange(256.0, 0, -1)), 3, group)
    plain = quantizers.round_to_nearest(w, 3, group, clipped=True)
    np.testing.assert_array_equal(found.values, plain.values)
    assert found.bits == plain.bits


def test_gptq_lowers_the_error_of_the_outputs(w):
    gram = experiment.gram_of(256, 1.0, np.random.default_rng(2))
    found = quantizers.gptq(w, gram.matrix, 3, None)
    plain = quantizers.round_to_nearest(w, 3, None, clipped=True)
    errors = [float(cubin.errors.output_mse(w, f.values, gram)) for f in (found, plain)]
    assert errors[0] < 0.6 * errors[1]


def test_hqq_is_no_worse_in_its_norm_than_without_iterations():
    w = np.random.default_rng(3).standard_t(3, (16, 128))
    found, start = (quantizers.hqq(w, 3, 64, iterations=count) for count in (20, 0))
    norms = [(np.abs(w - f.values) ** 0.7).reshape(16, 2, 64).sum(axis=2) for f in (found, start)]
    assert np.all(norms[0] <= norms[1])
    assert norms[0].sum() < norms[1].sum()
    assert found.bits == 3 + 32 / 64


def test_kmeans_of_a_gaussian_reaches_lloyd_max():
    w = np.random.default_rng(4).standard_normal((2, 100_000))
    for bits in (1, 2, 3):
        expected = theory.lloyd_max(scipy.stats.norm(), bits).relative_mse
        assert relative(w, quantizers.kmeans(w, bits).values) == pytest.approx(expected, rel=0.02)


def test_lsbq_of_one_bit_has_the_mean_magnitude(w):
    found = quantizers.lsbq(w, 1, None)
    expected = np.abs(w).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(found.values, np.where(w > 0, expected, -expected), rtol=1e-3)
    assert found.bits == 1 + 16 / 256


def test_lsbq_of_two_bits_has_the_least_error(w):
    found = quantizers.lsbq(w, 2, 64)
    code = cubin.quantize(w, 2, group_size=64, solver="optimal")
    assert relative(w, found.values) == pytest.approx(relative(w, code.dequantize()), rel=1e-3)


def test_ternary_lsbq_is_the_best_ternary_code(w):
    found = quantizers.lsbq_ternary(w, 64)
    code = cubin.quantize(w, cubin.bitmaps.ternary(w, group_size=64), group_size=64)
    np.testing.assert_allclose(found.values, code.dequantize(), rtol=1e-3)
    # cubin counts the float64 scales of this code, LSBQ those of float16.
    assert found.bits - 16 / 64 == pytest.approx(code.effective_bits - 1, abs=0.01)


def test_billm_counts_its_maps_and_beats_one_bit(w):
    gram = experiment.gram_of(256, 1.0, np.random.default_rng(5))
    found = quantizers.billm(w, gram.matrix)
    one = quantizers.lsbq(w, 1, 128)
    errors = [float(cubin.errors.output_mse(w, f.values, gram)) for f in (found, one)]
    assert errors[0] < errors[1]
    # A sign, the entropy of the division, two scales for each line and block at least.
    assert found.bits > 1.5 + 2 * 16 / 128
    # A magnitude has one of at most six values in each line of a block: two, and four of two signs.
    sizes = [len(np.unique(np.abs(line))) for line in found.values[:, :128]]
    assert max(sizes) <= 4


def test_entropy_coding_comes_within_a_quarter_of_a_bit_of_shannon():
    w = np.random.default_rng(6).standard_normal((1, 100_000))
    found = quantizers.entropy_coded(w, 4.0)
    assert found.bits == pytest.approx(4, abs=0.01)
    assert relative(w, found.values) * 4**found.bits == pytest.approx(np.pi * np.e / 6, rel=0.02)


def test_zeros_stay_zeros():
    w, gram = np.zeros((2, 128)), np.eye(128)
    found = [
        quantizers.round_to_nearest(w, 2, 64), quantizers.round_to_nearest(w, 2, 64, True),
        quantizers.gptq(w, gram, 2, 64), quantizers.hqq(w, 2, 64), quantizers.nf4(w, 64),
        quantizers.kmeans(w, 2), quantizers.lsbq(w, 1, 64), quantizers.lsbq(w, 2, 64),
        quantizers.lsbq_ternary(w, 64), quantizers.billm(w, gram),
    ]  # fmt: skip
    for each in found:
        assert np.all(each.values == 0)
        assert np.isfinite(each.bits)


# ---------------------------------------------------------------- the table


FEW = ["greedy", "optimal", "alternating, gram", "round to nearest, clipped", "GPTQ",
       "entropy-coded scalar"]  # fmt: skip


@pytest.fixture
def few(monkeypatch):
    """A table of few methods."""
    methods = {name: experiment.METHODS[name] for name in FEW}
    monkeypatch.setattr(experiment, "METHODS", methods)
    shown = {error: [n for n in names if n in FEW] for error, names in experiment.SHOWN.items()}
    monkeypatch.setattr(experiment, "SHOWN", shown)


def run(tmp_path, *arguments):
    out = tmp_path / "out"
    arguments = [*arguments, "--quick", "--device", "cpu", "--output", str(out)]
    assert experiment.main(arguments) == 0
    assert (out / "league.png").stat().st_size > 0
    with (out / "league.csv").open(newline="") as stream:
        return list(csv.DictReader(stream)), json.loads((out / "league.json").read_text())


def test_a_quick_run(tmp_path, few):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "net.npz", w=rng.standard_normal((16, 256)), short=np.ones((16, 16)))
    rows, origin = run(tmp_path, str(tmp_path / "net.npz"))
    assert {row["data"] for row in rows} == {*experiment.DISTRIBUTIONS, experiment.WEIGHTS}
    assert {row["method"] for row in rows} == set(FEW)
    assert {row["inputs"] for row in rows} == set(experiment.SPECTRA)
    assert origin["weights"] == {"tensors": 1}
    assert origin["seed"] == experiment.SEED
    found = {
        (row["data"], row["inputs"], row["method"], row["bits"], row["group"]): row for row in rows
    }
    assert len(found) == len(rows)
    for data in (*experiment.DISTRIBUTIONS, experiment.WEIGHTS):
        for bits in ("2", "3", "4"):
            one, other, with_gram = (
                found[data, "1/i", name, bits, "128"]
                for name in ("greedy", "optimal", "alternating, gram")
            )
            assert float(other["weight_mse"]) <= float(one["weight_mse"])
            assert float(with_gram["output_mse"]) < float(other["output_mse"])
            # Scales of 16 bits.
            assert float(one["effective_bits"]) == int(bits) * (1 + 16 / 128)
    assert any("of the error of" in sentence for sentence in origin["findings"])


def test_without_the_pretrained_weights_the_rest_is_measured(tmp_path, few, monkeypatch, capsys):
    def missing():
        raise experiment.WeightsError("not installed")

    monkeypatch.setattr(experiment, "pretrained_sample", missing)
    law = experiment.DISTRIBUTIONS["Gaussian"]
    monkeypatch.setattr(experiment, "DISTRIBUTIONS", {"Gaussian": law})
    rows, origin = run(tmp_path)
    assert {row["data"] for row in rows} == {"Gaussian"}
    assert origin["omissions"] is None
    assert "No pretrained weights: not installed" in capsys.readouterr().out


def test_what_cannot_be_read_is_named(tmp_path, capsys):
    assert experiment.main([str(tmp_path / "none.npz"), "--output", str(tmp_path / "out")]) == 2
    assert "none.npz" in capsys.readouterr().err


def test_a_device_is_refused(tmp_path, capsys):
    assert experiment.main(["--device", "cuda", "--output", str(tmp_path / "out")]) == 2
    assert "--device cpu" in capsys.readouterr().err


def test_gram_matrices_have_their_eigenvalues():
    gram = experiment.gram_of(16, 1.0, np.random.default_rng(0))
    values = np.linalg.eigvalsh(gram.matrix)[::-1]
    np.testing.assert_allclose(values, 1 / np.arange(1, 17), atol=1e-12)


def test_no_point_of_a_frontier_is_beaten():
    points = [
        experiment.Point("d", "i", "m", 1, None, bits, error, error)
        for bits, error in [(3, 0.1), (1, 0.5), (2, 0.6), (2.5, 0.2), (2.5, 0.3)]
    ]
    kept = experiment.frontier(points, "weight_mse")
    assert [(p.effective_bits, p.weight_mse) for p in kept] == [(1, 0.5), (2.5, 0.2), (3, 0.1)]
