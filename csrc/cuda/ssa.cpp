// The stochastic simulation algorithm on CUDA: the op's checks and the launches. The kernel is ssa_kernel.cu.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "../ssa_checks.h"
#include "ssa_kernel.h"

// In torch's library only where that is a CUDA build; a weak symbol lets the module be imported all the same.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));

namespace pygen {
namespace {

// Passes between two looks at whether to stop: some milliseconds.
constexpr int64_t kPassesPerLaunch = 8192;

void check_cuda(cudaError_t error, const char* what) {
  PYGEN_CHECK(error == cudaSuccess, "ssa_run: ", what, ": ", cudaGetErrorString(error));
}

cudaStream_t current_stream(int32_t device) {
  PYGEN_CHECK(aoti_torch_get_current_cuda_stream, "ssa_run: this torch is a build without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Memory of torch's allocator on the device of `like`.
Tensor bytes_like(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, std::make_optional(ScalarType::Byte));
}

Tensor copied(const Tensor& like, const void* data, int64_t bytes, cudaStream_t stream) {
  Tensor copy = bytes_like(like, bytes);
  check_cuda(cudaMemcpyAsync(copy.mutable_data_ptr(), data, bytes, cudaMemcpyHostToDevice, stream), "copying");
  return copy;
}

void ssa_run(const Tensor& code, const Tensor& literals, const Tensor& initial, const Tensor& parameters,
             const Tensor& times, const Tensor& recorded, double start, int64_t first, int64_t seed, int64_t stream_id,
             std::string method, double tau_epsilon, int64_t max_events, int64_t, Tensor control, Tensor counts,
             Tensor status, Tensor n_events, Tensor stop_time, Tensor log_time, Tensor log_reaction) {
  PYGEN_CHECK(method == "direct" || method == "lane",
              "ssa_run: on CUDA the method must be direct (auto takes sparse for large networks), got ", method);
  const Network on_host = checked_network(code, literals);
  Ensemble run =
      checked_ensemble({on_host, initial, parameters, times, recorded, start, first, seed, stream_id, tau_epsilon,
                        max_events, control, counts, status, n_events, stop_time, log_time, log_reaction},
                       nullptr);
  if (run.rows == 0) return;
  const int32_t device = counts.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);

  const Tensor packed = copied(counts, code.const_data_ptr(), code.numel() * 4, stream);
  const Tensor literal = copied(counts, literals.const_data_ptr(), literals.numel() * 8, stream);
  const Tensor recorded_there = copied(counts, recorded.const_data_ptr(), recorded.numel() * 4, stream);
  run.recorded = static_cast<const int32_t*>(recorded_there.const_data_ptr());
  int64_t length = 0;
  const Network net = network_at(static_cast<const int32_t*>(code.const_data_ptr()),
                                 static_cast<const int32_t*>(packed.const_data_ptr()),
                                 static_cast<const double*>(literal.const_data_ptr()), &length);
  SsaLaunch launch;
  check_cuda(plan_ssa(net, run.rows, &launch), "planning the launch");
  Tensor values = bytes_like(counts, launch.values * launch.threads * 8);
  Tensor trajectories = bytes_like(counts, launch.trajectory * launch.threads);
  Tensor state = bytes_like(counts, sizeof(SsaDeviceState));
  auto* device_state = static_cast<SsaDeviceState*>(state.mutable_data_ptr());
  check_cuda(reset_ssa(launch, trajectories.mutable_data_ptr(), device_state, stream), "starting");

  SsaDeviceState seen = {0, 0};
  while (seen.finished < run.rows && __atomic_load_n(run.control, __ATOMIC_RELAXED) == 0) {
    check_cuda(launch_ssa(net, run, launch, static_cast<double*>(values.mutable_data_ptr()),
                          trajectories.mutable_data_ptr(), device_state, kPassesPerLaunch, stream),
               "launching");
    check_cuda(cudaMemcpyAsync(&seen, device_state, sizeof seen, cudaMemcpyDeviceToHost, stream), "copying");
    check_cuda(cudaStreamSynchronize(stream), "simulating");
    __atomic_store_n(run.control + 1, seen.finished, __ATOMIC_RELAXED);
  }
}

}  // namespace
}  // namespace pygen

STABLE_TORCH_LIBRARY_IMPL(pygen, CUDA, m) { m.impl("ssa_run", TORCH_BOX(&pygen::ssa_run)); }
