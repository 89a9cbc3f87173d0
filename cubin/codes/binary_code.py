"""BinaryCode: an array as levels of scales and signs."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cubin.codes import products
from cubin.codes.cost import effective_bits, payload_bits
from cubin.codes.decoding import Decoding, coded, joined_planes, packed, unpacked
from cubin.core import arrays, conversions, floats, libraries
from cubin.core.bits import MAX_BITS, as_entries, as_precisions
from cubin.core.libraries import Array
from cubin.core.lines import lines_of
from cubin.core.rows import Rows, rows_of


class BinaryCode:
    """An array as levels of scales and signs: ``x ~ shift + sum_i scales[i] * signs[i]``.

    The signs are packed, one bit each, in planes. An array has a line for each index of its first
    axis (one line if its rank is 0 or 1). Byte j of line i, ``planes[level, j, i]``, has the signs
    of the elements 8j to 8j + 7 of the line in C order, the first in its lowest bit, 1 for +1.

    `cubin.quantize` makes codes.

    Parameters
    ----------
    scales : float array, shape (k, \\*scale shape)
        The scale shape is () per tensor, the lengths of the channel axes in the order given per
        channel, and ``x.shape[:-1] + (ceil(n / group_size),)`` per group, for n elements on the
        last axis.
    planes : uint8 array, shape (k, w, m)
        For m lines of w bytes. Bits beyond the end of a line, and those of elements without a code
        at the level, are 0.
    bits : int or integer array that broadcasts to x's shape
        The number of levels of each element; at most k.
    shape : tuple of int
        The shape of x.
    channel_axis : int or tuple of int, optional
    group_size : int, optional
        The last group of each line of the last axis may be shorter.
    shift : float array of the scale shape, optional
        A constant of each row that is added to its elements, in the dtype of the scales. Elements
        of 0 bits are approximated by it.
    precisions : sequence of int, optional
        Numbers of levels that have scales of their own, ascending and ending on `bits`, which is no
        map then. `scales` are those of the last one.
    tables : float array, shape (t, \\*scale shape), optional
        With `precisions`: for each lower one its scales and, if there is a shift, its shift, one
        precision after the other, in the dtype of the scales.

    Attributes
    ----------
    scales, planes, bits, shape, channel_axis, group_size, shift
        As above. Of a code of several precisions they are those of the last one, as are all values
        and comparisons; `at` gives the others.
    precisions, tables
        As above, or None.

    Raises
    ------
    TypeError
        If an argument has the wrong type, or arrays of several libraries are mixed.
    ValueError
        If the shapes do not fit together, or a bit is set that stands for no sign.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> code = cubin.quantize(np.array([-1.0, 3.0]), 2)
    >>> code.scales, code.planes.tolist(), code.signs.tolist()
    (array([2., 1.]), [[[2]], [[3]]], [[-1, 1], [1, 1]])
    >>> code.dequantize()
    array([-1.,  3.])
    """

    __hash__ = None  # type: ignore[assignment]
    # So that NumPy and CuPy leave `x @ code` to the code.
    __array_ufunc__ = None
    __array_priority__ = 1000

    def __init__(
        self,
        scales: Array,
        planes: Array,
        bits: Array,
        *,
        shape: Sequence[int],
        channel_axis: int | tuple[int, ...] | None = None,
        group_size: int | None = None,
        shift: Array | None = None,
        precisions: Sequence[int] | None = None,
        tables: Array | None = None,
    ) -> None:
        parts = {
            "scales": scales, "planes": planes, "bits": bits, "shift": shift, "tables": tables
        }  # fmt: skip
        self._library, (scales, planes, bits, shift, tables) = libraries.all_viewed(parts)
        scales = arrays.as_floats("scales", scales)
        libraries.library(scales, planes)  # not a mixture
        planes = planes if libraries.on_device(planes) else np.asarray(planes)
        if planes.dtype != np.uint8:
            raise TypeError(f"planes must be uint8, got {planes.dtype}")
        rows = rows_of(_shape_of(shape), channel_axis, group_size)
        lines = lines_of(rows.shape)
        if planes.ndim != 3 or planes.shape[1:] != (lines.width, lines.count):
            raise ValueError(
                f"planes of an array of shape {rows.shape} must have the shape "
                f"(k, {lines.width}, {lines.count}), got {planes.shape}"
            )
        _check_scales(scales, len(planes), rows)
        shift = _checked_shift(shift, scales, rows)
        with libraries.current_device(scales):
            entries, levels = as_entries(bits, rows.shape, scales, look=True)
            if levels > len(planes):
                raise ValueError(f"bits go up to {levels}, but there are {len(planes)} levels")
            planes = libraries.library(planes).ascontiguousarray(planes)
            _check_bits(planes, entries, rows)
            listed, tables = _checked_tables(precisions, tables, entries, scales, shift, rows)
            self._fill(scales, planes, entries, rows, shift, listed, tables)

    @classmethod
    def from_signs(
        cls,
        scales: Array,
        signs: Array,
        bits: Array,
        *,
        channel_axis: int | tuple[int, ...] | None = None,
        group_size: int | None = None,
        shift: Array | None = None,
    ) -> BinaryCode:
        """The code of signs that are not packed.

        Parameters
        ----------
        scales : float array, shape (k, \\*scale shape)
        signs : int8 array, shape (k, \\*x.shape)
            -1 or +1 where an element has a code at the level, else 0.
        bits : int or integer array that broadcasts to x's shape
        channel_axis : int or tuple of int, optional
        group_size : int, optional
        shift : float array of the scale shape, optional

        Raises
        ------
        TypeError, ValueError
            As from the constructor; and if a sign is not what `bits` says.

        Examples
        --------
        >>> import numpy as np, cubin
        >>> signs = np.array([[1, -1, 1], [1, 0, 0]], np.int8)
        >>> code = cubin.BinaryCode.from_signs(np.array([2.0, 1.0]), signs, [2, 1, 1])
        >>> code.dequantize()
        array([ 3., -2.,  2.])
        """
        parts = {"scales": scales, "signs": signs, "bits": bits, "shift": shift}
        library, (scales, signs, bits, shift) = libraries.all_viewed(parts)
        scales = arrays.as_floats("scales", scales)
        libraries.library(scales, signs)  # not a mixture
        signs = signs if libraries.on_device(signs) else np.asarray(signs)
        if signs.dtype != np.int8:
            raise TypeError(f"signs must be int8, got {signs.dtype}")
        if signs.ndim == 0:
            raise ValueError("signs must have the levels as their first axis, got a 0-d array")
        rows = rows_of(signs.shape[1:], channel_axis, group_size)
        _check_scales(scales, len(signs), rows)
        shift = _checked_shift(shift, scales, rows)
        with libraries.current_device(scales):
            entries, levels = as_entries(bits, rows.shape, scales, look=True)
            if levels > len(signs):
                raise ValueError(f"bits go up to {levels}, but there are {len(signs)} levels")
            code = assemble(scales, packed(signs, entries), entries, rows, shift)
            return code.given_to(library)

    _library: libraries.Library | None = None
    """The library that the arrays are given in: all work is on NumPy's or CuPy's."""

    def _fill(
        self,
        scales: Array,
        planes: Array,
        entries: Any,
        rows: Rows,
        shift: Array | None,
        precisions: tuple[int, ...] | None,
        tables: Array | None,
    ) -> None:
        self._rows = rows
        self._scales = scales
        self._shift = shift
        self.precisions = precisions
        self._tables: Any = tables
        self._planes = planes
        self._bits: Any = int(entries) if isinstance(entries, np.generic) else entries.copy()
        self.channel_axis = rows.channel_axis
        self.group_size = rows.group_size

    def given_to(self, library: libraries.Library | None) -> BinaryCode:
        """The same code, with its arrays in another library; it shares the memory."""
        code = copy.copy(self)
        code._library = library
        return code

    @property
    def scales(self) -> Array:
        """The scales, shape (k, \\*scale shape)."""
        return libraries.given_back(self._scales, self._library)

    @property
    def shift(self) -> Any:
        """The constant that is added to the elements of each row, or None."""
        return None if self._shift is None else libraries.given_back(self._shift, self._library)

    @property
    def tables(self) -> Any:
        """The scales and shifts of the lower precisions, shape (t, \\*scale shape), or None."""
        return None if self._tables is None else libraries.given_back(self._tables, self._library)

    @property
    def planes(self) -> Array:
        """The packed signs, uint8 of shape (k, w, m)."""
        return libraries.given_back(self._planes, self._library)

    @property
    def bits(self) -> Any:
        """The number of levels of each element: an int or a map."""
        return libraries.given_back(self._bits, self._library)

    @property
    def _entries(self) -> Any:
        return np.uint8(self._bits) if isinstance(self._bits, int) else self._bits

    @property
    def signs(self) -> Array:
        """The signs, int8 of shape (k, \\*x.shape): unpacked each time they are asked for.

        They are -1 or +1, and 0 where an element has no code at that level. Where a residual is
        exactly 0, the greedy solver gives -1, and those that refit the opposite of the sign of x:
        their codes of -x are those of x, negated (`cubin.quantize`).
        """
        signs = unpacked(self._planes, self._entries, self.shape)
        return libraries.given_back(signs, self._library)

    @property
    def nbytes(self) -> int:
        """The bytes that planes, scales of all precisions, shifts and a bit map take."""
        of_map = 0 if isinstance(self._bits, int) else self._bits.nbytes
        of_shift = 0 if self._shift is None else self._shift.nbytes
        of_tables = 0 if self._tables is None else self._tables.nbytes
        return int(self._planes.nbytes + self._scales.nbytes + of_tables + of_shift + of_map)

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
        """Bits per element in all: the codes, the entropy of the map, the scales and shifts."""
        shifted, tables = self._shift is not None, 0 if self._tables is None else len(self._tables)
        return effective_bits(self._bits, self._rows, self._scales.dtype, shifted, tables)

    def dequantize(self) -> Array:
        """The approximation ``shift + sum_i scales[i] * signs[i]``, in x's shape and dtype.

        The levels are added to the shift, if there is one, in their order, and what these additions
        round away is added at the end.
        """
        with libraries.current_device(self._scales, self._library):
            y = libraries.result(self.shape, self._scales.dtype, self._scales)
            if y.size:
                decoding = decoding_of(self)
                decoding.write_all(y.reshape(decoding.lines.count, decoding.lines.length))
            return libraries.given_back(y, self._library)

    def __eq__(self, other: object) -> bool:
        """Whether shape, dtype, granularity, bits, scales, shift and signs are all the same.

        Of codes of several precisions, the last one counts.
        """
        if not isinstance(other, BinaryCode):
            return NotImplemented
        if libraries.on_device(self._scales) != libraries.on_device(other._scales):
            return False
        if not (
            self._scales.dtype == other._scales.dtype
            and self._rows == other._rows
            and np.shape(self._bits) == np.shape(other._bits)
            and self._scales.shape == other._scales.shape
            and (self._shift is None) == (other._shift is None)
        ):
            return False
        xp = libraries.library(self._scales)
        with libraries.current_device(self._scales):
            # Arrays on another device are copied to this one.
            bits, planes = map(xp.asarray, (other._bits, other._planes))
            return (
                bool((xp.asarray(self._bits) == bits).all())
                and _equal(self._scales, xp.asarray(other._scales))
                and (self._shift is None or _equal(self._shift, xp.asarray(other._shift)))
                and bool(xp.array_equal(self._planes, planes))
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
        shift = None if self._shift is None else move(self._shift)
        tables = None if self._tables is None else move(self._tables)
        scales, planes = move(self._scales), move(self._planes)
        return assemble(scales, planes, entries, self._rows, shift, self.precisions, tables)

    def _facts(self) -> list[tuple[str, str]]:
        granularity = "per tensor"
        if self.channel_axis not in (None, ()):
            granularity = f"per channel, axis {self.channel_axis}"
        elif self.group_size is not None:
            granularity = f"per group of {self.group_size}"
            if len(self._rows.sections) > 1:
                granularity += f", the last of {self._rows.sections[-1].rows.length}"
        mapped = np.ndim(self._bits) > 0
        facts = [
            ("shape", str(self.shape)),
            ("dtype", str(self._scales.dtype)),
            ("levels", str(len(self._scales))),
            ("bits", f"map of shape {self._bits.shape}" if mapped else str(self._bits)),
            ("scales", f"{granularity}, {self._rows.count:,} per level"),
        ]
        if self._shift is not None:
            facts.append(("shift", "one per row of scales"))
        if self.precisions is not None:
            facts.append(("precisions", ", ".join(map(str, self.precisions))))
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
        import html

        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in self._facts()
        )
        return f"<table><caption>BinaryCode</caption>{cells}</table>"

    # ------------------------------------------------------------ products

    def __matmul__(self, x: Array) -> Array:
        """``code @ x`` for x of shape (n,) or (n, b), as ``code.dequantize() @ x``.

        `cubin.products.linear` says how sums are accumulated. The result has x's dtype.
        """
        return _times(x, self)

    def __rmatmul__(self, x: Array) -> Array:
        """``x @ code`` for x of shape (..., m), as ``x @ code.dequantize()``."""
        return _from_left(x, self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        # Without it NumPy would make a 0-d array of objects, even where nobody asked for objects.
        if dtype != np.dtype(object):
            raise TypeError("a BinaryCode is no array: pass code.dequantize()")
        array = np.empty((), object)
        array[()] = self
        return array

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        # PyTorch asks here before it refuses what is no tensor.
        if getattr(function, "__name__", "") in ("__matmul__", "matmul") and len(arguments) == 2:
            x, code = arguments
            if isinstance(code, cls) and not isinstance(x, cls):
                return code.__rmatmul__(x)
        return NotImplemented

    # ------------------------------------------------------------ parts

    def truncate(self, levels: int) -> BinaryCode:
        """The code of the first levels alone; it shares the planes, and nothing is refitted.

        Parameters
        ----------
        levels : int
            0 to k. Elements with more bits have so many in the result. A shift stays as it is.
            One of `precisions` has the scales and the shift of that precision, and the result keeps
            those of the lower ones.

        Raises
        ------
        TypeError
            If `levels` is no integer.
        ValueError
            If it lies outside 0 .. k.

        Examples
        --------
        >>> import numpy as np, cubin
        >>> cubin.quantize(np.array([-1.0, 3.0]), 2).truncate(1).dequantize()
        array([-2.,  2.])
        """
        count = arrays.as_integer("levels", levels)
        if not 0 <= count <= len(self._planes):
            raise ValueError(f"levels must lie in 0 .. {len(self._planes)}, got {count}")
        with libraries.current_device(self._planes):
            entries = np.minimum(self._entries, np.uint8(count))
            planes, precisions, tables = self._planes[:count], None, None
            scales, shift = self._scales[:count], self._shift
            if self.precisions is not None and count in self.precisions:
                precisions = self.precisions[: self.precisions.index(count) + 1]
                scales, shift, tables = self._tables_of(precisions)
            code = assemble(scales, planes, entries, self._rows, shift, precisions, tables)
            return code.given_to(self._library)

    def at(self, precision: int) -> BinaryCode:
        """The code of one of the precisions, with its own scales; it shares the planes.

        Parameters
        ----------
        precision : int
            One of `precisions`.

        Raises
        ------
        TypeError
            If `precision` is no integer.
        ValueError
            If it is none of `precisions`, or the code has none.

        Examples
        --------
        >>> import numpy as np, cubin
        >>> x = np.array([-1.0, 3.0, 0.5, 1.5])
        >>> code = cubin.quantize(x, 2, precisions=(1, 2))
        >>> code.at(1).scales, code.at(2).scales
        (array([1.5]), array([2., 1.]))
        """
        levels = arrays.as_integer("precision", precision)
        if self.precisions is None or levels not in self.precisions:
            listed = "none: it was made without them"
            if self.precisions is not None:
                listed = ", ".join(map(str, self.precisions))
            raise ValueError(
                f"precision must be one of those of the code, got {levels}; it has {listed}"
            )
        code = self.truncate(levels)
        alone = assemble(code._scales, code._planes, code._entries, code._rows, code._shift)
        return alone.given_to(self._library)

    def _tables_of(self, precisions: tuple[int, ...]) -> tuple[Array, Array | None, Array]:
        """The scales and shift of the last of the first precisions, and the tables before it."""
        *lower, last = precisions
        shifted = self._shift is not None
        start = sum(lower) + len(lower) * shifted
        if precisions == self.precisions:
            return self._scales, self._shift, self._tables
        stop = start + last
        shift = self._tables[stop, ...] if shifted else None
        return self._tables[start:stop], shift, self._tables[:start]

    def __getitem__(self, lines: slice) -> BinaryCode:
        """The code of some lines, ``code[3:5]`` as ``x[3:5]``: a view, which shares the planes.

        Lines cannot be chosen one by one, nor can a code be transposed or reshaped: bytes of planes
        belong to lines. `dequantize` comes first then.

        Raises
        ------
        TypeError
            If `lines` is no slice.
        ValueError
            If the array has a rank below 2, or the slice a step.
        """
        if not isinstance(lines, slice):
            one = f": pass [{lines}:{lines + 1}]" if isinstance(lines, int) and lines >= 0 else ""
            raise TypeError(f"a code takes a slice of its first axis, got {lines!r}{one}")
        if len(self.shape) < 2:
            raise ValueError(f"a code of shape {self.shape} is one line, which cannot be cut")
        start, stop, step = lines.indices(self.shape[0])
        if step != 1:
            raise ValueError(f"a code takes slices without a step, got {lines!r}")
        cut = slice(start, max(start, stop))
        shape = (cut.stop - cut.start, *self.shape[1:])
        rows = rows_of(shape, self.channel_axis, self.group_size)
        # The axes that number the rows are the first ones of `order`.
        first = rows.order.index(0)
        scales, shift, tables = self._scales, self._shift, self._tables
        if first < len(rows.scale_shape):
            before = (slice(None),) * first
            scales = scales[(slice(None), *before, cut)]
            tables = None if tables is None else tables[(slice(None), *before, cut)]
            shift = None if shift is None else shift[(*before, cut)]
        entries = self._entries
        if np.ndim(entries) == len(shape) and entries.shape[0] > 1:
            entries = entries[cut]
        planes = self._planes[..., cut]
        code = assemble(scales, planes, entries, rows, shift, self.precisions, tables)
        return code.given_to(self._library)

    # ------------------------------------------------------------ other formats

    def to_bcq(self) -> tuple[Array, Array]:
        """The code as LUT-GEMM and AnyBCQ read it (binary coding quantization) [1]_ [2]_.

        Of several precisions it is the last one; `at` gives the scales of the others.

        Returns
        -------
        planes : uint32 array, shape (n / 32, bits, m)
            Bit t of a word is the sign of element 32 j + t of a line, 1 for +1.
        scales : array in the code's dtype, shape (groups, bits, m)
            There is one group where a line shares its scales.

        Raises
        ------
        ValueError
            If the code has another rank than 2, a bit map, a shift, lines whose length is no
            multiple of 32, scales that are neither for the tensor, for lines nor for groups, or a
            shorter last group in each line.

        References
        ----------
        .. [1] G. Park et al., "LUT-GEMM: Quantized Matrix Multiplication based on LUTs for
           Efficient Inference in Large-Scale Generative Language Models", ICLR 2024,
           arXiv:2206.09557.
        .. [2] G. Park et al., "AnyBCQ: Hardware Efficient Flexible Binary-Coded Quantization for
           Multi-Precision LLMs", arXiv:2510.10467, 2025.

        Examples
        --------
        >>> import numpy as np, cubin
        >>> code = cubin.quantize(np.ones((2, 64), np.float32), 1, channel_axis=0)
        >>> planes, scales = code.to_bcq()
        >>> planes.shape, scales.shape, hex(planes[0, 0, 0])
        ((2, 1, 2), (1, 1, 2), '0xffffffff')
        """
        if len(self.shape) != 2 or self.shape[1] % 32 or not isinstance(self._bits, int):
            raise ValueError(
                "only a code of shape (m, n) with n a multiple of 32 and without a map has this "
                f"form, got {self.shape} with bits {np.shape(self._bits) or self._bits}"
            )
        if self._shift is not None:
            raise ValueError("binary coding quantization has no shift, but this code has one")
        if self.channel_axis not in (None, (), 0, (0,)):
            raise ValueError(f"scales must be those of lines, got channel_axis={self.channel_axis}")
        if len(self._rows.sections) > 1:
            raise ValueError(
                f"this form has groups of one length, but group_size={self.group_size} leaves a "
                f"shorter last one in lines of {self.shape[1]} elements"
            )
        lines, bits = self.shape[0], self._bits
        xp = libraries.library(self._planes)
        with libraries.current_device(self._planes):
            words = self._planes[:bits].reshape(bits, -1, 4, lines).transpose(1, 0, 3, 2)
            planes = xp.ascontiguousarray(words).view(np.uint32)[..., 0]
            scales = self._scales[:bits].reshape(bits, 1 if self._scales.ndim < 2 else lines, -1)
            groups = scales.shape[2] if self._scales.size else 1
            spread = xp.broadcast_to(scales.transpose(2, 0, 1), (groups, bits, lines))
            parts = planes, xp.ascontiguousarray(spread)
            return libraries.given_back(parts[0], self._library), libraries.given_back(
                parts[1], self._library
            )

    @classmethod
    def from_bcq(cls, planes: Array, scales: Array) -> BinaryCode:
        """The code that `to_bcq` gave: per channel, axis 0, for one group, else per group.

        Parameters
        ----------
        planes : uint32 array, shape (n / 32, bits, m)
        scales : float array, shape (groups, bits, m)

        Raises
        ------
        TypeError
            If an argument has another dtype, or libraries are mixed.
        ValueError
            If the shapes do not fit together.
        """
        library, (planes, scales) = libraries.all_viewed({"planes": planes, "scales": scales})
        scales = arrays.as_floats("scales", scales)
        xp = libraries.library(planes, scales)
        planes = planes if libraries.on_device(planes) else np.asarray(planes)
        if planes.dtype != np.uint32:
            raise TypeError(f"planes must be uint32, got {planes.dtype}")
        if planes.ndim != 3 or scales.ndim != 3 or planes.shape[1:] != scales.shape[1:]:
            raise ValueError(
                f"planes of shape {planes.shape} and scales of shape {scales.shape} must be "
                "(n / 32, bits, m) and (groups, bits, m)"
            )
        words, bits, lines = planes.shape
        groups = len(scales)
        if not groups or 32 * words % groups:
            raise ValueError(f"{groups} groups do not divide lines of {32 * words} elements")
        with libraries.current_device(planes):
            held = xp.ascontiguousarray(planes)[..., None].view(np.uint8).transpose(1, 0, 3, 2)
            held = held.reshape(bits, 4 * words, lines)
            of_lines = scales.transpose(1, 2, 0)
            given: dict[str, Any] = {"group_size": 32 * words // groups}
            if groups == 1:
                of_lines, given = of_lines[..., 0], {"channel_axis": 0}
            code = cls(
                xp.ascontiguousarray(of_lines), held, bits, shape=(lines, 32 * words), **given
            )
            return code.given_to(library)

    @classmethod
    def from_uniform(
        cls,
        q: Array,
        scale: Array,
        zero: Array,
        *,
        bits: int | None = None,
        channel_axis: int | tuple[int, ...] | None = None,
        group_size: int | None = None,
    ) -> BinaryCode:
        """The code of integers that stand for ``scale * (q - zero)``, as of GPTQ, AWQ or HQQ.

        The k bits of an integer are k levels whose scales halve, the largest first, and a shift:

        .. math:: a_i = s\\, 2^{k-2-i}, \\quad c = s \\left(\\tfrac{2^k - 1}{2} - z\\right)

        so that the signs of a level are a bit of the integers, which they give back exactly.

        Parameters
        ----------
        q : integer array, any shape
            In 0 .. 2^k - 1.
        scale : float array that broadcasts to the scale shape
            Its dtype is that of the code.
        zero : real number or array that broadcasts to the scale shape
            The integer that stands for 0; it may lie between two.
        bits : int, optional
            k, 1 to 16. By default as many as the largest of the integers has, and at least 1.
        channel_axis : int or tuple of int, optional
        group_size : int, optional

        Returns
        -------
        BinaryCode
            Its scales and shift are rounded to the dtype of `scale`.

        Raises
        ------
        TypeError
            If `q` is not integer, `scale` not floating point, `zero` not real, `bits` no integer,
            or libraries are mixed.
        ValueError
            If an integer or `bits` is out of range, or `scale` or `zero` does not broadcast.

        Examples
        --------
        >>> import numpy as np, cubin
        >>> code = cubin.BinaryCode.from_uniform(np.array([0, 5, 7]), np.float32(0.5), 4)
        >>> code.dequantize(), code.scales.tolist(), code.shift.tolist()
        (array([-2. ,  0.5,  1.5], dtype=float32), [1.0, 0.5, 0.25], -0.25)
        """
        parts = {"q": q, "scale": scale, "zero": zero}
        library, (q, scale, zero) = libraries.all_viewed(parts)
        q = q if libraries.on_device(q) else arrays.as_host_array("q", q)
        if q.dtype.kind not in "iu":
            raise TypeError(f"q must be an integer array, got {q.dtype}")
        scale = arrays.as_floats("scale", scale)
        xp = libraries.library(q, scale)
        if not libraries.on_device(zero):
            zero = arrays.as_host_array("zero", zero)
            zero = xp.asarray(zero) if zero.ndim == 0 else zero  # a number for either library
        libraries.library(scale, zero)  # not a mixture
        if zero.dtype.kind not in "iu" and not floats.is_float(zero.dtype):
            raise TypeError(f"zero must be a real number or an array of them, got {zero.dtype}")
        rows = rows_of(q.shape, channel_axis, group_size)
        for name, array in (("scale", scale), ("zero", zero)):
            arrays.check_broadcasts(name, array, rows.scale_shape, "the scale shape")
        with libraries.current_device(scale):
            least, most = (int(q.min()), int(q.max())) if q.size else (0, 0)
            count = max(1, most.bit_length())
            count = count if bits is None else arrays.as_integer("bits", bits)
            if not 1 <= count <= MAX_BITS:
                raise ValueError(f"bits must lie in 1 .. {MAX_BITS}, got {count}")
            if least < 0 or most >= 1 << count:
                wrong = least if least < 0 else most
                raise ValueError(
                    f"q of {count} bits must lie in 0 .. {(1 << count) - 1}, got {wrong}"
                )
            step = xp.broadcast_to(conversions.widened(scale), rows.scale_shape)
            middle = ((1 << count) - 1) / 2 - zero.astype(np.float64)
            scales = xp.stack([step * 2.0 ** (count - 2 - level) for level in range(count)])
            shift = xp.asarray(step * middle + 0.0)  # never -0.0
            planes = []
            for level in range(count):
                bit = (q >> (count - 1 - level) & 1).astype(np.int8)
                planes.append(packed(bit[None] * 2 - 1, np.uint8(1)))
            return assemble(
                conversions.narrowed(scales, scale.dtype), xp.concatenate(planes), np.uint8(count),
                rows, conversions.narrowed(shift, scale.dtype),
            ).given_to(library)  # fmt: skip

    def to_q1_0(self) -> Array:
        """The code as blocks of ggml's type ``Q1_0``: a float16 scale and 16 bytes of signs.

        Returns
        -------
        uint8 array, shape (\\*x.shape[:-1], 18 n / 128)
            For n elements on the last axis.

        Raises
        ------
        ValueError
            If the code has not one bit for each element, whole groups of 128 and the dtype float16,
            or has a shift.

        Examples
        --------
        >>> import numpy as np, cubin
        >>> cubin.quantize(np.ones((2, 256), np.float16), 1, group_size=128).to_q1_0().shape
        (2, 36)
        """
        plain = isinstance(self._bits, int) and self._bits == 1 and self._scales.dtype == np.float16
        whole = self.group_size == 128 and self.shape[-1] % 128 == 0
        if not (whole and plain):
            raise ValueError(
                "Q1_0 has 1 bit, whole groups of 128 and float16 scales, got a code of "
                f"{self._scales.dtype} and shape {self.shape} with bits "
                f"{np.shape(self._bits) or self._bits} and group_size={self.group_size}: "
                "quantize(x.astype(np.float16), 1, group_size=128) makes one"
            )
        if self._shift is not None:
            raise ValueError("Q1_0 has no shift, but this code has one")
        xp = libraries.library(self._planes)
        with libraries.current_device(self._planes):
            count = self._rows.count
            signs = xp.ascontiguousarray(self._planes[0].T).reshape(count, 16)
            scales = xp.ascontiguousarray(self._scales[0]).reshape(count, 1).view(np.uint8)
            blocks = xp.concatenate([scales, signs], axis=1)
            blocks = blocks.reshape(*self.shape[:-1], 18 * (self.shape[-1] // 128))
            return libraries.given_back(blocks, self._library)

    @classmethod
    def from_q1_0(cls, blocks: Array) -> BinaryCode:
        """The code of blocks of ggml's type ``Q1_0``, uint8 of shape (..., 18 n / 128).

        Raises
        ------
        TypeError
            If `blocks` are not uint8.
        ValueError
            If the last axis holds no whole blocks.
        """
        library, blocks = libraries.viewed("blocks", blocks)
        blocks = blocks if libraries.on_device(blocks) else np.asarray(blocks)
        xp = libraries.library(blocks)
        if blocks.dtype != np.uint8:
            raise TypeError(f"blocks must be uint8, got {blocks.dtype}")
        if blocks.ndim == 0 or blocks.shape[-1] % 18:
            raise ValueError(f"blocks of 18 bytes do not fill the shape {blocks.shape}")
        shape = (*blocks.shape[:-1], blocks.shape[-1] // 18 * 128)
        lines = lines_of(shape)
        with libraries.current_device(blocks):
            split = xp.ascontiguousarray(blocks).reshape(*shape[:-1], shape[-1] // 128, 18)
            scales = xp.ascontiguousarray(split[..., :2]).view(np.float16)[..., 0]
            planes = split[..., 2:].reshape(1, lines.count, lines.width).transpose(0, 2, 1)
            code = cls(scales[None], planes, 1, shape=shape, group_size=128)
            return code.given_to(library)

    # ------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the code to a file: ``.safetensors`` if its name ends so, else ``.npz``.

        The arrays are ``scales``, ``planes``, ``bits`` and, if the code has them, ``shift`` and
        ``tables``; nothing is pickled. A bit map is packed to its entropy, and only the signs that
        exist are stored then. In an ``.npz`` archive, which is not compressed, ``layout`` (JSON)
        has the shape and the granularity; in ``.safetensors`` the metadata has. `save_all`
        describes that format.

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
        FileNotFoundError
            If there is no such folder.
        ValueError
            If the name of the file ends on anything else. If there are more than 16 levels, or far
            more elements than the file has bits: none of 2^32 elements have a level, say. If `path`
            is a folder or a device.
        """
        if os.path.splitext(os.fspath(path))[1] not in ("", ".npz", ".safetensors"):
            raise ValueError(f"path must end on .npz or .safetensors, got {os.fspath(path)!r}")
        from cubin.codes import files  # here, since zipfile and json take long to import

        with libraries.current_device(self._planes, self._library):
            files.write(path, {"": self.to_host()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BinaryCode:
        """Read a code that `save` wrote, as NumPy arrays.

        The arrays of a ``.safetensors`` file are read-only views of the file, which is mapped into
        memory: it is read when they are used.

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
            If the file is damaged, truncated or no BinaryCode, or holds several. Sizes are checked
            against the file's own length before anything is allocated, members of other names or
            of the same name are refused, and nothing is unpickled.
        """
        codes = cls.load_all(path)
        if len(codes) != 1:
            raise ValueError(f"{os.fspath(path)!r} holds {len(codes)} codes: use load_all")
        return next(iter(codes.values()))

    @staticmethod
    def save_all(path: str | os.PathLike[str], codes: Mapping[str, BinaryCode]) -> None:
        """Write several codes to one ``.safetensors`` file, as `save` writes one.

        The tensors of a code are ``<name>.scales``, ``<name>.planes``, ``<name>.bits`` and, if it
        has a shift or several precisions, ``<name>.shift`` and ``<name>.tables``, of a code with
        the name "" ``scales`` and so on. The metadata has ``format`` and, as JSON, ``codes``: for
        each name the shape, channel axis, group size and levels, the shape of a map, whether there
        is a shift, and the precisions.

        Parameters
        ----------
        path : str or path
            Its name ends on ``.safetensors``.
        codes : mapping of str to BinaryCode

        Raises
        ------
        TypeError
            If `codes` is no mapping, a value no BinaryCode, or a name no string.
        ValueError
            As from `save`, or if the name of the file ends otherwise.
        """
        if not os.fspath(path).endswith(".safetensors"):
            raise ValueError(f"path must end on .safetensors, got {os.fspath(path)!r}")
        if not isinstance(codes, Mapping):
            raise TypeError(f"codes must map names to codes, got {type(codes).__qualname__}")
        for name, code in codes.items():
            if not isinstance(name, str) or not isinstance(code, BinaryCode):
                raise TypeError(f"codes must map names to codes, got {name!r}: {type(code)}")
        from cubin.codes import files

        files.write(path, {name: code.to_host() for name, code in codes.items()})

    @classmethod
    def load_all(cls, path: str | os.PathLike[str]) -> dict[str, BinaryCode]:
        """Read all codes of a file, by their names; errors as those of `load`."""
        from cubin.codes import files

        codes = {}
        for name, arguments in files.read(path).items():
            make = cls.from_signs if "signs" in arguments else cls
            try:
                codes[name] = make(**arguments)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{os.fspath(path)!r} is no intact BinaryCode: {error}") from error
        return codes


def assemble(
    scales: Array,
    planes: Array,
    entries: Any,
    rows: Rows,
    shift: Array | None = None,
    precisions: tuple[int, ...] | None = None,
    tables: Array | None = None,
) -> BinaryCode:
    """A code whose parts are known to fit. They are not checked, which would wait for a device.

    `entries` are the bits, a uint8 scalar or a uint8 array that broadcasts to the shape.
    """
    code = BinaryCode.__new__(BinaryCode)
    code._fill(scales, planes, entries, rows, shift, precisions, tables)
    return code


def joined(sections: Sequence[BinaryCode], entries: Any, rows: Rows) -> BinaryCode:
    """The code of an array, from those of the sections of its rows.

    A section of which no element has a level has no scales for it: they are 0.
    """
    levels = max(len(code._planes) for code in sections)
    scales = rows.joined([_filled(code._scales, levels) for code in sections])
    planes = [(_filled(code._planes, levels), code.shape) for code in sections]
    shifts = [code._shift for code in sections if code._shift is not None]
    shift = rows.joined(shifts) if shifts else None
    tables = [code._tables for code in sections if code._tables is not None]
    held = joined_planes(planes, rows.shape)
    precisions = sections[0].precisions
    joint = rows.joined(tables) if tables else None
    return assemble(scales, held, entries, rows, shift, precisions, joint)


def _filled(array: Array, levels: int) -> Array:
    """An array of some levels with zeros for those that it lacks."""
    if len(array) == levels:
        return array
    filled = libraries.library(array).zeros((levels, *array.shape[1:]), array.dtype)
    filled[: len(array)] = array
    return filled


def library_of(code: BinaryCode) -> libraries.Library | None:
    """The library that a code gives its arrays in, if that is not NumPy or CuPy."""
    return code._library


def decoding_of(code: BinaryCode) -> Decoding:
    """The values of a code, which are computed block by block."""
    return Decoding(code._scales, code._planes, code._entries, code._rows, code._shift)


# ---------------------------------------------------------------- products


def _pull_times(gy: Any, shape: tuple[int, ...], code: BinaryCode) -> Any:
    return gy @ code if len(shape) == 1 else (gy.T @ code).T


@libraries.border(adjoint=_pull_times)
def _times(x: Array, code: BinaryCode) -> Array:
    """``code @ x``."""
    x, wide = _factor(x, code, 0, 1)
    with libraries.current_device(x):
        y = products.to_lines(wide.T, decoding_of(code)).T
        y = conversions.rounded(y[:, 0] if x.ndim == 1 else y, x.dtype)
        return libraries.library(y).ascontiguousarray(y)


def _pull_from_left(gy: Any, shape: tuple[int, ...], code: BinaryCode) -> Any:
    rows = gy.reshape(math.prod(shape[:-1]), gy.shape[-1])
    return (code @ rows.T).T.reshape(shape)


@libraries.border(adjoint=_pull_from_left)
def _from_left(x: Array, code: BinaryCode) -> Array:
    """``x @ code``."""
    x, wide = _factor(x, code, -1, 0)
    with libraries.current_device(x):
        rows = wide.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        y = conversions.rounded(products.from_lines(rows, decoding_of(code)), x.dtype)
        return y.reshape(*x.shape[:-1], code.shape[1])


def _factor(x: Array, code: BinaryCode, axis: int, side: int) -> tuple[Array, Array]:
    """A factor of a product, and the same in the dtype of the sums, of rank 2 if it has one."""
    x = arrays.as_floats("x", x)
    libraries.library(x, code._planes)  # not a mixture
    if len(code.shape) != 2:
        raise ValueError(f"only a code of rank 2 has products, got one of shape {code.shape}")
    if not (x.ndim >= 1 and (axis or x.ndim <= 2)) or x.shape[axis] != code.shape[side]:
        raise ValueError(f"x of shape {x.shape} does not fit a code of shape {code.shape}")
    work = np.result_type(floats.work_dtype(x.dtype), floats.work_dtype(code._scales.dtype))
    wide = conversions.rounded(x, work)
    return x, wide[:, None] if x.ndim == 1 and not axis else wide


def _shape_of(shape: Sequence[int]) -> tuple[int, ...]:
    lengths = tuple(arrays.as_integer("shape", n) for n in shape)
    if min(lengths, default=0) < 0:
        raise ValueError(f"shape must hold no negative length, got {lengths}")
    return lengths


def _check_scales(scales: Array, levels: int, rows: Rows) -> None:
    if scales.shape != (levels, *rows.scale_shape):
        raise ValueError(
            f"scales have shape {scales.shape}, but {levels} levels of an array of shape "
            f"{rows.shape} with channel_axis={rows.channel_axis} and group_size={rows.group_size} "
            f"need {(levels, *rows.scale_shape)}"
        )


def _checked_shift(shift: Any, scales: Array, rows: Rows) -> Any:
    """A shift, checked against the scales; None where there is none."""
    if shift is None:
        return None
    shift = arrays.as_floats("shift", shift)
    libraries.library(scales, shift)  # not a mixture
    if shift.dtype != scales.dtype:
        raise TypeError(f"shift must be {scales.dtype}, as the scales are, got {shift.dtype}")
    if shift.shape != rows.scale_shape:
        raise ValueError(
            f"shift has shape {shift.shape}, but the scales of a level have {rows.scale_shape}"
        )
    return shift


def _checked_tables(
    precisions: Any, tables: Any, entries: Any, scales: Array, shift: Any, rows: Rows
) -> tuple[tuple[int, ...] | None, Any]:
    """Precisions and their tables, checked against the rest of a code."""
    if precisions is None and tables is None:
        return None, None
    if precisions is None or tables is None:
        raise ValueError("precisions and tables go together, but one of them is missing")
    listed = as_precisions(precisions, entries)
    tables = arrays.as_floats("tables", tables)
    libraries.library(scales, tables)  # not a mixture
    if tables.dtype != scales.dtype:
        raise TypeError(f"tables must be {scales.dtype}, as the scales are, got {tables.dtype}")
    count = sum(listed[:-1]) + (len(listed) - 1) * (shift is not None)
    if tables.shape != (count, *rows.scale_shape):
        raise ValueError(
            f"tables have shape {tables.shape}, but the precisions {listed} need "
            f"{(count, *rows.scale_shape)}"
        )
    return listed, tables


def _equal(one: Array, other: Array) -> bool:
    """Whether floats of one dtype are the same; NaN equals NaN."""
    xp = libraries.library(one)
    pair = conversions.computable(one), conversions.computable(other)
    return bool(xp.array_equal(*pair, equal_nan=True))


def _check_bits(planes: Array, entries: Any, rows: Rows) -> None:
    """ValueError where a bit is set that stands for no sign."""
    lines = lines_of(rows.shape)
    beyond = lines.length % 8
    if beyond and lines.count and bool((planes[:, -1] >> np.uint8(beyond)).any()):
        raise ValueError("planes must hold 0 in the bits beyond the end of a line")
    for level, plane in enumerate(planes if planes.size else ()):
        if not np.ndim(entries) and level < entries:
            continue
        hot = coded(entries, level, rows.shape, planes) if np.ndim(entries) else np.uint8(0)
        if bool((plane & ~hot).any()):
            raise ValueError(
                f"planes must hold 0 at level {level} where bits are not more than {level}"
            )
