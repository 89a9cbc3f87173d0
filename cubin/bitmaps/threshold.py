"""The map of ternary codes: one bit for what is worth a sign, none for the rest."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cubin.bitmaps import patterns
from cubin.core import arrays, libraries
from cubin.core.libraries import Array
from cubin.core.rows import rows_of

_BLOCK = 1 << 18
"""Elements whose sums are looked at together."""


@libraries.border()
def ternary(
    x: Array,
    *,
    channel_axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
    importance: Array | None = None,
) -> Array:
    """The map of 0 and 1 bits with the least squared error.

    Elements with 1 bit become plus or minus the scale of their row, those with 0 bits become 0.
    With the best scale for the set K of elements that have a bit, the weighted mean of their
    magnitudes, the error of a row is

    .. math:: \\sum_j w_j x_j^2 - \\frac{(\\sum_{j \\in K} w_j |x_j|)^2}{\\sum_{j \\in K} w_j} .

    The best K are the largest magnitudes of the row, and how many of them is found from prefix
    sums over the sorted magnitudes: no other map of 0 and 1 bits has a smaller error. Equal
    magnitudes have equal bits. Of maps of the same error it is the one with fewest bits, so that a
    row of zeros has none.

    Without importance, ``cubin.quantize(x, ternary(x))`` has the best scales, too. Its effective
    bits add the entropy of the map to its payload bits: at most log2(3) = 1.585, and the scales.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, any shape
        Of any library, finite.
    channel_axis : int or tuple of int, optional
        One scale for each index of this axis (these axes), as in `cubin.quantize`. Default: one
        for the tensor.
    group_size : int, optional
        One scale for every run of this many elements of the last axis, the last of which may be
        shorter.
    importance : array of floats that broadcasts to x's shape, optional
        The weights w of the squared errors, finite and not negative. Default: 1. Elements of
        weight 0 follow their magnitude. Use a solver that takes the importance, such as
        ``solver="refined"``, for the scales.

    Returns
    -------
    array of int8, shape of `x`
        0 and 1, in x's library.

    Raises
    ------
    TypeError
        If `x` or `importance` is not floating point, libraries are mixed, or another argument is
        no integer.
    ValueError
        If `x` has NaN or infinity, `importance` is negative or not finite or does not broadcast,
        or the axis or group size does not fit.

    References
    ----------
    .. [1] F. Li, B. Liu, X. Wang, B. Zhang, J. Yan, "Ternary weight networks", ICASSP 2023,
       arXiv:1605.04711.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> x = np.array([[4.0, -5.0, 1.0, 0.5], [0.1, 0.1, -0.3, 0.0]])
    >>> bits = cubin.bitmaps.ternary(x, channel_axis=0)
    >>> bits
    array([[1, 1, 0, 0],
           [0, 0, 1, 0]], dtype=int8)
    >>> cubin.quantize(x, bits, channel_axis=0).dequantize()
    array([[ 4.5, -4.5,  0. ,  0. ],
           [ 0. ,  0. , -0.3,  0. ]])
    """
    # Why a threshold on |x|, whatever the weights: with the scale a, an element with a bit has the
    # error w (|x| - a)^2, one without it w x^2. The first is smaller where |x| > a / 2. Along equal
    # magnitudes, (sum w|x|)^2 / sum w is convex in the weight that is kept: all or none is best.
    x = arrays.as_floats("x", x)
    rows = rows_of(x.shape, channel_axis, group_size)
    xp = libraries.library(x)
    with libraries.current_device(x):
        weights = None if importance is None else arrays.as_importance(importance, x)
        patterns.exponent(x)  # what is not finite has no place in the order
        bits = xp.zeros(x.shape, np.int8)
        if not x.size:
            return bits
        for section in rows.sections:
            weight = section.of(weights)
            m = patterns.magnitudes(section.rows.flat(section.of(x)))
            w = None if weight is None else section.rows.flat(weight)
            least = xp.concatenate(
                [_least_kept(m[cut], None if w is None else w[cut]) for cut in _cuts(*m.shape)]
            )
            # No magnitude reaches infinity: no element is kept where the least is that.
            kept = m >= least
            view = section.rows.view(section.of(bits))
            view[...] = kept.reshape(view.shape)
        return bits


def _cuts(count: int, length: int) -> Iterator[slice]:
    """Rows that are worked on together."""
    step = max(1, _BLOCK // length)
    return (slice(row, row + step) for row in range(0, count, step))


def _least_kept(m: Array, w: Array | None) -> Array:
    """The least magnitude that has a bit in each row, (rows, 1); infinity where none has."""
    xp = libraries.library(m)
    if w is None:
        m = xp.sort(m, axis=1)[:, ::-1]
    else:
        order = xp.argsort(m, axis=1, kind="stable")[:, ::-1]
        m, w = xp.take_along_axis(m, order, axis=1), xp.take_along_axis(w, order, axis=1)
    # Sums of |x| as a share of the row's largest, so that none overflows.
    largest = m[:, :1].astype(np.float64)
    unit = xp.where(largest > 0, largest, 1.0)
    heaviest = None if w is None else w.max(axis=1, keepdims=True).astype(np.float64)
    most = xp.zeros(largest.shape)
    least = xp.full(largest.shape, np.inf, m.dtype)
    sums, weight = xp.zeros(largest.shape), xp.zeros(largest.shape)
    for start in range(0, m.shape[1], _BLOCK):
        some = m[:, start : start + _BLOCK]
        shares = some.astype(np.float64) / unit
        if w is None or heaviest is None:
            weights = weight + xp.arange(1, some.shape[1] + 1)
        else:
            relative = w[:, start : start + _BLOCK] / xp.where(heaviest > 0, heaviest, 1.0)
            shares *= relative
            weights = weight + relative.cumsum(axis=1)
        totals = sums + shares.cumsum(axis=1)
        gains = totals / xp.sqrt(xp.where(weights > 0, weights, 1.0))
        best = gains.argmax(axis=1)[:, None]
        gain = xp.take_along_axis(gains, best, axis=1)
        better = gain > most
        least = xp.where(better, xp.take_along_axis(some, best, axis=1), least)
        most = xp.where(better, gain, most)
        sums, weight = totals[:, -1:], weights[:, -1:]
    return least
