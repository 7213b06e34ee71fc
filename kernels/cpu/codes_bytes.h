// What the kernels of code_steps.h's ByteSteps share: included once by each instruction set's source.
#pragma once

#include "attend.h"
#include "code_steps.h"
#include "fused.h"

namespace streamer {
namespace {

// Calls f<width>() for a codebook's.
template <class F>
auto with_width(int width, F f) {
  switch (width) {
    case 4: return f.template operator()<4>();
    case 5: return f.template operator()<5>();
    case 6: return f.template operator()<6>();
    case 7: return f.template operator()<7>();
    default: return f.template operator()<8>();
  }
}

// The same; K::width is the only one that K is for, or 0.
template <class K, class F>
auto with_width_of(int width, F f) {
  if constexpr (K::width != 0) {
    return f.template operator()<K::width>();
  } else {
    return with_width(width, f);
  }
}

// Bytes from a token's codes to those of `tokens` later, where they lie in one array.
inline int64_t later(const uint32_t* const* words, int tokens) {
  return (words[1] - words[0]) * 4 * tokens;
}

// What brings values of at most `top` to integers of at most `largest`, and back. Too small ones are
// zero.
inline void unit_of(float top, float largest, float& up, float& unit) {
  const bool some = top > 1e-30f;
  up = some ? largest / top : 0.0f;
  unit = some ? top / largest : 0.0f;
  if (!(top < 3.4e38f)) unit = __builtin_nanf("");
}

constexpr float two_digits = 32639.0f; // 256 * 127 + 127

template <int R>
struct Count {};

// Calls part(r, Count<R>()) for `most` rows at a time, 2 or 4, until there are `rows`.
template <int most, class F>
void by_rows(int rows, F part) {
  int r = 0;
  for (; r + most <= rows; r += most) part(r, Count<most>());
  if constexpr (most == 4) {
    if (rows - r == 3) return part(r, Count<3>());
    if (rows - r == 2) return part(r, Count<2>());
  }
  if (rows - r == 1) part(r, Count<1>());
}

template <class V>
inline void write(float* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// ByteSteps::scores. K says how bytes are laid out: K::V is a vector of floats, K::tile tokens are
// unpacked at a time, four vectors of them; K::multiply<R> gives R rows' sums over `keys(n)` of them.
template <class K>
void scores_by(
    const uint32_t* const* words, int count, const Codebook& book, int n, const Integers& q, int rows,
    uint8_t* room, float* s) {
  using V = typename K::V;
  constexpr int W = sizeof(V) / 4, tile = 4 * W;
  const int64_t row = 2 * K::wide(n);
  for (int from = 0; from < count; from += tile) {
    with_width_of<K>(book.width, [&]<int width>() { K::template unpack_keys<width>(words + from, book, n, room); });
    by_rows<K::rows>(rows, [&]<int R>(int r, Count<R>) {
      V found[R][4];
      K::template multiply<R>(room, 16 * W, K::keys(n), q.digits + r * row, row, K::wide(n), q.lifts + r, found);
      for (int i = 0; i < R; ++i) {
        const V unit = V{} + q.units[r + i] * book.grid;
        for (int j = 0; j < 4; ++j) write(s + int64_t(r + i) * step + from + W * j, found[i][j] * unit);
      }
    });
  }
}

// ByteSteps::weigh, a block of K::channels channels of 128 tokens at a time, of which a row's weights
// have one unit.
template <class K>
void weigh_by(
    const uint32_t* const* words, int count, const Codebook& book, int n, float* p, const float* scales, int rows,
    uint8_t* room, float* y) {
  using V = typename K::V;
  constexpr int W = sizeof(V) / 4, row = 2 * padded;
  const int all = K::wide(n);
  auto* units = reinterpret_cast<float*>(room + K::channels * padded * K::bytes);
  auto* lifts = reinterpret_cast<int32_t*>(units + rows);
  auto* digits = reinterpret_cast<int8_t*>(lifts + rows);
  for (int from = 0; from < count; from += padded) {
    for (int r = 0; r < rows; ++r) {
      K::pack_weights(p + int64_t(r) * step + from, scales + from, digits + r * row, units[r], lifts[r]);
    }
    for (int block = 0; block < all / K::channels; ++block) {
      with_width_of<K>(
          book.width, [&]<int width>() { K::template unpack_values<width>(words + from, book, n, block, room); });
      by_rows<K::rows>(rows, [&]<int R>(int r, Count<R>) {
        for (int at = 0; at < K::channels; at += 4 * W) {
          V found[R][4];
          K::template multiply<R>(
              room + 4 * at, 4 * K::channels, padded * K::bytes / 4, digits + r * row, row, padded, lifts + r,
              found);
          for (int i = 0; i < R; ++i) {
            const V unit = V{} + units[r + i] * book.grid;
            float* to = y + int64_t(r + i) * all + block * K::channels + at;
            for (int j = 0; j < 4; ++j) {
              V before;
              __builtin_memcpy(&before, to + W * j, sizeof before);
              write(to + W * j, fused(found[i][j], unit, before));
            }
          }
        }
      });
    }
  }
}

// ByteSteps::room for these two.
template <class K>
int64_t room_by(int rows, int n) {
  const int64_t keys = 4 * sizeof(typename K::V) / 4 * K::wide(n) * K::bytes;
  const int64_t values = K::channels * padded * K::bytes + int64_t(rows) * (8 + 2 * padded);
  return keys > values ? keys : values;
}

} // namespace
} // namespace streamer
