// Affine coupling of one block: chunks that fit the first-level cache are fetched (strides resolved, 16-bit types
// widened), computed, and written. A contiguous float or double operand is read where it lies.
#include "affine_coupling.h"

#include "math.h"

PYGEN_BEGIN_LEVEL

constexpr int64_t kChunk = 512;  // elements; four float64 operands of this size take half of a 32 KB cache

// ---- the scale maps --------------------------------------------------------------------------------------------------

template <typename V>
struct Scale {
  V s, log_s;
};

template <typename V>
struct ScaleSlope {
  V s, slope;  // slope = d log s / da
};

template <ScaleMap map, typename V, typename T>
PYGEN_INLINE Scale<V> scale_of(V a, T clamp) {
  if constexpr (map == ScaleMap::kExp) {
    return {exp(a), a};
  } else if constexpr (map == ScaleMap::kTanh) {
    const V t = tanh(a);
    return {exp_bounded(t), t};
  } else if constexpr (map == ScaleMap::kSigmoid) {
    const V z = a + T(kSigmoidOffset);
    const V u = exp_of_negative(-absolute(z));
    const V large = 1 / (1 + u);
    return {z < 0 ? u * large : large, (z < 0 ? z : V{}) - log1p(u)};
  } else if constexpr (map == ScaleMap::kNflows) {
    const V s = sigmoid(a + T(kSigmoidOffset)).value + T(kNflowsFloor);
    return {s, log(s)};
  } else if constexpr (map == ScaleMap::kSoftplus) {
    const V s = at_most(softplus(a) + T(kNflowsFloor), V{} + T(kNflowsSoftplusCeiling));
    return {s, log(s)};
  } else {
    const V log_s = clamp * T(kFreiaAtanGain) * atan(a);
    return {exp(log_s), log_s};
  }
}

template <ScaleMap map, typename V, typename T>
PYGEN_INLINE ScaleSlope<V> scale_and_slope_of(V a, T clamp) {
  if constexpr (map == ScaleMap::kExp) {
    return {exp(a), V{} + 1};
  } else if constexpr (map == ScaleMap::kTanh) {
    const V t = tanh(a);
    return {exp_bounded(t), 1 - t * t};
  } else if constexpr (map == ScaleMap::kSigmoid) {
    const auto sigma = sigmoid(a + T(kSigmoidOffset));
    return {sigma.value, sigma.complement};
  } else if constexpr (map == ScaleMap::kNflows) {
    const auto sigma = sigmoid(a + T(kSigmoidOffset));
    const V s = sigma.value + T(kNflowsFloor);
    return {s, sigma.value * sigma.complement / s};
  } else if constexpr (map == ScaleMap::kSoftplus) {
    const V s = softplus(a) + T(kNflowsFloor), ceiling = V{} + T(kNflowsSoftplusCeiling);
    return {at_most(s, ceiling), s > ceiling ? V{} : sigmoid(a).value / s};
  } else {
    const T gain = clamp * T(kFreiaAtanGain);
    return {exp(gain * atan(a)), gain / (1 + a * a)};
  }
}

// ---- operands --------------------------------------------------------------------------------------------------------

// Elements start, ..., start + length - 1 of each of `samples` samples: at most kChunk in all.
struct Span {
  int64_t sample, samples, start, length;
  int64_t size() const { return samples * length; }
};

template <typename In>
PYGEN_INLINE bool lies_ready(const CouplingOperand& operand, const Span& span) {
  return sizeof(In) == sizeof(compute_t<In>) && operand.dims == 1 && operand.stride[0] == 1 &&
         (span.samples == 1 || operand.sample_stride == span.length);
}

PYGEN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A walk over one sample's elements in their order, run by run: `rest` elements lie one stride apart from `offset` on.
// Divisions are done once, at its beginning.
class Walk {
 public:
  __attribute__((always_inline)) Walk(const CouplingOperand& operand, int64_t at)
      : operand_(operand), inner_(operand.dims - 1) {
    offset = 0;
    for (int d = inner_; d > 0; --d) {
      index_[d] = at % operand.size[d];
      at /= operand.size[d];
      offset += index_[d] * operand.stride[d];
    }
    index_[0] = at;
    offset += at * operand.stride[0];
  }
  __attribute__((always_inline)) int64_t rest() const { return operand_.size[inner_] - index_[inner_]; }
  __attribute__((always_inline)) int64_t stride() const { return operand_.stride[inner_]; }
  // n: at most rest().
  __attribute__((always_inline)) void advance(int64_t n) {
    index_[inner_] += n;
    offset += n * operand_.stride[inner_];
    for (int d = inner_; d > 0 && index_[d] == operand_.size[d]; --d) {
      offset += operand_.stride[d - 1] - index_[d] * operand_.stride[d];
      index_[d] = 0;
      ++index_[d - 1];
    }
  }
  int64_t offset;

 private:
  const CouplingOperand& operand_;
  const int inner_;
  int64_t index_[kMaxOperandDims];
};

class RowWalk {
 public:
  __attribute__((always_inline)) RowWalk(const CouplingResult& result, int64_t at)
      : offset(at), result_(result), column_(at) {
    if (at < result.row) return;
    column_ = at % result.row;
    offset = at / result.row * result.row_stride + column_;
  }
  __attribute__((always_inline)) int64_t rest() const { return result_.row - column_; }
  __attribute__((always_inline)) void advance(int64_t n) {
    column_ += n;
    offset += n;
    if (column_ == result_.row) offset += result_.row_stride - result_.row, column_ = 0;
  }
  int64_t offset;

 private:
  const CouplingResult& result_;
  int64_t column_;
};

// Neighbours from src to dst, widened or rounded where the types differ. A row may be as short as a vector: with
// gather()'s and memcpy's ways to find out, a batch of them takes twice as long.
template <typename In, typename Out>
PYGEN_INLINE void copy_row(const In* src, int64_t n, Out* dst) {
  if constexpr (sizeof(In) > sizeof(Out)) {
    scatter(src, 1, n, dst);
  } else if constexpr (sizeof(In) < sizeof(Out)) {
    gather(src, 1, n, dst);
  } else if constexpr (sizeof(In) == 2) {
    memcpy(dst, src, n * sizeof(In));
  } else {
    int64_t i = 0;
    for (; i + VecOf<In>::lanes <= n; i += VecOf<In>::lanes) store(dst + i, load(src + i));
    if (i < n) memcpy(dst + i, src + i, (n - i) * sizeof(In));
  }
}

template <typename In>
void gather_sample(const CouplingOperand& operand, const In* data, int64_t start, int64_t n, compute_t<In>* out) {
  Walk from(operand, start);
  for (int64_t done = 0; done < n;) {
    const int64_t length = smaller(from.rest(), n - done);
    if (from.stride() == 1) {
      copy_row(data + from.offset, length, out + done);
    } else {
      gather(data + from.offset, from.stride(), length, out + done);
    }
    from.advance(length);
    done += length;
  }
}

// A span's elements, one sample behind the other, from where they lie or through `scratch`.
template <typename In>
const compute_t<In>* fetch(const CouplingOperand& operand, const Span& span, compute_t<In>* scratch) {
  using T = compute_t<In>;
  if (!operand.data) {
    for (int64_t i = 0; i < span.size(); ++i) scratch[i] = 0;
    return scratch;
  }
  const In* data = static_cast<const In*>(operand.data) + span.sample * operand.sample_stride;
  if (lies_ready<In>(operand, span)) return reinterpret_cast<const T*>(data + span.start);
  if (operand.dims == 1 && operand.stride[0] == 1) {
    for (int64_t s = 0; s < span.samples; ++s)
      copy_row(data + s * operand.sample_stride + span.start, span.length, scratch + s * span.length);
    return scratch;
  }
  for (int64_t s = 0; s < span.samples; ++s)
    gather_sample(operand, data + s * operand.sample_stride, span.start, span.length, scratch + s * span.length);
  return scratch;
}

// ---- chunks ----------------------------------------------------------------------------------------------------------

template <bool shift_first, bool inverse, typename V>
PYGEN_INLINE V transformed(V x, V s, V t) {
  if constexpr (inverse) return shift_first ? x / s - t : (x - t) / s;
  return shift_first ? (x + t) * s : x * s + t;
}

// What the loops below read and write: kChunk elements at most.
template <typename T>
struct Chunk {
  const T *x, *scale, *shift;
  T *y, *log_s;    // forward
  const T *g, *l;  // backward
  T *dx, *da;
  T clamp;
};

// The loops of one map in one order and direction: a template, so that their bodies have no branch. kSideBySide vectors
// at a time; n is a multiple of theirs.
template <ScaleMap map, bool shift_first, bool inverse, typename T>
void forward_loop(const T* __restrict x, const T* __restrict scale, const T* __restrict shift, T* __restrict y,
                  T* __restrict log_s, int64_t n, T clamp) {
  constexpr int lanes = VecOf<T>::lanes;
  for (int64_t i = 0; i < n; i += kSideBySide * lanes) {
#pragma GCC unroll 4
    for (int k = 0; k < kSideBySide; ++k) {
      const int64_t at = i + k * lanes;
      const auto scaling = scale_of<map>(load(scale + at), clamp);
      store(log_s + at, scaling.log_s);
      store(y + at, transformed<shift_first, inverse>(load(x + at), scaling.s, load(shift + at)));
    }
  }
}

// forward: dx = g s, da = (g s w + l) d log s; inverse: dx = g / s, da = -(g w / s + l) d log s; w is what s multiplies,
// l the gradient of the log-determinant.
template <ScaleMap map, bool shift_first, bool inverse, typename T>
void backward_loop(const T* __restrict g, const T* __restrict l, const T* __restrict x, const T* __restrict scale,
                   const T* __restrict shift, T* __restrict dx, T* __restrict da, int64_t n, T clamp) {
  constexpr int lanes = VecOf<T>::lanes;
  constexpr bool needs_shift = shift_first != inverse;
  for (int64_t i = 0; i < n; i += kSideBySide * lanes) {
#pragma GCC unroll 4
    for (int k = 0; k < kSideBySide; ++k) {
      const int64_t at = i + k * lanes;
      const auto scaling = scale_and_slope_of<map>(load(scale + at), clamp);
      auto w = load(x + at);
      if constexpr (needs_shift) w = inverse ? w - load(shift + at) : w + load(shift + at);
      const auto dx_at = inverse ? load(g + at) / scaling.s : load(g + at) * scaling.s;
      store(dx + at, dx_at);
      store(da + at, (inverse ? -(dx_at * w + load(l + at)) : dx_at * w + load(l + at)) * scaling.slope);
    }
  }
}

template <ScaleMap map, bool shift_first, bool inverse, typename T>
void forward_on(const Chunk<T>& c, int64_t n) {
  forward_loop<map, shift_first, inverse>(c.x, c.scale, c.shift, c.y, c.log_s, n, c.clamp);
}

template <ScaleMap map, bool shift_first, bool inverse, typename T>
void backward_on(const Chunk<T>& c, int64_t n) {
  backward_loop<map, shift_first, inverse>(c.g, c.l, c.x, c.scale, c.shift, c.dx, c.da, n, c.clamp);
}

template <typename T>
using Loop = void (*)(const Chunk<T>&, int64_t n);

// One map's loops by order and direction: [shift_first][inverse].
template <typename T>
struct Loops {
  Loop<T> of[2][2];
};

template <ScaleMap map, typename T>
constexpr Loops<T> kForwardLoops = {{{forward_on<map, false, false, T>, forward_on<map, false, true, T>},
                                     {forward_on<map, true, false, T>, forward_on<map, true, true, T>}}};
template <ScaleMap map, typename T>
constexpr Loops<T> kBackwardLoops = {{{backward_on<map, false, false, T>, backward_on<map, false, true, T>},
                                      {backward_on<map, true, false, T>, backward_on<map, true, true, T>}}};

// The last elements of a chunk, too few for its loop, go through buffers that are as long as it needs: a second loop for
// them would be as much code again.
template <typename T>
__attribute__((noinline)) void run_rest(Loop<T> loop, Chunk<T> chunk, int64_t start, int64_t rest) {
  constexpr int64_t block = kSideBySide * VecOf<T>::lanes;
  T buffers[9][block] = {};
  int used = 0;
  const auto in = [&](const T*& p) {
    if (!p) return;
    memcpy(buffers[used], p + start, rest * sizeof(T));
    p = buffers[used++];
  };
  in(chunk.x), in(chunk.scale), in(chunk.shift), in(chunk.g), in(chunk.l);
  T *results[2], *places[2];
  int count = 0;
  const auto out = [&](T*& p) {
    if (!p) return;
    results[count] = p + start;
    p = places[count++] = buffers[used++];
  };
  out(chunk.y), out(chunk.log_s), out(chunk.dx), out(chunk.da);
  loop(chunk, block);
  for (int i = 0; i < count; ++i) memcpy(results[i], places[i], rest * sizeof(T));
}

template <typename T>
PYGEN_INLINE void run(Loop<T> loop, const Chunk<T>& chunk, int64_t n) {
  constexpr int64_t block = kSideBySide * VecOf<T>::lanes;
  const int64_t whole = n / block * block;
  if (whole > 0) loop(chunk, whole);
  if (whole < n) run_rest(loop, chunk, whole, n - whole);
}

template <typename T>
double sum_of(const T* values, int64_t n) {
  f64v sum{};
  for (int64_t i = 0; i < n; i += VecOf<T>::lanes) accumulate(sum, read(values, i, n));
  return sum_of_lanes(sum);
}

// ---- blocks ----------------------------------------------------------------------------------------------------------

PYGEN_INLINE bool in_one_block(const CouplingResult& result, const Span& span) {
  return span.start + span.length <= result.row && (span.samples == 1 || result.sample_stride == span.length);
}

// Where to compute a span of `result`: there itself where it is of the computing type and in one block, else in scratch
// that finish() brings there, rounded.
template <typename Out>
PYGEN_INLINE compute_t<Out>* place(const CouplingResult& result, const Span& span, compute_t<Out>* scratch) {
  if (sizeof(Out) != sizeof(compute_t<Out>) || !in_one_block(result, span)) return scratch;
  return static_cast<compute_t<Out>*>(result.data) + span.sample * result.sample_stride + span.start;
}

template <typename Out>
void finish(const compute_t<Out>* computed, const compute_t<Out>* scratch, const CouplingResult& result,
            const Span& span) {
  if (computed != scratch) return;
  Out* out = static_cast<Out*>(result.data) + span.sample * result.sample_stride;
  if (in_one_block(result, span)) return scatter(computed, 1, span.size(), out + span.start);
  if (span.start + span.length <= result.row) {
    for (int64_t s = 0; s < span.samples; ++s)
      copy_row(computed + s * span.length, span.length, out + s * result.sample_stride + span.start);
    return;
  }
  for (int64_t s = 0; s < span.samples; ++s) {
    RowWalk to(result, span.start);
    for (int64_t done = 0; done < span.length;) {
      const int64_t length = smaller(to.rest(), span.length - done);
      copy_row(computed + done, length, out + to.offset);
      to.advance(length);
      done += length;
    }
    computed += span.length;
    out += result.sample_stride;
  }
}

// What one block computes: samples first, ..., first + count - 1, or one part of one sample.
struct Block {
  int64_t first, count, part;
};

PYGEN_INLINE Block block_of(const CouplingTask& task, int64_t index) {
  if (task.parts > 1) return {index / task.parts, 1, index % task.parts};
  const int64_t first = index * task.samples_per_block;
  return {first, smaller(task.samples - first, task.samples_per_block), 0};
}

// Calls chunk(span) over one block; small samples go many to a chunk.
template <typename Chunk>
PYGEN_INLINE void over_chunks(const CouplingTask& task, const Block& block, Chunk chunk) {
  const int64_t size = task.sample_size;
  if (size <= kChunk) {
    const int64_t at_once = kChunk / size;
    for (int64_t done = 0; done < block.count; done += at_once)
      chunk(Span{block.first + done, smaller(block.count - done, at_once), 0, size});
    return;
  }
  const int64_t begin = block.part * task.part_size;
  const int64_t end = task.parts > 1 ? smaller(begin + task.part_size, size) : size;
  for (int64_t sample = block.first; sample < block.first + block.count; ++sample)
    for (int64_t start = begin; start < end; start += kChunk)
      chunk(Span{sample, 1, start, smaller(end - start, kChunk)});
}

// The block's share of the passive part: of its samples all, or as many elements as it has of its sample's parts.
template <typename In>
void copy_passive(const CouplingTask& task, const Block& block) {
  const CouplingOperand& from = task.passive;
  const CouplingResult& to = task.passive_copy;
  const int64_t begin = task.passive_size * block.part / task.parts;
  const int64_t end = task.passive_size * (block.part + 1) / task.parts;
  for (int64_t sample = block.first; sample < block.first + block.count; ++sample) {
    In* target = static_cast<In*>(to.data) + sample * to.sample_stride;
    RowWalk write(to, begin);
    if (!from.data) {
      for (int64_t at = begin, length; at < end; at += length) {
        length = smaller(write.rest(), end - at);
        memset(target + write.offset, 0, length * sizeof(In));
        write.advance(length);
      }
      continue;
    }
    const In* source = static_cast<const In*>(from.data) + sample * from.sample_stride;
    if (from.dims == 1 && from.stride[0] == 1 && end <= to.row) {
      copy_row(source + begin, end - begin, target + begin);
      continue;
    }
    Walk read(from, begin);
    for (int64_t at = begin, length; at < end; at += length) {
      length = smaller(smaller(write.rest(), read.rest()), end - at);
      const In* src = source + read.offset;
      In* dst = target + write.offset;
      if (read.stride() == 1) {
        copy_row(src, length, dst);
      } else {
        for (int64_t i = 0; i < length; ++i) dst[i] = src[i * read.stride()];
      }
      read.advance(length);
      write.advance(length);
    }
  }
}

template <typename In>
void forward_with(const Loops<compute_t<In>>& loops, const CouplingTask& task, int64_t begin, int64_t end) {
  using T = compute_t<In>;
  const Loop<T> loop = loops.of[task.shift_first][task.inverse];
  alignas(64) T x_buffer[kChunk], scale_buffer[kChunk], shift_buffer[kChunk], y_buffer[kChunk], log_s[kChunk];
  const double sign = task.inverse ? -1 : 1;
  for (int64_t index = begin; index < end; ++index) {
    const Block block = block_of(task, index);
    if (task.passive_size > 0) copy_passive<In>(task, block);
    over_chunks(task, block, [&](const Span& span) {
      T* computed = place<In>(task.y, span, y_buffer);
      Chunk<T> chunk{};
      chunk.x = fetch<In>(task.x, span, x_buffer);
      chunk.scale = fetch<In>(task.scale, span, scale_buffer);
      chunk.shift = fetch<In>(task.shift, span, shift_buffer);
      chunk.y = computed, chunk.log_s = log_s, chunk.clamp = static_cast<T>(task.clamp);
      run(loop, chunk, span.size());
      finish<In>(computed, y_buffer, task.y, span);
      double* log_det = task.log_det + span.sample * task.parts + span.start / task.part_size;
      for (int64_t s = 0; s < span.samples; ++s)
        log_det[s * task.parts] += sign * sum_of(log_s + s * span.length, span.length);
    });
  }
}

// The shift's gradient is one that is at hand, up to its sign: x's where the shift stands beside x under the scale, y's
// otherwise.
template <typename T>
void copy_signed(const T* __restrict grad, bool negative, int64_t n, T* __restrict out) {
  if (negative) {
    for (int64_t i = 0; i < n; ++i) out[i] = -grad[i];
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = grad[i];
  }
}

template <typename In>
void backward_with(const Loops<compute_t<In>>& loops, const CouplingTask& task, int64_t begin, int64_t end) {
  using T = compute_t<In>;
  const Loop<T> loop = loops.of[task.shift_first][task.inverse];
  alignas(64) T x_buffer[kChunk], scale_buffer[kChunk], shift_buffer[kChunk], grad_buffer[kChunk], l[kChunk];
  alignas(64) T dx_buffer[kChunk], da_buffer[kChunk], dt_buffer[kChunk];
  const T* grad_log_det = static_cast<const T*>(task.grad_log_det);
  // The shift enters the derivative only where it stands beside x under the scale.
  const bool needs_shift = task.shift_first != task.inverse;
  const bool of_y = task.grad_y.data != nullptr;
  for (int64_t index = begin; index < end; ++index) {
    const Block block = block_of(task, index);
    if (task.passive_size > 0) copy_passive<In>(task, block);
    over_chunks(task, block, [&](const Span& span) {
      for (int64_t s = 0; s < span.samples; ++s) {
        const T value = grad_log_det ? grad_log_det[(span.sample + s) * task.grad_log_det_stride] : T(0);
        for (int64_t i = 0; i < span.length; ++i) l[s * span.length + i] = value;
      }
      const T* g = fetch<In>(task.grad_y, span, grad_buffer);
      T* dx = place<In>(task.y, span, dx_buffer);
      T* da = place<In>(task.grad_scale, span, da_buffer);
      Chunk<T> chunk{};
      chunk.g = g, chunk.l = l, chunk.dx = dx, chunk.da = da, chunk.clamp = static_cast<T>(task.clamp);
      chunk.x = fetch<In>(task.x, span, x_buffer);
      chunk.scale = fetch<In>(task.scale, span, scale_buffer);
      if (needs_shift) chunk.shift = fetch<In>(task.shift, span, shift_buffer);
      run(loop, chunk, span.size());
      // The log-determinant does not depend on x, not even where an infinite scale makes 0 s a NaN.
      if (!of_y) memset(dx, 0, span.size() * sizeof(T));
      if (task.grad_shift.data) {
        T* dt = place<In>(task.grad_shift, span, dt_buffer);
        copy_signed(needs_shift ? dx : g, task.inverse && of_y, span.size(), dt);
        finish<In>(dt, dt_buffer, task.grad_shift, span);
      }
      finish<In>(dx, dx_buffer, task.y, span);
      finish<In>(da, da_buffer, task.grad_scale, span);
    });
  }
}

template <typename In, ScaleMap map>
void forward(const CouplingTask& task, int64_t begin, int64_t end) {
  forward_with<In>(kForwardLoops<map, compute_t<In>>, task, begin, end);
}

template <typename In, ScaleMap map>
void backward(const CouplingTask& task, int64_t begin, int64_t end) {
  backward_with<In>(kBackwardLoops<map, compute_t<In>>, task, begin, end);
}

// ---- the table -------------------------------------------------------------------------------------------------------

#define PYGEN_MAPS(direction, type)                                                                               \
  {direction<type, ScaleMap::kExp>,    direction<type, ScaleMap::kTanh>,     direction<type, ScaleMap::kSigmoid>, \
   direction<type, ScaleMap::kNflows>, direction<type, ScaleMap::kSoftplus>, direction<type, ScaleMap::kAtan>}
#define PYGEN_TYPES(direction) \
  {PYGEN_MAPS(direction, float), PYGEN_MAPS(direction, double), PYGEN_MAPS(direction, bf16), PYGEN_MAPS(direction, f16)}

extern const CouplingKernels coupling_kernels = {PYGEN_TYPES(forward), PYGEN_TYPES(backward)};

PYGEN_END_LEVEL
