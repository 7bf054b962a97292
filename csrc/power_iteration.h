// What the parts of power iteration on the CPU share: a weight as a matrix, vectors on their way through it, tasks for
// threads. power_iteration.cpp iterates, power_iteration_backward.cpp differentiates, power_iteration_small.cpp is the
// short road from Python to both.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "capability.h"
#include "cpu/power_iteration.h"
#include "tensor.h"

namespace pygen {

using Doubles = std::vector<double>;
using Tensors = std::vector<Tensor>;

// Elements that a task scales or combines.
constexpr int64_t kElementwise = int64_t{1} << 16;

inline const PowerIterationKernels& power_kernels() { return PYGEN_KERNELS(power_iteration_kernels); }

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// f(task) for every task < count; a thread that is done takes the next one.
template <typename F>
void for_each_task(int64_t count, const F& f) {
  std::atomic<int64_t> next{0};
  parallel_for(count, 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1)) < count;) f(task);
  });
}

// A contiguous weight as a matrix: W with its rows as lines, or its transpose, whichever lies in memory.
//
// The weight is (outer, rows, inner) with the dimension of the rows in the middle. Without an outer part the rows of W
// are lines; without an inner part its columns are. Otherwise a copy is made whose lines are the rows.
struct Matrix {
  int64_t outer = 1, rows, inner = 1;
  ScalarType dtype;
  Tensor tensor;  // contiguous
  const char* weight;
  Tensor copy;
  const char* data;  // of tensor, or of the copy

  Matrix(const Tensor& tensor, int64_t dim) : dtype(tensor.scalar_type()), tensor(tensor), copy(tensor) {
    for (int64_t d = 0; d < dim; ++d) outer *= tensor.size(d);
    rows = tensor.size(dim);
    for (int64_t d = dim + 1; d < tensor.dim(); ++d) inner *= tensor.size(d);
    data = weight = static_cast<const char*>(tensor.const_data_ptr());
  }

  bool transposed() const { return outer > 1 && inner == 1; }
  int64_t lines() const { return transposed() ? outer : rows; }
  int64_t elements() const { return transposed() ? rows : outer * inner; }
  int64_t size() const { return outer * rows * inner; }
  int64_t bytes() const { return size() * bytes_of(dtype); }
  int type() const { return type_of(dtype); }
  // Whether it computes in double, and the bytes of what it computes in.
  bool wide() const { return dtype == ScalarType::Double; }
  int64_t width() const { return wide() ? 8 : 4; }

  const char* line(int64_t i) const { return data + i * elements() * bytes_of(dtype); }

  void put_rows_in_front() {
    if (outer == 1 || inner == 1 || size() == 0) return;
    const int64_t shape[] = {rows, outer * inner};
    const int64_t step = inner * bytes_of(dtype);
    copy = empty_contiguous(shape, 2, dtype);
    char* to = static_cast<char*>(copy.mutable_data_ptr());
    parallel_for(rows, std::max<int64_t>(1, kElementsPerTask / (outer * inner)), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        for (int64_t a = 0; a < outer; ++a)
          std::memcpy(to + (r * outer + a) * step, weight + (a * rows + r) * step, step);
    });
    data = to;
  }
};

// A vector on its way through the iteration, in float64, and as a product reads it.
struct Vector {
  Doubles values;
  std::vector<char> narrow;

  explicit Vector(Doubles x) : values(std::move(x)) {}
  Vector(const Tensor& x) : values(x.numel()) {
    const Tensor flat = made_contiguous(x);
    power_kernels().widen[type_of(x.scalar_type())](flat.const_data_ptr(), flat.numel(), values.data());
  }
  int64_t size() const { return static_cast<int64_t>(values.size()); }

  const void* as(bool wide) {
    if (wide) return values.data();
    narrow.resize(values.size() * sizeof(float));
    power_kernels().narrow[static_cast<int>(FloatType::kFloat32)](values.data(), size(), narrow.data());
    return narrow.data();
  }

  Tensor tensor(const Tensor& like) const {
    Tensor result = empty_contiguous_like(like);
    power_kernels().narrow[type_of(like.scalar_type())](values.data(), size(), result.mutable_data_ptr());
    return result;
  }
};

// The dimension counted from the front; throws where the weight does not have it.
int64_t counted_from_the_front(const Tensor& weight, int64_t dim);

// Throws unless shapes and types are those of power_iteration.
void check_power_iteration(const Tensors& weights, const Tensors& us, const Tensors& vs,
                           const std::vector<int64_t>& dims);

// The operators.
std::tuple<Tensor, Tensors, Tensors, Tensors> power_iteration(const Tensors& weights, const Tensors& us,
                                                              const Tensors& vs, const std::vector<int64_t>& dims,
                                                              int64_t n_iterations, double eps, bool u_first,
                                                              bool return_weights);
Tensors power_iteration_backward(const std::optional<Tensor>& grad_sigma, const Tensors& grads, const Tensors& weights,
                                 const Tensor& sigma, const Tensors& us, const Tensors& vs,
                                 const std::vector<int64_t>& dims, double eps);

// The same for layers, u before v: us and vs, contiguous, are changed in place if there are steps. `normalized` are the
// weights / sigma, `saved` is for each what its gradient needs, sigma, u and v behind each other; both are allocated
// already, by `empty_for_spectral_weights`.
struct SpectralWeights {
  Tensors normalized, saved;
};
SpectralWeights empty_for_spectral_weights(const Tensors& weights, const Tensors& us, const Tensors& vs);
void spectral_weights(const Tensors& weights, const Tensors& us, const Tensors& vs, const std::vector<int64_t>& dims,
                      int64_t n_iterations, double eps, const SpectralWeights& results);
Tensors spectral_weights_backward(const Tensors& grads, const Tensors& weights, const Tensors& saved,
                                  const std::vector<int64_t>& dims, double eps);

}  // namespace pygen
