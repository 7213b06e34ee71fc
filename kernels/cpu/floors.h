// What this machine can do at best: measured, for kernels.bench. All threads work at once, and the
// time is taken from when all have begun to when the last is done.
#pragma once

#include "mlx/array.h"

namespace streamer {

// Seconds that all threads together take to read an evaluated float32 array once.
double read_seconds(const mlx::core::array& x);

// Fused float32 multiply-adds a second, in registers: `rounds` times 128 in each thread.
double multiply_rate(int rounds);

// Multiply-adds of 4-bit weights a second by the instructions that the kernels in use have for them
// (Rows::peak), in registers; that of multiply_rate() where they are fused multiply-adds.
double product_rate(int rounds);

} // namespace streamer
