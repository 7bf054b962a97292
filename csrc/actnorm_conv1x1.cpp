// ActNorm and invertible 1x1 convolution, folded, on the CPU: checks, allocation, threads, and the vectors' exponentials.
// The arithmetic is csrc/cpu/actnorm_conv1x1.cpp.
#include "cpu/actnorm_conv1x1.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "capability.h"
#include "tensor.h"

namespace pygen {
namespace {

using Doubles = std::vector<double>;

// Gradients of the weight are summed in so many parts at most, whatever the number of threads; a part's samples stay in
// the second-level cache while they are read again for every tile of the weight.
constexpr int64_t kMostBlocks = 16;
constexpr int64_t kBlockElements = 32768;

void check_parameter(const char* name, const Tensor& tensor, const Tensor& x, int64_t dim) {
  const int64_t channels = x.size(1);
  bool fits = tensor.dim() == dim && tensor.scalar_type() == x.scalar_type();
  for (int64_t i = 0; fits && i < dim; ++i) fits = tensor.size(i) == channels;
  PYGEN_CHECK(fits, "actnorm_conv1x1: ", name, " must be ", dim == 1 ? "(" : "(C, ", "C", dim == 1 ? ",)" : ")", " of ",
              dtype_string(x.scalar_type()), " with C = ", channels, " channels of x, got ", shape_string(tensor),
              " of ", dtype_string(tensor.scalar_type()));
}

Doubles doubles(const Tensor& tensor) {
  const Tensor flat = made_contiguous(tensor);
  Doubles values(flat.numel());
  if (flat.scalar_type() == ScalarType::Double) {
    std::copy_n(static_cast<const double*>(flat.const_data_ptr()), values.size(), values.begin());
  } else {
    std::copy_n(static_cast<const float*>(flat.const_data_ptr()), values.size(), values.begin());
  }
  return values;
}

void put(const Doubles& values, void* data, ScalarType dtype) {
  if (dtype == ScalarType::Double) {
    std::copy(values.begin(), values.end(), static_cast<double*>(data));
  } else {
    std::transform(values.begin(), values.end(), static_cast<float*>(data),
                   [](double v) { return static_cast<float>(v); });
  }
}

Tensor tensor_of(const Doubles& values, const Tensor& like) {
  Tensor result = empty_contiguous_like(like);
  put(values, result.mutable_data_ptr(), like.scalar_type());
  return result;
}

// The column of each row's one.
std::vector<int64_t> order_of(const Doubles& permutation, int64_t n) {
  std::vector<int64_t> order(n, -1);
  std::vector<bool> taken(n, false);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const double value = permutation[i * n + j];
      if (value == 0) continue;
      PYGEN_CHECK(value == 1 && order[i] < 0 && !taken[j], "actnorm_conv1x1: permutation must be a permutation matrix");
      order[i] = j;
      taken[j] = true;
    }
  for (const int64_t j : order) PYGEN_CHECK(j >= 0, "actnorm_conv1x1: permutation must be a permutation matrix");
  return order;
}

struct Shape {
  int64_t samples, channels, pixels;
};

Shape shape_of(const Tensor& x) {
  PYGEN_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
              "actnorm_conv1x1: x must be float32 or float64, got ", dtype_string(x.scalar_type()));
  PYGEN_CHECK(x.dim() >= 2 && x.size(1) > 0, "actnorm_conv1x1: x must be (B, C, ...), got ", shape_string(x));
  int64_t pixels = 1;
  for (int64_t i = 2; i < x.dim(); ++i) pixels *= x.size(i);
  return {x.size(0), x.size(1), pixels};
}

// The parameters in float64, and the weight and offset that they fold into.
struct Folded {
  int64_t n;
  Doubles bias, scale, lower, upper, diagonal;
  std::vector<int64_t> order;
  Doubles product, weight, offset;
  double log_abs_det = 0;  // of one pixel
  FoldTask task{};

  Folded(const Tensor& x, const Tensor& bias_, const Tensor& log_scale, const Tensor& lower_, const Tensor& upper_,
         const Tensor& log_diagonal, const Tensor& sign, const Tensor& permutation, bool inverse = false)
      : n(x.size(1)) {
    check_parameter("bias", bias_, x, 1);
    check_parameter("log_scale", log_scale, x, 1);
    check_parameter("lower", lower_, x, 2);
    check_parameter("upper", upper_, x, 2);
    check_parameter("log_diagonal", log_diagonal, x, 1);
    check_parameter("sign", sign, x, 1);
    check_parameter("permutation", permutation, x, 2);
    bias = doubles(bias_), scale = doubles(log_scale), lower = doubles(lower_), upper = doubles(upper_);
    diagonal = doubles(log_diagonal);
    order = order_of(doubles(permutation), n);
    const Doubles signs = doubles(sign);
    for (int64_t i = 0; i < n; ++i) {
      log_abs_det += scale[i] + diagonal[i];
      scale[i] = std::exp(scale[i]);
      diagonal[i] = signs[i] * std::exp(diagonal[i]);
    }
    product.resize(n * n), weight.resize(n * n), offset.resize(n);
    task.n = n;
    task.lower = lower.data(), task.upper = upper.data(), task.diagonal = diagonal.data();
    task.scale = scale.data(), task.bias = bias.data(), task.order = order.data();
    task.product = product.data(), task.weight = weight.data(), task.offset = offset.data();
    (inverse ? PYGEN_KERNELS(mix_kernels).fold_inverse : PYGEN_KERNELS(mix_kernels).fold)(task);
  }
};

// Values of x's type in memory of double's size, which fits both.
struct Typed {
  Doubles memory;
  Typed(const Doubles& values, ScalarType dtype) : memory(values.size()) { put(values, memory.data(), dtype); }
  const void* data() const { return memory.data(); }
};

std::tuple<Tensor, Tensor> mixed(const Tensor& x_, const Folded& folded, double log_abs_det) {
  const Shape shape = shape_of(x_);
  const Tensor x = made_contiguous(x_);
  Tensor z = empty_contiguous_like(x), log_det = empty_contiguous(&shape.samples, 1, x.scalar_type());
  const Typed weight(folded.weight, x.scalar_type()), offset(folded.offset, x.scalar_type());
  const MixTask task{x.const_data_ptr(),   weight.data(),  offset.data(),
                     z.mutable_data_ptr(), shape.channels, shape.pixels};
  const auto kernel = PYGEN_KERNELS(mix_kernels).forward[type_of(x.scalar_type())];
  const int64_t size = std::max<int64_t>(1, shape.channels * shape.pixels);
  if (shape.pixels > 0)
    parallel_for(shape.samples, std::max<int64_t>(1, kElementsPerTask / size),
                 [&](int64_t begin, int64_t end) { kernel(task, begin, end); });
  put(Doubles(shape.samples, static_cast<double>(shape.pixels) * log_abs_det), log_det.mutable_data_ptr(),
      x.scalar_type());
  return {z, log_det};
}

std::tuple<Tensor, Tensor> actnorm_conv1x1(const Tensor& x, const Tensor& bias, const Tensor& log_scale,
                                           const Tensor& lower, const Tensor& upper, const Tensor& log_diagonal,
                                           const Tensor& sign, const Tensor& permutation) {
  shape_of(x);
  const Folded folded(x, bias, log_scale, lower, upper, log_diagonal, sign, permutation);
  return mixed(x, folded, folded.log_abs_det);
}

std::tuple<Tensor, Tensor> actnorm_conv1x1_inverse(const Tensor& z, const Tensor& bias, const Tensor& log_scale,
                                                   const Tensor& lower, const Tensor& upper, const Tensor& log_diagonal,
                                                   const Tensor& sign, const Tensor& permutation) {
  shape_of(z);
  const Folded folded(z, bias, log_scale, lower, upper, log_diagonal, sign, permutation, /*inverse=*/true);
  return mixed(z, folded, -folded.log_abs_det);
}

double sum_of(const Tensor& tensor) {
  double sum = 0;
  for (const double value : doubles(tensor)) sum += value;
  return sum;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> actnorm_conv1x1_backward(
    const std::optional<Tensor>& grad_z, const std::optional<Tensor>& grad_log_det, const Tensor& x_,
    const Tensor& bias, const Tensor& log_scale, const Tensor& lower, const Tensor& upper, const Tensor& log_diagonal,
    const Tensor& sign, const Tensor& permutation) {
  const Shape shape = shape_of(x_);
  Folded folded(x_, bias, log_scale, lower, upper, log_diagonal, sign, permutation);
  const Tensor x = made_contiguous(x_);
  const int64_t n = shape.channels, size = std::max<int64_t>(1, n * shape.pixels);
  Tensor grad_x = empty_contiguous_like(x);
  Doubles grad_weight(n * n, 0.0), grad_offset(n, 0.0);
  if (grad_z) {
    PYGEN_CHECK(same_shape(*grad_z, x) && grad_z->scalar_type() == x.scalar_type(),
                "actnorm_conv1x1: the incoming gradient of z must be ", shape_string(x), " of ",
                dtype_string(x.scalar_type()), ", got ", shape_string(*grad_z), " of ",
                dtype_string(grad_z->scalar_type()));
    const Tensor g = made_contiguous(*grad_z);
    Doubles turned(n * n);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) turned[j * n + i] = folded.weight[i * n + j];
    const Typed transposed(turned, x.scalar_type());
    const int64_t samples_per_block =
        std::max({int64_t{1}, kBlockElements / size, (shape.samples + kMostBlocks - 1) / kMostBlocks});
    const int64_t blocks = (shape.samples + samples_per_block - 1) / samples_per_block;
    Doubles partial_weight(blocks * n * n), partial_offset(blocks * n);
    const MixBackwardTask task{g.const_data_ptr(),
                               x.const_data_ptr(),
                               transposed.data(),
                               grad_x.mutable_data_ptr(),
                               partial_weight.data(),
                               partial_offset.data(),
                               shape.samples,
                               samples_per_block,
                               n,
                               shape.pixels};
    const auto kernel = PYGEN_KERNELS(mix_kernels).backward[type_of(x.scalar_type())];
    parallel_for(blocks, /*grain=*/1, [&](int64_t begin, int64_t end) { kernel(task, begin, end); });
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t i = 0; i < n * n; ++i) grad_weight[i] += partial_weight[b * n * n + i];
      for (int64_t i = 0; i < n; ++i) grad_offset[i] += partial_offset[b * n + i];
    }
  } else {
    put(Doubles(x.numel(), 0.0), grad_x.mutable_data_ptr(), x.scalar_type());
  }
  Doubles grad_lower(n * n), grad_upper(n * n), grad_diagonal(n), grad_scale(n), grad_bias(n), scratch(n * n);
  FoldTask& task = folded.task;
  task.grad_weight = grad_weight.data(), task.grad_offset = grad_offset.data();
  task.grad_lower = grad_lower.data(), task.grad_upper = grad_upper.data();
  task.grad_diagonal = grad_diagonal.data(), task.grad_scale = grad_scale.data(), task.grad_bias = grad_bias.data();
  task.scratch = scratch.data();
  PYGEN_KERNELS(mix_kernels).fold_backward(task);
  // log_det is, for every sample, pixels times the sum of the logarithms.
  const double by_log = grad_log_det ? static_cast<double>(shape.pixels) * sum_of(*grad_log_det) : 0.0;
  for (int64_t i = 0; i < n; ++i) {
    grad_scale[i] += by_log;
    grad_diagonal[i] = grad_diagonal[i] * folded.diagonal[i] + by_log;
  }
  return {grad_x,
          tensor_of(grad_bias, bias),
          tensor_of(grad_scale, log_scale),
          tensor_of(grad_lower, lower),
          tensor_of(grad_upper, upper),
          tensor_of(grad_diagonal, log_diagonal)};
}

}  // namespace
}  // namespace pygen

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, m) {
  m.impl("actnorm_conv1x1", TORCH_BOX(&pygen::actnorm_conv1x1));
  m.impl("actnorm_conv1x1_inverse", TORCH_BOX(&pygen::actnorm_conv1x1_inverse));
  m.impl("actnorm_conv1x1_backward", TORCH_BOX(&pygen::actnorm_conv1x1_backward));
}
