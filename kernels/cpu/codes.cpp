#include "codes.h"

#include <cmath>

#include "coded_span.h"
#include "data.h"
#include "mlx/ops.h"

namespace streamer {
namespace {

// x = hadamard(x) / sqrt(n), n a power of two.
void hadamard(float* x, int n) {
  for (int half = 1; half < n; half *= 2) {
    for (int i = 0; i < n; i += 2 * half) {
      float *a = x + i, *b = a + half;
      for (int k = 0; k < half; ++k) {
        const float sum = a[k] + b[k];
        b[k] = a[k] - b[k];
        a[k] = sum;
      }
    }
  }
  const float by = 1.0f / std::sqrt(static_cast<float>(n));
  for (int i = 0; i < n; ++i) x[i] *= by;
}

// A row from its sums: of the codes, rotated back where signs are given, and the rest.
void finish(const Call& call, const Source& values, int head, int r, const Sum* sums, float* rotated, float* rest) {
  const AttendSteps& steps = attend_steps();
  const int n = values.n();
  const Sum &raw = sums[0], &coded = sums[1];
  float top = std::max(raw.top, coded.top), total = 0.0f;
  if (call.sinks != nullptr) {
    const float sink = call.sinks[head % call.H * (call.R / call.T) + r / call.T];
    top = std::max(top, sink);
    total = steps.exponential(sink - top);
  }
  const float of_raw = steps.exponential(raw.top - top), of_coded = steps.exponential(coded.top - top);
  total += of_raw * raw.total + of_coded * coded.total;
  const float raw_scale = of_raw / total, scale = of_coded / total, mass = scale * coded.total;
  const float* mean = values.mean(head);
  in_order(values, coded.y, rotated);
  if (call.value_signs != nullptr) hadamard(rotated, n);
  for (int c = 0; c < n; ++c) {
    rotated[c] *= call.value_signs != nullptr ? scale * call.value_signs[c] : scale;
    rest[c] = raw.y[c] * raw_scale + mass * mean[c];
  }
}

void check_side(const CodedSide& side, int B, int H, int coded) {
  const int n = side.mean.shape(3);
  auto fits = [&](const mx::array& a, int last) {
    return a.ndim() == 4 && a.shape(0) == B && a.shape(1) == H && a.shape(3) == last;
  };
  check(side.points.ndim() == 2 && side.mean.ndim() == 4, "attend_codes: points or mean has too few axes");
  int width = 0;
  while ((1 << width) < side.points.shape(0)) ++width;
  const int channels = side.points.shape(1);
  check(
      side.points.shape(0) == 1 << width &&
          ((channels == 2 && width >= 4 && width <= 8) || (channels == 1 && width == 8)),
      "attend_codes: no kernel for these points");
  const int words = (n / channels * width + 31) / 32;
  check(n % channels == 0 && fits(side.mean, n) && side.mean.shape(2) == 1, "attend_codes: the mean doesn't fit");
  check(fits(side.first, n) && fits(side.recent, n), "attend_codes: raw tokens don't fit");
  check(fits(side.words, words) && fits(side.ahead_words, words), "attend_codes: words don't fit");
  check(fits(side.scales, 1) && fits(side.ahead_scales, 1), "attend_codes: scales don't fit");
  check(coded <= side.words.shape(2) && coded <= side.scales.shape(2), "attend_codes: fewer codes than said");
  check(
      side.ahead_words.shape(2) <= side.recent.shape(2) &&
          side.ahead_words.shape(2) == side.ahead_scales.shape(2),
      "attend_codes: the block ahead doesn't fit");
  check_float({side.first, side.recent, side.points, side.mean}, "attend_codes: raw tokens, points and mean must be float32");
  check(
      side.words.dtype() == mx::uint32 && side.ahead_words.dtype() == mx::uint32 &&
          side.scales.dtype() == mx::float16 && side.ahead_scales.dtype() == mx::float16,
      "attend_codes: words must be uint32 and scales float16");
}

} // namespace

std::vector<mx::array> attend_codes(
    const mx::array& q,
    const mx::array& rotated,
    const CodedSide& keys,
    const CodedSide& values,
    int rows,
    int coded,
    int crossing,
    bool causal,
    const std::optional<mx::array>& bias,
    const std::optional<mx::array>& sinks,
    const std::optional<mx::array>& key_signs,
    const std::optional<mx::array>& value_signs,
    mx::StreamOrDevice stream) {
  check(q.ndim() == 4 && rotated.shape() == q.shape(), "attend_codes: the queries don't fit each other");
  Call call{};
  call.B = q.shape(0), call.H = q.shape(1), call.R = q.shape(2), call.T = rows;
  call.coded = coded, call.crossing = crossing, call.causal = causal;
  check(coded >= 0 && rows > 0 && call.R % rows == 0, "attend_codes: rows don't fit the queries");
  check_side(keys, call.B, call.H, coded);
  check_side(values, call.B, call.H, coded);
  check(keys.mean.shape(3) == q.shape(3), "attend_codes: the queries don't fit the keys");
  call.first = keys.first.shape(2), call.recent = keys.recent.shape(2);
  call.ahead = keys.ahead_words.shape(2);
  check(
      values.first.shape(2) == call.first && values.recent.shape(2) == call.recent &&
          values.ahead_words.shape(2) == call.ahead,
      "attend_codes: keys and values differ in length");
  check(!causal || rows <= call.columns(), "attend_codes: more rows than columns");
  call.bias_of_heads = bias && bias->shape() == mx::Shape{call.B, call.H, call.R, call.columns()};
  check(
      !bias || call.bias_of_heads || bias->shape() == mx::Shape{rows, call.columns()},
      "attend_codes: the bias doesn't fit");
  check(!sinks || sinks->shape() == mx::Shape{call.H * (call.R / rows)}, "attend_codes: the sinks don't fit");
  Arrays inputs{q, rotated};
  for (const CodedSide* side : {&keys, &values}) {
    auto flat = [&](const mx::array& a) { inputs.push_back(mx::contiguous(a, false, stream)); };
    flat(side->first);
    flat(side->recent);
    // slices of larger arrays, read where they lie
    for (const mx::array* a : {&side->words, &side->scales}) inputs.push_back(*a);
    for (const mx::array* a : {&side->ahead_words, &side->ahead_scales, &side->points, &side->mean}) flat(*a);
  }
  if (bias) inputs.push_back(*bias);
  if (sinks) inputs.push_back(*sinks);
  for (const auto& [signs, side] : {std::pair(&key_signs, &keys), {&value_signs, &values}}) {
    if (!*signs) continue;
    const int n = side->mean.shape(3);
    check((*signs)->shape() == mx::Shape{n} && (n & (n - 1)) == 0, "attend_codes: the signs don't fit");
    check_float({**signs}, "attend_codes: the signs must be float32");
    inputs.push_back(**signs);
  }
  const bool biased = bias.has_value(), sunk = sinks.has_value(), turned = key_signs.has_value(),
             back = value_signs.has_value();
  check_float({q, rotated}, "attend_codes: the queries must be float32");
  if (bias) check_float({*bias}, "attend_codes: the bias must be float32");
  if (sinks) check_float({*sinks}, "attend_codes: the sinks must be float32");
  auto body = [=](const Arrays& in, Arrays& out) mutable {
    Data data;
    call.q = data(in[0]), call.rotated = data(in[1]);
    call.bias = biased ? data(in[18]) : nullptr;
    call.sinks = sunk ? data(in[18 + biased]) : nullptr;
    call.value_signs = back ? data(in[18 + biased + sunk + turned]) : nullptr;
    std::vector<float> rotated;
    if (turned) {
      const float* signs = data(in[18 + biased + sunk]);
      const int n = in[0].shape(3);
      rotated.resize(in[0].size());
      for (size_t i = 0; i < rotated.size(); ++i) rotated[i] = call.q[i] * signs[i % n];
      for (size_t i = 0; i < rotated.size(); i += n) hadamard(rotated.data() + i, n);
      call.rotated = rotated.data();
    }
    const Source keys(&in[2], call.H, call.coded), values(&in[10], call.H, call.coded);
    const Queries queries(call, keys);
    const int n = values.n();
    const ContextPart raw{
        (call.raw() + span - 1) / span, n,
        [&](int head, int first, int rows, int index, float* y, float* tops, float* totals) {
          run_raw(call, keys, values, head, first, rows, index, y, tops, totals);
        }};
    const ContextPart codes{
        (call.coded + call.ahead + span - 1) / span, values.wide(),
        [&](int head, int first, int rows, int index, float* y, float* tops, float* totals) {
          run_coded(call, queries, keys, values, head, first, rows, index, y, tops, totals);
        }};
    const int heads = call.B * call.H;
    const int64_t work = int64_t(heads) * call.R * call.columns() * n * 2;
    run_parts(heads, call.R, work, {raw, codes}, [&](int head, int r, const Sum* sums) {
      const int64_t at = (int64_t(head) * call.R + r) * n;
      finish(call, values, head, r, sums, out[0].data<float>() + at, out[1].data<float>() + at);
    });
  };
  const mx::Shape shape{call.B, call.H, call.R, values.mean.shape(3)};
  return mx::array::make_arrays(
      {shape, shape},
      {mx::float32, mx::float32},
      std::make_shared<Step>(mx::to_stream(stream), "StreamerAttendCodes", body),
      std::move(inputs));
}

} // namespace streamer
