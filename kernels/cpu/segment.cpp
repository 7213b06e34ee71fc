#include "segment_impl.h"

#include <algorithm>
#include <cstring>

#include "data.h"
#include "glue.h"

namespace streamer {

SegmentOp::Impl::Impl(Segment segment) : s_(std::move(segment)) {
  check(!(s_.entry && s_.chosen) && !(s_.router && s_.head), "segment: it has one beginning and one end");
  for (const Block& block : s_.blocks) check(block.D == s_.D, "segment: blocks differ in width");
  for (const auto* moe : {&s_.chosen, &s_.router}) {
    check(!*moe || (*moe)->D() == s_.D, "segment: experts differ in width");
  }
  if (s_.chosen) chosen_ = s_.chosen->expert_weights();
  if (s_.router) router_ = s_.router->routing_weights();
  check(s_.head || !s_.hidden, "segment: only a head has hidden states");
  if (s_.head) {
    check_norm(s_.head->norm, s_.D, "segment: the last norm doesn't fit");
    head_matrix_ = matrices_of(s_.head->w, {s_.D}, "segment: there must be one head");
    head_ = {s_.head->norm.weight};
    append(head_, s_.head->w.weights[0]);
  }
  auto look = [&](const Arrays& all) {
    for (const mx::array& a : all) kept_ = kept_ && a.is_available();
  };
  if (s_.entry) look(s_.entry->weights());
  for (const Arrays* all : {&chosen_, &router_, &head_}) look(*all);
  for (size_t i = 0; i < s_.blocks.size(); ++i) {
    const Block& block = s_.blocks[i];
    look(block.weights);
    for (int64_t floats : block.tape) tape_ += floats;
    check(
        !s_.last || (block.kind == Block::Kind::plain) == (i > 0),
        "segment: states behind the first block are of all rows");
  }
}

bool SegmentOp::Impl::has_room(const Arrays& states, int offset, int rows) const {
  size_t at = 0;
  for (const Block& block : s_.blocks) {
    if (block.kind == Block::Kind::plain) continue;
    if (block.kind == Block::Kind::cache && offset + rows > states[at].shape(2)) return false;
    at += 2;
  }
  return true;
}

bool SegmentOp::Impl::in_place(const std::vector<bool>& fresh) const {
  size_t at = 0;
  for (const Block& block : s_.blocks) {
    if (block.kind == Block::Kind::plain) continue;
    if (block.kind == Block::Kind::cache && !fresh[at]) return false;
    at += 2;
  }
  return true;
}

Made SegmentOp::Impl::made(
    const SegmentOp::Call& call, const std::vector<Arrival>& arrivals) const {
  const auto& [inputs, states, offset, fresh, taped] = call;
  check(kept_, "segment: its weights must be evaluated");
  check(inputs.size() == first_in() && inputs[0].ndim() >= 2, "segment: wrong inputs");
  const mx::array& x = inputs[0];
  const int B = x.shape(0), T = x.shape(1), ends = s_.last ? 1 : T;
  check(B * T > 0 && offset >= 0, "segment: there must be rows");
  check(B == 1 || !(taped || s_.last), "segment: only of one sequence");
  if (s_.entry) {
    s_.entry->check_inputs(inputs);
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
  Made all{{{B, ends, s_.D}}, {}, std::vector<bool>(states.size(), false), 0};
  if (s_.router) {
    const int k = s_.router->k();
    all.shapes.insert(all.shapes.end(), {{B, ends, s_.D}, {B, ends, k}, {B, ends, k}, {B, ends, 1}});
  }
  if (s_.hidden) all.shapes.insert(all.shapes.end(), 2, all.shapes[0]);
  if (s_.head) all.shapes[0].back() = head_matrix_[0].A.N;
  if (taped && tape_) all.shapes.push_back({static_cast<int>(T * tape_)});
  all.first = all.shapes.size();
  all.types.assign(all.first, mx::float32);
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

// Where the parts of a block's tape lie, and the next block's begin.
std::vector<float*> parts_of(const Block& block, int64_t rows, float*& tape) {
  std::vector<float*> parts;
  for (int64_t floats : block.tape) {
    parts.push_back(tape);
    tape += rows * floats;
  }
  return parts;
}

// What follows the stream among the inputs of a segment that begins with experts.
Routed routed_of(Inputs& given) {
  const float* normed = given.floats();
  const auto* slots = reinterpret_cast<const int32_t*>(given.floats());
  const float* scores = given.floats();
  return {normed, slots, scores, given.floats()};
}

} // namespace

AtHand SegmentOp::Impl::at_hand(const Arrays& in, const std::vector<Arrival>& arrivals) const {
  check(s_.chosen && in.size() == first_in(), "segment: it doesn't begin with experts");
  Inputs given(in), weights(chosen_);
  given.floats();
  const int rows = static_cast<int>(in[0].size() / s_.D);
  return s_.chosen->at_hand(weights, rows, routed_of(given), arrivals);
}

void SegmentOp::Impl::run(
    const Arrays& in,
    Arrays& out,
    int offset,
    bool taped,
    const std::vector<Arrival>& arrivals,
    AtHand* there) const {
  const int B = in[0].shape(0);
  int T = in[0].shape(1);
  int64_t rows = int64_t(B) * T;
  std::vector<float> space(2 * rows * s_.D);
  float *x = space.data(), *y = x + rows * s_.D;
  Inputs given(in);
  if (s_.entry) {
    s_.entry->run(in, x);
  } else if (s_.chosen) {
    const float* residual = given.floats();
    const Routed routed = routed_of(given);
    const int count = static_cast<int>(rows);
    Inputs weights(chosen_), again(chosen_);
    AtHand own;
    if (!there) own = s_.chosen->at_hand(again, count, routed, arrivals);
    s_.chosen->mix(weights, residual, count, routed, arrivals, there ? *there : own, x);
  } else {
    std::copy_n(given.floats(), rows * s_.D, x);
  }
  size_t from = first_in(), to = first_out();
  float* tape = taped && tape_ ? out[to++].data<float>() : nullptr;
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
    if (tape) pass.tape = parts_of(block, rows, tape);
    Inputs weights(block.weights);
    block.body(weights, pass);
    std::swap(x, y);
    if (s_.last && T > 1) { // now that all rows have left their states
      std::copy_n(x + (rows - 1) * s_.D, s_.D, x);
      rows = T = 1;
    }
  }
  const int64_t size = rows * s_.D;
  float* last = out[0].data<float>();
  if (s_.head) {
    if (s_.hidden) {
      std::copy_n(x, size, out[1].data<float>());
      y = out[2].data<float>();
    }
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

std::vector<mx::Shape> SegmentOp::Impl::rewound(
    const Arrays& states, const mx::array& tape, int rows, int kept) const {
  check(kept >= 1 && kept <= rows, "segment: so many rows cannot be kept");
  check_float(states, "segment: states must be float32");
  check(
      tape.dtype() == mx::float32 && int64_t(tape.size()) == rows * tape_,
      "segment: that is not this tape");
  std::vector<mx::Shape> shapes;
  for (const Block& block : s_.blocks) {
    if (block.tape.empty()) continue;
    for (const mx::Shape& shape : block.states(1, 0)) shapes.push_back(shape);
  }
  check(states.size() == shapes.size(), "segment: states are missing");
  for (size_t i = 0; i < shapes.size(); ++i) {
    check(states[i].shape() == shapes[i], "segment: a state doesn't fit");
  }
  return shapes;
}

void SegmentOp::Impl::rewind(const Arrays& in, Arrays& out, int rows, int kept) const {
  std::vector<std::shared_ptr<char>> copies;
  // Read only.
  auto* tape = const_cast<float*>(static_cast<const float*>(row_major(in.back(), copies)));
  size_t at = 0;
  for (const Block& block : s_.blocks) {
    if (block.tape.empty()) continue;
    Pass pass{1, rows, nullptr, nullptr};
    for (int i = 0; i < 2; ++i, ++at) {
      pass.before[i] = static_cast<const float*>(row_major(in[at], copies));
      pass.after[i] = out[at].data<float>();
    }
    pass.tape = parts_of(block, rows, tape);
    Inputs weights(block.weights);
    block.rewind(weights, pass, kept);
  }
}

} // namespace streamer
