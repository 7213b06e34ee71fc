// The likeliest token of each row of logits, at once and not as an op.
#pragma once

#include <vector>

#include "step.h"

namespace streamer {

struct Choice {
  int token; // the first of the largest
  bool near; // another is within `nearness` of the largest, as a share of the largest size
  bool unsure; // another may be the likeliest once log probabilities are rounded
  float confidence; // its probability, 0 where it was not asked for
};

// logits [..., V] float32.
std::vector<Choice> choose(const mx::array& logits, float nearness, bool confident);

} // namespace streamer
