// What tables of kernels share. PYGEN_DECLARE_KERNELS(Type, name): one table of kernels, defined under the same name by every instruction-set level.
#pragma once

#if defined(PYGEN_X86_LEVELS)
#define PYGEN_DECLARE_KERNELS(type, table) \
  namespace baseline {                     \
  extern const type table;                 \
  }                                        \
  namespace avx2 {                         \
  extern const type table;                 \
  }                                        \
  namespace avx512 {                       \
  extern const type table;                 \
  }
#else
#define PYGEN_DECLARE_KERNELS(type, table) \
  namespace baseline {                     \
  extern const type table;                 \
  }
#endif

namespace pygen {

// The types that kernels are written for, in the order in which tables have them.
enum class FloatType { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr int kFloatTypes = 4;

}  // namespace pygen
