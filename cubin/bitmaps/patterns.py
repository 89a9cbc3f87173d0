"""Bit maps: how many bits every element gets."""

from __future__ import annotations

import math

import numpy as np

from cubin.arrays import MAX_BITS, as_integer


def uniform(shape: int | tuple[int, ...], bits: int) -> np.ndarray:
    """A map that gives every element the same number of bits.

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
    number = as_integer("bits", bits)
    if not 0 <= number <= MAX_BITS:
        raise ValueError(f"bits must lie in 0 .. {MAX_BITS}, got {number}")
    return np.full(shape, number, np.int8)


def random(
    shape: int | tuple[int, ...], mean_bits: float, rng: np.random.Generator | int
) -> np.ndarray:
    """A map of independent random bits, ``max(round(N(mean_bits, 1)), 1)``.

    Rounding up to 1 bit makes it overshoot its mean: at ``mean_bits=1.4`` the map's mean is
    1.615 bits. It is the heterogeneous map of CNTK's experiments, kept as a baseline; count
    the payload bits of what it returns. Values above 16 bits are cut to 16.

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
    if isinstance(mean_bits, (bool, np.bool_)) or not isinstance(
        mean_bits, (int, float, np.integer, np.floating)
    ):
        raise TypeError(f"mean_bits must be a real number, got {type(mean_bits).__qualname__}")
    if not 0 <= mean_bits <= MAX_BITS or math.isnan(mean_bits):
        raise ValueError(f"mean_bits must lie in 0 .. {MAX_BITS}, got {mean_bits}")
    drawn = np.random.default_rng(rng).normal(float(mean_bits), 1.0, shape)
    return np.clip(np.rint(drawn), 1, MAX_BITS).astype(np.int8)
