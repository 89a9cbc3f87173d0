from __future__ import annotations

import csv
import json

import bit_budget as experiment
import numpy as np
import pytest


@pytest.fixture
def result(tmp_path, monkeypatch):
    """The rows and the provenance of a small run on weights of our own."""
    rng = np.random.default_rng(0)
    power = np.exp(rng.normal(size=(16, 1)))
    np.savez(
        tmp_path / "net.npz",
        even=rng.standard_normal((16, 256)).astype(np.float32),
        uneven=(power * rng.laplace(size=(16, 256))).astype(np.float32),
        zeros=np.zeros((4, 8), np.float32),
    )
    monkeypatch.setattr(experiment, "QUICK_SAMPLE_SHAPE", (8, 512))
    monkeypatch.setattr(experiment, "MEANS", (1.4, 2.0))
    out = tmp_path / "out"
    arguments = [str(tmp_path / "net.npz"), "--quick", "--device", "cpu", "--output", str(out)]
    assert experiment.main(arguments) == 0
    assert (out / "bit_budget.png").stat().st_size > 0
    with (out / "bit_budget.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return rows, json.loads((out / "bit_budget.json").read_text())


def test_a_quick_run(result):
    rows, origin = result
    assert {row["source"] for row in rows} == {*experiment.DISTRIBUTIONS, experiment.WEIGHTS}
    assert {(row["generator"], row["solver"]) for row in rows} == set(experiment.CURVES)
    error = {}
    for row in rows:
        payload, effective = float(row["payload_bits"]), float(row["effective_bits"])
        assert payload < effective
        if row["generator"] not in (experiment.UNIFORM, "random", "allocate"):
            assert payload == pytest.approx(float(row["mean_bits"]), abs=1e-3)
        key = (row["source"], row["generator"], row["solver"], float(row["mean_bits"]))
        error[key] = float(row["relative_mse"])
    for source in (*experiment.DISTRIBUTIONS, experiment.WEIGHTS):
        for mean in experiment.MEANS:
            budget = error[source, "budget", "greedy", mean]
            for other in ("random", "top-down", "bottom-up", "middle-out"):
                assert budget < error[source, other, "greedy", mean]
        assert (
            error[source, "allocate", "greedy", 2.0]
            <= error[source, experiment.UNIFORM, "greedy", 2.0] * 1.000_01
        )
    assert origin["weights"] == {"tensors": 2}
    left_out = {tensor["name"]: tensor["reason"] for tensor in origin["omissions"]["left_out"]}
    assert left_out == {"zeros": "zeros alone"}
    assert origin["seed"] == experiment.SEED
    assert origin["arguments"]["paths"] == ["net.npz"]


def test_weights_that_are_not_finite_are_skipped(tmp_path):
    arrays = {name: np.ones((2, 3, 4), np.float32) for name in ("sound", "mask")}
    arrays["mask"][0] = -np.inf
    np.savez(tmp_path / "net.npz", **arrays)
    weights = experiment.Weights([tmp_path / "net.npz"])
    omissions = experiment.Omissions(weights, strict=False)

    tensors = experiment.weight_tensors(weights, omissions, True, np)

    assert {name: x.shape for name, x in tensors.items()} == {"sound": (2, 12)}
    assert [tensor.name for tensor in omissions.skipped] == ["mask"]
    assert omissions.exit_status == 1


def test_weights_that_are_all_zeros(tmp_path, capsys):
    np.save(tmp_path / "w.npy", np.zeros((2, 3)))
    status = experiment.main([str(tmp_path / "w.npy"), "--output", str(tmp_path / "out")])
    assert status == 2
    assert "all weights are zeros" in capsys.readouterr().err


def test_mixes_have_their_mean():
    for mean in experiment.MEANS:
        mix = experiment.mix_of_mean(mean)
        assert sum(mix.values()) == pytest.approx(1)
        assert sum(bits * share for bits, share in mix.items()) == pytest.approx(mean)


def test_what_cannot_be_read_is_named(tmp_path, capsys):
    assert experiment.main([str(tmp_path / "none.npz"), "--output", str(tmp_path / "out")]) == 2
    assert "none.npz" in capsys.readouterr().err
