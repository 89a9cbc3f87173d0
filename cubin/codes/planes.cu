// Planes of bits: byte j of line i has the elements 8j to 8j + 7, the first in its lowest bit. A
// block of threads works on a tile of 32 lines by 32 bytes, so that elements are read or written
// along lines, and bytes along a column, where neighbouring lines lie side by side.

// Signs lie level by level and line by line.
template<int THREADS>
__global__ void cubin_pack_signs(
    const signed char* signs, unsigned char* planes,
    long long lines, long long length, int levels, long long level_step, long long byte_step) {
  __shared__ unsigned char tile[32][33];
  const long long width = (length + 7) / 8;
  const long long down = (width + 31) / 32, tiles = (lines + 31) / 32 * down;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (long long number = blockIdx.x; number < tiles * levels; number += gridDim.x) {
    const long long level = number / tiles;
    const long long first_line = number % tiles / down * 32, first_byte = number % down * 32;
#pragma unroll 1  // else there is a second body, for odd numbers of turns
    for (int i = warp; i < 32; i += THREADS / 32) {
      const long long line = first_line + i, start = 8 * (first_byte + lane);
      unsigned int value = 0;
      if (line < lines) {
        const signed char* from = signs + (level * lines + line) * length;
        for (int j = 0; j < 8; ++j)
          if (start + j < length && from[start + j] > 0) value |= 1u << j;
      }
      tile[i][lane] = value;
    }
    __syncthreads();
    for (int i = warp; i < 32; i += THREADS / 32) {
      const long long line = first_line + lane, byte = first_byte + i;
      if (line < lines && byte < width)
        planes[level * level_step + byte * byte_step + line] = tile[lane][i];
    }
    __syncthreads();
  }
}

// Adds up scale * sign over the levels of every element, from the shift or 0 on. Scales lie level by
// level, line by line (or are the same for all lines) and run by run; there may be no shift. With
// one, what additions round away is added at the end, unless the sum is not finite (Knuth's sum of
// two numbers). Levels that an element lacks do not count: their scales may be NaN.
template<class T, class W, bool MAP>
__global__ void cubin_sum_planes(
    const unsigned char* planes, const unsigned char* bits, const W* scales, const W* shift, T* y,
    long long lines, long long length, long long width, long long level_step, long long byte_step,
    long long run, long long runs, long long scaled_lines, int levels) {
  __shared__ unsigned char tile[16][32][33];
  const long long down = (width + 31) / 32, tiles = (lines + 31) / 32 * down;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (long long number = blockIdx.x; number < tiles; number += gridDim.x) {
    const long long first_line = number / down * 32, first_byte = number % down * 32;
    for (int level = 0; level < levels; ++level)
      for (int i = warp; i < 32; i += warps) {
        const long long line = first_line + lane, byte = first_byte + i;
        if (line < lines && byte < width)
          tile[level][i][lane] = planes[level * level_step + byte * byte_step + line];
      }
    __syncthreads();
    for (int i = warp; i < 32; i += warps) {
      const long long line = first_line + i;
      for (int at = lane; at < 256; at += 32) {
        const long long element = 8 * first_byte + at;
        if (line >= lines || element >= length) continue;
        const long long place = (scaled_lines > 1 ? line * runs : 0) + element / run;
        const int depth = MAP ? bits[line * length + element] : levels;
        W total = shift ? shift[place] : W(0), lost = 0;
#pragma unroll 2  // more take more registers than a thread may have
        for (int level = 0; level < levels; ++level) {
          if (MAP && level >= depth) break;
          const W scale = scales[level * scaled_lines * runs + place];
          const W step = tile[level][at / 8][i] >> at % 8 & 1 ? scale : minus(W(0), scale);
          const W rounded = plus(total, step), added = minus(rounded, total);
          if (shift) lost = plus(lost, plus(minus(total, minus(rounded, added)), minus(step, added)));
          total = rounded;
        }
        y[line * length + element] = T(lost == lost ? plus(total, lost) : total);
      }
    }
    __syncthreads();
  }
}
