"""What is written as LLVM's instructions, against definitions in Python's own numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as numbers

pytest.importorskip("numba")

import numba

from cubin import compiled
from cubin.instructions import itemsize, levels_in_lanes, sum_in_lanes

# Vectors of both dtypes, alone and by four, and what is left over.
SIZES = [0, 1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40, 63, 64, 100, 1001]
DTYPES = ["float32", "float64"]


@numba.njit
def add(x, bits, level, scales, left):
    return sum_in_lanes(x, bits, np.uint8(level), scales, left)


@numba.njit
def write(x, bits, first, scales, stored, y, opposite):
    levels_in_lanes(x, bits, np.uint8(first), scales, stored, y, opposite)


def magnitudes(x, scales):
    """What is left of magnitudes, rounded at each step as the dtype does."""
    m = np.abs(x)
    for scale in scales:
        m = np.abs(m - scale)
    return m


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_sums(rng, dtype, mapped, size, count):
    x = rng.normal(size=size).astype(dtype)
    bits = rng.integers(0, 4, size).astype(np.uint8) if mapped else None
    scales = tuple(rng.uniform(0, 1, count).astype(dtype))
    left = np.full(size, 7, dtype)
    total, number = add(x, bits, 1, scales, left)
    expected = magnitudes(x, scales)
    hot = bits > 1 if mapped else np.ones(size, bool)
    np.testing.assert_array_equal(left, expected)
    assert number == hot.sum()
    exact = math.fsum(expected[hot].tolist())
    # Two additions in the dtype, and float64 for all others.
    assert abs(total - exact) <= 2 * np.finfo(dtype).eps * exact
    assert add(x, bits, 1, scales, None) == (total, number)
    assert add(x, bits, 1, scales, x) == (total, number)
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("value", [0.1, 1e-45, 3e-39, 8e37])
def test_equal_numbers_do_not_round(rng, mapped, value):
    x = np.full(1003, value, np.float32)
    bits = rng.integers(0, 2, x.size).astype(np.uint8) if mapped else None
    total, number = add(x, bits, 0, (), None)
    assert total == number * float(x[0])


@pytest.mark.parametrize("at", [0, 5, 31, 39, 40])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_in_the_sum_unless_it_does_not_count(at, bad):
    x, bits = np.ones(41, np.float32), np.ones(41, np.uint8)
    x[at] = bad
    assert not add(x, bits, 0, (), None)[0] < np.inf
    bits[at] = 0
    assert add(x, bits, 0, (), None) == (40, 40)


@pytest.mark.parametrize("level", [0, 127, 128, 254, 255])
def test_bits_are_compared_as_unsigned(level):
    bits = np.arange(256, dtype=np.uint8)
    assert add(np.ones(256, np.float32), bits, level, (), None) == (255 - level, 255 - level)


def sum_of_levels(x, bits, scales, stored):
    """As many levels of each element as it has, and 0 less what is left after all of them."""
    y, opposite = np.zeros_like(x), 0 - x
    for level, (scale, given_scale) in enumerate(zip(scales, stored, strict=True)):
        positive = np.signbit(opposite)
        step = np.where(positive, given_scale, -given_scale)
        total = step if level == 0 else y + step
        y = np.where(level < bits, total, y) if level else np.where(bits > 0, step, y)
        opposite = opposite + np.where(positive, scale, -scale)
    return y, opposite


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", SIZES)
def test_levels(rng, dtype, mapped, rounded, levels, size):
    x = rng.normal(size=size).astype(dtype)
    x[:2] = [0, -0.0][: x[:2].size]
    bits = rng.integers(0, levels + 1, size).astype(np.uint8) if mapped else None
    scales = tuple(np.sort(rng.uniform(0, 1, levels))[::-1].astype(dtype))
    stored = tuple(np.float16(scale).astype(dtype) for scale in scales) if rounded else None
    own = np.full(size, levels) if bits is None else bits
    expected, left = sum_of_levels(x, own, scales, scales if stored is None else stored)
    y, opposite = np.full(size, 7, dtype), np.full(size, 7, dtype)
    write(x, bits, 0, scales, stored, y, None)
    np.testing.assert_array_equal(y, expected)
    y[:] = 7
    write(x, bits, 0, scales, stored, y, opposite)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(opposite, left)
    # Going on from there is the same as all levels in one go, for elements that have them all.
    more = np.full(size, 2 * levels, np.uint8) if mapped else None
    whole, rest = sum_of_levels(
        x, np.full(size, 2 * levels), scales * 2, 2 * (scales if stored is None else stored)
    )
    write(x, more, 0, scales, stored, y, opposite)
    write(None, more, levels, scales, stored, y, opposite)
    np.testing.assert_array_equal(y, whole)
    np.testing.assert_array_equal(opposite, rest)


@numba.njit
def sizes(x):
    return itemsize(x)


def test_itemsize():
    kinds = [np.float32, np.float64, np.uint8, np.uint16]
    assert [sizes(np.empty(3, kind)) for kind in kinds] == [4, 8, 1, 2]


# ---------------------------------------------------------------- float16, as its bits


def test_every_float16_is_widened_as_numpy_does():
    half = np.arange(1 << 16, dtype=np.uint16)
    words = np.empty(half.size, np.uint32)
    compiled._widen(half, words)
    np.testing.assert_array_equal(words, half.view(np.float16).astype(np.float32).view(np.uint32))


def narrowed(words):
    half = np.empty(words.size, np.uint16)
    compiled._narrow(words, half)
    return half


def test_what_lies_between_float16_is_rounded_as_numpy_does():
    """Each float16, the numbers half-way to the next, and what lies beside both."""
    words = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    near = np.arange(-2, 3).astype(np.uint32)[:, None]
    for halfway in (0, 1 << 12):
        tried = (words + np.uint32(halfway) + near).ravel()
        with np.errstate(all="ignore"):
            expected = tried.view(np.float32).astype(np.float16).view(np.uint16)
        np.testing.assert_array_equal(narrowed(tried), expected)


@given(numbers(np.uint32, st.integers(1, 40), elements=st.integers(0, 2**32 - 1)))
@example(np.array([0x7F800001, 0xFF800001, 0x7FC00000, 0x477FEFFF, 0x477FF000], np.uint32))
@example(np.array([0, 1 << 31, 1, 0x33000000, 0x33000001, 0x387FF000, 0x38800000], np.uint32))
def test_any_float32_is_narrowed_as_numpy_does(words):
    with np.errstate(all="ignore"):
        expected = words.view(np.float32).astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(narrowed(words), expected)
