// steps.h, compiled for neon.
#if defined(__aarch64__)
#include "steps_impl.h"

namespace streamer {

const Steps& steps_neon() {
  return table;
}

} // namespace streamer
#endif
