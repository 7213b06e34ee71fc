// rows.h with AVX2, FMA, F16C and BMI2: eight lanes.
#if defined(__x86_64__)
#include <immintrin.h>

#include "rows_impl.h"

namespace streamer {
namespace {

struct Avx2 {
  static constexpr int W = 8;
  static constexpr int max_block = 4;
  static constexpr int block(int M) {
    return M <= 2 ? 4 : M <= 4 ? 2 : 1;
  }
  using F = __m256;
  struct Nibbles {
    __m256i low, high; // nibbles 0, 2, 4, 6 and 1, 3, 5, 7 as signed bytes
  };

  static F zero() {
    return _mm256_setzero_ps();
  }
  static F set1(float a) {
    return _mm256_set1_ps(a);
  }
  static F load(const float* p) {
    return _mm256_loadu_ps(p);
  }
  static void store(float* p, F a) {
    _mm256_storeu_ps(p, a);
  }
  static F add(F a, F b) {
    return _mm256_add_ps(a, b);
  }
  static F mul(F a, F b) {
    return _mm256_mul_ps(a, b);
  }
  static F fma(F a, F b, F c) {
    return _mm256_fmadd_ps(a, b, c);
  }
  static float sum(F a) {
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
  }
  static F wide(const void* base, Scale type, int64_t index) {
    if (type == Scale::f32) return load(static_cast<const float*>(base) + index);
    __m128i half = _mm_loadu_si128(
        reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(base) + index));
    if (type == Scale::f16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static F bytes(const uint8_t* p) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }

  static __m256i words(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static __m256i words(const uint32_t* p, int64_t count) {
    const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
    return _mm256_maskload_epi32(reinterpret_cast<const int*>(p), mask);
  }
  static __m256i table(const int8_t* values) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  }
  static Nibbles split(__m256i words, __m256i table) {
    const __m256i low = _mm256_set1_epi8(15);
    return {
        _mm256_shuffle_epi8(table, _mm256_and_si256(words, low)),
        _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi32(words, 4), low))};
  }
  template <int J>
  static F nibble(const Nibbles& q) {
    __m256i four = J % 2 == 0 ? q.low : q.high;
    if (J / 2 < 3) four = _mm256_slli_epi32(four, 24 - J / 2 * 8);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(four, 24));
  }
  static __m256i lanes(int per_group) {
    const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    return _mm256_srli_epi32(lane, per_group == 4 ? 2 : 3);
  }
  static F spread(const float* s, __m256i lanes) {
    return _mm256_permutevar8x32_ps(load(s), lanes);
  }
  static void interleave(const float* from, float* to, int64_t stride) {
    const __m256i every = _mm256_set_epi32(56, 48, 40, 32, 24, 16, 8, 0);
    for (int j = 0; j < 8; ++j) store(to + j * stride, _mm256_i32gather_ps(from + j, every, 4));
  }
};

} // namespace

const Rows& rows_avx2() {
  static constexpr Rows table = table_of<Avx2>();
  return table;
}

} // namespace streamer
#endif
