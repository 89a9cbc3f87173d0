"""The primitive of `bits.py` as a compiled loop."""

from __future__ import annotations

import numpy as np

from cubin.core.host.loops import in_rows, loop, read_only
from cubin.core.libraries import Array


@loop
def _at_most(integers: Array, most: int, bits: Array) -> None:
    for j in range(bits.size):
        value = integers[j]
        bits[j] = value if value < most else most


def at_most(integers: Array, most: np.uint8, *, bits: Array) -> None:
    """`bits.at_most`."""
    most = integers.dtype.type(most)
    _at_most(read_only(in_rows(integers)).reshape(-1), most, bits.reshape(-1))
