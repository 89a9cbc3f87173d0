"""What a person at a terminal sees and does: progress bars, and Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cubin.core import passes, progress

fcntl = pytest.importorskip("fcntl", reason="this system has no terminals of that kind")
pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")

ROOT = str(Path(passes.__file__).parents[2])

LONG = """
import numpy as np, cubin
from cubin.core import passes, progress
progress.DELAY, passes.LONG_SEARCH = 0, 1
x = np.random.default_rng(0).standard_normal((8, 1 << 17))
cubin.quantize(x, 3, channel_axis=0, solver="optimal")
cubin.bitmaps.budget(x[:2, :1000], 1.5)
cubin.bitmaps.allocate({"w": x[:2, :1000]}, 1.5)
gram = cubin.Gram(4).add(x[:, :8].reshape(-1, 4))
cubin.quantize(x[:, :4], 1, channel_axis=0, solver="optimal", gram=gram)
"""

ENDLESS = """
import signal, numpy as np, cubin
x = np.random.default_rng(0).standard_normal((4, 1 << 19)).astype(np.float32)

def results():
    return [cubin.multibit(x, 3), cubin.multibit(x[:, :999], 2, channel_axis=0, solver="optimal")]

expected = results()
for _ in range(4):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        print("go", flush=True)
        while True:
            results()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for a, b in zip(results(), expected, strict=True):
            np.testing.assert_array_equal(a, b)
        print("stopped", flush=True)
"""


def run(code, **options):
    environment = os.environ | {"PYTHONPATH": ROOT}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **options)


def test_bars_at_a_terminal():
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with run(LONG, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the other end was closed
            while chunk := os.read(mine, 1 << 16):
                shown += chunk
    os.close(mine)
    assert process.returncode == 0, shown.decode()
    for name in (b"optimal:", b"budget:", b"allocate:", b"starts:"):
        assert name in shown


def test_no_bars_elsewhere():
    with run(LONG, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.communicate() == (b"", b"")
    assert process.returncode == 0


def test_every_call_is_made():
    done = []
    with progress.counted(done.append, "name", "block", 3) as task:
        for number in range(3):
            task(number)
    assert done == [0, 1, 2]


def test_an_interrupted_call_leaves_nothing_broken():
    with run(ENDLESS, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for number in range(4):
            assert process.stdout.readline() == "go\n"
            time.sleep(0.02 * number)  # each time somewhere else
            # Python drops the exception of a signal that comes within a finalizer: press again.
            process.send_signal(signal.SIGINT)
            while not select.select([process.stdout], [], [], 5)[0]:
                process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "stopped\n", process.stderr.read()
        assert process.wait() == 0, process.stderr.read()
