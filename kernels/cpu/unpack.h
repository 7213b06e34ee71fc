// Weights and scales one at a time, in plain C++: the odd widths, and the ends of rows.
#pragma once

#include <cstdint>
#include <cstring>

#include "rows.h"

namespace streamer {
namespace {

// What the sixteen nibbles stand for: q - 8, and twice the values of fp4 (e2m1).
constexpr int8_t centred[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
constexpr int8_t fp4_halves[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

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

// 2^(e - 128), half of an e8m0 scale: the nibbles of fp4 are doubled.
inline float half_power(uint8_t e) {
  return from_bits(e >= 2 ? static_cast<uint32_t>(e - 1) << 23 : 0x00200000u << e);
}

// K weights of 2, 3, 5 or 6 bits, lowest bits first, as bytes.
inline void unpack(const uint8_t* from, int bits, int64_t K, uint8_t* to) {
  const uint64_t each = 0x0101010101010101u * ((1u << bits) - 1);
  (void)each;
  for (int64_t k = 0; k < K; k += 8, from += bits, to += 8) {
    uint64_t eight = 0;
    for (int i = 0; i < bits; ++i) eight |= static_cast<uint64_t>(from[i]) << 8 * i;
#ifdef __BMI2__
    uint64_t bytes = __builtin_ia32_pdep_di(eight, each);
    std::memcpy(to, &bytes, 8);
#else
    for (int i = 0; i < 8; ++i) to[i] = static_cast<uint8_t>(eight >> bits * i & ((1u << bits) - 1));
#endif
  }
}

} // namespace
} // namespace streamer
