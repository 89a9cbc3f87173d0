from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import mutually_broadcastable_shapes
from ml_dtypes import bfloat16, finfo

from cubin import tape
from cubin.core.libraries import library
from cubin.tape import Node, check_gradient, gradients, operations


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def positive(*shape: int) -> np.ndarray:
    return 0.5 + abs(normal(*shape))


def spread(*shape: int, seed: int = 0) -> np.ndarray:
    """Distinct values at least 0.1 apart and from 0, so that no maximum changes hands nearby."""
    size = math.prod(shape)
    values = 0.1 * np.concatenate([np.arange(-size, 0), np.arange(1, size + 1)])
    return np.random.default_rng([seed, *shape]).permutation(values)[:size].reshape(shape)


def beside(x: Node, values) -> np.ndarray:
    """`values` as an array of x's library."""
    return library(x.value).asarray(np.asarray(values))


RUNNING = (normal(3), positive(3))


def normalized(x, gamma, beta, train=True):
    running = tuple(beside(x, array) for array in RUNNING)
    return tape.batch_norm(x, gamma, beta, running, train=train)[0]


class Draws:
    """NumPy's random numbers as arrays of x's library, which has a generator of its own."""

    def __init__(self, x: Node, seed: int) -> None:
        self.x = x
        self.rng = np.random.default_rng(seed)

    def random(self, shape, dtype):
        return beside(self.x, self.rng.random(shape, dtype))


# A function of nodes, and the arrays at which its gradient is checked.
CASES = {
    "add": (tape.add, normal(3, 4), normal(3, 4)),
    "add broadcast": (tape.add, normal(3, 1, 5), normal(4, 1)),
    "add 0-d": (tape.add, normal(), normal(2, 3)),
    "subtract": (tape.subtract, normal(3, 1), normal(2, 3, 5)),
    "multiply": (tape.multiply, normal(1, 4), normal(3, 1)),
    "multiply itself": (lambda x: x * x * x, normal(5)),
    "divide": (tape.divide, normal(2, 3), positive(3)),
    "divide numerator": (tape.divide, normal(3), positive(2, 1)),
    "negative": (tape.negative, normal(3)),
    "constants": (lambda x: (2 - 3 * x) / (1 + x * x) - 1 / (x + 9.0), normal(4)),
    "matmul": (tape.matmul, normal(3, 4), normal(4, 5)),
    "matmul batched": (tape.matmul, normal(2, 3, 4), normal(2, 4, 5)),
    "matmul broadcast": (tape.matmul, normal(6, 1, 3, 4), normal(2, 4, 1)),
    "matmul shared": (tape.matmul, normal(2, 3, 4), normal(4, 5)),
    "matmul 1-D 1-D": (tape.matmul, normal(4), normal(4)),
    "matmul 1-D 2-D": (tape.matmul, normal(4), normal(4, 5)),
    "matmul 2-D 1-D": (tape.matmul, normal(3, 4), normal(4)),
    "matmul 1-D batched": (tape.matmul, normal(4), normal(2, 3, 4, 5)),
    "matmul batched 1-D": (tape.matmul, normal(2, 3, 5, 4), normal(4)),
    "sum": (tape.sum, normal(3, 4)),
    "sum axis": (lambda x: tape.sum(x, 1), normal(3, 4, 5)),
    "sum axes kept": (lambda x: tape.sum(x, (0, -1), keepdims=True), normal(3, 4, 5)),
    "sum no axis": (lambda x: tape.sum(x, ()), normal(3, 4)),
    "mean": (tape.mean, normal(3, 5)),
    "mean axes": (lambda x: tape.mean(x, (-1, 0)), normal(3, 4, 5)),
    "mean kept": (lambda x: x - tape.mean(x, -1, keepdims=True), normal(3, 4)),
    "reshape": (lambda x: tape.reshape(x, (4, -1)), normal(3, 8)),
    "reshape to 0-d": (lambda x: tape.reshape(x, ()), normal(1, 1)),
    "transpose": (tape.transpose, normal(2, 3, 4)),
    "transpose axes": (lambda x: tape.transpose(x, (1, -1, 0)), normal(2, 3, 4)),
    "index integer": (lambda x: x[1], normal(3, 4)),
    "index scalar": (lambda x: x[1, -2], normal(3, 4)),
    "index slices": (lambda x: x[::-2, None, ..., 1:], normal(5, 2, 3)),
    "index array": (lambda x: x[beside(x, [2, 0, 2, 2])], normal(3, 4)),
    "index list": (lambda x: x[:, [1, 1]], normal(3, 4)),
    "index arrays": (
        lambda x: x[beside(x, [[0], [1]]), :, beside(x, [0, 0, -1])],
        normal(3, 2, 4),
    ),
    "index boolean": (lambda x: x[beside(x, [True, False, True])], normal(3, 4)),
    "index mask": (lambda x: x[beside(x, np.arange(12).reshape(3, 4) % 5 > 1)], normal(3, 4)),
    "exp": (tape.exp, normal(3, 4)),
    "log": (tape.log, positive(3, 4)),
    "maximum": (tape.maximum, spread(3, 4), spread(3, 1) + 0.05),
    "maximum of a number": (lambda x: tape.maximum(0.05, x), spread(5)),
    "relu": (tape.relu, spread(3, 5)),
    "clip": (lambda x: tape.clip(x, -0.45, 0.25), spread(3, 5)),
    "prelu": (tape.prelu, spread(2, 3, 4, 5), normal(3)),
    "prelu 0-d": (tape.prelu, spread(2, 5), normal()),
    "max_pool": (lambda x: tape.max_pool(x, 2), spread(2, 3, 5, 7)),
    "max_pool overlapping": (lambda x: tape.max_pool(x, 3, stride=2), spread(1, 2, 8, 7)),
    "max_pool gaps": (lambda x: tape.max_pool(x, (1, 2), stride=(2, 3)), spread(2, 1, 5, 9)),
    "mean_pool": (lambda x: tape.mean_pool(x, (2, 3)), normal(2, 3, 5, 7)),
    "mean_pool overlapping": (lambda x: tape.mean_pool(x, 3, stride=(1, 2)), normal(2, 1, 5, 6)),
    "batch_norm": (normalized, normal(4, 3), normal(3), normal(3)),
    "batch_norm images": (normalized, normal(2, 3, 3, 4), normal(3), normal(3)),
    "batch_norm inference": (
        lambda *nodes: normalized(*nodes, train=False),
        normal(2, 3, 5),
        normal(3),
        normal(3),
    ),
    "softmax_cross_entropy": (
        lambda x: tape.softmax_cross_entropy(x, beside(x, [3, 0, 0, 4, 2])),
        3 * normal(5, 5),
    ),
    "dropout": (lambda x: tape.dropout(x, 0.3, Draws(x, 1)), normal(6, 7)),
}

CONVOLUTIONS = [
    # x, w, stride, padding, groups
    ((2, 3, 6, 7), (4, 3, 3, 3), 1, 0, 1),
    ((2, 3, 5, 6), (4, 3, 3, 2), 1, 1, 1),
    ((1, 1, 7, 8), (2, 1, 3, 3), 2, 1, 1),
    ((2, 4, 7, 5), (6, 2, 3, 2), (2, 1), (1, 0), 2),
    ((2, 3, 5, 5), (6, 1, 3, 3), 1, (0, 2), 3),
    ((3, 2, 4, 4), (5, 2, 1, 1), 1, 0, 1),
    ((3, 2, 5, 5), (1, 2, 1, 1), 3, 2, 1),
    ((1, 2, 3, 4), (2, 2, 3, 4), 1, 0, 1),
    ((2, 1, 2, 2), (2, 1, 4, 4), 1, 1, 1),
]


@pytest.mark.parametrize("name", CASES)
def test_gradient(name, xp):
    f, *inputs = CASES[name]
    check_gradient(f, *map(xp.asarray, inputs))


@pytest.mark.parametrize(("x", "w", "stride", "padding", "groups"), CONVOLUTIONS)
def test_conv2d_gradient(x, w, stride, padding, groups, xp):
    check_gradient(
        lambda x, w: tape.conv2d(x, w, stride=stride, padding=padding, groups=groups),
        xp.asarray(normal(*x)),
        xp.asarray(normal(*w, seed=1)),
    )


@pytest.mark.parametrize(("x", "w", "stride", "padding", "groups"), CONVOLUTIONS)
@pytest.mark.parametrize("rows", [1, 2])
def test_conv2d_in_blocks_gives_the_same(x, w, stride, padding, groups, rows, monkeypatch):
    x, w = normal(*x), normal(*w, seed=1)

    def results():
        nodes = Node(x), Node(w)
        output = tape.conv2d(*nodes, stride=stride, padding=padding, groups=groups)
        seed = normal(*output.value.shape, seed=2)
        return output.value, *gradients(output, nodes, seed=seed)

    monkeypatch.setattr(operations, "_row_blocks", lambda height, *_: [slice(0, height)])
    whole = results()
    monkeypatch.setattr(
        operations,
        "_row_blocks",
        lambda height, *_: [slice(r, min(r + rows, height)) for r in range(0, height, rows)],
    )
    for found, expected in zip(results(), whole, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


def test_conv2d_takes_no_more_windows_at_once_than_fit_the_cache(monkeypatch):
    seen = []
    product = operations._product

    def watched(xp, a, b, out=None):
        seen.append(max(a.nbytes, b.nbytes))
        return product(xp, a, b, out)

    monkeypatch.setattr(operations, "_product", watched)
    x, w = Node(normal(64, 8, 20, 20)), Node(normal(4, 8, 3, 3, seed=1))
    output = tape.conv2d(x, w, padding=1)
    gradients(output, [x, w], seed=output.value)
    assert len(seen) > 3
    assert max(seen) <= operations._CACHED


@pytest.mark.parametrize("name", CASES)
def test_float32_stays_float32(name, xp, host):
    f, *inputs = CASES[name]
    nodes = [Node(xp.asarray(x.astype(np.float32))) for x in inputs]
    output = f(*nodes)
    assert output.value.dtype == np.float32
    exact = f(*(Node(x.value.astype(np.float64)) for x in nodes))
    np.testing.assert_allclose(host(output.value), host(exact.value), rtol=1e-4, atol=1e-5)
    for gradient, x in zip(
        gradients(output, nodes, seed=np.ones_like(output.value)), nodes, strict=True
    ):
        assert gradient.dtype == np.float32
        assert gradient.shape == x.value.shape


@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_narrow_floats_stay_as_they_are(name, dtype, xp, host):
    f, *inputs = CASES[name]
    nodes = [Node(xp.asarray(x.astype(dtype))) for x in inputs]
    output = f(*nodes)
    assert output.value.dtype == dtype
    seed = np.ones_like(output.value)
    assert {g.dtype for g in gradients(output, nodes, seed=seed)} == {np.dtype(dtype)}
    exact = host(f(*(Node(x.value.astype(np.float64)) for x in nodes)).value)
    found = host(output.value).astype(np.float64)
    close = 8 * float(finfo(dtype).eps)
    np.testing.assert_allclose(found, exact, rtol=close, atol=close * np.abs(exact).max())


def test_sums_of_bfloat16_are_rounded_once(xp, host):
    """1 + 2^-8 + 2^-40 is just above half-way from 1 to the next: float32 takes it for half-way."""
    x = np.array([1, 2.0**-8, 2.0**-40] + [0] * 93).astype(bfloat16)
    assert float(host(operations.sum(Node(xp.asarray(x))).value)) == 1 + 2.0**-7
    (g,) = gradients(
        operations.sum(Node(xp.asarray(x)) * (one := Node(xp.ones((), bfloat16)))), [one]
    )
    assert float(host(g)) == 1 + 2.0**-7


@pytest.mark.parametrize("name", CASES)
def test_each_gradient_has_the_dtype_of_its_node(name, xp):
    f, *inputs = CASES[name]
    dtypes = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float32)][: len(inputs)]
    nodes = [Node(xp.asarray(x.astype(dtype))) for x, dtype in zip(inputs, dtypes, strict=True)]
    output = f(*nodes)
    assert output.value.dtype == np.result_type(*dtypes)
    found = gradients(output, nodes, seed=np.ones_like(output.value))
    assert [g.dtype for g in found] == dtypes


@pytest.mark.parametrize("name", CASES)
def test_strided_inputs_give_the_same(name):
    f, *inputs = CASES[name]

    def reversed_view(x):
        flip = (slice(None, None, -1),) * x.ndim
        return np.array(x[flip], order="F")[flip]

    straight, strided = [Node(x) for x in inputs], [Node(reversed_view(x)) for x in inputs]
    output, other = f(*straight), f(*strided)
    np.testing.assert_allclose(other.value, output.value, rtol=1e-13, atol=1e-14)
    seed = normal(*output.value.shape, seed=2)
    for expected, found in zip(
        gradients(output, straight, seed=seed),
        gradients(other, strided, seed=reversed_view(seed)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


@given(mutually_broadcastable_shapes(num_shapes=2, max_dims=4, min_side=0, max_side=3))
def test_broadcasting_sums_the_gradient(shapes):
    a, b = (Node(normal(*shape)) for shape in shapes.input_shapes)
    output = a * b
    assert output.value.shape == shapes.result_shape
    seed = normal(*shapes.result_shape, seed=1)
    ga, gb = gradients(output, [a, b], seed=seed)
    for gradient, x, other in ((ga, a, b), (gb, b, a)):
        expected = np.zeros(x.value.shape)
        products = seed * other.value
        for place, where in zip(
            np.ndindex(*output.value.shape),
            np.broadcast_to(
                np.arange(x.value.size).reshape(x.value.shape), output.value.shape
            ).flat,
            strict=True,
        ):
            expected.flat[where] += np.broadcast_to(products, seed.shape)[place]
        np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- operands


def test_operators_reach_the_operations():
    a, b = normal(3, 3), positive(3, 3)
    x, y = Node(a), Node(b)
    pairs = [
        (x + y, a + b), (x - y, a - b), (x * y, a * b), (x / y, a / b), (x @ y, a @ b),
        (a + y, a + b), (a - y, a - b), (a * y, a * b), (a / y, a / b), (a @ y, a @ b),
        (x + b, a + b), (x - b, a - b), (x * b, a * b), (x / b, a / b), (x @ b, a @ b),
        (2 + y, 2 + b), (2 - y, 2 - b), (2 * y, 2 * b), (2 / y, 2 / b),
        (-x, -a), (x[1:, 0], a[1:, 0]),
    ]  # fmt: skip
    for node, expected in pairs:
        assert isinstance(node, Node)
        np.testing.assert_array_equal(node.value, expected)


def test_rows_of_a_node_can_be_iterated():
    rows = list(Node(np.arange(6.0).reshape(3, 2)))
    np.testing.assert_array_equal([row.value for row in rows], [[0, 1], [2, 3], [4, 5]])


@pytest.mark.parametrize(
    "constant",
    [np.float64(3), np.int64(3), np.arange(1, 4), np.arange(1.0, 4.0), np.array(True), 3, True],
)
def test_constants_take_the_dtype_of_the_node(constant):
    x = Node(np.ones(3, np.float32))
    for output in (x + constant, constant * x, x / constant, tape.maximum(constant, x)):
        assert output.value.dtype == np.float32
        assert [parent for parent, _ in output.parents] == [x]


def test_numpy_functions_refuse_nodes():
    with pytest.raises(TypeError):
        np.exp(Node(np.ones(2)))


@pytest.mark.parametrize("operand", [[1.0], "1", None])
def test_operands_of_other_types_are_refused(operand):
    with pytest.raises(TypeError, match=r"b must be a Node, an array or a number, got"):
        tape.add(Node(np.ones(1)), operand)


def test_operations_on_arrays_alone_give_a_leaf():
    output = tape.relu(np.array([-1.0, 2.0]))
    assert output.parents == ()
    np.testing.assert_array_equal(output.value, [0.0, 2.0])


# ---------------------------------------------------------------- values


def test_elementwise_values(xp, host):
    x = spread(4, 5)
    for f, expected in (
        (tape.exp, [math.exp(v) for v in x.flat]),
        (tape.relu, [max(v, 0) for v in x.flat]),
        (lambda x: tape.clip(x, -0.3, 0.4), [min(max(v, -0.3), 0.4) for v in x.flat]),
        (lambda x: tape.maximum(x, 0.15), [max(v, 0.15) for v in x.flat]),
        (lambda x: tape.prelu(x, Node(xp.asarray(0.3))), [v if v > 0 else 0.3 * v for v in x.flat]),
        (lambda x: tape.log(x * x), [math.log(v * v) for v in x.flat]),
    ):
        value = f(Node(xp.asarray(x))).value
        np.testing.assert_allclose(host(value).ravel(), expected, rtol=1e-14)


def test_float16_is_summed_in_float32(xp, host):
    x, bias = Node(xp.ones((10_000, 3), np.float16)), Node(xp.zeros(3, np.float16))
    np.testing.assert_array_equal(host(tape.sum(x, 0).value), np.full(3, 10_000))
    (gx,) = gradients(tape.add(x, bias), [bias], seed=x.value)
    np.testing.assert_array_equal(host(gx), np.full(3, 10_000))
    many = Node(xp.ones(100_000, np.float16))
    average = tape.mean(many)
    assert average.value == 1
    (gx,) = gradients(average, [many])
    np.testing.assert_array_equal(host(gx), np.full(100_000, np.float16(1e-5)))


def test_repeated_indices_accumulate(xp, host):
    x = Node(xp.zeros(3))
    seed = xp.asarray([1.0, 2.0, 4.0, 8.0])
    (gx,) = gradients(x[xp.asarray([1, 1, 2, 1])], [x], seed=seed)
    np.testing.assert_array_equal(host(gx), [0.0, 11.0, 4.0])


def test_gradients_at_kinks(xp, host):
    x = Node(xp.asarray([-0.0, 0.0, 1.0, 2.0, np.nan]))

    def at(output):
        return host(gradients(output, [x], seed=xp.ones(5))[0])

    np.testing.assert_array_equal(at(tape.relu(x)), [0, 0, 1, 1, 0])
    np.testing.assert_array_equal(at(tape.clip(x, 0, 1)), [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(at(tape.maximum(x, 1.0)), [0, 0, 0.5, 1, 0])
    np.testing.assert_array_equal(at(tape.prelu(x, 0.25)), [0.25, 0.25, 1, 1, 0])
    np.testing.assert_array_equal(at(tape.maximum(x, x)), [1, 1, 1, 1, 0])


def test_nan_passes_through(xp, host):
    x = Node(xp.asarray([[np.nan, 1.0]]))
    for output in (tape.relu(x), tape.clip(x, 0, 1), tape.maximum(0, x), tape.prelu(x, 0.25)):
        np.testing.assert_array_equal(np.isnan(host(output.value)), [[True, False]])


def test_empty_arrays(xp, host):
    x = Node(xp.zeros((0, 3)))
    for output, shape in ((x * 2, (0, 3)), (tape.sum(x, 0), (3,)), (x @ xp.ones((3, 2)), (0, 2))):
        assert output.value.shape == shape
        assert gradients(output, [x], seed=xp.ones(shape))[0].shape == (0, 3)
    images, kernels = Node(xp.zeros((0, 2, 5, 5))), Node(xp.asarray(normal(3, 2, 3, 3)))
    output = tape.conv2d(images, kernels)
    assert output.value.shape == (0, 3, 3, 3)
    gx, gw = gradients(output, [images, kernels], seed=xp.ones((0, 3, 3, 3)))
    assert gx.shape == (0, 2, 5, 5)
    np.testing.assert_array_equal(host(gw), np.zeros((3, 2, 3, 3)))


def as_pair(value):
    return value if isinstance(value, tuple) else (value, value)


@pytest.mark.parametrize(("x", "w", "stride", "padding", "groups"), CONVOLUTIONS)
def test_conv2d_value(x, w, stride, padding, groups, xp, host):
    x, w = normal(*x), normal(*w, seed=1)
    (down, right), (above, left) = as_pair(stride), as_pair(padding)
    n, _, height, width = x.shape
    kernels, depth, tall, wide = w.shape
    rows = (height + 2 * above - tall) // down + 1
    columns = (width + 2 * left - wide) // right + 1
    expected = np.zeros((n, kernels, rows, columns))
    for image, kernel, p, q in np.ndindex(*expected.shape):
        first = kernel // (kernels // groups) * depth
        for c, i, j in itertools.product(range(depth), range(tall), range(wide)):
            row, column = p * down + i - above, q * right + j - left
            if 0 <= row < height and 0 <= column < width:
                expected[image, kernel, p, q] += (
                    w[kernel, c, i, j] * x[image, first + c, row, column]
                )
    nodes = Node(xp.asarray(x)), Node(xp.asarray(w))
    value = tape.conv2d(*nodes, stride=stride, padding=padding, groups=groups).value
    assert value.shape == expected.shape
    np.testing.assert_allclose(host(value), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("pool", "statistic"), [(tape.max_pool, np.max), (tape.mean_pool, np.mean)]
)
@pytest.mark.parametrize(("size", "stride"), [(2, None), (3, 2), ((2, 3), (1, 4)), (1, 3)])
def test_pool_values(pool, statistic, size, stride, xp, host):
    x = normal(2, 3, 7, 9)
    tall, wide = as_pair(size)
    down, right = as_pair(size if stride is None else stride)
    expected = [
        [
            [
                [
                    statistic(plane[p : p + tall, q : q + wide])
                    for q in range(0, 9 - wide + 1, right)
                ]
                for p in range(0, 7 - tall + 1, down)
            ]
            for plane in image
        ]
        for image in x
    ]
    value = pool(Node(xp.asarray(x)), size, stride=stride).value
    np.testing.assert_allclose(host(value), expected, rtol=1e-14)


def test_max_pool_gives_a_tie_to_the_first(xp, host):
    x = Node(xp.asarray([[[[1.0, 5.0], [5.0, 5.0]]]]))
    (gx,) = gradients(tape.max_pool(x, 2), [x])
    np.testing.assert_array_equal(host(gx), [[[[0.0, 1.0], [0.0, 0.0]]]])


def test_batch_norm_values_and_running_statistics():
    x, gamma, beta = normal(4, 3, 2, 5), normal(3, seed=1), normal(3, seed=2)
    before = [array.copy() for array in RUNNING]
    y, (mean, variance) = tape.batch_norm(
        Node(x), gamma, beta, RUNNING, train=True, momentum=0.25, epsilon=1e-3
    )
    for c in range(3):
        channel = [x[n, c, i, j] for n, i, j in np.ndindex(4, 2, 5)]
        m = math.fsum(channel) / 40
        v = math.fsum((value - m) ** 2 for value in channel) / 40
        np.testing.assert_allclose(
            y.value[:, c], (x[:, c] - m) / math.sqrt(v + 1e-3) * gamma[c] + beta[c], atol=1e-13
        )
        assert mean[c] == pytest.approx(0.75 * RUNNING[0][c] + 0.25 * m, rel=1e-13)
        assert variance[c] == pytest.approx(0.75 * RUNNING[1][c] + 0.25 * v * 40 / 39, rel=1e-13)
    np.testing.assert_array_equal(RUNNING, before)


def test_batch_norm_inference_uses_the_running_statistics():
    x, gamma, beta = normal(4, 3), normal(3, seed=1), normal(3, seed=2)
    y, running = tape.batch_norm(Node(x), gamma, beta, RUNNING, train=False, epsilon=1e-3)
    expected = (x - RUNNING[0]) / np.sqrt(RUNNING[1] + 1e-3) * gamma + beta
    np.testing.assert_allclose(y.value, expected, rtol=1e-13)
    np.testing.assert_array_equal(running, RUNNING)


def test_batch_norm_running_statistics_keep_float32():
    x = Node(normal(4, 3).astype(np.float32))
    running = (np.zeros(3, np.float32), np.ones(3, np.float32))
    _, running = tape.batch_norm(
        x, np.ones(3), np.zeros(3), running, train=True, momentum=np.float64(0.1)
    )
    assert [array.dtype for array in running] == [np.float32] * 2


def test_batch_norm_of_float16_does_not_overflow(xp, host):
    values, seed = 3e3 * normal(50, 2), normal(50, 2, seed=1)
    found = []
    for dtype in (np.float16, np.float64):
        x, one, zero = (
            Node(xp.asarray(v.astype(dtype))) for v in (values, np.ones(2), np.zeros(2))
        )
        running = (zero.value, one.value)
        y, (mean, _) = tape.batch_norm(x, one, zero, running, train=True, momentum=1e-4)
        assert y.value.dtype == mean.dtype == dtype
        (gx,) = gradients(y, [x], seed=xp.asarray(seed))
        assert gx.dtype == dtype
        found.append([host(each).astype(float) for each in (y.value, 3e3 * gx)])
    for half, exact in zip(*found, strict=True):
        np.testing.assert_allclose(half, exact, rtol=2e-2, atol=4e-3)


def test_batch_norm_of_a_constant_channel_is_finite():
    x = Node(np.full((4, 1), 7.0, np.float32))
    y, _ = tape.batch_norm(x, np.ones(1), np.zeros(1), (np.zeros(1), np.ones(1)), train=True)
    np.testing.assert_array_equal(y.value, np.zeros((4, 1)))
    assert np.isfinite(gradients(y, [x], seed=np.ones((4, 1)))[0]).all()


def test_softmax_cross_entropy_value():
    logits, labels = normal(4, 3), np.array([2, 0, 0, 1], np.uint8)
    losses = [
        -math.log(math.exp(row[label]) / math.fsum(map(math.exp, row)))
        for row, label in zip(logits.tolist(), labels, strict=True)
    ]
    value = tape.softmax_cross_entropy(Node(logits), labels).value
    assert value == pytest.approx(math.fsum(losses) / 4, rel=1e-14)


def test_softmax_cross_entropy_does_not_overflow(xp, host):
    logits = Node(xp.asarray(np.array([[1e4, 0.0], [-1e4, 0.0]], np.float32)))
    output = tape.softmax_cross_entropy(logits, xp.asarray([1, 1]))
    assert output.value == 5e3
    (gradient,) = gradients(output, [logits])
    np.testing.assert_array_equal(host(gradient), [[0.5, -0.5], [0.0, 0.0]])


def test_dropout_keeps_the_expectation_and_repeats_with_its_generator():
    x = Node(np.ones((200, 500), np.float32))
    first = tape.dropout(x, 0.25, np.random.default_rng(3))
    again = tape.dropout(x, 0.25, np.random.default_rng(3))
    np.testing.assert_array_equal(first.value, again.value)
    assert set(np.unique(first.value)) == {np.float32(0), np.float32(1) / np.float32(0.75)}
    # The share of the kept has a standard deviation of sqrt(0.75 * 0.25 / 1e5) = 0.0014.
    assert np.count_nonzero(first.value) / 1e5 == pytest.approx(0.75, abs=0.01)
    (gx,) = gradients(first, [x], seed=np.ones_like(x.value))
    np.testing.assert_array_equal(gx, first.value)


@pytest.mark.parametrize("seed", [0, np.int64(3)])
def test_dropout_takes_the_seed_of_a_generator(seed):
    x = np.ones((40, 50))
    expected = tape.dropout(x, 0.25, np.random.default_rng(seed)).value
    np.testing.assert_array_equal(tape.dropout(x, 0.25, seed).value, expected)


def test_dropout_makes_the_generator_in_the_library_of_x(device, monkeypatch):
    made = []

    def default_rng(seed):
        made.append(seed)
        return Draws(Node(device.zeros(3)), seed)

    random = SimpleNamespace(default_rng=default_rng)
    monkeypatch.setattr(device, "random", random, raising=False)
    output = tape.dropout(device.ones((3, 4)), 0.5, 7)
    assert made == [7]
    assert library(output.value) is not np


def test_dropout_at_rate_zero_is_the_identity():
    x = normal(5, 5)
    np.testing.assert_array_equal(tape.dropout(Node(x), 0, np.random.default_rng(0)).value, x)


# ---------------------------------------------------------------- refusals

IMAGES = Node(np.ones((2, 4, 5, 6)))
THREE = np.ones(3)
PAIR = (np.zeros(4), np.ones(4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tape.conv2d(np.ones((4, 5, 6)), np.ones((1, 4, 3, 3))), r"x must .*\(4, 5, 6\)"),
        (lambda: tape.conv2d(IMAGES, np.ones((4, 3, 3))), r"w must have the axes .*\(4, 3, 3\)"),
        (lambda: tape.conv2d(IMAGES, np.ones((1, 3, 3, 3))), "3 channels in each of 1 groups"),
        (lambda: tape.conv2d(IMAGES, np.ones((2, 1, 3, 3)), groups=3), "groups must .* got 3"),
        (lambda: tape.conv2d(IMAGES, np.ones((3, 2, 3, 3)), groups=2), "3 kernels of w, got 2"),
        (lambda: tape.conv2d(IMAGES, np.ones((2, 4, 3, 3)), groups=0), "groups must .* got 0"),
        (lambda: tape.conv2d(IMAGES, np.ones((2, 4, 6, 3))), r"window of \(6, 3\) .* \(5, 6\)"),
        (lambda: tape.conv2d(IMAGES, np.ones((2, 4, 3, 3)), stride=0), "stride must .* 1, got 0"),
        (
            lambda: tape.conv2d(IMAGES, np.ones((2, 4, 3, 3)), padding=-1),
            "padding must .* 0, got -1",
        ),
        (
            lambda: tape.conv2d(IMAGES, np.ones((2, 4, 3, 3)), stride=(1, 1, 1)),
            "stride must be one or",
        ),
        (lambda: tape.max_pool(THREE, 2), r"x must have the axes .*\(3,\)"),
        (lambda: tape.mean_pool(IMAGES, (2, 7)), r"window of \(2, 7\) does not fit .*\(5, 6\)"),
        (lambda: tape.max_pool(IMAGES, 0), "size must be one or two integers of at least 1, got 0"),
        (lambda: tape.prelu(IMAGES, THREE), r"slope must .*\(2, 4, 5, 6\), got shape \(3,\)"),
        (lambda: tape.prelu(Node(THREE), THREE), r"slope must have one value per channel"),
        (
            lambda: tape.batch_norm(IMAGES, THREE, THREE, PAIR, train=True),
            r"gamma must have one value per channel.*got shape \(3,\)",
        ),
        (
            lambda: tape.batch_norm(IMAGES, PAIR[0], PAIR[1], (THREE, THREE), train=False),
            r"running mean must have one value per channel.*got shape \(3,\)",
        ),
        (
            lambda: tape.batch_norm(np.ones((1, 4)), *PAIR, PAIR, train=True),
            r"x of shape \(1, 4\) has no two elements per channel",
        ),
        (
            lambda: tape.batch_norm(IMAGES, *PAIR, PAIR, train=True, momentum=2),
            r"momentum must lie in 0 .. 1, got 2",
        ),
        (
            lambda: tape.batch_norm(IMAGES, *PAIR, PAIR, train=True, epsilon=-1),
            "epsilon must lie in 0 <= epsilon < inf, got -1",
        ),
        (
            lambda: tape.batch_norm(IMAGES, 1.0, 0.0, PAIR, train=True),
            r"gamma must have one value per channel.*got shape \(\)",
        ),
        (lambda: tape.clip(IMAGES, np.nan, 1), "low must not exceed high, got low=nan"),
        (lambda: tape.transpose(IMAGES, (0, 1)), r"axes must name each of the 4 axes of x once"),
        (lambda: tape.transpose(IMAGES, (0, 1, 2, 2)), r"axes \(0, 1, 2, 2\) names an axis"),
        (lambda: tape.sum(IMAGES, (0, 0)), r"axis \(0, 0\) names an axis of x twice"),
        (lambda: tape.clip(IMAGES, 1, -1), "low must not exceed high, got low=1.0 and high=-1.0"),
        (lambda: tape.dropout(IMAGES, 1.0, None), "rate must lie in 0 <= rate < 1, got 1.0"),
        (lambda: tape.dropout(IMAGES, np.nan, None), "rate must lie in 0 <= rate < 1, got nan"),
        (lambda: tape.dropout(IMAGES, 0.5, -1), "rng must be a seed of at least 0, got -1"),
        (
            lambda: tape.softmax_cross_entropy(Node(THREE), np.array([0])),
            r"logits must have the axes .*\(3,\)",
        ),
        (
            lambda: tape.softmax_cross_entropy(np.ones((0, 3)), np.zeros(0, int)),
            r"neither empty, got shape \(0, 3\)",
        ),
        (
            lambda: tape.softmax_cross_entropy(np.ones((2, 3)), np.array([0])),
            r"one label per row of logits of shape \(2, 3\), got shape \(1,\)",
        ),
        (
            lambda: tape.softmax_cross_entropy(np.ones((2, 3)), np.array([0, 3])),
            r"labels must lie in 0 .. 2, got 0 .. 3",
        ),
        (
            lambda: tape.softmax_cross_entropy(np.ones((2, 3)), np.array([-1, 2])),
            r"labels must lie in 0 .. 2, got -1 .. 2",
        ),
        (lambda: tape.matmul(IMAGES, THREE), "matmul"),
        (lambda: tape.add(IMAGES, THREE), "broadcast"),
        (lambda: tape.reshape(THREE, (2, 2)), "reshape"),
        (lambda: tape.sum(THREE, 1), "axis 1 is out of range"),
        (lambda: tape.mean(THREE, -2), "axis -2 is out of range"),
    ],
)
def test_bad_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tape.conv2d(IMAGES, IMAGES, stride=1.5), "stride must be an integer, got float"),
        (lambda: tape.conv2d(IMAGES, IMAGES, 1), "2 positional arguments but 3 were given"),
        (lambda: tape.max_pool(IMAGES, 2, 2), "2 positional arguments but 3 were given"),
        (lambda: tape.mean_pool(IMAGES, 2, 2), "2 positional arguments but 3 were given"),
        (lambda: tape.sum(IMAGES, 1, True), "1 to 2 positional arguments but 3 were given"),
        (lambda: tape.mean(IMAGES, 1, True), "1 to 2 positional arguments but 3 were given"),
        (lambda: tape.sign(IMAGES, "ste"), "1 positional argument but 2 were given"),
        (lambda: tape.multibit(IMAGES, 1, 0), "2 positional arguments but 3 were given"),
        (lambda: tape.gradients(IMAGES, [], IMAGES), "2 positional arguments but 3 were given"),
        (lambda: tape.sgd({}, {}, {}, 0.1, 0.9), "4 positional arguments but 5 were given"),
        (lambda: tape.adam({}, {}, {}, 0.1, (0, 0)), "3 to 4 positional arguments but 5 were"),
        (lambda: tape.conv2d(IMAGES, IMAGES, groups=True), "groups must be an integer"),
        (lambda: tape.max_pool(IMAGES, "2"), "size must be an integer, got str"),
        (lambda: tape.softmax_cross_entropy(np.ones((1, 3)), [0]), "labels must .* got list"),
        (
            lambda: tape.softmax_cross_entropy(np.ones((1, 3)), np.array([0.0])),
            "labels must be an integer array, got float64",
        ),
        (lambda: tape.sum(IMAGES, "x"), "axis must be an integer, got str"),
        (lambda: tape.clip(IMAGES, "x", 1), "low must be a real number, got str"),
        (lambda: tape.dropout(IMAGES, "x", None), "rate must be a real number, got str"),
        (lambda: tape.dropout(IMAGES, 0.5, 1.0), "rng must be a random generator or .* got float"),
        (lambda: tape.dropout(IMAGES, 0.5, True), "rng must be a random generator or .* got bool"),
        (lambda: tape.dropout(IMAGES, 0.5, None), "rng must be .* seed, got NoneType"),
        (
            lambda: tape.batch_norm(IMAGES, *PAIR, (PAIR[0], np.ones(4, int)), train=True),
            "running variance must be float16, bfloat16, float32 or float64, got int64",
        ),
        (
            lambda: tape.batch_norm(IMAGES, *PAIR, None, train=True),
            r"running must be a pair \(mean, variance\), got NoneType",
        ),
        (lambda: tape.add(IMAGES, np.array([None])), "b must hold real numbers, got object"),
        (lambda: tape.add(IMAGES, np.array([1j])), "b must hold real numbers, got complex128"),
        (lambda: tape.add(np.array(["1"]), IMAGES), "a must hold real numbers, got <U1"),
        (lambda: tape.exp("x"), "x must be a Node, an array or a number, got str"),
    ],
)
def test_bad_types_are_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call()
