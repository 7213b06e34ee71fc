#include "glue.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "data.h"
#include "rows.h"

namespace streamer {

void route_rows(
    const float* logits, int64_t rows, int E, int k, bool normalize, int32_t* ids, float* scores) {
  std::vector<int32_t> order(E);
  for (int64_t r = 0; r < rows; ++r, logits += E, ids += k, scores += k) {
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](int32_t a, int32_t b) {
      return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
    });
    const float top = logits[order[0]];
    float total = 0.0f, kept = 0.0f;
    for (int e = 0; e < E; ++e) total += std::exp(logits[e] - top);
    for (int i = 0; i < k; ++i) {
      ids[i] = order[i];
      scores[i] = std::exp(logits[order[i]] - top) / total;
      kept += scores[i];
    }
    for (int i = 0; normalize && i < k; ++i) scores[i] /= kept;
  }
}

void combine_rows(
    const float* y,
    const float* scores,
    const float* shared,
    const float* gate,
    int rows,
    int64_t k,
    int64_t D,
    float* out) {
  each(rows, rows * D * (k + 1), [&](int r) {
    float* z = out + r * D;
    std::fill_n(z, D, 0.0f);
    for (int64_t i = 0; i < k; ++i) {
      const float *from = y + (r * k + i) * D, by = scores[r * k + i];
      for (int64_t d = 0; d < D; ++d) z[d] += from[d] * by;
    }
    if (shared == nullptr) return;
    const float by = 1.0f / (1.0f + std::exp(-gate[r]));
    for (int64_t d = 0; d < D; ++d) z[d] += shared[r * D + d] * by;
  });
}

std::vector<mx::array> route(
    const mx::array& logits, int k, bool normalize, mx::StreamOrDevice stream) {
  check_float({logits}, "route: logits must be float32");
  check(logits.ndim() >= 1 && k >= 1 && k <= logits.shape(-1), "route: k doesn't fit the logits");
  mx::Shape shape = logits.shape();
  shape.back() = k;
  auto body = [=](const Arrays& in, Arrays& out) {
    Data data;
    const int E = in[0].shape(-1);
    route_rows(data(in[0]), static_cast<int64_t>(in[0].size()) / E, E, k, normalize,
               out[0].data<int32_t>(), out[1].data<float>());
  };
  return mx::array::make_arrays(
      {shape, shape},
      {mx::int32, mx::float32},
      std::make_shared<Step>(mx::to_stream(stream), "StreamerRoute", body),
      {logits});
}

mx::array combine(
    const mx::array& y,
    const mx::array& scores,
    const std::optional<mx::array>& shared,
    const std::optional<mx::array>& gate,
    mx::StreamOrDevice stream) {
  check(y.ndim() >= 2 && scores.ndim() == y.ndim() - 1, "combine: wrong axes");
  mx::Shape lead(y.shape().begin(), y.shape().end() - 1);
  check(scores.shape() == lead, "combine: scores don't fit y");
  mx::Shape shape(lead.begin(), lead.end() - 1), one = shape;
  shape.push_back(y.shape(-1));
  one.push_back(1);
  Arrays inputs{y, scores};
  check(shared.has_value() == gate.has_value(), "combine: a shared expert comes with its gate");
  if (shared) {
    check(shared->shape() == shape && gate->shape() == one, "combine: the shared expert doesn't fit");
    inputs.push_back(*shared);
    inputs.push_back(*gate);
  }
  check_float(inputs, "combine: everything must be float32");
  auto body = [](const Arrays& in, Arrays& out) {
    Data data;
    const float *shared = in.size() > 2 ? data(in[2]) : nullptr,
                *gate = in.size() > 2 ? data(in[3]) : nullptr;
    const int64_t D = in[0].shape(-1), k = in[0].shape(-2);
    combine_rows(data(in[0]), data(in[1]), shared, gate, static_cast<int>(out[0].size() / D), k, D,
                 out[0].data<float>());
  };
  return mx::array(
      std::move(shape),
      mx::float32,
      std::make_shared<Step>(mx::to_stream(stream), "StreamerCombine", body),
      std::move(inputs));
}

mx::array swiglu(const mx::array& gate, const mx::array& x, mx::StreamOrDevice stream) {
  check_float({gate, x}, "swiglu: gate and x must be float32");
  check(gate.shape() == x.shape(), "swiglu: gate and x differ in shape");
  auto body = [](const Arrays& in, Arrays& out) {
    Data data;
    const float *gate = data(in[0]), *x = data(in[1]);
    float* y = out[0].data<float>();
    const int64_t count = out[0].size(), part = 1 << 13;
    each(static_cast<int>((count + part - 1) / part), count * 8, [&](int task) {
      const int64_t at = task * part, n = std::min(part, count - at);
      std::copy_n(gate + at, n, y + at);
      rows().swiglu(y + at, x + at, n);
    });
  };
  auto step = std::make_shared<Step>(mx::to_stream(stream), "StreamerSwiglu", body);
  return mx::array(x.shape(), mx::float32, std::move(step), {gate, x});
}

void dequantize_row(
    const uint32_t* w, const float* scales, const float* biases, int group, int bits, int64_t K, float* y) {
  for (int64_t k = 0; k < K; ++k) {
    const int64_t at = k * bits;
    uint32_t q = w[at / 32] >> at % 32;
    if (at % 32 + bits > 32) q |= w[at / 32 + 1] << (32 - at % 32);
    q &= (1u << bits) - 1;
    y[k] = scales[k / group] * static_cast<float>(q) + biases[k / group];
  }
}

mx::array dequantize(
    const mx::array& w,
    const mx::array& scales,
    const mx::array& biases,
    int group,
    int bits,
    mx::StreamOrDevice stream) {
  check_float({scales, biases}, "dequantize: scales and biases must be float32");
  check(w.ndim() >= 1 && w.dtype() == mx::uint32, "dequantize: weights must be uint32");
  check(group > 0 && bits >= 2 && bits <= 8, "dequantize: unknown group or bits");
  const int64_t K = int64_t(w.shape(-1)) * 32 / bits;
  mx::Shape shape = w.shape(), groups = shape;
  shape.back() = static_cast<int>(K);
  groups.back() = static_cast<int>(K / group);
  check(K % group == 0 && K * bits % 32 == 0, "dequantize: columns don't fit the group");
  check(scales.shape() == groups && biases.shape() == groups, "dequantize: scales don't fit");
  auto body = [=](const Arrays& in, Arrays& out) {
    std::vector<std::shared_ptr<char>> copies;
    const auto* words = static_cast<const uint32_t*>(row_major(in[0], copies));
    const auto *s = static_cast<const float*>(row_major(in[1], copies)),
               *b = static_cast<const float*>(row_major(in[2], copies));
    float* y = out[0].data<float>();
    const int rows = static_cast<int>(out[0].size() / K);
    each(rows, rows * K * 4, [&](int r) {
      const uint32_t* from = words + r * (K * bits / 32);
      const int64_t g = r * (K / group);
      dequantize_row(from, s + g, b + g, group, bits, K, y + r * K);
    });
  };
  return mx::array(
      std::move(shape),
      mx::float32,
      std::make_shared<Step>(mx::to_stream(stream), "StreamerDequantize", body),
      {w, scales, biases});
}

Rotation::Rotation(
    const float* frequencies, int n, int rows, bool traditional, float scale, int offset)
    : n_(n),
      step_(traditional ? 2 : 1),
      apart_(traditional ? 1 : n),
      cosines_(int64_t(rows) * n),
      sines_(int64_t(rows) * n) {
  for (int64_t l = 0; l < rows; ++l) {
    const float position = static_cast<float>(offset + l) * scale;
    for (int i = 0; i < n; ++i) {
      const float angle = position * frequencies[i];
      cosines_[l * n + i] = std::cos(angle);
      sines_[l * n + i] = std::sin(angle);
    }
  }
}

void Rotation::operator()(int64_t row, const float* from, int D, float* to) const {
  const float *c = &cosines_[row * n_], *s = &sines_[row * n_];
  for (int i = 0; i < n_; ++i) {
    const float a = from[i * step_], b = from[i * step_ + apart_];
    to[i * step_] = a * c[i] - b * s[i];
    to[i * step_ + apart_] = a * s[i] + b * c[i];
  }
  if (to != from) std::copy(from + 2 * n_, from + D, to + 2 * n_);
}

mx::array rope(
    const mx::array& x,
    const mx::array& frequencies,
    bool traditional,
    float scale,
    int offset,
    mx::StreamOrDevice stream) {
  check_float({x, frequencies}, "rope: everything must be float32");
  check(x.ndim() >= 2 && frequencies.ndim() == 1, "rope: wrong axes");
  const int n = frequencies.shape(0), D = x.shape(-1), L = x.shape(-2);
  check(2 * n <= D, "rope: more frequencies than pairs");
  auto body = [=](const Arrays& in, Arrays& out) {
    Data data;
    const RowsOf x(in[0], data);
    const Rotation rotate(data(in[1]), n, L, traditional, scale, offset);
    float* y = out[0].data<float>();
    const int count = static_cast<int>(in[0].size() / D);
    each(count, int64_t(count) * D, [&](int row) {
      rotate(row % L, x[row], D, y + int64_t(row) * D);
    });
  };
  return mx::array(
      x.shape(),
      mx::float32,
      std::make_shared<Step>(mx::to_stream(stream), "StreamerRope", body),
      {x, frequencies});
}

} // namespace streamer
