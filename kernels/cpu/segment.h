// Decoder layers in a row as one lazy op: what the ops of their halves give, bit for bit.
//
// It begins with tokens, a residual stream or the experts that a router has chosen, and ends with the
// stream, the choice of the next router or the logits. Weights are bound: they must be evaluated.
#pragma once

#include "moe.h"

namespace streamer {

// Rows of w [V, D], float32, or affine with scales of any float type; they come out in float32.
struct Embedding {
  Weight w;
  int group, bits;
};

// norm(x) @ w^T.
struct Head {
  Norm norm;
  Alike w;
};

struct Segment {
  std::optional<Embedding> embedding;
  std::optional<MoeBlock> chosen; // before the blocks: with a norm, so that it adds to the stream
  std::vector<Block> blocks;
  std::optional<MoeBlock> router; // after the blocks
  std::optional<Head> head;
  int D;
};

class SegmentOp {
 public:
  explicit SegmentOp(Segment segment);
  ~SegmentOp();

  bool kept() const;

  // inputs: tokens [B, T] int32 or uint32 with an embedding, else x [B, T, D]; with chosen experts
  // then those of a router's outputs, slots in place of ids. states: two of each block that has any;
  // caches hold `offset` tokens and have room for T more. fresh: for each state whether it may be
  // written where it lies, as nobody has appended to it yet.
  // Gives logits [B, T, V] with a head, else x [B, T, D], with a router then the normed x, ids int32
  // and scores [B, T, k] and opening [B, T, 1]; then the states.
  std::vector<mx::array> operator()(
      const std::vector<mx::array>& inputs,
      const std::vector<mx::array>& states,
      int offset,
      const std::vector<bool>& fresh,
      mx::StreamOrDevice stream) const;

  // The same at once, on this thread and its helpers: what is given is evaluated first.
  std::vector<mx::array> now(
      const std::vector<mx::array>& inputs,
      const std::vector<mx::array>& states,
      int offset,
      const std::vector<bool>& fresh,
      const std::vector<Arrival>& arrivals) const;

  class Impl;

 private:
  std::shared_ptr<const Impl> impl_;
};

} // namespace streamer
