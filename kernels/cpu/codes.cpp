#include "codes.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "data.h"
#include "isa.h"
#include "mlx/ops.h"

namespace streamer {
namespace {

constexpr int span = 1024; // tokens a task takes
constexpr float lowest = -3.4028234e38f;

const CodeSteps& steps_in_use() {
#if defined(__x86_64__)
  if (isa().starts_with("avx512")) return codes_avx512();
  if (isa() == "avx2") return codes_avx2();
#elif defined(__aarch64__)
  if (isa() == "neon") return codes_neon();
#endif
  return codes_portable();
}

float of_half(uint16_t half) {
  // Moved to float32's place the exponent is 112 too small, for subnormals too.
  const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = uint32_t(half & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &rest, 4);
  value *= 5.192296858534828e33f; // 2^112
  return sign ? -value : value;
}

int rounded(int n) {
  return (n + 15) / 16 * 16;
}

// The vectors [n, D] of one batch and head in arrays [B, H, n, D].
template <class T>
const T* rows_of(const mx::array& a, int b, int h) {
  return a.data<T>() + b * a.strides(0) + h * a.strides(1);
}

// A head's keys or values, to be read tile by tile.
class Source {
 public:
  Source(const mx::array* in, int b, int h, int coded, const CodeSteps& steps)
      : in_(in), b_(b), h_(h), coded_(coded), steps_(steps),
        n_(in[7].shape(3)), wide_(rounded(n_)) {
    int width = 0;
    while ((1 << width) < in[6].shape(0)) ++width;
    book_ = {in[6].data<float>(), width, static_cast<int>(in[6].shape(1))};
  }

  int n() const {
    return n_;
  }
  int wide() const {
    return wide_;
  }
  const float* mean() const {
    return rows_of<float>(in_[7], b_, h_);
  }

  // Coded tokens `from` on, padded with zeros to a multiple of four; how many that is.
  int codes(int from, int count, float* u) const {
    int done = 0;
    for (const bool ahead : {false, true}) {
      const int here = ahead ? count - done : std::clamp(coded_ - from, 0, count);
      if (here == 0) continue;
      const mx::array& words = in_[ahead ? 4 : 2];
      const int64_t at = ahead ? from + done - coded_ : from;
      steps_.unpack(
          rows_of<uint32_t>(words, b_, h_) + at * words.strides(2), words.strides(2), here, book_, n_,
          wide_, u + int64_t(done) * wide_);
      done += here;
    }
    return padded(count, u);
  }

  void scales(int from, int count, float* s) const {
    for (int i = 0; i < count; ++i) {
      const bool ahead = from + i >= coded_;
      const mx::array& a = in_[ahead ? 5 : 3];
      s[i] = of_half(rows_of<uint16_t>(a, b_, h_)[(ahead ? from + i - coded_ : from + i) * a.strides(2)]);
    }
  }

  // The same of the tokens that are as they came.
  int raw(int from, int count, float* u) const {
    const int first = in_[0].shape(2);
    for (int i = 0; i < count; ++i) {
      const bool newer = from + i >= first;
      const mx::array& a = in_[newer];
      const float* x = rows_of<float>(a, b_, h_) + (newer ? from + i - first : from + i) * a.strides(2);
      std::memcpy(u + int64_t(i) * wide_, x, n_ * sizeof(float));
      std::fill(u + int64_t(i) * wide_ + n_, u + int64_t(i + 1) * wide_, 0.0f);
    }
    return padded(count, u);
  }

 private:
  int padded(int count, float* u) const {
    const int all = (count + 3) / 4 * 4;
    std::fill(u + int64_t(count) * wide_, u + int64_t(all) * wide_, 0.0f);
    return all;
  }

  const mx::array* in_; // as CodedSide lists them
  int b_, h_, coded_;
  const CodeSteps& steps_;
  int n_, wide_;
  Codebook book_;
};

// What one call is about; columns are the first tokens, the codes, the recent ones.
struct Call {
  int B, H, R, T, first, recent, coded, ahead, crossing;
  bool causal;
  const float *q, *rotated, *bias, *sinks;

  int columns() const {
    return first + coded + recent;
  }
  int raw() const {
    return first + recent;
  }
  int spans_raw() const {
    return (raw() + span - 1) / span;
  }
  int spans() const {
    return spans_raw() + (coded + ahead + span - 1) / span;
  }
  bool crossed(int t) const {
    return ahead > 0 && t >= crossing;
  }
  int seen(int t) const {
    return causal ? columns() - T + t + 1 : columns();
  }
};

// Scores of one row over `count` columns of a span from `from`, of which it sees [begin, end).
struct Part {
  int begin, end;
};

Part part_of(const Call& call, int t, bool raw, int from, int count) {
  int begin = 0, end;
  if (raw) {
    end = call.seen(t) - call.coded;
    if (end < call.first) end = std::min(call.first, call.seen(t));
    if (call.crossed(t) && from < call.first + call.ahead) {
      begin = -1; // what lies between the first and begin is read as codes instead
    }
  } else {
    end = std::min(call.coded + (call.crossed(t) ? call.ahead : 0), call.seen(t) - call.first);
  }
  return {begin, std::clamp(end - from, 0, count)};
}

// One span of one head for all rows: softmax within it, and its values' weighted sum y [R, wide].
void run_span(
    const Call& call,
    const CodeSteps& steps,
    const Source& keys,
    const Source& values,
    int b,
    int h,
    int index,
    float* y,
    float* tops,
    float* totals) {
  const bool raw = index < call.spans_raw();
  const int from = (raw ? index : index - call.spans_raw()) * span;
  const int count = std::min(span, (raw ? call.raw() : call.coded + call.ahead) - from);
  const int R = call.R, wide = keys.wide(), n = keys.n();
  float* room = workspace(2, int64_t(R) * (span + wide) + tile * std::max(wide, values.wide()) + 2 * span);
  float *s = room, *q = s + int64_t(R) * span, *u = q + int64_t(R) * wide,
        *key_scales = u + tile * std::max(wide, values.wide()), *value_scales = key_scales + span;
  const int64_t head = int64_t(b) * call.H + h;
  for (int r = 0; r < R; ++r) {
    std::memcpy(q + r * wide, (raw ? call.q : call.rotated) + (head * R + r) * n, n * sizeof(float));
    std::fill(q + r * wide + n, q + (r + 1) * wide, 0.0f);
  }
  std::fill(key_scales, key_scales + 2 * span, 1.0f);
  if (!raw) {
    keys.scales(from, count, key_scales);
    values.scales(from, count, value_scales);
  }
  for (int j = 0; j < count; j += tile) {
    const int here = std::min(tile, count - j);
    const int all = raw ? keys.raw(from + j, here, u) : keys.codes(from + j, here, u);
    steps.scores(q, R, u, all, wide, s + j, span);
  }
  for (int r = 0; r < R; ++r) {
    const int t = r % call.T;
    float* row = s + int64_t(r) * span;
    const Part part = part_of(call, t, raw, from, count);
    const float lift = raw ? 0.0f : steps.dot(call.q + (head * R + r) * n, keys.mean(), n);
    steps.place(row, part.end, key_scales, lift);
    if (call.bias != nullptr) {
      const float* of_row = call.bias + int64_t(t) * call.columns();
      for (int j = 0; j < part.end; ++j) {
        const int column = !raw ? call.first + from + j
            : from + j < call.first ? from + j : call.coded + from + j;
        row[j] = std::max(row[j] + of_row[column], lowest);
      }
    }
    if (part.begin < 0) {
      for (int j = std::max(0, call.first - from); j < std::min(part.end, call.first + call.ahead - from); ++j) {
        row[j] = -INFINITY;
      }
    }
    tops[r] = -INFINITY;
    totals[r] = 0.0f;
    if (part.end > 0) steps.soften(row, part.end, value_scales, tops[r], totals[r]);
    std::fill(row + part.end, row + (count + 3) / 4 * 4, 0.0f);
  }
  std::fill(y, y + int64_t(R) * values.wide(), 0.0f);
  for (int j = 0; j < count; j += tile) {
    const int here = std::min(tile, count - j);
    raw ? values.raw(from + j, here, u) : values.codes(from + j, here, u);
    steps.weigh(s + j, span, R, u, here, values.wide(), y);
  }
}

// Row r of a head from its spans: the part in the rotated space, and the rest.
void merge(
    const Call& call,
    const CodeSteps& steps,
    const Source& values,
    const float* y,
    const float* tops,
    const float* totals,
    int h,
    int r,
    float* rotated,
    float* rest) {
  const int spans = call.spans(), R = call.R, n = values.n(), wide = values.wide();
  float top = -INFINITY, total = 0.0f, mass = 0.0f;
  if (call.sinks != nullptr) top = call.sinks[h * (R / call.T) + r / call.T];
  const float sink = top;
  for (int i = 0; i < spans; ++i) top = std::max(top, tops[i * R + r]);
  if (call.sinks != nullptr) total = steps.exponential(sink - top);
  std::fill(rotated, rotated + n, 0.0f);
  std::fill(rest, rest + n, 0.0f);
  for (int i = 0; i < spans; ++i) {
    if (totals[i * R + r] == 0.0f) continue; // no column that this row sees
    const float weight = steps.exponential(tops[i * R + r] - top);
    const bool raw = i < call.spans_raw();
    float* to = raw ? rest : rotated;
    const float* from = y + (int64_t(i) * R + r) * wide;
    for (int c = 0; c < n; ++c) to[c] += weight * from[c];
    total += weight * totals[i * R + r];
    if (!raw) mass += weight * totals[i * R + r];
  }
  const float* mean = values.mean();
  for (int c = 0; c < n; ++c) {
    rotated[c] /= total;
    rest[c] = (rest[c] + mass * mean[c]) / total;
  }
}

void check_side(const CodedSide& side, int B, int H, int coded) {
  const int n = side.mean.shape(3);
  auto fits = [&](const mx::array& a, int last) {
    return a.ndim() == 4 && a.shape(0) == B && a.shape(1) == H && a.shape(3) == last;
  };
  check(side.points.ndim() == 2 && side.mean.ndim() == 4, "attend_codes: points or mean has too few axes");
  int width = 0;
  while ((1 << width) < side.points.shape(0)) ++width;
  const int channels = side.points.shape(1);
  check(
      side.points.shape(0) == 1 << width &&
          ((channels == 2 && width >= 4 && width <= 8) || (channels == 1 && width == 8)),
      "attend_codes: no kernel for these points");
  const int words = (n / channels * width + 31) / 32;
  check(n % channels == 0 && fits(side.mean, n) && side.mean.shape(2) == 1, "attend_codes: the mean doesn't fit");
  check(fits(side.first, n) && fits(side.recent, n), "attend_codes: raw tokens don't fit");
  check(fits(side.words, words) && fits(side.ahead_words, words), "attend_codes: words don't fit");
  check(fits(side.scales, 1) && fits(side.ahead_scales, 1), "attend_codes: scales don't fit");
  check(coded <= side.words.shape(2) && coded <= side.scales.shape(2), "attend_codes: fewer codes than said");
  check(
      side.ahead_words.shape(2) <= side.recent.shape(2) &&
          side.ahead_words.shape(2) == side.ahead_scales.shape(2),
      "attend_codes: the block ahead doesn't fit");
  check_float({side.first, side.recent, side.points, side.mean}, "attend_codes: raw tokens, points and mean must be float32");
  check(
      side.words.dtype() == mx::uint32 && side.ahead_words.dtype() == mx::uint32 &&
          side.scales.dtype() == mx::float16 && side.ahead_scales.dtype() == mx::float16,
      "attend_codes: words must be uint32 and scales float16");
}

} // namespace

std::vector<mx::array> attend_codes(
    const mx::array& q,
    const mx::array& rotated,
    const CodedSide& keys,
    const CodedSide& values,
    int rows,
    int coded,
    int crossing,
    bool causal,
    const std::optional<mx::array>& bias,
    const std::optional<mx::array>& sinks,
    mx::StreamOrDevice stream) {
  check(q.ndim() == 4 && rotated.shape() == q.shape(), "attend_codes: the queries don't fit each other");
  Call call{};
  call.B = q.shape(0), call.H = q.shape(1), call.R = q.shape(2), call.T = rows;
  call.coded = coded, call.crossing = crossing, call.causal = causal;
  check(coded >= 0 && rows > 0 && call.R % rows == 0, "attend_codes: rows don't fit the queries");
  check_side(keys, call.B, call.H, coded);
  check_side(values, call.B, call.H, coded);
  check(keys.mean.shape(3) == q.shape(3), "attend_codes: the queries don't fit the keys");
  call.first = keys.first.shape(2), call.recent = keys.recent.shape(2);
  call.ahead = keys.ahead_words.shape(2);
  check(
      values.first.shape(2) == call.first && values.recent.shape(2) == call.recent &&
          values.ahead_words.shape(2) == call.ahead,
      "attend_codes: keys and values differ in length");
  check(!causal || rows <= call.columns(), "attend_codes: more rows than columns");
  check(!bias || bias->shape() == mx::Shape{rows, call.columns()}, "attend_codes: the bias doesn't fit");
  check(!sinks || sinks->shape() == mx::Shape{call.H * (call.R / rows)}, "attend_codes: the sinks don't fit");
  Arrays inputs{q, rotated};
  for (const CodedSide* side : {&keys, &values}) {
    auto flat = [&](const mx::array& a) { inputs.push_back(mx::contiguous(a, false, stream)); };
    flat(side->first);
    flat(side->recent);
    // slices of larger arrays, read where they lie
    for (const mx::array* a : {&side->words, &side->scales}) inputs.push_back(*a);
    for (const mx::array* a : {&side->ahead_words, &side->ahead_scales, &side->points, &side->mean}) flat(*a);
  }
  if (bias) inputs.push_back(*bias);
  if (sinks) inputs.push_back(*sinks);
  const bool biased = bias.has_value(), sunk = sinks.has_value();
  check_float({q, rotated}, "attend_codes: the queries must be float32");
  if (bias) check_float({*bias}, "attend_codes: the bias must be float32");
  if (sinks) check_float({*sinks}, "attend_codes: the sinks must be float32");
  auto body = [=](const Arrays& in, Arrays& out) mutable {
    Data data;
    call.q = data(in[0]), call.rotated = data(in[1]);
    call.bias = biased ? data(in[18]) : nullptr;
    call.sinks = sunk ? data(in[18 + biased]) : nullptr;
    const CodeSteps& steps = steps_in_use();
    const int spans = call.spans(), R = call.R, heads = call.B * call.H;
    const int n = out[0].shape(3), wide = rounded(n);
    const int64_t pieces = int64_t(heads) * spans * R;
    const std::unique_ptr<float[]> room(new float[pieces * (wide + 2)]);
    float *y = room.get(), *tops = y + pieces * wide, *totals = tops + pieces;
    auto source = [&](int side, int head) {
      return Source(&in[2 + 8 * side], head / call.H, head % call.H, call.coded, steps);
    };
    const int64_t work = int64_t(heads) * R * call.columns() * n * 2;
    each(heads * spans, work, [&](int task) {
      const int head = task / spans;
      const int64_t at = int64_t(task) * R;
      run_span(call, steps, source(0, head), source(1, head), head / call.H, head % call.H,
               task % spans, y + at * wide, tops + at, totals + at);
    });
    each(heads * R, int64_t(heads) * R * spans * n, [&](int row) {
      const int head = row / R, r = row % R;
      const int64_t at = int64_t(head) * spans * R;
      merge(call, steps, source(1, head), y + at * wide, tops + at, totals + at, head % call.H, r,
            out[0].data<float>() + int64_t(row) * n, out[1].data<float>() + int64_t(row) * n);
    });
  };
  const mx::Shape shape{call.B, call.H, call.R, values.mean.shape(3)};
  return mx::array::make_arrays(
      {shape, shape},
      {mx::float32, mx::float32},
      std::make_shared<Step>(mx::to_stream(stream), "StreamerAttendCodes", body),
      std::move(inputs));
}

} // namespace streamer
