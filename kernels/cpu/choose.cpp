#include "choose.h"

#include <algorithm>
#include <cmath>

#include "data.h"

namespace streamer {
namespace {

constexpr int lanes = 16;

// fold(m, x[i]) over all i, in lanes that the compiler can make vectors of.
template <class F>
float folded(const float* x, int n, float start, F fold) {
  float part[lanes];
  std::fill_n(part, lanes, start);
  int i = 0;
  for (; i + lanes <= n; i += lanes) {
    for (int j = 0; j < lanes; ++j) part[j] = fold(part[j], x[i + j]);
  }
  for (; i < n; ++i) part[0] = fold(part[0], x[i]);
  for (int j = 1; j < lanes; ++j) part[0] = fold(part[0], part[j]);
  return part[0];
}

Choice choose_row(const float* x, int n, float nearness, bool confident) {
  const float most = folded(x, n, x[0], [](float a, float b) { return a < b ? b : a; });
  const float size = folded(x, n, 0.0f, [](float a, float b) {
    const float c = std::fabs(b);
    return a < c ? c : a;
  });
  // A log probability is x less the logarithm of a sum of at most n e^most: both are rounded.
  const float rounding = 0x1p-21f * (2 * size + std::log(static_cast<float>(n)));
  const float near = nearness * size, wide = std::max(near, rounding);
  Choice out{-1, false, false, 0};
  double sum = 0;
  for (int i = 0; i < n; ++i) {
    const float less = most - x[i];
    if (less <= wide) {
      if (out.token < 0 && less == 0) {
        out.token = i;
      } else {
        out.near = out.near || less <= near;
        out.unsure = out.unsure || less <= rounding;
      }
    }
    if (confident && less < 20) sum += std::exp(-less);
  }
  if (out.token < 0) out = {0, false, true, 0}; // something is no number
  if (confident && sum > 0) out.confidence = static_cast<float>(1 / sum);
  return out;
}

} // namespace

std::vector<Choice> choose(const mx::array& logits, float nearness, bool confident) {
  check(logits.ndim() >= 1 && logits.dtype() == mx::float32, "choose: logits must be float32");
  mx::array there = logits;
  there.eval();
  Data data;
  const float* x = data(there);
  const int n = logits.shape(-1);
  check(n > 0, "choose: there must be tokens");
  std::vector<Choice> out;
  for (int64_t r = 0; r < static_cast<int64_t>(logits.size()) / n; ++r) {
    out.push_back(choose_row(x + r * n, n, nearness, confident));
  }
  return out;
}

} // namespace streamer
