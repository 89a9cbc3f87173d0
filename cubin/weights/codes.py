"""Codes of many tensors in one `.safetensors` file.

Each tensor NAME gives ``NAME.planes``, uint8 of shape (levels, bytes of a line, lines), where byte
j of line i holds the signs of the elements 8 j to 8 j + 7, the first in its lowest bit and 1 for
+1; ``NAME.scales``; and with a bit map ``NAME.bits``, uint8. Lines are the indices of the first
axis, and a vector is one line. The metadata have the rest as JSON, under `codes`: shape, dtype,
bits, channel axis and group size.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from cubin.codes.binary_code import BinaryCode
from cubin.codes.cost import effective_bits, payload_bits
from cubin.codes.files import replacing
from cubin.core import arrays
from cubin.core.bits import MAX_BITS
from cubin.core.rows import rows_of
from cubin.weights.safetensors_files import CODES, Entry, map_tensor, read_header

DTYPES = {"float16": "F16", "float32": "F32", "float64": "F64"}
LONGEST_NUMBER = 10**19


@dataclass(frozen=True)
class StoredCode:
    """A code in a file, not read yet.

    Attributes
    ----------
    name : str
    shape : tuple of int
        That of the tensor.
    dtype : str
        That of the scales and of the tensor.
    bits : int or None
        None with a bit map.
    channel_axis : int, tuple of int or None
    group_size : int or None
    nbytes : int
        Bytes of its planes, scales and map in the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bits: int | None
    channel_axis: int | tuple[int, ...] | None
    group_size: int | None
    nbytes: int
    path: str | os.PathLike[str]
    entries: Mapping[str, Entry]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def read(self, part: str) -> np.ndarray:
        """Read its `planes`, `scales` or `bits`."""
        return np.array(map_tensor(self.path, self.entries[part], ()))

    def costs(self) -> tuple[float, float]:
        """Payload and effective bits per element; of the data, only a map is read."""
        bits = self.bits if self.bits is not None else self.read("bits")
        rows = rows_of(self.shape, self.channel_axis, self.group_size)
        return payload_bits(bits, self.shape), effective_bits(bits, rows, self.dtype)

    def load(self) -> BinaryCode:
        """Read the code."""
        planes = self.read("planes")
        _, length = lines_of(self.shape)
        packed = np.ascontiguousarray(planes.transpose(0, 2, 1))
        signs = np.unpackbits(packed, axis=2, count=length, bitorder="little").view(np.int8)
        np.subtract(np.add(signs, signs, out=signs), 1, out=signs)
        signs = signs.reshape(len(planes), *self.shape)
        bits: Any = self.bits if self.bits is not None else self.read("bits")
        for level in range(len(planes)):
            np.multiply(signs[level], np.greater(bits, level), out=signs[level, ...])
        return BinaryCode(self.read("scales"), signs, bits, self.channel_axis, self.group_size)


def lines_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """How many lines an array has, and how many elements each."""
    lines = shape[0] if len(shape) > 1 else 1
    return lines, math.prod(shape[1:] if len(shape) > 1 else shape)


def save_codes(
    path: str | os.PathLike[str],
    codes: Iterable[tuple[str, BinaryCode]],
    shapes: Mapping[str, tuple[int, ...]],
) -> int:
    """Write codes to a file, one in memory at a time.

    Parameters
    ----------
    path : str or path
        An existing file is replaced once the new one is complete.
    codes : iterable of (str, BinaryCode)
    shapes : mapping of str to tuple of int
        The names and shapes of all codes that may come: the header of the file, which comes first,
        gets the room that they need. Not all need to come.

    Returns
    -------
    int
        The bytes of the file.
    """
    room = len(header_of([(name, widest(name, shape)) for name, shape in shapes.items()]))
    room += -(8 + room) % 64
    written: list[tuple[str, dict[str, Any]]] = []
    with replacing(path) as file:
        file.write(bytes(8 + room))
        for name, code in codes:
            written.append((name, write_code(file, name, code.to_host(), 8 + room)))
        end = file.tell()
        header = header_of(written)
        file.seek(0)
        file.write(room.to_bytes(8, "little") + header.ljust(room))
    return end


def header_of(written: Iterable[tuple[str, Mapping[str, Any]]]) -> bytes:
    """The header of a file in JSON."""
    header: dict[str, Any] = {}
    layouts = {}
    for name, parts in written:
        layouts[name] = parts["layout"]
        header |= {f"{name}.{key}": value for key, value in parts.items() if key != "layout"}
    metadata = {"format": CODES, "codes": json.dumps(layouts)}
    return json.dumps({"__metadata__": metadata, **header}).encode()


def widest(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Entries of a code that take at least as much room as those of any code of this shape."""
    entry = {
        "dtype": "BF16",
        "shape": [LONGEST_NUMBER] * (len(shape) + 2),
        "data_offsets": [LONGEST_NUMBER, LONGEST_NUMBER],
    }
    layout = {
        "shape": list(shape),
        "dtype": "bfloat16",
        "bits": MAX_BITS,
        "channel_axis": [LONGEST_NUMBER] * len(shape),
        "group_size": LONGEST_NUMBER,
    }
    return {"layout": layout, "planes": entry, "scales": entry, "bits": entry}


def write_code(file: BinaryIO, name: str, code: BinaryCode, base: int) -> dict[str, Any]:
    """Write the data of a code, and give the header's entries for it."""
    lines, length = lines_of(code.shape)
    positive = (code.signs > 0).reshape(len(code.signs), lines, length)
    planes = np.packbits(positive, axis=2, bitorder="little").transpose(0, 2, 1)
    mapped = np.ndim(code.bits) > 0
    parts = {"scales": (DTYPES[code.dtype.name], code.scales), "planes": ("U8", planes)}
    if mapped:
        parts["bits"] = ("U8", code.bits.astype(np.uint8))
    entries: dict[str, Any] = {
        "layout": {
            "shape": list(code.shape),
            "dtype": code.dtype.name,
            "bits": None if mapped else int(code.bits),
            "channel_axis": code.channel_axis,
            "group_size": code.group_size,
        }
    }
    for key, (dtype, array) in parts.items():
        start = file.tell() - base
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        offsets = [start, file.tell() - base]
        entries[key] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
    return entries


def stored_codes(path: str | os.PathLike[str]) -> list[StoredCode]:
    """List the codes of a file, of which only the header is read.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged, or no file of codes.
    """
    try:
        entries, metadata = read_header(path)
        if metadata.get("format") != CODES:
            raise ValueError("it is another kind of file")
        layouts = json.loads(metadata["codes"])
        return [stored_code(path, name, layout, entries) for name, layout in layouts.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)!r} is no intact file of codes: {error}") from error


def stored_code(
    path: str | os.PathLike[str],
    name: str,
    layout: Mapping[str, Any],
    entries: Mapping[str, Entry],
) -> StoredCode:
    """Check the entries of a code against one another."""
    shape = tuple(arrays.as_integer("shape", n) for n in layout["shape"])
    axis, group_size = layout["channel_axis"], layout["group_size"]
    axis = tuple(axis) if isinstance(axis, list) else axis
    rows = rows_of(shape, axis, group_size)
    bits = layout["bits"]
    keys = ("planes", "scales", "bits") if bits is None else ("planes", "scales")
    own = {key: entries[f"{name}.{key}"] for key in keys}
    lines, length = lines_of(shape)
    levels = own["scales"].shape[0]
    expected = {"planes": (levels, -(-length // 8), lines), "scales": (levels, *rows.scale_shape)}
    for key, wanted in expected.items():
        if own[key].shape != wanted:
            raise ValueError(f"{name}.{key} has the shape {own[key].shape}, not {wanted}")
    if levels > MAX_BITS or (bits is not None and bits != levels):
        raise ValueError(f"{name} has {bits} bits and {levels} levels")
    if own["scales"].dtype != DTYPES.get(layout["dtype"]) or any(
        own[key].dtype != "U8" for key in keys if key != "scales"
    ):
        raise ValueError(f"{name} has parts of other types")
    nbytes = sum(entry.end - entry.start for entry in own.values())
    return StoredCode(name, shape, layout["dtype"], bits, axis, group_size, nbytes, path, own)


def load_codes(path: str | os.PathLike[str]) -> Iterator[tuple[str, BinaryCode]]:
    """Read the codes of a file, one in memory at a time.

    Parameters
    ----------
    path : str or path
        A file of `save_codes`.

    Yields
    ------
    (str, BinaryCode)

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged, or no file of codes.
    """
    for stored in stored_codes(path):
        yield stored.name, stored.load()
