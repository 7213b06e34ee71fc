#include "step.h"

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "data.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "steps.h"

namespace streamer {
void Step::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  Arrays in, out;
  for (mx::array& a : outputs) a.set_data(mx::allocator::malloc(a.nbytes()));
  for (const mx::array& a : inputs) in.push_back(mx::array::unsafe_weak_copy(a));
  for (const mx::array& a : outputs) out.push_back(mx::array::unsafe_weak_copy(a));
  if (outputs[0].size() == 0) return;
  mx::cpu::get_command_encoder(stream()).dispatch(
      [in = std::move(in), out = std::move(out), body = body_]() mutable { body(in, out); });
}

Bound::Bound(Step::Body body, Arrays weights) : weights_(std::move(weights)), kept_(true) {
  for (const mx::array& a : weights_) kept_ = kept_ && a.is_available();
  if (!kept_) {
    body_ = std::make_shared<const Step::Body>(std::move(body));
    return;
  }
  body_ = std::make_shared<const Step::Body>(
      [body = std::move(body), weights = weights_](const Arrays& in, Arrays& out) {
        Arrays all;
        all.reserve(in.size() + weights.size());
        all.insert(all.end(), in.begin(), in.end());
        all.insert(all.end(), weights.begin(), weights.end());
        body(all, out);
      });
}

Arrays Bound::operator()(
    const char* name, Arrays inputs, std::vector<mx::Shape> shapes, mx::StreamOrDevice stream) const {
  if (!kept_) inputs.insert(inputs.end(), weights_.begin(), weights_.end());
  std::vector<mx::Dtype> types(shapes.size(), mx::float32);
  auto body = [body = body_](const Arrays& in, Arrays& out) { (*body)(in, out); };
  return mx::array::make_arrays(
      std::move(shapes),
      types,
      std::make_shared<Step>(mx::to_stream(stream), name, std::move(body)),
      std::move(inputs));
}

void Step::eval_gpu(const Arrays&, Arrays&) {
  throw std::runtime_error("this kernel runs on the CPU only");
}

mx::array rms_norm(
    const mx::array& x,
    const std::optional<mx::array>& weight,
    float eps,
    float scale,
    mx::StreamOrDevice stream) {
  check(x.ndim() >= 1, "rms_norm: x must have an axis");
  Arrays inputs{x};
  if (weight) inputs.push_back(*weight);
  check_float(inputs, "rms_norm: x and the weight must be float32");
  check(!weight || (weight->ndim() == 1 && weight->shape(0) == x.shape(-1)), "rms_norm: the weight doesn't fit x");
  auto body = [eps, scale](const Arrays& in, Arrays& out) {
    const mx::array& x = in[0];
    Data data;
    const int n = x.shape(-1);
    const RowsOf rows(x, data);
    const float* w = in.size() > 1 ? data(in[1]) : nullptr;
    float* y = out[0].data<float>();
    const int64_t count = static_cast<int64_t>(x.size()) / n;
    constexpr int64_t part = 64;
    each(static_cast<int>((count + part - 1) / part), count * n, [&](int task) {
      for (int64_t r = task * part; r < std::min(count, (task + 1) * part); ++r) {
        steps().norm(rows[r], w, eps, scale, n, y + r * n);
      }
    });
  };
  auto step = std::make_shared<Step>(mx::to_stream(stream), "StreamerRMSNorm", body);
  return mx::array(x.shape(), mx::float32, std::move(step), std::move(inputs));
}

Heads heads_of(const mx::Shape& q, const mx::Shape& v, const mx::Shape& state) {
  check(q.size() == 4 && v.size() == 4, "gated_delta: q, k or v doesn't fit");
  const Heads h{v[0], v[1], q[2], v[2], q[3], v[3]};
  const int vectors = h.Dk / 16;
  check(q[0] == h.B && q[1] == h.T && h.Hv % h.Hk == 0, "gated_delta: q doesn't fit v");
  check(state == mx::Shape{h.B, h.Hv, h.Dv, h.Dk}, "gated_delta: the state doesn't fit");
  const bool known[17] = {0, 1, 1, 0, 1, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1};
  check(h.Dk % 16 == 0 && vectors <= 16 && known[vectors], "gated_delta: no kernel for keys of this width");
  return h;
}

Heads heads_of(
    const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& state) {
  check(k.shape() == q.shape(), "gated_delta: q, k or v doesn't fit");
  return heads_of(q.shape(), v.shape(), state.shape());
}

void run_delta(
    const Heads& heads,
    const float* q,
    const float* k,
    const float* v,
    const float* g,
    bool vector_gate,
    const float* beta,
    const float* state,
    float* y,
    float* after,
    float* d) {
  const auto [B, T, Hk, Hv, Dk, Dv] = heads;
  const int wide = vector_gate ? Dk : 1;
  each(B * Hv, int64_t(B) * Hv * T * Dv * Dk * 3, [&, T = T, Hk = Hk, Hv = Hv, Dk = Dk, Dv = Dv](int task) {
    const int64_t b = task / Hv, h = task % Hv, hk = h / (Hv / Hk), at = b * T * Hv + h,
                  keys = (b * T * Hk + hk) * Dk, states = int64_t(task) * Dv * Dk;
    const Delta head{
        T, Dk, Dv, vector_gate,
        q + keys, k + keys, v + at * Dv, g + at * wide, beta + at,
        int64_t(Hk) * Dk, int64_t(Hk) * Dk, int64_t(Hv) * Dv, int64_t(Hv) * wide, Hv,
        state + states, after + states, y + at * Dv, d + at * Dv};
    steps().delta(head, 0, Dv);
  });
}

std::vector<mx::array> gated_delta(
    const mx::array& q,
    const mx::array& k,
    const mx::array& v,
    const mx::array& g,
    const mx::array& beta,
    const mx::array& state,
    mx::StreamOrDevice stream) {
  check_float({q, k, v, g, beta, state}, "gated_delta: everything must be float32");
  const Heads heads = heads_of(q, k, v, state);
  const mx::Shape gates{heads.B, heads.T, heads.Hv};
  check(beta.shape() == gates, "gated_delta: beta doesn't fit");
  check(g.shape() == gates || g.shape() == mx::Shape{heads.B, heads.T, heads.Hv, heads.Dk}, "gated_delta: g doesn't fit");
  auto body = [=](const Arrays& in, Arrays& out) {
    Data data;
    run_delta(heads, data(in[0]), data(in[1]), data(in[2]), data(in[3]), in[3].ndim() == 4,
              data(in[4]), data(in[5]), out[0].data<float>(), out[1].data<float>(),
              out[2].data<float>());
  };
  return mx::array::make_arrays(
      {v.shape(), state.shape(), v.shape()},
      {mx::float32, mx::float32, mx::float32},
      std::make_shared<Step>(mx::to_stream(stream), "StreamerGatedDelta", body),
      {q, k, v, g, beta, state});
}

mx::array depthwise_conv(const mx::array& x, const mx::array& weight, mx::StreamOrDevice stream) {
  check_float({x, weight}, "depthwise_conv: x and the weight must be float32");
  check(x.ndim() == 3 && weight.ndim() == 3 && weight.shape(2) == 1 && weight.shape(0) == x.shape(2), "depthwise_conv: the weight doesn't fit x");
  const int taps = weight.shape(1), C = x.shape(2), B = x.shape(0), T = x.shape(1) - taps + 1;
  check(T >= 1, "depthwise_conv: x is shorter than the taps");
  auto body = [=](const Arrays& in, Arrays& out) {
    Data data;
    const float *x = data(in[0]), *w = data(in[1]); // w [taps, C]
    float* y = out[0].data<float>();
    each(B * T, int64_t(B) * T * taps * C, [&](int row) {
      const int64_t from = int64_t(row / T) * (T + taps - 1) + row % T;
      steps().conv(x + from * C, w, taps, C, y + int64_t(row) * C);
    });
  };
  mx::array turned = mx::transpose(mx::reshape(weight, {C, taps}, stream), {1, 0}, stream);
  return mx::array(
      {B, T, C},
      mx::float32,
      std::make_shared<Step>(mx::to_stream(stream), "StreamerDepthwiseConv", body),
      {x, turned});
}

} // namespace streamer
