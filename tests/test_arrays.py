from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cubin
from cubin.core import arrays, libraries
from cubin.core.bits import as_bits
from cubin.core.rows import rows_of
from tests import reference
from tests.exhaustive import few


class Tensor:
    """An array of another framework, as far as cubin looks at it."""

    def __init__(self, array, **attributes):
        self.array = array
        vars(self).update(attributes)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.array, dtype)


class Lazy(Tensor):
    __module__ = "dask.array.core"


def test_other_frameworks_come_through_asarray():
    data = np.ones(3, np.float32)
    assert arrays.as_floats("x", Tensor(data)) is data


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (Tensor(np.ones(3), requires_grad=True), r"x\.detach\(\)"),
        (Tensor(np.ones(3), __cuda_array_interface__={}), r"cupy\.asarray\(x\)"),
        (Lazy(np.ones(3)), r"x\.compute\(\)"),
        (np.ma.masked_less([1.0, 2.0], 1.5), r"x\.filled\(\)"),
        (np.ones(3, int), r"x\.astype"),
        (np.ones(3, np.longdouble), r"x\.astype"),
        ([1, 2], r"numpy\.float32\(x\)"),
        (np.ones(3, [("a", "f4"), ("b", "i4")]), r"fields \('a', 'b'\): pass one"),
        (np.ones(3, complex), "real part"),
        ([None], "float16, bfloat16, float32 or float64, got list"),
        (object(), "float16, bfloat16, float32 or float64, got object"),
        (None, "got NoneType"),
        ("w", "got str"),
        (cubin.quantize(np.ones(3), 1), r"x is a BinaryCode: pass x\.dequantize\(\)"),
    ],
)
def test_what_is_refused_says_what_to_do(value, advice):
    with pytest.raises(TypeError, match=advice):
        arrays.as_floats("x", value)


def test_tensors_that_numpy_cannot_read():
    class Strange:
        def __array__(self, dtype=None, copy=None):
            raise TypeError("Got unsupported ScalarType BFloat16")

    with pytest.raises(TypeError, match=r"BFloat16; convert it first, to float32"):
        arrays.as_floats("x", Strange())


@pytest.mark.parametrize("name", ["int1", "uint1", "int4", "float8_e4m3fn", "float8_e5m2"])
def test_other_dtypes_of_ml_dtypes_are_refused(name):
    """Some have the letters of float16 and bfloat16."""
    if not hasattr(ml_dtypes, name):
        pytest.skip("new in ml_dtypes 0.6")
    with pytest.raises(TypeError, match=f"got {name}"):
        arrays.as_floats("x", np.ones(3, getattr(ml_dtypes, name)))


def test_ragged_lists_are_refused():
    with pytest.raises(ValueError, match="x is no array"):
        arrays.as_floats("x", [[1.0], [1.0, 2.0]])


def test_an_array_that_needs_a_copy_to_be_read_is_not_one():
    class Broken:
        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("on another planet")

    with pytest.raises(TypeError, match="on another planet"):
        arrays.as_floats("x", Broken())


@given(st.data())
def test_rows_hold_the_elements_that_share_a_scale(data):
    ndim = data.draw(st.integers(1, 5))
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim)))
    if data.draw(st.booleans()):
        axes = data.draw(st.lists(st.integers(0, ndim - 1), unique=True))
        granularity = {"channel_axis": tuple(axes)}
    else:
        divisors = [n for n in range(1, shape[-1] + 1) if shape[-1] % n == 0]
        granularity = {"group_size": data.draw(st.sampled_from(divisors))}
    numbers = np.arange(np.prod(shape)).reshape(shape)
    rows = rows_of(shape, **granularity)
    expected = [
        [numbers[index] for index in row] for row in reference.rows(shape, **granularity).values()
    ]
    assert rows.flat(numbers).tolist() == expected
    assert (rows.count, rows.length) == (len(expected), len(expected[0]))
    # A scale that numbers the rows lands on the elements of its row.
    scale = np.arange(rows.count).reshape(rows.scale_shape)
    spread = np.broadcast_to(rows.aligned(scale), rows.split).reshape(shape)
    assert rows.flat(spread).tolist() == [[row] * rows.length for row in range(rows.count)]


@pytest.mark.parametrize("dtype", ["uint8", "float16", ml_dtypes.bfloat16, "float32", "float64"])
@pytest.mark.parametrize("axis", [0, 1, (1, 0), (0, 3), 3])
def test_rows_of_views(dtype, axis):
    whole = np.arange(9 * 7 * 4 * 5).reshape(9, 7, 4, 5).astype(dtype)
    for x in (
        whole,
        whole[1:-2, 2:-1],
        whole[:, :, :, 1:4],
        whole[::-1],
        whole[..., ::-1],
        whole.transpose(1, 0, 2, 3),
        whole.transpose(0, 3, 1, 2),
        whole[:, :1],
        whole[:, :, :0],
        np.broadcast_to(whole[:1], whole.shape),
    ):
        rows = rows_of(x.shape, axis)
        flat = rows.flat(x)
        np.testing.assert_array_equal(flat, rows.view(x).reshape(rows.count, rows.length))
        assert flat.dtype == x.dtype


def test_views_of_rows_share_memory():
    x = np.zeros((4, 5, 6))
    for granularity in ({"channel_axis": (2, 0)}, {"group_size": 3}, {}):
        assert np.shares_memory(rows_of(x.shape, **granularity).view(x[::-1]), x)


@pytest.mark.parametrize("size", [3, 300])
def test_maps_become_bytes(size):
    """Those of bytes are not copied, others keep their order."""
    x = np.zeros((size, 4))
    for dtype in "bBhHiIlLqQ":
        bits = (np.arange(4 * size) % 12).astype(dtype).reshape(4, size).T[::-1]
        checked = as_bits(bits, x)
        found = checked.values
        assert (found.dtype, checked.levels) == (np.uint8, 11)
        assert np.shares_memory(found, bits) == (bits.itemsize == 1)
        assert found.strides[0] < found.strides[1] or bits.itemsize == 1
        np.testing.assert_array_equal(found, bits)
        for wrong in {17, np.iinfo(dtype).min, np.iinfo(dtype).max} - {0}:
            bits[-1, 0] = wrong
            with pytest.raises(ValueError, match=f"0 .. 16, got {wrong}$"):
                as_bits(bits, x)


@pytest.mark.kernels
def test_mixed_libraries_are_refused(device):
    x, there = np.ones(3), device.asarray(np.ones(3))
    import cubin

    for call in (
        lambda: cubin.sign(x, out=device.empty(3)),
        lambda: cubin.sign(there, out=np.empty(3)),
        lambda: cubin.sign_grad(x, there),
        lambda: cubin.sign_grad(there, x),
        lambda: cubin.multibit(x, device.asarray(np.ones(3, int))),
        lambda: cubin.ste_mask(x, there),
        lambda: cubin.errors.relative_mse(x, there),
        lambda: libraries.library(x, there),
    ):
        with pytest.raises(TypeError, match="NumPy"):
            call()


@pytest.mark.kernels
def test_a_numpy_map_is_welcome_on_the_device(device, host):
    import cubin

    x = np.array([-1.0, 3.0, 0.5])
    bits = np.array([1, 2, 3])
    y = cubin.multibit(device.asarray(x), bits)
    assert isinstance(y, device.ndarray)
    np.testing.assert_array_equal(host(y), cubin.multibit(x, bits))


@pytest.mark.kernels
def test_a_device_map_is_not_looked_at_but_clipped(device, host):
    import cubin

    x = np.linspace(-1, 1, 11)
    there = cubin.multibit(device.asarray(x), device.asarray(np.full(11, -3)))
    np.testing.assert_array_equal(host(there), 0)
    there = cubin.multibit(device.asarray(x), device.asarray(np.full(11, 300)))
    np.testing.assert_allclose(host(there), cubin.multibit(x, 16), rtol=0, atol=1e-15)
    with pytest.raises(ValueError, match="got 300"):
        cubin.quantize(device.asarray(x), device.asarray(np.full(11, 300)))


# ---------------------------------------------------------------- alignment


def misplaced(device, values, offset, step):
    """`values` on the device, `offset` bytes from an aligned address, rows `step` bytes apart."""
    rows, size = len(values), values[0].nbytes
    memory = np.zeros((rows, size + step), np.uint8)
    memory[:, offset : offset + size] = values.view(np.uint8).reshape(rows, size)
    held = device.asarray(memory)[:, offset : offset + size].view(values.dtype)
    np.testing.assert_array_equal(held.get(), values)
    return held


PLACES = [(1, 8), (4, 9), (2, 16), (8, 16)]
"""Offsets and gaps: some item sizes divide both, and such arrays are not copied."""


@pytest.mark.kernels
@pytest.mark.parametrize(("offset", "step"), PLACES)
@pytest.mark.parametrize(
    "dtype", few([np.float16, ml_dtypes.bfloat16, np.float32, np.float64], np.float16, np.float32)
)
def test_device_arrays_at_any_address_are_read(offset, step, dtype, device, rng):
    """Without a copy, each of these calls stops at an address that the GPU refuses."""
    x = rng.normal(size=(3, 24)).astype(dtype)
    gy, bits = rng.normal(size=x.shape).astype(dtype), rng.integers(0, 3, x.shape).astype(np.int32)
    bound = rng.uniform(0, 2, x.shape)
    held, gradient, map_, limit = (misplaced(device, a, offset, step) for a in (x, gy, bits, bound))
    calls = [
        (cubin.sign, (x,), (held,), {}),
        (cubin.ste_mask, (x, bits), (held, map_), {}),
        (cubin.ste_mask, (x, bound), (held, limit), {}),
        (cubin.multibit, (x, 2), (held, 2), {"channel_axis": 0}),
        (cubin.multibit, (x, bits), (held, map_), {"channel_axis": 0}),
        (cubin.multibit, (x, bits), (held, map_), {"channel_axis": 0, "solver": "refined"}),
        (cubin.multibit_grad, (x, bits, gy), (held, map_, gradient), {}),
        (cubin.errors.relative_mse, (x, gy), (held, gradient), {}),
    ]
    for function, host, on_device, options in calls:
        close = 1e-14 if dtype == np.float64 else 1e-5 if dtype == np.float32 else 1e-2
        found, wanted = function(*on_device, **options), function(*host, **options)
        np.testing.assert_allclose(found.get(), wanted, rtol=close, atol=close)
    code = cubin.quantize(held, map_, channel_axis=0, solver="refined")
    wanted = cubin.quantize(x, bits, channel_axis=0, solver="refined")
    np.testing.assert_array_equal(code.signs.get(), wanted.signs)
    np.testing.assert_array_equal(held.get(), x)


@pytest.mark.kernels
def test_single_elements_at_any_address_are_read(device):
    held = device.asarray(np.zeros(16, np.uint8))[3:7].view(np.float32).reshape(())
    assert cubin.sign(held).get() == -1
    assert libraries.aligned(held).shape == ()
    plain = device.ones((3, 4), np.float32)
    assert libraries.aligned(plain) is plain
    view = plain[:, ::2].T
    assert libraries.aligned(view) is view


@pytest.mark.kernels
@pytest.mark.parametrize(("offset", "step"), PLACES[:3])
def test_a_result_at_an_address_that_a_gpu_refuses(offset, step, device):
    x = np.ones((2, 4))
    out = misplaced(device, x, offset, step)
    for function in (cubin.sign, lambda x, out: cubin.multibit(x, 1, out=out)):
        with pytest.raises(ValueError, match="out must lie at multiples of its item size, 8 bytes"):
            function(device.asarray(x), out=out)
    assert (out.get() == 1).all()


def test_elements_of_a_result_share_no_memory(xp):
    """Else it is left to chance which of them stays: threads write them in no order."""
    x = xp.asarray(np.array([[1.0, -2.0], [-3.0, 4.0]]))
    for memory in (xp.zeros((1, 2)), xp.zeros((2, 1))):
        out = xp.broadcast_to(memory, x.shape)
        if xp is np:  # whose views of this kind are read-only
            out = np.lib.stride_tricks.as_strided(memory, out.shape, out.strides)
        for function in (cubin.sign, lambda x, out: cubin.multibit(x, 1, out=out)):
            with pytest.raises(ValueError, match=r"out of shape .* share memory"):
                function(x, out=out)
    nothing = xp.zeros((2, 2))[:, :0]
    empty = xp.broadcast_to(nothing[:1], (2, 0)) if xp is not np else np.zeros((2, 0))
    assert cubin.sign(nothing, out=empty) is empty
