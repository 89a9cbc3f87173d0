"""Every kernel compiles with the options and headers of the CuPy that is installed.

Without a GPU, and without executing anything, so that a run in an environment with another CuPy
takes a minute or two. `CUBIN_TEST_COMPILE=all` compiles all kernels; otherwise a few of them, since
the other tests compile and execute all with the installed version anyway.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import numpy as np
import pytest

from cubin.core import primitives
from cubin.core.primitives import FLOATS, Raw
from tests.test_kernels import COUNTS, inputs_of, outputs_of

pytestmark = pytest.mark.kernels

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]

SAMPLE = ["signs", "level_sums", "encode_rows", "tanh"]
ALL = os.environ.get("CUBIN_TEST_COMPILE") == "all"

# CuPy has no bfloat16 with older ones.
HAS_BFLOAT16 = np.lib.NumpyVersion(np.__version__) >= "2.1.2"

# Rows that a few lanes, a warp and a block hold, of which accesses are narrow and wide.
LENGTHS = [27, 300, 4096]
LEVELS = 3


def names():
    return [name for name in primitives.REGISTRY if ALL or name in SAMPLE]


@pytest.fixture
def asked(device, monkeypatch):
    """The sources that kernels are asked for, which compile and do not run."""
    engine = pytest.importorskip("tests.ptx.device")
    from tests.ptx import compiler
    from tests.ptx.plugin import ENGINE

    if ENGINE != "ptx":
        pytest.skip("on a GPU CuPy compiles whatever runs")
    found = []

    def compile(source, options, names=()):
        found.append(source)
        return compiler.compile(source, engine._current[-1], options, names)

    monkeypatch.setattr(engine, "_compiled", compile)
    monkeypatch.setattr(engine, "_run", lambda *_, **__: None)
    return found


def launch_raw(primitive, types, shape, mapped, device):
    """Call a raw kernel on some rows, whatever its arguments are."""
    lines, length = shape
    sizes = {
        "scales": (LEVELS, lines, 1),
        "signs": (LEVELS, *shape),
        "planes": (LEVELS, -(-length // 8), lines),
    }
    inputs = []
    for kind, name in primitive.inputs:
        if name == "bits":
            inputs.append(device.full(shape, LEVELS, np.uint8) if mapped else np.uint8(LEVELS))
        elif kind.startswith("static"):
            inputs.append(LEVELS if name == "levels" else 1)
        else:
            inputs.append(device.empty(sizes.get(name, shape), types.get(kind, kind)))
    primitive(*inputs, **{
        name: device.empty(sizes.get(name, shape), types.get(kind, kind))
        for kind, name in primitive.outputs
    })  # fmt: skip


@pytest.mark.parametrize("name", names())
def test_kernels_compile(name, device, asked, monkeypatch, rng):
    primitive = primitives.REGISTRY[name]
    # Built anew: what an earlier test has built does not compile again.
    monkeypatch.setattr(primitive, "_kernels", {})
    before = 0
    for types in primitive.types or FLOATS:
        if "bfloat16" in types.values() and not HAS_BFLOAT16:
            continue
        if isinstance(primitive, Raw):
            monkeypatch.setattr(primitive, "_modules", {})
            for length in LENGTHS if ALL else LENGTHS[:1]:
                for mapped in (False, True):
                    launch_raw(primitive, types, (3, length), mapped, device)
        else:
            for count in COUNTS if primitive.variadic else [0]:
                inputs = inputs_of(primitive, types, count, rng)
                outputs = outputs_of(primitive, types, device)
                primitive(*(device.asarray(a) for a in inputs), **outputs)
        assert len(asked) > before
        before = len(asked)


def requirement(extra, package):
    """The requirement of `package` in an extra."""
    requirements = pytest.importorskip("packaging.requirements")
    found = map(requirements.Requirement, PROJECT["optional-dependencies"][extra])
    return next(one for one in found if one.name == package)


@pytest.mark.parametrize(
    ("extra", "package"), [("cuda12", "cupy-cuda12x"), ("cuda13", "cupy-cuda13x")]
)
def test_the_installed_version_is_allowed(device, extra, package):
    """What these tests compile with is what the extras allow."""
    assert requirement(extra, package).specifier.contains(device.__version__)


@pytest.mark.parametrize(
    ("extra", "package"), [("cuda12", "cupy-cuda12x"), ("cuda13", "cupy-cuda13x")]
)
@pytest.mark.parametrize("older", ["13.6.0", "14.0.1", "14.1.1"])
def test_older_versions_are_not_allowed(extra, package, older):
    """13 has no ``cupy/float16.cuh``; before 14.2 some drivers keep no templates on disk."""
    assert not requirement(extra, package).specifier.contains(older)


def test_whatever_is_compiled_anew_is_known_by_its_versions(device):
    """A result that another CuPy or NVRTC gave is not taken for this one's."""
    from tests.ptx import compiler

    assert any(device.__version__ in one for one in compiler._versions())
