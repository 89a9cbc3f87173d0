"""SignedSums: all sums that the levels of some rows can have, to find the nearest among them."""

from __future__ import annotations

import numpy as np

from cubin.core import libraries
from cubin.core.libraries import Array


class SignedSums:
    """The sums of scales with every choice of signs, sorted, for each of some rows.

    Parameters
    ----------
    scales : array of float64, shape (levels, rows)
        They may be negative.
    """

    def __init__(self, scales: Array) -> None:
        xp = self._xp = libraries.library(scales)
        levels, self._rows = scales.shape
        codes = xp.arange(1 << levels, dtype=np.uint16)[:, None]
        sums = xp.zeros((1 << levels, self._rows))
        for level in range(levels):
            sums += ((codes >> np.uint16(level) & 1) * 2.0 - 1) * scales[level]
        rank = xp.argsort(sums, axis=0, kind="stable")
        self._sums = xp.take_along_axis(sums, rank, 0)
        self._edges = (self._sums[1:] + self._sums[:-1]) / 2
        self._codes = rank.astype(np.uint16)

    def nearest(self, wanted: Array, rows: Array) -> tuple[Array, Array]:
        """The sums nearest to what is wanted, and their codes: bit i is the sign of level i.

        Between two sums, the smaller one is taken. `rows` are the numbers of the rows, and
        broadcast to the shape of `wanted`.
        """
        xp = self._xp
        position = xp.zeros(wanted.shape, np.int64)
        step = len(self._sums) >> 1
        while step:
            edge = xp.take(self._edges, (position + (step - 1)) * self._rows + rows)
            position += (wanted > edge) * step
            step >>= 1
        entry = position * self._rows + rows
        return xp.take(self._sums, entry), xp.take(self._codes, entry)
