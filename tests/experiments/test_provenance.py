from __future__ import annotations

import json
import platform
import socket
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import provenance
import pytest


def test_record_survives_json_and_says_when_with_what_and_how():
    before = datetime.now(UTC) - timedelta(seconds=1)
    record = provenance.record({"bits": range(1, 4), "quick": True}, seed=7, packages=["pytest"])

    assert json.loads(json.dumps(record)) == record
    assert before <= datetime.fromisoformat(record["date"]) <= datetime.now(UTC)
    assert record["arguments"] == {"bits": [1, 2, 3], "quick": True}
    assert record["seed"] == 7
    assert record["versions"]["numpy"] == np.__version__
    assert record["versions"]["pytest"] == pytest.__version__
    assert record["versions"]["python"] == platform.python_version()
    assert record["machine"]["cores"] >= 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("fpu avx2 avx512f", "AMD EPYC (AVX-512)"),
        ("fpu avx avx2", "AMD EPYC (AVX2)"),
        ("fpu", "AMD EPYC"),
    ],
)
def test_a_processor_is_named_with_its_vectors(monkeypatch, flags, named):
    text = f"model name\t: AMD EPYC Processor\nflags\t\t: {flags}\n\n"
    monkeypatch.setattr(Path, "read_text", lambda path, **_: text * 2)
    assert provenance.processor() == named


def test_packages_that_are_not_installed_are_not_listed():
    assert "no-such-package" not in provenance.versions(["no-such-package"])


def test_record_names_no_host_and_no_folder(tmp_path):
    inputs = [tmp_path / "a.npz", Path("folder/b.npy")]
    record = provenance.record({"paths": inputs, "output": str(tmp_path / "out"), "axis": "auto"})

    assert record["arguments"] == {"paths": ["a.npz", "b.npy"], "output": "out", "axis": "auto"}
    text = json.dumps(record)
    assert str(tmp_path) not in text
    assert str(Path.home()) + "/" not in text
    assert socket.gethostname() not in record["machine"]["os"].split("-")


def test_revision_tells_a_clean_checkout_from_a_changed_one(tmp_path):
    def git(*command):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    assert provenance.revision(tmp_path) is None  # no commit yet
    tracked = tmp_path / "tracked"
    tracked.write_text("1")
    git("add", "tracked")
    git("commit", "-m", "first")
    (tmp_path / "untracked").write_text("1")

    clean = provenance.revision(tmp_path)
    tracked.write_text("2")
    changed = provenance.revision(tmp_path)

    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    assert changed == {"commit": clean["commit"], "dirty": True}


def test_the_revision_is_that_at_the_start(tmp_path, monkeypatch):
    found = provenance.revision(Path(provenance.__file__).parent)
    # What a run writes into the checkout changes the answer, and not the record.
    monkeypatch.setattr(provenance, "revision", lambda folder: {"commit": "later", "dirty": True})
    assert provenance.record({})["revision"] == found


def test_revision_is_none_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.revision(tmp_path) is None
