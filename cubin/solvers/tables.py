"""Tables of the sums that the levels of some lines can have, to look up the nearest to a number."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from cubin.core import libraries
from cubin.core.libraries import Array


class Tables:
    """All sums of a shift and levels, sorted, with their codes: a table for each number of bits.

    Parameters
    ----------
    scales : array of float64, shape (levels, lines)
        Of any sign.
    shift : array of float64, shape (lines,)
    depths : iterable of int
        The numbers of bits that elements have.
    """

    def __init__(self, scales: Array, shift: Array, depths: Iterable[int]) -> None:
        xp = self._xp = libraries.library(scales)
        self._lines = scales.shape[1]
        self._tables: dict[int, tuple[Array, Array, Array]] = {}
        for depth in depths:
            codes = xp.arange(1 << depth, dtype=np.uint16)[:, None]
            sums = xp.zeros((1 << depth, self._lines)) + shift
            for level in range(depth):
                sums += ((codes >> np.uint16(level) & 1) * 2.0 - 1) * scales[level]
            rank = xp.argsort(sums, axis=0, kind="stable")
            sums = xp.take_along_axis(sums, rank, 0)
            self._tables[depth] = (sums[1:] + sums[:-1]) / 2, sums, rank.astype(np.uint16)

    def nearest(self, wanted: Array, depths: Any, lines: Array) -> tuple[Array, Array]:
        """The nearest sum to what each element should be, and its code.

        Parameters
        ----------
        wanted : array of float64
        depths : uint8 scalar or array of the same shape
            The number of bits of each element.
        lines : array of int that broadcasts to the same shape
            The line of each element.
        """
        if len(self._tables) == 1:
            (table,) = self._tables.values()
            return self._bisected(table, wanted, lines)
        xp = self._xp
        value, code = xp.zeros_like(wanted), xp.zeros(wanted.shape, np.uint16)
        for depth, table in self._tables.items():
            here = depths == depth
            near, its_code = self._bisected(table, wanted, lines)
            value, code = xp.where(here, near, value), xp.where(here, its_code, code)
        return value, code

    def _bisected(
        self, table: tuple[Array, Array, Array], wanted: Array, lines: Array
    ) -> tuple[Array, Array]:
        (edges, sums, rank), xp = table, self._xp
        position = xp.zeros(wanted.shape, np.int64)
        step = len(sums) >> 1
        while step:
            edge = xp.take(edges, (position + (step - 1)) * self._lines + lines)
            position += (wanted > edge) * step
            step >>= 1
        entry = position * self._lines + lines
        return xp.take(sums, entry), xp.take(rank, entry)


def in_order(scales: Array, codes: Array, mapped: bool) -> tuple[Array, Array]:
    """Scales that are not negative and, without a map, descend, and the codes that go with them.

    Parameters
    ----------
    scales : array, shape (levels, lines)
    codes : array of uint16, shape (n, lines)
        Bit i is the sign of level i.
    mapped : bool
        Whether there is a bit map. Then the levels keep their order, since elements of few bits
        have the first alone.
    """
    xp = libraries.library(scales)
    levels = len(scales)
    order = xp.arange(levels)[:, None] + xp.zeros(scales.shape, np.int64)
    if not mapped:
        order = xp.argsort(-abs(scales), axis=0, kind="stable")
    values = xp.take_along_axis(scales, order, 0)
    found = xp.zeros(codes.shape, np.uint16)
    for level in range(levels):
        bit = (codes >> order[level].astype(np.uint16) & 1) ^ (values[level] < 0)
        found |= bit.astype(np.uint16) << np.uint16(level)
    return abs(values), found
