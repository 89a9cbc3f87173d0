"""Arrays of any library: they come in as views, and results go back in the library of the input.

What a library computes is compared with NumPy's result to the bit.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
import subprocess
import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import cubin
from cubin import analysis, bitmaps, errors, operators
from cubin.core import libraries
from tests.exhaustive import few
from tests.required import require

DTYPES = ["float16", "float32", "float64", "bfloat16"]


class Torch:
    """PyTorch on the CPU, as the tests use it."""

    def __init__(self):
        self.module = require("torch")
        self.kind = self.module.Tensor

    def array(self, values):
        """An array of this library with the values, strides and dtype of NumPy's."""
        halves = values.dtype.name == "bfloat16"
        owner = values if values.base is None else values.base
        assert owner.flags.c_contiguous
        start = values.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
        base = self.module.from_numpy(owner.view(np.int16) if halves else owner)
        base = base.view(self.module.bfloat16) if halves else base
        steps = [stride // values.itemsize for stride in values.strides]
        return base.as_strided(values.shape, steps, start // values.itemsize)

    def host(self, array):
        """Its values as NumPy's."""
        if array.dtype is self.module.bfloat16:
            return array.view(self.module.int16).numpy().view(ml_dtypes.bfloat16)
        return array.numpy()


class Jax:
    """JAX on the CPU, in 64 bits, as the tests use it."""

    def __init__(self):
        self.module = require("jax")
        self.kind = self.module.Array

    def array(self, values):
        return self.module.numpy.asarray(values)

    def host(self, array):
        return np.asarray(array)


@pytest.fixture(params=["torch", "jax"])
def library(request):
    if request.param == "torch":
        yield Torch()
        return
    found = Jax()
    with found.module.enable_x64(True):
        yield found


def same(found, expected):
    """To the bit: also NaN and the sign of zero."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


# ---------------------------------------------------------------- whatever is in the array

LAYOUTS = {
    "plain": lambda a: a,
    "transposed": lambda a: np.ascontiguousarray(a.T).T,
    "sliced": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "expanded": lambda a: np.broadcast_to(a[:1], a.shape),
    "0-d": lambda a: a[0, 0, 0, ...],
    "empty": lambda a: a[:, :0],
}


def case(seed):
    """A random dtype, values in a layout, a map or number of bits, and options for `multibit`."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(DTYPES[seed % 4])
    shape = tuple(int(n) for n in rng.integers(1, 7, 3))
    layout = str(rng.choice([*LAYOUTS, "plain", "sliced"]))
    x = LAYOUTS[layout](rng.normal(size=shape).astype(dtype))
    solver = str(rng.choice(["greedy", "refined", "alternating", "optimal"]))
    options = {"solver": solver}
    if x.ndim and rng.integers(2):
        options["channel_axis"] = int(rng.integers(3))
    elif x.ndim and x.size and rng.integers(2):
        options["group_size"] = int(rng.choice([n for n in (1, 2, 3) if x.shape[-1] % n == 0]))
    kind = rng.integers(4)
    bits = int(rng.integers(4))
    if kind:
        whole = x.shape if kind < 3 else x.shape[-1:]
        bits = rng.integers(0, 4, whole).astype(rng.choice(["int8", "int64", "uint8"]))
    return x, bits, bool(kind == 1), options


@pytest.mark.parametrize("seed", few(range(150), *range(8)))
def test_any_array(library, seed):
    """Both libraries together make 300 cases."""
    values, map_or_number, plain_map, options = case(seed)
    x = library.array(values)
    values = library.host(x)  # in its memory order, which the order of sums depends on
    bits = map_or_number
    if not (isinstance(bits, int) or plain_map):
        bits = library.array(bits)
    y = cubin.multibit(x, bits, **options)
    code = cubin.quantize(x, bits, **options)
    gx = cubin.multibit_grad(x, bits, x)
    expected = cubin.quantize(values, map_or_number, **options)
    for found, wanted in [
        (y, cubin.multibit(values, map_or_number, **options)),
        (code.scales, expected.scales),
        (code.signs, expected.signs),
        (code.dequantize(), expected.dequantize()),
        (cubin.sign(x), cubin.sign(values)),
        (gx, cubin.multibit_grad(values, map_or_number, values)),
    ]:
        assert isinstance(found, library.kind)
        assert found.device == x.device
        same(library.host(found), wanted)
    assert y.dtype == x.dtype == code.dtype


CALLS = {
    "sign": lambda x, m: cubin.sign(x),
    "ste_mask": lambda x, m: cubin.ste_mask(x),
    "ste_mask, map": lambda x, m: cubin.ste_mask(x, m),
    "ste_mask, bound": lambda x, m: cubin.ste_mask(x, x),
    "sign_grad": lambda x, m: cubin.sign_grad(x, x),
    "sign_grad, tanh": lambda x, m: cubin.sign_grad(x, x, surrogate="tanh", t=2.0),
    "multibit_grad": lambda x, m: cubin.multibit_grad(
        x, m, x, channel_axis=0, surrogate="scaled_clip"
    ),
    "importance": lambda x, m: cubin.multibit(x, m, solver="refined", importance=x * x),
    "by name": lambda x, m: cubin.multibit(bits=m, x=x),
    "code's map": lambda x, m: cubin.quantize(x, m).bits,
    "a code's sum": lambda x, m: (
        cubin.BinaryCode.from_signs(x[None], abs(m)[None] * 0 + 1, 1, channel_axis=(0, 1)).signs
    ),
    "relative_mse": lambda x, m: errors.relative_mse(x, x * 2),
    "sqnr_db": lambda x, m: errors.sqnr_db(x, x * 2, axis=0),
    "cosine_similarity": lambda x, m: errors.cosine_similarity(x, x + 1),
    "max_abs_error": lambda x, m: errors.max_abs_error(x, x * 2, keepdims=True, axis=1),
    "measure": lambda x, m: errors.measure(x, x * 2).power,
    "measure, mse": lambda x, m: errors.measure(x, x * 2).relative_mse(),
    "measure, dB": lambda x, m: errors.measure(x, x * 2).sqnr_db(),
    "measure, cosine": lambda x, m: errors.measure(x, x + 1).cosine_similarity(),
    "top_down": lambda x, m: bitmaps.top_down(x, {1: 0.5, 2: 0.5}),
    "bottom_up": lambda x, m: bitmaps.bottom_up(x, {1: 0.5, 2: 0.5}),
    "middle_out": lambda x, m: bitmaps.middle_out(x, {1: 0.5, 2: 0.5}),
    "budget": lambda x, m: bitmaps.budget(x, 1.5),
    "ternary": lambda x, m: bitmaps.ternary(x, importance=x * x),
    "allocate": lambda x, m: bitmaps.allocate({"w": x}, 1.5)["w"],
    "operators.Sign": lambda x, m: operators.Sign().forward(x)[0],
    "operators.Sign, back": lambda x, m: operators.Sign().backward(*operators.Sign().forward(x)),
    "operators.Multibit": lambda x, m: operators.Multibit(m).forward(x)[0],
    "operators, residuals": lambda x, m: operators.Multibit(m).forward(x)[1],
}


@pytest.mark.parametrize("call", list(CALLS))
def test_every_function(library, rng, call):
    values = rng.normal(size=(4, 6)).astype(np.float32)
    bits = rng.integers(0, 4, (4, 6)).astype(np.int8)
    expected = CALLS[call](values, bits)
    found = CALLS[call](library.array(values), library.array(bits))
    assert isinstance(found, library.kind)
    same(library.host(found), np.asarray(expected))


def test_every_public_function_is_at_the_border():
    """What takes an array `x` goes through `border`, and keeps its signature."""
    public = [cubin.sign, cubin.ste_mask, cubin.sign_grad, cubin.multibit, cubin.multibit_grad]
    public += [cubin.quantize]
    public += [getattr(module, name) for module in (errors, bitmaps) for name in module.__all__]
    with_x = [
        f for f in public if "x" in inspect.signature(f).parameters and not inspect.isclass(f)
    ]
    assert len(with_x) >= 15
    for function in with_x:
        assert function.__wrapped__.__code__ is not function.__code__, function
        assert inspect.signature(function) == inspect.signature(function.__wrapped__)


def test_a_table_of_errors(library, rng):
    values = {"a": rng.normal(size=(4, 6)).astype(np.float32), "b": rng.normal(size=8)}
    arrays = {name: library.array(value) for name, value in values.items()}
    kinds = []

    def half(x, bits):
        kinds.append(type(x))
        return x / 2

    def budget(x):
        kinds.append(type(x))
        return bitmaps.budget(x, 1.5)

    def table(arrays, importance):
        return analysis.error_per_bit_width(arrays, [2, budget], ["refined", half],
                                            importance={"a": importance})  # fmt: skip

    found = table(arrays, library.array(values["a"] ** 2))
    assert all(issubclass(kind, library.kind) for kind in kinds)
    wanted = table(values, values["a"] ** 2)
    assert [(r.name, r.solver, r.bits, r.relative_mse, r.payload_bits) for r in found.rows] == [
        (r.name, r.solver, r.bits, r.relative_mse, r.payload_bits) for r in wanted.rows
    ]
    skipped = analysis.error_per_bit_width({**arrays, "n": library.array(np.arange(3))}).skipped
    assert [name for name, _ in skipped] == ["n"]


# ---------------------------------------------------------------- codes


@pytest.fixture
def code(library, rng):
    x = library.array(rng.normal(size=(4, 6)).astype(np.float32))
    return cubin.quantize(x, library.array(rng.integers(0, 4, (4, 6))), channel_axis=0)


def test_a_code_keeps_its_library(library, code):
    for other in (copy.copy(code), copy.deepcopy(code), pickle.loads(pickle.dumps(code))):
        assert other == code
        assert isinstance(other.scales, library.kind)
        assert isinstance(other.dequantize(), library.kind)
    made = cubin.BinaryCode.from_signs(code.scales, code.signs, code.bits, channel_axis=0)
    assert made == code
    packed = (code.scales, code.planes, code.bits)
    assert cubin.BinaryCode(*packed, shape=code.shape, channel_axis=0) == code
    assert isinstance(code.planes, library.kind)
    assert isinstance(made.bits, library.kind)
    assert "float32" in repr(code)
    assert code.effective_bits > code.payload_bits


def test_a_shift_keeps_its_library(library, rng):
    x = library.array(rng.normal(size=(4, 6)).astype(np.float32))
    code = cubin.quantize(x, 2, channel_axis=0, solver="refined", shift=True)
    assert isinstance(code.shift, library.kind)
    given = {"channel_axis": 0, "shift": code.shift}
    assert cubin.BinaryCode.from_signs(code.scales, code.signs, 2, **given) == code
    assert cubin.BinaryCode(code.scales, code.planes, 2, shape=(4, 6), **given) == code
    q = library.array(rng.integers(0, 8, (4, 6)))
    made = cubin.BinaryCode.from_uniform(q, code.shift, library.array(np.arange(4)), channel_axis=0)
    assert isinstance(made.shift, library.kind)
    assert isinstance(made.dequantize(), library.kind)
    assert made.truncate(1).to_host().shift.shape == (4,)


def test_a_code_of_the_host_is_numpys(code, tmp_path):
    code.save(tmp_path / "code.npz")
    for other in (code.to_host(), cubin.BinaryCode.load(tmp_path / "code.npz")):
        assert other == code
        assert type(other.scales) is type(other.signs) is type(other.bits) is np.ndarray
        assert other.to_host() is other


# ---------------------------------------------------------------- mixtures


def test_floats_of_two_libraries(library):
    x = library.array(np.ones(3))
    plain = np.ones(3)
    for call in (
        lambda: cubin.sign_grad(x, plain),
        lambda: cubin.sign_grad(plain, x),
        lambda: cubin.multibit(x, 2, solver="refined", importance=plain),
        lambda: cubin.multibit(plain, library.array(np.ones(3, int))),
        lambda: errors.relative_mse(plain, x),
        lambda: cubin.sign(x, out=plain),
        lambda: cubin.sign(plain, out=x),
        lambda: cubin.BinaryCode.from_signs(x[None], np.ones((1, 3)), 1),
    ):
        with pytest.raises(TypeError, match="bring both to one library"):
            call()


def test_torch_and_jax():
    x, y = Torch().array(np.ones(3, np.float32)), Jax().array(np.ones(3, np.float32))
    with pytest.raises(TypeError, match="gy is a JAX array, but x is a PyTorch tensor"):
        cubin.sign_grad(x, y)


def test_wrong_calls_are_pythons(library):
    x = library.array(np.ones(3))
    for call in (
        lambda: cubin.sign(x, x),
        lambda: cubin.sign(x, x=x),
        lambda: cubin.sign(x, inplace=True),
        lambda: cubin.multibit(x),
    ):
        with pytest.raises(TypeError, match=r"positional|multiple values|unexpected|missing"):
            call()


def test_integers_say_how_to_cast(library):
    with pytest.raises(TypeError, match=r"x must be floating point, got .*int.*x\.(float|astype)"):
        cubin.multibit(library.array(np.arange(3)), 2)


# ---------------------------------------------------------------- DLPack


class Stranger:
    """An array of a library that cubin has not heard of."""

    def __init__(self, array, place=(1, 0)):
        self.array, self.place = array, place

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.place


def test_other_libraries_are_read_through_dlpack(rng):
    values = rng.normal(size=(4, 6)).astype(np.float32)
    bits = rng.integers(0, 4, (4, 6))
    found = cubin.multibit(Stranger(values), Stranger(bits))
    assert type(found) is np.ndarray
    same(found, cubin.multibit(values, bits))
    same(cubin.sign_grad(Stranger(values), values), cubin.sign_grad(values, values))
    assert cubin.quantize(Stranger(values), 2) == cubin.quantize(values, 2)
    (row,) = analysis.error_per_bit_width({"w": Stranger(values)}, 2).rows
    assert 0 < row.relative_mse < 1
    assert np.shares_memory(libraries.DLPACK.view("x", Stranger(values)), values)


def test_strangers_are_not_written(rng):
    for x in (rng.normal(size=3), Stranger(rng.normal(size=3))):
        with pytest.raises(TypeError, match="out cannot be a DLPack array"):
            cubin.sign(x, out=Stranger(np.zeros(3)))


def test_strangers_that_cannot_be_read():
    with pytest.raises(TypeError, match=r"x is a .*Stranger that cannot be read through DLPack"):
        cubin.sign(Stranger(np.array(["a"])))


@pytest.mark.kernels
def test_strangers_on_a_gpu_become_cupys(device, rng, monkeypatch):
    values = rng.normal(size=8).astype(np.float32)
    there = device.asarray(values)
    monkeypatch.setattr(device, "from_dlpack", lambda s: s.array, raising=False)
    found = cubin.sign(Stranger(there, place=(2, 0)))
    assert isinstance(found, device.ndarray)
    same(found.get(), cubin.sign(values))


# ---------------------------------------------------------------- a GPU, as far as it can be told


@pytest.fixture
def cuda(device, monkeypatch):
    """A stand-in for PyTorch whose tensors lie on device 1, and the list of what happens."""
    ptx = pytest.importorskip("tests.ptx.array")
    events, streams = [], []

    class Tensor:
        is_cuda = True
        requires_grad = False

        def __init__(self, array):
            self.array, self.dtype, self.shape = array, array.dtype, array.shape
            self.device = SimpleNamespace(type="cuda", index=array.device.id)

        def is_floating_point(self):
            return self.dtype.kind == "f"

        def detach(self):
            return Tensor(self.array)

        def synchronize(self, *_):
            raise AssertionError("waits for the device")

        __bool__ = __float__ = __int__ = __index__ = cpu = item = numpy = synchronize

    @contextlib.contextmanager
    def on(stream):
        assert ptx.Device().id == 1, "the stream before its device"
        events.append(f"take {stream}")
        streams.append(stream)
        yield
        streams.pop()

    def from_dlpack(tensor):
        events.append(f"view on {ptx.Device().id}, {streams[-1]}")
        return tensor.array

    def of_result(array):
        events.append("give")
        return Tensor(array)

    def empty_like(tensor, **_):
        events.append("allocate")
        with ptx.Device(1):
            return Tensor(device.empty_like(tensor.array))

    Tensor.__module__ = "torch"
    torch = SimpleNamespace(
        Tensor=Tensor,
        bfloat16="bfloat16",
        nn=SimpleNamespace(Parameter=Tensor),
        compiler=SimpleNamespace(is_compiling=lambda: False),
        cuda=SimpleNamespace(current_stream=lambda index: f"the stream of {index}"),
        autograd=SimpleNamespace(
            graph=SimpleNamespace(increment_version=lambda t: events.append("changed"))
        ),
        from_dlpack=of_result,
        empty_like=empty_like,
    )

    def copied(self, *_, **__):
        raise AssertionError("copies the input or waits for the device")

    plain = vars(device.cuda)
    module = SimpleNamespace(**{**plain, "Stream": SimpleNamespace(from_external=on)})
    monkeypatch.setattr(device, "cuda", module, raising=False)
    monkeypatch.setattr(device, "from_dlpack", from_dlpack, raising=False)
    monkeypatch.setitem(sys.modules, "torch", torch)
    for name in ("get", "item", "__bool__", "__float__", "__int__", "copy"):
        monkeypatch.setattr(ptx.ndarray, name, copied)

    def put(values):
        with ptx.Device(1):
            return Tensor(device.asarray(values))

    return put, events


VIEW = "view on 1, the stream of 1"


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda x, g, m: cubin.sign(x), ["allocate", "take the stream of 1", VIEW, VIEW]),
        (
            lambda x, g, m: cubin.multibit_grad(x, m, g),
            ["allocate", "take the stream of 1", VIEW, VIEW, VIEW, VIEW],
        ),
        (
            lambda x, g, m: cubin.multibit(x, 2, channel_axis=0, out=g),
            ["take the stream of 1", VIEW, VIEW, "changed"],
        ),
        (
            lambda x, g, m: errors.relative_mse(x, g),
            ["take the stream of 1", VIEW, VIEW, "give"],
        ),
        (lambda x, g, m: cubin.ste_mask(x, m), ["take the stream of 1", VIEW, VIEW, "give"]),
    ],
)
def test_cuda_tensors_stay_on_their_device_and_stream(cuda, rng, call, expected):
    """No copy, no wait: the stand-in raises at either."""
    put, events = cuda
    values = rng.normal(size=(3, 8)).astype(np.float32)
    bits = rng.integers(0, 4, (3, 8)).astype(np.uint8)
    result = call(put(values), put(-values), put(bits))
    assert events == expected
    assert result.device.index == 1
    wanted = call(values, -values, bits)
    np.testing.assert_allclose(np.asarray(result.array._host, float), wanted, rtol=1e-6)


@pytest.mark.kernels
def test_a_code_works_on_the_stream(cuda, rng):
    put, events = cuda
    values = rng.normal(size=(3, 8)).astype(np.float32)
    code = cubin.quantize(put(values), 2, channel_axis=0, check_finite=False)
    events.clear()
    y = code.dequantize()
    assert events == ["take the stream of 1", "give"]
    np.testing.assert_allclose(y.array._host, cubin.multibit(values, 2, channel_axis=0), rtol=1e-6)


@pytest.mark.kernels
def test_cuda_tensors_of_two_devices(cuda, device):
    put, _ = cuda
    x = put(np.ones(3, np.float32))
    other = type(x)(device.asarray(np.ones(3, np.float32)))
    other.device.index = 0
    with pytest.raises(TypeError, match=r"gy lies on .*move one of them"):
        cubin.sign_grad(x, other)


def test_a_cuda_tensor_without_cupy(monkeypatch):
    monkeypatch.setattr(libraries, "cupy", lambda: None)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(RuntimeError, match=r"CuPy cannot be imported .*extra cuda12"):
        cubin.sign(Stranger(np.ones(3), place=(2, 0)))


# ---------------------------------------------------------------- what is imported


def test_a_type_is_looked_at_once():
    class Plain:
        pass

    assert libraries.LIBRARY_OF[Plain] is None
    assert Plain in libraries.LIBRARY_OF
    assert libraries.LIBRARY_OF[np.ndarray] is libraries.LIBRARY_OF[int] is None
    assert libraries.LIBRARY_OF[Stranger] is libraries.DLPACK


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_adapters_say_what_is_missing(name):
    code = f"""
import sys
sys.modules["{name}"] = None
import cubin
try:
    cubin.{name}
except ImportError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"install it, or cubin with the extra {name}" in found.stdout


def test_work_on_numpy_imports_no_library():
    code = "import sys, cubin, numpy as np; cubin.multibit(np.ones(3), 2); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "jax", "cupy", "ml_dtypes"} & set(found.stdout.split())
