"""What the inputs of a network's layers are: their Gram matrices, of a network in an ONNX file.

A layer is a Conv, MatMul or Gemm whose weights are stored in the graph. Its inputs are taken while
onnxruntime runs the network: the graph is given them as outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from command_line import INSTALL
from numpy.lib.stride_tricks import sliding_window_view

import cubin
from cubin.commands.arguments import UsageError


@dataclass(frozen=True)
class Inputs:
    """The inputs of a layer, in the order of the elements of an output channel.

    Attributes
    ----------
    gram : Gram
        Their Gram matrix.
    total : array of float64, shape (n,)
        Their sum.
    """

    gram: cubin.Gram
    total: np.ndarray

    def __add__(self, other: Inputs) -> Inputs:
        return Inputs(self.gram + other.gram, self.total + other.total)

    def centred(self) -> cubin.Gram:
        """The Gram matrix of the inputs less their mean: of outputs whose biases are corrected."""
        mean = self.total / self.gram.count
        return gram_with(self.gram.matrix - np.outer(mean, mean))


def gram_with(matrix: np.ndarray) -> cubin.Gram:
    """The Gram matrix that is this one, symmetric and positive semidefinite."""
    values, directions = np.linalg.eigh(matrix)
    sizes = np.sqrt(np.maximum(values, 0) * len(matrix))
    return cubin.Gram(len(matrix)).add(np.ascontiguousarray((directions * sizes).T))


@dataclass(frozen=True)
class Layer:
    """A layer of a network.

    Attributes
    ----------
    operator : {"Conv", "MatMul", "Gemm"}
    weight, inputs, outputs : str
        The names of the values of the graph: the weights as they are stored, what is multiplied by
        them, and what the operator makes of both.
    attributes : mapping
        The operator's.
    """

    operator: str
    weight: str
    inputs: str
    outputs: str
    attributes: Mapping[str, Any]

    def seen(self, x: np.ndarray) -> Inputs:
        """What the layer sees of the value that it takes its inputs from."""
        if self.operator != "Conv":
            n = x.shape[-1]
            return Inputs(cubin.Gram(n).add(x), x.reshape(-1, n).sum(axis=0, dtype=np.float64))
        kernel = tuple(self.attributes["kernel_shape"])
        top, left, bottom, right = self.attributes.get("pads", (0, 0, 0, 0))
        padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
        down, along = self.attributes.get("strides", (1, 1))
        windows = sliding_window_view(padded, kernel, axis=(2, 3))[:, :, ::down, ::along]
        total = windows.sum(axis=(0, 2, 3), dtype=np.float64)
        return Inputs(cubin.Gram.of_conv(padded, kernel, (down, along)), total.ravel())


def layers(model: onnx.ModelProto) -> list[Layer]:
    """The layers of a network whose inputs are the same for all output channels.

    Convolutions with groups are none: each group has inputs of its own, which are few. Nor are
    dilated ones, those of another rank, and those that leave padding or kernel to be found out.
    """
    stored = {tensor.name for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type == "Constant":
            stored.add(node.output[0])
        if node.op_type not in ("Conv", "MatMul", "Gemm"):
            continue
        inputs, weight = node.input[:2]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        dense = (
            attributes.get("group", 1) == 1
            and set(attributes.get("dilations", (1,))) == {1}
            and attributes.get("auto_pad", b"NOTSET") == b"NOTSET"
            and not attributes.get("transA", 0)
            and (node.op_type != "Conv" or len(attributes.get("kernel_shape", ())) == 2)
        )
        if weight in stored and inputs not in stored and dense:
            found.append(Layer(node.op_type, weight, inputs, node.output[0], attributes))
    return found


def session(model: onnx.ModelProto) -> Any:
    """What runs a network: its `run` takes the names of outputs, and the inputs by name."""
    try:
        import onnxruntime
    except ImportError:
        raise UsageError(f"running networks needs the package onnxruntime; {INSTALL}") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def values(
    model: onnx.ModelProto, names: Iterable[str], batches: Iterable[np.ndarray]
) -> Iterator[dict[str, np.ndarray]]:
    """The values of these names in a network with one input, batch by batch."""
    wanted = sorted(set(names))
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    (given,) = (entry.name for entry in model.graph.input)
    known = {entry.name for entry in model.graph.output}
    extended.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in wanted if name not in known | {given}
    )
    running = session(extended)
    computed = [name for name in wanted if name != given]
    for batch in batches:
        found = running.run(computed, {given: batch})
        yield {given: batch, **dict(zip(computed, found, strict=True))}


def seen(path: Path, batches: Iterable[np.ndarray]) -> dict[str, Inputs]:
    """What the layers of a network see, by the names of their weights.

    Parameters
    ----------
    path : path
        The network's ONNX file.
    batches : iterable of array
        What the network is given.

    Returns
    -------
    dict of str to Inputs
        Weights that several layers share have the inputs of all.
    """
    model = onnx.load(path)
    found = layers(model)
    summed: dict[str, Inputs] = {}
    for known in values(model, (layer.inputs for layer in found), batches):
        for layer in found:
            inputs = layer.seen(known[layer.inputs])
            before = summed.get(layer.weight)
            summed[layer.weight] = inputs if before is None else before + inputs
    return summed
