"""Rows in one launch: which threads share a row, and how its elements reach their registers.

A row is read once, worked on in registers and written once. The threads that share it are a team:
lanes of a warp for short rows, a block for long ones. Rows that no block holds take passes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cubin import arrays, kernels
from cubin.arrays import Array, Rows
from cubin.kernels import Launch

CUDA = kernels.source(__file__)
"""The kernels that `launch` launches."""

TILE_THREADS = 256
MOST_THREADS = 1024

_MOST_HELD = {2: (32, 16, 8), 4: (32, 16, 16), 8: (12, 8, 8)}
"""The most elements of an item size that a thread holds: in packs of 16 bytes with at most four
scales beside them, otherwise, and with a map beside them. More would spill with 64 registers, which
let 1024 threads run on a multiprocessor; and so many may a block have."""

_NO_MAP = np.uint64(0)
_C_TYPES = {"e": "float16", "f": "float", "d": "double"}


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
def team_of(length: int, dtype: np.dtype[Any], levels: int, mapped: bool) -> Team | None:
    """The team for rows of this length, or None if they are empty or too long for all of them.

    Eight lanes add up in three shuffles where 32 take five, and still move whole sectors of memory.
    """
    pack = math.gcd(length, 16 // dtype.itemsize, 4 if length <= 32 or mapped else 8)
    roomy, plain, beside_map = _MOST_HELD[dtype.itemsize]
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
    unit = max(pack, 4)
    return Team(name, threads, pack, unit * -(-length // (threads * unit)))


def flat(array: Array, rows: Rows) -> Array:
    """An array of the rows' shape as `launch` takes it, copied where it must be; or a scalar."""
    return array if isinstance(array, np.generic) else side_by_side(rows.flat(array))


def side_by_side(array: Array) -> Array:
    """Rows of (rows, length) with elements side by side: themselves, or a copy."""
    fine = array.shape[1] <= 1 or array.strides[1] == array.itemsize
    return array if fine else arrays.library(array).ascontiguousarray(array)


def launch(x: Array, bits: Array, levels: int, *outputs: Array) -> Launch:
    """The launch of a kernel on rows that have a team.

    `x`, a map `bits` and the last output have the shape (rows, length) and elements side by side;
    the other outputs are contiguous. A scalar `bits` equals `levels`.
    """
    mapped = np.ndim(bits) > 0
    moved = (x, bits, outputs[-1]) if mapped else (x, outputs[-1])
    aligned = math.gcd(16, *[array.data.ptr // array.itemsize for array in moved])
    steps = [array.strides[0] // array.itemsize for array in moved]
    template, grid, threads, sizes = _plan(x.shape, x.dtype, levels, mapped, aligned, *steps)
    return Launch(template, grid, threads, (x, bits if mapped else _NO_MAP, *outputs, *sizes))


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: tuple[int, int],
    dtype: np.dtype[Any],
    levels: int,
    mapped: bool,
    aligned: int,
    *steps: int,
) -> tuple[tuple[Any, ...], int, int, tuple[Any, ...]]:
    """Template, grid, block and the parameters after the pointers: kept, since finding them takes
    longer than launching."""
    rows, length = shape
    team = team_of(length, dtype, levels, mapped)
    if team is None:
        raise ValueError(f"no team holds {levels} levels of rows {shape} of {dtype}")
    access = math.gcd(team.pack, aligned, *(steps if rows > 1 else ()))
    threads = team.threads if team.name == "Block" else TILE_THREADS
    template = (team.name, _C_TYPES[dtype.char], team.pack, access, team.held, levels)
    spread = steps if mapped else (steps[0], 0, steps[1])
    return (
        (*template, str(mapped).lower()),
        -(-rows // (threads // team.threads)),
        threads,
        (np.int64(rows), np.int32(length), *(np.int64(step) for step in spread)),
    )
