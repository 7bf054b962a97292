// What the method "sparse" knows of a network beyond its tables: where each reaction stands in the trees of sums, and what
// its firing changes there. Made once per run (csrc/ssa_sparse_plan.cpp), read by all threads (csrc/cpu/ssa_sparse.cpp).
//
// A reaction is *grouped* under one of its reactants, x_g: of its propensity the factor x_g is left out, and the rest is
// its leaf. The sum over a group's leaves times x_g is the group's propensity. A change of x_g then costs one
// multiplication, however many reactions consume that species, and of a reaction A + B -> ... only one of the reactants
// makes the leaf change (Ramaswamy, Gonzalez-Segredo and Sbalzarini 2009 have the idea of partial propensities). Reactions
// without such a reactant, and those whose rate changes with the state, are leaves of the last group, whose factor is 1.
//
// The definition, to the last bit. Grouped is a reaction whose rate is computed once per trajectory, which has a factor
// (x - 0), and whose factors of each species are x, x - 1, ... without a gap. Its group is that of these species which has
// the fewest reactions with no other factor; of equals, that which the most reactions change; of equals, the first. Its
// leaf is ((rate * factor) * factor) ..., without the first factor (x_g - 0). Groups are in the order of their species; the
// leaves of a group in the order of the reactions. A sum of n values is that of a heap: filled up with zeros to a power of
// two P, the values are its nodes P ... 2P - 1, every other node i is node 2i + node 2i + 1, and the sum is node 1. There
// is a heap for each group, and one over the groups' propensities x_g * node 1.
#pragma once

#include "../shared/ssa_network.h"

namespace pygen {

struct SparseGroup {
  int32_t factor;  // the slot of x_g
  int32_t heap;    // where its heap begins: node i is nodes[heap + i]
  int32_t leaves;  // P
  int32_t member;  // where its reactions begin in `members`
};

struct SparseLeaf {
  int32_t heap, node;  // of the group's heap
  int32_t left_out;    // the factor that is x_g, an index of factor_slot; -1: none
  // Where one factor is left:
  int32_t slot;
  double offset;
};

struct SparsePlan {
  int32_t groups, leaves;    // leaves: P of the heap over the groups, which begins at node 0
  int32_t nodes;             // of all heaps together
  int32_t constant_slot;     // a slot behind the network's own, with the value 1
  const SparseGroup* group;  // [groups]
  const int32_t* members;    // [reactions]
  const SparseLeaf* leaf;    // [reactions]
  // What a reaction's firing changes, one list behind another; begins at update[j]: see SparseUpdate.
  const int64_t* update;
  const int32_t* stream;
};

// The head of a reaction's part of `stream`; behind it, in this order:
struct SparseUpdate {
  int32_t changes;  // pairs (slot, difference)
  int32_t spans;    // pairs (begin, end) of instructions of the step program
  int32_t simple;   // reactions whose leaf has one factor left
  int32_t general;  // reactions whose leaf is to be computed from the network's tables
  int32_t groups;   // whose propensity changes
};
constexpr int kUpdateInts = sizeof(SparseUpdate) / sizeof(int32_t);
constexpr int32_t kEverything = -1;  // SparseUpdate::changes: compute everything anew; the list would be too long

}  // namespace pygen
