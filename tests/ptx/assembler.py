"""Instructions to steps: each becomes a function of the batch and the lanes that execute it."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable

import numpy as np

from tests.ptx import arithmetic, faults
from tests.ptx.accesses import Accesses
from tests.ptx.compiler import Compiled
from tests.ptx.crossings import Crossings
from tests.ptx.machine import Batch, Block, Kernel, Selection, Step
from tests.ptx.operands import HALVES, SPACES, WINDOWS, Array, bits_of
from tests.ptx.program import (
    Immediate,
    Instruction,
    Operand,
    Pair,
    Symbol,
    UnsupportedInstruction,
    inline_calls,
    parse,
)
from tests.ptx.races import Flags

_IGNORED = {"membar", "fence", "nanosleep", "pmevent", "brkpt", "prefetch", "prefetchu"}


class Assembler(Accesses, Crossings):
    """The steps of one function."""

    def step(self, what: Instruction) -> Step:
        """The step of a plain instruction, with its guard."""
        step = self._plain(what)
        if what.guard is None:
            return step
        guard, wrong = self.predicate(what.guard, what), what.negated

        def guarded(b: Batch, s: Selection) -> None:
            taken = guard(b, s) != wrong
            if taken.all():
                step(b, s)
            elif taken.any():
                step(b, b.lanes(s)[taken])

        return guarded

    def _plain(self, what: Instruction) -> Step:
        name = what.name
        if name in _IGNORED:
            return lambda b, s: None
        special: Callable[[Instruction], Step] | None = getattr(self, f"do_{name}", None)
        return self._compute(what) if special is None else special(what)

    def _compute(self, what: Instruction) -> Step:
        kind = what.opcode[-1]
        function = arithmetic.operation(what.opcode, kind)
        if function is None:
            raise UnsupportedInstruction(what.text)
        kinds = self._source_kinds(what, kind)
        sources = [self.read(o, k, what) for o, k in zip(what.operands[1:], kinds, strict=True)]
        write = self.write(what.operands[0], what)
        if kind in HALVES:
            return lambda b, s: write(
                b, s, function(*(r(b, s) for r in sources)).view(np.uint32)[:, 0].copy()
            )
        if len(sources) == 2:  # most instructions
            first, second = sources
            return lambda b, s: write(b, s, function(first(b, s), second(b, s)))
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

    def do_mov(self, what: Instruction) -> Step:
        kind, (target, source) = what.opcode[-1], what.operands
        write, read = self.write(target, what), self.take(source, kind, what)
        targets, sources = self.watched(target), self.watched(source)
        if not sources:
            return lambda b, s: write(b, s, read(b, s).copy())

        def move(b: Batch, s: Selection) -> None:
            fresh = b.unwritten_among(sources, s)
            write(b, s, read(b, s).copy())
            for register in targets:
                b.mark_unwritten(register, s, fresh)

        return move

    def do_cvt(self, what: Instruction) -> Step:
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
                write(b, s, high.astype(np.uint32) << np.uint32(16) | low)

            return both
        if not {target, source} <= arithmetic.TYPES.keys():
            raise UnsupportedInstruction(what.text)
        read = reads[0]
        arithmetic.convert(np.zeros(1, arithmetic.TYPES[source]), target, source, flags)
        return lambda b, s: write(b, s, arithmetic.convert(read(b, s), target, source, flags))

    def do_cvta(self, what: Instruction) -> Step:
        space = next(part for part in what.opcode if part.split("::")[0] in SPACES)
        window = np.uint64(WINDOWS.get(space.split("::")[0], 0))
        if space == "const" or self._is_variable(what.operands[1], "const", "global"):
            window = np.uint64(0)  # variables of the module carry their window already
        back = "to" in what.opcode
        write, read = self.write(what.operands[0], what), self.read(what.operands[1], "u64", what)
        if back:
            return lambda b, s: write(b, s, read(b, s) - window)
        return lambda b, s: write(b, s, read(b, s) + window)

    def _is_variable(self, operand: Operand | None, *spaces: str) -> bool:
        return isinstance(operand, Symbol) and self.spaces.get(operand.name) in spaces

    def do_isspacep(self, what: Instruction) -> Step:
        space = what.opcode[1].split("::")[0]
        write, read = self.write(what.operands[0], what), self.read(what.operands[1], "u64", what)
        window = np.uint64(WINDOWS.get(space, 0) >> 56)
        return lambda b, s: write(b, s, (read(b, s) >> np.uint64(56)) == window)

    def do_setp(self, what: Instruction) -> Step:
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

    def do_set(self, what: Instruction) -> Step:
        kind, target = what.opcode[-1], what.opcode[-2]
        function = arithmetic.COMPARE.get(what.opcode[1])
        if function is None or len(what.operands) != 3:
            raise UnsupportedInstruction(what.text)
        left, right = (self.read(o, kind, what) for o in what.operands[1:])
        write = self.write(what.operands[0], what)
        flush = arithmetic.flush if "ftz" in what.opcode and kind == "f32" else lambda a: a
        if target[0] == "f":
            yes = np.ones((), HALVES.get(target) or arithmetic.TYPES[target])
        else:
            width = 2 if kind in HALVES else int(target[1:]) // 8
            yes = ~np.zeros((), bits_of(width))

        def step(b: Batch, s: Selection) -> None:
            result = function(flush(left(b, s)), flush(right(b, s)))
            value = np.where(result, yes, yes.dtype.type(0))
            write(b, s, value.view(np.uint32)[:, 0].copy() if kind in HALVES else value)

        return step

    def do_selp(self, what: Instruction) -> Step:
        kind = what.opcode[-1]
        target, *parts, condition = what.operands
        yes, no = (self.take(o, kind, what) for o in parts)
        which = self.read(condition, "pred", what)
        write = self.write(target, what)
        targets, (first, second) = self.watched(target), (self.watched(o) for o in parts)
        if not (first or second):
            return lambda b, s: write(b, s, np.where(which(b, s), yes(b, s), no(b, s)))

        def choose(b: Batch, s: Selection) -> None:
            holds = which(b, s)
            fresh = np.where(holds, b.unwritten_among(first, s), b.unwritten_among(second, s))
            write(b, s, np.where(holds, yes(b, s), no(b, s)))
            for register in targets:
                b.mark_unwritten(register, s, fresh)

        return choose

    def do_lop3(self, what: Instruction) -> Step:
        sources = [self.read(o, "b32", what) for o in what.operands[1:4]]
        table = what.operands[4]
        if what.opcode != ("lop3", "b32") or not isinstance(table, Immediate):
            raise UnsupportedInstruction(what.text)
        write, bits = self.write(what.operands[0], what), table.bits
        return lambda b, s: write(b, s, arithmetic.logic3(*(r(b, s) for r in sources), bits))

    def do_dp4a(self, what: Instruction) -> Step:
        first, second = what.opcode[-2:]
        kinds = (first, second, "s32" if "s32" in (first, second) else "u32")
        sources = [
            self.read(o, kind, what) for o, kind in zip(what.operands[1:], kinds, strict=True)
        ]
        write = self.write(what.operands[0], what)
        return lambda b, s: write(b, s, arithmetic.dot_bytes(*(r(b, s) for r in sources)))

    def do_dp2a(self, what: Instruction) -> Step:
        _, side, first, second = what.opcode
        kinds = (first, second, "s32" if "s32" in (first, second) else "u32")
        sources = [
            self.read(o, kind, what) for o, kind in zip(what.operands[1:], kinds, strict=True)
        ]
        write = self.write(what.operands[0], what)
        return lambda b, s: write(
            b, s, arithmetic.dot_halves(*(r(b, s) for r in sources), side == "hi")
        )

    def do_prmt(self, what: Instruction) -> Step:
        if what.opcode != ("prmt", "b32"):
            raise UnsupportedInstruction(what.text)
        sources = [self.read(o, "b32", what) for o in what.operands[1:]]
        write = self.write(what.operands[0], what)
        return lambda b, s: write(b, s, arithmetic.permute_bytes(*(r(b, s) for r in sources)))

    def do_shf(self, what: Instruction) -> Step:
        _, side, mode, _ = what.opcode
        sources = [self.read(o, "b32", what) for o in what.operands[1:]]
        write = self.write(what.operands[0], what)
        return lambda b, s: write(
            b,
            s,
            arithmetic.funnel_shift(*(r(b, s) for r in sources), side == "l", mode == "clamp"),
        )

    def do_copysign(self, what: Instruction) -> Step:
        kind = what.opcode[-1]
        sign, size = (self.read(o, kind, what) for o in what.operands[1:])
        write = self.write(what.operands[0], what)
        return lambda b, s: write(b, s, np.copysign(size(b, s), sign(b, s)))

    def do_testp(self, what: Instruction) -> Step:
        tests: dict[str, Callable[[Array], Flags]] = {
            "finite": np.isfinite,
            "infinite": np.isinf,
            "notanumber": np.isnan,
            "number": lambda a: ~np.isnan(a),
        }
        _, test, kind = what.opcode
        if test not in tests:
            raise UnsupportedInstruction(what.text)
        read, write = self.read(what.operands[1], kind, what), self.write(what.operands[0], what)
        return lambda b, s: write(b, s, tests[test](read(b, s)))

    def do_activemask(self, what: Instruction) -> Step:
        write = self.write(what.operands[0], what)

        def step(b: Batch, s: Selection) -> None:
            lanes = b.lanes(s)
            bits = np.bincount(b.warp[lanes], np.float64(2) ** (b.thread[lanes] % 32))
            write(b, s, bits[b.warp[lanes]].astype(np.uint32))

        return step

    def do_trap(self, what: Instruction) -> Step:
        return lambda b, s: b.fail(faults.Trap, "trap", what, b.lanes(s))

    def do_call(self, what: Instruction) -> Step:
        callee = what.operands[1]
        name = callee.name if isinstance(callee, Symbol) else ""
        if name == "__assertfail":
            return lambda b, s: b.fail(faults.Trap, "assertion failed", what, b.lanes(s))
        raise UnsupportedInstruction(what.text)


@functools.lru_cache(maxsize=512)
def assemble(compiled: Compiled, name: str, title: str) -> Kernel:
    """Make the kernel `name` of a compiled source ready to run; faults call it `title`."""
    program = parse(compiled.ptx)
    if name not in program.functions:
        raise LookupError(f"no kernel {name} in the module; it has {sorted(program.functions)}")
    function = inline_calls(program.functions[name], program)
    assembler = Assembler(function, program)
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
    # Kernels live as long as the process: without this, the collector walks them time and again.
    gc.collect(1)
    gc.freeze()
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
