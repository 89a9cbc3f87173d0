from __future__ import annotations

import _thread
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cubin import blocks


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


def test_a_thread_that_cannot_start(monkeypatch):
    monkeypatch.setattr(blocks, "_workers", lambda: 3)
    start, done = _thread.start_new_thread, []

    def start_two(function, arguments):
        if arguments[0] == 2:
            raise RuntimeError("can't start new thread")
        start(function, arguments)

    monkeypatch.setattr(_thread, "start_new_thread", start_two)
    with pytest.raises(RuntimeError, match="can't start"):
        blocks.each(lambda number: (time.sleep(0.01), done.append(number)), range(300), 1 << 30)
    count = len(done)
    time.sleep(0.05)
    assert len(done) == count < 30


def test_tasks_do_not_warn():
    blocks.each(lambda _: np.float32([3e38]) * 10, range(4), size=blocks.THREADED)
