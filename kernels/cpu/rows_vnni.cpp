// rows.h with AVX-512 VNNI: affine weights of 4 and 8 bits as the bytes they are, against x in
// fixed point; everything else as with AVX-512.
//
// Every lane holds a few neighbours of x as integers of 24 bits beside one power of two, cut into
// three signed bytes: x = unit * (2^16 h + 2^8 m + l). Products of bytes are summed exactly, so the
// only roundings are that of x, to 2^-23 of the largest neighbour, and those of the lanes' sums.
#if defined(__x86_64__)
#include <immintrin.h>

#include "rows.h"
#include "wide512.h"

namespace streamer {
namespace {

constexpr int64_t fetched = 6144; // bytes of weights between those in use and those asked for

// A block is 64 bytes of weights. Per row of x it holds, from these bytes on, digits h, m, l of what
// they meet, a byte each (4 bits: 64 of the even ones, then of the odd ones), sixteen units, and
// what the weights' middle makes of each lane's h, negative: sums begin with it, as large ones would
// cancel only at the end. What it makes of m and l, which are small, is packed by group beside the
// sums of x.
template <int bits>
struct Block {
  static constexpr int64_t columns = bits == 4 ? 128 : 64;
  static constexpr int64_t h = 0, m = columns, l = 2 * columns, units = 3 * columns,
                           begins = units + 64, bytes = begins + 64;
};

struct Layout {
  int64_t K, G, columns, blocks, bytes, sums;

  explicit Layout(const Matrix& A)
      : K(A.K),
        G(A.K / A.group),
        columns(A.bits == 4 ? Block<4>::columns : Block<8>::columns),
        blocks((A.K + columns - 1) / columns),
        bytes(A.bits == 4 ? Block<4>::bytes : Block<8>::bytes),
        sums((G + W - 1) / W * W) {}
};

bool known(const Matrix& A) {
  return A.format == Format::affine && (A.bits == 4 || A.bits == 8);
}

// The powers of two that bring each group of `lanes` neighbours below 2^23 and back.
template <int lanes>
inline void unit(__m512 x, __m512& up, __m512& down) {
  __m512i bits = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
  bits = _mm512_max_epi32(bits, _mm512_shuffle_epi32(bits, _MM_PERM_CDAB));
  bits = _mm512_max_epi32(bits, _mm512_shuffle_epi32(bits, _MM_PERM_BADC));
  if (lanes == 8) {
    bits = _mm512_max_epi32(bits, _mm512_shuffle_i32x4(bits, bits, _MM_SHUFFLE(2, 3, 0, 1)));
  }
  // Half a digit is added to the largest value: from 0x7f7f80 on the third digit would not fit.
  const __m512i top = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffff));
  const __mmask16 full = _mm512_cmpgt_epi32_mask(top, _mm512_set1_epi32(0x7e0000));
  __m512i exponent = _mm512_srli_epi32(bits, 23);
  exponent = _mm512_mask_add_epi32(exponent, full, exponent, _mm512_set1_epi32(1));
  exponent = _mm512_max_epi32(exponent, _mm512_set1_epi32(32));
  // x < 2^(exponent - 126), and 22 bits more are kept.
  const __m512i back = _mm512_sub_epi32(exponent, _mm512_set1_epi32(22));
  const __m512i there = _mm512_sub_epi32(_mm512_set1_epi32(254), back);
  up = _mm512_castsi512_ps(_mm512_slli_epi32(there, 23));
  down = _mm512_castsi512_ps(_mm512_slli_epi32(back, 23));
  const __mmask16 wild = _mm512_cmpgt_epi32_mask(bits, _mm512_set1_epi32(0x7f7fffff));
  down = _mm512_mask_mov_ps(down, wild, _mm512_set1_ps(__builtin_nanf("")));
}

// Sixteen values as integers, and their digits as bytes.
inline void digits(__m512 x, __m512 up, __m128i* h, __m128i* m, __m128i* l) {
  const __m512i half = _mm512_set1_epi32(128);
  const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(x, up));
  const __m512i r = _mm512_srai_epi32(_mm512_add_epi32(q, half), 8);
  const __m512i s = _mm512_srai_epi32(_mm512_add_epi32(r, half), 8);
  _mm_store_si128(l, _mm512_cvtepi32_epi8(q));
  _mm_store_si128(m, _mm512_cvtepi32_epi8(r));
  _mm_store_si128(h, _mm512_cvtepi32_epi8(s));
}

inline __m512i dot(__m512i acc, __m512i w, const uint8_t* x) {
  return _mm512_dpbusd_epi32(acc, w, _mm512_load_si512(x));
}

// Sum over a lane's digits times w, as the integers that they stand for; of h from the middle on.
inline __m512 whole4(__m512i low, __m512i high, const uint8_t* x) {
  using At = Block<4>;
  __m512i a = dot(dot(_mm512_load_si512(x + At::begins), low, x + At::h), high, x + At::h + 64);
  a = dot(dot(_mm512_slli_epi32(a, 8), low, x + At::m), high, x + At::m + 64);
  a = dot(dot(_mm512_slli_epi32(a, 8), low, x + At::l), high, x + At::l + 64);
  return _mm512_cvtepi32_ps(a); // below 15 * 8 * 2^23
}

inline __m512 whole8(__m512i w, const uint8_t* x) {
  using At = Block<8>;
  __m512i a = dot(_mm512_load_si512(x + At::begins), w, x + At::h);
  a = dot(_mm512_slli_epi32(a, 8), w, x + At::m);
  const __m512i b = dot(_mm512_setzero_si512(), w, x + At::l);
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(a), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(b));
}

// One block of one row, and its lanes' sums: of x, and of what m and l stand for.
void pack_block(
    const float* x, int64_t count, int bits, int middle, uint8_t* out, __m512& sum, __m512& low) {
  const int vectors = bits == 4 ? 8 : 4;
  alignas(64) uint8_t natural[3][128];
  float* units = reinterpret_cast<float*>(out + (bits == 4 ? Block<4>::units : Block<8>::units));
  for (int i = 0; i < vectors; ++i) {
    const int64_t left = count - W * i;
    const __mmask16 some = left >= W ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
    const __m512 v = _mm512_maskz_loadu_ps(some, x + W * i);
    __m512 up, down;
    if (bits == 4) {
      unit<8>(v, up, down);
      units[2 * i] = _mm512_cvtss_f32(down);
      units[2 * i + 1] = _mm_cvtss_f32(_mm512_extractf32x4_ps(down, 2));
    } else {
      unit<4>(v, up, down);
      const __m512i every = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
      _mm_store_ps(units + 4 * i, _mm512_castps512_ps128(_mm512_permutexvar_ps(every, down)));
    }
    digits(v, up, reinterpret_cast<__m128i*>(natural[0] + W * i),
           reinterpret_cast<__m128i*>(natural[1] + W * i),
           reinterpret_cast<__m128i*>(natural[2] + W * i));
  }
  const __m512i one = _mm512_set1_epi8(1);
  for (int d = 0; d < 3; ++d) {
    const __m512i first = _mm512_load_si512(natural[d]);
    if (bits == 8) {
      _mm512_store_si512(out + Block<8>::columns * d, first);
      continue;
    }
    const __m512i second = _mm512_load_si512(natural[d] + 64);
    auto* to = reinterpret_cast<__m256i*>(out + Block<4>::columns * d);
    _mm256_store_si256(to, _mm512_cvtepi16_epi8(first));
    _mm256_store_si256(to + 1, _mm512_cvtepi16_epi8(second));
    _mm256_store_si256(to + 2, _mm512_cvtepi16_epi8(_mm512_srli_epi16(first, 8)));
    _mm256_store_si256(to + 3, _mm512_cvtepi16_epi8(_mm512_srli_epi16(second, 8)));
  }
  __m512i sums[3]; // of the digits
  for (int d = 0; d < 3; ++d) {
    const uint8_t* from = out + (bits == 4 ? Block<4>::columns : Block<8>::columns) * d;
    sums[d] = dot(_mm512_setzero_si512(), one, from);
    if (bits == 4) sums[d] = dot(sums[d], one, from + 64);
  }
  _mm512_store_si512(
      units + W, _mm512_mullo_epi32(sums[0], _mm512_set1_epi32(-middle)));
  const __m512i rest = _mm512_add_epi32(_mm512_slli_epi32(sums[1], 8), sums[2]);
  const __m512i all = _mm512_add_epi32(_mm512_slli_epi32(sums[0], 16), rest);
  const __m512 unit = _mm512_load_ps(units);
  sum = _mm512_mul_ps(_mm512_cvtepi32_ps(all), unit);
  low = _mm512_mul_ps(_mm512_cvtepi32_ps(rest), unit);
}

int64_t packed(const Matrix& A, int M) {
  if (!known(A)) return rows_avx512().packed(A, M);
  const Layout L(A);
  return M * (L.blocks * L.bytes / 4 + 2 * L.sums);
}

int64_t scratch(const Matrix& A) {
  return known(A) ? 16 : rows_avx512().scratch(A);
}

void pack(const Matrix& A, int M, const float* const* x, float* out) {
  if (!known(A)) return rows_avx512().pack(A, M, x, out);
  const Layout L(A);
  auto* to = reinterpret_cast<uint8_t*>(out);
  float* sums = out + M * L.blocks * L.bytes / 4;
  for (int64_t i = 0; i < M * 2 * L.sums; ++i) sums[i] = 0.0f;
  const int64_t lanes = A.group * W / L.columns; // of one group; 32 where it takes two blocks
  for (int64_t k = 0; k < L.blocks; ++k) {
    for (int m = 0; m < M; ++m, to += L.bytes) {
      __m512 sum, low;
      pack_block(x[m] + k * L.columns, L.K - k * L.columns, A.bits, A.middle, to, sum, low);
      alignas(64) float lane[2][W];
      _mm512_store_ps(lane[0], sum);
      _mm512_store_ps(lane[1], low);
      float* mine = sums + m * 2 * L.sums;
      for (int i = 0; i < W; ++i) {
        const int64_t g = (k * W + i) / lanes;
        if (g >= L.G) break;
        mine[g] += lane[0][i];
        mine[L.sums + g] += lane[1][i];
      }
    }
  }
}

inline __m128 quarter(__m512 a) {
  const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  return _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
}

// The sums of four vectors, each in the order that it has alone.
inline __m128 sums_of(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m128 p = quarter(a), q = quarter(b), r = quarter(c), s = quarter(d);
  const __m128 pq = _mm_add_ps(_mm_unpacklo_ps(p, q), _mm_unpackhi_ps(p, q));
  const __m128 rs = _mm_add_ps(_mm_unpacklo_ps(r, s), _mm_unpackhi_ps(r, s));
  return _mm_add_ps(_mm_movelh_ps(pq, rs), _mm_movehl_ps(rs, pq));
}

template <int bits, int R, int M>
inline __attribute__((always_inline)) void tile(
    const Matrix& A, const Layout& L, const uint8_t* x, const float* of_x, float* const* y,
    int64_t n) {
  using At = Block<bits>;
  const int64_t row_bytes = L.K * bits / 8;
  const auto* weights = static_cast<const uint8_t*>(A.w) + n * row_bytes;
  // Rows that come `ahead` are fetched meanwhile: no stride tells the hardware.
  const int64_t tile_bytes = R * row_bytes, tiles = (fetched + tile_bytes - 1) / tile_bytes,
                ahead = tiles * tile_bytes, width = A.scale == Scale::f32 ? 4 : 2;
  for (int64_t i = 0; i < R * L.G * width; i += 64) {
    const int64_t at = (n + tiles * R) * L.G * width + i;
    __builtin_prefetch(static_cast<const char*>(A.scales) + at, 0, 2);
    __builtin_prefetch(static_cast<const char*>(A.biases) + at, 0, 2);
  }
  __m512 total[R][M];
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) total[r][m] = _mm512_setzero_ps();
  }
  const __m512 middle = _mm512_set1_ps(static_cast<float>(A.middle));
  for (int64_t g = 0; g < L.G; g += W) {
    for (int r = 0; r < R; ++r) {
      const __mmask16 here = first(L.G - g);
      const __m512 s = _mm512_mul_ps(middle, wide(here, A.scales, A.scale, (n + r) * L.G + g));
      const __m512 b = _mm512_add_ps(s, wide(here, A.biases, A.scale, (n + r) * L.G + g));
      for (int m = 0; m < M; ++m) {
        const float* mine = of_x + m * 2 * L.sums + g;
        total[r][m] = _mm512_fmadd_ps(b, _mm512_load_ps(mine), total[r][m]);
        total[r][m] = _mm512_fnmadd_ps(s, _mm512_load_ps(mine + L.sums), total[r][m]);
      }
    }
  }
  const int lanes = static_cast<int>(A.group * W / At::columns);
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i group = _mm512_srli_epi32(lane, lanes >= 16 ? 4 : lanes == 8 ? 3 : 2);
  const __mmask16 groups = first(lanes >= 16 ? 1 : W / lanes);
  const __m512i nibble = _mm512_set1_epi8(15);
  for (int64_t k = 0; k < L.blocks; ++k, x += M * At::bytes) {
    const int64_t left = row_bytes - k * 64;
    const __mmask16 some = left >= 64 ? 0xffff : static_cast<__mmask16>((1u << left / 4) - 1);
    const int64_t g = k * W / lanes;
    const __mmask16 here = L.G - g >= W ? groups : groups & first(L.G - g);
    auto read = [&](int r, __m512i& low, __m512i& high) {
      const uint8_t* from = weights + r * row_bytes + k * 64;
      low = _mm512_maskz_loadu_epi32(some, from);
      __builtin_prefetch(from + ahead, 0, 2);
      if (bits == 4) {
        high = _mm512_and_si512(_mm512_srli_epi16(low, 4), nibble);
        low = _mm512_and_si512(low, nibble);
      }
      return _mm512_permutexvar_ps(group, wide(here, A.scales, A.scale, (n + r) * L.G + g));
    };
    if constexpr (M == 1) { // one row after another: few registers for many sums
      const __m512 unit = _mm512_load_ps(x + At::units);
      for (int r = 0; r < R; ++r) {
        __m512i low, high;
        const __m512 scale = _mm512_mul_ps(read(r, low, high), unit);
        const __m512 sum = bits == 4 ? whole4(low, high, x) : whole8(low, x);
        total[r][0] = _mm512_fmadd_ps(sum, scale, total[r][0]);
      }
    } else {
      __m512i low[R], high[R];
      __m512 scale[R];
      for (int r = 0; r < R; ++r) scale[r] = read(r, low[r], high[r]);
      for (int m = 0; m < M; ++m) {
        const uint8_t* xm = x + m * At::bytes;
        const __m512 unit = _mm512_load_ps(xm + At::units);
        for (int r = 0; r < R; ++r) {
          const __m512 sum = bits == 4 ? whole4(low[r], high[r], xm) : whole8(low[r], xm);
          total[r][m] = _mm512_fmadd_ps(sum, _mm512_mul_ps(scale[r], unit), total[r][m]);
        }
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    int r = 0;
    for (; r + 4 <= R; r += 4) {
      _mm_storeu_ps(y[m] + n + r,
                    sums_of(total[r][m], total[r + 1][m], total[r + 2][m], total[r + 3][m]));
    }
    for (; r + 2 <= R; r += 2) {
      const __m128 two = sums_of(total[r][m], total[r + 1][m], total[r][m], total[r + 1][m]);
      _mm_storel_pi(reinterpret_cast<__m64*>(y[m] + n + r), two);
    }
    for (; r < R; ++r) {
      y[m][n + r] =
          _mm_cvtss_f32(sums_of(total[r][m], total[r][m], total[r][m], total[r][m]));
    }
  }
}

template <int bits, int M>
void run_rows(const Matrix& A, const float* packed, float* const* y, int begin, int end) {
  constexpr int R = M <= 4 ? 4 : 2;
  const Layout L(A);
  const auto* x = reinterpret_cast<const uint8_t*>(packed);
  const float* of_x = packed + M * L.blocks * L.bytes / 4;
  int n = begin;
  for (; n + R <= end; n += R) tile<bits, R, M>(A, L, x, of_x, y, n);
  for (; n < end; ++n) tile<bits, 1, M>(A, L, x, of_x, y, n);
}

void run(
    const Matrix& A, int M, const float* packed, float* scratch, float* const* y, int begin,
    int end) {
  if (!known(A)) return rows_avx512().run(A, M, packed, scratch, y, begin, end);
  by_rows(M, [&](auto rows) {
    A.bits == 4 ? run_rows<4, rows.value>(A, packed, y, begin, end)
                : run_rows<8, rows.value>(A, packed, y, begin, end);
  });
}

// Eight independent sums of bytes; three products of bytes make one of a weight.
float peak(int rounds, int start) {
  const __m512i w = _mm512_set1_epi8(static_cast<char>(start)), x = _mm512_set1_epi8(3);
  auto other = [&](int i) { return _mm512_set1_epi32(start + i); }; // alike, they would be one
  __m512i a = other(0), b = other(1), c = other(2), d = other(3), e = other(4), f = other(5),
          g = other(6), h = other(7);
  for (int round = 0; round < rounds; ++round) {
    a = _mm512_dpbusd_epi32(a, w, x);
    b = _mm512_dpbusd_epi32(b, w, x);
    c = _mm512_dpbusd_epi32(c, w, x);
    d = _mm512_dpbusd_epi32(d, w, x);
    e = _mm512_dpbusd_epi32(e, w, x);
    f = _mm512_dpbusd_epi32(f, w, x);
    g = _mm512_dpbusd_epi32(g, w, x);
    h = _mm512_dpbusd_epi32(h, w, x);
    asm volatile("" : "+v"(a)); // or rounds would be added up
  }
  const __m512i total = _mm512_add_epi32(
      _mm512_add_epi32(_mm512_add_epi32(a, b), _mm512_add_epi32(c, d)),
      _mm512_add_epi32(_mm512_add_epi32(e, f), _mm512_add_epi32(g, h)));
  return static_cast<float>(_mm512_reduce_add_epi32(total));
}

} // namespace

const Rows& rows_vnni() {
  static const Rows table = {
      packed, scratch, pack, run, rows_avx512().swiglu, rows_avx512().silu, peak, 8 * 64 / 3};
  return table;
}

} // namespace streamer
#endif
