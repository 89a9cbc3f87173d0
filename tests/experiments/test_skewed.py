from __future__ import annotations

import csv
import json

import pytest
import skewed as experiment


def test_a_quick_run(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "QUICK_SHAPE", (2, 200))
    monkeypatch.setattr(experiment, "BITS", range(1, 3))
    assert experiment.main(["--quick", "--output", str(tmp_path)]) == 0
    with (tmp_path / "skewed.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 3 * 4 * 2 * 2
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        assert (one["shift"], other["shift"]) == ("0", "1")
        bits = float(one["effective_bits"]) + 32 / 200
        assert float(other["effective_bits"]) == pytest.approx(bits)
        if one["data"] == "exponential":
            assert float(other["relative_mse"]) < float(one["relative_mse"])
    assert json.loads((tmp_path / "skewed.json").read_text())["seed"] == experiment.SEED
