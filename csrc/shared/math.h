// Functions that give the same bits on every device: log, exp, pow, floor, ceil. Each is a fixed sequence of IEEE
// operations; the processor's or the toolkit's own functions differ from one another in the last bit. Largest errors
// (tests/ssa/test_math.py): log and exp 1 ulp, pow 1 ulp where |y log x| < 8, and
// 1 + |y log x| / 16 ulp beyond.
#pragma once

#include "portable.h"

PYGEN_BEGIN_LEVEL

constexpr double kInfinity = __builtin_huge_val();
// The last 21 bits of the high part are zero: its product with an exponent is exact.
constexpr double kLn2High = 6.93147180369123816490e-01;
constexpr double kLn2Low = 1.90821492927058770002e-10;

template <class Real>
PYGEN_SHARED Real magnitude(Real x) {
  return as_real(as_word(x) & 0x7fffffffffffffffull);
}

// x = 2^exponent (1 + fraction) with 1 + fraction in [sqrt(1/2), sqrt(2)), for normal x > 0; the fraction is exact.
template <class Real>
struct Parts {
  Real exponent, fraction;
};

template <class Real>
PYGEN_SHARED Parts<Real> parts(Real x) {
  constexpr uint64_t kRootHalf = 0x3fe6a09e00000000ull, kOne = 0x3ff0000000000000ull;
  // Of x / sqrt(1/2): its exponent, biased by 1023 and 2^52 for a conversion without a signed shift.
  const Word<Real> shifted = as_word(x) + (kOne - kRootHalf);
  const Real exponent = as_real((shifted >> 52) | 0x4330000000000000ull) - (0x1p52 + 1023.0);
  const Real mantissa = as_real((shifted & 0x000fffffffffffffull) + kRootHalf);
  return {exponent, mantissa - 1.0};
}

// The part of log(1 + f) beyond 2 s, s = f / (2 + f), by s: an even polynomial of s (minimax on |s| < 0.1716).
template <class Real>
PYGEN_SHARED Real log_tail(Real z) {
  const Real w = z * z;
  const Real even = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
  const Real odd = z * (6.666666666666735130e-01 +
                        w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
  return even + odd;
}

// log(x) for normal x > 0: all that a uniform in (0, 1] needs.
template <class Real>
PYGEN_SHARED Real log_of_normal(Real x) {
  const Parts<Real> p = parts(x);
  const Real f = p.fraction, s = f / (f + 2.0), half = f * f * 0.5;
  return p.exponent * kLn2High - ((half - (s * (half + log_tail(s * s)) + p.exponent * kLn2Low)) - f);
}

template <class Real>
PYGEN_SHARED Real constant(double x) {
  return Real{} + x;
}

template <class Real>
PYGEN_SHARED Real portable_log(Real x) {
  const auto tiny = x < 0x1p-1022;
  const Real scaled = tiny ? x * 0x1p54 : x;
  Real y = log_of_normal(scaled);
  y = tiny ? (y - 54 * kLn2High) - 54 * kLn2Low : y;
  y = x == kInfinity ? x : y;
  y = x == 0.0 ? constant<Real>(-kInfinity) : y;
  return x >= 0.0 ? y : constant<Real>(kInfinity) - kInfinity;
}

// 2^n x for x near 1 and whole n in [-2000, 2000]: in two steps, the first exact.
template <class Real>
PYGEN_SHARED Real scale_by_power(Real x, Real n) {
  constexpr double kShift = 0x1p52 + 0x1p51;
  const Real half = (n * 0.5 + kShift) - kShift, rest = n - half;
  const auto power = [](Real e) { return as_real((as_word(e + (0x1p52 + 1023.0)) & 0xfffull) << 52); };
  return x * power(half) * power(rest);
}

// exp(high + low), |low| <= ulp(high).
template <class Real>
PYGEN_SHARED Real exp_of_sum(Real high, Real low) {
  constexpr double kShift = 0x1p52 + 0x1p51;
  Real x = high > 800.0 ? constant<Real>(800.0) : high;
  x = x < -800.0 ? constant<Real>(-800.0) : x;
  const Real rest = x == high ? low : Real{};
  const Real n = (x * 1.44269504088896340736 + kShift) - kShift;  // to the nearest whole number
  const Real coarse = x - n * kLn2High, fine = rest - n * kLn2Low;
  const Real r = coarse + fine, error = (coarse - r) + fine;
  // 1 + r + r^2 q(r): Taylor's terms to r^13 / 13!, |r| < 0.347.
  const Real r2 = r * r, r4 = r2 * r2, r8 = r4 * r4;
  const Real q0 = (0.5 + r * (1.0 / 6)) + r2 * (1.0 / 24 + r * (1.0 / 120));
  const Real q1 = (1.0 / 720 + r * (1.0 / 5040)) + r2 * (1.0 / 40320 + r * (1.0 / 362880));
  const Real q2 = (1.0 / 3628800 + r * (1.0 / 39916800)) + r2 * (1.0 / 479001600 + r * (1.0 / 6227020800));
  const Real q = (q0 + r4 * q1) + r8 * q2;
  const Real y = 1.0 + (r + (r2 * q + (error + error * r)));
  return high == high ? scale_by_power(y, n) : high;
}

template <class Real>
PYGEN_SHARED Real portable_exp(Real x) {
  return exp_of_sum(x, Real{});
}

// To the nearest whole number below; exact. Adding 2^52 rounds to a whole number, ties to even.
template <class Real>
PYGEN_SHARED Real portable_floor(Real x) {
  const Real size = magnitude(x), rounded = (size + 0x1p52) - 0x1p52;
  const Real whole = as_real(as_word(rounded) | (as_word(x) & 0x8000000000000000ull));
  const Real down = whole > x ? whole - 1.0 : whole;
  return size < 0x1p52 ? down : x;
}

template <class Real>
PYGEN_SHARED Real portable_ceil(Real x) {
  return -portable_floor(-x);
}

// a b as an unevaluated sum (Dekker 1971), for there is no fused multiply-add to count on.
template <class Real>
struct Pair {
  Real high, low;
};

template <class Real>
PYGEN_SHARED Pair<Real> product(Real a, Real b) {
  constexpr double kSplit = 0x1p27 + 1.0;
  const Real a_big = a * kSplit, b_big = b * kSplit;
  const Real a1 = a_big - (a_big - a), a2 = a - a1, b1 = b_big - (b_big - b), b2 = b - b1;
  const Real p = a * b;
  return {p, ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2};
}

// log(x) to about 2^-64, for normal x > 0.
template <class Real>
PYGEN_SHARED Pair<Real> log_in_two(Real x) {
  const Parts<Real> p = parts(x);
  const Real f = p.fraction, d = f + 2.0, d_low = f - (d - 2.0);
  const Real s = f / d;
  const Pair<Real> back = product(s, d);
  const Real s_low = (((f - back.high) - back.low) - s * d_low) / d;
  // log(1 + f) = 2 s + s tail; then the exponent's share, the largest term first.
  const Real small = 2.0 * s_low + s * log_tail(s * s);
  const Real big = p.exponent * kLn2High, twice = 2.0 * s;
  const auto larger = magnitude(big) >= magnitude(twice);
  const Real first = larger ? big : twice, second = larger ? twice : big;
  const Real sum = first + second, sum_low = second - (sum - first);
  const Real low = sum_low + (small + p.exponent * kLn2Low);
  const Real high = sum + low;
  return {high, low - (high - sum)};
}

// x^y as IEEE 754's pow, but for the sign of a zero base, which does not count.
template <class Real>
PYGEN_SHARED Real portable_pow(Real x, Real y) {
  const Real size = magnitude(x);
  const auto tiny = size < 0x1p-1022;
  const Real base = tiny ? size * 0x1p54 : size;
  Pair<Real> log = log_in_two(base);
  log.low = tiny ? log.low - 54 * kLn2Low : log.low;
  const Real shifted = log.high - 54 * kLn2High;
  log.high = tiny ? shifted : log.high;
  // Beyond these the result is 0, 1 or infinity; within, nothing overflows in the exact product.
  Real exponent = y > 0x1p100 ? constant<Real>(0x1p100) : y;
  exponent = exponent < -0x1p100 ? constant<Real>(-0x1p100) : exponent;
  const Pair<Real> power = product(exponent, log.high);
  Real result = exp_of_sum(power.high, power.low + exponent * log.low);
  const auto whole = portable_floor(y) == y;
  const Real half = y * 0.5;
  const auto odd = whole & (portable_floor(half) != half);
  const Real invalid = constant<Real>(kInfinity) - kInfinity;
  const Real negative = whole ? (odd ? -result : result) : invalid;
  result = x < 0.0 ? negative : result;
  const auto grows = y > 0.0;
  result = size == 0.0 ? (grows ? Real{} : constant<Real>(kInfinity)) : result;
  const Real at_infinity = grows ? constant<Real>(kInfinity) : Real{};
  result = size == kInfinity ? ((x < 0.0) & odd ? -at_infinity : at_infinity) : result;
  result = x == x ? result : x;
  result = y == y ? result : y;
  const Real one = constant<Real>(1.0);
  return (x == 1.0) | (y == 0.0) ? one : result;
}

PYGEN_END_LEVEL
