// The walk of every format's search: code groups in portions that stay in the cache, strips of rows inside, blocks
// innermost. The format brings a tile, which finds the greatest score of one block's 16 codes for some strips.
#pragma once

#include "nearest_codebook.h"
#include "vec.h"

PYGEN_BEGIN_LEVEL

// Of the second-level cache: the codes that all strips of a chunk meet before the next codes come.
constexpr int64_t kPortionBytes = 256 << 10;

PYGEN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYGEN_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The strip's words, and the words of a block: both (words, 16), but AMX's blocks.
PYGEN_INLINE const int32_t* strip_words(const PackedCodebook& codes, const PackedRows& rows, int64_t strip) {
  return rows.row_words + strip * codes.words * kStripRows;
}
PYGEN_INLINE const int32_t* block_words(const PackedCodebook& codes, int64_t block) {
  return codes.code_words + block * codes.words * kBlockCodes;
}

// Tile: `template <int Strips> static void run(codes, rows, first_strip, group)`, which writes the group's peaks for
// `Strips` strips; Tile::kStrips is the most that it takes at once, 1 to 3.
template <class Tile>
PYGEN_INLINE void screen_groups(const PackedCodebook& codes, const PackedRows& rows) {
  const int64_t group_bytes = codes.group_codes() * codes.words * 4;
  const int64_t portion = larger(1, kPortionBytes / group_bytes);
  for (int64_t first = 0; first < codes.groups; first += portion) {
    const int64_t last = smaller(first + portion, codes.groups);
    int64_t strip = 0;
    for (; strip + Tile::kStrips <= rows.strips; strip += Tile::kStrips)
      for (int64_t group = first; group < last; ++group) Tile::template run<Tile::kStrips>(codes, rows, strip, group);
    for (; strip < rows.strips; ++strip)
      for (int64_t group = first; group < last; ++group) Tile::template run<1>(codes, rows, strip, group);
  }
}

PYGEN_END_LEVEL
