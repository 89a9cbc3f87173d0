"""Bits per column of a layer's weights: more for the inputs whose errors reach its outputs."""

from __future__ import annotations

import math

import numpy as np

from cubin.binarize import multibit
from cubin.bitmaps import patterns
from cubin.bitmaps.allocation import Model
from cubin.calibration import Gram, matrix_for
from cubin.core import arrays, conversions, libraries
from cubin.core.libraries import Array
from cubin.solvers.gram import DAMPING


@libraries.border()
def columns(
    w: Array, gram: Gram, mean_bits: float, *, min_bits: int = 1, max_bits: int = 8
) -> Array:
    """Numbers of bits for the columns of a layer's weights, a small output error under a budget.

    An error of column j that the later columns make up for as well as they can costs
    :math:`1 / [H^{-1}]_{jj}` times its square in the layer's outputs [1]_. With m bits the column
    has the error

    .. math:: E_j(m) = \\frac{\\lVert w_{:j} - y_{:j}(m) \\rVert^2}{[H^{-1}]_{jj}},

    with y(m) the greedy approximation of `w` with a scale per line. Bits go to the columns where
    :math:`E_j(m) - E_j(m + 1)` on the convex hull of :math:`E_j` is largest, as in `allocate`.

    Such a map is n small integers: its entropy is divided by the number of lines, which
    ``cubin.quantize(...).effective_bits`` reports. Whole columns of more bits are what BiLLM calls
    salient [2]_.

    Parameters
    ----------
    w : array of float16, bfloat16, float32 or float64, shape (m, ...)
        The weights, finite: m lines of n elements.
    gram : Gram
        Of the layer's n inputs, in w's library.
    mean_bits : float
        The budget: bits per element, `min_bits` to `max_bits`. Less than a column's worth of it is
        left.
    min_bits, max_bits : int
        The least and most bits of a column, 0 to 16.

    Returns
    -------
    array of int8, shape (1, ...)
        As w but for the first axis, so that it broadcasts to w; in w's library. Give it to
        `cubin.quantize` with the same `gram`.

    Raises
    ------
    TypeError
        If `w` is not floating point, `gram` is no `Gram`, or NumPy and CuPy are mixed.
    ValueError
        If the bits are out of range or order, `gram` is of another number of inputs than a line has
        elements, or `w` has NaN or infinity.

    References
    ----------
    .. [1] B. Hassibi, D. Stork, "Second order derivatives for network pruning: Optimal Brain
       Surgeon", NIPS 1992.
    .. [2] W. Huang et al., "BiLLM: Pushing the Limit of Post-Training Quantization for LLMs",
       ICML 2024, arXiv:2402.04291.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> w = np.array([[1.0, -2.0, 4.0, 3.0], [0.1, 0.2, -0.2, 0.3]])
    >>> gram = cubin.Gram(4).add(np.diag([1.0, 1.0, 9.0, 1.0]))
    >>> cubin.bitmaps.columns(w, gram, 1.25)
    array([[1, 1, 2, 1]], dtype=int8)
    """
    low, high = patterns.as_range(min_bits, max_bits)
    mean = patterns.as_mean(mean_bits, low, high, patterns.BOUNDS)
    w = arrays.as_floats("w", w)
    matrix = matrix_for(gram, w, "w")
    xp = libraries.library(w)
    n = gram.n
    with libraries.current_device(w):
        if not bool(xp.isfinite(w).all()):
            raise ValueError("w must be finite, but it has NaN or infinity: clean it first")
        unit = float(xp.diagonal(matrix).mean()) or 1.0
        inverse = xp.linalg.inv(matrix / unit + DAMPING * xp.eye(n))
        weight = 1 / xp.diagonal(inverse)
        lines = conversions.widened(w).reshape(len(w), n)
        curves = []
        for bits in range(low, high + 1):
            off = lines - multibit(lines, bits, channel_axis=0)
            curves.append(libraries.to_host((off * off).sum(axis=0) * weight))
        model = Model(np.array(curves), np.full(n, len(w), np.int64), low)
        chosen = model.bits(math.floor(mean * w.size + 0.5)).astype(np.int8)
        return xp.asarray(chosen.reshape(1, *w.shape[1:]))
