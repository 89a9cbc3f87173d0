from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cubin.core import memory
from cubin.core.host import blocks

WORK = blocks.WORKERS * blocks.SHARE
"""Enough for all threads."""


@given(st.lists(st.integers(0, 7), max_size=5), st.integers(1, 40))
def test_tiles_cover_every_element_once_and_in_order(shape, size):
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    seen = []
    for block in blocks.tile(shape, size):
        part = numbers[block]
        assert 0 < part.size <= size
        assert part.size == blocks.extent(block, shape)
        seen += part.ravel().tolist()
    assert seen == list(range(numbers.size))


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 6, 100])
def test_every_task_runs_once_on_several_threads(monkeypatch, workers, count):
    monkeypatch.setattr(blocks, "_workers", lambda: workers)
    done = []
    blocks.each(done.append, range(count), work=WORK)
    assert sorted(done) == list(range(count))


@pytest.mark.parametrize(("work", "expected"), [(0, 1), (39, 1), (40, 4), (59, 5), (99, 5)])
def test_each_thread_has_a_share_of_the_work(monkeypatch, work, expected):
    """One thread is alone up to a few shares."""
    monkeypatch.setattr(blocks, "_workers", lambda: 5)
    monkeypatch.setattr(blocks, "SHARE", 10)
    names = set()
    together = threading.Barrier(expected)

    def task(_):
        if threading.get_ident() not in names:
            names.add(threading.get_ident())
            together.wait(timeout=20)

    blocks.each(task, range(5), work)
    assert len(names) == expected


def test_a_thread_takes_over_what_another_has_left(monkeypatch):
    """The first task blocks its thread until all others are done."""
    monkeypatch.setattr(blocks, "_workers", lambda: 2)
    rest = threading.Semaphore(0)

    def task(number):
        if number == 0:
            for _ in range(19):
                assert rest.acquire(timeout=20)
        else:
            rest.release()

    blocks.each(task, range(20), work=WORK)


@pytest.mark.parametrize("size", [1, WORK])
def test_an_error_in_a_task_reaches_the_caller(size):
    def task(number):
        if number == 7:
            raise KeyError(number)

    with pytest.raises(KeyError):
        blocks.each(task, range(10), size)


def test_what_is_raised_stops_the_other_threads(monkeypatch):
    """They are done when the caller goes on, with the blocks that they had begun."""
    monkeypatch.setattr(blocks, "_workers", lambda: 3)
    began, done, raised = [], [], threading.Event()

    def task(number):
        began.append(number)
        if number == 0:
            raised.set()
            raise KeyboardInterrupt
        assert raised.wait(timeout=20)
        time.sleep(0.05)
        done.append(number)

    with pytest.raises(KeyboardInterrupt):
        blocks.each(task, range(300), work=WORK)
    assert sorted(done) == sorted(set(began) - {0})
    assert len(began) < 30


def test_threads_that_cannot_start_leave_the_work_to_others(monkeypatch):
    monkeypatch.setattr(blocks, "_workers", lambda: 7)
    start, started, done = threading.Thread.start, [], []

    def start_two(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        start(thread)
        started.append(thread.ident)

    monkeypatch.setattr(threading.Thread, "start", start_two)
    blocks._pool.cache_clear()
    blocks.each(lambda number: done.append((number, threading.get_ident())), range(300), 1 << 30)
    blocks._pool.cache_clear()
    assert sorted(number for number, _ in done) == list(range(300))
    assert {ident for _, ident in done} <= {threading.get_ident(), *started}


def together(monkeypatch, count, call=lambda number: None):
    """Share blocks among threads that all have to be there; give their identities."""
    barrier, idents = threading.Barrier(count), [0] * count

    def task(number):
        barrier.wait(timeout=20)
        idents[number] = threading.get_ident()
        call(number)

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "_workers", lambda: count)
        blocks.each(task, range(count), WORK)
    return idents


def test_the_caller_has_the_first_block_and_others_their_own_thread(monkeypatch):
    idents = together(monkeypatch, 4)
    assert idents[0] == threading.get_ident()
    assert len(set(idents)) == 4


def test_threads_serve_again(monkeypatch):
    seen = set()
    for _ in range(50):
        seen |= set(together(monkeypatch, 3))
    assert len(seen) <= 1 + blocks.WORKERS


def test_callers_at_the_same_time_share_no_thread(monkeypatch):
    """Each caller waits for all threads of all callers."""
    monkeypatch.setattr(blocks, "_workers", lambda: 2)
    everybody, idents = threading.Barrier(6), []

    def task(_):
        everybody.wait(timeout=20)
        idents.append(threading.get_ident())

    def call():
        blocks.each(task, range(2), WORK)

    for _ in range(3):
        idents.clear()
        callers = [threading.Thread(target=call) for _ in range(3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(timeout=20)
        assert len(set(idents)) == 6


def test_more_callers_than_the_pool_has_threads(monkeypatch):
    """Those that get no thread do all of their work themselves."""
    monkeypatch.setattr(blocks, "WORKERS", 2)
    monkeypatch.setattr(blocks, "_workers", lambda: 2)
    blocks._pool.cache_clear()
    done = []
    with ThreadPoolExecutor(8) as callers:
        calls = [callers.submit(blocks.each, done.append, range(100), WORK) for _ in range(40)]
        for call in calls:
            call.result(timeout=60)
    blocks._pool.cache_clear()
    assert sorted(done) == sorted(40 * list(range(100)))


def test_blocks_of_blocks_stay_on_their_thread(monkeypatch):
    inner = {}

    def call(number):
        inner[number] = set()
        blocks.each(lambda _: inner[number].add(threading.get_ident()), range(20), WORK)

    idents = together(monkeypatch, 3, call)
    assert inner == {number: {ident} for number, ident in enumerate(idents)}
    assert len(set(together(monkeypatch, 3))) == 3  # and afterwards they share again


def test_what_tasks_hold_is_let_go_before_the_call_ends(monkeypatch):
    def call():
        held = np.empty(10)
        together(monkeypatch, 3, held.fill)
        return weakref.ref(held)

    for _ in range(20):
        assert call()() is None


@pytest.mark.parametrize("number", [0, 2])
def test_what_is_raised(monkeypatch, number):
    def call(own):
        if own == number:
            raise KeyError(own)

    for _ in range(3):
        with pytest.raises(KeyError, match=str(number)):
            together(monkeypatch, 3, call)
        assert len(set(together(monkeypatch, 3))) == 3  # and the threads are there still


def test_what_is_raised_first_is_raised_again(monkeypatch):
    first = threading.Event()

    def call(number):
        if number == 1:
            try:
                raise KeyError("first")
            finally:
                first.set()
        assert first.wait(timeout=20)
        time.sleep(0.05)
        raise ValueError("second")

    with pytest.raises(KeyError, match="first"):
        together(monkeypatch, 2, call)


@pytest.mark.parametrize("count", [1, 2])
def test_errors_hold_nothing(monkeypatch, count):
    def call():
        held = np.empty(10)

        def fail(number):
            held.fill(number)
            raise KeyError(number)

        with pytest.raises(KeyError):
            together(monkeypatch, count, fail)
        return weakref.ref(held)

    gc.disable()
    try:
        assert call()() is None
    finally:
        gc.enable()


@pytest.mark.skipif(os.name == "nt", reason="signals are not sent like this")
def test_ctrl_c_while_other_threads_work():
    """The caller, which waits for the others, raises once they are done with their blocks."""
    code = """
import os, signal, threading, time
from cubin.core.host import blocks
# A shell has what it starts in the background ignore this signal.
signal.signal(signal.SIGINT, signal.default_int_handler)
blocks._workers = lambda: 2
done, begun = [], threading.Event()
def task(number):
    if number == 0:
        assert begun.wait(20)
        return
    begun.set()
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.3)
    done.append(number)
try:
    blocks.each(task, range(2), 1 << 40)
except KeyboardInterrupt:
    print("interrupted", done == [1])
again = []
blocks.each(again.append, range(10), 1 << 40)
print(sorted(again) == list(range(10)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["interrupted", "True", "True"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_starts_its_own(monkeypatch):
    together(monkeypatch, 3)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if len(set(together(monkeypatch, 3))) == 3 else 2
        finally:
            os._exit(status)  # or pytest would go on twice
    assert os.waitpid(child, 0)[1] == 0


SHARE = "from cubin.core.host import blocks; blocks._workers = lambda: 3; found = []; "
CALL = "blocks.each(found.append, range(3), 1 << 40)"


@pytest.mark.parametrize(
    "code",
    [
        f"{SHARE}{CALL}; print(*sorted(found))",
        f"import atexit; {SHARE}atexit.register(lambda: ({CALL}, print(*sorted(found))))",
        f"import atexit; {SHARE}{CALL}; found.clear(); "
        f"atexit.register(lambda: ({CALL}, print(*sorted(found))))",
        pytest.param(
            f"import multiprocessing, sys; {SHARE}{CALL}; found.clear(); "
            f"child = multiprocessing.get_context('fork').Process(target=lambda: ({CALL}, "
            "print(*sorted(found), flush=True))); child.start(); child.join(20); "
            "sys.exit(child.exitcode)",
            marks=pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
        ),
    ],
    ids=["threads left", "first at exit", "again at exit", "in a child"],
)
def test_the_interpreter_ends(code):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["0", "1", "2"]
    assert done.stderr == ""


@pytest.mark.parametrize(("size", "stays"), [(1000, True), (memory.KEPT // 4, False)])
def test_threads_keep_little_memory(monkeypatch, size, stays):
    monkeypatch.setattr(blocks, "_workers", lambda: 3)
    memory.forget_scratch()
    kept, together = [], threading.Barrier(3)

    def task(_):
        kept.append(weakref.ref(memory.scratch("test", (size,), np.float32).base))
        together.wait(timeout=20)

    blocks.each(task, range(3), WORK)
    assert [memory() is not None for memory in kept] == [stays] * 3


def test_tasks_do_not_warn():
    blocks.each(lambda _: np.float32([3e38]) * 10, range(4), work=WORK)
