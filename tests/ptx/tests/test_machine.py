"""Threads, warps, blocks and memory: whole kernels against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("cupy")

from tests import ptx
from tests.ptx.device import ARCHITECTURES, architecture, module

pytestmark = [pytest.mark.kernels, pytest.mark.exhaustive]


@pytest.fixture(params=ARCHITECTURES, autouse=True)
def arch(request):
    """Everything here runs as compiled for each architecture."""
    with architecture(request.param):
        yield


def run(body, arrays, *, grid=1, block=64, shared=0, top="", scalars=()):
    """Run a kernel of parameters a, b, c... (ints or floats by dtype) and give them all back."""
    types = {"float32": "float", "int32": "int", "uint32": "unsigned", "float64": "double"}
    types |= {"uint8": "unsigned char", "int64": "long long", "uint64": "unsigned long long"}
    types |= {"uint16": "unsigned short"}
    names = "abcdef"
    parameters = [f"{types[v.dtype.name]}* {names[k]}" for k, v in enumerate(arrays)]
    parameters += [f"{types[v.dtype.name]} s{k}" for k, v in enumerate(scalars)]
    source = f"""{top}
    extern "C" __global__ void test({", ".join(parameters)}) {{
      const int t = threadIdx.x, lane = threadIdx.x & 31;
      const int i = blockIdx.x * blockDim.x + threadIdx.x;
      (void)t; (void)lane; (void)i;
      {body}
    }}"""
    device = [module.asarray(v) for v in arrays]
    grid, block = (g if isinstance(g, tuple) else (g,) for g in (grid, block))
    module.RawKernel(source, "test")(grid, block, (*device, *scalars), shared_mem=shared)
    return [d.get() for d in device]


# ---------------------------------------------------------------- control flow


def test_loops_of_different_length():
    steps, count = run("int n = 0, x = a[i]; while (x != 1) { x = x % 2 ? 3 * x + 1 : x / 2; ++n; }"
                       "b[i] = n;", [np.arange(1, 129, dtype=np.int32), np.zeros(128, np.int32)],
                       grid=2)  # fmt: skip

    def collatz(x):
        return 0 if x == 1 else 1 + collatz(3 * x + 1 if x % 2 else x // 2)

    assert count.tolist() == [collatz(int(x)) for x in steps]


def test_early_returns_and_breaks():
    _, found = run(
        """if (i % 3 == 0) return;
        int k = 0;
        for (; k < 10; ++k) { if (k == i % 7) break; if (k * i == 12) { b[i] = -1; return; } }
        b[i] = k;""",
        [np.zeros(64, np.int32), np.full(64, 99, np.int32)],
    )

    def expected(i):
        if i % 3 == 0:
            return 99
        for k in range(10):
            if k == i % 7:
                return k
            if k * i == 12:
                return -1
        return 10

    assert found.tolist() == [expected(i) for i in range(64)]


def test_switch():
    (found,) = run(
        """int r; switch (a[i] % 7) { case 0: r = 5; break; case 1: r = i * i; break;
        case 2: r = -i; break; case 3: r = 17; break; case 4: r = i ^ 21; break;
        case 5: r = i / 3; break; default: r = 1; } a[i] = r;""",
        [np.arange(64, dtype=np.int32)],
    )
    table = [lambda i: 5, lambda i: i * i, lambda i: -i, lambda i: 17, lambda i: i ^ 21]
    table += [lambda i: i // 3, lambda i: 1]
    assert found.tolist() == [table[i % 7](i) for i in range(64)]


def test_functions_that_are_not_inlined():
    top = """
    __device__ __noinline__ int mix(int x, int y) { if (x > y) return x - y; return x * y; }
    __device__ __noinline__ int twice(int x) { return mix(x, 3) + mix(3, x); }"""
    (found,) = run("a[i] = twice(a[i]);", [np.arange(64, dtype=np.int32)], top=top)
    mix = lambda x, y: x - y if x > y else x * y  # noqa: E731
    assert found.tolist() == [mix(i, 3) + mix(3, i) for i in range(64)]


def test_arguments_of_different_size():
    """NVRTC gives the arguments of all calls the same names."""
    top = """struct Many { int item[16]; };
    __device__ __noinline__ int sum(Many m) {
      int s = 0; for (int k = 0; k < 16; ++k) s += m.item[k]; return s; }
    __device__ __noinline__ int next(int x) { return x > 99 ? x * x : x + 1; }"""
    body = """Many m; for (int k = 0; k < 16; ++k) m.item[k] = k * i;
    a[i] = sum(m) + next(i);"""
    (found,) = run(body, [np.zeros(64, np.int32)], top=top)
    assert found.tolist() == [120 * i + i + 1 for i in range(64)]


def test_local_arrays_and_constants():
    top = "__constant__ int table[5] = {3, 1, 4, 1, 5}; __device__ const float more[2] = {.5f, 2};"
    a, b = run(
        """int own[8]; for (int k = 0; k < 8; ++k) own[k] = k * i;
        own[i % 8] += table[i % 5]; int s = 0;
        for (int k = 0; k < 8; ++k) s += own[(k * a[i]) & 7];
        a[i] = s; b[i] = more[i & 1];""",
        [np.arange(64, dtype=np.int32), np.zeros(64, np.float32)],
        top=top,
    )
    expected = []
    for i in range(64):
        own = [k * i for k in range(8)]
        own[i % 8] += [3, 1, 4, 1, 5][i % 5]
        expected.append(sum(own[k * i & 7] for k in range(8)))
    assert a.tolist() == expected
    assert b.tolist() == [0.5, 2.0] * 32


def test_constants_of_odd_size():
    top = "__constant__ int tens[3] = {10, 20, 30}; __constant__ char small[5] = {1, 2, 3, 4, 5};"
    (found,) = run("a[i] = tens[a[i] % 3] * small[a[i] % 5];", [np.arange(64, dtype=np.int32)],
                   top=top)  # fmt: skip
    assert found.tolist() == [10 * (i % 3 + 1) * (i % 5 + 1) for i in range(64)]


def test_grids_and_blocks_of_three_axes():
    (found,) = run(
        """int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y,
        z = blockIdx.z * blockDim.z + threadIdx.z;
        a[(z * gridDim.y * blockDim.y + y) * gridDim.x * blockDim.x + x] = x + 100 * y + 10000 * z;
        """,
        [np.zeros((2, 6, 12), np.int32)],
        grid=(3, 2, 1),
        block=(4, 3, 2),
    )
    z, y, x = np.indices((2, 6, 12))
    np.testing.assert_array_equal(found, x + 100 * y + 10000 * z)


def test_more_blocks_than_one_batch():
    n = 300_001
    a, b = run(
        "if (i < s0) b[i] = a[i] + 1;",
        [np.arange(n, dtype=np.int32), np.zeros(n, np.int32)],
        grid=-(-n // 256),
        block=256,
        scalars=(np.int32(n),),
    )
    np.testing.assert_array_equal(b, a + 1)


def test_assertions_and_traps():
    with pytest.raises(ptx.Trap, match=r"thread \(3, 0, 0\).*line 6"):
        run("if (a[i] == 3) __trap();", [np.arange(64, dtype=np.int32)])


# ---------------------------------------------------------------- registers that nothing wrote

NONE = """int none;
asm volatile("{ .reg .b32 r; .reg .pred p; setp.lt.s32 p, %1, 32; @p mov.b32 r, 7; mov.b32 %0, r; }"
             : "=r"(none) : "r"(t));
"""
# A register that the first 32 threads wrote.


@pytest.mark.parametrize(
    "body",
    [
        "if (t < 32) a[i] = none;",
        "a[i] = t < 32 ? none : 0;",
        "int both = none; if (t >= 32) both = 7; a[i] = both;",
        'int y; asm volatile("{ .reg .pred p; setp.lt.s32 p, %2, 32; selp.b32 %0, %1, 0, p; }"'
        ' : "=r"(y) : "r"(none), "r"(t)); a[i] = y;',
        "if (t < 32) a[i] = __shfl_sync(~0u, none, 3);",
        'long long w; asm volatile("mov.b64 %0, {%1, %1};" : "=l"(w) : "r"(none));'
        " if (t < 32) a[i] = (int)w;",
    ],
)
def test_an_unwritten_register_may_be_moved_and_left(body):
    (found,) = run(NONE + body, [np.zeros(64, np.int32)])
    assert (found[:32] == 7).all()


@pytest.mark.parametrize(
    "body",
    [
        "a[i] = none;",
        "a[i] = none + 1;",
        "if (none == 7) a[i] = 1;",
        "a[none & 63] = 1;",
        "a[i] = __shfl_xor_sync(~0u, none, 1);",
        'int y; asm volatile("{ .reg .pred p; setp.lt.s32 p, %2, 40; selp.b32 %0, %1, 0, p; }"'
        ' : "=r"(y) : "r"(none), "r"(t)); a[i] = y;',
        'asm volatile("{ .reg .pred p; setp.lt.s32 p, %1, 40; @p mov.b32 %0, %2; }"'
        ' : "=r"(a[i]) : "r"(t), "r"(none));',
        'asm volatile("{ .reg .pred p, q; setp.lt.s32 p, %1, 9; @p setp.eq.s32 q, %1, 0; '
        '@q mov.b32 %0, 1; }" : "+r"(a[i]) : "r"(t));',
        'long long w; asm volatile("mov.b64 %0, {%1, %1};" : "=l"(w) : "r"(none)); a[i] = w != 0;',
        "a[i] = __ballot_sync(~0u, none);",
    ],
)
def test_an_unwritten_register_decides_nothing(body):
    with pytest.raises(ptx.UninitializedRead, match="register"):
        run(NONE + body, [np.zeros(64, np.int32)])


def test_the_thread_that_reads_an_unwritten_register_is_named():
    with pytest.raises(ptx.UninitializedRead, match="32 of the lanes") as caught:
        run(NONE + "a[i] = none + 1;", [np.zeros(64, np.int32)])
    assert caught.value.place.thread == (32, 0, 0)


def test_a_function_that_returns_nothing_it_promised():
    top = """__device__ __noinline__ int half(int x) {
      if (x % 2 == 0) return x / 2;
      int none; asm volatile("{ .reg .b32 r; mov.b32 %0, r; }" : "=r"(none)); return none; }"""
    with pytest.raises(ptx.UninitializedRead, match="register"):
        run("a[i] = half(i);", [np.zeros(64, np.int32)], top=top)


# ---------------------------------------------------------------- memory


def test_vector_loads_and_stores():
    x = np.arange(256, dtype=np.float32)
    _, b = run(
        """float4 v = reinterpret_cast<float4*>(a)[i]; v.x += v.w;
        reinterpret_cast<float4*>(b)[i] = v;""",
        [x, np.zeros_like(x)],
    )
    expected = x.reshape(64, 4).copy()
    expected[:, 0] += expected[:, 3]
    np.testing.assert_array_equal(b, expected.ravel())
    with pytest.raises(ptx.Misaligned, match="16"):
        run("float4 v = reinterpret_cast<float4*>(a + 1)[i]; b[i] = v.x + v.y + v.z + v.w;", [x, x])


def test_generic_pointers_to_every_space():
    a, b = run(
        """__shared__ int s[64]; int own[2] = {7, i}; s[t] = 1000 + t; __syncthreads();
        int* p = t % 3 == 0 ? s + t : t % 3 == 1 ? a + t : own + (b[i] & 1);
        b[i] = *p; __syncthreads(); if (t % 3 == 0) *p += 1; __syncthreads(); a[i] = s[t];""",
        [np.arange(64, dtype=np.int32), np.ones(64, np.int32)],
    )
    i = np.arange(64)
    np.testing.assert_array_equal(b, np.where(i % 3 == 0, 1000 + i, i))
    np.testing.assert_array_equal(a, 1000 + i + (i % 3 == 0))


def test_atomics_through_generic_pointers():
    a, b = run(
        """__shared__ int s; if (t == 0) s = 0; __syncthreads();
        atomicAdd(i % 3 == 0 ? &s : i % 3 == 1 ? a : b, i); __syncthreads(); if (t == 0) b[1] = s;
        """,
        [np.zeros(64, np.int32), np.zeros(64, np.int32)],
    )
    assert [a[0], b[0], b[1]] == [sum(range(k, 64, 3)) for k in (1, 2, 0)]


@pytest.mark.parametrize("use", ["*p = 1;", "b[i] = *p;", "atomicAdd(p, 1);"])
@pytest.mark.parametrize("place", ["a[0] - 4ll", "a[0]", "a[0] + 0x7700000000000000ll"])
def test_addresses_that_are_nowhere(use, place):
    with pytest.raises(ptx.OutOfBounds, match="argument"):
        run(f"int* p = reinterpret_cast<int*>({place}); {use}", [np.zeros(64, np.int32)] * 2)


def test_dynamic_shared_memory_of_mixed_types():
    a, b = run(
        """extern __shared__ double d[]; float* f = reinterpret_cast<float*>(d + 64);
        d[t] = a[i] * 2.; f[t] = a[i] + 1.f; __syncthreads();
        b[i] = d[63 - t] + f[t ^ 1];""",
        [np.arange(64, dtype=np.float32), np.zeros(64)],
        shared=64 * 12,
    )
    np.testing.assert_array_equal(b, a[::-1] * 2 + a.reshape(-1, 2)[:, ::-1].ravel() + 1)


def test_atomics():
    n = 1000
    x = np.random.default_rng(1).integers(0, 7, n).astype(np.int32)
    _, counts, extremes, order = run(
        """__shared__ int s[7]; if (t < 7) s[t] = 0; __syncthreads();
        if (i < s0) { atomicAdd(s + a[i], 1); atomicMax(c, a[i] * 3); atomicMin(c + 1, -a[i]);
                      d[atomicAdd(c + 2, 1)] = 1; atomicCAS(c + 3, 5, i); atomicXor(c + 4, i); }
        __syncthreads(); if (t < 7) atomicAdd(b + t, s[t]);""",
        [x, np.zeros(7, np.int32), np.array([0, 0, 0, 5, 0], np.int32), np.zeros(n, np.int32)],
        grid=16,
        scalars=(np.int32(n),),
    )
    np.testing.assert_array_equal(counts, np.bincount(x, minlength=7))
    assert extremes[:3].tolist() == [18, -6, n]
    assert 0 <= extremes[3] < n
    assert extremes[4] == np.bitwise_xor.reduce(np.arange(n))
    assert order.tolist() == [1] * n


def test_atomics_on_floats():
    a, b = run("atomicAdd(b, a[i]);", [np.full(64, 0.5, np.float32), np.zeros(1, np.float32)])
    assert b.tolist() == [32]
    assert a[0] == 0.5


# ---------------------------------------------------------------- warps and blocks


def test_shuffles():
    x = np.arange(64, dtype=np.int32) * 3
    results = run(
        """int v = a[i];
        b[i] = __shfl_up_sync(0xffffffffu, v, 3); c[i] = __shfl_down_sync(0xffffffffu, v, 5, 16);
        d[i] = __shfl_xor_sync(0xffffffffu, v, 8); e[i] = __shfl_sync(0xffffffffu, v, 33, 8);""",
        [x] + [np.zeros(64, np.int32)] * 4,
    )
    lane, base = np.arange(64) % 32, np.arange(64) // 32 * 32
    np.testing.assert_array_equal(results[1], x[base + np.where(lane >= 3, lane - 3, lane)])
    np.testing.assert_array_equal(
        results[2], x[base + np.where(lane % 16 + 5 < 16, lane + 5, lane)]
    )
    np.testing.assert_array_equal(results[3], x[base + (lane ^ 8)])
    np.testing.assert_array_equal(results[4], x[base + lane // 8 * 8 + 1])


@pytest.mark.parametrize("dtype", [np.uint64, np.int64, np.float64])
def test_shuffles_of_wide_values(dtype):
    x = np.random.default_rng(0).integers(-(2**63), 2**63, 64).view(dtype)
    x = np.where(np.isnan(x), 0, x)
    _, best, other = run(
        """auto v = a[i]; c[i] = __shfl_xor_sync(0xffffffffu, v, 5);
        for (int k = 4; k; k /= 2) {
          const auto other = __shfl_xor_sync(0xffffffffu, v, k); v = v > other ? v : other; }
        b[i] = v;""",
        [x, np.zeros(64, dtype), np.zeros(64, dtype)],
    )
    np.testing.assert_array_equal(best, np.repeat(x.reshape(8, 8).max(axis=1), 8))
    np.testing.assert_array_equal(other, x[np.arange(64) ^ 5])


def test_tiles_with_structs_in_shared_memory():
    top = """struct State { double sum[3]; int steps; };
    template<int LANES> __device__ State& state() {
      __shared__ State states[64 / LANES]; return states[threadIdx.x / LANES]; }
    template<int LANES> __device__ double halve_until_small(double x) {
      const int rank = threadIdx.x % LANES;
      State& own = state<LANES>();
      if (rank < 3) own.sum[rank] = 0;
      if (rank == 3) own.steps = 0;
      __syncwarp();
      double most = x;
      for (int k = LANES / 2; k; k /= 2) most = fmax(most, __shfl_xor_sync(~0u, most, k));
      for (int turn = 0; __any_sync(~0u, most >= 1); ++turn) {
        if (most >= 1 && rank == 0) { own.sum[turn % 3] += most; ++own.steps; }
        if (most >= 1) most /= 2;
        __syncwarp();
      }
      return own.sum[0] + 1e3 * own.sum[1] + 1e6 * own.sum[2] + 1e9 * own.steps;
    }"""
    x = np.random.default_rng(0).uniform(0, 40, 64)
    _, found = run("b[i] = halve_until_small<8>(a[i]) + halve_until_small<16>(a[i]);",
                   [x, np.zeros(64)], top=top)  # fmt: skip

    def expected(most):
        sums, steps = [0, 0, 0], 0
        while most >= 1:
            sums[steps % 3] += most
            most, steps = most / 2, steps + 1
        return sums[0] + 1e3 * sums[1] + 1e6 * sums[2] + 1e9 * steps

    eights, sixteens = ([expected(m) for m in x.reshape(-1, n).max(axis=1)] for n in (8, 16))
    np.testing.assert_array_equal(found, np.repeat(eights, 8) + np.repeat(sixteens, 16))


def test_votes_and_matches():
    x = np.random.default_rng(0).integers(0, 4, 64).astype(np.int32)
    a, ballot, same, flags = run(
        """b[i] = __ballot_sync(0xffffffffu, a[i] > 1); c[i] = __match_any_sync(0xffffffffu, a[i]);
        int pred; __match_all_sync(0xffffffffu, a[i] / 4, &pred);
        d[i] = __any_sync(0xffffffffu, a[i] > 5) + 2 * __all_sync(0xffffffffu, a[i] < 4)
             + 4 * pred + 8 * __any_sync(0xffffffffu, lane == 31);""",
        [x] + [np.zeros(64, np.uint32)] * 2 + [np.zeros(64, np.int32)],
    )
    for start in (0, 32):
        warp = x[start : start + 32]
        assert set(ballot[start : start + 32].tolist()) == {
            sum(1 << k for k in range(32) if warp[k] > 1)
        }
        for k in range(32):
            assert same[start + k] == sum(1 << m for m in range(32) if warp[m] == warp[k])
    assert flags.tolist() == [14] * 64
    assert a.tolist() == x.tolist()


@pytest.mark.parametrize("start", [0, 2**60, 2**63])
def test_matches_of_wide_values(start):
    x = np.random.default_rng(0).integers(0, 4, 64).astype(np.uint64) + np.uint64(start)
    _, same, everyone = run(
        """b[i] = __match_any_sync(0xffffffffu, a[i]); int all;
        c[i] = __match_all_sync(0xffffffffu, a[i], &all) + all
             + (__match_all_sync(0xffffffffu, a[i] >> 2, &all) != 0) + all;""",
        [x, np.zeros(64, np.uint32), np.zeros(64, np.uint32)],
    )
    for k in range(64):
        warp = x[k // 32 * 32 :][:32]
        assert same[k] == sum(1 << lane for lane in range(32) if warp[lane] == x[k])
    assert everyone.tolist() == [2] * 64


def test_warp_reductions_of_integers():
    x = np.random.default_rng(0).integers(-99, 99, 64).astype(np.int32)
    _, b, c = run(
        """b[i] = __reduce_add_sync(0xffffffffu, a[i]); c[i] = __reduce_max_sync(0xffffffffu, a[i]);
        """,
        [x, np.zeros(64, np.int32), np.zeros(64, np.int32)],
    )
    warps = x.reshape(2, 32)
    np.testing.assert_array_equal(b, np.repeat(warps.sum(1), 32))
    np.testing.assert_array_equal(c, np.repeat(warps.max(1), 32))


def test_part_of_a_warp():
    """Both sides of a branch vote for themselves, at different places."""
    (found,) = run(
        """unsigned m = __ballot_sync(0xffffffffu, lane % 3 == 0);
        if (lane % 3 == 0) a[i] = __popc(__ballot_sync(m, i & 1));
        else a[i] = 100 + __popc(__activemask());""",
        [np.zeros(64, np.int32)],
    )
    for start in (0, 32):
        odd = sum(1 for k in range(0, 32, 3) if (start + k) & 1)
        for k in range(32):
            assert found[start + k] == (odd if k % 3 == 0 else 121)


def test_lanes_that_left_are_not_waited_for():
    (found,) = run(
        "if (lane >= 20) return; a[i] = __popc(__ballot_sync(0xffffffffu, 1));",
        [np.zeros(64, np.int32)],
    )
    assert found.tolist() == ([20] * 20 + [0] * 12) * 2


def test_block_votes():
    (found,) = run(
        """int n = __syncthreads_count(a[i] > 9);
        int any = __syncthreads_or(a[i] == 5), all = __syncthreads_and(a[i] < 64);
        a[i] = n + 1000 * any + 2000 * all;""",
        [np.arange(128, dtype=np.int32)],
        grid=2,
    )
    assert found.tolist() == [54 + 1000 + 2000] * 64 + [64] * 64


def test_cooperative_tiles():
    (found,) = run(
        """auto block = cooperative_groups::this_thread_block();
        auto tile = cooperative_groups::tiled_partition<8>(block);
        int v = a[i]; for (int k = tile.size() / 2; k; k /= 2) v += tile.shfl_down(v, k);
        v = tile.shfl(v, 0); tile.sync(); block.sync(); a[i] = v + 1000 * tile.thread_rank();""",
        [np.arange(64, dtype=np.int32)],
        top="#include <cooperative_groups.h>",
    )
    i = np.arange(64)
    np.testing.assert_array_equal(found, i // 8 * 64 + 28 + 1000 * (i % 8))


def test_block_reduction_of_cub():
    x = np.random.default_rng(0).integers(0, 1000, (3, 128)).astype(np.int32)
    _, b = run(
        """typedef cub::BlockReduce<int, 128> Reduce; __shared__ typename Reduce::TempStorage s;
        int total = Reduce(s).Sum(a[i]); if (t == 0) b[blockIdx.x] = total;""",
        [x, np.zeros(3, np.int32)],
        grid=3,
        block=128,
        top="#include <cub/block/block_reduce.cuh>",
    )
    np.testing.assert_array_equal(b, x.sum(axis=1))


def test_warp_barriers_order_shared_memory():
    body = """__shared__ int s[64]; s[t] = a[i]; %s a[i] = s[t ^ 1];"""
    (found,) = run(body % "__syncwarp();", [np.arange(64, dtype=np.int32)])
    np.testing.assert_array_equal(found, np.arange(64) ^ 1)
    with pytest.raises(ptx.Race):
        run(body % "", [np.arange(64, dtype=np.int32)])
    with pytest.raises(ptx.Race):  # a warp barrier orders one warp only
        run((body % "__syncwarp();").replace("t ^ 1", "t ^ 32"), [np.arange(64, dtype=np.int32)])


FORGET = 'asm volatile("" ::: "memory");'


@pytest.mark.parametrize(
    ("body", "grid"),
    [
        (f"s = a[0]; __syncwarp(); int v = s; {FORGET}"
         f" if (t == 31) {{ v += s; {FORGET} s = 9; }}", 1),
        ("s = a[0]; __syncwarp(); int v = s; if (lane > 15) { __syncwarp(0xffff0000u);"
         " if (t == 31) s = 9; }", 1),
        ("s = a[0]; __syncwarp(); atomicAdd(&s, 1);"
         f" int v = 0; if (t == 31) {{ {FORGET} v = s; }}", 1),
        ("atomicAdd(a, 1); __syncthreads(); int v = blockIdx.x && t == 0 ? *a : 0;", 2),
        (f"int v = *a; __syncthreads(); if (i == 63) {{ v += *a; {FORGET} *a = v; }}", 2),
        ("a[4 * t + 1] = 3; __syncwarp();"
         " int v = __ldg(reinterpret_cast<const int4*>(a) + t).y;", 1),
    ],
    ids=["reads again", "barrier of half a warp", "adds in a warp", "adds in two blocks",
         "reads in two blocks", "read-only cache over a part"],
)  # fmt: skip
def test_races_with_others_than_the_last_thread(body, grid):
    """The thread that races was itself the last to touch the memory."""
    with pytest.raises(ptx.Race):
        run("__shared__ int s; " + body + " b[i] = v;",
            [np.zeros(128, np.int32), np.zeros(64, np.int32)], grid=grid, block=32)  # fmt: skip


def test_no_race_with_those_that_a_warp_barrier_orders():
    (found,) = run(
        """__shared__ int s[4]; if (lane % 8 == 0) s[t / 8] = t; __syncwarp();
        for (int k = 0; k < 3; ++k) {
          const int v = s[t / 8] + s[t / 8]; __syncwarp(0xffu << lane / 8 * 8);
          if (lane % 8 == k) s[t / 8] = v + 1; __syncwarp(0xffu << lane / 8 * 8);
        }
        __syncwarp(); a[i] = s[3 - t / 8];""",
        [np.zeros(32, np.int32)],
        block=32,
    )
    assert found.tolist() == [8 * start + 7 for start in (24, 16, 8, 0) for _ in range(8)]


def test_launches_are_counted():
    x = np.zeros(1000, np.float32)
    with ptx.launches() as seen:
        run("if (i < s0) b[i] = a[i] + a[0];", [x, x], grid=16, scalars=(np.int32(1000),))
    (launch,) = seen
    assert launch.kernel == "test"
    assert (launch.read, launch.written) == (8000, 4000)
    assert (launch.read_unique, launch.written_unique) == (4000, 4000)
    assert 8 * 1000 < launch.instructions < 40 * 1024


def test_unknown_instructions_are_named():
    with pytest.raises(ptx.UnsupportedInstruction, match=r"vabsdiff4"):
        run("a[i] = __vabsdiffu4(a[i], 1);", [np.zeros(64, np.int32)])


def test_registers_and_spills():
    found = ptx.resources(
        'extern "C" __global__ void f(float* x) { __shared__ float s[32]; s[threadIdx.x] = *x;'
        "__syncthreads(); *x = s[0]; }",
        "sm_80",
    )
    assert found["f"].shared == 128
    assert found["f"].spill_loads == found["f"].spill_stores == 0
    assert 4 <= found["f"].registers <= 32
