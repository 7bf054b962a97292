// The search for the nearest code in bfloat16 on AMX: a tile instruction multiplies 16 codes by 16 rows, 32 elements
// deep. Called by csrc/nearest_codebook.cpp where the machine has AMX and its operating system lets us use it.
#include "nearest_codebook_screen.h"

PYGEN_BEGIN_LEVEL

namespace {

constexpr int kTileWords = 16;  // 32-bit words in a tile's row
constexpr int kTileBytes = kTileWords * 4;
constexpr int64_t kTileSize = 16 * kTileWords;  // words of a whole tile

// As the instruction set lays it out: palette 1 has eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  constexpr TileConfig() {
    for (int t = 0; t < 8; ++t) row_bytes[t] = kTileBytes, rows[t] = 16;
  }
};

// Tiles 0 to 3: sums of two blocks of codes by two strips of rows; 4, 5: codes; 6, 7: rows.
struct Tile {
  static constexpr int kStrips = 2;

  template <int Strips>
  static PYGEN_INLINE_MEMBER void multiply(const int32_t* first_codes, const int32_t* second_codes, const int32_t* x,
                                           const int32_t* next_x, int64_t words) {
    _tile_zero(0);
    _tile_zero(2);
    if (Strips == 2) {
      _tile_zero(1);
      _tile_zero(3);
    }
    for (int64_t w = 0; w < words; w += kTileWords) {
      _tile_loadd(4, first_codes + w / kTileWords * kTileSize, kTileBytes);
      _tile_loadd(6, x + w * kStripRows, kTileBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, second_codes + w / kTileWords * kTileSize, kTileBytes);
      _tile_dpbf16ps(2, 5, 6);
      if (Strips == 2) {
        _tile_loadd(7, next_x + w * kStripRows, kTileBytes);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }

  // sums: (16 codes, 16 rows).
  static PYGEN_INLINE_MEMBER __m512 greatest(const float* sums, const float* bias, __m512 peak) {
    for (int j = 0; j < kBlockCodes; ++j)
      peak = _mm512_max_ps(peak, _mm512_add_ps(_mm512_load_ps(sums + j * kStripRows), _mm512_set1_ps(bias[j])));
    return peak;
  }

  // A group has an even number of blocks.
  template <int Strips>
  static PYGEN_INLINE_MEMBER void run(const PackedCodebook& codes, const PackedRows& rows, int64_t strip,
                                      int64_t group) {
    alignas(64) float sums[4][kTileSize];
    const int32_t* x = strip_words(codes, rows, strip);
    const int32_t* next_x = Strips == 2 ? strip_words(codes, rows, strip + 1) : x;
    __m512 peak[2] = {_mm512_set1_ps(-__builtin_inff()), _mm512_set1_ps(-__builtin_inff())};
    for (int64_t block = group * codes.group_blocks; block < (group + 1) * codes.group_blocks; block += 2) {
      multiply<Strips>(block_words(codes, block), block_words(codes, block + 1), x, next_x, codes.words);
      _tile_stored(0, sums[0], kTileBytes);
      _tile_stored(2, sums[2], kTileBytes);
      if (Strips == 2) {
        _tile_stored(1, sums[1], kTileBytes);
        _tile_stored(3, sums[3], kTileBytes);
      }
      const float* bias = codes.bias + block * kBlockCodes;
      for (int s = 0; s < Strips; ++s)
        peak[s] = greatest(sums[2 + s], bias + kBlockCodes, greatest(sums[s], bias, peak[s]));
    }
    float* out = rows.peaks + (group * rows.strips + strip) * kStripRows;
    for (int s = 0; s < Strips; ++s) _mm512_storeu_ps(out + s * kStripRows, peak[s]);
  }
};

// A thread's tiles belong to this search alone: nothing of them is left behind.
void screen(const PackedCodebook& codes, const PackedRows& rows) {
  static constexpr TileConfig config;
  _tile_loadconfig(&config);
  screen_groups<Tile>(codes, rows);
  _tile_release();
}

PYGEN_INLINE __m512 even(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
PYGEN_INLINE __m512 odd(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

// One row with 32 codes: in float32, a code's words side by side.
void revisit(const PackedCodebook& codes, const PackedRows& rows, int64_t row, int64_t group, float* scores) {
  const int32_t* x = strip_words(codes, rows, row / kStripRows) + row % kStripRows;
  const __m512i stride = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                            _mm512_set1_epi32(kStripRows));
  for (int64_t b = 0; b < codes.group_blocks; ++b) {
    const int64_t block = group * codes.group_blocks + b;
    const int32_t* code = block_words(codes, block);
    __m512 sum[kBlockCodes];
    for (__m512& s : sum) s = _mm512_setzero_ps();
    for (int64_t w = 0; w < codes.words; w += kTileWords) {
      const __m512i of_row = _mm512_i32gather_epi32(stride, x + w * kStripRows, 4);
      const __m512 x_even = even(of_row), x_odd = odd(of_row);
      for (int j = 0; j < kBlockCodes; ++j) {
        const __m512i of_code = _mm512_loadu_si512(code + w / kTileWords * kTileSize + j * kTileWords);
        sum[j] = _mm512_fmadd_ps(even(of_code), x_even, _mm512_fmadd_ps(odd(of_code), x_odd, sum[j]));
      }
    }
    for (int j = 0; j < kBlockCodes; ++j)
      scores[b * kBlockCodes + j] = codes.bias[block * kBlockCodes + j] + _mm512_reduce_add_ps(sum[j]);
  }
}

}  // namespace

extern const ScreenKernels bfloat16_search = {screen, revisit, 0.0f};

PYGEN_END_LEVEL
