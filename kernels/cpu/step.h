// The small ops of a decode pass as lazy MLX primitives on the CPU. All take and give float32.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

namespace streamer {

namespace mx = mlx::core;

// A primitive that is one function of its inputs' and outputs' data, run in its turn on the stream.
class Step : public mx::Primitive {
 public:
  using Body = std::function<void(const std::vector<mx::array>&, std::vector<mx::array>&)>;

  Step(mx::Stream stream, const char* name, Body body)
      : Primitive(stream), name_(name), body_(std::move(body)) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  const char* name() const override {
    return name_;
  }

 private:
  const char* name_;
  Body body_;
};

// A body and the arrays that it takes after those that change from call to call. Where they have
// been evaluated already they are no inputs of the op: the graph is smaller by them.
class Bound {
 public:
  Bound(Step::Body body, std::vector<mx::array> weights);

  // Whether the weights are no inputs: an op that is kept then holds nothing but what is there.
  bool kept() const {
    return kept_;
  }
  std::vector<mx::array> operator()(
      const char* name,
      std::vector<mx::array> inputs,
      std::vector<mx::Shape> shapes,
      mx::StreamOrDevice stream) const;

 private:
  std::shared_ptr<const Step::Body> body_;
  std::vector<mx::array> weights_;
  bool kept_;
};

// x [..., n], weight [n] or none -> x * scale / sqrt(mean(x^2) + eps) * weight.
mx::array rms_norm(
    const mx::array& x,
    const std::optional<mx::array>& weight,
    float eps,
    float scale,
    mx::StreamOrDevice stream);

// q, k [B, T, Hk, Dk], v [B, T, Hv, Dv], g [B, T, Hv] or [B, T, Hv, Dk], beta [B, T, Hv],
// state [B, Hv, Dv, Dk] -> y [B, T, Hv, Dv], state, and the tape d [B, T, Hv, Dv] (steps.h).
std::vector<mx::array> gated_delta(
    const mx::array& q,
    const mx::array& k,
    const mx::array& v,
    const mx::array& g,
    const mx::array& beta,
    const mx::array& state,
    mx::StreamOrDevice stream);

// Sizes of a gated delta rule.
struct Heads {
  int B, T, Hk, Hv, Dk, Dv;
};

// Those of arrays shaped as for gated_delta; throws std::invalid_argument where they don't fit.
Heads heads_of(const mx::Shape& q, const mx::Shape& v, const mx::Shape& state);
Heads heads_of(
    const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& state);

// The rule itself on row-major data; y, d and the state after are written.
void run_delta(
    const Heads& heads,
    const float* q,
    const float* k,
    const float* v,
    const float* g,
    bool vector_gate,
    const float* beta,
    const float* state,
    float* y,
    float* after,
    float* d);

// x [B, T + taps - 1, C], weight [C, taps, 1] -> [B, T, C].
mx::array depthwise_conv(const mx::array& x, const mx::array& weight, mx::StreamOrDevice stream);

} // namespace streamer
