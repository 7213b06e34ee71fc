// Attention of several rows over the same keys and values: what an instruction set supplies.
//
// Every number of a row has its own order of additions, whatever rows and tokens come with it.
#pragma once

#include <cstdint>

namespace streamer {

constexpr int span = 1024; // tokens under one softmax, counted from the first; spans are merged in order
constexpr int step = span + 16; // floats from a row's scores to the next's: not a multiple of 4 KB
constexpr int most_tile = 32; // of any instruction set's tile

struct AttendSteps {
  int tile; // tokens that all rows take before the next ones, a multiple of 4: half of the cache or less
  // s[r * step + j] = dot(q + r * n, k + j * stride) for r < rows and j < count <= tile.
  void (*scores)(const float* q, int rows, const float* k, int64_t stride, int count, int n, float* s);
  // s[j] = s[j] * scale + bias[j], and no less than the lowest float; bias may be null.
  void (*place)(float* s, int count, float scale, const float* bias);
  // s[j] = exp(s[j] - top), top being the largest of the first `count`; zeros from there to `all`,
  // a multiple of 16. Gives top and the sum of exp.
  void (*soften)(float* s, int count, int all, float& top, float& sum);
  // y[r * n + i] += sum over j < count <= tile of p[r * step + j] * v[j * stride + i], i < n.
  void (*weigh)(const float* p, int rows, const float* v, int64_t stride, int count, int n, float* y);
  // Takes a span's sum y [n] with its top and total into those of the spans before it.
  void (*merge)(const float* y, float top, float total, int n, float* to, float& to_top, float& to_total);
  float (*exponential)(float x); // x <= 0
  float (*dot)(const float* a, const float* b, int n);
};

// The table of the instruction set in use.
const AttendSteps& attend_steps();

const AttendSteps& attend_portable();
const AttendSteps& attend_avx2();
const AttendSteps& attend_avx512();
const AttendSteps& attend_neon();

} // namespace streamer
