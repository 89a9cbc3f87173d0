"""Where threads meet or part: branches, exits, barriers, shuffles and votes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tests.ptx import faults
from tests.ptx.machine import Batch, Selection, Step, Waiting
from tests.ptx.operands import Operands
from tests.ptx.program import Instruction, Operand, Pair, Symbol, UnsupportedInstruction
from tests.ptx.races import Lanes

Act = Callable[[Batch, Lanes, NDArray[np.uint32]], None]
"""What a warp instruction does for lanes that have all come, given their masks."""


class Crossings(Operands):
    """The instructions that end a basic block."""

    def end(self, at: int, what: Instruction) -> Step | None:
        """How a block ends at instruction `at`; ``None`` for a plain instruction."""
        name = what.name
        if name in ("bra", "brx"):
            return self._branch(at, what)
        if name in ("ret", "exit"):
            return self._leave(at, what)
        if name in ("bar", "barrier"):
            return self._barrier(at, what)
        sync = {
            "shfl": self._shuffle,
            "vote": self._vote,
            "match": self._match,
            "redux": self._reduce,
        }
        if name in sync:
            if "sync" not in what.opcode:
                raise UnsupportedInstruction(what.text)
            return self._at_warp(at, what, what.operands[-1], sync[name](what))
        return None

    def _leave(self, at: int, what: Instruction) -> Step:
        return self._split(what, lambda b, s: b.leave(s), at + 1)

    def _split(self, what: Instruction, act: Step, after: int) -> Step:
        """`act` for the lanes whose guard holds; the others go on."""
        if what.guard is None:
            return act
        guard, wrong = self.predicate(what.guard, what), what.negated

        def step(b: Batch, s: Selection) -> None:
            taken = guard(b, s) != wrong
            if taken.all():
                act(b, s)
            elif not taken.any():
                b.schedule(after, s)
            else:
                lanes = b.lanes(s)
                act(b, lanes[taken])
                b.schedule(after, lanes[~taken])

        return step

    def _branch(self, at: int, what: Instruction) -> Step:
        if what.name == "bra":
            target = what.operands[0]
            if not isinstance(target, Symbol):
                raise UnsupportedInstruction(what.text)
            place = self.function.labels[target.name]
            return self._split(what, lambda b, s: b.schedule(place, s), at + 1)
        table = what.operands[1]
        if not isinstance(table, Symbol):
            raise UnsupportedInstruction(what.text)
        places = np.array([self.function.labels[t] for t in self.function.tables[table.name]])
        read = self.read(what.operands[0], "u32", what)

        def jump(b: Batch, s: Selection) -> None:
            lanes = b.lanes(s)
            index = np.broadcast_to(read(b, s), lanes.shape)
            if (index >= len(places)).any():
                b.fail(faults.Trap, "jump beyond its table", what, lanes[index >= len(places)])
            for one in np.unique(index):
                b.schedule(int(places[one]), lanes[index == one])

        return self._split(what, jump, at + 1)

    def _barrier(self, at: int, what: Instruction) -> Step:
        if "warp" in what.opcode:

            def order(b: Batch, lanes: Lanes, masks: NDArray[np.uint32]) -> None:
                b.clock.pass_warp_barrier(lanes, masks)

            return self._at_warp(at, what, what.operands[0], order)
        if "arrive" in what.opcode:
            raise UnsupportedInstruction(what.text)
        operands, fire = list(what.operands), _nothing
        if "red" in what.opcode:
            target, *operands, source = operands
            fire = self._barrier_reduction(what, target, source)
        name = self.read(operands[0], "u32", what)
        count = self.read(operands[1], "u32", what) if len(operands) > 1 else None

        def step(b: Batch, s: Selection) -> None:
            lanes = b.lanes(s)
            names = np.broadcast_to(name(b, s), lanes.shape).astype(np.uint32)
            wanted = 0 if count is None else int(count(b, s)[0])
            if wanted == b.threads:
                wanted = 0
            b.arrive_barrier(at, Waiting(lanes, fire, what, names, wanted, at + 1))

        return self._split(what, step, at + 1)

    def _barrier_reduction(
        self, what: Instruction, target: Operand | None, source: Operand | None
    ) -> Callable[[Batch, Lanes], None]:
        write, read = self.write(target, what), self.read(source, "pred", what)

        def fire(b: Batch, lanes: Lanes) -> None:
            chosen = None if len(lanes) == b.size else lanes
            holds = np.broadcast_to(read(b, chosen), lanes.shape)
            block = b.block[lanes]
            count = np.bincount(block, holds, b.blocks)[block].astype(np.uint32)
            total = np.bincount(block, minlength=b.blocks)[block]
            if "popc" in what.opcode:
                write(b, chosen, count)
            else:
                write(b, chosen, count == total if "and" in what.opcode else count > 0)

        return fire

    def _at_warp(
        self,
        at: int,
        what: Instruction,
        mask: Operand | None,
        act: Act,
    ) -> Step:
        read = self.read(mask, "u32", what)

        def step(b: Batch, s: Selection) -> None:
            masks = np.broadcast_to(read(b, s).view(np.uint32), b.lanes(s).shape)
            waiting = Waiting(b.lanes(s), lambda b, lanes: None, what, masks, 0, at + 1)
            waiting.fire = lambda b, lanes: act(
                b, lanes, np.broadcast_to(read(b, _narrow(b, lanes)), lanes.shape).view(np.uint32)
            )
            b.arrive_warp(at, waiting)

        return self._split(what, step, at + 1)

    def _shuffle(self, what: Instruction) -> Act:
        target = what.operands[0]
        first, second = (
            (target.first, target.second) if isinstance(target, Pair) else (target, None)
        )
        write, write_inside = self.write(first, what), self.write(second, what)
        source, watched = (
            self.take(what.operands[1], "b32", what),
            self.watched(what.operands[1]),
        )
        amount, clamp = (self.read(o, "u32", what) for o in what.operands[2:4])
        mode = next(p for p in what.opcode if p in ("up", "down", "bfly", "idx"))

        def act(b: Batch, lanes: Lanes, masks: NDArray[np.uint32]) -> None:
            chosen = _narrow(b, lanes)
            lane = (b.thread[lanes] % 32).astype(np.int64)
            step = amount(b, chosen).astype(np.int64) & 31
            limit = clamp(b, chosen).astype(np.int64)
            segment = limit >> 8 & 31
            last = (lane & segment) | (limit & 31 & ~segment)
            if mode == "up":
                other = lane - step
                inside = other >= last
            elif mode == "idx":
                other = (lane & segment) | (step & ~segment)
                inside = other <= last
            else:
                other = lane + step if mode == "down" else lane ^ step
                inside = other <= last
            other = np.where(inside, other, lane)
            here = np.zeros(b.size + 32, bool)
            here[lanes] = True
            place = lanes - lane + other
            exists = b.thread[lanes] - lane + other < b.threads
            named = (masks.astype(np.int64) >> other) & 1 == 1
            absent = ~(exists & named & here[np.where(exists, place, 0)])
            if absent.any():
                number = int(other[np.flatnonzero(absent)[0]])
                b.fail(
                    faults.AbsentLane,
                    f"reads lane {number}, which does not take part",
                    what,
                    lanes[absent],
                )
            fresh = b.unwritten_among(watched, place)
            if fresh.any():
                b.fail(
                    faults.UninitializedRead,
                    "takes from another lane a register that nothing wrote there",
                    what,
                    lanes[fresh],
                )
            values = source(b, None)
            write(b, chosen, values[place] if len(values) > 1 else values.copy())
            if second is not None:
                write_inside(b, chosen, inside)

        return act

    def _vote(self, what: Instruction) -> Act:
        write = self.write(what.operands[0], what)
        read = self.read(what.operands[1], "pred", what)
        mode = next(p for p in what.opcode if p in ("all", "any", "uni", "ballot"))

        def act(b: Batch, lanes: Lanes, masks: NDArray[np.uint32]) -> None:
            chosen = _narrow(b, lanes)
            holds = np.broadcast_to(read(b, chosen), lanes.shape)
            group = _groups(b, lanes, masks)
            bits = np.where(holds, np.float64(2) ** (b.thread[lanes] % 32), 0)
            if mode == "ballot":
                write(b, chosen, np.bincount(group, bits)[group].astype(np.uint32))
                return
            count, total = np.bincount(group, holds)[group], np.bincount(group)[group]
            result = {"all": count == total, "any": count > 0}.get(
                mode, (count == 0) | (count == total)
            )
            write(b, chosen, result)

        return act

    def _match(self, what: Instruction) -> Act:
        target = what.operands[0]
        first, second = (
            (target.first, target.second) if isinstance(target, Pair) else (target, None)
        )
        write, write_all = self.write(first, what), self.write(second, what)
        read = self.read(what.operands[1], what.opcode[-1], what)
        everyone = "all" in what.opcode

        def act(b: Batch, lanes: Lanes, masks: NDArray[np.uint32]) -> None:
            chosen = _narrow(b, lanes)
            value = np.broadcast_to(read(b, chosen), lanes.shape)
            group = _groups(b, lanes, masks)
            number = np.unique(value, return_inverse=True)[1]
            alike = np.unique(group * len(lanes) + number, return_inverse=True)[1]
            bits = np.float64(2) ** (b.thread[lanes] % 32)
            same = np.bincount(alike, bits)[alike].astype(np.uint32)
            whole = np.bincount(group, bits)[group].astype(np.uint32)
            if everyone:
                same = np.where(same == whole, same, np.uint32(0))
            write(b, chosen, same)
            if second is not None:
                write_all(b, chosen, same == whole)

        return act

    def _reduce(self, what: Instruction) -> Act:
        kind = what.opcode[-1]
        write, read = self.write(what.operands[0], what), self.read(what.operands[1], kind, what)
        joins = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }
        join = next((joins[p] for p in what.opcode if p in joins), None)
        if join is None:
            raise UnsupportedInstruction(what.text)

        def act(b: Batch, lanes: Lanes, masks: NDArray[np.uint32]) -> None:
            chosen = _narrow(b, lanes)
            value = np.broadcast_to(read(b, chosen), lanes.shape)
            group = _groups(b, lanes, masks)
            order = np.argsort(group, kind="stable")
            starts = np.flatnonzero(np.diff(group[order], prepend=-1))
            write(b, chosen, join.reduceat(value[order], starts)[group])

        return act


def _nothing(b: Batch, lanes: Lanes) -> None:
    """A plain barrier moves no data."""


def _narrow(b: Batch, lanes: Lanes) -> Selection:
    return None if len(lanes) == b.size else lanes


def _groups(b: Batch, lanes: Lanes, masks: NDArray[np.uint32]) -> NDArray[np.intp]:
    """A number per lane: the same for the lanes of one warp that share a mask."""
    key = (b.warp[lanes].astype(np.int64) << 32) | masks
    return np.unique(key, return_inverse=True)[1].ravel()
