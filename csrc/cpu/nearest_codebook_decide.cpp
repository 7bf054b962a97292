// From the greatest score of each group to the nearest code: the groups that the bound leaves in doubt are visited
// again, and among the codes that are still in doubt float64 decides. Called by csrc/nearest_codebook.cpp.
#include "nearest_codebook_exact.h"
#include "nearest_codebook_float32.h"
#include "nearest_codebook_pack.h"

PYGEN_BEGIN_LEVEL

namespace {

constexpr int kVectors = kStripRows / VecOf<float>::lanes;

PYGEN_INLINE uint32_t lanes_where_at_least(f32v a, f32v b) {
#if PYGEN_VECTOR_BYTES == 64
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
#elif PYGEN_VECTOR_BYTES == 32
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ));
#elif defined(__SSE__)
  return _mm_movemask_ps(_mm_cmpge_ps((__m128)a, (__m128)b));
#else
  uint32_t bits = 0;
  for (int i = 0; i < VecOf<float>::lanes; ++i) bits |= (a[i] >= b[i]) << i;
  return bits;
#endif
}

// Of one vector of rows.
struct RowBounds {
  f32v inverse, residual, length, constant;
  RowBounds(const PackedRows& rows, int64_t row)
      : inverse(load(rows.inverse + row)),
        residual(load(rows.residual + row)),
        length(load(rows.length + row)),
        constant(load(rows.constant + row)) {}

  // How far a score of the group may be from the truth, in units of the row's step.
  PYGEN_INLINE_MEMBER f32v error(const GroupBounds& g) const {
    const f32v all = residual * g.norm + length * g.residual + inverse * g.slack + constant + splat(g.unit);
    return all * 1.001f;  // its own rounding
  }
};

// The best code so far. While there is one candidate only, nothing needs to be computed.
struct Best {
  int64_t index = -1, count = 0;
  double key = 0;
};

struct Decider {
  const PackedCodebook& codes;
  const PackedRows& rows;
  const ScreenKernels& search;
  const SearchResults& results;
  double* row_wide;
  double* code_wide;

  // What is smallest for the nearest code, as the reference has it.
  double key_of(int64_t k) const {
    widen_vector(codes.given, k, code_wide);
    const int64_t dim = codes.given.dim;
    double key;
    if (codes.metric == Metric::kEuclidean) {
      key = exact_squared_distance(row_wide, code_wide, dim);
    } else {
      const double dot = exact_dot(row_wide, code_wide, dim);
      key = -dot;
      if (codes.metric == Metric::kCosine) {
        const double norm = codes.squared_norm[k];
        key = norm > 0 ? -dot * (dot < 0 ? -dot : dot) / norm : 0.0;
      }
    }
    return key == key ? key : __builtin_inf();
  }

  void consider(int64_t k, Best* best) const {
    if (best->count == 1) best->key = key_of(best->index);
    if (best->count++ == 0) {
      best->index = k;
      return;
    }
    const double key = key_of(k);
    if (key < best->key || (key == best->key && k < best->index)) best->key = key, best->index = k;
  }

  Best brute_force() const {
    Best best;
    for (int64_t k = 0; k < codes.given.count; ++k)
      if (codes.usable[k]) consider(k, &best);
    return best;
  }

  // The codes of the row's flagged groups that reach `floor`, a proved score of some code.
  Best among_flagged(int64_t r, float floor, const int32_t* groups, int64_t count) const {
    const RowBounds bounds(rows, r / VecOf<float>::lanes * VecOf<float>::lanes);
    const int lane = r % VecOf<float>::lanes;
    Best best;
    for (int64_t i = 0; i < count; ++i) {
      const GroupBounds& g = codes.bounds[groups[i]];
      const float error = bounds.error(g)[lane];
      const int64_t first = groups[i] * codes.group_codes();
      search.revisit(codes, rows, r, groups[i], rows.scores);
      for (int64_t j = 0; j < codes.group_codes(); j += VecOf<float>::lanes) {
        const f32v upper = (load(rows.scores + j) - search.offset) * g.scale + error;
        for (uint32_t left = lanes_where_at_least(upper, splat(floor)); left; left &= left - 1)
          consider(first + j + __builtin_ctz(left), &best);
      }
    }
    return best;
  }

  double distance_to(int64_t k) const {
    widen_vector(codes.given, k, code_wide);
    const int64_t dim = codes.given.dim;
    if (codes.metric == Metric::kEuclidean) return __builtin_sqrt(exact_squared_distance(row_wide, code_wide, dim));
    const double dot = exact_dot(row_wide, code_wide, dim);
    if (codes.metric == Metric::kDot) return -dot;
    const double norms = __builtin_sqrt(exact_dot(row_wide, row_wide, dim)) * __builtin_sqrt(codes.squared_norm[k]);
    return 1 - (norms > 0 ? dot / norms : 0.0);
  }

  void write(int64_t row, const Best& best) const {
    results.indices[row] = best.index;
    if (results.candidates) results.candidates[row] = static_cast<int32_t>(best.count);
    if (!results.distance_f32 && !results.distance_f64) return;
    const bool masked = rows.mask && !rows.mask[row];
    const double distance = best.index >= 0 ? distance_to(best.index) : masked ? 0.0 : __builtin_nan("");
    if (results.distance_f64) results.distance_f64[row] = distance;
    if (results.distance_f32) results.distance_f32[row] = float(distance);
  }

  // The greatest proved score of every row of the strip.
  void floors(int64_t strip, const RowBounds* bounds, f32v* floor) const {
    for (int v = 0; v < kVectors; ++v) floor[v] = splat(-__builtin_inff());
    for (int64_t group = 0; group < codes.groups; ++group) {
      const GroupBounds& g = codes.bounds[group];
      const float* peaks = rows.peaks + (group * rows.strips + strip) * kStripRows;
      for (int v = 0; v < kVectors; ++v) {
        const f32v score = (load(peaks + v * VecOf<float>::lanes) - search.offset) * g.scale;
        floor[v] = at_least(floor[v], score - bounds[v].error(g));
      }
    }
  }

  // Appends each group to the lists of the rows for which it may have the best code.
  void flag(int64_t strip, const RowBounds* bounds, const f32v* floor, int64_t* count) const {
    for (int64_t group = 0; group < codes.groups; ++group) {
      const GroupBounds& g = codes.bounds[group];
      const float* peaks = rows.peaks + (group * rows.strips + strip) * kStripRows;
      for (int v = 0; v < kVectors; ++v) {
        const f32v score = (load(peaks + v * VecOf<float>::lanes) - search.offset) * g.scale;
        for (uint32_t left = lanes_where_at_least(score + bounds[v].error(g), floor[v]); left; left &= left - 1) {
          const int row = v * VecOf<float>::lanes + __builtin_ctz(left);
          rows.flagged[row * codes.groups + count[row]++] = static_cast<int32_t>(group);
        }
      }
    }
  }

  void decide_strip(int64_t strip) const {
    const int64_t first = strip * kStripRows;
    f32v floor[kVectors];
    int64_t count[kStripRows] = {};
    bool any = false;
    for (int64_t r = 0; r < kStripRows; ++r) any = any || rows.kind[first + r] == RowKind::kSearched;
    if (any) {
      RowBounds bounds[kVectors] = {RowBounds(rows, first)
#if PYGEN_VECTOR_BYTES <= 32
                                        ,
                                    RowBounds(rows, first + VecOf<float>::lanes)
#endif
#if PYGEN_VECTOR_BYTES == 16
                                        ,
                                    RowBounds(rows, first + 8), RowBounds(rows, first + 12)
#endif
      };
      floors(strip, bounds, floor);
      flag(strip, bounds, floor, count);
    }
    for (int64_t r = 0; r < kStripRows && first + r < rows.count; ++r) {
      const RowKind kind = rows.kind[first + r];
      Best best;
      if (kind != RowKind::kNone) widen_vector(rows.given, rows.first + first + r, row_wide);
      if (kind == RowKind::kBruteForce) best = brute_force();
      if (kind == RowKind::kSearched)
        best = among_flagged(first + r, floor[r / VecOf<float>::lanes][r % VecOf<float>::lanes],
                             rows.flagged + r * codes.groups, count[r]);
      write(rows.first + first + r, best);
    }
  }
};

void decide(const PackedCodebook& codes, const PackedRows& rows, const ScreenKernels& search,
            const SearchResults& results) {
  const int64_t padded = (codes.given.dim + kLanes - 1) / kLanes * kLanes;
  const Decider decider{codes, rows, search, results, rows.wide, rows.wide + padded};
  for (int64_t strip = 0; strip < rows.strips; ++strip) decider.decide_strip(strip);
}

}  // namespace

extern const NearestCodebookKernels nearest_codebook_kernels = {
    summarise_codes, pack_groups, pack_rows, decide, {screen_float32, revisit_float32, 0.0f}};

PYGEN_END_LEVEL
