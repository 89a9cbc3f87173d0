"""What bit maps buy: the error of binary codes against payload bits and against effective bits.

Payload bits count the signs alone; effective bits add what it takes to store the bit map and the
scales. Every generator of cubin.bitmaps makes maps of the same means, for samples of the Gaussian
and Laplace distributions and for weights of three OCR networks (the package rapidocr). The codes
are greedy, and for uniform, budget and allocated maps optimal, too, with scales per row of a sample
and per output channel of a weight tensor. A tensor counts by its number of elements, whatever its
power. The script prints a table and what follows from it, and writes bit_budget.csv, .png and
.json (where the figures come from, and the findings) to the output folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import provenance
import scipy.optimize
import scipy.stats
from command_line import exit_status, pretrained_sample, weights_parser, write_results
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

import cubin
from cubin import bitmaps, theory
from cubin.commands.arguments import array_library
from cubin.commands.omissions import Omissions
from cubin.weights import Weights, WeightsError, channel_rows

NAME = "bit_budget"
SEED = 0
MEANS = (1.2, 1.4, 1.7, 2.0, 2.5, 3.0)
MOST_BITS = 5
"""The largest number of bits in a map that is not uniform."""

WIDTHS = {"greedy": range(1, 9), "optimal": range(1, 7)}
SAMPLE_SHAPE = (64, 4096)
QUICK_SAMPLE_SHAPE = (32, 1024)
TENSORS = 40
QUICK_TENSORS = 12
WEIGHTS = "pretrained weights"

DISTRIBUTIONS = {"Gaussian": scipy.stats.norm(), "Laplace": scipy.stats.laplace()}

Arrays = Mapping[str, Any]
"""Arrays by name, with a row for every index of the first axis."""


# ---------------------------------------------------------------- data


def sample(distribution: Any, shape: tuple[int, int], xp: Any) -> Arrays:
    """Draw float32 samples, the same in every run."""
    drawn = distribution.rvs(shape, random_state=np.random.default_rng(SEED))
    return {"x": xp.asarray(drawn.astype(np.float32))}


def weight_tensors(weights: Weights, omissions: Omissions, quick: bool, xp: Any) -> Arrays:
    """Load tensors, evenly over the files, as (output channels, elements of a channel)."""
    chosen = weights.tensors[:: -(-len(weights) // (QUICK_TENSORS if quick else TENSORS))]
    tensors = {}
    for weight, array in omissions.finite(chosen):
        if array.any():
            tensors[weight.name] = xp.asarray(channel_rows(array, weight.channel_axis))
        else:
            omissions.left_out.append(replace(weight, reason="zeros alone"))
    if not tensors:
        raise WeightsError("all weights are zeros, whose relative error is not defined")
    return tensors


# ---------------------------------------------------------------- maps


def mix_of_mean(mean: float) -> dict[int, float]:
    """Give the mix of 1 bit and more whose shares fall by one ratio per bit; 1.4: 71/20/6/2/1 %."""
    widths = np.arange(1, MOST_BITS + 1)

    def shares(ratio: float) -> np.ndarray:
        weights = ratio ** (widths - 1.0)
        return weights / weights.sum()

    ratio = scipy.optimize.brentq(lambda ratio: shares(ratio) @ widths - mean, 1e-9, 1e9)
    return dict(zip(widths.tolist(), shares(ratio).tolist(), strict=True))


def each(make: Callable[[Any], Any]) -> Callable[[Arrays], dict[str, Any]]:
    """Make the maps of arrays one by one."""
    return lambda arrays: {name: make(x) for name, x in arrays.items()}


def random_map(x: Any, mean: float, xp: Any) -> Any:
    """Draw a random map; mind its mean, which is larger."""
    return xp.asarray(bitmaps.random(x.shape, mean, SEED))


def allocated(arrays: Arrays, mean: float) -> dict[str, Any]:
    """Allocate bits to rows, with errors relative to the power of each tensor."""
    importance = {name: x.size / float((x.astype(float) ** 2).sum()) for name, x in arrays.items()}
    return bitmaps.allocate(arrays, mean, max_bits=MOST_BITS, importance=importance)


@dataclass(frozen=True)
class Request:
    """Maps of a mean by a generator, and the solvers to code with them."""

    generator: str
    mean: float
    solvers: tuple[str, ...]
    make: Callable[[Arrays], dict[str, Any]]


def requests(xp: Any) -> Iterator[Request]:
    """Yield every generator with every mean."""
    for solver, widths in WIDTHS.items():
        for width in widths:
            yield Request(UNIFORM, width, (solver,), each(lambda x, width=width: width))
    for mean in MEANS:
        mix = mix_of_mean(mean)
        ranked = {
            "top-down": bitmaps.top_down,
            "bottom-up": bitmaps.bottom_up,
            "middle-out": bitmaps.middle_out,
        }
        makers = {
            "random": each(lambda x, mean=mean: random_map(x, mean, xp)),
            **{name: each(partial(ranked[name], mix=mix)) for name in ranked},
            "budget": each(
                partial(bitmaps.budget, mean_bits=mean, max_bits=MOST_BITS, channel_axis=0)
            ),
            "allocate": partial(allocated, mean=mean),
        }
        for generator, make in makers.items():
            solvers = tuple(solver for name, solver in CURVES if name == generator)
            yield Request(generator, mean, solvers, make)


UNIFORM = "uniform"

# Okabe and Ito's palette, told apart by colour-blind readers; markers and dashes double it.
CURVES: dict[tuple[str, str], dict[str, Any]] = {
    (UNIFORM, "greedy"): {"color": "black", "marker": "o", "lw": 1},
    (UNIFORM, "optimal"): {"color": "black", "marker": "o", "mfc": "white", "lw": 1, "ls": "--"},
    ("random", "greedy"): {"color": "#999999", "marker": "x", "ls": ":"},
    ("top-down", "greedy"): {"color": "#56B4E9", "marker": "v", "ls": ":"},
    ("bottom-up", "greedy"): {"color": "#E69F00", "marker": "^", "ls": ":"},
    ("middle-out", "greedy"): {"color": "#009E73", "marker": "D", "ls": ":"},
    ("budget", "greedy"): {"color": "#D55E00", "marker": "s", "lw": 2},
    ("budget", "optimal"): {"color": "#D55E00", "marker": "s", "mfc": "white", "lw": 2, "ls": "--"},
    ("allocate", "greedy"): {"color": "#0072B2", "marker": "P", "lw": 2},
    ("allocate", "optimal"): {
        "color": "#0072B2",
        "marker": "P",
        "mfc": "white",
        "lw": 2,
        "ls": "--",
    },
}
"""What is measured, by generator and solver, and how it is drawn."""


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Point:
    """What one generator with one solver costs and achieves on one source.

    Attributes
    ----------
    source, generator, solver : str
    mean_bits : float
        The mean asked for.
    payload_bits, effective_bits : float
        Bits per element of the codes alone, and with map and scales.
    relative_mse : float
        Squared error over power of a tensor, averaged over the elements of all.
    """

    source: str
    generator: str
    solver: str
    mean_bits: float
    payload_bits: float
    effective_bits: float
    relative_mse: float


def measured(source: str, request: Request, solver: str, arrays: Arrays, maps: Arrays) -> Point:
    """Code the arrays with the maps."""
    sums = np.zeros(3)
    for name, x in arrays.items():
        code = cubin.quantize(x, maps[name], channel_axis=0, solver=solver)
        error = float(cubin.errors.relative_mse(x, code.dequantize()))
        sums += np.array([code.payload_bits, code.effective_bits, error]) * x.size
    payload, effective, error = (sums / sum(x.size for x in arrays.values())).tolist()
    return Point(source, request.generator, solver, request.mean, payload, effective, error)


def sweep(sources: Mapping[str, Arrays], xp: Any) -> list[Point]:
    """Measure everything on every source."""
    every = list(requests(xp))
    points = []
    with tqdm(total=len(sources) * len(every), unit="map", disable=None) as progress:
        for source, arrays in sources.items():
            for request in every:
                maps = request.make(arrays)
                points += [measured(source, request, s, arrays, maps) for s in request.solvers]
                progress.update()
    return points


def of(points: Sequence[Point], source: str, generator: str, solver: str) -> list[Point]:
    wanted = (source, generator, solver)
    return [point for point in points if (point.source, point.generator, point.solver) == wanted]


# ---------------------------------------------------------------- findings

BITS = {"payload_bits": "payload", "effective_bits": "effective"}

GAINS = {
    "gain_at_payload_bits": ("payload_bits", "greedy"),
    "gain_at_effective_bits": ("effective_bits", "greedy"),
    "gain_over_optimal_at_effective_bits": ("effective_bits", "optimal"),
}
"""What maps are held against: uniform codes of as many bits of a kind, by a solver."""

AGAINST = (
    "against greedy uniform codes of as many payload bits",
    "of as many effective bits",
    "against optimal uniform codes of as many effective bits",
)


def uniform_error(points: Sequence[Point], source: str, kind: str, solver: str, bits: Any) -> Any:
    """Interpolate the error of uniform codes of as many bits; NaN beyond the widths measured.

    Where some rows take k bits and the others k + 1, bits and error lie on a straight line between
    those of k and of k + 1.
    """
    known = of(points, source, UNIFORM, solver)
    return np.interp(
        bits,
        [getattr(point, kind) for point in known],
        [point.relative_mse for point in known],
        left=math.nan,
        right=math.nan,
    )


def gain(points: Sequence[Point], point: Point, kind: str, solver: str) -> float:
    """How many times smaller the error is than that of uniform codes of as many bits."""
    bits = getattr(point, kind)
    return float(uniform_error(points, point.source, kind, solver, bits)) / point.relative_mse


def findings(points: Sequence[Point]) -> list[str]:
    """Say where maps pay, in sentences that follow from the points."""
    said = []
    for source in dict.fromkeys(point.source for point in points):
        for generator, solver in CURVES:
            if generator != UNIFORM:
                mine = of(points, source, generator, solver)
                clauses = [
                    f"{against}, {paying(points, mine, *baseline)}"
                    for against, baseline in zip(AGAINST, GAINS.values(), strict=True)
                ]
                said.append(f"{source}, {generator}, {solver}: {'; '.join(clauses)}.")
        said.append(best_of(points, source))
        if source in DISTRIBUTIONS:
            said.append(below_shannon(points, source))
    return said


def paying(points: Sequence[Point], mine: Sequence[Point], kind: str, solver: str) -> str:
    """Say at which bits the points of one curve have less error than uniform codes."""
    gains = {getattr(point, kind): gain(points, point, kind, solver) for point in mine}
    gains = {bits: factor for bits, factor in gains.items() if math.isfinite(factor)}
    if not gains:
        return "not measured"
    ahead = [bits for bits, factor in gains.items() if factor > 1]
    behind = [bits for bits, factor in gains.items() if factor <= 1]
    errors = f"(error x{1 / max(gains.values()):.2f} to x{1 / min(gains.values()):.2f})"
    if not ahead:
        return f"it never pays {errors}"
    if not behind:
        return f"it always pays {errors}"
    return f"it pays at {listed(ahead)} bits but not at {listed(behind)} {errors}"


def listed(bits: Iterable[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in bits)


def best_of(points: Sequence[Point], source: str) -> str:
    """Say which map has the largest gain on average over the means, by every count."""
    clauses = []
    for against, (kind, baseline) in zip(AGAINST, GAINS.values(), strict=True):
        means = {}
        for generator, solver in CURVES:
            if generator != UNIFORM:
                mine = of(points, source, generator, solver)
                gains = [gain(points, point, kind, baseline) for point in mine]
                means[f"{generator} ({solver})"] = math.exp(np.nanmean(np.log(gains)))
        best = max(means, key=lambda name: means[name])
        clauses.append(
            f"{against}, {best} does best (error x{1 / means[best]:.2f} on average)"
            if means[best] > 1
            else f"{against}, no map pays on average"
        )
    return f"{source}: {'; '.join(clauses)}."


def shannon(source: str, bits: Any) -> Any:
    """The least relative error of any code of a distribution."""
    return theory.shannon(DISTRIBUTIONS[source], 1) * 4.0 ** (1 - np.asarray(bits))


def below_shannon(points: Sequence[Point], source: str) -> str:
    """Say how many codes seem to beat the limit of any code."""
    mine = [point for point in points if point.source == source]
    below = {
        kind: sum(point.relative_mse < shannon(source, getattr(point, kind)) for point in mine)
        for kind in BITS
    }
    return (
        f"{source}: {below['payload_bits']} of {len(mine)} codes lie below Shannon's limit at "
        f"their payload bits, {below['effective_bits']} at their effective bits."
    )


# ---------------------------------------------------------------- figure


def draw_errors(ax: Axes, points: Sequence[Point], source: str, kind: str) -> Axes:
    """Draw the error of everything over the bits of a kind.

    Parameters
    ----------
    ax : Axes
        Where to draw.
    points : sequence of Point
    source : str
        Whose points.
    kind : {"payload_bits", "effective_bits"}

    Returns
    -------
    Axes
        The Axes given.
    """
    low, high = 1.0, 6.0
    grid = np.linspace(low, high, 200)
    for (generator, solver), style in CURVES.items():
        mine = of(points, source, generator, solver)
        label = generator if solver == "greedy" else f"{generator}, {solver} scales"
        ax.plot(
            [getattr(point, kind) for point in mine],
            [point.relative_mse for point in mine],
            ms=5,
            label=label,
            **style,
        )
    if source in DISTRIBUTIONS:
        ax.plot(grid, shannon(source, grid), color="0.8", lw=6, zorder=0, label="Shannon's limit")
    ax.set_yscale("log")
    ax.set_xlim(low, high)
    ax.set_ylim(1e-3, 0.7)
    ax.set_xlabel(f"{BITS[kind]} bits per element")
    ax.set_ylabel("relative mean squared error")
    ax.set_title(source)
    ax.grid(alpha=0.3)
    return ax


def draw_all(figure: Figure, points: Sequence[Point]) -> Figure:
    """Draw all sources, by payload bits above and by effective bits below, with one legend."""
    sources = list(dict.fromkeys(point.source for point in points))
    every = figure.subplots(len(BITS), len(sources), sharey=True)
    for row, kind in zip(every, BITS, strict=True):
        for ax, source in zip(row, sources, strict=True):
            draw_errors(ax, points, source, kind)
        for ax in row[1:]:
            ax.set_ylabel("")
    handles, labels = every[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return figure


# ---------------------------------------------------------------- script


def argument_parser() -> argparse.ArgumentParser:
    quick = f"at most {QUICK_TENSORS} tensors instead of {TENSORS}, and smaller samples"
    return weights_parser(NAME, __doc__, quick)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write the results; return the exit status."""
    xp = array_library(arguments.device)
    weights = Weights(arguments.paths or pretrained_sample())
    omissions = Omissions(weights, arguments.strict)
    arguments.output.mkdir(parents=True, exist_ok=True)
    shape = QUICK_SAMPLE_SHAPE if arguments.quick else SAMPLE_SHAPE
    sources = {name: sample(law, shape, xp) for name, law in DISTRIBUTIONS.items()}
    sources[WEIGHTS] = weight_tensors(weights, omissions, arguments.quick, xp)
    points = sweep(sources, xp)
    said = findings(points)
    print_table(points)
    print(*said, omissions.text(arguments.verbose), sep="\n")
    write(arguments, points, said, omissions, len(sources[WEIGHTS]))
    return omissions.exit_status


def print_table(points: Sequence[Point]) -> None:
    """Print the points, with the gains over uniform codes."""
    print(
        f"{'source':20}{'map':12}{'scales':9}{'asked':>6}{'payload':>9}{'effective':>10}"
        f"{'rel. MSE':>10}   times less error than uniform, at equal"
    )
    print(f"{'':79}{'payload':>9}{'effective':>10}{'effective, optimal':>20}")
    for point in points:
        gains = [gain(points, point, *against) for against in GAINS.values()]
        print(
            f"{point.source:20}{point.generator:12}{point.solver:9}{point.mean_bits:6.2f}"
            f"{point.payload_bits:9.3f}{point.effective_bits:10.3f}{point.relative_mse:10.5f}   "
            f"{gains[0]:9.2f}{gains[1]:10.2f}{gains[2]:20.2f}"
        )


def write(
    arguments: argparse.Namespace,
    points: Sequence[Point],
    said: Sequence[str],
    omissions: Omissions,
    tensors: int,
) -> None:
    """Write the CSV, the figure, and the provenance with the findings."""
    figure = draw_all(Figure(figsize=(10.5, 7.5), layout="constrained"), points)
    origin = provenance.record(
        vars(arguments), SEED, packages=("matplotlib", "onnx", "safetensors", "rapidocr")
    )
    origin |= {
        "weights": {"tensors": tensors},
        "omissions": omissions.record(),
        "findings": list(said),
    }
    header = [*(field.name for field in dataclasses.fields(Point)), *GAINS]
    rows = []
    for point in points:
        gains = [gain(points, point, *against) for against in GAINS.values()]
        rows.append([*dataclasses.astuple(point), *gains])
    write_results(NAME, arguments.output, header, rows, origin, figure, 90)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status: 1 if weights were skipped, 2 for an error."""
    return exit_status(NAME, run, argument_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
