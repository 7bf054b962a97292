// From the greatest score of each group to the nearest code: the groups that the bound leaves in doubt are visited
// again, and among the codes that are still in doubt float64 decides. Called by csrc/nearest_codebook.cpp.
#include "nearest_codebook_exact.h"
#include "nearest_codebook_float32.h"
#include "nearest_codebook_pack.h"

PYGEN_BEGIN_LEVEL

namespace {

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

PYGEN_INLINE f64v load_wide(const double* p) { return load(p); }
PYGEN_INLINE f64v load_wide(const float* p) { return to_f64(*reinterpret_cast<const f32half_unaligned*>(p)); }

// The key of one code: what is smallest for the nearest. Codes of float32 are read where they are.
template <typename T>
double key_of(Metric metric, const double* row, const T* code, int64_t dim, double squared_norm) {
  LaneSum sum;
  int64_t i = 0;
  const auto add = [&](const double* of_row, const auto* of_code) {
    for (int v = 0; v < kSumVectors; ++v) {
      const f64v a = load(of_row + v * VecOf<double>::lanes), b = load_wide(of_code + v * VecOf<double>::lanes);
      const f64v difference = a - b;
      sum.part[v] += metric == Metric::kEuclidean ? difference * difference : a * b;
    }
  };
  for (; i + kLanes <= dim; i += kLanes) add(row + i, code + i);
  if (i < dim) {
    T rest[kLanes] = {};
    memcpy(rest, code + i, (dim - i) * sizeof(T));
    add(row + i, rest);
  }
  const double total = sum.total();
  double key = metric == Metric::kEuclidean ? total : -total;
  if (metric == Metric::kCosine) key = squared_norm > 0 ? -total * (total < 0 ? -total : total) / squared_norm : 0.0;
  return key == key ? key : __builtin_inf();
}

struct Decider {
  const PackedCodebook& codes;
  const PackedRows& rows;
  const ScreenKernels& search;
  const SearchResults& results;
  double* row_wide;
  double* code_wide;
  int64_t wide_row = -1;  // the row that row_wide holds

  void hold(int64_t row) {
    if (row != wide_row) widen_vector(rows.given, row, row_wide);
    wide_row = row;
  }

  double key(int64_t k) {
    const int64_t dim = codes.given.dim;
    const double squared_norm = codes.metric == Metric::kCosine ? codes.squared_norm[k] : 0.0;
    if (codes.given.type == FloatType::kFloat32)
      return key_of(codes.metric, row_wide, static_cast<const float*>(codes.given.data) + k * dim, dim, squared_norm);
    widen_vector(codes.given, k, code_wide);
    return key_of(codes.metric, row_wide, code_wide, dim, squared_norm);
  }

  void consider(int64_t row, int64_t k, Best* best) {
    if (best->count++ == 0) {
      best->index = k;
      return;
    }
    hold(row);
    if (best->count == 2) best->key = key(best->index);
    const double other = key(k);
    if (other < best->key || (other == best->key && k < best->index)) best->key = other, best->index = k;
  }

  Best brute_force(int64_t row) {
    Best best;
    for (int64_t k = 0; k < codes.given.count; ++k)
      if (codes.usable[k]) consider(row, k, &best);
    return best;
  }

  // The codes of the row's flagged groups that reach the group's threshold.
  Best among_flagged(int64_t r, int64_t count) {
    const int32_t* groups = rows.flagged + r % kStripRows * codes.groups;
    const float* thresholds = rows.thresholds + r % kStripRows * codes.groups;
    Best best;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = groups[i] * codes.group_codes();
      search.revisit(codes, rows, r, groups[i], rows.scores);
      for (int64_t j = 0; j < codes.group_codes(); j += VecOf<float>::lanes)
        for (uint32_t left = lanes_where_at_least(load(rows.scores + j), splat(thresholds[i])); left; left &= left - 1)
          consider(rows.first + r, first + j + __builtin_ctz(left), &best);
    }
    return best;
  }

  double distance_to(int64_t row, int64_t k) {
    hold(row);
    widen_vector(codes.given, k, code_wide);
    const int64_t dim = codes.given.dim;
    if (codes.metric == Metric::kEuclidean) return __builtin_sqrt(exact_squared_distance(row_wide, code_wide, dim));
    const double dot = exact_dot(row_wide, code_wide, dim);
    if (codes.metric == Metric::kDot) return -dot;
    const double norms = __builtin_sqrt(exact_dot(row_wide, row_wide, dim)) * __builtin_sqrt(codes.squared_norm[k]);
    return 1 - (norms > 0 ? dot / norms : 0.0);
  }

  void write(int64_t row, const Best& best) {
    results.indices[row] = best.index;
    if (results.candidates) results.candidates[row] = static_cast<int32_t>(best.count);
    if (!results.distance_f32 && !results.distance_f64) return;
    const bool masked = rows.mask && !rows.mask[row];
    const double distance = best.index >= 0 ? distance_to(row, best.index) : masked ? 0.0 : __builtin_nan("");
    if (results.distance_f64) results.distance_f64[row] = distance;
    if (results.distance_f32) results.distance_f32[row] = float(distance);
  }

  PYGEN_INLINE_MEMBER const float* peaks_of(int64_t group, int64_t strip) const {
    return rows.peaks + (group * rows.strips + strip) * kStripRows;
  }

  // The greatest proved score of each row of a vector.
  template <bool Uniform>
  PYGEN_INLINE_MEMBER f32v floor_of(int64_t strip, int lane, const RowBounds& bounds) const {
    f32v floor = splat(-__builtin_inff());
    for (int64_t group = 0; group < codes.groups; ++group) {
      const f32v peak = load(peaks_of(group, strip) + lane);
      if (Uniform) {
        floor = at_least(floor, peak);
      } else {
        const GroupBounds& g = codes.bounds[group];
        floor = at_least(floor, (peak - search.offset) * g.scale - bounds.error(g));
      }
    }
    return Uniform ? (floor - search.offset) * codes.bounds[0].scale - bounds.error(codes.bounds[0]) : floor;
  }

  // What a score of the group must reach to be of a row's best code, perhaps; a unit less for the rounding of offset.
  PYGEN_INLINE_MEMBER f32v threshold(const GroupBounds& g, const RowBounds& bounds, f32v floor) const {
    const f32v score = (floor - bounds.error(g)) * g.inverse_scale;
    return score + (search.offset - (search.offset != 0 ? 1.0f : 0.0f));
  }

  // Appends each group to the lists of the rows for which it may have the best code.
  template <bool Uniform>
  PYGEN_INLINE_MEMBER void flag(int64_t strip, int lane, const RowBounds& bounds, f32v floor, int64_t* count) const {
    f32v reach = threshold(codes.bounds[0], bounds, floor);
    for (int64_t group = 0; group < codes.groups; ++group) {
      if (!Uniform) reach = threshold(codes.bounds[group], bounds, floor);
      for (uint32_t left = lanes_where_at_least(load(peaks_of(group, strip) + lane), reach); left; left &= left - 1) {
        const int row = lane + __builtin_ctz(left);
        const int64_t at = row * codes.groups + count[row]++;
        rows.flagged[at] = static_cast<int32_t>(group);
        rows.thresholds[at] = reach[row - lane];
      }
    }
  }

  template <bool Uniform>
  PYGEN_INLINE_MEMBER void flag_strip(int64_t strip, int64_t* count) const {
    for (int lane = 0; lane < kStripRows; lane += VecOf<float>::lanes) {
      const RowBounds bounds(rows, strip * kStripRows + lane);
      flag<Uniform>(strip, lane, bounds, floor_of<Uniform>(strip, lane, bounds), count);
    }
  }

  void decide_strip(int64_t strip) {
    const int64_t first = strip * kStripRows;
    int64_t count[kStripRows] = {};
    if (codes.searchable && codes.any_usable)
      codes.uniform ? flag_strip<true>(strip, count) : flag_strip<false>(strip, count);
    for (int64_t r = first; r < first + kStripRows && r < rows.count; ++r) {
      Best best;
      if (rows.kind[r] == RowKind::kBruteForce) best = brute_force(rows.first + r);
      if (rows.kind[r] == RowKind::kSearched) best = among_flagged(r, count[r - first]);
      write(rows.first + r, best);
    }
  }
};

void decide(const PackedCodebook& codes, const PackedRows& rows, const ScreenKernels& search,
            const SearchResults& results) {
  const int64_t padded = (codes.given.dim + kLanes - 1) / kLanes * kLanes;
  Decider decider{codes, rows, search, results, rows.wide, rows.wide + padded};
  for (int64_t strip = 0; strip < rows.strips; ++strip) decider.decide_strip(strip);
}

}  // namespace

extern const NearestCodebookKernels nearest_codebook_kernels = {
    summarise_codes, size_groups, pack_groups, pack_rows, decide, {screen_float32, revisit_float32, 0.0f}};

PYGEN_END_LEVEL
