from __future__ import annotations

import io
import json
import math
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


def test_a_file_is_replaced_only_by_a_whole_one(rng, tmp_path, monkeypatch):
    path = tmp_path / "code.npz"
    old = cubin.quantize(rng.normal(size=10), 1)
    old.save(path)

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        cubin.quantize(rng.normal(size=10), 2).save(path)
    assert BinaryCode.load(path) == old
    assert [p.name for p in tmp_path.iterdir()] == ["code.npz"]


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


def archive(path, **replaced):
    """A file whose members are consistent but for those replaced."""
    layout = {"format": "cubin.BinaryCode/1", "shape": [4], "channel_axis": None,
              "group_size": None}  # fmt: skip
    layout |= replaced.pop("layout", {})
    members = {
        "layout": np.frombuffer(json.dumps(layout).encode(), np.uint8),
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
    ],
)
def test_hostile_files(tmp_path, hostile):
    with pytest.raises(ValueError, match="no intact BinaryCode"):
        BinaryCode.load(archive(tmp_path / "hostile", **hostile))


def test_compressed_members_are_refused(tmp_path):
    path = archive(tmp_path / "stored")
    with zipfile.ZipFile(path) as stored:
        members = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    with pytest.raises(ValueError, match="compressed"):
        BinaryCode.load(tmp_path / "packed")


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
    assert cubin.quantize(x.astype(np.float16), 1, group_size=8).effective_bits == 1 + 16 / 8
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
