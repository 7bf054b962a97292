// Packing, which every level's table names (nearest_codebook_decide.cpp).
#pragma once

#include "level.h"
#include "nearest_codebook.h"

PYGEN_BEGIN_LEVEL
CodeSummary summarise_codes(const PackedCodebook& codes, int64_t first, int64_t last, double* sum, double* wide);
void size_groups(const PackedCodebook& codes, int64_t first, int64_t last, double* wide, float* scratch);
void pack_groups(const PackedCodebook& codes, int64_t first, int64_t last, double* wide, float* scratch);
void pack_rows(const PackedCodebook& codes, const PackedRows& rows, float* scratch);
PYGEN_END_LEVEL
