#include "chain.h"

#include <algorithm>
#include <chrono>
#include <optional>

#include "data.h"
#include "mlx/allocator.h"

namespace streamer {
namespace {

mx::array like(const mx::array& ids) {
  return mx::array(mx::allocator::malloc(ids.nbytes()), ids.shape(), mx::int32);
}

// Slots of ids [..., k], none where an expert is absent.
std::optional<mx::array> slots_of(const mx::array& ids, const Turn& turn) {
  if (turn.slots == nullptr) return std::nullopt;
  mx::array slots = like(ids);
  const auto* from = ids.data<int32_t>();
  auto* to = slots.data<int32_t>();
  for (size_t i = 0; i < ids.size(); ++i) {
    if (from[i] < 0 || from[i] >= turn.experts) return std::nullopt; // of what is no number
    to[i] = turn.slots[from[i]];
    if (to[i] < 0) return std::nullopt;
  }
  return slots;
}

// The same from a cache, which begins to read what is absent.
mx::array brought(
    const mx::array& ids, const Turn& turn, std::vector<Arrival>& arrivals, double& waited) {
  mx::array slots = like(ids);
  std::vector<Coming> coming;
  const int k = ids.shape(-1), rows = static_cast<int>(ids.size()) / k;
  check(
      turn.cache->bring(turn.layer, ids.data<int32_t>(), rows, k, slots.data<int32_t>(), coming),
      "chain: a router chose no experts, or more than the pool holds");
  for (Coming& one : coming) {
    auto wait = [reads = turn.cache->reads(), batch = std::move(one.batch)] {
      while (!reads->wait(*batch, 1)) {
      }
    };
    arrivals.push_back({std::move(one.pairs), counted(std::move(wait), waited)});
  }
  return slots;
}

// The turns behind one that waits, run with the experts at hand on states that are not kept, each
// once a pass, to learn what their routers will choose.
class Rehearsal {
 public:
  // Turn `at` would take these inputs, once what its cache was asked for has come. Gives what the
  // experts at hand make of them.
  AtHand look(
      const std::vector<Turn>& turns,
      size_t at,
      const Arrays& inputs,
      const std::vector<Arrival>& arrivals,
      ExpertCache& asked) {
    AtHand there = turns[at].op->at_hand(inputs, arrivals);
    for (bool first = true; std::max(at, at_) + 1 < turns.size() && asked.idle(first); first = false) {
      const auto began = std::chrono::steady_clock::now();
      const bool own = at_ <= at;
      if (own) at_ = at, inputs_ = inputs;
      const Turn& turn = turns[at_];
      SegmentOp::Call call = turn.call;
      call.inputs = std::move(inputs_);
      call.taped = false;
      const Arrays out = turn.op->now(call, {}, own ? &there : nullptr);
      mx::array slots = like(out[2]);
      turn.cache->guess(
          turn.layer, out[2].data<int32_t>(), static_cast<int>(out[2].size()),
          static_cast<int>(at_), slots.data<int32_t>());
      inputs_ = {out[0], out[1], slots, out[3], out[4]};
      ++at_;
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
      asked.rehearsed(took.count());
    }
    return there;
  }

 private:
  size_t at_ = 0; // turns before it were rehearsed or have run
  Arrays inputs_; // what it would take
};

} // namespace

std::function<void()> counted(std::function<void()> wait, double& waited) {
  return [wait = std::move(wait), &waited] {
    const auto began = std::chrono::steady_clock::now();
    wait();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
    waited += took.count();
  };
}

std::vector<Arrays> go_on(
    std::vector<Turn> turns,
    Arrays inputs,
    std::vector<Arrival> arrivals,
    const std::function<bool()>& came,
    double& waited) {
  check(!turns.empty(), "chain: there must be a segment");
  std::vector<Arrays> gave;
  ExpertCache* asked = nullptr;
  Rehearsal rehearsal;
  for (Turn& turn : turns) {
    std::optional<AtHand> there;
    if (asked && asked->looking && !arrivals.empty()) {
      there = rehearsal.look(turns, gave.size(), inputs, arrivals, *asked);
    }
    turn.call.inputs = std::move(inputs);
    gave.push_back(turn.op->now(turn.call, arrivals, there ? &*there : nullptr));
    if (asked && !asked->landed()) break;
    if (gave.size() == turns.size() || (gave.size() == 1 && !came())) break;
    const Arrays& out = gave.back();
    check(turn.op->routes(), "chain: only the last segment has no router");
    arrivals.clear();
    asked = turn.cache;
    const auto slots = asked ? std::optional(brought(out[2], turn, arrivals, waited))
                             : slots_of(out[2], turn);
    if (!slots || (!asked && out[2].size() != gave[0][2].size())) break;
    inputs = {out[0], out[1], *slots, out[3], out[4]};
  }
  return gave;
}

} // namespace streamer
