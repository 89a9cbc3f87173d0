from __future__ import annotations

import csv
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import cubin
from cubin import __main__ as command
from cubin.analysis import error_per_bit_width
from cubin.commands import error
from cubin.weights import Weights
from tests.exhaustive import few
from tests.required import require

ROOT = Path(__file__).resolve().parents[2]
CSV = "error_per_bit_width.csv"
BITS = ["--bits", "1-3"]


def run(*arguments):
    return command.main(["error", *map(str, arguments)])


@pytest.fixture
def expected(checkpoint, tmp_path, capsys):
    """The CSV of a run in one process without interruption."""
    assert run(checkpoint, *BITS, "--output", tmp_path / "expected") == 1
    capsys.readouterr()
    return (tmp_path / "expected" / CSV).read_bytes()


# What it prints and writes


def test_rows_are_those_of_the_analysis(checkpoint, tmp_path, expected):
    with (tmp_path / "expected" / CSV).open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if not row["skipped"]]
    table = error_per_bit_width(Weights(checkpoint), range(1, 4))
    assert [name for name, _ in table.skipped] == ["model-2-of-2:bad"]
    every = [*table.rows, *table.overall()]
    assert [row["name"] for row in rows] == [row.name for row in every]
    for name in ("relative_mse", "sqnr_db", "max_abs_error", "effective_bits"):
        assert [float(row[name]) for row in rows] == [getattr(row, name) for row in every]


def test_skipped_weights_are_named(checkpoint, tmp_path, capsys):
    assert run(checkpoint, *BITS, "--output", tmp_path / "out") == 1
    printed = capsys.readouterr().out
    assert "10 of 11 weight tensors" in printed
    assert "model-2-of-2:bad (3x4, float32): 12 of 12 values are NaN or infinite" in printed
    last = (tmp_path / "out" / CSV).read_text().splitlines()[-1]
    assert last == "model-2-of-2:bad,3x4,,,,,,,,,,,,12 of 12 values are NaN or infinite"
    assert run(checkpoint, *BITS, "--exclude", "bad") == 0
    assert run(checkpoint, *BITS, "--strict") == 2
    assert "bad: 12 of 12 values" in capsys.readouterr().err


def test_the_table_has_the_worst_tensors_and_the_overall_rows(tmp_path, rng, capsys):
    arrays = {f"w{i:02}": rng.standard_normal((4, 50)) ** (1 + i % 30) for i in range(30)}
    np.savez(tmp_path / "net.npz", **arrays)
    assert run(tmp_path / "net.npz", *BITS, "--solver", "greedy,refined") == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if line.startswith("w")]
    assert len(shown) == 10
    assert len([line for line in lines if line.startswith("overall")]) == 6
    rows = error_per_bit_width(Weights(tmp_path / "net.npz"), 3, "refined").rows
    worst = sorted(rows, key=lambda row: -row.relative_mse)[:10]
    assert [line.split()[0] for line in shown] == [row.name for row in worst]


def test_json(checkpoint, tmp_path, capsys):
    np.save(tmp_path / "zeros.npy", np.zeros((2, 3)))
    assert run(tmp_path / "zeros.npy", "--bits", "1", "--json") == 0
    said = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert said["overall"][0]["relative_mse"] == 0
    assert said["overall"][0]["sqnr_db"] == "inf"
    assert said["tensors"] == 1
    assert run(checkpoint, *BITS, "--json", "--plan") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["tensors"], said["passes"]) == (11, 3)


def test_the_plan_reads_no_data(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(error.Chosen, "load", lambda *_: pytest.fail("data were read"))
    assert run(checkpoint, "--plan") == 0
    printed = capsys.readouterr().out
    assert "11 tensors of 5,292 weights, in 11 parts" in printed
    assert "Peak memory" in printed


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["no.npy"], "no such file"),
        (["net.npz", "--bits", "9-10", "--solver", "optimal"], "bits"),
        (["net.npz", "--include", "("], "regular expressions"),
        (["net.npz", "--scheduler", "tcp://127.0.0.1:1"], "--scheduler"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, problem):
    np.savez(tmp_path / "net.npz", w=np.ones((4, 8)))
    monkeypatch.chdir(tmp_path)
    if "--scheduler" in arguments:
        monkeypatch.setitem(sys.modules, "distributed", None)
    assert run(*arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("cubin error: error: ")
    assert problem in last


def test_help_has_examples_and_the_exit_status(capsys):
    for arguments in (["--help"], ["error", "--help"], ["quantize", "--help"], ["show", "--help"]):
        with pytest.raises(SystemExit) as stop:
            command.main(arguments)
        assert stop.value.code == 0
        said = capsys.readouterr().out
        assert "python -m cubin " in said
        assert "exit status:" in said


@pytest.mark.parametrize("group", [None, 4, 5])
@pytest.mark.parametrize("axis", ["auto", "1", "none"])
def test_granularity(tmp_path, rng, group, axis):
    array = rng.standard_normal((8, 12))
    np.save(tmp_path / "w.npy", array)
    arguments = [] if group is None else ["--group-size", group]
    out = tmp_path / "out"
    status = run(tmp_path / "w.npy", "--channel-axis", axis, "--output", out, *BITS, *arguments)
    assert status == 0
    with (out / CSV).open(newline="") as stream:
        found = [float(row["relative_mse"]) for row in csv.DictReader(stream)][:3]
    turned = {"auto": array, "1": array.T, "none": array.reshape(1, -1)}[axis]
    table = error_per_bit_width({"w": turned.copy()}, range(1, 4), group_size=group)
    np.testing.assert_allclose(found, [row.relative_mse for row in table.rows], rtol=1e-12)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"cubin {cubin.__version__}\n"


def test_files_that_are_left_out_are_counted_apart_from_tensors(tmp_path, capsys):
    np.savez(tmp_path / "net.npz", w=np.ones((4, 8)), bias=np.ones(4))
    for name in ("a", "b"):
        cubin.quantize(np.ones((2, 3)), 1).save(tmp_path / f"{name}.safetensors")
    assert run(tmp_path, *BITS) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "  2 other files: codes of cubin, which are no weights" in printed
    assert "  1 other float tensor: of rank 1" in printed


# The same bits from everywhere


def test_the_experiment_writes_the_same(checkpoint, tmp_path, expected, python):
    script = ROOT / "experiments" / "error_per_bit_width.py"
    process = python(script, checkpoint, *BITS, "--output", tmp_path / "out")
    printed = process.communicate()
    assert process.returncode == 1, printed
    assert (tmp_path / "out" / CSV).read_bytes() == expected


def test_two_processes_write_the_same(checkpoint, tmp_path, expected, python):
    out = tmp_path / "out"
    process = python("-m", "cubin", "error", checkpoint, *BITS, "--output", out, "--workers", "2")
    printed = process.communicate()
    assert process.returncode == 1, printed
    assert (out / CSV).read_bytes() == expected


@pytest.mark.filterwarnings("default")
def test_dask_writes_the_same(checkpoint, tmp_path, expected):
    distributed = require("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        address = cluster.scheduler_address
        status = run(checkpoint, *BITS, "--output", tmp_path / "out", "--scheduler", address)
    assert status == 1
    assert (tmp_path / "out" / CSV).read_bytes() == expected


# Resume


def test_what_is_done_is_not_measured_again(checkpoint, tmp_path, expected, monkeypatch):
    out = tmp_path / "expected"
    (out / CSV).unlink()
    monkeypatch.setattr(error.Chosen, "load", lambda *_: pytest.fail("a tensor was read again"))
    assert run(checkpoint, *BITS, "--output", out) == 1
    assert (out / CSV).read_bytes() == expected


@pytest.mark.parametrize("kept", [0, 1, 5])
@pytest.mark.parametrize("torn", [b"", b'{"tensor": "lay', b"\0\0\0"])
def test_a_torn_line_is_dropped(checkpoint, tmp_path, expected, kept, torn):
    path = tmp_path / "expected" / "results.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:kept]) + torn)
    assert run(checkpoint, *BITS, "--output", path.parent) == 1
    assert (path.parent / CSV).read_bytes() == expected
    assert sorted(path.read_bytes().splitlines()) == sorted(line.rstrip(b"\n") for line in lines)


def test_other_options_or_files_are_not_mixed(checkpoint, tmp_path, expected, capsys):
    out = tmp_path / "expected"
    before = (out / "results.jsonl").read_bytes()
    assert run(checkpoint, "--bits", "1-2", "--output", out) == 2
    assert "results of other options (bits)" in capsys.readouterr().err
    shard = checkpoint / "model-1-of-2.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert run(checkpoint, *BITS, "--output", out) == 2
    assert "results of other files" in capsys.readouterr().err
    assert (out / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize("line", [b"{}", b"[]", b"nonsense", b"1"])
def test_a_damaged_file_of_results_is_refused(checkpoint, tmp_path, expected, capsys, line):
    path = tmp_path / "expected" / "results.jsonl"
    lines = path.read_bytes().splitlines()
    lines[2] = line
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert run(checkpoint, *BITS, "--output", path.parent) == 2
    assert "not a sound file of results" in capsys.readouterr().err


def test_a_second_run_at_the_same_time_is_refused(checkpoint, tmp_path, expected, capsys):
    fcntl = pytest.importorskip("fcntl")
    out = tmp_path / "expected"
    with (out / "results.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run(checkpoint, *BITS, "--output", out) == 2
    assert "another run is writing it" in capsys.readouterr().err


def test_a_tensor_that_fails_is_named_and_tried_again(checkpoint, tmp_path, expected, monkeypatch):
    load = error.Chosen.load

    def broken(chosen, cut=()):
        if chosen.name.endswith("layers.0.w2"):
            raise MemoryError("too large")
        return load(chosen, cut)

    out = tmp_path / "out"
    monkeypatch.setattr(error.Chosen, "load", broken)
    assert run(checkpoint, *BITS, "--output", out) == 1
    assert "failed with MemoryError: too large" in (out / CSV).read_text()
    monkeypatch.undo()
    assert run(checkpoint, *BITS, "--output", out) == 1
    assert (out / CSV).read_bytes() == expected


@pytest.mark.parametrize("workers", [None, 2])
@pytest.mark.parametrize("count", few([2, 20], 2))
def test_killed_at_random_moments_it_goes_on(
    checkpoint, tmp_path, expected, python, workers, count
):
    out = tmp_path / "out"
    arguments = [] if workers is None else ["--workers", workers]
    arguments = ["-m", "cubin", "error", checkpoint, *BITS, "--output", out, *arguments]
    choice = random.Random(count)
    lines = 0
    for _ in range(count):
        process = python(*arguments, start_new_session=True)
        begun = time.monotonic()
        while time.monotonic() - begun < 30 and process.poll() is None:
            path = out / "results.jsonl"
            if path.exists() and path.read_bytes().count(b"\n") > lines:
                break
            time.sleep(0.001)
        time.sleep(choice.random() * 0.02)
        process.kill()  # the command alone: its workers see that it has died
        process.communicate()
        if (out / "results.jsonl").exists():
            found = (out / "results.jsonl").read_bytes().count(b"\n")
            assert found >= lines
            lines = min(found, 11)
    process = python(*arguments)
    printed = process.communicate()
    assert process.returncode == 1, printed
    assert (out / CSV).read_bytes() == expected


def test_ctrl_c(checkpoint, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(error.Chosen, "load", interrupted)
    assert run(checkpoint, *BITS) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")


def test_workers_end_with_the_command(checkpoint, tmp_path, python):
    if not Path("/proc").exists():
        pytest.skip("processes are found in /proc")
    process = python(
        "-m",
        "cubin",
        "error",
        checkpoint,
        "--bits",
        "1-16",
        "--workers",
        "2",
        start_new_session=True,
    )
    session = process.pid
    limit = time.monotonic() + 60
    while len(members(session)) < 4 and time.monotonic() < limit and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    while members(session) and time.monotonic() < limit:
        time.sleep(0.05)
    left = members(session)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def members(session):
    """The processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found
