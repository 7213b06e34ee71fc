// attend.h, compiled for neon.
#if defined(__aarch64__)
#include "attend_impl.h"

namespace streamer {

const AttendSteps& attend_neon() {
  return attend_table;
}

} // namespace streamer
#endif
