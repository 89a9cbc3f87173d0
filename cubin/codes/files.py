"""BinaryCode: an array as scales and signs, and what it costs to store."""

from __future__ import annotations

import json
import math
import zipfile
from typing import Any

import numpy as np

from cubin.core import arrays
from cubin.core.bits import MAX_BITS, as_entries
from cubin.core.rows import rows_of

_FORMAT = "cubin.BinaryCode/1"
_DTYPES = {"layout": "B", "scales": "efd", "bits": "B", "signs": "B"}


def _read_members(file: Any) -> dict[str, np.ndarray]:
    members = {}
    with zipfile.ZipFile(file) as archive:
        for name, dtypes in _DTYPES.items():
            info = archive.getinfo(f"{name}.npy")
            # Stored members cannot be larger than the file: no bomb, no false size.
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise ValueError(f"{name} is compressed")
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                if version != (1, 0):
                    raise ValueError(f"{name} has format version {version}")
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
                if dtype.char not in dtypes or fortran:
                    raise ValueError(f"{name} has an unexpected dtype or order")
                expected = math.prod(shape) * dtype.itemsize
                if member.tell() + expected != info.file_size:
                    raise ValueError(
                        f"{name} of shape {shape} does not fit its {info.file_size} bytes"
                    )
                content = member.read()
            if len(content) != expected:
                raise ValueError(f"{name} is truncated")
            members[name] = np.frombuffer(content, dtype).reshape(shape).copy()
    return members


def _decode(members: dict[str, np.ndarray]) -> dict[str, Any]:
    layout = json.loads(members["layout"].tobytes())
    if not isinstance(layout, dict) or layout.get("format") != _FORMAT:
        raise ValueError("its layout is of another format")
    shape = tuple(arrays.as_integer("shape", n) for n in layout["shape"])
    axis, group_size = layout["channel_axis"], layout["group_size"]
    axis = tuple(axis) if isinstance(axis, list) else axis
    bits = members["bits"]
    scales, packed = members["scales"], members["signs"]
    size = math.prod(shape)
    # With no levels nothing in the file is as large as the shape; no memory has 2^47 elements.
    if len(shape) > 64 or min(shape, default=0) < 0 or size >> 47 or scales.ndim == 0:
        raise ValueError(f"shape {shape} is no shape of an array")
    levels = len(scales)
    if levels > MAX_BITS or packed.shape != (levels, -(-size // 8)):
        raise ValueError(
            f"signs of shape {packed.shape} do not hold {levels} levels of {size} elements"
        )
    rows = rows_of(shape, axis, group_size)
    if scales.shape != (levels, *rows.scale_shape):
        raise ValueError(f"scales of shape {scales.shape} do not fit the shape {shape}")
    limits, _ = as_entries(bits, shape, np.empty(0))
    positive = np.unpackbits(packed, axis=1, count=size).reshape(levels, *shape)
    signs = positive.view(np.int8)
    np.subtract(signs + signs, 1, out=signs)
    for level in range(levels):
        np.multiply(signs[level], np.greater(limits, level), out=signs[level, ...])
    return {
        "scales": scales,
        "signs": signs,
        "bits": int(bits) if bits.ndim == 0 else bits,
        "channel_axis": axis,
        "group_size": group_size,
    }
