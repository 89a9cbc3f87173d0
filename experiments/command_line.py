"""What the experiments' command lines share: arguments, the pretrained sample, files, errors."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cubin.commands.arguments import UsageError
from cubin.weights import WeightsError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def output_parser(name: str, documentation: str | None, quick: str) -> argparse.ArgumentParser:
    """Make the parser of a script that writes its results to a folder.

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
        With the arguments output and quick.
    """
    description, _, details = (documentation or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog=f"{name}.py", description=description, epilog=details)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output"),
        metavar="FOLDER",
        help="folder for the results (default: output)",
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def weights_parser(name: str, documentation: str | None, quick: str) -> argparse.ArgumentParser:
    """Make the parser of a script that measures weights.

    Parameters
    ----------
    name, documentation, quick
        As those of `output_parser`.

    Returns
    -------
    ArgumentParser
        With the arguments paths, device, output, quick, strict and verbose.
    """
    parser = output_parser(name, documentation, quick)
    parser.add_argument(
        "paths",
        nargs="*",
        type=Path,
        metavar="PATH",
        help="files of weights (.npy, .npz, .safetensors, .onnx, .gguf, .pt), or folders of these "
        "(default: the networks of the package rapidocr)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="cpu: NumPy; cuda: CuPy; auto: cuda where there is a GPU (default: auto)",
    )
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


def exit_status(
    name: str, run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace
) -> int:
    """Run a script; say what the user can mend in one line, and return 2 for it."""
    try:
        return run(arguments)
    except (WeightsError, UsageError, OSError) as error:
        print(f"{name}.py: error: {error}", file=sys.stderr)
        return 2


def write_results(
    name: str,
    folder: Path,
    header: Sequence[str],
    rows: Iterable[Sequence[Any]],
    origin: Mapping[str, Any],
    figure: Figure | None = None,
    dpi: int = 100,
    digits: int | None = 6,
) -> None:
    """Write what a script measured to its folder, and say so.

    Parameters
    ----------
    name : str
        The script's, without `.py`, and that of the files.
    folder : Path
        An existing one.
    header, rows
        The table.
    origin : mapping
        The record of the run: see `provenance`.
    figure : Figure, optional
    dpi : int
        The figure's dots per inch.
    digits : int or None
        Of the floats in the table; None for all that they have.
    """
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for row in rows:
            cut = digits is not None
            writer.writerow([f"{v:.{digits}g}" if cut and isinstance(v, float) else v for v in row])
    if figure is not None:
        figure.savefig(folder / f"{name}.png", dpi=dpi)
    text = json.dumps(origin, indent=2) + "\n"
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    print(f"Written to {folder}: {name}.csv,{'' if figure is None else ' .png,'} .json")
