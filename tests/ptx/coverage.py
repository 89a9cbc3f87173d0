"""Which kernels and which lines of our CUDA text ran, from NVRTC's line information."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tests.ptx.launch import COVERAGE, EXECUTED, Lines


@dataclass
class Covered:
    """The lines of one text, numbered from 1, that became code and that ran."""

    text: str
    known: set[int] = field(default_factory=set)
    executed: set[int] = field(default_factory=set)

    @property
    def missed(self) -> list[tuple[int, str]]:
        """Lines that became code and never ran."""
        lines = self.text.splitlines()
        return [(number, lines[number - 1]) for number in sorted(self.known - self.executed)]


def of_text(text: str, arch: str | None = None) -> Covered:
    """Coverage of `text` wherever it stands in a source that ran, on `arch` or any.

    A line that no compiled source has code for (a comment, a declaration, a branch that the
    compiler folded into another) is not known, and so not missed.
    """
    wanted = text.strip("\n")
    covered = Covered(wanted)
    length = wanted.count("\n") + 1
    for (own_arch, source), lines in COVERAGE.items():
        if arch in (None, own_arch):
            for first in _places(wanted, source):
                _add(covered, lines, first, length)
    return covered


def _places(text: str, source: str) -> Iterable[int]:
    """Line numbers at which `text` begins in `source`; anything may stand for ``{name}``."""
    parts = (re.escape(part) for part in re.split(r"\{\w+\}", text))
    for match in re.finditer(r"[^\n]*".join(parts), source):
        yield source.count("\n", 0, match.start()) + 1


def _add(covered: Covered, lines: Lines, first: int, length: int) -> None:
    for kind in ("known", "executed"):
        inside = {n - first + 1 for n in getattr(lines, kind) if first <= n < first + length}
        getattr(covered, kind).update(inside)


def record() -> dict[str, Any]:
    """What ran in this process, in types that can be sent to another one."""
    lines = [
        (*place, sorted(seen.known), sorted(seen.executed)) for place, seen in COVERAGE.items()
    ]
    return {"kernels": sorted(EXECUTED), "lines": lines}


def add(other: dict[str, Any]) -> None:
    """Count what ran in another process as if it had run in this one."""
    EXECUTED.update(other["kernels"])
    for arch, source, known, executed in other["lines"]:
        COVERAGE[arch, source].known.update(known)
        COVERAGE[arch, source].executed.update(executed)


def gaps(kernels: Iterable[str], texts: dict[str, str], arch: str) -> list[str]:
    """The kernels that never ran, and the lines of `texts` that have code on `arch` and never ran.

    Parameters
    ----------
    kernels : iterable of str
        Names as CUDA has them, without template arguments.
    texts : dict of str to str
        CUDA text by the name that messages call it.
    arch : str
        ``compute_XX``.
    """
    return [
        *(f"{name} never ran" for name in sorted(set(kernels) - EXECUTED)),
        *(
            f"{name}:{number} never ran: {line.strip()}"
            for name, text in texts.items()
            for number, line in of_text(text, arch).missed
        ),
    ]
