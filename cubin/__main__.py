"""The command line: `python -m cubin error`, `quantize` and `show`."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from cubin.commands import error, quantize, show
from cubin.commands.arguments import UsageError, parse_bits, parse_channel_axis, parse_count
from cubin.solvers import SOLVERS
from cubin.weights import WeightsError

STATUS = """exit status:
  0  every weight was used
  1  some were skipped: the summary names them with the reason
  2  nothing was done: the message says what to mend
  130  interrupted"""

ERROR_EXAMPLES = """examples:
  python -m cubin error model/
  python -m cubin error model.safetensors --bits 1-4 --solver greedy,refined --output results
  python -m cubin error model/ --plan
  python -m cubin error model/ --include 'mlp' --exclude 'embed' --workers 4 --output results
  python -m cubin error /shared/model/ --scheduler tcp://host:8786 --output results

With --output, results go to FOLDER/results.jsonl as they come: started again with the same
options, a run goes on where it stopped. FOLDER/error_per_bit_width.csv is written at the end.

"""
QUANTIZE_EXAMPLES = """examples:
  python -m cubin quantize model.safetensors --bits 2 --output codes.safetensors
  python -m cubin quantize model/ --bits 3 --map budget:1.4 --solver refined --output c.safetensors
  python -m cubin quantize model/ --bits 4 --precisions 2-4 --output c.safetensors

"""
SHOW_EXAMPLES = """examples:
  python -m cubin show codes.safetensors
  python -m cubin show codes.safetensors --weights model.safetensors

"""


def parse_iterations(text: str) -> int | None:
    if text == "none":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not none, nor an integer of at least 0")
    return int(text)


def parse_solvers(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SOLVERS:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(SOLVERS)}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} has a solver twice")
    return names


def argument_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="python -m cubin",
        description="Multibit binarization of the weights in files.",
        epilog=ERROR_EXAMPLES + QUANTIZE_EXAMPLES + SHOW_EXAMPLES + STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"cubin {importlib.import_module('cubin').__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, said: str, examples: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=said,
            description=f"{said[0].upper()}{said[1:]}.",
            epilog=examples + STATUS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.add_argument("--json", action="store_true", help="print JSON in the place of text")
        return added

    options = command("error", "what bit widths and solvers cost on weights", ERROR_EXAMPLES)
    add_weights(options)
    options.add_argument("--bits", type=parse_bits, default="1-8", help="1-8, 1,2,4 (default: 1-8)")
    options.add_argument(
        "--solver",
        type=parse_solvers,
        default="greedy",
        metavar="NAMES",
        help=f"of {', '.join(SOLVERS)}, with commas (default: greedy)",
    )
    options.add_argument("--output", type=Path, metavar="FOLDER", help="folder for the results")
    where = options.add_mutually_exclusive_group()
    where.add_argument(
        "--workers", type=parse_count, metavar="N", help="processes that share the cores"
    )
    where.add_argument(
        "--scheduler", metavar="ADDRESS", help="a scheduler of Dask, whose workers see the files"
    )
    options.add_argument(
        "--plan", action="store_true", help="print the work and the peak memory, and stop"
    )
    options.set_defaults(run=error.run)

    options = command("quantize", "write the codes of weights to a file", QUANTIZE_EXAMPLES)
    add_weights(options)
    options.add_argument(
        "--bits", type=parse_count, required=True, metavar="N", help="of each weight"
    )
    options.add_argument(
        "--map",
        type=quantize.parse_map,
        metavar="budget:MEAN",
        help="a bit map of at most --bits bits, MEAN of them on average",
    )
    options.add_argument(
        "--precisions",
        type=parse_bits,
        metavar="LIST",
        help="2-4, 1,2,4, which ends on --bits: the file serves each of them, with its own scales",
    )
    options.add_argument("--solver", choices=sorted(SOLVERS), default="greedy")
    options.add_argument("--shift", action="store_true", help="a constant for each row, too")
    options.add_argument("--output", type=Path, required=True, metavar="FILE", help=".safetensors")
    options.set_defaults(run=quantize.run)

    options = command("show", "sizes and effective bits of a file of codes", SHOW_EXAMPLES)
    options.add_argument("file", type=Path, metavar="FILE")
    options.add_argument(
        "--weights", type=Path, nargs="+", metavar="PATH", help="show the error against them"
    )
    options.set_defaults(run=show.run)
    return parser


def add_weights(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which weights, and which of them share scales."""
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help=".npy, .npz, .safetensors, .onnx, .gguf, .pt, .pth, .bin, .index.json, or a folder",
    )
    for name in ("include", "exclude"):
        parser.add_argument(
            f"--{name}", action="append", metavar="REGEX", help=f"{name} tensors of such names"
        )
    parser.add_argument(
        "--channel-axis",
        type=parse_channel_axis,
        default="auto",
        metavar="AXIS",
        help="the axis whose every index has scales of its own: auto (that of the operator that "
        "uses the tensor; 0 for files without a graph), an integer, or none (default: auto)",
    )
    parser.add_argument(
        "--group-size",
        type=parse_count,
        metavar="N",
        help="scales for every N consecutive weights of an output channel, and for those left over",
    )
    parser.add_argument(
        "--iterations",
        type=parse_iterations,
        default=2,
        metavar="N",
        help="of the solver alternating, or none: until it converges (default: 2)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--strict", action="store_true", help="refuse weights that cannot be used")
    parser.add_argument("--verbose", action="store_true", help="list all that is left out")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    arguments = argument_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except BrokenPipeError:  # the reader of the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (WeightsError, UsageError, OSError, RuntimeError, ValueError) as problem:
        lines = (str(problem) or type(problem).__name__).splitlines()
        print(f"cubin {arguments.command}: error: {lines[0]}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
