"""Memory of large results on the CPU, used again once they are dropped.

The system clears new memory while it is written, which takes longer than most of the work here.
So what a large result lay in is kept for the next one of as many bytes, as CuPy's pool does on a
device. It is offered to the system meanwhile (``MADV_FREE``), which takes it when it runs short;
where that cannot be said, nothing is kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import sys
from collections import deque
from typing import Any

import numpy as np

LARGE = 1 << 25
"""Bytes of a result from which on its memory is kept: C libraries keep what is smaller."""

KEPT = 1 << 28
"""The most bytes that are kept."""

HEADER = 64
"""The most bytes that C libraries write before memory that they map for itself."""

_kept: deque[np.ndarray] = deque()


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of arbitrary content, in the memory of a dropped one where there is one."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LARGE or _system("madvise") is None:
        return np.empty(shape, dtype)
    return np.asarray(_Owner(_take(nbytes), shape, dtype))


def release() -> None:
    """Give what is kept back to the system."""
    _kept.clear()


def is_resident(array: np.ndarray) -> bool:
    """Whether the system has given memory to `array` yet, as far as its middle tells."""
    mincore = _system("mincore")
    if mincore is None:
        return False
    address, answer = array.ctypes.data + array.nbytes // 2, ctypes.c_ubyte()
    page = ctypes.c_void_p(address - address % mmap.PAGESIZE)
    return mincore(page, ctypes.c_size_t(1), ctypes.byref(answer)) == 0 and answer.value & 1 == 1


class _Owner:
    """What a result and its views hold on to: its memory is kept when the last of them goes."""

    def __init__(self, memory: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._memory = memory
        self.__array_interface__ = np.ndarray(shape, dtype, memory).__array_interface__

    def __del__(self) -> None:
        if not sys.is_finalizing():
            _keep(self._memory)


def _take(nbytes: int) -> np.ndarray:
    """Memory that was kept, or new memory; others go first, so that no more is held than before."""
    with contextlib.suppress(IndexError):  # a deque's methods are atomic
        while True:
            memory = _kept.pop()
            if memory.nbytes == nbytes:
                return memory
    return np.empty(nbytes, np.uint8)


def _keep(memory: np.ndarray) -> None:
    if memory.nbytes > KEPT or not _offer(memory):
        return
    _kept.append(memory)
    with contextlib.suppress(IndexError):
        while sum(kept.nbytes for kept in tuple(_kept)) > KEPT:
            _kept.popleft()


def _offer(memory: np.ndarray) -> bool:
    """Let the system take the whole pages of `memory`, their content with them.

    What does not begin on a page of its own was not mapped for itself: the C library keeps it then.
    """
    madvise = _system("madvise")
    page, address = mmap.PAGESIZE, memory.ctypes.data
    if madvise is None or address % page > HEADER:
        return False
    start, stop = -(-address // page) * page, (address + memory.nbytes) // page * page
    size = ctypes.c_size_t(stop - start)
    return madvise(ctypes.c_void_p(start), size, mmap.MADV_FREE) == 0


@functools.cache
def _system(name: str) -> Any:
    """The function of the system of that name, where there is one."""
    if name == "madvise" and not hasattr(mmap, "MADV_FREE"):
        return None
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # the last on Windows
        return None
