"""On a GPU: what CuPy compiled there is what the interpreter runs here."""

from __future__ import annotations

import pytest

from cubin.core import libraries

pytest.importorskip("cupy")

from tests.ptx import device as stand_in
from tests.ptx.plugin import ENGINE
from tests.test_kernels import cases, run

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.exhaustive,
    pytest.mark.skipif(ENGINE != "cuda", reason="compares with CuPy on a GPU"),
]


def sources(primitive, types, count, library, monkeypatch):
    """The texts that `library` compiles when the primitive runs."""
    monkeypatch.setattr(primitive, "_kernels", {})
    monkeypatch.setattr(libraries, "cupy", lambda: library)
    run(primitive, types, count, library)
    return set(primitive.kernel(count).cached_codes.values())


@pytest.mark.parametrize(("primitive", "types", "count"), list(cases()))
def test_the_sources_are_the_same(primitive, types, count, device, monkeypatch):
    there = sources(primitive, types, count, device, monkeypatch)
    here = sources(primitive, types, count, stand_in.module, monkeypatch)
    assert there == here != set()
