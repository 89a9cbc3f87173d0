from __future__ import annotations

import zlib

import numpy as np
import pytest
from ml_dtypes import finfo

import cubin.errors
import cubin.surrogates  # their kernels are among those of the registry
from cubin.core import libraries, passes, primitives
from cubin.core.primitives import FLOATS, Elementwise, Reduction, elementwise, reduction
from cubin.solvers import greedy

ARCHITECTURES = ["sm_70", "sm_80", "sm_90", "sm_100", "sm_120"]
COUNTS = [0, 1, 3]


def cases():
    """Every primitive that CuPy generates the kernel of, in every type and some arities."""
    for primitive in primitives.REGISTRY.values():
        if isinstance(primitive, (Elementwise, Reduction)):
            for types in primitive.types:
                for count in COUNTS if primitive.variadic else [0]:
                    dtypes = "-".join(types.values()) or "fixed"
                    name = f"{primitive.name}-{dtypes}-{count}"
                    yield pytest.param(primitive, types, count, id=name)


def values(kind, shape, rng):
    """Random values of a dtype, special ones among them."""
    dtype = np.dtype(kind)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype == np.int8:
        return rng.integers(-1, 2, shape).astype(dtype)
    if dtype.kind in "iu":
        x = rng.integers(0, 6, shape).astype(dtype)
        x.ravel()[2:4] = 1  # bits that bound the numbers 1 and -1 below
        return x
    x = rng.normal(0, 2, shape).astype(dtype)
    special = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, finfo(dtype).smallest_subnormal]
    x.ravel()[: len(special)] = special
    # The NaN next to infinity, which some comparisons of bit patterns take for it.
    x.view(f"u{x.itemsize}").ravel()[len(special)] = (
        np.array(np.inf, dtype).view(f"u{x.itemsize}") + 1
    )
    return x


def inputs_of(primitive, types, count, rng):
    """Inputs of shape (3, 41): the first parameters; scales of shape (3, 1): the variadic ones."""
    found = []
    for kind, _ in primitive.inputs:
        plain = kind.removeprefix("*")
        dtype = types.get(plain, plain)
        if kind.startswith("*"):
            found += [np.abs(rng.normal(1, 0.3, (3, 1))).astype(dtype) for _ in range(count)]
        else:
            found.append(values(dtype, (3, 41), rng))
    return found


def outputs_of(primitive, types, library):
    length = 1 if isinstance(primitive, Reduction) else 41
    return {
        name: library.zeros((3, length), types.get(kind, kind)) for kind, name in primitive.outputs
    }


def run(primitive, types, count, device):
    rng = np.random.default_rng(zlib.crc32(primitive.name.encode()))
    inputs = inputs_of(primitive, types, count, rng)
    expected, found = outputs_of(primitive, types, np), outputs_of(primitive, types, device)
    primitive(*inputs, **expected)
    primitive(*(device.asarray(a) for a in inputs), **found)
    return expected, found


def tolerance(primitive, types):
    """1e-14 for sums in float64; the host adds magnitudes in the work dtype first."""
    return 2e-6 if primitive is greedy.level_sums and types["W"] == "float32" else 1e-14


@pytest.mark.kernels
@pytest.mark.parametrize(("primitive", "types", "count"), list(cases()))
def test_kernel_equals_its_numpy_expression(primitive, types, count, device, host):
    expected, found = run(primitive, types, count, device)
    for name, value in expected.items():
        if value.dtype == "bfloat16":  # assert_array_equal takes no NaN of it
            value, found[name] = value.astype(np.float32), host(found[name]).astype(np.float32)
        if isinstance(primitive, Reduction):
            np.testing.assert_allclose(host(found[name]), value, rtol=tolerance(primitive, types))
        else:
            np.testing.assert_array_equal(host(found[name]), value)


@pytest.mark.kernels
@pytest.mark.exhaustive
@pytest.mark.parametrize(("primitive", "types", "count"), list(cases()))
def test_kernel_compiles_for_every_architecture(primitive, types, count, device, monkeypatch):
    from tests.ptx import compiler
    from tests.ptx import device as engine

    compiled = []
    plain = engine._compiled

    def record(source, options, names=()):
        compiled.append((source, options))
        return plain(source, options, names)

    monkeypatch.setattr(engine, "_compiled", record)
    run(primitive, types, count, device)
    assert compiled
    for source, options in set(compiled):
        for arch in ARCHITECTURES:
            (resources,) = compiler.resources(source, arch, options).values()
            assert resources.spill_stores == resources.spill_loads == 0


# ---------------------------------------------------------------- launches and bytes


@pytest.mark.kernels
@pytest.mark.parametrize("levels", [1, 2, 4])
def test_greedy_passes_read_x_once_per_level_and_write_once(device, levels):
    """What a device row too long for one launch costs; the scales come from the cache."""
    launch = pytest.importorskip("tests.ptx.launch")
    x = device.asarray(np.linspace(-1, 1, 5 * passes.DEVICE_PIECE).astype(np.float32))
    before = len(launch.LAUNCHES)
    cubin.multibit(x, levels)
    launches = launch.LAUNCHES[before:]
    read = sum(one.read_unique for one in launches)
    written = sum(one.written_unique for one in launches)
    assert (levels + 1) * x.nbytes <= read < (levels + 1.05) * x.nbytes
    assert x.nbytes <= written < 1.05 * x.nbytes


# ---------------------------------------------------------------- the decorators


def unregistered(decorator, function):
    try:
        return decorator(function)
    finally:
        primitives.REGISTRY.pop(function.__name__, None)


def test_parameters_must_agree():
    add = elementwise("T x, T y", "T z", "z = x + y", types=FLOATS)
    for wrong in (
        lambda y, x, *, z: None,
        lambda x, y, z: None,
        lambda x, *, z: None,
        lambda x, y, *, out: None,
        lambda x, *y, z: None,
    ):
        with pytest.raises(TypeError, match="the kernel takes"):
            unregistered(add, wrong)


def test_names_are_unique():
    def signs(x, *, y):
        pass

    with pytest.raises(ValueError, match="'signs' already"):
        elementwise("T x", "T y", "y = x", types=FLOATS)(signs)


def test_variadic_inputs_are_written_out():
    def peeled(x, *scales, y):
        pass

    primitive = unregistered(
        elementwise("T x, *W scales", "T y", "y = f(x{scales}) * {count}", types=FLOATS), peeled
    )
    assert primitive.variadic
    assert primitive._declare(2) == ("T x, W scales_0, W scales_1", "T y")
    assert primitive._fill(primitive.operation, 2) == "y = f(x, scales_0, scales_1) * 2"
    assert primitive._fill(primitive.operation, 0) == "y = f(x) * 0"
    assert repr(primitive) == "<Elementwise peeled>"
    assert primitive.kernel_name == "cubin_peeled"


def test_kernels_are_built_when_first_asked_for(monkeypatch):
    built = []

    class Library:
        def ElementwiseKernel(self, *arguments, **options):
            built.append(arguments)
            return object()

        def ReductionKernel(self, *arguments, **options):
            built.append(arguments)
            return object()

    library = Library()
    monkeypatch.setattr(libraries, "cupy", lambda: library)

    def halves(x, *, y):
        pass

    def totals(x, *, y):
        pass

    half = unregistered(elementwise("T x", "T y", "y = x / 2", types=FLOATS), halves)
    total = unregistered(
        reduction("T x", "T y", map="x", reduce="a + b", post_map="y = a", identity="0",
                  reduce_type="double", types=FLOATS),
        totals,
    )  # fmt: skip
    assert built == []
    assert half.kernel() is half.kernel()
    assert total.kernel() is total.kernel()
    assert [arguments[:2] for arguments in built] == [("T x", "T y")] * 2
