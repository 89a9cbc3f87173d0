"""Tensors of `.safetensors` files: a checked header, then plain data that is mapped.

A file is the length of a header in eight bytes, the header in JSON, and the data of its tensors
without gaps. The few lines that read it need no package, and give the types that NumPy has no name
for: bfloat16, and float8 with the scales of its blocks.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cubin.codes.files import FORMAT
from cubin.weights import float8
from cubin.weights.float8 import FLOAT8
from cubin.weights.tensor import (
    BFLOAT16_IN_NUMPY,
    Cut,
    Weight,
    is_listed,
    without_graph,
)

LONGEST_HEADER = 100_000_000
"""Bytes of the longest header that is read: the limit of the format."""

DTYPES = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0",
    "F6_E2M3": "float6_e2m3",
    "F6_E3M2": "float6_e3m2",
    "F4": "float4_e2m1",
    "BOOL": "bool",
    "C64": "complex64",
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}
"""What the names of types in a file stand for."""

BLOCK_SCALES = "_scale_inv"
"""Behind the name of a float8 matrix: the tensor of its blocks' scales, which multiply it."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its type there, its shape, and where its data begins and ends."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, Entry], dict[str, str]]:
    """Read the tensors and the metadata of a file.

    Returns
    -------
    (dict of str to Entry, dict of str to str)
        Positions count from the beginning of the file.

    Raises
    ------
    ValueError
        If the header is damaged, or the tensors do not fill the file, one behind the other.
    """
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        size = int.from_bytes(file.read(8), "little")
        if length < 8 or not 2 <= size <= min(length - 8, LONGEST_HEADER):
            raise ValueError(f"a header of {size} bytes does not fit into {length} bytes")
        header = json.loads(file.read(size).decode(), object_pairs_hook=once)
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata are no strings")
    entries = {name: entry(name, values, 8 + size) for name, values in header.items()}
    at, before = 8 + size, "the header"
    for name, tensor in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != at:
            raise ValueError(f"the data of {name!r} do not begin where {before} ends")
        if tensor.end > length:
            raise ValueError(f"cut off: {name!r} ends at byte {tensor.end} of {length}")
        at, before = tensor.end, repr(name)
    if at != length:
        raise ValueError(f"its tensors end at byte {at} of {length}")
    return entries, metadata


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these names and values; ValueError where a name comes twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("its header has a name twice")
    return dict(pairs)


def entry(name: str, values: Any, base: int) -> Entry:
    """Check the header's entry of a tensor; its positions count from `base`."""
    try:
        dtype, shape, (start, end) = values["dtype"], values["shape"], values["data_offsets"]
        numbers = [*shape, start, end]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"the entry of {name!r} is not a dtype, a shape and two offsets") from None
    if not isinstance(dtype, str) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"the entry of {name!r} has a number that is none, or below 0")
    bits = math.prod(shape) * bits_of(dtype)
    if len(shape) > 64 or (bits and bits != 8 * (end - start)) or end < start:
        raise ValueError(f"{name!r} of shape {tuple(shape)} does not fit its {end - start} bytes")
    return Entry(dtype, tuple(shape), base + start, base + end)


def bits_of(dtype: str) -> int:
    """The bits of an element, the number in the name of its type; 0 for a type of the future."""
    if dtype == "BOOL":
        return 8
    number = re.match(r"[A-Z]+(\d+)", dtype)
    return int(number[1]) if dtype in DTYPES and number else 0


def read_safetensors(path: Path) -> Iterator[Weight]:
    """List the tensors of a `.safetensors` file."""
    entries, metadata = read_header(path)
    if metadata.get("format") == FORMAT:  # which are no weights
        return
    scales = {name: (path, entry) for name, entry in entries.items() if is_scale(name)}
    small = [name for name, entry in entries.items() if DTYPES.get(entry.dtype) in FLOAT8]
    if any(name + BLOCK_SCALES not in scales for name in small):
        scales = scales_beside(path) | scales
    for name, stored in entries.items():
        dtype = DTYPES.get(stored.dtype, stored.dtype.lower())
        tensor = without_graph(name, stored.shape, dtype, partial(map_tensor, path, stored))
        if is_scale(name):
            reason = f"the scales of {name.removesuffix(BLOCK_SCALES)}"
            tensor = replace(tensor, channel_axis=None, reason=reason, is_weight=False)
        elif dtype in FLOAT8 and not tensor.reason:
            scale = scales.get(name + BLOCK_SCALES)
            tensor = replace(
                tensor,
                read=partial(decode_tensor, path, stored, scale),
                reason=misfit(stored, scale and scale[1], f"{name}_scale" in entries),
            )
        if is_listed(tensor):
            yield tensor


def is_scale(name: str) -> bool:
    return name.endswith(BLOCK_SCALES)


def scales_beside(path: Path) -> dict[str, tuple[Path, Entry]]:
    """The scales in all shards of a folder: those of a matrix may lie in another one."""
    scales: dict[str, tuple[Path, Entry]] = {}
    for shard in sorted(path.parent.glob("*.safetensors")):
        with contextlib.suppress(ValueError, OSError):  # it is named when it is read itself
            entries, _ = read_header(shard)
            scales |= {name: (shard, entry) for name, entry in entries.items() if is_scale(name)}
    return scales


def misfit(stored: Entry, scale: Entry | None, other: bool) -> str:
    """Why a float8 tensor cannot be read with its scales; empty if it can."""
    if scale is None:
        return "its scales of the kind weight_scale are not applied" if other else ""
    if scale.dtype not in MAPPED:
        return f"its scales are of type {scale.dtype}"
    if math.prod(scale.shape) != 1 and scale.shape != float8.blocks_of(stored.shape):
        return f"its scales of shape {scale.shape} are not those of blocks of 128 x 128"
    if len(stored.shape) != 2:
        return f"it has {len(stored.shape)} axes and scales of blocks"
    return ""


MAPPED = {
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16_IN_NUMPY,
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
"""The types of NumPy in which data of a file is mapped; all others are bytes."""


def map_tensor(path: str | os.PathLike[str], stored: Entry, cut: Cut) -> np.ndarray:
    """Map the data of a tensor; bfloat16 is of two bytes without a type, float8 of uint8."""
    dtype = MAPPED.get(stored.dtype, np.dtype(np.uint8))
    if os.path.getsize(path) < stored.end:
        raise ValueError(f"the file ends before byte {stored.end}")
    if not math.prod(stored.shape):
        return np.empty(stored.shape, dtype)[cut]
    return np.memmap(path, dtype, "r", stored.start, stored.shape)[cut]


def decode_tensor(
    path: Path, stored: Entry, scale: tuple[Path, Entry] | None, cut: Cut
) -> np.ndarray:
    """Read a float8 tensor as float32, multiplied by the scales of its blocks."""
    array = float8.decode(map_tensor(path, stored, cut), DTYPES[stored.dtype])
    if scale is None:
        return array
    factors = map_tensor(*scale, ())
    if factors.dtype == BFLOAT16_IN_NUMPY:
        factors = (factors.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    factors = factors.astype(np.float32)
    if factors.size == 1:
        array *= factors.reshape(())
        return array
    cut = (*cut, *[slice(None)] * (2 - len(cut)))
    rows, columns = (np.arange(n)[part] for n, part in zip(stored.shape, cut, strict=True))
    float8.scale_blocks(array, factors, rows, columns)
    return array
