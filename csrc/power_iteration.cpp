// Power iteration on the CPU, of all matrices of a call at once: checks, allocation, and the dealing out of the work to
// threads. The products are csrc/cpu/power_iteration.cpp.
//
// A matrix is read in chunks that its shape alone decides, and what chunks contribute is added in their order: the bits
// of a result depend neither on the number of threads nor on the other matrices of the call.
#include "cpu/power_iteration.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <tuple>
#include <vector>

#include "capability.h"
#include "small.h"
#include "tensor.h"

namespace pygen {
namespace {

using Doubles = std::vector<double>;

// A matrix below this stays in the second-level cache from one product to the next: one thread does all of it. Larger
// ones are shared by all threads.
constexpr int64_t kAlone = int64_t{1} << 18;
// Bytes and lines of a chunk at least, and chunks at most: every chunk has a vector of its own to sum into, which costs as
// much as a few lines.
constexpr int64_t kChunk = int64_t{1} << 19;
constexpr int64_t kFewestLines = 64;
constexpr int64_t kMostChunks = 32;
// Lines of a chunk at most: one after the other they are added in the type itself. Only of narrow matrices it asks for
// more chunks, whose sums are short.
constexpr int64_t kMostLines = 256;
constexpr int64_t kLinesAtOnce = 8;
// Elements that a task scales or combines.
constexpr int64_t kElementwise = int64_t{1} << 16;
const PowerIterationKernels& kernels() { return PYGEN_KERNELS(power_iteration_kernels); }

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
    kernels().widen[type_of(x.scalar_type())](flat.const_data_ptr(), flat.numel(), values.data());
  }
  int64_t size() const { return static_cast<int64_t>(values.size()); }

  const void* as(bool wide) {
    if (wide) return values.data();
    narrow.resize(values.size() * sizeof(float));
    kernels().narrow[static_cast<int>(FloatType::kFloat32)](values.data(), size(), narrow.data());
    return narrow.data();
  }

  Tensor tensor(const Tensor& like) const {
    Tensor result = empty_contiguous_like(like);
    kernels().narrow[type_of(like.scalar_type())](values.data(), size(), result.mutable_data_ptr());
    return result;
  }
};

// What one reading of the matrix computes: W q and W^T of that; or W^T p; or W q.
enum class Pass { kBoth, kTransposed, kLines };

// Memory for the sums of chunks, some hundred kilobytes. It is kept from call to call: given back, it would be a hole in
// the place of the next large result, which the system would then have to give anew.
class Scratch {
 public:
  Scratch() = default;
  Scratch(Scratch&& other) noexcept : bytes_(std::move(other.bytes_)) {}
  ~Scratch() {
    if (bytes_.capacity() > 0 && kept().size() < kMostKept) kept().push_back(std::move(bytes_));
  }
  void resize(size_t n) {
    if (bytes_.capacity() == 0 && !kept().empty()) {
      bytes_ = std::move(kept().back());
      kept().pop_back();
    }
    bytes_.resize(n);
  }
  char* data() { return bytes_.data(); }
  const char* data() const { return bytes_.data(); }

 private:
  // Of each thread. More would pile up: what a worker makes for a small matrix, the thread of the call inherits.
  static constexpr size_t kMostKept = 8;
  static std::vector<std::vector<char>>& kept() {
    thread_local std::vector<std::vector<char>> all;
    return all;
  }
  std::vector<char> bytes_;
};

// One matrix on its way: W p-from-the-left and q-from-the-right, lines along p, elements along q.
class Iteration {
 public:
  Iteration(const Tensor& weight, const Tensor& u, const Tensor& v, int64_t dim, double eps, bool u_first)
      : matrix_(weight, dim), eps_(eps), u_(u), v_(v), lines_first_(u_first != matrix_.transposed()) {}

  const Matrix& matrix() const { return matrix_; }
  bool small() const { return matrix_.bytes() <= kAlone; }
  double sigma() const { return sigma_; }
  double divisor() const { return std::abs(sigma_) < eps_ ? eps_ : sigma_; }
  const Vector& u() const { return u_; }
  const Vector& v() const { return v_; }

  void prepare() { matrix_.put_rows_in_front(); }

  // Where W q is the first product, a step is one pass. Where W^T p is, its second product and the first of the next
  // step are: n + 1 passes for n steps. Without steps there is a value to compute.
  int64_t passes(int64_t n_iterations) const { return std::max<int64_t>(1, n_iterations + !lines_first_); }
  Pass pass(int64_t i, int64_t n_iterations) const {
    if (n_iterations == 0) return Pass::kLines;
    if (lines_first_) return Pass::kBoth;
    return i == 0 ? Pass::kTransposed : i == n_iterations ? Pass::kLines : Pass::kBoth;
  }

  // A pass is begun, done in chunks (in any order, by any thread), and finished.
  int64_t begin(Pass pass) {
    pass_ = pass;
    left_ = p().as(matrix_.wide());
    right_ = q().as(matrix_.wide());
    const int64_t count = divided_up(matrix_.lines(), kLinesAtOnce);
    const int64_t wanted = std::min(matrix_.bytes() / kChunk, matrix_.lines() / kFewestLines);
    const int64_t chunks =
        std::max(std::clamp<int64_t>(wanted, 1, kMostChunks), divided_up(matrix_.lines(), kMostLines));
    const int64_t per_chunk = std::max<int64_t>(1, divided_up(count, chunks));
    chunks_ = divided_up(count, per_chunk);
    lines_per_chunk_ = per_chunk * kLinesAtOnce;
    if (pass != Pass::kTransposed) product_.resize(matrix_.lines() * matrix_.width());
    if (pass != Pass::kLines) parts_.resize(chunks_ * matrix_.elements() * matrix_.width());
    return chunks_;
  }

  void chunk(int64_t c) {
    const PowerIterationKernels& k = kernels();
    const int type = matrix_.type();
    const int64_t first = c * lines_per_chunk_, width = matrix_.width();
    const int64_t lines = std::min(lines_per_chunk_, matrix_.lines() - first);
    char* part = pass_ == Pass::kLines ? nullptr : cleared_part(c);
    if (pass_ == Pass::kTransposed) {
      k.transposed[type](matrix_.line(first), lines, matrix_.elements(),
                         static_cast<const char*>(left_) + first * width, part);
    } else {
      k.lines[type](matrix_.line(first), lines, matrix_.elements(), right_, product_.data() + first * width, part);
    }
  }

  void finish(bool iterating) {
    switch (pass_) {
      case Pass::kBoth:
        return finish_both();
      case Pass::kTransposed:
        normalize(sum_of_parts(), q());
        return;
      case Pass::kLines:
        return finish_second(product(), p(), iterating);
    }
  }

  // All passes, by this thread.
  void run(int64_t n_iterations) {
    for (int64_t i = 0; i < passes(n_iterations); ++i) {
      const int64_t chunks = begin(pass(i, n_iterations));
      for (int64_t c = 0; c < chunks; ++c) chunk(c);
      finish(n_iterations > 0);
    }
  }

  void scale(int64_t begin, int64_t end, char* out) const {
    const int64_t size = bytes_of(matrix_.dtype);
    kernels().scale[matrix_.type()](matrix_.weight + begin * size, end - begin, 1 / divisor(), out + begin * size);
  }

 private:
  Vector& p() { return matrix_.transposed() ? v_ : u_; }
  Vector& q() { return matrix_.transposed() ? u_ : v_; }

  char* cleared_part(int64_t c) {
    const int64_t bytes = matrix_.elements() * matrix_.width();
    return static_cast<char*>(std::memset(parts_.data() + c * bytes, 0, bytes));
  }

  Doubles sum_of_parts() const {
    Doubles sum(matrix_.elements());
    kernels().sum_parts[matrix_.wide()](parts_.data(), chunks_, matrix_.elements(), sum.data());
    return sum;
  }

  Doubles product() const {
    Doubles values(matrix_.lines());
    kernels().sum_parts[matrix_.wide()](product_.data(), 1, matrix_.lines(), values.data());
    return values;
  }

  // x = product / max(|product|, eps), as it was where that is not to be had. What the product was multiplied by, or 0.
  double normalize(const Doubles& product, Vector& x) const {
    const int64_t n = x.size();
    const double norm = kernels().norm(product.data(), n);
    if (!(norm > 0) || std::isinf(norm)) return 0;
    const double factor = 1 / std::max(norm, eps_);
    if (std::isinf(factor)) {
      for (int64_t i = 0; i < n; ++i) x.values[i] = product[i] / norm;
      return 0;
    }
    x.values = product;
    kernels().multiply(x.values.data(), n, factor);
    return factor;
  }

  // sigma is the product with the vector that it is normalised into; without steps, with the vector as it was given.
  void finish_second(const Doubles& product, Vector& x, bool iterating = true) {
    if (iterating) normalize(product, x);
    sigma_ = kernels().dot(product.data(), x.values.data(), x.size());
  }

  // W q and, from the same pass, W^T of it before it was normalised.
  void finish_both() {
    const double factor = normalize(product(), p());
    // Beyond these the products of products may have left the range of their type: W^T p in a pass of its own.
    const double small = matrix_.wide() ? 1e-130 : 1e-16, large = matrix_.wide() ? 1e130 : 1e16;
    if (!(factor > small && factor < large)) {
      begin(Pass::kTransposed);
      for (int64_t c = 0; c < chunks_; ++c) chunk(c);
      return finish_second(sum_of_parts(), q());
    }
    Doubles product = sum_of_parts();
    kernels().multiply(product.data(), q().size(), factor);
    finish_second(product, q());
  }

  Matrix matrix_;
  double eps_, sigma_ = 0;
  Vector u_, v_;
  bool lines_first_;
  Pass pass_ = Pass::kLines;
  int64_t lines_per_chunk_ = 1, chunks_ = 0;
  const void *left_ = nullptr, *right_ = nullptr;
  Scratch product_, parts_;
};

// ---- all matrices of a call --------------------------------------------------------------------------------------

using Iterations = std::vector<Iteration*>;

// The passes of matrices that all threads share.
void run_together(const Iterations& matrices, int64_t n_iterations) {
  for (Iteration* matrix : matrices) matrix->prepare();
  for (int64_t i = 0;; ++i) {
    Iterations taking;
    std::vector<std::pair<Iteration*, int64_t>> tasks;
    for (Iteration* matrix : matrices) {
      if (i >= matrix->passes(n_iterations)) continue;
      taking.push_back(matrix);
      const int64_t chunks = matrix->begin(matrix->pass(i, n_iterations));
      for (int64_t c = 0; c < chunks; ++c) tasks.emplace_back(matrix, c);
    }
    if (taking.empty()) return;
    // Back and forth: what was read last is in the caches still.
    if (i % 2) std::reverse(tasks.begin(), tasks.end());
    for_each_task(tasks.size(), [&](int64_t t) { tasks[t].first->chunk(tasks[t].second); });
    for_each_task(taking.size(), [&](int64_t t) { taking[t]->finish(n_iterations > 0); });
  }
}

// ---- checks ------------------------------------------------------------------------------------------------------

int64_t counted_from_the_front(const Tensor& weight, int64_t dim) {
  PYGEN_CHECK(weight.dim() >= 2 && dim >= -weight.dim() && dim < weight.dim(),
              "power_iteration: weight must have at least 2 dimensions, ", dim, " among them, got ",
              shape_string(weight));
  return dim < 0 ? dim + weight.dim() : dim;
}

void check(const std::vector<Tensor>& weights, const std::vector<Tensor>& us, const std::vector<Tensor>& vs,
           const std::vector<int64_t>& dims) {
  PYGEN_CHECK(!weights.empty() && weights.size() == us.size() && weights.size() == vs.size() &&
                  weights.size() == dims.size(),
              "power_iteration: weights, us, vs and dims must be equally many and at least one, got ", weights.size(),
              ", ", us.size(), ", ", vs.size(), " and ", dims.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    PYGEN_CHECK(is_floating(weight.scalar_type()) && is_floating(us[i].scalar_type()) &&
                    is_floating(vs[i].scalar_type()),
                "power_iteration: weight, u and v must be floating point (float64, float32, bfloat16, float16), got ",
                dtype_string(weight.scalar_type()), ", ", dtype_string(us[i].scalar_type()), " and ",
                dtype_string(vs[i].scalar_type()));
    PYGEN_CHECK(weight.scalar_type() == weights[0].scalar_type(),
                "power_iteration: all weights must have one dtype, got ", dtype_string(weights[0].scalar_type()),
                " and ", dtype_string(weight.scalar_type()));
    const int64_t front = counted_from_the_front(weight, dims[i]), rows = weight.size(front);
    int64_t columns = 1;
    for (int64_t d = 0; d < weight.dim(); ++d) columns *= d == front ? 1 : weight.size(d);
    PYGEN_CHECK(us[i].dim() == 1 && vs[i].dim() == 1 && us[i].size(0) == rows && vs[i].size(0) == columns,
                "power_iteration: u must be (", rows, ",) and v (", columns, ",) for a weight ", shape_string(weight),
                " with its rows in dimension ", dims[i], ", got ", shape_string(us[i]), " and ", shape_string(vs[i]));
  }
}

Tensor tensor_of(const Doubles& values, ScalarType dtype) {
  const int64_t n = values.size();
  Tensor result = empty_contiguous(&n, 1, dtype);
  kernels().narrow[type_of(dtype)](values.data(), n, result.mutable_data_ptr());
  return result;
}

using Tensors = std::vector<Tensor>;

// All steps of all matrices, and their weights divided by sigma into `out`, unless that is empty.
void run_all(std::vector<Iteration>& all, int64_t n_iterations, const std::vector<char*>& out) {
  Iterations large;
  std::vector<size_t> small;
  for (size_t i = 0; i < all.size(); ++i)
    if (all[i].small()) {
      small.push_back(i);
    } else {
      large.push_back(&all[i]);
    }
  run_together(large, n_iterations);
  // The small ones, and the large ones' division. The last matrix is the likeliest to be in a cache still.
  struct Division {
    size_t matrix;
    int64_t begin, end;
  };
  std::vector<Division> divisions;
  for (size_t i = all.size(); !out.empty() && i-- > 0;)
    for (int64_t end = all[i].matrix().size(); !all[i].small() && end > 0; end -= kElementwise)
      divisions.push_back({i, std::max<int64_t>(0, end - kElementwise), end});
  const int64_t n_divisions = divisions.size(), n_small = small.size();
  const auto task = [&](int64_t t) {
    if (t < n_divisions) {
      const Division& part = divisions[t];
      all[part.matrix].scale(part.begin, part.end, out[part.matrix]);
    } else {
      const size_t i = small[t - n_divisions];
      all[i].prepare();
      all[i].run(n_iterations);
      if (!out.empty()) all[i].scale(0, all[i].matrix().size(), out[i]);
    }
  };
  int64_t small_work = 0;
  for (const size_t i : small) small_work += all[i].matrix().size() * (1 + n_iterations);
  if (n_divisions == 0 && small_work < 4 * kElementsPerTask) {
    for (int64_t t = 0; t < n_small; ++t) task(t);
  } else {
    for_each_task(n_divisions + n_small, task);
  }
}

std::tuple<Tensor, Tensors, Tensors, Tensors> power_iteration(const Tensors& weights, const Tensors& us,
                                                              const Tensors& vs, const std::vector<int64_t>& dims,
                                                              int64_t n_iterations, double eps, bool u_first,
                                                              bool return_weights) {
  check(weights, us, vs, dims);
  // Before all scratch: a large result then takes the place that the last call's has left, whole. Behind scratch it would
  // not fit there, and memory that the system gives anew costs more than what is computed into it.
  Tensors normalized;
  std::vector<char*> out;
  for (size_t i = 0; return_weights && i < weights.size(); ++i) {
    normalized.push_back(empty_contiguous_like(weights[i]));
    out.push_back(static_cast<char*>(normalized[i].mutable_data_ptr()));
  }
  std::vector<Iteration> all;
  all.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i)
    all.emplace_back(made_contiguous(weights[i]), us[i], vs[i], counted_from_the_front(weights[i], dims[i]), eps,
                     u_first);
  run_all(all, n_iterations, out);

  Doubles sigma;
  Tensors new_us, new_vs;
  for (size_t i = 0; i < all.size(); ++i) {
    sigma.push_back(all[i].sigma());
    new_us.push_back(all[i].u().tensor(us[i]));
    new_vs.push_back(all[i].v().tensor(vs[i]));
  }
  return {tensor_of(sigma, compute_dtype(weights[0].scalar_type())), normalized, new_us, new_vs};
}

// ---- gradient ----------------------------------------------------------------------------------------------------

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
    inner[part] =
        kernels().inner[matrix.type()](grad_at(begin), matrix.weight + begin * bytes_of(matrix.dtype), end - begin);
  }
  // How many inner products are wanted: none where the divisor is a constant.
  int64_t parts() const { return has_grad() && !constant() ? divided_up(matrix.size(), kElementwise) : 0; }

  double along() const {
    double sum = 0;
    for (const double part : inner) sum += part;
    return grad_sigma - (inner.empty() ? 0 : sum / sigma / sigma);
  }

  // The weight is (outer, rows, inner), and so are pieces: `per` elements from line `begin` to line `end`.
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
      kernels().combine[matrix.type()](grad_at(i * n), n, factor, along * left,
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

Tensors power_iteration_backward(const std::optional<Tensor>& grad_sigma, const Tensors& grads, const Tensors& weights,
                                 const Tensor& sigma, const Tensors& us, const Tensors& vs,
                                 const std::vector<int64_t>& dims, double eps) {
  check(weights, us, vs, dims);
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

// Up to here, some tens of microseconds of work, Python's lock is kept.
constexpr int64_t kBriefly = int64_t{1} << 16;

// f(), meanwhile without Python's lock where that takes long.
template <typename F>
void without_lock(int64_t elements, const F& f) {
  PyThreadState* const state = elements > kBriefly ? PyEval_SaveThread() : nullptr;
  try {
    f();
  } catch (...) {
    if (state) PyEval_RestoreThread(state);
    throw;
  }
  if (state) PyEval_RestoreThread(state);
}

// A Python list of the tensors, in their order.
PyObject* list_of(const Tensors& tensors) {
  PyObject* const list = PyList_New(tensors.size());
  for (size_t i = 0; list && i < tensors.size(); ++i) {
    PyObject* const item = to_python(tensors[i]);
    if (!item) {
      Py_DECREF(list);
      return nullptr;
    }
    PyList_SET_ITEM(list, i, item);
  }
  return list;
}

// The plain tensors of a Python list; none where it holds anything else.
Tensors plain_list(PyObject* list) {
  if (!PyList_CheckExact(list)) return {};
  return small_plain_tensors(PySequence_Fast_ITEMS(list), PyList_GET_SIZE(list), kAnySize);
}

std::vector<int64_t> plain_ints(PyObject* list) {
  std::vector<int64_t> values;
  if (!PyList_CheckExact(list)) return values;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
    const auto value = plain_int(PyList_GET_ITEM(list, i));
    if (!value) return {};
    values.push_back(*value);
  }
  return values;
}

int64_t elements_of(const Tensors& tensors) {
  int64_t sum = 0;
  for (const Tensor& tensor : tensors) sum += tensor.numel();
  return sum;
}

bool all_contiguous(const Tensors& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor& x) { return x.is_contiguous(); });
}

// sigma, u and v behind each other: what the gradient needs, as one tensor.
void pack(const Iteration& matrix, const Tensor& all) {
  const int64_t rows = matrix.u().size(), columns = matrix.v().size();
  const ScalarType dtype = all.scalar_type();
  const auto narrow = kernels().narrow[type_of(dtype)];
  const double sigma = matrix.sigma();
  char* const to = static_cast<char*>(all.mutable_data_ptr());
  narrow(&sigma, 1, to);
  narrow(matrix.u().values.data(), rows, to + bytes_of(dtype));
  narrow(matrix.v().values.data(), columns, to + (1 + rows) * bytes_of(dtype));
}

void write(const Vector& x, const Tensor& to) {
  kernels().narrow[type_of(to.scalar_type())](x.values.data(), x.size(), to.mutable_data_ptr());
}

}  // namespace

PyObject* power_iteration_small(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 8) Py_RETURN_NONE;
  const auto n_iterations = plain_int(args[4]);
  const auto eps = plain_float(args[5]);
  const auto u_first = plain_bool(args[6]), return_weights = plain_bool(args[7]);
  if (!n_iterations || *n_iterations < 0 || !eps || !(*eps > 0) || !u_first || !return_weights) Py_RETURN_NONE;
  const Tensors weights = plain_list(args[0]), us = plain_list(args[1]), vs = plain_list(args[2]);
  const std::vector<int64_t> dims = plain_ints(args[3]);
  std::optional<std::tuple<Tensor, Tensors, Tensors, Tensors>> found;
  try {
    without_lock(elements_of(weights), [&] {
      found = power_iteration(weights, us, vs, dims, *n_iterations, *eps, *u_first, *return_weights);
    });
  } catch (const std::exception&) {
    Py_RETURN_NONE;  // the dispatcher's road will meet the error again
  }
  const auto& [sigma, normalized, new_us, new_vs] = *found;
  PyObject* const parts[] = {to_python(sigma), list_of(normalized), list_of(new_us), list_of(new_vs)};
  PyObject* const all =
      parts[0] && parts[1] && parts[2] && parts[3] ? PyTuple_Pack(4, parts[0], parts[1], parts[2], parts[3]) : nullptr;
  for (PyObject* const part : parts) Py_XDECREF(part);
  return all;
}

PyObject* spectral_weights_small(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 6) Py_RETURN_NONE;
  const auto n_iterations = plain_int(args[4]);
  const auto eps = plain_float(args[5]);
  if (!n_iterations || !eps) Py_RETURN_NONE;
  const Tensors weights = plain_list(args[0]), us = plain_list(args[1]), vs = plain_list(args[2]);
  const std::vector<int64_t> dims = plain_ints(args[3]);
  if (weights.empty() || !all_contiguous(us) || !all_contiguous(vs)) Py_RETURN_NONE;
  Tensors results;
  try {
    check(weights, us, vs, dims);
    // Before all scratch, as in power_iteration().
    std::vector<char*> out;
    for (const Tensor& weight : weights) {
      results.push_back(empty_contiguous_like(weight));
      out.push_back(static_cast<char*>(results.back().mutable_data_ptr()));
    }
    const size_t n = weights.size();
    for (size_t i = 0; i < n; ++i) {
      const int64_t size = 1 + us[i].numel() + vs[i].numel();
      results.push_back(empty_contiguous(&size, 1, compute_dtype(weights[i].scalar_type())));
    }
    without_lock(elements_of(weights), [&] {
      std::vector<Iteration> all;
      all.reserve(n);
      for (size_t i = 0; i < n; ++i)
        all.emplace_back(made_contiguous(weights[i]), us[i], vs[i], counted_from_the_front(weights[i], dims[i]), *eps,
                         true);
      run_all(all, *n_iterations, out);
      for (size_t i = 0; i < n; ++i) {
        pack(all[i], results[n + i]);
        if (*n_iterations > 0) write(all[i].u(), us[i]), write(all[i].v(), vs[i]);
      }
    });
  } catch (const std::exception&) {
    Py_RETURN_NONE;  // the dispatcher's road will meet the error again
  }
  return list_of(results);
}

PyObject* spectral_weights_backward_small(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 5) Py_RETURN_NONE;
  const auto eps = plain_float(args[4]);
  if (!eps) Py_RETURN_NONE;
  const Tensors grads = plain_list(args[0]), weights = plain_list(args[1]), saved = plain_list(args[2]);
  const std::vector<int64_t> dims = plain_ints(args[3]);
  const size_t n = weights.size();
  if (n == 0 || grads.size() != n || saved.size() != n || dims.size() != n) Py_RETURN_NONE;
  Tensors results;
  try {
    without_lock(elements_of(weights), [&] {
      std::vector<Gradient> all;
      all.reserve(n);
      for (size_t i = 0; i < n; ++i) {
        const Vector values(saved[i]);
        const int64_t front = counted_from_the_front(weights[i], dims[i]), rows = weights[i].size(front);
        PYGEN_CHECK(rows > 0 && values.size() == 1 + rows + weights[i].numel() / rows, "saved for another weight");
        const auto begin = values.values.begin();
        all.emplace_back(weights[i], grads[i], Vector(Doubles(begin + 1, begin + 1 + rows)),
                         Vector(Doubles(begin + 1 + rows, values.values.end())), *begin, 0.0, front, *eps);
      }
      run_all(all);
      for (const Gradient& gradient : all) results.push_back(gradient.result);
    });
  } catch (const std::exception&) {
    Py_RETURN_NONE;
  }
  return list_of(results);
}

}  // namespace pygen

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, m) {
  m.impl("power_iteration", TORCH_BOX(&pygen::power_iteration));
  m.impl("power_iteration_backward", TORCH_BOX(&pygen::power_iteration_backward));
}
