"""Teams: GPU threads that share a row, so that whole rows take one launch.

A row is read once, worked on in registers and written once. Its team is a group of lanes of a warp
for short rows, and a thread block for long ones. Rows too long for a block take several passes.

Each set of template arguments is compiled once, which takes from a tenth of a second to some
seconds, and CuPy keeps the result on disk. So there are few sets. For one kernel, dtype and number
of levels, with or without a map, at most `MOST_TEMPLATES` serve rows of all lengths and alignments.
At most `MOST_ALIGNED` serve the usual rows, which begin and end at multiples of 16 bytes. A kernel
is compiled for the numbers of levels in `LEVELS`, and the next larger one serves those between. A
map that was on the device before is not looked at, so that it takes the kernel of 16 levels.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from cubin.core import libraries
from cubin.core.libraries import Array
from cubin.core.primitives import C_TYPES, Launch, source

CUDA = source(__file__, "teams.cuh")
"""Device functions of kernels on whole rows: teams, and how they load elements."""

TILE_THREADS = 256
"""Threads of a block of teams that are lanes of a warp."""

MOST_THREADS = 1024
"""The most threads of a block that is one team."""

Capacity = tuple[int, int, int]
"""The most elements that a thread holds, in three cases: in packs of 16 bytes with at most four
levels; in smaller packs or with more levels; with a map."""

Room = tuple[Capacity, Capacity, Capacity]
"""The same for items of 2, 4 and 8 bytes. A thread has 64 registers, so that a block of 1024
threads can run on a multiprocessor. With more elements, registers would spill to memory."""

GREEDY: Room = ((32, 16, 8), (32, 16, 16), (12, 8, 8))
"""That of the greedy kernels."""

LEVELS = (1, 2, 3, 4, 8, 16)
"""The numbers of levels that kernels are compiled for."""

MOST_TEMPLATES = 34
"""The most templates of one kernel, dtype and number of levels, for all lengths and alignments."""

MOST_ALIGNED = 8
"""The most of them for the rows that begin and end at multiples of 16 bytes."""

_NO_MAP = np.uint64(0)


class Team(NamedTuple):
    """The threads that share a row.

    Attributes
    ----------
    name : str
        Its C++ type.
    threads : int
        How many they are.
    pack : int
        How many neighbouring elements a thread takes at a time.
    capacity : int
        The room for elements that each thread has.
    """

    name: str
    threads: int
    pack: int
    capacity: int


@functools.cache
def team_of(
    length: int, dtype: np.dtype[Any], levels: int, mapped: bool, room: Room = GREEDY
) -> Team | None:
    """The team for rows of this length; None if they are empty or too long for any team.

    Short rows take eight lanes: these add up in three shuffles, where 32 lanes take five, and still
    read whole sectors of memory. Few templates serve all lengths, since the room of a thread is
    rounded up to a power of two, and packs have 16 bytes, four elements or one.
    """
    widest = min(16 // dtype.itemsize, 4 if length <= 32 or mapped else 8)
    pack = next(n for n in (widest, min(widest, 4), 1) if length % n == 0)
    roomy, plain, beside_map = room[dtype.itemsize.bit_length() - 2]
    wide = pack * dtype.itemsize == 16 and levels <= 4
    most = beside_map if mapped else roomy if wide else plain
    if length == 0 or levels == 0:
        return None
    if length <= 8 * min(most, 16):
        name, threads = "Tile<8>", 8
    elif length <= 32 * most:
        name, threads = "Tile<32>", 32
    elif length <= MOST_THREADS * most:
        name, threads = "Block", 32 * -(-length // (32 * most))
    else:
        return None
    share = max(-(-length // threads), pack, 4)
    return Team(name, threads, pack, min(1 << (share - 1).bit_length(), most))


class RowLaunch(NamedTuple):
    """How a kernel on whole rows is launched, and which rows it takes.

    Attributes
    ----------
    room : Room
        How many elements a thread holds.
    most_levels : int
    passes_levels : bool
        Whether the number of levels is an argument of the kernel, which may be compiled for more.
    """

    room: Room
    most_levels: int
    passes_levels: bool = False

    def takes(self, length: int, dtype: np.dtype[Any], levels: int, mapped: bool) -> bool:
        """Whether a team of threads holds rows of this length."""
        if levels > self.most_levels:
            return False
        return team_of(length, dtype, levels, mapped, self.room) is not None

    def __call__(self, x: Array, bits: Any, levels: int, *rest: Any) -> Launch:
        """The launch on rows that have a team.

        `x`, a map `bits` and the last output have the shape (rows, length), and the elements of a
        row lie side by side. The last output may have an axis of levels before, and is contiguous
        then, as all other outputs are. A scalar `bits` equals `levels`. `rest` holds integers,
        which become the kernel's last parameters, and then the outputs.
        """
        outputs = [value for value in rest if np.ndim(value)]
        integers = [levels] if self.passes_levels else rest[: len(rest) - len(outputs)]
        options = [np.int32(value) for value in integers]
        mapped = np.ndim(bits) > 0
        moved = (x, bits, outputs[-1]) if mapped else (x, outputs[-1])
        aligned = math.gcd(16, *[array.data.ptr // array.itemsize for array in moved])
        # From row to row. In a contiguous array it is not read from the strides: that of an axis
        # of length 1 may be anything, and the first axis may be that of levels.
        steps = [a.shape[-1] if a.flags.c_contiguous else a.strides[0] // a.itemsize for a in moved]
        template, grid, threads, sizes = _plan(
            x.shape, x.dtype, levels, mapped, self.room, aligned, *steps
        )
        pointers = (x, bits if mapped else _NO_MAP, *outputs)
        return Launch(template, grid, threads, (*pointers, *sizes, *options))


def side_by_side(array: Array) -> Array:
    """`array`, or a copy, in which neighbours on the last axis lie side by side in memory."""
    fine = array.shape[-1] <= 1 or array.strides[-1] == array.itemsize
    return array if fine else libraries.library(array).ascontiguousarray(array)


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: tuple[int, int],
    dtype: np.dtype[Any],
    levels: int,
    mapped: bool,
    room: Room,
    aligned: int,
    *steps: int,
) -> tuple[tuple[Any, ...], int, int, tuple[Any, ...]]:
    """Template, grid, block and the parameters after the pointers.

    They are cached, since finding them takes longer than launching a kernel.
    """
    rows, length = shape
    team = team_of(length, dtype, levels, mapped, room)
    if team is None:
        raise ValueError(f"no team holds {levels} levels of rows {shape} of {dtype}")
    fits = math.gcd(team.pack, aligned, *(steps if rows > 1 else ())) == team.pack
    access = team.pack if fits else 1
    compiled = next(n for n in LEVELS if n >= levels)
    threads = team.threads if team.name == "Block" else TILE_THREADS
    template = (team.name, C_TYPES[dtype.char], team.pack, access, team.capacity, compiled)
    spread = steps if mapped else (steps[0], 0, steps[1])
    return (
        (*template, str(mapped).lower()),
        -(-rows // (threads // team.threads)),
        threads,
        (np.int64(rows), np.int32(length), *(np.int64(step) for step in spread)),
    )
