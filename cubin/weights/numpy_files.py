"""Tensors of `.npy` and `.npz` files."""

from __future__ import annotations

import ast
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from cubin.weights.float8 import FLOAT8
from cubin.weights.tensor import (
    BFLOAT16_IN_NUMPY,
    SMALL_IN_NUMPY,
    Cut,
    Weight,
    is_listed,
    not_read,
    without_graph,
)


def read_npy(path: Path) -> Iterator[Weight]:
    """List the tensor of a `.npy` file."""
    with path.open("rb") as stream:
        shape, dtype = npy_header(stream)
    tensor = stored("", shape, dtype, partial(map_npy, path))
    if is_listed(tensor):
        if not tensor.reason:
            tensor.read(())  # Mapped now, too: a truncated file is found before any work is done.
        yield tensor


def map_npy(path: Path, cut: Cut) -> np.ndarray:
    return np.load(path, mmap_mode="r")[cut]


def read_npz(path: Path) -> Iterator[Weight]:
    """List the tensors of a `.npz` file."""
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.namelist() if member.endswith(".npy")]
        for member, count in Counter(members).items():
            if count > 1:
                raise ValueError(f"{count} members are named {member!r}")
            with archive.open(member) as stream:
                shape, dtype = npy_header(stream)
            read = partial(load_npz_member, path, member)
            tensor = stored(member.removesuffix(".npy"), shape, dtype, read)
            if is_listed(tensor):
                yield tensor


def load_npz_member(path: Path, member: str, cut: Cut) -> np.ndarray:
    # Not by numpy.load: it takes 'a.npy' for the name of an array 'a' where there are both.
    with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
        return np.lib.format.read_array(stream)[cut]


def stored(name: str, shape: tuple[int, ...], dtype: str, read: partial) -> Weight:
    """Judge a tensor; of the types of float8 NumPy's files do not hold enough to read them."""
    tensor = without_graph(name, shape, dtype, read)
    if dtype in FLOAT8 and not tensor.reason:
        return replace(tensor, channel_axis=None, reason=not_read(dtype))
    return tensor


def npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], str]:
    """Read the shape and the name of the dtype of a `.npy` stream."""
    version = np.lib.format.read_magic(stream)
    start = stream.tell()
    try:
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        else:  # version 3 differs in the encoding of field names alone: no float array has any
            shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    except ValueError as error:
        if "'<f1'" not in str(error):
            raise
        # NumPy writes this for float8_e5m2 of ml_dtypes, but does not read it.
        stream.seek(start)
        length = int.from_bytes(stream.read(2 if version == (1, 0) else 4), "little")
        return ast.literal_eval(stream.read(length).decode("latin1"))["shape"], "float8_e5m2"
    return shape, numpy_dtype_name(dtype)


def numpy_dtype_name(dtype: np.dtype) -> str:
    """Name the type of an array in a file of NumPy."""
    if dtype == BFLOAT16_IN_NUMPY:
        return "bfloat16"
    if dtype == np.dtype("V1"):
        return SMALL_IN_NUMPY
    return dtype.name
