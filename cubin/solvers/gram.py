"""Codes of least output error: the squared error of weights in the metric of a Gram matrix.

A line w of a layer's weights that is approximated by q changes the layer's outputs by
``(w - q) H (w - q)^T`` in the mean of squares, H being the Gram matrix of its inputs. Arrays here
have the inputs as their first axis and the lines as their last: what happens to one input in all
lines is then one run of memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cubin.core import libraries
from cubin.core.libraries import Array
from cubin.solvers.codebook import solved
from cubin.solvers.tables import Tables

COLUMNS = 64
"""Inputs whose changes are carried on to all others by one matrix product."""

DAMPING = 0.01
"""What is added to H for the Cholesky factor, relative to the mean of its diagonal."""


class Metric:
    """A Gram matrix with what the passes over the inputs need of it.

    Parameters
    ----------
    gram : array of float64, shape (n, n)
        Symmetric and positive semidefinite.

    Attributes
    ----------
    order : array of int, shape (n,)
        The inputs by falling diagonal.
    gram : array of float64, shape (n, n)
        H in units of the mean of its diagonal, the inputs in that order.
    carry : array of float64, shape (n, n)
        Line i says what the later inputs gain where the i-th lacks 1: minus the upper Cholesky
        factor of the inverse of H, each line over its diagonal entry. H is damped for it, since it
        may be singular.
    diagonal : list of float
        That of `gram`.
    squares : array of float64, shape (n,)
        The same, with the inputs as they were given.
    """

    def __init__(self, gram: Array) -> None:
        xp = libraries.library(gram)
        diagonal = xp.diagonal(gram)
        self.order = xp.argsort(-diagonal, kind="stable")
        unit = float(diagonal.mean()) or 1.0
        self.squares = diagonal / unit
        self.gram = gram[self.order][:, self.order] / unit
        damped = self.gram + DAMPING * xp.eye(len(gram)) if diagonal.any() else xp.eye(len(gram))
        # Of the reversed matrix the Cholesky factor is lower: reversed once more it is an upper
        # factor R of H = R R^T, and the inverse of R is the upper factor of the inverse of H.
        upper = xp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
        inverse = xp.linalg.inv(upper)
        self.carry = -xp.triu(inverse / xp.diagonal(inverse)[:, None], 1)
        self.diagonal = libraries.to_host(xp.diagonal(self.gram)).tolist()


class Lines:
    """Codes and scales of some lines of weights, which are made better step by step.

    Parameters
    ----------
    metric : Metric
    weights : array of float64, shape (n, lines)
        The inputs in the order of the metric, and so everywhere here.
    depths : uint8 scalar or array of shape (n, lines)
        The number of bits of each weight.
    groups : list of array of int
        The inputs that share scales.
    scales : array of float64, shape (groups, levels, lines)
    shift : array of float64, shape (groups, lines), optional
        What all weights of a group begin with. It is fitted together with the scales: a level whose
        signs are all +1. Without it there is none.

    Attributes
    ----------
    shift : array of float64, shape (groups, lines)
    codes : array of uint16, shape (n, lines)
        Bit i is the sign of level i.
    values : array of float64, shape (n, lines)
        The approximation.
    slope : array of float64, shape (n, lines)
        H times the error: minus half the gradient of the output error with respect to the values.
    """

    def __init__(
        self,
        metric: Metric,
        weights: Array,
        depths: Any,
        groups: list[Array],
        scales: Array,
        shift: Array | None = None,
    ) -> None:
        xp = self._xp = libraries.library(weights)
        self._metric, self._groups = metric, groups
        self.weights, self.scales = weights, scales.copy()
        self._shifted = shift is not None
        none = xp.zeros((len(groups), weights.shape[1]))
        self.shift: Array = none if shift is None else shift.copy()
        self._every_line = xp.arange(weights.shape[1])
        self._depths = depths
        every = xp.unique(depths) if np.ndim(depths) else xp.asarray([depths])
        self._every = [int(depth) for depth in every]
        self.group_of = np.empty(len(weights), np.int64)
        for number, group in enumerate(groups):
            self.group_of[libraries.to_host(group)] = number
        self.codes = xp.zeros(weights.shape, np.uint16)
        self.values = xp.zeros_like(weights)
        self.slope = metric.gram @ weights
        self._tabulate()

    def give(self, codes: Array) -> None:
        """Take these codes, with the scales as they are."""
        self.codes = codes.copy()
        for number, group in enumerate(self._groups):
            self.values[group] = self.shift[number]
            for scale, sign in zip(self.scales[number], self._signs(group), strict=True):
                self.values[group] += scale * sign
        self.slope = self._metric.gram @ (self.weights - self.values)

    def _signs(self, group: Array) -> list[Array]:
        """The signs at each level, 0 where a weight has no code."""
        codes = self.codes[group]
        depths = self._depths[group] if np.ndim(self._depths) else self._depths
        return [
            ((codes >> np.uint16(level) & 1) * 2.0 - 1) * (depths > level)
            for level in range(self.scales.shape[1])
        ]

    def errors(self) -> Array:
        """The output error of each line, in units of the metric."""
        return ((self.weights - self.values) * self.slope).sum(axis=0)

    def _tabulate(self) -> None:
        pairs = zip(self.scales, self.shift, strict=True)
        self._tables = [Tables(scales, shift, self._every) for scales, shift in pairs]

    def _nearest(self, column: int, wanted: Array) -> tuple[Array, Array]:
        """The nearest sum to what each line wants at an input, and its code."""
        depths = self._depths[column] if np.ndim(self._depths) else self._depths
        tables = self._tables[self.group_of[column]]
        return tables.nearest(wanted, depths, self._every_line)

    def carry_on(self) -> None:
        """Take codes input by input, and carry the error of each on to the inputs that follow.

        This is GPTQ's order of work, with the sums of the levels in place of a grid [1]_.

        .. [1] E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative
           Pre-trained Transformers", ICLR 2023, arXiv:2210.17323.
        """
        carry = self._metric.carry
        wanted = self.weights.copy()
        for block in self._blocks():
            here, inner = wanted[block], carry[block, block]
            left = self._xp.empty_like(here)
            for i in range(len(here)):
                column = block.start + i
                self.values[column], self.codes[column] = self._nearest(column, here[i])
                left[i] = here[i] - self.values[column]
                here[i + 1 :] += inner[i, i + 1 :, None] * left[i]
            wanted[block.stop :] += carry[block, block.stop :].T @ left
        self.slope = self._metric.gram @ (self.weights - self.values)

    def descend(self) -> None:
        """Take for each input in turn the codes of least error, all else as it is."""
        gram = self._metric.gram
        for block in self._blocks():
            slope, inner = self.slope[block].copy(), gram[block, block]
            change = self._xp.empty_like(slope)
            for i in range(len(slope)):
                column = block.start + i
                weight = self._metric.diagonal[column]
                if not weight > 0:  # an input that is always 0
                    change[i] = 0
                    continue
                before = self.values[column].copy()
                value, code = self._nearest(column, before + slope[i] / weight)
                self.values[column], self.codes[column] = value, code
                change[i] = value - before
                slope[i + 1 :] -= inner[i, i + 1 :, None] * change[i]
            self.slope -= gram[:, block] @ change

    def refit(self) -> None:
        """The scales, and shifts, of least error for the codes.

        They are found group by group, with all others as they are.
        """
        xp, gram = self._xp, self._metric.gram
        for number, group in enumerate(self._groups):
            whole = len(group) == len(gram)
            inner = gram if whole else gram[group][:, group]
            slope, values, signs = self.slope[group], self.values[group], self._signs(group)
            if self._shifted:
                signs = [xp.ones((len(group), 1)), *signs]
            seen = [inner @ sign for sign in signs]
            # What the group should be, as seen from its outputs with all other groups as they are.
            target = slope + inner @ values
            squares = [
                [(sign * seen[j]).sum(axis=0) for j in range(i + 1)] for i, sign in enumerate(signs)
            ]
            scales = solved(squares, [(sign * target).sum(axis=0) for sign in signs], xp)
            renewed = xp.zeros_like(values)
            for scale, sign in zip(scales, signs, strict=True):
                renewed += scale * sign
            if self._shifted:
                self.shift[number] = scales.pop(0)
            for level, scale in enumerate(scales):
                self.scales[number, level] = scale
            self.slope -= (gram if whole else gram[:, group]) @ (renewed - values)
            self.values[group] = renewed
        self._tabulate()

    def _blocks(self) -> Iterator[slice]:
        count = len(self.weights)
        for start in range(0, count, COLUMNS):
            yield slice(start, min(start + COLUMNS, count))
