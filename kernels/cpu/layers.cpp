#include "layers.h"

#include <algorithm>

#include "data.h"
#include "delta.h"

namespace streamer {
namespace {

Block block_of(const Norm& norm, const DeltaNet& net) {
  check_float({net.taps, net.a_log, net.dt_bias, net.gain}, "delta_layer: everything must be float32");
  check(norm.weight.ndim() == 1 && net.taps.ndim() == 3 && net.gain.ndim() == 1,
        "delta_layer: wrong axes");
  const int D = norm.weight.shape(0), Hk = net.key_heads, Dk = net.key_width, Hv = net.value_heads,
            Dv = net.gain.shape(0), keys = Hk * Dk, values = Hv * Dv, C = 2 * keys + values,
            taps = net.taps.shape(1);
  check_norm(norm, D, "delta_layer: the norm must be float32");
  heads_of({1, 1, Hk, Dk}, {1, 1, Hv, Dv}, {1, Hv, Dv, Dk});
  const auto in = matrices_of(net.in, {D, D, D, D}, "delta_layer: there must be qkv, z, b and a");
  const auto out = matrices_of(net.out, {values}, "delta_layer: there must be one output product");
  check(
      in[0].A.N == C && in[1].A.N == values && in[2].A.N == Hv && in[3].A.N == Hv &&
          out[0].A.N == D,
      "delta_layer: the products don't fit the heads");
  check(taps >= 2 && taps <= max_taps, "delta_layer: no kernel for so many taps");
  check(net.taps.shape() == mx::Shape{C, taps, 1}, "delta_layer: the taps don't fit");
  check(
      net.a_log.shape() == mx::Shape{Hv} && net.dt_bias.shape() == mx::Shape{Hv},
      "delta_layer: a_log or dt_bias doesn't fit");
  Block block;
  block.kind = Block::Kind::state;
  block.D = D;
  block.weights = {norm.weight, net.taps, net.a_log, net.dt_bias, net.gain};
  for (const Alike* all : {&net.in, &net.out}) {
    for (const Weight& weight : all->weights) append(block.weights, weight);
  }
  block.states = [=](int B, int) {
    return std::vector<mx::Shape>{{B, taps - 1, C}, {B, Hv, Dv, Dk}};
  };
  block.tape = {keys, keys, values, Hv, Hv, C}; // q, k, v, a, b and qkv
  block.body = [=, parts = block.tape, eps = norm.eps, gain_eps = net.gain_eps](
                   Inputs& next, const Pass& pass) {
    const int B = pass.B, T = pass.T;
    const bool taped = !pass.tape.empty();
    const Heads heads = heads_of({B, T, Hk, Dk}, {B, T, Hv, Dv}, {B, Hv, Dv, Dk});
    const Convolved sizes{B, T, taps, Hk, Dk, values, 1e-6f};
    const float *w = next.floats(), *taps_of = next.floats(), *a_log = next.floats(),
                *dt_bias = next.floats(), *gain = next.floats();
    std::vector<Matrix> A;
    for (const Experts& one : in) A.push_back(next.matrix(one));
    const Matrix last = next.matrix(out[0]);
    const int64_t rows = pass.rows();
    const float *x = pass.x, *before = pass.before[0];
    float* y = pass.y;
    std::vector<float> room(
        rows * (D + 2 * int64_t(values) + (taped ? 0 : 2 * int64_t(C) + 2 * Hv)));
    float *at = room.data(), *scaled = at, *z = scaled + rows * D, *outs = z + rows * values;
    float* own = outs + rows * values; // of what is given out where it is taped
    float* given[6];
    for (size_t i = 0; i < parts.size(); ++i) {
      given[i] = taped ? pass.tape[i] : own;
      own += rows * parts[i];
    }
    auto [q, k, v, a, b, qkv] = given;
    norm_rows(x, rows, D, w, eps, scaled);
    multiply_all(A, scaled, rows, {qkv, z, b, a});
    convolve(
        sizes, [&, qkv = qkv](int i, int t) { return qkv + (int64_t(i) * T + t) * C; },
        [&](int i, int t) { return before + (int64_t(i) * (taps - 1) + t) * C; }, taps_of, q, k, v,
        pass.after[0]);
    update(heads, q, k, v, a, b, a_log, dt_bias, pass.before[1], outs, pass.after[1]);
    gate_rows(
        rows * Hv, Dv, [&](int64_t r) { return outs + r * Dv; },
        [&](int64_t r) { return z + r * Dv; }, gain, gain_eps, z);
    multiply_all({last}, z, rows, {y});
    add_rows(x, rows * D, y);
  };
  block.rewind = [=](Inputs& next, const Pass& pass, int kept) {
    for (int i = 0; i < 2; ++i) next.floats();
    const float *a_log = next.floats(), *dt_bias = next.floats();
    const auto& tape = pass.tape;
    for (int i = 0; i < taps - 1; ++i) { // the last rows of what was convolved
      const int row = kept + i - (taps - 1);
      std::copy_n(
          row < 0 ? pass.before[0] + int64_t(kept + i) * C : tape[5] + int64_t(row) * C, C,
          pass.after[0] + int64_t(i) * C);
    }
    std::vector<float> y(int64_t(kept) * values);
    update(heads_of({1, kept, Hk, Dk}, {1, kept, Hv, Dv}, {1, Hv, Dv, Dk}), tape[0], tape[1],
           tape[2], tape[3], tape[4], a_log, dt_bias, pass.before[1], y.data(), pass.after[1]);
  };
  return block;
}

// The block as an op of its own: x and its states come before its weights.
Bound alone(const Block& block) {
  return {
      [body = block.body](const Arrays& in, Arrays& out) {
        Inputs next(in);
        Pass pass{in[0].shape(0), in[0].shape(1), next.floats(), out[0].data<float>()};
        for (int i = 0; i < 2; ++i) {
          pass.before[i] = next.floats();
          pass.after[i] = out[1 + i].data<float>();
        }
        for (size_t i = 3; i < out.size(); ++i) pass.tape.push_back(out[i].data<float>());
        body(next, pass);
      },
      block.weights};
}

} // namespace

DeltaLayer::DeltaLayer(const Norm& norm, const DeltaNet& net)
    : Hk_(net.key_heads),
      Dk_(net.key_width),
      Hv_(net.value_heads),
      Dv_(net.gain.size()),
      block_(block_of(norm, net)),
      run_(alone(block_)) {}

std::vector<mx::array> DeltaLayer::operator()(
    const mx::array& x,
    const mx::array& before,
    const mx::array& state,
    bool taped,
    mx::StreamOrDevice stream) const {
  check_float({x, before, state}, "delta_layer: everything must be float32");
  check(x.ndim() == 3 && x.shape(2) == block_.D, "delta_layer: x doesn't fit");
  const int B = x.shape(0), T = x.shape(1), C = 2 * Hk_ * Dk_ + Hv_ * Dv_;
  const auto states = block_.states(B, 0);
  check(
      before.shape() == states[0] && state.shape() == states[1],
      "delta_layer: the convolution's state or the rule's doesn't fit");
  std::vector<mx::Shape> shapes{x.shape(), before.shape(), state.shape()};
  if (taped) {
    shapes.insert(
        shapes.end(),
        {{B, T, Hk_, Dk_},
         {B, T, Hk_, Dk_},
         {B, T, Hv_, Dv_},
         {B, T, Hv_},
         {B, T, Hv_},
         {B, T, C}});
  }
  return run_("StreamerDeltaLayer", {x, before, state}, std::move(shapes), stream);
}

} // namespace streamer
