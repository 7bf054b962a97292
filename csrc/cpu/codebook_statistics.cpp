// Sums of the rows that chose one code. Called by csrc/codebook_statistics.cpp.
#include "codebook_statistics.h"

#include "vec.h"

PYGEN_BEGIN_LEVEL

namespace {

// Rows lie anywhere in memory: the next ones are asked for while this one is added.
constexpr int64_t kAhead = 4;

template <typename T>
void add_rows(const void* data, int64_t dim, const int64_t* row, int64_t count, double* sum) {
  const T* x = static_cast<const T*>(data);
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count) __builtin_prefetch(x + row[i + kAhead] * dim);
    const T* values = x + row[i] * dim;
    for (int64_t d = 0; d < dim; ++d) sum[d] += widen(values[d]);
  }
}

}  // namespace

extern const CodebookStatisticsKernels codebook_statistics_kernels = {
    {add_rows<float>, add_rows<double>, add_rows<bf16>, add_rows<f16>}};

PYGEN_END_LEVEL
