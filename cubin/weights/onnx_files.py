"""Tensors of `.onnx` files: a graph that says what they are, and data that is mapped."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cubin.weights.onnx_graph import StoredTensor, graph_tensors
from cubin.weights.tensor import BFLOAT16_IN_NUMPY, Cut, Weight, not_read


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
    weight = Weight(
        tensor.name, shape, dtype, axis, partial(load_onnx_tensor, path, tensor.proto, shape)
    )
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
    file = external_file(path, data)
    if not file.is_file():
        raise FileNotFoundError(f"{proto.name}: its data is missing: {data['location']}")
    itemsize = ONNX_FLOATS[proto.data_type].itemsize
    end = int(data.get("offset", 0)) + math.prod(proto.dims) * itemsize
    if file.stat().st_size < end:
        raise ValueError(f"{proto.name}: its data is cut off: {data['location']}")


def load_onnx_tensor(path: Path, proto: Any, shape: tuple[int, ...], cut: Cut) -> np.ndarray:
    """Read a part of a tensor, in the shape that its channels need."""
    import onnx

    data = {entry.key: entry.value for entry in proto.external_data}
    if not data:
        return onnx.numpy_helper.to_array(proto).reshape(shape)[cut]
    dtype = ONNX_FLOATS[proto.data_type]
    nbytes = math.prod(proto.dims) * dtype.itemsize
    file, offset = external_file(path, data), int(data.get("offset", 0))
    length = int(data.get("length", nbytes))
    if length != nbytes:
        raise ValueError(f"{length} bytes do not make an array of shape {tuple(proto.dims)}")
    return np.memmap(file, dtype, "r", offset, shape)[cut]


def external_file(path: Path, data: Mapping[str, str]) -> Path:
    """The file that holds the data of a tensor: its own, or one in the same folder or below."""
    if "location" not in data:
        return path
    folder = path.parent.resolve()
    file = Path(os.path.normpath(folder / data["location"]))
    if not file.is_relative_to(folder):
        raise ValueError(f"its data lies outside its folder: {data['location']}")
    return file


# How the float types of onnx.TensorProto lie in a file.
ONNX_FLOATS: dict[int, np.dtype] = {
    1: np.dtype("<f4"),
    10: np.dtype("<f2"),
    11: np.dtype("<f8"),
    16: BFLOAT16_IN_NUMPY,
}
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
