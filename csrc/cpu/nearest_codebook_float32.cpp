// The search for the nearest code in float32, for every CPU, and for short vectors everywhere: below about 16 elements
// the windows of the low precisions cost more than their speed brings. Called by csrc/nearest_codebook.cpp.
#include "nearest_codebook_float32.h"

#include "nearest_codebook_screen.h"

PYGEN_BEGIN_LEVEL

namespace {

// A strip of 16 rows is this many vectors.
constexpr int kVectors = kStripRows / VecOf<float>::lanes;

// Rounded once or twice: the bound allows for both.
#if PYGEN_VECTOR_BYTES == 64
PYGEN_INLINE f32v multiply_add(f32v a, f32v b, f32v c) {
  return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#elif PYGEN_VECTOR_BYTES == 32
PYGEN_INLINE f32v multiply_add(f32v a, f32v b, f32v c) {
  return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
#else
PYGEN_INLINE f32v multiply_add(f32v a, f32v b, f32v c) { return a * b + c; }
#endif

PYGEN_INLINE const float* as_floats(const int32_t* words) { return reinterpret_cast<const float*>(words); }

// As many sums as the level has registers for, and no fewer than hide the latency of a product.
struct Tile {
  static constexpr int kStrips = PYGEN_VECTOR_BYTES == 64 ? 3 : 1;
  static constexpr int kCodes = 2 * PYGEN_VECTOR_BYTES / 16;

  template <int Strips>
  static PYGEN_INLINE_MEMBER void some_codes(const float* code, const float* const* x, int64_t words, const float* bias,
                                             f32v* peak) {
    constexpr int kAll = Strips * kVectors;
    f32v sum[kCodes][kAll];
    for (int j = 0; j < kCodes; ++j)
      for (int v = 0; v < kAll; ++v) sum[j][v] = splat(bias[j]);
    for (int64_t w = 0; w < words; ++w) {
      f32v row[kAll];
      for (int v = 0; v < kAll; ++v)
        row[v] = load(x[v / kVectors] + w * kStripRows + v % kVectors * VecOf<float>::lanes);
      for (int j = 0; j < kCodes; ++j) {
        const f32v c = splat(code[w * kBlockCodes + j]);
        for (int v = 0; v < kAll; ++v) sum[j][v] = multiply_add(c, row[v], sum[j][v]);
      }
    }
    for (int j = 0; j < kCodes; ++j)
      for (int v = 0; v < kAll; ++v) peak[v] = at_least(peak[v], sum[j][v]);
  }

  template <int Strips>
  static PYGEN_INLINE_MEMBER void run(const PackedCodebook& codes, const PackedRows& rows, int64_t strip,
                                      int64_t group) {
    const float* x[Strips];
    f32v peak[Strips * kVectors];
    for (int s = 0; s < Strips; ++s) x[s] = as_floats(strip_words(codes, rows, strip + s));
    for (f32v& p : peak) p = splat(-__builtin_inff());
    for (int64_t block = group * codes.group_blocks; block < (group + 1) * codes.group_blocks; ++block)
      for (int64_t j = 0; j < kBlockCodes; j += kCodes)
        some_codes<Strips>(as_floats(block_words(codes, block)) + j, x, codes.words,
                           codes.bias + block * kBlockCodes + j, peak);
    float* out = rows.peaks + (group * rows.strips + strip) * kStripRows;
    for (int v = 0; v < Strips * kVectors; ++v) store(out + v * VecOf<float>::lanes, peak[v]);
  }
};

}  // namespace

void screen_float32(const PackedCodebook& codes, const PackedRows& rows) { screen_groups<Tile>(codes, rows); }

// Four chains: one alone would wait for each product.
void revisit_float32(const PackedCodebook& codes, const PackedRows& rows, int64_t row, int64_t group, float* scores) {
  const float* x = as_floats(strip_words(codes, rows, row / kStripRows)) + row % kStripRows;
  for (int64_t b = 0; b < codes.group_blocks; ++b) {
    const int64_t block = group * codes.group_blocks + b;
    const float* code = as_floats(block_words(codes, block));
    for (int64_t lane = 0; lane < kBlockCodes; lane += VecOf<float>::lanes) {
      const auto product = [&](f32v sum, int64_t w) {
        return multiply_add(load(code + w * kBlockCodes + lane), splat(x[w * kStripRows]), sum);
      };
      f32v sum[4] = {load(codes.bias + block * kBlockCodes + lane), {}, {}, {}};
      int64_t w = 0;
      for (; w + 4 <= codes.words; w += 4)
        for (int i = 0; i < 4; ++i) sum[i] = product(sum[i], w + i);
      for (; w < codes.words; ++w) sum[0] = product(sum[0], w);
      store(scores + b * kBlockCodes + lane, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
  }
}

PYGEN_END_LEVEL
