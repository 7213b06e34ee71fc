// kernels.native: segments one after another, without Python in between.
#include <nanobind/ndarray.h>

#include "chain.h"
#include "computing.h"
#include "python.h"
#include "ticket.h"

namespace nb = nanobind;
using namespace nb::literals;
namespace mx = mlx::core;

namespace {

using streamer::SegmentOp;
using streamer::Ticket;
using StatesOf = std::tuple<std::vector<mx::array>, int, std::vector<bool>>;
using Slots = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ArrivalOf = std::tuple<std::vector<int>, const Ticket*>;
using Cached = std::tuple<streamer::ExpertCache*, int>;

// Waited for by the pairs that need them, in the order given; the seconds are added to `waited`.
std::vector<streamer::Arrival> waits_of(const std::vector<ArrivalOf>& arrivals, double& waited) {
  std::vector<streamer::Arrival> waits;
  for (const auto& [pairs, ticket] : arrivals) {
    waits.push_back({pairs, streamer::counted(ticket->waiting(), waited)});
  }
  return waits;
}

// What the routers of all but the last of these chose, [segments - 1, T, k].
nb::ndarray<nb::numpy, int32_t> choices_of(const std::vector<std::vector<mx::array>>& gave) {
  const size_t count = gave.size() - 1;
  const bool any = count > 0;
  const size_t rows = any ? gave[0][2].shape(-2) : 0, k = any ? gave[0][2].shape(-1) : 0;
  auto* ids = new std::vector<int32_t>();
  nb::capsule owner(ids, [](void* all) noexcept { delete static_cast<std::vector<int32_t>*>(all); });
  for (size_t i = 0; i < count; ++i) {
    const auto* from = gave[i][2].data<int32_t>();
    ids->insert(ids->end(), from, from + rows * k);
  }
  return nb::ndarray<nb::numpy, int32_t>(ids->data(), {count, rows, k}, owner);
}

} // namespace

void bind_chain(nb::module_& m) {
  m.def(
      "go_on",
      [](const std::vector<const SegmentOp*>& ops, std::vector<StatesOf> states,
         std::vector<mx::array> inputs, const std::vector<std::optional<Slots>>& slots, bool taped,
         const std::vector<ArrivalOf>& arrivals, const std::vector<Cached>& caches) {
        const size_t routers = std::max(slots.size(), caches.size());
        if (states.size() != ops.size() || routers + 1 < ops.size()) {
          throw std::invalid_argument("go_on: states and slots don't fit the segments");
        }
        std::vector<streamer::Turn> turns;
        for (size_t i = 0; i < ops.size(); ++i) {
          auto& [arrays, offset, fresh] = states[i];
          streamer::Turn turn{ops[i], {{}, std::move(arrays), offset, std::move(fresh), taped}};
          if (i < slots.size() && slots[i]) {
            turn.slots = slots[i]->data();
            turn.experts = static_cast<int>(slots[i]->shape(0));
          }
          if (i < caches.size()) std::tie(turn.cache, turn.layer) = caches[i];
          turns.push_back(std::move(turn));
        }
        double waited = 0;
        const auto waits = waits_of(arrivals, waited);
        const auto came = [&arrivals] {
          for (const auto& [pairs, ticket] : arrivals) {
            if (ticket->batch->state != streamer::reading_fine) return false;
          }
          return true;
        };
        std::vector<std::vector<mx::array>> gave;
        {
          nb::gil_scoped_release free;
          const streamer::Computing computing(&waited);
          gave = streamer::go_on(std::move(turns), std::move(inputs), waits, came, waited);
        }
        auto choices = choices_of(caches.empty() ? gave : std::vector<std::vector<mx::array>>(1));
        return std::make_tuple(std::move(gave), std::move(choices), waited);
      },
      "ops"_a, "states"_a, "inputs"_a, "slots"_a, "taped"_a = false,
      "arrivals"_a = std::vector<ArrivalOf>(), "caches"_a = std::vector<Cached>(),
      "Segments in a row, at once, up to the first whose router chose an absent expert. states: the "
      "states, offset and fresh of each; slots: for each but the last int32 [experts], -1 where one "
      "is absent, None to stop there; arrivals: (pairs, ticket) of the first one's experts that are "
      "still being read; caches: in place of slots an ExpertCache and its layer, for each. Gives what "
      "each that ran gave, what all but the last of them chose, int32 [n, T, k] (none of a cache's), and "
      "the seconds waited.");
}
