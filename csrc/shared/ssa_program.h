// The interpreter of the packed expressions: laws that are not mass action, rules, triggers. One instruction does all
// lanes (`Group` vectors of them), which is what makes interpreting cheap.
#pragma once

#include "math.h"
#include "ssa_network.h"

PYGEN_BEGIN_LEVEL

enum Operation : int32_t {
  kCopy,
  kAdd,
  kSub,
  kMul,
  kDiv,
  kPow,
  kNeg,
  kLt,
  kLe,
  kGt,
  kGe,
  kEq,
  kNe,
  kAnd,
  kOr,
  kNot,
  kMin,
  kMax,
  kExp,
  kLog,
  kSqrt,
  kAbs,
  kFloor,
  kCeil,
  kSelect,
  kOperations,
};

// Instructions [code, end) on the values of Group * lanes trajectories; slot s stands at values + s * stride.
template <class Real, int Group>
PYGEN_SHARED_CALL void interpret(const int32_t* code, const int32_t* end, double* values, int64_t stride) {
  constexpr int kLanes = WordOf<Real>::lanes;
  for (; code != end; code += kInstructionInts) {
    double* out = values + code[1] * stride;
    const double *a = values + code[2] * stride, *b = values + code[3] * stride, *c = values + code[4] * stride;
    const Real one = constant<Real>(1.0), zero{};
#define PYGEN_A load_real<Real>(a + g * kLanes)
#define PYGEN_B load_real<Real>(b + g * kLanes)
#define PYGEN_C load_real<Real>(c + g * kLanes)
#define PYGEN_OPERATION(name, expression)                                           \
  case name:                                                                        \
    for (int g = 0; g < Group; ++g) store_real(out + g * kLanes, Real(expression)); \
    break;
    switch (code[0]) {
      PYGEN_OPERATION(kCopy, PYGEN_A)
      PYGEN_OPERATION(kAdd, PYGEN_A + PYGEN_B)
      PYGEN_OPERATION(kSub, PYGEN_A - PYGEN_B)
      PYGEN_OPERATION(kMul, PYGEN_A * PYGEN_B)
      PYGEN_OPERATION(kDiv, PYGEN_A / PYGEN_B)
      PYGEN_OPERATION(kPow, portable_pow(PYGEN_A, PYGEN_B))
      PYGEN_OPERATION(kNeg, -PYGEN_A)
      PYGEN_OPERATION(kLt, PYGEN_A < PYGEN_B ? one : zero)
      PYGEN_OPERATION(kLe, PYGEN_A <= PYGEN_B ? one : zero)
      PYGEN_OPERATION(kGt, PYGEN_A > PYGEN_B ? one : zero)
      PYGEN_OPERATION(kGe, PYGEN_A >= PYGEN_B ? one : zero)
      PYGEN_OPERATION(kEq, PYGEN_A == PYGEN_B ? one : zero)
      PYGEN_OPERATION(kNe, PYGEN_A != PYGEN_B ? one : zero)
      PYGEN_OPERATION(kAnd, (PYGEN_A != 0.0) & (PYGEN_B != 0.0) ? one : zero)
      PYGEN_OPERATION(kOr, (PYGEN_A != 0.0) | (PYGEN_B != 0.0) ? one : zero)
      PYGEN_OPERATION(kNot, PYGEN_A == 0.0 ? one : zero)
      PYGEN_OPERATION(kMin, PYGEN_A < PYGEN_B ? PYGEN_A : PYGEN_B)
      PYGEN_OPERATION(kMax, PYGEN_A > PYGEN_B ? PYGEN_A : PYGEN_B)
      PYGEN_OPERATION(kExp, portable_exp(PYGEN_A))
      PYGEN_OPERATION(kLog, portable_log(PYGEN_A))
      PYGEN_OPERATION(kSqrt, square_root(PYGEN_A))
      PYGEN_OPERATION(kAbs, magnitude(PYGEN_A))
      PYGEN_OPERATION(kFloor, portable_floor(PYGEN_A))
      PYGEN_OPERATION(kCeil, portable_ceil(PYGEN_A))
      PYGEN_OPERATION(kSelect, PYGEN_A != 0.0 ? PYGEN_B : PYGEN_C)
    }
#undef PYGEN_OPERATION
#undef PYGEN_A
#undef PYGEN_B
#undef PYGEN_C
  }
}

template <class Real, int Group>
PYGEN_SHARED void run_program(const Network& net, int32_t begin, int32_t end, double* values, int64_t stride) {
  if (begin == end) return;
  const int32_t* code = net.code + int64_t{kInstructionInts} * begin;
  interpret<Real, Group>(code, code + int64_t{kInstructionInts} * (end - begin), values, stride);
}

PYGEN_END_LEVEL
