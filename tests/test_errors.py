from __future__ import annotations

import math
import sys

import numpy as np
import pytest

import cubin
from cubin import errors
from cubin.core import passes
from cubin.core.host import blocks


def expected(x, y, axis):
    x, y = x.astype(np.float64), y.astype(np.float64)
    power = (x**2).sum(axis=axis)
    error = ((x - y) ** 2).sum(axis=axis)
    with np.errstate(divide="ignore"):
        sqnr_db = 10 * np.log10(power / error)
    return {
        "relative_mse": error / power,
        "sqnr_db": sqnr_db,
        "cosine_similarity": (x * y).sum(axis=axis) / np.sqrt(power * (y**2).sum(axis=axis)),
        "max_abs_error": np.abs(x - y).max(axis=axis),
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("axis", [None, 0, -1, (0, 2), (1,), ()])
def test_against_numpy_in_float64(xp, host, rng, dtype, axis):
    x = rng.normal(size=(5, 6, 7)).astype(dtype)
    y = (x + rng.normal(0, 0.1, x.shape)).astype(dtype)
    for name, value in expected(x, y, axis).items():
        found = getattr(errors, name)(xp.asarray(x), xp.asarray(y), axis=axis)
        assert found.dtype == np.float64
        assert found.shape == np.shape(value)
        if xp is np:
            assert isinstance(found, np.ndarray if found.ndim else np.float64)
        np.testing.assert_allclose(host(found), value, rtol=1e-12)


def test_arrays_of_several_pieces(xp, host, rng):
    size = (2 * blocks.BLOCK if xp is np else 4 * passes.DEVICE_PIECE) + 99
    x = rng.normal(size=(3, size)).astype(np.float32)
    y = cubin.multibit(x, 2)
    for axis in (None, 1):
        for name, value in expected(x, y, axis).items():
            found = getattr(errors, name)(xp.asarray(x), xp.asarray(y), axis=axis)
            np.testing.assert_allclose(host(found), value, rtol=1e-10)


def test_limits(xp):
    zero, one = xp.asarray(np.zeros(3)), xp.asarray(np.ones(3))
    assert float(errors.relative_mse(zero, zero)) == 0
    assert float(errors.relative_mse(zero, one)) == math.inf
    assert float(errors.sqnr_db(one, one)) == math.inf
    assert float(errors.sqnr_db(zero, one)) == -math.inf
    assert float(errors.cosine_similarity(zero, zero)) == 1
    assert float(errors.cosine_similarity(zero, one)) == 0
    assert float(errors.cosine_similarity(one, -one)) == -1
    empty = xp.asarray(np.ones((0, 2)))
    assert float(errors.relative_mse(empty, empty)) == 0
    assert float(errors.max_abs_error(empty, empty)) == 0
    assert errors.relative_mse(empty, empty, axis=1).shape == (0,)


def test_nan_is_not_hidden(xp, host, rng):
    x = rng.normal(size=(3, 700))
    y = x.copy()
    y[1, 5] = np.nan
    for name in ("relative_mse", "sqnr_db", "cosine_similarity", "max_abs_error"):
        found = host(getattr(errors, name)(xp.asarray(x), xp.asarray(y), axis=1))
        np.testing.assert_array_equal(np.isnan(found), [False, True, False])


def test_infinity_gives_nan_without_a_warning(xp):
    x = xp.asarray(np.array([np.inf, 1.0]))
    for name in ("relative_mse", "sqnr_db", "cosine_similarity", "max_abs_error"):
        assert math.isnan(float(getattr(errors, name)(x, x)))


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_sums_of_float16_exceed_its_range(axis, order, xp):
    x, y = (xp.asarray(np.full((300, 200), value, np.float16, order)) for value in (300, 299))
    assert (errors.relative_mse(x, y, axis=axis) == 1 / 300**2).all()
    assert (errors.max_abs_error(x, y, axis=axis) == 1).all()
    assert (abs(errors.cosine_similarity(x, y, axis=axis) - 1) < 1e-12).all()


@pytest.mark.parametrize("axis", [None, 0])
def test_sums_of_many_equal_errors_keep_their_digits(axis):
    x, y = (np.full((2**21, 2), value, np.float32) for value in (0.1, 0.11))
    exact = ((float(y[0, 0]) - float(x[0, 0])) / float(x[0, 0])) ** 2
    np.testing.assert_allclose(errors.relative_mse(x, y, axis=axis), exact, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-170, 1e160])
def test_squares_out_of_range_give_nan(xp, scale):
    x = xp.asarray(scale * np.array([3.0, 4.0]))
    y = xp.asarray(scale * np.array([3.0, 4.0 + 1e-12]))
    assert math.isnan(float(errors.relative_mse(x, y)))
    assert math.isnan(float(errors.sqnr_db(x, y)))
    assert math.isnan(float(errors.cosine_similarity(x, -x)))
    assert float(errors.max_abs_error(x, -x)) == pytest.approx(8 * scale)
    if scale < 1:
        assert float(errors.relative_mse(x, x)) == 0
        assert float(errors.cosine_similarity(x, x)) == 1
        zero, one = xp.asarray(np.zeros(2)), xp.asarray(np.ones(2))
        assert math.isnan(float(errors.relative_mse(zero, x)))
        assert float(errors.relative_mse(one, x)) == 1


def test_arguments():
    x = np.ones((2, 3))
    with pytest.raises(ValueError, match=r"approx has shape \(3,\)"):
        errors.relative_mse(x, np.ones(3))
    with pytest.raises(ValueError, match="axis 2"):
        errors.relative_mse(x, x, axis=2)
    with pytest.raises(TypeError, match="approx"):
        errors.sqnr_db(x, np.ones((2, 3), int))


@pytest.mark.parametrize("axis", [None, 0, -1, (0, 2), (2, 0), (1,), ()])
def test_keepdims_broadcasts_to_x(xp, host, rng, axis):
    x = rng.normal(size=(5, 6, 7))
    y = x + rng.normal(0, 0.1, x.shape)
    shape = np.sum(x, axis=axis, keepdims=True).shape
    for name, value in expected(x, y, axis).items():
        found = getattr(errors, name)(xp.asarray(x), xp.asarray(y), axis=axis, keepdims=True)
        assert found.shape == shape
        np.testing.assert_allclose(host(found), np.reshape(value, shape), rtol=1e-12)


def test_options_are_keywords():
    x = np.ones((2, 3))
    for name in ("relative_mse", "sqnr_db", "cosine_similarity", "max_abs_error"):
        with pytest.raises(TypeError):
            getattr(errors, name)(x, x, 0)


# The order of sums

SUMS = ("error", "power", "power_of_approx", "product", "worst")
SHAPES = [(0, 3), (3, 0), (1, 1), (7, 127), (3, 128), (2, 143), (2, 1025), (3, 5000), (1, 150_001)]
KINDS = {
    "random": (1, 1),
    "zeros": (0, -1),
    "subnormal": (1e-41, 1e-39),
    "overflowing": (1e160, 1),
    "not finite": (np.nan, np.inf),
}


def pair(rng, shape, dtype, kind):
    first, second = KINDS[kind]
    x, y = rng.normal(size=shape), np.abs(rng.normal(size=shape))
    if kind == "not finite":
        x.ravel()[::501], y.ravel()[:1] = first, -second
        x.ravel()[1::777] = second
        first = second = 1
    with np.errstate(all="ignore"):
        return (x * first).astype(dtype), (y * second).astype(dtype)


def sums_of(form, x, y):
    """What a form gives for rows, (rows, 5)."""
    outputs = {name: np.full((len(x), 1), np.nan) for name in SUMS}
    with np.errstate(all="ignore"):
        form(x, y, **outputs)
    return np.hstack(list(outputs.values()))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_gives_the_bits_of_the_body(rng, dtype, kind):
    pytest.importorskip("numba")
    from cubin import errors_loops

    for shape in SHAPES:
        x, y = pair(rng, shape, dtype, kind)
        expected = sums_of(errors.moments.function, x, y)
        spread = np.repeat(x, 2, axis=1)[:, ::2], y[::-1].copy()[::-1]
        for views in ((x, y), (np.asfortranarray(x), np.asfortranarray(y)), spread):
            for form in (errors.moments.function, errors_loops.moments):
                found = sums_of(form, *views)
                np.testing.assert_array_equal(found, expected)
                np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_sums_are_exact_to_float64(rng, dtype):
    for shape in SHAPES[2:]:
        x, y = pair(rng, shape, dtype, "random")
        rows = zip(x.astype(float).tolist(), y.astype(float).tolist(), strict=True)
        found = sums_of(errors.moments.function, x, y)
        for (a, b), row in zip(rows, found, strict=True):
            pairs = [*zip(a, b, strict=True)]
            exact = [math.fsum((p - q) ** 2 for p, q in pairs), math.fsum(p * p for p in a),
                     math.fsum(q * q for q in b), math.fsum(p * q for p, q in pairs)]  # fmt: skip
            np.testing.assert_allclose(row[[0, 1, 2]], exact[:3], rtol=4e-15)
            assert abs(row[3] - exact[3]) <= 4e-15 * math.sqrt(exact[1] * exact[2])
            assert row[4] == max(abs(p - q) for p, q in pairs)


@pytest.mark.parametrize("shape", [(1500, 1024), (3, 7, 70_001), (2**18 + 9,), (600, 5, 600)])
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_measure_has_the_same_bits_in_all_forms(rng, monkeypatch, shape, axis):
    x = rng.normal(size=shape).astype(np.float32)
    y = x + rng.normal(0, 0.1, shape).astype(np.float32)
    found = []
    # Loops for all sizes on two threads, on one, and NumPy's bodies.
    for compiled, threads in ((0, "2"), (0, "1"), (sys.maxsize, "1")):
        monkeypatch.setattr(blocks, "COMPILED", compiled)
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        measured = errors.measure(x, y, axis=axis)
        found.append([getattr(measured, name) for name in SUMS])
        turned = errors.measure(np.asfortranarray(x), y, axis=axis)
        found.append([getattr(turned, name) for name in SUMS])
    for other in found[1:]:
        for one, expected in zip(other, found[0], strict=True):
            np.testing.assert_array_equal(one, expected)
