"""Each format against values that another library wrote, and against damaged files."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import pickle
import random
import struct
import sys

import ml_dtypes
import numpy as np
import onnx
import pytest
import safetensors.numpy
from onnx import helper, numpy_helper

from cubin.weights import Weights, WeightsError
from cubin.weights.safetensors_files import read_header
from tests.exhaustive import few
from tests.required import require

TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


def load(path, **keywords):
    return {name: array for name, array, _ in Weights(path, **keywords)}


def same(array, expected):
    """Equal values and the same type; bfloat16 compares as float32, which holds it."""
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array.astype(np.float64), expected.astype(np.float64))


CUTS = [(), (slice(1, 3),), (slice(None), slice(2, 5)), (slice(130, 250), slice(100, 140))]


# .safetensors


@pytest.mark.parametrize("name", TYPES)
def test_safetensors_types_and_cuts(tmp_path, rng, name):
    array = rng.standard_normal((260, 150)).astype(TYPES[name])
    safetensors.numpy.save_file({"w": array, "b": array[0]}, tmp_path / "net.safetensors")
    [tensor] = Weights(tmp_path / "net.safetensors").tensors
    expected = array.astype(np.float32) if name.startswith("F8") else array
    for cut in CUTS:
        same(tensor.load(cut), expected[cut])


def test_every_code_of_float8(tmp_path):
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    for dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        array = codes.view(dtype)
        finite = np.where(np.isfinite(array.astype(np.float32)), array, dtype(0))
        safetensors.numpy.save_file({"w": finite}, tmp_path / "net.safetensors")
        same(load(tmp_path / "net.safetensors")["w"], finite.astype(np.float32))


def scaled(array, scales):
    """The definition of scales of blocks of 128 x 128, element by element."""
    wide = array.astype(np.float32)
    for i, j in np.ndindex(wide.shape):
        wide[i, j] = wide[i, j] * np.float32(scales[i // 128, j // 128])
    return wide


@pytest.mark.parametrize("scale_type", [np.float32, ml_dtypes.bfloat16])
def test_float8_with_scales_of_blocks(tmp_path, rng, scale_type):
    array = rng.standard_normal((260, 150)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(0.1, 2, (3, 2)).astype(scale_type)
    saved = {"w": array, "w_scale_inv": scales}
    safetensors.numpy.save_file(saved, tmp_path / "net.safetensors")
    weights = Weights(tmp_path / "net.safetensors")
    [tensor] = weights.tensors
    assert [(t.name, t.reason) for t in weights.left_out] == [("w_scale_inv", "the scales of w")]
    for cut in CUTS:
        same(tensor.load(cut), scaled(array, scales.astype(np.float32))[cut])


def test_scales_of_blocks_in_another_shard(tmp_path, rng):
    array = rng.standard_normal((130, 20)).astype(ml_dtypes.float8_e4m3fn)
    scales = np.array([[2], [3]], np.float32)
    safetensors.numpy.save_file({"w": array}, tmp_path / "a.safetensors")
    safetensors.numpy.save_file({"w_scale_inv": scales}, tmp_path / "b.safetensors")
    same(load(tmp_path)["a:w"], scaled(array, scales))


@pytest.mark.parametrize(
    ("scales", "reason"),
    [
        ({"w_scale_inv": np.ones((2, 2), np.float32)}, "shape (2, 2)"),
        ({"w_scale_inv": np.ones((1, 1), np.uint8)}, "of type U8"),
        ({"w_scale": np.ones((4, 1), np.float32)}, "weight_scale"),
    ],
)
def test_scales_that_do_not_fit_are_named(tmp_path, scales, reason):
    saved = {"w": np.ones((4, 3), ml_dtypes.float8_e4m3fn), "v": np.ones((2, 2)), **scales}
    safetensors.numpy.save_file(saved, tmp_path / "net.safetensors")
    [skipped] = Weights(tmp_path / "net.safetensors").skipped
    assert skipped.name == "w"
    assert reason in skipped.reason


def raw(path, header, data=b""):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]}}, "does not fit"),
        ({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 32]}}, "does not fit"),
        ({"w": {"dtype": "F32", "shape": [2, -2], "data_offsets": [0, 16]}}, "below 0"),
        ({"w": {"dtype": "F32", "shape": [2, True], "data_offsets": [0, 8]}}, "a number"),
        ({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [4, 20]}}, "do not begin"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, "end at byte"),
        ({"w": {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]}}, "cut off"),
        ({"w": {"dtype": "F32", "shape": [2, 2]}}, "two offsets"),
        ({"w": 1}, "two offsets"),
        ({"w": {"dtype": 1, "shape": [2, 2], "data_offsets": [0, 16]}}, "a number"),
        ([], "no object"),
        ({"__metadata__": {"a": 1}}, "metadata"),
        (b'{"w": {}, "w": {}}', "twice"),
        (b"[" * 200_000, "recursion"),
        (b"\xff\xfe{}", "decode"),
        (
            {
                "a": {"dtype": "F32", "shape": [1, 4], "data_offsets": [0, 16]},
                "b": {"dtype": "F32", "shape": [1, 2], "data_offsets": [8, 16]},
            },
            "do not begin",
        ),
    ],
)
def test_headers_that_are_damaged(tmp_path, header, problem):
    raw(tmp_path / "net.safetensors", header, bytes(16))
    with pytest.raises(WeightsError, match=problem) as error:
        Weights(tmp_path / "net.safetensors")
    assert "net.safetensors" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_header_is_that_of_the_library(tmp_path, rng):
    saved = {"w": np.ones((2, 3)), "e": np.ones((0, 3)), "s": np.array(1.0), "i": np.arange(3)}
    safetensors.numpy.save_file(saved, tmp_path / "n.safetensors", metadata={"a": "b"})
    entries, metadata = read_header(tmp_path / "n.safetensors")
    assert {name: entry.shape for name, entry in entries.items()} == {
        name: array.shape for name, array in saved.items()
    }
    assert metadata == {"a": "b"}


# Shards


def sharded(folder, count=2, index=True):
    arrays = {f"layer{i}.weight": np.full((2, 3), i, np.float32) for i in range(count)}
    names = {}
    for i, (name, array) in enumerate(arrays.items()):
        shard = f"model-{i + 1:05}-of-{count:05}.safetensors"
        safetensors.numpy.save_file({name: array}, folder / shard)
        names[name] = shard
    if index:
        text = json.dumps({"metadata": {}, "weight_map": names})
        (folder / "model.safetensors.index.json").write_text(text)
    return arrays


@pytest.mark.parametrize("index", [True, False])
def test_shards(tmp_path, index):
    arrays = sharded(tmp_path, index=index)
    (tmp_path / "config.json").write_text("{}")
    read = load(tmp_path)
    assert [name.partition(":")[2] for name in read] == list(arrays)
    for name, array in read.items():
        np.testing.assert_array_equal(array, arrays[name.partition(":")[2]])


def test_an_index_says_which_files_are_shards(tmp_path):
    arrays = sharded(tmp_path)
    safetensors.numpy.save_file({"copy": np.ones((2, 2))}, tmp_path / "consolidated.safetensors")
    assert len(load(tmp_path)) == len(arrays)
    assert len(load(tmp_path / "model.safetensors.index.json")) == len(arrays)


def test_a_shard_that_is_missing_and_one_that_is_damaged_are_named(tmp_path):
    sharded(tmp_path, count=3)
    (tmp_path / "model-00001-of-00003.safetensors").unlink()
    second = tmp_path / "model-00002-of-00003.safetensors"
    second.write_bytes(second.read_bytes()[:-1])
    weights = Weights(tmp_path)
    assert [tensor.name for tensor in weights.tensors] == ["model-00003-of-00003:layer2.weight"]
    missing, damaged = sorted(weights.skipped, key=lambda tensor: tensor.name)
    assert missing.name == "model-00001-of-00003.safetensors"
    assert "named by model.safetensors.index.json, but not there" in missing.reason
    assert damaged.name == "model-00002-of-00003"
    assert "cut off: 'layer1.weight'" in damaged.reason


def test_two_links_in_a_folder_lead_to_one_file(tmp_path):
    np.save(tmp_path / "w.npy", np.ones((2, 3)))
    for name in ("a.npy", "z.npy"):
        (tmp_path / name).symlink_to("w.npy")
    assert [tensor.name for tensor in Weights(tmp_path).tensors] == ["a"]


def test_a_folder_that_is_given_twice_is_read_once(tmp_path):
    sharded(tmp_path, count=3)
    (tmp_path / "model-00001-of-00003.safetensors").unlink()
    weights = Weights([tmp_path, tmp_path, tmp_path / "model.safetensors.index.json"])
    assert (len(weights), len(weights.skipped), len(weights.files)) == (2, 1, 2)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"weight_map": {"w": "../x.safetensors"}}', '{"weight_map": {"w": 1}}']
)
def test_an_index_that_is_damaged(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match="not a sound index"):
        Weights(tmp_path)


# include, exclude


def test_include_and_exclude(tmp_path):
    names = ["layers.0.q", "layers.0.k", "layers.1.q", "head"]
    np.savez(tmp_path / "net.npz", **{name: np.ones((2, 2)) for name in names})

    def chosen(**keywords):
        return list(load(tmp_path / "net.npz", **keywords))

    assert chosen(include=r"\.q$") == ["layers.0.q", "layers.1.q"]
    assert chosen(include=["head", r"\.k"], exclude="zzz") == ["layers.0.k", "head"]
    assert chosen(exclude=[r"layers\.0", "head"]) == ["layers.1.q"]
    weights = Weights(tmp_path / "net.npz", exclude="head")
    assert [(t.name, t.reason) for t in weights.left_out] == [("head", "not asked for")]
    with pytest.raises(WeightsError, match="none of 4 weights"):
        chosen(include="nothing")
    with pytest.raises(ValueError, match="exclude must be regular expressions"):
        chosen(exclude="(")


# .gguf


@pytest.fixture
def gguf_file(tmp_path, rng):
    gguf = require("gguf")
    array = rng.standard_normal((6, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "net.gguf", "llama")
    writer.add_array("tokenizer.tokens", ["a", "bc", "d" * 100])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_bool("flag", True)
    writer.add_tensor("plain", array)
    writer.add_tensor("half", array.astype(np.float16))
    writer.add_tensor("vector", array[0])
    kinds = gguf.GGMLQuantizationType
    for kind in (kinds.BF16, kinds.Q8_0, kinds.Q4_0):
        packed = gguf.quants.quantize(array, kind)
        writer.add_tensor(kind.name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "net.gguf", array


def test_gguf_values_are_those_of_the_package(gguf_file):
    import gguf

    path, array = gguf_file
    weights = Weights(path)
    assert [t.name for t in weights.left_out] == ["vector"]
    stored = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    stored["half"] = array.astype(np.float16)
    stored["BF16"] = array.astype(ml_dtypes.bfloat16)
    assert {t.name: t.dtype for t in weights.tensors} == {
        "plain": "float32",
        "half": "float16",
        "BF16": "bfloat16",
        "Q8_0": "Q8_0",
        "Q4_0": "Q4_0",
    }
    for tensor in weights.tensors:
        assert tensor.shape == array.shape
        for cut in [(), (slice(1, 3),), (slice(2, 5), slice(3, 40))]:
            same(tensor.load(cut), stored[tensor.name][cut])


def gguf_by_hand(kind, data, name=b"w", shape=(32, 1)):
    info = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(shape))
    info += struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", kind, 0)
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + info
    return header + bytes(-len(header) % 32) + data


@pytest.mark.parametrize(("kind", "name"), [(9, "Q8_1"), (1000, "number 1000")])
def test_gguf_types_that_the_package_does_not_decode_are_named(tmp_path, kind, name):
    require("gguf")
    (tmp_path / "net.gguf").write_bytes(gguf_by_hand(kind, bytes(400)))
    np.save(tmp_path / "beside.npy", np.ones((2, 2)))
    weights = Weights(tmp_path)
    assert [t.name for t in weights.tensors] == ["beside"]
    assert [t.reason for t in weights.skipped] == [
        f"of type {name}, which is not read by this version of the package gguf"
    ]


def test_gguf_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "net.gguf").write_bytes(gguf_by_hand(8, bytes(400)))
    with pytest.raises(WeightsError, match="needs gguf: pip install gguf"):
        Weights(tmp_path / "net.gguf")
    plain = np.arange(32, dtype=np.float32).reshape(1, 32)
    (tmp_path / "net.gguf").write_bytes(gguf_by_hand(0, plain.tobytes()))
    same(load(tmp_path / "net.gguf")["w"], plain)


def test_gguf_lengths_that_never_end(tmp_path):
    """A count of 2^60 empty values must not be walked through."""
    start = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    for inner in (4, 8, 9):
        content = start + struct.pack("<IIQ", 9, inner, 1 << 60)
        (tmp_path / "net.gguf").write_bytes(content)
        with pytest.raises(WeightsError, match="cut off"):
            Weights(tmp_path / "net.gguf")


# PyTorch


def test_torch_values_ties_and_nesting(tmp_path, rng):
    torch = require("torch")
    array = rng.standard_normal((260, 150)).astype(np.float32)
    plain = torch.from_numpy(array)
    state = {
        "plain": torch.nn.Parameter(plain),
        "double": plain.double(),
        "half": plain.half(),
        "bf16": plain.bfloat16(),
        "fp8": plain.to(torch.float8_e4m3fn),
        "turned": plain.half().T,
        "bias": plain[0],
        "ints": torch.arange(6).reshape(2, 3),
        "sparse": torch.eye(3).to_sparse(),
    }
    state["tied"] = state["plain"]
    for name, content in {"net.pt": state, "deep.pth": {"model": {"a": state}, "step": 1}}.items():
        torch.save(content, tmp_path / name)
        weights = Weights(tmp_path / name)
        prefix = "" if name == "net.pt" else "a."
        expected = {
            "plain": array,
            "double": array.astype(np.float64),
            "half": array.astype(np.float16),
            "bf16": array.astype(ml_dtypes.bfloat16),
            "fp8": array.astype(ml_dtypes.float8_e4m3fn).astype(np.float32),
            "turned": array.astype(np.float16).T,
        }
        assert [t.name for t in weights.tensors] == [prefix + key for key in expected]
        for tensor in weights.tensors:
            assert tensor.shape == expected[tensor.name.removeprefix(prefix)].shape
            for cut in CUTS:
                same(tensor.load(cut), expected[tensor.name.removeprefix(prefix)][cut])
        reasons = {t.name.removeprefix(prefix): t.reason for t in weights.left_out}
        assert reasons["tied"] == f"tied to {prefix}plain"
        assert reasons["bias"] == "of rank 1"
        assert [t.name for t in weights.skipped] == [prefix + "sparse"]


def test_torch_files_run_no_code(tmp_path):
    torch = require("torch")

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"w": torch.ones(2, 2), "x": Evil()}, tmp_path / "net.pt")
    with pytest.raises(WeightsError, match=r"net\.pt: not a sound \.pt file .*state_dict\(\)"):
        Weights(tmp_path / "net.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(WeightsError, match=r"old\.pt"):
        Weights(tmp_path / "old.pt")
    assert not (tmp_path / "owned").exists()


def test_torch_files_beside_safetensors_are_left_out(tmp_path):
    torch = require("torch")
    torch.save({"w": torch.ones(2, 2)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "data.bin").write_bytes(bytes(100))
    assert list(load(tmp_path)) == ["w"]
    safetensors.numpy.save_file({"w": np.ones((2, 2))}, tmp_path / "model.safetensors")
    weights = Weights(tmp_path)
    assert [t.name for t in weights.tensors] == ["w"]
    assert [t.name for t in weights.left_out] == ["pytorch_model.bin"]


def test_torch_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "net.pt").write_bytes(b"PK\3\4")
    with pytest.raises(WeightsError, match="needs torch: pip install torch"):
        Weights(tmp_path / "net.pt")


# Cuts and pickles of the others


@pytest.mark.parametrize("kind", ["npy", "npz", "onnx", "external", "constant", "small"])
def test_cuts_and_pickles(tmp_path, rng, kind):
    array = rng.standard_normal((3, 4) if kind == "small" else (260, 150)).astype(np.float32)
    path = tmp_path / "net.onnx"
    if kind in ("npy", "npz"):
        path = tmp_path / f"net.{kind}"
        np.save(path, np.asfortranarray(array)) if kind == "npy" else np.savez(path, w=array)
    else:
        use = helper.make_node("MatMul", ["x", "w"], ["y"])
        stored = numpy_helper.from_array(array, "w")
        nodes, given = [use], [stored]
        if kind == "constant":
            nodes, given = [helper.make_node("Constant", [], ["w"], value=stored), use], []
        graph = helper.make_graph(nodes, "g", [], [], initializer=given)
        onnx.save(helper.make_model(graph), path, save_as_external_data=kind == "external")
    [tensor] = Weights(path).tensors
    for one in (tensor, pickle.loads(pickle.dumps(tensor))):
        for cut in CUTS[:3]:
            same(one.load(cut), array[cut])


def test_onnx_data_outside_the_folder_are_refused(tmp_path):
    (tmp_path / "model").mkdir()
    array = np.ones((40, 50), np.float32)
    (tmp_path / "secret").write_bytes(array.tobytes())
    stored = numpy_helper.from_array(array, "w")
    use = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([use], "g", [], [], initializer=[stored])
    proto = helper.make_model(graph)
    onnx.save(proto, tmp_path / "model" / "net.onnx", save_as_external_data=True, location="data")
    path = tmp_path / "model" / "net.onnx"
    proto = onnx.load(path, load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "../secret"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(WeightsError, match="outside its folder"):
        Weights(path)


# Damage


def sound(folder, kind):
    """A small file of a kind."""
    array = np.random.default_rng(1).standard_normal((8, 96)).astype(np.float32)
    arrays = {"first": array, "second": array[:4].astype(np.float16)}
    path = folder / f"net.{kind}"
    match kind:
        case "npy":
            np.save(path, array)
        case "npz":
            np.savez_compressed(path, **arrays)
        case "safetensors":
            arrays["fp8"] = array.astype(ml_dtypes.float8_e4m3fn)
            arrays["fp8_scale_inv"] = np.ones((1, 1), np.float32)
            safetensors.numpy.save_file(arrays, path)
        case "onnx":
            nodes = [helper.make_node("MatMul", ["x", name], [f"y{name}"]) for name in arrays]
            stored = [numpy_helper.from_array(value, name) for name, value in arrays.items()]
            onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], stored)), path)
        case "gguf":
            gguf = require("gguf")
            writer = gguf.GGUFWriter(path, "llama")
            writer.add_array("tokens", ["a", "bc"])
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor("q", gguf.quants.quantize(array, kind), raw_dtype=kind)
            writer.add_tensor("plain", array)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        case "pt":
            torch = require("torch")
            torch.save({name: torch.from_numpy(value) for name, value in arrays.items()}, path)
    return path.read_bytes()


def damaged(content, number):
    """A mutation or truncation of a file, most of them in its header."""
    choice = random.Random(number)
    changed = bytearray(content)
    if number % 4 == 0:
        return bytes(changed[: choice.randrange(len(changed))])
    near = len(changed) if number % 4 == 1 else min(len(changed), 400)
    for _ in range(choice.choice((1, 2, 8))):
        at = choice.randrange(near)
        changed[at if choice.random() < 0.7 else -1 - at] = choice.choice((0, 1, 127, 128, 255))
    if number % 4 == 3:
        at = choice.randrange(near)
        changed[at:at] = bytes(choice.choice((1, 8, 64)))
    return bytes(changed)


def said(read):
    """What a call says of damage: the lines of a WeightsError. Whatever else is raised, passes."""
    try:
        read()
    except WeightsError as error:
        return str(error).splitlines()
    return []


def read_all(paths):
    """Read damaged files: what they raise is a WeightsError of one line."""
    for path in paths:
        assert len(said(lambda path=path: Weights(path))) <= 1, path
        with contextlib.suppress(WeightsError):
            for tensor in Weights(path).tensors:
                assert len(said(tensor.load)) <= 1, path


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors", "onnx", "gguf", "pt"])
@pytest.mark.parametrize("count", few([34, 200], 34))
def test_damaged_files_end_in_one_line(tmp_path, kind, count):
    content = sound(tmp_path, kind)
    paths = [tmp_path / f"damaged{number}.{kind}" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(damaged(content, number))
    # In a process of its own, which can be stopped if it hangs, and may die of a bus error.
    worker = multiprocessing.get_context("spawn").Process(target=read_all, args=(paths,))
    worker.start()
    worker.join(timeout=300)
    hangs = worker.is_alive()
    worker.kill()
    worker.join()
    assert not hangs
    assert worker.exitcode == 0
