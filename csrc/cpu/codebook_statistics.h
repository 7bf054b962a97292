// Sums of the rows that chose one code, on raw pointers. csrc/codebook_statistics.cpp sorts the rows and deals them out.
#pragma once

#include <cstdint>

#include "tables.h"

namespace pygen {

struct CodebookStatisticsKernels {
  // sum[d] += x[row[i], d] for i < count, in that order, in float64; one function for each type of x.
  void (*add_rows[kFloatTypes])(const void* x, int64_t dim, const int64_t* row, int64_t count, double* sum);
};

PYGEN_DECLARE_KERNELS(CodebookStatisticsKernels, codebook_statistics_kernels)

}  // namespace pygen
