// Segments in a row, run on for as long as the experts that their routers choose are at hand or a
// cache brings them.
#pragma once

#include <functional>
#include <vector>

#include "expert_cache.h"
#include "segment.h"

namespace streamer {

// wait, its seconds added to `waited`, which must outlive it.
std::function<void()> counted(std::function<void()> wait, double& waited);

// A segment's turn: its call without inputs, and where the experts lie that its router chooses from:
// a layer of a cache, or slots, -1 where one is absent. Without either it is the last to run.
struct Turn {
  const SegmentOp* op;
  SegmentOp::Call call;
  const int32_t* slots = nullptr;
  int experts = 0;
  ExpertCache* cache = nullptr;
  int layer = 0;
};

// What each turn gave, at once on this thread and its helpers: all turns, or those up to the first
// whose router chose an absent expert that no cache brings or other than k experts of the first one's
// k, or those up to the one for which reads did not come. inputs, arrivals: the first one's; came:
// whether they did; waited: seconds of waiting for a cache's reads are added. Nobody may change slots
// meanwhile.
std::vector<std::vector<mx::array>> go_on(
    std::vector<Turn> turns,
    std::vector<mx::array> inputs,
    std::vector<Arrival> arrivals,
    const std::function<bool()>& came,
    double& waited);

} // namespace streamer
