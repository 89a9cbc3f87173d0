from __future__ import annotations

import copy
import csv
import dataclasses
import functools
import math
import multiprocessing
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np
import pytest

import cubin
from cubin.analysis import ErrorRow, ErrorTable, draw_error_per_bit_width, error_per_bit_width
from cubin.analysis.plot import new_figure

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _no_open_figures():
    yield
    plt.close("all")


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
    for size in (8, 7):  # 7 leaves shorter groups
        groups = error_per_bit_width(weights["dense"], bits=[2], group_size=size)
        y = cubin.multibit(weights["dense"], 2, group_size=size)
        known = float(cubin.errors.relative_mse(weights["dense"], y))
        assert groups.rows[0].relative_mse == known
    whole = error_per_bit_width(weights["dense"], bits=[2], channel_axis=None)
    y = cubin.multibit(weights["dense"], 2)
    assert whole.rows[0].relative_mse == float(cubin.errors.relative_mse(weights["dense"], y))


def test_arrays_of_either_library_give_one_table(xp, rng):
    x = rng.normal(size=(4, 6))
    options = {"bits": [1, lambda w: 1 + (w > 0)], "solvers": ["refined", lambda w, bits: w / 2]}
    table = error_per_bit_width({"w": xp.asarray(x), "i": xp.asarray(x > 0)}, **options)
    on_host = error_per_bit_width({"w": x}, **options)
    for row, expected in zip(table.rows, on_host.rows, strict=True):
        assert row.relative_mse == pytest.approx(expected.relative_mse)
        assert row.payload_bits == expected.payload_bits
        assert type(row.relative_mse) is type(row.payload_bits) is float
    assert [name for name, _ in table.skipped] == ["i"]


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
    figure = table.plot().figure
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {
        "greedy: median and quartiles of 2 arrays",
        "_greedy over effective bits",
        "Lloyd-Max, Gaussian",
        "Shannon bound, Gaussian",
    }
    medians = [
        np.median([row.relative_mse for row in table.rows if row.bits == bits])
        for bits in (1, 2, 4)
    ]
    greedy = lines["greedy: median and quartiles of 2 arrays"]
    np.testing.assert_allclose(greedy.get_ydata(), medians)
    effective = lines["_greedy over effective bits"]
    np.testing.assert_allclose(effective.get_ydata(), medians)
    overall = [row.effective_bits for row in table.overall()]
    np.testing.assert_allclose(effective.get_xdata(), overall)
    assert "payload (thick), effective (thin)" in axes.get_xlabel()
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    assert shown == ["greedy", "Lloyd-Max, Gaussian", "Shannon bound, Gaussian"]
    np.testing.assert_allclose(
        lines["Shannon bound, Gaussian"].get_ydata(), [0.25, 0.0625, 4.0**-4]
    )


@pytest.mark.parametrize("bits", [[2], [1, 2, 4]])
def test_the_legend_hides_no_curve_and_fits(weights, bits):
    solvers = ("greedy", "refined", "alternating", "optimal")
    figure = error_per_bit_width(weights, bits, solvers).plot().figure
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
    with pytest.raises(ValueError, match="array 'w': channel_axis 2"):
        error_per_bit_width({"w": x}, channel_axis=2)
    with pytest.raises(TypeError, match="array 'w'"):
        error_per_bit_width({"w": x.astype(int)})
    with pytest.raises(ValueError, match=r"array 'w'.*NaN"):
        error_per_bit_width({"w": x * np.nan})
    with pytest.raises(ValueError, match="tuple of 1"):
        error_per_bit_width([(x,)])


# What cannot be measured


class Tensor:
    """As much of a PyTorch tensor as the sweep looks at."""

    def __init__(self, array, requires_grad=False):
        self.array, self.requires_grad = array, requires_grad
        self.shape, self.ndim = array.shape, array.ndim

    def detach(self):
        return Tensor(self.array)

    def __array__(self, dtype=None, copy=None):
        assert not self.requires_grad
        return self.array


def test_entries_that_are_no_floats_are_skipped_and_counted(weights):
    state = {
        "conv.weight": Tensor(weights["conv"], requires_grad=True),
        "bn.num_batches_tracked": np.array(7),
        "bn2.num_batches_tracked": np.array(7),
        "quarter": np.ones((2, 3), ml_dtypes.float8_e4m3fn),
        "extra": None,
    }
    table = error_per_bit_width(state, bits=[1, 2])
    assert [row.name for row in table.rows] == ["conv.weight"] * 2
    expected = cubin.multibit(weights["conv"], 1, channel_axis=0)
    assert table.rows[0].relative_mse == float(cubin.errors.relative_mse(weights["conv"], expected))
    reasons = dict(table.skipped)
    assert list(reasons) == [*state][1:]
    assert "int64" in reasons["bn.num_batches_tracked"]
    assert "float8_e4m3fn" in reasons["quarter"]
    for text in (str(table), repr(table), table._repr_html_()):
        assert "Skipped 4 arrays:" in text
        assert "bn.num_batches_tracked, bn2.num_batches_tracked: x must be" in text


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.full((2, 2), -np.inf), "NaN or infinity"),
        (np.array([[1.0, np.nan]]), "NaN or infinity"),
        (np.array([[1e200, -1e200]]), "overflow or vanish"),
        (np.array([[1e-200, -1e-200]]), "overflow or vanish"),
        (np.ones((0, 4)), "no elements"),
        (np.array(3.0), "channel_axis 0 is out of range"),
    ],
)
def test_one_bad_array_does_not_stop_the_others(weights, array, reason):
    with np.errstate(over="ignore", under="ignore"):
        table = error_per_bit_width({"bad": array, **weights}, bits=[1, 2])
    assert {row.name for row in table.rows} == set(weights)
    ((name, why),) = table.skipped
    assert name == "bad"
    assert reason in why


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("solver", ["greedy", "refined", "alternating", "optimal"])
@pytest.mark.parametrize("iterations", [2, None])
def test_no_solver_stumbles_over_what_cannot_be_measured(weights, solver, iterations):
    bad = {
        "nan": np.array([[1.0, np.nan, 3.0]]),
        "infinity": np.full((3, 2), -np.inf, np.float32),
        "large": np.array([[1e200, -3e200, 2e200]]),
        "small": np.array([[1e-200, -3e-200, 2e-200]]),
    }
    table = error_per_bit_width({**bad, **weights}, [1, 3], solver, iterations=iterations)
    assert {row.name for row in table.rows} == set(weights)
    assert [name for name, _ in table.skipped] == list(bad)
    for (_, reason), word in zip(table.skipped, ["NaN", "NaN", "overflow", "vanish"], strict=True):
        assert word in reason


@pytest.mark.parametrize("bad", [np.nan, -np.inf, 1e200, 1e-200])
def test_functions_see_no_array_that_cannot_be_measured(bad):
    seen = []

    def keep(x, bits):
        seen.append(x)
        return x

    def ones(x):
        seen.append(x)
        return np.ones(x.shape, int)

    for bits, solver in (([1], keep), (ones, "greedy")):
        with pytest.raises(ValueError, match=r"NaN|overflow"):
            error_per_bit_width(np.full((2, 3), bad), bits, solver)
    assert not seen


def test_an_array_that_an_axis_does_not_fit_is_skipped(rng):
    arrays = {"conv": rng.normal(size=(4, 3, 7, 7)), "fc": rng.normal(size=(4, 64))}
    table = error_per_bit_width(arrays, bits=[1], channel_axis=3)
    assert [name for name, _ in table.skipped] == ["fc"]


def test_vectors_are_left_out_on_demand(rng):
    arrays = {"weight": rng.normal(size=(4, 8)), "bias": rng.normal(size=4)}
    assert len(error_per_bit_width(arrays, bits=[1]).rows) == 2
    table = error_per_bit_width(arrays, bits=[1], min_ndim=2)
    assert [row.name for row in table.rows] == ["weight"]
    assert table.skipped == [("bias", "it has fewer axes than min_ndim=2")]


def test_a_sweep_that_skips_everything_says_why():
    with pytest.raises(ValueError, match=r"array 'a': it has NaN.*\(and 1 more"):
        error_per_bit_width({"a": np.full((2, 2), np.nan), "b": np.ones(3, int)}, bits=[1])
    assert error_per_bit_width({}).rows == []


def test_the_footer_does_not_grow_with_the_arrays(weights):
    skipped = [(f"layer {i}", f"reason {i % 20}") for i in range(1000)]
    table = ErrorTable(error_per_bit_width(weights, bits=[1]).rows, skipped)
    assert len(str(table).splitlines()) < 20
    assert "Skipped 1,000 arrays:" in str(table)
    assert "12 more reasons" in str(table)


# Where arrays come from


def test_nested_mappings_and_lists_stand_for_their_arrays(rng):
    a, b, c = rng.normal(size=(3, 4, 5))
    table = error_per_bit_width(
        {"model": {"fc": a}, "layers": [b, c], "literal": [[1.0, 2.0], [3.0, 5.0]], "epoch": 3},
        bits=[1],
    )
    names = ["model.fc", "layers.0", "layers.1", "literal"]
    assert [row.name for row in table.rows] == names
    assert [name for name, _ in table.skipped] == ["epoch"]
    table = error_per_bit_width([{"fc": a}, {"fc": b}], bits=[1])
    assert [row.name for row in table.rows] == ["0.fc", "1.fc"]


def test_what_gives_no_arrays_is_refused_by_name(rng):
    module = type("Net", (), {"state_dict": dict})()
    with pytest.raises(TypeError, match=r"arrays is a Net: pass its state_dict\(\)"):
        error_per_bit_width(module)
    for path in ("w.npz", Path("w.npz")):
        with pytest.raises(
            TypeError, match=r"arrays must be .* pass cubin.weights.Weights\('w.npz'\)"
        ):
            error_per_bit_width(path)
    for value in ("weights.safetensors", 3):
        with pytest.raises(TypeError, match="arrays must be a mapping"):
            error_per_bit_width(value)
    x = rng.normal(size=(3, 4))
    with pytest.raises(ValueError, match="begins with a ndarray"):
        error_per_bit_width([(x, x)])


def test_a_failing_array_leaves_no_rows(weights):
    def mine(x, bits):
        return x * (np.nan if bits == 2 and x.ndim == 2 else 0.9)

    table = error_per_bit_width(weights, [1, 2], ("greedy", mine))
    assert {row.name for row in table.rows} == {"conv"}
    assert table.skipped == [("dense", "'mine' gives NaN or infinity at 2 bits")]


# Granularity


def test_granularity_is_recorded_and_not_mixed(weights, tmp_path):
    dense = {"dense": weights["dense"]}
    table = error_per_bit_width(dense, bits=[2])
    for other in (
        error_per_bit_width(dense, bits=[2], group_size=8),
        error_per_bit_width(dense, bits=[2], channel_axis=None),
        error_per_bit_width(dense, bits=[2], channel_axis=(0, 1)),
        error_per_bit_width([("dense", weights["dense"], 1)], bits=[2]),
    ):
        table += other
    labels = ["axis 0", "group 8", "tensor", "axes 0, 1", "channel"]
    assert [row.granularity for row in table.rows] == labels
    overall = table.overall()
    assert [row.granularity for row in overall] == labels
    for row, one in zip(table.rows, overall, strict=True):
        assert one.relative_mse == row.relative_mse
        assert one.size == weights["dense"].size
    assert table.to_pandas()["granularity"].tolist() == labels
    table.to_csv(tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="") as file:
        assert [line["granularity"] for line in csv.DictReader(file)] == labels * 2
    assert "group 8" in str(table)
    labels = [line.get_label() for line in table.plot().lines]
    assert "greedy, per group 8: median and quartiles of 1 array" in labels


def test_axis_and_groups_exclude_each_other(weights):
    for axis in (0, 1, (0, 1)):
        with pytest.raises(ValueError, match=r"channel_axis=.* and group_size=8 exclude"):
            error_per_bit_width(weights["dense"], channel_axis=axis, group_size=8)
    with pytest.raises(ValueError, match="'auto'"):
        error_per_bit_width(weights, channel_axis="rows")
    with pytest.raises(TypeError, match="channel_axis"):
        error_per_bit_width(weights, channel_axis=0.5)
    with pytest.raises(ValueError, match="group_size must be at least 1"):
        error_per_bit_width(weights, group_size=0)
    with pytest.raises(TypeError):
        error_per_bit_width(weights, [1], ("greedy",), 0)


def test_bits_are_averaged_over_elements(rng):
    sizes = (4, 8), (16, 32)
    arrays = {str(shape): rng.normal(size=shape) for shape in sizes}
    maps = {"mixed": lambda x: np.full(x.shape, 1 if x.size < 100 else 3)}
    (row,) = error_per_bit_width(arrays, maps).overall()
    codes = [cubin.quantize(x, maps["mixed"](x), channel_axis=0) for x in arrays.values()]
    counts = [x.size for x in arrays.values()]
    assert row.payload_bits == np.average([1, 3], weights=counts)
    assert row.effective_bits == pytest.approx(
        np.average([code.effective_bits for code in codes], weights=counts)
    )
    assert row.compression == 32 / row.effective_bits


# Bit maps, importance, and quantizers of one's own


def test_bit_maps(weights):
    def halves(x):
        return 1 + (abs(x) > np.median(abs(x)))

    budget = functools.partial(cubin.bitmaps.budget, mean_bits=1.5)
    table = error_per_bit_width(weights, [1, halves, budget], ("greedy", "refined"))
    labels = [1, "halves", "budget(mean_bits=1.5)"]
    assert [row.bits for row in table.rows] == labels * 4
    for row in table.rows:
        x = weights[row.name]
        bits = {1: 1, "halves": halves(x)}.get(row.bits, cubin.bitmaps.budget(x, 1.5))
        code = cubin.quantize(x, bits, channel_axis=0, solver=row.solver)
        assert row.relative_mse == float(cubin.errors.relative_mse(x, code.dequantize()))
        assert row.payload_bits == code.payload_bits
        assert row.effective_bits == code.effective_bits
    assert [row.bits for row in table.overall()] == labels * 2
    points = {line.get_label().partition(":")[0]: line for line in table.plot().lines}
    assert points["greedy, halves"].get_xdata() == [1.5]


def test_iterations_and_importance(weights, rng):
    importance = {"dense": rng.uniform(size=weights["dense"].shape)}
    table = error_per_bit_width(weights, [2], "alternating", iterations=None, importance=importance)
    for row in table.rows:
        x = weights[row.name]
        y = cubin.multibit(x, 2, channel_axis=0, solver="alternating", iterations=None,
                           importance=importance.get(row.name))  # fmt: skip
        assert row.relative_mse == float(cubin.errors.relative_mse(x, y))
    with pytest.raises(ValueError, match="iterations"):
        error_per_bit_width(weights, iterations=-1)
    with pytest.raises(ValueError, match="greedy solver takes no importance"):
        error_per_bit_width(weights, importance=importance)
    with pytest.raises(ValueError, match="'dens', which is not in arrays"):
        error_per_bit_width(weights, [2], "refined", importance={"dens": 1.0})
    with pytest.warns(UserWarning, match="'dens'"):
        error_per_bit_width(weights.items(), [2], "refined", importance={"dens": 1.0})
    with pytest.raises(TypeError, match="importance must map"):
        error_per_bit_width(weights, [2], "refined", importance=np.ones(3))


def shrink(x, bits):
    x *= 1 - 2.0**-bits
    return x


def test_quantizers_of_ones_own(weights):
    before = copy.deepcopy(weights)
    table = error_per_bit_width(weights, [1, 2], (shrink, "greedy"))
    assert all(np.array_equal(weights[name], before[name]) for name in weights)
    assert [row.solver for row in table.overall()] == ["shrink"] * 2 + ["greedy"] * 2
    for row in table.rows:
        if row.solver == "shrink":
            assert row.relative_mse == pytest.approx(4.0**-row.bits)
            assert (row.granularity, row.payload_bits) == ("", row.bits)
            assert math.isnan(row.effective_bits)
            assert math.isnan(row.compression)
    assert "nan" not in str(table)
    named = error_per_bit_width(weights, 1, {"mine": shrink, "theirs": lambda x, bits: 0 * x})
    assert [row.solver for row in named.rows] == ["mine", "theirs"] * 2
    renamed = error_per_bit_width(weights, [3], {"converged": "alternating"}, iterations=None)
    assert {row.solver for row in renamed.rows} == {"converged"}


def test_a_function_that_fails_is_not_hidden(weights):
    with pytest.raises(ZeroDivisionError) as caught:
        error_per_bit_width(weights, [1], lambda x, bits: 1 / 0)
    assert caught.value.__notes__ == ["in the sweep of array 'conv'"]
    with pytest.raises(ValueError, match=r"the result of 'part' has shape \(4, 3, 3\)"):
        error_per_bit_width(weights, [1], {"part": lambda x, bits: x[0]})
    with pytest.raises(TypeError, match="bits must be an integer"):
        error_per_bit_width(weights, lambda x: x)
    with pytest.raises(ValueError, match="does not broadcast"):
        error_per_bit_width(weights, lambda x: np.ones(5, int))
    with pytest.raises(ValueError, match="'<lambda>' twice"):
        error_per_bit_width(weights, [1], [lambda x, bits: x, lambda x, bits: -x])
    with pytest.raises(ValueError, match="bits has 1 twice"):
        error_per_bit_width(weights, [1, 1])
    with pytest.raises(ValueError, match=r"0 \.\. 8"):
        error_per_bit_width(weights, [1, 9], ("greedy", "optimal"))


# Tables


def test_tables_are_joined(weights, rng):
    x = weights["dense"]
    table = error_per_bit_width({"dense": x, "i": np.ones(2, int)}, [1, 2])
    row = ErrorRow.measure(
        x, 0.9 * x, name="dense", solver="ternary", bits=1.58, effective_bits=1.6
    )
    joined = table + ErrorTable([row])
    assert joined.rows == [*table.rows, row]
    assert joined.skipped == table.skipped
    assert len(table.rows) == 2
    assert (row.shape, row.size, row.payload_bits, row.effective_bits) == ((16, 32), 512, 1.58, 1.6)
    assert row.relative_mse == pytest.approx(0.01)
    assert [row.solver for row in joined.overall()] == ["greedy", "greedy", "ternary"]
    with pytest.raises(TypeError):
        table + row


def test_tables_survive_pickle_copies_and_processes(weights):
    table = error_per_bit_width({**weights, "i": np.ones(2, int)}, [1, 2])
    assert pickle.loads(pickle.dumps(table)) == table
    assert copy.deepcopy(table) == table
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        there = pool.submit(error_per_bit_width, {**weights, "i": np.ones(2, int)}, [1, 2])
        assert there.result() == table


def test_repr_of_a_long_table_is_cut(table):
    long = ErrorTable(table.rows * 20)
    assert len(repr(long).splitlines()) == 1 + 60 + 1 + 3
    assert "60 more rows" in repr(long)
    assert len(str(long).splitlines()) == 1 + 120 + 3


# Figures


def overlapping(axes):
    """What of the curves a legend within the axes hides."""
    box = axes.get_legend().get_window_extent()
    inside = []
    for line in axes.lines:
        points = line.get_transform().transform(line.get_xydata())
        inside += [point for point in points if box.contains(*point)]
    return inside


@pytest.mark.parametrize("layout", [None, "constrained"])
@pytest.mark.parametrize("solvers", [("greedy",), ("greedy", "refined", "alternating", "optimal")])
@pytest.mark.parametrize("bits", [[2], [1, 2, 4], range(1, 9)])
def test_the_legend_stays_within_the_axes_given(weights, layout, solvers, bits):
    figure, pair = plt.subplots(1, 2, figsize=(9, 4), layout=layout)
    table = error_per_bit_width(weights, bits, solvers)
    for axes in pair:
        assert table.plot(axes) is axes
    figure.draw_without_rendering()
    for axes in pair:
        box, legend = axes.get_window_extent(), axes.get_legend().get_window_extent()
        assert box.x0 <= legend.x0 < legend.x1 <= box.x1
        assert box.y0 <= legend.y0 < legend.y1 <= box.y1
        assert overlapping(axes) == []


def test_a_figure_of_many_curves(weights):
    table = ErrorTable([])
    for number in range(12):
        quantizer = {f"a quantizer with a long name, number {number}": shrink}
        table += error_per_bit_width(weights, range(1, 9), quantizer)
    axes = table.plot()
    axes.figure.draw_without_rendering()
    legend = axes.get_legend().get_window_extent()
    assert 0 <= legend.x0 < legend.x1 <= axes.figure.bbox.x1
    assert 0 <= legend.y0 < legend.y1 < axes.xaxis.label.get_window_extent().y0
    assert axes.get_window_extent().height > 250
    styles = {(line.get_color(), line.get_marker()) for line in axes.lines}
    assert len(styles) == 14


def test_curves_of_unknown_effective_bits(weights):
    table = error_per_bit_width(weights, [1, 2], {"mine": shrink})
    labels = [line.get_label() for line in table.plot().lines]
    assert not any("effective" in label for label in labels)


def test_rows_at_bits_that_are_no_solvers(table, weights):
    for bits in (1.58, 17, 32):
        for name, x in weights.items():
            row = ErrorRow.measure(x, x * (1 - 2.0**-bits), name=name, solver="mine", bits=bits)
            table.rows.append(row)
    axes = table.plot()
    lines = {line.get_label(): line for line in axes.lines}
    mine = lines["mine: median and quartiles of 2 arrays"]
    np.testing.assert_array_equal(mine.get_xdata(), [1.58, 17, 32])
    np.testing.assert_array_equal(lines["Lloyd-Max, Gaussian"].get_xdata(), [1, 2, 4])
    shannon = lines["Shannon bound, Gaussian"]
    np.testing.assert_array_equal(shannon.get_xdata(), [1, 1.58, 2, 4, 17, 32])
    np.testing.assert_allclose(shannon.get_ydata(), 4.0 ** -shannon.get_xdata())
    axes.figure.draw_without_rendering()
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_a_mean_between_whole_bits_has_ticks_beside_it(weights):
    table = error_per_bit_width(weights, {"budget": lambda x: cubin.bitmaps.budget(x, 1.4), "2": 2})
    axes = table.plot()
    axes.figure.draw_without_rendering()
    low, high = axes.get_xlim()
    assert sum(low <= tick <= high for tick in axes.get_xticks()) >= 3


def test_arrays_of_one_name_are_counted(table):
    lines = [line.get_label() for line in (table + table).plot().lines]
    assert "greedy: median and quartiles of 4 arrays" in lines


def test_two_tables_on_the_same_axes(table, weights):
    _, axes = plt.subplots()
    table.plot(axes)
    error_per_bit_width(weights, [3, 8], "refined").plot(axes)
    lines = {line.get_label(): line for line in axes.lines}
    assert len(lines) == len(axes.lines) == 6
    assert (
        lines["_refined over effective bits"].get_color()
        == lines["refined: median and quartiles of 2 arrays"].get_color()
    )
    np.testing.assert_array_equal(lines["Lloyd-Max, Gaussian"].get_xdata(), [1, 2, 3, 4, 8])
    greedy, refined = (
        lines[f"{name}: median and quartiles of 2 arrays"] for name in ("greedy", "refined")
    )
    assert greedy.get_color() != refined.get_color()
    assert overlapping(axes) == []


def test_a_figure_of_no_rows():
    _, axes = plt.subplots()
    assert ErrorTable([]).plot(axes) is axes
    assert ErrorTable([]).plot().get_xlabel()


NOTEBOOK = """
import sys, types
shell = type("ZMQInteractiveShell", (), {})
sys.modules["ipykernel.zmqshell"] = types.ModuleType("ipykernel.zmqshell")
sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython"].get_ipython = shell
sys.modules["ipywidgets"] = None
import numpy as np
import cubin.analysis
cubin.analysis.error_per_bit_width(np.ones((3, 4)), [1])
"""


def test_no_warning_in_a_notebook_without_widgets():
    # Not as errors: tqdm would catch them.
    run = subprocess.run(
        [sys.executable, "-W", "always", "-c", NOTEBOOK], capture_output=True, text=True
    )
    assert run.returncode == 0
    assert "TqdmWarning" not in run.stderr
