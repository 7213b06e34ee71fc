// The steps of code_steps.h in plain C++: included once by each instruction set's source.
#pragma once

#include <cstdint>
#include <cstring>

#include "code_steps.h"

namespace streamer {
namespace {

// The eight indices in `width` bytes, in registers: pieces stored and loaded as one would wait.
template <int width>
uint64_t eight_of(const uint8_t* from) {
  uint32_t low, high;
  std::memcpy(&low, from, 4);
  if constexpr (width == 4) return low;
  std::memcpy(&high, from + width - 4, 4);
  return low | uint64_t(high) >> (64 - 8 * width) << 32;
}

template <int width, int channels>
void unpack_row(const uint8_t* from, int indices, const float* points, float* u) {
  constexpr uint64_t mask = (1u << width) - 1;
  auto eight = [&](uint64_t word, int count, float* to) {
    for (int i = 0; i < count; ++i) {
      const uint64_t index = (word >> (i * width)) & mask;
      std::memcpy(to + i * channels, points + index * channels, channels * sizeof(float));
    }
  };
  int i = 0;
  for (; i + 8 <= indices; i += 8, from += width) {
    eight(eight_of<width>(from), 8, u + i * channels);
  }
  if (i < indices) {
    uint64_t word = 0;
    std::memcpy(&word, from, ((indices - i) * width + 7) / 8);
    eight(word, indices - i, u + i * channels);
  }
}

void unpack(const uint32_t* const* words, int count, const Codebook& book, int n, float* u) {
  auto row = unpack_row<8, 1>;
  switch (book.channels == 1 ? 0 : book.width) {
    case 4: row = unpack_row<4, 2>; break;
    case 5: row = unpack_row<5, 2>; break;
    case 6: row = unpack_row<6, 2>; break;
    case 7: row = unpack_row<7, 2>; break;
    case 8: row = unpack_row<8, 2>; break;
  }
  for (int j = 0; j < count; ++j, u += n) {
    row(reinterpret_cast<const uint8_t*>(words[j]), n / book.channels, book.points, u);
  }
}

inline float of_half(uint16_t half) {
  // Moved to float32's place the exponent is 112 too small, for subnormals too.
  const uint32_t bits = uint32_t(half & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  value *= 5.192296858534828e33f; // 2^112
  return half & 0x8000 ? -value : value;
}

void widen(const uint16_t* from, int64_t stride, int count, float* to) {
  if (stride == 1) {
    for (int j = 0; j < count; ++j) to[j] = of_half(from[j]);
  } else {
    for (int j = 0; j < count; ++j) to[j] = of_half(from[j * stride]);
  }
}

void times(float* s, int count, const float* by) {
  for (int j = 0; j < count; ++j) s[j] *= by[j];
}

void place(float* s, int count, const float* by, float lift) {
  for (int j = 0; j < count; ++j) s[j] = s[j] * by[j] + lift;
}

constexpr CodeSteps code_table = {unpack, widen, times, place};

} // namespace
} // namespace streamer
