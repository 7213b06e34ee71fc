// Codes of 8 bits as integers with AVX2 (code_steps.h): a channel is one level of 13 bits, signed.
//
// Sixteen products an instruction (vpmaddwd), where two digits of a level would be two. Eight of these
// sums stay in 32 bits; then they become floats, in an order of their own. A level is computed from
// its piece, of which sixteen fit a table of vpshufb: half the work of looking 256 up.
#if defined(__x86_64__)
#include "codes_madd.h"

namespace streamer {
namespace {

constexpr int most_sums = 8;
static_assert(2.0 * most_sums * two_digits * top_level < 2147483648.0);

int wide(int n) {
  return (n + block_indices - 1) / block_indices * block_indices;
}

// Indices to levels.
class Levels {
 public:
  explicit Levels(const Pieces& pieces)
      : low_(table(pieces.low)), high_(table(pieces.high)), slope_(table(pieces.slope)),
        bent_(table(pieces.bent)) {
    uint8_t bends[16] = {};
    std::memcpy(bends, bend, sizeof bend);
    bend_ = table(bends);
  }
  // Of each half's sixteen indices the first eight's to a, the others' to b.
  inline __attribute__((always_inline)) void look_up(__m256i index, __m256i& a, __m256i& b) const {
    // a lower level is the negative of an upper one
    const __m256i lower = _mm256_cmpgt_epi8(index, _mm256_set1_epi8(-1));
    const __m256i upper = _mm256_xor_si256(index, lower);
    const __m256i piece = _mm256_and_si256(_mm256_srli_epi16(upper, 3), _mm256_set1_epi8(15));
    const __m256i at = _mm256_and_si256(upper, _mm256_set1_epi8(7));
    const __m256i low = _mm256_shuffle_epi8(low_, piece), high = _mm256_shuffle_epi8(high_, piece);
    const __m256i slope = _mm256_shuffle_epi8(slope_, piece), bent = _mm256_shuffle_epi8(bent_, piece);
    const __m256i bends = _mm256_shuffle_epi8(bend_, at);
    const __m256i sign = _mm256_or_si256(lower, _mm256_set1_epi8(1));
    a = _mm256_add_epi16(
        _mm256_unpacklo_epi8(low, high),
        _mm256_maddubs_epi16(_mm256_unpacklo_epi8(at, bends), _mm256_unpacklo_epi8(slope, bent)));
    b = _mm256_add_epi16(
        _mm256_unpackhi_epi8(low, high),
        _mm256_maddubs_epi16(_mm256_unpackhi_epi8(at, bends), _mm256_unpackhi_epi8(slope, bent)));
    a = _mm256_sign_epi16(a, _mm256_unpacklo_epi8(sign, sign));
    b = _mm256_sign_epi16(b, _mm256_unpackhi_epi8(sign, sign));
  }

 private:
  static __m256i table(const void* sixteen) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(sixteen)));
  }

  __m256i low_, high_, slope_, bent_, bend_;
};

void pack(const float* q, int rows, int n, int8_t* digits, float* units, int32_t* lifts) {
  auto* to = reinterpret_cast<int16_t*>(digits);
  for (int r = 0; r < rows; ++r, q += n) {
    float up;
    unit_of(top_of(q, n), two_digits, up, units[r]);
    lifts[r] = 0;
    for (int block = 0; block < wide(n); block += 2 * W, to += 2 * W) {
      float x[2 * W] = {};
      const int left = n - block;
      if (left > 0) std::memcpy(x, q + block, (left < 2 * W ? left : 2 * W) * sizeof(float));
      const __m256i sixteen = narrow(integers(x, up), integers(x + W, up));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), sixteen);
    }
  }
}

struct Kernel {
  using V = __m256;
  static constexpr int width = 8, rows = 2, channels = block_indices, bytes = 2, tokens = 32;

  static int wide(int n) {
    return streamer::wide(n);
  }
  static int keys(int n) {
    return wide(n) / 2;
  }

  // Keys for scores: [pair of channels, 32 tokens, 2 integers].
  template <int width>
  static void unpack_keys(const uint32_t* const* words, const Codebook& book, int n, uint8_t* out) {
    const Levels levels(book.pieces);
    const Indices<width> indices(2 * n, later(words, tokens));
    // of four tokens first the first pairs, then the second ones
    const __m256i pairs = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    for (int from = 0; from < tokens; from += W) {
      for (int block = 0; block < wide(n) / block_indices; ++block) {
        __m256i v[W];
#pragma GCC unroll 8
        for (int i = 0; i < W; ++i) v[i] = indices.of(words[from + i], block);
        turn(v);
        uint8_t* to = out + block * 2 * block_indices * tokens + from * 4;
#pragma GCC unroll 8
        for (int k = 0; k < W; ++k, to += 8 * tokens) {
          __m256i a, b;
          levels.look_up(_mm256_shuffle_epi8(v[k], pairs), a, b);
          put(to, a);
          put(to + 4 * tokens, b);
        }
      }
    }
  }

  // A block of values for sums: [pair of tokens, eights of each half's indices, fours of these, 4
  // indices of each half, 2 integers].
  template <int width>
  static void unpack_values(const uint32_t* const* words, const Codebook& book, int n, int block, uint8_t* out) {
    const Levels levels(book.pieces);
    const Indices<width> indices(2 * n, later(words, padded));
    for (int j = 0; j < padded; j += 2, out += 4 * channels) {
      const __m256i x = indices.of(words[j], block), y = indices.of(words[j + 1], block);
      __m256i a, b;
      levels.look_up(_mm256_unpacklo_epi8(x, y), a, b);
      put(out, a);
      put(out + 32, b);
      levels.look_up(_mm256_unpackhi_epi8(x, y), a, b);
      put(out + 64, a);
      put(out + 96, b);
    }
  }
  static void pack_weights(const float* p, const float* scales, int8_t* digits, float& unit, int32_t& lift) {
    streamer::pack_weights(p, scales, digits, unit, lift);
  }
  // Sums over `count` steps, a multiple of most_sums, of four vectors of integers, `stride` bytes from
  // one to the next, times R rows' pairs of integers.
  template <int R>
  static inline __attribute__((always_inline)) void multiply(
      const uint8_t* x, int64_t stride, int count, const int8_t* digits, int64_t row, int64_t, const int32_t*,
      __m256 (&out)[R][4]) {
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) out[r][i] = _mm256_setzero_ps();
    }
    for (int k = 0; k < count; k += most_sums) {
      __m256i acc[R][4] = {};
      for (int step = 0; step < most_sums; ++step, x += stride, digits += 4) multiply_add<R>(x, digits, row, acc);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) out[r][i] = _mm256_add_ps(out[r][i], _mm256_cvtepi32_ps(acc[r][i]));
      }
    }
  }
};

void in_order(const float* y, int n, float* out) {
  for (int i = 0; i < n; ++i) {
    const int block = i / block_indices, high = i % block_indices / 16, four = i % 16 / 4;
    out[i] = y[block * block_indices + 8 * four + 4 * high + i % 4];
  }
}

} // namespace

const ByteSteps& codes_levels() {
  static constexpr ByteSteps table = {
      1, wide, room_by<Kernel>, pack, scores_by<Kernel>, weigh_by<Kernel>, in_order};
  return table;
}

} // namespace streamer
#endif
