"""Every CUDA kernel executed without a GPU: NVRTC's PTX, interpreted. See README.md."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tests.ptx.compiler import CompileError, Resources, compile, resources
from tests.ptx.faults import (
    AbsentLane,
    Deadlock,
    DivergentBarrier,
    ExitBeforeBarrier,
    Fault,
    Misaligned,
    NoProgress,
    OutOfBounds,
    Race,
    Trap,
    UninitializedRead,
)
from tests.ptx.launch import LAUNCHES, Launch
from tests.ptx.program import UnsupportedInstruction

__all__ = [
    "AbsentLane",
    "CompileError",
    "Deadlock",
    "DivergentBarrier",
    "ExitBeforeBarrier",
    "Fault",
    "Launch",
    "Misaligned",
    "NoProgress",
    "OutOfBounds",
    "Race",
    "Resources",
    "Trap",
    "UninitializedRead",
    "UnsupportedInstruction",
    "compile",
    "launches",
    "resources",
]


@contextlib.contextmanager
def launches() -> Iterator[list[Launch]]:
    """The list of the launches within this context, filled as they happen."""
    start = len(LAUNCHES)
    found: list[Launch] = []
    try:
        yield found
    finally:
        found += LAUNCHES[start:]
