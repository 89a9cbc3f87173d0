"""Bits per row over a whole model: one number for each row, under a budget for all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from cubin.bitmaps import parts, patterns
from cubin.bitmaps.budgets import hull
from cubin.core import arrays as checked
from cubin.core import floats, libraries, progress
from cubin.core.libraries import Array
from cubin.core.rows import Rows, rows_of


def allocate(
    arrays: Mapping[str, Array],
    mean_bits: float,
    *,
    channel_axis: int | tuple[int, ...] | None = 0,
    min_bits: int = 1,
    max_bits: int = 8,
    importance: Mapping[str, Any] | None = None,
) -> dict[str, Array]:
    """Numbers of bits for the rows of a model's arrays, a small error under a common budget.

    Every row r, of n_r elements, has an error over its number of bits m,

    .. math:: E_r(m) = w_r \\sum_{j \\in r} (x_j - y_j(m))^2,

    with y(m) its greedy multibit approximation. From `min_bits` on, bits are spent one row at a
    time where :math:`(E_r(m) - E_r(m + 1)) / n_r`, on the convex hull of :math:`E_r`, is largest,
    as long as the budget of all elements lasts. What is left of it is less than the next row.

    The order in which rows are served does not depend on the budget: as it grows no row loses
    bits. At every budget the error is at most that of the uniform map that it pays for, a whole
    number of bits for all. Where rows so large that they hardly fit a budget would break this,
    the order is made to pass through that uniform map.

    A map with an entry per row tells the decoder next to nothing about an element and costs next
    to nothing: its entropy is divided by the row's length. Its gain is real at the effective
    bits, too, which ``cubin.quantize(x, bits, channel_axis=...).effective_bits`` reports.

    Parameters
    ----------
    arrays : mapping of str to array of float16, bfloat16, float32 or float64
        Arrays of any library, finite.
    mean_bits : float
        The budget: bits per element over all arrays, `min_bits` to `max_bits`.
    channel_axis : int, tuple of int or None
        The axis (axes) whose every index is a row; None makes each array one row.
    min_bits, max_bits : int
        The least and most bits of a row, 0 to 16.
    importance : mapping of str to float or array, optional
        The weight w_r of the squared errors, by name of the array: a scalar, an array with one
        entry per row (the shape of the scales), or one that broadcasts to the map. Arrays that are
        not in it have weight 1. Host values, non-negative and finite.

    Returns
    -------
    dict of str to array of int8
        For each array a map with as many axes, of length 1 where it is not a channel axis: it
        broadcasts against the array, and is in its library. Give it to `cubin.quantize` with the
        same `channel_axis`.

    Raises
    ------
    TypeError
        If `arrays` or `importance` is no mapping, an array or weight is not floating point, or a
        number of bits no number.
    ValueError
        If the bits are out of range or order, an axis does not fit an array, an array has NaN or
        infinity, or a weight is negative, not finite, of no fitting shape or for no array. The
        message names the array.

    References
    ----------
    .. [1] Y. Shoham, A. Gersho, "Efficient bit allocation for an arbitrary set of quantizers",
       IEEE Transactions on Acoustics, Speech, and Signal Processing 36, 1988.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> weights = {"w": np.array([[1.0, -2.0, 4.0, 3.0], [0.1, 0.2, -0.2, 0.3]])}
    >>> bits = cubin.bitmaps.allocate(weights, 1.5)
    >>> bits["w"]
    array([[2],
           [1]], dtype=int8)
    >>> cubin.quantize(weights["w"], bits["w"], channel_axis=0).payload_bits
    1.5
    """
    low, high = patterns.as_range(min_bits, max_bits)
    mean = patterns.as_mean(mean_bits, low, high, patterns.BOUNDS)
    if not isinstance(arrays, Mapping):
        raise TypeError(f"arrays must map names to arrays, got {type(arrays).__qualname__}")
    weights = {} if importance is None else importance
    if not isinstance(weights, Mapping):
        raise TypeError(f"importance must map names to weights, got {type(weights).__qualname__}")
    for name in weights:
        if name not in arrays:
            raise ValueError(f"importance has a weight for {name!r}, which is not in arrays")
    curves, sizes, shapes = [], [], {}
    for name, array in progress.over(arrays.items(), "allocate", "tensor"):
        try:
            library, view = libraries.viewed("x", array)
            x = checked.as_floats("x", view)
            rows = rows_of(x.shape, channel_axis)
            weight = _weights(weights.get(name, 1.0), rows)
            with libraries.current_device(x, library):
                curves.append(_curves(x, channel_axis, low, high) * weight.ravel())
        except (TypeError, ValueError) as error:
            raise type(error)(f"array {name!r}: {error}") from error
        sizes.append(np.full(rows.count, rows.length, np.int64))
        shapes[name] = weight.shape
    if not shapes:
        return {}
    model = Model(np.concatenate(curves, axis=1), np.concatenate(sizes), low)
    bits = model.bits(round(mean * int(model.sizes.sum())))
    maps, start = {}, 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        map_of_rows = bits[start:stop].astype(np.int8).reshape(shape)
        library, x = libraries.viewed("x", arrays[name])
        with libraries.current_device(x, library):
            bits_of_rows = libraries.library(x).asarray(map_of_rows)
            maps[name] = libraries.given_back(bits_of_rows, library, arrays[name])
        start = stop
    return maps


def _weights(value: Any, rows: Rows) -> np.ndarray:
    """The weights of the rows, in the shape of the map."""
    weight = np.asarray(value)
    if weight.dtype.kind not in "iu" and not floats.is_float(weight.dtype):
        raise TypeError(f"its importance must be real numbers, got {weight.dtype}")
    if not (np.isfinite(weight).all() and (weight >= 0).all()):
        raise ValueError("its importance must be non-negative and finite")
    if weight.shape == rows.scale_shape:
        weight = rows.aligned(weight)
    shape = rows.aligned(np.empty(rows.scale_shape)).shape
    try:
        return np.broadcast_to(weight, shape).astype(np.float64)
    except ValueError:
        raise ValueError(
            f"its importance has shape {weight.shape}, but its rows have shape {rows.scale_shape}"
        ) from None


def _curves(x: Array, channel_axis: Any, low: int, high: int) -> np.ndarray:
    """The squared errors of the rows with `low` .. `high` bits, (bits, rows)."""
    rows = rows_of(x.shape, channel_axis)
    curves = np.zeros((high - low + 1, rows.count))
    if not x.size:
        return curves
    # Rows that lie in several tiles have several sums.
    sums: dict[int, list[np.ndarray]] = {}
    with libraries.current_device(x):
        scales = parts.row_scales(x, np.uint8(high), high, rows) if high else []

        def add(of_rows: slice, x: Array) -> None:
            errors = _errors(x, [scale[of_rows] for scale in scales], low)
            sums.setdefault(of_rows.start, []).append(errors)

        parts.over_tiles(add, rows, x)
    for first, errors in sums.items():
        of_rows = slice(first, first + errors[0].shape[1])
        # The tiles come in any order; this sum does not depend on it.
        many = len(errors) > 1
        curves[:, of_rows] = [[math.fsum(e)] for e in np.hstack(errors)] if many else errors[0]
    if not np.isfinite(curves).all():
        raise ValueError("it has NaN or infinity, or its squares overflow: clean it first")
    # In the order of the map, which may not number the rows as the channel axes do.
    return np.array([rows.aligned(curve).ravel() for curve in curves])


def _errors(x: Array, scales: list[Array], low: int) -> np.ndarray:
    """The squared errors of rows, (rows, n), with `low` bits and each further one: (bits, rows).

    Levels are added up as `cubin.multibit` does: scales as they are stored, in the work dtype.
    """
    xp, work = libraries.library(x), floats.work_dtype(x.dtype)
    curves = []
    opposite = xp.subtract(0, x, dtype=work)  # never -0.0: its sign is set exactly where x > 0
    y = xp.zeros(x.shape, work)
    for level in range(len(scales) + 1):
        if level >= low:
            off = xp.subtract(x, y.astype(x.dtype, copy=False), dtype=np.float64)
            curves.append(libraries.to_host((off * off).sum(axis=1)))
        if level < len(scales):
            stored = scales[level].astype(x.dtype).astype(work)
            y -= xp.copysign(stored, opposite)
            opposite -= xp.copysign(scales[level], opposite)
    return np.array(curves)


class Model:
    """The rows of all arrays: errors over the number of bits, (bits, rows), and lengths.

    Bits are spent in a fixed order. It passes through the uniform maps of some `stops`; between
    two of them, rows are served by the falls of their hulls.
    """

    def __init__(self, curves: np.ndarray, sizes: np.ndarray, low: int) -> None:
        self.curves = curves
        self.sizes = sizes
        self.low = low
        self.stops = [low, *self._stops(low, low + len(curves) - 1)]

    def bits(self, total: int) -> np.ndarray:
        """The bits of every row under a budget of `total` bits over all elements."""
        size = int(self.sizes.sum())
        above = next(n for n, stop in enumerate(self.stops) if total <= stop * size)
        if above == 0:
            return np.full(len(self.sizes), self.low)
        first, last = self.stops[above - 1 : above + 1]
        return self._spend(total, first, *self._order(first, last))

    def _order(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows in the order in which they take a bit each, and what all so far have cost."""
        falls = hull(list(self.curves[first - self.low : last - self.low + 1]))
        falls /= np.maximum(self.sizes, 1)
        # Row by row, so that equal falls serve the first row first, and rows take bits in turn.
        order = np.argsort(-falls.T.ravel(), kind="stable") // (last - first)
        return order, np.cumsum(self.sizes[order])

    def _spend(self, total: int, first: int, order: np.ndarray, costs: np.ndarray) -> np.ndarray:
        served = np.searchsorted(costs, total - first * int(self.sizes.sum()), side="right")
        return first + np.bincount(order[:served], minlength=len(self.sizes))

    def _error(self, bits: np.ndarray) -> float:
        return math.fsum(self.curves[bits - self.low, np.arange(len(self.sizes))])

    def _stops(self, first: int, last: int) -> list[int]:
        """The stops after `first` up to `last`: where the free order loses to the uniform map."""
        if last <= first:
            return []
        order = self._order(first, last)
        size = int(self.sizes.sum())
        excess = {}
        for width in range(first + 1, last):
            uniform = math.fsum(self.curves[width - self.low])
            error = self._error(self._spend(width * size, first, *order))
            if error > uniform:
                excess[width] = error - uniform
        if not excess:
            return [last]
        worst = max(excess, key=lambda width: excess[width])
        return [*self._stops(first, worst), *self._stops(worst, last)]
