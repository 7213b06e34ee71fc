// Memory that ops work in.
#pragma once

#include <cstdint>

namespace streamer {

// What a thread works in: products' packed rows, what they need besides, weights in the form that
// kernels take; and what the steps around them need.
enum class Use { packed, scratch, weights, step };

// `count` floats of this thread's own, 64-byte aligned, valid until the next call for this use.
float* workspace(Use use, int64_t count);

} // namespace streamer
