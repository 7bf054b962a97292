// Products of a few rows with a large matrix that many steps share: the recurrent product of an RNN. The matrix is packed
// once, in panels of neighbouring columns; then every step reads it from front to back. csrc/on_lstm.cpp deals the work
// out.
#pragma once

#include <cstdint>

#include "tables.h"

namespace pygen {

// Where the elements of a (depth, columns) matrix lie: element (k, j) at data[k * row + j * column], and where mask is not
// null and set there, 0.
struct PackSource {
  const void* data;
  const bool* mask;
  int64_t row, column;
};

// out (rows, columns) = start + a (rows, depth) times the matrix; rows of each lie `*_stride` elements apart. Every element
// is summed over the depth in order, whatever the rows and panels of the call. start may be out.
struct ProductTask {
  const void* a;
  int64_t a_stride;
  const void* packed;
  const void* start;
  int64_t start_stride;
  void* out;
  int64_t out_stride;
  int64_t rows, depth, columns;
};

// [0] for float, [1] for double.
struct PackedProductKernels {
  int64_t panel_columns[2];
  // Panels first <= p < last of the packed matrix, each (depth, panel_columns); behind the last column, zeros.
  void (*pack[2])(const PackSource& source, int64_t depth, int64_t columns, int64_t first, int64_t last, void* packed);
  // The columns of panels first <= p < last.
  void (*multiply[2])(const ProductTask& task, int64_t first, int64_t last);
};

PYGEN_DECLARE_KERNELS(PackedProductKernels, packed_product_kernels)

}  // namespace pygen
