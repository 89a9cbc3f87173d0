"""Dask arrays: lazy results, with the bits of NumPy's where rows lie in one chunk each."""

from __future__ import annotations

import pickle
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

import cubin
from cubin.core.bits import as_bits
from cubin.core.rows import rows_of
from cubin.solvers import scattered
from tests import reference
from tests.exhaustive import few
from tests.required import require

dask = require("dask")
da = pytest.importorskip("dask.array")
SOLVERS = ["greedy", "refined", "alternating", "optimal"]


@pytest.fixture(autouse=True)
def one_thread():
    with dask.config.set(scheduler="synchronous"):
        yield


def same(found, expected):
    """To the bit: also NaN and the sign of zero."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


def chunked(rng, length, step=1):
    """Random chunks of an axis: of multiples of `step`."""
    ends = rng.choice(np.arange(1, length // step), min(2, length // step - 1), replace=False)
    return tuple(np.diff([0, *sorted(ends * step), length]).tolist())


def cut(rng, array, whole=()):
    """A Dask array in random chunks, in one chunk along the axes `whole`."""
    chunks = tuple((n,) if axis in whole else chunked(rng, n) for axis, n in enumerate(array.shape))
    return da.from_array(array, chunks=chunks)


def values(rng, shape, dtype="float32"):
    x = rng.standard_normal(shape)
    x.flat[:: max(2, x.size // 7)] = 0
    return x.astype(dtype)


# ---------------------------------------------------------------- element by element


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_elements(rng, dtype):
    x, gy = values(rng, (6, 5, 8), dtype), values(rng, (6, 5, 8), dtype)
    x[0, 0, :3] = np.nan, np.inf, -np.inf
    lazy = cut(rng, x)
    bits = rng.integers(0, 4, (5, 1))
    for map_ in (bits, da.from_array(bits, chunks=2)):
        for gradient in (gy, cut(rng, gy)):
            same(
                cubin.multibit_grad(lazy, map_, gradient).compute(),
                cubin.multibit_grad(x, bits, gy),
            )
        same(cubin.ste_mask(lazy, bound=map_).compute(), cubin.ste_mask(x, bits))
    same(cubin.sign(lazy).compute(), cubin.sign(x))
    same(cubin.ste_mask(lazy, 0.5).compute(), cubin.ste_mask(x, 0.5))
    same(
        cubin.sign_grad(lazy, gy, surrogate="tanh", t=2.0).compute(),
        cubin.sign_grad(x, gy, surrogate="tanh", t=2.0),
    )


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,)])
def test_few_elements(shape):
    x = np.full(shape, -0.5, np.float32)
    lazy = da.from_array(x, chunks=-1)
    same(cubin.sign(lazy).compute(), cubin.sign(x))
    for solver in SOLVERS:
        same(cubin.multibit(lazy, 2, solver=solver).compute(), cubin.multibit(x, 2, solver=solver))


# ---------------------------------------------------------------- whole rows


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("axis", few([0, (0, 2), (2, 1), None], 0, (2, 1)))
def test_rows_in_one_chunk(rng, solver, axis):
    x = values(rng, (8, 6, 10))
    axes = () if axis is None else np.atleast_1d(axis)
    lazy = cut(rng, x, whole=set(range(3)) - set(axes))
    bits = rng.integers(0, 4, (8, 1, 10))
    weights = rng.random((6, 10)).astype("float32")
    for number in (0, 2, bits, cut(rng, bits, whole=(1,))):
        plain = bits if isinstance(number, da.Array) else number
        options = {"channel_axis": axis, "solver": solver, "iterations": 3}
        same(
            cubin.multibit(lazy, number, **options).compute(),
            cubin.multibit(x, plain, **options),
        )
        if solver != "greedy":
            for importance in (weights, da.from_array(weights, chunks=(6, 3))):
                same(
                    cubin.multibit(lazy, number, importance=importance, **options).compute(),
                    cubin.multibit(x, plain, importance=weights, **options),
                )


@pytest.mark.parametrize("solver", SOLVERS)
def test_groups(rng, solver):
    x, gy = values(rng, (6, 40)), values(rng, (6, 40))
    lazy = da.from_array(x, chunks=(chunked(rng, 6), chunked(rng, 40, 4)))
    same(
        cubin.multibit(lazy, 3, group_size=4, solver=solver).compute(),
        cubin.multibit(x, 3, group_size=4, solver=solver),
    )
    for surrogate in ("scaled_clip", "scale_aware"):
        same(
            cubin.multibit_grad(lazy, 2, gy, group_size=4, surrogate=surrogate).compute(),
            cubin.multibit_grad(x, 2, gy, group_size=4, surrogate=surrogate),
        )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("chunks", [(8, 32, 2), (8, 34)])
def test_shorter_last_groups(rng, solver, chunks):
    x, gy = values(rng, (6, 42)), values(rng, (6, 42))
    lazy = da.from_array(x, chunks=(4, chunks))
    bits, weights = rng.integers(0, 3, x.shape), rng.random(42).astype("float32")
    bits[:, 40:] = 3  # the shorter groups alone have a third level
    options = {"group_size": 4, "solver": solver}
    if solver != "greedy":
        options["importance"] = weights
    for number in (3, bits, da.from_array(bits, chunks=(6, 21))):
        plain = number if isinstance(number, int) else bits
        found = cubin.multibit(lazy, number, **options)
        assert found.chunks == lazy.chunks
        same(found.compute(), cubin.multibit(x, plain, **options))
    for surrogate in ("scaled_clip", "scale_aware"):
        same(
            cubin.multibit_grad(lazy, bits, gy, group_size=4, surrogate=surrogate).compute(),
            cubin.multibit_grad(x, bits, gy, group_size=4, surrogate=surrogate),
        )


@pytest.mark.parametrize("solver", ["refined", "alternating"])
def test_the_whole_array_chooses_the_form(rng, solver):
    # In arrays of this size these solvers add up in another order than in those of a chunk's.
    x = values(rng, (96, 1000))
    lazy = da.from_array(x, chunks=(20, -1))
    bits = np.ones((96, 1000), int)
    bits[-1] = 2
    for number in (2, bits):
        same(
            cubin.multibit(lazy, number, channel_axis=0, solver=solver).compute(),
            cubin.multibit(x, number, channel_axis=0, solver=solver),
        )
    lazy_bits = da.from_array(bits, chunks=(20, -1))
    same(
        cubin.multibit(lazy, lazy_bits, channel_axis=0, solver=solver).compute(),
        cubin.multibit(x, bits, channel_axis=0, solver=solver),
    )


# ---------------------------------------------------------------- rows in several chunks


@pytest.mark.parametrize("axis", [None, 0, (2, 0)])
@pytest.mark.parametrize(
    "dtype", few(["float32", "float64", "float16", "bfloat16"], "float32", "float16")
)
def test_greedy_across_chunks(rng, axis, dtype):
    x = values(rng, (7, 6, 9), dtype)
    bits = rng.integers(0, 4, (6, 9))
    for number in (3, bits):
        _, _, _, expected = reference.greedy(x, np.broadcast_to(number, x.shape), axis)
        found = [cubin.multibit(cut(rng, x), number, channel_axis=axis).compute() for _ in range(3)]
        same(found[1], found[0])
        same(found[2], found[0])
        tolerance = {"float32": 1e-6, "float64": 1e-12, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
        error = np.abs(found[0].astype(np.float64) - expected).max()
        assert error <= tolerance * np.abs(x.astype(np.float64)).max()
    lazy_bits = da.from_array(bits, chunks=(4, 2))
    same(cubin.multibit(cut(rng, x), lazy_bits, channel_axis=axis).compute(), found[0])


@pytest.mark.parametrize("group_size", [3, 10, 30, 4, 13, 64])
def test_groups_that_chunks_cut_are_as_numpys(rng, group_size):
    x = values(rng, (4, 30))
    lazy = da.from_array(x, chunks=(3, (7, 1, 20, 2)))
    found = cubin.multibit(lazy, 2, group_size=group_size)
    assert found.chunks == lazy.chunks
    same(found.compute(), cubin.multibit(x, 2, group_size=group_size))


def test_nan_and_infinity_stay_in_their_row_as_in_numpy(rng):
    x = values(rng, (5, 12))
    x[0, 3], x[1, 4], x[2, 5], x[3, :2] = np.nan, np.inf, -np.inf, (np.inf, np.nan)
    bits = rng.integers(1, 4, x.shape)
    bits[2, 5] = 0
    for number in (1, 3, bits):
        expected = cubin.multibit(x, number, channel_axis=0)
        found = cubin.multibit(cut(rng, x), number, channel_axis=0).compute()
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [0.1, 5e-324, 1e-310, 1.7e308])
def test_equal_numbers_are_exact(rng, value):
    x = np.full((2, 33), value)
    same(cubin.multibit(cut(rng, x), 2, channel_axis=0).compute(), x)


def test_scales_are_exact_means_rounded_once(rng):
    x = values(rng, (3, 999), "float64") * 10.0 ** rng.integers(-9, 9, (3, 999))
    rows, bits = rows_of(x.shape, 0), as_bits(1, x)
    top = scattered.largest(x, bits, rows)
    np.testing.assert_array_equal(top, np.abs(x).max(axis=1, keepdims=True))
    sums = scattered.integer_sums(x, bits, rows, [], top, 999)
    halves = [
        scattered.integer_sums(part, as_bits(1, part), rows_of(part.shape, 0), [], top, 999)
        for part in (x[:, :100], x[:, 100:])
    ]
    np.testing.assert_array_equal(sums, sum(halves))
    exact = [[float(sum(Fraction(abs(v)) for v in row) / 999)] for row in x.tolist()]
    np.testing.assert_array_equal(scattered.means(sums, top, 999, x.dtype), exact)


def test_long_rows_in_pieces_and_on_threads(rng):
    x = values(rng, (2, 300_000))
    expected = cubin.multibit(da.from_array(x, chunks=(1, 70_000)), 3, channel_axis=0)
    found = cubin.multibit(da.from_array(x, chunks=(2, 290_000)), 3, channel_axis=0)
    with dask.config.set(scheduler="threads"):
        same(found.compute(), expected.compute())
    np.testing.assert_allclose(found, cubin.multibit(x, 3, channel_axis=0), atol=1e-6)


# ---------------------------------------------------------------- laziness


@pytest.mark.parametrize("axis", [0, None])
def test_nothing_is_computed_before_it_is_asked_for(axis):
    computed = []

    def block(number):
        computed.append(number)
        return np.full((2, 4), number + 1, np.float32)

    parts = [da.from_delayed(dask.delayed(block)(i), (2, 4), np.float32) for i in range(3)]
    x = da.concatenate(parts)
    results = [
        cubin.sign(x),
        cubin.ste_mask(x),
        cubin.multibit(x, 2, channel_axis=axis),
        cubin.sign_grad(x, x),
        cubin.multibit_grad(x, x.astype("int8"), x),
    ]
    assert computed == []
    for result in results:
        assert result.chunks == x.chunks
        assert type(result._meta) is np.ndarray
        found = result.compute()
        assert result.dtype == result._meta.dtype == found.dtype
    computed.clear()
    cubin.multibit(x, 3, channel_axis=axis).compute()
    assert sorted(computed) == [0, 1, 2]  # each of them once


def test_graphs_can_be_sent_and_repeat(rng):
    x = cut(rng, values(rng, (6, 8)))
    for solver, axis in (("greedy", None), ("refined", 0)):
        lazy = x if axis is None else x.rechunk({1: -1})
        y = cubin.multibit(lazy, 2, channel_axis=axis, solver=solver)
        assert y.name == cubin.multibit(lazy, 2, channel_axis=axis, solver=solver).name
        same(pickle.loads(pickle.dumps(y)).compute(), y.compute())


@pytest.mark.kernels
def test_chunks_on_a_device(device, rng):
    x = values(rng, (4, 16))
    lazy = da.from_array(device.asarray(x), chunks=(2, 8), asarray=False)
    whole = lazy.rechunk({1: -1})
    bits = rng.integers(0, 3, 16)
    for found, expected in (
        (cubin.sign(lazy), cubin.sign(x)),
        (cubin.multibit_grad(lazy, bits, lazy), cubin.multibit_grad(x, bits, x)),
        (cubin.multibit(whole, 2, channel_axis=0), cubin.multibit(x, 2, channel_axis=0)),
        (cubin.multibit(lazy, 2, channel_axis=0), cubin.multibit(x, 2, channel_axis=0)),
    ):
        assert isinstance(found._meta, device.ndarray)
        blocks = [np.concatenate([b.compute().get() for b in row], 1) for row in found.to_delayed()]
        np.testing.assert_allclose(np.concatenate(blocks), expected, rtol=1e-6)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: cubin.multibit(x, 2, solver="refined"), ValueError,
         r"x\.rechunk\(\{0: -1, 1: -1\}\)"),
        (lambda x: cubin.multibit(x, 2, channel_axis=0, solver="optimal"), ValueError,
         r"x\.rechunk\(\{1: -1\}\)"),
        (lambda x: cubin.multibit(x, 2, group_size=4, solver="alternating"), ValueError,
         r"x\.rechunk\(\{1: 4\}\)"),
        (lambda x: cubin.multibit_grad(x, 2, x, surrogate="scale_aware"), ValueError, "rechunk"),
        (lambda x: cubin.multibit(x, 17), ValueError, r"0 \.\. 16, got 17"),
        (lambda x: cubin.multibit(x, np.full(12, 17)), ValueError, r"0 \.\. 16, got 17"),
        (lambda x: cubin.multibit_grad(x, np.full(12, -1), x), ValueError, r"got -1"),
        (lambda x: cubin.multibit(x, da.ones(12)), TypeError, "bits must be an integer"),
        (lambda x: cubin.multibit(x, da.ones(5, dtype=int)), ValueError, "bits of shape"),
        (lambda x: cubin.multibit(x, 2, group_size=0), ValueError, "at least 1"),
        (lambda x: cubin.multibit(x, 2, channel_axis=2), ValueError, "out of range"),
        (lambda x: cubin.multibit(x, 2, solver="best"), ValueError, "solver must be one of"),
        (lambda x: cubin.multibit(x, 2, importance=x), ValueError, "takes no importance"),
        (lambda x: cubin.multibit(x.rechunk(-1), 2, solver="refined", importance=-np.ones(12)),
         ValueError, "importance must be finite"),
        (lambda x: cubin.sign(x.astype(int)), TypeError, "x must be float16"),
        (lambda x: cubin.sign(x, out=np.empty((6, 12))), TypeError, "out cannot be a Dask array"),
        (lambda x: cubin.sign_grad(x, x[:3]), ValueError, r"gy has shape \(3, 12\)"),
        (lambda x: cubin.sign_grad(x), TypeError, "gy"),
        (lambda x: cubin.sign_grad(np.ones((6, 12)), x), TypeError, "gy is a Dask array, but x"),
        (lambda x: cubin.sign(x[x > 0]), ValueError, r"x\.compute_chunk_sizes\(\)"),
        (lambda x: cubin.quantize(x, 2), TypeError, r"x\.compute\(\)"),
        (lambda x: cubin.errors.relative_mse(np.ones((6, 12)), x), TypeError, r"compute\(\)"),
    ],
)  # fmt: skip
def test_what_is_refused_when_it_is_called(call, error, message):
    x = da.ones((6, 12), chunks=(4, 5))
    with pytest.raises(error, match=message):
        call(x)


def test_values_of_lazy_maps_are_checked_when_they_are_computed():
    x, bits = da.ones((6, 12), chunks=(4, 5)), da.full((6, 12), 17, chunks=(4, 5))
    for y in (cubin.multibit(x, bits), cubin.multibit_grad(x, bits, x)):
        with pytest.raises(ValueError, match=r"0 \.\. 16, got 17"):
            y.compute()


def test_tensors_beside_dask_arrays():
    torch = require("torch")
    with pytest.raises(TypeError, match="gy is a PyTorch tensor, but x is a Dask array"):
        cubin.sign_grad(da.ones(3), torch.ones(3))


def test_importing_the_package_imports_no_dask():
    code = "import cubin, sys; cubin.sign(1.0); sys.exit('dask' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
