// Products of rows with the experts they chose, as lazy MLX primitives on the CPU.
#pragma once

#include <optional>
#include <string>

#include "linear.h"

namespace streamer {

// Stacked weights [S, N, K...] with their quantization, as in linear().
using Stack = Weight;

// y[p] = x[p / (P / R)] @ w[slots[p]]^T: R rows x [..., K] float32 and P integers slots, P a
// multiple of R, give [*slots.shape, N] float32. A slot outside [0, S) gives zeros.
mx::array gather_linear(
    const mx::array& x,
    const mx::array& slots,
    const Stack& weight,
    int group,
    int bits,
    const std::string& mode,
    mx::StreamOrDevice stream);

// down(silu(gate(x)) * up(x)) of each pair, in one go. Without slots the weights have two axes, or
// one slot, and every row has them: gives [..., D].
mx::array gather_swiglu(
    const mx::array& x,
    const std::optional<mx::array>& slots,
    const Stack& gate,
    const Stack& up,
    const Stack& down,
    int group,
    int bits,
    const std::string& mode,
    mx::StreamOrDevice stream);

} // namespace streamer
