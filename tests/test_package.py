from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import cubin
from tests.required import require

ROOT = Path(__file__).parent.parent
PUBLIC = [
    "analysis",
    "bitmaps",
    "errors",
    "memory",
    "operators",
    "surrogates",
    "tape",
    "theory",
    "weights",
]
MODULES = ["cubin", *(m.name for m in pkgutil.walk_packages(cubin.__path__, "cubin."))]


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.split()


def test_importing_cubin_imports_no_heavy_module():
    heavy = {"cupy", "matplotlib", "pandas", "numba", "torch", "jax", "scipy", "tqdm"}
    loaded = run("import sys, cubin; print(*{m.partition('.')[0] for m in sys.modules})")
    assert not heavy & set(loaded)


def test_lazy_modules_are_reached_as_attributes():
    assert run("import cubin; print(cubin.theory.__name__, cubin.analysis.__name__)") == [
        "cubin.theory",
        "cubin.analysis",
    ]
    assert set(cubin.__all__) <= set(dir(cubin))
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        cubin.magic  # noqa: B018


def test_cupy_without_a_gpu_is_no_obstacle():
    pytest.importorskip("cupy")
    out = run("import cupy, cubin, numpy as np; print(*cubin.multibit(np.array([-1., 3.]), 2))")
    assert out == ["-1.0", "3.0"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    if name in ("cubin.torch", "cubin.jax"):
        require(name.removeprefix("cubin."))
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_public_names_are_documented():
    for name in cubin.__all__:
        assert getattr(cubin, name).__doc__, name


def test_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == cubin.__version__


@pytest.mark.parametrize("name", ["cubin", *(f"cubin.{module}" for module in PUBLIC)])
def test_completion_shows_what_is_public(name):
    module = importlib.import_module("cubin")
    if name != "cubin":
        module = getattr(module, name.removeprefix("cubin."))
    shown = set(dir(module))
    assert shown - {"__version__"} == set(module.__all__)
    for entry in module.__all__:
        assert getattr(module, entry) is not None
