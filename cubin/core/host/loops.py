"""What compiled loops are made with: decorators, sums in a fixed order, and conversions.

A loop is a plain Python function that Numba compiles. It releases the GIL. Greedy's loops allocate
nothing: their callers pass scratch memory.

Every combination of argument types is compiled anew, which takes seconds. So there are few: arrays
are contiguous, and float32 or float64. Where there is no bit map, a map without columns is passed.

Numba keeps compiled loops in ``__pycache__``. To see whether they are up to date it looks at the
file of the loop alone: after a change to this file, delete ``cubin/**/__pycache__/*.nb?``.
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
    """Numba's cache of compiled loops on disk, made safe against damaged entries.

    A killed process, a full disk or two processes that save at once leave entries that cannot be
    read, or that hold a loop for other types. Numba raises for the former at every call of the
    loop, and runs the latter as it is. Here both are dropped, and the loop is compiled again.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The loop for the types `sig`, or None where there is no sound entry."""
        try:
            entry = super().load_overload(sig, target_context)
        except Exception:  # unpickling a damaged entry may raise anything
            entry = None
        else:
            if entry is None or entry.signature.args == tuple(sig):
                return entry
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
    """Make a function one that Numba inlines into every loop that calls it.

    Compiling then takes half as long as with a function of its own.
    """
    return numba.njit(nogil=True, inline="always")(function)


def inner(function: Callable[..., Any]) -> Any:
    """Compile a function that loops alone call, and that LLVM inlines into them.

    Where arguments are many, this compiles faster than a `part`, which Numba inlines statement by
    statement. It has no wrapper for calls from Python, which would take longest of all.
    """
    unwrapped: Any = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    compiled: Any = numba.njit(nogil=True, forceinline=True, **unwrapped)(function)
    return compiled


@intrinsic
def uncounted(context: Any, *kinds: Any) -> Any:
    """The same arrays, as a tuple, but without reference counts: the caller must keep them alive.

    Numba counts a reference for every slice of an array, which takes longer than the work on a
    short row. Numba has no public function that turns this off.
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

# These do what `cubin.core.sums` does, operation by operation. Each loop has numbers of one width
# alone, so that LLVM can fill vector registers. LLVM may not reorder additions (there is no
# `fastmath`), so that all processors round the same way.


@part
def _add_columns(m: Array, taken: float, n: int, sums: Array) -> None:
    """Add up `COLUMNS` columns of n residuals: the first half and the second half, then the halves
    of that, and so on.

    The magnitude of a residual is written out each time: Numba takes long to inline a function.
    """
    a = taken
    for j in range(n):
        r = abs(abs(m[j]) - a) + abs(abs(m[j + 8 * n]) - a)
        s = abs(abs(m[j + 4 * n]) - a) + abs(abs(m[j + 12 * n]) - a)
        t = abs(abs(m[j + 2 * n]) - a) + abs(abs(m[j + 10 * n]) - a)
        u = abs(abs(m[j + 6 * n]) - a) + abs(abs(m[j + 14 * n]) - a)
        even = (r + s) + (t + u)
        r = abs(abs(m[j + n]) - a) + abs(abs(m[j + 9 * n]) - a)
        s = abs(abs(m[j + 5 * n]) - a) + abs(abs(m[j + 13 * n]) - a)
        t = abs(abs(m[j + 3 * n]) - a) + abs(abs(m[j + 11 * n]) - a)
        u = abs(abs(m[j + 7 * n]) - a) + abs(abs(m[j + 15 * n]) - a)
        sums[j] = even + ((r + s) + (t + u))


@part
def sum_in_lanes(sums: Array, size: int) -> float:
    """The sum of the first `size` numbers, in eight lanes that take one number each in turn.

    Zeros are written after them, up to a multiple of eight.
    """
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


@part
def _sum(m: Array, taken: float, sums: Array) -> float:
    width = m.size // COLUMNS if m.size >= SHORT else 0
    _add_columns(m, taken, width, sums)
    rest = sums[width : m.size - (COLUMNS - 1) * width]
    for j in range(rest.size):
        rest[j] = abs(abs(m[COLUMNS * width + j]) - taken)
    return sum_in_lanes(sums, width + rest.size)


@loop
def sum_in_sixteenths(m: Array, taken: float, sums: Array) -> float:
    """`magnitude_sum` where a column overflows: of the numbers times `UNIT`, which cannot.

    It allocates, since it is rare.
    """
    small = np.empty(m.size, m.dtype)
    for j in range(m.size):
        small[j] = abs(abs(m[j]) - taken) * m.dtype.type(UNIT)
    return _sum(small, m.dtype.type(0), sums) / UNIT


@part
def magnitude_sum(m: Array, taken: float, sums: Array) -> float:
    """The sum of ``||m| - taken|`` over at most one chunk, in float64; `sums` is overwritten."""
    total = _sum(m, taken, sums)
    if total == np.inf:  # a column may have overflowed
        total = sum_in_sixteenths(m, taken, sums)
    return total


@part
def keep(x: Array, taken: float, m: Array) -> None:
    """Write ``||x| - taken|``, the residuals' magnitudes after a level of the scale `taken`."""
    for j in range(m.size):
        m[j] = abs(abs(x[j]) - taken)


# LLVM does not vectorize a loop on two arrays that are the same, so there are forms on one array.


@part
def keep_in_place(m: Array, taken: float) -> None:
    """The same, written over the magnitudes."""
    for j in range(m.size):
        m[j] = abs(m[j] - taken)


@part
def keep_coded_in_place(m: Array, taken: float, bits: Array, level: int) -> int:
    """The same for elements with a code at a level, else 0. Returns how many have one."""
    # Counters of 32 bits: wider ones than the elements would halve the lanes of a register.
    number, count, zero = np.int32(level), np.int32(0), m.dtype.type(0)
    for j in range(m.size):
        left = abs(m[j] - taken)
        coded = np.int32(bits[j]) > number
        m[j] = left if coded else zero
        count = np.int32(count + coded)
    return int(count)


def scratch(dtype: Any) -> tuple[Array, Array]:
    """Scratch for a chunk of magnitudes, and for the sums that `magnitude_sum` overwrites."""
    return (
        memory.scratch("chunk", (CHUNK,), dtype),
        memory.scratch("sums", (CHUNK // COLUMNS + SHORT,), dtype),
    )


# ---------------------------------------------------------------- float16 and bfloat16

# Numba has neither, and NumPy converts them element by element. These loops work on the bits.

_INFINITE_HALF, _INFINITE = 0x7C00, 0x7F800000
_EXPONENTS_APART = np.float32(2.0**112)


@loop
def widen_float16(half: Array, words: Array) -> None:
    """Convert float16 to float32, both as bit patterns."""
    for j in range(half.size):
        word = np.uint32(half[j])
        moved = np.uint32((word & 0x7FFF) << 13)
        value = np.uint32(moved).view(np.float32) * _EXPONENTS_APART
        finite = moved < np.uint32(_INFINITE_HALF << 13)
        magnitude = np.float32(value).view(np.uint32) if finite else np.uint32(moved | _INFINITE)
        words[j] = np.uint32(magnitude | np.uint32((word & 0x8000) << 16))


@loop
def narrow_to_float16(words: Array, half: Array) -> None:
    """Convert float32 to float16, both as bit patterns: to the nearest, ties to even."""
    for j in range(half.size):
        word = words[j]
        m = np.uint32(word & 0x7FFFFFFF)
        odd = np.uint32((m >> 13) & 1)
        normal = np.uint32(np.uint32(m - 0x38000000 + 0xFFF + odd) >> 13)
        # Near 0.5 float32 has the spacing of float16's subnormal numbers: adding 0.5 rounds to it.
        raised = np.uint32(m).view(np.float32) + np.float32(0.5)
        small = np.uint32(np.float32(raised).view(np.uint32) - 0x3F000000)
        payload = np.uint32((m >> 13) & 0x3FF)
        nan = np.uint32(_INFINITE_HALF | (payload if payload > 0 else np.uint32(1)))
        value = small if m < np.uint32(0x38800000) else normal
        value = np.uint32(_INFINITE_HALF) if m >= np.uint32(0x47800000) else value
        value = nan if m > np.uint32(_INFINITE) else value
        half[j] = np.uint16(value | np.uint32((word >> 16) & 0x8000))


@loop
def widen_bfloat16(half: Array, words: Array) -> None:
    """Convert bfloat16 to float32, both as bit patterns: it is the upper half of one."""
    for j in range(half.size):
        words[j] = np.uint32(np.uint32(half[j]) << 16)


@loop
def narrow_to_bfloat16(words: Array, half: Array) -> None:
    """Convert float32 to bfloat16, both as bit patterns: to the nearest, ties to even."""
    for j in range(half.size):
        word = words[j]
        odd = np.uint32((word >> 16) & 1)
        value = np.uint32(np.uint32(word + 0x7FFF + odd) >> 16)
        nan = np.uint32((word >> 16) & 0x8000 | 0x7FC0)
        value = nan if np.uint32(word & 0x7FFFFFFF) > np.uint32(_INFINITE) else value
        half[j] = np.uint16(value)


# ---------------------------------------------------------------- arguments and results of loops


def read_only(array: Array) -> Array:
    """A read-only view. Numba has two types, for arrays that are writable and those that are not:
    this way there is one."""
    view = array.view()
    view.flags.writeable = False
    return view


def in_work_dtype(x: Array) -> Array:
    """`x` in the work dtype, contiguous, aligned and read-only; a view where `x` is so already."""
    x = in_rows(x)
    if not floats.is_narrow(x.dtype):
        return read_only(x)
    wide = np.empty(x.shape, np.float32)
    widen = widen_float16 if x.dtype == np.float16 else widen_bfloat16
    half = read_only(x).view(np.uint16)
    widen(half.reshape(-1), wide.view(np.uint32).reshape(-1))
    return read_only(wide)


_PATTERNS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@loop
def transpose(source: Array, target: Array) -> None:
    """Write ``target[i, j] = source[j, i]``, eight rows of the source at a time.

    So many lines of it are read on, and half a line of the target is written at once.
    """
    rows, columns = source.shape
    full = rows // 8 * 8
    for start in range(0, full, 8):
        for i in range(columns):
            for k in range(8):
                target[i, start + k] = source[start + k, i]
    for j in range(full, rows):
        for i in range(columns):
            target[i, j] = source[j, i]


def _lies_in_columns(x: Array) -> bool:
    """Whether `x`, (rows, n), has rows side by side, as columns of a matrix are."""
    return (
        x.ndim == 2
        and 0 < x.strides[0] <= 8 < x.strides[1]
        and len(x) > 1
        and x.flags.aligned
        and x.itemsize in _PATTERNS
    )


def in_rows(x: Array) -> Array:
    """`x` in C order and aligned: itself where it is. Columns take a tenth of NumPy's time."""
    if not _lies_in_columns(x):
        return np.require(x, requirements=("C", "A"))
    rows, kind = np.empty(x.shape, x.dtype), _PATTERNS[x.itemsize]
    transpose(read_only(x.T.view(kind)), rows.view(kind))
    return rows


def place(values: Array, y: Array) -> None:
    """Write what lies in rows to `y`, of the same dtype and shape, which may lie in columns."""
    if values.ndim == 3:
        for level, of_level in enumerate(values):
            place(of_level, y[level])
    elif _lies_in_columns(y) and values.dtype == y.dtype:
        kind = _PATTERNS[y.itemsize]
        transpose(read_only(np.ascontiguousarray(values).view(kind)), y.T.view(kind))
    else:
        y[...] = values


def store(values: Array, y: Array) -> None:
    """Write `values`, in the work dtype and contiguous, to `y`; nothing if they are `y` itself."""
    if values is y:
        return
    if floats.is_narrow(y.dtype) and values.dtype == np.float32:
        half = y if y.flags.carray else np.empty(y.shape, y.dtype)
        narrow = narrow_to_float16 if y.dtype == np.float16 else narrow_to_bfloat16
        narrow(read_only(values).view(np.uint32).reshape(-1), half.view(np.uint16).reshape(-1))
        values = half
    if values is not y:
        place(values, y)


def target(y: Array, *inputs: Array) -> Array:
    """Where a loop writes its result: `y` itself where it can, else an array to `store` from."""
    work = floats.work_dtype(y.dtype)
    direct = y.dtype == work and y.flags.carray
    if direct and not any(np.may_share_memory(y, x) for x in inputs):
        return y
    return np.empty(y.shape, work)


# ---------------------------------------------------------------- rows side by side

BESIDE = 16
"""The fewest rows that are worked on side by side: those of a line of the cache, of float32."""


def beside(*arrays: Array) -> bool:
    """Whether the rows of all arrays, (rows, n), lie side by side, as columns of a matrix do.

    There may be an axis of levels before. `lines` then gives the arrays as loops take them.
    """
    return all(map(_beside, arrays))


def _beside(x: Array) -> bool:
    rows, n = x.shape[-2:]
    step, pitch = x.strides[-2:]
    return (
        rows >= BESIDE
        and n > 1
        and step == x.itemsize
        and pitch >= rows * step
        and pitch % step == 0
        and (x.ndim == 2 or x.strides[0] == n * pitch)
        and x.flags.aligned
    )


def lines(x: Array) -> Array:
    """Rows that lie side by side, (rows, n), as a contiguous array of lines, (n, pitch).

    A line begins with an element of each row. What follows, up to the next line, belongs to other
    rows or to no array: loops must not touch it. Contiguous arrays are of one type for Numba,
    wherever a line ends.
    """
    pitch = x.strides[-1] // x.itemsize
    shape = (*x.shape[:-2], x.shape[-1], pitch)
    steps = (*x.strides[:-2], x.strides[-1], x.itemsize)
    return np.lib.stride_tricks.as_strided(x, shape, steps)


def lines_in_work_dtype(x: Array) -> Array:
    """`lines` in the work dtype, read-only: a copy where `x` is float16 or bfloat16."""
    if not floats.is_narrow(x.dtype):
        return read_only(lines(x))
    wide = np.empty(x.shape[::-1], np.float32)
    half = read_only(lines(x).view(np.uint16))
    _widen_lines(half, wide.view(np.uint32), x.dtype == np.float16)
    return read_only(wide)


@loop
def _widen_lines(half: Array, words: Array, ieee: bool) -> None:
    for e in range(len(words)):
        if ieee:
            widen_float16(half[e, : words.shape[1]], words[e])
        else:
            widen_bfloat16(half[e, : words.shape[1]], words[e])


@loop
def _narrow_lines(words: Array, half: Array, ieee: bool) -> None:
    for e in range(len(words)):
        if ieee:
            narrow_to_float16(words[e], half[e, : words.shape[1]])
        else:
            narrow_to_bfloat16(words[e], half[e, : words.shape[1]])


def store_lines(values: Array, y: Array) -> None:
    """Write lines in the work dtype, (n, rows), to `y`, (rows, n), of float16 or bfloat16."""
    words = read_only(values).view(np.uint32)
    _narrow_lines(words, lines(y).view(np.uint16), y.dtype == np.float16)


def map_lines(bits: Array, n: int) -> Array:
    """A bit map, (rows, n), as lines; of no columns where `bits` is one number."""
    if not np.ndim(bits):
        return read_only(np.empty((n, 0), np.uint8))
    return read_only(lines(bits) if beside(bits) else np.ascontiguousarray(bits.T))


def map_of(bits: Array, rows: int) -> Array:
    """A bit map as loops take it, (rows, n); of no columns where `bits` is one number."""
    return read_only(in_rows(bits) if np.ndim(bits) else np.empty((rows, 0), np.uint8))
