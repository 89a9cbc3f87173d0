"""Approximate arrays at several bit widths and measure the errors."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np

from cubin.analysis.measure import (
    Axis,
    BitMap,
    Entry,
    Quantizer,
    Sweep,
    UnfitError,
    entry_of,
)
from cubin.analysis.table import ErrorTable
from cubin.analysis.tasks import Outcome, outcomes
from cubin.binarize import multibit
from cubin.core import arrays as checked
from cubin.core.bits import MAX_BITS
from cubin.core.libraries import Array
from cubin.core.rows import rows_of
from cubin.weights import Weights

with warnings.catch_warnings():
    # Without ipywidgets a notebook has no bar, which is no reason for a warning.
    warnings.simplefilter("ignore")
    from tqdm.auto import tqdm


def error_per_bit_width(
    arrays: Mapping[Any, Any] | Iterable[Any] | Array,
    bits: int | BitMap | Iterable[int | BitMap] | Mapping[str, int | BitMap] = range(1, 9),
    solvers: str | Quantizer | Iterable[str | Quantizer] | Mapping[str, str | Quantizer] = (
        "greedy",
    ),
    *,
    channel_axis: Axis | str = "auto",
    group_size: int | None = None,
    iterations: int | None = 2,
    importance: Mapping[str, Array] | None = None,
    min_ndim: int = 0,
    executor: Any = None,
) -> ErrorTable:
    """The error of every array at every bit width with every solver.

    What cannot be measured is skipped, and named with the reason in the table's ``skipped``: an
    entry that is no float array (an integer buffer), an empty
    array, one with NaN or infinity or with squares that float64 cannot hold, one that the channel
    axis or the group size does not fit, and one for which a solver gives NaN or infinity.

    Parameters
    ----------
    arrays : mapping, iterable or array
        A mapping of names to arrays such as a ``state_dict``, one array, a list of arrays, or an
        iterable of ``(name, array)`` or ``(name, array, channel_axis)``. A mapping or a list of
        arrays in the place of an array stands for all of them, under names joined by dots. An
        iterable is consumed one array at a time, so that a generator can read weights that do not
        fit in memory together. `cubin.weights.Weights` and its tensors are read one by one, the
        large ones in parts. Arrays are of any shape and library, or what ``numpy.asarray`` takes;
        functions get them in their library. Arrays that share their memory, as tied weights in a
        ``state_dict``, count as often as they are given.
    bits : int, function, iterable of them, or mapping
        The bit widths, 0 to 16. A function makes a bit map: it is called once for each array x, and
        returns bits for `cubin.multibit`. Its name stands in the table's ``bits``. A mapping gives
        other names: ``{"budget 1.4": lambda x: cubin.bitmaps.budget(x, 1.4)}``.
    solvers : str, function, iterable of them, or mapping
        The solvers of `cubin.quantize`, and functions ``(x, bits) -> approximation`` for other
        quantizers, where x is a copy of the array and bits a bit width or a bit map. The name of a
        function stands in the table; a mapping gives other names. What scales and tables a
        function needs is not known: its effective bits are NaN.
    channel_axis : "auto", int, tuple of int or None
        One scale per level for each index of this axis (these axes); None for one per tensor. It
        is not used where an array brings its own. "auto" is 0, or none with groups.
    group_size : int, optional
        One scale per level for every run of this many elements of the last axis, in all arrays; the
        last of them may be shorter.
    iterations : int or None
        As in `cubin.quantize`.
    importance : mapping of str to array, optional
        By name of the array, the importance for the solvers of `cubin.quantize`. Arrays that are
        not in it have none. The errors in the table are not weighted.
    min_ndim : int
        Arrays of fewer axes are skipped. 2 leaves out biases and other vectors, of which every
        element has scales of its own with ``channel_axis=0``: they are exact, at 33 bits or more.

    Returns
    -------
    ErrorTable

    Raises
    ------
    TypeError
        If `arrays` is nothing that gives arrays, or a bit width no integer.
    ValueError
        If a solver is unknown, or does not take the bit width, the iterations or an importance; if
        a bit width is out of range, a name is given to two bit maps or solvers, `channel_axis` and
        `group_size` are both given, an importance does not fit, or a function returns bits or an
        approximation that do not fit.
    TypeError, ValueError
        If all arrays are skipped. The message names the first and says why.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> weights = {"w": np.random.default_rng(0).standard_normal((64, 256))}
    >>> table = cubin.analysis.error_per_bit_width(weights, bits=[1, 2])
    >>> [round(row.relative_mse, 2) for row in table.rows]
    [0.36, 0.13]

    Another quantizer, and a bit map:

    >>> def ternary(x, bits):
    ...     mask = abs(x) > 0.7 * abs(x).mean()
    ...     return np.sign(x) * mask * abs(x[mask]).mean()
    >>> maps = {"budget 1.4": lambda x: cubin.bitmaps.budget(x, 1.4, channel_axis=0)}
    >>> table += cubin.analysis.error_per_bit_width(weights, 2, ternary)
    >>> table += cubin.analysis.error_per_bit_width(weights, maps)
    >>> [(row.solver, row.bits, round(row.relative_mse, 2)) for row in table.rows[2:]]
    [('ternary', 2, 0.19), ('greedy', 'budget 1.4', 0.08)]
    """
    sweep = sweep_of(
        bits,
        solvers,
        channel_axis=channel_axis,
        group_size=group_size,
        iterations=iterations,
        min_ndim=min_ndim,
        weighted=importance is not None,
    )
    importance = _importance(importance, arrays)
    names: set[str] = set()

    def entries() -> Iterator[tuple[int, Entry | Outcome]]:
        for number, (name, array, array_axis) in enumerate(_named(arrays)):
            names.add(name)
            yield number, entry(sweep, number, name, array, array_axis, importance.get(name))

    total = len(arrays) if isinstance(arrays, Sized) and not hasattr(arrays, "shape") else None
    results: list[Outcome] = []
    measured = outcomes(sweep, entries(), executor)
    with (
        contextlib.closing(measured),
        tqdm(total=total, unit="tensor", delay=1, leave=False, disable=None) as bar,
    ):
        for outcome in measured:
            if outcome.failure is not None:
                raise outcome.failure
            bar.set_postfix_str(outcome.name[-40:], refresh=False)
            bar.update()
            results.append(outcome)
    results.sort(key=lambda outcome: outcome.number)
    rows = [row for outcome in results for row in outcome.rows or ()]
    skipped = [(outcome.name, outcome.unfit) for outcome in results if outcome.unfit is not None]
    if skipped and not rows:
        name, reason = skipped[0]
        others = f" (and {len(skipped) - 1} more arrays are skipped)" if len(skipped) > 1 else ""
        raise type(reason)(f"array {name!r}: {reason}{others}") from reason
    if unused := set(importance) - names:
        warnings.warn(f"importance has {sorted(unused)}, but no array has this name", stacklevel=2)
    return ErrorTable(rows, [(name, str(reason)) for name, reason in skipped])


def entry(
    sweep: Sweep, number: int, name: str, array: Any, array_axis: Axis | str, importance: Any = None
) -> Entry | Outcome:
    """What is measured of an array, or the reason why nothing is."""
    try:
        return entry_of(sweep, name, array, array_axis, importance)
    except UnfitError as unfit:
        return Outcome(number, name, unfit=unfit.error)


# ---------------------------------------------------------------- arguments


def sweep_of(
    bits: Any,
    solvers: Any,
    *,
    channel_axis: Axis | str,
    group_size: int | None,
    iterations: int | None,
    min_ndim: int = 0,
    weighted: bool = False,
) -> Sweep:
    """Check what is measured: see `error_per_bit_width`. `weighted` tells of an importance."""
    widths = _by_label("bits", bits, _width)
    quantizers = _by_label("solvers", solvers, str)
    numbers = [width for width in widths.values() if isinstance(width, int)]
    for solver in quantizers.values():
        if not callable(solver):
            # What a solver refuses for one element, it refuses for all arrays.
            multibit(np.zeros(1), max(numbers, default=0), solver=solver, iterations=iterations,
                     importance=np.ones(1) if weighted else None)  # fmt: skip
    _check_granularity(channel_axis, group_size)
    least = checked.as_integer("min_ndim", min_ndim)
    return Sweep(widths, quantizers, channel_axis, group_size, iterations, least)


def _by_label(argument: str, entries: Any, check: Callable[[Any], Any]) -> dict[Any, Any]:
    """The entries of an argument by their labels in the table. Entries that are no functions are
    checked."""
    if isinstance(entries, Mapping):
        return {
            str(label): entry if callable(entry) else check(entry)
            for label, entry in entries.items()
        }
    single = isinstance(entries, str) or callable(entries) or not isinstance(entries, Iterable)
    labelled: dict[Any, Any] = {}
    for value in [entries] if single else entries:
        entry = value if callable(value) else check(value)
        label = _name_of(entry) if callable(entry) else entry
        if label in labelled:
            raise ValueError(
                f"{argument} has {label!r} twice: a mapping of labels to functions tells them apart"
                if callable(entry)
                else f"{argument} has {label!r} twice"
            )
        labelled[label] = entry
    return labelled


def _name_of(function: Callable[..., Any]) -> str:
    if isinstance(function, functools.partial):
        values = [*map(repr, function.args)]
        values += [f"{name}={value!r}" for name, value in function.keywords.items()]
        return f"{_name_of(function.func)}({', '.join(values)})"
    return getattr(function, "__name__", type(function).__name__)


def _width(value: object) -> int:
    width = checked.as_integer("bits", value)
    if not 0 <= width <= MAX_BITS:
        raise ValueError(f"bits must lie in 0 .. {MAX_BITS}, got {width}")
    return width


def _check_granularity(channel_axis: Axis | str, group_size: int | None) -> None:
    axis = None if isinstance(channel_axis, str) else channel_axis
    if isinstance(channel_axis, str) and channel_axis != "auto":
        raise ValueError(
            "channel_axis must be 'auto', an integer, a tuple of them or None, "
            f"got {channel_axis!r}"
        )
    for number in axis if isinstance(axis, (tuple, list)) else [0 if axis is None else axis]:
        checked.as_integer("channel_axis", number)
    if group_size is not None:
        rows_of((0,), axis, group_size)


def _importance(importance: Any, arrays: Any) -> Mapping[str, Any]:
    if importance is None:
        return {}
    if not isinstance(importance, Mapping):
        raise TypeError(f"importance must map names to arrays, got {type(importance).__qualname__}")
    if isinstance(arrays, Mapping):
        names = {name for name, _, _ in _named(arrays)}
        for name in importance:
            if name not in names:
                raise ValueError(f"importance has an array for {name!r}, which is not in arrays")
    return importance


def _named(arrays: Any) -> Iterator[tuple[str, Any, Axis | str]]:
    """The arrays with their names and the axes that they bring, else "auto"."""
    if isinstance(arrays, Weights):
        for tensor in arrays.tensors:
            yield tensor.name, tensor, tensor.channel_axis
    elif isinstance(arrays, Mapping):
        for name, array in _leaves("", arrays):
            yield name, array, "auto"
    elif hasattr(arrays, "shape"):
        yield "x", arrays, "auto"
    elif hasattr(arrays, "state_dict"):
        raise TypeError(
            f"arrays is a {type(arrays).__qualname__}: pass its state_dict() or named_parameters()"
        )
    elif isinstance(arrays, (str, bytes)) or not isinstance(arrays, Iterable):
        is_path = isinstance(arrays, (str, os.PathLike))
        raise TypeError(
            "arrays must be a mapping of names to arrays, an array or an iterable of arrays, "
            f"got {type(arrays).__qualname__}"
            + (f": pass cubin.weights.Weights({os.fspath(arrays)!r})" if is_path else "")
        )
    else:
        for number, entry in enumerate(arrays):
            name, value, axis = _entry(number, entry)
            for path, array in _leaves(name, value):
                yield path, array, axis


def _entry(number: int, entry: Any) -> tuple[str, Any, Axis | str]:
    if not isinstance(entry, tuple):
        return str(number), entry, "auto"
    if len(entry) not in (2, 3) or hasattr(entry[0], "shape"):
        got = f"that begins with a {type(entry[0]).__qualname__}" if entry else ""
        raise ValueError(
            "arrays must yield (name, array) or (name, array, channel_axis), "
            f"got a tuple of {len(entry)} {got}".rstrip()
        )
    name, value, axis = entry if len(entry) == 3 else (*entry, "auto")
    return str(name), value, axis


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The arrays in mappings and in lists of arrays, under names joined by dots."""
    if isinstance(value, Mapping):
        parts: Any = value.items()
    elif isinstance(value, (list, tuple)) and any(getattr(part, "ndim", 0) for part in value):
        parts = enumerate(value)
    else:
        yield name, value
        return
    for key, part in parts:
        yield from _leaves(f"{name}.{key}" if name else str(key), part)
