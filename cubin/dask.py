"""Dask arrays: `sign`, `ste_mask`, `multibit` and the gradients, chunk by chunk when computed.

The functions of the package take Dask arrays, of NumPy or CuPy chunks, and give lazy ones::

    y = cubin.multibit(x, 2, channel_axis=0)  # nothing is computed yet
    y.to_zarr(...)

Where every row lies in one chunk, each chunk is worked on alone, with the bits of the result for
the whole array. Where not, the greedy solver finds the scales by sums over chunks, which are exact,
so that the result does not depend on the chunks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import dask.array
import numpy as np

from cubin import binarize, gradients, solvers
from cubin.core import arrays, floats, libraries, passes
from cubin.core.bits import Bits, as_bits, as_entries
from cubin.core.libraries import DASK, LIBRARY_OF, Array
from cubin.core.rows import Rows, rows_of
from cubin.solvers import greedy, scattered
from cubin.solvers.solver import Solver, solver_of

FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        binarize.sign,
        binarize.ste_mask,
        binarize.multibit,
        gradients.sign_grad,
        gradients.multibit_grad,
    )
}
"""The functions that take Dask arrays."""

_ARRAYS = ("x", "bits", "bound", "gy", "importance")


def lazily(name: str, arguments: dict[str, Any]) -> Any:
    """The lazy result of the public function of this name, some of whose arguments are lazy.

    Raises
    ------
    TypeError
        If the function takes no Dask arrays, arrays are of several libraries, `x` is no Dask array,
        or `out` is given; and where the function raises one.
    ValueError
        If rows do not lie in one chunk each and have to, or chunks are of unknown sizes; and where
        the function raises one. The values of lazy maps and importance are checked chunk by chunk.
    """
    lazy = {n: v for n, v in arguments.items() if LIBRARY_OF[type(v)] is DASK}
    if name not in FUNCTIONS:
        DASK.check(*next(iter(lazy.items())))
    others = {n: v for n, v in arguments.items() if n not in lazy and v is not None}
    if "out" in others:
        DASK.check_output(others["out"])
    x = lazy.get("x")
    for other, value in others.items():
        if LIBRARY_OF[type(value)] is not None:
            raise TypeError(
                f"{other} is a {LIBRARY_OF[type(value)].array}, but {next(iter(lazy))} is a Dask "  # type: ignore[union-attr]
                "array: bring both to one library"
            )
    if x is None:
        raise TypeError(
            f"{next(iter(lazy))} is a Dask array, but x is none: pass dask.array.from_array(x)"
        )
    for other, value in lazy.items():
        if any(map(math.isnan, value.shape)):
            raise ValueError(
                f"{other} has chunks of unknown sizes: call {other}.compute_chunk_sizes() first"
            )
    operands, options = {"x": x}, {}
    for other, value in arguments.items():
        if other in lazy:
            operands[other] = value
        elif other in _ARRAYS and value is not None and not _is_number(value):
            plain = value if libraries.on_device(value) else arrays.as_host_array(other, value)
            operands[other] = plain
        else:
            options[other] = value
    function = FUNCTIONS[name]
    tiny = {other: _empty(other, value) for other, value in operands.items()}
    meta = function(**tiny, **options)  # which checks libraries, dtypes and options
    rows = rows_of(x.shape, options.get("channel_axis"), options.get("group_size"))
    _check_shapes(operands)
    if name == "multibit":
        return _multibit(operands, rows, meta, **options)
    if "bits" in operands and "bits" not in lazy:
        as_entries(operands["bits"], x.shape, tiny["x"])
    if name == "multibit_grad" and options.get("surrogate", "bits_clip") != "bits_clip":
        _check_whole(x, rows, f"the surrogate {options['surrogate']!r} looks at whole rows")
    return _chunk_by_chunk(_applied, operands, meta, called=name, options=options)


def _is_number(value: Any) -> bool:
    """Whether an argument is a single number, which goes to every chunk."""
    return not libraries.on_device(value) and np.ndim(value) == 0


def _empty(name: str, value: Any) -> Array:
    """An array of no elements in the library, dtype and rank of an argument."""
    plain = value._meta if LIBRARY_OF[type(value)] is DASK else value
    if not (isinstance(plain, np.ndarray) or libraries.on_device(plain)):
        raise TypeError(
            f"{name} has chunks of {type(plain).__module__}.{type(plain).__qualname__}: "
            "they must be arrays of NumPy or CuPy"
        )
    return libraries.library(plain).zeros((0,) * plain.ndim, plain.dtype)


def _check_shapes(operands: dict[str, Any]) -> None:
    shape = operands["x"].shape
    for name, value in operands.items():
        if name == "gy" and value.shape != shape:
            raise ValueError(f"gy has shape {value.shape}, but x has shape {shape}")
        arrays.check_broadcasts(name, value, shape)


# ---------------------------------------------------------------- chunks


def _applied(*values: Array, names: tuple[str, ...], called: str, options: Any) -> Array:
    """A public function on a chunk of each operand."""
    return FUNCTIONS[called](**dict(zip(names, values, strict=True)), **options)


def _chunk_by_chunk(
    function: Callable[..., Array], operands: dict[str, Any], meta: Array, **options: Any
) -> Any:
    """A function on the chunks of x and what broadcasts to it: a lazy array in x's chunks."""
    x = operands["x"]
    of_chunk = functools.partial(function, names=tuple(operands), **options)
    return _blockwise(of_chunk, x, list(operands.values()), meta)


def _blockwise(
    function: Callable[..., Array], x: Any, operands: Sequence[Any], meta: Array, **changes: Any
) -> Any:
    """`dask.array.blockwise` over the axes of x, to which the operands broadcast."""
    axes = tuple(range(x.ndim))
    pairs = []
    for value in operands:
        pairs += [_in_chunks_of(x, value), axes[x.ndim - value.ndim :]]
    out = (*axes, *changes.get("new_axes", ()))
    return dask.array.blockwise(function, out, *pairs, dtype=meta.dtype, meta=meta, **changes)


def _in_chunks_of(x: Any, value: Any) -> Any:
    """An array that broadcasts to x as a Dask array in x's chunks."""
    offset = x.ndim - value.ndim
    chunks = tuple(
        x.chunks[offset + axis] if length == x.shape[offset + axis] else (length,)
        for axis, length in enumerate(value.shape)
    )
    if LIBRARY_OF[type(value)] is DASK:
        return value if value.chunks == chunks else value.rechunk(chunks)
    return dask.array.from_array(value, chunks=chunks, asarray=not libraries.on_device(value))


def _cut_axes(x: Any, rows: Rows) -> dict[int, int]:
    """The axes along which rows lie in several chunks, and in what chunks they would lie in one.

    The number is the length of chunks for `rechunk`: -1 for one chunk along that axis.
    """
    if rows.group_size is not None:
        last, size = x.ndim - 1, rows.group_size
        ends = np.cumsum(x.chunks[last])
        whole = all(end % size == 0 or end == x.shape[last] for end in ends)
        return {} if whole else {last: max(size, max(x.chunks[last]) // size * size)}
    inner = rows.order[len(rows.scale_shape) :]
    return {axis: -1 for axis in inner if sum(length > 0 for length in x.chunks[axis]) > 1}


def _check_whole(x: Any, rows: Rows, why: str) -> None:
    cut = _cut_axes(x, rows)
    if cut:
        raise ValueError(
            f"{why}, but chunks of {x.chunksize} cut the rows of x: pass x.rechunk({cut})"
        )


# ---------------------------------------------------------------- multibit


def _multibit(
    operands: dict[str, Any],
    rows: Rows,
    meta: Array,
    bits: Any = None,
    channel_axis: Any = None,
    group_size: int | None = None,
    solver: str = "greedy",
    iterations: int | None = 2,
    **_: Any,
) -> Any:
    x, rule = operands["x"], solver_of(solver, iterations)
    levels = rule.most_bits
    number = operands.get("bits", bits)
    if LIBRARY_OF[type(number)] is not DASK:
        _, levels = as_entries(number, x.shape, meta, **rule.limit, look=True)
    importance = operands.get("importance")
    if isinstance(importance, np.ndarray):
        arrays.as_importance(importance, np.broadcast_to(np.zeros((), importance.dtype), x.shape))
    layout = {"channel_axis": rows.channel_axis, "group_size": rows.group_size}
    cut = _cut_axes(x, rows) if x.size else {}
    if cut and solver != "greedy":
        _check_whole(x, rows, f"the solver {solver} looks at whole rows")
    if len(rows.sections) > 1:
        parts = []
        for section in rows.sections:
            own = {name: section.of(value) for name, value in operands.items()}
            parts.append(
                _multibit(own, section.rows, meta, bits, solver=solver, iterations=iterations)
            )
        return dask.array.concatenate(parts, axis=-1).rechunk(x.chunks)
    if cut and rows.group_size is None:
        return _scattered(operands, bits, levels, rows, meta)
    if cut:
        operands = {**operands, "x": x.rechunk({x.ndim - 1: _at_groups(x, rows.group_size)})}
    if rule.name != "greedy" and x.size:
        # The levels of the whole map choose between forms that give different bits.
        lazy = LIBRARY_OF[type(number)] is DASK
        operands = {**operands, "levels": number.max() if lazy else np.array(levels)}
    result = _chunk_by_chunk(
        _approximated, operands, meta, number=bits, layout=layout, solver=rule, whole=x.size
    )
    return result.rechunk(x.chunks) if cut else result


def _at_groups(x: Any, group_size: int | None) -> tuple[int, ...]:
    """The chunks of the last axis of x, moved to where groups end."""
    size, length = group_size or 1, x.shape[-1]
    ends = {int(end) // size * size for end in np.cumsum(x.chunks[-1])} | {0, length}
    return tuple(np.diff(sorted(ends)).tolist())


def _approximated(
    *values: Array,
    names: tuple[str, ...],
    number: Any,
    layout: dict[str, Any],
    solver: Solver,
    whole: int,
) -> Array:
    """`multibit` of a chunk of whole rows, in the form that the whole array takes."""
    of_chunk = dict(zip(names, values, strict=True))
    x = arrays.as_floats("x", of_chunk["x"])
    with libraries.current_device(x):
        look = solver.name != "greedy"
        bits = as_bits(of_chunk.get("bits", number), x, **solver.limit, look=look)
        if "levels" in of_chunk:
            bits = bits._replace(levels=min(int(of_chunk["levels"]), solver.most_bits))
        importance = of_chunk.get("importance")
        weights = None if importance is None else arrays.as_importance(importance, x)
        rows = dataclasses.replace(rows_of(x.shape, **layout), whole=whole)
        y = libraries.result_like(x, x.dtype)
        solvers.approximate(x, bits, rows.as_stored(x), y, solver, weights)
    return y


# ---------------------------------------------------------------- greedy across chunks


def _scattered(operands: dict[str, Any], number: Any, levels: int, rows: Rows, meta: Array) -> Any:
    """Greedy where rows lie in several chunks: for each level a sum over all chunks of a row.

    Scales and sums have the rank of x, and the length 1 along the axes within a row, so that they
    broadcast to it. The sums have one more axis, for the entries of a row.
    """
    x = operands["x"]
    first = list(operands.values())  # x, and the map if there is one
    inner = rows.order[len(rows.scale_shape) :]
    one_each = dict.fromkeys(inner, 1)
    work = floats.work_dtype(x.dtype)
    of_chunk = {"number": number, "channel_axis": rows.channel_axis, "mapped": len(first) > 1}
    maxima = _blockwise(
        functools.partial(_largest, **of_chunk), x, first, _host(x.ndim, np.float64),
        adjust_chunks=one_each,
    )  # fmt: skip
    top = maxima.max(axis=inner, keepdims=True)
    scales: list[Any] = []
    for _ in range(levels):
        sums = _blockwise(
            functools.partial(_sums, length=rows.length, **of_chunk), x, [*first, top, *scales],
            _host(x.ndim + 1, np.int64),
            adjust_chunks=one_each, new_axes={x.ndim: scattered.COLUMNS},
        )  # fmt: skip
        axes = tuple(range(x.ndim))
        scales.append(
            dask.array.blockwise(
                functools.partial(_means, length=rows.length, dtype=x.dtype), axes,
                sums.sum(axis=inner, keepdims=True), (*axes, x.ndim), top, axes,
                dtype=work, meta=_host(x.ndim, work), concatenate=True,
            )
        )  # fmt: skip
    return _blockwise(functools.partial(_with_scales, **of_chunk), x, [*first, *scales], meta)


def _host(ndim: int, dtype: Any) -> np.ndarray:
    return np.zeros((0,) * ndim, dtype)


def _opened(
    values: Sequence[Array], number: Any, channel_axis: Any, mapped: bool, host: bool
) -> tuple[Array, Bits, Rows, list[Array]]:
    """A chunk of x, its bits and rows, and what is left of the values, each as (rows, 1)."""
    x, *rest = values
    x = libraries.to_host(x) if host else x
    number = rest.pop(0) if mapped else number
    if host and libraries.on_device(number):
        number = libraries.to_host(number)
    x = arrays.as_floats("x", x)
    rows = rows_of(x.shape, channel_axis)
    per_row = [rows.view(value).reshape(rows.count, 1) for value in rest]
    return x, as_bits(number, x), rows, per_row


def _largest(*values: Array, **of_chunk: Any) -> np.ndarray:
    x, bits, rows, _ = _opened(values, host=True, **of_chunk)
    return rows.aligned(scattered.largest(x, bits, rows))


def _sums(*values: Array, length: int, **of_chunk: Any) -> np.ndarray:
    x, bits, rows, (top, *scales) = _opened(values, host=True, **of_chunk)
    sums = scattered.integer_sums(x, bits, rows, scales, top, length)
    return np.stack([rows.aligned(column) for column in sums.T], axis=-1)


def _means(sums: np.ndarray, top: np.ndarray, *, length: int, dtype: Any) -> np.ndarray:
    flat = sums.reshape(-1, scattered.COLUMNS)
    return scattered.means(flat, top.reshape(-1, 1), length, dtype).reshape(top.shape)


def _with_scales(*values: Array, **of_chunk: Any) -> Array:
    """The approximation of a chunk by the scales of its rows."""
    on_device = libraries.on_device(values[0])
    with libraries.current_device(values[0]):
        if on_device:
            xp = libraries.library(values[0])
            values = tuple(map(xp.asarray, values))
        x, bits, rows, scales = _opened(values, host=False, **of_chunk)
        y = libraries.result_like(x, x.dtype)
        passes.elements_of_rows(greedy.approximation, rows, (x, bits.values), scales, out=y)
    return y
