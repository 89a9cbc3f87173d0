from __future__ import annotations

import csv
import json

import benchmark
import numpy as np
import peers
import pytest
from matplotlib.figure import Figure

import cubin
from cubin.core import memory
from tests import reference


@pytest.fixture
def small(monkeypatch):
    layouts = (
        benchmark.Layout("6x40 per row", (6, 40), benchmark.ROW),
        benchmark.Layout("4x256 per group of 128", (4, 256), benchmark.GROUP),
        benchmark.Layout("90 per tensor", (90,), {}),
    )
    monkeypatch.setattr(benchmark, "QUICK_LAYOUTS", layouts)
    monkeypatch.setattr(benchmark.Host, "cache", 3000)
    found = peers.optional
    monkeypatch.setattr(peers, "optional", lambda name: None if name == "torch" else found(name))


def run(tmp_path, *arguments):
    return benchmark.main(
        ["--quick", "--device", "cpu", "--output", str(tmp_path / "out"), *arguments]
    )


@pytest.mark.exhaustive
def test_every_operation_is_measured(small, tmp_path, capsys):
    assert run(tmp_path, "--rounds", "3", "--seconds", "0") == 0
    with (tmp_path / "out" / "benchmark.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["operation"] for row in rows} == set(benchmark.OPERATIONS)
    assert {row["layout"] for row in rows} == {layout.name for layout in benchmark.QUICK_LAYOUTS}
    assert {row["map"] for row in rows} == {"0", "1"}
    for row in rows:
        assert float(row["quartile_1_ms"]) <= float(row["median_ms"]) <= float(row["quartile_3_ms"])
        if row["candidate"] == benchmark.COPY:
            assert float(row["fraction_of_copy"]) == 1
        if row["candidate"] == benchmark.CUBIN:
            assert float(row["ratio_to_cubin"]) == 1
            assert int(row["peak_bytes"]) > 0
    origin = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert origin["library"] == "numpy"
    assert (tmp_path / "out" / "benchmark.png").stat().st_size > 10_000
    assert "multibit, 6x40 per row, map of 0 to 2 bits" in capsys.readouterr().out


def test_calls_in_new_memory(small, monkeypatch, tmp_path):
    """They are timed where results are large, and hold as much as the others."""
    monkeypatch.setattr(memory, "LARGE", 960)
    assert run(tmp_path, "--rounds", "1", "--operations", "multibit", "multibit_grad") == 0
    with (tmp_path / "out" / "benchmark.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["candidate"] == benchmark.NEW]
    assert {row["operation"] for row in rows} == {"multibit"}
    assert {row["layout"] for row in rows} == {"6x40 per row", "4x256 per group of 128"}
    assert all(int(row["peak_bytes"]) >= 4 * int(row["elements"]) for row in rows)


def test_what_users_can_mend(small, tmp_path, capsys):
    assert run(tmp_path, "--layouts", "7x7") == 2
    assert run(tmp_path, "--rounds", "0") == 2
    assert run(tmp_path, "--bits", "9") == 2
    assert capsys.readouterr().err.count("error: --") == 3


def test_expressions_are_the_algorithms(rng):
    x = rng.normal(size=(5, 60))
    x[0, :3] = [0, -0.0, 1]
    gy = rng.normal(size=x.shape)
    bits = rng.integers(0, 4, x.shape)
    np.testing.assert_array_equal(peers.array_sign(np, x), cubin.sign(x))
    np.testing.assert_array_equal(
        peers.array_gradient(np, x, bits, gy), cubin.multibit_grad(x, bits, gy)
    )
    for given in (3, bits):
        approx = reference.greedy(x, given, channel_axis=0)[-1]
        np.testing.assert_allclose(peers.array_greedy(np, x, given), approx, atol=1e-12)


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
    expected = cubin.multibit(x, 3, channel_axis=0, solver="alternating")
    for search in (peers.torch_search, peers.torch_halving):
        found = np.asarray(peers.torch_alternating(torch, t, 3, search))
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_bytes_that_must_move():
    layout = benchmark.Layout("", (4, 8), benchmark.ROW)
    case = benchmark.Case("multibit", layout, 3, False)
    assert case.bytes_per_element == 8
    assert benchmark.Case("multibit", layout, 3, True).bytes_per_element == 9
    assert benchmark.Case("sign_grad", layout, 3, False).bytes_per_element == 12
    assert benchmark.Case("quantize", layout, 3, False).bytes_per_element == 7
    assert layout.flat == (4, 8)
    assert benchmark.Layout("", (4, 256), benchmark.GROUP).flat == (8, 128)


def test_the_roof_has_labelled_axes(small, tmp_path):
    case = benchmark.Case("sign", benchmark.QUICK_LAYOUTS[0], 1, False)
    machine = benchmark.Host()
    ax = Figure().subplots()
    benchmark.draw_roofline(ax, benchmark.measure(case, machine, 2, 1, True))
    assert "per byte" in ax.get_xlabel()
    assert "per second" in ax.get_ylabel()
    assert len(ax.get_legend().get_texts()) >= 3
