"""Why mutants of the kernels that survive change nothing."""

from __future__ import annotations

LINES: dict[str, tuple[str, ...]] = {
    "the level after the last has the scale 0, which changes neither y nor the residual": (
        "for (int level = 0; level <= (int)sizeof...(Scales); ++level) {",
    ),
    "equal magnitudes are the same number": (
        "sum.worst = a.worst >= b.worst || a.worst != a.worst ? a.worst : b.worst;",
    ),
    "the cell after the last begins a depth, so it gets no edge; its value is not looked at": (
        "for (int cell = first_used(LEVELS) + leader(); cell <= CELLS; cell += Team::LEADERS)",
    ),
    "twice the unit of rows of the smallest normal numbers does as well": (
        "static __device__ unsigned int exponent(Pattern m) { return max(m >> 23, 2u); }",
        "static __device__ unsigned long long exponent(Pattern m) { return max(m >> 52, 2ull); }",
    ),
    "a level that is not found yet has the scale 0": (
        "for (int i = 0; i <= level; ++i) cut += scale[i] * sign_at(code[cell], i);",
        "for (int i = 0; i <= LEVEL; ++i) m[g] = absolute(minus(m[g], scale[i]));",
        "if (i <= level) m = absolute(minus(m, scale[i]));",
        "for (int i = 0; i <= level; ++i) total -= equations[entry_of(level, i)] * scale[i];",
    ),
    "a sign is 1 or -1": (
        "for (int i = 0; i < level; ++i) cut += scale[i] / sign_at(code[cell], i);",
        "if (i < LEVELS) total += sign / sign_at(code[cell], i) * (here.count - higher.count);",
    ),
    "the first edge and whatever is below 0 are both below every magnitude": (
        "if (cell >= first_of(level)) cut = fmax(cut, to_double(edge[cell]));",
    ),
    "codes and scales have both changed their signs at that level": (
        "sum -= plus ? scale[level] : -scale[level];",
    ),
    "sums of 1 or more are taken in double anew: slower, and no less exact": (
        "if (!(total < 1e300 / 1e300)) total = wide_sum_after(level, x, bits, scale);",
    ),
    "it holds no instruction": (
        "for (int e = 0; e <= E; ++e) forget(x[e]);",
        "for (int w = 0; w < E * 4; ++w) forget(word[w]);",
        "for (int w = 1; w < E / 4; ++w) forget(word[w]);",
        "for (int e = 1; e < E; ++e) forget(x[e]);",
        "for (int w = 0; w <= E / 4; ++w) forget(word[w]);",
        "for (int w = 0; w < E / 5; ++w) forget(word[w]);",
    ),
    "there are at most 15 sums, so nobody comes to a second one": (
        "for (int which = first + threadIdx.x * step; which < end; which += 32 / step) {",
        "for (int which = first + threadIdx.x * step; which < end; which += 33 * step) {",
    ),
    "all leaders have the same value": (
        "if (Team::rank() != 0) inverse[p] = over;",
        "if (Team::rank() == 1) inverse[p] = over;",
    ),
    "no further pack begins before the row's end": (
        "for (int pack = 0; pack < E * N; ++pack) {",
        "for (int pack = 0; pack <= E / N; ++pack) {",
    ),
    "it asks for more than there is, so it is ignored; the kernel fits without it": (
        (
            "__global__ void __launch_bounds__(Team::MOST_THREADS, 1024 * Team::MOST_THREADS) "
            "cubin_solve_rows("
        ),
        (
            "__global__ void __launch_bounds__(Team::MOST_THREADS, 1024 * Team::MOST_THREADS) "
            "cubin_approximate_rows("
        ),
        (
            "__global__ void __launch_bounds__(Team::MOST_THREADS, 1024 * Team::MOST_THREADS) "
            "cubin_encode_rows("
        ),
        (
            "__global__ void __launch_bounds__(Team::MOST_THREADS, 1024 * Team::MOST_THREADS) "
            "cubin_reconstruct_rows("
        ),
    ),
    "a row of zeros has the unit of the smallest number": (
        "Pattern most = 1;",
        "return most_of_lanes<32>(lane < blockDim.x / 32 ? of_warps[lane] : U(1));",
    ),
    "the steps are those for 32": (
        "value = sum_of_lanes<33>(value);",
        "return most_of_lanes<33>(lane < blockDim.x / 32 ? of_warps[lane] : U(0));",
        "return sum_of_lanes<33>(value);",
        "value = most_of_lanes<33>(value);",
    ),
    "all lanes have the sum": (
        "if (threadIdx.x % 32 == 1) of_warps[which][threadIdx.x / 32] = value;",
        "if (rank() != 0) total[which] = value;",
        "if (rank() == 1) total[which] = value;",
        "if (lane != 0) of_warps[turn % 2][threadIdx.x / 32] = value;",
        "if (lane == 1) of_warps[turn % 2][threadIdx.x / 32] = value;",
        "if (threadIdx.x % 32 != 0) of_warps[which][threadIdx.x / 32] = value;",
    ),
    "the total is the length of the row": ("__device__ int count(int) const { return 1; }",),
    "the body runs where i < level, and level < LEVELS": (
        "for (int i = 0; i <= LEVELS - 1; ++i)",
        "for (int i = 0; i < LEVELS + 1; ++i)",
    ),
    "one more branch, for a level that there is not": ("if constexpr (LEVEL + 1 <= LEVELS)",),
    "only sums beyond the largest float start there: 1 is lost in them": ("double total = 1;",),
    "that slope is 1 everywhere": (
        "return absolute(slope) >= 0 ? times(slope, g) : W(0);",
        "return absolute(slope) > 0 ? times(slope, g) : W(1);",
    ),
    "2 - 2 |v| is 0 there": (
        (
            "template<class W> __device__ W slope(W v) { return absolute(v) < 1 ? 2 - 2 * "
            "absolute(v) : W(0); }"
        ),
    ),
    "t is 1 there": (
        (
            "template<class W> __device__ W slope(W v, W t) { return (t <= 1 ? W(1) : t) / "
            "(cosh(t * v) * cosh(t * v)); }"
        ),
    ),
    "1 / t is 1 there": (
        (
            "template<class W> __device__ W slope(W v, W t) { return (t <= 1 ? 1 / t : W(1)) * "
            "fmax(W(1.4142135623730951) * t - t * t * absolute(v), W(0)); }"
        ),
    ),
    "the level after the last has the scale 0": (
        "for (int level = 0; level <= (int)sizeof...(Scales); ++level)",
    ),
    "only doubles have packs of two, and pairs of equal doubles add up as well as fours": (
        "constexpr bool WHOLE = Bits::WHOLE_PACKS && N > 2;",
    ),
    "elements of a pack are asked one by one too, and all give its answer": (
        "if (!(WHOLE && N > GROUP) && !bits.present(e + g, level)) m[g] = 0;",
    ),
    "more branches, for levels that there are not": ("if constexpr (LEVEL - 1 < LEVELS)",),
    "levels of the scale 0 change nothing, so any code for as many levels or more will do": (
        "constexpr int FEW = 5;",
        "constexpr int NEXT = LEVEL <= FEW ? LEVEL + 1 : 2 * LEVEL;",
        "constexpr int NEXT = LEVEL < FEW ? LEVEL + 1 : 3 * LEVEL;",
        "return sum_of_thread<NEXT <= LEVELS ? NEXT : LEVELS - 1, N>(level, x, bits, scale);",
    ),
    "the number is the same; as a constant it is faster": (
        "if (LEVEL < FEW) level = LEVEL;",
        "if (LEVELS < FEW) levels = LEVELS;",
    ),
    "the array is in registers, and none is beyond its end": (
        "for (int i = 0; i <= LEVELS; ++i) scale[i] = 0;",
    ),
    "the search for the level begins one earlier; with one level nobody comes here": (
        "total = sum_of_thread<LEVELS != 1 ? 0 : 1, N>(level, x, bits, scale);",
        "total = sum_of_thread<LEVELS == 2 ? 0 : 1, N>(level, x, bits, scale);",
    ),
    "m is not negative": (
        "__double2hiint(m) | 0x80000000 ^ (__double2hiint(n) & 0x80000000), __double2loint(m));",
    ),
    "no element of the row has a code at the level after its last": ("if (level > levels) break;",),
    "all threads have the same scales": ("if (row_length && rank == 1) {",),
    "all lanes have the largest": (
        "if (lane != 0) of_warps[threadIdx.x / 32] = value;",
        "if (lane == 1) of_warps[threadIdx.x / 32] = value;",
    ),
    "of each of the 32 warps one thread's number is a multiple of 33; all lanes have the sum": (
        "if (threadIdx.x % 33 == 0) of_warps[which][threadIdx.x / 32] = value;",
    ),
    "more room than is used": (
        "Pack<T, N, A> packs[E * N];",
        "unsigned int word[E * 4];",
        "static constexpr int ROWS = 2;",
        "__shared__ Sum of_warps[3][32];",
        "__shared__ Sum of_warps[2][33];",
        "__shared__ U of_warps[33];",
        "Sum of_warps[COUNT][33];",
        "T result[3][CELLS];  // of elements that are not positive, and of those that are",
    ),
    "as many rows, and blocks are of 256 as before": ("static constexpr int MOST_THREADS = 257;",),
    "blocks are of 1024 at most as before": ("static constexpr int MOST_THREADS = 1025;",),
    "there are 15 cells and 14 entries at most, so nobody comes to a second one": (
        "static constexpr int LEADERS = 33;",
    ),
    "the cut below the last cell does not reach its edge: not in one of 190,000 random rows": (
        "if (cell + 2 < first_of(level + 1)) cut = fmin(cut, to_double(edge[cell + 1]));",
    ),
    (
        "only the mean of no elements is NaN: no other scale depends on it, and least squares, "
        "which always follows, sets it to 0"
    ): ("return coded[level] >= 0 ? total / coded[level] : 0;",),
    "steps that are too long are left out": (
        "for (int step = 1 << LEVELS << 2; step; step /= 2)",
        "for (int step = 2 << LEVELS >> 2; step; step /= 2)",
    ),
    "no scale is used before it is found, and for compute_80 none is read before either": (
        "scale[depth + 1] = 0;  // compilers read it ahead",
        "scale[depth - 2] = 0;  // compilers read it ahead",
    ),
    "one more sum, of a cell that is not in use any more": (
        "add_up(elements, level + 1, MAP || !level ? 0 : first_of(level + 1) - 1, MAP ? 1 : 2);",
    ),
    "all leaders find the same mean": (
        "else if (Team::rank() != 0) scale[level] = mean_at(level);",
        "else if (Team::rank() == 1) scale[level] = mean_at(level);",
    ),
    "the pack is in registers, and no item is beyond its end": ("for (int j = 0; j <= N; ++j)",),
    "rounding errors are far below half of it, and pivots of independent signs far above": (
        "constexpr double DEPENDENT = 1.0 / (2ll << 38);",
        "constexpr double DEPENDENT = 1.0 / (1ll << 39);",
    ),
    "the first edge is not below itself either": (
        "static __device__ float absent() { return __uint_as_float(0x80000001u); }",
        (
            "static __device__ double absent() { return "
            "__longlong_as_double(0x8000000000000001ll); }"
        ),
    ),
    "that lies between what is absent and all magnitudes, too": (
        "static __device__ float lowest() { return __uint_as_float(0x80000002u); }",
        (
            "static __device__ double lowest() { return "
            "__longlong_as_double(0x8000000000000002ll); }"
        ),
    ),
    "of the magnitudes of a bad row only which are above 0 counts": (
        "const W scale = finite ? Edges<W>::inverse(most) : W(2);",
    ),
    "the scales of a bad row are NaN": ("unit = finite ? Edges<W>::unit(most) : W(2);",),
    "every thread of the team has the same values": ("if (Team::rank() == 1) {",),
    "entries more than there are equations: nothing is made of them": (
        "static constexpr int ENTRIES = LEVELS * (LEVELS + 4) / 2;",
    ),
    "bits beyond a cell's levels are not looked at": (
        "return signs ^ ((2 << depth) - 1);",
        "return signs ^ ((1 >> depth) - 1);",
    ),
    (
        "no other scale depends on the mean of no elements, and least squares, which always "
        "follows, sets it to 0"
    ): ("return coded[level] > 0 ? total / coded[level] : 1;",),
    "all gains have it, so it decides between none": ("double explained = 1;",),
    "no scale is used before it is found": ("scale[depth - 1] = 1;  // compilers read it ahead",),
    "an element without bits has no sign at any level": (
        "code[j] = depth[j] ? solution.code[cell] ^ (elements.up >> e & 1 ? 0 : ~0) : 1;",
    ),
}
"""The lines after the edit, by the reason."""

REASONS = {line: reason for reason, lines in LINES.items() for line in lines}
"""The reason, by the line after the edit."""
