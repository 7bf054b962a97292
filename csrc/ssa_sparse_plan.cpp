#include "ssa_sparse_plan.h"

#include <algorithm>

#include "shared/ssa_program.h"

namespace pygen {
namespace {

// Beyond, reactions compute everything anew when they fire: no network may need more memory than this in integers.
constexpr size_t kLongestStream = size_t{1} << 24;

int operands(int32_t operation) {
  switch (operation) {
    case baseline::kCopy:
    case baseline::kNeg:
    case baseline::kNot:
    case baseline::kExp:
    case baseline::kLog:
    case baseline::kSqrt:
    case baseline::kAbs:
    case baseline::kFloor:
    case baseline::kCeil:
      return 1;
    case baseline::kSelect:
      return 3;
    default:
      return 2;
  }
}

int32_t power_of_two(int64_t at_least) {
  int32_t p = 1;
  while (p < at_least) p *= 2;
  return p;
}

}  // namespace

SparsePlanner::SparsePlanner(const Network& net) : net_(net) {
  find_fixed_rates();
  choose_groups();
  find_dependents();
  plan_updates();
}

SparsePlan SparsePlanner::plan() const {
  SparsePlan plan;
  plan.groups = static_cast<int32_t>(group_.size());
  plan.leaves = leaves_;
  plan.nodes = nodes_;
  plan.constant_slot = net_.slots;
  plan.group = group_.data();
  plan.members = members_.data();
  plan.leaf = leaf_.data();
  plan.update = update_.data();
  plan.stream = stream_.data();
  return plan;
}

void SparsePlanner::find_fixed_rates() {
  fixed_.assign(net_.slots, true);
  std::fill_n(fixed_.begin(), net_.species, false);
  for (int32_t i = net_.step_begin; i < net_.step_end; ++i) fixed_[net_.code[i * kInstructionInts + 1]] = false;
  for (int32_t i = 0; i < net_.assignments; ++i) fixed_[net_.assignment_target[i]] = false;
  fixed_[net_.time_slot] = false;
}

bool SparsePlanner::can_be_grouped(int32_t j) const {
  if (!fixed_[net_.rate_slot[j]]) return false;
  const int32_t begin = net_.factor_start[j], end = net_.factor_start[j + 1];
  for (int32_t f = begin; f < end; ++f) {
    const int32_t slot = net_.factor_slot[f], offset = net_.factor_offset[f];
    if (slot >= net_.species || offset < 0) return false;
    bool below = offset == 0;
    for (int32_t k = begin; k < end; ++k) below |= net_.factor_slot[k] == slot && net_.factor_offset[k] == offset - 1;
    if (!below) return false;
  }
  return begin < end;
}

void SparsePlanner::choose_groups() {
  std::vector<int32_t> alone(net_.species, 0), changing(net_.species, 0);
  for (int32_t c = 0; c < net_.changes; ++c) ++changing[net_.change_slot[c]];
  std::vector<char> has_group(net_.reactions);
  Numbers left_out(net_.reactions, -1);
  for (int32_t j = 0; j < net_.reactions; ++j) {
    has_group[j] = can_be_grouped(j);
    if (has_group[j] && net_.factor_start[j + 1] - net_.factor_start[j] == 1)
      ++alone[net_.factor_slot[net_.factor_start[j]]];
  }
  std::vector<Numbers> members(net_.species + 1);
  for (int32_t j = 0; j < net_.reactions; ++j) {
    int32_t species = net_.species;
    for (int32_t f = net_.factor_start[j]; has_group[j] && f < net_.factor_start[j + 1]; ++f) {
      const int32_t s = net_.factor_slot[f];
      if (net_.factor_offset[f] != 0) continue;
      const bool better = species == net_.species || alone[s] < alone[species] ||
                          (alone[s] == alone[species] && changing[s] > changing[species]);
      if (better) species = s, left_out[j] = f;
    }
    members[species].push_back(j);
  }
  group_of_species_.assign(net_.species, -1);
  group_of_reaction_.assign(net_.reactions, -1);
  leaf_.assign(net_.reactions, {});
  for (int32_t j = 0; j < net_.reactions; ++j) leaf_[j].left_out = left_out[j];
  const auto groups = std::count_if(members.begin(), members.end(), [](const Numbers& m) { return !m.empty(); });
  leaves_ = power_of_two(groups);
  nodes_ = 2 * leaves_;
  for (int32_t s = 0; s <= net_.species; ++s)
    if (!members[s].empty()) add_group(s, members[s]);
}

void SparsePlanner::add_group(int32_t species, const Numbers& reactions) {
  const auto number = static_cast<int32_t>(group_.size());
  const int32_t leaves = power_of_two(static_cast<int64_t>(reactions.size()));
  const bool last = species == net_.species;
  group_.push_back({last ? net_.slots : species, nodes_, leaves, static_cast<int32_t>(members_.size())});
  if (!last) group_of_species_[species] = number;
  int32_t node = leaves;
  for (int32_t j : reactions) {
    group_of_reaction_[j] = number;
    members_.push_back(j);
    leaf_[j].heap = nodes_;
    leaf_[j].node = node++;
    for (int32_t f = net_.factor_start[j]; f < net_.factor_start[j + 1]; ++f)
      if (f != leaf_[j].left_out) leaf_[j].slot = net_.factor_slot[f], leaf_[j].offset = net_.factor_offset[f];
  }
  nodes_ += 2 * leaves;
}

void SparsePlanner::find_dependents() {
  leaves_of_.resize(net_.slots);
  rates_of_.resize(net_.slots);
  for (int32_t j = 0; j < net_.reactions; ++j) {
    if (!fixed_[net_.rate_slot[j]]) rates_of_[net_.rate_slot[j]].push_back(j);
    for (int32_t f = net_.factor_start[j]; f < net_.factor_start[j + 1]; ++f) {
      Numbers& leaves = leaves_of_[net_.factor_slot[f]];
      if (f != leaf_[j].left_out && (leaves.empty() || leaves.back() != j)) leaves.push_back(j);
    }
  }
  steps_of_.resize(net_.species);
  if (net_.step_begin < net_.step_end) follow_steps();
}

// Every slot written once, and before it is read.
bool SparsePlanner::steps_can_be_taken_singly() const {
  std::vector<char> written(net_.slots, false), read(net_.slots, false);
  for (int32_t i = net_.step_begin; i < net_.step_end; ++i) {
    const int32_t* code = net_.code + int64_t{kInstructionInts} * i;
    for (int k = 0; k < operands(code[0]); ++k) read[code[2 + k]] = true;
    if (written[code[1]] || read[code[1]]) return false;
    written[code[1]] = true;
  }
  return true;
}

void SparsePlanner::follow_steps() {
  const bool singly = steps_can_be_taken_singly();
  std::vector<char> changes(net_.species, false);
  for (int32_t c = 0; c < net_.changes; ++c) changes[net_.change_slot[c]] = true;
  Numbers reached(net_.slots, -1);
  for (int32_t s = 0; s < net_.species; ++s) {
    if (!changes[s]) continue;
    reached[s] = s;
    for (int32_t i = net_.step_begin; i < net_.step_end; ++i) {
      const int32_t* code = net_.code + int64_t{kInstructionInts} * i;
      bool repeat = !singly;
      for (int k = 0; k < operands(code[0]); ++k) repeat |= reached[code[2 + k]] == s;
      if (!repeat) continue;
      reached[code[1]] = s;
      steps_of_[s].push_back(i);
    }
  }
}

// The instructions to repeat once a reaction has fired, as few spans as possible.
void SparsePlanner::add_spans(int32_t j, Numbers& spans) {
  Numbers steps;
  for (int32_t c = net_.change_start[j]; c < net_.change_start[j + 1]; ++c) {
    const Numbers& more = steps_of_[net_.change_slot[c]];
    steps.insert(steps.end(), more.begin(), more.end());
  }
  std::sort(steps.begin(), steps.end());
  steps.erase(std::unique(steps.begin(), steps.end()), steps.end());
  for (int32_t i : steps) {
    if (!spans.empty() && spans.back() == i)
      spans.back() = i + 1;
    else
      spans.insert(spans.end(), {i, i + 1});
    for (int32_t user : rates_of_[net_.code[i * kInstructionInts + 1]]) add_leaf(user, j);
  }
}

void SparsePlanner::add_leaf(int32_t j, int32_t update) {
  if (leaf_stamp_[j] == update) return;
  leaf_stamp_[j] = update;
  const bool simple = leaf_[j].left_out >= 0 && net_.factor_start[j + 1] - net_.factor_start[j] == 2;
  (simple ? simple_ : general_).push_back(j);
  add_group_of(group_of_reaction_[j], update);
}

void SparsePlanner::add_group_of(int32_t group, int32_t update) {
  if (group_stamp_[group] == update) return;
  group_stamp_[group] = update;
  touched_.push_back(group);
}

void SparsePlanner::plan_updates() {
  leaf_stamp_.assign(net_.reactions, -1);
  group_stamp_.assign(group_.size(), -1);
  update_.reserve(net_.reactions);
  for (int32_t j = 0; j < net_.reactions; ++j) {
    update_.push_back(static_cast<int64_t>(stream_.size()));
    if (stream_.size() < kLongestStream)
      plan_update(j);
    else
      stream_.insert(stream_.end(), {kEverything, 0, 0, 0, 0});
  }
}

void SparsePlanner::plan_update(int32_t j) {
  simple_.clear(), general_.clear(), touched_.clear();
  Numbers changes, spans;
  for (int32_t c = net_.change_start[j]; c < net_.change_start[j + 1]; ++c) {
    const int32_t species = net_.change_slot[c];
    changes.insert(changes.end(), {species, net_.change_delta[c]});
    if (group_of_species_[species] >= 0) add_group_of(group_of_species_[species], j);
    for (int32_t leaf : leaves_of_[species]) add_leaf(leaf, j);
    for (int32_t leaf : rates_of_[species]) add_leaf(leaf, j);
  }
  add_spans(j, spans);
  const auto size = [](const Numbers& list) { return static_cast<int32_t>(list.size()); };
  stream_.insert(stream_.end(), {size(changes) / 2, size(spans) / 2, size(simple_), size(general_), size(touched_)});
  for (const Numbers* part : {&changes, &spans, &simple_, &general_, &touched_})
    stream_.insert(stream_.end(), part->begin(), part->end());
}

}  // namespace pygen
