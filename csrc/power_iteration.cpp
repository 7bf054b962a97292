// Power iteration on the CPU, of all matrices of a call at once: checks, allocation, and the dealing out of the work to
// threads. The products are csrc/cpu/power_iteration.cpp.
//
// A matrix is read in chunks that its shape alone decides, and what chunks contribute is added in their order: the bits
// of a result depend neither on the number of threads nor on the other matrices of the call.
#include "power_iteration.h"

#include <cmath>

namespace pygen {
namespace {

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
    const PowerIterationKernels& k = power_kernels();
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
    power_kernels().scale[matrix_.type()](matrix_.weight + begin * size, end - begin, 1 / divisor(),
                                          out + begin * size);
  }

 private:
  Vector& p() { return matrix_.transposed() ? v_ : u_; }
  Vector& q() { return matrix_.transposed() ? u_ : v_; }

  char* cleared_part(int64_t c) {
    const int64_t bytes = matrix_.elements() * matrix_.width();
    char* const part = parts_.data() + c * bytes;
    if (bytes > 0) std::memset(part, 0, bytes);
    return part;
  }

  Doubles sum_of_parts() const {
    Doubles sum(matrix_.elements());
    power_kernels().sum_parts[matrix_.wide()](parts_.data(), chunks_, matrix_.elements(), sum.data());
    return sum;
  }

  Doubles product() const {
    Doubles values(matrix_.lines());
    power_kernels().sum_parts[matrix_.wide()](product_.data(), 1, matrix_.lines(), values.data());
    return values;
  }

  // x = product / max(|product|, eps), as it was where that is not to be had. What the product was multiplied by, or 0.
  double normalize(const Doubles& product, Vector& x) const {
    const int64_t n = x.size();
    const double norm = power_kernels().norm(product.data(), n);
    if (!(norm > 0) || std::isinf(norm)) return 0;
    const double factor = 1 / std::max(norm, eps_);
    if (std::isinf(factor)) {
      for (int64_t i = 0; i < n; ++i) x.values[i] = product[i] / norm;
      return 0;
    }
    x.values = product;
    power_kernels().multiply(x.values.data(), n, factor);
    return factor;
  }

  // sigma is the product with the vector that it is normalised into; without steps, with the vector as it was given.
  void finish_second(const Doubles& product, Vector& x, bool iterating = true) {
    if (iterating) normalize(product, x);
    sigma_ = power_kernels().dot(product.data(), x.values.data(), x.size());
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
    power_kernels().multiply(product.data(), q().size(), factor);
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

Tensor tensor_of(const Doubles& values, ScalarType dtype) {
  const int64_t n = values.size();
  Tensor result = empty_contiguous(&n, 1, dtype);
  power_kernels().narrow[type_of(dtype)](values.data(), n, result.mutable_data_ptr());
  return result;
}

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

// sigma, u and v behind each other: what the gradient needs, as one tensor.
void pack(const Iteration& matrix, const Tensor& all) {
  const int64_t rows = matrix.u().size(), columns = matrix.v().size();
  const ScalarType dtype = all.scalar_type();
  const auto narrow = power_kernels().narrow[type_of(dtype)];
  const double sigma = matrix.sigma();
  char* const to = static_cast<char*>(all.mutable_data_ptr());
  narrow(&sigma, 1, to);
  narrow(matrix.u().values.data(), rows, to + bytes_of(dtype));
  narrow(matrix.v().values.data(), columns, to + (1 + rows) * bytes_of(dtype));
}

void write(const Vector& x, const Tensor& to) {
  power_kernels().narrow[type_of(to.scalar_type())](x.values.data(), x.size(), to.mutable_data_ptr());
}

}  // namespace

int64_t counted_from_the_front(const Tensor& weight, int64_t dim) {
  PYGEN_CHECK(weight.dim() >= 2 && dim >= -weight.dim() && dim < weight.dim(),
              "power_iteration: weight must have at least 2 dimensions, ", dim, " among them, got ",
              shape_string(weight));
  return dim < 0 ? dim + weight.dim() : dim;
}

void check_power_iteration(const Tensors& weights, const Tensors& us, const Tensors& vs,
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

std::tuple<Tensor, Tensors, Tensors, Tensors> power_iteration(const Tensors& weights, const Tensors& us,
                                                              const Tensors& vs, const std::vector<int64_t>& dims,
                                                              int64_t n_iterations, double eps, bool u_first,
                                                              bool return_weights) {
  check_power_iteration(weights, us, vs, dims);
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

SpectralWeights empty_for_spectral_weights(const Tensors& weights, const Tensors& us, const Tensors& vs) {
  SpectralWeights results;
  for (const Tensor& weight : weights) results.normalized.push_back(empty_contiguous_like(weight));
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t size = 1 + us[i].numel() + vs[i].numel();
    results.saved.push_back(empty_contiguous(&size, 1, compute_dtype(weights[i].scalar_type())));
  }
  return results;
}

void spectral_weights(const Tensors& weights, const Tensors& us, const Tensors& vs, const std::vector<int64_t>& dims,
                      int64_t n_iterations, double eps, const SpectralWeights& results) {
  std::vector<Iteration> all;
  all.reserve(weights.size());
  std::vector<char*> out;
  for (size_t i = 0; i < weights.size(); ++i) {
    all.emplace_back(made_contiguous(weights[i]), us[i], vs[i], counted_from_the_front(weights[i], dims[i]), eps, true);
    out.push_back(static_cast<char*>(results.normalized[i].mutable_data_ptr()));
  }
  run_all(all, n_iterations, out);
  for (size_t i = 0; i < weights.size(); ++i) {
    pack(all[i], results.saved[i]);
    if (n_iterations > 0) write(all[i].u(), us[i]), write(all[i].v(), vs[i]);
  }
}

}  // namespace pygen

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, m) { m.impl("power_iteration", TORCH_BOX(&pygen::power_iteration)); }
