from __future__ import annotations

import csv
import json

import numpy as np
import products as experiment
import pytest
from benchmark import Host


@pytest.fixture
def result(tmp_path, monkeypatch):
    """The rows and the provenance of a small run."""
    monkeypatch.setattr(experiment, "QUICK_SHAPES", ((64, 96), (40, 96)))
    monkeypatch.setattr(experiment, "QUICK_READ", 1 << 16)
    monkeypatch.setattr(experiment, "WARM", 0)
    monkeypatch.setattr(experiment, "BATCHES", (1, 8))
    arguments = ["--quick", "--rounds", "2", "--device", "cpu", "--output", str(tmp_path)]
    assert experiment.main(arguments) == 0
    assert (tmp_path / "products.png").stat().st_size > 0
    with (tmp_path / "products.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return rows, json.loads((tmp_path / "products.json").read_text())


def test_a_quick_run(result):
    rows, origin = result
    peers = [n for n in experiment.TORCH if f"Left out: {n}" not in " ".join(origin["findings"])]
    candidates = [(experiment.FLOATS, ""), *((name, "") for name in peers)]
    candidates += [(experiment.CODE, str(bits)) for bits in experiment.BITS]
    candidates += [(experiment.CODES, "1")]
    assert [(r["m"], r["n"], r["batch"], r["candidate"], r["bits"]) for r in rows] == [
        (m, "96", batch, *candidate)
        for m in ("64", "40")
        for batch in ("1", "8")
        for candidate in candidates
    ]
    for row in rows:
        floats = next(r for r in rows if all(r[key] == row[key] for key in ("m", "batch")))
        speed_up = float(floats["seconds"]) / float(row["seconds"])
        assert float(row["speed_up"]) == pytest.approx(speed_up)
        limit = float(floats["seconds"]) / (int(row["weight_bytes"]) / origin["bytes_per_second"])
        assert float(row["limit"]) == pytest.approx(limit)
        if row["candidate"] == experiment.CODE:
            m, bits = int(row["m"]), int(row["bits"])
            assert int(row["weight_bytes"]) == bits * m * (96 // 8 + 4)
    errors = [float(r["relative_mse"]) for r in rows if r["candidate"] == experiment.CODE][:4]
    assert errors == sorted(errors, reverse=True)
    assert float(rows[0]["relative_mse"]) == 0
    assert origin["seed"] == experiment.SEED
    assert origin["arguments"]["quick"] is True
    assert any("times as fast as float32: 1 bit " in said for said in origin["findings"])


def test_without_pytorch(monkeypatch):
    left_out = {}
    layer = experiment.Layer((8, 16), Host(with_torch=False), left_out)
    assert set(left_out) == set(experiment.TORCH)
    candidates = layer.candidates(3)
    assert {name for name, _ in candidates} == {
        experiment.FLOATS, experiment.CODE, experiment.CODES,
    }  # fmt: skip
    expected = candidates[experiment.FLOATS, None].call()
    found = candidates[experiment.CODE, 4].call()
    assert np.square(found - expected).mean() < 0.1 * np.square(expected).mean()


def test_rounds_are_at_least_one(capsys, tmp_path):
    assert experiment.main(["--rounds", "0", "--output", str(tmp_path)]) == 2
    assert "at least 1 round" in capsys.readouterr().err
