// The exponentials of a row, for what normalises them: softmax and its sums.
#pragma once

#include "math.h"

PYGEN_BEGIN_LEVEL

template <typename T>
struct Limits;
// Elements this far below the maximum are 0 next to it, even as subnormals. Up to `direct`, x / ln 2 rounds to the right
// integer or its neighbour, which the reduction allows; a row beyond is shifted by its maximum first, without loss that
// could be seen: at that size the elements themselves are spaced wider than their differences' rounding.
template <>
struct Limits<float> {
  static constexpr float depth = 110.f, direct = 0x1p15f;
};
template <>
struct Limits<double> {
  static constexpr double depth = 760., direct = 0x1p40;
};

template <typename T>
PYGEN_INLINE T row_maximum(const T* x, int64_t n) {
  constexpr int lanes = VecOf<T>::lanes;
  const T lowest = T(-__builtin_inf());
  auto first = splat(lowest), second = first, third = first, fourth = first;
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    first = at_least(load(x + i), first);
    second = at_least(load(x + i + lanes), second);
    third = at_least(load(x + i + 2 * lanes), third);
    fourth = at_least(load(x + i + 3 * lanes), fourth);
  }
  for (; i < n; i += lanes) first = at_least(i + lanes <= n ? load(x + i) : load_some(x + i, n - i, lowest), first);
  return maximum_of_lanes(at_least(at_least(first, second), at_least(third, fourth)));
}

// e[i] = e^x[i] up to a factor that all elements share; returns their sum, NaN if softmax cannot normalise the row.
template <typename T>
PYGEN_INLINE double exponentials(const T* x, T* e, int64_t n) {
  constexpr int lanes = VecOf<T>::lanes;
  T maximum = row_maximum(x, n);
  if (!(__builtin_fabs(maximum) < T(__builtin_inf()))) return __builtin_nan("");
  if (__builtin_fabs(maximum) > Limits<T>::direct) {
    for (int64_t i = 0; i < n; ++i) e[i] = x[i] - maximum;
    x = e;
    maximum = 0;
  }
  const auto shift = reduce_by_ln2(splat(maximum)).n;
  const auto floor = splat(maximum - Limits<T>::depth);
  RunningSum<T> sum;
  int64_t i = 0;
  for (; i + kSideBySide * lanes <= n; i += kSideBySide * lanes) {
    typename VecOf<T>::vec v[kSideBySide];
#pragma GCC unroll 4
    for (int k = 0; k < kSideBySide; ++k) v[k] = exp_shifted(at_least(load(x + i + k * lanes), floor), shift);
#pragma GCC unroll 4
    for (int k = 0; k < kSideBySide; ++k) {
      store(e + i + k * lanes, v[k]);
      sum.add(v[k]);
    }
  }
  for (; i + lanes <= n; i += lanes) {
    const auto v = exp_shifted(at_least(load(x + i), floor), shift);
    store(e + i, v);
    sum.add(v);
  }
  if (i < n) {
    const auto v = exp_shifted(at_least(load_some(x + i, n - i, T(-__builtin_inf())), floor), shift);
    store_some(e + i, v, n - i);
    sum.add(keep_some<T>(v, n - i));
  }
  return sum.total();
}

PYGEN_END_LEVEL
