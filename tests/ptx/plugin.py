"""The engines that kernel tests run on, as pytest fixtures; and what a whole run must execute.

``CUBIN_TEST_ENGINE`` chooses: ``ptx`` (the default) interprets NVRTC's PTX, ``cuda`` is CuPy on a
GPU, ``numpy`` leaves the kernel tests out. ``CUBIN_TEST_ARCH`` is what the interpreter compiles
for, ``compute_80`` unless set.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest

from cubin.core import primitives
from tests.ptx import coverage
from tests.ptx.launch import EXECUTED

ENGINE = os.environ.get("CUBIN_TEST_ENGINE", "ptx")
ARCH = os.environ.get("CUBIN_TEST_ARCH", "compute_80")

GAPS = pytest.StashKey[list[str]]()
"""What a whole run left out."""


def pytest_configure() -> None:
    """Look for garbage less often: parsed and assembled kernels stay, and are much to look at."""
    gc.set_threshold(100_000)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> Iterator[Any]:
    """The device library of the engine: CuPy, or the stand-in for it."""
    if ENGINE == "numpy":
        pytest.skip("CUBIN_TEST_ENGINE=numpy: no device library")
    if ENGINE not in ("ptx", "cuda"):
        raise ValueError(f"CUBIN_TEST_ENGINE must be numpy, ptx or cuda, got {ENGINE!r}")
    cupy = pytest.importorskip("cupy", reason="CuPy generates the kernels' sources")
    if ENGINE == "cuda":
        yield cupy
        return
    pytest.importorskip("cuda.pathfinder", reason="it finds NVRTC")
    from tests.ptx import compiler
    from tests.ptx.device import architecture, module

    if not compiler.CACHE and (cache := getattr(pytestconfig, "cache", None)) is not None:
        compiler.CACHE.append(cache.mkdir("ptx"))
    monkeypatch.setattr("cubin.core.libraries.cupy", lambda: module)
    with architecture(ARCH):
        yield module


# ---------------------------------------------------------------- after the last test

# Every kernel and every line of CUDA must run in some test. With several processes (pytest -n),
# each hands its record over when it ends, and the one that started them looks at the sum.


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a whole run that passed, but left out a kernel or a line."""
    if ENGINE != "ptx":
        return
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["ptx"] = coverage.record()
    elif exitstatus == pytest.ExitCode.OK and EXECUTED and _is_whole(session.config):
        from tests.ptx.mutate import units

        names = (primitive.kernel_name for primitive in primitives.REGISTRY.values())
        if found := coverage.gaps(names, units(), ARCH):
            session.config.stash[GAPS] = found
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Each process has a core: BLAS threads of several would only wait for one another."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A process of several has ended; one that died has no record, but fails a test."""
    if record := getattr(node, "workeroutput", {}).get("ptx"):
        coverage.add(record)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Name what a whole run left out."""
    if found := config.stash.get(GAPS, []):
        terminalreporter.section("CUDA that no test executes", red=True, bold=True)
        for line in found:
            terminalreporter.line(line)


def _is_whole(config: pytest.Config) -> bool:
    """Whether no test was left out, but for those that ``-m kernels`` leaves out."""
    option = config.option
    return not (
        [path for path in config.args if path not in config.getini("testpaths")]
        or option.keyword
        or option.markexpr not in ("", "kernels")
        or any(
            getattr(option, name, None)
            for name in ("deselect", "ignore", "ignore_glob", "lf", "stepwise")
        )
    )
