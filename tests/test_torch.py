"""cubin.torch, and gradients of the plain functions on tensors: those of cubin.tape, to the bit."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
import threading
import warnings

import numpy as np
import pytest

import cubin
from cubin import surrogates, tape
from cubin.core import primitives
from cubin.surrogates import surrogate
from tests.exhaustive import few
from tests.required import require

torch = require("torch")
from torch.nn.utils.parametrize import register_parametrization  # noqa: E402

import cubin.torch  # noqa: E402

same = np.testing.assert_array_equal


def leaf(values):
    return torch.from_numpy(values.copy()).requires_grad_()


def pulled(y, x, seed):
    (gx,) = torch.autograd.grad(y, x, torch.from_numpy(seed))
    return gx.numpy()


def on_tape(y, x, seed):
    (gx,) = tape.gradients(y, [x], seed=seed)
    return gx


# ---------------------------------------------------------------- gradients

SIGN = {
    "ste": {},
    "ste, clip": {"clip": 0.5},
    "identity": {},
    "approx_sign": {},
    "swish_sign": {"beta": 2.0},
    "tanh": {"t": 3.0},
    "triangle": {"t": 0.5},
}


@pytest.mark.parametrize("dtype", few(["float16", "float32", "float64"], "float32"))
@pytest.mark.parametrize("name", list(SIGN))
def test_gradients_of_the_sign_are_the_tapes(rng, name, dtype):
    values = np.append(rng.normal(0, 2, 30), [0.0, -0.0, 1.0, np.nan]).astype(dtype)
    seed = rng.normal(size=values.shape).astype(dtype)
    rule = {"surrogate": name.partition(",")[0], **SIGN[name]}
    x, node = leaf(values), tape.Node(values)
    y, expected = cubin.torch.sign(x, **rule), tape.sign(node, **rule)
    same(y.detach().numpy(), expected.value)
    same(pulled(y, x, seed), on_tape(expected, node, seed))
    if name == "ste":
        same(pulled(cubin.sign(x), x, seed), on_tape(expected, node, seed))


@pytest.mark.parametrize("rule", ["bits_clip", "scaled_clip", "scale_aware"])
@pytest.mark.parametrize("solver", ["greedy", "refined", "alternating", "optimal"])
@pytest.mark.parametrize("layout", [{}, {"channel_axis": 0}, {"group_size": 3}, {"group_size": 4}])
def test_gradients_of_multibit_are_the_tapes(rng, rule, solver, layout):
    values = rng.normal(size=(4, 6)).astype(np.float32)
    seed = rng.normal(size=(4, 6)).astype(np.float32)
    for bits in (2, rng.integers(0, 4, (4, 6))):
        x, node = leaf(values), tape.Node(values)
        given = bits if isinstance(bits, int) else torch.from_numpy(bits)
        y = cubin.torch.multibit(x, given, solver=solver, surrogate=rule, **layout)
        expected = tape.multibit(node, bits, solver=solver, surrogate=rule, **layout)
        same(y.detach().numpy(), expected.value)
        same(pulled(y, x, seed), on_tape(expected, node, seed))
        if rule == "bits_clip":
            plain = cubin.multibit(x, given, solver=solver, **layout)
            same(pulled(plain, x, seed), on_tape(expected, node, seed))


def test_a_surrogate_of_ones_own(rng):
    @surrogate("1 / ((absolute(v) + width) * (absolute(v) + width))")
    def of_torch(v, width=1.0):
        return 1 / (np.abs(v) + width) ** 2

    try:
        values, seed = rng.normal(size=(2, 8))
        x = leaf(values)
        y = cubin.torch.sign(x, surrogate="of_torch", width=2.0)
        same(pulled(y, x, seed), cubin.sign_grad(values, seed, surrogate="of_torch", width=2.0))
    finally:
        del surrogates.SIGN["of_torch"], primitives.REGISTRY["of_torch"]


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("layout", [{}, {"channel_axis": 0}])
def test_scale_aware_is_the_derivative_where_no_sign_lets_through(rng, bits, layout):
    """Where all residuals exceed 1, the signs have the gradient 0 and the scales the exact one."""
    magnitudes = np.where(np.arange(8) % 2, 40, 20) + rng.uniform(-3, 3, (2, 8))
    x = torch.from_numpy(magnitudes * rng.choice([-1, 1], (2, 8))).requires_grad_()

    def binarized(x):
        return cubin.torch.multibit(x, bits, surrogate="scale_aware", **layout)

    assert torch.autograd.gradcheck(binarized, x)


def test_nothing_is_recorded_without_grad_mode(rng):
    x = leaf(rng.normal(size=5))
    for call in (cubin.sign, cubin.torch.sign, lambda x: cubin.multibit(x, 1),
                 lambda x: cubin.torch.multibit(x, 1)):  # fmt: skip
        with torch.no_grad():
            assert call(x).grad_fn is None
        with torch.inference_mode():
            assert not call(x).requires_grad
        assert call(x.detach()).grad_fn is None
        assert call(x).requires_grad


@pytest.mark.parametrize("call", [cubin.sign, cubin.torch.sign])
def test_a_gradient_has_none_itself(rng, call):
    x = leaf(rng.normal(size=5))
    (gx,) = torch.autograd.grad(call(x * x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated itself"):
        gx.sum().backward()


def test_changes_before_the_gradient_are_seen(rng):
    for call in (cubin.sign, cubin.torch.sign, lambda x: cubin.multibit(x, 1)):
        x = leaf(rng.normal(size=5)) * 1
        y = call(x)
        x += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    bits = torch.ones(5, dtype=torch.int8)
    y = cubin.multibit(leaf(rng.normal(size=5)), bits)
    bits += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_writing_out_is_seen(rng):
    """Also by PyTorch: what another operation has saved must not change."""
    x = torch.from_numpy(rng.normal(size=5))
    w = leaf(rng.normal(size=5))
    product = (w * x).sum()
    before = x._version
    assert cubin.sign(x, out=x) is x
    assert x._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_out_and_gradients_exclude_each_other(rng):
    w, y = leaf(rng.normal(size=5)), torch.empty(5, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"writing out is not recorded: use torch\.no_grad"):
        cubin.multibit(w, 2, out=y)
    with pytest.raises(TypeError, match=r"out requires grad.*out\.detach\(\)"):
        cubin.sign(y, out=w)
    with torch.no_grad():
        cubin.multibit(w, 2, out=y)
    same(y.numpy(), cubin.multibit(w.detach().numpy(), 2))


# ---------------------------------------------------------------- tensors


def test_views_without_a_copy(rng):
    x = torch.from_numpy(rng.normal(size=(4, 6)))
    out = torch.zeros(12, 4, dtype=torch.float64)[::2].T
    assert cubin.multibit(x, 2, out=out) is out
    same(out.numpy(), cubin.multibit(x.numpy(), 2))
    view = cubin.core.libraries.TORCH.view("x", x)
    assert view.__array_interface__["data"][0] == x.data_ptr()
    with pytest.raises(ValueError, match="share memory"):
        cubin.sign(x, out=torch.zeros(1, 1, dtype=torch.float64).expand(4, 6))


def test_results_are_tensors_of_their_own(rng):
    x = torch.from_numpy(rng.normal(size=(4, 6))).requires_grad_()
    for function in (cubin.sign, lambda x: cubin.torch.multibit(x, 2, channel_axis=0)):
        before = x.tolist()
        with torch.no_grad():
            y = function(x)
            other = function(x)
        expected = y.clone()
        y.zero_()
        assert not y.requires_grad
        assert torch.equal(other, expected)
        assert x.tolist() == before


def test_results_keep_the_memory_order(rng):
    x = torch.from_numpy(rng.normal(size=(2, 3, 4, 5))).to(memory_format=torch.channels_last)
    for y in (cubin.sign(x), cubin.multibit(x, 2, channel_axis=0), cubin.sign_grad(x, x)):
        assert y.stride() == x.stride()


def test_results_are_plain_tensors(rng):
    w = torch.nn.Parameter(torch.from_numpy(rng.normal(size=5)))
    assert type(cubin.multibit(w, 2)) is type(cubin.quantize(w, 2).dequantize()) is torch.Tensor
    assert cubin.errors.relative_mse(w, w * 2).dtype is torch.float64
    assert cubin.errors.relative_mse(w, w * 2).shape == ()


class Sub(torch.Tensor):
    pass


def refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(3)
    x = torch.ones(2, 3)
    with warnings.catch_warnings(action="ignore"):
        quantized = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
    return [
        (x.to_sparse(), r"x\.to_dense\(\)"),
        (x.to_sparse_csr(), r"x\.to_dense\(\)"),
        (quantized, r"x\.(dequantize|float)\(\)"),
        (x.to(torch.complex64), "floating point, got torch.complex64: pass its real part"),
        (x.to("meta"), "without data"),
        (fake, "without data.*cubin.torch"),
        (x.as_subclass(Sub), r"Sub, a kind of tensor.*torch\.Tensor"),
        (x.to(torch.float8_e4m3fn), r"x\.float\(\)"),
        (torch.imag(torch.ones(3, dtype=torch.complex64).conj()), r"x\.resolve_neg\(\)"),
    ]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_what_is_refused_says_what_to_do():
    for x, advice in refused():
        with pytest.raises(TypeError, match=advice):
            cubin.sign(x)
    with pytest.raises(TypeError, match=r"torch\.func"):
        torch.func.vmap(cubin.sign)(torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"gy is .* pass its real part"):
        cubin.sign_grad(torch.ones(3), torch.ones(3, dtype=torch.complex64).conj())
    for function in (cubin.torch.sign, lambda x: cubin.torch.multibit(x, 2)):
        with pytest.raises(TypeError, match="x must be a PyTorch tensor, got ndarray"):
            function(np.ones(3))
    with pytest.raises(ValueError, match="surrogate must be one of"):
        cubin.torch.multibit(torch.ones(3), 2, surrogate="none")
    with pytest.raises(TypeError, match="has no parameter 't'"):
        cubin.torch.sign(torch.ones(3), t=2.0)


def test_bfloat16_gradients(rng):
    x = torch.from_numpy(rng.normal(size=(4, 6))).bfloat16().requires_grad_()
    y = cubin.torch.multibit(x, 2, channel_axis=0)
    y.backward(torch.ones_like(y))
    assert y.dtype is x.grad.dtype is torch.bfloat16
    assert torch.equal(x.grad, (x.detach().abs() <= 2).bfloat16())


# ---------------------------------------------------------------- modules

MODULES = {
    "sign": lambda: cubin.torch.Sign("tanh", t=2.0),
    "bits": lambda: cubin.torch.Multibit(2, channel_axis=0, solver="refined"),
    "map": lambda: cubin.torch.Multibit(torch.arange(6) % 4, surrogate="scale_aware"),
}


@pytest.mark.parametrize("name", list(MODULES))
def test_modules_are_copied_pickled_and_stored(rng, name):
    module = MODULES[name]()
    x = torch.from_numpy(rng.normal(size=(4, 6)))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(other(x), module(x))
        assert repr(other) == repr(module)
    assert list(module.state_dict()) == (["bits"] if name == "map" else [])
    other = MODULES[name]()
    other.load_state_dict(module.state_dict())


def test_a_map_is_a_copy_in_the_state():
    bits = torch.tensor([1, 2, 3])
    module = cubin.torch.Multibit(bits)
    bits += 1
    assert module.state_dict()["bits"].tolist() == [1, 2, 3]
    assert cubin.torch.Multibit(np.array([1, 2])).state_dict()["bits"].tolist() == [1, 2]
    for arguments, error in [((17,), ValueError), ((1.5,), TypeError), ((1, 0, 4), ValueError)]:
        with pytest.raises(error):
            cubin.torch.Multibit(*arguments)
    with pytest.raises(ValueError, match="iterations"):
        cubin.torch.Multibit(2, solver="alternating", iterations=-1)
    with pytest.raises(ValueError, match="surrogate"):
        cubin.torch.Sign("none")


def quantized_layer():
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 4)
    register_parametrization(layer, "weight", cubin.torch.Multibit(2, channel_axis=0))
    return layer


def test_parametrize_quantizes_a_layer(rng):
    layer = quantized_layer()
    original = layer.parametrizations.weight.original
    code = cubin.quantize(original, 2, channel_axis=0)
    assert torch.equal(layer.weight, code.dequantize())
    layer(torch.ones(3, 6)).sum().backward()
    same(original.grad.numpy(), np.full((4, 6), 3.0))
    other = quantized_layer()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(copy.deepcopy(layer).weight, other.weight)


def test_a_module_in_several_threads(rng):
    """As DataParallel runs its replicas: a call changes nothing of the module."""
    module = cubin.torch.Multibit(2, channel_axis=0)
    inputs = [torch.from_numpy(rng.normal(size=(4, 6))).requires_grad_() for _ in range(4)]
    threads = [threading.Thread(target=lambda x=x: module(x).sum().backward()) for x in inputs]
    before = dict(vars(module))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert vars(module) == before
    for x in inputs:
        same(x.grad.numpy(), cubin.multibit_grad(x.detach().numpy(), 2, np.ones((4, 6))))


def test_autocast_leaves_the_dtype_alone():
    layer = quantized_layer()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.weight.dtype is torch.float32
        assert cubin.sign(torch.ones(3)).dtype is torch.float32
        y = layer(torch.ones(3, 6))
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    assert layer.parametrizations.weight.original.grad.dtype is torch.float32


# ---------------------------------------------------------------- compiled

OPERATORS = {
    "sign": lambda x, m: ("sign", (x, "tanh", ["t"], [2.0])),
    "sign_grad": lambda x, m: ("sign_grad", (x.detach(), x.detach(), "ste", [], [])),
    "multibit": lambda x, m: (
        "multibit",
        (x, 2, None, [0], None, "refined", 2, x.detach().abs(), "scale_aware"),
    ),
    "multibit, map": lambda x, m: (
        "multibit",
        (x, 0, m, None, 3, "greedy", None, None, "bits_clip"),
    ),
    "multibit_grad": lambda x, m: (
        "multibit_grad",
        (x.detach(), x.detach().T.contiguous().T, 0, m, None, None, "scaled_clip"),
    ),
}


@pytest.mark.parametrize("name", list(OPERATORS))
def test_operators_are_what_pytorch_asks_for(rng, name):
    x = torch.from_numpy(rng.normal(size=(4, 6))).requires_grad_()
    operator, arguments = OPERATORS[name](x, torch.from_numpy(rng.integers(0, 4, (4, 6))))
    results = torch.library.opcheck(getattr(torch.ops.cubin, operator).default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def both(x, m):
    y = cubin.torch.sign(x, surrogate="swish_sign", beta=3.0)
    z = cubin.torch.multibit(x, 2, channel_axis=(0,), surrogate="scale_aware")
    return y * z + cubin.torch.multibit(x, m, group_size=3, solver="alternating", iterations=None)


@pytest.fixture
def compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_traces_them_whole(rng, compiled, dynamic):
    function = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    m = torch.from_numpy(rng.integers(0, 4, (4, 6)))
    for _ in range(2):
        x = leaf(rng.normal(size=(4, 6)))
        seed = rng.normal(size=(4, 6))
        y, expected = function(x, m), both(x, m)
        same(y.detach().numpy(), expected.detach().numpy())
        same(pulled(y, x, seed), pulled(expected, x, seed))


def test_export_takes_a_layer(compiled):
    layer = torch.nn.Sequential(quantized_layer(), cubin.torch.Sign())
    x = torch.linspace(-1, 1, 18).reshape(3, 6)
    program = torch.export.export(layer, (x,))
    names = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert {torch.ops.cubin.multibit.default, torch.ops.cubin.sign.default} <= names
    assert torch.equal(program.module()(x), layer(x))


def losses(steps, wrap):
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(8, 16), cubin.torch.Sign(), torch.nn.Linear(16, 1)
    )
    for layer in (network[0], network[2]):
        register_parametrization(layer, "weight", cubin.torch.Multibit(2, channel_axis=0))
    x = torch.randn(64, 8)
    target = x[:, :1] * x[:, 1:2]
    optimizer = torch.optim.Adam(network.parameters(), 0.01)

    def loss_of(x, target):
        return torch.nn.functional.mse_loss(network(x), target)

    step, found = wrap(loss_of), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = step(x, target)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # PyTorch's own
@pytest.mark.parametrize("backend", few(["aot_eager", "inductor"], "aot_eager"))
def test_compiled_training_has_the_same_losses(compiled, backend):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("PyTorch's inductor needs a C++ compiler")
    plain = losses(30, lambda f: f)
    assert plain[-1] < 0.9 * plain[0]
    found = losses(30, lambda f: torch.compile(f, fullgraph=True, backend=backend))
    np.testing.assert_allclose(found, plain, rtol=1e-6)


def test_plain_functions_say_what_to_compile(compiled):
    x = torch.ones(3)
    with pytest.raises(Exception, match=r"use cubin\.torch there"):
        torch.compile(cubin.sign, fullgraph=True, backend="eager")(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch's own
def test_plain_functions_run_between_graphs(rng, compiled):
    def function(x):
        return cubin.multibit(2 * x, 2, channel_axis=0) * cubin.errors.relative_mse(x, 2 * x)

    values, seed = rng.normal(size=(2, 4, 6))
    x = leaf(values)
    y, expected = torch.compile(function, backend="aot_eager")(x), function(x)
    same(y.detach().numpy(), expected.detach().numpy())
    same(pulled(y, x, seed), pulled(expected, x, seed))
