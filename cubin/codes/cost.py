"""The cost of a code in bits per element: signs, bit map, scales and shifts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cubin.core import libraries
from cubin.core.libraries import Array
from cubin.core.rows import Rows


def payload_bits(bits: Array, shape: tuple[int, ...]) -> float:
    """The mean of the bit map `bits` over an array of shape `shape`; 0 for an empty array."""
    if math.prod(shape) == 0:
        return 0.0
    # Every entry of a map stands for equally many elements.
    return (
        float(bits) if np.ndim(bits) == 0 else float(libraries.to_host(bits).mean(dtype=np.float64))
    )


def map_entropy(bits: Array, shape: tuple[int, ...]) -> float:
    """The empirical entropy of the bit map `bits`, in bits per element of the array.

    A map of fewer entries than the array has elements (one per channel, say) is stored once per
    entry.
    """
    if np.ndim(bits) == 0 or math.prod(shape) == 0:
        return 0.0
    counts = np.bincount(libraries.to_host(bits).ravel())
    share = counts[counts > 0] / counts.sum()
    return abs(float(-(share * np.log2(share)).sum())) * bits.size / math.prod(shape)


def effective_bits(bits: Array, rows: Rows, dtype: Any, shifted: bool = False) -> float:
    """Payload bits, entropy of the map and storage of the scales and shifts, per element.

    A scale is stored for every level of a row at which some element of the row has a code, with
    the width of `dtype`; and if the code is `shifted`, a shift for every row.
    """
    size = math.prod(rows.shape)
    if size == 0:
        return 0.0
    if np.ndim(bits) == 0:
        scales = int(bits) * rows.count
    else:
        spread = np.broadcast_to(libraries.to_host(bits), rows.shape)
        inner = tuple(range(len(rows.scale_shape), len(rows.order)))
        scales = int(rows.view(spread).max(axis=inner).sum(dtype=np.int64))
    stored = scales + rows.count * shifted
    width = 8 * np.dtype(dtype).itemsize
    return payload_bits(bits, rows.shape) + map_entropy(bits, rows.shape) + stored * width / size
