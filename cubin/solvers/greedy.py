"""The greedy levels: each takes the sign of the residual, times the mean of its magnitude.

Neither residuals nor signs are ever stored: the residual is recomputed from x and the scales found
so far. On a device, rows that fit a block of threads are read once and written once; longer ones
are read k + 1 times for k levels. On the host a block of rows stays in the cache meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from cubin.codes.encoding import Encoding
from cubin.codes.levels import level_signs
from cubin.core import floats, libraries, passes, teams
from cubin.core.floats import as_integers, where
from cubin.core.host import blocks
from cubin.core.libraries import Array
from cubin.core.passes import Part
from cubin.core.primitives import FLOATS, Launch, elementwise, raw, reduction, source
from cubin.core.rows import Rows
from cubin.core.sums import magnitude_sums

_CUDA = source(__file__)

WHOLE_ROWS = 1 << 20
"""Bytes, in the work dtype, of a block of whole rows, which are gone through level by level."""

COMPILED_ROWS = (1 << 21, 1 << 23)
"""The fewest and the most for compiled loops, which go through it row by row."""

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
    m = blocks.spare("magnitude", x.shape, floats.work_dtype(x.dtype))
    np.abs(x, out=m)
    for scale in scales:
        np.abs(np.subtract(m, scale, out=m), out=m)
    total[...], count[...] = _sum(m, bits, len(scales))


def _sum(m: np.ndarray, bits: np.ndarray, level: int) -> tuple[np.ndarray, Any]:
    """The sums, (rows, 1), and number of the magnitudes that have a code at a level.

    Those without one are overwritten.
    """
    count: Any
    if np.ndim(bits):
        hot = blocks.spare("hot", m.shape, np.bool_)
        np.greater(bits, level, out=hot)
        where(hot, m, out=m)
        count = np.add.reduce(hot, axis=-1, keepdims=True, dtype=np.int64)
    else:
        m = m if bits > level else m[..., :0]
        count = m.shape[-1]
    return magnitude_sums(m), count


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
    work = floats.work_dtype(x.dtype)
    mapped, rounded = np.ndim(bits) > 0, x.dtype != work
    opposite = _opposite(x)
    word = as_integers(opposite)
    top = word.dtype.type(1 << (8 * word.itemsize - 1))
    step = blocks.spare("step", x.shape, work)
    step_word = as_integers(step)
    sign = as_integers(blocks.spare("sign", x.shape, work)) if rounded else step_word
    total = blocks.spare("total", x.shape, work) if rounded else y
    so_far: Any = work.type(0)
    last = len(scales) - 1
    for level, scale in enumerate(scales):
        np.bitwise_and(word, top, out=sign)
        if level < last or not rounded:
            np.bitwise_or(sign, as_integers(scale), out=step_word)
        if level < last:
            np.subtract(opposite, step, out=opposite)
        if mapped or level < bits:
            if rounded:
                stored = scale.astype(x.dtype).astype(work)
                np.bitwise_or(sign, as_integers(stored), out=step_word)
            if mapped:
                hot = blocks.spare("hot", x.shape, np.bool_)
                np.greater(bits, level, out=hot)
                where(hot, step, out=step)
            so_far = np.subtract(so_far, step, out=total)
    if so_far is not y:
        y[...] = so_far


@elementwise(
    "T x, uint8 bits, *W scales",
    "uint16 code",
    "code = codes(Work<T>::type(x), bits{scales})",
    types=FLOATS,
    preamble=_CUDA,
)
def codes(x: np.ndarray, bits: np.ndarray, *scales: np.ndarray, code: np.ndarray) -> None:
    """Bit i is set where level i of the element has the sign +1."""
    opposite = _opposite(x)
    step = blocks.spare("step", x.shape, opposite.dtype)
    positive = blocks.spare("sign", x.shape, np.bool_)
    bit = blocks.spare("bit", x.shape, np.uint16)
    code[...] = 0
    for level, scale in enumerate(scales):
        np.less(opposite, 0, out=positive)
        if np.ndim(bits) or level >= bits:
            np.bitwise_and(positive, np.greater(bits, level), out=positive)
        np.multiply(positive, np.uint16(1 << level), out=bit)
        np.bitwise_or(code, bit, out=code)
        np.subtract(opposite, np.copysign(scale, opposite, out=step), out=opposite)


def _launch(x: Array, bits: Array, levels: int, *outputs: Array) -> Launch:
    return teams.launch(x, bits, levels, *outputs, options=(np.int32(levels),))


@raw(
    "T x, uint8 bits, static int levels",
    "T y",
    code=teams.CUDA,
    preamble=teams.TEAMS,
    launch=_launch,
    types=FLOATS,
)
def approximate_rows(x: np.ndarray, bits: np.ndarray, levels: int, *, y: np.ndarray) -> None:
    """The approximation of whole rows, whose scales are not handed out."""
    approximation.function(x, bits, *_level_scales(x, bits, levels), y=y)


@raw(
    "T x, uint8 bits, static int levels",
    "W scales, int8 signs",
    code=teams.CUDA,
    preamble=teams.TEAMS,
    launch=_launch,
    types=FLOATS,
)
def encode_rows(
    x: np.ndarray, bits: np.ndarray, levels: int, *, scales: np.ndarray, signs: np.ndarray
) -> None:
    """The scales of whole rows, (levels, rows, 1), and their signs, (levels, rows, length)."""
    found = _level_scales(x, bits, levels)
    code = blocks.spare("code", x.shape, np.uint16)
    codes.function(x, bits, *found, code=code)
    for level, scale in enumerate(found):
        scales[level] = scale
        level_signs.function(code, bits, np.uint8(level), sign=signs[level])


def _opposite(x: np.ndarray) -> np.ndarray:
    """0 - x in the work dtype: never -0.0, so that its sign bit is set exactly where x > 0.

    Taking the scale with its sign off it leaves the same of the residual, and it rounds the same.
    """
    opposite = blocks.spare("opposite", x.shape, floats.work_dtype(x.dtype))
    return np.subtract(0, x, out=opposite)


# ---------------------------------------------------------------- rows

Finish = Callable[[Part, Array, Array, "list[Array]"], None]
"""Takes a part of the rows, its elements and their bits as (rows, n), and the rows' scales,
(rows, 1) for each level."""


def approximate(x: Array, bits: Array, levels: int, rows: Rows, y: Array) -> None:
    """Write the approximation of `x` to `y`, which is `x` itself or does not overlap it.

    `bits` is a uint8 scalar, or an array of x's shape.
    """
    if teams.holds(x, levels, np.ndim(bits) > 0, rows):
        teams.approximate(approximate_rows, x, bits, rows, y, levels)
        return
    loops = _loops(x)
    view = rows.view(y)

    def finish(part: Part, x: Array, bits: Array, scales: list[Array]) -> None:
        def write(flat: Array) -> None:
            loops.approximation(x, bits, *scales, y=flat)

        passes.write(write, view[part.block], x.shape)

    def task(part: Part, x: Array, bits: Array) -> None:
        def write(flat: Array) -> None:
            loops.approximate_rows(x, bits, levels, y=flat)

        passes.write(write, view[part.block], x.shape)

    if _in_cache(x, rows):
        _for_each_block(task, x, bits, rows)
    else:
        fit(x, bits, levels, rows, finish)


def encode(x: Array, bits: Array, encoding: Encoding) -> None:
    """Fill in the scales and signs of `x`."""
    levels, rows = len(encoding.scales), encoding.rows
    if teams.holds(x, levels, np.ndim(bits) > 0, rows):
        encoding.fill(encode_rows, x, bits)
        return
    loops = _loops(x)

    def pack(part: Part, x: Array, bits: Array, scales: list[Array]) -> None:
        code = libraries.library(x).empty(x.shape, np.uint16)
        loops.codes(x, bits, *scales, code=code)
        encoding.store(part, code, bits, scales)

    def task(part: Part, x: Array, bits: Array) -> None:
        encoding.fill_part(part, loops.encode_rows, x, bits)

    if _in_cache(x, rows):
        _for_each_block(task, x, bits, rows)
    else:
        fit(x, bits, levels, rows, pack)


def fit(x: Array, bits: Array, levels: int, rows: Rows, finish: Finish) -> None:
    """Find the scales of all rows of `x`, and hand every part with its scales to `finish`.

    `bits` is a uint8 scalar, or an array of x's shape.
    """
    device = libraries.on_device(x)
    if _in_cache(x, rows):
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

    _for_each_part(finish_part, x, bits, rows, blocks.PIECE)


def _fit_in_cache(x: Array, bits: Array, levels: int, rows: Rows, finish: Finish) -> None:
    """All levels of a block of rows while it is in the cache."""
    loops = _loops(x)

    def task(part: Part, x: Array, bits: Array) -> None:
        finish(part, x, bits, loops.level_scales(x, bits, levels))

    _for_each_block(task, x, bits, rows)


def _in_cache(x: Array, rows: Rows) -> bool:
    """Whether whole rows stay in the cache of the host."""
    return not libraries.on_device(x) and rows.length <= blocks.BLOCK


def _for_each_block(task: Callable[..., None], x: Array, bits: Array, rows: Rows) -> None:
    """Call ``task(part, x, bits)`` for blocks of whole rows."""
    itemsize = floats.work_dtype(x.dtype).itemsize
    block = WHOLE_ROWS
    if _loops(x) is not _EXPRESSIONS:
        least, most = COMPILED_ROWS
        block = min(max(least, blocks.portion(x.size) * itemsize), most)
    _for_each_part(task, x, bits, rows, block // itemsize)


def _for_each_part(
    task: Callable[..., None], x: Array, bits: Array, rows: Rows, block: int | None = None
) -> None:
    threaded = None if _loops(x) is _EXPRESSIONS else blocks.LOOPS_THREADED
    device = libraries.on_device(x)
    passes.for_each_part(task, rows, x, bits, device=device, block=block, threaded=threaded)


def _sums_of_pieces(x: Array, bits: Array, rows: Rows, scales: list[Array]) -> tuple[Array, Array]:
    """The sums and counts of the next level over the pieces of long rows, as (rows, pieces)."""
    loops = _loops(x)
    pieces = sum(1 for _ in blocks.tile(rows.inner_shape, blocks.PIECE))
    totals = np.empty((rows.count, pieces), np.float64)
    counts = np.empty((rows.count, pieces), np.int64)

    def task(part: Part, x: Array, bits: Array) -> None:
        at = (part.rows, part.piece)
        found = [scale[part.rows] for scale in scales]
        loops.level_sums(x, bits, *found, total=totals[at], count=counts[at])

    _for_each_part(task, x, bits, rows, blocks.PIECE)
    return totals, counts


def _level_scales(x: Array, bits: Array, levels: int) -> list[Array]:
    """The scales of rows that are in the cache, (rows, 1) for each level."""
    m = blocks.spare("magnitude", x.shape, floats.work_dtype(x.dtype))
    np.abs(x, out=m)
    scales: list[Array] = []
    for level in range(levels):
        if scales:
            np.abs(np.subtract(m, scales[-1], out=m), out=m)
        total, count = _sum(m, bits, level)
        scales.append((total / np.maximum(count, 1)).astype(m.dtype))
    return scales


def _scale(totals: Array, counts: Array, x: Array) -> Array:
    scale = libraries.library(x).empty((len(totals), 1), floats.work_dtype(x.dtype))
    level_scale(totals, counts, scale=scale)
    return scale


_KERNELS = SimpleNamespace(approximation=approximation, codes=codes)
_EXPRESSIONS = SimpleNamespace(
    level_scales=_level_scales,
    level_sums=level_sums.function,
    approximation=approximation.function,
    approximate_rows=approximate_rows.function,
    encode_rows=encode_rows.function,
    codes=codes.function,
)


def _loops(x: Array) -> Any:
    """What works on the parts of `x`: kernels, or on the host compiled loops where they pay."""
    if libraries.on_device(x):
        return _KERNELS
    return blocks.compiled("cubin.greedy_loops", x.size) or _EXPRESSIONS
