"""Products with packed codes: linear maps and convolutions that do not unpack the weights.

A code takes part as it is: for a few rows of x, sums of x are looked up by the bytes of its planes
[1]_; for many, tiles of the code are decoded for BLAS. Products of two codes compare their signs by
XOR and count [2]_.

References
----------
.. [1] G. Park et al., "LUT-GEMM: Quantized Matrix Multiplication based on LUTs for Efficient
   Inference in Large-Scale Generative Language Models", ICLR 2024, arXiv:2206.09557.
.. [2] M. Rastegari et al., "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural
   Networks", ECCV 2016, arXiv:1603.05279.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cubin.codes import products
from cubin.codes.binary_code import BinaryCode, decoding_of, library_of
from cubin.codes.decoding import Decoding
from cubin.core import arrays, conversions, floats, libraries
from cubin.core.libraries import Array
from cubin.core.windows import patches

__all__ = ["conv2d", "linear"]

_PATCHES = 1 << 22
"""Elements of the patches that a convolution lays out at a time."""


@libraries.border()
def linear(x: Array | BinaryCode, code: BinaryCode) -> Array:
    """The product of rows of x with the lines of a code: ``x @ code.dequantize().T``.

    .. math:: y_{bi} = \\sum_e x_{be} \\sum_l a_{l,r(i,e)} b_{l,i,e}

    Sums are accumulated in float32, or in float64 if x or the code has float64, in an order that
    depends on the shapes. Where BLAS multiplies, beyond 16 rows of x times levels, it decides the
    order. The sums of scales are not rounded to the dtype of a float16 code.

    Parameters
    ----------
    x : float array, shape (..., n); or BinaryCode of shape (b, n)
        Of float16, bfloat16, float32 or float64, of any library, on the device of `code`.
    code : BinaryCode of shape (m, n)
        Of any granularity, with or without a bit map.

    Returns
    -------
    array, shape (..., m) or (b, m)
        In the dtype of `x`. For two codes the sums of signs are exact integers, which are scaled in
        float64.

    Raises
    ------
    TypeError
        If `x` is neither floating point nor a code, `code` is no code, or libraries are mixed.
    ValueError
        If `code` is not of rank 2, or the last axis of `x` does not have n elements.

    Notes
    -----
    A NaN or infinity in a row of x makes the outputs of that row non-finite where those of a float
    product are, and touches no other row.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> code = cubin.quantize(np.array([[1.0, -3.0, 1.0], [0.5, 0.5, -2.0]]), 2, channel_axis=0)
    >>> cubin.products.linear(np.array([1.0, 2.0, 3.0]), code)
    array([-2., -4.])
    """
    decoding = _matrix("code", code)
    if isinstance(x, BinaryCode):
        one = _matrix("x", x)
        _check_length(one.lines.length, decoding, x.shape)
        libraries.library(one.planes, decoding.planes)  # not a mixture
        with libraries.current_device(one.planes):
            y = products.between(one, decoding, one.dtype)
            return libraries.given_back(y, library_of(x))
    x = arrays.as_floats("x", x)
    libraries.library(x, decoding.planes)
    if x.ndim == 0:
        raise ValueError("x must have at least one axis, got a 0-d array")
    _check_length(x.shape[-1], decoding, x.shape)
    with libraries.current_device(x):
        rows = conversions.rounded(
            x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), _work(x.dtype, decoding)
        )
        y = products.to_lines(rows, decoding)
        return conversions.rounded(y, x.dtype).reshape(*x.shape[:-1], decoding.lines.count)


@libraries.border()
def conv2d(
    x: Array | BinaryCode,
    code: BinaryCode,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    groups: int = 1,
) -> Array:
    """The cross-correlation of images with the kernels of a code, as PyTorch's ``conv2d``.

    .. math:: y_{b,o,i,j} = \\sum_{c,u,v} x_{b,c,si+u-p,sj+v-p} w_{o,c,u,v}

    A position beyond the edge of an image counts as 0, also if x is a code: it is not -1.

    Parameters
    ----------
    x : float array, shape (b, c, h, w); or BinaryCode of that shape
        Of float16, bfloat16, float32 or float64, of any library, on the device of `code`. A code
        has one scale per level for all images, or one for each image (``channel_axis=0``).
    code : BinaryCode of shape (m, c / groups, kernel height, kernel width)
        Of any granularity, with or without a bit map.
    stride, padding : int or pair of int
        Vertical and horizontal.
    groups : int
        Kernels and channels fall into so many groups, which have nothing to do with each other.

    Returns
    -------
    array, shape (b, m, output height, output width)
        In the dtype of `x`; sums are accumulated as in `linear`.

    Raises
    ------
    TypeError
        As from `linear`; or if `stride`, `padding` or `groups` is no integer.
    ValueError
        If the shapes do not fit together, the kernels are larger than the padded images, or a code
        of x has other scales.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> code = cubin.quantize(np.ones((1, 1, 2, 2)), 1)
    >>> cubin.products.conv2d(np.ones((1, 1, 2, 2)), code, padding=1)
    array([[[[1., 2., 1.],
             [2., 4., 2.],
             [1., 2., 1.]]]])
    """
    if not isinstance(code, BinaryCode):
        raise TypeError(f"code must be a BinaryCode, got {type(code).__name__}")
    coded = isinstance(x, BinaryCode)
    decoding = decoding_of(code)
    images: Any = x if coded else arrays.as_floats("x", x)
    one = decoding_of(images) if coded else None
    libraries.library(images if one is None else one.planes, decoding.planes)  # not a mixture
    dtype = images.dtype if one is None else one.dtype
    strides, paddings = arrays.as_pair("stride", stride, 1), arrays.as_pair("padding", padding, 0)
    count = arrays.as_integer("groups", groups)
    if len(images.shape) != 4 or len(code.shape) != 4:
        raise ValueError(f"x and code must have rank 4, got {images.shape} and {code.shape}")
    batch, channels, *sides = images.shape
    kernels, per_group, *kernel = code.shape
    if count < 1 or kernels % count or channels != per_group * count:
        raise ValueError(
            f"groups={count} does not fit {channels} channels and kernels of shape {code.shape}"
        )
    outside = [side + 2 * p - k for side, p, k in zip(sides, paddings, kernel, strict=True)]
    if min(outside) < 0:
        raise ValueError(f"kernels of {kernel} are larger than the padded images of {sides}")
    if coded and (images.group_size or images.channel_axis not in (None, (), 0, (0,))):
        raise ValueError("a code of x must have scales for all images or for each image")
    size = [room // step + 1 for room, step in zip(outside, strides, strict=True)]
    work = _work(dtype, decoding)
    with libraries.current_device(decoding.planes):
        y = libraries.result((batch, kernels, *size), dtype, decoding.planes)
        at_once = max(1, _PATCHES // max(1, per_group * math.prod(kernel) * math.prod(size)))
        for start in range(0, batch, at_once):
            part = slice(start, min(start + at_once, batch))
            # A code comes as the signs of each level, and their scales for each image.
            planes, scales = [], None
            if one is not None:
                some = one.part(part)
                planes = [some.signs(p).reshape(-1, *images.shape[1:]) for p in range(some.levels)]
                scales = some.scales(slice(0, some.lines.count))[..., 0]
            else:
                planes = [conversions.rounded(images[part], work)]
            for group in range(count):
                lines = slice(group * kernels // count, (group + 1) * kernels // count)
                inputs = slice(group * per_group, (group + 1) * per_group)
                seen = [
                    patches(plane[:, inputs], kernel, strides, paddings, size) for plane in planes
                ]
                if scales is None:
                    found = products.to_lines(seen[0], decoding.part(lines))
                else:
                    found = products.signs_to_lines(seen, scales, decoding.part(lines))
                shaped = found.reshape(part.stop - part.start, *size, lines.stop - lines.start)
                y[part, lines] = conversions.rounded(shaped, dtype).transpose(0, 3, 1, 2)
        return libraries.given_back(y, library_of(images)) if coded else y


def _matrix(name: str, code: Any) -> Decoding:
    """The decoding of a code of rank 2."""
    if not isinstance(code, BinaryCode):
        raise TypeError(f"{name} must be a BinaryCode, got {type(code).__name__}")
    if len(code.shape) != 2:
        raise ValueError(f"{name} must have the shape (m, n), got {code.shape}")
    return decoding_of(code)


def _check_length(length: int, decoding: Decoding, shape: tuple[int, ...]) -> None:
    if length != decoding.lines.length:
        raise ValueError(
            f"x of shape {shape} must have {decoding.lines.length} elements on its last axis, "
            "as many as a line of the code"
        )


def _work(dtype: Any, decoding: Decoding) -> np.dtype[Any]:
    """The dtype in which sums are accumulated, for inputs of a dtype."""
    return np.result_type(floats.work_dtype(dtype), floats.work_dtype(decoding.dtype))
