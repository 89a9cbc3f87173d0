"""An array in parts that stay in the cache, in C order or row by row, and the scales of its rows.

On a device an array is one part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cubin.core import libraries, passes
from cubin.core.bits import Bits
from cubin.core.libraries import Array
from cubin.core.rows import Rows
from cubin.solvers import greedy

TILE = 1 << 16
"""Elements of a tile. Several arrays of that size fit the second-level cache; between the steps on
smaller ones, threads would wait for each other."""


def in_order(x: Array) -> Iterator[Array]:
    """The elements of `x` in C order, as flat arrays that last until the next one."""
    if not x.size:
        return
    if libraries.on_device(x):
        yield x.ravel()
        return
    options: Any = ["external_loop", "buffered"]
    yield from np.nditer(x, options, ["readonly"], order="C", buffersize=2 * TILE)


def over_tiles(
    task: Callable[..., Array | None], rows: Rows, *inputs: Array, out: Array | None = None
) -> None:
    """Call ``task(of_rows, *inputs)`` for tiles of the rows, and write to `out` what it returns.

    `of_rows` is the slice of the rows that a tile is of, the inputs are arrays of shape (rows, n).
    Tiles come in any order, from several threads. Rows are numbered section by section.
    """
    start = 0
    for section in rows.sections:
        _over_section(task, section.rows, start, *map(section.of, inputs), out=section.of(out))
        start += section.rows.count


def _over_section(
    task: Callable[..., Array | None], rows: Rows, start: int, *inputs: Array, out: Array | None
) -> None:
    """`over_tiles` for rows of one length, the first of which has the number `start`."""
    device = any(map(libraries.on_device, inputs))
    view = None if out is None else rows.view(out)

    def run(part: passes.Part, *flat: Array) -> None:
        results = None if out is None else libraries.library(out).empty(flat[0].shape, out.dtype)
        tiles = [(slice(None), slice(None))] if device else _tiles(*flat[0].shape)
        first = start + (part.rows.start or 0)
        for tile in tiles:
            top = first + (tile[0].start or 0)
            of_rows = slice(top, top + len(flat[0][tile[0]]))
            result = task(of_rows, *(array[tile] for array in flat))
            if results is not None:
                results[tile] = result
        if view is not None and results is not None:
            target = view[part.block]
            target[...] = results.reshape(target.shape)

    passes.for_each_part(run, rows, *inputs)


def _tiles(count: int, length: int) -> Iterator[tuple[slice, slice]]:
    step = max(1, TILE // max(1, length))
    for row in range(0, count, step):
        for start in range(0, length, TILE):
            yield slice(row, row + step), slice(start, start + TILE)


def row_scales(x: Array, bits: Any, levels: int, rows: Rows) -> list[Array]:
    """The greedy scales of all rows, (rows, 1) for each level, in the work dtype.

    `bits` is a uint8 scalar, or an array of uint8 of x's shape. Rows are numbered as in
    `over_tiles`.
    """
    given = Bits(bits, bits, levels)
    found = [
        greedy.row_scales(section.of(x), given.of(section), section.rows)
        for section in rows.sections
    ]
    return [libraries.library(x).concatenate(scales) for scales in zip(*found, strict=True)]
