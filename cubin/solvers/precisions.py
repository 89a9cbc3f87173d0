"""Any precision: levels added to a code, whose lower levels stay a code of their own.

The first levels are those that a solver finds. Each further level takes the signs of what the
levels before it leave, and every precision has its own scales of least squares [1]_.

.. [1] G. Park et al., "AnyBCQ: Hardware Efficient Flexible Binary-Coded Quantization for
   Multi-Precision LLMs", arXiv:2510.10467, 2025.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cubin.codes.decoding import codes_of
from cubin.codes.encoding import Encoding
from cubin.core import conversions, floats, libraries, passes
from cubin.core.bits import Bits
from cubin.core.libraries import Array
from cubin.core.passes import Part
from cubin.core.rows import Rows
from cubin.solvers import encode as encode_first
from cubin.solvers import shifted
from cubin.solvers.residuals import Residuals
from cubin.solvers.search import limit
from cubin.solvers.solver import Solver


def encode(
    x: Array,
    precisions: Sequence[int],
    rows: Rows,
    solver: Solver,
    importance: Array | None = None,
    shift: bool = False,
) -> tuple[Array, Array]:
    """The scales of all precisions of `x`, in its dtype, and its planes.

    Parameters
    ----------
    x : array
    precisions : sequence of int
        Numbers of levels, ascending. The last one is that of the planes.
    rows : Rows
    solver : Solver
    importance : array of x's shape, optional
    shift : bool
        Whether there is one, for each precision.

    Returns
    -------
    scales : array, shape (scales, rows)
        Those of one precision after the other, each followed by its shift, if there is one.
    planes : array of uint8, shape (levels, width, lines)
    """
    first, levels = precisions[0], precisions[-1]
    bits = Bits(np.uint8(first), np.uint8(first), first)
    xp, solve = libraries.library(x), shifted.encode if shift else encode_first
    found, planes = solve(x, bits, rows.as_stored(x), solver, importance)
    encoding = Encoding(x, levels, rows, sum(precisions) + shift * len(precisions))
    weights = () if importance is None else (importance,)

    def extend(part: Part, x: Array, code: Array, weight: Array | None = None) -> None:
        mirrored = solver.name != "greedy"
        residuals = Residuals(x, code, first, weight, mirrored=mirrored, shifted=shift)
        tables = [residuals.table()]
        for wanted in precisions[1:]:
            extended(residuals, wanted, limit(solver))
            tables.append(residuals.table())
        every = xp.concatenate(tables)[:, :, None]
        narrow = conversions.narrowed(every, floats.work_dtype(x.dtype))
        encoding.store(part, residuals.code, np.uint8(levels), list(narrow))

    if x.size:
        codes = codes_of(planes, x.shape)
        states = 1 << (levels - first) if limit(solver) else 2
        passes.for_each_searched(
            extend, rows, states, x, codes, *weights, name=f"{solver.name}, precisions"
        )
    scales = conversions.rounded(encoding.scales, x.dtype)
    if solver.name != "greedy":  # the others end on scales of least squares
        scales[: len(found)] = found
    return scales, encoding.planes


def extended(residuals: Residuals, levels: int, iterations: int) -> None:
    """Add levels up to `levels`, and renew their codes and all scales in turn."""
    fixed = residuals.levels
    while residuals.levels < levels:
        residuals.add_level()
    residuals.improve(fixed, iterations)
