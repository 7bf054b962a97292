// Blocks of affine coupling at one instruction-set level. csrc/affine_coupling.cpp describes the tensors and calls these.
#pragma once

#include <cstdint>

#include "tables.h"

namespace pygen {

enum class ScaleMap { kExp, kTanh, kSigmoid, kNflows, kSoftplus, kAtan };
constexpr int kScaleMaps = 6;

// The published maps' constants; pygen/reference/affine_coupling.py has them under the same names.
constexpr double kSigmoidOffset = 2.0;
constexpr double kNflowsFloor = 1e-3;
constexpr double kNflowsSoftplusCeiling = 3.0;
constexpr double kFreiaAtanGain = 0.636;

constexpr int kMaxOperandDims = 8;

// One sample of a (B, ...) tensor as few dimensions as its strides allow, innermost last; strides in elements.
struct CouplingOperand {
  const void* data;  // null: zeros
  int64_t sample_stride;
  int dims;
  int64_t size[kMaxOperandDims], stride[kMaxOperandDims];
};

// Where one sample's elements are written: rows of `row` elements that lie one behind the other; strides in elements.
struct CouplingResult {
  void* data;  // null: not wanted
  int64_t sample_stride, row, row_stride;
};

struct CouplingTask {
  CouplingOperand x, scale, shift, grad_y;
  const void* grad_log_det;  // one value of the computing type a sample, or null: zeros
  int64_t grad_log_det_stride;
  CouplingResult y;                       // forward: y; backward: the gradient of x
  CouplingResult grad_scale, grad_shift;  // backward
  double* log_det;                        // forward: [samples, parts] partial sums
  // Of a coupling by halves: what is copied besides, of the same samples; without data, zeros are written.
  CouplingOperand passive;
  CouplingResult passive_copy;
  int64_t passive_size;  // 0: nothing is copied
  // Work is cut into blocks: one of the parts, of `part_size` elements, of one large sample, or several small samples
  // (parts = 1, and part_size at least sample_size).
  int64_t samples, sample_size, parts, part_size, samples_per_block;
  bool shift_first, inverse;
  double clamp;
};

// Compute the blocks begin, ..., end - 1.
using CouplingKernel = void (*)(const CouplingTask&, int64_t begin, int64_t end);

struct CouplingKernels {
  CouplingKernel forward[kFloatTypes][kScaleMaps];
  CouplingKernel backward[kFloatTypes][kScaleMaps];
};

PYGEN_DECLARE_KERNELS(CouplingKernels, coupling_kernels)

}  // namespace pygen
