"""Bit maps: how many bits every element gets.

A map is information, too: whoever decodes must have it. The *payload bits* of a code are the mean
of its map; its *effective bits* add the entropy of the map, and the scales. An element-wise map
that is made by looking at `x` says something about each |x|, so that the error can lie below
Shannon's bound at the payload bits; at the effective bits it cannot. A map with one entry per row
costs next to nothing. ``cubin.quantize(x, bits)`` has both as ``.payload_bits`` and
``.effective_bits``.
"""

from __future__ import annotations

from cubin.bitmaps.allocation import allocate
from cubin.bitmaps.budgets import budget
from cubin.bitmaps.columns import columns
from cubin.bitmaps.patterns import bottom_up, middle_out, random, top_down, uniform
from cubin.bitmaps.threshold import ternary

__all__ = [
    "allocate",
    "bottom_up",
    "budget",
    "columns",
    "middle_out",
    "random",
    "ternary",
    "top_down",
    "uniform",
]


def __dir__() -> list[str]:
    return sorted(__all__)
