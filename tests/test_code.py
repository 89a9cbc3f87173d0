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
        BinaryCode(np.ones((3, 2)).T, np.ones((5, 3, 2), np.int8).T, 2, channel_axis=[0]),
        cubin.quantize(x.astype(np.float16), bits[:, :1, :1], channel_axis=0),
        cubin.quantize(x.astype(bfloat16), bits, channel_axis=0),
        cubin.quantize(x.astype(bfloat16), 2),
        cubin.quantize(x.astype(np.float64), 16, channel_axis=0),
        cubin.quantize(x, 0),
        cubin.quantize(1.5, 2),
        cubin.quantize(np.zeros((0, 3)), 2, channel_axis=1),
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
def test_signs_are_packed_in_blocks(rng, tmp_path, size, mapped):
    bits = rng.integers(0, 4, (1, size)) if mapped else 3
    signs = rng.choice(np.array([-1, 1], np.int8), (3, 2, size))
    signs *= np.arange(3)[:, None, None] < bits
    code = BinaryCode(np.ones((3, 2), np.float32), signs, bits, channel_axis=0)
    code.save(tmp_path / "code.npz")
    with np.load(tmp_path / "code.npz") as members:
        expected = np.packbits(signs.reshape(3, -1) > 0, axis=1)
        np.testing.assert_array_equal(members["signs"], expected)
    loaded = BinaryCode.load(tmp_path / "code.npz")
    np.testing.assert_array_equal(loaded.signs, signs)
    assert loaded.signs.flags.writeable
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
    (tmp_path / "first").symlink_to("second")
    monkeypatch.chdir(tmp_path)
    codes[1].save("first")
    assert (tmp_path / "first").is_symlink()
    assert (tmp_path / "second").is_symlink()
    assert not target.is_symlink()
    assert BinaryCode.load(target) == codes[1]
    assert {p.name for p in tmp_path.rglob("*")} == {"first", "second", "store", "code.npz"}


def test_links_in_a_circle_and_what_is_no_file(codes, tmp_path):
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    with pytest.raises(OSError, match="symbolic links"):
        codes[0].save(tmp_path / "one")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(ValueError, match="path must be that of a regular file"):
            codes[0].save(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "one", "pipe", "two"]


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
        (np.ones((17, 4)), 1),
    ],
)
def test_signs_that_a_file_cannot_hold(tmp_path, signs, bits):
    code = BinaryCode(np.ones(len(signs)), signs.astype(np.int8), bits)
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
    cubin.quantize(np.ones(3, bfloat16), 1).save(tmp_path / "code")
    source = (
        "import sys, cubin; assert 'ml_dtypes' not in sys.modules; "
        "print(cubin.BinaryCode.load(sys.argv[1]).dtype)"
    )
    command = [sys.executable, "-c", source, str(tmp_path / "code")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "bfloat16"


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
    path = archive(tmp_path / "code")
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
        code = BinaryCode(np.ones((0, 1 << 16), np.float32), signs, 0, channel_axis=0)
        code.save(tmp_path / "code")
        assert BinaryCode.load(tmp_path / "code").shape == code.shape
    larger = BinaryCode(np.ones(0, np.float32), np.empty((0, (1 << 32) + 1), np.int8), 0)
    with pytest.raises(ValueError, match="without levels"):
        larger.save(tmp_path / "larger")


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
    code.save(tmp_path / "code")
    loaded = BinaryCode.load(tmp_path / "code")
    np.testing.assert_array_equal(loaded.scales, host(code.scales))
    np.testing.assert_array_equal(loaded.signs, host(code.signs))
    np.testing.assert_array_equal(loaded.dequantize(), host(code.dequantize()))
    assert code.effective_bits == loaded.effective_bits
    assert code == cubin.quantize(xp.asarray(x), np.arange(8) % 3, channel_axis=0)
    assert (code == loaded) == (xp is np)


def test_arguments_of_the_constructor():
    scales, signs = np.ones(1), np.ones((1, 3), np.int8)
    BinaryCode(scales, signs, 1)
    with pytest.raises(TypeError, match="signs must be int8"):
        BinaryCode(scales, signs.astype(int), 1)
    with pytest.raises(TypeError, match="scales"):
        BinaryCode(np.ones(1, int), signs, 1)
    with pytest.raises(ValueError, match="first axis"):
        BinaryCode(np.ones(2), signs, 1)
    with pytest.raises(ValueError, match=r"\(1, 3\)"):
        BinaryCode(scales, signs, 1, channel_axis=0)
    with pytest.raises(ValueError, match="go up to 2"):
        BinaryCode(scales, signs, 2)
    with pytest.raises(ValueError, match="broadcast"):
        BinaryCode(scales, signs, [1, 1])
