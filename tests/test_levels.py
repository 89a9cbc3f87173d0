"""Signs and scales added up over levels: the kernel against the definition, in any layout."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from ml_dtypes import bfloat16

from cubin import BinaryCode
from cubin.codes.levels import sum_signs
from cubin.core import floats
from tests.reference import plain

DTYPES = [np.float16, bfloat16, np.float32, np.float64]


def definition(signs, scales, dtype):
    """Sums over levels in the work dtype; where a sign is 0 nothing is added."""
    total = np.zeros(signs.shape[1:], scales.dtype)
    for sign, scale in zip(signs, scales, strict=True):
        signed = np.where(sign > 0, scale, -scale)
        total = np.where(sign != 0, total + signed, total)
    return total.astype(dtype)


def sample(rng, levels, rows, n, dtype):
    """Signs, zeros among them, and scales, some of which are not finite or subnormal."""
    signs = rng.integers(-1, 2, (levels, rows, n)).astype(np.int8)
    scales = rng.normal(size=(levels, rows, 1)).astype(floats.work_dtype(np.dtype(dtype)))
    special = [np.nan, np.inf, 0, -0.0, np.finfo(scales.dtype).smallest_subnormal]
    scales.ravel()[: len(special)] = special[: scales.size]
    signs[:, -1] = 0  # a row without codes
    return signs, scales


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 33), (3, 7, 100), (16, 2, 9)])
def test_sums_of_signs(shape, dtype, xp, host, rng):
    signs, scales = sample(rng, *shape, dtype)
    y = xp.empty(shape[1:], dtype)
    sum_signs(xp.asarray(signs), xp.asarray(scales), y=y)
    np.testing.assert_array_equal(plain(host(y)), plain(definition(signs, scales, dtype)))


@pytest.mark.kernels
def test_threads_take_further_elements_where_the_grid_ends(device, rng, monkeypatch):
    plain = sum_signs.launch
    small = {"grid": 2, "block": 32}
    monkeypatch.setattr(
        sum_signs, "launch", lambda *given: dataclasses.replace(plain(*given), **small)
    )
    signs, scales = sample(rng, 2, 5, 67, np.float32)
    y = device.empty(signs.shape[1:], np.float32)
    sum_signs(device.asarray(signs), device.asarray(scales), y=y)
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
@pytest.mark.parametrize("of", ["scales", "signs"])
@pytest.mark.parametrize("axis", [0, 1])
def test_codes_in_any_layout(axis, of, layout, dtype, xp, host, rng):
    """Scales per row and per column; one of the arrays does not lie in C order."""
    signs, scales = sample(rng, 2, 6, 9, dtype)
    given = {
        "scales": xp.asarray(scales[..., 0].astype(dtype)),
        "signs": xp.asarray(signs if axis == 0 else signs.swapaxes(1, 2)),
    }
    given[of] = layout(given[of])
    code = BinaryCode(**given, bits=2, channel_axis=axis)
    stored = scales.astype(dtype).astype(scales.dtype)
    expected = plain(definition(signs, stored, dtype))
    np.testing.assert_array_equal(
        plain(host(code.dequantize())), expected if axis == 0 else expected.T
    )
