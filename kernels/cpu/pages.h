// Large arrays on huge pages, where the system has them: a walk over weights touches a new page of
// 4 kB every 50 ns, and looking its address up costs up to a sixth of a product's time.
#pragma once

#include "mlx/array.h"

namespace streamer {

// [rows, bytes] uint8, all zero, evaluated.
mlx::core::array zeros_on_huge_pages(int rows, int bytes);

// Moves what lies in an evaluated array's memory, 2 MB at a time; whether the system did (Linux from
// 6.1 on, unless its transparent huge pages are off) and there was anything that large.
bool onto_huge_pages(const mlx::core::array& array);

} // namespace streamer
