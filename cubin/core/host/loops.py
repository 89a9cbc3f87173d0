"""What compiled loops are made with: the decorator, sums in a fixed order, and float16.

A loop is plain Python that Numba compiles. It releases the GIL, and holds no memory of its own:
what it needs to work with is handed in. Its types are kept few, since each is compiled anew:
float32 and float64, contiguous, and a missing bit map is one without columns.

Numba keeps what it has compiled in ``__pycache__`` and looks at the file of a loop alone: after a
change to this file, delete ``cubin/**/__pycache__/*.nb?``.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

from cubin.core import floats, memory
from cubin.core.libraries import Array
from cubin.core.sums import CHUNK, COLUMNS, LANES, SHORT, UNIT


class _Cache(FunctionCache):
    """Compiled loops on disk, without which they are compiled again.

    A killed process, a full disk and processes that save at once leave entries that cannot be
    read, or that hold a loop for other types. Numba raises for the first, whenever the loop is
    called, and takes the second as it is.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The loop for the types `sig`, or None where there is no sound entry."""
        try:
            found = super().load_overload(sig, target_context)
        except Exception:  # unpickling what is damaged may raise anything
            found = None
        else:
            if found is None or found.signature.args == tuple(sig):
                return found
        with contextlib.suppress(OSError):
            self.flush()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep the loop for the types `sig`, or warn that this is not possible."""
        try:
            super().save_overload(sig, data)
        except Exception:
            warnings.warn(
                f"compiled loops cannot be kept in {self.cache_path}, so every process compiles "
                "them again: delete that folder, or let it be written",
                RuntimeWarning,
                stacklevel=2,
            )


def loop(function: Callable[..., Any]) -> Any:
    """Compile a function for the types that it is called with, and keep the result on disk."""
    compiled: Any = numba.njit(nogil=True)(function)
    with contextlib.suppress(RuntimeError):  # no folder to keep the cache in can be written
        compiled._cache = _Cache(function)
    return compiled


def part(function: Callable[..., Any]) -> Any:
    """Make a function a part of the loops that call it, which are then compiled in one go.

    That takes half as long as compiling each function and again what it calls.
    """
    return numba.njit(nogil=True, inline="always")(function)


@intrinsic
def uncounted(context: Any, *kinds: Any) -> Any:
    """The same arrays, as a tuple, whose slices count no references: others must hold them.

    Numba counts the references to whatever is sliced, which takes longer than the work on a short
    row. This is the only thing that it has no plain name for.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        views = []
        for number, kind in enumerate(kinds):
            view = context.make_array(kind)(
                context, builder, builder.extract_value(arguments[0], number)
            )
            view.meminfo = cgutils.get_null_value(view.meminfo.type)
            views.append(view._getvalue())
        return context.make_tuple(builder, signature.return_type, views)

    return numba.types.Tuple(kinds)(numba.types.StarArgTuple(kinds)), generate


# ---------------------------------------------------------------- sums

# As in `cubin.core.sums`, operation by operation. Each loop has numbers of one width alone, so that
# vectors are filled; and none may be reordered, so that all processors round the same way.


@part
def _add_columns(m: Array, unit: float, n: int, sums: Array) -> None:
    """Add up magnitudes, times a unit, in `COLUMNS` columns of n, by halves."""
    for j in range(n):
        r = m[j] * unit + m[j + 8 * n] * unit
        s = m[j + 4 * n] * unit + m[j + 12 * n] * unit
        t = m[j + 2 * n] * unit + m[j + 10 * n] * unit
        u = m[j + 6 * n] * unit + m[j + 14 * n] * unit
        even = (r + s) + (t + u)
        r = m[j + n] * unit + m[j + 9 * n] * unit
        s = m[j + 5 * n] * unit + m[j + 13 * n] * unit
        t = m[j + 3 * n] * unit + m[j + 11 * n] * unit
        u = m[j + 7 * n] * unit + m[j + 15 * n] * unit
        sums[j] = even + ((r + s) + (t + u))


@part
def sum_in_lanes(sums: Array, size: int) -> float:
    """Add the first `size` numbers to eight lanes in turn; zeros are written after them."""
    end = -(-size // LANES) * LANES
    for j in range(size, end):
        sums[j] = 0
    a = b = c = d = e = f = g = h = 0.0
    for j in range(0, end, LANES):
        a += np.float64(sums[j])
        b += np.float64(sums[j + 1])
        c += np.float64(sums[j + 2])
        d += np.float64(sums[j + 3])
        e += np.float64(sums[j + 4])
        f += np.float64(sums[j + 5])
        g += np.float64(sums[j + 6])
        h += np.float64(sums[j + 7])
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


@loop
def _sum_in(unit: float, m: Array, sums: Array) -> float:
    m, sums = uncounted(m, sums)
    size = m.size
    if size >= SHORT:
        width = size // COLUMNS
        _add_columns(m, unit, width, sums)
        whole = COLUMNS * width
        for j in range(whole, size):
            sums[j - whole + width] = m[j] * unit
        size = width + size - whole
    else:
        for j in range(size):
            sums[j] = m[j] * unit
    return sum_in_lanes(sums, size)


@part
def magnitude_sum(m: Array, sums: Array) -> float:
    """The sum of magnitudes, of one chunk at most, in float64; `sums` is overwritten."""
    total = _sum_in(m.dtype.type(1), m, sums)
    if total == np.inf:  # perhaps a column overflows: in smaller units none does
        total = _sum_in(m.dtype.type(UNIT), m, sums) / UNIT
    return total


@part
def keep(x: Array, taken: float, m: Array) -> None:
    """Write what is left of magnitudes once a scale is taken off."""
    for j in range(m.size):
        m[j] = abs(abs(x[j]) - taken)


# A loop on two arrays that are the same is not vectorized: in place there is one.


@part
def keep_in_place(m: Array, taken: float) -> None:
    """The same, where the magnitudes were."""
    for j in range(m.size):
        m[j] = abs(m[j] - taken)


@part
def keep_coded_in_place(m: Array, taken: float, bits: Array, level: int) -> int:
    """The same where an element has a code at a level, and 0 elsewhere; give the number of them."""
    # In 32 bits: wider than the elements they would halve the lanes.
    number, count, zero = np.int32(level), np.int32(0), m.dtype.type(0)
    for j in range(m.size):
        left = abs(m[j] - taken)
        hot = np.int32(bits[j]) > number
        m[j] = left if hot else zero
        count = np.int32(count + hot)
    return int(count)


def scratch(dtype: Any) -> tuple[Array, Array]:
    """Room for a chunk, and for what `magnitude_sum` overwrites."""
    return (
        memory.scratch("chunk", (CHUNK,), dtype),
        memory.scratch("sums", (CHUNK // COLUMNS + SHORT,), dtype),
    )


# ---------------------------------------------------------------- float16

# Numba does not know it, and NumPy converts it one by one: here it is its bits.

_INFINITE_HALF, _INFINITE = 0x7C00, 0x7F800000
_EXPONENTS_APART = np.float32(2.0**112)


@loop
def widen(half: Array, words: Array) -> None:
    """Write the bits of float32 for bits of float16."""
    for j in range(half.size):
        word = np.uint32(half[j])
        moved = np.uint32((word & 0x7FFF) << 13)
        value = np.uint32(moved).view(np.float32) * _EXPONENTS_APART
        finite = moved < np.uint32(_INFINITE_HALF << 13)
        magnitude = np.float32(value).view(np.uint32) if finite else np.uint32(moved | _INFINITE)
        words[j] = np.uint32(magnitude | np.uint32((word & 0x8000) << 16))


@loop
def narrow(words: Array, half: Array) -> None:
    """Write the bits of float16 for bits of float32, rounded to the nearest, ties to even."""
    for j in range(half.size):
        word = words[j]
        m = np.uint32(word & 0x7FFFFFFF)
        odd = np.uint32((m >> 13) & 1)
        normal = np.uint32(np.uint32(m - 0x38000000 + 0xFFF + odd) >> 13)
        # The sum has the steps of the smallest numbers of float16, and is rounded by the processor.
        raised = np.uint32(m).view(np.float32) + np.float32(0.5)
        small = np.uint32(np.float32(raised).view(np.uint32) - 0x3F000000)
        payload = np.uint32((m >> 13) & 0x3FF)
        nan = np.uint32(_INFINITE_HALF | (payload if payload > 0 else np.uint32(1)))
        value = small if m < np.uint32(0x38800000) else normal
        value = np.uint32(_INFINITE_HALF) if m >= np.uint32(0x47800000) else value
        value = nan if m > np.uint32(_INFINITE) else value
        half[j] = np.uint16(value | np.uint32((word >> 16) & 0x8000))


# ---------------------------------------------------------------- what loops take and give


def read_only(array: Array) -> Array:
    """A view that cannot be written to, whether the array can or not, which would be two types."""
    view = array.view()
    view.flags.writeable = False
    return view


def in_work_dtype(x: Array) -> Array:
    """The same numbers, contiguous and aligned: those of `x` where they are, and read-only."""
    if x.dtype != np.float16:
        return read_only(np.require(x, requirements=("C", "A")))
    wide = np.empty(x.shape, np.float32)
    half = read_only(np.ascontiguousarray(x)).view(np.uint16)
    widen(half.reshape(-1), wide.view(np.uint32).reshape(-1))
    return read_only(wide)


def store(values: Array, y: Array) -> None:
    """Write contiguous numbers in the work dtype to `y`, where they do not lie there already."""
    if values is y:
        return
    if y.dtype == np.float16 and y.flags.carray:
        narrow(read_only(values).view(np.uint32).reshape(-1), y.view(np.uint16).reshape(-1))
    else:
        y[...] = values


def target(y: Array, *inputs: Array) -> Array:
    """Where a loop writes what `store` then brings to `y`: there itself if that is possible."""
    work = floats.work_dtype(y.dtype)
    direct = y.dtype == work and y.flags.carray
    if direct and not any(np.may_share_memory(y, x) for x in inputs):
        return y
    return np.empty(y.shape, work)


def map_of(bits: Array, rows: int) -> Array:
    """A map as loops take it; of no columns where there is none."""
    return read_only(np.ascontiguousarray(bits) if np.ndim(bits) else np.empty((rows, 0), np.uint8))
