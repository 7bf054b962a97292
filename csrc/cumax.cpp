// cumax on the CPU: checks, allocation, threads. The arithmetic is csrc/cpu/cumax.cpp.
#include "cpu/cumax.h"

#include <algorithm>
#include <stdexcept>

#include "capability.h"
#include "rows.h"
#include "scratch.h"
#include "small.h"
#include "tensor.h"

namespace pygen {
namespace {

int64_t checked_dim(const Tensor& x, int64_t dim) {
  const int64_t rank = std::max<int64_t>(x.dim(), 1);
  if (dim < -rank || dim >= rank)
    throw std::out_of_range("cumax: dim must be in [" + std::to_string(-rank) + ", " + std::to_string(rank - 1) +
                            "] for x of shape " + shape_string(x) + ", got " + std::to_string(dim));
  return dim < 0 ? dim + rank : dim;
}

using RowKernel = void (*)(const CumaxTile&);

bool is_16_bit(const Tensor& x) {
  return x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half;
}

Tensor over_rows(RowKernel kernel, const Tensor* grad, const Tensor& x, int64_t dim, bool complement) {
  Tensor out = empty_contiguous_like(x);
  const int64_t elements = x.numel();
  if (elements == 0) return out;
  const int64_t length = x.dim() == 0 ? 1 : x.size(dim);
  const int64_t rows = elements / length;
  const RowOffsets x_rows(x, dim), out_rows(out, dim), grad_rows(grad ? *grad : x, dim);
  const void* x_data = x.const_data_ptr();
  const void* grad_data = grad ? grad->const_data_ptr() : nullptr;
  void* out_data = out.mutable_data_ptr();
  const bool side_by_side = x_rows.stride() != 1 || out_rows.stride() != 1 || grad_rows.stride() != 1;
  const int64_t tile_rows = side_by_side ? std::min(kCumaxTileRows, rows) : 1;
  const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / (tile_rows * length));
  const bool needs_scratch = grad || side_by_side || is_16_bit(x);
  parallel_for(tiles, grain, [&](int64_t begin, int64_t end) {
    const Scratch scratch(needs_scratch ? cumax_scratch_bytes(tile_rows, length) : 0);
    int64_t x_offsets[kCumaxTileRows], grad_offsets[kCumaxTileRows], out_offsets[kCumaxTileRows];
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * tile_rows, count = std::min(tile_rows, rows - first);
      x_rows.write(first, count, x_offsets);
      if (grad) grad_rows.write(first, count, grad_offsets);
      out_rows.write(first, count, out_offsets);
      kernel({{x_data, x_offsets, x_rows.stride()},
              {grad_data, grad_offsets, grad_rows.stride()},
              {out_data, out_offsets, out_rows.stride()},
              count,
              length,
              complement,
              scratch.data()});
    }
  });
  return out;
}

int checked_type(const Tensor& x) {
  PYGEN_CHECK(is_floating(x.scalar_type()),
              "cumax: x must be floating point (float64, float32, bfloat16, float16), got ",
              dtype_string(x.scalar_type()));
  return type_of(x.scalar_type());
}

Tensor cumax(const Tensor& x, int64_t dim, bool complement) {
  const int type = checked_type(x);
  return over_rows(PYGEN_KERNELS(cumax_kernels).forward[type], nullptr, x, checked_dim(x, dim), complement);
}

Tensor cumax_backward(const Tensor& grad, const Tensor& x, int64_t dim, bool complement) {
  const int type = checked_type(x);
  PYGEN_CHECK(same_shape(grad, x), "cumax: the incoming gradient must have x's shape ", shape_string(x), ", got ",
              shape_string(grad));
  PYGEN_CHECK(grad.scalar_type() == x.scalar_type(), "cumax: the incoming gradient must have x's dtype ",
              dtype_string(x.scalar_type()), ", got ", dtype_string(grad.scalar_type()));
  return over_rows(PYGEN_KERNELS(cumax_kernels).backward[type], &grad, x, checked_dim(x, dim), complement);
}

}  // namespace

PyObject* cumax_small(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return on_small_road([&]() -> std::optional<Tensor> {
    if (count != 3) return {};
    const auto dim = plain_int(args[1]);
    const auto complement = plain_bool(args[2]);
    const auto x = small_plain_tensor(args[0]);
    if (!x || !dim || !complement) return {};
    return cumax(*x, *dim, *complement);
  });
}

}  // namespace pygen

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, m) {
  m.impl("cumax", TORCH_BOX(&pygen::cumax));
  m.impl("cumax_backward", TORCH_BOX(&pygen::cumax_backward));
}
