"""`out=` of every public function that has it, in the memory of every other array argument."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

import cubin
from cubin.core import passes
from cubin.core.host import blocks
from tests.exhaustive import few


def public_functions():
    """The functions of the package and of its modules that it names, by name."""
    named = [getattr(cubin, name) for name in cubin.__all__]
    for module in (cubin, *filter(inspect.ismodule, named)):
        for name, function in vars(module).items():
            if inspect.isfunction(function) and not name.startswith("_"):
                yield name, function


# The public functions with `out=`, and their array arguments.
ARGUMENTS = {
    "sign": ("x",),
    "multibit": ("x", "bits", "importance"),
    "sign_grad": ("x", "gy"),
    "multibit_grad": ("x", "bits", "gy"),
}


def test_all_functions_with_an_output_are_tested():
    found = {name for name, function in public_functions() if has_output(function)}
    assert found == set(ARGUMENTS)


def has_output(function):
    out = inspect.signature(function).parameters.get("out")
    return out is not None and out.default is None


def in_memory_of(base, shape, dtype, kind):
    """An array that shares memory with ``base[shape]``, and that broadcasts to the shape."""
    rows, columns = shape
    flat = base.reshape(-1).view(dtype)
    size = rows * columns
    return {
        "itself": lambda: flat[:size].reshape(shape),
        "shifted": lambda: flat[1 : size + 1].reshape(shape),
        "row": lambda: flat[:columns],
        "last row": lambda: flat[size - columns : size],
        "column": lambda: flat[:size].reshape(shape)[:, :1],
        "one": lambda: flat[5:6],
        "reversed": lambda: flat[:size].reshape(shape)[::-1, ::-1],
        "steps": lambda: flat[: 2 * size : 2].reshape(shape),
    }[kind]()


KINDS = ["itself", "shifted", "row", "last row", "column", "one", "reversed", "steps"]
SOLVERS = {"x": ("greedy", "refined"), "bits": ("greedy", "refined"),
           "importance": ("refined", "alternating")}  # fmt: skip
CASES = [
    ("sign_grad", {"x": "float32"}),
    ("sign_grad", {"gy": "float32"}),
    ("multibit_grad", {"x": "float32"}),
    ("multibit_grad", {"gy": "float32"}),
    ("multibit_grad", {"bits": "uint8"}),
    ("multibit_grad", {"x": "float32", "bits": "int64", "gy": "float32"}),
    ("sign", {"x": "float32"}),
    ("multibit", {"x": "float32"}),
    ("multibit", {"bits": "uint8"}),
    ("multibit", {"bits": "int64"}),
    ("multibit", {"importance": "float32"}),
    ("multibit", {"importance": "float16"}),
    ("multibit", {"importance": "bfloat16"}),
    ("multibit", {"x": "float32", "bits": "uint8", "importance": "float32"}),
]


def check(xp, host, rng, name, placed, kind, shape, options):
    """The result in memory that arguments lie in, against that in memory of its own."""
    size = shape[0] * shape[1]
    given = {"x": xp.asarray(rng.normal(size=shape).astype(np.float32))}
    if name.startswith("multibit"):
        given["bits"] = 2
    if name.endswith("grad"):
        given["gy"] = xp.asarray(rng.normal(size=shape).astype(np.float32))
    base = xp.asarray(rng.uniform(1, 2, 4 * size + 8).astype(np.float32))
    for argument, dtype in placed.items():
        array = in_memory_of(base, shape, dtype, kind)
        if dtype in ("uint8", "int64"):
            array[...] = xp.asarray(rng.integers(0, 4, array.shape).astype(dtype))
        elif dtype in ("float16", "bfloat16"):
            array[...] = xp.asarray(rng.uniform(1, 2, array.shape).astype(dtype))
        given[argument] = xp.broadcast_to(array, shape) if argument in ("x", "gy") else array
    out = base[:size].reshape(shape)
    function = getattr(cubin, name)
    own = {key: value if np.isscalar(value) else value.copy() for key, value in given.items()}
    expected = host(function(**own, **options))
    assert function(**given, **options, out=out) is out
    np.testing.assert_array_equal(host(out), expected)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a row of 10 elements, so that results are written while arguments are read."""
    monkeypatch.setattr(blocks, "BLOCK", 10)
    monkeypatch.setattr(blocks, "PIECE", 10)
    monkeypatch.setattr(blocks, "WHOLE_ROWS", 40)
    monkeypatch.setattr(blocks, "COMPILED_ROWS", (40, 40))
    for name in ("SEARCHED", "SEARCHED_ON_DEVICE"):
        monkeypatch.setattr(passes, name, 10)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", few(KINDS, "itself", "shifted", "row", "reversed"))
@pytest.mark.parametrize(("name", "placed"), CASES)
def test_outputs_in_the_memory_of_arguments(xp, host, rng, name, placed, kind):
    for options in options_of(name, placed)[:: 1 if xp is np else 3]:
        check(xp, host, rng, name, placed, kind, (6, 10), options)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", few(KINDS, "shifted", "column", "steps"))
@pytest.mark.parametrize(("name", "placed"), CASES)
@pytest.mark.parametrize("compiled", [False, True])
def test_outputs_of_threads(rng, monkeypatch, name, placed, kind, compiled):
    if compiled:
        pytest.importorskip("numba")
    monkeypatch.setattr(blocks, "COMPILED", 0 if compiled else 1 << 40)
    monkeypatch.setattr(blocks, "SHARE", 1)
    monkeypatch.setattr(blocks, "_workers", lambda: 3)
    for options in options_of(name, placed):
        check(np, np.asarray, rng, name, placed, kind, (60, 10), options)


@pytest.mark.parametrize("kind", ["itself", "shifted", "row"])
@pytest.mark.parametrize(("name", "placed"), CASES)
def test_outputs_of_large_arrays(rng, name, placed, kind):
    shape = (300, blocks.COMPILED // 300 + 3)
    for options in options_of(name, placed)[:2]:
        check(np, np.asarray, rng, name, placed, kind, shape, options)


def options_of(name, placed):
    if name == "sign":
        return [{}]
    if name == "sign_grad":
        return [{}, {"surrogate": "tanh"}]
    if name == "multibit_grad":
        names = ("bits_clip", "scaled_clip", "scale_aware")
        return [{"surrogate": surrogate, "channel_axis": 0} for surrogate in names]
    solvers = SOLVERS["importance" if "importance" in placed else next(iter(placed))]
    return [
        {"solver": solver, **rows}
        for solver in solvers
        for rows in ({"channel_axis": 0}, {}, {"channel_axis": 1})
    ]


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("shape", [(1, 5), (4, 1)])
def test_outputs_of_one_element_for_many(device, name, shape):
    x = device.asarray(np.ones((4, 5), np.float32))
    out = device.broadcast_to(device.asarray(np.zeros(shape, np.float32)), (4, 5))
    with pytest.raises(ValueError, match=r"out of shape .* share memory"):
        call(name, x, out)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_outputs_whose_elements_share_memory(name):
    memory = np.zeros(40, np.float32)
    strided = np.lib.stride_tricks.as_strided
    x = np.ones((4, 5), np.float32)
    for strides in ((0, 4), (4, 0), (16, 4), (4, 4), (8, 8)):
        with pytest.raises(ValueError, match=r"out of shape .* share memory"):
            call(name, x, strided(memory, (4, 5), strides))
    for strides in ((20, 4), (4, 16), (4, 24), (24, 4)):
        call(name, x, strided(memory, (4, 5), strides))
    call(name, x, memory[:20].reshape(4, 5)[::-1, ::-1])
    for shape in ((0, 5), (1, 1), ()):
        call(name, np.ones(shape, np.float32), strided(memory, shape, (0,) * len(shape)))


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_outputs_of_subclasses(rng, monkeypatch, tmp_path, name, compiled):
    if compiled:
        pytest.importorskip("numba")
        monkeypatch.setattr(blocks, "COMPILED", 0)
        monkeypatch.setattr(blocks, "BLOCK", 10)
    x = rng.normal(size=(30, 40)).astype(np.float32)
    expected = np.empty_like(x)
    call(name, x, expected)
    of_file = np.memmap(tmp_path / "file", np.float32, "w+", shape=x.shape)
    for out in (np.asmatrix(np.zeros_like(x)), of_file, np.rec.array(np.zeros_like(x))):
        assert call(name, x, out) is out
        np.testing.assert_array_equal(np.asarray(out), expected)
    with pytest.raises(TypeError, match="out is a masked array"):
        call(name, x, np.ma.array(np.zeros_like(x), mask=x > 0))


def call(name, x, out):
    others = {"bits": 1, "gy": x}
    needed = {key: others[key] for key in ARGUMENTS[name] if key in others}
    return getattr(cubin, name)(x, **needed, out=out)
