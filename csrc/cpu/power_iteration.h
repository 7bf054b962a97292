// Products of a matrix with vectors from both sides, for power iteration, and what a spectrally normalised weight and its
// gradient need besides, on raw pointers. csrc/power_iteration.cpp deals the work out.
#pragma once

#include <cstdint>

#include "tables.h"

namespace pygen {

// A matrix W is `lines` contiguous lines of `elements`, of any of the four types. Vectors that meet it (p along the
// lines, q along the elements, sums) are in the type that it computes in: float, or double for double.
struct PowerIterationKernels {
  // p[i] = W_i . q, and, where t is not null, t += p[i] W_i: each line is read from memory once.
  void (*lines[kFloatTypes])(const void* w, int64_t lines, int64_t elements, const void* q, void* p, void* t);
  // t += p[i] W_i.
  void (*transposed[kFloatTypes])(const void* w, int64_t lines, int64_t elements, const void* p, void* t);
  // out[i] = x[i] * factor.
  void (*scale[kFloatTypes])(const void* x, int64_t n, double factor, void* out);
  // sum_i a[i] b[i]
  double (*inner[kFloatTypes])(const void* a, const void* b, int64_t n);
  // out[i] = grad[i] * factor + along * q[i]; without the first term where grad is null.
  void (*combine[kFloatTypes])(const void* grad, int64_t n, double factor, double along, const void* q, void* out);

  // Vectors between two products are float64.
  void (*widen[kFloatTypes])(const void* x, int64_t n, double* out);
  void (*narrow[kFloatTypes])(const double* x, int64_t n, void* out);
  // out[j] = sum_c parts[c, j] of floats (0) or doubles (1), c < count, in order.
  void (*sum_parts[2])(const void* parts, int64_t count, int64_t n, double* out);
  // |x|, also where squares would overflow or vanish.
  double (*norm)(const double* x, int64_t n);
  double (*dot)(const double* x, const double* y, int64_t n);
  void (*multiply)(double* x, int64_t n, double factor);
};

PYGEN_DECLARE_KERNELS(PowerIterationKernels, power_iteration_kernels)

}  // namespace pygen
