// The solvers `refined` and `alternating` on whole rows, in one launch: what `cubin.solvers.search`
// does, by a team of threads that holds the magnitudes of its row in registers.
//
// A cell is the magnitudes between two edges, which have one code. The cells of the elements with d
// bits are the 2^(d-1) of the d-th generation of a binary tree, stored as a heap: cell h is cut into
// the cells 2 h + 1 and 2 h + 2. A magnitude lies in the last of its cells whose edge is below it.

constexpr double DEPENDENT = 1.0 / (1ll << 38);

__device__ int first_of(int depth) { return (1 << (depth - 1)) - 1; }
__device__ int depth_of(int cell) { return 32 - __clz(cell + 1); }
__device__ double sign_at(int code, int level) { return code >> level & 1 ? 1 : -1; }

// ---------------------------------------------------------------- magnitudes

// `absent` stands where a row has no element: it is below every edge. `lowest` is the first edge of
// every depth: it is below every magnitude. Edges and magnitudes compare as the integers of the same
// bits, in which -0 is below +0.
template<class W> struct Edges;
template<> struct Edges<float> {
  typedef unsigned int Pattern;
  static __device__ float absent() { return __uint_as_float(0x80000000u); }
  static __device__ float lowest() { return __uint_as_float(0x80000001u); }
  static __device__ Pattern pattern(float m) { return __float_as_uint(m); }
  static __device__ bool below(float edge, float m) {
    return __float_as_int(edge) < __float_as_int(m);
  }
  static __device__ bool finite(Pattern m) { return m < 0x7f800000u; }
  static __device__ bool is_nan(Pattern m) { return m > 0x7f800000u; }
  // The power of two that m is not below, and one by that; the smallest normal one for less.
  static __device__ float unit(Pattern m) { return __uint_as_float(exponent(m) << 23); }
  static __device__ float inverse(Pattern m) {
    const unsigned int e = exponent(m);
    return __uint_as_float(e < 254 ? (254 - e) << 23 : 1u << 22);
  }
  static __device__ unsigned int exponent(Pattern m) { return max(m >> 23, 1u); }
};
template<> struct Edges<double> {
  typedef unsigned long long Pattern;
  static __device__ double absent() { return __longlong_as_double(0x8000000000000000ll); }
  static __device__ double lowest() { return __longlong_as_double(0x8000000000000001ll); }
  static __device__ Pattern pattern(double m) { return __double_as_longlong(m); }
  static __device__ bool below(double edge, double m) {
    return __double_as_longlong(edge) < __double_as_longlong(m);
  }
  static __device__ bool finite(Pattern m) { return m < 0x7ff0000000000000ull; }
  static __device__ bool is_nan(Pattern m) { return m > 0x7ff0000000000000ull; }
  static __device__ double unit(Pattern m) { return __longlong_as_double(exponent(m) << 52); }
  static __device__ double inverse(Pattern m) {
    const unsigned long long e = exponent(m);
    return __longlong_as_double(e < 2046 ? (2046 - e) << 52 : 1ull << 51);
  }
  static __device__ unsigned long long exponent(Pattern m) { return max(m >> 52, 1ull); }
};

// The magnitudes of a thread's elements over a power of two, the unit of their row, so that no
// square overflows or vanishes.
template<class W, int E, class Bits> struct Elements {
  W m[E];
  Bits bits;
  unsigned int up;  // bit e is set where element e is not zero or negative

  template<class Team, int N, int A, class T>
  __device__ void load(
      const T* row, const unsigned char* bits_of_row, int length, int levels,
      W& unit, bool& valid) {
    typedef typename Edges<W>::Pattern Pattern;
    bits.template load<Team, N, A>(bits_of_row, length, levels);
    ::load<Team, N, A>(row, length, m);
    Pattern most = 0;
    up = 0;
#pragma unroll
    for (int e = 0; e < E; ++e) {
      if (positive(m[e]) || m[e] != m[e]) up |= 1u << e;
      m[e] = bits.coded(e, 0) ? absolute(m[e]) : W(0);
      most = max(most, Edges<W>::pattern(m[e]));
    }
    most = Team::most(most);
    const bool finite = Edges<W>::finite(most);
    const W scale = finite ? Edges<W>::inverse(most) : W(1);
    if (Team::rank() == 0) {
      valid = finite;
      unit = finite ? Edges<W>::unit(most) : W(1);
    }
    int rank = Team::rank();
    forget(rank);
#pragma unroll
    for (int e = 0; e < E; ++e) {
      m[e] = Edges<W>::is_nan(Edges<W>::pattern(m[e])) ? W(0) : times(m[e], scale);
      if (place<Team, N>(e / N, rank) >= length) m[e] = Edges<W>::absent();
    }
  }

  // Two are added in W: numbers that are equal, or of which one is 0, do not round.
  __device__ Sum above(W edge, int depth, int most) const {
    Sum sum = {0, 0};
#pragma unroll
    for (int e = 0; e < E; e += 2) {
      const bool first = bits.deep(e, depth, most) && Edges<W>::below(edge, m[e]);
      const bool second = bits.deep(e + 1, depth, most) && Edges<W>::below(edge, m[e + 1]);
      sum.count += first + second;
      sum.total += to_double(plus(first ? m[e] : W(0), second ? m[e + 1] : W(0)));
    }
    return sum;
  }
};

// ---------------------------------------------------------------- what a team knows of its row

template<class Team, class T, int LEVELS, bool MAP> struct Row {
  typedef typename Work<T>::type W;
  static constexpr int CELLS = (1 << LEVELS) - 1;
  static constexpr int ENTRIES = LEVELS * (LEVELS + 3) / 2;

  W unit;
  bool valid;  // it has no NaN and no infinity; where it has, its scales are found as if all were 0
  W edge[CELLS];
  unsigned short code[CELLS];
  Sum above[CELLS];  // the elements above the edge, of those with the cell's number of bits
  typename Team::template Sums<CELLS> sums;
  double value[CELLS], sorted[CELLS];  // the sums of levels that cells stand for
  double equations[ENTRIES];  // normal equations: the lower triangle, and below it the right side
  double coded[LEVELS], inverse[LEVELS];  // the elements with a code at a level; 1 / pivot
  double scale[LEVELS], renewed[LEVELS], gain;
  bool better;
  W stored[LEVELS];
  T result[2][CELLS];  // of elements that are not positive, and of those that are

  // Where the cells begin that are in use when elements have at most `most` bits.
  static __device__ int first_used(int most) { return MAP ? 0 : first_of(most); }

  // Adds up the magnitudes above the edges `first`, first + step, ... of elements with up to `most`
  // bits.
  template<int E, class Bits>
  __device__ void add_up(const Elements<W, E, Bits>& elements, int most, int first, int step) {
#pragma unroll 1
    for (int cell = first; cell < first_of(most + 1); cell += step) {
      Sum sum = elements.above(edge[cell], depth_of(cell), most);
      if (!valid) sum.total = 0;
      sums.add(cell, sum, above);
    }
    sums.collect(first, first_of(most + 1), step, above);
  }

  // Everything from here on is done by the leaders, together.

  // A leader's number. Compilers would keep what follows from it in registers, which are few.
  static __device__ int leader() {
    int rank = Team::rank();
    forget(rank);
    return rank;
  }

  // Cuts every cell where the residual after the first levels changes its sign. Without a map all
  // elements move on to the new cells, and what lay above an old edge is known.
  __device__ void split(int level) {
    for (int cell = first_of(level) + leader(); cell < first_of(level + 1);
         cell += Team::LEADERS) {
      double cut = 0;
      for (int i = 0; i < level; ++i) cut += scale[i] * sign_at(code[cell], i);
      if (cell > first_of(level)) cut = fmax(cut, to_double(edge[cell]));
      if (cell + 1 < first_of(level + 1)) cut = fmin(cut, to_double(edge[cell + 1]));
      edge[2 * cell + 1] = edge[cell];
      edge[2 * cell + 2] = rounded_down<W>(cut);
      code[2 * cell + 1] = code[cell];
      code[2 * cell + 2] = code[cell] | 1 << level;
      above[2 * cell + 1] = above[cell];
    }
  }

  // The code of a cell before cells are sorted, and the sum of levels that it stands for.
  __device__ int unsorted(int cell, double& sum) const {
    const int depth = depth_of(cell), way = cell - first_of(depth);
    int signs = 1;
    sum = scale[0];
    for (int level = 1; level < depth; ++level) {
      const int plus = way >> (level - 1) & 1;
      sum += plus ? scale[level] : -scale[level];
      signs |= plus << level;
    }
    if (sum >= 0) return signs;
    sum = -sum;
    return signs ^ ((1 << depth) - 1);
  }

  // The cells in which each magnitude takes the nearest sum of its levels.
  __device__ void take_nearest() {
    for (int cell = first_used(LEVELS) + leader(); cell < CELLS; cell += Team::LEADERS)
      unsorted(cell, value[cell]);
    __syncwarp();
    for (int cell = first_used(LEVELS) + leader(); cell < CELLS; cell += Team::LEADERS) {
      const int depth = depth_of(cell);
      double sum;
      const int signs = unsorted(cell, sum);
      int at = first_of(depth);
#pragma unroll 1
      for (int other = first_of(depth); other < first_of(depth + 1); ++other)
        at += value[other] < sum || (value[other] == sum && other < cell);
      sorted[at] = sum;
      code[at] = signs;
    }
    __syncwarp();
    for (int cell = first_used(LEVELS) + leader(); cell < CELLS; cell += Team::LEADERS)
      if (cell > first_of(depth_of(cell)))
        edge[cell] = rounded_down<W>(sorted[cell - 1] / 2 + sorted[cell] / 2);
  }

  // Equation i begins at entry i (i + 1) / 2.
  static __device__ int entry_of(int i, int j) { return i * (i + 1) / 2 + j; }
  static __device__ int equation_of(int entry) {
    int i = 0;
    while (entry_of(i + 1, 0) <= entry) ++i;
    return i;
  }

  // The normal equations of least squares for the first `most` levels; 0 for the others.
  __device__ void set_equations(int most) {
    for (int entry = leader(); entry < ENTRIES; entry += Team::LEADERS) {
      const int i = equation_of(entry), j = entry - entry_of(i, 0);
      const int deepest = i < LEVELS ? i : j;
      double total = 0;
      for (int depth = max(deepest + 1, MAP ? 1 : most); depth <= most; ++depth) {
        Sum higher = {0, 0};
#pragma unroll 1
        for (int cell = first_of(depth + 1) - 1; cell >= first_of(depth); --cell) {
          const Sum here = above[cell];
          const double sign = sign_at(code[cell], j);
          if (i < LEVELS) total += sign * sign_at(code[cell], i) * (here.count - higher.count);
          else total += sign * (here.total - higher.total);
          higher = here;
        }
      }
      equations[entry] = total;
      if (i == j) coded[i] = total;
    }
    __syncwarp();
  }

  // The mean of what the levels before leave of the magnitudes at a level.
  __device__ double mean_at(int level) const {
    double total = equations[entry_of(LEVELS, level)];
    for (int i = 0; i < level; ++i) total -= equations[entry_of(level, i)] * scale[i];
    return coded[level] > 0 ? total / coded[level] : 0;
  }

  // Solves the equations by elimination, which overwrites them. The team's first thread gets the
  // scales, and returns by how much they lower the sum of squares. A level whose signs depend
  // linearly on those before it has a pivot of nothing but rounding errors, and the scale 0.
  __device__ double solve(double (&solved)[LEVELS]) {
#pragma unroll 1
    for (int p = 0; p < LEVELS; ++p) {
      const double pivot = equations[entry_of(p, p)];
      const double over = pivot > DEPENDENT * coded[p] ? 1 / pivot : 0;
      if (Team::rank() == 0) inverse[p] = over;
      for (int entry = leader(); entry < ENTRIES; entry += Team::LEADERS) {
        const int i = equation_of(entry), j = entry - entry_of(i, 0);
        if (j > p) equations[entry] -= equations[entry_of(i, p)] * equations[entry_of(j, p)] * over;
      }
      __syncwarp();
    }
    double explained = 0;
    if (Team::rank() == 0) {
      double unknown[LEVELS];
#pragma unroll
      for (int j = LEVELS - 1; j >= 0; --j) {
        const double right = equations[entry_of(LEVELS, j)];
        explained += right * right * inverse[j];
        unknown[j] = right;
#pragma unroll
        for (int i = j + 1; i < LEVELS; ++i) unknown[j] -= equations[entry_of(i, j)] * unknown[i];
        solved[j] = unknown[j] *= inverse[j];
      }
    }
    return explained;
  }

  // Takes the least-squares scales if they lower the error more than those so far, or are the first.
  __device__ void keep_if_better(bool first) {
    const double raised = solve(renewed);
    if (Team::rank() == 0) {
      better = first || raised > gain;
      if (better) {
        gain = raised;
        for (int i = 0; i < LEVELS; ++i) scale[i] = fabs(renewed[i]);
      }
    }
    __syncwarp();
  }

  // The place of a level in the result. Without a map scales descend.
  __device__ int order_of(int level) const {
    if (MAP) return level;
    int before = 0;
    for (int other = 0; other < LEVELS; ++other) {
      const double difference = fabs(scale[other]) - fabs(scale[level]);
      before += difference > 0 || (difference == 0 && other < level);
    }
    return before;
  }

  // Makes scales positive, in units of x and in order, and changes codes and results accordingly.
  __device__ void finish() {
    for (int level = leader(); level < LEVELS; level += Team::LEADERS) {
      const double in_x = fabs(scale[level]) * to_double(unit);
      stored[order_of(level)] = valid ? from_double<W>(in_x) : from_double<W>(0.0 / 0.0);
    }
    __syncwarp();
    for (int cell = first_used(LEVELS) + leader(); cell < CELLS; cell += Team::LEADERS) {
      const int depth = depth_of(cell);
      int ordered = 0;
      for (int level = 0; level < depth; ++level) {
        const int bit = (code[cell] >> level & 1) ^ (scale[level] < 0);
        ordered |= bit << order_of(level);
      }
      code[cell] = ordered;
      for (int up = 0; up < 2; ++up) {
        W sum = 0;
        for (int level = 0; level < depth; ++level) {
          const W step = W(T(stored[level]));
          sum = (ordered >> level & 1) == up ? plus(sum, step) : minus(sum, step);
        }
        result[up][cell] = T(sum);
      }
    }
  }

  // From here on all threads take part again.

  // The last cell of its depth whose edge is below a magnitude.
  __device__ int cell_of(W m, int depth) const {
    int cell = first_of(depth);
#pragma unroll
    for (int step = 1 << LEVELS >> 2; step; step /= 2)
      if (step < 1 << (depth - 1) && Edges<W>::below(edge[cell + step], m)) cell += step;
    return cell;
  }

  // From the magnitudes to the codes, scales and results.
  template<int E, class Bits>
  __device__ void find(const Elements<W, E, Bits>& elements, bool refit, int iterations) {
    if (Team::rank() == 0) {
      code[0] = 1;
#pragma unroll
      for (int depth = 1; depth <= LEVELS; ++depth) {
        edge[first_of(depth)] = Edges<W>::lowest();
        scale[depth - 1] = 0;  // compilers read it ahead
      }
    }
    Team::sync();
#pragma unroll 1
    for (int level = 0; level < LEVELS; ++level) {
      if (level) {
        if (Team::leads()) split(level);
        Team::sync();
      }
      add_up(elements, level + 1, MAP || !level ? 0 : first_of(level + 1) + 1, MAP ? 1 : 2);
      if (Team::leads()) {
        set_equations(level + 1);
        if (refit) solve(scale);
        else if (Team::rank() == 0) scale[level] = mean_at(level);
        __syncwarp();
      }
    }
    if (!refit) alternate(elements, iterations);
    if (Team::leads()) finish();
    Team::sync();
  }

  // From the equations of any cells to the least-squares scales of better ones.
  template<int E, class Bits>
  __device__ void alternate(const Elements<W, E, Bits>& elements, int iterations) {
    if (Team::leads()) keep_if_better(true);
#pragma unroll 1
    for (; iterations > 0; --iterations) {
      if (Team::leads()) take_nearest();
      Team::sync();
      add_up(elements, LEVELS, first_used(LEVELS) + !MAP, 1);
      if (Team::leads()) {
        set_equations(LEVELS);
        keep_if_better(false);
      }
      Team::sync();
      if (!Team::any(better)) break;
    }
    if (Team::leads()) {
      for (int level = leader(); level < LEVELS; level += Team::LEADERS)
        scale[level] = renewed[level];
      __syncwarp();
    }
  }
};

// ---------------------------------------------------------------- kernels

template<class Team, class T, int N, int A, int E, int LEVELS, bool MAP>
__global__ void __launch_bounds__(Team::MOST_THREADS, 1024 / Team::MOST_THREADS) cubin_reconstruct_rows(
    const T* x, const unsigned char* bits, T* y,
    long long rows, int length, long long x_step, long long bits_step, long long y_step,
    int refit, int iterations) {
  typedef typename Work<T>::type W;
  __shared__ Row<Team, T, LEVELS, MAP> shared[Team::ROWS];
  Row<Team, T, LEVELS, MAP>& solution = shared[Team::slot()];
  const long long row = Team::row();
  const int row_length = row < rows ? length : 0;
  Elements<W, E, typename BitsOf<N, E, MAP>::type> elements;
  elements.template load<Team, N, A>(
      x + row * x_step, bits + row * bits_step, row_length, LEVELS, solution.unit, solution.valid);
  solution.find(elements, refit, iterations);
  int rank = Team::rank();
  forget(rank);
#pragma unroll
  for (int pack = 0; pack < E / N; ++pack) {
    const int at = place<Team, N>(pack, rank);
    if (at >= row_length) break;
    Pack<T, N, A> result;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int e = pack * N + j, depth = elements.bits.depth(e, LEVELS);
      const int cell = solution.cell_of(elements.m[e], depth);
      result.item[j] = depth ? solution.result[elements.up >> e & 1][cell] : T(0);
    }
    *reinterpret_cast<Pack<T, N, A>*>(y + row * y_step + at) = result;
  }
}

// Scales and signs lie level by level; where an element has no code its sign is 0.
template<class Team, class T, int N, int A, int E, int LEVELS, bool MAP, class W = typename Work<T>::type>
__global__ void __launch_bounds__(Team::MOST_THREADS, 1024 / Team::MOST_THREADS) cubin_solve_rows(
    const T* x, const unsigned char* bits, W* scales, signed char* signs,
    long long rows, int length, long long x_step, long long bits_step, long long sign_step,
    int refit, int iterations) {
  __shared__ Row<Team, T, LEVELS, MAP> shared[Team::ROWS];
  Row<Team, T, LEVELS, MAP>& solution = shared[Team::slot()];
  const long long row = Team::row();
  const int row_length = row < rows ? length : 0;
  Elements<W, E, typename BitsOf<N, E, MAP>::type> elements;
  elements.template load<Team, N, A>(
      x + row * x_step, bits + row * bits_step, row_length, LEVELS, solution.unit, solution.valid);
  solution.find(elements, refit, iterations);
  if (row_length) {
    for (int level = Team::rank(); level < LEVELS; level += Team::size())
      scales[level * rows + row] = solution.stored[level];
  }
  int rank = Team::rank();
  forget(rank);
#pragma unroll
  for (int pack = 0; pack < E / N; ++pack) {
    const int at = place<Team, N>(pack, rank);
    if (at >= row_length) break;
    int code[N], depth[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int e = pack * N + j;
      depth[j] = elements.bits.depth(e, LEVELS);
      const int cell = solution.cell_of(elements.m[e], depth[j]);
      code[j] = depth[j] ? solution.code[cell] ^ (elements.up >> e & 1 ? 0 : ~0) : 0;
    }
    signed char* target = signs + row * sign_step + at;
#pragma unroll
    for (int level = 0; level < LEVELS; ++level) {
      Pack<signed char, N, A> result;
#pragma unroll
      for (int j = 0; j < N; ++j)
        result.item[j] = level < depth[j] ? (code[j] >> level & 1) * 2 - 1 : 0;
      *reinterpret_cast<Pack<signed char, N, A>*>(target) = result;
      target += rows * sign_step;
    }
  }
}
