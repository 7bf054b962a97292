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

template <typename V>
struct Combined {
  V overlap, kept, written;
};

template <typename V>
PYGEN_INLINE Combined<V> combine(V master_forget, V master_in, V forget, V input) {
  const V overlap = master_forget * master_in;
  return {overlap, forget * overlap + (master_forget - overlap), input * overlap + (master_in - overlap)};
}

template <typename T>
void forward_row(const OnLstmStep& step, int64_t r) {
  using V = typename VecOf<T>::vec;
  const int64_t size = step.size, n = size / step.chunk_size, width = 2 * n + 4 * size;
  const ScratchRows<T> rows(step.scratch, size);
  const GateRow<T> gate(static_cast<T*>(step.gates) + r * width, n, size);
  const auto state = [&](const void* p) { return p ? static_cast<const T*>(p) + r * size : nullptr; };
  const T *const before = state(step.cell_before), *const hidden_before = state(step.hidden_before);
  const T *const keep_cell = state(step.keep_cell), *const keep_hidden = state(step.keep_hidden);
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
  static_cast<T*>(step.distance_forget)[r] = static_cast<T>(1 - forget_mean);
  static_cast<T*>(step.distance_in)[r] = static_cast<T>(in_mean);

  for (int64_t i = 0; i < size; i += VecOf<T>::lanes) {
    const V output = sigmoid(read(gate.output, i, size)).value, candidate = tanh(read(gate.candidate, i, size));
    const V input = sigmoid(read(gate.input, i, size)).value, forget = sigmoid(read(gate.forget, i, size)).value;
    const auto both = combine(load(master_forget + i), load(master_in + i), forget, input);
    const V c = read(before, i, size);
    V new_cell = both.kept * c + both.written * candidate;
    V new_hidden = output * tanh(new_cell);
    if (keep_cell) {
      new_cell += read(keep_cell, i, size) * (c - new_cell);
      new_hidden += read(keep_hidden, i, size) * (read(hidden_before, i, size) - new_hidden);
    }
    write(gate.output, i, size, output);
    write(gate.candidate, i, size, candidate);
    write(gate.input, i, size, input);
    write(gate.forget, i, size, forget);
    write(cell, i, size, new_cell);
    write(hidden, i, size, new_hidden);
  }
}

// row[k] = the sum of chunk k; in place, from front to back.
template <typename T>
PYGEN_INLINE void sum_chunks(T* row, int64_t n, int64_t chunk_size) {
  for (int64_t k = 0; k < n; ++k) {
    T sum = 0;
    for (int64_t j = 0; j < chunk_size; ++j) sum += row[k * chunk_size + j];
    row[k] = sum;
  }
}

// grad[k] = p[k] (d[k] - sum_j p[j] d[j])
template <typename T>
void through_softmax(const T* p, const T* d, int64_t n, T* grad) {
  double mean = 0;
  for (int64_t k = 0; k < n; ++k) mean += static_cast<double>(p[k]) * d[k];
  for (int64_t k = 0; k < n; ++k) grad[k] = static_cast<T>(p[k] * (d[k] - mean));
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
  T *const d_kept = rows[2], *const d_written = rows[3], *const d_overlap = rows[4];

  running_sums(gate.forget_master, n, 1, d_kept);
  expand(d_kept, n, chunk_size, master_forget);
  sums_behind(gate.in, n, 1, d_kept);
  expand(d_kept, n, chunk_size, master_in);

  for (int64_t i = 0; i < size; i += VecOf<T>::lanes) {
    const V output = read(gate.output, i, size), candidate = read(gate.candidate, i, size);
    const V input = read(gate.input, i, size), forget = read(gate.forget, i, size);
    const auto both = combine(load(master_forget + i), load(master_in + i), forget, input);
    const V c = read(before, i, size);
    V of_hidden = read(grad_hidden, i, size), of_cell = read(grad_cell, i, size);
    if (grad_output) of_hidden += read(grad_output, i, size);
    V past_hidden = {}, past_cell = {}, new_cell;
    if (keep_cell) {
      past_hidden = of_hidden * read(keep_hidden, i, size), past_cell = of_cell * read(keep_cell, i, size);
      of_hidden -= past_hidden, of_cell -= past_cell;
      new_cell = both.kept * c + both.written * candidate;
    } else {
      new_cell = read(cell, i, size);
    }
    const V squashed = tanh(new_cell);
    of_cell += of_hidden * output * (1 - squashed * squashed);
    const V of_kept = of_cell * c, of_written = of_cell * candidate;
    store(d_kept + i, of_kept);
    store(d_written + i, of_written);
    store(d_overlap + i, of_kept * (forget - 1) + of_written * (input - 1));
    write(grad.output, i, size, of_hidden * squashed * output * (1 - output));
    write(grad.candidate, i, size, of_cell * both.written * (1 - candidate * candidate));
    write(grad.input, i, size, of_written * both.overlap * input * (1 - input));
    write(grad.forget, i, size, of_kept * both.overlap * forget * (1 - forget));
    write(grad_hidden, i, size, past_hidden);
    write(grad_cell, i, size, of_cell * both.kept + past_cell);
  }

  sum_chunks(d_kept, n, chunk_size);
  sum_chunks(d_written, n, chunk_size);
  sum_chunks(d_overlap, n, chunk_size);
  const auto of_distance = [&](const void* p) { return p ? double(static_cast<const T*>(p)[r]) / double(n) : 0.0; };
  const double further = of_distance(step.grad_distance_in), nearer = of_distance(step.grad_distance_forget);
  // p_j of the input's softmax is in every 1 - cumax before it, p_j of the forget gate's in every cumax from it on.
  double sum = 0;
  for (int64_t k = 0; k < n; ++k) {
    const double of_in = d_written[k] + d_overlap[k] * master_forget[k * chunk_size] + further;
    d_written[k] = static_cast<T>(sum);
    sum += of_in;
  }
  sum = 0;
  for (int64_t k = n - 1; k >= 0; --k) {
    sum += d_kept[k] + d_overlap[k] * master_in[k * chunk_size] - nearer;
    d_kept[k] = static_cast<T>(sum);
  }
  through_softmax(gate.in, d_written, n, grad.in);
  through_softmax(gate.forget_master, d_kept, n, grad.forget_master);
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
