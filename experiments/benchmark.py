"""How fast cubin is, beside a plain copy and what one writes without it, on a CPU or a GPU.

Every operation is timed on shapes of networks and of large matrices, in rounds: each round runs
cubin, a copy of as many bytes and the peers (NumPy or CuPy expressions, PyTorch eager and compiled,
Triton on a GPU, as far as they are installed) once, so that all see the same state of the machine.
It prints a table of medians and ratios and writes benchmark.csv, .png and .json (where the figures
come from) to the output folder.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import functools
import gc
import json
import os
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peers
import provenance
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import cubin
from cubin import solvers
from cubin.commands.arguments import UsageError, array_library, parse_bits
from cubin.core import memory
from cubin.core.host import blocks
from cubin.solvers import SOLVERS

NAME = "benchmark"
SEED = 0
WARM_UPS = 2
HOST_CACHE = 64 << 20
"""Bytes that inputs exceed together, so that none is in the cache when its turn comes."""

SLOWEST_PEER = 60.0
"""Seconds of a peer's first call from which on it is left out of the rounds."""

PAUSE = 0.02
"""Seconds before a call: OpenMP's threads spin on after the one before, and take its processors."""

SHORT_CALL = 0.5
"""Seconds of a call up to which the same candidate is called right before: what another has left
running, or in the caches, is felt for longer than a pause."""

CUBIN = "cubin"
REUSED = "cubin, out="
NEW = "cubin, new memory"
WITHOUT_NUMBA = "cubin, NumPy alone"
COPY = "copy"
EXPRESSION = "expression"
EAGER = "PyTorch eager"
HALVING = "PyTorch, by halving"
COMPILED = "torch.compile"
TRITON = "Triton"
IN_TORCH = (EAGER, HALVING, COMPILED, TRITON)
"""What allocates through PyTorch."""

# Okabe and Ito's palette, with markers for those who do not tell colours apart.
STYLES = {
    CUBIN: ("#0072B2", "o"),
    REUSED: ("#56B4E9", "D"),
    NEW: ("#999999", "h"),
    WITHOUT_NUMBA: ("#009E73", "s"),
    EXPRESSION: ("#E69F00", "^"),
    EAGER: ("#D55E00", "v"),
    HALVING: ("#F0E442", "<"),
    COMPILED: ("#CC79A7", "P"),
    TRITON: ("#000000", "X"),
}


@dataclass(frozen=True)
class Layout:
    """An array's shape and its rows."""

    name: str
    shape: tuple[int, ...]
    granularity: Mapping[str, int]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def flat(self) -> tuple[int, int]:
        """The shape as (rows, n)."""
        if "group_size" in self.granularity:
            return self.size // self.granularity["group_size"], self.granularity["group_size"]
        rows = self.shape[0] if self.granularity else 1
        return rows, self.size // rows


ROW = {"channel_axis": 0}
GROUP = {"group_size": 128}
LAYOUTS = (
    Layout("512x512x3x3 per kernel", (512, 512, 3, 3), ROW),
    Layout("4096x4096 per row", (4096, 4096), ROW),
    Layout("4096x4096 per group of 128", (4096, 4096), GROUP),
    Layout("16384x16384 per row", (16384, 16384), ROW),
    Layout("16384x16384 per group of 128", (16384, 16384), GROUP),
    Layout("64M per tensor", (1 << 26,), {}),
    Layout("1e6x27 per row", (1_000_000, 27), ROW),
)
QUICK_LAYOUTS = (
    Layout("128x1024x3x3 per kernel", (128, 1024, 3, 3), ROW),
    Layout("1024x1024 per row", (1024, 1024), ROW),
    Layout("1024x1024 per group of 128", (1024, 1024), GROUP),
    Layout("1M per tensor", (1 << 20,), {}),
    Layout("4e4x27 per row", (40_000, 27), ROW),
)
OPERATIONS = (
    "sign", "sign_grad", "ste_mask", "multibit_grad", "multibit", "alternating", "refined",
    "optimal", "quantize", "dequantize",
)  # fmt: skip
SLOW = {"optimal": 1 << 22}
QUICK_SLOW = {"optimal": 1 << 20}
"""Operations that are timed on arrays up to some size alone."""

LARGEST_OF_PEER = {"alternating": 1 << 24}
"""The same for their peers in PyTorch: this one takes 20 to 40 times its input's memory."""


@dataclass(frozen=True)
class Case:
    """One operation on one layout."""

    operation: str
    layout: Layout
    bits: int
    mapped: bool

    @property
    def levelled(self) -> bool:
        """Whether the number of levels matters."""
        return self.operation not in ("sign", "sign_grad", "ste_mask")

    @property
    def solver(self) -> str | None:
        """The solver, if the operation is an approximation."""
        named = "greedy" if self.operation == "multibit" else self.operation
        return named if named in SOLVERS else None

    @property
    def label(self) -> str:
        bits = f", {'map of 0 to ' if self.mapped else ''}{self.bits} bits" if self.levelled else ""
        return f"{self.operation}, {self.layout.name}{bits}"

    @property
    def bytes_per_element(self) -> int:
        """What must be moved: inputs read once, outputs written once; scales do not count."""
        moved = {
            "sign": 8, "sign_grad": 12, "multibit_grad": 12, "ste_mask": 5,
            "quantize": 4 + self.bits, "dequantize": 4 + self.bits,
        }  # fmt: skip
        return moved.get(self.operation, 8) + self.mapped

    @property
    def operations_per_element(self) -> int | None:
        """Absolute value, sum, sign, subtraction and addition for each level; None if unknown."""
        simple = {"sign": 1, "sign_grad": 2, "multibit_grad": 2, "ste_mask": 2}
        return simple.get(self.operation, 5 * self.bits if self.operation == "multibit" else None)


@dataclass(frozen=True)
class Inputs:
    """What one call works on, for either library; `flat` and the tensors are (rows, n)."""

    x: Any
    gy: Any
    bits: Any
    out: Any
    tensors: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """The times of one candidate in one case."""

    case: Case
    candidate: str
    seconds: tuple[float, ...]
    of_copy: float
    ratio: tuple[float, float, float]
    """The time relative to cubin's in the same round: quartiles and median in the middle."""
    peak_bytes: int | None

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def row(self) -> dict[str, Any]:
        case = self.case
        low, high = np.percentile(self.seconds, [25, 75])
        moved = case.layout.size * case.bytes_per_element
        return {
            "operation": case.operation,
            "layout": case.layout.name,
            "bits": case.bits if case.levelled else "",
            "map": int(case.mapped),
            "candidate": self.candidate,
            "elements": case.layout.size,
            "bytes": moved,
            "rounds": len(self.seconds),
            "median_ms": f"{self.median * 1e3:.4g}",
            "quartile_1_ms": f"{low * 1e3:.4g}",
            "quartile_3_ms": f"{high * 1e3:.4g}",
            "gigabytes_per_second": f"{moved / self.median / 1e9:.4g}",
            "fraction_of_copy": f"{self.of_copy:.3g}",
            "ratio_to_cubin": f"{self.ratio[1]:.4g}",
            "ratio_quartile_1": f"{self.ratio[0]:.4g}",
            "ratio_quartile_3": f"{self.ratio[2]:.4g}",
            "peak_bytes": "" if self.peak_bytes is None else self.peak_bytes,
        }


# ---------------------------------------------------------------- the machine


class Host:
    """Time and memory on the CPU."""

    library: Any = np
    cache = HOST_CACHE

    def __init__(self) -> None:
        self.torch = peers.optional("torch")
        self.triton = None

    def tensor(self, array: np.ndarray) -> Any:
        return self.torch.from_numpy(array) if self.torch else None

    def time(self, call: Callable[[], Any]) -> float:
        time.sleep(PAUSE)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def peak(self, call: Callable[[], Any], candidate: str) -> int | None:
        """The most that NumPy holds during a call, the result included; torch does not tell."""
        if candidate in IN_TORCH:
            return None
        memory.release()
        tracemalloc.start()
        try:
            call()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()


class Device:
    """Time and memory on a GPU: events around several launches, so that the queue never starves."""

    def __init__(self, cupy: Any) -> None:
        self.library = cupy
        self.cache = 2 * cupy.cuda.Device().attributes["L2CacheSize"]
        torch = peers.optional("torch")
        self.torch = torch if torch is not None and torch.cuda.is_available() else None
        self.triton = peers.optional("triton_greedy") if self.torch else None

    def tensor(self, array: Any) -> Any:
        return self.torch.from_dlpack(array) if self.torch else None

    def time(self, call: Callable[[], Any]) -> float:
        cuda = self.library.cuda
        stream = self.torch.cuda.current_stream().cuda_stream if self.torch else 0
        with cuda.ExternalStream(stream) if stream else cuda.Stream.null:
            start, stop = cuda.Event(), cuda.Event()
            start.record()
            call()
            stop.record()
            stop.synchronize()
        return cuda.get_elapsed_time(start, stop) / 1e3

    def peak(self, call: Callable[[], Any], candidate: str) -> int | None:
        """What the pool of CuPy or PyTorch grows to during a call."""
        if candidate in IN_TORCH:
            before = self.torch.cuda.memory_allocated()
            self.torch.cuda.reset_peak_memory_stats()
            call()
            return self.torch.cuda.max_memory_allocated() - before
        pool = self.library.get_default_memory_pool()
        pool.free_all_blocks()
        before = pool.total_bytes()
        call()
        return pool.total_bytes() - before


def keep_pages() -> None:
    """Have glibc keep the memory that is freed, as allocators of other libraries do."""
    libc = ctypes.CDLL(None)
    trim, most_mapped = -1, -4
    if not (libc.mallopt(trim, 1 << 30) and libc.mallopt(most_mapped, 0)):
        raise UsageError("--keep-pages: this C library has no mallopt")


# ---------------------------------------------------------------- candidates


def inputs_of(case: Case, machine: Host | Device) -> list[Inputs]:
    """Different inputs that together exceed the cache."""
    xp, layout = machine.library, case.layout
    rng = np.random.default_rng(SEED)
    sets = max(1, -(-machine.cache // (layout.size * case.bytes_per_element)))
    found = []
    for _ in range(sets):
        x, gy = (
            xp.asarray(rng.standard_normal(layout.shape, dtype=np.float32)) if needed else None
            for needed in (True, "grad" in case.operation)
        )
        bits: Any = case.bits
        if case.mapped:
            bits = xp.asarray(rng.integers(0, case.bits + 1, layout.shape, np.uint8))
        tensors = {"x": machine.tensor(x.reshape(layout.flat))}
        if gy is not None:
            tensors["gy"] = machine.tensor(gy.reshape(layout.flat))
        if case.mapped:
            tensors["bits"] = machine.tensor(bits.reshape(layout.flat))
        out = xp.zeros_like(x) if case.operation == "sign" or case.solver else None
        found.append(Inputs(x, gy, bits, out, tensors))
    return found


def candidates_of(
    case: Case, machine: Host | Device, inputs: Sequence[Inputs]
) -> dict[str, Callable[[Inputs], Any]]:
    """What is timed, by name; cubin first, then the copy."""
    found = {CUBIN: _cubin(case, inputs)}
    if case.operation == "sign":
        found[REUSED] = lambda a: cubin.sign(a.x, out=a.out)
    elif case.solver:
        options = {"solver": case.solver, **case.layout.granularity}
        found[REUSED] = lambda a: cubin.multibit(a.x, a.bits, out=a.out, **options)
    if REUSED in found and isinstance(machine, Host) and inputs[0].x.nbytes >= memory.LARGE:
        found[NEW] = functools.partial(_in_new_memory, found[CUBIN])
    if isinstance(machine, Host) and blocks.pays(case.layout.size):
        found[WITHOUT_NUMBA] = functools.partial(_without_numba, found[CUBIN])
    found[COPY] = _copy(case, machine)
    found |= _peers(case, machine)
    return found


def _cubin(case: Case, inputs: Sequence[Inputs]) -> Callable[[Inputs], Any]:
    options = case.layout.granularity
    if case.operation == "dequantize":
        codes = {id(a): cubin.quantize(a.x, a.bits, check_finite=False, **options) for a in inputs}
        return lambda a: codes[id(a)].dequantize()
    if case.solver:
        return lambda a: cubin.multibit(a.x, a.bits, solver=case.solver, **options)
    return {
        "sign": lambda a: cubin.sign(a.x),
        "sign_grad": lambda a: cubin.sign_grad(a.x, a.gy),
        "ste_mask": lambda a: cubin.ste_mask(a.x),
        "multibit_grad": lambda a: cubin.multibit_grad(a.x, a.bits, a.gy),
        "quantize": lambda a: cubin.quantize(a.x, a.bits, check_finite=False, **options),
    }[case.operation]


def _in_new_memory(call: Callable[[Inputs], Any], inputs: Inputs) -> Any:
    """As the first call, and each whose results are held: none is there to be used again."""
    memory.release()
    return call(inputs)


def _without_numba(call: Callable[[Inputs], Any], inputs: Inputs) -> Any:
    before = blocks.COMPILED, solvers.COMPILED
    blocks.COMPILED = solvers.COMPILED = sys.maxsize
    try:
        return call(inputs)
    finally:
        blocks.COMPILED, solvers.COMPILED = before


def _copy(case: Case, machine: Host | Device) -> Callable[[Inputs], Any]:
    """A copy that moves as many bytes as the case, half of them in and half of them out."""
    xp = machine.library
    count = case.layout.size * case.bytes_per_element // 8
    source, target = xp.ones(count, np.float32), xp.zeros(count, np.float32)
    return lambda _: xp.copyto(target, source)


def _peers(case: Case, machine: Host | Device) -> dict[str, Callable[[Inputs], Any]]:
    xp, torch, flat = machine.library, machine.torch, case.layout.flat
    found: dict[str, Callable[[Inputs], Any]] = {}
    operation = case.operation
    if operation == "sign":
        found[EXPRESSION] = lambda a: peers.array_sign(xp, a.x)
    elif operation in ("sign_grad", "multibit_grad"):
        found[EXPRESSION] = lambda a: peers.array_gradient(xp, a.x, _bound(case, a.bits), a.gy)
    elif operation == "multibit":
        found[EXPRESSION] = lambda a: peers.array_greedy(
            xp, a.x.reshape(flat), a.bits.reshape(flat) if case.mapped else a.bits
        )
    if torch is None or case.layout.size > LARGEST_OF_PEER.get(operation, case.layout.size):
        return found
    eager: Callable[..., Any] | None = {
        "sign": partial(peers.torch_sign, torch),
        "sign_grad": partial(peers.torch_gradient, torch),
        "multibit_grad": partial(peers.torch_gradient, torch),
        "multibit": partial(peers.torch_greedy, torch),
        "alternating": partial(peers.torch_alternating, torch, search=peers.torch_search),
    }.get(operation)
    if eager is None:
        return found

    def arguments(a: Inputs) -> tuple[Any, ...]:
        t = a.tensors
        if operation == "sign":
            return (t["x"],)
        if "grad" in operation:
            return t["x"], t["bits"] if case.mapped else _bound(case, a.bits), t["gy"]
        return (t["x"], case.bits, t["bits"]) if case.mapped else (t["x"], case.bits)

    found[EAGER] = lambda a: eager(*arguments(a))
    if operation == "alternating":
        found[HALVING] = lambda a: eager(*arguments(a), search=peers.torch_halving)
    if operation == "multibit":
        torch._dynamo.reset()
        compiled = torch.compile(eager, dynamic=False)
        found[COMPILED] = lambda a: compiled(*arguments(a))
    triton = machine.triton
    if triton and operation == "multibit" and not case.mapped and flat[1] <= triton.LONGEST_ROW:
        found[TRITON] = lambda a: triton.greedy(torch, a.tensors["x"], case.bits)
    return found


def _bound(case: Case, bits: Any) -> Any:
    return 1 if case.operation == "sign_grad" else bits


# ---------------------------------------------------------------- measuring


def measure(
    case: Case, machine: Host | Device, rounds: int, seconds: float, quick: bool
) -> list[Measurement]:
    """Time all candidates of a case in rounds: `rounds` of them, or fewer after `seconds`."""
    inputs = inputs_of(case, machine)
    chosen = candidates_of(case, machine, inputs)
    peaks: dict[str, int | None] = {}
    for name, call in list(chosen.items()):
        try:
            for number in range(1 if quick else WARM_UPS):
                taken = machine.time(partial(call, inputs[number % len(inputs)]))
                if taken > SLOWEST_PEER and name not in (CUBIN, COPY):
                    break
            peaks[name] = machine.peak(partial(call, inputs[0]), name)
        except Exception as error:  # a peer that cannot do a case is no reason to stop
            if name in (CUBIN, COPY):
                raise
            print(f"{case.label}: {name} left out: {str(error).splitlines()[0]}", file=sys.stderr)
            del chosen[name]
            continue
        if taken > SLOWEST_PEER and name not in (CUBIN, COPY):
            print(f"{case.label}: {name} left out, a call takes {taken:.0f} s", file=sys.stderr)
            del chosen[name]
    times: dict[str, list[float]] = {name: [] for name in chosen}
    started = time.perf_counter()
    names, order = list(chosen), np.random.default_rng(SEED)
    for number in range(rounds):
        # In another order each time: what comes after PyTorch's threads is slower than the rest.
        for name in order.permutation(names):
            call = partial(chosen[name], inputs[number % len(inputs)])
            if not quick and (number == 0 or times[name][-1] < SHORT_CALL):
                call()
            times[name].append(machine.time(call))
        if number >= 2 and time.perf_counter() - started > seconds:
            break
    results = []
    for name, taken_by in times.items():
        ratio = np.percentile(np.divide(taken_by, times[CUBIN]), [25, 50, 75])
        of_copy = float(np.median(np.divide(times[COPY], taken_by)))
        spread = (float(ratio[0]), float(ratio[1]), float(ratio[2]))
        results.append(Measurement(case, name, tuple(taken_by), of_copy, spread, peaks.get(name)))
    return results


def cases_of(arguments: argparse.Namespace) -> Iterator[Case]:
    """All combinations asked for; those that differ in nothing come once."""
    layouts, slow = (QUICK_LAYOUTS, QUICK_SLOW) if arguments.quick else (LAYOUTS, SLOW)
    largest = max(arguments.bits)
    for layout in layouts:
        if arguments.layouts and not any(part in layout.name for part in arguments.layouts):
            continue
        for operation in arguments.operations:
            if layout.size > slow.get(operation, layout.size):
                continue
            for bits in arguments.bits:
                for mapped in (False, True):
                    if mapped and arguments.quick and layout != layouts[0]:
                        continue
                    case = Case(operation, layout, bits, mapped)
                    if not case.levelled and (bits != largest or mapped):
                        continue
                    once = operation in ("multibit_grad", "refined", "optimal", "dequantize")
                    if (mapped and bits not in (4, largest)) or (once and bits not in (2, 4)):
                        continue
                    if mapped and operation not in ("multibit", "multibit_grad", "quantize"):
                        continue
                    yield case


# ---------------------------------------------------------------- results


def table(results: Sequence[Measurement]) -> str:
    """The candidates of a case, one to a line."""
    lines = [results[0].case.label]
    for m in results:
        low, high = np.percentile(m.seconds, [25, 75]) * 1e3
        peak = "" if m.peak_bytes is None else f"  peak {m.peak_bytes / 2**20:8.1f} MiB"
        lines.append(
            f"  {m.candidate:20}{m.median * 1e3:10.3f} ms ({low:.3f} to {high:.3f})"
            f"  {m.of_copy:6.2f} of copy  {m.ratio[1]:8.2f} x cubin{peak}"
        )
    return "\n".join(lines)


def draw_roofline(ax: Axes, results: Sequence[Measurement]) -> Axes:
    """Draw operations per second over operations per byte, under the roof that a copy sets.

    Parameters
    ----------
    ax : Axes
    results : sequence of Measurement
        Those whose operations are not counted are left out.

    Returns
    -------
    Axes
        The Axes given.
    """
    counted = [m for m in results if m.case.operations_per_element and not m.case.mapped]
    copies = [m for m in counted if m.candidate == COPY]
    speeds = [m.case.layout.size * m.case.bytes_per_element / m.median for m in copies]
    low, median, high = np.percentile(speeds, [10, 50, 90])
    intensities = [m.case.operations_per_element / m.case.bytes_per_element for m in counted]
    ends = np.array([min(intensities) / 1.5, max(intensities) * 1.5])
    ax.fill_between(ends, ends * low / 1e9, ends * high / 1e9, color="0.85", label="_nolegend_")
    label = f"roof: plain copy, {median / 1e9:.3g} GB/s (band: 10th to 90th percentile)"
    ax.plot(ends, ends * median / 1e9, color="0.5", lw=2, label=label)
    present = [name for name in STYLES if any(m.candidate == name for m in counted)]
    for number, name in enumerate(present):
        color, marker = STYLES[name]
        own = [m for m in counted if m.candidate == name]
        # Side by side, where the candidates of one intensity would hide each other.
        beside = 1 + 0.03 * (number - len(present) / 2)
        ax.plot(
            [beside * m.case.operations_per_element / m.case.bytes_per_element for m in own],
            [m.case.operations_per_element * m.case.layout.size / m.median / 1e9 for m in own],
            ls="", marker=marker, color=color, ms=5, alpha=0.8, label=name,
        )  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("intensity (operations of the definition per byte that must move)")
    ax.set_ylabel("speed (10⁹ operations per second)")
    ax.set_title("Signs, gradients and greedy codes: speed under the memory roof")
    ax.grid(alpha=0.3, which="both")
    ax.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False, fontsize="small"
    )
    return ax


def write(arguments: argparse.Namespace, results: Sequence[Measurement], library: str) -> Path:
    """Write the CSV, the figure and where they come from."""
    path = arguments.output / NAME
    rows = [m.row() for m in results]
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    if any(m.case.operations_per_element and not m.case.mapped for m in results):
        figure = Figure(figsize=(7, 5.5), layout="constrained")
        draw_roofline(figure.subplots(), results)
        figure.savefig(path.with_suffix(".png"), dpi=130)
    packages = ("matplotlib", "numba", "torch", "triton")
    origin = provenance.record(vars(arguments), SEED, packages)
    origin |= {"library": library, "load_average": _load()}
    path.with_suffix(".json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    return path


def _load() -> list[float] | None:
    """How busy the machine was in the last 1, 5 and 15 minutes."""
    with contextlib.suppress(AttributeError, OSError):
        return [round(load, 2) for load in os.getloadavg()]
    return None


def argument_parser() -> argparse.ArgumentParser:
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog=f"{NAME}.py", description=description, epilog=details)
    parser.add_argument(
        "--bits", type=parse_bits, metavar="BITS", help="bit widths (default: 1-4,8; quick: 2)"
    )
    parser.add_argument(
        "--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS, metavar="NAME",
        help=f"what to time: {', '.join(OPERATIONS)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--layouts", nargs="+", metavar="TEXT",
        help="only the shapes whose name has one of these texts in it, such as '4096x4096 per row'",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=15, help="rounds of a case (default: 15)")
    parser.add_argument(
        "--seconds", type=float, metavar="S",
        help="no more rounds of a case after this time, but 3 at least (default: 10; quick: 0.3)",
    )  # fmt: skip
    parser.add_argument(
        "--keep-pages", action="store_true",
        help="have the C library keep freed memory, so that new results cost no page faults (CPU)",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="cpu: NumPy; cuda: CuPy; auto: cuda where there is a GPU (default: auto)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("output"), metavar="FOLDER",
        help="folder for the results (default: output)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="smaller arrays, under 2 minutes")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Measure, print and write the results."""
    library = array_library(arguments.device)
    if arguments.rounds < 1:
        raise UsageError(f"--rounds {arguments.rounds}: at least 1 round is needed")
    if arguments.bits is None:
        arguments.bits = parse_bits("2" if arguments.quick else "1-4,8")
    if max(arguments.bits) > 8:
        raise UsageError(f"--bits {max(arguments.bits)}: alternating takes at most 8")
    if arguments.seconds is None:
        arguments.seconds = 0.3 if arguments.quick else 10.0
    if arguments.keep_pages:
        keep_pages()
    cases = list(cases_of(arguments))
    if not cases:
        raise UsageError("--layouts: no shape has such a name; leave it out to see them all")
    arguments.output.mkdir(parents=True, exist_ok=True)
    machine = Host() if library is np else Device(library)
    results: list[Measurement] = []
    for case in cases:
        found = measure(case, machine, arguments.rounds, arguments.seconds, arguments.quick)
        print(table(found), flush=True)
        results += found
        gc.collect()
    print(f"\nWritten: {write(arguments, results, library.__name__)}.csv, .png and .json")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status, 2 for what the user can mend."""
    arguments = argument_parser().parse_args(argv)
    try:
        run(arguments)
    except (UsageError, OSError) as error:
        print(f"{NAME}.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
