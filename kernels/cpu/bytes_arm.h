// What products of bytes on Arm share, whichever instruction makes them.
#pragma once

#include <arm_neon.h>

#include "rows.h"
#include "unpack.h"

namespace streamer {
namespace {

using F = float32x4_t;
constexpr int W = 4;

enum class Kind { nibbles, fp4, bytes };

inline bool known(const Matrix& A) {
  return A.format == Format::mxfp4 || (A.format == Format::affine && (A.bits == 4 || A.bits == 8));
}

// f<kind, n>() of a matrix: its blocks are n times so many columns.
template <int columns, class Do>
inline void by_kind(const Matrix& A, Do f) {
  constexpr int few = 32 / columns, many = 64 / columns;
  if (A.format == Format::mxfp4) return f.template operator()<Kind::fp4, few>();
  if (A.bits == 8 && A.group < 64) return f.template operator()<Kind::bytes, few>();
  if (A.bits == 8) return f.template operator()<Kind::bytes, many>();
  if (A.group < 64) return f.template operator()<Kind::nibbles, few>();
  f.template operator()<Kind::nibbles, many>();
}

// Four scales (or biases) as floats, zeros after the last.
inline F widen(const void* from, Scale type, int64_t index, int64_t count) {
  if (count < W) {
    float few[W] = {};
    for (int64_t i = 0; i < count; ++i) few[i] = wide(from, type, index + i);
    return vld1q_f32(few);
  }
  if (type == Scale::f32) return vld1q_f32(static_cast<const float*>(from) + index);
  const uint16x4_t half = vld1_u16(static_cast<const uint16_t*>(from) + index);
  return type == Scale::f16 ? vcvt_f32_f16(vreinterpret_f16_u16(half))
                            : vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

inline void swiglu(float* gate, const float* up, int64_t count) {
  rows_neon().swiglu(gate, up, count);
}

inline void silu(float* x, int64_t count) {
  rows_neon().silu(x, count);
}

constexpr int apart = 16; // independent sums of bytes; three products of bytes make one of a weight

template <class Multiply>
inline float peak_of(int rounds, int start, Multiply multiply) {
  int8x16_t w = vdupq_n_s8(static_cast<int8_t>(start));
  const int8x16_t x = vdupq_n_s8(3);
  int32x4_t sums[apart];
#pragma GCC unroll 16
  for (int i = 0; i < apart; ++i) sums[i] = vdupq_n_s32(start + i);
  for (int round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < apart; ++i) sums[i] = multiply(sums[i], w, x);
    asm volatile("" : "+w"(w)); // or rounds would be added up
  }
#pragma GCC unroll 16
  for (int i = 1; i < apart; ++i) sums[0] = vaddq_s32(sums[0], sums[i]);
  return static_cast<float>(vaddvq_s32(sums[0]));
}

} // namespace
} // namespace streamer
