"""Products of arrays with packed codes, which are never unpacked as a whole.

For a few rows of x and levels, `multiply_lines` goes through the planes themselves. Beyond, tiles
of lines are decoded and multiplied, by compiled loops or by BLAS: every tile then serves many rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cubin.codes.decoding import Decoding, bytes_of_lines
from cubin.codes.planes import sum_planes
from cubin.core import conversions, libraries, memory, passes
from cubin.core.bits import MAX_BITS
from cubin.core.libraries import Array
from cubin.core.lines import Lines
from cubin.core.primitives import C_TYPES, FLOATS, Launch, raw, source

_CUDA = source(__file__)

FEW = 16
"""Rows of x, times levels, that `multiply_lines` takes."""

FEW_ON_DEVICE = 64
"""The same on a device: a guess until a GPU is seen. A level takes two look-ups for each byte and
row, and from about so many on BLAS is faster, on tiles that lie in the second-level cache."""

TILE = 1 << 21
"""Elements of a tile that BLAS multiplies: 8 MB of float32."""

SUBTILE = 1 << 17
"""Elements of a tile that `multiply_lines` decodes, in the cache."""

LEAST = 1 << 7
"""The fewest lines that a thread takes, for all of which sums of x are made; or rows of x, for all
of which lines are decoded."""

STEPS = 1 << 3
"""Elements, times rows and levels, that take as long as reading and writing an element."""

EXACT = 1 << 23
"""The longest sum of signs that float32 holds exactly, however it is added up."""

_NO_MAP = np.uint64(0)


def _multiply_launch(planes: Array, bits: Any, scales: Array, x: Array, y: Array) -> Launch:
    levels, _, lines = planes.shape
    mapped, xp = np.ndim(bits) > 0, libraries.library(planes)
    scales, x = xp.ascontiguousarray(scales), xp.ascontiguousarray(x)
    held = xp.ascontiguousarray(bits) if mapped else _NO_MAP
    levels = min(levels, MAX_BITS) if mapped else min(levels, int(bits))
    _, scaled_lines, runs = scales.shape
    batch, length = x.shape
    run = max(1, length // max(1, runs))
    # Strips of four bytes that cover a run, which may begin within a byte.
    strips = -(-run // 32) if run % 8 == 0 else -(-(run + 14) // 32)
    # Shared memory has 32 KB of sums. With more warps more bytes are on their way at a time.
    rows = min(1 << (batch - 1).bit_length(), 32 // x.itemsize)
    warps = 32 if rows * x.itemsize <= 8 else 8
    sizes = (batch, lines, length, planes.strides[0], planes.strides[1], run, runs, strips,
             scaled_lines, y.strides[0] // y.itemsize)  # fmt: skip
    grid = max(1, -(-lines // 32) * -(-batch // rows))
    numbers = (*map(np.int64, sizes), np.int32(levels))
    template = (C_TYPES[y.dtype.char], str(mapped).lower(), rows, warps)
    return Launch(template, grid, 32 * warps, (planes, held, scales, x, y, *numbers))


@raw(
    "uint8 planes, uint8 bits, W scales, W x",
    "W y",
    code=_CUDA,
    launch=_multiply_launch,
    types=FLOATS[2:],
    looped=True,
)
def multiply_lines(
    planes: np.ndarray, bits: Any, scales: np.ndarray, x: np.ndarray, *, y: np.ndarray
) -> None:
    """The products of rows of x with lines of a code: ``y[b, i] = sum_e x[b, e] * value[i, e]``.

    Parameters
    ----------
    planes, bits, scales
        As `sum_planes` has them.
    x : array in the work dtype, shape (rows, n)
    y : array, shape (rows, lines)
        Its last axis lies side by side in memory.
    """
    multiply_tiles(sum_planes.function, planes, bits, scales, x, y)


def by_lines(x: Array, decoding: Decoding) -> Callable[..., None] | None:
    """The form of `multiply_lines` for rows of x and parts of the lines, or of the rows.

    None where BLAS on decoded tiles of all lines is faster. Compiled loops have their own rule.
    """
    few = FEW_ON_DEVICE if libraries.on_device(x) else FEW
    if len(x) * decoding.levels > few:
        return None
    return passes.form(multiply_lines, x, decoding.lines.count * decoding.lines.length)


def new_tile(count: int, decoding: Decoding, x: Array) -> Array:
    """Memory for so many lines, in the order in which they are decoded fastest."""
    return libraries.library(x).empty((count, decoding.lines.length), x.dtype)


def multiply_tiles(
    add_up: Callable[..., None], planes: Array, bits: Any, scales: Array, x: Array, y: Array
) -> None:
    """`multiply_lines` by BLAS, on tiles that `add_up`, a form of `sum_planes`, writes."""
    length, lines = x.shape[1], y.shape[1]
    step = max(1, SUBTILE // max(1, length))
    for start in range(0, lines, step):
        cut = slice(start, min(start + step, lines))
        tile = memory.scratch("tile", (cut.stop - start, length), x.dtype)
        depths = bits[cut] if np.ndim(bits) else bits
        of_tile = scales[:, cut] if scales.shape[1] > 1 else scales
        run = length // max(1, scales.shape[2])
        add_up(planes[..., cut], depths, of_tile, 0, run, length, y=tile)
        y[:, cut] = x @ tile.T


def _count_launch(a: Array, b: Array, counts: Array) -> Launch:
    sizes = (np.int64(len(a)), np.int64(len(b)), np.int64(a.shape[1]))
    grid = max(1, -(-len(a) // 16) * -(-len(b) // 16))
    return Launch((16,), grid, 256, (a, b, counts, *sizes))


@raw(
    "uint64 a, uint64 b",
    "int32 counts",
    code=_CUDA,
    launch=_count_launch,
    types=({},),
    looped=True,
)
def count_unequal(a: np.ndarray, b: np.ndarray, *, counts: np.ndarray) -> None:
    """How many bits differ between each row of a, (p, words), and each row of b, (q, words)."""
    for row, words in enumerate(a):
        differ = np.bitwise_xor(words, b).view(np.uint8)
        counts[row] = _ONES[differ].sum(axis=1, dtype=np.int32)


_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)
"""The number of ones of every byte."""


# ---------------------------------------------------------------- with arrays


def to_lines(x: Array, decoding: Decoding) -> Array:
    """``x @ values.T``: rows of x, (b, n) in the work dtype, times the lines, as (b, m)."""
    found = [_to_lines(x[:, elements], part) for elements, part in decoding.sections()]
    return sum(found[1:], start=found[0])


def _to_lines(x: Array, decoding: Decoding) -> Array:
    xp: Any = libraries.library(x)
    decoding = decoding.in_dtype(x.dtype)
    if libraries.on_device(x) and not decoding.even:
        decoding = decoding.evened()
    lines, levels = decoding.lines, decoding.levels
    y = xp.zeros((len(x), lines.count), x.dtype)
    if not (y.size and lines.length):
        return y
    forms = _forms(x, decoding)
    on = forms.by_lines(x, decoding) if decoding.even else None
    if on is not None:
        rows = Lines(len(x), (lines.length,))
        most, other = (lines, rows) if lines.count >= rows.count else (rows, lines)

        def task(cut: slice, elements: slice) -> None:
            of_lines, of_rows = cut, slice(None)
            if most is rows:
                of_lines, of_rows = slice(0, lines.count), cut
            on(decoding.planes[..., of_lines], decoding.bits(of_lines), decoding.scales(of_lines),
               x[of_rows], y=y[of_rows, of_lines])  # fmt: skip

        if levels:
            work = most.count * other.count * levels * lines.length // forms.STEPS
            passes.for_each_lines(task, most, 1, x, least=LEAST, work=work)
        if decoding.shifted:
            with np.errstate(all="ignore"):  # x may not be finite
                y += _of_shift(x, decoding)
        return y
    for cut, tile in _tiles(decoding, x):
        y[:, cut] = xp.matmul(x, tile.T)
    return y


def from_lines(x: Array, decoding: Decoding) -> Array:
    """``x @ values``: rows of x, (b, m) in the work dtype, times the columns, as (b, n)."""
    xp: Any = libraries.library(x)
    found = [_from_lines(x, part) for _, part in decoding.sections()]
    return xp.concatenate(found, axis=1) if len(found) > 1 else found[0]


def _from_lines(x: Array, decoding: Decoding) -> Array:
    xp: Any = libraries.library(x)
    decoding = decoding.in_dtype(x.dtype)
    y = xp.zeros((len(x), decoding.lines.length), x.dtype)
    if y.size and (decoding.levels or decoding.shifted):
        for cut, tile in _tiles(decoding, x):
            y += xp.matmul(x[:, cut], tile)
    return y


def _of_shift(x: Array, decoding: Decoding) -> Array:
    """What the shift adds to the products of rows of x with lines, (b, lines or 1) in float64."""
    shift = decoding.shift(slice(0, decoding.lines.count)).astype(np.float64)
    of_runs = x.reshape(len(x), shift.shape[1], -1).sum(axis=2, dtype=np.float64)
    return libraries.library(x).matmul(of_runs, shift.T)


def _forms(x: Array, decoding: Decoding) -> Any:
    """The module of the forms that run: this one, or that of its compiled loops."""
    own, lines = sys.modules[__name__], decoding.lines
    return passes.search_loops(own, x, lines.count * lines.length) or own


def _tiles(decoding: Decoding, x: Array) -> Any:
    """Slices of lines, and their values in x's dtype. The next tile overwrites the last one."""
    lines = decoding.lines
    step = max(1, TILE // max(1, lines.length))
    tile = _forms(x, decoding).new_tile(min(step, lines.count), decoding, x)
    for start in range(0, lines.count, step):
        cut = slice(start, min(start + step, lines.count))
        part = tile[: cut.stop - start]
        decoding.part(cut).write_all(part)
        yield cut, part


# ---------------------------------------------------------------- with codes


def between(one: Decoding, other: Decoding, dtype: Any) -> Array:
    """``values @ other_values.T`` of two codes of lines of one length: exact sums of signs, scaled.

    Signs are compared by XOR and counted, in runs that share their scales in both codes. Where
    these are shorter than a byte, one code is decoded in float64, and multiplied with the other.
    """
    one, other = one.as_levels(), other.as_levels()
    length = one.lines.length
    xp: Any = libraries.library(one.planes)
    y = xp.zeros((one.lines.count, other.lines.count), dtype)
    if not (y.size and length):
        return y
    cuts = _cuts(length, one, other)
    if length < 8 * len(cuts):
        for cut, tile in _tiles(one.in_dtype(np.dtype(np.float64)), xp.empty(0)):
            y[cut] = conversions.rounded(to_lines(tile, other), dtype)
        return y
    counted = not (one.mapped or other.mapped) and all(cut.start % 8 == 0 for cut in cuts)
    if counted:
        held = [[_words(of, cut) for of in (one, other)] for cut in cuts]
    else:
        signs = [[of.signs(at) for at in range(of.levels)] for of in (one, other)]
        held = [[[sign[:, cut] for sign in of] for of in signs] for cut in cuts]
    words = -(-length // 64)
    work = y.size * words * one.levels * other.levels
    on = passes.form(count_unequal, one.planes, work)

    scales, others = (of.scales(slice(0, of.lines.count)).astype(np.float64) for of in (one, other))
    if scales.shape[1] == 1:
        scales = scales.repeat(len(y), axis=1)

    def add_up(rows: slice, lines: slice, at_once: Sequence[slice]) -> None:
        shape = y[rows, lines].shape
        total, of_lines = xp.zeros(shape, np.float64), lines if others.shape[1] > 1 else slice(1)
        for cut, (a, b) in zip(cuts, held, strict=True):
            at, of = one.place(cut.start), other.place(cut.start)
            for p in range(one.levels):
                own = scales[p, rows, at, None]
                for q in range(other.levels):
                    if counted:
                        found = xp.empty(shape, np.int32)
                        on(a[p][rows], b[q][lines], counts=found)
                        found = (cut.stop - cut.start) - 2.0 * found
                    else:
                        found = _dots(a[p], b[q])
                    for some in at_once:
                        total[some] += own[some] * others[q, of_lines, of] * found[some]
        y[rows, lines] = conversions.rounded(total, dtype)

    def task(lines: slice, elements: slice) -> None:
        for rows in passes.row_slices(y[:, lines]):
            add_up(rows, lines, [slice(None)])

    # What some rows take stays in the cache. BLAS gets all of them.
    if counted:
        lines = Lines(other.lines.count, (words,))
        passes.for_each_lines(task, lines, 1, one.planes, least=LEAST, work=work)
    else:
        add_up(slice(0, len(y)), slice(0, other.lines.count), passes.row_slices(y))
    return y


def signs_to_lines(signs: list[Array], scales: Array, decoding: Decoding) -> Array:
    """Rows of signs, (b, n) for each level, times the lines, as (b, m) in float64.

    `scales`, (levels, c), are those of equally many neighbouring rows, b / c. A sign may be 0.
    """
    decoding = decoding.as_levels()
    xp: Any = libraries.library(decoding.planes)
    lines = decoding.lines
    rows = len(signs[0]) if signs else 0
    total = xp.zeros((rows, lines.count), np.float64)
    if not total.size:
        return total
    each = decoding.scales(slice(0, lines.count)).astype(np.float64)
    others = [decoding.signs(q) for q in range(decoding.levels)]
    cuts = _cuts(lines.length, decoding)
    for sign, scale in zip(signs, scales.astype(np.float64), strict=True):
        own = xp.repeat(scale, rows // len(scale))[:, None]
        for q, other in enumerate(others):
            for cut in cuts:
                scale_of_cut = each[q][:, decoding.place(cut.start)]
                total += own * scale_of_cut * _dots(sign[:, cut], other[:, cut])
    return total


def _cuts(length: int, *codes: Decoding) -> list[slice]:
    """The runs of elements of a line that share their scales in each of some codes."""
    starts = sorted({start for code in codes for start in code.starts()})
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], length], strict=True)]


def _words(of: Decoding, cut: slice) -> Array:
    """The bits of some elements, (levels, lines, words), filled up with zeros."""
    held = of.planes[: of.levels, cut.start // 8 : -(-cut.stop // 8)]
    return bytes_of_lines(held, -(-held.shape[1] // 8) * 8).view(np.uint64)


def _dots(a: Array, b: Array) -> Array:
    """``a @ b.T`` of signs, exactly."""
    xp: Any = libraries.library(a)
    total = xp.zeros((len(a), len(b)), np.float64)
    for start in range(0, a.shape[1], EXACT):
        cut = slice(start, start + EXACT)
        total += xp.matmul(a[:, cut].astype(np.float32), b[:, cut].astype(np.float32).T)
    return total
