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
        How many elements one access moves, and how many a thread holds.
    """

    name: str
    threads: int
    pack: int
    held: int


@functools.cache
def team_of(length: int, dtype: np.dtype[Any], pack: int, levels: int, mapped: bool) -> Team | None:
    """The team for rows of this length, or None if it is too long for all of them.

    64 registers let 1024 threads run on a multiprocessor, and so may a block have. 32 of them hold
    elements where accesses are 16 bytes wide and few scales need room beside them, else 16: more
    would spill. Eight lanes add up in three shuffles where 32 take five, and still move whole
    sectors of memory.
    """
    roomy = pack * dtype.itemsize == 16 and levels <= 4 and not mapped
    words = arrays.work_dtype(dtype).itemsize // 4
    most, least = (32 if roomy else 16) // words, 16 // words
    if length <= 8 * least:
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


def pack_of(x: Array, *others: Array) -> int:
    """The most elements that one access of at most 16 bytes of `x` may move in all these rows.

    They have the shape (rows, length) and elements side by side.
    """
    rows, length = x.shape
    parts = [length, 16 // x.itemsize]
    for array in (x, *others):
        parts.append(array.data.ptr // array.itemsize)
        parts.append(array.strides[0] // array.itemsize if rows > 1 else 0)
    return math.gcd(*parts)


def team(x: Array, bits: Array, levels: int, *outputs: Array) -> Team | None:
    """The team that `launch` lets work on these rows; None if they are too long, or empty."""
    mapped = np.ndim(bits) > 0
    if not x.size or not levels:
        return None
    pack = pack_of(x, bits, outputs[-1]) if mapped else pack_of(x, outputs[-1])
    return team_of(x.shape[1], x.dtype, pack, levels, mapped)


def launch(x: Array, bits: Array, levels: int, *outputs: Array) -> Launch:
    """The launch of a kernel on rows that have a team.

    `x`, a map `bits` and the last output have the shape (rows, length) and elements side by side;
    the other outputs are contiguous. A scalar `bits` equals `levels`.
    """
    mapped = np.ndim(bits) > 0
    chosen = team(x, bits, levels, *outputs)
    if chosen is None:
        raise ValueError(f"no team holds {levels} levels of rows {x.shape} of {x.dtype}")
    rows, length = x.shape
    threads = chosen.threads if chosen.name == "Block" else TILE_THREADS
    grid = -(-rows // (threads // chosen.threads))
    template = (
        chosen.name, _C_TYPES[x.dtype.char], chosen.pack, chosen.held, levels, str(mapped).lower()
    )  # fmt: skip
    steps = [a.strides[0] // a.itemsize for a in (x, *([bits] if mapped else []), outputs[-1])]
    if not mapped:
        steps.insert(1, 0)
    sizes = (np.int64(rows), np.int32(length), *map(np.int64, steps))
    pointer = bits if mapped else np.uint64(0)
    return Launch(template, grid, threads, (x, pointer, *outputs, *sizes))
