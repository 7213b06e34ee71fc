// steps.h, compiled for avx2.
#if defined(__x86_64__)
#include "steps_impl.h"

namespace streamer {

const Steps& steps_avx2() {
  return table;
}

} // namespace streamer
#endif
