// Kernels that Python may call on addresses, without the way through torch's dispatcher: on a 4 x 4 tensor that way takes
// three times as long as the arithmetic. pygen/ops/_operator.py says when; module.cpp binds them.
#pragma once

#include <cstdint>

namespace pygen {

// The most elements that take this road, all of them one row at worst.
constexpr int64_t kCumaxSmall = 256;

// y = cumax(x) on contiguous rows; type is a CumaxType.
void cumax_small(uintptr_t x, uintptr_t y, int64_t rows, int64_t length, int type, bool complement);

}  // namespace pygen
