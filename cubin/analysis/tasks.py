"""Tasks of a sweep, in this process or on an executor.

A task names tensors and rows of them; a process that gets it opens the files itself. Small tensors
share a task, large ones are cut. What has killed its process is tried again alone, so that only the
tensor that did it is given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from cubin.analysis.measure import (
    Entry,
    Measured,
    Sweep,
    UnfitError,
    cuts_of,
    join,
    measure,
)
from cubin.analysis.table import ErrorRow
from cubin.weights.tensor import Cut, cut_shape

BATCH = 1 << 22
"""Elements from which on a task takes no more tensors: some tens of milliseconds of work."""

MOST_TENSORS = 256
"""The most tensors of a task, so that it stays a small message."""

IN_FLIGHT = 4096
"""Tasks that an executor holds at a time, unless it has an attribute `in_flight`."""

MOST_SENT = 1 << 30
"""Bytes of arrays in memory that an executor holds at a time."""

ATTEMPTS = 3
"""How often a tensor is tried whose task raises or kills its process."""


@dataclass(frozen=True)
class Piece:
    """A part of an entry: the numbers of both, and what is measured."""

    number: int
    part: int
    entry: Entry
    cut: Cut

    @property
    def size(self) -> int:
        return math.prod(cut_shape(self.entry.shape, self.cut))

    @property
    def sent(self) -> int:
        """Bytes of the array that are sent along; none of a tensor in a file."""
        return 0 if self.entry.is_stored else self.size * self.entry.source.dtype.itemsize


@dataclass(frozen=True)
class Outcome:
    """What became of an array: its rows, the reason why it is skipped, or what was raised."""

    number: int
    name: str
    rows: list[ErrorRow] | None = None
    unfit: Exception | None = None
    failure: BaseException | None = None


Result = Measured | UnfitError | Exception


def outcomes(
    sweep: Sweep, entries: Iterable[tuple[int, Entry | Outcome]], executor: Any = None
) -> Generator[Outcome, None, None]:
    """Measure arrays, and yield what became of each as soon as it is known.

    Parameters
    ----------
    sweep : Sweep
    entries : iterable of (int, Entry or Outcome)
        Numbers and arrays; outcomes are handed on.
    executor : object with submit, optional
        Default: this process.
    """
    early: deque[Outcome] = deque()
    parts: dict[int, dict[int, Result]] = {}
    counts: dict[int, int] = {}

    def pieces() -> Iterator[Piece]:
        for number, entry in entries:
            if isinstance(entry, Outcome):
                early.append(entry)
                continue
            cuts = cuts_of(entry, sweep)
            counts[number] = len(cuts)
            for part, cut in enumerate(cuts):
                yield Piece(number, part, entry, cut)

    measured = serial(sweep, pieces()) if executor is None else spread(sweep, pieces(), executor)
    with contextlib.closing(measured):
        for piece, result in measured:
            while early:
                yield early.popleft()
            results = parts.setdefault(piece.number, {})
            results[piece.part] = result
            if len(results) == counts[piece.number]:
                del parts[piece.number]
                yield joined(sweep, piece, [results[part] for part in range(len(results))])
    yield from early


def joined(sweep: Sweep, piece: Piece, results: list[Result]) -> Outcome:
    """The outcome of an array whose parts are all there."""
    number, name = piece.number, piece.entry.name
    for result in results:
        if isinstance(result, UnfitError):
            return Outcome(number, name, unfit=result.error)
        if isinstance(result, Exception):
            return Outcome(number, name, failure=result)
    measured = [result for result in results if isinstance(result, Measured)]
    try:
        return Outcome(number, name, join(sweep, piece.entry, measured))
    except UnfitError as unfit:
        return Outcome(number, name, unfit=unfit.error)


def serial(sweep: Sweep, pieces: Iterable[Piece]) -> Generator[tuple[Piece, Result], None, None]:
    for piece in pieces:
        yield piece, result_of(sweep, piece)


def result_of(sweep: Sweep, piece: Piece) -> Result:
    try:
        return measure(sweep, piece.entry, piece.cut)
    except UnfitError as unfit:
        return unfit
    except Exception as error:
        error.add_note(f"in the sweep of array {piece.entry.name!r}")
        return error


def results_of(sweep: Sweep, task: list[Piece], attempt: int) -> list[Result]:
    """Run a task in a worker. `attempt` tells an executor that keeps results that it is new."""
    return [result_of(sweep, piece) for piece in task]


def batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Put small pieces together."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += piece.size
        if size >= BATCH or len(batch) >= MOST_TENSORS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def spread(
    sweep: Sweep, pieces: Iterable[Piece], executor: Any
) -> Generator[tuple[Piece, Result], None, None]:
    """Measure pieces on an executor, and yield the results in the order of their arrival."""
    limit = getattr(executor, "in_flight", IN_FLIGHT)
    tasks = ((batch, 0) for batch in batches(pieces))
    suspects: deque[tuple[list[Piece], int]] = deque()
    pending: dict[int, tuple[list[Piece], int, Any]] = {}
    done: SimpleQueue[int] = SimpleQueue()
    numbers = itertools.count()
    broken: BrokenExecutor | None = None
    sent = 0

    def submit(task: list[Piece], attempt: int) -> None:
        number = next(numbers)
        future = executor.submit(results_of, sweep, task, attempt)
        pending[number] = (task, attempt, future)
        future.add_done_callback(lambda _: done.put(number))

    try:
        while True:
            if broken is not None and not pending:
                if not hasattr(executor, "restart"):
                    raise broken
                executor.restart()
                broken = None
            try:
                # What may have killed a process runs alone, so that it shows which tensor it was.
                if broken is None and suspects and not pending:
                    submit(*suspects[0])
                    suspects.popleft()
                while broken is None and not suspects and len(pending) < limit and sent < MOST_SENT:
                    if (task := next(tasks, None)) is None:
                        break
                    sent += sum(piece.sent for piece in task[0])
                    suspects.append(task)  # not lost if submit raises
                    submit(*task)
                    suspects.pop()
            except BrokenExecutor as error:
                broken = error
            if not pending:
                if broken is None and not suspects:
                    return
                continue
            batch, attempt, future = pending.pop(done.get())
            try:
                results = future.result()
            except (CancelledError, asyncio.CancelledError) as error:
                raise RuntimeError("the executor has cancelled its tasks") from error
            except Exception as error:
                broken = error if isinstance(error, BrokenExecutor) else broken
                if len(batch) == 1 and attempt + 1 >= ATTEMPTS:
                    results = [error]
                else:
                    suspects.extend(([piece], attempt + 1) for piece in batch)
                    continue
            sent -= sum(piece.sent for piece in batch)
            yield from zip(batch, results, strict=True)
    finally:
        for *_, future in pending.values():
            future.cancel()
