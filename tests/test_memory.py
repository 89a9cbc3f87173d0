"""Memory of dropped results: used again for as many bytes, never while anything refers to it."""

from __future__ import annotations

import ctypes
import gc
import mmap
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cubin
from cubin.core import memory
from tests.required import require

keeps = pytest.mark.skipif(
    not hasattr(mmap, "MADV_FREE"), reason="this system takes no memory that is kept"
)

N = 1 << 16


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(memory, "LARGE", 1 << 16)
    monkeypatch.setattr(memory, "HEADER", mmap.PAGESIZE)  # C libraries map no such size for itself
    memory.release()
    yield
    memory.release()
    memory.set_limit(1 << 28)


def address(array: np.ndarray) -> int:
    return array.ctypes.data


@pytest.mark.parametrize("shape", [(N,), (2, 0, N), (256, 256), (1, 1, N), ()])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int8", "bool"])
def test_a_new_array(shape, dtype):
    array = memory.empty(shape, dtype)
    assert array.shape == shape
    assert array.dtype == dtype
    assert array.flags.c_contiguous
    assert array.flags.writeable
    assert array.flags.aligned
    array[...] = 1
    assert (array == 1).all()


@keeps
def test_a_dropped_result_makes_room_for_the_next_of_as_many_bytes():
    first = memory.empty((N,), np.float32)
    where = address(first)
    del first
    second = memory.empty((N // 2,), np.float64)
    assert address(second) == where
    assert address(memory.empty((N,), np.float32)) != where


@keeps
@pytest.mark.parametrize(
    "refer",
    [
        lambda a: a[::-2],
        lambda a: a.reshape(4, -1).T,
        lambda a: a.view(np.uint8),
        lambda a: np.asarray(memoryview(a)),
        lambda a: np.from_dlpack(a),
        lambda a: np.frombuffer(a, np.uint8),
        lambda a: np.broadcast_to(a, (2, *a.shape)),
    ],
)
def test_memory_is_not_used_again_while_a_view_is_left(refer):
    array = memory.empty((N,), np.float32)
    array[...] = np.arange(N)
    view = refer(array)
    before = view.copy()
    del array
    others = [memory.empty((N,), np.float32) for _ in range(3)]
    for other in others:
        other[...] = -1
    np.testing.assert_array_equal(view, before)
    assert not any(np.may_share_memory(view, other) for other in others)


def test_memory_is_not_used_again_while_torch_holds_it():
    torch = require("torch")
    tensor = torch.from_numpy(memory.empty((N,), np.float32)).fill_(3)
    memory.empty((N,), np.float32)[...] = -1
    assert (tensor == 3).all()


@keeps
def test_memory_of_another_size_is_given_back_first():
    a, b = memory.empty((N,), np.float32), memory.empty((N,), np.int8)
    del a, b
    assert len(memory._kept) == 2
    memory.empty((2 * N,), np.float32)
    assert [kept.nbytes for kept in memory._kept] == [8 * N]


@keeps
def test_no_more_is_kept_than_said():
    cubin.memory.set_limit(3 * N)
    dropped = [memory.empty((N,), np.int8) for _ in range(5)]
    addresses = [address(array) for array in dropped]
    while dropped:
        dropped.pop(0)
    assert [address(kept) for kept in memory._kept] == addresses[2:]
    larger = memory.empty((4 * N,), np.int8)
    del larger
    assert not memory._kept


@keeps
def test_a_lower_limit_gives_back_what_is_too_much():
    dropped = [memory.empty((N,), np.int8) for _ in range(3)]
    addresses = [address(array) for array in dropped]
    while dropped:
        dropped.pop(0)
    cubin.memory.set_limit(2 * N)
    assert [address(kept) for kept in memory._kept] == addresses[1:]


def test_a_limit_of_0_keeps_nothing():
    before = memory.empty((N,), np.int8)
    cubin.memory.set_limit(0)
    array = memory.empty((N,), np.int8)
    assert array.flags.owndata
    del before, array
    assert not memory._kept


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [
        (-1, ValueError, "nbytes must be at least 0, got -1"),
        (1e6, TypeError, "nbytes must be an integer, got float"),
        (True, TypeError, "nbytes must be an integer, got bool"),
        (None, TypeError, "nbytes must be an integer, got NoneType"),
    ],
)
def test_limits_that_are_none(limit, error, message):
    with pytest.raises(error, match=message):
        cubin.memory.set_limit(limit)
    assert memory._limit == 1 << 28


def test_it_is_a_public_module():
    assert "memory" in cubin.__all__
    assert memory.__all__ == ["release", "set_limit"]


def test_nothing_is_kept_of_small_arrays():
    array = memory.empty((N - 1,), np.int8)
    assert array.flags.owndata
    del array
    assert not memory._kept


@keeps
def test_memory_that_is_not_mapped_for_itself_is_left_to_the_c_library(monkeypatch):
    monkeypatch.setattr(memory, "HEADER", 64)
    room = np.empty(3 * mmap.PAGESIZE, np.uint8)
    page = -address(room) % mmap.PAGESIZE
    for header, is_kept in ((0, True), (16, True), (64, True), (65, False), (1000, False)):
        memory.release()
        memory._keep(room[page + header :])
        assert len(memory._kept) == is_kept


@keeps
def test_release():
    array = memory.empty((N,), np.float32)
    del array
    assert memory._kept
    memory.release()
    assert not memory._kept


@pytest.mark.parametrize("answer", [None, lambda *_: -1])
def test_nothing_is_kept_where_the_system_cannot_take_it(monkeypatch, answer):
    monkeypatch.setattr(memory, "_madvise", lambda: answer)
    array = memory.empty((N,), np.float32)
    array[...] = 1
    del array
    assert not memory._kept


@keeps
def test_what_the_system_took_is_new_memory():
    x = np.random.default_rng(0).normal(size=(64, 4 * mmap.PAGESIZE // 4)).astype(np.float32)
    expected = cubin.multibit(x, 2).copy()
    (kept,) = memory._kept
    whole = -address(kept) % mmap.PAGESIZE
    madvise = memory._madvise()
    inside = (kept.nbytes - whole) // mmap.PAGESIZE * mmap.PAGESIZE
    start = ctypes.c_void_p(address(kept) + whole)
    assert madvise(start, ctypes.c_size_t(inside), mmap.MADV_DONTNEED) == 0
    where = address(kept)
    del kept
    again = cubin.multibit(x, 2)
    assert address(again) == where
    np.testing.assert_array_equal(again, expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: cubin.sign(x),
        lambda x: cubin.ste_mask(x),
        lambda x: cubin.sign_grad(x, x),
        lambda x: cubin.multibit_grad(x, 2, x),
        lambda x: cubin.multibit(x, 2, channel_axis=0),
        lambda x: cubin.multibit(x, 2, solver="alternating"),
        lambda x: cubin.quantize(x, 3, channel_axis=0).signs,
        lambda x: cubin.quantize(x, 3, channel_axis=0).dequantize(),
    ],
)
def test_results_do_not_change_with_what_lay_there(rng, call):
    x = rng.normal(size=(64, 4096)).astype(np.float32)
    expected = call(x)
    before = expected.copy()
    for filling in (np.nan, -1):
        memory.release()
        for dtype in (np.float32, np.int8, np.bool_):
            waste = memory.empty(expected.shape, dtype)
            waste[...] = filling if dtype == np.float32 else -1
            del waste
        np.testing.assert_array_equal(call(x), before)
    np.testing.assert_array_equal(expected, before)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(expected)), before)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=40))
def test_no_two_results_share_memory(steps):
    """Whatever is made and dropped in whatever order, what is held keeps its content."""
    held: list[tuple[int, np.ndarray]] = []
    for number, (size, drop) in enumerate(steps):
        if drop and held:
            held.pop(size % len(held))
        else:
            array = memory.empty(((size + 1) * N,), np.int8)
            array[...] = number
            held.append((number, array))
        assert all((array == number).all() for number, array in held)


def test_threads_do_not_share_memory():
    errors = []

    def work(number: int) -> None:
        for turn in range(50):
            array = memory.empty((N,), np.int8)
            array[...] = number
            if turn % 7 == number:
                gc.collect()
            if not (array == number).all():
                errors.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_result_may_outlive_the_interpreter():
    code = """
import numpy as np, cubin, atexit
y = cubin.sign(np.ones((4096, 4096), np.float32))
cycle = [y]
cycle.append(cycle)
atexit.register(lambda: print(float(y.sum())))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(float(1 << 24))]
    assert done.stderr == ""
