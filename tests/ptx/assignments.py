"""Which registers a function may read before it wrote them, as its control flow alone tells.

Nearly all registers are written on every way to every read. Only the others have to be watched
while a kernel runs, which keeps the check from costing anything where there is nothing to find.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tests.ptx.program import (
    Address,
    Function,
    Instruction,
    Negated,
    Operand,
    Pair,
    Register,
    Symbol,
    Vector,
)

_WRITES_NOTHING = {
    "st", "red", "bra", "brx", "ret", "exit", "call", "trap", "membar", "fence", "nanosleep",
    "pmevent", "brkpt", "prefetch", "prefetchu",
}  # fmt: skip

_ENDS = {"bra", "brx", "ret", "exit", "trap"}

MOVES = {"mov", "selp"}
"""Instructions that hand on a value without looking at it."""


def registers_of(operand: Operand | None) -> Iterator[Register]:
    """All registers that an operand names."""
    match operand:
        case Register() as register:
            yield register
        case Negated(register=register):
            yield register
        case Address(base=Register() as base):
            yield base
        case Vector(items=items):
            for item in items:
                yield from registers_of(item)
        case Pair(first=first, second=second):
            yield from registers_of(first)
            yield from registers_of(second)


def written_by(what: Instruction) -> list[Register]:
    """The registers that an instruction writes, under its guard or not."""
    barrier = what.name in ("bar", "barrier") and "red" not in what.opcode
    if what.name in _WRITES_NOTHING or barrier or not what.operands:
        return []
    return list(registers_of(what.operands[0]))


def read_by(what: Instruction) -> list[Register]:
    """The registers that an instruction reads, its guard among them."""
    found = [] if what.guard is None else [what.guard]
    writes = bool(written_by(what)) or (bool(what.operands) and what.operands[0] is None)
    for operand in what.operands[1:] if writes else what.operands:
        found += registers_of(operand)
    return found


def _successors(function: Function, at: int) -> list[int]:
    """Where a lane may be after instruction `at`; beyond the last one it has left."""
    what = function.body[at]
    after = [at + 1] if what.guard is not None else []
    if what.name == "bra":
        (target,) = what.operands
        return [function.labels[target.name], *after] if isinstance(target, Symbol) else after
    if what.name == "brx":
        table = what.operands[1]
        labels = function.tables[table.name] if isinstance(table, Symbol) else []
        return [*(function.labels[label] for label in labels), *after]
    if what.name in ("ret", "exit", "trap"):
        return after
    return [at + 1]


def doubtful(function: Function) -> frozenset[int]:
    """The registers, by index, of which some lane might read what it has not written.

    Those that moves copy them into are among them: nothing was written there, either.
    """
    body = function.body
    reads = [read_by(what) for what in body]
    writes = [written_by(what) for what in body]
    return _with_copies(body, reads, writes, _read_early(function, reads, writes))


def _read_early(
    function: Function, reads: Sequence[list[Register]], writes: Sequence[list[Register]]
) -> set[int]:
    """The registers that are read on a way from the start that does not write them first."""
    body, end = function.body, len(function.body)
    jumps = {at for at, what in enumerate(body) if what.name in _ENDS}
    starts = {0, *function.labels.values(), *(at + 1 for at in jumps), end}
    found: set[int] = set()
    assigned = {0: 0}  # of every way to a block's start, which registers are written, as bits
    waiting = [0] if body else []
    while waiting:
        at = waiting.pop()
        here = assigned[at]
        while True:
            what = body[at]
            found.update(r.index for r in reads[at] if not here >> r.index & 1)
            if what.guard is None:
                for register in writes[at]:
                    here |= 1 << register.index
            at += 1
            if at in starts:
                break
        for place in _successors(function, at - 1):
            both = here & assigned.get(place, here)
            if place < end and assigned.get(place) != both:
                assigned[place] = both
                waiting.append(place)
    return found


def _with_copies(
    body: Sequence[Instruction],
    reads: Sequence[list[Register]],
    writes: Sequence[list[Register]],
    early: set[int],
) -> frozenset[int]:
    """These registers, and all that hold what moves took from them."""
    copies: dict[int, set[int]] = {}
    for what, sources, targets in zip(body, reads, writes, strict=True):
        if what.name in MOVES:
            for source in sources:
                copies.setdefault(source.index, set()).update(t.index for t in targets)
    waiting, found = list(early), set(early)
    while waiting:
        fresh = copies.get(waiting.pop(), set()) - found
        found |= fresh
        waiting += fresh
    return frozenset(found)
