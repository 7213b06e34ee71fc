// The products of rows.h over a vector type V: included once by each instruction set's source.
//
// Nibbles (affine 4 bits, mxfp4): lane i of a block holds word i, eight weights, so a shift gives
// one weight a lane and rows are packed to match. Groups are summed before they are scaled,
// sum(s * (q - c) * x) = s * sum((q - c) * x), and biases meet the sums of x by group once a row.
// Bytes (8 bits): weights in their order, q * s + b in one FMA. Other widths come spread (spread.h).
// Dense: weights as they are.
#pragma once

#include "rows.h"
#include "unpack.h"

namespace streamer {
namespace {

inline int64_t rounded(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

inline bool nibbles(const Matrix& A) {
  return A.format != Format::dense && A.bits == 4;
}

// Numbers of one matrix in units of the vector.
template <class V>
struct Layout {
  static constexpr int W = V::W;
  int64_t K, G, words, blocks, sums;

  explicit Layout(const Matrix& A)
      : K(A.K),
        G(A.format == Format::dense ? 0 : A.K / A.group),
        words(A.K / 8),
        blocks(nibbles(A) ? rounded(A.K / 8, W) / W : rounded(A.K, W) / W),
        sums(A.format == Format::affine && A.bits == 4 ? rounded(G, W) : 0) {}

  // A row of group scales as floats, padded with zeros so that any lane may read on.
  int64_t groups() const {
    return rounded(G, W) + 2 * W;
  }
};

template <class V>
int64_t packed(const Matrix& A, int M) {
  Layout<V> L(A);
  return M * (L.blocks * V::W * (nibbles(A) ? 8 : 1) + L.sums);
}

template <class V>
int64_t scratch(const Matrix& A) {
  Layout<V> L(A);
  return max_tile * max_rows * V::W + V::max_block * 2 * L.groups();
}

// Columns taken at a time, so that M packed rows of them stay in the first-level cache. A multiple
// of every block and group: where columns are cut changes no sum.
inline int64_t stretch(int M) {
  return 6144 / M / 128 * 128;
}

// Sums so far of R rows, M each, kept between stretches of columns.
template <class V, int R, int M>
inline __attribute__((always_inline)) void resume(
    const float* from, bool first, typename V::F (&total)[R][M]) {
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) {
      total[r][m] = first ? V::zero() : V::load(from + (r * M + m) * V::W);
    }
  }
}

template <class V, int R, int M>
inline __attribute__((always_inline)) void keep(
    const typename V::F (&total)[R][M], bool last, float* to, float* const* y, int64_t n) {
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) {
      if (last) {
        y[m][n + r] = V::sum(total[r][m]);
      } else {
        V::store(to + (r * M + m) * V::W, total[r][m]);
      }
    }
  }
}

template <class V>
void pack(const Matrix& A, int M, const float* const* x, float* out) {
  constexpr int W = V::W;
  Layout<V> L(A);
  if (!nibbles(A)) {
    for (int64_t k = 0; k < L.blocks; ++k) {
      for (int m = 0; m < M; ++m, out += W) {
        for (int i = 0; i < W; ++i) out[i] = k * W + i < L.K ? x[m][k * W + i] : 0.0f;
      }
    }
    return;
  }
  for (int64_t k = 0; k < L.blocks; ++k) {
    bool whole = (k + 1) * W <= L.words;
    for (int m = 0; m < M; ++m) {
      const float* from = x[m] + k * W * 8;
      float* to = out + (k * 8 * M + m) * W;
      if (whole) {
        V::interleave(from, to, M * W);
        continue;
      }
      for (int j = 0; j < 8; ++j) {
        for (int i = 0; i < W; ++i) to[j * M * W + i] = k * W + i < L.words ? from[8 * i + j] : 0.0f;
      }
    }
  }
  float* sums = out + M * L.blocks * W * 8;
  for (int m = 0; m < M && L.sums > 0; ++m, sums += L.sums) {
    for (int64_t g = 0; g < L.sums; ++g) {
      typename V::F sum = V::zero();
      for (int i = 0; g < L.G && i < A.group; i += W) {
        sum = V::add(sum, V::load(x[m] + g * A.group + i));
      }
      sums[g] = V::sum(sum);
    }
  }
}

// `count` scales (or biases) from `index` on as floats, then zeros up to `room`.
template <class V>
void widen(const void* from, Scale type, int64_t index, int64_t count, int64_t room, float* to) {
  int64_t i = 0;
  for (; i + V::W <= count; i += V::W) V::store(to + i, V::wide(from, type, index + i));
  for (; i < count; ++i) to[i] = wide(from, type, index + i);
  for (; i < room; ++i) to[i] = 0.0f;
}

// Weights and x by their eight nibbles, for R output rows and M rows of x.
template <class V, int R, int M, int J>
inline __attribute__((always_inline)) void nibble(
    const typename V::Nibbles (&q)[R], const float* x, typename V::F (&acc)[R][M]) {
  typename V::F w[R];
  for (int r = 0; r < R; ++r) w[r] = V::template nibble<J>(q[r]);
  for (int m = 0; m < M; ++m) {
    typename V::F xm = V::load(x + (J * M + m) * V::W);
    for (int r = 0; r < R; ++r) {
      acc[r][m] = J == 0 ? V::mul(w[r], xm) : V::fma(w[r], xm, acc[r][m]);
    }
  }
}

// Each of the three: y[m][n + r] for R rows over columns [begin, end), sums kept in `sums`.

template <class V, int R, int M>
void nibble_rows(
    const Matrix& A, const float* x, float* scratch, float* sums, float* const* y, int64_t n,
    int64_t begin, int64_t end) {
  using F = typename V::F;
  constexpr int W = V::W;
  const Layout<V> L(A);
  const auto* weights = static_cast<const uint32_t*>(A.w) + n * L.words;
  const int64_t room = L.groups();
  float* scales = scratch;
  float* biases = scratch + R * room;
  F total[R][M];
  resume<V, R, M>(sums, begin == 0, total);
  if (A.format == Format::mxfp4) {
    const auto* exponents = static_cast<const uint8_t*>(A.scales) + n * L.G;
    for (int r = 0; r < R; ++r) {
      float* to = scales + r * room;
      for (int64_t g = 0; g < L.G; ++g) to[g] = half_power(exponents[r * L.G + g]);
      for (int64_t g = L.G; g < room; ++g) to[g] = 0.0f;
    }
  } else {
    for (int r = 0; r < R; ++r) {
      widen<V>(A.scales, A.scale, (n + r) * L.G, L.G, room, scales + r * room);
    }
  }
  if (begin == 0 && L.sums > 0) {
    for (int r = 0; r < R; ++r) {
      widen<V>(A.biases, A.scale, (n + r) * L.G, L.G, room, biases + r * room);
    }
    const float* of_x = x + M * L.blocks * W * 8;
    const F middle = V::set1(static_cast<float>(A.middle));
    for (int64_t g = 0; g < L.sums; g += W) {
      F b[R];
      for (int r = 0; r < R; ++r) {
        b[r] = V::fma(middle, V::load(scales + r * room + g), V::load(biases + r * room + g));
      }
      for (int m = 0; m < M; ++m) {
        F sum = V::load(of_x + m * L.sums + g);
        for (int r = 0; r < R; ++r) total[r][m] = V::fma(b[r], sum, total[r][m]);
      }
    }
  }
  const auto table = V::table(A.format == Format::mxfp4 ? fp4_halves : centred + 8 - A.middle);
  const int per_group = A.group / 8;
  const auto lanes = V::lanes(per_group);
  const int64_t last = rounded(end, 8 * W) / (8 * W);
  for (int64_t k = begin / (8 * W); k < last; ++k) {
    const float* at = x + k * 8 * M * W;
    typename V::Nibbles q[R];
    for (int r = 0; r < R; ++r) {
      const uint32_t* from = weights + r * L.words + k * W;
      q[r] = V::split((k + 1) * W <= L.words ? V::words(from) : V::words(from, L.words - k * W), table);
      // The same columns of the rows that come next: no stride tells the hardware.
      __builtin_prefetch(from + R * L.words);
    }
    F acc[R][M];
    nibble<V, R, M, 0>(q, at, acc);
    nibble<V, R, M, 1>(q, at, acc);
    nibble<V, R, M, 2>(q, at, acc);
    nibble<V, R, M, 3>(q, at, acc);
    nibble<V, R, M, 4>(q, at, acc);
    nibble<V, R, M, 5>(q, at, acc);
    nibble<V, R, M, 6>(q, at, acc);
    nibble<V, R, M, 7>(q, at, acc);
    const int64_t g = k * W / per_group;
    for (int r = 0; r < R; ++r) {
      F s = V::spread(scales + r * room + g, lanes);
      for (int m = 0; m < M; ++m) total[r][m] = V::fma(s, acc[r][m], total[r][m]);
    }
  }
  keep<V, R, M>(total, end == L.K, sums, y, n);
}

template <class V, int R, int M>
void byte_rows(
    const Matrix& A, const float* x, float* scratch, float* sums, float* const* y, int64_t n,
    int64_t begin, int64_t end) {
  using F = typename V::F;
  constexpr int W = V::W;
  const Layout<V> L(A);
  const int64_t first = begin / A.group, groups = (end - begin) / A.group;
  const int64_t room = L.groups();
  const uint8_t* q[R];
  for (int r = 0; r < R; ++r) {
    const int64_t at = (n + r) * L.G + first;
    q[r] = static_cast<const uint8_t*>(A.w) + (n + r) * L.K + begin;
    widen<V>(A.scales, A.scale, at, groups, groups, scratch + r * room);
    widen<V>(A.biases, A.scale, at, groups, groups, scratch + (R + r) * room);
  }
  F acc[R][M];
  resume<V, R, M>(sums, begin == 0, acc);
  x += begin * M;
  for (int64_t g = 0; g < groups; ++g) {
    F s[R], b[R];
    for (int r = 0; r < R; ++r) {
      s[r] = V::set1(scratch[r * room + g]);
      b[r] = V::set1(scratch[(R + r) * room + g]);
      __builtin_prefetch(q[r] + R * L.K + g * A.group);
    }
    for (int i = 0; i < A.group; i += W, x += M * W) {
      F w[R];
      for (int r = 0; r < R; ++r) w[r] = V::fma(V::bytes(q[r] + g * A.group + i), s[r], b[r]);
      for (int m = 0; m < M; ++m) {
        F xm = V::load(x + m * W);
        for (int r = 0; r < R; ++r) acc[r][m] = V::fma(w[r], xm, acc[r][m]);
      }
    }
  }
  keep<V, R, M>(acc, end == L.K, sums, y, n);
}

template <class V, Scale type, int R, int M>
void dense_rows_of(
    const Matrix& A, const float* x, float* sums, float* const* y, int64_t n, int64_t begin,
    int64_t end) {
  using F = typename V::F;
  constexpr int W = V::W;
  const int64_t K = A.K, whole = begin + (end - begin) / W * W;
  const void* weights = A.w;
  F acc[R][M];
  resume<V, R, M>(sums, begin == 0, acc);
  x += begin * M;
  for (int64_t k = begin; k < whole; k += W, x += M * W) {
    F w[R];
    for (int r = 0; r < R; ++r) w[r] = V::wide(weights, type, (n + r) * K + k);
    for (int m = 0; m < M; ++m) {
      F xm = V::load(x + m * W);
      for (int r = 0; r < R; ++r) acc[r][m] = V::fma(w[r], xm, acc[r][m]);
    }
  }
  for (int r = 0; whole < end && r < R; ++r) {
    float tail[W];
    for (int i = 0; i < W; ++i) {
      tail[i] = whole + i < K ? wide(weights, type, (n + r) * K + whole + i) : 0.0f;
    }
    for (int m = 0; m < M; ++m) acc[r][m] = V::fma(V::load(tail), V::load(x + m * W), acc[r][m]);
  }
  keep<V, R, M>(acc, end == K, sums, y, n);
}

template <class V, int R, int M>
void dense_rows(
    const Matrix& A, const float* x, float*, float* sums, float* const* y, int64_t n,
    int64_t begin, int64_t end) {
  switch (A.scale) {
    case Scale::f32: return dense_rows_of<V, Scale::f32, R, M>(A, x, sums, y, n, begin, end);
    case Scale::f16: return dense_rows_of<V, Scale::f16, R, M>(A, x, sums, y, n, begin, end);
    case Scale::bf16: return dense_rows_of<V, Scale::bf16, R, M>(A, x, sums, y, n, begin, end);
  }
}

// A tile: stretch after stretch of columns, R output rows at a time, then the rest one by one.
template <class V, int M>
void run_rows(
    const Matrix& A, const float* x, float* scratch, float* const* y, int begin, int end) {
  constexpr int R = V::block(M);
  static_assert(R <= V::max_block);
  float* kept = scratch;
  scratch += max_tile * max_rows * V::W;
  auto sweep = [&](auto many, auto one) {
    for (int64_t k = 0; k < A.K; k += stretch(M)) {
      const int64_t stop = k + stretch(M) < A.K ? k + stretch(M) : A.K;
      float* sums = kept;
      int n = begin;
      for (; n + R <= end; n += R, sums += R * M * V::W) many(A, x, scratch, sums, y, n, k, stop);
      for (; n < end; ++n, sums += M * V::W) one(A, x, scratch, sums, y, n, k, stop);
    }
  };
  if (nibbles(A)) {
    sweep(nibble_rows<V, R, M>, nibble_rows<V, 1, M>);
  } else if (A.format == Format::dense) {
    sweep(dense_rows<V, R, M>, dense_rows<V, 1, M>);
  } else {
    sweep(byte_rows<V, R, M>, byte_rows<V, 1, M>);
  }
}

template <class V>
void run(
    const Matrix& A, int M, const float* x, float* scratch, float* const* y, int begin, int end) {
  by_rows(M, [&](auto rows) { run_rows<V, rows.value>(A, x, scratch, y, begin, end); });
}

// x / (1 + e^-x), within 2 ulp; plain arithmetic, for the compiler to vectorise.
inline float silu(float x) {
  // e^-x as 2^n * e^r with |r| <= ln(2) / 2; adding 1.5 * 2^23 rounds to a whole n.
  float t = x < -87.0f ? 87.0f : x > 87.0f ? -87.0f : -x;
  float n = (t * 1.44269504f + 12582912.0f) - 12582912.0f;
  float r = (t - n * 0.693359375f) + n * 2.12194440e-4f;
  float e = 1.0f / 5040;
  e = e * r + 1.0f / 720;
  e = e * r + 1.0f / 120;
  e = e * r + 1.0f / 24;
  e = e * r + 1.0f / 6;
  e = e * r + 0.5f;
  e = e * r * r + r + 1.0f;
  int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return x / (1.0f + e * power);
}

template <class V>
void swiglu(float* gate, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; ++i) gate[i] = silu(gate[i]) * up[i];
}

template <class V>
void silus(float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = silu(x[i]);
}

template <class V>
constexpr Rows table_of() {
  return {packed<V>, scratch<V>, pack<V>, run<V>, swiglu<V>, silus<V>};
}

} // namespace
} // namespace streamer
