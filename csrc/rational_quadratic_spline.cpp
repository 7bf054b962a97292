// Rational-quadratic spline on the CPU: checks, allocation, threads. The arithmetic is
// csrc/cpu/rational_quadratic_spline.cpp.
#include "cpu/rational_quadratic_spline.h"

#include <algorithm>
#include <memory>
#include <new>
#include <tuple>

#include "capability.h"
#include "merged.h"
#include "tensor.h"

namespace pygen {
namespace {

constexpr const char* kTailNames[kSplineTails] = {"linear", "circular", "none"};

// An element costs tens of cycles: 1,024 of them are worth a second thread.
constexpr int64_t kGrain = 16;
constexpr size_t kAlignment = 64;

SplineTails tails_of(const std::string& name) {
  for (int i = 0; i < kSplineTails; ++i)
    if (name == kTailNames[i]) return static_cast<SplineTails>(i);
  PYGEN_CHECK(false, "rational_quadratic_spline: tails must be one of linear, circular, none, got \"", name, "\"");
  return SplineTails::kNone;
}

// The leading dimensions of a tensor, the last `trailing` (0 or 1) apart. Too many irregular ones are made contiguous:
// `owner` then keeps the copy.
SplineOperand operand_of(const Tensor& tensor, int64_t trailing, Tensor& owner) {
  owner = tensor;
  const Merged merged(tensor, 0, tensor.dim() - trailing);
  if (merged.dims > kMaxSplineDims) return operand_of(torch::stable::contiguous(tensor), trailing, owner);
  SplineOperand operand{};
  operand.data = tensor.const_data_ptr();
  operand.dims = merged.dims;
  std::copy(merged.size, merged.size + merged.dims, operand.size);
  std::copy(merged.stride, merged.stride + merged.dims, operand.stride);
  operand.bin_stride = trailing ? tensor.stride(tensor.dim() - 1) : 0;
  return operand;
}

void check_parameter(const char* name, const Tensor& tensor, const Tensor& x, int64_t last) {
  const auto sizes = tensor.sizes(), leading = x.sizes();
  PYGEN_CHECK(tensor.dim() == x.dim() + 1 && std::equal(leading.begin(), leading.end(), sizes.begin()) &&
                  sizes[x.dim()] == last,
              "rational_quadratic_spline: ", name, " must be x's shape ", shape_string(x), " and ", last,
              " in a last dimension, got ", shape_string(tensor));
  PYGEN_CHECK(tensor.scalar_type() == x.scalar_type(), "rational_quadratic_spline: ", name, " must have x's dtype ",
              dtype_string(x.scalar_type()), ", got ", dtype_string(tensor.scalar_type()));
}

void check_gradient(const char* of, const Tensor& grad, const Tensor& x, ScalarType dtype) {
  PYGEN_CHECK(same_shape(grad, x) && grad.scalar_type() == dtype,
              "rational_quadratic_spline: the incoming gradient of ", of, " must be ", shape_string(x), " of ",
              dtype_string(dtype), ", got ", shape_string(grad), " of ", dtype_string(grad.scalar_type()));
}

struct Shapes {
  double tail_bound, min_bin_width, min_bin_height, min_derivative;
};

// The operands of one call, with whatever copies keep them alive.
struct Operands {
  Tensor owners[6];
  SplineTask task{};

  Operands(const Tensor& x, const Tensor& widths, const Tensor& heights, const Tensor& derivatives, bool inverse,
           const std::string& tails, const Shapes& shapes)
      : owners{x, x, x, x, x, x} {
    PYGEN_CHECK(is_floating(x.scalar_type()),
                "rational_quadratic_spline: x must be floating point (float64, float32, bfloat16, float16), got ",
                dtype_string(x.scalar_type()));
    PYGEN_CHECK(widths.dim() > 0 && widths.size(widths.dim() - 1) > 0,
                "rational_quadratic_spline: widths must have their bins in the last dimension, got ",
                shape_string(widths));
    task.bins = widths.size(widths.dim() - 1);
    task.tails = tails_of(tails);
    task.derivative_count = task.bins - 1 + static_cast<int64_t>(task.tails);
    check_parameter("widths", widths, x, task.bins);
    check_parameter("heights", heights, x, task.bins);
    check_parameter("derivatives", derivatives, x, task.derivative_count);
    task.x = operand_of(x, 0, owners[0]);
    task.widths = operand_of(widths, 1, owners[1]);
    task.heights = operand_of(heights, 1, owners[2]);
    task.derivatives = operand_of(derivatives, 1, owners[3]);
    task.elements = x.numel();
    task.inverse = inverse;
    task.tail_bound = shapes.tail_bound;
    task.min_bin_width = shapes.min_bin_width;
    task.min_bin_height = shapes.min_bin_height;
    task.min_derivative = shapes.min_derivative;
  }

  void run(SplineKernel kernel) {
    const int64_t chunks = (task.elements + kSplineChunk - 1) / kSplineChunk;
    const size_t bytes = spline_scratch(task.bins) * sizeof(double);
    parallel_for(chunks, kGrain, [&](int64_t begin, int64_t end) {
      const auto release = [](void* p) { ::operator delete(p, std::align_val_t(kAlignment)); };
      const std::unique_ptr<void, decltype(release)> scratch(::operator new(bytes, std::align_val_t(kAlignment)),
                                                             release);
      kernel(task, begin, end, scratch.get());
    });
  }
};

std::tuple<Tensor, Tensor> rational_quadratic_spline(const Tensor& x, const Tensor& widths, const Tensor& heights,
                                                     const Tensor& derivatives, bool inverse, const std::string& tails,
                                                     double tail_bound, double min_bin_width, double min_bin_height,
                                                     double min_derivative) {
  Operands operands(x, widths, heights, derivatives, inverse, tails,
                    {tail_bound, min_bin_width, min_bin_height, min_derivative});
  Tensor y = empty_contiguous_like(x);
  Tensor log_det = empty_contiguous(x.sizes().data(), x.dim(), compute_dtype(x.scalar_type()));
  operands.task.y = y.mutable_data_ptr();
  operands.task.log_det = log_det.mutable_data_ptr();
  operands.run(PYGEN_KERNELS(spline_kernels).forward[type_of(x.scalar_type())]);
  return {y, log_det};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rational_quadratic_spline_backward(
    const std::optional<Tensor>& grad_y, const std::optional<Tensor>& grad_log_det, const Tensor& x,
    const Tensor& widths, const Tensor& heights, const Tensor& derivatives, bool inverse, const std::string& tails,
    double tail_bound, double min_bin_width, double min_bin_height, double min_derivative) {
  Operands operands(x, widths, heights, derivatives, inverse, tails,
                    {tail_bound, min_bin_width, min_bin_height, min_derivative});
  if (grad_y) {
    check_gradient("y", *grad_y, x, x.scalar_type());
    operands.task.grad_y = operand_of(*grad_y, 0, operands.owners[4]);
  }
  if (grad_log_det) {
    check_gradient("log_abs_det", *grad_log_det, x, compute_dtype(x.scalar_type()));
    operands.task.grad_log_det = operand_of(*grad_log_det, 0, operands.owners[5]);
  }
  Tensor grad_x = empty_contiguous_like(x), grad_widths = empty_contiguous_like(widths);
  Tensor grad_heights = empty_contiguous_like(heights), grad_derivatives = empty_contiguous_like(derivatives);
  operands.task.grad_x = grad_x.mutable_data_ptr();
  operands.task.grad_widths = grad_widths.mutable_data_ptr();
  operands.task.grad_heights = grad_heights.mutable_data_ptr();
  operands.task.grad_derivatives = grad_derivatives.mutable_data_ptr();
  operands.run(PYGEN_KERNELS(spline_kernels).backward[type_of(x.scalar_type())]);
  return {grad_x, grad_widths, grad_heights, grad_derivatives};
}

}  // namespace
}  // namespace pygen

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, m) {
  m.impl("rational_quadratic_spline", TORCH_BOX(&pygen::rational_quadratic_spline));
  m.impl("rational_quadratic_spline_backward", TORCH_BOX(&pygen::rational_quadratic_spline_backward));
}
