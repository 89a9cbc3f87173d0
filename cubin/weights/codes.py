"""Codes of many tensors in one `.safetensors` file, of which one is in memory at a time.

The format is that of `BinaryCode.save_all`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from cubin.codes import files
from cubin.codes.binary_code import BinaryCode
from cubin.codes.headers import DTYPES, Entry
from cubin.core import arrays
from cubin.core.bits import MAX_BITS
from cubin.weights.safetensors_files import map_tensor, read_header
from cubin.weights.tensor import BFLOAT16_IN_NUMPY

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
    levels : int
    mapped : bool
        Whether it has a bit map.
    nbytes : int
        Bytes of its planes, scales, shifts and map in the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    levels: int
    mapped: bool
    nbytes: int
    path: str | os.PathLike[str]
    layout: Mapping[str, Any]
    entries: Mapping[str, Entry]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def load(self) -> BinaryCode:
        """Read the code.

        Raises
        ------
        ValueError
            If it is damaged.
        """
        parts = {}
        for part in self.entries:
            array = np.array(map_tensor(self.path, self.entries[part], ()))
            parts[part] = array.view(np.uint16) if array.dtype == BFLOAT16_IN_NUMPY else array
        try:
            return BinaryCode(**files.unpack(dict(self.layout), parts))
        except Exception as error:  # damage raises many kinds of errors
            raise ValueError(
                f"{os.fspath(self.path)!r}: {self.name} is damaged: {error}"
            ) from error


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
    with files.replacing(path) as file:
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
    metadata = {"format": files.FORMAT, "codes": json.dumps(layouts)}
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
        "channel_axis": [LONGEST_NUMBER] * len(shape),
        "group_size": LONGEST_NUMBER,
        "levels": MAX_BITS,
        "map": [LONGEST_NUMBER] * len(shape),
        "used": False,
        "scales": "bfloat16",
        "shift": True,
        "precisions": list(range(1, MAX_BITS + 1)),
    }
    return {"layout": layout, **dict.fromkeys((*files.PARTS, *files.OPTIONAL), entry)}


def write_code(file: BinaryIO, name: str, code: BinaryCode, base: int) -> dict[str, Any]:
    """Write the data of a code, and give the header's entries for it."""
    layout, members = files.pack(code)
    entries: dict[str, Any] = {"layout": layout}
    for part, array in members.items():
        entries[part] = files.entry_of(array, file.tell() - base)
        file.write(files.data_of(array))
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
        if metadata.get("format") != files.FORMAT:
            raise ValueError("it is another kind of file")
        layouts = json.loads(metadata["codes"])
        return [stored_code(path, name, layout, entries) for name, layout in layouts.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        name = os.fspath(path)
        advice = "; cubin.BinaryCode.load reads .npz files" if str(name).endswith(".npz") else ""
        raise ValueError(f"{name!r} is no intact file of codes: {error}{advice}") from error


def stored_code(
    path: str | os.PathLike[str],
    name: str,
    layout: Mapping[str, Any],
    entries: Mapping[str, Entry],
) -> StoredCode:
    """A code of the file, as its header describes it."""
    shape = tuple(arrays.as_integer("shape", n) for n in layout["shape"])
    parts = files.parts_of(layout)
    members = {part: entries[f"{name}.{part}" if name else part] for part in parts}
    kind = DTYPES[members["scales"].dtype]
    levels = arrays.as_integer("levels", layout["levels"])
    nbytes = sum(entry.end - entry.start for entry in members.values())
    mapped = "map" in layout
    return StoredCode(name, shape, kind, levels, mapped, nbytes, path, layout, members)


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
