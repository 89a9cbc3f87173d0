// Arithmetic that means the same as NumPy's, included in every kernel.
//
// CuPy compiles with -ftz=true, which takes subnormal float32 numbers for 0: plain C++ operators
// would give the smallest positive number the sign of 0. PTX instructions without .ftz keep them.

template<class T> struct Work { typedef T type; };
template<> struct Work<float16> { typedef float type; };
template<> struct Work<bfloat16> { typedef float type; };

__device__ __forceinline__ float plus(float a, float b) {
  float sum;
  asm("add.rn.f32 %0, %1, %2;" : "=f"(sum) : "f"(a), "f"(b));
  return sum;
}
__device__ __forceinline__ double plus(double a, double b) { return a + b; }

__device__ __forceinline__ float minus(float a, float b) {
  float difference;
  asm("sub.rn.f32 %0, %1, %2;" : "=f"(difference) : "f"(a), "f"(b));
  return difference;
}
__device__ __forceinline__ double minus(double a, double b) { return a - b; }

__device__ __forceinline__ float times(float a, float b) {
  float product;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
  return product;
}
__device__ __forceinline__ double times(double a, double b) { return a * b; }

// Masking the sign bit is no way around: compilers turn it back into an abs that flushes.
__device__ __forceinline__ float absolute(float a) {
  float m;
  asm("abs.f32 %0, %1;" : "=f"(m) : "f"(a));
  return m;
}
__device__ __forceinline__ double absolute(double a) { return fabs(a); }

__device__ __forceinline__ double to_double(float a) {
  double wide;
  asm("cvt.f64.f32 %0, %1;" : "=d"(wide) : "f"(a));
  return wide;
}
__device__ __forceinline__ double to_double(double a) { return a; }

// a > 0: false for zeros and NaN.
__device__ __forceinline__ bool positive(float a) {
  return __float_as_uint(a) - 1u < 0x7f800000u;
}
__device__ __forceinline__ bool positive(double a) { return a > 0; }

// |a| <= bits: false for NaN. The bit patterns of numbers that are not negative sort as they do.
__device__ __forceinline__ bool inside(float a, unsigned char bits) {
  return (__float_as_uint(a) & 0x7fffffffu) <= __float_as_uint((float)bits);
}
__device__ __forceinline__ bool inside(double a, unsigned char bits) { return fabs(a) <= bits; }

// Rounds a double to T. Those of two bytes are made of a float that is rounded to odd, which does
// not show in them: an inexact one has its lowest bit set.
template<class T> __device__ __forceinline__ T from_double(double a) {
  float odd;
  asm("cvt.rz.f32.f64 %0, %1;" : "=f"(odd) : "d"(a));
  if (to_double(odd) != a) odd = __uint_as_float(__float_as_uint(odd) | 1u);
  return T(odd);
}
template<> __device__ __forceinline__ double from_double<double>(double a) { return a; }
template<> __device__ __forceinline__ float from_double<float>(double a) {
  float narrow;
  asm("cvt.rn.f32.f64 %0, %1;" : "=f"(narrow) : "d"(a));
  return narrow;
}

// Rounds a double down to W.
template<class W> __device__ __forceinline__ W rounded_down(double a) { return a; }
template<> __device__ __forceinline__ float rounded_down<float>(double a) {
  float narrow;
  asm("cvt.rm.f32.f64 %0, %1;" : "=f"(narrow) : "d"(a));
  return narrow;
}
