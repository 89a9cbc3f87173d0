"""`python -m cubin quantize`: the codes of a checkpoint's weights, in one file."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cubin.binarize import quantize
from cubin.bitmaps import budget
from cubin.codes.binary_code import BinaryCode
from cubin.commands.arguments import UsageError, array_library
from cubin.commands.error import Chosen, choose, sweep_for
from cubin.commands.omissions import Omissions
from cubin.weights import NotFiniteError, Weights, WeightsError
from cubin.weights.codes import save_codes
from cubin.weights.tensor import first_line


def parse_map(text: str) -> float:
    """Read `budget:1.4`, a map of 1.4 bits on average.

    Returns
    -------
    float
    """
    kind, _, number = text.partition(":")
    try:
        mean = float(number)
    except ValueError:
        mean = -1.0
    if kind != "budget" or not 0 < mean <= 16:
        raise argparse.ArgumentTypeError(f"{text!r} is no map; write it like budget:1.4")
    return mean


def map_of(mean: float, bits: int) -> Callable[..., Any]:
    """A map of 0 or 1 to `bits` bits, `mean` of them on average."""
    least = 1 if mean >= 1 else 0

    def make(x: Any, **granularity: Any) -> Any:
        return budget(x, mean, min_bits=least, max_bits=bits, **granularity)

    return make


def codes(
    chosen: list[Chosen], arguments: argparse.Namespace, omissions: Omissions
) -> Iterator[tuple[str, BinaryCode]]:
    """Quantize weights one by one; those that cannot be are skipped."""
    make = map_of(arguments.map, arguments.bits) if arguments.map is not None else None
    with tqdm(
        total=sum(one.weight.size for one in chosen),
        unit=" weights",
        unit_scale=True,
        delay=1,
        leave=False,
        disable=None,
    ) as bar:
        for one in chosen:
            grouped = one.group_size is not None
            granularity: dict[str, Any] = {
                "channel_axis": None if grouped else one.channel_axis,
                "group_size": one.group_size,
            }
            try:
                x = one.load()
                bits = arguments.bits if make is None else make(x, **granularity)
                yield (
                    one.name,
                    quantize(
                        x,
                        bits,
                        solver=arguments.solver,
                        iterations=arguments.iterations,
                        shift=arguments.shift,
                        precisions=arguments.precisions,
                        **granularity,
                    ),
                )
            except (WeightsError, ValueError, MemoryError) as error:
                if omissions.strict:
                    raise WeightsError(str(error)) from error
                reason = error.reason if isinstance(error, NotFiniteError) else first_line(error)
                reason = reason.removeprefix(f"{one.name}: ")
                omissions.skipped.append(replace(one.weight, reason=reason))
            bar.update(one.weight.size)


def check_output(path: Path, weights: Iterable[Path]) -> None:
    """See that the codes have a place, before any work is done.

    Raises
    ------
    UsageError
        If there is no such folder, if the name is that of a folder or of another kind of file, or
        if the codes would replace the weights.
    """
    if not path.parent.is_dir():
        raise UsageError(f"--output {path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise UsageError(f"--output {path}: it is a folder; give a file in it")
    if path.suffix.lower() != ".safetensors":
        raise UsageError(f"--output {path}: codes are written as .safetensors; end its name so")
    if path.resolve() in {file.resolve() for file in weights}:
        raise UsageError(f"--output {path}: the weights are in it; choose another file")


def run(arguments: argparse.Namespace) -> int:
    """Quantize, write the codes, and return the exit status."""
    library = array_library(arguments.device).__name__
    if arguments.map is not None and arguments.map > arguments.bits:
        raise UsageError(
            f"--map budget:{arguments.map:g} needs more than the {arguments.bits} bits of --bits"
        )
    if arguments.precisions is not None:
        if arguments.map is not None:
            raise UsageError("--precisions and --map exclude each other")
        if arguments.precisions[-1] != arguments.bits:
            listed = ",".join(map(str, arguments.precisions))
            raise UsageError(f"--precisions {listed} must end on the {arguments.bits} of --bits")
    sweep_for(arguments.bits, arguments.solver, arguments.group_size, arguments.iterations)
    weights = Weights(arguments.paths, arguments.include, arguments.exclude)
    check_output(arguments.output, weights.files)
    omissions = Omissions(weights, arguments.strict)
    chosen = choose(weights.tensors, arguments.channel_axis, arguments.group_size, library)
    totals: dict[str, Any] = {"tensors": 0, "weights": 0, "effective": 0.0}

    def counted() -> Iterator[tuple[str, BinaryCode]]:
        for name, code in codes(chosen, arguments, omissions):
            totals["tensors"] += 1
            size = math.prod(code.shape)
            totals["weights"] += size
            totals["effective"] += code.effective_bits * size
            yield name, code
        if not totals["tensors"]:
            first = omissions.skipped[0]
            raise WeightsError(f"{first.name}: {first.reason}; no weight is left")

    shapes = {one.name: one.shape for one in chosen}
    nbytes = save_codes(arguments.output, counted(), shapes)
    said = {
        "tensors": totals["tensors"],
        "weights": totals["weights"],
        "effective_bits": totals["effective"] / max(totals["weights"], 1),
        "file_bits": 8 * nbytes / max(totals["weights"], 1),
        "bytes": nbytes,
    }
    if arguments.json:
        print(json.dumps(said | omissions.record()))
        return omissions.exit_status
    print(
        f"{said['tensors']} of {len(weights) + len(weights.skipped)} weight tensors, "
        f"{said['weights']:,} weights at {said['effective_bits']:.3f} effective bits."
    )
    if text := omissions.text(arguments.verbose):
        print(text)
    print(f"Written: {arguments.output}, {nbytes:,} bytes: {said['file_bits']:.3f} bits per weight")
    if omissions.skipped:
        print("Weights that are skipped are not in the file.", file=sys.stderr)
    return omissions.exit_status
