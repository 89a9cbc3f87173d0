"""What a run can find wrong. Every fault names kernel, block, thread and source line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where a fault happened: the first thread that shows it."""

    kernel: str
    block: tuple[int, int, int]
    thread: tuple[int, int, int]
    line: int
    source: str
    instruction: str

    def __str__(self) -> str:
        return (
            f"kernel {self.kernel}, block {self.block}, thread {self.thread}, "
            f"line {self.line}: {self.source.strip()}\n  {self.instruction}"
        )


class Fault(Exception):
    """A kernel broke a rule; `place` says where."""

    def __init__(self, message: str, place: Place) -> None:
        super().__init__(f"{message}\n  {place}")
        self.place = place


class OutOfBounds(Fault):
    """An address outside what the kernel was given."""


class Misaligned(Fault):
    """An address that is no multiple of the access's size."""


class Race(Fault):
    """Two threads touched the same memory, one of them wrote, and nothing orders them."""


class UninitializedRead(Fault):
    """Memory or a register was read that nothing wrote."""


class DivergentBarrier(Fault):
    """Threads of one block wait at different barriers."""


class ExitBeforeBarrier(Fault):
    """Threads wait at a barrier that others of their block left without."""


class AbsentLane(Fault):
    """A warp instruction reads a lane that does not take part in it."""


class Deadlock(Fault):
    """Threads wait for others that never come."""


class NoProgress(Fault):
    """A launch ran longer than any kernel of this project should."""


class Trap(Fault):
    """The kernel stopped itself: ``trap`` or a failed ``assert``."""
