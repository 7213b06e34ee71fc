// narrow256.h with AVX2 alone.
#if defined(__x86_64__)
#include "narrow256.h"

namespace streamer {
namespace {

// Six independent sums, as many as registers hold; seven multiplications make the products of 64
// weights.
float peak(int rounds, int start) {
  __m256i w[3], sums[6];
#pragma GCC unroll 6
  for (int i = 0; i < 6; ++i) {
    w[i % 3] = _mm256_set1_epi16(static_cast<short>(start + i));
    sums[i] = _mm256_setzero_si256();
  }
  const __m256i x[2] = {_mm256_set1_epi16(3), _mm256_set1_epi16(5)};
  for (int round = 0; round < rounds; ++round) {
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
      sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(w[i % 3], x[i / 3]));
    }
    // Or products would be made once.
    asm volatile("" : "+x"(w[0]), "+x"(w[1]), "+x"(w[2]));
  }
#pragma GCC unroll 6
  for (int i = 1; i < 6; ++i) sums[0] = _mm256_add_epi32(sums[0], sums[i]);
  return static_cast<float>(_mm256_extract_epi32(sums[0], 0));
}

} // namespace

const Rows& rows_maddubs() {
  static constexpr Rows table = {packed, scratch, pack, run, swiglu, silu, peak, 6 * 64 / 7};
  return table;
}

} // namespace streamer
#endif
