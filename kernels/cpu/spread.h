// Weights as the kernels take them: of 2 and 3 bits as nibbles, of 5 and 6 as bytes, minifloats as
// floats.
#pragma once

#include <cstdint>

#include "minifloats.h"
#include "rows.h"

namespace streamer {

// The matrix as the kernels see it: of 4 or 8 bits where it has 2, 3, 5 or 6, dense where it has
// minifloats, else as it is.
Matrix spread(const Matrix& matrix);

inline bool is_spread(const Matrix& matrix) {
  const bool whole = matrix.bits == 4 || matrix.bits == 8;
  return is_minifloat(matrix) || (matrix.format != Format::dense && !whole);
}

// `count` weights of `bits` bits, lowest bits first, as nibbles or bytes in the same order. A
// multiple of 16; nothing is read beyond them.
void spread(const uint8_t* from, int bits, int64_t count, uint8_t* to);

} // namespace streamer
