#include "entry.h"

#include <algorithm>

#include "data.h"
#include "glue.h"

namespace streamer {

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

Entry::Entry(int D, const Embedding& e, const std::optional<Join>& join)
    : D_(D), embedding_(e), join_(join) {
  append(weights_, e.w);
  check(e.w.w.ndim() == 2, "segment: wrong axes of an embedding");
  if (e.w.scales) {
    check(e.w.biases.has_value(), "segment: an embedding must be affine");
    for (const auto* a : {&*e.w.scales, &*e.w.biases}) {
      check(
          a->dtype() == mx::float32 || a->dtype() == mx::float16 || a->dtype() == mx::bfloat16,
          "segment: an embedding's scales must be floats");
    }
    check(
        e.w.w.dtype() == mx::uint32 && int64_t(e.w.w.shape(1)) * 32 == int64_t(D) * e.bits &&
            e.group > 0 && D % e.group == 0 && e.w.scales->shape(1) == D / e.group &&
            e.w.scales->shape(0) == e.w.w.shape(0) && e.w.biases->shape() == e.w.scales->shape(),
        "segment: the embedding doesn't fit");
  } else {
    check(
        e.w.w.dtype() == mx::float32 && e.w.w.shape(1) == D, "segment: the embedding doesn't fit");
  }
  norms_ = weights_.size();
  if (!join) return;
  for (const Norm* norm : {&join->embedded, &join->hidden}) {
    check_norm(*norm, D, "segment: a norm before the join doesn't fit");
    weights_.push_back(norm->weight);
  }
  matrix_ = matrices_of(join->w, {2 * D}, "segment: there must be one join");
  check(matrix_[0].A.N == D, "segment: the join doesn't fit");
  append(weights_, join->w.weights[0]);
}

void Entry::check_inputs(const Arrays& inputs) const {
  const mx::array& tokens = inputs[0];
  check(
      tokens.ndim() == 2 && (tokens.dtype() == mx::int32 || tokens.dtype() == mx::uint32),
      "segment: tokens must be 32-bit integers");
  if (!join_) return;
  check(
      inputs[1].dtype() == mx::float32 &&
          inputs[1].shape() == mx::Shape{tokens.shape(0), tokens.shape(1), D_},
      "segment: hidden states don't fit the tokens");
}

void Entry::run(const Arrays& in, float* x) const {
  if (!join_) return look_up(in[0], x);
  const int64_t rows = in[0].size(), D = D_;
  Inputs states(in, 1), own(weights_, norms_);
  std::vector<float> space(rows * 4 * D);
  float *embedded = space.data(), *hidden = embedded + rows * D, *both = hidden + rows * D;
  look_up(in[0], embedded);
  norm_rows(embedded, rows, D_, own.floats(), join_->embedded.eps, embedded);
  norm_rows(states.floats(), rows, D_, own.floats(), join_->hidden.eps, hidden);
  const float *first = join_->swapped ? hidden : embedded, *second = join_->swapped ? embedded : hidden;
  for (int64_t r = 0; r < rows; ++r) {
    std::copy_n(first + r * D, D, both + r * 2 * D);
    std::copy_n(second + r * D, D, both + r * 2 * D + D);
  }
  multiply_all({own.matrix(matrix_[0])}, both, rows, {x});
}

void Entry::look_up(const mx::array& tokens, float* y) const {
  const Embedding& e = embedding_;
  const int64_t count = tokens.size(), D = D_, V = e.w.w.shape(0);
  std::vector<std::shared_ptr<char>> copies;
  const auto* ids = static_cast<const int32_t*>(row_major(tokens, copies));
  const void* w = row_major(weights_[0], copies);
  for (int64_t r = 0; r < count; ++r, y += D) {
    const int64_t id = ids[r] < 0 ? ids[r] + V : ids[r];
    if (id < 0 || id >= V) {
      std::fill_n(y, D, 0.0f);
    } else if (!e.w.scales) {
      std::copy_n(static_cast<const float*>(w) + id * D, D, y);
    } else {
      const int64_t groups = D / e.group;
      std::vector<float> scales(groups), biases(groups);
      widen(weights_[1], row_major(weights_[1], copies), id * groups, scales);
      widen(weights_[2], row_major(weights_[2], copies), id * groups, biases);
      dequantize_row(
          static_cast<const uint32_t*>(w) + id * (D * e.bits / 32), scales.data(), biases.data(),
          e.group, e.bits, D, y);
    }
  }
}

} // namespace streamer
