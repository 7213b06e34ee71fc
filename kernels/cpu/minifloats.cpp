#include "minifloats.h"

#include <array>

#include "isa.h"
#include "unpack.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace streamer {
namespace {

// What each e4m3 code stands for: four bits of exponent, three of fraction; the last is no number.
constexpr std::array<float, 256> e4m3 = [] {
  std::array<float, 256> values{};
  for (int code = 0; code < 256; ++code) {
    const int exponent = code >> 3 & 15, fraction = code & 7;
    float value = (exponent > 0 ? 8 + fraction : fraction) * 0x1p-9f;
    for (int i = 1; i < exponent; ++i) value *= 2;
    if ((code & 0x7f) == 0x7f) value = __builtin_nanf("");
    values[code] = code < 128 ? value : -value;
  }
  return values;
}();

void group_of_mxfp8(const uint8_t* q, uint8_t scale, float* to) {
  const float s = from_bits(scale > 0 ? uint32_t(scale) << 23 : 0x00400000u);
  for (int i = 0; i < 32; ++i) to[i] = e4m3[q[i]] * s;
}

void group_of_nvfp4(const uint8_t* q, uint8_t scale, float* to) {
  const float s = e4m3[scale] * 0.5f;
  for (int i = 0; i < 8; ++i) {
    to[2 * i] = fp4_halves[q[i] & 15] * s;
    to[2 * i + 1] = fp4_halves[q[i] >> 4] * s;
  }
}

#if defined(__x86_64__)
// A code whose bits are put in a float's place is that float by 2^120, which the scale makes good.
__attribute__((target("avx2"))) void groups_of_mxfp8(
    const uint8_t* q, const uint8_t* scales, int64_t groups, float* to) {
  const __m256i last = _mm256_set1_epi8(0x7f), kept = _mm256_set1_epi32(0x87f00000);
  for (int64_t g = 0; g < groups; ++g, q += 32, to += 32) {
    const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
    const __m256i none = _mm256_cmpeq_epi8(_mm256_and_si256(all, last), last);
    if (scales[g] > 134 || !_mm256_testz_si256(none, none)) {
      group_of_mxfp8(q, scales[g], to);
      continue;
    }
    const __m256 s = _mm256_castsi256_ps(_mm256_set1_epi32((scales[g] + 120) << 23));
#pragma GCC unroll 4
    for (int i = 0; i < 32; i += 8) {
      const __m256i code = _mm256_cvtepi8_epi32(
          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(q + i)));
      const __m256i bits = _mm256_and_si256(_mm256_slli_epi32(code, 20), kept);
      _mm256_store_ps(to + i, _mm256_mul_ps(_mm256_castsi256_ps(bits), s));
    }
  }
}

__attribute__((target("avx2"))) void groups_of_nvfp4(
    const uint8_t* q, const uint8_t* scales, int64_t groups, float* to) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(fp4_halves));
  const __m128i nibble = _mm_set1_epi8(15);
  for (int64_t g = 0; g < groups; ++g, q += 8, to += 16) {
    const __m256 s = _mm256_set1_ps(e4m3[scales[g]] * 0.5f);
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(q));
    const __m128i both = _mm_unpacklo_epi8(
        _mm_and_si128(codes, nibble), _mm_and_si128(_mm_srli_epi16(codes, 4), nibble));
    const __m128i w = _mm_shuffle_epi8(halves, both), high = _mm_srli_si128(w, 8);
    _mm256_store_ps(to, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(w)), s));
    _mm256_store_ps(to + 8, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high)), s));
  }
}
#endif

} // namespace

void widen_rows(const Matrix& A, int64_t begin, int64_t end, float* to) {
  const int64_t bytes = int64_t(A.K) * A.bits / 8, each = A.K / A.group;
  const auto* q = static_cast<const uint8_t*>(A.w) + begin * bytes;
  const auto* scales = static_cast<const uint8_t*>(A.scales) + begin * each;
  const int64_t groups = (end - begin) * each;
#if defined(__x86_64__)
  if (level() != Level::portable) {
    return A.format == Format::mxfp8 ? groups_of_mxfp8(q, scales, groups, to)
                                     : groups_of_nvfp4(q, scales, groups, to);
  }
#endif
  const int64_t step = A.group * A.bits / 8;
  for (int64_t g = 0; g < groups; ++g) {
    if (A.format == Format::mxfp8) {
      group_of_mxfp8(q + g * step, scales[g], to + g * A.group);
    } else {
      group_of_nvfp4(q + g * step, scales[g], to + g * A.group);
    }
  }
}

} // namespace streamer
