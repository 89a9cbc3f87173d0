"""Bits: how many levels the elements of an array have, one number for all or a map."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np

from cubin.core import arrays, libraries, passes
from cubin.core.libraries import Array
from cubin.core.primitives import elementwise
from cubin.core.rows import Section

MAX_BITS = 16
"""The most levels of an element."""


@elementwise(
    "I integers, uint8 most",
    "uint8 bits",
    "bits = integers < most ? integers : most",
    types=[{"I": "uint16"}, {"I": "uint32"}, {"I": "uint64"}],
    looped=True,
)
def at_most(integers: np.ndarray, most: np.ndarray, *, bits: np.ndarray) -> None:
    """Integers without a sign as bytes, larger ones as `most`."""
    np.minimum(integers, most, out=bits, casting="unsafe")


class Bits(NamedTuple):
    """The number of bits of each element, checked.

    Attributes
    ----------
    entries : uint8 scalar, or uint8 array that broadcasts to x's shape
        The number for all elements, or the map in the shape in which it was given.
    values : uint8 scalar, or uint8 array of x's shape
        The number for each element: a view of the entries, broadcast.
    levels : int
        How many levels are needed: the largest number, or an upper bound of it.
    """

    entries: Any
    values: Any
    levels: int

    @property
    def mapped(self) -> bool:
        """Whether there is a map."""
        return not isinstance(self.entries, np.generic)

    def apart(self, out: Array | None) -> Bits:
        """The same bits, with a copy of the map where writing `out` would overwrite it."""
        if out is None or not self.mapped:
            return self
        entries = libraries.apart(self.entries, out)
        return Bits(entries, _spread(entries, out), self.levels)

    def of(self, section: Section) -> Bits:
        """The bits of a section of the array."""
        if not self.mapped or section.elements is None:
            return self
        values = section.of(self.values)
        return Bits(values, values, self.levels)


def as_bits(
    value: object, x: Array, *, limit: int = MAX_BITS, of: str = "", look: bool = False
) -> Bits:
    """`value` as the bits of the elements of `x`. A map of bytes is a view of `value`.

    With `look`, the values of a map on a device are checked, which synchronises. Without, they are
    not: the map counts as clipped to 0 .. `limit`, and `levels` is `limit`. Messages say what the
    limit is `of`.

    Raises
    ------
    TypeError
        If `value` is not integer, or a CuPy map beside a NumPy array.
    ValueError
        If a value lies outside 0 .. `limit`, or the map does not broadcast to x's shape.
    """
    entries, levels = as_entries(value, x.shape, x, limit=limit, of=of, look=look)
    return Bits(entries, _spread(entries, x), levels)


def _spread(entries: Any, x: Array) -> Any:
    if isinstance(entries, np.generic) or entries.shape == x.shape:
        return entries
    return libraries.library(x).broadcast_to(entries, x.shape)


def as_entries(
    value: object,
    shape: tuple[int, ...],
    x: Array,
    *,
    limit: int = MAX_BITS,
    of: str = "",
    look: bool = False,
) -> tuple[Any, int]:
    """The entries and levels of `Bits`, for an array of shape `shape` in the library of `x`.

    The other arguments and errors are those of `as_bits`.
    """
    if type(value) is int:
        if not 0 <= value <= limit:
            raise ValueError(f"bits must lie in 0 .. {limit}{of}, got {value}")
        return np.uint8(value), value
    if libraries.on_device(value):
        bits: Any = libraries.aligned(value)
        libraries.check_same("bits", bits, x)
    else:
        bits = arrays.as_host_array("bits", value)
    if bits.dtype.kind not in "iu":
        named = type(value).__qualname__ if bits.dtype.kind in "OSU" else bits.dtype
        hint = ""
        if arrays.is_real(value) and np.isfinite(value):  # type: ignore[call-overload]
            named = value
            hint = f": pass {value:.0f}"
            if value % 1:  # type: ignore[operator]
                hint = ": a map has such a mean, see cubin.bitmaps.budget"
        raise TypeError(f"bits must be an integer or an integer array, got {named}{hint}")
    arrays.check_broadcasts("bits", bits, shape)
    if libraries.on_device(bits) and not look:
        clipped = bits if bits.dtype == np.uint8 else bits.clip(0, limit).astype(np.uint8)
        return clipped, limit
    if bits.ndim == 0 and not libraries.on_device(bits):
        low = high = int(bits)
        found = np.uint8(min(max(0, high), limit))
    else:
        found = _as_bytes(bits, limit + 1)
        high = int(found.max()) if bits.size else 0
        low, high = (int(bits.min()), int(bits.max())) if high > limit else (0, high)
    if low < 0 or high > limit:
        raise ValueError(f"bits must lie in 0 .. {limit}{of}, got {low if low < 0 else high}")
    if libraries.on_device(bits) or bits.ndim == 0:
        return found, high
    return libraries.library(x).asarray(found), high


def _as_bytes(integers: Array, most: int) -> Array:
    """A map as uint8, negative numbers and those above `most` as `most`; a view if it is bytes."""
    # Read without their signs, negative numbers are the largest.
    unsigned = integers.view(integers.dtype.str.replace("i", "u"))
    if integers.itemsize == 1:
        return unsigned
    xp: Any = libraries.library(integers)
    # What is broadcast is converted once.
    unsigned = unsigned[tuple(slice(None if step else 1) for step in integers.strides)]
    found = xp.empty_like(unsigned, dtype=np.uint8)
    passes.elements(at_most, unsigned, np.uint8(most), bits=found)
    return found if found.shape == integers.shape else xp.broadcast_to(found, integers.shape)


def as_precisions(value: Any, entries: Any) -> tuple[int, ...]:
    """`value` as numbers of levels that ascend and end on the bits, which are no map.

    `entries` are those of `Bits`.

    Raises
    ------
    TypeError
        If `value` is no sequence of integers.
    ValueError
        If it is empty, does not ascend from 1 or more, or does not end on the bits; or if there is
        a map.
    """
    try:
        listed = tuple(value)
    except TypeError:
        raise TypeError(f"precisions must be a sequence of integers, got {value!r}") from None
    precisions = tuple(arrays.as_integer("each of precisions", one) for one in listed)
    if not isinstance(entries, np.generic):
        raise ValueError(
            "precisions need one number of bits for all elements, got a map of shape "
            f"{entries.shape}"
        )
    ascend = all(low < high for low, high in itertools.pairwise((0, *precisions)))
    if not ascend or not precisions or precisions[-1] != entries:
        raise ValueError(
            f"precisions must ascend from 1 or more and end on bits = {entries}, got {precisions}"
        )
    return precisions
