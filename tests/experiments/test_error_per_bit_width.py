from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import subprocess
import sys
import types
from collections import defaultdict
from pathlib import Path

import error_per_bit_width as experiment
import numpy as np
import pytest
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
NAME = "error_per_bit_width"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def net(tmp_path, rng):
    path = tmp_path / "net.npz"
    np.savez(
        path,
        gaussian=rng.standard_normal((64, 256)).astype(np.float32),
        half=rng.standard_normal((8, 2, 3, 3)).astype(np.float16),
        fortran=np.asfortranarray(rng.uniform(-1, 1, (32, 1000))),
        bias=np.ones(5),
    )
    return path


def keep(row):
    """The overall rows of the samples are not those of the weights."""
    return row["name"] != "overall"


def run(tmp_path, *arguments):
    status = experiment.main([*map(str, arguments), "--output", str(tmp_path / "out")])
    rows = []
    for file in (f"{NAME}.csv", f"{NAME}_samples.csv"):
        with (tmp_path / "out" / file).open(newline="") as stream:
            rows += [row for row in csv.DictReader(stream) if "samples" not in file or keep(row)]
    errors = defaultdict(dict)
    for row in rows:
        errors[row["name"]][int(row["bits"])] = float(row["relative_mse"])
    return status, errors


def greedy_error(rows, bits):
    """The relative MSE of greedy codes with a scale per row, from their definition."""
    residual = rows.astype(np.float64)
    for _ in range(bits):
        scale = np.abs(residual).mean(axis=1, keepdims=True)
        residual = residual - scale * np.where(residual > 0, 1, -1)
    return (residual**2).sum() / (rows.astype(np.float64) ** 2).sum()


# Arguments


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("1-8", [1, 2, 3, 4, 5, 6, 7, 8]),
        ("1,2,4", [1, 2, 4]),
        ("3", [3]),
        ("4,1-2,2", [1, 2, 4]),
        ("16", [16]),
    ],
)
def test_bits(text, bits):
    assert experiment.parse_bits(text) == bits
    assert experiment.argument_parser().parse_args(["--bits", text]).bits == bits


@pytest.mark.parametrize("text", ["", "x", "1-", "-2", "0", "0-3", "17", "3-1", "1,,2", "1.5"])
def test_bits_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError):
        experiment.parse_bits(text)


@pytest.mark.parametrize(
    "arguments",
    [["--bits", "9-1"], ["--channel-axis", "x"], ["--group-size", "0"], ["--device", "tpu"]],
)
def test_arguments_that_cannot_be_read(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        experiment.main(arguments)
    assert stop.value.code == 2
    assert f"error: argument {arguments[0]}" in capsys.readouterr().err


# Results


def test_errors_are_those_of_the_definition(tmp_path, net):
    status, errors = run(tmp_path, net, "--quick")

    assert status == 0
    with np.load(net) as arrays:
        for name in ("gaussian", "half", "fortran"):
            rows = arrays[name].reshape(len(arrays[name]), -1)
            for bits in range(1, 9):
                tolerance = 5e-3 if name == "half" else 1e-6
                assert errors[name][bits] == pytest.approx(greedy_error(rows, bits), rel=tolerance)
    assert "bias" not in errors


def test_samples_have_the_errors_of_their_distributions(tmp_path, net):
    _, errors = run(tmp_path, net, "--bits", "1-3", "--quick")
    for bits, gaussian, laplace in [
        (1, 0.36338, 0.5),
        (2, 0.13045, 0.22933),
        (3, 0.05839, 0.14256),
    ]:
        assert errors["Gaussian"][bits] == pytest.approx(gaussian, rel=0.03)
        assert errors["Laplace"][bits] == pytest.approx(laplace, rel=0.04)
        assert errors["uniform"][bits] == pytest.approx(4.0**-bits, rel=0.02)


def test_overall_adds_up_the_weights_without_the_samples(tmp_path, net):
    _, errors = run(tmp_path, net, "--bits", "2", "--quick")
    with np.load(net) as arrays:
        power = {name: np.square(arrays[name], dtype=float).sum() for name in arrays}
    names = ("gaussian", "half", "fortran")
    total = sum(errors[name][2] * power[name] for name in names)
    expected = total / sum(power[name] for name in names)
    assert errors["overall"][2] == pytest.approx(expected, rel=1e-6)


def test_weights_of_zeros(tmp_path):
    np.save(tmp_path / "w.npy", np.zeros((2, 3)))
    status, errors = run(tmp_path, tmp_path / "w.npy", "--bits", "1,2", "--quick")
    assert status == 0
    assert errors["w"] == errors["overall"] == {1: 0, 2: 0}


@pytest.mark.parametrize("axis", ["0", "1", "-1", "none"])
def test_channel_axis(tmp_path, rng, axis):
    array = rng.standard_normal((6, 40)) * np.geomspace(1, 100, 6)[:, None]
    np.save(tmp_path / "w.npy", array)
    _, errors = run(tmp_path, tmp_path / "w.npy", "--channel-axis", axis, "--quick")
    rows = {"0": array, "1": array.T, "-1": array.T, "none": array.reshape(1, -1)}[axis]
    assert errors["w"][3] == pytest.approx(greedy_error(rows, 3), rel=1e-9)


@pytest.mark.parametrize("axis", ["0", "1", "none"])
def test_groups_are_taken_within_a_channel(tmp_path, rng, axis):
    array = rng.standard_normal((6, 4, 3)) * np.geomspace(1, 100, 6)[:, None, None]
    np.save(tmp_path / "w.npy", array)
    _, errors = run(
        tmp_path, tmp_path / "w.npy", "--channel-axis", axis, "--group-size", 6, "--quick"
    )
    channels = array if axis == "none" else np.moveaxis(array, int(axis), 0)
    assert errors["w"][2] == pytest.approx(greedy_error(channels.reshape(-1, 6), 2), rel=1e-9)


@pytest.fixture
def with_nan(tmp_path, rng):
    """Two sound weights and one with values that are not finite."""
    arrays = {name: rng.standard_normal((8, 64)) for name in ("first", "second", "mask")}
    arrays["mask"][0, :3] = -np.inf
    np.savez(tmp_path / "net.npz", **arrays)
    return tmp_path / "net.npz"


def test_a_tensor_that_is_not_finite_is_skipped_and_named(tmp_path, with_nan, capsys):
    out = tmp_path / "out"
    arguments = [str(with_nan), "--quick", "--bits", "2", "--output", str(out)]
    status = experiment.main(arguments)

    assert status == 1
    printed = capsys.readouterr().out
    assert "2 of 3 weight tensors" in printed
    assert "mask (8x64, float64): 3 of 512 values are NaN or infinite" in printed
    with (out / f"{NAME}.csv").open(newline="") as stream:
        rows = {row["name"]: row for row in csv.DictReader(stream)}
    assert rows["mask"]["skipped"] == "3 of 512 values are NaN or infinite"
    assert rows["mask"]["relative_mse"] == rows["first"]["skipped"] == ""
    with np.load(with_nan) as arrays:
        both = np.concatenate([arrays["first"], arrays["second"]])
    assert float(rows["overall"]["relative_mse"]) == pytest.approx(greedy_error(both, 2), rel=1e-6)
    origin = json.loads((out / f"{NAME}.json").read_text())
    assert origin["tensors"] == 2
    assert [tensor["name"] for tensor in origin["omissions"]["skipped"]] == ["mask"]


def test_strict_refuses_a_tensor_that_is_not_finite(tmp_path, with_nan, capsys):
    status = experiment.main(
        [str(with_nan), "--quick", "--strict", "--output", str(tmp_path / "out")]
    )
    assert_error(capsys, status, "mask: 3 of 512 values are NaN or infinite", "repair")
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture
def with_float8(tmp_path, rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    numpy_file = pytest.importorskip("safetensors.numpy")
    array = rng.standard_normal((8, 64))
    saved = {"bf16": array.astype(ml_dtypes.bfloat16), "fp8": array.astype("float8_e8m0fnu")}
    numpy_file.save_file(saved, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def test_weights_of_float8_are_named(tmp_path, with_float8, capsys):
    status = experiment.main(
        [str(with_float8), "--quick", "--bits", "1", "--output", str(tmp_path / "out")]
    )
    assert status == 1
    printed = capsys.readouterr().out
    assert "1 of 2 weight tensors" in printed
    assert "fp8 (8x64, float8_e8m0): of type float8_e8m0, which is not read" in printed


def test_strict_refuses_weights_of_float8(tmp_path, with_float8, capsys):
    out = tmp_path / "out"
    status = experiment.main([str(with_float8), "--strict", "--output", str(out)])
    assert_error(capsys, status, "fp8: of type float8_e8m0", "without --strict")
    assert not out.exists()


def test_verbose_lists_what_is_left_out(tmp_path, net, capsys):
    out = tmp_path / "out"
    arguments = [str(net), "--quick", "--bits", "1", "--output", str(out)]
    assert experiment.main([*arguments, "--verbose"]) == 0
    printed = capsys.readouterr().out
    assert "bias (5, float64): of rank 1" in printed
    origin = json.loads((out / f"{NAME}.json").read_text())
    names = [tensor["name"] for tensor in origin["omissions"]["left_out"]]
    assert names == ["bias"]


@pytest.mark.parametrize("group", [None, 4])
def test_directions_of_a_recurrent_layer_have_scales_of_their_own(tmp_path, rng, group):
    onnx = pytest.importorskip("onnx")
    powers = np.geomspace(1, 1e3, 12).reshape(2, 6, 1)
    array = (powers * rng.standard_normal((2, 6, 16))).astype(np.float32)
    node = onnx.helper.make_node("GRU", ["x", "w", "r"], ["y"], direction="bidirectional")
    weight = onnx.numpy_helper.from_array(array, "w")
    graph = onnx.helper.make_graph([node], "g", [], [], initializer=[weight])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "net.onnx")
    arguments = [] if group is None else ["--group-size", group]

    status, errors = run(tmp_path, tmp_path / "net.onnx", "--quick", "--bits", 2, *arguments)

    assert status == 0
    rows = array.reshape(-1, group or 16)
    assert errors["w"][2] == pytest.approx(greedy_error(rows, 2), rel=1e-5)


def test_runs_repeat_exactly(tmp_path, net):
    assert run(tmp_path, net, "--quick") == run(tmp_path, net, "--quick")


def test_quick_takes_tensors_evenly(tmp_path):
    count = 2 * experiment.QUICK_TENSORS + 1
    np.savez(tmp_path / "net.npz", **{f"w{i:03}": np.eye(3) for i in range(count)})
    _, errors = run(tmp_path, tmp_path / "net.npz", "--quick", "--bits", "1")
    names = sorted(name for name in errors if name.startswith("w"))
    assert names == [f"w{i:03}" for i in range(0, count, 3)]


def test_table_figure_and_provenance(tmp_path, net, capsys):
    run(tmp_path, net, "--bits", "1,4", "--quick")

    printed = capsys.readouterr().out
    for word in ("gaussian", "half", "fortran", "overall", "Laplace", "1 other float tensor:"):
        assert word in printed
    out = tmp_path / "out"
    assert (out / f"{NAME}.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / f"{NAME}.svg").read_text()
    origin = json.loads((out / f"{NAME}.json").read_text())
    assert origin["arguments"]["bits"] == [1, 4]
    assert origin["arguments"]["paths"] == ["net.npz"]
    assert origin["seed"] == experiment.SEED
    assert (origin["tensors"], origin["left_out"]) == (3, 1)
    assert origin["library"] == "numpy"


# Errors


def assert_error(capsys, status, *parts):
    error = capsys.readouterr().err
    assert status == 2
    assert error.count("\n") == 1
    for part in parts:
        assert part in error


def test_missing_file(tmp_path, capsys):
    status = experiment.main([str(tmp_path / "no.npy")])
    assert_error(capsys, status, "no.npy", "no such file")


def test_nan_weights(tmp_path, capsys):
    np.save(tmp_path / "w.npy", np.full((2, 3), np.nan))
    status = experiment.main([str(tmp_path / "w.npy"), "--output", str(tmp_path / "out")])
    assert_error(capsys, status, "NaN", "repair")
    assert not list((tmp_path / "out").iterdir())


def test_weights_whose_squares_overflow(tmp_path, capsys):
    np.save(tmp_path / "w.npy", np.full((2, 3), 1e200))
    status = experiment.main([str(tmp_path / "w.npy"), "--output", str(tmp_path / "out")])
    assert_error(capsys, status, "'w'", "overflow", "scale it")


def test_integer_weights(tmp_path, capsys):
    np.save(tmp_path / "w.npy", np.ones((2, 3), int))
    status = experiment.main([str(tmp_path / "w.npy")])
    assert_error(capsys, status, "no float arrays", "float32")


def test_channel_axis_that_does_not_exist(tmp_path, net, capsys):
    status = experiment.main([str(net), "--channel-axis", "2", "--output", str(tmp_path / "out")])
    assert_error(capsys, status, "gaussian", "(64, 256)", "auto")
    assert not (tmp_path / "out").exists()


def test_output_that_is_a_file(tmp_path, net, capsys):
    (tmp_path / "out").write_text("")
    status = experiment.main([str(net), "--output", str(tmp_path / "out")])
    assert_error(capsys, status, "--output", "choose another")


def test_cuda_without_cupy(net, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    status = experiment.main([str(net), "--device", "cuda"])
    assert_error(capsys, status, "CuPy cannot be imported", "--device cpu")


def test_cuda_without_a_gpu(net, capsys):
    cupy = pytest.importorskip("cupy")
    if cupy.cuda.is_available():
        pytest.skip("there is a GPU")
    status = experiment.main([str(net), "--device", "cuda"])
    assert_error(capsys, status, "no CUDA GPU", "--device cpu")


def cupy_stand_in(gpu):
    cupy = types.ModuleType("cupy")
    cupy.cuda = types.SimpleNamespace(is_available=lambda: gpu)
    return cupy


@pytest.mark.parametrize("gpu", [True, False])
def test_device_auto_is_the_gpu_where_there_is_one(monkeypatch, gpu):
    cupy = cupy_stand_in(gpu)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert experiment.array_library("cpu") is np
    assert experiment.array_library("auto") is (cupy if gpu else np)


def test_arrays_are_moved_to_the_device_one_by_one(net, monkeypatch):
    moved = []

    def asarray(array):
        moved.append(array.shape)
        return array

    monkeypatch.setitem(sys.modules, "stand_in", types.SimpleNamespace(asarray=asarray))
    weights = experiment.Weights([net])
    chosen = experiment.choose(weights.tensors, "auto", None, "stand_in")

    assert len(chosen) == 3
    for count, one in enumerate(chosen, start=1):
        array = one.load()
        assert len(moved) == count
        assert moved[-1] == array.shape


# The figure


@pytest.fixture(scope="module")
def measured():
    rng = np.random.default_rng(0)
    weights = [(f"w{i}", rng.standard_normal((4, 64))) for i in range(5)]
    weights.append(("zeros", np.zeros((4, 64))))
    return {
        tuple(bits): (
            experiment.error_per_bit_width(weights, bits).rows,
            experiment.error_per_bit_width(experiment.samples(1000, np), bits).rows,
        )
        for bits in ([1, 2, 4, 8], [1, 2], [3])
    }


@pytest.mark.parametrize("bits", [(1, 2, 4, 8), (1, 2), (3,)])
def test_figure_shows_every_curve_within_its_axes(measured, bits):
    ax = Figure().subplots()
    weight_rows, sample_rows = measured[bits]

    assert experiment.draw_errors(ax, weight_rows, sample_rows) is ax

    lines = {line.get_label(): line for line in ax.get_lines()}
    assert len(lines) == 6
    low, high = ax.get_ylim()
    for line in lines.values():
        values = line.get_ydata()
        assert np.all((low < values) & (values < high))
    [median] = [line for label, line in lines.items() if "median over tensors (n = 6)" in label]
    np.testing.assert_array_equal(median.get_xdata(), bits)
    for width, value in zip(bits, median.get_ydata(), strict=True):
        errors = [row.relative_mse for row in weight_rows if row.bits == width]
        assert value == np.median(errors)


def test_figure_has_axes_with_units_and_a_legend_beside_the_curves(measured):
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    ax = experiment.draw_errors(figure.subplots(), *measured[1, 2])
    figure.draw_without_rendering()

    assert ax.get_yscale() == "log"
    assert "bits" in ax.get_xlabel()
    [decibels] = [other for other in figure.axes if other is not ax]
    assert "dB" in decibels.get_ylabel()
    np.testing.assert_allclose(decibels.get_ylim(), -10 * np.log10(ax.get_ylim()))
    legend = ax.get_legend().get_window_extent()
    assert not legend.overlaps(ax.get_window_extent())
    assert not legend.overlaps(ax.xaxis.label.get_window_extent())
    assert legend.y0 >= 0
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.x1


# The script


def script(*arguments, cwd):
    path = ROOT / "experiments" / f"{NAME}.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", str(path), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.exhaustive
@pytest.mark.skipif(importlib.util.find_spec("rapidocr") is None, reason="rapidocr is missing")
def test_script_without_paths_runs_on_the_pretrained_sample(tmp_path):
    done = script("--quick", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "overall" in done.stdout
    written = sorted({path.suffix for path in (tmp_path / "output").iterdir()})
    assert written == [".csv", ".json", ".png", ".svg"]
    origin = json.loads((tmp_path / "output" / f"{NAME}.json").read_text())
    assert origin["arguments"]["paths"] == []
    assert "rapidocr" in origin["versions"]


def test_script_reports_an_error_in_one_line(tmp_path):
    done = script("no-such-file.npy", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"{NAME}.py: error: no-such-file.npy: no such file or folder; check the path"
    ]
