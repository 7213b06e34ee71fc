// Codes as bytes with AVX-512 VBMI and VNNI (code_steps.h).
//
// Indices are cut out of the bit stream eight to a 64-bit lane (vpmultishiftqb), laid out so that
// neighbours in a 32-bit lane are what vpdpbusd sums, and only then looked up, a table for the even
// channels and one for the odd: half the bytes to move. Points are unsigned for the instruction,
// 128 too large; 128 times the sum of a row's integers is taken off again.
#if defined(__x86_64__)
#include <immintrin.h>

#include "attend.h"
#include "code_steps.h"

namespace streamer {
namespace {

constexpr int W = 16;

int blocks_of(int n) {
  return (n + 127) / 128; // of 64 indices
}

int wide(int n) {
  return blocks_of(n) * 128;
}

// Indices to bytes: of the first channels and of the second. Bits above the index are of no matter.
template <int width>
struct Tables {
  __m512i table[2][width == 8 ? 4 : width == 7 ? 2 : 1];

  explicit Tables(const Codebook& book) {
    for (int e = 0; e < 2; ++e) {
      for (int i = 0; i < int(sizeof table[0] / 64); ++i) table[e][i] = _mm512_loadu_si512(book.bytes[e] + 64 * i);
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

// Bytes from a token's codes to those of `tokens` later, where they lie in one array.
int64_t later(const uint32_t* const* words, int tokens) {
  return (words[1] - words[0]) * 4 * tokens;
}

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

// A tile for scores: [block, quad of indices, even or odd, 64 tokens, 4 bytes].
template <int width>
void unpack_keys(const uint32_t* const* words, const Codebook& book, int n, uint8_t* out) {
  const Tables<width> tables(book);
  const Indices<width> indices(n, later(words, key_tile));
  for (int from = 0; from < key_tile; from += 16) {
    for (int block = 0; block < blocks_of(n); ++block) {
      __m512i v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) v[i] = indices.of(words[from + i], block);
      turn(v);
      uint8_t* to = out + block * 128 * key_tile + from * 4;
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k) {
        _mm512_store_si512(to + (2 * k) * 4 * key_tile, tables.look_up(0, v[k]));
        _mm512_store_si512(to + (2 * k + 1) * 4 * key_tile, tables.look_up(1, v[k]));
      }
    }
  }
}

// A tile's block for sums of values: [quad of tokens, quarter, even or odd, 16 indices, 4 bytes],
// quarter t holding indices 16 L + 4 t + (0 ... 3) for L = 0 ... 3.
template <int width>
void unpack_values(const uint32_t* const* words, const Codebook& book, int n, int block, uint8_t* out) {
  const Tables<width> tables(book);
  const Indices<width> indices(n, later(words, value_tile));
  for (int j = 0; j < value_tile; j += 4, out += 512) {
    const __m512i a = indices.of(words[j], block), b = indices.of(words[j + 1], block),
                  c = indices.of(words[j + 2], block), d = indices.of(words[j + 3], block);
    const __m512i lo = _mm512_unpacklo_epi8(a, b), hi = _mm512_unpackhi_epi8(a, b),
                  lower = _mm512_unpacklo_epi8(c, d), higher = _mm512_unpackhi_epi8(c, d);
    const __m512i z[4] = {
        _mm512_unpacklo_epi16(lo, lower), _mm512_unpackhi_epi16(lo, lower),
        _mm512_unpacklo_epi16(hi, higher), _mm512_unpackhi_epi16(hi, higher)};
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      _mm512_store_si512(out + 128 * t, tables.look_up(0, z[t]));
      _mm512_store_si512(out + 128 * t + 64, tables.look_up(1, z[t]));
    }
  }
}

auto keys_of(int width) -> void (*)(const uint32_t* const*, const Codebook&, int, uint8_t*) {
  switch (width) {
    case 4: return unpack_keys<4>;
    case 5: return unpack_keys<5>;
    case 6: return unpack_keys<6>;
    case 7: return unpack_keys<7>;
    default: return unpack_keys<8>;
  }
}

auto values_of(int width) -> void (*)(const uint32_t* const*, const Codebook&, int, int, uint8_t*) {
  switch (width) {
    case 4: return unpack_values<4>;
    case 5: return unpack_values<5>;
    case 6: return unpack_values<6>;
    case 7: return unpack_values<7>;
    default: return unpack_values<8>;
  }
}

constexpr float largest = 32639.0f; // 256 * 127 + 127

// What brings values of at most `top` into two digits, and back. Too small ones are zero.
inline void unit_of(float top, float& up, float& unit) {
  const bool some = top > 1e-30f;
  up = some ? largest / top : 0.0f;
  unit = some ? top / largest : 0.0f;
  if (!(top < 3.4e38f)) unit = __builtin_nanf("");
}

// Integers of sixteen values and their digits.
inline __m512i digits_of(__m512 x, float up, __m128i& h, __m128i& l) {
  const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(up)));
  l = _mm512_cvtepi32_epi8(q);
  h = _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8));
  return q;
}

void pack_queries(const float* q, int rows, int n, int8_t* digits, float* units, int32_t* lifts) {
  const int all = wide(n);
  // the four even ones of eight channels, then the odd ones
  const __m128i apart = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  auto at = [n](const float* row, int i) {
    const int left = n - i;
    const __mmask16 some = left >= W ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
    return _mm512_maskz_loadu_ps(some, row + i);
  };
  for (int r = 0; r < rows; ++r, q += n, digits += 2 * all) {
    __m512 tops = _mm512_setzero_ps();
    for (int i = 0; i < n; i += W) tops = _mm512_max_ps(_mm512_abs_ps(at(q, i)), tops);
    float up;
    unit_of(_mm512_reduce_max_ps(tops), up, units[r]);
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < all; i += W) {
      __m128i h, l;
      sum = _mm512_add_epi32(sum, digits_of(at(q, i), up, h, l));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(digits + i), _mm_shuffle_epi8(h, apart));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(digits + all + i), _mm_shuffle_epi8(l, apart));
    }
    lifts[r] = -128 * _mm512_reduce_add_epi32(sum);
  }
}

void pack_weights(const float* p, const float* scales, int8_t* digits, float& unit, int32_t& lift) {
  constexpr int vectors = value_tile / W;
  __m512 w[vectors], tops = _mm512_setzero_ps();
  for (int i = 0; i < vectors; ++i) {
    w[i] = _mm512_mul_ps(_mm512_loadu_ps(p + W * i), _mm512_loadu_ps(scales + W * i));
    tops = _mm512_max_ps(_mm512_abs_ps(w[i]), tops);
  }
  float up;
  unit_of(_mm512_reduce_max_ps(tops), up, unit);
  __m512i sum = _mm512_setzero_si512();
  for (int i = 0; i < vectors; ++i) {
    __m128i h, l;
    sum = _mm512_add_epi32(sum, digits_of(w[i], up, h, l));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(digits + W * i), h);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(digits + value_tile + W * i), l);
  }
  lift = -128 * _mm512_reduce_add_epi32(sum);
}

// Sums over `count` vectors of bytes, every `stride` bytes from x on and three after each, times R
// rows' digits: four bytes a vector, `digit` bytes from the high ones to the low.
template <int R>
inline __attribute__((always_inline)) void multiply(
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

template <int R>
struct Count {};

template <class F>
void by_rows(int rows, F part) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) part(r, Count<4>());
  if (rows - r == 3) part(r, Count<3>());
  if (rows - r == 2) part(r, Count<2>());
  if (rows - r == 1) part(r, Count<1>());
}

void scores(
    const uint32_t* const* words, const Codebook& book, int n, const int8_t* digits, const float* units,
    const int32_t* lifts, int rows, uint8_t* room, float* s) {
  keys_of(book.width)(words, book, n, room);
  const int all = wide(n), count = (n + 7) / 8 * 2;
  by_rows(rows, [&]<int R>(int r, Count<R>) {
    __m512 found[R][4];
    multiply<R>(room, 4 * key_tile, count, digits + r * 2 * all, 2 * all, all, lifts + r, found);
    for (int i = 0; i < R; ++i) {
      const __m512 unit = _mm512_set1_ps(units[r + i] * book.grid);
      for (int j = 0; j < 4; ++j) _mm512_storeu_ps(s + (r + i) * step + W * j, _mm512_mul_ps(found[i][j], unit));
    }
  });
}

void weigh(
    const uint32_t* const* words, const Codebook& book, int n, const int8_t* digits, const float* units,
    const int32_t* lifts, int rows, uint8_t* room, float* y) {
  const int all = wide(n);
  for (int block = 0; block < blocks_of(n); ++block) {
    values_of(book.width)(words, book, n, block, room);
    by_rows(rows, [&]<int R>(int r, Count<R>) {
      for (int at = 0; at < 128; at += 4 * W) {
        __m512 found[R][4];
        multiply<R>(
            room + 4 * at, 512, value_tile / 4, digits + r * 2 * value_tile, 2 * value_tile, value_tile,
            lifts + r, found);
        for (int i = 0; i < R; ++i) {
          const __m512 unit = _mm512_set1_ps(units[r + i] * book.grid);
          float* to = y + int64_t(r + i) * all + block * 128 + at;
          for (int j = 0; j < 4; ++j) {
            _mm512_storeu_ps(to + W * j, _mm512_fmadd_ps(found[i][j], unit, _mm512_loadu_ps(to + W * j)));
          }
        }
      }
    });
  }
}

void in_order(const float* y, int n, float* out) {
  for (int i = 0; i < n / 2; ++i) {
    const int block = i / 64, high = i % 64 / 16, quarter = i % 16 / 4, low = i % 4;
    const float* from = y + 32 * (4 * block + quarter) + 4 * high + low;
    out[2 * i] = from[0];
    out[2 * i + 1] = from[16];
  }
}

} // namespace

const ByteSteps& codes_vbmi() {
  static constexpr ByteSteps table = {wide, pack_queries, scores, pack_weights, weigh, in_order};
  return table;
}

} // namespace streamer
#endif
