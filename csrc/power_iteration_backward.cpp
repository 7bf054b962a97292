// The gradient of weights divided by their spectral norms, on the CPU: G / sigma + (g - <G, W> / sigma^2) u v^T. The loops
// are csrc/cpu/power_iteration.cpp.
#include "power_iteration.h"

#include <cmath>

namespace pygen {
namespace {

// One weight's gradient: grad / sigma + along u v^T.
struct Gradient {
  Matrix matrix;
  Tensor grad, result;  // grad is empty where there is none
  Vector u, v;
  double sigma, grad_sigma, eps;
  const void* right = nullptr;  // the vector along a line, as the kernel reads it
  Doubles inner;

  Gradient(const Tensor& weight, const Tensor& grad, Vector u, Vector v, double sigma, double grad_sigma, int64_t dim,
           double eps)
      : matrix(made_contiguous(weight), dim),
        grad(made_contiguous(grad)),
        result(empty_contiguous_like(weight)),
        u(std::move(u)),
        v(std::move(v)),
        sigma(sigma),
        grad_sigma(grad_sigma),
        eps(eps) {
    PYGEN_CHECK(!has_grad() || (same_shape(grad, weight) && grad.scalar_type() == weight.scalar_type()),
                "power_iteration_backward: a gradient must have its weight's shape and dtype, got ", shape_string(grad),
                " of ", dtype_string(grad.scalar_type()), " for ", shape_string(weight), " of ",
                dtype_string(weight.scalar_type()));
    inner.resize(parts());
  }

  bool has_grad() const { return grad.numel() > 0; }
  bool constant() const { return std::abs(sigma) < eps; }

  const char* grad_at(int64_t i) const {
    return has_grad() ? static_cast<const char*>(grad.const_data_ptr()) + i * bytes_of(matrix.dtype) : nullptr;
  }
  // Sums <grad, W> over one piece of kElementwise.
  void add_inner(int64_t part) {
    const int64_t begin = part * kElementwise, end = std::min(begin + kElementwise, matrix.size());
    inner[part] = power_kernels().inner[matrix.type()](grad_at(begin), matrix.weight + begin * bytes_of(matrix.dtype),
                                                       end - begin);
  }
  // How many inner products are wanted: none where the divisor is a constant.
  int64_t parts() const { return has_grad() && !constant() ? divided_up(matrix.size(), kElementwise) : 0; }

  double along() const {
    double sum = 0;
    for (const double part : inner) sum += part;
    return grad_sigma - (inner.empty() ? 0 : sum / sigma / sigma);
  }

  // The weight is (outer, rows, inner): lines of `inner`, or, without an inner part, of `rows`.
  bool by_columns() const { return matrix.transposed(); }
  int64_t lines() const { return by_columns() ? matrix.outer : matrix.outer * matrix.rows; }
  int64_t per_line() const { return by_columns() ? matrix.rows : matrix.inner; }

  void begin_combining() { right = (by_columns() ? u : v).as(matrix.wide()); }

  void combine(int64_t begin, int64_t end, double along) const {
    const double factor = 1 / (constant() ? eps : sigma);
    const int64_t n = per_line(), size = bytes_of(matrix.dtype);
    char* const out = static_cast<char*>(result.mutable_data_ptr());
    for (int64_t i = begin; i < end; ++i) {
      const double left = by_columns() ? v.values[i] : u.values[i % matrix.rows];
      const int64_t at = by_columns() ? 0 : i / matrix.rows * matrix.inner;
      power_kernels().combine[matrix.type()](grad_at(i * n), n, factor, along * left,
                                             static_cast<const char*>(right) + at * matrix.width(), out + i * n * size);
    }
  }
};

// Every gradient's `result`.
void run_all(std::vector<Gradient>& all) {
  struct Part {
    Gradient* of;
    int64_t begin, end;
    double along;
  };
  std::vector<Part> sums, combinations;
  int64_t work = 0;
  for (Gradient& gradient : all) {
    work += gradient.matrix.size();
    gradient.begin_combining();
    for (int64_t part = 0; part < gradient.parts(); ++part) sums.push_back({&gradient, part, part + 1, 0});
  }
  const bool alone = work < 4 * kElementsPerTask;
  const auto each = [&](std::vector<Part>& parts, const auto& f) {
    if (alone) {
      for (Part& part : parts) f(part);
    } else {
      for_each_task(parts.size(), [&](int64_t i) { f(parts[i]); });
    }
  };
  each(sums, [](Part& part) { part.of->add_inner(part.begin); });
  for (auto it = all.rbegin(); it != all.rend(); ++it) {
    const int64_t lines = it->lines(), step = std::max<int64_t>(1, kElementwise / std::max<int64_t>(1, it->per_line()));
    const double along = it->along();
    for (int64_t end = lines; end > 0; end -= step)
      combinations.push_back({&*it, std::max<int64_t>(0, end - step), end, along});
  }
  each(combinations, [](Part& part) { part.of->combine(part.begin, part.end, part.along); });
}

Tensor none(ScalarType dtype) {
  const int64_t empty = 0;
  return empty_contiguous(&empty, 1, dtype);
}

}  // namespace

Tensors power_iteration_backward(const std::optional<Tensor>& grad_sigma, const Tensors& grads, const Tensors& weights,
                                 const Tensor& sigma, const Tensors& us, const Tensors& vs,
                                 const std::vector<int64_t>& dims, double eps) {
  check_power_iteration(weights, us, vs, dims);
  const size_t n = weights.size();
  PYGEN_CHECK(sigma.numel() == static_cast<int64_t>(n) && (!grad_sigma || grad_sigma->numel() == sigma.numel()),
              "power_iteration_backward: sigma and its gradient must have one element for each of ", n, " weights");
  PYGEN_CHECK(grads.empty() || grads.size() == n, "power_iteration_backward: expected no gradients of weights or ", n,
              ", got ", grads.size());
  const Vector sigmas(sigma), grad_sigmas(grad_sigma ? *grad_sigma : sigma);
  std::vector<Gradient> all;
  all.reserve(n);
  for (size_t i = 0; i < n; ++i)
    all.emplace_back(weights[i], grads.empty() ? none(weights[i].scalar_type()) : grads[i], us[i], vs[i],
                     sigmas.values[i], grad_sigma ? grad_sigmas.values[i] : 0.0,
                     counted_from_the_front(weights[i], dims[i]), eps);
  run_all(all);
  Tensors results;
  for (const Gradient& gradient : all) results.push_back(gradient.result);
  return results;
}

Tensors spectral_weights_backward(const Tensors& grads, const Tensors& weights, const Tensors& saved,
                                  const std::vector<int64_t>& dims, double eps) {
  const size_t n = weights.size();
  std::vector<Gradient> all;
  all.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    const Vector values(saved[i]);
    const int64_t front = counted_from_the_front(weights[i], dims[i]), rows = weights[i].size(front);
    PYGEN_CHECK(rows > 0 && values.size() == 1 + rows + weights[i].numel() / rows, "saved for another weight");
    const auto begin = values.values.begin();
    all.emplace_back(weights[i], grads[i], Vector(Doubles(begin + 1, begin + 1 + rows)),
                     Vector(Doubles(begin + 1 + rows, values.values.end())), *begin, 0.0, front, eps);
  }
  run_all(all);
  Tensors results;
  for (const Gradient& gradient : all) results.push_back(gradient.result);
  return results;
}

}  // namespace pygen

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, m) {
  m.impl("power_iteration_backward", TORCH_BOX(&pygen::power_iteration_backward));
}
