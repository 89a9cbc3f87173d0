"""Multibit binarization of arrays on NumPy and CuPy."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from cubin.binarize import multibit, quantize, sign, ste_mask
from cubin.calibration import Gram
from cubin.codes.binary_code import BinaryCode
from cubin.core import memory
from cubin.gradients import multibit_grad, sign_grad

if TYPE_CHECKING:
    from cubin import bitmaps, errors, operators

__version__ = "0.1.0"

__all__ = [
    "BinaryCode",
    "Gram",
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
    "weights",
]

_LAZY = (
    "analysis", "bitmaps", "errors", "jax", "operators", "products", "surrogates", "tape", "theory",
    "torch", "weights",
)  # fmt: skip


def __getattr__(name: str) -> ModuleType:
    # What not every program needs is loaded when it is first used.
    if name in _LAZY:
        return importlib.import_module(f"cubin.{name}")
    raise AttributeError(f"module 'cubin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
