"""A run on 1,000 workers, simulated: how many tasks, and what they cost the scheduler.

The files of a checkpoint of 10^5 tensors and 10^13 weights are written as headers in front of
holes, and read as `python -m cubin error` reads them. Its tasks are made and pickled, for several
sizes of a task. What a task costs Dask's scheduler is measured with real tasks that compute
nothing, what a weight costs a worker with an array. A simulation of the workers then gives the time
of the run. The script prints a table and writes scheduler_scale.csv and .json to the output folder.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import itertools
import json
import math
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import provenance
from command_line import exit_status, output_parser, write_results
from tqdm import tqdm

from cubin.analysis import measure, tasks
from cubin.analysis.measure import Sweep, cuts_of, entry_of
from cubin.analysis.tasks import Piece, Result, batches
from cubin.commands.arguments import UsageError, make_folder
from cubin.commands.error import Chosen, sweep_for
from cubin.weights import Weights

NAME = "scheduler_scale"
SEED = 0
BITS = range(1, 9)
LAYER = {
    "mlp.up": (24576, 12288), "mlp.down": (12288, 24576), "query": (12288, 12288),
    "value": (12288, 12288), "key": (7168, 12288),
    **{f"adapter.{number}": (1024, 1024) for number in range(5)},
}  # fmt: skip
"""The weights of a layer: 10 tensors of nearly 10^9 weights, half of them small."""

LAYERS, QUICK_LAYERS = 10_000, 20
SHARD = 2
"""Layers of a file."""

PARTS = (1 << 24, 1 << 26, 1 << 28)
"""Weights of the largest task."""

BATCHES = (0, 1 << 22)
"""Weights from which on a task takes no more tensors; with 0, each has a task of its own."""

PICKLED = 2000
"""Tasks whose messages are weighed, spread over the run."""


@dataclass(frozen=True)
class Line:
    """A run with tasks of some size.

    Attributes
    ----------
    part, batch : int
        Weights of the largest task, and those from which on a task takes no more tensors.
    tasks : int
    task_bytes : float
        Bytes of a task and its result, in the mean.
    scheduler_seconds : float
        What all tasks cost the scheduler, which deals with one at a time.
    worker_seconds : float
        What they cost a worker each, if they are shared evenly.
    seconds : float
        When the last task ends.
    """

    part: int
    batch: int
    tasks: int
    task_bytes: float
    scheduler_seconds: float
    worker_seconds: float
    seconds: float

    @property
    def efficiency(self) -> float:
        """The share of the run in which workers work."""
        return self.worker_seconds / self.seconds


def argument_parser() -> argparse.ArgumentParser:
    parser = output_parser(NAME, __doc__, "200 tensors, 100 real tasks")
    parser.add_argument("--workers", type=int, default=1000, metavar="N", help="(default: 1000)")
    parser.add_argument("--tasks", type=int, default=20_000, metavar="N",
                        help="real tasks that are timed (default: 20000)")  # fmt: skip
    return parser


# ---------------------------------------------------------------- the checkpoint


def write_headers(folder: Path, layers: int) -> None:
    """Write shards whose data are a hole each: they take no room on a disk that knows holes."""
    starts = range(0, layers, SHARD)
    for number, start in enumerate(starts):
        header, at = {}, 0
        for layer in range(start, min(start + SHARD, layers)):
            for name, shape in LAYER.items():
                end = at + 2 * math.prod(shape)
                header[f"layers.{layer}.{name}"] = {
                    "dtype": "BF16", "shape": shape, "data_offsets": [at, end],
                }  # fmt: skip
                at = end
        text = json.dumps(header).encode()
        path = folder / f"model-{number + 1:05}-of-{len(starts):05}.safetensors"
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            os.truncate(file.fileno(), 8 + len(text) + at)


def pieces_of(weights: Weights, sweep: Sweep) -> Iterator[Piece]:
    """The pieces of a run, as the command makes them."""
    for number, weight in enumerate(weights.tensors):
        chosen = Chosen(weight, weight.channel_axis, None)
        entry = entry_of(sweep, chosen.name, chosen, chosen.channel_axis)
        for part, cut in enumerate(cuts_of(entry, sweep)):
            yield Piece(number, part, entry, cut)


# ---------------------------------------------------------------- what is measured


@functools.cache
def a_result() -> Result:
    """The result of a small tensor, which is as long a message as that of a large one."""
    sweep = sweep_for(BITS, ("greedy",), None, None)
    x = np.random.default_rng(SEED).standard_normal((64, 64), np.float32)
    return measure.measure(sweep, entry_of(sweep, "x", x, 0), ())


def answer(sweep: Sweep, task: list[Piece], attempt: int) -> list[Result]:
    """What a worker sends back, without the work."""
    return [a_result() for _ in task]


class Answers:
    """A client of Dask on whose workers tasks do nothing."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def submit(self, _: Any, *arguments: Any) -> Future[Any]:
        return self._client.submit(answer, *arguments)


def seconds_of_a_task(sweep: Sweep, pieces: Iterable[Piece], count: int) -> float:
    """What a task costs the client and the scheduler, which are one process here.

    Raises
    ------
    UsageError
        If Dask is not installed.
    """
    try:
        import distributed
    except ModuleNotFoundError as error:
        raise UsageError(f"needs {error.name}: pip install 'dask[distributed]'") from error
    listed = list(itertools.islice(pieces, count))
    folder = str(Path(__file__).parent)
    with (
        distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.run(sys.path.insert, 0, folder)
        list(tasks.spread(sweep, listed[:10], Answers(client)))  # which import the package
        begun = time.process_time()
        for _ in tqdm(
            tasks.spread(sweep, listed, Answers(client)),
            "tasks", len(listed), unit="task", disable=None,
        ):  # fmt: skip
            pass
        return (time.process_time() - begun) / len(listed)


def seconds_of_a_weight(sweep: Sweep) -> float:
    """What a weight costs a worker of one thread per bit width and in all: all of the sweep."""
    x = np.random.default_rng(SEED).standard_normal((1024, 12288), np.float32)
    entry = entry_of(sweep, "x", x, 0)
    measure.measure(sweep, entry, ())  # what the first call compiles is not counted
    taken = []
    for _ in range(3):
        begun = time.process_time()
        measure.measure(sweep, entry, ())
        taken.append(time.process_time() - begun)
    return float(np.median(taken)) / x.size


# ---------------------------------------------------------------- the simulation


def simulated(sizes: Sequence[int], workers: int, per_task: float, per_weight: float) -> float:
    """When the last of these tasks ends: the scheduler hands out one after the other.

    A task goes to the worker that has been free for the longest time.
    """
    free = [0.0] * workers
    clock = last = 0.0
    for size in sizes:
        clock += per_task
        done = max(clock, heapq.heappop(free)) + size * per_weight
        heapq.heappush(free, done)
        last = max(last, done)
    return last


def line_of(
    part: int, batch: int, weights: Weights, sweep: Sweep, workers: int, costs: tuple[float, float]
) -> Line:
    """Make the tasks of a run, and simulate it."""
    measure.PART, tasks.BATCH = part, batch
    sizes, nbytes, count = [], [], 0
    expected = -(-sum(w.size for w in weights.tensors) // part)
    every = max(1, expected // PICKLED)
    answered = len(pickle.dumps(a_result()))
    for task in batches(pieces_of(weights, sweep)):
        sizes.append(sum(piece.size for piece in task))
        if not count % every:
            nbytes.append(len(pickle.dumps((sweep, task, 0))) + answered * len(task))
        count += 1
    per_task, per_weight = costs
    return Line(
        part, batch, count, float(np.mean(nbytes)), count * per_task,
        sum(sizes) * per_weight / workers, simulated(sizes, workers, per_task, per_weight),
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Measure, simulate, print and write the results; return the exit status."""
    layers = QUICK_LAYERS if arguments.quick else LAYERS
    count = 100 if arguments.quick else arguments.tasks
    sweep = sweep_for(BITS, ("greedy",), None, None)
    make_folder(arguments.output)
    before = measure.PART, tasks.BATCH
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_headers(folder, layers)
            begun = time.perf_counter()
            weights = Weights(folder)
            headers = time.perf_counter() - begun
            measure.PART, tasks.BATCH = PARTS[0], 0
            costs = (
                seconds_of_a_task(sweep, pieces_of(weights, sweep), count),
                seconds_of_a_weight(sweep),
            )
            lines = [
                line_of(part, batch, weights, sweep, arguments.workers, costs)
                for part, batch in tqdm(
                    list(itertools.product(PARTS, BATCHES)), "runs", unit="run", disable=None
                )
            ]
    finally:
        measure.PART, tasks.BATCH = before
    tensors, size = len(weights.tensors), sum(weight.size for weight in weights.tensors)
    print(
        f"{tensors:,} tensors, {size:.3g} weights, {len(BITS)} bit widths; their headers are read "
        f"in {headers:.1f} s.\nA task costs the scheduler {1e3 * costs[0]:.2f} ms, a weight a "
        f"worker {1e9 * costs[1]:.1f} ns.\n"
    )
    print(f"{'largest':>10} {'batch':>9} {'tasks':>9} {'MB sent':>9} {'scheduler':>10} "
          f"{'work':>8} {'in all':>8} {'busy':>6}")  # fmt: skip
    for line in lines:
        print(
            f"{line.part:>10,} {line.batch:>9,} {line.tasks:>9,} "
            f"{line.tasks * line.task_bytes / 1e6:>9.0f} {line.scheduler_seconds:>8.0f} s "
            f"{line.worker_seconds:>6.0f} s {line.seconds:>6.0f} s {line.efficiency:>6.0%}"
        )
    found = {
        "tensors": tensors, "weights": size, "header_seconds": headers,
        "seconds_of_a_task": costs[0], "seconds_of_a_weight": costs[1],
    }  # fmt: skip
    origin = provenance.record(vars(arguments), SEED, ("distributed", "numba")) | found
    print()
    header = [column.name for column in fields(Line)]
    write_results(NAME, arguments.output, header, map(astuple, lines), origin, digits=None)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status, 2 for what the user can mend."""
    return exit_status(NAME, run, argument_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
