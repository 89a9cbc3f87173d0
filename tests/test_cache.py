"""What Numba keeps of compiled loops on disk, damaged in every way that was seen or feared."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cubin

pytest.importorskip("numba")

import numba

from cubin.core.host import loops


def doubled(x):
    return x + x


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def use():
    """The loop as a new process has it: how many of two calls found what was kept."""
    loop = loops.loop(doubled)
    assert loop(1.5) == 3
    assert loop(1 << 60) == 1 << 61
    return sum(loop.stats.cache_hits.values())


def entries(folder, kind):
    return sorted(folder.rglob(f"*.{kind}"))


def damage(path, way):
    content = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "cut": content[: len(content) // 2],
            "last byte": content[:-1],
            "zeros": bytes(len(content)),
            "text": b"version https://git-lfs.github.com/spec/v1\n",
            "global": b"cnowhere\nnothing\n.",
        }[way]
    )


def test_loops_are_kept(folder):
    assert (use(), use()) == (0, 2)
    assert len(entries(folder, "nbi")) == 1
    assert len(entries(folder, "nbc")) == 2


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("way", ["empty", "cut", "last byte", "zeros", "text", "global"])
def test_damaged_entries_are_made_again(folder, kind, way):
    use()
    for path in entries(folder, kind):
        damage(path, way)
    assert use() == 0
    assert use() == 2


def test_entries_for_other_types_are_made_again(folder):
    """As two processes leave them that save at once: each takes the same name."""
    use()
    one, other = entries(folder, "nbc")
    one.write_bytes(other.read_bytes())
    assert use() < 2
    assert use() == 2


def test_entries_that_are_missing_are_made_again(folder):
    use()
    entries(folder, "nbc")[0].unlink()
    assert use() == 1
    assert use() == 2


def test_an_entry_that_cannot_be_replaced(folder):
    use()
    [index] = entries(folder, "nbi")
    index.unlink()
    index.mkdir()
    with pytest.warns(RuntimeWarning, match="delete that folder") as caught:
        assert use() == 0
    assert all(str(index.parent) in str(warning.message) for warning in caught)


def test_a_folder_that_is_gone(folder):
    use()
    loop = loops.loop(doubled)
    shutil.rmtree(folder)
    assert loop(1.5) == 3
    assert use() == 1


def test_no_folder_that_can_be_written(monkeypatch):
    def refuse(*_):
        raise RuntimeError("no locator available")

    monkeypatch.setattr(loops._Cache, "__init__", refuse)
    assert (use(), use()) == (0, 0)


@pytest.mark.exhaustive
def test_a_session_on_a_damaged_cache(tmp_path):
    """A process with a cache of which every file is damaged notices nothing, and mends it."""
    script = (
        "import numpy as np, cubin\n"
        "x = np.linspace(-1, 1, 1 << 20)\n"
        "print(repr(cubin.sign(x).sum()), repr(cubin.sign(x.astype('f4')).sum()))\n"
    )
    root = Path(cubin.__file__).parents[1]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_DEBUG_CACHE": "1",
                                "PYTHONPATH": str(root)}  # fmt: skip

    def run():
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        x = np.linspace(-1, 1, 1 << 20)
        assert f"{cubin.sign(x).sum()!r} {cubin.sign(x.astype('f4')).sum()!r}" in done.stdout
        return done.stdout.count("data saved")

    compiled_first = run()
    assert compiled_first > 0
    assert run() == 0
    ways = ["empty", "cut", "zeros", "text"]
    for number, path in enumerate(entries(tmp_path, "nb?")):
        damage(path, ways[number % len(ways)])
    assert run() == compiled_first
    assert run() == 0
