// A whole block of experts as one lazy op.
#pragma once

#include "linear.h"
#include "step.h"

namespace streamer {

// Weights that are quantized alike.
struct Alike {
  std::vector<Weight> weights;
  int group, bits;
  std::string mode;
};

// An RMS norm before a block, whose output is then added to what came in.
struct Norm {
  mx::array weight;
  float eps;
};

// x [..., D] -> [..., D]: combine() of the k experts that route() chose and of the shared expert.
// routers: of the experts [S, D], and of the shared one [1, D]; experts: gate, up [S, I, D], down
// [S, D, I]; shared: gate, up [J, D], down [D, J]. With a norm: x + moe(rms_norm(x)).
class Moe {
 public:
  Moe(int D,
      const Alike& routers,
      const Alike& experts,
      const Alike& shared,
      int k,
      bool normalize,
      const std::optional<Norm>& norm);

  bool kept() const {
    return run_.kept();
  }
  mx::array operator()(const mx::array& x, mx::StreamOrDevice stream) const;

 private:
  int D_;
  Bound run_;
};

} // namespace streamer
