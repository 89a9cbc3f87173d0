"""Loads, stores and atomics, with every check on what they touch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from tests.ptx import arithmetic, faults
from tests.ptx.machine import Batch, Selection, Step
from tests.ptx.operands import SPACES, Array, Operands, Read, Write, bits_of
from tests.ptx.program import (
    Address,
    Instruction,
    Operand,
    Register,
    Symbol,
    UnsupportedInstruction,
    Vector,
)
from tests.ptx.races import Flags, Lanes

_STRONG = {"volatile", "relaxed", "acquire", "release", "mmio"}
_NAMES = {0: "global", 1: "shared", 2: "local", 3: "const", 4: "param"}
_INSIDE = np.int64((1 << 56) - 1)


def _windows(
    space: str, where: NDArray[np.int64]
) -> Iterator[tuple[str, Selection, NDArray[np.int64]]]:
    """The memories that addresses lie in: name, which of them (``None``: all), places there."""
    window = where >> 56
    if space in ("shared", "local", "param"):
        yield space, None, where
    elif (window == window[0]).all():
        yield _place(int(window[0]), where, None)
    else:
        for one in np.unique(window):
            yield _place(int(one), where, np.flatnonzero(window == one))


def _place(
    window: int, where: NDArray[np.int64], mine: Selection
) -> tuple[str, Selection, NDArray[np.int64]]:
    own = where if mine is None else where[mine]
    return (_NAMES[window], mine, own & _INSIDE) if window in _NAMES else ("global", mine, own)


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


class Accesses(Operands):
    """The instructions that touch memory."""

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
        return lambda b, s: base(b, s).astype(np.int64) + offset

    def _space(self, what: Instruction) -> str:
        for part in what.opcode:
            if part.split("::")[0] in SPACES:
                return part.split("::")[0]
        return "generic"

    def do_ld(self, what: Instruction) -> Step:
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

    def do_st(self, what: Instruction) -> Step:
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
                if constant and segment.was_written(offsets, size):
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
            fresh = ~shadow.written(at).reshape(len(lanes), -1).all(axis=1)
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
            place, lanes = b.local_place(where, s), b.lanes(s)
            fresh = ~b.local_written[place[:, None] + np.arange(size)].all(axis=1)
            if fresh.any():
                b.fail(faults.UninitializedRead, "local memory nothing wrote", what, lanes[fresh])
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
            parts, lanes = list(_windows(space, address(b, s))), b.lanes(s)
            name, everyone, at = parts[0]
            if everyone is None:
                return own[name](b, s, at)
            result = np.empty((len(lanes), many), wanted)
            for name, mine, at in parts:
                result[mine] = own[name](b, lanes[mine], at)
            return result

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
            kind = bits_of(wanted.itemsize)
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
            put(b.local_bytes, place, values)
            b.local_written[place[:, None] + np.arange(size)] = True

        def store_const(b: Batch, s: Selection, where: NDArray[np.int64], values: Array) -> None:
            raise UnsupportedInstruction(f"store to a variable of the module: {what.text}")

        own = {
            "global": store_global,
            "shared": store_shared,
            "local": store_local,
            "const": store_const,
            "param": store_const,
        }

        def step(b: Batch, s: Selection) -> None:
            lanes = b.lanes(s)
            values = np.stack([np.broadcast_to(r(b, s), lanes.shape) for r in reads], axis=1)
            for name, mine, at in _windows(space, address(b, s)):
                if mine is None:
                    own[name](b, s, at, values)
                else:
                    own[name](b, lanes[mine], at, values[mine])

        return step

    def do_atom(self, what: Instruction) -> Step:
        return self._atomic(what, what.operands[0], what.operands[1], what.operands[2:])

    def do_red(self, what: Instruction) -> Step:
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

        def fail(b: Batch, race: Flags | None, lanes: Lanes) -> None:
            if race is not None:
                b.fail(faults.Race, "atomic on what others use without one", what, lanes[race])

        def change_shared(
            b: Batch, lanes: Lanes, where: NDArray[np.int64], values: list[Array]
        ) -> Array:
            b.check_layout("shared", where, size, lanes, what)
            at, now, shadow = b.shared_cells(where, size, lanes)
            fresh = ~shadow.written(at).reshape(len(lanes), -1).all(axis=1)
            if fresh.any():
                b.fail(faults.UninitializedRead, "shared memory nothing wrote", what, lanes[fresh])
            race, _ = shadow.write(at, now, atomic=True)
            fail(b, None if race is None else race.reshape(len(lanes), -1).any(axis=1), lanes)
            return apply(b.shared_bytes, b.shared_place(where, lanes), values)

        def change_global(
            b: Batch, lanes: Lanes, where: NDArray[np.int64], values: list[Array]
        ) -> Array:
            old = np.empty(len(lanes), wanted)
            for index, offsets, chosen in b.reach_global(where, size, lanes, what):
                segment, own = b.reach.segments[index], b.lanes(chosen)
                marks = segment.allocation.written
                if marks is not None:
                    fresh = ~marks[offsets[:, None] + np.arange(size)].all(axis=1)
                    if fresh.any():
                        b.fail(
                            faults.UninitializedRead,
                            "global memory nothing wrote",
                            what,
                            own[fresh],
                        )
                fail(b, segment.write(offsets, size, b.moment(own), atomic=True)[0], own)
                mine = np.searchsorted(lanes, own)
                old[mine] = apply(segment.allocation.bytes, offsets, [v[mine] for v in values])
            return old

        own = {"shared": change_shared, "global": change_global}

        def step(b: Batch, s: Selection) -> None:
            lanes, old = b.lanes(s), np.empty(len(b.lanes(s)), wanted)
            where = np.broadcast_to(address(b, s), lanes.shape)
            values = [np.broadcast_to(r(b, s), lanes.shape) for r in reads]
            for name, mine, at in _windows(space, where):
                if name not in own:
                    raise UnsupportedInstruction(f"atomic on {name} memory: {what.text}")
                chosen = np.arange(len(lanes)) if mine is None else mine
                old[chosen] = own[name](b, lanes[chosen], at, [v[chosen] for v in values])
            write(b, s, old)

        return step
