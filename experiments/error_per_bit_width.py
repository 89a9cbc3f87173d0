"""What 1 to 8 bits cost: the error of greedy binary codes on pretrained weights, per bit width.

Without arguments it codes the weights of three OCR networks (the package rapidocr) and samples of
the Gaussian, Laplace and uniform distributions. It prints a table and writes
error_per_bit_width.csv, .png, .svg and .json (where the figures come from) to the output folder.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import provenance
import scipy.stats
from command_line import (
    Omissions,
    UsageError,
    array_library,
    exit_status,
    parse_bits,
    pretrained_sample,
    weights_parser,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cubin import theory
from cubin.analysis import ErrorRow, error_per_bit_width
from cubin.weights import Weight, Weights, channel_rows
from cubin.weights.tensor import Axis

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


def parse_channel_axis(text: str) -> int | str:
    if text in {"auto", "none"}:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, none or an integer") from None


def parse_group_size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


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
        type=parse_group_size,
        metavar="N",
        help="scales for every N consecutive weights of an output channel "
        "(default: all weights of the channel)",
    )
    return parser


@dataclass(frozen=True)
class Chosen:
    """Weights and their channel axes, each loaded when its turn comes.

    Iterating yields (name, array, channel axis); an axis of None makes the tensor one channel.
    For groups, an array is laid out as (channels, elements of a channel). Weights with NaN or
    infinity are skipped.
    """

    pairs: list[tuple[Weight, Axis]]
    group_size: int | None
    library: Any
    omissions: Omissions

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[tuple[str, Any, Axis]]:
        weights = (replace(weight, channel_axis=axis) for weight, axis in self.pairs)
        for weight, array in self.omissions.finite(weights):
            axis = weight.channel_axis
            if self.group_size is not None:
                array, axis = channel_rows(array, axis), None
            yield weight.name, self.library.asarray(array), axis


def channel_length(weight: Weight, axis: Axis) -> int:
    """Count the elements of an output channel."""
    axes = () if axis is None else np.atleast_1d(axis).tolist()
    return weight.size // math.prod(weight.shape[axis] for axis in axes)


def channel_axis(weight: Weight, asked: int | str) -> Axis:
    """Choose the channel axis of a weight.

    Raises
    ------
    UsageError
        If the weight has no such axis.
    """
    if isinstance(asked, str):
        return weight.channel_axis if asked == "auto" else None
    if not -len(weight.shape) <= asked < len(weight.shape):
        raise UsageError(
            f"--channel-axis {asked}: {weight.name} of shape {weight.shape} has no such axis; "
            "use auto"
        )
    return asked


def divisible(
    pairs: list[tuple[Weight, Axis]], group_size: int, omissions: Omissions
) -> list[tuple[Weight, Axis]]:
    """Keep the weights whose channels the group size divides; report the others.

    Raises
    ------
    UsageError
        If there are none.
    """
    kept = [pair for pair in pairs if channel_length(*pair) % group_size == 0]
    if not kept:
        lengths = sorted({channel_length(*pair) for pair in pairs})
        listed = ", ".join(map(str, lengths[:8])) + (", ..." if len(lengths) > 8 else "")
        raise UsageError(
            f"--group-size {group_size} divides the channels of no tensor; "
            f"choose a divisor of one of their lengths: {listed}"
        )
    if len(kept) < len(pairs):
        print(
            f"Left out {len(pairs) - len(kept)} of {len(pairs)} weight tensors: "
            f"the group size {group_size} does not divide their channels.",
            file=sys.stderr,
        )
        omissions.left_out += [
            replace(weight, reason=f"channels that groups of {group_size} do not divide")
            for weight, axis in pairs
            if channel_length(weight, axis) % group_size != 0
        ]
    return kept


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


def write_csv(path: Path, rows: Iterable[ErrorRow], skipped: Iterable[Weight]) -> None:
    """Write rows, which ErrorTable.to_csv would sum up over weights and samples alike.

    Weights that were skipped follow, with the reason and without figures.
    """
    columns = [field.name for field in fields(ErrorRow) if field.name != "sums"]
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow([*columns, "skipped"])
        for row in rows:
            values = {name: getattr(row, name) for name in columns}
            writer.writerow([*(values | {"shape": "x".join(map(str, row.shape))}).values(), ""])
        for weight in skipped:
            values = dict.fromkeys(columns, "")
            values |= {"name": weight.name, "shape": "x".join(map(str, weight.shape))}
            writer.writerow([*values.values(), weight.reason])


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write the results; return the exit status."""
    library = array_library(arguments.device)
    weights = Weights(arguments.paths or pretrained_sample())
    omissions = Omissions(weights, arguments.strict)
    pairs = [(weight, channel_axis(weight, arguments.channel_axis)) for weight in weights.tensors]
    size = SAMPLE_SIZE
    if arguments.quick:
        pairs = pairs[:: math.ceil(len(pairs) / QUICK_TENSORS)]
        size = QUICK_SAMPLE_SIZE
    if arguments.group_size is not None:
        pairs = divisible(pairs, arguments.group_size, omissions)
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--output {arguments.output}: {error.strerror}; choose another"
        ) from error

    chosen = Chosen(pairs, arguments.group_size, library, omissions)
    try:
        table = error_per_bit_width(chosen, arguments.bits, group_size=arguments.group_size)
    except ValueError as error:
        raise UsageError(str(error)) from error
    sample_table = error_per_bit_width(samples(size, library), arguments.bits)
    print(table)
    measured = len({row.name for row in table.rows})
    print(f"{measured} of {len(weights) + len(weights.skipped)} weight tensors.")
    print(omissions.text(arguments.verbose) + "\n")
    print(summary(sample_table.rows, size))

    results = arguments.output / NAME
    rows = [*table.rows, *table.overall(), *sample_table.rows]
    write_csv(results.with_suffix(".csv"), rows, omissions.skipped)
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    draw_errors(figure.subplots(), table.rows, sample_table.rows)
    figure.savefig(results.with_suffix(".png"), dpi=160)
    figure.savefig(results.with_suffix(".svg"))
    packages = ("matplotlib", "onnx", "safetensors", "rapidocr")
    origin = provenance.record(vars(arguments), SEED, packages)
    origin |= {"library": library.__name__, "tensors": measured, "left_out": len(weights.left_out)}
    origin["omissions"] = omissions.record()
    text = json.dumps(origin, indent=2) + "\n"
    results.with_suffix(".json").write_text(text, encoding="utf-8")
    print(f"\nWritten: {results}.csv, .png, .svg and .json")
    return omissions.exit_status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status: 1 if weights were skipped, 2 for an error."""
    return exit_status(NAME, run, argument_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
