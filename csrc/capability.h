// Which instruction-set level the CPU kernels run at: detected once, lowered by the user. csrc/<op>.cpp asks here.
#pragma once

#include <string>
#include <vector>

namespace pygen {

// The last two are AVX-512 for all but the files that have kernels for them.
enum class Capability { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Vnni = 3, kAmx = 4 };

// The highest level that this machine and this build have.
Capability best_capability();

// The level that kernels are taken from now.
Capability capability();

// Takes "default", "avx2", "avx512", "avx512_vnni" or "amx"; throws std::invalid_argument for a name or a level that is not to be had here.
void set_capability(const std::string& name);

std::string capability_name(Capability level);

// The levels to be had here, lowest first.
std::vector<std::string> capability_names();

// The table of the current level, out of those that the levels define (PYGEN_DECLARE_KERNELS in cpu/tables.h).
template <typename Table>
const Table& at_capability(const Table& baseline, const Table& avx2, const Table& avx512) {
  switch (capability()) {
    case Capability::kAmx:
    case Capability::kAvx512Vnni:
    case Capability::kAvx512:
      return avx512;
    case Capability::kAvx2:
      return avx2;
    default:
      return baseline;
  }
}

}  // namespace pygen

// PYGEN_KERNELS(cumax_kernels): the table of that name at the current level.
#if defined(PYGEN_X86_LEVELS)
#define PYGEN_KERNELS(table) \
  ::pygen::at_capability(::pygen::baseline::table, ::pygen::avx2::table, ::pygen::avx512::table)
#else
#define PYGEN_KERNELS(table) (::pygen::baseline::table)
#endif
