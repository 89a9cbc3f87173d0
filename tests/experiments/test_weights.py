from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import safetensors.numpy
from onnx import TensorProto, helper, numpy_helper
from weights import Weights, WeightsError, pretrained_sample

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

    assert weights.left_out == 3
    assert len(weights) == 2
    for name, array, axis in weights:
        np.testing.assert_array_equal(array, arrays[name])
        assert axis == 0


# .safetensors


def test_safetensors_with_bfloat16_and_transposed_arrays(tmp_path, rng):
    array = rng.standard_normal((5, 3)).astype(np.float32)
    saved = {
        "half": array.astype(np.float16),
        "bfloat": array.astype(ml_dtypes.bfloat16),
        "transposed": np.ascontiguousarray(array.T),
        "norm": np.ones(5, np.float32),
        "int8": np.ones((5, 3), np.int8),
        "float8": array.astype(ml_dtypes.float8_e4m3fn),
    }
    safetensors.numpy.save_file(saved, tmp_path / "net.safetensors")

    weights = Weights([tmp_path / "net.safetensors"])
    read = {name: array for name, array, _ in weights}

    assert set(read) == {"half", "bfloat", "transposed"}
    assert weights.left_out == 1
    assert read["half"].dtype == np.float16
    assert read["bfloat"].dtype == np.float32
    for name in read:
        np.testing.assert_array_equal(read[name], saved[name].astype(read[name].dtype))


def test_safetensors_bfloat16_in_a_process_that_does_not_know_the_type(tmp_path):
    """The type must not depend on another package having registered it before."""
    saved = {"w": np.full((2, 3), 1.5, ml_dtypes.bfloat16)}
    safetensors.numpy.save_file(saved, tmp_path / "net.safetensors")
    script = (
        "from weights import Weights; [(n, a, x)] = Weights(['net.safetensors']); print(a.sum())"
    )
    experiments = Path(sys.modules["weights"].__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(experiments)},
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
    assert read.dtype == (np.float32 if dtype is ml_dtypes.bfloat16 else dtype)
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
from weights import Weights
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
        env=os.environ | {"PYTHONPATH": str(Path(sys.modules["weights"].__file__).parent)},
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
        ("ConvTranspose", {"group": 4}, "xw", 0),
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
    assert weights.left_out == 2


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
    assert weights.left_out == 1


def test_files_that_differ_in_their_type_alone_keep_it_in_their_names(tmp_path):
    np.savez(tmp_path / "net.npz", w=np.ones((2, 3)))
    safetensors.numpy.save_file({"w": np.ones((2, 3))}, tmp_path / "net.safetensors")
    names = [tensor.name for tensor in Weights([tmp_path]).tensors]
    assert names == ["net.npz:w", "net.safetensors:w"]


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
    (tmp_path / "net.pt").write_bytes(b"x")
    with pytest.raises(WeightsError) as error:
        Weights([tmp_path / "net.pt"])
    assert_one_line(error, "net.pt", "'.pt'", ".safetensors")


def test_folder_without_weight_files(tmp_path):
    with pytest.raises(WeightsError) as error:
        Weights([tmp_path])
    assert_one_line(error, "no .npy or .npz or .safetensors or .onnx files")


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


@pytest.mark.parametrize("kind", ["onnx", "safetensors"])
def test_optional_package_that_is_not_installed(tmp_path, monkeypatch, kind):
    (tmp_path / f"net.{kind}").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(WeightsError) as error:
        Weights([tmp_path / f"net.{kind}"])
    assert_one_line(error, kind, "pip install '.[examples]'")


# The pretrained sample


def test_sample_is_found_in_the_package_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "rapidocr"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "models" / "net.onnx").write_bytes(b"x")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rapidocr", raising=False)
    assert pretrained_sample() == [package / "models" / "net.onnx"]


def test_sample_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WeightsError) as error:
        pretrained_sample()
    assert_one_line(error, "rapidocr", "pip install '.[examples]'")


def test_sample_has_well_over_a_hundred_convolutions_and_dense_layers():
    if importlib.util.find_spec("rapidocr") is None:
        pytest.skip("the package rapidocr is not installed")
    weights = Weights(pretrained_sample())
    assert len(weights) > 100
    assert {tensor.channel_axis for tensor in weights.tensors} == {0, 1}
    assert {len(tensor.shape) for tensor in weights.tensors} == {2, 4}
