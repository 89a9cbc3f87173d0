from __future__ import annotations

import _thread
import threading
import time
import weakref
from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cubin import blocks, threads


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
    blocks.each(done.append, range(count), size=blocks.THREADED)
    assert sorted(done) == list(range(count))


@pytest.mark.parametrize(("size", "threaded", "expected"), [(9, 10, 1), (10, 10, 2), (9, None, 1)])
def test_threads_from_a_size_on(monkeypatch, size, threaded, expected):
    monkeypatch.setattr(blocks, "_workers", lambda: 2)
    names = set()
    together = threading.Barrier(expected)

    def task(_):
        names.add(threading.get_ident())
        together.wait(timeout=20)

    blocks.each(task, range(2), size, threaded)
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

    blocks.each(task, range(20), size=blocks.THREADED)


@pytest.mark.parametrize("size", [1, blocks.THREADED])
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
        blocks.each(task, range(300), size=blocks.THREADED)
    assert sorted(done) == sorted(set(began) - {0})
    assert len(began) < 30


def test_threads_that_cannot_start_leave_the_work_to_others(monkeypatch):
    monkeypatch.setattr(blocks, "_workers", lambda: 7)
    monkeypatch.setattr(threads, "_waiting", deque())
    start, started, done = _thread.start_new_thread, [], []

    def start_two(function, arguments):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(start(function, arguments))

    monkeypatch.setattr(_thread, "start_new_thread", start_two)
    blocks.each(lambda number: done.append((number, threading.get_ident())), range(300), 1 << 30)
    assert sorted(number for number, _ in done) == list(range(300))
    assert {ident for _, ident in done} <= {threading.get_ident(), *started}


def test_threads_keep_no_memory_of_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "_workers", lambda: 3)
    kept, together = [], threading.Barrier(3)

    def task(_):
        kept.append(weakref.ref(blocks.spare("test", (1000,), np.float32).base))
        together.wait(timeout=20)

    blocks.each(task, range(3), blocks.THREADED)
    assert [memory() for memory in kept] == [None] * 3


def test_tasks_do_not_warn():
    blocks.each(lambda _: np.float32([3e38]) * 10, range(4), size=blocks.THREADED)
