"""The stand-in behaves as CuPy does where cubin relies on it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

pytest.importorskip("cupy")

from tests import ptx
from tests.ptx.device import module as xp

pytestmark = [pytest.mark.kernels, pytest.mark.exhaustive]

double = xp.ElementwiseKernel("T x", "T y", "y = x + x", "double_it")
weighted = xp.ElementwiseKernel("T x, T w", "T y", "y = x * w", "weigh")
total = xp.ReductionKernel("T x, T w", "T y", "x * w", "a + b", "y = a", "0", "add_up")
extremes = xp.ReductionKernel(
    "T x, T w", "T low, T high", "Pair(x * w, x * w)",
    "Pair(min(a.low, b.low), max(a.high, b.high))", "low = a.low, high = a.high",
    "Pair(1e30, -1e30)", "extremes", reduce_type="Pair",
    preamble="struct Pair { double low, high; __device__ Pair() {}"
    "__device__ Pair(double l, double h) : low(l), high(h) {} };",
)  # fmt: skip


def test_nothing_converts_to_numpy_but_get():
    x = xp.asarray(np.arange(4.0))
    for convert in (np.asarray, np.array, lambda a: np.asarray(a, np.float32)):
        with pytest.raises(TypeError, match="Implicit conversion"):
            convert(x)
    np.testing.assert_array_equal(x.get(), np.arange(4.0))
    with pytest.raises(TypeError, match="Unsupported type"):
        x + np.arange(4.0)
    with pytest.raises(TypeError, match="Unsupported type"):
        x[:] = np.arange(4.0)


def test_kernels_refuse_host_arrays():
    x = np.arange(4, dtype=np.float32)
    with pytest.raises(TypeError, match=r"Unsupported type|numpy"):
        double(x)
    with pytest.raises(TypeError, match=r"Unsupported type|numpy"):
        weighted(xp.asarray(x), x)
    with pytest.raises(TypeError, match=r"Output arguments|Unsupported type"):
        double(xp.asarray(x), x)
    with pytest.raises(TypeError, match=r"Unsupported type|numpy"):
        total(xp.asarray(x), x)
    kernel = xp.RawKernel('extern "C" __global__ void f(float* x) { *x = 1; }', "f")
    with pytest.raises(TypeError, match="want a device array"):
        kernel((1,), (1,), (x,))


def test_raw_scalars_must_have_the_type_of_their_parameter():
    kernel = xp.RawKernel(
        'extern "C" __global__ void f(float* x, float a, int n) { *x = a * n; }', "f"
    )
    x = xp.zeros(1, np.float32)
    kernel((1,), (1,), (x, np.float32(2.5), np.int32(3)))
    assert x.get()[0] == 7.5
    kernel((1,), (1,), (x, np.float32(2.5), 4))  # a Python int is read from its low bytes
    assert x.get()[0] == 10
    for wrong in (2.5, np.float64(2.5), 3, np.int32(3)):
        with pytest.raises(TypeError, match="f:"):
            kernel((1,), (1,), (x, wrong, np.int32(3)))
    for wrong in (3.0, np.int64(3), 2**40):
        with pytest.raises(TypeError, match="f:"):
            kernel((1,), (1,), (x, np.float32(1), wrong))
    with pytest.raises(TypeError, match="3"):
        kernel((1,), (1,), (x,))


def test_a_raw_reduction_parameter_forbids_permuted_axes():
    picked = xp.ReductionKernel(
        "T x, raw T w", "T y", "x * w[_j % 2]", "a + b", "y = a", "0", "picked"
    )
    x, w = xp.asarray(np.arange(6.0).reshape(2, 3)), xp.asarray(np.ones(2))
    assert picked(x, w).get() == 15
    with pytest.raises(NotImplementedError):
        picked(x, w, axis=1)


def test_empty_memory_shows_and_kernels_may_not_read_it():
    x = xp.empty((2, 3), np.uint8)
    assert (x.get() == 0xFB).all()
    with pytest.raises(ptx.UninitializedRead):
        double(x)
    x[:, 1:] = 5
    with pytest.raises(ptx.UninitializedRead):
        double(x)
    assert double(x[:, 1:]).get().tolist() == [[10, 10]] * 2
    x.fill(1)
    assert double(x).get().tolist() == [[2] * 3] * 2
    assert double(double(x)).get().tolist() == [[4] * 3] * 2


views = st.sampled_from(
    [
        lambda a: a,
        lambda a: a[::-1],
        lambda a: a.T,
        lambda a: a[..., ::2],
        lambda a: a[1:],
        lambda a: a.transpose(),
        lambda a: a[None],
    ]
)


@settings(max_examples=40)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=4, max_side=5),
               elements=st.floats(-8, 8, width=16)),
    views,
    views,
)  # fmt: skip
def test_elementwise_on_views(x, first, second):
    host = second(first(x))
    device = second(first(xp.asarray(x)))
    np.testing.assert_array_equal(double(device).get(), host + host)
    out = xp.empty(x.shape, np.float32)
    double(xp.asarray(x), out)
    np.testing.assert_array_equal(out.get(), x + x)
    weights = np.arange(host.shape[-1], dtype=np.float32)
    np.testing.assert_array_equal(weighted(device, xp.asarray(weights)).get(), host * weights)
    np.testing.assert_array_equal(weighted(device, np.float32(3)).get(), host * 3)


@settings(max_examples=40)
@given(
    hnp.arrays(np.float64, hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=6),
               elements=st.integers(-100, 100).map(float)),
    views,
    st.booleans(),
    st.data(),
)  # fmt: skip
def test_reductions_on_views(x, view, keepdims, data):
    host, device = view(x), view(xp.asarray(x))
    if not host.size:
        return
    one = xp.asarray(np.ones(host.shape[-1]))
    axis = data.draw(st.none() | st.integers(-host.ndim, host.ndim - 1))
    got = total(device, one, axis=axis, keepdims=keepdims)
    np.testing.assert_array_equal(got.get(), host.sum(axis=axis, keepdims=keepdims))
    low = xp.empty(got.shape, np.float64)
    high = xp.empty(got.shape, np.float64)
    extremes(device, one, low, high, axis=axis, keepdims=keepdims)
    np.testing.assert_array_equal(low.get(), host.min(axis=axis, keepdims=keepdims))
    np.testing.assert_array_equal(high.get(), host.max(axis=axis, keepdims=keepdims))


def test_a_long_reduction():
    x = np.random.default_rng(0).integers(0, 9, 300_000).astype(np.int64)
    got = total(xp.asarray(x), xp.asarray(x))
    assert got.get() == (x * x).sum()


def test_empty_and_scalar_arrays():
    assert double(xp.empty((0, 3), np.float32)).shape == (0, 3)
    assert double(xp.asarray(np.float32(2))).get() == 4
    assert (
        total(xp.asarray(np.zeros((0, 3))), xp.asarray(np.ones(3)), axis=0).get().tolist()
        == [0] * 3
    )


def test_raw_outputs_and_explicit_sizes():
    kernel = xp.ElementwiseKernel(
        "T x", "raw int8 y", "y[2 * i] = 1; y[2 * i + 1] = x > 0", "spread"
    )
    y = xp.zeros(6, np.int8)
    kernel(xp.asarray(np.array([1.0, -1, 2])), y)
    assert y.get().tolist() == [1, 1, 1, 0, 1, 1]
    kernel = xp.ElementwiseKernel("raw T x", "raw T y", "y[i] = x[i] + i", "shift")
    x, y = xp.asarray(np.arange(4)), xp.zeros(4, np.int64)
    kernel(x, y, size=4)
    assert y.get().tolist() == [0, 2, 4, 6]
    with pytest.raises(ValueError, match="undecided"):
        kernel(x, y)
    with pytest.raises(ptx.OutOfBounds):
        kernel(x, y, size=5)


def test_templates_in_modules():
    module = xp.RawModule(
        code="""template<class T, int N> __global__ void add(T* x) { x[threadIdx.x] += N; }""",
        name_expressions=("add<float, 2>", "add<int, 3>"),
    )
    x, y = xp.zeros(4, np.float32), xp.zeros(4, np.int32)
    module.get_function("add<float, 2>")((1,), (4,), (x,))
    module.get_function("add<int, 3>")((1,), (4,), (y,))
    assert (x.get().tolist(), y.get().tolist()) == ([2] * 4, [3] * 4)


def test_a_view_is_all_that_a_kernel_reaches():
    x = xp.zeros(10, np.float32)
    kernel = xp.RawKernel('extern "C" __global__ void f(float* x) { x[threadIdx.x] = 1; }', "f")
    kernel((1,), (5,), (x[5:],))
    assert x.get().tolist() == [0] * 5 + [1] * 5
    with pytest.raises(ptx.OutOfBounds, match="past the end"):
        kernel((1,), (6,), (x[:5],))


def test_impossible_launches():
    kernel = xp.RawKernel('extern "C" __global__ void f(float* x) {}', "f")
    x = xp.zeros(1, np.float32)
    with pytest.raises(ValueError, match="1025 threads"):
        kernel((1,), (1025,), (x,))
    with pytest.raises(ValueError, match="shared"):
        kernel((1,), (1,), (x,), shared_mem=200_000)
    for grid, block in (((1, 65536), (1,)), ((1, 1, 65536), (1,)), ((1,), (1, 1, 65))):
        with pytest.raises(ValueError, match="65535"):
            kernel(grid, block, (x,))
    bounded = xp.RawKernel(
        'extern "C" __global__ void __launch_bounds__(64) f(float* x) { x[threadIdx.x] = 0; }', "f"
    )
    with pytest.raises(ValueError, match="65 threads"):
        bounded((1,), (65,), (x,))


def test_errors_of_the_compiler_are_shown():
    with pytest.raises(ptx.CompileError, match="undefined"):
        xp.ElementwiseKernel("T x", "T y", "y = nowhere(x)", "broken")(xp.zeros(1))


def test_numpy_functions_on_the_device():
    x = xp.asarray(np.arange(6.0).reshape(2, 3))
    assert isinstance(xp.abs(x), xp.ndarray)
    assert isinstance(np.abs(x), xp.ndarray)
    spread = xp.broadcast_to(x[:, :1], (2, 3))
    assert spread.strides == (24, 0)
    assert xp.may_share_memory(x, spread)
    assert not xp.may_share_memory(x, x.copy())
    assert float(x.sum()) == 15
    assert x.reshape(3, 2).data.ptr == x.data.ptr
    assert x.T.reshape(-1).data.ptr != x.data.ptr
    x += 1
    assert (x > 3).get().tolist() == [[False] * 3, [True] * 3]
    with pytest.raises(AttributeError, match="no 'loadtxt_everything'"):
        _ = xp.loadtxt_everything


def test_new_memory_like_another_array_has_its_order():
    x = xp.asarray(np.arange(24.0).reshape(2, 3, 4)).transpose(1, 2, 0)
    y = xp.empty_like(x, np.float32)
    assert (y.shape, y.dtype) == (x.shape, np.float32)
    assert y.strides == tuple(stride // 2 for stride in x.strides)
    assert xp.empty_like(x[::2]).transpose(2, 0, 1).flags.c_contiguous
    assert xp.empty_like(x, shape=(5, 2)).shape == (5, 2)
