"""The rate-distortion map: every element takes the bits that lower the error most for their cost.

For given scales the best map under a budget is known. Spend bits one by one where the error falls
most, on the convex hull of each element's error over its bits: the cheapest gain that the budget
still reaches is the Lagrange multiplier lambda. The scales in turn follow from the map. So the map
is searched for over the scales that it is made from, a few numbers, not over the maps.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cubin.bitmaps import parts, patterns, selection
from cubin.core import arrays, conversions, floats, libraries, passes, progress
from cubin.core.libraries import Array
from cubin.core.rows import Rows, rows_of
from cubin.solvers import greedy

_POINTS = 1 << 15
"""Magnitudes that the search for scales works on, at least, and the most for a row."""

_LEAST = 1 << 5
"""The fewest of them that stand for a longer row."""

_EACH = 1 << 4
"""Elements of a large array for each of them."""

_DRAWN = 1 << 5
"""The most elements that are drawn for each of them."""

_BLOCK = 1 << 18
"""Elements that are drawn at a time, and the most of a row."""

_REFITS = 2
"""Maps that are made from the scales of the one before, for the whole array."""

_SHORT_STEPS = (1.25, 1.12, 1.06)
"""Steps of the search where rows are so many that no more than this can be tried for each."""

_SWEEPS = 12
_FIRST_STEP = 1.25
_LAST_STEP = 1.02
# Share by which a sweep of the search must lower the error for the next to keep its step.
_WORTHWHILE = 1e-3


@libraries.border()
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
    was made from; a search over the latter lowers the error of the former. First one factor per
    level moves the scales of all rows, then those of each row move on their own at the common
    :math:`\\lambda`. Of large arrays, some 32,000 magnitudes or a 16th stand for all in the search,
    drawn with a fixed seed; the map for the scales found is that of the whole array.

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
    x : array of float16, bfloat16, float32 or float64, any shape
        Of any library, finite.
    mean_bits : float
        The mean of the map, `min_bits` to `max_bits`: met to one element over the whole array,
        whatever the rows.
    min_bits, max_bits : int
        The least and most bits of an element, 0 to 16.
    channel_axis : int or tuple of int, optional
        One scale per level for each index of this axis (these axes), as in `cubin.quantize`.
        Default: one for the tensor.
    group_size : int, optional
        One scale per level for every run of this many elements of the last axis, the last of which
        may be shorter.

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
    mean = patterns.as_mean(mean_bits, low, high, patterns.BOUNDS)
    rows = rows_of(x.shape, channel_axis, group_size)
    with libraries.current_device(x):
        whole = _Whole(x, rows, low, high, round(mean * x.size), patterns.exponent(x))
        if whole.total in (low * x.size, high * x.size):
            width = low if whole.total == low * x.size else high
            return libraries.library(x).full(x.shape, width, np.int8)
        maps = progress.over(whole.maps(), "budget", "map", 7 + _REFITS)
        best, _ = min(maps, key=lambda pair: whole.squared_error(*pair))
        return best


@dataclass(frozen=True)
class _Whole:
    """An array, the range of bits of an element, and how many bits there are in all.

    Magnitudes are over the power of two that brings the largest into 0.5 .. 1: no square overflows,
    and what underflows does not matter.
    """

    x: Array
    rows: Rows
    low: int
    high: int
    total: int
    exponent: int

    def maps(self) -> Iterator[tuple[Array, list[Array]]]:
        """The starts, the map that the search finds from the best of them, and its refits.

        Each comes with its scales.
        """
        search, chosen = self.search()
        tried = []
        for start in _starts(self.x, self.total, self.low, self.high):
            fitted = self.fit(start)
            yield start, fitted
            scales = self.in_units(fitted)
            tried.append((search.state([scale[chosen] for scale in scales]), scales))
            tried = [min(tried, key=lambda pair: pair[0].bound)]
        state, best = tried[0]
        state = search.run(state)
        scales = state.made_from
        if len(chosen) < self.rows.count:
            factors = _factors([scale[chosen] for scale in best], scales)
            scales = self.improved(best, factors, state.price)
        for _ in range(1 + _REFITS):
            bits = self.best(scales)
            fitted = self.fit(bits)
            yield bits, fitted
            scales = self.in_units(fitted)

    def improved(self, scales: list[Array], factors: list[float], price: float) -> list[Array]:
        """Scales for rows that are too many to be in the sample.

        The price and the factors that all scales change by on average are those of the sample.
        """
        better = [libraries.library(scale).empty_like(scale) for scale in scales]

        def improve(of_rows: slice, x: Array) -> None:
            search = _Search(self.magnitudes(x), 1, self.low, self.high, 0)
            start = [scale[of_rows] for scale in scales]
            state = search.at(start, price)
            moved = [scale * factor for scale, factor in zip(start, factors, strict=True)]
            state = search.better(state, moved)
            for step in _SHORT_STEPS:
                state = search.sweep(state, step)
            for target, scale in zip(better, state.made_from, strict=True):
                target[of_rows] = scale

        parts.over_tiles(improve, self.rows, self.x)
        return better

    def search(self) -> tuple[_Search, Array]:
        """A search on some magnitudes that stand for all, and the numbers of their rows.

        There are some `_POINTS` of them, or all.
        """
        xp, size = libraries.library(self.x), self.x.size
        draw = np.random.default_rng(0).integers
        points = max(_POINTS, size // _EACH)
        drawn, first = [], 0
        for section in self.rows.sections:
            rows = section.rows
            share = max(1, points * rows.size // size)
            m, weights, chosen = self.drawn(section.of(self.x), rows, share, draw)
            drawn.append((m, weights, first + chosen))
            first += rows.count
        m, weights, chosen = drawn[0] if len(drawn) == 1 else _side_by_side(drawn, self.rows)
        return _Search(m, weights, self.low, self.high, self.total / size), xp.asarray(chosen)

    def drawn(
        self, x: Array, rows: Rows, points: int, draw: Callable[..., np.ndarray]
    ) -> tuple[Array, Array, np.ndarray]:
        """Magnitudes of a section, (rows, n), how many each stands for, and their rows.

        Each is the mean of some elements of a row that are next to each other in order of size: the
        fewer, the more of the row's power they have.
        """
        xp = libraries.library(x)
        length = min(rows.length, max(points // rows.count, _LEAST), _POINTS)
        count = min(rows.count, max(1, points // length))
        drawn = min(rows.length, _DRAWN * length, _BLOCK)
        chosen = _spread(rows.count, (count,), draw)
        # Axes of length 1 stand where there are no axes.
        view = rows.view(x)[None, ..., None]
        samples = []
        step = max(1, _BLOCK // drawn)
        for start in range(0, count, step):
            numbers = chosen[start : start + step, None]
            at = _spread(rows.length, (len(numbers), drawn), draw)
            outer = np.unravel_index(numbers, (1, *rows.scale_shape))
            inner = np.unravel_index(at, (*rows.inner_shape, 1))
            m = self.magnitudes(view[tuple(xp.asarray(axis) for axis in (*outer, *inner))])
            samples.append(_condensed(m, length) if drawn > length else (m, xp.ones(m.shape)))
        m, weights = map(xp.concatenate, zip(*samples, strict=True))
        return m, weights, chosen

    def magnitudes(self, x: Array) -> Array:
        m = libraries.library(x).ldexp(patterns.magnitudes(x), -self.exponent)
        return m.astype(floats.work_dtype(x.dtype), copy=False)

    def squared_error(self, bits: Array, scales: list[Array]) -> float:
        """The squared error of the greedy approximation with a map and its scales."""
        xp, squares = libraries.library(self.x), []
        approximate = passes.form(greedy.approximation, self.x)

        def add(of_rows: slice, x: Array, bits: Array) -> None:
            approx = xp.empty(x.shape, x.dtype)
            approximate(x, bits, *(scale[of_rows] for scale in scales), y=approx)
            x, approx = conversions.computable(x), conversions.computable(approx)
            off = xp.subtract(x, approx, dtype=np.float64)
            off = xp.ldexp(off, -self.exponent)
            squares.append(float((off * off).sum()))

        parts.over_tiles(add, self.rows, self.x, bits.view(np.uint8))
        return math.fsum(squares)  # the same in any order

    def fit(self, bits: Array) -> list[Array]:
        """The scales of a map."""
        return parts.row_scales(self.x, bits.view(np.uint8), self.high, self.rows)

    def in_units(self, scales: list[Array]) -> list[Array]:
        """Scales over the power of two of the magnitudes."""
        return [libraries.library(scale).ldexp(scale, -self.exponent) for scale in scales]

    def best(self, scales: list[Array]) -> Array:
        """The best map for given scales."""

        def gains(of_rows: slice, x: Array) -> Array:
            theirs = [scale[of_rows] for scale in scales]
            return gains_of(self.magnitudes(x), theirs, self.low, self.high)

        bits = spend(gains, self.x, self.rows, self.total - self.low * self.x.size)
        bits += np.int8(self.low)
        return bits


def _side_by_side(
    drawn: list[tuple[Array, Array, np.ndarray]], rows: Rows
) -> tuple[Array, Array, np.ndarray]:
    """What is drawn of sections as one: a section stands for as many elements as it has."""
    xp, length = libraries.library(drawn[0][0]), max(m.shape[1] for m, _, _ in drawn)
    found, counts = [], []
    for (m, weights, _), section in zip(drawn, rows.sections, strict=True):
        # Magnitudes that stand for no element fill up shorter rows.
        filled = xp.zeros((len(m), length), m.dtype), xp.zeros((len(m), length))
        filled[0][:, : m.shape[1]] = m
        filled[1][:, : m.shape[1]] = weights * (section.rows.size / float(weights.sum()))
        found.append(filled[0])
        counts.append(filled[1])
    chosen = np.concatenate([chosen for _, _, chosen in drawn])
    return xp.concatenate(found), xp.concatenate(counts), chosen


def _spread(size: int, shape: tuple[int, ...], draw: Callable[..., np.ndarray]) -> np.ndarray:
    """Ascending positions along the last axis, one drawn from each of as many equal parts."""
    return np.arange(shape[-1]) * size // shape[-1] + draw(0, size // shape[-1], shape)


def _factors(before: list[Array], after: list[Array]) -> list[float]:
    sums = [(float(a.sum()), float(b.sum())) for a, b in zip(before, after, strict=True)]
    return [b / a if a else 1.0 for a, b in sums]


def _condensed(m: Array, length: int) -> tuple[Array, Array]:
    """`length` magnitudes for each row that stand for more, with the number that each stands for.

    They divide the elements in order of size, and the sum of squares, into about equal shares.
    """
    xp, work = libraries.library(m), m.dtype
    m = xp.sort(m, axis=1).astype(np.float64)
    power = (m * m).cumsum(axis=1)
    share = power / xp.maximum(power[:, -1:], np.finfo(np.float64).tiny)
    share += xp.arange(1, m.shape[1] + 1) / m.shape[1]
    place = xp.minimum((share * (length / 2)).astype(np.int64), length - 1)
    place += xp.arange(len(m))[:, None] * length
    shape = (len(m), length)
    weights = xp.bincount(place.ravel(), minlength=len(m) * length).reshape(shape)
    sums = xp.bincount(place.ravel(), m.ravel(), minlength=len(m) * length).reshape(shape)
    return (sums / xp.maximum(weights, 1)).astype(work), weights.astype(np.float64)


@dataclass(frozen=True)
class _State:
    """What each row's bits are made from at a price, and what they cost.

    Attributes
    ----------
    made_from, fitted : list of array, shape (rows, 1)
        The scales that the map is made from, and the greedy scales that it has.
    price : float
        What a bit must lower the error by.
    costs : array, shape (rows, 1)
        Errors, and the price of the bits.
    bound : float
        The error at the mean asked for, if the error went on falling by the price.
    """

    made_from: list[Array]
    fitted: list[Array]
    price: float
    costs: Array
    bound: float


@dataclass(frozen=True)
class _Search:
    """A search over the scales that a map is made from, row by row: at a price, rows do not meet.

    Attributes
    ----------
    m : array, shape (rows, n)
        Magnitudes.
    weights : array, shape (rows, n), or 1
        How many elements each stands for.
    low, high : int
        The range of bits of an element.
    mean : float
        The mean of the map.
    """

    m: Array
    weights: Any
    low: int
    high: int
    mean: float

    def run(self, state: _State) -> _State:
        """The best state that steps reach: those of all rows alike, then those of each row."""
        for alike in (True, False):
            step, left = _FIRST_STEP, _SWEEPS
            while step > _LAST_STEP and left > 0:
                moved = (
                    self.alike(state, step)
                    if alike
                    else self.state(self.sweep(state, step).made_from)
                )
                left -= 1
                if moved.bound >= state.bound * (1 - _WORTHWHILE):
                    step = math.sqrt(step)
                state = min(state, moved, key=lambda state: state.bound)
        return state

    def alike(self, state: _State, step: float) -> _State:
        """All rows move as in `sweep`, where the error falls at the mean."""
        moves: list[tuple[int, float]] = [(-1, 1.0)]
        moves += [(level, f) for level in range(self.low, self.high) for f in (step, 1 / step)]
        improved = -1
        for level, factor in moves:
            # What a step up has improved, a step down would undo.
            if level == improved and level >= 0:
                continue
            scales = list(state.made_from if level >= 0 else state.fitted)
            scales[level] = scales[level] * factor
            moved = self.state(scales)
            if moved.bound < state.bound:
                state, improved = moved, level
        return state

    def sweep(self, state: _State, step: float) -> _State:
        """Rows move to their own scales, and in the scale of each level, where it costs less."""
        state = self.better(state, list(state.fitted))
        for level in range(self.low, self.high):
            for factor in (step, 1 / step):
                scales = list(state.made_from)
                scales[level] = scales[level] * factor
                state = self.better(state, scales)
        return state

    def better(self, state: _State, scales: list[Array]) -> _State:
        """Each row of a state, or of that of other scales at the same price."""
        where = libraries.library(self.m).where
        other = self.at(scales, state.price)
        less = other.costs < state.costs
        return _State(
            [where(less, a, b) for a, b in zip(other.made_from, state.made_from, strict=True)],
            [where(less, a, b) for a, b in zip(other.fitted, state.fitted, strict=True)],
            state.price,
            where(less, other.costs, state.costs),
            state.bound,
        )

    def state(self, scales: list[Array]) -> _State:
        """At the price at which the map for some scales has its mean."""
        gains = gains_of(self.m, scales, self.low, self.high)
        more = (self.mean - self.low) * self.size
        counts, price = _within(gains, more, self.weights)
        state = self.cost(scales, counts + np.int8(self.low), price)
        bound = float(state.costs.sum()) - price * self.mean * self.size
        return dataclasses.replace(state, bound=bound)

    @property
    def size(self) -> float:
        """The number of elements that the magnitudes stand for."""
        return float(libraries.library(self.m).broadcast_to(self.weights, self.m.shape).sum())

    @functools.cached_property
    def least(self) -> tuple[Array, list[Array]]:
        """What the levels that all elements have leave, and their scales: the same in all maps."""
        m, weights, fitted = self.m, libraries.library(self.m).asarray(self.weights), []
        number = libraries.library(m).broadcast_to(weights, m.shape).sum(axis=1, keepdims=True)
        for _ in range(self.low):
            total = (m * weights).sum(axis=1, keepdims=True, dtype=np.float64)
            fitted.append((total / libraries.library(m).maximum(number, 1)).astype(m.dtype))
            m = abs(m - fitted[-1])
        return m, fitted

    def at(self, scales: list[Array], price: float) -> _State:
        """The best map for given scales at a price."""
        gains = gains_of(self.m, scales, self.low, self.high)
        counts = (gains > price).sum(axis=0, dtype=np.int8)
        return self.cost(scales, counts + np.int8(self.low), price)

    def cost(self, scales: list[Array], bits: Array, price: float) -> _State:
        """A map that is made from some scales, with its greedy scales."""
        xp, weights, (m, fitted) = libraries.library(self.m), self.weights, self.least
        fitted = list(fitted)
        for level in range(self.low, self.high):
            coded = bits > level
            number = (weights * coded).sum(axis=1, keepdims=True)
            total = (m * coded * weights).sum(axis=1, keepdims=True, dtype=np.float64)
            fitted.append((total / xp.maximum(number, 1)).astype(m.dtype))
            m = abs(m - fitted[-1] * coded)
        costs = m.astype(np.float64) ** 2 + price * bits
        return _State(scales, fitted, price, (weights * costs).sum(axis=1, keepdims=True), math.inf)


def gains_of(m: Array, scales: list[Array], low: int, high: int) -> Array:
    """By how much each bit above the least lowers the error, on its hull: (bits, \\*shape)."""
    curve = []
    for level in range(high + 1):
        if level >= low:
            curve.append(m * m)
        if level < high:
            m = abs(m - scales[level])
    return hull(curve)


def hull(curve: list[Array]) -> Array:
    """The falls of the lower convex hull of errors over the number of bits.

    ``curve[m]`` is the error with m bits. The fall from m to m + 1 is the least over s <= m of the
    greatest over t > m of ``(curve[s] - curve[t]) / (t - s)``: never less than the next one, and
    equal along an edge of the hull.
    """
    xp = libraries.library(curve[0])
    steps = len(curve) - 1
    falls = xp.empty((steps, *curve[0].shape), curve[0].dtype)
    for s in range(steps):
        steepest = None
        for t in range(steps, s, -1):
            slope = curve[s] - curve[t]
            if t - s > 1:
                slope /= t - s
            steepest = slope if steepest is None else xp.maximum(steepest, slope, out=steepest)
            if s:
                xp.minimum(falls[t - 1], steepest, out=falls[t - 1])
            else:
                falls[t - 1] = steepest
    return falls


def _within(gains: Array, bits: float, weights: Any) -> tuple[Array, float]:
    """How many of the largest gains each element has that `bits` pay for, and the least of them.

    An element stands for as many as its weight says. Equal gains go by position.
    """
    xp, flat = libraries.library(gains), gains.ravel()
    costs = xp.broadcast_to(xp.asarray(weights, np.float64), gains.shape).ravel()
    leading = selection.leading_bits(flat)
    at_least = xp.bincount(leading, costs, minlength=1 << selection.LEADING)[::-1].cumsum()[::-1]
    # All with more than these leading bits can be paid for, but not all with these.
    edge = max(int((at_least > bits).sum()) - 1, 0)
    left = bits - (float(at_least[edge + 1]) if edge + 1 < at_least.size else 0.0)
    members = xp.flatnonzero(leading == edge)
    members = members[xp.argsort(-flat[members], kind="stable")]
    paid = int((costs[members].cumsum() <= left).sum())
    taken = leading > edge
    taken[members[:paid]] = True
    price = float(flat[members[min(paid, members.size - 1)]]) if members.size else 0.0
    return taken.reshape(gains.shape).sum(axis=0, dtype=np.int8), price


def spend(gains: Callable[[slice, Array], Array], x: Array, rows: Rows, bits: int) -> Array:
    """How many of the `bits` largest gains each element of `x` has; equal gains go by position.

    ``gains(of_rows, x)`` gives those of a tile of `x`, whose rows are the slice `of_rows`: an array
    of shape (steps, \\*shape of the tile), in which an element's gains do not rise.
    """

    def go_over(look: Callable[[Array], None]) -> None:
        parts.over_tiles(lambda of_rows, x: look(gains(of_rows, x)), rows, x)

    (bound,) = selection.bounds(go_over, [bits])
    counts = libraries.library(x).empty(x.shape, np.int8)

    def above(of_rows: slice, x: Array) -> Array:
        return (gains(of_rows, x) > bound.value).sum(axis=0, dtype=np.int8)

    def equal(of_rows: slice, x: Array) -> Array:
        return (gains(of_rows, x) == bound.value).sum(axis=0, dtype=np.int8)

    parts.over_tiles(above, rows, x, out=counts)
    if bound.left:
        tied = libraries.library(x).empty(x.shape, np.int8)
        parts.over_tiles(equal, rows, x, out=tied)
        _take_first(counts, tied, bound.left)
    return counts


def _take_first(counts: Array, tied: Array, left: int) -> None:
    """Add the first `left` of what is tied to the counts, as (\\*shape)."""
    flat, start = counts.ravel(), 0
    for chunk in parts.in_order(tied):
        where = libraries.library(tied).flatnonzero(chunk)
        more = chunk[where].astype(np.int64)
        flat[start + where] += (left - (more.cumsum() - more)).clip(0, more).astype(np.int8)
        left -= int(more.sum())
        start += chunk.size
        if left <= 0:
            break


# ---------------------------------------------------------------- starts


def _starts(x: Array, total: int, low: int, high: int) -> Iterator[Array]:
    """The maps by rank of |x| with `total` bits in all, of the two mixes."""
    mixes = [_adjacent(x.size, total, low), _widest(x.size, total, low, high)]
    orders = (
        patterns.descending_magnitude,
        patterns.ascending_magnitude,
        patterns.descending_distance_from_mean,
    )
    for order in orders:
        key = order(x)
        for counts in mixes:
            yield patterns.ranked(x, key, counts)


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
