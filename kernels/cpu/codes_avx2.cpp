// code_steps.h, compiled for avx2.
#if defined(__x86_64__)
#include "codes_impl.h"

namespace streamer {

const CodeSteps& codes_avx2() {
  return code_table;
}

} // namespace streamer
#endif
