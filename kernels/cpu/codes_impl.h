// The steps of codes.h over sixteen lanes in the compiler's own vectors: included once by each
// instruction set's source.
#pragma once

#include "codes.h"
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

inline V read(const float* p) {
  return *reinterpret_cast<const V*>(p);
}

inline void write(float* p, V v) {
  *reinterpret_cast<V*>(p) = v;
}

// The eight indices in `width` bytes, in registers: pieces stored and loaded as one would wait.
template <int width>
uint64_t eight_of(const uint8_t* from) {
  uint32_t low, high;
  std::memcpy(&low, from, 4);
  if constexpr (width == 4) return low;
  std::memcpy(&high, from + width - 4, 4);
  return low | uint64_t(high) >> (64 - 8 * width) << 32;
}

template <int width, int channels>
void unpack_row(const uint8_t* from, int indices, const float* points, float* u) {
  constexpr uint64_t mask = (1u << width) - 1;
  auto eight = [&](uint64_t word, int count, float* to) {
    for (int i = 0; i < count; ++i) {
      const uint64_t index = (word >> (i * width)) & mask;
      std::memcpy(to + i * channels, points + index * channels, channels * sizeof(float));
    }
  };
  int i = 0;
  for (; i + 8 <= indices; i += 8, from += width) {
    eight(eight_of<width>(from), 8, u + i * channels);
  }
  if (i < indices) {
    uint64_t word = 0;
    std::memcpy(&word, from, ((indices - i) * width + 7) / 8);
    eight(word, indices - i, u + i * channels);
  }
}

void unpack(
    const uint32_t* words, int64_t stride, int count, const Codebook& book, int n, int wide, float* u) {
  auto row = unpack_row<8, 1>;
  switch (book.channels == 1 ? 0 : book.width) {
    case 4: row = unpack_row<4, 2>; break;
    case 5: row = unpack_row<5, 2>; break;
    case 6: row = unpack_row<6, 2>; break;
    case 7: row = unpack_row<7, 2>; break;
    case 8: row = unpack_row<8, 2>; break;
  }
  for (int j = 0; j < count; ++j, u += wide) {
    row(reinterpret_cast<const uint8_t*>(words + j * stride), n / book.channels, book.points, u);
    for (int i = n; i < wide; ++i) u[i] = 0.0f;
  }
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

// The sums of four vectors.
inline V4 sums(const V* v) {
  const V4 p = four(v[0]), q = four(v[1]), r = four(v[2]), s = four(v[3]);
  const V4 x = __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
  const V4 y = __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
  return __builtin_shufflevector(x, y, 0, 1, 4, 5) + __builtin_shufflevector(x, y, 2, 3, 6, 7);
}

template <int R>
void score_rows(const float* q, const float* u, int count, int wide, float* s, int64_t step) {
  for (int j = 0; j < count; j += 4, u += 4 * int64_t(wide)) {
    V acc[R][4] = {};
    for (int i = 0; i < wide; i += lanes) {
      const V a = read(u + i), b = read(u + wide + i), c = read(u + 2 * wide + i), d = read(u + 3 * wide + i);
      for (int r = 0; r < R; ++r) {
        const V y = read(q + int64_t(r) * wide + i);
        acc[r][0] += a * y;
        acc[r][1] += b * y;
        acc[r][2] += c * y;
        acc[r][3] += d * y;
      }
    }
    for (int r = 0; r < R; ++r) *reinterpret_cast<V4*>(s + r * step + j) = sums(acc[r]);
  }
}

void scores(const float* q, int rows, const float* u, int count, int wide, float* s, int64_t step) {
  int r = 0;
  for (; r + block <= rows; r += block) {
    score_rows<block>(q + int64_t(r) * wide, u, count, wide, s + r * step, step);
  }
  for (; r < rows; ++r) score_rows<1>(q + int64_t(r) * wide, u, count, wide, s + r * step, step);
}

void place(float* s, int n, const float* scales, float lift) {
  for (int j = 0; j < n; ++j) s[j] = s[j] * scales[j] + lift;
}

void soften(float* s, int n, const float* scales, float& top, float& total) {
  top = s[0];
  for (int j = 1; j < n; ++j) top = s[j] > top ? s[j] : top;
  F all = {};
  for (int j = 0; j < n; j += W) {
    const int left = n - j;
    if (left >= W) {
      const F p = exponential(load(s + j) - top);
      all += p;
      store(s + j, p * load(scales + j));
    } else {
      F p = exponential(load(s + j, left) - top);
      for (int i = left; i < W; ++i) p[i] = 0.0f;
      all += p;
      p *= load(scales + j, left);
      std::memcpy(s + j, &p, left * sizeof(float));
    }
  }
  total = sum(all);
}

template <int R, int N>
void weigh_rows(const float* p, int64_t step, const float* u, int count, int wide, float* y) {
  V acc[R][N];
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < N; ++i) acc[r][i] = read(y + int64_t(r) * wide + i * lanes);
  }
  for (int j = 0; j < count; ++j, u += wide) {
    V x[N];
    for (int i = 0; i < N; ++i) x[i] = read(u + i * lanes);
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < N; ++i) acc[r][i] += x[i] * p[r * step + j];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < N; ++i) write(y + int64_t(r) * wide + i * lanes, acc[r][i]);
  }
}

template <int N>
void weigh_strip(
    const float* p, int64_t step, int rows, const float* u, int count, int wide, float* y) {
  int r = 0;
  for (; r + block <= rows; r += block) {
    weigh_rows<block, N>(p + r * step, step, u, count, wide, y + int64_t(r) * wide);
  }
  for (; r < rows; ++r) weigh_rows<1, N>(p + r * step, step, u, count, wide, y + int64_t(r) * wide);
}

void weigh(const float* p, int64_t step, int rows, const float* u, int count, int wide, float* y) {
  int at = 0;
  for (; at + 4 * lanes <= wide; at += 4 * lanes) weigh_strip<4>(p, step, rows, u + at, count, wide, y + at);
  for (; at < wide; at += lanes) weigh_strip<1>(p, step, rows, u + at, count, wide, y + at);
}

float exponential_of(float x) {
  return exponential(F{} + x)[0];
}

constexpr CodeSteps code_table = {unpack, scores, place, soften, weigh, exponential_of, dot};

} // namespace
} // namespace streamer
