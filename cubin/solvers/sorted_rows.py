"""Rows as sorted magnitudes with running sums, from which the sums of any cell follow at once.

The levels of a binary code are symmetric about zero, so a solver need only know the magnitudes
|x|. Once these are sorted, a cell between two thresholds is a run of them, found by bisection, and
its number and sum of elements are differences of running sums. An iteration of a solver thus costs
a few lookups per level and row, whatever the length of the row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cubin.core import conversions, floats, libraries
from cubin.core.floats import as_integers
from cubin.core.libraries import Array

CHUNK = 1 << 17
"""Running sums that are worked on at a time."""


class Magnitudes:
    """The magnitudes of each row, ascending among the elements with the same number of bits.

    Parameters
    ----------
    x : array, shape (rows, n)
        With at least one element in a row.
    bits : uint8 scalar or array of shape (rows, n)
    levels : int
        The largest number of bits.
    importance : array of shape (rows, n), optional
        The weights of the squared errors; a row of which they are all 0 counts as unweighted.

    Attributes
    ----------
    unit : array, shape (rows, 1)
        The power of two that x is divided by, so that no square can overflow or vanish. It has the
        dtype of the magnitudes: the work dtype, but float64 on a device, where CuPy's functions
        lose small float32 numbers.
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
            # Sums of weights depend on the order of equal magnitudes, which processors have their
            # own of where a sort is not stable.
            kind: Any = None if weight is None else "stable"
            order = xp.argsort(magnitude, axis=1, kind=kind)
            if mapped:
                by_bits = xp.argsort(xp.take_along_axis(bits, order, 1), axis=1, kind="stable")
                order = xp.take_along_axis(order, by_bits, 1)
            magnitude = xp.take_along_axis(magnitude, order, 1)
            weight = None if weight is None else xp.take_along_axis(weight, order, 1)
        elif xp is np:
            magnitude.sort(axis=1)  # a copy would take as much memory again
        else:
            magnitude = xp.sort(magnitude, axis=1)
        self._starts = _starts(xp, bits, self.depths, x.shape)
        self._values = magnitude.ravel()
        self._mass = None if weight is None else _running_sums(xp, weight)
        self._first = _running_sums(xp, magnitude if weight is None else magnitude * weight)

    def totals(self, depth: int) -> tuple[Array, Array]:
        """The weight and the weighted magnitudes of all elements with this number of bits."""
        rows = self.xp.arange(self.count)
        mass, first = self.sums(rows, depth, self.xp.zeros((0, self.count)))
        return mass[0], first[0]

    def below_each(self, depth: int) -> Iterator[tuple[Array, Array]]:
        """Running sums over the elements with this number of bits, (rows, columns) at a time."""
        xp, columns = self.xp, self.length + 1
        start = self._starts[depth - self.depths[0]]
        at = xp.arange(self.count) * columns + start
        there = [total[:, None] for total in self.totals(depth)]
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
            # Nothing lies below the first of these elements, and all of them below what follows.
            sums = zip((number, below), there, strict=True)
            number, below = (xp.minimum(xp.maximum(part, 0), every) for part, every in sums)
            yield number, below

    def sums(self, rows: Array, depth: int, thresholds: Array) -> tuple[Array, Array]:
        """The weights, and the weighted magnitudes, added up over the cells of some rows.

        Parameters
        ----------
        rows : array of int, shape (q,)
        depth : int
            Only elements with this number of bits count.
        thresholds : array, shape (cells - 1, q)
            Ascending; a magnitude equal to a threshold lies in the cell below it.

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
        """How many elements of a row precede the first one above each threshold, by bisection."""
        xp = self.xp
        base = rows * self.length - 1
        # The last element that is known not to lie above, and the last there is.
        found, last = xp.zeros(thresholds.shape, np.int64) + (base + start), base + stop
        step = 1 << (self.length.bit_length() - 1)
        while step:
            probe = xp.minimum(found + step, last)
            found = xp.where(xp.take(self._values, probe) <= thresholds, probe, found)
            step >>= 1
        return found - base


def power_of_two(xp: Any, magnitude: Array) -> tuple[Array, Array]:
    """A power of two near each row's maximum, 1 where that is not finite; and where it is."""
    top = magnitude.max(axis=1, keepdims=True)
    valid = xp.isfinite(top)
    limits = np.finfo(top.dtype)
    # Without its mantissa a number is a power of two, or 0 if it is subnormal.
    exponent_alone = as_integers(top) & as_integers(np.array(np.inf, top.dtype))[()]
    power = xp.maximum(exponent_alone.view(top.dtype), limits.tiny)
    return xp.where(valid, power, 1), valid[:, 0]


def relative_weights(xp: Any, importance: Array, bits: Any) -> Array:
    """Weights below 2 in float64: 0 for elements without bits, 1 in a row of zeros."""
    weight = conversions.widened(importance)
    if np.ndim(bits):
        weight[bits == 0] = 0
    weight /= power_of_two(xp, weight)[0]
    weight[~weight.any(axis=1)] = 1
    return weight


def _running_sums(xp: Any, values: Array) -> Array:
    sums = xp.zeros((len(values), values.shape[1] + 1), np.float64)
    if xp is np:
        sums[:, 1:] = values  # which takes a tenth of the time that NumPy's sum takes to convert
        np.cumsum(sums, axis=1, out=sums)
    else:
        sums[:, 1:] = xp.cumsum(values, axis=1, dtype=np.float64)
    return sums.ravel()


def _starts(xp: Any, bits: Any, depths: tuple[int, ...], shape: tuple[int, int]) -> list[Array]:
    """Where the elements with each of these numbers of bits start in a row, and where all end."""
    rows, length = shape
    if not np.ndim(bits):
        return [xp.full(rows, at, np.int64) for at in (0, length)]
    starts = [(bits < depth).sum(axis=1, dtype=np.int64) for depth in depths]
    return [*starts, xp.full(rows, length, np.int64)]
