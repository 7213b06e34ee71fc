// rows.h in vectors of 32 bytes and products of small integers: narrow weights as what they are,
// against x in fixed point, as rows_vnni.cpp has it; everything else as with AVX2.
//
// A block is 64 weights: Nibbles, or what else an instruction set reads and multiplies so.
// Some output rows are taken a stretch of columns at a time, so that the rows of x there stay in
// the first-level cache; their sums wait in memory, and are added up over lanes four at a time.
#pragma once

#include <immintrin.h>

#include "maddubs_pack.h"
#include "rows.h"
#include "unpack.h"

namespace streamer {
namespace {

constexpr int64_t fetched = 8192; // bytes of weights between those in use and those asked for
constexpr int64_t held_bytes = 32 << 10; // of weights of the output rows that are taken together
constexpr int64_t stretch_bytes = 14 << 10; // of x that is taken at a time

// Output rows that are taken together.
int64_t held_rows(const Layout& L) {
  const int64_t n = held_bytes / L.row_bytes() / 4 * 4;
  return n < 8 ? 8 : n < max_tile ? n : max_tile;
}

// What of it the instruction set multiplies as integers.
bool known(const Matrix& A);

int64_t packed(const Matrix& A, int M) {
  if (!known(A)) return rows_avx2().packed(A, M);
  const Layout L(A);
  return M * (L.blocks * L.block / 4 + L.sums);
}

int64_t scratch(const Matrix& A) {
  if (!known(A)) return rows_avx2().scratch(A);
  const Layout L(A);
  return held_rows(L) * (max_rows * W + 2 * L.G);
}

template <class Weights>
void pack_rows(const Matrix& A, int M, const float* const* x, float* out) {
  const Layout L(A);
  auto* to = reinterpret_cast<uint8_t*>(out);
  float* sums = out + M * L.blocks * L.block / 4;
  for (int64_t i = 0; i < M * L.sums; ++i) sums[i] = 0.0f;
  const int apart = A.group == 32 ? 0 : A.group == 64 ? 1 : 2;
  for (int64_t k = 0; k < L.blocks; ++k) {
    for (int m = 0; m < M; ++m, to += Weights::block) {
      const __m256 lanes = Weights::pack(x[m] + k * columns, L.K - k * columns, to);
      // Of each half of the block: a group of 32, or a part of one.
      const __m128 four =
          _mm_hadd_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
      const __m128 two = _mm_hadd_ps(four, four);
      sums[m * L.sums + (2 * k >> apart)] += _mm_cvtss_f32(two);
      sums[m * L.sums + (2 * k + 1 >> apart)] += _mm_cvtss_f32(_mm_movehdup_ps(two));
    }
  }
}

// Scales (or biases) from `index` on as floats: where they lie, or in `room`.
inline const float* widened(
    const void* from, Scale type, int64_t index, int64_t count, float* room) {
  if (type == Scale::f32) return static_cast<const float*>(from) + index;
  const auto* halves = static_cast<const uint16_t*>(from) + index;
  int64_t i = 0;
  for (; i + W <= count; i += W) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i));
    const __m256i shifted = _mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
    _mm256_storeu_ps(
        room + i, type == Scale::f16 ? _mm256_cvtph_ps(half) : _mm256_castsi256_ps(shifted));
  }
  for (; i < count; ++i) room[i] = wide(from, type, index + i);
  return room;
}

inline __m128 half_sum(const float* a) {
  return _mm_add_ps(_mm_load_ps(a), _mm_load_ps(a + 4));
}

inline float sum_of(const float* a) {
  __m128 c = half_sum(a);
  c = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

// sum_of() of four vectors, `apart` floats from one to the next.
inline __m128 sums_of(const float* a, int64_t apart) {
  const __m128 p = half_sum(a), q = half_sum(a + apart), r = half_sum(a + 2 * apart),
               s = half_sum(a + 3 * apart);
  const __m128 pq = _mm_add_ps(_mm_unpacklo_ps(p, q), _mm_unpackhi_ps(p, q));
  const __m128 rs = _mm_add_ps(_mm_unpacklo_ps(r, s), _mm_unpackhi_ps(r, s));
  return _mm_add_ps(_mm_movelh_ps(pq, rs), _mm_movehl_ps(rs, pq));
}

// Biases times sums of x: what the sums of an output row begin with.
template <int M>
inline __attribute__((always_inline)) void of_biases(
    const Layout& L, const float* of_x, const float* biases, __m256i rest, __m256 (&sum)[M]) {
  for (int m = 0; m < M; ++m) sum[m] = _mm256_setzero_ps();
  for (int64_t g = 0; g < L.G; g += W) {
    const __m256 b =
        g + W <= L.G ? _mm256_loadu_ps(biases + g) : _mm256_maskload_ps(biases + g, rest);
    for (int m = 0; m < M; ++m) {
      sum[m] = _mm256_fmadd_ps(b, _mm256_loadu_ps(of_x + m * L.sums + g), sum[m]);
    }
  }
}

// Blocks [begin, end) of an output row on top of `total`, or of its biases where it begins.
// per: blocks to a group, 0: two groups to a block.
template <class Weights, int M, int per>
inline __attribute__((always_inline)) void stretch(
    const Layout& L, const uint8_t* weights, const uint8_t* x, const float* of_x,
    const float* scales, const float* biases, __m256i rest, float* total, int64_t begin,
    int64_t end, int64_t ahead) {
  constexpr bool held = M <= 4; // more don't fit into registers beside the weights
  __m256 sum[M];
  if (begin == 0) {
    if constexpr (Weights::biases) {
      of_biases<M>(L, of_x, biases, rest, sum);
    } else {
      for (int m = 0; m < M; ++m) sum[m] = _mm256_setzero_ps();
    }
    for (int m = 0; m < M && !held; ++m) _mm256_store_ps(total + m * W, sum[m]);
  } else {
    for (int m = 0; m < M && held; ++m) sum[m] = _mm256_load_ps(total + m * W);
  }
  weights += begin * Weights::bytes;
  x += begin * M * Weights::block;
  auto block = [&](int64_t k, bool part) __attribute__((always_inline)) {
    const Weights w = Weights::at(weights, part);
    const float* s = scales + (per == 0 ? 2 * k : k / per);
    const __m256 scale = per == 0 && !part
        ? _mm256_insertf128_ps(_mm256_broadcast_ss(s), _mm_broadcast_ss(s + 1), 1)
        : _mm256_broadcast_ss(s);
    for (int m = 0; m < M; ++m, x += Weights::block) {
      const __m256 unit = _mm256_load_ps(reinterpret_cast<const float*>(x + 192));
      const __m256 by = _mm256_mul_ps(scale, unit);
      if (held) {
        sum[m] = _mm256_fmadd_ps(w.times(x), by, sum[m]);
      } else {
        const __m256 before = _mm256_load_ps(total + m * W);
        _mm256_store_ps(total + m * W, _mm256_fmadd_ps(w.times(x), by, before));
      }
    }
    weights += Weights::bytes;
  };
  const int64_t full = L.K / columns < end ? L.K / columns : end;
  int64_t k = begin;
  for (; k + 2 <= full; k += 2) {
    __builtin_prefetch(weights + ahead, 0, 2);
    block(k, false);
    if (Weights::bytes == 64) __builtin_prefetch(weights + ahead, 0, 2);
    block(k + 1, false);
  }
  for (; k < full; ++k) block(k, false);
  if (k < end) block(k, true);
  for (int m = 0; m < M && held; ++m) _mm256_store_ps(total + m * W, sum[m]);
}

// y[m][n] for n in [begin, end), at most held_rows(L) of them.
template <class Weights, int M, int per>
void run_rows(
    const Matrix& A, const Layout& L, const float* packed, float* scratch, float* const* y,
    int64_t begin, int64_t end) {
  const auto* x = reinterpret_cast<const uint8_t*>(packed);
  const float* of_x = packed + M * L.blocks * L.block / 4;
  const int64_t count = end - begin, scales = count * L.G, row_bytes = L.row_bytes();
  float *total = scratch, *room = scratch + held_rows(L) * M * W;
  // What comes next is fetched meanwhile: no stride tells the hardware.
  const int64_t width = A.scale == Scale::f32 ? 4 : 2;
  for (int64_t i = 0; i < scales * width; i += 64) {
    __builtin_prefetch(static_cast<const char*>(A.scales) + end * L.G * width + i, 0, 2);
    if (!Weights::biases) continue;
    __builtin_prefetch(static_cast<const char*>(A.biases) + end * L.G * width + i, 0, 2);
  }
  const float* scale = widened(A.scales, A.scale, begin * L.G, scales, room);
  const float* bias = nullptr;
  if (Weights::biases) bias = widened(A.biases, A.scale, begin * L.G, scales, room + scales);
  const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  const __m256i rest = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(L.G % W)), lane);
  const auto* weights = static_cast<const uint8_t*>(A.w) + begin * row_bytes;
  const int64_t blocks = stretch_bytes / (M * L.block) / 2 * 2;
  const int64_t rows_ahead =
      L.blocks > blocks ? held_rows(L) : (fetched + row_bytes - 1) / row_bytes;
  const int64_t ahead = rows_ahead * row_bytes;
  for (int64_t k = 0; k < L.blocks; k += blocks) {
    const int64_t to = k + blocks < L.blocks ? k + blocks : L.blocks;
    for (int64_t r = 0; r < count; ++r) {
      stretch<Weights, M, per>(
          L, weights + r * row_bytes, x, of_x, scale + r * L.G,
          Weights::biases ? bias + r * L.G : nullptr, rest,
          total + r * M * W, k, to, ahead);
    }
  }
  for (int m = 0; m < M; ++m) {
    const float* sums = total + m * W;
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) {
      _mm_storeu_ps(y[m] + begin + r, sums_of(sums + r * M * W, M * W));
    }
    for (; r < count; ++r) y[m][begin + r] = sum_of(sums + r * M * W);
  }
}

template <class Weights, int per>
void run_groups(
    const Matrix& A, int M, const float* packed, float* scratch, float* const* y, int begin,
    int end) {
  const Layout L(A);
  for (int64_t n = begin, to; n < end; n = to) {
    to = n + held_rows(L) < end ? n + held_rows(L) : end;
    by_rows(M, [&](auto rows) {
      run_rows<Weights, rows.value, per>(A, L, packed, scratch, y, n, to);
    });
  }
}

template <class Weights>
void run_all(
    const Matrix& A, int M, const float* packed, float* scratch, float* const* y, int begin,
    int end) {
  if (A.group == 32) return run_groups<Weights, 0>(A, M, packed, scratch, y, begin, end);
  if (A.group == 64) return run_groups<Weights, 1>(A, M, packed, scratch, y, begin, end);
  run_groups<Weights, 2>(A, M, packed, scratch, y, begin, end);
}

void swiglu(float* gate, const float* up, int64_t count) {
  rows_avx2().swiglu(gate, up, count);
}

void silu(float* x, int64_t count) {
  rows_avx2().silu(x, count);
}

} // namespace
} // namespace streamer
