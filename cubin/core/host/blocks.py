"""Blocks of NumPy arrays that fit the cache, shared among threads where that pays.

Threads run at the same time since NumPy's own loops and the compiled ones release the GIL. The
number of threads changes no result: which elements are added up together depends on the shape of
the array alone.
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
from typing import TYPE_CHECKING, Any

import numpy as np

from cubin.core import memory

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

BLOCK = 1 << 17
"""Elements of a block: 512 KB of float32."""

PIECE = 1 << 18
"""Elements of a piece of a row that is longer than a block."""

SHARE = 1 << 20
"""The least work of a thread. As many elements are read and written in 0.2 to 0.3 ms."""

ALONE = 4
"""Shares of work below which one thread does all. It takes 0.1 ms to wake another and 0.06 ms to
see its end, and the caches of its core have to fill."""

COMPILED = 1 << 6
"""Elements from which on compiled loops are faster, once Numba is loaded."""

LOADING = 1 << 20
"""Elements from which on Numba is loaded, which takes half a second."""

LOADING_IN_ALL = 1 << 23
"""Elements of all arrays so far, each at least `COMPILED`, from which on it is loaded, too: going
on without it would soon take longer."""

WORKERS = 16
"""The most threads. With so many, memory is the limit, and the scratch of all stays small."""

LARGEST = 1 << 21
"""Elements of the largest block. A block may be copied, so this bounds the memory."""

WHOLE_ROWS = 1 << 20
"""Bytes, in the work dtype, of a block of whole rows for NumPy's bodies.

They go through the whole block at every level, so it has to stay in the cache."""

COMPILED_ROWS = (1 << 21, 1 << 23)
"""The fewest and the most bytes of such a block for compiled loops, which go row by row."""

BESIDE = 16
"""The fewest rows that are worked on side by side: those of a line of the cache, of float32."""

TOGETHER = (16, 64)
"""The fewest rows of a block where rows lie side by side. Memory is read in lines of the cache, and
faster where some lines follow each other."""

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
    for outer in itertools.product(*map(range, shape[:axis])):
        fixed = tuple(slice(index, index + 1) for index in outer)
        for start in range(0, shape[axis], step):
            yield (*fixed, slice(start, min(start + step, shape[axis])), *whole)


def extent(block: Block, shape: Sequence[int]) -> int:
    """The number of elements of `block` in an array of shape `shape`."""
    return math.prod(len(range(*cut.indices(n))) for cut, n in zip(block, shape, strict=True))


def portion(size: int, work: int) -> int:
    """Elements of a block of `size` elements in all, at most `LARGEST`: a thread that is alone has
    one block, and of several each has two.

    Between blocks a thread needs the GIL, and waits for others that hold it: smaller blocks mean
    more of this. With larger ones, threads wait longer for the last. `work` is that of `threads`.
    """
    number = threads(work)
    return min(size if number == 1 else size // (2 * number), LARGEST)


def shares(count: int, least: int, work: int) -> list[slice]:
    """Slices that cut `count` things into one share for each thread, of at least `least` things.

    There is a single share where there are fewer than twice as many. `work` is that of `threads`.
    """
    number = max(1, min(threads(work), count // least))
    ends = [count * share // number for share in range(number + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


# ---------------------------------------------------------------- threads


def threads(work: int) -> int:
    """How many threads share `work`: as many elements, read and written, would take as long."""
    number = work // SHARE
    return 1 if number < ALONE or _thread.works else min(_workers(), number)


def each(task: Callable[[Any], None], blocks: Sequence[Any], work: int) -> None:
    """Run `task` on every block. `threads` share the work.

    The calling thread is one of them, so that two callers cannot block each other. A task that
    calls this function runs the inner blocks on its own thread. The first exception in any thread
    stops the others after their current block, and is raised here.
    """
    workers = min(threads(work), len(blocks))
    if workers <= 1:
        _run(task, blocks)
        return
    # Each thread begins in a range of its own. If neighbouring blocks went to different threads,
    # both would wait for the system to clear the page of new memory that they share.
    ends = [len(blocks) * number // workers for number in range(workers + 1)]
    shares = [deque(blocks[start:stop]) for start, stop in itertools.pairwise(ends)]
    errors: list[BaseException] = []

    def take(number: int) -> None:
        _thread.works = True
        try:
            _run(task, _taken(shares[number:] + shares[:number]))
        except BaseException as error:
            errors.append(error)
            stop()
        finally:
            _thread.works = False
            memory.forget_scratch()

    def stop() -> None:
        for share in shares:
            share.clear()

    helpers = _Helpers(take, workers - 1)
    try:
        take(0)
        helpers.wait()
    except BaseException:  # raised while this thread waited, such as KeyboardInterrupt
        stop()
        helpers.wait()
        raise
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # the traceback refers to `errors`: a cycle that keeps arrays alive


@np.errstate(all="ignore")
def alone(task: Callable[..., None], *inputs: Any, **outputs: Any) -> None:
    """Run a task that is a single block, on the calling thread, with the buffer as NumPy has it."""
    task(*inputs, **outputs)


@np.errstate(all="ignore")
def _run(task: Callable[[Any], None], blocks: Iterable[Any]) -> None:
    np.setbufsize(_BUFFER)  # until the function's errstate ends
    for block in blocks:
        task(block)


def _taken(shares: Sequence[deque[Any]]) -> Iterator[Any]:
    """The blocks of the first share from its start, then those left of the others, from their ends.

    Several threads take at the same time: `popleft` and `pop` are atomic.
    """
    takes = [shares[0].popleft, *(share.pop for share in shares[1:])]
    for take in takes:
        with contextlib.suppress(IndexError):
            while True:
                yield take()


class _Helpers:
    """Calls of ``work(number)`` on threads of the pool, for the numbers from 1 to `count`."""

    def __init__(self, work: Callable[[int], None], count: int) -> None:
        # The pool keeps a reference to the arguments of past jobs. So it gets lists, which are
        # emptied once they are done, and keeps no array alive.
        self._jobs = [[(work, number)] for number in range(1, count + 1)]
        self._futures: list[Future[None]] = []
        # No thread can start while the interpreter ends, or where the system has no more. The
        # caller then does all the work.
        with contextlib.suppress(RuntimeError):
            for job in self._jobs:
                self._futures.append(_pool().submit(_help, job))

    def wait(self) -> None:
        """Wait for the threads that have begun, and cancel the others: no work is left for them."""
        for job in self._jobs:
            job.clear()
        for future in self._futures:
            if not future.cancel():
                future.result()


def _help(job: list[tuple[Callable[[int], None], int]]) -> None:
    with contextlib.suppress(IndexError):  # the list is empty: the caller was done before
        work, number = job.pop()
        work(number)
        del work


@functools.cache
def _pool() -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor  # here, since it takes long to import

    return ThreadPoolExecutor(WORKERS - 1, "cubin")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has no threads


class _Thread(threading.local):
    """Whether the current thread works on a block now."""

    works = False


_thread = _Thread()


def _workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # Where several processes share a machine, it is how those that start them say how many threads
    # each may have.
    said = os.environ.get("OMP_NUM_THREADS", "")
    return min(WORKERS, cores or 1, int(said) if said.isdecimal() and int(said) else WORKERS)


# ---------------------------------------------------------------- which form


class _SoFar:
    """Elements that NumPy's bodies have worked on in this process, roughly."""

    elements = 0


_so_far = _SoFar()


def pays(size: int) -> bool:
    """Whether to use compiled loops for `size` elements; False without Numba.

    This may depend on what the process has loaded: the loops give the same bits as NumPy's bodies.
    """
    if size < COMPILED:
        return False
    if not _is_loaded():
        _so_far.elements += size
        if size < LOADING and _so_far.elements < LOADING_IN_ALL:
            return False
    return _numba_works()


def is_ready(size: int) -> bool:
    """Whether compiled loops pay for `size` elements, and are loaded already."""
    return size >= COMPILED and _is_loaded()


def loops(module: str) -> Any:
    """The module ``<module>_loops``, or None where there is none or Numba is missing."""
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


def rows_block(size: int, itemsize: int, work: int) -> int:
    """Elements of a block of whole rows, of an array of `size` elements, with this `work`."""
    if not is_ready(size):
        return WHOLE_ROWS // itemsize
    least, most = COMPILED_ROWS
    return min(max(least, portion(size, work) * itemsize), most) // itemsize


def rows_together(count: int) -> int:
    """How many of `count` rows that lie side by side a block has at least.

    Fewer if there are too few for all threads, but at least a line of the cache of float32.
    """
    least, most = TOGETHER
    return max(least, min(most, count // _workers() // least * least))


def sorted_block(size: int, work: int) -> int:
    """Elements of a block of rows that are sorted, of an array of `size` elements."""
    least, most = SORTED_BLOCK
    return min(max(least, portion(size, work)), most)


def elements_block(size: int, work: int | None = None) -> int:
    """Elements of a block of an array of `size` elements that are worked on one by one.

    `work` is that of `threads`, as many elements if it is not given.
    """
    return max(BLOCK, portion(size, work or size)) if is_ready(size) else BLOCK
