// The life of one trajectory around the passes: its start, the grid times and breakpoints that a waiting time crosses,
// what may follow a reaction (events, stopping, invalid counts), its end. The lanes of a CPU come here one by one, and
// seldom; a thread of a GPU, and replay, make their passes with one_pass().
#pragma once

#include "ssa_step.h"

PYGEN_BEGIN_LEVEL

struct Trajectory {
  int64_t row;        // in the outputs
  int64_t grid;       // the first grid time not yet written
  int64_t passes;     // the pass to come: Philox's counter
  int64_t quiet;      // passes that did not end in a reaction
  int64_t logged;     // entries in the log
  double next_break;  // infinity: none
};

PYGEN_SHARED int64_t jumps(const Trajectory& t) { return t.passes - t.quiet; }

PYGEN_SHARED void log_jump(const Ensemble& run, Trajectory& t, double time, int32_t which) {
  if (t.logged < run.log_size) {
    run.log_time[t.logged] = time;
    run.log_reaction[t.logged] = which;
  }
  ++t.logged;
}

PYGEN_SHARED bool is_count(double x) { return x >= 0.0 && x <= kLargestCount && portable_floor(x) == x; }

PYGEN_SHARED Status count_status(double x) { return x > kLargestCount ? kOverflow : kInvalidCount; }

// Every grid time before `limit`, with the present state.
PYGEN_SHARED Status write_grid(const Ensemble& run, Trajectory& t, const double* values, int64_t stride, double limit) {
  while (t.grid < run.n_times && run.times[t.grid] < limit) {
    int64_t* row = run.counts + (t.row * run.n_times + t.grid) * run.n_recorded;
    for (int64_t k = 0; k < run.n_recorded; ++k) {
      const double count = values[run.recorded[k] * stride];
      if (!(count <= kLargestCount)) return kOverflow;
      row[k] = static_cast<int64_t>(count);
    }
    ++t.grid;
  }
  return kRunning;
}

PYGEN_SHARED void end_trajectory(const Ensemble& run, Trajectory& t, Status status, double time) {
  if (status != kCompleted && status != kAbsorbed && status != kStopped)
    for (int64_t i = t.grid * run.n_recorded; i < run.n_times * run.n_recorded; ++i)
      run.counts[t.row * run.n_times * run.n_recorded + i] = -1;
  run.status[t.row] = status;
  run.n_events[t.row] = jumps(t);
  run.stop_time[t.row] = status == kStopped ? time : kInfinity;
}

PYGEN_SHARED double next_break(const Network& net, const double* values, int64_t stride, double time) {
  double next = kInfinity;
  for (int32_t b = 0; b < net.breaks; ++b) {
    const double at = values[net.break_slot[b] * stride];
    if (at > time && at < next) next = at;
  }
  return next;
}

PYGEN_SHARED void check_triggers(const Network& net, double* values, int64_t stride) {
  run_program<double, 1>(net, net.check_begin, net.check_end, values, stride);
}

PYGEN_SHARED void compute_assignments(const Network& net, int32_t e, double* values, int64_t stride) {
  run_program<double, 1>(net, net.program_begin[e], net.program_end[e], values, stride);
}

// The waiting event of the highest priority, the first of equals; -1: none waits.
PYGEN_SHARED int32_t first_waiting(const Network& net, const double* values, int64_t stride, uint64_t waiting) {
  int32_t best = -1;
  double best_priority = 0.0;
  for (int32_t e = 0; e < net.events; ++e) {
    if (!(waiting >> e & 1)) continue;
    const double priority = net.priority_slot[e] < 0 ? -kInfinity : values[net.priority_slot[e] * stride];
    if (best < 0 || priority > best_priority) best = e, best_priority = priority;
  }
  return best;
}

// Adds the events whose trigger has become true, drops those not persistent whose trigger is false again.
PYGEN_SHARED uint64_t look_at_triggers(const Network& net, double* values, int64_t stride, uint64_t waiting) {
  for (int32_t e = 0; e < net.events; ++e) {
    const bool now = values[net.trigger_slot[e] * stride] != 0.0;
    double& previous = values[net.previous_slot[e] * stride];
    if (now && previous == 0.0) {
      waiting |= uint64_t{1} << e;
      if (net.event_flags[e] & kValuesAtTrigger) compute_assignments(net, e, values, stride);
    } else if (!now && !(net.event_flags[e] & kPersistent)) {
      waiting &= ~(uint64_t{1} << e);
    }
    previous = now ? 1.0 : 0.0;
  }
  return waiting;
}

PYGEN_SHARED Status assign(const Network& net, int32_t e, double* values, int64_t stride) {
  if (!(net.event_flags[e] & kValuesAtTrigger)) compute_assignments(net, e, values, stride);
  for (int32_t i = net.assignment_start[e]; i < net.assignment_start[e + 1]; ++i) {
    const double value = values[net.assignment_source[i] * stride];
    const int32_t target = net.assignment_target[i];
    if (target < net.species && !is_count(value)) return count_status(value);
    values[target * stride] = value;
  }
  return kRunning;
}

// After any change of the state or the time, with check_triggers() done: fires events until none waits.
PYGEN_SHARED Status settle(const Network& net, const Ensemble& run, Trajectory& t, double* values, int64_t stride) {
  uint64_t waiting = look_at_triggers(net, values, stride, 0);
  for (int fired = 0; waiting; ++fired) {
    if (fired == kMaxEventsAtOnce) return kEventLoop;
    const int32_t e = first_waiting(net, values, stride, waiting);
    waiting &= ~(uint64_t{1} << e);
    const Status status = assign(net, e, values, stride);
    if (status != kRunning) return status;
    log_jump(run, t, values[net.time_slot * stride], net.reactions + e);
    check_triggers(net, values, stride);
    waiting = look_at_triggers(net, values, stride, waiting);
  }
  return net.stop_slot >= 0 && values[net.stop_slot * stride] != 0.0 ? kStopped : kRunning;
}

// The state of a stopped trajectory holds to the end of the grid.
PYGEN_SHARED Status stop_or_go_on(const Ensemble& run, Trajectory& t, const double* values, int64_t stride,
                                  Status status) {
  if (status != kStopped) return status;
  const Status written = write_grid(run, t, values, stride, kInfinity);
  return written == kRunning ? kStopped : written;
}

PYGEN_SHARED Status begin_trajectory(const Network& net, const Ensemble& run, Trajectory& t, int64_t row,
                                     double* values, int64_t stride) {
  const double* initial = run.initial + row * run.initial_stride;
  const double* parameters = run.parameters + row * run.parameter_stride;
  int32_t slot = 0;
  for (int32_t i = 0; i < net.species; ++i) values[slot++ * stride] = initial[i];
  for (int32_t i = 0; i < net.parameters; ++i) values[slot++ * stride] = parameters[i];
  for (int32_t i = 0; i < net.literals; ++i) values[slot++ * stride] = net.literal[i];
  for (; slot < net.slots; ++slot) values[slot * stride] = 0.0;
  values[net.time_slot * stride] = run.start;
  t = {row, 0, 0, 0, 0, kInfinity};
  run_program<double, 1>(net, net.setup_begin, net.setup_end, values, stride);
  if (net.breaks) t.next_break = next_break(net, values, stride, run.start);
  if (net.check_begin == net.check_end && net.stop_slot < 0) return kRunning;
  check_triggers(net, values, stride);
  return stop_or_go_on(run, t, values, stride, settle(net, run, t, values, stride));
}

// Whether a pass must look at every law: always where the state changes the rates, else where one of them is not >= 0.
PYGEN_SHARED bool must_check_laws(const Network& net, const double* values, int64_t stride) {
  bool check = net.check_laws != 0;
  for (int32_t j = 0; j < net.reactions; ++j) check |= !(values[net.rate_slot[j] * stride] >= 0.0);
  return check;
}

enum Crossing { kJump, kAgain, kEnded };

// The waiting time reaches `time`, beyond a grid time or a breakpoint. kJump: the reaction takes place. kAgain: stopped at
// a breakpoint, to draw afresh. kEnded: with `status`.
PYGEN_SHARED Crossing cross(const Network& net, const Ensemble& run, Trajectory& t, double* values, int64_t stride,
                            double time, double total, Status& status) {
  const bool at_break = time >= t.next_break;
  status = write_grid(run, t, values, stride, at_break ? t.next_break : time);
  if (status != kRunning) return kEnded;
  if (t.grid == run.n_times) {
    status = total == 0.0 ? kAbsorbed : kCompleted;
    return kEnded;
  }
  if (!at_break) return kJump;
  values[net.time_slot * stride] = t.next_break;
  t.next_break = next_break(net, values, stride, t.next_break);
  check_triggers(net, values, stride);
  status = stop_or_go_on(run, t, values, stride, settle(net, run, t, values, stride));
  return status == kRunning ? kAgain : kEnded;
}

PYGEN_SHARED Status checked_counts(const Network& net, const double* values, int64_t stride) {
  for (int32_t i = 0; i < net.checked; ++i) {
    const double count = values[net.checked_slot[i] * stride];
    if (!(count >= 0.0 && count <= kLargestCount)) return count_status(count);
  }
  return kRunning;
}

// After a reaction, where anything is to be looked at; the pass is already counted.
PYGEN_SHARED Status after_jump(const Network& net, const Ensemble& run, Trajectory& t, double* values, int64_t stride) {
  Status status = checked_counts(net, values, stride);
  if (status == kRunning && net.check_begin != net.check_end) {
    check_triggers(net, values, stride);
    status = stop_or_go_on(run, t, values, stride, settle(net, run, t, values, stride));
  }
  return status == kRunning && jumps(t) >= run.max_events ? kMaxEvents : status;
}

// One pass. `partial`: [reactions], with the values' stride.
PYGEN_SHARED Status one_pass(const Network& net, const Ensemble& run, Trajectory& t, double* values, int64_t stride,
                             double* partial) {
  run_program<double, 1>(net, net.step_begin, net.step_end, values, stride);
  const double total = scan_propensities(net, values, stride, partial);
  const auto u =
      uniforms<double>(static_cast<uint64_t>(t.passes), run.first + static_cast<uint64_t>(t.row), run.seed, run.stream);
  double& now = values[net.time_slot * stride];
  const double time = next_time<double>(now, total, u.time);
  ++t.passes;
  if (!(total >= 0.0)) {
    ++t.quiet;
    return kInvalidPropensity;
  }
  Status status = kRunning;
  const bool crosses = !(time < run.times[t.grid]) || !(time < t.next_break);
  const Crossing crossing = crosses ? cross(net, run, t, values, stride, time, total, status) : kJump;
  if (crossing != kJump) {
    ++t.quiet;
    return status;
  }
  const int32_t j = choose(net, u.choice * total, partial, stride);
  apply_reaction(net, j, values, stride);
  now = time;
  log_jump(run, t, time, j);
  return after_jump(net, run, t, values, stride);
}

PYGEN_END_LEVEL
