from __future__ import annotations

import random

import numpy as np
import pytest
import safetensors.numpy

import cubin
from cubin.weights import Weights, WeightsError
from cubin.weights.codes import load_codes, save_codes, stored_codes


@pytest.fixture
def codes(rng):
    x = rng.standard_normal((6, 19))
    made = {
        "plain": cubin.quantize(x, 2, channel_axis=0),
        "half": cubin.quantize(x.astype(np.float16), 3),
        "vector": cubin.quantize(x[0].astype(np.float32), 1),
        "deep": cubin.quantize(x.reshape(2, 3, 19), 2, channel_axis=(0, 1), solver="refined"),
        "groups": cubin.quantize(x[:, :16], 2, group_size=4),
        "shorter groups": cubin.quantize(x, 2, group_size=8),
        "map": cubin.quantize(x, rng.integers(0, 4, x.shape), channel_axis=0),
        "map of rows": cubin.quantize(x, np.arange(6)[:, None] % 3, channel_axis=0),
        "none": cubin.quantize(x, 0),
        "number": cubin.quantize(np.float32(3), 1),
        "shift": cubin.quantize(x, 2, channel_axis=0, shift=True),
        "shift of halves": cubin.quantize(x.astype(np.float16), 0, shift=True),
        "ä.b/c": cubin.quantize(x, 1),
    }
    return made


def save(path, codes):
    return save_codes(path, codes.items(), {name: code.shape for name, code in codes.items()})


def test_codes_come_back(tmp_path, codes):
    nbytes = save(tmp_path / "c.safetensors", codes)
    assert nbytes == (tmp_path / "c.safetensors").stat().st_size
    read = dict(load_codes(tmp_path / "c.safetensors"))
    assert list(read) == list(codes)
    for name, code in codes.items():
        assert read[name] == code, name
        np.testing.assert_array_equal(read[name].dequantize(), code.dequantize())


def test_the_file_is_as_documented_to_the_library(tmp_path, codes):
    save(tmp_path / "c.safetensors", codes)
    stored = safetensors.numpy.load_file(tmp_path / "c.safetensors")
    for name in ("plain", "deep", "groups", "shorter groups"):
        signs, planes = codes[name].signs, stored[f"{name}.planes"]
        flat = signs.reshape(len(signs), signs.shape[1], -1)
        levels, lines, length = flat.shape
        assert planes.shape == (levels, -(-length // 8), lines)
        for level, line, element in np.ndindex(levels, lines, length):
            bit = planes[level, element // 8, line] >> (element % 8) & 1
            assert bit == (flat[level, line, element] == 1)
        np.testing.assert_array_equal(stored[f"{name}.scales"], codes[name].scales)


def test_the_file_is_that_of_save_all(tmp_path, codes):
    save(tmp_path / "a.safetensors", codes)
    cubin.BinaryCode.save_all(tmp_path / "b.safetensors", codes)
    assert cubin.BinaryCode.load_all(tmp_path / "a.safetensors") == codes
    assert dict(load_codes(tmp_path / "b.safetensors")) == codes


def test_what_the_header_says(tmp_path, codes):
    save(tmp_path / "c.safetensors", codes)
    for stored in stored_codes(tmp_path / "c.safetensors"):
        code = codes[stored.name]
        assert (stored.shape, stored.dtype) == (code.shape, str(code.dtype))
        assert (stored.levels, stored.mapped) == (len(code.planes), np.ndim(code.bits) > 0)


def test_codes_that_do_not_come_leave_room(tmp_path, codes):
    shapes = {name: code.shape for name, code in codes.items()}
    save_codes(tmp_path / "c.safetensors", [("map", codes["map"])], shapes)
    assert dict(load_codes(tmp_path / "c.safetensors")) == {"map": codes["map"]}


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path, codes):
    path = tmp_path / "c.safetensors"
    save(path, codes)
    before = path.read_bytes()

    def failing():
        yield "plain", codes["plain"]
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        save_codes(path, failing(), {"plain": codes["plain"].shape})
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_damage_ends_in_a_value_error(tmp_path, codes):
    path = tmp_path / "c.safetensors"
    save(path, codes)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    choice = random.Random(0)
    refused = 0
    for number in range(200):
        changed = bytearray(content)
        if number % 3 == 0:
            changed = changed[: choice.randrange(len(changed))]
        else:
            changed[choice.randrange(header)] = choice.randrange(256)
        path.write_bytes(changed)
        try:
            for stored in stored_codes(path):
                stored.load()
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)  # noqa: PT017
    assert refused > 60


def test_codes_are_no_weights(tmp_path, codes):
    save(tmp_path / "c.safetensors", codes)
    np.save(tmp_path / "w.npy", np.ones((2, 3)))
    assert [tensor.name for tensor in Weights(tmp_path).tensors] == ["w"]
    with pytest.raises(WeightsError, match="it holds codes of cubin"):
        Weights(tmp_path / "c.safetensors")


def test_other_files_are_refused(tmp_path):
    safetensors.numpy.save_file({"w": np.ones((2, 3))}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="no intact file of codes: it is another kind"):
        stored_codes(tmp_path / "w.safetensors")
    with pytest.raises(FileNotFoundError):
        stored_codes(tmp_path / "none.safetensors")
