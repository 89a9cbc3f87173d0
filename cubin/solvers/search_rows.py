"""The solvers `refined` and `alternating` on whole rows: on a device in one launch.

A team of threads holds the magnitudes of a row, unsorted, as `cubin.core.teams` describes. Each
least-squares step is one pass over them for every threshold. The compiled loops do the same with a
row that is in the cache.
"""

from __future__ import annotations

import numpy as np

from cubin.codes.levels import decode, level_signs
from cubin.core import teams
from cubin.core.primitives import FLOATS, raw, source
from cubin.solvers import search
from cubin.solvers.lookup import Fit
from cubin.solvers.sorted_rows import Magnitudes

_CUDA = source(__file__)

MAX_LEVELS = 4
"""From here on sorting pays: the thresholds double with every level."""

LOOPS_FROM = 1 << 16
"""Elements from which on compiled loops work, whatever is loaded: they round in another way."""

ROOM: teams.Room = ((16, 12, 8), (16, 12, 8), (8, 8, 4))
"""How many elements a thread holds, beside the state of a solver."""


@raw(
    "T x, uint8 bits, static int levels, static bool refit, static int iterations",
    "T y",
    code=_CUDA,
    launch=teams.RowLaunch(ROOM, MAX_LEVELS),
    looped=True,
    loops_from=LOOPS_FROM,
    types=FLOATS,
    preamble=teams.CUDA,
)
def reconstruct_rows(
    x: np.ndarray, bits: np.ndarray, levels: int, refit: bool, iterations: int, *, y: np.ndarray
) -> None:
    """What the codes and scales of whole rows stand for."""
    fit = _fitted(x, bits, levels, refit, iterations)
    decode.function(fit.codes(x, bits), bits, *fit.scales, y=y)


@raw(
    "T x, uint8 bits, static int levels, static bool refit, static int iterations",
    "W scales, int8 signs",
    code=_CUDA,
    launch=teams.RowLaunch(ROOM, MAX_LEVELS),
    looped=True,
    loops_from=LOOPS_FROM,
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
    """The scales of whole rows, (levels, rows, 1), and their signs, (levels, rows, length)."""
    fit = _fitted(x, bits, levels, refit, iterations)
    code = fit.codes(x, bits)
    for level, scale in enumerate(fit.scales):
        scales[level] = scale
        level_signs.function(code, bits, np.uint8(level), sign=signs[level])


def _fitted(x: np.ndarray, bits: np.ndarray, levels: int, refit: bool, iterations: int) -> Fit:
    magnitudes = Magnitudes(x, bits, levels, None)
    cells = (
        search.refined(magnitudes, levels)
        if refit
        else search.alternating(magnitudes, levels, iterations)
    )
    return Fit(magnitudes, cells, levels)
