from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkpoint(tmp_path, rng):
    """Two shards of several types, with a tensor that is not finite and a bias."""
    types = [np.float32, ml_dtypes.bfloat16, np.float16, np.float64, ml_dtypes.float8_e4m3fn]
    folder = tmp_path / "model"
    folder.mkdir()
    for shard in range(2):
        saved = {
            f"layers.{shard}.w{i}": rng.standard_normal((24, 20 + i)).astype(dtype)
            for i, dtype in enumerate(types)
        }
        saved[f"layers.{shard}.bias"] = np.ones(4, np.float32)
        if shard:
            saved["bad"] = np.full((3, 4), np.nan, np.float32)
        safetensors.numpy.save_file(saved, folder / f"model-{shard + 1}-of-2.safetensors")
    return folder


@pytest.fixture
def python():
    """Runs Python with the package on its path, as a process of its own."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}

    def start(*arguments, **keywords):
        command = [sys.executable, "-W", "error", *map(str, arguments)]
        return subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **keywords,
        )

    return start
