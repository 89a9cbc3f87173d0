"""What a shift gains on data that are not symmetric about zero.

It codes samples of an exponential law, of the outputs of a ReLU whose inputs are Gaussian, and of a
Gaussian, with scales per row, by every solver without and with a shift. It prints a table, and
writes skewed.csv and .json (where the figures come from) to the output folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import provenance
from command_line import exit_status, output_parser, write_results
from tqdm import tqdm

import cubin
from cubin.commands.arguments import make_folder
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
    return output_parser(NAME, __doc__, "smaller samples")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write the results; return the exit status."""
    found = list(results(QUICK_SHAPE if arguments.quick else SHAPE))
    print(table(found))
    make_folder(arguments.output)
    origin = provenance.record(vars(arguments), SEED)
    rows = map(dataclasses.astuple, found)
    write_results(NAME, arguments.output, COLUMNS, rows, origin, digits=None)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status, 2 for what the user can mend."""
    return exit_status(NAME, run, argument_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
