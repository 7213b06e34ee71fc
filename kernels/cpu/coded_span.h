// Rows of a head over one span of the raw or of the coded tokens, as ContextPart::run.
#pragma once

#include <vector>

#include "coded_sides.h"

namespace streamer {

// The rotated queries of all heads as integers, where codes are multiplied as bytes.
class Queries {
 public:
  Queries(const Call& call, const Source& keys);

  // Those of a head's rows from `first` on, a multiple of 8.
  Integers of(int head, int first) const;

 private:
  const ByteSteps* steps_;
  const int R_; // rows of a head, with padding
  int64_t row_ = 0; // bytes of one
  std::vector<float> units_;
  std::vector<int32_t> lifts_;
  std::vector<int8_t> digits_;
};

void run_raw(
    const Call& call, const Source& keys, const Source& values, int head, int first, int rows, int index,
    float* y, float* tops, float* totals);

void run_coded(
    const Call& call, const Queries& queries, const Source& keys, const Source& values, int head, int first,
    int rows, int index, float* y, float* tops, float* totals);

// The n channels of a sum of coded values.
void in_order(const Source& values, const float* sum, float* out);

} // namespace streamer
