"""Multibit binarization: arrays of NumPy, CuPy, PyTorch and JAX as sums of scaled signs.

``quantize(x, bits)`` gives a `BinaryCode`: scales, and packed signs. ``multibit(x, bits)`` gives
the approximation alone, ``sign(x)`` the signs. `multibit_grad` and `sign_grad` are the gradients.

===============  ===========================================================================
`bitmaps`        how many bits every element gets: ``budget``, ``allocate``, ``ternary``
`errors`         ``relative_mse``, ``sqnr_db`` and others; ``output_mse`` of a layer
`Gram`           what a layer's inputs say about the error of its outputs
`products`       ``linear`` and ``conv2d`` with packed codes
`analysis`       ``error_per_bit_width``: tables and figures
`theory`         the same errors of a ``scipy.stats`` law, without samples
`weights`        the weights of files, read one tensor at a time; ``python -m cubin``
`torch`, `jax`   functions and modules of these libraries, with gradients
`surrogates`     other gradients by name
`operators`      forward and backward rules for any autodiff
`tape`           a minimal autodiff tape
`memory`         how much memory of dropped results is kept
===============  ===========================================================================

Examples
--------
>>> import numpy as np, cubin
>>> code = cubin.quantize(np.array([[1.0, -3.0], [0.5, 0.5]]), 2, channel_axis=0)
>>> code.scales.tolist()
[[2.0, 0.5], [1.0, 0.0]]
>>> code.dequantize().tolist()
[[1.0, -3.0], [0.5, 0.5]]
"""

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
