// rows.h with NEON's products of matrices of bytes (FEAT_I8MM): affine weights of 4 and 8 bits and
// mxfp4 as bytes, against x in fixed point; everything else as with NEON.
//
// An instruction multiplies two output rows by two rows of x, eight columns of each. x is integers
// of 24 bits beside a power of two for each block, cut into three signed bytes:
// x = unit * (2^16 h + 2^8 m + l). A block is 64 columns, or 32 where groups are no larger. Products
// of bytes are summed exactly, so the only roundings are that of x, to 2^-23 of a block's largest,
// and those of the blocks' sums. A lone row, of either side, goes with one that nobody asks for.
#if defined(__aarch64__)
#include "bytes_arm.h"

namespace streamer {

#if defined(__ARM_FEATURE_MATMUL_INT8)
namespace {

constexpr int R = 4; // output rows of a tile

// Two rows of x are packed to, for each block, h of both, eight columns in turns, then m, l and both
// units; behind them both sums by group.
struct Layout {
  int64_t K, G, columns, blocks, bytes;
  bool sums;

  explicit Layout(const Matrix& A)
      : K(A.K),
        G(A.K / A.group),
        columns(A.group < 64 ? 32 : 64),
        blocks(A.K / columns),
        bytes(6 * columns + W * 4),
        sums(A.format == Format::affine) {}
};

// Weights of two output rows as C pieces of eight columns of each; bytes less `middle`.
template <Kind kind, int C>
inline __attribute__((always_inline)) void read(
    const uint8_t* first, const uint8_t* second, uint8x16_t middle, int8x16_t (&w)[C]) {
  constexpr int vectors = kind == Kind::bytes ? C / 2 : C / 4;
  for (int v = 0; v < vectors; ++v) {
    const uint64x2_t a = vreinterpretq_u64_u8(vld1q_u8(first + 16 * v)),
                     b = vreinterpretq_u64_u8(vld1q_u8(second + 16 * v));
    const uint8x16_t both[2] = {
        vreinterpretq_u8_u64(vzip1q_u64(a, b)), vreinterpretq_u8_u64(vzip2q_u64(a, b))};
    for (int i = 0; i < 2; ++i) {
      if constexpr (kind == Kind::bytes) {
        w[2 * v + i] = vreinterpretq_s8_u8(vsubq_u8(both[i], middle));
        continue;
      }
      const uint8x16_t low = vandq_u8(both[i], vdupq_n_u8(15)), high = vshrq_n_u8(both[i], 4);
      if constexpr (kind == Kind::fp4) {
        const int8x16_t halves = vld1q_s8(fp4_halves);
        w[4 * v + 2 * i] = vqtbl1q_s8(halves, low);
        w[4 * v + 2 * i + 1] = vqtbl1q_s8(halves, high);
      } else {
        w[4 * v + 2 * i] = vreinterpretq_s8_u8(low);
        w[4 * v + 2 * i + 1] = vreinterpretq_s8_u8(high);
      }
    }
  }
}

// Sums over a block of x times w, as the integers that they stand for.
template <int C>
inline __attribute__((always_inline)) void whole(
    const int8x16_t (&w)[R / 2][C], const uint8_t* x, F (&out)[R / 2]) {
  const auto* digits = reinterpret_cast<const int8_t*>(x);
  int32x4_t a[R / 2], b[R / 2];
  for (int r = 0; r < R / 2; ++r) a[r] = b[r] = vdupq_n_s32(0);
  for (int c = 0; c < C; ++c, digits += 16) {
    for (int r = 0; r < R / 2; ++r) a[r] = vmmlaq_s32(a[r], w[r][c], vld1q_s8(digits));
  }
  for (int r = 0; r < R / 2; ++r) a[r] = vshlq_n_s32(a[r], 8);
  for (int c = 0; c < C; ++c, digits += 16) {
    for (int r = 0; r < R / 2; ++r) a[r] = vmmlaq_s32(a[r], w[r][c], vld1q_s8(digits));
  }
  for (int c = 0; c < C; ++c, digits += 16) { // all three would not fit
    for (int r = 0; r < R / 2; ++r) b[r] = vmmlaq_s32(b[r], w[r][c], vld1q_s8(digits));
  }
  for (int r = 0; r < R / 2; ++r) {
    out[r] = vfmaq_f32(vcvtq_f32_s32(b[r]), vcvtq_f32_s32(a[r]), vdupq_n_f32(256.0f));
  }
}

// The powers of two that bring values of such size below 2^23, and back; NaN where one is no number.
inline void unit_of(uint32_t bits, float& up, float& down) {
  // Half a digit is added to the largest value: from 0x7f7f80 on the third digit would not fit.
  uint32_t exponent = (bits >> 23) + ((bits & 0x7fffffu) > 0x7e0000u);
  if (exponent < 32) exponent = 32;
  const uint32_t back = exponent - 22; // x < 2^(exponent - 126), and 22 bits more are kept
  up = from_bits((254 - back) << 23);
  down = from_bits(bits > 0x7f7fffffu ? 0xffffffffu : back << 23);
}

// The lowest bytes of eight integers.
inline int8x8_t lowest(int32x4_t a, int32x4_t b) {
  return vmovn_s16(vcombine_s16(vmovn_s32(a), vmovn_s32(b)));
}

// One block of one row of x, every other eight bytes of `out`, its unit, and its sum.
template <Kind kind, int C>
inline float pack_block(const float* x, int8_t* out, float& down) {
  F of[C][2]; // x in the order of the weights' bytes
  uint32x4_t most = vdupq_n_u32(0);
  for (int c = 0; c < C; c += 2, x += 16) {
    for (int i = 0; i < 2; ++i) {
      if constexpr (kind == Kind::bytes) {
        of[c][i] = vld1q_f32(x + 4 * i);
        of[c + 1][i] = vld1q_f32(x + 8 + 4 * i);
      } else { // even columns and odd ones
        const float32x4x2_t both = vld2q_f32(x + 8 * i);
        of[c][i] = both.val[0];
        of[c + 1][i] = both.val[1];
      }
      most = vmaxq_u32(most, vreinterpretq_u32_f32(vabsq_f32(of[c][i])));
      most = vmaxq_u32(most, vreinterpretq_u32_f32(vabsq_f32(of[c + 1][i])));
    }
  }
  float up;
  unit_of(vmaxvq_u32(most), up, down);
  const int32x4_t half = vdupq_n_s32(128);
  int32x4_t sum = vdupq_n_s32(0); // below 64 * 2^23
  for (int c = 0; c < C; ++c) {
    int32x4_t l[2], m[2], h[2];
    for (int i = 0; i < 2; ++i) {
      l[i] = vcvtnq_s32_f32(vmulq_n_f32(of[c][i], up));
      m[i] = vshrq_n_s32(vaddq_s32(l[i], half), 8);
      h[i] = vshrq_n_s32(vaddq_s32(m[i], half), 8);
      sum = vaddq_s32(sum, l[i]);
    }
    vst1_s8(out + 16 * c, lowest(h[0], h[1]));
    vst1_s8(out + 16 * (C + c), lowest(m[0], m[1]));
    vst1_s8(out + 16 * (2 * C + c), lowest(l[0], l[1]));
  }
  return static_cast<float>(vaddvq_s32(sum)) * down;
}

template <Kind kind, int C>
void pack_rows(const Matrix& A, int M, const float* const* x, float* out) {
  const Layout L(A);
  const int pairs = (M + 1) / 2;
  auto* to = reinterpret_cast<int8_t*>(out);
  float* sums = out + pairs * L.blocks * L.bytes / 4;
  for (int64_t i = 0; i < pairs * L.G * W && L.sums; ++i) sums[i] = 0.0f;
  for (int64_t k = 0; k < L.blocks; ++k) {
    const int64_t g = k * L.columns / A.group;
    for (int m = 0; m < 2 * pairs; ++m) {
      float* unit = reinterpret_cast<float*>(to + 48 * C);
      float down = 0.0f, sum = 0.0f;
      if (m < M) {
        sum = pack_block<kind, C>(x[m] + k * L.columns, to + m % 2 * 8, down);
      } else {
        for (int c = 0; c < 3 * C; ++c) vst1_s8(to + 16 * c + 8, vdup_n_s8(0));
      }
      unit[m % 2] = unit[m % 2 + 2] = down;
      float* both = sums + (g * pairs + m / 2) * W + m % 2;
      if (L.sums) both[0] += sum, both[2] += sum;
      if (m % 2) to += L.bytes;
    }
  }
}

// Of two output rows from group `first` and `second` on: each twice, group after group.
inline void widen_both(
    const Matrix& A, const void* from, int64_t first, int64_t second, int64_t G, float* to) {
  for (int64_t g = 0; g < G; g += W, to += W * W) {
    F a, b;
    if (A.format == Format::mxfp4) {
      const auto* exponents = static_cast<const uint8_t*>(from);
      float one[2][W] = {};
      for (int64_t i = 0; i < W && g + i < G; ++i) {
        one[0][i] = half_power(exponents[first + g + i]);
        one[1][i] = half_power(exponents[second + g + i]);
      }
      a = vld1q_f32(one[0]);
      b = vld1q_f32(one[1]);
    } else {
      a = widen(from, A.scale, first + g, G - g);
      b = widen(from, A.scale, second + g, G - g);
    }
    const F low = vzip1q_f32(a, b), high = vzip2q_f32(a, b);
    vst1q_f32(to, vzip1q_f32(low, low));
    vst1q_f32(to + W, vzip2q_f32(low, low));
    vst1q_f32(to + 2 * W, vzip1q_f32(high, high));
    vst1q_f32(to + 3 * W, vzip2q_f32(high, high));
  }
}

inline int64_t widened(const Layout& L) { // floats for two output rows
  return (L.G + W - 1) / W * W * W;
}

// y[m][n + r] for r in [0, count), at most R.
template <Kind kind, int C, int M>
inline void tile(
    const Matrix& A, const Layout& L, const float* packed, float* scratch, float* const* y,
    int64_t n, int64_t count) {
  constexpr int pairs = (M + 1) / 2;
  constexpr int64_t width = kind == Kind::bytes ? 8 * C : 4 * C, bytes = 48 * C + 16;
  const int64_t row_bytes = L.blocks * width, room = widened(L);
  const uint8_t* rows[R];
  float *scales = scratch, *biases = scratch + R / 2 * room;
  for (int r = 0; r < R; r += 2) {
    const int64_t first = n + (r < count ? r : count - 1),
                  second = n + (r + 1 < count ? r + 1 : count - 1);
    rows[r] = static_cast<const uint8_t*>(A.w) + first * row_bytes;
    rows[r + 1] = static_cast<const uint8_t*>(A.w) + second * row_bytes;
    widen_both(A, A.scales, first * L.G, second * L.G, L.G, scales + r / 2 * room);
    if (kind == Kind::fp4) continue;
    widen_both(A, A.biases, first * L.G, second * L.G, L.G, biases + r / 2 * room);
  }
  F total[R / 2][pairs];
  for (int r = 0; r < R / 2; ++r) {
    for (int p = 0; p < pairs; ++p) total[r][p] = vdupq_n_f32(0.0f);
  }
  const auto* x = reinterpret_cast<const uint8_t*>(packed);
  const float* of_x = packed + pairs * L.blocks * bytes / 4;
  const int64_t per_group = A.group / (8 * C); // blocks
  int64_t at = 0;
  const uint8x16_t middle = vdupq_n_u8(static_cast<uint8_t>(A.middle));
  for (int64_t g = 0; g < L.G; ++g) {
    F scale[R / 2];
    for (int r = 0; r < R / 2; ++r) {
      scale[r] = vld1q_f32(scales + r * room + g * W);
      if (kind == Kind::fp4) continue;
      F bias = vld1q_f32(biases + r * room + g * W);
      if (kind == Kind::bytes) bias = vfmaq_n_f32(bias, scale[r], A.middle);
      for (int p = 0; p < pairs; ++p) {
        total[r][p] = vfmaq_f32(total[r][p], bias, vld1q_f32(of_x + (g * pairs + p) * W));
      }
    }
    for (int64_t k = 0; k < per_group; ++k, at += width) {
      int8x16_t w[R / 2][C];
      for (int r = 0; r < R / 2; ++r) {
        read<kind>(rows[2 * r] + at, rows[2 * r + 1] + at, middle, w[r]);
        // The same columns of the rows that come next: no stride tells the hardware.
        __builtin_prefetch(rows[2 * r] + at + R * row_bytes);
        __builtin_prefetch(rows[2 * r + 1] + at + R * row_bytes);
      }
      for (int p = 0; p < pairs; ++p, x += bytes) {
        const F unit = vld1q_f32(reinterpret_cast<const float*>(x + 48 * C));
        F sum[R / 2];
        whole(w, x, sum);
        for (int r = 0; r < R / 2; ++r) {
          total[r][p] = vfmaq_f32(total[r][p], sum[r], vmulq_f32(unit, scale[r]));
        }
      }
    }
  }
  for (int r = 0; r < R / 2; ++r) {
    for (int p = 0; p < pairs; ++p) {
      float four[W];
      vst1q_f32(four, total[r][p]);
      for (int i = 0; i < W; ++i) {
        const int m = 2 * p + i % 2, row = 2 * r + i / 2;
        if (m < M && row < count) y[m][n + row] = four[i];
      }
    }
  }
}

template <Kind kind, int C, int M>
void run_rows(
    const Matrix& A, const float* packed, float* scratch, float* const* y, int begin, int end) {
  const Layout L(A);
  for (int n = begin; n < end; n += R) {
    tile<kind, C, M>(A, L, packed, scratch, y, n, end - n < R ? end - n : R);
  }
}

int64_t packed(const Matrix& A, int M) {
  if (!known(A)) return rows_neon().packed(A, M);
  const Layout L(A);
  return (M + 1) / 2 * (L.blocks * L.bytes / 4 + L.sums * L.G * W);
}

int64_t scratch(const Matrix& A) {
  return known(A) ? R * widened(Layout(A)) : rows_neon().scratch(A);
}

void pack(const Matrix& A, int M, const float* const* x, float* out) {
  if (!known(A)) return rows_neon().pack(A, M, x, out);
  by_kind<8>(A, [&]<Kind kind, int C>() { pack_rows<kind, C>(A, M, x, out); });
}

void run(
    const Matrix& A, int M, const float* packed, float* scratch, float* const* y, int begin,
    int end) {
  if (!known(A)) return rows_neon().run(A, M, packed, scratch, y, begin, end);
  by_kind<8>(A, [&]<Kind kind, int C>() {
    by_rows(M, [&](auto rows) {
      run_rows<kind, C, rows.value>(A, packed, scratch, y, begin, end);
    });
  });
}

float peak(int rounds, int start) {
  return peak_of(rounds, start, [](int32x4_t sum, int8x16_t w, int8x16_t x) {
    return vmmlaq_s32(sum, w, x);
  });
}

} // namespace

const Rows* rows_i8mm() {
  static constexpr Rows table = {packed, scratch, pack, run, swiglu, silu, peak, apart * 32 / 3};
  return &table;
}

#else

const Rows* rows_i8mm() {
  return nullptr;
}

#endif
} // namespace streamer
#endif
