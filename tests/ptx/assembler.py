"""Instructions to steps: each becomes a function of the batch and the lanes that execute it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tests.ptx import arithmetic, faults
from tests.ptx.compiler import Compiled
from tests.ptx.machine import (
    CONSTANT,
    LOCAL,
    PARAMETER,
    SHARED,
    STATES,
    Batch,
    Block,
    Kernel,
    Selection,
    Step,
    Waiting,
)
from tests.ptx.program import (
    Address,
    Function,
    Immediate,
    Instruction,
    Negated,
    Operand,
    Pair,
    Program,
    Register,
    Special,
    Symbol,
    UnsupportedInstruction,
    Vector,
    inline_calls,
    parse,
)
from tests.ptx.races import Flags, Lanes

Array = NDArray[np.generic]
Read = Callable[[Batch, Selection], Array]
Write = Callable[[Batch, Selection, Array], None]

_SPACES = {"param", "global", "const", "shared", "local"}
_WINDOWS = {"shared": SHARED, "local": LOCAL, "const": CONSTANT, "param": PARAMETER}
_IGNORED = {"membar", "fence", "nanosleep", "pmevent", "brkpt", "prefetch", "prefetchu"}
_STRONG = {"volatile", "relaxed", "acquire", "release", "mmio"}


def _bits(width: int) -> np.dtype[np.generic]:
    return np.dtype(STATES[width])


def _widen(value: Array, width: int) -> Array:
    """A result as a register's bits: zero- or sign-extended where the register is wider."""
    if width == 0 or value.dtype == np.bool_:
        return value
    if value.dtype.itemsize == width:
        return value.view(_bits(width))
    if value.dtype.kind == "f":
        value = value.view(_bits(value.dtype.itemsize))
    signed = np.dtype(f"i{width}") if value.dtype.kind == "i" else _bits(width)
    return value.astype(signed).view(_bits(width))


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


class _Assembler:
    """The steps of one function."""

    def __init__(self, function: Function, program: Program) -> None:
        self.function = function
        self.program = program
        self.spaces = {v.name: v.space for v in function.variables if v.space != "param"}
        self.spaces |= {v.name: v.space for v in program.variables.values()}
        self.local_params = {v.name: v for v in function.variables if v.space == "param"}
        self.parameters: dict[str, tuple[int, int]] = {}
        at = 0
        for variable in function.params:
            at = -(-at // variable.align) * variable.align
            self.parameters[variable.name] = at, variable.size
            at += variable.size
        self.parameter_bytes = at

    # Operands

    def read(self, operand: Operand | None, kind: str, what: Instruction) -> Read:
        """How to read an operand as values of the PTX type `kind`."""
        if kind in _HALVES:
            inner, half = self.read(operand, "b32", what), _HALVES[kind]
            return lambda b, s: inner(b, s).view(half).reshape(-1, 2)
        if kind not in arithmetic.TYPES:
            raise UnsupportedInstruction(f"type {kind}: {what.text}")
        wanted = np.dtype(arithmetic.TYPES[kind])
        match operand:
            case Register(width=width) if width == wanted.itemsize or wanted == np.bool_:
                return lambda b, s: b.get(operand, s).view(wanted)
            case Register(width=width) if width > wanted.itemsize:
                narrow = _bits(wanted.itemsize)
                return lambda b, s: b.get(operand, s).astype(narrow).view(wanted)
            case Negated(register=register):
                return lambda b, s: ~b.get(register, s)  # type: ignore[operator]
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
        parts = [self.read(item, f"b{8 * width}", what) for item in items]

        def pack(b: Batch, s: Selection) -> Array:
            values = np.broadcast_arrays(*(part(b, s) for part in parts))
            return np.stack(values, axis=1).view(wanted).ravel()

        return pack

    def write(self, operand: Operand | None, what: Instruction) -> Write:
        """How to write a result, of any type, to a destination."""
        match operand:
            case None:
                return lambda b, s, value: None
            case Register(width=width):
                return lambda b, s, value: b.put(operand, s, _widen(value, width))
            case Vector(items=items):
                writers = [self.write(item, what) for item in items]

                def unpack(b: Batch, s: Selection, value: Array) -> None:
                    part = _bits(value.dtype.itemsize // len(writers))
                    columns = value.view(part).reshape(-1, len(writers))
                    for index, writer in enumerate(writers):
                        writer(b, s, columns[:, index].copy())

                return unpack
        raise UnsupportedInstruction(what.text)

    # Instructions

    def step(self, what: Instruction) -> Step:
        """The step of a plain instruction, with its guard."""
        step = self._plain(what)
        if what.guard is None:
            return step
        guard, wrong = what.guard, what.negated

        def guarded(b: Batch, s: Selection) -> None:
            taken = b.get(guard, s) != wrong
            if taken.all():
                step(b, s)
            elif taken.any():
                step(b, b.lanes(s)[taken])

        return guarded

    def _plain(self, what: Instruction) -> Step:
        name = what.name
        if name in _IGNORED:
            return lambda b, s: None
        special = getattr(self, f"_{name}", None)
        if special is not None and name not in ("read", "write", "plain", "symbol", "pack"):
            return special(what)
        return self._compute(what)

    def _compute(self, what: Instruction) -> Step:
        kind = what.opcode[-1]
        function = arithmetic.operation(what.opcode, kind)
        if function is None:
            raise UnsupportedInstruction(what.text)
        kinds = self._source_kinds(what, kind)
        sources = [self.read(o, k, what) for o, k in zip(what.operands[1:], kinds, strict=True)]
        write = self.write(what.operands[0], what)
        if kind in _HALVES:
            return lambda b, s: write(
                b, s, function(*(r(b, s) for r in sources)).view(np.uint32)[:, 0].copy()
            )
        return lambda b, s: write(b, s, function(*(r(b, s) for r in sources)))

    def _source_kinds(self, what: Instruction, kind: str) -> list[str]:
        many = len(what.operands) - 1
        if what.name in ("shl", "shr"):
            return [kind, "u32"]
        if what.name == "bfe":
            return [kind, "u32", "u32"]
        if what.name == "bfi":
            return [kind, kind, "u32", "u32"]
        if what.name == "mad" and "wide" in what.opcode:
            return [kind, kind, f"{kind[0]}{2 * int(kind[1:])}"]
        return [kind] * many

    def _mov(self, what: Instruction) -> Step:
        kind = what.opcode[-1]
        write, read = self.write(what.operands[0], what), self.read(what.operands[1], kind, what)
        return lambda b, s: write(b, s, read(b, s).copy())

    def _cvt(self, what: Instruction) -> Step:
        parts = what.opcode[1:]
        target, source = parts[-2:]
        flags = set(parts[:-2])
        write = self.write(what.operands[0], what)
        reads = [self.read(o, source, what) for o in what.operands[1:]]
        if target == "f16x2" and len(reads) == 2:

            def both(b: Batch, s: Selection) -> None:
                high, low = (
                    arithmetic.convert(r(b, s), "f16", source, flags).view(np.uint16) for r in reads
                )
                write(b, s, high.astype(np.uint32) << np.uint32(16) | low)  # type: ignore[operator]

            return both
        if not {target, source} <= arithmetic.TYPES.keys():
            raise UnsupportedInstruction(what.text)
        read = reads[0]
        arithmetic.convert(np.zeros(1, arithmetic.TYPES[source]), target, source, flags)
        return lambda b, s: write(b, s, arithmetic.convert(read(b, s), target, source, flags))

    def _cvta(self, what: Instruction) -> Step:
        space = next(part for part in what.opcode if part.split("::")[0] in _SPACES)
        window = np.uint64(_WINDOWS.get(space.split("::")[0], 0))
        if space == "const" or self._is_variable(what.operands[1], "const", "global"):
            window = np.uint64(0)  # variables of the module carry their window already
        back = "to" in what.opcode
        write, read = self.write(what.operands[0], what), self.read(what.operands[1], "u64", what)
        if back:
            return lambda b, s: write(b, s, read(b, s) - window)  # type: ignore[operator]
        return lambda b, s: write(b, s, read(b, s) + window)  # type: ignore[operator]

    def _is_variable(self, operand: Operand | None, *spaces: str) -> bool:
        return isinstance(operand, Symbol) and self.spaces.get(operand.name) in spaces

    def _isspacep(self, what: Instruction) -> Step:
        space = what.opcode[1].split("::")[0]
        write, read = self.write(what.operands[0], what), self.read(what.operands[1], "u64", what)
        window = np.uint64(_WINDOWS.get(space, 0) >> 56)
        return lambda b, s: write(b, s, (read(b, s) >> np.uint64(56)) == window)  # type: ignore[operator]

    def _setp(self, what: Instruction) -> Step:
        kind, compare = what.opcode[-1], what.opcode[1]
        logic = next(
            (arithmetic.LOGIC[p] for p in what.opcode[2:-1] if p in arithmetic.LOGIC), None
        )
        flush = "ftz" in what.opcode and kind == "f32"
        function = arithmetic.COMPARE.get(compare)
        if function is None or kind not in arithmetic.TYPES:
            raise UnsupportedInstruction(what.text)
        left, right = (self.read(o, kind, what) for o in what.operands[1:3])
        third = self.read(what.operands[3], "pred", what) if logic else None
        target = what.operands[0]
        first, second = (
            (target.first, target.second) if isinstance(target, Pair) else (target, None)
        )
        write, write_other = self.write(first, what), self.write(second, what)

        def step(b: Batch, s: Selection) -> None:
            x, y = left(b, s), right(b, s)
            if flush:
                x, y = arithmetic.flush(x), arithmetic.flush(y)
            result = function(x, y)
            other = ~result
            if logic is not None and third is not None:
                combine = third(b, s)
                result, other = logic(result, combine), logic(other, combine)
            write(b, s, result)
            if second is not None:
                write_other(b, s, other)

        return step

    def _set(self, what: Instruction) -> Step:
        kind, target = what.opcode[-1], what.opcode[-2]
        function = arithmetic.COMPARE.get(what.opcode[1])
        if function is None or len(what.operands) != 3:
            raise UnsupportedInstruction(what.text)
        left, right = (self.read(o, kind, what) for o in what.operands[1:])
        write = self.write(what.operands[0], what)
        yes = np.array(1.0, np.float32) if target == "f32" else np.array(0xFFFFFFFF, np.uint32)
        return lambda b, s: write(
            b, s, np.where(function(left(b, s), right(b, s)), yes, yes.dtype.type(0))
        )

    def _selp(self, what: Instruction) -> Step:
        kind = what.opcode[-1]
        yes, no = (self.read(o, kind, what) for o in what.operands[1:3])
        which = self.read(what.operands[3], "pred", what)
        write = self.write(what.operands[0], what)
        return lambda b, s: write(b, s, np.where(which(b, s), yes(b, s), no(b, s)))

    def _lop3(self, what: Instruction) -> Step:
        sources = [self.read(o, "b32", what) for o in what.operands[1:4]]
        table = what.operands[4]
        if what.opcode != ("lop3", "b32") or not isinstance(table, Immediate):
            raise UnsupportedInstruction(what.text)
        write, bits = self.write(what.operands[0], what), table.bits
        return lambda b, s: write(b, s, arithmetic.logic3(*(r(b, s) for r in sources), bits))

    def _dp4a(self, what: Instruction) -> Step:
        first, second = what.opcode[-2:]
        kinds = (first, second, "s32" if "s32" in (first, second) else "u32")
        sources = [
            self.read(o, kind, what) for o, kind in zip(what.operands[1:], kinds, strict=True)
        ]
        write = self.write(what.operands[0], what)
        return lambda b, s: write(b, s, arithmetic.dot_bytes(*(r(b, s) for r in sources)))

    def _prmt(self, what: Instruction) -> Step:
        if what.opcode != ("prmt", "b32"):
            raise UnsupportedInstruction(what.text)
        sources = [self.read(o, "b32", what) for o in what.operands[1:]]
        write = self.write(what.operands[0], what)
        return lambda b, s: write(b, s, arithmetic.permute_bytes(*(r(b, s) for r in sources)))

    def _shf(self, what: Instruction) -> Step:
        _, side, mode, _ = what.opcode
        sources = [self.read(o, "b32", what) for o in what.operands[1:]]
        write = self.write(what.operands[0], what)
        return lambda b, s: write(
            b,
            s,
            arithmetic.funnel_shift(*(r(b, s) for r in sources), side == "l", mode == "clamp"),
        )

    def _copysign(self, what: Instruction) -> Step:
        kind = what.opcode[-1]
        sign, size = (self.read(o, kind, what) for o in what.operands[1:])
        write = self.write(what.operands[0], what)
        return lambda b, s: write(b, s, np.copysign(size(b, s), sign(b, s)))  # type: ignore[call-overload]

    def _testp(self, what: Instruction) -> Step:
        tests: dict[str, Callable[[Array], Flags]] = {
            "finite": np.isfinite,
            "infinite": np.isinf,
            "notanumber": np.isnan,
            "number": lambda a: ~np.isnan(a),  # type: ignore[call-overload]
        }
        _, test, kind = what.opcode
        if test not in tests:
            raise UnsupportedInstruction(what.text)
        read, write = self.read(what.operands[1], kind, what), self.write(what.operands[0], what)
        return lambda b, s: write(b, s, tests[test](read(b, s)))

    def _activemask(self, what: Instruction) -> Step:
        write = self.write(what.operands[0], what)

        def step(b: Batch, s: Selection) -> None:
            lanes = b.lanes(s)
            bits = np.bincount(b.warp[lanes], np.float64(2) ** (b.thread[lanes] % 32))
            write(b, s, bits[b.warp[lanes]].astype(np.uint32))

        return step

    def _trap(self, what: Instruction) -> Step:
        return lambda b, s: b.fail(faults.Trap, "trap", what, b.lanes(s))

    def _call(self, what: Instruction) -> Step:
        callee = what.operands[1]
        name = callee.name if isinstance(callee, Symbol) else ""
        if name == "__assertfail":
            return lambda b, s: b.fail(faults.Trap, "assertion failed", what, b.lanes(s))
        raise UnsupportedInstruction(what.text)

    # Memory

    def _address(self, what: Instruction, operand: Operand | None) -> Read:
        if not isinstance(operand, Address):
            raise UnsupportedInstruction(what.text)
        offset = np.int64(operand.offset)
        if operand.base is None:
            fixed = np.array([offset])
            return lambda b, s: fixed
        if isinstance(operand.base, Register) and operand.base.width == 4:
            base = self.read(operand.base, "u32", what)
        else:
            base = self.read(operand.base, "u64", what)
        return lambda b, s: base(b, s).astype(np.int64) + offset  # type: ignore[operator]

    def _space(self, what: Instruction) -> str:
        for part in what.opcode:
            if part.split("::")[0] in _SPACES:
                return part.split("::")[0]
        return "generic"

    def _ld(self, what: Instruction) -> Step:
        kind, space = what.opcode[-1], self._space(what)
        many = next((int(p[1:]) for p in what.opcode if p in ("v2", "v4", "v8")), 1)
        address = what.operands[1]
        targets = what.operands[0]
        items = targets.items if isinstance(targets, Vector) else (targets,)
        writers = [self.write(item, what) for item in items]
        wanted = np.dtype(arithmetic.TYPES[kind])
        if space == "param" and isinstance(address, Address):
            base = address.base
            if isinstance(base, Symbol) and base.name in self.local_params:
                return self._load_argument(what, base.name, address.offset, wanted, writers)
            if isinstance(base, Symbol):
                start = self.parameters[base.name][0] + address.offset
                return self._load_parameter(start, wanted, writers)
        load = self._loader(what, space, wanted, many)

        def step(b: Batch, s: Selection) -> None:
            values = load(b, s)
            for index, writer in enumerate(writers):
                writer(b, s, np.ascontiguousarray(values[:, index]))

        return step

    def _load_parameter(
        self, start: int, wanted: np.dtype[np.generic], writers: Sequence[Write]
    ) -> Step:
        def step(b: Batch, s: Selection) -> None:
            for index, writer in enumerate(writers):
                at = start + index * wanted.itemsize
                writer(b, s, b.parameters[at : at + wanted.itemsize].view(wanted).copy())

        return step

    def _argument(self, b: Batch, name: str) -> NDArray[np.uint8]:
        """The bytes of a parameter in a call, per lane."""
        if name not in b.arguments:
            size = -(-self.local_params[name].size // 8) * 8
            b.arguments[name] = np.full((b.size, size), 0xFB, np.uint8)
        return b.arguments[name]

    def _load_argument(
        self,
        what: Instruction,
        name: str,
        offset: int,
        wanted: np.dtype[np.generic],
        writers: Sequence[Write],
    ) -> Step:
        def step(b: Batch, s: Selection) -> None:
            columns = self._argument(b, name)[:, offset:]
            for index, writer in enumerate(writers):
                at = index * wanted.itemsize
                part = np.ascontiguousarray(columns[b.lanes(s), at : at + wanted.itemsize])
                writer(b, s, part.view(wanted).ravel())

        return step

    def _st(self, what: Instruction) -> Step:
        kind, space = what.opcode[-1], self._space(what)
        values = what.operands[1]
        items = values.items if isinstance(values, Vector) else (values,)
        reads = [self.read(item, kind, what) for item in items]
        wanted = np.dtype(arithmetic.TYPES[kind])
        address = what.operands[0]
        if space == "param":
            if not (isinstance(address, Address) and isinstance(address.base, Symbol)):
                raise UnsupportedInstruction(what.text)
            name, offset = address.base.name, address.offset

            def pass_argument(b: Batch, s: Selection) -> None:
                rows = self._argument(b, name)
                for index, read in enumerate(reads):
                    at = offset + index * wanted.itemsize
                    value = np.broadcast_to(read(b, s), b.lanes(s).shape)
                    octets = np.ascontiguousarray(value).view(np.uint8)
                    rows[b.lanes(s), at : at + wanted.itemsize] = octets.reshape(len(value), -1)

            return pass_argument
        return self._storer(what, space, wanted, reads)

    def _loader(
        self, what: Instruction, space: str, wanted: np.dtype[np.generic], many: int
    ) -> Callable[[Batch, Selection], Array]:
        address = self._address(what, what.operands[1])
        size, strong = wanted.itemsize * many, not _STRONG.isdisjoint(what.opcode)
        constant = "nc" in what.opcode

        def pick(octets: NDArray[np.uint8], at: NDArray[np.int64]) -> Array:
            if many == 1:
                return octets.view(wanted)[at // size][:, None]
            return octets.view(wanted)[(at // wanted.itemsize)[:, None] + np.arange(many)]

        def load_global(b: Batch, s: Selection, where: NDArray[np.int64]) -> Array:
            parts = b.reach_global(where, size, s, what)
            values = []
            for index, offsets, chosen in parts:
                segment = b.reach.segments[index]
                lanes = b.lanes(chosen)
                marks = segment.allocation.written
                if marks is not None:
                    fresh = ~marks[offsets[:, None] + np.arange(size)].all(axis=1)
                    if fresh.any():
                        bad = lanes[fresh] if len(fresh) > 1 else lanes
                        b.fail(faults.UninitializedRead, "global memory nothing wrote", what, bad)
                if constant and segment.was_written(offsets):
                    b.fail(
                        faults.Race,
                        "read through the read-only cache what this launch writes",
                        what,
                        lanes,
                    )
                race = None if strong else segment.read(offsets, size, b.moment(chosen))
                if race is not None:
                    b.fail(
                        faults.Race,
                        "reads what another thread writes, in no order",
                        what,
                        lanes[race],
                    )
                values.append(pick(segment.allocation.bytes, offsets))
            if len(values) == 1:
                return values[0]
            result = np.empty((len(b.lanes(s)), many), wanted)
            order = np.concatenate([b.lanes(chosen) for _, _, chosen in parts])
            result[np.searchsorted(b.lanes(s), order)] = np.concatenate(values)
            return result

        def load_shared(b: Batch, s: Selection, where: NDArray[np.int64]) -> Array:
            b.check_layout("shared", where, size, s, what)
            at, now, shadow = b.shared_cells(where, size, s)
            lanes = b.lanes(s)
            fresh = (shadow.writer[at] < 0).reshape(len(lanes), -1).any(axis=1)
            if fresh.any():
                b.fail(faults.UninitializedRead, "shared memory nothing wrote", what, lanes[fresh])
            if not strong:
                race = shadow.read(at, now)
                if race is not None:
                    b.fail(
                        faults.Race,
                        "reads shared memory that another thread writes, with no barrier between",
                        what,
                        lanes[race.reshape(len(lanes), -1).any(axis=1)],
                    )
            return pick(b.shared_bytes, b.shared_place(where, s))

        def load_local(b: Batch, s: Selection, where: NDArray[np.int64]) -> Array:
            b.check_layout("local", where, size, s, what)
            place = b.local_place(where, s)
            if b.local_bytes is None:
                raise AssertionError
            return pick(b.local_bytes, place)

        def load_const(b: Batch, s: Selection, where: NDArray[np.int64]) -> Array:
            b.check_layout("const", where, size, s, what)
            return pick(b.layouts["const"].data, where)

        def load_param(b: Batch, s: Selection, where: NDArray[np.int64]) -> Array:
            outside = (where < 0) | (where + size > len(b.parameters))
            if outside.any():
                b.fail(faults.OutOfBounds, "beyond the parameters", what, b.lanes(s))
            if (where & (size - 1)).any():
                b.fail(faults.Misaligned, f"address not a multiple of {size}", what, b.lanes(s))
            octets = b.parameters
            return pick(octets[: len(octets) // 16 * 16], where)

        own = {
            "global": load_global,
            "shared": load_shared,
            "local": load_local,
            "const": load_const,
            "param": load_param,
        }

        def load(b: Batch, s: Selection) -> Array:
            where = address(b, s)
            if space in ("shared", "local", "param"):
                return own[space](b, s, where)  # type: ignore[arg-type]
            return _by_window(b, s, where, own, (many, wanted))  # type: ignore[arg-type]

        return load

    def _storer(
        self,
        what: Instruction,
        space: str,
        wanted: np.dtype[np.generic],
        reads: Sequence[Read],
    ) -> Step:
        address, many = self._address(what, what.operands[0]), len(reads)
        size, strong = wanted.itemsize * many, not _STRONG.isdisjoint(what.opcode)

        def put(octets: NDArray[np.uint8], at: NDArray[np.int64], values: Array) -> Flags:
            """Store; True where another lane's different value won."""
            cells = octets.view(wanted)
            if many == 1:
                place = at // size
                cells[place] = values[:, 0]
            else:
                place = (at // wanted.itemsize)[:, None] + np.arange(many)
                cells[place] = values
            kind = _bits(wanted.itemsize)
            stored = cells[place].reshape(len(at), -1).view(kind)
            return (stored != np.ascontiguousarray(values).view(kind)).any(axis=1)

        def store_global(b: Batch, s: Selection, where: NDArray[np.int64], values: Array) -> None:
            order = b.lanes(s)
            for index, offsets, chosen in b.reach_global(where, size, s, what):
                segment = b.reach.segments[index]
                lanes = b.lanes(chosen)
                offsets = np.broadcast_to(offsets, lanes.shape)
                own = values if len(lanes) == len(order) else values[np.searchsorted(order, lanes)]
                bad, twice = segment.write(offsets, size, b.moment(chosen), atomic=strong)
                if bad is not None:
                    b.fail(
                        faults.Race,
                        "writes what another thread reads or writes, in no order",
                        what,
                        lanes[bad],
                    )
                lost = put(segment.allocation.bytes, offsets, own)
                if twice is not None and (twice & lost).any():
                    b.fail(faults.Race, "lanes write different values", what, lanes[twice & lost])
                if segment.allocation.written is not None:
                    segment.allocation.written[offsets[:, None] + np.arange(size)] = True

        def store_shared(b: Batch, s: Selection, where: NDArray[np.int64], values: Array) -> None:
            b.check_layout("shared", where, size, s, what)
            at, now, shadow = b.shared_cells(where, size, s)
            lanes = b.lanes(s)
            bad, twice = shadow.write(at, now, atomic=strong)
            if bad is not None:
                b.fail(
                    faults.Race,
                    "writes shared memory that another thread uses, with no barrier between",
                    what,
                    lanes[bad.reshape(len(lanes), -1).any(axis=1)],
                )
            lost = put(b.shared_bytes, b.shared_place(where, s), values)
            if twice is not None:
                both = twice.reshape(len(lanes), -1).any(axis=1) & lost
                if both.any():
                    b.fail(
                        faults.Race,
                        "lanes write different values to shared memory",
                        what,
                        lanes[both],
                    )

        def store_local(b: Batch, s: Selection, where: NDArray[np.int64], values: Array) -> None:
            b.check_layout("local", where, size, s, what)
            place = b.local_place(where, s)
            if b.local_bytes is None:
                raise AssertionError
            put(b.local_bytes, place, values)

        def store_const(b: Batch, s: Selection, where: NDArray[np.int64], values: Array) -> None:
            raise UnsupportedInstruction(f"store to a variable of the module: {what.text}")

        own = {
            "global": store_global,
            "shared": store_shared,
            "local": store_local,
            "const": store_const,
        }

        def step(b: Batch, s: Selection) -> None:
            where = address(b, s)
            lanes = b.lanes(s)
            values = np.stack([np.broadcast_to(r(b, s), lanes.shape) for r in reads], axis=1)
            if space in ("shared", "local"):
                own[space](b, s, where, values)  # type: ignore[arg-type]
                return
            window = where >> 56  # type: ignore[operator]
            if (window == window[0]).all():
                name = _NAMES[int(window[0])]
                own[name](b, s, where & _INSIDE, values)  # type: ignore[operator]
                return
            for one in np.unique(window):
                mine = np.flatnonzero(window == one)
                own[_NAMES[int(one)]](b, lanes[mine], where[mine] & _INSIDE, values[mine])  # type: ignore[operator]

        return step

    def _atom(self, what: Instruction) -> Step:
        return self._atomic(what, what.operands[0], what.operands[1], what.operands[2:])

    def _red(self, what: Instruction) -> Step:
        return self._atomic(what, None, what.operands[0], what.operands[1:])

    def _atomic(
        self,
        what: Instruction,
        target: Operand | None,
        place: Operand | None,
        sources: Sequence[Operand | None],
    ) -> Step:
        kind, space = what.opcode[-1], self._space(what)
        name = next((p for p in what.opcode if p in _ATOMICS), None)
        if name is None or kind not in arithmetic.TYPES:
            raise UnsupportedInstruction(what.text)
        change, wanted = _ATOMICS[name], np.dtype(arithmetic.TYPES[kind])
        size = wanted.itemsize
        address, write = self._address(what, place), self.write(target, what)
        reads = [self.read(o, kind, what) for o in sources]

        def apply(octets: NDArray[np.uint8], at: NDArray[np.int64], values: list[Array]) -> Array:
            """One lane after the other at each address: in every round, one lane of each."""
            cells, index = octets.view(wanted), at // size
            old = np.empty(len(at), wanted)
            left = np.arange(len(at))
            while left.size:
                _, first = np.unique(index[left], return_index=True)
                now = left[first]
                old[now] = cells[index[now]]
                cells[index[now]] = change(old[now], *(v[now] for v in values))
                left = np.delete(left, first)
            return old

        def step(b: Batch, s: Selection) -> None:
            lanes = b.lanes(s)
            where = np.broadcast_to(address(b, s), lanes.shape)
            values = [np.broadcast_to(r(b, s), lanes.shape) for r in reads]
            if space == "shared" or (space == "generic" and (where >> 56 == SHARED >> 56).all()):  # type: ignore[operator]
                where = where & _INSIDE  # type: ignore[operator]
                b.check_layout("shared", where, size, s, what)
                at, now, shadow = b.shared_cells(where, size, s)
                fresh = shadow.writer[at] < 0
                if fresh.any():
                    b.fail(
                        faults.UninitializedRead,
                        "shared memory nothing wrote",
                        what,
                        lanes[fresh.reshape(len(lanes), -1).any(axis=1)],
                    )
                bad, _ = shadow.write(at, now, atomic=True)
                race = None if bad is None else bad.reshape(len(lanes), -1).any(axis=1)
                old = apply(b.shared_bytes, b.shared_place(where, s), values)
            else:
                parts = b.reach_global(where, size, s, what)
                if len(parts) != 1:
                    raise UnsupportedInstruction(f"one atomic on several arrays: {what.text}")
                index, offsets, _ = parts[0]
                segment = b.reach.segments[index]
                marks = segment.allocation.written
                if marks is not None and not marks[offsets[:, None] + np.arange(size)].all():
                    b.fail(faults.UninitializedRead, "global memory nothing wrote", what, lanes)
                race, _ = segment.write(offsets, size, b.moment(s), atomic=True)
                old = apply(segment.allocation.bytes, offsets, values)
            if race is not None:
                b.fail(faults.Race, "atomic on what others use without one", what, lanes[race])
            write(b, s, old)

        return step

    # How blocks end

    def end(self, at: int, what: Instruction) -> Step | None:
        """How a block ends at instruction `at`; ``None`` for a plain instruction."""
        name = what.name
        if name in ("bra", "brx"):
            return self._branch(at, what)
        if name in ("ret", "exit"):
            return self._leave(at, what)
        if name in ("bar", "barrier"):
            return self._barrier(at, what)
        sync = {
            "shfl": self._shuffle,
            "vote": self._vote,
            "match": self._match,
            "redux": self._reduce,
        }
        if name in sync:
            if "sync" not in what.opcode:
                raise UnsupportedInstruction(what.text)
            return self._at_warp(at, what, what.operands[-1], sync[name](what))
        return None

    def _leave(self, at: int, what: Instruction) -> Step:
        return self._split(what, lambda b, s: b.leave(s), at + 1)

    def _split(self, what: Instruction, act: Step, after: int) -> Step:
        """`act` for the lanes whose guard holds; the others go on."""
        if what.guard is None:
            return act
        guard, wrong = what.guard, what.negated

        def step(b: Batch, s: Selection) -> None:
            taken = b.get(guard, s) != wrong
            if taken.all():
                act(b, s)
            elif not taken.any():
                b.schedule(after, s)
            else:
                lanes = b.lanes(s)
                act(b, lanes[taken])
                b.schedule(after, lanes[~taken])

        return step

    def _branch(self, at: int, what: Instruction) -> Step:
        if what.name == "bra":
            target = what.operands[0]
            if not isinstance(target, Symbol):
                raise UnsupportedInstruction(what.text)
            place = self.function.labels[target.name]
            return self._split(what, lambda b, s: b.schedule(place, s), at + 1)
        table = what.operands[1]
        if not isinstance(table, Symbol):
            raise UnsupportedInstruction(what.text)
        places = np.array([self.function.labels[t] for t in self.function.tables[table.name]])
        read = self.read(what.operands[0], "u32", what)

        def jump(b: Batch, s: Selection) -> None:
            lanes = b.lanes(s)
            index = np.broadcast_to(read(b, s), lanes.shape)
            if (index >= len(places)).any():
                b.fail(faults.Trap, "jump beyond its table", what, lanes[index >= len(places)])
            for one in np.unique(index):
                b.schedule(int(places[one]), lanes[index == one])

        return self._split(what, jump, at + 1)

    def _barrier(self, at: int, what: Instruction) -> Step:
        if "warp" in what.opcode:

            def order(b: Batch, lanes: Lanes, masks: NDArray[np.uint32]) -> None:
                b.clock.pass_warp_barrier(lanes, masks)

            return self._at_warp(at, what, what.operands[0], order)
        if "arrive" in what.opcode:
            raise UnsupportedInstruction(what.text)
        operands, fire = list(what.operands), _nothing
        if "red" in what.opcode:
            target, *operands, source = operands
            fire = self._barrier_reduction(what, target, source)
        name = self.read(operands[0], "u32", what)
        count = self.read(operands[1], "u32", what) if len(operands) > 1 else None

        def step(b: Batch, s: Selection) -> None:
            lanes = b.lanes(s)
            names = np.broadcast_to(name(b, s), lanes.shape).astype(np.uint32)
            wanted = 0 if count is None else int(count(b, s)[0])
            if wanted == b.threads:
                wanted = 0
            b.arrive_barrier(at, Waiting(lanes, fire, what, names, wanted, at + 1))

        return self._split(what, step, at + 1)

    def _barrier_reduction(
        self, what: Instruction, target: Operand | None, source: Operand | None
    ) -> Callable[[Batch, Lanes], None]:
        write, read = self.write(target, what), self.read(source, "pred", what)

        def fire(b: Batch, lanes: Lanes) -> None:
            chosen = None if len(lanes) == b.size else lanes
            holds = np.broadcast_to(read(b, chosen), lanes.shape)
            block = b.block[lanes]
            count = np.bincount(block, holds, b.blocks)[block].astype(np.uint32)
            total = np.bincount(block, minlength=b.blocks)[block]
            if "popc" in what.opcode:
                write(b, chosen, count)
            else:
                write(b, chosen, count == total if "and" in what.opcode else count > 0)

        return fire

    def _at_warp(
        self,
        at: int,
        what: Instruction,
        mask: Operand | None,
        act: Callable[[Batch, Lanes, NDArray[np.uint32]], None],
    ) -> Step:
        read = self.read(mask, "u32", what)

        def step(b: Batch, s: Selection) -> None:
            masks = np.broadcast_to(read(b, s).view(np.uint32), b.lanes(s).shape)
            waiting = Waiting(b.lanes(s), lambda b, lanes: None, what, masks, 0, at + 1)
            waiting.fire = lambda b, lanes: act(
                b, lanes, np.broadcast_to(read(b, _narrow(b, lanes)), lanes.shape).view(np.uint32)
            )
            b.arrive_warp(at, waiting)

        return self._split(what, step, at + 1)

    def _shuffle(self, what: Instruction) -> Callable[[Batch, Lanes, NDArray[np.uint32]], None]:
        target = what.operands[0]
        first, second = (
            (target.first, target.second) if isinstance(target, Pair) else (target, None)
        )
        write, write_inside = self.write(first, what), self.write(second, what)
        source = self.read(what.operands[1], "b32", what)
        amount, clamp = (self.read(o, "u32", what) for o in what.operands[2:4])
        mode = next(p for p in what.opcode if p in ("up", "down", "bfly", "idx"))

        def act(b: Batch, lanes: Lanes, masks: NDArray[np.uint32]) -> None:
            chosen = _narrow(b, lanes)
            lane = (b.thread[lanes] % 32).astype(np.int64)
            step = amount(b, chosen).astype(np.int64) & 31
            limit = clamp(b, chosen).astype(np.int64)
            segment = limit >> 8 & 31
            last = (lane & segment) | (limit & 31 & ~segment)
            if mode == "up":
                other = lane - step
                inside = other >= last
            elif mode == "idx":
                other = (lane & segment) | (step & ~segment)
                inside = other <= last
            else:
                other = lane + step if mode == "down" else lane ^ step
                inside = other <= last
            other = np.where(inside, other, lane)
            here = np.zeros(b.size + 32, bool)
            here[lanes] = True
            place = lanes - lane + other
            exists = b.thread[lanes] - lane + other < b.threads
            named = (masks.astype(np.int64) >> other) & 1 == 1
            absent = ~(exists & named & here[np.where(exists, place, 0)])
            if absent.any():
                number = int(other[np.flatnonzero(absent)[0]])
                b.fail(
                    faults.AbsentLane,
                    f"reads lane {number}, which does not take part",
                    what,
                    lanes[absent],
                )
            values = source(b, None)
            write(b, chosen, values[place] if len(values) > 1 else values.copy())
            if second is not None:
                write_inside(b, chosen, inside)

        return act

    def _vote(self, what: Instruction) -> Callable[[Batch, Lanes, NDArray[np.uint32]], None]:
        write = self.write(what.operands[0], what)
        read = self.read(what.operands[1], "pred", what)
        mode = next(p for p in what.opcode if p in ("all", "any", "uni", "ballot"))

        def act(b: Batch, lanes: Lanes, masks: NDArray[np.uint32]) -> None:
            chosen = _narrow(b, lanes)
            holds = np.broadcast_to(read(b, chosen), lanes.shape)
            group = _groups(b, lanes, masks)
            bits = np.where(holds, np.float64(2) ** (b.thread[lanes] % 32), 0)
            if mode == "ballot":
                write(b, chosen, np.bincount(group, bits)[group].astype(np.uint32))
                return
            count, total = np.bincount(group, holds)[group], np.bincount(group)[group]
            result = {"all": count == total, "any": count > 0}.get(
                mode, (count == 0) | (count == total)
            )
            write(b, chosen, result)

        return act

    def _match(self, what: Instruction) -> Callable[[Batch, Lanes, NDArray[np.uint32]], None]:
        target = what.operands[0]
        first, second = (
            (target.first, target.second) if isinstance(target, Pair) else (target, None)
        )
        write, write_all = self.write(first, what), self.write(second, what)
        read = self.read(what.operands[1], what.opcode[-1], what)
        everyone = "all" in what.opcode

        def act(b: Batch, lanes: Lanes, masks: NDArray[np.uint32]) -> None:
            chosen = _narrow(b, lanes)
            value = np.broadcast_to(read(b, chosen), lanes.shape)
            group = _groups(b, lanes, masks)
            _, alike = np.unique(np.stack((group, value)), axis=1, return_inverse=True)
            alike = alike.ravel()
            bits = np.float64(2) ** (b.thread[lanes] % 32)
            same = np.bincount(alike, bits)[alike].astype(np.uint32)
            whole = np.bincount(group, bits)[group].astype(np.uint32)
            if everyone:
                same = np.where(same == whole, same, np.uint32(0))
            write(b, chosen, same)
            if second is not None:
                write_all(b, chosen, same == whole)

        return act

    def _reduce(self, what: Instruction) -> Callable[[Batch, Lanes, NDArray[np.uint32]], None]:
        kind = what.opcode[-1]
        write, read = self.write(what.operands[0], what), self.read(what.operands[1], kind, what)
        joins = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }
        join = next((joins[p] for p in what.opcode if p in joins), None)
        if join is None:
            raise UnsupportedInstruction(what.text)

        def act(b: Batch, lanes: Lanes, masks: NDArray[np.uint32]) -> None:
            chosen = _narrow(b, lanes)
            value = np.broadcast_to(read(b, chosen), lanes.shape)
            group = _groups(b, lanes, masks)
            order = np.argsort(group, kind="stable")
            starts = np.flatnonzero(np.diff(group[order], prepend=-1))
            write(b, chosen, join.reduceat(value[order], starts)[group])

        return act


def _nothing(b: Batch, lanes: Lanes) -> None:
    """A plain barrier moves no data."""


def _narrow(b: Batch, lanes: Lanes) -> Selection:
    return None if len(lanes) == b.size else lanes


def _groups(b: Batch, lanes: Lanes, masks: NDArray[np.uint32]) -> NDArray[np.intp]:
    """A number per lane: the same for the lanes of one warp that share a mask."""
    key = (b.warp[lanes].astype(np.int64) << 32) | masks
    return np.unique(key, return_inverse=True)[1].ravel()


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
    return np.array([bits], _bits(wanted.itemsize)).view(wanted)


_HALVES = {"f16x2": np.float16, "u16x2": np.uint16, "s16x2": np.int16}
"""Types that hold two values in one register."""

_NAMES = {0: "global", 1: "shared", 2: "local", 3: "const", 4: "param"}
_INSIDE = np.int64((1 << 56) - 1)


def _by_window(
    b: Batch,
    s: Selection,
    where: NDArray[np.int64],
    own: dict[str, Callable[[Batch, Selection, NDArray[np.int64]], Array]],
    shape: tuple[int, np.dtype[np.generic]],
) -> Array:
    """A generic load: each lane reads the memory that its address lies in."""
    window = where >> 56
    if (window == window[0]).all():
        return own[_NAMES.get(int(window[0]), "global")](b, s, where & _INSIDE)
    lanes = b.lanes(s)
    result = np.empty((len(lanes), shape[0]), shape[1])
    for one in np.unique(window):
        mine = np.flatnonzero(window == one)
        name = _NAMES.get(int(one), "global")
        result[mine] = own[name](b, lanes[mine], where[mine] & _INSIDE)
    return result


_ATOMICS: dict[str, Callable[..., Array]] = {
    "add": lambda old, a: old + a,
    "min": lambda old, a: np.minimum(old, a),
    "max": lambda old, a: np.maximum(old, a),
    "and": lambda old, a: old & a,
    "or": lambda old, a: old | a,
    "xor": lambda old, a: old ^ a,
    "exch": lambda old, a: a,
    "cas": lambda old, a, b: np.where(old == a, b, old),
    "inc": lambda old, a: np.where(old >= a, 0, old + 1).astype(old.dtype),
    "dec": lambda old, a: np.where((old == 0) | (old > a), a, old - 1).astype(old.dtype),
}


@functools.lru_cache(maxsize=512)
def assemble(compiled: Compiled, name: str, title: str) -> Kernel:
    """Make the kernel `name` of a compiled source ready to run; faults call it `title`."""
    program = parse(compiled.ptx)
    if name not in program.functions:
        raise LookupError(f"no kernel {name} in the module; it has {sorted(program.functions)}")
    function = inline_calls(program.functions[name], program)
    assembler = _Assembler(function, program)
    body = function.body
    ends = {at: assembler.end(at, what) for at, what in enumerate(body)}
    leaders = {0, *function.labels.values()}
    leaders |= {at + 1 for at, end in ends.items() if end is not None}
    leaders = {at for at in leaders if at < len(body)}
    blocks, lines = {}, {}
    for start in sorted(leaders):
        steps: list[Step] = []
        at = start
        while at < len(body) and ends[at] is None:
            steps.append(assembler.step(body[at]))
            at += 1
            if at in leaders:
                break
        if at < len(body) and ends[at] is not None and (at == start or at not in leaders):
            end, length = ends[at], at + 1 - start
        elif at >= len(body):
            end, length = (lambda b, s: b.leave(s)), at - start
        else:
            end, length = functools.partial(_go_on, at), at - start
        assert end is not None
        blocks[start] = Block(start, tuple(steps), end, length)
        lines[start] = frozenset(i.line for i in body[start : start + length] if i.line[1])
    return Kernel(
        name,
        title,
        compiled.arch,
        function,
        program,
        compiled.source,
        blocks,
        assembler.parameters,
        assembler.parameter_bytes,
        lines,
    )


def _go_on(place: int, b: Batch, s: Selection) -> None:
    b.schedule(place, s)
