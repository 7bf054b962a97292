// The method "sparse": exact simulation of networks of hundreds to tens of thousands of reactions, one trajectory at a
// time. A pass is that of ssa_step.h with other sums (ssa_sparse.h defines them): the same uniforms, the time from
// -log(u1) / a0, the choice by u2 a0. Every sum is computed anew from what is under it whenever that has changed, never by
// adding a difference: what the heaps hold is a function of the state alone, and errors cannot accumulate.
//
// The choice descends from node 1 of the heap over the groups with target = u2 a0: where target >= left and right > 0 it
// goes right, and target -= left; else left. In a group's heap it is x_g * left that the target is held against. A sum
// of zeros is thus never entered, whatever rounding does.
#include "ssa_sparse.h"

#include "ssa.h"
#include "ssa_lane.h"

PYGEN_BEGIN_LEVEL
namespace {

constexpr int kAhead = 8;  // passes whose random numbers are drawn at once

class Walker {
 public:
  Walker(const Network& net, const Ensemble& run, const SparsePlan& plan, char* memory)
      : net_(net),
        run_(run),
        plan_(plan),
        looks_after_(net.check_begin != net.check_end || net.checked > 0 || run.max_events < INT64_MAX) {
    const auto take = [&](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<decltype(pointer + 0)>(memory);
      memory += rounded(count * sizeof *pointer);
    };
    take(nodes_, plan.nodes);
    take(rates_, net.reactions);
    take(values_, int64_t{net.slots} + 1);
    take(waited_, kAhead);
    take(choices_, kAhead);
    for (int64_t i = 0; i < plan.nodes; ++i) nodes_[i] = 0.0;
    values_[plan.constant_slot] = 1.0;
  }

  static int64_t scratch_bytes(const Network& net, const SparsePlan& plan) {
    return rounded(plan.nodes * sizeof(double)) + rounded(net.reactions * sizeof(double)) +
           rounded((int64_t{net.slots} + 1) * sizeof(double)) + 2 * rounded(kAhead * sizeof(double));
  }

  void work() {
    for (int64_t row = claim_row(run_); row >= 0; row = claim_row(run_)) {
      Status status = begin_trajectory(net_, run_, t_, row, values_, 1);
      if (status == kRunning) begin_sums();
      while (status == kRunning) {
        const int64_t i = t_.passes % kAhead;
        if (i == 0) draw();
        status = pass(waited_[i], choices_[i]);
        if (t_.passes % kPassesPerLook == 0 && asked_to_stop(run_) && status == kRunning) status = kUnfinished;
      }
      close_trajectory(run_, t_, status, values_[net_.time_slot]);
    }
  }

 private:
  static int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

  // The numbers of passes n .. n + 7, as vectors; those of each are what uniforms<double> gives.
  void draw() {
    constexpr int kLanes = VecOf<double>::lanes;
    u64v pass, index;
    for (int i = 0; i < kLanes; ++i)
      pass[i] = static_cast<uint64_t>(t_.passes + i), index[i] = run_.first + static_cast<uint64_t>(t_.row);
    for (int i = 0; i < kAhead; i += kLanes) {
      const auto u = uniforms<f64v>(pass, index, run_.seed, run_.stream);
      store(waited_ + i, -log_of_normal(u.time));
      store(choices_ + i, u.choice);
      pass += kLanes;
    }
  }

  void begin_sums() {
    careful_ = false;
    for (int32_t j = 0; j < net_.reactions; ++j) {
      rates_[j] = values_[net_.rate_slot[j]];
      careful_ |= plan_.leaf[j].left_out >= 0 && !(rates_[j] >= 0.0);
    }
    compute_everything();
  }

  void compute_everything() {
    run_program<double, 1>(net_, net_.step_begin, net_.step_end, values_, 1);
    valid_ = true;
    for (int32_t j = 0; j < net_.reactions; ++j) nodes_[plan_.leaf[j].heap + plan_.leaf[j].node] = leaf(j);
    for (int32_t g = 0; g < plan_.groups; ++g) {
      const SparseGroup& group = plan_.group[g];
      for (int32_t i = group.leaves - 1; i > 0; --i) add_up(nodes_ + group.heap, i);
      rescale(g);
    }
    for (int32_t i = plan_.leaves - 1; i > 0; --i) add_up(nodes_, i);
  }

  static void add_up(double* heap, int32_t i) { heap[i] = heap[2 * i] + heap[2 * i + 1]; }

  void rescale(int32_t g) {
    const SparseGroup& group = plan_.group[g];
    nodes_[plan_.leaves + g] = scaled(values_[group.factor], nodes_[group.heap + 1]);
  }

  // Without molecules 0, even if a leaf is infinite.
  static double scaled(double factor, double sum) { return factor > 0.0 ? factor * sum : 0.0; }

  // From the network's tables. Only leaves that may be negative are looked at: those of the last group.
  double leaf(int32_t j) {
    double a = values_[net_.rate_slot[j]];
    for (int32_t f = net_.factor_start[j]; f < net_.factor_start[j + 1]; ++f)
      if (f != plan_.leaf[j].left_out)
        a = a * (values_[net_.factor_slot[f]] - static_cast<double>(net_.factor_offset[f]));
    if (plan_.leaf[j].left_out < 0) valid_ = valid_ && a >= 0.0;
    return a;
  }

  Status pass(double waited, double choice) {
    if (careful_) look_at_laws();
    const double sum = nodes_[1], total = valid_ && sum < kInfinity ? sum : kInfinity - kInfinity;
    double& now = values_[net_.time_slot];
    const double time = total > 0.0 ? now + waited / total : kInfinity;
    ++t_.passes;
    if (!(total >= 0.0)) {
      ++t_.quiet;
      return kInvalidPropensity;
    }
    if (!(time < run_.times[t_.grid]) || !(time < t_.next_break)) {
      Status status = kRunning;
      const Crossing crossing = cross(net_, run_, t_, values_, 1, time, total, status);
      if (crossing != kJump) {
        ++t_.quiet;
        if (status == kRunning) compute_everything();
        return status;
      }
    }
    const int32_t j = chosen(choice * total);
    fire(plan_.stream + plan_.update[j], j);
    now = time;
    log_jump(run_, t_, time, j);
    return looks_after_ ? look_after() : kRunning;
  }

  // Of a trajectory in which a fixed rate is negative or NaN: the law may still be 0, as long as a factor is.
  __attribute__((noinline)) void look_at_laws() {
    for (int32_t j = 0; j < net_.reactions; ++j) valid_ = valid_ && propensity<double>(net_, j, values_, 1) >= 0.0;
  }

  __attribute__((noinline)) Status look_after() {
    const int64_t logged = t_.logged;
    const Status status = after_jump(net_, run_, t_, values_, 1);
    if (t_.logged != logged && status == kRunning) compute_everything();  // an event may have changed anything
    return status;
  }

  __attribute__((noinline)) int32_t chosen(double target) {
    const int32_t top = descended<false>(nodes_, plan_.leaves, target, 1.0);
    const SparseGroup& group = plan_.group[top];
    const double factor = values_[group.factor];
    return plan_.members[group.member + descended<true>(nodes_ + group.heap, group.leaves, target, factor)];
  }

  // With branches: the processor guesses most of the way, for some reactions fire much more often than others, and that
  // gains more than the wrong guesses cost: EGFR 97 ns per reaction, 162 with conditional moves.
  template <bool Scaled>
  static int32_t descended(const double* heap, int32_t leaves, double& target, double factor) {
    int32_t i = 1;
    while (i < leaves) {
      const double left = Scaled ? heap[2 * i] * factor : heap[2 * i];
      i *= 2;
      if (target >= left && heap[i + 1] > 0.0) {
        target = target - left;
        ++i;
      }
    }
    return i - leaves;
  }

  // Applies reaction j and brings the tree up to date: leaves, then sums, children first.
  __attribute__((noinline)) void fire(const int32_t* at, int32_t j) {
    SparseUpdate n;
    memcpy(&n, at, sizeof n);
    if (n.changes == kEverything) {
      apply_reaction(net_, j, values_, 1);
      compute_everything();
      return;
    }
    at += kUpdateInts;
    // In locals: the compiler must take any store of a double for one to a member.
    double *const nodes = nodes_, *const values = values_;
    const double* const rates = rates_;
    const SparseLeaf* const leaves = plan_.leaf;
    const SparseGroup* const groups = plan_.group;
    for (int32_t i = 0; i < n.changes; ++i, at += 2) values[at[0]] += static_cast<double>(at[1]);
    for (int32_t i = 0; i < n.spans; ++i, at += 2) run_program<double, 1>(net_, at[0], at[1], values, 1);
    for (int32_t i = 0; i < n.simple; ++i, ++at) {
      const SparseLeaf& leaf = leaves[*at];
      set_leaf(nodes + leaf.heap, leaf.node, rates[*at] * (values[leaf.slot] - leaf.offset));
    }
    for (int32_t i = 0; i < n.general; ++i, ++at) set_leaf(nodes + leaves[*at].heap, leaves[*at].node, leaf(*at));
    const int32_t over_groups = plan_.leaves;
    for (int32_t i = 0; i < n.groups; ++i, ++at)
      set_leaf(nodes, over_groups + *at, scaled(values[groups[*at].factor], nodes[groups[*at].heap + 1]));
  }

  // With all nodes above; a sum has the same bits with its summands exchanged.
  static void set_leaf(double* heap, int32_t leaf, double value) {
    uint32_t i = static_cast<uint32_t>(leaf);
    heap[i] = value;
    for (; i > 1; i /= 2) {
      value = value + heap[i ^ 1];
      heap[i / 2] = value;
    }
  }

  const Network& net_;
  const Ensemble& run_;
  const SparsePlan& plan_;
  const bool looks_after_;
  double *nodes_, *rates_, *values_, *waited_, *choices_;
  Trajectory t_;
  bool valid_ = true;     // no law was negative or NaN
  bool careful_ = false;  // every law is to be looked at in every pass
};

int64_t scratch(const Network& net, const SparsePlan& plan) { return Walker::scratch_bytes(net, plan); }

void sparse(const Network& net, const Ensemble& run, const SparsePlan& plan, void* memory) {
  Walker(net, run, plan, static_cast<char*>(memory)).work();
}

}  // namespace

const SsaSparseKernels ssa_sparse_kernels = {scratch, sparse};

PYGEN_END_LEVEL
