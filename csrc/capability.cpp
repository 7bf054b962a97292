// Detection of the instruction-set level, and the user's choice below it.
#include "capability.h"

#include <atomic>
#include <stdexcept>

#if defined(PYGEN_BUILT_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
// A library that is loaded before pygen and executes AMX instructions in software defines this (tests/amx_emulator.cpp).
extern "C" __attribute__((weak, visibility("default"))) int pygen_amx_is_emulated();
#endif

namespace pygen {
namespace {

const char* const kNames[] = {"default", "avx2", "avx512", "avx512_vnni", "amx"};

#if defined(PYGEN_BUILT_AMX)
// bfloat16 tiles: the CPU has them, and Linux lets this process use their registers when it asks.
bool has_amx() {
#if defined(__linux__)
  if (pygen_amx_is_emulated && pygen_amx_is_emulated()) return true;
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;  // CPUID leaf 7, EDX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl's ARCH_REQ_XCOMP_PERM
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBFloat16) == 0 || (d & kTiles) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Capability detect() {
#if defined(PYGEN_X86_LEVELS)
  __builtin_cpu_init();
  const auto all = [](auto... has) { return (... && has); };
  if (!all(__builtin_cpu_supports("avx2"), __builtin_cpu_supports("fma"))) return Capability::kBaseline;
  if (!all(__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"), __builtin_cpu_supports("avx512dq"),
           __builtin_cpu_supports("avx512vl")))
    return Capability::kAvx2;
#if defined(PYGEN_BUILT_AVX512_VNNI)
  if (!__builtin_cpu_supports("avx512vnni")) return Capability::kAvx512;
#if defined(PYGEN_BUILT_AMX)
  if (has_amx()) return Capability::kAmx;
#endif
  return Capability::kAvx512Vnni;
#else
  return Capability::kAvx512;
#endif
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
