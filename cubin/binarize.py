"""sign, ste_mask, multibit, quantize: from an array to its sign, approximation or code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cubin import solvers
from cubin.calibration import Gram, matrix_for
from cubin.codes.binary_code import BinaryCode, assemble, joined
from cubin.core import arrays, conversions, libraries, passes
from cubin.core.bits import Bits, as_bits, as_precisions
from cubin.core.libraries import Array
from cubin.core.rows import Rows, rows_of
from cubin.core.signs import inside, inside_bits, signs
from cubin.gradients import multibit_grad, sign_grad
from cubin.solvers import outputs, shifted
from cubin.solvers.precisions import encode as encode_precisions
from cubin.solvers.solver import Solver, solver_of


def _sign_gradient(gy: Array, x: Array, **_: Any) -> Array:
    return sign_grad(x, gy)


def _multibit_gradient(gy: Array, x: Array, bits: Array, **_: Any) -> Array:
    return multibit_grad(x, bits, gy)


@libraries.border(gradient=_sign_gradient)
def sign(x: Array, *, out: Array | None = None) -> Array:
    """The sign of each element, with sign(0) = -1.

    .. math:: \\operatorname{sign}(x) = +1 \\text{ if } x > 0, \\text{ else } -1

    Zero, positive or negative, has the sign -1, as in CNTK's binary convolutions: a binary code
    has no third value. NumPy's ``sign`` gives 0 there. Where `x` is a PyTorch tensor that requires
    grad, its gradient is that of `sign_grad`.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, any shape
        Of NumPy, CuPy, PyTorch, JAX or Dask, or anything that ``numpy.asarray`` takes.
    out : array, optional
        Where to put the result: x's shape and dtype. It may be `x` itself, or overlap it.

    Returns
    -------
    array
        -1, +1 or (where `x` is NaN) NaN, in the shape and dtype of `x`.

    Raises
    ------
    TypeError
        If `x` is not floating point, or `out` is of another library or dtype.
    ValueError
        If `out` has another shape or is read-only.

    See Also
    --------
    sign_grad : The straight-through gradient.

    References
    ----------
    .. [1] M. Courbariaux et al., "Binarized Neural Networks", arXiv:1602.02830, 2016.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> cubin.sign(np.array([-1.5, 0.0, 2.0]))
    array([-1., -1.,  1.])
    """
    x = arrays.as_floats("x", x)
    with libraries.current_device(x):
        y = arrays.output(out, x)
        passes.elements(signs, libraries.apart(x, out), y=y)
    return y if out is None else out


@libraries.border()
def ste_mask(x: Array, bound: Array = 1) -> Array:
    """Where the straight-through estimator lets the gradient pass: ``|x| <= bound``.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, any shape
    bound : real number or array that broadcasts to x's shape
        1 for the sign, a bit map for the multibit approximation.

    Returns
    -------
    array of bool
        In the shape of `x`; False where `x` or `bound` is NaN.

    Raises
    ------
    TypeError
        If `x` is not floating point, `bound` is not real, or libraries are mixed.
    ValueError
        If `bound` does not broadcast to x's shape.

    References
    ----------
    .. [1] Y. Bengio, N. Léonard, A. Courville, "Estimating or propagating gradients through
       stochastic neurons for conditional computation", arXiv:1308.3432, 2013.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> cubin.ste_mask(np.array([-1.5, 0.0, 1.0]))
    array([False,  True,  True])
    """
    x = arrays.as_floats("x", x)
    with libraries.current_device(x):
        limit = arrays.as_bound(bound, x)
        if limit.dtype.kind == "f":
            limit = conversions.widened(limit)
        mask = arrays.output(None, x, np.bool_)
        within = inside_bits if limit.dtype == np.uint8 else inside
        passes.elements(within, x, limit, mask=mask)
    return mask


@libraries.border(gradient=_multibit_gradient)
def multibit(
    x: Array,
    bits: Array,
    *,
    channel_axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
    solver: str = "greedy",
    iterations: int | None = 2,
    importance: Array | None = None,
    out: Array | None = None,
) -> Array:
    """The multibit approximation of `x`.

    It is :math:`\\sum_i a_i b_i` with one scale :math:`a_i` for each level of a row, and signs
    :math:`b_i`. The greedy solver takes, over the elements with more than i bits,

    .. math:: a_i = \\operatorname{mean} |r_i|, \\quad b_i = \\operatorname{sign}(r_i), \\quad
        r_{i+1} = r_i - a_i b_i, \\quad r_0 = x;

    a residual of exactly 0 has the sign -1. `quantize` describes the others. An element with 0
    bits is approximated by 0. The straight-through gradient is `multibit_grad`, which PyTorch
    records where `x` is a tensor that requires grad.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, any shape
        Of NumPy, CuPy, PyTorch, JAX or Dask, or anything that ``numpy.asarray`` takes.
    bits : int or integer array that broadcasts to x's shape
        The number of levels of every element, 0 to 16, or to 8 for the solvers ``alternating``
        and ``optimal``. The greedy solver does not check the values of a CuPy map, since that
        would synchronise: values outside the range count as its nearest end, and the work of all
        16 levels is done. A NumPy map is checked, and moved once.
    channel_axis : int or tuple of int, optional
        One scale per level for each index of this axis (these axes). Default: one for the tensor.
    group_size : int, optional
        One scale per level for every run of this many elements of the last axis. The last run may
        be shorter, and is all of the axis where that has fewer elements.
    solver : {"greedy", "refined", "alternating", "optimal"}
    iterations : int or None
    importance : array that broadcasts to x's shape, optional
        As in `quantize`.
    out : array, optional
        Where to put the result: x's shape and dtype. It may be `x` itself, or overlap `x` or
        any other argument.

    Returns
    -------
    array
        In the shape and dtype of `x`. NaN or infinity in a row makes that row's result NaN or
        infinite, and touches no other row.

    Raises
    ------
    TypeError
        If `x` or `importance` is not floating point, `bits` is not integer, or libraries are
        mixed.
    ValueError
        If `bits` is out of range or does not broadcast, `group_size` is less than 1, `out` has
        another shape, the solver is unknown, or `importance` is negative or not finite, or given to
        the greedy solver.

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
    rows = rows_of(x.shape, channel_axis, group_size)
    rule = solver_of(solver, iterations)
    with libraries.current_device(x):
        y = arrays.output(out, x)
        checked = as_bits(bits, x, **rule.limit, look=solver != "greedy").apart(out)
        weights = _weights(importance, x, solver)
        x = libraries.apart(x, out)
        weights = None if weights is None else libraries.apart(weights, out)
        if len(rows.sections) == 1:
            solvers.approximate(x, checked, rows.as_stored(x), y, rule, weights)
        else:
            for section in rows.sections:
                multibit(
                    section.of(x),
                    section.of(checked.entries),
                    group_size=section.rows.group_size,
                    solver=solver,
                    iterations=iterations,
                    importance=section.of(weights),
                    out=section.of(y),
                )
    return y if out is None else out


@libraries.border()
def quantize(
    x: Array,
    bits: Array,
    *,
    channel_axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
    solver: str = "greedy",
    iterations: int | None = 2,
    importance: Array | None = None,
    gram: Gram | None = None,
    shift: bool = False,
    precisions: Sequence[int] | None = None,
    check_finite: bool = True,
) -> BinaryCode:
    """The scales and signs that approximate `x`.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, any shape
        Of NumPy, CuPy, PyTorch or JAX, or anything that ``numpy.asarray`` takes.
    bits : int or integer array that broadcasts to x's shape
        The number of levels of every element, 0 to 16, or to 8 for the solvers ``alternating``
        and ``optimal``.
    channel_axis : int or tuple of int, optional
        One scale per level for each index of this axis (these axes). Default: one for the tensor.
    group_size : int, optional
        One scale per level for every run of this many elements of the last axis. The last run may
        be shorter, and is all of the axis where that has fewer elements.
    solver : {"greedy", "refined", "alternating", "optimal"}
        How the scales and signs are found; see the notes.
    iterations : int or None
        How often ``alternating`` renews the codes. 0 refits the scales of the greedy codes alone,
        None goes on until the error stops falling, at most 1000 times. No other solver uses it.
    importance : array of floats that broadcasts to x's shape, optional
        Weights of the squared errors, finite and not negative, such as the diagonal of a Hessian
        or mean squares of activations. In a row of zeros all elements count the same. Not for the
        greedy solver.
    gram : Gram, optional
        The Gram matrix H of the inputs of the layer that `x` is the weights of. Then the error of
        the layer's outputs is minimised, :math:`\\sum_w (w - q) H (w - q)^T` over the lines w of
        `x`, of shape (m, n) or (m, ...) with n elements in a line. With ``channel_axis=0`` or
        groups, at most 8 bits, and not with the greedy solver.
    shift : bool
        Whether each row gets a constant c, too, :math:`x \\approx c + \\sum_i a_i b_i`: for data
        that are not symmetric about zero. Elements of 0 bits are approximated by it.
    precisions : sequence of int, optional
        Numbers of levels, ascending and ending on `bits`, which is no map then: the code has the
        best scales for each of them, and ``code.at(p)`` is the code of p levels. See the notes.
    check_finite : bool
        Whether to look for NaN and infinity in `x` first.

    Returns
    -------
    BinaryCode
        Without a shift and `precisions`, ``quantize(x, ...).dequantize()`` equals
        ``multibit(x, ...)``. Without `precisions` the scales are not negative and, except from the
        greedy solver and under a map, descend.

    Raises
    ------
    TypeError
        If `x` or `importance` is not floating point, `bits` or one of `precisions` is no integer,
        `gram` is no `Gram`, `shift` is no bool, or libraries are mixed.
    ValueError
        If `x` has a NaN or infinity (the message names the first such row), `bits` is out of
        range or does not broadcast, `group_size` is less than 1, the solver is unknown, or
        `importance` is negative or not finite, or given to the greedy solver. If `gram` is of
        another number of inputs than a line has, or given to the greedy solver, with an importance,
        or where scales are neither per line nor per group. If `precisions` are empty, do not ascend
        from 1 or more, do not end on `bits`, or come with a bit map.

    See Also
    --------
    cubin.Gram : Sums up a layer's inputs.
    cubin.errors.output_mse : The error of a layer's outputs.

    Notes
    -----
    All solvers but the greedy one end on the least-squares scales of their codes: with B the
    signs of a row, one line for each level, and W its weights,

    .. math:: a = (B W B^T)^{-1} B W x,

    where a level whose signs depend linearly on those of the levels before it has the scale 0.

    - ``greedy`` is the algorithm described at `multibit`: a residual of exactly 0 has the sign -1,
      whatever the sign of x.
    - ``refined``: each level has the signs of the residual, and then all scales so far are
      refitted [1]_ [2]_.
    - ``alternating``: from the greedy codes on, the scales are refitted, and then every element
      takes the nearest of the :math:`2^m` sums of its m levels [2]_. No iteration raises the
      error.
    - ``optimal``: the codes of least error for one and two bits, also under a map. For three or
      more, the best that alternating finds from several starts, among them those of the other
      solvers: none of them has a lower error.

    The solvers that refit find the codes of magnitudes, and negate them where x is not positive:
    the codes of -x are those of x, negated. This decides ties, too. Where a residual is exactly 0,
    or an element lies halfway between two sums, the element takes the sum of smaller magnitude: the
    level that differs has the sign -1 where x > 0 and +1 where x < 0. An element that is 0 has the
    codes of a small negative one.

    On a device, ``refined`` and ``alternating`` with at most 4 bits and no importance take one
    launch, if a block of threads can hold a row. They synchronise only to check a map that is on
    the device. In all other cases rows are sorted, and the solver synchronises to see whether they
    have converged and to check the importance.

    With ``shift`` the greedy solver takes the mean of a row, over all its elements, and then its
    levels of what is left. The others solve for the shift together with the scales: it is the
    scale of one more level in B, whose signs are all +1. ``refined`` begins with it,
    ``alternating`` with the greedy codes of what the mean leaves. ``optimal`` is the best that is
    found from several shifts, which is not always the code of least error. None of the three has a
    larger error in any row than without a shift. They sort and fit rows in float64, and
    synchronise on a device.

    With ``gram`` the codes are found input by input, those of the largest mean square first, and
    the error of each is carried on to the inputs that follow [3]_. Then the scales are refitted in
    the metric of H, those of one group after the other. ``refined`` ends there. ``alternating``
    then renews the codes, input by input, and the scales in turn: `iterations` times, or with None
    until the error stops falling. ``optimal`` does that from several starts. The codes start from
    scales that minimise the error with the diagonal of H as the importance. No line has a larger
    output error than with the same solver and no Gram matrix. A shift is fitted together with the
    scales, and makes no line worse. H may be singular: 1 % of the mean of its diagonal is added
    where errors are carried on, and nowhere else. Matrix products make up most of the work; they
    repeat to the bit on the same machine, with the same number of threads.

    With `precisions` the solver finds the codes of the first one alone. Its planes are kept, and
    each further level takes the signs of the residual; after each, all scales are refitted by least
    squares, with the importance or in the metric of H [4]_. Where the solver goes on with
    iterations, every element then takes the nearest of the sums that its added levels can have, and
    the scales are refitted, in turn; with `gram` errors are carried on, too. So the error falls
    with every precision. Each has scales, and a shift, of its own, those of least squares after the
    greedy solver, too. Scales of the higher ones may be negative and need not descend.

    References
    ----------
    .. [1] Y. Guo et al., "Network Sketching: Exploiting Binary Structure in Deep CNNs",
       CVPR 2017, arXiv:1706.02021.
    .. [2] C. Xu et al., "Alternating Multi-bit Quantization for Recurrent Neural Networks",
       ICLR 2018, arXiv:1802.00150.
    .. [3] E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
       Transformers", ICLR 2023, arXiv:2210.17323.
    .. [4] G. Park et al., "AnyBCQ: Hardware Efficient Flexible Binary-Coded Quantization for
       Multi-Precision LLMs", arXiv:2510.10467, 2025.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> cubin.quantize(np.array([[1.0, -3.0], [0.5, 0.5]]), 1, channel_axis=0).scales
    array([[2. , 0.5]])
    >>> x = np.random.default_rng(0).standard_normal(10_000)
    >>> for solver in ("greedy", "refined", "alternating", "optimal"):
    ...     approx = cubin.quantize(x, 3, solver=solver).dequantize()
    ...     print(solver, round(float(cubin.errors.relative_mse(x, approx)), 3))
    greedy 0.058
    refined 0.05
    alternating 0.043
    optimal 0.034
    """
    x = arrays.as_floats("x", x)
    rows = rows_of(x.shape, channel_axis, group_size)
    rule = solver_of(solver, iterations)
    if not isinstance(shift, (bool, np.bool_)):
        raise TypeError(f"shift must be True or False, got {type(shift).__qualname__}")
    with libraries.current_device(x):
        checked = as_bits(bits, x, **rule.limit, look=True)
        weights = _weights(importance, x, solver)
        matrix = None if gram is None else _matrix(gram, x, rows, checked.levels, solver, weights)
        several = None if precisions is None else as_precisions(precisions, checked.entries)
        # If every element counts, the scales of a row are finite only if the row is: then the
        # scales are checked, and x need not be read once more.
        scales_show = checked.levels > 0 and not checked.mapped and weights is None
        if check_finite and not scales_show:
            _check_finite(x, rows)
        if matrix is None and len(rows.sections) > 1:
            codes = [
                quantize(
                    section.of(x),
                    section.of(checked.entries),
                    group_size=section.rows.group_size,
                    solver=solver,
                    iterations=iterations,
                    importance=section.of(weights),
                    shift=shift,
                    precisions=precisions,
                    check_finite=False,
                )
                for section in rows.sections
            ]
            code = joined(codes, checked.entries, rows)
        else:
            code = _encoded(x, checked, rows, rule, weights, matrix, bool(shift), several)
        if check_finite and not _is_finite(code):
            _check_finite(x, rows)
            raise ValueError(f"the sum of |x| over a row overflows {x.dtype}: scale x down first")
        return code


def _encoded(
    x: Array,
    bits: Bits,
    rows: Rows,
    solver: Solver,
    importance: Array | None,
    gram: Array | None,
    shift: bool,
    precisions: tuple[int, ...] | None,
) -> BinaryCode:
    """The code that a solver finds, where all rows have one length or there is a Gram matrix."""
    first, *higher = precisions or (bits.levels,)
    if gram is not None:
        lowest = bits if precisions is None else as_bits(first, x)
        scales, planes = outputs.encode(x, lowest, rows, solver, gram, shift, higher)
    elif precisions is not None:
        scales, planes = encode_precisions(x, precisions, rows, solver, importance, shift)
    elif shift:
        scales, planes = shifted.encode(x, bits, rows.as_stored(x), solver, importance)
    else:
        scales, planes = solvers.encode(x, bits, rows.as_stored(x), solver, importance)
    # The tables of lower precisions come first, and a shift after the scales.
    scales = scales.reshape(len(scales), *rows.scale_shape)
    lower = len(scales) - bits.levels - shift
    tables, scales = scales[:lower], scales[lower:]
    constant = scales[bits.levels, ...] if shift else None
    parts = (scales[: bits.levels], planes, bits.entries, rows, constant)
    return assemble(*parts) if precisions is None else assemble(*parts, precisions, tables)


def _weights(importance: Array | None, x: Array, solver: str) -> Array | None:
    """The importance, checked, as an array of x's shape."""
    if importance is None:
        return None
    entries = arrays.as_floats("importance", importance)
    libraries.library(x, entries)  # not a mixture
    if solver == "greedy":
        raise ValueError(
            "the greedy solver takes no importance: use refined, alternating or optimal"
        )
    return arrays.as_importance(entries, x)


def _matrix(
    gram: Gram, x: Array, rows: Rows, levels: int, solver: str, weights: Array | None
) -> Array:
    """The matrix of `gram`, checked against the other arguments."""
    matrix = matrix_for(gram, x, "x")
    if solver == "greedy":
        raise ValueError("the greedy solver takes no gram: use refined, alternating or optimal")
    if weights is not None:
        raise ValueError(
            "importance and gram exclude each other: the diagonal of the Gram matrix "
            "is an importance"
        )
    by_line = rows.group_size is not None or rows.order[: len(rows.scale_shape)] == (0,)
    if not by_line:
        raise ValueError(
            "gram needs scales per line or per group of it: channel_axis=0 or a group_size, got "
            f"channel_axis={rows.channel_axis} and group_size={rows.group_size}"
        )
    if levels > outputs.MAX_LEVELS:
        raise ValueError(f"with gram bits go up to {outputs.MAX_LEVELS}, got {levels}")
    return matrix


def _is_finite(code: BinaryCode) -> bool:
    """Whether all scales and shifts are finite."""
    stored = [part for part in (code.scales, code.shift, code.tables) if part is not None]
    return all(bool(libraries.library(part).isfinite(part).all()) for part in stored)


def _check_finite(x: Array, rows: Rows) -> None:
    """ValueError that names the first row with NaN or infinity, if there is one."""
    if not passes.is_finite(x):
        xp = libraries.library(x)
        finite = rows.reduced(xp.all, xp.isfinite(x))
        first = int(finite.ravel().argmin())
        index = tuple(int(i) for i in np.unravel_index(first, rows.scale_shape))
        row = f"row {index} of its {rows.count:,} rows" if index else "it"
        raise ValueError(
            f"x must be finite, but {row} has NaN or infinity: clean it, or pass "
            "check_finite=False to let it propagate within the row"
        )
