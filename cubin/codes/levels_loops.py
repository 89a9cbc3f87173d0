"""The primitives of `levels.py` as compiled loops: see there for what each does."""

from __future__ import annotations

import numpy as np

from cubin.core.host.loops import (
    beside,
    lines,
    loop,
    map_lines,
    map_of,
    place,
    read_only,
    uncounted,
)
from cubin.core.libraries import Array


@loop
def _level_signs(code: Array, bits: Array, level: int, width: int, sign: Array) -> None:
    """Write the signs of lines: of the first `width` elements of each."""
    code, bits, sign = uncounted(code, bits, sign)
    bit, none = np.uint16(1 << level), np.uint16(0)
    for e in range(len(code)):
        source, of_line = code[e, :width], sign[e, :width]
        for j in range(width):
            of_line[j] = np.int8(1) if np.uint16(source[j] & bit) != none else np.int8(-1)
        if bits.shape[1]:
            depths = bits[e, :width]
            for j in range(width):
                of_line[j] = of_line[j] if depths[j] > np.uint8(level) else np.int8(0)


def level_signs(code: Array, bits: Array, level: Array, *, sign: Array) -> None:
    """`levels.level_signs`. A scalar `bits` must have this level."""
    if code.ndim == 2 and beside(code, sign):
        depths = map_lines(bits, code.shape[1])
        _level_signs(read_only(lines(code)), depths, int(level), len(code), lines(sign))
        return
    plain = sign if sign.flags.c_contiguous else np.empty(sign.shape, np.int8)
    depths = map_of(bits, 1).reshape(1, -1)
    line = read_only(np.ascontiguousarray(code)).reshape(1, -1)
    _level_signs(line, depths, int(level), code.size, plain.reshape(1, -1))
    if plain is not sign:
        place(plain, sign)
