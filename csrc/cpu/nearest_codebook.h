// The certified search for the nearest code, on raw pointers. csrc/nearest_codebook.cpp allocates, deals out the work
// and chooses a format; docs/nearest-codebook.md has the proof whose symbols the fields below bear.
//
// One call prepares the codebook (`frame`, `pack_codes`), then for each chunk of rows: `pack_rows`, `screen`, `decide`.
#pragma once

#include <cstdint>

#include "tables.h"

namespace pygen {

enum class Metric { kEuclidean, kCosine, kDot };

// What codes and rows are rounded to for the search; the search itself has one file per format.
enum class Format { kFloat32, kInt8, kInt16, kBFloat16 };

constexpr bool is_integer(Format format) { return format == Format::kInt8 || format == Format::kInt16; }

// Elements of a format in one 32-bit word.
constexpr int64_t elements_per_word(Format format) {
  return format == Format::kFloat32 ? 1 : format == Format::kInt8 ? 4 : 2;
}

// Codes of a block and rows of a strip: the lanes of an AVX-512 register and the rows of an AMX tile.
constexpr int64_t kBlockCodes = 16;
constexpr int64_t kStripRows = 16;

// 1.5 * 2^23: an integer below 2^22 added to its bits is added to its value.
constexpr float kIntegerOffset = 12582912.0f;
constexpr int32_t kIntegerOffsetBits = 0x4b400000;

// Largest elements beyond these are decided by brute force: float64's squares, or the cosine's fourth powers, might
// overflow or vanish there, which the bounds do not describe. Only float64 has such numbers.
constexpr double kLeastMagnitude = 0x1p-230, kGreatestMagnitude = 0x1p230;

// Contiguous vectors as the user gave them.
struct GivenVectors {
  const void* data;
  FloatType type;
  int64_t count, dim;
};

// What the bound needs of a group of codes.
struct GroupBounds {
  float inverse_scale;  // 1 / t
  float scale;          // t: a score is (peak - offset) * t, in units of the row's step a
  float norm;           // W >= |w| of every code
  float residual;       // E >= |w - w^|, with the rounding that is proportional to |x^|
  float slack;          // C: the rounding that is proportional to W^2
  float unit;           // the rounding of a score as an integer
};

// One head's codebook, brought into the frame of the search: w = scaling * v - mean, v the code (its unit vector for the
// cosine), rounded to w^.
struct PackedCodebook {
  GivenVectors given;
  Metric metric;
  Format format;
  int64_t words;         // of a code or row: D in the format's words, padded with zeros
  int64_t group_blocks;  // blocks that share one peak, one scale and one bound
  int64_t groups;
  bool uniform;     // all groups have the same bounds
  bool searchable;  // false: magnitudes beyond the proof; all is decided in float64
  bool any_usable;
  double scaling;
  double largest;        // >= scaling * |v| of every code
  double* mean;          // (D,)
  double* squared_norm;  // (K,): of the code as given; cosine only
  uint8_t* usable;       // (K,): the code is finite
  int32_t* code_words;   // (groups * group_blocks, words, 16), or as the format's file says
  float* bias;           // (groups * group_blocks, 16): -|w|^2 / 2t; -inf for what cannot be chosen
  GroupBounds* bounds;   // (groups,)

  int64_t group_codes() const { return group_blocks * kBlockCodes; }
};

enum class RowKind : uint8_t { kSearched, kBruteForce, kNone };

// A chunk of rows in the frame of the search, rounded to x^ = a p, and what the search finds for them. All but the
// words and the kinds are in units of a.
struct PackedRows {
  GivenVectors given;  // of the whole head
  int64_t first, count;
  int64_t strips;      // count / 16, rounded up
  const bool* mask;    // of the whole head, or null
  int32_t* row_words;  // (strips, words, 16)
  int32_t* start;      // (strips * 16,): where integer sums begin
  float* inverse;      // 1 / a
  float* residual;     // rho / a >= |x' - x^| / a
  float* length;       // P / a >= |x^| / a
  float* constant;     // R / a: float64's own rounding
  RowKind* kind;
  float* peaks;       // (groups, strips * 16): the greatest score of each group
  int32_t* flagged;   // (16, groups): scratch of `decide`, as all that follows
  float* thresholds;  // (16, groups)
  double* wide;       // (2, D + 8): a row and a code in float64
  float* scores;      // (group_codes,)
};

struct SearchResults {
  int64_t* indices;
  double* distance_f64;  // of these two at most one, or neither
  float* distance_f32;
  int32_t* candidates;  // or null
};

// One format's search.
struct ScreenKernels {
  void (*screen)(const PackedCodebook&, const PackedRows&);
  // The scores of one row with one group's codes, as `screen` has them up to rounding.
  void (*revisit)(const PackedCodebook&, const PackedRows&, int64_t row, int64_t group, float* scores);
  float offset;  // what `screen` has added to every score
};

// Sums over a range of codes, for the frame.
struct CodeSummary {
  double largest_element, largest_norm, squared_norms;
  int64_t usable;
};

struct NearestCodebookKernels {
  // Notes which codes first..last-1 are usable and their squared norms; adds the (unit) codes to sum[D].
  CodeSummary (*summarise)(const PackedCodebook&, int64_t first, int64_t last, double* sum, double* wide);
  // Writes the groups' scales and norms; what follows may raise them. `scratch`: 4 * (D + 64) floats.
  void (*size_groups)(const PackedCodebook&, int64_t first, int64_t last, double* wide, float* scratch);
  void (*pack_groups)(const PackedCodebook&, int64_t first, int64_t last, double* wide, float* scratch);
  // `scratch`: 32 * (D + 64) floats.
  void (*pack_rows)(const PackedCodebook&, const PackedRows&, float* scratch);
  void (*decide)(const PackedCodebook&, const PackedRows&, const ScreenKernels&, const SearchResults&);
  ScreenKernels float32;
};

PYGEN_DECLARE_KERNELS(NearestCodebookKernels, nearest_codebook_kernels)

#if defined(PYGEN_X86_LEVELS)
namespace avx512_vnni {
extern const ScreenKernels int8_search, int16_search;
}
namespace amx {
extern const ScreenKernels bfloat16_search;
}
#endif

}  // namespace pygen
