// The greedy levels of whole rows in one launch.

// ---------------------------------------------------------------- levels

// Up to FEW levels there is code for every number of them. Beyond, some numbers share the code of
// the largest: it peels levels with a scale of 0, which leave everything as it is.
constexpr int FEW = 4;

// The sum of the magnitudes that the levels before `level` leave of a thread's elements with a code at
// it. LEVEL levels are taken off, at least as many: the scales from `level` on are 0.
// Peeling one moves |r| to ||r| - scale|.
// GROUP magnitudes are added in W, the groups in double: two equal numbers, or one and a 0, add up
// without rounding, and so do whole packs of four, so the mean of equal numbers is exact.
template<int LEVEL, int N, class W, int E, int LEVELS, class Bits>
__device__ double sum_after(
    int level, const W (&x)[E], const Bits& bits, const W (&scale)[LEVELS]) {
  if (LEVEL <= FEW) level = LEVEL;
  constexpr bool WHOLE = Bits::WHOLE_PACKS && N > 1;
  constexpr int GROUP = WHOLE ? 4 : 2;
  double total = 0;
#pragma unroll
  for (int e = 0; e < E; e += GROUP) {
    W m[GROUP];
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
      m[g] = absolute(x[e + g]);
#pragma unroll
      for (int i = 0; i < LEVEL; ++i) m[g] = absolute(minus(m[g], scale[i]));
      if (!(WHOLE && N >= GROUP) && !bits.present(e + g, level)) m[g] = 0;
    }
#pragma unroll
    for (int step = 1; step < GROUP; step *= 2)
#pragma unroll
      for (int g = 0; g < GROUP; g += 2 * step) m[g] = plus(m[g], m[g + step]);
    if (!(WHOLE && N >= GROUP) || bits.present(e, level)) total += to_double(m[0]);
  }
  return total;
}

// The same with every sum in double: a sum of floats near the largest overflows in W.
template<class W, int E, int LEVELS, class Bits>
__device__ double wide_sum_after(
    int level, const W (&x)[E], const Bits& bits, const W (&scale)[LEVELS]) {
  double total = 0;
#pragma unroll
  for (int e = 0; e < E; ++e) {
    W m = absolute(x[e]);
#pragma unroll
    for (int i = 0; i < LEVELS - 1; ++i)
      if (i < level) m = absolute(minus(m, scale[i]));
    if (bits.present(e, level)) total += to_double(m);
  }
  return total;
}

// The sum after `level` levels, LEVEL of them or more.
template<int LEVEL, int N, class W, int E, int LEVELS, class Bits>
__device__ double sum_of_thread(
    int level, const W (&x)[E], const Bits& bits, const W (&scale)[LEVELS]) {
  constexpr int NEXT = LEVEL < FEW ? LEVEL + 1 : 2 * LEVEL;
  if constexpr (LEVEL + 1 < LEVELS)
    if (level > LEVEL)
      return sum_of_thread<NEXT < LEVELS ? NEXT : LEVELS - 1, N>(level, x, bits, scale);
  return sum_after<LEVEL, N>(level, x, bits, scale);
}

// Finds the first `levels` scales of a team's row; returns how many of them have any element.
// Every level starts from x again: a compiler that keeps what it has for the next one runs out of
// registers.
template<class Team, int N, class W, int E, int LEVELS, class Bits>
__device__ int find_scales(int levels, W (&x)[E], Bits& bits, W (&scale)[LEVELS]) {
#pragma unroll
  for (int i = 0; i < LEVELS; ++i) scale[i] = 0;
  double total = sum_after<0, N>(0, x, bits, scale);
#pragma unroll 1
  for (int level = 0;;) {
    if (!(total < 1e300 * 1e300)) total = wide_sum_after(level, x, bits, scale);
    const Sum sum = Team::sum(Sum{total, bits.count(level)}, level);
    const int count = bits.total(sum);
    if (!Bits::WHOLE_PACKS && !Team::any(count)) return level;
    const W mean = count ? from_double<W>(sum.total / count) : W(0);
#pragma unroll
    for (int i = 0; i < LEVELS; ++i)
      if (i == level) scale[i] = mean;
    bits.forget_levels();
#pragma unroll
    for (int e = 0; e < E; ++e) forget(x[e]);
    if (++level == levels) return levels;
    total = sum_of_thread<LEVELS == 1 ? 0 : 1, N>(level, x, bits, scale);
  }
}

// m where r > 0, else -m, given m >= 0 and n = 0 - r, which is never -0.
__device__ __forceinline__ float signed_like(float m, float n) {
  float with_sign;  // lop3 0xd2 is m ^ top ^ (n & top); written in C++ it becomes a neg that flushes
  asm("lop3.b32 %0, %1, %2, 0x80000000, 0xd2;" : "=f"(with_sign) : "f"(m), "f"(n));
  return with_sign;
}
__device__ __forceinline__ double signed_like(double m, double n) {
  return __hiloint2double(
      __double2hiint(m) ^ 0x80000000 ^ (__double2hiint(n) & 0x80000000), __double2loint(m));
}

// ---------------------------------------------------------------- kernels

// LEVELS beyond FEW may be more than the `levels` that are wanted.

template<class Team, class T, int N, int A, int E, int LEVELS, bool MAP>
__global__ void __launch_bounds__(Team::MOST_THREADS, 1024 / Team::MOST_THREADS) cubin_approximate_rows(
    const T* x, const unsigned char* bits, T* y,
    long long rows, int length, long long x_step, long long bits_step, long long y_step,
    int levels) {
  typedef typename Work<T>::type W;
  if (LEVELS <= FEW) levels = LEVELS;
  const long long row = Team::row();
  const int row_length = row < rows ? length : 0;
  W values[E];
  load<Team, N, A>(x + row * x_step, row_length, values);
  typename BitsOf<N, E, MAP>::type map;
  map.template load<Team, N, A>(bits + row * bits_step, row_length, LEVELS);
  W scale[LEVELS];
  const int reached = find_scales<Team, N>(levels, values, map, scale);
  int rank = Team::rank();
  forget(rank);
#pragma unroll
  for (int pack = 0; pack < E / N; ++pack) {
    const int at = place<Team, N>(pack, rank);
    if (at >= row_length) break;
    map.forget_levels();
    W n[N], sum[N] = {};
#pragma unroll
    for (int j = 0; j < N; ++j) n[j] = minus(W(0), values[pack * N + j]);
#pragma unroll
    for (int level = 0; level < LEVELS; ++level) {
      if (level >= reached) break;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const W step = signed_like(W(T(scale[level])), n[j]);
        if (map.coded(pack * N + j, level)) sum[j] = plus(sum[j], step);
        n[j] = plus(n[j], signed_like(scale[level], n[j]));
      }
    }
    Pack<T, N, A> result;
#pragma unroll
    for (int j = 0; j < N; ++j) result.item[j] = T(sum[j]);
    *reinterpret_cast<Pack<T, N, A>*>(y + row * y_step + at) = result;
  }
}

// Scales and signs lie level by level; where an element has no code its sign is 0.
template<class Team, class T, int N, int A, int E, int LEVELS, bool MAP, class W = typename Work<T>::type>
__global__ void __launch_bounds__(Team::MOST_THREADS, 1024 / Team::MOST_THREADS) cubin_encode_rows(
    const T* x, const unsigned char* bits, W* scales, signed char* signs,
    long long rows, int length, long long x_step, long long bits_step, long long sign_step,
    int levels) {
  if (LEVELS <= FEW) levels = LEVELS;
  const long long row = Team::row();
  const int row_length = row < rows ? length : 0;
  W values[E];
  load<Team, N, A>(x + row * x_step, row_length, values);
  typename BitsOf<N, E, MAP>::type map;
  map.template load<Team, N, A>(bits + row * bits_step, row_length, LEVELS);
  W scale[LEVELS];
  find_scales<Team, N>(levels, values, map, scale);
  int rank = Team::rank();
  forget(rank);
  if (row_length && rank == 0) {
#pragma unroll
    for (int level = 0; level < LEVELS; ++level)
      if (level < levels) scales[level * rows + row] = scale[level];
  }
#pragma unroll
  for (int pack = 0; pack < E / N; ++pack) {
    const int at = place<Team, N>(pack, rank);
    if (at >= row_length) break;
    map.forget_levels();
    W r[N];
#pragma unroll
    for (int j = 0; j < N; ++j) r[j] = values[pack * N + j];
    signed char* target = signs + row * sign_step + at;
#pragma unroll
    for (int level = 0; level < LEVELS; ++level) {
      if (level >= levels) break;
      Pack<signed char, N, A> result;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const bool up = positive(r[j]);
        result.item[j] = map.coded(pack * N + j, level) ? (up ? 1 : -1) : 0;
        r[j] = up ? minus(r[j], scale[level]) : plus(r[j], scale[level]);
      }
      *reinterpret_cast<Pack<signed char, N, A>*>(target) = result;
      target += rows * sign_step;
    }
  }
}
