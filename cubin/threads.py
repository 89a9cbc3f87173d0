"""Threads that wait for work: to start one takes as long as much of the work here.

The caller works too, so that one thread less has to wake up.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable
from functools import partial

KEPT = 16
"""The most threads that wait."""


class _Helper:
    """A thread that does one job after the other."""

    def __init__(self) -> None:
        self._job: tuple[Callable[[], None], threading.Lock] | None = None
        self._asked = threading.Lock()
        self._asked.acquire()
        # threading.Thread waits until it runs, as long as much work takes.
        _thread.start_new_thread(self._serve, ())

    def ask(self, job: Callable[[], None], done: threading.Lock) -> None:
        """Have it call `job`, which must not raise, and release `done`."""
        self._job = job, done
        self._asked.release()

    def _serve(self) -> None:
        kept = True
        while kept:
            self._asked.acquire()
            assert self._job is not None
            (job, done), self._job = self._job, None
            job()
            del job  # it holds arrays
            kept = len(_waiting) < KEPT
            if kept:
                _waiting.append(self)
            done.release()


_waiting: deque[_Helper] = deque()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _waiting.clear())  # a child has no threads


def share(work: Callable[[int], None], count: int, stop: Callable[[], None]) -> None:
    """Call ``work(number)`` for `count` numbers, each on a thread of its own, 0 on the caller's.

    It ends when all calls have. Where no thread can be started, the calls for the last numbers
    are left out: whoever is there has to take over what they would have done. What is raised
    first is raised again, after `stop`, which should have the other calls end early.
    """
    errors: list[BaseException] = []
    running: list[threading.Lock] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)
            stop()

    def wait() -> None:
        for done in running:
            with done:
                pass

    try:
        with contextlib.suppress(RuntimeError):  # no more threads
            for number in range(1, count):
                done = threading.Lock()
                done.acquire()
                _helper().ask(partial(run, number), done)
                running.append(done)
        work(0)
        wait()
    except BaseException:
        stop()
        wait()
        raise
    if errors:
        raise errors[0]


def _helper() -> _Helper:
    try:
        return _waiting.pop()  # this is atomic
    except IndexError:
        return _Helper()
