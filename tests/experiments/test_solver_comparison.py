from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import solver_comparison as experiment


@pytest.fixture(params=["sample", "path"])
def result(request, tmp_path, monkeypatch):
    """The rows and the provenance of a small run on weights of our own."""
    rng = np.random.default_rng(0)
    names = ("first", "second", "third")
    np.savez(
        tmp_path / "net.npz",
        **{name: rng.laplace(size=(8, 200)).astype(np.float32) for name in names},
    )
    given = [] if request.param == "path" else [tmp_path / "net.npz"]
    paths = [str(tmp_path / "net.npz")] if request.param == "path" else []
    monkeypatch.setattr(experiment, "pretrained_sample", lambda: given)
    monkeypatch.setattr(experiment, "QUICK_SAMPLE_SIZE", 20_000)
    monkeypatch.setattr(experiment, "QUICK_TIMED_SHAPE", (4, 256))
    monkeypatch.setattr(experiment, "BITS", range(1, 4))
    out = tmp_path / "out"
    assert experiment.main([*paths, "--quick", "--device", "cpu", "--output", str(out)]) == 0
    assert (out / "solver_comparison.png").stat().st_size > 0
    with (out / "solver_comparison.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return rows, json.loads((out / "solver_comparison.json").read_text())


def test_a_quick_run(result):
    rows, origin = result
    sources = (*experiment.DISTRIBUTIONS, experiment.WEIGHTS, experiment.TIMED)
    assert [(r["data"], r["solver"], int(r["bits"])) for r in rows] == [
        (data, solver, bits)
        for data in sources
        for solver in experiment.SOLVERS
        for bits in experiment.BITS
    ]
    for row in rows:
        assert bool(row["expected"]) == (row["data"] in experiment.DISTRIBUTIONS)
        assert bool(row["seconds"]) == (row["data"] == experiment.TIMED)
        if row["expected"]:
            expected = pytest.approx(float(row["expected"]), rel=0.08)
            assert float(row["relative_mse"]) == expected
    assert origin["seed"] == experiment.SEED
    assert origin["arguments"]["quick"] is True
    assert "optimal above alternating, converged: none of 3 tensors." in origin["findings"]


def test_weights_that_are_not_finite_are_skipped(tmp_path, monkeypatch):
    arrays = {name: np.eye(3, dtype=np.float32) for name in ("sound", "mask")}
    arrays["mask"][0, 1] = np.nan
    np.savez(tmp_path / "net.npz", **arrays)
    monkeypatch.setattr(experiment, "BITS", range(1, 2))
    weights = experiment.Weights([tmp_path / "net.npz"])
    omissions = experiment.Omissions(weights, strict=False)

    errors = experiment.of_weights(weights.tensors, omissions, np)

    assert {len(found) for found in errors.values()} == {1}
    assert [tensor.name for tensor in omissions.skipped] == ["mask"]


def test_missing_path(tmp_path, capsys):
    assert experiment.main([str(tmp_path / "none.npz"), "--output", str(tmp_path / "out")]) == 2
    assert "none.npz" in capsys.readouterr().err


def test_exceptions_to_the_order_are_counted():
    results = [
        experiment.Result(data, solver, bits, 1, 0.1, 0.1, 0.1)
        for data in (*experiment.DISTRIBUTIONS, experiment.WEIGHTS)
        for solver in experiment.SOLVERS
        for bits in experiment.BITS
    ]
    errors = {
        (solver, bits): np.full(4, 0.1) for solver in experiment.SOLVERS for bits in experiment.BITS
    }
    errors["refined", 3] = np.array([0.2, 0.05, 0.1, 0.3])
    said = experiment.findings(results, errors)
    assert "refined above greedy: 2 at 3 bits of 4 tensors." in said
    assert "alternating, 2 iterations above refined: 1 at 3 bits of 4 tensors." in said
    assert "optimal above alternating, converged: none of 4 tensors." in said
