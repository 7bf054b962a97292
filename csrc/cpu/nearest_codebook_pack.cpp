// Codes and rows brought into the frame of the search and rounded to its format, with bounds of what rounding moved them
// by. Called by csrc/nearest_codebook.cpp; the symbols are those of docs/nearest-codebook.md.
#include "nearest_codebook_pack.h"

#include "nearest_codebook_exact.h"
#include "vec.h"

PYGEN_BEGIN_LEVEL

namespace {

constexpr double kUnit32 = 0x1p-24;   // float32's unit roundoff
constexpr double kUnit64 = 0x1p-53;   // float64's
constexpr float kTiny = 0x1p-60f;     // above all that float32 loses by underflow in the frame, where codes are about 1
constexpr float kGreatest = 0x1p50f;  // rows this many times larger than the codes are decided by brute force
constexpr float kSmallestStep = 0x1p-40f;

// An 8-bit integer's range, and the length that keeps the product of two such vectors below 2^22.
constexpr float kLargestByte = 127.0f;
PYGEN_INLINE float largest_length(int64_t words) { return 2047.0f - 0.5f * float(__builtin_sqrt(double(4 * words))); }
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

struct Rounded {
  float residual;  // >= |exact - rounded|
  int32_t total;   // of the integers
};

// The frame's elements as words; `step` is the size of an integer.
PYGEN_INLINE float round_to_bf16(const float* frame, int64_t words, float* residual, int32_t* out) {
  const int64_t n = 2 * words;
  for (int64_t i = 0; i < n; ++i) {
    const bf16 rounded = to_bf16(frame[i]);
    residual[i] = frame[i] - widen(rounded);
    reinterpret_cast<uint16_t*>(out)[i] = rounded.bits;
  }
  return norm_above(sum_of_squares(residual, (n + 15) / 16 * 16), n);
}

PYGEN_INLINE Rounded round_to_int8(const float* frame, int64_t words, float step, int offset, float* residual,
                                   int32_t* integers, int32_t* out) {
  const int64_t padded = (4 * words + 15) / 16 * 16;
  const f32v inverse = splat(1.0f / step), shift = splat(kIntegerOffset), a = splat(step);
  for (int64_t i = 0; i < padded; i += VecOf<float>::lanes) {
    const f32v x = load(frame + i);
    const f32v shifted = x * inverse + shift;  // rounds to the nearest integer
    store(residual + i, x - a * (shifted - shift));
    const i32v value = (i32v)shifted - kIntegerOffsetBits;
    memcpy(integers + i, &value, sizeof value);
  }
  int32_t total = 0;
  for (int64_t i = 0; i < 4 * words; ++i) total += integers[i];
  for (int64_t w = 0; w < words; ++w) {
    uint32_t word = 0;
    for (int b = 0; b < 4; ++b) word |= uint32_t((integers[4 * w + b] + offset) & 0xff) << 8 * b;
    out[w] = static_cast<int32_t>(word);
  }
  return {norm_above(sum_of_squares(residual, padded), padded), total};
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

PYGEN_INLINE bool all_finite(const double* v, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += v[i] - v[i];
  return sum == 0;
}

PYGEN_INLINE double largest_magnitude(const double* v, int64_t n) {
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = greater(largest, v[i] < 0 ? -v[i] : v[i]);
  return largest;
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

struct GroupSize {
  float element, norm;
};

GroupSize size_of_group(const PackedCodebook& codes, int64_t first, int64_t last, double* wide, float* frame) {
  GroupSize size = {};
  const int64_t padded = padded_dim(codes);
  for (int64_t k = first; k < last; ++k) {
    if (!codes.usable[k]) continue;
    frame_of_code(codes, k, wide, frame);
    size.element = greater(size.element, largest_element(frame, padded));
    size.norm = greater(size.norm, norm_above(sum_of_squares(frame, padded), padded));
  }
  return size;
}

PYGEN_INLINE float step_for(float element, float norm, int64_t words) {
  return greater(greater(element / kLargestByte, norm / largest_length(words)), kSmallestStep);
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
    const auto rounded =
        round_to_int8(scratch.frame, words, step, kCodeOffset, scratch.residual, scratch.integers, out);
    *residual = greater(*residual, rounded.residual);
  }
  if (codes.format != Format::kFloat32)
    for (int64_t w = 0; w < words; ++w) block[code_word_at(codes, j, w)] = out[w];
  codes.bias[slot] = codes.metric == Metric::kEuclidean ? float(-0.5 * squares / step) : 0.0f;
}

}  // namespace

void pack_groups(const PackedCodebook& codes, int64_t first_group, int64_t last_group, double* wide, float* memory) {
  const Scratch scratch(memory, codes.given.dim);
  for (int64_t group = first_group; group < last_group; ++group) {
    const int64_t first = group * codes.group_codes();
    const int64_t last = first + codes.group_codes(), end = last < codes.given.count ? last : codes.given.count;
    const GroupSize size = size_of_group(codes, first, end, wide, scratch.frame);
    const bool integers = codes.format == Format::kInt8;
    const float step = integers ? step_for(size.element, size.norm, codes.words) : 1.0f;
    float residual = 0;
    for (int64_t slot = first; slot < last; ++slot) {
      const bool usable = slot < end && codes.usable[slot];
      if (usable) frame_of_code(codes, slot, wide, scratch.frame);
      pack_code(codes, slot, usable, step, scratch, &residual);
    }
    // Sums of D products, and the few operations of the bounds themselves, in float32.
    const double kappa = ((integers ? 0 : padded_dim(codes)) + 32) * 2 * kUnit32;
    residual += float(4 * kUnit32) * size.norm + kTiny;
    codes.bounds[group] = {step, size.norm, residual + float(kappa) * (size.norm + residual),
                           float(kappa) * size.norm * size.norm, integers ? 2 * step : 0.0f};
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

// Of a row in the frame: its bounds, words and the rest, at row r of the chunk.
void pack_row(const PackedCodebook& codes, const PackedRows& rows, int64_t r, const Scratch& scratch) {
  const int64_t padded = padded_dim(codes), words = codes.words;
  const double squares = sum_of_squares(scratch.frame, padded);
  const float norm = norm_above(squares, padded);
  int32_t* out = rows.row_words + r / kStripRows * words * kStripRows + r % kStripRows;
  float step = 1.0f;
  Rounded rounded = {0, 0};
  if (codes.format == Format::kFloat32) {
    for (int64_t w = 0; w < words; ++w) out[w * kStripRows] = as_bits(scratch.frame[w]);
  } else if (codes.format == Format::kBFloat16) {
    rounded.residual = round_to_bf16(scratch.frame, words, scratch.residual, scratch.words);
  } else {
    step = step_for(largest_element(scratch.frame, padded), norm, words);
    rounded = round_to_int8(scratch.frame, words, step, 0, scratch.residual, scratch.integers, scratch.words);
  }
  if (codes.format != Format::kFloat32)
    for (int64_t w = 0; w < words; ++w) out[w * kStripRows] = scratch.words[w];
  const float inverse = 1.0f / step;
  const float residual = rounded.residual + float(4 * kUnit32) * norm + kTiny;
  // What float64 itself loses where the code is finally chosen: relative to the squared distance, or to the products of
  // the vectors as given.
  const double gamma = (codes.given.dim + 32) * 8 * kUnit64;
  const double other = codes.metric == Metric::kEuclidean ? double(norm) : codes.largest;
  rows.start[r] = kIntegerOffsetBits - kCodeOffset * rounded.total;
  rows.inverse[r] = inverse;
  rows.residual[r] = residual * inverse;
  rows.length[r] = (norm + residual) * inverse;
  rows.constant[r] = float(gamma * norm * other) * inverse;
}

RowKind kind_of(const PackedCodebook& codes, const PackedRows& rows, int64_t row, const double* wide) {
  if (!codes.any_usable || !all_finite(wide, codes.given.dim)) return RowKind::kNone;
  if (rows.mask && !rows.mask[row]) return RowKind::kNone;
  return codes.searchable ? RowKind::kSearched : RowKind::kBruteForce;
}

void clear_row(const PackedCodebook& codes, const PackedRows& rows, int64_t r) {
  int32_t* out = rows.row_words + r / kStripRows * codes.words * kStripRows + r % kStripRows;
  for (int64_t w = 0; w < codes.words; ++w) out[w * kStripRows] = 0;
  rows.start[r] = kIntegerOffsetBits;
  rows.inverse[r] = 1.0f;
  rows.residual[r] = rows.length[r] = rows.constant[r] = 0.0f;
}

}  // namespace

void pack_rows(const PackedCodebook& codes, const PackedRows& rows, float* memory) {
  const Scratch scratch(memory, codes.given.dim);
  const int64_t dim = codes.given.dim, padded = padded_dim(codes);
  for (int64_t r = 0; r < rows.strips * kStripRows; ++r) {
    rows.kind[r] = RowKind::kNone;
    if (r < rows.count) {
      widen_vector(rows.given, rows.first + r, rows.wide);
      rows.kind[r] = kind_of(codes, rows, rows.first + r, rows.wide);
    }
    if (rows.kind[r] == RowKind::kSearched) {
      // A row's own scale changes nothing but for the euclidean distance, where it must be the codes'.
      const bool own = codes.metric != Metric::kEuclidean;
      const double largest = own ? largest_magnitude(rows.wide, dim) : 0.0;
      const bool provable = largest == 0 || (largest >= kLeastMagnitude && largest <= kGreatestMagnitude);
      const double factor = own ? (largest > 0 ? power_of_two_for(largest) : 1.0) : codes.scaling;
      to_frame(rows.wide, factor, own ? nullptr : codes.mean, dim, padded, scratch.frame);
      if (provable && largest_element(scratch.frame, padded) <= kGreatest) {
        pack_row(codes, rows, r, scratch);
        continue;
      }
      rows.kind[r] = RowKind::kBruteForce;
    }
    clear_row(codes, rows, r);
  }
}

PYGEN_END_LEVEL
