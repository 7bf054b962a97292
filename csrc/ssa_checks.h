// Checks of what ssa_run is given, for the CPU and for CUDA: no table, index or size that came from outside is used
// before it stood here.
#pragma once

#include "shared/ssa_network.h"
#include "tensor.h"

namespace pygen {

// The network in `code` (int32, CPU) and `literals` (float64, CPU), every index checked.
Network checked_network(const Tensor& code, const Tensor& literals);

struct EnsembleTensors {
  const Network& net;
  const Tensor &initial, &parameters, &times, &recorded;
  double start;
  int64_t first, seed, stream;
  double tau_epsilon;
  int64_t max_events;
  Tensor &control, &counts, &status, &n_events, &stop_time, &log_time, &log_reaction;
};

// Shapes, dtypes, devices and ranges; the pointers are those of the tensors, on whatever device they are.
Ensemble checked_ensemble(const EnsembleTensors& tensors, int64_t* next_row);

}  // namespace pygen
