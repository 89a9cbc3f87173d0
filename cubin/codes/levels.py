"""Primitives of levels: from packed codes to signs, and from signs or codes to approximations."""

from __future__ import annotations

import numpy as np

from cubin.core import floats, libraries, memory
from cubin.core.floats import as_integers, where
from cubin.core.libraries import Array
from cubin.core.primitives import C_TYPES, FLOATS, Launch, elementwise, raw, source


@elementwise(
    "uint16 code, uint8 bits, uint8 level",
    "int8 sign",
    "sign = level < bits ? (code >> level & 1) * 2 - 1 : 0",
    types=({},),
    looped=True,
)
def level_signs(code: np.ndarray, bits: np.ndarray, level: np.ndarray, *, sign: np.ndarray) -> None:
    """The signs at a level of packed codes: +1 where bit `level` is set, else -1.

    They are 0 where the element has no code at that level.
    """
    bit = np.bitwise_and(code, np.uint16(1) << level)
    np.not_equal(bit, 0, out=sign, casting="unsafe")
    np.add(sign, sign, out=sign)
    np.subtract(sign, 1, out=sign)
    if np.ndim(bits) or level >= bits:
        np.multiply(sign, np.greater(bits, level), out=sign)


def _launch(signs: Array, scales: Array, y: Array) -> Launch:
    # Callers hand over views in any layout; the kernel finds signs and scales by their number.
    xp = libraries.library(signs)
    signs, scales = xp.ascontiguousarray(signs), xp.ascontiguousarray(scales)
    threads = 256
    sizes = (np.int64(y.shape[0]), np.int64(y.shape[1]), np.int32(len(scales)))
    template = (C_TYPES[y.dtype.char], C_TYPES[scales.dtype.char])
    grid = min(max(1, -(-y.size // threads)), 1 << 16)
    return Launch(template, grid, threads, (signs, scales, y, *sizes))


@raw(
    "int8 signs, W scales", "T y", code=source(__file__), launch=_launch, types=FLOATS, looped=True
)
def sum_signs(signs: np.ndarray, scales: np.ndarray, *, y: np.ndarray) -> None:
    """The sum over levels of signs, (levels, rows, n), times scales, (levels, rows, 1).

    Where a sign is 0 the scale does not count, even if it is NaN.
    """
    total = y if y.dtype == scales.dtype else memory.scratch("total", y.shape, scales.dtype)
    step = memory.scratch("step", y.shape, scales.dtype)
    finite = np.count_nonzero(np.isfinite(scales)) == scales.size
    total[...] = 0
    for scale, sign in zip(scales, signs, strict=True):
        np.multiply(scale, sign, out=step)
        if not finite:
            where(sign != 0, step, out=step)
        np.add(total, step, out=total)
    if total is not y:
        y[...] = total


_CUDA = """
// The sum of scale * sign over the element's levels, of the scales as they are stored in T.
template<class T, class W, class... Scales>
__device__ W decoded(unsigned int code, int bits, Scales... scales) {
  const W scale[] = {scales..., W(0)};
  W y = 0;
#pragma unroll
  for (int level = 0; level < (int)sizeof...(Scales); ++level) {
    const W step = W(T(scale[level]));
    if (level < bits) y = code >> level & 1 ? plus(y, step) : minus(y, step);
  }
  return y;
}
"""


@elementwise(
    "uint16 code, uint8 bits, *W scales",
    "T y",
    "y = T(decoded<T, typename Work<T>::type>(code, bits{scales}))",
    types=FLOATS,
    preamble=_CUDA,
)
def decode(code: np.ndarray, bits: np.ndarray, *scales: np.ndarray, y: np.ndarray) -> None:
    """The sum of scale * sign over each element's levels, with the scales rounded to y's dtype."""
    work = floats.work_dtype(y.dtype)
    total = np.zeros(code.shape, work)
    step = np.empty(code.shape, work)
    word = as_integers(step)
    highest = 8 * word.itemsize - 1
    top = word.dtype.type(1 << highest)
    for level, scale in enumerate(scales):
        # The bit of the level becomes the sign bit, and `| top` below inverts it: where the bit is
        # 0, the step is negative.
        np.left_shift(code, word.dtype.type(highest - level), out=word)
        np.bitwise_and(word, top, out=word)
        stored = scale.astype(y.dtype, copy=False).astype(work, copy=False)
        np.bitwise_xor(word, as_integers(stored) | top, out=word)
        if np.ndim(bits):
            where(bits > level, step, out=step)
        if np.ndim(bits) or level < bits:
            np.add(total, step, out=total)
    y[...] = total
