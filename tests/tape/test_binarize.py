from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

import cubin
from cubin import operators, tape
from cubin.tape import Node, gradients
from tests.required import require


def pulled(output: Node, x: Node, seed):
    (gx,) = gradients(output, [x], seed=seed)
    return gx


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_sign_is_the_operator(xp, host, rng, dtype):
    values = np.append(rng.normal(0, 2, 50), [0.0, -0.0, 1.0, -1.0]).astype(dtype)
    gy = rng.normal(size=values.shape).astype(dtype)
    x = Node(xp.asarray(values))
    y = tape.sign(x)
    expected, residuals = operators.Sign().forward(values)
    assert y.value.dtype == dtype
    np.testing.assert_array_equal(host(y.value), expected)
    gx = pulled(y, x, xp.asarray(gy))
    assert gx.dtype == dtype
    np.testing.assert_array_equal(host(gx), operators.Sign().backward(residuals, gy))


@pytest.mark.parametrize(
    ("surrogate", "parameters"),
    [("identity", {}), ("approx_sign", {}), ("swish_sign", {"beta": 2.0}), ("tanh", {"t": 3.0})],
)
def test_sign_with_a_surrogate(xp, host, rng, surrogate, parameters):
    values, gy = rng.normal(size=(2, 4, 5))
    x = Node(xp.asarray(values))
    y = tape.sign(x, surrogate=surrogate, **parameters)
    np.testing.assert_array_equal(host(y.value), cubin.sign(values))
    expected = cubin.sign_grad(values, gy, surrogate=surrogate, **parameters)
    np.testing.assert_allclose(host(pulled(y, x, xp.asarray(gy))), expected, rtol=1e-12, atol=1e-14)


LAYOUTS = [{}, {"channel_axis": 0}, {"channel_axis": (1, 0)}, {"group_size": 3}]


@pytest.mark.parametrize("surrogate", ["bits_clip", "scaled_clip", "scale_aware"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_multibit(xp, host, rng, layout, surrogate):
    values, gy = 2 * rng.normal(size=(2, 4, 5, 6))
    bits = rng.integers(0, 4, values.shape)
    x = Node(xp.asarray(values))
    y = tape.multibit(x, bits, surrogate=surrogate, **layout)
    expected = cubin.multibit(values, bits, **layout)
    np.testing.assert_allclose(host(y.value), expected, rtol=1e-12, atol=1e-15)
    gx = pulled(y, x, xp.asarray(gy))
    expected = cubin.multibit_grad(values, bits, gy, surrogate=surrogate, **layout)
    np.testing.assert_allclose(host(gx), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("solver", ["greedy", "refined", "alternating", "optimal"])
def test_multibit_with_a_solver(rng, solver):
    values, gy = 2 * rng.normal(size=(2, 4, 12))
    x = Node(values)
    y = tape.multibit(x, 3, group_size=6, solver=solver)
    np.testing.assert_array_equal(y.value, cubin.multibit(values, 3, group_size=6, solver=solver))
    np.testing.assert_array_equal(
        pulled(y, x, gy), cubin.multibit_grad(values, 3, gy, group_size=6)
    )


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_multibit_is_the_operator(rng, bits):
    values, gy = rng.normal(size=(2, 4, 5, 6))
    x = Node(values)
    operator = operators.MultibitKernel(bits)
    expected, residuals = operator.forward(values)
    y = tape.multibit(x, bits, channel_axis=0)
    np.testing.assert_array_equal(y.value, expected)
    np.testing.assert_array_equal(pulled(y, x, gy), operator.backward(residuals, gy))


def test_gradient_of_a_map_reaches_what_is_before(rng):
    w = Node(rng.normal(size=(3, 4)))
    y = tape.sum(tape.multibit(2 * w, 2, channel_axis=0) * 5)
    np.testing.assert_array_equal(gradients(y, [w])[0], 10.0 * (abs(2 * w.value) <= 2))


def test_scale_aware_is_the_gradient_where_no_sign_is_near_the_clip():
    x = np.array([[3.0, -4.0, 6.0, -7.5], [2.5, 8.0, -3.0, 5.0]])
    f = tape.multibit
    tape.check_gradient(lambda x: f(x, 1, channel_axis=0, surrogate="scale_aware"), x)
    tape.check_gradient(lambda x: f(x, 1, group_size=2, surrogate="scale_aware"), x)
    tape.check_gradient(lambda x: f(x, 1, group_size=3, surrogate="scale_aware"), x)
    tape.check_gradient(lambda x: f(x, 1, surrogate="scale_aware"), x)


def test_arrays_are_constants(xp, host):
    x = xp.asarray(np.array([-2.0, 0.5]))
    for y in (tape.sign(x), tape.multibit(x, 1)):
        assert y.parents == ()
    np.testing.assert_array_equal(host(tape.sign(x).value), [-1, 1])
    np.testing.assert_array_equal(host(tape.multibit(x, 1).value), [-1.25, 1.25])


def test_refusals_come_before_any_gradient():
    x = Node(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"surrogate must be one of ste, .*'hard'"):
        tape.sign(x, surrogate="hard")
    with pytest.raises(TypeError, match="'ste' has no parameter 't'"):
        tape.sign(x, t=1.0)
    with pytest.raises(ValueError, match=r"surrogate must be one of bits_clip, .*'ste'"):
        tape.multibit(x, 1, surrogate="ste")
    with pytest.raises(ValueError, match=r"solver must be one of .*'newton'"):
        tape.multibit(x, 1, solver="newton")
    with pytest.raises(ValueError, match=r"bits must lie in 0 .. 16, got 17"):
        tape.multibit(x, 17)
    with pytest.raises(ValueError, match="group_size must be at least 1"):
        tape.multibit(x, 1, group_size=0)
    with pytest.raises(TypeError, match="x must be float16, bfloat16, float32 or float64"):
        tape.sign(np.ones(3, int))


# ---------------------------------------------------------------- a network


def network(xp, rng):
    """Parameters, running statistics, images and labels of a binary CNN."""
    shapes = {"first": (3, 1, 3, 3), "hidden": (4, 3, 3, 3), "last": (16, 5), "slope": (3,)}
    parameters = {name: xp.asarray(rng.normal(size=s)) for name, s in shapes.items()}
    parameters |= {"gamma": xp.ones(3), "beta": xp.zeros(3)}
    running = (xp.zeros(3), xp.ones(3))
    images, labels = rng.normal(size=(4, 1, 8, 8)), rng.integers(0, 5, 4)
    return parameters, running, xp.asarray(images), xp.asarray(labels)


def loss_of(p, running, images, labels, surrogates):
    x = tape.max_pool(tape.conv2d(images, p["first"], padding=1), 2)
    x = tape.prelu(x, p["slope"])
    x, running = tape.batch_norm(x, p["gamma"], p["beta"], running, train=True)
    x = tape.sign(x, surrogate=surrogates[0])
    w = tape.multibit(p["hidden"], 2, channel_axis=0, surrogate=surrogates[1])
    x = tape.mean_pool(tape.conv2d(x, w, padding=1), 2)
    x = tape.clip(tape.reshape(x, (len(images), -1)), -9, 9)
    return tape.softmax_cross_entropy(tape.matmul(x, p["last"]), labels), running


def step(parameters, running, images, labels, state, surrogates):
    nodes = {name: Node(value) for name, value in parameters.items()}
    loss, running = loss_of(nodes, running, images, labels, surrogates)
    found = dict(zip(nodes, gradients(loss, nodes.values()), strict=True))
    parameters, state = tape.adam(parameters, found, state, 0.01)
    return parameters, running, state, loss.value


SURROGATES = [("ste", "bits_clip"), ("swish_sign", "scaled_clip"), ("tanh", "scale_aware")]


@pytest.mark.parametrize("surrogates", SURROGATES)
def test_training_is_the_same_on_both_libraries(xp, host, surrogates):
    found = []
    for library in (np, xp):
        parameters, running, images, labels = network(library, np.random.default_rng(3))
        state, losses = {}, []
        for _ in range(5):
            parameters, running, state, loss = step(
                parameters, running, images, labels, state, surrogates
            )
            losses.append(float(loss))
        found.append((losses, {name: host(value) for name, value in parameters.items()}))
    (losses, expected), (other, parameters) = found
    np.testing.assert_allclose(other, losses, rtol=1e-9)
    assert losses[-1] < losses[0]
    for name, value in expected.items():
        np.testing.assert_allclose(parameters[name], value, rtol=1e-7, atol=1e-9)


@pytest.mark.kernels
@pytest.mark.parametrize("surrogates", SURROGATES)
def test_training_step_moves_nothing_between_host_and_device(device, rng, forbid_moves, surrogates):
    parameters, running, images, labels = network(device, rng)
    arguments = step(parameters, running, images, labels, {}, surrogates)[:3]
    forbid_moves()
    parameters, running, state = arguments
    step(parameters, running, images, labels, state, surrogates)
    with pytest.raises(AssertionError, match="moves data"):
        device.asarray(np.ones(3))


@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 3, 12)])
def test_a_frozen_code(xp, host, rng, shape):
    code = cubin.quantize(xp.asarray(rng.normal(size=(5, 12))), 2, channel_axis=0)
    values, gy = rng.normal(size=shape), rng.normal(size=(*shape[:-1], 5))
    x = Node(xp.asarray(values))
    y = tape.linear(x, code)
    decoded = host(code.dequantize())
    np.testing.assert_allclose(host(y.value), values @ decoded.T, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(
        host(pulled(y, x, xp.asarray(gy))), gy @ decoded, rtol=1e-12, atol=1e-12
    )
    tape.check_gradient(lambda v: tape.linear(v, code), xp.asarray(values))
    assert tape.linear(xp.asarray(values), code).value.shape == y.value.shape


CONVOLUTIONS = [
    ((2, 3, 5, 6), (4, 3, 3, 3), 1, 0, 1),
    ((2, 4, 5, 7), (6, 2, 3, 2), (2, 1), (1, 2), 2),
    ((1, 3, 4, 4), (3, 1, 1, 1), 3, 0, 3),
]


@pytest.mark.parametrize(("shape", "kernels", "stride", "padding", "groups"), CONVOLUTIONS)
@pytest.mark.parametrize("mapped", [False, True])
def test_a_frozen_code_of_kernels(shape, kernels, stride, padding, groups, mapped, xp, host, rng):
    bits = rng.integers(0, 3, kernels) if mapped else 2
    code = cubin.quantize(xp.asarray(rng.normal(size=kernels)), bits, channel_axis=0)
    options = {"stride": stride, "padding": padding, "groups": groups}
    x = Node(xp.asarray(rng.normal(size=shape)))
    found = tape.conv2d(x, code, **options)
    expected = tape.conv2d(x, code.dequantize(), **options)
    np.testing.assert_allclose(host(found.value), host(expected.value), rtol=1e-12, atol=1e-12)
    g = xp.asarray(rng.normal(size=found.value.shape))
    np.testing.assert_allclose(
        host(pulled(found, x, g)), host(pulled(expected, x, g)), rtol=1e-12, atol=1e-12
    )
    tape.check_gradient(lambda v: tape.conv2d(v, code, **options), x.value)
    assert tape.conv2d(x.value, code, **options).parents == ()


@pytest.mark.parametrize(("shape", "kernels", "stride", "padding", "groups"), CONVOLUTIONS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_frozen_code_of_kernels_is_the_convolution_of_pytorch(
    shape, kernels, stride, padding, groups, dtype, rng
):
    torch = require("torch")
    code = cubin.quantize(rng.normal(size=kernels).astype(np.float32), 2, channel_axis=0)
    values = rng.normal(size=shape).astype(dtype)
    x = Node(values)
    found = tape.conv2d(x, code, stride=stride, padding=padding, groups=groups)
    g = rng.normal(size=found.value.shape).astype(dtype)
    theirs = torch.from_numpy(values.astype(np.float64)).requires_grad_()
    weights = torch.from_numpy(code.dequantize().astype(np.float64))
    expected = torch.nn.functional.conv2d(
        theirs, weights, stride=stride, padding=padding, groups=groups
    )
    expected.backward(torch.from_numpy(g.astype(np.float64)))
    room = {"float16": 1e-2, "float32": 1e-5, "float64": 1e-6}[dtype]
    gx = pulled(found, x, g)
    assert found.value.dtype == gx.dtype == dtype
    np.testing.assert_allclose(found.value, expected.detach().numpy(), rtol=room, atol=room)
    np.testing.assert_allclose(gx, theirs.grad.numpy(), rtol=room, atol=room)


def test_a_frozen_code_of_kernels_is_not_decoded_as_a_whole(rng):
    w = rng.normal(size=(4096, 2048, 1, 1)).astype(np.float32)
    code = cubin.quantize(w, 1, channel_axis=0)
    x = Node(rng.normal(size=(20, 2048, 1, 1)).astype(np.float32))
    g = np.ones((20, 4096, 1, 1), np.float32)

    def step():
        pulled(tape.conv2d(x, code), x, g)

    step()
    cubin.memory.release()
    tracemalloc.start()
    step()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < w.nbytes / 2


def test_kernels_of_a_code_that_do_not_fit(rng):
    code = cubin.quantize(rng.normal(size=(2, 2, 3, 3)), 1)
    x = Node(np.ones((1, 4, 3, 3)))
    with pytest.raises(ValueError, match="groups=1 does not fit 4 channels"):
        tape.conv2d(x, code)
    with pytest.raises(ValueError, match="stride must be one or two integers of at least 1"):
        tape.conv2d(x, code, groups=2, stride=0)
    with pytest.raises(TypeError, match="x must be float16"):
        tape.conv2d(np.ones((1, 4, 3, 3), int), code, groups=2)
