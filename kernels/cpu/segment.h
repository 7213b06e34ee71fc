// Decoder layers in a row as one lazy op: what the ops of their halves give, bit for bit.
//
// It begins with tokens, a residual stream or the experts that a router has chosen, and ends with the
// stream, the choice of the next router or the logits. Weights are bound: they must be evaluated.
#pragma once

#include "entry.h"
#include "moe.h"

namespace streamer {

// norm(x) @ w^T.
struct Head {
  Norm norm;
  Alike w;
};

struct Segment {
  std::optional<Entry> entry;
  std::optional<MoeBlock> chosen; // before the blocks: with a norm, so that it adds to the stream
  std::vector<Block> blocks;
  std::optional<MoeBlock> router; // after the blocks
  std::optional<Head> head;
  int D;
  bool hidden = false; // the head's x and norm(x) are given, too
  bool last = false; // all behind the first block is of the last row alone
};

class SegmentOp {
 public:
  // One call. states: two of each block that has any; caches hold `offset` tokens and have room for T
  // more. fresh: for each state whether it may be written where it lies, as nobody has appended to it
  // yet. taped: rows will be taken back.
  struct Call {
    std::vector<mx::array> inputs, states;
    int offset;
    std::vector<bool> fresh;
    bool taped;
  };

  explicit SegmentOp(Segment segment);
  ~SegmentOp();

  bool kept() const;
  bool routes() const; // it ends with a router's choice
  bool begins() const; // it takes tokens, and nothing else
  bool ends() const; // it gives logits
  // Whether the caches among these states have room for rows more behind `offset` tokens.
  bool has_room(const std::vector<mx::array>& states, int offset, int rows) const;
  // Whether this call's caches are written where they lie, not copied as a whole.
  bool in_place(const Call& call) const;

  // inputs: those of an entry, else x [B, T, D]; with chosen experts then those of a router's
  // outputs, slots in place of ids. Gives logits [B, T, V] with a head, and if hidden x and norm(x),
  // else x [B, T, D], with a router then the normed x, ids int32 and scores [B, T, k] and opening
  // [B, T, 1]; then the tape if there is one, flat; then the states.
  std::vector<mx::array> operator()(Call call, mx::StreamOrDevice stream) const;

  // The same at once, on this thread and its helpers: what is given is evaluated first. there: what
  // the experts at hand gave, if that is known.
  std::vector<mx::array> now(
      const Call& call, const std::vector<Arrival>& arrivals, AtHand* there = nullptr) const;
  // Of a segment that begins with experts, and inputs evaluated: what those at hand give.
  AtHand at_hand(const std::vector<mx::array>& inputs, const std::vector<Arrival>& arrivals) const;

  // At once: the states of all blocks that have a tape after the first `kept` of a pass's `rows`,
  // from those before it and its tape.
  std::vector<mx::array> rewind(
      const std::vector<mx::array>& states, const mx::array& tape, int rows, int kept) const;

  class Impl;

 private:
  std::shared_ptr<const Impl> impl_;
};

} // namespace streamer
