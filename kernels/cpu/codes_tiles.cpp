// Codes as tiles of bytes with AMX (code_steps.h).
//
// Keys are tokens by channels as they are unpacked, against eight rows' two digits: scores come out
// token by token and are turned. Values are summed from three digits of weights, with one unit for a
// whole span, so that sums stay integers until its end: 2^-24 of the largest weight.
#include "code_steps.h"

#if defined(__AMX_INT8__)
#include "codes_vbmi.h"
#include "tiles.h"

namespace streamer {
namespace {

constexpr int tile_bytes = 1024;
constexpr int tokens = 64; // of a tile's row
constexpr int chunk = 8; // times as many are unpacked at a time: weights of two tiles stay near
constexpr float three_digits = 8355000.0f; // less than 127 * (65536 + 256 + 1) by more than rounding

constexpr TileShapes shapes = [] {
  TileShapes s;
  for (int i = 0; i < 8; ++i) s.set(i, 16, 64);
  return s;
}();

// Eight rows as [block, even or odd, quad of indices, digit, row, 4 bytes]: tiles to multiply by.
void pack(const float* q, int rows, int n, int8_t* digits, float* units, int32_t*) {
  for (int r = 0; r < 8; ++r, q += n) {
    float up = 0.0f;
    units[r] = 0.0f;
    if (r < rows) unit_of(top_of(q, n), two_digits, up, units[r]);
    for (int i = 0; i < wide(n); i += W) {
      __m128i bytes[2];
      digits_of(r < rows ? sixteen(q, n, i) : _mm512_setzero_ps(), up, bytes[0], bytes[1]);
      int8_t* to = digits + i / 128 * 2 * tile_bytes + i % 128 / 8 * 64 + 4 * r;
      for (int d = 0; d < 2; ++d, to += 32) {
        alignas(16) int32_t quads[4]; // even, odd, even, odd
        _mm_store_si128(reinterpret_cast<__m128i*>(quads), apart(bytes[d]));
        for (int k = 0; k < 4; ++k) __builtin_memcpy(to + k % 2 * tile_bytes + k / 2 * 64, &quads[k], 4);
      }
    }
  }
}

// 64 keys: [sixteen tokens, block, even or odd, token, 64 indices].
template <int width>
void unpack_keys(const uint32_t* const* words, const Codebook& book, int n, uint8_t* out) {
  const Tables<width> tables(book, 128);
  const Indices<width> indices(n, later(words, tokens));
  const int64_t sixteenth = blocks_of(n) * 2 * tile_bytes;
  for (int j = 0; j < tokens; ++j) {
    uint8_t* to = out + j / 16 * sixteenth + j % 16 * 64;
    for (int block = 0; block < blocks_of(n); ++block, to += 2 * tile_bytes) {
      const __m512i index = indices.of(words[j], block);
      _mm512_store_si512(to, tables.look_up(0, index));
      _mm512_store_si512(to + tile_bytes, tables.look_up(1, index));
    }
  }
}

// The sums of tokens k and k + 8, each of eight rows.
inline __m512i sums_of(const int32_t* found, int k) {
  auto digit = [&](int at) {
    const __m256i a = _mm256_load_si256(reinterpret_cast<const __m256i*>(found + 16 * k + at));
    const __m256i b = _mm256_load_si256(reinterpret_cast<const __m256i*>(found + 16 * (k + 8) + at));
    return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
  };
  return _mm512_add_epi32(_mm512_slli_epi32(digit(0), 8), digit(8));
}

// Sixteen tokens' sums [token, digit, row] as scores of each row.
inline void turn(const int32_t* found, const float* units, float grid, int rows, float* s) {
  __m512i a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i x = sums_of(found, 2 * i), y = sums_of(found, 2 * i + 1);
    a[2 * i] = _mm512_unpacklo_epi32(x, y);
    a[2 * i + 1] = _mm512_unpackhi_epi32(x, y);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13), high = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) {
    if (r == rows) return;
    const __m512i v = _mm512_permutex2var_epi64(b[r % 4], r < 4 ? low : high, b[4 + r % 4]);
    _mm512_storeu_ps(s + r * step, _mm512_mul_ps(_mm512_cvtepi32_ps(v), _mm512_set1_ps(units[r] * grid)));
  }
}

void scores(
    const uint32_t* const* words, int count, const Codebook& book, int n, const Integers& q, int rows,
    uint8_t* room, float* s) {
  const Tiles held(shapes);
  const int steps = blocks_of(n) * 2;
  uint8_t* keys = room + 4 * tile_bytes;
  auto* found = reinterpret_cast<int32_t*>(room);
  for (int from = 0; from < count; from += tokens) {
    with_width(book.width, [&]<int width>() { unpack_keys<width>(words + from, book, n, keys); });
    for (int r = 0; r < rows; r += 8) {
      const int8_t* digits = q.digits + int64_t(r) * 2 * wide(n);
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      for (int k = 0; k < steps; ++k) {
        const uint8_t* x = keys + k * tile_bytes;
        tile_load<4>(digits + k * tile_bytes, 64);
        tile_load<5>(x, 64);
        tile_multiply_signed<0, 5, 4>();
        tile_load<6>(x + steps * tile_bytes, 64);
        tile_multiply_signed<1, 6, 4>();
        tile_load<7>(x + 2 * steps * tile_bytes, 64);
        tile_multiply_signed<2, 7, 4>();
        tile_load<5>(x + 3 * steps * tile_bytes, 64);
        tile_multiply_signed<3, 5, 4>();
      }
      tile_store<0>(found, 64);
      tile_store<1>(found + 256, 64);
      tile_store<2>(found + 512, 64);
      tile_store<3>(found + 768, 64);
      for (int i = 0; i < 4; ++i) {
        turn(found + 256 * i, q.units + r, book.grid, rows - r, s + int64_t(r) * step + from + 16 * i);
      }
    }
  }
}

// A block of 64 values: [quarter, even or odd, quad of tokens, 16 indices, 4 bytes], quads as
// pack_weights has them.
template <int width>
void unpack_values(const uint32_t* const* words, const Codebook& book, int n, int block, uint8_t* out) {
  const Tables<width> tables(book, 128);
  const Indices<width> indices(n, later(words, tokens));
  for (int j = 0; j < 16; ++j) {
    __m512i z[4];
    quads(indices, words + 4 * j, block, z);
    uint8_t* to = out + (j % 4 * 4 + j / 4) * 64;
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      _mm512_store_si512(to + 2 * t * tile_bytes, tables.look_up(0, z[t]));
      _mm512_store_si512(to + (2 * t + 1) * tile_bytes, tables.look_up(1, z[t]));
    }
  }
}

// A row's p * scales as digits: three rows of tiles [64 tokens, row, token], whose quad 4 i + v is
// the (4 v + i)-th.
inline void pack_weights(float* p, const float* scales, int steps, int row, uint8_t* out, float& unit) {
  __m512 tops = _mm512_setzero_ps();
  for (int i = 0; i < steps * tokens; i += W) {
    const __m512 w = _mm512_mul_ps(_mm512_loadu_ps(p + i), _mm512_loadu_ps(scales + i));
    _mm512_storeu_ps(p + i, w);
    tops = _mm512_max_ps(tops, _mm512_abs_ps(w));
  }
  float up;
  unit_of(_mm512_reduce_max_ps(tops), three_digits, up, unit);
  const __m512i half = _mm512_set1_epi32(0x808080), flip = _mm512_set1_epi8(-128);
  const __m512i apart = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  uint8_t* to[3]; // high to low
  for (int d = 0; d < 3; ++d) {
    const int at = 3 * row + d;
    to[d] = out + at / 16 * steps * tile_bytes + at % 16 * 64;
  }
  for (int k = 0; k < steps; ++k, p += tokens) {
    __m512i x[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(p + W * v), _mm512_set1_ps(up)));
      x[v] = _mm512_shuffle_epi8(_mm512_add_epi32(whole, half), apart);
    }
    const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]),
                  c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    _mm512_store_si512(to[0] + k * tile_bytes, _mm512_xor_si512(flip, _mm512_unpacklo_epi64(b, d)));
    _mm512_store_si512(to[1] + k * tile_bytes, _mm512_xor_si512(flip, _mm512_unpackhi_epi64(a, c)));
    _mm512_store_si512(to[2] + k * tile_bytes, _mm512_xor_si512(flip, _mm512_unpacklo_epi64(a, c)));
  }
}

constexpr int sums_row = 128; // integers of a block

// Adds to sums of two tiles of weights, or of one, by two of channels over `steps` times 64 tokens.
template <int weights>
void add(const uint8_t* w, int64_t next, const uint8_t* v, int steps, bool begun, int32_t* sums) {
  constexpr int64_t bytes = sums_row * 4;
  int32_t* below = sums + 16 * sums_row;
  if (begun) {
    tile_load<0>(sums, bytes), tile_load<1>(sums + 16, bytes);
    if constexpr (weights == 2) tile_load<2>(below, bytes), tile_load<3>(below + 16, bytes);
  } else {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  }
  for (int k = 0; k < steps; ++k, w += tile_bytes, v += 8 * tile_bytes) {
    tile_load<4>(w, 64);
    tile_load<6>(v, 64);
    tile_multiply_signed<0, 4, 6>();
    tile_load<7>(v + tile_bytes, 64);
    tile_multiply_signed<1, 4, 7>();
    if constexpr (weights == 2) {
      tile_load<5>(w + next, 64);
      tile_multiply_signed<2, 5, 6>();
      tile_multiply_signed<3, 5, 7>();
    }
  }
  tile_store<0>(sums, bytes), tile_store<1>(sums + 16, bytes);
  if constexpr (weights == 2) tile_store<2>(below, bytes), tile_store<3>(below + 16, bytes);
}

int tiles_of(int rows) {
  return (3 * rows + 15) / 16;
}

void weigh(
    const uint32_t* const* words, int count, const Codebook& book, int n, float* p, const float* scales, int rows,
    uint8_t* room, float* y) {
  const Tiles held(shapes);
  const int all = wide(n), steps = (count + tokens - 1) / tokens, tiles = tiles_of(rows);
  const int64_t next = int64_t(steps) * tile_bytes; // from a tile's weights to the next one's
  uint8_t *weights = room, *values = weights + tiles * next;
  auto* sums = reinterpret_cast<int32_t*>(values + chunk * 8 * tile_bytes);
  auto* units = reinterpret_cast<float*>(sums + tiles * 16 * sums_row);
  for (int r = 0; r < rows; ++r) pack_weights(p + int64_t(r) * step, scales, steps, r, weights, units[r]);
  for (int block = 0; block < blocks_of(n); ++block) {
    for (int from = 0; from < steps; from += chunk) {
      const int here = steps - from < chunk ? steps - from : chunk;
      with_width(book.width, [&]<int width>() {
        for (int k = 0; k < here; ++k) {
          unpack_values<width>(words + (from + k) * tokens, book, n, block, values + k * 8 * tile_bytes);
        }
      });
      for (int t = 0; t < tiles; t += 2) {
        const uint8_t* w = weights + t * next + from * tile_bytes;
        for (int c = 0; c < 8; c += 2) {
          (t + 1 < tiles ? add<2> : add<1>)(
              w, next, values + c * tile_bytes, here, from > 0, sums + t * 16 * sums_row + c * 16);
        }
      }
    }
    for (int r = 0; r < rows; ++r) {
      const int32_t* digits = sums + 3 * r * sums_row;
      const __m512 unit = _mm512_set1_ps(units[r] * book.grid);
      float* to = y + int64_t(r) * all + block * 128;
      for (int i = 0; i < 128; i += W) {
        auto digit = [&](int d) { return _mm512_cvtepi32_ps(_mm512_load_si512(digits + d * sums_row + i)); };
        const __m512 low = _mm512_fmadd_ps(digit(1), _mm512_set1_ps(256.0f), digit(2));
        const __m512 whole = _mm512_fmadd_ps(digit(0), _mm512_set1_ps(65536.0f), low);
        _mm512_storeu_ps(to + i, _mm512_fmadd_ps(whole, unit, _mm512_loadu_ps(to + i)));
      }
    }
  }
}

int64_t room(int rows, int n) {
  const int64_t keys = 4 * tile_bytes + tokens * wide(n);
  const int64_t tiles = tiles_of(rows);
  const int64_t values = tiles * (span / tokens) * tile_bytes + chunk * 8 * tile_bytes + tiles * 16 * sums_row * 4;
  return (keys > values ? keys : values) + rows * 4;
}

} // namespace

const ByteSteps* codes_tiles() {
  static constexpr ByteSteps table = {2, wide, room, pack, scores, weigh, in_order};
  return &table;
}

} // namespace streamer
#else
namespace streamer {

const ByteSteps* codes_tiles() {
  return nullptr;
}

} // namespace streamer
#endif
