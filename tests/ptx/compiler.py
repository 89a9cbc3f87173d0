"""CUDA C++ to PTX or machine code by NVRTC, through its documented C interface."""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

SOURCE_NAME = "kernel.cu"
"""How NVRTC's name of the source text ends, in messages and in line information."""

CACHE: list[Path] = []
"""A directory that keeps results between processes, if there is one."""


@functools.cache
def _scratch() -> str:
    directory = tempfile.TemporaryDirectory(prefix="cubin-nvrtc-")
    atexit.register(directory.cleanup)
    return directory.name


def _precompiled() -> tuple[str, ...]:
    """CuPy's headers take most of a compilation: NVRTC parses them once per architecture."""
    return (
        "--pch",
        f"--pch-dir={_scratch()}",
        "--pch-messages=false",
        "--diag-suppress=629",
    )


class CompileError(Exception):
    """NVRTC refused the source; the message is its log."""


@dataclass(frozen=True, eq=False)
class Compiled:
    """What NVRTC made of one source.

    Attributes
    ----------
    source : str
        The CUDA C++ text.
    arch : str
        ``compute_XX`` (then `image` is PTX text) or ``sm_XX`` (then it is a cubin).
    image : bytes
        The result.
    log : str
        The program log: warnings, and with ``--ptxas-options=-v`` the resources used.
    names : dict of str to str
        The mangled name of every name expression asked for.
    """

    source: str
    arch: str
    image: bytes
    log: str
    names: dict[str, str]

    @property
    def ptx(self) -> str:
        """The PTX text."""
        return self.image.rstrip(b"\0").decode()


@dataclass(frozen=True)
class Resources:
    """What ``ptxas`` says one kernel takes: registers, bytes spilled, static shared bytes."""

    registers: int
    spill_stores: int
    spill_loads: int
    shared: int


@functools.cache
def _library() -> ctypes.CDLL:
    from cuda.pathfinder import load_nvidia_dynamic_lib

    return ctypes.CDLL(load_nvidia_dynamic_lib("nvrtc").abs_path)


@functools.cache
def version() -> tuple[int, int]:
    """NVRTC's version, as (major, minor)."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return major.value, minor.value


@functools.cache
def include_directory() -> Path:
    """The CUDA runtime headers; those of another CUDA version are refused."""
    from cuda.pathfinder import find_nvidia_header_directory

    directory = Path(find_nvidia_header_directory("cudart"))
    found = re.search(
        r"#define CUDART_VERSION\s+(\d+)", (directory / "cuda_runtime_api.h").read_text()
    )
    if found is None or int(found[1]) // 1000 != version()[0]:
        raise CompileError(
            f"the CUDA headers in {directory} are not those of NVRTC {version()}: "
            "install nvidia-cuda-runtime-cu12"
        )
    return directory


def _check(status: int, call: str) -> None:
    if status:
        text = _library().nvrtcGetErrorString
        text.restype = ctypes.c_char_p
        raise CompileError(f"{call}: {text(status).decode()}")


def _text(program: ctypes.c_void_p, size_call: str, call: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(_library(), size_call)(program, ctypes.byref(size)), size_call)
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(_library(), call)(program, buffer), call)
    return buffer.raw


_COMPILED: dict[str, Compiled] = {}


def compile(
    source: str,
    arch: str = "compute_80",
    options: Sequence[str] = (),
    names: Sequence[str] = (),
) -> Compiled:
    """Compile CUDA C++ text, once per distinct (source, arch, options, names).

    Parameters
    ----------
    source : str
        CUDA C++.
    arch : str
        ``compute_XX`` for PTX, ``sm_XX`` for machine code.
    options : sequence of str
        NVRTC's options, without the architecture.
    names : sequence of str
        C++ name expressions (``"kernel<float>"``) whose mangled names are wanted.

    Raises
    ------
    CompileError
        With NVRTC's log.
    """
    flags = (f"--gpu-architecture={arch}", *options)
    text = "\0".join((*_versions(), source, *flags, "\1", *names))
    key = hashlib.sha256(text.encode()).hexdigest()
    if key not in _COMPILED:
        file = CACHE[0] / key if CACHE else None
        if file is not None and file.exists():
            _COMPILED[key] = Compiled(source, arch, **_load(file))
        else:
            _COMPILED[key] = _compile(source, arch, flags, names)
            if file is not None:
                _save(file, _COMPILED[key])
    return _COMPILED[key]


@functools.cache
def _versions() -> tuple[str, ...]:
    """What else a result depends on: the compiler and the headers."""
    installed: dict[str, str] = {}
    for one in metadata.distributions():  # the first of a name is what is imported
        installed.setdefault(one.metadata["Name"], one.version)
    return tuple(
        f"{name} {number}"
        for name, number in sorted(installed.items())
        if name.startswith(("cupy-cuda", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime"))
    )


def _load(file: Path) -> dict[str, Any]:
    log, names, image = file.read_bytes().split(b"\0", 2)
    return {"log": log.decode(), "names": json.loads(names), "image": image}


def _save(file: Path, compiled: Compiled) -> None:
    parts = (compiled.log.encode(), json.dumps(compiled.names).encode(), compiled.image)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_bytes(b"\0".join(parts))
    part.replace(file)


def _compile(source: str, arch: str, flags: Sequence[str], names: Sequence[str]) -> Compiled:
    library, program = _library(), ctypes.c_void_p()
    _check(
        library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), f"{arch}.{SOURCE_NAME}".encode(), 0, None, None
        ),
        "nvrtcCreateProgram",
    )
    try:
        for name in names:
            _check(library.nvrtcAddNameExpression(program, name.encode()), f"name {name!r}")
        encoded = [flag.encode() for flag in (*flags, *_precompiled())]
        status = library.nvrtcCompileProgram(
            program, len(encoded), (ctypes.c_char_p * len(encoded))(*encoded)
        )
        log = _text(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog").rstrip(b"\0").decode()
        if status:
            raise CompileError(log or f"nvrtcCompileProgram: status {status}")
        kind = "PTX" if arch.startswith("compute") else "CUBIN"
        image = _text(program, f"nvrtcGet{kind}Size", f"nvrtcGet{kind}")
        lowered = {}
        for name in names:
            mangled = ctypes.c_char_p()
            _check(
                library.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(mangled)),
                f"name {name!r}",
            )
            lowered[name] = (mangled.value or b"").decode()
        return Compiled(source, arch, image, log, lowered)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


_RESOURCES = re.compile(
    r"Compiling entry function '(?P<name>[^']+)'"
    r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def resources(source: str, arch: str, options: Sequence[str] = ()) -> dict[str, Resources]:
    """What every kernel of `source` takes on ``sm_XX``, by mangled name, as ``ptxas`` says."""
    log = compile(source, arch, (*options, "--ptxas-options=-v")).log
    found = {}
    for match in _RESOURCES.finditer(log):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        found[match["name"]] = Resources(
            int(match["registers"]),
            int(match["stores"]),
            int(match["loads"]),
            int(shared[1]) if shared else 0,
        )
    return found
