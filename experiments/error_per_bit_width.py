"""What 1 to 8 bits cost: the error of greedy binary codes on pretrained weights, per bit width.

Without arguments it codes the weights of three OCR networks (the package rapidocr) and samples of
the Gaussian, Laplace and uniform distributions. It prints a table and writes
error_per_bit_width.csv (what `python -m cubin error` writes), the same of the samples, a figure
(.png, .svg) and .json (where the figures come from) to the output folder.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import provenance
import scipy.stats
from command_line import exit_status, pretrained_sample, weights_parser
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cubin import theory
from cubin.analysis import ErrorRow, error_per_bit_width
from cubin.commands.arguments import (
    array_library,
    make_folder,
    parse_bits,
    parse_channel_axis,
    parse_count,
)
from cubin.commands.error import choose, measure, sweep_for, write_csv
from cubin.commands.omissions import Omissions
from cubin.weights import Weights

NAME = "error_per_bit_width"
SEED = 0
SAMPLE_SIZE = 1_000_000
QUICK_SAMPLE_SIZE = 100_000
QUICK_TENSORS = 40

Sampler = Callable[[np.random.Generator, int], np.ndarray]
DISTRIBUTIONS: dict[str, Sampler] = {
    "Gaussian": lambda rng, size: rng.standard_normal(size),
    "Laplace": lambda rng, size: rng.laplace(size=size),
    "uniform": lambda rng, size: rng.uniform(-1, 1, size),
}

# Okabe and Ito's palette, told apart by colour-blind readers; markers and dashes double it.
WEIGHTS_COLOR = "#0072B2"
SAMPLE_STYLES = {
    "Gaussian": {"color": "#E69F00", "marker": "s"},
    "Laplace": {"color": "#CC79A7", "marker": "^"},
    "uniform": {"color": "#009E73", "marker": "D"},
}


def argument_parser() -> argparse.ArgumentParser:
    quick = f"at most {QUICK_TENSORS} tensors, evenly over the files, and smaller samples"
    parser = weights_parser(NAME, __doc__, quick)
    parser.add_argument(
        "--bits", type=parse_bits, default="1-8", help="bit widths: 1-8, 1,2,4 (default: 1-8)"
    )
    parser.add_argument(
        "--channel-axis",
        type=parse_channel_axis,
        default="auto",
        metavar="AXIS",
        help="the axis whose every index has scales of its own: auto (the output channels of the "
        "operator that uses the tensor; 0 for files without a graph), an integer, or none "
        "(one scale per tensor and level) (default: auto)",
    )
    parser.add_argument(
        "--group-size",
        type=parse_count,
        metavar="N",
        help="scales for every N consecutive weights of an output channel, and for those left over "
        "(default: all weights of the channel)",
    )
    return parser


def samples(size: int, xp: Any) -> Iterator[tuple[str, Any, None]]:
    """Yield float32 samples of the distributions, the same in every run."""
    rng = np.random.default_rng(SEED)
    for name, draw in DISTRIBUTIONS.items():
        yield name, xp.asarray(draw(rng, size).astype(np.float32)), None


def spread(rows: Iterable[ErrorRow], bits: Sequence[int]) -> np.ndarray:
    """Take the 10th, 50th and 90th percentile over tensors of the relative MSE.

    Returns
    -------
    ndarray, shape (3, len(bits))
        One row per percentile.
    """
    errors: dict[int, list[float]] = {width: [] for width in bits}
    for row in rows:
        errors[row.bits].append(row.relative_mse)
    return np.array([np.percentile(errors[width], [10, 50, 90]) for width in bits]).T


def draw_errors(
    ax: Axes,
    weight_rows: Sequence[ErrorRow],
    sample_rows: Sequence[ErrorRow],
) -> Axes:
    """Draw the relative MSE over the bit width: weights, distributions and limits.

    Parameters
    ----------
    ax : Axes
        Where to draw. A second axis on its right shows the same as SQNR in dB.
    weight_rows, sample_rows : sequence of ErrorRow
        The errors of the weight tensors, and of samples named by their distribution.

    Returns
    -------
    Axes
        The Axes given.
    """
    bits = sorted({row.bits for row in weight_rows})
    low, median, high = spread(weight_rows, bits)
    count = len({row.name for row in weight_rows})
    gaussian = scipy.stats.norm()
    between = range(bits[0], bits[-1] + 1)
    lloyd_max = [theory.lloyd_max(gaussian, width).relative_mse for width in between]
    shannon = [theory.shannon(gaussian, width) for width in between]

    # The band's edge and the limits' markers are what is left of them at a single bit width.
    weights = {"color": WEIGHTS_COLOR}
    label = "weights, 10th to 90th percentile"
    ax.fill_between(bits, low, high, alpha=0.25, lw=1, label=label, **weights)
    label = f"weights, median over tensors (n = {count})"
    ax.plot(bits, median, marker="o", lw=2.5, label=label, **weights)
    for name, style in SAMPLE_STYLES.items():
        errors = {row.bits: row.relative_mse for row in sample_rows if row.name == name}
        ax.plot(bits, [errors[width] for width in bits], label=f"{name} sample", ms=5, **style)
    label = "limit of k-bit codes: Lloyd-Max, Gaussian"
    ax.plot(between, lloyd_max, color="black", ls="--", marker=".", label=label)
    # Broad and behind: the error of the uniform sample lies on it, both are 4 to the minus bits.
    label = "limit of any code: Shannon, Gaussian"
    ax.plot(between, shannon, color="0.75", lw=6, marker="o", ms=7, zorder=1, label=label)

    ax.set_yscale("log")
    ax.set_ylim(min(shannon) / 2, 1)
    ax.set_xticks(bits)
    ax.set_xlabel("payload (bits per weight)")
    ax.set_ylabel("relative mean squared error")
    ax.set_title("Greedy binary codes: error per bit width")
    ax.grid(alpha=0.3)
    # Below the axes, where it hides no curve whatever the bit widths.
    ax.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False, fontsize="small"
    )

    decibels = ax.twinx()
    decibels.set_ylim(-10 * np.log10(ax.get_ylim()))
    decibels.set_ylabel("SQNR (dB)")
    return ax


def summary(sample_rows: Sequence[ErrorRow], size: int) -> str:
    """Tabulate the relative MSE of the samples by distribution."""
    lines = [f"Relative MSE of {size:,} samples, one scale per level:"]
    lines.append("bits" + "".join(f"{name:>12}" for name in DISTRIBUTIONS))
    for width in sorted({row.bits for row in sample_rows}):
        errors = {row.name: row.relative_mse for row in sample_rows if row.bits == width}
        lines.append(f"{width:4}" + "".join(f"{errors[name]:12.3e}" for name in DISTRIBUTIONS))
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write the results; return the exit status."""
    library = array_library(arguments.device)
    weights = Weights(arguments.paths or pretrained_sample())
    omissions = Omissions(weights, arguments.strict)
    tensors, size = weights.tensors, SAMPLE_SIZE
    if arguments.quick:
        tensors = tensors[:: math.ceil(len(tensors) / QUICK_TENSORS)]
        size = QUICK_SAMPLE_SIZE
    axis, group_size = arguments.channel_axis, arguments.group_size
    chosen = choose(tensors, axis, group_size, library.__name__)
    sweep = sweep_for(arguments.bits, "greedy", group_size, 2)
    make_folder(arguments.output)

    table = measure(chosen, sweep, omissions)
    drawn = error_per_bit_width(samples(size, library), arguments.bits)
    print(table.summary())
    measured = len({row.name for row in table.rows})
    print(f"{measured} of {len(weights) + len(weights.skipped)} weight tensors.")
    print(omissions.text(arguments.verbose) + "\n")
    print(summary(drawn.rows, size))

    results = arguments.output / NAME
    write_csv(results.with_suffix(".csv"), table, omissions.skipped)
    drawn.to_csv(arguments.output / f"{NAME}_samples.csv")
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    draw_errors(figure.subplots(), table.rows, drawn.rows)
    figure.savefig(results.with_suffix(".png"), dpi=160)
    figure.savefig(results.with_suffix(".svg"))
    packages = ("matplotlib", "onnx", "rapidocr")
    origin = provenance.record(vars(arguments), SEED, packages)
    origin |= {"library": library.__name__, "tensors": measured, "left_out": len(weights.left_out)}
    origin["omissions"] = omissions.record()
    text = json.dumps(origin, indent=2) + "\n"
    results.with_suffix(".json").write_text(text, encoding="utf-8")
    print(f"\nWritten: {results}.csv, _samples.csv, .png, .svg and .json")
    return omissions.exit_status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status: 1 if weights were skipped, 2 for an error."""
    return exit_status(NAME, run, argument_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
