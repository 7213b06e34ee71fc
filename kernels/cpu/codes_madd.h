// What the products of codes with vpmaddwd share (code_steps.h): included by each of its sources.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "codes_bytes.h"

namespace streamer {
namespace {

constexpr int W = 8;
constexpr int block_indices = 32;

// 32 indices of a row to 32 bytes.
template <int width>
class Indices {
 public:
  // later: bytes from a row to the one that is fetched when it is read.
  Indices(int n, int64_t later) : bytes_((n / 2 * width + 7) / 8), later_(later) {
    // A half's sixteen indices lie in `2 * width` bytes: the lower half's first, the upper half's
    // last, in sixteen that are read. Each index comes from two bytes, by a product to the upper one.
    for (int part = 0; part < 2; ++part) {
      uint8_t spread[32];
      uint16_t shifts[16];
      for (int i = 0; i < 16; ++i) {
        const int bit = (part * 8 + i % 8) * width + (i < 8 ? 0 : 8 * (16 - 2 * width));
        spread[2 * i] = static_cast<uint8_t>(bit / 8);
        spread[2 * i + 1] = static_cast<uint8_t>(bit / 8 < 15 ? bit / 8 + 1 : 0x80);
        shifts[i] = static_cast<uint16_t>(1 << (8 - bit % 8));
      }
      spread_[part] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(spread));
      shifts_[part] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(shifts));
    }
  }
  inline __attribute__((always_inline)) __m256i of(const uint32_t* row, int block) const {
    const int at = block * 4 * width, left = bytes_ - at;
    const uint8_t* from = reinterpret_cast<const uint8_t*>(row) + at;
    _mm_prefetch(reinterpret_cast<const char*>(from) + later_, _MM_HINT_T0);
    uint8_t rest[4 * width];
    if (left < 4 * width) [[unlikely]] {
      std::memset(rest, 0, sizeof rest);
      std::memcpy(rest, from, left);
      from = rest;
    }
    if constexpr (width == 8) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i bits = _mm256_loadu2_m128i(
        reinterpret_cast<const __m128i*>(from + 4 * width - 16), reinterpret_cast<const __m128i*>(from));
    auto part = [&](int i) {
      return _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(bits, spread_[i]), shifts_[i]), 8);
    };
    return _mm256_and_si256(_mm256_packus_epi16(part(0), part(1)), _mm256_set1_epi8((1 << width) - 1));
  }

 private:
  int bytes_;
  int64_t later_;
  __m256i spread_[2], shifts_[2];
};

// v[k] = the k-th 32 bits of each of eight vectors.
inline __attribute__((always_inline)) void turn(__m256i (&v)[8]) {
  __m256i a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    v[k] = _mm256_permute2x128_si256(b[k], b[4 + k], 0x20);
    v[4 + k] = _mm256_permute2x128_si256(b[k], b[4 + k], 0x31);
  }
}

inline void put(uint8_t* to, __m256i v) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(to), v);
}

// The largest of n magnitudes, or a NaN where one is among them.
inline float top_of(const float* x, int n) {
  __m256 tops = _mm256_setzero_ps(), strange = tops;
  const __m256 sign = _mm256_set1_ps(-0.0f);
  int i = 0;
  for (; i + W <= n; i += W) {
    const __m256 y = _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i));
    strange = _mm256_or_ps(strange, _mm256_cmp_ps(y, y, _CMP_UNORD_Q));
    tops = _mm256_max_ps(y, tops);
  }
  if (_mm256_movemask_ps(strange) != 0) return __builtin_nanf("");
  float each[W], top = 0.0f;
  _mm256_storeu_ps(each, tops);
  for (float y : each) top = y > top ? y : top;
  for (; i < n; ++i) {
    const float y = __builtin_fabsf(x[i]);
    top = y <= top || top != top ? top : y;
  }
  return top;
}

inline __m256i integers(const float* x, float up) {
  return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(up)));
}

// Sixteen of them, in order, in 16 bits.
inline __m256i narrow(__m256i a, __m256i b) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
}

// p[j] * scales[j] of 128 tokens as integers of 16 bits. lift: for points that are 128 too large.
inline void pack_weights(const float* p, const float* scales, int8_t* digits, float& unit, int32_t& lift) {
  float w[padded], up;
  for (int i = 0; i < padded; ++i) w[i] = p[i] * scales[i];
  unit_of(top_of(w, padded), two_digits, up, unit);
  __m256i sum = _mm256_setzero_si256();
  auto* to = reinterpret_cast<__m256i*>(digits);
  for (int i = 0; i < padded; i += 2 * W) {
    const __m256i a = integers(w + i, up), b = integers(w + i + W, up);
    sum = _mm256_add_epi32(sum, _mm256_add_epi32(a, b));
    _mm256_storeu_si256(to++, narrow(a, b));
  }
  int32_t sums[W];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), sum);
  int all = 0;
  for (int x : sums) all += x;
  lift = -128 * all;
}

// GCC would move sums from register to register, and read a vector anew for each row.
inline __attribute__((always_inline)) __m256i stay(__m256i v) {
  asm("" : "+x"(v));
  return v;
}

// To the sums of four vectors of integers by R rows' pairs of them, 4 bytes of rows `row` apart.
template <int R>
inline __attribute__((always_inline)) void multiply_add(
    const uint8_t* x, const int8_t* digits, int64_t row, __m256i (&acc)[R][4]) {
  __m256i by[R];
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) {
    int32_t pair;
    std::memcpy(&pair, digits + r * row, 4);
    by[r] = _mm256_set1_epi32(pair);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256i v = stay(_mm256_load_si256(reinterpret_cast<const __m256i*>(x) + i));
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) acc[r][i] = stay(_mm256_add_epi32(acc[r][i], _mm256_madd_epi16(v, by[r])));
  }
}

} // namespace
} // namespace streamer
