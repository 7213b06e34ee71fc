#include "moe.h"

#include "data.h"
#include "glue.h"
#include "stacks.h"

namespace streamer {
namespace {

std::vector<Experts> stacks_of(const Alike& all, const std::vector<int>& columns) {
  std::vector<Experts> out;
  for (size_t i = 0; i < columns.size(); ++i) {
    out.push_back(experts_of(columns[i], all.weights[i], all.group, all.bits, all.mode));
  }
  return out;
}

Bound bound_moe(
    int D,
    const Alike& routers,
    const Alike& experts,
    const Alike& shared,
    int k,
    bool normalize,
    const std::optional<Norm>& norm) {
  check(
      routers.weights.size() == 2 && experts.weights.size() == 3 && shared.weights.size() == 3,
      "moe: there must be two routers, and gate, up and down twice");
  const int S = experts.weights[0].w.shape(0), I = experts.weights[0].w.shape(1),
            J = shared.weights[0].w.shape(0);
  const auto r = stacks_of(routers, {D, D}), e = stacks_of(experts, {D, D, I}),
             s = stacks_of(shared, {D, D, J});
  check(r[0].A.N == S && r[1].A.N == 1 && k >= 1 && k <= S, "moe: the routers don't fit");
  for (const auto& [three, inner, slots] : {std::tuple{&e, I, S}, std::tuple{&s, J, 1}}) {
    for (const Experts& one : *three) check(one.slots == slots, "moe: slots don't fit together");
    check((*three)[1].A.N == inner && (*three)[2].A.N == D, "moe: gate, up and down don't fit");
  }
  Arrays weights;
  for (const Alike* all : {&routers, &experts, &shared}) {
    for (const Weight& weight : all->weights) append(weights, weight);
  }
  if (norm) {
    check_float({norm->weight}, "moe: the norm must be float32");
    check(norm->weight.shape() == mx::Shape{D}, "moe: the norm doesn't fit x");
    weights.push_back(norm->weight);
  }
  auto body = [=, normed = norm.has_value(), epsilon = norm ? norm->eps : 0.0f](
                  const Arrays& in, Arrays& out) {
    std::vector<std::shared_ptr<char>> copies;
    size_t at = 1;
    std::vector<Matrix> A;
    for (const auto* some : {&r, &e, &s}) {
      for (const Experts& one : *some) A.push_back(bound(one, in, at, copies));
    }
    const auto* from = static_cast<const float*>(row_major(in[0], copies));
    const int R = static_cast<int>(out[0].size() / D);
    std::vector<float> scaled(normed ? int64_t(R) * D : 0);
    if (normed) {
      const auto* w = static_cast<const float*>(row_major(in[at], copies));
      norm_rows(from, R, D, w, epsilon, scaled.data());
    }
    const float* x = normed ? scaled.data() : from;
    const std::vector<int32_t> only(R, 0);
    std::vector<int32_t> ids(R * k);
    std::vector<float> logits(int64_t(R) * S), opening(R), scores(R * k), y(int64_t(R) * (k + 1) * D);
    const Pairs all(only.data(), R, 1, 1);
    Plan route;
    route.add(all, x, 1, {{A[0], logits.data()}, {A[1], opening.data()}});
    route.run();
    route_rows(logits.data(), R, S, k, normalize, ids.data(), scores.data());
    const Pairs pairs(ids.data(), R * k, k, S);
    float* others = y.data() + int64_t(R) * k * D;
    run_swiglus({{pairs, A[2], A[3], A[4], y.data()}, {all, A[5], A[6], A[7], others}}, x);
    float* to = out[0].data<float>();
    combine_rows(y.data(), scores.data(), others, opening.data(), R, k, D, to);
    if (normed) add_rows(from, int64_t(R) * D, to);
  };
  return {body, std::move(weights)};
}

} // namespace

Moe::Moe(
    int D,
    const Alike& routers,
    const Alike& experts,
    const Alike& shared,
    int k,
    bool normalize,
    const std::optional<Norm>& norm)
    : D_(D), run_(bound_moe(D, routers, experts, shared, k, normalize, norm)) {}

mx::array Moe::operator()(const mx::array& x, mx::StreamOrDevice stream) const {
  check(x.ndim() >= 1 && x.dtype() == mx::float32 && x.shape(-1) == D_, "moe: x doesn't fit");
  return run_("StreamerMoe", {x}, {x.shape()}, stream)[0];
}

} // namespace streamer
