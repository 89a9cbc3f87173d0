"""Multibit binarization of arrays on NumPy and CuPy."""

from __future__ import annotations

import importlib
from types import ModuleType

from cubin import bitmaps, errors, memory, operators
from cubin.code import BinaryCode
from cubin.quantize import multibit, quantize
from cubin.signs import multibit_grad, sign, sign_grad, ste_mask

__version__ = "0.1.0"

__all__ = [
    "BinaryCode",
    "analysis",
    "bitmaps",
    "errors",
    "memory",
    "multibit",
    "multibit_grad",
    "operators",
    "quantize",
    "sign",
    "sign_grad",
    "ste_mask",
    "surrogates",
    "tape",
    "theory",
]

_LAZY = ("analysis", "surrogates", "tape", "theory")


def __getattr__(name: str) -> ModuleType:
    # These bring SciPy or tqdm, or are not needed with arrays alone: they load when first used.
    if name in _LAZY:
        return importlib.import_module(f"cubin.{name}")
    raise AttributeError(f"module 'cubin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
