// What rows of x are packed to for narrow256.h, and 64 weights of 4 bits.
//
// A lane holds eight neighbours of x as integers of 24 bits beside one power of two, each cut into
// a signed half-word and a signed byte: x = unit * (2^8 h + l). Sums of a block are exact integers.
#pragma once

#include <immintrin.h>

#include "rows.h"
#include "unpack.h"

namespace streamer {
namespace {

constexpr int W = 8;
constexpr int64_t columns = 64; // of a block
// Of a row of x, for a block: digits (of Nibbles: h of every fourth value from the first, third,
// second and fourth on; l of the even ones, then of the odd ones), and eight units. With mxfp4's
// weights, which are twelve less than the bytes multiplied, also what that makes of each lane.
constexpr int64_t block_bytes(bool levels) {
  return (levels ? 8 : 7) * 32;
}

struct Layout {
  int64_t K, G, bits, blocks, block, sums;

  explicit Layout(const Matrix& A)
      : K(A.K),
        G(A.K / A.group),
        bits(A.bits),
        blocks((A.K + columns - 1) / columns),
        block(block_bytes(A.levels)),
        sums((G + W - 1) / W * W) {}

  int64_t row_bytes() const {
    return K * bits / 8;
  }
};

// Every other byte of 64, those at even places or, `shift` 8, at odd ones.
template <int shift>
inline __m256i every_other(__m256i a, __m256i b) {
  const __m256i low = _mm256_set1_epi16(255);
  if (shift == 8) {
    a = _mm256_srli_epi16(a, 8);
    b = _mm256_srli_epi16(b, 8);
  } else {
    a = _mm256_and_si256(a, low);
    b = _mm256_and_si256(b, low);
  }
  return _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xd8);
}

// The lowest bytes of 32 integers.
inline __m256i lowest(const __m256i* q) {
  const __m256i low = _mm256_set1_epi32(255), order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
  const __m256i a = _mm256_packus_epi32(_mm256_and_si256(q[0], low), _mm256_and_si256(q[1], low));
  const __m256i b = _mm256_packus_epi32(_mm256_and_si256(q[2], low), _mm256_and_si256(q[3], low));
  return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), order);
}

// In lane i of the first and of the second half, the largest of that half of a, b, c, d.
inline __m256i largest(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i p = _mm256_max_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
  const __m256i q = _mm256_max_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
  return _mm256_max_epi32(_mm256_unpacklo_epi64(p, q), _mm256_unpackhi_epi64(p, q));
}

// Eight times eight neighbours as integers below 2^23, and the powers of two that bring them back.
inline void fixed(const float* x, __m256i* q, float* units) {
  const __m256i positive = _mm256_set1_epi32(0x7fffffff);
  __m256i a[8];
  for (int i = 0; i < 8; ++i) {
    a[i] = _mm256_and_si256(_mm256_castps_si256(_mm256_loadu_ps(x + W * i)), positive);
  }
  const __m256i r = largest(a[0], a[1], a[2], a[3]), s = largest(a[4], a[5], a[6], a[7]);
  const __m256i bits = _mm256_max_epi32(
      _mm256_permute2x128_si256(r, s, 0x20), _mm256_permute2x128_si256(r, s, 0x31));
  // Half a digit is added to the largest value: from 0x7f7f80 on the third digit would not fit.
  const __m256i top = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffff));
  const __m256i full = _mm256_cmpgt_epi32(top, _mm256_set1_epi32(0x7e0000));
  __m256i exponent = _mm256_sub_epi32(_mm256_srli_epi32(bits, 23), full);
  exponent = _mm256_max_epi32(exponent, _mm256_set1_epi32(32));
  // x < 2^(exponent - 126), and 22 bits more are kept.
  const __m256i back = _mm256_sub_epi32(exponent, _mm256_set1_epi32(22));
  const __m256i up = _mm256_slli_epi32(_mm256_sub_epi32(_mm256_set1_epi32(254), back), 23);
  const __m256i wild = _mm256_cmpgt_epi32(bits, _mm256_set1_epi32(0x7f7fffff));
  _mm256_store_ps(
      units, _mm256_castsi256_ps(_mm256_or_si256(_mm256_slli_epi32(back, 23), wild)));
  for (int i = 0; i < 8; ++i) {
    const __m256i every = _mm256_permutevar8x32_epi32(up, _mm256_set1_epi32(i));
    q[i] = _mm256_cvtps_epi32(
        _mm256_mul_ps(_mm256_loadu_ps(x + W * i), _mm256_castsi256_ps(every)));
  }
}

// 64 weights as bytes, even ones and odd ones, and, times 256, as half-words in the order of h.
struct Nibbles {
  static constexpr int64_t bytes = 32, block = block_bytes(false); // of weights, of x
  static constexpr bool biases = true; // whether the matrix has any

  __m256i even, odd, quarters[4];

  explicit Nibbles(__m256i nibbles)
      : Nibbles(
            _mm256_and_si256(nibbles, _mm256_set1_epi8(15)),
            _mm256_and_si256(_mm256_srli_epi16(nibbles, 4), _mm256_set1_epi8(15))) {}

  Nibbles(__m256i even, __m256i odd) : even(even), odd(odd) {
    const __m256i upper = _mm256_set1_epi16(static_cast<short>(0xff00));
    quarters[0] = _mm256_slli_epi16(even, 8);
    quarters[1] = _mm256_and_si256(even, upper);
    quarters[2] = _mm256_slli_epi16(odd, 8);
    quarters[3] = _mm256_and_si256(odd, upper);
  }

  // A block's, or with `part` the first half of one.
  static inline __attribute__((always_inline)) Nibbles at(const uint8_t* from, bool part) {
    return Nibbles(read(from, part));
  }

  static inline __attribute__((always_inline)) __m256i read(const uint8_t* from, bool part) {
    const auto* all = reinterpret_cast<const __m256i*>(from);
    const auto* half = reinterpret_cast<const __m128i*>(from);
    return part ? _mm256_zextsi128_si256(_mm_loadu_si128(half)) : _mm256_loadu_si256(all);
  }

  // Sum over each lane's values of x times these: what an instruction set supplies. Weights are at
  // most 15, those of Levels 24: an integer holds 24 * 8 * 2^23, a half-word four products of l.
  __m256i integers(const uint8_t* x) const;

  __m256 times(const uint8_t* x) const {
    return _mm256_cvtepi32_ps(integers(x));
  }

  // One block of one row of x, zeros after `count`, and its lanes' sums.
  static __m256 pack(const float* x, int64_t count, uint8_t* out);
};

// The same of mxfp4.
struct Levels : Nibbles {
  static constexpr int64_t block = block_bytes(true);
  static constexpr bool biases = false;

  static inline __attribute__((always_inline)) Levels at(const uint8_t* from, bool part) {
    const Nibbles n(read(from, part));
    const __m256i above = _mm256_broadcastsi128_si256(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(fp4_above)));
    return {Nibbles(_mm256_shuffle_epi8(above, n.even), _mm256_shuffle_epi8(above, n.odd))};
  }

  __m256 times(const uint8_t* x) const {
    const __m256i lowest = _mm256_load_si256(reinterpret_cast<const __m256i*>(x + Nibbles::block));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(integers(x), lowest));
  }

  static __m256 pack(const float* x, int64_t count, uint8_t* out) {
    const __m256 sums = Nibbles::pack(x, count, out);
    const __m256i twelve = _mm256_set1_epi8(12);
    _mm256_store_si256(
        reinterpret_cast<__m256i*>(out + Nibbles::block), Nibbles(twelve, twelve).integers(out));
    return sums;
  }
};

// h of eight times eight values, into four vectors.
inline void high_digits(const __m256i* q, __m256i* to) {
  __m256i y[4];
  for (int i = 0; i < 4; ++i) {
    // The first and the fifth of eight side by side, the second and the sixth...
    const __m256i first = _mm256_permute2x128_si256(q[i], q[i + 4], 0x20);
    const __m256i last = _mm256_permute2x128_si256(q[i], q[i + 4], 0x31);
    y[i] = _mm256_blend_epi16(first, _mm256_slli_epi32(last, 16), 0xaa);
  }
  const __m256i a = _mm256_unpacklo_epi32(y[0], y[1]), b = _mm256_unpackhi_epi32(y[0], y[1]);
  const __m256i c = _mm256_unpacklo_epi32(y[2], y[3]), d = _mm256_unpackhi_epi32(y[2], y[3]);
  _mm256_store_si256(to, _mm256_unpacklo_epi64(a, c));
  _mm256_store_si256(to + 1, _mm256_unpacklo_epi64(b, d));
  _mm256_store_si256(to + 2, _mm256_unpackhi_epi64(a, c));
  _mm256_store_si256(to + 3, _mm256_unpackhi_epi64(b, d));
}

inline __m256 Nibbles::pack(const float* x, int64_t count, uint8_t* out) {
  alignas(32) float tail[columns];
  if (count < columns) {
    for (int64_t i = 0; i < columns; ++i) tail[i] = i < count ? x[i] : 0.0f;
    x = tail;
  }
  float* units = reinterpret_cast<float*>(out + 192);
  __m256i q[8];
  fixed(x, q, units);
  auto* to = reinterpret_cast<__m256i*>(out);
  const __m256i a = lowest(q), b = lowest(q + 4), half = _mm256_set1_epi32(128);
  _mm256_store_si256(to + 4, every_other<0>(a, b));
  _mm256_store_si256(to + 5, every_other<8>(a, b));
  for (__m256i& one : q) one = _mm256_srai_epi32(_mm256_add_epi32(one, half), 8);
  high_digits(q, to);
  const Nibbles ones(_mm256_set1_epi8(17));
  return _mm256_mul_ps(ones.times(out), _mm256_load_ps(units));
}

} // namespace
} // namespace streamer
