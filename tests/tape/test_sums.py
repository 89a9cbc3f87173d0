"""Sums, means and gradients whose addends are too many or too large for their dtype."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cubin import tape
from cubin.tape import Node, gradients
from cubin.tape.sums import BLOCK, total

HALF, SINGLE = np.float16, np.float32


def pulled(output: Node, x: Node, seed=None):
    return gradients(output, [x], seed=seed)[0]


# ---------------------------------------------------------------- total

LAYOUTS = {
    "C": lambda x: x,
    "Fortran": lambda x: np.array(x, order="F"),
    "reversed": lambda x: x[(slice(None, None, -1),) * x.ndim],
    "strided": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "last outermost": lambda x: np.moveaxis(np.ascontiguousarray(np.moveaxis(x, -1, 0)), 0, -1),
}


@pytest.mark.parametrize("dtype", [HALF, SINGLE, np.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((BLOCK,), (0,)),
        ((BLOCK + 1,), (0,)),
        ((4001,), (0,)),
        ((997, 3), (0,)),
        ((3, 997), (1,)),
        ((7, 5, 9, 11), (0, 2, 3)),
        ((50, 3, BLOCK, 2), (3, 0, 2)),
        ((2, 40, 3), (1,)),
        ((6, 50), ()),
        ((0, 3), (0,)),
        ((3, 1, 0), (1, 2)),
        ((200, 0), (0,)),
    ],
)
def test_total_is_the_sum(shape, axes, layout, dtype, rng, xp, host):
    x = LAYOUTS[layout](rng.integers(-8, 9, shape).astype(dtype))
    found = total(xp.asarray(x), axes)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(host(found), x.astype(float).sum(axis=axes, keepdims=True))


def test_total_of_a_broadcast_array(xp, host):
    x = xp.broadcast_to(xp.asarray(np.arange(3, dtype=SINGLE)), (1001, 3))
    np.testing.assert_array_equal(host(total(x, (0,))), [[0, 1001, 2002]])


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("shape", [(2**20,), (2**18, 2), (2, 2**18), (2**9, 2, 2**9)])
def test_sums_of_many_equal_addends_keep_their_digits(shape, order, xp, host):
    x = xp.asarray(np.full(shape, 0.1, SINGLE, order))
    axis = max(range(len(shape)), key=lambda number: shape[number])
    axes = tuple(number for number in range(len(shape)) if shape[number] == shape[axis])
    exact = float(SINGLE(0.1)) * math.prod(shape[number] for number in axes)
    np.testing.assert_allclose(host(tape.sum(Node(x), axes).value), exact, rtol=4e-7)
    np.testing.assert_allclose(host(tape.mean(Node(x), axes).value), SINGLE(0.1), rtol=4e-7)


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_mean_of_more_ones_than_float32_counts(dtype):
    x = np.broadcast_to(np.ones(2, dtype), (20_000_000, 2))
    np.testing.assert_array_equal(tape.mean(Node(x), 0).value, [1, 1])


def test_no_float64_copy_is_made(monkeypatch):
    """What is converted to float64 are the sums of blocks."""
    seen = []

    class Watched(np.ndarray):
        def sum(self, *args, dtype=None, **options):
            if dtype == np.float64:
                seen.append(self.size)
            return super().sum(*args, dtype=dtype, **options)

        def astype(self, dtype, *args, **options):
            if dtype == np.float64:
                seen.append(self.size)
            return super().astype(dtype, *args, **options)

    for shape, axes in (((9999, 4), (0,)), ((4, 9999), (1,)), ((64, 4, 14, 14), (0, 2, 3))):
        x = np.ones(shape, SINGLE).view(Watched)
        seen.clear()
        total(x, axes)
        assert seen
        assert max(seen) <= x.size / 14


# ---------------------------------------------------------------- accumulated gradients


@pytest.mark.parametrize("operation", [tape.add, tape.subtract, tape.multiply, tape.divide])
def test_gradient_of_a_bias_over_many_rows(operation, xp, host):
    rows, bias = 2**18, Node(xp.ones(2, SINGLE))
    output = operation(xp.ones((rows, 2), SINGLE), bias)
    gradient = pulled(output, bias, xp.asarray(np.full((rows, 2), 0.1, SINGLE)))
    np.testing.assert_allclose(abs(host(gradient)), 26214.4, rtol=4e-7)


def test_gradient_of_a_slope_over_many_rows(xp, host):
    slope, x = Node(xp.ones(2, SINGLE)), xp.asarray(np.full((2**18, 2), -1, SINGLE))
    output = tape.prelu(x, slope)
    gradient = pulled(output, slope, xp.asarray(np.full(x.shape, 0.1, SINGLE)))
    np.testing.assert_allclose(host(gradient), -26214.4, rtol=4e-7)


@pytest.mark.parametrize(
    "operation",
    [
        tape.multiply,
        lambda x, factor: tape.divide(x, 1 / factor),
        lambda x, factor: tape.prelu(-x, -factor),
    ],
)
def test_products_of_float16_that_are_summed_do_not_vanish(operation, xp, host):
    x, factor = xp.asarray(np.full((4096, 1), 1e-4, HALF)), Node(xp.ones(1, HALF))
    gradient = pulled(operation(x, factor), factor, x)
    np.testing.assert_allclose(host(gradient), 4096 * float(HALF(1e-4)) ** 2, rtol=1e-3)


def test_products_of_float16_that_are_summed_do_not_overflow(xp, host):
    x = xp.asarray(np.array([[1000], [-999], [2]], HALF))
    factor = Node(xp.ones(1, HALF))
    gradient = pulled(factor * x, factor, xp.asarray(np.full((3, 1), 1000, HALF)))
    np.testing.assert_allclose(host(gradient), 3000)


def test_gradient_of_a_divisor_does_not_overflow_between(xp, host):
    """-g * (a / b) / b with g * (a / b) = 1e5."""
    a, b = (Node(xp.asarray(np.array([value], HALF))) for value in (5e4, 500))
    gradient = pulled(a / b, b, xp.asarray(np.array([1000], HALF)))
    np.testing.assert_allclose(host(gradient), -200, rtol=1e-3)


def test_matrices_that_are_shared_sum_their_gradients_in_float32(xp, host):
    batch = np.full((4096, 1, 1), 1e-4, HALF)
    shared = Node(xp.ones((1, 1), HALF))
    output = tape.matmul(xp.asarray(batch), shared)
    gradient = pulled(output, shared, xp.asarray(batch))
    np.testing.assert_allclose(host(gradient), 4096 * float(batch[0, 0, 0]) ** 2, rtol=1e-3)


def test_long_product_of_float16():
    a = np.full((1, 2**18), 0.1, HALF)
    found = tape.matmul(Node(a), np.full((2**18, 1), 0.1, HALF)).value
    assert found.dtype == HALF
    np.testing.assert_allclose(found, 2**18 * float(a[0, 0]) ** 2, rtol=5e-4)


@pytest.mark.parametrize(
    ("operation", "value", "expected", "slope"),
    [
        (lambda x: x / 300_000, 60_000, 0.2, 1 / 300_000),
        (lambda x: x * 1e-9, 60_000, 6e-5, 1e-9),
        (lambda x: 1e5 * x, 1e-3, 100, 1e5),
        (lambda x: x / 1e-8, 1e-6, 100, 1e8),
        (lambda x: 1e5 / x, 1000, 100, -0.1),
        (lambda x: x + 1e5, -6e4, 4e4, 1),
        (lambda x: 1e5 - x, 6e4, 4e4, -1),
        (lambda x: tape.clip(x, -1e6, 1e6), 6e4, 6e4, 1),
    ],
)
def test_number_beyond_float16(operation, value, expected, slope, xp, host):
    x = Node(xp.asarray(np.array([value], HALF)))
    output = operation(x)
    assert output.value.dtype == HALF
    np.testing.assert_allclose(host(output.value), expected, rtol=6e-2)
    seed = np.array([1e-4 if abs(slope) > 100 else 1], HALF)
    gradient = host(pulled(output, x, xp.asarray(seed)))
    assert gradient.dtype == HALF
    with np.errstate(over="ignore"):
        exact = (seed.astype(float) * slope).astype(HALF)
    np.testing.assert_allclose(gradient, exact, rtol=2e-3)


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("value", [1.0, 0.1])
def test_repeated_indices_accumulate_accurately(dtype, value, xp, host):
    x = Node(xp.zeros((3, 2), dtype))
    picks = 5000 if dtype == HALF else 2**18
    seed = np.full((picks, 2), value, dtype)
    gradient = pulled(x[xp.zeros(picks, int)], x, xp.asarray(seed))
    assert gradient.dtype == dtype
    exact = picks * float(seed[0, 0])
    np.testing.assert_allclose(host(gradient)[0], exact, rtol=5e-4 if dtype == HALF else 1e-7)
    np.testing.assert_array_equal(host(gradient)[1:], 0)


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_conv2d_sums_over_large_kernels(dtype, xp, host):
    x = Node(xp.zeros((1, 1, 119, 119), dtype))
    output = tape.conv2d(x, xp.ones((1, 1, 60, 60), dtype))
    for value in (1.0, 0.1):
        seed = np.full(output.value.shape, value, dtype)
        gradient = host(pulled(output, x, xp.asarray(seed)))
        assert gradient.dtype == dtype
        exact = 3600 * float(dtype(value))
        assert gradient.max() == pytest.approx(exact, rel=5e-4 if dtype == HALF else 2e-7)


def test_conv2d_gradient_of_float16_does_not_overflow_between(xp, host):
    """Kernels of opposite signs: each product exceeds float16, their sum does not."""
    x = Node(xp.zeros((1, 1, 2, 3), HALF))
    kernels = np.array([[[[300.0, -300.0]]]], HALF)
    seed = np.full((1, 1, 2, 2), 300, HALF)
    with np.errstate(over="ignore"):  # at the edges, which lie in one window only
        gradient = pulled(tape.conv2d(x, xp.asarray(kernels)), x, xp.asarray(seed))
    np.testing.assert_array_equal(host(gradient)[0, 0, :, 1], 0)


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("value", [1.0, 0.1])
def test_node_used_many_times(dtype, value, xp, host):
    x = Node(xp.ones(2, dtype))
    step = xp.asarray(np.full(2, value, dtype))
    output = Node(x.value, tuple((x, lambda g: g * step) for _ in range(4096)))
    gradient = pulled(output, x, xp.ones(2, dtype))
    assert gradient.dtype == dtype
    exact = 4096 * float(dtype(value))
    np.testing.assert_allclose(host(gradient), exact, rtol=5e-4 if dtype == HALF else 3e-7)


@pytest.mark.parametrize("count", range(1, 12))
def test_every_share_is_counted_once(count):
    x = Node(np.zeros(1))
    shares = [2.0**number for number in range(count)]
    output = Node(x.value, tuple((x, lambda g, share=share: g * share) for share in shares))
    assert pulled(output, x) == 2**count - 1


# ---------------------------------------------------------------- pools


@pytest.mark.parametrize(
    ("shape", "size", "value"),
    [((1, 8, 56, 56), 56, 30), ((1, 1, 64, 64), 64, 1), ((1, 2, 4, 4), 2, 40_000)],
)
def test_mean_pool_of_float16(shape, size, value, xp, host):
    found = tape.mean_pool(Node(xp.asarray(np.full(shape, value, HALF))), size).value
    assert found.dtype == HALF
    np.testing.assert_array_equal(host(found), np.full(found.shape, value))


def test_mean_pool_of_large_windows(xp, host):
    x = Node(xp.asarray(np.full((1, 1, 64, 64), 0.1, SINGLE)))
    np.testing.assert_allclose(host(tape.mean_pool(x, 64).value), SINGLE(0.1), rtol=1e-7)


@pytest.mark.parametrize("pool", [tape.max_pool, tape.mean_pool])
def test_overlapping_windows_sum_their_gradients(pool, xp, host):
    """Every window of 60 x 60 holds the middle, the largest element."""
    values = np.zeros((1, 1, 119, 119))
    values[0, 0, 59, 59] = 1
    x = Node(xp.asarray(values.astype(HALF)))
    output = pool(x, 60, stride=1)
    gradient = host(pulled(output, x, xp.ones(output.value.shape, HALF)))
    assert gradient.dtype == HALF
    expected = 3600 if pool is tape.max_pool else 1
    assert gradient[0, 0, 59, 59] == pytest.approx(expected, rel=1e-3)


# ---------------------------------------------------------------- layers


def test_batch_norm_running_statistics_keep_their_own_dtype(xp, host):
    values = np.random.default_rng(0).normal(0, 300, (64, 2)).astype(HALF)
    x, one, zero = Node(xp.asarray(values)), xp.ones(2, SINGLE), xp.zeros(2, SINGLE)
    _, running = tape.batch_norm(x, one, zero, (zero, one), train=True, momentum=1)
    assert [array.dtype for array in running] == [SINGLE] * 2
    exact = values.astype(float)
    np.testing.assert_allclose(host(running[0]), exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(host(running[1]), exact.var(0, ddof=1), rtol=1e-6)
    y, unchanged = tape.batch_norm(x, one, zero, running, train=False)
    assert y.value.dtype == HALF
    expected = (exact - exact.mean(0)) / exact.std(0, ddof=1)
    np.testing.assert_allclose(host(y.value).astype(float), expected, rtol=2e-3, atol=2e-3)
    assert all(new is old for new, old in zip(unchanged, running, strict=True))
    gradient = host(pulled(y, x, xp.asarray(np.full((64, 2), 1, HALF))))
    np.testing.assert_allclose(gradient[0], 1 / exact.std(0, ddof=1), rtol=1e-3)


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_takes_constants_in_the_dtype_of_x(train):
    x, one, zero = Node(np.arange(6, dtype=SINGLE).reshape(3, 2)), np.ones(2), np.zeros(2)
    y, running = tape.batch_norm(x, one, zero, (zero, one), train=train)
    assert y.value.dtype == SINGLE
    assert [array.dtype for array in running] == [np.float64] * 2


def test_batch_norm_inference_with_a_variance_beyond_float16(xp, host):
    x = Node(xp.asarray(np.array([[60_000.0], [-60_000.0]], HALF)))
    running = (xp.zeros(1, SINGLE), xp.asarray(np.array([3.6e9], SINGLE)))
    y, _ = tape.batch_norm(x, xp.ones(1, HALF), xp.zeros(1, HALF), running, train=False)
    np.testing.assert_allclose(host(y.value), [[1], [-1]], rtol=1e-3)


def test_batch_norm_running_statistics_do_not_stall():
    values = (10 + np.random.default_rng(0).normal(0, 1, (64, 2))).astype(HALF)
    running = (np.zeros(2, SINGLE), np.zeros(2, SINGLE))
    for _ in range(3000):
        _, running = tape.batch_norm(
            Node(values), np.ones(2), np.zeros(2), running, train=True, momentum=1e-3
        )
    share = 1 - 0.999**3000
    exact = values.astype(float)
    np.testing.assert_allclose(running[0], share * exact.mean(0), rtol=1e-4)
    np.testing.assert_allclose(running[1], share * exact.var(0, ddof=1), rtol=1e-4)


def test_batch_norm_averages_many_rows(xp, host):
    """Statistics and gradients of float32 with as many equal rows as would lose digits."""
    values = np.full((2**18, 2), 0.1, SINGLE)
    x, gamma = Node(xp.asarray(values)), Node(xp.ones(2, SINGLE))
    running = (xp.zeros(2, SINGLE), xp.ones(2, SINGLE))
    _, (mean, _) = tape.batch_norm(x, gamma, xp.zeros(2, SINGLE), running, train=True, momentum=1)
    np.testing.assert_allclose(host(mean), SINGLE(0.1), rtol=4e-7)


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("classes", [5000, 70_000])
def test_softmax_cross_entropy_of_many_classes(classes, dtype, order, xp, host):
    logits = Node(xp.asarray(np.zeros((2, classes), dtype, order)))
    output = tape.softmax_cross_entropy(logits, xp.asarray(np.array([0, classes - 1])))
    assert output.value.dtype == dtype
    tolerance = 5e-4 if dtype == HALF else 2e-7
    assert float(output.value) == pytest.approx(math.log(classes), rel=tolerance)
    gradient = host(pulled(output, logits))
    assert gradient.dtype == dtype
    np.testing.assert_allclose(gradient[:, 1], 0.5 / classes, rtol=1e-3, atol=6e-8)
    np.testing.assert_allclose(gradient[0, 0], 0.5 / classes - 0.5, rtol=1e-3)


def test_softmax_cross_entropy_of_a_large_batch(xp):
    logits = Node(xp.asarray(np.zeros((2**17, 2), HALF)))
    output = tape.softmax_cross_entropy(logits, xp.zeros(2**17, int))
    assert float(output.value) == pytest.approx(math.log(2), rel=5e-4)


@pytest.mark.parametrize("rate", [1 - 1e-5, 1 - 2**-20])
def test_dropout_of_nearly_everything_in_float16(rate):
    """1 / (1 - rate) exceeds float16, or 1 - rate vanishes in it; what is kept does neither."""
    draws = np.zeros(4, SINGLE)
    draws[0] = 1  # kept

    class Draws:
        def random(self, shape, dtype):
            return draws

    x = Node(np.full(4, 1e-3, HALF))
    output = tape.dropout(x, rate, Draws())
    kept = float(x.value[0]) / (1 - rate)
    np.testing.assert_allclose(output.value, [kept, 0, 0, 0], rtol=1e-3)
    gradient = pulled(output, x, np.full(4, 1e-3, HALF))
    np.testing.assert_allclose(gradient, [kept, 0, 0, 0], rtol=1e-3)
