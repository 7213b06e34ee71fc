// A whole block of experts as one lazy op.
#pragma once

#include "block.h"

namespace streamer {

// The weights of a block of experts. routers: of the experts [E, D], and of the shared one [1, D];
// experts: gate, up [S, I, D], down [S, D, I]; shared: gate, up [J, D], down [D, J].
struct MoeWeights {
  Alike routers, experts, shared;
  int k;
  bool normalize;
};

// What a router made of rows of x.
struct Routed {
  const float* x; // as the router and the experts see it: normed
  const int32_t* slots; // of the experts chosen [rows, k]
  const float *scores, *opening; // [rows, k], [rows]
};

// Pairs of row and choice that are computed once `wait` has returned.
struct Arrival {
  std::vector<int> pairs;
  std::function<void()> wait;
};

// What the experts at hand and the shared one gave, [rows, k + 1, D]: zeros for all other pairs.
using AtHand = std::vector<float>;

// The two halves of a block of experts on data, and their weights in the order they take them.
class MoeBlock {
 public:
  // paged: S slots need not be the E experts.
  MoeBlock(int D, const MoeWeights& weights, const std::optional<Norm>& norm, bool paged);

  int D() const {
    return D_;
  }
  int k() const {
    return k_;
  }
  const std::vector<mx::array>& routing_weights() const {
    return routing_weights_;
  }
  const std::vector<mx::array>& expert_weights() const {
    return expert_weights_;
  }
  // Rows of x: normed if there is a norm, then ids and scores [rows, k] and opening [rows].
  void route(
      Inputs& weights,
      const float* x,
      int rows,
      float* normed,
      int32_t* ids,
      float* scores,
      float* opening) const;
  // Of all pairs that no arrival names.
  AtHand at_hand(
      Inputs& weights, int rows, const Routed& routed, const std::vector<Arrival>& arrivals) const;
  // y = the experts' sum with the shared one's, plus x where there is a norm. Pairs named by an
  // arrival are computed with it, into `there`, which has the others.
  void mix(
      Inputs& weights,
      const float* x,
      int rows,
      const Routed& routed,
      const std::vector<Arrival>& arrivals,
      AtHand& there,
      float* y) const;
  // Both, with experts in the slots of their numbers.
  void run(Inputs& weights, const float* x, int rows, float* y) const;

 private:
  int D_, E_, S_, k_;
  bool normalize_, normed_;
  float eps_;
  std::vector<Experts> routers_, experts_, shared_;
  std::vector<mx::array> routing_weights_, expert_weights_;
};

// x [..., D] -> [..., D]: combine() of the k experts that route() chose and of the shared expert.
// With a norm: x + moe(rms_norm(x)).
class Moe {
 public:
  Moe(int D, const MoeWeights& weights, const std::optional<Norm>& norm);

  bool kept() const {
    return run_.kept();
  }
  const Block& block() const {
    return block_;
  }
  mx::array operator()(const mx::array& x, mx::StreamOrDevice stream) const;

 private:
  Block block_;
  Bound run_;
};

} // namespace streamer
