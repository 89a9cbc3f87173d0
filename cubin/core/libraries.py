"""Which library owns an array, and the operations that depend on it.

All work is done on NumPy and CuPy arrays. A PyTorch tensor, a JAX array or any other object with
``__dlpack__`` is viewed as one of these where it comes in, without a copy. `border` makes a public
function do so, and gives the result back in the library that the arguments are from.

None of these libraries is imported here for its own sake: an array can only be a library's where
somebody has imported it already. CuPy alone is imported where an array of another library lies on
a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import numpy as np

from cubin.core import floats, memory

Array = Any
"""A NumPy or CuPy array: the two share no base class. At the border, any library's."""

P = ParamSpec("P")
R = TypeVar("R")


def cupy() -> Any:
    """The CuPy module if the process has imported it, else None."""
    return sys.modules.get("cupy")


def on_device(value: object) -> bool:
    """Whether `value` is a CuPy array."""
    if type(value) is np.ndarray:
        return False
    module = cupy()
    # CuPy has no ndarray yet while it is being imported, or where its import failed half-way.
    return hasattr(module, "ndarray") and isinstance(value, module.ndarray)


def library(*arrays: object) -> ModuleType | Any:
    """NumPy, or CuPy if the arrays are CuPy's; TypeError for a mixture."""
    if not any(map(on_device, arrays)):
        return np
    if not all(map(on_device, arrays)):
        raise TypeError(
            "got NumPy and CuPy arrays in one call: move them to one side first, "
            "with cupy.asarray(a) or cupy.asnumpy(a)"
        )
    return cupy()


def current_device(
    x: Array, library: Library | None = None
) -> contextlib.AbstractContextManager[Any]:
    """A context in which x's device is the current one, and the stream that of another library."""
    if not on_device(x):
        return _HOST
    return x.device if library is None else library.stream(x.device.id)


_HOST = contextlib.nullcontext()


def is_aligned(array: Array) -> bool:
    """Whether all elements of a CuPy array lie at multiples of their size.

    A GPU cannot access others: a kernel that tried would make every later call fail.
    """
    size = array.itemsize
    steps = (step for length, step in zip(array.shape, array.strides, strict=True) if length > 1)
    return not array.size or math.gcd(array.data.ptr, *steps) % size == 0


def aligned(array: Array) -> Array:
    """A CuPy array, or a copy where its elements do not lie at multiples of their size.

    The copy is made byte by byte, since no kernel can read such elements.
    """
    if is_aligned(array):
        return array
    with current_device(array):
        return array[..., None].view(np.uint8).copy().view(array.dtype)[..., 0]


def result(shape: tuple[int, ...], dtype: Any, x: Array) -> Array:
    """A new array of arbitrary content in x's library."""
    return library(x).empty(shape, dtype) if on_device(x) else memory.empty(shape, dtype)


def result_like(x: Array, dtype: Any) -> Array:
    """A new array of arbitrary content, of x's shape and in its memory order."""
    if x.flags.c_contiguous or x.ndim < 2:
        return result(x.shape, dtype, x)
    if on_device(x):
        return library(x).empty_like(x, dtype)
    if x.flags.f_contiguous:
        return memory.empty(x.shape[::-1], dtype).T
    order = memory_order(x)
    return memory.empty(tuple(x.shape[axis] for axis in order), dtype).transpose(np.argsort(order))


def memory_order(x: Array) -> list[int]:
    """The axes by their strides, the longest first: NumPy's order K."""
    if x.flags.f_contiguous:
        return list(range(x.ndim))[::-1]
    return sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))


def apart(source: Array, out: Array | None) -> Array:
    """`source`, or a copy where writing `out` would overwrite elements before they are read.

    If `source` is `out` itself there is no copy: each element is read before it is written.
    """
    # New memory is shared with nothing.
    if out is None or not library(source).may_share_memory(source, out):
        return source
    same = (
        source.shape == out.shape
        and source.strides == out.strides
        and _address(source) == _address(out)
        and source.dtype == out.dtype
    )
    return source if same else source.copy()


def _address(array: Array) -> int:
    return array.data.ptr if on_device(array) else array.__array_interface__["data"][0]


def check_same(name: str, array: Array, x: Array, x_name: str = "x") -> None:
    """TypeError where one of two arrays is NumPy's and the other CuPy's."""
    if on_device(array) != on_device(x):
        owner = "CuPy" if on_device(array) else "NumPy"
        other = "CuPy" if on_device(x) else "NumPy"
        raise TypeError(
            f"{name} is a {owner} array, but {x_name} is a {other} array: move one of them "
            "with cupy.asarray or cupy.asnumpy"
        )


def to_host(array: Array) -> np.ndarray:
    """`array` as a NumPy array: a copy only where it is on a device."""
    return array.get() if on_device(array) else np.asarray(array)


def to_device(array: np.ndarray) -> Array:
    """`array` as a CuPy array on the current device.

    Raises
    ------
    RuntimeError
        If CuPy is not installed.
    """
    return imported_cupy().asarray(array)


def imported_cupy() -> Any:
    """The CuPy module, imported now if need be; RuntimeError where it is not installed."""
    try:
        return cupy() or importlib.import_module("cupy")
    except ImportError as error:
        raise RuntimeError(
            f"CuPy cannot be imported ({error}): install cubin with the extra cuda12 or cuda13"
        ) from error


def with_gpu() -> Any:
    """CuPy, for work on a GPU that is not asked for by an array.

    Raises
    ------
    RuntimeError
        If CuPy is not installed or finds no GPU.
    """
    module = imported_cupy()
    if not module.cuda.is_available():
        raise RuntimeError("CuPy finds no CUDA GPU")
    return module


# ---------------------------------------------------------------- other libraries


class Library:
    """A library whose arrays are viewed as NumPy's or CuPy's, and given back.

    Attributes
    ----------
    array : str
        What messages call one of its arrays.
    cast : str
        How its users cast an array to floats.
    constant : str
        The name of the only instance in this module.
    """

    array = ""
    cast = ""
    constant = ""

    def __reduce__(self) -> str:
        return self.constant

    def check(self, name: str, value: Any) -> None:
        """TypeError where an array is none whose values can be read."""
        raise NotImplementedError

    def index(self, value: Any) -> int | None:
        """The number of the GPU that an array lies on, or None on the host."""
        raise NotImplementedError

    def is_floating(self, value: Any) -> bool:
        """Whether an array holds floats: these have to lie on one device."""
        raise NotImplementedError

    def stream(self, index: int | None) -> contextlib.AbstractContextManager[Any]:
        """A context in which CuPy works on that GPU, on the stream that the library works on."""
        if index is None:
            return _HOST
        device: contextlib.AbstractContextManager[Any] = imported_cupy().cuda.Device(index)
        return device

    def view(self, name: str, value: Any) -> Array:
        """An array as a NumPy or CuPy array of the same memory; TypeError where there is none."""
        raise NotImplementedError

    def give(self, array: Array, like: Any = None) -> Any:
        """A result of NumPy or CuPy as an array of this library, on the device of `like`."""
        raise NotImplementedError

    def empty_like(self, x: Any) -> Any:
        """A new array for a result, or None where a result of NumPy or CuPy is given back."""
        return None

    def check_output(self, out: Any) -> None:
        """TypeError where an array cannot be written."""
        raise TypeError(f"out cannot be a {self.array}, which cannot be written: leave it out")

    def written(self, out: Any) -> None:
        """Tell the library that an array was written."""

    def records(self, x: Any) -> bool:
        """Whether the library records operations on `x` for its gradient."""
        return False

    def record(
        self, forward: Callable[[], Any], backward: Callable[..., Any], arguments: dict[str, Any]
    ) -> Any:
        """The result of `forward`, recorded as made from the arguments.

        ``backward(gy, **arguments)`` is the gradient for the argument ``x``.
        """
        raise NotImplementedError

    def record_linear(
        self, forward: Callable[[], Any], backward: Callable[[Any], Any], x: Any
    ) -> Any:
        """The result of `forward`, which is linear in x: its gradient is ``backward(gy)``."""
        raise NotImplementedError


class _Torch(Library):
    """PyTorch: it allocates results on a GPU, from its own pool; on the host they are NumPy's."""

    array = "PyTorch tensor"
    cast = "x.float()"
    recorded: Any = None
    """The autograd functions, made once there is PyTorch."""

    constant = "TORCH"

    def check(self, name: str, value: Any) -> None:
        torch: Any = sys.modules["torch"]
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
            raise TypeError(_refused(torch, name, value))

    def index(self, value: Any) -> int | None:
        device: int | None = value.device.index if value.is_cuda else None
        return device

    def is_floating(self, value: Any) -> bool:
        return bool(value.is_floating_point())

    def stream(self, index: int | None) -> contextlib.AbstractContextManager[Any]:
        return _HOST if index is None else self._current_stream(index)

    @contextlib.contextmanager
    def _current_stream(self, index: int) -> Any:
        module = imported_cupy()
        stream = sys.modules["torch"].cuda.current_stream(index)
        with module.cuda.Device(index), module.cuda.Stream.from_external(stream):
            yield

    def view(self, name: str, value: Any) -> Array:
        torch: Any = sys.modules["torch"]
        plain = value.detach() if value.requires_grad else value
        halves = plain.dtype is torch.bfloat16  # which neither NumPy nor DLPack's readers all know
        try:
            if halves:
                plain = plain.view(torch.int16)
            array = imported_cupy().from_dlpack(plain) if plain.is_cuda else plain.numpy()
        except (TypeError, RuntimeError, BufferError) as error:
            raise TypeError(f"{_refused(torch, name, value)} ({error})") from error
        return array.view(floats.bfloat16()) if halves else array

    def give(self, array: Array, like: Any = None) -> Any:
        torch: Any = sys.modules["torch"]
        # Of the dtypes of results this kind is bfloat16's alone; a dtype's name takes longer.
        halves = array.dtype.kind == "V"
        if halves:
            array = array.view(np.int16)
        if type(array) is not np.ndarray and on_device(array):
            tensor = torch.from_dlpack(array)
        else:
            plain = np.asarray(array)
            tensor = torch.from_numpy(plain if plain.flags.writeable else plain.copy())
        return tensor.view(torch.bfloat16) if halves else tensor

    def empty_like(self, x: Any) -> Any:
        return sys.modules["torch"].empty_like(x, requires_grad=False) if x.is_cuda else None

    def check_output(self, out: Any) -> None:
        if out.requires_grad:
            raise TypeError("out requires grad, and writing it is not recorded: pass out.detach()")

    def written(self, out: Any) -> None:
        sys.modules["torch"].autograd.graph.increment_version(out)

    def records(self, x: Any) -> bool:
        return bool(x.requires_grad and sys.modules["torch"].is_grad_enabled())

    def record(
        self, forward: Callable[[], Any], backward: Callable[..., Any], arguments: dict[str, Any]
    ) -> Any:
        names = tuple(n for n, v in arguments.items() if LIBRARY_OF[type(v)] is self)
        tensors = [arguments[name] for name in names]
        function, _ = self._recorders()
        return function.apply(forward, backward, arguments, names, *tensors)

    def record_linear(
        self, forward: Callable[[], Any], backward: Callable[[Any], Any], x: Any
    ) -> Any:
        _, function = self._recorders()
        return function.apply(forward, backward, x)

    def _recorders(self) -> Any:
        if self.recorded is None:
            self.recorded = _recorders()
        return self.recorded


def _refused(torch: Any, name: str, tensor: Any) -> str:
    """Why a tensor has no view, and what to do."""
    kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
    if torch.compiler.is_compiling():
        return f"{name} is traced by torch.compile or torch.export: use cubin.torch there"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return f"{name} is a tensor within torch.func: apply cubin outside of it"
    if tensor.device.type == "meta" or hasattr(tensor, "fake_mode"):
        return f"{name} is a {kind} without data: give it data, or use cubin.torch to trace"
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return (
            f"{name} is a {kind}, a kind of tensor whose values cubin cannot read: "
            "pass a torch.Tensor of them"
        )
    if tensor.is_quantized:
        return f"{name} is a quantized tensor: pass {name}.dequantize()"
    if tensor.layout is not torch.strided:
        return f"{name} is a tensor of layout {tensor.layout}: pass {name}.to_dense()"
    if tensor.is_complex():
        return f"{name} is a tensor of {tensor.dtype}: pass its real part, or the imaginary one"
    if tensor.is_neg():
        return f"{name} is negated lazily: pass {name}.resolve_neg()"
    if tensor.device.type not in ("cpu", "cuda"):
        return f"{name} lies on {tensor.device}: pass {name}.cpu()"
    return f"{name}, a tensor of {tensor.dtype}, cannot be read: cast it, e.g. {name}.float()"


def _recorders() -> tuple[Any, Any]:
    """The autograd functions that run any forward, and any that is linear, with any gradient."""
    torch: Any = sys.modules["torch"]

    class Pulled(torch.autograd.Function):
        """A gradient that is to be differentiated itself: that raises."""

        @staticmethod
        def forward(ctx: Any, pull_back: Any, *tensors: Any) -> Any:
            return pull_back()

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            raise RuntimeError("the gradient of a binarization cannot be differentiated itself")

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, forward: Any, backward: Any, arguments: Any, names: Any,
                    *tensors: Any) -> Any:  # fmt: skip
            ctx.save_for_backward(*tensors)
            # The tensors are those that are saved: PyTorch sees whether they were changed since.
            ctx.rest = {n: v for n, v in arguments.items() if n not in names}
            ctx.rule, ctx.names = backward, names
            return forward()

        @staticmethod
        def backward(ctx: Any, gy: Any) -> Any:
            saved = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
            pull_back = functools.partial(ctx.rule, gy, **{**ctx.rest, **saved})
            again = torch.is_grad_enabled()  # with create_graph=True
            gx = Pulled.apply(pull_back, gy, *saved.values()) if again else pull_back()
            return (None,) * 4 + tuple(gx if name == "x" else None for name in ctx.names)

    class RecordedLinear(torch.autograd.Function):
        """The gradient does not need x, and may be recorded itself."""

        @staticmethod
        def forward(ctx: Any, forward: Any, backward: Any, x: Any) -> Any:
            ctx.pull_back = backward
            return forward()

        @staticmethod
        def backward(ctx: Any, gy: Any) -> Any:
            return None, None, ctx.pull_back(gy)

    return Recorded, RecordedLinear


class _Jax(Library):
    """JAX: its arrays are read and made, never written."""

    array = "JAX array"
    cast = "x.astype('float32')"
    constant = "JAX"

    def check(self, name: str, value: Any) -> None:
        if isinstance(value, sys.modules["jax"].core.Tracer):
            raise TypeError(
                f"{name} is traced by JAX (jit, grad, vmap): "
                "use cubin.jax.sign or cubin.jax.multibit there"
            )
        if len(value.devices()) > 1:
            raise TypeError(f"{name} lies on several devices: move it to one with jax.device_put")
        if _jax_device(value).platform not in ("cpu", "gpu"):
            raise TypeError(f"{name} lies on {value.device}: move it with jax.device_put")

    def index(self, value: Any) -> int | None:
        device = _jax_device(value)
        return device.local_hardware_id if device.platform == "gpu" else None

    def is_floating(self, value: Any) -> bool:
        return bool(sys.modules["jax"].numpy.issubdtype(value.dtype, np.floating))

    def view(self, name: str, value: Any) -> Array:
        if _jax_device(value).platform == "gpu":
            return imported_cupy().from_dlpack(value)
        return np.asarray(value)

    def give(self, array: Array, like: Any = None) -> Any:
        jax: Any = sys.modules["jax"]
        if on_device(array):
            return jax.dlpack.from_dlpack(array)
        (device,) = jax.local_devices(backend="cpu")[:1] if like is None else like.devices()
        return jax.device_put(np.asarray(array), device)


def _jax_device(value: Any) -> Any:
    """The only device of an array."""
    (device,) = value.devices()
    return device


class _Dlpack(Library):
    """Any other library: its arrays are read, and results are NumPy's or CuPy's."""

    array = "DLPack array"
    constant = "DLPACK"

    def view(self, name: str, value: Any) -> Array:
        kind, _ = value.__dlpack_device__()
        module = np if int(kind) in _HOST_MEMORY else imported_cupy()
        try:
            return module.from_dlpack(value)
        except (TypeError, RuntimeError, BufferError) as error:
            raise TypeError(
                f"{name} is a {type(value).__module__}.{type(value).__qualname__} that cannot be "
                f"read through DLPack: {error}"
            ) from error


class _Dask(Library):
    """Dask: its arrays have no values yet. `cubin.dask` says what is done with their chunks."""

    array = "Dask array"
    constant = "DASK"

    def check(self, name: str, value: Any) -> None:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"{name} is a lazy {kind}: call {name}.compute() first")


_HOST_MEMORY = (1, 3, 11)
"""DLPack's numbers of the host's memory: plain, and what CUDA or ROCm have pinned."""

TORCH, JAX, DASK, DLPACK = _Torch(), _Jax(), _Dask(), _Dlpack()


def _is_cupy(kind: type) -> bool:
    module = cupy()
    return hasattr(module, "ndarray") and issubclass(kind, module.ndarray)


class _ByType(dict[type, "Library | None"]):
    """The library that arrays of a type are from; None for NumPy, CuPy and what is no array.

    A type is looked at once: every call of a public function asks about all its arguments.
    """

    def __missing__(self, kind: type) -> Library | None:
        self[kind] = _library_of(kind)
        return self[kind]


LIBRARY_OF = _ByType()


def _library_of(kind: type) -> Library | None:
    modules = {base.__module__.partition(".")[0] for base in kind.__mro__}
    torch: Any = sys.modules.get("torch")
    jax: Any = sys.modules.get("jax")
    if "torch" in modules and hasattr(torch, "Tensor") and issubclass(kind, torch.Tensor):
        return TORCH
    if modules & {"jax", "jaxlib"} and hasattr(jax, "Array"):
        return JAX if issubclass(kind, jax.Array | jax.core.Tracer) else None
    dask: Any = sys.modules.get("dask.array")
    if "dask" in modules and hasattr(dask, "Array") and issubclass(kind, dask.Array):
        return DASK
    if issubclass(kind, np.ndarray) or _is_cupy(kind) or not hasattr(kind, "__dlpack__"):
        return None
    return DLPACK


def enter(arguments: Mapping[str, Any]) -> tuple[Library | None, dict[str, Any], dict[str, Any]]:
    """The library that the arguments are from, its arrays by name, and all arguments to work on.

    Arrays of that library stay as they are, for `Library.view`; those of DLPack are views.

    Raises
    ------
    TypeError
        If arrays are of several libraries, or floats of one lie on several devices. Maps of
        integers may be NumPy's or CuPy's.
    """
    library: Library | None = None
    ours: dict[str, Any] = {}
    others = []
    views = dict(arguments)
    for name, value in arguments.items():
        owner = LIBRARY_OF[type(value)]
        if owner is None:
            if hasattr(value, "dtype"):
                others.append(name)
        elif owner is DLPACK:
            if name == "out":
                DLPACK.check_output(value)
            views[name] = DLPACK.view(name, value)
            others.append(name)
        elif library is None or owner is library:
            library = owner
            ours[name] = value
        else:
            others.append(name)
    if library is None:
        return None, ours, views
    home, first = next(iter(ours.items()))
    for name, value in ours.items():
        library.check(name, value)
        if value is first:
            continue
        floats = library.is_floating(value) and library.is_floating(first)
        if floats and value.device != first.device:
            raise TypeError(
                f"{name} lies on {value.device}, but {home} on {first.device}: move one of them"
            )
    for name in others:
        value = views[name]
        owner = LIBRARY_OF[type(value)]
        if owner is not None or (_is_plain(value) and value.dtype.kind not in "iu"):
            plain = "CuPy array" if on_device(value) else "NumPy array"
            raise TypeError(
                f"{name} is a {plain if owner is None else owner.array}, but {home} is a "
                f"{library.array}: bring both to one library"
            )
    return library, ours, views


def viewed(name: str, value: Any) -> tuple[Library | None, Any]:
    """The library of an array, and the array as NumPy's or CuPy's: for arrays in a mapping."""
    owner, (view,) = all_viewed({name: value})
    return owner, view


def all_viewed(arguments: Mapping[str, Any]) -> tuple[Library | None, list[Any]]:
    """The library that arguments are from, and all of them, its arrays as NumPy's or CuPy's."""
    owner, ours, views = enter(arguments)
    if owner is None:
        return None, list(views.values())
    with owner.stream(owner.index(next(iter(ours.values())))):
        for name, value in ours.items():
            views[name] = owner.view(name, value)
    return owner, list(views.values())


def _is_plain(value: Any) -> bool:
    """Whether a value is an array of NumPy or CuPy."""
    return hasattr(value, "dtype") and (isinstance(value, np.ndarray) or on_device(value))


def border(
    gradient: Callable[..., Any] | None = None,
    *,
    adjoint: Callable[..., Any] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function on NumPy and CuPy arrays take and give arrays of any library.

    Arguments are viewed, and results are given back in the library that they are from. Where a
    function takes ``out=``, PyTorch allocates the result on a GPU. A result that holds arrays
    itself says how it is given back, in a method ``given_to(library)``.

    Parameters
    ----------
    gradient : callable, optional
        ``gradient(gy, **arguments)`` is the gradient for the argument ``x``. A library that
        records operations, as PyTorch does where x requires grad, is told so.
    adjoint : callable, optional
        The same for a function that is linear in ``x``: ``adjoint(gy, shape, **rest)`` gets x's
        shape and the other arguments. x is not kept, and what the adjoint calls is recorded, too.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters.values()
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        takes_out = any(p.name == "out" for p in parameters)

        @functools.wraps(function)
        def call(*values: P.args, **options: P.kwargs) -> R:
            for value in values:
                if LIBRARY_OF[type(value)] is not None:
                    break
            else:
                for value in options.values():
                    if LIBRARY_OF[type(value)] is not None:
                        break
                else:
                    return function(*values, **options)
            arguments = {**dict(zip(positional, values, strict=False)), **options}
            if len(arguments) < len(values) + len(options):  # too many, or two of one name
                return function(*values, **options)  # which raises
            torch: Any = sys.modules.get("torch")
            work = across
            if torch is not None and torch.compiler.is_compiling():
                # PyTorch is not to trace what follows, which works on the values.
                work = torch.compiler.disable(across, reason="use cubin.torch there")
            result: R = work(function, takes_out, gradient, arguments, adjoint)
            return result

        return call

    return decorate


def across(
    function: Callable[..., Any],
    takes_out: bool,
    gradient: Callable[..., Any] | None,
    arguments: dict[str, Any],
    adjoint: Callable[..., Any] | None = None,
) -> Any:
    """The result of a function on NumPy and CuPy arrays, with arguments of any one library.

    Parameters
    ----------
    function : callable
    takes_out : bool
        Whether it takes ``out=``.
    gradient : callable, optional
        As in `border`.
    arguments : dict
        Its arguments by name.
    adjoint : callable, optional
        As in `border`.
    """
    if DASK in map(LIBRARY_OF.__getitem__, map(type, arguments.values())):
        # The adapter calls public functions: it is looked up here, since the core imports none.
        return importlib.import_module("cubin.dask").lazily(function.__name__, arguments)
    library, ours, views = enter(arguments)
    if library is None:
        return function(**views)
    if "x" in ours:
        x = ours["x"]
        if not library.is_floating(x):
            advice = f"cast it first, e.g. {library.cast}"
            if "complex" in str(x.dtype):
                advice = "pass its real part, or the imaginary one"
            raise TypeError(f"x must be floating point, got {x.dtype}: {advice}")
        if (gradient or adjoint) and library.records(x):
            if views.get("out") is not None:
                raise TypeError(
                    "x requires grad, and writing out is not recorded: use torch.no_grad()"
                )

            def forward() -> Any:
                return _worked(function, takes_out, library, ours, views)

            if adjoint is not None:
                rest = {name: value for name, value in arguments.items() if name != "x"}
                pull_back = functools.partial(adjoint, shape=tuple(x.shape), **rest)
                return library.record_linear(forward, pull_back, x)
            if gradient is not None:
                return library.record(forward, gradient, arguments)
    return _worked(function, takes_out, library, ours, views)


def _worked(
    function: Callable[..., Any],
    takes_out: bool,
    library: Library,
    ours: dict[str, Any],
    views: dict[str, Any],
) -> Any:
    """The result of a function whose arguments are of this library: these, by name, and all."""
    first = next(iter(ours.values()))
    out = views.get("out")
    target = out
    if out is None:
        if takes_out and "x" in ours:
            target = library.empty_like(ours["x"])
            if target is not None:
                views["out"] = target
                ours["out"] = target
    elif "out" in ours:
        library.check_output(out)
    with library.stream(library.index(first)):
        for name, value in ours.items():
            views[name] = library.view(name, value)
        result = function(**views)
        if out is not None:
            library.written(out)
        return given_back(result, library, first) if target is None else target


def given_back(result: Any, library: Library | None, like: Any = None) -> Any:
    """A result of NumPy or CuPy in the library that its arguments are from."""
    if library is None:
        return result
    if isinstance(result, (np.ndarray, np.generic)) or on_device(result):
        return library.give(result, like)
    return result.given_to(library) if hasattr(result, "given_to") else result
