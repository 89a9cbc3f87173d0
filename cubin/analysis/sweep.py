"""Approximate arrays at several bit widths and measure the errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Literal

import numpy as np
from tqdm.auto import tqdm

from cubin import arrays as checked
from cubin import errors
from cubin.analysis.table import ErrorRow, ErrorTable
from cubin.arrays import Array
from cubin.code import effective_bits
from cubin.quantize import SOLVERS, multibit

Axis = int | tuple[int, ...] | None


def error_per_bit_width(
    arrays: Mapping[str, Array] | Iterable[Any] | Array,
    bits: int | Iterable[int] = range(1, 9),
    solvers: Sequence[str] = ("greedy",),
    channel_axis: Axis | Literal["auto"] = "auto",
    *,
    group_size: int | None = None,
) -> ErrorTable:
    """The error of every array at every bit width with every solver.

    Parameters
    ----------
    arrays : mapping, iterable or array
        A mapping of names to arrays, one array, a list of arrays, or an iterable of
        ``(name, array)`` or ``(name, array, channel_axis)``. An iterable is consumed one array at
        a time, so that a generator can read weights that do not fit in memory together. Arrays
        are float16, float32 or float64, NumPy's or CuPy's, of any shape.
    bits : int or iterable of int
        The bit widths, 0 to 16.
    solvers : sequence of str
        The solvers of `cubin.quantize`.
    channel_axis : int, tuple of int, None or "auto"
        One scale per level for each index of this axis (these axes); None for one per tensor;
        "auto" for axis 0 unless groups are given. It is not used where an array brings its own,
        which in turn is not used with groups.
    group_size : int, optional
        One scale per level for every run of this many elements of the last axis.

    Returns
    -------
    ErrorTable

    Raises
    ------
    TypeError
        If an array is not floating point or a bit width no integer.
    ValueError
        If a solver is unknown, a bit width is out of range, `channel_axis` and `group_size` are
        both given, an axis or group size does not fit an array, or an array has NaN or infinity,
        or values whose squares float64 cannot hold. The message names the array.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> weights = {"w": np.random.default_rng(0).standard_normal((64, 256))}
    >>> table = cubin.analysis.error_per_bit_width(weights, bits=[1, 2])
    >>> [round(row.relative_mse, 2) for row in table.rows]
    [0.36, 0.13]
    """
    given = bits if isinstance(bits, Iterable) else [bits]
    widths = [checked.as_integer("bits", width) for width in given]
    for width in widths:
        if not 0 <= width <= checked.MAX_BITS:
            raise ValueError(f"bits must lie in 0 .. {checked.MAX_BITS}, got {width}")
    solvers = [solvers] if isinstance(solvers, str) else list(solvers)
    for solver in solvers:
        if solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if group_size is not None and channel_axis not in ("auto", None):
        raise ValueError(
            f"channel_axis={channel_axis} and group_size={group_size} exclude each other: "
            "give one of them"
        )
    axis = 0 if channel_axis == "auto" else channel_axis
    total = len(arrays) if isinstance(arrays, Sized) else None
    bar = tqdm(_named(arrays, axis), total=total, unit="tensor", delay=1, leave=False, disable=None)
    rows: list[ErrorRow] = []
    for name, array, own_axis in bar:
        bar.set_postfix_str(name[-40:], refresh=False)
        try:
            rows += _errors_of(name, array, widths, solvers, own_axis, group_size)
        except (TypeError, ValueError) as error:
            raise type(error)(f"array {name!r}: {error}") from error
    return ErrorTable(rows)


def _named(arrays: Any, axis: Axis) -> Iterator[tuple[str, Array, Axis]]:
    if isinstance(arrays, Mapping):
        arrays = arrays.items()
    elif hasattr(arrays, "shape"):
        arrays = [("x", arrays)]
    for number, entry in enumerate(arrays):
        if not isinstance(entry, tuple):
            yield str(number), entry, axis
        elif len(entry) == 3:
            yield str(entry[0]), entry[1], entry[2]
        elif len(entry) == 2:
            yield str(entry[0]), entry[1], axis
        else:
            raise ValueError(
                "arrays must yield (name, array) or (name, array, channel_axis), "
                f"got a tuple of {len(entry)}"
            )


def _errors_of(
    name: str,
    array: Array,
    widths: list[int],
    solvers: Sequence[str],
    axis: Axis,
    group_size: int | None,
) -> Iterator[ErrorRow]:
    x = checked.as_floats("x", array)
    rows = checked.rows_of(x.shape, None if group_size is not None else axis, group_size)
    approx = checked.output(None, x)
    for solver in solvers:
        for width in widths:
            multibit(x, width, channel_axis=None if group_size is not None else axis,
                     group_size=group_size, solver=solver, out=approx)  # fmt: skip
            found = errors.measure(x, approx)
            if not np.isfinite(float(found.power)) or (found.power == 0 and found.worst > 0):
                raise ValueError(
                    "it has NaN or infinity, or the squares of its values overflow or vanish: "
                    "clean it first, e.g. with nan_to_num, or scale it"
                )
            yield ErrorRow.of(
                found,
                name=name,
                shape=x.shape,
                solver=solver,
                bits=width,
                payload_bits=float(width),
                effective_bits=effective_bits(width, rows, x.dtype),
            )
