"""Signs where a residual is exactly 0, in all forms: NumPy expressions, loops and kernels."""

from __future__ import annotations

import numpy as np
import pytest

import cubin
from cubin.core.host import blocks
from tests.exhaustive import few

DTYPES = ["float16", "bfloat16", "float32", "float64"]

# Their residuals are 0 at the levels 1, 2 and 3, and the scales up to then have few digits.
TIED = [
    [2, 3, 4, 7, 8, 9, 10, 13],
    [4, 5, 6, 9, 9, 9, 15, 15],
    [1, 2, 3, 3, 5, 6, 8, 8, 9, 15, 16, 20],
]

REFITTING = [
    {"solver": "refined"},
    {"solver": "alternating", "iterations": 0},
    {"solver": "alternating", "iterations": 1},
    {"solver": "alternating", "iterations": None},
    {"solver": "optimal"},
]


@pytest.fixture(params=["expressions", "loops", pytest.param("kernels", marks=pytest.mark.kernels)])
def xp(request, monkeypatch):
    """The library of a form."""
    if request.param == "kernels":
        return request.getfixturevalue("device")
    if request.param == "loops":
        pytest.importorskip("numba")
    monkeypatch.setattr(blocks, "COMPILED", 0 if request.param == "loops" else 1 << 62)
    return np


@pytest.fixture
def encode(xp, host):
    """Scales and signs as NumPy arrays, of rows on the form's library."""

    def run(x, bits, importance=None, **options):
        bits = bits if np.ndim(bits) == 0 else xp.asarray(bits)
        weights = None if importance is None else xp.asarray(importance)
        code = cubin.quantize(xp.asarray(x), bits, channel_axis=0, importance=weights, **options)
        return host(code.scales).astype(np.float64), host(code.signs)

    return run


def mirrored(rows, dtype):
    """Rows with mixed signs, and their opposites."""
    x = np.array(rows, dtype)
    x[:, ::2] *= -1
    return np.concatenate([x, -x])


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_takes_minus_one(encode, dtype):
    levels = 5
    x = mirrored([[2] * 8, [1, 1, 1, 5, 8, 8, 8, 8], [0, 0, 4, 4, 4, 4, 8, 8]], dtype)
    scales, signs = encode(x, levels)
    r = x.astype(np.float64)
    for level in range(levels):
        tied = r == 0
        assert tied.any()
        assert (signs[level][tied] == -1).all()
        r = r - scales[level][:, None] * signs[level]


@pytest.mark.parametrize("row", TIED, ids=lambda row: f"{len(row)}-{row[0]}")
@pytest.mark.parametrize(
    ("dtype", "levels"), [("float16", 4), ("float32", 4), ("float64", 4), ("float32", 5)]
)
def test_refined_mirrors_at_every_level(encode, dtype, row, levels):
    x = mirrored([row], dtype)
    _, signs = encode(x, levels, solver="refined")
    for level in range(1, 4):
        scales, before = encode(x, level, solver="refined")
        r = x - np.einsum("kr,krn->rn", scales, before)
        tied = r == 0
        assert tied.any(axis=1).all()
        np.testing.assert_array_equal(signs[level][tied], -np.sign(x[tied]))


@pytest.mark.parametrize("options", REFITTING[:-1], ids=lambda o: "-".join(map(str, o.values())))
def test_halfway_between_two_sums(encode, options):
    """Every solver ends on the scales 5 and 3: an element of 5 lies halfway between 2 and 8."""
    x = mirrored([[1, 1, 1, 5, 8, 8, 8, 8]], np.float32)
    scales, signs = encode(x, 2, **options)
    np.testing.assert_array_equal(scales, [[5, 5], [3, 3]])
    np.testing.assert_array_equal(signs[1][:, 3], -np.sign(x[:, 3]))


@pytest.mark.parametrize("options", REFITTING, ids=lambda o: "-".join(map(str, o.values())))
def test_halfway_with_importance(encode, options):
    x = mirrored([[2, 2, 5, 8, 8]], np.float32)
    scales, signs = encode(x, 2, np.array([1, 1, 0, 1, 1], np.float32), **options)
    np.testing.assert_array_equal(scales, [[5, 5], [3, 3]])
    np.testing.assert_array_equal(signs[1][:, 2], -np.sign(x[:, 2]))


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("levels", few([2, 3, 6], 2, 3))
@pytest.mark.parametrize("options", REFITTING, ids=lambda o: "-".join(map(str, o.values())))
def test_codes_of_the_opposite_are_opposite(encode, rng, options, levels, mapped):
    """On small integers, which tie often; 0 alone is its own opposite."""
    x = (rng.integers(1, 7, (12, 24)) * rng.choice([-1, 1], (12, 24))).astype(np.float32)
    bits = rng.integers(0, levels + 1, x.shape).astype(np.uint8) if mapped else levels
    scales, signs = encode(x, bits, **options)
    opposite_scales, opposite = encode(-x, bits, **options)
    np.testing.assert_array_equal(opposite_scales, scales)
    np.testing.assert_array_equal(opposite, -signs)


@pytest.mark.parametrize("options", REFITTING, ids=lambda o: "-".join(map(str, o.values())))
def test_zero_counts_as_negative(encode, options):
    """Both zeros have the codes of the smallest negative number."""
    x = np.array([[0.0, -0.0, -1e-3, 1e-3, -3, 3, -2, 2, 6, 6]], np.float32)
    _, signs = encode(x, 3, **options)
    np.testing.assert_array_equal(signs[:, 0, 0], signs[:, 0, 2])
    np.testing.assert_array_equal(signs[:, 0, 1], signs[:, 0, 2])
    np.testing.assert_array_equal(signs[:, 0, 3], -signs[:, 0, 2])
