"""cubin.torch.Linear and Conv2d against PyTorch's layers with the decoded weights, in float64."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest

import cubin
from cubin import BinaryCode, products
from tests.required import require

torch = require("torch")

import cubin.torch  # noqa: E402
from cubin.torch import Conv2d, Linear  # noqa: E402

CLOSE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}
"""Of the largest output, by the dtype of x."""


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def decoded(layer, packed):
    """A copy of PyTorch's layer in float64, with the weights that the packed one stands for."""
    plain = copy.deepcopy(layer).double()
    with torch.no_grad():
        plain.weight.copy_(copy.deepcopy(packed).double().code.dequantize())
    return plain


def check(found, expected, dtype):
    assert found.dtype is dtype
    assert found.shape == expected.shape
    expected = expected.detach()
    room = CLOSE[dtype] * max(1, float(expected.abs().max())) if expected.numel() else 0
    assert (found.double() - expected).abs().le(room).all()


def linear(bits=2, length=72, **options):
    layer = torch.nn.Linear(length, 13)
    return layer, Linear.from_linear(layer, bits, **options)


MAP = torch.arange(13 * 72).reshape(13, 72) % 3
LINEAR = {
    "lines": {},
    "tensor": {"channel_axis": None},
    "columns": {"channel_axis": 1},
    "groups": {"group_size": 24},
    "refined": {"solver": "refined", "importance": torch.linspace(0.5, 1, 72)},
    "map": {"bits": MAP},
    "map of lines": {"bits": MAP[:, :1], "group_size": 8},
}


@pytest.mark.parametrize("options", LINEAR.values(), ids=LINEAR)
@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
def test_linear_is_that_of_the_decoded_weights(options, dtype):
    layer, packed = linear(**options)
    plain = decoded(layer, packed)
    for shape in [(72,), (1, 72), (2, 3, 72), (0, 72), (40, 72)]:
        x = torch.randn(shape).to(dtype)
        check(packed(x), plain(x.double()), dtype)


def test_codes_are_those_of_quantize():
    layer, packed = linear(3, solver="alternating", iterations=1)
    weight = layer.weight.detach()
    assert packed.code == cubin.quantize(
        weight, 3, channel_axis=0, solver="alternating", iterations=1
    )
    assert packed.code.channel_axis == 0
    gram = cubin.Gram(72)
    gram.add(torch.randn(100, 72))
    _, packed = linear(2, group_size=24, solver="refined", gram=gram)
    assert (packed.code.channel_axis, packed.code.group_size) == (None, 24)
    narrow = Linear.from_linear(layer.bfloat16(), 1)
    assert narrow.scales.dtype is narrow.bias.dtype is torch.bfloat16


def test_a_layer_of_any_code(rng):
    w = rng.normal(size=(5, 21)).astype(np.float32)
    code = cubin.quantize(w, 2, channel_axis=0)
    packed = Linear(code[1:4])
    assert packed.bias is None
    assert packed.planes.is_contiguous()
    x = rng.normal(size=(2, 21)).astype(np.float32)
    np.testing.assert_array_equal(packed(torch.from_numpy(x)), products.linear(x, code[1:4]))
    packed.planes.zero_()  # a copy
    assert code == cubin.quantize(w, 2, channel_axis=0)


def with_shift(code):
    """The same code beside a constant of each row."""
    shift = torch.linspace(-1, 1, code.scales[0].numel(), dtype=code.dtype)
    return BinaryCode(
        code.scales, code.planes, code.bits, shape=code.shape, channel_axis=code.channel_axis,
        group_size=code.group_size, shift=shift.reshape(code.scales.shape[1:]),
    )  # fmt: skip


def test_layers_of_codes_with_a_shift():
    layer = torch.nn.Linear(24, 5)
    packed = Linear.from_linear(layer, 2, group_size=12, shift=True)
    x = torch.randn(3, 24)
    check(packed(x), decoded(layer, packed)(x.double()), torch.float32)
    assert set(packed.state_dict()) == {"planes", "scales", "shift", "bias"}
    results = torch.library.opcheck(torch.ops.cubin.linear.default, (x, *packed._parts()))
    assert set(results.values()) == {"SUCCESS"}
    conv = torch.nn.Conv2d(3, 4, 3, padding=1)
    packed = Conv2d(
        with_shift(cubin.quantize(conv.weight, 1, channel_axis=0)), conv.bias, padding=1
    )
    x = torch.randn(2, 3, 4, 4)
    check(packed(x), decoded(conv, packed)(x.double()), torch.float32)


CONVOLUTIONS = {
    "plain": ((6, 4, 3), {}),
    "stride": ((6, 4, (3, 2)), {"stride": (2, 1), "padding": (1, 2)}),
    "groups": ((6, 4, 3), {"groups": 2, "padding": 1, "bias": False}),
    "depthwise": ((4, 4, 3), {"groups": 4, "stride": 2}),
    "valid": ((6, 4, 2), {"padding": "valid"}),
    "same": ((6, 4, (3, 5)), {"padding": "same"}),
    "same, even": ((6, 4, (2, 4)), {"padding": "same", "groups": 2}),
    "1 x 1": ((6, 4, 1), {"stride": 2}),
}


def convolution(name, bits=2, **options):
    (channels, kernels, size), arguments = CONVOLUTIONS[name]
    layer = torch.nn.Conv2d(channels, kernels, size, **arguments)
    return layer, Conv2d.from_conv(layer, bits, **options)


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # PyTorch's own
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_convolutions_are_those_of_the_decoded_weights(name, dtype):
    layer, packed = convolution(name)
    plain = decoded(layer, packed)
    for shape in [(2, 7, 8), (7, 8), (0, 7, 8)]:
        x = torch.randn(*shape[:-2], layer.in_channels, *shape[-2:]).to(dtype)
        check(packed(x), plain(x.double()), dtype)


def test_convolutions_of_any_granularity():
    for options in ({"channel_axis": (0, 1)}, {"channel_axis": None}, {"group_size": 3},
                    {"bits": torch.arange(3), "solver": "refined"}):  # fmt: skip
        layer, packed = convolution("plain", **options)
        x = torch.randn(2, 6, 5, 5)
        check(packed(x), decoded(layer, packed)(x.double()), torch.float32)


# ---------------------------------------------------------------- state

LAYERS = {
    "linear": lambda: linear()[1],
    "linear, map": lambda: linear(MAP)[1],
    "convolution": lambda: convolution("stride")[1],
    "convolution, map": lambda: convolution("same, even", torch.arange(3)[:, None, None])[1],
}


def inputs_of(layer):
    return torch.randn(3, 72) if isinstance(layer, Linear) else torch.randn(2, 6, 5, 5)


@pytest.mark.parametrize("name", LAYERS)
def test_the_state_goes_into_a_new_layer(name):
    layer = LAYERS[name]()
    buffers = {"planes", "scales"} | ({"bits"} if "map" in name else set())
    assert set(layer.state_dict()) == buffers | {"bias"}
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    for assign in (False, True):
        other = LAYERS[name]()
        x = inputs_of(layer)
        assert not torch.equal(other(x), layer(x))
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
        assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_copied_and_pickled(name):
    layer = LAYERS[name]()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    x = inputs_of(layer)
    loaded = torch.load(file, weights_only=False)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert repr(other) == repr(layer)
        assert torch.equal(other(x), expected)
        other.scales.zero_()
    assert torch.equal(layer(x), expected)


def test_to_moves_and_casts():
    layer = LAYERS["linear, map"]()
    x = inputs_of(layer)
    before = layer(x)
    wide = copy.deepcopy(layer).to(torch.float64)
    assert (wide.scales.dtype, wide.planes.dtype, wide.bits.dtype) == (
        torch.float64, torch.uint8, torch.uint8,
    )  # fmt: skip
    assert wide.code.dtype is torch.float64
    check(wide(x), before.double(), torch.float32)
    assert layer.to("meta").planes.device.type == "meta"
    with pytest.raises(TypeError, match="without data"):
        layer(x)


def test_the_memory_is_a_fraction():
    layer = torch.nn.Linear(1024, 512, bias=False)
    for bits in (1, 2, 4):
        packed = Linear.from_linear(layer, bits)
        nbytes = sum(buffer.nbytes for buffer in packed.buffers())
        assert nbytes == packed.code.nbytes
        assert nbytes < layer.weight.nbytes * bits / 32 * 1.05
        assert list(packed.parameters()) == []


def test_what_a_layer_says():
    assert repr(linear()[1]) == (
        "Linear(in_features=72, out_features=13, bias=True, bits=2, channel_axis=0)"
    )
    assert repr(linear(MAP, group_size=8)[1]).endswith("bits=(13, 72), group_size=8)")
    assert repr(convolution("same")[1]) == (
        "Conv2d(6, 4, kernel_size=(3, 5), stride=(1, 1), padding='same', groups=1, bias=True, "
        "bits=2, channel_axis=0)"
    )


def test_arguments():
    code = cubin.quantize(torch.ones(3, 4), 1)
    kernels = cubin.quantize(torch.ones(4, 2, 3, 3), 1)
    with pytest.raises(TypeError, match="code must be a BinaryCode, got int"):
        Linear(1)
    with pytest.raises(ValueError, match="code must have 2 axes"):
        Linear(kernels)
    with pytest.raises(ValueError, match="code must have 4 axes"):
        Conv2d(code)
    for bias, error, match in [
        (np.ones(3), TypeError, "bias must be a PyTorch tensor"),
        (torch.ones(3, dtype=torch.int32), TypeError, "bias must be floating point"),
        (torch.ones(4), ValueError, r"bias must have the shape \(3,\)"),
    ]:
        with pytest.raises(error, match=match):
            Linear(code, bias)
    for options, error, match in [
        ({"groups": 3}, ValueError, "groups=3 does not fit"),
        ({"groups": 1.0}, TypeError, "groups"),
        ({"stride": 0}, ValueError, "stride"),
        ({"padding": "full"}, TypeError, "padding"),
        ({"padding": "same", "stride": 2}, ValueError, "'same' needs a stride of 1"),
    ]:
        with pytest.raises(error, match=match):
            Conv2d(kernels, **options)
    for layer, match in [
        (torch.nn.Conv2d(2, 4, 3, dilation=2), "dilation 1"),
        (torch.nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), "padded by zeros"),
    ]:
        with pytest.raises(ValueError, match=match):
            Conv2d.from_conv(layer, 2)
    with pytest.raises(TypeError, match=r"torch\.nn\.Linear, got Conv2d"):
        Linear.from_linear(torch.nn.Conv2d(2, 4, 3), 2)
    with pytest.raises(TypeError, match=r"torch\.nn\.Conv2d, got Linear"):
        Conv2d.from_conv(torch.nn.Linear(2, 4), 2)
    with pytest.raises(ValueError, match="exclude each other"):
        Linear.from_linear(torch.nn.Linear(4, 2), 2, channel_axis=0, group_size=2)
    packed = Linear(code)
    with pytest.raises(ValueError, match="4 elements on its last axis"):
        packed(torch.ones(2, 3))
    with pytest.raises(TypeError, match="x must be a PyTorch tensor"):
        packed(np.ones((2, 4)))
    with pytest.raises(TypeError, match="floating point"):
        packed(torch.ones(2, 4, dtype=torch.int64))


# ---------------------------------------------------------------- gradients


def functions():
    """Functions of x that are linear in it, and an x for each."""
    code = cubin.quantize(torch.randn(5, 12, dtype=torch.float64), 2, group_size=4)
    bits = torch.arange(4 * 2 * 3 * 2).reshape(4, 2, 3, 2) % 4
    kernels = cubin.quantize(torch.randn(4, 2, 3, 2, dtype=torch.float64), bits, channel_axis=0)
    options = {"stride": (2, 1), "padding": (1, 2), "groups": 3}
    grouped = cubin.quantize(torch.randn(6, 2, 3, 2, dtype=torch.float64), 2)
    size, of_layer = (2, 2, 3, 3), torch.nn.Linear(12, 5).double()
    packed = Linear.from_linear(of_layer, 1)
    conv = Conv2d.from_conv(torch.nn.Conv2d(2, 4, (3, 2), padding="same").double(), 2)
    return {
        "linear": (lambda x: products.linear(x, code), (2, 3, 12)),
        "linear, 1-d": (lambda x: products.linear(x, code), (12,)),
        "linear, shift": (lambda x: products.linear(x, with_shift(code)), (2, 12)),
        "code @ x": (lambda x: code @ x, (12, 3)),
        "code @ x, 1-d": (lambda x: code @ x, (12,)),
        "x @ code": (lambda x: x @ code, (2, 3, 5)),
        "x @ code, 1-d": (lambda x: x @ code, (5,)),
        "conv2d": (lambda x: products.conv2d(x, kernels, padding=1), size),
        "conv2d, groups": (lambda x: products.conv2d(x, grouped, **options), (1, 6, 3, 2)),
        "Linear": (packed, (3, 12)),
        "Conv2d": (conv, size),
    }


@pytest.mark.parametrize("name", functions())
def test_gradients(name):
    function, shape = functions()[name]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)
    with torch.no_grad():
        assert function(x).grad_fn is None
    other = x.detach().float().requires_grad_()
    y = function(other)
    y.sum().backward()  # whose gradient is one number, spread
    assert other.grad.dtype is y.dtype is torch.float32


def test_x_is_not_kept():
    """It may be overwritten before the gradient is taken, as PyTorch allows for frozen weights."""
    _, packed = linear()
    x = torch.randn(3, 72, requires_grad=True)
    inner = 2 * x
    y = packed(inner)
    inner.zero_()
    y.sum().backward()
    expected = 2 * packed.code.dequantize().sum(axis=0)
    np.testing.assert_allclose(x.grad.numpy(), np.tile(expected, (3, 1)), rtol=1e-5, atol=1e-5)


def test_a_frozen_layer_stands_in_a_network():
    _, packed = linear()
    network = torch.nn.Sequential(torch.nn.Linear(8, 72), torch.nn.ReLU(), packed)
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    x, before = torch.randn(32, 8), packed.code
    target, losses = torch.randn(32, 13), []
    weights = copy.deepcopy(before)
    for _ in range(30):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(network(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert packed.code == weights
    assert packed.bias.grad is not None


# ---------------------------------------------------------------- compiled


def operands(layer, *rest):
    return [*layer._parts(), *rest]


OPERATORS = {
    "linear": lambda: ("linear", torch.randn(3, 72), operands(LAYERS["linear"]())),
    "linear, map": lambda: ("linear", torch.randn(2, 3, 72), operands(LAYERS["linear, map"]())),
    "linear_grad": lambda: ("linear_grad", torch.randn(3, 13), operands(LAYERS["linear"]())),
    "conv2d": lambda: (
        "conv2d", torch.randn(2, 6, 5, 4), operands(LAYERS["convolution"](), [2, 1], [1, 2], 1),
    ),
    "conv2d_grad": lambda: (
        "conv2d_grad", torch.randn(2, 4, 3, 7),
        [[2, 6, 5, 4], *operands(LAYERS["convolution"](), [2, 1], [1, 2], 1)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_what_pytorch_asks_for(name):
    operator, x, rest = OPERATORS[name]()
    x.requires_grad_(not operator.endswith("grad"))
    results = torch.library.opcheck(getattr(torch.ops.cubin, operator).default, (x, *rest))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_traces_layers_whole(compiled, dynamic):
    network = torch.nn.Sequential(
        LAYERS["convolution, map"](), torch.nn.ReLU(), LAYERS["convolution"](),
        torch.nn.Flatten(), torch.nn.LazyLinear(72), LAYERS["linear"](),
    )  # fmt: skip
    network[2] = Conv2d.from_conv(torch.nn.Conv2d(4, 4, 3, stride=2), 2, group_size=3)
    network(torch.randn(2, 6, 5, 5))
    function = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for count in (2, 2, 3):
        x = torch.randn(count, 6, 5, 5, requires_grad=True)
        seed = torch.randn(count, 13)
        found, expected = function(x), network(x)
        assert torch.equal(found, expected)
        (gx,), (wanted,) = (torch.autograd.grad(y, x, seed) for y in (found, expected))
        torch.testing.assert_close(gx, wanted, rtol=1e-6, atol=1e-6)


def test_export_takes_layers(compiled):
    layer = LAYERS["linear"]()
    x = torch.randn(3, 72)
    program = torch.export.export(layer, (x,))
    names = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert torch.ops.cubin.linear.default in names
    assert torch.equal(program.module()(x), layer(x))


def test_a_code_of_the_layer_shares_its_memory():
    layer = LAYERS["linear"]()
    code = layer.code
    assert isinstance(code, BinaryCode)
    assert code.planes.data_ptr() == layer.planes.data_ptr()
    assert code.scales.data_ptr() == layer.scales.data_ptr()
