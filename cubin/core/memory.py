"""Memory of large results on the CPU, used again once they are dropped; and scratch of a thread.

The system clears new memory while it is written, which takes longer than most of the work here.
So what a large result (from 32 MB on) lay in is kept for the next one of as many bytes, as CuPy's
pool does on a device: calls on arrays of the same size, one after the other, become faster. It is
offered to the system meanwhile (``MADV_FREE``), which takes it when it runs short; where that
cannot be said, as on Windows, nothing is kept.

`set_limit` says how much is kept, 256 MB if nobody calls it; `release` gives all of it back.
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
"""Bytes of a result from which on its memory is kept: C libraries keep what is smaller."""

HEADER = 64
"""The most bytes that C libraries write before memory that they map for itself."""

SCRATCH = 1 << 19
"""Elements of the largest array that a thread keeps for its next block."""

LINE = 64
"""Bytes that processors read memory by."""

_limit = 1 << 28

_kept: deque[np.ndarray] = deque()


def release() -> None:
    """Give the memory that is kept of dropped results back to the system.

    It concerns NumPy results alone; what lies on a device is CuPy's to free. Results that are still
    referred to stay as they are.

    Examples
    --------
    >>> import cubin
    >>> cubin.memory.release()
    """
    _kept.clear()


def set_limit(nbytes: int) -> None:
    """Set how much memory of dropped results is kept for the next ones.

    Parameters
    ----------
    nbytes : int
        The most bytes that are kept together, at least 0: with 0 none are. What is kept beyond
        them is given back at once. 256 MB until this is called.

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
    """An array of arbitrary content, in the memory of a dropped one where there is one."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LARGE or not _limit or _madvise() is None:
        return np.empty(shape, dtype)
    return np.asarray(_Owner(_take(nbytes), shape, dtype))


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
    if memory.nbytes <= _limit and _offer(memory):
        _kept.append(memory)
        _give_back()


def _give_back() -> None:
    """Let go of what has been kept longest, as far as it is too much."""
    with contextlib.suppress(IndexError):
        while sum(memory.nbytes for memory in tuple(_kept)) > _limit:
            _kept.popleft()


def _offer(memory: np.ndarray) -> bool:
    """Let the system take the whole pages of `memory`, their content with them.

    What does not begin on a page of its own was not mapped for itself: the C library keeps it then.
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
    """The system's function of that name, where it takes memory once it runs short."""
    try:
        return ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_FREE") else None
    except (AttributeError, OSError, TypeError):  # the last on Windows
        return None


# ---------------------------------------------------------------- scratch


def scratch(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of arbitrary content, the same memory whenever this thread asks for `name`.

    Memory that is new each time costs more than the work on it. What is larger than `SCRATCH` is
    not kept.
    """
    kept = _scratch.__dict__
    last = kept.get(name)
    if last is not None and last.shape == shape and last.dtype == dtype:
        return last
    size = math.prod(shape)
    if size > SCRATCH:
        return np.empty(shape, dtype)
    nbytes = size * np.dtype(dtype).itemsize + LINE
    memory = None if last is None else last.base
    if memory is None or memory.nbytes < nbytes:
        memory = np.empty(nbytes, np.uint8)
    # A vector that lies in two lines takes twice as long.
    kept[name] = np.ndarray(shape, dtype, memory, -memory.ctypes.data % LINE)
    return kept[name]


def forget_scratch() -> None:
    """Drop the scratch of this thread."""
    _scratch.__dict__.clear()


_scratch = threading.local()


def __dir__() -> list[str]:
    return sorted(__all__)
