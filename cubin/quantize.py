"""The public entry: an array to its approximation, or to its binary code."""

from __future__ import annotations

from typing import Any

import numpy as np

from cubin import arrays, greedy
from cubin.arrays import Array
from cubin.code import BinaryCode, level_signs
from cubin.passes import Part

SOLVERS = ("greedy",)
"""The names of the solvers."""


def multibit(
    x: Array,
    bits: Array,
    *,
    channel_axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
    out: Array | None = None,
) -> Array:
    """The greedy multibit approximation of `x`.

    Level i of a row takes, over its elements with more than i bits,

    .. math:: a_i = \\operatorname{mean} |r_i|, \\quad b_i = \\operatorname{sign}(r_i), \\quad
        r_{i+1} = r_i - a_i b_i, \\quad r_0 = x,

    and the result is :math:`\\sum_i a_i b_i`. An element with 0 bits is approximated by 0. The
    straight-through gradient is `multibit_grad`.

    Parameters
    ----------
    x : array of float16, float32 or float64, any shape
        NumPy or CuPy array, or anything that ``numpy.asarray`` takes.
    bits : int or integer array that broadcasts to x's shape
        The number of levels of every element, 0 to 16. A CuPy map is not looked at, since this
        would synchronise: values outside the range count as its nearest end, and all 16 levels
        are gone through. Give a NumPy map, which is moved once, to have it checked.
    channel_axis : int or tuple of int, optional
        One scale per level for each index of this axis (these axes). Default: one for the tensor.
    group_size : int, optional
        One scale per level for every run of this many elements of the last axis.
    out : array, optional
        Where to put the result: x's shape and dtype. It may be `x` itself.

    Returns
    -------
    array
        In the shape and dtype of `x`. NaN or infinity in a row makes that row's result NaN or
        infinite, and touches no other row.

    Raises
    ------
    TypeError
        If `x` is not floating point, `bits` is not integer, or libraries are mixed.
    ValueError
        If `bits` is out of range or does not broadcast, `group_size` does not divide the last
        axis, or `out` has another shape.

    See Also
    --------
    quantize : Keeps the scales and signs.

    References
    ----------
    .. [1] Y. Guo et al., "Network Sketching: Exploiting Binary Structure in Deep CNNs",
       CVPR 2017, arXiv:1706.02021.
    .. [2] J. Fromm, S. Patel, M. Philipose, "Heterogeneous bitwidth binarization in convolutional
       neural networks", NeurIPS 2018, arXiv:1805.10368.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> cubin.multibit(np.array([-1.0, 3.0]), 1)
    array([-2.,  2.])
    >>> cubin.multibit(np.array([-1.0, 3.0]), 2)
    array([-1.,  3.])
    """
    x = arrays.as_floats("x", x)
    rows = arrays.rows_of(x.shape, channel_axis, group_size)
    with arrays.current_device(x):
        y = arrays.output(out, x)
        limits, levels = arrays.as_bits(bits, x)
        view = rows.view(y)

        def finish(part: Part, x: Array, bits: Array, scales: list[Array]) -> None:
            target = view[part.block]
            flat = target.reshape(x.shape)
            greedy.approximation(x, bits, *scales, y=flat)
            if not arrays.library(flat).may_share_memory(flat, target):
                target[...] = flat.reshape(target.shape)

        greedy.fit(arrays.apart(x, y), _spread(limits, x), levels, rows, finish)
    return y


def quantize(
    x: Array,
    bits: Array,
    *,
    channel_axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
    solver: str = "greedy",
    check_finite: bool = True,
) -> BinaryCode:
    """The scales and signs that approximate `x`.

    Parameters
    ----------
    x : array of float16, float32 or float64, any shape
        NumPy or CuPy array, or anything that ``numpy.asarray`` takes.
    bits : int or integer array that broadcasts to x's shape
        The number of levels of every element, 0 to 16.
    channel_axis : int or tuple of int, optional
        One scale per level for each index of this axis (these axes). Default: one for the tensor.
    group_size : int, optional
        One scale per level for every run of this many elements of the last axis.
    solver : {"greedy"}
        How the scales and signs are found. ``greedy`` is the algorithm of `multibit`.
    check_finite : bool
        Whether to look for NaN and infinity first.

    Returns
    -------
    BinaryCode
        ``quantize(x, ...).dequantize()`` equals ``multibit(x, ...)``.

    Raises
    ------
    TypeError
        If `x` is not floating point, `bits` is not integer, or libraries are mixed.
    ValueError
        If `x` has a NaN or infinity (the message names the first such row), `bits` is out of
        range or does not broadcast, `group_size` does not divide the last axis, or the solver is
        unknown.

    References
    ----------
    .. [1] Y. Guo et al., "Network Sketching: Exploiting Binary Structure in Deep CNNs",
       CVPR 2017, arXiv:1706.02021.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> cubin.quantize(np.array([[1.0, -3.0], [0.5, 0.5]]), 1, channel_axis=0).scales
    array([[2. , 0.5]])
    """
    x = arrays.as_floats("x", x)
    rows = arrays.rows_of(x.shape, channel_axis, group_size)
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    xp = arrays.library(x)
    with arrays.current_device(x):
        limits, levels = arrays.as_bits(bits, x, look=True)
        if check_finite:
            _check_finite(x, rows)
        scales = xp.zeros((levels, rows.count), x.dtype)
        signs = xp.empty((levels, *x.shape), np.int8)
        views = [rows.view(signs[level, ...]) for level in range(levels)]

        def finish(part: Part, x: Array, bits: Array, found: list[Array]) -> None:
            code = xp.empty(x.shape, np.uint16)
            greedy.codes(x, bits, *found, code=code)
            sign = xp.empty(x.shape, np.int8)
            for level, scale in enumerate(found):
                level_signs(code, bits, np.uint8(level), sign=sign)
                target = views[level][part.block]
                target[...] = sign.reshape(target.shape)
                scales[level, part.rows] = scale[:, 0]

        greedy.fit(x, _spread(limits, x), levels, rows, finish)
        if check_finite and not bool(xp.isfinite(scales).all()):
            raise ValueError(f"the sum of |x| over a row overflows {x.dtype}: scale x down first")
    stored = int(limits) if isinstance(limits, np.generic) else limits
    scales = scales.reshape(levels, *rows.scale_shape)
    return BinaryCode(scales, signs, stored, channel_axis, group_size)


def _spread(bits: Array, x: Array) -> Any:
    return bits if isinstance(bits, np.generic) else arrays.library(x).broadcast_to(bits, x.shape)


def _check_finite(x: Array, rows: arrays.Rows) -> None:
    xp = arrays.library(x)
    inner = tuple(range(len(rows.scale_shape), len(rows.order)))
    finite = xp.isfinite(rows.view(x)).all(axis=inner)
    if not bool(finite.all()):
        first = int(finite.ravel().argmin())
        index = tuple(int(i) for i in np.unravel_index(first, rows.scale_shape))
        row = f"row {index} of its {rows.count:,} rows" if index else "it"
        raise ValueError(
            f"x must be finite, but {row} has NaN or infinity: clean it, or pass "
            "check_finite=False to let it propagate within the row"
        )
