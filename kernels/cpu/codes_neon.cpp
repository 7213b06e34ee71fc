// code_steps.h, compiled for neon.
#if defined(__aarch64__)
#include "codes_impl.h"

namespace streamer {

const CodeSteps& codes_neon() {
  return code_table;
}

} // namespace streamer
#endif
