"""Sweeps on executors: the same bits as in one process, and what becomes of workers that die."""

from __future__ import annotations

import os
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from cubin.analysis import error_per_bit_width, measure, tasks
from cubin.analysis.measure import cuts_of, entry_of
from cubin.analysis.processes import Processes
from cubin.analysis.sweep import sweep_of
from cubin.weights import Weights
from tests.required import require

BITS = [1, 3]


@pytest.fixture
def weights(tmp_path, rng):
    arrays = {f"w{i}": rng.standard_normal((30, 7 + i)) for i in range(6)}
    np.savez(tmp_path / "net.npz", **arrays)
    np.save(tmp_path / "plain.npy", rng.standard_normal((400, 9)).astype(np.float32))
    return Weights(tmp_path)


class Backwards:
    """An executor that runs what it has last got first, one task each time a result is due."""

    in_flight = 3

    def __init__(self):
        self.waiting = []

    def submit(self, function, *arguments):
        future = Future()
        self.waiting.append((future, function, arguments))
        if len(self.waiting) == self.in_flight or arguments[2]:
            self.flush()
        return future

    def flush(self):
        for future, function, arguments in reversed(self.waiting):
            future.set_result(function(*arguments))
        self.waiting.clear()


@pytest.mark.parametrize("small", [True, False])
def test_every_executor_gives_the_same_bits(weights, monkeypatch, small):
    if small:  # every tensor in parts, every part a task
        monkeypatch.setattr(measure, "PART", 50)
        monkeypatch.setattr(tasks, "BATCH", 1)
    solvers = ("greedy", "refined")
    expected = error_per_bit_width(weights, BITS, solvers)
    with ThreadPoolExecutor(3) as threads, Processes(2) as processes:
        for executor in (threads, processes):
            assert error_per_bit_width(weights, BITS, solvers, executor=executor) == expected
    if small:
        backwards = Backwards()
        backwards.in_flight = 1
        assert error_per_bit_width(weights, BITS, solvers, executor=backwards) == expected


@pytest.mark.filterwarnings("default")
def test_dask_gives_the_same_bits(weights, monkeypatch):
    distributed = require("distributed")
    monkeypatch.setattr(measure, "PART", 50)
    expected = error_per_bit_width(weights, BITS)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        assert error_per_bit_width(weights, BITS, executor=client) == expected


def test_arrays_in_memory_are_sent(rng):
    arrays = {f"w{i}": rng.standard_normal((30, 7)) for i in range(4)} | {"ints": np.arange(3)}
    expected = error_per_bit_width(arrays, BITS)
    with Processes(2) as processes:
        assert error_per_bit_width(arrays, BITS, executor=processes) == expected
    assert [name for name, _ in expected.skipped] == ["ints"]


def test_parts_are_whole_rows_and_give_the_error_of_the_whole(weights, monkeypatch):
    whole = error_per_bit_width(weights, BITS, ("greedy", "alternating"))
    monkeypatch.setattr(measure, "PART", 50)
    parts = error_per_bit_width(weights, BITS, ("greedy", "alternating"))
    for one, other in zip(whole.rows, parts.rows, strict=True):
        assert (one.name, one.shape, one.effective_bits) == (
            other.name,
            other.shape,
            other.effective_bits,
        )
        assert one.max_abs_error == other.max_abs_error
        np.testing.assert_allclose(one.sums, other.sums, rtol=1e-12)


@pytest.mark.parametrize(
    ("shape", "axis", "group", "cuts"),
    [
        ((10, 10), 0, None, [(slice(0, 5),), (slice(5, 10),)]),
        ((10, 10), -1, None, [(slice(None), slice(0, 5)), (slice(None), slice(5, 10))]),
        ((10, 10), (1, 0), None, [(slice(None), slice(0, 5)), (slice(None), slice(5, 10))]),
        ((2, 100), 0, None, [(slice(0, 1),), (slice(1, 2),)]),
        ((10, 10), 0, 5, [(slice(0, 5),), (slice(5, 10),)]),
        ((10, 10), None, None, [()]),
        ((100,), None, 5, [()]),
        ((5, 10), 0, None, [()]),
    ],
)
def test_where_tensors_are_cut(monkeypatch, shape, axis, group, cuts):
    monkeypatch.setattr(measure, "PART", 50)
    sweep = sweep_of(2, "greedy", channel_axis="auto", group_size=group, iterations=2)
    entry = entry_of(sweep, "x", np.zeros(shape), axis)
    assert cuts_of(entry, sweep) == cuts
    sweep = sweep_of(lambda x: 2, "greedy", channel_axis="auto", group_size=group, iterations=2)
    assert cuts_of(entry, sweep) == [()]


def test_squares_that_vanish_in_one_part_alone(monkeypatch):
    x = np.ones((10, 10))
    x[:5] = 1e-200
    monkeypatch.setattr(measure, "PART", 50)
    assert len(error_per_bit_width({"x": x}, 1).rows) == 1
    with pytest.raises(ValueError, match="vanish"):
        error_per_bit_width({"x": np.full((10, 10), 1e-200)}, 1)
    x[9, 9] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        error_per_bit_width({"x": x}, 1)


# Workers that die


@dataclass(frozen=True)
class Deadly:
    """A tensor that ends the process that reads it, as often as is said."""

    folder: Path
    times: int
    shape: tuple[int, ...] = (4, 5)

    def load(self, cut=()):
        deaths = len(list(self.folder.iterdir()))
        if deaths < self.times:
            (self.folder / str(deaths)).touch()
            os._exit(1)
        return np.arange(20.0).reshape(4, 5)[cut]


@dataclass(frozen=True)
class Calm:
    shape: tuple[int, ...] = (4, 5)

    def load(self, cut=()):
        return np.arange(20.0).reshape(4, 5)[cut]


@pytest.mark.parametrize("times", [1, 2])
def test_a_worker_that_dies_is_replaced(tmp_path, times):
    arrays = [(f"c{i}", Calm(), 0) for i in range(5)]
    arrays.insert(2, ("deadly", Deadly(tmp_path, times), 0))
    with Processes(2) as processes:
        table = error_per_bit_width(arrays, BITS, executor=processes)
    assert [row.name for row in table.rows[::2]] == [name for name, _, _ in arrays]
    assert len(list(tmp_path.iterdir())) == times
    assert len({row.relative_mse for row in table.rows}) == len(BITS)


@pytest.mark.filterwarnings("default")
def test_a_worker_of_dask_that_dies_is_replaced(tmp_path):
    distributed = require("distributed")
    arrays = [("calm", Calm(), 0), ("deadly", Deadly(tmp_path, 1), 0)]
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        table = error_per_bit_width(arrays, BITS, executor=client)
    assert [row.name for row in table.rows] == ["calm", "calm", "deadly", "deadly"]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_tensor_that_always_kills_its_worker_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "BATCH", 1)
    arrays = [(f"c{i}", Calm(), 0) for i in range(5)] + [("deadly", Deadly(tmp_path, 99), 0)]
    sweep = sweep_of(BITS, "greedy", channel_axis="auto", group_size=None, iterations=2)
    entries = [
        (number, entry_of(sweep, name, source, axis))
        for number, (name, source, axis) in enumerate(arrays)
    ]
    with Processes(2) as processes:
        found = {one.name: one for one in tasks.outcomes(sweep, entries, processes)}
    assert isinstance(found.pop("deadly").failure, BrokenProcessPool)
    assert len(found) == 5
    assert all(outcome.rows for outcome in found.values())
    assert len(list(tmp_path.iterdir())) == tasks.ATTEMPTS


def test_a_pool_that_is_not_ours_is_not_replaced(tmp_path):
    arrays = [("deadly", Deadly(tmp_path, 1), 0)]
    with (
        ProcessPoolExecutor(1, get_context("spawn")) as pool,
        pytest.raises(BrokenProcessPool),
    ):
        error_per_bit_width(arrays, BITS, executor=pool)


class Refusing:
    """An executor whose tasks of several tensors fail, and those of one the first time."""

    def __init__(self):
        self.calls = []

    def submit(self, function, sweep, task, attempt):
        self.calls.append((len(task), attempt))
        future = Future()
        if len(task) > 1 or attempt < 2:
            future.set_exception(OSError("the worker is gone"))
        else:
            future.set_result(function(sweep, task, attempt))
        return future


def test_what_an_executor_refuses_is_tried_again_one_by_one(weights):
    executor = Refusing()
    assert error_per_bit_width(weights, BITS, executor=executor) == error_per_bit_width(
        weights, BITS
    )
    assert executor.calls[0] == (7, 0)
    assert sorted(executor.calls[1:]) == [(1, 1)] * 7 + [(1, 2)] * 7


def test_what_fails_in_a_worker_is_raised_with_the_name(weights):
    def wrong(x, bits):
        raise ZeroDivisionError("wrong")

    with ThreadPoolExecutor(1) as threads, pytest.raises(ZeroDivisionError) as error:
        error_per_bit_width(weights, BITS, wrong, executor=threads)
    assert "net:w0" in error.value.__notes__[0]


def test_few_arrays_are_held_at_a_time(monkeypatch, rng):
    """A generator is read as its arrays are done."""
    monkeypatch.setattr(tasks, "BATCH", 1)
    monkeypatch.setattr(tasks, "MOST_SENT", 3 * 8 * 20)
    produced, measured, ahead = [], [], []

    def arrays():
        for i in range(20):
            produced.append(i)
            ahead.append(len(produced) - len(measured))
            yield f"x{i}", rng.standard_normal((4, 5))

    class Counting(Backwards):
        in_flight = 1

        def flush(self):
            measured.append(0)
            super().flush()

    assert len(error_per_bit_width(arrays(), 1, executor=Counting()).rows) == 20
    assert max(ahead) <= 4


def test_threads_of_workers(monkeypatch):
    from cubin.core.host import blocks

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert blocks._workers() == 1
    with Processes(2) as processes:
        cores = os.cpu_count() or 1
        assert processes.submit(os.getenv, "OMP_NUM_THREADS").result() == str(max(1, cores // 2))
