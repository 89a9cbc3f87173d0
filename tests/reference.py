"""What cubin computes, written again as plain loops in float64: the oracle of the tests."""

from __future__ import annotations

import itertools
import math

import numpy as np


def plain(array):
    """A NumPy array for comparisons: NumPy's testing takes no NaN of bfloat16."""
    array = np.asarray(array)
    return array.astype(np.float32) if array.dtype == "bfloat16" else array


def signs_of(packed, bits, shape):
    """Signs, (levels, *shape), that are bits along the rows, or across them; 0 without a code."""
    axis = 2 if packed.shape[1] == shape[0] else 1
    set_bits = np.unpackbits(packed, axis=axis, bitorder="little")
    ones, beyond = np.split(set_bits, [shape[axis - 1]], axis=axis)
    assert not beyond.any()
    hot = np.greater(bits, np.arange(len(packed)).reshape(-1, 1, 1))
    assert not ones[~np.broadcast_to(hot, ones.shape)].any()
    return ((2 * ones.astype(np.int8) - 1) * hot).astype(np.int8)


def room_for_signs(levels, shape, across=False):
    """An array for the bits of signs, which lie along the rows, or `across` them."""
    rows, n = shape
    if across:
        return np.full((levels, n, -(-rows // 8)), 77, np.uint8).swapaxes(1, 2)
    return np.full((levels, rows, -(-n // 8)), 77, np.uint8)


def sign(value: float) -> float:
    if math.isnan(value):
        return math.nan
    return 1.0 if value > 0 else -1.0


def rows(shape, channel_axis=None, group_size=None):
    """Row index -> list of the element indices in it."""
    found: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    axes = () if channel_axis is None else channel_axis
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    axes = [axis % len(shape) for axis in axes]
    if group_size is not None:
        for row in np.ndindex(*shape[:-1], -(-shape[-1] // group_size)):
            found[row] = []
    else:
        for row in itertools.product(*(range(shape[axis]) for axis in axes)):
            found[row] = []
    for index in np.ndindex(*shape):
        if group_size is not None:
            row = (*index[:-1], index[-1] // group_size)
        else:
            row = tuple(index[axis] for axis in axes)
        found[row].append(index)
    return found


def greedy(x, bits, channel_axis=None, group_size=None):
    """Scales (k, *scale shape), signs and residuals (k, *x.shape), and the approximation.

    The residuals are those which the signs were taken from.
    """
    x = np.asarray(x, np.float64)
    levels = int(np.max(bits, initial=0))
    bits = np.broadcast_to(np.asarray(bits), x.shape)
    found = rows(x.shape, channel_axis, group_size)
    if group_size is not None:
        scale_shape = (*x.shape[:-1], -(-x.shape[-1] // group_size))
    elif channel_axis is None:
        scale_shape = ()
    else:
        axes = (channel_axis,) if isinstance(channel_axis, int) else channel_axis
        scale_shape = tuple(x.shape[axis] for axis in axes)
    scales = np.zeros((levels, *scale_shape))
    signs = np.zeros((levels, *x.shape))
    residuals = np.zeros((levels, *x.shape))
    residual = x.copy()
    for level in range(levels):
        for row, members in found.items():
            hot = [index for index in members if bits[index] > level]
            if not hot:
                continue
            scale = math.fsum(abs(residual[index]) for index in hot) / len(hot)
            scales[(level, *row)] = scale
            for index in hot:
                code = sign(residual[index])
                residuals[(level, *index)] = residual[index]
                signs[(level, *index)] = code
                residual[index] -= scale * code
    return scales, signs, residuals, x - residual


def ste_mask(x, bound):
    x = np.asarray(x, np.float64)
    bound = np.broadcast_to(np.asarray(bound, np.float64), x.shape)
    mask = np.zeros(x.shape, bool)
    for index in np.ndindex(*x.shape):
        mask[index] = abs(x[index]) <= bound[index]
    return mask


def gradient(x, bound, gy):
    mask = ste_mask(x, bound)
    gx = np.zeros(mask.shape)
    for index in np.ndindex(*mask.shape):
        if mask[index]:
            gx[index] = gy[index]
    return gx
