// attend.h, compiled for avx512.
#if defined(__x86_64__)
#include "attend_impl.h"

namespace streamer {

const AttendSteps& attend_avx512() {
  return attend_table;
}

} // namespace streamer
#endif
