"""What kernels on whole rows may take of a multiprocessor."""

from __future__ import annotations

import re

import pytest


def assert_registers_suffice(arch, device, monkeypatch, source, names, threads=1024):
    """No spills, and so many threads on a multiprocessor of 65536 registers."""
    compiler = pytest.importorskip("tests.ptx.compiler")
    from tests.ptx import device as engine

    asked = []

    def take(source, options, names=()):
        asked.append((source, options))
        return compiler.Compiled(source, arch, b"", "", {name: name for name in names})

    monkeypatch.setattr(engine, "_compiled", take)
    device.RawModule(code=source, name_expressions=names).compile()
    ((whole, options),) = asked
    log = compiler.compile(whole, arch, (*options, "--ptxas-options=-v"), names).log
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert spills == [("0", "0")] * len(names)
    registers = [int(used) for used in re.findall(r"Used (\d+) registers", log)]
    assert len(registers) == len(names)
    assert max(registers) <= 65536 // threads
