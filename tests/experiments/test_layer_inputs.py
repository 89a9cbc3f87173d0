"""The inputs of layers: what a layer makes of them is what the network says itself."""

from __future__ import annotations

import importlib.util
import sys

import drawn_text
import layer_inputs
import numpy as np
import onnx
import pytest
from command_line import pretrained_sample

from cubin.commands.arguments import UsageError
from cubin.weights import Weights, channel_rows
from tests.required import require

with_runtime = pytest.mark.usefixtures("runtime")


@pytest.fixture
def runtime():
    require("onnxruntime")


@pytest.fixture
def network(tmp_path):
    """A file with a layer of each kind, and some that are left out."""
    rng = np.random.default_rng(0)
    shapes = {
        "conv": (6, 3, 3, 2), "bias": (6,), "depthwise": (6, 1, 3, 3), "dilated": (4, 6, 3, 3),
        "gemm": (5, 4), "product": (5, 7), "unused": (3, 3),
    }  # fmt: skip
    stored = [
        onnx.numpy_helper.from_array(rng.standard_normal(shape, np.float32), name)
        for name, shape in shapes.items()
    ]
    make = onnx.helper.make_node
    constant = make("Constant", [], ["last"], value=onnx.numpy_helper.from_array(
        rng.standard_normal((7, 2), np.float32)))  # fmt: skip
    nodes = [
        make("Conv", ["x", "conv", "bias"], ["a"], kernel_shape=[3, 2], strides=[2, 1],
             pads=[1, 0, 0, 1]),
        make("Relu", ["a"], ["b"]),
        make("Conv", ["b", "depthwise"], ["c"], kernel_shape=[3, 3], group=6),
        make("Conv", ["c", "dilated"], ["d"], kernel_shape=[3, 3], dilations=[2, 1]),
        make("GlobalAveragePool", ["d"], ["e"]),
        make("Flatten", ["e"], ["f"]),
        make("Gemm", ["f", "gemm"], ["g"], transB=1),
        make("MatMul", ["g", "product"], ["h"]),
        constant,
        make("MatMul", ["h", "last"], ["y"]),
    ]  # fmt: skip
    graph = onnx.helper.make_graph(
        nodes, "network",
        [onnx.helper.make_tensor_value_info("x", 1, ["batch", 3, 16, 12])],
        [onnx.helper.make_tensor_value_info("y", 1, None)], stored,
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.save(model, tmp_path / "network.onnx")
    return tmp_path / "network.onnx"


def moments(path, batches):
    """The mean outer products of the outputs of each layer by its weight, without the biases."""
    model = onnx.load(path)
    biases = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    bias_of = {n.output[0]: biases[n.input[2]] for n in model.graph.node
               if n.op_type in ("Conv", "Gemm") and len(n.input) == 3}  # fmt: skip
    found = layer_inputs.layers(model)
    outputs = {layer.weight: [] for layer in found}
    for values in layer_inputs.values(model, [layer.outputs for layer in found], batches):
        for layer in found:
            y = values[layer.outputs].astype(np.float64)
            if layer.operator == "Conv":
                y = np.moveaxis(y, 1, -1)
            outputs[layer.weight].append(y.reshape(-1, y.shape[-1]) - bias_of.get(layer.outputs, 0))
    joined = {name: np.concatenate(parts) for name, parts in outputs.items()}
    return {name: y.T @ y / len(y) for name, y in joined.items()}


def assert_same_outputs(path, batches):
    """W H W^T is the mean outer product of what the network makes of its inputs."""
    grams = {name: seen.gram for name, seen in layer_inputs.seen(path, batches).items()}
    expected = moments(path, batches)
    checked = set()
    for weight in Weights([path]).tensors:
        if weight.name in grams:
            w = channel_rows(weight.load(), weight.channel_axis).astype(np.float64)
            found = w @ grams[weight.name].matrix @ w.T
            scale = np.abs(expected[weight.name]).max()
            np.testing.assert_allclose(found, expected[weight.name], atol=1e-4 * scale)
            checked.add(weight.name)
    assert checked == set(grams)
    return grams


def test_layers_are_those_whose_channels_share_their_inputs(network):
    found = layer_inputs.layers(onnx.load(network))
    assert [layer.weight for layer in found] == ["conv", "gemm", "product", "last"]
    assert [layer.operator for layer in found] == ["Conv", "Gemm", "MatMul", "MatMul"]


@with_runtime
def test_weights_times_inputs_are_the_outputs(network):
    rng = np.random.default_rng(1)
    batches = [rng.standard_normal((size, 3, 16, 12), np.float32) for size in (2, 1)]
    grams = assert_same_outputs(network, batches)
    assert {name: gram.n for name, gram in grams.items()} == {
        "conv": 18, "gemm": 4, "product": 5, "last": 7,
    }  # fmt: skip
    assert grams["conv"].count == 3 * 8 * 12
    assert grams["gemm"].count == 3


@with_runtime
def test_shared_weights_have_the_inputs_of_all_layers(tmp_path):
    make = onnx.helper.make_node
    w = np.random.default_rng(2).standard_normal((4, 4), np.float32)
    graph = onnx.helper.make_graph(
        [make("MatMul", ["x", "w"], ["a"]), make("MatMul", ["a", "w"], ["y"])], "twice",
        [onnx.helper.make_tensor_value_info("x", 1, [3, 4])],
        [onnx.helper.make_tensor_value_info("y", 1, [3, 4])],
        [onnx.numpy_helper.from_array(w, "w")],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.save(model, tmp_path / "twice.onnx")
    x = np.random.default_rng(3).standard_normal((3, 4), np.float32)
    seen = layer_inputs.seen(tmp_path / "twice.onnx", [x])["w"]
    every = np.concatenate([x, x @ w]).astype(np.float64)
    np.testing.assert_allclose(seen.gram.matrix, every.T @ every / 6, rtol=1e-5)
    np.testing.assert_allclose(seen.total, every.sum(axis=0), rtol=1e-5)


@with_runtime
def test_inputs_less_their_mean_are_those_of_centred_outputs(network):
    x = np.random.default_rng(5).standard_normal((2, 3, 16, 12), np.float32) + 1
    model = onnx.load(network)
    found = layer_inputs.seen(network, [x])
    for layer in layer_inputs.layers(model):
        (values,) = layer_inputs.values(model, [layer.outputs], [x])
        y = values[layer.outputs].astype(np.float64)
        y = np.moveaxis(y, 1, -1) if layer.operator == "Conv" else y
        y = y.reshape(-1, y.shape[-1])
        tensor = next(t for t in Weights([network]).tensors if t.name == layer.weight)
        w = channel_rows(tensor.load(), tensor.channel_axis).astype(np.float64)
        centred = w @ found[layer.weight].centred().matrix @ w.T
        expected = np.cov(y.T, bias=True)
        np.testing.assert_allclose(centred, expected, atol=1e-4 * np.abs(expected).max())


def test_without_what_runs_networks_the_extra_is_named(network, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"onnxruntime.*'\.\[examples\]'"):
        layer_inputs.seen(network, [np.ones((1, 3, 16, 12), np.float32)])


def test_a_matrix_is_that_of_its_gram():
    x = np.random.default_rng(6).standard_normal((3, 5))  # of rank 3
    matrix = x.T @ x
    np.testing.assert_allclose(layer_inputs.gram_with(matrix).matrix, matrix, atol=1e-12)


@with_runtime
def test_a_pretrained_network():
    if importlib.util.find_spec("rapidocr") is None:
        pytest.skip("the package rapidocr is not installed")
    (path,) = (path for path in pretrained_sample() if "_cls_" in path.name)
    images = drawn_text.turned_lines(np.random.default_rng(4), 2)
    grams = assert_same_outputs(path, [images])
    assert len(grams) > 20


# ---------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("draw", "shape"),
    [
        (drawn_text.lines, (3, 48, 320)),
        (drawn_text.turned_lines, (3, 48, 192)),
        (drawn_text.pages, (3, 640, 640)),
    ],
)
def test_images_are_what_networks_take(draw, shape):
    images = draw(np.random.default_rng(0), 2)
    assert images.shape == (2, *shape)
    assert images.dtype == np.float32
    assert np.abs(images).max() <= 1
    # There is ink on each: the paper alone would hardly vary.
    assert min(image.std() for image in images) > 0.1
    np.testing.assert_array_equal(images, draw(np.random.default_rng(0), 2))
    assert np.abs(images - draw(np.random.default_rng(1), 2)).max() > 0.1


def test_every_other_line_is_upside_down():
    straight = drawn_text.lines(np.random.default_rng(0), 2, 192)
    turned = drawn_text.turned_lines(np.random.default_rng(0), 2)
    np.testing.assert_array_equal(turned[0], straight[0])
    np.testing.assert_array_equal(turned[1], straight[1][:, ::-1, ::-1])
