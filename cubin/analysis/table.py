"""ErrorTable: errors of arrays by solver and bit width, to print, save and plot."""

from __future__ import annotations

import csv
import dataclasses
import html
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cubin import errors
from cubin.core.libraries import Array
from cubin.errors import Errors

_ROWS_SHOWN = 60
_NAMES_SHOWN = 3
_REASONS_SHOWN = 8


@dataclass(frozen=True)
class ErrorRow:
    """The error of one array with one solver at one bit width.

    Attributes
    ----------
    name : str
    shape : tuple of int
    size : int
        Number of elements.
    solver : str
        The name of the solver or other quantizer.
    bits : int, float or str
        The bit width, or the name of the bit map.
    granularity : str
        Which elements share their scales: "tensor", "axis 0" (those of one index of it),
        "channel" (those of one index of the axis that the array brought), "group 64", or "" where
        it is not known.
    relative_mse : float
        Squared error over power.
    sqnr_db : float
        In dB.
    cosine_similarity : float
    max_abs_error : float
        In the unit of the array.
    payload_bits, effective_bits : float
        Bits per element of the codes alone, and with bit map and scales; NaN if not known.
    compression : float
        32 over the effective bits: how much smaller than float32.
    sums : tuple of float
        The sums of squared errors, of x^2, of y^2 and of x y, which `ErrorTable.overall` adds up.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    solver: str
    bits: int | float | str
    granularity: str
    relative_mse: float
    sqnr_db: float
    cosine_similarity: float
    max_abs_error: float
    payload_bits: float
    effective_bits: float
    compression: float
    sums: tuple[float, float, float, float] = field(repr=False)

    @classmethod
    def of(
        cls,
        measured: Errors,
        *,
        name: str,
        shape: tuple[int, ...],
        solver: str,
        bits: int | float | str,
        payload_bits: float,
        effective_bits: float,
        granularity: str = "",
        size: int | None = None,
    ) -> ErrorRow:
        """The row for measured errors."""
        return cls(
            name=name,
            shape=tuple(shape),
            size=math.prod(shape) if size is None else size,
            solver=solver,
            bits=bits,
            granularity=granularity,
            relative_mse=float(measured.relative_mse()),
            sqnr_db=float(measured.sqnr_db()),
            cosine_similarity=float(measured.cosine_similarity()),
            max_abs_error=float(measured.worst),
            payload_bits=payload_bits,
            effective_bits=effective_bits,
            compression=32 / effective_bits if effective_bits else math.inf,
            sums=(
                float(measured.error),
                float(measured.power),
                float(measured.power_of_approx),
                float(measured.product),
            ),
        )

    @classmethod
    def measure(
        cls,
        x: Array,
        approx: Array,
        *,
        name: str,
        solver: str,
        bits: int | float,
        effective_bits: float = math.nan,
        granularity: str = "",
    ) -> ErrorRow:
        """The row for an approximation that another quantizer has made.

        Parameters
        ----------
        x, approx : array of float16, bfloat16, float32 or float64, of one shape
        name : str
            That of the array.
        solver : str
            That of the quantizer, under which the table and the figure have it.
        bits : int or float
            Bits per element of the codes alone, such as 1.58 for three values.
        effective_bits : float, optional
            Bits per element in all. Default: not known.
        granularity : str, optional
            Which elements share their scales, such as "group 64".

        Returns
        -------
        ErrorRow

        Raises
        ------
        TypeError, ValueError
            As `cubin.errors.relative_mse`.

        Examples
        --------
        >>> import numpy as np, cubin
        >>> x = np.random.default_rng(0).standard_normal((64, 256))
        >>> table = cubin.analysis.error_per_bit_width({"w": x}, [1, 2])
        >>> y = np.sign(x) * (abs(x) > 0.6) * 1.2
        >>> table.rows.append(
        ...     cubin.analysis.ErrorRow.measure(x, y, name="w", solver="ternary", bits=1.58)
        ... )
        >>> [(row.solver, row.bits) for row in table.overall()]
        [('greedy', 1), ('greedy', 2), ('ternary', 1.58)]
        """
        return cls.of(
            errors.measure(x, approx),
            name=name,
            shape=np.shape(x),
            solver=solver,
            bits=bits,
            payload_bits=float(bits),
            effective_bits=effective_bits,
            granularity=granularity,
        )


COLUMNS = tuple(field.name for field in dataclasses.fields(ErrorRow) if field.name != "sums")

_HEADS = {
    "name": "tensor",
    "shape": "shape",
    "solver": "solver",
    "bits": "bits",
    "granularity": "scales per",
    "relative_mse": "rel. MSE",
    "sqnr_db": "SQNR [dB]",
    "cosine_similarity": "cosine",
    "max_abs_error": "max |error|",
    "payload_bits": "payload [bit]",
    "effective_bits": "effective [bit]",
    "compression": "float32 / size",
}


@dataclass(frozen=True, repr=False)
class ErrorTable:
    """Errors of arrays by solver and bit width.

    ``table + other`` has the rows of both, so that one table and one figure compare them.

    Attributes
    ----------
    rows : list of ErrorRow
        In the order of the sweep: by array, solver and bit width. Rows of other quantizers, from
        `ErrorRow.measure`, can be appended.
    skipped : list of (str, str)
        The names of the arrays that the sweep has skipped, and why.
    """

    rows: list[ErrorRow]
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __add__(self, other: object) -> ErrorTable:
        if not isinstance(other, ErrorTable):
            return NotImplemented
        return ErrorTable(self.rows + other.rows, self.skipped + other.skipped)

    def overall(self) -> list[ErrorRow]:
        """One row named "overall" for each solver, granularity and bit width, over all arrays.

        Squared errors and powers are added up before they are divided, and bits are averaged over
        elements, as if the arrays were one.
        """
        groups: dict[tuple[Any, ...], list[ErrorRow]] = {}
        for row in self.rows:
            groups.setdefault((row.solver, row.granularity, row.bits), []).append(row)
        return [_together(rows) for rows in groups.values()]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows, then the overall rows, as comma-separated values.

        Parameters
        ----------
        path : str or path
            A file that exists is overwritten.
        """
        rows = [*self.rows, *self.overall()]  # what fails leaves the file as it is
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for row in rows:
                values = [getattr(row, column) for column in COLUMNS]
                values[1] = "x".join(str(n) for n in row.shape)
                writer.writerow(values)

    def summary(self, worst: int = 10) -> str:
        """The arrays of the largest error, and the overall rows, as text.

        Parameters
        ----------
        worst : int
            How many arrays: those of the largest relative MSE at the last solver and bit width.
        """
        last = {(row.solver, row.bits) for row in self.rows[-1:]}
        ranked = [row for row in self.rows if (row.solver, row.bits) in last]
        ranked.sort(key=lambda row: row.relative_mse, reverse=True)
        return self._text(ranked[:worst], hint=False)

    def to_pandas(self) -> Any:
        """The rows, without the overall ones, as a pandas.DataFrame.

        Raises
        ------
        ImportError
            If pandas is not installed.
        """
        import pandas as pd

        return pd.DataFrame(
            [[getattr(row, column) for column in COLUMNS] for row in self.rows], columns=COLUMNS
        )

    def plot(self, ax: Any = None) -> Any:
        """Draw the error against the bit width.

        Shows the median over the arrays and the range between their quartiles for each solver,
        beside what is best for Gaussian samples: Lloyd-Max with 2^bits free levels, and Shannon's
        bound 4^-bits. These are over the payload bits; thin curves have the medians over the
        effective bits of all arrays together.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where to draw. Default: a new figure of `matplotlib.pyplot`.

        Returns
        -------
        matplotlib.axes.Axes
            Its figure is ``.figure``: ``table.plot().figure.savefig("error.png")``.
        """
        from cubin.analysis.plot import draw_error_per_bit_width, draw_in_new_figure

        return draw_in_new_figure(self) if ax is None else draw_error_per_bit_width(ax, self)

    def __str__(self) -> str:
        return self._text(self.rows)

    def __repr__(self) -> str:
        return self._text(self.rows[:_ROWS_SHOWN])

    def _text(self, shown: Sequence[ErrorRow], hint: bool = True) -> str:
        above = [list(_HEADS.values()), *map(_cells, shown)]
        below = [*map(_cells, self.overall())]
        widths = [max(map(len, column)) for column in zip(*above, *below, strict=True)]
        text = [_line(cells, widths) for cells in above]
        if hint and len(shown) < len(self.rows):
            text.append(f"... {len(self.rows) - len(shown)} more rows: see .rows or .to_pandas()")
        text += [_line(cells, widths) for cells in below]
        return "\n".join([*text, *_footer(self.skipped)])

    def _repr_html_(self) -> str:
        shown = self.rows[:_ROWS_SHOWN]
        head = "".join(f"<th>{html.escape(title)}</th>" for title in _HEADS.values())
        body = [_html_row(row, "td") for row in shown]
        if len(shown) < len(self.rows):
            body.append(
                f"<tr><td colspan='{len(_HEADS)}'>{len(self.rows) - len(shown)} more rows: "
                "see <code>.rows</code> or <code>.to_pandas()</code></td></tr>"
            )
        body += [_html_row(row, "th") for row in self.overall()]
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        return table + "".join(f"<div>{html.escape(line)}</div>" for line in _footer(self.skipped))


def _footer(skipped: Sequence[tuple[str, str]]) -> list[str]:
    """Lines on what has been skipped, by reason."""
    if not skipped:
        return []
    names: dict[str, list[str]] = {}
    for name, reason in skipped:
        names.setdefault(reason, []).append(name)
    lines = [f"Skipped {counted(len(skipped), 'array')}:"]
    for reason in list(names)[:_REASONS_SHOWN]:
        listed = ", ".join(names[reason][:_NAMES_SHOWN])
        others = len(names[reason]) - _NAMES_SHOWN
        lines.append(f"  {listed}{f' and {others} more' if others > 0 else ''}: {reason}")
    if len(names) > _REASONS_SHOWN:
        lines.append(f"  {len(names) - _REASONS_SHOWN} more reasons: see .skipped")
    return lines


def counted(number: int, noun: str) -> str:
    """A number of things, whose noun takes an s."""
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    left = [cell.ljust(width) for cell, width in zip(cells[:3], widths[:3], strict=True)]
    right = [cell.rjust(width) for cell, width in zip(cells[3:], widths[3:], strict=True)]
    return "  ".join(left + right).rstrip()


def _html_row(row: ErrorRow, tag: str) -> str:
    cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in _cells(row))
    return f"<tr>{cells}</tr>"


def _cells(row: ErrorRow) -> list[str]:
    return [
        _short(row.name),
        "x".join(str(n) for n in row.shape),
        _short(row.solver),
        _short(str(row.bits)),
        row.granularity,
        f"{row.relative_mse:.3e}",
        f"{row.sqnr_db + 0.0:.2f}",
        f"{row.cosine_similarity:.5f}",
        f"{row.max_abs_error:.3g}",
        _bits(row.payload_bits, 3),
        _bits(row.effective_bits, 3),
        _bits(row.compression, 2),
    ]


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"…{name[-39:]}"


def _bits(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _together(rows: Sequence[ErrorRow]) -> ErrorRow:
    size = sum(row.size for row in rows)
    # As NumPy's numbers, which give infinity and NaN where Python's raise.
    error, power, power_of_approx, product = np.sum([row.sums for row in rows], axis=0)
    worst = np.float64(max(row.max_abs_error for row in rows))

    def mean(name: str) -> float:
        return sum(getattr(row, name) * row.size for row in rows) / max(size, 1)

    return ErrorRow.of(
        Errors(error, power, power_of_approx, product, worst),
        name="overall",
        shape=(),
        size=size,
        solver=rows[0].solver,
        bits=rows[0].bits,
        granularity=rows[0].granularity,
        payload_bits=mean("payload_bits"),
        effective_bits=mean("effective_bits"),
    )
