"""Planes and scales added up over levels: the kernels against the definition, in any layout."""

from __future__ import annotations

import numpy as np
import pytest
from ml_dtypes import bfloat16

from cubin import BinaryCode
from cubin.codes.planes import pack_signs, sum_planes
from cubin.core import floats
from tests.reference import plain

DTYPES = [np.float16, bfloat16, np.float32, np.float64]


def definition(signs, scales, dtype, shift=0.0):
    """Sums over levels in the work dtype; where a sign is 0 nothing is added.

    With a shift they are exact, and rounded once.
    """
    total = np.zeros(signs.shape[1:], np.longdouble if np.ndim(shift) else scales.dtype) + shift
    for sign, scale in zip(signs, scales, strict=True):
        signed = np.where(sign > 0, scale, -scale)
        total = np.where(sign != 0, total + signed, total)
    return total.astype(scales.dtype).astype(dtype)


def sample(rng, levels, lines, n, dtype):
    """Signs, the bits that they have, and scales, some of which are not finite or subnormal."""
    bits = rng.integers(0, levels + 1, (lines, n)).astype(np.uint8)
    bits[-1] = 0  # a line without codes
    signs = rng.choice(np.array([-1, 1], np.int8), (levels, lines, n))
    signs *= bits > np.arange(levels)[:, None, None]
    scales = rng.normal(size=(levels, lines, 1)).astype(floats.work_dtype(np.dtype(dtype)))
    special = [np.nan, np.inf, 0, -0.0, np.finfo(scales.dtype).smallest_subnormal]
    scales.ravel()[: len(special)] = special[: scales.size]
    return signs, bits, scales


def added(xp, signs, bits, scales, dtype, shift=0):
    """What the primitives make of signs: packed, and added up."""
    levels, lines, n = signs.shape
    # Planes that are part of larger ones: only lines lie side by side.
    planes = xp.zeros((levels, -(-n // 8) + 1, lines + 2), np.uint8)[:, 1:, 1:-1]
    pack_signs(xp.asarray(signs), planes=planes)
    y = xp.empty((lines, n), dtype)
    bits, shift = (a if np.ndim(a) == 0 else xp.asarray(a) for a in (bits, shift))
    sum_planes(planes, bits, xp.asarray(scales), shift, n // scales.shape[2], n, y=y)
    return planes, y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 33), (3, 7, 100), (16, 2, 9), (2, 35, 300)])
def test_sums_of_planes(shape, dtype, xp, host, rng):
    signs, bits, scales = sample(rng, *shape, dtype)
    planes, y = added(xp, signs, bits, scales, dtype)
    packed = np.packbits(signs > 0, axis=2, bitorder="little").transpose(0, 2, 1)
    np.testing.assert_array_equal(host(planes), packed)
    np.testing.assert_array_equal(plain(host(y)), plain(definition(signs, scales, dtype)))
    full = np.where(signs > 0, signs, np.int8(-1))
    _, y = added(xp, full, np.uint8(shape[0]), scales, dtype)
    np.testing.assert_array_equal(plain(host(y)), plain(definition(full, scales, dtype)))


@pytest.mark.parametrize("runs", [1, 3, 33])
@pytest.mark.parametrize("lines", [1, 4])
def test_scales_of_runs_and_for_all_lines(runs, lines, xp, host, rng):
    signs, bits, _ = sample(rng, 2, 4, 33, np.float32)
    scales = rng.normal(size=(2, lines, runs)).astype(np.float32)
    _, y = added(xp, signs, bits, scales, np.float32)
    spread = np.broadcast_to(np.repeat(scales, 33 // runs, axis=2), signs.shape)
    np.testing.assert_array_equal(host(y), definition(signs, spread, np.float32))
    shift = rng.normal(size=(lines, runs)).astype(np.float32)
    shift[0] = np.inf
    _, y = added(xp, signs, bits, scales, np.float32, shift)
    shift = np.repeat(shift, 33 // runs, axis=1)
    np.testing.assert_array_equal(host(y), definition(signs, spread, np.float32, shift))


@pytest.mark.kernels
def test_threads_take_further_elements_where_the_grid_ends(device, rng, monkeypatch):
    for primitive in (pack_signs, sum_planes):
        plain = primitive.launch
        monkeypatch.setattr(
            primitive,
            "launch",
            lambda *given, plain=plain: plain(*given)._replace(grid=2),
        )
    signs, bits, scales = sample(rng, 2, 70, 300, np.float32)
    planes, y = added(device, signs, bits, scales, np.float32)
    packed = np.packbits(signs > 0, axis=2, bitorder="little").transpose(0, 2, 1)
    np.testing.assert_array_equal(planes.get(), packed)
    np.testing.assert_array_equal(y.get(), definition(signs, scales, np.float32))


LAYOUTS = {
    "levels innermost": lambda a: a.T.copy().T,
    "every other element": lambda a: a.repeat(2, axis=-1)[..., ::2],
    "every other row": lambda a: a.repeat(2, axis=1)[:, ::2],
    "every other level": lambda a: a.repeat(2, axis=0)[::2],
    "backwards": lambda a: a[..., ::-1].copy()[..., ::-1],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("of", ["scales", "signs", "planes"])
@pytest.mark.parametrize("axis", [0, 1])
def test_codes_in_any_layout(axis, of, layout, dtype, xp, host, rng):
    """Scales per row and per column; one of the arrays does not lie in C order."""
    signs, bits, scales = sample(rng, 2, 6, 9, dtype)
    if axis == 1:
        signs, bits = signs.swapaxes(1, 2), bits.T
    given = {"scales": xp.asarray(scales[..., 0].astype(dtype)), "signs": xp.asarray(signs)}
    if of in given:
        given[of] = layout(given[of])
    code = BinaryCode.from_signs(**given, bits=xp.asarray(bits), channel_axis=axis)
    if of == "planes":
        code = BinaryCode(
            code.scales, layout(code.planes), code.bits, shape=bits.shape, channel_axis=axis
        )
    stored = scales.astype(dtype).astype(scales.dtype)
    stored = stored if axis == 0 else stored.swapaxes(1, 2)
    expected = definition(signs, np.broadcast_to(stored, signs.shape), dtype)
    np.testing.assert_array_equal(plain(host(code.dequantize())), plain(expected))
    np.testing.assert_array_equal(host(code.signs), signs)
