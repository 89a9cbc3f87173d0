"""A large checkpoint: time and memory of `python -m cubin error` on generated bfloat16 shards.

The shards are written to a folder, measured in one process on all cores, in one on a single thread,
and on worker processes, and removed. What it is compared with: reading the same bytes, and one pass
of the greedy kernel over as many weights. The script prints a table and writes
checkpoint_scale.json to the output folder. Whatever the disk keeps in memory is read from there:
make the checkpoint larger than the memory to leave that out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import provenance
from command_line import exit_status, output_parser

import cubin
from cubin.commands.arguments import UsageError, make_folder
from cubin.weights import Weights

NAME = "checkpoint_scale"
SEED = 0
SHAPES = {"mlp.up": (11008, 4096), "mlp.down": (4096, 11008), "attention": (4096, 4096)}
"""The weights of a layer; each layer is a shard, and has a norm beside them."""

QUICK_SHAPES = {"mlp.up": (172, 64), "mlp.down": (64, 172), "attention": (64, 64)}


def argument_parser() -> argparse.ArgumentParser:
    parser = output_parser(NAME, __doc__, "three shards of small matrices")
    parser.add_argument(
        "--gigabytes", type=float, default=20, metavar="N", help="of the checkpoint (default: 20)"
    )
    parser.add_argument("--bits", default="1", help="as `error` takes them (default: 1)")
    parser.add_argument(
        "--workers", type=int, default=2, metavar="N", help="processes of the second run"
    )
    parser.add_argument(
        "--folder", type=Path, metavar="FOLDER", help="where the shards are (default: temporary)"
    )
    return parser


def write_shards(folder: Path, shapes: dict[str, tuple[int, ...]], count: int) -> int:
    """Write shards of Gaussian bfloat16 weights.

    Returns
    -------
    int
        Their bytes.
    """
    rng = np.random.default_rng(SEED)
    block = rng.standard_normal(1 << 22, np.float32).astype(ml_dtypes.bfloat16)
    written = 0
    for number in range(count):
        path = folder / f"model-{number + 1:05}-of-{count:05}.safetensors"
        tensors = {f"layers.{number}.{name}": shape for name, shape in shapes.items()}
        tensors[f"layers.{number}.norm"] = (shapes["attention"][0],)
        header, at = {}, 0
        for name, shape in tensors.items():
            end = at + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # numbers are aligned, as the package safetensors has them
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for shape in tensors.values():
                left = math.prod(shape)
                while left:  # no two pieces begin alike, and none has to be drawn anew
                    start = int(rng.integers(block.size))
                    piece = block[start : start + left]
                    file.write(piece.view(np.uint16))
                    left -= piece.size
            written += file.tell()
    return written


def seconds_to_read(folder: Path) -> float:
    """Read all bytes of a folder."""
    buffer = bytearray(1 << 24)
    begun = time.perf_counter()
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - begun


def seconds_of_a_pass(weights: int) -> float:
    """One pass of the greedy kernel, 1 bit with scales per row, over as many weights."""
    x = np.random.default_rng(SEED).standard_normal((4096, 4096), np.float32)
    y = np.empty_like(x)
    cubin.multibit(x, 1, channel_axis=0, out=y)  # what the first call compiles is not counted
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        cubin.multibit(x, 1, channel_axis=0, out=y)
        times.append(time.perf_counter() - begun)
    return float(np.median(times)) * weights / x.size


def run_of(
    folder: Path, output: Path, bits: str, *options: str, threads: int | None = None
) -> dict[str, float]:
    """Run the command, on so many threads if it is said.

    Returns
    -------
    dict
        Its seconds, and the peak memory of its largest process, in bytes.
    """
    command = [sys.executable, "-m", "cubin", "error", str(folder), "--bits", bits]
    root = Path(cubin.__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    share = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    begun = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--output", str(output), *options],
        env=os.environ | {"PYTHONPATH": path} | share,
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UsageError(f"the command ended with status {process.returncode}")
    return {"seconds": seconds, "peak_bytes": usage.ru_maxrss * 1024}


def run(arguments: argparse.Namespace) -> int:
    """Write, measure and remove the checkpoint; return the exit status."""
    shapes = QUICK_SHAPES if arguments.quick else SHAPES
    shard = 2 * sum(math.prod(shape) for shape in shapes.values())
    count = 3 if arguments.quick else max(1, round(arguments.gigabytes * 1e9 / shard))
    make_folder(arguments.output)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        nbytes = write_shards(folder, shapes, count)
        weights = sum(tensor.size for tensor in Weights(folder).tensors)
        found: dict[str, Any] = {
            "bytes": nbytes,
            "weights": weights,
            "read_seconds": seconds_to_read(folder),
            "pass_seconds": seconds_of_a_pass(weights),
            "one process": run_of(folder, Path(temporary) / "one", arguments.bits),
            "one thread": run_of(folder, Path(temporary) / "thread", arguments.bits, threads=1),
        }
        workers = f"{arguments.workers} processes"
        found[workers] = run_of(
            folder, Path(temporary) / "two", arguments.bits, "--workers", str(arguments.workers)
        )
        results = {
            (Path(temporary) / name / "error_per_bit_width.csv").read_bytes()
            for name in ("one", "thread", "two")
        }
        found["same bits"] = len(results) == 1
    least = found["read_seconds"] + found["pass_seconds"]
    print(f"{nbytes / 1e9:.2f} GB, {weights:,} weights; reading and one pass: {least:.1f} s")
    for name in ("one process", "one thread", workers):
        seconds, peak = found[name]["seconds"], found[name]["peak_bytes"]
        print(f"{name}: {seconds:.1f} s, {peak / 2**30:.2f} GiB in its largest process")
    origin = provenance.record(vars(arguments), SEED, ("numba", "ml_dtypes")) | found
    path = arguments.output / f"{NAME}.json"
    path.write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    print(f"Written: {path}")
    return 0 if found["same bits"] else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status: 1 if the results differ, 2 for an error."""
    return exit_status(NAME, run, argument_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
