// Memory that ops read and work in.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "mlx/array.h"

namespace streamer {

// Where an array's elements lie in row-major order: its own data, or a copy that `held` keeps.
const void* row_major(const mlx::core::array& a, std::vector<std::shared_ptr<char>>& held);

// What a thread works in: products' packed rows, what they need besides, weights in the form that
// kernels take; and what the steps around them need.
enum class Use { packed, scratch, weights, step };

// `count` floats of this thread's own, 64-byte aligned, valid until the next call for this use.
float* workspace(Use use, int64_t count);

} // namespace streamer
