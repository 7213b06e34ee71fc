// Attention over a compressed history: cache/README.md has its layout and formulas.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "mlx/array.h"
#include "mlx/utils.h"

namespace streamer {

constexpr int tile = 32; // tokens unpacked at a time, a multiple of 4

// Where tokens' codes lie: `channels` channels an index of `width` bits into points [2^width, channels].
struct Codebook {
  const float* points;
  int width, channels;
};

// What an instruction set supplies. n and `wide` are a vector's channels, before and after rounding
// up to 16 with zeros. A row's numbers don't depend on how many rows come with it.
struct CodeSteps {
  // u[j] = points of the indices in words + j * stride, for j < count: [count, wide].
  void (*unpack)(
      const uint32_t* words, int64_t stride, int count, const Codebook& book, int n, int wide, float* u);
  // s[r * step + j] = dot(q[r], u[j]), for r < rows and j < count, a multiple of 4.
  void (*scores)(const float* q, int rows, const float* u, int count, int wide, float* s, int64_t step);
  // s[j] = s[j] * scales[j] + lift.
  void (*place)(float* s, int n, const float* scales, float lift);
  // s[j] = exp(s[j] - top) * scales[j], top being the largest of all n; gives top and the sum of exp.
  void (*soften)(float* s, int n, const float* scales, float& top, float& sum);
  // y[r] += sum over j < count of p[r * step + j] * u[j], [rows, wide].
  void (*weigh)(const float* p, int64_t step, int rows, const float* u, int count, int wide, float* y);
  float (*exponential)(float x); // x <= 0
  float (*dot)(const float* a, const float* b, int n);
};

const CodeSteps& codes_portable();
const CodeSteps& codes_avx2();
const CodeSteps& codes_avx512();
const CodeSteps& codes_neon();

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
// that is not rotated, both [B, H, R, Dv].
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
    mx::StreamOrDevice stream);

} // namespace streamer
