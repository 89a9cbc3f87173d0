"""The libraries that one test body runs on.

The fixture `xp` runs a test on NumPy and on a device library. Which one that is, the environment
variable CUBIN_TEST_ENGINE says: ``ptx`` (the default) executes the CUDA kernels without a GPU,
``cuda`` is CuPy on a GPU and fails where there is none, ``numpy`` leaves the kernels out.
"""

from __future__ import annotations

import ml_dtypes  # noqa: F401 (NumPy knows bfloat16 by its name from here on)
import numpy as np
import pytest
from hypothesis import settings

from tests import exhaustive
from tests.ptx.plugin import (
    device,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
    pytest_xdist_setupnodes,
)
from tests.ptx.plugin import pytest_configure as configure_interpreter

__all__ = [
    "device",
    "pytest_sessionfinish",
    "pytest_terminal_summary",
    "pytest_testnodedown",
    "pytest_xdist_setupnodes",
]


def pytest_configure(config: pytest.Config) -> None:
    """Leave out what takes long, unless it is asked for."""
    configure_interpreter()
    if not config.pluginmanager.has_plugin("exhaustive"):
        config.pluginmanager.register(exhaustive, "exhaustive")


# On a machine that is busy with other things, any test takes longer than a deadline.
settings.register_profile("cubin", deadline=None)
settings.load_profile("cubin")


@pytest.fixture(params=["numpy", pytest.param("device", marks=pytest.mark.kernels)])
def xp(request):
    """NumPy, or the device library of the engine."""
    return np if request.param == "numpy" else request.getfixturevalue("device")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20181206)


@pytest.fixture
def host():
    """A function that brings an array of either library to NumPy."""
    return lambda array: array.get() if hasattr(array, "get") else np.asarray(array)
