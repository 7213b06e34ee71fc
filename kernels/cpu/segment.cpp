#include "segment.h"

#include <algorithm>
#include <cstring>

#include "data.h"
#include "glue.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"

namespace streamer {

namespace {

struct Made {
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> types;
  std::vector<bool> shared; // of states: written where they lie
};

} // namespace

class SegmentOp::Impl {
 public:
  explicit Impl(Segment segment);

  bool kept() const {
    return kept_;
  }
  // Checks what is given and says what comes of it.
  Made made(
      const Arrays& inputs,
      const Arrays& states,
      int offset,
      const std::vector<bool>& fresh,
      const std::vector<Arrival>& arrivals) const;
  void run(const Arrays& in, Arrays& out, int offset, const std::vector<Arrival>& arrivals) const;

  // Inputs and outputs before the states.
  size_t first_in() const {
    return s_.chosen ? 5 : 1;
  }
  size_t first_out() const {
    return s_.router ? 5 : 1;
  }

 private:
  void embed(const mx::array& tokens, const Arrays& weights, float* y) const;

  Segment s_;
  Arrays embedding_, chosen_, router_, head_; // weights
  std::vector<Experts> head_matrix_;
  bool kept_ = true;
};

namespace {

// One run of a segment. States that may be written where they lie share their buffers.
class SegmentStep : public mx::Primitive {
 public:
  SegmentStep(
      mx::Stream stream,
      std::shared_ptr<const SegmentOp::Impl> impl,
      int offset,
      std::vector<bool> shared)
      : Primitive(stream), impl_(std::move(impl)), offset_(offset), shared_(std::move(shared)) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    const size_t from = impl_->first_in(), to = impl_->first_out();
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (i >= to && shared_[i - to] && inputs[from + i - to].flags().row_contiguous) {
        outputs[i].copy_shared_buffer(inputs[from + i - to]);
      } else {
        outputs[i].set_data(mx::allocator::malloc(outputs[i].nbytes()));
      }
    }
    Arrays in, out;
    for (const mx::array& a : inputs) in.push_back(mx::array::unsafe_weak_copy(a));
    for (const mx::array& a : outputs) out.push_back(mx::array::unsafe_weak_copy(a));
    mx::cpu::get_command_encoder(stream()).dispatch(
        [impl = impl_, in = std::move(in), out = std::move(out), offset = offset_]() mutable {
          impl->run(in, out, offset, {});
        });
  }

  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error("segment: this kernel runs on the CPU only");
  }

  const char* name() const override {
    return "StreamerSegment";
  }

 private:
  std::shared_ptr<const SegmentOp::Impl> impl_;
  int offset_;
  std::vector<bool> shared_;
};

} // namespace

SegmentOp::Impl::Impl(Segment segment) : s_(std::move(segment)) {
  check(!(s_.embedding && s_.chosen) && !(s_.router && s_.head), "segment: it has one beginning and one end");
  for (const Block& block : s_.blocks) check(block.D == s_.D, "segment: blocks differ in width");
  for (const auto* moe : {&s_.chosen, &s_.router}) {
    check(!*moe || (*moe)->D() == s_.D, "segment: experts differ in width");
  }
  if (s_.embedding) {
    const Embedding& e = *s_.embedding;
    append(embedding_, e.w);
    check(e.w.w.ndim() == 2, "segment: wrong axes of an embedding");
    if (e.w.scales) {
      check(e.w.biases.has_value(), "segment: an embedding must be affine");
      for (const auto* a : {&*e.w.scales, &*e.w.biases}) {
      check(
          a->dtype() == mx::float32 || a->dtype() == mx::float16 || a->dtype() == mx::bfloat16,
          "segment: an embedding's scales must be floats");
    }
      check(
          e.w.w.dtype() == mx::uint32 && int64_t(e.w.w.shape(1)) * 32 == int64_t(s_.D) * e.bits &&
              e.group > 0 && s_.D % e.group == 0 && e.w.scales->shape(1) == s_.D / e.group &&
              e.w.scales->shape(0) == e.w.w.shape(0) && e.w.biases->shape() == e.w.scales->shape(),
          "segment: the embedding doesn't fit");
    } else {
      check(e.w.w.dtype() == mx::float32 && e.w.w.shape(1) == s_.D, "segment: the embedding doesn't fit");
    }
  }
  if (s_.chosen) chosen_ = s_.chosen->expert_weights();
  if (s_.router) router_ = s_.router->routing_weights();
  if (s_.head) {
    check_norm(s_.head->norm, s_.D, "segment: the last norm doesn't fit");
    head_matrix_ = matrices_of(s_.head->w, {s_.D}, "segment: there must be one head");
    head_ = {s_.head->norm.weight};
    append(head_, s_.head->w.weights[0]);
  }
  auto look = [&](const Arrays& all) {
    for (const mx::array& a : all) kept_ = kept_ && a.is_available();
  };
  for (const Arrays* all : {&embedding_, &chosen_, &router_, &head_}) look(*all);
  for (const Block& block : s_.blocks) look(block.weights);
}

Made SegmentOp::Impl::made(
    const Arrays& inputs,
    const Arrays& states,
    int offset,
    const std::vector<bool>& fresh,
    const std::vector<Arrival>& arrivals) const {
  check(kept_, "segment: its weights must be evaluated");
  check(inputs.size() == first_in() && inputs[0].ndim() >= 2, "segment: wrong inputs");
  const mx::array& x = inputs[0];
  const int B = x.shape(0), T = x.shape(1);
  check(B * T > 0 && offset >= 0, "segment: there must be rows");
  if (s_.embedding) {
    check(
        x.ndim() == 2 && (x.dtype() == mx::int32 || x.dtype() == mx::uint32),
        "segment: tokens must be 32-bit integers");
  } else {
    check(x.dtype() == mx::float32 && x.shape() == mx::Shape{B, T, s_.D}, "segment: x doesn't fit");
  }
  if (s_.chosen) {
    const int k = s_.chosen->k();
    check_float({inputs[1], inputs[3], inputs[4]}, "segment: routed rows must be float32");
    check(
        inputs[1].size() == x.size() && inputs[2].dtype() == mx::int32 &&
            inputs[2].size() == size_t(B) * T * k && inputs[3].size() == inputs[2].size() &&
            inputs[4].size() == size_t(B) * T,
        "segment: what was routed doesn't fit x");
    for (const Arrival& arrival : arrivals) {
      for (int pair : arrival.pairs) check(pair >= 0 && pair < B * T * k, "segment: no such pair");
    }
  }
  Made all{{{B, T, s_.D}}, {}, std::vector<bool>(states.size(), false)};
  if (s_.router) {
    const int k = s_.router->k();
    all.shapes.insert(all.shapes.end(), {{B, T, s_.D}, {B, T, k}, {B, T, k}, {B, T, 1}});
  }
  if (s_.head) all.shapes[0].back() = head_matrix_[0].A.N;
  all.types.assign(all.shapes.size(), mx::float32);
  if (s_.router) all.types[2] = mx::int32;
  size_t at = 0;
  for (const Block& block : s_.blocks) {
    if (block.kind == Block::Kind::plain) continue;
    check(at + 2 <= states.size() && fresh.size() == states.size(), "segment: states are missing");
    check_float({states[at], states[at + 1]}, "segment: states must be float32");
    const bool cache = block.kind == Block::Kind::cache;
    check(!cache || states[at].ndim() == 4, "segment: a cache doesn't fit");
    const int room = cache ? states[at].shape(2) : 0;
    check(!cache || offset + T <= room, "segment: a cache has no room");
    const auto fits = block.states(B, room);
    for (int i = 0; i < 2; ++i, ++at) {
      check(states[at].shape() == fits[i], "segment: a state doesn't fit");
      all.shapes.push_back(fits[i]);
      all.types.push_back(mx::float32);
      all.shared[at] = cache && fresh[at];
    }
  }
  check(at == states.size(), "segment: too many states");
  return all;
}

namespace {

template <class T>
void widen_from(const void* data, int64_t at, std::vector<float>& out) {
  const T* from = static_cast<const T*>(data) + at;
  for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<float>(from[i]);
}

// Elements of an array from `at` on.
void widen(const mx::array& a, const void* data, int64_t at, std::vector<float>& out) {
  if (a.dtype() == mx::float32) return widen_from<float>(data, at, out);
  if (a.dtype() == mx::float16) return widen_from<mx::float16_t>(data, at, out);
  widen_from<mx::bfloat16_t>(data, at, out);
}

} // namespace

void SegmentOp::Impl::embed(const mx::array& tokens, const Arrays& weights, float* y) const {
  const Embedding& e = *s_.embedding;
  const int64_t count = tokens.size(), D = s_.D, V = e.w.w.shape(0);
  std::vector<std::shared_ptr<char>> copies;
  const auto* ids = static_cast<const int32_t*>(row_major(tokens, copies));
  const void* w = row_major(weights[0], copies);
  for (int64_t r = 0; r < count; ++r, y += D) {
    const int64_t id = ids[r] < 0 ? ids[r] + V : ids[r];
    if (id < 0 || id >= V) {
      std::fill_n(y, D, 0.0f);
    } else if (!e.w.scales) {
      std::copy_n(static_cast<const float*>(w) + id * D, D, y);
    } else {
      const int64_t groups = D / e.group;
      std::vector<float> scales(groups), biases(groups);
      widen(weights[1], row_major(weights[1], copies), id * groups, scales);
      widen(weights[2], row_major(weights[2], copies), id * groups, biases);
      dequantize_row(
          static_cast<const uint32_t*>(w) + id * (D * e.bits / 32), scales.data(), biases.data(),
          e.group, e.bits, D, y);
    }
  }
}

void SegmentOp::Impl::run(
    const Arrays& in, Arrays& out, int offset, const std::vector<Arrival>& arrivals) const {
  const int B = in[0].shape(0), T = in[0].shape(1);
  const int64_t rows = int64_t(B) * T, size = rows * s_.D;
  std::vector<float> space(2 * size);
  float *x = space.data(), *y = x + size;
  Inputs given(in);
  if (s_.embedding) {
    embed(in[0], embedding_, x);
  } else if (s_.chosen) {
    const float *residual = given.floats(), *normed = given.floats();
    const auto* slots = reinterpret_cast<const int32_t*>(given.floats());
    const float *scores = given.floats(), *opening = given.floats();
    Inputs weights(chosen_);
    s_.chosen->mix(
        weights, residual, static_cast<int>(rows), {normed, slots, scores, opening}, arrivals, x);
  } else {
    std::copy_n(given.floats(), size, x);
  }
  size_t from = first_in(), to = first_out();
  for (const Block& block : s_.blocks) {
    Pass pass{B, T, x, y};
    std::vector<std::shared_ptr<char>> copies;
    for (int i = 0; i < 2 && block.kind != Block::Kind::plain; ++i, ++from, ++to) {
      pass.before[i] = static_cast<const float*>(row_major(in[from], copies));
      pass.after[i] = out[to].data<float>();
      if (block.kind == Block::Kind::cache) {
        pass.offset = offset;
        pass.room = in[from].shape(2);
        if (pass.before[i] != pass.after[i]) {
          std::memcpy(pass.after[i], pass.before[i], in[from].nbytes());
        }
      }
    }
    Inputs weights(block.weights);
    block.body(weights, pass);
    std::swap(x, y);
  }
  float* last = out[0].data<float>();
  if (s_.head) {
    Inputs weights(head_);
    norm_rows(x, rows, s_.D, weights.floats(), s_.head->norm.eps, y);
    multiply_all({weights.matrix(head_matrix_[0])}, y, rows, {last});
    return;
  }
  std::copy_n(x, size, last);
  if (s_.router) {
    Inputs weights(router_);
    s_.router->route(
        weights, x, static_cast<int>(rows), out[1].data<float>(), out[2].data<int32_t>(),
        out[3].data<float>(), out[4].data<float>());
  }
}

SegmentOp::SegmentOp(Segment segment) : impl_(std::make_shared<const Impl>(std::move(segment))) {}

SegmentOp::~SegmentOp() = default;

bool SegmentOp::kept() const {
  return impl_->kept();
}

Arrays SegmentOp::operator()(
    const Arrays& inputs,
    const Arrays& states,
    int offset,
    const std::vector<bool>& fresh,
    mx::StreamOrDevice stream) const {
  Made made = impl_->made(inputs, states, offset, fresh, {});
  Arrays all = inputs;
  all.insert(all.end(), states.begin(), states.end());
  return mx::array::make_arrays(
      std::move(made.shapes),
      made.types,
      std::make_shared<SegmentStep>(mx::to_stream(stream), impl_, offset, std::move(made.shared)),
      std::move(all));
}

Arrays SegmentOp::now(
    const Arrays& inputs,
    const Arrays& states,
    int offset,
    const std::vector<bool>& fresh,
    const std::vector<Arrival>& arrivals) const {
  const Made made = impl_->made(inputs, states, offset, fresh, arrivals);
  Arrays in = inputs, out;
  in.insert(in.end(), states.begin(), states.end());
  for (mx::array& a : in) a.eval();
  for (size_t i = 0; i < made.shapes.size(); ++i) {
    const size_t state = i - impl_->first_out();
    if (i >= impl_->first_out() && made.shared[state] && states[state].flags().row_contiguous) {
      out.push_back(states[state]);
      continue;
    }
    size_t bytes = mx::size_of(made.types[i]);
    for (int n : made.shapes[i]) bytes *= n;
    out.emplace_back(mx::allocator::malloc(bytes), made.shapes[i], made.types[i]);
  }
  impl_->run(in, out, offset, arrivals);
  return out;
}

} // namespace streamer
