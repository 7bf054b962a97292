// One pass of Gillespie's direct method (Gillespie 1977): the propensities and their partial sums, the time to the next
// reaction, the choice of the reaction. Shared by the lanes of a CPU and the threads of a GPU.
#pragma once

#include "philox.h"
#include "ssa_program.h"

PYGEN_BEGIN_LEVEL

// a_j, in the order of operations that defines its bits: ((rate * factor) * factor) ...
template <class Real>
PYGEN_SHARED Real propensity(const Network& net, int32_t j, const double* values, int64_t stride) {
  Real a = load_real<Real>(values + net.rate_slot[j] * stride);
  for (int32_t f = net.factor_start[j]; f < net.factor_start[j + 1]; ++f) {
    const Real count = load_real<Real>(values + net.factor_slot[f] * stride);
    a = a * (count - static_cast<double>(net.factor_offset[f]));
  }
  return a;
}

// t - log(u) / a0: the time of the next reaction; never, where nothing can happen.
template <class Real>
PYGEN_SHARED Real next_time(Real time, Real total, Real u) {
  return total > 0.0 ? time - log_of_normal(u) / total : constant<Real>(kInfinity);
}

// The partial sums p_0 .. p_{R-1} into partial + j * stride; returns a0 = p_{R-1}, NaN if a law is not >= 0 or a0 is not
// finite.
PYGEN_SHARED double scan_propensities(const Network& net, const double* values, int64_t stride, double* partial) {
  double sum = 0.0;
  bool valid = true;
  for (int32_t j = 0; j < net.reactions; ++j) {
    const double a = propensity<double>(net, j, values, stride);
    valid = valid & (a >= 0.0);
    sum = sum + a;
    partial[j * stride] = sum;
  }
  return valid & (sum < kInfinity) ? sum : kInfinity - kInfinity;
}

// The reaction that the scan found none for: rounding can make u2 * a0 = a0 when a0 is subnormal. The last that adds.
PYGEN_SHARED int32_t last_possible(const Network& net, const double* partial, int64_t stride) {
  int32_t j = net.reactions - 1;
  while (j > 0 && !(partial[j * stride] > partial[(j - 1) * stride])) --j;
  return j;
}

// The first j with p_j > target.
PYGEN_SHARED int32_t choose(const Network& net, double target, const double* partial, int64_t stride) {
  for (int32_t j = 0; j < net.reactions; ++j)
    if (partial[j * stride] > target) return j;
  return last_possible(net, partial, stride);
}

PYGEN_SHARED void apply_reaction(const Network& net, int32_t j, double* values, int64_t stride) {
  for (int32_t c = net.change_start[j]; c < net.change_start[j + 1]; ++c)
    values[net.change_slot[c] * stride] += static_cast<double>(net.change_delta[c]);
}

PYGEN_END_LEVEL
