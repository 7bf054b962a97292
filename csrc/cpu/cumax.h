// The rows of cumax at one instruction-set level. csrc/cumax.cpp cuts a tensor into tiles of rows and calls these.
#pragma once

#include <cstdint>

#include "tables.h"

namespace pygen {

// Rows of one tensor: row r begins at data + offsets[r] and has its elements `stride` apart (in elements).
struct CumaxRows {
  const void* data;
  const int64_t* offsets;
  int64_t stride;
};

// The rows that one call computes. grad is for the backward; out is y or the gradient of x.
struct CumaxTile {
  CumaxRows x, grad, out;
  int64_t rows, length;
  bool complement;
  void* scratch;  // CumaxKernels::scratch_bytes(rows, length) bytes, 64-byte aligned
};

struct CumaxKernels {
  void (*forward[kFloatTypes])(const CumaxTile&);
  void (*backward[kFloatTypes])(const CumaxTile&);
};

// Rows of a strided dimension are gathered together, as many as share a cache line of floats.
constexpr int64_t kCumaxTileRows = 16;

// Enough for either direction: three gathered rows in float64 a row, and the sums of one row.
constexpr int64_t cumax_scratch_bytes(int64_t rows, int64_t length) { return (3 * rows + 1) * (length + 8) * 8; }

PYGEN_DECLARE_KERNELS(CumaxKernels, cumax_kernels)

}  // namespace pygen
