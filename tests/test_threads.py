from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections import deque

import numpy as np
import pytest

from cubin import threads


@pytest.fixture(autouse=True)
def none_waiting(monkeypatch):
    monkeypatch.setattr(threads, "_waiting", deque())


def together(count, call=lambda number: None):
    """Share a call among threads that all have to be there; give their identities."""
    barrier, idents = threading.Barrier(count), [0] * count

    def work(number):
        barrier.wait(timeout=20)
        idents[number] = threading.get_ident()
        call(number)

    threads.share(work, count, lambda: None)
    return idents


def test_the_caller_has_number_0_and_others_their_own_thread():
    idents = together(4)
    assert idents[0] == threading.get_ident()
    assert len(set(idents)) == 4


def test_threads_serve_again():
    first = together(3)
    for _ in range(50):
        assert set(together(3)) == set(first)
    assert len(threads._waiting) == 2


def test_threads_end_when_there_is_nothing_to_do(monkeypatch):
    monkeypatch.setattr(threads, "IDLE", 0.05)
    for _ in range(3):
        together(4)
        assert len(threads._waiting) == 3
        ended = time.monotonic() + 20
        while threads._waiting and time.monotonic() < ended:
            time.sleep(0.01)
        assert not threads._waiting


def test_work_that_comes_when_threads_are_about_to_end(monkeypatch):
    monkeypatch.setattr(threads, "IDLE", 0.001)
    for number in range(300):
        time.sleep(0.0005 + 0.001 * (number % 3) / 2)
        assert len(set(together(3))) == 3


def test_callers_at_the_same_time_share_no_thread():
    """Each caller waits for all threads of all callers."""
    everybody, idents = threading.Barrier(6), []

    def work(_):
        everybody.wait(timeout=20)
        idents.append(threading.get_ident())

    def call():
        threads.share(work, 2, lambda: None)

    for _ in range(3):
        idents.clear()
        callers = [threading.Thread(target=call) for _ in range(3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(timeout=20)
        assert len(set(idents)) == 6


def test_work_that_shares_work():
    everybody, idents = threading.Barrier(4), []

    def work(_):
        everybody.wait(timeout=20)
        idents.append(threading.get_ident())

    together(2, lambda number: threads.share(work, 2, lambda: None))
    assert len(set(idents)) == 4


def test_what_work_holds_is_let_go_before_the_call_ends():
    def call():
        held = np.empty(10)
        together(3, lambda number: held.fill(number))
        return weakref.ref(held)

    for _ in range(20):
        assert call()() is None


@pytest.mark.parametrize("number", [0, 2])
def test_what_is_raised(number):
    stopped = []

    def work(own):
        if own == number:
            raise KeyError(own)

    for _ in range(3):
        with pytest.raises(KeyError, match=str(number)):
            threads.share(work, 3, lambda: stopped.append(number))
        assert len(set(together(3))) == 3  # and the threads are there still
    assert stopped


def test_what_is_raised_first_is_raised_again():
    first = threading.Event()

    def work(number):
        if number == 1:
            try:
                raise KeyError("first")
            finally:
                first.set()
        assert first.wait(timeout=20)
        time.sleep(0.05)
        raise ValueError("second")

    with pytest.raises(KeyError, match="first"):
        threads.share(work, 2, lambda: None)


def test_errors_hold_nothing(monkeypatch):
    def call():
        held = np.empty(10)

        def work(number):
            held.fill(number)
            raise KeyError(number)

        with pytest.raises(KeyError):
            threads.share(work, 2, lambda: None)
        return weakref.ref(held)

    gc.disable()
    try:
        assert call()() is None
    finally:
        gc.enable()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_starts_its_own():
    together(3)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if len(set(together(3))) == 3 else 2
        finally:
            os._exit(status)  # or pytest would go on twice
    assert os.waitpid(child, 0)[1] == 0


def test_waiting_threads_do_not_keep_the_interpreter():
    code = (
        "import sys; from cubin import threads; "
        "threads.share(lambda number: sys.stdout.write(f'{number} '), 3, lambda: None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert sorted(done.stdout.split()) == ["0", "1", "2"]
    assert done.stderr == ""
