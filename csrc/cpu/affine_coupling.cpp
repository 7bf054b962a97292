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

template <typename In>
void gather_sample(const CouplingOperand& operand, const In* data, int64_t start, int64_t n, compute_t<In>* out) {
  const int inner = operand.dims - 1;
  if (inner == 0) return gather(data + start * operand.stride[0], operand.stride[0], n, out);
  int64_t done = 0;
  while (done < n) {
    int64_t rest = start + done, offset = 0;
    const int64_t column = rest % operand.size[inner];
    rest /= operand.size[inner];
    for (int d = inner - 1; d >= 0; --d) {
      offset += rest % operand.size[d] * operand.stride[d];
      rest /= operand.size[d];
    }
    const int64_t run = operand.size[inner] - column < n - done ? operand.size[inner] - column : n - done;
    gather(data + offset + column * operand.stride[inner], operand.stride[inner], run, out + done);
    done += run;
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
  for (int64_t s = 0; s < span.samples; ++s)
    gather_sample(operand, data + s * operand.sample_stride, span.start, span.length, scratch + s * span.length);
  return scratch;
}

// A vector at i of an n-element chunk; behind the end, zeros, which every map takes to a finite number.
template <typename T>
PYGEN_INLINE typename VecOf<T>::vec read(const T* p, int64_t i, int64_t n) {
  return i + VecOf<T>::lanes <= n ? load(p + i) : load_some(p + i, n - i, T(0));
}

template <typename T>
PYGEN_INLINE void write(T* p, int64_t i, int64_t n, typename VecOf<T>::vec v) {
  i + VecOf<T>::lanes <= n ? store(p + i, v) : store_some(p + i, v, n - i);
}

// ---- chunks ----------------------------------------------------------------------------------------------------------

template <bool shift_first, bool inverse, typename V>
PYGEN_INLINE V transformed(V x, V s, V t) {
  if constexpr (inverse) return shift_first ? x / s - t : (x - t) / s;
  return shift_first ? (x + t) * s : x * s + t;
}

template <ScaleMap map, bool shift_first, bool inverse, typename T>
void forward_mode(const T* __restrict x, const T* __restrict scale, const T* __restrict shift, T* __restrict y,
                  T* __restrict log_s, int64_t n, T clamp) {
  constexpr int lanes = VecOf<T>::lanes;
  int64_t i = 0;
  for (; i + kSideBySide * lanes <= n; i += kSideBySide * lanes) {
#pragma GCC unroll 4
    for (int k = 0; k < kSideBySide; ++k) {
      const int64_t at = i + k * lanes;
      const auto scaling = scale_of<map>(load(scale + at), clamp);
      store(log_s + at, scaling.log_s);
      store(y + at, transformed<shift_first, inverse>(load(x + at), scaling.s, load(shift + at)));
    }
  }
  for (; i < n; i += lanes) {
    const auto scaling = scale_of<map>(read(scale, i, n), clamp);
    write(log_s, i, n, scaling.log_s);
    write(y, i, n, transformed<shift_first, inverse>(read(x, i, n), scaling.s, read(shift, i, n)));
  }
}

// forward: dx = g s, da = (g s w + l) d log s; inverse: dx = g / s, da = -(g w / s + l) d log s; w is what s multiplies,
// l the gradient of the log-determinant.
template <ScaleMap map, bool shift_first, bool inverse, typename T>
void backward_mode(const T* __restrict g, const T* __restrict l, const T* __restrict x, const T* __restrict scale,
                   const T* __restrict shift, T* __restrict dx, T* __restrict da, int64_t n, T clamp) {
  constexpr int lanes = VecOf<T>::lanes;
  constexpr bool needs_shift = shift_first != inverse;
  const auto one = [=](auto scaling, auto g, auto l, auto x, auto t, auto& dx, auto& da)
                       __attribute__((always_inline)) {
                         const auto w = needs_shift ? (inverse ? x - t : x + t) : x;
                         dx = inverse ? g / scaling.s : g * scaling.s;
                         da = (inverse ? -(dx * w + l) : dx * w + l) * scaling.slope;
                       };
  int64_t i = 0;
  for (; i + kSideBySide * lanes <= n; i += kSideBySide * lanes) {
#pragma GCC unroll 4
    for (int k = 0; k < kSideBySide; ++k) {
      const int64_t at = i + k * lanes;
      typename VecOf<T>::vec dx_at, da_at;
      one(scale_and_slope_of<map>(load(scale + at), clamp), load(g + at), load(l + at), load(x + at),
          needs_shift ? load(shift + at) : load(x + at), dx_at, da_at);
      store(dx + at, dx_at);
      store(da + at, da_at);
    }
  }
  for (; i < n; i += lanes) {
    typename VecOf<T>::vec dx_at, da_at;
    one(scale_and_slope_of<map>(read(scale, i, n), clamp), read(g, i, n), read(l, i, n), read(x, i, n),
        needs_shift ? read(shift, i, n) : read(x, i, n), dx_at, da_at);
    write(dx, i, n, dx_at);
    write(da, i, n, da_at);
  }
}

// The mode is a template parameter so that the loops' bodies have no branch; this is where it becomes one.
#define PYGEN_BY_MODE(task, function, ...)                                                                      \
  (task).inverse                                                                                                \
      ? ((task).shift_first ? function<map, true, true>(__VA_ARGS__) : function<map, false, true>(__VA_ARGS__)) \
      : ((task).shift_first ? function<map, true, false>(__VA_ARGS__) : function<map, false, false>(__VA_ARGS__))

template <ScaleMap map, typename T>
void forward_chunk(const T* x, const T* scale, const T* shift, T* y, T* log_s, int64_t n, const CouplingTask& task) {
  PYGEN_BY_MODE(task, forward_mode, x, scale, shift, y, log_s, n, static_cast<T>(task.clamp));
}

template <ScaleMap map, typename T>
void backward_chunk(const T* g, const T* l, const T* x, const T* scale, const T* shift, T* dx, T* da, int64_t n,
                    const CouplingTask& task) {
  PYGEN_BY_MODE(task, backward_mode, g, l, x, scale, shift, dx, da, n, static_cast<T>(task.clamp));
}

template <typename T>
double sum_of(const T* values, int64_t n) {
  f64v sum{};
  for (int64_t i = 0; i < n; i += VecOf<T>::lanes) accumulate(sum, read(values, i, n));
  return sum_of_lanes(sum);
}

// ---- blocks ----------------------------------------------------------------------------------------------------------

// The output itself where it is of the computing type, else scratch that finish() rounds into it.
template <typename Out>
PYGEN_INLINE compute_t<Out>* place(Out* out, compute_t<Out>* scratch) {
  return sizeof(Out) == sizeof(compute_t<Out>) ? reinterpret_cast<compute_t<Out>*>(out) : scratch;
}

template <typename Out>
PYGEN_INLINE void finish(const compute_t<Out>* computed, Out* out, int64_t n) {
  if (sizeof(Out) != sizeof(compute_t<Out>)) scatter(computed, 1, n, out);
}

// Calls chunk(span, where the span begins in a contiguous tensor) over one block; small samples go many to a chunk.
template <typename Chunk>
PYGEN_INLINE void over_chunks(const CouplingTask& task, int64_t block, Chunk chunk) {
  const int64_t size = task.sample_size;
  const int64_t first = task.parts > 1 ? block / task.parts : block * task.samples_per_block;
  const int64_t count = task.samples - first < task.samples_per_block ? task.samples - first : task.samples_per_block;
  if (size <= kChunk) {
    const int64_t at_once = kChunk / size;
    for (int64_t done = 0; done < count; done += at_once) {
      const int64_t sample = first + done;
      chunk(Span{sample, count - done < at_once ? count - done : at_once, 0, size}, sample * size);
    }
    return;
  }
  const int64_t begin = task.parts > 1 ? block % task.parts * task.part_size : 0;
  const int64_t end = task.parts > 1 && begin + task.part_size < size ? begin + task.part_size : size;
  for (int64_t sample = first; sample < first + count; ++sample)
    for (int64_t start = begin; start < end; start += kChunk)
      chunk(Span{sample, 1, start, end - start < kChunk ? end - start : kChunk}, sample * size + start);
}

template <typename In, ScaleMap map>
void forward(const CouplingTask& task, int64_t begin, int64_t end) {
  using T = compute_t<In>;
  alignas(64) T x_buffer[kChunk], scale_buffer[kChunk], shift_buffer[kChunk], y_buffer[kChunk], log_s[kChunk];
  In* y = static_cast<In*>(task.y);
  const double sign = task.inverse ? -1 : 1;
  for (int64_t block = begin; block < end; ++block) {
    over_chunks(task, block, [&](const Span& span, int64_t at) {
      T* computed = place(y + at, y_buffer);
      forward_chunk<map>(fetch<In>(task.x, span, x_buffer), fetch<In>(task.scale, span, scale_buffer),
                         fetch<In>(task.shift, span, shift_buffer), computed, log_s, span.size(), task);
      finish(computed, y + at, span.size());
      double* log_det = task.log_det + span.sample * task.parts + span.start / task.part_size;
      for (int64_t s = 0; s < span.samples; ++s)
        log_det[s * task.parts] += sign * sum_of(log_s + s * span.length, span.length);
    });
  }
}

template <typename In, ScaleMap map>
void backward(const CouplingTask& task, int64_t begin, int64_t end) {
  using T = compute_t<In>;
  alignas(64) T x_buffer[kChunk], scale_buffer[kChunk], shift_buffer[kChunk], grad_buffer[kChunk], l[kChunk];
  alignas(64) T dx_buffer[kChunk], da_buffer[kChunk];
  In* dx = static_cast<In*>(task.y);
  In* da = static_cast<In*>(task.grad_scale);
  const T* grad_log_det = static_cast<const T*>(task.grad_log_det);
  // The shift enters the derivative only where it stands beside x under the scale.
  const bool needs_shift = task.shift_first != task.inverse;
  for (int64_t block = begin; block < end; ++block) {
    over_chunks(task, block, [&](const Span& span, int64_t at) {
      for (int64_t s = 0; s < span.samples; ++s) {
        const T value = grad_log_det ? grad_log_det[(span.sample + s) * task.grad_log_det_stride] : T(0);
        for (int64_t i = 0; i < span.length; ++i) l[s * span.length + i] = value;
      }
      T* computed_dx = place(dx + at, dx_buffer);
      T* computed_da = place(da + at, da_buffer);
      backward_chunk<map>(fetch<In>(task.grad_y, span, grad_buffer), l, fetch<In>(task.x, span, x_buffer),
                          fetch<In>(task.scale, span, scale_buffer),
                          needs_shift ? fetch<In>(task.shift, span, shift_buffer) : nullptr, computed_dx, computed_da,
                          span.size(), task);
      finish(computed_dx, dx + at, span.size());
      finish(computed_da, da + at, span.size());
    });
  }
}

// ---- the table -------------------------------------------------------------------------------------------------------

#define PYGEN_MAPS(direction, type)                                                                               \
  {direction<type, ScaleMap::kExp>,    direction<type, ScaleMap::kTanh>,     direction<type, ScaleMap::kSigmoid>, \
   direction<type, ScaleMap::kNflows>, direction<type, ScaleMap::kSoftplus>, direction<type, ScaleMap::kAtan>}
#define PYGEN_TYPES(direction) \
  {PYGEN_MAPS(direction, float), PYGEN_MAPS(direction, double), PYGEN_MAPS(direction, bf16), PYGEN_MAPS(direction, f16)}

extern const CouplingKernels coupling_kernels = {PYGEN_TYPES(forward), PYGEN_TYPES(backward)};

PYGEN_END_LEVEL
