"""Measure an array, whole or in parts, and join what the parts give.

A part is what one task measures: rows of one tensor. Parts are the same however many processes work
on them, and their sums are added in their order: the results are the same to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cubin import errors
from cubin.analysis.table import ErrorRow
from cubin.binarize import multibit
from cubin.codes.cost import effective_bits, payload_bits
from cubin.core import arrays as checked
from cubin.core import libraries
from cubin.core.bits import as_bits
from cubin.core.libraries import Array
from cubin.core.rows import Rows, rows_of
from cubin.errors import Errors
from cubin.weights.tensor import Cut, WeightsError

Axis = int | tuple[int, ...] | None
BitMap = Callable[[Array], Array]
Quantizer = Callable[[Array, Array], Array]

PART = 1 << 26
"""Elements of the largest tensor that is measured in one part: 512 MB in float64."""

Sums = tuple[float, float, float, float, float]
"""The fields of `Errors`."""


class UnfitError(Exception):
    """An array that cannot be measured and is skipped; `error` says why."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class Sweep:
    """What is measured of every array: the arguments of `error_per_bit_width`, checked."""

    widths: Mapping[Any, int | BitMap]
    quantizers: Mapping[str, str | Quantizer]
    channel_axis: Axis | str = "auto"
    group_size: int | None = None
    iterations: int | None = 2
    min_ndim: int = 0

    @property
    def by_rows(self) -> bool:
        """Whether rows can be measured apart: functions may look at the whole array."""
        entries = [*self.widths.values(), *self.quantizers.values()]
        return not any(callable(entry) for entry in entries)

    def granularity(self, array_axis: Axis | str) -> tuple[Axis, str]:
        """The channel axis of an array, and what the table calls its granularity."""
        if self.group_size is not None:
            return None, f"group {self.group_size}"
        brought = not isinstance(array_axis, str)
        axis = array_axis if brought else self.channel_axis
        if isinstance(axis, str):
            axis = 0
        if axis is None or axis == ():
            return None, "tensor"
        if brought:
            return axis, "channel"
        axes = axis if isinstance(axis, (tuple, list)) else [axis]
        return axis, f"ax{'e' if len(axes) > 1 else 'i'}s {', '.join(map(str, axes))}"


@dataclass(frozen=True)
class Entry:
    """An array that is measured, or a tensor of a file, which has `shape` and `load(cut)`."""

    name: str
    source: Any
    channel_axis: Axis
    granularity: str
    importance: Any = None
    library: libraries.Library | None = None
    """In whose arrays functions get it, if that is not NumPy's or CuPy's."""

    def in_library(self, values: Any) -> Any:
        """NumPy's or CuPy's values as functions get them."""
        return libraries.given_back(values, self.library)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape)

    @property
    def is_stored(self) -> bool:
        """Whether it is in a file."""
        return hasattr(self.source, "load")

    def load(self, cut: Cut) -> Array:
        """The array, or a part of it."""
        try:
            x = self.source.load(cut) if self.is_stored else self.source[cut]
            return checked.as_floats("x", x)
        except (TypeError, ValueError, WeightsError) as error:
            raise UnfitError(error) from error


def entry_of(
    sweep: Sweep, name: str, source: Any, array_axis: Axis | str, importance: Any = None
) -> Entry:
    """Check as much of an array as is known before it is read.

    Raises
    ------
    UnfitError
        If it cannot be measured.
    """
    axis, granularity = sweep.granularity(array_axis)
    library, (_, weights) = None, libraries.viewed("importance", importance)
    if not hasattr(source, "load"):
        if getattr(source, "requires_grad", False) is True:
            source = source.detach()
        try:
            library, view = libraries.viewed("x", source)
            source = checked.as_floats("x", view)
        except (TypeError, ValueError) as error:
            raise UnfitError(error) from error
    entry = Entry(name, source, axis, granularity, weights, library)
    if len(entry.shape) < sweep.min_ndim:
        raise UnfitError(ValueError(f"it has fewer axes than min_ndim={sweep.min_ndim}"))
    if not math.prod(entry.shape):
        raise UnfitError(ValueError("it has no elements"))
    layout(entry, sweep)
    return entry


def layout(entry: Entry, sweep: Sweep) -> Rows:
    try:
        return rows_of(entry.shape, entry.channel_axis, sweep.group_size)
    except ValueError as error:
        raise UnfitError(error) from error


def cuts_of(entry: Entry, sweep: Sweep) -> list[Cut]:
    """The parts in which a tensor is measured: runs of whole rows, if it is large."""
    shape, size = entry.shape, math.prod(entry.shape)
    axes = () if entry.channel_axis is None else np.atleast_1d(entry.channel_axis).tolist()
    if sweep.group_size is not None and len(shape) > 1:
        axes = [0]
    if size <= PART or not axes or not sweep.by_rows or entry.importance is not None:
        return [()]
    axis = int(axes[0]) % len(shape)
    step = max(1, PART // (size // shape[axis]))
    lead = (slice(None),) * axis
    return [(*lead, slice(i, i + step)) for i in range(0, shape[axis], step)]


@dataclass(frozen=True)
class Measured:
    """The sums of a part.

    Attributes
    ----------
    power : float
        The sum of squares.
    vanishes : bool
        Whether float64 cannot hold its squares, of which all are 0, but the part is not.
    sums : mapping of (str, label) to Sums
        By solver and label of the bits.
    costs : mapping of label to (float, float)
        Payload and effective bits of the whole array.
    """

    power: float
    vanishes: bool
    sums: Mapping[tuple[str, Any], Sums] = field(repr=False)
    costs: Mapping[Any, tuple[float, float]]


def measure(sweep: Sweep, entry: Entry, cut: Cut) -> Measured:
    """Measure a part of an array.

    Raises
    ------
    UnfitError
        If the array cannot be measured.
    """
    rows = layout(entry, sweep)
    x = entry.load(cut)
    with libraries.current_device(x, entry.library):
        if not sweep.by_rows:
            # Functions see no array that cannot be measured. Solvers take any, and the first errors
            # that are measured tell the same.
            vanishes(x, float(errors.measure(x, x).power), whole=True)
        maps = {
            label: bit_map(bits(entry.in_library(x.copy())), x) if callable(bits) else bits
            for label, bits in sweep.widths.items()
        }
        costs = {
            label: (payload_bits(bits, rows.shape), effective_bits(bits, rows, x.dtype))
            for label, bits in maps.items()
        }
        sums = sums_of(sweep, entry, x, maps)
        power, lost = 0.0, False
        for number, ((solver, label), (error, power, *_)) in enumerate(sums.items()):
            if not number:
                lost = vanishes(x, power, whole=not cut)
            if not math.isfinite(error):
                raise UnfitError(ValueError(f"{solver!r} gives NaN or infinity at {label!r} bits"))
        return Measured(power, lost, sums, costs)


def sums_of(
    sweep: Sweep, entry: Entry, x: Array, maps: Mapping[Any, Any]
) -> dict[tuple[str, Any], Sums]:
    """What is measured of `x` by solver and label of the bits."""
    approx = checked.output(None, x)
    sums = {}
    for solver, quantize in sweep.quantizers.items():
        for label, bits in maps.items():
            if callable(quantize):
                result = f"the result of {solver!r}"
                y = quantize(entry.in_library(x.copy()), entry.in_library(bits))
                y = checked.like(result, libraries.viewed(result, y)[1], x)
            else:
                y = multibit(
                    x,
                    bits,
                    solver=quantize,
                    channel_axis=entry.channel_axis,
                    group_size=sweep.group_size,
                    iterations=sweep.iterations,
                    importance=entry.importance,
                    out=approx,
                )
            measured = errors.measure(x, y)
            sums[solver, label] = (
                float(measured.error),
                float(measured.power),
                float(measured.power_of_approx),
                float(measured.product),
                float(measured.worst),
            )
    return sums


def bit_map(bits: Any, x: Array) -> Any:
    """`bits`, which a function made of `x`, checked to be a bit map for it."""
    _, view = libraries.viewed("bits", bits)
    as_bits(view, x, look=True)
    return view


def vanishes(x: Array, power: float, whole: bool) -> bool:
    """Whether float64 cannot hold the squares of `x`, whose sum is `power`, since they are 0.

    Raises
    ------
    UnfitError
        If the errors of the array cannot be measured. Squares may vanish in a part of it.
    """
    if 0 < power < math.inf:
        return False
    zeros = checked.output(None, x)
    zeros.fill(0)
    largest = float(errors.max_abs_error(x, zeros))
    if not math.isfinite(largest):
        raise UnfitError(ValueError("it has NaN or infinity: clean it, e.g. with nan_to_num"))
    lost = power == 0 and largest > 0
    check_range(power, lost and whole)
    return lost


def check_range(power: float, lost: bool) -> None:
    """Raise where float64 cannot hold the sum of squares of an array."""
    if lost or not math.isfinite(power):
        raise UnfitError(
            ValueError("the squares of its values overflow or vanish in float64: scale it first")
        )


def join(sweep: Sweep, entry: Entry, parts: Sequence[Measured]) -> list[ErrorRow]:
    """The rows of an array whose parts have been measured, given in their order.

    Raises
    ------
    UnfitError
        If the array cannot be measured.
    """
    power = added([part.power for part in parts])
    check_range(power, power == 0 and any(part.vanishes for part in parts))
    rows = []
    for solver, quantize in sweep.quantizers.items():
        for label in sweep.widths:
            of_parts = total([part.sums[solver, label] for part in parts])
            payload, effective = parts[0].costs[label]
            rows.append(
                ErrorRow.of(
                    Errors(*map(np.float64, of_parts)),
                    name=entry.name,
                    shape=entry.shape,
                    solver=solver,
                    bits=label,
                    granularity="" if callable(quantize) else entry.granularity,
                    payload_bits=payload,
                    effective_bits=math.nan if callable(quantize) else effective,
                )
            )
    return rows


def total(parts: Sequence[Sums]) -> Sums:
    """The sums of parts, added from the first to the last, and the largest error."""
    *sums, worst = zip(*parts, strict=True)
    error, power, power_of_approx, product = map(added, sums)
    return error, power, power_of_approx, product, max(worst)


def added(numbers: Sequence[float]) -> float:
    """The sum, from the first to the last."""
    total = 0.0
    for number in numbers:
        total += number
    return total
