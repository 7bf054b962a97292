// The instruction-set level that this file is being compiled for. Every csrc/cpu/*.cpp is compiled once per level (those
// for the integer and tile instructions of newer CPUs for their own level only), with the level's own flags, and everything in it lives in the level's namespace: a function compiled with AVX-512 then has
// another name than the same function compiled for the baseline, and the linker cannot mix them up.
//
// For the same reason nothing in csrc/cpu/ includes a C++ library header with inline code: the copy that the linker
// keeps might be the AVX-512 one. tests/test_build.py reads the objects' symbols and checks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(PYGEN_LEVEL_AMX)
#define PYGEN_LEVEL amx
#define PYGEN_VECTOR_BYTES 64
#elif defined(PYGEN_LEVEL_AVX512_VNNI)
#define PYGEN_LEVEL avx512_vnni
#define PYGEN_VECTOR_BYTES 64
#elif defined(PYGEN_LEVEL_AVX512)
#define PYGEN_LEVEL avx512
#define PYGEN_VECTOR_BYTES 64
#elif defined(PYGEN_LEVEL_AVX2)
#define PYGEN_LEVEL avx2
#define PYGEN_VECTOR_BYTES 32
#else
#define PYGEN_LEVEL baseline
#define PYGEN_VECTOR_BYTES 16
#endif

#define PYGEN_BEGIN_LEVEL \
  namespace pygen {       \
  namespace PYGEN_LEVEL {
#define PYGEN_END_LEVEL \
  }                     \
  }

#define PYGEN_INLINE static inline __attribute__((always_inline))
#define PYGEN_INLINE_MEMBER inline __attribute__((always_inline))
