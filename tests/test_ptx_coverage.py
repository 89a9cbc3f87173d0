"""Every line of our CUDA text that became code was executed by some test."""

from __future__ import annotations

import pytest

pytest.importorskip("cupy")

from tests.ptx import coverage
from tests.ptx.device import module as xp
from tests.ptx.mutate import EQUIVALENT, mutants, units
from tests.ptx.plugin import ARCH

pytestmark = pytest.mark.kernels


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


def test_every_cuda_line_is_executed(whole_run):
    """100 % of the lines, on the architecture of this run."""
    missed = {name: coverage.of_text(text, ARCH).missed for name, text in units().items()}
    assert {name: lines for name, lines in missed.items() if lines} == {}


def test_only_mutants_are_explained():
    assert EQUIVALENT.keys() <= {mutant.edited for mutant in mutants()}
