"""Primitives: functions in up to three forms, in one registry.

The body of a primitive is a NumPy expression. The decorator right above it holds the CUDA source
that CuPy compiles for device arrays. With ``looped=True`` there is a compiled loop of the same name
in the module ``<stem>_loops.py``::

    @elementwise("T x, T a", "T y", "y = x - a", types=FLOATS)
    def difference(x, a, *, y):
        np.subtract(x, a, out=y)

The positional parameters are the kernel's inputs. The keyword-only parameters are its outputs,
which the caller allocates. The decorator checks that function and kernel agree.

Calling a primitive runs the kernel if the outputs are device arrays, else the body. Only `passes`
chooses loops.

The last input may be variadic (``*W scales``). Then one kernel is built for each number of
arguments. In the source ``{scales}`` stands for them, each after a comma, and ``{count}`` for their
number.

Kernels that share work among threads are templates in a ``.cu`` file. `raw` makes them primitives:
its argument `launch` is a function that says how a call is launched.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from cubin.core import libraries
from cubin.core.host import blocks
from cubin.core.libraries import Array

REGISTRY: dict[str, Primitive] = {}
"""Every primitive by its name."""

FLOATS: tuple[Mapping[str, str], ...] = tuple(
    {"T": dtype, "W": work}
    for dtype, work in (
        ("float16", "float32"),
        ("bfloat16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
    )
)
"""The types that kernels are used with: T of the array, and W, its work dtype."""


def source(module_file: str, name: str | None = None) -> str:
    """The CUDA source beside a module: the file `name`, or the ``.cu`` file of the same stem."""
    if name is None:
        name = os.path.splitext(os.path.basename(module_file))[0] + ".cu"
    with open(os.path.join(os.path.dirname(module_file), name), encoding="utf-8") as file:
        return file.read()


PREAMBLE = source(__file__, "exact.cuh")
"""Device functions that every kernel can call. ``Work<T>::type`` is W."""

C_TYPES = {"e": "float16", "E": "bfloat16", "f": "float", "d": "double"}
"""What CUDA calls the float dtypes, by their characters, which no two of them share."""

_C_TYPES = {
    "int8": "signed char",
    "uint8": "unsigned char",
    "uint16": "unsigned short",
    "int32": "int",
    "uint64": "unsigned long long",
}


class Primitive:
    """A function on arrays, with a NumPy body, a CUDA kernel and perhaps a compiled loop.

    Attributes
    ----------
    name : str
        The function's name; the kernel is called ``cubin_<name>``.
    inputs, outputs : tuple of (type, name)
        The kernel's parameters. A type is the name of a dtype, or a letter that stands for one. It
        starts with ``raw`` if the kernel indexes the array itself, with ``*`` if it is variadic,
        and with ``static`` if it is a number that `launch` deals with.
    types : tuple of mapping
        The dtypes that the letters stand for: what the tests compile and execute.
    looped : bool
        Whether there is a compiled loop of the same name beside the function's module.
    loops_from : int or None
        The number of elements from which on the loop is used, where it gives other bits than the
        body. None if it gives the same bits: then it is used where it is faster.
    """

    loops_from: int | None = None

    def __init__(
        self,
        function: Callable[..., None],
        inputs: str,
        outputs: str,
        types: Sequence[Mapping[str, str]],
        preamble: str,
        looped: bool,
    ) -> None:
        self.name = function.__name__
        self.looped = looped
        self.function = function
        self.inputs = _parameters(inputs)
        self.outputs = _parameters(outputs)
        self.types = tuple(types)
        self.preamble = PREAMBLE + preamble
        self.__doc__ = function.__doc__
        self._kernels: dict[tuple[Any, int], Any] = {}
        self._check_parameters()
        if self.name in REGISTRY:
            raise ValueError(f"there is a primitive {self.name!r} already")
        REGISTRY[self.name] = self

    def _check_parameters(self) -> None:
        parameters = inspect.signature(self.function).parameters.values()
        outputs = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        inputs = [
            f"*{p.name}" if p.kind is p.VAR_POSITIONAL else p.name
            for p in parameters
            if p.kind is not p.KEYWORD_ONLY
        ]
        declared = [f"*{name}" if kind[0] == "*" else name for kind, name in self.inputs]
        if inputs != declared or outputs != [name for _, name in self.outputs]:
            raise TypeError(
                f"{self.name}: the kernel takes {declared} and gives "
                f"{[name for _, name in self.outputs]}, but the function has {inputs} and {outputs}"
            )

    @property
    def variadic(self) -> bool:
        """Whether the number of inputs varies."""
        return bool(self.inputs) and self.inputs[-1][0].startswith("*")

    @cached_property
    def kernel_name(self) -> str:
        """The name that the CUDA kernel has in a profiler."""
        return f"cubin_{self.name}"

    def kernel(self, count: int = 0) -> Any:
        """CuPy's kernel for `count` variadic inputs, built when first asked for."""
        module = libraries.cupy()
        key = (module, count)
        if key not in self._kernels:
            self._kernels[key] = self._build(module, count)
        return self._kernels[key]

    def _build(self, module: Any, count: int) -> Any:
        """A new kernel: what subclasses define."""
        raise NotImplementedError

    def on_host(self, size: int) -> Callable[..., None]:
        """The form for NumPy arrays of `size` elements: the compiled loop, or the body."""
        if not self.looped:  # Numba takes long to import, for nothing then
            return self.function
        if not (blocks.pays(size) if self.loops_from is None else size >= self.loops_from):
            return self.function
        loops = blocks.loops(self.function.__module__)
        return getattr(loops, self.name, self.function)

    def __call__(self, *inputs: Array, **outputs: Array) -> None:
        """Overwrite `outputs` with what the kernel, or else the body, computes from `inputs`."""
        ordered = [outputs[name] for _, name in self.outputs]
        if isinstance(ordered[0], np.ndarray):
            blocks.alone(self.function, *inputs, **outputs)
        else:
            self._launch(inputs, ordered)

    def _launch(self, inputs: tuple[Array, ...], outputs: list[Array]) -> None:
        """Run the kernel: what subclasses define."""
        raise NotImplementedError

    def _variadic_count(self, inputs: tuple[Array, ...]) -> int:
        return len(inputs) - len(self.inputs) + 1 if self.variadic else 0

    def _declare(self, count: int) -> tuple[str, str]:
        """The parameters of the kernel as CuPy writes them."""
        inputs = []
        for kind, name in self.inputs:
            if kind.startswith("*"):
                inputs += [f"{kind[1:]} {name}_{number}" for number in range(count)]
            else:
                inputs.append(f"{kind} {name}")
        return ", ".join(inputs), ", ".join(f"{kind} {name}" for kind, name in self.outputs)

    def _fill(self, text: str, count: int) -> str:
        if not self.variadic:
            return text
        name = self.inputs[-1][1]
        listed = "".join(f", {name}_{number}" for number in range(count))
        return text.replace(f"{{{name}}}", listed).replace("{count}", str(count))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


class Elementwise(Primitive):
    """A primitive whose outputs at an index depend on its inputs at that index alone."""

    def __init__(self, *arguments: Any, operation: str) -> None:
        self.operation = operation
        super().__init__(*arguments)

    def _build(self, module: Any, count: int) -> Any:
        inputs, outputs = self._declare(count)
        return module.ElementwiseKernel(
            inputs,
            outputs,
            self._fill(self.operation, count),
            self.kernel_name,
            preamble=self.preamble,
        )

    def _launch(self, inputs: tuple[Array, ...], outputs: list[Array]) -> None:
        self.kernel(self._variadic_count(inputs))(*inputs, *outputs)


class Reduction(Primitive):
    """A primitive that reduces the last axis of its inputs; the outputs keep it with length 1."""

    def __init__(self, *arguments: Any, map: str, reduce: str, post_map: str, identity: str,
                 reduce_type: str) -> None:  # fmt: skip
        self.map = map
        self.reduce = reduce
        self.post_map = post_map
        self.identity = identity
        self.reduce_type = reduce_type
        super().__init__(*arguments)

    def _build(self, module: Any, count: int) -> Any:
        inputs, outputs = self._declare(count)
        return module.ReductionKernel(
            inputs,
            outputs,
            self._fill(self.map, count),
            self.reduce,
            self.post_map,
            self.identity,
            self.kernel_name,
            reduce_type=self.reduce_type,
            preamble=self.preamble,
        )

    def _launch(self, inputs: tuple[Array, ...], outputs: list[Array]) -> None:
        kernel = self.kernel(self._variadic_count(inputs))
        kernel(*inputs, *outputs, axis=outputs[0].ndim - 1, keepdims=True)


class Launch(NamedTuple):
    """How a raw kernel is launched.

    Attributes
    ----------
    template : tuple
        Its template arguments, as C++ writes them.
    grid, block : int
        Blocks, and threads in each.
    arguments : tuple
        Arrays, and NumPy scalars of exactly the parameters' types.
    """

    template: tuple[Any, ...]
    grid: int
    block: int
    arguments: tuple[Any, ...]


class Raw(Primitive):
    """A primitive whose kernel is a C++ template, written out for every thread.

    The first parameters of the template are pointers to the declared inputs and outputs, in order,
    without the static ones. `launch` gives the rest: it gets all arguments of a call, outputs last,
    and returns a `Launch`. Where the primitive is one on whole rows, ``row_work(length, levels)``
    is the work of its loop on each: `blocks.threads` says what work is.
    """

    def __init__(
        self, *arguments: Any, code: str, launch: Any, loops_from: int | None = None,
        row_work: Any = None,
    ) -> None:  # fmt: skip
        self.code = code
        self.launch = launch
        self.loops_from = loops_from
        self.row_work = row_work
        super().__init__(*arguments)
        self._modules: dict[tuple[Any, tuple[Any, ...]], Any] = {}

    @property
    def source(self) -> str:
        """The whole source that is compiled."""
        headers = "#include <cupy/float16.cuh>\n#include <cupy/bfloat16.cuh>"
        return f"{headers}\n{self.preamble}\n{self.code}"

    def _check_parameters(self) -> None:
        super()._check_parameters()
        passed = [pair for pair in self.inputs if not pair[0].startswith("static ")]
        pointers = [f"const {_C_TYPES.get(kind, kind)}* {name}" for kind, name in passed]
        pointers += [f"{_C_TYPES.get(kind, kind)}* {name}" for kind, name in self.outputs]
        match = re.search(rf"\b{self.kernel_name}\s*\(([^)]*)\)", self.code)
        written = match[1].split(",") if match else []
        if [" ".join(text.split()) for text in written[: len(pointers)]] != pointers:
            raise TypeError(f"the parameters of {self.kernel_name} must start with {pointers}")

    def instance(self, template: tuple[Any, ...]) -> Any:
        """CuPy's kernel for these template arguments, built when first asked for."""
        module = libraries.cupy()
        key = (module, template)
        if key not in self._modules:
            name = self.name_of(template)
            built = module.RawModule(code=self.source, name_expressions=(name,))
            self._modules[key] = built.get_function(name)
        return self._modules[key]

    def name_of(self, template: tuple[Any, ...]) -> str:
        """The kernel with these template arguments, as C++ writes it."""
        return f"{self.kernel_name}<{', '.join(map(str, template))}>"

    def _launch(self, inputs: tuple[Array, ...], outputs: list[Array]) -> None:
        launch = self.launch(*inputs, *outputs)
        kernel = self.instance(launch.template)
        kernel((launch.grid,), (launch.block,), launch.arguments)


def elementwise(
    inputs: str,
    outputs: str,
    operation: str,
    *,
    types: Sequence[Mapping[str, str]],
    preamble: str = "",
    looped: bool = False,
) -> Callable[[Callable[..., None]], Elementwise]:
    """Make a function an elementwise primitive; the arguments are ElementwiseKernel's."""

    def decorate(function: Callable[..., None]) -> Elementwise:
        return Elementwise(function, inputs, outputs, types, preamble, looped, operation=operation)

    return decorate


def reduction(
    inputs: str,
    outputs: str,
    *,
    map: str,
    reduce: str,
    post_map: str,
    identity: str,
    reduce_type: str,
    types: Sequence[Mapping[str, str]],
    preamble: str = "",
    looped: bool = False,
) -> Callable[[Callable[..., None]], Reduction]:
    """Make a function a primitive that reduces the last axis; the arguments are ReductionKernel's.

    There may be several outputs, which `post_map` assigns.
    """

    def decorate(function: Callable[..., None]) -> Reduction:
        return Reduction(
            function, inputs, outputs, types, preamble, looped, map=map, reduce=reduce,
            post_map=post_map, identity=identity, reduce_type=reduce_type,
        )  # fmt: skip

    return decorate


def raw(
    inputs: str,
    outputs: str,
    *,
    code: str,
    launch: Any,
    types: Sequence[Mapping[str, str]],
    preamble: str = "",
    looped: bool = False,
    loops_from: int | None = None,
    row_work: Callable[[int, int], int] | None = None,
) -> Callable[[Callable[..., None]], Raw]:
    """Make a function a primitive whose kernel is the template ``cubin_<function>`` in `code`.

    `launch`, `row_work` and `loops_from` are those of `Raw` and `Primitive`.
    """

    def decorate(function: Callable[..., None]) -> Raw:
        return Raw(
            function, inputs, outputs, types, preamble, looped, code=code, launch=launch,
            loops_from=loops_from, row_work=row_work,
        )  # fmt: skip

    return decorate


def _parameters(text: str) -> tuple[tuple[str, str], ...]:
    """``"T x, raw int8 y, *W scales"`` as pairs of type and name."""
    pairs = (part.strip().rpartition(" ") for part in text.split(","))
    return tuple((kind, name) for kind, _, name in pairs)
