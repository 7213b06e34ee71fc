// Halves of decoder layers as one lazy op each: the norm before, the block, and the sum with what
// came in. Every value is that of the ops it stands for, which see for shapes. All float32.
#pragma once

#include "moe.h"

namespace streamer {

// x [B, T, D] -> x + GatedDeltaNet(rms_norm(x)) as in Qwen3.5: see delta.h.
struct DeltaNet {
  Alike in; // of qkv [C, D], z [Hv Dv, D], b and a [Hv, D]
  Alike out; // [D, Hv Dv]
  mx::array taps, a_log, dt_bias, gain; // gain [Dv]: of the gated norm
  float gain_eps;
  int key_heads, key_width, value_heads;
};

class DeltaLayer {
 public:
  DeltaLayer(const Norm& norm, const DeltaNet& net);

  bool kept() const {
    return run_.kept();
  }
  // Gives [B, T, D], the convolution's new state and the rule's; then, `taped`, what the rule was
  // given: q, k, v, a, b as for delta_update(), and qkv [B, T, C].
  std::vector<mx::array> operator()(
      const mx::array& x,
      const mx::array& before,
      const mx::array& state,
      bool taped,
      mx::StreamOrDevice stream) const;

 private:
  int D_, Hk_, Dk_, Hv_, Dv_, taps_;
  Bound run_;
};

// x [B, T, D] -> queries [B, H, T, W], keys and values [B, Hk, T, W], gates [B, T, H W]: the products
// of rms_norm(x) with q [2 H W, D] (a query and a gate for each head), k and v [Hk W, D]; queries and
// keys normed and rotated as by rope().
std::vector<mx::array> attention_inputs(
    const mx::array& x,
    const Norm& norm,
    const Alike& projections,
    const Norm& q_norm,
    const Norm& k_norm,
    const mx::array& frequencies,
    bool traditional,
    float scale,
    int offset,
    int heads,
    int key_heads,
    mx::StreamOrDevice stream);

// x [B, T, D] + (y * sigmoid(gates)) @ out^T: y [B, H, T, W], gates [B, T, H W], out [D, H W].
mx::array attention_output(
    const mx::array& x,
    const mx::array& y,
    const mx::array& gates,
    const Alike& out,
    mx::StreamOrDevice stream);

} // namespace streamer
