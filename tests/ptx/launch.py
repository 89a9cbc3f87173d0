"""Running one kernel over a grid, and what was seen while it ran."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from tests.ptx.compiler import SOURCE_NAME
from tests.ptx.machine import Batch, Geometry, Kernel, Layout, batches
from tests.ptx.memory import Allocation, Bytes, Reach

MOST_THREADS = 1024
MOST_DEEP = 64
MOST_BLOCKS = (2**31 - 1, 65535, 65535)
MOST_SHARED = 48 * 1024


@dataclass(frozen=True)
class Launch:
    """What one launch did.

    Attributes
    ----------
    kernel : str
        Its name as CuPy calls it.
    geometry : Geometry
        Grid, block and dynamic shared bytes.
    instructions : int
        PTX instructions executed, summed over threads.
    read, written : int
        Bytes of global memory moved, every access counted.
    read_unique, written_unique : int
        Bytes of global memory touched, each counted once.
    """

    kernel: str
    geometry: Geometry
    instructions: int
    read: int
    written: int
    read_unique: int
    written_unique: int


@dataclass
class Lines:
    """Source lines that have code, and those that ran, of one source text."""

    known: set[int] = field(default_factory=set)
    executed: set[int] = field(default_factory=set)


LAUNCHES: list[Launch] = []
"""Every launch of this process so far, oldest first."""

EXECUTED: set[str] = set()
"""The names of all kernels that ran so far, without template arguments."""

COVERAGE: dict[tuple[str, str], Lines] = defaultdict(Lines)
"""Lines of every (architecture, source text) that ran so far."""


def run(
    kernel: Kernel,
    geometry: Geometry,
    parameters: Bytes,
    extents: Iterable[tuple[Allocation, int, int, int]],
) -> Launch:
    """Run `kernel` to its end.

    Parameters
    ----------
    kernel : Kernel
        What runs.
    geometry : Geometry
        Grid and block.
    parameters : array of uint8
        The parameter block as the kernel reads it.
    extents : iterable of (allocation, start, end, granule)
        The only global memory that the kernel may touch; `granule` is the item size there.

    Raises
    ------
    Fault
        At the first rule broken.
    ValueError
        For a launch that CUDA refuses.
    """
    limit = kernel.function.max_threads or MOST_THREADS
    if not 0 < geometry.threads <= min(limit, MOST_THREADS):
        raise ValueError(
            f"{kernel.title}: {geometry.threads} threads in a block of at most {limit}"
        )
    if geometry.block[2] > MOST_DEEP or any(np.greater(geometry.grid, MOST_BLOCKS)):
        raise ValueError(
            f"{kernel.title}: grid {geometry.grid} of blocks {geometry.block}, over "
            f"{MOST_BLOCKS} or {MOST_DEEP} deep"
        )
    variables = [*kernel.function.variables, *kernel.program.variables.values()]
    shared, constant, local = (
        Layout.of([v for v in variables if v.space in spaces], geometry.shared if dynamic else 0)
        for spaces, dynamic in (
            (("shared",), True),
            (("const", "global"), False),
            (("local",), False),
        )
    )
    used = int(shared.valid.sum())
    if used > MOST_SHARED:
        raise ValueError(f"{kernel.title}: {used} bytes of shared memory, over {MOST_SHARED}")
    reach = Reach(extents)
    padded = np.zeros((len(parameters) // 16 + 2) * 16, np.uint8)
    padded[: len(parameters)] = parameters
    executed: set[int] = set()
    instructions = 0
    starts = batches(geometry, shared.size, local.size)
    with np.errstate(all="ignore"):
        for first in starts:
            blocks = min(starts.step, geometry.blocks - first)
            batch = Batch(kernel, geometry, first, blocks, reach, padded, shared, constant, local)
            batch.run()
            executed |= batch.executed
            instructions += batch.instructions
    _note_lines(kernel, executed)
    parts = reach.segments
    launch = Launch(
        kernel.title,
        geometry,
        instructions,
        sum(s.read_total for s in parts),
        sum(s.written_total for s in parts),
        sum(s.read_unique for s in parts),
        sum(s.written_unique for s in parts),
    )
    LAUNCHES.append(launch)
    EXECUTED.add(kernel.title.partition("<")[0])
    return launch


def _note_lines(kernel: Kernel, executed: set[int]) -> None:
    own = {number for number, path in kernel.program.files.items() if path.endswith(SOURCE_NAME)}
    lines = COVERAGE[kernel.arch, kernel.source]
    for start, places in kernel.lines.items():
        numbers = {line for file, line in places if file in own}
        lines.known |= numbers
        if start in executed:
            lines.executed |= numbers
