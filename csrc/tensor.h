// What csrc/<op>.cpp needs of a tensor, over torch's stable ABI. Nothing here goes through the dispatcher: measured on a
// 4 x 4 tensor, stable::empty_like costs 2 us more than the direct call below.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cpu/tables.h"

// STD_TORCH_CHECK without the source's path in the sentence: the user reads what was expected and what came.
#define PYGEN_CHECK(condition, ...)                                                                                 \
  do {                                                                                                              \
    if (!(condition)) throw std::runtime_error(::torch::headeronly::detail::stdTorchCheckMsgImpl("", __VA_ARGS__)); \
  } while (false)

namespace pygen {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Below this many elements of work a second thread costs more than it brings.
constexpr int64_t kElementsPerTask = 8192;

// torch's own limit on the number of dimensions.
constexpr int kMaxDims = 64;

// torch's parallel_for, without the way to it where one thread does all the work.
template <typename F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  if (count <= grain) {
    if (count > 0) f(int64_t{0}, count);
  } else {
    torch::stable::parallel_for(0, count, grain, f);
  }
}

// A contiguous CPU tensor, uninitialised.
Tensor empty_contiguous(const int64_t* sizes, int64_t dim, ScalarType dtype);

inline Tensor empty_contiguous_like(const Tensor& x) {
  return empty_contiguous(x.sizes().data(), x.dim(), x.scalar_type());
}

// The tensor itself where it is contiguous: even then the operator costs a way through the dispatcher.
inline Tensor made_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// "(2, 3)"
std::string shape_string(const Tensor& x);

// "torch.float32"
std::string dtype_string(ScalarType dtype);

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

// Of one element of the types that results have.
inline int64_t bytes_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    default:
      return 2;
  }
}

// The place of a floating type in a table of kernels.
inline int type_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return static_cast<int>(FloatType::kFloat32);
    case ScalarType::Double:
      return static_cast<int>(FloatType::kFloat64);
    case ScalarType::BFloat16:
      return static_cast<int>(FloatType::kBFloat16);
    default:
      return static_cast<int>(FloatType::kFloat16);
  }
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto left = a.sizes(), right = b.sizes();
  return left.size() == right.size() && std::equal(left.begin(), left.end(), right.begin());
}

// float32 for the 16-bit types, the type itself otherwise; as in pygen/reference/_dtypes.py.
inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace pygen
