"""Figures of errors. Each function draws on the axes it is given and returns them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from cubin.analysis.table import ErrorTable

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")


def new_figure(width: float = 7.0, height: float = 4.8) -> tuple[Any, Any]:
    """A figure with one pair of axes, not held by pyplot: a notebook shows it once."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    plt.close(figure)
    return figure, axes


def draw_error_per_bit_width(axes: Any, table: ErrorTable) -> Any:
    """Draw the median relative MSE over the arrays, and their quartiles, against the bit width.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
    table : ErrorTable

    Returns
    -------
    matplotlib.axes.Axes
    """
    solvers = list(dict.fromkeys(row.solver for row in table.rows))
    widths = sorted({row.bits for row in table.rows})
    for number, solver in enumerate(solvers):
        bits, low, middle, high = _quartiles(table, solver)
        color = COLORS[number % len(COLORS)]
        # Its edge is what is left of the band at a single bit width, as the limits' points are.
        axes.fill_between(bits, low, high, color=color, alpha=0.2, linewidth=1)
        axes.plot(bits, middle, color=color, marker=MARKERS[number % len(MARKERS)],
                  label=f"{solver}: median and quartiles of {_count(table, solver)}")  # fmt: skip
    draw_limits(axes, [width for width in widths if width > 0])
    axes.set_yscale("log")
    axes.set_xticks(widths)
    axes.set_xlabel("bits per element (payload)")
    axes.set_ylabel("relative mean squared error")
    axes.grid(True, which="major", alpha=0.3)
    # Below the axes, where it hides no curve.
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False, fontsize="small"
    )
    return axes


def draw_limits(axes: Any, bits: Sequence[int]) -> Any:
    """Draw the limits for Gaussian samples: Lloyd-Max with 2^bits levels, and Shannon's bound.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
    bits : sequence of int
        From 1.

    Returns
    -------
    matplotlib.axes.Axes
    """
    from scipy.stats import norm

    from cubin import theory

    lloyd = [theory.lloyd_max(norm(), width).relative_mse for width in bits]
    shannon = [theory.shannon(norm(), width) for width in bits]
    axes.plot(bits, lloyd, color="0.35", ls="--", marker=".", label="Lloyd-Max, Gaussian")
    axes.plot(bits, shannon, color="0.35", ls=":", marker="x", label="Shannon bound, Gaussian")
    return axes


def _count(table: ErrorTable, solver: str) -> str:
    names = len({row.name for row in table.rows if row.solver == solver})
    return f"{names} array{'s' if names != 1 else ''}"


def _quartiles(table: ErrorTable, solver: str) -> tuple[np.ndarray, ...]:
    rows = [row for row in table.rows if row.solver == solver]
    bits = sorted({row.bits for row in rows})
    errors = [[row.relative_mse for row in rows if row.bits == width] for width in bits]
    low, middle, high = np.array([np.quantile(some, (0.25, 0.5, 0.75)) for some in errors]).T
    # An exact approximation has no place on a logarithmic axis: the band goes on to its end.
    return np.array(bits), low, np.where(middle > 0, middle, np.nan), high
