// One step of an ON-LSTM layer behind its matrix product, forward and backward, for rows that lie behind each other.
// csrc/on_lstm.cpp deals out the rows and the steps. The formulas: pygen/ops/on_lstm.py.
#pragma once

#include <cstdint>

#include "tables.h"

namespace pygen {

// All rows contiguous, all of one type, float or double: W = 2 n + 4 H elements for gates, H for states. A pointer that is
// said to be optional is null where there is nothing.
struct OnLstmStep {
  int64_t rows, size, chunk_size;
  void* gates;  // (rows, W), in; out: softmax(i~), softmax(f~), sigma(o), tanh(c^), sigma(i), sigma(f)
  const void *cell_before, *hidden_before;  // hidden_before only with zoneout
  const void *keep_cell, *keep_hidden;      // zoneout, optional
  void *cell, *hidden;                      // (rows, H), out
  void *distance_forget, *distance_in;      // (rows,), out
  void* scratch;                            // on_lstm_scratch_bytes
};

struct OnLstmBackwardStep {
  int64_t rows, size, chunk_size;
  const void* activations;  // (rows, W): what the forward left in `gates`
  const void *cell_before, *cell;
  const void *keep_cell, *keep_hidden;
  const void *grad_output, *grad_distance_forget, *grad_distance_in;  // optional
  void *grad_hidden,
      *grad_cell;    // (rows, H), in: from the steps behind; out: of the states before, without the product's
  void* grad_gates;  // (rows, W), out
  void* scratch;
};

inline int64_t on_lstm_scratch_bytes(int64_t size) {
  // Five rows of a state, each with space behind it for a whole vector.
  return 5 * (size + 32) * static_cast<int64_t>(sizeof(double));
}

// [0] for float, [1] for double.
struct OnLstmKernels {
  void (*forward[2])(const OnLstmStep& step);
  void (*backward[2])(const OnLstmBackwardStep& step);
};

PYGEN_DECLARE_KERNELS(OnLstmKernels, on_lstm_kernels)

}  // namespace pygen
