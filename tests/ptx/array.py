"""The device array of the stand-in: NumPy memory that kernels reach and NumPy does not.

There are as many devices as are asked for. What computes, converts or gathers takes arrays of the
current device alone; views, copies and transfers take any. CuPy's own functions flush subnormal
float32, and so do these.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds

from tests.ptx.memory import CURRENT_DEVICE, Allocation

_WORD = 8
"""Bytes of the largest item of an access."""


_TINY = np.finfo(np.float32).tiny

_VIEWING = {"broadcast_to", "may_share_memory", "moveaxis", "ndim", "shape", "shares_memory"}
"""Functions that do not look at items."""

_MOVING = {
    "argsort", "concatenate", "copyto", "partition", "repeat", "sort", "stack", "take",
    "take_along_axis", "where",
}  # fmt: skip
"""Functions that hand items on as they are."""


class WrongDevice(Exception):
    """An array of another device than the current one was computed with."""


class Pointer:
    """Where an array's first element lies."""

    def __init__(self, allocation: Allocation, offset: int) -> None:
        self.mem = allocation
        self.ptr = allocation.address + offset


class Device:
    """A device; a context in which it is the current one, as CuPy's."""

    def __init__(self, number: int | None = None) -> None:
        self.id = CURRENT_DEVICE[-1] if number is None else number

    def __enter__(self) -> Device:
        CURRENT_DEVICE.append(self.id)
        return self

    def __exit__(self, *_: object) -> None:
        CURRENT_DEVICE.pop()

    def use(self) -> None:
        """Make it the current one."""
        CURRENT_DEVICE[-1] = self.id

    def synchronize(self) -> None:
        """Nothing: every launch has ended when it returns."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other.id == self.id

    def __hash__(self) -> int:
        return self.id


class ndarray:
    """An array in device memory, as far as CuPy's behaviour is relied on.

    What NumPy computes, the stand-in lets NumPy compute. NumPy arrays do not mix with it, and
    nothing converts it to one but `get`.
    """

    __slots__ = ("_allocation", "_host")
    __array_priority__ = 100

    def __init__(self, host: np.ndarray, allocation: Allocation) -> None:
        self._host = host
        self._allocation = allocation

    # Attributes

    @property
    def dtype(self) -> np.dtype[Any]:
        """The items' type."""
        return self._host.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""
        return self._host.shape

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes between neighbours along each axis."""
        return self._host.strides

    @property
    def size(self) -> int:
        """Number of items."""
        return self._host.size

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self._host.ndim

    @property
    def nbytes(self) -> int:
        """Bytes of the items."""
        return self._host.nbytes

    @property
    def itemsize(self) -> int:
        """Bytes of one item."""
        return self._host.itemsize

    @property
    def flags(self) -> np._core.multiarray.flagsobj:
        """Contiguity, as NumPy tells it."""
        return self._host.flags

    @property
    def device(self) -> Device:
        """Where it lies."""
        return Device(self._allocation.device)

    @property
    def data(self) -> Pointer:
        """Where its first element lies."""
        first = self._host.__array_interface__["data"][0]
        return Pointer(self._allocation, first - self._allocation.bytes.ctypes.data)

    @property
    def T(self) -> ndarray:
        """The axes reversed."""
        return self.transpose()

    @property
    def extent(self) -> tuple[int, int]:
        """First address, and the one after the last."""
        if not self.size:
            return self.data.ptr, self.data.ptr
        low, high = byte_bounds(self._host)
        shift = self._allocation.address - self._allocation.bytes.ctypes.data
        return low + shift, high + shift

    # To and from the host

    def get(self) -> np.ndarray:
        """A copy as a NumPy array."""
        return self._host.copy(order="K")

    def set(self, values: np.ndarray) -> None:
        """Overwrite from a NumPy array of the same shape and dtype."""
        if values.shape != self.shape or values.dtype != self.dtype:
            raise ValueError(f"got {values.dtype}{values.shape}, want {self.dtype}{self.shape}")
        self._assign(values)

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def item(self) -> Any:
        """The only item."""
        return self._host.item()

    def tolist(self) -> Any:
        """Nested lists."""
        return self._host.tolist()

    def __bool__(self) -> bool:
        return bool(self._host)

    def __int__(self) -> int:
        return int(self._host)

    def __float__(self) -> float:
        return float(self._host)

    def __index__(self) -> int:
        return operator.index(self._host)

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Iterator[ndarray]:
        if not self.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"<device array {self.dtype}{self.shape}>"

    __hash__ = None

    # Views and copies

    def _view(self, host: np.ndarray) -> ndarray:
        return ndarray(host, self._allocation)

    def _here(self) -> np.ndarray:
        """Its items, for what runs on the current device."""
        if self._allocation.device != CURRENT_DEVICE[-1]:
            raise WrongDevice(
                f"an array of device {self._allocation.device} on device {CURRENT_DEVICE[-1]}"
            )
        return self._host

    def __getitem__(self, index: Any) -> ndarray:
        found = self._host[_host_index(index)]
        if isinstance(found, np.ndarray) and np.shares_memory(found, self._allocation.bytes):
            return self._view(found)
        if not isinstance(found, np.ndarray):  # one item: a 0-d view of it
            parts = index if isinstance(index, tuple) else (index,)
            return self._view(self._host[(*_host_index(parts), ...)])
        self._here()
        return upload(found)

    def __setitem__(self, index: Any, value: Any) -> None:
        self._here()
        value = _host_value(value)
        if isinstance(value, np.ndarray) and value.dtype != self.dtype:
            value = _flushed(_flushed(value).astype(self.dtype))
        target = self[index]
        if target._allocation is not self._allocation:
            self._host[_host_index(index)] = value
            self._mark()
            return
        target._assign(value)

    def _assign(self, value: Any) -> None:
        self._host[...] = value
        self._mark()

    def _mark(self) -> None:
        """Its bytes are written now."""
        written = self._allocation.written
        if written is None or not self.size:
            return
        start = self._host.__array_interface__["data"][0] - self._allocation.bytes.ctypes.data
        np.ndarray((*self.shape, self.itemsize), np.bool_, written.data, start, (*self.strides, 1))[
            ...
        ] = True

    def reshape(self, *shape: Any, order: str = "C") -> ndarray:
        """A view where the strides allow one, else a copy."""
        host = self._host.reshape(*shape, order=order)
        if np.may_share_memory(host, self._host):
            return self._view(host)
        self._here()
        return upload(host)

    def transpose(self, *axes: Any) -> ndarray:
        """A view with the axes permuted."""
        return self._view(self._host.transpose(*axes))

    def swapaxes(self, first: int, second: int) -> ndarray:
        """A view with two axes swapped."""
        return self._view(self._host.swapaxes(first, second))

    def squeeze(self, axis: Any = None) -> ndarray:
        """A view without axes of length one."""
        return self._view(self._host.squeeze(axis))

    def ravel(self, order: str = "C") -> ndarray:
        """One axis; a view where possible."""
        return self.reshape(-1, order=order)

    def view(self, dtype: Any) -> ndarray:
        """The same bytes as another type."""
        return self._view(self._host.view(dtype))

    def copy(self, order: str = "C") -> ndarray:
        """A copy."""
        return upload(self._host.copy(order=order))

    def astype(self, dtype: Any, copy: bool = True) -> ndarray:
        """The items converted; itself where `copy` is false and nothing changes."""
        if not copy and self.dtype == dtype:
            return self
        host = self._here()
        if host.dtype == dtype:
            return adopt(host.copy(order="K"))
        with np.errstate(all="ignore"):
            return adopt(_flushed(_flushed(host).astype(dtype)))

    def fill(self, value: Any) -> None:
        """Set every item."""
        self._here()
        self._assign(_host_value(value))

    # Arithmetic, by NumPy

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        if method != "__call__":
            return NotImplemented
        out = options.pop("out", (None,))[0]
        return through_numpy(ufunc, inputs, {**options, "out": out})

    def __array_function__(
        self, function: Callable[..., Any], types: Any, inputs: Any, options: Any
    ) -> Any:
        return through_numpy(function, inputs, options)

    def _binary(function: Any, *, reverse: bool = False) -> Callable[..., ndarray]:
        def method(self: ndarray, other: Any) -> ndarray:
            if getattr(other, "__array_ufunc__", self) is None:
                return NotImplemented  # as CuPy leaves it to objects that ask for that
            left, right = _flushed(self._here()), _flushed(_host_value(other))
            with np.errstate(all="ignore"):
                return adopt(_flushed(function(right, left) if reverse else function(left, right)))

        return method

    def _update(function: Any) -> Callable[..., ndarray]:
        def method(self: ndarray, other: Any) -> ndarray:
            left, right = _flushed(self._here()), _flushed(_host_value(other))
            self._assign(_flushed(function(left, right)))
            return self

        return method

    __add__, __radd__ = _binary(operator.add), _binary(operator.add, reverse=True)
    __sub__, __rsub__ = _binary(operator.sub), _binary(operator.sub, reverse=True)
    __mul__, __rmul__ = _binary(operator.mul), _binary(operator.mul, reverse=True)
    __truediv__, __rtruediv__ = _binary(operator.truediv), _binary(operator.truediv, reverse=True)
    __floordiv__, __mod__ = _binary(operator.floordiv), _binary(operator.mod)
    __pow__, __rpow__ = _binary(operator.pow), _binary(operator.pow, reverse=True)
    __and__, __or__, __xor__ = _binary(operator.and_), _binary(operator.or_), _binary(operator.xor)
    __lshift__, __rshift__ = _binary(operator.lshift), _binary(operator.rshift)
    __matmul__ = _binary(operator.matmul)
    __lt__, __le__ = _binary(operator.lt), _binary(operator.le)
    __gt__, __ge__ = _binary(operator.gt), _binary(operator.ge)
    __eq__ = _binary(operator.eq)
    __ne__ = _binary(operator.ne)
    __iadd__, __isub__ = _update(operator.add), _update(operator.sub)
    __imul__, __itruediv__ = _update(operator.mul), _update(operator.truediv)
    __iand__, __ior__ = _update(operator.and_), _update(operator.or_)

    def __neg__(self) -> ndarray:
        return adopt(-_flushed(self._here()))

    def __abs__(self) -> ndarray:
        return adopt(abs(_flushed(self._here())))

    def __invert__(self) -> ndarray:
        return adopt(~self._here())


def allocate(shape: Any, dtype: Any, order: str = "C") -> ndarray:
    """An array that nothing wrote yet: every byte is 0xFB."""
    shape = (shape,) if isinstance(shape, int | np.integer) else tuple(int(n) for n in shape)
    return _unwritten(np.empty(shape, dtype, order=order))


def allocate_like(like: ndarray, dtype: Any, shape: Any = None) -> ndarray:
    """The same of the shape of `like`, or another one, in its memory order."""
    return _unwritten(np.empty_like(like._host, dtype, order="K", subok=False, shape=shape))


def _unwritten(layout: np.ndarray) -> ndarray:
    allocation = Allocation(layout.nbytes, written=False)
    strides = layout.strides if layout.size else None
    host = np.ndarray(layout.shape, layout.dtype, allocation.bytes.data, 0, strides)
    return ndarray(host, allocation)


def upload(values: Any) -> ndarray:
    """A copy of `values` in device memory, with the same order of axes."""
    values = np.asanyarray(values)
    layout = np.empty_like(values, order="K", subok=False)
    allocation = Allocation(values.nbytes, written=True)
    host = np.ndarray(values.shape, values.dtype, allocation.bytes.data, 0, layout.strides)
    host[...] = values
    return ndarray(host, allocation)


def adopt(values: Any) -> ndarray:
    """New `values` as device memory: their own where whole words fill it, else a copy."""
    if isinstance(values, np.ndarray) and values.flags.owndata and values.nbytes % _WORD == 0:
        order = "C" if values.flags.c_contiguous else "F" if values.flags.f_contiguous else None
        if order and values.size:
            held = values.reshape(-1, order=order).view(np.uint8)
            return ndarray(values, Allocation(values.nbytes, written=True, held=held))
    return upload(values)


def _host_value(value: Any) -> Any:
    if isinstance(value, ndarray):
        return value._here()
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError(f"Unsupported type {type(value)}: move it to the device first")
    return value


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """A function of a value, or of all that a list or tuple holds."""
    if isinstance(value, list | tuple):
        return type(value)(_each(function, item) for item in value)
    return function(value)


def _flushed(value: Any) -> Any:
    """A value with float32 as ``-ftz=true`` takes and gives them: subnormal ones are zeros."""
    if not isinstance(value, np.ndarray | np.generic) or value.dtype != np.float32:
        return value
    small = np.abs(value) < _TINY
    return np.where(small, np.copysign(np.float32(0), value), value) if small.any() else value


def _host_index(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_host_index(part) for part in index)
    return index._here() if isinstance(index, ndarray) else index


def _host_value_anywhere(value: Any) -> Any:
    return value._host if isinstance(value, ndarray) else _host_value(value)


def through_numpy(function: Callable[..., Any], inputs: Any, options: dict[str, Any]) -> Any:
    """The result of a function on device arrays, computed by NumPy."""
    out = options.get("out")
    if out is not None and not isinstance(out, ndarray):
        raise TypeError("Output arguments type must be cupy.ndarray")
    if function.__name__ in _VIEWING:
        items: Callable[[Any], Any] = _host_value_anywhere
    elif function.__name__ in _MOVING:
        items = _host_value
    else:

        def items(value: Any) -> Any:
            return _flushed(_host_value(value))

    given = {k: _each(_host_value if k == "out" else items, v) for k, v in options.items()}
    with np.errstate(all="ignore"):
        result = function(*(_each(items, value) for value in inputs), **given)
    if out is not None:
        out._assign(_flushed(out._host))
        return out
    if function.__name__ not in _VIEWING | _MOVING:
        result = _each(_flushed, result)
    return wrap(result, [i._allocation for i in inputs if isinstance(i, ndarray)])


def wrap(result: Any, owners: Any = ()) -> Any:
    """NumPy's results as device arrays; views stay views of the arrays that own the memory."""
    if isinstance(result, tuple):
        return tuple(wrap(item, owners) for item in result)
    if isinstance(result, list):
        return [wrap(item, owners) for item in result]
    if isinstance(result, np.ndarray | np.generic):
        if isinstance(result, np.ndarray):
            for owner in owners:
                if np.may_share_memory(result, owner.bytes):
                    return ndarray(result, owner)
        return adopt(result)
    return result


def _method(name: str) -> Callable[..., Any]:
    def method(self: ndarray, *inputs: Any, **options: Any) -> Any:
        return through_numpy(getattr(np, name), (self, *inputs), options)

    method.__name__ = name
    return method


for _name in (
    "sum", "prod", "mean", "min", "max", "argmin", "argmax", "any", "all", "clip", "round",
    "nonzero", "cumsum", "repeat",
):  # fmt: skip
    setattr(ndarray, _name, _method(_name))
