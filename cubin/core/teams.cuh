// Whole rows in one launch: a team of threads reads a row into registers, works on it there and
// writes the result. A thread holds E elements in packs of N neighbours, which accesses of A
// elements move. Results do not depend on A: it is as wide as addresses allow.

template<class T, int N, int A> struct alignas(A * sizeof(T)) Pack { T item[N]; };

// ---------------------------------------------------------------- teams: who shares a row

// A sum of magnitudes and their number.
struct Sum {
  double total;
  int count;
};

// The sum over WIDTH neighbouring lanes, the same in all of them.
template<int WIDTH>
__device__ Sum sum_of_lanes(Sum sum) {
#pragma unroll
  for (int step = WIDTH / 2; step; step /= 2) {
    sum.total += __shfl_xor_sync(~0u, sum.total, step);
    sum.count += __shfl_xor_sync(~0u, sum.count, step);
  }
  return sum;
}

// The largest over WIDTH neighbouring lanes, the same in all of them.
template<int WIDTH, class U>
__device__ U most_of_lanes(U value) {
#pragma unroll
  for (int step = WIDTH / 2; step; step /= 2) {
    const U other = __shfl_xor_sync(~0u, value, step);
    value = other > value ? other : value;
  }
  return value;
}

// LANES threads of a warp. The lanes of a warp stay together whatever their rows need.
template<int LANES> struct Tile {
  static constexpr int MOST_THREADS = 256;
  static constexpr int ROWS = MOST_THREADS / LANES;  // that a block may hold
  static constexpr int LEADERS = LANES;
  static __device__ int size() { return LANES; }
  static __device__ int rank() { return threadIdx.x % LANES; }
  static __device__ int slot() { return threadIdx.x / LANES; }  // which of the block's rows
  static __device__ bool leads() { return true; }
  static __device__ long long row() {
    return (long long)blockIdx.x * (blockDim.x / LANES) + slot();
  }
  static __device__ Sum sum(Sum value, int) { return sum_of_lanes<LANES>(value); }
  template<class U> static __device__ U most(U value) { return most_of_lanes<LANES>(value); }
  static __device__ bool any(bool yes) { return __any_sync(~0u, yes); }
  static __device__ void sync() { __syncwarp(); }

  // Sums over the team, many at a time: every thread adds to each of them, then all collect.
  template<int COUNT> struct Sums {
    __device__ void add(int which, Sum value, Sum (&total)[COUNT]) {
      value = sum_of_lanes<LANES>(value);
      if (rank() == 0) total[which] = value;
    }
    __device__ void collect(int, int, int, Sum (&)[COUNT]) { __syncwarp(); }
  };
};

// All threads of a block. Its first warp leads: it does what takes few threads.
struct Block {
  static constexpr int MOST_THREADS = 1024;
  static constexpr int ROWS = 1;
  static constexpr int LEADERS = 32;
  static __device__ int size() { return blockDim.x; }
  static __device__ int rank() { return threadIdx.x; }
  static __device__ int slot() { return 0; }
  static __device__ bool leads() { return threadIdx.x < 32; }
  static __device__ long long row() { return blockIdx.x; }
  // Two buffers take turns: nobody writes one before the barrier after everybody's reading it.
  static __device__ Sum sum(Sum value, int turn) {
    __shared__ Sum of_warps[2][32];
    const int lane = threadIdx.x % 32;
    value = sum_of_lanes<32>(value);
    if (lane == 0) of_warps[turn % 2][threadIdx.x / 32] = value;
    __syncthreads();
    value = lane < blockDim.x / 32 ? of_warps[turn % 2][lane] : Sum{0, 0};
    return sum_of_lanes<32>(value);
  }
  // Once in a kernel.
  template<class U> static __device__ U most(U value) {
    __shared__ U of_warps[32];
    const int lane = threadIdx.x % 32;
    value = most_of_lanes<32>(value);
    if (lane == 0) of_warps[threadIdx.x / 32] = value;
    __syncthreads();
    return most_of_lanes<32>(lane < blockDim.x / 32 ? of_warps[lane] : U(0));
  }
  static __device__ bool any(bool yes) { return yes; }  // the same in all threads
  static __device__ void sync() { __syncthreads(); }

  // The totals are there for the leaders alone, until the next barrier.
  template<int COUNT> struct Sums {
    Sum of_warps[COUNT][32];
    __device__ void add(int which, Sum value, Sum (&)[COUNT]) {
      value = sum_of_lanes<32>(value);
      if (threadIdx.x % 32 == 0) of_warps[which][threadIdx.x / 32] = value;
    }
    __device__ void collect(int first, int end, int step, Sum (&total)[COUNT]) {
      __syncthreads();
      if (!leads()) return;
      for (int which = first + threadIdx.x * step; which < end; which += 32 * step) {
        Sum sum = {0, 0};
#pragma unroll 1
        for (int warp = 0; warp < blockDim.x / 32; ++warp) {
          sum.total += of_warps[which][warp].total;
          sum.count += of_warps[which][warp].count;
        }
        total[which] = sum;
      }
      __syncwarp();
    }
  };
};

// ---------------------------------------------------------------- elements and their bits

// Keeps the compiler from carrying what it computed from `value` beyond this point.
__device__ __forceinline__ void forget(unsigned int& value) { asm volatile("" : "+r"(value)); }
__device__ __forceinline__ void forget(int& value) { asm volatile("" : "+r"(value)); }
__device__ __forceinline__ void forget(float& value) { asm volatile("" : "+f"(value)); }
__device__ __forceinline__ void forget(double& value) { asm volatile("" : "+d"(value)); }

// Where in its row a team's thread `rank` has its pack number `pack`.
template<class Team, int N>
__device__ int place(int pack, int rank) { return (pack * Team::size() + rank) * N; }

// Zeros stand beyond the row's end. They are set as bytes: float16 has a default constructor that
// leaves its bits as they are, so `= {}` would not do.
template<class Team, int N, int A, int E, class T, class W>
__device__ void load(const T* row, int length, W (&x)[E]) {
  const int rank = Team::rank();
  Pack<T, N, A> packs[E / N];
#pragma unroll
  for (int pack = 0; pack < E / N; ++pack) {
    const int at = place<Team, N>(pack, rank);
    if (at < length) packs[pack] = *reinterpret_cast<const Pack<T, N, A>*>(row + at);
    else memset(&packs[pack], 0, sizeof(packs[pack]));
  }
#pragma unroll
  for (int e = 0; e < E; ++e) x[e] = W(packs[e / N].item[e % N]);
}

// What is known of the bits of a thread's elements. `present` says whether an element is in the row
// and has a code at a level, `coded` the same of elements that are in the row.

// Every element has all levels; this thread holds the first `packs` of its packs of N.
template<int N> struct Full {
  static constexpr bool WHOLE_PACKS = true;
  int packs, length;
  template<class Team, int, int>
  __device__ void load(const unsigned char*, int row_length, int) {
    length = row_length;
    packs = (length / N - Team::rank() + Team::size() - 1) / Team::size();
  }
  __device__ void forget_levels() { forget(packs); }
  __device__ bool present(int e, int) const { return e / N < packs; }
  __device__ bool coded(int, int) const { return true; }
  __device__ bool deep(int, int, int) const { return true; }
  __device__ int depth(int, int levels) const { return levels; }
  __device__ int count(int) const { return 0; }
  __device__ int total(Sum) const { return length; }
};

// The bits of each element, four to a word, at most `levels` each; 0 beyond the row's end.
template<int E> struct Map {
  static constexpr bool WHOLE_PACKS = false;
  unsigned int word[E / 4];
  template<class Team, int N, int A>
  __device__ void load(const unsigned char* row, int length, int levels) {
    unsigned int bits[E];
    ::load<Team, N, A>(row, length, bits);
#pragma unroll
    for (int w = 0; w < E / 4; ++w)
      word[w] = __vminu4(0x01010101u * levels,
          bits[4 * w] | bits[4 * w + 1] << 8 | bits[4 * w + 2] << 16 | bits[4 * w + 3] << 24);
  }
  __device__ void forget_levels() {
#pragma unroll
    for (int w = 0; w < E / 4; ++w) forget(word[w]);
  }
  // The top bit of each byte is set where the element has no code at the level.
  __device__ unsigned int without_code(int w, int level) const {
    return 0x80808080u + 0x01010101u * level - word[w];
  }
  __device__ bool present(int e, int level) const {
    return !(without_code(e / 4, level) >> 8 * (e % 4) & 0x80u);
  }
  __device__ bool coded(int e, int level) const { return present(e, level); }
  // Whether an element has `depth` bits, or at least as many if these are the most there are.
  __device__ bool deep(int e, int depth, int most) const {
    const unsigned int more = depth < most ? without_code(e / 4, depth) : ~0u;
    return more & ~without_code(e / 4, depth - 1) & 0x80u << 8 * (e % 4);
  }
  __device__ int depth(int e, int) const { return word[e / 4] >> 8 * (e % 4) & 0xffu; }
  __device__ int count(int level) const {
    int count = 0;
#pragma unroll
    for (int w = 0; w < E / 4; ++w) count += __popc(~without_code(w, level) & 0x80808080u);
    return count;
  }
  __device__ int total(Sum sum) const { return sum.count; }
};

template<int N, int E, bool MAP> struct BitsOf { typedef Full<N> type; };
template<int N, int E> struct BitsOf<N, E, true> { typedef Map<E> type; };
