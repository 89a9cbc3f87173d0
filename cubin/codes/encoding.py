"""The scales and signs of an array, as the solvers fill them in: in one pass or part by part."""

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
    """Scales and signs that wait to be filled in.

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
        """Have a primitive on whole rows write everything."""
        passes.whole_rows(primitive, self.rows, inputs, *static, out=self.signs, scales=self.scales)

    def store(self, part: Part, code: Array, bits: Any, scales: list[Array]) -> None:
        """Take the packed codes of some rows, with their bits as (rows, n), and their scales,
        (rows, 1) for each level."""
        view = self.rows.view(self.signs, lead=1)
        for level, scale in enumerate(scales):
            self.scales[level, part.rows] = scale[:, 0]

            def unpack(flat: Array, level: int = level) -> None:
                self._unpack(code, bits, np.uint8(level), sign=flat)

            passes.write(unpack, view[(level, *part.block)], code.shape)
