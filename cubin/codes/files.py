"""Files of codes: writing, replacing an older file safely, and checked reading."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from cubin.core import arrays, libraries
from cubin.core.bits import MAX_BITS, as_entries
from cubin.core.rows import rows_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_FORMAT = "cubin.BinaryCode/1"
_DTYPES = {"layout": "B", "scales": "efd", "bits": "B", "signs": "B"}

_LONGEST_LAYOUT = 1 << 16
"""Bytes of the longest layout that is read. One of 64 axes has some thousands."""

_MOST_WITHOUT_LEVELS = 1 << 32
"""Elements of the largest array of 0 levels. Its file holds no data, so that a small damaged file
could otherwise stand for an array of any size."""


def write(
    path: str | os.PathLike[str],
    scales: Any,
    signs: Any,
    bits: Any,
    channel_axis: int | tuple[int, ...] | None,
    group_size: int | None,
) -> None:
    """Write a code to a file: see `BinaryCode.save`."""
    signs, entries = libraries.to_host(signs), libraries.to_host(bits)
    shape = signs.shape[1:]
    if len(signs) > MAX_BITS:
        raise ValueError(f"a file holds up to {MAX_BITS} levels, got {len(signs)}")
    _check_size(len(signs), shape)
    for level, sign in enumerate(signs):
        if not np.all(np.abs(sign) == np.greater(entries, level)):
            raise ValueError(
                f"signs of level {level} must be -1 or +1 where bits > {level}, else 0"
            )
    layout = {
        "format": _FORMAT,
        "shape": list(shape),
        "channel_axis": channel_axis,
        "group_size": group_size,
    }
    members: dict[str, Any] = {
        "layout": np.frombuffer(json.dumps(layout).encode(), np.uint8),
        "scales": np.asarray(libraries.to_host(scales), order="C"),
        "bits": np.asarray(entries, np.uint8, order="C"),
        "signs": np.packbits(signs.reshape(len(signs), -1) > 0, axis=1)
        if signs.size
        else np.zeros((len(signs), -(-math.prod(shape) // 8)), np.uint8),
    }
    with replacing(path) as file:
        np.savez(file, **members)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The arguments of `BinaryCode` that a file holds, as NumPy arrays.

    Raises
    ------
    ValueError
        If the file is damaged, truncated or of another format.
    """
    with open(path, "rb") as file:
        try:
            return _decode(_read_members(file))
        # Damage raises many kinds of errors: of tokenize, MemoryError for a shape, ...
        except Exception as error:
            raise ValueError(f"{os.fspath(path)!r} is no intact BinaryCode: {error}") from error


def _check_size(levels: int, shape: tuple[int, ...]) -> None:
    """ValueError where a code of no levels has more elements than a file may stand for."""
    if not levels and math.prod(max(n, 1) for n in shape) > _MOST_WITHOUT_LEVELS:
        raise ValueError(
            f"a file without levels stands for up to {_MOST_WITHOUT_LEVELS} elements, "
            f"got the shape {shape}"
        )


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
    with _new_part(folder, 0o600 if old else 0o666) as file:
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


def _read_members(file: Any) -> dict[str, np.ndarray]:
    length = os.fstat(file.fileno()).st_size
    members = {}
    with zipfile.ZipFile(file) as archive:
        # NumPy 2.0 wrote an option that it did not know as one more member.
        entries = [info for info in archive.infolist() if info.filename != "allow_pickle.npy"]
        if sorted(info.filename for info in entries) != sorted(f"{name}.npy" for name in _DTYPES):
            raise ValueError(f"its members are not one each of {', '.join(_DTYPES)}")
        named = {info.filename.removesuffix(".npy"): info for info in entries}
        for name, dtypes in _DTYPES.items():
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


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these names and values; ValueError where a name comes twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("its layout has a name twice")
    return dict(pairs)


def _decode(members: dict[str, np.ndarray]) -> dict[str, Any]:
    if members["layout"].nbytes > _LONGEST_LAYOUT:
        raise ValueError(f"its layout has {members['layout'].nbytes} bytes")
    layout = json.loads(members["layout"].tobytes(), object_pairs_hook=_once)
    if not isinstance(layout, dict) or layout.get("format") != _FORMAT:
        raise ValueError("its layout is of another format")
    shape = tuple(arrays.as_integer("shape", n) for n in layout["shape"])
    axis, group_size = layout["channel_axis"], layout["group_size"]
    axis = tuple(axis) if isinstance(axis, list) else axis
    bits = members["bits"]
    scales, packed = members["scales"], members["signs"]
    size = math.prod(shape)
    if len(shape) > 64 or min(shape, default=0) < 0 or scales.ndim == 0:
        raise ValueError(f"shape {shape} is no shape of an array")
    levels = len(scales)
    if levels > MAX_BITS or packed.shape != (levels, -(-size // 8)):
        raise ValueError(
            f"signs of shape {packed.shape} do not hold {levels} levels of {size} elements"
        )
    _check_size(levels, shape)
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
