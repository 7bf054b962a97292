// codebook_statistics on the CPU: checks, allocation, the sorting of rows by code, threads. The sums are
// csrc/cpu/codebook_statistics.cpp.
#include "cpu/codebook_statistics.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "capability.h"
#include "tensor.h"

namespace pygen {
namespace {

// A code's rows are summed in segments of so many, so that threads can share a code that has most of them. Segments
// depend on the indices alone, and so do the bits of the sums.
constexpr int64_t kSegment = 1024;

struct Segment {
  int64_t code, begin, end;  // of the sorted rows
};

// Rows in the order of their codes, equal codes in the order of the rows.
class Sorted {
 public:
  Sorted(const int64_t* indices, const bool* mask, int64_t n, int64_t num_codes) : first_(num_codes + 1, 0) {
    const auto code_of = [&](int64_t i) { return mask && !mask[i] ? -1 : indices[i]; };
    for (int64_t i = 0; i < n; ++i) {
      const int64_t code = code_of(i);
      PYGEN_CHECK(code >= -1 && code < num_codes, "codebook_statistics: indices must be in [-1, ", num_codes - 1,
                  "], got ", code, " at row ", i);
      if (code >= 0) ++first_[code + 1];
    }
    for (int64_t k = 0; k < num_codes; ++k) first_[k + 1] += first_[k];
    rows_.resize(first_[num_codes]);
    std::vector<int64_t> next(first_.begin(), first_.end() - 1);
    for (int64_t i = 0; i < n; ++i)
      if (const int64_t code = code_of(i); code >= 0) rows_[next[code]++] = i;
  }

  int64_t count(int64_t code) const { return first_[code + 1] - first_[code]; }
  const int64_t* rows(int64_t at) const { return rows_.data() + at; }
  int64_t first(int64_t code) const { return first_[code]; }

 private:
  std::vector<int64_t> first_, rows_;
};

struct Sums {
  const void* x;
  int64_t dim;
  int type;
  const Sorted& sorted;

  void add(int64_t begin, int64_t end, double* sum) const {
    PYGEN_KERNELS(codebook_statistics_kernels).add_rows[type](x, dim, sorted.rows(begin), end - begin, sum);
  }
};

template <typename Out>
void sum_codes(const Sums& sums, int64_t num_codes, Out* out) {
  const int64_t dim = sums.dim;
  const int64_t average = 1 + sums.sorted.first(num_codes) / std::max<int64_t>(1, num_codes);
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / (average * std::max<int64_t>(1, dim)));
  parallel_for(num_codes, grain, [&](int64_t begin, int64_t end) {
    std::vector<double> sum(dim);
    for (int64_t k = begin; k < end; ++k) {
      if (sums.sorted.count(k) > kSegment) continue;
      std::fill(sum.begin(), sum.end(), 0.0);
      sums.add(sums.sorted.first(k), sums.sorted.first(k + 1), sum.data());
      std::copy(sum.begin(), sum.end(), out + k * dim);
    }
  });
}

// The codes with more rows than a segment: first the segments, then, in order, their sums.
template <typename Out>
void sum_large_codes(const Sums& sums, int64_t num_codes, Out* out) {
  std::vector<Segment> segments;
  for (int64_t k = 0; k < num_codes; ++k) {
    if (sums.sorted.count(k) <= kSegment) continue;
    for (int64_t begin = sums.sorted.first(k); begin < sums.sorted.first(k + 1); begin += kSegment)
      segments.push_back({k, begin, std::min(begin + kSegment, sums.sorted.first(k + 1))});
  }
  const int64_t dim = sums.dim, count = static_cast<int64_t>(segments.size());
  std::vector<double> parts(count * dim, 0.0);
  parallel_for(count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) sums.add(segments[s].begin, segments[s].end, parts.data() + s * dim);
  });
  std::vector<double> sum(dim);
  for (int64_t s = 0; s < count; ++s) {
    if (s == 0 || segments[s].code != segments[s - 1].code) std::fill(sum.begin(), sum.end(), 0.0);
    for (int64_t d = 0; d < dim; ++d) sum[d] += parts[s * dim + d];
    std::copy(sum.begin(), sum.end(), out + segments[s].code * dim);
  }
}

template <typename Out>
void all_sums(const Sums& sums, int64_t num_codes, void* out) {
  sum_codes(sums, num_codes, static_cast<Out*>(out));
  sum_large_codes(sums, num_codes, static_cast<Out*>(out));
}

void check(const Tensor& x, const Tensor& indices, int64_t num_codes, const std::optional<Tensor>& mask) {
  PYGEN_CHECK(is_floating(x.scalar_type()),
              "codebook_statistics: x must be floating point (float64, float32, bfloat16, float16), got ",
              dtype_string(x.scalar_type()));
  PYGEN_CHECK(indices.scalar_type() == ScalarType::Long, "codebook_statistics: indices must be torch.int64, got ",
              dtype_string(indices.scalar_type()));
  PYGEN_CHECK(x.dim() == 2 && indices.dim() == 1 && x.size(0) == indices.size(0),
              "codebook_statistics: x must be (N, D) and indices (N,), got ", shape_string(x), " and ",
              shape_string(indices));
  PYGEN_CHECK(num_codes >= 0, "codebook_statistics: num_codes must not be negative, got ", num_codes);
  if (!mask) return;
  PYGEN_CHECK(mask->scalar_type() == ScalarType::Bool, "codebook_statistics: mask must be torch.bool, got ",
              dtype_string(mask->scalar_type()));
  PYGEN_CHECK(same_shape(*mask, indices), "codebook_statistics: mask must have the shape of indices ",
              shape_string(indices), ", got ", shape_string(*mask));
}

std::tuple<Tensor, Tensor> codebook_statistics(const Tensor& x, const Tensor& indices, int64_t num_codes,
                                               const std::optional<Tensor>& mask) {
  check(x, indices, num_codes, mask);
  const Tensor rows = made_contiguous(x), chosen = made_contiguous(indices);
  const std::optional<Tensor> kept = mask ? std::optional<Tensor>(made_contiguous(*mask)) : std::nullopt;
  const Sorted sorted(static_cast<const int64_t*>(chosen.const_data_ptr()),
                      kept ? static_cast<const bool*>(kept->const_data_ptr()) : nullptr, x.size(0), num_codes);
  const int64_t counts_shape[] = {num_codes}, sums_shape[] = {num_codes, x.size(1)};
  const Tensor counts = empty_contiguous(counts_shape, 1, ScalarType::Long);
  const Tensor sums = empty_contiguous(sums_shape, 2, compute_dtype(x.scalar_type()));
  for (int64_t k = 0; k < num_codes; ++k) static_cast<int64_t*>(counts.mutable_data_ptr())[k] = sorted.count(k);
  const Sums of_rows{rows.const_data_ptr(), x.size(1), type_of(x.scalar_type()), sorted};
  if (x.scalar_type() == ScalarType::Double) {
    all_sums<double>(of_rows, num_codes, sums.mutable_data_ptr());
  } else {
    all_sums<float>(of_rows, num_codes, sums.mutable_data_ptr());
  }
  return {sums, counts};
}

}  // namespace
}  // namespace pygen

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, m) { m.impl("codebook_statistics", TORCH_BOX(&pygen::codebook_statistics)); }
