// narrow256.h with AVX2: weights of 4 bits. Fifteen operations make the products of 64 weights and
// a row; three digits of 8 bits would take 18.
#if defined(__x86_64__)
#include "narrow256.h"

namespace streamer {
namespace {

bool known(const Matrix& A) {
  return A.format == Format::affine && A.bits == 4;
}

inline __m256i Nibbles::integers(const uint8_t* x) const {
  const auto* from = reinterpret_cast<const __m256i*>(x);
  const __m256i a = _mm256_add_epi32(
      _mm256_madd_epi16(quarters[0], _mm256_load_si256(from)),
      _mm256_madd_epi16(quarters[1], _mm256_load_si256(from + 1)));
  const __m256i b = _mm256_add_epi32(
      _mm256_madd_epi16(quarters[2], _mm256_load_si256(from + 2)),
      _mm256_madd_epi16(quarters[3], _mm256_load_si256(from + 3)));
  const __m256i l = _mm256_add_epi16(
      _mm256_maddubs_epi16(even, _mm256_load_si256(from + 4)),
      _mm256_maddubs_epi16(odd, _mm256_load_si256(from + 5)));
  return _mm256_add_epi32(
      _mm256_add_epi32(a, b), _mm256_madd_epi16(l, _mm256_set1_epi16(1)));
}

void pack(const Matrix& A, int M, const float* const* x, float* out) {
  if (!known(A)) return rows_avx2().pack(A, M, x, out);
  A.levels ? pack_rows<Levels>(A, M, x, out) : pack_rows<Nibbles>(A, M, x, out);
}

void run(
    const Matrix& A, int M, const float* packed, float* scratch, float* const* y, int begin,
    int end) {
  if (!known(A)) return rows_avx2().run(A, M, packed, scratch, y, begin, end);
  A.levels ? run_all<Levels>(A, M, packed, scratch, y, begin, end)
           : run_all<Nibbles>(A, M, packed, scratch, y, begin, end);
}

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
  static constexpr Rows table = {packed, scratch, pack, run, swiglu, silu, peak, 6 * 64 / 7, true};
  return table;
}

} // namespace streamer
#endif
