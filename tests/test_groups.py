"""Groups that do not divide the last axis: the last one of each line of that axis is shorter."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cubin
from cubin import BinaryCode, products
from cubin.core import passes
from cubin.core.rows import rows_of
from tests import reference
from tests.exhaustive import few

SOLVERS = ["greedy", "refined", "alternating", "optimal"]
FLOATS = ["float16", "bfloat16", "float32", "float64"]
SHAPES = [
    ((7,), 4),
    ((5, 13), 4),
    ((5, 13), 8),  # the shorter groups begin at a byte
    ((3, 4, 21), 8),
    ((3, 2, 24), 16),  # all groups fill bytes
    ((2, 3, 2, 5), 3),
    ((2, 0, 5), 3),
    ((0, 5), 3),
]


def same(found, expected):
    np.testing.assert_array_equal(reference.plain(found), reference.plain(expected))


def cut_of(shape, group):
    return shape[-1] // group * group


@pytest.mark.parametrize(("shape", "group"), SHAPES)
@pytest.mark.parametrize("solver", few(SOLVERS, "greedy", "alternating"))
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("dtype", few(FLOATS, "float32"))
def test_both_parts_are_as_arrays_of_their_own(xp, host, rng, shape, group, solver, mapped, dtype):
    x = rng.normal(size=shape).astype(dtype)
    bits = rng.integers(0, 4, shape) if mapped else 3
    weights = None if solver == "greedy" else rng.uniform(0.5, 2, shape).astype(dtype)

    def part(array, cut):
        return array if array is None or np.ndim(array) == 0 else xp.asarray(array[..., cut])

    every = slice(None)
    options = {"solver": solver, "iterations": 1}
    y = cubin.multibit(part(x, every), part(bits, every), group_size=group,
                       importance=part(weights, every), **options)  # fmt: skip
    code = cubin.quantize(part(x, every), part(bits, every), group_size=group,
                          importance=part(weights, every), **options)  # fmt: skip
    same(host(y), host(code.dequantize()))
    cut, groups = cut_of(shape, group), shape[-1] // group
    assert code.scales.shape[1:] == (*shape[:-1], groups + 1)
    for own, of_groups, size in (
        (slice(0, cut), slice(0, groups), group),
        (slice(cut, None), slice(groups, None), shape[-1] - cut),
    ):
        given = {"group_size": size, "importance": part(weights, own), **options}
        alone = cubin.quantize(part(x, own), part(bits, own), **given)
        levels = len(alone.scales)
        same(host(y)[..., own], host(cubin.multibit(part(x, own), part(bits, own), **given)))
        same(host(code.scales)[:levels, ..., of_groups], host(alone.scales))
        assert not host(code.scales)[levels:, ..., of_groups].any()
        same(host(code.signs)[:levels, ..., own], host(alone.signs))
        assert not host(code.signs)[levels:, ..., own].any()


@pytest.mark.parametrize("shape", [(), (13,), (5, 1), (1, 13), (1, 1)])
def test_maps_and_importance_that_broadcast(xp, host, rng, shape):
    x = xp.asarray(rng.normal(size=(5, 13)))
    bits, weights = xp.asarray(rng.integers(0, 4, shape)), xp.asarray(rng.uniform(0.5, 2, shape))
    spread = [xp.asarray(np.broadcast_to(host(a), (5, 13)).copy()) for a in (bits, weights)]
    options = {"group_size": 4, "solver": "refined"}
    expected = cubin.multibit(x, spread[0], importance=spread[1], **options)
    same(host(cubin.multibit(x, bits, importance=weights, **options)), host(expected))
    code = cubin.quantize(x, bits, importance=weights, **options)
    same(host(code.dequantize()), host(expected))
    assert np.shape(code.bits) == shape
    v = xp.asarray(rng.normal(size=(3, 13)))
    np.testing.assert_allclose(
        host(products.linear(v, code)), host(v) @ host(expected).T, atol=1e-12
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_group_that_is_larger_than_the_axis_is_all_of_it(xp, host, rng, solver):
    x = xp.asarray(rng.normal(size=(3, 2, 5)))
    code = cubin.quantize(x, 2, group_size=9, solver=solver)
    whole = cubin.quantize(x, 2, group_size=5, solver=solver)
    assert code.scales.shape == (2, 3, 2, 1)
    assert (code.group_size, whole.group_size) == (9, 5)
    same(host(code.scales), host(whole.scales))
    same(host(code.planes), host(whole.planes))
    same(host(cubin.multibit(x, 2, group_size=9, solver=solver)), host(code.dequantize()))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("group", few(range(1, 15), 1, 3, 5, 8, 13, 14))
def test_scales_by_loops_over_lines_and_groups(xp, host, rng, dtype, group):
    x = rng.normal(size=(3, 2, 13)).astype(dtype)
    code = cubin.quantize(xp.asarray(x), 1, group_size=group)
    for line in np.ndindex(3, 2):
        means = [np.abs(x[line][at : at + group].astype(np.float64)).mean()
                 for at in range(0, 13, group)]  # fmt: skip
        np.testing.assert_allclose(host(code.scales)[(0, *line)], means, rtol=1e-6)


def test_lines_are_joined_in_blocks(xp, host, rng, monkeypatch):
    x = xp.asarray(rng.normal(size=(50, 2, 13)))
    expected = cubin.quantize(x, 2, group_size=4)
    monkeypatch.setattr(passes, "LINES_AT_ONCE", 3 * 26)
    found = cubin.quantize(x, 2, group_size=4)
    same(host(found.planes), host(expected.planes))
    packed = np.packbits(host(expected.signs).reshape(2, 50, 26) > 0, axis=2, bitorder="little")
    same(host(found.planes), packed.transpose(0, 2, 1))


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("options", "kernel"),
    [({}, "approximate_rows"), ({"solver": "alternating"}, "reconstruct_rows")],
)
@pytest.mark.parametrize("mapped", [False, True])
def test_two_launches(device, rng, options, kernel, mapped):
    ptx = pytest.importorskip("tests.ptx")
    x = device.asarray(rng.normal(size=(6, 40)).astype(np.float32))
    bits = device.asarray(rng.integers(0, 3, (6, 40)).astype(np.uint8)) if mapped else 2
    with ptx.launches() as launches:
        cubin.multibit(x, bits, group_size=16, **options)
    assert [kernel in one.kernel for one in launches] == [True, True]
    with ptx.launches() as launches:
        cubin.multibit_grad(x, bits, x, group_size=16)
    assert len(launches) == 1  # which does not look at groups
    code = cubin.quantize(x, 2, group_size=16)
    with ptx.launches() as launches:
        products.linear(x[:2], code)
    assert ["multiply_lines" in one.kernel for one in launches].count(True) == 2
    with ptx.launches() as launches:
        code.dequantize()
    assert ["sum_planes" in one.kernel for one in launches].count(True) == 1


@pytest.mark.parametrize("view", [lambda a: a[::-1, ::2], lambda a: a.T, lambda a: a[:, 1:]])
def test_views_and_results_in_place(xp, host, rng, view):
    base = rng.normal(size=(10, 13)).astype(np.float32)
    held = view(xp.asarray(base))
    expected = host(cubin.multibit(held.copy(), 2, group_size=4))
    same(host(cubin.multibit(held, 2, group_size=4)), expected)
    assert cubin.multibit(held, 2, group_size=4, out=held) is held
    same(host(held), expected)


def test_an_out_that_overlaps_shifted(rng):
    base = rng.normal(size=(4, 14))
    expected = cubin.multibit(base[:, :-1].copy(), 2, group_size=4)
    cubin.multibit(base[:, :-1], 2, group_size=4, out=base[:, 1:])
    same(base[:, 1:], expected)


def test_nan_stays_in_its_group(xp, host, rng):
    x = rng.normal(size=(3, 13))
    clean = cubin.multibit(x, 2, group_size=4)
    x[1, 12], x[2, 3] = np.nan, np.inf
    y = host(cubin.multibit(xp.asarray(x), 2, group_size=4))
    touched = np.zeros(x.shape, bool)
    touched[1, 12:] = touched[2, :4] = True
    assert not np.isfinite(y[touched]).any()
    np.testing.assert_allclose(y[~touched], clean[~touched], rtol=1e-12)
    with pytest.raises(ValueError, match=r"row \(1, 3\) of its 12 rows"):
        cubin.quantize(xp.asarray(x), 2, group_size=4)


@pytest.mark.parametrize("shape", [(4, 13), (4, 3, 7), (21,)])
def test_blocks_of_long_lines_are_decoded_as_the_whole(shape, rng, monkeypatch):
    from cubin.core.host import blocks

    code = cubin.quantize(rng.normal(size=shape), 2, group_size=5)
    expected = code.dequantize()
    monkeypatch.setattr(blocks, "BLOCK", 8)
    same(code.dequantize(), expected)


def test_slices_and_levels(xp, host, rng):
    x = xp.asarray(rng.normal(size=(6, 3, 7)))
    code = cubin.quantize(x, 3, group_size=4)
    assert code[2:5] == cubin.quantize(x[2:5], 3, group_size=4)
    same(host(code[2:5].dequantize()), host(code.dequantize())[2:5])
    assert code.truncate(2) == cubin.quantize(x, 2, group_size=4)
    assert "per group of 4, the last of 3, 36 per level" in repr(code)
    means = np.abs(host(x)[..., 4:]).mean(axis=-1)
    np.testing.assert_allclose(host(code.scales)[0, ..., 1], means, rtol=1e-12)


def test_groups_of_other_sizes_are_not_equal():
    signs = np.ones((1, 2, 5), np.int8)
    codes = [BinaryCode.from_signs(np.ones((1, 2, 2)), signs, 1, group_size=g) for g in (3, 4)]
    assert codes[0] != codes[1]
    assert codes[0] == codes[0].truncate(1)


def test_the_constructor_wants_a_scale_for_the_shorter_group():
    planes = np.zeros((1, 1, 2), np.uint8)
    code = BinaryCode(np.ones((1, 2, 2)), planes, 1, shape=(2, 5), group_size=3)
    same(code.dequantize(), -np.ones((2, 5)))
    with pytest.raises(ValueError, match=r"need \(1, 2, 2\)"):
        BinaryCode(np.ones((1, 2, 1)), planes, 1, shape=(2, 5), group_size=3)


def test_effective_bits_count_the_shorter_groups():
    x = np.ones((5, 13), np.float32)
    code = cubin.quantize(x, 2, group_size=4)
    assert code.effective_bits == pytest.approx(2 + 2 * 20 * 32 / 65)
    assert code.nbytes == code.planes.nbytes + 4 * 2 * 20
    bits = np.zeros((5, 13), int)
    bits[0, 12], bits[1, 0] = 2, 1  # two levels of a shorter group, and one of a whole one
    share = np.array([63, 1, 1]) / 65
    entropy = -(share * np.log2(share)).sum()
    code = cubin.quantize(x, bits, group_size=4)
    assert code.effective_bits == pytest.approx(3 / 65 + entropy + 3 * 32 / 65)


@pytest.mark.parametrize("name", ["code.npz", "code.safetensors"])
@pytest.mark.parametrize("mapped", [False, True])
def test_files_of_a_million_elements(tmp_path, rng, name, mapped):
    x = rng.standard_normal((999, 1003), np.float32)
    bits = rng.integers(0, 4, x.shape) if mapped else 2
    code = cubin.quantize(x, bits, group_size=64)
    path = tmp_path / name
    code.save(path)
    loaded = BinaryCode.load(path)
    assert loaded == code
    assert loaded.group_size == 64
    file_bits = 8 * path.stat().st_size / x.size
    assert file_bits == pytest.approx(code.effective_bits, rel=0.05)
    same(loaded.dequantize(), cubin.multibit(x, bits, group_size=64))


def test_products_of_kernels(xp, host, rng):
    w, images = rng.normal(size=(4, 2, 3, 3)), rng.normal(size=(3, 2, 6, 6))
    kernels = cubin.quantize(xp.asarray(w), 2, group_size=2)
    coded = cubin.quantize(xp.asarray(images), 2, channel_axis=0)
    same_values = cubin.quantize(kernels.dequantize(), 1, channel_axis=(0, 1, 2, 3))
    for x in (xp.asarray(images), coded):
        found, expected = (products.conv2d(x, code, padding=1) for code in (kernels, same_values))
        np.testing.assert_allclose(host(found), host(expected), atol=1e-12)


@pytest.mark.parametrize("sizes", [(8, 16), (40, 16), (64, 3), (100, 7)])
def test_products_of_codes_with_other_groups(xp, host, rng, sizes):
    codes = [
        cubin.quantize(xp.asarray(rng.normal(size=(m, 72))), 2, group_size=size)
        for m, size in zip((5, 9), sizes, strict=True)
    ]
    one, other = (host(code.dequantize()) for code in codes)
    np.testing.assert_allclose(host(products.linear(*codes)), one @ other.T, atol=1e-11)


def test_formats_of_whole_groups(rng):
    code = cubin.quantize(rng.normal(size=(4, 96)), 2, group_size=64)
    with pytest.raises(ValueError, match="group_size=64 leaves a shorter last one in lines of 96"):
        code.to_bcq()
    larger = cubin.quantize(rng.normal(size=(4, 96)), 2, group_size=128)
    same(BinaryCode.from_bcq(*larger.to_bcq()).dequantize(), larger.dequantize())
    for shape in ((2, 192), (2, 64)):
        with pytest.raises(ValueError, match="whole groups of 128"):
            cubin.quantize(np.ones(shape, np.float16), 1, group_size=128).to_q1_0()


def test_rows_with_a_shorter_one_have_no_view():
    rows = rows_of((2, 5), None, 3)
    assert (rows.scale_shape, rows.count) == ((2, 2), 4)
    with pytest.raises(ValueError, match="reshape"):
        rows.view(np.ones((2, 5)))


@pytest.mark.parametrize("solver", few(SOLVERS, "greedy", "alternating"))
@pytest.mark.parametrize("shape", [(5, 13), (5, 12), (2, 3, 7)])
@pytest.mark.parametrize("mapped", [False, True])
def test_shifts_of_shorter_groups(xp, host, rng, solver, shape, mapped):
    x = rng.exponential(size=shape)
    bits = rng.integers(0, 4, shape) if mapped else 2
    group, cut = 4 if shape[-1] < 12 else 8, cut_of(shape, 4 if shape[-1] < 12 else 8)
    code = cubin.quantize(xp.asarray(x), bits, group_size=group, solver=solver, shift=True)
    assert code.shift.shape == code.scales.shape[1:]
    for own, at, size in ((slice(0, cut), slice(0, -1), group),
                          (slice(cut, None), slice(-1, None), shape[-1] - cut)):  # fmt: skip
        some = bits if np.ndim(bits) == 0 else bits[..., own]
        alone = cubin.quantize(xp.asarray(x[..., own]), some, group_size=size, solver=solver,
                               shift=True)  # fmt: skip
        same(host(code.shift)[..., at], host(alone.shift))
        same(host(code.dequantize())[..., own], host(alone.dequantize()))
    if len(shape) == 2:
        v, values = xp.asarray(rng.normal(size=(3, shape[1]))), host(code.dequantize())
        found = host(products.linear(v, code))
        np.testing.assert_allclose(found, host(v) @ values.T, atol=1e-11)
        found = host(products.linear(code, code))
        np.testing.assert_allclose(found, values @ values.T, atol=1e-11)


@pytest.mark.parametrize("solver", ["refined", "alternating"])
def test_shifts_with_a_gram(rng, solver):
    w = rng.exponential(size=(4, 2, 5))
    gram = cubin.Gram(10).add(rng.standard_normal((64, 10)) @ rng.standard_normal((10, 10)))
    options = {"group_size": 3, "solver": solver, "gram": gram}
    code = cubin.quantize(w, 2, shift=True, **options)
    assert code.shift.shape == (4, 2, 2)
    ours, others = (
        float(cubin.errors.output_mse(w, c.dequantize(), gram))
        for c in (code, cubin.quantize(w, 2, **options))
    )
    assert ours <= others * (1 + 1e-9)


def test_files_of_shifts_of_shorter_groups(tmp_path, rng):
    x = rng.exponential(size=(6, 13)).astype(np.float16)
    code = cubin.quantize(x, 2, group_size=4, shift=True)
    assert code.effective_bits == pytest.approx(2 + 3 * 24 * 16 / 78)
    for name in ("c.npz", "c.safetensors"):
        code.save(tmp_path / name)
        assert BinaryCode.load(tmp_path / name) == code
    assert code[2:4] == cubin.quantize(x[2:4], 2, group_size=4, shift=True)


@pytest.mark.parametrize("solver", few(SOLVERS, "greedy", "alternating"))
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_precisions_of_shorter_groups(xp, host, rng, solver, shift, weighted):
    if weighted and solver == "greedy":
        pytest.skip("greedy takes no importance")
    x = rng.exponential(size=(5, 13))
    importance = rng.uniform(0.5, 2, x.shape) if weighted else None

    def quantized(elements, size):
        weights = None if importance is None else xp.asarray(importance[:, elements])
        return cubin.quantize(xp.asarray(x[:, elements]), 3, group_size=size, solver=solver,
                              precisions=(1, 2, 3), shift=shift, importance=weights)  # fmt: skip

    code = quantized(slice(None), 4)
    parts = [(slice(0, 12), slice(0, -1), 4), (slice(12, None), slice(-1, None), 1)]
    for elements, groups, size in parts:
        alone = quantized(elements, size)
        for levels in (1, 2, 3):
            one, other = code.at(levels), alone.at(levels)
            same(host(one.scales)[..., groups], host(other.scales))
            same(host(one.dequantize())[:, elements], host(other.dequantize()))
            if shift:
                same(host(one.shift)[..., groups], host(other.shift))


@pytest.mark.parametrize("shift", [False, True])
def test_precisions_of_shorter_groups_with_a_gram(tmp_path, rng, shift):
    w = rng.normal(size=(4, 11))
    gram = cubin.Gram(11).add(rng.standard_normal((64, 11)) @ rng.standard_normal((11, 11)))
    code = cubin.quantize(w, 3, group_size=4, solver="alternating", gram=gram,
                          precisions=(1, 2, 3), shift=shift)  # fmt: skip
    errors = [float(cubin.errors.output_mse(w, code.at(k).dequantize(), gram)) for k in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]
    assert code.tables.shape == (3 + 2 * shift, 4, 3)
    for name in ("c.npz", "c.safetensors"):
        code.save(tmp_path / name)
        loaded = BinaryCode.load(tmp_path / name)
        for levels in (1, 2, 3):
            same(loaded.at(levels).dequantize(), code.at(levels).dequantize())


@settings(max_examples=60, deadline=None)
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 9), st.integers(1, 300)),
        st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 140)),
        st.tuples(st.integers(1, 9), st.integers(1, 4), st.sampled_from([1, 3, 5]), st.just(7)),
    ),
    size=st.integers(1, 130),
    mapped=st.booleans(),
    shift=st.booleans(),
)
def test_groups_of_any_size(shape, size, mapped, shift):
    """A code has the scales and signs of its groups alone, and gives back their sums."""
    rng = np.random.default_rng(size)
    x = rng.normal(size=shape).astype(np.float32)
    bits = rng.integers(0, 4, shape).astype(np.uint8) if mapped else 2
    code = cubin.quantize(x, bits, group_size=size, shift=shift)
    signs, values = code.signs, code.dequantize()
    if not shift:
        np.testing.assert_array_equal(values, cubin.multibit(x, bits, group_size=size))
    for start in range(0, shape[-1], size):
        cut = slice(start, start + size)
        depths = bits[..., cut] if mapped else bits
        alone = cubin.quantize(x[..., cut].copy(), depths, group_size=size, shift=shift)
        levels = len(alone.scales)
        np.testing.assert_array_equal(alone.signs, signs[:levels, ..., cut])
        assert not signs[levels:, ..., cut].any()
        np.testing.assert_array_equal(alone.dequantize(), values[..., cut])
    again = BinaryCode.from_signs(code.scales, signs, code.bits, group_size=size, shift=code.shift)
    assert again == code
