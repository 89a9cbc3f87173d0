"""The primitives of `levels.py` as compiled loops: see there for what each does."""

from __future__ import annotations

import numpy as np

from cubin.core.host.loops import loop, map_of, place, read_only
from cubin.core.libraries import Array


@loop
def _level_signs(code: Array, bits: Array, level: int, sign: Array) -> None:
    bit, none = np.uint16(1 << level), np.uint16(0)
    for j in range(sign.size):
        sign[j] = np.int8(1) if np.uint16(code[j] & bit) != none else np.int8(-1)
    if bits.size:
        for j in range(sign.size):
            sign[j] = sign[j] if bits[j] > np.uint8(level) else np.int8(0)


def level_signs(code: Array, bits: Array, level: Array, *, sign: Array) -> None:
    """`levels.level_signs`. A scalar `bits` must have this level."""
    plain = sign if sign.flags.c_contiguous else np.empty(sign.shape, np.int8)
    bits = map_of(bits, 0).reshape(-1)
    _level_signs(
        read_only(np.ascontiguousarray(code)).reshape(-1), bits, int(level), plain.reshape(-1)
    )
    if plain is not sign:
        place(plain, sign)
