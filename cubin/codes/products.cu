// Products with packed codes: a warp has 32 neighbouring lines, one a lane, and reads their bytes side
// by side. The warps of a block share the bytes of a line, and their sums are added up at the end.

// The products of rows of x with lines, 32 lines and a row of x a block. Within a run of elements that
// share a scale, elements are added up or taken off before they are scaled.
template<class W, bool MAP>
__global__ void cubin_multiply_lines(
    const unsigned char* planes, const unsigned char* bits, const W* scales, const W* x, W* y,
    long long lines, long long length, long long width, long long level_step, long long byte_step,
    long long run, long long runs, long long scaled_lines, long long y_step, int levels) {
  __shared__ W of_warps[8][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long long across = (lines + 31) / 32;
  const long long row = blockIdx.x / across, line = blockIdx.x % across * 32 + lane;
  W product = 0;
  if (line < lines) {
    for (int level = 0; level < levels; ++level) {
      const W* scale = scales + (level * scaled_lines + (scaled_lines > 1 ? line : 0)) * runs;
      for (long long byte = warp; byte < width; byte += 8) {
        const unsigned int signs = planes[level * level_step + byte * byte_step + line];
        long long at = 8 * byte / run, end = (at + 1) * run;
        W sum = 0;
#pragma unroll
        for (int t = 0; t < 8; ++t) {
          const long long element = 8 * byte + t;
          if (element >= length) break;
          if (element == end) {
            product = plus(product, times(scale[at], sum));
            sum = 0;
            ++at;
            end += run;
          }
          if (MAP && level >= bits[line * length + element]) continue;
          const W value = x[row * length + element];
          sum = signs >> t & 1 ? plus(sum, value) : minus(sum, value);
        }
        product = plus(product, times(scale[at], sum));
      }
    }
  }
  of_warps[warp][lane] = product;
  __syncthreads();
  if (warp == 0 && line < lines) {
    W total = 0;
    for (int other = 0; other < 8; ++other) total = plus(total, of_warps[other][lane]);
    y[row * y_step + line] = total;
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
