// kernels.native.ExpertCache: what Python sees of expert_cache.h.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "expert_cache.h"
#include "ticket.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using streamer::ExpertCache;

template <typename T>
using Line = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Square = nb::ndarray<const double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using LayerOf = std::tuple<Line<int32_t>, std::vector<Line<const int64_t>>>;

void need(bool fits) {
  if (!fits) throw std::invalid_argument("cache: arrays don't fit together");
}

} // namespace

void bind_expert_cache(nb::module_& m) {
  nb::class_<ExpertCache>(m, "ExpertCache")
      .def(
          "__init__",
          [](ExpertCache* self, const streamer::Engine& reads, const std::vector<LayerOf>& layers,
             const std::vector<Bytes>& tensors, Line<double> heat, Line<int64_t> uses,
             Line<int64_t> held, Line<int32_t> spare, Line<int64_t> spares, Line<int64_t> resident,
             Square turns, std::vector<double> ages, double share, double never, int wave) {
            std::vector<streamer::CachedLayer> all;
            size_t experts = 0;
            for (const auto& [slots, parts] : layers) {
              streamer::CachedLayer layer{slots.data(), static_cast<int>(slots.shape(0)), {}};
              for (const auto& part : parts) {
                need(part.shape(0) == slots.shape(0));
                layer.parts.push_back(part.data());
              }
              experts += slots.shape(0);
              all.push_back(std::move(layer));
            }
            const size_t slots = held.shape(0), count = layers.size();
            std::vector<streamer::SlotTensor> rows;
            for (const Bytes& tensor : tensors) {
              need(tensor.shape(0) == slots);
              rows.push_back({reinterpret_cast<char*>(tensor.data()), tensor.shape(1)});
            }
            need(heat.shape(0) == experts && uses.shape(0) == experts && spare.shape(0) == slots);
            need(spares.shape(0) == 1 && resident.shape(0) == count);
            need(turns.shape(0) == count && turns.shape(1) == count);
            const streamer::CacheState state{
                heat.data(), uses.data(), held.data(), spare.data(), spares.data(), resident.data(),
                turns.data(), static_cast<int>(slots)};
            new (self) ExpertCache(
                reads.reads, std::move(all), std::move(rows), state,
                {std::move(ages), share, never, wave});
          },
          "reads"_a, nb::kw_only(), "layers"_a.noconvert(), "tensors"_a.noconvert(),
          "heat"_a.noconvert(), "uses"_a.noconvert(), "held"_a.noconvert(), "spare"_a.noconvert(),
          "spares"_a.noconvert(), "resident"_a.noconvert(), "turns"_a.noconvert(), "ages"_a, "share"_a,
          "never"_a, "wave"_a,
          nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(),
          nb::keep_alive<1, 6>(), nb::keep_alive<1, 7>(), nb::keep_alive<1, 8>(),
          nb::keep_alive<1, 9>(), nb::keep_alive<1, 10>(), nb::keep_alive<1, 11>(),
          "See expert_cache.h. The arrays are used as they are, never copies: of these very types, "
          "contiguous.")
      .def_rw("watched", &ExpertCache::watched)
      .def(
          "wait",
          [](ExpertCache& self) {
            nb::gil_scoped_release free;
            self.wait();
          },
          "Until nothing of it is being read; guesses are dropped.")
      .def(
          "look",
          [](ExpertCache& self, double each, double layer, double end, bool reads, bool next) {
            self.looking.reset();
            if (each > 0) self.looking = {each, layer, end, reads, next};
          },
          "each"_a, "layer"_a = 0.0, "end"_a = 0.0, "reads"_a = true, "next"_a = true,
          "Whether layers are rehearsed while one waits, see expert_cache.h; not where each is 0.")
      .def(
          "take",
          [](ExpertCache& self) {
            streamer::Served all = self.take();
            nb::list told, demands;
            for (const auto& one : all.demands) {
              demands.append(nb::make_tuple(one.nbytes, one.seconds, one.beside));
            }
            for (const auto& one : all.told) {
              nb::bytes ids(reinterpret_cast<const char*>(one.ids.data()), one.ids.size() * 4);
              told.append(nb::make_tuple(one.layer, one.k, ids, one.missed));
            }
            nb::object failed = nb::none();
            if (all.failed) {
              failed = nb::cast(
                  new streamer::Ticket(self.reads(), all.failed, nb::none()),
                  nb::rv_policy::take_ownership);
            }
            nb::list guesses;
            for (const auto& by : all.guesses) {
              guesses.append(nb::make_tuple(by.named, by.right, by.read, by.used));
            }
            return nb::make_tuple(
                all.hits, all.misses, all.waits, demands, told, failed, all.rehearsals, all.end, guesses);
          },
          "A pass is over; guesses about the next hold their slots until `wait`. Since it was asked "
          "last: hits, misses, layers that missed; (bytes, seconds, whether beside guesses) of what each "
          "of those waited for; while watched (layer, k, ids, missed) of each choice, ids as int32; a "
          "ticket that failed; seconds of each layer rehearsed, and of the pass's end; experts that were "
          "named, right, read and used, of this pass's layers and of the next one's.");
}
