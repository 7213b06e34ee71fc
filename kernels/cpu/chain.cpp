#include "chain.h"

#include <optional>

#include "data.h"
#include "mlx/allocator.h"

namespace streamer {
namespace {

// Slots of ids [..., k], none where an expert is absent.
std::optional<mx::array> slots_of(const mx::array& ids, const Turn& turn) {
  if (turn.slots == nullptr) return std::nullopt;
  mx::array slots(mx::allocator::malloc(ids.nbytes()), ids.shape(), mx::int32);
  const auto* from = ids.data<int32_t>();
  auto* to = slots.data<int32_t>();
  for (size_t i = 0; i < ids.size(); ++i) {
    if (from[i] < 0 || from[i] >= turn.experts) return std::nullopt; // of what is no number
    to[i] = turn.slots[from[i]];
    if (to[i] < 0) return std::nullopt;
  }
  return slots;
}

} // namespace

std::vector<Arrays> go_on(
    std::vector<Turn> turns,
    Arrays inputs,
    const std::vector<Arrival>& arrivals,
    const std::function<bool()>& came) {
  check(!turns.empty(), "chain: there must be a segment");
  std::vector<Arrays> gave;
  for (Turn& turn : turns) {
    turn.call.inputs = std::move(inputs);
    gave.push_back(turn.op->now(turn.call, gave.empty() ? arrivals : std::vector<Arrival>()));
    if (gave.size() == turns.size() || (gave.size() == 1 && !came())) break;
    const Arrays& out = gave.back();
    check(turn.op->routes(), "chain: only the last segment has no router");
    const auto slots = slots_of(out[2], turn);
    if (!slots || out[2].size() != gave[0][2].size()) break;
    inputs = {out[0], out[1], *slots, out[3], out[4]};
  }
  return gave;
}

} // namespace streamer
