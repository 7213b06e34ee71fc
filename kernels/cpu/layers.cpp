#include "layers.h"

#include <algorithm>
#include <cmath>

#include "data.h"
#include "delta.h"
#include "glue.h"
#include "multiply.h"
#include "stacks.h"

namespace streamer {
namespace {

// Layouts of weights that are quantized alike, each for its columns; one matrix each.
std::vector<Experts> matrices_of(const Alike& all, const std::vector<int>& columns, const char* what) {
  check(all.weights.size() == columns.size(), what);
  std::vector<Experts> out;
  for (size_t i = 0; i < columns.size(); ++i) {
    check(all.weights[i].w.ndim() == 2, what);
    out.push_back(experts_of(columns[i], all.weights[i], all.group, all.bits, all.mode));
  }
  return out;
}

void check_norm(const Norm& norm, int width, const char* what) {
  check(norm.weight.dtype() == mx::float32 && norm.weight.shape() == mx::Shape{width}, what);
}

// y[i] = x @ matrices[i]^T for `rows` rows, in one go.
void multiply_all(
    const std::vector<Matrix>& matrices,
    const float* x,
    int64_t rows,
    const std::vector<float*>& y) {
  std::vector<Pack> packs;
  std::vector<Part> parts;
  std::vector<Product> products;
  std::vector<const float*> from(rows);
  std::vector<float*> to(rows);
  for (size_t i = 0; i < matrices.size(); ++i) {
    for (int64_t r = 0; r < rows; ++r) {
      from[r] = x + r * matrices[i].K;
      to[r] = y[i] + r * matrices[i].N;
    }
    add_product(matrices[i], from, to, packs, parts, products);
  }
  multiply(packs, parts, products);
}

// Inputs of an op, one after another.
class Inputs {
 public:
  explicit Inputs(const Arrays& in) : in_(in) {}

  const float* floats() {
    return static_cast<const float*>(row_major(in_[at_++], copies_));
  }
  Matrix matrix(const Experts& one) {
    return bound(one, in_, at_, copies_);
  }

 private:
  const Arrays& in_;
  size_t at_ = 0;
  std::vector<std::shared_ptr<char>> copies_;
};

Bound bound_delta(const Norm& norm, const DeltaNet& net) {
  check_float({net.taps, net.a_log, net.dt_bias, net.gain}, "delta_layer: everything must be float32");
  check(norm.weight.ndim() == 1 && net.taps.ndim() == 3 && net.gain.ndim() == 1,
        "delta_layer: wrong axes");
  const int D = norm.weight.shape(0), Hk = net.key_heads, Dk = net.key_width, Hv = net.value_heads,
            Dv = net.gain.shape(0), keys = Hk * Dk, values = Hv * Dv, C = 2 * keys + values,
            taps = net.taps.shape(1);
  check_norm(norm, D, "delta_layer: the norm must be float32");
  const auto in = matrices_of(net.in, {D, D, D, D}, "delta_layer: there must be qkv, z, b and a");
  const auto out = matrices_of(net.out, {values}, "delta_layer: there must be one output product");
  check(
      in[0].A.N == C && in[1].A.N == values && in[2].A.N == Hv && in[3].A.N == Hv &&
          out[0].A.N == D,
      "delta_layer: the products don't fit the heads");
  check(taps >= 2 && taps <= max_taps, "delta_layer: no kernel for so many taps");
  check(net.taps.shape() == mx::Shape{C, taps, 1}, "delta_layer: the taps don't fit");
  check(
      net.a_log.shape() == mx::Shape{Hv} && net.dt_bias.shape() == mx::Shape{Hv},
      "delta_layer: a_log or dt_bias doesn't fit");
  Arrays weights{norm.weight, net.taps, net.a_log, net.dt_bias, net.gain};
  for (const Alike* all : {&net.in, &net.out}) {
    for (const Weight& weight : all->weights) append(weights, weight);
  }
  auto body = [=, eps = norm.eps, gain_eps = net.gain_eps](const Arrays& given, Arrays& made) {
    const int B = given[0].shape(0), T = given[0].shape(1);
    const bool taped = made.size() > 3;
    const Heads heads = heads_of({B, T, Hk, Dk}, {B, T, Hv, Dv}, {B, Hv, Dv, Dk});
    const Convolved sizes{B, T, taps, Hk, Dk, values, 1e-6f};
    Inputs next(given);
    const float *x = next.floats(), *before = next.floats(), *state = next.floats(),
                *w = next.floats(), *taps_of = next.floats(), *a_log = next.floats(),
                *dt_bias = next.floats(), *gain = next.floats();
    std::vector<Matrix> A;
    for (const Experts& one : in) A.push_back(next.matrix(one));
    const Matrix last = next.matrix(out[0]);
    const int64_t rows = int64_t(B) * T;
    float *y = made[0].data<float>(), *after = made[1].data<float>(),
          *state_after = made[2].data<float>();
    std::vector<float> room(
        rows * (D + 2 * int64_t(values) + (taped ? 0 : 2 * int64_t(C) + 2 * Hv)));
    float *at = room.data(), *scaled = at, *z = scaled + rows * D, *outs = z + rows * values;
    float* own = outs + rows * values; // of what is given out where it is taped
    auto part = [&](size_t output, int64_t size) {
      if (taped) return made[output].data<float>();
      own += rows * size;
      return own - rows * size;
    };
    float *q = part(3, keys), *k = part(4, keys), *v = part(5, values), *a = part(6, Hv),
          *b = part(7, Hv), *qkv = part(8, C);
    norm_rows(x, rows, D, w, eps, scaled);
    multiply_all(A, scaled, rows, {qkv, z, b, a});
    convolve(
        sizes, [&](int i, int t) { return qkv + (int64_t(i) * T + t) * C; },
        [&](int i, int t) { return before + (int64_t(i) * (taps - 1) + t) * C; }, taps_of, q, k, v,
        after);
    update(heads, q, k, v, a, b, a_log, dt_bias, state, outs, state_after);
    gate_rows(
        rows * Hv, Dv, [&](int64_t r) { return outs + r * Dv; },
        [&](int64_t r) { return z + r * Dv; }, gain, gain_eps, z);
    multiply_all({last}, z, rows, {y});
    add_rows(x, rows * D, y);
  };
  return {body, std::move(weights)};
}

} // namespace

DeltaLayer::DeltaLayer(const Norm& norm, const DeltaNet& net)
    : D_(norm.weight.size()),
      Hk_(net.key_heads),
      Dk_(net.key_width),
      Hv_(net.value_heads),
      Dv_(net.gain.size()),
      taps_(net.taps.ndim() == 3 ? net.taps.shape(1) : 0),
      run_(bound_delta(norm, net)) {}

std::vector<mx::array> DeltaLayer::operator()(
    const mx::array& x,
    const mx::array& before,
    const mx::array& state,
    bool taped,
    mx::StreamOrDevice stream) const {
  check_float({x, before, state}, "delta_layer: everything must be float32");
  check(x.ndim() == 3 && x.shape(2) == D_, "delta_layer: x doesn't fit");
  const int B = x.shape(0), T = x.shape(1), C = 2 * Hk_ * Dk_ + Hv_ * Dv_;
  check(before.shape() == mx::Shape{B, taps_ - 1, C}, "delta_layer: the convolution's state doesn't fit");
  heads_of({B, T, Hk_, Dk_}, {B, T, Hv_, Dv_}, state.shape());
  std::vector<mx::Shape> shapes{x.shape(), before.shape(), state.shape()};
  if (taped) {
    shapes.insert(
        shapes.end(),
        {{B, T, Hk_, Dk_},
         {B, T, Hk_, Dk_},
         {B, T, Hv_, Dv_},
         {B, T, Hv_},
         {B, T, Hv_},
         {B, T, C}});
  }
  return run_("StreamerDeltaLayer", {x, before, state}, std::move(shapes), stream);
}

std::vector<mx::array> attention_inputs(
    const mx::array& x,
    const Norm& norm,
    const Alike& projections,
    const Norm& q_norm,
    const Norm& k_norm,
    const mx::array& frequencies,
    bool traditional,
    float scale,
    int offset,
    int heads,
    int key_heads,
    mx::StreamOrDevice stream) {
  check_float({x, frequencies}, "attention_inputs: everything must be float32");
  check(x.ndim() == 3 && frequencies.ndim() == 1, "attention_inputs: wrong axes");
  const int B = x.shape(0), T = x.shape(1), D = x.shape(2), n = frequencies.shape(0);
  const auto in =
      matrices_of(projections, {D, D, D}, "attention_inputs: there must be q, k and v");
  check(heads > 0 && key_heads > 0, "attention_inputs: there must be heads");
  const int W = in[1].A.N / key_heads;
  check(
      in[0].A.N == 2 * heads * W && in[1].A.N == key_heads * W && in[2].A.N == key_heads * W,
      "attention_inputs: the products don't fit the heads");
  check(2 * n <= W, "attention_inputs: more frequencies than pairs");
  check_norm(norm, D, "attention_inputs: the norm doesn't fit x");
  check_norm(q_norm, W, "attention_inputs: the queries' norm doesn't fit");
  check_norm(k_norm, W, "attention_inputs: the keys' norm doesn't fit");
  Arrays inputs{x, norm.weight, q_norm.weight, k_norm.weight, frequencies};
  for (const Weight& weight : projections.weights) append(inputs, weight);
  auto body = [=, eps = norm.eps, q_eps = q_norm.eps, k_eps = k_norm.eps](
                  const Arrays& given, Arrays& made) {
    Inputs next(given);
    const float *x = next.floats(), *w = next.floats(), *q_gain = next.floats(),
                *k_gain = next.floats(), *frequency = next.floats();
    std::vector<Matrix> A;
    for (const Experts& one : in) A.push_back(next.matrix(one));
    const int64_t rows = int64_t(B) * T;
    std::vector<float> room(rows * (D + 2 * (heads + key_heads) * int64_t(W)));
    float *scaled = room.data(), *q = scaled + rows * D, *k = q + rows * 2 * heads * W,
          *v = k + rows * key_heads * W;
    norm_rows(x, rows, D, w, eps, scaled);
    multiply_all(A, scaled, rows, {q, k, v});
    const Rotation rotate(frequency, n, T, traditional, scale, offset);
    float *queries = made[0].data<float>(), *keys = made[1].data<float>(),
          *values = made[2].data<float>(), *gates = made[3].data<float>();
    each(static_cast<int>(rows), rows * (heads + key_heads) * W * 4, [&](int row) {
      const int64_t b = row / T, t = row % T;
      for (int h = 0; h < heads; ++h) {
        const float* from = q + (int64_t(row) * heads + h) * 2 * W;
        float* to = queries + ((b * heads + h) * T + t) * W;
        steps().norm(from, q_gain, q_eps, 1.0f, W, to);
        rotate(t, to, W, to);
        std::copy_n(from + W, W, gates + (int64_t(row) * heads + h) * W);
      }
      for (int h = 0; h < key_heads; ++h) {
        const int64_t from = (int64_t(row) * key_heads + h) * W,
                      to = ((b * key_heads + h) * T + t) * W;
        steps().norm(k + from, k_gain, k_eps, 1.0f, W, keys + to);
        rotate(t, keys + to, W, keys + to);
        std::copy_n(v + from, W, values + to);
      }
    });
  };
  return mx::array::make_arrays(
      {{B, heads, T, W}, {B, key_heads, T, W}, {B, key_heads, T, W}, {B, T, heads * W}},
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
    const Matrix A = next.matrix(one[0]);
    const int64_t rows = int64_t(B) * T, width = int64_t(H) * W;
    std::vector<float> opened(rows * width);
    each(static_cast<int>(rows), rows * width * 16, [&](int row) {
      const int64_t b = row / T, t = row % T;
      for (int64_t i = 0; i < width; ++i) {
        const float gate = 1.0f / (1.0f + std::exp(-gates[row * width + i]));
        opened[row * width + i] = y[((b * H + i / W) * T + t) * W + i % W] * gate;
      }
    });
    float* to = made[0].data<float>();
    multiply_all({A}, opened.data(), rows, {to});
    add_rows(x, rows * D, to);
  };
  return mx::array(
      x.shape(),
      mx::float32,
      std::make_shared<Step>(mx::to_stream(stream), "StreamerAttentionOutput", body),
      std::move(inputs));
}

} // namespace streamer
