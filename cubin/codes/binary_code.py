"""BinaryCode: an array as levels of scales and signs."""

from __future__ import annotations

import copy
import html
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from cubin.codes import files
from cubin.codes.cost import effective_bits, payload_bits
from cubin.codes.levels import sum_signs
from cubin.core import arrays, conversions, floats, libraries, passes
from cubin.core.bits import as_entries
from cubin.core.libraries import Array
from cubin.core.rows import Rows, rows_of


class BinaryCode:
    """An array as levels of scales and signs: ``x ~ sum_i scales[i] * signs[i]``.

    `cubin.quantize` makes them.

    Parameters
    ----------
    scales : float array, shape (k, \\*scale shape)
        The scale shape is () per tensor, the lengths of the channel axes in the order given per
        channel, and ``x.shape[:-1] + (n_groups,)`` per group.
    signs : int8 array, shape (k, \\*x.shape)
        -1 or +1, and 0 where an element has no code at that level. Where a residual is exactly 0,
        the greedy solver gives -1, and those that refit the opposite of the sign of x: their codes
        of -x are those of x, negated (`cubin.quantize`).
    bits : int or integer array that broadcasts to x's shape
        The number of levels of each element; at most k.
    channel_axis : int or tuple of int, optional
    group_size : int, optional

    Attributes
    ----------
    scales, signs, bits, channel_axis, group_size
        As above.

    Raises
    ------
    TypeError
        If an argument has the wrong type, or arrays of several libraries are mixed.
    ValueError
        If the shapes do not fit together.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> code = cubin.quantize(np.array([-1.0, 3.0]), 2)
    >>> code.scales, code.signs.tolist()
    (array([2., 1.]), [[-1, 1], [1, 1]])
    >>> code.dequantize()
    array([-1.,  3.])
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self,
        scales: Array,
        signs: Array,
        bits: Array,
        channel_axis: int | tuple[int, ...] | None = None,
        group_size: int | None = None,
    ) -> None:
        parts = {"scales": scales, "signs": signs, "bits": bits}
        self._library, (scales, signs, bits) = libraries.all_viewed(parts)
        scales = arrays.as_floats("scales", scales)
        libraries.library(scales, signs)  # not a mixture
        signs = signs if libraries.on_device(signs) else np.asarray(signs)
        if signs.dtype != np.int8:
            raise TypeError(f"signs must be int8, got {signs.dtype}")
        if signs.ndim == 0 or scales.ndim == 0 or len(signs) != len(scales):
            raise ValueError(
                f"scales of shape {scales.shape} and signs of shape {signs.shape} must both have "
                "the levels as their first axis"
            )
        rows = rows_of(signs.shape[1:], channel_axis, group_size)
        if scales.shape[1:] != rows.scale_shape:
            raise ValueError(
                f"scales have shape {scales.shape}, but signs of shape {signs.shape} with "
                f"channel_axis={channel_axis} and group_size={group_size} need "
                f"{(len(signs), *rows.scale_shape)}"
            )
        with libraries.current_device(scales):
            entries, levels = as_entries(bits, rows.shape, scales, look=True)
            if levels > len(signs):
                raise ValueError(f"bits go up to {levels}, but there are {len(signs)} levels")
            self._fill(scales, signs, entries, rows)

    _library: libraries.Library | None = None
    """The library that the arrays are given in: all work is on NumPy's or CuPy's."""

    def _fill(self, scales: Array, signs: Array, entries: Any, rows: Rows) -> None:
        self._rows = rows
        self._scales = scales
        self._signs = signs
        self._bits: Any = int(entries) if isinstance(entries, np.generic) else entries.copy()
        self.channel_axis = rows.channel_axis
        self.group_size = rows.group_size

    def given_to(self, library: libraries.Library) -> BinaryCode:
        """The same code, with its arrays in another library; it shares the memory."""
        code = copy.copy(self)
        code._library = library
        return code

    @property
    def scales(self) -> Array:
        """The scales, shape (k, \\*scale shape)."""
        return libraries.given_back(self._scales, self._library)

    @property
    def signs(self) -> Array:
        """The signs, int8 of shape (k, \\*x.shape)."""
        return libraries.given_back(self._signs, self._library)

    @property
    def bits(self) -> Any:
        """The number of levels of each element: an int or a map."""
        return libraries.given_back(self._bits, self._library)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self._rows.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the scales and of the array, in their library."""
        return self.scales.dtype

    @property
    def payload_bits(self) -> float:
        """The mean of the bit map: bits per element of the codes alone."""
        return payload_bits(self._bits, self.shape)

    @property
    def effective_bits(self) -> float:
        """Bits per element in all: the codes, the entropy of the bit map and the scales."""
        return effective_bits(self._bits, self._rows, self._scales.dtype)

    def dequantize(self) -> Array:
        """The approximation ``sum_i scales[i] * signs[i]``, in the shape and dtype of x."""
        rows, dtype = self._rows, self._scales.dtype
        work = floats.work_dtype(dtype)
        with libraries.current_device(self._scales, self._library):
            y = libraries.result(self.shape, dtype, self._scales)
            scales = self._scales.astype(work, copy=False).reshape(len(self._scales), rows.count)
            if y.size:
                passes.whole_rows(sum_signs, rows, (self._signs,), out=y, scales=scales)
            return libraries.given_back(y, self._library)

    def __eq__(self, other: object) -> bool:
        """Whether all of shape, dtype, granularity, bits, scales and signs are the same."""
        if not isinstance(other, BinaryCode):
            return NotImplemented
        if libraries.on_device(self._scales) != libraries.on_device(other._scales):
            return False
        if not (
            self._scales.dtype == other._scales.dtype
            and self._rows == other._rows
            and np.shape(self._bits) == np.shape(other._bits)
            and self._scales.shape == other._scales.shape
        ):
            return False
        xp = libraries.library(self._scales)
        with libraries.current_device(self._scales):
            # Arrays on another device are copied to this one.
            bits, scales, signs = map(xp.asarray, (other._bits, other._scales, other._signs))
            wide = conversions.computable(self._scales)
            return (
                bool((xp.asarray(self._bits) == bits).all())
                and bool(xp.array_equal(wide, conversions.computable(scales), equal_nan=True))
                and bool(xp.array_equal(self._signs, signs))
            )

    def to_host(self) -> BinaryCode:
        """The code in NumPy arrays; `self` where it is in NumPy arrays already."""
        if self._library is None and not libraries.on_device(self._scales):
            return self
        return self._moved(libraries.to_host)

    def to_device(self) -> BinaryCode:
        """The code in CuPy arrays on the current device; `self` where it is in CuPy arrays already.

        Raises
        ------
        RuntimeError
            If CuPy is not installed.
        """
        if self._library is None and libraries.on_device(self._scales):
            return self
        return self._moved(libraries.to_device)

    def _moved(self, move: Callable[[Array], Array]) -> BinaryCode:
        bits = self._bits if np.ndim(self._bits) == 0 else move(self._bits)
        entries = np.uint8(bits) if np.ndim(bits) == 0 else bits
        return assemble(move(self._scales), move(self._signs), entries, self._rows)

    def _facts(self) -> list[tuple[str, str]]:
        granularity = "per tensor"
        if self.channel_axis not in (None, ()):
            granularity = f"per channel, axis {self.channel_axis}"
        elif self.group_size is not None:
            granularity = f"per group of {self.group_size}"
        mapped = np.ndim(self._bits) > 0
        facts = [
            ("shape", str(self.shape)),
            ("dtype", str(self._scales.dtype)),
            ("levels", str(len(self._scales))),
            ("bits", f"map of shape {self._bits.shape}" if mapped else str(self._bits)),
            ("scales", f"{granularity}, {self._rows.count:,} per level"),
        ]
        # Reading a map on a device waits for the device, which a display must not do.
        if not (mapped and libraries.on_device(self._bits)):
            facts += [
                ("payload bits", f"{self.payload_bits:.4g} per element"),
                ("effective bits", f"{self.effective_bits:.4g} per element"),
            ]
        return facts

    def __repr__(self) -> str:
        return f"BinaryCode({', '.join(f'{name}: {value}' for name, value in self._facts())})"

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in self._facts()
        )
        return f"<table><caption>BinaryCode</caption>{cells}</table>"

    # ------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the code to a file, one bit per sign.

        The file is an uncompressed ``.npz`` archive of the arrays ``scales``, ``signs`` (bits
        packed along the last of two axes, levels by elements in C order), ``bits`` (int or
        uint8 map) and ``layout`` (JSON); nothing in it is pickled.

        An existing file is replaced only once the new one is complete and on the disk. Until then
        the new file lies in the same folder, as ``cubin-*.part``. It takes over the permissions of
        the old file and, where the system allows it, the owner and group. If `path` is a symbolic
        link, the file that it points to is replaced.

        Files that a killed process left behind are removed by the next call that saves to that
        folder, except on Windows.

        Parameters
        ----------
        path : str or path

        Raises
        ------
        ValueError
            If there are more than 16 levels, or none for more than 2^32 elements, or the signs are
            not -1 or +1 exactly where `bits` has a code: one bit per sign could not hold them. If
            `path` is a folder or a device.
        """
        with libraries.current_device(self._signs, self._library):
            files.write(
                path, self._scales, self._signs, self._bits, self.channel_axis, self.group_size
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BinaryCode:
        """Read a code that `save` wrote, as NumPy arrays.

        Parameters
        ----------
        path : str or path

        Returns
        -------
        BinaryCode

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is damaged, truncated or no BinaryCode. Sizes are checked against the
            file's own length before anything is allocated, members of other names or of the same
            name are refused, and nothing is unpickled.
        """
        return cls(**files.read(path))


def assemble(scales: Array, signs: Array, entries: Any, rows: Rows) -> BinaryCode:
    """A code whose parts are known to fit. They are not checked, which would wait for a device.

    `entries` are the bits, a uint8 scalar or a uint8 array that broadcasts to the shape.
    """
    code = BinaryCode.__new__(BinaryCode)
    code._fill(scales, signs, entries, rows)
    return code
