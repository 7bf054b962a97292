// The search for the nearest code in integers of 8 bits, and of 16 for short vectors: AVX-512 VNNI multiplies 64 pairs of
// bytes, or 32 of 16 bits, and adds them in one instruction: four times, or twice, the rate of float32. Called by
// csrc/nearest_codebook.cpp.
#include "nearest_codebook_screen.h"

PYGEN_BEGIN_LEVEL

namespace {

constexpr int kTileCodes = 8;

PYGEN_INLINE __m512i words_at(const int32_t* p) { return _mm512_loadu_si512(p); }

struct Bytes {
  static PYGEN_INLINE_MEMBER __m512i add(__m512i sum, __m512i code, __m512i row) {
    return _mm512_dpbusd_epi32(sum, code, row);
  }
};

struct Words16 {
  static PYGEN_INLINE_MEMBER __m512i add(__m512i sum, __m512i code, __m512i row) {
    return _mm512_dpwssd_epi32(sum, code, row);
  }
};

// Sums begin at kIntegerOffset's bits (less what the offset of 128 adds that makes 8-bit codes unsigned), so that as a float a sum of fewer than 2^22
// is kIntegerOffset plus itself: no conversion.
template <class Products>
struct Tile {
  static constexpr int kStrips = 3;

  template <int Strips>
  static PYGEN_INLINE_MEMBER void half_block(const int32_t* code, const int32_t* const* x, int64_t words,
                                             const float* bias, const __m512i* start, const __m512* inverse,
                                             __m512* peak) {
    __m512i sum[kTileCodes][Strips];
    for (int j = 0; j < kTileCodes; ++j)
      for (int s = 0; s < Strips; ++s) sum[j][s] = start[s];
    for (int64_t w = 0; w < words; ++w) {
      __m512i row[Strips];
      for (int s = 0; s < Strips; ++s) row[s] = words_at(x[s] + w * kStripRows);
      for (int j = 0; j < kTileCodes; ++j) {
        const __m512i word = _mm512_set1_epi32(code[w * kBlockCodes + j]);
        for (int s = 0; s < Strips; ++s) sum[j][s] = Products::add(sum[j][s], word, row[s]);
      }
    }
    for (int j = 0; j < kTileCodes; ++j) {
      const __m512 b = _mm512_set1_ps(bias[j]);
      for (int s = 0; s < Strips; ++s)
        peak[s] = _mm512_max_ps(peak[s], _mm512_fmadd_ps(b, inverse[s], _mm512_castsi512_ps(sum[j][s])));
    }
  }

  template <int Strips>
  static PYGEN_INLINE_MEMBER void run(const PackedCodebook& codes, const PackedRows& rows, int64_t strip,
                                      int64_t group) {
    const int32_t* x[Strips];
    __m512i start[Strips];
    __m512 inverse[Strips], peak[Strips];
    for (int s = 0; s < Strips; ++s) {
      x[s] = strip_words(codes, rows, strip + s);
      start[s] = words_at(rows.start + (strip + s) * kStripRows);
      inverse[s] = _mm512_loadu_ps(rows.inverse + (strip + s) * kStripRows);
      peak[s] = _mm512_set1_ps(-__builtin_inff());
    }
    for (int64_t block = group * codes.group_blocks; block < (group + 1) * codes.group_blocks; ++block)
      for (int64_t j = 0; j < kBlockCodes; j += kTileCodes)
        half_block<Strips>(block_words(codes, block) + j, x, codes.words, codes.bias + block * kBlockCodes + j, start,
                           inverse, peak);
    float* out = rows.peaks + (group * rows.strips + strip) * kStripRows;
    for (int s = 0; s < Strips; ++s) _mm512_storeu_ps(out + s * kStripRows, peak[s]);
  }
};

template <class Products>
void screen(const PackedCodebook& codes, const PackedRows& rows) {
  screen_groups<Tile<Products>>(codes, rows);
}

// Four chains: one alone would wait for each product.
template <class Products>
void revisit(const PackedCodebook& codes, const PackedRows& rows, int64_t row, int64_t group, float* scores) {
  const int32_t* x = strip_words(codes, rows, row / kStripRows) + row % kStripRows;
  const __m512 inverse = _mm512_set1_ps(rows.inverse[row]);
  for (int64_t b = 0; b < codes.group_blocks; ++b) {
    const int64_t block = group * codes.group_blocks + b;
    const int32_t* code = block_words(codes, block);
    const auto product = [&](__m512i sum, int64_t w) {
      return Products::add(sum, words_at(code + w * kBlockCodes), _mm512_set1_epi32(x[w * kStripRows]));
    };
    __m512i sum[4] = {_mm512_set1_epi32(rows.start[row]), _mm512_setzero_si512(), _mm512_setzero_si512(),
                      _mm512_setzero_si512()};
    int64_t w = 0;
    for (; w + 4 <= codes.words; w += 4)
      for (int i = 0; i < 4; ++i) sum[i] = product(sum[i], w + i);
    for (; w < codes.words; ++w) sum[0] = product(sum[0], w);
    const __m512i total = _mm512_add_epi32(_mm512_add_epi32(sum[0], sum[1]), _mm512_add_epi32(sum[2], sum[3]));
    const __m512 bias = _mm512_loadu_ps(codes.bias + block * kBlockCodes);
    _mm512_storeu_ps(scores + b * kBlockCodes, _mm512_fmadd_ps(bias, inverse, _mm512_castsi512_ps(total)));
  }
}

}  // namespace

extern const ScreenKernels int8_search = {screen<Bytes>, revisit<Bytes>, kIntegerOffset};
extern const ScreenKernels int16_search = {screen<Words16>, revisit<Words16>, kIntegerOffset};

PYGEN_END_LEVEL
