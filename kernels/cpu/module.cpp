// kernels.native: what Python sees.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "experts.h"
#include "isa.h"
#include "linear.h"
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

streamer::Stack stack(const Arrays& arrays) {
  return {std::get<0>(arrays), std::get<1>(arrays), std::get<2>(arrays)};
}

} // namespace

NB_MODULE(native, m) {
  m.def("isas", &streamer::isas, "Instruction sets that run here, fastest first.");
  m.def("isa", &streamer::isa, "The instruction set in use.");
  m.def("set_isa", &streamer::set_isa, "name"_a, "Use one of isas(); False if it isn't one.");
  m.def("threads", &streamer::threads, "Threads that share a product.");
  m.def("set_threads", &streamer::set_threads, "count"_a);
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
      "x [R, K] float32, slots [P] int32, weight (w [S, N, ...], scales, biases): [P, N] float32.");
  m.def(
      "gather_swiglu",
      [](const mlx::core::array& x, const mlx::core::array& slots, const Arrays& gate,
         const Arrays& up, const Arrays& down, int group, int bits, const std::string& mode,
         mlx::core::StreamOrDevice stream) {
        return streamer::gather_swiglu(
            x, slots, stack(gate), stack(up), stack(down), group, bits, mode, stream);
      },
      "x"_a,
      "slots"_a,
      "gate"_a,
      "up"_a,
      "down"_a,
      nb::kw_only(),
      "group_size"_a = 64,
      "bits"_a = 4,
      "mode"_a = "affine",
      "stream"_a = nb::none(),
      "down(silu(gate(x)) * up(x)) for each pair: [P, D] float32.");
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
}
