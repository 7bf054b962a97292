// The stochastic simulation algorithm on the CPU: checks of the packed program, threads, the random numbers and functions
// for the tests. The simulation itself: csrc/cpu/ssa_*.cpp and csrc/shared/.
#include "cpu/ssa.h"

#include <algorithm>
#include <cfenv>
#include <exception>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "capability.h"
#include "shared/philox.h"
#include "ssa_checks.h"
#include "ssa_sparse_plan.h"
#include "tensor.h"

namespace pygen {
namespace {

// Runs `method` on so many threads, the caller being one; every thread works until no trajectory is left.
template <class Method>
void on_threads(Method method, int64_t scratch_bytes, const Network& net, const Ensemble& run, int64_t threads) {
  constexpr int64_t kAlignment = 64;
  const auto work = [&] {
    const std::unique_ptr<char[]> memory(new char[scratch_bytes + kAlignment]);
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    // A thread may inherit "denormals are zero" from whoever sets it; bits must not depend on that.
    std::fenv_t before;
    std::fegetenv(&before);
    std::fesetenv(FE_DFL_ENV);
    method(net, run, reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment));
    std::fesetenv(&before);
  };
  // Every thread takes what is left: a thread that is not to be had, or memory for one, is no failure.
  std::vector<std::thread> others;
  const auto help = [&] {
    try {
      work();
    } catch (const std::bad_alloc&) {
    }
  };
  try {
    for (int64_t i = 1; i < std::min<int64_t>(threads, run.rows); ++i) others.emplace_back(help);
  } catch (const std::exception&) {
  }
  std::exception_ptr failure;
  try {
    work();
  } catch (...) {
    failure = std::current_exception();
  }
  for (auto& other : others) other.join();
  if (failure) std::rethrow_exception(failure);
}

void run_tau(const Network& net, const Ensemble& run, int64_t threads) {
  PYGEN_CHECK(run.first + run.rows <= kTauTrajectories && net.reactions < kTauReactions,
              "ssa_run: tau-leaping numbers trajectories below 2^40 and reactions below 2^24, got ",
              run.first + run.rows, " and ", net.reactions);
  PYGEN_CHECK(run.tau_epsilon > 0.0 && run.tau_epsilon < 1.0, "ssa_run: tau_epsilon must be in (0, 1), got ",
              run.tau_epsilon);
  const SsaTauKernels& kernels = PYGEN_KERNELS(ssa_tau_kernels);
  on_threads(kernels.run, kernels.scratch(net), net, run, threads);
}

void run_sparse(const Network& net, const Ensemble& run, int64_t threads) {
  const SparsePlanner planner(net);
  const SparsePlan plan = planner.plan();
  const SsaSparseKernels& kernels = PYGEN_KERNELS(ssa_sparse_kernels);
  const auto method = [&](const Network& of, const Ensemble& ensemble, void* scratch) {
    kernels.run(of, ensemble, plan, scratch);
  };
  on_threads(method, kernels.scratch(net, plan), net, run, threads);
}

void ssa_run(const Tensor& code, const Tensor& literals, const Tensor& initial, const Tensor& parameters,
             const Tensor& times, const Tensor& recorded, double start, int64_t first, int64_t seed, int64_t stream,
             std::string method, double tau_epsilon, int64_t max_events, int64_t threads, Tensor control, Tensor counts,
             Tensor status, Tensor n_events, Tensor stop_time, Tensor log_time, Tensor log_reaction) {
  const Network net = checked_network(code, literals);
  int64_t next_row = 0;
  Ensemble run = checked_ensemble({net, initial, parameters, times, recorded, start, first, seed, stream, tau_epsilon,
                                   max_events, control, counts, status, n_events, stop_time, log_time, log_reaction},
                                  &next_row);
  PYGEN_CHECK(threads >= 1, "ssa_run: threads must be at least 1, got ", threads);
  run.share = (run.rows + threads - 1) / threads;
  const SsaKernels& kernels = PYGEN_KERNELS(ssa_kernels);
  if (method == "direct")
    on_threads(kernels.direct, kernels.direct_scratch(net), net, run, threads);
  else if (method == "lane")
    on_threads(kernels.lane, kernels.lane_scratch(net), net, run, threads);
  else if (method == "sparse")
    run_sparse(net, run, threads);
  else if (method == "tau")
    run_tau(net, run, threads);
  else
    PYGEN_CHECK(false, "ssa_run: method must be direct, lane, sparse or tau, got ", method);
}

// The generator's four words for every row of `counter`, as the kernels compute them; int64 with 32-bit values.
Tensor ssa_philox(const Tensor& counter, int64_t key0, int64_t key1) {
  PYGEN_CHECK(counter.dim() == 2 && counter.size(1) == 4 && counter.scalar_type() == ScalarType::Long &&
                  counter.is_contiguous(),
              "ssa_philox: counter must be a contiguous int64 tensor [n, 4], got ", dtype_string(counter.scalar_type()),
              " ", shape_string(counter));
  Tensor out = empty_contiguous_like(counter);
  const int64_t* in = static_cast<const int64_t*>(counter.const_data_ptr());
  int64_t* to = static_cast<int64_t*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < counter.size(0); ++i, in += 4, to += 4) {
    const auto r = baseline::philox4x32<uint64_t>(in[0], in[1], in[2], in[3], static_cast<uint32_t>(key0),
                                                  static_cast<uint32_t>(key1));
    to[0] = r.r0, to[1] = r.r1, to[2] = r.r2, to[3] = r.r3;
  }
  return out;
}

// f(a, b) with the kernels' own bits, f by its number in csrc/shared/ssa_program.h.
Tensor ssa_math(int64_t operation, const Tensor& a, const Tensor& b) {
  PYGEN_CHECK(same_shape(a, b) && a.scalar_type() == ScalarType::Double && b.scalar_type() == ScalarType::Double &&
                  a.is_contiguous() && b.is_contiguous(),
              "ssa_math: a and b must be contiguous float64 tensors of one shape, got ", shape_string(a), " and ",
              shape_string(b));
  PYGEN_CHECK(operation >= 0 && operation < 24, "ssa_math: operation must be in [0, 23], got ", operation);
  Tensor out = empty_contiguous_like(a);
  PYGEN_KERNELS(ssa_kernels)
      .math(static_cast<int32_t>(operation), static_cast<const double*>(a.const_data_ptr()),
            static_cast<const double*>(b.const_data_ptr()), static_cast<double*>(out.mutable_data_ptr()), a.numel());
  return out;
}

// n numbers of the Poisson distribution as tau-leaping draws them.
Tensor ssa_poisson(double mean, int64_t n, int64_t seed) {
  PYGEN_CHECK(mean >= 0.0 && mean < kLargestCount && n >= 0, "ssa_poisson: mean must be in [0, 2^53) and n >= 0, got ",
              mean, " and ", n);
  Tensor out = empty_contiguous(&n, 1, ScalarType::Double);
  PYGEN_KERNELS(ssa_tau_kernels)
      .poisson(mean, static_cast<uint32_t>(seed), static_cast<double*>(out.mutable_data_ptr()), n);
  return out;
}

}  // namespace
}  // namespace pygen

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, m) {
  m.impl("ssa_run", TORCH_BOX(&pygen::ssa_run));
  m.impl("ssa_philox", TORCH_BOX(&pygen::ssa_philox));
  m.impl("ssa_math", TORCH_BOX(&pygen::ssa_math));
}

// No argument of it is a tensor.
STABLE_TORCH_LIBRARY_IMPL(pygen, CompositeExplicitAutograd, m) {
  m.impl("ssa_poisson", TORCH_BOX(&pygen::ssa_poisson));
}
