// Chunks of rational-quadratic splines at one instruction-set level. csrc/rational_quadratic_spline.cpp describes the
// tensors and calls these.
#pragma once

#include <cstdint>

#include "tables.h"

namespace pygen {

enum class SplineTails { kLinear, kCircular, kNone };
constexpr int kSplineTails = 3;

constexpr int kMaxSplineDims = 8;

// The elements [...] of x, or of a parameter [..., K], as few dimensions as the strides allow, innermost last; strides in
// elements, that of the last dimension of a parameter apart.
struct SplineOperand {
  const void* data;  // null: zeros
  int dims;
  int64_t size[kMaxSplineDims], stride[kMaxSplineDims];
  int64_t bin_stride;
};

struct SplineTask {
  SplineOperand x, widths, heights, derivatives, grad_y, grad_log_det;
  void *y, *log_det;                                             // forward; contiguous, as all results
  void *grad_x, *grad_widths, *grad_heights, *grad_derivatives;  // backward
  int64_t elements, bins, derivative_count;
  SplineTails tails;
  bool inverse;
  double tail_bound, min_bin_width, min_bin_height, min_derivative;
};

// Elements are computed so many at a time, whatever the number of threads.
constexpr int64_t kSplineChunk = 64;

// Values of scratch, of the computing type, that a thread needs: the exponentials of both axes.
constexpr int64_t spline_scratch(int64_t bins) { return 2 * bins * kSplineChunk; }

// Compute the chunks begin, ..., end - 1; scratch is aligned to 64 bytes.
using SplineKernel = void (*)(const SplineTask&, int64_t begin, int64_t end, void* scratch);

struct SplineKernels {
  SplineKernel forward[kFloatTypes];
  SplineKernel backward[kFloatTypes];
};

PYGEN_DECLARE_KERNELS(SplineKernels, spline_kernels)

}  // namespace pygen
