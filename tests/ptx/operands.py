"""How instructions read and write their operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tests.ptx import arithmetic
from tests.ptx.assignments import doubtful, registers_of
from tests.ptx.machine import CONSTANT, LOCAL, PARAMETER, SHARED, STATES, Batch, Selection
from tests.ptx.program import (
    Function,
    Immediate,
    Instruction,
    Negated,
    Operand,
    Program,
    Register,
    Special,
    Symbol,
    UnsupportedInstruction,
    Vector,
)

Array = NDArray[np.generic]
Read = Callable[[Batch, Selection], Array]
Write = Callable[[Batch, Selection, Array], None]

SPACES = {"param", "global", "const", "shared", "local"}
WINDOWS = {"shared": SHARED, "local": LOCAL, "const": CONSTANT, "param": PARAMETER}
"""Where the generic address space shows each memory but the global one."""

HALVES = {"f16x2": np.float16, "u16x2": np.uint16, "s16x2": np.int16}
"""Types that hold two values in one register."""


def bits_of(width: int) -> np.dtype[np.generic]:
    """The type of a register of `width` bytes."""
    return np.dtype(STATES[width])


def _widened(value: Array, bits: np.dtype[np.generic]) -> Array:
    """A result as a register's bits: zero- or sign-extended where the register is wider."""
    if value.dtype == np.bool_:
        return value
    if value.dtype.kind == "f":
        value = value.view(bits_of(value.dtype.itemsize))
    signed = np.dtype(f"i{bits.itemsize}") if value.dtype.kind == "i" else bits
    return value.astype(signed).view(bits)


def _special(name: str, batch: Batch) -> Array:
    part, _, axis = name.removeprefix("%").partition(".")
    shape = {"tid": batch.geometry.block, "ctaid": batch.geometry.grid}
    if part in shape:
        index = batch.thread if part == "tid" else batch.block + batch.first
        x, y, _ = shape[part]
        return {"x": index % x, "y": index // x % y, "z": index // (x * y)}[axis].astype(np.uint32)
    if part in ("ntid", "nctaid"):
        shape_of = batch.geometry.block if part == "ntid" else batch.geometry.grid
        return np.array([shape_of["xyz".index(axis)]], np.uint32)
    lane = (batch.thread % 32).astype(np.uint32)
    bit = np.uint32(1) << lane
    values: dict[str, Callable[[], Array]] = {
        "laneid": lambda: lane,
        "warpid": lambda: (batch.thread // 32).astype(np.uint32),
        "nwarpid": lambda: np.array([-(-batch.threads // 32)], np.uint32),
        "lanemask_eq": lambda: bit,
        "lanemask_lt": lambda: bit - np.uint32(1),
        "lanemask_le": lambda: bit | (bit - np.uint32(1)),
        "lanemask_gt": lambda: ~(bit | (bit - np.uint32(1))),
        "lanemask_ge": lambda: ~(bit - np.uint32(1)),
        "dynamic_smem_size": lambda: np.array([batch.geometry.shared], np.uint32),
        "clock": lambda: np.array([batch.instructions & 0xFFFFFFFF], np.uint32),
        "clock64": lambda: np.array([batch.instructions], np.uint64),
    }
    return values[part]()


_SPECIALS = {
    *(f"%{part}.{axis}" for part in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    *("%laneid", "%warpid", "%nwarpid", "%dynamic_smem_size", "%clock", "%clock64"),
    *(f"%lanemask_{which}" for which in ("eq", "lt", "le", "gt", "ge")),
}


class Operands:
    """Reading and writing of the operands of one function."""

    def __init__(self, function: Function, program: Program) -> None:
        self.function = function
        self.program = program
        self.spaces = {v.name: v.space for v in function.variables if v.space != "param"}
        self.spaces |= {v.name: v.space for v in program.variables.values()}
        arguments = sorted(function.variables, key=lambda v: v.size)  # a name can serve many calls
        self.local_params = {v.name: v for v in arguments if v.space == "param"}
        self.parameters: dict[str, tuple[int, int]] = {}
        at = 0
        for variable in function.params:
            at = -(-at // variable.align) * variable.align
            self.parameters[variable.name] = at, variable.size
            at += variable.size
        self.parameter_bytes = at
        self.doubtful = doubtful(function)

    # Operands

    def read(self, operand: Operand | None, kind: str, what: Instruction) -> Read:
        """How to read an operand as values of the PTX type `kind`, which every lane wrote."""
        return self._checked(self.take(operand, kind, what), operand, what)

    def _checked(self, read: Read, operand: Operand | None, what: Instruction) -> Read:
        """`read`, and a fault where a lane never wrote a register of the operand."""
        watched = self.watched(operand)
        if not watched:
            return read

        def check(b: Batch, s: Selection) -> Array:
            for register in watched:
                b.check_written(register, s, what)
            return read(b, s)

        return check

    def predicate(self, register: Register, what: Instruction) -> Read:
        """How to read a predicate that decides what a lane does."""
        return self._checked(lambda b, s: b.get(register, s), register, what)

    def watched(self, operand: Operand | None) -> list[Register]:
        """The registers of an operand that some lane may not have written."""
        return [r for r in registers_of(operand) if r.index in self.doubtful]

    def take(self, operand: Operand | None, kind: str, what: Instruction) -> Read:
        """How to read an operand, whatever its registers hold."""
        if kind in HALVES:
            inner, half = self.take(operand, "b32", what), HALVES[kind]
            return lambda b, s: inner(b, s).view(half).reshape(-1, 2)
        if kind not in arithmetic.TYPES:
            raise UnsupportedInstruction(f"type {kind}: {what.text}")
        wanted = np.dtype(arithmetic.TYPES[kind])
        match operand:
            case Register(width=width) if width and wanted == bits_of(width):
                return lambda b, s: b.get(operand, s)
            case Register(width=width) if width == wanted.itemsize or wanted == np.bool_:
                return lambda b, s: b.get(operand, s).view(wanted)
            case Register(width=width) if width > wanted.itemsize:
                narrow = bits_of(wanted.itemsize)
                return lambda b, s: b.get(operand, s).astype(narrow).view(wanted)
            case Negated(register=register):
                return lambda b, s: ~b.get(register, s)
            case Immediate():
                constant = _constant(operand, wanted)
                return lambda b, s: constant
            case Special(name=name):
                if name not in _SPECIALS:
                    raise UnsupportedInstruction(what.text)
                return lambda b, s: _choose(_special(name, b).astype(wanted), s)
            case Symbol(name=name):
                return self._symbol(name, wanted, what)
            case Vector(items=items):
                return self._pack(items, wanted, what)
        raise UnsupportedInstruction(what.text)

    def _symbol(self, text: str, wanted: np.dtype[np.generic], what: Instruction) -> Read:
        name, _, extra = text.partition("+")
        more = int(extra or 0)
        if name in self.parameters:
            start = np.array([PARAMETER + self.parameters[name][0] + more]).astype(wanted)
            return lambda b, s: start
        space = self.spaces.get(name)
        if space in ("global", "const"):
            return lambda b, s: np.array(
                [CONSTANT + b.layouts["const"].offsets[name] + more]
            ).astype(wanted)
        if space in ("shared", "local"):
            return lambda b, s: np.array([b.layouts[space].offsets[name] + more]).astype(wanted)
        raise UnsupportedInstruction(what.text)

    def _pack(
        self, items: Sequence[Operand | None], wanted: np.dtype[np.generic], what: Instruction
    ) -> Read:
        width = wanted.itemsize // len(items)
        parts = [self.take(item, f"b{8 * width}", what) for item in items]

        def pack(b: Batch, s: Selection) -> Array:
            values = np.broadcast_arrays(*(part(b, s) for part in parts))
            return np.stack(values, axis=1).view(wanted).ravel()

        return pack

    def write(self, operand: Operand | None, what: Instruction) -> Write:
        """How to write a result, of any type, to a destination."""
        put, watched = self._put(operand, what), self.watched(operand)
        if not watched:
            return put

        def note(b: Batch, s: Selection, value: Array) -> None:
            put(b, s, value)
            for register in watched:
                b.mark_unwritten(register, s, False)

        return note

    def _put(self, operand: Operand | None, what: Instruction) -> Write:
        match operand:
            case None:
                return lambda b, s, value: None
            case Register(width=0):
                return lambda b, s, value: b.put(operand, s, value)
            case Register(width=width):
                bits = bits_of(width)

                def put(b: Batch, s: Selection, value: Array) -> None:
                    fits = value.dtype.itemsize == width and value.dtype != np.bool_
                    b.put(operand, s, value.view(bits) if fits else _widened(value, bits))

                return put
            case Vector(items=items):
                writers = [self._put(item, what) for item in items]

                def unpack(b: Batch, s: Selection, value: Array) -> None:
                    part = bits_of(value.dtype.itemsize // len(writers))
                    columns = value.view(part).reshape(-1, len(writers))
                    for index, writer in enumerate(writers):
                        writer(b, s, columns[:, index].copy())

                return unpack
        raise UnsupportedInstruction(what.text)


def _choose(value: Array, chosen: Selection) -> Array:
    return value if chosen is None or len(value) == 1 else value[chosen]


def _constant(operand: Immediate, wanted: np.dtype[np.generic]) -> Array:
    if wanted == np.bool_:
        return np.array([bool(operand.bits)])
    if operand.floating and wanted.itemsize == 4 and operand.text[:2].lower() == "0d":
        return np.array([operand.bits], np.uint64).view(np.float64).astype(np.float32).view(wanted)
    if operand.floating and wanted.itemsize == 8 and operand.text[:2].lower() == "0f":
        return np.array([operand.bits], np.uint32).view(np.float32).astype(np.float64).view(wanted)
    bits = operand.bits & ((1 << 8 * wanted.itemsize) - 1)
    return np.array([bits], bits_of(wanted.itemsize)).view(wanted)
