// rows.h in plain C++, four lanes that compilers may vectorise.
#include "rows_impl.h"

namespace streamer {
namespace {

struct Portable {
  static constexpr int W = 4;
  static constexpr int max_block = 2;
  static constexpr int block(int M) {
    return M <= 4 ? 2 : 1;
  }
  struct F {
    float v[4];
  };
  struct Nibbles {
    int8_t v[8][4];
  };

  static F zero() {
    return F{};
  }
  static F set1(float a) {
    return {{a, a, a, a}};
  }
  static F load(const float* p) {
    return {{p[0], p[1], p[2], p[3]}};
  }
  static void store(float* p, F a) {
    for (int i = 0; i < W; ++i) p[i] = a.v[i];
  }
  static F add(F a, F b) {
    for (int i = 0; i < W; ++i) a.v[i] += b.v[i];
    return a;
  }
  static F mul(F a, F b) {
    for (int i = 0; i < W; ++i) a.v[i] *= b.v[i];
    return a;
  }
  static F fma(F a, F b, F c) {
    for (int i = 0; i < W; ++i) c.v[i] += a.v[i] * b.v[i];
    return c;
  }
  static float sum(F a) {
    return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
  }
  static F wide(const void* base, Scale type, int64_t index) {
    F out;
    for (int i = 0; i < W; ++i) out.v[i] = streamer::wide(base, type, index + i);
    return out;
  }
  static F bytes(const uint8_t* p) {
    return {{float(p[0]), float(p[1]), float(p[2]), float(p[3])}};
  }

  struct Four {
    uint32_t v[4];
  };
  static Four words(const uint32_t* p, int64_t count = 4) {
    Four out{};
    for (int i = 0; i < count; ++i) out.v[i] = p[i];
    return out;
  }
  static const int8_t* table(const int8_t* values) {
    return values;
  }
  static Nibbles split(Four words, const int8_t* table) {
    Nibbles out;
    for (int j = 0; j < 8; ++j) {
      for (int i = 0; i < W; ++i) out.v[j][i] = table[words.v[i] >> 4 * j & 15];
    }
    return out;
  }
  template <int J>
  static F nibble(const Nibbles& q) {
    F out;
    for (int i = 0; i < W; ++i) out.v[i] = q.v[J][i];
    return out;
  }
  static int lanes(int) {
    return 0;
  }
  static F spread(const float* s, int) {
    return set1(*s);
  }
  static void interleave(const float* from, float* to, int64_t stride) {
    for (int j = 0; j < 8; ++j) {
      for (int i = 0; i < W; ++i) to[j * stride + i] = from[8 * i + j];
    }
  }
};

} // namespace

const Rows& rows_portable() {
  static constexpr Rows table = table_of<Portable>();
  return table;
}

} // namespace streamer
