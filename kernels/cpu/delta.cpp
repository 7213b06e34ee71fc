#include "delta.h"

#include <algorithm>
#include <cmath>

#include "data.h"
#include "rows.h"
#include "steps.h"

namespace streamer {

void convolve(
    const Convolved& c,
    const std::function<const float*(int, int)>& x,
    const std::function<const float*(int, int)>& before,
    const float* w,
    float* q,
    float* k,
    float* v,
    float* after) {
  const int keys = c.key_heads * c.key_width, C = 2 * keys + c.values, taps = c.taps, T = c.T;
  const float root = 1.0f / std::sqrt(static_cast<float>(c.key_width));
  auto row = [&](int b, int i) { // of what is convolved
    return i < taps - 1 ? before(b, i) : x(b, i - taps + 1);
  };
  each(c.B * T, int64_t(c.B) * T * C * (taps + 8), [&](int task) {
    const int b = task / T, t = task % T;
    const float* from[max_taps];
    for (int i = 0; i < taps; ++i) from[i] = row(b, t + i);
    float *qt = q + int64_t(task) * keys, *kt = k + int64_t(task) * keys,
          *vt = v + int64_t(task) * c.values;
    steps().taps(from, w, taps, 0, keys, qt);
    steps().taps(from, w, taps, keys, keys, kt);
    steps().taps(from, w, taps, 2 * keys, c.values, vt);
    rows().silu(qt, keys);
    rows().silu(kt, keys);
    rows().silu(vt, c.values);
    for (int h = 0; h < c.key_heads; ++h, qt += c.key_width, kt += c.key_width) {
      steps().norm(qt, nullptr, c.eps * root * root, root * root, c.key_width, qt);
      steps().norm(kt, nullptr, c.eps * root * root, root, c.key_width, kt);
    }
  });
  for (int b = 0; b < c.B; ++b) {
    for (int i = 0; i < taps - 1; ++i, after += C) std::copy_n(row(b, T + i), C, after);
  }
}

void update(
    const Heads& heads,
    const float* q,
    const float* k,
    const float* v,
    const float* a,
    const float* b,
    const float* a_log,
    const float* dt_bias,
    const float* state,
    float* y,
    float* after) {
  const int64_t count = int64_t(heads.B) * heads.T * heads.Hv;
  std::vector<float> g(count), beta(count), rest(count * heads.Dv);
  for (int64_t i = 0; i < count; ++i) {
    const float raised = a[i] + dt_bias[i % heads.Hv];
    const float softplus = std::max(raised, 0.0f) + std::log1p(std::exp(-std::fabs(raised)));
    g[i] = std::exp(-std::exp(a_log[i % heads.Hv]) * softplus);
    beta[i] = 1.0f / (1.0f + std::exp(-b[i]));
  }
  run_delta(heads, q, k, v, g.data(), false, beta.data(), state, y, after, rest.data());
}

void gate_rows(
    int64_t count,
    int n,
    const std::function<const float*(int64_t)>& x,
    const std::function<const float*(int64_t)>& gate,
    const float* w,
    float eps,
    float* y) {
  constexpr int64_t part = 16;
  each(static_cast<int>((count + part - 1) / part), count * n * 8, [&](int task) {
    float* scaled = workspace(Use::step, n);
    for (int64_t r = task * part; r < std::min(count, (task + 1) * part); ++r) {
      steps().norm(x(r), w, eps, 1.0f, n, scaled);
      std::copy_n(gate(r), n, y + r * n);
      rows().swiglu(y + r * n, scaled, n);
    }
  });
}

std::vector<mx::array> delta_inputs(
    const mx::array& x,
    const mx::array& before,
    const mx::array& weight,
    int key_heads,
    int key_width,
    int value_heads,
    float eps,
    mx::StreamOrDevice stream) {
  check_float({x, before, weight}, "delta_inputs: everything must be float32");
  check(x.ndim() == 3 && before.ndim() == 3 && weight.ndim() == 3, "delta_inputs: wrong axes");
  const int B = x.shape(0), T = x.shape(1), C = x.shape(2), taps = weight.shape(1);
  const int keys = key_heads * key_width, values = C - 2 * keys;
  check(weight.shape(0) == C && weight.shape(2) == 1, "delta_inputs: the weight doesn't fit x");
  check(taps >= 2 && taps <= max_taps, "delta_inputs: no kernel for so many taps");
  check(before.shape() == mx::Shape{B, taps - 1, C}, "delta_inputs: the state doesn't fit x");
  check(
      key_heads > 0 && key_width > 0 && value_heads > 0 && values > 0 && values % value_heads == 0,
      "delta_inputs: heads don't fit x");
  const Convolved sizes{B, T, taps, key_heads, key_width, values, eps};
  auto body = [=](const Arrays& in, Arrays& out) {
    Data data;
    const RowsOf x(in[0], data), before(in[1], data);
    convolve(
        sizes, [&](int b, int i) { return x[int64_t(b) * T + i]; },
        [&](int b, int i) { return before[int64_t(b) * (taps - 1) + i]; }, data(in[2]),
        out[0].data<float>(), out[1].data<float>(), out[2].data<float>(), out[3].data<float>());
  };
  return mx::array::make_arrays(
      {{B, T, key_heads, key_width},
       {B, T, key_heads, key_width},
       {B, T, value_heads, values / value_heads},
       before.shape()},
      {mx::float32, mx::float32, mx::float32, mx::float32},
      std::make_shared<Step>(mx::to_stream(stream), "StreamerDeltaInputs", body),
      {x, before, weight});
}

std::vector<mx::array> delta_update(
    const mx::array& q,
    const mx::array& k,
    const mx::array& v,
    const mx::array& a,
    const mx::array& b,
    const mx::array& a_log,
    const mx::array& dt_bias,
    const mx::array& state,
    mx::StreamOrDevice stream) {
  check_float({q, k, v, a, b, a_log, dt_bias, state}, "delta_update: everything must be float32");
  const Heads heads = heads_of(q, k, v, state);
  const int B = heads.B, T = heads.T, Hv = heads.Hv;
  check(a.shape() == mx::Shape{B, T, Hv} && b.shape() == a.shape(), "delta_update: a or b doesn't fit");
  check(
      a_log.shape() == mx::Shape{Hv} && dt_bias.shape() == mx::Shape{Hv},
      "delta_update: a_log or dt_bias doesn't fit");
  auto body = [=](const Arrays& in, Arrays& out) {
    Data data;
    update(heads, data(in[0]), data(in[1]), data(in[2]), data(in[3]), data(in[4]), data(in[5]),
           data(in[6]), data(in[7]), out[0].data<float>(), out[1].data<float>());
  };
  return mx::array::make_arrays(
      {v.shape(), state.shape()},
      {mx::float32, mx::float32},
      std::make_shared<Step>(mx::to_stream(stream), "StreamerDeltaUpdate", body),
      {q, k, v, a, b, a_log, dt_bias, state});
}

mx::array gated_norm(
    const mx::array& x,
    const mx::array& gate,
    const mx::array& weight,
    float eps,
    mx::StreamOrDevice stream) {
  check_float({x, gate, weight}, "gated_norm: everything must be float32");
  check(x.ndim() >= 1 && gate.shape() == x.shape(), "gated_norm: the gate doesn't fit x");
  check(weight.shape() == mx::Shape{x.shape(-1)}, "gated_norm: the weight doesn't fit x");
  auto body = [eps](const Arrays& in, Arrays& out) {
    Data data;
    const int n = in[0].shape(-1);
    const RowsOf x(in[0], data), gate(in[1], data);
    gate_rows(
        static_cast<int64_t>(in[0].size()) / n, n, [&](int64_t r) { return x[r]; },
        [&](int64_t r) { return gate[r]; }, data(in[2]), eps, out[0].data<float>());
  };
  auto step = std::make_shared<Step>(mx::to_stream(stream), "StreamerGatedNorm", body);
  return mx::array(x.shape(), mx::float32, std::move(step), {x, gate, weight});
}

} // namespace streamer
