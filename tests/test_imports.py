"""The rule of imports: what CONTRIBUTING says is what the modules do, and there is no circle."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [
    line.split()
    for line in re.search(r"```imports\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)[1]
    .strip()
    .splitlines()
]


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, modules):
    """The modules of the package that a file imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                found.add(inner if inner in modules else node.module)
    return found


FILES = {module_of(path): path for path in (ROOT / "cubin").rglob("*.py")}
IMPORTS = {module: imports(path, FILES) for module, path in FILES.items()}


def floor_of(module):
    """The number of the floor that the map gives a module, the core's is 0."""
    for number, entries in enumerate(FLOORS):
        if any(module == f"cubin.{e}" or module.startswith(f"cubin.{e}.") for e in entries):
            return number
    return pytest.fail(f"CONTRIBUTING's map has no floor for {module}")


def test_no_circle():
    tuple(TopologicalSorter(IMPORTS).static_order())


def test_imports_point_toward_the_core():
    for module in FILES.keys() - {"cubin"}:
        for other in IMPORTS[module] & FILES.keys():
            assert other != "cubin", f"{module} imports from the package's face"
            assert floor_of(other) <= floor_of(module), f"{module} imports {other}"


@pytest.mark.parametrize(
    ("what", "allowed"),
    [
        ("cubin.core.host", r"cubin\.core\.(primitives|passes|host.*)|.*_loops"),
        ("numba", r"cubin\.core\.host.*|.*_loops"),
        ("cupy", r"cubin\.core\.(libraries|arrays)"),
        ("torch", r"cubin\.torch|cubin\.weights\.torch_files"),
        ("jax", r"cubin\.jax"),
        ("dask", r"cubin\.dask"),
    ],
)
def test_only_few_know(what, allowed):
    for module, found in IMPORTS.items():
        knows = any(name == what or name.startswith(f"{what}.") for name in found)
        assert not knows or re.fullmatch(allowed, module), f"{module} imports {what}"
