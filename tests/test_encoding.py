"""Where the signs of rows go: every layout of rows and of memory, in any form, in small blocks."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import cubin
from cubin.core.host import blocks
from tests import reference

LAYOUTS = [
    ((40, 64), {"channel_axis": 0}),
    ((40, 27), {"channel_axis": 0}),
    ((300, 5), {"channel_axis": 0}),
    ((40, 64), {"channel_axis": 1}),
    ((19, 43), {"channel_axis": 1}),
    ((2, 200), {"channel_axis": 1}),
    ((1, 70), {"channel_axis": 1}),
    ((70, 1), {"channel_axis": 0}),
    ((33, 27), {}),
    ((33, 32), {}),
    ((100,), {}),
    ((100,), {"channel_axis": 0}),
    ((11, 64), {"group_size": 16}),
    ((11, 81), {"group_size": 27}),
    ((11, 70), {"group_size": 16}),
    ((11, 30), {"group_size": 4}),
    ((20, 3, 16), {"channel_axis": 0}),
    ((20, 3, 16), {"channel_axis": 1}),
    ((20, 3, 16), {"channel_axis": 2}),
    ((20, 3, 17), {"channel_axis": 2}),
    ((20, 3, 16), {"channel_axis": (0, 1)}),
    ((20, 3, 16), {"channel_axis": (2, 0)}),
    ((5, 24, 3, 3), {"channel_axis": 1}),
    ((3, 2, 24, 2), {"group_size": 2}),
]

ORDERS = {
    "C": lambda x: x,
    "Fortran": np.asfortranarray,
    "upside down": lambda x: x[::-1].copy()[::-1],
    "mirrored": lambda x: x[..., ::-1].copy()[..., ::-1],
    "every other": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "not aligned": lambda x: _not_aligned(x),
}


def _not_aligned(x):
    around = np.empty(x.nbytes + 1, np.uint8)
    y = around[1:].view(x.dtype).reshape(x.shape)
    y[...] = x
    return y


def signs_by_definition(x, bits, code, **layout):
    """The signs that residuals have with the scales of a code."""
    signs = np.zeros((len(code.scales), *x.shape), np.int8)
    for row, indices in reference.rows(x.shape, **layout).items():
        at = tuple(np.array(indices).T)
        r, depth = x[at], np.broadcast_to(bits, x.shape)[at]
        for level, scale in enumerate(code.scales[(slice(None), *row)]):
            sign = np.where(r > 0, 1, -1).astype(x.dtype)
            signs[(level, *at)] = np.where(depth > level, sign, 0)
            r = r - sign * scale
    return signs


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("shape", "layout"), LAYOUTS)
def test_signs_of_every_layout(rng, monkeypatch, shape, layout, order, compiled):
    if compiled:
        pytest.importorskip("numba")
    monkeypatch.setattr(blocks, "COMPILED", 0 if compiled else sys.maxsize)
    monkeypatch.setattr(blocks, "WHOLE_ROWS", 512)
    monkeypatch.setattr(blocks, "COMPILED_ROWS", (512, 512))
    for dtype in (np.float32, np.float64):
        x = ORDERS[order](rng.normal(size=shape).astype(dtype))
        for bits in (3, rng.integers(0, 4, shape), rng.integers(0, 4, shape).astype(np.uint8)):
            code = cubin.quantize(x, bits, **layout)
            signs = signs_by_definition(x, bits, code, **layout)
            np.testing.assert_array_equal(code.signs, signs)
            lines = signs.reshape(len(signs), shape[0] if len(shape) > 1 else 1, -1)
            planes = np.packbits(lines > 0, axis=2, bitorder="little").swapaxes(1, 2)
            np.testing.assert_array_equal(code.planes, planes)
            np.testing.assert_array_equal(code.dequantize(), cubin.multibit(x, bits, **layout))
