// Affine coupling on the CPU: checks, allocation, threads. The arithmetic is csrc/cpu/affine_coupling.cpp.
#include "cpu/affine_coupling.h"

#include <algorithm>
#include <memory>
#include <tuple>

#include "capability.h"
#include "merged.h"
#include "tensor.h"

namespace pygen {
namespace {

constexpr const char* kScaleMapNames[kScaleMaps] = {"exp", "tanh", "sigmoid", "nflows", "softplus", "atan"};

// A block of work, in elements, whatever the number of threads: a large sample's log-determinant is summed part by part
// and the parts' sums in their order, so the bits do not depend on who computed what.
constexpr int64_t kBlock = kElementsPerTask;

int scale_map_of(const std::string& name) {
  for (int i = 0; i < kScaleMaps; ++i)
    if (name == kScaleMapNames[i]) return i;
  PYGEN_CHECK(false, "affine_coupling: scale_map must be one of exp, tanh, sigmoid, nflows, softplus, atan, got \"",
              name, "\"");
  return -1;
}

int type_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return static_cast<int>(CouplingType::kFloat32);
    case ScalarType::Double:
      return static_cast<int>(CouplingType::kFloat64);
    case ScalarType::BFloat16:
      return static_cast<int>(CouplingType::kBFloat16);
    default:
      return static_cast<int>(CouplingType::kFloat16);
  }
}

void check_like(const char* name, const Tensor& tensor, const Tensor& x) {
  PYGEN_CHECK(same_shape(tensor, x), "affine_coupling: ", name, " must have x's shape ", shape_string(x), ", got ",
              shape_string(tensor));
  PYGEN_CHECK(tensor.scalar_type() == x.scalar_type(), "affine_coupling: ", name, " must have x's dtype ",
              dtype_string(x.scalar_type()), ", got ", dtype_string(tensor.scalar_type()));
}

void check(const Tensor& x, const Tensor& scale, const Tensor& shift) {
  PYGEN_CHECK(is_floating(x.scalar_type()),
              "affine_coupling: x must be floating point (float64, float32, bfloat16, float16), got ",
              dtype_string(x.scalar_type()));
  PYGEN_CHECK(x.dim() >= 1, "affine_coupling: x must have a batch dimension, (B, ...), got a tensor of shape ()");
  check_like("scale", scale, x);
  check_like("shift", shift, x);
}

// More than kMaxOperandDims irregular dimensions are made contiguous: `owner` then keeps the copy.
CouplingOperand operand_of(const Tensor& tensor, Tensor& owner) {
  owner = tensor;
  CouplingOperand operand{};
  const Merged merged(tensor, 1, tensor.dim());
  if (merged.dims > kMaxOperandDims) return operand_of(torch::stable::contiguous(tensor), owner);
  operand.data = tensor.const_data_ptr();
  operand.sample_stride = tensor.stride(0);
  operand.dims = merged.dims;
  std::copy(merged.size, merged.size + merged.dims, operand.size);
  std::copy(merged.stride, merged.stride + merged.dims, operand.stride);
  return operand;
}

// The operands of one call, with whatever copies keep them alive.
struct Operands {
  Tensor owners[4];
  CouplingTask task{};

  Operands(const Tensor& x, const Tensor& scale, const Tensor& shift, bool shift_first, double clamp, bool inverse)
      : owners{x, x, x, x} {
    task.x = operand_of(x, owners[0]);
    task.scale = operand_of(scale, owners[1]);
    task.shift = operand_of(shift, owners[2]);
    task.sample_size = x.size(0) == 0 ? 0 : x.numel() / x.size(0);
    task.samples = x.size(0);
    task.part_size = kBlock;
    task.parts = std::max<int64_t>(1, (task.sample_size + kBlock - 1) / kBlock);
    task.samples_per_block = std::max<int64_t>(1, kBlock / std::max<int64_t>(1, task.sample_size));
    task.shift_first = shift_first;
    task.inverse = inverse;
    task.clamp = clamp;
  }

  void run(CouplingKernel kernel) {
    if (task.sample_size == 0) return;
    const int64_t blocks = (task.samples * task.parts + task.samples_per_block - 1) / task.samples_per_block;
    parallel_for(blocks, /*grain=*/1, [&](int64_t begin, int64_t end) { kernel(task, begin, end); });
  }
};

template <typename T>
void add_parts(const double* partial, int64_t parts, int64_t samples, T* log_det) {
  for (int64_t b = 0; b < samples; ++b) {
    double sum = 0;
    for (int64_t i = 0; i < parts; ++i) sum += partial[b * parts + i];
    log_det[b] = static_cast<T>(sum);
  }
}

std::tuple<Tensor, Tensor> affine_coupling(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                           const std::string& scale_map, bool shift_first, double clamp, bool inverse) {
  check(x, scale, shift);
  const int map = scale_map_of(scale_map), type = type_of(x.scalar_type());
  const int64_t samples = x.size(0);
  Tensor y = empty_contiguous_like(x);
  Tensor log_det = empty_contiguous(&samples, 1, compute_dtype(x.scalar_type()));
  Operands operands(x, scale, shift, shift_first, clamp, inverse);
  const int64_t parts = operands.task.parts;
  const std::unique_ptr<double[]> partial(new double[samples * parts]());
  operands.task.y = y.mutable_data_ptr();
  operands.task.log_det = partial.get();
  operands.run(PYGEN_KERNELS(coupling_kernels).forward[type][map]);
  if (log_det.scalar_type() == ScalarType::Double) {
    add_parts(partial.get(), parts, samples, static_cast<double*>(log_det.mutable_data_ptr()));
  } else {
    add_parts(partial.get(), parts, samples, static_cast<float*>(log_det.mutable_data_ptr()));
  }
  return {y, log_det};
}

std::tuple<Tensor, Tensor> affine_coupling_backward(const std::optional<Tensor>& grad_y,
                                                    const std::optional<Tensor>& grad_log_det, const Tensor& x,
                                                    const Tensor& scale, const Tensor& shift,
                                                    const std::string& scale_map, bool shift_first, double clamp,
                                                    bool inverse) {
  check(x, scale, shift);
  const int map = scale_map_of(scale_map), type = type_of(x.scalar_type());
  Operands operands(x, scale, shift, shift_first, clamp, inverse);
  if (grad_y) {
    check_like("the incoming gradient of y", *grad_y, x);
    operands.task.grad_y = operand_of(*grad_y, operands.owners[3]);
  }
  if (grad_log_det) {
    PYGEN_CHECK(grad_log_det->dim() == 1 && grad_log_det->size(0) == x.size(0) &&
                    grad_log_det->scalar_type() == compute_dtype(x.scalar_type()),
                "affine_coupling: the incoming gradient of log_det must be (", x.size(0), ",) of ",
                dtype_string(compute_dtype(x.scalar_type())), ", got ", shape_string(*grad_log_det), " of ",
                dtype_string(grad_log_det->scalar_type()));
    operands.task.grad_log_det = grad_log_det->const_data_ptr();
    operands.task.grad_log_det_stride = grad_log_det->stride(0);
  }
  Tensor grad_x = empty_contiguous_like(x), grad_scale = empty_contiguous_like(x);
  operands.task.y = grad_x.mutable_data_ptr();
  operands.task.grad_scale = grad_scale.mutable_data_ptr();
  operands.run(PYGEN_KERNELS(coupling_kernels).backward[type][map]);
  return {grad_x, grad_scale};
}

}  // namespace
}  // namespace pygen

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, m) {
  m.impl("affine_coupling", TORCH_BOX(&pygen::affine_coupling));
  m.impl("affine_coupling_backward", TORCH_BOX(&pygen::affine_coupling_backward));
}
