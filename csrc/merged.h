// A tensor's dimensions, merged where one's stride continues the next one's: what kernels walk.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace pygen {

struct Merged {
  int dims = 0;
  int64_t size[kMaxDims], stride[kMaxDims];

  // Dimensions first, ..., last - 1 of `tensor`.
  Merged(const Tensor& tensor, int64_t first, int64_t last)
      : Merged(tensor.sizes().data() + first, tensor.strides().data() + first, last - first) {}

  // Dimensions of one element are dropped, and one of one element is left where nothing else is.
  Merged(const int64_t* sizes, const int64_t* strides, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      if (sizes[i] == 1) continue;
      if (dims > 0 && stride[dims - 1] == strides[i] * sizes[i]) {
        size[dims - 1] *= sizes[i];
        stride[dims - 1] = strides[i];
      } else {
        size[dims] = sizes[i];
        stride[dims] = strides[i];
        ++dims;
      }
    }
    if (dims == 0) size[0] = stride[0] = dims = 1;
  }
};

}  // namespace pygen
