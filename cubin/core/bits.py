"""Which library owns an array, the checks of arguments, and the layout of rows.

This is the only module that knows ``cupy.ndarray``. CuPy is never imported here: an array can only
be CuPy's where somebody has imported CuPy already.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from cubin.core import arrays, libraries
from cubin.core.libraries import Array

MAX_BITS = 16


def as_bits(
    value: object, x: Array, *, limit: int = MAX_BITS, look: bool = False
) -> tuple[Array, int]:
    """The number of bits of each element of `x`, and the number of levels that this needs.

    The bits come back as a uint8 scalar, or as a uint8 array in x's library that broadcasts to
    x's shape, perhaps a view of the map. A map that is on the device already is not looked at
    unless `look` is true, since this would synchronise: it is clipped to 0 .. `limit`, and all
    `limit` levels are needed.
    """
    if libraries.on_device(value):
        bits: Any = libraries.aligned(value)
        libraries.check_same("bits", bits, x)
    else:
        bits = arrays.as_host_array("bits", value)
    if isinstance(value, int) and bits.dtype == object:  # beyond 64 bits
        raise ValueError(f"bits must lie in 0 .. {limit}, got {value}")
    if bits.dtype.kind not in "iu":
        raise TypeError(f"bits must be an integer or an integer array, got {bits.dtype}")
    arrays.check_broadcasts("bits", bits, x.shape)
    if libraries.on_device(bits) and not look:
        clipped = bits if bits.dtype == np.uint8 else bits.clip(0, limit).astype(np.uint8)
        return clipped, limit
    if bits.ndim == 0 and not libraries.on_device(bits):
        low = high = int(bits)
    else:
        low, high = (int(bits.min()), int(bits.max())) if bits.size else (0, 0)
    if low < 0 or high > limit:
        raise ValueError(f"bits must lie in 0 .. {limit}, got {low if low < 0 else high}")
    if libraries.on_device(bits):
        return bits.astype(np.uint8, copy=False), high
    if bits.ndim == 0:
        return np.uint8(high), high
    return libraries.library(x).asarray(_low_bytes(bits)), high


def _low_bytes(integers: np.ndarray) -> np.ndarray:
    """The lowest byte of each integer: a view, since a copy of a large map would take memory."""
    size = integers.itemsize
    offset = 0 if sys.byteorder == "little" else size - 1
    low = {"names": ["low"], "formats": [np.uint8], "offsets": [offset], "itemsize": size}
    return integers.view(np.dtype(low))["low"]  # type: ignore[call-overload]
