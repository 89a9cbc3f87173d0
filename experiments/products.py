"""How fast products with packed codes are, beside those with floats, and what the weights take.

Weights of two shapes are coded with 1 to 4 bits and scales per row. They multiply batches of 1 to
512 rows of floats, and codes of 1 bit those of 1 bit. Beside them NumPy (CuPy on a GPU) multiplies
in float32, and PyTorch, where it is installed, in float32, bfloat16 and with dynamic int8. Rounds
call every candidate for a while and time a call then, in another order each time. The limit of
bandwidth is the time in which main memory gives the weights: those that lie in a cache may beat it.

It prints a table and what follows from it, and writes products.csv, .png and .json (where the
figures come from, and the findings) to the output folder.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields
from functools import partial
from typing import Any

import benchmark
import numpy as np
import provenance
from benchmark import Device, Host
from command_line import exit_status, output_parser, write_results
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

import cubin
from cubin import products
from cubin.commands.arguments import UsageError, array_library

NAME = "products"
SEED = 0
SHAPES = ((4096, 4096), (11008, 4096))
QUICK_SHAPES = ((1024, 1024), (2752, 1024))
BATCHES = (1, 8, 64, 512)
BITS = (1, 2, 3, 4)
ROUNDS, QUICK_ROUNDS = 15, 5
WARM = 0.1
"""Seconds for which a call is repeated before it is timed: the threads of BLAS spin on for 25 ms
after the call before, and threads that wake begin on one processor together."""

READ, QUICK_READ = 1 << 28, 1 << 26
"""Bytes that are read to measure the bandwidth."""

FLOATS = "float32"
TORCH = ("torch float32", "torch bfloat16", "torch int8")
CODE = "cubin"
CODES = "cubin, code of x"

Call = Callable[[], Any]


@dataclass(frozen=True)
class Result:
    """How long a product took, and what its weights take.

    Attributes
    ----------
    m, n : int
        The weights have m rows of n.
    batch : int
        Rows of x.
    candidate : str
    bits : int or None
        Of the code.
    rounds : int
    seconds, quartile_1, quartile_3 : float
        Over the rounds; seconds are the median.
    speed_up : float
        The time of float32 over that of the candidate.
    limit : float
        The speed-up where the weights come as fast as main memory gives them.
    weight_bytes : int
    relative_mse : float
        Of the outputs, beside those of float32.
    """

    m: int
    n: int
    batch: int
    candidate: str
    bits: int | None
    rounds: int
    seconds: float
    quartile_1: float
    quartile_3: float
    speed_up: float
    limit: float
    weight_bytes: int
    relative_mse: float


@dataclass(frozen=True)
class Candidate:
    """A product, and the bytes of its weights."""

    call: Call
    weight_bytes: int


class Layer:
    """The same weights as floats, as codes and as PyTorch has them.

    `left_out` gets the reason where there is no such candidate.
    """

    def __init__(
        self, shape: tuple[int, int], machine: Host | Device, left_out: dict[str, str]
    ) -> None:
        self.machine = machine
        drawn = np.random.default_rng(SEED).standard_normal(shape, np.float32)
        self.w = machine.library.asarray(drawn)
        code = cubin.quantize(self.w, max(BITS), channel_axis=0)
        self.codes = {bits: code.truncate(bits) for bits in BITS}
        self.peers: dict[str, tuple[Callable[[Any], Any], int]] = {}
        for name, make in zip(TORCH, (_torch_float, _torch_bfloat16, _torch_int8), strict=True):
            if machine.torch is None:
                left_out[name] = "PyTorch is not installed"
                continue
            try:
                self.peers[name] = make(machine.torch, machine.tensor(self.w))
            except Exception as error:  # a peer that cannot do it is no reason to stop
                left_out[name] = benchmark.one_line(error)

    def candidates(self, batch: int) -> dict[tuple[str, int | None], Candidate]:
        """The products of so many rows of x, by name and bits."""
        drawn = np.random.default_rng(SEED + 1).standard_normal(
            (batch, self.w.shape[1]), np.float32
        )
        x, w = self.machine.library.asarray(drawn), self.w
        found: dict[tuple[str, int | None], Candidate] = {
            (FLOATS, None): Candidate(lambda: x @ w.T, w.nbytes)
        }
        for name, (multiply, nbytes) in self.peers.items():
            found[name, None] = Candidate(partial(multiply, self.machine.tensor(x)), nbytes)
        for bits, code in self.codes.items():
            call = partial(products.linear, x, code)
            found[CODE, bits] = Candidate(call, code.nbytes)
        of_x, code = cubin.quantize(x, 1, channel_axis=0), self.codes[1]
        found[CODES, 1] = Candidate(partial(products.linear, of_x, code), code.nbytes)
        return found


def _torch_float(torch: Any, w: Any) -> tuple[Callable[[Any], Any], int]:
    return lambda x: torch.nn.functional.linear(x, w), w.nbytes


def _torch_bfloat16(torch: Any, w: Any) -> tuple[Callable[[Any], Any], int]:
    halves = w.bfloat16()
    return lambda x: torch.nn.functional.linear(x.bfloat16(), halves).float(), halves.nbytes


def _torch_int8(torch: Any, w: Any) -> tuple[Callable[[Any], Any], int]:
    """Weights of int8 and a scale; x is quantized at every call."""
    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(w, requires_grad=False)
    with warnings.catch_warnings(action="ignore"):  # it is deprecated, and what is installed
        dynamic = torch.ao.quantization.quantize_dynamic(
            torch.nn.Sequential(layer), {torch.nn.Linear}, torch.qint8
        )
        dynamic(w[:1])
    return dynamic, w.numel()


# ---------------------------------------------------------------- measuring


def bandwidth(machine: Host | Device, size: int) -> float:
    """Bytes per second that main memory gives, at best."""
    if isinstance(machine, Device):
        source = machine.library.zeros(size // 4, np.float32)
        target = machine.library.empty_like(source)
        copy = partial(machine.library.copyto, target, source)
        copy()
        return 2 * size / min(machine.time(copy) for _ in range(5))
    parts = np.array_split(np.zeros(size // 4, np.float32), 8 * benchmark.threads())
    with ThreadPoolExecutor(benchmark.threads()) as pool:

        def read() -> None:
            for _ in pool.map(np.max, parts):
                pass

        read()
        return size / min(machine.time(read) for _ in range(5))


def samples(
    calls: Mapping[Any, Call], machine: Host | Device, rounds: int
) -> dict[Any, list[float]]:
    """The times of all calls in rounds, each in another order."""
    first = {name: machine.time(call) for name, call in calls.items()}
    repeats = {name: max(1, math.ceil(benchmark.SAMPLE / taken)) for name, taken in first.items()}
    names, order = list(calls), np.random.default_rng(SEED)
    found: dict[Any, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for number in order.permutation(len(names)):
            name = names[number]
            end = time.perf_counter() + WARM
            while time.perf_counter() < end:
                calls[name]()
            found[name].append(machine.time(calls[name], repeats[name]))
    return found


def measure(layer: Layer, batch: int, rounds: int, bytes_per_second: float) -> Iterator[Result]:
    """Time all products of so many rows."""
    candidates = layer.candidates(batch)
    outputs = {name: benchmark.on_host(one.call()) for name, one in candidates.items()}
    expected = outputs[FLOATS, None]
    taken = samples({name: c.call for name, c in candidates.items()}, layer.machine, rounds)
    floats = float(np.median(taken[FLOATS, None]))
    m, n = layer.w.shape
    for (name, bits), candidate in candidates.items():
        low, middle, high = np.percentile(taken[name, bits], [25, 50, 75])
        yield Result(
            m, n, batch, name, bits, rounds, float(middle), float(low), float(high),
            floats / float(middle), floats * bytes_per_second / candidate.weight_bytes,
            candidate.weight_bytes,
            float(cubin.errors.relative_mse(expected, outputs[name, bits])),
        )  # fmt: skip


# ---------------------------------------------------------------- findings


def label(result: Result, library: str = "NumPy") -> str:
    """What a candidate is called."""
    names = {FLOATS: f"{library} float32", CODES: "1 bit by 1 bit"}
    names |= dict(zip(TORCH, ("PyTorch float32", "PyTorch bfloat16", "PyTorch int8"), strict=True))
    if result.candidate == CODE:
        return f"{result.bits} bit{'s' if result.bits != 1 else ''}"
    return names[result.candidate]


def findings(results: Sequence[Result], bytes_per_second: float) -> list[str]:
    """What the results say, in words."""
    said = [f"Main memory gives {bytes_per_second / 1e9:.1f} GB/s."]
    for shape in dict.fromkeys((r.m, r.n) for r in results):
        of_shape = [r for r in results if (r.m, r.n) == shape]
        first = [r for r in of_shape if r.batch == min(BATCHES)]
        speeds = [f"{label(r)} {r.speed_up:.2f}" for r in first if r.candidate == CODE]
        memory = [
            f"{label(r)} {r.weight_bytes / first[0].weight_bytes:.3f}"
            for r in first
            if r.candidate == CODE
        ]
        slowest = min((r for r in of_shape if r.candidate == CODE), key=lambda r: r.speed_up)
        said += [
            f"{shape[0]} x {shape[1]}, a row of x, times as fast as float32: {', '.join(speeds)}.",
            f"{shape[0]} x {shape[1]}, of the memory of float32: {', '.join(memory)}.",
            f"{shape[0]} x {shape[1]}, slowest: {label(slowest)} at {slowest.batch} rows, "
            f"{slowest.speed_up:.2f} times as fast as float32.",
        ]
    return said


def table(results: Sequence[Result], library: str) -> str:
    """Milliseconds and speed-ups by batch, and the memory, as aligned text."""
    lines = []
    for shape in dict.fromkeys((r.m, r.n) for r in results):
        of_shape = [r for r in results if (r.m, r.n) == shape]
        batches = list(dict.fromkeys(r.batch for r in of_shape))
        heads = "".join(f"{f'{batch} rows':>19}" for batch in batches)
        lines.append(f"{f'{shape[0]} x {shape[1]}':<20}{'MB':>8}{heads}")
        by_name: dict[str, list[Result]] = {}
        for r in of_shape:
            by_name.setdefault(label(r, library), []).append(r)
        for name, row in by_name.items():
            cells = "".join(
                f"{f'{1e3 * r.seconds:.3g} ms':>10} {f'{r.speed_up:.3g} x':>8}" for r in row
            )
            lines.append(f"{name:<20}{row[0].weight_bytes / 1e6:>8.2f}{cells}")
    return "\n".join(lines)


# ---------------------------------------------------------------- figure

# Okabe and Ito's palette, told apart by colour-blind readers; the markers double it.
STYLES = {
    (CODE, 1): ("#0072B2", "o"), (CODE, 2): ("#009E73", "s"), (CODE, 3): ("#E69F00", "^"),
    (CODE, 4): ("#D55E00", "D"), (CODES, 1): ("#CC79A7", "v"), (FLOATS, None): ("black", ""),
    ("torch float32", None): ("0.45", "x"), ("torch bfloat16", None): ("0.45", "+"),
    ("torch int8", None): ("0.45", "1"),
}  # fmt: skip


def draw_speed(ax: Axes, results: Sequence[Result], library: str) -> Axes:
    """Draw the speed-up of every candidate against the batch; bars where bandwidth ends.

    Parameters
    ----------
    ax : Axes
    results : sequence of Result
        Of one shape.
    library : str
        What multiplies in float32.

    Returns
    -------
    Axes
        The Axes given.
    """
    batches = sorted({r.batch for r in results})
    for (name, bits), (color, marker) in STYLES.items():
        own = [r for r in results if (r.candidate, r.bits) == (name, bits)]
        if not own:
            continue
        # Peers are thin and grey: they are what codes are compared with.
        style = {"lw": 1.6, "ms": 5} if name in (CODE, CODES) else {"lw": 1, "ms": 6, "ls": ":"}
        style |= {"ls": "-"} if name == FLOATS else {}
        ax.plot(
            [r.batch for r in own], [r.speed_up for r in own], color=color, marker=marker,
            label=label(own[0], library), **style,
        )  # fmt: skip
        if name == CODE:
            ax.plot(batches[0] / 1.35, own[0].limit, color=color, marker="_", ms=14, mew=2.5, ls="")
    ax.plot([], [], color="0.3", marker="_", ms=14, mew=2.5, ls="", label="limit of bandwidth")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(batches, [str(batch) for batch in batches])
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlabel("rows of x")
    ax.set_ylabel(f"times as fast as float32 ({library})")
    ax.set_title(f"Weights of {results[0].m} x {results[0].n}", fontsize="medium")
    ax.grid(alpha=0.3)
    return ax


def draw_memory(ax: Axes, results: Sequence[Result], library: str) -> Axes:
    """Draw what the weights of every candidate take; arguments as for `draw_speed`."""
    once = {label(r, library): r for r in results if r.candidate != CODES}
    names = [name for name in once if name != "PyTorch float32"]
    bits = [8 * once[name].weight_bytes / (once[name].m * once[name].n) for name in names]
    colors = [STYLES[once[name].candidate, once[name].bits][0] for name in names]
    bars = ax.barh(names, bits, color=colors)
    ax.bar_label(bars, [f"{value:.3g}" for value in bits], padding=3, fontsize="small")
    ax.invert_yaxis()
    ax.set_xlim(0, 1.12 * max(bits))
    ax.set_xlabel("bits of memory for each weight")
    ax.set_title("Memory", fontsize="medium")
    return ax


def figure_of(results: Sequence[Result], library: str) -> Figure:
    """A panel of speeds for each shape, and one of memory, with one legend below."""
    shapes = list(dict.fromkeys((r.m, r.n) for r in results))
    figure = Figure(figsize=(4.3 * len(shapes) + 3.4, 5.2), layout="constrained")
    axes = figure.subplots(1, len(shapes) + 1, width_ratios=[4.3] * len(shapes) + [3.2])
    for ax, shape in zip(axes, shapes, strict=False):
        draw_speed(ax, [r for r in results if (r.m, r.n) == shape], library)
    limits = np.array([ax.get_ylim() for ax in axes[: len(shapes)]])
    for ax in axes[: len(shapes)]:
        ax.set_ylim(limits.min(), limits.max())
        ax.label_outer()
    draw_memory(axes[-1], [r for r in results if (r.m, r.n) == shapes[0]], library)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return figure


# ---------------------------------------------------------------- script


def argument_parser() -> argparse.ArgumentParser:
    parser = output_parser(NAME, __doc__, "smaller weights: under a minute")
    parser.add_argument(
        "--rounds", type=int,
        help=f"rounds of a shape and batch (default: {ROUNDS}; quick: {QUICK_ROUNDS})",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="cpu: NumPy; cuda: CuPy; auto: cuda where there is a GPU (default: auto)",
    )  # fmt: skip
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write the results; return the exit status."""
    xp = array_library(arguments.device)
    if arguments.rounds is None:
        arguments.rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    if arguments.rounds < 1:
        raise UsageError(f"--rounds {arguments.rounds}: at least 1 round is needed")
    arguments.output.mkdir(parents=True, exist_ok=True)
    machine = Host() if xp is np else Device(xp)
    library = "NumPy" if xp is np else "CuPy"
    shapes = QUICK_SHAPES if arguments.quick else SHAPES
    bytes_per_second = bandwidth(machine, QUICK_READ if arguments.quick else READ)

    results: list[Result] = []
    left_out: dict[str, str] = {}
    with tqdm(total=len(shapes) * len(BATCHES), unit="batch", disable=None) as progress:
        for shape in shapes:
            layer = Layer(shape, machine, left_out)
            for batch in BATCHES:
                results += measure(layer, batch, arguments.rounds, bytes_per_second)
                progress.update()
    said = findings(results, bytes_per_second)
    said += [f"Left out: {name}: {reason}." for name, reason in left_out.items()]
    print(table(results, library))
    print(*said, sep="\n")

    packages = ("matplotlib", "ml-dtypes", "numba", "torch")
    origin = provenance.record(vars(arguments), SEED, packages)
    origin |= {
        "library": library, "threads": benchmark.threads(), "load_average": benchmark.load(),
        "bytes_per_second": bytes_per_second, "findings": said,
    }  # fmt: skip
    header, rows = [field.name for field in fields(Result)], map(astuple, results)
    figure = figure_of(results, library)
    write_results(NAME, arguments.output, header, rows, origin, figure, 130, digits=None)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status, 2 for what the user can mend."""
    return exit_status(NAME, run, argument_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
