// Stacks of experts: their layout, and the products of row and expert pairs with them.
#pragma once

#include <utility>

#include "experts.h"
#include "multiply.h"

namespace streamer {

// A stack's layout, its slots, and how many inputs of the primitive it takes.
struct Experts {
  Matrix A; // of one expert, without pointers
  int slots, inputs;
};

bool same(const Experts& a, const Experts& b);

// Throws std::invalid_argument where the stack doesn't fit rows of so many columns.
Experts experts_of(int columns, const Stack& s, int group, int bits, const std::string& mode);

void append(std::vector<mx::array>& inputs, const Stack& s);

// The stack's pointers, from the inputs at `at` on; `at` moves past them.
Matrix bound(
    const Experts& e,
    const std::vector<mx::array>& inputs,
    size_t& at,
    std::vector<std::shared_ptr<char>>& copies);

// Pairs of a row and the slot it chose: pair p is of row p / share.
struct Pairs {
  Pairs(const int32_t* slots, int count, int share, int stacked);

  bool absent(int pair) const {
    return slots[pair] < 0 || slots[pair] >= stacked;
  }

  const int32_t* slots;
  int count, share, stacked; // stacked: slots there are
  std::vector<int> order; // by slot, absent ones first
};

// Work for one multiply: y[p] = x[p / share] @ stack[slots[p]]^T for each stack and its y.
struct Plan {
  std::vector<Pack> packs;
  std::vector<Part> parts;
  std::vector<Product> products;

  void add(
      const Pairs& pairs,
      const float* x,
      int share,
      const std::vector<std::pair<Matrix, float*>>& stacks);
  void run() const;
};

void clear_absent(const Pairs& pairs, float* y, int64_t columns);

// down(silu(gate(x)) * up(x)) of all pairs, into y.
struct Swiglu {
  const Pairs& pairs;
  Matrix gate, up, down;
  float* y;
  bool keep = false; // what y holds for absent pairs, instead of zeros
};

void run_swiglus(const std::vector<Swiglu>& all, const float* x);

} // namespace streamer
