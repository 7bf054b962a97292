// cumax of one row: the maximum, the exponentials, and a scan. Each pass finds the row in cache; memory is read once and
// written once.
//
// Three things make the result exact:
// - e^x is not computed from x - max, which rounds, but as e^x 2^-N with one N for the row, which does not.
// - Sums are kept in float64.
// - The scan adds to each half of a block the total of the half before it (Sklansky's network). Rounding is monotone, so
//   the sums are monotone; the usual network (Kogge-Stone) adds the same numbers in different orders and is not.
#include "cumax.h"

#include "exponentials.h"

PYGEN_BEGIN_LEVEL

// ---- scans of one vector ---------------------------------------------------------------------------------------------
// shift_front(v, fill): (fill, v0, v1, ...); shift_back(v, fill): (v1, v2, ..., fill); fill has the same value in all lanes.

#if PYGEN_VECTOR_BYTES == 64
PYGEN_INLINE f64v prefix_sum(f64v v) {
  v += __builtin_shufflevector(v, f64v{}, 8, 0, 8, 2, 8, 4, 8, 6);
  v += __builtin_shufflevector(v, f64v{}, 8, 8, 1, 1, 8, 8, 5, 5);
  return v + __builtin_shufflevector(v, f64v{}, 8, 8, 8, 8, 3, 3, 3, 3);
}
PYGEN_INLINE f64v suffix_sum(f64v v) {
  v += __builtin_shufflevector(v, f64v{}, 1, 8, 3, 8, 5, 8, 7, 8);
  v += __builtin_shufflevector(v, f64v{}, 2, 2, 8, 8, 6, 6, 8, 8);
  return v + __builtin_shufflevector(v, f64v{}, 4, 4, 4, 4, 8, 8, 8, 8);
}
PYGEN_INLINE f64v first_lane(f64v v) { return __builtin_shufflevector(v, v, 0, 0, 0, 0, 0, 0, 0, 0); }
PYGEN_INLINE f64v last_lane(f64v v) { return __builtin_shufflevector(v, v, 7, 7, 7, 7, 7, 7, 7, 7); }
PYGEN_INLINE f64v shift_front(f64v v, f64v fill) {
  return __builtin_shufflevector(fill, v, 0, 8, 9, 10, 11, 12, 13, 14);
}
PYGEN_INLINE f64v shift_back(f64v v, f64v fill) { return __builtin_shufflevector(v, fill, 1, 2, 3, 4, 5, 6, 7, 8); }
#elif PYGEN_VECTOR_BYTES == 32
PYGEN_INLINE f64v prefix_sum(f64v v) {
  v += __builtin_shufflevector(v, f64v{}, 4, 0, 4, 2);
  return v + __builtin_shufflevector(v, f64v{}, 4, 4, 1, 1);
}
PYGEN_INLINE f64v suffix_sum(f64v v) {
  v += __builtin_shufflevector(v, f64v{}, 1, 4, 3, 4);
  return v + __builtin_shufflevector(v, f64v{}, 2, 2, 4, 4);
}
PYGEN_INLINE f64v first_lane(f64v v) { return __builtin_shufflevector(v, v, 0, 0, 0, 0); }
PYGEN_INLINE f64v last_lane(f64v v) { return __builtin_shufflevector(v, v, 3, 3, 3, 3); }
PYGEN_INLINE f64v shift_front(f64v v, f64v fill) { return __builtin_shufflevector(fill, v, 0, 4, 5, 6); }
PYGEN_INLINE f64v shift_back(f64v v, f64v fill) { return __builtin_shufflevector(v, fill, 1, 2, 3, 4); }
#else
PYGEN_INLINE f64v prefix_sum(f64v v) { return v + __builtin_shufflevector(v, f64v{}, 2, 0); }
PYGEN_INLINE f64v suffix_sum(f64v v) { return v + __builtin_shufflevector(v, f64v{}, 1, 2); }
PYGEN_INLINE f64v first_lane(f64v v) { return __builtin_shufflevector(v, v, 0, 0); }
PYGEN_INLINE f64v last_lane(f64v v) { return __builtin_shufflevector(v, v, 1, 1); }
PYGEN_INLINE f64v shift_front(f64v v, f64v fill) { return __builtin_shufflevector(fill, v, 0, 2); }
PYGEN_INLINE f64v shift_back(f64v v, f64v fill) { return __builtin_shufflevector(v, fill, 1, 2); }
#endif

// ---- scans of a row --------------------------------------------------------------------------------------------------
// `emit(i, end, sums)` receives the running sums of the doubles that begin at element i. A last, incomplete vector is
// filled with zeros, which change no sum; emit must not write at `end` or behind.

template <typename T>
struct Wide;  // the doubles of one vector of T: two vectors for float, one for double

template <>
struct Wide<float> {
  static constexpr int parts = 2;
  f64v part[2];
  PYGEN_INLINE Wide of(f32v v) { return {{low_half(v), high_half(v)}}; }
};
template <>
struct Wide<double> {
  static constexpr int parts = 1;
  f64v part[1];
  PYGEN_INLINE Wide of(f64v v) { return {{v}}; }
};

// A vector of a row at i; what lies behind the row's end reads as zero.
template <typename T>
PYGEN_INLINE typename VecOf<T>::vec load_at(const T* p, int64_t i, int64_t n) {
  using V = typename VecOf<T>::vec;
  return i + VecOf<T>::lanes <= n ? load(p + i) : i < n ? load_some(p + i, n - i, T(0)) : V{};
}

// The sums inside one vector of T, its parts joined; total in every lane.
template <typename T>
struct InnerSums {
  f64v part[Wide<T>::parts], total;
};

template <bool exclusive, typename T>
PYGEN_INLINE InnerSums<T> inner_prefix_sums(typename VecOf<T>::vec v) {
  const auto wide = Wide<T>::of(v);
  InnerSums<T> result;
  result.total = f64v{};
  for (int p = 0; p < Wide<T>::parts; ++p) {
    const f64v sums = p ? result.total + prefix_sum(wide.part[p]) : prefix_sum(wide.part[p]);
    result.part[p] = exclusive ? shift_front(sums, result.total) : sums;
    result.total = last_lane(sums);
  }
  return result;
}

template <bool exclusive, typename T>
PYGEN_INLINE InnerSums<T> inner_suffix_sums(typename VecOf<T>::vec v) {
  const auto wide = Wide<T>::of(v);
  InnerSums<T> result;
  result.total = f64v{};
  for (int p = Wide<T>::parts - 1; p >= 0; --p) {
    const f64v sums = p < Wide<T>::parts - 1 ? result.total + suffix_sum(wide.part[p]) : suffix_sum(wide.part[p]);
    result.part[p] = exclusive ? shift_back(sums, result.total) : sums;
    result.total = first_lane(sums);
  }
  return result;
}

// Calls emit for the vectors at i, i + direction * lanes, ..., `count` of them. The inner sums of all are taken before the
// carry comes in: the chain on which the next vector waits is one addition long.
template <int count, bool exclusive, int direction, typename T, typename Emit>
PYGEN_INLINE void scan_vectors(const T* values, int64_t i, int64_t n, RunningSum<T>& carry, Emit& emit) {
  constexpr int lanes = VecOf<T>::lanes, step = VecOf<double>::lanes;
  InnerSums<T> inner[count];
#pragma GCC unroll 4
  for (int k = 0; k < count; ++k) {
    const auto v = load_at(values, i + direction * k * lanes, n);
    inner[k] = direction > 0 ? inner_prefix_sums<exclusive, T>(v) : inner_suffix_sums<exclusive, T>(v);
  }
#pragma GCC unroll 4
  for (int k = 0; k < count; ++k) {
    for (int q = 0; q < Wide<T>::parts; ++q) {
      const int p = direction > 0 ? q : Wide<T>::parts - 1 - q;
      emit(i + direction * k * lanes + p * step, n, carry.plus(inner[k].part[p]));
    }
    carry.add(inner[k].total);
  }
}

// From the front: sum_{j <= k}, or sum_{j < k} if exclusive.
template <bool exclusive, typename T, typename Emit>
PYGEN_INLINE void scan_from_front(const T* values, int64_t n, Emit emit) {
  constexpr int lanes = VecOf<T>::lanes;
  RunningSum<T> carry;
  int64_t i = 0;
  // The end that full vectors are told is their own: the tests for the row's end vanish from this loop.
  for (; i + 2 * lanes <= n; i += 2 * lanes) scan_vectors<2, exclusive, 1>(values, i, i + 2 * lanes, carry, emit);
  for (; i < n; i += lanes) scan_vectors<1, exclusive, 1>(values, i, n, carry, emit);
}

// From the back: sum_{j >= k}, or sum_{j > k} if exclusive.
template <bool exclusive, typename T, typename Emit>
PYGEN_INLINE void scan_from_back(const T* values, int64_t n, Emit emit) {
  constexpr int lanes = VecOf<T>::lanes;
  RunningSum<T> carry;
  int64_t i = (n - 1) / lanes * lanes;
  for (; i % (2 * lanes) != lanes || i + lanes > n; i -= lanes) {
    scan_vectors<1, exclusive, -1>(values, i, n, carry, emit);
    if (i == 0) return;
  }
  for (; i > 0; i -= 2 * lanes) scan_vectors<2, exclusive, -1>(values, i, i + lanes, carry, emit);
}

// VecOf<double>::lanes values of a row at i, as doubles; zeros behind the row's end.
PYGEN_INLINE f64v load_wide(const double* row, int64_t i, int64_t n) { return load_at(row, i, n); }

PYGEN_INLINE f64v load_wide(const float* row, int64_t i, int64_t n) {
  f32half half = {};
  if (i + VecOf<double>::lanes <= n) {
    half = *reinterpret_cast<const f32half_unaligned*>(row + i);
  } else {
    for (int k = 0; k < VecOf<double>::lanes && i + k < n; ++k) half[k] = row[i + k];
  }
  return to_f64(half);
}

PYGEN_INLINE void store_wide(double* row, int64_t i, int64_t n, f64v v) {
  if (i + VecOf<double>::lanes <= n) {
    store(row + i, v);
  } else if (i < n) {
    store_some(row + i, v, n - i);
  }
}

PYGEN_INLINE void store_wide(float* row, int64_t i, int64_t n, f64v v) {
  const f32half half = to_f32(v);
  if (i + VecOf<double>::lanes <= n) {
    *reinterpret_cast<f32half_unaligned*>(row + i) = half;
  } else if (i < n) {
    float lane[VecOf<double>::lanes];
    memcpy(lane, &half, sizeof half);
    for (int k = 0; k < VecOf<double>::lanes && i + k < n; ++k) row[i + k] = lane[k];
  }
}

// ---- one row ---------------------------------------------------------------------------------------------------------

template <typename T>
void fill_row(T* row, int64_t n, T value) {
  for (int64_t i = 0; i < n; ++i) row[i] = value;
}

// The last quotient, and the order of those that differ by less than the sums' rounding, in float64, where the sum of the
// exponentials and the scan's are rounded apart. For float both follow from the float64 scan.
struct Ordered {
  f64v bound = {};
  template <bool from_back>
  __attribute__((always_inline)) f64v rise(f64v y) {
    y = at_most(at_least(y, bound), splat(1.));
    bound = from_back ? first_lane(y) : last_lane(y);
    return y;
  }
};

template <bool complement, typename T>
void forward_row_of(const T* x, T* y, int64_t n) {
  const double sum = exponentials(x, y, n);
  if (sum != sum) return fill_row(y, n, T(__builtin_nan("")));
  const f64v scale = splat(1 / sum);
  Ordered ordered;
  const auto emit = [&](int64_t i, int64_t end, f64v sums) __attribute__((always_inline)) {
    f64v quotients = sums * scale;
    if (sizeof(T) == 8) quotients = ordered.template rise<complement>(quotients);
    store_wide(y, i, end, quotients);
  };
  if (complement) {
    scan_from_back<true>(y, n, emit);
  } else {
    scan_from_front<false>(y, n, emit);
    y[n - 1] = 1;
  }
}

template <typename T>
void forward_row(const T* x, T* y, int64_t n, bool complement) {
  complement ? forward_row_of<true>(x, y, n) : forward_row_of<false>(x, y, n);
}

// dx_j = p_j (G_j - sum_i p_i G_i), G the sums of the incoming gradient; dx holds e until the end.
template <typename T>
void backward_row(const T* x, const T* grad, T* dx, int64_t n, bool complement, double* sums_of_grad) {
  const double sum = exponentials(x, dx, n);
  if (sum != sum) return fill_row(dx, n, T(__builtin_nan("")));
  f64v products{};
  const auto keep = [&](int64_t i, int64_t end, f64v sums) __attribute__((always_inline)) {
    store_wide(sums_of_grad, i, end, sums);
    products += load_wide(dx, i, end) * sums;
  };
  if (complement) {
    scan_from_front<true>(grad, n, keep);
  } else {
    scan_from_back<false>(grad, n, keep);
  }
  const f64v scale = splat(1 / sum), mean = splat(sum_of_lanes(products) / sum);
  constexpr int step = VecOf<double>::lanes;
  const auto finish = [=](int64_t i, int64_t end) __attribute__((always_inline)) {
    store_wide(dx, i, end, load_wide(dx, i, end) * scale * (load_wide(sums_of_grad, i, end) - mean));
  };
  int64_t i = 0;
  for (; i + step <= n; i += step) finish(i, i + step);
  if (i < n) finish(i, n);
}

// ---- tiles -----------------------------------------------------------------------------------------------------------

// Row r of a tile as contiguous values of the computing type: the tensor itself where it is that, else a copy.
template <typename In>
struct Gathered {
  using T = compute_t<In>;
  const In* data;
  const CumaxRows& rows;
  T* copy;  // rows x length, or null

  const T* row(int64_t r, int64_t n) const {
    return copy ? copy + r * n : reinterpret_cast<const T*>(data + rows.offsets[r]);
  }
};

template <typename In>
Gathered<In> gather_rows(const CumaxRows& rows, int64_t count, int64_t n, compute_t<In>*& scratch) {
  const In* data = static_cast<const In*>(rows.data);
  if (rows.stride == 1 && sizeof(In) == sizeof(compute_t<In>)) return {data, rows, nullptr};
  compute_t<In>* copy = scratch;
  scratch += count * n;
  if (rows.stride == 1) {
    for (int64_t r = 0; r < count; ++r) gather(data + rows.offsets[r], 1, n, copy + r * n);
  } else {
    // Element by element over all rows: rows of a strided dimension usually lie side by side.
    for (int64_t i = 0; i < n; ++i)
      for (int64_t r = 0; r < count; ++r) copy[r * n + i] = widen(data[rows.offsets[r] + i * rows.stride]);
  }
  return {data, rows, copy};
}

// Where row r is computed: in the output itself, or in scratch from which scatter_rows() brings it there.
template <typename Out>
void scatter_rows(const compute_t<Out>* copy, const CumaxRows& rows, int64_t count, int64_t n) {
  Out* data = static_cast<Out*>(const_cast<void*>(rows.data));
  if (rows.stride == 1) {
    for (int64_t r = 0; r < count; ++r) scatter(copy + r * n, 1, n, data + rows.offsets[r]);
  } else {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t r = 0; r < count; ++r) narrow(copy[r * n + i], data + rows.offsets[r] + i * rows.stride);
  }
}

template <typename In, typename Compute>
void over_rows(const CumaxTile& tile, compute_t<In>* scratch, Compute compute) {
  using T = compute_t<In>;
  const bool in_place = tile.out.stride == 1 && sizeof(In) == sizeof(T);
  T* copy = in_place ? nullptr : scratch;
  for (int64_t r = 0; r < tile.rows; ++r)
    compute(r, in_place ? static_cast<T*>(const_cast<void*>(tile.out.data)) + tile.out.offsets[r]
                        : copy + r * tile.length);
  if (!in_place) scatter_rows<In>(copy, tile.out, tile.rows, tile.length);
}

template <typename In>
void forward(const CumaxTile& tile) {
  auto* scratch = static_cast<compute_t<In>*>(tile.scratch);
  const int64_t n = tile.length;
  const auto x = gather_rows<In>(tile.x, tile.rows, n, scratch);
  over_rows<In>(tile, scratch, [&](int64_t r, compute_t<In>* y) { forward_row(x.row(r, n), y, n, tile.complement); });
}

template <typename In>
void backward(const CumaxTile& tile) {
  const int64_t n = tile.length;
  auto* sums = static_cast<double*>(tile.scratch);
  auto* scratch = reinterpret_cast<compute_t<In>*>(sums + n);
  const auto x = gather_rows<In>(tile.x, tile.rows, n, scratch);
  const auto grad = gather_rows<In>(tile.grad, tile.rows, n, scratch);
  over_rows<In>(tile, scratch, [&](int64_t r, compute_t<In>* dx) {
    backward_row(x.row(r, n), grad.row(r, n), dx, n, tile.complement, sums);
  });
}

extern const CumaxKernels cumax_kernels = {
    {forward<float>, forward<double>, forward<bf16>, forward<f16>},
    {backward<float>, backward<double>, backward<bf16>, backward<f16>},
};

PYGEN_END_LEVEL
