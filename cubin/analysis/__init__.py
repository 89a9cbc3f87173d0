"""Error against bit width: sweeps over arrays, tables and figures."""

from __future__ import annotations

from cubin.analysis.plot import draw_error_per_bit_width
from cubin.analysis.sweep import error_per_bit_width
from cubin.analysis.table import ErrorRow, ErrorTable

__all__ = ["ErrorRow", "ErrorTable", "draw_error_per_bit_width", "error_per_bit_width"]


def __dir__() -> list[str]:
    return sorted(__all__)
