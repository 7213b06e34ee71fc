// Reading codes: what an instruction set supplies beside attend.h.
#pragma once

#include <cstdint>

namespace streamer {

// Tokens of a span are padded to a multiple of these: the last one again, which weighs nothing.
constexpr int padded = 128;

// Levels of single channels are 32 h + l multiples of a grid, h and l signed bytes.
constexpr int radix = 32, top_level = 127 * radix + 15;

// The upper 128 of 256 levels, sixteen pieces of eight: level i of one is start + slope * i + bent *
// bend[i]. The lower ones are their negatives, the last first.
constexpr uint8_t bend[8] = {0, 0, 1, 2, 4, 8, 14, 26};
struct Pieces {
  bool exist; // whether the levels of a codebook are such pieces
  uint8_t low[16], high[16]; // bytes of start
  int8_t slope[16], bent[16];
};

// Indices of `width` bits, each standing for `channels` channels.
struct Codebook {
  const float* points; // [2^width, channels]
  int width, channels;
  // Two bytes for an index, each 128 too large, repeated up to 64: of pairs the first and the second
  // channel as multiples of `grid`, of single channels the digits h and l. grid is 0 where points are
  // no multiples.
  float grid;
  uint8_t bytes[2][256];
  bool mirrored; // whether the upper half of the points are the lower half's negatives, in order
  Pieces pieces;
};

// Rows of queries as integers: see ByteSteps.
struct Integers {
  const int8_t* digits;
  const float* units;
  const int32_t* lifts;
};

// Products of integers, of which n stand for a token, `each` for an index: two bytes, or one level. A row's floats become x = unit * integer with one
// unit for all: a rounding by at most 2^-16 of the largest of them. From there on sums are exact but
// for the conversion of each to float. Sums of values are in an order of channels of their own.
// words: where each of a span's tokens' codes lie. room: 64-byte aligned.
struct ByteSteps {
  int each;
  int (*wide)(int n); // channels a row of n takes, with padding
  int64_t (*room)(int rows, int n); // bytes
  // q [rows, n] as digits [rows, 2 * wide(n)], as many as there are whole eights of rows, with the
  // rows' units and what to add to integer sums. Other eights may be packed by other calls.
  void (*pack)(const float* q, int rows, int n, int8_t* digits, float* units, int32_t* lifts);
  // s[r * step + j] = dot of row r and token j's points, for j < count and up to all that are padded.
  void (*scores)(
      const uint32_t* const* words, int count, const Codebook& book, int n, const Integers& q, int rows,
      uint8_t* room, float* s);
  // y[r * wide(n) + i] += sum over j < count of p[r * step + j] * scales[j] * token j's points; p and
  // scales are zero from count on. p is overwritten.
  void (*weigh)(
      const uint32_t* const* words, int count, const Codebook& book, int n, float* p, const float* scales, int rows,
      uint8_t* room, float* y);
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
const ByteSteps* codes_tiles(); // null where the compiler has no tiles
const ByteSteps& codes_vbmi();
const ByteSteps& codes_madd();
const ByteSteps& codes_levels(); // of single channels in pieces

} // namespace streamer
