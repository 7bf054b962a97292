// A matrix over the channels of every pixel, at one instruction-set level, and the small matrices it is made of.
// csrc/actnorm_conv1x1.cpp describes the tensors and calls these.
#pragma once

#include <cstdint>

#include "tables.h"

namespace pygen {

// z[b] = weight x[b] + offset for samples x[b]: (channels, pixels); all contiguous, all of one type.
struct MixTask {
  const void *x, *weight, *offset;
  void* z;
  int64_t channels, pixels;
};

// Backward of a mix: grad_x[b] = weight^T g[b], and for each block of samples, in float64,
// grad_weight = sum g[b] x[b]^T and grad_offset = sum of g[b] over pixels.
struct MixBackwardTask {
  const void *grad_z, *x;
  const void* transposed;  // weight^T
  void* grad_x;
  double *grad_weight, *grad_offset;  // [blocks, channels, channels], [blocks, channels]
  int64_t samples, samples_per_block, channels, pixels;
};

// W = P L U, A = W diag(scale), c = A bias: float64, row-major, n x n. L is `lower` below the diagonal and 1 on it, U is
// `upper` above it and `diagonal` on it; row i of P has its one in column order[i].
struct FoldTask {
  int64_t n;
  const double *lower, *upper, *diagonal, *scale, *bias;
  const int64_t* order;
  double* product;  // L U
  double *weight, *offset;
  // Backward: of A and c, in; of everything else, out. `weight` and `product` are the forward's.
  double* grad_weight;
  const double* grad_offset;
  double *grad_lower, *grad_upper, *grad_diagonal, *grad_scale, *grad_bias;
  double* scratch;  // n x n
};

constexpr int kMixTypes = 2;  // of FloatType the first: 16-bit tensors are widened by the caller

struct MixKernels {
  void (*forward[kMixTypes])(const MixTask&, int64_t begin, int64_t end);           // samples
  void (*backward[kMixTypes])(const MixBackwardTask&, int64_t begin, int64_t end);  // blocks
  void (*fold)(const FoldTask&);
  void (*fold_inverse)(const FoldTask&);  // weight = A^-1, offset = -bias
  void (*fold_backward)(const FoldTask&);
};

PYGEN_DECLARE_KERNELS(MixKernels, mix_kernels)

}  // namespace pygen
