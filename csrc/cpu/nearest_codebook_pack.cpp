// Codes and rows brought into the frame of the search and rounded to its format, with bounds of what rounding moved them
// by. Called by csrc/nearest_codebook.cpp; the symbols are those of docs/nearest-codebook.md.
#include "nearest_codebook_pack.h"

#include "nearest_codebook_exact.h"
#include "vec.h"

PYGEN_BEGIN_LEVEL

namespace {

constexpr double kUnit32 = 0x1p-24;  // float32's unit roundoff
constexpr double kUnit64 = 0x1p-53;  // float64's
// Above all that underflow loses in the frame, where codes are about 1: AMX, and whoever lets denormals be flushed, makes
// zero of every product or sum below 2^-126.
constexpr float kTiny = 0x1p-45f;
constexpr float kGreatest = 0x1p50f;        // rows this many times larger than the codes are decided by brute force
constexpr float kFiniteSquares = 0x1p120f;  // a sum that is no larger has neither infinity nor NaN in it
constexpr float kSmallestStep = 0x1p-40f;

// A byte's range, and the length that, after rounding n elements, keeps the product of two such vectors below 2^22 (and
// every element within 16 bits).
constexpr float kLargestByte = 127.0f;
PYGEN_INLINE float largest_length(int64_t n) { return 2047.0f - 0.5f * float(__builtin_sqrt(double(n))); }
constexpr int kCodeOffset = 128;  // dpbusd multiplies unsigned (the code) by signed (the row)

PYGEN_INLINE int32_t as_bits(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
PYGEN_INLINE double greater(double a, double b) { return a < b ? b : a; }
PYGEN_INLINE float greater(float a, float b) { return a < b ? b : a; }

// n is a multiple of a vector's lanes, as all that follows: vectors are padded with zeros.
PYGEN_INLINE float largest_element(const float* v, int64_t n) {
  f32v largest = {};
  for (int64_t i = 0; i < n; i += VecOf<float>::lanes) {
    const f32v x = load(v + i);
    largest = at_least(largest, x < 0.0f ? -x : x);
  }
  return maximum_of_lanes(largest);
}

PYGEN_INLINE double sum_of_squares(const float* v, int64_t n) {
  f32v sum = {};
  for (int64_t i = 0; i < n; i += VecOf<float>::lanes) sum += load(v + i) * load(v + i);
  return sum_of_lanes(low_half(sum) + high_half(sum));
}

// At least the norm: n additions lose n units at most, and the root halves that.
PYGEN_INLINE float norm_above(double squares, int64_t n) {
  return float(__builtin_sqrt(squares) * (1 + n * 2 * kUnit32)) + kTiny;
}

// A code's elements as words, and a bound of what they lost; `step` is the size of an integer.
PYGEN_INLINE float round_to_bf16(const float* frame, int64_t words, float* residual, int32_t* out) {
  const int64_t n = 2 * words;
  for (int64_t i = 0; i < n; ++i) {
    const bf16 rounded = to_bf16(frame[i]);
    residual[i] = frame[i] - widen(rounded);
    reinterpret_cast<uint16_t*>(out)[i] = rounded.bits;
  }
  return norm_above(sum_of_squares(residual, (n + 15) / 16 * 16), n);
}

// How the elements of a word of integers lie in it.
template <Format F>
struct Integers {
  static constexpr int kCount = elements_per_word(F), kBits = 32 / kCount;
  static constexpr int32_t kMask = (1 << kBits) - 1;
};

template <Format F>
float round_to_integers(const float* frame, int64_t words, float step, float* residual, int32_t* integers,
                        int32_t* out) {
  using Layout = Integers<F>;
  const int64_t padded = (Layout::kCount * words + 15) / 16 * 16;
  const int32_t offset = F == Format::kInt8 ? kCodeOffset : 0;
  const f32v inverse = splat(1.0f / step), shift = splat(kIntegerOffset), a = splat(step);
  for (int64_t i = 0; i < padded; i += VecOf<float>::lanes) {
    const f32v x = load(frame + i);
    const f32v shifted = x * inverse + shift;  // rounds to the nearest integer
    store(residual + i, x - a * (shifted - shift));
    const i32v value = (i32v)shifted - kIntegerOffsetBits;
    memcpy(integers + i, &value, sizeof value);
  }
  for (int64_t w = 0; w < words; ++w) {
    uint32_t word = 0;
    for (int b = 0; b < Layout::kCount; ++b)
      word |= uint32_t((integers[Layout::kCount * w + b] + offset) & Layout::kMask) << Layout::kBits * b;
    out[w] = static_cast<int32_t>(word);
  }
  return norm_above(sum_of_squares(residual, padded), padded);
}

struct Scratch {
  float *frame, *residual;
  int32_t *integers, *words;
  Scratch(float* memory, int64_t dim)
      : frame(memory),
        residual(memory + (dim + 64)),
        integers(reinterpret_cast<int32_t*>(memory + 2 * (dim + 64))),
        words(reinterpret_cast<int32_t*>(memory + 3 * (dim + 64))) {}
};

PYGEN_INLINE int64_t padded_dim(const PackedCodebook& codes) {
  return (codes.words * elements_per_word(codes.format) + 15) / 16 * 16;
}

PYGEN_INLINE double code_factor(const PackedCodebook& codes, int64_t k) {
  if (codes.metric != Metric::kCosine) return codes.scaling;
  return codes.squared_norm[k] > 0 ? codes.scaling / __builtin_sqrt(codes.squared_norm[k]) : 0.0;
}

// factor * given - mean, rounded to float32, and zeros behind it.
PYGEN_INLINE void to_frame(const double* given, double factor, const double* mean, int64_t dim, int64_t padded,
                           float* frame) {
  if (mean) {
    for (int64_t i = 0; i < dim; ++i) frame[i] = float(given[i] * factor - mean[i]);
  } else {
    for (int64_t i = 0; i < dim; ++i) frame[i] = float(given[i] * factor);
  }
  for (int64_t i = dim; i < padded; ++i) frame[i] = 0.0f;
}

// These two read zeros behind the vector.
PYGEN_INLINE bool all_finite(const double* v, int64_t n) {
  f64v sum = {};
  for (int64_t i = 0; i < n; i += VecOf<double>::lanes) sum += load(v + i) - load(v + i);
  return sum_of_lanes(sum) == 0;
}

PYGEN_INLINE double largest_magnitude(const double* v, int64_t n) {
  f64v largest = {};
  for (int64_t i = 0; i < n; i += VecOf<double>::lanes) {
    const f64v x = load(v + i);
    largest = at_least(x < 0.0 ? -x : x, largest);
  }
  return maximum_of_lanes(largest);
}

}  // namespace

CodeSummary summarise_codes(const PackedCodebook& codes, int64_t first, int64_t last, double* sum, double* wide) {
  CodeSummary found = {};
  const int64_t dim = codes.given.dim;
  for (int64_t k = first; k < last; ++k) {
    widen_vector(codes.given, k, wide);
    codes.usable[k] = all_finite(wide, dim);
    if (!codes.usable[k]) continue;
    ++found.usable;
    found.largest_element = greater(found.largest_element, largest_magnitude(wide, dim));
    const double squares = exact_dot(wide, wide, dim);
    double factor = 1;
    if (codes.metric == Metric::kCosine) {
      codes.squared_norm[k] = squares;
      factor = squares > 0 ? 1 / __builtin_sqrt(squares) : 0;
    }
    found.squared_norms += squares * factor * factor;
    found.largest_norm = greater(found.largest_norm, __builtin_sqrt(squares) * factor * (1 + 0x1p-30));
    for (int64_t i = 0; i < dim; ++i) sum[i] += wide[i] * factor;
  }
  return found;
}

namespace {

PYGEN_INLINE void frame_of_code(const PackedCodebook& codes, int64_t k, double* wide, float* frame) {
  widen_vector(codes.given, k, wide);
  to_frame(wide, code_factor(codes, k), codes.mean, codes.given.dim, padded_dim(codes), frame);
}

PYGEN_INLINE float step_for(const PackedCodebook& codes, float element, float norm) {
  const float by_length = greater(norm / largest_length(padded_dim(codes)), kSmallestStep);
  return codes.format == Format::kInt8 ? greater(element * (1 / kLargestByte), by_length) : by_length;
}

// Where word w of code j of a block stands. AMX's first operand has 16 words of a code in one row of the tile; its second,
// and both operands of the other formats, one word of 16 codes or rows.
PYGEN_INLINE int64_t code_word_at(const PackedCodebook& codes, int64_t j, int64_t w) {
  if (codes.format == Format::kBFloat16) return w / 16 * 256 + j * 16 + w % 16;
  return w * kBlockCodes + j;
}

void pack_code(const PackedCodebook& codes, int64_t slot, bool usable, float step, const Scratch& scratch,
               float* residual) {
  const int64_t words = codes.words, j = slot % kBlockCodes;
  int32_t* block = codes.code_words + slot / kBlockCodes * words * kBlockCodes;
  int32_t* out = scratch.words;
  if (!usable) {
    const int32_t zero = codes.format == Format::kInt8 ? static_cast<int32_t>(0x01010101u * kCodeOffset) : 0;
    for (int64_t w = 0; w < words; ++w) block[code_word_at(codes, j, w)] = zero;
    codes.bias[slot] = -__builtin_inff();
    return;
  }
  const int64_t padded = padded_dim(codes);
  const double squares = sum_of_squares(scratch.frame, padded);
  if (codes.format == Format::kFloat32) {
    for (int64_t w = 0; w < words; ++w) block[code_word_at(codes, j, w)] = as_bits(scratch.frame[w]);
  } else if (codes.format == Format::kBFloat16) {
    *residual = greater(*residual, round_to_bf16(scratch.frame, words, scratch.residual, out));
  } else {
    const auto round =
        codes.format == Format::kInt8 ? round_to_integers<Format::kInt8> : round_to_integers<Format::kInt16>;
    *residual = greater(*residual, round(scratch.frame, words, step, scratch.residual, scratch.integers, out));
  }
  if (codes.format != Format::kFloat32)
    for (int64_t w = 0; w < words; ++w) block[code_word_at(codes, j, w)] = out[w];
  codes.bias[slot] = codes.metric == Metric::kEuclidean ? float(-0.5 * squares / step) : 0.0f;
}

}  // namespace

void size_groups(const PackedCodebook& codes, int64_t first_group, int64_t last_group, double* wide, float* memory) {
  const int64_t padded = padded_dim(codes);
  for (int64_t group = first_group; group < last_group; ++group) {
    float element = 0, norm = 0;
    for (int64_t k = group * codes.group_codes(); k < (group + 1) * codes.group_codes(); ++k) {
      if (k >= codes.given.count || !codes.usable[k]) continue;
      frame_of_code(codes, k, wide, memory);
      element = greater(element, largest_element(memory, padded));
      norm = greater(norm, norm_above(sum_of_squares(memory, padded), padded));
    }
    GroupBounds& bounds = codes.bounds[group];
    bounds.norm = norm;
    bounds.scale = is_integer(codes.format) ? step_for(codes, element, norm) : 1.0f;
  }
}

void pack_groups(const PackedCodebook& codes, int64_t first_group, int64_t last_group, double* wide, float* memory) {
  const Scratch scratch(memory, codes.given.dim);
  const bool integers = is_integer(codes.format);
  for (int64_t group = first_group; group < last_group; ++group) {
    GroupBounds& bounds = codes.bounds[group];
    float residual = 0;
    for (int64_t slot = group * codes.group_codes(); slot < (group + 1) * codes.group_codes(); ++slot) {
      const bool usable = slot < codes.given.count && codes.usable[slot];
      if (usable) frame_of_code(codes, slot, wide, scratch.frame);
      pack_code(codes, slot, usable, bounds.scale, scratch, &residual);
    }
    // Sums of D products, and the few operations of the bounds themselves, in float32.
    const float kappa = float(((integers ? 0 : padded_dim(codes)) + 32) * 2 * kUnit32);
    residual += float(4 * kUnit32) * bounds.norm + kTiny;
    bounds.residual = residual + kappa * (bounds.norm + residual);
    bounds.slack = kappa * bounds.norm * bounds.norm;
    bounds.unit = integers ? 3 * bounds.scale : 0.0f;
    bounds.inverse_scale = 1 / bounds.scale;
  }
}

namespace {

// The power of two that brings `largest` into [1, 2).
PYGEN_INLINE double power_of_two_for(double largest) {
  int64_t bits;
  memcpy(&bits, &largest, sizeof bits);
  bits = (int64_t{2046} - (bits >> 52 & 0x7ff)) << 52;
  double power;
  memcpy(&power, &bits, sizeof power);
  return power;
}

// A strip in the frame, an element of 16 rows side by side, and what is found of each row.
struct Strip {
  float* frame;  // (padded, 16)
  float squares[kStripRows], largest[kStripRows], step[kStripRows], inverse[kStripRows];
  float residual_squares[kStripRows];
  int32_t total[kStripRows];
};

constexpr int kVectors = kStripRows / VecOf<float>::lanes;
struct Lanes {
  f32v v[kVectors];
};

PYGEN_INLINE Lanes lanes_at(const float* p) {
  Lanes lanes;
  for (int i = 0; i < kVectors; ++i) lanes.v[i] = load(p + i * VecOf<float>::lanes);
  return lanes;
}
PYGEN_INLINE void put_lanes(float* p, const Lanes& lanes) {
  for (int i = 0; i < kVectors; ++i) store(p + i * VecOf<float>::lanes, lanes.v[i]);
}

// Element d of 16 rows that lie `stride` apart.
PYGEN_INLINE Lanes column(const float* rows, int64_t stride, int64_t d) {
  Lanes lanes;
#if PYGEN_VECTOR_BYTES == 64
  const __m512i at = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                        _mm512_set1_epi32(static_cast<int>(stride)));
  lanes.v[0] = (f32v)_mm512_i32gather_ps(at, rows + d, 4);
#else
  float of_rows[kStripRows];
  for (int r = 0; r < kStripRows; ++r) of_rows[r] = rows[r * stride + d];
  lanes = lanes_at(of_rows);
#endif
  return lanes;
}

// `rows`, 16 of them and `stride` apart, side by side in the frame, after `move(element d of 16 rows, d)`.
template <class Move>
PYGEN_INLINE void transpose_strip(const float* rows, int64_t stride, int64_t dim, int64_t padded, Strip* strip,
                                  const Move& move) {
  Lanes squares = {}, largest = {};
  memset(strip->frame + dim * kStripRows, 0, (padded - dim) * kStripRows * sizeof(float));
  for (int64_t d = 0; d < dim; ++d) {
    Lanes x = column(rows, stride, d);
    move(&x, d);
    put_lanes(strip->frame + d * kStripRows, x);
    for (int i = 0; i < kVectors; ++i) {
      squares.v[i] += x.v[i] * x.v[i];
      const f32v magnitude = x.v[i] < 0.0f ? -x.v[i] : x.v[i];
      largest.v[i] = at_least(magnitude, largest.v[i]);
    }
  }
  put_lanes(strip->squares, squares);
  put_lanes(strip->largest, largest);
}

// Rows that are in the frame already.
void transpose_framed(const float* rows, int64_t dim, int64_t padded, Strip* strip) {
  transpose_strip(rows, padded, dim, padded, strip, [](Lanes*, int64_t) {});
}

PYGEN_INLINE f32v joined(f32half low, f32half high) {
#if PYGEN_VECTOR_BYTES == 64
  return (f32v)_mm512_insertf32x8(_mm512_castps256_ps512((__m256)low), (__m256)high, 1);
#else
  const f32half halves[] = {low, high};
  f32v all;
  memcpy(&all, halves, sizeof all);
  return all;
#endif
}

// 16 rows of float32 as given, which they mostly are: brought into the euclidean frame on the way.
void transpose_given(const PackedCodebook& codes, const float* rows, Strip* strip) {
  const int64_t dim = codes.given.dim;
  const double scaling = codes.scaling, *mean = codes.mean;
  transpose_strip(rows, dim, dim, padded_dim(codes), strip, [scaling, mean](Lanes* x, int64_t d) {
    for (f32v& v : x->v) v = joined(to_f32(low_half(v) * scaling - mean[d]), to_f32(high_half(v) * scaling - mean[d]));
  });
}

PYGEN_INLINE i32v rounded_bits(f32v x) {
  const i32v bits = (i32v)x;
  return bits + 0x7fff + ((bits >> 16) & 1);
}

void strip_to_bf16(int64_t words, Strip* strip, int32_t* out) {
  Lanes squares = {};
  for (int64_t w = 0; w < words; ++w) {
    const Lanes low = lanes_at(strip->frame + 2 * w * kStripRows);
    const Lanes high = lanes_at(strip->frame + (2 * w + 1) * kStripRows);
    for (int i = 0; i < kVectors; ++i) {
      const i32v a = rounded_bits(low.v[i]) & static_cast<int32_t>(0xffff0000);
      const i32v b = rounded_bits(high.v[i]) & static_cast<int32_t>(0xffff0000);
      const f32v a_lost = low.v[i] - (f32v)a, b_lost = high.v[i] - (f32v)b;
      squares.v[i] += a_lost * a_lost + b_lost * b_lost;
      const i32v word = b | ((a >> 16) & 0xffff);
      memcpy(out + w * kStripRows + i * VecOf<float>::lanes, &word, sizeof word);
    }
  }
  put_lanes(strip->residual_squares, squares);
}

template <Format F>
void strip_to_integers(int64_t words, Strip* strip, int32_t* out) {
  using Layout = Integers<F>;
  const Lanes step = lanes_at(strip->step), inverse = lanes_at(strip->inverse);
  const f32v shift = splat(kIntegerOffset);
  Lanes squares = {};
  i32v total[kVectors] = {};
  for (int64_t w = 0; w < words; ++w) {
    for (int i = 0; i < kVectors; ++i) {
      i32v word = {};
      for (int b = 0; b < Layout::kCount; ++b) {
        const f32v x = load(strip->frame + (Layout::kCount * w + b) * kStripRows + i * VecOf<float>::lanes);
        const f32v shifted = x * inverse.v[i] + shift;  // rounds to the nearest integer
        const f32v lost = x - step.v[i] * (shifted - shift);
        const i32v value = (i32v)shifted - kIntegerOffsetBits;
        squares.v[i] += lost * lost;
        total[i] += value;
        word |= (value & Layout::kMask) << Layout::kBits * b;
      }
      memcpy(out + w * kStripRows + i * VecOf<float>::lanes, &word, sizeof word);
    }
  }
  put_lanes(strip->residual_squares, squares);
  memcpy(strip->total, total, sizeof total);
}

// The rows' words and bounds, at row `first` of the chunk.
void pack_strip(const PackedCodebook& codes, const PackedRows& rows, int64_t first, Strip* strip) {
  const int64_t padded = padded_dim(codes), words = codes.words;
  int32_t* out = rows.row_words + first * words;
  const float norm_factor = 1 + float(2 * padded * kUnit32), longest = 1 / largest_length(padded);
  float norm[kStripRows];
  for (int r = 0; r < kStripRows; ++r) {
    norm[r] = __builtin_sqrtf(strip->squares[r]) * norm_factor + kTiny;
    strip->step[r] = 1;
    strip->residual_squares[r] = 0;
    strip->total[r] = 0;
  }
  const float by_element = codes.format == Format::kInt8 ? 1 / kLargestByte : 0;
  if (is_integer(codes.format))
    for (int r = 0; r < kStripRows; ++r)
      strip->step[r] = greater(greater(strip->largest[r] * by_element, norm[r] * longest), kSmallestStep);
  for (int r = 0; r < kStripRows; ++r) strip->inverse[r] = 1 / strip->step[r];
  if (codes.format == Format::kFloat32) memcpy(out, strip->frame, words * kStripRows * sizeof(float));
  if (codes.format == Format::kBFloat16) strip_to_bf16(words, strip, out);
  if (codes.format == Format::kInt8) strip_to_integers<Format::kInt8>(words, strip, out);
  if (codes.format == Format::kInt16) strip_to_integers<Format::kInt16>(words, strip, out);
  // What float64 itself loses where the code is finally chosen: relative to the squared distance, or to the products of
  // the vectors as given.
  const bool euclidean = codes.metric == Metric::kEuclidean;
  const float gamma = float((codes.given.dim + 32) * 8 * kUnit64), largest_code = float(codes.largest) * 1.001f;
  for (int r = 0; r < kStripRows; ++r) {
    const float inverse = strip->inverse[r];
    const float lost = __builtin_sqrtf(strip->residual_squares[r]) * norm_factor + kTiny;
    const float residual = lost + float(4 * kUnit32) * norm[r] + kTiny;
    rows.start[first + r] = kIntegerOffsetBits - (codes.format == Format::kInt8 ? kCodeOffset * strip->total[r] : 0);
    rows.inverse[first + r] = inverse;
    rows.residual[first + r] = residual * inverse;
    rows.length[first + r] = (norm[r] + residual) * inverse;
    rows.constant[first + r] = gamma * norm[r] * (euclidean ? norm[r] : largest_code) * inverse;
  }
}

// Row r of the chunk, in the frame; false where the proof does not hold.
bool row_to_frame(const PackedCodebook& codes, const PackedRows& rows, int64_t r, float* frame) {
  const int64_t dim = codes.given.dim, padded = padded_dim(codes);
  widen_vector(rows.given, rows.first + r, rows.wide);
  if (codes.metric == Metric::kEuclidean) {
    to_frame(rows.wide, codes.scaling, codes.mean, dim, padded, frame);
    return true;
  }
  // A row's own scale changes nothing but the euclidean distance.
  const double largest = largest_magnitude(rows.wide, dim);
  to_frame(rows.wide, largest > 0 ? power_of_two_for(largest) : 1.0, nullptr, dim, padded, frame);
  return largest == 0 || (largest >= kLeastMagnitude && largest <= kGreatestMagnitude);
}

// Rows first to first + 15 of the chunk, `padded` apart; zeros for those that are not there or not wanted.
void frame_rows(const PackedCodebook& codes, const PackedRows& rows, int64_t first, float* frame, bool* provable) {
  const int64_t padded = padded_dim(codes);
  for (int64_t r = 0; r < kStripRows; ++r) {
    const int64_t row = rows.first + first + r;
    const bool wanted = first + r < rows.count && codes.any_usable && !(rows.mask && !rows.mask[row]);
    rows.kind[first + r] = wanted ? RowKind::kSearched : RowKind::kNone;
    provable[r] = wanted && row_to_frame(codes, rows, first + r, frame + r * padded) && codes.searchable;
    if (!wanted) memset(frame + r * padded, 0, padded * sizeof(float));
  }
}

// Of a row whose frame is not of finite, moderate numbers.
RowKind unusual_kind(const PackedCodebook& codes, const PackedRows& rows, int64_t r) {
  widen_vector(rows.given, rows.first + r, rows.wide);
  return all_finite(rows.wide, codes.given.dim) ? RowKind::kBruteForce : RowKind::kNone;
}

}  // namespace

void pack_rows(const PackedCodebook& codes, const PackedRows& rows, float* memory) {
  const int64_t dim = codes.given.dim, padded = padded_dim(codes);
  const bool as_given = rows.given.type == FloatType::kFloat32 && codes.metric == Metric::kEuclidean && !rows.mask &&
                        codes.searchable && codes.any_usable;
  Strip strip;
  strip.frame = memory + kStripRows * padded;
  for (int64_t first = 0; first < rows.strips * kStripRows; first += kStripRows) {
    bool provable[kStripRows];
    if (as_given && first + kStripRows <= rows.count) {
      for (int64_t r = 0; r < kStripRows; ++r) rows.kind[first + r] = RowKind::kSearched, provable[r] = true;
      transpose_given(codes, static_cast<const float*>(rows.given.data) + (rows.first + first) * dim, &strip);
    } else {
      frame_rows(codes, rows, first, memory, provable);
      transpose_framed(memory, dim, padded, &strip);
    }
    for (int64_t r = 0; r < kStripRows; ++r)
      if (rows.kind[first + r] == RowKind::kSearched &&
          !(provable[r] && strip.largest[r] <= kGreatest && strip.squares[r] <= kFiniteSquares))
        rows.kind[first + r] = unusual_kind(codes, rows, first + r);
    if (codes.searchable) pack_strip(codes, rows, first, &strip);
  }
}

PYGEN_END_LEVEL
