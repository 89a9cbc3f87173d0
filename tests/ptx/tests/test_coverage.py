"""Whole runs execute every kernel and every line of our CUDA text that became code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cupy")

from tests.ptx import coverage
from tests.ptx.device import module as xp
from tests.ptx.equivalent import REASONS
from tests.ptx.mutate import mutants

pytestmark = [pytest.mark.kernels, pytest.mark.exhaustive]

ROOT = Path(__file__).resolve().parents[3]


def test_lines_that_ran_and_lines_that_did_not():
    text = """y = x;
if (x > 10) {
  // a comment has no code
  y = sqrt(x) / 3 + x * x * x;
}"""
    kernel = xp.ElementwiseKernel("T x", "T y", text, "partly")
    kernel(xp.zeros(5))
    seen = coverage.of_text(text)
    assert seen.known - seen.executed == {4}
    assert seen.missed == [(4, "  y = sqrt(x) / 3 + x * x * x;")]
    kernel(xp.full(5, 11.0))
    assert coverage.of_text(text).missed == []
    assert coverage.of_text(text, "compute_70").known == set()
    assert coverage.of_text(text.replace("10", "{limit}")).known == seen.known


def test_records_of_other_processes_count():
    text = """y = x;
if (x > 2) {
  y = sqrt(x) / 5;
}"""
    kernel = xp.ElementwiseKernel("T x", "T y", text, "elsewhere")
    kernel(xp.zeros(5))
    assert coverage.gaps(["elsewhere", "another"], {"text": text}, "compute_80") == [
        "another never ran",
        "text:3 never ran: y = sqrt(x) / 5;",
    ]
    record = coverage.record()
    assert "elsewhere" in record["kernels"]
    (own,) = (lines for lines in record["lines"] if text in lines[1])
    arch, source, known, executed = own
    other = {"kernels": ["another"], "lines": [(arch, source, [], sorted({*known} - {*executed}))]}
    coverage.add(other)
    assert coverage.gaps(["elsewhere", "another"], {"text": text}, "compute_80") == []


PROJECT = {
    "pytest.ini": "[pytest]\ntestpaths = both\nmarkers = kernels\n",
    "both/conftest.py": """
import cubin.errors
import cubin.surrogates
from cubin.core.primitives import REGISTRY
from tests.ptx.plugin import device, pytest_sessionfinish, pytest_terminal_summary
from tests.ptx.plugin import pytest_testnodedown

for name in REGISTRY.keys() - {"signs", "inside", "inside_bits"}:
    del REGISTRY[name]
""",
    "both/test_both.py": """
import cubin
import pytest

pytestmark = [pytest.mark.kernels, pytest.mark.exhaustive]

def test_sign(device):
    cubin.sign(device.ones(5))

def test_mask(device):
    cubin.ste_mask(device.ones(5))

def test_neither():
    pass
""",
}
"""Tests of two kernels, as if the library had these and a third one."""


@pytest.fixture
def project(tmp_path):
    """A function that runs the tests of a project in processes of their own."""
    for name, text in PROJECT.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    def run(*arguments):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "CUBIN_TEST_ENGINE": "ptx"}
        return subprocess.run(
            [sys.executable, "-m", "pytest", "--import-mode=importlib", *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_whole_run_executes_every_kernel(project, workers):
    pytest.importorskip("xdist")
    done = project("-m", "kernels", "-n", workers)
    assert "3 passed" in done.stdout
    assert done.returncode == 1
    assert done.stdout.count("never ran") == 1
    assert "cubin_inside never ran" in done.stdout


def test_a_part_of_the_tests_may_leave_kernels_out(project):
    done = project("-k", "sign or mask")
    assert "2 passed" in done.stdout
    assert done.returncode == 0


def test_only_mutants_are_explained():
    assert REASONS.keys() <= {mutant.edited for mutant in mutants()}
