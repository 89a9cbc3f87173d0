"""Libraries that some tests need and that need not be installed.

Without one its tests are skipped, and pytest says so. The environment variable CUBIN_TEST_REQUIRE
lists those that must be there, such as ``torch,jax``: then the tests fail instead.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np
import pytest

import cubin

REQUIRED = os.environ.get("CUBIN_TEST_REQUIRE", "").split(",")


def optional(name: str) -> Any:
    """The module of this name, or a skip where it is not installed."""
    if name in REQUIRED:
        return importlib.import_module(name)
    return pytest.importorskip(name)


def bfloat16() -> Any:
    """NumPy's dtype of bfloat16, or a skip where cubin does not take it."""
    dtype = pytest.importorskip("ml_dtypes").bfloat16
    try:
        cubin.sign(np.zeros(1, dtype))
    except TypeError:
        pytest.skip("cubin takes no bfloat16")
    return dtype
