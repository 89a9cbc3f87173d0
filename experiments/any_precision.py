"""What several precisions in one code cost: their errors beside those of a code for each of them.

It codes a sample of the Gaussian distribution with one scale per level, and weights with scales per
output channel: without arguments those of three OCR networks (the package rapidocr). It prints a
table, and writes any_precision.csv and .json (where the figures come from) to the output folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import provenance
import solver_comparison
from command_line import exit_status, pretrained_sample, weights_parser, write_results
from tqdm import tqdm

import cubin
from cubin.commands.arguments import array_library
from cubin.commands.omissions import Omissions
from cubin.weights import Weight, Weights
from cubin.weights.tensor import Axis

NAME = "any_precision"
SEED = 0
PRECISIONS = (2, 3, 4)
SAMPLE_SIZE = 1_000_000
QUICK_SAMPLE_SIZE = 20_000
QUICK_TENSORS = 10

SOLVERS = {name: solver.options for name, solver in solver_comparison.SOLVERS.items()}


@dataclass(frozen=True)
class Result:
    """The errors at one of the precisions.

    Attributes
    ----------
    data, solver : str
    bits : int
    tensors : int
        Number of arrays.
    alone : float
        The relative MSE of codes of these bits alone: the median over the arrays.
    together : float
        That of the codes of all precisions.
    """

    data: str
    solver: str
    bits: int
    tensors: int
    alone: float
    together: float


def errors_of(x: Any, solver: str, axis: Axis) -> list[tuple[float, float]]:
    """For each precision the relative MSE of a code of its own, and of that of all precisions."""
    given = {"channel_axis": axis, **SOLVERS[solver]}
    code = cubin.quantize(x, PRECISIONS[-1], precisions=PRECISIONS, **given)
    pairs = [(cubin.multibit(x, bits, **given), code.at(bits).dequantize()) for bits in PRECISIONS]
    return [
        (float(cubin.errors.relative_mse(x, alone)), float(cubin.errors.relative_mse(x, together)))
        for alone, together in pairs
    ]


def summarized(data: str, solver: str, errors: list[list[tuple[float, float]]]) -> Iterator[Result]:
    """The medians over arrays."""
    medians = np.median(np.array(errors), axis=0)
    for bits, (alone, together) in zip(PRECISIONS, medians, strict=True):
        yield Result(data, solver, bits, len(errors), float(alone), float(together))


def of_weights(weights: Sequence[Weight], omissions: Omissions, xp: Any) -> Iterator[Result]:
    """Code every finite tensor with every solver."""
    errors: dict[str, list[list[tuple[float, float]]]] = {solver: [] for solver in SOLVERS}
    total = sum(weight.size for weight in weights)
    with tqdm(total=total, unit="weights", unit_scale=True, disable=None) as progress:
        for weight, loaded in omissions.finite(weights):
            array = xp.asarray(loaded)
            for solver, found in errors.items():
                found.append(errors_of(array, solver, weight.channel_axis))
            progress.update(weight.size)
    for solver, found in errors.items():
        yield from summarized("pretrained weights", solver, found)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write the results; return the exit status."""
    xp = array_library(arguments.device)
    found = Weights(arguments.paths or pretrained_sample())
    omissions = Omissions(found, arguments.strict)
    weights = found.tensors
    if arguments.quick:
        weights = weights[:: -(-len(weights) // QUICK_TENSORS)]
    arguments.output.mkdir(parents=True, exist_ok=True)

    size = QUICK_SAMPLE_SIZE if arguments.quick else SAMPLE_SIZE
    sample = xp.asarray(np.random.default_rng(SEED).standard_normal(size, np.float32))
    results = [
        result
        for solver in SOLVERS
        for result in summarized("Gaussian", solver, [errors_of(sample, solver, None)])
    ]
    results += of_weights(weights, omissions, xp)
    print(f"{'data':<20}{'solver':<28}{'bits':>4}  {'alone':>9}  {'together':>9}")
    for r in results:
        print(f"{r.data:<20}{r.solver:<28}{r.bits:>4}  {r.alone:>9.5f}  {r.together:>9.5f}")
    print(omissions.text(arguments.verbose))

    origin = provenance.record(vars(arguments), SEED, ("onnx", "safetensors", "rapidocr"))
    header = [field.name for field in dataclasses.fields(Result)]
    rows = map(dataclasses.astuple, results)
    write_results(NAME, arguments.output, header, rows, origin, digits=None)
    return omissions.exit_status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status: 1 if weights were skipped, 2 for an error."""
    quick = f"at most {QUICK_TENSORS} tensors, evenly over the files, and a smaller sample"
    return exit_status(NAME, run, weights_parser(NAME, __doc__, quick).parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
