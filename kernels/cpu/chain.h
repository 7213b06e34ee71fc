// Segments in a row, run on for as long as the experts that their routers choose are at hand.
#pragma once

#include <functional>
#include <vector>

#include "segment.h"

namespace streamer {

// A segment's turn: its call without inputs, and the slots of the experts that its router chooses
// from, -1 where one is absent. Without slots it is the last to run.
struct Turn {
  const SegmentOp* op;
  SegmentOp::Call call;
  const int32_t* slots;
  int experts;
};

// What each turn gave, at once on this thread and its helpers: all turns, or those up to the first
// whose router chose an absent expert or other than k experts of the first one's k, or, where arrivals
// did not come, the first alone. inputs, arrivals: the first one's; came: whether they did. Nobody may
// change slots meanwhile.
std::vector<std::vector<mx::array>> go_on(
    std::vector<Turn> turns,
    std::vector<mx::array> inputs,
    const std::vector<Arrival>& arrivals,
    const std::function<bool()>& came);

} // namespace streamer
