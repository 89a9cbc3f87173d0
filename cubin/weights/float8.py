"""Floats of eight bits: their values, and the scales that files keep for blocks of them."""

from __future__ import annotations

import functools

import numpy as np

FLOAT8 = ("float8_e4m3fn", "float8_e5m2")

BLOCK = 128
"""Rows and columns of the blocks of a matrix that share a scale."""


@functools.cache
def values(dtype: str) -> np.ndarray:
    """The float32 values of the 256 codes of a type."""
    import ml_dtypes

    return np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, dtype)).astype(np.float32)


def decode(codes: np.ndarray, dtype: str) -> np.ndarray:
    """The float32 values of codes, which are uint8."""
    return values(dtype)[codes]


def blocks_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of a matrix, one for each block."""
    return tuple(-(-n // BLOCK) for n in shape)


def scale_blocks(
    array: np.ndarray, scales: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> None:
    """Multiply a part of a matrix by the scales of its blocks, in place.

    Parameters
    ----------
    array : float32 array, shape (len(rows), len(columns))
    scales : float32 array, shape (blocks of rows, blocks of columns)
    rows, columns : integer array
        Where in the matrix those of `array` are.
    """
    wide = scales[:, columns // BLOCK]
    for start in range(0, len(rows), BLOCK):  # so that the factors take little memory
        part = slice(start, start + BLOCK)
        array[part] *= wide[rows[part] // BLOCK]
