// narrow256.h with AVX-VNNI: weights of 4 and 8 bits. Nine operations make the products of 64
// weights of 4 bits and a row, the very bits of AVX2's; with 8 bits, three digits of x, it is twelve.
//
// STREAMER_EMULATE_VNNI makes of AVX2 what the instructions do, to test on CPUs without them.
#include "rows.h"

#if defined(__AVXVNNI__) || defined(STREAMER_EMULATE_VNNI)
#include "narrow256.h"

namespace streamer {
namespace {

#if defined(STREAMER_EMULATE_VNNI)
inline __m256i add_halves(__m256i sum, __m256i w, __m256i x) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(w, x));
}

inline __m256i add_bytes(__m256i sum, __m256i w, __m256i x) {
  const __m256i even = _mm256_and_si256(w, _mm256_set1_epi16(255));
  const __m256i odd = _mm256_srli_epi16(w, 8);
  sum = add_halves(sum, even, _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  return add_halves(sum, odd, _mm256_srai_epi16(x, 8));
}
#else
// sum + the products of each lane's half-words, signed ones.
inline __m256i add_halves(__m256i sum, __m256i w, __m256i x) {
  return _mm256_dpwssd_avx_epi32(sum, w, x);
}

// sum + the products of each lane's bytes, unsigned ones of w and signed ones of x.
inline __m256i add_bytes(__m256i sum, __m256i w, __m256i x) {
  return _mm256_dpbusd_avx_epi32(sum, w, x);
}
#endif

bool known(const Matrix& A) {
  return A.format == Format::affine && (A.bits == 4 || A.bits == 8);
}

inline __m256i Nibbles::integers(const uint8_t* x) const {
  const auto* from = reinterpret_cast<const __m256i*>(x);
  __m256i sum = add_bytes(_mm256_setzero_si256(), even, _mm256_load_si256(from + 4));
  sum = add_bytes(sum, odd, _mm256_load_si256(from + 5));
  for (int i = 0; i < 4; ++i) sum = add_halves(sum, quarters[i], _mm256_load_si256(from + i));
  return sum;
}

// 64 weights of 8 bits: 32 of each half of a vector, four and the sixteenth from there in a lane.
// They meet three signed bytes of x, h, m and l: x = unit * (2^16 h + 2^8 m + l).
struct Bytes {
  static constexpr int64_t bytes = 64, block = block_bytes(false); // of weights, of x
  static constexpr bool biases = true; // whether the matrix has any

  __m256i fore, hind;

  // A block's, or with `part` the first half of one.
  static inline __attribute__((always_inline)) Bytes at(const uint8_t* from, bool part) {
    const auto* all = reinterpret_cast<const __m128i*>(from);
    auto both = [&](int i) __attribute__((always_inline)) {
      const __m256i half = _mm256_zextsi128_si256(_mm_loadu_si128(all + i));
      return part ? half : _mm256_inserti128_si256(half, _mm_loadu_si128(all + i + 2), 1);
    };
    return {both(0), both(1)};
  }

  // Weights are at most 255: sums are below 255 * 8 * 2^15 of h and m, 255 * 8 * 2^7 of l.
  __m256 times(const uint8_t* x) const {
    const auto* from = reinterpret_cast<const __m256i*>(x);
    auto add = [&](__m256i sum, int i) __attribute__((always_inline)) {
      sum = add_bytes(sum, fore, _mm256_load_si256(from + i));
      return add_bytes(sum, hind, _mm256_load_si256(from + i + 1));
    };
    const __m256i high = add(_mm256_slli_epi32(add(_mm256_setzero_si256(), 0), 8), 2);
    const __m256 low = _mm256_cvtepi32_ps(add(_mm256_setzero_si256(), 4));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), _mm256_set1_ps(256.0f), low);
  }

  // One block of one row of x, zeros after `count`, and its lanes' sums.
  static __m256 pack(const float* x, int64_t count, uint8_t* out) {
    alignas(32) float ordered[columns];
    for (int i = 0; i < columns; i += 4) {
      const __m128 four = i < count ? _mm_loadu_ps(x + i) : _mm_setzero_ps();
      _mm_store_ps(ordered + (i & 32) + (i & 12) * 2 + (i & 16) / 4, four);
    }
    float* units = reinterpret_cast<float*>(out + 192);
    __m256i q[8];
    fixed(ordered, q, units);
    auto* to = reinterpret_cast<__m256i*>(out);
    for (int digit = 2; digit >= 0; --digit) {
      const __m256 a = _mm256_castsi256_ps(lowest(q)), b = _mm256_castsi256_ps(lowest(q + 4));
      const __m256i fore = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));
      const __m256i hind = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd));
      _mm256_store_si256(to + 2 * digit, _mm256_permute4x64_epi64(fore, 0xd8));
      _mm256_store_si256(to + 2 * digit + 1, _mm256_permute4x64_epi64(hind, 0xd8));
      const __m256i half = _mm256_set1_epi32(128);
      for (__m256i& one : q) one = _mm256_srai_epi32(_mm256_add_epi32(one, half), 8);
    }
    const __m256i one = _mm256_set1_epi8(1);
    return _mm256_mul_ps(Bytes{one, one}.times(out), _mm256_load_ps(units));
  }
};

void pack(const Matrix& A, int M, const float* const* x, float* out) {
  if (!known(A)) return rows_avx2().pack(A, M, x, out);
  if (A.levels) return pack_rows<Levels>(A, M, x, out);
  A.bits == 4 ? pack_rows<Nibbles>(A, M, x, out) : pack_rows<Bytes>(A, M, x, out);
}

void run(
    const Matrix& A, int M, const float* packed, float* scratch, float* const* y, int begin,
    int end) {
  if (!known(A)) return rows_avx2().run(A, M, packed, scratch, y, begin, end);
  if (A.levels) return run_all<Levels>(A, M, packed, scratch, y, begin, end);
  A.bits == 4 ? run_all<Nibbles>(A, M, packed, scratch, y, begin, end)
              : run_all<Bytes>(A, M, packed, scratch, y, begin, end);
}

// Twelve independent sums; six operations make the products of 64 weights.
float peak(int rounds, int start) {
  __m256i w = _mm256_set1_epi8(static_cast<char>(start)), sums[12];
#pragma GCC unroll 12
  for (int i = 0; i < 12; ++i) sums[i] = _mm256_set1_epi32(start + i); // alike, they would be one
  const __m256i x = _mm256_set1_epi8(3);
  for (int round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) sums[i] = add_bytes(sums[i], w, x);
    asm volatile("" : "+x"(w)); // or rounds would be added up
  }
#pragma GCC unroll 12
  for (int i = 1; i < 12; ++i) sums[0] = _mm256_add_epi32(sums[0], sums[i]);
  return static_cast<float>(_mm256_extract_epi32(sums[0], 0));
}

} // namespace

const Rows* rows_avxvnni() {
  static constexpr Rows table = {
      packed, scratch, pack, run, swiglu, silu, peak, 12 * 64 / 6, true};
  return &table;
}

} // namespace streamer
#else
namespace streamer {

const Rows* rows_avxvnni() {
  return nullptr;
}

} // namespace streamer
#endif
