"""`python -m cubin error`: what bit widths and solvers cost on the weights of files."""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import io
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cubin.analysis.measure import Sweep, UnfitError, cuts_of, entry_of
from cubin.analysis.processes import Processes
from cubin.analysis.sweep import entry, sweep_of
from cubin.analysis.table import ErrorRow, ErrorTable, counted
from cubin.analysis.tasks import Outcome, outcomes
from cubin.codes.files import replacing
from cubin.commands.arguments import UsageError, array_library, make_folder
from cubin.commands.journal import Journal, Line, fingerprint, record
from cubin.commands.omissions import Omissions
from cubin.weights import NotFiniteError, Weight, Weights, WeightsError, channel_rows
from cubin.weights.tensor import Axis, Cut, first_line

NAME = "error_per_bit_width"


@dataclass(frozen=True)
class Chosen:
    """A weight, and how it is measured: what a task gets, which reads it.

    For groups, it is laid out as (channels, elements of a channel).
    """

    weight: Weight
    channel_axis: Axis
    group_size: int | None
    library: str = "numpy"

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def axes(self) -> list[int]:
        axes = () if self.channel_axis is None else np.atleast_1d(self.channel_axis)
        return [int(axis) % len(self.weight.shape) for axis in axes]

    @property
    def channel_length(self) -> int:
        """Elements of an output channel."""
        return self.weight.size // math.prod(self.weight.shape[axis] for axis in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        if self.group_size is None:
            return self.weight.shape
        return (self.weight.size // self.channel_length, self.channel_length)

    def load(self, cut: Cut = ()) -> Any:
        """Read it, or a part of it, as an array of the library that computes."""
        if self.group_size is None:
            array = self.weight.load(cut)
        elif len(self.axes) == 1:  # of these channels alone
            array = self.weight.load((slice(None),) * self.axes[0] + cut[:1])
            array = channel_rows(array, self.axes[0])
        else:
            array = channel_rows(self.weight.load(), self.channel_axis)[cut]
        return importlib.import_module(self.library).asarray(array)


def channel_axis(weight: Weight, asked: int | str) -> Axis:
    """Choose the channel axis of a weight.

    Raises
    ------
    UsageError
        If the weight has no such axis.
    """
    if isinstance(asked, str):
        return weight.channel_axis if asked == "auto" else None
    if not -len(weight.shape) <= asked < len(weight.shape):
        raise UsageError(
            f"--channel-axis {asked}: {weight.name} of shape {weight.shape} has no such axis; "
            "use auto"
        )
    return asked


def choose(
    weights: Sequence[Weight], asked: int | str, group_size: int | None, library: str
) -> list[Chosen]:
    """Choose the axes of weights.

    Raises
    ------
    UsageError
        If a weight has not the axis that is asked for.
    """
    return [Chosen(w, channel_axis(w, asked), group_size, library) for w in weights]


def sweep_for(bits: Any, solvers: Any, group_size: int | None, iterations: int | None) -> Sweep:
    """Check what is measured.

    Raises
    ------
    UsageError
        If a solver is unknown, or does not take the bits.
    """
    try:
        return sweep_of(
            bits, solvers, channel_axis="auto", group_size=group_size, iterations=iterations
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def measure(
    chosen: Sequence[Chosen],
    sweep: Sweep,
    omissions: Omissions,
    executor: Any = None,
    journal: Journal | None = None,
) -> ErrorTable:
    """Measure weights, in this process or on an executor; those that cannot be are skipped.

    Parameters
    ----------
    chosen : sequence of Chosen
    sweep : Sweep
    omissions : Omissions
        Gets the weights that are skipped, in the order of `chosen`.
    executor : object with submit, optional
    journal : Journal, optional
        What it holds is not measured again, and it gets the rest.

    Returns
    -------
    ErrorTable
        The rows in the order of `chosen`.

    Raises
    ------
    WeightsError
        If a weight cannot be used and none may be skipped, or none can be used.
    """
    before = {} if journal is None else journal.lines
    lines: dict[int, Line] = {}
    last: BaseException | None = None

    def entries() -> Iterator[tuple[int, Any]]:
        for number, one in enumerate(chosen):
            if one.name not in before:
                yield number, entry(sweep, number, one.name, one, one.channel_axis)

    sizes = [one.weight.size for one in chosen]
    done = sum(size for size, one in zip(sizes, chosen, strict=True) if one.name in before)
    measured = outcomes(sweep, entries(), executor)
    bar = tqdm(
        total=sum(sizes),
        initial=done,
        unit=" weights",
        unit_scale=True,
        delay=1,
        leave=False,
        disable=None,
    )
    with contextlib.closing(measured), bar:
        for outcome in measured:
            line, last = line_of(outcome), outcome.unfit or outcome.failure or last
            if omissions.strict and line.skipped:
                raise refused(line, outcome.unfit or outcome.failure)
            lines[outcome.number] = line
            # What has failed is tried again by the next run: a disk may have been full.
            if journal is not None and outcome.failure is None and lasting(outcome.unfit):
                journal.append(line)
            bar.update(sizes[outcome.number])
    rows: list[ErrorRow] = []
    for number, one in enumerate(chosen):
        line = before[one.name] if one.name in before else lines[number]
        rows += line.rows
        if line.skipped:
            omissions.skipped.append(replace(one.weight, reason=line.skipped))
    if not rows:
        skipped = next(iter([*lines.values(), *before.values()]))
        raise refused(skipped, last)
    return ErrorTable(rows)


def lasting(unfit: Exception | None) -> bool:
    """Whether a tensor is as unfit in the next run."""
    return not isinstance(unfit, WeightsError) or isinstance(unfit, NotFiniteError)


def line_of(outcome: Outcome) -> Line:
    if outcome.failure is not None:
        kind = type(outcome.failure).__name__
        return Line(outcome.name, [], f"failed with {kind}: {first_line(outcome.failure)}")
    if isinstance(outcome.unfit, NotFiniteError):
        return Line(outcome.name, [], outcome.unfit.reason)
    if outcome.unfit is not None:
        said = first_line(outcome.unfit).removeprefix(f"{outcome.name}: ")
        return Line(outcome.name, [], said)
    return Line(outcome.name, outcome.rows or [])


def refused(line: Line, error: BaseException | None) -> WeightsError:
    if isinstance(error, WeightsError):
        return error
    return WeightsError(f"array {line.name!r}: {line.skipped}")


# ---------------------------------------------------------------- results


@dataclass(frozen=True)
class Plan:
    """The work of a run, known from the headers."""

    tensors: int
    weights: int
    parts: int
    passes: int
    peak_bytes: int

    def __str__(self) -> str:
        return (
            f"{counted(self.tensors, 'tensor')} of {counted(self.weights, 'weight')}, in "
            f"{counted(self.parts, 'part')}; {counted(self.passes, 'approximation')} of each: "
            f"{self.weights * self.passes:,} in all.\n"
            f"Peak memory: about {self.peak_bytes / 2**30:.2f} GiB in all processes."
        )


PROCESS = 200 << 20
"""Bytes of a process with its libraries and its scratch memory, roughly."""


def plan(chosen: Sequence[Chosen], sweep: Sweep, workers: int | None) -> Plan:
    """Say what a run will do, and estimate its memory: of a part, what is read and two arrays."""
    parts, peak = 0, 0
    for one in chosen:
        with contextlib.suppress(UnfitError):
            cuts = cuts_of(entry_of(sweep, one.name, one, one.channel_axis), sweep)
            parts += len(cuts)
            itemsize = 8 if one.weight.dtype in {"float64", "float128"} else 4
            peak = max(peak, -(-one.weight.size // len(cuts)) * 3 * itemsize)
    processes = workers or 1
    weights = sum(one.weight.size for one in chosen)
    passes = len(sweep.widths) * len(sweep.quantizers)
    main = PROCESS if workers else 0
    total = main + processes * (PROCESS + peak)
    return Plan(len(chosen), weights, parts, passes, total)


def write_csv(path: Path, table: ErrorTable, skipped: Iterable[Weight]) -> None:
    """Write the rows, the overall rows, and the weights that were skipped, with the reason."""
    columns = [column.name for column in fields(ErrorRow) if column.name != "sums"]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([*columns, "skipped"])
    for row in [*table.rows, *table.overall()]:
        values = {name: getattr(row, name) for name in columns}
        writer.writerow([*(values | {"shape": "x".join(map(str, row.shape))}).values(), ""])
    for weight in skipped:
        values = dict.fromkeys(columns, "")
        values |= {"name": weight.name, "shape": "x".join(map(str, weight.shape))}
        writer.writerow([*values.values(), weight.reason])
    with replacing(path) as file:
        file.write(text.getvalue().encode())


@contextlib.contextmanager
def executor_of(workers: int | None, scheduler: str | None, device: str) -> Iterator[Any]:
    """Where the work is done: None for this process."""
    if workers is not None:
        with Processes(workers) as processes:
            yield processes
    elif scheduler is not None:
        try:
            import distributed
        except ModuleNotFoundError as error:
            raise UsageError(
                f"--scheduler needs {error.name}: pip install 'dask[distributed]'"
            ) from error
        try:
            client = distributed.Client(scheduler, timeout="10s")
        except (OSError, ValueError) as error:
            raise UsageError(
                f"--scheduler {scheduler}: no answer ({first_line(error)}); start it with "
                "'dask scheduler'"
            ) from error
        with client:
            yield OnGpu(client) if device == "cupy" else client
    else:
        yield None


@dataclass(frozen=True)
class OnGpu:
    """A client of Dask whose tasks take a GPU each: workers say `--resources "GPU=1"`."""

    client: Any

    def submit(self, function: Any, *arguments: Any) -> Any:
        return self.client.submit(function, *arguments, resources={"GPU": 1})


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write the results; return the exit status."""
    library = array_library(arguments.device).__name__
    weights = Weights(arguments.paths, arguments.include, arguments.exclude)
    omissions = Omissions(weights, arguments.strict)
    chosen = choose(weights.tensors, arguments.channel_axis, arguments.group_size, library)
    sweep = sweep_for(arguments.bits, arguments.solver, arguments.group_size, arguments.iterations)
    planned = plan(chosen, sweep, arguments.workers)
    if arguments.plan:
        print(json.dumps(asdict(planned)) if arguments.json else planned)
        return omissions.exit_status
    print(planned, file=sys.stderr)
    options = {
        "bits": arguments.bits,
        "solvers": arguments.solver,
        "channel_axis": arguments.channel_axis,
        "group_size": arguments.group_size,
        "iterations": arguments.iterations,
        "library": library,
        "version": importlib.import_module("cubin").__version__,
    }
    with contextlib.ExitStack() as stack:
        journal = None
        if arguments.output is not None:
            make_folder(arguments.output)
            described = [
                [one.name, list(one.weight.shape), one.weight.dtype, repr(one.channel_axis)]
                for one in chosen
            ]
            number = fingerprint(options, weights.files, described)
            path = arguments.output / "results.jsonl"
            journal = stack.enter_context(Journal(path, options, number))
            if journal.lines:
                print(f"{len(journal.lines):,} of them are in {path} already.", file=sys.stderr)
        executor = stack.enter_context(executor_of(arguments.workers, arguments.scheduler, library))
        table = measure(chosen, sweep, omissions, executor, journal)
    count = len({row.name for row in table.rows})
    if arguments.output is not None:
        write_csv(arguments.output / f"{NAME}.csv", table, omissions.skipped)
    if arguments.json:
        print(
            json.dumps(
                {
                    "tensors": count,
                    "overall": [record(row) for row in table.overall()],
                    "rows": [record(row) for row in table.rows],
                    **omissions.record(),
                },
                allow_nan=False,
            )
        )
        return omissions.exit_status
    print(table.summary())
    print(f"{count} of {len(weights) + len(weights.skipped)} weight tensors.")
    if said := omissions.text(arguments.verbose):
        print(said)
    if arguments.output is not None:
        print(f"\nWritten: {arguments.output / NAME}.csv and results.jsonl beside it")
    return omissions.exit_status
