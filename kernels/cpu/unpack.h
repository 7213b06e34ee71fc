// Weights and scales one at a time, in plain C++: the ends of rows.
#pragma once

#include <cstdint>
#include <cstring>

#include "rows.h"

namespace streamer {
namespace {

// What the sixteen nibbles stand for: from centred[8 - middle] on q - middle, which is 2 at least,
// twice the values of fp4 (e2m1), and these from the lowest on.
constexpr int8_t centred[22] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2,
                                3,  4,  5,  6,  7,  8,  9, 10, 11, 12, 13};
constexpr int8_t fp4_halves[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
constexpr int8_t fp4_above[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float from_half(uint16_t half) {
  uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  uint32_t rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Subnormal halves are normal floats: scaling by 2^112 moves the exponent and normalises.
  float value = from_bits(rest << 13) * from_bits(0x77800000u);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return from_bits(bits | sign);
}

inline float wide(const void* base, Scale type, int64_t index) {
  if (type == Scale::f32) return static_cast<const float*>(base)[index];
  uint16_t half = static_cast<const uint16_t*>(base)[index];
  return type == Scale::bf16 ? from_bits(static_cast<uint32_t>(half) << 16) : from_half(half);
}

// 2^(e - 128), half of an e8m0 scale: the nibbles of fp4 are doubled. Only its upper half-word is
// not zero: the larger of a normal float's and a subnormal one's (e < 2), which vectors do, too.
inline float half_power(uint8_t e) {
  const auto normal = static_cast<int16_t>((e - 1) << 7);
  const auto subnormal = static_cast<int16_t>((e + 1) << 5);
  return from_bits(static_cast<uint32_t>(normal > subnormal ? normal : subnormal) << 16);
}

} // namespace
} // namespace streamer
