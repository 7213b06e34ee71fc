// kernels.native: layers of models, and whether what was made of them still holds.
#include "attention_layer.h"
#include "choose.h"
#include "computing.h"
#include "layers.h"
#include "moe.h"
#include "python.h"
#include "segment.h"

namespace nb = nanobind;
using namespace nb::literals;
namespace mx = mlx::core;

namespace {

// Weights quantized alike, with group size, bits and mode.
using Group = std::tuple<std::vector<streamer::WeightOf>, int, int, std::string>;

// A norm's weight and epsilon.
using NormOf = std::tuple<mx::array, float>;

streamer::Norm norm_of(const NormOf& norm) {
  return {std::get<0>(norm), std::get<1>(norm)};
}

std::optional<streamer::Norm> norm_of(const std::optional<NormOf>& norm) {
  std::optional<streamer::Norm> out;
  if (norm) out = norm_of(*norm);
  return out;
}

streamer::Alike alike(const Group& group) {
  const auto& [weights, size, bits, mode] = group;
  streamer::Alike out{{}, size, bits, mode};
  for (const auto& weight : weights) out.weights.push_back(streamer::weight_of(weight));
  return out;
}

streamer::Attention attention_of(
    const NormOf& norm, const Group& projections, const NormOf& q_norm, const NormOf& k_norm,
    const mx::array& frequencies, bool traditional, float rope_scale, int heads, int key_heads) {
  return {norm_of(norm), alike(projections), norm_of(q_norm), norm_of(k_norm), frequencies,
          traditional, rope_scale, heads, key_heads};
}

// Whether containers hold what they held, and objects are of the classes they were of.
class Unchanged {
 public:
  explicit Unchanged(const nb::list& containers) {
    for (nb::handle one : containers) {
      owners_.push_back(nb::borrow(one));
      types_.push_back(Py_TYPE(one.ptr()));
      const size_t first = items_.size();
      if (PyDict_Check(one.ptr())) {
        PyObject *key, *value;
        Py_ssize_t at = 0;
        while (PyDict_Next(one.ptr(), &at, &key, &value)) {
          items_.push_back({nb::borrow(key), nb::borrow(value)});
        }
      } else if (PyList_Check(one.ptr())) {
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(one.ptr()); ++i) {
          items_.push_back({nb::object(), nb::borrow(PyList_GET_ITEM(one.ptr(), i))});
        }
      } else {
        throw std::invalid_argument("Unchanged: neither a dictionary nor a list");
      }
      counts_.push_back(items_.size() - first);
    }
  }

  bool holds() const {
    size_t at = 0;
    for (size_t i = 0; i < owners_.size(); ++i) {
      PyObject* one = owners_[i].ptr();
      if (Py_TYPE(one) != types_[i]) return false;
      const bool list = PyList_Check(one);
      const Py_ssize_t size = list ? PyList_GET_SIZE(one) : PyDict_Size(one);
      if (size != static_cast<Py_ssize_t>(counts_[i])) return false;
      for (size_t j = 0; j < counts_[i]; ++j, ++at) {
        PyObject* now = list ? PyList_GET_ITEM(one, j)
                             : PyDict_GetItemWithError(one, items_[at].first.ptr());
        if (now != items_[at].second.ptr()) return false;
      }
    }
    return true;
  }

 private:
  std::vector<nb::object> owners_;
  std::vector<PyTypeObject*> types_;
  std::vector<size_t> counts_;
  std::vector<std::pair<nb::object, nb::object>> items_;
};

// A cache's keys and values as a segment left them, `offset` tokens long: whoever goes on from these
// very arrays is the first to append to them, and may do so where they lie.
class Appended {
 public:
  bool goes_on(const mx::array& keys, const mx::array& values, int offset) const {
    return keys_ && keys_->id() == keys.id() && values_->id() == values.id() && offset == offset_;
  }

  void set(const mx::array& keys, const mx::array& values, int offset) {
    keys_ = keys;
    values_ = values;
    offset_ = offset;
  }

 private:
  std::optional<mx::array> keys_, values_; // held, so that their ids are not another's
  int offset_ = 0;
};

// Norms of embedded tokens and of hidden states, the product, and whether the states come first.
using JoinOf = std::tuple<NormOf, NormOf, Group, bool>;

streamer::Entry entry_of(int width, const Group& embedding, const std::optional<JoinOf>& join) {
  const auto& [weights, group, bits, mode] = embedding;
  if (weights.size() != 1) throw std::invalid_argument("segment: one embedding");
  std::optional<streamer::Join> joined;
  if (join) {
    const auto& [embedded, hidden, w, swapped] = *join;
    joined = {norm_of(embedded), norm_of(hidden), alike(w), swapped};
  }
  return {width, {streamer::weight_of(weights[0]), group, bits}, joined};
}

} // namespace

void bind_layers(nb::module_& m) {
  nb::class_<Unchanged>(
      m, "Unchanged", "Whether dictionaries and lists still hold the very objects that they held.")
      .def(nb::init<const nb::list&>(), "containers"_a)
      .def("holds", &Unchanged::holds);
  nb::class_<Appended>(m, "Appended", "Keys and values that a segment has appended to last.")
      .def(nb::init<>())
      .def("goes_on", &Appended::goes_on, "keys"_a, "values"_a, "offset"_a)
      .def("set", &Appended::set, "keys"_a, "values"_a, "offset"_a);
  nb::class_<streamer::Moe>(
      m, "Moe",
      "A block of experts: route, gather_swiglu, a shared expert and combine in one; with a norm "
      "(weight, eps) x + moe(rms_norm(x)).")
      .def(
          "__init__",
          [](streamer::Moe* self, int width, const Group& routers, const Group& experts,
             const Group& shared, int k, bool normalize, const std::optional<NormOf>& norm) {
            new (self) streamer::Moe(
                width, {alike(routers), alike(experts), alike(shared), k, normalize},
                norm_of(norm));
          },
          "width"_a,
          "routers"_a,
          "experts"_a,
          "shared"_a,
          nb::kw_only(),
          "k"_a,
          "normalize"_a,
          "norm"_a = nb::none())
      .def_prop_ro("kept", &streamer::Moe::kept, "Whether it may be kept: all weights are there.")
      .def("__call__", &streamer::Moe::operator(), "x"_a, "stream"_a = nb::none());
  nb::class_<streamer::MoeBlock>(
      m, "PagedMoe", "As Moe with a norm, its two halves to be put into segments.")
      .def(
          "__init__",
          [](streamer::MoeBlock* self, int width, const Group& routers, const Group& experts,
             const Group& shared, int k, bool normalize, const NormOf& norm) {
            new (self) streamer::MoeBlock(
                width, {alike(routers), alike(experts), alike(shared), k, normalize},
                norm_of(norm), true);
          },
          "width"_a,
          "routers"_a,
          "experts"_a,
          "shared"_a,
          nb::kw_only(),
          "k"_a,
          "normalize"_a,
          "norm"_a);
  nb::class_<streamer::DeltaLayer>(
      m, "DeltaLayer", "x + gated delta net of rms_norm(x), with a tape's arrays if asked for.")
      .def(
          "__init__",
          [](streamer::DeltaLayer* self, const NormOf& norm, const Group& in, const Group& out,
             const mx::array& taps, const mx::array& a_log, const mx::array& dt_bias,
             const NormOf& gain, int key_heads, int key_width, int value_heads) {
            new (self) streamer::DeltaLayer(
                norm_of(norm),
                {alike(in), alike(out), taps, a_log, dt_bias, std::get<0>(gain), std::get<1>(gain),
                 key_heads, key_width, value_heads});
          },
          "norm"_a,
          "inputs"_a,
          "output"_a,
          "taps"_a,
          "a_log"_a,
          "dt_bias"_a,
          "gain"_a,
          nb::kw_only(),
          "key_heads"_a,
          "key_width"_a,
          "value_heads"_a)
      .def_prop_ro("kept", &streamer::DeltaLayer::kept)
      .def(
          "__call__", &streamer::DeltaLayer::operator(), "x"_a, "before"_a, "state"_a,
          "taped"_a = false, "stream"_a = nb::none());
  nb::class_<streamer::AttentionLayer>(
      m, "AttentionLayer", "x + gated attention of rms_norm(x), to be put into segments.")
      .def(
          "__init__",
          [](streamer::AttentionLayer* self, const NormOf& norm, const Group& projections,
             const NormOf& q_norm, const NormOf& k_norm, const mx::array& frequencies,
             const Group& out, bool traditional, float rope_scale, float scale, int heads,
             int key_heads) {
            new (self) streamer::AttentionLayer(
                attention_of(norm, projections, q_norm, k_norm, frequencies, traditional,
                             rope_scale, heads, key_heads),
                alike(out), scale);
          },
          "norm"_a,
          "projections"_a,
          "q_norm"_a,
          "k_norm"_a,
          "frequencies"_a,
          "output"_a,
          nb::kw_only(),
          "traditional"_a,
          "rope_scale"_a,
          "scale"_a,
          "heads"_a,
          "key_heads"_a)
      .def_prop_ro("kept", &streamer::AttentionLayer::kept);
  using Part = std::variant<
      const streamer::DeltaLayer*, const streamer::AttentionLayer*, const streamer::Moe*>;
  using Call = streamer::SegmentOp::Call;
  nb::class_<streamer::SegmentOp>(m, "Segment", "Decoder layers in a row as one op: see segment.h.")
      .def(
          "__init__",
          [](streamer::SegmentOp* self, int width, const std::vector<Part>& parts,
             const std::optional<Group>& embedding, const std::optional<JoinOf>& join,
             const streamer::MoeBlock* chosen, const streamer::MoeBlock* router,
             const std::optional<std::tuple<NormOf, Group>>& head, bool hidden, bool last) {
            streamer::Segment s;
            s.D = width;
            for (const Part& part : parts) {
              s.blocks.push_back(std::visit(
                  [](auto* one) {
                    if (one == nullptr) throw nb::type_error("segment: a part is None");
                    return one->block();
                  },
                  part));
            }
            if (embedding) s.entry = entry_of(width, *embedding, join);
            if (chosen != nullptr) s.chosen = *chosen;
            if (router != nullptr) s.router = *router;
            if (head) s.head = {norm_of(std::get<0>(*head)), alike(std::get<1>(*head))};
            s.hidden = hidden;
            s.last = last;
            new (self) streamer::SegmentOp(std::move(s));
          },
          "width"_a,
          "parts"_a,
          nb::kw_only(),
          "embedding"_a = nb::none(),
          "join"_a = nb::none(),
          "chosen"_a.none() = nb::none(),
          "router"_a.none() = nb::none(),
          "head"_a = nb::none(),
          "hidden"_a = false,
          "last"_a = false)
      .def_prop_ro("kept", &streamer::SegmentOp::kept)
      .def(
          "__call__",
          [](const streamer::SegmentOp& self, std::vector<mx::array> inputs,
             std::vector<mx::array> states, int offset, std::vector<bool> fresh, bool taped,
             mx::StreamOrDevice stream) {
            return self(
                Call{std::move(inputs), std::move(states), offset, std::move(fresh), taped}, stream);
          },
          "inputs"_a, "states"_a, "offset"_a, "fresh"_a, "taped"_a = false, "stream"_a = nb::none())
      .def(
          "now",
          [](const streamer::SegmentOp& self, std::vector<mx::array> inputs,
             std::vector<mx::array> states, int offset, std::vector<bool> fresh, bool taped) {
            const Call call{std::move(inputs), std::move(states), offset, std::move(fresh), taped};
            nb::gil_scoped_release free;
            const streamer::Computing computing;
            return self.now(call, {});
          },
          "inputs"_a, "states"_a, "offset"_a, "fresh"_a, "taped"_a = false, "At once.")
      .def(
          "rewind", &streamer::SegmentOp::rewind, "states"_a, "tape"_a, "rows"_a, "kept"_a,
          "At once: states of the gated delta nets after the first `kept` of a taped call's rows.");
  m.def(
      "computed", [] { return streamer::Computing::seconds; },
      "Seconds so far that this thread spent in segments computed at once, without waits for reads.");
  m.def(
      "there",
      [](const std::vector<mx::array>& arrays) {
        for (const mx::array& a : arrays) {
          if (!a.is_available()) return false;
        }
        return true;
      },
      "arrays"_a, "Whether all are evaluated.");
  m.def(
      "choose",
      [](const mx::array& logits, float nearness, bool confident) {
        std::vector<streamer::Choice> found;
        {
          nb::gil_scoped_release free;
          found = streamer::choose(logits, nearness, confident);
        }
        std::vector<std::tuple<int, bool, bool, float>> out;
        for (const auto& c : found) out.push_back({c.token, c.near, c.unsure, c.confidence});
        return out;
      },
      "logits"_a, "nearness"_a, "confident"_a = false,
      "Of each row at once: the likeliest token, whether another is near, and may be as likely as log "
      "probabilities, and its probability if asked for.");
  m.def(
      "attention_inputs",
      [](const mx::array& x, const NormOf& norm, const Group& projections, const NormOf& q_norm,
         const NormOf& k_norm, const mx::array& frequencies, bool traditional, float scale,
         int offset, int heads, int key_heads, mx::StreamOrDevice stream) {
        return streamer::attention_inputs(
            x,
            attention_of(norm, projections, q_norm, k_norm, frequencies, traditional, scale, heads,
                         key_heads),
            offset, stream);
      },
      "x"_a,
      "norm"_a,
      "projections"_a,
      "q_norm"_a,
      "k_norm"_a,
      "frequencies"_a,
      nb::kw_only(),
      "traditional"_a,
      "scale"_a,
      "offset"_a,
      "heads"_a,
      "key_heads"_a,
      "stream"_a = nb::none(),
      "Queries, keys, values of rms_norm(x), normed and rotated, and the output's gates.");
  m.def(
      "attention_output",
      [](const mx::array& x, const mx::array& y, const mx::array& gates, const Group& out,
         mx::StreamOrDevice stream) {
        return streamer::attention_output(x, y, gates, alike(out), stream);
      },
      "x"_a,
      "y"_a,
      "gates"_a,
      "output"_a,
      nb::kw_only(),
      "stream"_a = nb::none(),
      "x + (y * sigmoid(gates)) @ output.T.");
}
