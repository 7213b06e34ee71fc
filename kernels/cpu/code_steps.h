// Reading codes: what an instruction set supplies beside attend.h.
#pragma once

#include <cstdint>

namespace streamer {

constexpr int key_tile = 64, value_tile = 128; // tokens that are unpacked into bytes at a time

// Indices of `width` bits, each standing for `channels` channels.
struct Codebook {
  const float* points; // [2^width, channels]
  int width, channels;
  // Of pairs that are multiples of `grid`, in bytes: 128 + the multiple of the first and of the
  // second channel by index, repeated up to 64. grid is 0 where points are none.
  float grid;
  uint8_t bytes[2][256];
};

// Products of bytes. A row's floats become x = unit * (256 h + l) with signed bytes h and l and one
// unit for all, a rounding by at most 2^-16 of the largest of them; from there on sums are exact but
// for the conversion of each to float. Sums of values are in an order of channels of their own.
struct ByteSteps {
  int (*wide)(int n); // channels a row of n takes, with padding
  // q [rows, n] as digits [rows, 2, wide(n)], with the rows' units and what to add to integer sums.
  void (*pack_queries)(const float* q, int rows, int n, int8_t* digits, float* units, int32_t* lifts);
  // s[r * step + j] = dot of row r and token j's points, for all tokens of a tile. room: as many bytes
  // as a tile has channels, 64-byte aligned.
  void (*scores)(
      const uint32_t* const* words, const Codebook& book, int n, const int8_t* digits, const float* units,
      const int32_t* lifts, int rows, uint8_t* room, float* s);
  // p[j] * scales[j] of a tile as digits [2, value_tile].
  void (*pack_weights)(const float* p, const float* scales, int8_t* digits, float& unit, int32_t& lift);
  // y[r * wide(n) + i] += sum over the tile's tokens of row r's weight times the token's points.
  void (*weigh)(
      const uint32_t* const* words, const Codebook& book, int n, const int8_t* digits, const float* units,
      const int32_t* lifts, int rows, uint8_t* room, float* y);
  void (*in_order)(const float* y, int n, float* out); // the n channels of a sum
};

struct CodeSteps {
  // u[j * n ...] = points of the indices in words[j], for j < count.
  void (*unpack)(const uint32_t* const* words, int count, const Codebook& book, int n, float* u);
  void (*widen)(const uint16_t* from, int64_t stride, int count, float* to); // float16 to float32
  void (*times)(float* s, int count, const float* by); // s[j] *= by[j]
  void (*place)(float* s, int count, const float* by, float lift); // s[j] = s[j] * by[j] + lift
};

const CodeSteps& codes_portable();
const CodeSteps& codes_avx2();
const CodeSteps& codes_avx512();
const CodeSteps& codes_neon();
const ByteSteps& codes_vbmi();
const ByteSteps& codes_madd();

} // namespace streamer
