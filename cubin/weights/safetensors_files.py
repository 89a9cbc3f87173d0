"""Tensors of `.safetensors` files: plain data that is mapped into memory.

The few lines that read it need no package, and give the types that NumPy has no name for: bfloat16,
and float8 with the scales of its blocks.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from cubin.codes import headers
from cubin.codes.files import FORMAT
from cubin.codes.headers import DTYPES, Entry
from cubin.weights import float8
from cubin.weights.float8 import FLOAT8
from cubin.weights.tensor import (
    BFLOAT16_IN_NUMPY,
    Cut,
    Weight,
    is_listed,
    without_graph,
)

BLOCK_SCALES = "_scale_inv"
"""Behind the name of a float8 matrix: the tensor of its blocks' scales, which multiply it."""


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors and the metadata of a file, as `headers.read` gives them."""
    with open(path, "rb") as file:
        return headers.read(file)


def read_safetensors(path: Path) -> Iterator[Weight]:
    """List the tensors of a `.safetensors` file."""
    entries, metadata = read_header(path)
    if metadata.get("format") == FORMAT:
        reason = "codes of cubin, which are no weights"
        yield Weight("", (), "", None, partial(np.empty, 0), reason, is_weight=False)
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
