"""Sums in a fixed order, and float16 as its bits, against definitions in Python's own numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as numbers

from cubin.core.sums import CHUNK, COLUMNS, LANES, SHORT, magnitude_sums

try:
    from cubin.core.host import loops
except ImportError:
    loops = None

needs_numba = pytest.mark.skipif(loops is None, reason="Numba is not installed")

SIZES = [0, 1, 3, 4, 7, 15, 16, 17, 31, 32, 33, 100, 127, 128, 1001, CHUNK - 1, CHUNK, CHUNK + 1,
         3 * CHUNK + 77]  # fmt: skip
DTYPES = ["float32", "float64"]


def add(x, taken=0.0):
    """The sum of magnitudes once a scale is taken off, which both forms give to the bit."""
    m = np.abs(np.abs(x) - x.dtype.type(taken))
    with np.errstate(all="ignore"):
        total = magnitude_sums(m[None])[0, 0]
    if loops is not None:
        _, sums = loops.scratch(x.dtype)
        found = 0.0
        for start in range(0, m.size, CHUNK):
            found += sum_in_loop(m[start : start + CHUNK], sums)
        np.testing.assert_array_equal(found, total)
    return total


def sum_in_loop(m, sums):
    return loops.magnitude_sum(m, m.dtype.type(0), sums)


@pytest.fixture(scope="module", autouse=True)
def compiled_before_any_deadline():
    for dtype in DTYPES:
        add(np.ones(2, dtype))


def by_halves(values, kind):
    """The sum of a list, in a dtype: the first half plus the second, which may be one shorter."""
    values = [kind(value) for value in values]
    while len(values) > 1:
        half = (len(values) + 1) // 2
        second = values[half:]
        values = [kind(a + b) for a, b in zip(values, second, strict=False)] + values[
            len(second) : half
        ]
    return values[0] if values else kind(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_order(rng, dtype, size):
    m = np.abs(rng.normal(size=size) * np.exp(3 * rng.normal(size=size))).astype(dtype)
    total = 0.0
    for start in range(0, size, CHUNK):
        chunk = m[start : start + CHUNK]
        width = len(chunk) // COLUMNS if len(chunk) >= SHORT else 0
        whole = chunk[: COLUMNS * width].reshape(COLUMNS, width)
        columns = [by_halves(column, m.dtype.type) for column in whole.T]
        lanes = [0.0] * LANES
        for turn, number in enumerate([*columns, *chunk[COLUMNS * width :]]):
            lanes[turn % LANES] += float(number)
        a, b, c, d, e, f, g, h = lanes
        total += ((a + b) + (c + d)) + ((e + f) + (g + h))
    assert add(m) == total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("taken", [0, 0.7])
def test_sums(rng, dtype, size, taken):
    x = rng.normal(size=size).astype(dtype)
    exact = math.fsum(np.abs(np.abs(x) - x.dtype.type(taken)).tolist())
    # Four additions in the dtype, and float64 for all others.
    assert abs(add(x, taken) - exact) <= 2 * np.finfo(dtype).eps * exact


def test_a_hundred_million_numbers_are_accurate_to_six_digits():
    x = np.tile(np.random.default_rng(1).uniform(size=1000).astype(np.float32), 1000)[None]
    exact = math.fsum(x[0].tolist())
    assert abs(magnitude_sums(x)[0, 0] / exact - 1) < 1e-7


@pytest.mark.parametrize("size", [1003, 100_003])
@pytest.mark.parametrize("value", [0.1, 1e-45, 3e-39, 8e37])
def test_equal_numbers_do_not_round(size, value):
    x = np.full(size, value, np.float32)
    assert add(x) == size * float(x[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_overflows_in_columns_alone(dtype):
    top = np.finfo(dtype).max
    expected = 99 * float(top) if dtype == "float32" else np.inf
    assert add(np.full(99, top)) == expected
    assert add(np.full(99, top), top) == 0


@pytest.mark.parametrize("at", [0, 5, 31, 39, 40])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_in_the_sum(at, bad):
    x = np.ones(41, np.float32)
    x[at] = bad
    assert not add(x) < np.inf
    assert np.isnan(add(x)) == np.isnan(bad)


# ---------------------------------------------------------------- float16, as its bits


@needs_numba
def test_every_float16_is_widened_as_numpy_does():
    half = np.arange(1 << 16, dtype=np.uint16)
    words = np.empty(half.size, np.uint32)
    loops.widen_float16(half, words)
    np.testing.assert_array_equal(words, half.view(np.float16).astype(np.float32).view(np.uint32))


def narrowed(words):
    half = np.empty(words.size, np.uint16)
    loops.narrow_to_float16(words, half)
    return half


@needs_numba
def test_what_lies_between_float16_is_rounded_as_numpy_does():
    """Each float16, the numbers half-way to the next, and what lies beside both."""
    words = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    near = np.arange(-2, 3).astype(np.uint32)[:, None]
    for halfway in (0, 1 << 12):
        tried = (words + np.uint32(halfway) + near).ravel()
        # Without NaN, processors that have an instruction for this use it.
        numbers = tried[~np.isnan(tried.view(np.float32))]
        for some in (tried, numbers):
            with np.errstate(all="ignore"):
                expected = some.view(np.float32).astype(np.float16).view(np.uint16)
            np.testing.assert_array_equal(narrowed(some), expected)


@needs_numba
@given(numbers(np.uint32, st.integers(1, 40), elements=st.integers(0, 2**32 - 1)))
@example(np.array([0x7F800001, 0xFF800001, 0x7FC00000, 0x477FEFFF, 0x477FF000], np.uint32))
@example(np.array([0, 1 << 31, 1, 0x33000000, 0x33000001, 0x387FF000, 0x38800000], np.uint32))
def test_any_float32_is_narrowed_as_numpy_does(words):
    with np.errstate(all="ignore"):
        expected = words.view(np.float32).astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(narrowed(words), expected)


@needs_numba
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 32, 64, 96, 160, 1024, 4096])
@pytest.mark.parametrize("edge", [-1.0, 0.5, 9.0])
def test_what_lies_above_an_edge(rng, dtype, size, edge):
    """Four columns in pairs, then eight lanes: the order that the solvers' loops add in."""
    m = np.abs(rng.normal(size=size)).astype(dtype)
    m[5::7] = 0.5  # on the edge, which is not above it
    values = (rng.uniform(size=size) * np.exp(3 * rng.normal(size=size))).astype(dtype)
    a, b, c, d = np.where(m > edge, values, 0).astype(dtype).reshape(4, -1)
    lanes = np.zeros(LANES)
    for turn in ((a + b) + (c + d)).astype(np.float64).reshape(-1, LANES):
        lanes += turn
    while lanes.size > 1:
        lanes = lanes[::2] + lanes[1::2]
    found = loops.numba.njit(lambda m, edge, values: loops.sum_above(m, edge, values))(
        m, m.dtype.type(edge), values
    )
    assert found == (lanes[0], (m > edge).sum())
