// Softmax attention in full precision as a lazy MLX primitive on the CPU.
#pragma once

#include <optional>

#include "mlx/array.h"
#include "mlx/utils.h"

namespace streamer {

namespace mx = mlx::core;

// q [B, H, T, D], k [B, Hk, S, D], v [B, Hk, S, Dv] -> [B, H, T, Dv], float32. causal: the last row
// sees all S, each row before it one less. bias [T, S] or [B, H, T, S]: added to the scores. sinks
// [H]: logits that take weight and give no value. Keys and values are read once for all the rows of
// a few that share them. Throws std::invalid_argument where shapes or types don't fit.
mx::array attention(
    const mx::array& q,
    const mx::array& k,
    const mx::array& v,
    float scale,
    bool causal,
    const std::optional<mx::array>& bias,
    const std::optional<mx::array>& sinks,
    mx::StreamOrDevice stream);

// The same on data. Rows of a key head: r = group * T + t, R of them, each D floats; bias, sinks may
// be null; strides of keys and values are those of batch, head and token.
struct Attend {
  int B, Hk, R, T, D, Dv, S;
  float scale;
  bool causal;
  const float *q, *k, *v, *bias, *sinks;
  float* out;
  int64_t k_strides[3], v_strides[3];
  bool bias_of_heads = false; // a row of S for each of B, Hk and R, not for each of T
};

void attend(const Attend& call);

} // namespace streamer
