"""Which quantizer at your bits? cubin's codes and what others use, at equal effective bits.

Effective bits count all that is stored: codes, maps, and scales, levels and zeros of 16 bits each.
The weights are samples of three distributions and tensors of OCR networks (the package rapidocr;
without it, or other files, this part is left out and said so). They are float16, so that cubin's
scales are, too. The layers' inputs are synthetic: their Gram matrices have eigenvalues 1/i or
i^-1/2 in random directions. Each method is measured with several widths and group sizes. The script
prints a table with the time that everything takes, and what follows from it, and writes league.csv,
.png and .json (where the figures come from, and the findings) to the output folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import provenance
import quantizers
import scipy.stats
from command_line import exit_status, pretrained_sample, weights_parser, write_results
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from quantizers import Quantized
from tqdm import tqdm

import cubin
from cubin import bitmaps, theory
from cubin.commands.arguments import UsageError
from cubin.commands.omissions import Omissions
from cubin.weights import Weights, WeightsError, channel_rows

NAME = "league"
SEED = 0
SAMPLE_SHAPE = (64, 512)
QUICK_SAMPLE_SHAPE = (16, 128)
TENSORS = 2
QUICK_TENSORS = 1
LINES = 64
"""The most output channels of a tensor that are coded."""

LENGTHS = (256, 1024)
"""The inputs of an output channel of the tensors that are taken, at least and at most."""

WEIGHTS = "pretrained weights"
BUDGETS = (1.2, 1.8, 2.2, 2.5, 3.2, 4.5)
"""Effective bits at which the methods are compared."""

DISTRIBUTIONS = {
    "Gaussian": scipy.stats.norm(),
    "Laplace": scipy.stats.laplace(),
    "Student-t, 4 degrees": scipy.stats.t(4),
}
SPECTRA = {"1/i": 1.0, "i^-1/2": 0.5}
"""The Gram matrices: the eigenvalues i to the power of minus this."""


# ---------------------------------------------------------------- methods


@dataclass(frozen=True)
class Layer:
    """Weights (m, n) of float16, and the Gram matrices of its inputs by name."""

    weights: np.ndarray
    grams: Mapping[str, cubin.Gram]

    @property
    def widened(self) -> np.ndarray:
        return self.weights.astype(np.float64)


@dataclass(frozen=True)
class Method:
    """A way to quantize.

    Attributes
    ----------
    run : callable
        Of weights, Gram matrix, bits and group size (None: the row). A method that is not
        calibrated is given no Gram matrix.
    widths : sequence of float
        The numbers of bits that are asked for.
    groups : sequence of int or None
    style : mapping
        How it is drawn.
    calibrated : bool
        Whether it takes the Gram matrix.
    ours : bool
        Whether it is cubin's.
    limit : bool
        Whether it is no quantizer but a limit: it has no part in comparisons.
    slow : bool
        Whether it is left out on pretrained weights.
    """

    run: Callable[[np.ndarray, Any, Any, int | None], Quantized]
    widths: Sequence[float]
    style: Mapping[str, Any]
    groups: Sequence[int | None] = (64, 128, None)
    calibrated: bool = False
    ours: bool = False
    limit: bool = False
    slow: bool = False


def coded(w: np.ndarray, bits: Any, group: int | None, **options: Any) -> Quantized:
    """Code with cubin, with scales per row or per group."""
    rows = {"group_size": group} if group else {"channel_axis": 0}
    code = cubin.quantize(w, bits, **rows, **options)
    return Quantized(code.dequantize().astype(np.float64), code.effective_bits)


def solved(solver: str) -> Callable[..., Quantized]:
    """cubin.quantize with a solver, until it converges."""

    def run(w: np.ndarray, gram: Any, bits: int, group: int | None) -> Quantized:
        iterations = 2 if gram else None
        return coded(w, bits, group, solver=solver, iterations=iterations, gram=gram)

    return run


def budget(w: np.ndarray, _: Any, bits: float, group: int | None) -> Quantized:
    rows = {"group_size": group} if group else {"channel_axis": 0}
    return coded(w, bitmaps.budget(w, bits, max_bits=5, **rows), group, solver="optimal")


def allocated(w: np.ndarray, _: Any, bits: float, group: int | None) -> Quantized:
    return coded(w, bitmaps.allocate({"w": w}, bits, max_bits=6)["w"], group, solver="optimal")


def ternary(w: np.ndarray, _: Any, bits: float, group: int | None) -> Quantized:
    rows = {"group_size": group} if group else {"channel_axis": 0}
    return coded(w, bitmaps.ternary(w, **rows), group)


def by_columns(w: np.ndarray, gram: Any, bits: float, group: int | None) -> Quantized:
    bits = bitmaps.columns(w, gram, bits, max_bits=math.ceil(bits) + 1)
    return coded(w, bits, group, solver="alternating", gram=gram)


def peer(function: Callable[..., Quantized], *options: Any) -> Callable[..., Quantized]:
    """A quantizer of others, which works on float64."""
    return lambda w, _, bits, group: function(w.astype(np.float64), bits, group, *options)


def line(color: str, marker: str, dashes: str, **more: Any) -> dict[str, Any]:
    return {"color": color, "marker": marker, "ls": dashes, "ms": 5, "lw": 1.3, **more}


def ours(color: str, marker: str) -> dict[str, Any]:
    """Full markers and lines."""
    return line(color, marker, "-")


def theirs(color: str, marker: str) -> dict[str, Any]:
    """Open markers and dashes."""
    return line(color, marker, "--", mfc="white")


# Okabe and Ito's palette, told apart by colour-blind readers; markers and dashes double it.
METHODS = {
    "greedy": Method(solved("greedy"), range(1, 5), ours("#999999", "o"), ours=True),
    "refined": Method(solved("refined"), range(1, 5), ours("#E69F00", "o"), ours=True),
    "alternating": Method(solved("alternating"), range(1, 5), ours("#56B4E9", "^"), ours=True),
    "optimal": Method(solved("optimal"), range(1, 6), ours("#0072B2", "v"), ours=True),
    "ternary": Method(ternary, (1,), ours("#D55E00", "P"), ours=True),
    "budget, optimal": Method(
        budget, (1.2, 1.5, 2, 2.5, 3), ours("#009E73", "s"), (None,), ours=True
    ),
    "allocate, optimal": Method(
        allocated, (1.5, 2, 2.5, 3, 3.5, 4), ours("#CC79A7", "D"), (None,), ours=True
    ),
    "refined, gram": Method(
        solved("refined"), range(1, 5), ours("#E69F00", "o"), (128, None), True, ours=True
    ),
    "alternating, gram": Method(
        solved("alternating"), range(1, 5), ours("#56B4E9", "^"), (128, None), True, ours=True
    ),
    "optimal, gram": Method(
        solved("optimal"), (1, 2), ours("#0072B2", "v"), (None,), True, ours=True, slow=True
    ),
    "columns, gram": Method(
        by_columns, (1.5, 2, 2.5, 3), ours("#009E73", "s"), (None,), True, ours=True
    ),
    "round to nearest": Method(
        peer(quantizers.round_to_nearest), range(2, 6), theirs("#999999", "x")
    ),
    "round to nearest, clipped": Method(
        peer(quantizers.round_to_nearest, True), range(2, 6), theirs("#E69F00", "o")
    ),
    "HQQ": Method(peer(quantizers.hqq), range(2, 6), theirs("#D55E00", "h")),
    "NF4": Method(
        lambda w, _, bits, group: quantizers.nf4(w.astype(np.float64), group),
        (4,), theirs("#CC79A7", "*"),
    ),
    "LSBQ": Method(peer(quantizers.lsbq), (1, 2), theirs("black", "s")),
    "LSBQ, ternary": Method(
        lambda w, _, bits, group: quantizers.lsbq_ternary(w.astype(np.float64), group),
        (1,), theirs("black", "P"),
    ),
    "k-means per row": Method(
        lambda w, _, bits, group: quantizers.kmeans(w.astype(np.float64), bits),
        range(1, 5), theirs("#56B4E9", "d"), (None,),
    ),
    "GPTQ": Method(
        lambda w, gram, bits, group: quantizers.gptq(
            w.astype(np.float64), gram.matrix, bits, group
        ),
        range(2, 6), theirs("#D55E00", "h"), (128, None), True,
    ),
    "BiLLM": Method(
        lambda w, gram, bits, group: quantizers.billm(w.astype(np.float64), gram.matrix, group),
        (1,), theirs("black", "*"), (128,), calibrated=True,
    ),
    "entropy-coded scalar": Method(
        lambda w, _, bits, group: quantizers.entropy_coded(w.astype(np.float64), bits),
        (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5), line("#666666", "", ":"), (None,), limit=True,
    ),
}  # fmt: skip

SHOWN = {
    "weight_mse": [
        "greedy", "optimal", "ternary", "budget, optimal", "allocate, optimal",
        "round to nearest, clipped", "HQQ", "NF4", "LSBQ", "k-means per row",
        "entropy-coded scalar",
    ],
    "output_mse": [
        "refined, gram", "alternating, gram", "optimal, gram", "columns, gram", "GPTQ", "BiLLM",
        "optimal", "round to nearest, clipped",
    ],
}  # fmt: skip
"""What is drawn of each error: what would hide another is left out."""


# ---------------------------------------------------------------- data


def gram_of(n: int, power: float, rng: np.random.Generator) -> cubin.Gram:
    """The Gram matrix of n inputs with the eigenvalues i^-power, in random directions."""
    directions = np.linalg.qr(rng.standard_normal((n, n)))[0]
    sizes = np.sqrt(n * np.arange(1, n + 1) ** -power)
    return cubin.Gram(n).add(np.ascontiguousarray((directions * sizes).T))


def layer_of(w: np.ndarray) -> Layer:
    """A layer with these weights."""
    rng = np.random.default_rng(SEED)
    grams = {name: gram_of(w.shape[1], power, rng) for name, power in SPECTRA.items()}
    return Layer(np.ascontiguousarray(w.astype(np.float16)), grams)


def sample(law: Any, shape: tuple[int, int]) -> list[Layer]:
    """A layer whose weights have this distribution, of a size that is common in networks."""
    drawn = law.rvs(shape, random_state=np.random.default_rng(SEED))
    return [layer_of(drawn / law.std() * shape[1] ** -0.5)]


def pretrained(weights: Weights, omissions: Omissions, count: int) -> list[Layer]:
    """Layers of some tensors, evenly over all whose rows are long enough."""
    wanted = []
    for tensor in weights.tensors:
        if isinstance(tensor.channel_axis, int) and len(tensor.shape) > 1:
            lines = tensor.shape[tensor.channel_axis]
            length = tensor.size // max(lines, 1)
            # Whole groups, so that bits mean the same for all.
            if lines >= 16 and LENGTHS[0] <= length <= LENGTHS[1] and length % 128 == 0:
                wanted.append(tensor)
    chosen = wanted[:: max(1, -(-len(wanted) // count))]
    return [
        layer_of(channel_rows(array, tensor.channel_axis)[:LINES])
        for tensor, array in omissions.finite(chosen)
        if array.any()
    ]


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Point:
    """What a method costs and achieves.

    Attributes
    ----------
    data, inputs, method : str
    bits : float
        The number asked for.
    group : int or None
        Columns of a group; None is the row.
    effective_bits : float
    weight_mse, output_mse : float
        Squared error over power, of the weights and of the layer's outputs. Layers count by their
        number of weights.
    """

    data: str
    inputs: str
    method: str
    bits: float
    group: int | None
    effective_bits: float
    weight_mse: float
    output_mse: float


def settings(data: str) -> Iterator[tuple[str, float, int | None]]:
    for name, method in METHODS.items():
        if not (method.slow and data == WEIGHTS):
            for bits in method.widths:
                for group in method.groups:
                    yield name, bits, group


def sweep(sources: Mapping[str, Sequence[Layer]]) -> tuple[list[Point], dict[str, float]]:
    """Measure every method on all data, and the seconds of CPU time that it takes in all."""
    points, seconds = [], dict.fromkeys(METHODS, 0.0)
    total = sum(len(list(settings(data))) for data in sources)
    with tqdm(total=total, unit="code", disable=None) as progress:
        for data, layers in sources.items():
            for name, bits, group in settings(data):
                begun = time.process_time()
                for inputs, found in measured(METHODS[name], layers, bits, group).items():
                    points.append(Point(data, inputs, name, bits, group, *found))
                seconds[name] += time.process_time() - begun
                progress.update()
    return points, seconds


def measured(
    method: Method, layers: Sequence[Layer], bits: float, group: int | None
) -> dict[str, tuple[float, float, float]]:
    """Bits and errors by the names of the inputs."""
    sums = {inputs: np.zeros(3) for inputs in SPECTRA}
    for layer in layers:
        w, plain = layer.widened, None
        for inputs, gram in layer.grams.items():
            if plain is None or method.calibrated:
                plain = method.run(layer.weights, gram if method.calibrated else None, bits, group)
            errors = [
                float(cubin.errors.relative_mse(w, plain.values)),
                float(cubin.errors.output_mse(w, plain.values, gram)),
            ]
            sums[inputs] += np.array([plain.bits, *errors]) * w.size
    size = sum(layer.weights.size for layer in layers)
    return {inputs: tuple((found / size).tolist()) for inputs, found in sums.items()}


# ---------------------------------------------------------------- findings


def best(
    points: Sequence[Point], data: str, inputs: str, error: str, bits: float, ours: bool
) -> Point | None:
    """The least error of cubin's methods, or of the others, that fits into so many bits."""
    fitting = [
        point
        for point in points
        if (point.data, point.inputs) == (data, inputs)
        and point.effective_bits <= bits
        and METHODS[point.method].ours == ours
        and not METHODS[point.method].limit
    ]
    return min(fitting, key=lambda point: getattr(point, error), default=None)


def findings(points: Sequence[Point]) -> list[str]:
    """Say what has the least error at which bits, in sentences that follow from the points."""
    said = []
    for data in dict.fromkeys(point.data for point in points):
        for error, inputs in (("weight_mse", "1/i"), *(("output_mse", s) for s in SPECTRA)):
            where = "weights" if error == "weight_mse" else f"outputs, inputs {inputs}"
            clauses = [compared(points, data, inputs, error, bits) for bits in BUDGETS]
            said.append(f"{data}, {where}: {'; '.join(clauses)}.")
    return said


def compared(points: Sequence[Point], data: str, inputs: str, error: str, bits: float) -> str:
    mine, other = (best(points, data, inputs, error, bits, ours) for ours in (True, False))
    if mine is None or other is None:
        only = mine or other
        return f"up to {bits} bits {only.method if only else 'nothing'} alone fits"
    ratio = getattr(mine, error) / getattr(other, error)
    return f"up to {bits} bits {mine.method} has {ratio:.2f} of the error of {other.method}"


# ---------------------------------------------------------------- figure


def frontier(points: Sequence[Point], error: str) -> list[Point]:
    """Those of a method's points that no other of fewer bits beats, by bits."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: point.effective_bits):
        if not kept or getattr(point, error) < getattr(kept[-1], error):
            kept.append(point)
    return kept


def draw(ax: Axes, points: Sequence[Point], data: str, inputs: str, error: str) -> Axes:
    """Draw an error of what is shown over effective bits, each method at its best group sizes.

    Parameters
    ----------
    ax : Axes
    points : sequence of Point
    data, inputs : str
        Whose points.
    error : {"weight_mse", "output_mse"}

    Returns
    -------
    Axes
        The Axes given.
    """
    for name in SHOWN[error]:
        style = dict(METHODS[name].style)
        if error == "output_mse" and not METHODS[name].calibrated:
            style.update(color="#999999", mfc="white", marker="v" if METHODS[name].ours else "o")
        own = [p for p in points if (p.data, p.inputs, p.method) == (data, inputs, name)]
        own = frontier(own, error)
        label = f"cubin: {name}" if METHODS[name].ours else name
        ax.plot(
            [p.effective_bits for p in own], [getattr(p, error) for p in own], label=label, **style
        )
    if error == "weight_mse" and data in DISTRIBUTIONS:
        law, bits = DISTRIBUTIONS[data], np.linspace(1, 5, 50)
        limit = theory.shannon(law, 1) * 4.0 ** (1 - bits)
        ax.plot(bits, limit, color="0.85", lw=6, zorder=0, label="Shannon's limit")
        levels = [theory.lloyd_max(law, k).relative_mse for k in range(1, 6)]
        ax.plot(range(1, 6), levels, "_", color="black", ms=14, zorder=1, label="Lloyd-Max")
    ax.set_yscale("log")
    ax.set_xlim(0.95, 4.8)
    ax.set_ylim(*{"weight_mse": (2.5e-3, 0.6), "output_mse": (8e-4, 0.6)}[error])
    ax.grid(alpha=0.3)
    return ax


def draw_all(figure: Figure, points: Sequence[Point]) -> Figure:
    """A column for each kind of data: the errors of weights above, those of outputs below."""
    sources = list(dict.fromkeys(point.data for point in points))
    every = figure.subplots(2, len(sources), sharex=True, sharey="row", squeeze=False)
    titles = {"weight_mse": "weights", "output_mse": "outputs (eigenvalues 1/i)"}
    for row, (error, title) in zip(every, titles.items(), strict=True):
        for ax, data in zip(row, sources, strict=True):
            draw(ax, points, data, "1/i", error)
            ax.set_title(f"{data}: {title}", fontsize="medium")
        row[0].set_ylabel("relative squared error")
        row[0].legend(fontsize=7, loc="lower left")
    for ax in every[1]:
        ax.set_xlabel("effective bits per weight")
    return figure


# ---------------------------------------------------------------- script


def argument_parser() -> argparse.ArgumentParser:
    quick = f"{QUICK_TENSORS} tensor instead of {TENSORS}, and smaller samples"
    return weights_parser(NAME, __doc__, quick)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write the results; return the exit status."""
    if arguments.device == "cuda":
        raise UsageError("what others use is written for NumPy: use --device cpu")
    omissions, left_out, layers = None, "", []
    try:
        weights = Weights(arguments.paths or pretrained_sample())
    except WeightsError as error:
        if arguments.paths:
            raise
        left_out = f"No pretrained weights: {error}"
    else:
        omissions = Omissions(weights, arguments.strict)
        count = QUICK_TENSORS if arguments.quick else TENSORS
        layers = pretrained(weights, omissions, count)
        if not layers:
            left_out = f"No tensor has rows of whole groups, {LENGTHS[0]} to {LENGTHS[1]} weights."
    shape = QUICK_SAMPLE_SHAPE if arguments.quick else SAMPLE_SHAPE
    sources = {name: sample(law, shape) for name, law in DISTRIBUTIONS.items()}
    if layers:
        sources[WEIGHTS] = layers
    arguments.output.mkdir(parents=True, exist_ok=True)
    points, seconds = sweep(sources)
    said = [*findings(points), *filter(None, [left_out])]
    print_tables(points, seconds)
    print(*said, sep="\n")
    if omissions:
        print(omissions.text(arguments.verbose))
    write(arguments, points, said, omissions, len(sources.get(WEIGHTS, ())))
    return omissions.exit_status if omissions else 0


def print_tables(points: Sequence[Point], seconds: Mapping[str, float]) -> None:
    """Print the points, and the seconds of every method in all."""
    print(
        f"{'data':22}{'inputs':8}{'method':27}{'asked':>6}{'group':>6}{'effective':>10}"
        f"{'weights':>10}{'outputs':>10}"
    )
    for p in points:
        print(
            f"{p.data:22}{p.inputs:8}{p.method:27}{p.bits:6.2f}{p.group or 'row':>6}"
            f"{p.effective_bits:10.3f}{p.weight_mse:10.5f}{p.output_mse:10.5f}"
        )
    print("seconds of CPU time in all:")
    for name, spent in seconds.items():
        print(f"  {name:27}{spent:8.2f}")


def write(
    arguments: argparse.Namespace,
    points: Sequence[Point],
    said: Sequence[str],
    omissions: Omissions | None,
    tensors: int,
) -> None:
    """Write the CSV, the figure, and the provenance with the findings."""
    sources = len({point.data for point in points})
    figure = draw_all(Figure(figsize=(4.6 * sources, 9.5), layout="constrained"), points)
    origin = provenance.record(
        vars(arguments), SEED, packages=("matplotlib", "numba", "onnx", "safetensors", "rapidocr")
    )
    origin |= {
        "weights": {"tensors": tensors},
        "omissions": omissions.record() if omissions else None,
        "findings": list(said),
    }
    header = [field.name for field in dataclasses.fields(Point)]
    rows = map(dataclasses.astuple, points)
    write_results(NAME, arguments.output, header, rows, origin, figure, 80)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status: 1 if weights were skipped, 2 for an error."""
    return exit_status(NAME, run, argument_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
