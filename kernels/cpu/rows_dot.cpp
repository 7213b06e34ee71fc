// rows.h with NEON's products of bytes (FEAT_DotProd): affine weights of 4 and 8 bits and mxfp4 as
// bytes, against x in fixed point, as rows_vnni.cpp has it; everything else as with NEON.
//
// A block is 64 columns, or 32 where groups are no larger. Of each a lane holds sixteen (eight)
// values of x as integers of 24 bits beside one power of two, cut into three signed bytes:
// x = unit * (2^16 h + 2^8 m + l). Products of bytes are summed exactly, so the only roundings are
// that of x, to 2^-23 of a lane's largest, and those of the lanes' sums.
#if defined(__aarch64__)
#include "bytes_arm.h"

namespace streamer {

#if defined(__ARM_FEATURE_DOTPROD)
namespace {

// Of a row of x a block is the digits h of what meets each vector of weights, then m, l and units.
struct Layout {
  int64_t K, G, columns, blocks, bytes, sums;

  explicit Layout(const Matrix& A)
      : K(A.K),
        G(A.K / A.group),
        columns(A.group < 64 ? 32 : 64),
        blocks(A.K / columns),
        bytes(3 * columns + W * 4),
        sums(A.format == Format::affine ? (G + W - 1) / W * W : 0) {}

  int64_t groups() const {
    return (G + W - 1) / W * W;
  }
};

// Weights of a block as V vectors of signed bytes; bytes less `middle`.
template <Kind kind, int V>
inline __attribute__((always_inline)) void read(
    const uint8_t* from, uint8x16_t middle, int8x16_t (&w)[V]) {
  if constexpr (kind == Kind::bytes) {
    for (int v = 0; v < V; ++v) {
      w[v] = vreinterpretq_s8_u8(vsubq_u8(vld1q_u8(from + 16 * v), middle));
    }
    return;
  }
  for (int v = 0; v < V; v += 2) {
    const uint8x16_t both = vld1q_u8(from + 8 * v);
    const uint8x16_t low = vandq_u8(both, vdupq_n_u8(15)), high = vshrq_n_u8(both, 4);
    if constexpr (kind == Kind::fp4) {
      const int8x16_t halves = vld1q_s8(fp4_halves);
      w[v] = vqtbl1q_s8(halves, low);
      w[v + 1] = vqtbl1q_s8(halves, high);
    } else {
      w[v] = vreinterpretq_s8_u8(low);
      w[v + 1] = vreinterpretq_s8_u8(high);
    }
  }
}

// Sums over each lane's values of x times w, as the integers that they stand for, for R output rows.
template <Kind kind, int V, int R>
inline __attribute__((always_inline)) void whole(
    const int8x16_t (&w)[R][V], const uint8_t* x, F (&out)[R]) {
  const auto* digits = reinterpret_cast<const int8_t*>(x);
  int32x4_t a[R];
  for (int r = 0; r < R; ++r) a[r] = vdupq_n_s32(0);
  for (int d = 0; d < 3; ++d) {
    if (d == 2 && kind == Kind::bytes) { // all three would not fit
      for (int r = 0; r < R; ++r) {
        out[r] = vcvtq_f32_s32(a[r]);
        a[r] = vdupq_n_s32(0);
      }
    } else if (d > 0) {
      for (int r = 0; r < R; ++r) a[r] = vshlq_n_s32(a[r], 8);
    }
    for (int v = 0; v < V; ++v, digits += 16) {
      const int8x16_t of_x = vld1q_s8(digits);
      for (int r = 0; r < R; ++r) a[r] = vdotq_s32(a[r], w[r][v], of_x);
    }
  }
  for (int r = 0; r < R; ++r) { // of nibbles below 15 * 16 * 2^23
    const F last = vcvtq_f32_s32(a[r]);
    out[r] = kind == Kind::bytes ? vfmaq_f32(last, out[r], vdupq_n_f32(256.0f)) : last;
  }
}

// The powers of two that bring values of such size below 2^23, and back; NaN where one is no number.
inline void units(uint32x4_t bits, F& up, F& down) {
  // Half a digit is added to the largest value: from 0x7f7f80 on the third digit would not fit.
  const uint32x4_t top = vandq_u32(bits, vdupq_n_u32(0x7fffff));
  const uint32x4_t full = vcgtq_u32(top, vdupq_n_u32(0x7e0000)); // all ones: minus one
  uint32x4_t exponent = vsubq_u32(vshrq_n_u32(bits, 23), full);
  exponent = vmaxq_u32(exponent, vdupq_n_u32(32));
  // x < 2^(exponent - 126), and 22 bits more are kept.
  const uint32x4_t back = vsubq_u32(exponent, vdupq_n_u32(22));
  const uint32x4_t wild = vcgtq_u32(bits, vdupq_n_u32(0x7f7fffff));
  up = vreinterpretq_f32_u32(vshlq_n_u32(vsubq_u32(vdupq_n_u32(254), back), 23));
  down = vreinterpretq_f32_u32(vorrq_u32(vshlq_n_u32(back, 23), wild));
}

// The lowest bytes of sixteen integers.
inline int8x16_t lowest(const int32x4_t (&q)[4]) {
  const int16x8_t a = vcombine_s16(vmovn_s32(q[0]), vmovn_s32(q[1]));
  const int16x8_t b = vcombine_s16(vmovn_s32(q[2]), vmovn_s32(q[3]));
  return vcombine_s8(vmovn_s16(a), vmovn_s16(b));
}

// One block of one row of x, and its sum.
template <Kind kind, int V>
float pack_block(const float* x, uint8_t* out) {
  // x in the order of the weights' bytes: four values for each lane of each vector.
  F of[V][W];
  for (int v = 0; v < V; v += 2) {
    for (int i = 0; i < W; ++i) {
      if constexpr (kind == Kind::bytes) {
        of[v][i] = vld1q_f32(x + 16 * v + 4 * i);
        of[v + 1][i] = vld1q_f32(x + 16 * (v + 1) + 4 * i);
      } else { // even columns and odd ones
        const float32x4x2_t both = vld2q_f32(x + 16 * v + 8 * i);
        of[v][i] = both.val[0];
        of[v + 1][i] = both.val[1];
      }
    }
  }
  uint32_t largest[W];
  for (int i = 0; i < W; ++i) {
    uint32x4_t most = vdupq_n_u32(0);
    for (int v = 0; v < V; ++v) {
      most = vmaxq_u32(most, vreinterpretq_u32_f32(vabsq_f32(of[v][i])));
    }
    largest[i] = vmaxvq_u32(most);
  }
  F up, down;
  units(vld1q_u32(largest), up, down);
  float by[W];
  vst1q_f32(by, up);
  vst1q_f32(reinterpret_cast<float*>(out + 48 * V), down);
  for (int v = 0; v < V; ++v) {
    const int32x4_t half = vdupq_n_s32(128);
    int32x4_t l[W], m[W], h[W];
    for (int i = 0; i < W; ++i) {
      l[i] = vcvtnq_s32_f32(vmulq_n_f32(of[v][i], by[i]));
      m[i] = vshrq_n_s32(vaddq_s32(l[i], half), 8);
      h[i] = vshrq_n_s32(vaddq_s32(m[i], half), 8);
    }
    auto* to = reinterpret_cast<int8_t*>(out) + 16 * v;
    vst1q_s8(to, lowest(h));
    vst1q_s8(to + 16 * V, lowest(m));
    vst1q_s8(to + 32 * V, lowest(l));
  }
  int8x16_t ones[1][V];
  for (int v = 0; v < V; ++v) ones[0][v] = vdupq_n_s8(1);
  F sum[1];
  whole<kind>(ones, out, sum);
  return vaddvq_f32(vmulq_f32(sum[0], down));
}

template <Kind kind, int V>
void pack_rows(const Matrix& A, int M, const float* const* x, float* out) {
  const Layout L(A);
  auto* to = reinterpret_cast<uint8_t*>(out);
  float* sums = out + M * L.blocks * L.bytes / 4;
  for (int64_t i = 0; i < M * L.sums; ++i) sums[i] = 0.0f;
  for (int64_t k = 0; k < L.blocks; ++k) {
    for (int m = 0; m < M; ++m, to += L.bytes) {
      const float sum = pack_block<kind, V>(x[m] + k * L.columns, to);
      if (L.sums > 0) sums[m * L.sums + k * L.columns / A.group] += sum;
    }
  }
}

// y[m][n + r] for R output rows.
template <Kind kind, int V, int R, int M>
inline __attribute__((always_inline)) void tile(
    const Matrix& A, const Layout& L, const float* packed, float* scratch, float* const* y,
    int64_t n) {
  constexpr int64_t width = kind == Kind::bytes ? 16 * V : 8 * V, bytes = 48 * V + 16;
  const int64_t row_bytes = L.blocks * width, room = L.groups();
  const auto* weights = static_cast<const uint8_t*>(A.w) + n * row_bytes;
  float *scales = scratch, *biases = scratch + R * room;
  F total[R][M];
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) total[r][m] = vdupq_n_f32(0.0f);
    float *s = scales + r * room, *b = biases + r * room;
    if constexpr (kind == Kind::fp4) {
      const auto* exponents = static_cast<const uint8_t*>(A.scales) + (n + r) * L.G;
      for (int64_t g = 0; g < L.G; ++g) s[g] = half_power(exponents[g]);
      continue;
    }
    for (int64_t g = 0; g < room; g += W) {
      vst1q_f32(s + g, widen(A.scales, A.scale, (n + r) * L.G + g, L.G - g));
      vst1q_f32(b + g, widen(A.biases, A.scale, (n + r) * L.G + g, L.G - g));
    }
    const float* of_x = packed + M * L.blocks * bytes / 4;
    for (int64_t g = 0; g < room; g += W) {
      const F whole_bias = kind == Kind::bytes
          ? vfmaq_n_f32(vld1q_f32(b + g), vld1q_f32(s + g), A.middle)
          : vld1q_f32(b + g);
      for (int m = 0; m < M; ++m) {
        total[r][m] = vfmaq_f32(total[r][m], whole_bias, vld1q_f32(of_x + m * L.sums + g));
      }
    }
  }
  const auto* x = reinterpret_cast<const uint8_t*>(packed);
  const int64_t per_group = A.group / (16 * V); // blocks
  const uint8x16_t middle = vdupq_n_u8(static_cast<uint8_t>(A.middle));
  for (int64_t g = 0; g < L.G; ++g) {
    for (int64_t k = 0; k < per_group; ++k, weights += width) {
      int8x16_t w[R][V];
      for (int r = 0; r < R; ++r) {
        read<kind>(weights + r * row_bytes, middle, w[r]);
        // The same columns of the rows that come next: no stride tells the hardware.
        __builtin_prefetch(weights + (R + r) * row_bytes);
      }
      for (int m = 0; m < M; ++m, x += bytes) {
        const F unit = vld1q_f32(reinterpret_cast<const float*>(x + 48 * V));
        F sum[R];
        whole<kind>(w, x, sum);
        for (int r = 0; r < R; ++r) {
          const F by = vmulq_n_f32(unit, scales[r * room + g]);
          total[r][m] = vfmaq_f32(total[r][m], sum[r], by);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) y[m][n + r] = vaddvq_f32(total[r][m]);
  }
}

constexpr int most_rows = 4; // output rows of a tile: as many as registers hold

template <Kind kind, int V, int M>
void run_rows(
    const Matrix& A, const float* packed, float* scratch, float* const* y, int begin, int end) {
  constexpr int R = M == 1 ? most_rows : 2;
  const Layout L(A);
  int n = begin;
  for (; n + R <= end; n += R) tile<kind, V, R, M>(A, L, packed, scratch, y, n);
  for (; n < end; ++n) tile<kind, V, 1, M>(A, L, packed, scratch, y, n);
}

int64_t packed(const Matrix& A, int M) {
  if (!known(A)) return rows_neon().packed(A, M);
  const Layout L(A);
  return M * (L.blocks * L.bytes / 4 + L.sums);
}

int64_t scratch(const Matrix& A) {
  return known(A) ? 2 * most_rows * Layout(A).groups() : rows_neon().scratch(A);
}

void pack(const Matrix& A, int M, const float* const* x, float* out) {
  if (!known(A)) return rows_neon().pack(A, M, x, out);
  by_kind<16>(A, [&]<Kind kind, int V>() { pack_rows<kind, V>(A, M, x, out); });
}

void run(
    const Matrix& A, int M, const float* packed, float* scratch, float* const* y, int begin,
    int end) {
  if (!known(A)) return rows_neon().run(A, M, packed, scratch, y, begin, end);
  by_kind<16>(A, [&]<Kind kind, int V>() {
    by_rows(M, [&](auto rows) {
      run_rows<kind, V, rows.value>(A, packed, scratch, y, begin, end);
    });
  });
}

float peak(int rounds, int start) {
  return peak_of(rounds, start, [](int32x4_t sum, int8x16_t w, int8x16_t x) {
    return vdotq_s32(sum, w, x);
  });
}

} // namespace

const Rows* rows_dot() {
  static constexpr Rows table = {packed, scratch, pack, run, swiglu, silu, peak, apart * 16 / 3};
  return &table;
}

#else

const Rows* rows_dot() {
  return nullptr;
}

#endif
} // namespace streamer
#endif
