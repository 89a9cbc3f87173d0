// The sums over levels of signs times the scales of rows, one element a thread at a time. Where a sign
// is 0 the scale, which may be NaN, does not count.
template<class T, class W>
__global__ void cubin_sum_signs(
    const signed char* signs, const W* scales, T* y, long long rows,
    long long length, int levels) {
  const long long size = rows * length, step = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += step) {
    const long long row = i / length;
    W total = 0;
    for (int level = 0; level < levels; ++level) {
      const int sign = signs[level * size + i];
      const W scale = scales[level * rows + row];
      if (sign) total = sign > 0 ? plus(total, scale) : minus(total, scale);
    }
    y[i] = T(total);
  }
}
