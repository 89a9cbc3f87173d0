"""Arguments of the commands, and what the user can mend."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from cubin.core import libraries

MAX_BITS = 16


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


def parse_channel_axis(text: str) -> int | str:
    if text in {"auto", "none"}:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, none or an integer") from None


def parse_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def make_folder(folder: Path) -> None:
    """Make the folder of `--output`, or of a part of it.

    Raises
    ------
    UsageError
        If that cannot be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {folder}: {error.strerror}; choose another") from error


def array_library(device: str) -> Any:
    """Choose NumPy or CuPy."""
    if device == "cpu":
        return np
    try:
        return libraries.with_gpu()
    except RuntimeError as error:
        if device == "cuda":
            raise UsageError(f"--device cuda: {error}; use --device cpu") from error
        return np
