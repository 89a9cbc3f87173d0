"""Every figure in the README and on the pages of docs/ is what the recorded results give.

`sentences` and `CLAIMS` say where the figures and the comparisons of a page come from. A figure
that none of them covers fails as well. After a new recording change `BENCHMARK`, or what else has
moved, and have the figures written into the pages::

    python -m tests.test_figures
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

import cubin
from cubin.core import memory, teams
from cubin.core.host import blocks
from cubin.solvers import search_rows
from tests.test_multibit import TOLERANCE

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
BENCHMARK = RESULTS / "benchmark" / "2026-11-30-amd-epyc-2-cores"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@functools.cache
def table(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def only(rows, **wanted):
    """The one row that has these entries."""
    found = [row for row in rows if all(row[key] == str(value) for key, value in wanted.items())]
    assert len(found) == 1, f"{len(found)} rows have {wanted}"
    return found[0]


def digits(value, count=3):
    """A number of `count` significant digits, without an exponent."""
    value = float(f"{float(value):.{count}g}")
    return str(int(value)) if value == int(value) else str(value)


# ---------------------------------------------------------------- speed

NONE = "\u2013"
"""What stands in a table where nothing was timed."""


def _grid():
    """The module experiments/grid.py, which knows the cells and what is wanted of them."""
    path = ROOT / "experiments" / "grid.py"
    spec = importlib.util.spec_from_file_location("experiments_grid", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


grid = _grid()
GRID = table(BENCHMARK / "benchmark.csv")
KEPT_PAGES = table(BENCHMARK / "kept-pages" / "benchmark.csv")
COLUMNS = ("copy", "seconds", "expression", "torch_compile", "torch")
BIG = grid.BASES["4096x4096"]
TIMED = {
    "`sign`": grid.Cell("sign", BIG),
    "`multibit`, 1 bit": grid.Cell("multibit", BIG, bits=1),
    "`multibit`, 2 bits": grid.Cell("multibit", BIG),
    "`multibit`, 3 bits": grid.Cell("multibit", BIG, bits=3),
    "`multibit`, 4 bits": grid.Cell("multibit", BIG, bits=4),
    "`multibit`, 8 bits": grid.Cell("multibit", BIG, bits=8),
    "`multibit`, map of 0 to 2 bits": grid.Cell("multibit", BIG, map="uint8"),
    "`multibit_grad`": grid.Cell("multibit_grad", BIG),
    "`quantize`, 2 bits": grid.Cell("quantize", BIG),
    "`dequantize`, 2 bits": grid.Cell("dequantize", BIG),
    "`refined`, 2 bits": grid.Cell("refined", BIG),
    "`alternating`, 2 bits": grid.Cell("alternating", BIG),
    "`alternating`, 4 bits": grid.Cell("alternating", BIG, bits=4),
    "`alternating`, 8 bits": grid.Cell("alternating", BIG, bits=8),
}
IN_README = ["`sign`", "`multibit`, 1 bit", "`multibit`, 2 bits", "`multibit`, 4 bits",
             "`multibit`, map of 0 to 2 bits", "`quantize`, 2 bits",
             "`alternating`, 2 bits"]  # fmt: skip
OTHERS = {
    "the NumPy expression": "expression",
    "PyTorch": "torch",
    "`torch.compile`": "torch_compile",
    "the fastest of them": "fastest",
}


def seconds(cell, column="seconds", rows=GRID):
    """A time of a cell, or None where it was not taken."""
    row = grid.by_key(rows).get(cell.key)
    return float(row[column]) if row and row[column] else None


def line(label, entries, count=3):
    """A line of a table: a sentence and its figures; a dash stands where there is none."""
    cells = " | ".join(NONE if entry is None else "{}" for entry in entries)
    return f"| {label} | {cells} |", [digits(e, count) for e in entries if e is not None]


def times(labels):
    for label in labels:
        found = [seconds(TIMED[label], column) for column in COLUMNS]
        yield line(label, [None if time is None else 1e3 * time for time in found])


def in_new_memory(operation):
    return digits(1e3 * seconds(grid.Cell(operation, BIG, state=grid.NEW)))


def others():
    """How many times as long others take, in the geometric mean over all cells."""
    for label, column in OTHERS.items():
        means = [grid.geometric_mean(grid.timed(GRID, column, least)) for least in (0, grid.LARGE)]
        yield line(label, [*means, len(grid.timed(GRID, column))])


def cells_behind():
    late = grid.behind(GRID)
    large = [row for row in GRID if row["over_peer"] and int(row["elements"]) >= grid.LARGE]
    return [str(len(late)), str(len(large)), str(grid.BEHIND)]


def findings():
    """What was aimed at, and what was measured."""
    for found in grid.findings(GRID):
        unit = {"x": "", "s": " s", "ms": " ms", "MB": " MB"}[found.unit]
        label, wanted = found.where.replace("|", "\\|"), f"{digits(found.wanted)}{unit}"
        if found.value is None:
            yield f"| {label} | {NONE} | {wanted} | |", []
        else:
            missed = "" if found.met else " missed"
            yield f"| {label} | {{}}{unit} | {{}}{unit} |{missed} |", [
                digits(found.value), digits(found.wanted)]  # fmt: skip


def with_kept_pages(column, widths=(1, 2, 3, 4)):
    """How many times as long as cubin PyTorch takes if the allocator keeps its pages."""
    cells = [grid.Cell("multibit", grid.LARGER, bits=k) for k in widths]
    ratios = [seconds(c, column, KEPT_PAGES) / seconds(c, rows=KEPT_PAGES) for c in cells]
    return [digits(ratio, 2) for ratio in ratios]


def machine(path):
    found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["machine"]
    return [str(found["cores"]), found["cpu"]]


def longest_row(room, levels, mapped=False, multiple=1):
    """Elements of the longest float32 row, of a multiple of some number, that one launch takes."""
    dtype = np.dtype(np.float32)

    def fits(length):
        return teams.team_of(length, dtype, levels, mapped, room) is not None

    # A length that fits may owe it to what divides it: its odd neighbour must fit as well.
    lengths = range(1 << 16, 0, -multiple)
    return f"{next(n for n in lengths if fits(n) and (multiple > 1 or fits(n - 1))):,}"


# ---------------------------------------------------------------- errors

COMPARISON = RESULTS / "solver_comparison.csv"
SKEWED = RESULTS / "skewed.csv"
SKEWED_DATA = ("exponential", "ReLU of a Gaussian")
SOLVERS = ["greedy", "refined", "alternating, 2 iterations", "alternating, converged", "optimal"]


def error(data, solver, bits, column="relative_mse"):
    return float(only(table(COMPARISON), data=data, solver=solver, bits=bits)[column])


def median(solver, bits):
    return error("pretrained weights", solver, bits)


def share_of_greedy(solver, count=2):
    return digits(100 * median(solver, 5) / median("greedy", 5), count)


def errors_by_solver():
    for bits in range(1, 6):
        cells = " | ".join("{}" for _ in SOLVERS)
        yield f"| {bits} | {cells} |", [f"{median(solver, bits):.4f}" for solver in SOLVERS]


def seconds_by_solver():
    for bits in range(2, 6):
        found = [1e3 * error("time", solver, bits, "seconds") for solver in SOLVERS]
        cells = " | ".join("{}" for _ in SOLVERS)
        yield (
            f"| {bits} bits | {cells} |",
            [f"{ms:.0f}" if ms > 100 else digits(ms) for ms in found],
        )


def errors_with_a_shift():
    for data, bits in [*itertools.product(SKEWED_DATA, range(1, 5)), ("Gaussian", 2)]:
        rows = [
            only(table(SKEWED), data=data, solver=solver, bits=bits, shift=shift)
            for solver in ("greedy", "refined", "alternating", "optimal")
            for shift in (0, 1)
        ]
        found = [f"{float(row['relative_mse']):.4f}" for row in rows]
        cells = " | ".join("{} → {}" for _ in range(4))
        yield f"| {data}, {bits} | {cells} |", found


TOGETHER = RESULTS / "any_precision.csv"


def of_precision(solver, bits, column="together"):
    wanted = {"data": "pretrained weights", "solver": solver, "bits": bits}
    return float(only(table(TOGETHER), **wanted)[column])


def errors_by_precision():
    columns = [(2, "together"), (3, "alone"), (3, "together"), (4, "alone"), (4, "together")]
    cells = " | ".join("{}" for _ in columns)
    for solver in SOLVERS:
        found = [f"{of_precision(solver, *column):.4f}" for column in columns]
        yield f"| {solver} | {cells} |", found


def same_as_alone(solver, other):
    """Whether a solver has the same errors in a code of several precisions as another alone."""
    return all(
        of_precision(solver, bits) == pytest.approx(of_precision(other, bits, "alone"), rel=1e-3)
        for bits in (2, 3, 4)
    )


def cost_of_precisions(solver):
    return of_precision(solver, 4) / of_precision(solver, 4, "alone")


BUDGET = table(RESULTS / "bit_budget.csv")
GAUSSIAN = [row for row in BUDGET if row["source"] == "Gaussian"]


def coded(source, generator, solver="greedy"):
    """The rows of a kind of maps, by their mean."""
    named = {"source": source, "generator": generator, "solver": solver}
    return [row for row in BUDGET if all(row[key] == value for key, value in named.items())]


def at_mean(generator, mean, column):
    return float(only(coded("Gaussian", generator), mean_bits=mean)[column])


def paying(source, generator, column="gain_at_effective_bits"):
    """The effective bits from which on maps have less error than uniform codes of as many."""
    rows = [(float(r["effective_bits"]), float(r[column]) > 1) for r in coded(source, generator)]
    rows.sort()
    first = next(n for n in range(len(rows)) if all(pays for _, pays in rows[n:]))
    return digits(rows[first][0])


def gains(solver, column):
    found = [float(row[column]) for row in coded("pretrained weights", "allocate", solver)]
    return [f"{min(found):.2f}", f"{max(found):.2f}"]


def below_shannon(column, rows):
    """Whether codes of a Gaussian have less error than any code of so many bits could."""
    return [float(row["relative_mse"]) < 4.0 ** -float(row[column]) for row in rows]


# ---------------------------------------------------------------- others

LEAGUE = table(RESULTS / "league.csv")
OF_OTHERS = {
    "round to nearest", "round to nearest, clipped", "HQQ", "NF4", "LSBQ", "LSBQ, ternary",
    "k-means per row", "GPTQ", "BiLLM",
}  # fmt: skip
LIMIT = "entropy-coded scalar"
BUDGETS = (1.2, 1.8, 2.2, 2.5, 3.2, 4.5)
KINDS = ("Gaussian", "Laplace", "Student-t, 4 degrees", "pretrained weights")


def league(data, column, bits, ours, inputs="1/i", methods=None):
    """The row of least error, of cubin's methods or the others, that fits into so many bits."""
    rows = [
        row
        for row in LEAGUE
        if (row["data"], row["inputs"]) == (data, inputs)
        and float(row["effective_bits"]) <= bits
        and row["method"] != LIMIT
        and (row["method"] in OF_OTHERS) != ours
        and (methods is None or row["method"] in methods)
    ]
    return min(rows, key=lambda row: float(row[column]))


def league_ratio(data, column, bits, inputs="1/i"):
    mine, other = (league(data, column, bits, ours, inputs) for ours in (True, False))
    return float(mine[column]) / float(other[column])


def league_ratios():
    cells = " | ".join("{}" for _ in BUDGETS)
    for label, column, inputs in (
        ("weights", "weight_mse", "1/i"),
        ("outputs, 1/i", "output_mse", "1/i"),
        ("outputs, i^-1/2", "output_mse", "i^-1/2"),
    ):
        for data in KINDS:
            found = [f"{league_ratio(data, column, bits, inputs):.2f}" for bits in BUDGETS]
            yield f"| {data}: {label} | {cells} |", found


def league_winners():
    for column in ("weight_mse", "output_mse"):
        for bits in BUDGETS:
            figures = []
            for ours in (True, False):
                row = league("Gaussian", column, bits, ours)
                figures += [row["method"], digits(row[column])]
            label = {"weight_mse": "weights", "output_mse": "outputs"}[column]
            yield f"| {label}, up to {bits} | {{}}: {{}} | {{}}: {{}} |", figures


def leads(column, inputs="1/i"):
    """Where cubin's least error is below the others': (data, bits)."""
    return {
        (data, bits)
        for data in KINDS
        for bits in BUDGETS
        if league_ratio(data, column, bits, inputs) < 0.995
    }


def all_kinds(*budgets):
    return {(data, bits) for data in KINDS for bits in budgets}


def same_codes(mine, other, bits):
    """Whether two methods have the same bits and weight error on all data, at every group size."""
    pairs = [
        [row for row in LEAGUE if row["method"] == name and row["bits"] == str(bits)]
        for name in (mine, other)
    ]
    return len(pairs[0]) == len(pairs[1]) > 0 and all(
        float(a[column]) == pytest.approx(float(b[column]), rel=5e-3)
        for a, b in zip(*pairs, strict=True)
        for column in ("effective_bits", "weight_mse")
    )


def above_entropy_coding(data):
    """Whether every method's weight error is above that of the entropy-coded scalar quantizer."""
    rows = [row for row in LEAGUE if (row["data"], row["inputs"]) == (data, "1/i")]
    bits, errors = (
        np.array([float(row[column]) for row in rows if row["method"] == LIMIT])
        for column in ("effective_bits", "weight_mse")
    )
    return all(
        float(row["weight_mse"])
        > np.exp(np.interp(float(row["effective_bits"]), bits, np.log(errors)))
        for row in rows
        if row["method"] != LIMIT and float(row["effective_bits"]) <= bits.max()
    )


def bits_of_billm():
    found = [float(row["effective_bits"]) for row in LEAGUE if row["method"] == "BiLLM"]
    return [f"{min(found):.1f}", f"{max(found):.1f}"]


def in_groups_of_64(method):
    return float(
        only(LEAGUE, data="Gaussian", inputs="1/i", method=method, bits=4, group=64)[
            "effective_bits"
        ]
    )


# ---------------------------------------------------------------- real layers

OUTPUTS = table(RESULTS / "layer_outputs.csv")
AS_THEY_ARE, CENTRED = "as they are", "less their mean"
OF_LAYERS = {
    "`greedy`": "greedy",
    "`optimal`": "optimal",
    "`alternating`, `importance`": "alternating, importance",
    "`refined`, `gram`": "refined, gram",
    "`alternating`, `gram`": "alternating, gram",
    "integers, nearest in a searched range": "round to nearest, clipped",
    "integers, GPTQ": "GPTQ",
}


def of_layers(inputs, method, bits, column="output_mse"):
    """A column of the layers that a method was measured on, by name."""
    wanted = (inputs, method, str(bits))
    return {
        (row["network"], row["layer"]): float(row[column])
        for row in OUTPUTS
        if (row["inputs"], row["method"], row["bits"]) == wanted
    }


def medians_of_layers():
    for label, method in OF_LAYERS.items():
        found = [
            list(of_layers(inputs, method, bits).values())
            for inputs in (AS_THEY_ARE, CENTRED)
            for bits in (1, 2, 3)
        ]
        yield line(label, [float(np.median(errors)) if errors else None for errors in found], 2)


def layer_ratios(inputs, method, other, bits):
    """The output error of a method over that of another, of each layer that has both."""
    mine, others = (of_layers(inputs, name, bits) for name in (method, other))
    return np.array([mine[name] / others[name] for name in mine if name in others])


def layer_ratio(method, other, bits, inputs=(AS_THEY_ARE, CENTRED)):
    return [f"{np.median(layer_ratios(kind, method, other, bits)):.2f}" for kind in inputs]


def behind(method, other, bits):
    """In how many layers a method has more error than another."""
    found = [layer_ratios(kind, method, other, bits) for kind in (AS_THEY_ARE, CENTRED)]
    return [str(int((ratios > 1).sum())) for ratios in found]


def all_outputs(method, other, bits):
    """The error of all outputs together, of a method over another."""
    found = []
    for inputs in (AS_THEY_ARE, CENTRED):
        power = of_layers(inputs, method, bits, "power")
        errors = [of_layers(inputs, name, bits) for name in (method, other)]
        sums = [sum(each[layer] * power[layer] for layer in power) for each in errors]
        found.append(f"{sums[0] / sums[1]:.2f}")
    return found


def share_of_the_mean(method, bits):
    """The share of the output error that is one of the outputs' mean: the layers' median."""
    whole, rest = (
        {
            layer: error * of_layers(inputs, method, bits, "power")[layer]
            for layer, error in of_layers(inputs, method, bits).items()
        }
        for inputs in (AS_THEY_ARE, CENTRED)
    )
    return f"{100 * np.median([1 - rest[layer] / whole[layer] for layer in whole]):.0f}"


def bits_of_layers(method, bits):
    """Effective bits per weight of all layers."""
    found = of_layers(AS_THEY_ARE, method, bits, "effective_bits")
    shapes = [of_layers(AS_THEY_ARE, method, bits, side) for side in ("columns", "lines")]
    size = {layer: shapes[0][layer] * shapes[1][layer] for layer in found}
    mean = sum(found[layer] * size[layer] for layer in found) / sum(size.values())
    return f"{mean:.2f}"


def at_gptqs_bits(inputs):
    """The median error of `alternating` over GPTQ's, at the effective bits of 3-bit integers."""
    errors = [np.median([*of_layers(inputs, "alternating, gram", k).values()]) for k in (2, 3)]
    bits = [float(bits_of_layers("alternating, gram", k)) for k in (2, 3)]
    mine = np.exp(np.interp(float(bits_of_layers("GPTQ", 3)), bits, np.log(errors)))
    return mine / np.median([*of_layers(inputs, "GPTQ", 3).values()])


def left_out_layers():
    origin = json.loads((RESULTS / "layer_outputs.json").read_text(encoding="utf-8"))
    reasons = (
        "fewer than 64 inputs",
        "convolutions with groups, and other operators",
        "fewer than 4 input vectors for each input",
    )
    return [str(origin["left_out"][reason]) for reason in reasons]


BY_ROW_AND_COLUMN = table(RESULTS / "row_column_scales.csv")
SCALED = {
    "Gaussian: weights": ("Gaussian", "weights"),
    "Gaussian: outputs, 1/i": ("Gaussian", "outputs, 1/i"),
    "Gaussian: outputs, i^-1/2": ("Gaussian", "outputs, i^-1/2"),
    "Laplace: weights": ("Laplace", "weights"),
    "Laplace: outputs, 1/i": ("Laplace", "outputs, 1/i"),
    "Laplace: outputs, i^-1/2": ("Laplace", "outputs, i^-1/2"),
    "pretrained weights: weights": ("pretrained weights", "weights"),
    "pretrained weights: outputs": ("pretrained weights", "outputs"),
}
SCALED_LAYERS = ("pretrained weights", "weights", "rows")


def scaled(data, metric, scales, bits):
    """The errors by layer with such scales."""
    return {
        row["layer"]: float(row["error"])
        for row in BY_ROW_AND_COLUMN
        if (row["data"], row["metric"], row["scales"]) == (data, metric, scales)
        and row["bits"] == str(bits)
    }


def by_row_and_column(data, metric, other, bits):
    """The error with scales by row and by column over that with other scales, of each layer."""
    mine, others = (scaled(data, metric, name, bits) for name in ("rows and columns", other))
    return np.array([mine[layer] / others[layer] for layer in mine])


def rows_and_columns():
    cells = " | ".join("{}" for _ in range(4))
    for label, (data, metric) in SCALED.items():
        found = [
            f"{np.median(by_row_and_column(data, metric, other, bits)):.2f}"
            for bits in (1, 2)
            for other in ("rows", "groups of more bits")
        ]
        yield f"| {label} | {cells} |", found


# ---------------------------------------------------------------- products

PRODUCTS = table(RESULTS / "products.csv")
BATCHES = (1, 8, 64, 512)
BESIDE = {
    "1 bit": {"candidate": "cubin", "bits": 1},
    "2 bits": {"candidate": "cubin", "bits": 2},
    "3 bits": {"candidate": "cubin", "bits": 3},
    "4 bits": {"candidate": "cubin", "bits": 4},
    "1 bit by 1 bit": {"candidate": "cubin, code of x"},
    "PyTorch, bfloat16": {"candidate": "torch bfloat16"},
    "PyTorch, int8": {"candidate": "torch int8"},
}


def speed_up(label, batch):
    """How many times as fast as float32 products of 4096 x 4096 with so many rows of x are."""
    return float(only(PRODUCTS, m=4096, n=4096, batch=batch, **BESIDE[label])["speed_up"])


def products():
    for label in BESIDE:
        yield line(label, [speed_up(label, batch) for batch in BATCHES], 2)


# ---------------------------------------------------------------- checkpoints

SCALE = json.loads((RESULTS / "checkpoint_scale.json").read_text(encoding="utf-8"))
SCHEDULED = json.loads((RESULTS / "scheduler_scale.json").read_text(encoding="utf-8"))


def share_of_the_least():
    """Reading and one pass of the greedy kernel over the time of one process."""
    return (SCALE["read_seconds"] + SCALE["pass_seconds"]) / SCALE["one process"]["seconds"]


def large_checkpoint():
    runs = [SCALE[name] for name in ("one process", "2 processes")]
    found = [(digits(r["seconds"]), f"{r['peak_bytes'] / 2**30:.1f}") for r in runs]
    return [figure for run in found for figure in run]


def scheduled():
    for row in table(RESULTS / "scheduler_scale.csv"):
        power, shared = int(row["part"]).bit_length() - 1, "yes" if int(row["batch"]) else "no"
        sent = int(row["tasks"]) * float(row["task_bytes"]) / 1e6
        seconds = [row[name] for name in ("scheduler_seconds", "worker_seconds", "seconds")]
        yield (
            f"| 2^{power} weights | {shared} | {{}} | {{}} MB | {{}} s | {{}} s | {{}} s |",
            [f"{int(row['tasks']):,}", digits(sent), *map(digits, seconds)],
        )


# ---------------------------------------------------------------- accuracy

DIGITS = RESULTS / "train_mnist"
ARMS = {
    "full precision": "full precision",
    "1 bit": "1 bit",
    "2 bits": "2 bits",
    "mean of 1.4 bits, `budget`": "1.4 bits, budget",
    "mean of 1.4 bits, middle-out": "1.4 bits, middle-out",
    "mean of 1.4 bits, random": "1.4 bits, random",
}
MAPS = ["1.4 bits, random", "1.4 bits, middle-out", "1.4 bits, budget"]
BINARY = ", activations 1"
MARGIN = 0.5
FINAL = {
    (row["network"], row["arm"], row["seed"]): 100 * float(row["test_accuracy"])
    for row in table(DIGITS / "train_mnist.csv")
    if row["test_accuracy"]
}
SEEDS = sorted({seed for _, _, seed in FINAL})


def interval(values):
    """Mean and half width of Student's 95 % interval."""
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values)), float(half)


def against_two_bits(network, arm, more=""):
    pairs = [(FINAL[network, arm + more, s], FINAL[network, "2 bits" + more, s]) for s in SEEDS]
    return interval([one - other for one, other in pairs])


def points(network, arm, more=""):
    return [f"{value:.2f}" for value in against_two_bits(network, arm, more)]


def verdict(network, arm, more=""):
    mean, half = against_two_bits(network, arm, more)
    if mean - half > -MARGIN:
        return "matches"
    return "falls short" if mean + half < 0 else "undecided"


def accuracies():
    summary = table(DIGITS / "train_mnist_summary.csv")
    for label, arm in ARMS.items():
        row = only(summary, network="CNN", arm=arm)
        mean, half = interval([FINAL["CNN", arm, seed] for seed in SEEDS])
        bits = [f"{float(row[column]):.2f}" for column in ("payload_bits", "effective_bits")]
        yield f"| {label} | {{}} ± {{}} % | {{}} | {{}} |", [f"{mean:.2f}", f"{half:.2f}", *bits]


IN_PYTORCH = table(RESULTS / "train_pytorch" / "train_pytorch.csv")


def in_pytorch():
    return interval([100 * float(row["test_accuracy"]) for row in IN_PYTORCH])


def pytorch_against_tape():
    pairs = [
        (100 * float(r["test_accuracy"]), FINAL["CNN", "2 bits", r["seed"]]) for r in IN_PYTORCH
    ]
    return [f"{value:.2f}" for value in interval([one - other for one, other in pairs])]


def within_the_tapes_interval():
    mean, half = interval([FINAL["CNN", "2 bits", seed] for seed in SEEDS])
    return abs(in_pytorch()[0] - mean) <= half


def size_in_pytorch():
    ((bits, count),) = {(row["effective_bits"], row["file_bytes"]) for row in IN_PYTORCH}
    return [f"{float(bits):.2f}", f"{int(count):,}"]


def fewest_effective_bits(arm):
    rows = [row for row in table(DIGITS / "train_mnist_summary.csv") if row["arm"] == arm]
    return min(float(row["effective_bits"]) for row in rows)


# ---------------------------------------------------------------- what the pages say

NOT_TENSORS = {"overall", "Gaussian", "Laplace", "uniform"}
TENSORS = str(
    len({row["name"] for row in table(RESULTS / "error_per_bit_width.csv")} - NOT_TENSORS)
)
COMPARED = only(table(COMPARISON), data="pretrained weights", solver="greedy", bits=1)["tensors"]


FLOATS = ("float32", "float64", "float16", "bfloat16")


@functools.cache
def sentences():
    """For each page its sentences, with {} for a figure, and the figures as they are now."""
    return {
        "README.md": [
            ("the median and the 10th to 90th percentile of {} pretrained tensors", [TENSORS]),
            *times(IN_README),
            ("Medians on {} cores of an {}.", machine(BENCHMARK / "benchmark")),
            ("`multibit` of 2 bits takes {} ms", [in_new_memory("multibit")]),
            (
                "From 65,536 elements on, {} of {} cells take longer than {} times their fastest "
                "peer",
                cells_behind(),
            ),
        ],
        "docs/performance.md": [
            ("recorded on {} cores of an {} ([data", machine(BENCHMARK / "benchmark")),
            *times(TIMED),
            *others(),
            ("{} of {} cells take longer than {} times their fastest peer", cells_behind()),
            *findings(),
            ("Arrays below {} elements do not use the compiled loops", [f"{blocks.COMPILED:,}"]),
            (
                "`sign` takes {} ms and `multibit` of 2 bits {} ms",
                [in_new_memory("sign"), in_new_memory("multibit")],
            ),
            ("a result of {} MB or more", [str(memory.LARGE >> 20)]),
            ("up to {} MB are kept", [str(memory._limit >> 20)]),
            (
                "then takes {}, {}, {} and {} times as long as cubin at 1, 2, 3 and 4 bits",
                with_kept_pages("torch_compile"),
            ),
            ("eager PyTorch {} to {} times as long", with_kept_pages("torch", (1, 4))),
            ("rows of up to {} elements take one launch", [longest_row(teams.GREEDY, 8)]),
            (
                "up to {} where the length is a multiple of 4, with at most four levels and no map",
                [longest_row(teams.GREEDY, 4, multiple=4)],
            ),
            (
                "rows of up to {} elements ({} where the length is a multiple of 4, {} with a map)",
                [
                    longest_row(search_rows.ROOM, 4),
                    longest_row(search_rows.ROOM, 4, multiple=4),
                    longest_row(search_rows.ROOM, 4, mapped=True),
                ],
            ),
        ],
        "docs/solvers.md": [
            ("squared error over {} weight tensors", [COMPARED]),
            *errors_by_solver(),
            (
                "falls to {} % of greedy's with `refined`, {} % with two iterations of "
                "`alternating`, {} % with `alternating` to convergence and {} % with `optimal`",
                [share_of_greedy(solver) for solver in SOLVERS[1:]],
            ),
            ("samples and on {} weight tensors", [COMPARED]),
            ("; {} cores of an {})", machine(COMPARISON)),
            *seconds_by_solver(),
            *errors_with_a_shift(),
            (
                "Medians over {} weight tensors of the relative squared error",
                [digits(of_precision("greedy", 2, "tensors"))],
            ),
            *errors_by_precision(),
            (
                "with `optimal` the error at 4 bits is {} times as large",
                [digits(cost_of_precisions("optimal"), 2)],
            ),
        ],
        "docs/maps.md": [
            (
                "`budget` at a mean of 1.4 bits leaves an error of {}; 2 uniform bits leave {}. "
                "With its map it takes {} bits.",
                [
                    f"{at_mean('budget', 1.4, 'relative_mse'):.3f}",
                    f"{at_mean('uniform', 2, 'relative_mse'):.3f}",
                    f"{at_mean('budget', 1.4, 'effective_bits'):.2f}",
                ],
            ),
            ("as many effective bits from {} effective bits on", [paying("Gaussian", "budget")]),
            (
                "has {} to {} times less error than uniform bits of as many effective bits with "
                "greedy scales, and {} to {} times less with optimal ones",
                [
                    *gains("greedy", "gain_at_effective_bits"),
                    *gains("optimal", "gain_over_optimal_at_effective_bits"),
                ],
            ),
        ],
        "docs/calibration.md": [
            ("gains on {} layers of three", [str(len(of_layers(CENTRED, "greedy", 1)))]),
            (
                "a median of {} % of the output error of `optimal` at 2 bits",
                [share_of_the_mean("optimal", 2)],
            ),
            *medians_of_layers(),
            (
                "at 2 bits `alternating` has a median of {} of it, and of {} less the mean",
                layer_ratio("alternating, gram", "optimal", 2),
            ),
            (
                "All outputs together have {} and {} of the error",
                all_outputs("alternating, gram", "optimal", 2),
            ),
            (
                "Of GPTQ's error `alternating` has a median of {} and {} at 2 bits, and of {} and "
                "{} at 3, where GPTQ is ahead in {} and {} layers",
                [
                    *layer_ratio("alternating, gram", "GPTQ", 2),
                    *layer_ratio("alternating, gram", "GPTQ", 3),
                    *behind("alternating, gram", "GPTQ", 3),
                ],
            ),
            (
                "2 and 3 bits are {} and {} effective bits as integers, and {} and {} as binary "
                "codes",
                [bits_of_layers(m, k) for m in ("GPTQ", "alternating, gram") for k in (2, 3)],
            ),
            (
                "was measured on {} layers of at most",
                [str(len(of_layers(CENTRED, "optimal, gram", 1)))],
            ),
            (
                "a median of {}, {} and {} of the error of `alternating` at 1, 2 and 3 bits",
                [layer_ratio("optimal, gram", "alternating, gram", bits)[0] for bits in (1, 2, 3)],
            ),
            (
                "Left out are {} weights of fewer than 64 inputs, {} of convolutions with groups "
                "and other operators, and {} whose",
                left_out_layers(),
            ),
        ],
        "docs/league.md": [
            *rows_and_columns(),
            ("it is the median of {} layers", [str(len(scaled(*SCALED_LAYERS, 1)))]),
            *league_winners(),
            *league_ratios(),
            ("With its maps and scales it takes {} to {} effective bits", bits_of_billm()),
            (
                "Four bits in groups of 64 are {} effective bits as a binary code and {} as "
                "integers",
                [f"{in_groups_of_64(m):.2f}" for m in ("optimal", "round to nearest")],
            ),
        ],
        "docs/checkpoints.md": [
            (
                "For {} GB of bfloat16 shards at 1 bit, on {} cores of an {} (",
                [digits(SCALE["bytes"] / 1e9), *machine(RESULTS / "checkpoint_scale")],
            ),
            (
                "one process takes {} s and {} GiB, two take {} s and at most {} GiB each",
                large_checkpoint(),
            ),
            (
                "one pass take {} s, which is {} of the time of one process",
                [
                    digits(SCALE["read_seconds"] + SCALE["pass_seconds"]),
                    digits(share_of_the_least(), 2),
                ],
            ),
            (
                "has one, it takes {} s: two are {} times as fast",
                [
                    digits(SCALE["one thread"]["seconds"]),
                    digits(SCALE["one thread"]["seconds"] / SCALE["2 processes"]["seconds"]),
                ],
            ),
            (
                "a run on 1,000 workers: {} tensors of 10^13 weights",
                [f"{SCHEDULED['tensors']:,}"],
            ),
            ("whose headers are read in {} s", [digits(SCHEDULED["header_seconds"], 2)]),
            (
                "in one process, {} ms, and a weight a worker of one thread {} ns",
                [
                    digits(1e3 * SCHEDULED["seconds_of_a_task"], 2),
                    digits(1e9 * SCHEDULED["seconds_of_a_weight"], 2),
                ],
            ),
            *scheduled(),
        ],
        "docs/codes.md": [
            ("float32 on {} cores of an {} ([data]", machine(RESULTS / "products")),
            *products(),
        ],
        "docs/conventions.md": [
            (
                "to {} for float32 arrays, {} for float64, {} for float16 and {} for bfloat16",
                [f"{TOLERANCE[name]:.0e}".replace("e-0", "e-") for name in FLOATS],
            ),
        ],
        "docs/training.md": [
            ("with the tape, at {} seeds", [str(len(SEEDS))]),
            *accuracies(),
            (
                "`budget` matches ({} ± {} points); middle-out ({} ± {}), random ({} ± {}) and "
                "1 bit ({} ± {}) are undecided",
                [
                    *points("CNN", "1.4 bits, budget"),
                    *points("CNN", "1.4 bits, middle-out"),
                    *points("CNN", "1.4 bits, random"),
                    *points("CNN", "1 bit"),
                ],
            ),
            ("and so does 1 bit ({} ± {})", points("MLP", "1 bit")),
            (
                "random falls short by {} ± {} points",
                [figure.lstrip("-") for figure in points("CNN", "1.4 bits, random", BINARY)],
            ),
            ("lies above -{} points", [str(MARGIN)]),
            (
                "names {} ± {} % of the test digits right, also at {} seeds",
                [*(f"{value:.2f}" for value in in_pytorch()), str(len(IN_PYTORCH))],
            ),
            ("it differs from the tape by {} ± {} points", pytorch_against_tape()),
            ("take {} effective bits per weight, {} bytes in a file", size_in_pytorch()),
        ],
    }


def of_a_gaussian(solver, bits):
    """The relative squared error of rows of normal samples."""
    x = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    approx = cubin.multibit(x, bits, channel_axis=0, solver=solver)
    return cubin.errors.relative_mse(x, approx)


CLAIMS = {
    "docs/codes.md": {
        "about as long as with floats. From 8 rows on integers of 8 bits are faster": (
            lambda: all(
                1 / 1.15 < speed_up(label, 512) < 1.15 for label in list(BESIDE)[:4]
            )
            and all(
                speed_up("PyTorch, int8", batch) > speed_up(label, batch)
                for batch in BATCHES[1:] for label in list(BESIDE)[:5]
            )
        ),
    },
    "docs/calibration.md": {
        "Codes that know the inputs have less error than `optimal`, which knows the weights "
        "alone, in every layer": lambda: all(
            layer_ratios(inputs, method, "optimal", bits).max() < 1
            for inputs in (AS_THEY_ARE, CENTRED)
            for method in ("refined, gram", "alternating, gram") for bits in (1, 2, 3)
        ),
        "The mean squares alone, as `importance`, gain far less": lambda: all(
            np.median(layer_ratios(inputs, "alternating, importance", "optimal", bits))
            > 2 * np.median(layer_ratios(inputs, "alternating, gram", "optimal", bits))
            for inputs in (AS_THEY_ARE, CENTRED) for bits in (1, 2, 3)
        ),
        "over effective bits the two lie on one line": lambda: all(
            at_gptqs_bits(inputs) == pytest.approx(1, abs=0.1) for inputs in (AS_THEY_ARE, CENTRED)
        ),
    },
    "docs/solvers.md": {
        "On a Gaussian at 8 bits two iterations of `alternating` leave more error than `refined`": (
            lambda: of_a_gaussian("alternating", 8) > of_a_gaussian("refined", 8)
        ),
        "On these weights `alternating` and `optimal` at 3 bits have a smaller median error than "
        "`greedy` at 4 bits; `refined` does not.": lambda: (
            all(median(solver, 3) < median("greedy", 4) for solver in SOLVERS[2:])
            and median("refined", 3) > median("greedy", 4)
        ),
        "`refined` adds levels in the same way alone, so that nothing is lost, and `greedy`, whose "
        "scales are fitted here, too, comes to the same codes.": lambda: (
            same_as_alone("refined", "refined") and same_as_alone("greedy", "refined")
        ),
        "With two iterations `alternating` has less error at 4 bits than alone": lambda: (
            cost_of_precisions("alternating, 2 iterations") < 1
        ),
        "But codes that are best alone lose": lambda: all(
            cost_of_precisions(solver) > 1.5 for solver in SOLVERS[3:]
        ),
        "It is still the least of all codes of several precisions.": lambda: all(
            of_precision("optimal", bits) == min(of_precision(s, bits) for s in SOLVERS)
            for bits in (2, 3, 4)
        ),
        "On these weights every other solver at 4 bits has a smaller median error than `greedy` "
        "at 5 bits.": lambda: all(median(s, 4) < median("greedy", 5) for s in SOLVERS[1:]),
        "On a Gaussian no solver at 3 bits reaches `greedy` at 4 bits; at 4 bits all but `refined` "
        "have a smaller error than `greedy` at 5 bits.": lambda: (
            all(error("Gaussian", s, 3) > error("Gaussian", "greedy", 4) for s in SOLVERS)
            and [s for s in SOLVERS[1:] if error("Gaussian", s, 4) > error("Gaussian", "greedy", 5)]
            == ["refined"]
        ),
    },
    "docs/maps.md": {
        "`budget` lies below Shannon's limit at every mean from 1.2 to 3 payload bits, and no map "
        "does at its effective bits": lambda: (
            set(below_shannon("payload_bits", coded("Gaussian", "budget"))) == {True}
            and set(below_shannon("effective_bits", GAUSSIAN)) == {False}
            and {"1.2", "3"} <= {row["mean_bits"] for row in coded("Gaussian", "budget")}
        ),
        "but never less than optimal uniform codes": lambda: all(
            float(row["gain_over_optimal_at_effective_bits"]) < 1
            for row in coded("Gaussian", "budget")
        ),
        "On the 35 pretrained tensors": lambda: (
            json.loads((RESULTS / "bit_budget.json").read_text())["weights"]["tensors"] == 35
        ),
    },
    "docs/league.md": {
        "groups of as many bits do as well": lambda: all(
            0.98 < by_row_and_column(data, metric, "groups of more bits", bits) < 1.01
            for data, metric in SCALED.values() if data != "pretrained weights" for bits in (1, 2)
        ),
        "scales by row and by column are ahead of groups in every layer": lambda: all(
            by_row_and_column("pretrained weights", metric, "groups of more bits", bits).max() < 1
            for metric in ("weights", "outputs") for bits in (1, 2)
        ),
        "The gain is small beside that of a Gram matrix": lambda: all(
            np.median(by_row_and_column("pretrained weights", metric, "groups of more bits", bits))
            > 0.9
            for metric in ("weights", "outputs") for bits in (1, 2)
        ),
        "LSBQ has the codes of `greedy` at 1 bit, of `optimal` at 2 and of `ternary`": lambda: (
            same_codes("greedy", "LSBQ", 1) and same_codes("optimal", "LSBQ", 2)
            and same_codes("ternary", "LSBQ, ternary", 1)
        ),
        "On the three distributions integers or NF4 are ahead at 4.5 effective bits": lambda: (
            not leads("weight_mse") & {(data, 4.5) for data in KINDS[:3]}
            and {league(d, "weight_mse", 4.5, False)["method"] for d in KINDS[:3]} == {"HQQ", "NF4"}
        ),
        "Where tails are heavy, `budget` is ahead of all others at 2.2 and 2.5 effective bits": (
            lambda: {(d, b) for d in KINDS[1:3] for b in (2.2, 2.5)} <= leads("weight_mse")
            and {league(d, "weight_mse", b, True)["method"] for d in KINDS[1:3] for b in (2.2, 2.5)}
            == {"budget, optimal"}
        ),
        "on the pretrained ones `allocate` is, from 1.8 effective bits on": lambda: all(
            league(KINDS[3], "weight_mse", b, True)["method"] == "allocate, optimal"
            and (KINDS[3], b) in leads("weight_mse") for b in BUDGETS[1:]
        ),
        "`greedy` is behind rounding to the nearest integer in a searched range at 3.2 and 4.5 "
        "effective bits, on all data": lambda: all(
            float(league(d, "weight_mse", b, True, methods={"greedy"})["weight_mse"])
            > float(league(d, "weight_mse", b, False, methods={"round to nearest, clipped"})
                    ["weight_mse"])
            for d in KINDS for b in (3.2, 4.5)
        ),
        "cubin's codes are ahead on all data up to 3.2 effective bits": lambda: (
            leads("output_mse") >= all_kinds(*BUDGETS[:5])
        ),
        "at 4.5 GPTQ's integers are, on Gaussian weights": lambda: (
            (KINDS[0], 4.5) not in leads("output_mse")
            and league(KINDS[0], "output_mse", 4.5, False)["method"] == "GPTQ"
        ),
        "no other method with the Gram matrix fits into 1.2 or 1.8 effective bits": lambda: not any(
            row["method"] in ("GPTQ", "BiLLM") and float(row["effective_bits"]) <= 1.8
            for row in LEAGUE
        ),
        "GPTQ at 2 bits has less error of the outputs than BiLLM, with fewer bits": lambda: all(
            float(league(d, "output_mse", 2.2, False, s, {"GPTQ"})["output_mse"])
            < float(league(d, "output_mse", 9, False, s, {"BiLLM"})["output_mse"])
            for d in KINDS for s in ("1/i",)
        ),
        "No method, cubin's or other, comes down to the entropy-coded scalar quantizer": lambda: (
            all(map(above_entropy_coding, KINDS))
        ),
    },
    "docs/training.md": {
        "In the MLP all maps match": lambda: (
            {verdict("MLP", arm) for arm in [*MAPS, "1 bit"]} == {"matches"}
        ),
        "`budget` matches": lambda: (
            [a for a in [*MAPS, "1 bit"] if verdict("CNN", a) == "matches"] == ["1.4 bits, budget"]
        ),
        "Its mean lies within the tape's interval": within_the_tapes_interval,
        "are undecided.": lambda: (
            {verdict("CNN", arm) for arm in [*MAPS[:2], "1 bit"]} == {"undecided"}
        ),
        "With 1-bit activations no map matches.": lambda: not any(
            verdict(network, arm, BINARY) == "matches" for network in ("CNN", "MLP") for arm in MAPS
        ),
        "the other maps are undecided": lambda: (
            [verdict("CNN", arm, BINARY) for arm in MAPS]
            == ["falls short", "undecided", "undecided"]
        ),
        "Every map of a mean of 1.4 bits takes more effective bits than 2 uniform bits.": lambda: (
            min(map(fewest_effective_bits, MAPS)) > max(
                float(row["effective_bits"])
                for row in table(DIGITS / "train_mnist_summary.csv") if row["arm"] == "2 bits")
        ),
    },
}  # fmt: skip

# ---------------------------------------------------------------- the pages

NUMBER = r"-?\d[\d.,]*(?<![.,])(?:e-?\d+)?"
UNITS = (
    r"x(?! \d)|\u00d7|times|%|[mµn]?s|milliseconds|seconds?|minutes|[KMGT]i?B|bytes|dB|points|"
    r"(?:payload|effective) bits|elements|tensors|cores"
)
WORDS = r"\b(?:half|twice|(?:two|three|four|five|ten|hundred) times|a (?:third|quarter|tenth))\b"
PARAMETERS = {
    "README.md": ["1, 2 or 1.4 bits", "From 65,536 elements on"],
    "docs/first-steps.md": ["every 64 elements"],
    "docs/codes.md": ["a byte for every 512 elements"],
    "docs/performance.md": [
        "From 65,536 elements on, ",
        "from 65,536 elements on |",
        *(found.where for found in grid.findings(GRID)),  # cells
    ],
    "docs/maps.md": ["mean of 1.4 bits", "is asked for 1.4 bits"],
    "docs/calibration.md": [
        "1 bit | 2 bits | 3 bits",
        "at most 200 inputs",
        "4 input vectors",
        "at most 32 of",
    ],
    "docs/league.md": [
        "| error | 1 bit: rows | groups | 2 bits: rows | groups |",
        "arXiv:2410.03129",
        "| error | 1.2 | 1.8 | 2.2 | 2.5 | 3.2 | 4.5 |",
        *(f"up to {bits}" for bits in BUDGETS),
    ],
    "docs/training.md": ["mean of 1.4 bits", "95 % intervals", "What 1.4 bits do"],
    "docs/conventions.md": [
        "chunks of 1024",
        "rounds four times, and four numbers in pairs rounds twice",
        "agree between the forms to 1e-5",
        "65,536 elements",
        "with NumPy 2.1.2 or newer",
        "rows of more than 131,072 elements",
    ],
}
"""Numbers that are nobody's result: what was asked for, definitions, bounds that tests hold."""


def pattern(sentence, figures):
    """A sentence with a group for each of its figures, whatever they are, over any line breaks.

    A sentence that begins with | is a whole line of a table.
    """
    parts = [re.sub(r"(\\ )+", r"\\s+", re.escape(part)) for part in sentence.split("{}")]
    assert len(parts) == len(figures) + 1, f"{sentence!r} has not {len(figures)} figures"
    groups = [f"({NUMBER if re.match(NUMBER, figure) else '.+?'})" for figure in figures]
    found = "".join(part + group for part, group in zip(parts, [*groups, ""], strict=True))
    return re.compile(f"^{found}$" if sentence.startswith("|") else found, re.M)


def with_figures(text, sentence, figures, blank=False):
    """The text with these figures in the one place where it has the sentence, or without any."""
    found = list(pattern(sentence, figures).finditer(text))
    assert len(found) == 1, f"{len(found)} times in the text: {sentence!r} with {figures}"
    for number in range(len(figures), 0, -1):
        start, end = found[0].span(number)
        text = text[:start] + ("" if blank else figures[number - 1]) + text[end:]
    return text


def written(name, text):
    """A page with the figures that the results give."""
    for sentence, figures in sentences().get(name, ()):
        text = with_figures(text, sentence, figures)
    return text


def uncovered(name, text):
    """The figures of a page that nothing computes; its blocks of code have a test of their own."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for sentence, figures in sentences().get(name, ()):
        text = with_figures(text, sentence, figures, blank=True)
    text = re.sub(r"\]\([^)]*\)", "]", " ".join(text.split()))
    for sentence in [*CLAIMS.get(name, ()), *PARAMETERS.get(name, ())]:
        text = text.replace(sentence, "")
    return re.findall(rf"{NUMBER}[ -]?(?:{UNITS})(?![\w])|\d+(?:\.\d+|e-?\d+)|{WORDS}", text)


def name_of(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_figures_are_what_the_results_give(page):
    text = page.read_text(encoding="utf-8")
    pairs = zip(text.splitlines(), written(name_of(page), text).splitlines(), strict=True)
    assert [(line, right) for line, right in pairs if line != right] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_figure_stands_alone(page):
    assert uncovered(name_of(page), page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(("name", "claim"), [(name, c) for name in CLAIMS for c in CLAIMS[name]])
def test_comparisons_hold(name, claim):
    assert claim in " ".join((ROOT / name).read_text(encoding="utf-8").split())
    assert CLAIMS[name][claim]()


@pytest.mark.parametrize(("name", "phrase"), [(n, p) for n in PARAMETERS for p in PARAMETERS[n]])
def test_parameters_are_still_there(name, phrase):
    assert phrase in " ".join((ROOT / name).read_text(encoding="utf-8").split())


def test_the_summary_follows_from_the_accuracies():
    for row in table(DIGITS / "train_mnist_summary.csv"):
        mean, half = interval([FINAL[row["network"], row["arm"], seed] for seed in SEEDS])
        assert mean == pytest.approx(float(row["test_accuracy"]), abs=1e-4)
        assert half == pytest.approx(float(row["half_width"]), abs=1e-4)


def test_every_page_exists():
    assert {*sentences(), *CLAIMS, *PARAMETERS} <= set(map(name_of, PAGES))


@pytest.mark.parametrize(
    "sentence",
    ["It is 3 times as fast.", "It takes 4.5 ms.", "It loses 2 %.", "Of 12 MB.", "It takes twice.",
     "An error of 0.25.", "It is 3x faster.", "At 2.9 effective bits.",
        "Within 1e-6."],
)  # fmt: skip
def test_figures_that_nothing_computes_are_found(sentence):
    assert uncovered("none.md", sentence)


def test_another_figure_is_written_over():
    row = "| `multibit`, 1 bit | {} | {} |"
    text = "| `multibit`, 1 bit | 1 | 2.5 | 3 |\n| `multibit`, 1 bit | 1 | 2.5 |\nin\n5 MB"
    text = with_figures(text, row, ["7", "8"])
    assert with_figures(text, "in {} MB", ["9"]) == (
        "| `multibit`, 1 bit | 1 | 2.5 | 3 |\n| `multibit`, 1 bit | 7 | 8 |\nin\n9 MB"
    )
    with pytest.raises(AssertionError, match="0 times in the text"):
        with_figures(text, "in {} GB", ["9"])


if __name__ == "__main__":
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = written(name_of(page), before)
        page.write_text(after, encoding="utf-8")
        changed = sum(a != b for a, b in zip(before.splitlines(), after.splitlines(), strict=True))
        print(f"{name_of(page)}: {changed} lines with other figures")
