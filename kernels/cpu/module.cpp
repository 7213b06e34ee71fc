// kernels.native: what Python sees.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "attention.h"
#include "codes.h"
#include "delta.h"
#include "experts.h"
#include "floors.h"
#include "glue.h"
#include "isa.h"
#include "layers.h"
#include "linear.h"
#include "moe.h"
#include "pool.h"
#include "step.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

// Weight, scales, biases: what Python passes for a stack of experts.
using Arrays = std::tuple<
    mlx::core::array,
    std::optional<mlx::core::array>,
    std::optional<mlx::core::array>>;

// Weights quantized alike, with group size, bits and mode.
using Group = std::tuple<std::vector<Arrays>, int, int, std::string>;

streamer::Weight stack(const Arrays& arrays) {
  return {std::get<0>(arrays), std::get<1>(arrays), std::get<2>(arrays)};
}

// A norm's weight and epsilon.
using NormOf = std::tuple<mlx::core::array, float>;

streamer::Norm norm_of(const NormOf& norm) {
  return {std::get<0>(norm), std::get<1>(norm)};
}

streamer::Alike alike(const Group& group) {
  const auto& [weights, size, bits, mode] = group;
  streamer::Alike out{{}, size, bits, mode};
  for (const Arrays& weight : weights) out.weights.push_back(stack(weight));
  return out;
}

} // namespace

void bind_reads(nb::module_& m);  // reads_python.cpp

NB_MODULE(native, m) {
  bind_reads(m);
  m.def("isas", &streamer::isas, "Instruction sets that run here, fastest first.");
  m.def("isa", &streamer::isa, "The instruction set in use.");
  m.def("set_isa", &streamer::set_isa, "name"_a, "Use one of isas(); False if it isn't one.");
  m.def("threads", &streamer::threads, "Threads that share a product.");
  m.def("set_threads", &streamer::set_threads, "count"_a);
  m.def("read_seconds", &streamer::read_seconds, "x"_a, "To read an evaluated float32 array once.");
  m.def(
      "multiply_rate",
      &streamer::multiply_rate,
      "rounds"_a,
      "Fused multiply-adds a second of all threads: `rounds` times 128 in each.");
  m.def(
      "product_rate",
      &streamer::product_rate,
      "rounds"_a,
      "Multiply-adds of 4-bit weights a second by the products' own instructions, in registers.");
  m.def(
      "linear",
      &streamer::linear,
      "x"_a,
      "w"_a,
      "scales"_a = nb::none(),
      "biases"_a = nb::none(),
      nb::kw_only(),
      "group_size"_a = 64,
      "bits"_a = 4,
      "mode"_a = "affine",
      "stream"_a = nb::none(),
      "x [..., K] float32 @ w.T, lazily: [..., N] float32.");
  m.def(
      "gather_linear",
      [](const mlx::core::array& x, const mlx::core::array& slots, const Arrays& weight, int group,
         int bits, const std::string& mode, mlx::core::StreamOrDevice stream) {
        return streamer::gather_linear(x, slots, stack(weight), group, bits, mode, stream);
      },
      "x"_a,
      "slots"_a,
      "weight"_a,
      nb::kw_only(),
      "group_size"_a = 64,
      "bits"_a = 4,
      "mode"_a = "affine",
      "stream"_a = nb::none(),
      "x [..., K] float32, slots [..., k], weight (w [S, N, ...], scales, biases): [..., k, N].");
  m.def(
      "gather_swiglu",
      [](const mlx::core::array& x, const std::optional<mlx::core::array>& slots,
         const Arrays& gate, const Arrays& up, const Arrays& down, int group, int bits, const std::string& mode,
         mlx::core::StreamOrDevice stream) {
        return streamer::gather_swiglu(
            x, slots, stack(gate), stack(up), stack(down), group, bits, mode, stream);
      },
      "x"_a,
      "slots"_a.none(),
      "gate"_a,
      "up"_a,
      "down"_a,
      nb::kw_only(),
      "group_size"_a = 64,
      "bits"_a = 4,
      "mode"_a = "affine",
      "stream"_a = nb::none(),
      "down(silu(gate(x)) * up(x)) for each pair of row and slot; without slots of one expert.");
  m.def(
      "linears",
      [](const mlx::core::array& x, const std::vector<Arrays>& weights, int group, int bits,
         const std::string& mode, mlx::core::StreamOrDevice stream) {
        std::vector<streamer::Weight> all;
        for (const Arrays& weight : weights) all.push_back(stack(weight));
        return streamer::linears(x, all, group, bits, mode, stream);
      },
      "x"_a,
      "weights"_a,
      nb::kw_only(),
      "group_size"_a = 64,
      "bits"_a = 4,
      "mode"_a = "affine",
      "stream"_a = nb::none(),
      "linear() with several weights (w, scales, biases) that are quantized alike.");
  m.def(
      "delta_inputs",
      &streamer::delta_inputs,
      "x"_a,
      "before"_a,
      "weight"_a,
      nb::kw_only(),
      "key_heads"_a,
      "key_width"_a,
      "value_heads"_a,
      "eps"_a,
      "stream"_a = nb::none(),
      "Convolution and silu of x [B, T, C]: q, k normalised, v, and the convolution's new state.");
  m.def(
      "delta_update",
      &streamer::delta_update,
      "q"_a,
      "k"_a,
      "v"_a,
      "a"_a,
      "b"_a,
      "a_log"_a,
      "dt_bias"_a,
      "state"_a,
      nb::kw_only(),
      "stream"_a = nb::none(),
      "gated_delta with its gates computed from a and b: y and the state.");
  m.def(
      "gated_norm",
      &streamer::gated_norm,
      "x"_a,
      "gate"_a,
      "weight"_a,
      nb::kw_only(),
      "eps"_a,
      "stream"_a = nb::none(),
      "rms_norm(x, weight) * silu(gate).");
  m.def(
      "route",
      &streamer::route,
      "logits"_a,
      nb::kw_only(),
      "k"_a,
      "normalize"_a,
      "stream"_a = nb::none(),
      "softmax of logits [..., E]: the k likeliest, largest first, int32, and their weights.");
  m.def(
      "combine",
      &streamer::combine,
      "y"_a,
      "scores"_a,
      "shared"_a = nb::none(),
      "gate"_a = nb::none(),
      nb::kw_only(),
      "stream"_a = nb::none(),
      "sum_k y[..., k, D] * scores[..., k], plus sigmoid(gate [..., 1]) * shared [..., D].");
  nb::class_<streamer::Moe>(
      m, "Moe",
      "A block of experts: route, gather_swiglu, a shared expert and combine in one; with a norm "
      "(weight, eps) x + moe(rms_norm(x)).")
      .def(
          "__init__",
          [](streamer::Moe* self, int width, const Group& routers, const Group& experts,
             const Group& shared, int k, bool normalize, const std::optional<NormOf>& norm) {
            std::optional<streamer::Norm> before;
            if (norm) before = norm_of(*norm);
            new (self) streamer::Moe(
                width, alike(routers), alike(experts), alike(shared), k, normalize, before);
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
  nb::class_<streamer::DeltaLayer>(
      m, "DeltaLayer", "x + gated delta net of rms_norm(x), with a tape's arrays if asked for.")
      .def(
          "__init__",
          [](streamer::DeltaLayer* self, const NormOf& norm, const Group& in, const Group& out,
             const mlx::core::array& taps, const mlx::core::array& a_log,
             const mlx::core::array& dt_bias, const NormOf& gain, int key_heads, int key_width,
             int value_heads) {
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
  m.def(
      "attention_inputs",
      [](const mlx::core::array& x, const NormOf& norm, const Group& projections,
         const NormOf& q_norm, const NormOf& k_norm, const mlx::core::array& frequencies,
         bool traditional, float scale, int offset, int heads, int key_heads,
         mlx::core::StreamOrDevice stream) {
        return streamer::attention_inputs(
            x, norm_of(norm), alike(projections), norm_of(q_norm), norm_of(k_norm), frequencies,
            traditional, scale, offset, heads, key_heads, stream);
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
      [](const mlx::core::array& x, const mlx::core::array& y, const mlx::core::array& gates,
         const Group& out, mlx::core::StreamOrDevice stream) {
        return streamer::attention_output(x, y, gates, alike(out), stream);
      },
      "x"_a,
      "y"_a,
      "gates"_a,
      "output"_a,
      nb::kw_only(),
      "stream"_a = nb::none(),
      "x + (y * sigmoid(gates)) @ output.T.");
  m.def(
      "swiglu",
      &streamer::swiglu,
      "gate"_a,
      "x"_a,
      nb::kw_only(),
      "stream"_a = nb::none(),
      "silu(gate) * x.");
  m.def(
      "dequantize",
      &streamer::dequantize,
      "w"_a,
      "scales"_a,
      "biases"_a,
      nb::kw_only(),
      "group_size"_a = 64,
      "bits"_a = 4,
      "stream"_a = nb::none(),
      "Affine weights [..., K * bits / 32] as float32 [..., K].");
  m.def(
      "rope",
      &streamer::rope,
      "x"_a,
      "frequencies"_a,
      nb::kw_only(),
      "traditional"_a,
      "scale"_a,
      "offset"_a,
      "stream"_a = nb::none(),
      "Rotary positions offset, offset + 1... of x [..., L, D].");
  m.def(
      "rms_norm",
      &streamer::rms_norm,
      "x"_a,
      "weight"_a = nb::none(),
      nb::kw_only(),
      "eps"_a,
      "scale"_a = 1.0f,
      "stream"_a = nb::none(),
      "x * scale / sqrt(mean(x^2) + eps) * weight over the last axis.");
  m.def(
      "gated_delta",
      &streamer::gated_delta,
      "q"_a,
      "k"_a,
      "v"_a,
      "g"_a,
      "beta"_a,
      "state"_a,
      nb::kw_only(),
      "stream"_a = nb::none(),
      "T steps of a gated delta rule: y, the state after them, and the tape that repeats them.");
  m.def(
      "depthwise_conv",
      &streamer::depthwise_conv,
      "x"_a,
      "weight"_a,
      nb::kw_only(),
      "stream"_a = nb::none(),
      "x [B, T + taps - 1, C], weight [C, taps, 1]: [B, T, C].");
  m.def(
      "attention",
      &streamer::attention,
      "q"_a,
      "k"_a,
      "v"_a,
      nb::kw_only(),
      "scale"_a,
      "causal"_a = false,
      "bias"_a = nb::none(),
      "sinks"_a = nb::none(),
      "stream"_a = nb::none(),
      "Softmax attention of q [B, H, T, D] over k, v [B, Hk, S, D].");
  m.def(
      "attend_codes",
      [](const mlx::core::array& q, const mlx::core::array& rotated,
         const std::vector<mlx::core::array>& keys, const std::vector<mlx::core::array>& values,
         int rows, int coded, int crossing, bool causal,
         const std::optional<mlx::core::array>& bias,
         const std::optional<mlx::core::array>& sinks, mlx::core::StreamOrDevice stream) {
        auto side = [](const std::vector<mlx::core::array>& a) {
          if (a.size() != 8) throw std::invalid_argument("attend_codes: a side has eight arrays");
          return streamer::CodedSide{a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]};
        };
        return streamer::attend_codes(
            q, rotated, side(keys), side(values), rows, coded, crossing, causal, bias, sinks, stream);
      },
      "q"_a,
      "rotated"_a,
      "keys"_a,
      "values"_a,
      nb::kw_only(),
      "rows"_a,
      "coded"_a,
      "crossing"_a = 0,
      "causal"_a = false,
      "bias"_a = nb::none(),
      "sinks"_a = nb::none(),
      "stream"_a = nb::none(),
      "Attention over codes: the values' sum in the rotated space, and the part that isn't rotated.");
}
