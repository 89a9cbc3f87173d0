"""The tensors stored in an ONNX graph: which are weights of an operator, and along which axes.

A stored tensor (an initializer or a Constant node) is followed through everything that only moves
elements to the operators that take it. `graph_tensors` tells for each whether one of them takes it
as its weight, which axes of the stored tensor hold the output channels, or what stands in between.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from cubin.weights.tensor import Axis

Splits = tuple[tuple[int, tuple[int, ...]], ...]


class Part(NamedTuple):
    """What an axis of a value holds of an axis of a stored tensor.

    Attributes
    ----------
    axis : int or None
        The axis of the stored tensor; None if of no axis.
    splits : tuple of (int, tuple of int), or None
        Empty for the whole axis. Each entry is a split that a reshape made: which piece of it, and
        the sizes of all pieces. None if elements are ordered in no such way.
    size : int
        The length along the value: shorter than the axis after a slice, longer after a Concat.
    """

    axis: int | None
    splits: Splits | None
    size: int

    def split(self, outer: int) -> list[Part]:
        """Take the part apart into an outer axis of the given length and an inner one."""
        sizes = (outer, self.size // outer)
        return [
            Part(self.axis, None if self.splits is None else (*self.splits, (piece, sizes)), size)
            for piece, size in enumerate(sizes)
        ]


@dataclass
class StoredTensor:
    """A tensor stored in a graph, and what the graph does with it.

    Attributes
    ----------
    name : str
    proto : onnx.TensorProto
        Its data.
    dims : tuple of int
        Its shape.
    weight : (tuple of int, Axis) or None
        Once an operator takes it as its weight: a shape in which the output channels are whole
        axes, and these axes. The shape is its own unless a reshape in the graph splits an axis that
        holds channels and something else.
    table : (tuple of int, Axis) or None
        The same of a Gather whose indices are constants, which may also move a weight.
    obstacle : str
        Why it is not known along which axes it is a weight, although an operator takes it as one.
    uses : list of str
        The inputs that take it otherwise.
    """

    name: str
    proto: Any
    dims: tuple[int, ...]
    sparse: bool = False
    weight: tuple[tuple[int, ...], Axis] | None = None
    table: tuple[tuple[int, ...], Axis] | None = None
    obstacle: str = ""
    uses: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Trace:
    """How the elements of a stored tensor lie in a value.

    Attributes
    ----------
    tensor : StoredTensor
    axes : tuple of tuple of Part
        What each axis of the value holds, outermost first.
    removed : tuple of Part
        What was left by taking a single index: each index holds a weight of its own.
    change : str
        The first operator that did more than to move elements; the axes say nothing then.
    """

    tensor: StoredTensor
    axes: tuple[tuple[Part, ...], ...]
    removed: tuple[Part, ...] = ()
    change: str = ""

    def resized(self, axis: int, size: int) -> Trace:
        """Follow a slice or a concatenation along an axis."""
        parts = self.axes[axis]
        if math.prod(part.size for part in parts) == size:
            return self
        if size == 1:
            new: tuple[Part, ...] = ()
            removed = (*self.removed, *parts)
        else:
            whole = parts[0] if len(parts) == 1 else Part(None, None if parts else (), size)
            new, removed = (whole._replace(size=size),), self.removed
        axes = (*self.axes[:axis], new, *self.axes[axis + 1 :])
        return replace(self, axes=axes, removed=removed)

    def reshaped(self, shape: Sequence[int]) -> Trace:
        """Follow a reshape: deal the parts out to the axes of another shape."""
        left = [part for parts in self.axes for part in parts]
        axes: list[tuple[Part, ...]] = []
        for length in shape:
            parts: list[Part] = []
            rest = length
            while rest > 1:
                part = left.pop(0)
                if rest % part.size == 0:
                    rest //= part.size
                elif part.size % rest == 0:
                    part, inner = part.split(rest)
                    left.insert(0, inner)
                    rest = 1
                else:  # Neither divides the other: from here on the axes are mixtures.
                    mixed = [(Part(None, None, size),) for size in shape[len(axes) :]]
                    return replace(self, axes=(*axes, *mixed))
                parts.append(part)
            axes.append(tuple(parts))
        return replace(self, axes=tuple(axes))

    def channels(self, axes: Iterable[int]) -> tuple[tuple[int, ...], Axis] | None:
        """Tell which axes of the stored tensor the given axes of the value hold.

        Returns
        -------
        (tuple of int, Axis) or None
            A shape of the stored tensor, with axes split where only a part of one is held, and
            the axes of it. None if there is none.
        """
        wanted = [*self.removed, *(part for axis in axes for part in self.axes[axis])]
        every = [*self.removed, *(part for parts in self.axes for part in parts)]
        if any(part.splits is None for part in wanted):
            return None
        shape: list[int] = []
        channels: list[int] = []
        for axis, size in enumerate(self.tensor.dims):
            mine = {part.splits for part in wanted if part.axis == axis}
            if covered((), mine):
                channels.append(len(shape))
            elif mine:
                pieces = split_axis((), size, {part.splits for part in every if part.axis == axis})
                if pieces is None:
                    return None
                channels += [
                    len(shape) + at for at, (piece, _) in enumerate(pieces) if piece in mine
                ]
                shape += [length for _, length in pieces]
                continue
            shape.append(size)
        # An axis of one index needs no scales of its own.
        channels = [axis for axis in channels if shape[axis] != 1] or channels[-1:]
        return tuple(shape), channels[0] if len(channels) == 1 else tuple(channels) or None


def covered(piece: Splits, pieces: set[Splits | None]) -> bool:
    """Whether pieces of an axis make up the whole of another piece."""
    if piece in pieces:
        return True
    sizes = next_split(piece, pieces)
    return sizes is not None and all(
        covered((*piece, (number, sizes)), pieces) for number in range(len(sizes))
    )


def split_axis(
    piece: Splits, size: int, pieces: set[Splits | None]
) -> list[tuple[Splits, int]] | None:
    """List the pieces that make up a piece, with their lengths; None if some are not known."""
    if piece in pieces:
        return [(piece, size)]
    sizes = next_split(piece, pieces)
    if sizes is None or math.prod(sizes) != size:
        return None
    inner_pieces = []
    for number, length in enumerate(sizes):
        inner = split_axis((*piece, (number, sizes)), length, pieces)
        if inner is None:
            return None
        inner_pieces += inner
    return inner_pieces


def next_split(piece: Splits, pieces: set[Splits | None]) -> tuple[int, ...] | None:
    """Give the sizes into which a piece is split further; None if it is not."""
    depth = len(piece)
    longer = (other for other in pieces if other is not None and len(other) > depth)
    return next((other[depth][1] for other in longer if other[:depth] == piece), None)


@dataclass(frozen=True)
class Value:
    """A value of the graph that is computed from stored tensors alone.

    Attributes
    ----------
    shape : tuple of int or None
        None where it is not known.
    traces : tuple of Trace
        The stored tensors in it.
    numbers : ndarray or None
        The value itself if it is of a few integers, such as a shape.
    """

    shape: tuple[int, ...] | None
    traces: tuple[Trace, ...] = ()
    numbers: np.ndarray | None = None

    def resized(self, axis: int, size: int) -> Value:
        shape = list(self.shape or ())
        shape[axis] = size
        kept = self.traces if size else ()
        traces = tuple(t if t.change else t.resized(axis % len(shape), size) for t in kept)
        return Value(tuple(shape), traces)

    def reshaped(self, shape: Sequence[int]) -> Value:
        traces = tuple(t if t.change else t.reshaped(shape) for t in self.traces)
        return Value(tuple(shape), traces)

    def transposed(self, order: Sequence[int]) -> Value:
        traces = tuple(
            t if t.change else replace(t, axes=tuple(t.axes[axis] for axis in order))
            for t in self.traces
        )
        return Value(tuple((self.shape or ())[axis] for axis in order), traces)


Scope = ChainMap[str, Value]

SAME_ELEMENTS = {"Identity", "Cast", "CastLike", "Dropout", "QuantizeLinear", "DequantizeLinear"}
INTEGERS = {6, 7}  # int32 and int64, of onnx.TensorProto: what shapes and indices are
FEW = 64  # integers: more are no shape and no index


def graph_tensors(graph: Any, opsets: Any, outer: Scope | None = None) -> list[StoredTensor]:
    """Collect the tensors stored in a graph and its subgraphs, and what takes them.

    Parameters
    ----------
    graph : onnx.GraphProto
    opsets : sequence of onnx.OperatorSetIdProto
        Those that the model imports.
    outer : Scope, optional
        The values of the graph around this one.

    Returns
    -------
    list of StoredTensor
        Initializers first, then Constant nodes in their order.
    """
    import onnx

    scope: Scope = (ChainMap() if outer is None else outer).new_child()
    tensors: list[StoredTensor] = []

    def store(name: str, proto: Any, dims: Iterable[int], sparse: bool = False) -> None:
        tensor = StoredTensor(name, proto, tuple(dims), sparse)
        tensors.append(tensor)
        axes = tuple((Part(axis, (), size),) for axis, size in enumerate(tensor.dims))
        traces = (Trace(tensor, axes),) if math.prod(tensor.dims) else ()
        scope[name] = Value(tensor.dims, traces, small_integers(tensor))

    for proto in graph.initializer:
        store(proto.name, proto, proto.dims)
    for proto in graph.sparse_initializer:
        store(proto.values.name, proto.values, proto.dims, sparse=True)
    for node in graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant":
            stored = constant(attributes)
            if stored is not None:
                store(node.output[0], *stored)
            continue
        inputs = [scope.get(name) if name else None for name in node.input]
        for position, value in enumerate(inputs):
            for trace in value.traces if value is not None else ():
                claim(node, position, attributes, inputs, trace)
        outputs = moved(node, attributes, inputs)
        if outputs is None:
            outputs = computed(node, attributes, inputs, opsets)
            note_uses(node, inputs, range(len(inputs)))
        elif node.op_type != "Concat":
            note_uses(node, inputs, range(1, len(inputs)))
        scope.update(zip(node.output, outputs, strict=False))
        for value in attributes.values():
            for subgraph in value if isinstance(value, list) else [value]:
                if isinstance(subgraph, onnx.GraphProto):
                    tensors += graph_tensors(subgraph, opsets, scope)
    for output in graph.output:
        for trace in scope[output.name].traces if output.name in scope else ():
            trace.tensor.uses.append("a graph output")
    return tensors


def constant(attributes: Mapping[str, Any]) -> tuple[Any, Sequence[int], bool] | None:
    """Give the data, the shape and the sparseness of a Constant node; None if it has no numbers."""
    from onnx import numpy_helper

    for kind, stored in attributes.items():
        if kind == "value":
            return stored, stored.dims, False
        if kind == "sparse_value":
            return stored.values, stored.dims, True
        if kind in {"value_float", "value_floats"}:
            array = np.array(stored, np.float32)
            return numpy_helper.from_array(array), array.shape, False
        if kind in {"value_int", "value_ints"}:
            array = np.array(stored, np.int64)
            return numpy_helper.from_array(array), array.shape, False
    return None


def small_integers(tensor: StoredTensor) -> np.ndarray | None:
    """Read a stored tensor of a few integers."""
    from onnx import numpy_helper

    few = len(tensor.dims) <= 1 and math.prod(tensor.dims) <= FEW
    if tensor.sparse or tensor.proto.external_data or not few:
        return None
    return numpy_helper.to_array(tensor.proto) if tensor.proto.data_type in INTEGERS else None


def claim(
    node: Any,
    position: int,
    attributes: Mapping[str, Any],
    inputs: Sequence[Value | None],
    trace: Trace,
) -> None:
    """Note that an operator takes a stored tensor as its weight, if it does."""
    tensor, operator = trace.tensor, node.op_type
    if trace.change:
        # How many axes it has is not known; whether it is a weight does not depend on it.
        if len(tensor.dims) >= 2 and channel_axes(node, position, attributes, 2) is not None:
            tensor.obstacle = f"{trace.change} stands between it and {operator}"
        return
    rank = len(trace.axes)
    axes = channel_axes(node, position, attributes, rank) if rank >= 2 else None
    if axes is None:
        return
    groups = attributes.get("group", 1)
    if operator == "ConvTranspose" and groups > 1:
        # (in, out / group, ...): an output channel is a group and an index of axis 1.
        sizes = [math.prod(part.size for part in parts) for parts in trace.axes]
        trace = trace.reshaped([groups, sizes[0] // groups, *sizes[1:]])
        axes = (0, 2)
    channels = trace.channels(axes)
    if channels is None:
        tensor.obstacle = f"the channels that {operator} sees are mixed with its other axes"
    elif operator == "Gather" and inputs[1] is not None:
        tensor.table = tensor.table or channels
    else:
        tensor.weight = tensor.weight or channels


def note_uses(node: Any, inputs: Sequence[Value | None], positions: Iterable[int]) -> None:
    for position in positions:
        value = inputs[position]
        for trace in value.traces if value is not None else ():
            use = f"input {position} of {node.op_type}"
            if use not in trace.tensor.uses:
                trace.tensor.uses.append(use)


def channel_axes(
    node: Any, position: int, attributes: Mapping[str, Any], rank: int
) -> tuple[int, ...] | None:
    """Tell the axes of an operator's input that hold the output channels; None if no weight.

    Where an input holds several matrices, each has output channels of its own: those of different
    directions of a recurrent layer, or of different batch indices of a product.

    Parameters
    ----------
    node : onnx.NodeProto
    position : int
        Which input.
    attributes : mapping
        The node's.
    rank : int
        The number of axes of the input, 2 or more.

    Returns
    -------
    tuple of int or None
    """

    def all_but(contracted: int) -> tuple[int, ...]:
        return tuple(axis for axis in range(rank) if axis != contracted)

    match node.op_type, position:
        case (("Conv" | "FusedConv" | "NhwcFusedConv" | "ConvInteger" | "DeformConv"), 1) | (
            "QLinearConv",
            3,
        ):
            return (0,)
        case "ConvTranspose", 1:
            return (1,)
        case (("MatMul" | "MatMulInteger" | "MatMulIntegerToFloat"), (0 | 1)):
            return all_but(rank - 1 if position == 0 else rank - 2)
        case (("DynamicQuantizeMatMul" | "MatMulNBits"), 1) | ("QLinearMatMul", 3):
            return all_but(rank - 2)
        case (("FusedMatMul" | "TransposeMatMul"), (0 | 1)):
            operand = "AB"[position]
            rows = 0 if attributes.get(f"transBatch{operand}", 0) else rank - 2
            transposed = bool(attributes.get(f"trans{operand}", 0))
            return all_but(rank - 1 if (position == 0) != transposed else rows)
        case (("Gemm" | "FusedGemm"), (0 | 1)):
            transposed = bool(attributes.get(f"trans{'AB'[position]}", 0))
            return all_but(int((position == 0) != transposed))
        case "Einsum", _:
            return einsum_channels(attributes["equation"].decode(), position, rank)
        case "Gather", 0:
            return (attributes.get("axis", 0) % rank,)
        case (("LSTM" | "GRU" | "RNN" | "DynamicQuantizeLSTM"), (1 | 2)):
            return (0, 1)  # (directions, gates x hidden, in)
        case (("Attention" | "QAttention"), 1) if node.domain == "com.microsoft":
            return (1,)  # (in, queries, keys and values)
        case "EmbedLayerNormalization", (2 | 3 | 4):
            return (0,)
    return None


def einsum_channels(equation: str, position: int, rank: int) -> tuple[int, ...] | None:
    """Tell the axes of an operand that the result keeps; None if the sum is over none of them."""
    operands, arrow, result = equation.replace(" ", "").partition("->")
    every = operands.replace(".", "").replace(",", "")
    if not arrow:
        result = "..." + "".join(label for label in every if every.count(label) == 1)
    labels = operands.split(",")[position]
    before, dots, after = labels.partition("...")
    covered_by_dots = ["..."] * (rank - len(before) - len(after) if dots else 0)
    kept = tuple(
        axis for axis, label in enumerate([*before, *covered_by_dots, *after]) if label in result
    )
    return kept if len(kept) < rank else None


def moved(
    node: Any, attributes: Mapping[str, Any], inputs: Sequence[Value | None]
) -> list[Value] | None:
    """Follow an operator that only moves elements.

    Returns
    -------
    list of Value or None
        Its outputs. None if it is no such operator, or how it moves them is not known.
    """
    value = inputs[0] if inputs else None
    if value is None or value.shape is None or value.numbers is not None:
        return None
    operator, shape, rank = node.op_type, value.shape, len(value.shape)

    def argument(position: int, name: str) -> list[int] | None:
        """Give an argument that is an attribute or an input, as it is by operator-set version."""
        if name in attributes:
            return list(attributes[name])
        value = inputs[position] if position < len(inputs) else None
        if value is None or value.numbers is None:
            return None
        return [int(number) for number in np.ravel(value.numbers)]

    def is_missing(position: int) -> bool:
        return position >= len(node.input) or not node.input[position]

    match operator:
        case _ if operator in SAME_ELEMENTS:
            return [value]
        case "Concat":
            others = [part for part in inputs if part is not None and part.shape is not None]
            if len(others) < len(inputs):
                return None
            axis = attributes["axis"]
            size = sum((part.shape or ())[axis] for part in others)
            parts = [part.resized(axis, size) for part in others]
            return [Value(parts[0].shape, tuple(t for part in parts for t in part.traces))]
        case "Transpose":
            return [value.transposed(attributes.get("perm", range(rank)[::-1]))]
        case "Flatten":
            axis = attributes.get("axis", 1)
            axis += rank if axis < 0 else 0
            return [value.reshaped([math.prod(shape[:axis]), math.prod(shape[axis:])])]
        case "Reshape":
            asked = argument(1, "shape")
            if asked is None:
                return None
            filled = full_shape(asked, shape, bool(attributes.get("allowzero", 0)))
            return [value.reshaped(filled)] if math.prod(filled) == math.prod(shape) else None
        case "Squeeze":
            axes = argument(1, "axes")
            if axes is None:
                if not is_missing(1):
                    return None
                axes = [axis for axis, size in enumerate(shape) if size == 1]
            gone = {axis % rank for axis in axes}
            return [value.reshaped([n for axis, n in enumerate(shape) if axis not in gone])]
        case "Unsqueeze":
            axes = argument(1, "axes")
            if axes is None:
                return None
            new = {axis % (rank + len(axes)) for axis in axes}
            kept = iter(shape)
            return [
                value.reshaped(
                    [1 if axis in new else next(kept) for axis in range(rank + len(axes))]
                )
            ]
        case "Slice":
            starts, ends = argument(1, "starts"), argument(2, "ends")
            axes, steps = argument(3, "axes"), argument(4, "steps")
            if starts is None or ends is None:
                return None
            if (axes is None and not is_missing(3)) or (steps is None and not is_missing(4)):
                return None
            axes = list(range(len(starts))) if axes is None else axes
            steps = [1] * len(starts) if steps is None else steps
            for axis, *bounds in zip(axes, starts, ends, steps, strict=True):
                value = value.resized(axis, len(range(shape[axis])[slice(*bounds)]))
            return [value]
        case "Split":
            axis, count = attributes.get("axis", 0), len(node.output)
            sizes = argument(1, "split")
            if sizes is None:
                if not is_missing(1):
                    return None
                chunk = -(-shape[axis] // count)
                sizes = [chunk] * (count - 1) + [shape[axis] - chunk * (count - 1)]
            return [value.resized(axis, size) for size in sizes]
        case "Gather":
            indices = inputs[1]
            if indices is None or indices.numbers is None:
                return None
            axis = attributes.get("axis", 0) % rank
            if indices.numbers.ndim:
                return [value.resized(axis, indices.numbers.size)]
            one = value.resized(axis, 1)
            return [one.reshaped([n for at, n in enumerate(shape) if at != axis])]
    return None


def full_shape(asked: Sequence[int], shape: Sequence[int], zeros_stay: bool) -> list[int]:
    """Fill in the zeros and the -1 of Reshape's argument."""
    filled = [n if n or zeros_stay else shape[axis] for axis, n in enumerate(asked)]
    known = math.prod(n for n in filled if n != -1)
    return [math.prod(shape) // max(known, 1) if n == -1 else n for n in filled]


# What shapes and indices are computed with.
ARITHMETIC = {
    *("Add", "Cast", "Concat", "Div", "Gather", "Identity", "Mul", "Reshape", "Slice", "Squeeze"),
    *("Sub", "Unsqueeze"),
}


def computed(
    node: Any, attributes: Mapping[str, Any], inputs: Sequence[Value | None], opsets: Any
) -> list[Value]:
    """Give the outputs of any other operator: known as far as its inputs are constants."""
    named = [value for name, value in zip(node.input, inputs, strict=True) if name]
    if not named:
        return []
    if node.op_type == "Shape" and inputs[0] is not None and inputs[0].shape is not None:
        shape = inputs[0].shape[slice(attributes.get("start"), attributes.get("end"))]
        return [Value((len(shape),), numbers=np.array(shape, np.int64))]
    constants = [value for value in named if value is not None]
    if len(constants) < len(named):
        return []
    if node.op_type == "ConstantOfShape" and constants[0].numbers is not None:
        return [Value(tuple(int(n) for n in constants[0].numbers))]
    numbers = [value.numbers for value in constants if value.numbers is not None]
    if node.op_type in ARITHMETIC and len(numbers) == len(named):
        return [evaluated(node, numbers, opsets)]
    traces = {
        id(trace.tensor): replace(trace, change=trace.change or node.op_type)
        for value in constants
        for trace in value.traces
    }
    return [Value(None, tuple(traces.values()))] * len(node.output)


def evaluated(node: Any, numbers: Sequence[np.ndarray], opsets: Any) -> Value:
    """Run one operator on a few integers."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    feeds = dict(zip((name for name in node.input if name), numbers, strict=True))
    described = [onnx.helper.make_tensor_value_info(name, 0, None) for name in feeds]
    outputs = [onnx.helper.make_tensor_value_info(node.output[0], 0, None)]
    graph = onnx.helper.make_graph([node], "node", described, outputs)
    model = onnx.helper.make_model(graph, opset_imports=opsets)
    try:
        computed: Any = ReferenceEvaluator(model).run(None, feeds)
        result = np.asarray(computed[0])
    except Exception:  # What onnx cannot compute is not known here either.
        return Value(None)
    return Value(result.shape, numbers=result)
