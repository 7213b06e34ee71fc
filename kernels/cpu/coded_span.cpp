#include "coded_span.h"

#include "data.h"

namespace streamer {
namespace {

// Of `count` values those that meet an index's bytes where these are digits of one channel.
const float* digits_of(const float* q, int count) {
  float* to = workspace(Use::step, 2 * int64_t(count));
  for (int i = 0; i < count; ++i) {
    to[2 * i] = radix * q[i];
    to[2 * i + 1] = q[i];
  }
  return to;
}

// Rows over one span of the coded tokens, as ContextPart::run.
class CodedSpan {
 public:
  CodedSpan(
      const Call& call, const Queries& queries, const Source& keys, const Source& values, int head, int first,
      int rows, int from)
      : call_(call), queries_(queries), keys_(keys), values_(values), head_(head), first_(first), rows_(rows),
        from_(from) {
    for (int r = 0; r < rows; ++r) count_ = std::max(count_, end_of(r));
    int64_t room = 0; // bytes
    for (const Source* side : {&keys, &values}) {
      room = std::max<int64_t>(
          room, side->bytes() ? side->bytes()->room(rows, side->spread()) : most_tile * side->n() * sizeof(float));
    }
    scores_ = workspace(Use::step, int64_t(rows) * step + 2 * span + room / 4 + 16);
    key_scales_ = scores_ + int64_t(rows) * step;
    value_scales_ = key_scales_ + span;
    room_ = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(value_scales_ + span) + 63) / 64 * 64);
  }

  void run(float* y, float* tops, float* totals) {
    std::fill(y, y + int64_t(rows_) * values_.wide(), 0.0f);
    std::fill(totals, totals + rows_, 0.0f);
    if (count_ == 0) return;
    keys_.scales(head_, from_, count_, key_scales_);
    values_.scales(head_, from_, count_, value_scales_);
    std::fill(value_scales_ + count_, value_scales_ + span, 0.0f);
    keys_.words(head_, from_, count_, words_);
    keys_.bytes() ? score_bytes() : score();
    const float* q = call_.q + (int64_t(head_) * call_.R + first_) * keys_.n();
    for (int r = 0; r < rows_; ++r) soften(r, q + int64_t(r) * keys_.n(), tops[r], totals[r]);
    values_.words(head_, from_, count_, words_);
    values_.bytes() ? weigh_bytes(y) : weigh(y);
  }

 private:
  int end_of(int r) const {
    return std::clamp(call_.coded_end(first_ + r) - from_, 0, span);
  }
  const float* rotated() const {
    return call_.rotated + (int64_t(head_) * call_.R + first_) * keys_.n();
  }

  void score() {
    float* u = reinterpret_cast<float*>(room_);
    for (int j = 0; j < count_; j += attend_steps().tile) {
      const int here = std::min(attend_steps().tile, count_ - j), n = keys_.n();
      code_steps().unpack(words_ + j, here, keys_.book(), n, u);
      attend_steps().scores(rotated(), rows_, u, n, here, n, scores_ + j);
    }
  }

  void score_bytes() {
    keys_.bytes()->scores(
        words_, count_, keys_.book(), keys_.spread(), queries_.of(head_, first_), rows_, room_, scores_);
  }

  void soften(int r, const float* q, float& top, float& total) {
    float* row = scores_ + int64_t(r) * step;
    const int end = end_of(r), all = up_to(padded, count_);
    if (end == 0) return std::fill(row, row + all, 0.0f);
    const float lift = attend_steps().dot(q, keys_.mean(head_), keys_.n());
    code_steps().place(row, end, key_scales_, lift);
    if (call_.bias != nullptr) {
      attend_steps().place(row, end, 1.0f, call_.bias_of(head_, first_ + r) + call_.first + from_);
    }
    attend_steps().soften(row, end, all, top, total);
  }

  void weigh(float* y) {
    float* u = reinterpret_cast<float*>(room_);
    const int n = values_.n();
    for (int r = 0; r < rows_; ++r) code_steps().times(scores_ + int64_t(r) * step, count_, value_scales_);
    for (int j = 0; j < count_; j += attend_steps().tile) {
      const int here = std::min(attend_steps().tile, count_ - j);
      code_steps().unpack(words_ + j, here, values_.book(), n, u);
      attend_steps().weigh(scores_ + j, rows_, u, n, here, n, y);
    }
  }

  void weigh_bytes(float* y) {
    values_.bytes()->weigh(
        words_, count_, values_.book(), values_.spread(), scores_, value_scales_, rows_, room_, y);
  }

  const Call& call_;
  const Queries& queries_;
  const Source &keys_, &values_;
  const int head_, first_, rows_, from_;
  int count_ = 0;
  float *scores_, *key_scales_, *value_scales_;
  uint8_t* room_;
  const uint32_t* words_[span];
};

} // namespace

Queries::Queries(const Call& call, const Source& keys) : steps_(keys.bytes()), R_(up_to(8, call.R)) {
  if (steps_ == nullptr) return;
  const int heads = call.B * call.H, n = keys.n(), spread = keys.spread();
  row_ = 2 * keys.wide();
  units_.resize(heads * R_), lifts_.resize(heads * R_), digits_.resize(heads * R_ * row_);
  const int eights = R_ / 8;
  each(heads * eights, int64_t(heads) * call.R * n * 16, [&](int task) {
    const int head = task / eights, r = task % eights * 8, rows = std::min(8, call.R - r);
    const float* q = call.rotated + (int64_t(head) * call.R + r) * n;
    if (spread != n) q = digits_of(q, rows * n);
    const int64_t at = int64_t(head) * R_ + r;
    steps_->pack(q, rows, spread, digits_.data() + at * row_, units_.data() + at, lifts_.data() + at);
  });
}

Integers Queries::of(int head, int first) const {
  const int64_t at = int64_t(head) * R_ + first;
  return {digits_.data() + at * row_, units_.data() + at, lifts_.data() + at};
}

// Rows over one span of the raw tokens, as ContextPart::run.
void run_raw(
    const Call& call, const Source& keys, const Source& values, int head, int first, int rows, int index,
    float* y, float* tops, float* totals) {
  const AttendSteps& steps = attend_steps();
  const int from = index * span, n = keys.n();
  auto end_of = [&](int r) { return std::clamp(call.raw_end(first + r) - from, 0, span); };
  int count = 0;
  for (int r = 0; r < rows; ++r) count = std::max(count, end_of(r));
  std::fill(y, y + int64_t(rows) * values.n(), 0.0f);
  std::fill(totals, totals + rows, 0.0f);
  if (count == 0) return;
  float* s = workspace(Use::step, int64_t(rows) * step);
  const float* q = call.q + (int64_t(head) * call.R + first) * n;
  keys.raw(head, from, count, steps.tile, [&](const float* k, int64_t stride, int begin, int here) {
    steps.scores(q, rows, k, stride, here, n, s + begin);
  });
  for (int r = 0; r < rows; ++r) {
    float* row = s + int64_t(r) * step;
    const int end = end_of(r), all = up_to(16, count);
    if (end == 0) {
      std::fill(row, row + all, 0.0f);
      continue;
    }
    if (call.bias != nullptr) {
      const float* bias = call.bias_of(head, first + r);
      const int early = std::clamp(call.first - from, 0, end); // columns of the first tokens
      steps.place(row, early, 1.0f, bias + from);
      steps.place(row + early, end - early, 1.0f, bias + call.coded + from + early);
    }
    // What this row reads as codes instead.
    const int begin = std::clamp(call.first - from, 0, end);
    const int begun = call.crossed(first + r) ? std::clamp(call.first + call.ahead - from, begin, end) : begin;
    std::fill(row + begin, row + begun, lowest);
    steps.soften(row, end, all, tops[r], totals[r]);
    std::fill(row + begin, row + begun, 0.0f);
  }
  values.raw(head, from, count, steps.tile, [&](const float* v, int64_t stride, int begin, int here) {
    steps.weigh(s + begin, rows, v, stride, here, values.n(), y);
  });
}

void run_coded(
    const Call& call, const Queries& queries, const Source& keys, const Source& values, int head, int first,
    int rows, int index, float* y, float* tops, float* totals) {
  CodedSpan(call, queries, keys, values, head, first, rows, index * span).run(y, tops, totals);
}

void in_order(const Source& values, const float* sum, float* out) {
  const int n = values.n();
  if (values.bytes() == nullptr) {
    std::copy(sum, sum + n, out);
  } else if (values.spread() == n) {
    values.bytes()->in_order(sum, n, out);
  } else {
    float* digits = workspace(Use::step, values.spread());
    values.bytes()->in_order(sum, values.spread(), digits);
    for (int c = 0; c < n; ++c) out[c] = radix * digits[2 * c] + digits[2 * c + 1];
  }
}

} // namespace streamer
