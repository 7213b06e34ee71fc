// rows.h with AVX-512 (F, BW, VL, DQ): sixteen lanes, nibbles by table.
#if defined(__x86_64__)
#include <immintrin.h>

#include "rows_impl.h"

namespace streamer {
namespace {

struct Avx512 {
  static constexpr int W = 16;
  static constexpr int max_block = 4;
  static constexpr int block(int M) {
    return M <= 2 ? 4 : M <= 4 ? 3 : 2;
  }
  using F = __m512;
  struct Nibbles {
    __m512i words;
    __m512 table;
  };

  static F zero() {
    return _mm512_setzero_ps();
  }
  static F set1(float a) {
    return _mm512_set1_ps(a);
  }
  static F load(const float* p) {
    return _mm512_loadu_ps(p);
  }
  static void store(float* p, F a) {
    _mm512_storeu_ps(p, a);
  }
  static F add(F a, F b) {
    return _mm512_add_ps(a, b);
  }
  static F mul(F a, F b) {
    return _mm512_mul_ps(a, b);
  }
  static F fma(F a, F b, F c) {
    return _mm512_fmadd_ps(a, b, c);
  }
  static float sum(F a) {
    __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
  }
  static F wide(const void* base, Scale type, int64_t index) {
    if (type == Scale::f32) return load(static_cast<const float*>(base) + index);
    __m256i half = _mm256_loadu_si256(
        reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(base) + index));
    if (type == Scale::f16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static F bytes(const uint8_t* p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }

  static __m512i words(const uint32_t* p) {
    return _mm512_loadu_si512(p);
  }
  static __m512i words(const uint32_t* p, int64_t count) {
    return _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << count) - 1), p);
  }
  static __m512 table(const int8_t* values) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values))));
  }
  static Nibbles split(__m512i words, __m512 table) {
    return {words, table};
  }
  template <int J>
  static F nibble(const Nibbles& q) {
    // The permutation reads the low four bits of each lane.
    return _mm512_permutexvar_ps(J == 0 ? q.words : _mm512_srli_epi32(q.words, 4 * J), q.table);
  }
  static __m512i lanes(int per_group) {
    const __m512i lane =
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_srli_epi32(lane, per_group == 4 ? 2 : per_group == 8 ? 3 : 4);
  }
  static F spread(const float* s, __m512i lanes) {
    return _mm512_permutexvar_ps(lanes, load(s));
  }
  static void interleave(const float* from, float* to, int64_t stride) {
    const __m512i every =
        _mm512_set_epi32(120, 112, 104, 96, 88, 80, 72, 64, 56, 48, 40, 32, 24, 16, 8, 0);
    for (int j = 0; j < 8; ++j) store(to + j * stride, _mm512_i32gather_ps(every, from + j, 4));
  }
};

} // namespace

const Rows& rows_avx512() {
  static constexpr Rows table = table_of<Avx512>();
  return table;
}

} // namespace streamer
#endif
