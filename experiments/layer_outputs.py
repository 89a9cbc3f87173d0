"""What codes that know a layer's inputs gain on real networks: the error of the layers' outputs.

The networks are those of the package rapidocr, which detect text, turn it and read it. They are
given drawn text (`drawn_text.py`). Each layer is coded with the Gram matrix of its inputs for some
images, with scales per output channel, and the error of its outputs is measured on other images:
once with its inputs as they are, and once with their mean taken off, whose share of the error the
biases can make up for. Convolutions with groups are left out, layers with few inputs, and those
that see too few vectors of them for a Gram matrix, such as one for each image. Of the others some
output channels are coded. The script prints a table and what follows from it, and writes
layer_outputs.csv, .png and .json (where the figures come from, and the findings) to the output
folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import drawn_text
import layer_inputs
import league
import numpy as np
import provenance
from command_line import exit_status, output_parser, pretrained_sample, write_results
from layer_inputs import Inputs
from league import METHODS, Method
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

import cubin
from cubin.commands.arguments import make_folder
from cubin.weights import Weight, Weights, channel_rows

NAME = "layer_outputs"
SEED = 0
LINES = 32
"""The most output channels of a layer that are coded, evenly over all."""

LEAST_INPUTS = 64
LEAST_VECTORS = 4
"""For each input of a layer: with less the Gram matrix of some images says little of others."""

BATCH = 4
SLOW_STEP, SLOW_INPUTS = 6, 200
"""Of so many of these that have no more inputs one is coded by what takes long."""

AS_THEY_ARE, CENTRED = "as they are", "less their mean"
"""How the inputs are taken."""

NETWORKS: dict[str, tuple[str, Callable[..., np.ndarray], int]] = {
    "_det_": ("detection", drawn_text.pages, 4),
    "_cls_": ("turning", drawn_text.turned_lines, 64),
    "_rec_": ("reading", drawn_text.lines, 48),
}
"""By a part of the file's name: what the network does, what draws its images, and how many."""

QUICK = ("turning", 4, 3)
"""With --quick: this network alone, so many images, and so many of its layers."""


def important(w: np.ndarray, gram: Any, bits: int, group: int | None) -> league.Quantized:
    """Code with the mean square of each input as the importance of its weights."""
    importance = np.broadcast_to(gram.diagonal(), w.shape)
    return league.coded(
        w, bits, group, solver="alternating", iterations=None, importance=importance
    )


MEASURED: dict[str, tuple[Method, Sequence[float]]] = {
    "greedy": (METHODS["greedy"], (1, 2, 3)),
    "optimal": (METHODS["optimal"], (1, 2, 3)),
    "alternating, importance": (
        Method(important, (), league.ours("#CC79A7", "D"), calibrated=True, ours=True),
        (1, 2, 3),
    ),
    "refined, gram": (METHODS["refined, gram"], (1, 2, 3)),
    "alternating, gram": (METHODS["alternating, gram"], (1, 2, 3)),
    "optimal, gram": (METHODS["optimal, gram"], (1, 2, 3)),
    "columns, gram": (METHODS["columns, gram"], (1.5,)),
    "round to nearest, clipped": (
        replace(METHODS["round to nearest, clipped"], style=league.theirs("black", "s")),
        (2, 3),
    ),
    "GPTQ": (METHODS["GPTQ"], (2, 3)),
}
"""The methods, those of the league but for one, and the bits that they are asked for."""


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Layer:
    """Weights of float16 of some output channels, and the layer's inputs.

    Attributes
    ----------
    network, name : str
    weights : array of float16, shape (lines, inputs)
    known, others : Inputs
        For the images that codes may know, and for those that they are measured on.
    """

    network: str
    name: str
    weights: np.ndarray
    known: Inputs
    others: Inputs

    def grams(self) -> dict[str, tuple[cubin.Gram, cubin.Gram]]:
        """The Gram matrices of both halves, by how the inputs are taken."""
        return {
            AS_THEY_ARE: (self.known.gram, self.others.gram),
            CENTRED: (self.known.centred(), self.others.centred()),
        }


def network_of(path: Path) -> tuple[str, Callable[..., np.ndarray], int]:
    return next(found for part, found in NETWORKS.items() if part in path.name)


def drawn(draw: Callable[..., np.ndarray], count: int, seed: Sequence[int]) -> Iterator[np.ndarray]:
    """Batches of images."""
    rng = np.random.default_rng(seed)
    for start in range(0, count, BATCH):
        yield draw(rng, min(BATCH, count - start))


def some_lines(weight: Weight, most: int) -> np.ndarray:
    """Output channels of a weight, evenly over all, rounded to float16."""
    lines = channel_rows(weight.load(), weight.channel_axis)
    return np.ascontiguousarray(lines[:: -(-len(lines) // most)].astype(np.float16))


def layers_of(path: Path, quick: bool, most: int = LINES) -> tuple[list[Layer], Counter[str]]:
    """The layers of a network, and how many weights are left out for which reason."""
    network, draw, count = network_of(path)
    count = QUICK[1] if quick else count
    known, others = (layer_inputs.seen(path, drawn(draw, count, (SEED, half))) for half in range(2))
    found, left_out = [], Counter[str]()
    for weight in Weights([path]).tensors:
        gram = known[weight.name].gram if weight.name in known else None
        if gram is None:
            left_out["convolutions with groups, and other operators"] += 1
        elif gram.n < LEAST_INPUTS:
            left_out[f"fewer than {LEAST_INPUTS} inputs"] += 1
        elif gram.count < LEAST_VECTORS * gram.n:
            left_out[f"fewer than {LEAST_VECTORS} input vectors for each input"] += 1
        else:
            lines = some_lines(weight, most)
            halves = known[weight.name], others[weight.name]
            found.append(Layer(network, weight.name, lines, *halves))
    if quick:
        found = found[:: -(-len(found) // QUICK[2])]
    return found, left_out


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Point:
    """What a method does with a layer.

    Attributes
    ----------
    network, layer : str
    columns, lines : int
        Inputs of the layer, and output channels that are coded.
    inputs : str
        How they are taken.
    method : str
    bits : float
        The number asked for.
    effective_bits : float
    power : float
        Of the layer's outputs for the other images, the sum over the coded lines.
    weight_mse, known_mse, output_mse : float
        Squared error over power: of the weights, and of the outputs for the images that the method
        knows and for others.
    """

    network: str
    layer: str
    columns: int
    lines: int
    inputs: str
    method: str
    bits: float
    effective_bits: float
    power: float
    weight_mse: float
    known_mse: float
    output_mse: float


def measured(layer: Layer, slow: bool) -> Iterator[Point]:
    """Code a layer with every method, with those that take long only where `slow` says so."""
    w = layer.weights.astype(np.float64)
    lines, columns = w.shape
    for inputs, (known, others) in layer.grams().items():
        power = float(((w @ others.matrix) * w).sum())
        for name, (method, widths) in MEASURED.items():
            for bits in widths if slow or not method.slow else ():
                gram = known if method.calibrated else None
                found = method.run(layer.weights, gram, bits, None)
                errors = (
                    float(cubin.errors.relative_mse(w, found.values)),
                    float(cubin.errors.output_mse(w, found.values, known)),
                    float(cubin.errors.output_mse(w, found.values, others)),
                )
                about = (layer.network, layer.name, columns, lines, inputs, name, bits)
                yield Point(*about, found.bits, power, *errors)


# ---------------------------------------------------------------- findings


@dataclass(frozen=True)
class Total:
    """A method on all layers: bits per weight, and the error of the outputs overall and median."""

    effective_bits: float
    overall: float
    median: float


def chosen(
    points: Iterable[Point], inputs: str, bits: float, method: str | None = None
) -> list[Point]:
    return [
        p for p in points if (p.inputs, p.bits) == (inputs, bits) and method in (None, p.method)
    ]


def total(points: Iterable[Point], inputs: str, method: str, bits: float) -> Total:
    own = chosen(points, inputs, bits, method)
    size = np.array([point.columns * point.lines for point in own])
    power = np.array([point.power for point in own])
    errors = np.array([point.output_mse for point in own])
    effective = np.array([point.effective_bits for point in own])
    return Total(
        float(effective @ size / size.sum()),
        float(errors @ power / power.sum()),
        float(np.median(errors)),
    )


def ratios(
    points: Iterable[Point], inputs: str, method: str, other: str, bits: float
) -> np.ndarray:
    """The output error of a method over that of another, layer by layer where both are."""
    errors = {(p.method, p.network, p.layer): p.output_mse for p in chosen(points, inputs, bits)}
    layers = [layer for name, *layer in errors if name == method]
    return np.array([errors[method, *layer] / errors[other, *layer] for layer in layers])


def findings(points: Sequence[Point]) -> list[str]:
    """What the points say, in words."""
    said = []
    for inputs in (AS_THEY_ARE, CENTRED):
        for name, other, bits in (
            *(("alternating, gram", "optimal", bits) for bits in (1, 2, 3)),
            *(("GPTQ", "optimal", bits) for bits in (2, 3)),
            *(("alternating, gram", "GPTQ", bits) for bits in (2, 3)),
            *(("optimal, gram", "alternating, gram", bits) for bits in (1, 2, 3)),
        ):
            found = ratios(points, inputs, name, other, bits)
            said.append(
                f"Inputs {inputs}, {bits} bits: {name} has a median of {np.median(found):.3f} of "
                f"the output error of {other}, and more of it in {int((found > 1).sum())} of "
                f"{len(found)} layers."
            )
    return said


# ---------------------------------------------------------------- figure


def draw_totals(ax: Axes, points: Sequence[Point], inputs: str) -> Axes:
    """Draw the median error of the layers' outputs over effective bits.

    Parameters
    ----------
    ax : Axes
    points : sequence of Point
    inputs : str
        How they are taken.

    Returns
    -------
    Axes
        The Axes given.
    """
    for name, (method, widths) in MEASURED.items():
        if method.slow:  # on some layers alone
            continue
        found = [total(points, inputs, name, bits) for bits in widths]
        style = dict(method.style)
        if not method.calibrated:
            style.update(mfc="white", ls=":")
        ax.plot(
            [entry.effective_bits for entry in found],
            [entry.median for entry in found],
            label=f"cubin: {name}" if method.ours else name,
            **style,
        )
    ax.set_yscale("log")
    ax.set_xlabel("effective bits per weight")
    ax.set_title(f"median of the layers, inputs {inputs}")
    ax.grid(alpha=0.3)
    return ax


def draw_layers(ax: Axes, points: Sequence[Point], bits: int) -> Axes:
    """Draw for each layer the error relative to the codes that know the weights alone.

    Parameters
    ----------
    ax : Axes
    points : sequence of Point
    bits : int

    Returns
    -------
    Axes
        The Axes given.
    """
    for inputs, dashes in ((AS_THEY_ARE, "-"), (CENTRED, ":")):
        for name in ("GPTQ", "alternating, gram"):
            found = np.sort(ratios(points, inputs, name, "optimal", bits))
            style = {**METHODS[name].style, "marker": "", "ls": dashes}
            shares = (np.arange(len(found)) + 0.5) / len(found)
            label = f"cubin: {name}" if METHODS[name].ours else name
            ax.plot(shares, found, label=f"{label}, inputs {inputs}", **style)
    ax.axhline(1, color="0.6", lw=1)
    ax.set_yscale("log")
    ax.set_xlabel("share of the layers")
    ax.set_ylabel("output error over that of cubin: optimal")
    ax.set_title(f"layer by layer, {bits} bits")
    ax.grid(alpha=0.3)
    return ax


def draw_all(figure: Figure, points: Sequence[Point]) -> Figure:
    whole, centred, layers = figure.subplots(1, 3)
    draw_totals(whole, points, AS_THEY_ARE)
    draw_totals(centred, points, CENTRED)
    centred.sharey(whole)
    draw_layers(layers, points, 2)
    whole.set_ylabel("relative squared error of outputs")
    whole.legend(fontsize=7, loc="lower left")
    layers.legend(fontsize=7)
    return figure


# ---------------------------------------------------------------- script


def argument_parser() -> argparse.ArgumentParser:
    network, images, layers = QUICK
    quick = f"{layers} layers of the network for {network}, and {images} images of each half"
    return output_parser(NAME, __doc__, quick)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write the results; return the exit status."""
    make_folder(arguments.output)
    layers: list[Layer] = []
    left_out: Counter[str] = Counter()
    for path in pretrained_sample():
        if not arguments.quick or network_of(path)[0] == QUICK[0]:
            found, others = layers_of(path, arguments.quick)
            layers += found
            left_out += others
    short = [layer for layer in layers if layer.known.gram.n <= SLOW_INPUTS]
    slow = {id(layer) for layer in short[::SLOW_STEP]}
    points = []
    for layer in tqdm(layers, unit="layer", disable=None):
        points += measured(layer, id(layer) in slow)
    said = findings(points)
    print_table(points)
    print(*said, sep="\n")
    for reason, count in left_out.items():
        print(f"Left out: {count} weights, {reason}.")
    write(arguments, points, said, layers, left_out)
    return 0


def print_table(points: Sequence[Point]) -> None:
    print(f"{'inputs':17}{'method':27}{'asked':>6}{'effective':>10}{'overall':>10}{'median':>10}")
    for inputs in (AS_THEY_ARE, CENTRED):
        for name, (_, widths) in MEASURED.items():
            for bits in widths:
                found = total(points, inputs, name, bits)
                print(
                    f"{inputs:17}{name:27}{bits:6.1f}{found.effective_bits:10.3f}"
                    f"{found.overall:10.5f}{found.median:10.5f}"
                )


def write(
    arguments: argparse.Namespace,
    points: Sequence[Point],
    said: Sequence[str],
    layers: Sequence[Layer],
    left_out: Mapping[str, int],
) -> None:
    """Write the CSV, the figure, and the provenance with the findings."""
    origin = provenance.record(
        vars(arguments), SEED, packages=("matplotlib", "numba", "onnx", "onnxruntime", "rapidocr")
    )
    origin["layers"] = Counter(layer.network for layer in layers)
    origin["least_input_vectors"] = min(layer.known.gram.count for layer in layers)
    origin["left_out"] = left_out
    origin["findings"] = list(said)
    header = [field.name for field in dataclasses.fields(Point)]
    rows = map(dataclasses.astuple, points)
    figure = draw_all(Figure(figsize=(14, 4.6), layout="constrained"), points)
    write_results(NAME, arguments.output, header, rows, origin, figure, 80, digits=4)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status: 2 for an error."""
    return exit_status(NAME, run, argument_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
