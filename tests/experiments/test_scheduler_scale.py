from __future__ import annotations

import json
import math

import scheduler_scale as experiment

from cubin.analysis import measure, tasks
from cubin.weights import Weights
from tests import required


def test_headers_stand_in_front_of_holes(tmp_path):
    experiment.write_headers(tmp_path, 3)
    weights = Weights(tmp_path)
    assert len(weights.tensors) == 30
    assert sum(tensor.size for tensor in weights.tensors) == 3 * sum(
        math.prod(shape) for shape in experiment.LAYER.values()
    )
    assert sum(file.stat().st_blocks for file in tmp_path.iterdir()) * 512 < 1 << 20


def test_the_scheduler_and_the_workers_wait_for_each_other():
    # One worker: the first task is handed out, then one follows the other.
    assert experiment.simulated([10] * 5, 1, 0.5, 1.0) == 50.5
    # More workers than tasks in flight: the scheduler is what takes the time.
    assert experiment.simulated([1] * 100, 50, 1.0, 1.0) == 101
    assert experiment.simulated([4, 4, 4, 4], 2, 0.0, 0.5) == 4


def test_a_quick_run(tmp_path, capsys):
    required.require("distributed")
    before = measure.PART, tasks.BATCH
    assert experiment.main(["--quick", "--workers", "10", "--output", str(tmp_path)]) == 0
    assert "200 tensors" in capsys.readouterr().out
    assert before == (measure.PART, tasks.BATCH)
    origin = json.loads((tmp_path / "scheduler_scale.json").read_text())
    assert origin["seconds_of_a_task"] > 0
    header, *lines = (tmp_path / "scheduler_scale.csv").read_text().splitlines()
    assert len(lines) == len(experiment.PARTS) * len(experiment.BATCHES)
    count = header.split(",").index("tasks")
    counts = [int(line.split(",")[count]) for line in lines]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 2 * counts[-1]
