// The attention half of Qwen3.5's decoder layers: two lazy ops around the attention itself, or a
// block with the keys' and values' buffers as its states. All float32.
#pragma once

#include "block.h"

namespace streamer {

// x [B, T, D] + (attention of q, k, v of rms_norm(x)) * sigmoid(its gates) @ out^T.
struct Attention {
  Norm norm;
  Alike projections; // q [2 H W, D], a query and a gate for each head; k and v [Hk W, D]
  Norm q_norm, k_norm; // of heads
  mx::array frequencies; // see rope()
  bool traditional;
  float rope_scale;
  int heads, key_heads;
};

class AttentionLayer {
 public:
  // out [D, H W]; scale: of the scores.
  AttentionLayer(const Attention& attention, const Alike& out, float scale);

  // Whether all weights are there.
  bool kept() const;
  // States: keys and values [B, Hk, room, W].
  const Block& block() const {
    return block_;
  }

 private:
  Block block_;
};

// x [B, T, D] -> queries [B, H, T, W], keys and values [B, Hk, T, W], gates [B, T, H W]: the products
// of rms_norm(x), queries and keys normed and rotated as by rope() from `offset` on.
std::vector<mx::array> attention_inputs(
    const mx::array& x, const Attention& attention, int offset, mx::StreamOrDevice stream);

// x [B, T, D] + (y * sigmoid(gates)) @ out^T: y [B, H, T, W], gates [B, T, H W], out [D, H W].
mx::array attention_output(
    const mx::array& x,
    const mx::array& y,
    const mx::array& gates,
    const Alike& out,
    mx::StreamOrDevice stream);

} // namespace streamer
