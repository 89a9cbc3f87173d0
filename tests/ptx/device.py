"""The stand-in for the parts of CuPy that cubin uses; its kernels run in the interpreter."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import cupy
import numpy as np

from tests.ptx import array, compiler, cupy_internals, launch
from tests.ptx.array import ndarray
from tests.ptx.assembler import assemble
from tests.ptx.machine import Geometry, Kernel

ARCHITECTURES = ("compute_80", "compute_100")
"""What kernels are compiled for; the first one unless `architecture` says otherwise."""

SOURCES: dict[str, set[str]] = {}
"""Every source text that ran, by kernel name without template arguments."""

_current = [ARCHITECTURES[0]]

# ---------------------------------------------------------------- running


@contextlib.contextmanager
def architecture(name: str) -> Iterator[None]:
    """Compile for `name`, such as ``compute_100``, within this context."""
    _current.append(name)
    try:
        yield
    finally:
        _current.pop()


def _compile(source: str, options: tuple[str, ...], names: tuple[str, ...]) -> dict[str, str]:
    return _compiled(source, options, names).names


def _compiled(
    source: str, options: tuple[str, ...], names: tuple[str, ...] = ()
) -> compiler.Compiled:
    flags = (*options, "--generate-line-info")
    return compiler.compile(source, _current[-1], flags, names)


def _run(
    source: str,
    options: tuple[str, ...],
    name: str,
    grid: Sequence[int],
    block: Sequence[int],
    shared: int,
    arguments: list[Any],
    *,
    names: tuple[str, ...] = (),
    title: str = "",
) -> launch.Launch:
    title = title or name
    kernel = assemble(_compiled(source, options, names), name, title)
    geometry = Geometry(_three(grid), _three(block), shared)
    parameters, extents = _parameters(kernel, arguments)
    SOURCES.setdefault(title.partition("<")[0], set()).add(source)
    return launch.run(kernel, geometry, parameters, extents)


def _three(sizes: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*(max(1, int(size)) for size in sizes), 1, 1)[:3]
    return x, y, z


def _parameters(kernel: Kernel, arguments: Sequence[Any]) -> tuple[np.ndarray, list[Any]]:
    wanted = kernel.function.params
    if len(arguments) != len(wanted):
        raise TypeError(f"{kernel.title}: got {len(arguments)} arguments, wants {len(wanted)}")
    block = np.zeros(kernel.parameter_bytes, np.uint8)
    extents = []
    for value, parameter in zip(arguments, wanted, strict=True):
        start, size = kernel.parameters[parameter.name]
        data, extent = cupy_internals.pack(kernel.title, value, parameter.type, size)
        block[start : start + size] = np.frombuffer(data, np.uint8)
        if extent is not None:
            extents.append(extent)
    return block, extents


# ---------------------------------------------------------------- kernels


class ElementwiseKernel:
    """CuPy's class of this name, its kernel run by the interpreter."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.kernel = cupy.ElementwiseKernel(*arguments, **options)
        self.name = self.kernel.name

    def __call__(
        self,
        *arguments: Any,
        size: int | None = None,
        block_size: int = 128,
        stream: Any = None,
    ) -> Any:
        return cupy_internals.call_elementwise(
            self.kernel, arguments, _compile, _run, size, block_size
        )

    @property
    def cached_codes(self) -> dict[Any, str]:
        """The sources so far, by input types."""
        return dict(self.kernel._cached_codes)


class ReductionKernel:
    """CuPy's class of this name, its kernel run by the interpreter."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.kernel = cupy.ReductionKernel(*arguments, **options)
        self.name = self.kernel.name

    def __call__(
        self,
        *arguments: Any,
        axis: Any = None,
        keepdims: bool = False,
        out: Any = None,
        stream: Any = None,
    ) -> Any:
        return cupy_internals.call_reduction(
            self.kernel, arguments, _compile, _run, axis, keepdims, out
        )

    @property
    def cached_codes(self) -> dict[Any, str]:
        """The sources so far, by input types."""
        return dict(self.kernel._cached_codes)


class RawKernel:
    """CuPy's class of this name, its kernel run by the interpreter."""

    def __init__(
        self,
        code: str,
        name: str,
        options: tuple[str, ...] = (),
        backend: str = "nvrtc",
        *,
        _names: tuple[str, ...] | None = None,
    ) -> None:
        self.code, self.name, self.options, self._names = code, name, options, _names
        self.max_dynamic_shared_size_bytes = launch.MOST_SHARED

    def __call__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        *,
        shared_mem: int = 0,
        stream: Any = None,
    ) -> None:
        module = cupy_internals.raw_module(self.code, self.options, self._names, _compile, _run)
        name = (module.mapping or {}).get(self.name, self.name)
        _run(
            module.source,
            module.options,
            name,
            grid,
            block,
            shared_mem,
            list(args),
            names=self._names or (),
            title=self.name,
        )


class RawModule:
    """CuPy's class of this name, its kernels run by the interpreter."""

    def __init__(
        self,
        *,
        code: str,
        options: tuple[str, ...] = (),
        backend: str = "nvrtc",
        name_expressions: Sequence[str] | None = None,
    ) -> None:
        self.code, self.options = code, options
        self.names = None if name_expressions is None else tuple(name_expressions)

    def get_function(self, name: str) -> RawKernel:
        """The kernel `name`, a name expression for a template."""
        return RawKernel(self.code, name, self.options, _names=self.names)

    def compile(self, log_stream: Any = None) -> None:
        """Compile now."""
        cupy_internals.raw_module(self.code, self.options, self.names, _compile, _run)


# ---------------------------------------------------------------- the module


class _Stream:
    """A stream on which everything has happened already."""

    ptr = 0
    null: _Stream

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def use(self) -> _Stream:
        """Itself."""
        return self

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        return None


_Stream.null = _Stream()


@functools.cache
def _numpys(name: str) -> Any:
    """What `cupy` and `numpy` both have by this name; a function for device arrays."""
    function = getattr(np, name, None)
    if function is None or not hasattr(cupy, name):
        raise AttributeError(f"the stand-in for CuPy has no {name!r}")
    if not callable(function) or isinstance(function, type):
        return function

    def call(*arguments: Any, **options: Any) -> Any:
        if any(isinstance(a, np.ndarray) and a.ndim for a in arguments):
            raise TypeError(f"Unsupported type {np.ndarray}: cupy.{name} takes device arrays")
        return array.through_numpy(function, arguments, options)

    return call


class Module:
    """What stands where ``cupy`` would: its functions on device arrays, computed by NumPy."""

    __name__ = "cupy"
    __version__ = cupy.__version__

    ndarray = ndarray
    ElementwiseKernel = ElementwiseKernel
    ReductionKernel = ReductionKernel
    RawKernel = RawKernel
    RawModule = RawModule
    linalg = SimpleNamespace(
        cholesky=lambda a: array.through_numpy(np.linalg.cholesky, (a,), {}),
        inv=lambda a: array.through_numpy(np.linalg.inv, (a,), {}),
    )
    cuda = SimpleNamespace(
        Device=array.Device,
        Stream=_Stream,
        get_current_stream=lambda: _Stream.null,
        is_available=lambda: True,
        runtime=SimpleNamespace(getDeviceCount=lambda: 2, getDevice=lambda: array.Device().id),
    )

    def asarray(self, values: Any, dtype: Any = None, order: Any = None) -> ndarray:
        """`values` on the device: itself where it is there already and of the right type."""
        if isinstance(values, ndarray):
            if values.device != array.Device():
                values = values.copy()
            return values if dtype is None else values.astype(dtype, copy=False)
        return array.upload(np.asarray(values, dtype))

    def array(self, values: Any, dtype: Any = None) -> ndarray:
        """A copy of `values` on the device."""
        return self.asarray(values, dtype).copy()

    def ascontiguousarray(self, values: ndarray) -> ndarray:
        """`values`, or a copy in C order."""
        return values if values.flags.c_contiguous else values.copy()

    def asnumpy(self, values: Any) -> np.ndarray:
        """A NumPy copy."""
        return values.get() if isinstance(values, ndarray) else np.asarray(values)

    def empty(self, shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
        """Memory that nothing wrote: every byte is 0xFB, and kernels may not read it."""
        return array.allocate(shape, dtype, order)

    def empty_like(self, like: ndarray, dtype: Any = None, shape: Any = None) -> ndarray:
        """`empty` of another array's shape, type and memory order."""
        return array.allocate_like(like, dtype, shape)

    def full(self, shape: Any, value: Any, dtype: Any = None) -> ndarray:
        """An array of one value."""
        return array.upload(np.full(shape, value, dtype))

    def zeros(self, shape: Any, dtype: Any = float) -> ndarray:
        """Zeros."""
        return array.upload(np.zeros(shape, dtype))

    def ones(self, shape: Any, dtype: Any = float) -> ndarray:
        """Ones."""
        return array.upload(np.ones(shape, dtype))

    def arange(self, *arguments: Any, **options: Any) -> ndarray:
        """A range."""
        return array.upload(np.arange(*arguments, **options))

    def __getattr__(self, name: str) -> Any:
        return _numpys(name)

    def __repr__(self) -> str:
        return "<stand-in for cupy, executing PTX>"


module = Module()
"""The stand-in; there is one."""
