// The direct method on a GPU: one trajectory a thread, through the same pass that the CPU's lanes are tested against
// (csrc/shared/ssa_trajectory.h), refilled when it ends. A launch makes a limited number of passes, so that the host can
// look whether it is asked to stop; in between a thread's trajectory rests in global memory.
#include <cuda_runtime.h>

#include "../shared/ssa_trajectory.h"
#include "ssa_kernel.h"

namespace pygen {
namespace {

using cuda::Trajectory;

constexpr int kBlock = 128;
// 65,536 registers on every chip: up to 128 for each of 512 threads.
constexpr int kBlocksPerProcessor = 4;
// Of shared memory for a block: two blocks then fit on every chip from sm_80 on.
constexpr int64_t kSharedBytes = 48 * 1024;

// The next trajectory that nobody has begun; -1: there is none.
__device__ int64_t claim_row(const Ensemble& run, SsaDeviceState* state) {
  auto* next = reinterpret_cast<unsigned long long*>(&state->next_row);
  const int64_t row = static_cast<int64_t>(atomicAdd(next, 1ull));
  return row < run.rows ? row : -1;
}

// InShared: whether the block's shared memory holds its trajectories' values.
template <bool InShared>
__global__ void __launch_bounds__(kBlock, kBlocksPerProcessor)
    run_ssa(const Network net, const Ensemble run, double* memory, Trajectory* trajectories, SsaDeviceState* state,
            int64_t passes) {
  extern __shared__ double block_values[];
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, threads = int64_t{gridDim.x} * blockDim.x;
  const int64_t stride = InShared ? blockDim.x : threads;
  double* values = InShared ? block_values + threadIdx.x : memory + thread;
  double* partial = values + net.slots * stride;
  Trajectory t = trajectories[thread];
  if (InShared && t.row >= 0)
    for (int32_t slot = 0; slot < net.slots; ++slot) values[slot * stride] = memory[slot * threads + thread];

  for (int64_t pass = 0; pass < passes; ++pass) {
    Status status;
    if (t.row < 0) {
      const int64_t row = claim_row(run, state);
      if (row < 0) break;
      status = cuda::begin_trajectory(net, run, t, row, values, stride);
    } else {
      status = cuda::one_pass(net, run, t, values, stride, partial);
    }
    if (status != kRunning) {
      cuda::end_trajectory(run, t, status, values[net.time_slot * stride]);
      atomicAdd(reinterpret_cast<unsigned long long*>(&state->finished), 1ull);
      t.row = -1;
    }
  }

  trajectories[thread] = t;
  if (InShared && t.row >= 0)
    for (int32_t slot = 0; slot < net.slots; ++slot) memory[slot * threads + thread] = values[slot * stride];
}

__global__ void forget(Trajectory* trajectories, SsaDeviceState* state) {
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  trajectories[thread].row = -1;
  if (thread == 0) *state = {0, 0};
}

}  // namespace

cudaError_t plan_ssa(const Network& net, int64_t rows, SsaLaunch* launch) {
  launch->block = kBlock;
  launch->values = int64_t{net.slots} + net.reactions;
  launch->trajectory = sizeof(Trajectory);
  const int64_t shared = launch->values * kBlock * static_cast<int64_t>(sizeof(double));
  launch->shared = shared <= kSharedBytes ? shared : 0;
  int device = 0, processors = 0, blocks = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, launch->shared ? run_ssa<true> : run_ssa<false>,
                                                          kBlock, launch->shared);
  const int64_t wanted = (rows + kBlock - 1) / kBlock, resident = int64_t{processors} * blocks;
  launch->threads = static_cast<int32_t>((wanted < resident ? wanted : resident) * kBlock);
  return error;
}

cudaError_t reset_ssa(const SsaLaunch& launch, void* trajectories, SsaDeviceState* state, cudaStream_t stream) {
  forget<<<launch.threads / launch.block, launch.block, 0, stream>>>(static_cast<Trajectory*>(trajectories), state);
  return cudaGetLastError();
}

cudaError_t launch_ssa(const Network& net, const Ensemble& run, const SsaLaunch& launch, double* values,
                       void* trajectories, SsaDeviceState* state, int64_t passes, cudaStream_t stream) {
  const auto kernel = launch.shared ? run_ssa<true> : run_ssa<false>;
  kernel<<<launch.threads / launch.block, launch.block, launch.shared, stream>>>(net, run, values,
                                                                                 static_cast<Trajectory*>(trajectories),
                                                                                 state, passes);
  return cudaGetLastError();
}

}  // namespace pygen
