// Affine coupling on the CPU: checks, allocation, threads. The arithmetic is csrc/cpu/affine_coupling.cpp.
#include "cpu/affine_coupling.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
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

// Elements begin, ..., begin + length - 1 of dimension `dim`: torch.narrow, without its way through the dispatcher.
struct Range {
  int64_t dim, begin, length;
};

constexpr int64_t kWhole = -1;

// A tensor or a range of it. More than kMaxOperandDims irregular dimensions are made contiguous: `owner` then keeps the
// copy.
CouplingOperand operand_of(const Tensor& tensor, Tensor& owner, const Range& range = {kWhole, 0, 0}) {
  owner = tensor;
  int64_t sizes[kMaxDims];
  std::copy(tensor.sizes().begin(), tensor.sizes().end(), sizes);
  int64_t offset = 0;
  if (range.dim != kWhole) {
    sizes[range.dim] = range.length;
    offset = range.begin * tensor.stride(range.dim) * static_cast<int64_t>(tensor.element_size());
  }
  CouplingOperand operand{};
  const Merged merged(sizes + 1, tensor.strides().data() + 1, tensor.dim() - 1);
  if (merged.dims > kMaxOperandDims) return operand_of(torch::stable::contiguous(tensor), owner, range);
  operand.data = static_cast<const char*>(tensor.const_data_ptr()) + offset;
  operand.sample_stride = tensor.stride(0);
  operand.dims = merged.dims;
  std::copy(merged.size, merged.size + merged.dims, operand.size);
  std::copy(merged.stride, merged.stride + merged.dims, operand.stride);
  return operand;
}

int64_t product(const int64_t* begin, const int64_t* end) {
  return std::accumulate(begin, end, int64_t{1}, std::multiplies<int64_t>());
}

// All of a contiguous tensor.
CouplingResult result_of(Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const int64_t size = product(sizes.begin() + 1, sizes.end());
  return {tensor.mutable_data_ptr(), size, size, size};
}

// A range of a contiguous tensor: one row for each of the dimensions in front of it.
CouplingResult result_of(Tensor& tensor, const Range& range) {
  const auto sizes = tensor.sizes();
  const int64_t inner = product(sizes.begin() + range.dim + 1, sizes.end());
  const int64_t rows = product(sizes.begin() + 1, sizes.begin() + range.dim);
  const int64_t row_stride = sizes[range.dim] * inner;
  char* data = static_cast<char*>(tensor.mutable_data_ptr());
  return {data + range.begin * inner * static_cast<int64_t>(tensor.element_size()), rows * row_stride,
          range.length * inner, row_stride};
}

// The operands of one call, with whatever copies keep them alive.
struct Operands {
  Tensor owners[5];
  CouplingTask task{};

  Operands(const Tensor& x, bool shift_first, double clamp, bool inverse) : owners{x, x, x, x, x} {
    task.samples = x.size(0);
    task.shift_first = shift_first;
    task.inverse = inverse;
    task.clamp = clamp;
  }

  void cut(int64_t sample_size) {
    task.sample_size = sample_size;
    task.part_size = kBlock;
    task.parts = std::max<int64_t>(1, (task.sample_size + kBlock - 1) / kBlock);
    task.samples_per_block = std::max<int64_t>(1, kBlock / std::max<int64_t>(1, task.sample_size));
  }

  void set(const Tensor& x, const Tensor& scale, const Tensor& shift) {
    task.x = operand_of(x, owners[0]);
    task.scale = operand_of(scale, owners[1]);
    task.shift = operand_of(shift, owners[2]);
    cut(x.size(0) == 0 ? 0 : x.numel() / x.size(0));
  }

  void set_grad_log_det(const char* op, const Tensor& grad_log_det, const Tensor& x) {
    PYGEN_CHECK(grad_log_det.dim() == 1 && grad_log_det.size(0) == x.size(0) &&
                    grad_log_det.scalar_type() == compute_dtype(x.scalar_type()),
                op, ": the incoming gradient of log_det must be (", x.size(0), ",) of ",
                dtype_string(compute_dtype(x.scalar_type())), ", got ", shape_string(grad_log_det), " of ",
                dtype_string(grad_log_det.scalar_type()));
    task.grad_log_det = grad_log_det.const_data_ptr();
    task.grad_log_det_stride = grad_log_det.stride(0);
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

// Runs a forward kernel and returns the log-determinants, of `dtype`.
Tensor run_forward(Operands& operands, CouplingKernel kernel, ScalarType dtype) {
  CouplingTask& task = operands.task;
  Tensor log_det = empty_contiguous(&task.samples, 1, dtype);
  const std::unique_ptr<double[]> partial(new double[task.samples * task.parts]());
  task.log_det = partial.get();
  operands.run(kernel);
  if (dtype == ScalarType::Double) {
    add_parts(partial.get(), task.parts, task.samples, static_cast<double*>(log_det.mutable_data_ptr()));
  } else {
    add_parts(partial.get(), task.parts, task.samples, static_cast<float*>(log_det.mutable_data_ptr()));
  }
  return log_det;
}

std::tuple<Tensor, Tensor> affine_coupling(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                           const std::string& scale_map, bool shift_first, double clamp, bool inverse) {
  check(x, scale, shift);
  const int map = scale_map_of(scale_map), type = type_of(x.scalar_type());
  Tensor y = empty_contiguous_like(x);
  Operands operands(x, shift_first, clamp, inverse);
  operands.set(x, scale, shift);
  operands.task.y = result_of(y);
  const auto kernel = PYGEN_KERNELS(coupling_kernels).forward[type][map];
  const Tensor log_det = run_forward(operands, kernel, compute_dtype(x.scalar_type()));
  return {y, log_det};
}

std::tuple<Tensor, Tensor> affine_coupling_backward(const std::optional<Tensor>& grad_y,
                                                    const std::optional<Tensor>& grad_log_det, const Tensor& x,
                                                    const Tensor& scale, const Tensor& shift,
                                                    const std::string& scale_map, bool shift_first, double clamp,
                                                    bool inverse) {
  check(x, scale, shift);
  const int map = scale_map_of(scale_map), type = type_of(x.scalar_type());
  Operands operands(x, shift_first, clamp, inverse);
  operands.set(x, scale, shift);
  if (grad_y) {
    check_like("the incoming gradient of y", *grad_y, x);
    operands.task.grad_y = operand_of(*grad_y, operands.owners[3]);
  }
  if (grad_log_det) operands.set_grad_log_det("affine_coupling", *grad_log_det, x);
  Tensor grad_x = empty_contiguous_like(x), grad_scale = empty_contiguous_like(x);
  operands.task.y = result_of(grad_x);
  operands.task.grad_scale = result_of(grad_scale);
  operands.run(PYGEN_KERNELS(coupling_kernels).backward[type][map]);
  return {grad_x, grad_scale};
}

// ---- by halves -------------------------------------------------------------------------------------------------------

// Which of x's elements along a dimension are copied and which are transformed, and where the parameters of these are.
struct Halves {
  Range passive, active, scale, shift;
};

Halves halves_of(const Tensor& x, const Tensor& parameters, int64_t dim, bool swap) {
  constexpr const char* kOp = "affine_coupling_halves: ";
  PYGEN_CHECK(is_floating(x.scalar_type()), kOp, "x must be floating point (float64, float32, bfloat16, float16), got ",
              dtype_string(x.scalar_type()));
  PYGEN_CHECK(x.dim() >= 2, kOp, "x must have a batch dimension and one to split, (B, ..., n, ...), got ",
              shape_string(x));
  PYGEN_CHECK(dim >= -x.dim() && dim < x.dim() && dim != 0 && dim != -x.dim(), kOp,
              "dim must be one of x's dimensions ", shape_string(x), " and not the batch, got ", dim);
  if (dim < 0) dim += x.dim();
  const int64_t size = x.size(dim), second = size / 2, first = size - second;
  PYGEN_CHECK(size >= 2, kOp, "dimension ", dim, " must have at least 2 elements to be split, got x ", shape_string(x));
  const Range begin{dim, 0, first}, end{dim, first, second};
  const int64_t active = swap ? first : second;
  bool fits = parameters.dim() == x.dim();
  for (int64_t i = 0; fits && i < x.dim(); ++i) fits = parameters.size(i) == (i == dim ? 2 * active : x.size(i));
  PYGEN_CHECK(fits && parameters.scalar_type() == x.scalar_type(), kOp, "parameters must be of x's shape ",
              shape_string(x), ", but for ", 2 * active, " in dimension ", dim, ", and of ",
              dtype_string(x.scalar_type()), ", got ", shape_string(parameters), " of ",
              dtype_string(parameters.scalar_type()));
  return {swap ? end : begin, swap ? begin : end, {dim, 0, active}, {dim, active, active}};
}

// All but what is copied and where results go.
void set_halves(Operands& operands, const Tensor& x, const Tensor& parameters, const Halves& halves) {
  CouplingTask& task = operands.task;
  task.x = operand_of(x, operands.owners[0], halves.active);
  task.scale = operand_of(parameters, operands.owners[1], halves.scale);
  task.shift = operand_of(parameters, operands.owners[2], halves.shift);
  const int64_t slice = x.numel() == 0 ? 0 : x.numel() / x.size(0) / x.size(halves.active.dim);
  task.passive_size = slice * halves.passive.length;
  operands.cut(slice * halves.active.length);
}

std::tuple<Tensor, Tensor> affine_coupling_halves(const Tensor& x, const Tensor& parameters, int64_t dim, bool swap,
                                                  const std::string& scale_map, bool shift_first, double clamp,
                                                  bool inverse) {
  const Halves halves = halves_of(x, parameters, dim, swap);
  const int map = scale_map_of(scale_map), type = type_of(x.scalar_type());
  Tensor z = empty_contiguous_like(x);
  Operands operands(x, shift_first, clamp, inverse);
  set_halves(operands, x, parameters, halves);
  operands.task.passive = operand_of(x, operands.owners[3], halves.passive);
  operands.task.passive_copy = result_of(z, halves.passive);
  operands.task.y = result_of(z, halves.active);
  const auto kernel = PYGEN_KERNELS(coupling_kernels).forward[type][map];
  const Tensor log_det = run_forward(operands, kernel, compute_dtype(x.scalar_type()));
  return {z, log_det};
}

std::tuple<Tensor, Tensor> affine_coupling_halves_backward(const std::optional<Tensor>& grad_z,
                                                           const std::optional<Tensor>& grad_log_det, const Tensor& x,
                                                           const Tensor& parameters, int64_t dim, bool swap,
                                                           const std::string& scale_map, bool shift_first, double clamp,
                                                           bool inverse) {
  const Halves halves = halves_of(x, parameters, dim, swap);
  const int map = scale_map_of(scale_map), type = type_of(x.scalar_type());
  Operands operands(x, shift_first, clamp, inverse);
  set_halves(operands, x, parameters, halves);
  CouplingTask& task = operands.task;
  if (grad_z) {
    PYGEN_CHECK(same_shape(*grad_z, x) && grad_z->scalar_type() == x.scalar_type(),
                "affine_coupling_halves: the incoming gradient of z must be ", shape_string(x), " of ",
                dtype_string(x.scalar_type()), ", got ", shape_string(*grad_z), " of ",
                dtype_string(grad_z->scalar_type()));
    task.grad_y = operand_of(*grad_z, operands.owners[3], halves.active);
    task.passive = operand_of(*grad_z, operands.owners[4], halves.passive);
  }
  if (grad_log_det) operands.set_grad_log_det("affine_coupling_halves", *grad_log_det, x);
  Tensor grad_x = empty_contiguous_like(x), grad_parameters = empty_contiguous_like(parameters);
  task.passive_copy = result_of(grad_x, halves.passive);
  task.y = result_of(grad_x, halves.active);
  task.grad_scale = result_of(grad_parameters, halves.scale);
  task.grad_shift = result_of(grad_parameters, halves.shift);
  operands.run(PYGEN_KERNELS(coupling_kernels).backward[type][map]);
  return {grad_x, grad_parameters};
}

}  // namespace
}  // namespace pygen

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, m) {
  m.impl("affine_coupling", TORCH_BOX(&pygen::affine_coupling));
  m.impl("affine_coupling_backward", TORCH_BOX(&pygen::affine_coupling_backward));
  m.impl("affine_coupling_halves", TORCH_BOX(&pygen::affine_coupling_halves));
  m.impl("affine_coupling_halves_backward", TORCH_BOX(&pygen::affine_coupling_halves_backward));
}
