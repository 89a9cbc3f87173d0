"""ErrorTable: errors of arrays by solver and bit width, to print, save and plot."""

from __future__ import annotations

import csv
import dataclasses
import html
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cubin.errors import Errors

_ROWS_SHOWN = 60


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
    bits : int
    relative_mse : float
        Squared error over power.
    sqnr_db : float
        In dB.
    cosine_similarity : float
    max_abs_error : float
        In the unit of the array.
    payload_bits, effective_bits : float
        Bits per element of the codes alone, and with bit map and scales.
    compression : float
        32 over the effective bits: how much smaller than float32.
    sums : tuple of float
        The sums of squared errors, of x^2, of y^2 and of x y, which `ErrorTable.overall` adds up.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    solver: str
    bits: int
    relative_mse: float
    sqnr_db: float
    cosine_similarity: float
    max_abs_error: float
    payload_bits: float
    effective_bits: float
    compression: float
    sums: tuple[float, float, float, float] = dataclasses.field(repr=False)

    @classmethod
    def of(
        cls,
        found: Errors,
        *,
        name: str,
        shape: tuple[int, ...],
        solver: str,
        bits: int,
        payload_bits: float,
        effective_bits: float,
        size: int | None = None,
    ) -> ErrorRow:
        """The row for measured errors."""
        return cls(
            name=name,
            shape=tuple(shape),
            size=math.prod(shape) if size is None else size,
            solver=solver,
            bits=bits,
            relative_mse=float(found.relative_mse()),
            sqnr_db=float(found.sqnr_db()),
            cosine_similarity=float(found.cosine_similarity()),
            max_abs_error=float(found.worst),
            payload_bits=payload_bits,
            effective_bits=effective_bits,
            compression=32 / effective_bits if effective_bits else math.inf,
            sums=(
                float(found.error),
                float(found.power),
                float(found.power_of_approx),
                float(found.product),
            ),
        )


COLUMNS = tuple(field.name for field in dataclasses.fields(ErrorRow) if field.name != "sums")

_HEADS = {
    "name": "tensor",
    "shape": "shape",
    "solver": "solver",
    "bits": "bits",
    "relative_mse": "rel. MSE",
    "sqnr_db": "SQNR [dB]",
    "cosine_similarity": "cosine",
    "max_abs_error": "max |error|",
    "payload_bits": "payload [bit]",
    "effective_bits": "effective [bit]",
    "compression": "float32 / size",
}


@dataclass(frozen=True)
class ErrorTable:
    """Errors of arrays by solver and bit width.

    Attributes
    ----------
    rows : list of ErrorRow
        In the order of the sweep: by array, solver and bit width.
    """

    rows: list[ErrorRow]

    def overall(self) -> list[ErrorRow]:
        """One row named "overall" for each solver and bit width, over all arrays together.

        Squared errors and powers are added up before they are divided, and bits are averaged over
        elements, as if the arrays were one.
        """
        groups: dict[tuple[str, int], list[ErrorRow]] = {}
        for row in self.rows:
            groups.setdefault((row.solver, row.bits), []).append(row)
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

    def plot(self) -> Any:
        """A figure of the error against the bit width.

        Shows the median over the arrays and the range between their quartiles for each solver,
        beside what is best for Gaussian samples: Lloyd-Max with 2^bits free levels, and Shannon's
        bound 4^-bits.

        Returns
        -------
        matplotlib.figure.Figure
        """
        from cubin.analysis.plot import draw_error_per_bit_width, new_figure

        figure, axes = new_figure()
        draw_error_per_bit_width(axes, self)
        return figure

    def __str__(self) -> str:
        lines = [list(_HEADS.values())]
        lines += [_cells(row) for row in [*self.rows, *self.overall()]]
        widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADS))]
        text = []
        for line in lines:
            left = [cell.ljust(width) for cell, width in zip(line[:3], widths[:3], strict=True)]
            right = [cell.rjust(width) for cell, width in zip(line[3:], widths[3:], strict=True)]
            text.append("  ".join(left + right).rstrip())
        return "\n".join(text)

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
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _html_row(row: ErrorRow, tag: str) -> str:
    cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in _cells(row))
    return f"<tr>{cells}</tr>"


def _cells(row: ErrorRow) -> list[str]:
    name = row.name if len(row.name) <= 40 else f"…{row.name[-39:]}"
    return [
        name,
        "x".join(str(n) for n in row.shape),
        row.solver,
        str(row.bits),
        f"{row.relative_mse:.3e}",
        f"{row.sqnr_db + 0.0:.2f}",
        f"{row.cosine_similarity:.5f}",
        f"{row.max_abs_error:.3g}",
        f"{row.payload_bits:.3f}",
        f"{row.effective_bits:.3f}",
        f"{row.compression:.2f}",
    ]


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
        payload_bits=mean("payload_bits"),
        effective_bits=mean("effective_bits"),
    )
