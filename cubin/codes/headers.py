"""Headers of ``.safetensors`` files, read and checked without a package.

A file is the length of a header in eight bytes, the header in JSON, and the data of its tensors
without gaps.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from typing import Any, BinaryIO

LONGEST = 100_000_000
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


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its type there, its shape, and where its data begins and ends."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read(file: BinaryIO) -> tuple[dict[str, Entry], dict[str, str]]:
    """Read the tensors and the metadata of a file that was just opened.

    Returns
    -------
    (dict of str to Entry, dict of str to str)
        Positions count from the beginning of the file.

    Raises
    ------
    ValueError
        If the header is damaged, or the tensors do not fill the file, one behind the other.
    """
    length = os.fstat(file.fileno()).st_size
    size = int.from_bytes(file.read(8), "little")
    if length < 8 or not 2 <= size <= min(length - 8, LONGEST):
        raise ValueError("it is no .safetensors file, or cut off within its header")
    header = json.loads(file.read(size).decode(), object_pairs_hook=once)
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata are no strings")
    entries = {name: _entry(name, values, 8 + size) for name, values in header.items()}
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
    """The object of JSON of these names and values; ValueError where a name comes twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("its header has a name twice")
    return dict(pairs)


def _entry(name: str, values: Any, base: int) -> Entry:
    """Check the header's entry of a tensor; its positions count from `base`."""
    try:
        dtype, shape, (start, end) = values["dtype"], values["shape"], values["data_offsets"]
        numbers = [*shape, start, end]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"the entry of {name!r} is not a dtype, a shape and two offsets") from None
    if not isinstance(dtype, str) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"the entry of {name!r} has a number that is none, or below 0")
    bits, size = _bits_of(dtype), 8 * (end - start)
    if len(shape) > 64 or size < 0 or (bits and bits * math.prod(shape) != size):
        raise ValueError(f"{name!r} of shape {tuple(shape)} does not fit its {end - start} bytes")
    return Entry(dtype, tuple(shape), base + start, base + end)


def _bits_of(dtype: str) -> int:
    """The bits of an element, the number in the name of its type; 0 for a type of the future."""
    if dtype == "BOOL":
        return 8
    number = re.match(r"[A-Z]+(\d+)", dtype)
    return int(number[1]) if dtype in DTYPES and number else 0
