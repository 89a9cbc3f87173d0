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
            return array.through_numpy(np.add, operands, {})

        def at(self, x, key, values):
            np.add.at(x._host, array._host_index(key), array._host_value(values))
            x._mark()

    tricks = SimpleNamespace(stride_tricks=SimpleNamespace(as_strided=as_strided))
    monkeypatch.setattr(engine.Module, "lib", tricks, raising=False)
    monkeypatch.setattr(engine.Module, "add", Add(), raising=False)
    return device


@pytest.fixture
def forbid_moves(device, monkeypatch):
    """A function that lets every later move between host and device fail."""
    stand_in = pytest.importorskip("tests.ptx.device")
    if device is not stand_in.module:
        pytest.skip("CuPy's arrays cannot be watched, those of the stand-in can")
    plain = stand_in.Module.asarray

    def refuse(what):
        def moved(*_, **__):
            raise AssertionError(f"{what} moves data between host and device")

        return moved

    def asarray(self, values, *options):
        if not isinstance(values, stand_in.ndarray):
            refuse("asarray")()
        return plain(self, values, *options)

    def forbid():
        methods = ("get", "set", "item", "tolist", "__bool__", "__int__", "__float__", "__index__")
        for name in methods:
            monkeypatch.setattr(stand_in.ndarray, name, refuse(f"ndarray.{name}"))
        for name in ("asarray", "array"):
            monkeypatch.setattr(stand_in.Module, name, asarray)
        monkeypatch.setattr(stand_in.Module, "asnumpy", refuse("asnumpy"))

    return forbid
