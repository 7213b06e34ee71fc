// attend.h, compiled for the least CPU that Python runs on here.
#include "attend_impl.h"

namespace streamer {

const AttendSteps& attend_portable() {
  return attend_table;
}

} // namespace streamer
