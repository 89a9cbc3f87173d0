"""Memory of large results on the CPU, which is used again once they are dropped; and scratch.

The system clears new memory when it is first written, which takes longer than most of the work
here. So the memory of a dropped result of 32 MB or more is kept for the next result of the same
size, as CuPy's pool does on a device. Repeated calls on arrays of one size become faster.

Meanwhile it is offered to the system (``MADV_FREE``), which takes it when it runs short. Where
there is no such offer, as on Windows, nothing is kept.

`set_limit` says how much is kept at most, 256 MB by default. `release` gives all of it back.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import operator
import sys
import threading
from collections import deque
from typing import Any

import numpy as np

__all__ = ["release", "set_limit"]

LARGE = 1 << 25
"""Bytes from which on a result's memory is kept. C libraries keep what is smaller themselves."""

HEADER = 64
"""The most bytes between the start of a page and memory for which the C library mapped pages."""

SCRATCH = 1 << 19
"""Elements of the largest scratch array that a thread keeps for its next block."""

KEPT = 1 << 19
"""Bytes of scratch that each of several threads keeps for its next task."""

LINE = 64
"""Bytes of a cache line."""

_limit = 1 << 28

_kept: deque[np.ndarray] = deque()


def release() -> None:
    """Give the memory that is kept from dropped results back to the system.

    Results that are still referred to stay as they are. Only NumPy results count: CuPy manages the
    memory of a device.

    Examples
    --------
    >>> import cubin
    >>> cubin.memory.release()
    """
    _kept.clear()


def set_limit(nbytes: int) -> None:
    """Set how much memory of dropped results is kept for the next results.

    Parameters
    ----------
    nbytes : int
        The most bytes that are kept in all, at least 0. With 0 nothing is kept. Memory beyond the
        limit is given back at once. Until the first call the limit is 256 MB.

    Raises
    ------
    TypeError
        If `nbytes` is no integer.
    ValueError
        If it is negative.

    Examples
    --------
    >>> import cubin
    >>> cubin.memory.set_limit(1 << 28)
    """
    global _limit
    try:
        number = operator.index(nbytes)
    except TypeError:
        number = None
    if number is None or isinstance(nbytes, bool):
        raise TypeError(f"nbytes must be an integer, got {type(nbytes).__qualname__}")
    if number < 0:
        raise ValueError(f"nbytes must be at least 0, got {number}")
    _limit = number
    _give_back()


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of arbitrary content, in the memory of a dropped result of that size if any."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LARGE or not _limit or _madvise() is None:
        return np.empty(shape, dtype)
    # NumPy's interface of arrays has no bfloat16: there it is two bytes of anything.
    return np.asarray(_Owner(_take(nbytes), shape, dtype)).view(dtype)


class _Owner:
    """The base of a result and its views. When the last of them goes, it keeps their memory."""

    def __init__(self, memory: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._memory = memory
        self.__array_interface__ = np.ndarray(shape, dtype, memory).__array_interface__

    def __del__(self) -> None:
        if not sys.is_finalizing():
            _keep(self._memory)


def _take(nbytes: int) -> np.ndarray:
    """Kept memory of exactly this size, or new memory.

    Kept memory of other sizes is given back on the way, so that the process does not grow.
    """
    with contextlib.suppress(IndexError):  # another thread may take the last one: pop is atomic
        while True:
            memory = _kept.pop()
            if memory.nbytes == nbytes:
                return memory
    return np.empty(nbytes, np.uint8)


def _keep(memory: np.ndarray) -> None:
    """Keep the memory of a dropped result, within the limit."""
    if memory.nbytes <= _limit and _offer(memory):
        _kept.append(memory)
        _give_back()


def _give_back() -> None:
    """Give back the memory that was kept first, until the rest is within the limit."""
    with contextlib.suppress(IndexError):
        while sum(memory.nbytes for memory in tuple(_kept)) > _limit:
            _kept.popleft()


def _offer(memory: np.ndarray) -> bool:
    """Offer the whole pages of `memory` to the system; False where that is not possible.

    Their content may be lost. Memory that does not begin near the start of a page shares pages with
    other objects of the C library, which keeps it itself.
    """
    madvise = _madvise()
    page, address = mmap.PAGESIZE, memory.ctypes.data
    if madvise is None or address % page > HEADER:
        return False
    start, stop = -(-address // page) * page, (address + memory.nbytes) // page * page
    size = ctypes.c_size_t(stop - start)
    return madvise(ctypes.c_void_p(start), size, mmap.MADV_FREE) == 0


@functools.cache
def _madvise() -> Any:
    """The C function ``madvise``, or None where the system has no ``MADV_FREE``."""
    try:
        return ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_FREE") else None
    except (AttributeError, OSError, TypeError):  # TypeError on Windows
        return None


# ---------------------------------------------------------------- scratch


def scratch(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of arbitrary content: the same memory whenever this thread asks for `name`.

    New memory for every block would cost more than the work on it. An array of more than `SCRATCH`
    elements is new each time.
    """
    by_name = _scratch.__dict__
    last = by_name.get(name)
    if last is not None and last.shape == shape and last.dtype == dtype:
        return last
    size = math.prod(shape)
    if size > SCRATCH:
        return np.empty(shape, dtype)
    nbytes = size * np.dtype(dtype).itemsize + LINE
    memory = None if last is None else last.base
    if memory is None or memory.nbytes < nbytes:
        memory = np.empty(nbytes, np.uint8)
    # Aligned to cache lines: a vector that lies in two of them takes twice as long to read.
    by_name[name] = np.ndarray(shape, dtype, memory, -memory.ctypes.data % LINE)
    return by_name[name]


def forget_scratch() -> None:
    """Drop the scratch of this thread where it is more than `KEPT`: too much for many threads.

    What is less stays: the system has to clear new memory, and a short task takes less than that.
    """
    if sum(found.base.nbytes for found in _scratch.__dict__.values()) > KEPT:
        _scratch.__dict__.clear()


_scratch = threading.local()


def __dir__() -> list[str]:
    return sorted(__all__)
