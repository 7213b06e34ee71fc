#include "moe.h"

#include <algorithm>

#include "data.h"
#include "glue.h"

namespace streamer {
namespace {

std::vector<Experts> stacks_of(const Alike& all, const std::vector<int>& columns) {
  std::vector<Experts> out;
  for (size_t i = 0; i < columns.size(); ++i) {
    out.push_back(experts_of(columns[i], all.weights[i], all.group, all.bits, all.mode));
  }
  return out;
}

std::vector<Matrix> matrices(Inputs& next, const std::vector<Experts>& all) {
  std::vector<Matrix> out;
  for (const Experts& one : all) out.push_back(next.matrix(one));
  return out;
}

} // namespace

MoeBlock::MoeBlock(int D, const MoeWeights& w, const std::optional<Norm>& norm, bool paged)
    : D_(D),
      k_(w.k),
      normalize_(w.normalize),
      normed_(norm.has_value()),
      eps_(norm ? norm->eps : 0.0f) {
  check(
      w.routers.weights.size() == 2 && w.experts.weights.size() == 3 && w.shared.weights.size() == 3,
      "moe: there must be two routers, and gate, up and down twice");
  S_ = w.experts.weights[0].w.shape(0);
  const int I = w.experts.weights[0].w.shape(1), J = w.shared.weights[0].w.shape(0);
  routers_ = stacks_of(w.routers, {D, D});
  experts_ = stacks_of(w.experts, {D, D, I});
  shared_ = stacks_of(w.shared, {D, D, J});
  E_ = routers_[0].A.N;
  check(
      (paged || E_ == S_) && routers_[1].A.N == 1 && k_ >= 1 && k_ <= E_,
      "moe: the routers don't fit");
  for (const auto& [three, inner, slots] : {std::tuple{&experts_, I, S_}, std::tuple{&shared_, J, 1}}) {
    for (const Experts& one : *three) check(one.slots == slots, "moe: slots don't fit together");
    check((*three)[1].A.N == inner && (*three)[2].A.N == D, "moe: gate, up and down don't fit");
  }
  for (const Weight& weight : w.routers.weights) append(routing_weights_, weight);
  if (norm) {
    check_float({norm->weight}, "moe: the norm must be float32");
    check(norm->weight.shape() == mx::Shape{D}, "moe: the norm doesn't fit x");
    routing_weights_.push_back(norm->weight);
  }
  for (const Alike* all : {&w.experts, &w.shared}) {
    for (const Weight& weight : all->weights) append(expert_weights_, weight);
  }
}

void MoeBlock::route(
    Inputs& next,
    const float* x,
    int rows,
    float* normed,
    int32_t* ids,
    float* scores,
    float* opening) const {
  const auto A = matrices(next, routers_);
  if (normed_) {
    norm_rows(x, rows, D_, next.floats(), eps_, normed);
    x = normed;
  }
  std::vector<float> logits(int64_t(rows) * E_);
  multiply_all(A, x, rows, {logits.data(), opening});
  route_rows(logits.data(), rows, E_, k_, normalize_, ids, scores);
}

AtHand MoeBlock::at_hand(
    Inputs& next, int rows, const Routed& routed, const std::vector<Arrival>& arrivals) const {
  const auto A = matrices(next, experts_), B = matrices(next, shared_);
  const std::vector<int32_t> only(rows, 0);
  const int count = rows * k_;
  AtHand there(int64_t(rows) * (k_ + 1) * D_);
  std::vector<int32_t> slots(routed.slots, routed.slots + count);
  for (const Arrival& arrival : arrivals) {
    for (int pair : arrival.pairs) slots[pair] = -1;
  }
  const Pairs all(only.data(), rows, 1, 1), here(slots.data(), count, k_, S_);
  float *own = there.data(), *others = own + int64_t(count) * D_;
  run_swiglus({{here, A[0], A[1], A[2], own}, {all, B[0], B[1], B[2], others}}, routed.x);
  return there;
}

void MoeBlock::mix(
    Inputs& next,
    const float* x,
    int rows,
    const Routed& routed,
    const std::vector<Arrival>& arrivals,
    AtHand& there,
    float* y) const {
  std::vector<Matrix> A;
  if (!arrivals.empty()) A = matrices(next, experts_);
  const int count = rows * k_;
  float *own = there.data(), *others = own + int64_t(count) * D_;
  std::vector<int32_t> slots(count);
  for (const Arrival& arrival : arrivals) {
    arrival.wait();
    std::fill(slots.begin(), slots.end(), -1);
    for (int pair : arrival.pairs) slots[pair] = routed.slots[pair];
    const Pairs come(slots.data(), count, k_, S_);
    run_swiglus({{come, A[0], A[1], A[2], own, true}}, routed.x);
  }
  combine_rows(own, routed.scores, others, routed.opening, rows, k_, D_, y);
  if (normed_) add_rows(x, int64_t(rows) * D_, y);
}

void MoeBlock::run(Inputs& next, const float* x, int rows, float* y) const {
  std::vector<float> space(int64_t(rows) * (D_ * normed_ + k_ + 1));
  std::vector<int32_t> ids(int64_t(rows) * k_);
  float *scores = space.data(), *opening = scores + int64_t(rows) * k_, *normed = opening + rows;
  route(next, x, rows, normed, ids.data(), scores, opening);
  const Routed routed{normed_ ? normed : x, ids.data(), scores, opening};
  Inputs again(next);
  AtHand there = at_hand(next, rows, routed, {});
  mix(again, x, rows, routed, {}, there, y);
}

namespace {

Block block_of(const MoeBlock& moe) {
  Block block;
  block.D = moe.D();
  block.weights = moe.routing_weights();
  block.weights.insert(
      block.weights.end(), moe.expert_weights().begin(), moe.expert_weights().end());
  block.body = [moe](Inputs& weights, const Pass& pass) {
    moe.run(weights, pass.x, static_cast<int>(pass.rows()), pass.y);
  };
  return block;
}

} // namespace

Moe::Moe(int D, const MoeWeights& weights, const std::optional<Norm>& norm)
    : block_(block_of(MoeBlock(D, weights, norm, false))),
      run_(
          [body = block_.body, D](const Arrays& in, Arrays& out) {
            Inputs next(in);
            const float* x = next.floats();
            body(next, {1, static_cast<int>(out[0].size() / D), x, out[0].data<float>()});
          },
          block_.weights) {}

mx::array Moe::operator()(const mx::array& x, mx::StreamOrDevice stream) const {
  check(x.ndim() >= 1 && x.dtype() == mx::float32 && x.shape(-1) == block_.D, "moe: x doesn't fit");
  return run_("StreamerMoe", {x}, {x.shape()}, stream)[0];
}

} // namespace streamer
