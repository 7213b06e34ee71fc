// Weights of 2 and 3 bits as nibbles, of 5 and 6 as bytes.
#pragma once

#include <cstdint>

namespace streamer {

// `count` weights of `bits` bits, lowest bits first, as nibbles or bytes in the same order. A
// multiple of 16; nothing is read beyond them.
void spread(const uint8_t* from, int bits, int64_t count, uint8_t* to);

} // namespace streamer
