"""The parts of CuPy that are private: its code generators and its packing of arguments.

What runs is the source that CuPy itself generates for the arguments it is given. Nothing else in
the tests may touch CuPy's private names; they belong to the minor version that the test extra pins.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import cupy
import cupy.cuda.compiler
import cupy.cuda.function
import numpy as np
from cupy._core import _carray, _kernel, _reduction, _scalar, raw

from tests.ptx import array
from tests.ptx.memory import Allocation

Compile = Callable[[str, tuple[str, ...], tuple[str, ...]], dict[str, str]]
"""Compiles (source, options, name expressions) to the mangled names."""

Run = Callable[[str, tuple[str, ...], str, tuple[int, ...], tuple[int, ...], int, list[Any]], None]
"""Runs (source, options, kernel's name, grid, block, dynamic shared bytes, arguments)."""

# CuPy appends these to the options of every kernel it compiles.
_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")
_NDARRAY, _INDEXER, _SCALAR = 1, 2, 3


class _Function(cupy.cuda.function.Function):
    """A kernel that runs elsewhere than on a device."""

    def __init__(self, module: _Module, name: str) -> None:
        self.kernel = name
        self.owner = module

    def linear_launch(
        self,
        size: int,
        args: Sequence[Any],
        shared_mem: int = 0,
        block_max_size: int = 128,
        stream: Any = None,
        enable_cooperative_groups: bool = False,
    ) -> None:
        grid = min(0x7FFFFFFF, -(-size // block_max_size))
        self(((grid), 1, 1), (min(block_max_size, size), 1, 1), args, shared_mem)

    def __call__(
        self, grid: Any, block: Any, args: Sequence[Any], shared_mem: int = 0, **_: Any
    ) -> None:
        self.owner.run(
            self.owner.source, self.owner.options, self.kernel, grid, block, shared_mem, list(args)
        )


class _Module(cupy.cuda.function.Module):
    """A compiled source, as CuPy's callers see it."""

    def __init__(self, source: str, options: tuple[str, ...], run: Run) -> None:
        self.source = source
        self.options = options
        self.run = run

    def get_function(self, name: str) -> _Function:
        return _Function(self, name)


@contextlib.contextmanager
def _generated(compile: Compile, run: Run) -> Iterator[None]:
    """CuPy's generators run, and hand their source to `compile` instead of to a device."""

    def take(source: str, options: tuple[str, ...] = (), **rest: Any) -> _Module:
        if rest.get("enable_cooperative_groups"):
            raise NotImplementedError("cooperative launches")
        module = _Module(source, (*options, *_OPTIONS), run)
        names = tuple(rest.get("name_expressions") or ())
        module._set_mapping(compile(source, module.options, names))
        return module

    undecorated = (
        (_kernel, "_get_elementwise_kernel"),
        (_reduction, "_ReductionKernel_get_cached_function"),
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            mock.patch.object(cupy.cuda.compiler, "_compile_module_with_cache", take)
        )
        for module, name in undecorated:  # their cache asks the driver for the device
            plain = getattr(module, name).__wrapped__
            stack.enter_context(mock.patch.object(module, name, plain))
        yield


def _real(value: Any) -> Any:
    """An argument as CuPy's own type: an array at its made-up address, or a scalar."""
    if not isinstance(value, array.ndarray):
        return _scalar.CScalar(value)
    value._here()
    memory = cupy.cuda.UnownedMemory(
        value._allocation.address, value._allocation.size, value._allocation, 0
    )
    offset = value.data.ptr - value._allocation.address
    pointer = cupy.cuda.MemoryPointer(memory, offset)
    return cupy.ndarray(value.shape, value.dtype, memptr=pointer, strides=value.strides)


def _broadcast(
    arguments: Sequence[Any], parameters: Sequence[Any], size: int | None
) -> tuple[list[Any], tuple[int, ...]]:
    plain = [
        isinstance(a, array.ndarray) and not p.raw
        for a, p in zip(arguments, parameters, strict=False)
    ]
    if size is not None:
        if any(plain):
            raise ValueError("Specified 'size' can be used only if all of the ndarray are 'raw'.")
        return list(arguments), (size,)
    if not any(plain):
        raise ValueError("Loop size is undecided.")
    shape = np.broadcast_shapes(*(a.shape for a, yes in zip(arguments, plain, strict=True) if yes))
    spread = [
        array.ndarray(np.broadcast_to(a._host, shape), a._allocation) if yes else a
        for a, yes in zip(arguments, plain, strict=True)
    ]
    return spread, shape


def _outputs(
    given: Sequence[Any], parameters: Sequence[Any], types: Sequence[Any], shape: tuple[int, ...],
    sized: bool,
) -> list[array.ndarray]:  # fmt: skip
    """The output arrays, allocated where none are given."""
    if not given:
        if any(p.raw for p in parameters) and not sized:
            raise ValueError("Output array size is Undecided")
        return [array.allocate(shape, kind) for kind in types]
    for parameter, out in zip(parameters, given, strict=True):
        if not isinstance(out, array.ndarray):
            raise TypeError("Output arguments type must be cupy.ndarray")
        if not parameter.raw and out.shape != tuple(shape):
            raise ValueError("Out shape is mismatched")
    return list(given)


def _collapse(
    arguments: list[Any], parameters: Sequence[Any], shape: tuple[int, ...]
) -> tuple[list[Any], tuple[int, ...]]:
    """Join neighbouring axes that every array steps through alike, as CuPy does before a launch."""
    plain = [
        isinstance(a, array.ndarray) and not p.raw
        for a, p in zip(arguments, parameters, strict=False)
    ]
    arrays = [a._host for a, yes in zip(arguments, plain, strict=True) if yes]
    if len(shape) <= 1 or not arrays:
        return arguments, shape
    if all(a.flags.c_contiguous for a in arrays):
        axes, new = None, (int(np.prod(shape)),)
    elif len(shape) == 2:
        return arguments, shape
    else:
        loose = [a for a in arrays if not a.flags.c_contiguous]
        lengths, axes, last = list(shape), [], -1
        for axis, length in enumerate(shape):
            if length == 1:
                continue
            if last >= 0:
                if all(a.strides[axis] * length == a.strides[last] for a in loose):
                    lengths[axis] *= lengths[last]
                else:
                    axes.append(last)
            last = axis
        axes += [last] if last >= 0 else []
        if len(axes) == len(shape):
            return arguments, shape
        new = tuple(lengths[axis] for axis in axes)

    def join(a: array.ndarray) -> array.ndarray:
        strides = (a.itemsize,) if axes is None else tuple(a.strides[axis] for axis in axes)
        host = np.lib.stride_tricks.as_strided(a._host, new, strides)
        return array.ndarray(host, a._allocation)

    return [join(a) if yes else a for a, yes in zip(arguments, plain, strict=True)], new


class _Indexer:
    """The loop of an elementwise kernel, as its last argument."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.size = int(np.prod(shape, dtype=np.int64))


def _describe(value: Any) -> Any:
    if isinstance(value, _Indexer):
        small = value.size <= 1 << 31
        return _kernel._ArgInfo(_INDEXER, _carray.Indexer, None, len(value.shape), True, small)
    if isinstance(value, _scalar.CScalar):
        return _kernel._ArgInfo(_SCALAR, _scalar.CScalar, value.dtype, 0, True, True)
    small = value.size * value.itemsize <= 1 << 31
    return _kernel._ArgInfo(
        _NDARRAY, cupy.ndarray, value.dtype, value.ndim, value.flags.c_contiguous, small
    )


def call_elementwise(
    kernel: cupy.ElementwiseKernel,
    arguments: Sequence[Any],
    compile: Compile,
    run: Run,
    size: int | None = None,
    block_size: int = 128,
) -> Any:
    """``ElementwiseKernel.__call__``, up to the launch."""
    if len(arguments) not in (kernel.nin, kernel.nargs):
        raise TypeError(
            f"Wrong number of arguments for {kernel.name!r}. It must be either {kernel.nin} or "
            f"{kernel.nargs} (with outputs), but given {len(arguments)}."
        )
    given = list(arguments[kernel.nin :])
    for value in arguments:
        _real(value)  # a NumPy array raises here, as in CuPy
    spread, shape = _broadcast(arguments, kernel.params, size)
    inputs = spread[: kernel.nin]
    in_types, out_types, type_map = kernel._decide_params_type(
        tuple(a.dtype if isinstance(a, array.ndarray) else None for a in inputs),
        tuple(a.dtype for a in given),
    )
    outputs = _outputs(given, kernel.out_params, out_types, shape, size is not None)
    result: Any = tuple(outputs)
    if kernel.no_return:
        result = None
    elif not kernel.return_tuple and kernel.nout == 1:
        result = outputs[0]
    if 0 in shape:
        return result
    both = [*inputs, *outputs]
    if kernel.reduce_dims:
        both, shape = _collapse(both, kernel.params, shape)
    real = [_real(value) for value in both]
    for value, kind in zip(real, in_types, strict=False):
        if isinstance(value, _scalar.CScalar):
            value.apply_dtype(kind)
    indexer = _Indexer(shape)
    with _generated(compile, run):
        described = tuple(_describe(value) for value in (*real, indexer))
        function = kernel._get_elementwise_kernel(0, described, type_map)
        function.linear_launch(indexer.size, [*real, indexer], 0, block_size)
    return result


def call_reduction(
    kernel: cupy.ReductionKernel,
    arguments: Sequence[Any],
    compile: Compile,
    run: Run,
    axis: Any = None,
    keepdims: bool = False,
    out: Any = None,
) -> Any:
    """``ReductionKernel.__call__``, up to the launch."""
    if len(arguments) not in (kernel.nin, kernel.nargs):
        raise TypeError(f"Wrong number of arguments for {kernel.name}")
    given = list(arguments[kernel.nin :])
    if out is not None:
        if kernel.nout != 1:
            raise NotImplementedError("out, which CuPy takes for one output alone")
        if given:
            raise ValueError("cannot specify 'out' as both a positional and keyword argument")
        given = [out]
    for value in arguments:
        _real(value)
    inputs, shape = _broadcast(arguments[: kernel.nin], kernel.in_params, None)
    _, out_types, _ = _reduction._decide_params_type(
        kernel.in_params,
        kernel.out_params,
        tuple(a.dtype.type if isinstance(a, array.ndarray) else None for a in inputs),
        tuple(a.dtype.type if isinstance(a, array.ndarray) else None for a in given),
    )
    reduced, kept = _reduction._get_axis(axis, len(shape))
    out_shape = tuple(_reduction._get_out_shape(shape, reduced, kept, keepdims))
    outputs = _outputs(given, kernel.out_params, out_types, out_shape, False)
    with _generated(compile, run):
        kernel._call(
            [_real(a) for a in inputs], [_real(a) for a in outputs],
            shape, axis, None, keepdims, kernel.reduce_dims, 0, None, False, True,
        )  # fmt: skip
    return outputs[0]


def raw_module(
    code: str, options: tuple[str, ...], names: tuple[str, ...] | None, compile: Compile, run: Run
) -> Any:
    """The module that RawKernel and RawModule compile their code to."""
    with _generated(compile, run):
        return raw._get_raw_module.__wrapped__(
            code, None, options, "nvrtc", False, False, None, names, None
        )


def pack(
    kernel: str, value: Any, kind: str, size: int
) -> tuple[bytes, tuple[Allocation, int, int, int] | None]:
    """An argument's bytes in the parameter block, and the memory it gives the kernel.

    Parameters
    ----------
    kernel : str
        For messages.
    value : object
        What the caller passed, or what CuPy made of it.
    kind, size : str, int
        The parameter's PTX type and bytes.

    Raises
    ------
    TypeError
        Where CuPy would pass other bytes than the parameter takes, and where it raises itself.
    """
    if isinstance(value, array.ndarray):
        value = _real(value)
    if isinstance(value, cupy.ndarray) and size == 8:
        return value.data.ptr.to_bytes(8, "little"), _extent(value)
    if isinstance(value, cupy.ndarray):
        words = (value.data.ptr, value.size, *value.shape, *value.strides)
        data = np.array(words, np.int64).tobytes()
        return _exact(kernel, data, size), _extent(value)
    if isinstance(value, _Indexer | _carray.Indexer):
        words = (value.size, *value.shape)
        data = np.array(words, np.int64).tobytes() + b"\xfb" * (8 * len(tuple(value.shape)))
        return _exact(kernel, data, size), None
    if isinstance(value, np.ndarray):
        raise TypeError(
            f"{kernel}: got a numpy.ndarray of shape {value.shape}, want a device array"
        )
    python_int = type(value) is int
    scalar = value if isinstance(value, _scalar.CScalar) else _scalar.CScalar(value)
    data = ctypes.string_at(scalar.ptr, scalar.dtype.itemsize)
    floating = scalar.dtype.kind == "f"
    if kind[0] in "fsu" and size > 2 and floating != (kind[0] == "f"):
        raise TypeError(f"{kernel}: got {scalar.dtype} for a parameter of type {kind}")
    if python_int and size < 8:
        if not -(1 << (8 * size - 1)) <= value < 1 << (8 * size):
            raise TypeError(f"{kernel}: {value} does not fit a parameter of {size} bytes")
        return data[:size], None
    if len(data) != size:
        raise TypeError(
            f"{kernel}: got {scalar.dtype} ({len(data)} bytes) for a parameter of {size} bytes: "
            "pass a NumPy scalar of its type"
        )
    return data, None


def _exact(kernel: str, data: bytes, size: int) -> bytes:
    # An empty C++ member takes space, so a 0-d indexer is one word in both.
    if len(data) != size:
        raise TypeError(f"{kernel}: {len(data)} bytes for a parameter of {size}")
    return data


def _extent(value: cupy.ndarray) -> tuple[Allocation, int, int, int]:
    reach = [step * (n - 1) for step, n in zip(value.strides, value.shape, strict=True)]
    low = value.data.ptr + sum(r for r in reach if r < 0)
    high = value.data.ptr + sum(r for r in reach if r > 0) + value.itemsize
    if not value.size:
        high = low
    return value.data.mem._owner, low, high, value.itemsize
