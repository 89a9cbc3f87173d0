"""Windows of images: what a kernel of a convolution sees at each position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cubin.core import libraries
from cubin.core.libraries import Array


def patches(
    x: Array,
    kernel: Sequence[int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    places: Sequence[int],
) -> Array:
    """The windows of images, (positions, channels * kernel height * kernel width), in new memory.

    Parameters
    ----------
    x : array, shape (images, channels, height, width)
    kernel, stride, padding : two ints
        Vertical and horizontal. Positions outside of x are 0.
    places : two ints
        How many positions a kernel has, vertically and horizontally.
    """
    xp: Any = libraries.library(x)
    count, channels, height, width = x.shape
    above, beside = padding
    padded = xp.zeros((count, channels, height + 2 * above, width + 2 * beside), x.dtype)
    padded[:, :, above : above + height, beside : beside + width] = x
    seen = xp.empty((count, *places, channels, *kernel), x.dtype)
    for row in range(kernel[0]):
        for column in range(kernel[1]):
            down = slice(row, row + stride[0] * (places[0] - 1) + 1, stride[0])
            across = slice(column, column + stride[1] * (places[1] - 1) + 1, stride[1])
            seen[..., row, column] = padded[:, :, down, across].transpose(0, 2, 3, 1)
    return seen.reshape(count * math.prod(places), channels * math.prod(kernel))
