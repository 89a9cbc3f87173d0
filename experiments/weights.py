"""Pretrained weights on disk, read one tensor at a time.

`Weights(paths)` reads headers and graphs only: the name, shape and channel axis of every weight
tensor are known before its data is touched. Iterating loads the tensors one by one. What the files
hold besides is listed with the reason why it is left out.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import mmap
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from onnx_graph import Axis, StoredTensor, graph_tensors

INSTALL = "install the extra `examples`: pip install '.[examples]'"


class WeightsError(Exception):
    """A path that gives no usable weights; the message is one line and says what to do."""


class NotFiniteError(WeightsError):
    """A tensor with NaN or infinity.

    Attributes
    ----------
    reason : str
        How many values, without the name of the tensor.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}; repair the tensor or leave its file out")
        self.reason = reason


@dataclass(frozen=True)
class Weight:
    """A tensor on disk.

    Attributes
    ----------
    name : str
        Its name in the file; with several files, preceded by the file's.
    shape : tuple of int
        Its shape.
    dtype : str
        The type that it is stored in.
    channel_axis : int, tuple of int or None
        The axes along which output channels lie, each index of which has scales of its own. In a
        file without a graph it is 0. In one with a graph it is an axis of the tensor as it is
        stored, found back from the operator that uses it as its weight through all that only moves
        elements: transposes, reshapes, slices, concatenations. Matrices that lie side by side, of
        the directions of a recurrent layer or the batch indices of a product, have channels of
        their own: their axis is one of the tuple. None if there is a single channel, and for
        what is no weight. A tensor is given in a reshaped form where the channels are but a part
        of an axis: as (512, 128), say, where the file holds 65536 numbers and the graph reshapes
        them. Of several operators the first one counts.
    read : callable
        Returns the data as stored.
    reason : str
        Why the tensor is left out; empty if it is not.
    is_weight : bool
        Whether it is used as a weight; one with a reason is skipped.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    channel_axis: Axis
    read: Callable[[], np.ndarray] = field(repr=False, compare=False)
    reason: str = ""
    is_weight: bool = True

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def load(self) -> np.ndarray:
        """Read the data as float16, float32 or float64 (bfloat16 becomes float32).

        Returns
        -------
        ndarray
            The tensor; read-only where it is a view of the file.

        Raises
        ------
        WeightsError
            If the data cannot be read.
        NotFiniteError
            If it holds NaN or infinity.
        """
        try:
            array = native_float(self.read()).reshape(self.shape)
        except Exception as error:
            raise WeightsError(
                f"{self.name}: cannot read the data ({first_line(error)})"
            ) from error
        # The extremes carry every NaN and infinity, and need no array of flags.
        if not (np.isfinite(array.min()) and np.isfinite(array.max())):
            bad = array.size - np.count_nonzero(np.isfinite(array))
            raise NotFiniteError(self.name, f"{bad} of {array.size} values are NaN or infinite")
        return array


class Weights:
    """The float weight tensors of files and folders.

    In files with a graph (ONNX) a weight is what an operator uses as its weight; in the others,
    every float tensor of rank 2 or more.

    Parameters
    ----------
    paths : iterable of path-like
        `.npy`, `.npz`, `.safetensors` and `.onnx` files, and folders, which are searched for
        these at any depth. A file that several paths lead to is read once.

    Attributes
    ----------
    tensors : list of Weight
        The weights in the order of their files, not loaded yet.
    skipped : list of Weight
        Weights that cannot be read, such as those of float8 or int8.
    left_out : list of Weight
        Float tensors that are no weights, such as biases. From files without a graph also tensors
        of other types that could be weights, since they have rank 2 or more.

    Raises
    ------
    WeightsError
        If a path does not exist, has an unknown type, needs a package that is not installed,
        cannot be read, or holds no float weights.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        groups = {Path(path): weight_files(Path(path)) for path in paths}
        # By the files themselves, whatever the paths to them.
        files = {file.resolve(): file for group in groups.values() for file in group}
        labels = file_labels(list(files.values()))
        self.tensors: list[Weight] = []
        self.skipped: list[Weight] = []
        self.left_out: list[Weight] = []
        for path, group in groups.items():
            own = [file for file in group if files.pop(file.resolve(), None) is not None]
            if not own:
                continue
            found = [tensor for file in own for tensor in tensors_of(file, labels)]
            weights = [tensor for tensor in found if not tensor.reason]
            if not weights:
                raise WeightsError(f"{path}: {without_weights(found)}")
            self.tensors += weights
            self.skipped += [tensor for tensor in found if tensor.reason and tensor.is_weight]
            self.left_out += [tensor for tensor in found if tensor.reason and not tensor.is_weight]
        self.tensors = apart(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[tuple[str, np.ndarray, Axis]]:
        """Yield (name, array, channel_axis), one tensor in memory at a time."""
        for tensor in self.tensors:
            yield tensor.name, tensor.load(), tensor.channel_axis


def pretrained_sample() -> list[Path]:
    """Find the OCR networks of the installed package rapidocr, without importing it.

    Returns
    -------
    list of Path
        Its ONNX files.

    Raises
    ------
    WeightsError
        If rapidocr is not installed, or carries no ONNX files (releases before 3.10 may not).
    """
    package = importlib.util.find_spec("rapidocr")
    folders = package.submodule_search_locations if package else None
    files = sorted(file for folder in folders or [] for file in Path(folder).rglob("*.onnx"))
    if not files:
        raise WeightsError(
            f"the pretrained sample is in the package rapidocr (3.10 or newer); {INSTALL}, "
            "or give weight files of your own"
        )
    return files


def weight_files(path: Path) -> list[Path]:
    """List the weight files that a path stands for."""
    if path.is_dir():
        files = sorted(
            file for file in path.rglob("*") if file.suffix.lower() in READERS and file.is_file()
        )
        if not files:
            raise WeightsError(f"{path}: no {' or '.join(READERS)} files in this folder")
        return files
    if not path.exists():
        raise WeightsError(f"{path}: no such file or folder; check the path")
    if path.suffix.lower() not in READERS:
        raise WeightsError(
            f"{path}: unknown type {path.suffix!r}; save the weights as {' or '.join(READERS)}"
        )
    return [path]


def file_labels(files: list[Path]) -> dict[Path, str]:
    """Name the files as shortly as keeps them apart, without the path that they share."""
    if len(files) < 2:
        return dict.fromkeys(files, "")
    shared = os.path.commonpath([file.absolute().parent for file in files])
    labels = {file: file.absolute().relative_to(shared) for file in files}
    stems = {file: label.with_suffix("").as_posix() for file, label in labels.items()}
    if len(set(stems.values())) == len(stems):
        return stems
    return {file: label.as_posix() for file, label in labels.items()}


def tensors_of(path: Path, labels: Mapping[Path, str]) -> Iterator[Weight]:
    """Yield the tensors of a file, weights or not, under names that begin with its label."""
    try:
        for tensor in READERS[path.suffix.lower()](path):
            name = ":".join(part for part in (labels[path], tensor.name) if part) or path.stem
            yield replace(tensor, name=name)
    except ModuleNotFoundError as error:
        raise WeightsError(f"{path}: reading it needs {error.name}; {INSTALL}") from error
    except Exception as error:
        raise WeightsError(
            f"{path}: not a sound {path.suffix.lower()} file ({first_line(error)}); save it again"
        ) from error


def apart(tensors: Iterable[Weight]) -> list[Weight]:
    """Number the tensors that share a name, as those of subgraphs may."""
    seen: Counter[str] = Counter()
    named = []
    for tensor in tensors:
        seen[tensor.name] += 1
        count = seen[tensor.name]
        named.append(replace(tensor, name=f"{tensor.name} ({count})") if count > 1 else tensor)
    return named


def without_weights(found: Iterable[Weight]) -> str:
    """Say why none of the tensors of a path is a weight that can be read."""
    skipped = [tensor for tensor in found if tensor.is_weight]
    if skipped:
        counts = Counter(tensor.reason for tensor in skipped)
        reasons = "; ".join(f"{count} {reason}" for reason, count in counts.most_common(3))
        return f"none of its {len(skipped)} weights can be read: {reasons}; {SAVE}"
    floats = [tensor for tensor in found if tensor.dtype in FLOATS]
    if floats:
        return (
            f"none of its {len(floats)} float arrays is a weight, of rank 2 or more and used by a "
            "layer; give files that hold weights"
        )
    return f"no float arrays in it; {SAVE}"


SAVE = "save the weights as float16, float32, float64 or bfloat16"
FLOATS = {"float16", "bfloat16", "float32", "float64", "float80", "float96", "float128"}


def without_graph(
    name: str, shape: tuple[int, ...], dtype: str, read: Callable[[], np.ndarray]
) -> Weight:
    """Judge a tensor by its type and shape alone: a weight has rank 2 or more, channels first."""
    tensor = Weight(name, shape, dtype, 0, read)
    if len(shape) < 2:
        return replace(tensor, channel_axis=None, reason=f"of rank {len(shape)}", is_weight=False)
    if tensor.size == 0:
        return replace(tensor, channel_axis=None, reason="empty", is_weight=False)
    if dtype not in FLOATS:
        small_float = dtype.startswith("float") or dtype == SMALL_IN_NUMPY
        reason = not_read(dtype) if small_float else f"of type {dtype}, which is no float"
        return replace(tensor, channel_axis=None, reason=reason, is_weight=small_float)
    return tensor


def not_read(dtype: str) -> str:
    return f"of type {dtype}, which is not read"


def channel_rows(array: Any, channel_axis: Axis) -> Any:
    """Lay a weight out as (channels, elements of a channel).

    Parameters
    ----------
    array : ndarray
        The weight.
    channel_axis : int, tuple of int or None
        As that of Weight.

    Returns
    -------
    ndarray
        A view where that is possible.
    """
    axes = () if channel_axis is None else np.atleast_1d(channel_axis).tolist()
    moved = np.moveaxis(array, axes, range(len(axes)))
    return moved.reshape(math.prod(moved.shape[: len(axes)]), -1)


def native_float(array: np.ndarray) -> np.ndarray:
    """Return the array in the native float type that holds its values, a copy only if need be."""
    array = np.asarray(array)
    if array.dtype == BFLOAT16_IN_NUMPY:
        array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if array.dtype.name == "bfloat16":
        return array.astype(np.float32)
    return array.astype(f"f{min(array.dtype.itemsize, 8)}", copy=False)


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


# NumPy's files have no name for the types of ml_dtypes: they hold void elements of the same size.
# Those of two bytes are bfloat16; of one byte there are several types, and which is not told.
BFLOAT16_IN_NUMPY = np.dtype("V2")
SMALL_IN_NUMPY = "void8 (float8 or int4 of ml_dtypes)"


def numpy_dtype_name(dtype: np.dtype) -> str:
    """Name the type of an array in a file of NumPy."""
    if dtype == BFLOAT16_IN_NUMPY:
        return "bfloat16"
    if dtype == np.dtype("V1"):
        return SMALL_IN_NUMPY
    return dtype.name


def read_npy(path: Path) -> Iterator[Weight]:
    with path.open("rb") as stream:
        shape, dtype = npy_header(stream)
    read = partial(np.load, path, mmap_mode="r")
    tensor = without_graph("", shape, dtype, read)
    if is_listed(tensor):
        if not tensor.reason:
            read()  # Mapped now, too, so that a truncated file is found before any work is done.
        yield tensor


def read_npz(path: Path) -> Iterator[Weight]:
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.namelist() if member.endswith(".npy")]
        for member, count in Counter(members).items():
            if count > 1:
                raise ValueError(f"{count} members are named {member!r}")
            with archive.open(member) as stream:
                shape, dtype = npy_header(stream)
            read = partial(load_npz_member, path, member)
            name = member.removesuffix(".npy")
            tensor = without_graph(name, shape, dtype, read)
            if is_listed(tensor):
                yield tensor


def load_npz_member(path: Path, member: str) -> np.ndarray:
    # Not by numpy.load: it takes 'a.npy' for the name of an array 'a' where there are both.
    with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
        return np.lib.format.read_array(stream)


def is_listed(tensor: Weight) -> bool:
    """Whether to list a tensor of a file without a graph: one that is a float or might be one."""
    return tensor.dtype in FLOATS or tensor.is_weight or len(tensor.shape) >= 2


def npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], str]:
    """Read the shape and the name of the dtype of a `.npy` stream."""
    version = np.lib.format.read_magic(stream)
    start = stream.tell()
    try:
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        else:  # version 3 differs in the encoding of field names alone: no float array has any
            shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    except ValueError as error:
        if "'<f1'" not in str(error):
            raise
        # NumPy writes this for float8_e5m2 of ml_dtypes, but does not read it.
        stream.seek(start)
        length = int.from_bytes(stream.read(2 if version == (1, 0) else 4), "little")
        return ast.literal_eval(stream.read(length).decode("latin1"))["shape"], "float8_e5m2"
    return shape, numpy_dtype_name(dtype)


SAFETENSORS_DTYPES = {
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
"""What the names of types in a safetensors file stand for."""


def read_safetensors(path: Path) -> Iterator[Weight]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        names = file.keys()
        for name in names:
            header = file.get_slice(name)
            stored = header.get_dtype()
            if stored == "BF16":
                import ml_dtypes  # noqa: F401  (gives NumPy the type that safetensors asks it for)
            dtype = SAFETENSORS_DTYPES.get(stored, stored.lower())
            read = partial(load_safetensor, path, name)
            tensor = without_graph(name, tuple(header.get_shape()), dtype, read)
            if is_listed(tensor):
                yield tensor


def load_safetensor(path: Path, name: str) -> np.ndarray:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return file.get_tensor(name)


def read_onnx(path: Path) -> Iterator[Weight]:
    import onnx
    import onnx.inliner

    with (
        path.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as buffer,
    ):
        model = onnx.ModelProto.FromString(outline(buffer, 0, len(buffer), MODEL))
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    for tensor in graph_tensors(model.graph, model.opset_import):
        weight = of_graph(tensor, path)
        if weight is not None:
            if not weight.reason:
                check_external_data(tensor.proto, path)
            yield weight


def of_graph(tensor: StoredTensor, path: Path) -> Weight | None:
    """Judge a stored tensor by what the graph does with it; None if it can be no weight."""
    import onnx

    kind = tensor.proto.data_type
    claim = tensor.weight or (None if tensor.obstacle else tensor.table)
    if kind in ONNX_OTHERS or (kind not in ONNX_FLOATS and not (claim or tensor.obstacle)):
        return None
    dtype = onnx.TensorProto.DataType.Name(kind).lower()
    dtype = {"float": "float32", "double": "float64"}.get(dtype, dtype)
    shape, axis = claim or (tensor.dims, None)
    weight = Weight(tensor.name, shape, dtype, axis, partial(load_onnx_tensor, path, tensor.proto))
    if math.prod(tensor.dims) == 0:
        return replace(weight, reason="empty", is_weight=False)
    if not claim and tensor.obstacle:
        return replace(weight, reason=tensor.obstacle)
    if not claim or len(shape) < 2:
        uses = ", ".join(tensor.uses[:3]) + (", ..." if len(tensor.uses) > 3 else "")
        reason = f"used as {uses}" if uses else "used by no operator"
        return replace(weight, channel_axis=None, reason=reason, is_weight=False)
    if tensor.sparse:
        return replace(weight, reason="stored as a sparse tensor, which is not read")
    if kind not in ONNX_FLOATS:
        return replace(weight, reason=not_read(dtype))
    return weight


def check_external_data(proto: Any, path: Path) -> None:
    """Raise an exception if the data of a tensor is in a file that is missing or cut off."""
    data = {entry.key: entry.value for entry in proto.external_data}
    if "location" not in data:
        return
    file = path.parent / data["location"]
    if not file.is_file():
        raise FileNotFoundError(f"{proto.name}: its data is missing: {data['location']}")
    itemsize = np.dtype(ONNX_FLOATS[proto.data_type]).itemsize
    end = int(data.get("offset", 0)) + math.prod(proto.dims) * itemsize
    if file.stat().st_size < end:
        raise ValueError(f"{proto.name}: its data is cut off: {data['location']}")


def load_onnx_tensor(path: Path, proto: Any) -> np.ndarray:
    import onnx

    data = {entry.key: entry.value for entry in proto.external_data}
    if not data or "location" in data:
        copy = (
            onnx.TensorProto()
        )  # releases of onnx before 1.23 leave the data they read in the proto
        copy.CopyFrom(proto)
        return onnx.numpy_helper.to_array(copy, str(path.parent))
    shape, dtype = tuple(proto.dims), np.dtype(ONNX_FLOATS[proto.data_type])
    if int(data["length"]) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{data['length']} bytes do not make an array of shape {shape}")
    array = np.memmap(path, dtype, "r", int(data["offset"]), shape)
    if dtype.kind == "u":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array


READERS: dict[str, Callable[[Path], Iterator[Weight]]] = {
    ".npy": read_npy,
    ".npz": read_npz,
    ".safetensors": read_safetensors,
    ".onnx": read_onnx,
}

# How the float types of onnx.TensorProto lie in a file; bfloat16 is the upper half of a float32.
ONNX_FLOATS = {1: "<f4", 10: "<f2", 11: "<f8", 16: "<u2"}
# Types that no weight has: none; int32, int64, string, bool; complex and unsigned ones of 32 bits
# and more. All others are floats or integers of a few bits.
ONNX_OTHERS = {0, 6, 7, 8, 9, 12, 13, 14, 15}

# Which fields of the protobuf messages of an ONNX file lead to tensor data, by field number.
DATA = object()
TENSOR = {4: DATA, 9: DATA, 10: DATA}  # float_data, raw_data, double_data
GRAPH: dict[int, Any] = {5: TENSOR}  # initializer
ATTRIBUTE = {5: TENSOR, 6: GRAPH, 11: GRAPH}  # t, g, graphs
NODE = {5: ATTRIBUTE}  # attribute
GRAPH[1] = NODE  # node
MODEL = {7: GRAPH, 25: {7: NODE}}  # graph, functions and their nodes
SMALL = 1024  # bytes of data that are not worth a reference


def outline(buffer: mmap.mmap, at: int, end: int, message: Mapping[int, Any]) -> bytes:
    """Copy a protobuf message without the data of its tensors.

    The data is replaced by `external_data` without a location: an offset into the same file and a
    length. So a model of any size is parsed in the memory of its graph alone.
    """
    import onnx

    kept = bytearray()
    while at < end:
        start = at
        key, at = varint(buffer, at)
        number, wire_type = divmod(key, 8)
        body = at
        if wire_type == 0:
            _, at = varint(buffer, at)
        elif wire_type == 2:
            length, body = varint(buffer, at)
            at = body + length
        elif wire_type in {1, 5}:
            at += 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"protobuf wire type {wire_type} at byte {start}")
        if at > end:
            raise ValueError(f"cut off: the field at byte {start} ends after its message")
        part = message.get(number) if wire_type == 2 else None
        if part is None or (part is DATA and length < SMALL):
            kept += buffer[start:at]
        elif part is DATA:
            reference = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
            reference.external_data.add(key="offset", value=str(body))
            reference.external_data.add(key="length", value=str(length))
            kept += reference.SerializeToString()
        else:
            inner = outline(buffer, body, at, part)
            kept += encode_varint(key) + encode_varint(len(inner)) + inner
    return bytes(kept)


def varint(buffer: mmap.mmap, at: int) -> tuple[int, int]:
    """Decode a protobuf varint; return its value and the position after it."""
    value = shift = 0
    while shift < 64:
        byte = buffer[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError(f"no protobuf varint at byte {at}")


def encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
