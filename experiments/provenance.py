"""Where a result comes from: versions, machine, revision, arguments, seed, date.

Nothing in it identifies a person or a host: no host or user names, no absolute paths.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cubin

CUPY_WHEELS = ("cupy-cuda12x", "cupy-cuda13x", "cupy")
VECTORS = {"avx512f": "(AVX-512)", "avx2": "(AVX2)"}


def record(
    arguments: Mapping[str, Any], seed: int | None = None, packages: Iterable[str] = ()
) -> dict[str, Any]:
    """Describe a run, as values that JSON can hold.

    Parameters
    ----------
    arguments : mapping
        The run's arguments by name. Paths are recorded by their last part alone.
    seed : int, optional
        The seed of its random numbers.
    packages : iterable of str
        Distributions to record besides Python, NumPy, SciPy, CuPy and cubin.

    Returns
    -------
    dict
        Keys date (UTC, ISO 8601), arguments, seed, versions, machine and revision (None outside
        a git checkout) as the run found it: results that it writes do not count as changes.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": {name: without_folders(value) for name, value in arguments.items()},
        "seed": seed,
        "versions": versions(packages),
        "machine": machine(),
        "revision": STARTED_FROM,
    }


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Give the versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version(), "cubin": cubin.__version__}
    for package in ("numpy", "scipy", *CUPY_WHEELS, *packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Describe the processor, memory in GiB, GPU (None without one) and operating system."""
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "memory_gib": memory_gib(),
        "gpu": gpu(),
        "os": platform.platform(),
    }


def processor() -> str:
    """Name the CPU model and its vectors, or the architecture where the system does not tell it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    parts = (line.partition(":") for line in lines)
    facts = {name.strip(): value.strip() for name, _, value in parts}
    model = re.sub(r"\((R|TM)\)| Processor$", "", facts.get("model name", ""))
    flags = facts.get("flags", "").split()
    vectors = next((word for flag, word in VECTORS.items() if flag in flags), "")
    return f"{model} {vectors}".strip() or platform.processor() or platform.machine()


def memory_gib() -> float | None:
    """Give the physical memory in GiB; None where the system does not tell it (Windows)."""
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def gpu() -> str | None:
    """Name the current CUDA device; None without CuPy or without a GPU."""
    try:
        import cupy

        device = cupy.cuda.runtime.getDevice()
        return cupy.cuda.runtime.getDeviceProperties(device)["name"].decode()
    except Exception:  # CuPy raises one type per missing part of CUDA; none of them matters here
        return None


def revision(folder: Path) -> dict[str, Any] | None:
    """Give the commit of the checkout around a folder, and whether tracked files differ from it."""
    try:
        commit = git(folder, "rev-parse", "HEAD")
        changes = git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "dirty": bool(changes)}


def git(folder: Path, *command: str) -> str:
    return subprocess.run(
        ["git", *command], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def without_folders(value: Any) -> Any:
    """Reduce the paths in an argument to their last part."""
    if isinstance(value, Path) or (isinstance(value, str) and Path(value).is_absolute()):
        return Path(value).name
    if isinstance(value, list | tuple | range):
        return [without_folders(item) for item in value]
    return value


STARTED_FROM = revision(Path(__file__).parent)
