// The float32 search, which every level's table names (nearest_codebook_decide.cpp).
#pragma once

#include "level.h"
#include "nearest_codebook.h"

PYGEN_BEGIN_LEVEL
void screen_float32(const PackedCodebook& codes, const PackedRows& rows);
void revisit_float32(const PackedCodebook& codes, const PackedRows& rows, int64_t row, int64_t group, float* scores);
PYGEN_END_LEVEL
