from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from ml_dtypes import finfo

import cubin
from cubin.core import floats
from cubin.core.host import blocks
from tests import reference
from tests.reference import plain

FLOATS = ["float16", "bfloat16", "float32", "float64"]
TRICKY = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -3.0, np.inf, -np.inf, np.nan]


def tricky(dtype):
    """Every special value, the neighbours of 1 and the subnormals of a dtype."""
    info = finfo(dtype)
    one = np.dtype(dtype).type(1)
    edges = [np.nextafter(one, one * 0), np.nextafter(one, one * 2)]
    small = [info.smallest_subnormal, info.tiny, info.max]
    values = np.array([*TRICKY, *edges, *small], dtype)
    # The NaN next to infinity, whose bits are the smallest of all NaN.
    word = np.dtype(f"u{values.itemsize}").type
    nan = (np.array(np.inf, dtype).view(word) + word(1)).view(dtype)
    return np.concatenate([values, -values, [nan]])


@pytest.mark.parametrize("dtype", FLOATS)
def test_sign_of_special_values(xp, host, dtype):
    x = tricky(dtype)
    y = cubin.sign(xp.asarray(x))
    assert y.dtype == dtype
    np.testing.assert_array_equal(plain(host(y)), [reference.sign(float(v)) for v in x])


# NumPy's own comparisons warn of signalling NaN.
quiet = np.errstate(invalid="ignore")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bound", [1, 0, 3, 0.5, -1, np.nan, np.float64(0.1)])
@quiet
def test_mask_of_special_values(xp, host, dtype, bound):
    x = tricky(dtype)
    mask = cubin.ste_mask(xp.asarray(x), bound)
    assert mask.dtype == bool
    # NumPy's own comparison rounds Python's numbers to the dtype of x.
    np.testing.assert_array_equal(host(mask), np.abs(x) <= bound)


@pytest.mark.parametrize("dtype", FLOATS)
def test_mask_with_arrays_of_bounds(xp, host, rng, dtype):
    x = rng.normal(0, 3, (5, 1, 7)).astype(dtype)
    for bound in (
        rng.integers(0, 5, (5, 1, 7)),
        rng.integers(-5, 5, (7,)).astype(np.int16),
        rng.integers(0, 300, (5, 1, 1)).astype(np.uint16),
        rng.uniform(0, 3, (5, 1, 1)),
        np.array(2, np.uint8),
    ):
        mask = cubin.ste_mask(xp.asarray(x), xp.asarray(bound))
        np.testing.assert_array_equal(host(mask), reference.ste_mask(x, bound))


@pytest.mark.parametrize("dtype", FLOATS)
@quiet
def test_gradients_of_special_values(xp, host, dtype):
    x = tricky(dtype)
    # Outside of the mask even an infinite or NaN gradient must give 0.
    gy = np.where(np.abs(x) <= 1, np.arange(1, x.size + 1), np.nan).astype(dtype)
    gx = cubin.sign_grad(xp.asarray(x), xp.asarray(gy))
    assert gx.dtype == dtype
    np.testing.assert_array_equal(plain(host(gx)), reference.gradient(x, 1, gy))
    bits = np.arange(x.size) % 5
    gy = np.full(x.shape, np.inf, dtype)
    gx = cubin.multibit_grad(xp.asarray(x), bits, xp.asarray(gy))
    np.testing.assert_array_equal(plain(host(gx)), reference.gradient(x, bits, gy))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (257,), (2, 3, 4, 5, 6, 7)])
def test_shapes(xp, host, rng, shape):
    x = rng.normal(0, 2, shape).astype(np.float32)
    gy = rng.normal(size=shape).astype(np.float32)
    signs = host(cubin.sign(xp.asarray(x)))
    assert signs.shape == shape
    np.testing.assert_array_equal(signs, np.where(x > 0, 1, -1))
    gx = host(cubin.multibit_grad(xp.asarray(x), 2, xp.asarray(gy)))
    assert gx.shape == shape
    np.testing.assert_array_equal(gx, np.where(np.abs(x) <= 2, gy, 0))


@pytest.mark.parametrize("size", [65_535, 65_536, 65_537, 300_001])
def test_more_than_one_block(xp, host, rng, size):
    x = rng.normal(0, 2, size).astype(np.float32)
    np.testing.assert_array_equal(host(cubin.sign(xp.asarray(x))), np.where(x > 0, 1, -1))
    np.testing.assert_array_equal(host(cubin.ste_mask(xp.asarray(x))), np.abs(x) <= 1)


def test_views(xp, host, rng):
    base = rng.normal(0, 2, (6, 8, 10))
    for view in (
        lambda a: a[::-1, ::2],
        lambda a: a.transpose(2, 0, 1),
        lambda a: a[:, 3],
        lambda a: a[1:, 1:, ::-3],
    ):
        x, expected = view(xp.asarray(base)), view(base)
        np.testing.assert_array_equal(host(cubin.sign(x)), np.where(expected > 0, 1, -1))
        np.testing.assert_array_equal(
            host(cubin.sign_grad(x, x)), np.where(np.abs(expected) <= 1, expected, 0)
        )


def test_fortran_order():
    x = np.asfortranarray(np.random.default_rng(0).normal(size=(400, 500)))
    np.testing.assert_array_equal(cubin.sign(x), np.where(x > 0, 1, -1))
    np.testing.assert_array_equal(cubin.sign_grad(x, x), np.where(np.abs(x) <= 1, x, 0))


@given(
    hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64]),
        hnp.array_shapes(min_dims=0, max_dims=6, max_side=4),
        elements=st.floats(width=16),
    )
)
def test_sign_and_mask_of_anything(x):
    signs, mask = cubin.sign(x), cubin.ste_mask(x)
    assert signs.dtype == x.dtype
    assert signs.shape == mask.shape == x.shape
    for index in np.ndindex(*x.shape):
        np.testing.assert_equal(float(signs[index]), reference.sign(float(x[index])))
        assert mask[index] == (abs(float(x[index])) <= 1)


def test_out(xp, host, rng):
    x = rng.normal(size=(4, 5))
    out = xp.empty((4, 5))
    assert cubin.sign(xp.asarray(x), out=out) is out
    np.testing.assert_array_equal(host(out), np.where(x > 0, 1, -1))
    itself = xp.asarray(x.copy())
    assert cubin.sign(itself, out=itself) is itself
    np.testing.assert_array_equal(host(itself), np.where(x > 0, 1, -1))


def test_out_that_overlaps():
    base = np.random.default_rng(0).normal(size=200_001)
    expected = np.where(base[:-1] > 0, 1, -1)
    cubin.sign(base[:-1], out=base[1:])
    np.testing.assert_array_equal(base[1:], expected)


def test_out_of_the_wrong_kind():
    x = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(2, 3\)"):
        cubin.sign(x, out=np.empty((3, 2), np.float32))
    with pytest.raises(TypeError, match=r"float64.*float32"):
        cubin.sign(x, out=np.empty((2, 3)))
    with pytest.raises(TypeError, match="list"):
        cubin.sign(x, out=[[0.0] * 3] * 2)
    with pytest.raises(ValueError, match="read-only"):
        cubin.sign(x, out=np.broadcast_to(np.float32(0), (2, 3)))


BOUNDS = [0, 1, 255, 256, -0.0, -1.0, 2.0**-149, 1e-8, 0.1, 65504.0, 65519.0, 65520.0, 1e39, np.inf,
          np.nan]  # fmt: skip


@pytest.mark.parametrize("bound", [*BOUNDS, *map(np.float64, BOUNDS), np.float16(0.1)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_mask_of_all_patterns(dtype, bound):
    if isinstance(bound, float) and not isinstance(bound, np.generic):
        limit = float(floats.nearest(bound, np.dtype(dtype)))  # as NumPy compares
    else:
        limit = float(bound)
    patterns = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(all="ignore"):
        if dtype in ("float16", "bfloat16"):
            x = patterns.view(dtype)
        else:
            edge = np.array(limit, dtype)
            near = np.nextafter(edge, np.array([-np.inf, np.inf], dtype))
            x = np.concatenate([patterns.view(np.float16).astype(dtype), [edge], near, -near])
        np.testing.assert_array_equal(cubin.ste_mask(x, bound), abs(x.astype(np.float64)) <= limit)


@pytest.mark.parametrize("function", [cubin.sign, cubin.ste_mask])
@pytest.mark.parametrize("bad", [[1, 2], np.ones(2, bool), np.ones(2, complex), "one", None])
def test_arguments_that_are_not_floats(function, bad):
    with pytest.raises(TypeError, match="x "):
        function(bad)


def test_wrong_gradient():
    x = np.ones((2, 3))
    with pytest.raises(ValueError, match=r"gy has shape \(3,\), but x has shape \(2, 3\)"):
        cubin.sign_grad(x, np.ones(3))
    with pytest.raises(TypeError, match="gy"):
        cubin.multibit_grad(x, 1, np.ones((2, 3), int))


def test_wrong_bound():
    x = np.ones((2, 3))
    with pytest.raises(ValueError, match=r"\(2,\).*\(2, 3\)"):
        cubin.ste_mask(x, np.ones(2))
    with pytest.raises(ValueError, match="broadcast"):
        cubin.ste_mask(x, np.ones((4, 2, 3)))
    with pytest.raises(TypeError, match="bound"):
        cubin.ste_mask(x, True)
    with pytest.raises(TypeError, match="bound"):
        cubin.ste_mask(x, 1j)


def test_inputs_stay_as_they_are():
    x = np.random.default_rng(0).normal(size=1000)
    before = x.copy()
    cubin.sign(x), cubin.ste_mask(x), cubin.sign_grad(x, x), cubin.multibit_grad(x, 2, x)
    np.testing.assert_array_equal(x, before)


def test_threads_share_work_by_the_bytes_that_are_moved(monkeypatch):
    pytest.importorskip("numba")
    works = []
    monkeypatch.setattr(blocks, "each", lambda task, parts, work: works.append(work))
    size = 2 * blocks.LOADING
    for dtype in (np.float16, np.float32, np.float64):
        cubin.sign(np.ones(size, dtype))
    x = np.ones(size, np.float32)
    cubin.multibit_grad(x, 2, x)
    cubin.multibit_grad(x, np.ones(size, np.uint8), x)
    assert works == [size // 2, size, 2 * size, 12 * size // 8, 13 * size // 8]
