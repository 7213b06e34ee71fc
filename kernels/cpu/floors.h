// What this machine can do at best: measured, for kernels.bench.
#pragma once

#include "mlx/array.h"

namespace streamer {

// Seconds that all threads together take to read an evaluated float32 array once.
double read_seconds(const mlx::core::array& x);

// Seconds that each thread takes for `rounds` times 128 fused multiply-adds, all at once.
double multiply_seconds(int rounds);

} // namespace streamer
