from __future__ import annotations

import csv
import dataclasses
import math

import matplotlib as mpl
import numpy as np
import pytest

import cubin
from cubin.analysis import ErrorTable, draw_error_per_bit_width, error_per_bit_width
from cubin.analysis.plot import new_figure

mpl.use("Agg")


@pytest.fixture
def weights(rng):
    return {
        "conv": rng.normal(size=(8, 4, 3, 3)).astype(np.float32),
        "dense": rng.laplace(0, 3, size=(16, 32)),
    }


@pytest.fixture
def table(weights):
    return error_per_bit_width(weights, bits=[1, 2, 4])


def test_rows_are_the_errors_of_multibit(table, weights):
    assert len(table.rows) == 6
    for row in table.rows:
        x = weights[row.name]
        y = cubin.multibit(x, row.bits, channel_axis=0)
        code = cubin.quantize(x, row.bits, channel_axis=0)
        assert (row.shape, row.size, row.solver) == (x.shape, x.size, "greedy")
        assert row.relative_mse == float(cubin.errors.relative_mse(x, y))
        assert row.sqnr_db == float(cubin.errors.sqnr_db(x, y))
        assert row.cosine_similarity == float(cubin.errors.cosine_similarity(x, y))
        assert row.max_abs_error == float(cubin.errors.max_abs_error(x, y))
        assert row.payload_bits == row.bits
        assert row.effective_bits == code.effective_bits
        assert row.compression == 32 / code.effective_bits


def test_overall_is_the_error_of_all_arrays_as_one(table, weights):
    for row in table.overall():
        pairs = [(x, cubin.multibit(x, row.bits, channel_axis=0)) for x in weights.values()]
        x = np.concatenate([x.ravel() for x, _ in pairs])
        y = np.concatenate([y.ravel() for _, y in pairs])
        assert row.name == "overall"
        assert row.size == x.size
        assert row.relative_mse == pytest.approx(float(cubin.errors.relative_mse(x, y)))
        assert row.cosine_similarity == pytest.approx(float(cubin.errors.cosine_similarity(x, y)))
        assert row.max_abs_error == float(cubin.errors.max_abs_error(x, y))


def test_overall_averages_bits_over_elements(weights):
    rows = error_per_bit_width(weights, bits=[2]).rows
    payloads, effective = (1.25, 3.0), (1.5, 4.0)
    mapped = [
        dataclasses.replace(row, payload_bits=payload, effective_bits=whole)
        for row, payload, whole in zip(rows, payloads, effective, strict=True)
    ]
    [overall] = ErrorTable(mapped).overall()
    sizes = [row.size for row in rows]
    assert sizes[0] != sizes[1]
    assert overall.payload_bits == pytest.approx(np.average(payloads, weights=sizes))
    assert overall.effective_bits == pytest.approx(np.average(effective, weights=sizes))
    assert overall.compression == pytest.approx(32 / overall.effective_bits)


def test_overall_of_zeros():
    [row] = error_per_bit_width(np.zeros((2, 3)), bits=[1]).overall()
    assert (row.relative_mse, row.sqnr_db, row.cosine_similarity) == (0, math.inf, 1)


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_squares_that_float64_cannot_hold(size):
    with pytest.raises(ValueError, match=r"array 'x': .*overflow or vanish"):
        error_per_bit_width(np.array([[size, -2 * size]]), bits=[1])


def test_kinds_of_arrays(weights, rng):
    one = error_per_bit_width(rng.normal(size=(4, 5)), bits=1)
    assert [row.name for row in one.rows] == ["x"]
    several = error_per_bit_width(list(weights.values()), bits=[1])
    assert [row.name for row in several.rows] == ["0", "1"]
    lazily = error_per_bit_width(
        ((name, x, x.ndim - 1) for name, x in weights.items()), bits=iter([1])
    )
    for row in lazily.rows:
        x = weights[row.name]
        y = cubin.multibit(x, 1, channel_axis=x.ndim - 1)
        assert row.relative_mse == float(cubin.errors.relative_mse(x, y))
    groups = error_per_bit_width(weights["dense"], bits=[2], group_size=8)
    y = cubin.multibit(weights["dense"], 2, group_size=8)
    assert groups.rows[0].relative_mse == float(cubin.errors.relative_mse(weights["dense"], y))
    whole = error_per_bit_width(weights["dense"], bits=[2], channel_axis=None)
    y = cubin.multibit(weights["dense"], 2)
    assert whole.rows[0].relative_mse == float(cubin.errors.relative_mse(weights["dense"], y))


def test_a_generator_is_consumed_one_array_at_a_time(rng):
    alive = []

    def lazily():
        for number in range(3):
            alive.append(number)
            assert len(alive) == number + 1
            yield str(number), rng.normal(size=(4, 4))

    assert len(error_per_bit_width(lazily(), bits=[1]).rows) == 3


def test_csv(table, tmp_path):
    table.to_csv(tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 9
    assert lines[0]["shape"] == "8x4x3x3"
    assert float(lines[0]["relative_mse"]) == table.rows[0].relative_mse
    assert lines[-1]["name"] == "overall"


def test_a_table_that_fails_leaves_the_file(table, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("older results")
    broken = ErrorTable([dataclasses.replace(table.rows[0], payload_bits=None)])
    with pytest.raises(TypeError):
        broken.to_csv(path)
    assert path.read_text() == "older results"


def test_pandas(table):
    pandas = pytest.importorskip("pandas")
    frame = table.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["relative_mse"].tolist() == [row.relative_mse for row in table.rows]


def test_text_and_html(table):
    lines = str(table).splitlines()
    assert len(lines) == 10
    assert "SQNR [dB]" in lines[0]
    assert lines[1].split()[:4] == ["conv", "8x4x3x3", "greedy", "1"]
    page = table._repr_html_()
    assert page.count("<tr>") == 10
    long = ErrorTable(table.rows * 20)
    assert "more rows" in long._repr_html_()
    assert "&lt;b&gt;" in error_per_bit_width({"<b>": np.ones((2, 2))}, bits=[1])._repr_html_()


def test_plot(table):
    figure = table.plot()
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {
        "greedy: median and quartiles of 2 arrays",
        "Lloyd-Max, Gaussian",
        "Shannon bound, Gaussian",
    }
    medians = [
        np.median([row.relative_mse for row in table.rows if row.bits == bits])
        for bits in (1, 2, 4)
    ]
    greedy = lines["greedy: median and quartiles of 2 arrays"]
    np.testing.assert_allclose(greedy.get_ydata(), medians)
    np.testing.assert_allclose(
        lines["Shannon bound, Gaussian"].get_ydata(), [0.25, 0.0625, 4.0**-4]
    )


@pytest.mark.parametrize("bits", [[2], [1, 2, 4]])
def test_the_legend_hides_no_curve_and_fits(weights, bits):
    solvers = ("greedy", "refined", "alternating", "optimal")
    figure = error_per_bit_width(weights, bits, solvers).plot()
    figure.draw_without_rendering()
    (axes,) = figure.axes
    legend = axes.get_legend().get_window_extent()
    assert not legend.overlaps(axes.get_window_extent())
    assert not legend.overlaps(axes.xaxis.label.get_window_extent())
    assert 0 <= legend.x0 < legend.x1 <= figure.bbox.x1
    assert legend.y0 >= 0
    assert all(line.get_marker() not in ("", "None") for line in axes.lines)


def test_medians_count_exact_approximations():
    arrays = [np.ones((3, 4)), np.eye(3), np.arange(8.0).reshape(2, 4)]
    table = error_per_bit_width(arrays, bits=[1])
    _, axes = new_figure()
    draw_error_per_bit_width(axes, table)
    assert axes.lines[0].get_ydata() == np.median([row.relative_mse for row in table.rows])


def test_plot_of_exact_approximations():
    table = error_per_bit_width(np.ones((3, 4)), bits=[0, 1])
    _, axes = new_figure()
    assert draw_error_per_bit_width(axes, table) is axes
    assert axes.get_ylim()[0] > 1e-3


def test_arguments(rng):
    x = rng.normal(size=(4, 6))
    with pytest.raises(ValueError, match="bits"):
        error_per_bit_width(x, bits=[17])
    with pytest.raises(TypeError, match="bits"):
        error_per_bit_width(x, bits=[1.5])
    with pytest.raises(ValueError, match="solver"):
        error_per_bit_width(x, solvers=["magic"])
    for axis in (0, (0, 1)):
        with pytest.raises(ValueError, match="group_size=3 exclude each other"):
            error_per_bit_width({"w": x}, channel_axis=axis, group_size=3)
    with pytest.raises(ValueError, match="array 'w': group_size 4"):
        error_per_bit_width({"w": x}, group_size=4)
    with pytest.raises(TypeError, match="array 'w'"):
        error_per_bit_width({"w": x.astype(int)})
    with pytest.raises(ValueError, match=r"array 'w'.*NaN"):
        error_per_bit_width({"w": x * np.nan})
    with pytest.raises(ValueError, match="tuple of 1"):
        error_per_bit_width([(x,)])
