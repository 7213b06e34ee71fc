// Attention over a long context in pieces: who computes which, and how they are put together.
//
// A softmax goes over one span; spans are merged in order within a group, and groups in order. So a
// row's bits depend on what it sees alone: neither on how many rows or threads there are nor on who
// computed what.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "attend.h"

namespace streamer {

constexpr int group = 8; // spans that are merged with each other before they are with others

// The sum y [n] of the spans taken in so far, of one row, with their top and total.
struct Sum {
  float* y;
  int n;
  float top = -INFINITY, total = 0.0f;

  Sum(float* to, int n) : y(to), n(n) {
    std::fill(y, y + n, 0.0f);
  }
  void take(const float* part, float part_top, float part_total) {
    attend_steps().merge(part, part_top, part_total, n, y, top, total);
  }
  void take(const Sum& part) {
    take(part.y, part.top, part.total);
  }
};

// A part of the context whose values are summed by themselves.
struct ContextPart {
  int spans, n; // n: floats of a row's sum
  // Rows [first, first + rows) of a head over one span: its sums y [rows, n], tops and totals [rows],
  // total 0 where a row sees nothing.
  std::function<void(int head, int first, int rows, int index, float* y, float* tops, float* totals)> run;
};

// Runs all parts for R rows of each head on the threads; row_done(head, r, sums) then gets a row's sum
// of each part, for it to keep. work: multiply-adds.
void run_parts(
    int heads,
    int R,
    int64_t work,
    const std::vector<ContextPart>& parts,
    const std::function<void(int head, int r, const Sum* sums)>& row_done);

} // namespace streamer
