"""Primitives of packed planes: from signs to planes, and from planes to approximations.

A plane holds the signs of a level, one bit each: see `cubin.core.lines.Lines`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from cubin.core import libraries, memory
from cubin.core.bits import MAX_BITS
from cubin.core.floats import where
from cubin.core.libraries import Array
from cubin.core.primitives import C_TYPES, FLOATS, Launch, elementwise, raw, source

_CUDA = source(__file__)

_TILE = 32
"""Lines, and bytes of a line, that a block of threads works on at a time."""

_THREADS = 256


def _tiles(lines: int, width: int) -> int:
    return max(1, -(-lines // _TILE)) * max(1, -(-width // _TILE))


def _pack_launch(signs: Array, planes: Array) -> Launch:
    levels, lines, length = signs.shape
    signs = libraries.library(signs).ascontiguousarray(signs)
    sizes = (np.int64(lines), np.int64(length), np.int32(levels))
    steps = (np.int64(planes.strides[0]), np.int64(planes.strides[1]))
    grid = min(levels * _tiles(lines, planes.shape[1]), 1 << 16)
    return Launch((_THREADS,), grid, _THREADS, (signs, planes, *sizes, *steps))


@raw(
    "int8 signs",
    "uint8 planes",
    code=_CUDA,
    launch=_pack_launch,
    types=({},),
    looped=True,
)
def pack_signs(signs: np.ndarray, *, planes: np.ndarray) -> None:
    """Planes, (levels, bytes, lines), with a bit set where signs, (levels, lines, n), are +1.

    The lines of a plane lie side by side in memory.
    """
    for sign, plane in zip(signs, planes, strict=True):
        plane[...] = np.packbits(sign > 0, axis=1, bitorder="little").T


@elementwise("uint8 lines", "uint8 planes", "planes = lines", types=({},), looped=True)
def turn_lines(lines: np.ndarray, *, planes: np.ndarray) -> None:
    """Copy bytes of signs, (levels, bytes, lines), to planes. Those of a line lie side by side."""
    planes[...] = lines


def join_rows(signs: np.ndarray, length: int, count: int) -> np.ndarray:
    """The bytes of lines, (levels, count, bytes), from those of their rows, (levels, rows, bytes).

    A row has `length` bits, which need not fill bytes. Those of a line follow each other.
    """
    bits = np.unpackbits(signs, axis=2, count=length, bitorder="little")
    return np.packbits(bits.reshape(len(signs), count, -1), axis=2, bitorder="little")


_NONE = np.uint64(0)
"""A null pointer, in place of a map or a shift."""


def _sum_launch(
    planes: Array, bits: Any, scales: Array, shift: Any, run: int, period: int, y: Array
) -> Launch:
    levels, width, lines = planes.shape
    mapped = np.ndim(bits) > 0
    xp = libraries.library(planes)
    if period % run and period < y.shape[1]:
        # Of what lies in even runs alone, the kernel finds the scale.
        places = xp.asarray(places_of(y.shape[1], run, period))
        scales, run = scales[..., places], 1
        shift = shift[..., places] if np.ndim(shift) else shift
    scales = xp.ascontiguousarray(scales)
    held = xp.ascontiguousarray(bits) if mapped else _NONE
    shift = xp.ascontiguousarray(shift) if np.ndim(shift) else _NONE
    levels = min(levels, MAX_BITS) if mapped else min(levels, int(bits))
    _, scaled_lines, runs = scales.shape
    template = (C_TYPES[y.dtype.char], C_TYPES[scales.dtype.char], str(mapped).lower())
    sizes = (lines, y.shape[1], width, planes.strides[0], planes.strides[1],
             run, runs, scaled_lines,
             y.strides[0] // y.itemsize)  # fmt: skip
    numbers = (*map(np.int64, sizes), np.int32(levels))
    grid = min(_tiles(lines, width), 1 << 16)
    return Launch(template, grid, _THREADS, (planes, held, scales, shift, y, *numbers))


SHORT = 1 << 5
"""Elements of a run from which on NumPy's broadcasting along it is faster than copies of scales."""


def place_of(elements: Any, run: int, period: int) -> Any:
    """The numbers of the runs that elements of a line lie in; see `sum_planes`."""
    return elements // period * -(-period // run) + elements % period // run


@lru_cache(maxsize=8)
def places_of(length: int, run: int, period: int) -> np.ndarray:
    """The same of all elements of a line."""
    return place_of(np.arange(length, dtype=np.int64), run, period)


@raw(
    "uint8 planes, uint8 bits, W scales, W shift, static int64 run, static int64 period",
    "T y",
    code=_CUDA,
    launch=_sum_launch,
    types=FLOATS,
    looped=True,
)
def sum_planes(
    planes: np.ndarray, bits: Any, scales: np.ndarray, shift: Any, run: int, period: int,
    *, y: np.ndarray,
) -> None:  # fmt: skip
    """The shift and the sum of scale * sign over the levels of each element of some lines.

    Parameters
    ----------
    planes : array of uint8, shape (levels, bytes, lines)
        The lines of a plane lie side by side in memory.
    bits : uint8 scalar or array of shape (lines, n)
        A level at or above the bits of an element does not count, even if its scale is NaN.
    scales : array in the work dtype, shape (levels, lines or 1, runs)
        Those of the runs of a line.
    shift : array in the work dtype, shape (lines or 1, runs); or 0
        What sums begin with. It has as many lines as `scales`. With it, what an addition rounds
        away is kept, and added at the end: a sum then is off by hardly more than half a unit in its
        last place, which the codes of uniform integers need.
    run, period : int
        So many elements share a scale. Runs begin anew after each `period`: the last one before may
        be shorter. Periods fill a line, or there is one, which ends with the line.
    y : array of shape (lines, n)
        The elements of a line lie side by side in memory.
    """
    lines, length = y.shape
    if not y.size:
        return
    total = memory.scratch("total", y.shape, scales.dtype)
    step = memory.scratch("step", y.shape, scales.dtype)
    lost = memory.scratch("lost", y.shape, scales.dtype) if np.ndim(shift) else None
    runs = scales.shape[2]
    even = runs == 1 or (run >= SHORT and runs * run == length)
    in_runs = (lines, runs, length // runs) if even else (lines, length, 1)

    def spread(numbers: np.ndarray) -> np.ndarray:
        places = None if even or run == 1 else places_of(length, run, period)
        return (numbers if places is None else numbers.take(places, axis=-1))[..., None]

    total.reshape(in_runs)[...] = spread(shift) if np.ndim(shift) else 0
    if lost is not None:
        lost[...] = 0
    for level, (plane, scale) in enumerate(zip(planes, scales, strict=True)):
        if not np.ndim(bits) and level >= bits:
            break
        sign = np.unpackbits(np.ascontiguousarray(plane.T), 1, length, "little").view(np.int8)
        np.subtract(np.add(sign, sign, out=sign), 1, out=sign)
        np.multiply(spread(scale), sign.reshape(in_runs), out=step.reshape(in_runs))
        if np.ndim(bits):
            where(bits > level, step, out=step)
        if lost is not None:
            lost += _lost(total, step)
        np.add(total, step, out=total)
    if lost is not None:
        where(lost == lost, lost, out=lost)  # it is NaN where a sum is not finite
        np.add(total, lost, out=total)
    y[...] = total


def _lost(total: np.ndarray, step: np.ndarray) -> np.ndarray:
    """What ``total + step`` rounds away, exactly: Knuth's sum of two numbers."""
    rounded = total + step
    added = rounded - total
    return (total - (rounded - added)) + (step - added)
