// The CUDA kernel's launcher, without any header of torch: csrc/cuda/ssa.cpp calls it, tests compile it alone.
#pragma once

#include <cuda_runtime_api.h>

#include "../shared/ssa_network.h"

namespace pygen {

// What the threads leave for one another and for the next launch.
struct SsaDeviceState {
  int64_t next_row, finished;
};

struct SsaLaunch {
  int32_t threads;     // trajectories at a time; a multiple of block
  int32_t block;       // threads a block
  int64_t shared;      // bytes of shared memory a block; 0: the values stay in global memory
  int64_t trajectory;  // bytes of a Trajectory
  int64_t values;      // doubles a thread needs
};

// How to launch `net` for `rows` trajectories on the current device.
cudaError_t plan_ssa(const Network& net, int64_t rows, SsaLaunch* launch);

// Marks every thread as having no trajectory.
cudaError_t reset_ssa(const SsaLaunch& launch, void* trajectories, SsaDeviceState* state, cudaStream_t stream);

// Up to `passes` passes by every thread. values: [launch.values, threads]; trajectories: launch.trajectory bytes a thread.
cudaError_t launch_ssa(const Network& net, const Ensemble& run, const SsaLaunch& launch, double* values,
                       void* trajectories, SsaDeviceState* state, int64_t passes, cudaStream_t stream);

}  // namespace pygen
