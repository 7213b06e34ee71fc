// code_steps.h, compiled for the least CPU that Python runs on here.
#include "codes_impl.h"

namespace streamer {

const CodeSteps& codes_portable() {
  return code_table;
}

} // namespace streamer
