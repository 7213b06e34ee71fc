// The steps of attend.h in the compiler's own vectors: included once by each instruction set's source.
#pragma once

#include "attend.h"
#include "fused.h"
#include "steps_impl.h"

namespace streamer {
namespace {

// As wide as a register here: GCC keeps wider ones in memory.
#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif
typedef float V __attribute__((vector_size(lanes * 4), aligned(4), may_alias));
typedef float V4 __attribute__((vector_size(16), aligned(4), may_alias));

// Rows by tokens, or rows by vectors, that are summed at once: as many as registers hold.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int block = 4;
#else
constexpr int block = 2;
#endif

// Of keys or values of 256 floats half of a cache of 32 KB; measured with AVX2 alone.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int tile = 16;
#else
constexpr int tile = 32;
#endif

constexpr int line = 64 / 4 / lanes; // vectors of a cache line

inline V read(const float* p) {
  return *reinterpret_cast<const V*>(p);
}

// Read once, for all rows: GCC would read it anew for each.
inline V held(const float* p) {
  V v = read(p);
#if defined(__x86_64__)
  asm("" : "+x"(v));
#endif
  return v;
}

// The first `n` lanes, zeros after.
inline V read(const float* p, int n) {
  V v = {};
  std::memcpy(&v, p, n * sizeof(float));
  return v;
}

inline void write(float* p, V v) {
  *reinterpret_cast<V*>(p) = v;
}

// Into the second-level cache: what is asked of the first waits for it. Any address will do.
inline void fetch(const float* p, int64_t floats) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + floats * 4, 0, 2);
}

// A vector's halves added until four lanes are left.
inline V4 four(V v) {
#if defined(__AVX512F__)
  typedef float V8 __attribute__((vector_size(32)));
  const V8 half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
      __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
#elif defined(__AVX2__)
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
  return v;
#endif
}

// The sums of four vectors, each in the same order.
inline V4 sums(const V* v) {
  const V4 p = four(v[0]), q = four(v[1]), r = four(v[2]), s = four(v[3]);
  const V4 x = __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
  const V4 y = __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
  return __builtin_shufflevector(x, y, 0, 1, 4, 5) + __builtin_shufflevector(x, y, 2, 3, 6, 7);
}

// Sums of R rows by four vectors each, written to rows of s.
template <int R>
inline __attribute__((always_inline)) void write_sums(const V (&v)[R][4], float* s) {
#if defined(__AVX512F__)
  if constexpr (R == 4) { // the same additions, sixteen sums at a time
    V z[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      auto pair = [](V a, V b) {
        return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
            __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
      };
      const V a = pair(v[0][j], v[1][j]), b = pair(v[2][j], v[3][j]);
      z[j] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
          __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
    auto pair = [](V a, V b) {
      return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
          __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    };
    const V a = pair(z[0], z[1]), b = pair(z[2], z[3]);
    const V all = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
        __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    *reinterpret_cast<V4*>(s) = __builtin_shufflevector(all, all, 0, 1, 2, 3);
    *reinterpret_cast<V4*>(s + step) = __builtin_shufflevector(all, all, 4, 5, 6, 7);
    *reinterpret_cast<V4*>(s + 2 * step) = __builtin_shufflevector(all, all, 8, 9, 10, 11);
    *reinterpret_cast<V4*>(s + 3 * step) = __builtin_shufflevector(all, all, 12, 13, 14, 15);
    return;
  }
#endif
  for (int r = 0; r < R; ++r) *reinterpret_cast<V4*>(s + r * step) = sums(v[r]);
}

// R rows by N tokens, N 4 or 1. `fetched` tokens from `later` on are fetched meanwhile.
template <int R, int N, int fetched>
void score_block(
    const float* q, const float* k, int64_t stride, int n, const float* later, float* s) {
  V acc[R][4] = {};
  int i = 0;
  for (; i + lanes <= n; i += lanes) {
#pragma GCC unroll 4
    for (int j = 0; j < fetched; ++j) fetch(later, j * stride + i);
    V x[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) x[j] = held(k + j * stride + i);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V y = read(q + int64_t(r) * n + i);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) acc[r][j] = fused(x[j], y, acc[r][j]);
    }
  }
  if (i < n) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V y = read(q + int64_t(r) * n + i, n - i);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) acc[r][j] = fused(read(k + j * stride + i, n - i), y, acc[r][j]);
    }
  }
  if (N == 4) {
    write_sums(acc, s);
  } else {
    for (int r = 0; r < R; ++r) s[r * step] = sums(acc[r])[0];
  }
}

template <int R>
struct Count {};

// Calls part(r, Count<R>()) for blocks of R rows from r on, until there are `rows`.
template <class F>
void by_blocks(int rows, F part) {
  int r = 0;
  for (; r + block <= rows; r += block) part(r, Count<block>());
  if constexpr (block == 4) {
    if (rows - r == 3) return part(r, Count<3>());
    if (rows - r == 2) return part(r, Count<2>());
  }
  if (rows - r == 1) part(r, Count<1>());
}

// What a block of rows fetches of the next tile, so that all of them together fetch it once and at
// an even pace: of every four (tokens or vectors) `count` from `from` on, in every `every`-th four.
struct Share {
  int count, from, every, turn;

  Share(int r, int rows, int fours) {
    const int blocks = rows / block > 0 ? rows / block : 1, b = r / block;
    count = blocks >= 4 ? 1 : blocks >= 2 ? 2 : 4;
    every = blocks / 4 < 1 ? 1 : blocks / 4 < fours ? blocks / 4 : fours;
    from = b * count % 4;
    turn = b * count / 4;
  }
  int at(int four) const {
    return four % every == turn ? count : 0;
  }
};

template <int R>
void score_rows(
    const float* q, const float* k, int64_t stride, int count, int n, const Share& share, float* s) {
  int j = 0;
  for (; j + 4 <= count; j += 4) {
    const float *four = k + j * stride, *later = four + (tile + share.from) * stride;
    switch (share.at(j / 4)) {
      case 4: score_block<R, 4, 4>(q, four, stride, n, later, s + j); break;
      case 2: score_block<R, 4, 2>(q, four, stride, n, later, s + j); break;
      case 1: score_block<R, 4, 1>(q, four, stride, n, later, s + j); break;
      default: score_block<R, 4, 0>(q, four, stride, n, later, s + j);
    }
  }
  for (; j < count; ++j) score_block<R, 1, 0>(q, k + j * stride, stride, n, k, s + j);
}

void scores(const float* q, int rows, const float* k, int64_t stride, int count, int n, float* s) {
  by_blocks(rows, [&]<int R>(int r, Count<R>) {
    score_rows<R>(q + int64_t(r) * n, k, stride, count, n, Share(r, rows, tile / 4), s + r * step);
  });
}

constexpr float lowest = -3.4028234e38f;

inline V larger(V a, V b) {
#if defined(__AVX512F__)
  return (V)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (V)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

void place(float* s, int count, float scale, const float* bias) {
  if (bias == nullptr) {
    for (int j = 0; j < count; ++j) s[j] *= scale;
    return;
  }
  for (int j = 0; j < count; ++j) {
    const float x = s[j] * scale + bias[j];
    s[j] = x < lowest ? lowest : x;
  }
}

void soften(float* s, int count, int all, float& top, float& sum_of) {
  for (int j = count; j < all; ++j) s[j] = lowest;
  V four[4]; // maxima apart, as each would wait for the one before
  for (V& x : four) x = read(s);
  int at = 0;
  for (; at + 4 * lanes <= count; at += 4 * lanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) four[i] = larger(read(s + at + i * lanes), four[i]);
  }
  for (; at < count; at += lanes) four[0] = larger(read(s + at), four[0]);
  const V tops = larger(larger(four[0], four[1]), larger(four[2], four[3]));
  top = tops[0];
  for (int i = 1; i < lanes; ++i) top = tops[i] > top ? tops[i] : top;
  V total = {};
  int j = 0;
  for (; j < count; j += lanes) {
    V p = exponential(read(s + j) - top);
    for (int i = count - j; i < lanes; ++i) p[i] = 0.0f;
    total += p;
    write(s + j, p);
  }
  for (; j < all; ++j) s[j] = 0.0f;
  float each[lanes];
  std::memcpy(each, &total, sizeof total);
  for (int half = lanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) each[i] += each[i + half];
  }
  sum_of = each[0];
}

// R rows by N vectors. `fetched` of those of the tokens `tile` later, from the first-th on, are
// fetched meanwhile.
template <int R, int N, int fetched>
void weigh_block(
    const float* p, const float* v, int64_t stride, int count, int n, int first, float* y) {
  const int64_t later = tile * stride + first * lanes;
  V acc[R][N];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) acc[r][i] = read(y + int64_t(r) * n + i * lanes);
  }
  for (int j = 0; j < count; ++j, v += stride) {
    V x[N];
#pragma GCC unroll 4
    for (int i = 0; i < fetched; i += line) fetch(v, later + i * lanes);
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) x[i] = held(v + i * lanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V weight = V{} + p[r * step + j];
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) acc[r][i] = fused(x[i], weight, acc[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) write(y + int64_t(r) * n + i * lanes, acc[r][i]);
  }
}

// The same for the last lanes of a row, fewer than a vector.
void weigh_rest(
    const float* p, int rows, const float* v, int64_t stride, int count, int n, int left, float* y) {
  for (int r = 0; r < rows; ++r) {
    V acc = read(y + int64_t(r) * n, left);
    for (int j = 0; j < count; ++j) acc = fused(read(v + j * stride, left), V{} + p[r * step + j], acc);
    std::memcpy(y + int64_t(r) * n, &acc, left * sizeof(float));
  }
}

void weigh(const float* p, int rows, const float* v, int64_t stride, int count, int n, float* y) {
  const int fours = n / (4 * lanes);
  by_blocks(rows, [&]<int R>(int r, Count<R>) {
    const Share share(r, rows, fours > 0 ? fours : 1);
    const float* weights = p + r * step;
    float* row = y + int64_t(r) * n;
    int i = 0;
    for (; i + 4 * lanes <= n; i += 4 * lanes) {
      switch (share.at(i / (4 * lanes))) {
        case 4: weigh_block<R, 4, 4>(weights, v + i, stride, count, n, 0, row + i); break;
        case 2: weigh_block<R, 4, 2>(weights, v + i, stride, count, n, share.from, row + i); break;
        case 1: weigh_block<R, 4, 1>(weights, v + i, stride, count, n, share.from, row + i); break;
        default: weigh_block<R, 4, 0>(weights, v + i, stride, count, n, 0, row + i);
      }
    }
    for (; i + lanes <= n; i += lanes) weigh_block<R, 1, 0>(weights, v + i, stride, count, n, 0, row + i);
  });
  const int left = n % lanes;
  if (left != 0) weigh_rest(p, rows, v + n - left, stride, count, n, left, y + n - left);
}

float exponential_of(float x) {
  return exponential(V{} + x)[0];
}

void merge(const float* y, float top, float total, int n, float* to, float& to_top, float& to_total) {
  if (total == 0.0f) return; // a span that this row sees nothing of
  if (top <= to_top) {
    const float by = exponential_of(top - to_top);
    for (int i = 0; i < n; ++i) to[i] += y[i] * by;
    to_total += total * by;
  } else {
    const float by = exponential_of(to_top - top);
    for (int i = 0; i < n; ++i) to[i] = to[i] * by + y[i];
    to_total = to_total * by + total;
    to_top = top;
  }
}

constexpr AttendSteps attend_table = {tile, scores, place, soften, weigh, merge, exponential_of, dot};

} // namespace
} // namespace streamer
