"""Files of codes: writing, replacing an older file safely, and checked reading."""

from __future__ import annotations

import contextlib
import functools
import json
import lzma
import math
import os
import re
import stat
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from cubin.codes import headers
from cubin.core import arrays, floats
from cubin.core.bits import MAX_BITS, as_entries
from cubin.core.lines import lines_of
from cubin.core.rows import Rows, rows_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = "cubin.BinaryCode/2"
_FORMER = "cubin.BinaryCode/1"
MEMBERS = {"layout": "B", "scales": "efdH", "bits": "B"}
"""The members that every file has, and the characters of their dtypes. Scales, shifts and tables
of bfloat16, which the format of NumPy's arrays does not have, are written as their bit patterns,
and the layout says so."""

_PATTERNS = "bfloat16"

_LONGEST_LAYOUT = 1 << 16
"""Bytes of the longest layout that is read. One of 64 axes has some thousands."""

_MOST_WITHOUT_LEVELS = 1 << 32
"""Elements of the largest array of 0 levels. Its file holds no data, so that a small damaged file
could otherwise stand for an array of any size."""

_EXPANSION = 1 << 9
"""A byte of a packed map stands for up to so many entries. Packed maps are filled up to that with
zeros, so that a small damaged file cannot stand for a map of any size."""

_FILTER = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 20, "lc": 0, "lp": 0, "pb": 0}]
"""How maps are packed. Bits that repeat nothing come within 2 % of their entropy."""

PARTS = ("scales", "bits", "planes")
"""The arrays that every code has in a file."""

OPTIONAL = {"shift": "shift", "tables": "precisions"}
"""The arrays that a code may have, and what its layout has where it has them."""

TENSORS = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8", "U8": "|u1"}
"""The dtypes of safetensors, as NumPy reads them: bfloat16 as its bit patterns."""


def write(path: str | os.PathLike[str], codes: Mapping[str, Any]) -> None:
    """Write codes in NumPy arrays to a file: see `BinaryCode.save` and `save`."""
    packed = {name: pack(code) for name, code in codes.items()}
    if os.fspath(path).endswith(".safetensors"):
        with replacing(path) as file:
            _write_tensors(file, packed)
        return
    layout: dict[str, Any]
    members: dict[str, Any]
    ((layout, members),) = packed.values()
    text = np.frombuffer(json.dumps({"format": FORMAT, **layout}).encode(), np.uint8)
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, member in {"layout": text, **members}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, member, version=(1, 0), allow_pickle=False)


def read(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """The arguments of each `BinaryCode` that a file holds, as NumPy arrays, by its name.

    The name in an archive is empty. Files of format 1 have ``signs`` in place of ``planes``.

    Raises
    ------
    ValueError
        If the file is damaged, truncated or of another format.
    """
    with open(path, "rb") as file:
        try:
            if os.fspath(path).endswith(".safetensors"):
                return _read_tensors(file)
            members = _read_members(file)
            if members["layout"].nbytes > _LONGEST_LAYOUT:
                raise ValueError(f"its layout has {members['layout'].nbytes} bytes")
            layout = json.loads(members.pop("layout").tobytes(), object_pairs_hook=headers.once)
            if not isinstance(layout, dict):
                raise ValueError("its layout is of another format")
            if layout.get("format") == _FORMER and "signs" in members:
                return {"": _decode(layout, members)}
            if layout.get("format") != FORMAT or "planes" not in members:
                raise ValueError("its layout is of another format")
            return {"": unpack(layout, members)}
        # Damage raises many kinds of errors: of tokenize, MemoryError for a shape, ...
        except Exception as error:
            raise ValueError(f"{os.fspath(path)!r} is no intact BinaryCode: {error}") from error


def _check_size(levels: int, shape: tuple[int, ...], nbytes: int) -> None:
    """ValueError where a code has far more elements than a file of so many bytes may stand for."""
    size = math.prod(max(n, 1) for n in shape)
    if not levels and size > _MOST_WITHOUT_LEVELS:
        raise ValueError(
            f"a file without levels stands for up to {_MOST_WITHOUT_LEVELS} elements, "
            f"got the shape {shape}"
        )
    if levels and size > _EXPANSION * max(nbytes, 1 << 16):
        raise ValueError(
            f"a file stands for up to {_EXPANSION} elements a byte, got {nbytes} bytes for the "
            f"shape {shape}"
        )


# ---------------------------------------------------------------- one code


def pack(code: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What JSON says about a code in a file, and the arrays that the file has.

    Without a map the planes are stored as they are. With one, only the signs that exist are: level
    by level, in the order of the elements. Scales of levels that no element of a row has are left
    out if all of them are 0.
    """
    shape, rows = code.shape, rows_of(code.shape, code.channel_axis, code.group_size)
    scales, planes, bits = code.scales, code.planes, np.asarray(code.bits, np.uint8)
    levels = len(planes)
    if levels > MAX_BITS:
        raise ValueError(f"a file holds up to {MAX_BITS} levels, got {levels}")
    layout = {
        "shape": list(shape),
        "channel_axis": code.channel_axis,
        "group_size": code.group_size,
        "levels": levels,
    }
    if np.ndim(bits):
        layout["map"] = list(bits.shape)
        used = _used(bits, rows, levels)
        layout["used"] = not (scales.astype(bool) & ~used).any()
        scales = scales[used] if layout["used"] else scales
        planes = _existing(planes, bits, shape)
        bits = _packed_map(bits, levels)
    _check_size(levels, shape, planes.nbytes + bits.nbytes)
    if scales.dtype.name == _PATTERNS:
        layout["scales"], scales = _PATTERNS, floats.as_integers(scales)
    arrays = {"scales": scales, "bits": bits, "planes": planes}
    if code.shift is not None:
        layout["shift"] = True
        arrays["shift"] = code.shift.view(scales.dtype)
    if code.precisions is not None:
        layout["precisions"] = list(code.precisions)
        arrays["tables"] = code.tables.view(scales.dtype)
    return layout, {name: np.asarray(array, order="C") for name, array in arrays.items()}


def unpack(layout: dict[str, Any], members: dict[str, np.ndarray]) -> dict[str, Any]:
    """The arguments of `BinaryCode` from what a file has. No array is larger than that allows."""
    shape = tuple(arrays.as_integer("shape", n) for n in layout["shape"])
    levels = arrays.as_integer("levels", layout["levels"])
    axis, group_size = layout["channel_axis"], layout["group_size"]
    axis = tuple(axis) if isinstance(axis, list) else axis
    scales, bits, planes = (members[part] for part in PARTS)
    more = {part: members[part] for part in OPTIONAL if part in members}
    shifted, several = layout.get("shift", False), "precisions" in layout
    if shifted is not ("shift" in more) or several is not ("tables" in more):
        raise ValueError("its layout does not say which arrays there are")
    if not bits.dtype == planes.dtype == np.uint8 or any(
        array.dtype.char not in MEMBERS["scales"] for array in (scales, *more.values())
    ):
        raise ValueError("its arrays have unexpected dtypes")
    scales = _scales(scales, layout)
    more = {part: _scales(stored, layout) for part, stored in more.items()}
    if len(shape) > 63 or min(shape, default=0) < 0 or not 0 <= levels <= MAX_BITS:
        raise ValueError(f"shape {shape} with {levels} levels is no shape of a code")
    _check_size(levels, shape, planes.nbytes + bits.nbytes)
    rows, lines = rows_of(shape, axis, group_size), lines_of(shape)
    if "map" in layout:
        of_map = tuple(arrays.as_integer("map", n) for n in layout["map"])
        if min(of_map, default=0) < 0:
            raise ValueError(f"map of shape {of_map} is no map")
        bits = _unpacked_map(bits, of_map, levels)
        arrays.check_broadcasts("map", bits, shape)
        if layout["used"]:
            used = _used(bits, rows, levels)
            if scales.shape != (np.count_nonzero(used),):
                raise ValueError(f"scales of shape {scales.shape} are not those of the map")
            full = np.zeros(used.shape, scales.dtype)
            full[used] = scales
            scales = full
        planes = _spread(planes, bits, shape, levels)
    elif bits.shape != ():
        raise ValueError(f"bits of shape {bits.shape} are no number")
    if planes.shape != (levels, lines.width, lines.count):
        raise ValueError(f"planes of shape {planes.shape} do not fit the shape {shape}")
    if scales.shape != (levels, *rows.scale_shape):
        raise ValueError(f"scales of shape {scales.shape} do not fit the shape {shape}")
    return {
        "scales": scales,
        "planes": planes,
        "bits": int(bits) if bits.ndim == 0 else bits,
        "shape": shape,
        "channel_axis": axis,
        "group_size": group_size,
        "precisions": layout.get("precisions"),
        **more,
    }


def parts_of(layout: Mapping[str, Any]) -> tuple[str, ...]:
    """The arrays that a code has in a file, by what its layout says."""
    return (*PARTS, *(part for part, key in OPTIONAL.items() if layout.get(key)))


def _scales(stored: np.ndarray, layout: dict[str, Any]) -> np.ndarray:
    """Scales, shifts or tables of a file: what it holds, or bfloat16 of these patterns."""
    patterns = stored.dtype.kind == "u"
    if layout.get("scales") != (_PATTERNS if patterns else None):
        raise ValueError(
            f"its layout says that scales are {layout.get('scales')!r}, but some are {stored.dtype}"
        )
    return stored.astype(np.uint16, copy=False).view(floats.bfloat16()) if patterns else stored


def _used(bits: np.ndarray, rows: Rows, levels: int) -> np.ndarray:
    """Which scales, (levels, *scale shape), some element has."""
    largest = functools.partial(np.max, initial=0)
    most = rows.reduced(largest, np.broadcast_to(bits, rows.shape))
    return most > np.arange(levels).reshape(-1, *(1,) * most.ndim)


def _packed_map(bits: np.ndarray, levels: int) -> np.ndarray:
    """A map as bytes: for each level, of the entries with so many bits, which have more."""
    packer = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=_FILTER)
    left, parts = bits.ravel(), []
    for level in range(levels):
        parts.append(packer.compress(np.packbits(left > level).tobytes()))
        left = left[left > level]
    parts.append(packer.flush())
    return np.frombuffer(b"".join(parts).ljust(-(-bits.size // _EXPANSION), b"\0"), np.uint8)


def _unpacked_map(packed: np.ndarray, shape: tuple[int, ...], levels: int) -> np.ndarray:
    size = math.prod(shape)
    if packed.ndim != 1 or size > _EXPANSION * packed.size:
        raise ValueError(f"a map of {packed.size} bytes does not hold the shape {shape}")
    unpacker, data = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTER), packed.tobytes()
    bits, left = np.zeros(size, np.uint8), np.arange(size)
    for _ in range(levels):
        wanted, content = -(-len(left) // 8), b""
        while len(content) < wanted:
            if unpacker.eof or (unpacker.needs_input and not data):
                raise ValueError("its map is truncated")
            content += unpacker.decompress(data, wanted - len(content))
            data = b""
        more = np.unpackbits(np.frombuffer(content, np.uint8), count=len(left)).view(np.bool_)
        left = left[more]
        bits[left] += 1
    return bits.reshape(shape)


def _existing(planes: np.ndarray, bits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The bits of planes where elements have codes, packed: level by level, in C order."""
    parts, lines = [], lines_of(shape)
    depths = np.broadcast_to(bits, shape).reshape(lines.count, lines.length)
    for level, plane in enumerate(planes):
        signs = np.unpackbits(np.ascontiguousarray(plane.T), 1, lines.length, "little")
        parts.append(np.packbits(signs[depths > level], bitorder="little"))
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def _spread(
    packed: np.ndarray, bits: np.ndarray, shape: tuple[int, ...], levels: int
) -> np.ndarray:
    lines = lines_of(shape)
    depths = np.broadcast_to(bits, shape).reshape(lines.count, lines.length)
    counts = [int(np.count_nonzero(depths > level)) for level in range(levels)]
    if packed.shape != (sum(-(-count // 8) for count in counts),):
        raise ValueError(f"signs of {packed.size} bytes are not those of the map")
    planes, at = np.zeros((levels, lines.width, lines.count), np.uint8), 0
    for level, count in enumerate(counts):
        stop = at - (-count // 8)
        signs = np.zeros((lines.count, lines.length), np.uint8)
        signs[depths > level] = np.unpackbits(packed[at:stop], count=count, bitorder="little")
        planes[level] = np.packbits(signs, axis=1, bitorder="little").T
        at = stop
    return planes


# ---------------------------------------------------------------- .safetensors


def _write_tensors(file: BinaryIO, packed: Mapping[str, Any]) -> None:
    """Write the format of safetensors: the length of a header of JSON, the header, the data."""
    layouts = {name: layout for name, (layout, _) in packed.items()}
    metadata = {"format": FORMAT, "codes": json.dumps(layouts)}
    header: dict[str, Any] = {"__metadata__": metadata}
    tensors = [
        (f"{name}.{part}" if name else part, array)
        for name, (_, members) in packed.items()
        for part, array in members.items()
    ]
    # The widest numbers come first, so that all of them are aligned.
    tensors.sort(key=lambda pair: -pair[1].itemsize)
    start = 0
    for name, array in tensors:
        header[name] = entry_of(array, start)
        start += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, array in tensors:
        file.write(data_of(array))


def entry_of(array: np.ndarray, start: int) -> dict[str, Any]:
    """The entry in the header of a tensor whose data begin at `start`."""
    kinds = {kind: name for name, kind in TENSORS.items()}
    kind = kinds[array.dtype.newbyteorder("<").str if array.itemsize > 1 else array.dtype.str]
    offsets = [start, start + array.nbytes]
    return {"dtype": kind, "shape": list(array.shape), "data_offsets": offsets}


def data_of(array: np.ndarray) -> memoryview:
    """The data of a tensor as they are written."""
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little).reshape(-1).view(np.uint8).data


def _read_tensors(file: BinaryIO) -> dict[str, dict[str, Any]]:
    """The arrays are views of the file, which is mapped into memory read-only."""
    entries, metadata = headers.read(file)
    if metadata.get("format") != FORMAT:
        raise ValueError("it is of another format")
    layouts = json.loads(metadata["codes"], object_pairs_hook=headers.once)
    data = np.memmap(file, np.uint8, "r")
    members = {}
    for name, entry in entries.items():
        member = data[entry.start : entry.end].view(TENSORS[entry.dtype])
        members[name] = member.reshape(entry.shape).view(np.ndarray)
    codes = {}
    for name, layout in layouts.items():
        parts = {part: members.pop(f"{name}.{part}" if name else part)
                 for part in parts_of(layout)}  # fmt: skip
        codes[name] = unpack(layout, parts)
    if members:
        raise ValueError(f"{', '.join(members)} are of no code")
    return codes


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file that replaces `path` when the with block ends, and is removed if that raises."""
    path = os.path.realpath(path)
    folder = os.path.dirname(path)
    try:
        old = os.stat(path)
    except FileNotFoundError:
        old = None
    if old is not None and not stat.S_ISREG(old.st_mode):
        raise ValueError(f"path must be that of a regular file, got {path!r}")
    _remove_abandoned(folder)
    # Until it has the permissions of the old file, only its owner can read it.
    try:
        part = _new_part(folder, 0o600 if old else 0o666)
    except OSError as error:  # which names a file that nobody asked for
        raise OSError(error.errno, error.strerror, path) from error
    with part as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if old is not None:
                _take_over(file, old)
            if fcntl is None:
                file.close()  # Windows renames no open files
            os.replace(file.name, path)
        except BaseException:
            file.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.name)
            raise


def _take_over(file: BinaryIO, old: os.stat_result) -> None:
    """Give `file` the permissions of an old file and, where the system allows it, its owner."""
    if hasattr(os, "fchown"):
        with contextlib.suppress(OSError):
            os.fchown(file.fileno(), old.st_uid, old.st_gid)
    os.chmod(file.name, stat.S_IMODE(old.st_mode))


def _new_part(folder: str, mode: int) -> BinaryIO:
    """A new file that is locked while it is open, which shows that its process is alive."""
    while True:
        name = os.path.join(folder, f"cubin-{os.urandom(8).hex()}.part")
        file = open(name, "xb", opener=lambda path, flags: os.open(path, flags, mode))  # noqa: SIM115
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(name):
            return file
        file.close()  # another process removed it before it was locked: try again


def _remove_abandoned(folder: str) -> None:
    """Remove the unfinished files of dead processes: their locks are gone."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _PART.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError), open(entry.path, "r+b") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(entry.path)


_PART = re.compile(r"cubin-[0-9a-f]{16}\.part")


# ---------------------------------------------------------------- archives


def _read_members(file: Any) -> dict[str, np.ndarray]:
    length = os.fstat(file.fileno()).st_size
    members = {}
    with zipfile.ZipFile(file) as archive:
        # NumPy 2.0 wrote an option that it did not know as one more member.
        entries = [info for info in archive.infolist() if info.filename != "allow_pickle.npy"]
        # Format 1 has signs, packed in the order of the elements, in place of planes.
        found = sorted(info.filename for info in entries)
        last = "signs" if "signs.npy" in found else "planes"
        wanted = MEMBERS | {last: "B"}
        if last == "planes":
            more = [part for part in OPTIONAL if f"{part}.npy" in found]
            wanted |= dict.fromkeys(more, MEMBERS["scales"])
        if found != sorted(f"{name}.npy" for name in wanted):
            raise ValueError(f"its members are not one each of {', '.join(wanted)}")
        named = {info.filename.removesuffix(".npy"): info for info in entries}
        for name, dtypes in wanted.items():
            info = named[name]
            # Stored members cannot be larger than the file: no bomb, no false size.
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise ValueError(f"{name} is compressed")
            if info.file_size > length:
                raise ValueError(f"{name} of {info.file_size} bytes goes beyond the file's end")
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                if version != (1, 0):
                    raise ValueError(f"{name} has format version {version}")
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
                if dtype.char not in dtypes or fortran:
                    raise ValueError(f"{name} has an unexpected dtype or order")
                if any(isinstance(n, bool) or n < 0 for n in shape):
                    raise ValueError(f"{name} has the shape {shape}")
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


def _decode(layout: dict[str, Any], members: dict[str, np.ndarray]) -> dict[str, Any]:
    """The arguments of `BinaryCode.from_signs` from a file of format 1."""
    shape = tuple(arrays.as_integer("shape", n) for n in layout["shape"])
    axis, group_size = layout["channel_axis"], layout["group_size"]
    axis = tuple(axis) if isinstance(axis, list) else axis
    bits = members["bits"]
    scales, packed = _scales(members["scales"], layout), members["signs"]
    size = math.prod(shape)
    if len(shape) > 64 or min(shape, default=0) < 0 or scales.ndim == 0:
        raise ValueError(f"shape {shape} is no shape of an array")
    levels = len(scales)
    if levels > MAX_BITS or packed.shape != (levels, -(-size // 8)):
        raise ValueError(
            f"signs of shape {packed.shape} do not hold {levels} levels of {size} elements"
        )
    if not levels:
        _check_size(levels, shape, 0)
    rows = rows_of(shape, axis, group_size)
    if scales.shape != (levels, *rows.scale_shape):
        raise ValueError(f"scales of shape {scales.shape} do not fit the shape {shape}")
    limits, most = as_entries(bits, shape, scales)
    if most > levels:
        raise ValueError(f"bits go up to {most}, but there are {levels} levels")
    positive = np.unpackbits(packed, axis=1, count=size).reshape(levels, *shape)
    signs = positive.view(np.int8)
    np.subtract(np.add(signs, signs, out=signs), 1, out=signs)
    for level in range(levels):
        np.multiply(signs[level], np.greater(limits, level), out=signs[level, ...])
    return {
        "scales": scales,
        "signs": signs,
        "bits": int(bits) if bits.ndim == 0 else bits,
        "channel_axis": axis,
        "group_size": group_size,
    }
