"""What a shift gains on data that are not symmetric about zero.

It codes samples of an exponential law, of the outputs of a ReLU whose inputs are Gaussian, and of a
Gaussian, with scales per row, by every solver without and with a shift. It prints a table, and
writes skewed.csv and .json (where the figures come from) to the output folder.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import provenance
from tqdm import tqdm

import cubin
from cubin.solvers import SOLVERS

NAME = "skewed"
SEED = 0
BITS = range(1, 5)
SHAPE = (64, 4096)
QUICK_SHAPE = (8, 512)

DATA = {
    "exponential": lambda rng, shape: rng.exponential(size=shape),
    "ReLU of a Gaussian": lambda rng, shape: rng.standard_normal(shape).clip(0),
    "Gaussian": lambda rng, shape: rng.standard_normal(shape),
}


@dataclass(frozen=True)
class Result:
    """What a solver did with some data.

    Attributes
    ----------
    data, solver : str
    bits : int
    shift : int
        1 with a shift, else 0.
    effective_bits, relative_mse : float
    """

    data: str
    solver: str
    bits: int
    shift: int
    effective_bits: float
    relative_mse: float


COLUMNS = [field.name for field in dataclasses.fields(Result)]


def results(shape: tuple[int, int]) -> Iterator[Result]:
    """Code float32 samples, the same in every run."""
    rng = np.random.default_rng(SEED)
    samples = {data: draw(rng, shape).astype(np.float32) for data, draw in DATA.items()}
    cases = list(itertools.product(DATA, SOLVERS, BITS, (False, True)))
    for data, solver, bits, shift in tqdm(cases, NAME, disable=None):
        x = samples[data]
        code = cubin.quantize(x, bits, channel_axis=0, solver=solver, shift=shift)
        error = float(cubin.errors.relative_mse(x, code.dequantize()))
        yield Result(data, solver, bits, int(shift), code.effective_bits, error)


def table(found: Sequence[Result]) -> str:
    """The results as aligned text."""
    lines = [f"{'data':<20}{'solver':<13}{'bits':>4}  {'without':>8}  {'with a shift':>12}"]
    for one, other in zip(found[::2], found[1::2], strict=True):
        lines.append(
            f"{one.data:<20}{one.solver:<13}{one.bits:>4}  {one.relative_mse:>8.4f}  "
            f"{other.relative_mse:>12.4f}"
        )
    return "\n".join(lines)


def argument_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(prog=f"{NAME}.py", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("output"), metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="smaller samples")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    arguments = argument_parser().parse_args(argv)
    found = list(results(QUICK_SHAPE if arguments.quick else SHAPE))
    print(table(found))
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / f"{NAME}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(dataclasses.astuple(result) for result in found)
    origin = provenance.record(vars(arguments), SEED)
    path = arguments.output / f"{NAME}.json"
    path.write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    print(f"Written to {arguments.output}: {NAME}.csv, .json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
