// The kernels of the stochastic simulation algorithm: what csrc/ssa.cpp calls, once per thread. All threads claim
// trajectories from the same Ensemble; none of them knows how many others there are.
#pragma once

#include "../shared/ssa_network.h"
#include "ssa_sparse.h"
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

// The method "sparse"; its plan is made once per run.
struct SsaSparseKernels {
  int64_t (*scratch)(const Network&, const SparsePlan&);
  void (*run)(const Network&, const Ensemble&, const SparsePlan&, void* scratch);
};

PYGEN_DECLARE_KERNELS(SsaSparseKernels, ssa_sparse_kernels)

struct SsaTauKernels {
  int64_t (*scratch)(const Network&);
  void (*run)(const Network&, const Ensemble&, void* scratch);
  // n Poisson numbers of one mean, for the tests: those of trajectories 0 ... n - 1.
  void (*poisson)(double mean, uint32_t seed, double* out, int64_t n);
};
constexpr int64_t kTauTrajectories = int64_t{1} << 40;  // the index's upper bits count channels (ssa_poisson.h)
constexpr int64_t kTauReactions = int64_t{1} << 24;

PYGEN_DECLARE_KERNELS(SsaTauKernels, ssa_tau_kernels)

}  // namespace pygen
