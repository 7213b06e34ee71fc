#include "experts.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "buffers.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "multiply.h"
#include "pool.h"

namespace streamer {
namespace {

// A stack's layout, its slots, and how many inputs of the primitive it takes.
struct Experts {
  Matrix A; // of one expert, without pointers
  int slots, inputs;
};

bool same(const Experts& a, const Experts& b) {
  return a.A.N == b.A.N && same_packing(a.A, b.A) && a.A.scale == b.A.scale && a.slots == b.slots;
}

Experts experts_of(int columns, const Stack& s, int group, int bits, const std::string& mode) {
  if (s.w.ndim() != 3) throw std::invalid_argument("experts: weights must have three axes");
  Matrix A = matrix_of(columns, s.w, s.scales, s.biases, group, bits, mode);
  if (s.scales && s.scales->shape(0) != s.w.shape(0)) {
    throw std::invalid_argument("experts: scales and weights differ in slots");
  }
  return {A, s.w.shape(0), 1 + (s.scales ? 1 : 0) + (s.biases ? 1 : 0)};
}

void check_rows(const mx::array& x, const mx::array& slots) {
  if (x.ndim() != 2 || x.dtype() != mx::float32) {
    throw std::invalid_argument("experts: x must be float32 with two axes");
  }
  if (slots.ndim() != 1 || slots.dtype() != mx::int32) {
    throw std::invalid_argument("experts: slots must be int32 with one axis");
  }
  if (x.shape(0) == 0 ? slots.shape(0) != 0 : slots.shape(0) % x.shape(0) != 0) {
    throw std::invalid_argument("experts: slots must be a multiple of the rows of x");
  }
}

void append(std::vector<mx::array>& inputs, const Stack& s) {
  inputs.push_back(s.w);
  if (s.scales) inputs.push_back(*s.scales);
  if (s.biases) inputs.push_back(*s.biases);
}

// The stack's pointers, from the inputs at `at` on.
Matrix bound(
    const Experts& e,
    const std::vector<mx::array>& inputs,
    size_t at,
    std::vector<std::shared_ptr<char>>& copies) {
  Matrix A = e.A;
  A.w = row_major(inputs[at], copies);
  if (e.inputs > 1) A.scales = row_major(inputs[at + 1], copies);
  if (e.inputs > 2) A.biases = row_major(inputs[at + 2], copies);
  return A;
}

Matrix expert(const Matrix& stack, int64_t slot) {
  Matrix A = stack;
  const int64_t cells = int64_t(A.N) * A.K;
  A.w = static_cast<const char*>(A.w) + slot * (cells * width(A) / 8);
  if (A.format != Format::dense) {
    const int64_t item = A.format == Format::mxfp4 ? 1 : A.scale == Scale::f32 ? 4 : 2;
    const int64_t bytes = slot * (cells / A.group) * item;
    A.scales = static_cast<const char*>(A.scales) + bytes;
    if (A.biases != nullptr) A.biases = static_cast<const char*>(A.biases) + bytes;
  }
  return A;
}

// Pairs in order of their slot, absent ones first.
std::vector<int> by_slot(const int32_t* slots, int P, int count) {
  std::vector<int> order(P);
  std::iota(order.begin(), order.end(), 0);
  auto key = [&](int p) { return slots[p] < 0 || slots[p] >= count ? -1 : slots[p]; };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return key(a) < key(b); });
  return order;
}

// Work for one multiply: y[p] = x[p / share] @ stack[slots[p]]^T for each stack and its y.
struct Plan {
  std::vector<Pack> packs;
  std::vector<Part> parts;
  std::vector<Product> products;

  void add(
      const std::vector<int>& order,
      const int32_t* slots,
      int count,
      const float* x,
      int share,
      const std::vector<std::pair<Matrix, float*>>& stacks) {
    std::vector<const float*> from;
    std::vector<float*> to;
    for (size_t i = 0; i < order.size();) {
      const int slot = slots[order[i]];
      size_t end = i;
      while (end < order.size() && slots[order[end]] == slot) ++end;
      if (slot >= 0 && slot < count) {
        for (const auto& [stack, y] : stacks) {
          from.clear();
          to.clear();
          for (size_t j = i; j < end; ++j) {
            from.push_back(x + int64_t(order[j] / share) * stack.K);
            to.push_back(y + int64_t(order[j]) * stack.N);
          }
          add_product(expert(stack, slot), from, to, packs, parts, products);
        }
      }
      i = end;
    }
  }
};

void clear_absent(const int32_t* slots, int P, int count, float* y, int64_t columns) {
  for (int p = 0; p < P; ++p) {
    if (slots[p] < 0 || slots[p] >= count) std::fill_n(y + p * columns, columns, 0.0f);
  }
}

std::vector<mx::array> weak(const std::vector<mx::array>& inputs) {
  std::vector<mx::array> held;
  for (const mx::array& a : inputs) held.push_back(mx::array::unsafe_weak_copy(a));
  return held;
}

class GatherLinear : public mx::UnaryPrimitive {
 public:
  GatherLinear(mx::Stream stream, Experts experts) : UnaryPrimitive(stream), experts_(experts) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    if (out.size() == 0) return;
    const int P = out.shape(0), share = P / inputs[0].shape(0);
    mx::cpu::get_command_encoder(stream()).dispatch(
        [e = experts_, held = weak(inputs), y = out.data<float>(), P, share] {
          std::vector<std::shared_ptr<char>> copies;
          const auto* x = static_cast<const float*>(row_major(held[0], copies));
          const auto* slots = static_cast<const int32_t*>(row_major(held[1], copies));
          Plan plan;
          plan.add(by_slot(slots, P, e.slots), slots, e.slots, x, share,
                   {{bound(e, held, 2, copies), y}});
          multiply(plan.packs, plan.parts, plan.products);
          clear_absent(slots, P, e.slots, y, e.A.N);
        });
  }

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    throw std::runtime_error("experts: this kernel runs on the CPU only");
  }

  bool is_equivalent(const Primitive& other) const override {
    return same(experts_, static_cast<const GatherLinear&>(other).experts_);
  }

  DEFINE_NAME(StreamerGatherLinear)

 private:
  Experts experts_;
};

class GatherSwiglu : public mx::UnaryPrimitive {
 public:
  GatherSwiglu(mx::Stream stream, Experts gate, Experts up, Experts down)
      : UnaryPrimitive(stream), gate_(gate), up_(up), down_(down) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    if (out.size() == 0) return;
    const int P = out.shape(0), share = P / inputs[0].shape(0);
    mx::cpu::get_command_encoder(stream()).dispatch(
        [gate = gate_, up = up_, down = down_, held = weak(inputs), y = out.data<float>(), P,
         share] {
          std::vector<std::shared_ptr<char>> copies;
          const auto* x = static_cast<const float*>(row_major(held[0], copies));
          const auto* slots = static_cast<const int32_t*>(row_major(held[1], copies));
          const auto order = by_slot(slots, P, gate.slots);
          const int64_t inner = gate.A.N;
          float* hidden = workspace(2, 2 * P * inner);
          float* raised = hidden + P * inner;
          Plan in;
          in.add(order, slots, gate.slots, x, share,
                 {{bound(gate, held, 2, copies), hidden},
                  {bound(up, held, 2 + gate.inputs, copies), raised}});
          multiply(in.packs, in.parts, in.products);
          auto activate = [&](int p) {
            if (slots[p] < 0 || slots[p] >= gate.slots) return;
            rows().swiglu(hidden + p * inner, raised + p * inner, inner);
          };
          if (P * inner >= 1 << 15) {
            parallel_for(P, activate);
          } else {
            for (int p = 0; p < P; ++p) activate(p);
          }
          Plan out_of;
          out_of.add(order, slots, gate.slots, hidden, 1,
                     {{bound(down, held, 2 + gate.inputs + up.inputs, copies), y}});
          multiply(out_of.packs, out_of.parts, out_of.products);
          clear_absent(slots, P, gate.slots, y, down.A.N);
        });
  }

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    throw std::runtime_error("experts: this kernel runs on the CPU only");
  }

  bool is_equivalent(const Primitive& other) const override {
    const auto& o = static_cast<const GatherSwiglu&>(other);
    return same(gate_, o.gate_) && same(up_, o.up_) && same(down_, o.down_);
  }

  DEFINE_NAME(StreamerGatherSwiglu)

 private:
  Experts gate_, up_, down_;
};

} // namespace

mx::array gather_linear(
    const mx::array& x,
    const mx::array& slots,
    const Stack& weight,
    int group,
    int bits,
    const std::string& mode,
    mx::StreamOrDevice stream) {
  check_rows(x, slots);
  Experts e = experts_of(x.shape(1), weight, group, bits, mode);
  std::vector<mx::array> inputs{x, slots};
  append(inputs, weight);
  return mx::array(
      {slots.shape(0), e.A.N},
      mx::float32,
      std::make_shared<GatherLinear>(mx::to_stream(stream), e),
      std::move(inputs));
}

mx::array gather_swiglu(
    const mx::array& x,
    const mx::array& slots,
    const Stack& gate,
    const Stack& up,
    const Stack& down,
    int group,
    int bits,
    const std::string& mode,
    mx::StreamOrDevice stream) {
  check_rows(x, slots);
  Experts g = experts_of(x.shape(1), gate, group, bits, mode);
  Experts u = experts_of(x.shape(1), up, group, bits, mode);
  Experts d = experts_of(g.A.N, down, group, bits, mode);
  if (u.A.N != g.A.N || u.slots != g.slots || d.slots != g.slots) {
    throw std::invalid_argument("experts: gate, up and down don't fit together");
  }
  std::vector<mx::array> inputs{x, slots};
  for (const Stack* stack : {&gate, &up, &down}) append(inputs, *stack);
  return mx::array(
      {slots.shape(0), d.A.N},
      mx::float32,
      std::make_shared<GatherSwiglu>(mx::to_stream(stream), g, u, d),
      std::move(inputs));
}

} // namespace streamer
