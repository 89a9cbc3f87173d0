"""What the tape needs of the device library, and the interpreter's stand-in for CuPy lacks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest


@pytest.fixture
def device(device, monkeypatch):
    """The device library, with as_strided and add.at where it is the stand-in."""
    try:
        from tests.ptx import array
        from tests.ptx import device as engine
    except ImportError:
        return device
    if device is not engine.module:
        return device

    def as_strided(x, shape, strides):
        host = np.lib.stride_tricks.as_strided(x._host, shape, strides)
        return array.ndarray(host, x._allocation)

    class Add:
        """The ufunc, whose `at` adds in place."""

        def __call__(self, *operands):
            return array._through_numpy(np.add, operands, {})

        def at(self, x, key, values):
            np.add.at(x._host, array._host_index(key), array._host_value(values))
            x._mark()

    tricks = SimpleNamespace(stride_tricks=SimpleNamespace(as_strided=as_strided))
    monkeypatch.setattr(engine.Module, "lib", tricks, raising=False)
    monkeypatch.setattr(engine.Module, "add", Add(), raising=False)
    return device
