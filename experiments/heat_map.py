"""The heat map of the benchmark's grid: cliffs at a glance."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import grid
import numpy as np
from grid import Row, Step
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

FACTORS = ("size", "row length", "layout", "dtype", "bits", "map", "importance", "memory")
SPAN = 16.0
"""The ratio at which a colour is strongest, either way."""


def levels(steps: Sequence[Step]) -> list[tuple[str, str]]:
    """The factors and their levels, in the order of the grid."""
    found = dict.fromkeys((step.factor, step.level) for step in steps)
    order = [*grid.SIZES, *(f"{length:,}" for length in grid.ROW_LENGTHS)]
    ranks = {level: rank for rank, level in enumerate(order)}
    return sorted(found, key=lambda pair: (FACTORS.index(pair[0]), ranks.get(pair[1], 0)))


def draw_cliffs(ax: Axes, rows: Sequence[Row]) -> AxesImage:
    """Draw the time per element of each neighbour relative to its base point.

    Parameters
    ----------
    ax : Axes
    rows : sequence of mapping
        The rows of the benchmark's CSV.

    Returns
    -------
    AxesImage
        For a colour bar.
    """
    steps = grid.steps(rows)
    ratios = {
        (step.factor, step.level, step.base, step.row["operation"]): step.ratio for step in steps
    }
    lines = levels(steps)
    columns = list(dict.fromkeys((step.base, step.row["operation"]) for step in steps))
    values = [[ratios.get((*line, *column), np.nan) for column in columns] for line in lines]
    image = draw_ratios(
        ax, values, [f"{factor}: {level}" for factor, level in lines],
        [operation for _, operation in columns],
    )  # fmt: skip
    for number, (before, after) in enumerate(itertools.pairwise(lines)):
        if before[0] != after[0]:
            ax.axhline(number + 0.5, color="black", lw=1)
    of_base(ax, [base for base, _ in columns])
    ax.set_title("Time per element, times that of the same operation at the base point", pad=34)
    return image


def draw_peers(ax: Axes, rows: Sequence[Row]) -> AxesImage:
    """Draw the time at the base points relative to a copy of as many bytes and to each peer.

    Parameters and the result are those of `draw_cliffs`.
    """
    known = {
        (row["base"], row["operation"]): row
        for row in rows
        if row["factor"] == "base" and row["seconds"]
    }
    others = {"copy": "a copy", "expression": "array expression", "torch": "PyTorch eager",
              "torch_compile": "torch.compile", "triton": "Triton"}  # fmt: skip
    others = {c: name for c, name in others.items() if any(row[c] for row in known.values())}
    bases = [base for base in grid.BASES if any(place[0] == base for place in known)]
    operations = [name for name in grid.OPERATIONS if any(place[1] == name for place in known)]

    def ratio(base: str, operation: str, column: str) -> float:
        row = known.get((base, operation))
        return float(row["seconds"]) / float(row[column]) if row and row[column] else np.nan

    values = [
        [ratio(base, operation, column) for base in bases for column in others]
        for operation in operations
    ]
    image = draw_ratios(ax, values, operations, list(others.values()) * len(bases))
    of_base(ax, [base for base in bases for _ in others])
    ax.set_title("Time at the base points, times that of a copy and of each peer", pad=34)
    return image


def of_base(ax: Axes, bases: Sequence[str]) -> None:
    """Name the base point above its columns, and part them."""
    for base in dict.fromkeys(bases):
        first, count = bases.index(base), bases.count(base)
        ax.text(first + (count - 1) / 2, -0.75, base, ha="center", va="bottom", weight="bold")
        if first:
            ax.axvline(first - 0.5, color="black", lw=1.5)


def draw_ratios(
    ax: Axes, values: Sequence[Sequence[float]], lines: Sequence[str], columns: Sequence[str]
) -> AxesImage:
    """Draw ratios in colours and numbers: blue where less time is taken, red where more."""
    array = np.array(values, dtype=float).reshape(len(lines), len(columns))
    array = array if array.size else np.full((1, 1), np.nan)
    ax.set_facecolor("0.85")
    image = ax.imshow(array, norm=LogNorm(1 / SPAN, SPAN), cmap="RdBu_r", aspect="auto")
    ax.set_yticks(range(len(lines)), lines)
    ax.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
    ax.tick_params(length=0)
    for (line, column), ratio in np.ndenumerate(array):
        if not np.isnan(ratio):
            strong = ratio > SPAN / 2.5 or ratio < 2.5 / SPAN
            ax.text(
                column, line, grid.digits(ratio, 2), ha="center", va="center", fontsize=7,
                color="white" if strong else "black",
            )  # fmt: skip
    return image


def figure(rows: Sequence[Row]) -> Figure:
    """The heat map: neighbours against base points, and base points against peers."""
    count = max(len(levels(grid.steps(rows))), 1)
    operations = len({row["operation"] for row in rows if row["factor"] == "base"})
    heights = [count, max(operations, 1)]
    drawn = Figure(figsize=(13, 4 + 0.24 * sum(heights)), layout="constrained")
    upper, lower = drawn.subplots(2, height_ratios=heights)
    draw_cliffs(upper, rows)
    image = draw_peers(lower, rows)
    bar = drawn.colorbar(image, ax=[upper, lower], aspect=60, pad=0.01)
    bar.set_label("ratio (log scale): red takes longer, grey was not timed")
    bar.set_ticks([1 / 16, 1 / 4, 1, 4, 16], labels=["1/16", "1/4", "1", "4", "16"])
    bar.minorticks_off()
    return drawn
