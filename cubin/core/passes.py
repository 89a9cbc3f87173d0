"""Passes over the rows of an array: on the host in blocks over threads, on a device in one launch.

Rows that are too long for one block (of the cache, or of threads) are cut into pieces, each of
which a reduction sums up on its own; the caller adds up the pieces. How rows are cut into pieces
depends on their shape alone, so that results are the same every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cubin.core import libraries
from cubin.core.host import blocks
from cubin.core.libraries import Array
from cubin.core.primitives import Reduction
from cubin.core.rows import Rows

CHUNK = 1 << 13
"""Elements of a device row that one thread block reduces."""


@dataclass(frozen=True)
class Part:
    """A block of the rows' view: some whole rows, or a piece of one row.

    Attributes
    ----------
    rows : slice
        The numbers of the rows.
    piece : slice
        The number of the piece, as a slice of length 1.
    block : tuple of slice
        Where it lies in the rows' view: slices, and an ellipsis that keeps even 0-d views arrays.
    """

    rows: slice
    piece: slice
    block: tuple[Any, ...]


def parts_of(rows: Rows, *, device: bool = False, block: int | None = None) -> Iterator[Part]:
    """Parts that tile the rows: on a device all of them at once, else blocks that fit the cache.

    Blocks have up to `block` elements (default: `blocks.BLOCK`), whether of whole rows or of one.
    """
    first, block = slice(0, 1), blocks.BLOCK if block is None else block
    if device:
        yield Part(slice(None), first, (...,))
    elif rows.length <= blocks.BLOCK:
        start = 0
        step = max(1, block // max(1, rows.length))
        for cut in blocks.tile(rows.scale_shape, step):
            stop = start + blocks.extent(cut, rows.scale_shape)
            yield Part(slice(start, stop), first, (*cut, ...))
            start = stop
    else:
        for row, head in enumerate(blocks.tile(rows.scale_shape, 1)):
            for piece, inner in enumerate(blocks.tile(rows.inner_shape, block)):
                yield Part(slice(row, row + 1), slice(piece, piece + 1), (*head, *inner, ...))


def for_each_part(
    task: Callable[..., None],
    rows: Rows,
    *inputs: Array,
    device: bool = False,
    block: int | None = None,
    threaded: int | None = None,
) -> None:
    """Call ``task(part, *inputs)`` for parts that tile the rows, each input as (rows, n).

    An input is an array of the rows' shape, or a scalar that is passed on. `block` and `threaded`
    are as in `parts_of` and `blocks.each`.
    """
    views = [None if isinstance(a, np.generic) else rows.view(a) for a in inputs]

    def run(part: Part) -> None:
        flat = []
        for array, view in zip(inputs, views, strict=True):
            cut = array if view is None else view[part.block]
            if view is not None and cut.dtype == np.uint8 and not device:
                # The bytes of a map of wider integers lie apart: gathered once for all levels.
                cut = np.ascontiguousarray(cut)
            flat.append(cut if view is None else cut.reshape(rows.flat_shape(cut.shape)))
        task(part, *flat)

    if device:
        for part in parts_of(rows, device=True):
            run(part)
    else:
        parts = list(parts_of(rows, block=block))
        blocks.each(run, parts, rows.count * rows.length, threaded)


def write(task: Callable[[Array], None], target: Array, shape: tuple[int, ...]) -> None:
    """Have `task` write `target` as an array of `shape`: itself where its strides allow it."""
    flat = target.reshape(shape)
    task(flat)
    if not libraries.library(flat).may_share_memory(flat, target):
        target[...] = flat.reshape(target.shape)


def partial_results(
    primitive: Reduction, rows: Rows, inputs: tuple[Array, ...], scales: list[Array]
) -> list[Array]:
    """The outputs of a reduction for every piece of every row, each as (rows, pieces).

    `inputs` are arrays of the rows' shape or scalars, `scales` arrays of shape (rows, 1).
    """
    if libraries.on_device(inputs[0]):
        return _partial_results_on_device(primitive, rows, inputs, scales)
    long = rows.length > blocks.BLOCK
    pieces = sum(1 for _ in blocks.tile(rows.inner_shape)) if long else 1
    results = [np.zeros((rows.count, pieces), kind) for kind, _ in primitive.outputs]
    names = [name for _, name in primitive.outputs]

    def reduce(part: Part, *flat: Array) -> None:
        at = (part.rows, part.piece)
        outputs = {name: result[at] for name, result in zip(names, results, strict=True)}
        primitive(*flat, *(scale[part.rows] for scale in scales), **outputs)

    for_each_part(reduce, rows, *inputs)
    return results


def _partial_results_on_device(
    primitive: Reduction, rows: Rows, inputs: tuple[Array, ...], scales: list[Array]
) -> list[Array]:
    xp: Any = libraries.library(inputs[0])
    flat = [a if isinstance(a, np.generic) else rows.flat(a) for a in inputs]
    # Chunks of one length reduce side by side in one launch; what does not fill one comes last.
    chunks = rows.length // CHUNK if rows.length > 2 * CHUNK else 0
    full = chunks * CHUNK
    pieces = chunks + (full < rows.length or not chunks)
    results = [xp.empty((rows.count, pieces, 1), kind) for kind, _ in primitive.outputs]
    spread = [scale[:, None] for scale in scales]

    def reduce(cut: Callable[[Array], Array], at: slice) -> None:
        outputs = {
            name: result[:, at]
            for (_, name), result in zip(primitive.outputs, results, strict=True)
        }
        primitive(*(a if isinstance(a, np.generic) else cut(a) for a in flat), *spread, **outputs)

    if chunks:
        reduce(lambda a: a[:, :full].reshape(rows.count, chunks, CHUNK), slice(0, chunks))
    if pieces > chunks:
        reduce(lambda a: a[:, None, full:], slice(chunks, pieces))
    return [result[..., 0] for result in results]
