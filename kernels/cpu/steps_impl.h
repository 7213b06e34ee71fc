// The steps of steps.h over sixteen lanes in the compiler's own vectors: included once by each
// instruction set's source, which says by its flags what a vector becomes.
#pragma once

#include <cstdint>
#include <cstring>

#include "fused.h"
#include "steps.h"

namespace streamer {
namespace {

constexpr int W = 16;

// Two vectors as one. Compilers keep a vector that is wider than a register in memory, value by
// value; of pairs each part has its register.
template <class V>
struct Pair {
  V a, b;

  friend Pair operator+(Pair x, Pair y) {
    return {x.a + y.a, x.b + y.b};
  }
  friend Pair operator*(Pair x, Pair y) {
    return {x.a * y.a, x.b * y.b};
  }
  friend Pair operator*(Pair x, float y) {
    return {x.a * y, x.b * y};
  }
  Pair& operator+=(Pair x) {
    return *this = *this + x;
  }
};

#if defined(__AVX512F__)
typedef float F __attribute__((vector_size(64), aligned(4), may_alias));
#elif defined(__AVX2__)
typedef float Part __attribute__((vector_size(32), aligned(4), may_alias));
using F = Pair<Part>;
#else
typedef float Part __attribute__((vector_size(16), aligned(4), may_alias));
using F = Pair<Pair<Part>>;
#endif

template <class V>
struct Memory {
  static V load(const float* p) { // from anywhere: as an argument here, V is aligned
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, V v) {
    std::memcpy(p, &v, sizeof v);
  }
};

template <class V>
struct Memory<Pair<V>> {
  static constexpr int half = sizeof(V) / sizeof(float);
  static Pair<V> load(const float* p) {
    return {Memory<V>::load(p), Memory<V>::load(p + half)};
  }
  static void store(float* p, Pair<V> v) {
    Memory<V>::store(p, v.a);
    Memory<V>::store(p + half, v.b);
  }
};

template <class V>
inline Pair<V> fused(Pair<V> x, Pair<V> y, Pair<V> z) {
  return {fused(x.a, y.a, z.a), fused(x.b, y.b, z.b)};
}

template <class V>
struct Same { // in all lanes
  static V of(float x) {
    return V{} + x;
  }
};

template <class V>
struct Same<Pair<V>> {
  static Pair<V> of(float x) {
    return {Same<V>::of(x), Same<V>::of(x)};
  }
};

inline F load(const float* p) {
  return Memory<F>::load(p);
}

inline void store(float* p, F v) {
  Memory<F>::store(p, v);
}

// The first `n` of sixteen, zeros after.
inline F load(const float* p, int n) {
  float lane[W] = {};
  std::memcpy(lane, p, n * sizeof(float));
  return load(lane);
}

// The upper half of the lanes onto the lower one, and so on, whatever holds them.
template <class V>
inline float sum(V v) {
  constexpr int lanes = sizeof v / sizeof(float);
  float lane[lanes];
  std::memcpy(lane, &v, sizeof v);
  for (int half = lanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

#if defined(__AVX2__) && !defined(__AVX512F__)
inline float sum(Part v) {
  const auto four =
      __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  return (four[0] + four[2]) + (four[1] + four[3]);
}
#endif

template <class V>
inline float sum(Pair<V> v) {
  return sum(v.a + v.b);
}

inline float dot(const float* a, const float* b, int n) {
  F even = {}, odd = {};
  int i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    even = fused(load(a + i), load(b + i), even);
    odd = fused(load(a + i + W), load(b + i + W), odd);
  }
  if (i + W <= n) {
    even = fused(load(a + i), load(b + i), even);
    i += W;
  }
  if (i < n) odd = fused(load(a + i, n - i), load(b + i, n - i), odd);
  return sum(even + odd);
}

// e^x for x <= 0, to 2 units in the last place: 2^n times a polynomial (Cephes' expf).
template <class F>
inline F exponential(F x) {
  typedef decltype(F{} < F{}) I;
  x = x < -87.0f ? F{} - 87.0f : x;
  const F turns = x * 1.44269504f;
  // Adding 1.5 * 2^23 rounds to the nearest integer, which stays in the low bits.
  const F rounded = turns + 12582912.0f;
  const F n = rounded - 12582912.0f;
  const F r = fused(n, F{} + 2.12194440e-4f, fused(n, F{} - 0.693359375f, x));
  F p = fused(r, F{} + 1.9875691500e-4f, F{} + 1.3981999507e-3f);
  p = fused(p, r, F{} + 8.3334519073e-3f);
  p = fused(p, r, F{} + 4.1665795894e-2f);
  p = fused(p, r, F{} + 1.6666665459e-1f);
  p = fused(p, r, F{} + 5.0000001201e-1f);
  p = fused(p * r, r, r + 1.0f);
  const I power = (__builtin_convertvector(n, I) + 127) << 23;
  F scale;
  std::memcpy(&scale, &power, sizeof scale);
  return p * scale;
}

void norm(const float* x, const float* w, float eps, float scale, int n, float* y) {
  const float by = scale / __builtin_sqrtf(dot(x, x, n) / n + eps);
  if (w != nullptr) {
    for (int i = 0; i < n; ++i) y[i] = x[i] * by * w[i];
  } else {
    for (int i = 0; i < n; ++i) y[i] = x[i] * by;
  }
}

// A row of the state stays in registers over all T rows when Dk is N vectors.
template <int N>
void delta_rows(const Delta& h, int begin, int end) {
  for (int row = begin; row < end; ++row) {
    F s[N];
    for (int i = 0; i < N; ++i) s[i] = load(h.state + int64_t(row) * h.Dk + i * W);
    for (int t = 0; t < h.T; ++t) {
      const float *k = h.k + t * h.k_stride, *q = h.q + t * h.q_stride, *g = h.g + t * h.g_stride;
      F held = {};
      for (int i = 0; i < N; ++i) {
        s[i] = h.vector_gate ? s[i] * load(g + i * W) : s[i] * *g;
        held = fused(s[i], load(k + i * W), held);
      }
      const int64_t at = t * h.v_stride + row;
      const float d = (h.v[at] - sum(held)) * h.beta[t * h.beta_stride];
      F out = {};
      const F by = Same<F>::of(d);
      for (int i = 0; i < N; ++i) {
        s[i] = fused(load(k + i * W), by, s[i]);
        out = fused(s[i], load(q + i * W), out);
      }
      h.d[at] = d;
      h.y[at] = sum(out);
    }
    for (int i = 0; i < N; ++i) store(h.out_state + int64_t(row) * h.Dk + i * W, s[i]);
  }
}

void delta(const Delta& h, int begin, int end) {
  switch (h.Dk / W) {
    case 1: return delta_rows<1>(h, begin, end);
    case 2: return delta_rows<2>(h, begin, end);
    case 4: return delta_rows<4>(h, begin, end);
    case 6: return delta_rows<6>(h, begin, end);
    case 8: return delta_rows<8>(h, begin, end);
    case 12: return delta_rows<12>(h, begin, end);
    case 16: return delta_rows<16>(h, begin, end);
  }
}

void conv(const float* x, const float* w, int taps, int C, float* y) {
  for (int c = 0; c < C; ++c) y[c] = x[c] * w[c];
  for (int k = 1; k < taps; ++k) {
    const float *xk = x + int64_t(k) * C, *wk = w + int64_t(k) * C;
    for (int c = 0; c < C; ++c) y[c] += xk[c] * wk[c];
  }
}

void taps(const float* const* x, const float* w, int taps, int at, int C, float* y) {
  w += int64_t(at) * taps;
  if (taps == 4) { // what models have; the compiler turns the stride into shuffles
    const float *a = x[0] + at, *b = x[1] + at, *c = x[2] + at, *d = x[3] + at;
    for (int i = 0; i < C; ++i) {
      y[i] = (a[i] * w[4 * i] + b[i] * w[4 * i + 1]) + (c[i] * w[4 * i + 2] + d[i] * w[4 * i + 3]);
    }
    return;
  }
  for (int i = 0; i < C; ++i) {
    float sum = 0.0f;
    for (int j = 0; j < taps; ++j) sum += x[j][at + i] * w[i * taps + j];
    y[i] = sum;
  }
}

float total(const float* x, int64_t n) {
  F part[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) part[j] += load(x + i + j * W);
  }
  float rest = 0.0f;
  for (; i < n; ++i) rest += x[i];
  return sum((part[0] + part[1]) + (part[2] + part[3])) + rest;
}

// In vectors as wide as a register, whatever the rest here is written in: eight sums at a time,
// which stay in registers everywhere; sixteen where Arm's CPUs have four multipliers.
float multiply(int rounds, float start) {
#if defined(__AVX512F__)
  constexpr int wide = 16;
#elif defined(__AVX2__)
  constexpr int wide = 8;
#else
  constexpr int wide = 4;
#endif
#if defined(__aarch64__)
  constexpr int apart = 16;
#else
  constexpr int apart = 8;
#endif
  typedef float R __attribute__((vector_size(wide * 4)));
  const R by = R{} + start;
  R sums[apart];
#pragma GCC unroll 16
  for (int k = 0; k < apart; ++k) sums[k] = by + float(k);
  for (int i = 0; i < rounds; ++i) {
#pragma GCC unroll 4
    for (int turn = 0; turn < 128 / wide / apart; ++turn) {
#pragma GCC unroll 16
      for (int k = 0; k < apart; ++k) sums[k] = fused(by, by, sums[k]);
    }
  }
  float all = 0.0f;
  for (const R& one : sums) {
    for (int k = 0; k < wide; ++k) all += one[k];
  }
  return all;
}

constexpr Steps table = {norm, delta, conv, taps, total, multiply};

} // namespace
} // namespace streamer
