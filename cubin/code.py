"""BinaryCode: an array as scales and signs, and what it costs to store."""

from __future__ import annotations

import contextlib
import html
import json
import math
import operator
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from cubin import arrays, blocks, passes
from cubin.arrays import Array
from cubin.kernels import FLOATS, elementwise
from cubin.passes import Part
from cubin.signs import as_integers, where

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# ---------------------------------------------------------------- primitives


@elementwise(
    "uint16 code, uint8 bits, uint8 level",
    "int8 sign",
    "sign = level < bits ? (code >> level & 1) * 2 - 1 : 0",
    types=({},),
)
def level_signs(code: np.ndarray, bits: np.ndarray, level: np.ndarray, *, sign: np.ndarray) -> None:
    """The sign at a level of packed codes: bit `level` as -1 or +1, 0 where there is no code."""
    bit = np.bitwise_and(code, np.uint16(1) << level)
    np.not_equal(bit, 0, out=sign, casting="unsafe")
    np.add(sign, sign, out=sign)
    np.subtract(sign, 1, out=sign)
    if np.ndim(bits) or level >= bits:
        np.multiply(sign, np.greater(bits, level), out=sign)


@elementwise(
    "W y, W scale, int8 sign",
    "W total",
    "total = sign == 0 ? y : sign > 0 ? plus(y, scale) : minus(y, scale)",
    types=({"W": "float32"}, {"W": "float64"}),
)
def add_level(y: np.ndarray, scale: np.ndarray, sign: np.ndarray, *, total: np.ndarray) -> None:
    """``y + scale * sign``; where the sign is 0 the scale, which may be NaN, does not count."""
    step = blocks.spare("step", y.shape, y.dtype)
    np.multiply(scale, sign, out=step)
    where(sign != 0, step, out=step)
    np.add(y, step, out=total)


def sum_signs(scales: np.ndarray, signs: np.ndarray, *, y: np.ndarray) -> None:
    """The sums over levels of scales, (levels, rows, 1), times signs, (levels, rows, n)."""
    total = blocks.spare("total", y.shape, scales.dtype)
    total[...] = 0
    for scale, sign in zip(scales, signs, strict=True):
        add_level.function(total, scale, sign, total=total)
    y[...] = total


_CUDA = """
// The sum of scale * sign over the element's levels, of the scales as they are stored in T.
template<class T, class W, class... Scales>
__device__ W decoded(unsigned int code, int bits, Scales... scales) {
  const W scale[] = {scales..., W(0)};
  W y = 0;
#pragma unroll
  for (int level = 0; level < (int)sizeof...(Scales); ++level) {
    const W step = W(T(scale[level]));
    if (level < bits) y = code >> level & 1 ? plus(y, step) : minus(y, step);
  }
  return y;
}
"""


@elementwise(
    "uint16 code, uint8 bits, *W scales",
    "T y",
    "y = T(decoded<T, typename Work<T>::type>(code, bits{scales}))",
    types=FLOATS,
    preamble=_CUDA,
)
def decode(code: np.ndarray, bits: np.ndarray, *scales: np.ndarray, y: np.ndarray) -> None:
    """The sum of scale * sign over each element's levels, of the scales as stored in y's dtype."""
    work = arrays.work_dtype(y.dtype)
    total = np.zeros(code.shape, work)
    step = np.empty(code.shape, work)
    word = as_integers(step)
    highest = 8 * word.itemsize - 1
    top = word.dtype.type(1 << highest)
    for level, scale in enumerate(scales):
        # The bit of the level becomes the sign bit; where it is 0, scale * sign is negative.
        np.left_shift(code, word.dtype.type(highest - level), out=word)
        np.bitwise_and(word, top, out=word)
        stored = scale.astype(y.dtype, copy=False).astype(work, copy=False)
        np.bitwise_xor(word, as_integers(stored) | top, out=word)
        if np.ndim(bits):
            where(bits > level, step, out=step)
        if np.ndim(bits) or level < bits:
            np.add(total, step, out=total)
    y[...] = total


# ---------------------------------------------------------------- storage


def payload_bits(bits: Array, shape: tuple[int, ...]) -> float:
    """The mean of the bit map `bits` over an array of shape `shape`; 0 for an empty array."""
    if math.prod(shape) == 0:
        return 0.0
    # Every entry of a map stands for equally many elements.
    return float(bits) if np.ndim(bits) == 0 else float(_host(bits).mean(dtype=np.float64))


def map_entropy(bits: Array, shape: tuple[int, ...]) -> float:
    """The empirical entropy of the bit map `bits`, in bits per element of the array.

    A map of fewer entries than the array has elements (one per channel, say) is stored once per
    entry.
    """
    if np.ndim(bits) == 0 or math.prod(shape) == 0:
        return 0.0
    counts = np.bincount(_host(bits).ravel())
    share = counts[counts > 0] / counts.sum()
    return abs(float(-(share * np.log2(share)).sum())) * bits.size / math.prod(shape)


def effective_bits(bits: Array, rows: arrays.Rows, dtype: Any) -> float:
    """Payload bits, entropy of the map and storage of the scales, per element.

    A scale is stored for every level of a row at which some element of the row has a code, with
    the width of `dtype`.
    """
    size = math.prod(rows.shape)
    if size == 0:
        return 0.0
    if np.ndim(bits) == 0:
        scales = int(bits) * rows.count
    else:
        spread = np.broadcast_to(_host(bits), rows.shape)
        inner = tuple(range(len(rows.scale_shape), len(rows.order)))
        scales = int(rows.view(spread).max(axis=inner).sum(dtype=np.int64))
    width = 8 * np.dtype(dtype).itemsize
    return payload_bits(bits, rows.shape) + map_entropy(bits, rows.shape) + scales * width / size


def _host(array: Array) -> np.ndarray:
    return array.get() if arrays.on_device(array) else np.asarray(array)


class BinaryCode:
    """An array as levels of scales and signs: ``x ~ sum_i scales[i] * signs[i]``.

    `cubin.quantize` makes them.

    Parameters
    ----------
    scales : float array, shape (k, \\*scale shape)
        The scale shape is () per tensor, the lengths of the channel axes in the order given per
        channel, and ``x.shape[:-1] + (n_groups,)`` per group.
    signs : int8 array, shape (k, \\*x.shape)
        -1 or +1, and 0 where an element has no code at that level.
    bits : int or integer array that broadcasts to x's shape
        The number of levels of each element; at most k.
    channel_axis : int or tuple of int, optional
    group_size : int, optional

    Attributes
    ----------
    scales, signs, bits, channel_axis, group_size
        As above.

    Raises
    ------
    TypeError
        If an argument has the wrong type, or NumPy and CuPy arrays are mixed.
    ValueError
        If the shapes do not fit together.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> code = cubin.quantize(np.array([-1.0, 3.0]), 2)
    >>> code.scales, code.signs.tolist()
    (array([2., 1.]), [[-1, 1], [1, 1]])
    >>> code.dequantize()
    array([-1.,  3.])
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self,
        scales: Array,
        signs: Array,
        bits: Array,
        channel_axis: int | tuple[int, ...] | None = None,
        group_size: int | None = None,
    ) -> None:
        scales = arrays.as_floats("scales", scales)
        xp = arrays.library(scales, signs)
        signs = signs if arrays.on_device(signs) else np.asarray(signs)
        if signs.dtype != np.int8:
            raise TypeError(f"signs must be int8, got {signs.dtype}")
        if signs.ndim == 0 or scales.ndim == 0 or len(signs) != len(scales):
            raise ValueError(
                f"scales of shape {scales.shape} and signs of shape {signs.shape} must both have "
                "the levels as their first axis"
            )
        self._rows = arrays.rows_of(signs.shape[1:], channel_axis, group_size)
        if scales.shape[1:] != self._rows.scale_shape:
            raise ValueError(
                f"scales have shape {scales.shape}, but signs of shape {signs.shape} with "
                f"channel_axis={channel_axis} and group_size={group_size} need "
                f"{(len(signs), *self._rows.scale_shape)}"
            )
        # Of the array itself only the shape counts here: it takes no memory.
        x = xp.broadcast_to(xp.zeros((), np.int8), self._rows.shape)
        limits, levels = arrays.as_bits(bits, x, look=True)
        if levels > len(signs):
            raise ValueError(f"bits go up to {levels}, but there are {len(signs)} levels")
        self.scales = scales
        self.signs = signs
        self.bits: Any = int(limits) if isinstance(limits, np.generic) else limits.copy()
        # As plain integers, whatever stood for them, which the file's layout can hold.
        self.channel_axis = (
            tuple(map(operator.index, channel_axis))
            if isinstance(channel_axis, (tuple, list))
            else channel_axis
            if channel_axis is None
            else operator.index(channel_axis)
        )
        self.group_size = None if group_size is None else operator.index(group_size)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self._rows.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the scales and of the array."""
        return self.scales.dtype

    @property
    def payload_bits(self) -> float:
        """The mean of the bit map: bits per element of the codes alone."""
        return payload_bits(self.bits, self.shape)

    @property
    def effective_bits(self) -> float:
        """Bits per element in all: the codes, the entropy of the bit map and the scales."""
        return effective_bits(self.bits, self._rows, self.dtype)

    def dequantize(self) -> Array:
        """The approximation ``sum_i scales[i] * signs[i]``, in the shape and dtype of x."""
        rows, work = self._rows, arrays.work_dtype(self.dtype)
        scales = self.scales.astype(work, copy=False)
        if not arrays.on_device(scales):
            return self._dequantize_in_cache(scales)
        with arrays.current_device(scales):
            total = arrays.library(scales).zeros(rows.split, work)
            for scale, sign in zip(scales, self.signs, strict=True):
                add_level(total, rows.aligned(scale), sign.reshape(rows.split), total=total)
            return total.astype(self.dtype, copy=False).reshape(self.shape)

    def _dequantize_in_cache(self, scales: Array) -> Array:
        """All levels of a block at once."""
        rows, y = self._rows, arrays.result(self.shape, self.dtype, scales)
        flat_scales = scales.reshape(len(scales), rows.count, 1)
        signs, target = rows.view(self.signs, lead=1), rows.view(y)
        loops: Any = blocks.compiled(y.size)
        add_up = sum_signs if loops is None else loops.sum_signs

        def task(part: Part) -> None:
            block = target[part.block]
            shape = rows.flat_shape(block.shape)
            own = signs[(slice(None), *part.block)].reshape(len(signs), *shape)

            def write(flat: Array) -> None:
                add_up(flat_scales[:, part.rows], own, y=flat)

            passes.write(write, block, shape)

        # What has to be gathered first stays in the cache.
        in_order = loops and target.flags.c_contiguous
        size = max(blocks.BLOCK, blocks.portion(y.size)) if in_order else None
        passes.for_each_part(task, rows, block=size, threaded=loops and blocks.COMPILED)
        return y

    def __eq__(self, other: object) -> bool:
        """Whether all of shape, dtype, granularity, bits, scales and signs are the same."""
        if not isinstance(other, BinaryCode):
            return NotImplemented
        if arrays.on_device(self.scales) != arrays.on_device(other.scales):
            return False
        xp = arrays.library(self.scales)
        return (
            self.dtype == other.dtype
            and self._rows == other._rows
            and np.shape(self.bits) == np.shape(other.bits)
            and bool((self.bits == other.bits) if np.ndim(self.bits) == 0
                     else xp.array_equal(self.bits, other.bits))
            and self.scales.shape == other.scales.shape
            and bool(xp.array_equal(self.scales, other.scales, equal_nan=True))
            and bool(xp.array_equal(self.signs, other.signs))
        )  # fmt: skip

    # ------------------------------------------------------------ display

    def _facts(self) -> list[tuple[str, str]]:
        granularity = "per tensor"
        if self.channel_axis not in (None, ()):
            granularity = f"per channel, axis {self.channel_axis}"
        elif self.group_size is not None:
            granularity = f"per group of {self.group_size}"
        mapped = np.ndim(self.bits) > 0
        facts = [
            ("shape", str(self.shape)),
            ("dtype", str(self.dtype)),
            ("levels", str(len(self.scales))),
            ("bits", f"map of shape {self.bits.shape}" if mapped else str(self.bits)),
            ("scales", f"{granularity}, {self._rows.count:,} per level"),
        ]
        # Looking at a map on a device would wait for it: a display must not.
        if not (mapped and arrays.on_device(self.bits)):
            facts += [
                ("payload bits", f"{self.payload_bits:.4g} per element"),
                ("effective bits", f"{self.effective_bits:.4g} per element"),
            ]
        return facts

    def __repr__(self) -> str:
        return f"BinaryCode({', '.join(f'{name}: {value}' for name, value in self._facts())})"

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in self._facts()
        )
        return f"<table><caption>BinaryCode</caption>{cells}</table>"

    # ------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the code to a file, one bit per sign.

        The file is an uncompressed ``.npz`` archive of the arrays ``scales``, ``signs`` (bits
        packed along the last of two axes, levels by elements in C order), ``bits`` (int or
        uint8 map) and ``layout`` (JSON); nothing in it is pickled.

        A file that exists is replaced only once the new one is complete and on the disk. The new
        one has its permissions and, as far as the system lets it, its owner and group. Through a
        symbolic link, what it points to is replaced. Until then the new file lies in the same
        folder, as ``cubin-*.part``. What a killed process left there goes with the next call that
        saves to the folder, except on Windows.

        Parameters
        ----------
        path : str or path

        Raises
        ------
        ValueError
            If there are more than 16 levels, or none for more than 2^32 elements, or the signs are
            not -1 or +1 exactly where `bits` has a code: one bit per sign could not hold them. If
            `path` is a folder or a device.
        """
        signs = _host(self.signs)
        if len(signs) > arrays.MAX_BITS:
            raise ValueError(f"a file holds up to {arrays.MAX_BITS} levels, got {len(signs)}")
        _check_size(len(signs), self.shape)
        for level, sign in enumerate(signs):
            if not np.all(np.abs(sign) == np.greater(_host(self.bits), level)):
                raise ValueError(
                    f"signs of level {level} must be -1 or +1 where bits > {level}, else 0"
                )
        layout = {
            "format": _FORMAT,
            "shape": list(self.shape),
            "channel_axis": self.channel_axis,
            "group_size": self.group_size,
        }
        members = {
            "layout": np.frombuffer(json.dumps(layout).encode(), np.uint8),
            "scales": np.asarray(_host(self.scales), order="C"),
            "bits": np.asarray(_host(self.bits), np.uint8, order="C"),
            "signs": np.packbits(signs.reshape(len(signs), -1) > 0, axis=1)
            if signs.size
            else np.zeros((len(signs), -(-math.prod(self.shape) // 8)), np.uint8),
        }
        with _replacing(path) as file:
            np.savez(file, allow_pickle=False, **members)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BinaryCode:
        """Read a code that `save` wrote, as NumPy arrays.

        Parameters
        ----------
        path : str or path

        Returns
        -------
        BinaryCode

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is damaged, truncated or no BinaryCode. Sizes are checked against the
            file's own length before anything is allocated, members of other names or of the same
            name are refused, and nothing is unpickled.
        """
        with open(path, "rb") as file:
            try:
                members = _read_members(file)
                return _decode(cls, members)
            # Damage shows in many ways: tokenize's own errors, MemoryError for a shape, ...
            except Exception as error:
                raise ValueError(f"{os.fspath(path)!r} is no intact BinaryCode: {error}") from error


_FORMAT = "cubin.BinaryCode/1"
_DTYPES = {"layout": "B", "scales": "efd", "bits": "B", "signs": "B"}

_LONGEST_LAYOUT = 1 << 16
"""Bytes of the longest layout: that of 64 axes takes some thousands."""

_MOST_WITHOUT_LEVELS = 1 << 32
"""Elements of the largest array without levels, of which a file says no more than the shape."""


def _check_size(levels: int, shape: tuple[int, ...]) -> None:
    """ValueError where a file of no levels would stand for more elements than it may."""
    if not levels and math.prod(max(n, 1) for n in shape) > _MOST_WITHOUT_LEVELS:
        raise ValueError(
            f"a file without levels stands for up to {_MOST_WITHOUT_LEVELS} elements, "
            f"got the shape {shape}"
        )


@contextlib.contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` once the block ends, and is gone if it raises."""
    path = os.path.realpath(path)
    folder = os.path.dirname(path)
    try:
        old = os.stat(path)
    except FileNotFoundError:
        old = None
    if old is not None and not stat.S_ISREG(old.st_mode):
        raise ValueError(f"path must be that of a regular file, got {path!r}")
    _remove_abandoned(folder)
    # While it is written, nobody reads it who might not read the old one.
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
    """Give `file` the owner, as far as the system lets it, and the permissions of an old one."""
    if hasattr(os, "fchown"):
        with contextlib.suppress(OSError):
            os.fchown(file.fileno(), old.st_uid, old.st_gid)
    os.chmod(file.name, stat.S_IMODE(old.st_mode))


def _new_part(folder: str, mode: int) -> BinaryIO:
    """A new file, locked as long as it is open: so others see that its process is alive."""
    while True:
        name = os.path.join(folder, f"cubin-{os.urandom(8).hex()}.part")
        file = open(name, "xb", opener=lambda path, flags: os.open(path, flags, mode))  # noqa: SIM115
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(name):
            return file
        file.close()  # it was taken for abandoned before it was locked


def _remove_abandoned(folder: str) -> None:
    """Remove the unfinished files of processes that are gone, and with them their locks."""
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
        entries = archive.infolist()
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


def _decode(cls: type[BinaryCode], members: dict[str, np.ndarray]) -> BinaryCode:
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
    if levels > arrays.MAX_BITS or packed.shape != (levels, -(-size // 8)):
        raise ValueError(
            f"signs of shape {packed.shape} do not hold {levels} levels of {size} elements"
        )
    _check_size(levels, shape)
    rows = arrays.rows_of(shape, axis, group_size)
    if scales.shape != (levels, *rows.scale_shape):
        raise ValueError(f"scales of shape {scales.shape} do not fit the shape {shape}")
    limits, _ = arrays.as_bits(bits, np.broadcast_to(np.int8(0), shape))
    positive = np.unpackbits(packed, axis=1, count=size).reshape(levels, *shape)
    signs = positive.view(np.int8)
    np.subtract(np.add(signs, signs, out=signs), 1, out=signs)
    for level in range(levels):
        np.multiply(signs[level], np.greater(limits, level), out=signs[level, ...])
    return cls(scales, signs, int(bits) if bits.ndim == 0 else bits, axis, group_size)
