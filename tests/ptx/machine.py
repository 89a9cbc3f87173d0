"""The SIMT machine: many blocks at once, one NumPy array item per thread.

The lanes with the lowest program counter run until the end of their basic block; lanes that reach
the same counter run on together. Barriers and warp instructions hold lanes until all that they
name have come.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tests.ptx import faults
from tests.ptx.compiler import SOURCE_NAME
from tests.ptx.memory import UNWRITTEN, Bytes, Reach
from tests.ptx.program import Function, Instruction, Program, Register, Variable
from tests.ptx.races import Clock, Flags, Lanes, Moment, Shadow

Array = NDArray[np.generic]
Selection = NDArray[np.intp] | None
"""The lanes that execute: ``None`` for every lane of the batch."""

SHARED = 1 << 56
LOCAL = 2 << 56
CONSTANT = 3 << 56
PARAMETER = 4 << 56
"""Where the generic address space shows each memory; global memory is below all of them."""

STATES = {0: np.bool_, 1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""What a register of each width is kept as."""

_GUARD = 1 << 10
_BATCH_LANES = 1 << 15
_BATCH_SHARED = 1 << 23

MOST_STEPS = 1 << 18
"""Basic blocks that a batch may run before it counts as stuck."""


@dataclass(frozen=True)
class Layout:
    """Where the variables of a kernel lie in shared, local or constant memory."""

    offsets: dict[str, int]
    valid: NDArray[np.bool_]
    data: Bytes
    _held: dict[int, NDArray[np.bool_]] = field(default_factory=dict)

    @classmethod
    def of(cls, variables: Sequence[Variable], dynamic: int = 0) -> Layout:
        """Place variables with gaps between them; extern ones share the last `dynamic` bytes."""
        offsets, pieces, at = {}, [], 0
        for variable in variables:
            if not variable.extern:
                offsets[variable.name] = at
                pieces.append((at, variable.size, variable.data))
                at = -(-(at + variable.size + _GUARD) // 256) * 256
        for variable in variables:
            if variable.extern:
                offsets[variable.name] = at
        if dynamic:
            pieces.append((at, dynamic, b""))
            at += dynamic
        end = max((start + -(-size // 16) * 16 for start, size, _ in pieces), default=0)
        valid = np.zeros(end + _GUARD if pieces else 0, bool)
        data = np.zeros(len(valid), np.uint8)
        for start, size, content in pieces:
            valid[start : start + size] = True
            data[start : start + len(content)] = np.frombuffer(content, np.uint8)
        return cls(offsets, valid, data)

    def holds(self, offset: NDArray[np.int64], size: int) -> Flags:
        """True where an access of `size` bytes is aligned and stays inside a variable."""
        if size not in self._held:
            whole = np.concatenate(([False], self.valid, np.zeros(size, bool)))
            held = whole[:-size] & whole[size - 1 : -1]
            held[1:][np.arange(len(self.valid)) % size != 0] = False
            held[0] = False  # for whatever lies before
            self._held[size] = held
        return self._held[size].take(offset + 1, mode="clip")

    @property
    def size(self) -> int:
        """Bytes from the first variable to the end of the last, rounded up."""
        used = np.flatnonzero(self.valid)
        return 0 if not used.size else -(-int(used[-1] + 1) // 256) * 256


Step = Callable[["Batch", Selection], None]


@dataclass(frozen=True)
class Block:
    """A basic block: plain steps, then how it ends."""

    start: int
    steps: tuple[Step, ...]
    end: Step
    length: int


@dataclass(frozen=True)
class Kernel:
    """A kernel ready to run."""

    name: str
    title: str
    arch: str
    function: Function
    program: Program
    source: str
    blocks: dict[int, Block]
    parameters: dict[str, tuple[int, int]]
    parameter_bytes: int
    lines: dict[int, frozenset[tuple[int, int]]]
    """The source lines of every basic block."""


@dataclass
class Geometry:
    """How a kernel is launched: grid and block as (x, y, z), dynamic shared bytes."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int = 0

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return int(np.prod(self.block))

    @property
    def blocks(self) -> int:
        """Blocks of the grid."""
        return int(np.prod(self.grid))


@dataclass
class Waiting:
    """Lanes held at one barrier instruction."""

    lanes: Lanes
    fire: Callable[[Batch, Lanes], None]
    instruction: Instruction
    masks: NDArray[np.uint32]
    count: int
    next: int


class Batch:
    """Some consecutive blocks of a launch, running together."""

    def __init__(
        self,
        kernel: Kernel,
        geometry: Geometry,
        first: int,
        blocks: int,
        reach: Reach,
        parameters: Bytes,
        shared: Layout,
        constant: Layout,
        local: Layout,
    ) -> None:
        self.kernel = kernel
        self.geometry = geometry
        self.reach = reach
        self.parameters = parameters
        self.layouts = {"shared": shared, "const": constant, "local": local}
        self.blocks = blocks
        self.threads = threads = geometry.threads
        self.size = size = blocks * threads
        self.first = first
        self.all = np.arange(size)
        self.thread = np.tile(np.arange(threads, dtype=np.int32), blocks)
        self.block = np.repeat(np.arange(blocks, dtype=np.int32), threads)
        stride = -(-threads // 32) * 32
        self.clock = Clock((self.block + first) * stride + self.thread, stride, first, blocks)
        self.warp = self.clock.warp
        self.registers: list[Array | None] = [None] * len(kernel.function.registers)
        self.unwritten: dict[int, Flags] = {}
        self.exited = np.zeros(size, bool)
        self.ready: dict[int, list[NDArray[np.intp]]] = {}
        self.heap: list[int] = []
        self.at_warp: dict[int, Waiting] = {}
        self.at_barrier: dict[int, Waiting] = {}
        self.executed: set[int] = set()
        self.instructions = 0
        self.shared_size = shared.size
        self.shared_bytes: Bytes = np.full(blocks * shared.size, UNWRITTEN, np.uint8)
        self.shared_granule = 16
        self.shared_shadow: Shadow | None = None
        self.local_size = local.size
        self.local_bytes: Bytes = np.zeros(0, np.uint8)
        self.local_written: Flags = np.zeros(0, bool)
        self.arguments: dict[str, Bytes] = {}

    # Registers

    def get(self, register: Register, chosen: Selection) -> Array:
        """The register's bits: one item per chosen lane, or a single one where all agree."""
        value = self.registers[register.index]
        if value is None:
            return _unwritten(1, register.width)
        return value if chosen is None or len(value) == 1 else value[chosen]

    def put(self, register: Register, chosen: Selection, value: Array) -> None:
        """Write the register; `value` belongs to it from now on."""
        if chosen is None:
            self.registers[register.index] = value
            return
        old = self.registers[register.index]
        if old is None:
            old = _unwritten(self.size, register.width)
        elif len(old) == 1 and self.size > 1:
            old = np.repeat(old, self.size)
        old[chosen] = value
        self.registers[register.index] = old

    def unwritten_lanes(self, register: Register) -> Flags:
        """Of a register that is watched: the lanes that hold nothing in it that they wrote."""
        if register.index not in self.unwritten:
            self.unwritten[register.index] = np.ones(self.size, bool)
        return self.unwritten[register.index]

    def mark_unwritten(
        self, register: Register, chosen: Selection, flags: Flags | np.bool_ | bool
    ) -> None:
        """Note which of the chosen lanes hold in a register what nothing wrote."""
        self.unwritten_lanes(register)[slice(None) if chosen is None else chosen] = flags

    def unwritten_among(self, registers: Sequence[Register], chosen: Selection) -> Flags:
        """The chosen lanes that hold in any of these registers what nothing wrote."""
        lanes = self.lanes(chosen)
        flags = np.zeros(len(lanes), bool)
        for register in registers:
            flags |= self.unwritten_lanes(register)[lanes]
        return flags

    def check_written(
        self, register: Register, chosen: Selection, instruction: Instruction
    ) -> None:
        """Raise unless every chosen lane wrote the register."""
        lanes = self.lanes(chosen)
        fresh = self.unwritten_lanes(register)[lanes]
        if fresh.any():
            self.fail(
                faults.UninitializedRead,
                f"register {register.name}, which nothing wrote",
                instruction,
                lanes[fresh],
            )

    def lanes(self, chosen: Selection) -> Lanes:
        """The chosen lanes by number."""
        return self.all if chosen is None else chosen

    # Scheduling

    def run(self) -> None:
        """Run to the end."""
        blocks, steps = self.kernel.blocks, 0
        self.schedule(0, None)
        while self.heap or self._release():
            place = heapq.heappop(self.heap)
            chosen = self._take(place)
            block = blocks[place]
            self.executed.add(place)
            self.instructions += block.length * (self.size if chosen is None else len(chosen))
            for step in block.steps:
                step(self, chosen)
            block.end(self, chosen)
            steps += 1
            if steps > MOST_STEPS:
                instruction = self.kernel.function.body[block.start]
                self.fail(faults.NoProgress, "still running", instruction, self.lanes(chosen))

    def schedule(self, place: int, chosen: Selection) -> None:
        """Let lanes go on at `place`."""
        lanes = self.lanes(chosen)
        if not len(lanes):
            return
        if place in self.ready:
            self.ready[place].append(lanes)
        else:
            self.ready[place] = [lanes]
            heapq.heappush(self.heap, place)

    def _take(self, place: int) -> Selection:
        parts = self.ready.pop(place)
        lanes = parts[0] if len(parts) == 1 else np.sort(np.concatenate(parts), kind="stable")
        return None if len(lanes) == self.size else lanes

    def leave(self, chosen: Selection) -> None:
        """Lanes exit."""
        self.exited[self.lanes(chosen)] = True

    # Waiting

    def arrive_warp(self, place: int, waiting: Waiting) -> None:
        """Hold lanes until every lane that their masks name has come."""
        lanes = waiting.lanes
        if (
            len(lanes) == self.size
            and self.threads % 32 == 0
            and (waiting.masks == 2**32 - 1).all()
        ):
            waiting.fire(self, lanes)
            self.schedule(waiting.next, lanes)
            return
        own = np.uint32(1) << (self.thread[lanes] % 32).astype(np.uint32)
        masks = np.broadcast_to(waiting.masks, lanes.shape)
        absent = (masks & own) == 0
        if absent.any():
            self.fail(
                faults.AbsentLane,
                "a lane is not in its own mask",
                waiting.instruction,
                lanes[absent],
            )
        held = self.at_warp.pop(place, None)
        if held is not None:
            lanes, masks = np.concatenate((held.lanes, lanes)), np.concatenate((held.masks, masks))
            order = np.argsort(lanes)
            lanes, masks = lanes[order], masks[order]
        waiting.lanes, waiting.masks = lanes, masks
        self._pass_warp(place, waiting)

    def _pass_warp(self, place: int, waiting: Waiting) -> bool:
        lanes, masks = waiting.lanes, waiting.masks
        warp = self.warp[lanes].astype(np.int64)
        key = (warp << 32) | masks
        groups, inverse = np.unique(key, return_inverse=True)
        bits = np.float64(2) ** (self.thread[lanes] % 32)
        here = np.bincount(inverse, bits).astype(np.int64)
        alive = np.flatnonzero(~self.exited)
        warps = np.bincount(
            self.warp[alive], np.float64(2) ** (self.thread[alive] % 32), int(self.warp.max()) + 1
        ).astype(np.int64)
        wanted = (groups & 0xFFFFFFFF) & warps[groups >> 32]
        complete = (wanted & ~here) == 0
        go = complete[inverse]
        if not go.all():
            self.at_warp[place] = Waiting(
                lanes[~go],
                waiting.fire,
                waiting.instruction,
                masks[~go],
                waiting.count,
                waiting.next,
            )
        if go.any():
            waiting.masks = masks[go]
            waiting.fire(self, lanes[go])
            self.schedule(waiting.next, lanes[go])
        return bool(go.any())

    def arrive_barrier(self, place: int, waiting: Waiting) -> None:
        """Hold lanes until all threads of their block have come."""
        if len(waiting.lanes) == self.size and not waiting.count:
            self.clock.epoch += 1
            waiting.fire(self, waiting.lanes)
            self.schedule(waiting.next, waiting.lanes)
            return
        held = self.at_barrier.get(place)
        if held is not None:
            order = np.argsort(lanes := np.concatenate((held.lanes, waiting.lanes)))
            masks = np.concatenate((held.masks, waiting.masks))
            waiting.lanes, waiting.masks = lanes[order], masks[order]
        self.at_barrier[place] = waiting

    def _release(self) -> bool:
        """Nothing can run: let complete barriers go, or find out why none is."""
        if not self.at_warp and not self.at_barrier:
            return False
        for place, waiting in list(self.at_warp.items()):
            del self.at_warp[place]
            if self._pass_warp(place, waiting):
                return True
        if self.at_barrier and self._pass_barriers():
            return True
        place, waiting = next(iter((self.at_warp or self.at_barrier).items()))
        others = [
            w.instruction.line[1]
            for w in (*self.at_warp.values(), *self.at_barrier.values())
            if w is not waiting
        ]
        self.fail(
            faults.Deadlock,
            f"lanes wait for others that wait at lines {sorted(set(others))} or have left",
            waiting.instruction,
            waiting.lanes,
        )

    def _pass_barriers(self) -> bool:
        places = list(self.at_barrier)
        lanes = np.concatenate([self.at_barrier[p].lanes for p in places])
        sizes = [len(self.at_barrier[p].lanes) for p in places]
        place = np.repeat(places, sizes)
        names = np.concatenate([self.at_barrier[p].masks for p in places]).astype(np.int64)
        wanted = np.repeat([self.at_barrier[p].count or self.threads for p in places], sizes)
        key = self.block[lanes].astype(np.int64) * 16 + names
        _, inverse, arrived = np.unique(key, return_inverse=True, return_counts=True)
        complete = arrived[inverse] >= wanted
        if not complete.any():
            self._explain(lanes, place, complete)
            return False
        self._explain(lanes[complete], place[complete], complete[complete])
        self.clock.epoch[np.unique(self.block[lanes[complete]])] += 1
        for one in places:
            waiting = self.at_barrier.pop(one)
            mine = place == one
            go, stay = lanes[mine & complete], mine & ~complete
            if stay.any():
                self.at_barrier[one] = Waiting(
                    lanes[stay],
                    waiting.fire,
                    waiting.instruction,
                    names[stay].astype(np.uint32),
                    waiting.count,
                    waiting.next,
                )
            if len(go):
                waiting.fire(self, go)
                self.schedule(waiting.next, go)
        return True

    def _explain(self, lanes: Lanes, places: NDArray[np.intp], complete: Flags) -> None:
        """Raise if some block's threads wait at different barriers, or some of them left."""
        low = np.full(self.blocks, np.iinfo(np.int64).max)
        high = np.full(self.blocks, -1)
        np.minimum.at(low, self.block[lanes], places)
        np.maximum.at(high, self.block[lanes], places)
        mixed = (high > low)[self.block[lanes]]
        counted = any(self.at_barrier[p].count for p in np.unique(places))
        if mixed.any() and not counted:
            first, second = (
                self.at_barrier[int(edge[self.block[lanes[mixed]][0]])].instruction
                for edge in (low, high)
            )
            self.fail(
                faults.DivergentBarrier,
                f"threads of one block wait at the barriers of lines {first.line[1]} and "
                f"{second.line[1]}",
                second,
                lanes[mixed & (places == high[self.block[lanes]])],
            )
        if complete.all():
            return
        gone = np.bincount(self.block[self.exited], minlength=self.blocks)[self.block[lanes]] > 0
        if gone.any():
            self.fail(
                faults.ExitBeforeBarrier,
                "threads wait at a barrier that others of their block never reached",
                self.at_barrier[int(places[gone][0])].instruction,
                lanes[gone],
            )

    # Faults

    def fail(
        self,
        kind: type[faults.Fault],
        message: str,
        instruction: Instruction,
        lanes: Lanes,
    ) -> None:
        """Raise a fault that names the first of `lanes`."""
        lane = int(np.min(lanes))
        block = int(self.block[lane]) + self.first
        thread = int(self.thread[lane])
        file, line = self._line(instruction)
        own = self.kernel.program.files.get(file, "").endswith(SOURCE_NAME)
        text = self.kernel.source.splitlines()
        raise kind(
            f"{message} ({len(lanes)} of the lanes running)",
            faults.Place(
                self.kernel.title,
                _unravel(block, self.geometry.grid),
                _unravel(thread, self.geometry.block),
                line,
                text[line - 1] if own and 0 < line <= len(text) else "",
                instruction.text,
            ),
        )

    def _line(self, instruction: Instruction) -> tuple[int, int]:
        """The source line, or that of the next instruction where NVRTC gave none."""
        body = self.kernel.function.body
        place = next(at for at, one in enumerate(body) if one is instruction)
        return next((one.line for one in body[place:] if one.line[1]), (0, 0))

    # Memory

    def reach_global(
        self, address: NDArray[np.int64], size: int, chosen: Selection, instruction: Instruction
    ) -> list[tuple[int, NDArray[np.int64], Selection]]:
        """Check bounds and alignment; (segment, offsets in its allocation, lanes) of each part."""
        lanes = self.lanes(chosen)
        crooked = (address & (size - 1)) != 0
        if crooked.any():
            self.fail(
                faults.Misaligned,
                f"address not a multiple of {size}",
                instruction,
                np.broadcast_to(lanes, lanes.shape)[crooked] if len(crooked) > 1 else lanes,
            )
        found = self.reach.find(address, size)
        outside = found < 0
        if outside.any():
            bad = lanes[outside] if len(found) > 1 else lanes
            where = int(address[np.flatnonzero(outside)[0]]) if len(found) > 1 else int(address[0])
            self.fail(faults.OutOfBounds, self._nearest(where, size), instruction, bad)
        if len(found) == 1:
            base = self.reach.segments[int(found[0])].allocation.address
            return [(int(found[0]), address - base, chosen)]
        parts = []
        for index in np.unique(found):
            mine = np.flatnonzero(found == index)
            base = self.reach.segments[int(index)].allocation.address
            parts.append((int(index), address[mine] - base, lanes[mine]))
        return parts

    def _nearest(self, address: int, size: int) -> str:
        best = min(
            self.reach.segments,
            key=lambda s: max(s.start - address, address - s.end),
            default=None,
        )
        if best is None:
            return f"{size} bytes at {address:#x}: the kernel was given no memory"
        if address >= best.start:
            return (
                f"{size} bytes, {address - best.end} bytes past the end of an argument of "
                f"{best.end - best.start} bytes"
            )
        return f"{size} bytes, {best.start - address} bytes before an argument"

    def moment(self, chosen: Selection) -> Moment:
        """Who touches memory now."""
        return self.clock.now(self.lanes(chosen))

    def check_layout(
        self,
        space: str,
        offset: NDArray[np.int64],
        size: int,
        chosen: Selection,
        instruction: Instruction,
    ) -> None:
        """Bounds and alignment of shared, local and constant memory."""
        held = self.layouts[space].holds(offset, size)
        if held.all():
            return
        lanes = self.lanes(chosen)

        def those(flags: Flags) -> Lanes:
            return lanes[flags] if len(flags) > 1 else lanes

        crooked = (offset & (size - 1)) != 0
        if crooked.any():
            self.fail(
                faults.Misaligned, f"address not a multiple of {size}", instruction, those(crooked)
            )
        where = int(offset[np.flatnonzero(~held)[0]])
        self.fail(
            faults.OutOfBounds,
            f"{size} bytes at offset {where} of {space} memory, outside its variables",
            instruction,
            those(~held),
        )

    def shared_cells(
        self, offset: NDArray[np.int64], size: int, chosen: Selection
    ) -> tuple[NDArray[np.int64], Moment, Shadow]:
        """The granules of shared accesses, and who touches each."""
        if self.shared_shadow is None:
            self.shared_granule = size
            self.shared_shadow = Shadow(len(self.shared_bytes) // size, of_block=True)
        if size < self.shared_granule:
            self.shared_shadow.refine(self.shared_granule // size)
            self.shared_granule = size
        now = self.moment(chosen)
        at = self.shared_place(offset, chosen) // self.shared_granule
        many = size // self.shared_granule
        if many > 1:
            at, now = (at[:, None] + np.arange(many)).ravel(), now.spread(many)
        return at, now, self.shared_shadow

    def shared_place(self, offset: NDArray[np.int64], chosen: Selection) -> NDArray[np.int64]:
        """Offsets into the shared memory of all blocks."""
        block = self.block if chosen is None else self.block[chosen]
        return block.astype(np.int64) * self.shared_size + offset

    def local_place(self, offset: NDArray[np.int64], chosen: Selection) -> NDArray[np.int64]:
        """Offsets into the local memory of all lanes."""
        if not len(self.local_bytes):
            self.local_bytes = np.full(self.size * self.local_size, UNWRITTEN, np.uint8)
            self.local_written = np.zeros(len(self.local_bytes), bool)
        return self.lanes(chosen) * self.local_size + offset


def _unwritten(size: int, width: int) -> Array:
    """A register that nothing wrote holds what no kernel expects."""
    return np.full(size * max(width, 1), UNWRITTEN & (1 if not width else 0xFF), np.uint8).view(
        STATES[width]
    )


def _unravel(index: int, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    x, rest = index % shape[0], index // shape[0]
    return x, rest % shape[1], rest // shape[1]


def batches(geometry: Geometry, shared: int, local: int) -> range:
    """The first block of every batch."""
    step = max(1, _BATCH_LANES // geometry.threads)
    if shared:
        step = min(step, max(1, _BATCH_SHARED // shared))
    if local:
        step = min(step, max(1, (_BATCH_SHARED * 4) // (local * geometry.threads)))
    return range(0, geometry.blocks, min(step, geometry.blocks) if geometry.blocks else 1)
