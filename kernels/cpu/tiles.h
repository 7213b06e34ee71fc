// Intel's AMX: eight registers of up to 16 rows of 64 bytes, and products of tiles of bytes.
//
// They belong to a thread, which says how large each is before it uses them and gives them back when
// it is through: a thread that has tiles in use is dearer to switch from and to. The process must
// have asked for them once (tiles_granted). The intrinsics of GCC 12 don't say that a tile is read
// from memory, so that stores before them may come after: these do.
#pragma once

#if defined(__x86_64__)
#include <cstdint>

namespace streamer {

// Whether this CPU multiplies tiles of bytes and the system lets this process: asked for once, and
// true for threads that are there already, too.
bool tiles_granted();

} // namespace streamer

#if defined(__AMX_INT8__)
namespace streamer {
namespace {

// The sizes of the eight tiles: rows, and bytes of a row.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, unused[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  constexpr void set(int tile, int count, int row_bytes) {
    rows[tile] = static_cast<uint8_t>(count);
    bytes[tile] = static_cast<uint16_t>(row_bytes);
  }
};

// This thread's tiles, from here to the end of the scope.
class Tiles {
 public:
  explicit Tiles(const TileShapes& shapes) {
    asm volatile("ldtilecfg %0" : : "m"(shapes));
  }
  ~Tiles() {
    asm volatile("tilerelease");
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

template <int tile>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile) : "memory");
}

template <int tile>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(tile) : "memory");
}

template <int tile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}

// c[i][j] += sum over k of a[i][k] * b[k / 4][4 * j + k % 4] in int32, a of uint8 and b of int8.
template <int c, int a, int b>
inline void tile_multiply() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}

// The same of int8 and int8.
template <int c, int a, int b>
inline void tile_multiply_signed() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}

} // namespace
} // namespace streamer
#endif
#endif
