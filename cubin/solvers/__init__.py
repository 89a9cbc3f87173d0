"""Solvers that lower the error of the greedy code: refined, alternating and optimal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cubin import arrays, blocks, fused, passes
from cubin.arrays import Array, Rows
from cubin.encoding import Encoding
from cubin.passes import Part
from cubin.solvers import search, teams
from cubin.solvers.cells import Cells
from cubin.solvers.fits import Fit
from cubin.solvers.magnitudes import Magnitudes

Solver = Callable[[Magnitudes, int], dict[int, Cells]]
"""Takes the magnitudes of rows and the number of levels; gives cells by number of bits."""

BLOCK = 1 << 19
"""Elements, or cells of a solver's states, that the host works on at a time, at least."""

LARGEST_BLOCK = 1 << 20
"""The most of them, where all elements have as many bits and the same importance: while Python is
between two, other threads wait for it."""

COMPILED = 1 << 16
"""Elements from which on compiled loops pay, even if they have to be loaded: sorting takes long.

They round in another way, so that it depends on the size alone which form is taken.
"""

MAX_COMPILED_LEVELS = 4
"""From here on sorting pays: the edges double with every level."""

DEVICE_BLOCK = 1 << 24
"""What a device works on at a time."""


def approximate(
    x: Array,
    bits: Any,
    levels: int,
    rows: Rows,
    y: Array,
    *,
    solver: Solver,
    importance: Array | None = None,
) -> None:
    """Write the approximation of `x` to `y`, which is `x` itself or does not overlap it.

    `bits` is a uint8 scalar, or an array of x's shape, as is `importance`. There is at least one
    level.
    """
    rule: Any = search.rule(solver) if importance is None else None
    if rule is not None and _fits_one_launch(x, bits, levels, rows):
        fused.approximate(teams.reconstruct_rows, x, bits, rows, y, levels, *rule)
        return
    view = rows.view(y)

    def decode(part: Part, found: Fit, x: Array, bits: Any) -> None:
        passes.write(lambda flat: found.approximate(x, bits, flat), view[part.block], x.shape)

    _fit(x, bits, levels, rows, decode, solver, importance)


def encode(
    x: Array,
    bits: Any,
    encoding: Encoding,
    *,
    solver: Solver,
    importance: Array | None = None,
) -> None:
    """Fill in the scales and signs of `x`; the other arguments are those of `approximate`."""
    levels, rows = len(encoding.scales), encoding.rows
    rule: Any = search.rule(solver) if importance is None else None
    if rule is not None and _fits_one_launch(x, bits, levels, rows):
        encoding.fill(teams.solve_rows, x, bits, *rule)
        return

    def hand_over(part: Part, found: Fit, x: Array, bits: Any) -> None:
        encoding.store(part, found.codes(x, bits), bits, found.scales)

    _fit(x, bits, levels, rows, hand_over, solver, importance)


def _fits_one_launch(x: Array, bits: Any, levels: int, rows: Rows) -> bool:
    room = teams.ROOM
    return levels <= teams.MAX_LEVELS and fused.holds(x, levels, np.ndim(bits) > 0, rows, room)


def _loops(x: Array, bits: Any, levels: int, rows: Rows) -> Any:
    """The compiled loops, where there are some for such rows and they pay, else None."""
    if arrays.on_device(x) or np.ndim(bits) or levels > MAX_COMPILED_LEVELS:
        return None
    # Long rows are read as they are, since a copy would take as much memory again.
    plain = x.dtype == np.float32 or (x.dtype == np.float16 and rows.length <= BLOCK)
    name = "cubin.solvers.search_loops"
    return blocks.compiled_by_size(name, x.size, COMPILED) if plain else None


def _fit(
    x: Array,
    bits: Any,
    levels: int,
    rows: Rows,
    finish: Callable[[Part, Fit, Array, Any], None],
    solver: Solver,
    importance: Array | None,
) -> None:
    """Solve all rows, and hand every part of them with its fit, elements and bits to `finish`."""
    device = arrays.on_device(x)
    long = rows.length > BLOCK and not device
    rule: Any = search.rule(solver) if importance is None else None
    loops = None if rule is None else _loops(x, bits, levels, rows)
    fits: dict[int, Fit] = {}

    def solve(part: Part) -> None:
        own_x, own_bits, weights = (_cut(array, rows, part) for array in (x, bits, importance))
        if loops is not None:
            found = loops.Fit(own_x, levels, *rule)
        else:
            magnitudes = Magnitudes(own_x, own_bits, levels, weights)
            found = Fit(magnitudes, solver(magnitudes, levels), levels)
        if long:
            fits[part.rows.start] = found
        else:
            finish(part, found, own_x, own_bits)

    def finish_piece(part: Part, x: Array, bits: Any) -> None:
        finish(part, fits[part.rows.start], x, bits)

    block = DEVICE_BLOCK if device else BLOCK
    if not (device or loops or np.ndim(bits)) and importance is None:
        block = min(max(block, blocks.portion(x.size)), LARGEST_BLOCK)
    parts = list(_whole_rows(rows, levels, block)) if x.size else []
    if device:
        for part in parts:
            solve(part)
    else:
        threaded = loops and blocks.LOOPS_THREADED
        blocks.each(solve, parts, x.size, threaded)
        if long:
            piece = blocks.PIECE if loops else None
            passes.for_each_part(finish_piece, rows, x, bits, block=piece, threaded=threaded)


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
