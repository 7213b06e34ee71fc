// Codes as 16-bit integers with AVX2 (code_steps.h).
//
// Sixteen products an instruction (vpmaddwd), which here takes a row's two digits as one integer of
// 16 bits. Indices become bytes, laid out so that neighbours in a 32-bit lane are what is summed;
// they are looked up in tables of sixteen (vpshufb), of which the index's upper bits choose one, and
// only then widened. Points are 128 too large, as in codes_vbmi.cpp: sums wrap around, and are right
// when 128 times the sum of a row's integers is taken off.
#if defined(__x86_64__)
#include "codes_madd.h"

namespace streamer {
namespace {

constexpr int block_channels = 64;

int blocks_of(int n) {
  return (n + block_channels - 1) / block_channels;
}

int wide(int n) {
  return blocks_of(n) * block_channels;
}

// Clean indices to bytes, of the first channels and of the second. Points of 8 bits are looked up
// without the highest of them, which turns them round.
template <int width>
class Tables {
 public:
  explicit Tables(const Codebook& book) {
    for (int e = 0; e < 2; ++e) {
      for (int i = 0; i < count; ++i) {
        tables_[e][i] = _mm256_broadcastsi128_si256(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(book.bytes[e] + 16 * i)));
      }
    }
  }
  inline __attribute__((always_inline)) void look_up(__m256i index, __m256i& first, __m256i& second) const {
    const __m256i low = width == 4 ? index : _mm256_and_si256(index, _mm256_set1_epi8(15));
    const __m256i bits[3] = {
        _mm256_slli_epi16(index, 3), _mm256_slli_epi16(index, 2), _mm256_slli_epi16(index, 1)};
    first = choose<count>(tables_[0], low, bits);
    second = choose<count>(tables_[1], low, bits);
    if constexpr (width == 8) {
      const __m256i sign = _mm256_or_si256(index, _mm256_set1_epi8(1));
      first = _mm256_sign_epi8(first, sign);
      second = _mm256_sign_epi8(second, sign);
    }
  }

 private:
  static constexpr int count = width == 8 ? 8 : 1 << (width - 4);

  // Among n tables, by the sign bits of `bits`, the last of which chooses between their halves.
  template <int n>
  static inline __attribute__((always_inline)) __m256i choose(const __m256i* t, __m256i low, const __m256i* bits) {
    if constexpr (n == 1) {
      return _mm256_shuffle_epi8(t[0], low);
    } else {
      constexpr int level = n == 2 ? 0 : n == 4 ? 1 : 2;
      return _mm256_blendv_epi8(choose<n / 2>(t, low, bits), choose<n / 2>(t + n / 2, low, bits), bits[level]);
    }
  }

  __m256i tables_[2][count];
};

// Where in a block's digits a channel is: as unpack_keys lays points out.
inline int place_of(int channel) {
  const int index = channel / 2, k = index / 4, half = index % 2, later = index % 4 / 2;
  return ((2 * k + channel % 2) * 2 + half) * 2 + later;
}

void pack(const float* q, int rows, int n, int8_t* digits, float* units, int32_t* lifts) {
  uint8_t places[block_channels];
  for (int i = 0; i < block_channels; ++i) places[i] = static_cast<uint8_t>(place_of(i));
  auto* to = reinterpret_cast<int16_t*>(digits);
  for (int r = 0; r < rows; ++r, q += n) {
    float up;
    unit_of(top_of(q, n), two_digits, up, units[r]);
    lifts[r] = 0;
    for (int block = 0; block < blocks_of(n); ++block, to += block_channels) {
      float x[block_channels] = {};
      int32_t each[block_channels];
      const int left = n - block * block_channels;
      std::memcpy(x, q + block * block_channels, (left < block_channels ? left : block_channels) * sizeof(float));
      for (int i = 0; i < block_channels; i += W) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(each + i), integers(x + i, up));
      }
      for (int i = 0; i < block_channels; ++i) {
        to[places[i]] = static_cast<int16_t>(each[i]);
        lifts[r] -= 128 * each[i];
      }
    }
  }
}

struct Kernel {
  using V = __m256;
  static constexpr int width = 0, rows = 2, channels = block_channels, bytes = 2, tokens = 32;

  static int wide(int n) {
    return streamer::wide(n);
  }
  static int keys(int n) {
    return wide(n) / 2;
  }

  // Keys for scores: [block, quad of indices, first or second channel, its even or its odd indices,
  // 32 tokens, 2 integers].
  template <int width>
  static void unpack_keys(const uint32_t* const* words, const Codebook& book, int n, uint8_t* out) {
    const Tables<width> tables(book);
    const Indices<width> indices(n, later(words, tokens));
    const __m256i even = _mm256_set1_epi16(255);
    for (int from = 0; from < tokens; from += W) {
      for (int block = 0; block < blocks_of(n); ++block) {
        __m256i v[W];
#pragma GCC unroll 8
        for (int i = 0; i < W; ++i) v[i] = indices.of(words[from + i], block);
        turn(v);
        uint8_t* to = out + block * 2 * block_channels * tokens + from * 4;
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k) {
          __m256i x[2];
          tables.look_up(v[k], x[0], x[1]);
#pragma GCC unroll 2
          for (int e = 0; e < 2; ++e, to += 8 * tokens) {
            put(to, _mm256_and_si256(x[e], even));
            put(to + 4 * tokens, _mm256_srli_epi16(x[e], 8));
          }
        }
      }
    }
  }

  // A block of values for sums: [pair of tokens, eights of each half's indices, first or second
  // channel, fours of these, 4 indices of each half, 2 integers].
  template <int width>
  static void unpack_values(const uint32_t* const* words, const Codebook& book, int n, int block, uint8_t* out) {
    const Tables<width> tables(book);
    const Indices<width> indices(n, later(words, padded));
    const __m256i zero = _mm256_setzero_si256();
    for (int j = 0; j < padded; j += 2) {
      const __m256i a = indices.of(words[j], block), b = indices.of(words[j + 1], block);
      const __m256i z[2] = {_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)};
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        __m256i x[2];
        tables.look_up(z[i], x[0], x[1]);
#pragma GCC unroll 2
        for (int e = 0; e < 2; ++e, out += 64) {
          put(out, _mm256_unpacklo_epi8(x[e], zero));
          put(out + 32, _mm256_unpackhi_epi8(x[e], zero));
        }
      }
    }
  }
  static void pack_weights(const float* p, const float* scales, int8_t* digits, float& unit, int32_t& lift) {
    streamer::pack_weights(p, scales, digits, unit, lift);
  }
  // Sums over `count` steps of four vectors of integers, `stride` bytes from one to the next, times
  // R rows' pairs of integers.
  template <int R>
  static inline __attribute__((always_inline)) void multiply(
      const uint8_t* x, int64_t stride, int count, const int8_t* digits, int64_t row, int64_t, const int32_t* lifts,
      __m256 (&out)[R][4]) {
    __m256i acc[R][4];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc[r][i] = _mm256_set1_epi32(lifts[r]);
    }
    for (int k = 0; k < count; ++k, x += stride, digits += 4) multiply_add<R>(x, digits, row, acc);
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) out[r][i] = _mm256_cvtepi32_ps(acc[r][i]);
    }
  }
};

void in_order(const float* y, int n, float* out) {
  for (int i = 0; i < n / 2; ++i) {
    const int block = i / block_indices, high = i % block_indices / 16, eight = i % 16 / 8, four = i % 8 / 4;
    const float* from = y + block * block_channels + 32 * eight + 8 * four + 4 * high + i % 4;
    out[2 * i] = from[0];
    out[2 * i + 1] = from[16];
  }
}
} // namespace

const ByteSteps& codes_madd() {
  static constexpr ByteSteps table = {
      2, wide, room_by<Kernel>, pack, scores_by<Kernel>, weigh_by<Kernel>, in_order};
  return table;
}

} // namespace streamer
#endif
