// Poisson variates that are a function of (seed, stream, trajectory, pass, channel): for tau-leaping.
#pragma once

#include "../shared/math.h"
#include "../shared/philox.h"

PYGEN_BEGIN_LEVEL

// Philox's 128-bit counter is (pass, trajectory), 64 bits each. The exact methods use it so. Both are below 2^40 in
// tau-leaping (csrc/ssa.cpp checks the trajectory's; a pass takes some nanoseconds), and the upper 24 bits of the pass
// then hold 1 + attempt, those of the trajectory the channel: no number is used twice.
struct Draws {
  uint64_t pass, trajectory;
  uint32_t seed, stream;
};
constexpr int kCounterBits = 40;

PYGEN_INLINE Uniforms<double> uniforms_of(const Draws& draws, uint32_t channel, uint32_t attempt) {
  return uniforms<double>(draws.pass | (uint64_t{attempt} + 1) << kCounterBits,
                          draws.trajectory | uint64_t{channel} << kCounterBits, draws.seed, draws.stream);
}

// log(x!) - (x log x - x + log(2 pi x) / 2) for x >= 1: Stirling's series, and its values where that is too short.
PYGEN_INLINE double stirling_error(double x) {
  constexpr double kSmall[] = {0,
                               0.081061466795327258219670,
                               0.041340695955409294093822,
                               0.027677925684998339148789,
                               0.020790672103765093111523,
                               0.016644691189821192163195,
                               0.013876128823070747998745,
                               0.011896709945891770095056,
                               0.010411265261972096497478,
                               0.009255462182712732917729,
                               0.008330563433362871256469};
  if (x <= 10.0) return kSmall[static_cast<int>(x)];
  const double square = 1.0 / (x * x);
  return (1.0 / 12 - square * (1.0 / 360 - square * (1.0 / 1260 - square * (1.0 / 1680 - square * (1.0 / 1188))))) / x;
}

// x log(x / m) + m - x for x, m > 0, without cancellation where they are close (Loader 2000).
PYGEN_INLINE double deviance(double x, double m) {
  const double difference = x - m, sum = x + m;
  if (!(magnitude(difference) < 0.1 * sum)) return x * portable_log(x / m) + m - x;
  const double v = difference / sum, square = v * v;
  double total = difference * v, term = 2.0 * x * v;
  for (int j = 1; j < 100; ++j) {
    term = term * square;
    const double next = total + term / (2 * j + 1);
    if (next == total) break;
    total = next;
  }
  return total;
}

// log of the probability of k >= 0.
PYGEN_INLINE double poisson_log_probability(double k, double mean) {
  constexpr double kTwoPi = 6.283185307179586476925287;
  if (k == 0.0) return -mean;
  return -stirling_error(k) - deviance(k, mean) - 0.5 * portable_log(kTwoPi * k);
}

// Transformed rejection with squeeze, for means of 10 and more (Hoermann 1993).
static __attribute__((noinline, unused)) double poisson_by_rejection(double mean, const Draws& draws,
                                                                     uint32_t channel) {
  const double b = 0.931 + 2.53 * square_root(mean), a = -0.059 + 0.02483 * b;
  const double inverse_alpha = 1.1239 + 1.1328 / (b - 3.4), quick = 0.9277 - 3.6224 / (b - 2.0);
  for (uint32_t attempt = 0;; ++attempt) {
    const auto uniform = uniforms_of(draws, channel, attempt);
    const double u = uniform.time - 0.5, v = uniform.choice, tail = 0.5 - magnitude(u);
    if (tail == 0.0) continue;
    const double k = portable_floor((2.0 * a / tail + b) * u + mean + 0.43);
    if (tail >= 0.07 && v <= quick) return k;
    if (k < 0.0 || (tail < 0.013 && v > tail)) continue;
    if (portable_log(v * inverse_alpha / (a / (tail * tail) + b)) <= poisson_log_probability(k, mean)) return k;
  }
}

// By inversion: the first k whose distribution function reaches u.
PYGEN_INLINE double poisson_by_inversion(double mean, const Draws& draws, uint32_t channel) {
  constexpr double kFarTail = 200.0;  // beyond every u < 1 - 2^-53 for means below 10; ends the loop where sums round
  const double u = uniforms_of(draws, channel, 0).choice;
  double k = 0.0, probability = portable_exp(-mean), sum = probability;
  while (u >= sum && k < kFarTail) {
    k += 1.0;
    probability = probability * mean / k;
    sum = sum + probability;
  }
  return k;
}

// A Poisson number of the given mean, mean >= 0.
PYGEN_INLINE double poisson(double mean, const Draws& draws, uint32_t channel) {
  return mean < 10.0 ? poisson_by_inversion(mean, draws, channel) : poisson_by_rejection(mean, draws, channel);
}

PYGEN_END_LEVEL
