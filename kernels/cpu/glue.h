// Small ops around attention and experts, each one node of the graph. All float32.
#pragma once

#include "step.h"

namespace streamer {

// softmax of logits [..., E], its k largest: expert ids int32 [..., k], largest first, the lower id
// where they are alike, and their probabilities [..., k], scaled to sum to 1 if `normalize`.
std::vector<mx::array> route(
    const mx::array& logits, int k, bool normalize, mx::StreamOrDevice stream);

// sum_k y[..., k, D] * scores[..., k], plus sigmoid(gate [..., 1]) * shared [..., D] if given.
mx::array combine(
    const mx::array& y,
    const mx::array& scores,
    const std::optional<mx::array>& shared,
    const std::optional<mx::array>& gate,
    mx::StreamOrDevice stream);

// The same two on row-major data: logits [rows, E]; y [rows, k, D], shared [rows, D] or null.
void route_rows(
    const float* logits, int64_t rows, int E, int k, bool normalize, int32_t* ids, float* scores);
void combine_rows(
    const float* y,
    const float* scores,
    const float* shared,
    const float* gate,
    int rows,
    int64_t k,
    int64_t D,
    float* out);

// silu(gate) * x, of one shape.
mx::array swiglu(const mx::array& gate, const mx::array& x, mx::StreamOrDevice stream);

// Affine weights [..., K * bits / 32] uint32 with scales and biases [..., K / group]: [..., K].
mx::array dequantize(
    const mx::array& w,
    const mx::array& scales,
    const mx::array& biases,
    int group,
    int bits,
    mx::StreamOrDevice stream);

// One row of it, K columns.
void dequantize_row(
    const uint32_t* w, const float* scales, const float* biases, int group, int bits, int64_t K, float* y);

// Rotates the first 2 n of the last axis of x [..., L, D] by (offset + row) * scale * frequencies
// [n]; pairs are neighbours if `traditional`, else n apart.
mx::array rope(
    const mx::array& x,
    const mx::array& frequencies,
    bool traditional,
    float scale,
    int offset,
    mx::StreamOrDevice stream);

// The turns of rope() for `rows` positions from `offset` on, on data: from and to may be one.
class Rotation {
 public:
  Rotation(const float* frequencies, int n, int rows, bool traditional, float scale, int offset);
  void operator()(int64_t row, const float* from, int D, float* to) const;

 private:
  int n_, step_, apart_;
  std::vector<float> cosines_, sines_;
};

} // namespace streamer
