"""Work on NumPy arrays in blocks that fit the cache, over threads where it pays.

NumPy releases the GIL inside its loops. What is added up together depends on the shape of an array
alone, never on the number of threads, so that results are the same on every machine.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from cubin import threads

BLOCK = 1 << 17
"""Elements of a block: 512 KB of float32."""

THREADED = 1 << 22
"""Elements from which on threads pay: 16 MB of float32."""

KEPT = 1 << 19
"""Elements of the largest array that a thread keeps for its next block."""

WORKERS = 16
"""The most threads: the memory is saturated then, and what each of them keeps stays small."""

COMPILED = 1 << 20
"""Elements from which on compiled loops pay: below, NumPy takes a few milliseconds."""

COMPILED_PIECE = 1 << 19
"""Elements of a piece of a long row for compiled loops, which need no cache for it."""

LARGEST = 1 << 21
"""Elements of the largest block, of which there may be a copy."""

_BUFFER = 1 << 10
"""NumPy's own buffer: an operand that broadcasts along rows longer than it costs half."""

_LINE = 64
"""Bytes that processors read memory by."""

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


def each(
    task: Callable[[Any], None], blocks: Sequence[Any], size: int, threaded: int | None = None
) -> None:
    """Run `task` on every block; `size` is the number of elements of all of them.

    Threads share the work from `threaded` elements on (default: `THREADED`).
    """
    pays = size >= (THREADED if threaded is None else threaded)
    workers = max(1, min(_workers(), len(blocks))) if pays else 1
    # Threads keep apart: side by side in new memory, each would clear the page that they share.
    ends = [len(blocks) * number // workers for number in range(workers + 1)]
    shares = [deque(blocks[start:stop]) for start, stop in itertools.pairwise(ends)]

    def work(number: int) -> None:
        with np.errstate(all="ignore"):
            np.setbufsize(_BUFFER)  # until this errstate ends
            for block in _taken(shares[number:] + shares[:number]):
                task(block)

    def work_and_forget(number: int) -> None:
        try:
            work(number)
        finally:
            _spares.__dict__.clear()  # of as many threads it is too much to keep

    def stop() -> None:
        for share in shares:
            share.clear()

    if workers == 1:
        work(0)
    else:
        threads.share(work_and_forget, workers, stop)


def _taken(shares: Sequence[deque[Any]]) -> Iterator[Any]:
    """The first share from its start, then what is left of the others from their ends."""
    takes = [shares[0].popleft, *(share.pop for share in shares[1:])]
    for take in takes:  # these are atomic
        with contextlib.suppress(IndexError):
            while True:
                yield take()


def spare(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of arbitrary content, the same memory whenever this thread asks for `name`.

    Memory that is new each time costs more than the work on it. What is larger than `KEPT` is not
    kept.
    """
    kept = _spares.__dict__
    last = kept.get(name)
    if last is not None and last.shape == shape and last.dtype == dtype:
        return last
    size = math.prod(shape)
    if size > KEPT:
        return np.empty(shape, dtype)
    nbytes = size * np.dtype(dtype).itemsize + _LINE
    memory = None if last is None else last.base
    if memory is None or memory.nbytes < nbytes:
        memory = np.empty(nbytes, np.uint8)
    # A vector that lies in two lines takes twice as long.
    kept[name] = np.ndarray(shape, dtype, memory, -memory.ctypes.data % _LINE)
    return kept[name]


_spares = threading.local()


def compiled(size: int) -> Any:
    """The module of compiled loops if they pay for `size` elements and Numba is there, else None.

    It depends on the size alone, so that results do not change with what ran before.
    """
    return _compiled() if size >= COMPILED else None


@functools.cache
def _compiled() -> Any:
    try:
        return importlib.import_module("cubin.compiled")
    except ImportError:  # Numba is missing, or does not know this NumPy yet
        return None


def extent(block: Block, shape: Sequence[int]) -> int:
    """The number of elements of `block` in an array of shape `shape`."""
    return math.prod(len(range(*cut.indices(n))) for cut, n in zip(block, shape, strict=True))


def portion(size: int) -> int:
    """Elements of a fourth of what each thread has of `size`, but no more than `LARGEST`.

    Smaller blocks take longer in Python, larger ones leave threads to wait for one that lags.
    """
    return min(size // (4 * _workers()), LARGEST)


def _workers() -> int:
    if hasattr(os, "sched_getaffinity"):
        return min(WORKERS, len(os.sched_getaffinity(0)))
    return min(WORKERS, os.cpu_count() or 1)
