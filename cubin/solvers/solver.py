"""Solver: the settings of each solver, by name."""

from __future__ import annotations

from typing import Any, NamedTuple

from cubin.core import arrays
from cubin.core.bits import MAX_BITS


class Solver(NamedTuple):
    """How the scales and signs of a row are found.

    Attributes
    ----------
    name : str
    most_bits : int
        The most levels that the solver takes.
    refit : bool
        Whether all scales so far are refitted by least squares after each level is added.
    iterations : int or None
        How often codes and scales are renewed in turn after the greedy levels. None goes on until
        the error stops falling.
    """

    name: str
    most_bits: int
    refit: bool = False
    iterations: int | None = 0

    @property
    def limit(self) -> dict[str, Any]:
        """The arguments of `as_bits` that say how many levels there may be, and why."""
        of = f" with solver={self.name!r}" if self.most_bits < MAX_BITS else ""
        return {"limit": self.most_bits, "of": of}


SOLVERS = {
    solver.name: solver
    for solver in (
        Solver("greedy", MAX_BITS),
        Solver("refined", MAX_BITS, refit=True),
        Solver("alternating", 8, iterations=2),
        Solver("optimal", 8, iterations=None),
    )
}
"""The solvers by name."""


def solver_of(name: str, iterations: int | None) -> Solver:
    """The solver of this name. `iterations` has an effect on ``alternating`` alone.

    Raises
    ------
    TypeError
        If `iterations` is no integer.
    ValueError
        If there is no such solver, or `iterations` is negative.
    """
    if name not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {name!r}")
    if iterations is not None and arrays.as_integer("iterations", iterations) < 0:
        raise ValueError(f"iterations must be None or at least 0, got {iterations}")
    solver = SOLVERS[name]
    return solver._replace(iterations=iterations) if name == "alternating" else solver
