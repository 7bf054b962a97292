// The kernels of the stochastic simulation algorithm: what csrc/ssa.cpp calls, once per thread. All threads claim
// trajectories from the same Ensemble; none of them knows how many others there are.
#pragma once

#include "../shared/ssa_network.h"
#include "tables.h"

namespace pygen {

struct SsaKernels {
  // Bytes of scratch that a thread needs, aligned to 64.
  int64_t (*direct_scratch)(const Network&);
  void (*direct)(const Network&, const Ensemble&, void* scratch);
  // One trajectory at a time, through the functions that a GPU thread runs.
  int64_t (*lane_scratch)(const Network&);
  void (*lane)(const Network&, const Ensemble&, void* scratch);
  // out[i] = f(a[i], b[i]), for the tests: an Operation of ssa_program.h.
  void (*math)(int32_t operation, const double* a, const double* b, double* out, int64_t n);
};

PYGEN_DECLARE_KERNELS(SsaKernels, ssa_kernels)

}  // namespace pygen
