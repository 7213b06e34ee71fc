// y = x @ w^T for quantized (or dense) weights, as a lazy MLX primitive on the CPU.
#pragma once

#include <optional>
#include <string>

#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"
#include "rows.h"

namespace streamer {

namespace mx = mlx::core;

// A weight with its quantization.
struct Weight {
  mx::array w;
  std::optional<mx::array> scales, biases;
};

// x [..., K] float32; w [N, K * bits / 32] uint32 with scales [N, K / group] and, when affine, biases,
// or w [N, K] in float32, float16 or bfloat16 with neither. Gives [..., N] float32.
// Throws std::invalid_argument where shapes or types don't fit.
mx::array linear(
    const mx::array& x,
    const mx::array& w,
    const std::optional<mx::array>& scales,
    const std::optional<mx::array>& biases,
    int group,
    int bits,
    const std::string& mode,
    mx::StreamOrDevice stream);

// linear() with several weights that are quantized alike, in one go.
std::vector<mx::array> linears(
    const mx::array& x,
    const std::vector<Weight>& weights,
    int group,
    int bits,
    const std::string& mode,
    mx::StreamOrDevice stream);

class Linear : public mx::UnaryPrimitive {
 public:
  Linear(mx::Stream stream, const Matrix& matrix) : UnaryPrimitive(stream), matrix_(matrix) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  bool is_equivalent(const Primitive& other) const override;
  DEFINE_NAME(StreamerLinear)

 private:
  Matrix matrix_; // without its pointers
};

// What a weight and its scales are; K comes from `columns`, the last axis of x.
Matrix matrix_of(
    int columns,
    const mx::array& w,
    const std::optional<mx::array>& scales,
    const std::optional<mx::array>& biases,
    int group,
    int bits,
    const std::string& mode);

} // namespace streamer
