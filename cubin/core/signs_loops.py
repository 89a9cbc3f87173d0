"""The primitives of `signs.py` as compiled loops, which write C-contiguous arrays."""

from __future__ import annotations

import numpy as np

from cubin.core import floats
from cubin.core.floats import as_integers, magnitudes_up_to
from cubin.core.host.loops import in_rows, in_work_dtype, loop, part
from cubin.core.libraries import Array


@part
def _sign(value: float, one: float) -> float:
    return one if value > 0 else (-one if value == value else value)


@loop
def _signs(x: Array, y: Array) -> None:
    for j in range(x.size):
        y[j] = _sign(x[j], y.dtype.type(1))


@loop
def _signs_in_place(y: Array) -> None:
    for j in range(y.size):
        y[j] = _sign(y[j], y.dtype.type(1))


@loop
def _signs_of_patterns(x: Array, infinity: int, one: int, y: Array) -> None:
    """The same on the bit patterns of float16 or bfloat16, which Numba does not have."""
    for j in range(x.size):
        word = x[j]
        positive = np.uint16(word - np.uint16(1)) < infinity
        sign = one if positive else np.uint16(one | np.uint16(0x8000))
        y[j] = word if np.uint16(word & np.uint16(0x7FFF)) > infinity else sign


@loop
def _inside(word: Array, most: int, end: int, mask: Array) -> None:
    """Whether the bit patterns of magnitudes are below the pattern `end`; `most` is the largest."""
    for j in range(mask.size):
        mask[j] = word.dtype.type(word[j] & most) < end


@loop
def _inside_map(x: Array, bound: Array, mask: Array) -> None:
    for j in range(mask.size):
        mask[j] = np.float64(abs(x[j])) <= np.float64(bound[j])


# These read the gradient first: LLVM makes no vectors of a read that depends on a comparison.


@loop
def _clip(x: Array, bound: float, gy: Array, gx: Array) -> None:
    for j in range(x.size):
        g = gy[j]
        gx[j] = g if abs(x[j]) <= bound else gx.dtype.type(0)


@loop
def _clip_patterns(x: Array, end: int, gy: Array, gx: Array) -> None:
    """The same on the bit patterns of float16 or bfloat16: magnitudes below the pattern `end`."""
    for j in range(x.size):
        g = gy[j]
        gx[j] = g if np.uint16(x[j] & np.uint16(0x7FFF)) < end else np.uint16(0)


@loop
def _clip_to_bits(x: Array, bits: Array, gy: Array, gx: Array) -> None:
    for j in range(x.size):
        bound, g = x.dtype.type(bits[j]), gy[j]
        gx[j] = g if abs(x[j]) <= bound else gx.dtype.type(0)


def signs(x: Array, *, y: Array) -> None:
    """`signs.signs`."""
    # LLVM does not vectorize a loop on two arrays that are the same, so there is one on one array,
    # or a copy.
    in_place = np.may_share_memory(x, y)
    if floats.is_narrow(x.dtype):
        words = as_integers(x.copy() if in_place else x)
        one, infinity = as_integers(np.array([1, np.inf], x.dtype))
        _signs_of_patterns(_flat(words), infinity, one, as_integers(y).reshape(-1))
    elif in_place:
        _signs_in_place(y.reshape(-1))
    else:
        _signs(_flat(x), y.reshape(-1))


def inside(x: Array, bound: Array, *, mask: Array) -> None:
    """`signs.inside`."""
    if isinstance(bound, np.ndarray):
        _inside_map(_flat(in_work_dtype(x)), _flat(bound), mask.reshape(-1))
        return
    word = _flat(as_integers(x))
    most = word.dtype.type((1 << (8 * word.itemsize - 1)) - 1)
    _inside(word, most, magnitudes_up_to(float(bound), x.dtype), mask.reshape(-1))


inside_bits = inside


def gradient_inside(x: Array, bits: Array, gy: Array, *, gx: Array) -> None:
    """`signs.gradient_inside`."""
    narrow, mapped, dtype = floats.is_narrow(x.dtype), isinstance(bits, np.ndarray), x.dtype
    if narrow:  # only x is computed with, and not even that for one bound
        x, gy, gx = in_work_dtype(x) if mapped else as_integers(x), as_integers(gy), as_integers(gx)
    x, gy, gx = _flat(x), _flat(gy), gx.reshape(-1)
    if mapped:
        _clip_to_bits(x, _flat(bits), gy, gx)
    elif narrow:
        _clip_patterns(x, magnitudes_up_to(float(bits), dtype), gy, gx)
    else:
        _clip(x, dtype.type(bits), gy, gx)


def _flat(array: Array) -> Array:
    """The elements of an array one after the other, read-only."""
    flat = in_rows(array).reshape(-1)
    flat.setflags(write=False)
    return flat
