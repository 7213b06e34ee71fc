#include "stacks.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "buffers.h"
#include "pool.h"
#include "workspace.h"

namespace streamer {
namespace {

Matrix expert(const Matrix& stack, int64_t slot) {
  Matrix A = stack;
  const int64_t cells = int64_t(A.N) * A.K;
  A.w = static_cast<const char*>(A.w) + slot * (cells * width(A) / 8);
  if (A.format != Format::dense) {
    const int64_t item = A.format != Format::affine ? 1 : A.scale == Scale::f32 ? 4 : 2;
    const int64_t bytes = slot * (cells / A.group) * item;
    A.scales = static_cast<const char*>(A.scales) + bytes;
    if (A.biases != nullptr) A.biases = static_cast<const char*>(A.biases) + bytes;
  }
  return A;
}

} // namespace

bool same(const Experts& a, const Experts& b) {
  return a.A.N == b.A.N && same_packing(a.A, b.A) && a.A.scale == b.A.scale && a.slots == b.slots;
}

Experts experts_of(int columns, const Stack& s, int group, int bits, const std::string& mode) {
  if (s.w.ndim() != 2 && s.w.ndim() != 3) {
    throw std::invalid_argument("experts: weights must have two or three axes");
  }
  Matrix A = matrix_of(columns, s.w, s.scales, s.biases, group, bits, mode);
  if (s.scales && s.w.ndim() == 3 && s.scales->shape(0) != s.w.shape(0)) {
    throw std::invalid_argument("experts: scales and weights differ in slots");
  }
  return {A, s.w.ndim() == 3 ? s.w.shape(0) : 1, 1 + (s.scales ? 1 : 0) + (s.biases ? 1 : 0)};
}

void append(std::vector<mx::array>& inputs, const Stack& s) {
  inputs.push_back(s.w);
  if (s.scales) inputs.push_back(*s.scales);
  if (s.biases) inputs.push_back(*s.biases);
}

Matrix bound(
    const Experts& e,
    const std::vector<mx::array>& inputs,
    size_t& at,
    std::vector<std::shared_ptr<char>>& copies) {
  Matrix A = e.A;
  A.w = row_major(inputs[at], copies);
  if (e.inputs > 1) A.scales = row_major(inputs[at + 1], copies);
  if (e.inputs > 2) A.biases = row_major(inputs[at + 2], copies);
  at += e.inputs;
  return A;
}

Pairs::Pairs(const int32_t* slots, int count, int share, int stacked)
    : slots(slots), count(count), share(share), stacked(stacked), order(count) {
  std::iota(order.begin(), order.end(), 0);
  auto key = [&](int p) { return absent(p) ? -1 : slots[p]; };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return key(a) < key(b); });
}

void Plan::add(
    const Pairs& pairs,
    const float* x,
    int share,
    const std::vector<std::pair<Matrix, float*>>& stacks) {
  const auto& order = pairs.order;
  std::vector<const float*> from;
  std::vector<float*> to;
  for (size_t i = 0; i < order.size();) {
    const int slot = pairs.slots[order[i]];
    size_t end = i;
    while (end < order.size() && pairs.slots[order[end]] == slot) ++end;
    for (size_t s = 0; !pairs.absent(order[i]) && s < stacks.size(); ++s) {
      const auto& [stack, y] = stacks[s];
      from.clear();
      to.clear();
      for (size_t j = i; j < end; ++j) {
        from.push_back(x + int64_t(order[j] / share) * stack.K);
        to.push_back(y + int64_t(order[j]) * stack.N);
      }
      add_product(expert(stack, slot), from, to, packs, parts, products);
    }
    i = end;
  }
}

void Plan::run() const {
  multiply(packs, parts, products);
}

void clear_absent(const Pairs& pairs, float* y, int64_t columns) {
  for (int p = 0; p < pairs.count; ++p) {
    if (pairs.absent(p)) std::fill_n(y + p * columns, columns, 0.0f);
  }
}

void run_swiglus(const std::vector<Swiglu>& all, const float* x) {
  int64_t room = 0;
  for (const Swiglu& one : all) room += 2 * int64_t(one.pairs.count) * one.gate.N;
  float* hidden = workspace(Use::step, room);
  Plan in, out;
  float* at = hidden;
  for (const Swiglu& one : all) {
    const int64_t size = int64_t(one.pairs.count) * one.gate.N;
    in.add(one.pairs, x, one.pairs.share, {{one.gate, at}, {one.up, at + size}});
    out.add(one.pairs, at, 1, {{one.down, one.y}});
    at += 2 * size;
  }
  in.run();
  at = hidden;
  for (const Swiglu& one : all) {
    const int64_t inner = one.gate.N, size = one.pairs.count * inner;
    auto activate = [&](int p) {
      if (!one.pairs.absent(p)) rows().swiglu(at + p * inner, at + size + p * inner, inner);
    };
    if (size >= 1 << 13) {
      parallel_for(one.pairs.count, activate);
    } else {
      for (int p = 0; p < one.pairs.count; ++p) activate(p);
    }
    at += 2 * size;
  }
  out.run();
  for (const Swiglu& one : all) {
    if (!one.keep) clear_absent(one.pairs, one.y, one.down.N);
  }
}

} // namespace streamer
