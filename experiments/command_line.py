"""What the experiments' command lines share: arguments, the array library, what is left out."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cubin.weights import NotFiniteError, Weight, Weights, WeightsError
from cubin.weights.tensor import computable

MAX_BITS = 16
LISTED = 8
"""How many skipped tensors are listed unless all are asked for."""


class UsageError(Exception):
    """What was asked for cannot be done; the message is one line and says what to do."""


def parse_bits(text: str) -> list[int]:
    """Read bit widths such as `1-8`, `1,2,4` or `1-4,8`.

    Returns
    -------
    list of int
        The widths in ascending order, each once.
    """
    widths: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            low, high = int(first), int(last if dash else first)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no list of bit widths; write it like 1-8 or 1,2,4"
            ) from None
        if not 1 <= low <= high <= MAX_BITS:
            raise argparse.ArgumentTypeError(
                f"{part!r}: bit widths go upwards and lie between 1 and {MAX_BITS}"
            )
        widths.update(range(low, high + 1))
    return sorted(widths)


def weights_parser(name: str, documentation: str | None, quick: str) -> argparse.ArgumentParser:
    """Make the parser of a script that measures weights.

    Parameters
    ----------
    name : str
        The script's, without `.py`.
    documentation : str
        Its docstring: the first paragraph is shown before the arguments, the rest after them.
    quick : str
        What `--quick` does.

    Returns
    -------
    ArgumentParser
        With the arguments paths, device, output, quick, strict and verbose.
    """
    description, _, details = (documentation or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog=f"{name}.py", description=description, epilog=details)
    parser.add_argument(
        "paths",
        nargs="*",
        type=Path,
        metavar="PATH",
        help=".npy, .npz, .safetensors or .onnx files, or folders of these "
        "(default: the networks of the package rapidocr)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="cpu: NumPy; cuda: CuPy; auto: cuda where there is a GPU (default: auto)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output"),
        metavar="FOLDER",
        help="folder for the results (default: output)",
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument(
        "--strict",
        action="store_true",
        help="refuse weights that cannot be used, such as those with NaN or infinity "
        "(default: skip them, say so, and exit with status 1)",
    )
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="list every tensor that is left out, and why",
    )
    return parser


def array_library(device: str) -> Any:
    """Choose NumPy or CuPy."""
    if device == "cpu":
        return np
    try:
        import cupy

        if cupy.cuda.is_available():
            return cupy
        reason = "CuPy finds no CUDA GPU"
    except ImportError:
        reason = "CuPy is not installed (pip install '.[cuda12]' or '.[cuda13]')"
    if device == "cuda":
        raise UsageError(f"--device cuda: {reason}; use --device cpu")
    return np


INSTALL = "install the extra `examples`: pip install '.[examples]'"


def pretrained_sample() -> list[Path]:
    """Find the OCR networks of the installed package rapidocr, without importing it.

    Returns
    -------
    list of Path
        Its ONNX files.

    Raises
    ------
    WeightsError
        If rapidocr is not installed, or carries no ONNX files (releases before 3.10 may not).
    """
    package = importlib.util.find_spec("rapidocr")
    folders = package.submodule_search_locations if package else None
    files = sorted(file for folder in folders or [] for file in Path(folder).rglob("*.onnx"))
    if not files:
        raise WeightsError(
            f"the pretrained sample is in the package rapidocr (3.10 or newer); {INSTALL}, "
            "or give weight files of your own"
        )
    return files


class Omissions:
    """The tensors that a run leaves out, and why.

    Parameters
    ----------
    weights : Weights
        Those of the files.
    strict : bool
        Whether to refuse weights that cannot be used.

    Attributes
    ----------
    skipped : list of Weight
        Weights that cannot be used. They make the run incomplete: its exit status is 1.
    left_out : list of Weight
        What is no weight, and weights that the run does not ask for.

    Raises
    ------
    WeightsError
        If strict, and there are weights that cannot be read.
    """

    def __init__(self, weights: Weights, strict: bool) -> None:
        self.strict = strict
        self.skipped = list(weights.skipped)
        self.left_out = list(weights.left_out)
        if strict and self.skipped:
            raise WeightsError(
                f"{self.skipped[0].name}: {self.skipped[0].reason} "
                f"(one of {len(self.skipped)} such weights; without --strict they are skipped)"
            )

    def finite(self, weights: Iterable[Weight]) -> Iterator[tuple[Weight, np.ndarray]]:
        """Load weights one by one, and skip those with NaN or infinity.

        Raises
        ------
        WeightsError
            If a tensor cannot be read; if strict, or none is left, at NaN or infinity.
        """
        empty, last = True, None
        for weight in weights:
            try:
                array = weight.load()
            except NotFiniteError as error:
                if self.strict:
                    raise
                self.skipped.append(replace(weight, reason=error.reason))
                last = error
                continue
            empty = False
            yield weight, computable(array)
        if empty and last is not None:
            raise last

    @property
    def exit_status(self) -> int:
        """0 if every weight was used, else 1."""
        return 1 if self.skipped else 0

    def text(self, verbose: bool) -> str:
        """Say what is left out: how many tensors for each reason, or every one of them."""
        lines = []
        if self.skipped:
            listed = self.skipped if verbose else self.skipped[:LISTED]
            lines.append(f"Skipped {len(self.skipped)} weight tensors that cannot be used:")
            lines += [f"  {described(tensor)}" for tensor in listed]
            if len(listed) < len(self.skipped):
                lines.append(f"  and {len(self.skipped) - len(listed)} more (--verbose)")
        if self.left_out:
            lines.append("Left out:")
            if verbose:
                lines += [f"  {described(tensor)}" for tensor in self.left_out]
            else:
                counts = Counter((kind(tensor.dtype), tensor.reason) for tensor in self.left_out)
                lines += [
                    f"  {count} other {dtype} tensors: {reason}"
                    for (dtype, reason), count in counts.most_common(LISTED)
                ]
                if len(counts) > LISTED:
                    lines.append("  and others (--verbose)")
        return "\n".join(lines)

    def record(self) -> dict[str, list[dict[str, Any]]]:
        """Describe what is left out, as values that JSON can hold."""
        return {
            name: [
                {"name": t.name, "shape": list(t.shape), "dtype": t.dtype, "reason": t.reason}
                for t in tensors
            ]
            for name, tensors in (("skipped", self.skipped), ("left_out", self.left_out))
        }


def kind(dtype: str) -> str:
    return "float" if dtype.startswith(("float", "bfloat")) else dtype


def described(tensor: Weight) -> str:
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    return f"{tensor.name} ({shape}, {tensor.dtype}): {tensor.reason}"


def exit_status(
    name: str, run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace
) -> int:
    """Run a script; say what the user can mend in one line, and return 2 for it."""
    try:
        return run(arguments)
    except (WeightsError, UsageError, OSError) as error:
        print(f"{name}.py: error: {error}", file=sys.stderr)
        return 2
