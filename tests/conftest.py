"""The libraries that one test body runs on.

The fixture `xp` runs a test on NumPy and on the device engine, which the environment variable
CUBIN_TEST_ENGINE chooses: ``cuda`` is CuPy on a GPU, and fails where there is none.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

ENGINE = os.environ.get("CUBIN_TEST_ENGINE", "numpy")


@pytest.fixture(params=["numpy", pytest.param("device", marks=pytest.mark.kernels)])
def xp(request):
    """NumPy, or the device library of the engine."""
    if request.param == "numpy":
        return np
    if ENGINE == "numpy":
        pytest.skip("CUBIN_TEST_ENGINE=numpy: no device library")
    return request.getfixturevalue("device")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20181206)


@pytest.fixture
def host():
    """A function that brings an array of either library to NumPy."""
    return lambda array: array.get() if hasattr(array, "get") else np.asarray(array)


@pytest.fixture
def device():
    pytest.skip("CUBIN_TEST_ENGINE=numpy: no device library")
