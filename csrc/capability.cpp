// Detection of the instruction-set level, and the user's choice below it.
#include "capability.h"

#include <atomic>
#include <stdexcept>

namespace pygen {
namespace {

const char* const kNames[] = {"default", "avx2", "avx512"};

Capability detect() {
#if defined(PYGEN_X86_LEVELS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Capability::kAvx512 : avx2 ? Capability::kAvx2 : Capability::kBaseline;
#else
  return Capability::kBaseline;
#endif
}

std::atomic<Capability>& current() {
  static std::atomic<Capability> level{best_capability()};
  return level;
}

}  // namespace

Capability best_capability() {
  static const Capability best = detect();
  return best;
}

Capability capability() { return current().load(std::memory_order_relaxed); }

std::string capability_name(Capability level) { return kNames[static_cast<int>(level)]; }

std::vector<std::string> capability_names() { return {kNames, kNames + static_cast<int>(best_capability()) + 1}; }

void set_capability(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(best_capability()); ++i) {
    if (name == kNames[i]) {
      current().store(static_cast<Capability>(i), std::memory_order_relaxed);
      return;
    }
  }
  std::string had;
  for (const auto& known : capability_names()) had += (had.empty() ? "" : ", ") + known;
  throw std::invalid_argument("CPU capability must be one of " + had + " on this machine, got \"" + name + "\"");
}

}  // namespace pygen
