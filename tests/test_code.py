from __future__ import annotations

import contextlib
import io
import json
import math
import os
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16

import cubin
from cubin import BinaryCode


@pytest.fixture
def codes(rng):
    """Codes of every granularity, with and without maps, and empty ones."""
    x = rng.normal(size=(4, 3, 6)).astype(np.float32)
    bits = rng.integers(0, 4, x.shape)
    return [
        cubin.quantize(x, 3),
        cubin.quantize(x, 2, channel_axis=0),
        cubin.quantize(x, bits, channel_axis=(2, 0)),
        cubin.quantize(x, bits, group_size=3),
        cubin.quantize(np.asfortranarray(x), np.asfortranarray(bits), channel_axis=np.int64(1)),
        cubin.quantize(x, bits.astype(np.uint8).T.copy().T, group_size=np.int8(3)),
        BinaryCode.from_signs(
            np.ones((3, 2)).T, np.ones((5, 3, 2), np.int8).T, 2, channel_axis=[0]
        ),
        cubin.quantize(x.astype(np.float16), bits[:, :1, :1], channel_axis=0),
        cubin.quantize(x.astype(bfloat16), bits, channel_axis=0),
        cubin.quantize(x.astype(bfloat16), 2),
        cubin.quantize(x.astype(np.float64), 16, channel_axis=0),
        cubin.quantize(x, 0),
        cubin.quantize(1.5, 2),
        cubin.quantize(np.zeros((0, 3)), 2, channel_axis=1),
        cubin.quantize(x, bits, group_size=4),
        cubin.quantize(x.astype(bfloat16), 2, group_size=5),
        cubin.quantize(x, np.arange(6) % 3, group_size=9),
        cubin.quantize(x[:, 0], bits[:, 0], group_size=4, solver="alternating"),
        cubin.quantize(x, 2, channel_axis=0, shift=True),
        cubin.quantize(x.astype(bfloat16), bits, group_size=3, shift=True),
        cubin.quantize(x, 0, shift=True),
    ]


def test_files_hold_the_whole_code(codes, tmp_path):
    for code in codes:
        path = tmp_path / "code.npz"
        code.save(path)
        loaded = BinaryCode.load(path)
        assert loaded == code
        np.testing.assert_array_equal(loaded.dequantize(), code.dequantize())
        assert (loaded.channel_axis, loaded.group_size) == (code.channel_axis, code.group_size)
        assert loaded.effective_bits == code.effective_bits
    assert [p.name for p in tmp_path.iterdir()] == ["code.npz"]


def test_tensor_files_hold_whole_codes(codes, tmp_path):
    named = {f"layer.{number}": code for number, code in enumerate(codes)}
    path = tmp_path / "codes.safetensors"
    BinaryCode.save_all(path, named)
    loaded = BinaryCode.load_all(path)
    assert list(loaded) == list(named)
    for name, code in named.items():
        assert loaded[name] == code
        assert loaded[name].effective_bits == code.effective_bits
        np.testing.assert_array_equal(loaded[name].dequantize(), code.dequantize())
        code.save(path)
        assert BinaryCode.load(path) == code
    assert [p.name for p in tmp_path.iterdir()] == ["codes.safetensors"]


def test_tensor_files_are_read_by_others_and_mapped(rng, tmp_path):
    others = pytest.importorskip("safetensors.numpy")
    code = cubin.quantize(rng.normal(size=(16, 33)).astype(np.float16), 2, channel_axis=0)
    code.save(tmp_path / "code.safetensors")
    tensors = others.load_file(tmp_path / "code.safetensors")
    assert sorted(tensors) == ["bits", "planes", "scales"]
    np.testing.assert_array_equal(tensors["planes"], code.planes)
    np.testing.assert_array_equal(tensors["scales"], code.scales)
    loaded = BinaryCode.load(tmp_path / "code.safetensors")
    assert not loaded.planes.flags.writeable
    assert not loaded.planes.flags.owndata


def test_arguments_of_save_all(codes, tmp_path):
    with pytest.raises(ValueError, match=r"end on \.safetensors"):
        BinaryCode.save_all(tmp_path / "codes.npz", {"a": codes[0]})
    for wrong in ({1: codes[0]}, {"a": codes[0].scales}, [codes[0]], codes[0]):
        with pytest.raises(TypeError, match="names to codes"):
            BinaryCode.save_all(tmp_path / "a.safetensors", wrong)
    BinaryCode.save_all(tmp_path / "none.safetensors", {})
    assert BinaryCode.load_all(tmp_path / "none.safetensors") == {}
    with pytest.raises(ValueError, match="holds 0 codes"):
        BinaryCode.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("kind", ["elements", "few", "rows", "columns", "groups"])
def test_files_take_what_effective_bits_promise(kind, suffix, rng, tmp_path):
    shape = (500, 1000)
    bits = {
        "elements": rng.choice(4, shape, p=[0.1, 0.5, 0.3, 0.1]),
        "few": 1 + (rng.random(shape) < 0.1),
        "rows": rng.integers(1, 4, (500, 1)),
        "columns": rng.integers(0, 3, 1000),
        "groups": rng.integers(0, 3, (500, 10)).repeat(100, axis=1),
    }[kind]
    code = cubin.quantize(rng.normal(size=shape).astype(np.float32), bits, channel_axis=0)
    path = tmp_path / f"code.{suffix}"
    code.save(path)
    assert 8 * path.stat().st_size < 1.05 * code.effective_bits * math.prod(shape)
    loaded = BinaryCode.load(path)
    assert loaded == code
    assert loaded.bits.shape == code.bits.shape


def test_scales_of_levels_that_no_element_has(tmp_path):
    """They are left out of a file only where they are 0."""
    planes = np.zeros((2, 1, 2), np.uint8)
    for unused in (0, 3, np.nan):
        scales = np.array([[1.0, 2], [3, unused]])
        code = BinaryCode(scales, planes, [[2], [1]], shape=(2, 3), channel_axis=0)
        code.save(tmp_path / "code.npz")
        assert BinaryCode.load(tmp_path / "code.npz") == code


def test_the_first_levels(codes, host):
    for code in codes:
        for levels in range(len(code.planes) + 1):
            cut = code.truncate(levels)
            assert np.shares_memory(cut.planes, code.planes) or not cut.planes.size
            bits = np.minimum(code.bits, levels)
            expected = BinaryCode.from_signs(
                code.scales[:levels], code.signs[:levels], bits,
                channel_axis=code.channel_axis, group_size=code.group_size, shift=code.shift,
            )  # fmt: skip
            assert cut == expected
            np.testing.assert_array_equal(cut.dequantize(), expected.dequantize())
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=r"levels must lie in 0 \.\. 3"):
            codes[0].truncate(wrong)
    with pytest.raises(TypeError, match="levels"):
        codes[0].truncate(1.0)


@pytest.mark.parametrize("given", [{}, {"channel_axis": 0}, {"group_size": 32}, {"group_size": 48}])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_binary_coding_quantization(given, dtype, xp, host, rng):
    """The words by the definition, and back without a loss."""
    x = rng.normal(size=(5, 96)).astype(dtype)
    code = cubin.quantize(xp.asarray(x), 3, **given)
    planes, scales = code.to_bcq()
    groups = 96 // given.get("group_size", 96)
    assert planes.shape == (3, 3, 5)
    assert scales.shape == (groups, 3, 5)
    assert planes.dtype == np.uint32
    bits = (host(code.signs) > 0).reshape(3, 5, 3, 32).astype(object)
    words = (bits * [1 << t for t in range(32)]).sum(axis=3).transpose(2, 0, 1)
    np.testing.assert_array_equal(host(planes), words.astype(np.uint32))
    decoded = np.zeros(x.shape, np.float64)
    for level in range(3):
        spread = host(scales)[:, level].T.repeat(96 // groups, axis=1)
        decoded += spread.astype(float) * host(code.signs)[level]
    np.testing.assert_allclose(host(code.dequantize()), decoded, rtol=2e-3, atol=2e-3)
    back = BinaryCode.from_bcq(planes, scales)
    np.testing.assert_array_equal(host(back.planes), host(code.planes))
    np.testing.assert_array_equal(host(back.dequantize()), host(code.dequantize()))
    if given:
        assert back == code


def test_arguments_of_binary_coding_quantization(rng):
    x = rng.normal(size=(4, 64))
    for code in (
        cubin.quantize(x[0], 1),
        cubin.quantize(x[:, :40], 1),
        cubin.quantize(x, np.full((4, 1), 2)),
        cubin.quantize(x, 1, channel_axis=1),
    ):
        with pytest.raises(ValueError, match=r"this form|those of lines"):
            code.to_bcq()
    planes, scales = cubin.quantize(x, 2, channel_axis=0).to_bcq()
    with pytest.raises(TypeError, match="planes must be uint32"):
        BinaryCode.from_bcq(planes.astype(np.int64), scales)
    for wrong in (scales[0], scales[:, :1], scales[..., :3]):
        with pytest.raises(ValueError, match="must be"):
            BinaryCode.from_bcq(planes, wrong)
    for wrong in (scales[:0], scales.repeat(3, axis=0)):
        with pytest.raises(ValueError, match="groups do not divide"):
            BinaryCode.from_bcq(planes, wrong)


@pytest.mark.parametrize("shape", [(256,), (3, 128), (2, 3, 256), (0, 128)])
def test_blocks_of_ggml(shape, xp, host, rng):
    """A scale in float16, and bit j % 8 of byte j / 8 for the sign of element j."""
    code = cubin.quantize(xp.asarray(rng.normal(size=shape).astype(np.float16)), 1, group_size=128)
    blocks = code.to_q1_0()
    assert blocks.shape == (*shape[:-1], shape[-1] // 128 * 18)
    decoded = np.zeros((code.scales.size, 128), np.float16)
    for number, block in enumerate(host(blocks).reshape(-1, 18)):
        (scale,) = block[:2].view(np.float16)
        for j in range(128):
            decoded[number, j] = scale if block[2 + j // 8] >> j % 8 & 1 else -scale
    np.testing.assert_array_equal(host(code.dequantize()), decoded.reshape(shape))
    assert BinaryCode.from_q1_0(blocks) == code


def test_arguments_of_blocks_of_ggml(rng):
    x = rng.normal(size=(2, 256)).astype(np.float16)
    for code in (
        cubin.quantize(x, 2, group_size=128),
        cubin.quantize(x, 1, group_size=64),
        cubin.quantize(x, 1, channel_axis=0),
        cubin.quantize(x.astype(np.float32), 1, group_size=128),
        cubin.quantize(x, np.ones((2, 1), int), group_size=128),
    ):
        with pytest.raises(ValueError, match="groups of 128"):
            code.to_q1_0()
    with pytest.raises(TypeError, match="uint8"):
        BinaryCode.from_q1_0(np.zeros(18))
    for wrong in (np.zeros(19, np.uint8), np.uint8(0)):
        with pytest.raises(ValueError, match="18 bytes"):
            BinaryCode.from_q1_0(wrong)


def test_lines_of_a_code(codes, tmp_path):
    for code in codes:
        if len(code.shape) < 2:
            with pytest.raises(ValueError, match="one line"):
                code[:]
            continue
        for lines in (slice(1, 3), slice(None), slice(-1, None), slice(2, 1)):
            part = code[lines]
            assert part.shape == (len(range(code.shape[0])[lines]), *code.shape[1:])
            assert np.shares_memory(part.planes, code.planes) or not part.planes.size
            np.testing.assert_array_equal(part.dequantize(), code.dequantize()[lines])
            np.testing.assert_array_equal(part.signs, code.signs[:, lines])
            part.save(tmp_path / "part.npz")
            assert BinaryCode.load(tmp_path / "part.npz") == part
        with pytest.raises(ValueError, match="without a step"):
            code[::2]
        for wrong in (0, (slice(1), slice(1)), None, [0]):
            with pytest.raises(TypeError, match="a slice of its first axis"):
                code[wrong]


def test_lines_of_a_device_code(xp, host, rng):
    x = rng.normal(size=(70, 13))
    code = cubin.quantize(xp.asarray(x), rng.integers(0, 3, x.shape), channel_axis=0)
    np.testing.assert_array_equal(host(code[3:68].dequantize()), host(code.dequantize())[3:68])
    np.testing.assert_array_equal(host(code.truncate(1).signs), host(code.signs)[:1])


def test_files_are_as_readable_as_others(codes, tmp_path):
    (tmp_path / "other").write_bytes(b"")
    codes[0].save(tmp_path / "code.npz")
    assert (tmp_path / "code.npz").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_code_keeps_a_map_of_its_own(rng):
    bits = rng.integers(0, 4, 9, dtype=np.uint8)
    code, same = (cubin.quantize(rng.normal(size=9), bits) for _ in range(2))
    bits[:] = 0
    assert code.bits.max() > 0
    assert not np.shares_memory(code.bits, same.bits)


def test_files_take_one_bit_per_sign(rng, tmp_path):
    code = cubin.quantize(rng.normal(size=(256, 1024)).astype(np.float32), 2, channel_axis=0)
    code.save(tmp_path / "code.npz")
    size = (tmp_path / "code.npz").stat().st_size
    assert 8 * size == pytest.approx(code.effective_bits * 256 * 1024, rel=0.02)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, (1 << 16) - 1, (1 << 16) + 8, (3 << 16) + 5])
@pytest.mark.parametrize("mapped", [False, True])
def test_files_of_any_size(rng, tmp_path, size, mapped):
    bits = rng.integers(0, 4, (1, size)) if mapped else 3
    signs = rng.choice(np.array([-1, 1], np.int8), (3, 2, size))
    signs *= np.arange(3)[:, None, None] < bits
    code = BinaryCode.from_signs(np.ones((3, 2), np.float32), signs, bits, channel_axis=0)
    code.save(tmp_path / "code.npz")
    loaded = BinaryCode.load(tmp_path / "code.npz")
    np.testing.assert_array_equal(loaded.signs, signs)
    assert loaded.planes.flags.writeable
    assert loaded == code


def test_a_file_is_replaced_only_by_a_whole_one(rng, tmp_path, monkeypatch):
    path = tmp_path / "code.npz"
    old = cubin.quantize(rng.normal(size=10), 1)
    old.save(path)

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(np.lib.format, "write_array", fail)
    with pytest.raises(OSError, match="disk full"):
        cubin.quantize(rng.normal(size=10), 2).save(path)
    assert BinaryCode.load(path) == old
    assert [p.name for p in tmp_path.iterdir()] == ["code.npz"]


@pytest.mark.parametrize("mode", [0o640, 0o600, 0o664, 0o444])
def test_a_file_keeps_its_permissions(codes, tmp_path, mode):
    path = tmp_path / "code.npz"
    codes[0].save(path)
    path.chmod(mode)
    codes[1].save(path)
    assert path.stat().st_mode & 0o777 == mode
    assert BinaryCode.load(path) == codes[1]


def test_an_unfinished_file_is_no_more_readable_than_the_old_one(codes, tmp_path, monkeypatch):
    path = tmp_path / "code.npz"
    codes[0].save(path)
    path.chmod(0o600)
    modes, write_array = [], np.lib.format.write_array

    def look(*arguments, **options):
        modes.extend(part.stat().st_mode & 0o777 for part in tmp_path.glob("*.part"))
        write_array(*arguments, **options)

    monkeypatch.setattr(np.lib.format, "write_array", look)
    codes[1].save(path)
    assert set(modes) == {0o600}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
def test_a_file_keeps_its_owner(codes, tmp_path):
    path = tmp_path / "code.npz"
    codes[0].save(path)
    os.chown(path, 12, 34)
    path.chmod(0o640)
    codes[1].save(path)
    found = path.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (12, 34, 0o640)


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_symbolic_links_stay(codes, tmp_path, monkeypatch, there, relative):
    target = tmp_path / "store" / "code.npz"
    target.parent.mkdir()
    if there:
        codes[0].save(target)
    (tmp_path / "second").symlink_to("store/code.npz" if relative else target)
    (tmp_path / "first.npz").symlink_to("second")
    monkeypatch.chdir(tmp_path)
    codes[1].save("first.npz")
    assert (tmp_path / "first.npz").is_symlink()
    assert (tmp_path / "second").is_symlink()
    assert not target.is_symlink()
    assert BinaryCode.load(target) == codes[1]
    assert {p.name for p in tmp_path.rglob("*")} == {"first.npz", "second", "store", "code.npz"}


def test_links_in_a_circle_and_what_is_no_file(codes, tmp_path):
    (tmp_path / "one.npz").symlink_to("two.npz")
    (tmp_path / "two.npz").symlink_to("one.npz")
    with pytest.raises(OSError, match="symbolic links"):
        codes[0].save(tmp_path / "one.npz")
    (tmp_path / "folder.npz").mkdir()
    os.mkfifo(tmp_path / "pipe.npz")
    for name in ("folder.npz", "pipe.npz"):
        with pytest.raises(ValueError, match="path must be that of a regular file"):
            codes[0].save(tmp_path / name)
    found = sorted(p.stem for p in tmp_path.iterdir())
    assert found == ["folder", "one", "pipe", "two"]


def test_names_of_another_format_and_missing_folders(codes, tmp_path):
    for name in ("code.pt", "model.layers.0", "code.NPZ"):
        with pytest.raises(ValueError, match=rf"end on \.npz or \.safetensors, got .*{name}"):
            codes[0].save(tmp_path / name)
    for name in ("no/code.npz", "no/code.safetensors"):
        with pytest.raises(FileNotFoundError, match=name) as caught:
            codes[0].save(tmp_path / name)
        assert caught.value.filename == str(tmp_path / name)
    assert not list(tmp_path.iterdir())
    codes[0].save(tmp_path / "code")
    assert zipfile.is_zipfile(tmp_path / "code")


def test_a_code_is_no_array(codes):
    for wrong in (np.asarray, np.array, np.ravel, lambda code: np.asarray(code, np.float32)):
        with pytest.raises(TypeError, match=r"pass code\.dequantize\(\)"):
            wrong(codes[0])
    both = np.array(codes[:2], dtype=object)
    assert both.shape == (2,)
    assert both[1] is codes[1]
    with pytest.raises(TypeError, match=r"x is a BinaryCode: pass x\.dequantize\(\)"):
        cubin.sign(codes[0])


SAVE_HALF = """
import sys, numpy as np, cubin
def stop(*arguments, **options):
    write_array(*arguments, **options)
    format.write_array = write_array
    print("writing", flush=True)
    sys.stdin.readline()
format = np.lib.format
write_array, format.write_array = format.write_array, stop
cubin.quantize(np.arange(4.0), 2).save(sys.argv[1])
"""


@contextlib.contextmanager
def process_that_saves(path):
    """A process that is in the middle of writing the file, until it is given a line."""
    root = str(Path(cubin.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE_HALF, str(path)],
        env=os.environ | {"PYTHONPATH": root}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with process:
        try:
            assert process.stdout.readline() == "writing\n"
            yield process
        finally:
            process.kill()


def test_what_a_killed_process_leaves_goes_with_the_next_file(codes, tmp_path):
    with process_that_saves(tmp_path / "another.npz"):
        pass
    others = {"notes.part", "0123456789abcdef.part", "cubin-0123456789abcdef.part.txt"}
    for name in others:
        (tmp_path / name).write_text("not of cubin")
    assert len(list(tmp_path.iterdir())) == 4
    codes[0].save(tmp_path / "code.npz")
    assert {p.name for p in tmp_path.iterdir()} == {"code.npz", *others}


def test_what_a_live_process_writes_stays(codes, tmp_path):
    with process_that_saves(tmp_path / "theirs.npz") as process:
        [part] = tmp_path.glob("*.part")
        codes[0].save(tmp_path / "mine.npz")
        codes[1].save(tmp_path / "theirs.npz")
        assert list(tmp_path.glob("*.part")) == [part]
        process.communicate("\n")
        assert process.returncode == 0
    assert BinaryCode.load(tmp_path / "mine.npz") == codes[0]
    assert BinaryCode.load(tmp_path / "theirs.npz") == cubin.quantize(np.arange(4.0), 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.npz", "theirs.npz"]


def test_threads_that_save_at_once(codes, tmp_path):
    """Every file is whole, whoever comes last, and nothing else is left."""
    expected = codes[:4]

    def save(number):
        for _ in range(20):
            expected[number].save(tmp_path / "shared.npz")
            expected[number].save(tmp_path / f"{number}.npz")
            assert BinaryCode.load(tmp_path / "shared.npz") in expected

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, range(4)))
    for number, code in enumerate(expected):
        assert BinaryCode.load(tmp_path / f"{number}.npz") == code
    assert len(list(tmp_path.iterdir())) == 5


def test_a_part_that_is_taken_for_abandoned_before_it_is_locked(codes, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    flock, taken = fcntl.flock, []

    def late(file, how):
        if how == fcntl.LOCK_EX and not taken:
            taken.append(file.name)
            os.unlink(file.name)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    codes[0].save(tmp_path / "code.npz")
    assert len(taken) == 1
    assert BinaryCode.load(tmp_path / "code.npz") == codes[0]


def test_file_systems_without_locks(codes, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError("Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "cubin-0123456789abcdef.part").write_text("perhaps being written")
    codes[0].save(tmp_path / "code.npz")
    assert BinaryCode.load(tmp_path / "code.npz") == codes[0]
    assert len(list(tmp_path.glob("*.part"))) == 1


@pytest.mark.parametrize(
    ("signs", "bits"),
    [
        (np.ones((3, 4)), 2),
        (np.zeros((1, 4)), 1),
        (np.full((1, 4), 3), 1),
        (np.ones((2, 2)), [1, 2]),
    ],
)
def test_signs_that_are_not_those_of_the_map(signs, bits):
    with pytest.raises(ValueError, match="level"):
        BinaryCode.from_signs(np.ones(len(signs)), signs.astype(np.int8), bits)


def test_levels_that_a_file_cannot_hold(tmp_path):
    code = BinaryCode(np.ones(17), np.zeros((17, 1, 1), np.uint8), 1, shape=(4,))
    with pytest.raises(ValueError, match="level"):
        code.save(tmp_path / "code.npz")
    assert not list(tmp_path.iterdir())


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        BinaryCode.load(tmp_path / "none.npz")


def test_truncated_files(tmp_path, rng):
    path = tmp_path / "code.npz"
    cubin.quantize(rng.normal(size=(4, 9)), np.arange(9) % 3, channel_axis=0).save(path)
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="no intact BinaryCode"):
            BinaryCode.load(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.data())
def test_damaged_files_are_refused_or_read_the_same(data, tmp_path):
    path = tmp_path / "code.npz"
    code = cubin.quantize(np.linspace(-1, 1, 21).reshape(3, 7), 2, channel_axis=0)
    code.save(path)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        loaded = BinaryCode.load(path)
    except ValueError:
        return
    # Dates and the like in the archive's own records carry nothing.
    assert loaded == code


LAYOUT = '{"format": "cubin.BinaryCode/1", "shape": [4], "channel_axis": null, "group_size": null}'


def archive(path, **replaced):
    """A file whose members are consistent but for those replaced."""
    layout = replaced.pop("layout", {})
    if isinstance(layout, dict):
        layout = np.frombuffer(json.dumps(json.loads(LAYOUT) | layout).encode(), np.uint8)
    members = {
        "layout": layout,
        "scales": np.ones(1),
        "bits": np.uint8(1),
        "signs": np.zeros((1, 1), np.uint8),
    } | replaced
    with zipfile.ZipFile(path, "w") as file:
        for name, value in members.items():
            content = io.BytesIO()
            if isinstance(value, bytes):
                content.write(value)
            elif value is not None:
                np.save(content, value)
            if value is not None:
                file.writestr(f"{name}.npy", content.getvalue())
    return path


def header(shape, dtype="|u1"):
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        content, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return content.getvalue()


def test_the_archive_of_these_tests_is_sound(tmp_path):
    np.testing.assert_array_equal(
        BinaryCode.load(archive(tmp_path / "a")).dequantize(), [-1, -1, -1, -1]
    )


@pytest.mark.parametrize(
    "hostile",
    [
        {"layout": {"format": "other"}},
        {"layout": {"shape": [10**15]}},
        {"layout": {"shape": [10**6] * 5}},
        {"layout": {"shape": [-4]}},
        {"layout": {"shape": [4.0]}},
        {"layout": {"shape": "4"}},
        {"layout": {"shape": [1] * 70 + [4]}},
        {"layout": {"channel_axis": 3}},
        {"layout": {"channel_axis": "0"}},
        {"layout": {"group_size": 3}},
        {"scales": np.ones(3)},
        {"scales": np.ones((1, 2))},
        {"scales": np.ones(1, int)},
        {"scales": np.ones(1, np.uint16)},
        {"scales": np.ones(1, np.uint16), "layout": {"scales": "float16"}},
        {"scales": np.ones(1, np.uint8), "layout": {"scales": "bfloat16"}},
        {"scales": np.ones(1, np.float16), "layout": {"scales": "bfloat16"}},
        {"scales": np.ones((1, 2), np.uint16), "layout": {"scales": "bfloat16"}},
        {"scales": np.ones(1, bfloat16), "layout": {"scales": "bfloat16"}},
        {"layout": {"scales": ["bfloat16"]}},
        {"layout": {"scales": False}},
        {"scales": np.ones(40), "signs": np.zeros((40, 1), np.uint8)},
        {"bits": np.uint8(7)},
        {"bits": np.ones(3, np.uint8)},
        {"bits": np.ones(4, np.int64)},
        {"bits": None},
        {"signs": np.zeros((1, 7), np.uint8)},
        {"signs": header((10**15,))},
        {"signs": header((1, 1)) + b"12"},
        {"signs": header((1, 1), "|O") + b"1"},
        {"signs": b"\x93NUMPY\x03\x00"},
        {"signs": b""},
        {"signs": header((1, 1)).replace(b"(1, 1), }", b"(1, 1),  ") + b"1"},
        {
            "layout": {"shape": [2**55]},
            "scales": np.ones(0),
            "bits": np.uint8(0),
            "signs": np.ones((0, 2**52), np.uint8),
        },
        {"scales": np.array([object()], object)},
        {"layout": {"shape": [True, 4]}},
        {"layout": {"shape": [[4]]}},
        {"layout": {"shape": {"4": 4}}},
        {"layout": {"shape": None}},
        {"layout": {"shape": [float("nan")]}},
        {"layout": {"shape": ["4"]}},
        {"layout": {"shape": [-2, -2]}},
        {"layout": {"shape": [10**4000]}},
        {"layout": {"channel_axis": True}},
        {"layout": {"channel_axis": [0, 0]}},
        {"layout": {"channel_axis": [[0]]}},
        {"layout": {"channel_axis": 0.0}},
        {"layout": {"channel_axis": {"0": 0}}},
        {"layout": {"group_size": True}},
        {"layout": {"group_size": 0}},
        {"layout": {"group_size": -2}},
        {"layout": {"group_size": 2, "channel_axis": 0}},
        {"layout": {"format": ["cubin.BinaryCode/1"]}},
        {"layout": np.frombuffer(b"[" * 60_000, np.uint8)},
        {"layout": np.frombuffer(b'{"shape":' * 7_000, np.uint8)},
        {"layout": np.frombuffer(LAYOUT.encode() + b" " * (1 << 16), np.uint8)},
        {"layout": np.frombuffer(LAYOUT.replace("{", '{"shape": [9], ').encode(), np.uint8)},
        {"layout": np.frombuffer(b"4", np.uint8)},
        {"layout": np.frombuffer(b"\xff\xfe\xfd", np.uint8)},
        {"layout": np.zeros(0, np.uint8)},
        {"signs": header((True, True)) + b"1"},
        {"signs": header((-1, -1)) + b"1"},
        {"signs": header((-1, 1)) + b"1"},
        {"signs": header((1.0, 1)) + b"1"},
        {"signs": header((1, 1), "|b1") + b"1"},
        {"signs": header((1, 1), "|i1") + b"1"},
        {"signs": header((1, 1), ("|u1", (1,))) + b"1"},
        {"signs": header("-" * 9000 + "1") + b"1"},
        {"bits": np.bool_(True)},
        {"bits": np.float64(1)},
        {"bits": np.ones((1, 1, 4), np.uint8)},
        {"scales": np.asfortranarray(np.ones((1, 2, 2))), "layout": {"shape": [2, 2]}},
        {"scales": np.float64(1)},
        {"scales": np.ones(1, complex)},
        {"extra": np.zeros(3)},
    ],
)
def test_hostile_files(tmp_path, hostile):
    with pytest.raises(ValueError, match="no intact BinaryCode"):
        BinaryCode.load(archive(tmp_path / "hostile", **hostile))


@pytest.mark.parametrize("order", ["<", ">"])
def test_bfloat16_is_read_by_its_patterns(tmp_path, order):
    scales = np.array([0x4049]).astype(f"{order}u2")
    code = BinaryCode.load(archive(tmp_path / "a", scales=scales, layout={"scales": "bfloat16"}))
    assert code.dtype == bfloat16
    assert code.scales.tolist() == [3.140625]


def test_a_process_that_has_no_bfloat16_yet_loads_a_file_of_it(tmp_path):
    cubin.quantize(np.ones(3, bfloat16), 1).save(tmp_path / "code.npz")
    source = (
        "import sys, cubin; assert 'ml_dtypes' not in sys.modules; "
        "print(cubin.BinaryCode.load(sys.argv[1]).dtype)"
    )
    command = [sys.executable, "-c", source, str(tmp_path / "code.npz")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "bfloat16"


def tensor_file(path, **replaced):
    """A ``.safetensors`` file that is consistent but for what is replaced."""
    layout = {"shape": [4], "channel_axis": None, "group_size": None, "levels": 1}
    layout |= replaced.pop("layout", {})
    metadata = {"format": "cubin.BinaryCode/2", "codes": json.dumps({"": layout})}
    entries = {
        "__metadata__": metadata | replaced.pop("metadata", {}),
        "scales": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]},
        "bits": {"dtype": "U8", "shape": [], "data_offsets": [8, 9]},
        "planes": {"dtype": "U8", "shape": [1, 1, 1], "data_offsets": [9, 10]},
    }
    data = replaced.pop("data", np.ones(1).tobytes() + b"\1\0")
    for name, entry in replaced.items():
        entries[name] = entries.get(name, {}) | entry if isinstance(entry, dict) else entry
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_the_tensor_file_of_these_tests_is_sound(tmp_path):
    loaded = BinaryCode.load(tensor_file(tmp_path / "a.safetensors"))
    np.testing.assert_array_equal(loaded.dequantize(), [-1, -1, -1, -1])


@pytest.mark.parametrize(
    "hostile",
    [
        {"metadata": {"format": "cubin.BinaryCode/3"}},
        {"metadata": {"format": None}},
        {"metadata": {"codes": "[]"}},
        {"metadata": {"codes": "{"}},
        {"metadata": {"codes": '{"": {}, "": {}}'}},
        {"layout": {"shape": [10**15]}},
        {"layout": {"shape": [-4]}},
        {"layout": {"shape": [4.0]}},
        {"layout": {"shape": [1] * 70 + [4]}},
        {"layout": {"shape": [9]}},
        {"layout": {"levels": 2}},
        {"layout": {"levels": 17}},
        {"layout": {"levels": -1}},
        {"layout": {"levels": True}},
        {"layout": {"channel_axis": 3}},
        {"layout": {"group_size": 3}},
        {"layout": {"map": [2**40], "shape": [2**40], "used": True}},
        {"layout": {"map": [-4], "used": True}},
        {"layout": {"map": [4], "used": True}},
        {"layout": {"map": [1, 1, 4], "used": True}},
        {"scales": {"dtype": "I64"}},
        {"scales": {"dtype": "U8"}},
        {"scales": {"shape": [-1]}},
        {"scales": {"shape": [2]}},
        {"scales": {"data_offsets": [0, 16]}},
        {"planes": {"data_offsets": [9, 11]}},
        {"planes": {"data_offsets": [8, 9]}},
        {"planes": {"data_offsets": [10, 9]}},
        {"planes": {"shape": [1, 1]}},
        {"planes": {"shape": [2**40, 1, 1]}},
        {"bits": {"shape": [1]}},
        {"bits": 7},
        {"extra": {"dtype": "U8", "shape": [0], "data_offsets": [10, 10]}},
        {"data": b""},
        {"data": np.ones(1).tobytes() + b"\1\0\0"},
        {"data": np.ones(1).tobytes() + b"\2\0"},
        {"data": np.ones(1).tobytes() + b"\1\20"},
    ],
)
def test_hostile_tensor_files(tmp_path, hostile):
    path = tensor_file(tmp_path / "hostile.safetensors", **hostile)
    with memory_below(2e6), pytest.raises(ValueError, match="no intact BinaryCode"):
        BinaryCode.load(path)


def test_headers_of_tensor_files(tmp_path):
    path = tmp_path / "a.safetensors"
    sound = tensor_file(path).read_bytes()
    for content in (
        b"",
        sound[:7],
        struct.pack("<Q", 2**63) + sound[8:],
        struct.pack("<Q", len(sound)) + sound[8:],
        sound.replace(b'"bits"', b'"scales"', 1),
        sound[:-1],
    ):
        path.write_bytes(content)
        with memory_below(2e6), pytest.raises(ValueError, match="no intact BinaryCode"):
            BinaryCode.load(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.data())
def test_damaged_maps_give_a_code_or_a_value_error(data, tmp_path):
    """There are no checksums in tensor files: damage may pass, but nothing else is raised."""
    path = tmp_path / "code.safetensors"
    x, bits = np.linspace(-1, 1, 60).reshape(6, 10), np.arange(60).reshape(6, 10) % 4
    cubin.quantize(x, bits, channel_axis=0).save(path)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        BinaryCode.load(path)


def test_a_map_that_its_bytes_cannot_hold(tmp_path):
    """A kilobyte stands for half a million entries, and no more."""
    layout = {"shape": [2**30], "map": [2**30], "levels": 1, "used": True}
    path = tensor_file(
        tmp_path / "bomb.safetensors",
        layout=layout,
        scales={"shape": [0], "data_offsets": [0, 0]},
        bits={"shape": [1000], "data_offsets": [0, 1000]},
        planes={"shape": [0], "data_offsets": [1000, 1000]},
        data=bytes(1000),
    )
    with memory_below(2e6), pytest.raises(ValueError, match="stands for up to"):
        BinaryCode.load(path)
    code = cubin.quantize(np.ones(1 << 20), np.zeros(1 << 20, int) + (np.arange(1 << 20) == 9))
    code.save(tmp_path / "code.safetensors")
    assert (tmp_path / "code.safetensors").stat().st_size < 4000
    assert BinaryCode.load(tmp_path / "code.safetensors") == code


def test_compressed_members_are_refused(tmp_path):
    path = archive(tmp_path / "stored")
    with zipfile.ZipFile(path) as stored:
        members = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    with pytest.raises(ValueError, match="compressed"):
        BinaryCode.load(tmp_path / "packed")


@pytest.mark.parametrize("repeated", ["layout", "scales", "bits", "signs"])
@pytest.mark.parametrize("name", ["{}.npy", "{}.npy\0", "{}"])
def test_members_of_one_name_are_refused(tmp_path, repeated, name):
    path = archive(tmp_path / "sound")
    with zipfile.ZipFile(path) as sound:
        content = sound.read(f"{repeated}.npy")
    with zipfile.ZipFile(path, "a") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file.writestr(name.format(repeated), content)
    with pytest.raises(ValueError, match="not one each of"):
        BinaryCode.load(path)


def test_the_order_of_members_does_not_matter(tmp_path):
    with zipfile.ZipFile(archive(tmp_path / "sound")) as sound:
        members = [(name, sound.read(name)) for name in sound.namelist()]
    with zipfile.ZipFile(tmp_path / "other", "w") as other:
        for name, content in reversed(members):
            other.writestr(name, content)
    assert BinaryCode.load(tmp_path / "other") == BinaryCode.load(tmp_path / "sound")


def test_other_byte_orders(tmp_path):
    swapped = BinaryCode.load(archive(tmp_path / "a", scales=np.array([2.5], ">f4")))
    assert swapped.dtype == np.float32
    np.testing.assert_array_equal(swapped.dequantize(), [-2.5] * 4)


def test_encrypted_members_are_refused(tmp_path):
    path = archive(tmp_path / "code.npz")
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = content.find(mark)
        while at >= 0:
            content[at + offset] |= 1
            at = content.find(mark, at + 4)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="encrypted"):
        BinaryCode.load(path)


@contextlib.contextmanager
def memory_below(most):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("shape", "axis"), [([2**40], None), ([2**20, 2**21], 0), ([0, 2**40], 1), ([2**33, 0], None)]
)
def test_shapes_of_which_a_file_holds_nothing(tmp_path, shape, axis):
    size = math.prod(shape)
    scales = () if axis is None else (shape[axis],)
    path = archive(
        tmp_path / "forged",
        layout={"shape": shape, "channel_axis": axis},
        scales=header((0, *scales), "<f8"),
        bits=np.uint8(0),
        signs=header((0, -(-size // 8))),
    )
    with memory_below(2e6), pytest.raises(ValueError, match="without levels"):
        BinaryCode.load(path)


def test_codes_without_levels_take_no_memory(tmp_path):
    signs = np.empty((0, 1 << 16, 1 << 16), np.int8)
    with memory_below(2e6):
        code = BinaryCode.from_signs(np.ones((0, 1 << 16), np.float32), signs, 0, channel_axis=0)
        code.save(tmp_path / "code.npz")
        assert BinaryCode.load(tmp_path / "code.npz").shape == code.shape
    larger = BinaryCode.from_signs(np.ones(0, np.float32), np.empty((0, (1 << 32) + 1), np.int8), 0)
    with pytest.raises(ValueError, match="without levels"):
        larger.save(tmp_path / "larger.npz")


def test_sizes_beyond_the_end_of_the_file(tmp_path):
    size = 1 << 28
    signs = header((1, size))
    path = archive(tmp_path / "forged", layout={"shape": [8 * size]}, signs=signs)
    content = bytearray(path.read_bytes())
    # The sizes in the archive's directory, whose last entry is that of the signs.
    entry = content.rfind(b"PK\1\2")
    content[entry + 20 : entry + 28] = struct.pack("<2L", *[len(signs) + size] * 2)
    path.write_bytes(content)
    with memory_below(2e6), pytest.raises(ValueError, match="beyond the file's end"):
        BinaryCode.load(path)


def test_equality(rng):
    x = rng.normal(size=(4, 6))
    code = cubin.quantize(x, 2, channel_axis=0)
    assert code == cubin.quantize(x.copy(), 2, channel_axis=0)
    assert code != cubin.quantize(x, 2)
    assert code != cubin.quantize(x, 2, channel_axis=1)
    assert code != cubin.quantize(x, 3, channel_axis=0)
    assert code != cubin.quantize(-x, 2, channel_axis=0)
    assert code != cubin.quantize(2 * x, 2, channel_axis=0)
    assert code != cubin.quantize(x.astype(np.float32), 2, channel_axis=0)
    assert code != cubin.quantize(x, np.full(6, 2), channel_axis=0)
    assert code != "code"
    with pytest.raises(TypeError, match="unhashable"):
        hash(code)


def test_payload_and_effective_bits():
    x = np.ones((64, 32), np.float32)
    assert cubin.quantize(x, 2).payload_bits == 2
    assert cubin.quantize(x, 2).effective_bits == 2 + 2 * 32 / (64 * 32)
    assert cubin.quantize(x, 2, channel_axis=0).effective_bits == 2 + 2 * 32 / 32
    for narrow in (np.float16, bfloat16):
        assert cubin.quantize(x.astype(narrow), 1, group_size=8).effective_bits == 1 + 16 / 8
    # A map of one entry per element costs its entropy for every element ...
    halves = np.tile([1, 3], (64, 16))
    code = cubin.quantize(x, halves)
    assert code.payload_bits == 2
    assert code.effective_bits == 2 + 1 + 3 * 32 / (64 * 32)
    # ... one of an entry per row only once per row, and levels nobody has need no scale.
    code = cubin.quantize(x, np.array([1, 3] * 32)[:, None], channel_axis=0)
    assert code.payload_bits == 2
    assert code.effective_bits == pytest.approx(2 + 1 / 32 + 2 * 32 / 32)
    uneven = np.array([1] * 48 + [2] * 16)[:, None]
    entropy = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    code = cubin.quantize(x, uneven)
    assert code.effective_bits == pytest.approx(1.25 + entropy / 32 + 2 * 32 / 2048)
    empty = cubin.quantize(np.ones((0, 3)), 2)
    assert (empty.payload_bits, empty.effective_bits) == (0, 0)


def test_displays_tell_what_matters(codes):
    text = repr(codes[1])
    for fact in ("(4, 3, 6)", "float32", "per channel, axis 0", "4 per level", "payload bits: 2"):
        assert fact in text
    assert "per group of 3" in repr(codes[3])
    assert "map of shape (4, 3, 6)" in repr(codes[3])
    for code in codes:
        page = code._repr_html_()
        assert page.startswith("<table>")
        assert "effective bits" in page


@pytest.mark.kernels
def test_a_display_of_a_device_map_does_not_look_at_it(device):
    code = cubin.quantize(device.asarray(np.ones(4)), np.array([1, 2, 1, 2]))
    assert code.payload_bits == 1.5
    type(code).payload_bits, kept = property(lambda _: 1 / 0), type(code).payload_bits
    try:
        assert "payload" not in repr(code)
    finally:
        type(code).payload_bits = kept


def test_device_codes(xp, host, rng, tmp_path):
    x = rng.normal(size=(3, 8)).astype(np.float32)
    code = cubin.quantize(xp.asarray(x), np.arange(8) % 3, channel_axis=0)
    code.save(tmp_path / "code.npz")
    loaded = BinaryCode.load(tmp_path / "code.npz")
    np.testing.assert_array_equal(loaded.scales, host(code.scales))
    np.testing.assert_array_equal(loaded.signs, host(code.signs))
    np.testing.assert_array_equal(loaded.dequantize(), host(code.dequantize()))
    assert code.effective_bits == loaded.effective_bits
    assert code == cubin.quantize(xp.asarray(x), np.arange(8) % 3, channel_axis=0)
    assert (code == loaded) == (xp is np)


def test_arguments_of_the_constructor():
    scales, planes = np.ones(1), np.ones((1, 1, 1), np.uint8)
    BinaryCode(scales, planes, 1, shape=(3,))
    with pytest.raises(TypeError, match="planes must be uint8"):
        BinaryCode(scales, planes.astype(int), 1, shape=(3,))
    with pytest.raises(TypeError, match="scales"):
        BinaryCode(np.ones(1, int), planes, 1, shape=(3,))
    with pytest.raises(TypeError, match="shape"):
        BinaryCode(scales, planes, 1, shape=(3.0,))
    with pytest.raises(ValueError, match="negative"):
        BinaryCode(scales, planes, 1, shape=(-3,))
    for shape in [(9,), (3, 2), (1, 9)]:
        with pytest.raises(ValueError, match=r"\(k, \d, \d\), got \(1, 1, 1\)"):
            BinaryCode(scales, planes, 1, shape=shape)
    with pytest.raises(ValueError, match=r"scales have shape \(2,\)"):
        BinaryCode(np.ones(2), planes, 1, shape=(3,))
    with pytest.raises(ValueError, match=r"\(1, 3\)"):
        BinaryCode(scales, planes, 1, shape=(3,), channel_axis=0)
    with pytest.raises(ValueError, match="go up to 2"):
        BinaryCode(scales, planes, 2, shape=(3,))
    with pytest.raises(ValueError, match="broadcast"):
        BinaryCode(scales, planes, [1, 1], shape=(3,))


def test_bits_that_stand_for_no_sign(xp):
    planes = xp.asarray(np.full((2, 1, 1), 9, np.uint8))
    scales = xp.ones(2)
    BinaryCode(scales, planes, 2, shape=(4,))
    BinaryCode(scales, planes, xp.asarray(np.array([2, 0, 1, 2])), shape=(4,))
    with pytest.raises(ValueError, match="beyond the end of a line"):
        BinaryCode(scales, planes, 2, shape=(3,))
    with pytest.raises(ValueError, match="level 1 where bits are not more than 1"):
        BinaryCode(scales, planes, 1, shape=(4,))
    with pytest.raises(ValueError, match="level 1 where bits are not more than 1"):
        BinaryCode(scales, planes, xp.asarray(np.array([2, 0, 1, 1])), shape=(4,))


def test_arguments_of_from_signs(xp):
    scales, signs = xp.ones(1), xp.ones((1, 3), np.int8)
    assert BinaryCode.from_signs(scales, signs, 1).shape == (3,)
    with pytest.raises(TypeError, match="signs must be int8"):
        BinaryCode.from_signs(scales, signs.astype(int), 1)
    with pytest.raises(ValueError, match="0-d"):
        BinaryCode.from_signs(scales, xp.asarray(np.int8(1)), 1)
    with pytest.raises(ValueError, match=r"scales have shape \(2,\)"):
        BinaryCode.from_signs(xp.ones(2), signs, 1)
    with pytest.raises(ValueError, match="go up to 2"):
        BinaryCode.from_signs(scales, signs, 2)


def test_memory_of_a_code(rng):
    x = rng.normal(size=(64, 1001)).astype(np.float32)
    code = cubin.quantize(x, 3, channel_axis=0)
    assert code.planes.shape == (3, 126, 64)
    assert code.nbytes == 3 * 126 * 64 + 3 * 64 * 4
    mapped = cubin.quantize(x, np.full((64, 1), 3), channel_axis=0)
    assert mapped.nbytes == code.nbytes + 64


def test_where_signs_lie_in_planes():
    """Byte j of line i is planes[level, j, i]; the first element is its lowest bit."""
    x = -np.ones((3, 2, 5))
    x[2, 0, 0] = x[2, 1, 3] = x[0, 1, 4] = 1
    code = cubin.quantize(x, 1)
    expected = np.zeros((1, 2, 3), np.uint8)
    expected[0, 0, 2], expected[0, 1, 2], expected[0, 1, 0] = 1, 1, 2
    np.testing.assert_array_equal(code.planes, expected)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_planes_of_every_shape_and_granularity(data):
    """Planes are the signs packed by the definition, and what dequantize adds up."""
    shape = tuple(data.draw(st.lists(st.integers(0, 9), min_size=0, max_size=4), "shape"))
    rng = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    x = rng.normal(size=shape)
    axes = data.draw(st.permutations(range(len(shape))), "axes")
    group_sizes = range(1, 11) if shape else []
    given = data.draw(
        st.sampled_from(
            [{}, *({"channel_axis": tuple(axes[:n])} for n in range(len(shape) + 1))]
            + [{"group_size": g} for g in group_sizes]
        ),
        "granularity",
    )
    bits = data.draw(st.sampled_from([0, 1, 3, rng.integers(0, 4, shape)]), "bits")
    solver = data.draw(st.sampled_from(["greedy", "refined"]), "solver")
    code = cubin.quantize(x, bits, solver=solver, **given)
    np.testing.assert_array_equal(
        code.dequantize(), cubin.multibit(x, bits, solver=solver, **given)
    )
    if code.signs.size:
        lines = code.signs.reshape(len(code.scales), len(x) if x.ndim > 1 else 1, -1)
        packed = np.packbits(lines > 0, axis=2, bitorder="little").transpose(0, 2, 1)
        np.testing.assert_array_equal(code.planes, packed)
    assert BinaryCode.from_signs(code.scales, code.signs, bits, **given) == code
    assert BinaryCode(code.scales, code.planes, bits, shape=shape, **given) == code
