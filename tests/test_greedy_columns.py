"""Greedy's loops down the columns against the bodies of the primitives, to the bit."""

from __future__ import annotations

import numpy as np
import pytest

import cubin
from cubin.codes.levels import level_signs
from cubin.codes.planes import pack_signs
from cubin.core import floats, passes
from cubin.core.host import blocks
from cubin.core.rows import rows_of
from cubin.core.sums import SHORT
from cubin.solvers import greedy
from tests.exhaustive import few
from tests.reference import room_for_signs, signs_of

pytest.importorskip("numba")

from cubin.codes import levels_loops, planes_loops
from cubin.core.host import loops
from cubin.solvers import greedy_loops

DTYPES = ["float16", "float32", "float64"]
SHAPES = [(16, 2), (17, 130), (300, 140), (70, 27), (131, 1025), (1100, 8)]


@pytest.fixture(autouse=True)
def loops_for_any_size(monkeypatch):
    monkeypatch.setattr(blocks, "COMPILED", 0)


def side_by_side(rows, n, dtype, lead=()):
    """An array of rows that lie side by side, with others on both sides; and those others."""
    whole = np.full((*lead, n, rows + 5), 77, dtype)
    return whole[..., 2:-3].swapaxes(-1, -2), whole


def assert_untouched(whole):
    assert (whole[..., :2] == 77).all()
    assert (whole[..., -3:] == 77).all()


def sample(rng, shape, dtype):
    x, _ = side_by_side(*shape, dtype)
    x[...] = rng.normal(size=shape)
    x[0, 1], x[2], x[3] = -0.0, 0, 0.3
    x[4, 1], x[5, 0], x[6, 1] = np.nan, np.inf, -np.inf
    x[7] = np.finfo(dtype).max
    return x


def map_of(rng, shape, levels, kind):
    if kind == "number":
        return np.uint8(levels)
    bits = rng.integers(0, levels + 1, shape)
    if kind == "wide":
        return bits.astype(np.int64).view(np.uint8)[..., ::8]
    columns, _ = side_by_side(*shape, np.uint8)
    columns[...] = bits
    return columns


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["number", "columns", "wide"])
@pytest.mark.parametrize("levels", few([1, 2, 3, 4, 5, 8, 16], 2, 3, 5))
@pytest.mark.parametrize("shape", few(SHAPES, (300, 140), (131, 1025)))
def test_columns_equal_the_bodies(rng, dtype, kind, levels, shape):
    x, bits = sample(rng, shape, dtype), map_of(rng, shape, levels, kind)
    assert loops.beside(x)
    with np.errstate(all="ignore"):
        scales = greedy._level_scales(x, bits, levels)
        expected, code = np.empty(shape, dtype), np.empty(shape, np.uint16)
        greedy.approximation(x, bits, *scales, y=expected)
        greedy.codes(x, bits, *scales, code=code)
    for run in (
        lambda y: greedy_loops.approximate_rows(x, bits, levels, y=y),
        lambda y: greedy_loops.approximation(x, bits, *scales, y=y),
    ):
        y, whole = side_by_side(*shape, dtype)
        run(y)
        np.testing.assert_array_equal(y, expected)
        assert_untouched(whole)
    found, whole = side_by_side(*shape, np.uint16)
    greedy_loops.codes(x, bits, *scales, code=found)
    np.testing.assert_array_equal(found, code)
    assert_untouched(whole)
    sign = np.empty(shape, np.int8)
    for encode in (greedy_loops.encode_rows, greedy.encode_rows.function):
        packed = room_for_signs(levels, shape, across=True)
        found = np.empty((levels, len(x), 1), scales[0].dtype)
        with np.errstate(all="ignore"):
            encode(x, bits, levels, scales=found, signs=packed)
        np.testing.assert_array_equal(found, scales)
        signs = signs_of(packed, bits, shape)
        for level in range(levels):
            level_signs(code, bits, np.uint8(level), sign=sign)
            np.testing.assert_array_equal(signs[level], sign)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["number", "columns"])
@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_of_pieces(rng, dtype, kind, levels, shape):
    x, bits = sample(rng, shape, dtype), map_of(rng, shape, levels + 1, kind)
    work = floats.work_dtype(np.dtype(dtype))
    scales = [rng.uniform(0, 1, (len(x), 1)).astype(work) for _ in range(levels)]
    total, count = np.empty((2, len(x), 1)), np.empty((2, len(x), 1), np.int64)
    for module, at in ((greedy, 0), (greedy_loops, 1)):
        module.level_sums(x, bits, *scales, total=total[at], count=count[at])
    np.testing.assert_array_equal(total[0], total[1])
    np.testing.assert_array_equal(count[0], count[1])


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_codes_to_signs(rng, levels):
    code, _ = side_by_side(40, 1100, np.uint16)
    code[...] = rng.integers(0, 1 << levels, code.shape)
    for bits in (np.uint8(levels), map_of(rng, code.shape, levels, "columns")):
        plain, (sign, whole) = np.empty(code.shape, np.int8), side_by_side(40, 1100, np.int8)
        level_signs.function(code, bits, np.uint8(0), sign=plain)
        levels_loops.level_signs(code, bits, np.uint8(0), sign=sign)
        np.testing.assert_array_equal(sign, plain)
        assert_untouched(whole)


@pytest.mark.parametrize("count", [1, 15, 16, 70, 131])
@pytest.mark.parametrize("n", [1, 7, 8, 27, 521, 1104])
@pytest.mark.parametrize("columns", [False, True])
def test_signs_to_planes(rng, count, n, columns):
    signs = (
        side_by_side(count, n, np.int8, (3,))[0] if columns else np.empty((3, count, n), np.int8)
    )
    signs[...] = rng.integers(-1, 2, signs.shape)
    expected = np.empty((3, -(-n // 8), count), np.uint8)
    pack_signs.function(signs, planes=expected)
    planes, whole = side_by_side(count, expected.shape[1], np.uint8, (3,))
    planes_loops.pack_signs(signs, planes=planes.swapaxes(1, 2))
    np.testing.assert_array_equal(planes.swapaxes(1, 2), expected)
    assert_untouched(whole)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 27, SHORT - 1])
@pytest.mark.parametrize("rows", [1, 3, 70, 1500])
def test_short_rows(rng, dtype, mapped, n, rows):
    x = rng.normal(size=(rows, n)).astype(dtype)
    x[0, 0] = np.nan
    x[-1] = np.finfo(dtype).max
    if rows > 5:
        x[1, -1], x[2], x[3], x[4] = np.inf, -0.0, np.finfo(dtype).smallest_subnormal, -2
    bits = rng.integers(0, 7, x.shape).astype(np.uint8) if mapped else np.uint8(6)
    with np.errstate(all="ignore"):
        expected = greedy._level_scales(x, bits, 6)
        code = np.empty(x.shape, np.uint16)
        greedy.codes(x, bits, *expected, code=code)
    scales, packed = np.empty((6, rows, 1), dtype), room_for_signs(6, x.shape)
    greedy_loops.encode_rows(x, bits, 6, scales=scales, signs=packed)
    np.testing.assert_array_equal(scales, expected)
    level = np.arange(6)[:, None, None]
    np.testing.assert_array_equal(signs_of(packed, bits, x.shape) > 0, code >> level & 1)


VIEWS = {
    "axis 1": (lambda x: x, 1),
    "Fortran order": (np.asfortranarray, 0),
    "transposed": (lambda x: x.T, 0),
    "cut": (lambda x: x[1:-2, 3:-4], 1),
    "upside down": (lambda x: x[::-1], 1),
    "mirrored": (lambda x: x[:, ::-1], 1),
    "every other": (lambda x: x[:, ::2], 1),
    "last of four": (lambda x: x.reshape(5, 6, 10, 40), 3),
    "first and last": (lambda x: x.reshape(5, 6, 10, 40), (0, 3)),
    "second of four": (lambda x: x.reshape(5, 60, 8, 5), 1),
}


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("view", VIEWS)
def test_arrays_whose_rows_lie_side_by_side(rng, monkeypatch, view, mapped, long):
    lay_out, axis = VIEWS[view]
    x = lay_out(rng.normal(size=(300, 40)).astype(np.float32))
    bits = rng.integers(0, 5, x.shape) if mapped else 4
    if long:
        monkeypatch.setattr(blocks, "BLOCK", 64)
        monkeypatch.setattr(blocks, "PIECE", 100)
    rows = rows_of(x.shape, axis)
    plain = np.ascontiguousarray(rows.flat(x))
    bits_plain = np.ascontiguousarray(rows.flat(bits)) if mapped else bits
    expected = cubin.multibit(plain, bits_plain, channel_axis=0)
    code = cubin.quantize(plain, bits_plain, channel_axis=0)
    y = cubin.multibit(x, bits, channel_axis=axis)
    np.testing.assert_array_equal(rows.flat(y), expected)
    in_place = x.copy(order="K")
    cubin.multibit(in_place, bits, channel_axis=axis, out=in_place)
    np.testing.assert_array_equal(in_place, y)
    found = cubin.quantize(x, bits, channel_axis=axis)
    np.testing.assert_array_equal(found.scales.reshape(code.scales.shape), code.scales)
    for signs, expected_signs in zip(found.signs, code.signs, strict=True):
        np.testing.assert_array_equal(rows.flat(signs), expected_signs)
    np.testing.assert_array_equal(found.dequantize(), y)


def test_long_rows_side_by_side_share_their_blocks(monkeypatch):
    """A block of one row would read a line of the cache for each of its elements."""
    monkeypatch.setattr(blocks, "BLOCK", 100)
    x, seen = np.ones((300, 64), np.float32), []
    rows = rows_of(x.shape, 1)
    passes.for_each_part(lambda part, x: seen.append(x.shape[0]), rows, x)
    assert min(seen) >= 16
    seen.clear()
    passes.for_each_part(lambda part, x: seen.append(x.shape[0]), rows, x, one_by_one=True)
    assert set(seen) == {1}


@pytest.mark.parametrize("at_once", [1, 2, 3, 50])
@pytest.mark.parametrize("shape", [(4321,), (5, 700), (3, 7, 150), (2, 1500), (9, 100, 2)])
def test_pieces_that_come_together_are_pieces_of_the_row(monkeypatch, shape, at_once):
    monkeypatch.setattr(blocks, "PIECE", 400)
    x = np.arange(np.prod(shape)).reshape(shape)
    alone = [x[tile].ravel() for tile in blocks.tile(shape, 400)]
    found, parts = [], 0
    for numbers, block in passes._pieces(shape, at_once):
        count, parts = numbers.stop - numbers.start, parts + 1
        assert numbers.start == len(found)
        assert 1 <= count <= at_once
        found += list(x[block].reshape(count, -1))
    assert len(found) == len(alone)
    for one, other in zip(found, alone, strict=True):
        np.testing.assert_array_equal(one, other)
    assert at_once == 1 or parts < len(alone) or shape in [(5, 700), (9, 100, 2)]


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("lay_out", [np.asarray, np.asfortranarray, lambda x: x[::-1, ::2]])
@pytest.mark.parametrize("axis", [None, 0])
def test_long_rows_equal_the_bodies(rng, monkeypatch, lay_out, axis, mapped):
    monkeypatch.setattr(blocks, "BLOCK", 256)
    monkeypatch.setattr(blocks, "PIECE", 300)
    x = lay_out(rng.normal(size=(5, 2 * 1703)).astype(np.float32))
    bits = rng.integers(0, 6, x.shape) if mapped else 5
    code = cubin.quantize(x, bits, channel_axis=axis)
    y = cubin.multibit(x, bits, channel_axis=axis)
    with monkeypatch.context() as patched:
        patched.setattr(blocks, "pays", lambda size: False)
        assert cubin.quantize(x, bits, channel_axis=axis) == code
        np.testing.assert_array_equal(cubin.multibit(x, bits, channel_axis=axis), y)
