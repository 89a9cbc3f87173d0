"""Codes that know a layer's inputs on a real network: a small run, and what is said of it."""

from __future__ import annotations

import csv
import importlib.util
import json

import layer_outputs as experiment
import numpy as np
import pytest
from layer_inputs import Inputs

import cubin
from tests.required import require


@pytest.fixture
def layer():
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((64, 64)) / 8
    halves = []
    for _ in range(2):
        x = rng.standard_normal((500, 64)) @ mixing + 1
        halves.append(Inputs(cubin.Gram(64).add(x), x.sum(axis=0)))
    return experiment.Layer("reading", "w", rng.standard_normal((8, 64)).astype("f2"), *halves)


def test_errors_are_measured_on_other_images(layer, monkeypatch):
    few = ("optimal", "alternating, gram", "optimal, gram", "GPTQ")
    few = {name: experiment.MEASURED[name] for name in few}
    monkeypatch.setattr(experiment, "MEASURED", few)
    points = list(experiment.measured(layer, slow=False))
    assert [(p.inputs, p.method, p.bits) for p in points] == [
        (inputs, name, bits)
        for inputs in (experiment.AS_THEY_ARE, experiment.CENTRED)
        for name, (_, widths) in few.items()
        for bits in widths
        if name != "optimal, gram"
    ]
    w = layer.weights.astype(np.float64)
    for inputs, (known, others) in layer.grams().items():
        code = cubin.quantize(layer.weights, 2, channel_axis=0, solver="alternating", gram=known)
        off = w - code.dequantize().astype(np.float64)
        wanted = (inputs, "alternating, gram", 2)
        point = next(p for p in points if (p.inputs, p.method, p.bits) == wanted)
        for error, gram in ((point.known_mse, known), (point.output_mse, others)):
            expected = np.trace(off @ gram.matrix @ off.T) / np.trace(w @ gram.matrix @ w.T)
            assert error == pytest.approx(expected, rel=1e-9)
        assert point.power == pytest.approx(np.trace(w @ others.matrix @ w.T), rel=1e-9)
        assert point.effective_bits == 2 + 2 * 16 / 64
        assert point.known_mse < point.output_mse  # the codes know the ones, and not the others
        assert (point.lines, point.columns) == w.shape


def point(layer, method, error, power=1.0, lines=1, inputs=experiment.CENTRED, net="reading"):
    errors = (0.1, 0.1, error)
    return experiment.Point(net, layer, 10, lines, inputs, method, 2, 2.5, power, *errors)


def test_layers_count_by_the_power_of_their_outputs():
    points = [point("a", "optimal", 0.1, 3.0), point("b", "optimal", 0.5, 1.0, 3),
              point("c", "optimal", 0.2, 0.0), point("a", "GPTQ", 0.05), point("b", "GPTQ", 0.6),
              point("a", "optimal", 0.9, inputs=experiment.AS_THEY_ARE)]  # fmt: skip
    found = experiment.total(points, experiment.CENTRED, "optimal", 2)
    assert found == experiment.Total(2.5, pytest.approx(0.2), 0.2)
    ratios = experiment.ratios(points, experiment.CENTRED, "GPTQ", "optimal", 2)
    np.testing.assert_allclose(ratios, [0.5, 1.2])


def test_layers_of_two_networks_may_share_a_name():
    points = [point("a", name, error, net=net) for net, name, error in [
        ("reading", "optimal", 0.1), ("reading", "GPTQ", 0.2), ("turning", "optimal", 0.5),
        ("turning", "GPTQ", 0.5)]]  # fmt: skip
    ratios = experiment.ratios(points, experiment.CENTRED, "GPTQ", "optimal", 2)
    np.testing.assert_allclose(ratios, [2, 1])


def test_a_quick_run(tmp_path, monkeypatch):
    if importlib.util.find_spec("rapidocr") is None:
        pytest.skip("the package rapidocr is not installed")
    require("onnxruntime")
    few = ("optimal", "refined, gram", "alternating, gram", "GPTQ", "columns, gram")
    measured = {name: (experiment.MEASURED[name][0], experiment.MEASURED[name][1]) for name in few}
    measured["optimal, gram"] = (measured["refined, gram"][0], (1, 2, 3))  # sooner
    monkeypatch.setattr(experiment, "MEASURED", measured)
    monkeypatch.setattr(experiment, "QUICK", ("turning", 2, 2))
    monkeypatch.setattr(experiment, "LINES", 8)
    out = tmp_path / "out"
    assert experiment.main(["--quick", "--output", str(out)]) == 0
    assert (out / "layer_outputs.png").stat().st_size > 0
    with (out / "layer_outputs.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    origin = json.loads((out / "layer_outputs.json").read_text())
    layers = {row["layer"] for row in rows}
    assert {row["network"] for row in rows} == {"turning"}
    assert origin["layers"] == {"turning": len(layers)}
    assert len(rows) == len(layers) * 2 * sum(len(widths) for _, widths in measured.values())
    assert all(int(row["columns"]) >= experiment.LEAST_INPUTS for row in rows)
    assert sum(origin["left_out"].values()) > 0
    for row in rows:
        if row["method"] == "alternating, gram" and row["bits"] == "2":
            plain = next(
                r for r in rows
                if all(r[key] == row[key] for key in ("layer", "inputs", "bits"))
                and r["method"] == "optimal"
            )  # fmt: skip
            assert float(row["known_mse"]) < float(plain["known_mse"])
            assert float(row["weight_mse"]) >= float(plain["weight_mse"])
    assert len(origin["findings"]) == 2 * 10


def test_without_the_networks_there_is_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert experiment.main(["--output", str(tmp_path / "out")]) == 2
    assert "rapidocr" in capsys.readouterr().err
