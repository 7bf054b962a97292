// A tensor seen as rows along one dimension, whatever its strides.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace pygen {

// Where the rows of `x` along `dim` begin, in elements from its data pointer; rows are counted in the order of the other
// dimensions, last fastest.
class RowOffsets {
 public:
  RowOffsets(const torch::stable::Tensor& x, int64_t dim) {
    const auto sizes = x.sizes(), strides = x.strides();
    for (int64_t i = 0; i < static_cast<int64_t>(sizes.size()); ++i) {
      if (i == dim) continue;
      sizes_.push_back(sizes[i]);
      strides_.push_back(strides[i]);
    }
    stride_ = sizes.size() == 0 ? 1 : strides[dim];
    // A row of one element has no meaningful stride; 1 lets it take the contiguous road.
    if (sizes.size() == 0 || sizes[dim] == 1) stride_ = 1;
  }

  int64_t stride() const { return stride_; }

  // Offsets of rows first, first + 1, ..., first + count - 1.
  void write(int64_t first, int64_t count, int64_t* offsets) const {
    for (int64_t r = 0; r < count; ++r) {
      int64_t rest = first + r, offset = 0;
      for (size_t i = sizes_.size(); i-- > 0;) {
        offset += rest % sizes_[i] * strides_[i];
        rest /= sizes_[i];
      }
      offsets[r] = offset;
    }
  }

 private:
  std::vector<int64_t> sizes_, strides_;
  int64_t stride_;
};

}  // namespace pygen
