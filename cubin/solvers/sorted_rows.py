"""SortedRows: the sorted magnitudes of rows, with running sums.

The levels of a binary code are symmetric about zero, so that a solver needs the magnitudes |x|
alone. Once they are sorted, the elements of a cell are neighbours: bisection finds where they start
and stop, and their number and sum are differences of running sums. So an iteration of a solver
costs some lookups per threshold and row, which hardly depend on the length of the row.

`mass` stands for sums of weights, which are 1 without importance, and `first` for sums of weighted
magnitudes: the zeroth and first moments.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cubin.core import conversions, floats, libraries
from cubin.core.floats import as_integers
from cubin.core.libraries import Array

CHUNK = 1 << 17
"""Running sums that `below_each` gives at a time."""


class SortedRows:
    """The magnitudes of rows, sorted by the number of bits and then by size.

    Parameters
    ----------
    x : array, shape (rows, n)
        With at least one element in a row.
    bits : uint8 scalar or array of shape (rows, n)
    levels : int
        The largest number of bits.
    importance : array of shape (rows, n), optional
        The weights of the squared errors. A row whose weights are all 0 counts as unweighted.

    Attributes
    ----------
    unit : array, shape (rows, 1)
        The power of two that x is divided by, so that no square can overflow or vanish. Its dtype
        is that of the magnitudes: the work dtype on the host, float64 on a device, since CuPy's
        functions take small float32 numbers for 0.
    work : dtype
        The work dtype of x.
    valid : array of bool, shape (rows,)
        False for rows with NaN or infinity, which count as zeros here.
    mapped : bool
        Whether there is a bit map.
    depths : tuple of int
        The numbers of bits, from 1, that elements may have.
    """

    def __init__(self, x: Array, bits: Any, levels: int, importance: Array | None) -> None:
        xp = self.xp = libraries.library(x)
        self.count, self.length = x.shape
        mapped = self.mapped = np.ndim(bits) > 0
        self.depths = tuple(range(1, levels + 1)) if mapped else (levels,)
        self.work = floats.work_dtype(x.dtype)
        dtype = np.float64 if libraries.on_device(x) else self.work
        magnitude = xp.abs(conversions.computable(x), out=xp.empty(x.shape, dtype))
        if mapped:
            magnitude = xp.where(bits > 0, magnitude, 0)
        self.unit, self.valid = power_of_two(xp, magnitude)
        magnitude /= self.unit
        magnitude[~self.valid] = 0
        weight = None if importance is None else relative_weights(xp, importance, bits)
        if mapped or weight is not None:
            # The sums of weights depend on the order of equal magnitudes. Only a stable sort has
            # the same one on every processor.
            kind: Any = None if weight is None else "stable"
            order = xp.argsort(magnitude, axis=1, kind=kind)
            if mapped:
                by_bits = xp.argsort(xp.take_along_axis(bits, order, 1), axis=1, kind="stable")
                order = xp.take_along_axis(order, by_bits, 1)
            magnitude = xp.take_along_axis(magnitude, order, 1)
            weight = None if weight is None else xp.take_along_axis(weight, order, 1)
        elif xp is np:
            magnitude.sort(axis=1)  # in place: a sorted copy would double the memory
        else:
            magnitude = xp.sort(magnitude, axis=1)
        self._starts = _starts(xp, bits, self.depths, x.shape)
        self._values = magnitude.ravel()
        self._mass = None if weight is None else _running_sums(xp, weight)
        self._first = _running_sums(xp, magnitude if weight is None else magnitude * weight)

    def totals(self, depth: int) -> tuple[Array, Array]:
        """The sums of the weights and weighted magnitudes of all elements with so many bits."""
        rows = self.xp.arange(self.count)
        mass, first = self.sums(rows, depth, self.xp.zeros((0, self.count)))
        return mass[0], first[0]

    def below_each(self, depth: int) -> Iterator[tuple[Array, Array]]:
        """Sums below each position, over the elements with this number of bits.

        Every step gives the sums of weights and of weighted magnitudes, (rows, columns) at a time.
        """
        xp, columns = self.xp, self.length + 1
        start = self._starts[depth - self.depths[0]]
        at = xp.arange(self.count) * columns + start
        totals = [total[:, None] for total in self.totals(depth)]
        first = self._first.reshape(self.count, columns)
        step = max(1, CHUNK // self.count)
        for begin in range(0, columns, step):
            cut = slice(begin, begin + step)
            below = first[:, cut] - xp.take(self._first, at)[:, None]
            if self._mass is None:
                position = xp.arange(begin, min(begin + step, columns), dtype=np.float64)
                number = position - start[:, None]
            else:
                mass = self._mass.reshape(self.count, columns)
                number = mass[:, cut] - xp.take(self._mass, at)[:, None]
            # Columns before the first of these elements get 0, those after the last the total.
            sums = zip((number, below), totals, strict=True)
            number, below = (xp.minimum(xp.maximum(part, 0), total) for part, total in sums)
            yield number, below

    def sums(self, rows: Array, depth: int, thresholds: Array) -> tuple[Array, Array]:
        """The sums of weights and of weighted magnitudes in each cell of some rows.

        Parameters
        ----------
        rows : array of int, shape (q,)
        depth : int
            Only elements with this number of bits count.
        thresholds : array, shape (cells - 1, q)
            Ascending. A magnitude equal to a threshold lies in the cell below it.

        Returns
        -------
        mass, first : array of float64, shape (cells, q)
        """
        xp = self.xp
        number = depth - self.depths[0]
        start, stop = self._starts[number][rows], self._starts[number + 1][rows]
        inner = self._positions(rows, start, stop, thresholds)
        edges = xp.concatenate([start[None], inner, stop[None]])
        lookup = edges + rows * (self.length + 1)
        first = xp.diff(xp.take(self._first, lookup), axis=0)
        mass = xp.diff(edges if self._mass is None else xp.take(self._mass, lookup), axis=0)
        return mass.astype(np.float64, copy=False), first

    def _positions(self, rows: Array, start: Array, stop: Array, thresholds: Array) -> Array:
        """How many elements of a row come before the first one above each threshold: bisection."""
        xp = self.xp
        base = rows * self.length - 1
        # The last element that is known not to be above its threshold, and the last element.
        below, last = xp.zeros(thresholds.shape, np.int64) + (base + start), base + stop
        step = 1 << (self.length.bit_length() - 1)
        while step:
            probe = xp.minimum(below + step, last)
            below = xp.where(xp.take(self._values, probe) <= thresholds, probe, below)
            step >>= 1
        return below - base


def power_of_two(xp: Any, magnitude: Array) -> tuple[Array, Array]:
    """A power of two near the maximum of each row, and whether that maximum is finite.

    Where it is not, the power is 1.
    """
    top = magnitude.max(axis=1, keepdims=True)
    valid = xp.isfinite(top)
    limits = np.finfo(top.dtype)
    # The exponent bits alone are a power of two, or 0 where the number is subnormal.
    exponent_alone = as_integers(top) & as_integers(np.array(np.inf, top.dtype))[()]
    power = xp.maximum(exponent_alone.view(top.dtype), limits.tiny)
    return xp.where(valid, power, 1), valid[:, 0]


def relative_weights(xp: Any, importance: Array, bits: Any) -> Array:
    """The importance in float64, divided by a power of two so that all weights are below 2.

    It is 0 for elements without bits, and 1 throughout a row of zeros.
    """
    weight = conversions.widened(importance)
    if np.ndim(bits):
        weight[bits == 0] = 0
    weight /= power_of_two(xp, weight)[0]
    weight[~weight.any(axis=1)] = 1
    return weight


def _running_sums(xp: Any, values: Array) -> Array:
    """The sums of the first 0, 1, 2, ... values of each row, all rows in one flat array."""
    sums = xp.zeros((len(values), values.shape[1] + 1), np.float64)
    if xp is np:
        sums[:, 1:] = values  # converts ten times as fast as cumsum does itself
        np.cumsum(sums, axis=1, out=sums)
    else:
        sums[:, 1:] = xp.cumsum(values, axis=1, dtype=np.float64)
    return sums.ravel()


def _starts(xp: Any, bits: Any, depths: tuple[int, ...], shape: tuple[int, int]) -> list[Array]:
    """Where the elements with each number of bits start in a row, and where the last ones stop."""
    rows, length = shape
    if not np.ndim(bits):
        return [xp.full(rows, at, np.int64) for at in (0, length)]
    starts = [(bits < depth).sum(axis=1, dtype=np.int64) for depth in depths]
    return [*starts, xp.full(rows, length, np.int64)]
