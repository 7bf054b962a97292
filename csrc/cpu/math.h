// Elementary functions on vectors, for float and double, accurate to about one unit in the last place: through the op,
// tests/ops/test_affine_coupling.py measures them against 50 digits. Coefficients are those of the Cephes library (Moshier,
// 1984-1992), and of fdlibm (Sun Microsystems, 1993) for the logarithm.
#pragma once

#include "vec.h"

PYGEN_BEGIN_LEVEL

// One vector's exponential is a chain of some hundred cycles; several side by side fill the units that one leaves idle
// (measured: tanh coupling 32 -> 21 ns for 16 elements, softplus 63 -> 34). Loops over them are unrolled by this number
// and free of branches and aliases, so that the compiler can interleave the chains (-fschedule-insns in setup.py).
constexpr int kSideBySide = 4;

template <typename V>
PYGEN_INLINE V absolute(V x) {
  return x < 0 ? -x : x;
}

// Correctly rounded, as the hardware does it.
#if PYGEN_VECTOR_BYTES == 64
PYGEN_INLINE f32v square_root(f32v x) { return (f32v)_mm512_sqrt_ps((__m512)x); }
PYGEN_INLINE f64v square_root(f64v x) { return (f64v)_mm512_sqrt_pd((__m512d)x); }
#elif PYGEN_VECTOR_BYTES == 32
PYGEN_INLINE f32v square_root(f32v x) { return (f32v)_mm256_sqrt_ps((__m256)x); }
PYGEN_INLINE f64v square_root(f64v x) { return (f64v)_mm256_sqrt_pd((__m256d)x); }
#else
PYGEN_INLINE f32v square_root(f32v x) {
  for (int i = 0; i < VecOf<float>::lanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
PYGEN_INLINE f64v square_root(f64v x) {
  for (int i = 0; i < VecOf<double>::lanes; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}
#endif

// ---- exponential -----------------------------------------------------------------------------------------------------

// x = n ln 2 + r with |r| <= ln(2)/2; ln 2 in two parts, the first short enough that n * hi is exact.
constexpr float kLog2E32 = 1.44269504088896341f;
constexpr float kLn2Hi32 = 0.693359375f;
constexpr float kLn2Lo32 = -2.12194440e-4f;
constexpr double kLog2E64 = 1.4426950408889634073599;
constexpr double kLn2Hi64 = 6.93145751953125e-1;
constexpr double kLn2Lo64 = 1.42860682030941723212e-6;

// Adding and subtracting this rounds to the nearest integer, which then also stands in the sum's low bits.
constexpr float kRound32 = 0x1.8p23f;
constexpr double kRound64 = 0x1.8p52;

// e^r for |r| <= ln(2)/2. Paired terms (Estrin): the polynomial is most of a chain on which the result waits.
PYGEN_INLINE f32v exp_reduced(f32v r) {
  const f32v z = r * r;
  const f32v high = r * 1.9875691500e-4f + 1.3981999507e-3f;
  const f32v middle = r * 8.3334519073e-3f + 4.1665795894e-2f;
  const f32v low = r * 1.6666665459e-1f + 5.0000001201e-1f;
  return ((high * z + middle) * z + low) * z + r + 1.0f;
}

PYGEN_INLINE f64v exp_reduced(f64v r) {
  const f64v z = r * r;
  const f64v p = r * ((z * 1.26177193074810590878e-4 + 3.02994407707441961300e-2) * z + 9.99999999999999999910e-1);
  const f64v q = ((z * 3.00198505138664455042e-6 + 2.52448340349684104192e-3) * z + 2.27265548208155028766e-1) * z +
                 2.00000000000000000005;
  return 1.0 + 2.0 * (p / (q - p));
}

// y * 2^n for whole n; in two factors, so that neither leaves the exponent's range before the product does.
PYGEN_INLINE f32v scale_by_power(f32v y, f32v n) {
#if defined(__AVX512F__)
  return (f32v)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
  const i32v whole = __builtin_convertvector(at_most(at_least(n, splat(-252.f)), splat(254.f)), i32v);
  const i32v half = whole >> 1;
  return y * (f32v)((half + 127) << 23) * (f32v)((whole - half + 127) << 23);
#endif
}

PYGEN_INLINE f64v scale_by_power(f64v y, f64v n) {
#if defined(__AVX512F__)
  return (f64v)_mm512_scalef_pd((__m512d)y, (__m512d)n);
#else
  // float64 to int64 has no AVX2 instruction: the bits that kRound64 leaves are the integer. The halves are split in
  // floating point, because an arithmetic 64-bit shift is missing as well.
  const f64v bounded = at_most(at_least(n, splat(-2044.)), splat(2046.));
  const f64v half = (bounded * 0.5 + kRound64) - kRound64;
  const i64v first = (i64v)(half + kRound64) - (i64v)splat(kRound64);
  const i64v second = (i64v)((bounded - half) + kRound64) - (i64v)splat(kRound64);
  return y * (f64v)((first + 1023) << 52) * (f64v)((second + 1023) << 52);
#endif
}

struct Reduced32 {
  f32v n, r;
};
struct Reduced64 {
  f64v n, r;
};

PYGEN_INLINE Reduced32 reduce_by_ln2(f32v x) {
  const f32v n = (x * kLog2E32 + kRound32) - kRound32;
  return {n, (x - n * kLn2Hi32) - n * kLn2Lo32};
}

PYGEN_INLINE Reduced64 reduce_by_ln2(f64v x) {
  const f64v n = (x * kLog2E64 + kRound64) - kRound64;
  return {n, (x - n * kLn2Hi64) - n * kLn2Lo64};
}

// e^x * 2^-shift for x in the range that the callers below keep.
template <typename V, typename T>
PYGEN_INLINE V exp_shifted(V x, T shift) {
  const auto reduced = reduce_by_ln2(x);
  return scale_by_power(exp_reduced(reduced.r), reduced.n - shift);
}

// Beyond these the result is 0 or infinity anyway, and the reduction would leave its range.
template <typename T>
struct ExpRange;
template <>
struct ExpRange<float> {
  static constexpr float lowest = -105.f, highest = 90.f;
};
template <>
struct ExpRange<double> {
  static constexpr double lowest = -746., highest = 711.;
};
PYGEN_INLINE f32v exp_of_negative(f32v x) { return exp_shifted(at_least(x, splat(ExpRange<float>::lowest)), 0.f); }
PYGEN_INLINE f64v exp_of_negative(f64v x) { return exp_shifted(at_least(x, splat(ExpRange<double>::lowest)), 0.); }
PYGEN_INLINE f32v exp_of_positive(f32v x) { return exp_shifted(at_most(x, splat(ExpRange<float>::highest)), 0.f); }
PYGEN_INLINE f64v exp_of_positive(f64v x) { return exp_shifted(at_most(x, splat(ExpRange<double>::highest)), 0.); }
PYGEN_INLINE f32v exp(f32v x) { return exp_of_negative(at_most(x, splat(ExpRange<float>::highest))); }
PYGEN_INLINE f64v exp(f64v x) { return exp_of_negative(at_most(x, splat(ExpRange<double>::highest))); }
// For arguments known to be small.
PYGEN_INLINE f32v exp_bounded(f32v x) { return exp_shifted(x, 0.f); }
PYGEN_INLINE f64v exp_bounded(f64v x) { return exp_shifted(x, 0.); }

// ---- logarithm -------------------------------------------------------------------------------------------------------

// x = m 2^e with sqrt(1/2) <= m < sqrt(2), f = m - 1, s = f / (2 + f): log x = e ln 2 + f - (f^2/2 - s (f^2/2 + R(s^2))).
PYGEN_INLINE f32v log(f32v x) {
  const auto tiny = x < 0x1p-126f;
  const f32v normal = tiny ? x * 0x1p25f : x;
  const i32v bits = (i32v)normal - 0x3f3504f3;
  const i32v e = bits >> 23;
  const f32v f = (f32v)((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
  const f32v exponent = __builtin_convertvector(e, f32v) - (tiny ? splat(25.f) : splat(0.f));
  const f32v s = f / (2.0f + f);
  const f32v z = s * s;
  const f32v r = z * (((z * 0.24279078841f + 0.28498786688f) * z + 0.40000972152f) * z + 0.66666662693f);
  const f32v h = 0.5f * f * f;
  const f32v y = exponent * kLn2Hi32 - ((h - (s * (h + r) + exponent * kLn2Lo32)) - f);
  const f32v special = x == 0.0f ? splat(-__builtin_inff()) : splat(__builtin_nanf(""));
  return x > 0.0f ? (x == __builtin_inff() ? x : y) : special;
}

PYGEN_INLINE f64v log(f64v x) {
  const auto tiny = x < 0x1p-1022;
  const f64v normal = tiny ? x * 0x1p54 : x;
  // 64-bit arithmetic shifts are missing below AVX-512: the exponent is taken without a sign, then made a number by
  // placing it in the low bits of 2^52.
  const i64v bits = (i64v)normal + (0x3ff0000000000000 - 0x3fe6a09e667f3bcd);
  typedef uint64_t u64v __attribute__((vector_size(PYGEN_VECTOR_BYTES)));
  const i64v biased = (i64v)((u64v)bits >> 52);
  const f64v exponent = ((f64v)(biased | 0x4330000000000000) - (0x1p52 + 1023)) - (tiny ? splat(54.) : splat(0.));
  const f64v f = (f64v)((bits & 0x000fffffffffffff) + 0x3fe6a09e667f3bcd) - 1.0;
  const f64v s = f / (2.0 + f);
  const f64v z = s * s;
  f64v r = z * 1.479819860511658591e-01 + 1.531383769920937332e-01;
  r = r * z + 1.818357216161805012e-01;
  r = r * z + 2.222219843214978396e-01;
  r = r * z + 2.857142874366239149e-01;
  r = r * z + 3.999999999940941908e-01;
  r = (r * z + 6.666666666666735130e-01) * z;
  const f64v h = 0.5 * f * f;
  const f64v y = exponent * kLn2Hi64 - ((h - (s * (h + r) + exponent * kLn2Lo64)) - f);
  const f64v special = x == 0.0 ? splat(-__builtin_inf()) : splat(__builtin_nan(""));
  return x > 0.0 ? (x == __builtin_inf() ? x : y) : special;
}

// log(1 + u) for 0 <= u <= 1. What 1 + u rounds away is put back to first order, so that a small u keeps its digits.
PYGEN_INLINE f64v log1p(f64v u) {
  const f64v w = 1 + u;
  return log(w) + (u - (w - 1)) / w;
}

// 2 atanh s with s = u / (2 + u) <= 1/3: a polynomial in s^2 (interpolated at Chebyshev's points, error 4e-10), and half
// the work of a logarithm.
PYGEN_INLINE f32v log1p(f32v u) {
  const f32v s = u / (2.0f + u);
  const f32v z = s * s;
  const f32v g = (((z * 0.1161216461f + 0.108532879f) * z + 0.14296179f) * z + 0.1999985317f) * z + 0.3333333366f;
  const f32v twice = s + s;
  return twice + twice * (z * g);
}

// ---- hyperbolic tangent, logistic function, arc tangent ---------------------------------------------------------------

PYGEN_INLINE f32v tanh(f32v x) {
  const f32v z = x * x;
  const f32v high = z * 2.06390887954e-2f - 5.37397155531e-2f;
  const f32v low = z * 1.33314422036e-1f - 3.33332819422e-1f;
  const f32v w = z * z;
  const f32v p = (w * -5.70498872745e-3f + high) * w + low;
  const f32v near = p * z * x + x;
  const f32v size = absolute(x);
  const f32v far = 1.0f - 2.0f / (exp_of_positive(2.0f * size) + 1.0f);
  return size < 0.625f ? near : (x < 0.0f ? -far : far);
}

PYGEN_INLINE f64v tanh(f64v x) {
  const f64v z = x * x;
  const f64v p = (z * -9.64399179425052238628e-1 - 9.92877231001918586564e1) * z - 1.61468768441708447952e3;
  const f64v q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3;
  const f64v near = x * z * (p / q) + x;
  const f64v size = absolute(x);
  const f64v far = 1.0 - 2.0 / (exp_of_positive(2.0 * size) + 1.0);
  return size < 0.625 ? near : (x < 0.0 ? -far : far);
}

// sigmoid(x), sigmoid(-x) and log sigmoid(x) = -softplus(-x), all from u = e^-|x|, which never overflows.
template <typename V>
struct Logistic {
  V value, complement;
};

template <typename V>
PYGEN_INLINE Logistic<V> sigmoid(V x) {
  const V u = exp_of_negative(-absolute(x));
  const V large = 1 / (1 + u), small = u * large;
  return {x < 0 ? small : large, x < 0 ? large : small};
}

template <typename V>
PYGEN_INLINE V log_sigmoid(V x) {
  return (x < 0 ? x : V{}) - log1p(exp_of_negative(-absolute(x)));
}

template <typename V>
PYGEN_INLINE V softplus(V x) {
  return -log_sigmoid(-x);
}

// softplus(x) and its slope, sigmoid(x).
template <typename V>
struct Softplus {
  V value, slope;
};

template <typename V>
PYGEN_INLINE Softplus<V> softplus_and_slope(V x) {
  const V u = exp_of_negative(-absolute(x));
  const V large = 1 / (1 + u);
  return {(x < 0 ? V{} : x) + log1p(u), x < 0 ? u * large : large};
}

// Reduced to |t| <= tan(pi/8): atan x = pi/2 + atan(-1/x) above tan(3 pi/8), pi/4 + atan((x-1)/(x+1)) above tan(pi/8).
PYGEN_INLINE f32v atan(f32v x) {
  const f32v size = absolute(x);
  const auto large = size > 2.414213562373095f;
  const auto middle = size > 0.4142135623730950f;
  const f32v numerator = large ? splat(-1.f) : (middle ? size - 1.0f : size);
  const f32v denominator = large ? size : (middle ? size + 1.0f : splat(1.f));
  const f32v offset = large ? splat(1.5707963267948966f) : (middle ? splat(0.7853981633974483f) : splat(0.f));
  const f32v t = numerator / denominator;
  const f32v z = t * t;
  const f32v p = ((z * 8.05374449538e-2f - 1.38776856032e-1f) * z + 1.99777106478e-1f) * z - 3.33329491539e-1f;
  const f32v y = offset + (p * z * t + t);
  return x < 0.0f ? -y : y;
}

PYGEN_INLINE f64v atan(f64v x) {
  constexpr double kMoreBits = 6.123233995736765886130e-17;  // pi/2 minus its float64
  const f64v size = absolute(x);
  const auto large = size > 2.41421356237309504880;
  const auto middle = size > 0.66;
  const f64v numerator = large ? splat(-1.) : (middle ? size - 1.0 : size);
  const f64v denominator = large ? size : (middle ? size + 1.0 : splat(1.));
  const f64v offset = large ? splat(1.57079632679489661923) : (middle ? splat(0.785398163397448309616) : splat(0.));
  const f64v more = large ? splat(kMoreBits) : (middle ? splat(0.5 * kMoreBits) : splat(0.));
  const f64v t = numerator / denominator;
  const f64v z = t * t;
  f64v p = z * -8.750608600031904122785e-1 - 1.615753718733365076637e1;
  p = p * z - 7.500855792314704667340e1;
  p = p * z - 1.228866684490136173410e2;
  p = p * z - 6.485021904942025371773e1;
  f64v q = z + 2.485846490142306297962e1;
  q = q * z + 1.650270098316988542046e2;
  q = q * z + 4.328810604912902668951e2;
  q = q * z + 4.853903996359136964868e2;
  q = q * z + 1.945506571482613964425e2;
  const f64v y = offset + ((z * (p / q)) * t + t + more);
  return x < 0.0 ? -y : y;
}

PYGEN_END_LEVEL
