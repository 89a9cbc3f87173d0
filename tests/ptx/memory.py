"""Device memory: allocations at made-up addresses, and the parts of them a launch may touch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from tests.ptx.races import Flags, Moment, Shadow

Bytes = NDArray[np.uint8]

ALIGNMENT = 256
"""Bytes; cudaMalloc aligns to no less."""

UNWRITTEN = 0xFB
"""What memory holds that nothing wrote."""

CURRENT_DEVICE = [0]
"""The number of the device that memory is allocated on and kernels run on: the last entry."""

_GUARD = 1 << 20
_SMALL, _LARGE = 1 << 24, 1 << 34
# Addresses stay below the window of shared memory, however many small allocations there are.
_ADDRESSES = {
    _SMALL: itertools.count(0x7F00_0000_0000, _SMALL),
    _LARGE: itertools.count(1 << 52, _LARGE),
}


class Allocation:
    """`size` bytes of device memory, never next to another allocation.

    `written` marks the bytes that something wrote; ``None`` means all. `held` is memory that has
    the bytes already and becomes the device's.
    """

    def __init__(self, size: int, *, written: bool, held: Bytes | None = None) -> None:
        padded = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
        if padded > _LARGE - _GUARD:
            raise MemoryError(f"{size} bytes")
        self.address = next(_ADDRESSES[_SMALL if padded <= _SMALL - _GUARD else _LARGE])
        self.size = size
        self.device = CURRENT_DEVICE[-1]
        self.bytes: Bytes = np.full(padded, UNWRITTEN, np.uint8) if held is None else held
        self.written: NDArray[np.bool_] | None = None if written else np.zeros(padded, bool)


class Segment:
    """A run of bytes of an allocation that a launch may touch, with what the launch did to it."""

    def __init__(self, allocation: Allocation, start: int, end: int, granule: int) -> None:
        self.allocation = allocation
        self.start = start
        self.end = end
        self.granule = granule
        self.shadow: Shadow | None = None
        self.pending: list[tuple[NDArray[np.int64], int, Moment]] = []
        self.read_total = 0
        self.written_total = 0
        self._read = np.zeros(self._granules, bool)
        self._written = np.zeros(self._granules, bool)

    @property
    def _granules(self) -> int:
        first = self.start - self.allocation.address
        return -(-(self.end - self.allocation.address) // self.granule) - first // self.granule

    @property
    def read_unique(self) -> int:
        """Bytes read at least once."""
        return min(int(self._read.sum()) * self.granule, self.end - self.start)

    @property
    def written_unique(self) -> int:
        """Bytes written at least once."""
        return min(int(self._written.sum()) * self.granule, self.end - self.start)

    def _refine(self, size: int) -> None:
        if size < self.granule:
            factor = self.granule // size
            base = self.allocation.address
            skip = (self.start - base) // size - (self.start - base) // self.granule * factor
            for name in ("_read", "_written"):
                setattr(self, name, np.repeat(getattr(self, name), factor)[skip:])
            if self.shadow is not None:
                self.shadow.refine(factor, skip)
            self.granule = size

    def _cells(
        self, offsets: NDArray[np.int64], size: int, now: Moment
    ) -> tuple[NDArray[np.int64], Moment]:
        """The granules of accesses of `size` bytes, and who touches each."""
        at = np.broadcast_to(self._granule_of(offsets), now.number.shape)
        if size <= self.granule:
            return at, now
        many = size // self.granule
        return (at[:, None] + np.arange(many)).ravel(), now.spread(many)

    def _granule_of(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        first = (self.start - self.allocation.address) // self.granule
        return offsets // self.granule - first

    def _mark(self, flags: NDArray[np.bool_], offsets: NDArray[np.int64], size: int) -> None:
        at = self._granule_of(offsets)
        for part in range(max(1, size // self.granule)):
            flags[at + part] = True

    def read(self, offsets: NDArray[np.int64], size: int, now: Moment) -> Flags | None:
        """Note reads of `size` bytes; True per lane where they race."""
        self._refine(size)
        self.read_total += size * len(now.number)
        self._mark(self._read, offsets, size)
        if self.shadow is None:
            self.pending.append((offsets, size, now))
            return None
        return _per_lane(self.shadow.read(*self._cells(offsets, size, now)), len(now.number))

    def write(
        self, offsets: NDArray[np.int64], size: int, now: Moment, *, atomic: bool = False
    ) -> tuple[Flags | None, Flags | None]:
        """Note writes; per lane, where they race, and where this instruction writes twice."""
        self._refine(size)
        self.written_total += size * len(now.number)
        self._mark(self._written, offsets, size)
        if self.shadow is None:
            self.shadow = Shadow(self._granules)
            for earlier in self.pending:
                self.shadow.read(*self._cells(*earlier))
            self.pending.clear()
        bad, twice = self.shadow.write(*self._cells(offsets, size, now), atomic=atomic)
        return _per_lane(bad, len(now.number)), _per_lane(twice, len(now.number))

    def was_written(self, offsets: NDArray[np.int64], size: int) -> bool:
        """Whether the launch itself wrote any of these `size` bytes."""
        if self.shadow is None:
            return False
        parts = range(max(1, size // self.granule))
        at = self._granule_of(offsets)
        return any(bool(self.shadow.written(at + part).any()) for part in parts)


def _per_lane(flags: Flags | None, lanes: int) -> Flags | None:
    return None if flags is None else flags.reshape(lanes, -1).any(axis=1)


class Reach:
    """All segments that one launch may touch, sorted by address."""

    def __init__(self, extents: Iterable[tuple[Allocation, int, int, int]]) -> None:
        merged: list[Segment] = []
        order = sorted((e for e in extents if e[2] > e[1]), key=lambda e: e[1])
        for allocation, start, end, granule in order:
            if merged and start < merged[-1].end:
                last = merged.pop()
                end, granule = max(end, last.end), min(granule, last.granule)
                start = last.start
            merged.append(Segment(allocation, start, end, granule))
        self.segments = merged
        self.starts = np.array([s.start for s in merged], np.int64)
        self.ends = np.array([s.end for s in merged], np.int64)

    def find(self, addresses: NDArray[np.int64], size: int) -> NDArray[np.intp]:
        """The segment's index of every access, -1 outside all."""
        if not self.segments:
            return np.full(len(addresses), -1, np.intp)
        low, high = int(addresses.min()), int(addresses.max())
        index = int(np.searchsorted(self.starts, low, side="right")) - 1
        if index >= 0 and high + size <= self.ends[index]:
            return np.array([index], np.intp)
        found = np.searchsorted(self.starts, addresses, side="right") - 1
        found[(found >= 0) & (addresses + size > self.ends[found])] = -1
        return found
