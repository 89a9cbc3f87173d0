"""Maps that follow a pattern: the same bits everywhere, random bits, bits by rank of |x|."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cubin.bitmaps import parts, selection
from cubin.core import arrays, conversions, floats, libraries
from cubin.core.arrays import as_integer, is_real
from cubin.core.bits import MAX_BITS
from cubin.core.libraries import Array


def uniform(shape: int | tuple[int, ...], bits: int) -> np.ndarray:
    """A map that gives every element the same number of bits.

    It carries no information: effective bits exceed payload bits by the scales alone.

    Parameters
    ----------
    shape : int or tuple of int
    bits : int
        0 to 16.

    Returns
    -------
    array of int8, shape `shape`

    Raises
    ------
    TypeError
        If `bits` is no integer.
    ValueError
        If `bits` is out of range.

    Examples
    --------
    >>> import cubin
    >>> cubin.bitmaps.uniform((2, 3), 2)
    array([[2, 2, 2],
           [2, 2, 2]], dtype=int8)
    """
    return np.full(shape, as_width("bits", bits), np.int8)


def random(
    shape: int | tuple[int, ...], mean_bits: float, rng: np.random.Generator | int
) -> np.ndarray:
    """A map of independent random bits, ``max(round(N(mean_bits, 1)), 1)``.

    Rounding up to 1 bit makes it overshoot its mean: at ``mean_bits=1.4`` the map's mean is
    1.615 bits. It is the heterogeneous map of CNTK's experiments, kept as a baseline; count
    the payload bits of what it returns. Values above 16 bits are cut to 16.

    The map says nothing about the array, yet has to be stored: its entropy, about 1.5 bits per
    element at ``mean_bits=1.4``, is in ``cubin.quantize(x, map).effective_bits`` and buys nothing.
    (A decoder that has the generator's seed could do without it.)

    Parameters
    ----------
    shape : int or tuple of int
    mean_bits : float
        The mean of the normal distribution, in bits, 0 to 16.
    rng : numpy.random.Generator or int
        The source of randomness, or its seed.

    Returns
    -------
    array of int8, shape `shape`

    Raises
    ------
    TypeError
        If `mean_bits` is no real number.
    ValueError
        If `mean_bits` is out of range or NaN.

    References
    ----------
    .. [1] J. Fromm, S. Patel, M. Philipose, "Heterogeneous bitwidth binarization in convolutional
       neural networks", NeurIPS 2018, arXiv:1805.10368.

    Examples
    --------
    >>> import cubin
    >>> float(cubin.bitmaps.random(1_000_000, 1.4, rng=0).mean().round(1))
    1.6
    """
    mean = as_mean(mean_bits, 0, MAX_BITS)
    drawn = np.random.default_rng(rng).normal(mean, 1.0, shape)
    return np.clip(np.rint(drawn), 1, MAX_BITS).astype(np.int8)


@libraries.border()
def top_down(x: Array, mix: Mapping[int, float]) -> Array:
    """A map that gives the most bits to the elements of largest magnitude.

    The elements are ranked by descending |x| over the whole array, equal ones by position; the
    first share of them takes the largest number of bits in the mix, and so on downwards.

    The map tells the decoder which interval |x| lies in. It has an entropy of up to
    ``log2(len(mix))`` bits per element, which a decoder needs in addition to the payload: see
    ``cubin.quantize(x, map).effective_bits``. Only this information lets the error go below
    Shannon's bound at the payload bits.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, any shape
        Of any library, finite.
    mix : mapping of int to float
        The share of the elements that each number of bits (0 to 16) gets, such as
        ``{1: 0.7, 2: 0.2, 3: 0.1}``. The shares sum to 1. They are met to one element: counts are
        rounded by largest remainder.

    Returns
    -------
    array of int8, shape of `x`
        In x's library.

    Raises
    ------
    TypeError
        If `x` is not floating point, `mix` is no mapping, or its bits are no integers or its
        shares no real numbers.
    ValueError
        If `x` has NaN or infinity, or the mix is empty, has bits or shares out of range, or shares
        that do not sum to 1.

    References
    ----------
    .. [1] J. Fromm, S. Patel, M. Philipose, "Heterogeneous bitwidth binarization in convolutional
       neural networks", NeurIPS 2018, arXiv:1805.10368.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> cubin.bitmaps.top_down(np.array([0.1, -4.0, 2.0, 0.9]), {1: 0.75, 3: 0.25})
    array([1, 3, 1, 1], dtype=int8)
    """
    x = arrays.as_floats("x", x)
    return _mixed(x, mix, descending_magnitude)


@libraries.border()
def bottom_up(x: Array, mix: Mapping[int, float]) -> Array:
    """A map that gives the most bits to the elements of smallest magnitude.

    The elements are ranked by ascending |x| over the whole array, equal ones by position; the
    first share of them takes the largest number of bits in the mix, and so on downwards.

    What the map tells the decoder, and what this costs, is as in `top_down`: count
    ``cubin.quantize(x, map).effective_bits``.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, any shape
        Of any library, finite.
    mix : mapping of int to float
        As in `top_down`.

    Returns
    -------
    array of int8, shape of `x`
        In x's library.

    Raises
    ------
    TypeError, ValueError
        As `top_down`.

    References
    ----------
    .. [1] J. Fromm, S. Patel, M. Philipose, "Heterogeneous bitwidth binarization in convolutional
       neural networks", NeurIPS 2018, arXiv:1805.10368.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> cubin.bitmaps.bottom_up(np.array([0.1, -4.0, 2.0, 0.9]), {1: 0.75, 3: 0.25})
    array([3, 1, 1, 1], dtype=int8)
    """
    x = arrays.as_floats("x", x)
    return _mixed(x, mix, ascending_magnitude)


@libraries.border()
def middle_out(x: Array, mix: Mapping[int, float]) -> Array:
    """A map that gives the fewest bits to the elements whose magnitude is nearest the mean.

    The elements are ranked by descending distance of |x| from the mean of |x| over the whole
    array, equal ones by position; the first share of them takes the largest number of bits in the
    mix, and so on downwards. One bit stands for a magnitude equal to the mean, so that the
    elements close to it lose least.

    What the map tells the decoder, and what this costs, is as in `top_down`: count
    ``cubin.quantize(x, map).effective_bits``. `budget` finds a map of the same mean and a smaller
    error.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, any shape
        Of any library, finite.
    mix : mapping of int to float
        As in `top_down`.

    Returns
    -------
    array of int8, shape of `x`
        In x's library.

    Raises
    ------
    TypeError, ValueError
        As `top_down`.

    References
    ----------
    .. [1] J. Fromm, S. Patel, M. Philipose, "Heterogeneous bitwidth binarization in convolutional
       neural networks", NeurIPS 2018, arXiv:1805.10368.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> cubin.bitmaps.middle_out(np.array([0.1, -4.0, 2.0, 0.9]), {1: 0.75, 3: 0.25})
    array([1, 3, 1, 1], dtype=int8)
    """
    x = arrays.as_floats("x", x)
    return _mixed(x, mix, descending_distance_from_mean)


# ---------------------------------------------------------------- orders

Key = Callable[[Array], Array]
"""What elements are ranked by, from the elements: the largest first, equal ones by position."""


def magnitudes(x: Array) -> Array:
    """|x| in its work dtype, or in float64 on a device, whose functions flush subnormals."""
    wide = conversions.computable(x)
    return abs(wide).astype(np.promote_types(wide.dtype, floats.work_dtype(x.dtype)), copy=False)


def exponent(x: Array) -> int:
    """The power of two that the largest magnitude is below, and not below half of."""
    largest = 0.0
    for chunk in parts.in_order(x):
        largest = max(float(magnitudes(chunk).max()), largest)  # in this order NaN stays
        if not math.isfinite(largest):
            raise ValueError("x must be finite, but it has NaN or infinity: clean it first")
    return math.frexp(largest)[1]


def descending_magnitude(x: Array) -> Key:
    """The largest first."""
    return magnitudes


def ascending_magnitude(x: Array) -> Key:
    """The smallest first."""
    return lambda chunk: -magnitudes(chunk)


def descending_distance_from_mean(x: Array) -> Key:
    """The magnitudes farthest from the mean of all first."""
    xp, unit = libraries.library(x), exponent(x)

    def magnitude(chunk: Array) -> Array:
        # Over the power of two no sum overflows, and what underflows does not matter.
        return xp.ldexp(magnitudes(chunk).astype(np.float64), -unit)

    total = math.fsum(float(magnitude(chunk).sum()) for chunk in parts.in_order(x))
    mean = total / max(x.size, 1)
    return lambda chunk: abs(magnitude(chunk) - mean)


def ranked(x: Array, key: Key, counts: Mapping[int, int]) -> Array:
    """Bits by rank: the first elements take the largest number of bits."""
    bits = libraries.library(x).empty(x.shape, np.int8)
    flat = bits.ravel()
    widths = sorted(counts, reverse=True)
    ranks = np.cumsum([counts[width] for width in widths])[:-1].tolist()

    def go_over(look: Callable[[Array], None]) -> None:
        for chunk in parts.in_order(x):
            look(key(chunk))

    bounds = selection.bounds(go_over, ranks)
    left = [bound.left for bound in bounds]
    start = 0
    for chunk in parts.in_order(x):
        keys = key(chunk)
        entries = flat[start : start + keys.size]
        entries[...] = widths[-1]
        for number, bound in enumerate(bounds):
            taken = keys > bound.value
            if left[number]:
                tied = libraries.library(x).flatnonzero(keys == bound.value)[: left[number]]
                taken[tied] = True
                left[number] -= tied.size
            entries += taken * np.int8(widths[number] - widths[number + 1])
        start += keys.size
    return bits


def _mixed(x: Array, mix: Mapping[int, float], order: Callable[[Array], Key]) -> Array:
    counts = _counts(_shares(mix), x.size)
    with libraries.current_device(x):
        exponent(x)  # what is not finite has no rank
        return ranked(x, order(x), counts)


# ---------------------------------------------------------------- mixes

_TOLERANCE = 1e-6


def _shares(mix: Mapping[int, float]) -> dict[int, float]:
    if not isinstance(mix, Mapping):
        raise TypeError(
            f"mix must map bits to shares, like {{1: 0.7, 2: 0.3}}, got {type(mix).__qualname__}"
        )
    shares = {}
    for width, share in mix.items():
        if not is_real(share):
            raise TypeError(f"a share in mix must be a real number, got {type(share).__qualname__}")
        if not 0 <= share <= 1:
            raise ValueError(f"a share in mix must lie in 0 .. 1, got {share}")
        shares[as_width("bits in mix", width)] = float(share)
    if not abs(math.fsum(shares.values()) - 1) <= _TOLERANCE:
        raise ValueError(f"the shares in mix must sum to 1, got {math.fsum(shares.values())}")
    return shares


def _counts(shares: Mapping[int, float], size: int) -> dict[int, int]:
    """Whole numbers of elements, by largest remainder; equal remainders favour fewer bits."""
    total = math.fsum(shares.values())
    quotas = {width: share / total * size for width, share in shares.items()}
    counts = {width: math.floor(quota) for width, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda width: (counts[width] - quotas[width], width))
    for width in by_remainder[: size - sum(counts.values())]:
        counts[width] += 1
    return counts


# ---------------------------------------------------------------- checks


def as_width(name: str, value: object) -> int:
    """`value` as a number of bits."""
    number = as_integer(name, value)
    if not 0 <= number <= MAX_BITS:
        raise ValueError(f"{name} must lie in 0 .. {MAX_BITS}, got {number}")
    return number


def as_range(min_bits: object, max_bits: object) -> tuple[int, int]:
    """`min_bits` and `max_bits`, in order."""
    low, high = as_width("min_bits", min_bits), as_width("max_bits", max_bits)
    if low > high:
        raise ValueError(f"min_bits must not exceed max_bits, got {low} and {high}")
    return low, high


BOUNDS = ": min_bits and max_bits set the bounds"
"""What messages of functions with such arguments add."""


def as_mean(value: Any, low: int, high: int, hint: str = "") -> float:
    """`value` as a mean number of bits between `low` and `high`."""
    if not is_real(value):
        raise TypeError(f"mean_bits must be a real number, got {type(value).__qualname__}")
    if not low <= value <= high:
        raise ValueError(f"mean_bits must lie in {low} .. {high}, got {value}{hint}")
    return float(value)
