// nearest_codebook on the CPU: checks, allocation, the choice of a format, threads. The arithmetic is
// csrc/cpu/nearest_codebook*.cpp, the proof docs/nearest-codebook.md.
#include "cpu/nearest_codebook.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "capability.h"
#include "tensor.h"

namespace pygen {
namespace {

// Short vectors have so few products that the wide windows of the low precisions would cost more than their speed
// brings: the shortest are searched in float32, the next in 16-bit integers where there are any, else in float32 as well.
constexpr int64_t kShortest = 4, kShort = 17;
// Groups are at least a block and at most so many: their peaks are kept for every row of a chunk.
constexpr int64_t kMostGroups = 1024;
// A chunk's peaks, and its rows' words, stay in the second-level cache.
constexpr int64_t kChunkBytes = 384 << 10;
// Strips are searched three at a time.
constexpr int64_t kChunkStep = 3 * kStripRows, kLargestChunk = 10 * kChunkStep;
// For so few rows brute force in float64 costs less than preparing the codebook.
constexpr int64_t kFewRows = 4;
// A mean of at least this part of the codes' mean squared norm is subtracted: it makes the bounds smaller. Below, 16-bit
// values keep their exact representation.
constexpr double kMeanWorthwhile = 1.0 / 16;
constexpr int64_t kCodesPerTask = 64;
// Groups whose norms differ by less than this factor get the bounds of the greatest: the loops over groups then have
// nothing to compute. Windows of float32 and 16-bit integers are so narrow that a wider one costs nothing; the steps of
// 8-bit integers gain more by fitting their group.
constexpr float kUniform = 4.0f, kUniformBFloat16 = 1.5f;

// Uninitialised memory, aligned for the widest vectors.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : memory_(new char[count * sizeof(T) + kAlignment]),
        data_(reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.get()) + kAlignment - 1) / kAlignment *
                                   kAlignment)) {}
  T* get() const { return data_; }

 private:
  static constexpr uintptr_t kAlignment = 64;
  std::unique_ptr<char[]> memory_;
  T* data_;
};

struct Search {
  Format format;
  const ScreenKernels* kernels;
};

Search chosen_search(int64_t dim) {
  const NearestCodebookKernels& kernels = PYGEN_KERNELS(nearest_codebook_kernels);
#if defined(PYGEN_X86_LEVELS)
#if defined(PYGEN_BUILT_AMX)
  if (dim >= kShort && capability() >= Capability::kAmx) return {Format::kBFloat16, &amx::bfloat16_search};
#endif
#if defined(PYGEN_BUILT_AVX512_VNNI)
  if (dim >= kShortest && capability() >= Capability::kAvx512Vnni)
    return dim >= kShort ? Search{Format::kInt8, &avx512_vnni::int8_search}
                         : Search{Format::kInt16, &avx512_vnni::int16_search};
#endif
#endif
  return {Format::kFloat32, &kernels.float32};
}

int64_t words_of(Format format, int64_t dim) {
  const int64_t per_word = elements_per_word(format), words = (dim + per_word - 1) / per_word;
  return format == Format::kBFloat16 ? (words + 15) / 16 * 16 : words;  // whole AMX tiles
}

// The packed codebook of one head and the memory that it points into.
class Prepared {
 public:
  Prepared(const GivenVectors& given, Metric metric, const Search& search, int64_t rows)
      : mean_(given.dim),
        squared_norm_(metric == Metric::kCosine ? given.count : 0),
        usable_(given.count),
        groups_(shape(given, search)),
        code_words_(groups_.count * groups_.blocks * kBlockCodes * words_of(search.format, given.dim)),
        bias_(groups_.count * groups_.blocks * kBlockCodes),
        bounds_(groups_.count) {
    codes_ = {};
    codes_.given = given;
    codes_.metric = metric;
    codes_.format = search.format;
    codes_.words = words_of(search.format, given.dim);
    codes_.group_blocks = groups_.blocks;
    codes_.groups = groups_.count;
    codes_.scaling = codes_.largest = 1.0;
    codes_.mean = mean_.get();
    codes_.squared_norm = squared_norm_.get();
    codes_.usable = usable_.get();
    codes_.code_words = code_words_.get();
    codes_.bias = bias_.get();
    codes_.bounds = bounds_.get();
    frame();
    codes_.searchable = codes_.searchable && rows > kFewRows;
    if (codes_.searchable && codes_.any_usable) pack();
  }

  const PackedCodebook& codes() const { return codes_; }

 private:
  struct Groups {
    int64_t blocks, count;
  };

  static Groups shape(const GivenVectors& given, const Search& search) {
    const int64_t blocks = (given.count + kBlockCodes - 1) / kBlockCodes;
    int64_t per_group = search.format == Format::kBFloat16 ? 2 : 1;  // AMX takes two tiles of codes at once
    while (blocks > kMostGroups * per_group) per_group *= 2;
    return {per_group, (blocks + per_group - 1) / per_group};
  }

  // Sums of tasks are added in their order: the same frame at any number of threads.
  void frame() {
    const int64_t dim = codes_.given.dim, count = codes_.given.count;
    const int64_t tasks = (count + kCodesPerTask - 1) / kCodesPerTask, many = std::max<int64_t>(1, tasks / 64);
    const int64_t parts = (tasks + many - 1) / many;
    std::vector<CodeSummary> found(parts);
    Buffer<double> sums(parts * dim);
    std::memset(sums.get(), 0, parts * dim * sizeof(double));
    parallel_for(parts, std::max<int64_t>(1, kElementsPerTask / (many * kCodesPerTask * dim)),
                 [&](int64_t begin, int64_t end) {
                   Buffer<double> wide(dim + 8);
                   for (int64_t p = begin; p < end; ++p)
                     found[p] = PYGEN_KERNELS(nearest_codebook_kernels)
                                    .summarise(codes_, p * many * kCodesPerTask,
                                               std::min(count, (p + 1) * many * kCodesPerTask), sums.get() + p * dim,
                                               wide.get());
                 });
    CodeSummary all = {};
    for (const CodeSummary& part : found) {
      all.largest_element = std::max(all.largest_element, part.largest_element);
      all.largest_norm = std::max(all.largest_norm, part.largest_norm);
      all.squared_norms += part.squared_norms;
      all.usable += part.usable;
    }
    codes_.any_usable = all.usable > 0;
    const bool cosine = codes_.metric == Metric::kCosine;
    const double largest = all.largest_element;
    codes_.searchable = largest == 0 || (largest >= kLeastMagnitude && largest <= kGreatestMagnitude);
    if (!codes_.searchable || !codes_.any_usable) return;
    codes_.scaling = cosine || largest == 0 ? 1.0 : std::exp2(-std::floor(std::log2(largest)));
    codes_.largest = all.largest_norm * codes_.scaling;
    set_mean(all, sums.get(), parts);
  }

  void set_mean(const CodeSummary& all, const double* sums, int64_t parts) {
    const int64_t dim = codes_.given.dim;
    std::memset(mean_.get(), 0, dim * sizeof(double));
    for (int64_t p = 0; p < parts; ++p)
      for (int64_t i = 0; i < dim; ++i) mean_.get()[i] += sums[p * dim + i];
    double squares = 0;
    for (int64_t i = 0; i < dim; ++i) {
      mean_.get()[i] /= double(all.usable);
      squares += mean_.get()[i] * mean_.get()[i];
    }
    const bool worthwhile = squares * double(all.usable) > kMeanWorthwhile * all.squared_norms;
    for (int64_t i = 0; i < dim; ++i) mean_.get()[i] = worthwhile ? mean_.get()[i] * codes_.scaling : 0.0;
  }

  using OverGroups = void (*)(const PackedCodebook&, int64_t, int64_t, double*, float*);

  void over_groups(OverGroups function) {
    const int64_t dim = codes_.given.dim, work = codes_.group_codes() * dim;
    parallel_for(codes_.groups, std::max<int64_t>(1, kElementsPerTask / work), [&](int64_t begin, int64_t end) {
      Buffer<double> wide(dim + 8);
      Buffer<float> scratch(4 * (dim + 64));
      function(codes_, begin, end, wide.get(), scratch.get());
    });
  }

  void pack() {
    const NearestCodebookKernels& kernels = PYGEN_KERNELS(nearest_codebook_kernels);
    over_groups(kernels.size_groups);
    GroupBounds* const first = codes_.bounds;
    GroupBounds* const last = first + codes_.groups;
    const auto greatest = [&](float GroupBounds::* field) {
      float value = 0;
      for (const GroupBounds* g = first; g < last; ++g) value = std::max(value, g->*field);
      return value;
    };
    const float norm = greatest(&GroupBounds::norm);
    const float factor = codes_.format == Format::kBFloat16 ? kUniformBFloat16 : kUniform;
    codes_.uniform = codes_.format != Format::kInt8 &&
                     std::all_of(first, last, [&](const GroupBounds& g) { return g.norm * factor >= norm; });
    if (codes_.uniform) {
      const float scale = greatest(&GroupBounds::scale);
      std::for_each(first, last, [&](GroupBounds& g) { g.norm = norm, g.scale = scale; });
    }
    over_groups(kernels.pack_groups);
    if (codes_.uniform) {
      const float residual = greatest(&GroupBounds::residual);
      std::for_each(first, last, [&](GroupBounds& g) { g.residual = residual; });
    }
  }

  Buffer<double> mean_, squared_norm_;
  Buffer<uint8_t> usable_;
  Groups groups_;
  Buffer<int32_t> code_words_;
  Buffer<float> bias_;
  Buffer<GroupBounds> bounds_;
  PackedCodebook codes_;
};

// A chunk's memory, one for each thread.
class Chunk {
 public:
  Chunk(const PackedCodebook& codes, const GivenVectors& given, const bool* mask, int64_t rows)
      : rows_of_(rows),
        words_(rows * codes.words),
        start_(rows),
        floats_(4 * rows),
        kind_(rows),
        peaks_(rows * codes.groups),
        flagged_(kStripRows * codes.groups),
        thresholds_(kStripRows * codes.groups),
        wide_(2 * (codes.given.dim + 8)),
        scores_(codes.group_codes()),
        scratch_(2 * kStripRows * (codes.given.dim + 64)) {
    rows_ = {};
    rows_.given = given;
    rows_.mask = mask;
    rows_.row_words = words_.get();
    rows_.start = start_.get();
    rows_.inverse = floats_.get();
    rows_.residual = floats_.get() + rows;
    rows_.length = floats_.get() + 2 * rows;
    rows_.constant = floats_.get() + 3 * rows;
    rows_.kind = kind_.get();
    rows_.peaks = peaks_.get();
    rows_.flagged = flagged_.get();
    rows_.thresholds = thresholds_.get();
    rows_.wide = wide_.get();
    rows_.scores = scores_.get();
  }

  void search(const PackedCodebook& codes, const ScreenKernels& search, int64_t first, int64_t count,
              const SearchResults& results) {
    const NearestCodebookKernels& kernels = PYGEN_KERNELS(nearest_codebook_kernels);
    rows_.first = first;
    rows_.count = count;
    rows_.strips = (count + kStripRows - 1) / kStripRows;
    kernels.pack_rows(codes, rows_, scratch_.get());
    if (codes.searchable && codes.any_usable) search.screen(codes, rows_);
    kernels.decide(codes, rows_, search, results);
  }

  int64_t rows() const { return rows_of_; }

 private:
  int64_t rows_of_;
  Buffer<int32_t> words_, start_;
  Buffer<float> floats_;
  Buffer<RowKind> kind_;
  Buffer<float> peaks_;
  Buffer<int32_t> flagged_;
  Buffer<float> thresholds_;
  Buffer<double> wide_;
  Buffer<float> scores_, scratch_;
  PackedRows rows_;
};

int64_t chunk_rows(const PackedCodebook& codes, int64_t n) {
  const int64_t bytes = 4 * std::max(codes.groups, codes.words);
  const int64_t fitting = std::min(kLargestChunk, kChunkBytes / bytes);
  const int64_t wanted = std::min(fitting, (n + 7) / 8);  // for a few threads to share
  return std::max<int64_t>(1, (wanted + kChunkStep - 1) / kChunkStep) * kChunkStep;
}

void search_head(const GivenVectors& x, const GivenVectors& codebook, Metric metric, const bool* mask,
                 const SearchResults& results) {
  const Search search = chosen_search(x.dim);
  const Prepared prepared(codebook, metric, search, x.count);
  const PackedCodebook& codes = prepared.codes();
  const int64_t size = chunk_rows(codes, x.count), chunks = (x.count + size - 1) / size;
  const int64_t work = size * codebook.count * x.dim;
  parallel_for(chunks, std::max<int64_t>(1, kElementsPerTask / work), [&](int64_t begin, int64_t end) {
    Chunk chunk(codes, x, mask, size);
    for (int64_t c = begin; c < end; ++c)
      chunk.search(codes, *search.kernels, c * size, std::min(size, x.count - c * size), results);
  });
}

Metric checked_metric(const std::string& metric) {
  if (metric == "euclidean") return Metric::kEuclidean;
  if (metric == "cosine") return Metric::kCosine;
  PYGEN_CHECK(metric == "dot", "nearest_codebook: metric must be euclidean, cosine or dot, got \"", metric, "\"");
  return Metric::kDot;
}

FloatType checked_type(const Tensor& x, const char* name) {
  PYGEN_CHECK(is_floating(x.scalar_type()), "nearest_codebook: ", name,
              " must be floating point (float64, float32, bfloat16, float16), got ", dtype_string(x.scalar_type()));
  return static_cast<FloatType>(type_of(x.scalar_type()));
}

void check_shapes(const Tensor& x, const Tensor& codebook, const std::optional<Tensor>& mask) {
  PYGEN_CHECK(x.dim() == 3 && codebook.dim() == 3, "nearest_codebook: x must be (H, N, D) and codebook (H, K, D), got ",
              shape_string(x), " and ", shape_string(codebook));
  PYGEN_CHECK(x.size(0) == codebook.size(0) && x.size(2) == codebook.size(2),
              "nearest_codebook: x (H, N, D) and codebook (H, K, D) must agree in H and D, got ", shape_string(x),
              " and ", shape_string(codebook));
  PYGEN_CHECK(codebook.size(1) > 0, "nearest_codebook: the codebook must have a code, got ", shape_string(codebook));
  PYGEN_CHECK(codebook.size(1) < (int64_t{1} << 31), "nearest_codebook: at most 2^31 - 1 codes, got ",
              codebook.size(1));
  if (!mask) return;
  PYGEN_CHECK(mask->scalar_type() == ScalarType::Bool, "nearest_codebook: mask must be torch.bool, got ",
              dtype_string(mask->scalar_type()));
  PYGEN_CHECK(mask->dim() == 2 && mask->size(0) == x.size(0) && mask->size(1) == x.size(1),
              "nearest_codebook: mask must be (H, N) for x ", shape_string(x), ", got ", shape_string(*mask));
}

std::tuple<Tensor, Tensor, Tensor> nearest_codebook(const Tensor& x, const Tensor& codebook, const std::string& metric,
                                                    const std::optional<Tensor>& mask, bool return_distance,
                                                    bool return_candidates) {
  const FloatType x_type = checked_type(x, "x"), code_type = checked_type(codebook, "codebook");
  const Metric chosen = checked_metric(metric);
  check_shapes(x, codebook, mask);
  const Tensor rows = made_contiguous(x), codes = made_contiguous(codebook);
  const std::optional<Tensor> kept = mask ? std::optional<Tensor>(made_contiguous(*mask)) : std::nullopt;
  const int64_t heads = x.size(0), n = x.size(1), dim = x.size(2), k = codebook.size(1);
  const int64_t shape[] = {heads, n}, none[] = {0};
  const bool wide = x.scalar_type() == ScalarType::Double;
  const Tensor indices = empty_contiguous(shape, 2, ScalarType::Long);
  const Tensor distance = empty_contiguous(return_distance ? shape : none, return_distance ? 2 : 1,
                                           wide ? ScalarType::Double : ScalarType::Float);
  const Tensor candidates =
      empty_contiguous(return_candidates ? shape : none, return_candidates ? 2 : 1, ScalarType::Int);
  if (heads * n == 0) return {distance, indices, candidates};
  const int64_t x_bytes = n * dim * bytes_of(x.scalar_type()), code_bytes = k * dim * bytes_of(codebook.scalar_type());
  for (int64_t h = 0; h < heads; ++h) {
    const auto at = [h, n](auto* data) { return data + h * n; };
    SearchResults results = {at(static_cast<int64_t*>(indices.mutable_data_ptr())), nullptr, nullptr, nullptr};
    if (return_distance && wide) results.distance_f64 = at(static_cast<double*>(distance.mutable_data_ptr()));
    if (return_distance && !wide) results.distance_f32 = at(static_cast<float*>(distance.mutable_data_ptr()));
    if (return_candidates) results.candidates = at(static_cast<int32_t*>(candidates.mutable_data_ptr()));
    search_head({static_cast<const char*>(rows.const_data_ptr()) + h * x_bytes, x_type, n, dim},
                {static_cast<const char*>(codes.const_data_ptr()) + h * code_bytes, code_type, k, dim}, chosen,
                kept ? at(static_cast<const bool*>(kept->const_data_ptr())) : nullptr, results);
  }
  return {distance, indices, candidates};
}

}  // namespace
}  // namespace pygen

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, m) { m.impl("nearest_codebook", TORCH_BOX(&pygen::nearest_codebook)); }
