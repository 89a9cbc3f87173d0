"""A catalogue of deliberate bugs: each is one edit of a correct kernel, and each is caught."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

pytest.importorskip("cupy")

from tests import ptx
from tests.ptx.device import ARCHITECTURES, architecture, module

pytestmark = [pytest.mark.kernels, pytest.mark.exhaustive]

THREADS = 96
ROWS = 5

# Levels of a row: the mean magnitude of the residual, then the residual less that, k times over.
CORRECT = """
#define THREADS 96
extern "C" __global__ void peel(const float* x, float* y, float* scales, int length, int levels) {
  __shared__ float partial[THREADS / 32];
  __shared__ float scale;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float* row = x + blockIdx.x * length;
  float* out = y + blockIdx.x * length;
  for (int j = threadIdx.x; j < length; j += THREADS) out[j] = row[j];
  for (int level = 0; level < levels; ++level) {
    float sum = 0;
    for (int j = threadIdx.x; j < length; j += THREADS) sum += fabsf(out[j]);
    for (int step = 16; step; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
    if (lane == 0) partial[warp] = sum;
    __syncthreads();
    if (warp == 0) {
      sum = lane < THREADS / 32 ? partial[lane] : 0;
      for (int step = 16; step; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
      if (lane == 0) {
        scale = sum / length;
        scales[blockIdx.x * levels + level] = scale;
      }
    }
    __syncthreads();
    for (int j = threadIdx.x; j < length; j += THREADS) {
      out[j] -= out[j] > 0 ? scale : -scale;
    }
  }
}
"""


@dataclass(frozen=True)
class Bug:
    """An edit of the correct kernel, and what catches it (None: a wrong result)."""

    name: str
    old: str
    new: str
    caught: type[Exception] | None
    where: str = ""
    grid: int = ROWS
    shared: int = 0

    def __str__(self) -> str:
        return self.name


BUGS = [
    Bug("reads past the end", "out[j] = row[j]", "out[j] = row[j] + row[j + 1]",
        ptx.OutOfBounds, "4 bytes, 0 bytes past the end"),
    Bug("writes past the end", "out[j] = row[j]", "out[j + length] = row[j]", ptx.OutOfBounds,
        "past the end"),
    Bug("reads before the beginning", "out[j] = row[j]", "out[j] = row[j - 1]", ptx.OutOfBounds,
        "4 bytes before"),
    Bug("vector loads of unaligned rows", "out[j] = row[j]",
        "if (4 * j + 3 < length) { float4 v = reinterpret_cast<const float4*>(row)[j];"
        " out[4 * j] = v.x; out[4 * j + 1] = v.y; out[4 * j + 2] = v.z; out[4 * j + 3] = v.w; }",
        ptx.Misaligned, "not a multiple of 16"),
    Bug("no barrier before the partial sums are read",
        "partial[warp] = sum;\n    __syncthreads();", "partial[warp] = sum;", ptx.Race,
        r"partial\[lane\] : 0"),
    Bug("no barrier after the broadcast of the scale",
        "    __syncthreads();\n    for (int j = threadIdx.x; j < length; j += THREADS) {\n",
        "    for (int j = threadIdx.x; j < length; j += THREADS) {\n", ptx.Race, "line 24"),
    Bug("no barrier before the next level writes the scale",
        "if (lane == 0) partial[warp] = sum;\n    __syncthreads();\n    if (warp == 0) {\n"
        "      sum = lane < THREADS / 32 ? partial[lane] : 0;\n",
        "if (warp == 0) {\n      sum = 0;\n"
        "      for (int j = lane; j < length; j += 32) sum += fabsf(row[j]);\n",
        ptx.Race, "line 19: *scale = sum"),
    Bug("every warp writes the scale", "if (warp == 0) {\n      sum = lane", "{\n      sum = lane",
        ptx.Race, "scale = sum"),
    Bug("blocks share one scale", "scales[blockIdx.x * levels + level] = scale",
        "scales[level] = scale", ptx.Race, r"scales\[level\]"),
    Bug("all threads add to one scale", "    __syncthreads();\n    if (warp == 0) {",
        "    scales[blockIdx.x * levels + level] += sum;\n"
        "    __syncthreads();\n    if (warp == 0) {",
        ptx.UninitializedRead, "global"),
    Bug("reads beyond the partial sums", "lane < THREADS / 32 ? partial[lane] : 0",
        "partial[lane % 8]", ptx.OutOfBounds, r"partial\[lane % 8\]"),
    Bug("reads a partial sum that nothing wrote", "if (lane == 0) partial[warp]",
        "if (lane == 0 && warp < 2) partial[warp]",
        ptx.UninitializedRead, r"partial\[lane\]"),
    Bug("some lanes add to what a register happens to hold", "float sum = 0;",
        'float sum; if (warp) sum = 0; asm volatile("" : "+f"(sum));',
        ptx.UninitializedRead, "register %"),
    Bug("stores a register that nothing wrote", "out[j] = row[j]",
        'asm("{ .reg .f32 none; mov.f32 %0, none; }" : "=f"(out[j]))',
        ptx.UninitializedRead, "register %.*\n.*\n *st.global"),
    Bug("local memory that nothing wrote", "    float sum = 0;\n",
        "    float own[4]; for (int j = 0; j < levels; ++j) own[j] = 0;\n"
        "    float sum = own[(level + 2) & 3];\n",
        ptx.UninitializedRead, "local memory"),
    Bug("reads an output that nothing wrote", "out[j] = row[j]", "out[j] += row[j]",
        ptx.UninitializedRead, "global memory nothing wrote"),
    Bug("the last block is skipped", "", "", None, grid=ROWS - 1),
    Bug("the tail is skipped", "j < length; j += THREADS) out[j] = row[j]",
        "j + THREADS <= length + threadIdx.x; j += THREADS) out[j] = row[j]",
        ptx.UninitializedRead, "global"),
    Bug("the tail is not peeled", "j += THREADS) {\n", "j += 2 * THREADS) {\n", None),
    Bug("barrier in one branch only", "    __syncthreads();\n    if (warp == 0) {",
        "    if (warp == 0) {\n      __syncthreads();", ptx.DivergentBarrier, "lines 16 and 24"),
    Bug("threads leave before a barrier", "  const float* row",
        "  if (warp >= length / 40) return;\n  const float* row",
        ptx.ExitBeforeBarrier, "never reached"),
    Bug("shuffle from a lane outside the mask",
        "for (int step = 16; step; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);\n"
        "      if", "if (lane < 3) for (int step = 2; step; step /= 2)"
        " sum += __shfl_down_sync(0x7u, sum, step);\n      if",
        ptx.AbsentLane, "reads lane 3"),
    Bug("a lane that its mask leaves out", "0xffffffffu, sum, step);\n    if",
        "0x7fffffffu, sum, step);\n    if", ptx.AbsentLane, "not in its own mask"),
    Bug("full mask in half a warp", "for (int step = 16; step; step /= 2) sum +=",
        "if (lane < 16) for (int step = 8; step; step /= 2) sum +=", ptx.Deadlock, "lane < 16"),
    Bug("wrong type of the array", "out[j] = row[j]",
        "out[j] = reinterpret_cast<const double*>(x)[blockIdx.x * length + j]", ptx.OutOfBounds,
        "8 bytes.*past the end"),
    Bug("wrong width of an index", "x + blockIdx.x * length",
        "x + (signed char)(blockIdx.x * length)", ptx.OutOfBounds, "before an argument"),
    Bug("off by one in the stride", "j += THREADS) sum +=", "j += THREADS - 1) sum +=",
        ptx.Race, "sum"),
    Bug("off by one in the row", "y + blockIdx.x * length", "y + blockIdx.x * (length - 1)",
        ptx.Race, "in no order"),
    Bug("shared array too small", "partial[THREADS / 32];", "partial[THREADS / 32 - 1];",
        ptx.OutOfBounds, "of shared memory"),
    Bug("dynamic shared memory not asked for", "__shared__ float partial[THREADS / 32];",
        "extern __shared__ float partial[];", ptx.OutOfBounds, "of shared memory"),
    Bug("local array too small", "    float sum = 0;\n",
        "    float own[4]; for (int j = 0; j < length; ++j) own[j & 7] = j;\n"
        "    float sum = own[levels];\n", ptx.OutOfBounds, "of local memory"),
    Bug("warp-synchronous code without a warp barrier", "if (lane == 0) partial[warp] = sum;",
        "__shared__ float all[THREADS]; all[threadIdx.x] = sum; sum = all[threadIdx.x ^ 1];"
        " if (lane == 0) partial[warp] = sum;", ptx.Race, "no barrier between"),
    Bug("read-only cache over what is written", "sum += fabsf(out[j])",
        "sum += fabsf(__ldg(out + j))", ptx.Race, "read-only cache"),
    Bug("the neighbours are read while they change", "out[j] > 0 ?", "out[j ^ 1] > 0 ?",
        ptx.Fault, "in no order|out"),
    Bug("a loop without end", "++level) {", "level += levels < 0) {", ptx.NoProgress,
        "still running"),
    Bug("wrong identity", "float sum = 0;", "float sum = 1;", None),
    Bug("half the shuffles", "for (int step = 16; step; step /= 2) sum +=",
        "for (int step = 16; step > 1; step /= 2) sum +=", None),
]  # fmt: skip


@pytest.fixture(params=ARCHITECTURES, autouse=True)
def arch(request):
    """Everything here runs as compiled for each architecture."""
    with architecture(request.param):
        yield


@pytest.fixture
def rows(rng):
    """Rows of odd length, longer than a block."""
    return rng.normal(size=(ROWS, 101)).astype(np.float32)


def peel(source, x, levels=2, grid=ROWS, shared=0):
    """Run the kernel; the residual and the scales."""
    y = module.empty(x.shape, np.float32)
    scales = module.empty((len(x), levels), np.float32)
    arguments = (module.asarray(x), y, scales, np.int32(x.shape[1]), np.int32(levels))
    module.RawKernel(source, "peel")((grid,), (THREADS,), arguments, shared_mem=shared)
    return y.get(), scales.get()


def reference(x, levels=2):
    r, scales = x.astype(np.float64), []
    for _ in range(levels):
        scale = np.abs(r).mean(axis=1, keepdims=True)
        r = r - np.where(r > 0, scale, -scale)
        scales.append(scale)
    return r, np.concatenate(scales, axis=1)


def is_right(results, x):
    return all(
        np.allclose(got, wanted, rtol=1e-5, atol=1e-6)
        for got, wanted in zip(results, reference(x), strict=True)
    )


def test_the_kernel_without_a_bug(rows):
    assert is_right(peel(CORRECT, rows), rows)


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_bug(bug, rows, monkeypatch):
    monkeypatch.setattr("tests.ptx.machine.MOST_STEPS", 1000)
    if bug.old:
        assert CORRECT.count(bug.old) >= 1
    source = CORRECT.replace(bug.old, bug.new) if bug.old else CORRECT
    if bug.caught is None:
        assert not is_right(peel(source, rows, grid=bug.grid, shared=bug.shared), rows)
        return
    with pytest.raises(bug.caught, match=bug.where) as caught:
        peel(source, rows, grid=bug.grid, shared=bug.shared)
    place = caught.value.place
    assert place.kernel == "peel"
    assert place.line > 0
    assert place.source in source
    assert all(a < b for a, b in zip(place.block, (ROWS, 1, 1), strict=True))
    assert all(a < b for a, b in zip(place.thread, (THREADS, 1, 1), strict=True))


def test_enough_bugs():
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 16
