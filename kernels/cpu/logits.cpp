#include "logits.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "attend.h"
#include "data.h"

namespace streamer {
namespace {

constexpr float lowest = -std::numeric_limits<float>::max();

// The largest of a span and the sum of exp(x - top); what is no number, or infinite, is said.
struct Part {
  float top, total;
  bool wild;
};

Part part_of(const float* x, int count) {
  alignas(64) float s[span];
  int wild = 0;
  for (int i = 0; i < count; ++i) {
    wild |= !(x[i] <= -lowest);
    s[i] = x[i] < lowest ? lowest : x[i];
  }
  Part out{lowest, 0.0f, wild != 0};
  if (!out.wild) attend_steps().soften(s, count, (count + 15) / 16 * 16, out.top, out.total);
  return out;
}

float joined(const float* x, int n, const Part* parts, int count) {
  float top = lowest;
  bool wild = false;
  for (int i = 0; i < count; ++i) {
    top = std::max(top, parts[i].top);
    wild = wild || parts[i].wild;
  }
  if (wild) {
    for (int i = 0; i < n; ++i) {
      if (std::isnan(x[i])) return x[i];
    }
    return std::numeric_limits<float>::infinity();
  }
  if (top == lowest) return -std::numeric_limits<float>::infinity();
  double total = 0;
  for (int i = 0; i < count; ++i) total += parts[i].total * std::exp(double(parts[i].top) - top);
  return static_cast<float>(top + std::log(total));
}

} // namespace

mx::array logsumexp(const mx::array& x, bool keepdims, mx::StreamOrDevice stream) {
  check(x.ndim() >= 1 && x.size() > 0, "logsumexp: there must be numbers");
  check_float({x}, "logsumexp: x must be float32");
  mx::Shape shape = x.shape();
  shape.back() = 1;
  if (!keepdims) shape.pop_back();
  auto body = [](const Arrays& in, Arrays& out) {
    Data data;
    const int n = in[0].shape(-1), spans = (n + span - 1) / span;
    const int64_t rows = static_cast<int64_t>(in[0].size()) / n;
    const RowsOf row(in[0], data);
    std::vector<Part> parts(rows * spans);
    each(static_cast<int>(rows * spans), rows * n * 16, [&](int task) {
      const int from = task % spans * span;
      parts[task] = part_of(row[task / spans] + from, std::min(span, n - from));
    });
    for (int64_t r = 0; r < rows; ++r) {
      out[0].data<float>()[r] = joined(row[r], n, parts.data() + r * spans, spans);
    }
  };
  return mx::array(
      shape, mx::float32, std::make_shared<Step>(mx::to_stream(stream), "StreamerLogSumExp", body), {x});
}

} // namespace streamer
