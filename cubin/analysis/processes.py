"""Worker processes on this machine, replaced when one dies."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from types import TracebackType
from typing import Any


class Processes:
    """An executor of processes that share the cores of the machine.

    Parameters
    ----------
    workers : int
        How many processes.

    Attributes
    ----------
    in_flight : int
        Tasks that it holds at a time: with fewer, fewer are lost when a process dies.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.in_flight = 2 * workers
        self._start()

    def _start(self) -> None:
        self._pool = ProcessPoolExecutor(
            self.workers,
            # Not by fork: threads and CUDA do not survive it.
            multiprocessing.get_context("spawn"),
            prepare,
            (max(1, (os.cpu_count() or 1) // self.workers),),
        )

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Call a function in one of the processes."""
        return self._pool.submit(function, *arguments)

    def restart(self) -> None:
        """Start new processes, after one has died."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._start()

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def prepare(threads: int) -> None:
    """Limit the threads of a worker, and end it when the process that started it has died."""
    os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = str(threads)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=end_after, args=(parent,), daemon=True).start()


def end_after(parent: Any) -> None:
    parent.join()
    os._exit(1)
