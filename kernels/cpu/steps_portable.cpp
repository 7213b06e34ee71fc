// steps.h, compiled for the least CPU that Python runs on here.
#include "steps_impl.h"

namespace streamer {

const Steps& steps_portable() {
  return table;
}

} // namespace streamer
