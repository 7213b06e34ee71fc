// attend.h, compiled for avx2.
#if defined(__x86_64__)
#include "attend_impl.h"

namespace streamer {

const AttendSteps& attend_avx2() {
  return attend_table;
}

} // namespace streamer
#endif
