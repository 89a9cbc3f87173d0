// Products with packed codes: a warp has 32 neighbouring lines, one a lane, and reads their bytes side
// by side. The warps of a block share the bytes of a line, and their sums are added up at the end.

// The sum of eight elements whose signs are the bits of a byte.
template<class W>
__device__ __forceinline__ W looked_up(const W* table, unsigned int signs) {
  return plus(table[signs % 16], table[16 + signs / 16]);
}

// The products of ROWS rows of x with lines, 32 lines a block, which reads a byte once for all of its
// rows. Four elements have 16 signed sums, so the lanes of a warp make those of both halves of a
// byte, and all lines and levels look them up: numbers that lie in 16 banks never collide. A warp
// goes from strip to strip of 32 elements that share a scale. The strips fall into 32 parts, whose
// sums are added up in an order that depends on neither ROWS nor WARPS: a row has the same product
// in any batch.
template<class W, bool MAP, int ROWS, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, WARPS == 32 ? 1 : MAP || sizeof(W) > 4 ? 2 : 4)
cubin_multiply_lines(
    const unsigned char* planes, const unsigned char* bits, const W* scales, const W* x, W* y,
    long long batch, long long lines, long long length, long long level_step, long long byte_step,
    long long run, long long runs, long long strips, long long scaled_lines, long long y_step,
    int levels) {
  __shared__ W tables[WARPS][ROWS][4][32], of_warps[WARPS][ROWS][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long long across = (lines + 31) / 32;
  const long long first_row = blockIdx.x / across * ROWS, line = blockIdx.x % across * 32 + lane;
  for (int row = 0; row < ROWS; ++row) of_warps[warp][row][lane] = 0;
  for (int part = warp; part < 32; part += WARPS) {
    W product[ROWS] = {};
    for (long long strip = part; strip < runs * strips; strip += 32) {
      const long long at = strip / strips, byte = at * run / 8 + strip % strips * 4;
      // A bit for each element of the strip. Those of other runs, which share a byte, count as 0.
      const long long before = at * run - 8 * byte, beyond = 32 - run - before;
      if (beyond >= 32) continue;
      const unsigned int own = ~0u << max(0ll, before) & ~0u >> max(0ll, beyond);
      const W* values = x + first_row * length + 8 * byte + lane;
      for (int row = 0; row < ROWS; ++row) {
        const bool inside = first_row + row < batch && own >> lane & 1;
        const W value = inside ? values[row * length] : W(0);
        for (int b = 0; b < 4; ++b) {
          W sum = 0;
          for (int t = 0; t < 4; ++t) {
            const W sign = lane >> t & 1 ? 1 : -1;
            sum = plus(sum, times(sign, __shfl_sync(~0u, value, 8 * b + lane / 16 * 4 + t)));
          }
          tables[warp][row][b][lane] = sum;
        }
      }
      __syncwarp();
      const unsigned char* held = planes + byte * byte_step + line;
      const unsigned char* depths = bits + line * length + 8 * byte;
      const W* scale = scales + (scaled_lines > 1 ? line : 0) * runs + at;
      for (int level = 0; level < levels && line < lines; ++level) {
        W sum[ROWS] = {};
        unsigned int hot = 255, any = !MAP;
        for (int b = 0; b < 4; ++b) {
          if (!(own >> 8 * b)) break;
          const unsigned int signs = held[level * level_step + b * byte_step];
          if (MAP) {
            hot = 0;
            for (int t = 8 * b; t < 8 * b + 8; ++t)
              if (own >> t & 1 && depths[t] > level) hot |= 1u << t % 8;
            any |= hot;
          }
          for (int row = 0; row < ROWS; ++row) {
            const W* table = tables[warp][row][b];
            W of_byte = looked_up(table, signs & hot);
            // An element without a code counts half as -1 and half as +1.
            if (MAP) of_byte = times(W(0.5), plus(of_byte, looked_up(table, signs | (hot ^ 255))));
            sum[row] = plus(sum[row], of_byte);
          }
        }
        if (!any) continue;  // the scale may be NaN
        const W factor = scale[level * scaled_lines * runs];
        for (int row = 0; row < ROWS; ++row) product[row] = plus(product[row], times(factor, sum[row]));
      }
      __syncwarp();
    }
    for (int row = 0; row < ROWS; ++row)
      of_warps[warp][row][lane] = plus(of_warps[warp][row][lane], product[row]);
  }
  __syncthreads();
  for (int row = warp; row < ROWS; row += WARPS) {
    if (line >= lines || first_row + row >= batch) continue;
    W total = 0;
    for (int first = 0; first < 8; ++first) {
      W of_parts = 0;
      for (int other = first; other < WARPS; other += 8)
        of_parts = plus(of_parts, of_warps[other][row][lane]);
      total = plus(total, of_parts);
    }
    y[(first_row + row) * y_step + line] = total;
  }
}

// How many bits differ between rows of a and of b: a block compares 16 with 16, SIDE words at a time.
template<int SIDE>
__global__ void cubin_count_unequal(
    const unsigned long long* a, const unsigned long long* b, int* counts,
    long long p, long long q, long long words) {
  __shared__ unsigned long long of_a[SIDE][SIDE + 1], of_b[SIDE][SIDE + 1];
  const int i = threadIdx.x / SIDE, j = threadIdx.x % SIDE;
  const long long across = (q + SIDE - 1) / SIDE;
  const long long first = blockIdx.x / across * SIDE, other = blockIdx.x % across * SIDE;
  int count = 0;
  for (long long start = 0; start < words; start += SIDE) {
    const long long word = start + j;
    of_a[i][j] = first + i < p && word < words ? a[(first + i) * words + word] : 0;
    of_b[i][j] = other + i < q && word < words ? b[(other + i) * words + word] : 0;
    __syncthreads();
    for (int k = 0; k < SIDE; ++k) count += __popcll(of_a[i][k] ^ of_b[j][k]);
    __syncthreads();
  }
  if (first + i < p && other + j < q) counts[(first + i) * q + other + j] = count;
}
