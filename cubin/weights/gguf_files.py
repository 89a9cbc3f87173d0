"""Tensors of `.gguf` files.

The header is read here: it is short, and the package `gguf` follows the lengths in a damaged one
without end. The package decodes the data of the quantized types, as float32.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cubin.weights.tensor import (
    BFLOAT16_IN_NUMPY,
    Cut,
    Weight,
    is_listed,
    not_read,
    without_graph,
)

FLOATS: dict[int, tuple[str, np.dtype]] = {
    0: ("float32", np.dtype("<f4")),
    1: ("float16", np.dtype("<f2")),
    28: ("float64", np.dtype("<f8")),
    30: ("bfloat16", BFLOAT16_IN_NUMPY),
}
INTEGERS = {24: "int8", 25: "int16", 26: "int32", 27: "int64"}

# Values of the key-value pairs: their formats by type; 8 is a string, 9 an array.
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B"} | {
    10: "<Q",
    11: "<q",
    12: "<d",
}
STRING, ARRAY = 8, 9


class Reader:
    """Numbers and strings of a header, none of which may lie beyond the end of the file."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self.file = file
        self.length = length

    def take(self, size: int) -> bytes:
        content = self.file.read(size) if size <= self.length - self.file.tell() else b""
        if len(content) != size:
            raise ValueError(f"cut off: {size} bytes at byte {self.file.tell()} of {self.length}")
        return content

    def skip(self, size: int) -> None:
        if size > self.length - self.file.tell():
            raise ValueError(f"cut off: {size} bytes at byte {self.file.tell()} of {self.length}")
        self.file.seek(size, 1)

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.take(self.number("<Q")).decode()

    def value(self, kind: int) -> object:
        """Read the value of a pair; of strings and arrays the length alone."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            self.skip(self.number("<Q"))
        elif kind == ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            if inner in SCALARS:
                self.skip(count * struct.calcsize(SCALARS[inner]))
            else:  # every string or array takes bytes of the file, which ends
                for _ in range(count):
                    self.value(inner)
        else:
            raise ValueError(f"a value of the unknown type {kind}")
        return None


def read_gguf(path: Path) -> Iterator[Weight]:
    """List the tensors of a `.gguf` file."""
    length = path.stat().st_size
    with path.open("rb") as file:
        reader = Reader(file, length)
        if reader.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = reader.number("<I")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not read")
        tensors, pairs = reader.number("<Q"), reader.number("<Q")
        alignment: object = 32
        for _ in range(pairs):
            key = reader.text()
            value = reader.value(reader.number("<I"))
            alignment = value if key == "general.alignment" else alignment
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"an alignment of {alignment}")
        infos = [tensor_info(reader) for _ in range(tensors)]
        start = -(-file.tell() // alignment) * alignment
    names = {name for name, *_ in infos}
    if len(names) < len(infos):
        raise ValueError("a tensor has its name twice")
    for name, shape, kind, offset in infos:
        tensor = stored(path, name, shape, kind, start + offset, length)
        if is_listed(tensor):
            yield tensor


def tensor_info(reader: Reader) -> tuple[str, tuple[int, ...], int, int]:
    """Read the name of a tensor, its shape, its type and where its data begins."""
    name, rank = reader.text(), reader.number("<I")
    if rank > 8:
        raise ValueError(f"{name} has {rank} axes")
    shape = tuple(reader.number("<Q") for _ in range(rank))[::-1]  # the fastest axis comes first
    return name, shape, reader.number("<I"), reader.number("<Q")


def stored(
    path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int, length: int
) -> Weight:
    """Judge a tensor by its type and shape."""
    if kind in FLOATS:
        dtype, mapped = FLOATS[kind]
        nbytes = math.prod(shape) * mapped.itemsize
        tensor = without_graph(name, shape, dtype, partial(map_floats, path, offset, shape, mapped))
    else:
        read = partial(decode, path, offset, shape, kind)
        if kind in INTEGERS:
            return without_graph(name, shape, INTEGERS[kind], read)
        tensor = without_graph(name, shape, "float32", read)
        dtype, block, block_bytes = quantized_type(kind)
        tensor = replace(tensor, dtype=dtype)
        if not block:
            reason = f"{not_read(dtype)} by this version of the package gguf"
            return replace(tensor, reason=tensor.reason or reason)
        if math.prod(shape) and (not shape or shape[-1] % block):
            raise ValueError(f"{name}: blocks of {block} do not divide its shape {shape}")
        nbytes = math.prod(shape) // block * block_bytes
    if offset + nbytes > length:
        raise ValueError(f"cut off: {name} ends at byte {offset + nbytes} of {length}")
    return tensor


def quantized_type(kind: int) -> tuple[str, int, int]:
    """The name of a type, and the elements and bytes of its blocks: 0 if it cannot be decoded."""
    import gguf

    try:
        quantized = gguf.GGMLQuantizationType(kind)
    except ValueError:
        return f"number {kind}", 0, 0
    try:
        block, block_bytes = gguf.GGML_QUANT_SIZES[quantized]
        gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), quantized)
    except (KeyError, NotImplementedError):
        return quantized.name, 0, 0
    return quantized.name, block, block_bytes


def map_floats(
    path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype, cut: Cut
) -> np.ndarray:
    return np.memmap(path, dtype, "r", offset, shape)[cut]


def decode(path: Path, offset: int, shape: tuple[int, ...], kind: int, cut: Cut) -> np.ndarray:
    """Read the lines of a quantized tensor that the cut needs, as float32."""
    import gguf

    quantized = gguf.GGMLQuantizationType(kind)
    block, block_bytes = gguf.GGML_QUANT_SIZES[quantized]
    stored_shape = (*shape[:-1], shape[-1] // block * block_bytes)
    lines, columns = cut[: len(shape) - 1], cut[len(shape) - 1 :]
    packed = np.memmap(path, np.uint8, "r", offset, stored_shape)[lines]
    return gguf.quants.dequantize(np.ascontiguousarray(packed), quantized)[(..., *columns)]
