#include "attention_layer.h"

#include <algorithm>
#include <cmath>

#include "attention.h"
#include "data.h"
#include "glue.h"

namespace streamer {
namespace {

// The products before attention: floats() in the order norm, q_norm, k_norm, frequencies, then the
// three matrices.
class Projected {
 public:
  Projected(int D, const Attention& a)
      : D_(D),
        H_(a.heads),
        Hk_(a.key_heads),
        n_(a.frequencies.ndim() == 1 ? a.frequencies.shape(0) : -1),
        traditional_(a.traditional),
        scale_(a.rope_scale),
        eps_{a.norm.eps, a.q_norm.eps, a.k_norm.eps} {
    check_float({a.frequencies}, "attention_inputs: everything must be float32");
    check(n_ >= 0, "attention_inputs: wrong axes");
    in_ = matrices_of(a.projections, {D, D, D}, "attention_inputs: there must be q, k and v");
    check(H_ > 0 && Hk_ > 0 && H_ % Hk_ == 0, "attention_inputs: there must be heads");
    W_ = in_[1].A.N / Hk_;
    check(
        in_[0].A.N == 2 * H_ * W_ && in_[1].A.N == Hk_ * W_ && in_[2].A.N == Hk_ * W_,
        "attention_inputs: the products don't fit the heads");
    check(2 * n_ <= W_, "attention_inputs: more frequencies than pairs");
    check_norm(a.norm, D, "attention_inputs: the norm doesn't fit x");
    check_norm(a.q_norm, W_, "attention_inputs: the queries' norm doesn't fit");
    check_norm(a.k_norm, W_, "attention_inputs: the keys' norm doesn't fit");
  }

  int width() const {
    return W_;
  }

  // Keys and values of a head and batch lie `room` rows after those of the one before.
  void run(
      Inputs& next,
      const float* x,
      int B,
      int T,
      int offset,
      float* queries,
      float* keys,
      float* values,
      int64_t room,
      float* gates) const {
    const float *w = next.floats(), *q_gain = next.floats(), *k_gain = next.floats(),
                *frequency = next.floats();
    std::vector<Matrix> A;
    for (const Experts& one : in_) A.push_back(next.matrix(one));
    const int64_t rows = int64_t(B) * T, H = H_, Hk = Hk_, W = W_;
    std::vector<float> space(rows * (D_ + 2 * (H + Hk) * W));
    float *scaled = space.data(), *q = scaled + rows * D_, *k = q + rows * 2 * H * W,
          *v = k + rows * Hk * W;
    norm_rows(x, rows, D_, w, eps_[0], scaled);
    multiply_all(A, scaled, rows, {q, k, v});
    const Rotation rotate(frequency, n_, T, traditional_, scale_, offset);
    each(static_cast<int>(rows), rows * (H + Hk) * W * 4, [&](int row) {
      const int64_t b = row / T, t = row % T;
      for (int h = 0; h < H; ++h) {
        const float* from = q + (int64_t(row) * H + h) * 2 * W;
        float* to = queries + ((b * H + h) * T + t) * W;
        steps().norm(from, q_gain, eps_[1], 1.0f, W_, to);
        rotate(t, to, W_, to);
        std::copy_n(from + W, W, gates + (int64_t(row) * H + h) * W);
      }
      for (int h = 0; h < Hk; ++h) {
        const int64_t from = (int64_t(row) * Hk + h) * W, to = ((b * Hk + h) * room + t) * W;
        steps().norm(k + from, k_gain, eps_[2], 1.0f, W_, keys + to);
        rotate(t, keys + to, W_, keys + to);
        std::copy_n(v + from, W, values + to);
      }
    });
  }

 private:
  int D_, H_, Hk_, n_, W_ = 0;
  bool traditional_;
  float scale_, eps_[3];
  std::vector<Experts> in_;
};

Arrays weights_of(const Attention& a) {
  Arrays out{a.norm.weight, a.q_norm.weight, a.k_norm.weight, a.frequencies};
  for (const Weight& weight : a.projections.weights) append(out, weight);
  return out;
}

// to = x + (y * sigmoid(gates)) @ A^T, y [B, H, T, W].
void open_heads(
    const float* x, const float* y, const float* gates, const Matrix& A, int B, int T, int H, float* to) {
  const int64_t rows = int64_t(B) * T, width = A.K, W = width / H;
  std::vector<float> opened(rows * width);
  each(static_cast<int>(rows), rows * width * 16, [&](int row) {
    const int64_t b = row / T, t = row % T;
    for (int64_t i = 0; i < width; ++i) {
      const float gate = 1.0f / (1.0f + std::exp(-gates[row * width + i]));
      opened[row * width + i] = y[((b * H + i / W) * T + t) * W + i % W] * gate;
    }
  });
  multiply_all({A}, opened.data(), rows, {to});
  add_rows(x, rows * A.N, to);
}

Block block_of(const Attention& a, const Alike& out, float scale) {
  check(a.norm.weight.ndim() == 1, "attention_layer: wrong axes");
  const int D = a.norm.weight.shape(0), H = a.heads, Hk = a.key_heads;
  const Projected project(D, a);
  const int W = project.width();
  const auto one = matrices_of(out, {H * W}, "attention_layer: there must be one output product");
  check(one[0].A.N == D, "attention_layer: the output product doesn't fit");
  Block block;
  block.kind = Block::Kind::cache;
  block.D = D;
  block.weights = weights_of(a);
  append(block.weights, out.weights[0]);
  block.states = [=](int B, int room) {
    return std::vector<mx::Shape>{{B, Hk, room, W}, {B, Hk, room, W}};
  };
  block.body = [=, one = one[0]](Inputs& next, const Pass& pass) {
    const int B = pass.B, T = pass.T;
    const int64_t row = W, head = int64_t(pass.room) * W, size = pass.rows() * H * W;
    std::vector<float> space(3 * size);
    float *queries = space.data(), *gates = queries + size, *y = gates + size;
    project.run(
        next, pass.x, B, T, pass.offset, queries, pass.after[0] + pass.offset * row,
        pass.after[1] + pass.offset * row, pass.room, gates);
    Attend call{B, Hk, H / Hk * T, T, W, W, pass.offset + T, scale, true, queries,
                pass.after[0], pass.after[1], nullptr, nullptr, y,
                {Hk * head, head, row}, {Hk * head, head, row}};
    attend(call);
    open_heads(pass.x, y, gates, next.matrix(one), B, T, H, pass.y);
  };
  return block;
}

} // namespace

AttentionLayer::AttentionLayer(const Attention& attention, const Alike& out, float scale)
    : block_(block_of(attention, out, scale)) {}

bool AttentionLayer::kept() const {
  return std::all_of(block_.weights.begin(), block_.weights.end(), [](const mx::array& a) {
    return a.is_available();
  });
}

std::vector<mx::array> attention_inputs(
    const mx::array& x, const Attention& attention, int offset, mx::StreamOrDevice stream) {
  check_float({x}, "attention_inputs: everything must be float32");
  check(x.ndim() == 3, "attention_inputs: wrong axes");
  const int B = x.shape(0), T = x.shape(1), H = attention.heads, Hk = attention.key_heads;
  const Projected project(x.shape(2), attention);
  const int W = project.width();
  auto body = [=](const Arrays& given, Arrays& made) {
    Inputs next(given);
    const float* x = next.floats();
    project.run(
        next, x, B, T, offset, made[0].data<float>(), made[1].data<float>(),
        made[2].data<float>(), T, made[3].data<float>());
  };
  Arrays inputs{x};
  for (const mx::array& a : weights_of(attention)) inputs.push_back(a);
  return mx::array::make_arrays(
      {{B, H, T, W}, {B, Hk, T, W}, {B, Hk, T, W}, {B, T, H * W}},
      {mx::float32, mx::float32, mx::float32, mx::float32},
      std::make_shared<Step>(mx::to_stream(stream), "StreamerAttentionInputs", body),
      std::move(inputs));
}

mx::array attention_output(
    const mx::array& x,
    const mx::array& y,
    const mx::array& gates,
    const Alike& out,
    mx::StreamOrDevice stream) {
  check_float({x, y, gates}, "attention_output: everything must be float32");
  check(x.ndim() == 3 && y.ndim() == 4, "attention_output: wrong axes");
  const int B = x.shape(0), T = x.shape(1), D = x.shape(2), H = y.shape(1), W = y.shape(3);
  check(
      y.shape() == mx::Shape{B, H, T, W} && gates.shape() == mx::Shape{B, T, H * W},
      "attention_output: y or the gates don't fit x");
  const auto one = matrices_of(out, {H * W}, "attention_output: there must be one product");
  check(one[0].A.N == D, "attention_output: the product doesn't fit x");
  Arrays inputs{x, y, gates};
  append(inputs, out.weights[0]);
  auto body = [=](const Arrays& given, Arrays& made) {
    Inputs next(given);
    const float *x = next.floats(), *y = next.floats(), *gates = next.floats();
    open_heads(x, y, gates, next.matrix(one[0]), B, T, H, made[0].data<float>());
  };
  return mx::array(
      x.shape(),
      mx::float32,
      std::make_shared<Step>(mx::to_stream(stream), "StreamerAttentionOutput", body),
      std::move(inputs));
}

} // namespace streamer
