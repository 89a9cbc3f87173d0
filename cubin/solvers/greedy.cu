// Device functions of the greedy levels: what is left of an element once levels are peeled off it.
// Levels are nested: an element that has a code at a level has one at all levels before it.

// |r| after the given levels. Peeling a level takes scale * sign(r) from r, which moves |r| to
// ||r| - scale|: the sign is not needed, and the subtraction rounds as that of the signed residual.
template<class W>
__device__ W magnitude(W m) { return m; }

template<class W, class... Rest>
__device__ W magnitude(W m, W scale, Rest... rest) {
  return magnitude(absolute(minus(m, scale)), rest...);
}

// Bit i is set where level i of the element has the sign +1.
template<class W, class... Scales>
__device__ unsigned short codes(W r, int bits, Scales... scales) {
  const W scale[] = {scales..., W(0)};
  unsigned short code = 0;
#pragma unroll
  for (int level = 0; level < (int)sizeof...(Scales); ++level) {
    const bool up = positive(r);
    if (up && level < bits) code |= 1 << level;
    r = up ? minus(r, scale[level]) : plus(r, scale[level]);
  }
  return code;
}

// The sum of scale * sign over the element's levels, of the scales as they are stored in T.
template<class T, class W, class... Scales>
__device__ W approximation(W r, int bits, Scales... scales) {
  const W scale[] = {scales..., W(0)};
  W y = 0;
#pragma unroll
  for (int level = 0; level < (int)sizeof...(Scales); ++level) {
    const bool up = positive(r);
    const W stored = W(T(scale[level]));
    if (level < bits) y = up ? plus(y, stored) : minus(y, stored);
    r = up ? minus(r, scale[level]) : plus(r, scale[level]);
  }
  return y;
}

// A sum of magnitudes and their number.
struct Sum {
  double total;
  long long count;
  __device__ Sum() : total(0), count(0) {}
  __device__ Sum(double total, long long count) : total(total), count(count) {}
};
__device__ Sum operator+(const Sum& a, const Sum& b) {
  return Sum(a.total + b.total, a.count + b.count);
}
