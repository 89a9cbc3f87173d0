"""Work on NumPy arrays in blocks that fit the cache, over threads where it pays.

NumPy releases the GIL inside its loops, and so do the compiled ones. What is added up together
depends on the shape of an array alone, never on the number of threads, so that results are the same
on every machine.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from cubin.core import memory

BLOCK = 1 << 17
"""Elements of a block: 512 KB of float32."""

PIECE = 1 << 18
"""Elements of a piece of a row that is longer than a block."""

THREADED = 1 << 22
"""Elements from which on threads pay: 16 MB of float32."""

LOOPS_THREADED = 1 << 20
"""The same for compiled loops, which need no Python while they work."""

COMPILED = 1 << 12
"""Elements from which on compiled loops pay once they are loaded."""

LOADING = 1 << 20
"""Elements from which on it pays to load them: importing Numba takes half a second."""

WORKERS = 16
"""The most threads: the memory is saturated then, and what each of them keeps stays small."""

LARGEST = 1 << 21
"""Elements of the largest block, of which there may be a copy."""

WHOLE_ROWS = 1 << 20
"""Bytes, in the work dtype, of a block of whole rows, which are gone through level by level."""

COMPILED_ROWS = (1 << 21, 1 << 23)
"""The fewest and the most bytes for compiled loops, which go through it row by row."""

SORTED_BLOCK = (1 << 14, 1 << 17)
"""The fewest and the most elements of a block of rows that compiled loops sort."""

_BUFFER = 1 << 10
"""NumPy's ufunc buffer, in elements. Broadcasting along a row is twice as fast once the row is
longer than this."""

Block = tuple[slice, ...]


def tile(shape: Sequence[int], size: int | None = None) -> Iterator[Block]:
    """Slices that tile an array of shape `shape` in C order, at most `size` elements each.

    The default is `BLOCK`.
    """
    shape, size = tuple(shape), BLOCK if size is None else size
    if 0 in shape:
        return
    # The axes after `axis` are taken whole, `axis` in runs, those before it one index at a time.
    axis, inner = len(shape), 1
    while axis > 0 and inner * shape[axis - 1] <= size:
        axis -= 1
        inner *= shape[axis]
    if axis == 0:
        yield (slice(None),) * len(shape)
        return
    axis -= 1
    step = max(1, size // inner)
    whole = (slice(None),) * (len(shape) - axis - 1)
    for outer in np.ndindex(*shape[:axis]):
        fixed = tuple(slice(index, index + 1) for index in outer)
        for start in range(0, shape[axis], step):
            yield (*fixed, slice(start, min(start + step, shape[axis])), *whole)


def extent(block: Block, shape: Sequence[int]) -> int:
    """The number of elements of `block` in an array of shape `shape`."""
    return math.prod(len(range(*cut.indices(n))) for cut, n in zip(block, shape, strict=True))


def portion(size: int) -> int:
    """Elements of a fourth of what each thread has of `size`, but no more than `LARGEST`.

    Smaller blocks mean more steps in Python, larger ones leave threads to wait for one that lags.
    """
    return min(size // (4 * _workers()), LARGEST)


# ---------------------------------------------------------------- threads


def each(task: Callable[[Any], None], blocks: Sequence[Any], size: int) -> None:
    """Run `task` on every block; `size` is the number of elements of all of them.

    Threads share the work from `THREADED` elements on, or `LOOPS_THREADED`. The caller is one of
    them, so that callers at the same time cannot wait for each other. A task that calls this itself
    has its blocks run on its own thread. What is raised first, in any thread, stops the others
    after the block that they are at, and is raised again.
    """
    threaded = size >= (LOOPS_THREADED if is_ready(size) else THREADED) and not _thread.works
    workers = max(1, min(_workers(), len(blocks))) if threaded else 1
    if workers == 1:
        _run(task, blocks)
        return
    # Threads keep apart: side by side in new memory, each would clear the page that they share.
    ends = [len(blocks) * number // workers for number in range(workers + 1)]
    shares = [deque(blocks[start:stop]) for start, stop in itertools.pairwise(ends)]
    errors: list[BaseException] = []

    def work(number: int) -> None:
        _thread.works = True
        try:
            _run(task, _taken(shares[number:] + shares[:number]))
        except BaseException as error:
            errors.append(error)
            stop()
        finally:
            _thread.works = False
            memory.forget_scratch()  # of as many threads it is too much to keep

    def stop() -> None:
        for share in shares:
            share.clear()

    helpers = _Helpers(work, workers - 1)
    try:
        work(0)
        helpers.wait()
    except BaseException:  # while waiting
        stop()
        helpers.wait()
        raise
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # a cycle, which would hold arrays


def _run(task: Callable[[Any], None], blocks: Iterable[Any]) -> None:
    with np.errstate(all="ignore"):
        np.setbufsize(_BUFFER)  # until this errstate ends
        for block in blocks:
            task(block)


def _taken(shares: Sequence[deque[Any]]) -> Iterator[Any]:
    """The first share from its start, then what is left of the others from their ends."""
    takes = [shares[0].popleft, *(share.pop for share in shares[1:])]
    for take in takes:  # these are atomic
        with contextlib.suppress(IndexError):
            while True:
                yield take()


class _Helpers:
    """Threads of the pool that call ``work(number)``, for 1 to `count`, where they can start."""

    def __init__(self, work: Callable[[int], None], count: int) -> None:
        # The pool holds on to what it was handed: to lists that are emptied, and not to arrays.
        self._jobs = [[(work, number)] for number in range(1, count + 1)]
        self._futures: list[Future[None]] = []
        # A new thread cannot be had at the interpreter's end, or where the system has no more.
        with contextlib.suppress(RuntimeError):
            for job in self._jobs:
                self._futures.append(_pool().submit(_help, job))

    def wait(self) -> None:
        """Wait for those that have begun; the others, which are not needed any more, never do."""
        for job in self._jobs:
            job.clear()
        for future in self._futures:
            if not future.cancel():
                future.result()


def _help(job: list[tuple[Callable[[int], None], int]]) -> None:
    with contextlib.suppress(IndexError):  # the caller was done before
        work, number = job.pop()
        work(number)
        del work


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(WORKERS - 1, "cubin")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has no threads


class _Thread(threading.local):
    """Whether a thread is one of those that share the work of a call."""

    works = False


_thread = _Thread()


def _workers() -> int:
    if hasattr(os, "sched_getaffinity"):
        return min(WORKERS, len(os.sched_getaffinity(0)))
    return min(WORKERS, os.cpu_count() or 1)


# ---------------------------------------------------------------- which form


def pays(size: int) -> bool:
    """Whether compiled loops pay for `size` elements, and Numba is there.

    They give the same bits as NumPy's expressions, so that the form may depend on what is loaded.
    """
    if size < COMPILED or (size < LOADING and not _is_loaded()):
        return False
    return _numba_works()


def is_ready(size: int) -> bool:
    """Whether compiled loops pay for `size` elements, and are loaded already."""
    return size >= COMPILED and _is_loaded()


def loops(module: str) -> Any:
    """The compiled loops beside a module, or None."""
    return _loops(module) if _numba_works() else None


@functools.cache
def _loops(module: str) -> Any:
    try:
        return importlib.import_module(f"{module}_loops")
    except ModuleNotFoundError:
        return None


def _is_loaded() -> bool:
    return "cubin.core.host.loops" in sys.modules


@functools.cache
def _numba_works() -> bool:
    try:
        importlib.import_module("cubin.core.host.loops")
    except ImportError:  # Numba is missing, or does not know this NumPy yet
        return False
    return True


def rows_block(size: int, itemsize: int) -> int:
    """Elements of a block of whole rows, of an array of `size` elements."""
    if not is_ready(size):
        return WHOLE_ROWS // itemsize
    least, most = COMPILED_ROWS
    return min(max(least, portion(size) * itemsize), most) // itemsize


def sorted_block(size: int) -> int:
    """Elements of a block of rows that are sorted, of an array of `size` elements."""
    least, most = SORTED_BLOCK
    return min(max(least, portion(size)), most)


def elements_block(size: int) -> int:
    """Elements of a block of an array of `size` elements that are worked on one by one."""
    return max(4 * BLOCK, portion(size)) if is_ready(size) else BLOCK
