// Attention over a compressed history: cache/README.md has its layout and formulas.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "mlx/array.h"
#include "mlx/utils.h"

namespace streamer {

namespace mx = mlx::core;

// Keys or values of a layer. first and recent [B, H, n, D] float32, as they came; words
// [B, H, capacity, W] uint32 and scales [B, H, capacity, 1] float16 of the coded tokens; those of
// the block ahead [B, H, m, ...]; points [2^width, channels]; mean [B, H, 1, D].
struct CodedSide {
  mx::array first, recent, words, scales, ahead_words, ahead_scales, points, mean;
};

// q [B, H, R, D] float32, times the scale, and the same rotated; R = groups * T rows, t = row % T.
// The first `coded` tokens of words count. From row `crossing` of T on the m tokens ahead are read
// as codes, and not among the recent. causal: the last row sees all columns, each before it one
// less. bias [T, S]; sinks [groups * H]. Gives the values' sum in the rotated space and the part
// that is not rotated, both [B, H, R, Dv]. Where rotations are randomised Hadamard ones, their signs
// [D] say so: with key_signs q is rotated here and `rotated` unread, with value_signs the sum is
// rotated back.
std::vector<mx::array> attend_codes(
    const mx::array& q,
    const mx::array& rotated,
    const CodedSide& keys,
    const CodedSide& values,
    int rows,
    int coded,
    int crossing,
    bool causal,
    const std::optional<mx::array>& bias,
    const std::optional<mx::array>& sinks,
    const std::optional<mx::array>& key_signs,
    const std::optional<mx::array>& value_signs,
    mx::StreamOrDevice stream);

} // namespace streamer
