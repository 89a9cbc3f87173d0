from __future__ import annotations

import importlib.util
import sys

import pytest
from command_line import pretrained_sample

from cubin.weights import Weights, WeightsError

# The pretrained sample


def test_sample_is_found_in_the_package_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "rapidocr"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "models" / "net.onnx").write_bytes(b"x")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rapidocr", raising=False)
    assert pretrained_sample() == [package / "models" / "net.onnx"]


def test_sample_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WeightsError) as error:
        pretrained_sample()
    assert "\n" not in str(error.value)
    assert "rapidocr" in str(error.value)
    assert "pip install '.[examples]'" in str(error.value)


def test_sample_has_well_over_a_hundred_convolutions_and_dense_layers():
    if importlib.util.find_spec("rapidocr") is None:
        pytest.skip("the package rapidocr is not installed")
    weights = Weights(pretrained_sample())
    assert len(weights) > 100
    assert {tensor.channel_axis for tensor in weights.tensors} == {0, 1}
    assert {len(tensor.shape) for tensor in weights.tensors} == {2, 4}
