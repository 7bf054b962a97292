// Gillespie's direct method in lockstep: every element of the vectors ("lane") is a trajectory, all lanes make one pass at
// a time, and a lane whose trajectory has ended is refilled with the next. A pass of ssa_step.h is spelled out here for
// vectors; whatever happens seldom (grid times, breakpoints, events, ends) is done lane by lane by ssa_trajectory.h.
#include "ssa.h"
#include "ssa_lane.h"
#include "ssa_mask.h"

PYGEN_BEGIN_LEVEL
namespace {

constexpr int kLanes = VecOf<double>::lanes;
// Vectors side by side hide one another's latencies and share the cost of reading the tables. Measured on AVX-512 in
// millions of reactions a second with 2, 3 and 4: immigration-death 143, 134, 174, Vilar's oscillator 69, 51, 84.
constexpr int kMostGroups = 4;

// A law with at most two factors, without the indirections of the packed program; offsets in doubles.
struct Law {
  int32_t factors;
  int64_t rate, first, second;
  double second_offset;
};

// The changes of one species by reaction, as a table to look up in registers.
constexpr int kTable = 32;
struct Row {
  int64_t species;
  double change[kTable];
};

// A change of one count by a reaction; `at` as an offset in the values.
struct Change {
  int64_t at;
  double by;
};

template <int kGroup>
PYGEN_INLINE uint32_t lanes_of(const Mask (&mask)[kGroup]) {
  uint32_t bits = 0;
  for (int g = 0; g < kGroup; ++g) bits |= bits_of(mask[g]) << g * kLanes;
  return bits;
}

template <int kGroup>
class Crew {
  static constexpr int kWidth = kGroup * kLanes;
  static constexpr uint32_t kAllLanes = static_cast<uint32_t>((uint64_t{1} << kWidth) - 1);

 public:
  Crew(const Network& net, const Ensemble& run, char* memory)
      : net_(net),
        run_(run),
        limited_(run.max_events < INT64_MAX),
        checked_(net.check_begin != net.check_end || net.checked > 0) {
    const auto take = [&](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<decltype(pointer + 0)>(memory);
      memory += (count * sizeof *pointer + 63) / 64 * 64;
    };
    take(values_, int64_t{net.slots} * kWidth);
    take(partial_, (int64_t{net.reactions} + 1) * kWidth);
    take(laws_, net.reactions);
    take(changes_, net.changes);
    take(rows_, net.species);
    prepare_laws();
    prepare_changes();
    prepare_rows();
  }

  static int64_t scratch_bytes(const Network& net) {
    const auto rounded = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
    return rounded(int64_t{net.slots} * kWidth * sizeof(double)) +
           rounded((int64_t{net.reactions} + 1) * kWidth * sizeof(double)) + rounded(net.reactions * sizeof(Law)) +
           rounded(net.changes * sizeof(Change)) + rounded(net.species * sizeof(Row));
  }

  void work() {
    for (int64_t i = 0; i < net_.slots * kWidth; ++i) values_[i] = 0.0;
    for (int lane = 0; lane < kWidth; ++lane) {
      alarm_[lane] = kInfinity - kInfinity;
      passes_[lane] = trajectory_index_[lane] = limit_[lane] = 0;
      trajectory_[lane].row = -1;
      if (lane < run_.share)
        refill(lane);
      else
        idle(lane);
    }
    while (active_ > 0) {
      for (int64_t i = 0; i < kPassesPerLook && active_ > 0; ++i) pass();
      if (asked_to_stop(run_)) return give_up();
    }
  }

 private:
  double* lane_values(int lane) const { return values_ + lane; }
  double* time_of(int group) const { return values_ + int64_t{net_.time_slot} * kWidth + group * kLanes; }

  void prepare_laws() {
    for (int32_t j = 0; j < net_.reactions; ++j) {
      const int32_t* slot = net_.factor_slot + net_.factor_start[j];
      const int32_t* offset = net_.factor_offset + net_.factor_start[j];
      Law law = {net_.factor_start[j + 1] - net_.factor_start[j], int64_t{net_.rate_slot[j]} * kWidth, 0, 0, 0.0};
      if (law.factors >= 1) law.first = int64_t{slot[0]} * kWidth;
      if (law.factors >= 1 && offset[0] != 0) law.factors = 3;  // the general way
      if (law.factors >= 2) law.second = int64_t{slot[1]} * kWidth, law.second_offset = offset[1];
      laws_[j] = law;
    }
  }

  void prepare_changes() {
    for (int32_t c = 0; c < net_.changes; ++c)
      changes_[c] = {int64_t{net_.change_slot[c]} * kWidth, static_cast<double>(net_.change_delta[c])};
  }

  // One row a species that reactions change. None where registers do not hold the tables: lanes are then done one by one.
  void prepare_rows() {
    n_rows_ = 0;
    if (PYGEN_VECTOR_BYTES < 64 || net_.reactions > kTable) return;
    for (int32_t s = 0; s < net_.species; ++s) {
      Row row = {int64_t{s} * kWidth, {}};
      bool changes = false;
      for (int32_t j = 0; j < net_.reactions; ++j)
        for (int32_t c = net_.change_start[j]; c < net_.change_start[j + 1]; ++c)
          if (net_.change_slot[c] == s) row.change[j] = net_.change_delta[c], changes = true;
      if (changes) rows_[n_rows_++] = row;
    }
  }

  // The next trajectory for this lane; one that ends at its start is closed at once.
  void refill(int lane) {
    if (trajectory_[lane].row >= 0) --active_;
    while (true) {
      Trajectory& t = trajectory_[lane];
      t.row = claim_row(run_);
      if (t.row < 0) {
        idle(lane);
        return;
      }
      const Status status = begin_trajectory(net_, run_, t, t.row, lane_values(lane), kWidth);
      if (status == kRunning) break;
      close_trajectory(run_, t, status, run_.start);
    }
    ++active_;
    check_laws_ = check_laws_ || must_check_laws(net_, lane_values(lane), kWidth);
    resume(lane);
  }

  // An idle lane goes through the motions: nothing alarms it, nothing can happen in it.
  void idle(int lane) {
    for (int64_t s = 0; s < net_.slots; ++s) values_[s * kWidth + lane] = 0.0;
    alarm_[lane] = kInfinity - kInfinity;
    limit_[lane] = -1;
  }

  // Copies what the passes need of a lane's trajectory into the vectors.
  void resume(int lane) {
    const Trajectory& t = trajectory_[lane];
    const uint64_t index = run_.first + static_cast<uint64_t>(t.row);
    const double grid = run_.times[t.grid];
    alarm_[lane] = grid < t.next_break ? grid : t.next_break;
    passes_[lane] = t.passes;
    trajectory_index_[lane] = index;
    limit_[lane] = limited_ ? run_.max_events + t.quiet : INT64_MAX;
  }

  void close(int lane, Status status) {
    close_trajectory(run_, trajectory_[lane], status, lane_values(lane)[int64_t{net_.time_slot} * kWidth]);
    refill(lane);
  }

  void give_up() {
    for (int lane = 0; lane < kWidth; ++lane) {
      Trajectory& t = trajectory_[lane];
      if (t.row < 0) continue;
      t.passes = passes_[lane];
      close_trajectory(run_, t, kUnfinished, 0.0);
    }
  }

  template <bool Checked>
  PYGEN_INLINE_MEMBER void scan(f64v (&total)[kGroup]) const {
    f64v invalid[kGroup];
    for (int g = 0; g < kGroup; ++g) total[g] = invalid[g] = f64v{};
    for (int32_t j = 0; j < net_.reactions; ++j) {
      const Law& law = laws_[j];
      f64v a[kGroup];
#pragma GCC unroll 4
      for (int g = 0; g < kGroup; ++g) a[g] = load(values_ + law.rate + g * kLanes);
      if (law.factors > 0) {
        if (law.factors > 2) {
#pragma GCC unroll 4
          for (int g = 0; g < kGroup; ++g) a[g] = propensity<f64v>(net_, j, values_ + g * kLanes, kWidth);
        } else {
#pragma GCC unroll 4
          for (int g = 0; g < kGroup; ++g) a[g] = a[g] * load(values_ + law.first + g * kLanes);
          if (law.factors == 2) {
#pragma GCC unroll 4
            for (int g = 0; g < kGroup; ++g)
              a[g] = a[g] * (load(values_ + law.second + g * kLanes) - law.second_offset);
          }
        }
      }
#pragma GCC unroll 4
      for (int g = 0; g < kGroup; ++g) {
        if (Checked) invalid[g] = a[g] >= 0.0 ? invalid[g] : constant<f64v>(kInfinity);
        total[g] = total[g] + a[g];
        store(partial_ + int64_t{j} * kWidth + g * kLanes, total[g]);
      }
    }
    if (Checked)
      for (int g = 0; g < kGroup; ++g) total[g] = total[g] + invalid[g];
  }

  PYGEN_INLINE_MEMBER void count(const f64v (&target)[kGroup], i64v (&choice)[kGroup]) const {
    for (int g = 0; g < kGroup; ++g) choice[g] = i64v{};
    for (int32_t j = 0; j < net_.reactions; ++j)
#pragma GCC unroll 4
      for (int g = 0; g < kGroup; ++g)
        choice[g] = count_if_reached(choice[g], load(partial_ + int64_t{j} * kWidth + g * kLanes), target[g]);
  }

  void pass() {
    f64v waited[kGroup], pick[kGroup], total[kGroup], time[kGroup];
    i64v choice[kGroup];
    Mask jump[kGroup];
    run_program<f64v, kGroup>(net_, net_.step_begin, net_.step_end, values_, kWidth);
#pragma GCC unroll 4
    for (int g = 0; g < kGroup; ++g) {
      u64v counter, index;
      memcpy(&counter, passes_ + g * kLanes, sizeof counter);
      memcpy(&index, trajectory_index_ + g * kLanes, sizeof index);
      const auto u = uniforms<f64v>(counter, index, run_.seed, run_.stream);
      waited[g] = u.time;
      pick[g] = u.choice;
      counter += 1;
      memcpy(passes_ + g * kLanes, &counter, sizeof counter);
    }
    if (check_laws_)
      scan<true>(total);
    else
      scan<false>(total);
#pragma GCC unroll 4
    for (int g = 0; g < kGroup; ++g) {
      // As next_time for a0 > 0; a0 = 0 gives infinity or NaN, both of which get a look.
      time[g] = load(time_of(g)) - log_of_normal(waited[g]) / total[g];
      jump[g] = less(time[g], load(alarm_ + g * kLanes)) & less(total[g], constant<f64v>(kInfinity));
      pick[g] = pick[g] * total[g];
    }
    const uint32_t waiting = kAllLanes & ~lanes_of(jump);
    if (waiting) look_at_lanes(waiting, waited, total, jump);
    count(pick, choice);
#pragma GCC unroll 4
    for (int g = 0; g < kGroup; ++g) store(time_of(g), picked(jump[g], time[g], load(time_of(g))));
    apply(choice, jump);
    if (checked_ || limited_) look_after(jump);
  }

  // Lanes whose waiting time is beyond the next grid time or breakpoint, or not a number; idle lanes too.
  __attribute__((noinline)) void look_at_lanes(uint32_t lanes, const f64v* waited, const f64v* total, Mask* jump) {
    for (; lanes; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes), group = lane / kLanes, element = lane % kLanes;
      if (trajectory_[lane].row >= 0 && cross_lane(lane, waited[group][element], total[group][element]))
        set_lane(jump[group], element);
    }
  }

  // Whether the lane's reaction takes place in this pass all the same.
  bool cross_lane(int lane, double waited, double total) {
    Trajectory& t = trajectory_[lane];
    t.passes = passes_[lane];
    Status status = kInvalidPropensity;
    Crossing crossing = kEnded;
    if (total < kInfinity) {
      const double time = next_time<double>(lane_values(lane)[int64_t{net_.time_slot} * kWidth], total, waited);
      crossing = cross(net_, run_, t, lane_values(lane), kWidth, time, total, status);
    }
    if (crossing != kJump) ++t.quiet;
    if (crossing == kEnded)
      close(lane, status);
    else
      resume(lane);
    return crossing == kJump;
  }

  PYGEN_INLINE_MEMBER void apply(const i64v (&choice)[kGroup], const Mask (&jump)[kGroup]) {
#if PYGEN_VECTOR_BYTES == 64
    Mask beyond[kGroup];
    for (int g = 0; g < kGroup; ++g) beyond[g] = jump[g] & not_less(choice[g], i64v{} + net_.reactions);
    if (n_rows_ > 0 && lanes_of(beyond) == 0)
      return net_.reactions <= kTable / 2 ? apply_rows<false>(choice, jump) : apply_rows<true>(choice, jump);
#endif
    apply_by_lane(choice, jump);
  }

#if PYGEN_VECTOR_BYTES == 64
  template <bool Long>
  PYGEN_INLINE_MEMBER void apply_rows(const i64v (&choice)[kGroup], const Mask (&jump)[kGroup]) {
    for (int32_t r = 0; r < n_rows_; ++r) {
      double* at = values_ + rows_[r].species;
#pragma GCC unroll 4
      for (int g = 0; g < kGroup; ++g)
        store(at + g * kLanes, load(at + g * kLanes) + looked_up<Long>(rows_[r].change, choice[g], jump[g]));
    }
  }
#endif

  void apply_by_lane(const i64v (&choice)[kGroup], const Mask (&jump)[kGroup]) {
    for (uint32_t lanes = lanes_of(jump); lanes; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      int32_t j = static_cast<int32_t>(choice[lane / kLanes][lane % kLanes]);
      if (j >= net_.reactions) j = last_possible(net_, partial_ + lane, kWidth);
      for (int32_t c = net_.change_start[j]; c < net_.change_start[j + 1]; ++c)
        values_[changes_[c].at + lane] += changes_[c].by;
    }
  }

  // After the reactions: counts that may have become invalid, triggers, the stopping condition, the cap on reactions.
  __attribute__((noinline)) void look_after(const Mask (&jump)[kGroup]) {
    run_program<f64v, kGroup>(net_, net_.check_begin, net_.check_end, values_, kWidth);
    Mask attention[kGroup];
    for (int g = 0; g < kGroup; ++g) {
      attention[g] = Mask{};
      if (net_.attention_slot >= 0)
        attention[g] |= not_zero(load(values_ + int64_t{net_.attention_slot} * kWidth + g * kLanes));
      for (int32_t i = 0; i < net_.checked; ++i) {
        const f64v count = load(values_ + int64_t{net_.checked_slot[i]} * kWidth + g * kLanes);
        attention[g] |= invert(less(constant<f64v>(-1.0), count) & less(count, constant<f64v>(kLargestCount)));
      }
      if (limited_) {
        i64v passes, limit;
        memcpy(&passes, passes_ + g * kLanes, sizeof passes);
        memcpy(&limit, limit_ + g * kLanes, sizeof limit);
        attention[g] |= equal(passes, limit);
      }
      attention[g] &= jump[g];
    }
    for (uint32_t lanes = lanes_of(attention); lanes; lanes &= lanes - 1) attend(__builtin_ctz(lanes));
    remember_triggers();
  }

  void attend(int lane) {
    Trajectory& t = trajectory_[lane];
    t.passes = passes_[lane];
    const Status status = after_jump(net_, run_, t, lane_values(lane), kWidth);
    if (status != kRunning)
      close(lane, status);
    else
      resume(lane);
  }

  // What a trigger is now is what it was before the next reaction. (The lanes that were attended to have done it.)
  void remember_triggers() {
    for (int32_t e = 0; e < net_.events; ++e)
      for (int g = 0; g < kGroup; ++g)
        store(values_ + int64_t{net_.previous_slot[e]} * kWidth + g * kLanes,
              load(values_ + int64_t{net_.trigger_slot[e]} * kWidth + g * kLanes));
  }

  const Network& net_;
  const Ensemble& run_;
  const bool limited_, checked_;
  double *values_, *partial_;
  Law* laws_;
  Change* changes_;
  Row* rows_;
  int32_t n_rows_ = 0;
  int active_ = 0;
  bool check_laws_ = false;                        // once a trajectory needed it, for all
  alignas(64) double alarm_[kWidth];               // no reaction before this time needs a look
  alignas(64) uint64_t passes_[kWidth];            // Philox's counter
  alignas(64) uint64_t trajectory_index_[kWidth];  // Philox's other counter
  alignas(64) int64_t limit_[kWidth];              // the counter that means max_events reactions
  Trajectory trajectory_[kWidth];
};

int64_t direct_scratch(const Network& net) { return Crew<kMostGroups>::scratch_bytes(net) + 64; }

template <int kGroup>
void work(const Network& net, const Ensemble& run, void* scratch) {
  Crew<kGroup> crew(net, run, static_cast<char*>(scratch));
  crew.work();
}

// A few trajectories are not worth the lanes that would idle beside them.
void direct(const Network& net, const Ensemble& run, void* scratch) {
  if (run.share <= kLanes)
    work<1>(net, run, scratch);
  else
    work<kMostGroups>(net, run, scratch);
}

int64_t lane_scratch(const Network& net) { return (int64_t{net.slots} + net.reactions) * sizeof(double); }

void lane(const Network& net, const Ensemble& run, void* scratch) {
  double* values = static_cast<double*>(scratch);
  double* partial = values + net.slots;
  for (int64_t row = claim_row(run); row >= 0; row = claim_row(run)) {
    Trajectory t;
    Status status = begin_trajectory(net, run, t, row, values, 1);
    while (status == kRunning) {
      status = one_pass(net, run, t, values, 1, partial);
      if (t.passes % kPassesPerLook == 0 && asked_to_stop(run) && status == kRunning) status = kUnfinished;
    }
    close_trajectory(run, t, status, values[net.time_slot]);
  }
}

void math(int32_t operation, const double* a, const double* b, double* out, int64_t n) {
  const int32_t code[kInstructionInts] = {operation, 2, 0, 1, 1};
  Network net = {};
  net.code = code;
  double values[3 * kLanes];
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = n - i < kLanes ? n - i : kLanes;
    for (int lane = 0; lane < kLanes; ++lane) {
      values[lane] = a[i + (lane < count ? lane : 0)];
      values[kLanes + lane] = b[i + (lane < count ? lane : 0)];
    }
    run_program<f64v, 1>(net, 0, 1, values, kLanes);
    memcpy(out + i, values + 2 * kLanes, count * sizeof(double));
  }
}

}  // namespace

const SsaKernels ssa_kernels = {direct_scratch, direct, lane_scratch, lane, math};

PYGEN_END_LEVEL
