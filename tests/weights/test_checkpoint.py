from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import safetensors.numpy
from onnx import TensorProto, helper, numpy_helper

from cubin.weights import Weights, WeightsError, channel_rows, checkpoint

ROOT = Path(__file__).resolve().parents[2]
FLOATS = ["float16", "float32", "float64"]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def loaded(*paths):
    return {name: (array, axis) for name, array, axis in Weights(paths)}


def model(nodes, initializers=(), **keywords):
    graph = helper.make_graph(nodes, "g", [], [], initializer=list(initializers))
    return helper.make_model(graph, **keywords)


def tensor(name, array):
    return numpy_helper.from_array(np.ascontiguousarray(array), name)


def axes(tmp_path, nodes, *initializers):
    path = tmp_path / "model.onnx"
    onnx.save(model(nodes, initializers), path)
    return {name: axis for name, (_, axis) in loaded(path).items()}


# .npy and .npz


@pytest.mark.parametrize("dtype", [*FLOATS, ">f4", "longdouble"])
def test_npy_gives_native_floats_on_axis_0(tmp_path, rng, dtype):
    array = rng.standard_normal((4, 5)).astype(dtype)
    np.save(tmp_path / "layer.npy", array)

    [(name, read, axis)] = Weights([tmp_path / "layer.npy"])

    np.testing.assert_array_equal(read, array.astype(read.dtype))
    assert (name, axis) == ("layer", 0)
    assert read.dtype.isnative
    assert read.dtype.name in FLOATS


@pytest.mark.parametrize(
    "layout", [np.asfortranarray, np.transpose, lambda x: x[::-1, ::2]], ids=["F", "T", "strided"]
)
def test_npy_layouts_do_not_change_the_values(tmp_path, rng, layout):
    array = layout(rng.standard_normal((4, 6)).astype(np.float32))
    np.save(tmp_path / "layer.npy", array)
    [(_, read, _)] = Weights([tmp_path / "layer.npy"])
    np.testing.assert_array_equal(read, array)


def test_npy_is_mapped_not_read(tmp_path):
    np.save(tmp_path / "layer.npy", np.ones((1000, 1000), np.float32))
    tracemalloc.start()
    [(_, read, _)] = Weights([tmp_path / "layer.npy"])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < read.nbytes / 4


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_members_without_vectors_integers_and_objects(tmp_path, rng, save):
    arrays = {"a": rng.standard_normal((3, 4)), "b/c": rng.standard_normal((2, 3, 2))}
    others = {"ids": np.arange(6).reshape(2, 3), "meta": np.array([{"k": 1}], dtype=object)}
    left_out = {"bias": np.ones(3), "temperature": np.float32(1), "nothing": np.ones((0, 3))}
    save(tmp_path / "net.npz", **arrays, **others, **left_out)

    weights = Weights([tmp_path / "net.npz"])

    assert {tensor.name: tensor.reason for tensor in weights.left_out} == {
        "bias": "of rank 1",
        "temperature": "of rank 0",
        "nothing": "empty",
        "ids": "of type int64, which is no float",
    }
    assert len(weights) == 2
    assert repr(weights).startswith("Weights(2 tensors, ")
    for name, array, axis in weights:
        np.testing.assert_array_equal(array, arrays[name])
        assert axis == 0


def test_npz_members_whose_names_differ_in_their_ending(tmp_path):
    arrays = {"a": np.ones((2, 3)), "a.npy": np.zeros((4, 5))}
    np.savez(tmp_path / "net.npz", **arrays)
    read = loaded(tmp_path / "net.npz")
    assert set(read) == set(arrays)
    for name in arrays:
        np.testing.assert_array_equal(read[name][0], arrays[name])


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_npz_with_two_members_of_one_name_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "net.npz", "w") as archive:
        for value in (1, 2):
            with archive.open("w.npy", "w") as stream:
                np.lib.format.write_array(stream, np.full((2, 3), float(value)))
    with pytest.raises(WeightsError) as error:
        Weights([tmp_path / "net.npz"])
    assert_one_line(error, "net.npz", "2 members are named 'w.npy'")


@pytest.mark.parametrize("save", ["npy", "npz"])
def test_bfloat16_in_numpy_files(tmp_path, rng, save):
    array = rng.standard_normal((4, 5)).astype(ml_dtypes.bfloat16)
    if save == "npy":
        np.save(tmp_path / "w.npy", array)
    else:
        np.savez(tmp_path / "w.npz", w=array)

    weights = Weights([tmp_path / f"w.{save}"])
    [(_, read, axis)] = weights

    assert weights.tensors[0].dtype == "bfloat16"
    assert (read.dtype, axis) == (ml_dtypes.bfloat16, 0)
    np.testing.assert_array_equal(read, array.astype(np.float32))


def test_bfloat16_in_numpy_files_of_any_order_and_with_nan(tmp_path):
    array = np.asfortranarray(np.arange(12).reshape(3, 4)).astype(ml_dtypes.bfloat16)
    np.save(tmp_path / "w.npy", array)
    [(_, read, _)] = Weights([tmp_path / "w.npy"])
    np.testing.assert_array_equal(read, np.arange(12).reshape(3, 4))

    array[1, 2] = np.nan
    np.save(tmp_path / "w.npy", array)
    with pytest.raises(WeightsError, match="1 of 12 values"):
        list(Weights([tmp_path / "w.npy"]))


def test_other_types_of_ml_dtypes_in_numpy_files_are_named(tmp_path):
    array = np.ones((4, 5))
    other = {name: array.astype(name) for name in ("float8_e5m2", "float8_e4m3fn")}
    np.savez(tmp_path / "w.npz", a=array, **other)
    weights = Weights([tmp_path / "w.npz"])
    assert [tensor.name for tensor in weights.tensors] == ["a"]
    named = {tensor.name: tensor.reason for tensor in weights.skipped}
    assert named == {
        "float8_e5m2": "of type float8_e5m2, which is not read",
        "float8_e4m3fn": "of type void8 (float8 or int4 of ml_dtypes), which is not read",
    }


# .safetensors


@pytest.mark.parametrize("name", ["layer/0/weight", "Gewicht ä 重み", "a:b", ".", "w" * 300])
def test_safetensors_names_are_kept(tmp_path, name):
    safetensors.numpy.save_file({name: np.ones((2, 3))}, tmp_path / "net.safetensors")
    assert list(loaded(tmp_path / "net.safetensors")) == [name]


def test_file_of_float8_weights_and_bfloat16_biases(tmp_path):
    saved = {f"w{i}": np.ones((4, 3), ml_dtypes.float8_e8m0fnu) for i in range(2)}
    saved["bias"] = np.ones(3, ml_dtypes.bfloat16)
    safetensors.numpy.save_file(saved, tmp_path / "net.safetensors")
    with pytest.raises(WeightsError) as error:
        Weights([tmp_path / "net.safetensors"])
    assert_one_line(error, "none of its 2 weights can be read", "2 of type float8_e8m0", "bfloat16")


def test_safetensors_with_bfloat16_and_transposed_arrays(tmp_path, rng):
    array = rng.standard_normal((5, 3)).astype(np.float32)
    saved = {
        "half": array.astype(np.float16),
        "bfloat": array.astype(ml_dtypes.bfloat16),
        "transposed": np.ascontiguousarray(array.T),
        "norm": np.ones(5, np.float32),
        "int8": np.ones((5, 3), np.int8),
        "float8": array.astype(ml_dtypes.float8_e8m0fnu),
    }
    safetensors.numpy.save_file(saved, tmp_path / "net.safetensors")

    weights = Weights([tmp_path / "net.safetensors"])
    read = {name: array for name, array, _ in weights}

    assert set(read) == {"half", "bfloat", "transposed"}
    assert {tensor.name: tensor.reason for tensor in weights.left_out} == {
        "norm": "of rank 1",
        "int8": "of type int8, which is no float",
    }
    assert {tensor.name: tensor.reason for tensor in weights.skipped} == {
        "float8": "of type float8_e8m0, which is not read"
    }
    assert read["half"].dtype == np.float16
    assert read["bfloat"].dtype == ml_dtypes.bfloat16
    for name in read:
        np.testing.assert_array_equal(read[name], saved[name].astype(read[name].dtype))


def test_safetensors_bfloat16_in_a_process_that_does_not_know_the_type(tmp_path):
    """The type must not depend on another package having registered it before."""
    saved = {"w": np.full((2, 3), 1.5, ml_dtypes.bfloat16)}
    safetensors.numpy.save_file(saved, tmp_path / "net.safetensors")
    script = (
        "from cubin.weights import Weights; [(n, a, x)] = Weights(['net.safetensors']); "
        "print(float(a.sum()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "9.0", run.stderr


# .onnx


@pytest.mark.parametrize("dtype", [*FLOATS, ml_dtypes.bfloat16])
@pytest.mark.parametrize("size", [(2, 3), (40, 50)], ids=["inline", "referenced"])
@pytest.mark.parametrize("stored_as", ["initializer", "constant"])
def test_onnx_values(tmp_path, rng, dtype, size, stored_as):
    array = rng.standard_normal(size).astype(dtype)
    use = helper.make_node("MatMul", ["x", "w"], ["y"])
    if stored_as == "initializer":
        proto = model([use], [tensor("w", array)])
    else:
        constant = helper.make_node("Constant", [], ["w"], value=tensor("", array))
        proto = model([constant, use])
    onnx.save(proto, tmp_path / "net.onnx")

    [(name, read, axis)] = Weights([tmp_path / "net.onnx"])

    assert (name, axis) == ("w", 1)
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, array.astype(read.dtype))


@pytest.mark.parametrize(
    ("kind", "values"), [(TensorProto.FLOAT, "float_data"), (TensorProto.DOUBLE, "double_data")]
)
def test_onnx_values_in_typed_fields(tmp_path, rng, kind, values):
    array = rng.standard_normal((40, 50)).astype(np.float32)
    weight = helper.make_tensor("w", kind, array.shape, array.ravel(), raw=False)
    assert len(getattr(weight, values)) == array.size
    onnx.save(model([helper.make_node("MatMul", ["x", "w"], ["y"])], [weight]), tmp_path / "n.onnx")
    np.testing.assert_array_equal(loaded(tmp_path / "n.onnx")["w"][0], array)


def test_onnx_external_data(tmp_path, rng):
    array = rng.standard_normal((40, 50)).astype(np.float32)
    proto = model([helper.make_node("MatMul", ["x", "w"], ["y"])], [tensor("w", array)])
    onnx.save(proto, tmp_path / "net.onnx", save_as_external_data=True, location="net.bin")
    assert (tmp_path / "net.onnx").stat().st_size < array.nbytes

    weights = Weights([tmp_path / "net.onnx"])
    for _ in range(2):
        [(_, read, _)] = weights
        np.testing.assert_array_equal(read, array)

    (tmp_path / "net.bin").unlink()
    with pytest.raises(WeightsError, match="w: cannot read the data"):
        list(weights)


@pytest.mark.parametrize("layout", ["inside", "external"])
def test_onnx_memory_is_one_tensor(tmp_path, layout):
    if not Path("/proc/self/status").exists():
        pytest.skip("the memory of a process is read from /proc")
    names = [f"w{i}" for i in range(20)]
    array = np.ones((500, 500), np.float32)
    proto = model(
        [helper.make_node("MatMul", ["x", name], [f"y{name}"]) for name in names],
        [tensor(name, array) for name in names],
    )
    onnx.save(proto, tmp_path / "net.onnx", save_as_external_data=layout == "external")
    del proto
    script = """
import os, sys
from cubin.weights import Weights
def anonymous_memory():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024
import onnx
before = anonymous_memory()
weights = Weights(["net.onnx"])
peak = max(anonymous_memory() for _ in weights)
print(len(weights), peak - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    count, grown = map(int, run.stdout.split())
    assert count == len(names)
    assert grown < 8 * array.nbytes


@pytest.mark.parametrize(
    ("operator", "attributes", "inputs", "axis"),
    [
        ("Conv", {}, "xw", 0),
        ("ConvTranspose", {}, "xw", 1),
        ("MatMul", {}, "xw", 1),
        ("MatMul", {}, "wx", 0),
        ("Gemm", {}, "xw", 1),
        ("Gemm", {"transB": 1}, "xw", 0),
        ("Gather", {}, "wx", 0),
    ],
)
def test_onnx_channel_axis_of_each_operator(tmp_path, operator, attributes, inputs, axis):
    node = helper.make_node(operator, list(inputs), ["y"], **attributes)
    assert axes(tmp_path, [node], tensor("w", np.ones((4, 3), np.float32))) == {"w": axis}


@pytest.mark.parametrize("domain_and_operator", ["Conv", "com.microsoft.FusedConv", "DeformConv"])
def test_onnx_convolutions_and_what_they_are_fused_into(tmp_path, domain_and_operator):
    domain, _, operator = domain_and_operator.rpartition(".")
    node = helper.make_node(operator, ["x", "w", "o"], ["y"], domain=domain, group=2)
    weight = tensor("w", np.ones((4, 3, 3, 3), np.float32))
    assert axes(tmp_path, [node], weight) == {"w": 0}


@pytest.mark.parametrize(
    ("shape", "group", "axis"),
    [((4, 6, 3), 1, 1), ((4, 1, 3), 4, 0), ((4, 6, 3), 4, (0, 1)), ((4, 6, 3), 2, (0, 2))],
)
def test_onnx_channels_of_a_transposed_convolution_are_per_group(tmp_path, rng, shape, group, axis):
    """Axis 0 holds the groups, each with its input channels; axis 1 the outputs of a group."""
    array = rng.standard_normal(shape).astype(np.float32)
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], group=group)
    onnx.save(model([node], [tensor("w", array)]), tmp_path / "net.onnx")

    [(read, found)] = loaded(tmp_path / "net.onnx").values()

    assert found == axis
    np.testing.assert_array_equal(read, array.reshape(read.shape))
    channels = group * shape[1]
    assert channel_rows(read, found).shape == (channels, array.size // channels)


@pytest.mark.parametrize(
    ("operator", "attributes", "inputs", "axis"),
    [
        ("Gemm", {}, "wx", 0),
        ("Gemm", {"transA": 1}, "wx", 1),
        ("FusedGemm", {"transB": 1}, "xw", 0),
        ("FusedMatMul", {}, "xw", 1),
        ("FusedMatMul", {"transB": 1}, "xw", 0),
        ("FusedMatMul", {"transA": 1}, "wx", 1),
        ("Einsum", {"equation": "bi,oi->bo"}, "xw", 0),
        ("Einsum", {"equation": "bi, io -> bo"}, "xw", 1),
        ("Einsum", {"equation": "...i,io->...o"}, "xw", 1),
        ("Einsum", {"equation": "oi,bi"}, "wx", 0),
        ("Gather", {"axis": 1}, "wx", 1),
        ("Gather", {"axis": -1}, "wx", 1),
    ],
)
def test_onnx_channel_axis_of_products(tmp_path, operator, attributes, inputs, axis):
    domain = "com.microsoft" if operator.startswith("Fused") else ""
    node = helper.make_node(operator, list(inputs), ["y"], domain=domain, **attributes)
    assert axes(tmp_path, [node], tensor("w", np.ones((4, 3), np.float32))) == {"w": axis}


@pytest.mark.parametrize(
    ("operator", "attributes", "axis"),
    [
        ("MatMul", {}, (0, 1, 3)),
        ("FusedMatMul", {"transB": 1}, (0, 1, 2)),
        ("FusedMatMul", {"transBatchB": 1}, (1, 2, 3)),
        ("Einsum", {"equation": "...i,...io->...o"}, (0, 1, 3)),
        ("Einsum", {"equation": "bhi,ghio->bgo"}, (0, 3)),
    ],
)
def test_onnx_matrices_side_by_side_have_channels_of_their_own(
    tmp_path, operator, attributes, axis
):
    node = helper.make_node(operator, ["x", "w"], ["y"], **attributes)
    weight = tensor("w", np.ones((2, 3, 4, 5), np.float32))
    assert axes(tmp_path, [node], weight) == {"w": axis}


def test_onnx_einsum_without_a_sum_has_no_weight(tmp_path):
    nodes = [
        helper.make_node("Einsum", ["x", "mask"], ["y"], equation="bij,ij->bij"),
        helper.make_node("MatMul", ["y", "w"], ["z"]),
    ]
    both = [tensor(name, np.ones((4, 3), np.float32)) for name in ("mask", "w")]
    assert axes(tmp_path, nodes, *both) == {"w": 1}


@pytest.mark.parametrize("operator", ["LSTM", "GRU", "RNN"])
def test_onnx_directions_of_a_recurrent_layer_have_scales_of_their_own(tmp_path, operator):
    node = helper.make_node(
        operator, ["x", "w", "r"], ["y"], hidden_size=2, direction="bidirectional"
    )
    weights = [tensor(name, np.ones((2, 8, 3), np.float32)) for name in "wr"]
    assert axes(tmp_path, [node], *weights) == {"w": (0, 1), "r": (0, 1)}


@pytest.mark.parametrize("operator", ["LSTM", "GRU", "RNN"])
def test_onnx_recurrent_layers_have_two_weights(tmp_path, operator):
    node = helper.make_node(operator, ["x", "w", "r", "b"], ["y"], hidden_size=2)
    weights = [tensor(name, np.ones((1, 8, 3), np.float32)) for name in "wr"]
    bias = tensor("b", np.ones((1, 16), np.float32))
    assert axes(tmp_path, [node], *weights, bias) == {"w": 1, "r": 1}


def test_onnx_axis_is_followed_through_transposes_and_casts(tmp_path):
    nodes = [
        helper.make_node("Cast", ["w"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["cast"], ["turned"], perm=[2, 0, 1]),
        helper.make_node("Identity", ["turned"], ["same"]),
        helper.make_node("Conv", ["x", "same"], ["y"]),
        helper.make_node("Transpose", ["v"], ["reversed"]),
        helper.make_node("MatMul", ["y", "reversed"], ["z"]),
    ]
    weights = [
        tensor("w", np.ones((2, 3, 4), np.float16)),
        tensor("v", np.ones((5, 6), np.float32)),
    ]
    assert axes(tmp_path, nodes, *weights) == {"w": 2, "v": 0}


def integers(name, *values):
    return tensor(name, np.array(values, np.int64))


@pytest.mark.parametrize("arguments_in", ["initializers", "constants"])
def test_onnx_gates_that_are_reordered_for_a_recurrent_layer(tmp_path, rng, arguments_in):
    """As PyTorch exports it without folding: slices, put together in another order."""
    array = rng.standard_normal((512, 128)).astype(np.float32)
    bounds = [(0, 128), (384, 512), (128, 384)]
    arguments = [integers("zero", 0)]
    nodes = []
    for number, (start, end) in enumerate(bounds):
        arguments += [integers(f"start{number}", start), integers(f"end{number}", end)]
        inputs = ["weight_ih", f"start{number}", f"end{number}", "zero"]
        nodes.append(helper.make_node("Slice", inputs, [f"gate{number}"]))
    nodes += [
        helper.make_node("Concat", ["gate0", "gate1", "gate2"], ["gates"], axis=0),
        helper.make_node("Unsqueeze", ["gates", "zero"], ["directions"]),
        helper.make_node("LSTM", ["x", "directions", "r"], ["h"], hidden_size=128),
        helper.make_node("Conv", ["x", "kernel"], ["y"]),
    ]
    weights = [
        tensor("weight_ih", array),
        tensor("kernel", np.ones((8, 4, 3, 3), np.float32)),
    ]
    if arguments_in == "constants":
        nodes[:0] = [helper.make_node("Constant", [], [a.name], value=a) for a in arguments]
        arguments = []
    onnx.save(model(nodes, [*weights, *arguments]), tmp_path / "net.onnx")

    read = loaded(tmp_path / "net.onnx")

    assert {name: axis for name, (_, axis) in read.items()} == {"weight_ih": 0, "kernel": 0}
    np.testing.assert_array_equal(read["weight_ih"][0], array)


def test_onnx_weights_of_both_directions_that_are_put_together(tmp_path):
    nodes = [
        helper.make_node("Unsqueeze", ["forward", "zero"], ["f"]),
        helper.make_node("Unsqueeze", ["backward", "zero"], ["b"]),
        helper.make_node("Concat", ["f", "b"], ["both"], axis=0),
        helper.make_node("GRU", ["x", "both", "r"], ["h"], hidden_size=2),
    ]
    weights = [tensor(name, np.ones((6, 5), np.float32)) for name in ("forward", "backward")]
    assert axes(tmp_path, nodes, *weights, integers("zero", 0)) == {"forward": 0, "backward": 0}


MOVES = {
    "Slice of opset 1": ("Slice", [], {"axes": [1], "starts": [0], "ends": [2]}),
    "Slice backwards": ("Slice", [(-1,), (-(2**63) + 1,), (1,), (-1,)], {}),
    "Reshape": ("Reshape", [(0, -1, 1)], {}),
    "Reshape of opset 1": ("Reshape", [], {"shape": [6, 4, 1]}),
    "Unsqueeze of opset 1": ("Unsqueeze", [], {"axes": [-1]}),
    "Flatten": ("Flatten", [], {"axis": -1}),
    "Dropout": ("Dropout", [], {}),
    "CastLike": ("CastLike", [], {}),
    "Gather in another order": ("Gather", [(5, 4, 3, 2, 1, 0)], {}),
    "Split": ("Split", [(2, 4)], {}),
}


@pytest.mark.parametrize("move", MOVES)
def test_onnx_axis_is_followed_through_what_moves_elements(tmp_path, move):
    operator, arguments, attributes = MOVES[move]
    names = [f"a{number}" for number in range(len(arguments))]
    nodes = [
        helper.make_node(operator, ["w", *names], ["moved", "rest"][: 1 + (move == "Split")]),
        helper.make_node("Conv", ["x", "moved"], ["y"]),
    ]
    nodes[0].attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
    initializers = [integers(n, *v) for n, v in zip(names, arguments, strict=True)]
    weight = tensor("w", np.ones((6, 4), np.float32))
    assert axes(tmp_path, nodes, weight, *initializers) == {"w": 0}


@pytest.mark.parametrize(
    ("shape", "reshaped", "perm", "axis", "given"),
    [
        # (in, kernel, out) as a matrix, turned into (out, in, kernel)
        ((12, 5), (4, 3, 5), (2, 0, 1), 1, (12, 5)),
        # two axes that together hold the output channels
        ((2, 3, 4), (6, 4, 1), (0, 1, 2), (0, 1), (2, 3, 4)),
        # an axis of which the output channels are a part
        ((12, 5), (4, 3, 5), (0, 1, 2), 0, (4, 3, 5)),
        ((12, 5), (2, 6, 5), (1, 0, 2), 1, (2, 6, 5)),
        # a flat buffer
        ((60,), (4, 3, 5), (2, 0, 1), 2, (4, 3, 5)),
    ],
)
def test_onnx_channels_of_reshaped_tensors(tmp_path, rng, shape, reshaped, perm, axis, given):
    array = rng.standard_normal(shape).astype(np.float32)
    nodes = [
        helper.make_node("Reshape", ["w", "shape"], ["r"]),
        helper.make_node("Transpose", ["r"], ["t"], perm=perm),
        helper.make_node("Conv", ["x", "t"], ["y"]),
    ]
    stored = [tensor("w", array), integers("shape", *reshaped)]
    onnx.save(model(nodes, stored), tmp_path / "net.onnx")

    [(read, found)] = loaded(tmp_path / "net.onnx").values()

    moved = array.reshape(reshaped).transpose(perm)
    channels = {frozenset(channel.ravel().tolist()) for channel in moved}
    assert {frozenset(row.tolist()) for row in channel_rows(read, found)} == channels
    assert (read.shape, found) == (given, axis)


def random_move(rng, node_input, value):
    """A node that moves elements, the integers it takes, and its output."""
    name = f"{node_input}'"
    axis = int(rng.integers(value.ndim))
    match rng.choice(["Transpose", "Reshape", "Slice", "Concat", "Unsqueeze", "Gather"]):
        case "Transpose":
            perm = rng.permutation(value.ndim).tolist()
            node = helper.make_node("Transpose", [node_input], [name], perm=perm)
            return node, [], value.transpose(perm)
        case "Reshape":
            sizes = []
            rest = value.size
            while rest > 1 and len(sizes) < 3:
                sizes.append(int(rng.choice([n for n in range(1, rest + 1) if rest % n == 0])))
                rest //= sizes[-1]
            sizes.append(rest)
            node = helper.make_node("Reshape", [node_input, name + "s"], [name])
            return node, [integers(name + "s", *sizes)], value.reshape(sizes)
        case "Slice":
            start = int(rng.integers(value.shape[axis]))
            arguments = [name + letter for letter in "sea"]
            node = helper.make_node("Slice", [node_input, *arguments], [name])
            values = (start, 2**62, axis)
            given = [integers(a, v) for a, v in zip(arguments, values, strict=True)]
            return node, given, value.take(range(start, value.shape[axis]), axis)
        case "Concat":
            node = helper.make_node("Concat", [node_input, node_input], [name], axis=axis)
            return node, [], np.concatenate([value, value], axis)
        case "Unsqueeze":
            node = helper.make_node("Unsqueeze", [node_input, name + "a"], [name])
            return node, [integers(name + "a", axis)], np.expand_dims(value, axis)
        case _:
            if value.ndim == 1:
                return random_move(rng, node_input, value)
            index = int(rng.integers(value.shape[axis]))
            node = helper.make_node("Gather", [node_input, name + "i"], [name], axis=axis)
            scalar = numpy_helper.from_array(np.array(index), name + "i")
            return node, [scalar], value.take(index, axis)


def test_onnx_channels_after_random_moves(tmp_path):
    """Elements share scales exactly if the convolution sees them in one output channel."""
    known = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        value = array = np.arange(48, dtype=np.float32).reshape(rng.permutation([2, 4, 6]))
        nodes, stored, last = [], [tensor("w", array)], "w"
        for _ in range(rng.integers(1, 5)):
            node, given, value = random_move(rng, last, value)
            last = node.output[0]
            nodes.append(node)
            stored += given
        if value.ndim < 2:
            continue
        nodes.append(helper.make_node("Conv", ["x", last], ["y"]))
        stored.append(tensor("beside", np.ones((2, 2), np.float32)))
        nodes.append(helper.make_node("MatMul", ["y", "beside"], ["z"]))
        onnx.save(model(nodes, stored), tmp_path / "net.onnx")

        weights = Weights([tmp_path / "net.onnx"])

        read = {name: (array, axis) for name, array, axis in weights}
        if "w" not in read:
            assert [tensor.name for tensor in weights.skipped] == ["w"]
            continue
        known += 1
        present = set(value.ravel().tolist())
        rows = {frozenset(row.tolist()) & present for row in channel_rows(*read["w"])}
        channels = [frozenset(channel.ravel().tolist()) for channel in value]
        assert all(any(row <= channel for channel in channels) for row in rows), seed
        if len(set().union(*channels)) == sum(map(len, channels)):
            assert rows - {frozenset()} == set(channels), seed
    assert known > 150


def test_onnx_layers_that_lie_in_one_tensor_have_channels_of_their_own(tmp_path):
    nodes = []
    for layer in range(3):
        index = helper.make_node("Constant", [], [f"i{layer}"], value_int=layer)
        one = helper.make_node("Gather", ["w", f"i{layer}"], [f"w{layer}"], axis=0)
        nodes += [index, one, helper.make_node("MatMul", ["x", f"w{layer}"], [f"y{layer}"])]
    assert axes(tmp_path, nodes, tensor("w", np.ones((3, 4, 5), np.float32))) == {"w": (0, 2)}


def test_onnx_embedding_with_constant_indices(tmp_path):
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"]),
        helper.make_node("Add", ["x", "e"], ["y"]),
    ]
    table = tensor("table", np.ones((9, 4), np.float32))
    assert axes(tmp_path, nodes, table, integers("ids", 0, 1, 2)) == {"table": 0}


@pytest.mark.parametrize("bounds", [{"start": 1, "end": 2}, {"start": -3, "end": -2}])
def test_onnx_pieces_of_a_shape(tmp_path, bounds):
    nodes = [
        helper.make_node("Shape", ["w"], ["second"], **bounds),
        helper.make_node("Concat", ["second", "rest"], ["shape"], axis=0),
        helper.make_node("Reshape", ["w", "shape"], ["r"]),
        helper.make_node("Gemm", ["x", "r"], ["y"], transB=1),
    ]
    stored = [tensor("w", np.ones((1, 6, 2, 2), np.float32)), integers("rest", -1)]
    assert axes(tmp_path, nodes, *stored) == {"w": 1}


def test_onnx_outputs_without_a_name_are_no_inputs_without_a_name(tmp_path):
    nodes = [
        helper.make_node("Split", ["w", "sizes"], ["", "w1"]),
        helper.make_node("MatMul", ["x", "w1"], ["y"]),
        helper.make_node("Gather", ["", "i"], ["z"]),
    ]
    stored = [tensor("w", np.ones((4, 5), np.float32)), integers("sizes", 1, 3)]
    assert axes(tmp_path, nodes, *stored) == {"w": 1}


def test_onnx_shapes_that_are_computed(tmp_path):
    """Reshape(w, Concat(Shape(w)[1:], -1)), as exporters leave it without folding."""
    nodes = [
        helper.make_node("Shape", ["w"], ["all"]),
        helper.make_node("Gather", ["all", "one"], ["second"]),
        helper.make_node("Concat", ["second", "rest"], ["shape"], axis=0),
        helper.make_node("Reshape", ["w", "shape"], ["r"]),
        helper.make_node("Gemm", ["x", "r"], ["y"], transB=1),
    ]
    stored = [
        tensor("w", np.ones((1, 6, 2, 2), np.float32)),
        integers("one", 1),
        integers("rest", -1),
    ]
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(model(nodes, stored, opset_imports=opsets), tmp_path / "net.onnx")
    [(_, axis)] = loaded(tmp_path / "net.onnx").values()
    assert axis == 1


def test_onnx_constants_of_floats(tmp_path):
    nodes = [
        helper.make_node("Constant", [], ["flat"], value_floats=[1.0, 2, 3, 4, 5, 6]),
        helper.make_node("Constant", [], ["shape"], value_ints=[2, 3]),
        helper.make_node("Reshape", ["flat", "shape"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    onnx.save(model(nodes), tmp_path / "net.onnx")
    [(array, axis)] = loaded(tmp_path / "net.onnx").values()
    np.testing.assert_array_equal(array, [[1, 2, 3], [4, 5, 6]])
    assert axis == 1


def skipped(tmp_path, nodes, *initializers):
    """The reasons for tensors beside a weight, which is read."""
    nodes = [*nodes, helper.make_node("MatMul", ["x", "beside"], ["y0"])]
    beside = tensor("beside", np.ones((2, 2), np.float32))
    onnx.save(model(nodes, [*initializers, beside]), tmp_path / "net.onnx")
    weights = Weights([tmp_path / "net.onnx"])
    assert [tensor.name for tensor in weights.tensors] == ["beside"]
    return {tensor.name: tensor.reason for tensor in weights.skipped}


def test_onnx_weights_of_int8_are_named(tmp_path):
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale"], ["w"], axis=0),
        helper.make_node("Conv", ["x", "w"], ["y"]),
        helper.make_node("MatMulInteger", ["x", "m"], ["z"]),
    ]
    stored = [
        tensor("q", np.ones((4, 3, 1), np.int8)),
        tensor("scale", np.ones(4, np.float32)),
        tensor("m", np.ones((4, 3), np.uint8)),
    ]
    assert skipped(tmp_path, nodes, *stored) == {
        "q": "of type int8, which is not read",
        "m": "of type uint8, which is not read",
    }


def test_onnx_weights_of_float8_are_named(tmp_path):
    nodes = [helper.make_node("Cast", ["q"], ["w"], to=TensorProto.FLOAT)]
    nodes.append(helper.make_node("MatMul", ["x", "w"], ["y"]))
    stored = tensor("q", np.ones((4, 3), ml_dtypes.float8_e4m3fn))
    assert skipped(tmp_path, nodes, stored) == {"q": "of type float8e4m3fn, which is not read"}


def test_onnx_weights_behind_arithmetic_are_named(tmp_path):
    nodes = [
        helper.make_node("Mul", ["direction", "gain"], ["w"]),
        helper.make_node("Transpose", ["w"], ["turned"]),
        helper.make_node("MatMul", ["x", "turned"], ["y"]),
    ]
    stored = [
        tensor("direction", np.ones((4, 3), np.float32)),
        tensor("gain", np.ones((4, 1), np.float32)),
    ]
    reason = "Mul stands between it and MatMul"
    assert skipped(tmp_path, nodes, *stored) == {"direction": reason, "gain": reason}


def test_onnx_weights_whose_channels_are_mixed_up_are_named(tmp_path):
    nodes = [
        helper.make_node("Reshape", ["w", "shape"], ["r"]),
        helper.make_node("MatMul", ["x", "r"], ["y"]),
    ]
    stored = [tensor("w", np.ones((6, 4), np.float32)), integers("shape", 4, 6)]
    assert skipped(tmp_path, nodes, *stored) == {
        "w": "the channels that MatMul sees are mixed with its other axes"
    }


def test_onnx_sparse_weights_are_named(tmp_path):
    values = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    indices = helper.make_tensor("w_indices", TensorProto.INT64, [2], [0, 5])
    sparse = helper.make_sparse_tensor(values, indices, [4, 3])
    nodes = [helper.make_node("MatMul", ["x", name], [f"y{name}"]) for name in ("w", "v")]
    proto = model(nodes, [tensor("v", np.ones((4, 3), np.float32))])
    proto.graph.sparse_initializer.append(sparse)
    onnx.save(proto, tmp_path / "net.onnx")
    weights = Weights([tmp_path / "net.onnx"])
    assert [tensor.name for tensor in weights.tensors] == ["v"]
    assert [tensor.reason for tensor in weights.skipped] == [
        "stored as a sparse tensor, which is not read"
    ]


def test_onnx_data_that_is_missing_is_found_before_any_work(tmp_path):
    proto = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], [tensor("w", np.ones((40, 50), "f4"))]
    )
    onnx.save(proto, tmp_path / "net.onnx", save_as_external_data=True, location="net.bin")
    data = tmp_path / "net.bin"
    data.write_bytes(data.read_bytes()[:7000])
    with pytest.raises(WeightsError) as error:
        Weights([tmp_path / "net.onnx"])
    assert_one_line(error, "net.onnx", "w: its data is cut off: net.bin")
    data.unlink()
    with pytest.raises(WeightsError) as error:
        Weights([tmp_path / "net.onnx"])
    assert_one_line(error, "net.onnx", "w: its data is missing: net.bin")


def test_onnx_tied_embedding_is_one_weight(tmp_path):
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("Transpose", ["table"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["y"]),
    ]
    assert axes(tmp_path, nodes, tensor("table", np.ones((9, 4), np.float32))) == {"table": 0}


def test_onnx_leaves_out_what_no_operator_uses_as_a_weight(tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["y"]),
        helper.make_node("Add", ["y", "shift"], ["z"]),
    ]
    initializers = [
        tensor("w", np.ones((2, 3, 1), np.float32)),
        tensor("b", np.ones(2, np.float32)),
        tensor("shift", np.full((1, 2, 1), np.inf, np.float32)),
        tensor("ids", np.ones((2, 2), np.int64)),
    ]
    onnx.save(model(nodes, initializers), tmp_path / "net.onnx")
    weights = Weights([tmp_path / "net.onnx"])
    assert [name for name, _, _ in weights] == ["w"]
    assert len(weights.left_out) == 2
    assert {tensor.name: tensor.reason for tensor in weights.left_out} == {
        "b": "used as input 2 of Conv",
        "shift": "used as input 1 of Add",
    }


def test_onnx_weights_in_and_of_subgraphs(tmp_path, rng):
    arrays = {name: rng.standard_normal((30, 20)).astype(np.float32) for name in "abc"}

    def branch(name, *initializers):
        node = helper.make_node("MatMul", ["x", name], ["y" + name])
        output = helper.make_tensor_value_info("y" + name, TensorProto.FLOAT, None)
        return helper.make_graph([node], "branch", [], [output], initializer=initializers)

    node = helper.make_node(
        "If",
        ["condition"],
        ["y"],
        then_branch=branch("a", tensor("a", arrays["a"])),
        else_branch=branch("b", tensor("c", arrays["c"])),
    )
    onnx.save(model([node], [tensor("b", arrays["b"])]), tmp_path / "net.onnx")

    read = loaded(tmp_path / "net.onnx")

    assert set(read) == {"a", "b"}
    for name, (array, axis) in read.items():
        assert axis == 1
        np.testing.assert_array_equal(array, arrays[name])


def test_onnx_weights_used_in_and_stored_in_functions(tmp_path, rng):
    arrays = {name: rng.standard_normal((30, 20)).astype(np.float32) for name in "ab"}
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    dense = helper.make_function(
        "local",
        "Dense",
        ["x", "w"],
        ["y"],
        [
            helper.make_node("Gemm", ["x", "w"], ["h"], transB=1),
            helper.make_node("Constant", [], ["v"], value=tensor("v", arrays["b"])),
            helper.make_node("MatMul", ["h", "v"], ["y"]),
        ],
        opsets[:1],
    )
    node = helper.make_node("Dense", ["x", "a"], ["y"], domain="local")
    proto = model([node], [tensor("a", arrays["a"])], functions=[dense], opset_imports=opsets)
    onnx.save(proto, tmp_path / "net.onnx")

    (first, axis_a), (second, axis_b) = loaded(tmp_path / "net.onnx").values()

    np.testing.assert_array_equal(first, arrays["a"])
    np.testing.assert_array_equal(second, arrays["b"])
    assert (axis_a, axis_b) == (0, 1)


# Paths and names


def test_folders_are_searched_and_names_tell_files_apart(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a.npy", "deep/a.npy", "deep/b.NPY"):
        with (tmp_path / name).open("wb") as stream:
            np.save(stream, np.ones((2, 3)))
    np.savez(tmp_path / "deep" / "net.npz", w=np.ones((2, 3)))
    np.save(tmp_path / "bias.npy", np.ones(3))
    (tmp_path / "readme.txt").write_text("no weights")

    weights = Weights([tmp_path])

    assert [tensor.name for tensor in weights.tensors] == ["a", "deep/a", "deep/b", "deep/net:w"]
    assert len(weights.left_out) == 1


def test_files_that_differ_in_their_type_alone_keep_it_in_their_names(tmp_path):
    np.savez(tmp_path / "net.npz", w=np.ones((2, 3)))
    safetensors.numpy.save_file({"w": np.ones((2, 3))}, tmp_path / "net.safetensors")
    names = [tensor.name for tensor in Weights([tmp_path]).tensors]
    assert names == ["net.npz:w", "net.safetensors:w"]


def test_a_file_that_several_paths_lead_to_is_read_once(tmp_path, monkeypatch):
    np.savez(tmp_path / "net.npz", w=np.ones((2, 3)))
    monkeypatch.chdir(tmp_path)
    weights = Weights([tmp_path, "net.npz", tmp_path / "net.npz"])
    assert [tensor.name for tensor in weights.tensors] == ["w"]


def test_tensors_of_one_name_are_told_apart(tmp_path):
    def branch():
        constant = helper.make_node("Constant", [], ["w"], value=tensor("", np.ones((2, 2), "f4")))
        node = helper.make_node("MatMul", ["x", "w"], ["z"])
        output = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
        return helper.make_graph([constant, node], "branch", [], [output])

    node = helper.make_node("If", ["c"], ["y"], then_branch=branch(), else_branch=branch())
    assert axes(tmp_path, [node]) == {"w": 1, "w (2)": 1}


def test_the_names_of_one_file_are_its_own(tmp_path):
    np.savez(tmp_path / "net.npz", w=np.ones((2, 3)))
    assert list(loaded(tmp_path / "net.npz")) == ["w"]


# Errors


def assert_one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_values_that_are_not_finite(tmp_path, value, dtype):
    array = np.ones((4, 5), dtype)
    array[1, 2:4] = value
    np.save(tmp_path / "layer.npy", array)
    with pytest.raises(WeightsError) as error:
        list(Weights([tmp_path / "layer.npy"]))
    assert_one_line(error, "layer", "2 of 20 values are NaN or infinite", "repair")


@pytest.mark.parametrize("name", ["net.npz", "folder", "folder/net.onnx"])
def test_missing_path(tmp_path, name):
    with pytest.raises(WeightsError) as error:
        Weights([tmp_path / name])
    assert_one_line(error, name, "no such file or folder")


def test_unknown_type(tmp_path):
    (tmp_path / "net.txt").write_bytes(b"x")
    with pytest.raises(WeightsError) as error:
        Weights([tmp_path / "net.txt"])
    assert_one_line(error, "net.txt", "'.txt'", ".safetensors")


def test_folder_without_weight_files(tmp_path):
    with pytest.raises(WeightsError) as error:
        Weights([tmp_path])
    assert_one_line(error, "no .npy or .npz or .safetensors or .onnx", "files in this folder")


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (np.ones((3, 4), int), "no float arrays"),
        (np.array([[{}]], object), "no float arrays"),
        (np.ones(3), "none of its 1 float arrays is a weight"),
        (np.ones((3, 0)), "none of its 1 float arrays is a weight"),
    ],
)
def test_file_without_float_weights(tmp_path, array, problem):
    np.save(tmp_path / "layer.npy", array)
    with pytest.raises(WeightsError) as error:
        Weights([tmp_path / "layer.npy"])
    assert_one_line(error, "layer.npy", problem)


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"\xff" * 40, b"PK\3\4" + b"\xff" * 40])
@pytest.mark.parametrize("kind", [".npy", ".npz", ".safetensors", ".onnx"])
def test_file_that_is_not_what_its_name_says(tmp_path, kind, content):
    path = tmp_path / f"net{kind}"
    path.write_bytes(content)
    with pytest.raises(WeightsError) as error:
        Weights([path])
    assert_one_line(error, f"not a sound {kind} file")


def test_file_that_went_away(tmp_path):
    path = tmp_path / "net.npz"
    with pytest.raises(WeightsError) as error:
        list(checkpoint.tensors_of(path, {path: ""}))
    assert_one_line(error, "not a sound .npz file")


@pytest.mark.parametrize("kind", [".npy", ".npz", ".safetensors", ".onnx"])
def test_truncated_file(tmp_path, kind):
    path = tmp_path / f"net{kind}"
    array = np.ones((100, 100), np.float32)
    match kind:
        case ".npy":
            np.save(path, array)
        case ".npz":
            np.savez(path, w=array)
        case ".safetensors":
            safetensors.numpy.save_file({"w": array}, path)
        case ".onnx":
            node = helper.make_node("MatMul", ["x", "w"], ["y"])
            onnx.save(model([node], [tensor("w", array)]), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError) as error:
        Weights([path])
    assert_one_line(error, f"not a sound {kind} file")


def test_onnx_data_shorter_than_its_shape(tmp_path):
    weight = tensor("w", np.ones((40, 50), np.float32))
    weight.raw_data = weight.raw_data[:-4]
    onnx.save(model([helper.make_node("MatMul", ["x", "w"], ["y"])], [weight]), tmp_path / "n.onnx")
    with pytest.raises(WeightsError) as error:
        list(Weights([tmp_path / "n.onnx"]))
    assert_one_line(error, "7996 bytes", "(40, 50)")


@pytest.mark.parametrize("kind", ["onnx"])
def test_optional_package_that_is_not_installed(tmp_path, monkeypatch, kind):
    (tmp_path / f"net.{kind}").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(WeightsError) as error:
        Weights([tmp_path / f"net.{kind}"])
    assert_one_line(error, kind, f"pip install {kind}")
