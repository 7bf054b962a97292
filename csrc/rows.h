// A tensor seen as rows along one dimension, whatever its strides.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace pygen {

// Where the rows of a tensor along `dim` begin, in elements from its data pointer; rows are counted in the order of the
// other dimensions, last fastest.
class RowOffsets {
 public:
  RowOffsets(const Tensor& x, int64_t dim) {
    const auto sizes = x.sizes(), strides = x.strides();
    const int64_t rank = static_cast<int64_t>(sizes.size());
    // A row of one element has no meaningful stride; 1 lets it take the contiguous road.
    stride_ = rank == 0 || sizes[dim] == 1 ? 1 : strides[dim];
    for (int64_t i = 0; i < rank; ++i) {
      if (i == dim || sizes[i] == 1) continue;
      if (dims_ > 0 && step_[dims_ - 1] == strides[i] * sizes[i]) {
        size_[dims_ - 1] *= sizes[i];
        step_[dims_ - 1] = strides[i];
      } else {
        size_[dims_] = sizes[i];
        step_[dims_] = strides[i];
        ++dims_;
      }
    }
  }

  int64_t stride() const { return stride_; }

  // Offsets of rows first, first + 1, ..., first + count - 1.
  void write(int64_t first, int64_t count, int64_t* offsets) const {
    for (int64_t r = 0; r < count; ++r) {
      int64_t rest = first + r, offset = 0;
      for (int i = dims_ - 1; i > 0; --i) {
        offset += rest % size_[i] * step_[i];
        rest /= size_[i];
      }
      offsets[r] = dims_ > 0 ? offset + rest * step_[0] : 0;
    }
  }

 private:
  int dims_ = 0;
  int64_t size_[kMaxDims], step_[kMaxDims];
  int64_t stride_;
};

}  // namespace pygen
