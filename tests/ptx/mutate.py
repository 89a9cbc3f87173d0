"""Mutate the CUDA text of the shipped kernels, and count the mutants that the tests kill.

Run as ``python -m tests.ptx.mutate``. Every mutant is one edit: an operator, a constant, a bound
or a barrier. It runs the kernel tests in a process of its own until one fails; those go first that
have killed most. A survivor whose PTX is that of the kernel itself is equivalent; `EQUIVALENT` says
why any other one is.
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

import cubin.surrogates  # its kernels are among those of the registry
from cubin import kernels
from tests.ptx import compiler, device, machine

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

EQUIVALENT: dict[str, str] = {
    "for (int level = 0; level <= (int)sizeof...(Scales); ++level) {": (
        "the level after the last has the scale 0, which changes neither y nor the residual"
    ),
    "sum.worst = a.worst >= b.worst || a.worst != a.worst ? a.worst : b.worst;": (
        "equal magnitudes are the same number"
    ),
    "total = sign == 0 ? y : sign >= 0 ? plus(y, scale) : minus(y, scale)": (
        "a sign of 0 is dealt with before"
    ),
    "for (int cell = first_used(LEVELS) + leader(); cell <= CELLS; cell += Team::LEADERS)": (
        "the cell after the last begins a depth, so it gets no edge; its value is not looked at"
    ),
    "static __device__ unsigned int exponent(Pattern m) { return max(m >> 23, 2u); }": (
        "twice the unit of rows of the smallest normal numbers does as well"
    ),
    "static __device__ unsigned long long exponent(Pattern m) { return max(m >> 52, 2ull); }": (
        "twice the unit of rows of the smallest normal numbers does as well"
    ),
    "for (int i = 0; i <= level; ++i) cut += scale[i] * sign_at(code[cell], i);": (
        "a level that is not found yet has the scale 0"
    ),
    "for (int i = 0; i < level; ++i) cut += scale[i] / sign_at(code[cell], i);": (
        "a sign is 1 or -1"
    ),
    "if (cell >= first_of(level)) cut = fmax(cut, to_double(edge[cell]));": (
        "the first edge and whatever is below 0 are both below every magnitude"
    ),
    "sum -= plus ? scale[level] : -scale[level];": (
        "codes and scales have both changed their signs at that level"
    ),
    "if (!(total < 1e300 / 1e300)) total = wide_sum_after(level, x, bits, scale);": (
        "sums of 1 or more are taken in double anew: slower, and no less exact"
    ),
    "for (int e = 0; e <= E; ++e) forget(x[e]);": "it holds no instruction",
    "for (int w = 0; w < E * 4; ++w) forget(word[w]);": "it holds no instruction",
    "for (int which = first + threadIdx.x * step; which < end; which += 32 / step) {": (
        "there are at most 15 sums, so nobody comes to a second one"
    ),
    "for (int w = 1; w < E / 4; ++w) forget(word[w]);": "it holds no instruction",
    "if (Team::rank() != 0) inverse[p] = over;": "all leaders have the same value",
    "for (int pack = 0; pack < E * N; ++pack) {": "no further pack begins before the row's end",
    "__global__ void __launch_bounds__(Team::MOST_THREADS, 1024 * Team::MOST_THREADS) "
    "cubin_solve_rows(": (
        "it asks for more than there is, so it is ignored; the kernel fits without it"
    ),
    "for (int pack = 0; pack <= E / N; ++pack) {": "no further pack begins before the row's end",
    "Pattern most = 1;": "a row of zeros has the unit of the smallest number",
    "own = sum_of_lanes<33>(own);": "the steps are those for 32",
    "return most_of_lanes<33>(lane < blockDim.x / 32 ? of_warps[lane] : U(0));": (
        "the steps are those for 32"
    ),
    "return most_of_lanes<32>(lane < blockDim.x / 32 ? of_warps[lane] : U(1));": (
        "a row of zeros has the unit of the smallest number"
    ),
    "if (threadIdx.x % 32 == 1) of_warps[which][threadIdx.x / 32] = own;": (
        "all lanes have the sum"
    ),
    "__device__ int count(int) const { return 1; }": "the total is the length of the row",
    "for (int i = 0; i <= LEVELS - 1; ++i)": "the body runs where i < level, and level < LEVELS",
    "if constexpr (LEVEL + 1 <= LEVELS)": "one more branch, for a level that there is not",
    "double total = 1;": "only sums beyond the largest float start there: 1 is lost in them",
    "return absolute(slope) >= 0 ? times(slope, g) : W(0);": "that slope is 1 everywhere",
    "return absolute(slope) > 0 ? times(slope, g) : W(1);": "that slope is 1 everywhere",
    "template<class W> __device__ W slope(W v) "
    "{ return absolute(v) < 1 ? 2 - 2 * absolute(v) : W(0); }": "2 - 2 |v| is 0 there",
    "template<class W> __device__ W slope(W v, W t) "
    "{ return (t <= 1 ? W(1) : t) / (cosh(t * v) * cosh(t * v)); }": "t is 1 there",
    "template<class W> __device__ W slope(W v, W t) { return (t <= 1 ? 1 / t : W(1)) * "
    "fmax(W(1.4142135623730951) * t - t * t * absolute(v), W(0)); }": "1 / t is 1 there",
    "for (int level = 0; level <= (int)sizeof...(Scales); ++level)": (
        "the level after the last has the scale 0"
    ),
    "constexpr bool WHOLE = Bits::WHOLE_PACKS && N > 2;": (
        "only doubles have packs of two, and pairs of equal doubles add up as well as fours"
    ),
    "for (int i = 0; i <= LEVEL; ++i) m[g] = absolute(minus(m[g], scale[i]));": (
        "a level that is not found yet has the scale 0"
    ),
    "if (i <= level) m = absolute(minus(m, scale[i]));": (
        "a level that is not found yet has the scale 0"
    ),
    "if (!(WHOLE && N > GROUP) && !bits.hot(e + g, LEVEL)) m[g] = 0;": (
        "elements of a pack are asked one by one too, and all give its answer"
    ),
    "for (int i = 0; i < LEVELS + 1; ++i)": "the body runs where i < level, and level < LEVELS",
    "if constexpr (LEVEL - 1 < LEVELS)": "more branches, for levels that there are not",
    "for (int i = 0; i <= LEVELS; ++i) scale[i] = 0;": (
        "the array is in registers, and none is beyond its end"
    ),
    "total = sum_of_thread<LEVELS != 1 ? 0 : 1, N>(level, x, bits, scale);": (
        "the search for the level begins one earlier; with one level nobody comes here"
    ),
    "total = sum_of_thread<LEVELS == 2 ? 0 : 1, N>(level, x, bits, scale);": (
        "the search for the level begins one earlier; with one level nobody comes here"
    ),
    "for (int e = 1; e < E; ++e) forget(x[e]);": "it holds no instruction",
    "__double2hiint(m) | 0x80000000 ^ (__double2hiint(n) & 0x80000000), __double2loint(m));": (
        "m is not negative"
    ),
    "__global__ void __launch_bounds__(Team::MOST_THREADS, 1024 * Team::MOST_THREADS) "
    "cubin_approximate_rows(": (
        "it asks for more than there is, so it is ignored; the kernel fits without it"
    ),
    "__global__ void __launch_bounds__(Team::MOST_THREADS, 1024 * Team::MOST_THREADS) "
    "cubin_encode_rows(": (
        "it asks for more than there is, so it is ignored; the kernel fits without it"
    ),
    "if (level > levels) break;": "no element of the row has a code at the level after its last",
    "if (own && rank == 1) {": "all threads have the same scales",
    "if (rank() != 0) total[which] = own;": "all lanes have the sum",
    "if (rank() == 1) total[which] = own;": "all lanes have the sum",
    "if (lane != 0) of_warps[turn % 2][threadIdx.x / 32] = own;": "all lanes have the sum",
    "if (lane == 1) of_warps[turn % 2][threadIdx.x / 32] = own;": "all lanes have the sum",
    "if (lane != 0) of_warps[threadIdx.x / 32] = own;": "all lanes have the largest",
    "if (lane == 1) of_warps[threadIdx.x / 32] = own;": "all lanes have the largest",
    "if (threadIdx.x % 32 != 0) of_warps[which][threadIdx.x / 32] = own;": (
        "all lanes have the sum"
    ),
    "if (threadIdx.x % 33 == 0) of_warps[which][threadIdx.x / 32] = own;": (
        "of each of the 32 warps one thread's number is a multiple of 33; all lanes have the sum"
    ),
    "Pack<T, N, A> packs[E * N];": "more room than is used",
    "unsigned int word[E * 4];": "more room than is used",
    "for (int w = 0; w <= E / 4; ++w) forget(word[w]);": "it holds no instruction",
    "for (int w = 0; w < E / 5; ++w) forget(word[w]);": "it holds no instruction",
    "static constexpr int MOST_THREADS = 257;": "as many rows, and blocks are of 256 as before",
    "static constexpr int MOST_THREADS = 1025;": "blocks are of 1024 at most as before",
    "static constexpr int ROWS = 2;": "more room than is used",
    "static constexpr int LEADERS = 33;": (
        "there are 15 cells and 14 entries at most, so nobody comes to a second one"
    ),
    "__shared__ Sum of_warps[3][32];": "more room than is used",
    "__shared__ Sum of_warps[2][33];": "more room than is used",
    "__shared__ U of_warps[33];": "more room than is used",
    "Sum of_warps[COUNT][33];": "more room than is used",
    "return sum_of_lanes<33>(own);": "the steps are those for 32",
    "own = most_of_lanes<33>(own);": "the steps are those for 32",
    "for (int which = first + threadIdx.x * step; which < end; which += 33 * step) {": (
        "there are at most 15 sums, so nobody comes to a second one"
    ),
    "word[w] = __vminu4(0x10101011u,": "no level lies beyond the sixteenth",
    "if (cell + 2 < first_of(level + 1)) cut = fmin(cut, to_double(edge[cell + 1]));": (
        "the cut below the last cell does not reach its edge: not in one of 190,000 random rows"
    ),
    "if (i < LEVELS) total += sign / sign_at(code[cell], i) * (here.count - higher.count);": (
        "a sign is 1 or -1"
    ),
    "for (int i = 0; i <= level; ++i) total -= line[entry_of(level, i)] * scale[i];": (
        "a level that is not found yet has the scale 0"
    ),
    "return hot[level] >= 0 ? total / hot[level] : 0;": (
        "only the mean of no elements is NaN: no other scale depends on it, and least squares, "
        "which always follows, sets it to 0"
    ),
    "for (int step = 1 << LEVELS << 2; step; step /= 2)": "steps that are too long are left out",
    "scale[depth + 1] = 0;  // compilers read it ahead": (
        "no scale is used before it is found, and for compute_80 none is read before either"
    ),
    "add_up(own, level + 1, MAP || !level ? 0 : first_of(level + 1) - 1, MAP ? 1 : 2);": (
        "one more sum, of a cell that is not in use any more"
    ),
    "else if (Team::rank() != 0) scale[level] = mean_at(level);": "all leaders find the same mean",
    "__global__ void __launch_bounds__(Team::MOST_THREADS, 1024 * Team::MOST_THREADS) "
    "cubin_reconstruct_rows(": (
        "it asks for more than there is, so it is ignored; the kernel fits without it"
    ),
    "for (int j = 0; j <= N; ++j)": "the pack is in registers, and no item is beyond its end",
    "constexpr double DEPENDENT = 1.0 / (2ll << 38);": (
        "rounding errors are far below half of it, and pivots of independent signs far above"
    ),
    "constexpr double DEPENDENT = 1.0 / (1ll << 39);": (
        "rounding errors are far below half of it, and pivots of independent signs far above"
    ),
    "static __device__ float absent() { return __uint_as_float(0x80000001u); }": (
        "the first edge is not below itself either"
    ),
    "static __device__ float lowest() { return __uint_as_float(0x80000002u); }": (
        "that lies between what is absent and all magnitudes, too"
    ),
    "static __device__ double absent() { return __longlong_as_double(0x8000000000000001ll); }": (
        "the first edge is not below itself either"
    ),
    "static __device__ double lowest() { return __longlong_as_double(0x8000000000000002ll); }": (
        "that lies between what is absent and all magnitudes, too"
    ),
    "const W scale = finite ? Edges<W>::inverse(most) : W(2);": (
        "of the magnitudes of a bad row only which are above 0 counts"
    ),
    "unit = finite ? Edges<W>::unit(most) : W(2);": "the scales of a bad row are NaN",
    "if (Team::rank() == 1) {": "every thread of the team has the same values",
    "static constexpr int ENTRIES = LEVELS * (LEVELS + 4) / 2;": (
        "entries more than there are equations: nothing is made of them"
    ),
    "T result[3][CELLS];  // of elements that are not positive, and of those that are": (
        "more room than is used"
    ),
    "return found ^ ((2 << depth) - 1);": "bits beyond a cell's levels are not looked at",
    "return hot[level] > 0 ? total / hot[level] : 1;": (
        "no other scale depends on the mean of no elements, and least squares, which always "
        "follows, sets it to 0"
    ),
    "if (Team::rank() == 1) inverse[p] = over;": "all leaders have the same value",
    "double explained = 1;": "all gains have it, so it decides between none",
    "for (int step = 2 << LEVELS >> 2; step; step /= 2)": "steps that are too long are left out",
    "scale[depth - 2] = 0;  // compilers read it ahead": (
        "no scale is used before it is found, and for compute_80 none is read before either"
    ),
    "scale[depth - 1] = 1;  // compilers read it ahead": ("no scale is used before it is found"),
    "else if (Team::rank() == 1) scale[level] = mean_at(level);": "all leaders find the same mean",
    "code[j] = depth[j] ? found.code[cell] ^ (elements.up >> e & 1 ? 0 : ~0) : 1;": (
        "an element without bits has no sign at any level"
    ),
    "return found ^ ((1 >> depth) - 1);": "bits beyond a cell's levels are not looked at",
}
"""Why a survivor changes nothing, by the line after the edit."""

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
    for primitive in kernels.REGISTRY.values():
        for name, text in _texts(primitive).items():
            for known in files.values():
                text = text.replace(known, "")
            if text.strip():
                found[f"{primitive.name}.{name}"] = text
    return found


def _texts(primitive: kernels.Primitive) -> dict[str, str]:
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
    for primitive in kernels.REGISTRY.values():
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


def _holders(mutant: Mutant) -> list[kernels.Primitive]:
    """The primitives whose kernels hold the mutated text."""
    return [
        primitive
        for primitive in kernels.REGISTRY.values()
        if any(mutant.text in text for text in _texts(primitive).values())
    ]


def _nearest_tests(mutant: Mutant) -> list[str]:
    """The tests nearest to the kernels concerned, as pytest's arguments."""
    holders = _holders(mutant)
    raw = {p.function.__module__ for p in holders if isinstance(p, kernels.Raw)}
    names = sorted(p.name for p in holders if p.types and not isinstance(p, kernels.Raw))
    if names:
        return ["tests/test_kernels.py", "-k", f"equals and ({' or '.join(names)})"]
    files = {"cubin.greedy": "tests/test_fused.py", "cubin.solvers.teams": "tests/test_teams.py"}
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
    chosen = [m for m in mutants() if re.search(options.only, str(m))][:: options.every]
    if options.list:
        print(*chosen, sep="\n")
        return 0
    full = [*options.full.split(), "--ignore-glob=*test_ptx_*"] if options.full else []
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
                reason = EQUIVALENT.get(mutant.edited)
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
                if full and mutant.edited not in EQUIVALENT:
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
