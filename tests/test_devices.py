"""Arrays of a device that is not the current one: all is computed, and lies, where x lies."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import cubin
from cubin import bitmaps, operators
from cubin.core import libraries
from tests.ptx.plugin import ENGINE

ptx = pytest.importorskip("tests.ptx.array")

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(ENGINE != "ptx", reason="the stand-in checks which device is current"),
]


@pytest.fixture
def there(device):
    """A function that puts an array on device 1, while device 0 is the current one."""

    def put(values):
        with ptx.Device(1):
            return device.asarray(values)

    return put


@pytest.fixture
def x(there, rng):
    return there(rng.normal(size=(3, 8)).astype(np.float32))


@pytest.fixture
def bits(there, rng):
    return there(rng.integers(0, 4, (3, 8)))


CALLS = {
    "sign": lambda x, bits: cubin.sign(x),
    "ste_mask": lambda x, bits: cubin.ste_mask(x),
    "ste_mask, map": lambda x, bits: cubin.ste_mask(x, bits),
    "ste_mask, bound": lambda x, bits: cubin.ste_mask(x, x),
    "sign_grad": lambda x, bits: cubin.sign_grad(x, x),
    "sign_grad, cast": lambda x, bits: cubin.sign_grad(half(x), x),
    "sign_grad, tanh": lambda x, bits: cubin.sign_grad(half(x), x, surrogate="tanh"),
    "multibit_grad": lambda x, bits: cubin.multibit_grad(half(x), bits, x),
    "multibit_grad, scaled": lambda x, bits: cubin.multibit_grad(
        half(x), bits, x, surrogate="scaled_clip"
    ),
    "multibit_grad, aware": lambda x, bits: cubin.multibit_grad(
        x, 2, x, surrogate="scale_aware", channel_axis=0
    ),
    "multibit": lambda x, bits: cubin.multibit(x, bits),
    "multibit, groups": lambda x, bits: cubin.multibit(x.T, 2, group_size=3),
    "multibit, optimal": lambda x, bits: cubin.multibit(x, bits, solver="optimal"),
    "multibit, importance": lambda x, bits: cubin.multibit(
        x, 2, solver="refined", importance=magnitude(x)
    ),
    "dequantize": lambda x, bits: cubin.quantize(x, bits, channel_axis=0).dequantize(),
    "dequantize, half": lambda x, bits: cubin.quantize(half(x), 2, solver="refined").dequantize(),
    "scales": lambda x, bits: cubin.quantize(x, 2, check_finite=True).scales,
    "bits": lambda x, bits: cubin.quantize(x, bits).bits,
    "copy": lambda x, bits: copy.copy(cubin.quantize(x, bits)).signs,
    "relative_mse": lambda x, bits: cubin.errors.relative_mse(half(x), x),
    "sqnr_db": lambda x, bits: cubin.errors.sqnr_db(x, x),
    "cosine_similarity": lambda x, bits: cubin.errors.cosine_similarity(x, x),
    "max_abs_error": lambda x, bits: cubin.errors.max_abs_error(x, x, axis=0),
    "top_down": lambda x, bits: bitmaps.top_down(x, {1: 0.5, 2: 0.5}),
    "middle_out": lambda x, bits: bitmaps.middle_out(x, {1: 0.5, 2: 0.5}),
    "budget": lambda x, bits: bitmaps.budget(x, 1.5),
    "allocate": lambda x, bits: bitmaps.allocate({"x": x}, 1.5)["x"],
    "operators.Sign": lambda x, bits: operators.Sign().forward(x)[0],
    "operators.Multibit": lambda x, bits: operators.Multibit(bits).forward(x)[0],
    "state_dict": lambda x, bits: operators.Multibit(bits).state_dict()["bits"],
}


def half(x):
    with libraries.current_device(x):
        return x.astype(np.float16)


def magnitude(x):
    with libraries.current_device(x):
        return abs(x)


@pytest.mark.parametrize("call", list(CALLS))
def test_results_lie_where_x_lies(x, bits, call):
    assert CALLS[call](x, bits).device == ptx.Device(1)
    assert ptx.Device() == ptx.Device(0)


def test_errors_in_the_message(x, there):
    with pytest.raises(ValueError, match="must be finite"):
        cubin.quantize(there(np.array([[1, np.nan]], np.float32)), 2, channel_axis=0)
    with pytest.raises(ValueError, match="bits must lie in"):
        cubin.quantize(x, there(np.array(17)))


def test_a_code_of_another_device(x, bits, there, tmp_path):
    code = cubin.quantize(x, bits, channel_axis=0)
    assert code.payload_bits == bits.get().mean()
    assert code.effective_bits > code.payload_bits
    code.save(tmp_path / "code.npz")
    same = cubin.BinaryCode(code.scales, code.planes, bits, shape=x.shape, channel_axis=0)
    assert same == code
    assert same != cubin.quantize(x, 3, channel_axis=0)


def test_codes_of_two_devices_may_be_equal(device, x, bits):
    code = cubin.quantize(x, bits, channel_axis=0)
    here = cubin.quantize(device.asarray(x), device.asarray(bits), channel_axis=0)
    assert here.planes.device != code.planes.device
    assert here == code
    assert code == here


def test_operators_of_two_devices_may_be_equal(device, bits):
    one, other = operators.Multibit(bits), operators.Multibit(device.asarray(bits))
    assert one == other
    assert other == one
    assert one == operators.Multibit.from_state_dict(one.state_dict())


def test_error_table(x):
    table = cubin.analysis.error_per_bit_width({"x": x}, bits=[1, 2], solvers=["greedy", "optimal"])
    assert len(table.rows) == 4


def test_a_map_is_not_allocated_for_its_shape(x, bits, monkeypatch):
    """A code is made without an array of x's size beside the copy of its map."""
    from tests.ptx import memory

    code = cubin.quantize(x, bits)
    sizes = []
    plain = memory.Allocation.__init__

    def record(self, size, **options):
        sizes.append(size)
        plain(self, size, **options)

    monkeypatch.setattr(memory.Allocation, "__init__", record)
    cubin.BinaryCode(code.scales, code.planes, 3, shape=x.shape)
    assert max(sizes, default=0) < x.size


def test_the_stand_in_tells_devices_apart(x, device):
    for compute in (
        lambda: x + 1,
        lambda: abs(x),
        lambda: x.sum(),
        lambda: x.astype(np.float64),
        lambda: device.concatenate([x, x]),
        lambda: x[device.asarray([0])],
        lambda: x.T.ravel(),
        lambda: device.ElementwiseKernel("T x", "T y", "y = x", "same")(x),
    ):
        with pytest.raises(ptx.WrongDevice, match="device 1 on device 0"):
            compute()
    assert x[0].device == device.broadcast_to(x, (2, 3, 8)).device == ptx.Device(1)
    assert device.asarray(x).device == x.copy().device == ptx.Device(0)
