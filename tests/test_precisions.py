"""quantize with several precisions: against least squares in float64, level by level."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies
from ml_dtypes import bfloat16

import cubin
from cubin import BinaryCode
from cubin.core.host import blocks
from cubin.solvers.precisions import Residuals, extended
from tests import reference
from tests.exhaustive import few
from tests.required import require

SOLVERS = ["greedy", "refined", "alternating", "optimal"]
DTYPES = [np.float16, bfloat16, np.float32, np.float64]
GRANULARITIES = [
    {},
    {"channel_axis": 0},
    {"channel_axis": 1},
    {"channel_axis": (2, 0)},
    {"group_size": 4},
]


def least_squares(x, signs, weights=None):
    """Scales of a row, and the weighted squares that they leave. `signs` are (levels, n)."""
    root = np.ones(len(x)) if weights is None else np.sqrt(np.asarray(weights, np.float64))
    x, signs = np.asarray(x, np.float64), np.asarray(signs, np.float64)
    scales = np.linalg.lstsq((signs * root).T, x * root, rcond=None)[0]
    return scales, float((((x - scales @ signs) * root) ** 2).sum())


def rows_of(x, where):
    """For each row its index, and its elements as an index into x."""
    for row, members in reference.rows(x.shape, **where).items():
        yield row, tuple(np.array(members).T)


def weighted_error(x, approx, weights=1.0):
    return float((weights * (x.astype(np.float64) - approx.astype(np.float64)) ** 2).sum())


# ---------------------------------------------------------------- scales and signs


@pytest.mark.parametrize("where", few(GRANULARITIES, {"channel_axis": 1}, {"group_size": 4}))
@pytest.mark.parametrize("solver", few(SOLVERS, "greedy", "alternating"))
@pytest.mark.parametrize("weighted", [False, True])
def test_scales_are_of_least_squares(xp, host, rng, where, solver, weighted):
    if solver == "greedy" and weighted:
        return
    x = rng.standard_normal((4, 3, 8)).astype(np.float32)
    importance = rng.random(x.shape).astype(np.float32) if weighted else None
    code = cubin.quantize(
        xp.asarray(x), 4, solver=solver, precisions=(1, 2, 4), **where,
        importance=None if importance is None else xp.asarray(importance),
    )  # fmt: skip
    assert code.precisions == (1, 2, 4)
    assert type(code.tables) is type(xp.zeros(1))
    for precision in code.precisions:
        part = code.at(precision)
        signs, scales = host(part.signs), host(part.scales)
        for row, members in rows_of(x, where):
            of_row = signs[(slice(None), *members)]
            weights = None if importance is None else importance[members]
            expected, error = least_squares(x[members], of_row, weights)
            approx = scales[(slice(None), *row)] @ of_row
            found = weighted_error(x[members], approx, 1 if weights is None else weights)
            assert found <= error * (1 + 1e-5) + 1e-10
            if np.linalg.matrix_rank(of_row) == precision:
                np.testing.assert_allclose(scales[(slice(None), *row)], expected, atol=2e-6)


@pytest.mark.parametrize("solver", SOLVERS[:2])
@pytest.mark.parametrize("where", few(GRANULARITIES, {"channel_axis": 0}))
def test_added_levels_take_the_sign_of_the_residual(solver, where, rng):
    """Level by level, after a fit of all levels so far."""
    x = rng.standard_normal((4, 3, 8))
    code = cubin.quantize(x, 6, solver=solver, precisions=(2, 3, 6), **where)
    signs = code.signs
    for _, members in rows_of(x, where):
        of_row = signs[(slice(None), *members)].astype(np.float64)
        for level in range(2, 6):
            scales, _ = least_squares(x[members], of_row[:level])
            residual = x[members] - scales @ of_row[:level]
            clear = np.abs(residual) > 1e-12
            np.testing.assert_array_equal(of_row[level][clear], np.sign(residual)[clear])


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_first_precision_is_the_solver_alone(solver, xp, host, rng):
    x = xp.asarray(rng.standard_normal((6, 40)))
    first = cubin.quantize(x, 4, solver=solver, precisions=(2, 4), channel_axis=0).at(2)
    alone = cubin.quantize(x, 2, solver=solver, channel_axis=0)
    if solver == "greedy":  # its scales are fitted
        np.testing.assert_array_equal(host(first.signs), host(alone.signs))
        assert cubin.errors.relative_mse(x, first.dequantize()) < cubin.errors.relative_mse(
            x, alone.dequantize()
        )
    else:
        assert first == alone


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_error_falls_with_every_precision(solver, weighted, rng):
    """Row by row, and it is never above that of signs of the residual alone."""
    if solver == "greedy" and weighted:
        return
    x = rng.standard_normal((30, 60))
    weights = rng.random(x.shape) + 0.01 if weighted else np.ones(x.shape)
    precisions = (1, 2, 3, 5, 7)
    code = cubin.quantize(
        x, 7, solver=solver, precisions=precisions, channel_axis=0,
        importance=weights if weighted else None,
    )  # fmt: skip
    errors = np.array([
        [weighted_error(x[i], code.at(p).dequantize()[i], weights[i]) for p in precisions]
        for i in range(len(x))
    ])  # fmt: skip
    assert (np.diff(errors, axis=1) < 0).all()
    for i, row in enumerate(x):
        signs = code.signs[:, i].astype(np.float64)
        for (low, high), found in zip(itertools.pairwise(precisions), errors[i][1:], strict=True):
            chain = signs[:low]
            for _ in range(low, high):
                scales, _ = least_squares(row, chain, weights[i])
                chain = np.vstack([chain, np.where(row - scales @ chain > 0, 1.0, -1.0)])
            assert found <= least_squares(row, chain, weights[i])[1] * (1 + 1e-9)


def test_renewed_codes_are_the_nearest_sums(rng):
    """Once the error stops falling, no element has a nearer sum of its added levels."""
    x = rng.standard_normal((5, 50))
    code = cubin.quantize(
        x, 4, solver="alternating", iterations=None, precisions=(2, 4), channel_axis=0
    )
    scales, signs = code.scales, code.signs.astype(np.float64)
    for i, row in enumerate(x):
        below = scales[:2, i] @ signs[:2, i]
        sums = [pair @ scales[2:, i] for pair in itertools.product((-1.0, 1.0), repeat=2)]
        nearest = np.abs((row - below)[:, None] - sums).min(axis=1)
        found = np.abs(row - below - scales[2:, i] @ signs[2:, i])
        np.testing.assert_allclose(found, nearest, atol=1e-6)


def test_more_iterations_end_lower(rng):
    """Renewing codes is worth something, on every row that it changes."""
    x = rng.standard_normal((40, 200))
    errors = []
    for iterations in (0, 2, None):
        code = cubin.quantize(
            x, 4, solver="alternating", iterations=iterations, precisions=(2, 4), channel_axis=0
        )
        errors.append(float(cubin.errors.relative_mse(x, code.dequantize())))
    assert errors[0] > 1.02 * errors[1]
    assert errors[1] > errors[2]


def test_ties(xp, host):
    """Where nothing is left, the greedy sign is -1, and the others mirror: -1 only where x > 0."""
    x = np.array([2.0, 0.0, -2.0, 0.0])
    for solver, expected in (("optimal", [-1, 1, 1, 1]), ("greedy", [-1, -1, -1, -1])):
        code = cubin.quantize(xp.asarray(x), 3, solver=solver, precisions=(2, 3))
        np.testing.assert_array_equal(host(code.at(2).dequantize()), x)
        np.testing.assert_array_equal(host(code.signs)[2], expected)
        np.testing.assert_array_equal(host(code.dequantize()), x)


small = numpy_strategies.arrays(
    np.float64,
    st.tuples(st.integers(1, 3), st.integers(1, 9)),
    elements=st.integers(-6, 6).map(float) | st.floats(-8, 8, width=16),
)


@settings(max_examples=60)
@given(small, st.sampled_from(SOLVERS), st.sampled_from([(1, 2), (1, 3), (2, 3, 4), (3,)]))
def test_any_small_array(x, solver, precisions):
    code = cubin.quantize(x, precisions[-1], solver=solver, precisions=precisions, channel_axis=0)
    power = float((x**2).sum())
    last = math.inf
    for precision in precisions:
        part = code.at(precision)
        approx = part.dequantize()
        error = weighted_error(x, approx)
        assert error <= last + 1e-9 * power
        last = error
        for i, row in enumerate(x):
            least = least_squares(row, part.signs[:, i])[1]
            assert weighted_error(row, approx[i]) <= least + 1e-9 * power
    # The codes of -x are those of x, negated; the greedy ones are not where a residual is 0.
    if solver != "greedy":
        opposite = cubin.quantize(
            -x, precisions[-1], solver=solver, precisions=precisions, channel_axis=0
        )
        np.testing.assert_array_equal(opposite.signs[:, x != 0], -code.signs[:, x != 0])
        np.testing.assert_array_equal(opposite.tables, code.tables)


# ---------------------------------------------------------------- layouts, sizes, dtypes


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_row_is_coded_as_if_alone(solver, rng, monkeypatch):
    """Whatever the blocks, the threads and the memory order: to the bit."""
    x = rng.standard_normal((50, 64))
    given_to = {"solver": solver, "precisions": (1, 3), "iterations": None}
    together = cubin.quantize(x, 3, channel_axis=0, **given_to)
    for i in (0, 17, 49):
        alone = cubin.quantize(x[i], 3, **given_to)
        for precision in (1, 3):
            ours, part = alone.at(precision), together.at(precision)
            np.testing.assert_array_equal(ours.scales, part.scales[:, i])
            np.testing.assert_array_equal(ours.signs, part.signs[:, i])
    columns = cubin.quantize(np.asfortranarray(x), 3, channel_axis=0, **given_to)
    assert columns == together
    across = cubin.quantize(np.ascontiguousarray(x.T), 3, channel_axis=1, **given_to)
    np.testing.assert_array_equal(across.tables, together.tables)
    np.testing.assert_array_equal(across.signs.transpose(0, 2, 1), together.signs)
    monkeypatch.setattr(blocks, "BLOCK", 64 * 7)
    assert cubin.quantize(x, 3, channel_axis=0, **given_to) == together


def test_rows_longer_than_a_block(rng):
    x = rng.standard_normal(2 * blocks.BLOCK + 77).astype(np.float32)
    code = cubin.quantize(x, 3, solver="alternating", precisions=(2, 3))
    signs = code.signs.astype(np.float64)
    expected, _ = least_squares(x, signs)
    np.testing.assert_allclose(code.scales, expected, rtol=1e-5)
    assert float(cubin.errors.relative_mse(x, code.dequantize())) < 0.07


def test_both_libraries_find_the_same(device, host, rng):
    x = rng.standard_normal((3, 20))
    weights = rng.random(x.shape)
    for solver, importance in itertools.product(SOLVERS, (None, weights)):
        if solver == "greedy" and importance is not None:
            continue
        given_to = {"solver": solver, "precisions": (1, 2, 4), "channel_axis": 0}
        ours = cubin.quantize(x, 4, importance=importance, **given_to)
        theirs = cubin.quantize(
            device.asarray(x), 4, **given_to,
            importance=None if importance is None else device.asarray(importance),
        )  # fmt: skip
        np.testing.assert_array_equal(host(theirs.planes), ours.planes)
        np.testing.assert_allclose(host(theirs.tables), ours.tables, rtol=1e-12)
        np.testing.assert_allclose(host(theirs.scales), ours.scales, rtol=1e-12)
        assert theirs.to_host().at(2).planes.tolist() == ours.at(2).planes.tolist()


@pytest.mark.parametrize("dtype", few(DTYPES, np.float16, bfloat16))
@pytest.mark.parametrize("solver", few(SOLVERS, "greedy", "alternating"))
def test_dtypes(xp, host, rng, dtype, solver):
    x = rng.standard_normal((4, 64)).astype(dtype)
    code = cubin.quantize(xp.asarray(x), 4, solver=solver, precisions=(1, 2, 4), channel_axis=0)
    assert code.dtype == code.tables.dtype == x.dtype
    last = math.inf
    for precision in (1, 2, 4):
        part = code.at(precision)
        assert part.dtype == part.dequantize().dtype == x.dtype
        approx = host(part.dequantize()).astype(np.float64)
        error = weighted_error(x, approx)
        assert error < last
        last = error
        scales, signs = (host(a).astype(np.float64) for a in (part.scales, part.signs))
        np.testing.assert_allclose(approx, (scales[:, :, None] * signs).sum(axis=0), rtol=0.02)


@pytest.mark.parametrize("solver", few(SOLVERS, "greedy", "alternating"))
def test_sizes(solver, xp, host):
    for x, where in (
        (np.float64(1.5), {}),
        (np.zeros((0, 3)), {"channel_axis": 1}),
        (np.zeros((3, 0)), {"channel_axis": 0}),
        (np.zeros(0), {}),
        (np.zeros((2, 5)), {"channel_axis": 0}),
        (np.full((2, 5), -2.0), {"channel_axis": 0}),
        (np.array([[1e-300, -3e-300], [1e300, 4e299]]), {"channel_axis": 0}),
    ):
        code = cubin.quantize(xp.asarray(x), 3, solver=solver, precisions=(1, 2, 3), **where)
        assert code.tables.shape == (3, *code.scales.shape[1:])
        np.testing.assert_allclose(host(code.dequantize()), x, rtol=1e-6)
        assert np.isfinite(host(code.tables)).all()
        if np.ptp(np.abs(x)) == 0 if np.size(x) else True:
            np.testing.assert_allclose(host(code.at(1).dequantize()), x)


def test_rows_that_are_not_finite(xp, host, rng):
    x = rng.standard_normal((4, 30))
    x[1, 3], x[2, 4] = np.nan, -np.inf
    with pytest.raises(ValueError, match=r"row \(1,\) of its 4 rows has NaN or infinity"):
        cubin.quantize(xp.asarray(x), 3, precisions=(2, 3), channel_axis=0)
    for solver in SOLVERS:
        given_to = {"solver": solver, "precisions": (2, 3), "channel_axis": 0}
        code = cubin.quantize(xp.asarray(x), 3, check_finite=False, **given_to)
        clean = cubin.quantize(xp.asarray(x[[0, 3]]), 3, **given_to)
        for precision in (2, 3):
            found = host(code.at(precision).scales)
            assert not np.isfinite(found[:, 1:3]).any()
            np.testing.assert_array_equal(found[:, [0, 3]], host(clean.at(precision).scales))


# ---------------------------------------------------------------- a Gram matrix


def outputs_lost(x, approx, matrix):
    """The output error of each line."""
    lost = (x.astype(np.float64) - approx.astype(np.float64)).reshape(len(x), -1)
    return np.einsum("li,ij,lj->l", lost, matrix, lost)


def lost_by_signs(line, signs, levels, root):
    """The output error of a line whose added levels take the signs of the residual.

    The Gram matrix is the root times its transpose.
    """
    chain = signs.astype(np.float64)
    while True:
        scales = np.linalg.lstsq((chain @ root).T, line @ root, rcond=None)[0]
        residual = line - scales @ chain
        if len(chain) == levels:
            return float(((residual @ root) ** 2).sum())
        chain = np.vstack([chain, np.where(residual > 0, 1.0, -1.0)])


@pytest.fixture
def layer(rng):
    """Weights, and a Gram matrix of inputs that go together."""
    inputs = rng.standard_normal((64, 12)) @ rng.standard_normal((12, 12))
    return rng.standard_normal((7, 12)), cubin.Gram(12).add(inputs)


@pytest.mark.parametrize("where", [{"channel_axis": 0}, {"group_size": 4}])
@pytest.mark.parametrize("solver", SOLVERS[1:])
def test_with_a_gram_matrix(layer, solver, where):
    """The error of outputs falls, and signs of the residual alone are never better."""
    x, gram = layer
    precisions = (1, 2, 4)
    code = cubin.quantize(x, 4, solver=solver, gram=gram, precisions=precisions, **where)
    first = cubin.quantize(x, 1, solver=solver, gram=gram, **where)
    assert code.at(1) == first
    errors = [outputs_lost(x, code.at(p).dequantize(), gram.matrix) for p in precisions]
    assert (np.diff(errors, axis=0) < 0).all()
    if where == {"channel_axis": 0}:
        values, vectors = np.linalg.eigh(gram.matrix)
        root = vectors * np.sqrt(values.clip(0))
        for i, line in enumerate(x):
            signs = code.signs[:, i].astype(np.float64)
            for (low, high), lost in zip(itertools.pairwise(precisions), errors[1:], strict=True):
                by_signs = lost_by_signs(line, signs[:low], high, root)
                assert lost[i] <= by_signs * (1 + 1e-9)
            for precision in precisions:
                part = code.at(precision)
                of_line = part.signs[:, i].astype(np.float64)
                slope = of_line @ gram.matrix @ (line - part.scales[:, i] @ of_line)
                assert np.abs(slope).max() < 1e-8 * np.abs(of_line @ gram.matrix @ line).max()


def test_errors_are_carried_on(rng):
    """Codes that know of the inputs beat signs of the residual, and renewing them helps."""
    x = rng.standard_normal((32, 64))
    basis = np.linalg.qr(rng.standard_normal((64, 64)))[0]
    gram = cubin.Gram(64).add(np.diag(np.arange(1, 65) ** -0.5) @ basis.T)
    root = np.linalg.cholesky(gram.matrix)
    refined, alternating = (
        cubin.quantize(x, 3, solver=solver, precisions=(1, 3), channel_axis=0, gram=gram)
        for solver in ("refined", "alternating")
    )
    signs = sum(lost_by_signs(x[i], refined.at(1).signs[:, i], 3, root) for i in range(32))
    lost = [
        outputs_lost(x, code.dequantize(), gram.matrix).sum() for code in (refined, alternating)
    ]
    assert lost[0] < 0.9 * signs
    assert lost[1] < 0.9 * lost[0]


def test_a_gram_matrix_on_a_device(layer, device, host):
    x, gram = layer
    ours = cubin.quantize(x, 3, solver="alternating", gram=gram, precisions=(1, 3), channel_axis=0)
    inputs = np.linalg.cholesky(gram.matrix).T * np.sqrt(12)
    theirs = cubin.quantize(
        device.asarray(x), 3, solver="alternating", precisions=(1, 3), channel_axis=0,
        gram=cubin.Gram(12).add(device.asarray(inputs)),
    )  # fmt: skip
    np.testing.assert_array_equal(host(theirs.planes), ours.planes)
    np.testing.assert_allclose(host(theirs.tables), ours.tables, rtol=1e-6)


# ---------------------------------------------------------------- a shift


@pytest.mark.parametrize("where", [{"channel_axis": 0}, {"group_size": 4}])
@pytest.mark.parametrize("solver", few(SOLVERS, "greedy", "alternating"))
@pytest.mark.parametrize("kind", ["plain", "weighted", "gram"])
def test_every_precision_has_a_shift(xp, host, rng, where, solver, kind):
    if solver == "greedy" and kind != "plain":
        return
    x = rng.standard_exponential((5, 12))
    more, root = {}, np.eye(12)
    weights = rng.random(x.shape) if kind == "weighted" else np.ones(x.shape)
    if kind == "weighted":
        more["importance"] = xp.asarray(weights)
    if kind == "gram":
        inputs = rng.standard_normal((40, 12)) @ rng.standard_normal((12, 12))
        more["gram"] = cubin.Gram(12).add(xp.asarray(inputs))
        root = np.linalg.cholesky(inputs.T @ inputs / 40)
    given_to = {"solver": solver, "shift": True, **where, **more}
    code = cubin.quantize(xp.asarray(x), 4, precisions=(1, 2, 4), **given_to)
    if solver != "greedy":
        assert code.at(1) == cubin.quantize(xp.asarray(x), 1, **given_to)
    last = np.inf
    for precision in (1, 2, 4):
        part = code.at(precision)
        assert part.shift.shape == part.scales.shape[1:]
        lost = (x - host(part.dequantize())) * np.sqrt(weights) @ root
        errors = (lost**2).sum(axis=1)
        assert (errors < last).all()
        last = errors
        if kind == "gram" and "group_size" in where:
            continue  # groups are fitted one after the other
        signs = host(part.signs)
        for row, members in rows_of(x, where):
            columns = np.vstack([signs[(slice(None), *members)], np.ones(len(members[0]))])
            values = np.array([*host(part.scales)[(slice(None), *row)], host(part.shift)[row]])
            seen = columns @ root if kind == "gram" else columns * np.sqrt(weights[members])
            wanted = x[members] @ root if kind == "gram" else x[members] * np.sqrt(weights[members])
            best = np.linalg.lstsq(seen.T, wanted, rcond=None)[0]
            errors = [((wanted - v @ seen) ** 2).sum() for v in (values, best)]
            assert errors[0] <= errors[1] * (1 + 1e-6) + 1e-20


@pytest.mark.parametrize("weighted", [False, True])
def test_a_shift_is_fitted_together_with_the_scales(xp, host, rng, weighted):
    x = rng.standard_exponential((6, 40)) + 1000
    weights = rng.random(x.shape) if weighted else None
    code = rng.integers(0, 2, x.shape).astype(np.uint16)
    levels = Residuals(
        xp.asarray(x), xp.asarray(code), 1, None if weights is None else xp.asarray(weights),
        mirrored=True, shifted=True,
    )  # fmt: skip
    last = np.inf
    for precision in (1, 2, 4):
        extended(levels, precision, 5)
        table, codes = host(levels.table()), host(levels.code)
        assert table.shape == (precision + 1, 6)
        np.testing.assert_array_equal(codes & 1, code)
        signs = (codes >> np.arange(precision)[:, None, None] & 1) * 2.0 - 1
        errors = []
        for i, row in enumerate(x):
            columns = np.vstack([signs[:, i], np.ones(40)])
            of_row = None if weights is None else weights[i]
            _, least = least_squares(row, columns, of_row)
            approx = table[:, i] @ columns
            errors.append(weighted_error(row, approx, 1.0 if of_row is None else of_row))
            assert errors[-1] <= least * (1 + 1e-6)
        assert (np.array(errors) < last).all()
        last = np.array(errors)


# ---------------------------------------------------------------- codes


@pytest.fixture
def code(rng):
    x = rng.standard_normal((6, 40)).astype(np.float32)
    return cubin.quantize(x, 4, solver="refined", precisions=(2, 3, 4), channel_axis=0)


def with_shift(code):
    """The same levels with made-up shifts."""
    tables = np.concatenate([
        code.tables[:2], np.full((1, 6), 7, np.float32),
        code.tables[2:], np.full((1, 6), 8, np.float32),
    ])  # fmt: skip
    return BinaryCode(
        code.scales, code.planes, 4, shape=code.shape, channel_axis=0,
        shift=np.full(6, 9, np.float32), precisions=code.precisions, tables=tables,
    )  # fmt: skip


def same(one, other):
    """Whether codes have the same precisions, with the same scales."""
    return one == other and one.precisions == other.precisions and all(
        one.at(p) == other.at(p) for p in one.precisions or ()
    )  # fmt: skip


def test_precisions_share_the_planes(code):
    for precision in code.precisions:
        part = code.at(precision)
        assert np.shares_memory(part.planes, code.planes)
        assert part.planes.shape == (precision, 5, 6)
        assert part.bits == precision
        assert part.precisions is None
        assert part.tables is None
    assert code.at(4) == code
    np.testing.assert_array_equal(code.tables[:2], code.at(2).scales)
    np.testing.assert_array_equal(code.tables[2:], code.at(3).scales)
    np.testing.assert_array_equal(code.dequantize(), code.at(4).dequantize())
    assert "precisions: 2, 3, 4" in repr(code)
    assert "2, 3, 4" in code._repr_html_()
    assert "precisions" not in repr(code.at(3))


def test_other_precisions_are_refused(code, rng):
    for wrong in (0, 1, 5, -2):
        with pytest.raises(ValueError, match=f"got {wrong}; it has 2, 3, 4"):
            code.at(wrong)
    with pytest.raises(TypeError, match="precision must be an integer"):
        code.at(2.0)
    with pytest.raises(ValueError, match="got 2; it has none"):
        cubin.quantize(rng.standard_normal(9), 2).at(2)


def test_truncating(code):
    """To a precision: its scales, with those of the lower ones. Else as ever, nothing is fitted."""
    cut = code.truncate(3)
    assert cut == code.at(3)
    assert cut.precisions == (2, 3)
    assert cut.at(2) == code.at(2)
    assert code.truncate(2).precisions == (2,)
    assert code.truncate(2).at(2) == code.at(2)
    assert same(code.truncate(4), code)
    single = code.truncate(1)
    assert single.precisions is None
    np.testing.assert_array_equal(single.scales, code.scales[:1])


def test_shifts_of_precisions(code, tmp_path):
    shifted = with_shift(code)
    for precision, shift in zip((2, 3, 4), (7, 8, 9), strict=True):
        part = shifted.at(precision)
        np.testing.assert_array_equal(part.scales, code.at(precision).scales)
        np.testing.assert_array_equal(part.shift, np.full(6, shift, np.float32))
        expected = code.at(precision).dequantize() + shift
        np.testing.assert_allclose(part.dequantize(), expected, atol=2e-6)
    assert shifted.truncate(1).shift[0] == 9
    assert same(shifted.truncate(3).truncate(2), shifted.truncate(2))
    for suffix in ("npz", "safetensors"):
        shifted.save(tmp_path / f"code.{suffix}")
        assert same(BinaryCode.load(tmp_path / f"code.{suffix}"), shifted)
    scalar = BinaryCode(
        np.ones(2), np.zeros((2, 1, 1), np.uint8), 2, shape=(3,), shift=np.float64(1),
        precisions=(1, 2), tables=np.array([3.0, 5.0]),
    )  # fmt: skip
    np.testing.assert_array_equal(scalar.at(1).dequantize(), np.full(3, 2.0))
    assert isinstance(scalar.at(1).shift, np.ndarray)


def test_parts_and_copies_keep_the_precisions(code):
    for other in (code, with_shift(code)):
        for part in (copy.copy(other), copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
            assert same(part, other)
        lines = other[1:4]
        assert lines.precisions == other.precisions
        for precision in other.precisions:
            np.testing.assert_array_equal(
                lines.at(precision).dequantize(), other.at(precision).dequantize()[1:4]
            )


@pytest.mark.parametrize("where", GRANULARITIES)
def test_lines_of_every_granularity(where, xp, host, rng):
    x = xp.asarray(rng.standard_normal((9, 3, 8)))
    whole = cubin.quantize(x, 2, precisions=(1, 2), **where)
    for precision in (1, 2):
        np.testing.assert_array_equal(
            host(whole[2:5].at(precision).dequantize()), host(whole.at(precision).dequantize()[2:5])
        )


def test_moves_between_host_and_device(code, device):
    for other in (code, with_shift(code)):
        moved = other.to_device()
        assert type(moved.tables) is type(device.zeros(1))
        assert same(moved.to_host(), other)
        np.testing.assert_array_equal(moved.at(3).dequantize().get(), other.at(3).dequantize())


def test_sizes_of_codes(code):
    """All tables count."""
    plain = cubin.quantize(np.zeros(code.shape, np.float32), 4, channel_axis=0)
    assert code.effective_bits == pytest.approx(plain.effective_bits + 32 * 5 / 40)
    assert code.nbytes == plain.nbytes + 4 * 5 * 6
    shifted = with_shift(code)
    assert shifted.effective_bits == pytest.approx(code.effective_bits + 32 * 3 / 40)
    assert shifted.nbytes == code.nbytes + 4 * 3 * 6
    assert code.at(2).effective_bits == pytest.approx(2 + 32 * 2 / 40)


def test_products_of_precisions(code, rng):
    x = rng.standard_normal((3, 40)).astype(np.float32)
    for precision in code.precisions:
        part = code.at(precision)
        np.testing.assert_allclose(
            cubin.products.linear(x, part), x @ part.dequantize().T, atol=1e-4
        )


def test_equality_is_that_of_the_last_precision(code):
    plain = BinaryCode(code.scales, code.planes, 4, shape=code.shape, channel_axis=0)
    assert plain == code
    assert plain.precisions is None


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_files_keep_all_tables(suffix, dtype, rng, tmp_path):
    path = tmp_path / f"code.{suffix}"
    x = rng.standard_normal((6, 5, 8)).astype(dtype)
    for where, precisions in itertools.product(GRANULARITIES, [(1, 3), (3,)]):
        code = cubin.quantize(x, 3, precisions=precisions, **where)
        code.save(path)
        loaded = BinaryCode.load(path)
        assert same(loaded, code)
        assert loaded.effective_bits == code.effective_bits


def test_files_of_many_codes(code, rng, tmp_path):
    from cubin.weights.codes import load_codes, save_codes

    codes = {
        "a": code,
        "b": with_shift(code),
        "c": cubin.quantize(rng.standard_normal(7), 2),
        "d": cubin.quantize(rng.standard_normal(7).astype(bfloat16), 16, precisions=range(1, 17)),
    }
    BinaryCode.save_all(tmp_path / "all.safetensors", codes)
    save_codes(
        tmp_path / "one-by-one.safetensors", codes.items(), {n: c.shape for n, c in codes.items()}
    )
    for path in tmp_path.iterdir():
        for found in (BinaryCode.load_all(path), dict(load_codes(path))):
            assert all(same(found[name], code) for name, code in codes.items())


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_files_take_what_effective_bits_promise(suffix, rng, tmp_path):
    x = rng.standard_normal((1000, 1000)).astype(np.float32)
    code = cubin.quantize(x, 4, precisions=(2, 3, 4), group_size=50)
    code.save(tmp_path / f"code.{suffix}")
    bits = 8 * (tmp_path / f"code.{suffix}").stat().st_size
    assert bits == pytest.approx(code.effective_bits * x.size, rel=0.05)
    assert code.effective_bits == pytest.approx(4 + 32 * 9 / 50)


@pytest.mark.parametrize(
    ("layout", "tables"),
    [
        ({"precisions": [2, 3, 4]}, None),
        ({}, "as they are"),
        ({"precisions": [3, 2, 4]}, "as they are"),
        ({"precisions": [2, 3, 5]}, "as they are"),
        ({"precisions": [2, 4]}, "as they are"),
        ({"precisions": [2.0, 3, 4]}, "as they are"),
        ({"precisions": "234"}, "as they are"),
        ({"precisions": 4}, "as they are"),
        ({"precisions": [2, 3, 4], "shift": True}, "as they are"),
        ({"precisions": [2, 3, 4]}, np.float64),
        ({"precisions": [2, 3, 4]}, np.uint8),
    ],
)
def test_forged_files_are_refused(code, layout, tables, tmp_path):
    from cubin.codes import files

    of_file, held = files.pack(code)
    del of_file["precisions"]
    if tables is None:
        del held["tables"]
    elif tables != "as they are":
        held["tables"] = held["tables"].astype(tables)
    forged = {"": (of_file | layout, held)}
    with files.replacing(tmp_path / "code.safetensors") as file:
        files._write_tensors(file, forged)
    with pytest.raises(ValueError, match="no intact BinaryCode"):
        BinaryCode.load(tmp_path / "code.safetensors")


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("precisions", "bits", "error", "message"),
    [
        ((), 4, ValueError, r"must ascend from 1 or more and end on bits = 4, got \(\)"),
        ((2, 3), 4, ValueError, r"end on bits = 4, got \(2, 3\)"),
        ((3, 2, 4), 4, ValueError, "must ascend"),
        ((2, 2, 4), 4, ValueError, "must ascend"),
        ((0, 4), 4, ValueError, "from 1 or more"),
        ((-1, 4), 4, ValueError, "from 1 or more"),
        ((2.0, 4), 4, TypeError, "each of precisions must be an integer"),
        ((True, 4), 4, TypeError, "each of precisions must be an integer"),
        ("24", 4, TypeError, "each of precisions must be an integer"),
        (4, 4, TypeError, "precisions must be a sequence"),
        ((2, 4), [[4], [4]], ValueError, r"got a map of shape \(2, 1\)"),
        ((1,), 0, ValueError, "end on bits = 0"),
    ],
)
def test_arguments(precisions, bits, error, message, rng):
    x = rng.standard_normal((2, 9))
    with pytest.raises(error, match=message):
        cubin.quantize(x, bits, precisions=precisions, channel_axis=0)


def test_arguments_of_other_kinds(rng):
    """Any sequence of integers will do, and the limits are those of the solvers."""
    x = rng.standard_normal(9)
    for precisions in ([1, 3], range(1, 4, 2), np.array([1, 3]), (np.int8(1), np.uint8(3))):
        code = cubin.quantize(x, 3, precisions=precisions)
        assert code.precisions == (1, 3)
        assert all(type(p) is int for p in code.precisions)
    with pytest.raises(ValueError, match=r"0 \.\. 8 with solver='optimal', got 9"):
        cubin.quantize(x, 9, solver="optimal", precisions=(1, 9))
    assert cubin.quantize(x, 16, precisions=(1, 16)).precisions == (1, 16)


def test_arguments_of_codes(code):
    given_to = {"shape": code.shape, "channel_axis": 0}
    parts = (code.scales, code.planes, 4)
    for more in ({"precisions": (2, 3, 4)}, {"tables": code.tables}):
        with pytest.raises(ValueError, match="go together"):
            BinaryCode(*parts, **given_to, **more)
    for tables in (code.tables[:4], code.tables[:, :5], code.tables[0]):
        with pytest.raises(ValueError, match=r"precisions \(2, 3, 4\) need \(5, 6\)"):
            BinaryCode(*parts, **given_to, precisions=(2, 3, 4), tables=tables)
    with pytest.raises(TypeError, match="tables must be float32"):
        BinaryCode(*parts, **given_to, precisions=(2, 3, 4), tables=code.tables.astype(np.float64))
    with pytest.raises(ValueError, match="must ascend"):
        BinaryCode(*parts, **given_to, precisions=(3, 2, 4), tables=code.tables)
    with pytest.raises(ValueError, match="got a map"):
        BinaryCode(
            code.scales, code.planes, np.full((6, 1), 4), **given_to, precisions=(2, 3, 4),
            tables=code.tables,
        )  # fmt: skip


def test_arrays_of_pytorch(rng):
    require("torch")
    import torch

    x = torch.from_numpy(rng.standard_normal((4, 16)))
    code = cubin.quantize(x, 3, precisions=(1, 3), channel_axis=0)
    expected = cubin.quantize(x.numpy(), 3, precisions=(1, 3), channel_axis=0)
    for precision in (1, 3):
        part = code.at(precision)
        assert isinstance(part.scales, torch.Tensor)
        assert isinstance(code.truncate(precision).tables, torch.Tensor)
        np.testing.assert_array_equal(
            part.dequantize().numpy(), expected.at(precision).dequantize()
        )
    assert isinstance(code.tables, torch.Tensor)
    again = BinaryCode(
        code.scales, code.planes, 3, shape=(4, 16), channel_axis=0, precisions=(1, 3),
        tables=code.tables,
    )  # fmt: skip
    assert same(again, code)
