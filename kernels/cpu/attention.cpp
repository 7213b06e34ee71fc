#include "attention.h"

#include <algorithm>
#include <cmath>

#include "data.h"
#include "isa.h"
#include "spans.h"

namespace streamer {
namespace {

int seen(const Attend& call, int r) {
  return call.causal ? call.S - call.T + r % call.T + 1 : call.S;
}

// Rows [first, first + rows) of a key head over one span: softmax within it, and its values'
// weighted sum y [rows, Dv].
void run_span(
    const Attend& call, int head, int first, int rows, int index, float* y, float* tops, float* totals) {
  const AttendSteps& steps = attend_steps();
  const int from = index * span, D = call.D, Dv = call.Dv;
  auto end_of = [&](int r) { return std::clamp(seen(call, first + r) - from, 0, span); };
  int count = 0;
  for (int r = 0; r < rows; ++r) count = std::max(count, end_of(r));
  std::fill(y, y + int64_t(rows) * Dv, 0.0f);
  std::fill(totals, totals + rows, 0.0f);
  if (count == 0) return;
  const int b = head / call.Hk, h = head % call.Hk, all = (count + 15) / 16 * 16;
  const float *q = call.q + (int64_t(head) * call.R + first) * D,
              *k = call.k + b * call.k_strides[0] + h * call.k_strides[1] + from * call.k_strides[2],
              *v = call.v + b * call.v_strides[0] + h * call.v_strides[1] + from * call.v_strides[2];
  float* s = workspace(Use::step, int64_t(rows) * step);
  for (int j = 0; j < count; j += steps.tile) {
    steps.scores(q, rows, k + j * call.k_strides[2], call.k_strides[2], std::min(steps.tile, count - j), D, s + j);
  }
  for (int r = 0; r < rows; ++r) {
    const int end = end_of(r);
    float* row = s + int64_t(r) * step;
    if (end == 0) {
      std::fill(row, row + all, 0.0f);
      continue;
    }
    const int64_t of = call.bias_of_heads ? int64_t(head) * call.R + first + r : (first + r) % call.T;
    steps.place(row, end, call.scale, call.bias ? call.bias + of * call.S + from : nullptr);
    steps.soften(row, end, all, tops[r], totals[r]);
  }
  for (int j = 0; j < count; j += steps.tile) {
    steps.weigh(s + j, rows, v + j * call.v_strides[2], call.v_strides[2], std::min(steps.tile, count - j), Dv, y);
  }
}

// One row of the output from its sum y, with the sink's share of the weight.
void finish(const Attend& call, int head, int r, const Sum& sum) {
  float weight = 1.0f, of_sink = 0.0f;
  if (call.sinks != nullptr) {
    const float sink = call.sinks[head % call.Hk * (call.R / call.T) + r / call.T];
    const float top = std::max(sum.top, sink);
    weight = attend_steps().exponential(sum.top - top);
    of_sink = attend_steps().exponential(sink - top);
  }
  const float scale = weight / (sum.total * weight + of_sink);
  float* y = call.out + (int64_t(head) * call.R + r) * call.Dv;
  for (int i = 0; i < call.Dv; ++i) y[i] = sum.y[i] * scale;
}

} // namespace

const AttendSteps& attend_steps() {
#if defined(__x86_64__)
  if (level() >= Level::avx512) return attend_avx512();
  if (level() == Level::avx2) return attend_avx2();
#elif defined(__aarch64__)
  if (level() == Level::neon) return attend_neon();
#endif
  return attend_portable();
}

void attend(const Attend& call) {
  const ContextPart all{
      (call.S + span - 1) / span, call.Dv,
      [&call](int head, int first, int rows, int index, float* y, float* tops, float* totals) {
        run_span(call, head, first, rows, index, y, tops, totals);
      }};
  const int64_t work = int64_t(call.B) * call.Hk * call.R * call.S * (call.D + call.Dv);
  run_parts(call.B * call.Hk, call.R, work, {all}, [&call](int head, int r, const Sum* sums) {
    finish(call, head, r, *sums);
  });
}

mx::array attention(
    const mx::array& q,
    const mx::array& k,
    const mx::array& v,
    float scale,
    bool causal,
    const std::optional<mx::array>& bias,
    const std::optional<mx::array>& sinks,
    mx::StreamOrDevice stream) {
  check(q.ndim() == 4 && k.ndim() == 4 && v.ndim() == 4, "attention: q, k and v must have four axes");
  const int B = q.shape(0), H = q.shape(1), T = q.shape(2), D = q.shape(3), Hk = k.shape(1), S = k.shape(2), Dv = v.shape(3);
  check(k.shape(0) == B && v.shape(0) == B && v.shape(1) == Hk && v.shape(2) == S && k.shape(3) == D && H % Hk == 0, "attention: k or v doesn't fit");
  check(!causal || T <= S, "attention: more rows than keys");
  const bool of_heads = bias && bias->shape() == mx::Shape{B, H, T, S};
  check(!bias || of_heads || bias->shape() == mx::Shape{T, S}, "attention: the bias doesn't fit");
  check(!sinks || sinks->shape() == mx::Shape{H}, "attention: the sinks don't fit");
  Arrays inputs{q, k, v};
  if (bias) inputs.push_back(*bias);
  if (sinks) inputs.push_back(*sinks);
  check_float(inputs, "attention: everything must be float32");
  const bool biased = bias.has_value(), sunk = sinks.has_value();
  auto body = [=](const Arrays& in, Arrays& out) {
    Data data;
    Attend call{B, Hk, H / Hk * T, T, D, Dv, S, scale, causal, data(in[0])};
    call.bias_of_heads = of_heads;
    call.bias = biased ? data(in[3]) : nullptr;
    call.sinks = sunk ? data(in[3 + biased]) : nullptr;
    call.out = out[0].data<float>();
    // Caches are longer than what is asked of them: read where they lie.
    const bool rows = in[1].strides(-1) == 1 && in[2].strides(-1) == 1;
    call.k = rows ? in[1].data<float>() : data(in[1]);
    call.v = rows ? in[2].data<float>() : data(in[2]);
    auto stride = [&](const mx::array& a, int axis) {
      if (rows) return static_cast<int64_t>(a.strides(axis));
      int64_t n = 1;
      for (int i = axis + 1; i < 4; ++i) n *= a.shape(i);
      return n;
    };
    for (int axis = 0; axis < 3; ++axis) {
      call.k_strides[axis] = stride(in[1], axis);
      call.v_strides[axis] = stride(in[2], axis);
    }
    attend(call);
  };
  return mx::array(
      {B, H, T, Dv},
      mx::float32,
      std::make_shared<Step>(mx::to_stream(stream), "StreamerAttention", body),
      std::move(inputs));
}

} // namespace streamer
