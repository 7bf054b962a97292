// Which lanes something holds for: AVX-512's mask registers, vectors of 0 and -1 elsewhere. GCC moves what is written as
// vectors of 0 and -1 between the two at every use.
#pragma once

#include "vec.h"

PYGEN_BEGIN_LEVEL

#if PYGEN_VECTOR_BYTES == 64
using Mask = __mmask8;
PYGEN_INLINE Mask less(f64v a, f64v b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LT_OQ); }
PYGEN_INLINE Mask not_less(i64v a, i64v b) { return _mm512_cmpge_epi64_mask((__m512i)a, (__m512i)b); }
PYGEN_INLINE Mask not_zero(f64v a) { return _mm512_cmp_pd_mask((__m512d)a, _mm512_setzero_pd(), _CMP_NEQ_UQ); }
PYGEN_INLINE Mask equal(i64v a, i64v b) { return _mm512_cmpeq_epi64_mask((__m512i)a, (__m512i)b); }
PYGEN_INLINE Mask invert(Mask m) { return static_cast<Mask>(~m); }
PYGEN_INLINE uint32_t bits_of(Mask m) { return m; }
PYGEN_INLINE void set_lane(Mask& m, int lane) { m = static_cast<Mask>(m | 1u << lane); }
PYGEN_INLINE f64v picked(Mask m, f64v yes, f64v no) { return (f64v)_mm512_mask_blend_pd(m, (__m512d)no, (__m512d)yes); }
#else
using Mask = i64v;
PYGEN_INLINE Mask less(f64v a, f64v b) { return a < b; }
PYGEN_INLINE Mask not_zero(f64v a) { return a != 0.0; }
PYGEN_INLINE Mask equal(i64v a, i64v b) { return a == b; }
PYGEN_INLINE Mask invert(Mask m) { return ~m; }
PYGEN_INLINE void set_lane(Mask& m, int lane) { m[lane] = -1; }
PYGEN_INLINE f64v picked(Mask m, f64v yes, f64v no) { return m ? yes : no; }
PYGEN_INLINE uint32_t bits_of(Mask m) {
#if PYGEN_VECTOR_BYTES == 32
  return _mm256_movemask_pd((__m256d)m);
#else
  uint32_t bits = 0;
  for (int i = 0; i < VecOf<double>::lanes; ++i) bits |= (m[i] != 0) << i;
  return bits;
#endif
}
#endif

#if PYGEN_VECTOR_BYTES == 64
// change[choice] where `jump`, else 0. Long: more than 16 entries, at most 32.
template <bool Long>
PYGEN_INLINE f64v looked_up(const double* change, i64v choice, Mask jump) {
  const auto table = [&](int at) { return _mm512_loadu_pd(change + at); };
  const __m512d first = _mm512_maskz_permutex2var_pd(jump, table(0), (__m512i)choice, table(8));
  if (!Long) return (f64v)first;
  const Mask beyond = _mm512_mask_test_epi64_mask(jump, (__m512i)choice, _mm512_set1_epi64(16));
  return (f64v)_mm512_mask_blend_pd(beyond, first, _mm512_permutex2var_pd(table(16), (__m512i)choice, table(24)));
}
#endif

PYGEN_END_LEVEL
