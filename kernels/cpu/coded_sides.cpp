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

const ByteSteps* byte_steps(const Codebook& book) {
#if defined(__x86_64__)
  static const bool vbmi = __builtin_cpu_supports("avx512vbmi");
  // Tiles, where they are, even if VNNI is the first choice for weights.
  const bool tiles = level() == Level::amx || (level() == Level::vnni && !forced() && tiles_granted());
  if (vbmi && tiles && codes_tiles() != nullptr) return codes_tiles();
  if (vbmi && level() >= Level::vnni) return &codes_vbmi();
  if (level() == Level::avx2) {
    if (book.channels == 1) return book.pieces.exist ? &codes_levels() : nullptr;
    if (book.width < 8 || book.mirrored) return &codes_madd();
  }
#endif
  return nullptr;
}

namespace {

// levels [256], as multiples of their grid.
Pieces pieces_of(const int* levels) {
  Pieces pieces{};
  for (int piece = 0; piece < 16; ++piece) {
    const int* upper = levels + 128 + 8 * piece;
    const int slope = upper[1] - upper[0], bent = upper[2] - upper[0] - 2 * slope;
    pieces.low[piece] = static_cast<uint8_t>(upper[0] & 255);
    pieces.high[piece] = static_cast<uint8_t>(upper[0] >> 8);
    pieces.slope[piece] = static_cast<int8_t>(slope);
    pieces.bent[piece] = static_cast<int8_t>(bent);
    if (upper[0] < 0 || slope != pieces.slope[piece] || bent != pieces.bent[piece]) return {};
    for (int i = 0; i < 8; ++i) {
      const int level = upper[0] + slope * i + bent * bend[i];
      if (upper[i] != level || levels[127 - 8 * piece - i] != -level) return {};
    }
  }
  pieces.exist = true;
  return pieces;
}

} // namespace

Codebook book_of(const mx::array& points) {
  const int count = points.shape(0), channels = points.shape(1);
  Codebook book{points.data<float>(), 0, channels, 0.0f, {}, false, {}};
  while ((1 << book.width) < count) ++book.width;
  float top = 0.0f;
  for (int i = 0; i < channels * count; ++i) top = std::max(top, std::abs(book.points[i]));
  const float grid = top / (channels == 2 ? 127.0f : static_cast<float>(top_level));
  int levels[256];
  for (int i = 0; i < std::max(count, 64); ++i) {
    int multiples[2] = {};
    for (int e = 0; e < channels; ++e) {
      const float x = book.points[i % count * channels + e], multiple = std::nearbyint(x / grid);
      if (!(std::abs(multiple * grid - x) <= 1e-6f * top)) return book;
      multiples[e] = static_cast<int>(multiple);
    }
    if (channels == 1) {
      const int whole = levels[i] = multiples[0];
      multiples[0] = (whole + radix / 2) >> 5;
      multiples[1] = whole - radix * multiples[0];
    }
    for (int e = 0; e < 2; ++e) book.bytes[e][i] = static_cast<uint8_t>(128 + multiples[e]);
  }
  book.mirrored = true;
  for (int i = 0; i < channels * count / 2; ++i) {
    book.mirrored &= book.points[channels * count / 2 + i] == -book.points[i];
  }
  if (channels == 1) book.pieces = pieces_of(levels);
  book.grid = grid;
  return book;
}

} // namespace streamer
