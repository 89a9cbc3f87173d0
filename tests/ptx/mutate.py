"""Mutate the CUDA text of the shipped kernels, and count the mutants that the tests kill.

Run as ``python -m tests.ptx.mutate``. Every mutant is one edit: an operator, a constant, a bound
or a barrier. It runs the kernel tests in a process of its own until one fails; those go first that
have killed most. A survivor whose PTX is that of the kernel itself is equivalent; `equivalent`
says why any other one is.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import re
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path

import pytest
from tqdm.auto import tqdm

import cubin.errors
import cubin.surrogates  # their kernels are among those of the registry
from cubin.core import primitives
from tests.ptx import compiler, device, equivalent, machine

ROOT = Path(cubin.__file__).parent

OPERATORS = {
    "+": "-", "-": "+", "*": "/", "/": "*", "%": "/",
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==",
    "&&": "||", "||": "&&", "&": "|", "|": "&", "^": "|", "<<": ">>", ">>": "<<",
    "+=": "-=", "-=": "+=", "*=": "/=", "/=": "*=", "|=": "&=", "&=": "|=", "^=": "|=",
    "<<=": ">>=", ">>=": "<<=",
}  # fmt: skip
"""What an operator between spaces becomes."""

FIRST = 10
"""How many tests run first, those that have killed most so far."""

STEPS = 1 << 15
"""Basic blocks that a launch may run: enough for every test, and soon over for an endless loop."""

_SKIPPED = re.compile(
    r"//[^\n]*|/\*.*?\*/|\"(?:[^\"\\]|\\.)*\"|^[ \t]*#(?!define)[^\n]*|\btemplate\s*<[^{;]*?>(?=\s)",  # noqa: E501
    re.DOTALL | re.MULTILINE,
)
_BARRIER = re.compile(r"__sync(?:threads|warp)\([^()]*\);|__threadfence(?:_block)?\(\);")
_OPERATOR = re.compile(
    r"(?<=\s)(" + "|".join(map(re.escape, sorted(OPERATORS, key=len)[::-1])) + r")(?=\s)"
)
_NUMBER = re.compile(r"(?<![\w.])(0[xX][0-9a-fA-F]+|\d+)(?=[uUlL]*\b)(?![.\w]*\.)")


@dataclass(frozen=True)
class Mutant:
    """One edit of one text."""

    unit: str
    text: str
    start: int
    end: int
    new: str

    @property
    def mutated(self) -> str:
        """The text after the edit."""
        return self.text[: self.start] + self.new + self.text[self.end :]

    @property
    def line(self) -> str:
        """The line that is edited."""
        return self._line(self.text)

    @property
    def edited(self) -> str:
        """The line after the edit."""
        return self._line(self.mutated)

    def _line(self, text: str) -> str:
        first = self.text.rfind("\n", 0, self.start) + 1
        return text[first:].partition("\n")[0].strip()

    @property
    def edit(self) -> str:
        """What becomes what."""
        return f"{self.text[self.start : self.end]} -> {self.new or 'nothing'}"

    def __str__(self) -> str:
        number = self.text.count("\n", 0, self.start) + 1
        return f"{self.unit}:{number}: {self.edit}: {self.edited or self.line}"


def units() -> dict[str, str]:
    """Every CUDA text that ships, by name: the files, and what stands in decorators."""
    files = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for path in sorted((*ROOT.rglob("*.cu"), *ROOT.rglob("*.cuh")))
    }
    found = dict(files)
    for primitive in primitives.REGISTRY.values():
        for name, text in _texts(primitive).items():
            for known in files.values():
                text = text.replace(known, "")
            if text.strip():
                found[f"{primitive.name}.{name}"] = text
    return found


def _texts(primitive: primitives.Primitive) -> dict[str, str]:
    """The attributes of a primitive that hold CUDA."""
    other = {"name", "kernel_name", "__doc__"}
    return {
        name: value
        for name, value in vars(primitive).items()
        if isinstance(value, str) and name not in other and re.search(r"[^\w\s]", value)
    }


def mutants() -> Iterator[Mutant]:
    """All mutants of all units."""
    for unit, text in units().items():
        hidden = [match.span() for match in _SKIPPED.finditer(text)]

        def seen(at: int, hidden: Sequence[tuple[int, int]] = hidden) -> bool:
            return not any(start <= at < end for start, end in hidden)

        for match in _BARRIER.finditer(text):
            if seen(match.start()):
                yield Mutant(unit, text, *match.span(), "")
        for match in _OPERATOR.finditer(text):
            if seen(match.start()):
                yield Mutant(unit, text, *match.span(), OPERATORS[match[0]])
        for match in _NUMBER.finditer(text):
            if seen(match.start()):
                value = int(match[0], 0) + 1
                new = hex(value) if match[0].lower().startswith("0x") else str(value)
                yield Mutant(unit, text, *match.span(), new)


# ---------------------------------------------------------------- running


Code = frozenset[str]
"""Digests of the PTX that tests compiled."""


@dataclass
class Outcome:
    """What became of a mutant: killed, survived or invalid (it does not compile)."""

    verdict: str
    code: Code
    killer: str | None = None


class Watch:
    """A plugin of pytest that remembers the first test that failed."""

    failed: str | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid


def _apply(mutant: Mutant) -> None:
    for primitive in primitives.REGISTRY.values():
        for name, text in _texts(primitive).items():
            setattr(primitive, name, text.replace(mutant.text, mutant.mutated))


def _normalized(ptx: str) -> str:
    """PTX without the places in the source that it comes from."""
    return re.sub(r"(?m)^\s*(//|\.loc|\.file).*\n|^\s*\n", "", ptx)


def try_out(mutant: Mutant | None, stages: Sequence[Sequence[str]], plain: Code) -> Outcome:
    """Run stages of tests in this process, with the mutant in place, until one fails.

    Once they have compiled the very code of the kernel itself, they would not tell it apart.
    """
    if mutant is not None:
        _apply(mutant)
    machine.MOST_STEPS = STEPS
    invalid: list[Exception] = []
    code: set[str] = set()
    original = device._compiled

    def watch(*arguments: object, **options: object) -> compiler.Compiled:
        try:
            compiled = original(*arguments, **options)
        except compiler.CompileError as error:
            invalid.append(error)
            raise
        code.add(hashlib.sha256(_normalized(compiled.ptx).encode()).hexdigest())
        return compiled

    device._compiled = watch
    always = ["-x", "-q", "-m", "kernels", "-o", "cache_dir=.pytest_cache/mutate"]
    for number, stage in enumerate(stages):
        if number and code == plain:
            break
        seen = Watch()
        status = pytest.main([*always, *stage], plugins=[seen])
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise RuntimeError(f"pytest {' '.join(stage)} ends with {status!r}")
        if status or invalid:
            return Outcome("invalid" if invalid else "killed", frozenset(code), seen.failed)
    return Outcome("survived", frozenset(code))


def _task(mutant: Mutant | None, stages: Sequence[Sequence[str]], plain: Code) -> Outcome:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    return try_out(mutant, stages, plain)


def _holders(mutant: Mutant) -> list[primitives.Primitive]:
    """The primitives whose kernels hold the mutated text."""
    return [
        primitive
        for primitive in primitives.REGISTRY.values()
        if any(mutant.text in text for text in _texts(primitive).values())
    ]


def _nearest_tests(mutant: Mutant) -> list[str]:
    """The tests nearest to the kernels concerned, as pytest's arguments."""
    holders = _holders(mutant)
    raw = {p.function.__module__ for p in holders if isinstance(p, primitives.Raw)}
    names = sorted(p.name for p in holders if p.types and not isinstance(p, primitives.Raw))
    if names:
        return ["tests/test_kernels.py", "-k", f"equals and ({' or '.join(names)})"]
    files = {
        "cubin.codes.levels": "tests/test_levels.py",
        "cubin.solvers.greedy": "tests/test_fused.py",
        "cubin.solvers.search_rows": "tests/test_teams.py",
    }
    nearest = sorted(files[module] for module in raw) or ["tests/test_surrogates.py"]
    return [*nearest, "-k", "not registers"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print ``killed N of M`` and the survivors; the status is 1 if one is not explained."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.ptx.mutate")
    parser.add_argument("--only", default="", help="units or lines to mutate: a regular expression")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument(
        "--full", default="tests", help="tests to run on what survives the nearest ones"
    )
    parser.add_argument("--every", type=int, default=1, help="take every n-th mutant only")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    options = parser.parse_args(arguments)
    os.environ["CUBIN_TEST_EXHAUSTIVE"] = "1"
    chosen = [m for m in mutants() if re.search(options.only, str(m))][:: options.every]
    if options.list:
        print(*chosen, sep="\n")
        return 0
    full = [*options.full.split(), "--ignore=tests/ptx/tests"] if options.full else []
    with multiprocessing.get_context("fork").Pool(options.jobs, maxtasksperchild=1) as pool:
        sets = sorted({tuple(_nearest_tests(mutant)) for mutant in chosen})
        plain = [(None, [nearest], frozenset()) for nearest in sets]
        base = dict(zip(sets, pool.starmap(_task, plain, chunksize=1), strict=True))
        broken = [nearest for nearest, outcome in base.items() if outcome.verdict != "survived"]
        if broken:
            print("the tests fail without a mutant:", *broken[0], file=sys.stderr)
            return 2
        verdicts: Counter[str] = Counter()
        for mutant, outcome in _outcomes(pool, chosen, full, base, 8 * options.jobs):
            verdict = outcome.verdict
            if verdict == "survived":
                reason = equivalent.REASONS.get(mutant.edited)
                if outcome.code == base[tuple(_nearest_tests(mutant))].code:
                    reason = "compiles to the same PTX"
                verdict = "equivalent" if reason else "not explained"
                print(f"survived: {mutant}\n          {reason or 'NOT EXPLAINED'}", flush=True)
            verdicts[verdict] += 1
    print(f"killed {verdicts['killed']} of {len(chosen) - verdicts['invalid']}; "
          f"{verdicts['equivalent']} equivalent, {verdicts['not explained']} not explained, "
          f"{verdicts['invalid']} do not compile")  # fmt: skip
    return 1 if verdicts["not explained"] else 0


def _outcomes(
    pool: Pool,
    chosen: Sequence[Mutant],
    full: Sequence[str],
    base: Mapping[tuple[str, ...], Outcome],
    ahead: int,
) -> Iterator[tuple[Mutant, Outcome]]:
    """The outcomes in order. The tests that have killed most run first."""
    killers: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    running: deque[tuple[Mutant, AsyncResult[Outcome]]] = deque()
    waiting = deque(chosen)
    with tqdm(total=len(chosen), disable=None) as progress:
        while waiting or running:
            while waiting and len(running) < ahead:
                mutant = waiting.popleft()
                nearest = tuple(_nearest_tests(mutant))
                first = [test for test, _ in killers[nearest].most_common(FIRST)]
                stages = [first, nearest] if first else [nearest]
                if full and mutant.edited not in equivalent.REASONS:
                    stages.append(full)
                task = (mutant, stages, base[nearest].code)
                running.append((mutant, pool.apply_async(_task, task)))
            mutant, result = running.popleft()
            outcome = result.get()
            if outcome.killer:
                killers[tuple(_nearest_tests(mutant))][outcome.killer] += 1
            progress.update()
            yield mutant, outcome


if __name__ == "__main__":
    sys.exit(main())
