"""Who touched which memory last, and what orders two threads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Lanes = NDArray[np.intp]
Ints = NDArray[np.int32]
Flags = NDArray[np.bool_]

NOBODY = NEVER = -1
_SAME_BLOCK, _ANY = 1, 2
_LANES = np.arange(32)


class Clock:
    """What orders the threads of a batch of blocks: block barriers and warp barriers.

    A thread's number is ``block * stride + thread``, `stride` being the block's size rounded up
    to whole warps, so that block, warp and lane can be read off any number, of earlier batches
    too.
    """

    def __init__(self, numbers: Ints, stride: int, first: int, blocks: int) -> None:
        self.number = numbers
        self.stride = stride
        self.first = first
        self.block = numbers // stride - first
        self.epoch = np.zeros(blocks, np.int32)
        self.warp = numbers // 32 - first * (stride // 32)
        self.tick: Ints | None = None  # warp barriers so far, per warp
        self.known: NDArray[np.int32] | None = None  # how much of each other lane a lane waited for
        # Of each lane's last warp barrier: when it was, and the lanes that came.
        self.met_at = np.zeros(blocks * stride, np.int32)
        self.met = np.zeros(blocks * stride, np.uint32)

    def now(self, lanes: Lanes) -> Moment:
        """The present moment of `lanes`."""
        alike = (self.epoch == self.epoch[0]).all()
        time = self.epoch[:1].copy() if alike else self.epoch[self.block[lanes]]
        tick = np.zeros(1, np.int32) if self.tick is None else self.tick[self.warp[lanes]]
        return Moment(self, self.number[lanes], time, tick)

    def pass_warp_barrier(self, lanes: Lanes, masks: NDArray[np.uint32]) -> None:
        """Order the memory accesses of the lanes that each mask names."""
        if self.tick is None or self.known is None:
            warps = len(self.epoch) * self.stride // 32
            self.tick = np.zeros(warps, np.int32)
            self.known = np.zeros((warps, 32, 32), np.int32)
        warp, lane = self.warp[lanes], self.number[lanes] % 32
        self.tick[np.unique(warp)] += 1
        groups, group_of = np.unique(warp.astype(np.int64) << 32 | masks, return_inverse=True)
        came = np.zeros(len(groups), np.uint32)
        np.bitwise_or.at(came, group_of, _bit(lane))
        slots = self.slots(self.number[lanes])
        self.met[slots], self.met_at[slots] = came[group_of], self.tick[warp]
        of_warp, members = groups >> 32, (groups[:, None] >> _LANES & 1).astype(bool)
        self.known[warp, lane, lane] = self.tick[warp]
        seen = np.where(members[:, :, None], self.known[of_warp], 0).max(axis=1)
        group, member = np.nonzero(members)
        at = of_warp[group], member
        self.known[at] = np.maximum(self.known[at], seen[group])

    def slots(self, number: Ints) -> Ints:
        """Where the threads of this batch stand among all its lanes."""
        return number - np.int32(self.first * self.stride)

    def unheard(self, number: Ints, tick: Ints) -> NDArray[np.uint32]:
        """The lanes of each thread's warp, as bits, that it has not waited for since `tick`."""
        if self.known is None:
            return np.full(len(number), 2**32 - 1, np.uint32)
        known = self.known[number // 32 - self.first * (self.stride // 32), number % 32]
        since = known <= tick[:, None]
        return np.packbits(since, axis=1, bitorder="little").view("<u4")[:, 0]


class Moment:
    """Lanes that touch memory together: who they are and what they have waited for so far."""

    def __init__(self, clock: Clock, number: Ints, time: Ints, tick: Ints) -> None:
        self.clock = clock
        self.number = number
        self.bit = _bit(number)
        self.time = time
        self.tick = tick

    def spread(self, many: int) -> Moment:
        """The same lanes, each `many` times."""
        parts = (np.repeat(a, many) if len(a) > 1 else a for a in (self.time, self.tick))
        return Moment(self.clock, np.repeat(self.number, many), *parts)


class Uses:
    """Of every granule of a piece of memory: who used it last, and who else did in no order.

    Of the others, `crowd` holds those in the warp of the last one, as bits, itself included;
    `others` is how far away the rest are.
    """

    def __init__(self, granules: int, *, of_block: bool) -> None:
        self.of_block = of_block
        self.who = np.full(granules, NOBODY, np.int32)
        self.time = np.full(granules, NEVER, np.int32)
        self.tick = np.zeros(granules, np.int32)
        self.crowd = np.zeros(granules, np.uint32)
        self.others = np.zeros(granules, np.int8)

    def refine(self, factor: int, skip: int) -> None:
        """Make every granule `factor` granules, and leave out the first `skip` of them."""
        for name in ("who", "time", "tick", "crowd", "others"):
            setattr(self, name, np.repeat(getattr(self, name), factor)[skip:])

    def _open(
        self, at: NDArray[np.int64], now: Moment
    ) -> tuple[NDArray[np.int8], NDArray[np.uint32]] | None:
        """The uses that nothing orders before `now`: how far away, and lanes of the same warp.

        None where there are no such uses, which is most often so, and soon seen.
        """
        recent = self.time[at] >= now.time
        if self.of_block and not recent.any():
            return None
        who, number = self.who[at], now.number
        if (who == NOBODY).all():
            return None
        others = self.others[at]
        if self.of_block and now.clock.known is not None and not others.any():
            slots = now.clock.slots(number)
            met = (self.tick[at] < now.clock.met_at[slots]) & (who // 32 == number // 32)
            met &= self.crowd[at] & ~now.clock.met[slots] == 0
            if (met | ~recent).all():
                return None
        far, near = np.zeros(len(at), np.int8), np.zeros(len(at), np.uint32)
        used, distance = who != NOBODY, _distance(who, number, now.clock.stride)
        elsewhere = used & (distance == _ANY)
        if not (recent.any() or elsewhere.any() or others.any()):
            return None  # a barrier came between
        far = np.where(recent | (others == _ANY), others, far)
        same_warp = who // 32 == number // 32
        apart = used & ~same_warp & (recent | elsewhere)
        far = np.maximum(far, np.where(apart, distance, np.int8(0)))
        close = np.flatnonzero(same_warp & recent)
        near[close] = self.crowd[at[close]]
        if now.clock.known is not None and close.size:
            shared = close[near[close] & ~now.bit[close] != 0]
            if shared.size:
                near[shared] &= now.clock.unheard(number[shared], self.tick[at[shared]])
        return far, near

    def unordered(self, at: NDArray[np.int64], now: Moment) -> Flags | None:
        """True where nothing orders another thread's use before `now`."""
        found = self._open(at, now)
        if found is None:
            return None
        far, near = found
        return (far > 0) | (near & ~now.bit != 0)

    def replace(self, at: NDArray[np.int64], now: Moment) -> None:
        """Note uses, and forget those before."""
        self.who[at] = now.number
        self.time[at] = now.time
        self.tick[at] = now.tick
        self.crowd[at] = now.bit
        self.others[at] = 0

    def add(self, at: NDArray[np.int64], now: Moment) -> None:
        """Note uses beside those before that nothing orders."""
        number = now.number
        found = self._open(at, now)
        self.replace(at, now)
        crowd = now.bit
        if found is not None:
            far, near = found
            crowd = near | crowd
            self.crowd[at], self.others[at] = crowd, far
        twice = np.flatnonzero(self.who[at] != number)
        if twice.size:
            at, last, number, crowd = at[twice], self.who[at[twice]], number[twice], crowd[twice]
            same_warp = last // 32 == number // 32
            np.bitwise_or.at(self.crowd, at[same_warp], crowd[same_warp])
            distance = np.where(same_warp, 0, _distance(last, number, now.clock.stride))
            for level in (_SAME_BLOCK, _ANY):
                where = at[distance == level]
                self.others[where] = np.maximum(self.others[where], level)

    def forget(self, at: NDArray[np.int64]) -> None:
        """As if nobody had used these."""
        self.who[at] = NOBODY
        self.time[at] = NEVER
        self.others[at] = 0


class Shadow:
    """Who wrote and who has since read every granule of a piece of memory.

    Shared memory is `of_block`: no two blocks have a granule in common.
    """

    def __init__(self, granules: int, *, of_block: bool = False) -> None:
        self.writes = Uses(granules, of_block=of_block)
        self.reads = Uses(granules, of_block=of_block)
        self.atomic = np.zeros(granules, bool)

    def refine(self, factor: int, skip: int = 0) -> None:
        """Make every granule `factor` granules, and leave out the first `skip` of them."""
        self.writes.refine(factor, skip)
        self.reads.refine(factor, skip)
        self.atomic = np.repeat(self.atomic, factor)[skip:]

    def written(self, at: NDArray[np.int64]) -> Flags:
        """True where anybody wrote."""
        return self.writes.who[at] != NOBODY

    def read(self, at: NDArray[np.int64], now: Moment) -> Flags | None:
        """Note reads; True where another thread's write is not ordered before."""
        bad = self.writes.unordered(at, now)
        self.reads.add(at, now)
        return bad if bad is not None and bad.any() else None

    def write(
        self, at: NDArray[np.int64], now: Moment, *, atomic: bool = False
    ) -> tuple[Flags | None, Flags | None]:
        """Note writes.

        Returns where another thread's access is not ordered before, and where two lanes of one
        warp write the same granule by this very instruction: one of them wins.
        """
        bad = np.zeros(len(at), bool)
        written = self.writes.unordered(at, now)
        if written is not None:
            bad |= written & ~self.atomic[at] if atomic else written
        read = self.reads.unordered(at, now)
        if read is not None:
            bad |= read
        if atomic:
            self.writes.add(at, now)
        else:
            self.writes.replace(at, now)
        self.atomic[at] = atomic
        self.reads.forget(at)
        winner = self.writes.who[at]
        twice = winner != now.number
        if not atomic and twice.any():
            bad |= twice & (winner // 32 != now.number // 32)
        return (bad if bad.any() else None), (twice if twice.any() else None)


def _bit(number: Ints) -> NDArray[np.uint32]:
    """The place of a lane in a mask of its warp."""
    return np.uint32(1) << (number % 32).astype(np.uint32)


def _distance(first: Ints, second: Ints, stride: int) -> NDArray[np.int8]:
    return np.where(first // stride == second // stride, _SAME_BLOCK, _ANY).astype(np.int8)
