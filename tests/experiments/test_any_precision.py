from __future__ import annotations

import csv
import json

import any_precision as experiment
import numpy as np
import pytest


def test_a_quick_run(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    path = tmp_path / "net.npz"
    np.savez(path, **{name: rng.laplace(size=(8, 200)).astype(np.float32) for name in ("a", "b")})
    monkeypatch.setattr(experiment, "QUICK_SAMPLE_SIZE", 5000)
    out = tmp_path / "out"
    assert experiment.main([str(path), "--quick", "--device", "cpu", "--output", str(out)]) == 0
    with (out / "any_precision.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(r["data"], r["solver"], int(r["bits"]), int(r["tensors"])) for r in rows] == [
        (data, solver, bits, tensors)
        for data, tensors in (("Gaussian", 1), ("pretrained weights", 2))
        for solver in experiment.SOLVERS
        for bits in experiment.PRECISIONS
    ]
    for row in rows:
        alone, together = float(row["alone"]), float(row["together"])
        if row["solver"] == "greedy":  # the greedy scales alone are not refitted
            assert together < alone
        elif row["bits"] == str(experiment.PRECISIONS[0]):
            assert together == pytest.approx(alone, rel=1e-5)
    assert json.loads((out / "any_precision.json").read_text())["seed"] == experiment.SEED


def test_missing_path(tmp_path, capsys):
    assert experiment.main([str(tmp_path / "none.npz"), "--output", str(tmp_path / "out")]) == 2
    assert "none.npz" in capsys.readouterr().err
