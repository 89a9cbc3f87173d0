"""Codebooks: the code of each range of magnitudes, and the scales that fit such codes best.

All magnitudes between two neighbouring thresholds have the same code. Such a range is a cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cubin.core import libraries
from cubin.core.libraries import Array
from cubin.solvers.sorted_rows import SortedRows

DEPENDENT = 2.0**-38
"""A pivot below this share of its diagonal entry is rounding error.

The signs of that level then depend linearly on those of the levels before it."""


@dataclass(frozen=True)
class Codebook:
    """The cells of all elements with the same number of bits, and the code of each cell.

    Attributes
    ----------
    thresholds : array in the work dtype, shape (cells - 1, q)
        Ascending, for each of q rows. A magnitude equal to a threshold lies in the cell below it.
    codes : array of uint16, shape (cells, q)
        Bit i is set where level i adds to the magnitude. A positive element has this code, any
        other element has its complement.
    """

    thresholds: Array
    codes: Array

    def signs(self, level: int) -> Array:
        """The signs at a level: +-1.0, of shape (cells, q)."""
        return (self.codes >> level & 1) * 2.0 - 1.0

    def values(self, scales: Array) -> Array:
        """The sum of scale * sign in each cell, over the first ``len(scales)`` levels."""
        return sum(scale * self.signs(level) for level, scale in enumerate(scales))


def nearest(scales: Array, depth: int, dtype: Any) -> Codebook:
    """The codebook that gives each magnitude the nearest sum of the first `depth` levels.

    `scales`, of shape (levels, q), must not be negative.
    """
    xp = libraries.library(scales)
    # Only sums with + at level 0 are made: the others mirror them. A negative sum is replaced by
    # its mirror image, whose code is the complement.
    sums, codes = scales[:1], xp.ones((1, scales.shape[1]), np.uint16)
    for level in range(1, depth):
        sums = xp.concatenate([sums - scales[level], sums + scales[level]])
        codes = xp.concatenate([codes, codes | np.uint16(1 << level)])
    codes = xp.where(sums < 0, codes ^ np.uint16((1 << depth) - 1), codes)
    sums = abs(sums)
    order = xp.argsort(sums, axis=0, kind="stable")
    sums = xp.take_along_axis(sums, order, 0)
    middle = sums[:-1] / 2 + sums[1:] / 2
    return Codebook(_rounded_down(middle, dtype), xp.take_along_axis(codes, order, 0))


def split(codebook: Codebook, scales: Array, level: int) -> Codebook:
    """A codebook with one level more: each cell is cut where the residual changes its sign.

    The residual is that after the first `level` levels.
    """
    xp = libraries.library(scales)
    edge = codebook.thresholds
    values = _rounded_down(codebook.values(scales[:level]), edge.dtype)
    values[1:] = xp.maximum(values[1:], edge)
    values[:-1] = xp.minimum(values[:-1], edge)
    thresholds = xp.empty((len(values) + len(edge), values.shape[1]), edge.dtype)
    thresholds[::2], thresholds[1::2] = values, edge
    codes = xp.repeat(codebook.codes, 2, axis=0)
    codes[1::2] |= np.uint16(1 << level)
    return Codebook(thresholds, codes)


def whole(q: int, dtype: Any, xp: Any) -> Codebook:
    """The codebook of one level: a single cell, with the sign +."""
    return Codebook(xp.zeros((0, q), dtype), xp.ones((1, q), np.uint16))


def _rounded_down(values: Array, dtype: Any) -> Array:
    """The largest numbers of `dtype` that are not above `values`.

    As thresholds they put every number of `dtype` on the same side as `values` do.
    """
    xp = libraries.library(values)
    rounded = values.astype(dtype)
    return xp.where(
        rounded > values, xp.nextafter(rounded, xp.zeros_like(rounded) - np.inf), rounded
    )


def fitted(
    magnitudes: SortedRows, rows: Array, codebooks: dict[int, Codebook], levels: int
) -> tuple[Array, Array]:
    """The least-squares scales of some codes, and by how much they lower the error.

    The scales may be negative.

    Parameters
    ----------
    magnitudes : SortedRows
    rows : array of int, shape (q,)
    codebooks : dict of int to Codebook
        By the number of bits of the elements.
    levels : int

    Returns
    -------
    scales : array of float64, shape (levels, q)
        0 for a level whose signs depend linearly on those of the levels before it.
    gain : array of float64, shape (q,)
        How much the levels take off the weighted sum of squares of the row.
    """
    xp = magnitudes.xp
    zero = xp.zeros(len(rows))
    gram = [[zero] * (level + 1) for level in range(levels)]
    target = [zero] * levels
    for depth, codebook in codebooks.items():
        mass, first = magnitudes.sums(rows, depth, codebook.thresholds)
        total = mass.sum(axis=0)
        signs = [codebook.signs(level) for level in range(min(depth, levels))]
        for i, sign in enumerate(signs):
            target[i] = target[i] + (sign * first).sum(axis=0)
            weighted = sign * mass
            for j in range(i):
                gram[i][j] = gram[i][j] + (weighted * signs[j]).sum(axis=0)
            gram[i][i] = gram[i][i] + total
    scales = solved(gram, target, xp)
    gain = gained(gram, target, scales, zero)
    return xp.stack(scales) if levels else xp.zeros((0, len(rows))), gain


def gained(gram: list[list[Array]], target: list[Array], scales: list[Array], zero: Array) -> Array:
    """How much scales take off the sum of squares. The system is that of `solved`."""
    gain = zero
    for i, scale in enumerate(scales):
        row = gram[i][i] * scale
        for j in range(i):
            row = row + 2 * gram[i][j] * scales[j]
        gain = gain + scale * (2 * target[i] - row)
    return gain


def solved(gram: list[list[Array]], target: list[Array], xp: Any) -> list[Array]:
    """The solutions of many small symmetric systems, one for each entry of the arrays.

    They are found by elimination in the order of the levels. An unknown becomes 0 where its pivot
    is rounding error (see `DEPENDENT`). `gram` is the lower triangle.
    """
    levels = len(target)
    # The lower triangle of the factor, times the pivots.
    factor: dict[tuple[int, int], Array] = {}
    inverse: list[Array] = []
    solved: list[Array] = []
    for j in range(levels):
        pivot = gram[j][j]
        for p in range(j):
            pivot = pivot - factor[j, p] * factor[j, p] * inverse[p]
        free = pivot > DEPENDENT * gram[j][j]
        inverse.append(xp.where(free, 1 / xp.where(free, pivot, 1), 0))
        right = target[j]
        for p in range(j):
            right = right - factor[j, p] * solved[p]
        solved.append(right * inverse[j])
        for i in range(j + 1, levels):
            entry = gram[i][j]
            for p in range(j):
                entry = entry - factor[i, p] * factor[j, p] * inverse[p]
            factor[i, j] = entry
    for j in reversed(range(levels)):
        for i in range(j + 1, levels):
            solved[j] = solved[j] - factor[i, j] * inverse[j] * solved[i]
    return solved
