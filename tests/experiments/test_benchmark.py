from __future__ import annotations

import csv
import json
import time
from dataclasses import replace

import benchmark
import grid
import heat_map
import numpy as np
import peers
import pytest
import train_mnist
from grid import Cell, Placed
from matplotlib.figure import Figure

import cubin
from tests import reference
from tests.exhaustive import few

SHAPES = {
    "axis 1": (8, 6, 5),
    "groups of 16": (6, 32),
    "groups of 32": (6, 32),
    "groups of 128": (2, 256),
    "groups of 27": (6, 54),
    "groups of 100": (2, 300),
}
"""The shape for each layout of a small cell; (6, 40) elsewhere."""


@pytest.fixture(scope="module")
def whole():
    return grid.cells()


@pytest.fixture
def without_torch(monkeypatch):
    found = peers.optional
    monkeypatch.setattr(peers, "optional", lambda name: None if name == "torch" else found(name))


def small(operation, layout="axis 0", **changes):
    return Cell(operation, SHAPES.get(layout, (6, 40)), layout, **changes)


def run(monkeypatch, tmp_path, placed, *arguments):
    monkeypatch.setattr(grid, "cells", lambda quick, operations: placed)
    return benchmark.main(
        ["--quick", "--device", "cpu", "--output", str(tmp_path / "out"), *arguments]
    )


def rows_of(tmp_path):
    with (tmp_path / "out" / "benchmark.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


# ---------------------------------------------------------------- the cells


def test_cells_come_once_and_the_same_each_time(whole):
    assert len({one.cell.key for one in whole}) == len(whole)
    assert grid.cells() == whole
    assert sum(one.factor == "random" for one in whole) == grid.RANDOM_CELLS
    assert {one.cell.operation for one in whole} == set(grid.OPERATIONS)


def test_what_is_wanted_is_in_the_grid(whole):
    known = {one.cell for one in whole}
    for wanted in grid.WANTED:
        assert known >= set(wanted.cells()), wanted.name
    assert len({wanted.name for wanted in grid.WANTED}) == len(grid.WANTED)


@pytest.mark.parametrize("base", grid.BASES)
@pytest.mark.parametrize("operation", grid.COLUMNS)
def test_neighbours_differ_in_one_factor(operation, base):
    cell = Cell(operation, grid.BASES[base])
    for factor, level, other in grid.neighbours(cell):
        changed = {
            name
            for name in ("shape", "layout", "dtype", "bits", "map", "importance", "state")
            if getattr(other, name) != getattr(cell, name)
        }
        of_factor = {"shape", "layout"} if level == "axis 1 of conv" else {
            "size": {"shape"}, "row length": {"shape"}, "memory": {"state"},
            "importance": {"importance", "map"},
        }.get(factor, {factor})  # fmt: skip
        assert changed <= of_factor
        assert other.size <= max(1 << 22, 4 * cell.size)


def test_a_quick_grid_is_small(whole):
    quick = grid.cells(quick=True)
    assert len(quick) <= 150
    assert {one.cell for one in quick} <= {one.cell for one in whole}
    assert max(one.cell.size for one in quick) <= 1 << 20
    assert all(one.cell.size <= 1 << 12 for one in quick if one.cell.operation == "optimal")


def test_random_cells_are_legal(whole):
    for one in whole:
        cell = one.cell
        assert cell.bits <= 8
        assert cell.size <= 1 << 26
        if one.factor == "random":
            assert 0 < cell.size <= 1 << 22
        if cell.group:
            assert cell.shape[-1] >= cell.group
        if cell.importance:
            assert grid.SOLVERS[cell.operation] != "greedy"


def test_some_operations_alone():
    found = grid.cells(operations=("sign", "optimal"))
    assert {one.cell.operation for one in found} == {"sign", "optimal"}


def test_bytes_that_must_move():
    cell = small("multibit", bits=3)
    assert cell.bytes_per_element == 8
    assert replace(cell, map="int64").bytes_per_element == 16
    assert replace(cell, dtype="float16").bytes_per_element == 4
    assert small("refined", importance=True).bytes_per_element == 12
    assert small("sign_grad").bytes_per_element == 12
    assert small("quantize", bits=3).bytes_per_element == 7
    assert small("top_down").bytes_per_element == 5


def test_rows_of_layouts():
    assert Cell("multibit", (4, 8)).rows == 4
    assert Cell("multibit", (4, 8, 3, 3), "axis 1").granularity == {"channel_axis": 1}
    assert Cell("multibit", (8, 4), "transposed view").rows == 4
    assert Cell("multibit", (4, 32), "groups of 16").rows == 8
    assert not Cell("multibit", (4, 32), "groups of 16").uneven
    assert Cell("multibit", (4, 32), "groups of 27").rows == 8
    assert Cell("multibit", (4, 32), "groups of 27").uneven
    assert Cell("multibit", (4, 8), "per tensor").granularity == {}
    assert Cell("multibit", (4, 8), "per tensor").rows == 1


# ---------------------------------------------------------------- peers


def test_groups_that_do_not_divide_have_no_peer():
    cell = Cell("quantize", (4, 40), "groups of 27")
    timing = benchmark.measure(cell, benchmark.Host(), benchmark.Compiler(0), 1)
    assert set(timing.samples) == {"seconds", "copy"}


@pytest.mark.parametrize(
    "layout", few(grid.LAYOUTS, "per tensor", "axis 0", "axis 1", "groups of 16")
)
@pytest.mark.parametrize("operation", grid.COLUMNS)
def test_peers_agree_with_cubin(operation, layout):
    """Wherever a peer applies its result is cubin's."""
    machine = benchmark.Host()
    kinds = [{}, {"dtype": "float16"}, {"dtype": "float64"}]
    kinds += [{"map": "uint8"}, {"map": "int64"}] * (operation != "sign")
    for changes in kinds:
        cell = small(operation, layout, bits=3, **changes)
        timing = benchmark.measure(cell, machine, benchmark.Compiler(0), 1)
        assert timing.errors == []
        found = set(timing.samples)
        assert found >= {"seconds", "copy"}
        if operation not in ("refined", "alternating"):
            assert "expression" in found
        if machine.torch and (operation not in ("refined", "alternating") or "map" not in changes):
            assert ("torch" in found) == (
                operation not in ("refined", "alternating") or cell.dtype != "float16"
            )


@pytest.mark.parametrize("layout", ["axis 0", "axis 1", "groups of 16", "transposed view"])
@pytest.mark.parametrize("operation", ["sign", "multibit_grad", "multibit", "quantize"])
def test_expressions_agree_on_a_device(operation, layout, device, monkeypatch):
    monkeypatch.setattr(benchmark, "SAMPLE", 0)
    machine = benchmark.Host(with_torch=False)
    machine.library = device
    timing = benchmark.measure(small(operation, layout), machine, benchmark.Compiler(0), 1)
    assert timing.errors == []
    assert set(timing.samples) == {"seconds", "copy", "expression"}


@pytest.mark.parametrize("operation", ["sign_grad", "ste_mask", "top_down", "middle_out"])
def test_other_peers_agree_with_cubin(operation):
    timing = benchmark.measure(small(operation), benchmark.Host(), benchmark.Compiler(0), 1)
    assert timing.errors == []
    assert "expression" in timing.samples


@pytest.mark.parametrize(
    "operation", ["converged", "optimal", "bottom_up", "budget", "allocate", "save", "load"]
)
def test_operations_without_peers_are_timed(operation, without_torch):
    timing = benchmark.measure(small(operation), benchmark.Host(), benchmark.Compiler(0), 2)
    assert timing.errors == []
    assert set(timing.samples) == {"seconds", "copy"}


def test_every_operation_has_a_test_of_its_peers():
    tested = {*grid.COLUMNS, "sign_grad", "ste_mask", "top_down", "middle_out"}
    alone = {"converged", "optimal", "bottom_up", "budget", "allocate", "save", "load"}
    assert tested | alone | {"tape step", "import"} == set(grid.OPERATIONS)


def test_a_peer_that_differs_is_not_timed(monkeypatch, without_torch):
    monkeypatch.setattr(peers, "array_sign", lambda xp, x: np.ones_like(x))
    timing = benchmark.measure(small("sign"), benchmark.Host(), benchmark.Compiler(0), 1)
    assert set(timing.samples) == {"seconds", "copy"}
    assert "expression" in timing.errors[0]
    assert "elements differ" in timing.errors[0]


def test_disagreement():
    cell = small("multibit")
    x = np.linspace(-1, 1, 5000, dtype=np.float32)
    assert benchmark.disagreement(cell, x * np.float32(1 + 1e-5), x) is None
    assert benchmark.disagreement(cell, x[:-1], x) == "another shape"
    some, many = x.copy(), x.copy()
    some[:5] += 1
    many[:50] += 1
    assert benchmark.disagreement(cell, some, x) is None
    assert benchmark.disagreement(cell, many, x) == "50 of 5000 elements differ"
    assert benchmark.disagreement(cell, np.full_like(x, np.nan), x) is not None


def test_expressions_are_the_algorithms(rng):
    x = rng.normal(size=(5, 60))
    x[0, :3] = [0, -0.0, 1]
    gy = rng.normal(size=x.shape)
    bits = rng.integers(0, 4, x.shape)
    np.testing.assert_array_equal(peers.array_sign(np, x), cubin.sign(x))
    np.testing.assert_array_equal(peers.array_mask(np, x), cubin.ste_mask(x))
    np.testing.assert_array_equal(
        peers.array_gradient(np, x, bits, gy), cubin.multibit_grad(x, bits, gy)
    )
    for given in (3, bits):
        approx = reference.greedy(x, given, channel_axis=0)[-1]
        np.testing.assert_allclose(peers.array_greedy(np, x, given), approx, atol=1e-12)
        decoded = peers.array_decode(np, *peers.array_encode(np, x, given))
        np.testing.assert_allclose(decoded, approx, atol=1e-12)


def test_torch_expressions_are_the_algorithms(rng):
    torch = pytest.importorskip("torch")
    x = rng.normal(size=(5, 60)).astype(np.float32)
    gy = rng.normal(size=x.shape).astype(np.float32)
    bits = rng.integers(0, 4, x.shape)
    t, g, b = (torch.from_numpy(a) for a in (x, gy, bits))
    np.testing.assert_array_equal(peers.torch_sign(torch, t), cubin.sign(x))
    np.testing.assert_array_equal(
        peers.torch_gradient(torch, t, b, g), cubin.multibit_grad(x, bits, gy)
    )
    for given, mapped in ((3, None), (bits, b)):
        approx = reference.greedy(x, given, channel_axis=0)[-1]
        found = peers.torch_greedy(torch, t, 3, mapped)
        np.testing.assert_allclose(found, approx, atol=1e-5)
        decoded = peers.torch_decode(torch, *peers.torch_encode(torch, t, 3, mapped))
        np.testing.assert_allclose(decoded, approx, atol=1e-5)
    for name, peer in (("alternating", peers.torch_alternating), ("refined", peers.torch_refined)):
        expected = cubin.multibit(x, 3, channel_axis=0, solver=name)
        np.testing.assert_allclose(peer(torch, t, 3), expected, atol=1e-4)


def test_steps_in_torch_are_those_of_the_tape(rng):
    """After two steps the parameters agree as well."""
    torch = pytest.importorskip("torch")
    state = train_mnist.initial_state("CNN", 0)
    parameters, running = (train_mnist.part(state, f"{kind}.") for kind in ("parameter", "running"))
    images = rng.standard_normal((8, 1, 28, 28), np.float32)
    labels = rng.integers(0, 10, 8)
    network = peers.TorchDigits(torch, parameters, 2, 1e-3)
    run = train_mnist.Run("CNN", next(a for a in train_mnist.ARMS if a.name == "2 bits"), 0)
    maps = {str(number): np.asarray(2) for number in train_mnist.hidden_layers("CNN")}
    now = (parameters, running, {})
    for _ in range(2):
        *now, loss, _ = train_mnist.train_step(
            run, *now, maps, images, labels, progress=0.0, rate=1e-3
        )
        other = network.step(torch.from_numpy(images), torch.from_numpy(labels))
        assert float(other) == pytest.approx(float(loss), rel=1e-4)
    for name, value in now[0].items():
        found = network.parameters[name].detach().numpy()
        # Adam divides by the root of a gradient's square: of gradients near 0 the sign decides.
        assert np.mean(np.abs(found - value) < 1e-4) > 0.98, name


# ---------------------------------------------------------------- a run


def test_a_run_writes_everything(monkeypatch, without_torch, tmp_path, capsys):
    base = small("multibit")
    placed = [
        Placed(base, "64x64", "base", ""),
        Placed(small("multibit", "axis 1"), "64x64", "layout", "axis 1"),
        Placed(small("sign"), "64x64", "base", ""),
        Placed(small("quantize", "groups of 16", map="uint8"), "", "random", ""),
        Placed(replace(base, state=grid.NEW), "64x64", "memory", "new"),
    ]
    assert run(monkeypatch, tmp_path, placed, "--rounds", "3") == 0
    rows = rows_of(tmp_path)
    assert [tuple(row[name] for name in grid.KEY) for row in rows] == [p.cell.key for p in placed]
    for row in rows:
        assert row["error"] == ""
        assert row["rounds"] == "3"
        assert 0 < float(row["quartile_1"]) <= float(row["seconds"]) <= float(row["quartile_3"])
        assert row["fastest_peer"] == "expression"
        ratio = float(row["seconds"]) / float(row["fastest"])
        assert float(row["over_peer"]) == pytest.approx(ratio, rel=1e-2)
    origin = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert origin["library"] == "numpy"
    assert origin["threads"] >= 1
    assert (tmp_path / "out" / "benchmark.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "channel_axis=1 of (4096, 4096) against axis 0" in said
    assert grid.summary(rows) in (tmp_path / "out" / "benchmark.md").read_text()


def test_a_cell_that_fails_is_named(monkeypatch, without_torch, tmp_path, capsys):
    placed = [
        Placed(Cell("multibit", (4, 30), "groups of 16", bits=20), "", "random", ""),
        Placed(small("sign"), "64x64", "base", ""),
    ]
    assert run(monkeypatch, tmp_path, placed, "--rounds", "1") == 0
    failed, good = rows_of(tmp_path)
    assert failed["error"].startswith("ValueError")
    assert failed["seconds"] == ""
    assert good["seconds"] != ""
    captured = capsys.readouterr()
    assert "1 cells failed" in captured.out
    assert "multibit, 4x30, groups of 16, float32, 20 bits: ValueError" in captured.err


def test_cells_are_left_out_when_the_time_is_up(monkeypatch, without_torch, tmp_path, capsys):
    placed = [Placed(small("sign"), "64x64", "base", "")]
    assert run(monkeypatch, tmp_path, placed, "--minutes", "-1") == 0
    assert rows_of(tmp_path) == []
    assert "1 of 1 cells were left out" in capsys.readouterr().out
    origin = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert origin["arguments"]["left_out"] == 1


def test_memory_of_a_large_cell(monkeypatch, without_torch):
    monkeypatch.setattr(benchmark, "MEMORY_FROM", 0)
    cell = Cell("sign", (64, 64))
    timing = benchmark.measure(cell, benchmark.Host(), benchmark.Compiler(0), 1)
    assert timing.result_bytes == 4 * cell.size
    assert timing.peak_bytes >= timing.result_bytes
    code = benchmark.measure(Cell("quantize", (64, 64)), benchmark.Host(), benchmark.Compiler(0), 1)
    assert code.result_bytes <= code.peak_bytes


def test_slow_calls_are_timed_less_often(monkeypatch):
    calls = {"seconds": lambda: None, "copy": lambda: None, "torch": lambda: None}
    monkeypatch.setattr(benchmark, "SAMPLE", 0)
    assert [len(taken) for taken in benchmark.samples(calls, benchmark.Host(), 7).values()] == [
        7
    ] * 3
    monkeypatch.setattr(benchmark, "SLOW_PEER", 0.01)
    calls["torch"] = lambda: time.sleep(0.02)
    found = benchmark.samples(calls, benchmark.Host(), 7)
    assert [len(found[name]) for name in calls] == [7, 7, 1]
    calls["torch"] = calls["seconds"]
    monkeypatch.setattr(benchmark, "SLOW", 0)
    found = benchmark.samples(calls, benchmark.Host(), 7)
    assert [len(found[name]) for name in calls] == [benchmark.ROUNDS_OF_SLOW] * 3
    monkeypatch.setattr(benchmark, "SLOWEST", 0)
    assert [len(taken) for taken in benchmark.samples(calls, benchmark.Host(), 7).values()] == [
        1
    ] * 3


@pytest.mark.exhaustive
def test_processes_of_their_own():
    timing = benchmark.in_fresh_process(Cell("multibit", (4, 40), state=grid.FRESH), 1)
    assert timing.errors == []
    assert set(timing.samples) == {"seconds", "copy", "expression"}
    imported = benchmark.measure(
        Cell("import", ()), benchmark.Host(False), benchmark.Compiler(0), 1
    )
    assert {name: len(taken) for name, taken in imported.samples.items()} == {
        "seconds": 1, "expression": 1,
    }  # fmt: skip
    assert min(map(min, imported.samples.values())) > 0


@pytest.mark.exhaustive
def test_compiled_peers_agree():
    pytest.importorskip("torch")
    compiler = benchmark.Compiler(60)
    timing = benchmark.measure(small("multibit"), benchmark.Host(), compiler, 1)
    assert timing.errors == []
    assert "torch_compile" in timing.samples
    assert compiler.left < 60


def test_what_users_can_mend(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, tmp_path, [], "--rounds", "0") == 2
    assert capsys.readouterr().err.count("error: --") == 1


# ---------------------------------------------------------------- the summary


def written(cell, seconds, *, base="", factor="table", **columns):
    timing = benchmark.Timing({"seconds": [seconds], **{n: [v] for n, v in columns.items()}})
    return timing.row(Placed(cell, base, factor, ""))


@pytest.fixture
def recorded():
    """A few rows as a CSV has them."""
    big, columns = grid.BIG, replace(grid.BIG, layout="axis 1")
    small = replace(grid.SMALL, operation="sign", bits=0)
    rows = [
        written(big, 0.01, base="4096x4096", factor="base", copy=0.008, expression=0.4, torch=0.5,
                torch_compile=0.005),
        written(columns, 0.04, base="4096x4096", factor="layout", expression=0.4),
        written(small, 3e-5, base="64x64", factor="base", copy=1e-6, expression=1e-5),
        written(replace(grid.BUDGET), 30.0),
        {**written(replace(big, bits=7), 1.0), "seconds": "", "error": "ValueError: no"},
    ]  # fmt: skip
    rows[3]["peak_bytes"] = str(3 * 4 * grid.BUDGET.size)
    return rows


def test_findings_of_rows(recorded):
    found = {finding.name: finding for finding in grid.findings(recorded)}
    assert found["columns"].value == pytest.approx(4)
    assert not found["columns"].met
    assert found["small"].value == pytest.approx(3)
    assert found["budget"].value == pytest.approx(30)
    assert found["budget memory"].value == pytest.approx(3)
    assert found["Fortran"].value is None
    assert not found["Fortran"].met
    assert found["columns"].wanted == 1.6


def test_the_worst_pair_is_the_finding(recorded):
    for name, seconds in (("sign_grad", 1e-5), ("quantize", 9e-5)):
        cell = replace(grid.SMALL, operation=name)
        recorded.append(written(cell, seconds, expression=1e-5))
    found = {finding.name: finding for finding in grid.findings(recorded)}
    assert found["small"].value == pytest.approx(9)


def test_means_and_cells_behind(recorded):
    assert grid.geometric_mean(grid.timed(recorded, "expression")) == pytest.approx(
        (40 * 10 / 3) ** (1 / 3)
    )
    assert grid.timed(recorded, "expression", grid.LARGE) == pytest.approx([40, 10])
    assert grid.geometric_mean([]) is None
    assert [row["fastest_peer"] for row in grid.behind(recorded)] == ["torch_compile"]
    [step] = grid.steps(recorded)
    assert step.ratio == pytest.approx(4)
    assert (step.base, step.factor, step.level) == ("4096x4096", "layout", "axis 1")


def test_the_summary_says_it(recorded):
    said = grid.summary(recorded)
    assert "| channel_axis=1 of (4096, 4096) against axis 0 | 4 | 1.6 | missed |" in said
    assert "| `budget`, 10 M elements | 30 s | 4 s | missed |" in said
    assert "- 2 x torch_compile: multibit, 4096x4096, axis 0, float32, 2 bits" in said
    assert "- multibit, 4096x4096, axis 0, float32, 7 bits: ValueError: no" in said
    assert "1 cells behind" in said
    assert "not timed" in said


def test_a_row_is_labelled_as_its_cell():
    for cell in (small("sign"), small("refined", map="int64", importance=True), grid.fresh(4)):
        assert grid.label(written(cell, 1.0)) == cell.label


def test_the_heat_map_has_a_line_for_each_level(recorded):
    ax = Figure().subplots()
    heat_map.draw_cliffs(ax, recorded)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["layout: axis 1"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["multibit"]
    assert "4" in [text.get_text() for text in ax.texts]
    heat_map.draw_peers(ax, recorded)
    assert {"sign", "multibit"} <= {text.get_text() for text in ax.get_yticklabels()}
    assert len(heat_map.figure(recorded).axes) == 3
