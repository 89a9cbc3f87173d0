"""Products with packed codes: linear maps and convolutions that do not unpack the weights.

A code takes part as it is: sums of x are looked up by the bits of its planes [1]_, or, where there
are too many rows of x for that, tiles of the code are decoded and multiplied. Products of two codes
compare their signs by XOR and count [2]_.

References
----------
.. [1] G. Park et al., "LUT-GEMM: Quantized Matrix Multiplication based on LUTs for Efficient
   Inference in Large-Scale Generative Language Models", ICLR 2024, arXiv:2206.09557.
.. [2] M. Rastegari et al., "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural
   Networks", ECCV 2016, arXiv:1603.05279.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cubin.codes import products
from cubin.codes.binary_code import BinaryCode, decoding_of, library_of
from cubin.codes.decoding import Decoding
from cubin.core import arrays, conversions, floats, libraries
from cubin.core.libraries import Array
from cubin.core.windows import overlapped, patches

__all__ = ["conv2d", "linear"]

_PATCHES = 1 << 22
"""Elements of the patches that a convolution lays out at a time."""


def _pull_linear(gy: Any, shape: tuple[int, ...], code: BinaryCode) -> Any:
    return gy @ code


@libraries.border(adjoint=_pull_linear)
def linear(x: Array | BinaryCode, code: BinaryCode) -> Array:
    """The product of rows of x with the lines of a code: ``x @ code.dequantize().T``.

    .. math:: y_{bi} = \\sum_e x_{be} \\big(c_{r(i,e)} + \\sum_l a_{l,r(i,e)} b_{l,i,e}\\big)

    The gradient of x is ``gy @ code``; PyTorch records it where x requires grad.

    Sums are accumulated in float32, or in float64 if x or the code has float64, in an order that
    depends on the shapes. Where BLAS multiplies, it decides the order.
    The sums of scales are not rounded to the dtype of a float16 code. The shift c is 0 where the
    code has none.

    Parameters
    ----------
    x : float array, shape (..., n); or BinaryCode of shape (b, n)
        Of float16, bfloat16, float32 or float64, of any library, on the device of `code`.
    code : BinaryCode of shape (m, n)
        Of any granularity, with or without a bit map or a shift.

    Returns
    -------
    array, shape (..., m) or (b, m)
        In the dtype of `x`. For two codes the sums of signs are exact integers, which are scaled in
        float64; where scales change sooner than every eight elements, all of it is in float64.

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


def _pull_conv2d(gy: Any, shape: tuple[int, ...], code: BinaryCode, **options: Any) -> Any:
    return conv2d_grad(gy, code, shape, **options)


@libraries.border(adjoint=_pull_conv2d)
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
    PyTorch records the gradient where x requires grad.

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
    windows = _windows(images.shape, code.shape, stride, padding, groups)
    if coded and (images.group_size or images.channel_axis not in (None, (), 0, (0,))):
        raise ValueError("a code of x must have scales for all images or for each image")
    work = _work(dtype, decoding)
    with libraries.current_device(decoding.planes):
        y = libraries.result(windows.result, dtype, decoding.planes)
        for part in windows.parts:
            # A code comes as the signs of each level, and their scales for each image.
            planes, scales = [], None
            if one is not None:
                some = one.part(part).as_levels()
                planes = [some.signs(p).reshape(-1, *images.shape[1:]) for p in range(some.levels)]
                scales = some.scales(slice(0, some.lines.count))[..., 0]
            else:
                planes = [conversions.rounded(images[part], work)]
            for lines, inputs in windows.groups:
                seen = [patches(plane[:, inputs], *windows.steps) for plane in planes]
                if scales is None:
                    found = products.to_lines(seen[0], decoding.part(lines))
                else:
                    found = products.signs_to_lines(seen, scales, decoding.part(lines))
                shape = (part.stop - part.start, *windows.places, lines.stop - lines.start)
                shaped = conversions.rounded(found.reshape(shape), dtype)
                y[part, lines] = shaped.transpose(0, 3, 1, 2)
        return libraries.given_back(y, library_of(images)) if coded else y


def _pull_conv2d_grad(
    gy: Any, shape: tuple[int, ...], code: BinaryCode, size: Any, **options: Any
) -> Any:
    return conv2d(gy, code, **options)


@libraries.border(adjoint=_pull_conv2d_grad)
def conv2d_grad(
    x: Array,
    code: BinaryCode,
    size: Sequence[int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    groups: int = 1,
) -> Array:
    """The gradient of `conv2d` for images of the shape `size`, where that of its result is x.

    .. math:: g_{b,c,h,w} = \\sum_{o,i,j} x_{b,o,i,j} w_{o,c,h-si+p,w-sj+p}
    """
    x = arrays.as_floats("x", x)
    decoding = decoding_of(code)
    windows = _windows(tuple(size), code.shape, stride, padding, groups)
    work = _work(x.dtype, decoding)
    with libraries.current_device(x):
        images = libraries.result(tuple(size), x.dtype, x)
        for part in windows.parts:
            rows = conversions.rounded(x[part], work).transpose(0, 2, 3, 1)
            for lines, inputs in windows.groups:
                of_group = rows[..., lines]
                count = math.prod(of_group.shape[:-1])
                of_group = of_group.reshape(count, lines.stop - lines.start)
                found = products.from_lines(of_group, decoding.part(lines))
                target = images[part, inputs]
                summed = overlapped(found, target.shape, *windows.steps)
                target[...] = conversions.rounded(summed, x.dtype)
        return images


class _Windows(NamedTuple):
    """How kernels see images.

    Attributes
    ----------
    result : tuple of int
        The shape of the convolution.
    places : tuple of int
        How many positions a kernel has, vertically and horizontally.
    steps : tuple
        The arguments of `patches` after the images.
    parts : list of slice
        Images whose windows are laid out at a time.
    groups : list of pair of slice
        The kernels and the channels of each group.
    """

    result: tuple[int, ...]
    places: tuple[int, int]
    steps: tuple[Any, ...]
    parts: list[slice]
    groups: list[tuple[slice, slice]]


def _windows(
    shape: tuple[int, ...], of_code: tuple[int, ...], stride: Any, padding: Any, groups: Any
) -> _Windows:
    """The windows of images with kernels of these shapes; errors as from `conv2d`."""
    strides, paddings = arrays.as_pair("stride", stride, 1), arrays.as_pair("padding", padding, 0)
    count = arrays.as_integer("groups", groups)
    if len(shape) != 4 or len(of_code) != 4:
        raise ValueError(f"x and code must have rank 4, got {shape} and {of_code}")
    batch, channels, *sides = shape
    kernels, per_group, *kernel = of_code
    if count < 1 or kernels % count or channels != per_group * count:
        raise ValueError(
            f"groups={count} does not fit {channels} channels and kernels of shape {of_code}"
        )
    outside = [side + 2 * p - k for side, p, k in zip(sides, paddings, kernel, strict=True)]
    if min(outside) < 0:
        raise ValueError(f"kernels of {kernel} are larger than the padded images of {sides}")
    down, across = (room // step + 1 for room, step in zip(outside, strides, strict=True))
    at_once = max(1, _PATCHES // max(1, per_group * math.prod(kernel) * down * across))
    of_group = kernels // count
    return _Windows(
        (batch, kernels, down, across),
        (down, across),
        (kernel, strides, paddings, (down, across)),
        [slice(at, min(at + at_once, batch)) for at in range(0, batch, at_once)],
        [(slice(g * of_group, (g + 1) * of_group), slice(g * per_group, (g + 1) * per_group))
         for g in range(count)],
    )  # fmt: skip


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
