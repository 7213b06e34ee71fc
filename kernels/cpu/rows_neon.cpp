// rows.h with NEON: four lanes.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "rows_impl.h"

namespace streamer {
namespace {

struct Neon {
  static constexpr int W = 4;
  static constexpr int max_block = 4;
  static constexpr int block(int M) {
    return M <= 4 ? 4 : 2;
  }
  using F = float32x4_t;
  struct Nibbles {
    int32x4_t low, high; // nibbles 0, 2, 4, 6 and 1, 3, 5, 7 as signed bytes
  };

  static F zero() {
    return vdupq_n_f32(0.0f);
  }
  static F set1(float a) {
    return vdupq_n_f32(a);
  }
  static F load(const float* p) {
    return vld1q_f32(p);
  }
  static void store(float* p, F a) {
    vst1q_f32(p, a);
  }
  static F add(F a, F b) {
    return vaddq_f32(a, b);
  }
  static F mul(F a, F b) {
    return vmulq_f32(a, b);
  }
  static F fma(F a, F b, F c) {
    return vfmaq_f32(c, a, b);
  }
  static float sum(F a) {
    float32x2_t two = vadd_f32(vget_low_f32(a), vget_high_f32(a));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
  }
  static F wide(const void* base, Scale type, int64_t index) {
    if (type == Scale::f32) return load(static_cast<const float*>(base) + index);
    uint16x4_t half = vld1_u16(static_cast<const uint16_t*>(base) + index);
    if (type == Scale::f16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
  }
  static F bytes(const uint8_t* p) {
    uint32_t four;
    std::memcpy(&four, p, 4);
    uint16x8_t pairs = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)));
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(pairs)));
  }

  static uint32x4_t words(const uint32_t* p, int64_t count = 4) {
    if (count >= 4) return vld1q_u32(p);
    uint32_t out[4] = {};
    for (int i = 0; i < count; ++i) out[i] = p[i];
    return vld1q_u32(out);
  }
  static int8x16_t table(const int8_t* values) {
    return vld1q_s8(values);
  }
  static Nibbles split(uint32x4_t words, int8x16_t table) {
    uint8x16_t both = vreinterpretq_u8_u32(words);
    return {
        vreinterpretq_s32_s8(vqtbl1q_s8(table, vandq_u8(both, vdupq_n_u8(15)))),
        vreinterpretq_s32_s8(vqtbl1q_s8(table, vshrq_n_u8(both, 4)))};
  }
  template <int J>
  static F nibble(const Nibbles& q) {
    int32x4_t four = J % 2 == 0 ? q.low : q.high;
    return vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(four, 24 - J / 2 * 8), 24));
  }
  static int lanes(int) {
    return 0;
  }
  static F spread(const float* s, int) {
    return vdupq_n_f32(*s);
  }
  static void interleave(const float* from, float* to, int64_t stride) {
    for (int j = 0; j < 8; ++j) {
      for (int i = 0; i < W; ++i) to[j * stride + i] = from[8 * i + j];
    }
  }
};

} // namespace

const Rows& rows_neon() {
  static constexpr Rows table = table_of<Neon>();
  return table;
}

} // namespace streamer
#endif
