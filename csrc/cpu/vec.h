// Vectors of the level's width, on the compilers' vector extensions (GCC, Clang; x86-64 and AArch64 alike), and the
// loads and stores that convert the 16-bit types. Kernels are written in these; math.h adds the functions.
#pragma once

#include "level.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

PYGEN_BEGIN_LEVEL

template <typename T>
struct VecOf;

template <>
struct VecOf<float> {
  typedef float vec __attribute__((vector_size(PYGEN_VECTOR_BYTES)));
  typedef int32_t ivec __attribute__((vector_size(PYGEN_VECTOR_BYTES)));
  // Loads and stores go through an under-aligned alias: no pointer is promised to be aligned.
  typedef float unaligned __attribute__((vector_size(PYGEN_VECTOR_BYTES), aligned(4), may_alias));
  static constexpr int lanes = PYGEN_VECTOR_BYTES / 4;
};

template <>
struct VecOf<double> {
  typedef double vec __attribute__((vector_size(PYGEN_VECTOR_BYTES)));
  typedef int64_t ivec __attribute__((vector_size(PYGEN_VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(PYGEN_VECTOR_BYTES), aligned(8), may_alias));
  static constexpr int lanes = PYGEN_VECTOR_BYTES / 8;
};

using f32v = VecOf<float>::vec;
using f64v = VecOf<double>::vec;
using i32v = VecOf<float>::ivec;
using i64v = VecOf<double>::ivec;
// Half a vector of floats: what one vector of doubles converts to.
typedef float f32half __attribute__((vector_size(PYGEN_VECTOR_BYTES / 2)));
typedef float f32half_unaligned __attribute__((vector_size(PYGEN_VECTOR_BYTES / 2), aligned(4), may_alias));

// The 16-bit types as their bits; the arithmetic is float's.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <typename T>
PYGEN_INLINE typename VecOf<T>::vec load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned*>(p);
}

template <typename T>
PYGEN_INLINE void store(T* p, typename VecOf<T>::vec v) {
  *reinterpret_cast<typename VecOf<T>::unaligned*>(p) = v;
}

// The first n < lanes of a vector's elements; the others are `fill`. Not inlined below AVX-512, which has masks: this is
// the end of a row, and unrolled into a loop's body it would crowd out the loop.
template <typename T>
__attribute__((noinline)) typename VecOf<T>::vec load_some(const T* p, int64_t n, T fill) {
  T lane[VecOf<T>::lanes];
  for (int i = 0; i < VecOf<T>::lanes; ++i) lane[i] = fill;
  memcpy(lane, p, n * sizeof(T));
  return load(lane);
}

template <typename T>
__attribute__((noinline)) void store_some(T* p, typename VecOf<T>::vec v, int64_t n) {
  memcpy(p, &v, n * sizeof(T));
}

template <typename T>
PYGEN_INLINE typename VecOf<T>::vec splat(T x) {
  return typename VecOf<T>::vec{} + x;
}

// The first n lanes, zeros behind them. In registers: storing a part and loading the whole would stall the load.
template <typename T>
PYGEN_INLINE typename VecOf<T>::vec keep_some(typename VecOf<T>::vec v, int64_t n) {
  typename VecOf<T>::ivec lane, count = {};
  for (int i = 0; i < VecOf<T>::lanes; ++i) lane[i] = i, count[i] = n;
  return lane < count ? v : typename VecOf<T>::vec{};
}

// The greater, or the smaller, of the two; where `x` is NaN the result is NaN, a NaN in `bound` does not count.
template <typename V>
PYGEN_INLINE V at_least(V x, V bound) {
  return x < bound ? bound : x;
}

template <typename V>
PYGEN_INLINE V at_most(V x, V bound) {
  return x > bound ? bound : x;
}

#if PYGEN_VECTOR_BYTES == 16
PYGEN_INLINE f32half half_of(f32v v, int which) {
  f32half half;
  memcpy(&half, reinterpret_cast<const char*>(&v) + which * sizeof half, sizeof half);
  return half;
}
PYGEN_INLINE f64v low_half(f32v v) { return __builtin_convertvector(half_of(v, 0), f64v); }
PYGEN_INLINE f64v high_half(f32v v) { return __builtin_convertvector(half_of(v, 1), f64v); }
PYGEN_INLINE f32half to_f32(f64v v) { return __builtin_convertvector(v, f32half); }
PYGEN_INLINE f64v to_f64(f32half v) { return __builtin_convertvector(v, f64v); }
#endif

// What the vector extensions say but GCC 12 compiles into several instructions or through memory. The hardware's minimum
// and maximum return their second operand where either is NaN.
#if PYGEN_VECTOR_BYTES == 64
PYGEN_INLINE f32v at_least(f32v x, f32v bound) { return (f32v)_mm512_max_ps((__m512)bound, (__m512)x); }
PYGEN_INLINE f64v at_least(f64v x, f64v bound) { return (f64v)_mm512_max_pd((__m512d)bound, (__m512d)x); }
PYGEN_INLINE f32v at_most(f32v x, f32v bound) { return (f32v)_mm512_min_ps((__m512)bound, (__m512)x); }
PYGEN_INLINE f64v at_most(f64v x, f64v bound) { return (f64v)_mm512_min_pd((__m512d)bound, (__m512d)x); }
PYGEN_INLINE f64v low_half(f32v v) { return (f64v)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)); }
PYGEN_INLINE f64v high_half(f32v v) { return (f64v)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1)); }
PYGEN_INLINE f32half to_f32(f64v v) { return (f32half)_mm512_cvtpd_ps((__m512d)v); }
PYGEN_INLINE f64v to_f64(f32half v) { return (f64v)_mm512_cvtps_pd((__m256)v); }

PYGEN_INLINE f32v load_some(const float* p, int64_t n, float fill) {
  return (f32v)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>((1u << n) - 1), p);
}
PYGEN_INLINE f64v load_some(const double* p, int64_t n, double fill) {
  return (f64v)_mm512_mask_loadu_pd(_mm512_set1_pd(fill), static_cast<__mmask8>((1u << n) - 1), p);
}
PYGEN_INLINE void store_some(float* p, f32v v, int64_t n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
}
PYGEN_INLINE void store_some(double* p, f64v v, int64_t n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), (__m512d)v);
}
#elif PYGEN_VECTOR_BYTES == 32
PYGEN_INLINE f32v at_least(f32v x, f32v bound) { return (f32v)_mm256_max_ps((__m256)bound, (__m256)x); }
PYGEN_INLINE f64v at_least(f64v x, f64v bound) { return (f64v)_mm256_max_pd((__m256d)bound, (__m256d)x); }
PYGEN_INLINE f32v at_most(f32v x, f32v bound) { return (f32v)_mm256_min_ps((__m256)bound, (__m256)x); }
PYGEN_INLINE f64v at_most(f64v x, f64v bound) { return (f64v)_mm256_min_pd((__m256d)bound, (__m256d)x); }
PYGEN_INLINE f64v low_half(f32v v) { return (f64v)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)); }
PYGEN_INLINE f64v high_half(f32v v) { return (f64v)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1)); }
PYGEN_INLINE f32half to_f32(f64v v) { return (f32half)_mm256_cvtpd_ps((__m256d)v); }
PYGEN_INLINE f64v to_f64(f32half v) { return (f64v)_mm256_cvtps_pd((__m128)v); }
#endif

// A vector at i of n elements; behind the end, zeros.
template <typename T>
PYGEN_INLINE typename VecOf<T>::vec read(const T* p, int64_t i, int64_t n) {
  return i + VecOf<T>::lanes <= n ? load(p + i) : load_some(p + i, n - i, T(0));
}

template <typename T>
PYGEN_INLINE void write(T* p, int64_t i, int64_t n, typename VecOf<T>::vec v) {
  i + VecOf<T>::lanes <= n ? store(p + i, v) : store_some(p + i, v, n - i);
}

// In pairs: the chain is log2(lanes) additions long.
#if PYGEN_VECTOR_BYTES == 64
PYGEN_INLINE double sum_of_lanes(f64v v) { return _mm512_reduce_add_pd((__m512d)v); }
PYGEN_INLINE float maximum_of_lanes(f32v v) { return _mm512_reduce_max_ps((__m512)v); }
PYGEN_INLINE double maximum_of_lanes(f64v v) { return _mm512_reduce_max_pd((__m512d)v); }
#else
PYGEN_INLINE double sum_of_lanes(f64v v) {
  for (int width = VecOf<double>::lanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  return v[0];
}
PYGEN_INLINE float maximum_of_lanes(f32v v) {
  for (int width = VecOf<float>::lanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) v[i] = v[i] < v[i + width] ? v[i + width] : v[i];
  return v[0];
}
PYGEN_INLINE double maximum_of_lanes(f64v v) {
  for (int width = VecOf<double>::lanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) v[i] = v[i] < v[i + width] ? v[i + width] : v[i];
  return v[0];
}
#endif

// Running sums are kept in float64 whatever is summed: they cost little next to what they sum, and a row of 2^20 then
// is as exact as a row of 16.
PYGEN_INLINE void accumulate(f64v& sum, f32v v) { sum += low_half(v) + high_half(v); }
PYGEN_INLINE void accumulate(f64v& sum, f64v v) { sum += v; }

// hi + lo is the exact sum of what was added, up to lo's own rounding: float64 for the sums of float64.
struct ExactSum {
  f64v hi, lo;
  __attribute__((always_inline)) void add(f64v v) {
    const f64v sum = hi + v;
    const f64v added = sum - hi;
    lo += (hi - (sum - added)) + (v - added);
    hi = sum;
  }
};

// The running sums of values of type T.
template <typename T>
struct RunningSum {
  f64v sum = {};
  __attribute__((always_inline)) void add(f32v v) { accumulate(sum, v); }
  __attribute__((always_inline)) void add(f64v v) { sum += v; }
  __attribute__((always_inline)) f64v plus(f64v v) const { return sum + v; }
  __attribute__((always_inline)) double total() const { return sum_of_lanes(sum); }
};

template <>
struct RunningSum<double> {
  ExactSum sum = {};
  __attribute__((always_inline)) void add(f64v v) { sum.add(v); }
  __attribute__((always_inline)) f64v plus(f64v v) const { return sum.hi + (v + sum.lo); }
  __attribute__((always_inline)) double total() const { return sum_of_lanes(sum.hi) + sum_of_lanes(sum.lo); }
};

PYGEN_INLINE float widen(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Round to nearest, ties to even; NaN stays NaN (the rounding increment could carry it into infinity).
PYGEN_INLINE bf16 to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return {static_cast<uint16_t>(value == value ? rounded >> 16 : 0x7fc0)};
}

#if defined(__F16C__)
PYGEN_INLINE float widen(f16 x) { return _cvtsh_ss(x.bits); }
PYGEN_INLINE f16 to_f16(float value) { return {_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)}; }
#elif defined(__aarch64__)
PYGEN_INLINE float widen(f16 x) {
  __fp16 half;
  memcpy(&half, &x.bits, sizeof half);
  return half;
}
PYGEN_INLINE f16 to_f16(float value) {
  const __fp16 half = value;
  f16 result;
  memcpy(&result.bits, &half, sizeof half);
  return result;
}
#else
PYGEN_INLINE float widen(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {
    bits = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
  } else {
    // The exponent's bias changes by a multiplication, which makes the subnormals right as well.
    const uint32_t shifted = magnitude << 13;
    float scaled;
    memcpy(&scaled, &shifted, sizeof scaled);
    scaled *= 0x1p112f;
    memcpy(&bits, &scaled, sizeof bits);
    bits |= sign;
  }
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
PYGEN_INLINE f16 to_f16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (bits >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65520 and up round to infinity
  if (bits < 0x38800000) {  // below 2^-14 the result is subnormal: let a float addition round it
    float magnitude;
    memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, sizeof bits);
    return {static_cast<uint16_t>(sign | (bits - 0x3f000000))};
  }
  bits += 0xfff + ((bits >> 13) & 1) - (112u << 23);
  return {static_cast<uint16_t>(sign | bits >> 13)};
}
#endif

// Element conversion between what is stored (In, Out) and what is computed in (float or double).
PYGEN_INLINE float widen(float x) { return x; }
PYGEN_INLINE double widen(double x) { return x; }
PYGEN_INLINE void narrow(float x, float* p) { *p = x; }
PYGEN_INLINE void narrow(double x, double* p) { *p = x; }
PYGEN_INLINE void narrow(float x, bf16* p) { *p = to_bf16(x); }
PYGEN_INLINE void narrow(float x, f16* p) { *p = to_f16(x); }

// The type that a stored type computes in.
template <typename T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <typename T>
using compute_t = typename ComputeOf<T>::type;

// dst[i] = src[i * stride], widened.
template <typename In>
PYGEN_INLINE void gather(const In* src, int64_t stride, int64_t n, compute_t<In>* dst) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) dst[i] = widen(src[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i] = widen(src[i * stride]);
  }
}

// dst[i * stride] = src[i], rounded.
template <typename Out>
PYGEN_INLINE void scatter(const compute_t<Out>* src, int64_t stride, int64_t n, Out* dst) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) narrow(src[i], dst + i);
  } else {
    for (int64_t i = 0; i < n; ++i) narrow(src[i], dst + i * stride);
  }
}

PYGEN_END_LEVEL
