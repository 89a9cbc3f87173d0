"""Products with packed codes against float64 of what the codes stand for."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cubin
from cubin import BinaryCode, products
from cubin.codes import products as arithmetic
from cubin.codes.planes import pack_signs, sum_planes
from tests.exhaustive import few
from tests.registers import assert_registers_suffice
from tests.test_kernels import ARCHITECTURES

TOLERANCE = {"float16": 1e-3, "float32": 1e-6, "float64": 1e-12}
"""Of the sum of |x| times the largest sum of scales of a row."""


def signs_and_scales(code):
    """The code as float64: what it stands for, and the largest sum of |scale| of a row."""
    scales = code.scales.astype(np.float64)
    wide = BinaryCode.from_signs(
        scales, code.signs, code.bits, channel_axis=code.channel_axis, group_size=code.group_size
    )
    return wide.dequantize(), np.abs(scales).sum(axis=0).max()


def check(found, x, code):
    values, most = signs_and_scales(code)
    expected = x.astype(np.float64) @ values.T
    assert found.dtype == x.dtype
    assert found.shape == expected.shape
    room = TOLERANCE[x.dtype.name] * (np.abs(x.astype(float)).sum(axis=-1) * most)[..., None]
    assert (np.abs(found - expected) <= room).all()


GRANULARITIES = [
    {},
    {"channel_axis": 0},
    {"channel_axis": 1},
    {"channel_axis": (1, 0)},
    {"group_size": 24},
    {"group_size": 3},
    {"group_size": 40},
    {"group_size": 25},
]


@pytest.mark.parametrize("dtype", few(["float16", "float32", "float64"], "float16"))
@pytest.mark.parametrize("given", GRANULARITIES, ids=str)
@pytest.mark.parametrize("mapped", [False, True])
def test_linear(given, mapped, dtype, xp, host, rng):
    w = rng.normal(size=(37, 72)).astype(np.float32)
    bits = rng.integers(0, 4, w.shape) if mapped else 3
    code = cubin.quantize(xp.asarray(w), bits, **given)
    here = code.to_host()
    for shape in [(72,), (1, 72), (2, 3, 72), (9, 72), (0, 72)]:
        x = rng.normal(size=shape).astype(dtype)
        check(host(products.linear(xp.asarray(x), code)), x, here)


@pytest.mark.parametrize("given", [*GRANULARITIES, {"group_size": 12}, {"group_size": 87}], ids=str)
@pytest.mark.parametrize("levels", [1, 2, 5])
@pytest.mark.parametrize("batch", few([1, 9, 40], 1, 40))
def test_linear_in_loops(given, levels, batch, rng, monkeypatch):
    loops = pytest.importorskip("cubin.codes.products_loops")
    from cubin.core.host import blocks

    monkeypatch.setattr(blocks, "pays", lambda size: True)
    monkeypatch.setattr(arithmetic, "LEAST", 100)
    monkeypatch.setattr(loops, "STEPS", 1)
    monkeypatch.setattr(loops, "_TOTALS", 1)  # a few rows at a time
    monkeypatch.setattr(blocks, "_workers", lambda: 3)
    monkeypatch.setattr(blocks, "SHARE", 1)
    if batch < 40:
        monkeypatch.setattr(loops, "by_lines", lambda x, decoding: loops.multiply_lines)
    w = rng.normal(size=(333, 24 * 29)).astype(np.float32)
    bits = levels if levels < 5 else rng.integers(0, 4, w.shape)
    code = cubin.quantize(w, bits, **given)
    for dtype in (np.float16, np.float32, np.float64):
        x = rng.normal(size=(batch, w.shape[1])).astype(dtype)
        check(products.linear(x, code), x, code)
    for part in (code[17:200], code[3:17], code[4:5]):
        check(products.linear(x, part), x, part)


@pytest.mark.parametrize("given", [{}, {"channel_axis": 0}, {"group_size": 12}], ids=str)
@pytest.mark.parametrize("mapped", [False, True])
def test_lines_have_the_same_bits_in_any_part(given, mapped, rng, monkeypatch):
    """Registers hold several lines; a few lines are looked up one by one."""
    loops = pytest.importorskip("cubin.codes.products_loops")
    from cubin.core.host import blocks

    monkeypatch.setattr(blocks, "pays", lambda size: True)
    monkeypatch.setattr(loops, "by_lines", lambda x, decoding: loops.multiply_lines)
    w = rng.normal(size=(75, 12 * 43)).astype(np.float32)
    code = cubin.quantize(w, rng.integers(0, 4, w.shape) if mapped else 3, **given)
    for dtype in (np.float32, np.float64):
        x = rng.normal(size=(2, w.shape[1])).astype(dtype)
        whole = products.linear(x, code)
        for cut in (slice(0, 16), slice(3, 50), slice(60, 75), slice(7, 9)):
            np.testing.assert_array_equal(products.linear(x, code[cut]), whole[:, cut])


DECODED = [(1, 8), (15, 13), (16, 512), (17, 24), (47, 520), (49, 1032), (333, 72), (1101, 40)]
"""Lines, which fill registers and tiles or do not, and elements, which fill chunks or do not."""


@pytest.mark.parametrize("shape", DECODED, ids=str)
@pytest.mark.parametrize("given", [{}, {"channel_axis": 0}, {"group_size": 8}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_decoded_tiles(shape, given, dtype, rng, monkeypatch):
    loops = pytest.importorskip("cubin.codes.products_loops")
    if not loops._FUSED:
        pytest.skip("this processor does not multiply and add at once")
    if given.get("group_size") and shape[1] % 8:
        given = {"group_size": shape[1]}
    monkeypatch.setattr(loops, "_ROWS", 16)
    code = cubin.quantize(rng.normal(size=shape).astype(dtype), 3, **given)
    scales = code.scales.reshape(3, len(code.scales[0]) if given else 1, -1)
    x = rng.normal(size=(37, shape[1])).astype(dtype)
    whole = np.full((37, shape[0]), np.nan, dtype)
    for levels in (1, 3):
        loops.multiply_decoded(code.planes, np.uint8(levels), scales, x, y=whole)
        check(whole, x, code.truncate(levels))
    # Neither other lines nor other rows change a bit.
    lines, rows = slice(shape[0] // 3, shape[0] - shape[0] // 4), slice(1, 10)
    of_lines = scales if scales.shape[1] == 1 else scales[:, lines]
    part = np.full(whole.shape, np.nan, dtype)[rows, lines]
    loops.multiply_decoded(code.planes[..., lines], np.uint8(3), of_lines, x[rows], y=part)
    np.testing.assert_array_equal(part, whole[rows, lines])
    x[3, 0], x[5, -1] = np.nan, np.inf
    found = np.empty_like(whole)
    loops.multiply_decoded(code.planes, np.uint8(3), scales, x, y=found)
    assert not np.isfinite(found[[3, 5]]).any()
    others = np.delete(np.arange(37), [3, 5])
    np.testing.assert_array_equal(found[others], whole[others])


BYTES = [{}, {"channel_axis": 0}, {"group_size": 24}, {"group_size": 40}]
"""Granularities whose runs begin at bytes."""


@pytest.mark.parametrize("given", BYTES, ids=str)
@pytest.mark.parametrize("form", ["looked up", "looked up, map", "decoded"])
@pytest.mark.parametrize("shape", [(40, 150), (150, 40)], ids=str)
def test_threads_share_lines_or_rows(shape, given, form, rng, monkeypatch):
    loops = pytest.importorskip("cubin.codes.products_loops")
    from cubin.core.host import blocks

    if form == "decoded" and not loops._FUSED:
        pytest.skip("this processor does not multiply and add at once")
    multiply = loops.multiply_decoded if form == "decoded" else loops.multiply_lines
    monkeypatch.setattr(loops, "by_lines", lambda x, decoding: multiply)
    monkeypatch.setattr(blocks, "pays", lambda size: True)
    monkeypatch.setattr(arithmetic, "LEAST", 8)
    monkeypatch.setattr(loops, "STEPS", 1)
    monkeypatch.setattr(blocks, "SHARE", 1)
    w = rng.normal(size=(shape[0], 24 * 29)).astype(np.float32)
    bits = rng.integers(0, 3, w.shape) if form == "looked up, map" else 3
    code = cubin.quantize(w, bits, **given)
    x = rng.normal(size=(shape[1], w.shape[1])).astype(np.float32)
    found = []
    for workers in (1, 3):
        monkeypatch.setattr(blocks, "_workers", lambda workers=workers: workers)
        found.append(products.linear(x, code))
    check(found[0], x, code)
    np.testing.assert_array_equal(*found)


def test_many_rows_are_looked_up_decoded_or_left_to_blas(rng, monkeypatch):
    loops = pytest.importorskip("cubin.codes.products_loops")
    from cubin.codes.binary_code import decoding_of

    monkeypatch.setattr(loops, "REGISTER", 64)
    monkeypatch.setattr(loops, "_FUSED", True)
    w = rng.normal(size=(4096, 24)).astype(np.float32)

    def chosen(rows, bits, **given):
        x = np.empty((rows, 24), np.float32)
        return loops.by_lines(x, decoding_of(cubin.quantize(w, bits, **given)))

    few, many = loops.multiply_lines, loops.multiply_decoded
    assert [chosen(200, 1), chosen(8, 2), chosen(4, 4)] == [few] * 3
    assert [chosen(500, 1), chosen(32, 2), chosen(8, 4, group_size=8)] == [many] * 3
    bits = rng.integers(0, 3, w.shape)
    assert [chosen(8, bits), chosen(64, bits)] == [few, None]
    assert chosen(64, 2, group_size=12) is chosen(64, 2, channel_axis=1) is None
    monkeypatch.setattr(loops, "_FUSED", False)
    assert chosen(500, 2) is None


@settings(max_examples=60)
@given(data=st.data())
def test_products_of_every_shape(data):
    m, n, b = (
        data.draw(st.integers(1, most), name) for name, most in zip("mnb", (40, 70, 5), strict=True)
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    groups = [{"group_size": size} for size in range(1, n + 2)]
    kinds = [{}, {"channel_axis": 0}, {"channel_axis": 1}, *groups]
    of_w, of_x = (data.draw(st.sampled_from(kinds), name) for name in ("w", "x"))
    bits = data.draw(st.sampled_from([0, 1, 2, 3, rng.integers(0, 4, (m, n))]), "bits")
    code = cubin.quantize(rng.normal(size=(m, n)), bits, **of_w)
    values = code.dequantize()
    x, left = rng.normal(size=(b, n)), rng.normal(size=(b, m))
    np.testing.assert_allclose(products.linear(x, code), x @ values.T, atol=1e-11)
    np.testing.assert_allclose(code @ x.T, values @ x.T, atol=1e-11)
    np.testing.assert_allclose(left @ code, left @ values, atol=1e-11)
    bits_of_x = data.draw(st.sampled_from([1, 2, rng.integers(0, 3, (b, n))]), "bits of x")
    coded = cubin.quantize(x, bits_of_x, **of_x)
    found = products.linear(coded, code)
    np.testing.assert_allclose(found, coded.dequantize() @ values.T, atol=1e-11)


@pytest.mark.parametrize(
    "given", [{}, {"channel_axis": 0}, *({"group_size": size} for size in (8, 6, 64, 50))]
)
@pytest.mark.parametrize("mapped", [False, True])
def test_products_of_codes_are_exact(given, mapped, xp, host, rng):
    """With scales that are powers of two, integers."""

    def coded(shape):
        bits = rng.integers(0, 3, shape) if mapped else 2
        signs = rng.choice(np.array([-1, 1], np.int8), (2, *shape))
        signs *= np.greater(bits, np.arange(2)[:, None, None])
        like = cubin.quantize(np.ones(shape, np.float32), bits, **given)
        scales = 2.0 ** rng.integers(-3, 4, like.scales.shape).astype(np.float32)
        return signs, BinaryCode.from_signs(
            xp.asarray(scales), xp.asarray(signs), xp.asarray(bits) if mapped else bits, **given
        )

    (_, one), (_, other) = coded((5, 168)), coded((40, 168))
    found = host(products.linear(one, other))
    values = [host(code.dequantize()).astype(np.float64) for code in (one, other)]
    np.testing.assert_array_equal(found, values[0] @ values[1].T)


@pytest.mark.parametrize("given", [{}, {"channel_axis": 0}, {"group_size": 64}], ids=str)
@pytest.mark.parametrize("mapped", [False, True])
def test_products_of_codes_in_blocks(given, mapped, rng, monkeypatch):
    """Some rows at a time, and lines by threads: each has the bits that it has alone."""
    from cubin.core.host import blocks

    shape = (300, 192)
    one = cubin.quantize(rng.normal(size=(50, 192)), 2, **given)
    bits = rng.integers(0, 3, shape) if mapped else 2
    other = cubin.quantize(rng.normal(size=shape), bits, **given)
    whole = products.linear(one, other)
    np.testing.assert_allclose(whole, one.dequantize() @ other.dequantize().T, atol=1e-11)
    monkeypatch.setattr(blocks, "BLOCK", 2000)
    monkeypatch.setattr(blocks, "SHARE", 1)
    monkeypatch.setattr(blocks, "_workers", lambda: 2)
    np.testing.assert_array_equal(products.linear(one, other), whole)
    np.testing.assert_array_equal(products.linear(one[7:9], other), whole[7:9])


@pytest.mark.parametrize("width", [0, 1, 5, 8, 19])
def test_counts_in_loops(width, rng):
    loops = pytest.importorskip("cubin.codes.products_loops")
    a, b = (rng.integers(0, 2**63, (n, width)).astype(np.uint64) for n in (3, 130))
    expected = np.array([[sum(int(v ^ w).bit_count() for v, w in zip(p, q, strict=True)) for q in b]
                         for p in a])  # fmt: skip
    for count in (arithmetic.count_unequal, loops.count_unequal):
        counts = np.empty((3, 130), np.int32)
        count(a, b, counts=counts)
        np.testing.assert_array_equal(counts, expected)


def test_rows_that_are_not_finite(xp, host, rng):
    code = cubin.quantize(xp.asarray(rng.normal(size=(6, 33)).astype(np.float32)), 2)
    x = rng.normal(size=(4, 33)).astype(np.float32)
    clean = host(products.linear(xp.asarray(x), code))
    x[1, 3], x[2, 32] = np.nan, np.inf
    found = host(products.linear(xp.asarray(x), code))
    assert not np.isfinite(found[1:3]).any()
    np.testing.assert_array_equal(found[[0, 3]], clean[[0, 3]])


def test_rows_that_are_not_finite_in_loops(rng):
    loops = pytest.importorskip("cubin.codes.products_loops")
    code = cubin.quantize(rng.normal(size=(6, 33)).astype(np.float32), 2)
    x = rng.normal(size=(4, 33)).astype(np.float32)
    scales = np.ascontiguousarray(code.scales[:, None, None])
    clean, found = np.empty((2, 4, 6), np.float32)
    loops.multiply_lines(code.planes, np.uint8(2), scales, x, y=clean)
    x[1, 3], x[2, 32] = np.nan, np.inf
    loops.multiply_lines(code.planes, np.uint8(2), scales, x, y=found)
    assert not np.isfinite(found[1:3]).any()
    np.testing.assert_array_equal(found[[0, 3]], clean[[0, 3]])


def convolved(x, w, strides, paddings, groups):
    """The definition, in float64."""
    (down, right), (above, beside) = strides, paddings
    b, c, h, v = x.shape
    m, per_group, kh, kw = w.shape
    padded = np.zeros((b, c, h + 2 * above, v + 2 * beside))
    padded[:, :, above : above + h, beside : beside + v] = x
    size = ((padded.shape[2] - kh) // down + 1, (padded.shape[3] - kw) // right + 1)
    y = np.zeros((b, m, *size))
    for o, i, j in itertools.product(range(m), *map(range, size)):
        first = o // (m // groups) * per_group
        seen = padded[:, first : first + per_group,
                      down * i : down * i + kh, right * j : right * j + kw]  # fmt: skip
        y[:, o, i, j] = (seen * w[o]).sum(axis=(1, 2, 3))
    return y


CONVOLUTIONS = [
    ((2, 3, 5, 6), (4, 3, 3, 3), 1, 0, 1),
    ((2, 4, 5, 7), (6, 2, 3, 2), (2, 1), (1, 2), 2),
    ((1, 3, 4, 4), (3, 1, 1, 1), 3, 0, 3),
    ((2, 2, 3, 3), (1, 2, 5, 5), 1, 1, 1),
]


@pytest.mark.parametrize(("shape", "kernels", "stride", "padding", "groups"), CONVOLUTIONS)
@pytest.mark.parametrize("mapped", [False, True])
def test_convolutions(shape, kernels, stride, padding, groups, mapped, xp, host, rng):
    w = rng.normal(size=kernels).astype(np.float32)
    bits = rng.integers(0, 3, kernels) if mapped else 2
    code = cubin.quantize(xp.asarray(w), bits, channel_axis=0)
    pairs = [value if isinstance(value, tuple) else (value, value) for value in (stride, padding)]
    x = rng.normal(size=shape).astype(np.float32)
    for of_x in (None, {}, {"channel_axis": 0}):
        images = xp.asarray(x) if of_x is None else cubin.quantize(xp.asarray(x), 2, **of_x)
        floats = x if of_x is None else host(images.dequantize())
        expected = convolved(floats, host(code.dequantize()).astype(float), *pairs, groups)
        found = products.conv2d(images, code, stride, padding, groups)
        assert found.dtype == np.float32
        np.testing.assert_allclose(host(found), expected, atol=2e-5)


@pytest.mark.parametrize(("shape", "kernels", "stride", "padding", "groups"), CONVOLUTIONS)
def test_gradients_of_convolutions(shape, kernels, stride, padding, groups, xp, host, rng):
    """The sums of images times gradients are those of results times their gradients."""
    w = rng.normal(size=kernels)
    code = cubin.quantize(xp.asarray(w.astype(np.float32)), rng.integers(0, 3, kernels))
    pairs = [value if isinstance(value, tuple) else (value, value) for value in (stride, padding)]
    values = host(code.dequantize()).astype(np.float64)
    for dtype in (np.float16, np.float32):
        x = rng.normal(size=shape)
        y = convolved(x, values, *pairs, groups)
        g = rng.normal(size=y.shape).astype(dtype)
        found = host(products.conv2d_grad(xp.asarray(g), code, shape, stride, padding, groups))
        assert (found.dtype, found.shape) == (dtype, shape)
        room = 1e-2 if dtype == np.float16 else 1e-4
        assert abs((found * x).sum() - (g * y).sum()) <= room * np.abs(g).sum()
        # Each element by itself: the result of an image of zeros but for one.
        for at in rng.integers(0, x.size, 3):
            one = np.zeros(x.size)
            one[at] = 1
            expected = (g * convolved(one.reshape(shape), values, *pairs, groups)).sum()
            assert abs(found.flat[at] - expected) <= room * max(1, abs(expected))


def test_a_padded_position_is_zero_and_not_minus_one(xp, host):
    x = cubin.quantize(xp.ones((1, 1, 1, 1)), 1)
    code = cubin.quantize(xp.ones((1, 1, 3, 3)), 1)
    np.testing.assert_array_equal(host(products.conv2d(x, code, padding=1)), [[[[1]]]])


def test_arguments(xp, rng):
    code = cubin.quantize(xp.asarray(rng.normal(size=(3, 4))), 1)
    x = xp.ones((2, 4))
    with pytest.raises(TypeError, match="code must be a BinaryCode, got int"):
        products.linear(x, 1)
    with pytest.raises(TypeError, match="x must be float16"):
        products.linear(x.astype(int), code)
    with pytest.raises(ValueError, match="0-d"):
        products.linear(xp.asarray(np.float32(1)), code)
    with pytest.raises(ValueError, match="4 elements on its last axis"):
        products.linear(xp.ones((4, 2)), code)
    for shape in [(), (4,), (3, 4, 1)]:
        other = cubin.quantize(xp.ones(shape), 1)
        with pytest.raises(ValueError, match=r"code must have the shape \(m, n\)"):
            products.linear(x, other)
        with pytest.raises(ValueError, match=r"x must have the shape \(m, n\)"):
            products.linear(other, code)
        with pytest.raises(ValueError, match="rank 2 has products"):
            _ = other @ xp.ones(4)
    with pytest.raises(ValueError, match="4 elements on its last axis"):
        products.linear(cubin.quantize(xp.ones((2, 5)), 1), code)
    for wrong in (xp.ones(3), xp.ones((4, 2, 1)), xp.asarray(np.ones(()))):
        with pytest.raises(ValueError, match="does not fit a code"):
            _ = code @ wrong
    with pytest.raises(ValueError, match="does not fit a code"):
        _ = xp.ones((2, 4)) @ code


def test_arguments_of_convolutions(xp):
    x, code = xp.ones((1, 4, 3, 3)), cubin.quantize(xp.ones((2, 2, 3, 3)), 1)
    assert products.conv2d(x, code, groups=2).shape == (1, 2, 1, 1)
    for options, match in [
        ({}, "groups=1 does not fit"),
        ({"groups": 0}, "groups=0"),
        ({"groups": 4}, "groups=4"),
        ({"groups": 2, "stride": 0}, "stride must be one or two integers of at least 1"),
        ({"groups": 2, "padding": (1, 1, 1)}, "padding must be one or two integers"),
        ({"groups": 2, "padding": -1}, "padding"),
    ]:
        with pytest.raises(ValueError, match=match):
            products.conv2d(x, code, **options)
    with pytest.raises(TypeError, match="stride"):
        products.conv2d(x, code, stride=1.0, groups=2)
    with pytest.raises(ValueError, match="rank 4"):
        products.conv2d(xp.ones((4, 3, 3)), code, groups=2)
    with pytest.raises(ValueError, match="larger than"):
        products.conv2d(x[:, :, :2], code, groups=2)
    with pytest.raises(ValueError, match="for all images or for each image"):
        products.conv2d(cubin.quantize(x, 1, channel_axis=1), code, groups=2)
    with pytest.raises(TypeError, match="code must be"):
        products.conv2d(x, x)


@pytest.mark.kernels
def test_mixed_libraries(device):
    code, x = cubin.quantize(device.ones((3, 4)), 1), np.ones((2, 4))
    with pytest.raises(TypeError, match="NumPy and CuPy"):
        products.linear(x, code)
    with pytest.raises(TypeError, match="NumPy and CuPy"):
        _ = code @ x.T
    with pytest.raises(TypeError, match="NumPy and CuPy"):
        products.linear(cubin.quantize(x, 1), code)


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("dtype", "at_once", "template"),
    [("float32", 8, "float, false, 8, 8"), ("float64", 4, "double, false, 4, 8")],
)
def test_bytes_of_products(dtype, at_once, template, device, rng):
    """A block reads a plane once for its rows, a bit a weight; x once for every 32 lines."""
    ptx = pytest.importorskip("tests.ptx")
    w = rng.normal(size=(64, 512)).astype(dtype)
    code = cubin.quantize(device.asarray(w), 2, channel_axis=0)
    x = device.asarray(rng.normal(size=(2 * at_once, 512)).astype(dtype))
    scales = 16 * code.scales.nbytes  # once for each strip of a line, of 512 / 32
    read = {}
    for rows in (1, at_once, 2 * at_once):
        with ptx.launches() as launches:
            products.linear(x[:rows], code)
        (launch,) = launches
        assert launch.read_unique == code.planes.nbytes + code.scales.nbytes + x[:rows].nbytes
        assert launch.written == launch.written_unique == rows * 64 * x.itemsize
        read[rows] = launch.read
    assert launch.kernel == f"cubin_multiply_lines<{template}>"
    for rows, tiles in ((1, 1), (at_once, 1), (2 * at_once, 2)):
        of_x = 2 * x[:rows].nbytes
        assert read[rows] == tiles * (code.planes.nbytes + scales) + of_x


ROWS = {"float32": [1, 2, 3, 8, 13], "float64": [1, 2, 3, 9]}
"""Rows of x for which the kernel differs, and some that do not fill their blocks."""


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", few(ROWS, "float32"))
@pytest.mark.parametrize("given", [{}, *({"group_size": size} for size in (3, 25, 64))], ids=str)
@pytest.mark.parametrize("mapped", [False, True])
def test_a_row_has_the_same_bits_in_any_batch(given, mapped, dtype, device, host, rng):
    w = rng.normal(size=(35, 650)).astype(dtype)
    bits = rng.integers(0, 3, w.shape) if mapped else 2
    code = cubin.quantize(device.asarray(w), bits, **given)
    x = rng.normal(size=(13, 650)).astype(dtype)
    most = host(products.linear(device.asarray(x), code))
    check(most, x, code.to_host())
    for rows in ROWS[dtype]:
        found = host(products.linear(device.asarray(x[13 - rows :]), code))
        np.testing.assert_array_equal(found, most[13 - rows :])


def test_the_scale_of_a_level_without_elements(xp, host, rng):
    """It may be NaN, and counts for nothing."""
    bits = np.ones((33, 40), np.uint8)
    bits[7] = 2
    code = cubin.quantize(xp.asarray(rng.normal(size=bits.shape)), bits, channel_axis=0)
    scales = host(code.scales).copy()
    scales[1, bits[:, 0] < 2] = np.nan
    holes = BinaryCode.from_signs(xp.asarray(scales), code.signs, bits, channel_axis=0)
    x = xp.asarray(rng.normal(size=(3, 40)))
    np.testing.assert_array_equal(host(products.linear(x, holes)), host(products.linear(x, code)))


KERNELS = [
    (pack_signs, [(256,)], 1024),
    (sum_planes, [("float16", "float", "true"), ("float", "float", "false"),
                  ("double", "double", "true")], 1024),
    (arithmetic.multiply_lines, [("float", "false", 8, 8), ("float", "false", 2, 32),
                                 ("float", "true", 2, 32), ("double", "true", 1, 32)], 1024),
    (arithmetic.multiply_lines, [("float", "true", 8, 8), ("double", "false", 4, 8),
                                 ("double", "true", 4, 8)], 512),
    (arithmetic.count_unequal, [(16,)], 1024),
]  # fmt: skip


@pytest.mark.kernels
@pytest.mark.parametrize("arch", few(ARCHITECTURES, "sm_90"))
@pytest.mark.parametrize(
    ("primitive", "templates", "threads"), KERNELS, ids=lambda value: getattr(value, "name", "")
)
def test_registers_suffice(primitive, templates, threads, arch, device, monkeypatch):
    names = [primitive.name_of(template) for template in templates]
    assert_registers_suffice(arch, device, monkeypatch, primitive.source, names, threads)


@pytest.mark.parametrize(
    "given",
    [{"channel_axis": 0}, {"channel_axis": 1}, {}, {"group_size": 128}, {"group_size": 100}],
)
def test_signs_are_never_unpacked_as_a_whole(given, rng):
    """Making, decoding and multiplying a code takes a fraction of an int8 for each sign."""
    x = rng.normal(size=(1024, 2048)).astype(np.float32)
    v = np.ones((40, 2048), np.float32)
    code = cubin.quantize(x, 8, **given)
    some = cubin.quantize(x, np.arange(2048, dtype=np.int8) % 3, **given)
    results = {
        "quantize": (lambda: cubin.quantize(x, 8, **given), code.nbytes),
        "dequantize": (code.dequantize, x.nbytes),
        "linear": (lambda: products.linear(v, code), 0),
        "one row": (lambda: products.linear(v[0], code), 0),
        "one row, map": (lambda: products.linear(v[0], some), 0),
    }
    for compute, nbytes in results.values():
        compute()
        cubin.memory.release()
        tracemalloc.start()
        compute()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < nbytes + 9.5e6 < nbytes + 8 * x.size


@pytest.mark.parametrize(
    "given", [*GRANULARITIES, {"group_size": 12}, {"channel_axis": 0, "shift": True}], ids=str
)
def test_lines_side_by_side_are_decoded_to_the_same_bits(given, rng, monkeypatch):
    pytest.importorskip("numba")
    from cubin.codes import planes_loops
    from cubin.codes.binary_code import decoding_of
    from cubin.core.host import blocks

    monkeypatch.setattr(blocks, "pays", lambda size: True)
    for shape, bits in [((130, 72), 3), ((16, 24), 1), ((20, 24), rng.integers(0, 4, (20, 24)))]:
        for dtype in (np.float16, np.float32, np.float64):
            code = cubin.quantize(rng.normal(size=shape).astype(dtype), bits, **given)
            decoding = decoding_of(code)
            columns = np.full(shape[::-1], np.nan, dtype).T
            decoding.write_all(columns)
            np.testing.assert_array_equal(columns, code.dequantize())
            part = np.full((50, 24), np.nan, dtype).T
            decoding.part(slice(2, 15)).write(part[:13, :16], slice(0, 13), slice(0, 16))
            np.testing.assert_array_equal(part[:13, :16], code.dequantize()[2:15, :16])
    assert planes_loops._sum_columns.signatures
