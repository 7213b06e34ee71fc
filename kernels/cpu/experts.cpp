#include "experts.h"

#include <algorithm>
#include <stdexcept>

#include "buffers.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "stacks.h"

namespace streamer {
namespace {

// Slots as int32, once x and they are found to fit.
mx::array checked(const mx::array& x, const mx::array& slots, mx::StreamOrDevice stream) {
  if (x.ndim() < 1 || x.dtype() != mx::float32) {
    throw std::invalid_argument("experts: x must be float32");
  }
  if (!mx::issubdtype(slots.dtype(), mx::integer)) {
    throw std::invalid_argument("experts: slots must be integers");
  }
  const size_t rows = x.size() / std::max(1, x.shape(-1));
  if (rows == 0 ? slots.size() != 0 : slots.size() % rows != 0) {
    throw std::invalid_argument("experts: slots must be a multiple of the rows of x");
  }
  return mx::astype(slots, mx::int32, stream);
}

mx::Shape shape_of(const mx::array& slots, int columns) {
  mx::Shape shape = slots.shape();
  shape.push_back(columns);
  return shape;
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
    const int P = static_cast<int>(out.size() / experts_.A.N),
              share = P / static_cast<int>(inputs[0].size() / experts_.A.K);
    mx::cpu::get_command_encoder(stream()).dispatch(
        [e = experts_, held = weak(inputs), y = out.data<float>(), P, share] {
          std::vector<std::shared_ptr<char>> copies;
          const auto* x = static_cast<const float*>(row_major(held[0], copies));
          const auto* slots = static_cast<const int32_t*>(row_major(held[1], copies));
          const Pairs pairs(slots, P, share, e.slots);
          size_t at = 2;
          Plan plan;
          plan.add(pairs, x, share, {{bound(e, held, at, copies), y}});
          plan.run();
          clear_absent(pairs, y, e.A.N);
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
  GatherSwiglu(mx::Stream stream, Experts gate, Experts up, Experts down, bool chosen)
      : UnaryPrimitive(stream), gate_(gate), up_(up), down_(down), chosen_(chosen) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    if (out.size() == 0) return;
    const int P = static_cast<int>(out.size() / down_.A.N),
              share = P / static_cast<int>(inputs[0].size() / gate_.A.K);
    mx::cpu::get_command_encoder(stream()).dispatch(
        [gate = gate_, up = up_, down = down_, held = weak(inputs), y = out.data<float>(), P,
         share, chosen = chosen_] {
          std::vector<std::shared_ptr<char>> copies;
          const auto* x = static_cast<const float*>(row_major(held[0], copies));
          const auto* slots = static_cast<const int32_t*>(row_major(held[1], copies));
          const std::vector<int32_t> only(chosen ? 0 : P, 0);
          const Pairs pairs(chosen ? slots : only.data(), P, share, gate.slots);
          size_t at = 2;
          const Matrix g = bound(gate, held, at, copies), u = bound(up, held, at, copies),
                       d = bound(down, held, at, copies);
          run_swiglus({{pairs, g, u, d, y}}, x);
        });
  }

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    throw std::runtime_error("experts: this kernel runs on the CPU only");
  }

  bool is_equivalent(const Primitive& other) const override {
    const auto& o = static_cast<const GatherSwiglu&>(other);
    return chosen_ == o.chosen_ && same(gate_, o.gate_) && same(up_, o.up_) &&
        same(down_, o.down_);
  }

  DEFINE_NAME(StreamerGatherSwiglu)

 private:
  Experts gate_, up_, down_;
  bool chosen_; // false: there is one expert, and every row has it
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
  const mx::array chosen = checked(x, slots, stream);
  Experts e = experts_of(x.shape(-1), weight, group, bits, mode);
  std::vector<mx::array> inputs{x, chosen};
  append(inputs, weight);
  return mx::array(
      shape_of(slots, e.A.N),
      mx::float32,
      std::make_shared<GatherLinear>(mx::to_stream(stream), e),
      std::move(inputs));
}

mx::array gather_swiglu(
    const mx::array& x,
    const std::optional<mx::array>& slots,
    const Stack& gate,
    const Stack& up,
    const Stack& down,
    int group,
    int bits,
    const std::string& mode,
    mx::StreamOrDevice stream) {
  const mx::array chosen = slots ? checked(x, *slots, stream) : mx::array(0);
  Experts g = experts_of(x.shape(-1), gate, group, bits, mode);
  Experts u = experts_of(x.shape(-1), up, group, bits, mode);
  Experts d = experts_of(g.A.N, down, group, bits, mode);
  if (u.A.N != g.A.N || u.slots != g.slots || d.slots != g.slots) {
    throw std::invalid_argument("experts: gate, up and down don't fit together");
  }
  if (!slots && (x.ndim() < 1 || x.dtype() != mx::float32 || g.slots != 1)) {
    throw std::invalid_argument("experts: without slots x must be float32 and the expert alone");
  }
  mx::Shape shape = slots ? slots->shape() : mx::Shape(x.shape().begin(), x.shape().end() - 1);
  shape.push_back(d.A.N);
  std::vector<mx::array> inputs{x, chosen};
  for (const Stack* stack : {&gate, &up, &down}) append(inputs, *stack);
  return mx::array(
      std::move(shape),
      mx::float32,
      std::make_shared<GatherSwiglu>(mx::to_stream(stream), g, u, d, slots.has_value()),
      std::move(inputs));
}

} // namespace streamer
