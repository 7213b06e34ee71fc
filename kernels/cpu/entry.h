// What a segment of layers begins with: tokens, looked up in an embedding, and for an MTP head joined
// with the hidden states before them.
#pragma once

#include "block.h"

namespace streamer {

// Rows of w [V, D], float32, or affine with scales of any float type; they come out in float32.
struct Embedding {
  Weight w;
  int group, bits;
};

// [embedded(tokens), hidden(states)], the other way round where `swapped`, @ w^T: w [D, 2 D].
struct Join {
  Norm embedded, hidden;
  Alike w;
  bool swapped;
};

class Entry {
 public:
  Entry(int D, const Embedding& embedding, const std::optional<Join>& join);

  size_t inputs() const {
    return join_ ? 2 : 1;
  }
  // Evaluated before a run.
  const std::vector<mx::array>& weights() const {
    return weights_;
  }
  // inputs: tokens [B, T] int32 or uint32, with a join then states [B, T, D].
  void check_inputs(const std::vector<mx::array>& inputs) const;
  // x [B T, D], zeros for tokens that are none.
  void run(const std::vector<mx::array>& inputs, float* x) const;

 private:
  void look_up(const mx::array& tokens, float* y) const;

  int D_;
  Embedding embedding_;
  std::optional<Join> join_;
  std::vector<Experts> matrix_; // of the join
  std::vector<mx::array> weights_; // the embedding's, the norms', the join's
  size_t norms_ = 0; // where these begin
};

} // namespace streamer
