"""Who touched which memory last, and what orders two threads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Lanes = NDArray[np.intp]
Ints = NDArray[np.int32]
Flags = NDArray[np.bool_]

_NOBODY = -1
_SAME_WARP, _SAME_BLOCK, _ANY = 1, 2, 3


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
        self.tick: Ints | None = None
        self.known: NDArray[np.int32] | None = None

    def now(self, lanes: Lanes) -> Moment:
        """The present moment of `lanes`."""
        alike = (self.epoch == self.epoch[0]).all()
        time = self.epoch[:1].copy() if alike else self.epoch[self.block[lanes]]
        tick = np.zeros(1, np.int32) if self.tick is None else self.tick[lanes]
        return Moment(self, self.number[lanes], time, tick)

    def pass_warp_barrier(self, lanes: Lanes, masks: NDArray[np.uint32]) -> None:
        """Order the memory accesses of the lanes that each mask names."""
        if self.tick is None or self.known is None:
            self.tick = np.zeros(len(self.number), np.int32)
            warps = len(self.epoch) * self.stride // 32
            self.known = np.zeros((warps, 32, 32), np.int32)
        self.tick[lanes] += 1
        warp, lane = self._local_warp(self.number[lanes]), self.number[lanes] % 32
        groups = np.unique(np.stack((warp, masks.astype(np.int64) + 0 * warp)), axis=1)
        members = (groups[1][:, None] >> np.arange(32) & 1).astype(bool)
        self.known[warp, lane, lane] = self.tick[lanes]
        seen = np.where(members[:, :, None], self.known[groups[0]], 0).max(axis=1)
        old = self.known[groups[0]]
        new = np.where(members[:, :, None], np.maximum(old, seen[:, None, :]), old)
        for index, warp_index in enumerate(groups[0]):
            mask = members[index]
            self.known[warp_index, mask] = new[index, mask]

    def _local_warp(self, numbers: Ints) -> Ints:
        return numbers // 32 - self.first * (self.stride // 32)

    def heard(self, earlier: Ints, tick: Ints, number: Ints) -> Flags:
        """True where a warp barrier lies between an access of `earlier` and one of `number`."""
        if self.known is None:
            return np.zeros(len(number), bool)
        known = self.known[self._local_warp(number), number % 32, earlier % 32]
        return known > tick


class Moment:
    """Lanes that touch memory together: who they are and what they have waited for so far."""

    def __init__(self, clock: Clock, number: Ints, time: Ints, tick: Ints) -> None:
        self.clock = clock
        self.number = number
        self.time = time
        self.tick = tick

    def spread(self, many: int) -> Moment:
        """The same lanes, each `many` times."""
        parts = (np.repeat(a, many) if len(a) > 1 else a for a in (self.time, self.tick))
        return Moment(self.clock, np.repeat(self.number, many), *parts)

    def unordered(self, earlier: Ints, time: Ints, tick: Ints) -> Flags:
        """True where nothing orders an access of thread `earlier` before these."""
        stride, number = self.clock.stride, self.number
        result: Flags = (earlier // stride != number // stride) | (time >= self.time)
        if self.clock.known is not None and result.any():
            close = np.flatnonzero(result & (earlier // 32 == number // 32))
            result[close] = ~self.clock.heard(earlier[close], tick[close], number[close])
        return result


class Shadow:
    """The last writer and the readers since, of every granule of a piece of memory."""

    def __init__(self, granules: int) -> None:
        self.writer = np.full(granules, _NOBODY, np.int32)
        self.write_time = np.zeros(granules, np.int32)
        self.write_tick = np.zeros(granules, np.int32)
        self.atomic = np.zeros(granules, bool)
        self.reader = np.full(granules, _NOBODY, np.int32)
        self.read_time = np.zeros(granules, np.int32)
        self.read_tick = np.zeros(granules, np.int32)
        self.others = np.zeros(granules, np.int8)

    def refine(self, factor: int) -> None:
        """Make every granule `factor` granules."""
        for name, array in vars(self).items():
            setattr(self, name, np.repeat(array, factor))

    def read(self, at: NDArray[np.int64], now: Moment) -> Flags | None:
        """Note reads; True where another thread's write is not ordered before."""
        number = now.number
        writer = self.writer[at]
        bad = (writer != number) & (writer != _NOBODY)
        if bad.any():
            bad &= now.unordered(writer, self.write_time[at], self.write_tick[at])
        reader = self.reader[at]
        more = (reader != number) & (reader != _NOBODY)
        others = np.zeros(len(at), np.int8)
        if more.any():
            more &= now.unordered(reader, self.read_time[at], self.read_tick[at])
            others[more] = np.maximum(
                self.others[at[more]], _distance(reader[more], number[more], now.clock.stride)
            )
        self.reader[at] = number
        self.read_time[at] = now.time
        self.read_tick[at] = now.tick
        self.others[at] = others
        twice = np.flatnonzero(self.reader[at] != number)
        if twice.size:
            last = self.reader[at[twice]]
            distance = _distance(last, number[twice], now.clock.stride)
            for level in (_SAME_WARP, _SAME_BLOCK, _ANY):
                where = at[twice[distance == level]]
                self.others[where] = np.maximum(self.others[where], level)
        return bad if bad.any() else None

    def write(
        self, at: NDArray[np.int64], now: Moment, *, atomic: bool = False
    ) -> tuple[Flags | None, Flags | None]:
        """Note writes.

        Returns where another thread's access is not ordered before, and where two lanes of one
        warp write the same granule by this very instruction: one of them wins.
        """
        number = now.number
        writer = self.writer[at]
        bad = (writer != number) & (writer != _NOBODY)
        if atomic:
            bad &= ~self.atomic[at]
        if bad.any():
            bad &= now.unordered(writer, self.write_time[at], self.write_tick[at])
        reader, others = self.reader[at], self.others[at]
        after = (reader != _NOBODY) & ((reader != number) | (others > 0))
        if after.any():
            time = self.read_time[at]
            bad |= after & (
                now.unordered(reader, time, self.read_tick[at])
                | (others == _ANY)
                | ((others == _SAME_BLOCK) & (time >= now.time))
            )
        self.writer[at] = number
        self.write_time[at] = now.time
        self.write_tick[at] = now.tick
        self.atomic[at] = atomic
        self.reader[at] = _NOBODY
        self.others[at] = 0
        winner = self.writer[at]
        twice = winner != number
        if not atomic and twice.any():
            bad |= twice & (winner // 32 != number // 32)
        return (bad if bad.any() else None), (twice if twice.any() else None)


def _distance(first: Ints, second: Ints, stride: int) -> NDArray[np.int8]:
    return np.where(
        first // 32 == second // 32,
        _SAME_WARP,
        np.where(first // stride == second // stride, _SAME_BLOCK, _ANY),
    ).astype(np.int8)
