"""The results of a run, line by line, so that it goes on where it stopped.

The first line says of which options and files the results are; every other line is a tensor. A line
is written once its tensor is done, so that a process that is killed loses only the tensors in work.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from cubin.analysis.table import ErrorRow
from cubin.commands.arguments import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = "cubin error/1"
ENDS = 1 << 16
"""Bytes at the beginning and the end of a file that its fingerprint looks at."""


@dataclass(frozen=True)
class Line:
    """What became of a tensor: its rows, or the reason why it is skipped."""

    name: str
    rows: list[ErrorRow]
    skipped: str = ""


def fingerprint(options: Mapping[str, Any], files: Iterable[Path], tensors: Any) -> str:
    """A number for options and files: their sizes, headers, and first and last bytes."""
    digest = hashlib.sha256(json.dumps([options, tensors], sort_keys=True).encode())
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            digest.update(f"{file.name} {size} ".encode() + stream.read(ENDS))
            stream.seek(max(0, size - ENDS))
            digest.update(stream.read(ENDS))
    return digest.hexdigest()


class Journal:
    """A file of results that grows.

    Parameters
    ----------
    path : Path
        A new file, or one of a run of the same options and files that has stopped.
    options : mapping
        What is said of the run in the first line.
    fingerprint : str

    Attributes
    ----------
    lines : dict of str to Line
        What has been done before.

    Raises
    ------
    UsageError
        If the file is of other options or files, is damaged, or another run writes it.
    """

    def __init__(self, path: Path, options: Mapping[str, Any], fingerprint: str) -> None:
        self.path = path
        self.lines: dict[str, Line] = {}
        self._head: dict[str, Any] = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "options": dict(options),
        }
        self._file: BinaryIO | None = None
        if path.exists():
            try:
                self._open()
                self._read()
            except BaseException:
                self.close()
                raise

    def _open(self) -> BinaryIO:
        self._file = self.path.open("ab+", buffering=0)
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"{self.path}: another run is writing it") from None
            except OSError:
                pass  # a file system without locks
        return self._file

    def _read(self) -> None:
        assert self._file is not None
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # a line that a killed process has begun
            self._file.truncate(whole)
        lines = content[:whole].splitlines()
        if not lines:
            self._write(self._head)
            return
        try:
            head, *rest = [json.loads(line) for line in lines]
            matches = head["fingerprint"] == self._head["fingerprint"]
            options = head["options"]
            if matches:
                self.lines = {line["tensor"]: line_of(line) for line in rest}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{self.path}: not a sound file of results ({error}); remove it"
            ) from error
        if not matches:
            mine = self._head["options"]
            named = [name for name in mine if options.get(name) != mine[name]]
            differ = f"other options ({', '.join(named)})" if named else "other files"
            raise UsageError(
                f"{self.path} holds the results of {differ}; choose another --output, or remove it"
            )

    def append(self, line: Line) -> None:
        """Write what became of a tensor."""
        if self._file is None:
            self._open()
            self._write(self._head)
        self._write(
            {"tensor": line.name, "rows": [record(row) for row in line.rows]}
            | ({"skipped": line.skipped} if line.skipped else {})
        )

    def _write(self, values: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(values, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def record(row: ErrorRow) -> dict[str, Any]:
    """A row as values of JSON, which has no infinity: such numbers are strings."""
    values = dataclasses.asdict(row)
    values["sums"] = [number(value) for value in row.sums]
    return {name: number(value) for name, value in values.items()}


def number(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def line_of(values: Mapping[str, Any]) -> Line:
    """The line that was written as these values."""
    return Line(
        values["tensor"], [row_of(row) for row in values["rows"]], values.get("skipped", "")
    )


def row_of(values: Mapping[str, Any]) -> ErrorRow:
    texts = {"name", "solver", "granularity", "bits", "shape", "size", "sums"}
    floats = {name: float(value) for name, value in values.items() if name not in texts}
    return ErrorRow(
        name=values["name"],
        shape=tuple(values["shape"]),
        size=values["size"],
        solver=values["solver"],
        bits=values["bits"],
        granularity=values["granularity"],
        sums=tuple(float(value) for value in values["sums"]),  # type: ignore[arg-type]
        **floats,
    )
