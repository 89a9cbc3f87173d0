"""Solvers that lower the error of the greedy code: refined, alternating and optimal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cubin import arrays, blocks, passes
from cubin.arrays import Array, Rows
from cubin.passes import Part
from cubin.solvers import search
from cubin.solvers.cells import Cells
from cubin.solvers.fits import Fit
from cubin.solvers.magnitudes import Magnitudes

Solver = Callable[[Magnitudes, int], dict[int, Cells]]
"""Takes the magnitudes of rows and the number of levels; gives cells by number of bits."""

BLOCK = 1 << 19
"""Elements, or cells of a solver's states, that the host works on at a time."""

DEVICE_BLOCK = 1 << 24
"""The same on a device."""

Finish = Callable[[Part, Array, Array, "list[Array]"], None]
"""Takes a part of the rows, the packed codes of its elements and their bits as (rows, n), and the
rows' scales, (rows, 1) for each level."""


def fit(
    x: Array,
    bits: Any,
    levels: int,
    rows: Rows,
    finish: Finish,
    *,
    solver: Solver,
    importance: Array | None = None,
) -> None:
    """Solve all rows of `x`, and hand every part of them with its codes to `finish`.

    `bits` is a uint8 scalar, or an array of x's shape, as is `importance`. There is at least one
    level.
    """
    device = arrays.on_device(x)

    def fitted(x: Array, bits: Any, importance: Array | None) -> Fit:
        magnitudes = Magnitudes(x, bits, levels, importance)
        return Fit(magnitudes, solver(magnitudes, levels), levels)

    compiled = _compiled(x, bits, levels, rows, solver, importance)

    def solve(part: Part) -> None:
        own = [_cut(array, rows, part) for array in (x, bits, importance)]
        if compiled is not None:
            codes, scales = compiled(own[0], levels)
            finish(part, codes, bits, scales)
            return
        found = fitted(*own)
        if long:
            fits[part.rows.start] = found
        else:
            finish(part, found.codes(*own[:2]), own[1], found.scales)

    def encode(part: Part, x: Array, bits: Any) -> None:
        found = fits[part.rows.start]
        finish(part, found.codes(x, bits), bits, found.scales)

    long = rows.length > BLOCK and not device
    fits: dict[int, Fit] = {}
    size = rows.count * rows.length
    block = DEVICE_BLOCK if device else BLOCK if compiled is None else blocks.BLOCK
    parts = list(_whole_rows(rows, levels, block)) if size else []
    if device:
        for part in parts:
            solve(part)
    else:
        blocks.each(solve, parts, size)
        if long:
            passes.for_each_part(encode, rows, x, bits)


def _compiled(
    x: Array, bits: Any, levels: int, rows: Rows, solver: Solver, importance: Array | None
) -> Any:
    """The compiled form of the solver, where there is one for such rows and it pays, else None."""
    if arrays.on_device(x) or blocks.compiled(x.size) is None:
        return None
    from cubin.solvers import loops  # needs Numba

    plain = np.ndim(bits) == 0 and importance is None and x.dtype != np.float64
    fits = 2 <= levels <= loops.MAX_LEVELS and rows.length <= BLOCK
    return loops.compiled_form(solver) if plain and fits else None


def _cut(array: Any, rows: Rows, part: Part) -> Any:
    """A part of an array as (rows, n); what is no array is passed on."""
    if array is None or isinstance(array, np.generic):
        return array
    cut = rows.view(array)[part.block]
    return cut.reshape(rows.flat_shape(cut.shape))


def _whole_rows(rows: Rows, levels: int, block: int) -> Iterator[Part]:
    states = search.STARTS << (levels - 1)
    start = 0
    for cut in blocks.tile(rows.scale_shape, max(1, block // max(rows.length, states))):
        stop = start + blocks.extent(cut, rows.scale_shape)
        yield Part(slice(start, stop), slice(0, 1), (*cut, ...))
        start = stop
