"""Pretrained weights on disk, read one tensor at a time.

`Weights(paths)` reads headers and graphs only: the name, shape and channel axis of every weight
tensor are known before its data is touched. Iterating loads the tensors one by one.
"""

from __future__ import annotations

import importlib.util
import math
import mmap
import os
import zipfile
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

INSTALL = "install the extra `examples`: pip install '.[examples]'"


class WeightsError(Exception):
    """A path that gives no usable weights; the message is one line and says what to do."""


@dataclass(frozen=True)
class Weight:
    """A float tensor on disk.

    Attributes
    ----------
    name : str
        Its name in the file; with several files, preceded by the file's.
    shape : tuple of int
        Its shape.
    channel_axis : int or None
        The output-channel axis of the operator that uses it as its weight; 0 in a file without a
        graph; None if the graph has no such operator.
    read : callable
        Returns the data as stored.
    """

    name: str
    shape: tuple[int, ...]
    channel_axis: int | None
    read: Callable[[], np.ndarray] = field(repr=False, compare=False)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_weight(self) -> bool:
        """Whether it has elements and is more than a bias, a norm vector or a constant."""
        return self.channel_axis is not None and len(self.shape) >= 2 and self.size > 0

    def load(self) -> np.ndarray:
        """Read the data as float16, float32 or float64 (bfloat16 becomes float32).

        Returns
        -------
        ndarray
            The tensor; read-only where it is a view of the file.

        Raises
        ------
        WeightsError
            If the data cannot be read, or holds NaN or infinity.
        """
        try:
            array = native_float(self.read())
        except Exception as error:
            raise WeightsError(
                f"{self.name}: cannot read the data ({first_line(error)})"
            ) from error
        # The extremes carry every NaN and infinity, and need no array of flags.
        if not (np.isfinite(array.min()) and np.isfinite(array.max())):
            bad = array.size - np.count_nonzero(np.isfinite(array))
            raise WeightsError(
                f"{self.name}: {bad} of {array.size} values are NaN or infinite; "
                "repair the tensor or leave its file out"
            )
        return array


class Weights:
    """The float weight tensors of files and folders.

    In files with a graph (ONNX) a weight is what an operator uses as its weight; in the others,
    every float tensor of rank 2 or more. Biases, norm vectors and other constants are left out.

    Parameters
    ----------
    paths : iterable of path-like
        `.npy`, `.npz`, `.safetensors` and `.onnx` files, and folders, which are searched for
        these at any depth.

    Attributes
    ----------
    tensors : list of Weight
        The weights in the order of their files, not loaded yet.
    left_out : int
        Number of float tensors in the files that are not weights.

    Raises
    ------
    WeightsError
        If a path does not exist, has an unknown type, needs a package that is not installed,
        cannot be read, or holds no float weights.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        files = {Path(path): weight_files(Path(path)) for path in paths}
        labels = file_labels([file for group in files.values() for file in group])
        self.tensors: list[Weight] = []
        self.left_out = 0
        for path, group in files.items():
            found = [tensor for file in group for tensor in float_tensors(file, labels[file])]
            weights = [tensor for tensor in found if tensor.is_weight]
            if not weights:
                raise WeightsError(
                    f"{path}: none of its {len(found)} float arrays is a weight, of rank 2 or more "
                    "and used by a layer; give files that hold weights"
                    if found
                    else f"{path}: no float arrays in it; save the weights as float16, float32, "
                    "float64 or bfloat16"
                )
            self.tensors += weights
            self.left_out += len(found) - len(weights)

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[tuple[str, np.ndarray, int | None]]:
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


def float_tensors(path: Path, label: str = "") -> Iterator[Weight]:
    """Yield the float tensors of a file, weights or not, under names that begin with the label."""
    try:
        for name, shape, channel_axis, read in READERS[path.suffix.lower()](path):
            name = ":".join(part for part in (label, name) if part) or path.stem
            yield Weight(name, shape, channel_axis, read)
    except ModuleNotFoundError as error:
        raise WeightsError(f"{path}: reading it needs {error.name}; {INSTALL}") from error
    except Exception as error:
        raise WeightsError(
            f"{path}: not a sound {path.suffix.lower()} file ({first_line(error)}); save it again"
        ) from error


def native_float(array: np.ndarray) -> np.ndarray:
    """Return the array in the native float type that holds its values, a copy only if need be."""
    array = np.asarray(array)
    if array.dtype.name == "bfloat16":
        return array.astype(np.float32)
    return array.astype(f"f{min(array.dtype.itemsize, 8)}", copy=False)


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


Found = Iterator[tuple[str, tuple[int, ...], int | None, Callable[[], np.ndarray]]]


def read_npy(path: Path) -> Found:
    with path.open("rb") as stream:
        shape, dtype = npy_header(stream)
    if dtype.kind == "f":
        # Mapped now, too, so that a truncated file is found before any work is done.
        np.load(path, mmap_mode="r")
        yield "", shape, 0, partial(np.load, path, mmap_mode="r")


def read_npz(path: Path) -> Found:
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            if not member.endswith(".npy"):
                continue
            with archive.open(member) as stream:
                shape, dtype = npy_header(stream)
            if dtype.kind == "f":
                name = member.removesuffix(".npy")
                yield name, shape, 0, partial(load_npz_member, path, name)


def load_npz_member(path: Path, name: str) -> np.ndarray:
    with np.load(path) as archive:
        return archive[name]


def npy_header(stream: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Read the shape and dtype of a `.npy` stream."""
    if np.lib.format.read_magic(stream) == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    else:  # version 3 differs in the encoding of field names alone: no float array has any
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    return shape, dtype


def read_safetensors(path: Path) -> Found:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        names = file.keys()
        for name in names:
            header = file.get_slice(name)
            if header.get_dtype() == "BF16":
                import ml_dtypes  # noqa: F401  (gives NumPy the type that safetensors asks it for)
            if header.get_dtype() in {"F16", "BF16", "F32", "F64"}:
                shape = tuple(header.get_shape())
                yield name, shape, 0, partial(load_safetensor, path, name)


def load_safetensor(path: Path, name: str) -> np.ndarray:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return file.get_tensor(name)


def read_onnx(path: Path) -> Found:
    import onnx
    import onnx.inliner

    with (
        path.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as buffer,
    ):
        model = onnx.ModelProto.FromString(outline(buffer, 0, len(buffer), MODEL))
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    for tensor in graph_tensors(model.graph, ChainMap()):
        if tensor.proto.data_type in ONNX_FLOATS:
            shape = tuple(tensor.proto.dims)
            read = partial(load_onnx_tensor, path, tensor.proto)
            yield tensor.name, shape, tensor.channel_axis, read


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


READERS: dict[str, Callable[[Path], Found]] = {
    ".npy": read_npy,
    ".npz": read_npz,
    ".safetensors": read_safetensors,
    ".onnx": read_onnx,
}

# How the float types of onnx.TensorProto lie in a file; bfloat16 is the upper half of a float32.
ONNX_FLOATS = {1: "<f4", 10: "<f2", 11: "<f8", 16: "<u2"}

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


@dataclass
class GraphTensor:
    """A tensor stored in a graph, and its output-channel axis once an operator has claimed it."""

    name: str
    proto: Any
    channel_axis: int | None = None


# A name in a graph that stands for a stored tensor, and the axes of the tensor that its own are.
Scope = ChainMap[str, tuple[GraphTensor, tuple[int, ...]]]

SAME_AXES = {"Identity", "Cast", "QuantizeLinear", "DequantizeLinear"}


def graph_tensors(graph: Any, outer: Scope) -> list[GraphTensor]:
    """Collect the tensors stored in a graph and its subgraphs, with their channel axes."""
    import onnx

    scope = outer.new_child()
    tensors: list[GraphTensor] = []

    def store(name: str, proto: Any) -> None:
        tensors.append(GraphTensor(name, proto))
        scope[name] = tensors[-1], tuple(range(len(proto.dims)))

    for proto in graph.initializer:
        store(proto.name, proto)
    for node in graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant" and "value" in attributes:
            store(node.output[0], attributes["value"])
        for position, name in enumerate(node.input):
            tensor, axes = scope.get(name, (None, ()))
            if tensor is not None and tensor.channel_axis is None and len(axes) >= 2:
                axis = output_axis(node.op_type, position, attributes)
                tensor.channel_axis = None if axis is None else axes[axis]
        if node.input and node.input[0] in scope:
            tensor, axes = scope[node.input[0]]
            if node.op_type in SAME_AXES:
                scope[node.output[0]] = tensor, axes
            elif node.op_type == "Transpose":
                order = attributes.get("perm", range(len(axes))[::-1])
                scope[node.output[0]] = tensor, tuple(axes[axis] for axis in order)
        for value in attributes.values():
            for subgraph in value if isinstance(value, list) else [value]:
                if isinstance(subgraph, onnx.GraphProto):
                    tensors += graph_tensors(subgraph, scope)
    return tensors


def output_axis(operator: str, position: int, attributes: Mapping[str, Any]) -> int | None:
    """Tell the axis of an operator's input that holds the output channels; None if no weight."""
    match operator, position:
        case "Conv", 1:
            return 0
        case "ConvTranspose", 1:
            # (in, out / group, ...): of a depthwise one, the input channels are the output's.
            return 0 if attributes.get("group", 1) > 1 else 1
        case "MatMul", (0 | 1):
            return -2 if position == 0 else -1
        case "Gemm", 1:
            return 0 if attributes.get("transB", 0) else 1
        case "Gather", 0:
            return attributes.get("axis", 0)
        case (("LSTM" | "GRU" | "RNN"), (1 | 2)):
            return 1  # (directions, gates x hidden, in)
    return None
