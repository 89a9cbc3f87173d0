"""What the solvers of binary codes achieve per bit, beside theory, and the time that they take.

It codes samples of the Gaussian and Laplace distributions with one scale per level, and weights
with scales per output channel: without arguments those of three OCR networks (the package
rapidocr). It prints a table and
what follows from it, and writes solver_comparison.csv, .png and .json (where the figures come from,
and the findings) to the output folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import provenance
import scipy.stats
from command_line import exit_status, pretrained_sample, weights_parser, write_results
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

import cubin
from cubin import theory
from cubin.commands.arguments import array_library
from cubin.commands.omissions import Omissions
from cubin.weights import Weight, Weights
from cubin.weights.tensor import Axis

NAME = "solver_comparison"
SEED = 0
BITS = range(1, 6)
SAMPLE_SIZE = 1_000_000
QUICK_SAMPLE_SIZE = 100_000
QUICK_TENSORS = 20
TIMED_SHAPE = (1024, 4096)
QUICK_TIMED_SHAPE = (64, 4096)
REPETITIONS = 3
WEIGHTS = "pretrained weights"
TIMED = "time"

DISTRIBUTIONS = {"Gaussian": scipy.stats.norm(), "Laplace": scipy.stats.laplace()}


@dataclass(frozen=True)
class Solver:
    """A solver with its options, the error that theory expects of it, and how it is drawn."""

    options: Mapping[str, Any]
    expected: Callable[[Any, int], theory.ExpectedScales]
    color: str
    marker: str


# Okabe and Ito's palette, told apart by colour-blind readers; the markers double it.
SOLVERS = {
    "greedy": Solver({"solver": "greedy"}, theory.greedy, "#D55E00", "o"),
    "refined": Solver({"solver": "refined"}, theory.refined, "#E69F00", "s"),
    "alternating, 2 iterations": Solver(
        {"solver": "alternating", "iterations": 2},
        partial(theory.alternating, iterations=2),
        "#009E73",
        "^",
    ),
    "alternating, converged": Solver(
        {"solver": "alternating", "iterations": None},
        partial(theory.alternating, iterations=None),
        "#56B4E9",
        "D",
    ),
    "optimal": Solver({"solver": "optimal"}, theory.optimal, "#0072B2", "v"),
}


@dataclass(frozen=True)
class Result:
    """What a solver did with some data at a bit width.

    Attributes
    ----------
    data, solver : str
    bits : int
    tensors : int
        Number of arrays.
    relative_mse : float
        The median over the arrays, as are the quartiles.
    lower_quartile, upper_quartile : float
    expected : float or None
        The relative MSE that theory gives for the distribution.
    seconds : float or None
        The least time of some repetitions, for the data named "time" alone.
    """

    data: str
    solver: str
    bits: int
    tensors: int
    relative_mse: float
    lower_quartile: float
    upper_quartile: float
    expected: float | None = None
    seconds: float | None = None


COLUMNS = [field.name for field in dataclasses.fields(Result)]


# ---------------------------------------------------------------- measurements


def relative_mse(array: Any, solver: str, bits: int, axis: Axis) -> float:
    """The relative MSE of a solver's approximation; 0 for an array of zeros."""
    approx = cubin.multibit(array, bits, channel_axis=axis, **SOLVERS[solver].options)
    return float(cubin.errors.relative_mse(array, approx))


def of_samples(size: int, xp: Any) -> Iterator[Result]:
    """Code one float32 sample of each distribution, the same in every run."""
    rng = np.random.default_rng(SEED)
    for data, law in DISTRIBUTIONS.items():
        x = xp.asarray(law.rvs(size, random_state=rng).astype(np.float32))
        for (name, solver), bits in itertools.product(SOLVERS.items(), BITS):
            error = relative_mse(x, name, bits, None)
            expected = solver.expected(law, bits).relative_mse
            yield Result(data, name, bits, 1, error, error, error, expected)


def of_weights(
    weights: Sequence[Weight], omissions: Omissions, xp: Any
) -> dict[tuple[str, int], np.ndarray]:
    """The relative MSE of every finite tensor, in the order given, by solver and bit width."""
    errors: dict[tuple[str, int], list[float]] = {
        key: [] for key in itertools.product(SOLVERS, BITS)
    }
    total = sum(weight.size for weight in weights)
    with tqdm(total=total, unit="weights", unit_scale=True, disable=None) as progress:
        for weight, loaded in omissions.finite(weights):
            array = xp.asarray(loaded)
            for (name, bits), found in errors.items():
                found.append(relative_mse(array, name, bits, weight.channel_axis))
            progress.update(weight.size)
    return {key: np.array(found) for key, found in errors.items()}


def summarized(errors: Mapping[tuple[str, int], np.ndarray]) -> Iterator[Result]:
    """The quartiles over tensors."""
    for (name, bits), found in errors.items():
        low, middle, high = (float(q) for q in np.quantile(found, (0.25, 0.5, 0.75)))
        yield Result(WEIGHTS, name, bits, len(found), middle, low, high)


def of_time(shape: tuple[int, int], xp: Any) -> Iterator[Result]:
    """Time each solver on a Gaussian sample with scales per row."""
    x = xp.asarray(np.random.default_rng(SEED).standard_normal(shape, np.float32))
    for name, bits in itertools.product(SOLVERS, BITS):
        error = relative_mse(x, name, bits, 0)  # A first run compiles what there is to compile.
        seconds = math.inf
        for _ in range(REPETITIONS):
            begun = time.perf_counter()
            cubin.multibit(x, bits, channel_axis=0, **SOLVERS[name].options)
            if xp is not np:
                xp.cuda.get_current_stream().synchronize()
            seconds = min(seconds, time.perf_counter() - begun)
        yield Result(TIMED, name, bits, 1, error, error, error, seconds=seconds)


# ---------------------------------------------------------------- findings


def findings(results: Sequence[Result], errors: Mapping[tuple[str, int], np.ndarray]) -> list[str]:
    """What the results say, in words."""
    said = []
    last = max(BITS)
    for data in (*DISTRIBUTIONS, WEIGHTS):
        found = {r.solver: r.relative_mse for r in results if r.data == data and r.bits == last}
        shares = ", ".join(
            f"{name} {found[name] / found['greedy']:.3f}" for name in found if name != "greedy"
        )
        said.append(f"{data}, {last} bits, error as a share of the greedy one: {shares}.")
    # Below this, errors are those of rounding the float32 scales.
    resolution = float(np.finfo(np.float32).eps) ** 2
    for better, worse in itertools.pairwise(reversed(SOLVERS)):
        crossed = {
            bits: int((errors[better, bits] > errors[worse, bits] * (1 + 1e-6) + resolution).sum())
            for bits in BITS
        }
        tensors = len(errors[better, last])
        counts = ", ".join(f"{n} at {bits} bits" for bits, n in crossed.items() if n)
        said.append(f"{better} above {worse}: {counts or 'none'} of {tensors} tensors.")
    return said


def table(results: Iterable[Result]) -> str:
    """The results as aligned text."""
    lines = [
        f"{'data':<20}{'solver':<28}{'bits':>4}  {'rel. MSE':>9}  {'quartiles':>21}  "
        f"{'expected':>9}  {'time [s]':>8}"
    ]
    for r in results:
        quartiles = f"{r.lower_quartile:.5f} .. {r.upper_quartile:.5f}" if r.tensors > 1 else ""
        expected = "" if r.expected is None else f"{r.expected:.5f}"
        seconds = "" if r.seconds is None else f"{r.seconds:.4f}"
        lines.append(
            f"{r.data:<20}{r.solver:<28}{r.bits:>4}  {r.relative_mse:>9.5f}  {quartiles:>21}  "
            f"{expected:>9}  {seconds:>8}".rstrip()
        )
    return "\n".join(lines)


# ---------------------------------------------------------------- figure


def draw_sample(ax: Axes, results: Sequence[Result], data: str) -> Axes:
    """Draw the errors of a sample as markers on the lines of theory, and the limits of codes.

    Parameters
    ----------
    ax : Axes
    results : sequence of Result
    data : str
        The name of the distribution.

    Returns
    -------
    Axes
        The Axes given.
    """
    for name, solver in SOLVERS.items():
        own = [r for r in results if (r.data, r.solver) == (data, name)]
        bits = [r.bits for r in own]
        ax.plot(bits, [r.expected for r in own], color=solver.color, lw=1.2)
        ax.plot(
            bits,
            [r.relative_mse for r in own],
            color=solver.color,
            marker=solver.marker,
            ls="",
            ms=5,
            label=name,
        )
    limits = [theory.lloyd_max(DISTRIBUTIONS[data], bits).relative_mse for bits in BITS]
    ax.plot(BITS, limits, color="black", ls="--", lw=1, label="Lloyd-Max, 2^bits free levels")
    return with_error_axes(ax, f"{data} sample (lines: theory)")


def draw_weights(ax: Axes, results: Sequence[Result]) -> Axes:
    """Draw the medians over weight tensors, with bars between the quartiles.

    Parameters
    ----------
    ax : Axes
    results : sequence of Result

    Returns
    -------
    Axes
        The Axes given.
    """
    for number, (name, solver) in enumerate(SOLVERS.items()):
        own = [r for r in results if (r.data, r.solver) == (WEIGHTS, name)]
        # Side by side, so that no bar hides another.
        bits = [r.bits + (number - (len(SOLVERS) - 1) / 2) * 0.1 for r in own]
        middle = np.array([r.relative_mse for r in own])
        low = middle - [r.lower_quartile for r in own]
        high = [r.upper_quartile for r in own] - middle
        ax.errorbar(
            bits,
            middle,
            (low, high),
            color=solver.color,
            marker=solver.marker,
            ls="",
            ms=5,
            lw=1.2,
        )
    tensors = next(r.tensors for r in results if r.data == WEIGHTS)
    return with_error_axes(ax, f"{tensors} weight tensors (median, quartiles)")


def with_error_axes(ax: Axes, title: str) -> Axes:
    ax.set_yscale("log")
    ax.set_xticks(BITS)
    ax.set_xlabel("payload (bits per element)")
    ax.set_ylabel("relative mean squared error")
    ax.set_title(title, fontsize="medium")
    ax.grid(alpha=0.3)
    return ax


def draw_times(ax: Axes, results: Sequence[Result]) -> Axes:
    """Draw the time of every solver relative to the greedy one.

    Parameters
    ----------
    ax : Axes
    results : sequence of Result

    Returns
    -------
    Axes
        The Axes given.
    """
    seconds = {(r.solver, r.bits): r.seconds for r in results if r.seconds is not None}
    for name, solver in SOLVERS.items():
        ratios = [seconds[name, bits] / seconds["greedy", bits] for bits in BITS]
        ax.plot(BITS, ratios, color=solver.color, marker=solver.marker, ms=5, lw=1.2)
    ax.set_yscale("log")
    ax.set_xticks(BITS)
    ax.set_xlabel("payload (bits per element)")
    ax.set_ylabel("time / time of greedy")
    ax.set_title("Time, Gaussian sample, scales per row", fontsize="medium")
    ax.grid(alpha=0.3)
    return ax


def figure_of(results: Sequence[Result]) -> Figure:
    """The four panels with one legend below."""
    figure = Figure(figsize=(9, 7.2), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    for ax, data in zip(axes, DISTRIBUTIONS, strict=False):
        draw_sample(ax, results, data)
    draw_weights(axes[2], results)
    draw_times(axes[3], results)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


# ---------------------------------------------------------------- script


def argument_parser() -> argparse.ArgumentParser:
    quick = f"at most {QUICK_TENSORS} tensors, evenly over the files, and smaller samples"
    return weights_parser(NAME, __doc__, quick)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write the results; return the exit status."""
    xp = array_library(arguments.device)
    found = Weights(arguments.paths or pretrained_sample())
    omissions = Omissions(found, arguments.strict)
    weights = found.tensors
    if arguments.quick:
        weights = weights[:: -(-len(weights) // QUICK_TENSORS)]
    arguments.output.mkdir(parents=True, exist_ok=True)

    errors = of_weights(weights, omissions, xp)
    results = [
        *of_samples(QUICK_SAMPLE_SIZE if arguments.quick else SAMPLE_SIZE, xp),
        *summarized(errors),
        *of_time(QUICK_TIMED_SHAPE if arguments.quick else TIMED_SHAPE, xp),
    ]
    said = findings(results, errors)
    print(table(results))
    print(*said, omissions.text(arguments.verbose), sep="\n")

    packages = ("matplotlib", "onnx", "safetensors", "rapidocr")
    origin = provenance.record(vars(arguments), SEED, packages)
    origin |= {"findings": said, "omissions": omissions.record()}
    rows = map(dataclasses.astuple, results)
    write_results(NAME, arguments.output, COLUMNS, rows, origin, figure_of(results), 130)
    return omissions.exit_status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status: 1 if weights were skipped, 2 for an error."""
    return exit_status(NAME, run, argument_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
