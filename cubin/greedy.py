"""The greedy levels: each takes the sign of the residual, times the mean of its magnitude.

Neither residuals nor signs are ever stored: the residual is recomputed from x and the scales found
so far. On a device, k levels read x k + 1 times and write once; on the host a block of rows stays
in the cache meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from cubin import arrays, blocks, passes
from cubin.arrays import Array, Rows
from cubin.kernels import FLOATS, elementwise, reduction, source
from cubin.passes import Part
from cubin.signs import where, with_sign_of

_CUDA = source(__file__)

# ---------------------------------------------------------------- primitives


@reduction(
    "T x, uint8 bits, *W scales",
    "float64 total, int64 count",
    map="bits > {count} ? Sum(to_double(magnitude(absolute(Work<T>::type(x)){scales})), 1) : Sum()",
    reduce="a + b",
    post_map="total = a.total, count = a.count",
    identity="Sum()",
    reduce_type="Sum",
    types=FLOATS,
    preamble=_CUDA,
)
def level_sums(
    x: np.ndarray, bits: np.ndarray, *scales: np.ndarray, total: np.ndarray, count: np.ndarray
) -> None:
    """The sum of |residual| after `scales`, and the number of elements with a code at this level.

    ``total = sum(|r| where bits > len(scales))``, in float64.
    """
    m = np.abs(x, dtype=arrays.work_dtype(x.dtype))
    for scale in scales:
        np.abs(np.subtract(m, scale, out=m), out=m)
    hot = np.greater(bits, len(scales))
    if hot.ndim:
        where(hot, m, out=m)
        np.sum(hot, axis=-1, keepdims=True, dtype=np.int64, out=count)
    else:
        m, count[...] = (m, m.shape[-1]) if hot else (m[..., :0], 0)
    np.sum(m, axis=-1, keepdims=True, dtype=np.float64, out=total)


@reduction(
    "float64 totals, int64 counts",
    "W scale",
    map="Sum(totals, counts)",
    reduce="a + b",
    post_map="scale = a.count ? from_double<W>(a.total / a.count) : W(0)",
    identity="Sum()",
    reduce_type="Sum",
    types=FLOATS[1:],
    preamble=_CUDA,
)
def level_scale(totals: np.ndarray, counts: np.ndarray, *, scale: np.ndarray) -> None:
    """The mean over the pieces of a row, or 0 where no element has a code."""
    count = counts.sum(axis=-1, keepdims=True)
    scale[...] = totals.sum(axis=-1, keepdims=True) / np.maximum(count, 1)


@elementwise(
    "T x, uint8 bits, *W scales",
    "T y",
    "y = T(approximation<T>(Work<T>::type(x), bits{scales}))",
    types=FLOATS,
    preamble=_CUDA,
)
def approximation(x: np.ndarray, bits: np.ndarray, *scales: np.ndarray, y: np.ndarray) -> None:
    """The sum of scale * sign over each element's levels, of the scales as stored in x's dtype."""
    work = arrays.work_dtype(x.dtype)
    total = np.zeros(x.shape, work)
    r = x.astype(work)
    for level, scale in enumerate(scales):
        step = with_sign_of(r, scale)
        np.subtract(r, step, out=r)
        step = step.astype(x.dtype, copy=False).astype(work, copy=False)
        if np.ndim(bits):
            where(bits > level, step, out=step)
        if np.ndim(bits) or level < bits:
            np.add(total, step, out=total)
    y[...] = total


@elementwise(
    "T x, uint8 bits, *W scales",
    "uint16 code",
    "code = codes(Work<T>::type(x), bits{scales})",
    types=FLOATS,
    preamble=_CUDA,
)
def codes(x: np.ndarray, bits: np.ndarray, *scales: np.ndarray, code: np.ndarray) -> None:
    """Bit i is set where level i of the element has the sign +1."""
    r = x.astype(arrays.work_dtype(x.dtype))
    code[...] = 0
    for level, scale in enumerate(scales):
        positive = (r > 0) & (bits > level)
        np.bitwise_or(code, positive.astype(np.uint16) << level, out=code)
        np.subtract(r, with_sign_of(r, scale), out=r)


# ---------------------------------------------------------------- rows

Finish = Callable[[Part, Array, Array, "list[Array]"], None]
"""Takes a part of the rows, its elements and their bits as (rows, n), and the rows' scales,
(rows, 1) for each level."""


def approximate(x: Array, bits: Array, levels: int, rows: Rows, y: Array) -> None:
    """Write the approximation of `x` to `y`, which is `x` itself or does not overlap it.

    `bits` is a uint8 scalar, or an array of x's shape.
    """
    loops = _loops(x)
    view = rows.view(y)

    def finish(part: Part, x: Array, bits: Array, scales: list[Array]) -> None:
        target = view[part.block]
        flat = target.reshape(x.shape)
        loops.approximation(x, bits, *scales, y=flat)
        if not arrays.library(flat).may_share_memory(flat, target):
            target[...] = flat.reshape(target.shape)

    fit(x, bits, levels, rows, finish)


def encode(x: Array, bits: Array, levels: int, rows: Rows, finish: Finish) -> None:
    """Hand every part's codes, packed as by `codes`, with its bits and scales to `finish`."""
    loops = _loops(x)

    def pack(part: Part, x: Array, bits: Array, scales: list[Array]) -> None:
        code = arrays.library(x).empty(x.shape, np.uint16)
        loops.codes(x, bits, *scales, code=code)
        finish(part, code, bits, scales)

    fit(x, bits, levels, rows, pack)


def fit(x: Array, bits: Array, levels: int, rows: Rows, finish: Finish) -> None:
    """Find the scales of all rows of `x`, and hand every part with its scales to `finish`.

    `bits` is a uint8 scalar, or an array of x's shape.
    """
    device = arrays.on_device(x)
    if not device and rows.length <= blocks.BLOCK:
        _fit_in_cache(x, bits, levels, rows, finish)
        return
    scales: list[Array] = []
    for _ in range(levels):
        if device:
            totals, counts = passes.partial_results(level_sums, rows, (x, bits), scales)
        else:
            totals, counts = _sums_of_pieces(x, bits, rows, scales)
        scales.append(_scale(totals, counts, x))

    def finish_part(part: Part, x: Array, bits: Array) -> None:
        finish(part, x, bits, [scale[part.rows] for scale in scales])

    passes.for_each_part(finish_part, rows, x, bits, device=device)


def _fit_in_cache(x: Array, bits: Array, levels: int, rows: Rows, finish: Finish) -> None:
    """All levels of a block of rows while it is in the cache."""
    loops = _loops(x)

    def task(part: Part, x: Array, bits: Array) -> None:
        finish(part, x, bits, loops.level_scales(x, bits, levels))

    passes.for_each_part(task, rows, x, bits)


def _sums_of_pieces(x: Array, bits: Array, rows: Rows, scales: list[Array]) -> tuple[Array, Array]:
    """The sums and counts of the next level over the pieces of long rows, as (rows, pieces)."""
    loops = _loops(x)
    pieces = sum(1 for _ in blocks.tile(rows.inner_shape))
    totals = np.empty((rows.count, pieces), np.float64)
    counts = np.empty((rows.count, pieces), np.int64)

    def task(part: Part, x: Array, bits: Array) -> None:
        at = (part.rows, part.piece)
        found = [scale[part.rows] for scale in scales]
        loops.level_sums(x, bits, *found, total=totals[at], count=counts[at])

    passes.for_each_part(task, rows, x, bits)
    return totals, counts


def _level_scales(x: Array, bits: Array, levels: int) -> list[Array]:
    """The scales of rows that are in the cache, (rows, 1) for each level."""
    scales: list[Array] = []
    total = np.empty((len(x), 1), np.float64)
    count = np.empty((len(x), 1), np.int64)
    for _ in range(levels):
        level_sums(x, bits, *scales, total=total, count=count)
        scales.append(_scale(total, count, x))
    return scales


def _scale(totals: Array, counts: Array, x: Array) -> Array:
    scale = arrays.library(x).empty((len(totals), 1), arrays.work_dtype(x.dtype))
    level_scale(totals, counts, scale=scale)
    return scale


_PRIMITIVES = SimpleNamespace(
    level_scales=_level_scales, level_sums=level_sums, approximation=approximation, codes=codes
)


def _loops(x: Array) -> Any:
    """What works on the parts of `x`: the primitives, or on the host compiled loops that pay."""
    return _PRIMITIVES if arrays.on_device(x) else blocks.compiled(x.size) or _PRIMITIVES
