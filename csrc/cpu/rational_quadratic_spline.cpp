// Rational-quadratic splines of one chunk of elements. The parameters are turned so that a vector holds one bin of many
// elements, and stay in the first-level cache from then on: softmax, search, formula, and in the backward pass the
// gradients of all bins. Of the derivatives only the two at the chosen bin are read.
#include "rational_quadratic_spline.h"

#include "math.h"

PYGEN_BEGIN_LEVEL

constexpr int64_t kChunk = kSplineChunk;

template <typename T>
constexpr int64_t kGroup = kSideBySide * VecOf<T>::lanes;  // elements that are computed side by side

// ---- reading ---------------------------------------------------------------------------------------------------------

// Where the elements start, ..., start + n - 1 lie; behind them, the last one again, so that every chunk is full.
PYGEN_INLINE void offsets_of(const SplineOperand& operand, int64_t start, int64_t n, int64_t* offsets) {
  const int inner = operand.dims - 1;
  int64_t at[kMaxSplineDims], rest = start, offset = 0;
  for (int d = inner; d >= 0; --d) {
    at[d] = d > 0 ? rest % operand.size[d] : rest;
    rest /= operand.size[d];
    offset += at[d] * operand.stride[d];
  }
  for (int64_t i = 0; i < n;) {
    int64_t run = operand.size[inner] - at[inner];
    run = run < n - i ? run : n - i;
    for (int64_t j = 0; j < run; ++j) offsets[i + j] = offset + j * operand.stride[inner];
    i += run;
    if (i == n) break;
    // Carry: the inner dimension is through, the next one moves on.
    offset -= at[inner] * operand.stride[inner];
    at[inner] = 0;
    for (int d = inner - 1; d >= 0; --d) {
      offset += operand.stride[d];
      if (++at[d] < operand.size[d]) break;
      offset -= at[d] * operand.stride[d];
      at[d] = 0;
    }
  }
  for (int64_t i = n; i < kChunk; ++i) offsets[i] = offsets[n - 1];
}

PYGEN_INLINE bool is_run(const int64_t* offsets) {
  int64_t gaps = 0;
  for (int64_t i = 0; i < kChunk; ++i) gaps |= offsets[i] - offsets[0] - i;
  return gaps == 0;
}

template <typename In>
void fetch_elements(const SplineOperand& operand, int64_t start, int64_t n, compute_t<In>* out) {
  if (!operand.data) {
    for (int64_t i = 0; i < kChunk; ++i) out[i] = 0;
    return;
  }
  const In* data = static_cast<const In*>(operand.data);
  if (operand.dims == 1 && operand.stride[0] == 1 && n == kChunk) {
    for (int64_t i = 0; i < kChunk; ++i) out[i] = widen(data[start + i]);
    return;
  }
  int64_t offsets[kChunk];
  offsets_of(operand, start, n, offsets);
  for (int64_t i = 0; i < kChunk; ++i) out[i] = widen(data[offsets[i]]);
}

// Four neighbouring columns of as many rows as a vector has lanes, turned: out[c] holds column c. In AVX, shuffles work
// within quarters (halves) of a vector, so row r + 4 q is put in quarter q; then four vectors of four-by-four blocks are
// turned in place, and the rows come out in their order.
#if PYGEN_VECTOR_BYTES == 64
PYGEN_INLINE f32v four_rows(const float* a, const float* b, const float* c, const float* d) {
  const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(a)), _mm_loadu_ps(b), 1);
  const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(c)), _mm_loadu_ps(d), 1);
  return (f32v)_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}
PYGEN_INLINE void quarters(f32v v, float* a, float* b, float* c, float* d) {
  _mm_storeu_ps(a, _mm512_castps512_ps128((__m512)v));
  _mm_storeu_ps(b, _mm512_extractf32x4_ps((__m512)v, 1));
  _mm_storeu_ps(c, _mm512_extractf32x4_ps((__m512)v, 2));
  _mm_storeu_ps(d, _mm512_extractf32x4_ps((__m512)v, 3));
}
PYGEN_INLINE void turn(f32v* v) {
  const __m512 a = _mm512_unpacklo_ps((__m512)v[0], (__m512)v[1]), b = _mm512_unpackhi_ps((__m512)v[0], (__m512)v[1]);
  const __m512 c = _mm512_unpacklo_ps((__m512)v[2], (__m512)v[3]), d = _mm512_unpackhi_ps((__m512)v[2], (__m512)v[3]);
  v[0] = (f32v)_mm512_shuffle_ps(a, c, 0x44);
  v[1] = (f32v)_mm512_shuffle_ps(a, c, 0xee);
  v[2] = (f32v)_mm512_shuffle_ps(b, d, 0x44);
  v[3] = (f32v)_mm512_shuffle_ps(b, d, 0xee);
}
PYGEN_INLINE f32v read_rows(const float* const* row, int64_t column, int r) {
  return four_rows(row[r] + column, row[r + 4] + column, row[r + 8] + column, row[r + 12] + column);
}
PYGEN_INLINE void write_rows(f32v v, float* out, int64_t stride, int r) {
  quarters(v, out + r * stride, out + (r + 4) * stride, out + (r + 8) * stride, out + (r + 12) * stride);
}
#define PYGEN_TURNS_ROWS 1
#elif PYGEN_VECTOR_BYTES == 32
PYGEN_INLINE void turn(f32v* v) {
  const __m256 a = _mm256_unpacklo_ps((__m256)v[0], (__m256)v[1]), b = _mm256_unpackhi_ps((__m256)v[0], (__m256)v[1]);
  const __m256 c = _mm256_unpacklo_ps((__m256)v[2], (__m256)v[3]), d = _mm256_unpackhi_ps((__m256)v[2], (__m256)v[3]);
  v[0] = (f32v)_mm256_shuffle_ps(a, c, 0x44);
  v[1] = (f32v)_mm256_shuffle_ps(a, c, 0xee);
  v[2] = (f32v)_mm256_shuffle_ps(b, d, 0x44);
  v[3] = (f32v)_mm256_shuffle_ps(b, d, 0xee);
}
PYGEN_INLINE f32v read_rows(const float* const* row, int64_t column, int r) {
  const __m256 low = _mm256_castps128_ps256(_mm_loadu_ps(row[r] + column));
  return (f32v)_mm256_insertf128_ps(low, _mm_loadu_ps(row[r + 4] + column), 1);
}
PYGEN_INLINE void write_rows(f32v v, float* out, int64_t stride, int r) {
  _mm_storeu_ps(out + r * stride, _mm256_castps256_ps128((__m256)v));
  _mm_storeu_ps(out + (r + 4) * stride, _mm256_extractf128_ps((__m256)v, 1));
}
#define PYGEN_TURNS_ROWS 1
#else
#define PYGEN_TURNS_ROWS 0
#endif

#if PYGEN_TURNS_ROWS
// Columns 0, ..., done - 1 of every row into out[column][element]; returns done.
PYGEN_INLINE int64_t turn_in(const float* data, const int64_t* offsets, int64_t bins, float* out) {
  constexpr int lanes = VecOf<float>::lanes;
  const int64_t whole = bins / 4 * 4;
  if (whole == 0) return 0;
  for (int64_t i = 0; i < kChunk; i += lanes) {
    const float* row[lanes];
    for (int r = 0; r < lanes; ++r) row[r] = data + offsets[i + r];
    for (int64_t column = 0; column < whole; column += 4) {
      f32v v[4];
      for (int r = 0; r < 4; ++r) v[r] = read_rows(row, column, r);
      turn(v);
      for (int r = 0; r < 4; ++r) store(out + (column + r) * kChunk + i, v[r]);
    }
  }
  return whole;
}

PYGEN_INLINE int64_t turn_out(const float* values, int64_t bins, float* out) {
  constexpr int lanes = VecOf<float>::lanes;
  const int64_t whole = bins / 4 * 4;
  for (int64_t i = 0; i < kChunk; i += lanes) {
    for (int64_t column = 0; column < whole; column += 4) {
      f32v v[4];
      for (int r = 0; r < 4; ++r) v[r] = load(values + (column + r) * kChunk + i);
      turn(v);
      for (int r = 0; r < 4; ++r) write_rows(v[r], out + i * bins + column, bins, r);
    }
  }
  return whole;
}
#else
PYGEN_INLINE int64_t turn_in(const float*, const int64_t*, int64_t, float*) { return 0; }
PYGEN_INLINE int64_t turn_out(const float*, int64_t, float*) { return 0; }
#endif
template <typename In>
PYGEN_INLINE int64_t turn_in(const In*, const int64_t*, int64_t, compute_t<In>*) {
  return 0;
}
template <typename Out>
PYGEN_INLINE int64_t turn_out(const compute_t<Out>*, int64_t, Out*) {
  return 0;
}

// A parameter's bins into out[bin][element].
template <typename In>
void fetch_bins(const SplineOperand& operand, int64_t start, int64_t n, int64_t bins, compute_t<In>* __restrict out) {
  const In* data = static_cast<const In*>(operand.data);
  int64_t offsets[kChunk];
  offsets_of(operand, start, n, offsets);
  if (operand.bin_stride != 1 && is_run(offsets)) {
    for (int64_t k = 0; k < bins; ++k) {
      const In* from = data + offsets[0] + k * operand.bin_stride;
      for (int64_t i = 0; i < kChunk; ++i) out[k * kChunk + i] = widen(from[i]);
    }
    return;
  }
  const int64_t done = operand.bin_stride == 1 ? turn_in(data, offsets, bins, out) : 0;
  if (done == bins) return;
  for (int64_t i = 0; i < kChunk; ++i) {
    const In* row = data + offsets[i];
    for (int64_t k = done; k < bins; ++k) out[k * kChunk + i] = widen(row[k * operand.bin_stride]);
  }
}

// ---- writing ---------------------------------------------------------------------------------------------------------

template <typename Out>
void put_elements(const compute_t<Out>* values, int64_t start, int64_t n, void* out) {
  Out* to = static_cast<Out*>(out) + start;
  for (int64_t i = 0; i < n; ++i) narrow(values[i], to + i);
}

template <typename Out>
void put_bins(const compute_t<Out>* __restrict values, int64_t start, int64_t n, int64_t bins, void* out) {
  Out* to = static_cast<Out*>(out) + start * bins;
  const int64_t done = n == kChunk ? turn_out(values, bins, to) : 0;
  if (done == bins) return;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = done; k < bins; ++k) narrow(values[k * kChunk + i], to + i * bins + k);
}

// ---- the chosen bin --------------------------------------------------------------------------------------------------

// What is known of every element of a chunk. `before` and `own` are softmax values still to be multiplied by `per_total`.
template <typename T>
struct AxisChunk {
  alignas(64) T per_total[kChunk], before[kChunk], own[kChunk];
};

template <typename T>
struct Chunk {
  alignas(64) T x[kChunk], index[kChunk], raw_left[kChunk], raw_right[kChunk];
  AxisChunk<T> horizontal, vertical;
};

template <typename T>
struct AxisScale {
  T bound, smallest, rest;  // B, 2 B m, 2 B (1 - K m)
};

template <typename T>
PYGEN_INLINE AxisScale<T> axis_scale(const SplineTask& task, double smallest) {
  const double length = 2 * task.tail_bound;
  return {static_cast<T>(task.tail_bound), static_cast<T>(length * smallest),
          static_cast<T>(length * (1 - smallest * static_cast<double>(task.bins)))};
}

// e^(u - max) in place of u, and its sum.
template <typename T>
void exponentials(T* __restrict u, int64_t bins, T* __restrict total) {
  using V = typename VecOf<T>::vec;
  constexpr int lanes = VecOf<T>::lanes;
  for (int64_t i = 0; i < kChunk; i += kGroup<T>) {
    V top[kSideBySide], sum[kSideBySide];
    for (int g = 0; g < kSideBySide; ++g) {
      top[g] = load(u + i + g * lanes);
      sum[g] = V{};
    }
    for (int64_t k = 1; k < bins; ++k)
      for (int g = 0; g < kSideBySide; ++g) top[g] = at_least(load(u + k * kChunk + i + g * lanes), top[g]);
    for (int64_t k = 0; k < bins; ++k) {
#pragma GCC unroll 4
      for (int g = 0; g < kSideBySide; ++g) {
        const int64_t at = k * kChunk + i + g * lanes;
        const V e = exp_of_negative(load(u + at) - top[g]);
        sum[g] += e;
        store(u + at, e);
      }
    }
    for (int g = 0; g < kSideBySide; ++g) store(total + i + g * lanes, sum[g]);
  }
}

// 1 / total of both axes, by one division: the totals are between 1 and the number of bins.
template <typename T>
void invert_totals(T* __restrict a, T* __restrict b) {
  for (int64_t i = 0; i < kChunk; i += VecOf<T>::lanes) {
    const auto of_a = load(a + i), of_b = load(b + i), per_both = 1 / (of_a * of_b);
    store(a + i, per_both * of_b);
    store(b + i, per_both * of_a);
  }
}

// The last bin that begins at or before x, and what lies before it on both axes. Inner knots only: x outside falls into
// the first or the last bin.
template <typename T>
void search(const T* __restrict x, const T* __restrict searched, const T* __restrict other, int64_t bins,
            const AxisScale<T>& scale, AxisChunk<T>& along, AxisChunk<T>& across, T* __restrict index) {
  using V = typename VecOf<T>::vec;
  constexpr int lanes = VecOf<T>::lanes, kPair = 2;  // more do not fit the registers
  for (int64_t i = 0; i < kChunk; i += kPair * lanes) {
    V at[kPair], factor[kPair], sum[kPair], sum_across[kPair];
    V before[kPair], own[kPair], before_across[kPair], own_across[kPair], chosen[kPair];
    for (int g = 0; g < kPair; ++g) {
      const int64_t j = i + g * lanes;
      at[g] = load(x + j);
      factor[g] = scale.rest * load(along.per_total + j);
      sum[g] = own[g] = load(searched + j);
      sum_across[g] = own_across[g] = load(other + j);
      before[g] = before_across[g] = chosen[g] = V{};
    }
    T edge = -scale.bound, number = 0;
    for (int64_t k = 1; k < bins; ++k) {
      edge += scale.smallest;
      number += 1;
      for (int g = 0; g < kPair; ++g) {
        const int64_t j = k * kChunk + i + g * lanes;
        const V e = load(searched + j), e_across = load(other + j);
        const auto reached = at[g] >= sum[g] * factor[g] + edge;
        before[g] = reached ? sum[g] : before[g];
        own[g] = reached ? e : own[g];
        before_across[g] = reached ? sum_across[g] : before_across[g];
        own_across[g] = reached ? e_across : own_across[g];
        chosen[g] = reached ? V{} + number : chosen[g];
        sum[g] += e;
        sum_across[g] += e_across;
      }
    }
    for (int g = 0; g < kPair; ++g) {
      const int64_t j = i + g * lanes;
      store(along.before + j, before[g]);
      store(along.own + j, own[g]);
      store(across.before + j, before_across[g]);
      store(across.own + j, own_across[g]);
      store(index + j, chosen[g]);
    }
  }
}

// Which raw derivatives belong to the left and the right knot of a bin. With linear tails the outer knots have none:
// there a neighbour is named, without a branch, and its value and gradient are overruled by the formula.
struct KnotIndices {
  int64_t left, right;
};

PYGEN_INLINE KnotIndices knots_of(int64_t bin, int64_t bins, SplineTails tails) {
  if (tails == SplineTails::kLinear) return {bin > 0 ? bin - 1 : 0, bin + 1 < bins ? bin : bin - 1};
  if (tails == SplineTails::kCircular) return {bin, bin + 1 < bins ? bin + 1 : 0};
  return {bin, bin + 1};
}

// Two gathers for each vector of elements, where these lie at one distance from each other; false where they do not.
template <typename In>
PYGEN_INLINE bool gather_knots(const SplineTask&, int64_t, int64_t, Chunk<compute_t<In>>&) {
  return false;
}

#if PYGEN_TURNS_ROWS
#if PYGEN_VECTOR_BYTES == 64
PYGEN_INLINE f32v values_at(const float* p, i32v at) { return (f32v)_mm512_i32gather_ps((__m512i)at, p, 4); }
#else
PYGEN_INLINE f32v values_at(const float* p, i32v at) { return (f32v)_mm256_i32gather_ps(p, (__m256i)at, 4); }
#endif

template <>
inline bool gather_knots<float>(const SplineTask& task, int64_t start, int64_t n, Chunk<float>& chunk) {
  const SplineOperand& operand = task.derivatives;
  constexpr int64_t kFar = int64_t{1} << 24;  // 64 elements and as many bins of these strides fit 32 bits
  const int64_t step = operand.stride[0], bin = operand.bin_stride;
  if (operand.dims > 1 || step > kFar || step < -kFar || bin * task.bins > kFar || bin < 0) return false;
  const float* data = static_cast<const float*>(operand.data) + start * step;
  const int32_t bins = static_cast<int32_t>(task.bins), last = static_cast<int32_t>(n - 1);
  i32v lane;
  for (int i = 0; i < VecOf<float>::lanes; ++i) lane[i] = i;
  for (int32_t i = 0; i < kChunk; i += VecOf<float>::lanes) {
    const i32v number = __builtin_convertvector(load(chunk.index + i), i32v);
    const i32v element = lane + i;
    const i32v row = (element < last ? element : i32v{} + last) * static_cast<int32_t>(step);
    i32v left = number, right = number + 1;
    if (task.tails == SplineTails::kLinear) {
      left = number > 0 ? number - 1 : i32v{};
      right = number + 1 < bins ? number : number - 1;
    } else if (task.tails == SplineTails::kCircular) {
      right = right < bins ? right : i32v{};
    }
    store(chunk.raw_left + i, values_at(data, row + left * static_cast<int32_t>(bin)));
    store(chunk.raw_right + i, values_at(data, row + right * static_cast<int32_t>(bin)));
  }
  return true;
}
#endif

template <typename In>
void fetch_knots(const SplineTask& task, int64_t start, int64_t n, Chunk<compute_t<In>>& chunk) {
  using T = compute_t<In>;
  const In* data = static_cast<const In*>(task.derivatives.data);
  int64_t offsets[kChunk];
  if (task.derivative_count == 0) {  // one bin with linear tails
    for (int64_t i = 0; i < kChunk; ++i) chunk.raw_left[i] = chunk.raw_right[i] = T(0);
    return;
  }
  if (gather_knots<In>(task, start, n, chunk)) return;
  offsets_of(task.derivatives, start, n, offsets);
  const int64_t bins = task.bins, stride = task.derivatives.bin_stride;
  const SplineTails tails = task.tails;
  for (int64_t i = 0; i < kChunk; ++i) {
    const KnotIndices at = knots_of(static_cast<int64_t>(chunk.index[i]), bins, tails);
    chunk.raw_left[i] = widen(data[offsets[i] + at.left * stride]);
    chunk.raw_right[i] = widen(data[offsets[i] + at.right * stride]);
  }
}

// Everything about a chunk up to the formula.
template <typename In>
void prepare(const SplineTask& task, int64_t start, int64_t n, compute_t<In>* widths, compute_t<In>* heights,
             Chunk<compute_t<In>>& chunk) {
  using T = compute_t<In>;
  fetch_elements<In>(task.x, start, n, chunk.x);
  fetch_bins<In>(task.widths, start, n, task.bins, widths);
  fetch_bins<In>(task.heights, start, n, task.bins, heights);
  exponentials(widths, task.bins, chunk.horizontal.per_total);
  exponentials(heights, task.bins, chunk.vertical.per_total);
  invert_totals(chunk.horizontal.per_total, chunk.vertical.per_total);
  if (task.inverse) {
    search(chunk.x, heights, widths, task.bins, axis_scale<T>(task, task.min_bin_height), chunk.vertical,
           chunk.horizontal, chunk.index);
  } else {
    search(chunk.x, widths, heights, task.bins, axis_scale<T>(task, task.min_bin_width), chunk.horizontal,
           chunk.vertical, chunk.index);
  }
  fetch_knots<In>(task, start, n, chunk);
}

// ---- the formula -----------------------------------------------------------------------------------------------------

template <typename T>
struct Options {
  AxisScale<T> horizontal, vertical;
  T last_bin, min_derivative;
  T log_from;  // |x| from here on has the tail's log-slope
  bool ends_given;
};

template <typename T>
PYGEN_INLINE Options<T> options_of(const SplineTask& task) {
  Options<T> options{axis_scale<T>(task, task.min_bin_width), axis_scale<T>(task, task.min_bin_height),
                     static_cast<T>(task.bins - 1),           static_cast<T>(task.min_derivative),
                     static_cast<T>(task.tail_bound),         task.tails == SplineTails::kLinear};
  // On the bound itself a circular spline has its own slope: its tail begins one number further out.
  if (task.tails == SplineTails::kCircular) {
    typename VecOf<T>::ivec bits{};
    memcpy(&bits, &options.log_from, sizeof(T));
    bits += 1;
    memcpy(&options.log_from, &bits, sizeof(T));
  }
  return options;
}

// Names as in pygen/reference/rational_quadratic_spline.py.
template <typename V>
struct Place {
  V x, inside, xi, rest;  // rest = 1 - xi
  V width, per_width, height, slope, start, base, left, right;
};

template <typename V>
PYGEN_INLINE V within(V x, V low, V high) {
  return at_most(at_least(x, low), high);
}

// xi where the spline has risen by the share r of its bin's height, by the form of the root that does not cancel.
template <typename V>
PYGEN_INLINE V solve(V r, V slope, V left, V right) {
  const V bend = left + right - 2 * slope;
  const V a = slope - left + r * bend, b = left - r * bend;
  const V root = square_root(at_least(b * b + 4 * a * slope * r, V{}));
  return (b >= 0 ? 2 * slope * r : root - b) / (b >= 0 ? b + root : 2 * a);
}

template <bool inverse, typename T, typename V = typename VecOf<T>::vec>
PYGEN_INLINE Place<V> place(const Chunk<T>& chunk, int64_t i, const Options<T>& o, V left, V right) {
  Place<V> at;
  const V index = load(chunk.index + i), bound = V{} + o.horizontal.bound;
  const V x_factor = o.horizontal.rest * load(chunk.horizontal.per_total + i);
  const V y_factor = o.vertical.rest * load(chunk.vertical.per_total + i);
  at.x = load(chunk.x + i);
  at.inside = within(at.x, -bound, bound);
  at.start = load(chunk.horizontal.before + i) * x_factor + (index * o.horizontal.smallest - bound);
  at.base = load(chunk.vertical.before + i) * y_factor + (index * o.vertical.smallest - bound);
  at.width = load(chunk.horizontal.own + i) * x_factor + o.horizontal.smallest;
  at.height = load(chunk.vertical.own + i) * y_factor + o.vertical.smallest;
  at.left = o.ends_given ? (index == 0 ? V{} + 1 : left) : left;
  at.right = o.ends_given ? (index == o.last_bin ? V{} + 1 : right) : right;
  at.per_width = 1 / at.width;
  at.slope = at.height * at.per_width;
  if constexpr (inverse) {
    at.xi = solve(within((at.inside - at.base) / at.height, V{}, V{} + 1), at.slope, at.left, at.right);
  } else {
    at.xi = (at.inside - at.start) * at.per_width;
  }
  at.xi = within(at.xi, V{}, V{} + 1);
  // At the bounds and beyond, the slope is the end knot's to the last bit.
  at.xi = at.x >= bound ? V{} + 1 : (at.x <= -bound ? V{} : at.xi);
  at.rest = 1 - at.xi;
  return at;
}

template <bool inverse, bool straight, typename T>
PYGEN_INLINE void formula(const Chunk<T>& chunk, int64_t i, const Options<T>& o, T* __restrict y,
                          T* __restrict log_slope) {
  using V = typename VecOf<T>::vec;
  const auto at = place<inverse>(chunk, i, o, softplus(load(chunk.raw_left + i)) + o.min_derivative,
                                 softplus(load(chunk.raw_right + i)) + o.min_derivative);
  const V p = at.xi * at.rest, square = at.xi * at.xi, bound = V{} + o.horizontal.bound;
  const V per_den = 1 / (at.slope + (at.left + at.right - 2 * at.slope) * p);
  const V ratio = at.slope * per_den;
  const V rise = at.right * square + 2 * at.slope * p + at.left * (at.rest * at.rest);
  V log_dy = log(ratio * (ratio * rise)), value;
  if constexpr (inverse) {
    value = at.start + at.width * at.xi;
  } else {
    value = at.base + at.height * ((at.slope * square + at.left * p) * per_den);
  }
  value = within(value, -bound, bound);
  const V size = absolute(at.x);
  if constexpr (straight) {
    const V end = at.x > 0 ? at.right : at.left, beyond = at.x - at.inside;
    value = size >= bound ? at.inside + (inverse ? beyond / end : beyond * end) : value;
  } else {
    value = size >= bound ? at.x : value;
    log_dy = size >= o.log_from ? V{} : log_dy;
  }
  store(y + i, value);
  store(log_slope + i, inverse ? -log_dy : log_dy);
}

template <bool inverse, bool straight, typename T>
void formulas(const Chunk<T>& chunk, const Options<T>& options, T* __restrict y, T* __restrict log_slope) {
  constexpr int lanes = VecOf<T>::lanes;
  for (int64_t i = 0; i < kChunk; i += 2 * lanes) {
#pragma GCC unroll 2
    for (int g = 0; g < 2; ++g) formula<inverse, straight>(chunk, i + g * lanes, options, y, log_slope);
  }
}

// ---- the gradients ---------------------------------------------------------------------------------------------------

// Of the start and the size of an element's bin on one axis.
template <typename T>
struct AxisGrad {
  alignas(64) T start[kChunk], size[kChunk];
};

template <typename T>
struct GradChunk {
  alignas(64) T y[kChunk], log_det[kChunk];  // incoming
  alignas(64) T x[kChunk], left[kChunk], right[kChunk];
  AxisGrad<T> horizontal, vertical;
};

template <bool inverse, bool straight, typename T>
PYGEN_INLINE void gradient(const Chunk<T>& chunk, int64_t i, const Options<T>& o, GradChunk<T>& grad) {
  using V = typename VecOf<T>::vec;
  const auto left = softplus_and_slope(load(chunk.raw_left + i));
  const auto right = softplus_and_slope(load(chunk.raw_right + i));
  const auto at = place<inverse>(chunk, i, o, left.value + o.min_derivative, right.value + o.min_derivative);
  const V bound = V{} + o.horizontal.bound, zero{};
  const auto outside = absolute(at.x) > bound;
  const V p = at.xi * at.rest, q = at.rest - at.xi, square = at.xi * at.xi;
  const V bend = at.left + at.right - 2 * at.slope;
  const V per_den = 1 / (at.slope + bend * p);
  const V rise = at.right * square + 2 * at.slope * p + at.left * (at.rest * at.rest);
  const V per_rise = 1 / rise, ratio = at.slope * per_den;
  const V rising = ratio * (ratio * rise);
  const V incoming = load(grad.y + i);
  V g = incoming, g_log = load(grad.log_det + i);
  V log_by_xi = 2 * ((at.right * at.xi + at.slope * q - at.left * at.rest) * per_rise - bend * q * per_den);
  log_by_xi = outside ? zero : log_by_xi;
  V total = zero;
  if constexpr (inverse) {
    total = (g - g_log * log_by_xi * at.per_width) / rising;
    g = -total;
    g_log = -g_log;
  }
  const V share = (at.slope * square + at.left * p) * per_den;
  const V g_height = g * at.height * per_den;
  const V by_xi = g * at.width * rising + g_log * log_by_xi;
  const V by_slope =
      g_height * (square - share * (1 - 2 * p)) + 2 * g_log * (1 / at.slope + p * per_rise - (1 - 2 * p) * per_den);
  V by_left = g_height * p * (1 - share) + g_log * (at.rest * at.rest * per_rise - 2 * p * per_den);
  V by_right = g_log * (square * per_rise - 2 * p * per_den) - g_height * share * p;
  V by_x;
  if constexpr (straight) {
    V beyond = g * (at.x - at.inside);
    if constexpr (inverse) beyond = beyond / rising;
    by_left = at.x < -bound ? by_left + beyond : by_left;
    by_right = at.x > bound ? by_right + beyond : by_right;
    by_x = inverse ? total : (outside ? g * rising : by_xi * at.per_width);
  } else {
    const V index = load(chunk.index + i);
    const auto left_given = index == (o.ends_given ? T(0) : T(-1));
    const auto right_given = index == (o.ends_given ? o.last_bin : T(-1));
    by_left = (outside | left_given) ? zero : by_left;
    by_right = (outside | right_given) ? zero : by_right;
    by_x = outside ? incoming : (inverse ? total : by_xi * at.per_width);
  }
  store(grad.x + i, by_x);
  store(grad.left + i, by_left * left.slope);
  store(grad.right + i, by_right * right.slope);
  store(grad.horizontal.start + i, outside ? zero : -by_xi * at.per_width);
  store(grad.horizontal.size + i, outside ? zero : -(at.xi * by_xi + at.slope * by_slope) * at.per_width);
  store(grad.vertical.start + i, outside ? zero : g);
  store(grad.vertical.size + i, outside ? zero : g * share + by_slope * at.per_width);
}

template <bool inverse, bool straight, typename T>
void gradients(const Chunk<T>& chunk, const Options<T>& options, GradChunk<T>& grad) {
  constexpr int lanes = VecOf<T>::lanes;
  for (int64_t i = 0; i < kChunk; i += 2 * lanes) {
#pragma GCC unroll 2
    for (int g = 0; g < 2; ++g) gradient<inverse, straight>(chunk, i + g * lanes, options, grad);
  }
}

// The gradients of the raw sizes of one axis, in place of their exponentials: with the probabilities p = e / total and
// the share's gradient h_j = start for the bins before the chosen one and size for itself, p_j (h_j - sum p h).
template <typename T>
void spread(T* __restrict e, int64_t bins, const AxisScale<T>& scale, const AxisChunk<T>& axis, const AxisGrad<T>& grad,
            const T* __restrict index) {
  using V = typename VecOf<T>::vec;
  constexpr int lanes = VecOf<T>::lanes, kPair = 2;
  for (int64_t i = 0; i < kChunk; i += kPair * lanes) {
    V factor[kPair], by_start[kPair], by_size[kPair], rest[kPair], chosen[kPair];
    for (int g = 0; g < kPair; ++g) {
      const int64_t j = i + g * lanes;
      const V per_total = load(axis.per_total + j), start = load(grad.start + j), size = load(grad.size + j);
      const V mean = (start * load(axis.before + j) + size * load(axis.own + j)) * per_total;
      factor[g] = scale.rest * per_total;
      by_start[g] = start - mean;
      by_size[g] = size - mean;
      rest[g] = -mean;
      chosen[g] = load(index + j);
    }
    T number = 0;
    for (int64_t k = 0; k < bins; ++k) {
      for (int g = 0; g < kPair; ++g) {
        const int64_t j = k * kChunk + i + g * lanes;
        const V by = chosen[g] > number ? by_start[g] : (chosen[g] == number ? by_size[g] : rest[g]);
        store(e + j, load(e + j) * factor[g] * by);
      }
      number += 1;
    }
  }
}

template <typename Out>
void put_knots(const SplineTask& task, const Chunk<compute_t<Out>>& chunk, const GradChunk<compute_t<Out>>& grad,
               int64_t start, int64_t n) {
  using T = compute_t<Out>;
  const int64_t count = task.derivative_count, bins = task.bins;
  if (count == 0) return;
  const SplineTails tails = task.tails;
  Out* row = static_cast<Out*>(task.grad_derivatives) + start * count;
  memset(row, 0, n * count * sizeof(Out));
  for (int64_t i = 0; i < n; ++i, row += count) {
    const KnotIndices at = knots_of(static_cast<int64_t>(chunk.index[i]), bins, tails);
    const T left = grad.left[i], right = grad.right[i];
    // Both knots have the same derivative where one is an outer one, whose gradient is 0, and in a circle of one bin.
    narrow(right, row + at.right);
    narrow(at.left == at.right ? left + right : left, row + at.left);
  }
}

// ---- chunks ----------------------------------------------------------------------------------------------------------

#define PYGEN_BY_MODE(task, function, ...)                                                                            \
  (task).inverse                                                                                                      \
      ? ((task).tails == SplineTails::kNone ? function<true, true>(__VA_ARGS__) : function<true, false>(__VA_ARGS__)) \
      : ((task).tails == SplineTails::kNone ? function<false, true>(__VA_ARGS__)                                      \
                                            : function<false, false>(__VA_ARGS__))

template <typename In>
void forward(const SplineTask& task, int64_t begin, int64_t end, void* scratch) {
  using T = compute_t<In>;
  T *widths = static_cast<T*>(scratch), *heights = widths + task.bins * kChunk;
  const Options<T> options = options_of<T>(task);
  Chunk<T> chunk;
  alignas(64) T y[kChunk], log_slope[kChunk];
  for (int64_t start = begin * kChunk; start < end * kChunk; start += kChunk) {
    const int64_t n = task.elements - start < kChunk ? task.elements - start : kChunk;
    prepare<In>(task, start, n, widths, heights, chunk);
    PYGEN_BY_MODE(task, formulas, chunk, options, y, log_slope);
    put_elements<In>(y, start, n, task.y);
    put_elements<T>(log_slope, start, n, task.log_det);
  }
}

template <typename In>
void backward(const SplineTask& task, int64_t begin, int64_t end, void* scratch) {
  using T = compute_t<In>;
  T *widths = static_cast<T*>(scratch), *heights = widths + task.bins * kChunk;
  const Options<T> options = options_of<T>(task);
  Chunk<T> chunk;
  GradChunk<T> grad;
  for (int64_t start = begin * kChunk; start < end * kChunk; start += kChunk) {
    const int64_t n = task.elements - start < kChunk ? task.elements - start : kChunk;
    prepare<In>(task, start, n, widths, heights, chunk);
    fetch_elements<In>(task.grad_y, start, n, grad.y);
    fetch_elements<T>(task.grad_log_det, start, n, grad.log_det);
    PYGEN_BY_MODE(task, gradients, chunk, options, grad);
    put_elements<In>(grad.x, start, n, task.grad_x);
    put_knots<In>(task, chunk, grad, start, n);
    spread(widths, task.bins, options.horizontal, chunk.horizontal, grad.horizontal, chunk.index);
    put_bins<In>(widths, start, n, task.bins, task.grad_widths);
    spread(heights, task.bins, options.vertical, chunk.vertical, grad.vertical, chunk.index);
    put_bins<In>(heights, start, n, task.bins, task.grad_heights);
  }
}

extern const SplineKernels spline_kernels = {{forward<float>, forward<double>, forward<bf16>, forward<f16>},
                                             {backward<float>, backward<double>, backward<bf16>, backward<f16>}};

PYGEN_END_LEVEL
