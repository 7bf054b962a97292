// Makes what csrc/cpu/ssa_sparse.h describes.
#pragma once

#include <vector>

#include "cpu/ssa_sparse.h"

namespace pygen {

class SparsePlanner {
 public:
  explicit SparsePlanner(const Network& net);

  // Its pointers are into this object.
  SparsePlan plan() const;

 private:
  using Numbers = std::vector<int32_t>;

  void find_fixed_rates();
  bool can_be_grouped(int32_t reaction) const;
  void choose_groups();
  void add_group(int32_t factor, const Numbers& reactions);
  void find_dependents();
  bool steps_can_be_taken_singly() const;
  void follow_steps();
  void plan_updates();
  // The update in the making, that of reaction `update`.
  void plan_update(int32_t update);
  void add_spans(int32_t update, Numbers& spans);
  void add_leaf(int32_t reaction, int32_t update);
  void add_group_of(int32_t group, int32_t update);

  const Network net_;
  std::vector<char> fixed_;  // [slots] the same value throughout a trajectory
  std::vector<SparseGroup> group_;
  std::vector<SparseLeaf> leaf_;
  Numbers members_, group_of_reaction_, group_of_species_;
  int32_t leaves_ = 1, nodes_ = 0;
  // By slot: reactions whose leaf it is a factor of, reactions whose rate it is; by species: instructions to repeat.
  std::vector<Numbers> leaves_of_, rates_of_, steps_of_;
  std::vector<int64_t> update_;
  Numbers stream_;
  // Of the update in the making; the stamps are the last update that something is in.
  Numbers simple_, general_, touched_;
  Numbers leaf_stamp_, group_stamp_;
};

}  // namespace pygen
