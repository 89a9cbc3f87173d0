"""Numbers too small for CuPy's own functions, which compute with float32 below 2^-126 as with 0."""

from __future__ import annotations

import numpy as np
import pytest
from ml_dtypes import finfo

import cubin
from cubin import bitmaps
from cubin.core import conversions
from tests.reference import plain

pytestmark = pytest.mark.kernels

CASES = {
    "greedy": ((5, 24), 3, {}),
    "refined": ((5, 24), 3, {"solver": "refined"}),
    "five levels": ((5, 24), 5, {"solver": "alternating"}),
    "optimal": ((5, 24), 3, {"solver": "optimal"}),
    "map": ((5, 24), None, {"solver": "optimal"}),
    "long rows": ((1, 16385), 2, {"solver": "refined"}),
}


@pytest.fixture
def tiny(rng):
    """Subnormal float32 of a shape, with as many digits as fit."""
    return lambda shape: rng.normal(0, 1e-39, shape).astype(np.float32)


def both(device, x, bits, **options):
    """The codes that NumPy and the device give for rows."""
    there = {
        name: device.asarray(value) if isinstance(value, np.ndarray) else value
        for name, value in options.items()
    }
    given = device.asarray(bits) if np.ndim(bits) else bits
    return (
        cubin.quantize(x, bits, channel_axis=0, **options),
        cubin.quantize(device.asarray(x), given, channel_axis=0, **there),
    )


def assert_same(here, there):
    np.testing.assert_allclose(there.scales.get(), here.scales, rtol=1e-6, atol=3e-45)
    np.testing.assert_array_equal(there.signs.get(), here.signs)
    assert (here.scales[0] > 0).all()


@pytest.mark.parametrize("case", list(CASES))
def test_solvers(device, tiny, rng, case):
    shape, bits, options = CASES[case]
    bits = rng.integers(1, 4, shape).astype(np.uint8) if bits is None else bits
    assert_same(*both(device, tiny(shape), bits, **options))


@pytest.mark.parametrize("solver", ["refined", "alternating", "optimal"])
def test_importance(device, tiny, solver):
    weights = np.abs(tiny((5, 24)))
    assert_same(*both(device, tiny((5, 24)), 2, solver=solver, importance=weights))


def test_small_elements_of_ordinary_rows_keep_their_sign(device, rng):
    x = rng.normal(0, 1, (3, 24)).astype(np.float32)
    x[:, ::3] = rng.normal(0, 1e-40, (3, 8))
    assert_same(*both(device, x, 5, solver="alternating"))


def test_negative_importance_is_refused(device, tiny):
    x = device.asarray(np.ones((2, 3), np.float32))
    weights = device.asarray(-np.abs(tiny((2, 3))))
    with pytest.raises(ValueError, match="not negative"):
        cubin.quantize(x, 2, solver="refined", importance=weights)


def test_codes_that_differ_are_not_equal(device):
    one, two = (
        cubin.quantize(device.asarray(np.array([a, -a], np.float32)), 1) for a in (1e-40, 2e-40)
    )
    assert one == one
    assert one != two


def test_bounds(device, tiny):
    x, bound = tiny((4, 10)), np.abs(tiny((4, 1)))
    mask = cubin.ste_mask(device.asarray(x), device.asarray(bound))
    np.testing.assert_array_equal(mask.get(), cubin.ste_mask(x, bound))
    assert 0 < mask.get().sum() < x.size


@pytest.mark.parametrize("make", [bitmaps.top_down, bitmaps.bottom_up, bitmaps.middle_out])
def test_maps_by_rank(device, tiny, make):
    x, mix = tiny((4, 10)), {1: 0.5, 2: 0.3, 3: 0.2}
    np.testing.assert_array_equal(make(device.asarray(x), mix).get(), make(x, mix))


def test_budget(device, tiny):
    x = tiny((4, 10))
    np.testing.assert_array_equal(
        bitmaps.budget(device.asarray(x), 1.5).get(), bitmaps.budget(x, 1.5)
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_conversions(device, dtype):
    limits = finfo(dtype)
    x = np.array(
        [limits.smallest_subnormal, -limits.tiny / 2, limits.max, 0, np.inf, np.nan], dtype
    )
    wide = conversions.widened(device.asarray(x))
    np.testing.assert_array_equal(wide.get(), x.astype(np.float64))
    np.testing.assert_array_equal(conversions.widened(x), x.astype(np.float64))
    np.testing.assert_array_equal(plain(conversions.narrowed(wide, dtype).get()), plain(x))


def test_the_stand_in_flushes_as_cupy_does(device):
    x = device.asarray(np.array([1e-40, -1e-40, 1], np.float32))
    for found in (x + 0, abs(x), x.astype(np.float64), x * 1, device.maximum(x, x), x / 1):
        assert (found.get() == 0).tolist() == [True, True, False]
    assert (x > 0).tolist() == [False, False, True]
    assert float(x.sum(dtype=np.float64)) == 1
    for kept in (x.copy(), device.sort(x), device.where(x == 1, x, x), device.concatenate([x])):
        assert np.count_nonzero(kept.get()) == 3
    wide = device.asarray(np.array([1e-40, 1]))
    assert np.count_nonzero(wide.astype(np.float32).get()) == 1
