"""The greedy solver: each level takes the sign of the residual and the mean of its magnitude.

Residuals and signs are never stored for the whole array: they are computed again from x and the
scales so far. Rows that fit a block of threads or of the cache are read once, and the result is
written once. Longer rows are read once for every level, and once more for the result.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cubin.codes.levels import pack_mask
from cubin.core import floats, libraries, memory, passes, teams
from cubin.core.bits import MAX_BITS, Bits
from cubin.core.floats import as_integers, in_work_dtype, where
from cubin.core.libraries import Array
from cubin.core.primitives import FLOATS, elementwise, raw, reduction, source
from cubin.core.rows import Rows
from cubin.core.sums import magnitude_sums

_CUDA = source(__file__)
_ROWS_CUDA = source(__file__, "greedy_rows.cu")


@reduction(
    "T x, uint8 bits, *W scales",
    "float64 total, int64 count",
    map="bits > {count} ? Sum(to_double(magnitude(absolute(Work<T>::type(x)){scales})), 1) : Sum()",
    reduce="a + b",
    post_map="total = a.total, count = a.count",
    identity="Sum()",
    reduce_type="Sum",
    types=FLOATS,
    looped=True,
    preamble=_CUDA,
)
def level_sums(
    x: np.ndarray, bits: np.ndarray, *scales: np.ndarray, total: np.ndarray, count: np.ndarray
) -> None:
    """The sum of |residual| over the elements with a code at the next level, and their number.

    The residual r is what `scales` leave: ``total = sum(|r| where bits > len(scales))``, in
    float64.
    """
    m = memory.scratch("magnitude", x.shape, floats.work_dtype(x.dtype))
    np.abs(in_work_dtype(x), out=m)
    for scale in scales:
        np.abs(np.subtract(m, scale, out=m), out=m)
    total[...], count[...] = _sum(m, bits, len(scales))


def _sum(m: np.ndarray, bits: np.ndarray, level: int) -> tuple[np.ndarray, Any]:
    """The sums, (rows, 1), of the magnitudes of elements with a code at a level, and their number.

    With a map the other magnitudes are overwritten.
    """
    count: Any
    if np.ndim(bits):
        coded = memory.scratch("coded", m.shape, np.bool_)
        np.greater(bits, level, out=coded)
        where(coded, m, out=m)
        count = np.add.reduce(coded, axis=-1, keepdims=True, dtype=np.int64)
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
    types=({"W": "float32"}, {"W": "float64"}),
    preamble=_CUDA,
)
def level_scale(totals: np.ndarray, counts: np.ndarray, *, scale: np.ndarray) -> None:
    """The mean over all pieces of a row, or 0 where no element has a code."""
    count = counts.sum(axis=-1, keepdims=True)
    scale[...] = totals.sum(axis=-1, keepdims=True) / np.maximum(count, 1)


@elementwise(
    "T x, uint8 bits, *W scales",
    "T y",
    "y = T(approximation<T>(Work<T>::type(x), bits{scales}))",
    types=FLOATS,
    looped=True,
    preamble=_CUDA,
)
def approximation(x: np.ndarray, bits: np.ndarray, *scales: np.ndarray, y: np.ndarray) -> None:
    """The sum of scale * sign over each element's levels, with the scales rounded to x's dtype.

    The signs follow from the scales before rounding.
    """
    work = floats.work_dtype(x.dtype)
    mapped, rounded = np.ndim(bits) > 0, x.dtype != work
    opposite = _opposite(x)
    word = as_integers(opposite)
    top = word.dtype.type(1 << (8 * word.itemsize - 1))
    step = memory.scratch("step", x.shape, work)
    step_word = as_integers(step)
    sign = as_integers(memory.scratch("sign", x.shape, work)) if rounded else step_word
    total = memory.scratch("total", x.shape, work) if rounded else y
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
                coded = memory.scratch("coded", x.shape, np.bool_)
                np.greater(bits, level, out=coded)
                where(coded, step, out=step)
            so_far = np.subtract(so_far, step, out=total)
    if so_far is not y:
        y[...] = so_far


@elementwise(
    "T x, uint8 bits, *W scales",
    "uint16 code",
    "code = codes(Work<T>::type(x), bits{scales})",
    types=FLOATS,
    looped=True,
    preamble=_CUDA,
)
def codes(x: np.ndarray, bits: np.ndarray, *scales: np.ndarray, code: np.ndarray) -> None:
    """Bit i is set where level i of the element has the sign +1."""
    opposite = _opposite(x)
    step = memory.scratch("step", x.shape, opposite.dtype)
    positive = memory.scratch("sign", x.shape, np.bool_)
    bit = memory.scratch("bit", x.shape, np.uint16)
    code[...] = 0
    for level, scale in enumerate(scales):
        np.less(opposite, 0, out=positive)
        if np.ndim(bits) or level >= bits:
            np.bitwise_and(positive, np.greater(bits, level), out=positive)
        np.multiply(positive, np.uint16(1 << level), out=bit)
        np.bitwise_or(code, bit, out=code)
        np.subtract(opposite, np.copysign(scale, opposite, out=step), out=opposite)


def _row_work(length: int, levels: int) -> int:
    """The work of the loops on a row: a level, or writing the result, is half that of reading and
    writing its elements, and each row takes as long as some elements more."""
    return (length + 32) * (levels + 1) // 2


@raw(
    "T x, uint8 bits, static int levels",
    "T y",
    code=_ROWS_CUDA,
    preamble=teams.CUDA,
    launch=teams.RowLaunch(teams.GREEDY, MAX_BITS, passes_levels=True),
    row_work=_row_work,
    types=FLOATS,
    looped=True,
)
def approximate_rows(x: np.ndarray, bits: np.ndarray, levels: int, *, y: np.ndarray) -> None:
    """The approximation of whole rows. The scales are not part of the result."""
    approximation.function(x, bits, *_level_scales(x, bits, levels), y=y)


@raw(
    "T x, uint8 bits, static int levels",
    "W scales, int8 signs",
    code=_ROWS_CUDA,
    preamble=teams.CUDA,
    launch=teams.RowLaunch(teams.GREEDY, MAX_BITS, passes_levels=True),
    row_work=_row_work,
    types=FLOATS,
    looped=True,
)
def encode_rows(
    x: np.ndarray, bits: np.ndarray, levels: int, *, scales: np.ndarray, signs: np.ndarray
) -> None:
    """The scales of whole rows, (levels, rows, 1), and their signs.

    The kernel writes signs as int8, (levels, rows, length). On the host they are bits: see
    `passes.for_each_whole_rows`.
    """
    row_scales = _level_scales(x, bits, levels)
    opposite = _opposite(x)
    step = memory.scratch("step", x.shape, opposite.dtype)
    positive = memory.scratch("sign", x.shape, np.bool_)
    for level, scale in enumerate(row_scales):
        scales[level] = scale
        np.less(opposite, 0, out=positive)
        if np.ndim(bits) or level >= bits:
            np.bitwise_and(positive, np.greater(bits, level), out=positive)
        pack_mask(positive, signs[level])
        if level < levels - 1:
            np.subtract(opposite, np.copysign(scale, opposite, out=step), out=opposite)


def _opposite(x: np.ndarray) -> np.ndarray:
    """0 - x in the work dtype: never -0.0, so that its sign bit is set exactly where x > 0.

    Levels are taken off this negated residual. It rounds as the residual itself does.
    """
    opposite = memory.scratch("opposite", x.shape, floats.work_dtype(x.dtype))
    return np.subtract(0, in_work_dtype(x), out=opposite)


def _level_scales(x: Array, bits: Array, levels: int) -> list[Array]:
    """The scales of a block of whole rows, (rows, 1) for each level."""
    m = memory.scratch("magnitude", x.shape, floats.work_dtype(x.dtype))
    np.abs(in_work_dtype(x), out=m)
    scales: list[Array] = []
    for level in range(levels):
        if scales:
            np.abs(np.subtract(m, scales[-1], out=m), out=m)
        total, count = _sum(m, bits, level)
        count = np.maximum(count, 1) if np.ndim(bits) else max(count, 1)
        scales.append((total / count).astype(m.dtype))
    return scales


def row_scales(x: Array, bits: Bits, rows: Rows) -> list[Array]:
    """The scales of all rows, (rows, 1) for each level, in the work dtype: one pass a level."""
    scales: list[Array] = []
    for _ in range(bits.levels):
        totals, counts = passes.partial_results(level_sums, rows, (x, bits.values), scales)
        scale = libraries.library(x).empty((rows.count, 1), floats.work_dtype(x.dtype))
        level_scale(totals, counts, scale=scale)
        scales.append(scale)
    return scales
