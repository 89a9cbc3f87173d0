"""The cells of the benchmark's grid, and what follows from their times.

A `Cell` is one operation on one array. `cells` lists them: every operation at three base points,
the cells that `WANTED` compares, neighbours of the base points in one factor at a time, and random
cells. All else works on the rows of the CSV alone, so that a recording can be read again later.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

SEED = 0
RANDOM_CELLS = 200
LARGE = 1 << 16
"""Elements from which on no cell should be behind a peer."""

BEHIND = 1.25
"""How many times as long as the fastest peer a cell takes that is behind it."""

Row = Mapping[str, Any]
"""A row of the CSV, as text."""


# ---------------------------------------------------------------- cells

ELEMENTWISE = ("sign", "sign_grad", "ste_mask", "multibit_grad")
SOLVERS = {
    "multibit": "greedy",
    "refined": "refined",
    "alternating": "alternating",
    "converged": "alternating",
    "optimal": "optimal",
}
"""The solver of each approximation. `converged` is `alternating` with iterations=None."""

MAPS = ("top_down", "middle_out", "bottom_up", "budget", "allocate")
FILES = ("save", "load")
OPERATIONS = (
    *ELEMENTWISE, "multibit", "quantize", "dequantize", "refined", "alternating", "converged",
    "optimal", *MAPS, *FILES, "tape step", "import",
)  # fmt: skip
LAYOUTS = (
    "per tensor", "axis 0", "axis 1", "groups of 16", "groups of 32", "groups of 128",
    "groups of 27", "groups of 100", "Fortran order", "transposed view",
)  # fmt: skip
"""`Fortran order` has scales along axis 0, across the order of the memory. A transposed view has
them along its last axis, so that its rows lie in order. Groups of 27 and 100 do not divide the
rows of the base points: the last of a row is shorter."""

ITEM = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
"""Bytes of an element, by dtype."""

FRESH = "fresh process"
NEW = "new memory"


@dataclass(frozen=True)
class Cell:
    """One operation on one array.

    Attributes
    ----------
    operation : str
        One of `OPERATIONS`.
    shape : tuple of int
    layout : str
        One of `LAYOUTS`.
    dtype : str
    bits : int
        The number of levels, or the largest entry of the map; 0 where there are none.
    map : str
        The dtype of a map of 0 to `bits`, or empty.
    importance : bool
    state : str
        What else is set up: `FRESH` and `NEW` say so, or nothing.
    """

    operation: str
    shape: tuple[int, ...]
    layout: str = "axis 0"
    dtype: str = "float32"
    bits: int = 2
    map: str = ""
    importance: bool = False
    state: str = ""

    def __post_init__(self) -> None:
        # What does not matter has one value, so that no cell comes twice.
        if self.operation in (*ELEMENTWISE[:3], *MAPS, "tape step", "import"):
            object.__setattr__(self, "bits", 0)
        if self.layout == "per tensor" and self.operation in ELEMENTWISE:
            object.__setattr__(self, "layout", "axis 0")

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def group(self) -> int | None:
        """The elements of a group."""
        return int(self.layout.split()[-1]) if self.layout.startswith("groups") else None

    @property
    def uneven(self) -> bool:
        """Whether the last group of a row is shorter."""
        return self.group is not None and self.shape[-1] % self.group > 0

    @property
    def axis(self) -> int | None:
        """The axis whose indices have scales of their own."""
        if self.group or self.layout == "per tensor":
            return None
        return {"axis 1": 1, "transposed view": len(self.shape) - 1}.get(self.layout, 0)

    @property
    def granularity(self) -> dict[str, int]:
        """The keywords of cubin's functions."""
        if self.group:
            return {"group_size": self.group}
        return {} if self.axis is None else {"channel_axis": self.axis}

    @property
    def rows(self) -> int:
        if self.group:
            return self.size // self.shape[-1] * -(-self.shape[-1] // self.group)
        return 1 if self.axis is None or not self.shape else self.shape[self.axis]

    @property
    def bytes_per_element(self) -> int:
        """What must be moved: inputs read once, outputs written once; scales do not count."""
        item = ITEM[self.dtype]
        if self.operation in MAPS:
            return item + 1
        moved = {
            "sign_grad": 3 * item, "multibit_grad": 3 * item, "ste_mask": item + 1,
            "quantize": item + self.bits, "dequantize": item + self.bits,
        }.get(self.operation, 2 * item)  # fmt: skip
        mapped = np.dtype(self.map).itemsize if self.map else 0
        return moved + mapped + item * self.importance

    @property
    def label(self) -> str:
        """The cell in words."""
        words = [self.operation, "x".join(map(str, self.shape)), self.layout, self.dtype]
        words += [f"{self.bits} bits"] * (self.bits > 0) + [f"{self.map} map"] * bool(self.map)
        words += ["importance"] * self.importance + [self.state] * bool(self.state)
        return ", ".join(words)

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from all others, as the CSV has it."""
        shape = "x".join(map(str, self.shape))
        importance = str(int(self.importance))
        bits = str(self.bits)
        return (
            self.operation,
            shape,
            self.layout,
            self.dtype,
            bits,
            self.map,
            importance,
            self.state,
        )


KEY = ("operation", "shape", "layout", "dtype", "bits", "map", "importance", "state")
"""The columns of `Cell.key`."""


@dataclass(frozen=True)
class Placed:
    """A cell, and why it is in the grid: one factor away from a base point, or otherwise."""

    cell: Cell
    base: str
    factor: str
    level: str


# ---------------------------------------------------------------- the grid

BASES = {"64x64": (64, 64), "1024x1024": (1024, 1024), "4096x4096": (4096, 4096)}
SIZES = {
    "64": 1 << 6, "4,096": 1 << 12, "65,536": 1 << 16, "1 M": 1 << 20, "4 M": 1 << 22,
    "16 M": 1 << 24, "64 M": 1 << 26,
}  # fmt: skip
JUST_LONGER = (1 << 17) + 1024
"""Elements of a row that is just longer than a block."""

ROW_LENGTHS = (8, 27, 128, 1024, JUST_LONGER, 1 << 20)
COLUMNS = ("sign", "multibit_grad", "multibit", "quantize", "dequantize", "refined", "alternating")
"""The operations that are varied in other factors, the columns of the heat map."""

LARGEST = {
    "optimal": 1 << 12, "converged": 1 << 20, "budget": 1 << 20, "allocate": 1 << 20,
    "top_down": 1 << 20, "middle_out": 1 << 20, "bottom_up": 1 << 20, "import": 0, "tape step": 0,
}  # fmt: skip
"""Elements of the largest base point at which a slow operation is timed."""

QUICK_BASES = ("64x64", "1024x1024")
QUICK_FACTORS = {
    "size": ("65,536",),
    "layout": ("axis 1", "groups of 128", "Fortran order"),
    "row length": ("27",),
    "dtype": ("float16",),
    "bits": ("4", "8"),
    "map": ("uint8",),
}


QUICK_WANTED = ("step", "import", "tape")


def in_rows(size: int, length: int) -> tuple[int, int]:
    """A shape of about `size` elements in rows of `length`, or in one shorter row."""
    length = min(size, length)
    return size // length, length


def convolution(size: int) -> tuple[int, ...]:
    """The shape of about `size` weights of a convolution."""
    side = round((size / 9) ** 0.5)
    return side, side, 3, 3


def neighbours(base: Cell) -> Iterator[tuple[str, str, Cell]]:
    """The cells that differ from one at a base point in one factor: factor, level, cell."""
    operation, size, length = base.operation, base.size, base.shape[1]
    for level, other in SIZES.items():
        # The largest are large enough once, and small ones are not one row each.
        if other <= max(1 << 22, size) or (other > 1 << 24 and size == 1 << 24):
            yield "size", level, replace(base, shape=in_rows(other, length))
    for layout in LAYOUTS:
        other = replace(base, layout=layout)
        if operation in ELEMENTWISE and layout not in ("Fortran order", "transposed view"):
            continue
        if not other.group or length >= other.group:
            yield "layout", layout, other
    if operation in ELEMENTWISE:
        yield "dtype", "float16", replace(base, dtype="float16")
        yield "dtype", "float64", replace(base, dtype="float64")
    else:
        shape = convolution(size)
        yield "layout", "axis 1 of conv", replace(base, shape=shape, layout="axis 1")
        for other in ROW_LENGTHS:
            if other <= size:
                yield "row length", f"{other:,}", replace(base, shape=in_rows(size, other))
        for dtype in ITEM:
            yield "dtype", dtype, replace(base, dtype=dtype)
        for bits in range(1, 9):
            yield "bits", str(bits), replace(base, bits=bits)
    if operation != "sign":
        for dtype in ("uint8", "int64"):
            yield "map", dtype, replace(base, map=dtype)
    if operation in SOLVERS and operation != "multibit":
        yield "importance", "float", replace(base, importance=True)
        yield "importance", "with a map", replace(base, importance=True, map="uint8")
    if operation in ("sign", "multibit") and size == 1 << 24:
        yield "memory", "new", replace(base, state=NEW)


def random_cell(rng: np.random.Generator) -> Cell:
    """A cell of random factors, no larger than takes a second or so."""
    operation = str(rng.choice([*COLUMNS, "sign_grad", "ste_mask", "top_down", "optimal"]))
    largest = {"optimal": 12, "refined": 20, "alternating": 20, "top_down": 20}.get(operation, 22)
    size = int(2 ** rng.uniform(6, largest))
    length = int(rng.choice([n for n in ROW_LENGTHS if n <= size]))
    layout = str(rng.choice(LAYOUTS))
    shape = in_rows(size, length)
    if layout.startswith("groups"):
        group = int(layout.split()[-1])
        shape = in_rows(max(size, group), max(length // group, 1) * group)
    cell = Cell(
        operation, shape[::-1] if layout == "transposed view" else shape, layout,
        str(rng.choice(["float16", "float32", "float64"])), int(rng.integers(1, 9)),
    )  # fmt: skip
    if operation == "optimal":
        return replace(cell, bits=min(cell.bits, 4))
    if operation in ELEMENTWISE[:3] or operation == "top_down":
        return cell
    kind = str(rng.choice(["", "", "", "uint8", "int64"]))
    weighted = operation in ("refined", "alternating") and bool(rng.random() < 0.3)
    return replace(cell, map=kind, importance=weighted)


def cells(quick: bool = False, operations: Sequence[str] = OPERATIONS) -> list[Placed]:
    """The cells of the grid, each once, for the first reason that puts it there.

    Base points come first, then what `WANTED` compares, so that torch.compile, which has so much
    time in all, has been through those before the rest.
    """
    found: dict[Cell, Placed] = {}

    def add(cell: Cell, base: str, factor: str, level: str) -> None:
        if cell.operation in operations:
            found.setdefault(cell, Placed(cell, base, factor, level))

    bases = {name: BASES[name] for name in (QUICK_BASES if quick else BASES)}
    for (name, shape), operation in itertools.product(bases.items(), OPERATIONS):
        if math.prod(shape) <= LARGEST.get(operation, 1 << 24):
            add(Cell(operation, shape), name, "base", "")
    listed = [
        (name, factor, level, cell)
        for (name, shape), operation in itertools.product(bases.items(), COLUMNS)
        for factor, level, cell in neighbours(Cell(operation, shape))
    ]
    for wanted in WANTED:
        if not quick or wanted.name in QUICK_WANTED:
            for cell in wanted.cells():
                # What is in the table and a neighbour as well is drawn with the neighbours.
                place = next(
                    ((n, f, v) for n, f, v, c in listed if c == cell), ("", "table", wanted.name)
                )
                add(cell, *place)
    for name, factor, level, cell in listed:
        if not quick or level in QUICK_FACTORS.get(factor, ()):
            add(cell, name, factor, level)
    rng = np.random.default_rng(SEED)
    target = len(found) + (0 if quick else RANDOM_CELLS)
    drawn = (random_cell(rng) for _ in range(4 * RANDOM_CELLS))
    for cell in drawn:
        if len(found) >= target:
            break
        add(cell, "", "random", "")
    return list(found.values())


# ---------------------------------------------------------------- what is wanted


@dataclass(frozen=True)
class Wanted:
    """What a comparison of cells should give at most.

    Attributes
    ----------
    name, where : str
        The comparison in a word, and in a sentence.
    limit : float
        The largest value that is wanted.
    pairs : tuple of (Cell, Cell or str)
        A cell, and what it is measured against: another cell, by the time per element, or a column
        of its own row, by the time; or a measure of `MEASURES`. The value is the largest of all.
    unit : str
    """

    name: str
    where: str
    limit: float
    pairs: tuple[tuple[Cell, Cell | str], ...]
    unit: str = "x"

    def cells(self) -> Iterator[Cell]:
        for cell, other in self.pairs:
            yield cell
            if isinstance(other, Cell):
                yield other

    def values(self, rows: Mapping[tuple[str, ...], Row]) -> list[float]:
        """The value of each pair whose times are there."""
        found = []
        for cell, other in self.pairs:
            row = rows.get(cell.key)
            beside = rows.get(other.key) if isinstance(other, Cell) else None
            if (
                row is None
                or not row["seconds"]
                or (isinstance(other, Cell) and not usable(beside))
            ):
                continue
            if beside is not None:
                found.append(per_element(row) / per_element(beside))
            elif other in MEASURES:
                found.append(MEASURES[other](row))
            elif row[other]:
                found.append(float(row["seconds"]) / float(row[other]))
        return [value for value in found if not math.isnan(value)]


def usable(row: Row | None) -> bool:
    return row is not None and bool(row["seconds"])


def per_element(row: Row) -> float:
    return float(row["seconds"]) / max(int(row["elements"]), 1)


def number(row: Row, column: str) -> float:
    return float(row[column]) if row[column] else math.nan


MEASURES = {
    "seconds": lambda row: float(row["seconds"]),
    "a million": lambda row: per_element(row) * 1e6,
    "more ms": lambda row: 1e3 * (float(row["seconds"]) - number(row, "expression")),
    "memory": lambda row: number(row, "peak_bytes") / (
        int(row["elements"]) * ITEM[row["dtype"]]
    ),
    "extra MB": lambda row: (number(row, "peak_bytes") - number(row, "result_bytes")) / 1e6,
}  # fmt: skip
"""What else is measured of a row: seconds, for a million elements, milliseconds more than the
expression, memory as a multiple of the array's, and megabytes beside the result."""

SMALL, MIDDLE, BIG = (Cell("multibit", shape) for shape in BASES.values())
CONVERGED = Cell("converged", MIDDLE.shape, bits=8)
BUDGET = Cell("budget", (2500, 4000))
LARGER = (1 << 12, 1 << 10)
"""The shape of 16 MB of float32."""


def operation(name: str, cell: Cell, **changes: Any) -> Cell:
    """The cell with another operation."""
    return replace(cell, operation=name, **{"bits": 2, **changes})


def fresh(rows: int) -> Cell:
    return Cell("multibit", (rows, 1024), state=FRESH)


def searched(cell: Cell, **changes: Any) -> tuple[tuple[Cell, Cell], ...]:
    """A variation of both refitting solvers at 4 bits, against the plain case."""
    plain = [operation(name, cell, bits=4) for name in ("refined", "alternating")]
    return tuple((replace(one, **changes), one) for one in plain)


SIZES_OF_A_PROCESS = tuple(fresh(1 << power) for power in range(6, 11))
WANTED = (
    Wanted("step", "1,047,552 elements against 1,048,576, in a fresh process", 1.1,
           ((fresh(1023), fresh(1024)),)),
    Wanted("sizes", "65,536 to 1 M elements in a fresh process, each size against half of it", 1.1,
           tuple((b, a) for a, b in itertools.pairwise(SIZES_OF_A_PROCESS))),
    Wanted("compiled", "4 and 16 MB against torch.compile: `multibit` of 1 to 4 bits, `sign`, "
           "`multibit_grad`", 1.0,
           tuple((cell, "torch_compile") for shape in (MIDDLE.shape, LARGER) for cell in (
               *(Cell("multibit", shape, bits=k) for k in (1, 2, 3, 4)),
               Cell("sign", shape), Cell("multibit_grad", shape)))),
    Wanted("columns", "channel_axis=1 of (4096, 4096) against axis 0", 1.6,
           ((replace(BIG, layout="axis 1"), BIG),)),
    Wanted("quantized columns", "the same, `quantize`", 1.6,
           ((operation("quantize", BIG, layout="axis 1"), operation("quantize", BIG)),)),
    Wanted("Fortran", "Fortran order, `multibit` along axis 0", 1.3,
           ((replace(BIG, layout="Fortran order"), BIG),)),
    Wanted("transposed", "transposed views, `multibit` along their last axis", 1.3,
           ((replace(BIG, layout="transposed view"), BIG),)),
    Wanted("elements", "Fortran order and transposed views, `sign` and `multibit_grad`", 1.3,
           tuple((operation(name, BIG, layout=layout), operation(name, BIG))
                 for name in ("sign", "multibit_grad")
                 for layout in ("Fortran order", "transposed view"))),
    Wanted("long rows", "rows of 2^17 + 1024 elements against rows of 4096", 1.6,
           ((replace(BIG, shape=in_rows(BIG.size, JUST_LONGER)), BIG),)),
    Wanted("one row", "one row of 64 M elements against rows of 4096", 1.6,
           ((replace(BIG, shape=(1, 1 << 26)), BIG),)),
    *(Wanted(f"{name} bits", f"`{name}`, each further bit from 2 to 8, a million weights", 2.0,
             tuple((operation(name, MIDDLE, bits=k + 1), operation(name, MIDDLE, bits=k))
                   for k in range(2, 8)))
      for name in ("refined", "alternating")),
    Wanted("searched maps", "`refined` and `alternating` at 4 bits, with a map", 3.0,
           searched(MIDDLE, map="uint8")),
    Wanted("searched importance", "`refined` and `alternating` at 4 bits, with importance", 3.0,
           searched(MIDDLE, importance=True)),
    Wanted("searched doubles", "`refined` and `alternating` at 4 bits, float64", 3.0,
           searched(MIDDLE, dtype="float64")),
    Wanted("optimal 4", "`optimal`, per row, a million weights, 4 bits", 0.15,
           ((operation("optimal", MIDDLE, bits=4), "a million"),), "s"),
    Wanted("optimal 8", "`optimal`, per row, a million weights, 8 bits", 3.0,
           ((operation("optimal", MIDDLE, bits=8), "a million"),), "s"),
    Wanted("converged 8", "`alternating` to convergence, a million weights, 8 bits", 1.0,
           ((CONVERGED, "a million"),), "s"),
    Wanted("budget", "`budget`, 10 M elements", 4.0, ((BUDGET, "seconds"),), "s"),
    Wanted("budget memory", "`budget`, 10 M elements, memory", 2.0, ((BUDGET, "memory"),)),
    *(Wanted(name, f"`{name}`, a million elements", 0.05,
             ((operation(name, MIDDLE), "a million"),), "s")
      for name in ("middle_out", "top_down", "bottom_up", "allocate")),
    Wanted("map memory", "these four, memory", 2.0, tuple(
        (operation(name, MIDDLE), "memory")
        for name in ("middle_out", "top_down", "bottom_up", "allocate"))),
    Wanted("quantize map", "`quantize` with a map against a copy", 2.5,
           ((operation("quantize", BIG, map="uint8"), "copy"),)),
    Wanted("small", "(64, 64): `sign`, `sign_grad`, `multibit_grad`, `multibit`, `quantize` "
           "against the NumPy expression", 2.0,
           tuple((operation(name, SMALL), "expression") for name in (
               "sign", "sign_grad", "multibit_grad", "multibit", "quantize"))),
    Wanted("small dequantize", "(64, 64): `dequantize` against the NumPy expression", 3.0,
           ((operation("dequantize", SMALL), "expression"),)),
    Wanted("import", "`import cubin`, beyond `import numpy`", 50.0,
           ((Cell("import", (), state=FRESH), "more ms"),), "ms"),
    Wanted("tape", "a step of the tape's CNN against PyTorch eager", 1.8,
           ((Cell("tape step", (100, 1, 28, 28)), "torch"),)),
    Wanted("save", "`BinaryCode.save`, (4096, 4096), 4 bits, against a copy of the array", 3.0,
           ((operation("save", BIG, bits=4), "copy"),)),
    Wanted("load", "`BinaryCode.load`, likewise", 3.0,
           ((operation("load", BIG, bits=4), "copy"),)),
    Wanted("file memory", "`save` and `load`, memory beside the code", 16.0, tuple(
        (operation(name, BIG, bits=4), "extra MB") for name in FILES), "MB"),
)  # fmt: skip
"""What the grid should show, in the order of its table."""


@dataclass(frozen=True)
class Finding:
    """A row of the table of what is wanted; `value` is None where nothing was timed."""

    name: str
    where: str
    value: float | None
    wanted: float
    unit: str

    @property
    def met(self) -> bool:
        return self.value is not None and self.value <= self.wanted


# ---------------------------------------------------------------- the summary


def by_key(rows: Iterable[Row]) -> dict[tuple[str, ...], Row]:
    """The rows by what tells them apart."""
    return {tuple(row[column] for column in KEY): row for row in rows}


def findings(rows: Iterable[Row]) -> list[Finding]:
    """What the rows give for everything that is wanted."""
    known = by_key(rows)
    values = ((wanted, wanted.values(known)) for wanted in WANTED)
    return [
        Finding(w.name, w.where, max(found, default=None), w.limit, w.unit) for w, found in values
    ]


def timed(rows: Iterable[Row], column: str, least: int = 0) -> list[float]:
    """How many times as long as cubin another column takes, in all cells that have it."""
    return [
        float(row[column]) / float(row["seconds"])
        for row in rows
        if row["seconds"] and row[column] and row["operation"] != "import"
        and int(row["elements"]) >= least
    ]  # fmt: skip


def geometric_mean(values: Sequence[float]) -> float | None:
    return float(np.exp(np.mean(np.log(values)))) if values else None


def behind(rows: Iterable[Row]) -> list[Row]:
    """The cells of `LARGE` arrays that are behind their fastest peer, the worst first."""
    found = [
        row for row in rows
        if row["over_peer"] and int(row["elements"]) >= LARGE and float(row["over_peer"]) > BEHIND
    ]  # fmt: skip
    return sorted(found, key=lambda row: -float(row["over_peer"]))


@dataclass(frozen=True)
class Step:
    """A neighbour of a base point, and its time per element relative to it."""

    base: str
    factor: str
    level: str
    row: Row
    ratio: float


def steps(rows: Iterable[Row]) -> list[Step]:
    """All neighbours of base points that were timed, in the order of the grid."""
    known = {key: row for key, row in by_key(rows).items() if row["seconds"]}
    found = []
    for (name, shape), column in itertools.product(BASES.items(), COLUMNS):
        base = Cell(column, shape)
        for factor, level, cell in neighbours(base):
            if cell != base and cell.key in known and base.key in known:
                row = known[cell.key]
                ratio = per_element(row) / per_element(known[base.key])
                found.append(Step(name, factor, level, row, ratio))
    return found


def extra_memory(rows: Iterable[Row]) -> list[tuple[float, Row]]:
    """Megabytes beside the result, but for `optimal` and the map makers; the most first."""
    found = [
        (MEASURES["extra MB"](row), row) for row in rows
        if row["peak_bytes"] and row["operation"] not in ("optimal", *MAPS)
    ]  # fmt: skip
    return sorted(found, key=lambda pair: -pair[0])


def label(row: Row) -> str:
    """A row in words, as its cell's."""
    words = [row["operation"], row["shape"], row["layout"], row["dtype"]]
    words += [f"{row['bits']} bits"] * (row["bits"] not in ("", "0"))
    words += [f"{row['map']} map"] * bool(row["map"]) + ["importance"] * (row["importance"] == "1")
    return ", ".join([*words, *[row["state"]] * bool(row["state"])])


def digits(value: float | None, count: int = 3) -> str:
    """A number of `count` significant digits; a dash where there is none."""
    if value is None or math.isnan(value):
        return "\u2013"
    value = float(f"{value:.{count}g}")
    return str(int(value)) if value == int(value) else str(value)


def summary(rows: Sequence[Row], worst: int = 12) -> str:
    """What the grid shows, as Markdown."""
    lines = ["| where | measured | wanted at most | |", "|---|---|---|---|"]
    for found in findings(rows):
        verdict = "not timed" if found.value is None else "" if found.met else "missed"
        unit = "" if found.unit == "x" else f" {found.unit}"
        lines.append(
            f"| {found.where} | {digits(found.value)}{unit} | {digits(found.wanted)}{unit} "
            f"| {verdict} |"
        )
    lines += ["", "## How many times as long others take, geometric means", ""]
    lines += ["| | all sizes | from 65,536 elements on | cells |", "|---|---|---|---|"]
    names = {"expression": "array expression", "torch": "PyTorch eager", "triton": "Triton",
             "torch_compile": "torch.compile", "fastest": "the fastest of them"}  # fmt: skip
    for column, name in names.items():
        everywhere = timed(rows, column)
        if everywhere:
            large = geometric_mean(timed(rows, column, LARGE))
            mean = digits(geometric_mean(everywhere))
            lines.append(f"| {name} | {mean} | {digits(large)} | {len(everywhere)} |")
    late = behind(rows)
    lines += ["", f"## {len(late)} cells behind their fastest peer by more than {BEHIND} times", ""]
    lines += [
        f"- {digits(float(row['over_peer']))} x {row['fastest_peer']}: {label(row)}" for row in late
    ]
    lines += ["", "## Worst time per element, relative to the base point", ""]
    cliffs = [step for step in steps(rows) if step.factor != "size"]
    cliffs.sort(key=lambda step: -step.ratio)
    lines += [f"- {digits(step.ratio)} x {step.base}: {label(step.row)}" for step in cliffs[:worst]]
    lines += ["", "## Most memory beside the result", ""]
    lines += [f"- {digits(most)} MB: {label(row)}" for most, row in extra_memory(rows)[:5]]
    failed = [row for row in rows if row["error"]]
    lines += ["", f"## {len(failed)} cells failed, or lack a peer that failed", ""]
    lines += [f"- {label(row)}: {row['error']}" for row in failed]
    return "\n".join(lines) + "\n"
