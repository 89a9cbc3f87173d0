"""Threads that wait for work: to start one takes as long as much of the work here.

The caller works too, so that one thread less has to wake up.
"""

from __future__ import annotations

import _thread
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from functools import partial

IDLE = 5.0
"""Seconds after which a thread that waits ends."""


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
        while self._is_asked():
            assert self._job is not None
            (job, done), self._job = self._job, None
            try:
                job()
            finally:
                del job  # it holds arrays
                _waiting.append(self)
                done.release()

    def _is_asked(self) -> bool:
        """Wait for a job, or for so long that there is none."""
        if self._asked.acquire(timeout=IDLE):
            return True
        try:
            _waiting.remove(self)
        except ValueError:  # somebody is about to ask
            return self._asked.acquire()
        return False


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
        for number in range(1, count):
            helper = _helper()
            if helper is None:
                break
            done = threading.Lock()
            done.acquire()
            helper.ask(partial(run, number), done)
            running.append(done)
        run(0)
        wait()
    except BaseException:
        stop()
        wait()
        raise
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # a cycle, which would hold arrays


def _helper() -> _Helper | None:
    """One that waits, or a new one, or None where the system gives no more threads."""
    if sys.is_finalizing():  # those that wait do not run any more
        return None
    try:
        return _waiting.pop()  # this is atomic
    except IndexError:
        pass
    try:
        return _Helper()
    except RuntimeError:
        return None
