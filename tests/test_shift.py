"""Codes with a shift: what they stand for, and how well the solvers find them."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16

import cubin
from cubin import BinaryCode, products
from cubin.codes import products as arithmetic
from cubin.core import passes
from cubin.solvers import outputs
from tests import reference
from tests.exhaustive import few
from tests.reference import plain
from tests.test_outputs_of_layers import errors_of_lines, spread_inputs
from tests.test_products import convolved
from tests.test_solvers import all_codes, squared_error

DTYPES = [np.float16, bfloat16, np.float32, np.float64]
LEAST_SQUARES = ["refined", "alternating", "optimal"]
SOLVERS = ["greedy", *LEAST_SQUARES]
GRANULARITIES = [{}, {"channel_axis": 0}, {"channel_axis": 1}, {"channel_axis": (2, 0)},
                 {"group_size": 3}]  # fmt: skip


def in_rows(code):
    """For each row: the index of its scales, and those of its elements."""
    return reference.rows(code.shape, code.channel_axis, code.group_size).items()


def values(code):
    """What a code stands for in float64, summed up exactly."""
    y, signs = np.zeros(code.shape), code.signs
    for row, members in in_rows(code):
        scales = [float(scale[row]) for scale in code.scales]
        for index in members:
            steps = [scale * int(sign[index]) for scale, sign in zip(scales, signs, strict=True)]
            y[index] = math.fsum([float(code.shift[row]), *steps])
    return y


def with_shift(xp, rng, shape, bits, dtype=np.float32, **given):
    """A code of random signs, scales and shifts, all of them multiples of 1/8."""
    levels = int(np.max(bits))
    signs = rng.choice(np.array([-1, 1], np.int8), (levels, *shape))
    signs *= np.greater(bits, np.arange(levels).reshape(-1, *(1,) * len(shape)))
    scale_shape = cubin.quantize(np.ones(shape), 1, **given).scales.shape[1:]
    scales = rng.integers(-8, 9, (levels, *scale_shape)).astype(dtype) / dtype(8)
    shift = rng.integers(-8, 9, scale_shape).astype(dtype) / dtype(8)
    arrays = (xp.asarray(scales), xp.asarray(signs), xp.asarray(bits) if np.ndim(bits) else bits)
    return BinaryCode.from_signs(*arrays, shift=xp.asarray(shift), **given)


# ---------------------------------------------------------------- what a code stands for


@pytest.mark.parametrize("given", GRANULARITIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mapped", [False, True])
def test_values_begin_with_the_shift(mapped, dtype, given, xp, host, rng):
    bits = rng.integers(0, 4, (4, 5, 6)) if mapped else 3
    code = with_shift(xp, rng, (4, 5, 6), bits, np.dtype(dtype).type, **given)
    here = code.to_host()
    expected = values(here).astype(dtype)
    found = code.dequantize()
    assert found.dtype == dtype
    np.testing.assert_array_equal(plain(host(found)), plain(expected))


@pytest.mark.parametrize("levels", [0, 2])
def test_long_lines_and_short_groups(levels, rng):
    """Blocks of a line, in which the compiled loops work, begin with the shift of their run."""
    for length, group in ((300_000, 3), (300_000, 100_000), (300_000, 1), (4096, 64)):
        code = with_shift(np, rng, (2, length), np.full((2, 1), levels), group_size=group)
        shift = np.repeat(code.shift, group, axis=1)
        scales = np.repeat(code.scales, group, axis=2)
        np.testing.assert_array_equal(code.dequantize(), shift + (scales * code.signs).sum(axis=0))


def test_a_code_without_levels_is_its_shift(xp, host):
    x = np.array([[1.0, 2, 6], [-2, 4, 1]])
    for solver in SOLVERS:
        for bits in (0, np.zeros((2, 3), int)):
            code = cubin.quantize(xp.asarray(x), bits, channel_axis=0, solver=solver, shift=True)
            np.testing.assert_allclose(host(code.dequantize()), [[3, 3, 3], [1, 1, 1]], rtol=1e-15)


def test_parts_and_copies(xp, host, rng):
    for where in GRANULARITIES:
        code = with_shift(xp, rng, (4, 5, 6), rng.integers(0, 4, (4, 5, 6)), **where)
        whole = host(code.dequantize())
        part = code[1:3]
        np.testing.assert_array_equal(host(part.dequantize()), whole[1:3])
        assert part.shift.shape == part.scales.shape[1:]
        first = code.truncate(1)
        assert (first.shift == code.shift).all()
        np.testing.assert_array_equal(host(first.dequantize()), values(first.to_host()))
        for other in (copy.copy(code), code.truncate(3)):
            assert other == code
        moved = code.to_host()
        assert type(moved.shift) is np.ndarray
        assert pickle.loads(pickle.dumps(moved)) == copy.deepcopy(moved) == moved
        if xp is not np:
            assert moved.to_device() == code
        packed = BinaryCode(code.scales, code.planes, code.bits, shape=code.shape,
                            shift=code.shift, **where)  # fmt: skip
        assert packed == code


def test_equality_and_cost(rng):
    code = with_shift(np, rng, (8, 40), 2, channel_axis=0)
    bare = BinaryCode.from_signs(code.scales, code.signs, 2, channel_axis=0)
    other = BinaryCode.from_signs(code.scales, code.signs, 2, channel_axis=0, shift=code.shift + 1)
    assert bare.shift is None
    assert code != bare
    assert bare != code
    assert code != other
    nan = np.full(8, np.nan, np.float32)
    first, second = (
        BinaryCode.from_signs(code.scales, code.signs, 2, channel_axis=0, shift=nan.copy())
        for _ in range(2)
    )
    assert first == second
    assert code.nbytes == bare.nbytes + 8 * 4
    assert code.effective_bits == bare.effective_bits + 8 * 32 / 320
    assert ("shift" in repr(code), "shift" in repr(bare)) == (True, False)
    assert "shift" in code._repr_html_()


def test_a_shift_that_does_not_fit(xp, rng):
    code = with_shift(xp, rng, (4, 6), 2, channel_axis=0)
    make = [
        partial(BinaryCode.from_signs, code.scales, code.signs, 2, channel_axis=0),
        partial(BinaryCode, code.scales, code.planes, 2, shape=(4, 6), channel_axis=0),
    ]
    for of_shift in make:
        assert of_shift(shift=code.shift) == code
        with pytest.raises(TypeError, match="shift must be float16"):
            of_shift(shift=code.shift.astype(int))
        with pytest.raises(
            TypeError, match="shift must be float32, as the scales are, got float64"
        ):
            of_shift(shift=code.shift.astype(np.float64))
        for wrong in (code.shift[:3], code.shift[None], code.scales):
            with pytest.raises(ValueError, match="shift has shape"):
                of_shift(shift=wrong)


def test_formats_without_a_shift(rng):
    with pytest.raises(ValueError, match="binary coding quantization has no shift"):
        with_shift(np, rng, (4, 64), 2, channel_axis=0).to_bcq()
    with pytest.raises(ValueError, match="Q1_0 has no shift"):
        with_shift(np, rng, (4, 128), 1, np.float16, group_size=128).to_q1_0()


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_files(suffix, dtype, rng, tmp_path):
    path = tmp_path / f"code.{suffix}"
    of_type = np.dtype(dtype).type
    for where in GRANULARITIES:
        for bits in (2, rng.integers(0, 3, (4, 5, 6))):
            code = with_shift(np, rng, (4, 5, 6), bits, of_type, **where)
            code.save(path)
            loaded = BinaryCode.load(path)
            assert loaded == code
            assert loaded.shift.dtype == dtype
    number = cubin.quantize(np.asarray(3, dtype), 0, shift=True)
    number.save(path)
    assert BinaryCode.load(path) == number


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("given", [{"channel_axis": 0}, {"group_size": 32}], ids=str)
def test_files_take_what_effective_bits_promise(given, suffix, rng, tmp_path):
    x = rng.exponential(size=(1000, 1024)).astype(np.float32)
    code = cubin.quantize(x, 2, shift=True, **given)
    path = tmp_path / f"code.{suffix}"
    code.save(path)
    assert 8 * path.stat().st_size == pytest.approx(code.effective_bits * x.size, rel=0.05)


def damaged(code, monkeypatch, path, change):
    """A file of a code whose layout and arrays were changed before they were written."""
    from cubin.codes import files

    pack = files.pack

    def other(code):
        layout, held = pack(code)
        change(layout, held)
        return layout, held

    with monkeypatch.context() as patched:
        patched.setattr(files, "pack", other)
        code.save(path)
    return path


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize(
    "change",
    [
        lambda layout, held: layout.pop("shift"),
        lambda layout, held: layout.update(shift=1),
        lambda layout, held: layout.update(shift=False),
        lambda layout, held: held.pop("shift"),
        lambda layout, held: held.update(shift=held["shift"][:3]),
        lambda layout, held: held.update(shift=held["shift"].astype(np.float64)),
        lambda layout, held: held.update(shift=held["shift"].astype(np.uint8)),
        lambda layout, held: layout.update(scales="bfloat16"),
    ],
)
def test_damaged_files(change, suffix, rng, tmp_path, monkeypatch):
    code = with_shift(np, rng, (4, 6), 2, channel_axis=0)
    path = damaged(code, monkeypatch, tmp_path / f"code.{suffix}", change)
    with pytest.raises(ValueError, match="no intact BinaryCode"):
        BinaryCode.load(path)


# ---------------------------------------------------------------- products


@pytest.mark.parametrize("given", [g for g in GRANULARITIES if g != {"channel_axis": (2, 0)}],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("levels", [0, 1, 3])
def test_products_with_floats(levels, mapped, given, xp, host, rng, monkeypatch):
    """Of few rows and of many: multiples of 1/8, so that all sums are exact."""
    bits = rng.integers(0, levels + 1, (9, 24)) if mapped else levels
    if mapped and levels:
        bits[0, 0] = levels
    code = with_shift(xp, rng, (9, 24), bits, **given)
    w = values(code.to_host())
    monkeypatch.setattr(arithmetic, "TILE", 100)
    for rows in (1, 2, 40):
        x = rng.integers(-4, 5, (rows, 24)).astype(np.float32)
        found = products.linear(xp.asarray(x), code)
        np.testing.assert_array_equal(host(found), x @ w.T)
        np.testing.assert_array_equal(host(code @ xp.asarray(x.T)), w @ x.T)
        left = rng.integers(-4, 5, (rows, 9)).astype(np.float32)
        np.testing.assert_array_equal(host(xp.asarray(left) @ code), left @ w)


def test_products_with_floats_in_loops(rng, monkeypatch):
    pytest.importorskip("numba")
    from cubin.core.host import blocks

    monkeypatch.setattr(blocks, "pays", lambda size: True)
    for where in ({"channel_axis": 0}, {"channel_axis": 1}, {"group_size": 6}):
        code = with_shift(np, rng, (333, 48), 2, **where)
        w = code.dequantize().astype(np.float64)
        for rows in (1, 40):
            x = rng.integers(-4, 5, (rows, 48)).astype(np.float32)
            np.testing.assert_array_equal(products.linear(x, code), x @ w.T)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    ("of_x", "of_w"),
    list(itertools.product([{}, {"channel_axis": 0}, {"group_size": 8}], [{"channel_axis": 0},
                      {"group_size": 12}, {"channel_axis": 1}])), ids=str,
)  # fmt: skip
@pytest.mark.parametrize("shifted", ["both", "x", "w"])
def test_products_of_codes(shifted, of_x, of_w, mapped, xp, host, rng):
    def coded(shape, name, given):
        bits = rng.integers(0, 3, shape) if mapped else 2
        code = with_shift(xp, rng, shape, bits, **given)
        if shifted not in (name, "both"):
            code = BinaryCode.from_signs(code.scales, code.signs, code.bits, **given)
        return code, host(code.dequantize()).astype(np.float64)

    (x, x_values), (w, w_values) = coded((5, 72), "x", of_x), coded((7, 72), "w", of_w)
    np.testing.assert_array_equal(host(products.linear(x, w)), x_values @ w_values.T)


@pytest.mark.parametrize("length", [1, 7, 33, 65])
def test_products_of_codes_whose_lines_are_no_whole_bytes(length, xp, host, rng):
    x, w = (with_shift(xp, rng, (lines, length), 2, channel_axis=0) for lines in (3, 5))
    expected = host(x.dequantize()) @ host(w.dequantize()).T
    np.testing.assert_array_equal(host(products.linear(x, w)), expected)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("of_x", [None, {}, {"channel_axis": 0}])
def test_convolutions(of_x, mapped, xp, host, rng):
    """Beyond the edge of a coded image there is 0, and no shift."""
    kernels = (6, 2, 3, 2)
    code = with_shift(xp, rng, kernels, rng.integers(0, 3, kernels) if mapped else 2,
                      channel_axis=0)  # fmt: skip
    shape = (2, 4, 5, 7)
    if of_x is None:
        x = rng.integers(-4, 5, shape).astype(np.float32)
        images = xp.asarray(x)
    else:
        images = with_shift(xp, rng, shape, 2, **of_x)
        x = host(images.dequantize())
    w = host(code.dequantize()).astype(float)
    expected = convolved(x.astype(float), w, (2, 1), (1, 2), 2)
    found = products.conv2d(images, code, (2, 1), (1, 2), 2)
    np.testing.assert_array_equal(host(found), expected)


def test_the_gradient_of_a_product(rng):
    code = with_shift(np, rng, (5, 8), 2, channel_axis=0)
    x = rng.integers(-4, 5, (3, 8)).astype(np.float64)
    np.testing.assert_array_equal(cubin.tape.linear(x, code).value, x @ values(code).T)
    cubin.tape.check_gradient(lambda v: cubin.tape.linear(v, code), x)


def test_rows_that_are_not_finite(xp, host, rng):
    code = with_shift(xp, rng, (6, 33), 2, channel_axis=0)
    x = rng.normal(size=(40, 33)).astype(np.float32)
    for rows in (4, 40):
        clean, broken = x[:rows], x[:rows].copy()
        broken[1, 3], broken[2, 32] = np.nan, np.inf
        found = host(products.linear(xp.asarray(broken), code))
        assert not np.isfinite(found[1:3]).any()
        clean = host(products.linear(xp.asarray(clean), code))
        np.testing.assert_array_equal(found[[0, 3]], clean[[0, 3]])


# ---------------------------------------------------------------- greedy


def greedy(x, bits, **given):
    """Shift, scales, signs, residuals and values: the mean of a row, and greedy on the rest."""
    shift, rest = {}, np.array(x, np.float64)
    for row, members in reference.rows(rest.shape, **given).items():
        shift[row] = math.fsum(rest[index] for index in members) / len(members)
        for index in members:
            rest[index] -= shift[row]
    scales, signs, residuals, approx = reference.greedy(rest, bits, **given)
    spread = np.zeros(rest.shape)
    for row, members in reference.rows(rest.shape, **given).items():
        for index in members:
            spread[index] = shift[row]
    return shift, scales, signs, residuals, spread + approx


@pytest.mark.parametrize("given", GRANULARITIES, ids=str)
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("dtype", few(DTYPES, bfloat16, np.float32))
def test_greedy_takes_the_mean_first(dtype, mapped, given, xp, host, rng):
    x = rng.exponential(size=(4, 5, 6)).astype(dtype)
    bits = rng.integers(0, 4, x.shape) if mapped else 3
    code = cubin.quantize(xp.asarray(x), bits, shift=True, **given).to_host()
    shift, scales, signs, residuals, approx = greedy(x, bits, **given)
    assert code.dtype == dtype
    assert code.shift.dtype == dtype
    room = 4 * float(np.finfo(np.float32).eps if dtype == np.float32 else
                     {np.float16: 2**-11, bfloat16: 2**-8, np.float64: 2**-53}[dtype])  # fmt: skip
    for row, value in shift.items():
        assert float(code.shift[row]) == pytest.approx(value, rel=room)
    np.testing.assert_allclose(code.scales.astype(float), scales, rtol=8 * room, atol=room)
    # A residual that is 0 but for rounding may have either sign.
    sure = (np.abs(residuals) > 1e-5) | (signs == 0)
    np.testing.assert_array_equal(code.signs[sure], signs[sure])
    np.testing.assert_allclose(
        code.dequantize().astype(float)[sure.all(axis=0)], approx[sure.all(axis=0)], atol=20 * room
    )
    assert sure.mean() > 0.9


def test_greedy_in_layouts_and_blocks(rng, monkeypatch):
    x = rng.exponential(size=(40, 6, 50)).astype(np.float32)
    for where in GRANULARITIES[:4]:
        expected = cubin.quantize(x, 2, shift=True, **where)
        for view in (np.asfortranarray(x), x.repeat(2, axis=2)[..., ::2], x[::-1][::-1]):
            found = cubin.quantize(view, 2, shift=True, **where)
            np.testing.assert_array_equal(found.signs, expected.signs)
            np.testing.assert_allclose(found.shift, expected.shift, rtol=2e-7)
            np.testing.assert_allclose(found.scales, expected.scales, rtol=1e-6)
        monkeypatch.setattr(passes, "SEARCHED", 700)
        assert cubin.quantize(x, 2, shift=True, **where) == expected
        monkeypatch.undo()


# ---------------------------------------------------------------- least squares


def problem(data, most=12, dtype=np.float64):
    """x of one row, its bits and weights."""
    n = data.draw(st.integers(1, most))
    levels = data.draw(st.integers(1, max(1, min(3, 12 // n))))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    kind = data.draw(st.sampled_from(["normal", "exponential", "integers", "offset"]))
    x = {
        "normal": lambda: rng.normal(size=n),
        "exponential": lambda: rng.exponential(size=n),
        "integers": lambda: rng.integers(-3, 4, n).astype(float),
        "offset": lambda: rng.normal(size=n) + 1000,
    }[kind]()
    bits = rng.integers(0, levels + 1, n) if data.draw(st.booleans()) else np.full(n, levels)
    importance = rng.choice([0.1, 0.5, 1.0, 3.0], n) if data.draw(st.booleans()) else None
    return x.astype(dtype), bits, importance


def error_of(x, bits, importance=None, **options):
    """The weighted squared error, about the mean of x so that an offset does not round it away."""
    code = cubin.quantize(x, bits, importance=importance, **options)
    weights = 1.0 if importance is None else importance
    return squared_error(x, code.dequantize(), weights)


def least_error(x, bits, weights):
    """The least error of all codes, with the best shift and scales of each."""
    root, rest = np.sqrt(weights), x - x.mean()
    least = np.inf
    for signs in all_codes(bits):
        columns = np.vstack([np.ones((1, len(x))), signs]) * root
        fitted = np.linalg.lstsq(columns.T, rest * root, rcond=None)[0]
        least = min(least, float(((rest * root - fitted @ columns) ** 2).sum()))
    return least


@settings(max_examples=40)
@given(st.data())
def test_against_all_codes(data):
    x, bits, importance = problem(data)
    weights = np.ones(len(x)) if importance is None else importance
    limit = least_error(x, bits, weights)
    room = 1e-12 * squared_error(x, x.mean(), weights) + 1e-20 * squared_error(x, 0, weights)
    found = {s: error_of(x, bits, importance, solver=s, shift=True) for s in LEAST_SQUARES}
    found["converged"] = error_of(x, bits, importance, solver="alternating", iterations=None,
                                  shift=True)  # fmt: skip
    for solver, error in found.items():
        assert error >= limit - room, solver
        assert error >= found["optimal"] * (1 - 1e-9) - room, solver


@pytest.mark.parametrize("levels", [1, 2])
def test_share_of_optima(levels):
    """`optimal` finds nine in ten of the optima, also in skewed rows."""
    found = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(3, 10 // levels + 1))
        x = rng.exponential(size=n) if seed % 2 else rng.normal(size=n)
        limit = least_error(x, np.full(n, levels), np.ones(n))
        error = error_of(x, levels, solver="optimal", shift=True)
        found.append(error <= limit * (1 + 1e-9) + 1e-15)
    assert np.mean(found) >= 0.9


@settings(max_examples=60)
@given(st.data())
def test_shift_and_scales_are_those_of_least_squares(data):
    x, bits, importance = problem(data, 30)
    weights = np.ones(len(x)) if importance is None else importance
    solver = data.draw(st.sampled_from(LEAST_SQUARES), "solver")
    code = cubin.quantize(x, bits, solver=solver, importance=importance, shift=True)
    rest = x - code.dequantize()
    size = (weights * abs(x)).sum()
    for level in np.vstack([np.ones((1, len(x))), code.signs]):
        assert abs((weights * rest * level).sum()) <= 1e-11 * size


@settings(max_examples=30)
@given(st.data())
def test_no_row_is_worse_than_without(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    shape = (3, data.draw(st.integers(1, 40)))
    levels = data.draw(st.integers(0, 5))
    x = rng.normal(size=shape) ** data.draw(st.sampled_from([1, 2, 3]))
    bits = rng.integers(0, levels + 1, shape) if data.draw(st.booleans()) else levels
    importance = rng.exponential(size=shape) if data.draw(st.booleans()) else None
    solver = data.draw(st.sampled_from(LEAST_SQUARES), "solver")
    iterations = data.draw(st.sampled_from([0, 1, 2, None]), "iterations")
    errors = []
    for shift in (False, True):
        code = cubin.quantize(x, bits, channel_axis=0, solver=solver, iterations=iterations,
                              importance=importance, shift=shift)  # fmt: skip
        weights = 1.0 if importance is None else importance
        errors.append((weights * (x - code.dequantize()) ** 2).sum(axis=1))
        assert (code.scales >= 0).all()
        assert np.ndim(bits) or (np.diff(code.scales, axis=0) <= 0).all()
    power = (x**2).sum(axis=1)
    assert (errors[1] <= errors[0] * (1 + 1e-9) + 1e-13 * power).all()


@pytest.mark.parametrize("solver", few(SOLVERS, "greedy", "alternating"))
def test_what_a_shift_makes_exact(solver, xp, host):
    for x, bits in (
        (np.full(9, 0.1), 2),
        (np.array([1.0, 3, 3, 1]), 1),
        (np.arange(8.0) + 100, 3),
    ):
        code = cubin.quantize(xp.asarray(x.astype(np.float32)), bits, solver=solver, shift=True)
        np.testing.assert_allclose(host(code.dequantize()), x.astype(np.float32), rtol=1e-6)


@pytest.mark.kernels
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", few(DTYPES, np.float16, np.float64))
def test_both_libraries_find_the_same(dtype, solver, device, rng):
    x = rng.exponential(size=(4, 24)).astype(dtype)
    bits = rng.integers(0, 4, x.shape)
    cases = [
        (2, {"channel_axis": 0}),
        (bits, {}),
        (bits, {"channel_axis": 0}),
        (2, {"group_size": 12}),
    ]
    for depth, where in cases[: 1 if solver == "optimal" else 4]:
        ours = cubin.quantize(x, depth, solver=solver, shift=True, **where)
        theirs = cubin.quantize(device.asarray(x), depth, solver=solver, shift=True, **where)
        assert type(theirs.shift) is type(device.zeros(1))
        theirs = theirs.to_host()
        np.testing.assert_array_equal(theirs.signs, ours.signs)
        room = 1e-12 if dtype == np.float64 else 2e-7 if dtype == np.float32 else 1e-2
        for a, b in ((theirs.scales, ours.scales), (theirs.shift, ours.shift)):
            np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=room, atol=room)


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_have_nothing_to_do_with_each_other(solver, rng, monkeypatch):
    x = rng.exponential(size=(7, 50)).astype(np.float32)
    importance = rng.exponential(size=x.shape) if solver in LEAST_SQUARES else None
    options = {"channel_axis": 0, "solver": solver, "shift": True}
    code = cubin.quantize(x, 3, importance=importance, **options)
    for row in range(7):
        weights = None if importance is None else importance[row : row + 1]
        assert (
            cubin.quantize(x[row : row + 1], 3, importance=weights, **options)
            == (code[row : row + 1])
        )
    monkeypatch.setattr(passes, "SEARCHED", 100)
    assert cubin.quantize(x, 3, importance=importance, **options) == code


@pytest.mark.parametrize("solver", few(SOLVERS, "greedy", "refined"))
@pytest.mark.parametrize("wrong", few([np.nan, np.inf, -np.inf], np.inf))
def test_rows_that_hold_no_number(wrong, solver, xp, host, rng):
    x = rng.exponential(size=(5, 12)).astype(np.float32)
    options = {"channel_axis": 0, "solver": solver, "shift": True}
    clean = host(cubin.quantize(xp.asarray(x), 2, **options).dequantize())
    x[3, 4] = wrong
    for bits in (2, np.full(x.shape, 2)):
        with pytest.raises(ValueError, match="row \\(3,\\)"):
            cubin.quantize(xp.asarray(x), bits, **options)
    code = cubin.quantize(xp.asarray(x), 2, check_finite=False, **options)
    found = host(code.dequantize())
    assert np.isnan(found[3]).all()
    np.testing.assert_array_equal(np.delete(found, 3, 0), np.delete(clean, 3, 0))


@pytest.mark.parametrize("solver", SOLVERS)
def test_large_and_small_numbers(solver, rng):
    x = rng.exponential(size=(1, 40))
    code = cubin.quantize(x, 2, solver=solver, shift=True)
    for power in (-1000, 1000):
        other = cubin.quantize(np.ldexp(x, power), 2, solver=solver, shift=True)
        np.testing.assert_array_equal(other.signs, code.signs)
        np.testing.assert_allclose(np.ldexp(other.shift, -power), code.shift, rtol=1e-12)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (2, 1)], ids=str)
@pytest.mark.parametrize("solver", few(SOLVERS, "greedy", "refined"))
def test_shapes(solver, shape, xp, host):
    code = cubin.quantize(xp.ones(shape), 2, solver=solver, shift=True)
    assert code.shift.shape == ()
    np.testing.assert_array_equal(host(code.dequantize()), np.ones(shape))
    if len(shape) > 1:
        code = cubin.quantize(xp.ones(shape), 2, solver=solver, shift=True, channel_axis=0)
        assert code.shift.shape == shape[:1]


def test_a_result_is_never_minus_zero(rng):
    for solver in SOLVERS:
        code = cubin.quantize(np.array([-0.0, -0.0]), 1, solver=solver, shift=True)
        assert not np.signbit(code.shift)
        assert not np.signbit(code.dequantize()).any()


def test_a_shift_is_asked_for_by_a_bool():
    for wrong in (1, None, 0.5, np.ones(3)):
        with pytest.raises(TypeError, match="shift must be True or False"):
            cubin.quantize(np.ones(3), 1, shift=wrong)


def test_the_gain_on_skewed_data(rng):
    """A shift pays where data lie on one side of zero, and is for nothing where they do not."""
    data = {"exponential": rng.exponential(size=4000), "normal": rng.normal(size=4000)}
    for name, x in data.items():
        for solver in SOLVERS:
            errors = [float(cubin.errors.relative_mse(
                x, cubin.quantize(x, 2, solver=solver, shift=shift).dequantize()))
                for shift in (False, True)]  # fmt: skip
            ratio = errors[1] / errors[0]
            assert ratio < 0.8 if name == "exponential" else 0.9 < ratio < 1.1, (name, solver)


# ---------------------------------------------------------------- outputs of layers


def layer(rng, n=8, lines=5):
    w = rng.exponential(size=(lines, n))
    inputs = spread_inputs(rng, n)
    return w, inputs, inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize(
    "case",
    few(
        itertools.product(LEAST_SQUARES, (False, True), ({"channel_axis": 0}, {"group_size": 4})),
        ("refined", False, {"group_size": 4}), ("refined", True, {"channel_axis": 0}),
        ("alternating", True, {"group_size": 4}), ("optimal", False, {"channel_axis": 0}),
    ), ids=str,
)  # fmt: skip
def test_no_line_is_worse_in_its_outputs(case, xp, rng, monkeypatch):
    solver, mapped, where = case
    monkeypatch.setattr(outputs, "RESTARTS", 2)
    w, inputs, matrix = layer(rng, lines=3)
    bits = rng.integers(0, 3, w.shape) if mapped else 2
    gram = cubin.Gram(8).add(xp.asarray(inputs))
    errors = {}
    for name, options in {
        "shift": {"shift": True, "gram": gram},
        "none": {"gram": gram},
        "weights": {"shift": True},
    }.items():
        code = cubin.quantize(xp.asarray(w), bits, solver=solver, **where, **options).to_host()
        errors[name] = errors_of_lines(w, code.dequantize(), matrix)
    for name in ("none", "weights"):
        assert (errors["shift"] <= errors[name] * (1 + 1e-9) + 1e-12).all(), name
    assert errors["shift"].sum() < errors["none"].sum()


@pytest.mark.parametrize("solver", ["refined", "alternating"])
def test_no_line_is_worse_where_a_shift_is_for_nothing(solver, rng):
    """Lines that are symmetric about zero: a search with a shift alone ends up worse."""
    for _ in range(3):
        w, inputs = rng.normal(size=(20, 8)), spread_inputs(rng, 8)
        gram = cubin.Gram(8).add(inputs)
        errors = [
            errors_of_lines(w, cubin.quantize(w, 2, channel_axis=0, solver=solver, gram=gram,
                                              shift=shift).dequantize(), gram.matrix)
            for shift in (False, True)
        ]  # fmt: skip
        assert (errors[1] <= errors[0] * (1 + 1e-9)).all()


def test_shift_and_scales_are_of_least_squares_in_the_metric(rng):
    w, inputs, matrix = layer(rng, 9)
    gram = cubin.Gram(9).add(inputs)
    for solver, levels in itertools.product(LEAST_SQUARES, (0, 2)):
        code = cubin.quantize(w, levels, channel_axis=0, solver=solver, gram=gram, shift=True)
        for line, rest in enumerate(w - code.dequantize()):
            columns = np.vstack([np.ones((1, 9)), code.signs[:, line]])
            slope = columns @ matrix @ rest
            assert np.abs(slope).max() < 1e-9 * np.abs(columns @ matrix @ w[line]).max()


def test_outputs_in_both_libraries(device, rng):
    w, inputs, _ = layer(rng, 6, 3)
    ours, theirs = (
        cubin.quantize(xp.asarray(w), 2, channel_axis=0, solver="alternating", shift=True,
                       gram=cubin.Gram(6).add(xp.asarray(inputs)))
        for xp in (np, device)
    )  # fmt: skip
    theirs = theirs.to_host()
    np.testing.assert_array_equal(theirs.signs, ours.signs)
    np.testing.assert_allclose(theirs.shift, ours.shift, rtol=1e-9)


def test_lines_whose_outputs_hold_no_number(rng):
    w, inputs, _ = layer(rng)
    w[2, 3] = np.nan
    gram = cubin.Gram(8).add(inputs)
    options = {"channel_axis": 0, "solver": "refined", "gram": gram, "shift": True}
    with pytest.raises(ValueError, match="row \\(2,\\)"):
        cubin.quantize(w, 2, **options)
    found = cubin.quantize(w, 2, check_finite=False, **options).dequantize()
    assert np.isnan(found[2]).all()
    assert np.isfinite(np.delete(found, 2, 0)).all()
