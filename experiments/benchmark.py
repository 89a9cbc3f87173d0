"""How fast cubin is over a grid of operations, sizes, layouts, dtypes and bits, on a CPU or a GPU.

Each cell of the grid is timed in rounds: each round runs cubin, a plain copy of as many bytes and
the peers (NumPy or CuPy expressions, PyTorch eager and compiled, Triton on a GPU, as far as they
are installed) once, so that all see the same state of the machine. A peer is timed only where its
result is cubin's. It prints a summary and writes benchmark.csv, .png (a heat map), .md (the
summary) and .json (where the figures come from) to the output folder.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import grid
import heat_map
import ml_dtypes
import numpy as np
import peers
import provenance
import train_mnist
from command_line import output_parser
from grid import Cell, Placed
from tqdm import tqdm

import cubin
from cubin.commands.arguments import UsageError, array_library
from cubin.core import memory
from cubin.core.host import blocks

NAME = "benchmark"
SEED = 0
ROUNDS = 9
QUICK_ROUNDS = 7
ROUNDS_OF_SLOW = 3
SLOW, SLOWEST = 0.5, 4.0
"""Seconds of a call of cubin from which on there are `ROUNDS_OF_SLOW` rounds, and one."""

SLOW_PEER, FAR = 0.25, 4
"""Seconds of a peer's call from which on one is enough, where it takes so many times as long as
cubin: no more are needed to say who is faster."""

SAMPLE = 2e-4
"""Seconds that a sample takes at least: short calls are repeated."""

SHORT, WARM = 0.05, 0.003
"""Seconds of a call up to which the same candidate is called right before, and for how long it is:
what another has left in the caches is felt, and processors that pause take up to a millisecond to
wake."""

PAUSE = 0.003
"""Seconds before a call: OpenMP's threads spin on after the one before, and take its processors."""

MINUTES = 30.0
"""How long the cells may take in all. Those that come then, the random ones last, are left out."""

COMPILING = 300.0
"""Seconds that torch.compile may spend on all cells; those after it go without."""

MEMORY_FROM = 1 << 16
"""Elements from which on the memory of a call is measured."""

CUBIN = "seconds"
COPY = "copy"
EXPRESSION = "expression"
EAGER = "torch"
COMPILED = "torch_compile"
TRITON = "triton"
PEERS = (EXPRESSION, EAGER, COMPILED, TRITON)
"""The columns of the CSV that hold seconds of peers."""

COLUMNS = (
    "base", "factor", "level", *grid.KEY, "rows", "elements", "rounds", CUBIN, "quartile_1",
    "quartile_3", COPY, *PEERS, "fastest_peer", "fastest", "over_peer", "over_copy", "peak_bytes",
    "result_bytes", "error",
)  # fmt: skip

Call = Callable[[], Any]


# ---------------------------------------------------------------- the machine


class Host:
    """Time and memory on the CPU."""

    library: Any = np
    triton = None

    def __init__(self, with_torch: bool = True) -> None:
        self.torch = peers.optional("torch") if with_torch else None
        if self.torch:
            self.torch.set_num_threads(threads())

    def tensor(self, array: np.ndarray) -> Any:
        return self.torch.from_numpy(array)

    def time(self, call: Call, repeats: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    def peak(self, call: Call) -> int:
        """The most that NumPy holds during a call, the result included."""
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
        torch = peers.optional("torch")
        self.torch = torch if torch is not None and torch.cuda.is_available() else None
        self.triton = peers.optional("triton_greedy") if self.torch else None

    def tensor(self, array: Any) -> Any:
        return self.torch.from_dlpack(array)

    def time(self, call: Call, repeats: int = 1) -> float:
        cuda = self.library.cuda
        stream = self.torch.cuda.current_stream().cuda_stream if self.torch else 0
        with cuda.ExternalStream(stream) if stream else cuda.Stream.null:
            start, stop = cuda.Event(), cuda.Event()
            start.record()
            for _ in range(repeats):
                call()
            stop.record()
            stop.synchronize()
        return cuda.get_elapsed_time(start, stop) / 1e3 / repeats

    def peak(self, call: Call) -> int:
        """What CuPy's pool grows to during a call."""
        pool = self.library.get_default_memory_pool()
        pool.free_all_blocks()
        before = pool.total_bytes()
        call()
        return pool.total_bytes() - before


def threads() -> int:
    """The most threads that cubin uses; PyTorch gets as many."""
    available = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    return min(blocks.WORKERS, len(available) if available else os.cpu_count() or 1)


# ---------------------------------------------------------------- candidates


class Inputs:
    """What the calls of a cell work on, in its library; the views of peers have rows by axes."""

    def __init__(self, cell: Cell, machine: Host | Device) -> None:
        xp, rng = machine.library, np.random.default_rng(SEED)

        def array(values: np.ndarray) -> Any:
            if cell.layout == "transposed view":
                return xp.asarray(np.ascontiguousarray(values.T)).T
            order = "F" if cell.layout == "Fortran order" else "C"
            return xp.asarray(np.asarray(values, order=order))

        def floats() -> Any:
            drawn = rng.standard_normal(cell.shape, np.float32)
            return array(drawn.astype(dtype_of(cell.dtype)))

        self.cell = cell
        self.x = floats()
        self.gy = floats() if "grad" in cell.operation else None
        self.importance = abs(floats()) if cell.importance else None
        self.bits: Any = cell.bits
        if cell.map:
            self.bits = array(rng.integers(0, cell.bits + 1, cell.shape, np.dtype(cell.map)))

    @property
    def axes(self) -> tuple[int, ...]:
        """What a peer sums over, in its view of the array."""
        if self.cell.group:
            return (1,)
        return tuple(n for n in range(self.x.ndim) if n != self.cell.axis)

    def view(self, array: Any) -> Any:
        """The array with groups as rows."""
        return array.reshape(-1, self.cell.group) if self.cell.group else array

    def flat(self, array: Any) -> Any:
        """The array as (rows, n)."""
        cell = self.cell
        if cell.axis:
            array = array.swapaxes(0, cell.axis)
        return array.reshape(cell.rows, -1)

    def unflat(self, array: Any) -> Any:
        """A result (rows, n) in the order of the array."""
        cell = self.cell
        if not cell.axis:
            return array.reshape(cell.shape)
        moved = list(cell.shape)
        moved[0], moved[cell.axis] = moved[cell.axis], moved[0]
        return array.reshape(moved).swapaxes(0, cell.axis)


def dtype_of(name: str) -> np.dtype:
    """The dtype of this name; bfloat16 comes from ml_dtypes."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def mean_mix(size: int) -> list[tuple[int, int]]:
    """Bits and how many elements take them, for a mean of 1.4."""
    return [(2, round(0.4 * size)), (1, size - round(0.4 * size))]


def cubin_call(inputs: Inputs, folder: Path) -> Call:
    """What is measured."""
    cell, x, bits = inputs.cell, inputs.x, inputs.bits
    options: dict[str, Any] = dict(cell.granularity)
    name = cell.operation
    if name in grid.SOLVERS:
        options |= {"solver": grid.SOLVERS[name], "importance": inputs.importance}
        options |= {"iterations": None} if name == "converged" else {}
        return lambda: cubin.multibit(x, bits, **options)
    if name in ("top_down", "middle_out", "bottom_up"):
        mix = {width: count / x.size for width, count in mean_mix(x.size)}
        return partial(getattr(cubin.bitmaps, name), x, mix)
    if name in ("dequantize", *grid.FILES):
        code = cubin.quantize(x, bits, check_finite=False, **options)
        path = folder / "code.npz"
        if name == "load":
            code.save(path)
            return lambda: cubin.BinaryCode.load(path)
        return code.dequantize if name == "dequantize" else lambda: code.save(path)
    return {
        "sign": lambda: cubin.sign(x),
        "sign_grad": lambda: cubin.sign_grad(x, inputs.gy),
        "ste_mask": lambda: cubin.ste_mask(x),
        "multibit_grad": lambda: cubin.multibit_grad(x, bits, inputs.gy),
        "quantize": lambda: cubin.quantize(x, bits, check_finite=False, **options),
        "budget": lambda: cubin.bitmaps.budget(x, 1.4, **options),
        "allocate": lambda: cubin.bitmaps.allocate({"x": x}, 1.4, **options)["x"],
    }[name]


def copy_call(cell: Cell, machine: Host | Device) -> Call:
    """A copy that moves as many bytes as the cell, half of them in and half of them out."""
    xp, count = machine.library, max(1, cell.size * cell.bytes_per_element // 2)
    source, target = xp.ones(count, np.uint8), xp.zeros(count, np.uint8)
    return lambda: xp.copyto(target, source)


def expression(inputs: Inputs, machine: Host | Device) -> Call | None:
    """The cell in NumPy or CuPy."""
    xp, cell, view = machine.library, inputs.cell, inputs.view
    x, bits, name = inputs.x, inputs.bits, cell.operation
    if cell.uneven:
        return None
    if name in ("multibit", "quantize"):
        own = view(bits) if cell.map else bits
        function = peers.array_greedy if name == "multibit" else peers.array_encode
        return lambda: function(xp, view(x), own, inputs.axes)
    if name == "dequantize":
        scales, signs = code_of(inputs)
        return lambda: peers.array_decode(xp, scales, signs)
    if name in ("top_down", "middle_out"):
        counts = mean_mix(x.size)
        return lambda: peers.array_ranked(xp, x, counts, name == "middle_out")
    return {
        "sign": lambda: peers.array_sign(xp, x),
        "ste_mask": lambda: peers.array_mask(xp, x),
        "sign_grad": lambda: peers.array_gradient(xp, x, 1, inputs.gy),
        "multibit_grad": lambda: peers.array_gradient(xp, x, bits, inputs.gy),
    }.get(name)


def code_of(inputs: Inputs) -> tuple[Any, Any]:
    """Scales and signs of a code, in a view of the array."""
    cell = inputs.cell
    code = cubin.quantize(inputs.x, inputs.bits, check_finite=False, **cell.granularity)
    shape = [1 if n in inputs.axes else size for n, size in enumerate(inputs.view(inputs.x).shape)]
    signs = code.signs.reshape(cell.bits, *inputs.view(inputs.x).shape)
    return code.scales.reshape(cell.bits, *shape), signs


LARGEST_SEARCHED = 1 << 22
"""Elements of the largest array that a solver in PyTorch gets, but for a plain one of few bits: it
takes seconds, and 20 to 40 times the memory."""


def in_torch(inputs: Inputs, machine: Host | Device) -> tuple[Callable[..., Any], tuple] | None:
    """The cell in PyTorch: a function, and what it takes."""
    torch, cell, view, tensor = machine.torch, inputs.cell, inputs.view, machine.tensor
    name, base = cell.operation, Cell(cell.operation, cell.shape)
    if torch is None or cell.dtype == "bfloat16" or cell.uneven:
        return None
    x = tensor(inputs.x)
    bits = tensor(inputs.bits) if cell.map else cell.bits
    if name in ("multibit", "quantize"):
        function = peers.torch_greedy if name == "multibit" else peers.torch_encode
        own = view(bits) if cell.map else None
        return partial(function, torch), (view(x), cell.bits, own, inputs.axes)
    if name in ("refined", "alternating"):
        if cell.map or cell.importance or cell.dtype == "float16":
            return None
        if cell.size > LARGEST_SEARCHED and (replace(cell, bits=2) != base or cell.bits > 4):
            return None
        function = peers.torch_refined if name == "refined" else peers.torch_alternating

        def on_rows(x: Any, levels: int) -> Any:
            return inputs.unflat(function(torch, inputs.flat(x), levels))

        return on_rows, (x, cell.bits)
    if name == "dequantize":
        return partial(peers.torch_decode, torch), tuple(map(tensor, code_of(inputs)))
    if name in ("top_down", "middle_out"):
        return partial(peers.torch_ranked, torch), (x, mean_mix(cell.size), name == "middle_out")
    if name in ("sign", "ste_mask"):
        return partial(peers.torch_sign if name == "sign" else peers.torch_mask, torch), (x,)
    if "grad" in name:
        bound = 1 if name == "sign_grad" else bits
        return partial(peers.torch_gradient, torch), (x, bound, tensor(inputs.gy))
    return None


@dataclass
class Compiler:
    """torch.compile, with so many seconds for all that it compiles."""

    left: float = COMPILING

    def compiled(self, torch: Any, function: Callable[..., Any], arguments: tuple) -> Call | None:
        """A compiled call, or None once the seconds are used up."""
        if self.left <= 0:
            return None
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch._dynamo.reset()
                found = torch.compile(function, dynamic=False)
                found(*arguments)
        finally:
            self.left -= time.perf_counter() - start
        return lambda: found(*arguments)


COMPILABLE = (*grid.ELEMENTWISE, "multibit", "quantize", "dequantize")


def peers_of(
    inputs: Inputs, machine: Host | Device, compiler: Compiler
) -> Iterator[tuple[str, Callable[[], Call | None]]]:
    """The peers that apply, by column; each is made when it is its turn."""
    cell = inputs.cell
    yield EXPRESSION, lambda: expression(inputs, machine)
    found = in_torch(inputs, machine)
    if found is None:
        return
    function, arguments = found
    yield EAGER, lambda: partial(function, *arguments)
    if cell.operation in COMPILABLE:
        yield COMPILED, lambda: compiler.compiled(machine.torch, function, arguments)
    triton = machine.triton
    in_order = cell.layout not in ("axis 1", "Fortran order", "transposed view")
    plain = cell.operation == "multibit" and not cell.map and cell.dtype == "float32" and in_order
    if triton and plain and inputs.flat(inputs.x).shape[1] <= triton.LONGEST_ROW:
        x = machine.tensor(inputs.flat(inputs.x))
        yield TRITON, lambda: lambda: inputs.unflat(triton.greedy(machine.torch, x, cell.bits))


# ---------------------------------------------------------------- agreement

CLOSE = {"float16": 2e-2, "bfloat16": 1e-1, "float32": 2e-3, "float64": 1e-6}
"""How far an element may be off, relatively or absolutely, and also the share of elements that may
be farther: a magnitude next to a threshold falls on either side."""

FEW = 4
"""How many elements may, in an array however small."""


def parts(result: Any) -> list[np.ndarray]:
    """A result as arrays of the host, each flat."""
    if isinstance(result, cubin.BinaryCode):
        result = (result.scales, result.signs)
    members = result if isinstance(result, tuple) else (result,)
    return [on_host(member).reshape(-1) for member in members]


def on_host(array: Any) -> np.ndarray:
    """An array of any library as one of NumPy."""
    if hasattr(array, "detach"):
        return array.detach().cpu().numpy()
    return np.asarray(array.get() if hasattr(array, "get") else array)


def disagreement(cell: Cell, found: Any, expected: Any) -> str | None:
    """Why a peer's result is not cubin's; None where it is."""
    pairs = list(zip(parts(found), parts(expected), strict=True))
    if any(one.shape != other.shape for one, other in pairs):
        return "another shape"
    tolerance = CLOSE[cell.dtype]
    for one, other in pairs:
        # In blocks: the arrays of some cells fill much of the memory.
        step = 1 << 22
        apart = sum(
            np.count_nonzero(~np.isclose(
                one[start : start + step].astype(np.float64),
                other[start : start + step].astype(np.float64), tolerance, tolerance,
            ))
            for start in range(0, one.size, step)
        )  # fmt: skip
        if apart > max(FEW, tolerance * one.size):
            return f"{apart} of {one.size} elements differ"
    return None


# ---------------------------------------------------------------- measuring


@dataclass
class Timing:
    """The samples of a cell by column, in seconds, and what else is known of it."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: int | None = None
    result_bytes: int | None = None
    errors: list[str] = field(default_factory=list)

    def row(self, placed: Placed) -> dict[str, str]:
        """The row of the CSV."""
        cell = placed.cell
        row = dict.fromkeys(COLUMNS, "")
        row |= {"base": placed.base, "factor": placed.factor, "level": placed.level}
        row |= dict(zip(grid.KEY, cell.key, strict=True))
        row |= {"rows": str(cell.rows), "elements": str(cell.size), "error": "; ".join(self.errors)}
        medians = {name: float(np.median(taken)) for name, taken in self.samples.items()}
        row |= {name: f"{seconds:.4g}" for name, seconds in medians.items()}
        if CUBIN in medians:
            low, high = np.percentile(self.samples[CUBIN], [25, 75])
            row |= {"quartile_1": f"{low:.4g}", "quartile_3": f"{high:.4g}"}
            row["rounds"] = str(len(self.samples[CUBIN]))
            others = [name for name in PEERS if name in medians]
            if others:
                fastest = min(others, key=medians.__getitem__)
                row |= {"fastest_peer": fastest, "fastest": row[fastest]}
                row["over_peer"] = f"{medians[CUBIN] / medians[fastest]:.4g}"
            if COPY in medians:
                row["over_copy"] = f"{medians[CUBIN] / medians[COPY]:.4g}"
        for name in ("peak_bytes", "result_bytes"):
            value = getattr(self, name)
            row[name] = "" if value is None else str(value)
        return row


def measure(cell: Cell, machine: Host | Device, compiler: Compiler, rounds: int) -> Timing:
    """Time a cell beside its copy and its peers; those that fail are named in the result."""
    if cell.operation == "import":
        return import_time(rounds)
    timing = Timing()
    with tempfile.TemporaryDirectory() as folder:
        if cell.operation == "tape step":
            candidates = tape_step(cell, machine)
        else:
            inputs = Inputs(cell, machine)
            candidates = {CUBIN: cubin_call(inputs, Path(folder)), COPY: copy_call(cell, machine)}
            expected = candidates[CUBIN]()  # which also compiles its loops
            if cell.size >= MEMORY_FROM:
                timing.peak_bytes = machine.peak(candidates[CUBIN])
                timing.result_bytes = getattr(expected, "nbytes", 0)
            candidates |= agreeing(inputs, machine, compiler, expected, timing)
            del expected
        timing.samples = samples(candidates, machine, rounds)
        if cell.state == grid.NEW:
            timing.samples[CUBIN] = in_new_memory(candidates[CUBIN], machine, rounds)
    return timing


def agreeing(
    inputs: Inputs, machine: Host | Device, compiler: Compiler, expected: Any, timing: Timing
) -> dict[str, Call]:
    """The peers whose results are cubin's."""
    found = {}
    for name, make in peers_of(inputs, machine, compiler):
        try:
            call = make()
            if call is None:
                continue
            reason = disagreement(inputs.cell, call(), expected)
        except Exception as error:  # a peer that cannot do a cell is no reason to stop
            reason = one_line(error)
        if reason is None:
            found[name] = call
        else:
            timing.errors.append(f"{name}: {reason}")
    return found


def samples(
    candidates: Mapping[str, Call], machine: Host | Device, rounds: int
) -> dict[str, list[float]]:
    """The times of all candidates in rounds, each in another order."""
    first = {name: machine.time(call) for name, call in candidates.items()}
    repeats = {name: max(1, math.ceil(SAMPLE / taken)) for name, taken in first.items()}
    if first[CUBIN] > SLOWEST:
        return {name: [taken] for name, taken in first.items()}
    if first[CUBIN] > SLOW:
        rounds = min(rounds, ROUNDS_OF_SLOW)
    far = [n for n in candidates if first[n] > max(SLOW_PEER, FAR * first[CUBIN])]
    found = {name: [first[name]] if name in far else [] for name in candidates}
    names, order = [n for n in candidates if n not in far], np.random.default_rng(SEED)
    threaded = {EAGER, COMPILED} & set(names) and max(first.values()) > SAMPLE
    for _ in range(rounds):
        # In another order each time: what comes after PyTorch's threads is slower than the rest.
        for name in order.permutation(names):
            if threaded:
                time.sleep(PAUSE)
            end = time.perf_counter() + WARM
            while first[name] < SHORT:
                candidates[name]()
                if time.perf_counter() > end:
                    break
            found[name].append(machine.time(candidates[name], repeats[name]))
    return found


def in_new_memory(call: Call, machine: Host | Device, rounds: int) -> list[float]:
    """As the first call, and each whose results are held: no memory is there to be used again."""
    found = []
    for _ in range(rounds):
        memory.release()
        found.append(machine.time(call))
    return found


def one_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def tape_step(cell: Cell, machine: Host | Device) -> dict[str, Call]:
    """A step of train_mnist.py's CNN, with 2 bits for its weights, beside the same in PyTorch.

    Both start anew from the same parameters and train on as they are called.
    """
    xp, rng = machine.library, np.random.default_rng(SEED)
    images = rng.standard_normal(cell.shape, np.float32)
    labels = rng.integers(0, train_mnist.CLASSES, cell.shape[0])
    arm = next(a for a in train_mnist.ARMS if a.name == "2 bits")
    run = train_mnist.Run("CNN", arm, SEED)
    settings = train_mnist.Settings()
    state = {k: xp.asarray(v) for k, v in train_mnist.initial_state("CNN", SEED).items()}
    parameters = train_mnist.part(state, "parameter.")
    now = [parameters, train_mnist.part(state, "running."), {}]
    maps = {str(number): np.asarray(2) for number in train_mnist.hidden_layers("CNN")}
    beside = xp.asarray(images), xp.asarray(labels)

    def step() -> Any:
        *now[:], loss, _ = train_mnist.train_step(
            run, *now, maps, *beside, progress=0.0, rate=settings.rate
        )
        return loss

    calls: dict[str, Call] = {CUBIN: step}
    losses = [float(step()), float(step())]
    if machine.torch and isinstance(machine, Host):
        whole = train_mnist.part(train_mnist.initial_state("CNN", SEED), "parameter.")
        network = peers.TorchDigits(machine.torch, whole, 2, settings.rate)
        calls[EAGER] = partial(network.step, machine.tensor(images), machine.tensor(labels))
        others = [float(calls[EAGER]()), float(calls[EAGER]())]
        if not np.allclose(losses, others, rtol=1e-3):
            raise ValueError(f"the losses {losses} are not those of PyTorch, {others}")
    return calls


def import_time(rounds: int) -> Timing:
    """Seconds of a process that imports cubin, and beside it one that imports NumPy alone."""

    def started(module: str) -> float:
        start = time.perf_counter()
        root = Path(cubin.__file__).parents[1]
        command = [sys.executable, "-c", f"import {module}"]
        subprocess.run(command, check=True, cwd=root, env=environment)
        return time.perf_counter() - start

    found: dict[str, list[float]] = {CUBIN: [], EXPRESSION: []}
    with tempfile.TemporaryDirectory() as folder:
        # The first processes write bytecode, also where this one does not.
        bytecode = {"PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        environment = {**os.environ, **bytecode}
        for _ in range(rounds + 1):
            found[CUBIN].append(started("cubin"))
            found[EXPRESSION].append(started("numpy"))
    # The least of them: a process that starts is delayed by much and sped up by nothing.
    return Timing({name: [min(taken[1:])] for name, taken in found.items()})


def in_fresh_process(cell: Cell, rounds: int) -> Timing:
    """Measure a cell where nothing has run before, beside NumPy alone."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measured_alone, cell, rounds).result()


def _measured_alone(cell: Cell, rounds: int) -> Timing:
    return measure(cell, Host(with_torch=False), Compiler(0), rounds)


# ---------------------------------------------------------------- the command


def write(arguments: argparse.Namespace, rows: Sequence[Mapping[str, str]], library: str) -> Path:
    """Write the CSV, the heat map, the summary and where they come from."""
    path = arguments.output / NAME
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    heat_map.figure(rows).savefig(path.with_suffix(".png"), dpi=110)
    packages = ("matplotlib", "ml-dtypes", "numba", "torch", "triton")
    origin = provenance.record(vars(arguments), SEED, packages)
    origin |= {"library": library, "threads": threads(), "load_average": load()}
    path.with_suffix(".json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(headed(grid.summary(rows), origin), encoding="utf-8")
    return path


def headed(summary: str, origin: Mapping[str, Any]) -> str:
    """The summary below where it comes from."""
    machine, versions = origin["machine"], origin["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    where = f"{origin['threads']} threads, {machine['cores']} cores of an {machine['cpu']}"
    return f"# Benchmark\n\n{where}, {origin['date'][:10]}; {named}.\n\n{summary}"


def load() -> list[float] | None:
    """How busy the machine was in the last 1, 5 and 15 minutes."""
    with contextlib.suppress(AttributeError, OSError):
        return [round(load, 2) for load in os.getloadavg()]
    return None


def argument_parser() -> argparse.ArgumentParser:
    quick = "two base points and few neighbours, without torch.compile: under 2 minutes"
    parser = output_parser(NAME, __doc__, quick)
    parser.add_argument(
        "--operations", nargs="+", choices=grid.OPERATIONS, default=grid.OPERATIONS, metavar="NAME",
        help=f"what to time: {', '.join(grid.OPERATIONS)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=int,
        help=f"rounds of a cell (default: {ROUNDS}; quick: {QUICK_ROUNDS})",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=float, default=MINUTES,
        help="no cell begins after so long; the random ones come last (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="cpu: NumPy; cuda: CuPy; auto: cuda where there is a GPU (default: auto)",
    )  # fmt: skip
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Measure, print and write the results."""
    library = array_library(arguments.device)
    if arguments.rounds is None:
        arguments.rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    if arguments.rounds < 1:
        raise UsageError(f"--rounds {arguments.rounds}: at least 1 round is needed")
    arguments.output.mkdir(parents=True, exist_ok=True)
    machine = Host() if library is np else Device(library)
    compiler = Compiler(0 if arguments.quick else COMPILING)
    placed = [
        one
        for one in grid.cells(arguments.quick, arguments.operations)
        if library is np or one.cell.state != grid.FRESH
    ]
    rows: list[dict[str, str]] = []
    progress, end = (
        tqdm(placed, unit="cell", disable=None),
        time.monotonic() + 60 * arguments.minutes,
    )
    for one in progress:
        if time.monotonic() > end:
            break
        progress.set_postfix_str(one.cell.label[:60])
        alone = one.cell.state == grid.FRESH and one.cell.operation != "import"
        try:
            if alone:
                timing = in_fresh_process(one.cell, arguments.rounds)
            else:
                timing = measure(one.cell, machine, compiler, arguments.rounds)
        except Exception as error:  # one cell that fails is no reason to lose the others
            timing = Timing(errors=[one_line(error)])
        rows.append(timing.row(one))
        for error in timing.errors:
            tqdm.write(f"{one.cell.label}: {error}", file=sys.stderr)
        gc.collect()
    progress.close()
    if len(rows) < len(placed):
        print(f"{len(placed) - len(rows)} of {len(placed)} cells were left out: the time was up")
    arguments.left_out = len(placed) - len(rows)
    print(grid.summary(rows))
    path = write(arguments, rows, library.__name__)
    print(f"Written: {path}.csv, .png, .md and .json")


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
