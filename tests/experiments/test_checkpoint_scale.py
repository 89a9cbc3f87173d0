from __future__ import annotations

import json
import math
import os

import checkpoint_scale as experiment
import numpy as np
import pytest

from cubin.weights import Weights


def test_shards_are_sound_and_as_large_as_said(tmp_path):
    nbytes = experiment.write_shards(tmp_path, experiment.QUICK_SHAPES, 2)
    assert nbytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    weights = Weights(tmp_path)
    assert [t.reason for t in weights.left_out] == ["of rank 1"] * 2
    assert sum(t.size for t in weights.tensors) == 2 * sum(
        math.prod(shape) for shape in experiment.QUICK_SHAPES.values()
    )
    for _, array, _ in weights:
        assert array.dtype.name == "bfloat16"
        assert abs(array.astype(np.float32).std() - 1) < 0.1


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="no wait4")
def test_a_quick_run(tmp_path, capsys):
    (tmp_path / "shards").mkdir()
    arguments = ["--quick", "--folder", str(tmp_path / "shards"), "--output", str(tmp_path)]
    assert experiment.main(arguments) == 0
    assert "GiB in its largest process" in capsys.readouterr().out
    origin = json.loads((tmp_path / "checkpoint_scale.json").read_text())
    assert origin["same bits"] is True
    assert origin["one process"]["peak_bytes"] > 0
    assert not list((tmp_path / "shards").iterdir())
