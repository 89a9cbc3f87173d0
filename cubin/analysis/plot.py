"""Figures of errors. Each function draws on the axes it is given and returns them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cubin.core.bits import MAX_BITS

# Okabe and Ito's palette, which colour-blind readers can tell apart. The numbers of colours and
# markers have no common divisor: 42 curves differ in one of the two.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_LLOYD_MAX = "Lloyd-Max, Gaussian"
_SHANNON = "Shannon bound, Gaussian"
_KIND = ": median and quartiles of "


def new_figure(width: float = 7.0, height: float = 4.8) -> tuple[Any, Any]:
    """A pyplot figure with one pair of axes."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")


def draw_in_new_figure(table: Any) -> Any:
    """Draw as `draw_error_per_bit_width` does, in a figure of its own with the legend below.

    Parameters
    ----------
    table : ErrorTable

    Returns
    -------
    matplotlib.axes.Axes
    """
    figure, axes = new_figure()
    _draw(axes, table)
    legend = _legend(axes, figure.bbox.width, math.inf, loc="upper center",
                     bbox_to_anchor=(0.5, -0.14))  # fmt: skip
    # A long legend makes the figure higher, not the axes lower.
    above = legend.get_window_extent().height / figure.dpi - 1
    if above > 0:
        figure.set_figheight(figure.get_figheight() + above)
        legend.set_bbox_to_anchor((0.5, -0.14 * 4.8 / figure.get_figheight()), axes.transAxes)
    return axes


def draw_error_per_bit_width(axes: Any, table: Any) -> Any:
    """Draw the median relative MSE over the arrays, and their quartiles, against the bit width.

    The bits are those of the payload. Thin curves have the medians over effective bits.

    The legend is within the axes, beside the curves or above them.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
    table : ErrorTable

    Returns
    -------
    matplotlib.axes.Axes
    """
    _draw(axes, table)
    box = axes.get_window_extent()
    for corner in ("lower left", "upper right"):
        legend = _legend(axes, box.width, 0.6 * box.height, loc=corner)
        if not _hides_a_curve(legend, axes):
            return axes
    _make_room_above(axes, legend)
    return axes


def _draw(axes: Any, table: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    # Curves that are there already, such as those of another table, keep their colours.
    first = sum(_KIND in str(line.get_label()) for line in axes.lines)
    widths: set[float] = set()
    for number, (label, rows) in enumerate(_curves(table).items(), start=first):
        bits, effective, low, middle, high = _quartiles(rows)
        color = COLORS[number % len(COLORS)]
        # Its edge is what is left of the band at a single bit width, as the limits' points are.
        axes.fill_between(bits, low, high, color=color, alpha=0.2, linewidth=1)
        axes.plot(bits, middle, color=color, marker=MARKERS[number % len(MARKERS)],
                  label=f"{label}{_KIND}{_count(rows)}")  # fmt: skip
        if np.isfinite(effective).any():  # without an entry in the legend, as of "_"
            axes.plot(effective, middle, color=color, lw=0.8, ls="-.", marker=".", ms=4,
                      label=f"_{label} over effective bits")  # fmt: skip
        widths.update(bits.tolist())
    draw_limits(axes, sorted(width for width in widths if width > 0))
    axes.set_yscale("log")
    drawn = np.concatenate([line.get_xdata() for line in axes.lines])
    whole = bool((drawn == np.rint(drawn)).all())
    steps = [1, 2, 5, 10]
    axes.xaxis.set_major_locator(MaxNLocator(integer=whole, steps=steps, min_n_ticks=1))
    axes.set_xlabel("bits per element: payload (thick), effective (thin)")
    axes.set_ylabel("relative mean squared error")
    axes.grid(True, which="major", alpha=0.3)


def draw_limits(axes: Any, bits: Sequence[float]) -> Any:
    """Draw the limits for Gaussian samples: Lloyd-Max with 2^bits levels, and Shannon's bound.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
        Limits that are there already are drawn anew, for their bits, too.
    bits : sequence of float
        Above 0. Lloyd-Max is drawn at the whole ones up to 16.

    Returns
    -------
    matplotlib.axes.Axes
    """
    from scipy.stats import norm

    from cubin import theory

    drawn = [line for line in axes.lines if line.get_label() in (_LLOYD_MAX, _SHANNON)]
    every = np.unique([*bits, *(width for line in drawn for width in line.get_xdata())])
    for line in drawn:
        line.remove()
    whole = [int(width) for width in every if width == int(width) and width <= MAX_BITS]
    lloyd = [theory.lloyd_max(norm(), width).relative_mse for width in whole]
    axes.plot(whole, lloyd, color="0.35", ls="--", marker=".", label=_LLOYD_MAX)
    axes.plot(every, 4.0**-every, color="0.35", ls=":", marker="x", label=_SHANNON)
    return axes


def _legend(axes: Any, width: float, height: float, **place: Any) -> Any:
    """A legend of at most this size in pixels, if its smallest print is small enough.

    Its title is the ending that the labels of all curves share.
    """
    handles, labels = axes.get_legend_handles_labels()
    names, counts = [], []
    for label in labels:
        name, separator, count = label.rpartition(_KIND)
        names.append((name, count) if separator else (label, ""))
        counts += [count] if separator else []
    kind, same = _KIND.strip(": "), len(set(counts)) == 1
    title = f"{kind} {counts[0]}" if same else kind.removesuffix(" of") if counts else None
    texts = [f"{name} ({count})" if count and not same else name for name, count in names]
    for size, columns in itertools.product(("small", "x-small", "xx-small"), (3, 2, 1)):
        legend = axes.legend(handles, texts, title=title, ncols=columns, frameon=False,
                             fontsize=size, title_fontsize=size, **place)  # fmt: skip
        box = legend.get_window_extent()
        if box.width <= 0.96 * width and box.height <= height:
            break
    return legend


def _hides_a_curve(legend: Any, axes: Any) -> bool:
    box = legend.get_window_extent().padded(4)
    paths = [line.get_transform().transform_path(line.get_path()) for line in axes.lines]
    for band in axes.collections:
        paths += [band.get_transform().transform_path(path) for path in band.get_paths()]
    return any(path.intersects_bbox(box) for path in paths)


def _make_room_above(axes: Any, legend: Any) -> None:
    """Raise the upper limit so that the legend's share of the axes' height is free of curves."""
    share = legend.get_window_extent().height / axes.get_window_extent().height
    share = min(share + 0.05, 0.75)
    values = np.concatenate([line.get_ydata() for line in axes.lines])
    values = values[np.isfinite(values) & (values > 0)]
    low, high = values.min(), values.max()
    top = high * max(high / low, 10) ** (share / (1 - share))
    axes.update_datalim([(0, top)], updatex=False)
    axes.autoscale_view()


def _curves(table: Any) -> dict[str, list[Any]]:
    """The rows of every curve, by solver, granularity if there are several, and map."""
    several = len({row.granularity for row in table.rows} - {""}) > 1
    curves: dict[str, list[Any]] = {}
    for row in table.rows:
        parts = [row.solver]
        if several and row.granularity:
            parts.append(f"per {row.granularity}")
        if isinstance(row.bits, str):
            parts.append(row.bits)
        curves.setdefault(", ".join(parts), []).append(row)
    return curves


def _by_bits(rows: Sequence[Any]) -> list[list[Any]]:
    points: dict[Any, list[Any]] = {}
    for row in rows:
        points.setdefault(row.bits, []).append(row)
    return list(points.values())


def _count(rows: Sequence[Any]) -> str:
    number = max(map(len, _by_bits(rows)))
    return f"{number} array{'s' if number != 1 else ''}"


def _quartiles(rows: Sequence[Any]) -> tuple[np.ndarray, ...]:
    """Payload and effective bits per element, and the quartiles of the error: (points,) each."""
    points = []
    for group in _by_bits(rows):
        payload = np.mean([row.payload_bits for row in group])
        sizes = [row.size or 1 for row in group]  # as in the overall rows
        effective = np.average([row.effective_bits for row in group], weights=sizes)
        errors = [row.relative_mse for row in group]
        points.append((payload, effective, *np.quantile(errors, (0.25, 0.5, 0.75))))
    points.sort()
    bits, effective, low, middle, high = np.array(points).T
    # An exact approximation has no place on a logarithmic axis: the band goes on to its end.
    return bits, effective, low, np.where(middle > 0, middle, np.nan), high
