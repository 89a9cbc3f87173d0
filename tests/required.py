"""Optional libraries of tests: without one, its tests are skipped, or fail where it is required.

The environment variable CUBIN_TEST_REQUIRE lists, with commas, the libraries that must be there.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest

REQUIRED = {name.strip() for name in os.environ.get("CUBIN_TEST_REQUIRE", "").split(",")}


def require(name: str) -> Any:
    """The library of this name; a visible skip without it, a failure if it is required."""
    if name in REQUIRED:
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=f"{name} is not installed")
