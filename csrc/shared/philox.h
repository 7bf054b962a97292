// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw (2011), and the two uniforms of a pass.
// Every number of a trajectory is a function of (seed, stream, trajectory, pass): nothing is carried from one to the next,
// which is what makes a trajectory independent of where and beside what it is computed.
#pragma once

#include "portable.h"

PYGEN_BEGIN_LEVEL

// The 32-bit results, in the low halves.
template <class Word>
struct Philox {
  Word r0, r1, r2, r3;
};

template <class Word>
PYGEN_SHARED Philox<Word> philox4x32(Word c0, Word c1, Word c2, Word c3, uint32_t key0, uint32_t key1) {
  PYGEN_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint32_t k0 = key0 + static_cast<uint32_t>(round) * 0x9E3779B9u;
    const uint32_t k1 = key1 + static_cast<uint32_t>(round) * 0xBB67AE85u;
    // A product's low half is the next word. Its high half stays above it: a multiplication looks at the low one alone.
    const Word p0 = multiply_low(c0, 0xD2511F53u), p1 = multiply_low(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ uint64_t{k0};
    c2 = (p0 >> 32) ^ c3 ^ uint64_t{k1};
    c1 = p1;
    c3 = p0;
  }
  return {c0 & 0xffffffffu, c1 & 0xffffffffu, c2 & 0xffffffffu, c3 & 0xffffffffu};
}

template <class Real>
struct Uniforms {
  Real time;    // in (0, 1]: its logarithm is finite
  Real choice;  // in [0, 1)
};

// 53 bits each.
template <class Real>
PYGEN_SHARED Uniforms<Real> uniforms(Word<Real> pass, Word<Real> trajectory, uint32_t seed, uint32_t stream) {
  const auto random = philox4x32<Word<Real>>(pass, pass >> 32, trajectory, trajectory >> 32, seed, stream);
  return {to_real((((random.r1 << 32) | random.r0) >> 11) + 1) * 0x1p-53,
          to_real(((random.r3 << 32) | random.r2) >> 11) * 0x1p-53};
}

PYGEN_END_LEVEL
