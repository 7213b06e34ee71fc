// What rows_vnni.cpp and rows_amx.cpp share: scales as vectors of sixteen floats, the ends of rows
// masked.
#pragma once

#include <immintrin.h>

#include "rows.h"

namespace streamer {
namespace {

constexpr int W = 16;

inline __mmask16 first(int64_t count) {
  return count >= W ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
}

// `some` of the scales (or biases) from `index` on, zeros elsewhere.
inline __m512 wide(__mmask16 some, const void* base, Scale type, int64_t index) {
  if (type == Scale::f32) {
    return _mm512_maskz_loadu_ps(some, static_cast<const float*>(base) + index);
  }
  const __m256i half =
      _mm256_maskz_loadu_epi16(some, static_cast<const uint16_t*>(base) + index);
  if (type == Scale::f16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

} // namespace
} // namespace streamer
