// A reaction network as the kernels see it: pointers into the packed program that pygen/ssa/program.py writes. The list of
// the header's fields and sections there and here must agree; csrc/ssa.cpp checks every index before anything runs.
#pragma once

#include <cstdint>

namespace pygen {

// One double per slot and trajectory: species, parameters, literals, the time, then everything computed.
struct Network {
  int32_t species, parameters, literals, slots, time_slot, reactions, factors, changes, instructions;
  int32_t setup_begin, setup_end, step_begin, step_end, check_begin, check_end;
  int32_t breaks, events, attention_slot, stop_slot, checked, assignments, check_laws;
  // a_j = value[rate_slot[j]] * product over the reaction's factors of (value[factor_slot] - factor_offset)
  const int32_t *rate_slot, *factor_start, *factor_slot, *factor_offset;
  const int32_t *change_start, *change_slot, *change_delta;
  const int32_t* code;  // instructions: (operation, destination, a, b, c)
  const int32_t *break_slot, *checked_slot;
  const int32_t *trigger_slot, *previous_slot, *program_begin, *program_end, *priority_slot, *event_flags;
  const int32_t *assignment_start, *assignment_target, *assignment_source;
  const double* literal;
};

constexpr int kPackedVersion = 1, kHeaderInts = 24, kInstructionInts = 5;
constexpr int32_t kPersistent = 1, kValuesAtTrigger = 2;  // event_flags

// The network whose header is `header` and whose sections begin behind the header at `packed` (the same memory, or its
// copy on another device). Returns the number of integers that the whole must have through `length`.
static inline Network network_at(const int32_t* header, const int32_t* packed, const double* literal, int64_t* length) {
  Network n;
  int32_t* fields[] = {&n.species,   &n.parameters,  &n.literals,     &n.slots,       &n.time_slot, &n.reactions,
                       &n.factors,   &n.changes,     &n.instructions, &n.setup_begin, &n.setup_end, &n.step_begin,
                       &n.step_end,  &n.check_begin, &n.check_end,    &n.breaks,      &n.events,    &n.attention_slot,
                       &n.stop_slot, &n.checked,     &n.assignments,  &n.check_laws};
  int i = 1;  // behind the version
  for (int32_t* field : fields) *field = header[i++];
  int64_t at = kHeaderInts;
  const auto section = [&](const int32_t*& pointer, int64_t size) {
    pointer = packed + at;
    at += size;
  };
  section(n.rate_slot, n.reactions);
  section(n.factor_start, int64_t{n.reactions} + 1);
  section(n.factor_slot, n.factors);
  section(n.factor_offset, n.factors);
  section(n.change_start, int64_t{n.reactions} + 1);
  section(n.change_slot, n.changes);
  section(n.change_delta, n.changes);
  section(n.code, int64_t{kInstructionInts} * n.instructions);
  section(n.break_slot, n.breaks);
  section(n.checked_slot, n.checked);
  section(n.trigger_slot, n.events);
  section(n.previous_slot, n.events);
  section(n.program_begin, n.events);
  section(n.program_end, n.events);
  section(n.priority_slot, n.events);
  section(n.event_flags, n.events);
  section(n.assignment_start, int64_t{n.events} + 1);
  section(n.assignment_target, n.assignments);
  section(n.assignment_source, n.assignments);
  n.literal = literal;
  *length = at;
  return n;
}

// How a trajectory ended; the numbers are those of pygen.ssa.Run.status.
enum Status : int8_t {
  kCompleted = 0,
  kAbsorbed = 1,
  kStopped = 2,
  kMaxEvents = 3,
  kInvalidCount = 4,
  kOverflow = 5,
  kInvalidPropensity = 6,
  kEventLoop = 7,
  kUnfinished = 8,
  kRunning = 9,
};

constexpr double kLargestCount = 9007199254740992.0;  // whole numbers beyond are not exact in float64
constexpr int kMaxEventsAtOnce = 1000;

// What a run is asked for, and where its results go. Row i of the outputs is trajectory first + i.
struct Ensemble {
  const double *initial, *parameters;
  int64_t initial_stride, parameter_stride;  // 0: one row for all
  const double* times;
  int64_t n_times;
  const int32_t* recorded;
  int64_t n_recorded;
  double start;
  uint64_t first;
  int64_t rows;
  uint32_t seed, stream;
  int64_t max_events;
  double tau_epsilon;
  int64_t* counts;    // [rows, n_times, n_recorded]
  int8_t* status;     // [rows]
  int64_t* n_events;  // [rows]
  double* stop_time;  // [rows]
  double* log_time;   // [log_size]; log_reaction: events are numbered behind the reactions
  int32_t* log_reaction;
  int64_t log_size;
  int64_t share;      // trajectories for a thread at a time, at most
  int64_t* next_row;  // claimed one after the other, by all threads
  int64_t* control;   // [0] not 0: stop; [1] trajectories finished
};

}  // namespace pygen
