// What a gated delta layer does between its projections, in three lazy ops. All float32.
#pragma once

#include <functional>

#include "step.h"

namespace streamer {

// Causal depthwise convolution of x [B, T, C] after `before` [B, taps - 1, C], silu, and the cut
// into q, k [B, T, Hk, Dk] and v [B, T, Hv, Dv]; q and k are brought to lengths 1 / Dk and
// 1 / sqrt(Dk) of the norm's root mean square. weight [C, taps, 1], C = 2 Hk Dk + Hv Dv.
// Gives q, k, v and the last taps - 1 rows of what was convolved.
std::vector<mx::array> delta_inputs(
    const mx::array& x,
    const mx::array& before,
    const mx::array& weight,
    int key_heads,
    int key_width,
    int value_heads,
    float eps,
    mx::StreamOrDevice stream);

// gated_delta with g = exp(-exp(a_log) * softplus(a + dt_bias)) and beta = sigmoid(b):
// a, b [B, T, Hv], a_log, dt_bias [Hv]. Gives y and the state.
std::vector<mx::array> delta_update(
    const mx::array& q,
    const mx::array& k,
    const mx::array& v,
    const mx::array& a,
    const mx::array& b,
    const mx::array& a_log,
    const mx::array& dt_bias,
    const mx::array& state,
    mx::StreamOrDevice stream);

// rms_norm(x) * weight * silu(gate): x, gate [..., n].
mx::array gated_norm(
    const mx::array& x,
    const mx::array& gate,
    const mx::array& weight,
    float eps,
    mx::StreamOrDevice stream);

// The same three on data. Rows of x and `before` are asked for by batch and place.
struct Convolved {
  int B, T, taps, key_heads, key_width, values; // values: all of a row
  float eps;
};

void convolve(
    const Convolved& sizes,
    const std::function<const float*(int, int)>& x,
    const std::function<const float*(int, int)>& before,
    const float* weight,
    float* q,
    float* k,
    float* v,
    float* after);

void update(
    const Heads& heads,
    const float* q,
    const float* k,
    const float* v,
    const float* a,
    const float* b,
    const float* a_log,
    const float* dt_bias,
    const float* state,
    float* y,
    float* after);

// `count` rows of n.
void gate_rows(
    int64_t count,
    int n,
    const std::function<const float*(int64_t)>& x,
    const std::function<const float*(int64_t)>& gate,
    const float* weight,
    float eps,
    float* y);

} // namespace streamer
