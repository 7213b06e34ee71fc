#include "chain.h"

#include <algorithm>
#include <chrono>
#include <cstring>
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

// The likeliest token, in the place of `tokens`.
mx::array likeliest(const mx::array& logits, const mx::array& tokens) {
  const auto* from = logits.data<float>();
  mx::array token(mx::allocator::malloc(tokens.nbytes()), tokens.shape(), tokens.dtype());
  const auto at = static_cast<int32_t>(std::max_element(from, from + logits.size()) - from);
  std::memcpy(token.data<char>(), &at, sizeof at);
  return token;
}

// The turns behind one that waits, run with the experts at hand on states that are not kept, each
// once a pass, to learn what their routers will choose. Behind the last of a pass over one row they
// begin anew with the token that is likeliest after it, and go on as far as the pass has come.
class Rehearsal {
 public:
  Rehearsal(const std::vector<Turn>& turns, const std::vector<Arrays>& gave) : turns_(turns), gave_(gave) {}

  // The next turn would take these inputs, once what its cache was asked for has come. Gives what the
  // experts at hand make of them.
  AtHand look(const Arrays& inputs, const std::vector<Arrival>& arrivals, ExpertCache& asked) {
    const size_t at = gave_.size(), last = turns_.size() - 1;
    AtHand there = turns_[at].op->at_hand(inputs, arrivals);
    for (;;) {
      const size_t turn = std::max(at, at_);
      if (turn >= last && !goes_round(turn, *asked.looking)) break;
      if (turn <= last && !turns_[turn].op->in_place(turns_[turn].call)) break;
      if (!asked.idle(turn == last)) break;
      const auto began = std::chrono::steady_clock::now();
      const bool own = at_ <= at;
      if (own) at_ = at, inputs_ = inputs;
      run(own ? &there : nullptr);
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
      if (turn != last) asked.rehearsed(took.count());
    }
    return there;
  }

 private:
  // Whether this turn, the last of the pass or of the next one, can be rehearsed.
  bool goes_round(size_t turn, const Looking& looking) const {
    const size_t count = turns_.size();
    if (turn < count) {
      const Turn &first = turns_.front(), &last = turns_.back();
      const bool round = looking.end > 0 && first.op->begins() && last.op->ends();
      return round && first.call.inputs[0].size() == 1;
    }
    const SegmentOp::Call& call = turns_[turn - count].call;
    return turn - count + 1 < gave_.size() &&
        turns_[turn - count].op->has_room(call.states, call.offset + 1, 1);
  }

  void run(AtHand* there) {
    const size_t count = turns_.size();
    const bool next = at_ >= count;
    const Turn& turn = turns_[at_ - count * next];
    SegmentOp::Call call = turn.call;
    call.inputs = std::move(inputs_);
    call.taped = false;
    if (next) { // behind what the true turn has left, where nobody has appended to it
      const Arrays& out = gave_[at_ - count];
      std::copy_n(out.end() - call.states.size(), call.states.size(), call.states.begin());
      ++call.offset;
      call.fresh.assign(call.fresh.size(), true);
    }
    const Arrays out = turn.op->now(call, {}, there);
    ++at_;
    if (at_ == count) {
      inputs_ = {likeliest(out[0], turns_[0].call.inputs[0])};
      return;
    }
    mx::array slots = like(out[2]);
    turn.cache->guess(
        turn.layer, out[2].data<int32_t>(), static_cast<int>(out[2].size()), next,
        slots.data<int32_t>());
    inputs_ = {out[0], out[1], slots, out[3], out[4]};
  }

  const std::vector<Turn>& turns_;
  const std::vector<Arrays>& gave_;
  size_t at_ = 0; // turns before it, of two passes, were rehearsed or have run
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
  Rehearsal rehearsal(turns, gave);
  for (Turn& turn : turns) {
    std::optional<AtHand> there;
    if (asked && asked->looking && !arrivals.empty()) {
      there = rehearsal.look(inputs, arrivals, *asked);
    }
    turn.call.inputs = std::move(inputs);
    const auto began = std::chrono::steady_clock::now();
    const double before = waited;
    gave.push_back(turn.op->now(turn.call, arrivals, there ? &*there : nullptr));
    if (asked && gave.size() == turns.size()) {
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
      asked->ended(took.count() - (waited - before));
    }
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
