"""Passes over the rows of an array: the one place that chooses a form and a block size.

On a device a pass is one launch. On the host it goes over blocks that fit the cache, on several
threads, in compiled loops where Numba is there and pays.

A row that is too long for one block, of the cache or of GPU threads, is cut into pieces. A
reduction gives a result for each piece, and the caller combines them. The cut depends on the shape
of the rows alone, so that results are the same every time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from cubin.core import floats, libraries, memory, progress, teams
from cubin.core.host import blocks
from cubin.core.libraries import Array
from cubin.core.lines import Lines
from cubin.core.primitives import Elementwise, Primitive, Raw, Reduction
from cubin.core.rows import Rows, flattened, runs_of

DEVICE_PIECE = 1 << 13
"""Elements of a piece of a row on a device: one thread block reduces it."""

SEARCHED = 1 << 19
"""Elements, or states of a search, that the host works on at a time. It bounds the memory."""

SEARCHED_ON_DEVICE = 1 << 24
"""The same on a device."""

LONG_SEARCH = 1 << 28
"""Steps of a search, as `search_loops` counts them, from which on it may take seconds: then there
is a progress bar."""

DEVICE_SIGNS = 1 << 25
"""Signs that a device holds at a time before they are packed: 32 MB."""

SORTING = 1 << 4
"""The work of a search that sorts rows, on each element: `blocks.threads` says what work is."""

BODY = 2
"""How many times the work of a compiled loop that of a NumPy body is."""

SIGNS_AT_ONCE = 1 << 20
"""Elements of a part on the host whose signs are packed: runs of many bytes are placed faster."""

LINES_AT_ONCE = 1 << 18
"""Elements of a block of lines on the host."""


class Part(NamedTuple):
    """Some whole rows, or a piece of one long row: a block of the array that `Rows.view` gives.

    Attributes
    ----------
    rows : slice
        The numbers of the rows.
    piece : slice
        The number of the piece; of several that follow each other in one row their numbers.
    block : tuple of slice
        The indices into the view: slices, and an ellipsis, which makes 0-d results arrays.
    """

    rows: slice
    piece: slice
    block: tuple[Any, ...]


_ALL = Part(slice(None), slice(0, 1), (...,))


def form(primitive: Primitive, x: Array, size: int | None = None) -> Callable[..., None]:
    """The form of a primitive for blocks, (rows, n), of `x`: its kernel, compiled loop or body.

    `size` is the number of elements of all blocks, that of `x` if it is not given.
    """
    if libraries.on_device(x):
        return primitive
    return primitive.on_host(x.size if size is None else size)


def scratch(name: str, shape: tuple[int, ...], dtype: Any, x: Array) -> Array:
    """An array of arbitrary content beside `x`: on the host this thread's `memory.scratch`."""
    if libraries.on_device(x):
        return libraries.library(x).empty(shape, dtype)
    return memory.scratch(name, shape, dtype)


# ---------------------------------------------------------------- whole rows


def takes_whole_rows(primitive: Raw, rows: Rows, x: Array, levels: int, mapped: bool) -> bool:
    """Whether `whole_rows` can run a primitive on `x`, for so many levels, perhaps with a map.

    On a device a team of threads must hold a row, on the host a block of the cache. On the host a
    primitive with `loops_from` runs in its loops alone: where they are not used, sorting the rows
    is the faster way.
    """
    if not x.size or not levels:
        return False
    if libraries.on_device(x):
        return primitive.launch.takes(rows.length, x.dtype, levels, mapped)
    on = form(primitive, x, rows.size)
    if on is primitive.function:
        return rows.length <= blocks.BLOCK and primitive.loops_from is None
    # Loops go through a row chunk by chunk, and a piece of it fits the cache.
    return rows.length <= (blocks.PIECE if primitive.loops_from is None else blocks.BLOCK)


def whole_rows(
    primitive: Raw,
    rows: Rows,
    inputs: Sequence[Any],
    *static: Any,
    out: Array,
) -> None:
    """Run a primitive on whole rows, which reads every row once.

    Parameters
    ----------
    primitive : Raw
        Its output has an entry for every element.
    rows : Rows
    inputs : sequence
        Arrays of the rows' shape, or scalars.
    *static
        The primitive's other parameters.
    out : array
        Of the rows' shape. It is an input itself, or does not overlap any.
    """
    device, on = libraries.on_device(out), form(primitive, out, rows.size)
    ((_, name),) = primitive.outputs
    view = rows.view(out)

    def task(part: Part, *flat: Any) -> None:
        write(lambda y: on(*flat, *static, **{name: y}), view[part.block], flat[0].shape)

    if device:
        task(_ALL, *(_side_by_side(a, rows) for a in inputs))
        return
    itemsize = floats.work_dtype(inputs[0].dtype).itemsize
    work = _work_on_rows(primitive, rows, on, static[0])
    block = blocks.rows_block(out.size, itemsize, work)
    arrays = [a for a in (*inputs, out) if not isinstance(a, np.generic)]
    if rows.in_order and all(a.flags.c_contiguous and a.flags.aligned for a in arrays):
        # Rows that lie one after the other are cut as they are: threads start sooner.
        shape = rows.count, rows.length
        flat = [a if isinstance(a, np.generic) else a.reshape(shape) for a in inputs]
        y = out.reshape(shape)

        def run(cut: slice) -> None:
            values = (a if isinstance(a, np.generic) else a[cut] for a in flat)
            on(*values, *static, **{name: y[cut]})

        step = max(1, block // rows.length)
        cuts = [slice(start, start + step) for start in range(0, rows.count, step)]
        blocks.each(run, cuts, work)
        return
    parts = list(_blocks_of_rows(rows, block, _together(rows, inputs[0])))
    _over(parts, task, rows, inputs, False, work)


def for_each_whole_rows(
    finish: Callable[[Part, Array], None],
    primitive: Raw,
    rows: Rows,
    inputs: Sequence[Any],
    *static: Any,
    scales: Array,
) -> None:
    """Run a primitive on blocks of whole rows, and call ``finish(part, signs)`` for each of them.

    The signs of a block lie in scratch, so that those of the whole array take no memory.

    Parameters
    ----------
    finish : callable
        On a device signs are int8, (levels, rows, n). On the host they are bits, 1 for +1, in
        uint8: eight elements that lie side by side share a byte, and the first is in its lowest
        bit. Where elements of a row lie side by side, they have the shape (levels, rows, bytes).
        Else rows do, and they have the shape (levels, bytes, n), which is not that of rows.
    primitive : Raw
        Its outputs are ``scales`` and ``signs``.
    rows : Rows
    inputs : sequence
        Arrays of the rows' shape, or scalars; `x` comes first.
    *static
        The primitive's other parameters.
    scales : array, shape (levels, rows)
        Written.
    """
    x, levels = inputs[0], len(scales)
    on = form(primitive, x, rows.size)

    def task(part: Part, *flat: Any) -> None:
        shape, strides = flat[0].shape, flat[0].strides
        columns = 0 < strides[0] < abs(strides[1]) and shape[0] >= blocks.BESIDE and shape[1] > 1
        across, along = shape[::-1] if columns else shape
        signs = memory.scratch("signs", (levels, across, -(-along // 8)), np.uint8)
        signs = signs.swapaxes(1, 2) if columns else signs
        on(*flat, *static, scales=scales[:, part.rows, None], signs=signs)
        finish(part, signs)

    if not libraries.on_device(x):
        itemsize = floats.work_dtype(x.dtype).itemsize
        work = _work_on_rows(primitive, rows, on, levels)
        together, room = _together(rows, x), memory.SCRATCH // levels
        # Rows that fill bytes of planes, in order, are neither copied nor unpacked on the way.
        # Those that lie side by side are, but many of them are read much faster.
        in_order = x.flags.c_contiguous and rows.in_order
        if together > 1 or (in_order and (rows.length % 8 == 0 or rows.split == rows.shape)):
            room *= 8
        size = min(blocks.rows_block(x.size, itemsize, work), room)
        # In steps of eight rows, so that blocks of columns do not share bytes.
        together = max(together, 8 if size >= 8 * rows.length else 1)
        parts = list(_blocks_of_rows(rows, size, together))
        _over(parts, task, rows, inputs, False, work)
        return
    xp = libraries.library(x)
    flat: list[Any] = [_side_by_side(a, rows) for a in inputs]
    for part in _slabs(rows, DEVICE_SIGNS // levels):
        cut: list[Any] = [a if isinstance(a, np.generic) else a[part.rows] for a in flat]
        signs = scratch("signs", (levels, *cut[0].shape), np.int8, x)
        of_part = xp.empty((levels, len(cut[0]), 1), scales.dtype)
        on(*cut, *static, scales=of_part, signs=signs)
        scales[:, part.rows] = of_part[..., 0]
        finish(part, signs)


def _slabs(rows: Rows, size: int) -> Iterator[Part]:
    """Blocks of rows of about `size` elements on a device, that do not share bytes of planes.

    Rows that lie across lines come in one block.
    """
    if not rows.order or rows.order[0] != 0 or not rows.scale_shape:
        yield _ALL
        return
    leading = rows.scale_shape[0]
    inner = rows.count // leading
    step = max(8, size // max(1, inner * rows.length) // 8 * 8)
    for start in range(0, leading, step):
        stop = min(start + step, leading)
        yield Part(slice(start * inner, stop * inner), slice(0, 1), (slice(start, stop), ...))


# ---------------------------------------------------------------- lines


def for_each_lines(
    task: Callable[[slice, slice], None],
    lines: Lines,
    run: int,
    x: Array,
    at_once: int | None = None,
    *,
    least: int | None = None,
    work: int | None = None,
) -> None:
    """Call ``task(lines, elements)`` for blocks that tile some lines, with x's library.

    On a device there is a single block. On the host they fit the cache, and several threads take
    them. A block of a long line begins at a byte, and with a run of `run` elements.
    With `at_once` blocks have so many whole lines. With `least` there is a block for each thread,
    of at least so many. `work` is that of `blocks.threads`; if it is not given, what a form that
    goes through the elements once takes.
    """
    size, whole = lines.count * lines.length, slice(0, lines.length)
    work = work_on(size) if work is None else work
    if not size:
        return
    if libraries.on_device(x):
        task(slice(0, lines.count), whole)
        return
    if max(size, work) <= blocks.BLOCK:
        blocks.alone(task, slice(0, lines.count), whole)
        return
    block = blocks.elements_block(size, work)
    # What is narrowed lies in scratch before.
    longest = blocks.BLOCK if floats.is_narrow(x.dtype) else block
    if least is not None:
        parts = [(share, whole) for share in blocks.shares(lines.count, least, work)]
    elif at_once is not None or lines.length <= longest:
        step = at_once or max(1, max(LINES_AT_ONCE, block) // lines.length)
        parts = [(slice(start, min(start + step, lines.count)), whole)
                 for start in range(0, lines.count, step)]  # fmt: skip
    else:
        unit = math.lcm(8, run)
        step = max(1, longest // unit) * unit
        cuts = [slice(start, min(start + step, lines.length))
                for start in range(0, lines.length, step)]  # fmt: skip
        parts = [(slice(line, line + 1), cut) for line in range(lines.count) for cut in cuts]
    blocks.each(lambda part: task(*part), parts, work)


# ---------------------------------------------------------------- element by element


def elements(primitive: Elementwise, *inputs: Any, **outputs: Array) -> None:
    """Run an elementwise primitive: one launch on a device, blocks over threads on the host."""
    output = next(iter(outputs.values()))
    if not output.flags.c_contiguous:
        # The same elements in the order in which they lie.
        order = libraries.memory_order(output)
        inputs = tuple(_turned(a, order) for a in inputs)
        outputs = {name: a.transpose(order) for name, a in outputs.items()}
        output = next(iter(outputs.values()))
    if libraries.on_device(output):
        primitive(*inputs, **outputs)
        return
    size = output.size
    on = primitive.on_host(size)
    if not all(a.flags.carray for a in outputs.values()):
        on = primitive.function  # loops write nothing else
    looped, shape = on is not primitive.function, output.shape
    spread = [np.broadcast_to(a, shape) if isinstance(a, np.ndarray) and a.shape != shape else a
              for a in inputs]  # fmt: skip
    if size <= blocks.BLOCK and looped:
        on(*spread, **outputs)
        return
    if size <= blocks.BLOCK:
        blocks.alone(on, *spread, **outputs)
        return
    # Loops wait for memory: their work is the bytes moved, in float32 read and written.
    work = sum(a.nbytes for a in (*inputs, *outputs.values())) // 8 if looped else size * BODY

    def run(block: blocks.Block) -> None:
        cut = [a[block] if isinstance(a, np.ndarray) else a for a in spread]
        on(*cut, **{name: a[block] for name, a in outputs.items()})

    blocks.each(run, list(blocks.tile(shape, blocks.elements_block(size, work))), work)


def is_finite(x: Array) -> bool:
    """Whether `x` has no NaN and no infinity."""
    if libraries.on_device(x):
        return bool(libraries.library(x).isfinite(x).all())
    ordered = x.transpose(libraries.memory_order(x))
    finite: list[bool] = []
    blocks.each(
        lambda block: finite.append(bool(np.isfinite(ordered[block]).all())),
        list(blocks.tile(ordered.shape)),
        x.size,
    )
    return all(finite)


def _turned(array: Any, order: Sequence[int]) -> Any:
    """An array that broadcasts to ``len(order)`` axes, with these in another order."""
    if isinstance(array, np.generic) or not array.ndim:
        return array
    if array.ndim < len(order):
        array = array.reshape((1,) * (len(order) - array.ndim) + array.shape)
    return array.transpose(order)


def _side_by_side(array: Any, rows: Rows) -> Any:
    """An array as rows whose elements lie side by side, a copy if need be. Scalars stay."""
    if isinstance(array, np.generic):
        return array
    return teams.side_by_side(rows.flat(array))


def elements_of_rows(
    primitive: Elementwise, rows: Rows, inputs: Sequence[Any], scales: list[Array], *, out: Array
) -> None:
    """Run an elementwise primitive on the elements of rows and the scales of these rows.

    Parameters
    ----------
    primitive : Elementwise
        Its last input is variadic: the scales.
    rows : Rows
    inputs : sequence
        Arrays of the rows' shape, or scalars.
    scales : list of array, shape (rows, 1)
    out : array
        Of the rows' shape. It is an input itself, or does not overlap any.
    """
    on = form(primitive, out)
    name = primitive.outputs[-1][1]
    view = rows.view(out)
    compiled = on is not primitive.function and not floats.is_narrow(out.dtype)
    levels = len(scales)
    work = _work_on_levels(rows, levels)
    size = blocks.elements_block(rows.size, work) if compiled else blocks.BLOCK

    def task(part: Part, *flat: Any) -> None:
        of_part = [scale[part.rows] for scale in scales]
        write(lambda y: on(*flat, *of_part, **{name: y}), view[part.block], flat[0].shape)

    for_each_part(task, rows, *inputs, size=size, levels=levels)


def for_each_part(
    task: Callable[..., None],
    rows: Rows,
    *inputs: Any,
    one_by_one: bool = False,
    size: int = blocks.BLOCK,
    levels: int = 1,
) -> None:
    """Call ``task(part, *inputs)`` for parts that tile the rows, each input as (rows, n).

    On a device there is a single part. On the host parts are blocks that fit the cache, and several
    threads take them. An input is an array of the rows' shape, or a scalar, which is passed on.
    Blocks have about `size` elements: whole rows, or pieces of long ones. Pieces of long rows that
    lie side by side come together, or else `one_by_one`. The task has so many `levels`.
    """
    device = any(map(libraries.on_device, inputs))
    if device:
        parts = [_ALL]
    else:
        parts = list(_parts(rows, 1 if one_by_one else _together(rows, inputs[0]), size))
    _over(parts, task, rows, inputs, device, _work_on_levels(rows, levels))


def search_loops(module: ModuleType, x: Array, steps: int | None = None) -> Any:
    """The compiled loops beside a module for a search over `x`, or None where they do not pay.

    `steps` is the work: one step for each element and state. Without it, the loops do pay.
    """
    if libraries.on_device(x) or not (steps is None or blocks.pays(steps)):
        return None
    return blocks.loops(module.__name__)


def for_each_searched(
    task: Callable[..., None],
    rows: Rows,
    states: int,
    *inputs: Any,
    name: str,
    compiled: bool = False,
) -> None:
    """Call ``task(part, *inputs)`` for blocks of whole rows, however long these are.

    A search has several arrays with an entry for every element, or for each of `states` states of
    every row. Blocks are as large as memory allows. If the search is `compiled`, they fit the
    cache, since rows are sorted there. A long search has a progress bar of that name.
    """
    device = any(map(libraries.on_device, inputs))
    block = SEARCHED_ON_DEVICE if device else SEARCHED
    size = rows.count * rows.length
    work = size * SORTING
    if compiled:
        block = blocks.sorted_block(size, work)
    # Long rows come one by one, as in `for_each_part`, which cuts them into pieces.
    rows_at_once = 1 if is_long(rows, inputs[0]) else block // max(rows.length, states)
    parts = list(_blocks_of_rows(rows, rows_at_once * rows.length))
    if len(parts) > 1 and size * states >= LONG_SEARCH:
        with progress.counted(task, name, "block", len(parts)) as task:
            _over(parts, task, rows, inputs, device, work)
    else:
        _over(parts, task, rows, inputs, device, work)


def row_slices(x: Array) -> list[slice]:
    """Slices that tile the rows of `x`, (rows, n): on the host each fits the cache."""
    if libraries.on_device(x):
        return [slice(None)]
    return [rows for (rows,) in blocks.tile((len(x),), max(1, blocks.BLOCK // x.shape[1]))]


def tiles(x: Array) -> Iterator[tuple[slice, slice]]:
    """Blocks of rows and of elements that tile `x`, (rows, n): on the host each fits the cache."""
    shape = x.shape
    size = x.size if libraries.on_device(x) else blocks.BLOCK
    for cuts in blocks.tile(shape, size):
        rows, cut = (slice(*cut.indices(n)) for cut, n in zip(cuts, shape, strict=True))
        yield rows, cut


def is_long(rows: Rows, x: Array) -> bool:
    """Whether `for_each_part` cuts the rows of `x` into pieces."""
    return rows.length > blocks.BLOCK and not libraries.on_device(x)


def partial_results(
    primitive: Reduction, rows: Rows, inputs: Sequence[Any], scales: list[Array]
) -> list[Array]:
    """The outputs of a reduction for every piece of every row, each as (rows, pieces).

    `inputs` are arrays of the rows' shape or scalars, `scales` arrays of shape (rows, 1).
    """
    if libraries.on_device(inputs[0]):
        return _partial_results_on_device(primitive, rows, inputs, scales)
    on = form(primitive, inputs[0])
    long = rows.length > blocks.BLOCK
    pieces = sum(1 for _ in blocks.tile(rows.inner_shape, blocks.PIECE)) if long else 1
    results = [np.zeros((rows.count, pieces), kind) for kind, _ in primitive.outputs]
    names = [name for _, name in primitive.outputs]

    def reduce(part: Part, *flat: Any) -> None:
        at, several = (part.rows, part.piece), part.piece.stop - part.piece.start
        if several > 1:  # of one row: for the primitive they are rows
            flat = tuple(a if np.ndim(a) == 0 else a.reshape(several, -1) for a in flat)
        of_part = {name: result[at].reshape(-1, 1)
                   for name, result in zip(names, results, strict=True)}  # fmt: skip
        on(*flat, *(scale[part.rows] for scale in scales), **of_part)

    # Bodies add the elements of one long row more exactly than those of rows side by side. Loops
    # read every row once, so that larger blocks of them, of which there are fewer, are faster.
    body = on is primitive.function
    levels = len(scales) + 1
    work = _work_on_levels(rows, levels)
    size = blocks.BLOCK if body else blocks.elements_block(rows.size, work)
    for_each_part(reduce, rows, *inputs, one_by_one=body, size=size, levels=levels)
    return results


def _partial_results_on_device(
    primitive: Reduction, rows: Rows, inputs: Sequence[Any], scales: list[Array]
) -> list[Array]:
    xp: Any = libraries.library(inputs[0])
    flat = [a if isinstance(a, np.generic) else rows.flat(a) for a in inputs]
    # The full pieces of all rows take one launch, and the shorter last pieces another.
    full_pieces = rows.length // DEVICE_PIECE if rows.length > 2 * DEVICE_PIECE else 0
    full = full_pieces * DEVICE_PIECE
    pieces = full_pieces + (full < rows.length or not full_pieces)
    results = [xp.empty((rows.count, pieces, 1), kind) for kind, _ in primitive.outputs]
    spread = [scale[:, None] for scale in scales]

    def reduce(cut: Callable[[Array], Array], at: slice) -> None:
        outputs = {
            name: result[:, at]
            for (_, name), result in zip(primitive.outputs, results, strict=True)
        }
        primitive(*(a if isinstance(a, np.generic) else cut(a) for a in flat), *spread, **outputs)

    if full_pieces:
        shape = (rows.count, full_pieces, DEVICE_PIECE)
        reduce(lambda a: a[:, :full].reshape(shape), slice(0, full_pieces))
    if pieces > full_pieces:
        reduce(lambda a: a[:, None, full:], slice(full_pieces, pieces))
    return [result[..., 0] for result in results]


def write(task: Callable[[Array], None], target: Array, shape: tuple[int, ...]) -> None:
    """Call ``task(y)`` with an array y of `shape` whose content then is that of `target`.

    It is a view of `target` where strides allow one, else a copy that is written back.
    """
    runs = runs_of(target, shape)
    if runs is not None:
        flat = np.empty(shape, target.dtype)
        task(flat)
        runs[...] = flat.view(runs.dtype).reshape(runs.shape)
        return
    flat = target.reshape(shape)
    if libraries.on_device(flat) and flat.ndim > 1:
        flat = teams.side_by_side(flat)
    task(flat)
    if not libraries.library(flat).may_share_memory(flat, target):
        target[...] = flat.reshape(target.shape)


# ---------------------------------------------------------------- parts


def _over(
    parts: Sequence[Part],
    task: Callable[..., None],
    rows: Rows,
    inputs: Sequence[Any],
    device: bool,
    work: int,
) -> None:
    """Call ``task(part, *inputs)`` for all parts, each input as (rows, n).

    `work` is that of `blocks.threads`.
    """
    if len(parts) == 1 and parts[0].block == (...,):
        flat = [a if isinstance(a, np.generic) else rows.flat(a) for a in inputs]
        blocks.each(lambda part: task(part, *flat), parts, work)
        return
    views = [a if isinstance(a, np.generic) else rows.view(a) for a in inputs]

    def run(part: Part) -> None:
        flat = []
        for view in views:
            if isinstance(view, np.generic):
                flat.append(view)
                continue
            cut = view[part.block]
            flat.append(flattened(cut, rows.flat_shape(cut.shape)))
        task(part, *flat)

    blocks.each(run, parts, work)


def work_on(size: int) -> int:
    """The work of a form that goes through so many elements once, for `blocks.threads`."""
    return size if blocks.is_ready(size) else size * BODY


def _work_on_levels(rows: Rows, levels: int) -> int:
    """The work of so many levels: each is half that of reading and writing the elements."""
    return work_on(rows.count * rows.length * (levels + 1) // 2)


def _work_on_rows(primitive: Raw, rows: Rows, on: Callable[..., None], levels: int) -> int:
    """The work of a form of a primitive on whole rows."""
    if on is primitive.function:
        return rows.count * rows.length * levels * BODY
    return rows.count * primitive.row_work(rows.length, levels)


def _together(rows: Rows, x: Array) -> int:
    """The fewest rows of a block: several where they lie side by side, as columns do."""
    if not rows.scale_shape or rows.length < 2:
        return 1
    steps = rows.view(x).strides
    side_by_side = steps[len(rows.scale_shape) - 1] == x.itemsize < abs(steps[-1])
    return blocks.rows_together(rows.count) if side_by_side else 1


def _parts(rows: Rows, together: int, size: int) -> Iterator[Part]:
    """Blocks of whole rows, or pieces of long ones, that fit the cache of the host."""
    if rows.length <= blocks.BLOCK:
        yield from _blocks_of_rows(rows, size, together)
        return
    at_once = size // blocks.PIECE if together == 1 else 1
    for numbers, head in _row_blocks(rows, together):
        for pieces, inner in _pieces(rows.inner_shape, at_once):
            yield Part(numbers, pieces, (*head, *inner, ...))


def _pieces(shape: tuple[int, ...], at_once: int) -> Iterator[tuple[slice, blocks.Block]]:
    """The numbers of the pieces of a row of this shape, and the block that they are.

    Up to `at_once` of one length come together, where they make up a block.
    """
    tiles, first = list(blocks.tile(shape, blocks.PIECE)), 0
    while first < len(tiles):
        size = blocks.extent(tiles[first], shape)
        for stop in range(min(first + max(1, at_once), len(tiles)), first, -1):
            ends = zip(tiles[first], tiles[stop - 1], strict=True)
            block = tuple(slice(one.start, other.stop) for one, other in ends)
            if blocks.extent(block, shape) == size * (stop - first):
                break
        yield slice(first, stop), block
        first = stop


def _blocks_of_rows(rows: Rows, size: int, together: int = 1) -> Iterator[Part]:
    """Blocks of whole rows of up to `size` elements, but at least `together` rows each."""
    if 0 < rows.count * rows.length <= size:
        yield Part(slice(0, rows.count), slice(0, 1), (...,))
        return
    at_once = max(1, size // max(1, rows.length)) // together * together
    for numbers, head in _row_blocks(rows, max(together, at_once)):
        yield Part(numbers, slice(0, 1), (*head, ...))


def _row_blocks(rows: Rows, at_once: int) -> Iterator[tuple[slice, blocks.Block]]:
    """Slices that tile the numbers of the rows, and the indices of these rows in the view."""
    start = 0
    for cut in blocks.tile(rows.scale_shape, at_once):
        stop = start + blocks.extent(cut, rows.scale_shape)
        yield slice(start, stop), cut
        start = stop
