// steps.h, compiled for avx512.
#if defined(__x86_64__)
#include "steps_impl.h"

namespace streamer {

const Steps& steps_avx512() {
  return table;
}

} // namespace streamer
#endif
