"""The k-th largest of numbers that are not kept: two passes over what gives them.

The bit patterns of floats are in their order. Counts by the leading bits narrow down where the k-th
largest lies; then the few numbers that begin with these bits are looked at themselves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from cubin.core import libraries
from cubin.core.libraries import Array

LEADING = 14
"""Bits that numbers are counted by: sign, exponent and five of the fraction of float32."""


class Bound(NamedTuple):
    """What the k largest are: all above `value`, and the first `left` of those equal to it."""

    value: float
    left: int


def bounds(go_over: Callable[[Callable[[Array], None]], None], ranks: Sequence[int]) -> list[Bound]:
    """The bounds of the k largest numbers for each k of `ranks`.

    ``go_over(look)`` calls `look` with arrays of float32 or float64 that hold all the numbers, none
    of them NaN, in any order and from any thread. It is called twice.
    """
    lock = threading.Lock()
    histogram = np.zeros(1 << LEADING, np.int64)

    def count(numbers: Array) -> None:
        counts = libraries.library(numbers).bincount(leading_bits(numbers), minlength=1 << LEADING)
        with lock:
            np.add(histogram, libraries.to_host(counts), out=histogram)

    go_over(count)
    at_least = histogram[::-1].cumsum()[::-1]
    bins = {k: int(np.searchsorted(-at_least, -k, side="right")) - 1 for k in ranks if k}
    members: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {
        number: [] for number in bins.values()
    }

    def collect(numbers: Array) -> None:
        leading = leading_bits(numbers)
        for number, kept in members.items():
            chosen = numbers.ravel()[leading == number]
            if chosen.size:
                # Equal numbers, such as zeros, are kept once.
                values, counts = libraries.library(numbers).unique(chosen, return_counts=True)
                kept.append((libraries.to_host(values), libraries.to_host(counts)))

    if members:
        go_over(collect)
    return [
        _bound(members[bins[k]], k - int(at_least[bins[k]] - histogram[bins[k]]))
        if k
        else Bound(np.inf, 0)
        for k in ranks
    ]


def _bound(members: list[tuple[np.ndarray, np.ndarray]], k: int) -> Bound:
    """The bound of the k largest members, which are given as (values, counts)."""
    values, inverse = np.unique(np.concatenate([some for some, _ in members]), return_inverse=True)
    counts = np.zeros(len(values), np.int64)
    np.add.at(counts, inverse, np.concatenate([number for _, number in members]))
    at_least = counts[::-1].cumsum()[::-1]
    last = int(np.searchsorted(-at_least, -k, side="right")) - 1
    left = k - int(at_least[last] - counts[last])
    if left == counts[last]:  # all of them: none has to be found by its position
        return Bound(np.nextafter(values[last], values.dtype.type(-np.inf)), 0)
    return Bound(values[last], left)


def leading_bits(numbers: Array) -> Array:
    """The leading bits of flat numbers as float32, in the order of the numbers.

    Rounding to float32 may make numbers equal, but never changes their order.
    """
    with np.errstate(over="ignore"):
        # Adding 0 makes -0.0 the 0.0 that it equals.
        rounded = numbers.ravel().astype(np.float32, copy=False) + np.float32(0)
    bits = rounded.view(np.int32)
    # Negative numbers are in reverse order.
    bits ^= (bits >> 31) & 0x7FFFFFFF
    bits >>= 32 - LEADING
    bits += 1 << (LEADING - 1)
    return bits
