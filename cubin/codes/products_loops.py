"""The primitives of `products.py` as compiled loops: see there for what each does.

Products look up signed sums: eight elements of x have 256 of them, and a byte of a plane says which
one a line needs. Neighbouring lines lie side by side in a plane, so that one instruction looks up
several.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cubin.codes import planes_loops
from cubin.codes.products import multiply_tiles
from cubin.core import memory
from cubin.core.host.loops import loop, part, read_only, uncounted
from cubin.core.libraries import Array

_STRIP = 64
"""Bytes of a line whose sums are added up in the work dtype. Their totals are added in float64."""


@part
def _fill_half(x: Array, half: Array) -> None:
    """Write the 16 sums of +-x for four elements; bit t of the index is the sign of element t."""
    half[0] = 0
    count = 1
    for t in range(4):
        value = x[t]
        for v in range(count):
            half[count + v] = half[v] + value
            half[v] -= value
        count *= 2


@part
def _fill(x: Array, halves: Array, table: Array) -> None:
    """Write the 256 sums of eight elements; `halves` is scratch."""
    low, high = halves[0], halves[1]
    _fill_half(x[:4], low)
    _fill_half(x[4:], high)
    for h in range(16):
        value = high[h]
        for v in range(16):
            table[16 * h + v] = value + low[v]


@part
def _add_eight(flat: Array, at: int, step: int, tables: Array, total: Array) -> None:
    """Add the sums of eight bytes of each line; byte j of the first line is at + j * step."""
    n = total.size
    p, q = flat[at : at + n], flat[at + step : at + step + n]
    r, s = flat[at + 2 * step : at + 2 * step + n], flat[at + 3 * step : at + 3 * step + n]
    t, u = flat[at + 4 * step : at + 4 * step + n], flat[at + 5 * step : at + 5 * step + n]
    v, w = flat[at + 6 * step : at + 6 * step + n], flat[at + 7 * step : at + 7 * step + n]
    a, b, c, d = tables[0], tables[1], tables[2], tables[3]
    e, f, g, h = tables[4], tables[5], tables[6], tables[7]
    for i in range(n):
        first = (a[p[i]] + b[q[i]]) + (c[r[i]] + d[s[i]])
        total[i] += first + ((e[t[i]] + f[u[i]]) + (g[v[i]] + h[w[i]]))


@part
def _add_one(flat: Array, at: int, table: Array, total: Array) -> None:
    held = flat[at : at + total.size]
    for i in range(total.size):
        total[i] += table[held[i]]


@loop
def _look_up(
    flat: Array, level_step: int, byte_step: int, width: int, scales: Array, x: Array,
    halves: Array, tables: Array, totals: Array, y: Array,
) -> None:  # fmt: skip
    """Write the products of x, filled up to whole bytes, with some lines to `y`, in float64.

    Byte j of line i at a level is ``flat[level * level_step + j * byte_step + i]``. `halves`,
    `tables` and `totals`, (levels, lines), are scratch.
    """
    flat, scales, x = uncounted(flat, scales, x)
    halves, tables = uncounted(halves, tables)
    totals, y = uncounted(totals, y)
    levels, lines = totals.shape
    runs, own = scales.shape[2], scales.shape[1] > 1
    of_run = width // runs
    y[:] = 0
    for number in range(runs):
        end = (number + 1) * of_run
        for start in range(number * of_run, end, _STRIP):
            stop = min(start + _STRIP, end)
            totals[:] = 0
            for at in range(start, stop, 8):
                count = min(8, stop - at)
                for c in range(count):
                    _fill(x[8 * (at + c) : 8 * (at + c) + 8], halves, tables[c])
                for level in range(levels):
                    first = level * level_step + at * byte_step
                    if count == 8:
                        _add_eight(flat, first, byte_step, tables, totals[level])
                    else:
                        for c in range(count):
                            _add_one(flat, first + c * byte_step, tables[c], totals[level])
            for level in range(levels):
                total = totals[level]
                if own:
                    scale = scales[level, :, number]
                    for i in range(lines):
                        y[i] += np.float64(scale[i]) * np.float64(total[i])
                else:
                    factor = np.float64(scales[level, 0, number])
                    for i in range(lines):
                        y[i] += factor * np.float64(total[i])


def multiply_lines(planes: Array, bits: Any, scales: Array, x: Array, *, y: Array) -> None:
    """`products.multiply_lines`."""
    levels, width, lines = planes.shape
    runs, length = scales.shape[2], x.shape[1]
    side_by_side = planes.strides[2] == 1 or lines == 1
    if np.ndim(bits) or not side_by_side or (runs > 1 and length // runs % 8):
        multiply_tiles(planes_loops.sum_planes, planes, bits, scales, x, y)
        return
    levels = min(levels, int(bits))
    level_step, byte_step, _ = planes.strides
    extent = (levels - 1) * level_step + (width - 1) * byte_step + lines
    flat = read_only(np.lib.stride_tricks.as_strided(planes, (extent,), (1,)))
    halves = memory.scratch("halves", (2, 16), x.dtype)
    tables = memory.scratch("tables", (8, 256), x.dtype)
    totals = memory.scratch("totals", (levels, lines), x.dtype)
    result = memory.scratch("result", (lines,), np.float64)
    filled = np.zeros(8 * width, x.dtype)
    held = read_only(np.ascontiguousarray(scales[:levels]))
    for row, values in enumerate(x):
        filled[:length] = values
        _look_up(flat, level_step, byte_step, width, held, filled, halves, tables, totals, result)
        y[row] = result


@intrinsic
def _ones(context: Any, word: Any) -> Any:
    """The number of ones of a 64-bit word."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


@loop
def _count_unequal(a: Array, b: Array, counts: Array) -> None:
    a, b, counts = uncounted(a, b, counts)
    for start in range(0, len(b), 64):  # so many rows of b stay in the cache
        for row in range(len(a)):
            words = a[row]
            for line in range(start, min(start + 64, len(b))):
                others, count = b[line], np.uint64(0)
                for j in range(words.size):
                    count += _ones(words[j] ^ others[j])
                counts[row, line] = count


def count_unequal(a: Array, b: Array, *, counts: Array) -> None:
    """`products.count_unequal`."""
    found = np.empty(counts.shape, np.int32)
    _count_unequal(read_only(a), read_only(b), found)
    counts[...] = found
