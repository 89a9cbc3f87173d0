"""The rate-distortion map: every element takes the bits that lower the error most for their cost.

For given scales the best map under a budget is known. Spend bits one by one where the error falls
most, on the convex hull of each element's error over its bits: the cheapest gain that the budget
still reaches is the Lagrange multiplier lambda. The scales in turn follow from the map. So the map
is searched for over the scales that it is made from, a few numbers, not over the maps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cubin import errors
from cubin.binarize import multibit
from cubin.bitmaps import patterns
from cubin.core import arrays, libraries, passes
from cubin.core.bits import Bits
from cubin.core.libraries import Array
from cubin.core.passes import Part
from cubin.core.rows import Rows, rows_of
from cubin.solvers import greedy

_TRIALS = 64
_FIRST_STEP = 1.25
_LAST_STEP = 1.02
# Share by which a sweep of the search must lower the error for the next to keep its step.
_WORTHWHILE = 1e-3


def budget(
    x: Array,
    mean_bits: float,
    *,
    min_bits: int = 1,
    max_bits: int = 3,
    channel_axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
) -> Array:
    """A map of a given mean with a small error of the greedy multibit approximation.

    For given scales, every element takes the number of bits m that minimises

    .. math:: r_m^2 + \\lambda m, \\quad r_0 = |x|, \\quad r_{m+1} = |r_m - a_m|,

    with one :math:`\\lambda` for the whole array, such that the mean is met: the convex hull of
    every element's error over m gives the gain of each further bit, and the largest gains of the
    array are taken, equal ones by position. The greedy scales of that map are not those which it
    was made from; a compass search over the latter, one factor per level for all rows, lowers the
    error of the former. It ends after some 70 trials, each a few passes over `x`.

    The result is never worse than `top_down`, `bottom_up` and `middle_out` at the same mean with
    a mix of the two numbers of bits next to the mean (`uniform` at a whole one), or with the mix
    of largest entropy (shares in geometric progression): these are where the search starts from,
    and are returned where it finds no better.

    The map itself carries information on |x|, usually more than a bit per element: only so can
    the error of a Gaussian lie below Shannon's bound ``4 ** -mean_bits``. Where the map has
    to be stored, compare at ``cubin.quantize(x, map, ...).effective_bits``, which adds its
    entropy, not at ``.payload_bits``. `allocate` makes maps that cost almost nothing.

    Parameters
    ----------
    x : array of float16, float32 or float64, any shape
        NumPy or CuPy array, finite.
    mean_bits : float
        The mean of the map, `min_bits` to `max_bits`: met to one element over the whole array,
        whatever the rows.
    min_bits, max_bits : int
        The least and most bits of an element, 0 to 16.
    channel_axis : int or tuple of int, optional
        One scale per level for each index of this axis (these axes), as in `cubin.quantize`.
        Default: one for the tensor.
    group_size : int, optional
        One scale per level for every run of this many elements of the last axis.

    Returns
    -------
    array of int8, shape of `x`
        In x's library.

    Raises
    ------
    TypeError
        If `x` is not floating point, `mean_bits` no real number, or another argument no integer.
    ValueError
        If `x` has NaN or infinity, the bits are out of range or order, or the axis or group size
        does not fit.

    References
    ----------
    .. [1] Y. Shoham, A. Gersho, "Efficient bit allocation for an arbitrary set of quantizers",
       IEEE Transactions on Acoustics, Speech, and Signal Processing 36, 1988.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> x = np.random.default_rng(0).standard_normal(10_000)
    >>> bits = cubin.bitmaps.budget(x, 1.4)
    >>> code = cubin.quantize(x, bits)
    >>> round(code.payload_bits, 2), round(code.effective_bits, 1)
    (1.4, 2.5)
    >>> float(cubin.errors.relative_mse(x, code.dequantize()).round(2))
    0.08
    """
    x = arrays.as_floats("x", x)
    low, high = patterns.as_range(min_bits, max_bits)
    mean = patterns.as_mean(mean_bits, low, high)
    rows = rows_of(x.shape, channel_axis, group_size)
    with libraries.current_device(x):
        magnitudes = patterns.magnitudes(x)
        total = round(mean * x.size)
        if total in (low * x.size, high * x.size):
            width = low if total == low * x.size else high
            return libraries.library(x).full(x.shape, width, np.int8)
        starts = list(_starts(magnitudes, total, low, high))
        found = _search(_Problem(magnitudes, rows, low, high, total), starts)

        def error(bits: Array) -> float:
            approx = multibit(x, bits, channel_axis=channel_axis, group_size=group_size)
            return float(errors.measure(x, approx).error)

        return min([found, *starts], key=error)


@dataclass(frozen=True)
class _Problem:
    """The magnitudes, the range of bits of an element, and how many bits there are in all."""

    magnitudes: Array
    rows: Rows
    low: int
    high: int
    total: int

    def fit(self, bits: Array) -> tuple[float, list[Array]]:
        """The squared error of a map with its greedy scales, and these."""
        checked = Bits(bits, bits.view(np.uint8), self.high)
        scales = greedy.row_scales(self.magnitudes, checked, self.rows)
        squares: list[float] = []

        def measure(part: Part, m: Array, bits: Array) -> None:
            for level, scale in enumerate(scales):
                m = abs(m - scale[part.rows] * (bits > level))
            squares.append(float((m * m).sum(dtype=np.float64)))

        passes.for_each_part(measure, self.rows, self.magnitudes, checked.values)
        # The parts come in any order; this sum does not depend on it.
        return math.fsum(squares), scales

    def trial(self, scales: list[Array]) -> tuple[float, list[Array], Array]:
        """The best map for given scales, with its error and its own scales."""
        bits = spend(self.gains(scales), self.total - self.low * self.magnitudes.size)
        bits += np.int8(self.low)
        return (*self.fit(bits), bits)

    def gains(self, scales: list[Array]) -> Array:
        """By how much each bit above the least lowers the error, on its hull: (bits, \\*shape)."""
        m = self.magnitudes
        gains = libraries.library(m).empty((self.high - self.low, *m.shape), m.dtype)
        views = self.rows.view(gains, lead=1)

        def task(part: Part, m: Array) -> None:
            curve = []
            for level in range(self.high + 1):
                if level >= self.low:
                    curve.append(m * m)
                if level < self.high:
                    m = abs(m - scales[level][part.rows])
            target = views[(slice(None), *part.block)]
            target[...] = hull(curve).reshape(target.shape)

        passes.for_each_part(task, self.rows, m)
        return gains


def _search(problem: _Problem, starts: list[Array]) -> Array:
    """The best map found from the best of the starts."""
    trials = []
    for start in starts:
        _, scales = problem.fit(start)
        trials.append((scales, *problem.trial(scales)))
    made_from, least, fitted, best = min(trials, key=lambda trial: trial[1])
    step, left = _FIRST_STEP, _TRIALS
    while step > _LAST_STEP and left > 0:
        before = least
        moves: list[tuple[int | None, float]] = [(None, 1.0)]
        moves += [
            (level, f) for level in range(problem.low, problem.high) for f in (step, 1 / step)
        ]
        moved = None
        for level, factor in moves:
            # What a step up has improved, a step down would undo.
            if level is not None and level == moved:
                continue
            scales = list(fitted if level is None else made_from)
            if level is not None:
                scales[level] = scales[level] * factor
            error, own, bits = problem.trial(scales)
            left -= 1
            if error < least:
                made_from, least, fitted, best, moved = scales, error, own, bits, level
        if least >= before * (1 - _WORTHWHILE):
            step = math.sqrt(step)
    return best


def hull(curve: list[Array]) -> Array:
    """The falls of the lower convex hull of errors over the number of bits.

    ``curve[m]`` is the error with m bits. The fall from m to m + 1 is the least over s <= m of the
    greatest over t > m of ``(curve[s] - curve[t]) / (t - s)``: never less than the next one, and
    equal along an edge of the hull.
    """
    xp = libraries.library(curve[0])
    steps = len(curve) - 1
    falls = xp.full((steps, *curve[0].shape), np.inf, curve[0].dtype)
    for s in range(steps):
        steepest = None
        for t in range(steps, s, -1):
            slope = (curve[s] - curve[t]) / (t - s)
            steepest = slope if steepest is None else xp.maximum(steepest, slope, out=steepest)
            xp.minimum(falls[t - 1], steepest, out=falls[t - 1])
    return falls


def spend(gains: Array, bits: int) -> Array:
    """How many of the `bits` largest gains each element has; equal gains go by position.

    `gains` has the shape (steps, \\*shape), and an element's gains do not rise.
    """
    xp = libraries.library(gains)
    at = gains.size - bits
    threshold = xp.partition(gains.ravel(), at)[at]
    counts = xp.zeros(gains.shape[1:], np.int8)
    for gain in gains:
        counts += gain > threshold
    left = bits - int(counts.sum(dtype=np.int64))
    tied = (gains == threshold).sum(axis=0, dtype=np.int8).ravel()
    where = xp.flatnonzero(tied)
    tied = tied[where].astype(np.int64)
    counts.ravel()[where] += xp.clip(left - (tied.cumsum() - tied), 0, tied).astype(np.int8)
    return counts


# ---------------------------------------------------------------- starts


def _starts(magnitudes: Array, total: int, low: int, high: int) -> Iterator[Array]:
    """The maps by rank of |x| with `total` bits in all, of the two mixes."""
    m = magnitudes.ravel()
    mixes = [_adjacent(m.size, total, low), _widest(m.size, total, low, high)]
    orders = (
        patterns.descending_magnitude,
        patterns.ascending_magnitude,
        patterns.descending_distance_from_mean,
    )
    for order in orders:
        positions = order(m)
        for counts in mixes:
            yield patterns.in_order(positions, counts).reshape(magnitudes.shape)


def _adjacent(size: int, total: int, low: int) -> dict[int, int]:
    """Elements per number of bits, of the two numbers next to the mean."""
    width, more = divmod(total, size)
    return {width: size - more, width + 1: more}


def _widest(size: int, total: int, low: int, high: int) -> dict[int, int]:
    """Elements per number of bits, in geometric progression."""
    widths = np.arange(low, high + 1)
    weak, strong = -64.0, 64.0
    for _ in range(80):
        middle = (weak + strong) / 2
        shares = _progression(middle, widths)
        weak, strong = (weak, middle) if shares @ widths * size > total else (middle, strong)
    counts = np.floor(shares * size).astype(int)
    counts[np.argmax(shares)] += size - counts.sum()
    # Rounding has moved the mean by a few elements at most.
    while missing := total - int(counts @ widths):
        source = int(np.argmax(counts[:-1])) if missing > 0 else 1 + int(np.argmax(counts[1:]))
        counts[source] -= 1
        counts[source + int(np.sign(missing))] += 1
    return dict(zip(widths.tolist(), counts.tolist(), strict=True))


def _progression(ratio: float, widths: np.ndarray) -> Any:
    """Shares that grow by exp(ratio) per bit."""
    weights = ratio * widths
    shares = np.exp(weights - weights.max())
    return shares / shares.sum()
