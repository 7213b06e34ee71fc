// What choosing a token takes over a whole vocabulary.
#pragma once

#include "step.h"

namespace streamer {

// x [..., n] -> log(sum(exp(x))) over the last axis, which is left out or kept with size 1.
mx::array logsumexp(const mx::array& x, bool keepdims, mx::StreamOrDevice stream);

} // namespace streamer
