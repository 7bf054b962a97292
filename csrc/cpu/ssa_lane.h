// What the CPU's ways of simulating share: claiming trajectories and closing them.
#pragma once

#include "../shared/ssa_trajectory.h"

PYGEN_BEGIN_LEVEL

constexpr int64_t kPassesPerLook = 256;  // at the flag that asks to stop: a look is a load of shared memory

PYGEN_INLINE bool asked_to_stop(const Ensemble& run) { return __atomic_load_n(run.control, __ATOMIC_RELAXED) != 0; }

// The next trajectory that nobody has begun; -1: there is none.
PYGEN_INLINE int64_t claim_row(const Ensemble& run) {
  if (asked_to_stop(run)) return -1;
  const int64_t row = __atomic_fetch_add(run.next_row, 1, __ATOMIC_RELAXED);
  return row < run.rows ? row : -1;
}

PYGEN_INLINE void close_trajectory(const Ensemble& run, Trajectory& t, Status status, double time) {
  end_trajectory(run, t, status, time);
  if (status != kUnfinished) __atomic_fetch_add(run.control + 1, 1, __ATOMIC_RELAXED);
}

PYGEN_END_LEVEL
