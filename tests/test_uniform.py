"""Codes of uniform integers: against the integers and their definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16, finfo

import cubin
from cubin import BinaryCode
from tests import reference

DTYPES = [np.float16, bfloat16, np.float32, np.float64]
GRANULARITIES = [{}, {"channel_axis": 0}, {"channel_axis": 1}, {"group_size": 16}]


def spread(of_rows, shape, **where):
    """A number for each element: that of its row."""
    found = np.zeros(shape)
    for row, members in reference.rows(shape, **where).items():
        for index in members:
            found[index] = of_rows[row]
    return found


def integers_of(code):
    """The integers that the signs stand for: the first level has the highest bit."""
    bits = (code.signs > 0).astype(np.int64)
    return sum(bit << (len(bits) - 1 - level) for level, bit in enumerate(bits))


def sample(rng, bits, dtype, **where):
    q = rng.integers(0, 1 << bits, (6, 64))
    # All rows have the whole range.
    if where == {"channel_axis": 1}:
        q[0], q[1] = 0, (1 << bits) - 1
    else:
        q[:, ::16], q[:, 1::16] = 0, (1 << bits) - 1
    scale_shape = cubin.quantize(np.ones(q.shape), 1, **where).scales.shape[1:]
    scale = rng.uniform(0.01, 1, scale_shape).astype(dtype)
    return q, scale, rng.uniform(0, (1 << bits) - 1, scale_shape)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", GRANULARITIES, ids=str)
@pytest.mark.parametrize("between", [False, True])
def test_the_integers_come_back(between, where, dtype, bits, xp, rng):
    """To the bit, and their values within two units in the last place of a row's largest."""
    q, scale, zero = sample(rng, bits, dtype, **where)
    zero = zero if between else np.round(zero).astype(np.int32)
    arrays = (xp.asarray(a) for a in (q, scale, zero))
    code = BinaryCode.from_uniform(*arrays, **where).to_host()
    assert (code.bits, code.dtype, code.shape) == (bits, scale.dtype, q.shape)
    np.testing.assert_array_equal(integers_of(code), q)
    wide = scale.astype(np.float64)
    steps = 2.0 ** (bits - 2 - np.arange(bits)).reshape(-1, *(1,) * scale.ndim)
    np.testing.assert_array_equal(
        code.scales.astype(float), (wide * steps).astype(dtype).astype(float)
    )
    middle = ((1 << bits) - 1) / 2
    expected = spread(wide, q.shape, **where) * (q - spread(zero, q.shape, **where))
    room = float(finfo(dtype).eps)
    np.testing.assert_allclose(
        code.shift.astype(float), wide * (middle - zero), atol=room * (wide * middle).max()
    )
    off = np.abs(code.dequantize().astype(float) - expected)
    for members in reference.rows(q.shape, **where).values():
        index = tuple(np.array(members).T)
        largest = np.abs(expected[index]).max()
        ulp = room * 2.0 ** np.floor(np.log2(largest))
        assert off[index].max() <= 2 * ulp


@settings(max_examples=60)
@given(data=st.data())
def test_integers_of_every_kind(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=3), "shape"))
    rng = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    bits = data.draw(st.integers(1, 16), "bits")
    kind = data.draw(st.sampled_from([np.int16, np.uint16, np.int32, np.uint64, np.int64]))
    q = rng.integers(0, 1 << min(bits, np.iinfo(kind).bits - 1), shape).astype(kind)
    code = BinaryCode.from_uniform(q, np.float64(0.5), 3, bits=bits)
    assert len(code.planes) == bits
    np.testing.assert_array_equal(integers_of(code), q.astype(np.int64))
    np.testing.assert_array_equal(code.dequantize(), 0.5 * (q.astype(float) - 3))
    least = BinaryCode.from_uniform(q, np.float64(0.5), 3)
    assert least.bits == max(1, int(q.max(initial=0)).bit_length())
    np.testing.assert_array_equal(least.dequantize(), 0.5 * (q.astype(float) - 3))


def test_scales_and_zeros_broadcast(rng):
    q = rng.integers(0, 4, (3, 8))
    full = BinaryCode.from_uniform(q, np.full((3, 2), 0.5), np.full((3, 2), 1), group_size=4)
    for scale, zero in [(np.float64(0.5), 1), (np.full((1, 2), 0.5), np.ones((3, 1)))]:
        assert BinaryCode.from_uniform(q, scale, zero, group_size=4) == full
    assert not np.signbit(BinaryCode.from_uniform(q, np.float64(-0.5), 1.5).shift)


def test_files_of_integers_take_their_bits(rng, tmp_path):
    q = rng.integers(0, 8, (1000, 1024))
    scale = rng.uniform(1, 2, (1000, 8)).astype(np.float16)
    code = BinaryCode.from_uniform(q, scale, 3.5, group_size=128)
    assert code.effective_bits == 3 + (3 + 1) * 16 / 128
    code.save(tmp_path / "code.npz")
    assert 8 * (tmp_path / "code.npz").stat().st_size == pytest.approx(
        code.effective_bits * q.size, rel=0.05
    )
    assert BinaryCode.load(tmp_path / "code.npz") == code


def test_arguments(xp):
    q, scale = xp.asarray(np.array([[0, 1, 2], [3, 1, 0]])), xp.ones(2)
    make = BinaryCode.from_uniform
    assert make(q, scale, 0, channel_axis=0).bits == 2
    for wrong in (q.astype(float), q > 0):
        with pytest.raises(TypeError, match="q must be an integer array"):
            make(wrong, scale, 0, channel_axis=0)
    with pytest.raises(TypeError, match="scale must be float16"):
        make(q, scale.astype(int), 0, channel_axis=0)
    with pytest.raises(TypeError, match="zero must be a real number"):
        make(q, scale, 1j, channel_axis=0)
    with pytest.raises(TypeError, match="bits must be an integer"):
        make(q, scale, 0, bits=2.0, channel_axis=0)
    for wrong in (0, 17):
        with pytest.raises(ValueError, match=r"bits must lie in 1 \.\. 16"):
            make(q, scale, 0, bits=wrong, channel_axis=0)
    with pytest.raises(ValueError, match=r"q of 1 bits must lie in 0 \.\. 1, got 3"):
        make(q, scale, 0, bits=1, channel_axis=0)
    with pytest.raises(ValueError, match=r"must lie in 0 \.\. 3, got -1"):
        make(q - 1, scale, 0, bits=2, channel_axis=0)
    with pytest.raises(ValueError, match=r"scale of shape \(2,\) does not broadcast to the scale"):
        make(q, scale, 0)
    with pytest.raises(ValueError, match="zero of shape"):
        make(q, scale, xp.ones(3), channel_axis=0)


@pytest.mark.kernels
def test_mixed_libraries(device):
    q = np.array([[0, 1, 2], [3, 1, 0]])
    for arguments in (
        (device.asarray(q), np.ones(2), 0),
        (q, device.ones(2), 0),
        (device.asarray(q), device.ones(2), np.ones(2)),
    ):
        with pytest.raises(TypeError, match="NumPy and CuPy"):
            BinaryCode.from_uniform(*arguments, channel_axis=0)
