"""The solvers `refined` and `alternating` on whole rows: on a device in one launch.

A team of threads holds the magnitudes of a row in registers, as `cubin.core.teams` describes. They
are not sorted: a least-squares step goes over them once for every threshold. The compiled loops do
the same with a row in the cache, also where there are more levels or importance.
"""

from __future__ import annotations

import numpy as np

from cubin.codes.levels import decode, pack_codes
from cubin.core import teams
from cubin.core.primitives import FLOATS, raw, source
from cubin.solvers import search
from cubin.solvers.lookup import Lookup
from cubin.solvers.sorted_rows import SortedRows

_CUDA = source(__file__)

MAX_LEVELS = 4
"""The most levels of the primitives. Beyond, sorting is faster on a device: the thresholds double
with every level."""

LOOPS_FROM = 1 << 16
"""Elements from which on the compiled loops are used, whether Numba is loaded already or not.

They add in another order than the body, so that the choice must depend on the array alone."""

EDGES, EDGES_WITH_MORE = 128, 192
"""The most edges that the compiled loops compare a row with. Beyond, they sort it. Sorting takes
longer where there is a map or importance, since these are brought in order as well."""

CONVERGING = 11
"""The iterations to count on where `alternating` goes on until it converges."""

ROOM: teams.Room = ((16, 12, 8), (16, 12, 8), (8, 8, 4))
"""How many elements a thread holds. It has fewer registers for them than greedy: a solver's state
takes some."""


def compares(levels: int, iterations: int, more: bool) -> bool:
    """Whether compiled loops solve a row faster by comparing it with all edges than by sorting it.

    `more` says whether there is a map or importance. An iteration has as many edges as all levels
    that are added one by one.
    """
    rounds = 1 + min(iterations, CONVERGING)
    return rounds << (levels - 1) <= (EDGES_WITH_MORE if more else EDGES)


def _row_work(length: int, levels: int) -> int:
    """The work of the loops on a row, as measured: that on its elements, and on the equations and
    edges of its codes."""
    return length * (levels + 1) + (64 << levels)


@raw(
    "T x, uint8 bits, static int levels, static bool refit, static int iterations",
    "T y",
    code=_CUDA,
    launch=teams.RowLaunch(ROOM, MAX_LEVELS),
    looped=True,
    loops_from=LOOPS_FROM,
    row_work=_row_work,
    types=FLOATS,
    preamble=teams.CUDA,
)
def reconstruct_rows(
    x: np.ndarray, bits: np.ndarray, levels: int, refit: bool, iterations: int, *, y: np.ndarray
) -> None:
    """The approximation of whole rows."""
    lookup = _solved(x, bits, levels, refit, iterations)
    decode.function(lookup.codes(x, bits), bits, *lookup.scales, y=y)


@raw(
    "T x, uint8 bits, static int levels, static bool refit, static int iterations",
    "W scales, int8 signs",
    code=_CUDA,
    launch=teams.RowLaunch(ROOM, MAX_LEVELS),
    looped=True,
    loops_from=LOOPS_FROM,
    row_work=_row_work,
    types=FLOATS,
    preamble=teams.CUDA,
)
def solve_rows(
    x: np.ndarray,
    bits: np.ndarray,
    levels: int,
    refit: bool,
    iterations: int,
    *,
    scales: np.ndarray,
    signs: np.ndarray,
) -> None:
    """The scales of whole rows, (levels, rows, 1), and their signs, as `greedy.encode_rows`."""
    lookup = _solved(x, bits, levels, refit, iterations)
    scales[...] = lookup.scales
    pack_codes(lookup.codes(x, bits), bits, signs)


def _solved(x: np.ndarray, bits: np.ndarray, levels: int, refit: bool, iterations: int) -> Lookup:
    magnitudes = SortedRows(x, bits, levels, None)
    codebooks = (
        search.refined(magnitudes, levels)
        if refit
        else search.alternating(magnitudes, levels, iterations)
    )
    return Lookup(magnitudes, codebooks, levels)
