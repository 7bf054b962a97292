// Products of a small matrix with (channels, pixels) samples. Matrices of 4 to 100 channels are too small for a BLAS call
// a sample: here a tile of outputs stays in registers while it runs through the channels.
#include "actnorm_conv1x1.h"

#include "vec.h"

PYGEN_BEGIN_LEVEL

// ---- weight x + offset -----------------------------------------------------------------------------------------------

// `rows` rows of z, `vectors` vectors of pixels of each: as many sums side by side as hide an addition's latency.
template <int rows, int vectors, typename T>
PYGEN_INLINE void mix_tile(const T* __restrict x, const T* __restrict weight, const T* __restrict offset,
                           T* __restrict z, int64_t channels, int64_t pixels, int64_t p) {
  using V = typename VecOf<T>::vec;
  constexpr int lanes = VecOf<T>::lanes;
  V sum[rows][vectors];
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) sum[r][v] = V{} + (offset ? offset[r] : T(0));
  for (int64_t k = 0; k < channels; ++k) {
    V in[vectors];
    for (int v = 0; v < vectors; ++v)
      in[v] = vectors > 1 ? load(x + k * pixels + p + v * lanes) : read(x + k * pixels, p, pixels);
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < vectors; ++v) sum[r][v] += weight[r * channels + k] * in[v];
  }
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) {
      if (vectors > 1) {
        store(z + r * pixels + p + v * lanes, sum[r][v]);
      } else {
        write(z + r * pixels, p, pixels, sum[r][v]);
      }
    }
}

template <int rows, typename T>
PYGEN_INLINE void mix_rows(const T* x, const T* weight, const T* offset, T* z, int64_t channels, int64_t pixels) {
  constexpr int lanes = VecOf<T>::lanes, kWide = 4;
  int64_t p = 0;
  for (; p + kWide * lanes <= pixels; p += kWide * lanes)
    mix_tile<rows, kWide>(x, weight, offset, z, channels, pixels, p);
  for (; p < pixels; p += lanes) mix_tile<rows, 1>(x, weight, offset, z, channels, pixels, p);
}

template <typename T>
void mix_sample(const T* x, const T* weight, const T* offset, T* z, int64_t channels, int64_t pixels) {
  int64_t row = 0;
  // Few pixels leave one vector in a row: then more rows are needed side by side.
  if (pixels < 4 * VecOf<T>::lanes)
    for (; row + 8 <= channels; row += 8)
      mix_rows<8>(x, weight + row * channels, offset ? offset + row : offset, z + row * pixels, channels, pixels);
  for (; row + 4 <= channels; row += 4)
    mix_rows<4>(x, weight + row * channels, offset ? offset + row : offset, z + row * pixels, channels, pixels);
  for (; row < channels; ++row)
    mix_rows<1>(x, weight + row * channels, offset ? offset + row : offset, z + row * pixels, channels, pixels);
}

template <typename T>
void forward(const MixTask& task, int64_t begin, int64_t end) {
  const int64_t size = task.channels * task.pixels;
  for (int64_t b = begin; b < end; ++b)
    mix_sample(static_cast<const T*>(task.x) + b * size, static_cast<const T*>(task.weight),
               static_cast<const T*>(task.offset), static_cast<T*>(task.z) + b * size, task.channels, task.pixels);
}

// ---- g x^T -----------------------------------------------------------------------------------------------------------

template <typename T>
PYGEN_INLINE double total(typename VecOf<T>::vec v) {
  f64v sum{};
  accumulate(sum, v);
  return sum_of_lanes(sum);
}

// rows x columns elements of the sum of g[b] x[b]^T over samples.
template <int rows, int columns, typename T>
PYGEN_INLINE void outer_tile(const T* __restrict g, const T* __restrict x, int64_t samples, int64_t channels,
                             int64_t pixels, double* __restrict out) {
  using V = typename VecOf<T>::vec;
  const int64_t size = channels * pixels;
  V sum[rows][columns] = {};
  for (int64_t b = 0; b < samples; ++b, g += size, x += size) {
    for (int64_t p = 0; p < pixels; p += VecOf<T>::lanes) {
      V left[rows], right[columns];
      for (int r = 0; r < rows; ++r) left[r] = read(g + r * pixels, p, pixels);
      for (int c = 0; c < columns; ++c) right[c] = read(x + c * pixels, p, pixels);
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < columns; ++c) sum[r][c] += left[r] * right[c];
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c) out[r * channels + c] = total<T>(sum[r][c]);
}

template <int rows, typename T>
PYGEN_INLINE void outer_rows(const T* g, const T* x, int64_t samples, int64_t channels, int64_t pixels, double* out) {
  int64_t c = 0;
  for (; c + 4 <= channels; c += 4) outer_tile<rows, 4>(g, x + c * pixels, samples, channels, pixels, out + c);
  for (; c < channels; ++c) outer_tile<rows, 1>(g, x + c * pixels, samples, channels, pixels, out + c);
}

template <typename T>
void outer(const T* g, const T* x, int64_t samples, int64_t channels, int64_t pixels, double* out) {
  int64_t r = 0;
  for (; r + 4 <= channels; r += 4) outer_rows<4>(g + r * pixels, x, samples, channels, pixels, out + r * channels);
  for (; r < channels; ++r) outer_rows<1>(g + r * pixels, x, samples, channels, pixels, out + r * channels);
}

template <typename T>
void sum_of_pixels(const T* g, int64_t samples, int64_t channels, int64_t pixels, double* out) {
  for (int64_t c = 0; c < channels; ++c) {
    f64v sum{};
    for (int64_t b = 0; b < samples; ++b)
      for (int64_t p = 0; p < pixels; p += VecOf<T>::lanes)
        accumulate(sum, read(g + (b * channels + c) * pixels, p, pixels));
    out[c] = sum_of_lanes(sum);
  }
}

template <typename T>
void backward(const MixBackwardTask& task, int64_t begin, int64_t end) {
  const int64_t channels = task.channels, pixels = task.pixels, size = channels * pixels;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * task.samples_per_block, rest = task.samples - first;
    const int64_t samples = rest < task.samples_per_block ? rest : task.samples_per_block;
    const T* g = static_cast<const T*>(task.grad_z) + first * size;
    const T* x = static_cast<const T*>(task.x) + first * size;
    T* grad_x = static_cast<T*>(task.grad_x) + first * size;
    for (int64_t b = 0; b < samples; ++b)
      mix_sample<T>(g + b * size, static_cast<const T*>(task.transposed), nullptr, grad_x + b * size, channels, pixels);
    outer(g, x, samples, channels, pixels, task.grad_weight + block * channels * channels);
    sum_of_pixels(g, samples, channels, pixels, task.grad_offset + block * channels);
  }
}

// ---- the small matrices ----------------------------------------------------------------------------------------------

// to += factor * from
PYGEN_INLINE void add_row(double* __restrict to, const double* __restrict from, double factor, int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] += factor * from[j];
}

PYGEN_INLINE double dot(const double* __restrict a, const double* __restrict b, int64_t n) {
  f64v sum{};
  for (int64_t j = 0; j < n; j += VecOf<double>::lanes) sum += read(a, j, n) * read(b, j, n);
  return sum_of_lanes(sum);
}

void fold(const FoldTask& task) {
  const int64_t n = task.n;
  for (int64_t i = 0; i < n; ++i) {
    double* row = task.product + i * n;
    for (int64_t j = 0; j < n; ++j) row[j] = j < i ? 0.0 : (j == i ? task.diagonal[i] : task.upper[i * n + j]);
    for (int64_t k = 0; k < i; ++k) {
      const double factor = task.lower[i * n + k];
      row[k] += factor * task.diagonal[k];
      add_row(row + k + 1, task.upper + k * n + k + 1, factor, n - k - 1);
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    const double* row = task.product + task.order[i] * n;
    for (int64_t j = 0; j < n; ++j) task.weight[i * n + j] = row[j] * task.scale[j];
    task.offset[i] = dot(task.weight + i * n, task.bias, n);
  }
}

// A^-1 = S^-1 U^-1 L^-1 P^T by two triangular solves, rows at a time.
void fold_inverse(const FoldTask& task) {
  const int64_t n = task.n;
  for (int64_t i = 0; i < n * n; ++i) task.weight[i] = 0;
  for (int64_t i = 0; i < n; ++i) task.weight[task.order[i] * n + i] = 1;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < i; ++k) add_row(task.weight + i * n, task.weight + k * n, -task.lower[i * n + k], n);
  for (int64_t i = n - 1; i >= 0; --i) {
    double* row = task.weight + i * n;
    for (int64_t k = i + 1; k < n; ++k) add_row(row, task.weight + k * n, -task.upper[i * n + k], n);
    for (int64_t j = 0; j < n; ++j) row[j] /= task.diagonal[i];
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) task.weight[i * n + j] /= task.scale[i];
    task.offset[i] = -task.bias[i];
  }
}

// A = W S, c = A b and W = P L U, backwards; S is diagonal, and the gradient of log S_j is that of S_j times S_j.
void fold_backward(const FoldTask& task) {
  const int64_t n = task.n;
  for (int64_t j = 0; j < n; ++j) task.grad_bias[j] = task.grad_scale[j] = 0;
  double* grad_product = task.scratch;
  for (int64_t i = 0; i < n; ++i) {
    const double* weight = task.weight + i * n;
    double* grad = task.grad_weight + i * n;
    double* to = grad_product + task.order[i] * n;
    for (int64_t j = 0; j < n; ++j) {
      grad[j] += task.grad_offset[i] * task.bias[j];
      task.grad_bias[j] += task.grad_offset[i] * weight[j];
      task.grad_scale[j] += grad[j] * weight[j];
      to[j] = grad[j] * task.scale[j];
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    // of L: grad_product U^T below the diagonal; row k of U begins at its diagonal.
    for (int64_t k = 0; k < n; ++k) {
      const double* from = grad_product + i * n;
      task.grad_lower[i * n + k] =
          k < i ? from[k] * task.diagonal[k] + dot(from + k + 1, task.upper + k * n + k + 1, n - k - 1) : 0.0;
    }
  }
  // of U: L^T grad_product on and above the diagonal.
  for (int64_t k = 0; k < n; ++k) {
    double* row = task.grad_upper + k * n;
    for (int64_t j = 0; j < n; ++j) row[j] = grad_product[k * n + j];
    for (int64_t i = k + 1; i < n; ++i) add_row(row + k, grad_product + i * n + k, task.lower[i * n + k], n - k);
    task.grad_diagonal[k] = row[k];
    for (int64_t j = 0; j <= k; ++j) row[j] = 0;
  }
}

extern const MixKernels mix_kernels = {
    {forward<float>, forward<double>}, {backward<float>, backward<double>}, fold, fold_inverse, fold_backward};

PYGEN_END_LEVEL
