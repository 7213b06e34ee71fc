// rows.h with AMX: affine weights of 4 and 8 bits as the bytes they are, against x in fixed point;
// everything else as with AVX-512.
//
// Each group of x is integers of 24 bits beside one power of two, cut into three signed bytes: x =
// unit * (2^16 h + 2^8 m + l). A tile of 16 output rows times 64 columns of weights meets the
// digits of up to four rows of x as the columns h, m, l and 0 of each, and a product of two tiles
// costs the same for all four. Sums of bytes are exact, so the only roundings are that of x, to 2^-23
// of the group's largest, and those of the sums over groups, alike for every row.
#include "rows.h"
#include "tiles.h"

#if defined(__AMX_INT8__)
#include <immintrin.h>

#include "amx_pack.h"
#include "wide512.h"

namespace streamer {
namespace {

// W: also the output rows of a block and the groups of a stretch.
constexpr int64_t early = 2, late = 2;
constexpr int64_t fetched = 4096; // bytes of weights between the next block and those asked for

int64_t packed(const Matrix& A, int M) {
  if (!known(A)) return rows_avx512().packed(A, M);
  const Layout L = layout(A, M);
  return (L.digits + L.units + L.begins + L.sums) / 4;
}

int64_t scratch(const Matrix& A) {
  return known(A) ? W * int64_t(A.K) * A.bits / 32 : rows_avx512().scratch(A);
}

void pack(const Matrix& A, int M, const float* const* x, float* out) {
  if (!known(A)) return rows_avx512().pack(A, M, x, out);
  const Layout L = layout(A, M);
  auto* to = reinterpret_cast<uint8_t*>(out);
  if (M == 3 || (M > 4 && M < 8)) { // lanes that no row has
    const __m512i zero = _mm512_setzero_si512();
    const int64_t bytes = L.digits + L.units + L.begins + L.sums;
    for (int64_t i = 0; i < bytes; i += 64) _mm512_store_si512(to + i, zero);
  }
  for (int m = 0; m < M; ++m) {
    A.bits == 4 ? pack_row<4>(L, x[m], m, M, to) : pack_row<8>(L, x[m], m, M, to);
  }
}

// Sixteen vectors by sixteen: lane i of vector j becomes lane j of vector i.
inline __attribute__((always_inline)) void transpose(__m512* a) {
  __m512 b[W];
  for (int i = 0; i < W; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < W; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d p = _mm512_castps_pd(b[i + j]), q = _mm512_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(p, q));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(p, q));
    }
  }
  for (int i = 0; i < 4; ++i) { // a[4 * j + i]: columns i, i + 4, i + 8, i + 12 of rows 4 * j ...
    const __m512 p = _mm512_shuffle_f32x4(a[i], a[4 + i], 0x88);
    const __m512 q = _mm512_shuffle_f32x4(a[i], a[4 + i], 0xdd);
    const __m512 r = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0x88);
    const __m512 s = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0xdd);
    b[i] = _mm512_shuffle_f32x4(p, r, 0x88);
    b[8 + i] = _mm512_shuffle_f32x4(p, r, 0xdd);
    b[4 + i] = _mm512_shuffle_f32x4(q, s, 0x88);
    b[12 + i] = _mm512_shuffle_f32x4(q, s, 0xdd);
  }
  for (int i = 0; i < W; ++i) a[i] = b[i];
}

// Scales or biases of `rows` output rows from n on and sixteen groups from g on, by group.
inline void by_group(
    const Matrix& A, const void* base, int64_t G, int64_t n, int rows, int64_t g, float* out) {
  const __mmask16 some = first(G - g);
  const int64_t width = A.scale == Scale::f32 ? 4 : 2;
  __m512 a[W];
  for (int r = 0; r < W; ++r) {
    const int64_t at = (n + r) * G + g;
    a[r] = r < rows ? wide(some, base, A.scale, at) : _mm512_setzero_ps();
    __builtin_prefetch(static_cast<const char*>(base) + (at + W * G) * width, 0, 2);
  }
  transpose(a);
  for (int i = 0; i < W; ++i) _mm512_store_ps(out + W * i, a[i]);
}

template <int bits, int M>
struct Block {
  static constexpr int lanes = lanes_of(M), tiles = tiles_of(M);
  static constexpr int R = W / tiles; // output rows of a tile
  static constexpr int each = 4 / lanes; // output rows of a vector
  static constexpr int vectors = R / each; // of a tile's results
  static constexpr int all = tiles * vectors; // at most sixteen

  const Matrix& A;
  const Layout& L;
  const uint8_t* packed;
  const uint8_t* weights; // of the block's first row
  int64_t row_bytes, step_bytes;
  int rows; // of the block

  alignas(64) uint8_t bytes[4][R * 64];
  alignas(64) int32_t products[4][tiles][R * 4 * lanes];
  alignas(64) float scales[W * W], biases[W * W];
  alignas(64) float totals[tiles][all * W];

  Block(const Matrix& A, const Layout& L, const float* x)
      : A(A),
        L(L),
        packed(reinterpret_cast<const uint8_t*>(x)),
        row_bytes(L.K * bits / 8),
        step_bytes(L.columns * bits / 8) {}

  // Nibbles of R rows as bytes: of `step_bytes` of each row first the low ones, then the high ones.
  void unpack(const uint8_t* from, uint8_t* to) const {
    const __m512i low = _mm512_set1_epi64(0x0102040800000000); // bits 0 to 3, as a matrix
    const __m512i high = _mm512_set1_epi64(0x1020408000000000);
    if (L.columns == 64) {
      const __m512i part = _mm512_mask_blend_epi64(0xf0, low, high);
      for (int r = 0; r < R; ++r) {
        const __m512i a = _mm512_broadcast_i64x4(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + r * row_bytes)));
        _mm512_store_si512(to + 64 * r, _mm512_gf2p8affine_epi64_epi8(a, part, 0));
      }
    } else {
      const __m512i part = _mm512_mask_blend_epi64(0xcc, low, high);
      for (int r = 0; r < R; ++r) {
        const __m512i a = _mm512_broadcast_i32x4(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + r * row_bytes)));
        _mm512_store_si512(to + 64 * r, _mm512_gf2p8affine_epi64_epi8(a, part, 0));
      }
    }
  }

  // Groups [g, stop) of R rows from the block's row `r` on.
  void stretch(int64_t g, int64_t stop, int r, float* kept) {
    __m512 total[all];
    for (int i = 0; i < all; ++i) total[i] = _mm512_load_ps(kept + W * i);
    __m512i spread[vectors];
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int i = 0; i < vectors; ++i) {
      spread[i] = _mm512_add_epi32(
          _mm512_srli_epi32(lane, lanes == 1 ? 2 : lanes == 2 ? 3 : 4), _mm512_set1_epi32(i * each));
    }
    const int64_t begin = g * L.steps, end = stop * L.steps;
    const int64_t line = 16 * lanes, tile_bytes = L.columns / 4 * line;
    const uint8_t* from = weights + r * row_bytes;
    const uint8_t* digits = packed + begin * tiles * tile_bytes;
    const float* units = reinterpret_cast<const float*>(packed + L.digits) + g * tiles * W;
    const uint8_t* begins = packed + L.digits + L.units;

    // In the order of memory, whatever is read when: so the hardware fetches ahead, too.
    const int64_t share = R * step_bytes, ahead = W * row_bytes + fetched;
    auto fetch = [&](int64_t step) {
      for (int64_t i = 0; i < share; i += 64) {
        __builtin_prefetch(from + ahead + step * share + i, 0, 2);
      }
    };
    auto scale = [&](int64_t group, int turn) {
      const float* s = scales + (group - g) * W + r;
      for (int t = 0; t < tiles; ++t) {
        const __m512 unit = _mm512_load_ps(units + ((group - g) * tiles + t) * W);
        for (int i = 0; i < vectors; ++i) {
          const __m512 of_rows = lanes == 4
              ? _mm512_set1_ps(s[i])
              : _mm512_permutexvar_ps(spread[i], _mm512_load_ps(s));
          const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(products[turn][t] + W * i));
          __m512& to = total[t * vectors + i];
          to = _mm512_fmadd_ps(sum, _mm512_mul_ps(of_rows, unit), to);
        }
      }
    };

    if (bits == 4) {
      for (int64_t step = begin; step < end && step < begin + early; ++step) {
        unpack(from + step * step_bytes, bytes[step & 3]);
      }
    }
    for (int64_t step = begin; step < end; ++step) {
      fetch(step);
      if (bits == 4 && step + early < end) {
        unpack(from + (step + early) * step_bytes, bytes[(step + early) & 3]);
      }
      const int64_t group = step / L.steps, within = step - group * L.steps;
      if (within == 0) {
        tile_load<0>(begins + group * tiles * 64, 0); // the same for every row
        if (tiles == 2) tile_load<1>(begins + group * tiles * 64 + 64, 0);
      }
      if (bits == 4) {
        tile_load<2>(bytes[step & 3], 64);
      } else {
        tile_load<2>(from + step * step_bytes, row_bytes);
      }
      tile_load<3>(digits, line);
      tile_multiply<0, 2, 3>();
      if (tiles == 2) {
        tile_load<4>(digits + tile_bytes, line);
        tile_multiply<1, 2, 4>();
      }
      digits += tiles * tile_bytes;
      if (within + 1 < L.steps) continue;
      tile_store<0>(products[group & 3][0], line);
      if (tiles == 2) tile_store<1>(products[group & 3][1], line);
      if (group - g >= late) scale(group - late, (group - late) & 3);
    }
    for (int64_t group = stop - g < late ? g : stop - late; group < stop; ++group) {
      scale(group, group & 3);
    }
    for (int i = 0; i < all; ++i) _mm512_store_ps(kept + W * i, total[i]);
  }

  // h + m + l of four vectors with a digit a lane: lane i of vector j becomes lane j of a quarter.
  static __m512 added(const float* a) {
    const __m512 p = _mm512_load_ps(a), q = _mm512_load_ps(a + W), r = _mm512_load_ps(a + 2 * W),
                 s = _mm512_load_ps(a + 3 * W);
    const __m512d pq = _mm512_castps_pd(_mm512_unpacklo_ps(p, q)),
                  rs = _mm512_castps_pd(_mm512_unpacklo_ps(r, s));
    const __m512d low = _mm512_castps_pd(_mm512_unpackhi_ps(p, q)),
                  lower = _mm512_castps_pd(_mm512_unpackhi_ps(r, s));
    const __m512 h = _mm512_castpd_ps(_mm512_unpacklo_pd(pq, rs)),
                 m = _mm512_castpd_ps(_mm512_unpackhi_pd(pq, rs)),
                 l = _mm512_castpd_ps(_mm512_unpacklo_pd(low, lower));
    return _mm512_add_ps(_mm512_add_ps(h, m), l);
  }

  // y[m][n ...] for `count` rows from n on. Tiles read W of them: where the matrix has fewer, in `room`.
  void run(float* const* y, int64_t n, int count, float* room) {
    rows = count;
    weights = static_cast<const uint8_t*>(A.w) + n * row_bytes;
    if (n + W > A.N) {
      __builtin_memset(room, 0, W * row_bytes);
      __builtin_memcpy(room, weights, count * row_bytes);
      weights = reinterpret_cast<const uint8_t*>(room);
    }
    for (auto& half : totals) {
      for (float& total : half) total = 0.0f;
    }
    __m512 offset[M];
    for (int m = 0; m < M; ++m) offset[m] = _mm512_setzero_ps();
    const float* sums = reinterpret_cast<const float*>(packed + L.digits + L.units + L.begins);
    const __m512 middle = _mm512_set1_ps(static_cast<float>(L.middle));
    for (int64_t g = 0; g < L.G; g += W) {
      const int64_t stop = g + W < L.G ? g + W : L.G;
      by_group(A, A.scales, L.G, n, rows, g, scales);
      by_group(A, A.biases, L.G, n, rows, g, biases);
      for (int64_t i = g; i < stop; ++i) {
        const int64_t at = (i - g) * W;
        const __m512 bias =
            _mm512_fmadd_ps(middle, _mm512_load_ps(scales + at), _mm512_load_ps(biases + at));
        for (int m = 0; m < M; ++m) {
          offset[m] = _mm512_fmadd_ps(bias, _mm512_set1_ps(sums[i * 8 + m]), offset[m]);
        }
      }
      for (int t = 0; t < tiles; ++t) stretch(g, stop, t * R, totals[t]);
    }
    alignas(64) float sum[tiles * all / 4][W];
    for (int i = 0; i < tiles * all / 4; ++i) {
      _mm512_store_ps(sum[i], added(totals[0] + i * 4 * W));
    }
    for (int m = 0; m < M; ++m) {
      alignas(64) float mine[W];
      for (int r = 0; r < W; ++r) {
        const int vector = r / R * all + m / 4 * vectors + r % R / each;
        mine[r] = sum[vector / 4][(r % each * lanes + m % 4) * 4 + vector % 4];
      }
      _mm512_mask_storeu_ps(
          y[m] + n, first(rows), _mm512_add_ps(_mm512_load_ps(mine), offset[m]));
    }
  }
};

template <int bits, int M>
void run_rows(
    const Matrix& A, const float* packed, float* scratch, float* const* y, int begin, int end) {
  constexpr int lanes = lanes_of(M), tiles = tiles_of(M), R = W / tiles;
  const Layout L(A, M, lanes, tiles);
  Block<bits, M> block(A, L, packed);
  TileShapes shapes;
  for (int t = 0; t < tiles; ++t) {
    shapes.set(t, R, 16 * lanes);
    shapes.set(3 + t, static_cast<int>(L.columns) / 4, 16 * lanes);
  }
  shapes.set(2, R, static_cast<int>(L.columns));
  const Tiles in_use(shapes);
  for (int n = begin; n < end; n += W) block.run(y, n, end - n < W ? end - n : W, scratch);
}

void run(
    const Matrix& A, int M, const float* packed, float* scratch, float* const* y, int begin,
    int end) {
  if (!known(A)) return rows_avx512().run(A, M, packed, scratch, y, begin, end);
  by_rows(M, [&](auto rows) {
    A.bits == 4 ? run_rows<4, rows.value>(A, packed, scratch, y, begin, end)
                : run_rows<8, rows.value>(A, packed, scratch, y, begin, end);
  });
}

// Products of tiles alone; four rows of x have sixteen columns.
float peak(int rounds, int start) {
  alignas(64) int32_t out[256];
  TileShapes shapes;
  for (int t = 0; t < 8; ++t) shapes.set(t, 16, 64);
  const Tiles in_use(shapes);
  for (int& value : out) value = start;
  tile_load<4>(out, 64);
  tile_load<5>(out, 64);
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  for (int round = 0; round < rounds; ++round) {
    tile_multiply<0, 4, 5>();
    tile_multiply<1, 4, 5>();
    tile_multiply<2, 4, 5>();
    tile_multiply<3, 4, 5>();
  }
  tile_store<0>(out, 64);
  tile_store<1>(out, 64);
  tile_store<2>(out, 64);
  tile_store<3>(out, 64);
  return static_cast<float>(out[0]);
}

} // namespace

const Rows* rows_amx() {
  static const Rows table = {
      packed, scratch, pack, run, rows_avx512().swiglu, rows_avx512().silu, peak, 4 * 16 * 64 * 4,
      false, W};
  return &table;
}

} // namespace streamer
#else
namespace streamer {

const Rows* rows_amx() {
  return nullptr;
}

} // namespace streamer
#endif
