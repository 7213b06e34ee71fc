// Memory that ops read.
#pragma once

#include <memory>
#include <vector>

#include "mlx/array.h"

namespace streamer {

// Where an array's elements lie in row-major order: its own data, or a copy that `held` keeps.
const void* row_major(const mlx::core::array& a, std::vector<std::shared_ptr<char>>& held);

} // namespace streamer
