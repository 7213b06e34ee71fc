// Codes as bytes with AVX-512 VBMI and VNNI (code_steps.h).
//
// Indices are cut out of the bit stream eight to a 64-bit lane (vpmultishiftqb), laid out so that
// neighbours in a 32-bit lane are what vpdpbusd sums, and only then looked up, a table for the even
// channels and one for the odd: half the bytes to move. Points are unsigned for the instruction,
// 128 too large; 128 times the sum of a row's integers is taken off again.
#if defined(__x86_64__)
#include "codes_vbmi.h"

namespace streamer {
namespace {

// v[k] = the k-th 32 bits of each of sixteen vectors.
inline __attribute__((always_inline)) void turn(__m512i (&v)[16]) {
  __m512i a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i x = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88), y = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88);
    const __m512i z = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd), w = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd);
    v[c] = _mm512_shuffle_i32x4(x, y, 0x88);
    v[4 + c] = _mm512_shuffle_i32x4(z, w, 0x88);
    v[8 + c] = _mm512_shuffle_i32x4(x, y, 0xdd);
    v[12 + c] = _mm512_shuffle_i32x4(z, w, 0xdd);
  }
}

void pack(const float* q, int rows, int n, int8_t* digits, float* units, int32_t* lifts) {
  const int all = wide(n);
  for (int r = 0; r < rows; ++r, q += n, digits += 2 * all) {
    float up;
    unit_of(top_of(q, n), two_digits, up, units[r]);
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < all; i += W) {
      __m128i h, l;
      sum = _mm512_add_epi32(sum, digits_of(sixteen(q, n, i), up, h, l));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(digits + i), apart(h));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(digits + all + i), apart(l));
    }
    lifts[r] = -128 * _mm512_reduce_add_epi32(sum);
  }
}

struct Kernel {
  using V = __m512;
  static constexpr int width = 0, rows = 4, channels = 128, bytes = 1;

  static int wide(int n) {
    return streamer::wide(n);
  }
  static int keys(int n) {
    return (n + 7) / 8 * 2;
  }

  // 64 keys for scores: [block, quad of indices, even or odd, 64 tokens, 4 bytes].
  template <int width>
  static void unpack_keys(const uint32_t* const* words, const Codebook& book, int n, uint8_t* out) {
    constexpr int tokens = 64;
    const Tables<width> tables(book);
    const Indices<width> indices(n, later(words, tokens));
    for (int from = 0; from < tokens; from += 16) {
      for (int block = 0; block < blocks_of(n); ++block) {
        __m512i v[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) v[i] = indices.of(words[from + i], block);
        turn(v);
        uint8_t* to = out + block * 128 * tokens + from * 4;
#pragma GCC unroll 16
        for (int k = 0; k < 16; ++k) {
          _mm512_store_si512(to + (2 * k) * 4 * tokens, tables.look_up(0, v[k]));
          _mm512_store_si512(to + (2 * k + 1) * 4 * tokens, tables.look_up(1, v[k]));
        }
      }
    }
  }

  // A block of values for sums: [quad of tokens, quarter, even or odd, 16 indices, 4 bytes].
  template <int width>
  static void unpack_values(const uint32_t* const* words, const Codebook& book, int n, int block, uint8_t* out) {
    const Tables<width> tables(book);
    const Indices<width> indices(n, later(words, padded));
    for (int j = 0; j < padded; j += 4, out += 512) {
      __m512i z[4];
      quads(indices, words + j, block, z);
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        _mm512_store_si512(out + 128 * t, tables.look_up(0, z[t]));
        _mm512_store_si512(out + 128 * t + 64, tables.look_up(1, z[t]));
      }
    }
  }

  // p[j] * scales[j] of 128 tokens as digits.
  static void pack_weights(const float* p, const float* scales, int8_t* digits, float& unit, int32_t& lift) {
    constexpr int vectors = padded / W;
    __m512 w[vectors], tops = _mm512_setzero_ps();
    for (int i = 0; i < vectors; ++i) {
      w[i] = _mm512_mul_ps(_mm512_loadu_ps(p + W * i), _mm512_loadu_ps(scales + W * i));
      tops = _mm512_max_ps(_mm512_abs_ps(w[i]), tops);
    }
    float up;
    unit_of(_mm512_reduce_max_ps(tops), two_digits, up, unit);
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < vectors; ++i) {
      __m128i h, l;
      sum = _mm512_add_epi32(sum, digits_of(w[i], up, h, l));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(digits + W * i), h);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(digits + padded + W * i), l);
    }
    lift = -128 * _mm512_reduce_add_epi32(sum);
  }

  // Sums over `count` vectors of bytes, every `stride` bytes from x on and three after each, times R
  // rows' digits: four bytes a vector, `digit` bytes from the high ones to the low.
  template <int R>
  static inline __attribute__((always_inline)) void multiply(
      const uint8_t* x, int64_t stride, int count, const int8_t* digits, int64_t row, int64_t digit,
      const int32_t* lifts, __m512 (&out)[R][4]) {
    __m512i acc[R][4];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc[r][i] = _mm512_setzero_si512();
    }
    for (int d = 0; d < 2; ++d, digits += digit) {
      const uint8_t* from = x;
      for (int k = 0; k < count; ++k, from += stride) {
        __m512i v[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) v[i] = _mm512_load_si512(from + 64 * i);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const __m512i by = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(digits + r * row + 4 * k));
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) acc[r][i] = _mm512_dpbusd_epi32(acc[r][i], v[i], by);
        }
      }
      if (d == 0) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) acc[r][i] = _mm512_slli_epi32(acc[r][i], 8);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512i lift = _mm512_set1_epi32(lifts[r]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) out[r][i] = _mm512_cvtepi32_ps(_mm512_add_epi32(acc[r][i], lift));
    }
  }
};

} // namespace

const ByteSteps& codes_vbmi() {
  static constexpr ByteSteps table = {
      2, wide, room_by<Kernel>, pack, scores_by<Kernel>, weigh_by<Kernel>, in_order};
  return table;
}

} // namespace streamer
#endif
