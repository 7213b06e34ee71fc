#include "coded_sides.h"

#include <cmath>

#include "isa.h"
#include "tiles.h"

namespace streamer {

const CodeSteps& code_steps() {
#if defined(__x86_64__)
  if (level() >= Level::avx512) return codes_avx512();
  if (level() == Level::avx2) return codes_avx2();
#elif defined(__aarch64__)
  if (level() == Level::neon) return codes_neon();
#endif
  return codes_portable();
}

const ByteSteps* byte_steps() {
#if defined(__x86_64__)
  static const bool vbmi = __builtin_cpu_supports("avx512vbmi");
  // Tiles, where they are, even if VNNI is the first choice for weights.
  const bool tiles = level() == Level::amx || (level() == Level::vnni && !forced() && tiles_granted());
  if (vbmi && tiles && codes_tiles() != nullptr) return codes_tiles();
  if (vbmi && level() >= Level::vnni) return &codes_vbmi();
  if (level() == Level::avx2) return &codes_madd();
#endif
  return nullptr;
}

constexpr float two_digits = 32639.0f; // 256 * 127 + 127

Codebook book_of(const mx::array& points) {
  const int count = points.shape(0), channels = points.shape(1);
  Codebook book{points.data<float>(), 0, channels, 0.0f, {}};
  while ((1 << book.width) < count) ++book.width;
  float top = 0.0f;
  for (int i = 0; i < channels * count; ++i) top = std::max(top, std::abs(book.points[i]));
  const float grid = top / (channels == 2 ? 127 : two_digits);
  for (int i = 0; i < std::max(count, 64); ++i) {
    int multiples[2];
    for (int e = 0; e < channels; ++e) {
      const float x = book.points[i % count * channels + e], multiple = std::nearbyint(x / grid);
      if (!(std::abs(multiple * grid - x) <= 1e-6f * top)) return book;
      multiples[e] = static_cast<int>(multiple);
    }
    if (channels == 1) {
      const int whole = multiples[0];
      multiples[0] = (whole + 128) >> 8;
      multiples[1] = whole - 256 * multiples[0];
    }
    for (int e = 0; e < 2; ++e) book.bytes[e][i] = static_cast<uint8_t>(128 + multiples[e]);
  }
  book.grid = grid;
  return book;
}

} // namespace streamer
