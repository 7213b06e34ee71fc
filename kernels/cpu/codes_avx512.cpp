// code_steps.h, compiled for avx512.
#if defined(__x86_64__)
#include "codes_impl.h"

namespace streamer {

const CodeSteps& codes_avx512() {
  return code_table;
}

} // namespace streamer
#endif
