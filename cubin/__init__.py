"""Multibit binarization of arrays on NumPy and CuPy."""

from __future__ import annotations

from cubin import bitmaps, errors, operators
from cubin.code import BinaryCode
from cubin.quantize import multibit, quantize
from cubin.signs import multibit_grad, sign, sign_grad, ste_mask

__version__ = "0.1.0"

__all__ = [
    "BinaryCode",
    "bitmaps",
    "errors",
    "multibit",
    "multibit_grad",
    "operators",
    "quantize",
    "sign",
    "sign_grad",
    "ste_mask",
]
