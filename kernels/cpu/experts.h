// Products of rows with the experts they chose, as lazy MLX primitives on the CPU.
#pragma once

#include <optional>
#include <string>

#include "linear.h"

namespace streamer {

// Stacked weights [S, N, K...] with their quantization, as in linear().
struct Stack {
  mx::array w;
  std::optional<mx::array> scales, biases;
};

// y[p] = x[p / (P / R)] @ w[slots[p]]^T: x [R, K] float32 and slots [P] int32, P a multiple of R,
// give [P, N] float32. A slot outside [0, S) gives zeros.
mx::array gather_linear(
    const mx::array& x,
    const mx::array& slots,
    const Stack& weight,
    int group,
    int bits,
    const std::string& mode,
    mx::StreamOrDevice stream);

// down(silu(gate(x)) * up(x)) of each pair, in one go: x [R, D], slots [P], gives [P, D].
mx::array gather_swiglu(
    const mx::array& x,
    const mx::array& slots,
    const Stack& gate,
    const Stack& up,
    const Stack& down,
    int group,
    int bits,
    const std::string& mode,
    mx::StreamOrDevice stream);

} // namespace streamer
