"""Solvers: from an array to its approximation, or to the scales and signs of its code.

A solver runs in one of three ways. Rows that fit a block take one primitive on whole rows. Longer
rows take greedy level by level. All else is searched: rows are sorted, or gone through by compiled
loops, and a `Lookup` then gives the code or the value of each element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cubin.codes.encoding import Encoding
from cubin.core import conversions, libraries, passes
from cubin.core.bits import Bits
from cubin.core.libraries import Array
from cubin.core.passes import Part
from cubin.core.primitives import Raw
from cubin.core.rows import Rows
from cubin.solvers import greedy, search, search_rows, sorted_rows
from cubin.solvers.lookup import Lookup
from cubin.solvers.solver import SOLVERS, Solver, solver_of
from cubin.solvers.sorted_rows import SortedRows

__all__ = ["SOLVERS", "Solver", "approximate", "encode", "solver_of"]


def approximate(
    x: Array, bits: Bits, rows: Rows, y: Array, solver: Solver, importance: Array | None = None
) -> None:
    """Write the approximation of `x` to `y`.

    `y` is `x` itself, or does not overlap it. `importance` has x's shape.
    """
    solver = _simplest(solver, bits, importance)
    primitives = (greedy.approximate_rows, search_rows.reconstruct_rows)
    primitive, static = _on_whole_rows(x, bits, rows, solver, importance, *primitives)
    if primitive is not None:
        passes.whole_rows(primitive, rows, (x, bits.values), *static, out=y)
    elif solver.name == "greedy":
        scales = greedy.row_scales(x, bits, rows)
        passes.elements_of_rows(greedy.approximation, rows, (x, bits.values), scales, out=y)
    else:
        view = rows.view(y)

        def decode(part: Part, lookup: Lookup, x: Array, bits: Any) -> None:
            passes.write(lambda flat: lookup.approximate(x, bits, flat), view[part.block], x.shape)

        _search(x, bits, rows, solver, importance, decode)


def encode(
    x: Array, bits: Bits, rows: Rows, solver: Solver, importance: Array | None = None
) -> tuple[Array, Array]:
    """The scales of `x`, (levels, rows), in its dtype, and its planes, (levels, width, lines)."""
    solver = _simplest(solver, bits, importance)
    encoding = Encoding(x, bits.levels, rows)
    primitives = (greedy.encode_rows, search_rows.solve_rows)
    primitive, static = _on_whole_rows(x, bits, rows, solver, importance, *primitives)
    if primitive is not None:
        encoding.fill(primitive, (x, bits.values), *static)
    elif solver.name == "greedy":
        _pack_greedily(encoding, x, bits, rows)
    else:

        def hand_over(part: Part, lookup: Lookup, x: Array, bits: Any) -> None:
            encoding.store(part, lookup.codes(x, bits), bits, lookup.scales)

        _search(x, bits, rows, solver, importance, hand_over)
    return conversions.rounded(encoding.scales, x.dtype), encoding.planes


def _pack_greedily(encoding: Encoding, x: Array, bits: Bits, rows: Rows) -> None:
    """Fill an encoding with the greedy codes of rows that are too long to be read once."""
    scales = greedy.row_scales(x, bits, rows)
    # Loops write bits of elements that lie in order, and need no codes.
    loops = passes.search_loops(greedy, x, x.size)
    if loops is not None and scales and rows.in_order and x.flags.c_contiguous:

        def write(part: Part, x: Array, bits: Any) -> None:
            signs = passes.scratch("signs", (len(scales), len(x), -(-x.shape[1] // 8)), np.uint8, x)
            of_part = [scale[part.rows] for scale in scales]
            loops.write_signs(x, bits, *of_part, signs=signs)
            encoding.store_bits(part, signs, of_part)

        size, levels = passes.SIGNS_AT_ONCE, len(scales)
        passes.for_each_part(write, rows, x, bits.values, size=size, levels=levels)
        return
    find_codes = passes.form(greedy.codes, x)

    def pack(part: Part, x: Array, bits: Any) -> None:
        code = libraries.result_like(x, np.uint16)
        of_part = [scale[part.rows] for scale in scales]
        find_codes(x, bits, *of_part, code=code)
        encoding.store(part, code, bits, of_part)

    passes.for_each_part(pack, rows, x, bits.values, levels=len(scales))


def _simplest(solver: Solver, bits: Bits, importance: Array | None) -> Solver:
    """The greedy solver where no other is better, else `solver`.

    For one level without importance, the greedy scale is the one of least squares.
    """
    best = bits.levels == 0 or (bits.levels == 1 and importance is None)
    return SOLVERS["greedy"] if best else solver


def _on_whole_rows(
    x: Array, bits: Bits, rows: Rows, solver: Solver, importance: Array | None, greedily: Raw,
    searching: Raw,
) -> tuple[Raw | None, tuple[int, ...]]:  # fmt: skip
    """The primitive on whole rows that does what a solver does, or None, and its static arguments.

    `greedily` is the primitive of the greedy solver, `searching` that of the refitting ones.
    """
    primitive: Raw = greedily
    static: tuple[int, ...] = (bits.levels,)
    if solver.name != "greedy":
        most = 0 if solver.name == "optimal" or importance is not None else search_rows.MAX_LEVELS
        if bits.levels > most:
            return None, ()
        primitive, static = searching, (bits.levels, solver.refit, search.limit(solver))
    takes = passes.takes_whole_rows(primitive, rows, x, bits.levels, bits.mapped)
    return primitive if takes else None, static


def _loops(x: Array, bits: Bits, rows: Rows, solver: Solver, importance: Array | None) -> Any:
    """The compiled loops for a search, which have a `Lookup`, or None.

    Those on rows that are not sorted add up in another order. So the size alone decides on them.
    """
    more = bits.mapped or importance is not None
    compares = search_rows.compares(bits.levels, search.limit(solver), more)
    if solver.name != "optimal" and compares and rows.size >= search_rows.LOOPS_FROM:
        return passes.search_loops(search_rows, x)
    return passes.search_loops(sorted_rows, x, x.size << bits.levels)


def _search(
    x: Array,
    bits: Bits,
    rows: Rows,
    solver: Solver,
    importance: Array | None,
    finish: Callable[[Part, Lookup, Array, Any], None],
) -> None:
    """Solve all rows, and call ``finish(part, lookup, x, bits)`` for parts that tile them.

    A long row is solved by one thread, and finished in pieces by several.
    """
    if not x.size:
        return
    levels = bits.levels
    weights = () if importance is None else (importance,)
    loops = _loops(x, bits, rows, solver, importance)
    if loops is not None and rows.length >= loops.LONGEST:
        loops = None
    states = 1 << levels if loops else search.STARTS << (levels - 1)
    lookups: dict[int, Lookup] = {}

    def solve(part: Part, x: Array, bits: Any, weight: Array | None = None) -> None:
        if loops is not None:
            lookup = loops.Lookup(x, bits, levels, weight, solver)
        else:
            magnitudes = SortedRows(x, bits, levels, weight)
            codebooks = search.codebooks(magnitudes, levels, solver)
            lookup = Lookup(magnitudes, codebooks, levels)
        if long:
            lookups[part.rows.start] = lookup
        else:
            finish(part, lookup, x, bits)

    long = passes.is_long(rows, x)
    passes.for_each_searched(
        solve, rows, states, x, bits.values, *weights,
        name=solver.name, compiled=loops is not None,
    )  # fmt: skip
    if long:

        def finish_piece(part: Part, x: Array, bits: Any) -> None:
            finish(part, lookups[part.rows.start], x, bits)

        passes.for_each_part(finish_piece, rows, x, bits.values, one_by_one=True)


def __dir__() -> list[str]:
    return sorted(__all__)
