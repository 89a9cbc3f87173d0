"""Encoding: scales and signs of an array while a solver fills them in."""

from __future__ import annotations

from typing import Any

import numpy as np

from cubin.codes.levels import level_signs
from cubin.core import floats, libraries, passes
from cubin.core.libraries import Array
from cubin.core.passes import Part
from cubin.core.primitives import Raw
from cubin.core.rows import Rows


class Encoding:
    """Scales and signs of an array, filled in by one primitive or part by part.

    Parameters
    ----------
    x : array
    levels : int
    rows : Rows
        The layout of `x`.

    Attributes
    ----------
    scales : array in the work dtype, shape (levels, rows)
    signs : array of int8, shape (levels, *x.shape)
    """

    def __init__(self, x: Array, levels: int, rows: Rows) -> None:
        self.rows = rows
        xp = libraries.library(x)
        self.scales = xp.zeros((levels, rows.count), floats.work_dtype(x.dtype))
        self._unpack = passes.form(level_signs, x)
        self.signs = libraries.result((levels, *x.shape), np.int8, x)

    def fill(self, primitive: Raw, inputs: Any, *static: Any) -> None:
        """Run a primitive on whole rows, which writes all scales and signs."""
        passes.whole_rows(primitive, self.rows, inputs, *static, out=self.signs, scales=self.scales)

    def store(self, part: Part, code: Array, bits: Any, scales: list[Array]) -> None:
        """Write the signs and scales of a part.

        Parameters
        ----------
        part : Part
        code : array of uint16, shape (rows, n)
            Packed: bit i is the sign of level i.
        bits : uint8 scalar or array of shape (rows, n)
        scales : list of array, shape (rows, 1)
            For each level.
        """
        view = self.rows.view(self.signs, lead=1)
        for level, scale in enumerate(scales):
            self.scales[level, part.rows] = scale[:, 0]

            def unpack(flat: Array, level: int = level) -> None:
                self._unpack(code, bits, np.uint8(level), sign=flat)

            passes.write(unpack, view[(level, *part.block)], code.shape)
