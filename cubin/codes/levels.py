"""Primitives of levels: from packed codes to signs and to approximations."""

from __future__ import annotations

import numpy as np

from cubin.core import floats
from cubin.core.floats import as_integers, where
from cubin.core.primitives import FLOATS, elementwise


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


def pack_mask(mask: np.ndarray, bits: np.ndarray) -> None:
    """Write a mask, (rows, n), as bits, eight to a byte, along the axis that then is shorter.

    The first of eight is the lowest bit. Bits beyond the last element are 0.
    """
    axis = int(len(bits) == len(mask))
    bits[...] = np.packbits(mask, axis=axis, bitorder="little")


def pack_codes(code: np.ndarray, bits: np.ndarray, signs: np.ndarray) -> None:
    """Write each level of packed codes as bits: 1 for +1, else 0, also where there is no code."""
    for level, sign in enumerate(signs):
        positive = np.bitwise_and(code, np.uint16(1 << level)) != 0
        if np.ndim(bits):
            positive &= np.greater(bits, level)
        pack_mask(positive, sign)


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
