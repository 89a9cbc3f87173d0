"""The scales and signs of an array, as the solvers fill them in: in one launch or part by part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cubin.codes.levels import level_signs
from cubin.core import floats, libraries, passes, teams
from cubin.core.host import blocks
from cubin.core.libraries import Array
from cubin.core.passes import Part
from cubin.core.primitives import Raw
from cubin.core.rows import Rows


class Encoding:
    """Scales and signs that wait to be filled in.

    Parameters
    ----------
    x : array
    levels : int
    rows : Rows
        The layout of `x`.

    Attributes
    ----------
    scales : array in the dtype of x, shape (levels, rows)
    signs : array of int8, shape (levels, *x.shape)
    """

    def __init__(self, x: Array, levels: int, rows: Rows) -> None:
        xp = self._xp = libraries.library(x)
        self.rows = rows
        self.scales = xp.zeros((levels, rows.count), x.dtype)
        self.signs = libraries.result((levels, *x.shape), np.int8, x)
        loops = None if libraries.on_device(x) else blocks.compiled("cubin.code_loops", x.size)
        self._signs_at: Any = level_signs if loops is None else loops.level_signs

    def fill(self, primitive: Raw, x: Array, bits: Any, *static: Any) -> None:
        """Have one launch of `primitive` write everything."""
        rows, levels = self.rows, len(self.scales)
        view = rows.view(self.signs, lead=1)
        target = view if view.flags.c_contiguous else self._xp.empty(view.shape, np.int8)
        scales = self.scales.astype(floats.work_dtype(x.dtype), copy=False)
        primitive(
            teams.flat(x, rows),
            teams.flat(bits, rows),
            levels,
            *static,
            scales=scales[..., None],
            signs=target.reshape(levels, rows.count, rows.length),
        )
        if target is not view:
            view[...] = target
        self.scales = scales.astype(x.dtype, copy=False)

    def fill_part(self, part: Part, primitive: Callable[..., None], x: Array, bits: Any) -> None:
        """Have `primitive` write what belongs to some whole rows, `x` and `bits` as (rows, n)."""
        levels = len(self.scales)
        target = self.rows.view(self.signs, lead=1)[(slice(None), *part.block)]

        def encode(flat: Array) -> None:
            primitive(x, bits, levels, scales=self.scales[:, part.rows, None], signs=flat)

        passes.write(encode, target, (levels, *x.shape))

    def store(self, part: Part, code: Array, bits: Array, scales: list[Array]) -> None:
        """Take the packed codes of some rows, with their bits as (rows, n), and their scales,
        (rows, 1) for each level."""
        for level, scale in enumerate(scales):
            self.scales[level, part.rows] = scale[:, 0]
            target = self.rows.view(self.signs[level, ...])[part.block]

            def find(flat: Array, level: int = level) -> None:
                self._signs_at(code, bits, np.uint8(level), sign=flat)

            passes.write(find, target, code.shape)
