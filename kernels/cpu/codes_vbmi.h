// Cutting indices out and looking them up with AVX-512 VBMI, 64 at a time: for codes_vbmi.cpp and
// codes_tiles.cpp.
#pragma once

#include <immintrin.h>

#include "codes_bytes.h"

namespace streamer {
namespace {

constexpr int W = 16;

inline int blocks_of(int n) {
  return (n + 127) / 128; // of 64 indices
}

inline int wide(int n) {
  return blocks_of(n) * 128;
}

// Indices to bytes: of the first channels and of the second. Bits above the index are of no matter.
template <int width>
struct Tables {
  __m512i table[2][width == 8 ? 4 : width == 7 ? 2 : 1];

  // flip: what of each byte is turned round; 128 makes them signed.
  explicit Tables(const Codebook& book, int flip = 0) {
    const __m512i all = _mm512_set1_epi8(static_cast<char>(flip));
    for (int e = 0; e < 2; ++e) {
      for (int i = 0; i < int(sizeof table[0] / 64); ++i) {
        table[e][i] = _mm512_xor_si512(all, _mm512_loadu_si512(book.bytes[e] + 64 * i));
      }
    }
  }
  __m512i look_up(int e, __m512i index) const {
    const __m512i* t = table[e];
    if constexpr (width < 7) {
      return _mm512_permutexvar_epi8(index, t[0]);
    } else if constexpr (width == 7) {
      return _mm512_permutex2var_epi8(t[0], index, t[1]);
    } else {
      const __m512i low = _mm512_permutex2var_epi8(t[0], index, t[1]);
      const __m512i high = _mm512_permutex2var_epi8(t[2], index, t[3]);
      return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
    }
  }
};

// 64 indices of a row to 64 bytes.
template <int width>
class Indices {
 public:
  // later: bytes from a row to the one that is fetched when it is read.
  Indices(int n, int64_t later) : bytes_((n / 2 * width + 7) / 8), later_(later) {
    alignas(64) uint8_t spread[64], shifts[64];
    for (int i = 0; i < 64; ++i) {
      spread[i] = (i / 8 * width + i % 8) & 63;
      shifts[i] = i % 8 * width;
    }
    spread_ = _mm512_load_si512(spread);
    shifts_ = _mm512_load_si512(shifts);
  }
  __m512i of(const uint32_t* row, int block) const {
    const int at = block * 8 * width, left = bytes_ - at;
    const __mmask64 some = left >= 8 * width ? ~0ull >> (64 - 8 * width) : (1ull << left) - 1;
    const auto* from = reinterpret_cast<const char*>(row) + at;
    _mm_prefetch(from + later_, _MM_HINT_T0);
    const __m512i bits = _mm512_maskz_loadu_epi8(some, from);
    if constexpr (width == 8) return bits;
    return _mm512_multishift_epi64_epi8(shifts_, _mm512_permutexvar_epi8(spread_, bits));
  }

 private:
  int bytes_;
  int64_t later_;
  __m512i spread_, shifts_;
};

// z[t] = indices 16 L + 4 t + (0 ... 3), L = 0 ... 3, of four tokens from `words` on, token by token.
template <int width>
inline __attribute__((always_inline)) void quads(
    const Indices<width>& indices, const uint32_t* const* words, int block, __m512i (&z)[4]) {
  const __m512i a = indices.of(words[0], block), b = indices.of(words[1], block), c = indices.of(words[2], block),
                d = indices.of(words[3], block);
  const __m512i lo = _mm512_unpacklo_epi8(a, b), hi = _mm512_unpackhi_epi8(a, b), lower = _mm512_unpacklo_epi8(c, d),
                higher = _mm512_unpackhi_epi8(c, d);
  z[0] = _mm512_unpacklo_epi16(lo, lower), z[1] = _mm512_unpackhi_epi16(lo, lower);
  z[2] = _mm512_unpacklo_epi16(hi, higher), z[3] = _mm512_unpackhi_epi16(hi, higher);
}

// The n channels of a sum that lie as quads() has them: [block, quarter, even or odd, 16].
inline void in_order(const float* y, int n, float* out) {
  for (int i = 0; i < n / 2; ++i) {
    const int block = i / 64, high = i % 64 / 16, quarter = i % 16 / 4, low = i % 4;
    const float* from = y + 32 * (4 * block + quarter) + 4 * high + low;
    out[2 * i] = from[0];
    out[2 * i + 1] = from[16];
  }
}

// Sixteen values of a row of n, zeros after its end.
inline __m512 sixteen(const float* row, int n, int i) {
  const int left = n - i;
  return _mm512_maskz_loadu_ps(left >= W ? 0xffff : left > 0 ? (1u << left) - 1 : 0, row + i);
}

inline float top_of(const float* row, int n) {
  __m512 tops = _mm512_setzero_ps();
  for (int i = 0; i < n; i += W) tops = _mm512_max_ps(_mm512_abs_ps(sixteen(row, n, i)), tops);
  return _mm512_reduce_max_ps(tops);
}

// Integers of sixteen values and their digits.
inline __m512i digits_of(__m512 x, float up, __m128i& h, __m128i& l) {
  const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(up)));
  l = _mm512_cvtepi32_epi8(q);
  h = _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8));
  return q;
}

// The four even ones of eight neighbours, then the odd ones.
inline __m128i apart(__m128i bytes) {
  return _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
}

} // namespace
} // namespace streamer
