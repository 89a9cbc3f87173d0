"""Rows in one launch: which threads share a row, and how its elements reach their registers.

A row is read once, worked on in registers and written once. The threads that share it are a team:
lanes of a warp for short rows, a block for long ones. Rows that no block holds take passes.

Every distinct set of template arguments is compiled once, which takes from a tenth of a second to
some seconds, and CuPy keeps the result on disk. So there are few. For a kernel, a dtype, a number
of levels, with or without a map, at most `MOST_TEMPLATES` serve rows of all lengths and alignments,
and `MOST_ALIGNED` the usual ones, of a multiple of 16 bytes. Numbers of levels share the kernels of
`LEVELS`. A map that is on the device already takes those of 16 levels, whatever is in it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cubin.core import libraries
from cubin.core.bits import MAX_BITS
from cubin.core.libraries import Array
from cubin.core.primitives import C_TYPES, Launch

CUDA = Path(__file__).with_suffix(".cuh").read_text(encoding="utf-8")
"""What kernels on whole rows share: the teams, and how they move elements."""

TILE_THREADS = 256
MOST_THREADS = 1024

Held = tuple[int, int, int]
"""How many elements a thread holds at most: in packs of 16 bytes with at most four scales beside
them, otherwise, and with a map beside them."""

Room = tuple[Held, Held, Held]
"""For items of 2, 4 and 8 bytes. More would spill with 64 registers, which let 1024 threads run on
a multiprocessor; and so many may a block have."""

GREEDY: Room = ((32, 16, 8), (32, 16, 16), (12, 8, 8))

LEVELS = (1, 2, 3, 4, 8, 16)
"""The numbers of levels that kernels are compiled for: they serve those in between, too."""

MOST_TEMPLATES = 34
"""How many templates of one kernel, dtype and number of levels all lengths and alignments take."""

MOST_ALIGNED = 8
"""How many of them rows take that begin and end at multiples of 16 bytes."""

_NO_MAP = np.uint64(0)


@dataclass(frozen=True)
class Team:
    """The threads that share a row.

    Attributes
    ----------
    name : str
        Its C++ type.
    threads : int
        How many they are.
    pack, held : int
        How many neighbouring elements a thread takes at a time, and how many elements in all.
    """

    name: str
    threads: int
    pack: int
    held: int


@functools.cache
def team_of(
    length: int, dtype: np.dtype[Any], levels: int, mapped: bool, room: Room = GREEDY
) -> Team | None:
    """The team for rows of this length, or None if they are empty or too long for all of them.

    Eight lanes add up in three shuffles where 32 take five, and still move whole sectors of memory.
    What threads hold is rounded up to a power of two, and packs are of 16 bytes, of four elements
    or of one: few templates serve all lengths.
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


@dataclass(frozen=True)
class RowLaunch:
    """How a kernel on whole rows is launched, and which rows it takes.

    Attributes
    ----------
    room : Room
        How many elements a thread holds.
    most_levels : int
    passes_levels : bool
        Whether the kernel takes the number of levels, since it may be compiled for more.
    """

    room: Room
    most_levels: int = MAX_BITS
    passes_levels: bool = False

    def takes(self, length: int, dtype: np.dtype[Any], levels: int, mapped: bool) -> bool:
        """Whether a team of threads holds rows of this length."""
        if levels > self.most_levels:
            return False
        return team_of(length, dtype, levels, mapped, self.room) is not None

    def __call__(self, x: Array, bits: Any, levels: int, *rest: Any) -> Launch:
        """The launch on rows that have a team.

        `x`, a map `bits` and the last output have the shape (rows, length) and elements side by
        side. Other outputs are contiguous, as is a last one with such an array for each level. A
        scalar `bits` equals `levels`. Before the outputs come integers, the kernel's last
        parameters.
        """
        outputs = [value for value in rest if np.ndim(value)]
        integers = [levels] if self.passes_levels else rest[: len(rest) - len(outputs)]
        options = [np.int32(value) for value in integers]
        mapped = np.ndim(bits) > 0
        moved = (x, bits, outputs[-1]) if mapped else (x, outputs[-1])
        aligned = math.gcd(16, *[array.data.ptr // array.itemsize for array in moved])
        # The stride of an axis of length 1 may be anything, and levels lie `rows` steps apart.
        steps = [a.shape[-1] if a.flags.c_contiguous else a.strides[0] // a.itemsize for a in moved]
        template, grid, threads, sizes = _plan(
            x.shape, x.dtype, levels, mapped, self.room, aligned, *steps
        )
        pointers = (x, bits if mapped else _NO_MAP, *outputs)
        return Launch(template, grid, threads, (*pointers, *sizes, *options))


def side_by_side(array: Array) -> Array:
    """An array whose last axis has elements side by side: itself, or a copy."""
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
    """Template, grid, block and the parameters after the pointers: kept, since finding them takes
    longer than launching."""
    rows, length = shape
    team = team_of(length, dtype, levels, mapped, room)
    if team is None:
        raise ValueError(f"no team holds {levels} levels of rows {shape} of {dtype}")
    fits = math.gcd(team.pack, aligned, *(steps if rows > 1 else ())) == team.pack
    access = team.pack if fits else 1
    compiled = next(n for n in LEVELS if n >= levels)
    threads = team.threads if team.name == "Block" else TILE_THREADS
    template = (team.name, C_TYPES[dtype.char], team.pack, access, team.held, compiled)
    spread = steps if mapped else (steps[0], 0, steps[1])
    return (
        (*template, str(mapped).lower()),
        -(-rows // (threads // team.threads)),
        threads,
        (np.int64(rows), np.int32(length), *(np.int64(step) for step in spread)),
    )
