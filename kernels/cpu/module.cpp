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
#include "linear.h"
#include "logits.h"
#include "pages.h"
#include "pool.h"
#include "python.h"
#include "step.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Arrays = streamer::WeightOf;

streamer::Weight stack(const Arrays& arrays) {
  return streamer::weight_of(arrays);
}

} // namespace

void bind_choices(nb::module_& m);  // choices_python.cpp
void bind_reads(nb::module_& m);  // reads_python.cpp
void bind_layers(nb::module_& m);  // layers_python.cpp
void bind_chain(nb::module_& m);  // chain_python.cpp
void bind_expert_cache(nb::module_& m);  // expert_cache_python.cpp

NB_MODULE(native, m) {
  bind_choices(m);
  bind_reads(m);
  bind_layers(m);
  bind_expert_cache(m);
  bind_chain(m);
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
      "zeros_on_huge_pages", &streamer::zeros_on_huge_pages, "rows"_a, "bytes"_a,
      "[rows, bytes] uint8, evaluated.");
  m.def(
      "onto_huge_pages", &streamer::onto_huge_pages, "array"_a,
      "Move what lies in an evaluated array's memory; whether the system did.");
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
      "logsumexp",
      &streamer::logsumexp,
      "x"_a,
      "keepdims"_a = false,
      nb::kw_only(),
      "stream"_a = nb::none(),
      "log(sum(exp(x))) over the last axis.");
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
         const std::optional<mlx::core::array>& sinks,
         const std::optional<mlx::core::array>& key_signs,
         const std::optional<mlx::core::array>& value_signs, mlx::core::StreamOrDevice stream) {
        auto side = [](const std::vector<mlx::core::array>& a) {
          if (a.size() != 8) throw std::invalid_argument("attend_codes: a side has eight arrays");
          return streamer::CodedSide{a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]};
        };
        return streamer::attend_codes(
            q, rotated, side(keys), side(values), rows, coded, crossing, causal, bias, sinks, key_signs,
            value_signs, stream);
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
      "key_signs"_a = nb::none(),
      "value_signs"_a = nb::none(),
      "stream"_a = nb::none(),
      "Attention over codes: the values' sum in the rotated space, and the part that isn't rotated.");
}
