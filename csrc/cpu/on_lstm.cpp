// The ON-LSTM cell, row by row. A row of a few thousand gates stays in cache, so several short passes over it cost nothing
// next to its exponentials.
#include "on_lstm.h"

#include "exponentials.h"

PYGEN_BEGIN_LEVEL

// Rows of scratch, each of a state's size and a vector more.
template <typename T>
struct ScratchRows {
  T* first;
  int64_t length;
  ScratchRows(void* scratch, int64_t size) : first(static_cast<T*>(scratch)), length(size + 32) {}
  T* operator[](int i) const { return first + i * length; }
};

// A row of gates: softmaxes over n chunks, then four gates of the state's size.
template <typename T>
struct GateRow {
  T *in, *forget_master, *output, *candidate, *input, *forget;
  GateRow(T* row, int64_t n, int64_t size)
      : in(row),
        forget_master(row + n),
        output(row + 2 * n),
        candidate(output + size),
        input(candidate + size),
        forget(input + size) {}
};

// out[k C .. k C + C) = master[k]. A chunk's last vector reaches into the next chunk, which is written after it.
template <typename T>
PYGEN_INLINE void expand(const T* master, int64_t n, int64_t chunk_size, T* out) {
  for (int64_t k = 0; k < n; ++k, out += chunk_size)
    for (int64_t j = 0; j < chunk_size; j += VecOf<T>::lanes) store(out + j, splat(master[k]));
}

template <typename T>
void scale_row(T* row, int64_t n, double factor) {
  for (int64_t k = 0; k < n; ++k) row[k] = static_cast<T>(row[k] * factor);
}

// cumax of the exponentials e: their running sums times scale. Returns the mean.
template <typename T>
double running_sums(const T* e, int64_t n, double scale, T* out) {
  double sum = 0, total = 0;
  for (int64_t k = 0; k < n; ++k) {
    sum += e[k];
    const double value = sum * scale;
    total += value;
    out[k] = static_cast<T>(value);
  }
  return total / static_cast<double>(n);
}

// 1 - cumax: what comes behind, summed from the end. Returns the mean.
template <typename T>
double sums_behind(const T* e, int64_t n, double scale, T* out) {
  double sum = 0, total = 0;
  for (int64_t k = n - 1; k >= 0; --k) {
    const double value = sum * scale;
    total += value;
    out[k] = static_cast<T>(value);
    sum += e[k];
  }
  return total / static_cast<double>(n);
}

// The softmax of a row in place; returns what the exponentials' sums are to be multiplied by.
template <typename T>
double normalise(const T* x, T* e, int64_t n) {
  const double sum = exponentials(x, e, n);
  if (sum != sum)
    for (int64_t k = 0; k < n; ++k) e[k] = static_cast<T>(sum);
  return 1 / sum;
}

// out = f(x) over a row, several vectors side by side: each waits for a chain of a hundred cycles.
template <typename T, typename F>
PYGEN_INLINE void map_row(const T* x, int64_t n, T* out, F f) {
  using V = typename VecOf<T>::vec;
  constexpr int lanes = VecOf<T>::lanes;
  int64_t i = 0;
  for (; i + kSideBySide * lanes <= n; i += kSideBySide * lanes) {
    V v[kSideBySide];
#pragma GCC unroll 4
    for (int k = 0; k < kSideBySide; ++k) v[k] = f(load(x + i + k * lanes));
#pragma GCC unroll 4
    for (int k = 0; k < kSideBySide; ++k) store(out + i + k * lanes, v[k]);
  }
  for (; i < n; i += lanes) write(out, i, n, f(read(x, i, n)));
}

template <typename T>
void sigmoid_row(T* row, int64_t n) {
  map_row(row, n, row, [](auto v) __attribute__((always_inline)) { return sigmoid(v).value; });
}

template <typename T>
void tanh_row(const T* x, int64_t n, T* out) {
  map_row(x, n, out, [](auto v) __attribute__((always_inline)) { return tanh(v); });
}

template <typename V>
struct Combined {
  V overlap, kept, written;
};

template <typename V>
PYGEN_INLINE Combined<V> combine(V master_forget, V master_in, V forget, V input) {
  const V overlap = master_forget * master_in;
  return {overlap, forget * overlap + (master_forget - overlap), input * overlap + (master_in - overlap)};
}

// The cell state after a step, before zoneout.
template <typename T, typename Gates>
void new_cell_row(const Gates& gate, const T* master_forget, const T* master_in, const T* before, int64_t size,
                  T* cell) {
  for (int64_t i = 0; i < size; i += VecOf<T>::lanes) {
    const auto both =
        combine(load(master_forget + i), load(master_in + i), read(gate.forget, i, size), read(gate.input, i, size));
    write(cell, i, size, both.kept * read(before, i, size) + both.written * read(gate.candidate, i, size));
  }
}

// now = keep before + (1 - keep) now: for 0 and 1 one of the two, to the bit.
template <typename T>
void zone_out(const T* keep, const T* before, int64_t size, T* now) {
  for (int64_t i = 0; i < size; i += VecOf<T>::lanes) {
    const auto share = read(keep, i, size);
    write(now, i, size, share * read(before, i, size) + (1 - share) * read(now, i, size));
  }
}

template <typename T>
void forward_row(const OnLstmStep& step, int64_t r) {
  const int64_t size = step.size, n = size / step.chunk_size, width = 2 * n + 4 * size;
  const ScratchRows<T> rows(step.scratch, size);
  const GateRow<T> gate(static_cast<T*>(step.gates) + r * width, n, size);
  const auto state = [&](const void* p) { return p ? static_cast<const T*>(p) + r * size : nullptr; };
  const T* const before = state(step.cell_before);
  T *const cell = static_cast<T*>(step.cell) + r * size, *const hidden = static_cast<T*>(step.hidden) + r * size;
  T *const master_forget = rows[0], *const master_in = rows[1], *const chunks = rows[2];

  const double forget_scale = normalise(gate.forget_master, gate.forget_master, n);
  const double forget_mean = running_sums(gate.forget_master, n, forget_scale, chunks);
  expand(chunks, n, step.chunk_size, master_forget);
  scale_row(gate.forget_master, n, forget_scale);
  const double in_scale = normalise(gate.in, gate.in, n);
  const double in_mean = sums_behind(gate.in, n, in_scale, chunks);
  expand(chunks, n, step.chunk_size, master_in);
  scale_row(gate.in, n, in_scale);
  static_cast<T*>(step.distance_forget)[r] = static_cast<T>(forget_mean > 1 ? 0 : 1 - forget_mean);
  static_cast<T*>(step.distance_in)[r] = static_cast<T>(in_mean);

  sigmoid_row(gate.output, size);
  tanh_row(gate.candidate, size, gate.candidate);
  sigmoid_row(gate.input, 2 * size);  // and the forget gate, which lies behind it
  new_cell_row(gate, master_forget, master_in, before, size, cell);
  tanh_row(cell, size, hidden);
  for (int64_t i = 0; i < size; i += VecOf<T>::lanes)
    write(hidden, i, size, read(gate.output, i, size) * read(hidden, i, size));
  if (step.keep_cell) {
    zone_out(state(step.keep_cell), before, size, cell);
    zone_out(state(step.keep_hidden), state(step.hidden_before), size, hidden);
  }
}

// row[k] = the sum of chunk k, from front to back in place: a sum is written where every later chunk lies behind. Several
// chunks side by side, because an addition waits for the one before.
template <typename T, int count>
PYGEN_INLINE void sum_chunks_at(T* row, int64_t k, int64_t chunk_size) {
  T sum[count] = {};
  const T* const chunk = row + k * chunk_size;
  for (int64_t j = 0; j < chunk_size; ++j)
#pragma GCC unroll 4
    for (int c = 0; c < count; ++c) sum[c] += chunk[c * chunk_size + j];
#pragma GCC unroll 4
  for (int c = 0; c < count; ++c) row[k + c] = sum[c];
}

template <typename T>
PYGEN_INLINE void sum_chunks(T* row, int64_t n, int64_t chunk_size) {
  int64_t k = 0;
  for (; k + kSideBySide <= n; k += kSideBySide) sum_chunks_at<T, kSideBySide>(row, k, chunk_size);
  for (; k < n; ++k) sum_chunks_at<T, 1>(row, k, chunk_size);
}

// grad[k] = p[k] (d[k] - sum_j p[j] d[j])
template <typename T>
void through_softmax(const T* p, const T* d, int64_t n, T* grad) {
  double mean = 0;
  for (int64_t k = 0; k < n; ++k) mean += static_cast<double>(p[k]) * d[k];
  for (int64_t k = 0; k < n; ++k) grad[k] = static_cast<T>(p[k] * (d[k] - mean));
}

// Asks for a row before it is needed: a step reads what the forward left long ago.
PYGEN_INLINE void ask_for(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i, 0, 2);
}

template <typename T>
void backward_row(const OnLstmBackwardStep& step, int64_t r) {
  using V = typename VecOf<T>::vec;
  const int64_t size = step.size, chunk_size = step.chunk_size, n = size / chunk_size, width = 2 * n + 4 * size;
  const ScratchRows<T> rows(step.scratch, size);
  const GateRow<const T> gate(static_cast<const T*>(step.activations) + r * width, n, size);
  const GateRow<T> grad(static_cast<T*>(step.grad_gates) + r * width, n, size);
  const auto state = [&](const void* p) { return p ? static_cast<const T*>(p) + r * size : nullptr; };
  const T *const before = state(step.cell_before), *const cell = state(step.cell);
  const T *const keep_cell = state(step.keep_cell), *const keep_hidden = state(step.keep_hidden);
  const T* const grad_output = state(step.grad_output);
  T* const grad_hidden = static_cast<T*>(step.grad_hidden) + r * size;
  T* const grad_cell = static_cast<T*>(step.grad_cell) + r * size;
  T *const master_forget = rows[0], *const master_in = rows[1];
  T *const d_forget = rows[2], *const d_in = rows[3], *const squashed = rows[4];

  if (r + 1 < step.rows) ask_for(gate.in + width, width * static_cast<int64_t>(sizeof(T)));
  running_sums(gate.forget_master, n, 1, d_in);
  expand(d_in, n, chunk_size, master_forget);
  sums_behind(gate.in, n, 1, d_in);
  expand(d_in, n, chunk_size, master_in);

  if (keep_cell) {
    new_cell_row(gate, master_forget, master_in, before, size, squashed);
    tanh_row(squashed, size, squashed);
  } else {
    tanh_row(cell, size, squashed);
  }
  for (int64_t i = 0; i < size; i += VecOf<T>::lanes) {
    const V output = read(gate.output, i, size), candidate = read(gate.candidate, i, size);
    const V input = read(gate.input, i, size), forget = read(gate.forget, i, size), s = load(squashed + i);
    const auto both = combine(load(master_forget + i), load(master_in + i), forget, input);
    V of_hidden = read(grad_hidden, i, size), of_cell = read(grad_cell, i, size);
    if (grad_output) of_hidden += read(grad_output, i, size);
    V past_hidden = {}, past_cell = {};
    if (keep_cell) {
      past_hidden = of_hidden * read(keep_hidden, i, size), past_cell = of_cell * read(keep_cell, i, size);
      of_hidden -= past_hidden, of_cell -= past_cell;
    }
    of_cell += of_hidden * output * (1 - s * s);
    const V of_kept = of_cell * read(before, i, size), of_written = of_cell * candidate;
    const V of_overlap = of_kept * (forget - 1) + of_written * (input - 1);
    store(d_forget + i, of_kept + of_overlap * load(master_in + i));
    store(d_in + i, of_written + of_overlap * load(master_forget + i));
    write(grad.output, i, size, of_hidden * s * output * (1 - output));
    write(grad.candidate, i, size, of_cell * both.written * (1 - candidate * candidate));
    write(grad.input, i, size, of_written * both.overlap * input * (1 - input));
    write(grad.forget, i, size, of_kept * both.overlap * forget * (1 - forget));
    write(grad_hidden, i, size, past_hidden);
    write(grad_cell, i, size, of_cell * both.kept + past_cell);
  }

  sum_chunks(d_forget, n, chunk_size);
  sum_chunks(d_in, n, chunk_size);
  const auto of_distance = [&](const void* p) { return p ? double(static_cast<const T*>(p)[r]) / double(n) : 0.0; };
  const double further = of_distance(step.grad_distance_in), nearer = of_distance(step.grad_distance_forget);
  // p_j of the input's softmax is in every 1 - cumax before it, p_j of the forget gate's in every cumax from it on.
  double sum = 0;
  for (int64_t k = 0; k < n; ++k) {
    const double of_in = d_in[k] + further;
    d_in[k] = static_cast<T>(sum);
    sum += of_in;
  }
  sum = 0;
  for (int64_t k = n - 1; k >= 0; --k) {
    sum += d_forget[k] - nearer;
    d_forget[k] = static_cast<T>(sum);
  }
  through_softmax(gate.in, d_in, n, grad.in);
  through_softmax(gate.forget_master, d_forget, n, grad.forget_master);
}

template <typename T>
void forward(const OnLstmStep& step) {
  for (int64_t r = 0; r < step.rows; ++r) forward_row<T>(step, r);
}

template <typename T>
void backward(const OnLstmBackwardStep& step) {
  for (int64_t r = 0; r < step.rows; ++r) backward_row<T>(step, r);
}

extern const OnLstmKernels on_lstm_kernels = {
    {forward<float>, forward<double>},
    {backward<float>, backward<double>},
};

PYGEN_END_LEVEL
