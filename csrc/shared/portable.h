// What lets the headers of this folder compile for the CPU (once per instruction-set level, GCC and Clang) and for CUDA
// (nvcc), word for word. They promise the same bits everywhere, so they use only operations that IEEE 754 defines to the
// last bit (+ - * / and square root, comparisons, conversions), in a fixed order, and are compiled without contraction
// into fused multiply-adds (-ffp-contract=off, --fmad=false).
//
// `Real` is one double, or on the CPU also a vector of doubles: one trajectory per element ("lane"). Comparisons give a
// bool or a vector of 0 and -1, and `condition ? a : b` picks per element, in both.
#pragma once

#if defined(__CUDACC__)
#include <cstdint>
#include <cstring>
#define PYGEN_LEVEL cuda
#define PYGEN_BEGIN_LEVEL \
  namespace pygen {       \
  namespace PYGEN_LEVEL {
#define PYGEN_END_LEVEL \
  }                     \
  }
#define PYGEN_SHARED static __host__ __device__ __forceinline__
// Of what is called from many places and too long to stand in each: it takes pointers and numbers, no structures, which
// would have to lie in memory.
#define PYGEN_SHARED_CALL static __host__ __device__ __noinline__
#define PYGEN_UNROLL _Pragma("unroll")
#else
#include "../cpu/vec.h"
#define PYGEN_SHARED PYGEN_INLINE
#define PYGEN_SHARED_CALL static __attribute__((noinline, unused))
#define PYGEN_UNROLL _Pragma("GCC unroll 16")
#endif

PYGEN_BEGIN_LEVEL

template <class Real>
struct WordOf;
template <>
struct WordOf<double> {
  using Word = uint64_t;
  static constexpr int lanes = 1;
};
template <class Real>
using Word = typename WordOf<Real>::Word;

PYGEN_SHARED double as_real(uint64_t bits) {
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
PYGEN_SHARED uint64_t as_word(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// The full product of the low 32 bits of `a` and a 32-bit number.
PYGEN_SHARED uint64_t multiply_low(uint64_t a, uint32_t b) { return (a & 0xffffffffu) * b; }

// Of a whole number below 2^53.
PYGEN_SHARED double to_real(uint64_t x) { return static_cast<double>(static_cast<int64_t>(x)); }

#if defined(__CUDA_ARCH__)
PYGEN_SHARED double square_root(double x) { return __dsqrt_rn(x); }
#else
PYGEN_SHARED double square_root(double x) { return __builtin_sqrt(x); }
#endif

PYGEN_SHARED void load_real(const double* p, double& x) { x = *p; }
PYGEN_SHARED void store_real(double* p, double x) { *p = x; }

// count + 1 where p <= target.
PYGEN_SHARED int64_t count_if_reached(int64_t count, double p, double target) { return count + (p <= target); }

#if !defined(__CUDACC__)
typedef uint64_t u64v __attribute__((vector_size(PYGEN_VECTOR_BYTES)));
template <>
struct WordOf<f64v> {
  using Word = u64v;
  static constexpr int lanes = VecOf<double>::lanes;
};

PYGEN_INLINE f64v as_real(u64v bits) { return (f64v)bits; }
PYGEN_INLINE u64v as_word(f64v x) { return (u64v)x; }

PYGEN_INLINE void load_real(const double* p, f64v& x) { x = load(p); }
PYGEN_INLINE void store_real(double* p, f64v x) { store(p, x); }

#if PYGEN_VECTOR_BYTES == 64
PYGEN_INLINE u64v multiply_low(u64v a, uint32_t b) { return (u64v)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b)); }
PYGEN_INLINE f64v to_real(u64v x) { return (f64v)_mm512_cvtepi64_pd((__m512i)x); }
PYGEN_INLINE f64v square_root(f64v x) { return (f64v)_mm512_sqrt_pd((__m512d)x); }
PYGEN_INLINE i64v count_if_reached(i64v count, f64v p, f64v target) {
  const __mmask8 reached = _mm512_cmp_pd_mask((__m512d)p, (__m512d)target, _CMP_LE_OQ);
  return (i64v)_mm512_mask_add_epi64((__m512i)count, reached, (__m512i)count, _mm512_set1_epi64(1));
}
#else
#if PYGEN_VECTOR_BYTES == 32
PYGEN_INLINE u64v multiply_low(u64v a, uint32_t b) { return (u64v)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b)); }
PYGEN_INLINE f64v square_root(f64v x) { return (f64v)_mm256_sqrt_pd((__m256d)x); }
#elif defined(__x86_64__)
PYGEN_INLINE u64v multiply_low(u64v a, uint32_t b) { return (u64v)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b)); }
PYGEN_INLINE f64v square_root(f64v x) { return (f64v)_mm_sqrt_pd((__m128d)x); }
#else
PYGEN_INLINE u64v multiply_low(u64v a, uint32_t b) { return (a & 0xffffffffu) * b; }
PYGEN_INLINE f64v square_root(f64v x) {
  for (int i = 0; i < VecOf<double>::lanes; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}
#endif
// Two exact halves, for there is no such conversion below AVX-512: each is put into the low bits of a large double.
PYGEN_INLINE f64v to_real(u64v x) {
  const u64v exponent = (u64v)(f64v{} + 0x1p52);
  const f64v low = (f64v)((x & 0xffffffffu) | exponent) - 0x1p52;
  const f64v high = (f64v)((x >> 32) | exponent) - 0x1p52;
  return high * 0x1p32 + low;
}
PYGEN_INLINE i64v count_if_reached(i64v count, f64v p, f64v target) { return count - (p <= target); }
#endif
#endif

template <class Real>
PYGEN_SHARED Real load_real(const double* p) {
  Real x;
  load_real(p, x);
  return x;
}

PYGEN_END_LEVEL
