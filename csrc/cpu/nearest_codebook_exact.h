// The definition of the nearest code: sums in float64, in the order of pygen/reference/nearest_codebook.py on every
// device. This header's files are compiled without contraction: a product is rounded before it is added.
#pragma once

#include "nearest_codebook.h"
#include "vec.h"

PYGEN_BEGIN_LEVEL

// Sums run in eight interleaved lanes, which are then added in halves.
constexpr int kLanes = 8;
constexpr int kSumVectors = kLanes / VecOf<double>::lanes;

struct LaneSum {
  f64v part[kSumVectors] = {};

  PYGEN_INLINE_MEMBER double total() const {
#if PYGEN_VECTOR_BYTES == 64
    return sum_of_lanes(part[0]);
#elif PYGEN_VECTOR_BYTES == 32
    return sum_of_lanes(part[0] + part[1]);
#else
    return sum_of_lanes((part[0] + part[2]) + (part[1] + part[3]));
#endif
  }
};

// n is a multiple of kLanes: vectors are padded with zeros.
PYGEN_INLINE double exact_dot(const double* a, const double* b, int64_t dim) {
  LaneSum sum;
  for (int64_t i = 0; i < dim; i += kLanes)
    for (int v = 0; v < kSumVectors; ++v)
      sum.part[v] += load(a + i + v * VecOf<double>::lanes) * load(b + i + v * VecOf<double>::lanes);
  return sum.total();
}

PYGEN_INLINE double exact_squared_distance(const double* a, const double* b, int64_t dim) {
  LaneSum sum;
  for (int64_t i = 0; i < dim; i += kLanes) {
    for (int v = 0; v < kSumVectors; ++v) {
      const f64v difference = load(a + i + v * VecOf<double>::lanes) - load(b + i + v * VecOf<double>::lanes);
      sum.part[v] += difference * difference;
    }
  }
  return sum.total();
}

template <typename T>
PYGEN_INLINE void widen_elements(const T* v, int64_t dim, double* wide) {
  for (int64_t i = 0; i < dim; ++i) wide[i] = widen(v[i]);
}

// Vector `index` in float64, with zeros up to the next multiple of kLanes.
PYGEN_INLINE void widen_vector(const GivenVectors& given, int64_t index, double* wide) {
  const int64_t dim = given.dim, first = index * dim;
  switch (given.type) {
    case FloatType::kFloat32:
      widen_elements(static_cast<const float*>(given.data) + first, dim, wide);
      break;
    case FloatType::kFloat64:
      widen_elements(static_cast<const double*>(given.data) + first, dim, wide);
      break;
    case FloatType::kBFloat16:
      widen_elements(static_cast<const bf16*>(given.data) + first, dim, wide);
      break;
    default:
      widen_elements(static_cast<const f16*>(given.data) + first, dim, wide);
  }
  for (int64_t i = dim; i % kLanes; ++i) wide[i] = 0.0;
}

PYGEN_END_LEVEL
