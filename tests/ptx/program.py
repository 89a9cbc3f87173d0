"""PTX text to instructions: the part of the language that NVRTC writes."""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

WIDTHS = {
    **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)},
    "b128": 16,
    "f16": 2,
    "bf16": 2,
    "f16x2": 4,
    "bf16x2": 4,
    "f32": 4,
    "f64": 8,
    "pred": 1,
}
"""Bytes of every PTX type."""


class UnsupportedInstruction(NotImplementedError):
    """PTX that this interpreter does not know; the message holds the instruction."""


@dataclass(frozen=True)
class Register:
    """A virtual register: its place in the register file, and its width (0 for a predicate)."""

    name: str
    index: int
    width: int


@dataclass(frozen=True)
class Immediate:
    """A literal; `bits` is its 64-bit pattern."""

    text: str
    bits: int
    floating: bool = False


@dataclass(frozen=True)
class Special:
    """A special register such as ``%tid.x``."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """The address of a variable, or a label."""

    name: str


@dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: Register | Symbol | None
    offset: int


@dataclass(frozen=True)
class Vector:
    """``{a, b, ...}``; ``None`` stands for the sink ``_``."""

    items: tuple[Operand | None, ...]


@dataclass(frozen=True)
class Pair:
    """``a|b``: two destinations."""

    first: Register | None
    second: Register | None


@dataclass(frozen=True)
class Negated:
    """``!p``."""

    register: Register


Operand = Register | Immediate | Special | Symbol | Address | Vector | Pair | Negated


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    `line` is (file number, line) in the CUDA source, `line` 0 where NVRTC gave none; `inlined`
    is where the inlined function was called from, outermost last.
    """

    text: str
    opcode: tuple[str, ...]
    operands: tuple[Operand | None, ...]
    guard: Register | None = None
    negated: bool = False
    line: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """The opcode's first part."""
        return self.opcode[0]


@dataclass(frozen=True)
class Variable:
    """A variable in memory: `space` is param, global, const, shared or local."""

    name: str
    space: str
    size: int
    align: int
    type: str = "b8"
    data: bytes = b""
    extern: bool = False


@dataclass
class Function:
    """A kernel, or a device function that NVRTC did not inline."""

    name: str
    entry: bool
    params: list[Variable] = field(default_factory=list)
    returns: list[Variable] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)
    body: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: list[Register] = field(default_factory=list)
    tables: dict[str, list[str]] = field(default_factory=dict)
    max_threads: int | None = None


@dataclass
class Program:
    """A parsed PTX module."""

    functions: dict[str, Function]
    variables: dict[str, Variable]
    files: dict[int, str]


_TOKEN = re.compile(
    r"\s*(?:(?P<directive>\.(?:loc|file)\b[^\n]*)|(?P<label>[$\w]+):(?!:)|(?P<brace>[{}])"
    r"|(?P<statement>(?:[^;{}\"]|\"[^\"]*\"|\{[^{}]*\})+?)(?P<end>;|(?=\{\s*\n)))"
)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_VARIABLE = re.compile(
    r"(?P<extern>\.(?:extern|visible|weak|common)\s+)*"
    r"\.(?P<space>global|const|shared|local|param)\s+"
    r"(?:\.(?:ptr|attribute\([^)]*\))\s*)*(?:\.align\s+(?P<align>\d+)\s+)?"
    r"\.(?P<type>\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?"
    r"(?P<name>[$\w%]+)(?P<dims>(?:\[\d*\])*)\s*(?:=\s*(?P<data>.*))?",
    re.DOTALL,
)
_FUNCTION = re.compile(
    r"(?:\.(?:visible|extern|weak)\s+)*\.(?P<kind>entry|func)\s*"
    r"(?:\((?P<returns>[^)]*)\)\s*)?(?P<name>[$\w]+)\s*\((?P<params>[^)]*)\)(?P<rest>.*)",
    re.DOTALL,
)


def _variable(text: str) -> Variable:
    match = _VARIABLE.fullmatch(text.strip())
    if match is None:
        raise UnsupportedInstruction(f"declaration: {text.strip()}")
    width = WIDTHS[match["type"]]
    count = 1
    for size in re.findall(r"\[(\d*)\]", match["dims"]):
        count *= int(size or 0)
    data = b""
    if match["data"]:
        items = [_number(item).bits for item in re.findall(r"[^\s,{}]+", match["data"])]
        data = b"".join((item & (1 << 8 * width) - 1).to_bytes(width, "little") for item in items)
    return Variable(
        match["name"],
        match["space"],
        width * count,
        int(match["align"] or width),
        match["type"],
        data,
        ".extern" in text,
    )


def _number(text: str) -> Immediate:
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return Immediate(text, int(match[1], 16), True)
    if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        return Immediate(text, int(match[1], 16), True)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Immediate(text, int(text.rstrip("U"), 0) & (1 << 64) - 1)
    if re.fullmatch(r"-?\d+\.\d*(?:[eE][+-]?\d+)?", text):
        return Immediate(text, struct.unpack("<Q", struct.pack("<d", float(text)))[0], True)
    raise ValueError(text)


_BRACKET = re.compile(r"[{\[(]")


def _split(text: str) -> list[str]:
    """Split operands at the commas that are not inside brackets."""
    if not _BRACKET.search(text):
        return [part for part in map(str.strip, text.split(",")) if part]
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and not depth:
            parts.append(text[start:position])
            start = position + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


class _Scope:
    """Register names of one function; an inner ``{ }`` may declare its own."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.stack: list[dict[str, Register]] = [{}]
        self.ranges: list[list[tuple[str, int, int]]] = [[]]

    def open(self) -> None:
        self.stack.append({})
        self.ranges.append([])

    def close(self) -> None:
        self.stack.pop()
        self.ranges.pop()

    def declare(self, text: str) -> None:
        match = re.fullmatch(r"\.reg\s*\.(\w+)\s+(.*)", text.strip(), re.DOTALL)
        if match is None:
            raise UnsupportedInstruction(f"declaration: {text.strip()}")
        width = 0 if match[1] == "pred" else WIDTHS[match[1]]
        for name in _split(match[2]):
            if many := re.fullmatch(r"(.+)<(\d+)>", name):
                self.ranges[-1].append((many[1], int(many[2]), width))
            else:
                self._new(self.stack[-1], name, width)

    def _new(self, names: dict[str, Register], name: str, width: int) -> Register:
        register = Register(name, len(self.function.registers), width)
        self.function.registers.append(register)
        names[name] = register
        return register

    def find(self, name: str) -> Register | None:
        for names, ranges in zip(reversed(self.stack), reversed(self.ranges), strict=True):
            if name in names:
                return names[name]
            for prefix, count, width in ranges:
                number = name.removeprefix(prefix)
                if number != name and number.isdigit() and int(number) < count:
                    return self._new(names, name, width)
        return None


def _operand(text: str, scope: _Scope) -> Operand | None:
    if text == "_":
        return None
    if text.startswith("{"):
        return Vector(tuple(_operand(item, scope) for item in _split(text[1:-1])))
    if text.startswith("["):
        match = re.fullmatch(r"\[\s*([$\w%.]+)\s*(?:\+\s*(-?\w+)|(-\s*\w+))?\s*\]", text)
        if match is None:
            raise UnsupportedInstruction(f"address {text}")
        offset = int((match[2] or match[3] or "0").replace(" ", ""), 0)
        if re.fullmatch(r"\d\w*", match[1]):
            return Address(None, int(match[1], 0) + offset)
        return Address(scope.find(match[1]) or Symbol(match[1]), offset)
    if text.startswith("!"):
        register = scope.find(text[1:].strip())
        if register is None:
            raise UnsupportedInstruction(f"operand {text}")
        return Negated(register)
    if "|" in text:
        first, second = (_operand(item.strip(), scope) for item in text.split("|"))
        if isinstance(first, Register | None) and isinstance(second, Register | None):
            return Pair(first, second)
        raise UnsupportedInstruction(f"operand {text}")
    if register := scope.find(text):
        return register
    if text.startswith("%"):
        return Special(text)
    if text == "WARP_SZ":
        return Immediate(text, 32)
    if re.match(r"-?\d", text):
        return _number(text)
    if re.fullmatch(r"[$\w]+(\+\d+)?", text):
        return Symbol(text)
    raise UnsupportedInstruction(f"operand {text}")


def _instruction(text: str, scope: _Scope, line: tuple[int, int]) -> Instruction:
    text = " ".join(text.split())
    rest, guard, negated = text, None, False
    if match := re.match(r"@(!?)\s*([$\w%]+)\s+(.*)", text):
        negated, guard, rest = bool(match[1]), scope.find(match[2]), match[3]
    opcode, _, operands = rest.partition(" ")
    parts = tuple(opcode.split("."))
    if parts[0] == "call":
        found = tuple(_call_operands(operands))
        return Instruction(text, parts, found, guard, negated, line)
    return Instruction(
        text,
        parts,
        tuple(_operand(item, scope) for item in _split(operands)),
        guard,
        negated,
        line,
    )


def _call_operands(text: str) -> Iterator[Vector | Symbol]:
    """(returns), function, (arguments): each list becomes a Vector of symbols."""
    parts = _split(text)
    if not parts[0].startswith("("):
        parts.insert(0, "()")
    for part in parts[:3]:
        if part.startswith("("):
            yield Vector(tuple(Symbol(item) for item in _split(part[1:-1])))
        else:
            yield Symbol(part)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = _COMMENT.sub("", text)
        self.program = Program({}, {}, {})
        self.position = 0

    def parse(self) -> Program:
        header = re.compile(r"\s*\.(version|target|address_size|file|section)\b[^\n]*")
        while self.text[self.position :].strip():
            if match := header.match(self.text, self.position):
                self.position = match.end()
                if match[1] == "file":
                    self._file(match[0])
                elif match[1] == "section":
                    start = self.text.index("{", match.start())
                    self.position = self.text.index("}", start) + 1
                continue
            match = re.compile(r"\s*([^;{]*)").match(self.text, self.position)
            head = match[1] if match else ""
            if re.search(r"\.(entry|func)\b", head):
                self.position = match.end() if match else self.position
                self._function(head)
            else:
                end = self.text.index(";", self.position)
                statement = self.text[self.position : end].strip()
                self.position = end + 1
                if statement.startswith(
                    (".global", ".const", ".extern", ".visible", ".shared", ".weak")
                ):
                    variable = _variable(statement)
                    self.program.variables[variable.name] = variable
                elif statement and not statement.startswith((".alias", ".pragma")):
                    raise UnsupportedInstruction(f"declaration: {statement}")
        return self.program

    def _file(self, text: str) -> None:
        match = re.search(r"\.file\s+(\d+)\s+\"([^\"]*)\"", text)
        if match:
            self.program.files[int(match[1])] = match[2]

    def _function(self, head: str) -> None:
        match = _FUNCTION.fullmatch(head.strip())
        if match is None:
            raise UnsupportedInstruction(f"declaration: {head.strip()}")
        function = Function(match["name"], match["kind"] == "entry")
        function.params = [_variable(item) for item in _split(match["params"])]
        function.returns = [_variable(item) for item in _split(match["returns"] or "")]
        if limit := re.search(r"\.maxntid\s+([\d,\s]+)", match["rest"]):
            function.max_threads = int(np.prod([int(part) for part in limit[1].split(",")]))
        if self.text[self.position] == ";":
            self.position += 1
            return
        self.position += 1
        self._body(function)
        self.program.functions[function.name] = function

    def _body(self, function: Function) -> None:
        scope, depth, line = _Scope(function), 0, (0, 0)
        while True:
            match = _TOKEN.match(self.text, self.position)
            if match is None:
                raise UnsupportedInstruction(self.text[self.position : self.position + 80].strip())
            self.position = match.end()
            if match["directive"]:
                if place := re.match(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)", match["directive"]):
                    line = int(place[1]), int(place[2])
                else:
                    self._file(match["directive"])
            elif match["label"]:
                function.labels[match["label"]] = len(function.body)
            elif match["brace"] == "{":
                depth += 1
                scope.open()
            elif match["brace"] == "}":
                if not depth:
                    return
                depth -= 1
                scope.close()
            else:
                self._statement(match["statement"].strip(), function, scope, line)

    def _statement(
        self, text: str, function: Function, scope: _Scope, line: tuple[int, int]
    ) -> None:
        if text.startswith(".reg"):
            scope.declare(text)
        elif text.startswith((".shared", ".local", ".param", ".global", ".const", ".extern")):
            function.variables.append(_variable(text))
        elif text.startswith(".branchtargets"):
            # "name: .branchtargets a, b": the label before it is the table's name
            name = next(
                key for key, at in reversed(function.labels.items()) if at == len(function.body)
            )
            function.tables[name] = _split(text.removeprefix(".branchtargets"))
        elif text.startswith(".pragma") or not text:
            pass
        else:
            function.body.append(_instruction(text, scope, line))


@functools.lru_cache(maxsize=512)
def parse(ptx: str) -> Program:
    """Parse a PTX module.

    Raises
    ------
    UnsupportedInstruction
        Naming the first statement that is not understood.
    """
    return _Parser(ptx).parse()


def inline_calls(function: Function, program: Program, depth: int = 0) -> Function:
    """The function with every call of a device function of the module replaced by its body."""
    if depth > 16:
        raise UnsupportedInstruction(f"recursion in {function.name}")
    if not any(i.name == "call" and _callee(i) in program.functions for i in function.body):
        return function
    result = replace(function, body=[], labels={}, registers=list(function.registers))
    result.variables = list(function.variables)
    result.tables = dict(function.tables)
    moved: dict[int, int] = {}
    for at, instruction in enumerate(function.body):
        moved[at] = len(result.body)
        if instruction.name == "call" and _callee(instruction) in program.functions:
            callee = inline_calls(program.functions[_callee(instruction)], program, depth + 1)
            _inline(result, instruction, callee)
        else:
            result.body.append(instruction)
    moved[len(function.body)] = len(result.body)
    result.labels |= {name: moved[at] for name, at in function.labels.items()}
    return result


def _callee(call: Instruction) -> str:
    symbol = call.operands[1]
    return symbol.name if isinstance(symbol, Symbol) else ""


def _inline(caller: Function, call: Instruction, callee: Function) -> None:
    if call.guard is not None:
        raise UnsupportedInstruction(call.text)
    returns, _, arguments = (*call.operands, Vector(()))[:3]
    assert isinstance(returns, Vector)
    assert isinstance(arguments, Vector)
    tag = f"@{len(caller.body)}."
    formal = [v.name for v in (*callee.returns, *callee.params)]
    actual = [s.name for s in (*returns.items, *arguments.items) if isinstance(s, Symbol)]
    symbols = dict(zip(formal, actual, strict=True))
    symbols |= {v.name: tag + v.name for v in callee.variables}
    symbols |= {name: tag + name for name in callee.labels}
    base = len(caller.registers)
    caller.registers += [Register(tag + r.name, base + r.index, r.width) for r in callee.registers]
    caller.variables += [replace(v, name=tag + v.name) for v in callee.variables]
    end = f"{tag}return"

    def rename(operand: Operand | None) -> Operand | None:
        match operand:
            case Register():
                return caller.registers[base + operand.index]
            case Symbol():
                return Symbol(symbols.get(operand.name, operand.name))
            case Address():
                return Address(rename(operand.base), operand.offset)
            case Vector():
                return Vector(tuple(rename(item) for item in operand.items))
            case Pair():
                return Pair(rename(operand.first), rename(operand.second))
            case Negated():
                return Negated(caller.registers[base + operand.register.index])
        return operand

    start = len(caller.body)
    for instruction in callee.body:
        guard = instruction.guard and caller.registers[base + instruction.guard.index]
        if instruction.name == "ret":
            copy = replace(instruction, opcode=("bra",), operands=(Symbol(end),), guard=guard)
        else:
            operands = tuple(rename(item) for item in instruction.operands)
            copy = replace(instruction, operands=operands, guard=guard)
        caller.body.append(copy)
    caller.labels |= {tag + name: start + at for name, at in callee.labels.items()}
    caller.tables |= {
        tag + name: [tag + label for label in labels] for name, labels in callee.tables.items()
    }
    caller.labels[end] = len(caller.body)
