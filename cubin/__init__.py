"""Multibit binarization of arrays on NumPy and CuPy."""

from __future__ import annotations

import importlib
from types import ModuleType

from cubin import bitmaps, errors, operators
from cubin.binarize import multibit, quantize, sign, ste_mask
from cubin.codes.binary_code import BinaryCode
from cubin.core import memory
from cubin.gradients import multibit_grad, sign_grad

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
    "products",
    "quantize",
    "sign",
    "sign_grad",
    "ste_mask",
    "surrogates",
    "tape",
    "theory",
]

_LAZY = ("analysis", "products", "surrogates", "tape", "theory")


def __getattr__(name: str) -> ModuleType:
    # These bring SciPy or tqdm, or are not needed with arrays alone: they load when first used.
    if name in _LAZY:
        return importlib.import_module(f"cubin.{name}")
    raise AttributeError(f"module 'cubin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
