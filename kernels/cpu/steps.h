// The small steps of a decode pass around its products: what an instruction set supplies.
//
// All work on contiguous float32 and keep one order of additions per output element, whatever the
// number of rows, so that a verified token has the bits of a plain one.
#pragma once

#include <cstdint>

namespace streamer {

// One head of a gated delta rule: for t in [0, T), with state S [Dv, Dk],
//   S = S * g_t;  d_t = (v_t - S k_t) * beta_t;  S = S + d_t k_t^T;  y_t = S q_t
// Pointers are to t = 0, strides are from t to t + 1, in floats. g has one value, or Dk of them.
struct Delta {
  int T, Dk, Dv;
  bool vector_gate;
  const float *q, *k, *v, *g, *beta;
  int64_t q_stride, k_stride, v_stride, g_stride, beta_stride;
  const float* state; // [Dv, Dk]
  float* out_state; // [Dv, Dk]
  float *y, *d; // strides as v
};

constexpr int max_taps = 8;

struct Steps {
  // y = x * scale / sqrt(mean(x^2) + eps) * w for n elements; w may be null.
  void (*norm)(const float* x, const float* w, float eps, float scale, int n, float* y);
  // d in [begin, end) of the head's Dv rows.
  void (*delta)(const Delta& head, int begin, int end);
  // y[c] = sum_k x[k * C + c] * w[k * C + c] for C channels.
  void (*conv)(const float* x, const float* w, int taps, int C, float* y);
  // y[c] = sum_i x[i][at + c] * w[(at + c) * taps + i] for C channels.
  void (*taps)(const float* const* x, const float* w, int taps, int at, int C, float* y);
  // The sum of n floats, and what `rounds` times 128 independent multiply-adds come to: floors.h.
  float (*total)(const float* x, int64_t n);
  float (*multiply)(int rounds, float start);
};

// The table of the instruction set in use.
const Steps& steps();

const Steps& steps_portable();
const Steps& steps_avx2();
const Steps& steps_avx512();
const Steps& steps_neon();

} // namespace streamer
