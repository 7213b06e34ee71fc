// Halves of decoder layers as one lazy op each: the norm before, the block, and the sum with what
// came in. Every value is that of the ops it stands for, which see for shapes. All float32.
#pragma once

#include "block.h"

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
  // States: the convolution's [B, taps - 1, C] and the rule's [B, Hv, Dv, Dk].
  const Block& block() const {
    return block_;
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
  int Hk_, Dk_, Hv_, Dv_;
  Block block_;
  Bound run_;
};

} // namespace streamer
