"""Scales by row and by column against their definition, and a small run."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import row_column_scales as experiment
from layer_inputs import gram_with
from league import gram_of


def relative(w, values, gram):
    off = w - values
    return float(((off @ gram) * off).sum() / ((w @ gram) * w).sum())


@pytest.fixture
def w():
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.standard_normal(24))  # columns of sizes of their own
    return rng.standard_normal((16, 24)) * sizes


def test_one_bit_is_the_best_matrix_of_rank_one_of_the_magnitudes(w):
    identity = gram_with(np.eye(24))
    found = experiment.rows_and_columns(w, identity, 1)
    left, size, right = np.linalg.svd(np.abs(w))
    best = np.where(w > 0, 1, -1) * size[0] * np.outer(left[:, 0], right[0])
    expected = relative(w, best, np.eye(24))
    assert relative(w, found.values, np.eye(24)) == pytest.approx(expected, rel=2e-3)
    assert found.bits == 1 + 16 / 24 + 16 / 16


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("power", [0.0, 1.0])
def test_no_worse_than_scales_by_row_alone(w, bits, power):
    gram = gram_of(24, power, np.random.default_rng(1))
    found = experiment.rows_and_columns(w, gram, bits)
    code = experiment.coded(
        w.astype(np.float16), bits, None, solver="alternating", iterations=None, gram=gram
    )
    errors = [relative(w, f.values, gram.matrix) for f in (found, code)]
    assert errors[0] < 0.9 * errors[1]
    for row in found.values:
        assert np.all(np.isfinite(row))


def test_codes_with_scales_by_row_and_by_column_are_found_again():
    rng = np.random.default_rng(2)
    rows, columns = np.exp(rng.standard_normal(16)), np.exp(rng.standard_normal(24))
    w = np.outer(rows, columns) * rng.choice([-1.0, 1.0], (16, 24))
    found = experiment.rows_and_columns(w, gram_with(np.eye(24)), 1)
    np.testing.assert_allclose(found.values, w, rtol=2e-3)


@pytest.mark.parametrize("fit", ["fit_rows", "fit_columns", "fit_signs"])
def test_every_step_lowers_the_error(w, fit):
    rng = np.random.default_rng(3)
    gram = gram_of(24, 1.0, rng).matrix
    start = experiment.Fit(
        w, gram, rng.random((2, 16)), rng.random((2, 24)), rng.choice([-1.0, 1.0], (2, 16, 24))
    )
    before = start.error()
    getattr(start, fit)()
    assert start.error() < before
    assert start.error() == pytest.approx(
        relative(w, start.values, gram) * ((w @ gram) * w).sum(), rel=1e-9
    )
    again = start.error()
    getattr(start, fit)()
    # Least squares are at their minimum at once; signs may need another pass.
    assert start.error() <= again * (1 + 1e-9)
    if fit != "fit_signs":
        assert start.error() == pytest.approx(again, rel=1e-6)


def test_groups_are_those_next_to_the_same_price():
    assert experiment.group_sizes(256, 256) == (128, 128)
    assert experiment.group_sizes(64, 96) == (48, 32)  # 38.4 columns for the price
    assert experiment.group_sizes(1000, 7) == (7, 1)


def test_a_quick_run_without_the_pretrained_weights(tmp_path, monkeypatch, capsys):
    def missing():
        raise experiment.WeightsError("not installed")

    monkeypatch.setattr(experiment, "pretrained_sample", missing)
    monkeypatch.setattr(experiment, "QUICK_SIZE", 32)
    out = tmp_path / "out"
    assert experiment.main(["--quick", "--output", str(out)]) == 0
    with (out / "row_column_scales.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    origin = json.loads((out / "row_column_scales.json").read_text())
    assert {row["data"] for row in rows} == set(experiment.SAMPLED)
    found = {(r["data"], r["metric"], r["bits"], r["scales"]): r for r in rows}
    assert len(found) == len(rows) == 2 * 3 * 2 * 4
    for data, metric, bits, _ in found:
        by = {s: found[data, metric, bits, s] for s in (experiment.BOTH, "groups of fewer bits")}
        # With as many rows as columns groups of half a row cost the same.
        assert len({row["effective_bits"] for row in by.values()}) == 1
        assert float(by[experiment.BOTH]["error"]) < float(
            found[data, metric, bits, "rows"]["error"]
        )
    assert "No pretrained weights: not installed" in capsys.readouterr().out
    assert origin["seed"] == experiment.SEED
