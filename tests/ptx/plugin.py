"""The engines that kernel tests run on, as pytest fixtures.

``CUBIN_TEST_ENGINE`` chooses: ``ptx`` (the default) interprets NVRTC's PTX, ``cuda`` is CuPy on a
GPU, ``numpy`` leaves the kernel tests out. ``CUBIN_TEST_ARCH`` is what the interpreter compiles
for, ``compute_80`` unless set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

ENGINE = os.environ.get("CUBIN_TEST_ENGINE", "ptx")
ARCH = os.environ.get("CUBIN_TEST_ARCH", "compute_80")

LAST = {"test_every_kernel_is_executed", "test_every_cuda_line_is_executed"}
"""The tests of these names look back at all others, so they run after them."""


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
    monkeypatch.setattr("cubin.arrays.cupy", lambda: module)
    with architecture(ARCH):
        yield module


@pytest.fixture
def whole_run(request: pytest.FixtureRequest) -> None:
    """Skips a test that only makes sense after all kernel tests have passed."""
    config = request.config
    option = config.option
    chosen = [path for path in config.args if path not in config.getini("testpaths")]
    partly = (
        chosen
        or option.keyword
        or option.markexpr not in ("", "kernels")
        or any(getattr(option, name, None) for name in ("deselect", "ignore", "ignore_glob", "lf"))
    )
    if partly or request.session.testsfailed:
        pytest.skip("only after all tests have passed")
    if ENGINE != "ptx":
        pytest.skip("the interpreter keeps the record")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests that look back at all others last."""
    items.sort(key=lambda item: item.name in LAST)
