// Weights of mxfp8 (e4m3, groups of 32 with a power of two) and nvfp4 (e2m1, groups of 16 with an
// e4m3 scale) as the floats that they stand for, which is exact.
#pragma once

#include "rows.h"

namespace streamer {

// Rows [begin, end) of such a matrix, [end - begin, K]; 32-byte aligned.
void widen_rows(const Matrix& matrix, int64_t begin, int64_t end, float* to);

} // namespace streamer
