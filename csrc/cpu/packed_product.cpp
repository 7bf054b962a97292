// The packed product: blocks of rows times a panel, held in registers over a piece of the depth. A piece of a panel stays
// in the first cache while all blocks of rows pass over it, so that the matrix is read from memory once a step.
#include "packed_product.h"

#include "vec.h"

PYGEN_BEGIN_LEVEL

constexpr int kVectors = 2;  // of a panel's row
// Rows of a block: their sums are all of the registers but those for a row of the panel and one element of a.
constexpr int kRows = PYGEN_VECTOR_BYTES == 64 ? 12 : 6;
constexpr int64_t kPieceBytes = 16384;  // of a panel; half of the first cache
constexpr int64_t kAhead = 16;          // rows of the panel that are asked for before they are used

template <typename T>
constexpr int64_t kPanel = kVectors * VecOf<T>::lanes;

template <typename T>
struct Bits;
template <>
struct Bits<float> {
  using type = uint32_t;
};
template <>
struct Bits<double> {
  using type = uint64_t;
};

// x, or 0 where `dropped`: without a branch, which a random mask would mislead every other time.
template <typename T>
PYGEN_INLINE T unless(T x, bool dropped) {
  typename Bits<T>::type bits;
  memcpy(&bits, &x, sizeof bits);
  bits &= static_cast<typename Bits<T>::type>(dropped) - 1;
  memcpy(&x, &bits, sizeof bits);
  return x;
}

// `width` columns of `count` rows, along whichever of the two lies behind each other in the source.
template <bool masked, typename T>
PYGEN_INLINE void pack_columns(const PackSource& source, int64_t count, int64_t at, int64_t width, T* out) {
  const T* const data = static_cast<const T*>(source.data) + at;
  const bool* const mask = masked ? source.mask + at : nullptr;
  if (source.column == 1) {
    for (int64_t k = 0; k < count; ++k)
      for (int64_t j = 0; j < width; ++j) {
        const int64_t i = k * source.row + j;
        out[k * kPanel<T> + j] = masked ? unless(data[i], mask[i]) : data[i];
      }
  } else {
    for (int64_t j = 0; j < width; ++j)
      for (int64_t k = 0; k < count; ++k) {
        const int64_t i = k * source.row + j * source.column;
        out[k * kPanel<T> + j] = masked ? unless(data[i], mask[i]) : data[i];
      }
  }
}

template <bool masked, typename T>
void pack_piece(const PackSource& source, int64_t count, int64_t at, int64_t width, T* __restrict__ out) {
  if (width == kPanel<T>) return pack_columns<masked>(source, count, at, kPanel<T>, out);
  pack_columns<masked>(source, count, at, width, out);
  for (int64_t k = 0; k < count; ++k)
    for (int64_t j = width; j < kPanel<T>; ++j) out[k * kPanel<T> + j] = 0;
}

template <typename T>
void pack(const PackSource& source, int64_t depth, int64_t columns, int64_t first, int64_t last, void* packed) {
  constexpr int64_t piece = kPieceBytes / (kPanel<T> * sizeof(T));
  for (int64_t panel = first; panel < last; ++panel) {
    T* const out = static_cast<T*>(packed) + panel * depth * kPanel<T>;
    const int64_t begin = panel * kPanel<T>, width = columns - begin < kPanel<T> ? columns - begin : kPanel<T>;
    for (int64_t k = 0; k < depth; k += piece)
      (source.mask ? pack_piece<true, T> : pack_piece<false, T>)(source, depth - k < piece ? depth - k : piece,
                                                                 k * source.row + begin * source.column, width,
                                                                 out + k * kPanel<T>);
  }
}

// out = start + a times (count, kPanel) rows of a panel, for `rows` rows.
template <typename T, int rows>
void block(const T* a, int64_t a_stride, const T* panel, int64_t count, const T* start, int64_t start_stride, T* out,
           int64_t out_stride) {
  using V = typename VecOf<T>::vec;
  constexpr int lanes = VecOf<T>::lanes;
  V sum[rows][kVectors];
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load(start + r * start_stride + v * lanes);
  for (int64_t k = 0; k < count; ++k, panel += kPanel<T>) {
    V right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      right[v] = load(panel + v * lanes);
      __builtin_prefetch(panel + kAhead * kPanel<T> + v * lanes);
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const T left = a[r * a_stride + k];  // broadcast by the load: through a register it would take an adder's port
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(out + r * out_stride + v * lanes, sum[r][v]);
}

template <typename T>
using Block = void (*)(const T*, int64_t, const T*, int64_t, const T*, int64_t, T*, int64_t);

template <typename T>
constexpr Block<T> kBlocks[] = {
    nullptr,     block<T, 1>, block<T, 2>, block<T, 3>,  block<T, 4>,  block<T, 5>,  block<T, 6>,
#if PYGEN_VECTOR_BYTES == 64
    block<T, 7>, block<T, 8>, block<T, 9>, block<T, 10>, block<T, 11>, block<T, 12>,
#endif
};

// A block at the matrix's last columns, where full vectors would leave the rows.
template <typename T>
void narrow_block(const ProductTask& task, int64_t row, int64_t rows, const T* a, const T* panel, int64_t count,
                  const T* start, int64_t start_stride, int64_t column, int64_t width) {
  T sums[kRows * kPanel<T>] = {};
  T* const out = static_cast<T*>(task.out) + row * task.out_stride + column;
  for (int64_t r = 0; r < rows; ++r)
    memcpy(sums + r * kPanel<T>, start + r * start_stride, static_cast<size_t>(width) * sizeof(T));
  kBlocks<T>[rows](a, task.a_stride, panel, count, sums, kPanel<T>, sums, kPanel<T>);
  for (int64_t r = 0; r < rows; ++r)
    memcpy(out + r * task.out_stride, sums + r * kPanel<T>, static_cast<size_t>(width) * sizeof(T));
}

template <typename T>
void multiply(const ProductTask& task, int64_t first, int64_t last) {
  constexpr int64_t piece = kPieceBytes / (kPanel<T> * sizeof(T));
  // Blocks of nearly the same size: a last one of few rows would leave the units waiting for its sums.
  const int64_t blocks = (task.rows + kRows - 1) / kRows;
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t column = panel * kPanel<T>;
    const int64_t width = task.columns - column < kPanel<T> ? task.columns - column : kPanel<T>;
    for (int64_t k = 0; k < task.depth || k == 0; k += piece) {
      const int64_t count = task.depth - k < piece ? task.depth - k : piece;
      const T* const right = static_cast<const T*>(task.packed) + (panel * task.depth + k) * kPanel<T>;
      for (int64_t b = 0, row = 0; b < blocks; ++b) {
        const int64_t rows = (task.rows - row + blocks - b - 1) / (blocks - b);
        const T* const a = static_cast<const T*>(task.a) + row * task.a_stride + k;
        T* const out = static_cast<T*>(task.out) + row * task.out_stride + column;
        const int64_t start_stride = k ? task.out_stride : task.start_stride;
        const T* const start = k ? out : static_cast<const T*>(task.start) + row * start_stride + column;
        if (width == kPanel<T>) {
          kBlocks<T>[rows](a, task.a_stride, right, count, start, start_stride, out, task.out_stride);
        } else {
          narrow_block(task, row, rows, a, right, count, start, start_stride, column, width);
        }
        row += rows;
      }
    }
  }
}

extern const PackedProductKernels packed_product_kernels = {
    {kPanel<float>, kPanel<double>},
    {pack<float>, pack<double>},
    {multiply<float>, multiply<double>},
};

PYGEN_END_LEVEL
