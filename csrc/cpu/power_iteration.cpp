// Products of a matrix with vectors from both sides. Called by csrc/power_iteration.cpp.
//
// The matrix is what costs: it comes from memory, vectors lie in the first- and second-level caches. Lines are taken
// kLines at a time: so many sums are under way at once, and a vector is read once for all of them. A block of columns for
// the products in the other order (W^T p before W q) was no faster than two passes: its second reading, from the
// second-level cache, took as long as the first.
#include "power_iteration.h"

#include "vec.h"

PYGEN_BEGIN_LEVEL

namespace {

// Registers hold the sums of so many lines: 32 of them with AVX-512, 16 without.
constexpr int kLines = PYGEN_VECTOR_BYTES == 64 ? 8 : 4;
// Sums of a piece are in the type itself, of pieces in float64. 16-bit lines are widened piece by piece, kLines of them
// into 32 KB.
constexpr int64_t kPiece = 1024;
// Bytes that elementwise loops ask for ahead of where they read and write. What is written must be fetched as well, and the
// hardware does not see that coming: asked for, W / sigma of 4 and 9 MB takes 0.7 to 0.8 of the time.
constexpr int64_t kReadAhead = 4096, kWriteAhead = 2048;

// sum[r] += W_r . q for R lines that are `stride` apart.
template <int R, typename C>
PYGEN_INLINE void dot_lines(const C* w, int64_t stride, int64_t n, const C* q, typename VecOf<C>::vec* sum) {
  constexpr int lanes = VecOf<C>::lanes;
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) {
    const auto x = load(q + j);
    for (int r = 0; r < R; ++r) sum[r] += load(w + r * stride + j) * x;
  }
  if (j < n) {
    const auto x = load_some(q + j, n - j, C(0));
    for (int r = 0; r < R; ++r) sum[r] += load_some(w + r * stride + j, n - j, C(0)) * x;
  }
}

// t += sum_r p[r] W_r
template <int R, typename C>
PYGEN_INLINE void add_lines(const C* w, int64_t stride, int64_t n, const C* p, C* t) {
  using V = typename VecOf<C>::vec;
  constexpr int lanes = VecOf<C>::lanes;
  V factor[R];
  for (int r = 0; r < R; ++r) factor[r] = splat(p[r]);
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) {
    V y = load(t + j);
    for (int r = 0; r < R; ++r) y += load(w + r * stride + j) * factor[r];
    store(t + j, y);
  }
  if (j < n) {
    V y = load_some(t + j, n - j, C(0));
    for (int r = 0; r < R; ++r) y += load_some(w + r * stride + j, n - j, C(0)) * factor[r];
    store_some(t + j, y, n - j);
  }
}

// R lines of a matrix as they are computed with, from element j on: where they lie, or, of the 16-bit types, widened.
template <typename C>
struct Piece {
  const C* lines;
  int64_t stride;
};

template <int R, typename T>
PYGEN_INLINE Piece<compute_t<T>> piece_of(const T* w, int64_t stride, int64_t n, compute_t<T>* buffer) {
  if constexpr (sizeof(T) == 2) {
    for (int r = 0; r < R; ++r) gather(w + r * stride, 1, n, buffer + r * kPiece);
    return {buffer, kPiece};
  } else {
    return {w, stride};
  }
}

template <int R, typename T>
void dot_and_add(const T* w, int64_t n, const compute_t<T>* q, compute_t<T>* p, compute_t<T>* t) {
  compute_t<T> buffer[sizeof(T) == 2 ? R * kPiece : 1];
  f64v total[R] = {};
  for (int64_t j = 0; j < n; j += kPiece) {
    const int64_t m = n - j < kPiece ? n - j : kPiece;
    const auto piece = piece_of<R>(w + j, n, m, buffer);
    typename VecOf<compute_t<T>>::vec sum[R] = {};
    dot_lines<R>(piece.lines, piece.stride, m, q + j, sum);
    for (int r = 0; r < R; ++r) accumulate(total[r], sum[r]);
  }
  for (int r = 0; r < R; ++r) p[r] = static_cast<compute_t<T>>(sum_of_lanes(total[r]));
  if (!t) return;
  for (int64_t j = 0; j < n; j += kPiece) {
    const int64_t m = n - j < kPiece ? n - j : kPiece;
    const auto piece = piece_of<R>(w + j, n, m, buffer);
    add_lines<R>(piece.lines, piece.stride, m, p, t + j);
  }
}

template <typename T>
void lines(const void* data, int64_t count, int64_t n, const void* q, void* p, void* t) {
  using C = compute_t<T>;
  const T* w = static_cast<const T*>(data);
  const C* right = static_cast<const C*>(q);
  C *left = static_cast<C*>(p), *sum = static_cast<C*>(t);
  int64_t i = 0;
  for (; i + kLines <= count; i += kLines) dot_and_add<kLines>(w + i * n, n, right, left + i, sum);
  for (; i < count; ++i) dot_and_add<1>(w + i * n, n, right, left + i, sum);
}

template <int R, typename T>
void add(const T* w, int64_t n, const compute_t<T>* p, compute_t<T>* t) {
  compute_t<T> buffer[sizeof(T) == 2 ? R * kPiece : 1];
  for (int64_t j = 0; j < n; j += kPiece) {
    const int64_t m = n - j < kPiece ? n - j : kPiece;
    const auto piece = piece_of<R>(w + j, n, m, buffer);
    add_lines<R>(piece.lines, piece.stride, m, p, t + j);
  }
}

template <typename T>
void transposed(const void* data, int64_t count, int64_t n, const void* p, void* t) {
  using C = compute_t<T>;
  const T* w = static_cast<const T*>(data);
  const C* left = static_cast<const C*>(p);
  int64_t i = 0;
  for (; i + kLines <= count; i += kLines) add<kLines>(w + i * n, n, left + i, static_cast<C*>(t));
  for (; i < count; ++i) add<1>(w + i * n, n, left + i, static_cast<C*>(t));
}

// Once for each line of the cache, and no fault where it is beyond the end.
template <typename T>
PYGEN_INLINE void ask_ahead(const T* from, T* to) {
  __builtin_prefetch(reinterpret_cast<const char*>(from) + kReadAhead);
  __builtin_prefetch(reinterpret_cast<const char*>(to) + kWriteAhead, 1);
}

// f(i, m, to) computes the elements [i, i + m) of out into `to`: their place, or, of the 16-bit types, a buffer.
template <typename T, typename F>
PYGEN_INLINE void in_pieces(int64_t n, T* out, const F& f) {
  using C = compute_t<T>;
  C buffer[sizeof(T) == 2 ? kPiece : 1];
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t m = n - i < kPiece ? n - i : kPiece;
    if constexpr (sizeof(T) == 2) {
      f(i, m, buffer);
      scatter(buffer, 1, m, out + i);
    } else {
      f(i, m, out + i);
    }
  }
}

template <typename T>
void scale(const void* x, int64_t n, double factor, void* out) {
  using C = compute_t<T>;
  const auto by = splat(static_cast<C>(factor));
  in_pieces(n, static_cast<T*>(out), [&](int64_t i, int64_t m, C* to) {
    C buffer[sizeof(T) == 2 ? kPiece : 1];
    const C* from = piece_of<1>(static_cast<const T*>(x) + i, 0, m, buffer).lines;
    for (int64_t j = 0; j < m; j += VecOf<C>::lanes) {
      ask_ahead(from + j, to + j);
      write(to, j, m, read(from, j, m) * by);
    }
  });
}

template <typename T>
double inner(const void* a, const void* b, int64_t n) {
  using C = compute_t<T>;
  constexpr int lanes = VecOf<C>::lanes;
  C left[sizeof(T) == 2 ? kPiece : 1], right[sizeof(T) == 2 ? kPiece : 1];
  f64v total = {};
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t m = n - i < kPiece ? n - i : kPiece;
    const C* x = piece_of<1>(static_cast<const T*>(a) + i, 0, m, left).lines;
    const C* y = piece_of<1>(static_cast<const T*>(b) + i, 0, m, right).lines;
    typename VecOf<C>::vec sum[4] = {};
    int64_t j = 0;
    for (; j + 4 * lanes <= m; j += 4 * lanes)
      for (int k = 0; k < 4; ++k) sum[k] += load(x + j + k * lanes) * load(y + j + k * lanes);
    for (; j < m; j += lanes) sum[0] += read(x, j, m) * read(y, j, m);
    accumulate(total, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  return sum_of_lanes(total);
}

template <typename T>
void combine(const void* grad, int64_t n, double factor, double along, const void* q, void* out) {
  using C = compute_t<T>;
  const auto f = splat(static_cast<C>(factor)), a = splat(static_cast<C>(along));
  in_pieces(n, static_cast<T*>(out), [&](int64_t i, int64_t m, C* to) {
    C buffer[sizeof(T) == 2 ? kPiece : 1];
    const C* right = static_cast<const C*>(q) + i;
    if (!grad) {
      for (int64_t j = 0; j < m; j += VecOf<C>::lanes) write(to, j, m, read(right, j, m) * a);
      return;
    }
    const C* from = piece_of<1>(static_cast<const T*>(grad) + i, 0, m, buffer).lines;
    for (int64_t j = 0; j < m; j += VecOf<C>::lanes) {
      ask_ahead(from + j, to + j);
      write(to, j, m, read(from, j, m) * f + read(right, j, m) * a);
    }
  });
}

template <typename T>
void widen_vector(const void* x, int64_t n, double* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = widen(static_cast<const T*>(x)[i]);
}

template <typename T>
void narrow_vector(const double* x, int64_t n, void* out) {
  for (int64_t i = 0; i < n; ++i) narrow(static_cast<compute_t<T>>(x[i]), static_cast<T*>(out) + i);
}

template <typename C>
void sum_parts(const void* data, int64_t count, int64_t n, double* out) {
  const C* parts = static_cast<const C*>(data);
  for (int64_t j = 0; j < n; ++j) out[j] = count ? double(parts[j]) : 0;
  for (int64_t c = 1; c < count; ++c)
    for (int64_t j = 0; j < n; ++j) out[j] += parts[c * n + j];
}

double dot(const double* x, const double* y, int64_t n) {
  f64v sum[2] = {};
  int64_t i = 0;
  constexpr int lanes = VecOf<double>::lanes;
  for (; i + 2 * lanes <= n; i += 2 * lanes)
    for (int k = 0; k < 2; ++k) sum[k] += load(x + i + k * lanes) * load(y + i + k * lanes);
  for (; i < n; i += lanes) sum[0] += read(x, i, n) * read(y, i, n);
  return sum_of_lanes(sum[0] + sum[1]);
}

void multiply(double* x, int64_t n, double factor) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

double norm(const double* x, int64_t n) {
  const double square = dot(x, x, n);
  if (square > 1e-290 && square < 1e300) return __builtin_sqrt(square);
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double size = x[i] < 0 ? -x[i] : x[i];
    if (!(size <= largest)) largest = size;  // a NaN stays
  }
  if (!(largest > 0) || largest > 1.7976931348623157e308) return largest;
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += (x[i] / largest) * (x[i] / largest);
  return largest * __builtin_sqrt(sum);
}

}  // namespace

extern const PowerIterationKernels power_iteration_kernels = {
    {lines<float>, lines<double>, lines<bf16>, lines<f16>},
    {transposed<float>, transposed<double>, transposed<bf16>, transposed<f16>},
    {scale<float>, scale<double>, scale<bf16>, scale<f16>},
    {inner<float>, inner<double>, inner<bf16>, inner<f16>},
    {combine<float>, combine<double>, combine<bf16>, combine<f16>},
    {widen_vector<float>, widen_vector<double>, widen_vector<bf16>, widen_vector<f16>},
    {narrow_vector<float>, narrow_vector<double>, narrow_vector<bf16>, narrow_vector<f16>},
    {sum_parts<float>, sum_parts<double>},
    norm,
    dot,
    multiply,
};

PYGEN_END_LEVEL
