"""A scheduler and a worker that share no network but a cable: two network namespaces."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cubin import __main__ as command
from tests.commands.conftest import ROOT
from tests.required import require

HOST, PEER = "10.77.61.1", "10.77.61.2"


@pytest.fixture
def machines():
    """The names of two network namespaces that a pair of virtual devices connects."""
    if shutil.which("ip") is None or getattr(os, "geteuid", lambda: 1)():
        pytest.skip("network namespaces need root and the command ip")
    names = [f"cubin{os.getpid()}{letter}" for letter in "ab"]

    def ip(*arguments):
        return subprocess.run(["ip", *arguments], capture_output=True, text=True)

    try:
        for name in names:
            if ip("netns", "add", name).returncode:
                pytest.skip("network namespaces cannot be made here")
        ends = [f"cb{os.getpid() % 10**6}{letter}" for letter in "ab"]
        made = ip("link", "add", ends[0], "netns", names[0], "type", "veth",
                  "peer", "name", ends[1], "netns", names[1])  # fmt: skip
        if made.returncode:
            pytest.skip("virtual network devices cannot be made here")
        for name, end, address in zip(names, ends, (HOST, PEER), strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.mark.exhaustive
def test_a_scheduler_and_a_worker_on_two_machines(checkpoint, tmp_path, machines):
    require("distributed")
    assert command.main(["error", str(checkpoint), "--output", str(tmp_path / "here")]) == 1
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}

    def start(machine, *arguments):
        line = ["ip", "netns", "exec", machine, sys.executable, "-m", *map(str, arguments)]
        return subprocess.Popen(
            line,
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    address = f"tcp://{HOST}:8786"
    running = [
        start(machines[0], "distributed.cli.dask_scheduler", "--host", HOST, "--no-dashboard"),
        start(machines[1], "distributed.cli.dask_worker", address, "--no-dashboard"),
    ]
    try:
        run = start(
            machines[0], "cubin", "error", checkpoint, "--scheduler", address, "--output", "there"
        )
        _, said = run.communicate(timeout=120)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.communicate(timeout=30)
    assert run.returncode == 1, said
    name = "error_per_bit_width.csv"
    found = Path(tmp_path / "there" / name).read_bytes()
    assert found == (tmp_path / "here" / name).read_bytes()
