"""Do scales by row and by column win over scales by row or by group, at equal effective bits?

A level of `w_ij ~ sum_l r_li c_lj b_lij` has a scale for every row and one for every column
(ARB-LLM, arXiv:2410.03129), which cost as much as groups of mn / (m + n) columns. Rows, columns and
signs are fitted in turn in the metric of a Gram matrix, from cubin's codes on. Scales by row and by
group are those of cubin's solver `alternating`, to convergence, in the same metric. The data are
samples of two distributions, and layers of the networks of the package rapidocr with the Gram
matrices of drawn text; without the package these are left out and said so. The script prints what
it finds, and writes row_column_scales.csv and .json to the output folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import layer_outputs
import numpy as np
import provenance
import scipy.linalg
from command_line import exit_status, output_parser, pretrained_sample, write_results
from layer_inputs import gram_with
from league import DISTRIBUTIONS, SPECTRA, coded, gram_of
from quantizers import SCALE_BITS, Quantized
from tqdm import tqdm

import cubin
from cubin.commands.arguments import UsageError, make_folder
from cubin.weights import WeightsError

NAME = "row_column_scales"
SEED = 0
BITS = (1, 2)
SIZE = 256
QUICK_SIZE = 64
SAMPLED = ("Gaussian", "Laplace")
LAYERS = 4
"""Of each network."""

LINES = 256
LEAST = 128
"""Inputs of the layers that are taken."""

ROUNDS = 20
LEAST_GAIN = 1e-3
"""By how much of itself the error must fall for another round."""

WEIGHTS = "pretrained weights"
BOTH = "rows and columns"


# ---------------------------------------------------------------- scales by row and by column


class Fit:
    """Levels of signs with a scale for every row and one for every column, fitted to weights.

    Parameters
    ----------
    weights : array of float64, shape (m, n)
    gram : array of float64, shape (n, n)
        The metric of the error.
    rows, columns : array of float64, shape (levels, m) and (levels, n)
    signs : array of float64, shape (levels, m, n)
    """

    def __init__(
        self,
        weights: np.ndarray,
        gram: np.ndarray,
        rows: np.ndarray,
        columns: np.ndarray,
        signs: np.ndarray,
    ) -> None:
        self.weights, self.gram = weights, gram
        self.rows, self.columns, self.signs = rows, columns, signs

    @property
    def values(self) -> np.ndarray:
        return np.einsum("lm,ln,lmn->mn", self.rows, self.columns, self.signs)

    def error(self) -> float:
        off = self.weights - self.values
        return float(((off @ self.gram) * off).sum())

    def fit_rows(self) -> None:
        """The rows' scales of least squares."""
        parts = self.columns[:, None] * self.signs
        seen = parts @ self.gram
        squares = np.einsum("amn,bmn->mab", seen, parts)
        products = np.einsum("amn,mn->ma", seen, self.weights)
        inverse = np.linalg.pinv(squares, hermitian=True)
        self.rows = np.einsum("mab,mb->am", inverse, products)

    def fit_columns(self) -> None:
        """The columns' scales of least squares, all at once: the metric couples them."""
        parts = self.rows[:, :, None] * self.signs
        levels, n = self.columns.shape
        squares = np.block([[self.gram * (a.T @ b) for b in parts] for a in parts])
        slope = ((self.weights - self.values) @ self.gram * parts).sum(axis=1).ravel()
        # A step from where they are: what the metric does not see stays as it is.
        squares += 1e-9 * np.trace(squares) / (levels * n) * np.eye(levels * n)
        self.columns = self.columns + scipy.linalg.solve(squares, slope, assume_a="pos").reshape(
            levels, n
        )

    def fit_signs(self) -> None:
        """Column by column the signs of least error, all else as it is."""
        levels = len(self.rows)
        choices = 1.0 - 2 * (np.arange(1 << levels)[:, None] >> np.arange(levels) & 1)
        values = self.values
        slope = (self.weights - values) @ self.gram
        for j, square in enumerate(np.diagonal(self.gram)):
            if not square > 0:  # an input that is always 0
                continue
            sums = choices @ (self.rows * self.columns[:, j : j + 1])
            wanted = values[:, j] + slope[:, j] / square
            best = np.abs(sums - wanted).argmin(axis=0)
            change = np.take_along_axis(sums, best[None], 0)[0] - values[:, j]
            self.signs[:, :, j] = choices[best].T
            slope -= change[:, None] * self.gram[j]

    def improve(self) -> None:
        """Fit in turn until the error falls no more."""
        error = self.error()
        for _ in range(ROUNDS):
            self.fit_columns()
            self.fit_rows()
            self.fit_signs()
            before, error = error, self.error()
            if not error < before * (1 - LEAST_GAIN):
                break
        self.fit_rows()

    def round_scales(self) -> None:
        """Round the scales to float16, those of columns about 1."""
        size = np.abs(self.columns).mean(axis=1, keepdims=True)
        size[size == 0] = 1
        self.rows = (self.rows * size).astype(np.float16).astype(np.float64)
        self.columns = (self.columns / size).astype(np.float16).astype(np.float64)


def rows_and_columns(w: np.ndarray, gram: cubin.Gram, bits: int) -> Quantized:
    """The best fit from two starts: cubin's codes, of the weights and of columns of equal size."""
    m, n = w.shape
    matrix, sizes = gram.matrix, np.sqrt((w * w).mean(axis=0))
    fits = []
    for columns in (np.ones(n), np.where(sizes > 0, sizes, 1)):
        scaled = gram_with(matrix * columns * columns[:, None])
        code = cubin.quantize(
            w / columns, bits, channel_axis=0, solver="alternating", iterations=None, gram=scaled
        )
        scales = code.scales.reshape(bits, m)
        signs = code.signs.astype(np.float64)
        fit = Fit(w, matrix, scales, np.tile(columns, (bits, 1)), signs)
        fit.improve()
        fit.round_scales()
        fits.append(fit)
    best = min(fits, key=Fit.error)
    return Quantized(best.values, bits * (1 + SCALE_BITS / n + SCALE_BITS / m))


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Task:
    """Weights of float16, the metric that codes know, and the one that they are measured in."""

    data: str
    layer: str
    metric: str
    weights: np.ndarray
    known: cubin.Gram
    measured: cubin.Gram


def samples(size: int) -> Iterator[Task]:
    for data in SAMPLED:
        law = DISTRIBUTIONS[data]
        rng = np.random.default_rng(SEED)
        w = (law.rvs((size, size), random_state=rng) / law.std()).astype(np.float16)
        metrics = {"weights": gram_with(np.eye(size))}
        for name, power in SPECTRA.items():
            metrics[f"outputs, {name}"] = gram_of(size, power, rng)
        for metric, gram in metrics.items():
            yield Task(data, "", metric, w, gram, gram)


def layers(quick: bool) -> Iterator[Task]:
    """Some layers of every network, each with a metric of its weights and one of its outputs."""
    for path in pretrained_sample():
        if quick and layer_outputs.network_of(path)[0] != "reading":
            continue
        found, _ = layer_outputs.layers_of(path, quick, LINES)
        found = [f for f in found if f.weights.shape[1] >= LEAST and len(f.weights) >= LEAST]
        for layer in found[:: max(1, -(-len(found) // (1 if quick else LAYERS)))]:
            identity = gram_with(np.eye(layer.weights.shape[1]))
            name = f"{layer.network}: {layer.name}"
            yield Task(WEIGHTS, name, "weights", layer.weights, identity, identity)
            known, others = (seen.gram for seen in (layer.known, layer.others))
            yield Task(WEIGHTS, name, "outputs", layer.weights, known, others)


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Point:
    """What a kind of scales costs and achieves.

    Attributes
    ----------
    data, layer, metric : str
    rows, columns : int
        Of the weights.
    scales : str
    bits : int
    effective_bits : float
    error : float
        Squared error over power, of the weights or of the outputs.
    """

    data: str
    layer: str
    metric: str
    rows: int
    columns: int
    scales: str
    bits: int
    effective_bits: float
    error: float


def group_sizes(m: int, n: int) -> tuple[int, int]:
    """The groups next to what costs as much as scales by row and by column: fewer bits, and more.

    Groups are of equal length. Both are the same where one costs just as much.
    """
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    fewer = min(d for d in divisors if d * (m + n) >= m * n)
    more = max(d for d in divisors if d * (m + n) <= m * n)
    return fewer, more


def measured(task: Task) -> Iterator[Point]:
    w = task.weights.astype(np.float64)
    m, n = w.shape
    fewer, more = group_sizes(m, n)
    known = {"solver": "alternating", "iterations": None, "gram": task.known}
    for bits in BITS:
        found = {
            "rows": coded(task.weights, bits, None, **known),
            "groups of fewer bits": coded(task.weights, bits, fewer, **known),
            "groups of more bits": coded(task.weights, bits, more, **known),
            BOTH: rows_and_columns(w, task.known, bits),
        }
        for scales, code in found.items():
            error = float(cubin.errors.output_mse(w, code.values, task.measured))
            yield Point(task.data, task.layer, task.metric, m, n, scales, bits, code.bits, error)


# ---------------------------------------------------------------- findings


def ratios(points: Sequence[Point], data: str, metric: str, scales: str, bits: int) -> np.ndarray:
    """The error of scales by row and by column over that of other scales, layer by layer."""
    errors = {
        (p.layer, p.scales): p.error
        for p in points
        if (p.data, p.metric, p.bits) == (data, metric, bits)
    }
    layers = [layer for layer, name in errors if name == BOTH]
    return np.array([errors[layer, BOTH] / errors[layer, scales] for layer in layers])


def findings(points: Sequence[Point]) -> list[str]:
    """The errors of scales by row and by column over those of others, in sentences."""
    said = []
    for data, metric in dict.fromkeys((p.data, p.metric) for p in points):
        for bits in BITS:
            clauses = []
            for scales in ("rows", "groups of fewer bits", "groups of more bits"):
                found = ratios(points, data, metric, scales, bits)
                clauses.append(
                    f"{np.median(found):.3f} of {scales} (less in {int((found < 1).sum())} of "
                    f"{len(found)})"
                )
            said.append(f"{data}, {metric}, {bits} bits: {BOTH} have {', '.join(clauses)}.")
    return said


# ---------------------------------------------------------------- script


def argument_parser() -> argparse.ArgumentParser:
    return output_parser(NAME, __doc__, f"samples of {QUICK_SIZE} rows, and a layer")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write the results; return the exit status."""
    make_folder(arguments.output)
    tasks = list(samples(QUICK_SIZE if arguments.quick else SIZE))
    left_out = []
    try:
        tasks += layers(arguments.quick)
    except (WeightsError, UsageError) as error:
        left_out = [f"No pretrained weights: {error}"]
    points = [p for task in tqdm(tasks, unit="task", disable=None) for p in measured(task)]
    said = [*findings(points), *left_out]
    print(*said, sep="\n")
    origin = provenance.record(
        vars(arguments), SEED, packages=("numba", "onnx", "onnxruntime", "rapidocr")
    )
    origin["findings"] = said
    header = [field.name for field in dataclasses.fields(Point)]
    write_results(NAME, arguments.output, header, map(dataclasses.astuple, points), origin)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status: 2 for an error."""
    return exit_status(NAME, run, argument_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
