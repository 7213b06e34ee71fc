// What rows of x are packed to for rows_amx.cpp: the digits that tiles meet, units and sums.
#pragma once

#include <immintrin.h>

#include "rows.h"
#include "wide512.h"

namespace streamer {
namespace {

// What M rows of x are packed to: for each tile of weights the digits that it meets, `lanes` rows of
// x in each of one or two tiles; for each group and tile units, and what its sums begin with: what
// the weights' middle makes of the digits, negative; for each group and row sums of x.
struct Layout {
  int64_t K, G, columns, steps, digits, units, begins, sums;
  int middle;

  Layout(const Matrix& A, int M, int lanes, int tiles)
      : K(A.K),
        G(A.K / A.group),
        columns(A.group < 64 ? A.group : 64),
        steps(A.group / columns),
        digits(K / 4 * 16 * lanes * tiles),
        units(G * tiles * 64),
        begins(G * tiles * 64),
        sums(G * 32),
        middle(A.middle) {}
};

constexpr int lanes_of(int M) {
  return M > 2 ? 4 : M;
}

constexpr int tiles_of(int M) {
  return M > 4 ? 2 : 1;
}

bool known(const Matrix& A) {
  return A.format == Format::affine && (A.bits == 4 || A.bits == 8);
}

Layout layout(const Matrix& A, int M) {
  return Layout(A, M, lanes_of(M), tiles_of(M));
}

// The powers of two that bring what is at most `bits` (as an integer) below 2^23 and back.
inline void unit(int bits, float& up, float& down) {
  // Half a digit is added to the largest value: from 0x7f7f80 on the third digit would not fit.
  int exponent = (bits >> 23) + ((bits & 0x7fffff) > 0x7e0000);
  if (exponent < 32) exponent = 32;
  // x < 2^(exponent - 126), and 22 bits more are kept.
  const int back = exponent - 22;
  up = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((254 - back) << 23)));
  down = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(back << 23)));
  if (bits > 0x7f7fffff) down = __builtin_nanf("");
}

// Sixteen floats in the order in which a tile's rows hold a group's weights, from vector i of it:
// of 4 bits first the even ones, then the odd ones.
inline __m512 ordered(const float* x, int bits, int columns, int i) {
  if (bits == 8) return _mm512_loadu_ps(x + W * i);
  const int half = columns / (2 * W), odd = i >= half;
  const float* from = x + 2 * W * (i - odd * half);
  const __m512i every = _mm512_add_epi32(
      _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0),
      _mm512_set1_epi32(odd));
  return _mm512_permutex2var_ps(_mm512_loadu_ps(from), every, _mm512_loadu_ps(from + W));
}

template <int bits>
void pack_row(const Layout& L, const float* x, int m, int M, uint8_t* out) {
  const int lanes = lanes_of(M), tiles = tiles_of(M), t = m / 4, lane = m % 4;
  const int vectors = static_cast<int>(L.columns) / W;
  uint8_t* digits = out + t * L.columns / 4 * 16 * lanes;
  float* units = reinterpret_cast<float*>(out + L.digits) + t * W;
  uint8_t* begins = out + L.digits + L.units + t * 64 + lane * 16;
  float* sums = reinterpret_cast<float*>(out + L.digits + L.units + L.begins) + m;
  // q + 0x808080 has the digits, 128 added to each, as its bytes.
  const __m512i middle = _mm512_set1_epi32(0x808080);
  const __m512i by_digit = _mm512_broadcast_i32x4(
      _mm_set_epi8(15, 11, 7, 3, 12, 8, 4, 0, 13, 9, 5, 1, 14, 10, 6, 2));
  for (int64_t g = 0; g < L.G; ++g, units += W * tiles, begins += 64 * tiles, sums += 8) {
    const float* from = x + g * L.steps * L.columns;
    __m512i most = _mm512_setzero_si512();
    for (int i = 0; i < L.steps * vectors; ++i) {
      const __m512i v = _mm512_castps_si512(_mm512_loadu_ps(from + W * i));
      most = _mm512_max_epi32(most, _mm512_and_si512(v, _mm512_set1_epi32(0x7fffffff)));
    }
    float up, down;
    unit(_mm512_reduce_max_epi32(most), up, down);
    __m512i sum = _mm512_setzero_si512(), by_digits = sum; // of four columns: h, m, l and 0
    for (int64_t s = 0; s < L.steps; ++s, from += L.columns) {
      for (int i = 0; i < vectors; ++i) {
        const __m512 v = ordered(from, bits, static_cast<int>(L.columns), i);
        const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(v, _mm512_set1_ps(up)));
        sum = _mm512_add_epi32(sum, q);
        const __m512i d = _mm512_shuffle_epi8(
            _mm512_xor_si512(_mm512_add_epi32(q, middle), middle), by_digit);
        by_digits = _mm512_dpbusd_epi32(by_digits, _mm512_set1_epi8(1), d);
        if (lanes == 1) {
          _mm512_store_si512(digits + i * 64, d);
          continue;
        }
        uint8_t* to = digits + (i * 4 * lanes + lane) * 16;
        _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm512_castsi512_si128(d));
        to += lanes * 16;
        _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm512_extracti32x4_epi32(d, 1));
        to += lanes * 16;
        _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm512_extracti32x4_epi32(d, 2));
        to += lanes * 16;
        _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm512_extracti32x4_epi32(d, 3));
      }
      digits += tiles * L.columns / 4 * 16 * lanes;
    }
    *sums = static_cast<float>(_mm512_reduce_add_epi32(sum)) * down;
    const __m256i half = _mm256_add_epi32(
        _mm512_castsi512_si256(by_digits), _mm512_extracti64x4_epi64(by_digits, 1));
    const __m128i four =
        _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    _mm_store_si128(
        reinterpret_cast<__m128i*>(begins), _mm_mullo_epi32(four, _mm_set1_epi32(-L.middle)));
    const __m128 all = _mm_mul_ps(_mm_set1_ps(down), _mm_set_ps(0.0f, 1.0f, 256.0f, 65536.0f));
    for (int i = lane; i < 4; i += lanes) _mm_store_ps(units + 4 * i, all);
  }
}

} // namespace
} // namespace streamer
